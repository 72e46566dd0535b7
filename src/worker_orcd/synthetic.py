"""Models with random weights in the true shapes and tensor types of published ones.

The weights mean nothing; sizes, shapes, types and metadata are those of the published files, so speed and memory can
be measured without a download. Values have mean 0 and deviation 1/sqrt(inputs), so activations stay in range through
any depth. The same name, type and seed give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf.types import FILE_TYPES, GgmlType
from worker_orcd.gguf.writer import Tensor, write_gguf, write_sparse
from worker_orcd.tokenizer.spelling import BYTE_OF_LETTER

G = GgmlType
POOL_BLOCKS = 2**15  # random blocks drawn for a tensor; a longer one repeats them, turned by a prime each time
PIECE_ELEMS = 2**20  # of a float tensor, made at once
FALLBACK = {G.Q4_K: G.Q5_0, G.Q5_K: G.Q5_1, G.Q6_K: G.Q8_0}  # for rows that are no multiple of 256, as llama.cpp
FLOATS = {"F32": G.F32, "F16": G.F16, "BF16": G.BF16}
QUANTS = (*FLOATS, "Q4_0", "Q8_0", "Q4_K_M", "Q6_K", "MXFP4")
FILE_TYPE_IDS = {name: number for number, name in FILE_TYPES.items()}

Role = str  # embd, output, matrix, attn_v, ffn_down, qkv, experts; and norm, bias, f32, which stay float32
Part = tuple[str, tuple[int, ...], Role, int]  # tensor, shape outermost first, role, layer


@dataclass(frozen=True)
class Shape:
    """Dimensions of a published model; `extra` holds further metadata of its architecture."""

    arch: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float = 10000.0
    eps: float = 1e-5
    tied: bool = False
    experts: int = 0
    experts_used: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


WINDOW, ROPE = "attention.sliding_window", "rope.scaling."
MODELS = {
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6, 1e-6, tied=True),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e6, 1e-6),
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 40960, 1e6, 1e-6, tied=True),
    "qwen3-8b": Shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960, 1e6, 1e-6),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5, tied=True),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5),
    "mistral-7b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 32768, 32768, 1e6),
    "phi-3-mini": Shape("phi3", 32, 3072, 8192, 32, 32, 96, 32064, 4096, extra={WINDOW: 2047}),
    "gpt-oss-20b": Shape("gpt-oss", 24, 2880, 2880, 64, 8, 64, 201088, 131072, 150000.0, experts=32, experts_used=4,
        extra={WINDOW: 128, ROPE + "type": "yarn", ROPE + "factor": 32.0, ROPE + "original_context_length": 4096}),
    "gpt2": Shape("gpt2", 12, 768, 3072, 12, 12, 64, 50257, 1024, tied=True),
    "gpt2-xl": Shape("gpt2", 48, 1600, 6400, 25, 25, 64, 50257, 1024, tied=True),
}  # fmt: skip


def parse_name(text: str) -> tuple[str, str]:
    """Model and type out of NAME:QUANT, as in llama-3.1-8b:Q4_K_M. Raises InvalidRequest listing what there is."""
    name, _, quant = text.partition(":")
    if name.lower() not in MODELS or quant.upper() not in QUANTS:
        raise InvalidRequest(
            f"synthetic model {text!r} is not known; NAME:QUANT is needed, with NAME one of {', '.join(MODELS)} "
            f"and QUANT one of {', '.join(QUANTS)}"
        )
    return name.lower(), quant.upper()


def write_synthetic(
    path: Path,
    name: str,
    quant: str,
    *,
    layers: int | None = None,
    seed: int = 0,
    on_bytes: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write the model to `path`, with `layers` instead of its own number; tensors are made as they are written.

    `on_bytes` is told how many bytes of the tensors are written, and of how many.
    """
    shape = MODELS[name] if layers is None else replace(MODELS[name], layers=layers)
    parts = [(part, _type(shape, quant, part)) for part in _parts(shape)]
    total = sum(prod(part[1][:-1]) * kind.row_bytes(part[1][-1]) for part, kind in parts)
    done = 0

    def pieces(number: int, part: Part, kind: GgmlType) -> Iterator[bytes]:
        nonlocal done
        for piece in _pieces(np.random.default_rng([seed, number]), part, kind):
            yield piece
            done += len(piece)
            on_bytes(done, total)

    def stored(number: int, part: Part, kind: GgmlType) -> Tensor:
        return part[0], part[1], kind, lambda: pieces(number, part, kind)

    write_gguf(path, _metadata(name, shape, quant), [stored(i, *entry) for i, entry in enumerate(parts)])


def write_header(path: Path, name: str, quant: str) -> int:
    """Write a file that has the model's header and size and, being sparse, nothing else: enough to plan with.

    Returns the model's context length. Names of tokens are left out.
    """
    shape = MODELS[name]
    metadata = {
        key: value for key, value in _metadata(name, shape, quant).items() if not key.startswith("tokenizer.")
    }
    tensors = [(part[0], part[1], _type(shape, quant, part)) for part in _parts(shape)]
    write_sparse(path, metadata, tensors)
    return shape.context


