"""The Llama family: RoPE, grouped-query attention, RMS norm, gated MLP (arXiv:2302.13971, arXiv:2305.13245).

x = embed(tokens)
per layer:  x += output(attention(rope(qkv(norm(x)))));  x += down(silu(gate(norm(x))) * up(norm(x)))
logits = head(norm(x))
"""

from __future__ import annotations

from torch import Tensor

from worker_orcd.backends.base import Backend
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.models.layers import Decoder, dense_mlp
from worker_orcd.models.moe import expert_mlp
from worker_orcd.models.spec import ModelSpec
from worker_orcd.models.weights import Weights


class LlamaInferenceAdapter:
    """llama, qwen2, qwen3, phi3, gemma, those with experts, and whatever else is a row of models/families.py."""

    def __init__(self, spec: ModelSpec, weights: Weights, backend: Backend, context_length: int) -> None:
        self.spec, self.backend = spec, backend
        self.token_embd = weights.matrices["token_embd.weight"]
        build_mlp = dense_mlp if spec.experts is None else expert_mlp
        self.decoder = Decoder(spec, weights, backend, context_length, build_mlp)

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        x, scale = self.backend.embed(batch.tokens, self.token_embd, batch.sampled), self.spec.embedding_scale
        return self.decoder(x if scale == 1.0 else x * scale, batch, kv)
