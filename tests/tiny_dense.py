"""Tiny random models of dense families beyond tests/tiny.py, laid out as the real converters lay them out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    Ministral3Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    SmolLM3Config,
)

from tests import tiny

ORIGINAL_CONTEXT = 64  # of longrope: longer contexts take the long factors
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
    "short_factor": [1.0 + 0.05 * i for i in range(9)],
    "long_factor": [1.5 + 0.5 * i for i in range(9)],
    "partial_rotary_factor": 0.75,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
TEMPERATURE = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
NORMS_AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GPT_TOP = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}


def configs() -> dict[str, tuple[str, PretrainedConfig]]:
    """Case → (GGUF architecture, transformers configuration); windows are shorter than the prompts."""
    common = tiny.COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": True}
    long = common | {"tie_word_embeddings": False, "original_max_position_embeddings": ORIGINAL_CONTEXT}
    gemma = common | {"head_dim": 32, "query_pre_attn_scalar": 32}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    gemma3_rope, olmo3_rope = ({"full_attention": rope, "sliding_attention": plain} for rope in (LINEAR, YARN))
    olmo3 = common | {"num_hidden_layers": 5, "sliding_window": 20, "rope_parameters": olmo3_rope}
    granite = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0625, "residual_multiplier": 0.22}
    gpt = {k: common[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "tie_word_embeddings")}
    gpt |= {"n_embd": 96, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 160}
    return {
        "mistral": ("llama", MistralConfig(**common | {"tie_word_embeddings": False}, sliding_window=None)),
        "mistral3": ("mistral3", Ministral3Config(**common, head_dim=32, rope_parameters=YARN | TEMPERATURE)),
        "llama-window": ("llama", MistralConfig(**common, sliding_window=20)),
        "phi3-window": ("phi3", Phi3Config(**common, sliding_window=24)),
        "phi3-longrope": ("phi3", Phi3Config(**long, rope_parameters=LONGROPE)),
        "gemma": ("gemma", GemmaConfig(**common, head_dim=32)),
        "gemma2": ("gemma2", Gemma2Config(**gemma, **caps, sliding_window=20)),
        "gemma3": (
            "gemma3",
            Gemma3TextConfig(**gemma | {"num_hidden_layers": 7}, sliding_window=20, rope_parameters=gemma3_rope),
        ),
        "gemma3-whole": (  # a file that says nothing of windows has none
            "gemma3",
            Gemma3TextConfig(**gemma, layer_types=["full_attention"] * 2, rope_parameters=gemma3_rope),
        ),
        "olmo2": ("olmo2", Olmo2Config(**common)),
        "olmo3": ("olmo2", Olmo3Config(**olmo3)),
        "granite": ("granite", GraniteConfig(**common, **granite, logits_scaling=8.0)),
        "smollm3": ("smollm3", SmolLM3Config(**common | {"num_hidden_layers": 5})),
        "gpt2": ("gpt2", GPT2Config(**gpt)),
        "gpt2-own-head": ("gpt2", GPT2Config(**gpt | {"tie_word_embeddings": False})),
    }


def build(case: str, seed: int = 0) -> tiny.Tiny:
    arch, config = configs()[case]
    torch.manual_seed(seed)
    model = Auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter.shape[0 if arch == "gpt2" and ".h." in name else -1]
                scale = math.sqrt(config.hidden_size) if "embed" in name and arch.startswith("gemma") else 1.0
                parameter.normal_(0.0, 1.5 / math.sqrt(fan_in) / scale)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    tensors = {name: value.contiguous().numpy() for name, value in _tensors(arch, config, model).items()}
    return tiny.Tiny(model, _metadata(arch, config), tensors)


def _metadata(arch: str, config: PretrainedConfig) -> dict[str, Any]:
    if arch == "gpt2":
        return _gpt_metadata(config)
    if "full_attention" in config.rope_parameters:
        config.rope_parameters |= config.rope_parameters["full_attention"]
    metadata = tiny._metadata(arch, config)
    is_whole = set(getattr(config, "layer_types", None) or ()) == {"full_attention"}
    keys = {
        "attention.sliding_window": None if is_whole else getattr(config, "sliding_window", None) or None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    if arch == "phi3":
        keys["attention.sliding_window"] = config.sliding_window or 0
        keys["rope.scaling.original_context_length"] = ORIGINAL_CONTEXT
        if config.rope_parameters["rope_type"] == "longrope":
            ratio = config.max_position_embeddings / ORIGINAL_CONTEXT
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(ORIGINAL_CONTEXT))
            metadata["phi3.rope.dimension_count"] = 18
    if config.rope_parameters["rope_type"] == "yarn":
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = "yarn", YARN["factor"]
        keys["rope.scaling.original_context_length"] = YARN["original_max_position_embeddings"]
    if arch == "mistral3":
        keys["rope.scaling.yarn_log_multiplier"] = config.rope_parameters["mscale_all_dim"]
        keys["attention.temperature_scale"] = config.rope_parameters["llama_4_scaling_beta"]
    if arch == "granite":
        keys["embedding_scale"], keys["residual_scale"] = config.embedding_multiplier, config.residual_multiplier
        keys["attention.scale"], keys["logit_scale"] = config.attention_multiplier, config.logits_scaling
    if arch in ("llama", "granite", "smollm3", "phi3", "gpt2"):  # older converters of these write no head size
        del metadata[f"{arch}.attention.key_length"], metadata[f"{arch}.attention.value_length"]
    return metadata | {f"{arch}.{key}": value for key, value in keys.items() if value is not None}


def _gpt_metadata(config: PretrainedConfig) -> dict[str, Any]:
    _, like = tiny.configs()["llama"]
    kept = {k: v for k, v in tiny._metadata("gpt2", like).items() if "rope" not in k and "attention" not in k}
    return kept | {"gpt2.attention.head_count": config.n_head, "gpt2.attention.layer_norm_epsilon": 1e-5}


def _tensors(arch: str, config: PretrainedConfig, model: PreTrainedModel) -> dict[str, Tensor]:
    norms = NORMS_AROUND if arch in ("gemma2", "gemma3", "olmo2") else {}
    names = tiny.LAYER_NAMES | norms | GPT_NAMES
    tops = tiny.TOP_NAMES | GPT_TOP
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        if stem in tops:
            if not (config.tie_word_embeddings and stem == "lm_head"):
                out[f"{tops[stem]}.{kind}"] = value
        else:
            _, _, layer, inner = stem.split(".", 3)
            target = names[inner]
            if arch in ("llama", "mistral3", "granite", "smollm3") and target in ("attn_q", "attn_k"):
                value = tiny._interleave(value, config, target)
            out[f"blk.{layer}.{target}.{kind}"] = value.mT if arch == "gpt2" and value.ndim == 2 else value
    if arch.startswith("gemma"):
        out = {name: value + 1.0 if "norm" in name else value for name, value in out.items()}
    if arch == "phi3" and config.rope_parameters["rope_type"] == "longrope":
        for kind in ("long", "short"):
            out[f"rope_factors_{kind}.weight"] = torch.tensor(config.rope_parameters[f"{kind}_factor"])
    return out
