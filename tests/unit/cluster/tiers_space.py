"""A block space of few blocks, to fill with prompts that fall from the device to the host and to disk."""

from __future__ import annotations

from kvarto.cluster.block_space import BlockSpace
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import BlockMoves

ROOT = b"r" * 16


class Space(BlockSpace):
    """Blocks of 8 tokens; `num_device` etc. are per KV group."""

    def __init__(self, num_device=1, num_host=2, disk_capacity=0, *, num_groups=1, **options):
        super().__init__(
            [KVGroupSpec(layer_ids=(index,)) for index in range(num_groups)], [num_device] * num_groups, 8,
            num_host_blocks=[num_host] * num_groups, enable_prefix_caching=True, disk_capacity=disk_capacity,
            **options)
        self.step_id = 0

    def fill(self, number, num_blocks=1):
        """Compute the prompt `number` in a plan, whose moves are returned, and leave it cached."""
        blocks = self.open(number, root=ROOT)
        self.grow(blocks, 8 * num_blocks)
        self.offer(blocks, prompt(number, num_blocks))
        self.free(blocks, busy_until=self.step_id)
        return self.plan()

    def plan(self):
        """End the plan that is being made, and its step."""
        self.check_integrity()
        moves = self.end_plan() or [BlockMoves() for _ in self.devices]
        self.step_done(self.step_id)
        self.step_id += 1
        self.check_integrity()
        return moves if len(moves) > 1 else moves[0]

    def where(self, number):
        """In which pools a prompt's first block is found."""
        key = key_of(self, number)
        return [name for name, pools in (("device", self.devices), ("host", self.hosts))
                if all(pool.find(key) is not None for pool in pools)] + [
                    "disk"] * all(key in disk for disk in self.tiers._disk.values())

    def match_of(self, number, num_blocks=1):
        return self.match(self.open(99, root=ROOT), [*prompt(number, num_blocks), 0])


def prompt(number, num_blocks=1):
    return [number] * 8 * num_blocks


def keys_of(space, number, num_blocks):
    keys = []
    space.prefix_keys.extend(keys, ROOT, prompt(number, num_blocks), 8 * num_blocks)
    return keys


def key_of(space, number):
    return keys_of(space, number, 1)[0]


def on_disk(*numbers, num_device=1, num_host=1, disk_capacity=9):
    """A space whose disk tier holds these prompts, oldest first, and whose host and device hold others."""
    space = Space(num_device, num_host, disk_capacity)
    for number in (*numbers, *range(50, 50 + num_device + num_host)):
        space.fill(number)
    assert [space.where(number) for number in numbers] == [["disk"]] * len(numbers)
    return space
