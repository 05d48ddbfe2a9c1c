"""How long until the first answer can be asked for: a bare Ray Serve app, `kvarto serve` and `LLM(...)`, each in a
fresh process, alternating. Prints one JSON line with the medians in seconds.

Usage: python tests/benchmarks/startup.py [--runs 3]        needs: kvarto installed, the model in the cache
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import statistics
import subprocess
import sys
import time

import httpx

HELLO = """
import signal, sys, logging
import ray
from ray import serve

@serve.deployment
class Hello:
    def __call__(self, request):
        return "hello world"

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Hello.bind(), route_prefix="/")
signal.pause()
"""
INLINE = """
import time
started = time.perf_counter()
from kvarto import LLM, SamplingParams
with LLM("smollm2-135m", dtype="bfloat16") as llm:
    ready_s = time.perf_counter() - started
    llm.generate("Hello", SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    print(ready_s, time.perf_counter() - started)
"""
TIMEOUT_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seconds_until_200(command: list[str], url: str) -> float:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.perf_counter() - started < TIMEOUT_S:
            if process.poll() is not None:
                raise RuntimeError(f"{command[:4]} ended with {process.returncode}")
            try:
                if httpx.get(url, timeout=1).status_code == 200:
                    return time.perf_counter() - started
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise TimeoutError(url)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {
        "hello_world_serve_s": [], "kvarto_serve_s": [], "llm_inline_ready_s": [], "llm_inline_first_token_s": []}
    for _ in range(runs):
        port = free_port()
        seconds["hello_world_serve_s"].append(
            seconds_until_200([sys.executable, "-c", HELLO, str(port)], f"http://127.0.0.1:{port}/"))
        port = free_port()
        serve = [sys.executable, "-m", "kvarto", "serve", "smollm2-135m", "--port", str(port), "--grpc-port", "0"]
        seconds["kvarto_serve_s"].append(seconds_until_200(serve, f"http://127.0.0.1:{port}/health/ready"))
        inline = subprocess.run([sys.executable, "-c", INLINE], capture_output=True, text=True, check=True)
        ready_s, first_token_s = map(float, inline.stdout.split())
        seconds["llm_inline_ready_s"].append(ready_s)
        seconds["llm_inline_first_token_s"].append(first_token_s)
    result = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    result["serve_above_hello_world_s"] = round(result["kvarto_serve_s"] - result["hello_world_serve_s"], 2)
    print(json.dumps({**result, "runs": runs}))


if __name__ == "__main__":
    main()
