from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf_bytes as make
import numpy as np
import pytest

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufError, GgufFile, StringArray
from worker_orcd.gguf.types import FILE_TYPES, GgmlType


def test_reads_header_metadata_and_tensors(tmp_path: Path) -> None:
    with make.opened(tmp_path, make.small_model()) as model:
        assert (model.version, model.alignment, model.architecture) == (3, 32, "llama")
        assert model.size_bytes == len(make.small_model())
        assert model.paths == [model.path] == [tmp_path / "model.gguf"]
        assert model.metadata["b"] is True
        assert (model.metadata["i"], model.metadata["d"]) == (-5, 0.5)
        assert model.metadata["f"] == np.float32(1e-5)
        assert model.metadata["h"].tolist() == [1, 2, 3]
        assert model.metadata["g"].tolist() == [True, False]
        assert list(model.tensors) == ["norm.weight", "token_embd.weight", "output.weight"]
        info = model.tensors["token_embd.weight"]
        assert (info.shape, info.type, info.nbytes, info.split) == ((2, 32), GgmlType.Q4_0, 36, 0)
        assert model.tensors["output.weight"].shape == (2, 2, 3)
        assert model.read("norm.weight").cast("f").tolist() == [1, 2, 3, 4]
        assert bytes(model.read("token_embd.weight")) == bytes(range(36))


def test_reads_a_part_into_a_buffer_of_the_caller(tmp_path: Path) -> None:
    with make.opened(tmp_path, make.small_model()) as model:
        buffer = bytearray(8)
        front = model.read("token_embd.weight", memoryview(buffer), start=30, length=5)
        assert bytes(front) == bytes(range(30, 35))
        assert bytes(buffer) == bytes(range(30, 35)) + bytes(3)
        assert bytes(model.read("token_embd.weight", start=34)) == bytes([34, 35])
        with pytest.raises(GgufError, match="tensor 'nope': is not in the file"):
            model.read("nope")


def test_numpy_values_are_read_only_views(tmp_path: Path) -> None:
    with make.opened(tmp_path, make.small_model()) as model:
        scores = model.require("tokenizer.ggml.scores", "floats")
        assert not scores.flags.writeable
        assert not scores.flags.owndata


def test_vocabulary_only_and_empty_files_open(tmp_path: Path) -> None:
    model = make.opened(tmp_path, make.container([make.strings("tokenizer.ggml.tokens", ["x"])]))
    assert model.tensors == {}
    assert model.quant_kind == "unknown"
    with make.opened(tmp_path, make.header(0, 0)) as empty, pytest.raises(GgufError, match=r"architecture.*missing"):
        _ = empty.architecture


def test_string_array_decodes_one_or_all(tmp_path: Path) -> None:
    items = ["", "a", "é▁", "", "x" * 300, "y" * 70_000, "zz", ""]
    model = make.opened(tmp_path, make.container([make.strings("s", items)]))
    found = model.require("s", "strings")
    assert isinstance(found, StringArray)
    assert found.decode_all() == items == list(found)
    assert [found[i] for i in range(len(items))] == items
    assert (found[-2], found[1:3], len(found)) == ("zz", items[1:3], 8)
    assert found.raw(2) == "é▁".encode()
    with pytest.raises(IndexError):
        found.raw(8)


@pytest.mark.parametrize("items", [[b"a\0", b"b"], [b"", b"\0" * 8, b""], [b"\xff", b"\xe2\x96", b"\x96ok"], []])
def test_string_array_with_zeros_or_invalid_utf8(tmp_path: Path, items: list[bytes]) -> None:
    found = make.opened(tmp_path, make.container([make.strings("s", items)])).require("s", "strings")
    assert found.decode_all() == [item.decode("utf-8", "replace") for item in items]
    assert [found.raw(i) for i in range(len(items))] == items


def test_string_arrays_longer_than_one_stretch(tmp_path: Path) -> None:
    items = [f"token {i}" if i % 3000 else "long " * 60 for i in range(10_000)]
    model = make.opened(tmp_path, make.container([make.strings("s", items), make.u32("after", 7)]))
    assert model.require("s", "strings").decode_all() == items
    assert model.metadata["after"] == 7


