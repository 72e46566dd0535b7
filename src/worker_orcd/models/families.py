"""What model families have that their files do not say: a new Llama-shaped family is a row of FAMILIES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # `plan` reads a spec and must not wait for torch
    from worker_orcd.backends.base import Activation, RopeStyle


@dataclass(frozen=True)
class Family:
    """What a file says itself (fused or split matrices, tied or separate head, biases) is read off its tensors."""

    adapter: Literal["llama", "gpt"] = "llama"
    rope_style: RopeStyle = "half"  # interleaved only where the converter permuted q and k for it
    activation: Activation = "silu"
    is_gated: bool = True  # the MLP has a gate
    norms: Literal["before", "after", "around"] = "before"  # where attention and MLP are normalized
    ffn_norm: str = "ffn_norm"  # name of the norm before the MLP
    qk_norm: Literal["none", "head", "width"] = "none"  # of q and k before rotation: each head, or all together
    biases: frozenset[str] = frozenset()  # of projections ("attn_qkv" also split) that must have one; others may
    scales_embedding: bool = False  # by √hidden
    layers_of_wide_scale: int = 0  # the one size whose attention scale is 1 / √(hidden / heads)
    window: int = 0  # of families that always have one: its length when the file does not say
    full_every: int = 0  # with a window, every n-th layer still sees everything; 0: none does
    has_local_rope: bool = False  # windowed layers rotate by angles of their own, never scaled
    local_rope_base: float = 0.0  # of those when the file does not say; 0: the base of the others
    unrotated_every: int = 0  # every n-th layer does not rotate; 0: all do
    soft_caps: tuple[float, float] = (0.0, 0.0)  # of attention scores and of logits when the file does not say
    has_sinks: bool = False  # in attention
    rounds_yarn: bool = True  # the bounds of a rotation stretched that way
    has_experts: bool = False  # instead of an MLP; others may
    has_shared_expert: bool = False
    normalizes_experts: bool = True  # see ExpertSpec; when the file does not say


GPT = Family(
    adapter="gpt",
    activation="gelu_tanh",
    is_gated=False,
    biases=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
)
GPT_OSS = Family(  # arXiv:2508.10925
    activation="clamped",
    ffn_norm="post_attention_norm",
    biases=frozenset({"attn_qkv", "attn_output", "ffn_gate_inp", "ffn_up_exps", "ffn_down_exps"}),
    window=128,
    full_every=2,
    has_sinks=True,
    rounds_yarn=False,
    has_experts=True,
)
GEMMA = Family(activation="gelu_tanh", scales_embedding=True)

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "interleaved"),  # and Mistral and Mixtral, whose files say llama
    "mistral3": Family("llama", "interleaved"),
    "qwen2": Family(biases=frozenset({"attn_qkv"})),
    "qwen3": Family(qk_norm="head"),
    "phi3": Family(),
    "gemma": GEMMA,
    "gemma2": Family(
        activation="gelu_tanh",
        norms="around",
        scales_embedding=True,
        layers_of_wide_scale=46,
        window=4096,
        full_every=2,
        soft_caps=(50.0, 30.0),
    ),
    "gemma3": Family(
        activation="gelu_tanh",
        norms="around",
        qk_norm="head",
        scales_embedding=True,
        layers_of_wide_scale=62,
        full_every=6,
        has_local_rope=True,
        local_rope_base=10_000.0,
    ),
    "olmo2": Family(norms="after", qk_norm="width", full_every=4, has_local_rope=True),  # and OLMo 3: with windows
    "granite": Family(rope_style="interleaved"),
    "smollm3": Family(rope_style="interleaved", unrotated_every=4),
    "qwen2moe": Family(
        biases=frozenset({"attn_qkv"}), has_experts=True, has_shared_expert=True, normalizes_experts=False
    ),
    "qwen3moe": Family(qk_norm="head", has_experts=True),
    "gpt2": GPT,
    "gpt": GPT,
    "gpt-oss": GPT_OSS,
    "gptoss": GPT_OSS,
}
