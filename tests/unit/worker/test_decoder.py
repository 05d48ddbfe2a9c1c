"""The decoder against Transformers: tiny random models, paged caches, ranks as threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvarto.protos.model import KVGroupSpec
from kvarto.worker.batch import ForwardBatch
from kvarto.worker.collectives import Communicator, SingleRank
from kvarto.worker.decoder import Decoder, block_bytes, cache_shape, kv_groups
from kvarto.worker.families import read_model_config
from kvarto.worker.layout import TPLayout
from kvarto.worker.weights import WeightSource, open_weights

BLOCK_SIZE = 8
NUM_BLOCKS = 16
CPU = torch.device("cpu")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "gqa": {},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 32},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "rope-llama3": {"rope_parameters": LLAMA3},
    "rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}
# Per step and sequence how many tokens are computed: chunked prefills, decodes, and both in one batch.
STEPS = [(5, 0), (1, 9), (1, 8), (1, 1), (1, 1)]


def make_model(directory, shard_size="50GB", **changes) -> LlamaForCausalLM:
    """9 query heads on 3 KV heads unless `changes` say otherwise; every weight random, saved to `directory`."""
    settings = {"vocab_size": 330, "hidden_size": 72, "intermediate_size": 160, "num_hidden_layers": 2,
                "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 256} | changes
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


class Threads(Communicator):
    """A rank among threads of this process."""

    def __init__(self, rank: int, slots: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def all_gather_rows(self, tensor):
        self._slots[self.rank] = tensor.clone()
        self._barrier.wait()
        gathered = torch.stack(self._slots)
        self._barrier.wait()
        return gathered

    def all_reduce(self, tensor):
        return tensor.copy_(self.all_gather_rows(tensor).float().sum(0))

    def broadcast(self, tensor, src=0):
        return tensor.copy_(self.all_gather_rows(tensor)[src])

    def close(self):
        return None


def on_ranks(tp_size: int, work):
    """What `work(comm)` returns on each of `tp_size` ranks."""
    if tp_size == 1:
        return [work(SingleRank())]
    slots, barrier = [torch.empty(0)] * tp_size, threading.Barrier(tp_size, timeout=30)
    with ThreadPoolExecutor(tp_size) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, slots, barrier)), range(tp_size)))


def load(path, comm, source=None, dtype=torch.float32) -> Decoder:
    config = read_model_config(str(path))
    layout = TPLayout.of(config, comm.world_size, comm.rank)
    return Decoder.load(config, layout, source or open_weights(config), dtype, CPU, comm, max_model_len=64)


def empty_cache(decoder: Decoder, dtype=torch.float32) -> torch.Tensor:
    shape = cache_shape(decoder.config, decoder.layout, decoder.kv_groups[0], NUM_BLOCKS, BLOCK_SIZE, dtype)
    return torch.full(shape, float("nan"), dtype=dtype)


def make_batch(sequences: list[list[int]], starts: list[int], counts: list[int]) -> ForwardBatch:
    """Tokens `starts[s] : starts[s] + counts[s]` of every sequence with any; the blocks of sequences interleave."""
    live = [s for s, count in enumerate(counts) if count]
    tables = {s: torch.arange(s, NUM_BLOCKS, len(sequences)).flip(0) for s in live}
    positions = {s: torch.arange(starts[s], starts[s] + counts[s]) for s in live}
    slots = [tables[s][positions[s] // BLOCK_SIZE] * BLOCK_SIZE + positions[s] % BLOCK_SIZE for s in live]
    return ForwardBatch(
        token_ids=torch.tensor([token for s in live for token in sequences[s][starts[s]:starts[s] + counts[s]]]),
        positions=torch.cat([positions[s] for s in live]),
        query_start_loc=torch.tensor([0, *accumulate(counts[s] for s in live)], dtype=torch.int32),
        kv_lens=torch.tensor([starts[s] + counts[s] for s in live], dtype=torch.int32),
        block_tables=[torch.stack([tables[s] for s in live]).to(torch.int32)],
        slot_mapping=[torch.cat(slots)],
    )


def run_steps(decoder: Decoder, sequences: list[list[int]], dtype=torch.float32) -> list[torch.Tensor]:
    """This rank's logits of every token of each sequence, computed over `STEPS`."""
    cache, done = empty_cache(decoder, dtype), [0] * len(sequences)
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    for counts in STEPS:
        logits = decoder.logits(decoder.forward(make_batch(sequences, done, counts), [cache])[0])
        for s, part in enumerate(logits.split(list(counts))):
            rows[s].append(part)
        done = [before + count for before, count in zip(done, counts, strict=True)]
    return [torch.cat(parts) for parts in rows]