def test_header_longer_than_the_first_read(tmp_path: Path) -> None:
    pairs = [make.text(f"k{i}", b"v" * 2**20) for i in range(17)]
    model = make.opened(tmp_path, make.container(pairs, [make.tensor("t", [1], 0, 0)], b"abcd"))
    assert len(model.require("k16", str)) == 2**20
    assert bytes(model.read("t")) == b"abcd"


@pytest.mark.parametrize("alignment", [8, 32, 64, 65536])
def test_alignment_is_obeyed(tmp_path: Path, alignment: int) -> None:
    tensors = [make.tensor("a", [1], 0, 0), make.tensor("b", [1], 0, alignment)]
    data = b"1111".ljust(alignment, b"\0") + b"2222"
    content = make.container([make.u32("general.alignment", alignment)], tensors, data, alignment)
    with make.opened(tmp_path, content) as model:
        assert model.alignment == alignment
        assert bytes(model.read("b")) == b"2222"


@pytest.mark.parametrize(
    ("number", "name"), [(15, "Q4_K_M"), (14, "Q4_K_S"), (2, "Q4_0"), (38, "MXFP4"), (1039, "Q4_K_M")]
)
def test_quant_kind_is_the_file_type(tmp_path: Path, number: int, name: str) -> None:
    content = make.container([make.u32("general.file_type", number)], [make.tensor("a", [1], 0, 0)], bytes(4))
    assert make.opened(tmp_path, content).quant_kind == name


@pytest.mark.parametrize("pairs", [[], [make.u32("general.file_type", 999)]])
def test_quant_kind_falls_back_to_most_bytes(tmp_path: Path, pairs: list[bytes]) -> None:
    tensors = [make.tensor("a", [4], 0, 0), make.tensor("b", [4], 0, 32), make.tensor("c", [32, 2], 39, 64)]
    content = make.container(pairs, tensors, bytes(64 + 34))
    assert make.opened(tmp_path, content).quant_kind == "MXFP4"


def test_types_agree_with_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    never_stored = {"Q8_1", "Q8_K"}
    theirs = {t.name: (int(t), *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType if t.name not in never_stored}
    ours = {t.name: (int(t), t.block_elems, t.block_bytes) for t in GgmlType}
    assert {name: ours.get(name) for name in theirs} == theirs
    for number, name in FILE_TYPES.items():
        assert LlamaFileType(number).name.removeprefix("ALL_").removeprefix("MOSTLY_").removesuffix("_MOE") == name
    assert GgmlType.Q4_K.row_bytes(512) == 288


def test_reading_after_the_file_shrank_is_an_error(tmp_path: Path) -> None:
    content = make.small_model()
    for end in range(0, len(content), 53):
        with make.opened(tmp_path, content) as model:
            os.truncate(model.path, end)
            for name in model.tensors:
                with pytest.raises(ModelLoadFailed, match=f"tensor '{name}' at byte \\d+: the file"):
                    model.read(name)


def test_reading_after_the_file_was_overwritten_is_an_error(tmp_path: Path) -> None:
    with make.opened(tmp_path, make.small_model()) as model:
        os.utime(model.path, ns=(1, 1))
        with pytest.raises(GgufError, match="changed since it was opened"):
            model.read("norm.weight")


def test_a_file_put_in_its_place_or_unlinked_changes_nothing(tmp_path: Path) -> None:
    with make.opened(tmp_path, make.small_model()) as model:
        (tmp_path / "other").write_bytes(bytes(5))
        (tmp_path / "other").replace(model.path)
        assert bytes(model.read("token_embd.weight")) == bytes(range(36))


def test_close_ends_reads_but_keeps_metadata(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    model = make.opened(tmp_path, make.small_model())
    model.close()
    model.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert model.require("tokenizer.ggml.tokens", "strings")[3] == "▁c"
    with pytest.raises(GgufError, match="cannot be read"):
        model.read("norm.weight")


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(GgufError):
        make.opened(tmp_path, make.small_model()[:-1])
    assert len(os.listdir("/proc/self/fd")) == before


def test_float64_and_unsigned_extremes(tmp_path: Path) -> None:
    pairs = [make.pair("u", make.U64, struct.pack("<Q", 2**64 - 1)), make.pair("i", make.I8, b"\x80")]
    model = make.opened(tmp_path, make.container(pairs))
    assert (model.metadata["u"], model.metadata["i"]) == (2**64 - 1, -128)
    assert GgufFile.open(os.fspath(model.path)).metadata == model.metadata
