"""Tokenizers rebuilt from GGUF files, kept in the cache folder: deriving the merges of a large SentencePiece vocabulary
takes seconds, reading them back a fraction of one."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from ...protos.errors import ModelLoadError
from ..model_hub import cache_folder
from .spec import TokenizerSpec

_VERSION = 1
"""To be raised whenever a spec is built differently, so that older entries are not used."""
_DIGEST_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


class _Key(Struct, frozen=True):
    path: str
    size: int
    mtime_ns: int
    version: int


class _Entry(Struct, frozen=True):
    key: _Key
    spec: TokenizerSpec


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Entry).decode


def cached(path: str, build: Callable[[str], TokenizerSpec]) -> TokenizerSpec:
    """What `build(path)` returned for the file as it is now. An entry that is of another state of the file, or damaged,
    is built again. A cache that cannot be written is only logged: it costs time. Raises what `build` raises, and
    `ModelLoadError` when there is no file at `path`."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from None
    key = _Key(os.path.abspath(path), stat.st_size, stat.st_mtime_ns, _VERSION)
    file = cache_folder() / "tokenizers" / f"{hashlib.sha256(key.path.encode()).hexdigest()[:32]}.bin"
    spec = _read(file, key)
    if spec is None:
        spec = build(path)
        try:
            _write(file, _Entry(key, spec))
        except OSError as error:
            _log.warning("the tokenizer of %s is not cached in %s: %s", path, file.parent, error)
    return spec


def _read(file: Path, key: _Key) -> TokenizerSpec | None:
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        _log.warning("the cached tokenizer %s is damaged and is built again", file)
        return None
    try:
        entry = _decode(body)
    except msgspec.DecodeError:  # whole, but written by another version of kvarto
        return None
    return entry.spec if entry.key == key else None


def _write(file: Path, entry: _Entry) -> None:
    """Through a rename, so that a reader never sees a half."""
    body = _encode(entry)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as output:
            output.write(hashlib.sha256(body).digest() + body)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
