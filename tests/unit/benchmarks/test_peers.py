"""The processes that are compared: how they are asked, kept still, measured and ended."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from peers.offline import OfflineProcess
from peers.pss import PeakPss, resident_pool_bytes
from peers.servers import PeerServer
from peers.sides import prompt_of
from peers.vllm_settings import environment

from kvarto.cluster.cli.bench.trace import TraceRequest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
MIB = 2**20
REQUESTS = [TraceRequest([1, 2], 3), TraceRequest([4], 5)]


@pytest.fixture
def start(tmp_path):
    """Start a child whose answers are those of `generate`, given as source."""
    running = []

    def start(generate):
        program = tmp_path / "program.py"
        program.write_text(
            f"import sys\nsys.path.append({str(PEERS)!r})\nfrom child import answer, private_stdout\n"
            f"stdout = private_stdout()\n{textwrap.dedent(generate)}\nanswer(stdout, generate)\n")
        running.append(OfflineProcess(sys.executable, str(program), "model", {}))
        return running[-1]

    yield start
    for process in running:
        process.close()


def test_a_child_answers_whatever_its_libraries_print(start):
    child = start("""
        print("loading")
        def generate(prompts, output_lens):
            print("generating")
            assert prompts == [[1, 2], [4]]
            return sum(output_lens)
        """)
    assert 0 <= child.generate(REQUESTS) < 5


def test_a_child_stands_still_between_questions_and_is_gone_after_close(start):
    child = start("def generate(prompts, output_lens): return sum(output_lens)")
    child.generate(REQUESTS)
    process = psutil.Process(child.pid)
    assert process.status() == psutil.STATUS_STOPPED
    child.generate(REQUESTS)
    child.close()
    assert not process.is_running()


def test_tokens_that_are_missing_are_an_error(start):
    child = start("def generate(prompts, output_lens): return sum(output_lens) - 1")
    with pytest.raises(RuntimeError, match="7 tokens were generated, 8 were asked for"):
        child.generate(REQUESTS)


def test_a_child_that_ends_is_an_error_with_its_last_words(start):
    with pytest.raises(RuntimeError, match="no such weights"):
        start("raise SystemExit('no such weights')")


def test_a_server_that_does_not_come_up_is_an_error_with_its_last_words():
    server = PeerServer([sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(RuntimeError, match="no such model"), server.running():
        pass
    server.close()


def run_until_told(source):
    process = subprocess.Popen(
        [sys.executable, "-c", f"{source}\nprint('ready', flush=True)\ninput()"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_peak_is_of_the_process_and_its_children():
    source = f"""if True:
        import subprocess, sys
        child = subprocess.Popen(
            [sys.executable, "-c", "held = bytearray(b'x' * {64 * MIB}); print(flush=True); input()"],
            stdout=subprocess.PIPE)
        child.stdout.readline()
        held = bytearray(b"x" * {32 * MIB})"""
    process = run_until_told(source)
    try:
        with PeakPss(process.pid) as pss:
            pass
        assert 96 * MIB <= pss.peak < 150 * MIB
    finally:
        process.communicate("\n")


def test_of_a_pool_only_what_was_touched_is_resident():
    source = f"""if True:
        import mmap
        pool = mmap.mmap(-1, {64 * MIB}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pool.madvise(mmap.MADV_HUGEPAGE)
        pool[:{16 * MIB}] = b"x" * {16 * MIB}"""
    process = run_until_told(source)
    try:
        assert 16 * MIB <= resident_pool_bytes(process.pid, 64 * MIB) <= 18 * MIB
        with pytest.raises(RuntimeError, match="0 mappings"):
            resident_pool_bytes(process.pid, 32 * MIB)
    finally:
        process.communicate("\n")


def test_libraries_that_vllm_wants_are_preloaded_or_missed_aloud(monkeypatch, tmp_path):
    monkeypatch.setattr("peers.vllm_settings._tcmalloc", lambda: [tmp_path / "libtcmalloc_minimal.so.4"])
    monkeypatch.setattr("peers.vllm_settings._iomp", lambda _: [tmp_path / "none", tmp_path / "libiomp5.so"])
    (tmp_path / "libiomp5.so").touch()
    variables, notes = environment(sys.executable)
    assert variables["LD_PRELOAD"] == str(tmp_path / "libiomp5.so")
    assert notes == ["vLLM ran without libtcmalloc_minimal.so.4, which was not found on this machine"]


def test_every_round_has_another_prompt_of_the_length_asked_for():
    trace = [TraceRequest(list(range(begin, begin + 100)), 1) for begin in range(0, 1000, 100)]
    prompts = [prompt_of(trace, 128, number) for number in range(5)]
    assert all(len(prompt) == 128 for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) == 5
