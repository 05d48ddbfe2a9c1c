"""The random numbers: the published Philox, and one number per (seed, sequence index, position)."""

import numpy as np
import pytest

from kvarto.worker.sampling.philox import philox4x32, uniforms


@pytest.mark.parametrize(("counter", "key", "words"), [
    # Random123's known answers for philox4x32 with 10 rounds.
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_gives_the_published_answers(counter, key, words):
    result = philox4x32(np.array([counter], dtype=np.uint64).T, np.array([key], dtype=np.uint64).T)
    assert tuple(int(w) for w in result[:, 0]) == words


def test_uniforms_fill_the_unit_interval_evenly():
    values = uniforms([7] * 40_000, [0] * 40_000, list(range(40_000)))
    counts, _ = np.histogram(values, bins=100, range=(0.0, 1.0))
    # Chi-square of 99 degrees of freedom: 99 +- 14; 170 is past five deviations.
    assert ((counts - 400.0) ** 2 / 400.0).sum() < 170.0


def test_neighbouring_draws_are_uncorrelated():
    values = np.stack([uniforms([s] * 5000, [i] * 5000, list(range(p, p + 5000)))
                       for s, i, p in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]])
    assert np.abs(np.corrcoef(values) - np.eye(4)).max() < 0.07


def test_each_of_seed_index_and_position_changes_the_number():
    seeds, indices, positions = [3, 4, 3, 3, 3 + 2**40, -3], [0, 0, 1, 0, 0, 0], [9, 9, 9, 10, 9, 9]
    assert len(set(uniforms(seeds, indices, positions).tolist())) == 6


def test_a_number_does_not_depend_on_its_batch():
    together = uniforms([1, 2, 3], [0, 1, 2], [10, 20, 30])
    assert together.tolist() == [uniforms([s], [i], [p])[0] for s, i, p in [(1, 0, 10), (2, 1, 20), (3, 2, 30)]]
