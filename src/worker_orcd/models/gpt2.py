"""The GPT-2 family: learned positions, layer norm, attention of as many keys as queries, GELU.

x = embed(tokens) + position_embd(positions)
per layer:  x += output(attention(qkv(norm(x))));  x += down(gelu(up(norm(x))));  every product has a bias
logits = head(norm(x))
"""

from __future__ import annotations

from torch import Tensor

from worker_orcd.backends.base import Backend
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.models.layers import Decoder
from worker_orcd.models.spec import ModelSpec
from worker_orcd.models.weights import Weights


class GPTInferenceAdapter:
    """gpt2; positions end with the table, which is as long as the context the file claims."""

    def __init__(self, spec: ModelSpec, weights: Weights, backend: Backend, context_length: int) -> None:
        self.backend = backend
        self.token_embd, self.position_embd = (
            weights.matrices[f"{name}.weight"] for name in ("token_embd", "position_embd")
        )
        self.decoder = Decoder(spec, weights, backend, context_length)

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        x = self.backend.embed(batch.tokens, self.token_embd, batch.sampled)
        return self.decoder(x + self.backend.embed(batch.attn.positions, self.position_embd), batch, kv)
