"""Any bytes either open, and then every value can be read, or give one GgufError with a field and its place."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import gguf_bytes as make
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker_orcd.gguf.reader import GgufError, GgufFile, StringArray

MESSAGE = re.compile(r".+\.gguf: .+ at byte \d+: .+", re.DOTALL)
OWN_DIRECTORY = settings(
    max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def opens(path: Path, content: bytes) -> bool:
    """Try one file. Any exception but a well-formed GgufError fails the test."""
    with path.open("r+b" if path.exists() else "wb") as file:  # in place: to empty a file takes some disks long
        file.write(content)
        file.truncate()
    problem = None
    try:
        model = GgufFile.open(path)
    except GgufError as error:
        problem = str(error)
    if problem is not None:
        assert MESSAGE.fullmatch(problem), problem
        return False
    with model:
        for value in model.metadata.values():
            if isinstance(value, StringArray):
                assert len(value.decode_all()) == len(value)
            elif isinstance(value, np.ndarray):
                value.sum()
        for name, info in model.tensors.items():
            assert model.read(name).nbytes == info.nbytes
    return True


def opened_of(directory: Path, contents: Iterable[bytes]) -> tuple[int, int]:
    results = [opens(directory / "m.gguf", content) for content in contents]
    return sum(results), len(results)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = make.small_model()
    assert opened_of(tmp_path, [content]) == (1, 1)
    assert opened_of(tmp_path, (content[:end] for end in range(len(content)))) == (0, len(content))


def test_every_bit_flip_and_boundary_byte(tmp_path: Path) -> None:
    content = make.small_model()

    def mutants() -> Iterator[bytes]:
        for i, byte in enumerate(content):
            for value in {byte ^ (1 << bit) for bit in range(8)} | {0, 0x7F, 0x80, 0xFF, byte + 1 & 0xFF}:
                yield content[:i] + bytes([value]) + content[i + 1 :]

    num_opened, num_tried = opened_of(tmp_path, mutants())
    assert num_tried > 9_000
    assert 0 < num_opened < num_tried  # texts, numbers and tensor bytes may change; structure may not


def test_every_field_boundary_with_extreme_numbers(tmp_path: Path) -> None:
    content = make.small_model()
    extremes = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
    mutants = (
        content[:i] + number.to_bytes(8, "little") + content[i + 8 :]
        for i in range(4, len(content) - 8, 2)
        for number in extremes
    )
    num_opened, num_tried = opened_of(tmp_path, mutants)
    assert 0 < num_opened < num_tried


def test_random_splices(tmp_path: Path) -> None:
    rng = random.Random(20)
    content = make.small_model()

    def splice() -> bytes:
        mutant = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            start, source = rng.randrange(len(mutant)), rng.randrange(len(mutant))
            length = rng.choice([1, 2, 4, 8, 32])
            mutant[start : start + rng.choice([0, length])] = mutant[source : source + length]
        return bytes(mutant)

    num_opened, num_tried = opened_of(tmp_path, (splice() for _ in range(6_000)))
    assert num_opened < num_tried


@OWN_DIRECTORY
@given(tail=st.binary(max_size=512), num_tensors=st.integers(0, 3), num_pairs=st.integers(0, 3))
def test_random_bytes_behind_a_good_start(tmp_path: Path, tail: bytes, num_tensors: int, num_pairs: int) -> None:
    opens(tmp_path / "m.gguf", make.header(num_tensors, num_pairs) + tail)


@OWN_DIRECTORY
@given(content=st.binary(max_size=256))
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    assert not opens(tmp_path / "m.gguf", content)


@OWN_DIRECTORY
@given(items=st.lists(st.binary(max_size=300), max_size=40))
def test_string_arrays_round_trip(tmp_path: Path, items: list[bytes]) -> None:
    model = make.opened(tmp_path, make.container([make.strings("s", items)]))
    found = model.require("s", "strings")
    assert [found.raw(i) for i in range(len(found))] == items
    assert found.decode_all() == [item.decode("utf-8", "replace") for item in items]


@pytest.mark.parametrize("odd", [0.0, 0.001, 0.3])
def test_long_string_arrays_of_every_kind(tmp_path: Path, odd: float) -> None:
    """Long enough for the search in windows; `odd` of the strings are empty, long or full of NUL bytes."""
    rng = random.Random(7)

    def item() -> bytes:
        if rng.random() < odd:
            nuls = b"\0" * rng.randint(1, 40)
            return rng.choice([b"", b"x" * 256, b"y" * 70_000, nuls, b"\5" + b"\0" * 7 + b"abcde"])
        return bytes(rng.randrange(1, 256) for _ in range(rng.choice([1, 2, 3, 7, 8, 9, 31, 255])))

    items = [item() for _ in range(6_000)]
    model = make.opened(tmp_path, make.container([make.strings("s", items), make.strings("t", items[:40])]))
    for key, expected in (("s", items), ("t", items[:40])):
        found = model.require(key, "strings")
        assert [found.raw(i) for i in range(len(found))] == expected
