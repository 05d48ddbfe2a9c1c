"""Finding cached blocks that a prompt begins with. In a KV group with a window only what is still read is needed."""

from __future__ import annotations

from .block_pool import NULL_BLOCK, BlockPool, State
from .plan_moves import PlanMoves
from .sequence_blocks import SequenceBlocks
from .windows import Need, Windows

Match = list[list[int]]
"""Cached blocks that a prompt begins with, per block and KV group: a device block, minus a host block, or the null
block where the window of the KV group has passed."""


class PrefixMatcher:
    """Looks keys up in the pools; only `attach` takes."""

    def __init__(
        self, devices: list[BlockPool], hosts: list[BlockPool], moves: PlanMoves, windows: Windows, block_size: int,
    ) -> None:
        self._devices = devices
        self._hosts = hosts
        self._moves = moves
        self._windows = windows.by_group
        self._block_size = block_size

    def find(self, keys: list[bytes]) -> Match:
        """The most blocks of `keys`, from the first on, after which a sequence can begin: whatever the query that
        follows them, or a later one, reads is there in every KV group."""
        found: Match = []
        # Per KV group how many blocks in a row are there, up to the one looked at.
        runs = [0] * len(self._devices)
        usable = 0
        for index, key in enumerate(keys):
            places = [self._find(group, key) for group in range(len(runs))]
            is_usable = True
            for group, window in enumerate(self._windows):
                runs[group] = runs[group] + 1 if places[group] else 0
                if window is None or index < window.num_sink_blocks:
                    if not places[group]:
                        return self._without_unseen(found, usable)
                else:
                    is_usable &= runs[group] > index - window.first_seen((index + 1) * self._block_size)
            found.append(places)
            if is_usable:
                usable = index + 1
        return self._without_unseen(found, usable)

    def _find(self, group: int, key: bytes) -> int:
        if (block_id := self._devices[group].find(key)) is not None:
            return block_id
        host_id = self._hosts[group].find(key)
        # What the plan being made writes is not there before it has run.
        return NULL_BLOCK if host_id is None or host_id in self._moves.written_hosts[group] else -host_id

    def _without_unseen(self, found: Match, num_blocks: int) -> Match:
        match = found[:num_blocks]
        for group, window in enumerate(self._windows):
            if window is not None:
                first_seen = window.first_seen(num_blocks * self._block_size)
                for places in match[window.num_sink_blocks: first_seen]:
                    places[group] = NULL_BLOCK
        return match

    def refresh(self, match: Match) -> None:
        """Host blocks of a match are now the last to be evicted."""
        for places in match:
            for host, place in zip(self._hosts, places, strict=True):
                if place < 0:
                    host.take(-place)
                    host.release(-place)

    def num_to_take(self, match: Match) -> Need:
        """Available device blocks that attaching a match uses up."""
        return [sum(places[group] < 0 or device.states[places[group]] in (State.CACHED, State.EMPTIED)
                    for places in match) for group, device in enumerate(self._devices)]

    def num_on_host(self, match: Match) -> int:
        """Host blocks of a match, in the KV group that has the most."""
        return max(sum(places[group] < 0 for places in match) for group in range(len(self._hosts)))

    def attach(self, blocks: SequenceBlocks, match: Match) -> None:
        """Put the blocks of a match into the empty tables of a sequence; those on the host are swapped in."""
        for group, (device, host) in enumerate(zip(self._devices, self._hosts, strict=True)):
            # All are taken before any is given out: an eviction must not take what is about to be used.
            for places in match:
                if (place := places[group]) > 0:
                    device.take(place)
                    device.count_hit(place)
                elif place < 0:
                    host.take(-place)
            for index, places in enumerate(match):
                if (place := places[group]) < 0:
                    places[group] = device.allocate()
                    self._moves.swap_in(group, -place, places[group])
                    device.register(places[group], blocks.keys[index], blocks.priority)
                    host.release(-place, self._moves.step_id)
            blocks.tables[group].extend(places[group] for places in match)
        blocks.num_keyed = len(match)
