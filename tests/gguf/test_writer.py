"""What `write_gguf` writes is read back the same by our reader and by the reference reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tokenizer.vocabularies import unpack
from worker_orcd.gguf.reader import GgufFile, StringArray
from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf

gguf = pytest.importorskip("gguf", reason="the oracle")

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "u32": 2**32 - 1,
    "u64": 2**32,
    "i32": -1,
    "i64": -(2**31) - 1,
    "f32": 0.1,
    "yes": True,
    "no": False,
    "text": "é▁\n",
    "strings": ["a", "", "é" * 200],
    "ints": [1, -2],
    "floats": [0.5, 2.0],
    "bools": [True, False],
    "numpy": np.array([1, 2, 3], np.uint8),
    "scalar": np.int16(-7),
    "double": np.float64(0.1),
}


def tensors() -> list[tuple[str, tuple[int, ...], GgmlType, Any]]:
    rng = np.random.default_rng(0)
    blocks = {kind: rng.integers(0, 60, 6 * kind.block_bytes, np.uint8) for kind in (GgmlType.Q4_K, GgmlType.MXFP4)}
    return [
        ("a.weight", (3,), GgmlType.F32, np.arange(3, dtype=np.float32)),
        ("b.weight", (2, 768), GgmlType.Q4_K, blocks[GgmlType.Q4_K].tobytes()),
        ("c.weight", (3, 2, 32), GgmlType.MXFP4, memoryview(blocks[GgmlType.MXFP4])),
    ]


@pytest.mark.parametrize("alignment", [32, 256])
def test_both_readers_agree(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, tensors(), alignment)
    assert os.listdir(tmp_path) == ["m.gguf"]
    agree(path)
    with GgufFile.open(path) as model:
        assert model.alignment == alignment
        assert (model.metadata["i64"], model.metadata["yes"], model.metadata["text"]) == (-(2**31) - 1, True, "é▁\n")
        for name, shape, kind, data in tensors():
            info = model.tensors[name]
            assert (info.shape, info.type, info.offset % alignment) == (shape, kind, 0)
            assert bytes(model.read(name)) == bytes(data if not isinstance(data, np.ndarray) else data.tobytes())


def test_a_file_of_the_reference_writer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b▁", "c"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    writer.add_token_types([1, 1, 3])
    writer.add_bos_token_id(2)
    writer.add_file_type(15)
    writer.add_array("nums", [1, 2, 3])
    for i, dtype in enumerate([np.float32, np.float16, np.int32, np.float64]):
        writer.add_tensor(f"t{i}", np.arange(5 * (i + 1), dtype=dtype).reshape(5, i + 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    agree(path)


@pytest.mark.parametrize("name", ["phi-3", "gpt-2"])
def test_published_vocabularies(tmp_path: Path, name: str) -> None:
    agree(unpack(name, tmp_path))


def agree(path: Path) -> None:
    """Compare every metadata value and every tensor with what the reference reader finds."""
    theirs = gguf.GGUFReader(path)
    with GgufFile.open(path) as ours:
        expected = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert list(ours.metadata) == list(expected)
        for key, field in expected.items():
            same_value(ours.metadata[key], field)
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert (info.type, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
            assert list(reversed(info.shape)) == tensor.shape.tolist()
            assert ours.read(tensor.name).tobytes() == tensor.data.tobytes()


def same_value(ours: object, field: Any) -> None:
    if isinstance(ours, StringArray):
        raw = [field.parts[i].tobytes() for i in field.data]
        assert ours.decode_all() == [item.decode("utf-8", "replace") for item in raw]
    elif isinstance(ours, np.ndarray):
        assert np.array_equal(ours, np.concatenate([field.parts[i] for i in field.data]))
    else:
        theirs = field.contents()
        assert type(ours) is type(theirs)
        assert ours == theirs


@pytest.mark.parametrize("value", [[], [[1]], {"a": 1}, None, 2**64, ["a", 1], 1j])
def test_values_that_cannot_be_stored(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="'key'"):
        write_gguf(tmp_path / "m.gguf", {"key": value})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("shape", "data", "problem"),
    [
        ((3,), bytes(11), "11 bytes, F32 of shape .* has 12"),
        ((), bytes(4), "not whole"),
        ((2, 2), bytes(4), "has 16"),
    ],
)
def test_tensor_data_must_fit_its_shape(tmp_path: Path, shape: tuple[int, ...], data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        write_gguf(tmp_path / "m.gguf", {}, [("t", shape, GgmlType.F32, data)])
    with pytest.raises(ValueError, match="not whole Q4_0 blocks"):
        write_gguf(tmp_path / "m.gguf", {}, [("t", (31,), GgmlType.Q4_0, bytes(18))])


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_gguf(path, METADATA, tensors())
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert path.read_bytes() == b"old"
