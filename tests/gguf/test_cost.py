"""Opening costs memory and time in proportion to the header, however the header is made."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf_bytes as make
import pytest

from worker_orcd.gguf.reader import GgufError, GgufFile

MIB = 2**20


def empty_strings(size: int) -> bytes:
    return make.container([make.array("s", make.STRING, bytes(size), size // 8)])


def long_strings(size: int) -> bytes:
    """Just too long for the short-cut in every stretch of the walk."""
    few = (make.string(b"x" * 256) + bytes(8 * 1000)) * (size // 8264)
    return make.container([make.array("s", make.STRING, few, size // 8264 * 1001)])


def rare_finds(size: int) -> bytes:
    """One string that the short-cut finds, then a few that it does not."""
    few = make.string(b"a") + bytes(8 * 64)
    return make.container([make.array("s", make.STRING, few * (size // len(few)), size // len(few) * 65)])


def rare_finds_in_small_arrays(size: int) -> bytes:
    few = make.string(b"a") + bytes(8 * 39)
    return make.container([make.array(f"{i}", make.STRING, few, 40) for i in range(size // 349)])


def tiny_arrays(size: int) -> bytes:
    pairs = [make.array(f"{i}", make.U8, b"", 0) for i in range(min(size // 29, 65_536))]
    return make.container(pairs)


def many_pairs(size: int) -> bytes:
    return make.container([make.pair(f"{i:x}", make.BOOL, b"\1") for i in range(min(size // 17, 65_536))])


def many_tiny_string_arrays(size: int) -> bytes:
    pairs = [make.array(f"{i}", make.STRING, bytes(8), 1) for i in range(min(size // 37, 65_536))]
    return make.container(pairs)


def many_tensors(size: int) -> bytes:
    count = min(size // 40, 9_999)
    return make.container([], [make.tensor(f"{i}", [1], 24, 32 * i) for i in range(count)], bytes(32 * count))


def numbers(size: int) -> bytes:
    return make.container([make.array("n", make.U8, bytes(size), size)])


KINDS = [
    empty_strings,
    long_strings,
    rare_finds,
    rare_finds_in_small_arrays,
    tiny_arrays,
    many_pairs,
    many_tiny_string_arrays,
    many_tensors,
    numbers,
]


def peak_of(path: Path) -> int:
    """Bytes allocated."""
    tracemalloc.start()
    try:
        with GgufFile.open(path):
            return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def seconds_of(path: Path, repeats: int) -> float:
    """The best of some: a collection of garbage may fall into one."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        GgufFile.open(path).close()
        seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("build", KINDS)
def test_memory_and_time_follow_the_size(path: Path, build: Callable[[int], bytes]) -> None:
    peaks = []
    for size in (MIB // 4, MIB):
        path.write_bytes(build(size))
        length, peak = path.stat().st_size, peak_of(path)
        assert peak <= 32 * MIB + 10 * length
        assert seconds_of(path, 2) <= 0.1 + 0.8 * length / MIB  # eight times the promise, for slow machines
        peaks.append((length, peak))
    (small, low), (large, high) = peaks
    assert high <= 1.2 * low * large / small + MIB


@pytest.mark.parametrize("build", [rare_finds, rare_finds_in_small_arrays])
def test_strings_are_not_searched_in_vain(path: Path, build: Callable[[int], bytes]) -> None:
    """Measured against strings that are walked one by one, which is the price of strings that are not searched."""
    seconds = []
    for made in (empty_strings, build):
        path.write_bytes(made(MIB))
        seconds.append(seconds_of(path, 5))
    walked, searched = seconds
    assert searched <= 4 * walked


@pytest.mark.parametrize("build", KINDS)
def test_small_files_stay_small(path: Path, build: Callable[[int], bytes]) -> None:
    path.write_bytes(build(64 * 1024))
    assert peak_of(path) <= 8 * MIB
    assert seconds_of(path, 3) <= 0.25


@pytest.mark.parametrize(
    "content",
    [
        make.header(2**62, 2**62),
        make.header(0, 65_536) + bytes(20),
        make.header(9_999, 0) + bytes(20),
        make.header(0, 1) + make.array("s", make.STRING, b"", 2**60),
        make.header(0, 1) + make.array("s", make.STRING, b"", 2**22),
        make.header(0, 1) + make.array("n", make.F64, b"", 2**61),
        make.header(0, 1) + make.pair("s", make.STRING, b"\xff" * 7 + b"\x7f"),
        make.container([], [make.tensor("t", [2**40], 0, 0)]),
    ],
)
def test_promises_of_much_to_come_allocate_nothing(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(GgufError):
            GgufFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
