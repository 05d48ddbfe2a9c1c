"""A decoder whose forward pass is one native call: the bits of the ops one by one, in every family that can be
recorded."""

from __future__ import annotations

import importlib.util
import logging
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from kvarto.kernels import available_backends
from kvarto.protos.errors import UnavailableError
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SequenceStart, SequenceStep
from kvarto.worker.batch import SequenceTable, build, lay_out
from kvarto.worker.collectives import SingleRank
from kvarto.worker.decoder import Decoder, cache_shape
from kvarto.worker.families import read_model_config
from kvarto.worker.kv_groups import kv_dtype
from kvarto.worker.layout import TPLayout
from kvarto.worker.weights import open_weights

_spec = importlib.util.spec_from_file_location("family_models", Path(__file__).with_name("family_models.py"))
assert _spec and _spec.loader
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

BLOCK_SIZE, NUM_BLOCKS = 8, 24
RECORDED = ["mistral-windowed", "qwen2", "qwen3", "qwen3-biased", "gemma2-windowed", "gemma3-windowed", "phi3", "yarn"]
OP_BY_OP = {"gpt2": "add", "falcon-mqa": "native_layer_norm", "mixtral": "softmax"}

pytestmark = pytest.mark.skipif(len(available_backends()) == 1, reason="there are no native kernels here")


class Rank:
    """A decoder with its caches, driven through steps as a rank does."""

    def __init__(self, path, comm=None, kv_cache_dtype="auto", dtype=torch.float32):
        config = read_model_config(str(path))
        comm = comm or SingleRank()
        layout = TPLayout.of(config, comm.world_size, comm.rank)
        self.decoder = Decoder.load(config, layout, open_weights(config), dtype, torch.device("cpu"), comm,
                                    models.MAX_MODEL_LEN, kv_cache_dtype)
        groups = self.decoder.kv_groups
        torch.manual_seed(1)
        self.caches = [
            torch.zeros(cache_shape(config, layout, group, NUM_BLOCKS + 1, BLOCK_SIZE, dtype, kv_cache_dtype),
                        dtype=kv_dtype(group, dtype, kv_cache_dtype))
            for group in groups]
        self.table = SequenceTable(4, models.MAX_MODEL_LEN, BLOCK_SIZE, len(groups), has_residual=groups[-1].residual)

    def run(self):
        """Hidden states of chunks of two prompts, beside each other and beside decodes, and the best of some rows."""
        for seq_id, length in ((1, 21), (2, 9)):
            self.table.start(SequenceStart(
                seq_id=seq_id, seq_index=0, token_ids=[(7 * at + seq_id) % models.VOCAB for at in range(length)],
                num_prompt_tokens=length, num_computed_tokens=0, params=SamplingParams()))
        found = []
        for counts, sampled in (((10, 0), [9, 4]), ((1, 5), []), ((10, 1), [10, 0, 9]), ((0, 3), [2])):
            steps = [self._step(seq_id, count, first=not found or (seq_id == 2 and len(found) == 1))
                     for seq_id, count in zip((1, 2), counts, strict=True) if count]
            layout = lay_out(steps, self.table)
            batch = build(layout, self.table, torch.device("cpu"), np.array(sampled, np.int64))
            hidden, best = self.decoder.forward(batch, self.caches)
            assert (best is None) == (not sampled)
            found.append([each.clone() for each in (hidden, *(best or ()))])
            self.table.num_computed[layout.rows] = layout.ends
        return found

    def _step(self, seq_id, count, first):
        blocks = [[3 * seq_id + index for index in range(3)] for _ in self.caches] if first else []
        return SequenceStep(seq_id=seq_id, num_tokens=count, new_block_ids=blocks)


def check(path, **options):
    plain, recorded = Rank(path, **options), Rank(path, **options)
    recorded.decoder.record(recorded.caches, 16, 4)
    expected, found = plain.run(), recorded.run()
    assert len(found) == 4
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(recorded.caches, plain.caches, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", RECORDED)
def test_one_call_gives_the_same_bits(tmp_path, caplog, family, dtype):
    models.make_model(tmp_path, family)
    caplog.set_level(logging.INFO)
    check(tmp_path, dtype=dtype)
    assert "runs as one native call" in caplog.text


@pytest.mark.parametrize("tp_size", [2, 3])
def test_one_call_of_each_of_several_ranks_gives_the_same_bits(tmp_path, caplog, tp_size):
    models.make_model(tmp_path, "qwen3-biased")
    caplog.set_level(logging.INFO)
    expected = models.on_ranks(tp_size, lambda comm: Rank(tmp_path, comm).run())

    def run(comm):
        rank = Rank(tmp_path, comm)
        rank.decoder.record(rank.caches, 16, 4)
        return rank.run()

    for one, other in zip(models.on_ranks(tp_size, run), expected, strict=True):
        for found, wanted in zip(chain(*one), chain(*other), strict=True):
            assert torch.equal(found, wanted)
    assert caplog.text.count("runs as one native call") == tp_size


def test_a_rank_that_is_gone_is_told_of(tmp_path):
    models.make_model(tmp_path, "qwen2")

    def run(comm):
        rank = Rank(tmp_path, comm)
        rank.decoder.record(rank.caches, 16, 4)
        if comm.rank:
            comm.close()
            return
        with pytest.raises(UnavailableError, match="must be started again"):
            rank.run()

    models.on_ranks(2, run)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_caches_that_are_quantized_give_the_same_bits(tmp_path, caplog, family, kv_cache_dtype):
    models.make_model(tmp_path, family)
    caplog.set_level(logging.INFO)
    check(tmp_path, kv_cache_dtype=kv_cache_dtype)
    assert "runs as one native call" in caplog.text


@pytest.mark.parametrize("family", OP_BY_OP)
def test_what_computes_otherwise_runs_op_by_op_and_the_log_says_why(tmp_path, caplog, family):
    models.make_model(tmp_path, family)
    caplog.set_level(logging.INFO)
    check(tmp_path)
    assert OP_BY_OP[family] in caplog.text
    assert "runs as one native call" not in caplog.text


def test_other_caches_than_the_recorded_run_op_by_op(tmp_path):
    models.make_model(tmp_path, "qwen2")
    rank, other = Rank(tmp_path), Rank(tmp_path)
    rank.decoder.record([cache.clone() for cache in rank.caches], 16, 4)
    for one, two in zip(chain(*rank.run()), chain(*other.run()), strict=True):
        assert torch.equal(one, two)
    assert any(cache.any() for cache in rank.caches)