def _parts(s: Shape) -> Iterator[Part]:
    """Every tensor of the model."""
    yield "token_embd.weight", (s.vocab, s.hidden), "embd", 0
    yield "output_norm.weight", (s.hidden,), "norm", 0
    if s.arch == "gpt2":
        yield "position_embd.weight", (s.context, s.hidden), "f32", 0
        yield "output_norm.bias", (s.hidden,), "bias", 0
    if not s.tied:
        yield "output.weight", (s.vocab, s.hidden), "output", 0
    rows = [row[:3] for row in _layer(s) if s.arch in row[3].split()]
    for layer in range(s.layers):
        for name, shape, role in rows:
            yield f"blk.{layer}.{name}", shape, role, layer


def _layer(s: Shape) -> list[tuple[str, tuple[int, ...], Role, str]]:
    """Tensors of a layer, with the architectures that have them."""
    h, f, q, kv, e = s.hidden, s.ffn, s.heads * s.head_dim, s.kv_heads * s.head_dim, s.experts
    gated, split, dense = "llama qwen2 qwen3", "llama qwen2 qwen3 gpt-oss", "llama qwen2 qwen3 phi3 gpt2"
    biased, every = "qwen2 gpt-oss", f"{dense} gpt-oss"
    return [
        ("attn_norm.weight", (h,), "norm", every), ("attn_norm.bias", (h,), "bias", "gpt2"),
        ("attn_qkv.weight", (q + 2 * kv, h), "qkv", "phi3 gpt2"), ("attn_qkv.bias", (q + 2 * kv,), "bias", "gpt2"),
        ("attn_q.weight", (q, h), "matrix", split), ("attn_q.bias", (q,), "bias", biased),
        ("attn_k.weight", (kv, h), "matrix", split), ("attn_k.bias", (kv,), "bias", biased),
        ("attn_v.weight", (kv, h), "attn_v", split), ("attn_v.bias", (kv,), "bias", biased),
        ("attn_q_norm.weight", (s.head_dim,), "norm", "qwen3"),
        ("attn_k_norm.weight", (s.head_dim,), "norm", "qwen3"),
        ("attn_output.weight", (h, q), "matrix", every), ("attn_output.bias", (h,), "bias", "gpt2 gpt-oss"),
        ("attn_sinks.weight", (s.heads,), "bias", "gpt-oss"),
        ("ffn_norm.weight", (h,), "norm", dense), ("ffn_norm.bias", (h,), "bias", "gpt2"),
        ("ffn_gate.weight", (f, h), "matrix", gated),
        ("ffn_up.weight", (2 * f if s.arch == "phi3" else f, h), "matrix", dense),
        ("ffn_up.bias", (f,), "bias", "gpt2"),
        ("ffn_down.weight", (h, f), "ffn_down", dense), ("ffn_down.bias", (h,), "bias", "gpt2"),
        ("post_attention_norm.weight", (h,), "norm", "gpt-oss"),
        ("ffn_gate_inp.weight", (e, h), "f32", "gpt-oss"), ("ffn_gate_inp.bias", (e,), "bias", "gpt-oss"),
        ("ffn_gate_exps.weight", (e, f, h), "experts", "gpt-oss"), ("ffn_gate_exps.bias", (e, f), "bias", "gpt-oss"),
        ("ffn_up_exps.weight", (e, f, h), "experts", "gpt-oss"), ("ffn_up_exps.bias", (e, f), "bias", "gpt-oss"),
        ("ffn_down_exps.weight", (e, h, f), "experts", "gpt-oss"), ("ffn_down_exps.bias", (e, h), "bias", "gpt-oss"),
    ]  # fmt: skip


def _type(s: Shape, quant: str, part: Part) -> GgmlType:
    """The type llama.cpp's quantizer gives this tensor in a file of this kind."""
    _, shape, role, layer = part
    if role in ("norm", "bias", "f32"):
        return G.F32
    is_head = role == "output" or (role == "embd" and s.tied)
    if quant in FLOATS:
        kind = FLOATS[quant]
    elif quant == "MXFP4":
        kind = G.MXFP4 if role == "experts" else G.Q8_0
    elif quant == "Q4_K_M":
        eighth = s.layers // 8
        is_finer = layer < eighth or layer >= 7 * s.layers // 8 or (layer - eighth) % 3 == 2
        kind = G.Q6_K if is_head or (is_finer and role in ("attn_v", "ffn_down")) else G.Q4_K
        kind = G.Q5_K if role == "qkv" else kind
    else:
        kind = G.Q6_K if is_head and quant == "Q4_0" else GgmlType[quant]
    return FALLBACK.get(kind, kind) if shape[-1] % 256 else kind


