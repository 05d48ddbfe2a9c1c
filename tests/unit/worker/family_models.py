"""Tiny random models of every family as Transformers makes them, and a rank's decoder driven through paged caches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
import transformers

from kvarto.protos.model import ModelConfig
from kvarto.worker.batch import ForwardBatch
from kvarto.worker.collectives import SingleRank, thread_group
from kvarto.worker.decoder import Decoder, cache_shape
from kvarto.worker.layout import TPLayout
from kvarto.worker.weights import open_weights

BLOCK_SIZE = 8
NUM_BLOCKS = 16
MAX_MODEL_LEN = 64
VOCAB = 131
PROMPTS = [[(11 * place + 5) % VOCAB for place in range(length)] for length in (11, 1, 6)]
GQA = {"hidden_size": 56, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 7,
       "num_key_value_heads": 7, "max_position_embeddings": 128}
GPT = {"n_embd": 40, "n_inner": 100, "n_layer": 2, "n_head": 5, "n_positions": 64}
FALCON = {"hidden_size": 56, "ffn_hidden_size": 100, "num_hidden_layers": 2, "num_attention_heads": 7,
          "max_position_embeddings": 128}
GEMMA = GQA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "query_pre_attn_scalar": 10,
               "hidden_size": 48, "sliding_window": MAX_MODEL_LEN}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# By a name of the variant: class, and what differs from its defaults.
MODELS = {
    "mistral": ("Mistral", GQA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
                                  "sliding_window": MAX_MODEL_LEN}),
    "qwen2": ("Qwen2", GQA | {"num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", GQA | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 16}),
    "qwen3-biased": ("Qwen3", GQA | {"num_key_value_heads": 7, "head_dim": 8, "attention_bias": True,
                                     "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHead", GPT),
    "gpt_bigcode-mqa": ("GPTBigCode", GPT | {"attention_softmax_in_fp32": True}),
    "gpt_bigcode-mha": ("GPTBigCode", GPT | {"multi_query": False}),
    "falcon-mqa": ("Falcon", FALCON),
    "falcon-mha": ("Falcon", FALCON | {"multi_query": False, "bias": True, "tie_word_embeddings": False}),
    "falcon_40b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_attention_heads": 6,
                                       "hidden_size": 48, "num_ln_in_parallel_attn": 2}),
    "phi3": ("Phi3", GQA | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
    "phi3-partial": ("Phi3", GQA | {"hidden_size": 112, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-windowed": ("Gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "sliding_window": 9}),
    "mistral-windowed": ("Mistral", GQA | {"num_key_value_heads": 1, "sliding_window": 5}),
    "gemma3-windowed": ("Gemma3", GEMMA | {"sliding_window": 4, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3-windowed": ("Phi3", GQA | {"sliding_window": 11}),
    "qwen2-windowed": ("Qwen2", GQA | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma3": ("Gemma3", GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                                  "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}}),
    "mixtral": ("Mixtral", GQA | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", GQA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
                                     "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}),
    "qwen3_moe-normalized": ("Qwen3Moe", GQA | {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                                                "moe_intermediate_size": 40, "norm_topk_prob": True}),
    "yarn": ("Llama", GQA | {"rope_parameters": YARN}),
    "yarn-mscale": ("Qwen2", GQA | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4,
                                                               "beta_fast": 16, "truncate": False}}),
}
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
CONFIGS = {"GPT2LMHead": "GPT2Config", "Gemma3": "Gemma3TextConfig"}


def make_model(directory, name: str):
    """The model of `name`, every weight random, saved to `directory`."""
    return make(directory, *MODELS[name])


def make(directory, class_name: str, settings):
    config = getattr(transformers, CONFIGS.get(class_name, f"{class_name}Config"))(
        vocab_size=VOCAB, **TOKEN_IDS, **settings)
    config._attn_implementation = "eager"
    ending = "Model" if class_name == "GPT2LMHead" else "ForCausalLM"
    model = getattr(transformers, class_name + ending)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    return model


def expected_logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def on_ranks(tp_size: int, work):
    """What `work(comm)` returns on each of `tp_size` ranks, which are threads."""
    if tp_size == 1:
        return [work(SingleRank())]
    with ThreadPoolExecutor(tp_size) as pool:
        return list(pool.map(work, thread_group(tp_size, "cpu", timeout_s=30)))


class Driver:
    """A rank that computes whole sequences: prompts in one ragged batch, then all sequences token by token."""

    def __init__(self, config: ModelConfig, comm, max_model_len=MAX_MODEL_LEN, dtype=torch.float32,
                 quantization="none"):
        self.comm = comm
        self.layout = TPLayout.of(config, comm.world_size, comm.rank)
        self.decoder = Decoder.load(config, self.layout, open_weights(config), dtype, torch.device("cpu"), comm,
                                    max_model_len, quantization=quantization)
        shapes = [cache_shape(config, self.layout, group, 1 + NUM_BLOCKS, BLOCK_SIZE, dtype)
                  for group in self.decoder.kv_groups]
        self.caches = [torch.full(shape, float("nan"), dtype=dtype) for shape in shapes]
        self.widths = [len(TPLayout.of(config, comm.world_size, rank).vocab) for rank in range(comm.world_size)]

    def step(self, parts: list[list[int]], starts: list[int]) -> list[torch.Tensor]:
        """Whole rows of logits for the next tokens of every sequence."""
        counts = [len(part) for part in parts]
        tables = [self.tables(group, starts) for group in range(len(self.caches))]
        positions = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        batch = ForwardBatch(
            token_ids=torch.tensor([token for part in parts for token in part]),
            positions=torch.cat(positions),
            query_start_loc=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            kv_lens=torch.tensor([start + count for start, count in zip(starts, counts, strict=True)],
                                 dtype=torch.int32),
            block_tables=[table.to(torch.int32) for table in tables],
            slot_mapping=[torch.cat([row[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
                                     for row, at in zip(table, positions, strict=True)]) for table in tables],
        )
        local = self.decoder.logits(self.decoder.forward(batch, self.caches)[0]).float()
        padded = torch.nn.functional.pad(local, (0, max(self.widths) - local.shape[1]))
        gathered = self.comm.all_gather_rows(padded)
        whole = torch.cat([rows[:, :width] for rows, width in zip(gathered, self.widths, strict=True)], dim=1)
        return list(whole.split(counts))

    def tables(self, group: int, starts: list[int]) -> torch.Tensor:
        """`[num_seqs, max_blocks]` as the block space leaves them once the sequences have come to `starts`: blocks that
        lie behind the window belong to somebody else, and the null block stands in their place."""
        spec, cache, num_seqs = self.decoder.kv_groups[group], self.caches[group], len(starts)
        table = torch.stack([1 + torch.arange(s, NUM_BLOCKS, num_seqs).flip(0)[:NUM_BLOCKS // num_seqs].roll(group)
                             for s in range(num_seqs)])
        for row, start in zip(table, starts, strict=True):
            num_behind = 0 if spec.window is None else max(0, start - spec.window + 1) // BLOCK_SIZE
            behind = slice(-(-spec.num_sinks // BLOCK_SIZE), num_behind)
            cache[row[behind]] = float("nan")
            row[behind] = 0
        return table

    def generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Greedy continuations, and the logits of every position that was computed."""
        sequences = [list(prompt) for prompt in prompts]
        logits = self.step(sequences, [0] * len(sequences))
        for _ in range(num_tokens):
            for sequence, rows in zip(sequences, logits, strict=True):
                sequence.append(int(rows[-1].argmax()))
            new = self.step([sequence[-1:] for sequence in sequences], [len(sequence) - 1 for sequence in sequences])
            logits = [torch.cat(pair) for pair in zip(logits, new, strict=True)]
        return sequences, logits
