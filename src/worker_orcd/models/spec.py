"""ModelSpec: the hyper-parameters of one model, read from the file and checked.

Everything that a file says itself (fused or split matrices, tied or separate head, biases) is read off the tensor
table instead, since publishers differ; what no file says is in models/families.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile, StringArray
from worker_orcd.models.experts import ExpertSpec, read_experts
from worker_orcd.models.families import FAMILIES, Family
from worker_orcd.models.rope import UNROTATED, RopeSpec, read_rope

if TYPE_CHECKING:  # `plan` reads a spec and must not wait for torch
    from worker_orcd.backends.base import Activation

MAX_DIM = 2**24  # far above any model, far below where products leave 63 bits
REFUSED = (  # numbers that would change the results, if they are not zero
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
)
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
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
    activation: Activation  # of the MLP
    norm_eps: float
    windows: tuple[int, ...]  # of each layer; 0: it sees everything
    rope: RopeSpec
    local_rope: RopeSpec  # of layers with a window
    attn_scale: float
    attn_temperature: float  # queries far into a context grow by it, see layers.query_scales; 0: they do not
    attn_soft_cap: float  # 0: none
    logit_soft_cap: float
    embedding_scale: float
    residual_scale: float  # of what attention and MLP add
    logit_scale: float  # logits are divided by it
    experts: ExpertSpec | None  # instead of an MLP

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def dims(self) -> tuple[int, int, int]:
        """Hq, Hk and D."""
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def mlp_width(self) -> int:
        """The most numbers that an activation of the MLP has for one token, those of all its experts together."""
        if self.experts is None:
            return self.ffn
        return self.experts.num_used * max(self.experts.ffn, self.hidden) + self.experts.shared_ffn + self.hidden

    @property
    def ropes(self) -> list[RopeSpec]:
        """Of each layer."""
        every = self.family.unrotated_every
        return [
            UNROTATED if every and (i + 1) % every == 0 else self.local_rope if window else self.rope
            for i, window in enumerate(self.windows)
        ]

    @property
    def rope_dims(self) -> int:
        """Of all rotation tables together."""
        return sum(rope.dim for rope in set(self.ropes))


def read_spec(gguf: GgufFile) -> ModelSpec:
    """Raises ModelLoadFailed naming the architecture, or the key or tensor that cannot be right."""
    family = FAMILIES.get(gguf.architecture)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ModelLoadFailed(
            f"general.architecture is {gguf.architecture[:64]!r}, which this worker cannot run; it runs {known}"
        )
    hidden, num_layers = _dim(gguf, "embedding_length"), _dim(gguf, "block_count", maximum=1024)
    num_heads = _dim(gguf, "attention.head_count")
    head_dim = _head_dim(gguf, hidden, num_heads)
    context_length = _dim(gguf, "context_length")
    rope, local_rope = _ropes(gguf, family, head_dim, context_length)
    ffn = _dim(gguf, "feed_forward_length")
    is_wide = num_layers == family.layers_of_wide_scale
    attn_soft_cap, logit_soft_cap = family.soft_caps
    spec = ModelSpec(
        architecture=gguf.architecture,
        family=family,
        num_layers=num_layers,
        hidden=hidden,
        ffn=ffn,
        num_heads=num_heads,
        num_kv_heads=_dim(gguf, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=_embedding_rows(gguf, hidden),
        context_length=context_length,
        activation=_activation(gguf, family),
        norm_eps=_norm_eps(gguf, family),
        windows=_windows(gguf, family, num_layers),
        rope=rope,
        local_rope=local_rope,
        attn_scale=_scale(gguf, "attention.scale", 1.0 / sqrt(hidden / num_heads if is_wide else head_dim)),
        attn_temperature=_scale(gguf, "attention.temperature_scale", 0.0, min=0.0),
        attn_soft_cap=_scale(gguf, "attn_logit_softcapping", attn_soft_cap, min=0.0),
        logit_soft_cap=_scale(gguf, "final_logit_softcapping", logit_soft_cap, min=0.0),
        embedding_scale=_scale(gguf, "embedding_scale", sqrt(hidden) if family.scales_embedding else 1.0),
        residual_scale=_scale(gguf, "residual_scale", 1.0),
        logit_scale=_scale(gguf, "logit_scale", 1.0),
        experts=read_experts(gguf, family, ffn),
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


def _head_dim(gguf: GgufFile, hidden: int, num_heads: int) -> int:
    head_dim = _dim(gguf, "attention.key_length", max(1, hidden // num_heads))
    if hidden % num_heads and f"{gguf.architecture}.attention.key_length" not in gguf.metadata:
        raise ModelLoadFailed(f"{gguf.architecture}.attention.head_count {num_heads} does not divide {hidden}")
    return head_dim


def _scale(gguf: GgufFile, name: str, default: float, min: float = 1e-6) -> float:
    return float(gguf.hparam(name, float, default, min=min, max=1e6))


def _norm_eps(gguf: GgufFile, family: Family) -> float:
    if family.adapter == "gpt":
        return float(gguf.hparam("attention.layer_norm_epsilon", float, 1e-5, min=0.0, max=1.0))
    return float(gguf.hparam("attention.layer_norm_rms_epsilon", float, min=0.0, max=1.0))


def _activation(gguf: GgufFile, family: Family) -> Activation:
    """The family's own, unless the file names another, as checkpoints do."""
    name = gguf.hparam("hidden_activation", str, None)
    if name is None:
        return family.activation
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelLoadFailed(f"{gguf.architecture}.hidden_activation is {name[:64]!r}; {known} are supported")
    return ACTIVATIONS[name]


