"""The picture that `kvarto status --blocks` draws: the KV block space, and whose blocks are where.

Every state of a block has a glyph of its own, so that the picture reads without its colours too.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

DEVICE_GLYPHS = {"f": "·", "c": "░", "u": "█", "r": "~"}
"""Of the letters that the server describes blocks with; the glyph of "s" is how many tables share the block."""
HOST_GLYPHS = {**DEVICE_GLYPHS, "u": "▓"}
"""What is in use there are the blocks of sequences that were swapped out."""
NO_BLOCK, MANY = "-", "+"
KINDS = {"·": "free", NO_BLOCK: "no block", "░": "cached", "~": "releasing", "▓": "swapped", "█": "used",
         **dict.fromkeys(f"23456789{MANY}", "shared by")}
"""In rising order: of kinds that are equally common the last is drawn, and of counts the largest."""
RANKS = {glyph: rank for rank, glyph in enumerate(KINDS)}
STYLES = {"free": "dim", "no block": "dim", "cached": "blue", "releasing": "yellow", "swapped": "green",
          "used": "cyan", "shared by": "magenta"}
LEGEND = ("·", "░", "█", "2-9+", "~", "▓", NO_BLOCK)
COLUMNS = {"request": 10, "seq": 3, "status": 7, "tokens": 11, "blocks": 6, "shared": 6, "swapped": 7}
"""Headings and widths of what is said of a sequence before its table."""
MAX_ROWS, MIN_ROWS, MIN_SEQUENCES, MIN_CELLS = 12, 2, 3, 8


def draw(body: dict[str, Any], width: int, height: int) -> Group:
    """The answer of `GET /v1/blocks` as a picture that fits a terminal of this size, or exceeds its height where it
    would show next to nothing otherwise."""
    groups = sorted(body["groups"].items(), key=lambda item: int(item[0]))
    if not groups:
        return Group(Text("no worker group is up"))
    share = (height - 1) // len(groups)  # beside the legend
    pictures = (_worker_group(index, group, width, share) for index, group in groups)
    legend = (Text.assemble((glyphs, STYLES[kind]), f" {kind}") for glyphs in LEGEND if (kind := KINDS[glyphs[0]]))
    return Group(*chain.from_iterable(pictures), Text("  ").join(legend))


def _worker_group(index: str, group: dict[str, Any], width: int, height: int) -> list[RenderableType]:
    totals, pools = group["totals"], group["kv_groups"]
    lines = [
        Text(f"group {index}: {totals['used']:,} used ({totals['shared']:,} shared), " + ", ".join(
            f"{totals[kind]:,} {kind}" for kind in ("cached", "free", "releasing", "swapped"))),
        Text(f"{totals['table_entries']:,} table entries; sharing saves {totals['saved_by_sharing']:.1%}, "
             f"waste {totals['internal_waste']:.1%}, prefix hits {totals['prefix_hit_rate']:.1%}")]
    # A third as many rows for the host; apart from them, three lines for each KV group and four for the worker group.
    spare = height - 4 - MIN_SEQUENCES - 3 * len(pools)
    rows = min(MAX_ROWS, max(MIN_ROWS, spare * 3 // 4 // len(pools)))
    glyphs = []
    for number, pool in enumerate(pools):
        name = f"KV group {number}, " if len(pools) > 1 else ""
        device, host = _glyphs(pool["device"], DEVICE_GLYPHS), _glyphs(pool["host"], HOST_GLYPHS)
        glyphs.append((device, host))
        lines += _grid(f"{name}device", device, group["block_size"], width, rows)
        if host:
            lines += _grid(f"{name}host", host, group["block_size"], width, max(1, rows // 3))
        if pool["disk"]["capacity"]:
            lines.append(Text(f"{name}disk: {pool['disk']['num_blocks']:,} of {pool['disk']['capacity']:,} blocks"))
    # The table's headings and the number of the sequences that it leaves out take a line each.
    most = max(MIN_SEQUENCES, height - len(lines) - 2)
    return [*lines, *_sequences(group["sequences"], glyphs, width, most)]


def _glyphs(pool: dict[str, Any], by_letter: dict[str, str]) -> list[str]:
    """One of each block."""
    counts = pool["ref_counts"]
    return [_count_glyph(counts[str(block_id)]) if letter == "s" else by_letter[letter]
            for block_id, letter in enumerate(pool["states"], start=1)]


def _count_glyph(count: int) -> str:
    return str(count) if count <= 9 else MANY


def _grid(name: str, glyphs: list[str], block_size: int, width: int, max_rows: int) -> list[Text]:
    """A heading, and rows that begin with the id of their first block."""
    label = len(str(len(glyphs)))
    # Eights are easily counted along.
    cells = max(MIN_CELLS, (width - label - 1) // 8 * 8)
    scale = -(-len(glyphs) // (cells * max_rows))
    note = f"; each cell the commonest of {scale:,}" if scale > 1 else ""
    heading = Text(f"{name}: {len(glyphs):,} blocks of {block_size} tokens{note}")
    step = cells * scale
    return [heading, *(Text.assemble((f"{start + 1:>{label}} ", "dim"), _cells(glyphs[start:start + step], scale))
                       for start in range(0, len(glyphs), step or 1))]


def _cells(glyphs: list[str], scale: int) -> Text:
    """One cell for each `scale` blocks."""
    cells = [_commonest(glyphs[start:start + scale]) for start in range(0, len(glyphs), scale)]
    return Text.assemble(*(("".join(run), STYLES[kind]) for kind, run in groupby(cells, KINDS.__getitem__)))


def _commonest(glyphs: list[str]) -> str:
    # Of kinds, lest shared blocks be outnumbered because their counts differ.
    kinds = Counter(KINDS[glyph] for glyph in glyphs)
    most = max(kinds.values())
    return max((glyph for glyph in glyphs if kinds[KINDS[glyph]] == most), key=RANKS.__getitem__)


def _sequences(sequences: list[dict[str, Any]], glyphs: list[tuple[list[str], list[str]]], width: int,
               most: int) -> list[RenderableType]:
    """At most `most` of them, those with the most blocks first."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    # Of fixed width, lest a picture that is watched jump about.
    for heading, column in COLUMNS.items():
        table.add_column(
            heading, justify="left" if heading in ("request", "status") else "right", no_wrap=True, width=column)
    table.add_column("table", no_wrap=True)
    strip = max(MIN_CELLS, width - sum(COLUMNS.values()) - len(COLUMNS))
    for sequence in sorted(sequences, key=_num_blocks, reverse=True)[:most]:
        table.add_row(*_row(sequence, glyphs, strip))
    left_out = len(sequences) - most
    return [table, *([Text(f"and {left_out:,} more")] if left_out > 0 else [])]


