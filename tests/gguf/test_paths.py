"""What is not a regular file is refused, quickly and unread; a set of splits must be complete and consistent."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

import gguf_bytes as make
import pytest

from worker_orcd.gguf.reader import GgufError, GgufFile


def refused(path: Path | str, problem: str) -> None:
    start = time.monotonic()
    with pytest.raises(GgufError, match=problem):
        GgufFile.open(path)
    assert time.monotonic() - start < 1  # opening a FIFO would wait for ever


def test_special_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("fifo", "link-to-fifo")
    os.symlink(tmp_path, "link-to-directory")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    refused("fifo", "is a FIFO, a model must be a regular file")
    refused("link-to-fifo", "is a FIFO")
    refused(tmp_path, "is a directory")
    refused("link-to-directory", "is a directory")
    refused("/dev/null", "is a character device")
    refused("/dev/zero", "is a character device")
    refused("dangling", "cannot be opened: No such file")
    refused("loop", "cannot be opened: Too many levels")
    refused("absent.gguf", "model file: cannot be opened: No such file")
    refused("nul\0byte", "cannot be opened: embedded null")
    refused("", "is a directory|cannot be opened")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        refused("socket", "cannot be opened|is a socket")


def test_a_fifo_with_a_writer_is_refused_unread(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    keep = os.open(fifo, os.O_RDWR)
    try:
        os.write(keep, make.small_model())
        refused(fifo, "is a FIFO")
        assert os.read(keep, 4) == b"GGUF"
    finally:
        os.close(keep)


def test_a_link_to_a_regular_file_opens(tmp_path: Path) -> None:
    make.opened(tmp_path, make.small_model()).close()
    (tmp_path / "link.gguf").symlink_to("model.gguf")
    assert GgufFile.open(tmp_path / "link.gguf").architecture == "llama"


def test_a_name_that_is_not_utf8_is_printable(tmp_path: Path) -> None:
    with pytest.raises(GgufError) as caught:
        GgufFile.open(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    assert caught.value.message.encode().endswith(b"No such file or directory")


def split_pair(key: str, value: int) -> bytes:
    return make.pair(key, make.U16, struct.pack("<H", value))


def write_set(
    directory: Path, numbers: tuple[int, ...] = (0, 1, 2), count: int = 3, total: int = 3, names: str = "abc"
) -> Path:
    """Three files of one tensor each; returns the first."""
    for i, number in enumerate(numbers):
        pairs = [split_pair("split.no", number), split_pair("split.count", count)]
        pairs += [make.pair("split.tensors.count", make.I32, struct.pack("<i", total))]
        pairs += [make.text("general.architecture", "llama")] if i == 0 else []
        content = make.container(pairs, [make.tensor(names[i], [4], 24, 0)], bytes([i] * 4))
        (directory / f"m-{i + 1:05}-of-00003.gguf").write_bytes(content)
    return directory / "m-00001-of-00003.gguf"


def test_a_set_of_splits_opens_as_one(tmp_path: Path) -> None:
    first = write_set(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with GgufFile.open(first) as model:
        assert [path.name for path in model.paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        assert [info.split for info in model.tensors.values()] == [0, 1, 2]
        assert [bytes(model.read(name)) for name in "abc"] == [bytes([i] * 4) for i in range(3)]
        assert model.size_bytes == sum(path.stat().st_size for path in model.paths)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_later_split_names_the_first(tmp_path: Path) -> None:
    write_set(tmp_path)
    refused(tmp_path / "m-00002-of-00003.gguf", r"a later file of a split model, open m-00001-of-00003\.gguf")


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    first = write_set(tmp_path)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    before = len(os.listdir("/proc/self/fd"))
    refused(first, r"m-00003-of-00003\.gguf: model file: cannot be opened: No such file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_inconsistent_sets_are_refused(tmp_path: Path) -> None:
    refused(write_set(tmp_path, numbers=(0, 2, 1)), r"00002-of-.*'split.no' at byte \d+: 2, .* say 1")
    refused(write_set(tmp_path, numbers=(1, 1, 2)), r"00001-of-.*'split.no' at byte \d+: 1, .* say 0")
    refused(write_set(tmp_path, count=4), r"'split.count' at byte \d+: 4 files, but the name")
    refused(write_set(tmp_path, total=4), r"'split.tensors.count' at byte \d+: 4, the files of the set have 3")
    refused(write_set(tmp_path, names="aba"), r"00003-of-.*tensor 'a' at byte \d+: is also in file 1")
    refused(write_set(tmp_path, count=60_000), "largest allowed is 512")
    first = write_set(tmp_path)
    renamed = first.rename(tmp_path / "model.gguf")
    refused(renamed, "3 files, but the name does not end in -00001-of-00003")
    alone = tmp_path / "x-00001-of-00002.gguf"
    alone.write_bytes(make.small_model())
    refused(alone, "split.count")


def test_one_of_one_is_a_single_file(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00001.gguf"
    path.write_bytes(make.small_model())
    assert GgufFile.open(path).paths == [path]
