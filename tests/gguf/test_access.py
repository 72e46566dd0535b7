from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf_bytes as make
import numpy as np
import pytest

from worker_orcd.gguf.reader import GgufError, GgufFile


@pytest.fixture
def model(tmp_path: Path) -> GgufFile:
    pairs = [
        make.text("general.architecture", "llama"),
        make.u32("llama.block_count", 24),
        make.pair("llama.eps", make.F32, struct.pack("<f", 0.5)),
        make.pair("nan", make.F32, struct.pack("<f", float("nan"))),
        make.pair("inf", make.F64, struct.pack("<d", float("inf"))),
        make.pair("flag", make.BOOL, b"\0"),
        make.array("llama.heads", make.I32, struct.pack("<3i", 4, -2, 8), 3),
        make.array("floats", make.F32, struct.pack("<2f", 1.0, float("nan")), 2),
        make.array("none", make.U8, b"", 0),
        make.strings("names", ["a", "b"]),
    ]
    return make.opened(tmp_path, make.container(pairs))


def test_values_of_the_right_kind(model: GgufFile) -> None:
    assert model.require("llama.block_count", int, min=1, max=24) == 24
    assert model.require("general.architecture", str) == "llama"
    assert model.require("flag", bool) is False
    assert model.require("llama.eps", float, min=0.5) == 0.5
    as_float = model.require("llama.block_count", float)
    assert as_float == 24.0
    assert type(as_float) is float
    assert np.array_equal(model.require("llama.heads", "ints", min=-2, max=8), [4, -2, 8])
    assert model.require("none", "ints", min=1).size == 0
    assert list(model.require("names", "strings")) == ["a", "b"]


def test_defaults_only_for_absent_keys(model: GgufFile) -> None:
    assert model.get("absent", int, 7) == 7
    assert model.get("absent", "ints", None) is None
    assert model.hparam("block_count", int) == 24
    assert model.hparam("absent", float, 1e4) == 1e4
    assert model.hparam("absent", int, None) is None
    with pytest.raises(GgufError, match=r"'llama\.absent': is missing, an integer is required"):
        model.hparam("absent", int)
    with pytest.raises(GgufError, match="a number is required"):
        model.get("general.architecture", float, 1.0)


@pytest.mark.parametrize(
    ("key", "kind", "bounds", "problem"),
    [
        ("flag", int, {}, "holds the bool False, an integer is required"),
        ("flag", float, {}, "a number is required"),
        ("llama.eps", int, {}, "holds the float 0.5, an integer is required"),
        ("llama.block_count", bool, {}, "a bool is required"),
        ("llama.block_count", str, {}, "a string is required"),
        ("llama.block_count", "ints", {}, "an array of integers is required"),
        ("names", str, {}, "holds 2 strings, a string is required"),
        ("names", "ints", {}, "an array of integers is required"),
        ("general.architecture", "strings", {}, "holds a string, an array of strings is required"),
        ("llama.heads", "floats", {}, "holds 3 numbers of type int32, an array of floats is required"),
        ("floats", "ints", {}, "an array of integers is required"),
        ("nan", float, {}, "holds nan, a finite number"),
        ("inf", float, {}, "holds inf, a finite number"),
        ("llama.block_count", int, {"min": 25}, "holds 24, the smallest allowed is 25"),
        ("llama.block_count", int, {"max": 23}, "holds 24, the largest allowed is 23"),
        ("llama.block_count", float, {"max": 23.5}, "the largest allowed is 23.5"),
        ("llama.heads", "ints", {"min": 1}, "holds -2, the smallest allowed is 1"),
        ("llama.heads", "ints", {"max": 7}, "holds 8, the largest allowed is 7"),
        ("floats", "floats", {"min": 0}, "holds nan, the smallest"),
    ],
)
def test_a_wrong_value_names_key_place_and_limit(
    model: GgufFile, key: str, kind: Any, bounds: dict[str, float], problem: str
) -> None:
    with pytest.raises(GgufError, match=problem) as caught:
        model.require(key, kind, **bounds)
    message = str(caught.value)
    at = model.path.read_bytes().index(make.string(key)) + 8 + len(key)
    assert f"{model.path}: '{key}' at byte {at}: " in message
