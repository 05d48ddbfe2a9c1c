"""Files of cached blocks: whole and right, or a miss."""

from __future__ import annotations

import errno
import logging
import os
import stat

import msgspec
import numpy as np
import pytest

from kvarto.protos.errors import ConfigError
from kvarto.protos.model import KVGroupSpec, ModelConfig
from kvarto.protos.step import RankConfig
from kvarto.worker.disk_tier import DiskTier
from kvarto.worker.fingerprint import fingerprint

BLOCK_BYTES = [1000, 64]
KEY, OTHER = bytes(range(32)), bytes(range(100, 132))


@pytest.fixture
def tier(tmp_path):
    return DiskTier(str(tmp_path / "kv"), "abc", BLOCK_BYTES)


def block(group=0, seed=0):
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES[group], dtype=np.uint8)


def file_of(tmp_path, key=KEY, group=0):
    return tmp_path / "kv" / "abc" / f"{group}-{key.hex()}.kv"


def loaded(tier, key=KEY, group=0):
    """The block, or None where the tier says that there is none."""
    out = np.zeros(BLOCK_BYTES[group], np.uint8)
    return out if tier.load(group, key, out) else None


def test_a_block_comes_back_as_it_was_stored(tier):
    tier.store(0, KEY, block())
    tier.store(1, KEY, block(group=1))
    assert np.array_equal(loaded(tier), block())
    assert np.array_equal(loaded(tier, group=1), block(group=1))


def test_a_key_stored_again_holds_the_latest(tier):
    tier.store(0, KEY, block())
    tier.store(0, KEY, block(seed=1))
    assert np.array_equal(loaded(tier), block(seed=1))


def test_a_later_process_finds_the_keys_oldest_first(tier, tmp_path):
    for age, key in enumerate([OTHER, KEY]):
        tier.store(0, key, block())
        os.utime(file_of(tmp_path, key), ns=(0, (10 + age) * 10**9))
    tier.store(1, OTHER, block(group=1))
    again = DiskTier(str(tmp_path / "kv"), "abc", BLOCK_BYTES)
    assert again.keys() == [[OTHER, KEY], [OTHER]]
    assert np.array_equal(loaded(again), block())


def test_another_fingerprint_shares_nothing(tier, tmp_path):
    tier.store(0, KEY, block())
    assert DiskTier(str(tmp_path / "kv"), "abd", BLOCK_BYTES).keys() == [[], []]


def test_a_dropped_key_is_gone_and_may_be_dropped_again(tier):
    tier.store(0, KEY, block())
    tier.drop(0, KEY)
    tier.drop(0, KEY)
    assert tier.keys() == [[], []]


def test_files_and_directories_are_the_users_own(tier, tmp_path):
    tier.store(0, KEY, block())
    path = file_of(tmp_path)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]


