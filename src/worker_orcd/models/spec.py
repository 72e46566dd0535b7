"""ModelSpec: the hyper-parameters of one Llama-shaped model, read from the file and checked.

Adding a Llama-shaped family is a row in FAMILIES. Everything that a file says itself (fused or split
matrices, tied or separate head, biases) is read off the tensor table instead, since publishers differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile

if TYPE_CHECKING:  # `plan` reads a spec and must not wait for torch
    from worker_orcd.backends.base import RopeStyle

MAX_DIM = 2**24  # far above any model, far below where products leave 63 bits


@dataclass(frozen=True)
class Family:
    """What a family has that its files do not say."""

    rope_style: RopeStyle  # interleaved only where the converter permuted q and k for it
    qk_norm: bool = False  # RMS norm over each head of q and k before rotation
    qkv_bias: bool = False  # biases on q, k and v are required, not merely accepted


FAMILIES: dict[str, Family] = {
    "llama": Family("interleaved"),
    "qwen2": Family("half", qkv_bias=True),
    "qwen3": Family("half", qk_norm=True),
    # The sliding window of some Phi-3 files (2047) is not applied, as elsewhere: identical up to 2047 tokens.
    "phi3": Family("half"),
}


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions in elements; see the glossary in backends/base.py."""

    architecture: str
    family: Family
    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding, padding included
    context_length: int
    norm_eps: float
    rope_base: float
    rope_dim: int  # dimensions of a head that rotate
    rope_scale: float  # positions are divided by it (linear scaling)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_spec(gguf: GgufFile) -> ModelSpec:
    """Raises ModelLoadFailed naming the architecture, or the key whose value cannot be right."""
    family = FAMILIES.get(gguf.architecture)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelLoadFailed(
            f"general.architecture is {gguf.architecture[:64]!r}, which this worker cannot run; it runs {known}"
        )
    hidden = _dim(gguf, "embedding_length")
    num_heads = _dim(gguf, "attention.head_count")
    num_kv_heads = _dim(gguf, "attention.head_count_kv", num_heads)
    head_dim = _dim(gguf, "attention.key_length", hidden // num_heads)
    spec = ModelSpec(
        architecture=gguf.architecture,
        family=family,
        num_layers=_dim(gguf, "block_count", maximum=1024),
        hidden=hidden,
        ffn=_dim(gguf, "feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_embedding_rows(gguf, hidden),
        context_length=_dim(gguf, "context_length"),
        norm_eps=gguf.hparam("attention.layer_norm_rms_epsilon", float, min=0.0, max=1.0),
        rope_base=gguf.hparam("rope.freq_base", float, 10000.0, min=1.0, max=1e12),
        rope_dim=_dim(gguf, "rope.dimension_count", head_dim),
        rope_scale=_rope_scale(gguf),
    )
    _check(gguf, spec)
    return spec


def _dim(gguf: GgufFile, name: str, default: int | None = None, maximum: int = MAX_DIM) -> int:
    """A dimension; one given layer by layer must be the same in all."""
    per_layer = gguf.metadata.get(f"{gguf.architecture}.{name}")
    if isinstance(per_layer, np.ndarray):
        values = set(gguf.hparam(name, "ints", min=1, max=maximum).tolist())
        if len(values) != 1:
            raise ModelLoadFailed(f"{gguf.architecture}.{name} differs from layer to layer, which is not supported")
        return int(values.pop())
    if default is None:
        return int(gguf.hparam(name, int, min=1, max=maximum))
    return int(gguf.hparam(name, int, default, min=1, max=maximum))


def _embedding_rows(gguf: GgufFile, hidden: int) -> int:
    table = gguf.tensors.get("token_embd.weight")
    if table is None:
        raise ModelLoadFailed("tensor token_embd.weight is missing: this file holds a vocabulary but no model")
    if len(table.shape) != 2 or table.shape[1] != hidden:
        raise ModelLoadFailed(f"tensor token_embd.weight has shape {table.shape}, but embedding_length is {hidden}")
    return table.shape[0]


def _rope_scale(gguf: GgufFile) -> float:
    """A factor without a type means linear scaling; `rope.scale_linear` is its older name."""
    kind = gguf.hparam("rope.scaling.type", str, "linear")
    if kind == "none":
        return 1.0
    if kind == "linear":
        older = gguf.hparam("rope.scale_linear", float, 1.0, min=1e-3, max=1e6)
        return float(gguf.hparam("rope.scaling.factor", float, older, min=1e-3, max=1e6))
    raise ModelLoadFailed(f"{gguf.architecture}.rope.scaling.type is {kind[:64]!r}; none and linear are supported")


def _check(gguf: GgufFile, spec: ModelSpec) -> None:
    arch = spec.architecture
    problems = [
        (spec.num_heads % spec.num_kv_heads, f"{spec.num_heads} heads are no multiple of {spec.num_kv_heads}"),
        (spec.head_dim % 2, f"head size {spec.head_dim} is odd"),
        (spec.rope_dim % 2, f"{arch}.rope.dimension_count {spec.rope_dim} is odd"),
        (spec.rope_dim > spec.head_dim, f"{arch}.rope.dimension_count {spec.rope_dim} exceeds {spec.head_dim}"),
        (
            _dim(gguf, "attention.value_length", spec.head_dim) != spec.head_dim,
            f"{arch}.attention.value_length differs from the head size {spec.head_dim}",
        ),
    ]
    for is_wrong, message in problems:
        if is_wrong:
            raise ModelLoadFailed(message)
