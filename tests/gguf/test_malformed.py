"""Every way to be malformed gives one error that names the field and its byte offset."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf_bytes as make
import pytest
from gguf_bytes import container, header, pair, string, strings, tensor, u32

from worker_orcd.gguf.reader import GgufError, GgufFile

BIG = 2**63
A_TENSOR = tensor("t", [32], 0, 0)


def one_pair(raw: bytes) -> bytes:
    return header(0, 1) + raw + bytes(16)


def one_tensor(raw: bytes, data: bytes = bytes(128)) -> bytes:
    return container([], [raw], data)


def raw_array(item_type: int, count: int, items: bytes = b"") -> bytes:
    return one_pair(make.array("key", item_type, items, count))


def raw_alignment(value: int) -> bytes:
    return container([u32("general.alignment", value)])


def vocabulary(*more: bytes) -> bytes:
    return container([strings("tokenizer.ggml.tokens", ["a", "b"]), *more])


# name: (file, field, byte offset, problem); the first pair is at byte 24, its value type (key "key") at 35
CASES: dict[str, tuple[bytes, str, int, str]] = {
    "empty": (b"", "magic", 0, "needs at least 4 bytes, 0 remain"),
    "magic cut": (b"GGU", "magic", 0, "3 remain"),
    "magic": (header(0, 0, magic=b"GGML"), "magic", 0, "b'GGML'"),
    "magic reversed": (header(0, 0, magic=b"FUGG"), "magic", 0, "b'FUGG'"),
    "version cut": (b"GGUF\3\0", "version", 4, "2 remain"),
    "version 0": (header(0, 0, version=0), "version", 4, "0, only version 3"),
    "version 1": (header(0, 0, version=1), "version", 4, "1, only version 3"),
    "version 2": (header(0, 0, version=2), "version", 4, "2, only version 3"),
    "version 4": (header(0, 0, version=4), "version", 4, "4, only version 3"),
    "big-endian": (header(0, 0, version=3 << 24), "version", 4, "big-endian"),
    "counts cut": (header(0, 0)[:20], "metadata_kv_count", 16, "4 remain"),
    "tensor count": (header(20_000, 1) + bytes(17), "tensor_count", 8, "20000 entries need at least 660000"),
    "tensor count 2^64-1": (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0), "tensor_count", 8, "entries need"),
    "tensor limit": (header(10_000, 0) + bytes(330_000), "tensor_count", 8, "the limit is 9999"),
    "pair count": (header(0, 10**6) + bytes(25), "metadata_kv_count", 16, "1000000 entries need at least 14000000"),
    "pair limit": (header(0, 65_537) + bytes(65_537 * 14), "metadata_kv_count", 16, "the limit is 65536"),
    "key length": (header(0, 1) + struct.pack("<Q", BIG) + bytes(20), "key 0", 24, "the limit is 65536"),
    "key past end": (header(0, 1) + struct.pack("<Q", 99) + bytes(20), "key 0", 32, "at least 99 bytes, 20 remain"),
    "key too long": (one_pair(u32("k" * 65_537, 1)), "key 0", 24, "65537 bytes"),
    "key empty": (one_pair(u32("", 1)), "key 0", 24, "empty key"),
    "key not UTF-8": (one_pair(u32(b"a\xff", 1)), "key 0", 33, "not valid UTF-8"),
    "key surrogate": (one_pair(u32(b"\xed\xa0\x80", 1)), "key 0", 32, "not valid UTF-8"),
    "key twice": (container([u32("key", 1), u32("key", 1)]), "key 1", 43, "'key' occurs twice"),
    "value type 13": (one_pair(pair("key", 13, bytes(8))), "'key'", 35, "value type 13 does not exist"),
    "value type -1": (one_pair(pair("key", 2**32 - 1, bytes(8))), "'key'", 35, "does not exist"),
    "value cut": (header(0, 1) + pair("key", make.U64, bytes(7)), "'key'", 39, "needs at least 8 bytes, 7 remain"),
    "bool 2": (one_pair(pair("key", make.BOOL, b"\2")), "'key'", 39, "must be 0 or 1"),
    "bools 2": (raw_array(make.BOOL, 3, b"\1\0\xff"), "'key'", 53, "a bool of value 255"),
    "string length": (one_pair(pair("key", make.STRING, struct.pack("<Q", BIG))), "'key'", 39, "limit is 1048576"),
    "string past end": (one_pair(pair("key", make.STRING, struct.pack("<Q", 17))), "'key'", 47, "16 remain"),
    "string too long": (one_pair(make.text("key", b"v" * (2**20 + 1))), "'key'", 39, "1048577 bytes"),
    "template too long": (
        one_pair(make.text("tokenizer.chat_template", b"v" * (2**18 + 1))),
        "'tokenizer.chat_template'", 59, "limit is 262144",
    ),
    "string not UTF-8": (one_pair(make.text("key", b"ab\xc3")), "'key'", 49, "not valid UTF-8"),
    "array of arrays": (raw_array(make.ARRAY, 1, bytes(12)), "'key'", 39, "arrays of arrays"),
    "array type": (raw_array(77, 1, bytes(12)), "'key'", 39, "value type 77"),
    "array count": (raw_array(make.U32, 2**62), "'key'", 43, "entries need at least 18446744073709551616 bytes, 16"),
    "array of bytes": (raw_array(make.U8, 17), "'key'", 43, "17 entries need at least 17 bytes, 16 remain"),
    "array limit": (raw_array(make.U8, 2**22 + 1, bytes(2**22 + 1)), "'key'", 43, "the limit is 4194304"),
    "strings count": (raw_array(make.STRING, 3), "'key'", 43, "3 entries need at least 24 bytes, 16 remain"),
    "strings length": (raw_array(make.STRING, 2, string("ab") + struct.pack("<Q", BIG)), "'key'", 61, "limit"),
    "strings wrap": (raw_array(make.STRING, 2, struct.pack("<Q", 2**64 - 8)), "'key'", 51, "limit"),
    "strings past end": (raw_array(make.STRING, 2, string("ab") + struct.pack("<Q", 20)), "'key'", 69, "16 remain"),
    "strings far past end": (raw_array(make.STRING, 2, struct.pack("<Q", 400)), "'key'", 59, "16 remain"),
    "strings one too long": (raw_array(make.STRING, 1, string(b"v" * (2**20 + 1))), "'key'", 51, "1048577 bytes"),
    "alignment 0": (raw_alignment(0), "general.alignment", 49, "0 is not a power of two"),
    "alignment 4": (raw_alignment(4), "general.alignment", 49, "from 8 to 65536"),
    "alignment 13": (raw_alignment(13), "general.alignment", 49, "13 is not"),
    "alignment 2^17": (raw_alignment(2**17), "general.alignment", 49, "131072 is not"),
    "alignment max": (raw_alignment(2**32 - 1), "general.alignment", 49, "4294967295 is not"),
    "alignment u64": (container([pair("general.alignment", make.U64, bytes(8))]), "general.alignment", 49, "type 10"),
    "alignment text": (container([make.text("general.alignment", "32")]), "general.alignment", 49, "type 8"),
    "name empty": (one_tensor(tensor("", [32], 0, 0)), "tensor 0 name", 24, "empty name"),
    "name too long": (one_tensor(tensor("n" * 65, [32], 0, 0)), "tensor 0 name", 24, "the limit is 64"),
    "name not UTF-8": (one_tensor(tensor(b"\x80", [32], 0, 0)), "tensor 0 name", 32, "not valid UTF-8"),
    "name twice": (
        container([], [A_TENSOR, tensor("t", [32], 0, 128)], bytes(256)), "tensor 1 name", 57, "'t' occurs twice",
    ),
    "dims 0": (one_tensor(string("t") + struct.pack("<IIQ", 0, 0, 0) + bytes(8)), "tensor 't' n_dims", 33, "0 dim"),
    "dims 5": (one_tensor(tensor("t", [1] * 5, 0, 0)), "tensor 't' n_dims", 33, "5 dimensions"),
    "dims max": (
        one_tensor(string("t") + b"\xff" * 4 + bytes(20)), "tensor 't' n_dims", 33, "4294967295 dimensions",
    ),
    "dim 0": (one_tensor(tensor("t", [32, 0], 0, 0)), "tensor 't' shape", 45, "a dimension of 0"),
    "row length": (one_tensor(tensor("t", [31], 2, 0)), "tensor 't' shape", 37, "31 elements are not whole Q4_0"),
    "row length K": (one_tensor(tensor("t", [32], 12, 0)), "tensor 't' shape", 37, "blocks of 256"),
    "size wraps 2^64": (one_tensor(tensor("t", [2**32, 2**32], 0, 0)), "tensor 't' shape", 37, "more than any"),
    "size wraps in 4": (one_tensor(tensor("t", [2**16] * 4, 24, 0)), "tensor 't' shape", 37, "more than any"),
    "elements 2^63": (one_tensor(tensor("t", [2**63], 2, 0)), "tensor 't' shape", 37, "more than any"),
    "type retired": (one_tensor(tensor("t", [32], 4, 0)), "tensor 't' type", 45, "type 4 is unknown or retired"),
    "type unknown": (one_tensor(tensor("t", [32], 2**32 - 1, 0)), "tensor 't' type", 45, "type 4294967295"),
    "offset off": (one_tensor(tensor("t", [32], 0, 32)), "tensor 't' offset", 49, "32, but .* end at 0"),
    "offset overlap": (
        container([], [A_TENSOR, tensor("u", [32], 0, 0)], bytes(256)), "tensor 'u' offset", 82, "0, but .* 128",
    ),
    "offset gap": (
        container([], [A_TENSOR, tensor("u", [32], 0, 160)], bytes(999)), "tensor 'u' offset", 82, "160, but .* 128",
    ),
    "offset unpadded": (
        container([], [tensor("t", [9], 0, 0), tensor("u", [9], 0, 36)], bytes(256)), "'u' offset", 82, "end at 64",
    ),
    "offset max": (one_tensor(tensor("t", [32], 0, 2**64 - 1)), "tensor 't' offset", 49, "18446744073709551615, but"),
    "data missing": (one_tensor(A_TENSOR, b""), "tensor 't' offset", 49, "128 bytes from byte 64 end past"),
    "data one short": (one_tensor(A_TENSOR, bytes(127)), "tensor 't' offset", 49, "past the file's 191 bytes"),
    "table cut": (header(1, 0) + A_TENSOR[:-1], "tensor 't' offset", 49, "8 bytes, 7 remain"),
    "table short": (header(1, 0) + tensor("t", [1, 1], 0, 0)[:-8], "tensor 't' offset", 57, "8 bytes, 0 remain"),
    "token types": (
        vocabulary(make.array("tokenizer.ggml.token_type", make.I32, bytes(12), 3)),
        "'tokenizer.ggml.token_type'", 120, "3 entries for 2 tokens",
    ),
    "token types kind": (
        vocabulary(make.array("tokenizer.ggml.token_type", make.F32, bytes(8), 2)),
        "'tokenizer.ggml.token_type'", 120, "an array of integers",
    ),
    "scores": (
        vocabulary(make.array("tokenizer.ggml.scores", make.F32, bytes(4), 1)),
        "'tokenizer.ggml.scores'", 116, "1 entries for 2 tokens",
    ),
    "tokens kind": (container([u32("tokenizer.ggml.tokens", 1)]), "'tokenizer.ggml.tokens'", 53, "array of strings"),
    "token id": (vocabulary(u32("tokenizer.ggml.eos_token_id", 2)), "eos_token_id'", 122, "largest allowed is 1"),
    "token id -1": (
        vocabulary(pair("tokenizer.ggml.eos_token_id", make.I32, b"\xff" * 4)), "eos_token_id'", 122, "smallest",
    ),
    "token id text": (
        vocabulary(make.text("tokenizer.ggml.eos_token_id", "1")), "eos_token_id'", 122, "an integer is required",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_malformed(tmp_path: Path, name: str) -> None:
    content, field, offset, problem = CASES[name]
    with pytest.raises(GgufError, match=problem) as caught:
        make.opened(tmp_path, content)
    assert field in caught.value.details["field"]
    assert f"at byte {offset}: " in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "model.gguf"))


def test_the_example_in_full(tmp_path: Path) -> None:
    with pytest.raises(GgufError) as caught:
        make.opened(tmp_path, header(20_000, 1) + bytes(17))
    expected = "tensor_count at byte 8: 20000 entries need at least 660000 bytes, 25 remain"
    assert str(caught.value) == f"{tmp_path / 'model.gguf'}: {expected}"


def test_names_from_the_file_are_escaped_and_cut(tmp_path: Path) -> None:
    key = "\x1b[31m\n\u202e" + "k" * 500
    with pytest.raises(GgufError) as caught:
        make.opened(tmp_path, one_pair(pair(key, 99, bytes(8))))
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert len(caught.value.details["field"]) == 64


def test_header_beyond_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:  # sparse: five arrays of 32 MiB of zeros
        file.write(header(0, 5))
        for i in range(5):
            file.write(make.array(f"key{i}", make.U64, b"", 2**22))
            file.seek(2**25, 1)
        file.truncate()
    with pytest.raises(GgufError, match=r"'key3' at byte \d+: 4194304 entries .* remain of the 134217728 a header"):
        GgufFile.open(path)