def _pieces(rng: Generator, part: Part, kind: GgmlType) -> Iterator[bytes]:
    """The tensor's bytes."""
    _, shape, role, _ = part
    deviation = {"embd": 0.5, "norm": 0.1, "bias": 0.1}.get(role, shape[-1] ** -0.5)
    if kind in FLOATS.values():
        for start in range(0, prod(shape), PIECE_ELEMS):
            count = min(PIECE_ELEMS, prod(shape) - start)
            yield _stored_floats(rng.normal(float(role == "norm"), deviation, count).astype(np.float32), kind)
        return
    left = prod(shape) // kind.block_elems
    pool = _random_blocks(rng, kind, min(left, POOL_BLOCKS), deviation)
    for turn in range(-(-left // len(pool))):
        yield np.roll(pool, 977 * turn, axis=0)[: left - turn * len(pool)].tobytes()


def _stored_floats(values: NDArray[np.float32], kind: GgmlType) -> bytes:
    if kind == G.BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if kind == G.F16 else np.float32).tobytes()


def _random_blocks(rng: Generator, kind: GgmlType, n: int, deviation: float) -> NDArray[np.uint8]:
    """u8 [n, block bytes]; layouts as in `quant`. Uniform quants, scales within 30 % of what gives `deviation`."""
    scale = deviation * rng.uniform(0.7, 1.3, n)
    quants = rng.integers(0, 256, (n, kind.block_bytes), dtype=np.uint8)  # what is no quant is written over
    match kind:
        case G.Q4_0 | G.Q5_0 | G.Q8_0:  # of uniform integers of 4, 5 and 8 bits the deviation is
            scale *= rng.choice((-1.0, 1.0), n)  # their mean is -1/2: with one sign it would add up over a row
            quants[:, :2] = _halves(scale / {G.Q4_0: 4.61, G.Q5_0: 9.23, G.Q8_0: 73.9}[kind])
        case G.Q5_1:
            quants[:, :2] = _halves(scale / 9.23)
            quants[:, 2:4] = _halves(-15.5 * scale / 9.23)
        case G.Q4_K | G.Q5_K:
            step, middle = (4.61, 7.5) if kind == G.Q4_K else (9.23, 15.5)
            quants[:, :2] = _halves(scale / (step * 40))
            quants[:, 2:4] = _halves(scale / (step * 40) * middle)
            groups = rng.integers(20, 60, (n, 8), dtype=np.uint8)
            quants[:, 4:16] = _packed(groups)
        case G.Q6_K:
            scale *= rng.choice((-1.0, 1.0), n)
            quants[:, 192:208] = rng.integers(20, 60, (n, 16), dtype=np.uint8)
            quants[:, 208:] = _halves(scale / (18.5 * 40))
        case G.MXFP4:  # its sixteen values have deviation 2.93, with these scales 3.87
            quants[:, 0] = round(float(np.log2(deviation / 3.87))) + 127 + rng.integers(-1, 2, n)
        case _:
            raise AssertionError(kind)
    return quants


def _halves(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _packed(groups: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """u8 [n, 8] of 6 bits, as scales and as mins alike → the 12 bytes of a K block; see quant/kquant.py."""
    low, high = groups[:, :4], groups[:, 4:]
    first = low | (high >> 4 << 6)
    return np.hstack([first, first, (high & 15) | (high & 15) << 4])


def _metadata(name: str, s: Shape, quant: str) -> dict[str, Any]:
    hparams: dict[str, Any] = {
        "block_count": s.layers, "context_length": s.context, "embedding_length": s.hidden,
        "feed_forward_length": s.ffn, "attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads,
        "vocab_size": s.vocab,
    }  # fmt: skip
    if s.arch == "gpt2":
        hparams |= {"attention.layer_norm_epsilon": s.eps}
    else:
        hparams |= {"attention.layer_norm_rms_epsilon": s.eps, "rope.freq_base": s.rope_base}
        hparams |= {"rope.dimension_count": s.head_dim}
    if s.arch in ("gpt-oss", "qwen3"):
        hparams |= {"attention.key_length": s.head_dim, "attention.value_length": s.head_dim}
    if s.experts:
        hparams |= {"expert_count": s.experts, "expert_used_count": s.experts_used}
        hparams |= {"expert_feed_forward_length": s.ffn}
    return {
        "general.architecture": s.arch,
        "general.name": f"{name} (random weights)",
        "general.file_type": FILE_TYPE_IDS[quant],
        "general.quantization_version": 2,
        **{f"{s.arch}.{key}": value for key, value in (hparams | s.extra).items()},
        **_byte_vocabulary(s.vocab),
    }


def _byte_vocabulary(vocab: int) -> dict[str, Any]:
    """A byte-level BPE: each byte is a token, the rest are names without a use."""
    letters = sorted(BYTE_OF_LETTER, key=BYTE_OF_LETTER.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": letters + [f"<|reserved_{i}|>" for i in range(256, vocab)],
        "tokenizer.ggml.token_type": np.array([1] * 256 + [3] * (vocab - 256), np.int32),
        "tokenizer.ggml.merges": [f"{letters[101]} {letters[114]}"],
        "tokenizer.ggml.bos_token_id": vocab - 1,
        "tokenizer.ggml.eos_token_id": vocab - 2,
    }
