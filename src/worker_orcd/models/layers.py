"""What decoder-only families share: layers of attention and MLP between an embedding and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from worker_orcd.backends.base import (
    Activation,
    AttnSpec,
    Backend,
    Heads,
    Norm,
    Operand,
    PackedWeight,
    Projection,
    Rope,
    Sums,
)
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.models.rope import RopeSpec, factors_name, rotation_table
from worker_orcd.models.spec import ModelSpec
from worker_orcd.models.weights import Weights


@dataclass(frozen=True)
class Attention:
    """output(attention(rope(qkv(h)))); qkv is one matrix or several, as the file has them."""

    backend: Backend
    qkv: Projection
    heads: Heads
    rope: Rope
    spec: AttnSpec
    output: Projection

    def __call__(self, h: Operand, batch: Batch, kv: LayerKV) -> Sums:
        qkv = self.backend.linear(h, self.qkv)
        attended = self.backend.attend(qkv, self.heads, self.rope, self.spec, kv, batch)
        return self.backend.linear(attended, self.output)


class Mlp(Protocol):
    def __call__(self, h: Operand) -> Sums:
        """What the second half of a layer adds: [T, K] → [T, K]."""
        ...


@dataclass(frozen=True)
class DenseMlp:
    """down(act(up(h))), or down(act(gate(h)) · up(h)); gate and up are one matrix or two, as the file has them."""

    backend: Backend
    up: Projection
    down: Projection
    activation: Activation
    is_gated: bool

    def __call__(self, h: Operand) -> Sums:
        return self.backend.mlp(h, self.up, self.down, self.activation, self.is_gated)


@dataclass(frozen=True)
class Layer:
    """x += post_attention_norm(attention(attn_norm(x))); x += post_ffw_norm(mlp(ffn_norm(x))).

    Norms that a family does not have are None.
    """

    attn_norm: Norm | None
    attention: Attention
    post_attention_norm: Norm | None
    ffn_norm: Norm | None
    mlp: Mlp
    post_ffw_norm: Norm | None


class LayerTensors:
    """The tensors of one layer by their GGUF names, as operations want them.

    Takes matrices out of `weights`: a joined one is a copy, and the device need not hold both for long.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, backend: Backend, index: int) -> None:
        self.spec, self.backend, self.index = spec, backend, index
        self.matrices, self.vectors = weights.matrices, weights.vectors
        self.prefix = f"blk.{index}."

    def projection(self, *names: str, count: int = 1) -> Projection:
        """Those of `names` that the file has, side by side; each is `count` matrices, one under the other."""
        present = [self.prefix + name for name in names if f"{self.prefix}{name}.weight" in self.matrices]
        parts = tuple((self.matrices.pop(f"{name}.weight"), self.vectors.get(f"{name}.bias")) for name in present)
        return _joined(parts, self.backend, count)

    def norm(self, name: str) -> Norm | None:
        return norm_of(self.spec, self.vectors, self.prefix + name)

    def vector(self, name: str) -> Tensor | None:
        return self.vectors.get(self.prefix + name)


def norm_of(spec: ModelSpec, vectors: dict[str, Tensor], name: str) -> Norm | None:
    weight = vectors.get(f"{name}.weight")
    return None if weight is None else Norm(weight, spec.norm_eps, vectors.get(f"{name}.bias"))


def _joined(parts: Projection, backend: Backend, count: int) -> Projection:
    """One matrix for neighbours that the backend can take as one; files often store v otherwise than q and k."""
    found: list[tuple[PackedWeight, Tensor | None]] = []
    for _, run in groupby(parts, key=lambda part: (part[0].type, part[0].shape[1], part[1] is None)):
        neighbours = tuple(run)
        whole = backend.join([weight for weight, _ in neighbours], count) if len(neighbours) > 1 else None
        if whole is None:
            found += neighbours
        else:
            biases = [bias.view(count, -1) for _, bias in neighbours if bias is not None]
            found.append((whole, torch.cat(biases, 1).flatten() if biases else None))
    return tuple(found)


def dense_mlp(tensors: LayerTensors) -> Mlp:
    up, down = tensors.projection("ffn_gate", "ffn_up"), tensors.projection("ffn_down")
    return DenseMlp(tensors.backend, up, down, tensors.spec.activation, tensors.spec.family.is_gated)


