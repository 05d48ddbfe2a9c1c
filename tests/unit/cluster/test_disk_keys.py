"""The secret of the prefix keys beside the disk tier, and which of the files there count after a restart."""

from __future__ import annotations

import secrets
import stat

import pytest

from kvarto.cluster.block_space import disk_keys
from kvarto.cluster.block_space.disk_keys import FILE_NAME, hash_key, stored_keys
from kvarto.protos.errors import ConfigError
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import RankCosts, RankReady

A, B, C, D = (bytes([i]) * 16 for i in range(4))


def rank(*stored):
    return RankReady(
        rank=0, kv_groups=[KVGroupSpec(layer_ids=(0,))], block_bytes=[1], available_bytes=1, available_host_bytes=1,
        kernels="", node="a", pid=1, costs=RankCosts(copy_bytes_per_s=1.0, prefill_tokens_per_s=1.0),
        stored_keys=[list(keys) for keys in stored])


# -- the secret ------------------------------------------------------------------------------------------------------


def test_without_a_disk_tier_every_start_has_a_secret_of_its_own():
    assert len({hash_key(None) for _ in range(3)}) == 3


def test_the_secret_has_128_bits(tmp_path):
    assert len(hash_key(None)) == len(hash_key(str(tmp_path))) == 16


def test_the_secret_outlives_a_restart(tmp_path):
    assert hash_key(str(tmp_path)) == hash_key(str(tmp_path))


def test_two_directories_have_two_secrets(tmp_path):
    assert hash_key(str(tmp_path / "a")) != hash_key(str(tmp_path / "b"))


def test_nobody_else_can_read_the_secret(tmp_path):
    hash_key(str(tmp_path))
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_the_directory_is_made_for_its_owner_alone(tmp_path):
    hash_key(str(tmp_path / "parent" / "tier"))
    assert stat.S_IMODE((tmp_path / "parent" / "tier").stat().st_mode) == 0o700


@pytest.mark.parametrize("contents", [b"", b"short", b"x" * 17])
def test_a_damaged_secret_is_refused_with_the_way_out(tmp_path, contents):
    (tmp_path / FILE_NAME).write_bytes(contents)
    with pytest.raises(ConfigError, match=r"^kv_disk_path: .*prefix-key is damaged: delete it"):
        hash_key(str(tmp_path))


@pytest.mark.parametrize("obstacle", ["tier is a file", "key is a directory"])
def test_a_place_that_cannot_be_used_is_refused_by_its_key(tmp_path, obstacle):
    tier = tmp_path / "tier"
    if obstacle == "tier is a file":
        tier.write_text("")
    else:
        (tier / FILE_NAME).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^kv_disk_path: cannot keep the cache's key in .*tier"):
        hash_key(str(tier))


def test_a_directory_that_cannot_be_written_is_refused_by_its_key(tmp_path, monkeypatch):
    """Who runs the tests may be root, whom no mode keeps out."""
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk_keys.os, "open", refuse)
    with pytest.raises(ConfigError, match=r"^kv_disk_path: .*Permission denied"):
        hash_key(str(tmp_path))


def test_two_worker_groups_that_start_at_once_agree_on_a_secret(tmp_path, monkeypatch):
    """The supervisor starts each of them on a thread of its own."""
    make, keys = secrets.token_bytes, []

    def interrupted(size):
        monkeypatch.setattr(disk_keys.secrets, "token_bytes", make)
        keys.append(hash_key(str(tmp_path)))
        return make(size)

    monkeypatch.setattr(disk_keys.secrets, "token_bytes", interrupted)
    keys.append(hash_key(str(tmp_path)))
    assert keys[0] == keys[1]


# -- what is stored --------------------------------------------------------------------------------------------------


def test_without_a_disk_tier_nothing_is_stored():
    assert stored_keys([rank(), rank()]) == ([], [])


def test_an_empty_disk_tier_holds_nothing():
    assert stored_keys([rank([]), rank([])]) == ([], [])


def test_what_every_rank_holds_is_stored_oldest_first():
    assert stored_keys([rank([C, A, B]), rank([A, B, C])]) == ([C, A, B], [])


def test_what_only_some_ranks_hold_is_orphaned():
    assert stored_keys([rank([A, B, D]), rank([C, B, A])]) == ([A, B], [C, D])


def test_what_only_some_kv_groups_hold_is_orphaned():
    assert stored_keys([rank([A, B], [B])]) == ([B], [A])


def test_a_rank_that_lost_its_files_orphans_everybodys():
    assert stored_keys([rank([A, B]), rank([])]) == ([], [A, B])
