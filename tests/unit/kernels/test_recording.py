"""Recorded ops give the bits that they give one by one, for any number of tokens, in memory that they share rightly."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kvarto.kernels import (
    NotRecordableError,
    Recording,
    available_backends,
    best_tokens,
    gated,
    linear,
    op_times,
    pack_linear,
    paged_attention,
    rms_norm,
    rotate,
    take_rows,
    write_kv,
)

MAX_TOKENS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 48, 64, 4, 2, 16, 8, 12
LAYERS = 3

pytestmark = pytest.mark.skipif(len(available_backends()) == 1, reason="there are no native kernels here")


@dataclass
class Step:
    token_ids: Tensor
    positions: Tensor
    query_start_loc: Tensor
    kv_lens: Tensor
    block_tables: list[Tensor]
    slot_mapping: list[Tensor]
    sampled_rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    filled_blocks: list[Tensor] = field(default_factory=list)


def make_step(counts: list[int], held: list[int]) -> Step:
    """Sequences with so many rows in blocks of their own, and so many new tokens each."""
    tables, slots, first = [], [], 0
    for count, rows in zip(counts, held, strict=True):
        num_blocks = -(-(rows + count) // BLOCK_SIZE)
        tables.append(list(range(first, first + num_blocks)))
        slots += [first * BLOCK_SIZE + row for row in range(rows, rows + count)]
        first += num_blocks
    width = max(map(len, tables))
    token_ids = torch.arange(sum(counts)) * 5 % MAX_TOKENS
    positions = torch.cat([torch.arange(rows, rows + count) for rows, count in zip(held, counts, strict=True)])
    return Step(
        token_ids, positions, torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32),
        torch.tensor([rows + count for rows, count in zip(held, counts, strict=True)], dtype=torch.int32),
        [torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)],
        [torch.tensor(slots)])


class Layers:
    """A small decoder in the ops that can be recorded."""

    def __init__(self, dtype: torch.dtype) -> None:
        def random(*shape: int) -> Tensor:
            return (torch.randn(shape) * 0.2).to(dtype)

        self.norm = random(HIDDEN)
        self.qkv = pack_linear(random((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), torch.randn(8 * HEAD_DIM))
        self.o, self.inner = pack_linear(random(HIDDEN, HEADS * HEAD_DIM)), pack_linear(random(160, HIDDEN))
        self.down = pack_linear(random(HIDDEN, 80))
        self.cache = random(NUM_BLOCKS, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        angles = torch.rand(MAX_TOKENS, HEAD_DIM // 2) * 6
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        cos, sin = self.cos[:len(x)], self.sin[:len(x)]
        addend = None
        for layer in range(LAYERS):
            heads = linear(rms_norm(x, self.norm, 1e-5, addend=addend), self.qkv).view(len(x), -1, HEAD_DIM)
            qk, value = heads[:, :HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS:]
            rms_norm(qk, self.norm[:HEAD_DIM], 1e-5, out=qk)
            rotate(qk, cos, sin)
            write_kv(qk[:, HEADS:], value, self.cache, layer, step.slot_mapping[0])
            attended = paged_attention(qk[:, :HEADS], self.cache, layer, step.block_tables[0], step.query_start_loc,
                                       step.kv_lens, 0.25)
            part = linear(attended.flatten(1), self.o)
            addend = linear(gated(linear(rms_norm(x, self.norm, 1e-5, addend=part), self.inner), "silu"), self.down)
        return rms_norm(x, self.norm, 1e-5, addend=addend)


def record(layers: Layers, dtype: torch.dtype) -> tuple[Recording, Tensor, Tensor]:
    recording, x = Recording(), torch.zeros(MAX_TOKENS, HIDDEN, dtype=dtype)
    step = make_step([MAX_TOKENS], [0])
    with torch.inference_mode(), recording.record(step):
        out = layers(x, step)
    return recording, x, out


STEPS = [([5, 1, 20], [0, 9, 3]), ([1], [0]), ([MAX_TOKENS], [16]), ([1, 1, 1], [8, 7, 30]), ([0, 2], [4, 15])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_gives_the_bits_of_the_ops_one_by_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = Layers(dtype)
    recording, x, out = record(layers, dtype)
    assert len(recording) == 11 * LAYERS + 1
    for counts, held in STEPS:
        step, tokens, cache = make_step(counts, held), torch.randn(sum(counts), HIDDEN).to(dtype), layers.cache.clone()
        expected, written = layers(tokens.clone(), step), layers.cache.clone()
        layers.cache.copy_(cache)
        x[:len(tokens)] = tokens
        recording.replay(step)
        assert torch.equal(out[:len(tokens)], expected)
        assert torch.equal(layers.cache, written)


def test_recording_computes_nothing() -> None:
    layers = Layers(torch.float32)
    before = layers.cache.clone()
    record(layers, torch.float32)
    assert torch.equal(layers.cache, before)


def test_memory_is_what_one_layer_needs() -> None:
    recording, _, _ = record(Layers(torch.float32), torch.float32)
    widths = HIDDEN + 8 * HEAD_DIM + HEADS * HEAD_DIM + HIDDEN + 160 + 80 + 2 * HIDDEN
    assert recording.num_bytes < 1.1 * MAX_TOKENS * widths * 4


def test_memory_is_given_out_again_once_no_view_is_left() -> None:
    recording = Recording()
    first = recording.empty((8, 4), torch.float32)
    view, address = first[2:].view(-1), first.data_ptr()
    del first
    assert recording.empty((8, 4), torch.float32).data_ptr() != address
    del view
    found = {recording.empty((8, 4), torch.float32).data_ptr() for _ in range(2)}
    assert address in found
    assert address % 64 == 0


def test_what_is_no_native_op_is_named_and_nothing_stays_recorded() -> None:
    recording, x, weight = Recording(), torch.randn(4, HIDDEN), torch.randn(HIDDEN)
    with pytest.raises(NotRecordableError, match="add"), recording.record(make_step([4], [0])):
        rms_norm(x, weight, 1e-5) + x
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)


def test_a_replay_raises_what_its_ops_raise() -> None:
    # The recording keeps neither weights and cache nor what it reads.
    layers = Layers(torch.float32)
    recording, *_inputs = record(layers, torch.float32)
    step = make_step([2, 3], [0, 0])
    step.slot_mapping[0][3] = NUM_BLOCKS * BLOCK_SIZE
    with pytest.raises(ValueError, match="slot of token 3"):
        recording.replay(step)
    step = make_step([2, 3], [0, 0])
    step.block_tables[0][1, 0] = -1
    with pytest.raises(ValueError, match="block_tables: sequence 1"):
        recording.replay(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_go_by_a_steps_tokens_and_sampled_rows_have_ops_of_their_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding, head = torch.randn(MAX_TOKENS, HIDDEN).to(dtype), pack_linear(torch.randn(300, HIDDEN).to(dtype))
    angles, weight = torch.randn(64, 3), torch.randn(HIDDEN).to(dtype)

    def forward(step: Step) -> tuple[Tensor, ...]:
        x = take_rows(embedding, step.token_ids, first=2, partial=True, scale=1.75)
        turns = take_rows(angles, step.positions)
        hidden = rms_norm(x, weight, 1e-5)
        return hidden, turns, *best_tokens(linear(take_rows(hidden, step.sampled_rows), head))

    recording, longest = Recording(), make_step([MAX_TOKENS], [0])
    longest.sampled_rows = torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode(), recording.record(longest):
        recorded = forward(longest)
    for sampled in ([0, 5, 25], [3], [], [25, 0, 0, 1]):
        step = make_step([5, 1, 20], [0, 9, 3])
        step.sampled_rows = torch.tensor(sampled, dtype=torch.int64)
        with torch.inference_mode():
            for out in recorded[2:]:
                out.fill_(7)
        recording.replay(step)
        expected = forward(step)
        for found, wanted in zip(recorded, expected, strict=True):
            assert torch.equal(found[:len(wanted)], wanted)
        assert all((out[len(sampled):] == 7).all() for out in recorded[2:])
    step.positions[1] = 64
    with pytest.raises(ValueError, match="index: entry 1 names no row"):
        recording.replay(step)


def test_other_threads_are_not_recorded() -> None:
    recording, x, weight = Recording(), torch.randn(4, HIDDEN), torch.randn(HIDDEN)
    expected, found = rms_norm(x, weight, 1e-5), []
    with recording.record(make_step([4], [0])):
        thread = threading.Thread(target=lambda: found.append(rms_norm(x, weight, 1e-5)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected)
    assert len(recording) == 0


@pytest.mark.parametrize("replays", [False, True])
def test_ops_are_timed_by_kind_where_somebody_asks(replays: bool) -> None:
    layers, tokens = Layers(torch.float32), torch.randn(MAX_TOKENS, HIDDEN)
    recording, x, _ = record(layers, torch.float32)
    x.copy_(tokens)
    started = time.perf_counter_ns()
    with op_times() as taken:
        for _ in range(20):
            if replays:
                recording.replay(make_step([MAX_TOKENS], [0]))
            else:
                layers(tokens, make_step([MAX_TOKENS], [0]))
    passed = time.perf_counter_ns() - started
    assert set(taken) == {"norm", "rotation", "activation", "linear", "cache_write", "attention"}
    assert passed / 20 < sum(taken.values()) <= passed
