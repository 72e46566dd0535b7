"""What a file says of its experts, and the tensors they take; no torch here."""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models.families import Family

MAX_DIM = 2**24  # far above any model


@dataclass(frozen=True)
class ExpertSpec:
    """Widths in elements; see the glossary in backends/base.py."""

    num_experts: int
    num_used: int  # by a token
    ffn: int  # of one expert
    shared_ffn: int  # of the expert that every token takes; 0: there is none
    is_normalized: bool  # the weights of the experts a token takes add up to one


def read_experts(gguf: GgufFile, family: Family, dense_ffn: int) -> ExpertSpec | None:
    """None for a model without experts. Raises ModelLoadFailed naming the key whose value cannot be right.

    Early files do not state widths. An expert's is then its tensor's, the shared expert's that of the dense MLP.
    """
    arch = gguf.architecture
    if not family.has_experts and gguf.hparam("expert_count", int, 0) == 0:
        return None
    num_experts = gguf.hparam("expert_count", int, min=1, max=MAX_DIM)
    num_used = gguf.hparam("expert_used_count", int, min=1, max=MAX_DIM)
    if num_used > num_experts:
        raise ModelLoadFailed(f"{arch}.expert_used_count is {num_used}, but expert_count is {num_experts}")
    if gguf.hparam("expert_weights_scale", float, 1.0) not in (0.0, 1.0):
        raise ModelLoadFailed(f"{arch}.expert_weights_scale is not 1, which is not supported")
    tensor = gguf.tensors.get("blk.0.ffn_up_exps.weight")
    width = tensor.shape[1] if tensor is not None and len(tensor.shape) == 3 else dense_ffn
    ffn = gguf.hparam("expert_feed_forward_length", int, width, min=1, max=MAX_DIM)
    shared_ffn = 0
    if family.has_shared_expert:
        shared_ffn = gguf.hparam("expert_shared_feed_forward_length", int, dense_ffn, min=1, max=MAX_DIM)
    is_normalized = gguf.hparam("expert_weights_norm", bool, family.normalizes_experts)
    return ExpertSpec(num_experts, num_used, ffn, shared_ffn, is_normalized)


def expert_projections(experts: ExpertSpec, hidden: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Each projection as its matrices, those of experts one behind the other: [E, N, K]."""
    num, ffn, shared = experts.num_experts, experts.ffn, experts.shared_ffn
    forms: dict[str, dict[str, tuple[int, ...]]] = {
        "ffn_gate_inp": {"ffn_gate_inp": (num, hidden)},
        "ffn_up_exps": {"ffn_gate_exps": (num, ffn, hidden), "ffn_up_exps": (num, ffn, hidden)},
        "ffn_down_exps": {"ffn_down_exps": (num, hidden, ffn)},
    }
    if shared:
        forms["ffn_gate_inp_shexp"] = {"ffn_gate_inp_shexp": (1, hidden)}
        forms["ffn_up_shexp"] = {"ffn_gate_shexp": (shared, hidden), "ffn_up_shexp": (shared, hidden)}
        forms["ffn_down_shexp"] = {"ffn_down_shexp": (hidden, shared)}
    return forms
