"""Typed look-ups in the key-value pairs of a model's files, with errors that name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...protos.errors import ModelLoadError


class Metadata:
    """Key-value pairs that were read from `path`. A key whose value is null counts as absent. Every look-up raises
    `ModelLoadError` when the value has the wrong type, and, without a `default`, when the key is absent."""

    def __init__(self, path: str, values: Mapping[str, object]) -> None:
        self.path = path
        self._values = values

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer of at least `minimum`."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self._wrong(key, value, f"an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise self._wrong(key, value, "a positive, finite number")
        return float(value)

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """As `integer`, but a null in the file means None; `default` is what it means when the key is absent."""
        return None if self._is_none(key, default) else self.integer(key, default)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """As `number`, but a null in the file means None; `default` is what it means when the key is absent."""
        return None if self._is_none(key, default) else self.number(key, default)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """`count` positive, finite numbers."""
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != count or not all(
                isinstance(item, int | float) and math.isfinite(item) and item > 0 for item in value):
            raise self._wrong(key, value, f"a list of {count} positive, finite numbers")
        return tuple(float(item) for item in value)

    def has(self, key: str, value: object) -> bool:
        """Whether the key has this value; an absent one counts as false."""
        return (self._values[key] if key in self else False) == value

    def require(self, key: str, value: object, why: str) -> None:
        """Raises unless the key is absent or has this value."""
        if key in self and self._values[key] != value:
            supported = "nothing" if value is None else repr(value)
            raise ModelLoadError(f"{self.path}: '{key}' {self._values[key]!r} is not supported {why}; supported: "
                                 f"{supported}")

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def section(self, key: str) -> Metadata:
        """The object at `key`; empty if absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Metadata(self.path, value)

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of strings")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; empty if absent."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise self._wrong(key, value, "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))

    def _is_none(self, key: str, default: object) -> bool:
        return self._values[key] is None if key in self._values else default is None

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(f"{self.path}: key '{key}' is missing; the file is incomplete, fetch it again")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: '{key}' must be {wanted}, got {value!r}")
