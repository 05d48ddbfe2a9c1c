"""Random numbers that are a function of (seed, sequence index, position) and of nothing else.

Philox4x32-10 of "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al., SC 2011): the seed is the key and
(position, sequence index) the counter, so that two draws share a number only if they share all three.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Counters `[4, R]` and keys `[2, R]`, each a 32-bit word in uint64, to four 32-bit words `[4, R]`."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (product1 >> _SHIFT) ^ c1 ^ k0, product1 & _LOW
        c2, c3 = (product0 >> _SHIFT) ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3])


def uniforms(seeds: list[int], seq_indices: list[int], positions: list[int]) -> NDArray[np.float64]:
    """One float64 in [0, 1), of 53 random bits, per row. Seeds are 64-bit (negative ones as two's complement)."""
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    index = np.array(seq_indices, dtype=np.uint64)
    counter = np.stack([position & _LOW, position >> _SHIFT, index & _LOW, index >> _SHIFT])
    words = philox4x32(counter, np.stack([seed & _LOW, seed >> _SHIFT]))
    bits: NDArray[np.float64] = ((words[0] << _SHIFT | words[1]) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53
