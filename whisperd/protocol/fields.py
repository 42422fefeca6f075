"""Taking a map apart at the edge: each field checked once, whatever is left over refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from whisperd.protocol.errors import ErrorCode, WhisperdError

T = TypeVar("T")

_REQUIRED: Any = object()


def bad_request(message: str) -> WhisperdError:
    """Return the error for a request that is well-formed but wrong."""
    return WhisperdError(ErrorCode.BAD_REQUEST, message)


class Fields:
    """Reads the fields of one map; every method raises `bad_request`, naming the field.

    `where` is how the map is called in messages, such as "submit" or "options".
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise bad_request(f"{where} must be a map, not {_kind(values)}")
        self._left = dict(values)
        self._where = where

    def _take(self, name: str, default: Any) -> Any:
        if name in self._left:
            return self._left.pop(name)
        if default is _REQUIRED:
            raise bad_request(f"{self._where} needs {name!r}")
        return default

    def wrong(self, name: str, value: Any, wanted: str) -> WhisperdError:
        """Return the error that `name` holds `value` where `wanted` was."""
        shown = repr(value) if isinstance(value, int | float | str) and len(repr(value)) <= 60 else _kind(value)
        return bad_request(f"{self._where}: {name} must be {wanted}, not {shown}")

    def value(self, name: str, default: Any = _REQUIRED) -> Any:
        """Take a field as it is, for a caller that checks it itself."""
        return self._take(name, default)

    def boolean(self, name: str, default: bool = _REQUIRED) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def integer(self, name: str, default: T | int = _REQUIRED, *, low: int = 0, high: int = 2**53 - 1) -> int | T:
        """Take a whole number; an absent field or null gives `default`."""
        value = self._take(name, default)
        if value is None and default is not _REQUIRED:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def number(
        self, name: str, default: T | float = _REQUIRED, *, low: float = -math.inf, high: float = math.inf
    ) -> float | T:
        """Take a finite number; null is taken where the default is None."""
        value = self._take(name, default)
        if value is None and default is None:
            return default
        if not is_number(value) or not low <= value <= high:
            bounds = "" if math.isinf(low) and math.isinf(high) else f" from {low:g} to {high:g}"
            raise self.wrong(name, value, f"a number{bounds}")
        return float(value)

    def text(self, name: str, default: T | str = _REQUIRED, *, max_bytes: int = 4096) -> str | T:
        """Take a string of at most `max_bytes` in UTF-8; null is taken where the default is None."""
        value = self._take(name, default)
        if value is None and default is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        if len(value.encode("utf-8", "surrogatepass")) > max_bytes:
            raise bad_request(f"{self._where}: {name} is longer than {max_bytes} bytes")
        return value

    def choice(self, name: str, choices: type[T], default: T = _REQUIRED) -> T:
        """Take one of a StrEnum's values."""
        value = self._take(name, default)
        try:
            if isinstance(value, str):
                return choices(value)  # type: ignore[call-arg]
        except ValueError:
            pass
        wanted = " or ".join(repr(str(choice)) for choice in choices)  # type: ignore[attr-defined]
        raise self.wrong(name, value, wanted)

    def done(self) -> None:
        """Refuse whatever has not been taken."""
        if self._left:
            names = ", ".join(sorted(repr(name)[:60] for name in self._left))
            raise bad_request(f"{self._where} does not know {names}")


def is_number(value: Any) -> bool:
    """True for a finite int or float (a bool is neither)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", bytes: "bytes", list: "a list"}
    return "null" if value is None else names.get(type(value), "a map")
