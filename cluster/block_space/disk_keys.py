"""What outlives a restart beside the files of the disk tier: the secret of the prefix keys."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from ...protos.errors import ConfigError
from ...protos.step import RankReady
from .prefix_keys import KEY_BYTES

FILE_NAME = "prefix-key"


def hash_key(disk_path: str | None) -> bytes:
    """The secret of the prefix keys: a new one without a disk tier, else the one kept in its directory (mode 0600),
    made on first use. Raises `ConfigError` when that cannot be read or written."""
    if disk_path is None:
        return secrets.token_bytes(KEY_BYTES)
    path = Path(disk_path) / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _make(path)
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"kv_disk_path: cannot keep the cache's key in {path}: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise ConfigError(f"kv_disk_path: {path} is damaged: delete it, and the cached blocks are computed anew")
    return key


def _make(path: Path) -> None:
    """Make the file whole or not at all; of several that try at once one succeeds."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)


def stored_keys(ranks: list[RankReady]) -> tuple[list[bytes], list[bytes]]:
    """Keys of the disk tier that every rank holds in every KV group, oldest first, and those that only some hold: a
    crash has kept the others from being written."""
    groups = [set(keys) for rank in ranks for keys in rank.stored_keys]
    if not groups:
        return [], []
    everywhere = set.intersection(*groups)
    return ([key for key in ranks[0].stored_keys[0] if key in everywhere], sorted(set.union(*groups) - everywhere))
