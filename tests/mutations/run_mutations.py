"""Break the block space and the scheduler in one place at a time, and see that the tests find every break.

    .venv/bin/python tests/mutations/run_mutations.py [NAME ...] [--seed N] [--list]

Each mutant is one textual change in a copy of the package. TESTS run on the copy and have to fail: single cases of KV
sparsity and of prefill beside decodes, then the state machine. Exit status 1: a mutant survived, its text is not in the
code any more, or the tests fail without any change.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/unit/cluster/test_scheduler_sparsity.py", "tests/unit/cluster/test_scheduler_mixed.py",
         "tests/unit/cluster/test_scheduler_properties.py")
"""The state machine, and before it single cases that it meets too rarely."""
LEFT_OUT = (".venv", ".git", ".hypothesis", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "build")
TIMEOUT_S = 600.0
EFFORT = {"KVARTO_MACHINE_EXAMPLES": "2000", "KVARTO_MACHINE_SHRINK": "0"}
"""Twice as long as in the suite: some breaks show rarely, and only a survivor takes all of the time."""


@dataclass(frozen=True)
class Mutant:
    """`old` stands exactly once in `file` and becomes `new`; or the environment of the run is changed."""

    name: str
    file: str = ""
    old: str = ""
    new: str = ""
    env: dict[str, str] = field(default_factory=dict)


POOL, SPACE, MOVES = (f"cluster/block_space/{name}.py" for name in ("block_pool", "block_space", "plan_moves"))
MATCH, WINDOWS, SPARSITY = (f"cluster/block_space/{name}.py" for name in ("prefix_match", "windows", "sparsity"))
SWAPPING, TIERS, KEYS = (f"cluster/block_space/{name}.py" for name in ("swapping", "tiers", "prefix_keys"))
SCHEDULER, ADMITTER, ADVANCER, RESULTS, LOADS = (
    f"cluster/scheduler/{name}.py" for name in ("scheduler", "admitter", "advancer", "results", "disk_loads"))
DRAFT = "cluster/scheduler/plan_draft.py"

MUTANTS = [
    Mutant("prefill is not held back while sequences decode", SCHEDULER,
           "        return most\n", "        return None\n"),
    Mutant("samples that decode have what is left for prompts", ADVANCER,
           "budget, prefill_budget if is_prefill else budget)", "budget, prefill_budget)"),
    Mutant("what prompts have is not counted", ADVANCER,
           "self.prefill_budget -= num_tokens * (sequence.num_uncomputed_tokens > 1)", "pass"),
    Mutant("who decodes is preempted for tokens withheld for its sake", ADMITTER,
           "if not has_chunk and advancer.withholds:", "if False:"),
    Mutant("fork does not count its references", SPACE,
           "                if entry > 0:\n                    device.take(entry)\n                elif entry < 0:\n",
           "                if entry < 0:\n"),
    Mutant("release does not count down", POOL,
           "count = self.ref_counts[block_id] - 1\n", "count = self.ref_counts[block_id]\n"),
    Mutant("fork does not know that the last block is shared", SPACE,
           "child.may_share_tail = parent.may_share_tail or parent.num_tokens < parent.capacity",
           "child.may_share_tail = False"),
    Mutant("copy-on-write without the copy", MOVES,
           "self.groups[group].copies.append((source_id, device_id))", "pass"),
    Mutant("swap-in without the move", MOVES, "self.groups[group].swap_ins.append((host_id, device_id))", "pass"),
    Mutant("swap-ins before swap-outs",
           env={"KVARTO_MOVE_ORDER": "disk_drops,disk_stores,disk_loads,swap_ins,swap_outs,copies"}),
    Mutant("copies before swap-outs",
           env={"KVARTO_MOVE_ORDER": "disk_drops,disk_stores,copies,swap_outs,disk_loads,swap_ins"}),
    Mutant("swap-outs before disk stores",
           env={"KVARTO_MOVE_ORDER": "disk_drops,swap_outs,disk_stores,disk_loads,swap_ins,copies"}),
    Mutant("hash chain without the parent", KEYS, "blake2b(parent + tokens", "blake2b(root + tokens"),
    Mutant("salt ignored", SCHEDULER, 'f"shared/{request.cache_salt}"', '"shared/"'),
    Mutant("registered before its content", SPACE,
           "num_full = min(blocks.num_tokens, len(token_ids)) // self.block_size",
           "num_full = min(blocks.capacity, len(token_ids)) // self.block_size"),
    Mutant("a match leaves nothing to compute", SPACE,
           "most = len(token_ids) - 1 if most is None else min(len(token_ids) - 1, most)",
           "most = len(token_ids) if most is None else most"),
    Mutant("releasing blocks are free at once", POOL,
           "if self._busy_until[block_id] > self._done_step_id:", "if False:"),
    Mutant("a swapped group's host blocks are freed twice", SWAPPING,
           "                for _ in range(count):\n                    host.release(host_id, self._moves.step_id)\n",
           "                for _ in range(count + 1):\n"
           "                    host.release(host_id, self._moves.step_id)\n"),
    Mutant("a host block is given out while it is read", SWAPPING,
           "host.release(host_id, self._moves.step_id)", "host.release(host_id)"),
    Mutant("a cached block in use can be evicted", POOL,
           "                del self._cached[self._eviction(*self._uses[block_id])][block_id]\n",
           "                pass\n"),
    Mutant("a failed disk load is ignored", TIERS,
           "                if not unusable:\n                    host.register(host_id, key)\n",
           "                host.register(host_id, key)\n"),
    Mutant("only the first rank's answer counts", LOADS, "len(loads[0].ranks) < self._num_ranks", "not loads[0].ranks"),
    Mutant("a copy of a block that is swapped in is a copy", MOVES,
           "if (host_id := self.swapped_in[group].get(source_id)) is not None:", "if host_id := 0:"),
    Mutant("a block that falls to the host can be evicted before it is written", TIERS,
           "host.release(host_id, self._moves.step_id)", "host.release(host_id)"),
    Mutant("a host block is found in the plan that writes it", MATCH,
           "if host_id is None or host_id in self._moves.written_hosts[group] else", "if host_id is None else"),
    Mutant("what a plan emptied is free after it", POOL,
           "            self._set(block_id, State.RELEASING)\n            self._releasing[step_id].append(block_id)\n",
           "            self._rest(block_id)\n"),
    Mutant("prompt_logprobs use the prefix cache", ADVANCER,
           "        if self.wants_prompt_logprobs(sequence):\n            return []\n", ""),
    Mutant("a block is freed while the next query sees its last token", WINDOWS,
           "(position - self.size + 1) // self.block_size", "(position - self.size + 2) // self.block_size"),
    Mutant("sinks are freed", WINDOWS, "Window(group.window, -(-group.num_sinks // block_size),",
           "Window(group.window, 0,"),
    Mutant("what a plan in flight still reads is freed at once", WINDOWS,
           ".release(abs(entry), busy_until)", ".release(abs(entry))"),
    Mutant("a chunk's blocks are free before it is computed", ADVANCER,
           "busy_until=self._draft.step_id)", "busy_until=-1)"),
    Mutant("a hit without the blocks that its window sees", MATCH,
           "            if is_usable:\n", "            if True:\n"),
    Mutant("a hit without the sinks", MATCH,
           "if window is None or index < window.num_sink_blocks:", "if window is None:"),
    Mutant("blocks behind a window are not given back", WINDOWS,
           "            if begin >= end:\n", "            if True:\n"),
    Mutant("a prompt needs all of its blocks at once in the pool of a window", WINDOWS,
           "min(count, enough)", "count"),
    Mutant("the block that is being filled is given back one token early", WINDOWS,
           "return Window(1, 0, block_size)", "return Window(0, 0, block_size)"),
    Mutant("a residual holds what it has filled", WINDOWS,
           "    if group.residual:\n        # In", "    if False:\n        # In"),
    Mutant("blocks of a residual are cached", SPACE,
           "for group in self._keyed_groups:", "for group in range(len(blocks.tables)):"),
    Mutant("copy-on-write leaves the last KV group out", SPACE,
           "zip(self.devices, blocks.tables, strict=True)):\n            source_id",
           "zip(self.devices[: len(self.devices) - 1 or 1], blocks.tables)):\n            source_id"),
    Mutant("a dead beam keeps its blocks", RESULTS,
           "        for beam in dead:\n            self._end(beam)\n", "        group.live = live\n"),
    Mutant("nobody makes room for a compaction", ADVANCER,
           "return [count + num_fresh for count in need]", "return need"),
    Mutant("a prompt starts without room for its compaction", SPARSITY,
           "self._blocks(stop - num_dropped) + self._blocks(self.spec.budget)", "self._blocks(stop - num_dropped)"),
    Mutant("requests are admitted that cannot be compacted", SPARSITY,
           "(full + kept) + begins", "full + begins - kept"),
    Mutant("a compacted sequence offers its blocks", SPACE,
           "blocks.root is None or blocks.num_dropped or", "blocks.root is None or"),
    Mutant("what a compaction reads is free at once", SPACE,
           "self.free(blocks, busy_until=busy_until)\n        blocks.tables",
           "self.free(blocks, busy_until=-1)\n        blocks.tables"),
    Mutant("a fork does not know what was dropped", SPACE,
           "child.num_dropped = parent.num_dropped", "child.num_dropped = 0"),
    Mutant("a sequence that comes back does not say what it dropped", DRAFT,
           "num_dropped_tokens=sequence.blocks.num_dropped, ", ""),
    Mutant("the queries that score a prompt in two steps", SPARSITY,
           "if 0 < num_left < self.spec.window else", "if False else"),
    Mutant("the queries that score a prompt are found in the cache", SPARSITY,
           "else stop - self.spec.window", "else stop"),
    Mutant("a step goes on beyond a compaction", SPARSITY,
           "num_tokens = min(most, stop - num_computed)", "num_tokens = most"),
    Mutant("h2o uses the prefix cache", SCHEDULER, "if sparsity and sparsity.spec.keeps_scores:", "if False:"),
    Mutant("scores are forgotten when a sequence is swapped out", DRAFT,
           "if not (sparsity and sparsity.spec.keeps_scores):", "if True:"),
    Mutant("the ranks keep scores of what has ended", DRAFT,
           "if sequence.on_ranks or sequence.is_suspended:", "if sequence.on_ranks:"),
    Mutant("a fork of a suspended beam is not told", DRAFT,
           "if child.on_ranks or child.is_suspended:", "if child.on_ranks:"),
    Mutant("siblings copy what is not compacted yet", ADVANCER, "        if num_kept:\n            self._draft.compact",
           "        if num_kept and group.is_forked:\n            self._draft.compact"),
    Mutant("one that has to wait for blocks lets others pass", ADVANCER,
           "                self.waits_for_blocks = True\n                return False\n"
           "            self.took_blocks = True\n",
           "                return False\n            self.took_blocks = True\n"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="mutants whose name holds one of these; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of Hypothesis")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or any(name in m.name for name in options.names)]
    if options.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="kvarto-mutations-") as folder:
        copy = Path(folder) / "kvarto"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        _check_shadows(copy)
        outcomes = [_report("no change", _run(copy, {}, options.seed), wanted="survived")]
        outcomes += [_report(mutant.name, _try(copy, mutant, options.seed)) for mutant in chosen]
    print(f"{sum(outcomes)} of {len(outcomes)} as they should be")
    return 0 if all(outcomes) else 1


def _report(name: str, outcome: tuple[str, float, str], wanted: str = "caught") -> bool:
    """Print a line; True if the outcome is the one that is wanted."""
    what, seconds, detail = outcome
    right = what == wanted
    print(f"{'ok ' if right else 'BAD'}  {what:<9} {seconds:6.1f} s  {name:<50}  {detail}", flush=True)
    return right


def _try(copy: Path, mutant: Mutant, seed: int) -> tuple[str, float, str]:
    if not mutant.file:
        return _run(copy, mutant.env, seed)
    path = copy / mutant.file
    text = path.read_text() if path.exists() else ""
    if text.count(mutant.old) != 1:
        return "not found", 0.0, f"the text stands {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return _run(copy, mutant.env, seed)
    finally:
        path.write_text(text)


def _run(copy: Path, env: dict[str, str], seed: int) -> tuple[str, float, str]:
    """(what became of it, seconds, the last line that says why)."""
    shutil.rmtree(copy / ".hypothesis", ignore_errors=True)
    started = time.monotonic()
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", *TESTS]
    try:
        done = subprocess.run(
            command, cwd=copy, env=_environment(copy) | EFFORT | env, text=True,
            capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "timed out", time.monotonic() - started, ""
    errors = [line for line in done.stdout.splitlines() if line.lstrip(" |").startswith("E  ")]
    detail = next((line.split("E  ", 1)[1].strip() for line in errors if "Error" in line), "")[:90]
    what = {0: "survived", 1: "caught"}.get(done.returncode, f"pytest {done.returncode}")
    return what, time.monotonic() - started, detail if what != "survived" else ""


def _environment(copy: Path) -> dict[str, str]:
    # The copy's parent comes before the installed package's finder. The bytecode of two changes made within one second
    # would be taken for the same.
    return os.environ | {"PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}


def _check_shadows(copy: Path) -> None:
    code = "import kvarto.cluster.scheduler as s; print(s.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=_environment(copy), text=True, capture_output=True, check=True)
    if not Path(found.stdout.strip()).is_relative_to(copy):
        raise SystemExit(f"the copy does not shadow the installed package: {found.stdout.strip()}")


if __name__ == "__main__":
    sys.exit(main())
