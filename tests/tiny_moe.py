"""Tiny random models with experts: built with transformers, laid out as the real converters lay them out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests import tiny

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1500.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
LAYER_NAMES = tiny.LAYER_NAMES | {
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def configs() -> dict[str, tuple[str, PretrainedConfig]]:
    """Case → (GGUF architecture, transformers configuration)."""
    common = tiny.COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": False}
    moe = {"num_experts": 6, "moe_intermediate_size": 64, **common}
    oss = {"num_local_experts": 6, "num_experts_per_tok": 4, "sliding_window": 24, "rope_parameters": YARN, **common}
    return {
        "gpt-oss": ("gpt-oss", GptOssConfig(**oss | {"num_hidden_layers": 3, "head_dim": 32})),
        "qwen2moe": (
            "qwen2moe",
            Qwen2MoeConfig(**moe, num_experts_per_tok=2, shared_expert_intermediate_size=96),
        ),
        "qwen2moe-normalized": (
            "qwen2moe",
            Qwen2MoeConfig(**moe, num_experts_per_tok=3, shared_expert_intermediate_size=32, norm_topk_prob=True),
        ),
        "qwen3moe": ("qwen3moe", Qwen3MoeConfig(**moe, num_experts_per_tok=3, norm_topk_prob=True, head_dim=40)),
        "mixtral": ("llama", MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)),
    }


def build(case: str, seed: int = 0) -> tiny.Tiny:
    arch, config = configs()[case]
    torch.manual_seed(seed)
    model = Auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inner = -2 if arch == "gpt-oss" and name.endswith(("gate_up_proj", "down_proj")) else -1
            if parameter.ndim > 1 and not name.endswith("_bias"):
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[inner]))
            elif "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.5)
    tensors = {name: value.contiguous().numpy() for name, value in _tensors(arch, config, model).items()}
    return tiny.Tiny(model, tiny._metadata(arch, config) | _metadata(arch, config), tensors)


def _metadata(arch: str, config: PretrainedConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "expert_count": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    if arch != "llama":
        keys["expert_feed_forward_length"] = getattr(config, "moe_intermediate_size", config.intermediate_size)
    if getattr(config, "norm_topk_prob", False) and arch == "qwen2moe":
        keys["expert_weights_norm"] = True
    if arch == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if arch == "gpt-oss":
        keys |= {
            "attention.sliding_window": config.sliding_window,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": YARN["factor"],
            "rope.scaling.original_context_length": YARN["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": YARN["beta_fast"],
            "rope.scaling.yarn_beta_slow": YARN["beta_slow"],
        }
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _tensors(arch: str, config: PretrainedConfig, model: PreTrainedModel) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem in tiny.TOP_NAMES:
            out[f"{tiny.TOP_NAMES[stem]}.{kind}"] = value
            continue
        _, _, layer, inner = name.split(".", 3)
        parts = _gpt_oss_experts(inner, value) if arch == "gpt-oss" else _experts(inner, value)
        for target, part in (parts or {_plain(arch, inner): value}).items():
            if arch == "llama" and target.startswith(("attn_q.", "attn_k.")):
                part = tiny._interleave(part, config, target.split(".")[0])
            out[f"blk.{layer}.{target}"] = part
    return out


def _plain(arch: str, inner: str) -> str:
    stem, _, kind = inner.rpartition(".")
    if inner == "self_attn.sinks":
        return "attn_sinks.weight"
    if arch == "gpt-oss" and stem == "post_attention_layernorm":
        return "post_attention_norm.weight"
    return f"{LAYER_NAMES[stem]}.{kind}"


def _gpt_oss_experts(inner: str, value: Tensor) -> dict[str, Tensor] | None:
    """Checkpoints hold [E, in, out] with gate and up rows in turn; converters transpose and part them."""
    match inner.removeprefix("mlp.experts."):
        case "gate_up_proj":
            rows = value.transpose(1, 2)
            return {"ffn_gate_exps.weight": rows[:, ::2], "ffn_up_exps.weight": rows[:, 1::2]}
        case "gate_up_proj_bias":
            return {"ffn_gate_exps.bias": value[:, ::2], "ffn_up_exps.bias": value[:, 1::2]}
        case "down_proj":
            return {"ffn_down_exps.weight": value.transpose(1, 2)}
        case "down_proj_bias":
            return {"ffn_down_exps.bias": value}
    return None


def _experts(inner: str, value: Tensor) -> dict[str, Tensor] | None:
    match inner.removeprefix("mlp.experts."):
        case "gate_up_proj":
            gate, up = value.chunk(2, 1)
            return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
        case "down_proj":
            return {"ffn_down_exps.weight": value}
    return None