def random_sequences(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    totals = [sum(counts) for counts in zip(*STEPS, strict=True)]
    return [torch.randint(vocab_size, (total,), generator=generator).tolist() for total in totals]


def expected_logits(model: LlamaForCausalLM, sequence: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([sequence])).logits[0].float()


def check_equal(model: LlamaForCausalLM, path, tp_size: int) -> None:
    sequences = random_sequences(model.config.vocab_size)
    ranks = on_ranks(tp_size, lambda comm: run_steps(load(path, comm), sequences))
    for s, sequence in enumerate(sequences):
        logits = torch.cat([rank[s] for rank in ranks], dim=-1)
        torch.testing.assert_close(logits, expected_logits(model, sequence), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(tmp_path, name, tp_size):
    check_equal(make_model(tmp_path, **MODELS[name]), tmp_path, tp_size)


def test_sharded_files_give_the_same_logits(tmp_path):
    model = make_model(tmp_path, shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_equal(model, tmp_path, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(tmp_path, dtype):
    model = make_model(tmp_path)
    sequences = random_sequences(model.config.vocab_size)
    logits = run_steps(load(tmp_path, SingleRank(), dtype=dtype), sequences, dtype)
    for part, sequence in zip(logits, sequences, strict=True):
        expected = expected_logits(model, sequence)
        assert part.dtype == dtype
        assert (part.float() - expected).abs().mean() < 0.02 * expected.abs().mean()


def save_gguf(model: LlamaForCausalLM, path, rope_factors=None) -> str:
    """`model` as llama.cpp's converter writes it, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for hf_name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in hf_name:
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(hf_name, (".weight", ".bias")), values.copy())
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("tp_size", [1, 4])
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path, tp_size):
    model = make_model(tmp_path, attention_bias=True)
    check_equal(model, save_gguf(model, tmp_path / "tiny.gguf"), tp_size)


def test_frequency_factors_of_a_gguf_mean_llama3_scaling(tmp_path):
    model = make_model(tmp_path, rope_parameters=LLAMA3)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    check_equal(model, save_gguf(model, tmp_path / "tiny.gguf", factors), 1)


class Spy(WeightSource):
    """Counts the elements that a rank asks for."""

    def __init__(self, inner: WeightSource) -> None:
        self._inner, self.num_elements = inner, 0

    def names(self):
        return self._inner.names()

    def shape(self, name):
        return self._inner.shape(name)

    def file_of(self, name):
        return self._inner.file_of(name)

    def read(self, name, rows=None, columns=None):
        tensor = self._inner.read(name, rows, columns)
        self.num_elements += tensor.numel()
        return tensor


@pytest.mark.parametrize("tp_size", [2, 3])
def test_a_rank_reads_its_own_slices_only(tmp_path, tp_size):
    make_model(tmp_path)
    config = read_model_config(str(tmp_path))

    def read_elements(comm):
        spy = Spy(open_weights(config))
        load(tmp_path, comm, spy)
        return spy.num_elements

    read = sum(on_ranks(tp_size, read_elements))
    source = open_weights(config)
    sizes = {name: torch.Size(source.shape(name)).numel() for name in source.names()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert read == sum(sizes.values()) + (tp_size - 1) * norms


def test_kv_groups_and_block_bytes_of_a_llama(tmp_path):
    make_model(tmp_path)
    config = read_model_config(str(tmp_path))
    (group,) = kv_groups(config, 256)
    assert group == KVGroupSpec(layer_ids=(0, 1))
    layout = TPLayout.of(config, 2, 0)
    assert cache_shape(config, layout, group, 5, 16, torch.float16) == (5, 2, 2, 2, 16, 8)
    assert cache_shape(config, layout, group, 5, 16, torch.float16, "int8") == (5, 2, 2, 2, 16, 8 + 4)
    assert block_bytes(config, layout, group, 16, torch.float16, "fp8") == 2 * 2 * 2 * 16 * (8 + 4)
    assert block_bytes(config, layout, group, 16, torch.bfloat16) == 2 * 2 * 2 * 16 * 8 * 2
