"""The picture of the block space, and `kvarto status --blocks` and `--watch` which show it."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvarto.cluster.cli.app import app
from kvarto.cluster.cli.block_map import draw

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

TOTALS = {"used": 9, "shared": 3, "cached": 4, "free": 5, "releasing": 2, "swapped": 2, "host_cached": 1,
          "host_free": 1, "disk": 10, "table_entries": 19, "saved_by_sharing": 0.31, "internal_waste": 0.034,
          "prefix_hit_rate": 0.42}
LEGEND = "· free  ░ cached  █ used  2-9+ shared by  ~ releasing  ▓ swapped  - no block"


def make_pool(states, **ref_counts):
    """`make_pool("us", b2=3)`: block 2 is shared by three."""
    return {"num_blocks": len(states), "states": states, "ref_counts": {k[1:]: n for k, n in ref_counts.items()}}


def make_kv_group(device, host=None, disk=(0, 0)):
    return {"device": device, "host": host or make_pool(""), "disk": {"num_blocks": disk[0], "capacity": disk[1]}}


def make_sequence(request_id, *tables, status="running", seq_index=0):
    return {"request_id": request_id, "seq_index": seq_index, "status": status, "num_tokens": 55,
            "num_computed_tokens": 54, "block_tables": list(tables)}


def make_body(kv_groups, sequences=()):
    return {"groups": {"0": {"block_size": 16, "kv_groups": kv_groups, "sequences": list(sequences),
                             "totals": TOTALS}}}


SMALL = make_body(
    [make_kv_group(make_pool("uuuuuusssrrccccfffff", b7=2, b8=9, b9=10), make_pool("usfc", b2=2), (10, 100))],
    [make_sequence("ab12", [0, 7, 8, 1]), make_sequence("cmpl-0123456789abcdef", [2, 3, 7, 8, 9, 4, 5], seq_index=1),
     make_sequence("f00", [-1, -2], status="swapped")])


def lines(body, width=80, height=25):
    """The picture as it is printed where there are no colours."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(draw(body, width, height))
    return [line.rstrip() for line in capture.get().splitlines()]


def cells(row):
    """A row of a grid without its label."""
    return row.split()[1]


@pytest.fixture(scope="module")
def server():
    with fake.shared_server() as server:
        yield server


class Frontend(fake.FakeFrontend):
    def __init__(self, **options):
        super().__init__(fake.make_config(**options))
        self.body = SMALL

    async def blocks(self):
        return self.body


@pytest.fixture
def frontend(server):
    return server(Frontend())


@pytest.fixture
def run(frontend):
    """Invoke `kvarto status --blocks` against the server."""
    return lambda *args, **env: CliRunner().invoke(
        app, ["status", "--blocks", "--url", frontend.url, *args], env={"COLUMNS": "80", **env})


@pytest.fixture
def sleeps(monkeypatch):
    """The sleeps of a watch, which Ctrl-C ends in the second."""
    taken = []

    def sleep(seconds):
        taken.append(seconds)
        if len(taken) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("kvarto.cluster.cli.status.sleep", sleep)
    return taken


def test_a_small_map_block_by_block():
    assert lines(SMALL) == [
        "group 0: 9 used (3 shared), 4 cached, 5 free, 2 releasing, 2 swapped",
        "19 table entries; sharing saves 31.0%, waste 3.4%, prefix hits 42.0%",
        "device: 20 blocks of 16 tokens",
        " 1 ██████29+~~░░░░·····",
        "host: 4 blocks of 16 tokens",
        "1 ▓2·░",
        "disk: 10 of 100 blocks",
        "request    seq status       tokens blocks shared swapped table",
        "…789abcdef   1 running       54/55      7      3       0 ██29+██",
        "ab12         0 running       54/55      3      2       0 -29█",
        "f00          0 swapped       54/55      2      1       2 ▓2",
        LEGEND]


