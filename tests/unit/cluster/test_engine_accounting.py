"""What a worker group's steps add up to, and the block map: as `/v1/status` and `/v1/blocks` give them out."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from kvarto.cluster.cli.block_map import draw
from kvarto.protos.request import Query, Reply
from kvarto.protos.step import StepResult

_spec = importlib.util.spec_from_file_location("engine_fake", Path(__file__).with_name("engine_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)
add, BLOCK_BYTES = fake.add, fake.BLOCK_BYTES


class World(fake.World):
    """One plan in flight, so that what is asked for is as of the last plan."""

    def __init__(self, **options):
        super().__init__(max_in_flight=1, **options)

    def run(self, *requests):
        self.post(*requests)
        while self.links[0].plans:
            self.step()

    @property
    def engine(self):
        return self.engines[0]

    @property
    def status(self):
        return self.engine.status(self.clock.now)


# -- sums over the steps ---------------------------------------------------------------------------------------------


def test_before_the_first_step_every_ratio_is_zero():
    status = World().status
    assert [status[name] for name in ("kv_waste", "saved_by_sharing", "prefix_hit_rate", "num_steps")] == [0, 0, 0, 0]


def test_waste_is_the_share_of_slots_that_hold_nothing_over_all_steps():
    world = World()
    world.run(add("1", prompt=range(1, 7), max_tokens=4))
    # 6, 7, 8 and 9 tokens in 8, 8, 8 and 16 slots.
    status = world.status
    assert (status["num_steps"], status["slots_used"], status["slots_allocated"]) == (4, 30, 40)
    assert status["kv_waste"] == pytest.approx(10 / 40)


def test_what_sharing_saves_is_the_share_of_table_entries_without_a_block_of_their_own():
    world = World()
    world.run(add("1", prompt=range(1, 17), n=4, max_tokens=2))
    # The prompt: 8 entries of 2 blocks; then each of the four has a block of its own: 12 entries, 6 blocks.
    assert world.status["saved_by_sharing"] == pytest.approx(1 - (2 + 6) / (8 + 12))


def test_nothing_is_saved_where_nothing_is_shared():
    world = World(caching=True)
    world.run(add("1", prompt=range(1, 17)), add("2", prompt=range(20, 36)))
    assert world.status["saved_by_sharing"] == 0


def test_blocks_copied_on_write_are_counted():
    world = World()
    world.run(add("1", prompt=range(1, 6), n=4, max_tokens=3))
    assert world.status["num_copied_blocks"] == 3


def test_the_hit_rate_is_of_all_prompt_tokens():
    world = World(caching=True)
    world.run(add("1", prompt=range(1, 21)))
    world.run(add("2", prompt=range(1, 21)))
    status = world.status
    assert (status["prefix_queried_tokens"], status["prefix_hit_tokens"]) == (40, 16)
    assert status["prefix_hit_rate"] == pytest.approx(16 / 40)


def test_a_request_that_was_preempted_is_not_queried_twice():
    world = World(caching=True, num_blocks=4)
    world.run(add("1", prompt=range(1, 9), max_tokens=20), add("2", prompt=range(11, 19), max_tokens=20))
    status = world.status
    assert status["num_preemptions"] > 0
    assert (status["prefix_queried_tokens"], status["prefix_hit_tokens"]) == (16, 0)


def swapped(**options):
    """Two that do not fit together: the second has to wait on the host for a while."""
    world = World(num_blocks=4, num_host_blocks=8, **options)
    world.post(add("1", prompt=range(1, 9), max_tokens=20), add("2", prompt=range(11, 19), max_tokens=20))
    while not world.status["num_preemptions_by_swap"]:
        world.step()
    return world


def test_bytes_that_go_out_and_come_back_are_counted():
    world = swapped()
    out = world.status["swap_out_bytes"]
    assert (out, world.status["swap_in_bytes"]) == (2 * BLOCK_BYTES, 0)
    world.run()
    assert world.status["swap_in_bytes"] == out


def test_preemptions_are_counted_by_mode():
    status = swapped().status
    assert [status[f"num_preemptions{mode}"] for mode in ("", "_by_swap", "_by_recompute")] == [1, 1, 0]


def test_without_a_host_preemptions_are_recomputed():
    world = World(num_blocks=4)
    world.run(add("1", prompt=range(1, 9), max_tokens=20), add("2", prompt=range(11, 19), max_tokens=20))
    assert (world.status["num_preemptions_by_swap"], world.status["num_preemptions_by_recompute"] > 0) == (0, True)


def test_a_preemption_is_logged_with_both_estimates(caplog):
    caplog.set_level(logging.INFO)
    swapped()
    # Without measured costs a block costs 0 s and a token 1 s.
    assert "preempted request 2 (2 blocks, 16 tokens) by swap: swap estimated at 0.0 ms, recompute at 16000.0 ms" in (
        caplog.text)


def test_a_preemption_that_the_host_had_no_room_for_is_logged_as_such(caplog):
    caplog.set_level(logging.INFO)
    world = World(num_blocks=4)
    world.run(add("1", prompt=range(1, 9), max_tokens=20), add("2", prompt=range(11, 19), max_tokens=20))
    assert "by recompute: swap estimated at 0.0 ms" in caplog.text and "; the host has no room" in caplog.text


def test_seconds_of_moves_are_the_ranks():
    world = World()
    world.post(add("1"))
    world.links[0].results.append(StepResult(epoch=1, step_id=0, move_seconds=0.25))
    world.loop.run_once()
    assert world.status["swap_seconds"] == 0.25


def test_a_result_that_does_not_count_does_not_count_here():
    world = World()
    world.post(add("1"))
    world.links[0].results.append(StepResult(epoch=9, step_id=0, move_seconds=0.25))
    world.links[0].results.append(StepResult(epoch=1, step_id=77, move_seconds=0.25))
    world.loop.run_once()
    assert world.status["swap_seconds"] == 0


def test_the_costs_that_were_measured_are_shown():
    world = World()
    costs = world.engine.scheduler.preemptor.costs
    assert [world.status[name] for name in ("block_copy_s", "prefill_token_s")] == [
        costs.block_copy_s, costs.prefill_token_s]


# -- blocks at one moment --------------------------------------------------------------------------------------------


def test_blocks_are_counted_by_state():
    world = World(num_blocks=9, caching=True)
    world.run(add("old", prompt=range(1, 21)))
    world.post(add("new", prompt=range(1, 21), n=2, max_tokens=9))
    world.step()
    blocks = world.status["blocks"]
    # The prompt's first two blocks are found, and its last one is copied when both write into it.
    assert blocks == {
        "total": 9, "used": 4, "shared": 2, "cached": 0, "free": 5, "releasing": 0, "table_entries": 6, "swapped": 0,
        "host_cached": 0, "host_free": 0, "host_total": 0, "disk": 0}


def test_states_add_up_to_the_total():
    world = swapped(caching=True)
    while world.links[0].plans:
        blocks = world.status["blocks"]
        assert sum(blocks[state] for state in ("used", "cached", "free", "releasing")) == blocks["total"] == 4
        world.step()


def test_blocks_of_a_swapped_request_are_counted():
    blocks = swapped().status["blocks"]
    assert (blocks["swapped"], blocks["host_free"], blocks["host_total"]) == (2, 6, 8)


# -- the block map ---------------------------------------------------------------------------------------------------


def test_a_map_shows_every_block_and_every_table():
    world = World(num_blocks=9, caching=True)
    world.post(add("1", prompt=range(1, 13), n=2, max_tokens=9))
    world.step()
    body = world.engine.block_map()
    first, second = (sequence["block_tables"][0] for sequence in body["sequences"])
    assert first[0] == second[0] and first[1] != second[1]
    group, = body["kv_groups"]
    states = dict(enumerate(group["device"]["states"], start=1))
    assert ("".join(sorted(states.values())), states[first[0]], states[first[1]]) == ("ffffffsuu", "s", "u")
    assert group["device"]["ref_counts"] == {str(first[0]): 2}


def test_a_map_says_how_far_each_sequence_has_come():
    world = World()
    world.post(add("1", prompt=range(1, 13), n=2, max_tokens=9))
    world.step()
    sequences = world.engine.block_map()["sequences"]
    for sequence in sequences:
        del sequence["block_tables"]
    assert sequences == [
        {"request_id": "1", "seq_index": index, "status": "running", "num_tokens": 14, "num_computed_tokens": 13,
         "num_dropped_tokens": 0} for index in (0, 1)]


def test_a_map_shows_swapped_blocks_by_minus_their_number():
    world = swapped()
    body = world.engine.block_map()
    table, = (each["block_tables"][0] for each in body["sequences"] if each["status"] == "swapped")
    assert len(table) == 2 and all(entry < 0 for entry in table)
    assert {body["kv_groups"][0]["host"]["states"][-entry - 1] for entry in table} == {"u"}


def test_requests_that_hold_nothing_are_left_out():
    world = World(max_num_seqs=1)
    world.post(add("1"), add("2"))
    assert [each["request_id"] for each in world.engine.block_map()["sequences"]] == ["1"]


def test_the_totals_of_a_map_are_of_this_moment():
    world = World()
    world.post(add("1", prompt=range(1, 17), n=4, max_tokens=2))
    totals = world.engine.block_map()["totals"]
    assert (totals["used"], totals["shared"], totals["table_entries"]) == (2, 2, 8)
    assert (totals["saved_by_sharing"], totals["internal_waste"]) == (pytest.approx(0.75), 0)


def test_a_map_survives_the_wire():
    body = swapped(caching=True).engine.block_map()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(body)) == body == json.loads(json.dumps(body))


def test_the_picture_is_drawn_from_the_answer_to_a_query():
    world = swapped(caching=True)
    world.post(Query(query_id=7, what="blocks"))
    body, = (reply.body for reply in world.of(Reply))
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(draw(body, 80, 25))
    picture = capture.get()
    assert "group 0: 3 used (0 shared)" in picture
    assert "device: 4 blocks of 8 tokens" in picture and "host: 8 blocks of 8 tokens" in picture
    row = next(line.split() for line in picture.splitlines() if "swapped" in line and "▓▓" in line)
    assert row[:2] == ["2", "0"]
