"""The one configuration object: the same names in `LLM(...)`, command-line flags, YAML files and Helm values."""

from __future__ import annotations

import importlib.util
import os
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError
from .span_export import EXPORTER
from .sparsity import COMPACTION_INTERVAL, MIN_BUDGET, OBSERVATION_WINDOW, KVSparsity

Positive = Annotated[int, Field(gt=0)]

MAX_NUM_BATCHED_TOKENS = {"cuda": 2048, "cpu": 256}
"""A processor's matrix products are as fast per token with 256 rows as with thousands, and who decodes waits less."""

MAX_NUM_MIXED_PREFILL_TOKENS: dict[str, int | None] = {"cuda": None, "cpu": 128}
"""On a processor a step takes as long as it has tokens."""

API_KEY_VARIABLE = "KVARTO_API_KEY"


class EngineConfig(BaseModel):
    """How a model is held and scheduled. Frozen; unknown keys are refused. Build it with `EngineConfig.parse`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())

    model: str = Field(min_length=1, description="Directory in Hugging Face format, `.gguf` file, hub id or alias.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights, activations and KV cache; auto: as saved in the model's files.")
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="Of the weights of linear layers, on processors. int8: 8.5 bits per element; int4: 5, and "
        "the LM head int8. In the numbers of GGML: what a GGUF file holds as Q8_0, Q4_0 or Q4_1 stays as it is.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    executor: Literal["auto", "inline", "ray"] = Field(
        "auto", description="inline: in this process, ranks as threads; auto: inline for one rank, else ray. "
        "`kvarto serve` uses ray.")
    tensor_parallel_size: Positive = Field(1, description="Ranks that share one copy of the model.")
    num_worker_groups: Positive = Field(1, description="Copies of the model, each a tensor-parallel worker group.")
    max_model_len: Positive | None = Field(
        None, description="Most tokens of a sequence, prompt and output; default: what the model was made for.")
    kv_cache_dtype: Literal["auto", "int8", "fp8", "int4"] = Field(
        "auto", description="Of the KV cache; auto: as `dtype`. int8, fp8 (E3M4): nearly twice the tokens of bfloat16. "
        "int4 (KIVI): more than three times, beside a block of `dtype` for each of max_num_seqs sequences.")
    attention_pattern: Literal["model", "sliding_window", "streaming_llm", "lm_infinite", "longformer"] = Field(
        "model", description="What full-attention layers see. model: everything; sliding_window: the last "
        "attention_window tokens; the others also the first attention_sinks: streaming_llm with positions inside the "
        "cache, lm_infinite no farther than the window, longformer where they are.")
    attention_window: Positive | None = Field(
        None, description="Tokens that a query sees, its own included, with an attention_pattern other than model.")
    attention_sinks: Annotated[int, Field(ge=0)] | None = Field(
        None, description="First tokens that stay visible; default: 4 with streaming_llm, 10 with lm_infinite; "
        "longformer needs it.")
    kv_sparsity: Literal["none", "h2o", "snapkv", "tova"] = Field(
        "none", description="Keep only the rows of the KV cache that matter most. snapkv: of the prompt, by its last "
        "queries; h2o: by the attention of every query so far; tova: by that of the last query.")
    kv_sparsity_budget: Annotated[int, Field(ge=MIN_BUDGET)] | None = Field(
        None, description="Rows that every layer and head keeps, with a kv_sparsity other than none.")
    kv_sparsity_interval: Positive | None = Field(
        None, description="Rows that h2o and tova let a sequence gain beyond the budget before it is compacted again; "
        f"default: {COMPACTION_INTERVAL}.")
    block_size: Positive = Field(16, description="Tokens of a KV-cache block; a power of two from 8 to 128.")
    num_blocks: Positive | None = Field(
        None, description="KV-cache blocks of a worker group; default: what the memory that may be used allows.")
    kv_cache_memory_bytes: Positive | None = Field(
        None, description="Most memory of one rank's KV pool; default: half of what is left after the weights.")
    enable_prefix_caching: bool = Field(
        True, description="Keep full blocks of ended sequences and share them with prompts that begin alike.")
    swap_space_bytes: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Host memory of one rank for swapped sequences and evicted cached blocks; 0: none; default: "
        "as much as the KV pool, at most a tenth of what is left and 1 GiB.")
    preemption_mode: Literal["auto", "swap", "recompute"] = Field(
        "auto", description="How a sequence gives its blocks up; auto: the cheaper by costs measured at start-up.")
    victim_policy: str = Field("latest", description="Which request is preempted first: latest, least_computed.")
    eviction_policy: str = Field("lru", description="Which cached block is evicted first: lru, retention.")
    watermark_policy: str = Field(
        "one_percent", description="Blocks that an admission leaves free: one_percent, none.")
    kv_disk_path: str | None = Field(
        None, description="Directory to which cached blocks fall from host memory, and where they outlive a restart.")
    kv_disk_bytes: Positive = Field(
        4 * 2**30, description="Most bytes of one rank's files under kv_disk_path.")
    max_num_seqs: Positive = Field(256, description="Most sequences in one step.")
    max_num_batched_tokens: Positive | None = Field(
        None, description="Most tokens in one step: longer prompts are prefilled in chunks of it, while others decode; "
                          "default: 2048 on a GPU, 256 on a processor, which computes no faster with more.")
    max_num_mixed_prefill_tokens: Positive | None = Field(
        None, description="Most tokens of prompts in a step in which sequences decode, which wait for it; default: no "
                          "limit of their own on a GPU, 128 on a processor.")
    async_scheduling: bool = Field(True, description="Plan step t+1 before the result of step t is back.")
    seed: int = Field(0, description="From which requests without a seed of their own draw theirs.")
    cpus_per_rank: Annotated[float, Field(gt=0)] | None = Field(
        None, description="CPUs that Ray reserves per rank, may be a fraction; default: an even share, at most 1.")
    threads_per_rank: Positive | None = Field(
        None, description="CPU threads a rank computes with; default: the cores it may use, shared among its ranks.")
    placement_timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="How long to wait for Ray to place a worker group before it is an error.")
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        120.0, description="A step or a collective that takes longer means that its worker group is dead.")
    lease_s: Annotated[float, Field(ge=2)] = Field(
        10.0, description="A rank that does not hear from its Head for so long ends itself.")
    check_integrity: bool = Field(
        False, description="Debug mode: check the block space's invariants after every step.")
    otlp_traces_endpoint: str | None = Field(
        None, description="Where every process sends the spans of its steps, OTLP over HTTP: "
                          "http://collector:4318/v1/traces. Needs kvarto[tracing].")
    min_port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        None, description="First port for the processes' own sockets; default: any free one.")
    max_port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(None, description="Last of these ports.")

    @field_validator("block_size")
    @classmethod
    def _block_size_is_a_power_of_two(cls, value: int) -> int:
        if value not in (8, 16, 32, 64, 128):
            raise ValueError(f"must be 8, 16, 32, 64 or 128, got {value}")
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _endpoint_is_an_http_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(f"must be an HTTP URL such as http://collector:4318/v1/traces, got {value!r}")
        if value is not None and not _is_installed(EXPORTER):
            raise ValueError("needs an exporter that is not installed: pip install 'kvarto[tracing]'")
        return value

    @model_validator(mode="after")
    def _values_go_together(self) -> Self:
        if (self.min_port is None) != (self.max_port is None):
            raise ValueError("min_port and max_port go together: set both or none")
        if self.min_port is not None and self.max_port is not None and self.max_port < self.min_port:
            raise ValueError(f"max_port ({self.max_port}) is below min_port ({self.min_port})")
        if self.attention_pattern == "model":
            for key in ("attention_window", "attention_sinks"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} goes with an attention_pattern: choose sliding_window, streaming_llm, "
                                     "lm_infinite or longformer")
        elif self.attention_window is None:
            raise ValueError(f"attention_pattern={self.attention_pattern!r} needs attention_window")
        if self.attention_pattern == "sliding_window" and self.attention_sinks:
            raise ValueError("attention_pattern='sliding_window' has no sinks: use streaming_llm, lm_infinite or "
                             "longformer with attention_sinks")
        if self.attention_pattern == "longformer" and not self.attention_sinks:
            raise ValueError("attention_pattern='longformer' needs attention_sinks: how many of the first tokens are "
                             "global")
        self._check_sparsity()
        if self.preemption_mode == "swap" and self.swap_space_bytes == 0:
            raise ValueError("preemption_mode='swap' needs host memory: leave swap_space_bytes unset or above 0")
        if self.kv_disk_path is not None and not (self.enable_prefix_caching and self.swap_space_bytes != 0):
            raise ValueError("kv_disk_path holds cached blocks that fall from host memory: it needs "
                             "enable_prefix_caching=True and swap_space_bytes above 0")
        if self.kv_disk_path is not None and self.num_worker_groups > 1:
            raise ValueError("kv_disk_path belongs to one worker group: use num_worker_groups=1")
        if self.executor == "inline" and self.num_worker_groups > 1:
            raise ValueError("executor='inline' runs one worker group: use executor='ray' for num_worker_groups > 1")
        return self

    def batched_tokens(self, device: str) -> int:
        """`max_num_batched_tokens`, or its default on "cpu" or "cuda"."""
        return self.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[device]

    def mixed_prefill_tokens(self, device: str) -> int | None:
        """`max_num_mixed_prefill_tokens`, or its default on "cpu" or "cuda"."""
        return self.max_num_mixed_prefill_tokens or MAX_NUM_MIXED_PREFILL_TOKENS[device]

    @property
    def on_ray(self) -> bool:
        """Whether the ranks are Ray actors, by `executor`; otherwise they are in the caller's process."""
        return self.executor == "ray" or (
            self.executor == "auto" and (self.tensor_parallel_size > 1 or self.num_worker_groups > 1))

    def _check_sparsity(self) -> None:
        policy = self.kv_sparsity
        if policy == "none":
            if self.kv_sparsity_budget is not None:
                raise ValueError("kv_sparsity_budget goes with a kv_sparsity: choose h2o, snapkv or tova")
            if self.kv_sparsity_interval is not None:
                raise ValueError("kv_sparsity_interval goes with a kv_sparsity: choose h2o or tova")
            return
        if self.kv_sparsity_budget is None:
            raise ValueError(f"kv_sparsity={policy!r} needs kv_sparsity_budget: how many rows are kept")
        if policy == "snapkv" and self.kv_sparsity_interval is not None:
            raise ValueError("kv_sparsity='snapkv' compacts once, at the end of a prompt: leave kv_sparsity_interval "
                             "unset, or choose h2o or tova")
        if self.attention_pattern != "model":
            raise ValueError(f"kv_sparsity={policy!r} and attention_pattern={self.attention_pattern!r} do not go "
                             "together: both say which tokens are seen; use one of them")
        if self.preemption_mode == "recompute" or self.swap_space_bytes == 0:
            raise ValueError(f"kv_sparsity={policy!r} needs host memory to preempt by swapping, because what was "
                             "dropped decides which tokens follow: leave preemption_mode and swap_space_bytes unset")
        if self.kv_disk_path is not None:
            raise ValueError(f"kv_sparsity={policy!r} and kv_disk_path do not go together: use one of them")
        if self.kv_cache_dtype == "int4":
            raise ValueError(f"kv_sparsity={policy!r} and kv_cache_dtype='int4' do not go together: int4 has one scale "
                             "per channel of a block, whose rows must stay together; use int8 or fp8")
        for key in ("max_num_batched_tokens", "max_num_mixed_prefill_tokens"):
            if policy == "snapkv" and (getattr(self, key) or OBSERVATION_WINDOW) < OBSERVATION_WINDOW:
                raise ValueError(f"kv_sparsity='snapkv' computes the last {OBSERVATION_WINDOW} tokens of a prompt in "
                                 f"one step: {key} must be at least {OBSERVATION_WINDOW}")

    @property
    def sparsity(self) -> KVSparsity | None:
        """What `kv_sparsity` and its keys come to."""
        if self.kv_sparsity == "none" or self.kv_sparsity_budget is None:
            return None
        return KVSparsity(
            policy=self.kv_sparsity, budget=self.kv_sparsity_budget,
            interval=self.kv_sparsity_interval or COMPACTION_INTERVAL,
            window=OBSERVATION_WINDOW if self.kv_sparsity == "snapkv" else 1)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Validate `values`. Raises `ConfigError` that names every offending key."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls)) from None


