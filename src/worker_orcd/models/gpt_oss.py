"""GPT-OSS: attention with sinks and, in every other layer, a window; experts instead of an MLP (arXiv:2508.10925).

x = embed(tokens)
per layer:  x += output(attention(rope(qkv(norm(x)))));  x += Σ weight · down(act(gate(norm(x)), up(norm(x))))
logits = head(norm(x))

Products have biases, the router too. Rotation is stretched by YaRN, with bounds that are not rounded.
"""

from __future__ import annotations

from torch import Tensor

from worker_orcd.backends.base import Backend
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.models.layers import Decoder
from worker_orcd.models.moe import expert_mlp
from worker_orcd.models.spec import ModelSpec
from worker_orcd.models.weights import Weights


class GptOssInferenceAdapter:
    def __init__(self, spec: ModelSpec, weights: Weights, backend: Backend, context_length: int) -> None:
        self.backend = backend
        self.token_embd = weights.matrices["token_embd.weight"]
        self.decoder = Decoder(spec, weights, backend, context_length, expert_mlp)

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        return self.decoder(self.backend.embed(batch.tokens, self.token_embd, batch.sampled), batch, kv)