def damage_one_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_magic(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda path: path.unlink(), "No such file"),
    (lambda path: path.write_bytes(b""), "0 bytes instead"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead"),
    (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes instead"),
    (damage_one_bit, "checksum"),
    (change_magic, "format or key"),
    (lambda path: path.with_name(f"0-{OTHER.hex()}.kv").rename(path), "format or key"),
], ids=["missing", "empty", "truncated", "longer", "one bit", "magic", "another key's"])
def test_a_file_that_is_not_as_it_was_written_is_a_miss_and_deleted(tier, tmp_path, caplog, damage, reason):
    tier.store(0, OTHER, block(seed=1))
    tier.store(0, KEY, block())
    damage(file_of(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert loaded(tier) is None
    assert KEY.hex() in caplog.text
    assert reason in caplog.text
    assert not file_of(tmp_path).exists()


def test_a_file_of_the_wrong_size_is_no_key_and_deleted(tier, tmp_path):
    tier.store(0, KEY, block())
    file_of(tmp_path).write_bytes(b"half")
    assert tier.keys() == [[], []]
    assert not file_of(tmp_path).exists()


def test_foreign_files_are_neither_keys_nor_deleted(tier, tmp_path):
    names = ["notes.kv", "7-00.kv", "0-zz.kv", "00-aa.kv", "1-2-3.kv"]
    for name in names:
        (tmp_path / "kv" / "abc" / name).write_text("mine")
    assert tier.keys() == [[], []]
    assert {path.name for path in (tmp_path / "kv" / "abc").iterdir()} == set(names)


def test_a_process_killed_while_it_writes_leaves_no_key(tier, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(Killed):
        tier.store(0, KEY, block())
    monkeypatch.undo()
    assert len(list((tmp_path / "kv" / "abc").iterdir())) == 1
    again = DiskTier(str(tmp_path / "kv"), "abc", BLOCK_BYTES)
    assert again.keys() == [[], []]
    assert list((tmp_path / "kv" / "abc").iterdir()) == []


@pytest.fixture
def full_disk(monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kvarto.worker.disk_tier._write_all", full)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_a_miss_and_leaves_nothing_behind(tier, tmp_path):
    tier.store(0, KEY, block())
    assert list((tmp_path / "kv" / "abc").iterdir()) == []
    assert loaded(tier) is None


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_logged_once_a_minute(tier, caplog, monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr("kvarto.worker.disk_tier.time.monotonic", lambda: now_s[0])
    with caplog.at_level(logging.WARNING):
        for now_s[0] in (1000.0, 1001.0, 1059.0, 1060.0, 1061.0):
            tier.store(0, KEY, block())
    assert caplog.text.count("No space left") == 2


@pytest.mark.parametrize("place", ["file/kv", "file"])
def test_a_path_that_cannot_be_used_is_an_error_that_names_it(tmp_path, place):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / place)
    with pytest.raises(ConfigError, match=f"kv_disk_path='{path}'") as caught:
        DiskTier(path, "abc", BLOCK_BYTES)
    assert caught.value.param == "kv_disk_path"


# ---- the fingerprint


class Source:
    """Two tensors in one file."""

    def __init__(self, path):
        self.path = str(path)

    def names(self):
        return ["a", "b"]

    def file_of(self, name):
        return self.path


GROUPS = [KVGroupSpec(layer_ids=(0, 1))]
MODEL = ModelConfig(
    path="/somewhere", format="hf", family="llama", hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1,
    total_num_kv_heads=1, head_dim=8, vocab_size=10, max_position_embeddings=64, norm_eps=1e-5, rope_theta=1e4)
CONFIG = RankConfig(
    model=MODEL, dtype="float32", device="cpu", tp_size=2, rank=0, epoch=1, block_size=16, max_model_len=64,
    max_num_seqs=4, max_num_batched_tokens=64, num_threads=1, step_timeout_s=1, lease_s=2)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(300_000))
    os.utime(path, ns=(0, 5))
    return path


def rewrite(path, data, mtime_ns=5):
    path.write_bytes(data)
    os.utime(path, ns=(0, mtime_ns))


replace = msgspec.structs.replace


@pytest.mark.parametrize("config", [
    replace(CONFIG, dtype="bfloat16"), replace(CONFIG, block_size=32), replace(CONFIG, tp_size=3),
    replace(CONFIG, rank=1), replace(CONFIG, model=replace(MODEL, rope_theta=2e4))])
def test_blocks_of_another_layout_or_model_have_another_fingerprint(weights, config):
    assert fingerprint(config, GROUPS, Source(weights)) != fingerprint(CONFIG, GROUPS, Source(weights))


def test_other_kv_groups_have_another_fingerprint(weights):
    windowed = [KVGroupSpec(layer_ids=(0, 1), window=16)]
    assert fingerprint(CONFIG, windowed, Source(weights)) != fingerprint(CONFIG, GROUPS, Source(weights))


@pytest.mark.parametrize("change", [
    lambda path: rewrite(path, b"x" + bytes(299_999)), lambda path: rewrite(path, bytes(299_999) + b"x"),
    lambda path: rewrite(path, bytes(300_001)), lambda path: rewrite(path, bytes(300_000), mtime_ns=6)],
    ids=["first byte", "last byte", "size", "time"])
def test_other_weights_have_another_fingerprint(weights, change):
    before = fingerprint(CONFIG, GROUPS, Source(weights))
    change(weights)
    assert fingerprint(CONFIG, GROUPS, Source(weights)) != before


def test_limits_and_place_do_not_change_the_fingerprint(weights, tmp_path):
    before = fingerprint(CONFIG, GROUPS, Source(weights))
    (tmp_path / "moved").mkdir()
    moved = weights.rename(tmp_path / "moved" / weights.name)
    config = replace(CONFIG, epoch=2, max_num_seqs=9, num_threads=2, model=replace(MODEL, path="/elsewhere"))
    assert fingerprint(config, GROUPS, Source(moved)) == before