class ServeConfig(EngineConfig):
    """`EngineConfig` and how the server is reached. What `kvarto serve` and `kvarto:build_app` take."""

    served_model_name: str | None = Field(None, description="Name that requests use; default: `model` as given.")
    host: str = Field("127.0.0.1", description="Address that the HTTP and gRPC servers listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="HTTP port; 0: any free one.")
    grpc_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        9000, description="gRPC port; 0: any free one; null: no gRPC server.")
    api_key: str | None = Field(
        None, repr=False, description="Key that every request must bear; default: the environment's "
        f"{API_KEY_VARIABLE}, which keeps it out of files and process lists; without that, none is asked for.")
    num_frontends: Positive = Field(1, description="Ray Serve replicas that tokenize and stream.")
    drain_timeout_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="How long running requests may take to finish after SIGTERM.")

    @model_validator(mode="before")
    @classmethod
    def _api_key_of_the_environment(cls, values: Any) -> Any:
        if isinstance(values, dict) and "api_key" not in values and API_KEY_VARIABLE in os.environ:
            return {**values, "api_key": os.environ[API_KEY_VARIABLE]}
        return values

    @field_validator("api_key")
    @classmethod
    def _api_key_can_be_sent(cls, value: str | None) -> str | None:
        # A header's value arrives stripped: such a key would lock everybody out.
        if value is not None and (not value or value != value.strip()):
            raise ValueError("must not be empty, nor begin or end with white space (a secret's last line break?): to "
                             f"ask for no key, leave it out and {API_KEY_VARIABLE} unset")
        return value

    @property
    def public_name(self) -> str:
        return self.served_model_name or self.model


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _explain(error: ValidationError, cls: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown configuration key '{key}'; known keys: {', '.join(sorted(cls.model_fields))}")
        else:
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