def _embedding_rows(gguf: GgufFile, hidden: int) -> int:
    """Rows of the embedding; every token must have one, and a vocabulary size that is given must be theirs."""
    table = gguf.tensors.get("token_embd.weight")
    if table is None:
        raise ModelLoadFailed("tensor token_embd.weight is missing: this file holds a vocabulary but no model")
    if len(table.shape) != 2 or table.shape[1] != hidden:
        raise ModelLoadFailed(f"tensor token_embd.weight has shape {table.shape}, but embedding_length is {hidden}")
    rows = table.shape[0]
    vocab_size = gguf.hparam("vocab_size", int, rows)
    if vocab_size != rows:
        raise ModelLoadFailed(
            f"tensor token_embd.weight has {rows} rows, but {gguf.architecture}.vocab_size is {vocab_size}"
        )
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringArray) and len(tokens) > rows:
        raise ModelLoadFailed(f"tensor token_embd.weight has {rows} rows, tokenizer.ggml.tokens {len(tokens)} tokens")
    return rows


def _windows(gguf: GgufFile, family: Family, num_layers: int) -> tuple[int, ...]:
    """The window of each layer. The pattern in a file is a period, or says of each layer whether it has one."""
    smallest = 1 if family.window else 0
    window = int(gguf.hparam("attention.sliding_window", int, family.window, min=smallest, max=2**31))
    name = "attention.sliding_window_pattern"
    pattern = gguf.metadata.get(f"{gguf.architecture}.{name}")
    if isinstance(pattern, np.ndarray):
        if len(pattern) != num_layers or pattern.dtype.kind not in "biu":
            raise ModelLoadFailed(f"{gguf.architecture}.{name} must say yes or no of each of {num_layers} layers")
        return tuple(window if is_windowed else 0 for is_windowed in pattern.tolist())
    every = int(gguf.hparam(name, int, family.full_every, min=0, max=MAX_DIM))
    return tuple(0 if every and (i + 1) % every == 0 else window for i in range(num_layers))


def _ropes(gguf: GgufFile, family: Family, head_dim: int, context_length: int) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see everything, and of those with a window."""
    if family.adapter == "gpt":
        return UNROTATED, UNROTATED
    rope = read_rope(gguf, _dim(gguf, "rope.dimension_count", head_dim), context_length, family.rounds_yarn)
    if not family.has_local_rope:
        return rope, rope
    base = gguf.hparam("rope.freq_base_swa", float, family.local_rope_base or rope.base, min=1.0, max=1e12)
    return rope, RopeSpec(float(base), rope.dim)


def _check(gguf: GgufFile, spec: ModelSpec) -> None:
    arch = spec.architecture
    problems = [
        (spec.num_heads % spec.num_kv_heads, f"{spec.num_heads} heads are no multiple of {spec.num_kv_heads}"),
        (spec.head_dim % 2, f"head size {spec.head_dim} is odd"),
        (spec.rope.dim % 2, f"{arch}.rope.dimension_count {spec.rope.dim} is odd"),
        (spec.rope.dim > spec.head_dim, f"{arch}.rope.dimension_count {spec.rope.dim} exceeds {spec.head_dim}"),
        (
            _dim(gguf, "attention.value_length", spec.head_dim) != spec.head_dim,
            f"{arch}.attention.value_length differs from the head size {spec.head_dim}",
        ),
    ]
    if spec.attn_temperature and not spec.rope.original_context:
        raise ModelLoadFailed(f"{arch}.attention.temperature_scale needs {arch}.rope.scaling.original_context_length")
    if not gguf.hparam("attention.causal", bool, True):
        raise ModelLoadFailed(f"{arch}.attention.causal is false: this model encodes texts and writes none")
    for key in REFUSED:
        problems.append((gguf.hparam(key, float, 0.0) != 0.0, f"{arch}.{key} is not zero, which is not supported"))
    for is_wrong, message in problems:
        if is_wrong:
            raise ModelLoadFailed(message)
