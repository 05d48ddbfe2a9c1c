"""A scheduler's world whose disk holds the blocks of a prompt that was asked before a restart."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, prompt_of, moves_of = world_module.World, world_module.prompt_of, world_module.moves_of
memory_model = world_module.memory_model

STORED = prompt_of(40)
PROMPT = [*STORED, 5, 6]
KEYS: list[bytes] = []
_keys = World(caching=True).space.prefix_keys
_keys.extend(KEYS, _keys.root("shared/"), STORED, 40)


def restarted(num_stored=5, num_host_blocks=8, num_blocks=20, disk_capacity=9, **options):
    """A new group whose disk holds the first blocks of a prompt that was asked before."""
    world = World(num_blocks, num_host_blocks=num_host_blocks, caching=True, **options, space={
        "disk_capacity": disk_capacity, "stored_keys": KEYS[:num_stored]})
    contents = memory_model.stand_in.chain(STORED)
    world.rank.memory.disks[0] = {key: contents[8 * i: 8 * i + 8] for i, key in enumerate(KEYS[:num_stored])}
    return world


def status(world, name):
    return world.groups[name].status.value
