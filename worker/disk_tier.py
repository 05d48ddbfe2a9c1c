"""Blocks of the prefix cache as files: one per key, which outlive the process and are never trusted unread."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import struct
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..protos.errors import ConfigError

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_FIELDS = struct.Struct("<8sIIQ")
"""Magic, KV group, length of the key, length of the payload. Their checksum, the key and the payload follow."""
_MAGIC = b"kvartoKV"
_CHECKSUM_BYTES = 16
_SUFFIX = ".kv"
_TEMPORARY = ".tmp"
_WARNING_INTERVAL_S = 60.0


class DiskTier:
    """The files of one rank, in a directory of their own that only one model, layout and rank ever uses.

    Files appear whole under their final name or not at all, also when the process is killed; what a power failure
    leaves is caught by the checksum. Several processes may share a directory: any of them may drop a file.
    """

    def __init__(self, root: str, fingerprint: str, block_bytes: list[int]) -> None:
        """`block_bytes`: payload of each KV group's files. Raises `ConfigError` when the directory cannot be made or
        written to."""
        self._directory = Path(root) / fingerprint
        self._block_bytes = block_bytes
        self._warned_s = -_WARNING_INTERVAL_S
        try:
            Path(root).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._directory.chmod(0o700)
            for leftover in self._directory.glob(f"*{_TEMPORARY}"):
                leftover.unlink(missing_ok=True)
            probe = self._directory / f"probe.{os.getpid()}{_TEMPORARY}"
            probe.touch(0o600)
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"kv_disk_path={root!r} cannot be used: {error}; give a directory that can be written to",
                              param="kv_disk_path") from error

    def store(self, group: int, key: bytes, block: Bytes) -> None:
        """Write one block, `[block_bytes]`. When that fails, it is logged at most once a minute, and the key stays
        as missing as it was."""
        path = self._path(group, key)
        temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
        fields = _FIELDS.pack(_MAGIC, group, len(key), block.nbytes)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                for part in (fields + _checksum(fields, key, block) + key, block.data):
                    _write_all(file, part)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._warn_sometimes(f"a cached block could not be stored under {self._directory}: {error}")

    def load(self, group: int, key: bytes, block: Bytes) -> bool:
        """Read one block into `block`, `[block_bytes]`. False, with a warning, when the file is missing or is not whole
        and as it was written; it is deleted then, and `block` holds anything."""
        path = self._path(group, key)
        try:
            with open(path, "rb", buffering=0) as file:
                problem = _read(file, group, key, block)
        except OSError as error:
            problem = str(error)
        if problem is None:
            return True
        logger.warning("cached block %s cannot be loaded, it will be computed again: %s", path, problem)
        self.drop(group, key)
        return False

    def drop(self, group: int, key: bytes) -> None:
        """Delete a file, if it is there."""
        try:
            self._path(group, key).unlink(missing_ok=True)
        except OSError as error:
            self._warn_sometimes(f"a cached block could not be deleted under {self._directory}: {error}")

    def keys(self) -> list[list[bytes]]:
        """Per KV group the keys of all files of the right size, oldest first. The others are deleted."""
        found: list[list[tuple[int, bytes]]] = [[] for _ in self._block_bytes]
        for path in self._directory.glob(f"*{_SUFFIX}"):
            try:
                group_name, key_hex = path.name.removesuffix(_SUFFIX).split("-")
                group, key = int(group_name), bytes.fromhex(key_hex)
                stat = path.stat()
            except (ValueError, OSError):
                # Not one of ours, or dropped by another process meanwhile.
                continue
            if not 0 <= group < len(found) or path != self._path(group, key):
                continue
            if stat.st_size == _file_bytes(key, self._block_bytes[group]):
                found[group].append((stat.st_mtime_ns, key))
            else:
                logger.warning("cached block %s has the wrong size and is deleted", path)
                self.drop(group, key)
        return [[key for _, key in sorted(entries)] for entries in found]

    def _path(self, group: int, key: bytes) -> Path:
        return self._directory / f"{group}-{key.hex()}{_SUFFIX}"

    def _warn_sometimes(self, message: str) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_s >= _WARNING_INTERVAL_S:
            self._warned_s = now_s
            logger.warning("%s", message)


def _file_bytes(key: bytes, block_bytes: int) -> int:
    return _FIELDS.size + _CHECKSUM_BYTES + len(key) + block_bytes


def _checksum(fields: bytes, key: bytes, block: Bytes) -> bytes:
    hashed = hashlib.blake2b(fields, digest_size=_CHECKSUM_BYTES)
    hashed.update(key)
    hashed.update(block.data)
    return hashed.digest()


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def _read(file: io.FileIO, group: int, key: bytes, block: Bytes) -> str | None:
    """Read a file into `block`. Returns what is wrong with it."""
    expected = _file_bytes(key, block.nbytes)
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        return f"it has {size} bytes instead of {expected}"
    fields = _FIELDS.pack(_MAGIC, group, len(key), block.nbytes)
    header = bytearray(expected - block.nbytes)
    for view in (memoryview(header), block.data):
        while view:
            count = file.readinto(view)
            if not count:
                return "it was cut short while it was read"
            view = view[count:]
    if header[:_FIELDS.size] != fields or header[_FIELDS.size + _CHECKSUM_BYTES:] != key:
        return "it is of another format or key"
    if header[_FIELDS.size:_FIELDS.size + _CHECKSUM_BYTES] != _checksum(fields, key, block):
        return "its checksum is wrong"
    return None