def _num_blocks(sequence: dict[str, Any]) -> int:
    return sum(block_id != 0 for block_id in chain(*sequence["block_tables"]))


def _row(sequence: dict[str, Any], glyphs: list[tuple[list[str], list[str]]], width: int) -> list[Text]:
    tables = sequence["block_tables"]
    entries = [[device[block_id - 1] if block_id > 0 else host[-block_id - 1] if block_id else NO_BLOCK
                for block_id in table] for table, (device, host) in zip(tables, glyphs, strict=True)]
    shared = sum(KINDS[glyph] == "shared by" for glyph in chain(*entries))
    swapped = sum(block_id < 0 for block_id in chain(*tables))
    # A space after each strip but the last.
    strip = max(1, (width + 1) // len(tables) - 1)
    strips = [_cells(table, max(1, -(-len(table) // strip))) for table in entries]
    # Both counts: they tell how far a long prompt has come.
    tokens = f"{sequence['num_computed_tokens']}/{sequence['num_tokens']}"
    return [Text(_short(sequence["request_id"])), *(Text(str(value)) for value in (
        sequence["seq_index"], sequence["status"], tokens, _num_blocks(sequence), shared, swapped)),
        Text(" ").join(strips)]


def _short(request_id: str) -> str:
    """The end, where ids differ. They may be a client's, who could otherwise write to this terminal as it likes."""
    printable = "".join(char if char.isprintable() else "?" for char in request_id)
    return printable if len(printable) <= COLUMNS["request"] else f"…{printable[1 - COLUMNS['request']:]}"
