"""What the Head counts, as Prometheus metrics. Seconds everywhere; names follow vLLM's where they mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..protos.request import Delta
from .scheduler import SequenceGroup

_LATENCY_BUCKETS = (
    .001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class Metrics:
    """Counters are bumped as things happen; gauges are read off the engines when the page is rendered."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests_failed = Counter("kvarto_requests_failed", "Requests that ended in an error", registry=registry)
        self.requests_finished = Counter(
            "kvarto_requests_finished", "Requests that ended well", ["finish_reason"], registry=registry)
        self.prompt_tokens = Counter("kvarto_prompt_tokens", "Prompt tokens of answered requests", registry=registry)
        self.generation_tokens = Counter("kvarto_generation_tokens", "Tokens generated", registry=registry)
        self.ttft_seconds = Histogram(
            "kvarto_time_to_first_token_seconds", "Arrival to first token", buckets=_LATENCY_BUCKETS, registry=registry)
        self.itl_seconds = Histogram(
            "kvarto_inter_token_latency_seconds", "Gap between tokens", buckets=_LATENCY_BUCKETS, registry=registry)
        self.e2e_seconds = Histogram(
            "kvarto_e2e_request_latency_seconds", "Arrival to last token", buckets=_LATENCY_BUCKETS, registry=registry)
        self.step_seconds = Histogram(
            "kvarto_step_seconds", "Plan sent to result received", buckets=_LATENCY_BUCKETS, registry=registry)
        self._running = Gauge("kvarto_requests_running", "Requests that hold blocks", ["group"], registry=registry)
        self._waiting = Gauge("kvarto_requests_waiting", "Requests in the queue", ["group"], registry=registry)
        self._blocks = Gauge("kvarto_blocks", "KV-cache blocks by state", ["group", "state"], registry=registry)
        self._preemptions = Gauge(
            "kvarto_preemptions", "Groups preempted since the worker group began", ["group", "mode"], registry=registry)

        self._sums = {
            name: Gauge(f"kvarto_{name}", text, ["group"], registry=registry) for name, text in (
                ("kv_waste", "Share of the slots of blocks in use that hold no token, over all steps"),
                ("saved_by_sharing", "Share of table entries that need no block of their own, over all steps"),
                ("prefix_queried_tokens", "Prompt tokens that were looked up in the prefix cache"),
                ("prefix_hit_tokens", "Prompt tokens that were found in the prefix cache"),
                ("num_copied_blocks", "Blocks copied on write"),
                ("num_compactions", "Sequences compacted to the rows of kv_sparsity_budget"),
                ("num_dropped_rows", "Rows of sequences that compactions dropped"),
                ("num_rechosen", "Groups that had dropped rows and were computed again, for want of host memory"),
                ("swap_out_bytes", "Bytes moved to host memory: swapped sequences and cached blocks that fall"),
                ("swap_in_bytes", "Bytes moved from host memory: swapped sequences and cached blocks that are found"),
                ("swap_seconds", "Seconds that rank 0 spent on block moves"))}

    def on_delta(self, group: SequenceGroup, delta: Delta, now: float) -> None:
        """A sequence gained tokens, or ended, at `now` (monotonic seconds)."""
        if delta.error:
            self.requests_failed.inc()
            return
        last = group.last_token_s.get(delta.seq_index)
        if last is None:
            if not group.last_token_s:
                self.ttft_seconds.observe(now - group.arrived_s)
                self.prompt_tokens.inc(len(group.request.prompt_token_ids))
        else:
            self.itl_seconds.observe(now - last)
        group.last_token_s[delta.seq_index] = now
        self.generation_tokens.inc(len(delta.token_ids))
        if delta.finish_reason and not group.live:
            self.e2e_seconds.observe(now - group.arrived_s)
            self.requests_finished.labels(delta.finish_reason).inc()

    def render(self, groups: Mapping[int, dict[str, Any]]) -> str:
        """The page in Prometheus' text format; `groups` holds `Engine.status` of each worker group by index."""
        for index, status in groups.items():
            group = str(index)
            self._running.labels(group).set(status["num_running"])
            self._waiting.labels(group).set(status["num_waiting"])
            for state, count in status["blocks"].items():
                self._blocks.labels(group, state).set(count)
            for mode in ("swap", "recompute"):
                self._preemptions.labels(group, mode).set(status[f"num_preemptions_by_{mode}"])
            for name, gauge in self._sums.items():
                gauge.labels(group).set(status[name])
        return generate_latest(self.registry).decode()