def test_kinds_differ_in_colour_too():
    console = Console(width=80, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(draw(make_body([make_kv_group(make_pool("fcusr", b4=2), make_pool("u"))]), 80, 25))
    assert "\x1b[2m·\x1b[0m\x1b[34m░\x1b[0m\x1b[36m█\x1b[0m\x1b[35m2\x1b[0m\x1b[33m~\x1b[0m" in capture.get()
    assert "\x1b[32m▓\x1b[0m" in capture.get()


def test_rows_begin_with_their_first_block():
    picture = lines(make_body([make_kv_group(make_pool("u" * 32 + "f" * 32 + "c"))]), width=40)
    first = picture.index("device: 65 blocks of 16 tokens") + 1
    assert picture[first:first + 3] == [" 1 " + "█" * 32, "33 " + "·" * 32, "65 ░"]


def test_a_large_map_is_scaled_to_few_lines_and_drawn_at_once():
    body = make_body([make_kv_group(make_pool("u" * 7200 + "c" * 12800))])
    start = time.thread_time()
    picture = lines(body, height=50)
    assert time.thread_time() - start < 0.2
    assert len(picture) <= 20
    assert picture[2] == "device: 20,000 blocks of 16 tokens; each cell the commonest of 24"
    grid = "".join(map(cells, picture[3:-2]))
    assert grid == "█" * 300 + "░" * 534


@pytest.mark.parametrize(("states", "counts", "glyph"), [
    ("ffu", [], "·"), ("uuf", [], "█"), ("fcu", [], "█"), ("rrf", [], "~"),
    ("ssu", [2, 3], "3"), ("ssu", [9, 10], "+"), ("ssuu", [2, 2], "2")])
def test_a_cell_of_several_blocks_is_the_commonest_kind(states, counts, glyph):
    num_cells, row = 144, 72
    ref_counts = {f"b{cell * len(states) + number}": count
                  for cell in range(num_cells) for number, count in enumerate(counts, start=1)}
    body = make_body([make_kv_group(make_pool(states * num_cells, **ref_counts))])
    assert [cells(line) for line in lines(body, height=1)[3:5]] == [glyph * row] * 2


def test_every_kv_group_has_its_grids_and_a_sequence_a_strip_of_each():
    groups = [make_kv_group(make_pool("uuf"), make_pool("u")), make_kv_group(make_pool("uc"), disk=(1, 8))]
    picture = lines(make_body(groups, [make_sequence("ab", [1, 2, -1], [0, 1])]))
    assert picture[2:10] == [
        "KV group 0, device: 3 blocks of 16 tokens", "1 ██·", "KV group 0, host: 1 blocks of 16 tokens", "1 ▓",
        "KV group 1, device: 2 blocks of 16 tokens", "1 █░", "KV group 1, disk: 1 of 8 blocks",
        "request    seq status       tokens blocks shared swapped table"]
    assert picture[10].split() == ["ab", "0", "running", "54/55", "4", "0", "1", "██▓", "-█"]


def test_worker_groups_come_in_order():
    body = make_body([make_kv_group(make_pool("u"))])
    body["groups"] = dict.fromkeys(("10", "2"), body["groups"]["0"])
    assert [line.split(":")[0] for line in lines(body) if line.startswith("group")] == ["group 2", "group 10"]
    assert lines({"groups": {}}) == ["no worker group is up"]


def test_sequences_fill_the_height_those_with_the_most_blocks_first():
    sequences = [make_sequence(f"s{number}", [1] * number) for number in range(100)]
    picture = lines(make_body([make_kv_group(make_pool("u"))], sequences), height=25)
    assert len(picture) == 25
    assert [line.split()[0] for line in picture[5:8]] == ["s99", "s98", "s97"]
    assert picture[-2] == "and 82 more"


def test_a_long_table_is_scaled_to_its_column():
    body = make_body([make_kv_group(make_pool("u" * 200 + "f"))], [make_sequence("s", range(1, 201))])
    row = next(line for line in lines(body) if line.startswith("s "))
    assert row.split()[-1] == "█" * 23
    assert len(row) <= 80


def test_an_id_cannot_write_to_the_terminal():
    body = make_body([make_kv_group(make_pool("u"))], [make_sequence("\x1b[2J[red]", [1])])
    assert lines(body)[5].startswith("?[2J[red]  ")


def test_blocks_are_drawn_without_control_codes_where_there_is_no_terminal(run, frontend):
    result = run()
    assert result.exit_code == 0, result.output
    assert [line.rstrip() for line in result.stdout.splitlines()] == [frontend.url, *lines(SMALL, height=24)]
    assert "\x1b" not in result.stdout


def test_blocks_as_json_are_what_the_server_says(run):
    assert json.loads(run("--json").stdout) == SMALL


def test_a_server_without_the_route_is_a_clear_error(frontend):
    # Everything below this path is unknown to the server, as the route is to an older one.
    result = CliRunner().invoke(app, ["status", "--blocks", "--url", f"{frontend.url}/v0"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (f"error: the server at {frontend.url}/v0 has no block map: is it of an older version of "
                             "kvarto?\n")


@pytest.mark.parametrize("body", [
    {"groups": []}, {"groups": {"x": {}}}, make_body([make_kv_group(make_pool("?"))]),
    make_body([make_kv_group(make_pool("s"))]), make_body([make_kv_group(make_pool("u"))], [make_sequence("s", [2])]),
    make_body([make_kv_group({"states": "u", "ref_counts": {}})], [make_sequence("s", [1], [1])])])
def test_blocks_of_another_version_are_a_clear_error(run, frontend, body):
    frontend.body = body
    result = run()
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: the server at {frontend.url} describes itself otherwise")


def test_a_watch_looks_again_until_ctrl_c_and_that_is_no_failure(run, sleeps):
    result = run("--watch", "2.5")
    assert result.exit_code == 0
    assert sleeps == [2.5, 2.5]
    assert result.stdout.count("group 0: 9 used") == 2


def test_a_watch_at_a_terminal_redraws_in_place(run, sleeps):
    result = run("--watch", "1", TTY_COMPATIBLE="1", TERM="xterm")
    assert result.exit_code == 0
    up = "\x1b[1A"
    assert up in result.stdout


def test_a_watch_as_json_is_a_line_for_each_look(run, sleeps):
    assert [json.loads(line) for line in run("--watch", "1", "--json").stdout.splitlines()] == [SMALL, SMALL]


def test_a_watch_ends_with_its_server(run, frontend, monkeypatch):
    def lose_server(seconds):
        frontend.body = {"groups": []}

    monkeypatch.setattr("kvarto.cluster.cli.status.sleep", lose_server)
    assert run("--watch", "1").exit_code == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_watch_without_a_sensible_interval_is_refused(run, seconds):
    result = run("--watch", seconds)
    assert result.exit_code == 2
    assert result.stderr == f"error: --watch takes 0.1 to 3600 seconds, got {seconds}\n"
