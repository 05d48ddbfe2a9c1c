"""The disk tier of a rank: what a later rank finds, and damaged files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.protos.step import BlockMoves, RankCosts

_spec = importlib.util.spec_from_file_location("rank_world", Path(__file__).with_name("rank_world.py"))
assert _spec and _spec.loader
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
Driver, start, step, of, alone = world.Driver, world.start, world.step, world.of, world.alone
DRAWN, PROMPT = world.DRAWN, world.PROMPT
COSTS = RankCosts(copy_bytes_per_s=1.0, prefill_tokens_per_s=1.0)
KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def driver(model):
    return world.Driver(model[0])


def stored(driver):
    """Prefill, and keep the first two blocks of the prompt on disk under KEY and OTHER."""
    gained = of(driver.prefill(1, [1, 2, 3]), 1)
    driver.run(ends=[1], moves=[BlockMoves(swap_outs=[(1, 1), (2, 2)])])
    driver.run(moves=[BlockMoves(disk_stores=[(1, KEY), (2, OTHER)])])
    return gained


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_later_rank_goes_on_from_the_blocks_on_disk(model, tmp_path, tp_size):
    expected = stored(Driver(model[0], tp_size, kv_disk_path=str(tmp_path)))
    later = Driver(model[0], tp_size, kv_disk_path=str(tmp_path))
    for rank in later.ranks:
        assert sorted(rank.ready(COSTS).stored_keys[0]) == [KEY, OTHER]
    results = later.results(
        moves=[BlockMoves(disk_loads=[(KEY, 4), (OTHER, 5)], swap_ins=[(4, 9), (5, 8)])],
        starts=[start(1, computed=16)], steps=[step(1, 4, new_block_ids=[[9, 8, 7]])])
    assert [(result.rank, result.failed_loads) for result in results] == [(rank, []) for rank in range(tp_size)]
    assert of(results[0], 1) == expected


def files_of(tmp_path, key):
    return sorted(tmp_path.glob(f"*/0-{key.hex()}.kv"))


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-4] + b"evil")], ids=["truncated", "missing", "corrupt"])
def test_a_damaged_file_is_a_failed_load(model, tmp_path, damage):
    driver = Driver(model[0], kv_disk_path=str(tmp_path))
    stored(driver)
    (path,) = files_of(tmp_path, OTHER)
    damage(path)
    result = driver.run(moves=[BlockMoves(disk_loads=[(KEY, 4), (OTHER, 5)])])
    assert result.failed_loads == [(0, OTHER)]


def test_a_file_damaged_on_one_rank_is_told_by_that_rank(model, tmp_path):
    driver = Driver(model[0], 2, kv_disk_path=str(tmp_path))
    stored(driver)
    rank_1 = driver.ranks[1]._disk._directory
    (rank_1 / f"0-{KEY.hex()}.kv").unlink()
    results = driver.results(moves=[BlockMoves(disk_loads=[(KEY, 4), (OTHER, 5)])])
    assert [(result.rank, result.failed_loads) for result in results] == [(0, []), (1, [(0, KEY)])]


def test_without_disk_loads_rank_0_alone_answers(model, tmp_path):
    driver = Driver(model[0], 2, kv_disk_path=str(tmp_path))
    assert len(driver.results(moves=[BlockMoves(disk_drops=[KEY])])) == 1
