"""Typed access to metadata values: what is wrong with a key is named, with its place in the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from worker_orcd.gguf.metadata import StringArray, Value
from worker_orcd.gguf.source import GgufError, shown

Kind = type[int] | type[float] | type[str] | type[bool] | Literal["strings", "ints", "floats"]
Bound = float | None
Numbers = Literal["ints", "floats"]
T = TypeVar("T", int, float, str, bool)
D = TypeVar("D")
_KIND_NAMES: Mapping[Kind, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "a bool",
    "strings": "an array of strings",
    "ints": "an array of integers",
    "floats": "an array of floats",
}


class TypedAccess:
    """Values by key, with type and range checked.

    `kind` is int, float, str, bool, "strings" (StringArray), "ints" or "floats" (numpy arrays). An int is
    accepted for a float, never the reverse; a float must be finite. `min` and `max` are inclusive and hold
    for a number or for every element of a numeric array. Raises GgufError naming the key and its offset.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Value], offsets: Mapping[str, int]) -> None:
        """`offsets` holds the byte offset of each value's type tag."""
        self.path = path
        self.metadata = metadata
        self.offsets = offsets

    @overload
    def require(self, key: str, kind: type[T], *, min: Bound = ..., max: Bound = ...) -> T: ...
    @overload
    def require(self, key: str, kind: Literal["strings"]) -> StringArray: ...
    @overload
    def require(self, key: str, kind: Numbers, *, min: Bound = ..., max: Bound = ...) -> NDArray[Any]: ...
    def require(self, key: str, kind: Any, *, min: Bound = None, max: Bound = None) -> object:
        """The value of a key that must be there."""
        if key not in self.metadata:
            raise GgufError(self.path, shown(key), None, f"is missing, {_KIND_NAMES[kind]} is required")
        return self._checked(key, kind, min, max)

    @overload
    def get(self, key: str, kind: type[T], default: D, *, min: Bound = ..., max: Bound = ...) -> T | D: ...
    @overload
    def get(self, key: str, kind: Literal["strings"], default: D) -> StringArray | D: ...
    @overload
    def get(self, key: str, kind: Numbers, default: D, *, min: Bound = ..., max: Bound = ...) -> NDArray[Any] | D: ...
    def get(self, key: str, kind: Any, default: object, *, min: Bound = None, max: Bound = None) -> object:
        """The value of a key, or `default` (taken as it is) when the file does not have the key."""
        return self._checked(key, kind, min, max) if key in self.metadata else default

    def error(self, key: str, problem: str) -> GgufError:
        """An error about the value of `key`, for checks that only the caller can make."""
        return GgufError(self.path, shown(key), self.offsets.get(key), problem)

    def _checked(self, key: str, kind: Kind, low: Bound, high: Bound) -> object:
        value = self.metadata[key]
        typed = _as_kind(value, kind)
        if typed is None:
            raise self.error(key, f"holds {_describe(value)}, {_KIND_NAMES[kind]} is required")
        problem = _out_of_range(typed, low, high)
        if problem is not None:
            raise self.error(key, problem)
        return typed


def _as_kind(value: Value, kind: Kind) -> Value | None:
    """The value as `kind`, or None when it is of another type."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == "strings":
        return value if isinstance(value, StringArray) else None
    if kind in ("ints", "floats"):
        dtype_kinds = "iu" if kind == "ints" else "f"
        return value if isinstance(value, np.ndarray) and value.dtype.kind in dtype_kinds else None
    return value if type(value) is kind else None


def _out_of_range(value: Value, low: Bound, high: Bound) -> str | None:
    """What is wrong with the size of a number (or of any in an array); None when nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"holds {value}, a finite number is required"
    if low is None and high is None:
        return None
    assert isinstance(value, int | float | np.ndarray), "only numbers have bounds"
    if isinstance(value, np.ndarray) and not value.size:
        return None
    smallest, largest = (value.min(), value.max()) if isinstance(value, np.ndarray) else (value, value)
    if low is not None and not smallest >= low:  # written so that a NaN fails
        return f"holds {smallest}, the smallest allowed is {low}"
    if high is not None and not largest <= high:
        return f"holds {largest}, the largest allowed is {high}"
    return None


def _describe(value: Value) -> str:
    if isinstance(value, StringArray):
        return f"{len(value)} strings"
    if isinstance(value, np.ndarray):
        return f"{len(value)} numbers of type {value.dtype}"
    return "a string" if isinstance(value, str) else f"the {type(value).__name__} {value}"
