"""What the scheduler's state machine is built from: a scheduler and its pools, of a configuration that was drawn."""

from __future__ import annotations

from kvarto.cluster.block_space import BlockSpace
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.sparsity import KVSparsity

FULL = KVGroupSpec(layer_ids=(0,))
RESIDUAL = KVGroupSpec(layer_ids=(0, 1, 2), residual=True)


def make_scheduler(config, stored_keys, orphaned_keys):
    """The real thing, from the machine's configuration: the only place that knows the constructors. `stored_keys`: what
    the disk tier holds from before, `orphaned_keys`: what it holds for some KV groups only."""
    space = BlockSpace(
        config["kv_groups"], config["num_blocks"], config["block_size"], num_host_blocks=config["num_host_blocks"],
        enable_prefix_caching=config["caching"], hash_key=b"k" * 16, eviction_policy=config["eviction"],
        disk_capacity=config["disk_capacity"], stored_keys=stored_keys, orphaned_keys=orphaned_keys,
        sparsity=config["sparsity"])
    scheduler = Scheduler(
        space, SchedulerLimits(config["max_num_seqs"], config["budget"], config["mixed"]), epoch=7,
        eos_token_ids=frozenset({config["eos"]}), num_ranks=2, preemption_mode=config["mode"],
        victim_policy=config["victim"], watermark_policy=config["watermark"], costs=config["costs"])
    return space, scheduler


def add_pools(config):
    """The KV groups, and how many blocks each has: the pool of a window, or of a residual, may be just large enough for
    `num_seats`."""
    window = KVGroupSpec(layer_ids=(1,), window=config.pop("window"), num_sinks=config.pop("num_sinks"))
    other = KVGroupSpec(layer_ids=(2,), window=2 * window.window + 3)
    # Where no query of any layer sees a token before its own, every prompt would begin with a hit on nothing.
    alone = window if window.window > 1 else other
    groups = config["kv_groups"] = {"full": [FULL], "full and window": [FULL, window], "window": [alone],
                                    "two windows": [window, other], "residual": [FULL, RESIDUAL],
                                    "window and residual": [alone, RESIDUAL],
                                    "full, window and residual": [FULL, window, RESIDUAL]}[config.pop("layout")]
    num_seats, num_blocks, num_host_blocks = (config[key] for key in ("num_seats", "num_blocks", "num_host_blocks"))
    config["num_blocks"] = [
        num_blocks if group is FULL or not num_seats else enough_blocks(group, config, num_seats) for group in groups]
    config["num_host_blocks"] = [
        num_host_blocks if group is FULL or not num_seats else (num_host_blocks + 1) // 2 for group in groups]


def add_sparsity(config):
    """What is dropped, and what does not go with that."""
    policy, budget, interval, window, has_host = (
        config.pop(key) for key in ("policy", "kept", "interval", "observed", "has_host"))
    config["sparsity"] = policy and KVSparsity(
        policy=policy, budget=budget, interval=interval, window=window if policy == "snapkv" else 1)
    if policy:
        config["layout"], config["disk_capacity"] = "full", 0
        config["num_host_blocks"] *= has_host
        # So few rows are short of blocks in small pools only.
        config["num_blocks"] = min(config["num_blocks"], 10)
        config["mode"] = "auto" if config["mode"] == "recompute" else config["mode"]


def enough_blocks(group, config, num_seqs):
    """What a pool never needs more than, by what `KVGroupSpec` says of its window."""
    size = config["block_size"]
    if group.residual:
        # A block of each sequence, of which one may go on in the middle of its own with all of a step's tokens.
        return num_seqs + -(-(config["budget"] - 1) // size)
    if group.window is None:
        return 10**9
    return num_seqs * (-(-group.window // size) + -(-group.num_sinks // size) + 2) + -(-config["budget"] // size)


def decoding(scheduler):
    """Ids of the running sequences that want one token."""
    return {sequence.seq_id for group in scheduler.groups if group.status.value == "running"
            for sequence in group.live if sequence.has_begun and sequence.num_uncomputed_tokens == 1}


def check_mixed(plan, decoding, config):
    """Who decodes has little prefill beside it. Those who were to decode may be missing: they gave their blocks up."""
    started = {start.seq_id for start in plan.starts}
    if config["mixed"] and any(step.seq_id in decoding - started and step.num_tokens == 1 for step in plan.steps):
        assert sum(step.num_tokens for step in plan.steps if step.num_tokens > 1) <= config["mixed"]


def num_used(space):
    """Blocks on device and host that are neither free nor cached."""
    return sum(pool.num_blocks - pool.num_available() for pool in (*space.devices, *space.hosts))


def give(scheduler, result):
    """A rank's result to the scheduler; returns the deltas."""
    if result.rank:
        scheduler.answered(result)
        return []
    return scheduler.update(result)