class Decoder:
    """All layers, the last norm and the head; adapters differ in how they embed and in the MLP they build."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        backend: Backend,
        context_length: int,
        build_mlp: Callable[[LayerTensors], Mlp] = dense_mlp,
    ) -> None:
        self.spec, self.backend = spec, backend
        matrices, vectors = weights.matrices, weights.vectors
        self.output: Projection = ((matrices.get("output.weight", matrices["token_embd.weight"]), None),)
        self.output_norm = _output_norm(spec, vectors)
        self.ropes = rope_tables(spec, vectors, context_length, backend.device)
        scales = query_scales(spec, context_length, backend.device)
        self.layers = [
            _layer(LayerTensors(spec, weights, backend, i), self.ropes[rope], scales, build_mlp)
            for i, rope in enumerate(spec.ropes)
        ]
        self.next_norms = [*(layer.attn_norm for layer in self.layers[1:]), self.output_norm]  # after each layer

    def __call__(self, x: Tensor, batch: Batch, kv: list[LayerKV]) -> Tensor:
        """Embedded tokens [T, hidden] → logits of the rows that sample, f32 [R, V].

        What a layer adds is added by whoever reads it next: sums and norm are one operation.
        """
        backend, scale = self.backend, self.spec.residual_scale
        h = backend.norm(x, self.layers[0].attn_norm)
        for i, (layer, layer_kv) in enumerate(zip(self.layers, kv, strict=True)):
            attended = layer.attention(h, batch, layer_kv)
            x, h = backend.add_norm(x, attended, layer.ffn_norm, layer.post_attention_norm, scale)
            added = layer.mlp(h)
            if i + 1 < len(self.layers) or batch.sample_rows is None:
                x, h = backend.add_norm(x, added, self.next_norms[i], layer.post_ffw_norm, scale)
            else:
                x = backend.add(x, added, layer.post_ffw_norm, scale)
                h = backend.norm(x[batch.sample_rows], self.output_norm)
        logits = backend.total(backend.linear(h, self.output))
        cap = self.spec.logit_soft_cap
        return torch.tanh(logits / cap) * cap if cap else logits


def _output_norm(spec: ModelSpec, vectors: dict[str, Tensor]) -> Norm:
    """The scale of the logits goes into its weight."""
    norm = norm_of(spec, vectors, "output_norm")
    assert norm is not None
    return norm if spec.logit_scale == 1.0 else Norm(norm.weight / spec.logit_scale, norm.eps, norm.bias)


def _layer(
    tensors: LayerTensors, rope: Rope, scales: Tensor | None, build_mlp: Callable[[LayerTensors], Mlp]
) -> Layer:
    spec, family, dims = tensors.spec, tensors.spec.family, tensors.spec.dims
    attention = Attention(
        backend=tensors.backend,
        qkv=tensors.projection("attn_qkv", "attn_q", "attn_k", "attn_v"),
        heads=Heads(*dims, tensors.norm("attn_q_norm"), tensors.norm("attn_k_norm")),
        rope=rope,
        spec=AttnSpec(
            *dims,
            scale=spec.attn_scale,
            window=spec.windows[tensors.index],
            soft_cap=spec.attn_soft_cap,
            sinks=tensors.vector("attn_sinks.weight"),
            query_scales=scales,
        ),
        output=tensors.projection("attn_output"),
    )
    is_after = family.norms != "before"
    return Layer(
        attn_norm=tensors.norm("attn_norm"),
        attention=attention,
        post_attention_norm=tensors.norm("post_attention_norm") if is_after else None,
        ffn_norm=tensors.norm(family.ffn_norm),
        mlp=build_mlp(tensors),
        post_ffw_norm=tensors.norm("post_ffw_norm"),
    )


def query_scales(spec: ModelSpec, context_length: int, device: torch.device) -> Tensor | None:
    """1 + temperature · ln(1 + ⌊p / original context⌋) for every position p, as Llama 4 and Ministral 3 have it."""
    if not spec.attn_temperature:
        return None
    positions = torch.arange(context_length, device=device)
    scales = 1.0 + spec.attn_temperature * torch.log1p((positions // spec.rope.original_context).float())
    return scales[:, None, None]


def rope_tables(
    spec: ModelSpec, vectors: dict[str, Tensor], context_length: int, device: torch.device
) -> dict[RopeSpec, Rope]:
    """A table for each way the layers rotate. A file's factors are for layers that see everything."""
    tables: dict[RopeSpec, Rope] = {}
    for rope in set(spec.ropes):
        factors = vectors.get(factors_name(rope, context_length)) if rope == spec.rope else None
        numbers = None if factors is None else factors.cpu().numpy()
        cos, sin = (torch.from_numpy(t).to(device) for t in rotation_table(rope, numbers, context_length))
        tables[rope] = Rope(cos, sin, spec.family.rope_style)
    return tables
