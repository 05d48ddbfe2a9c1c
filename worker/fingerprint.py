"""What a stored block depends on besides its tokens, as the name of a directory."""

from __future__ import annotations

import hashlib
import os

import msgspec

from ..protos.model import KVGroupSpec
from ..protos.step import RankConfig
from .weights import WeightSource

_FORMAT_VERSION = 2
"""Of the files and of a block's layout: raise it when either changes."""
_SAMPLE_BYTES = 64 * 1024


def fingerprint(config: RankConfig, groups: list[KVGroupSpec], source: WeightSource) -> str:
    """Hex digest of the weights, the model's configuration, the layout of a block and the rank. Blocks of one are
    worthless under any other. Raises `OSError` when a file cannot be read."""
    parts = [
        _FORMAT_VERSION, [_identity(path) for path in sorted({source.file_of(name) for name in source.names()})],
        # Where the model lies changes nothing; that its files are the same is said above.
        msgspec.structs.replace(config.model, path=""), config.dtype, config.quantization,
        config.kv_cache_dtype, config.block_size, groups, config.tp_size, config.rank]
    return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=16).hexdigest()


def _identity(path: str) -> tuple[str, int, int, bytes]:
    """Name, size, time of change, and a hash of the beginning and the end: the whole may be many gigabytes."""
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        sampled = hashlib.blake2b(file.read(_SAMPLE_BYTES), digest_size=16)
        file.seek(max(0, stat.st_size - _SAMPLE_BYTES))
        sampled.update(file.read(_SAMPLE_BYTES))
    return os.path.basename(path), stat.st_size, stat.st_mtime_ns, sampled.digest()
