"""The Llama family: RoPE, grouped-query attention, RMS norm, SwiGLU (arXiv:2302.13971, arXiv:2305.13245).

x = embed(tokens)
per layer:  x += output(attention(rope(qkv(norm(x)))));  x += down(silu(gate(norm(x))) * up(norm(x)))
logits = head(norm(x))
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from worker_orcd.backends.base import AttnSpec, Backend, PackedWeight, Rope
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.models.spec import ModelSpec
from worker_orcd.models.weights import Weights

Projection = tuple[tuple[PackedWeight, Tensor | None], ...]  # matrices and biases whose outputs stand side by side


@dataclass(frozen=True)
class Layer:
    """Attribute names are GGUF's; qkv and gate_up are one matrix or several, as the file has them."""

    attn_norm: Tensor
    qkv: Projection
    attn_q_norm: Tensor | None
    attn_k_norm: Tensor | None
    attn_output: Projection
    ffn_norm: Tensor
    gate_up: Projection
    ffn_down: Projection


class LlamaInferenceAdapter:
    """llama, qwen2, qwen3, phi3 and whatever else is a row of models/spec.py."""

    def __init__(self, spec: ModelSpec, weights: Weights, backend: Backend, context_length: int) -> None:
        self.spec, self.backend = spec, backend
        matrices, vectors = weights.matrices, weights.vectors
        self.token_embd = matrices["token_embd.weight"]
        self.output_norm = vectors["output_norm.weight"]
        self.output = matrices.get("output.weight", self.token_embd)
        self.layers = [_layer(weights, f"blk.{i}.", backend) for i in range(spec.num_layers)]
        self.rope = rope_table(spec, vectors.get("rope_freqs.weight"), context_length, backend.device)
        self.attn = AttnSpec(spec.num_heads, spec.num_kv_heads, spec.head_dim, 1.0 / sqrt(spec.head_dim))

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        x = self.backend.embed(batch.tokens, self.token_embd)  # [T, hidden]
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x = x + self._attention(layer, x, batch, layer_kv)
            x = x + self._mlp(layer, x)
        x = self.backend.norm(x[batch.sample_rows], self.output_norm, self.spec.norm_eps)  # [R, hidden]
        return self.backend.linear(x, self.output)

    def _attention(self, layer: Layer, x: Tensor, batch: Batch, kv: LayerKV) -> Tensor:
        spec, backend = self.spec, self.backend
        h = backend.norm(x, layer.attn_norm, spec.norm_eps)
        widths = [spec.q_width, spec.kv_width, spec.kv_width]
        parts = torch.split(self._project(h, layer.qkv), widths, 1)
        q, k, v = (part.reshape(len(x), -1, spec.head_dim) for part in parts)
        if layer.attn_q_norm is not None and layer.attn_k_norm is not None:
            q = backend.norm(q, layer.attn_q_norm, spec.norm_eps)
            k = backend.norm(k, layer.attn_k_norm, spec.norm_eps)
        q = backend.rope_and_store((q, k, v), kv, batch, self.rope)
        return self._project(backend.attention(q, kv, batch.attn, self.attn).flatten(1), layer.attn_output)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        h = self.backend.norm(x, layer.ffn_norm, self.spec.norm_eps)
        gate, up = torch.split(self._project(h, layer.gate_up), self.spec.ffn, 1)
        return self._project(self.backend.activate(gate, up, "silu"), layer.ffn_down)

    def _project(self, x: Tensor, projection: Projection) -> Tensor:
        outputs = [self.backend.linear(x, weight, bias) for weight, bias in projection]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _layer(weights: Weights, prefix: str, backend: Backend) -> Layer:
    """Takes its matrices out of `weights`: a joined one is a copy, and the device need not hold both for long."""
    matrices, vectors = weights.matrices, weights.vectors

    def projection(*names: str) -> Projection:
        present = [prefix + name for name in names if f"{prefix}{name}.weight" in matrices]
        return _joined(tuple((matrices.pop(f"{n}.weight"), vectors.get(f"{n}.bias")) for n in present), backend)

    return Layer(
        attn_norm=vectors[f"{prefix}attn_norm.weight"],
        qkv=projection("attn_qkv", "attn_q", "attn_k", "attn_v"),
        attn_q_norm=vectors.get(f"{prefix}attn_q_norm.weight"),
        attn_k_norm=vectors.get(f"{prefix}attn_k_norm.weight"),
        attn_output=projection("attn_output"),
        ffn_norm=vectors[f"{prefix}ffn_norm.weight"],
        gate_up=projection("ffn_gate", "ffn_up"),
        ffn_down=projection("ffn_down"),
    )


def _joined(parts: Projection, backend: Backend) -> Projection:
    biases = [bias for _, bias in parts if bias is not None]
    if len(parts) == 1 or len(biases) not in (0, len(parts)):
        return parts
    whole = backend.join([weight for weight, _ in parts])
    return parts if whole is None else ((whole, torch.cat(biases) if biases else None),)


def rope_table(spec: ModelSpec, factors: Tensor | None, context_length: int, device: torch.device) -> Rope:
    """Angles p · base^(-2i/dim) / scale / factor_i for every position p, in float64, stored as float32.

    `factors` [rope_dim / 2] are Llama 3's long-context corrections as its converter wrote them.
    """
    i = torch.arange(spec.rope_dim // 2, dtype=torch.float64)
    frequencies = spec.rope_base ** (-2.0 * i / spec.rope_dim) / spec.rope_scale
    if factors is not None:
        frequencies = frequencies / factors.double().cpu()
    angles = torch.arange(context_length, dtype=torch.float64)[:, None] * frequencies
    return Rope(angles.cos().float().to(device), angles.sin().float().to(device), spec.family.rope_style)
