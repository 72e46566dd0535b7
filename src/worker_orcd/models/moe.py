"""The MLP of a layer as a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.backends.base import Backend, Experts, Operand, SharedExpert, Sums
from worker_orcd.models.layers import LayerTensors, Mlp


@dataclass(frozen=True)
class ExpertMlp:
    backend: Backend
    experts: Experts

    def __call__(self, h: Operand) -> Sums:
        return self.backend.experts(h, self.experts)


def expert_mlp(tensors: LayerTensors) -> Mlp:
    """Gate and up become one matrix, an expert's side by side, where their formats allow it."""
    spec = tensors.spec.experts
    assert spec is not None
    shared = None
    if spec.shared_ffn:
        shared = SharedExpert(
            gate=tensors.projection("ffn_gate_inp_shexp"),
            gate_up=tensors.projection("ffn_gate_shexp", "ffn_up_shexp"),
            down=tensors.projection("ffn_down_shexp"),
        )
    experts = Experts(
        num_experts=spec.num_experts,
        num_used=spec.num_used,
        is_normalized=spec.is_normalized,
        router=tensors.projection("ffn_gate_inp"),
        gate_up=tensors.projection("ffn_gate_exps", "ffn_up_exps", count=spec.num_experts),
        down=tensors.projection("ffn_down_exps"),
        activation=tensors.spec.family.activation,
        shared=shared,
    )
    return ExpertMlp(tensors.backend, experts)
