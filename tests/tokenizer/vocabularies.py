"""Vocabularies to test with: files of tests/data/tokenizers, and small ones made up in a test."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker_orcd.gguf.access import TypedAccess
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.writer import write_gguf

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
PUBLISHED = ("qwen2", "phi-3", "gpt-2", "llama-bpe", "llama-spm", "gpt-oss")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def unpack(name: str, folder: Path) -> Path:
    """The vocabulary file of a published model, unpacked into `folder`."""
    path = folder / f"ggml-vocab-{name}.gguf"
    path.write_bytes(lzma.decompress((DATA / f"{path.name}.xz").read_bytes()))
    return path


def golden(name: str) -> list[tuple[str, list[int]]]:
    """Texts and ids of a published model's golden file."""
    texts = (DATA / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (DATA / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


def written(folder: Path, metadata: Mapping[str, Any]) -> TypedAccess:
    """A GGUF file with this metadata, written to `folder` and opened."""
    path = folder / "model.gguf"
    write_gguf(path, metadata)
    with GgufFile.open(path) as gguf:
        return gguf


def bpe_metadata(extra: Mapping[str, int], pre: str = "qwen2", **others: Any) -> dict[str, Any]:
    """A tiny BPE vocabulary: the letters of bytes 33 to 126 and the space, two merges, and `extra` (text → type)."""
    tokens = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ", "he", "hel", *extra]
    keys = {f"tokenizer.ggml.{key}": value for key, value in others.items()}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - len(extra)) + list(extra.values()),
        "tokenizer.ggml.merges": ["h e", "he l"],
    } | keys


def spm_metadata(pieces: Mapping[str, float], extra: Mapping[str, int], **others: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk> <s> </s>, 256 byte tokens, `pieces` (text → score), `extra` (text → type)."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *extra]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), *extra.values()]
    keys = {f"tokenizer.ggml.{key}": value for key, value in others.items()}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in pieces.values()] + [-1000.0] * len(extra),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | keys
