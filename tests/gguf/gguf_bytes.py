"""GGUF files put together by hand, right or wrong in any field."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from worker_orcd.gguf.reader import GgufFile

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", value_type) + payload


def u32(key: str | bytes, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def text(key: str | bytes, value: str | bytes) -> bytes:
    return pair(key, STRING, string(value))


def array(key: str | bytes, item_type: int, items: bytes, count: int) -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", item_type, count) + items)


def strings(key: str, items: Sequence[str | bytes]) -> bytes:
    return array(key, STRING, b"".join(map(string, items)), len(items))


def tensor(name: str | bytes, ne: Sequence[int], type_id: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, type_id, offset)


def header(num_tensors: int, num_pairs: int, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_pairs)


def container(
    pairs: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", align: int = 32
) -> bytes:
    table = header(len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return table + (bytes(-len(table) % align) + data if tensors else b"")


def small_model() -> bytes:
    """About 1 KiB: every value type, a vocabulary, three tensors."""
    pairs = [
        text("general.architecture", "llama"),
        u32("general.alignment", 32),
        u32("llama.block_count", 2),
        pair("f", F32, struct.pack("<f", 1e-5)),
        pair("b", BOOL, b"\1"),
        pair("i", I64, struct.pack("<q", -5)),
        pair("d", F64, struct.pack("<d", 0.5)),
        array("h", U16, struct.pack("<3H", 1, 2, 3), 3),
        array("g", BOOL, b"\1\0", 2),
        strings("tokenizer.ggml.tokens", ["a", "b", "", "▁c"]),
        array("tokenizer.ggml.scores", F32, struct.pack("<4f", 0, -1, -2, -3), 4),
        array("tokenizer.ggml.token_type", I32, struct.pack("<4i", 1, 1, 1, 3), 4),
        u32("tokenizer.ggml.bos_token_id", 3),
    ]
    tensors = [
        tensor("norm.weight", [4], 0, 0),
        tensor("token_embd.weight", [32, 2], 2, 32),
        tensor("output.weight", [3, 2, 2], 1, 96),
    ]
    data = struct.pack("<4f", 1, 2, 3, 4) + bytes(16) + bytes(range(36)) + bytes(28) + bytes(24)
    return container(pairs, tensors, data)


def opened(directory: Path, content: bytes) -> GgufFile:
    path = directory / "model.gguf"
    path.write_bytes(content)
    return GgufFile.open(path)
