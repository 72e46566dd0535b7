"""Tiny random models: built with transformers, exported to GGUF with our writer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, Phi3Config, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

COMMON: dict[str, Any] = {
    "vocab_size": 321,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def configs(**sizes: int) -> dict[str, tuple[str, PretrainedConfig]]:
    """Case → (GGUF architecture, transformers configuration); `sizes` replace COMMON's."""
    common = COMMON | sizes
    return {
        "llama": ("llama", LlamaConfig(**common, num_key_value_heads=2, tie_word_embeddings=False)),
        "llama3-rope": ("llama", LlamaConfig(**common, num_key_value_heads=1, rope_parameters=LLAMA3_ROPE)),
        "llama-tied": ("llama", LlamaConfig(**common, num_key_value_heads=4, tie_word_embeddings=True)),
        "qwen2": ("qwen2", Qwen2Config(**common, num_key_value_heads=2, tie_word_embeddings=True)),
        "qwen3": (
            "qwen3",
            Qwen3Config(**{"head_dim": 40, **common}, num_key_value_heads=2, tie_word_embeddings=False),
        ),
        "llama-linear-rope": ("llama", LlamaConfig(**common, num_key_value_heads=2, rope_parameters=LINEAR_ROPE)),
        "llama-biases": (
            "llama",
            LlamaConfig(
                **common, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
            ),
        ),
        "phi3": ("phi3", Phi3Config(**common, num_key_value_heads=4, tie_word_embeddings=False)),
    }


@dataclass
class Tiny:
    """A transformers model and the same weights as GGUF metadata and float32 tensors."""

    model: PreTrainedModel
    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def write(self, path: Path) -> Path:
        rows = [(n, a.shape, GgmlType.F32, a) for n, a in self.tensors.items()]
        write_gguf(path, self.metadata, rows)
        return path


def build(case: str, seed: int = 0, **sizes: int) -> Tiny:
    arch, config = configs(**sizes)[case]
    torch.manual_seed(seed)
    model = Auto.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the defaults are so small that every logit is nearly zero
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return Tiny(model, _metadata(arch, config), _tensors(arch, config, model))


def _metadata(arch: str, config: PretrainedConfig) -> dict[str, Any]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    names = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # llama.cpp looks these up in a phi3 file
    names += [f"<{i}>" for i in range(256 + len(names), config.vocab_size)]
    vocab = [*printable_bytes(), *names]
    rope = config.rope_parameters
    scaling = {f"{arch}.rope.scaling.factor": rope["factor"]} if rope.get("rope_type") == "linear" else {}
    return scaling | {
        "general.architecture": arch,
        "general.name": f"tiny {arch}",
        "general.file_type": 0,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.rope.dimension_count": head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [1] * len(vocab),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 2,
    }


def printable_bytes() -> list[str]:
    """The 256 letters byte-level BPE writes bytes with."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in range(256)]


def _tensors(arch: str, config: PretrainedConfig, model: PreTrainedModel) -> dict[str, np.ndarray]:
    tied = bool(config.tie_word_embeddings)
    out: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        if stem in TOP_NAMES:
            if not (tied and stem == "lm_head"):
                out[f"{TOP_NAMES[stem]}.{kind}"] = value.numpy()
            continue
        _, _, layer, inner = stem.split(".", 3)
        target = LAYER_NAMES[inner]
        if arch == "llama" and target in ("attn_q", "attn_k"):
            value = _interleave(value, config, target)
        out[f"blk.{layer}.{target}.{kind}"] = value.numpy()
    if config.rope_parameters.get("rope_type") == "llama3":
        out["rope_freqs.weight"] = _llama3_factors(config)
    return out


def _interleave(weight: torch.Tensor, config: PretrainedConfig, target: str) -> torch.Tensor:
    """Rows of each head from half-split to interleaved order, as llama.cpp's converter stores them."""
    heads = config.num_attention_heads if target == "attn_q" else config.num_key_value_heads
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def _llama3_factors(config: PretrainedConfig) -> np.ndarray:
    """What each frequency is divided by (Llama 3.1 model card: low, high and smooth bands)."""
    rope = config.rope_parameters
    dim = config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    wavelength = 2 * math.pi / frequencies
    original = rope["original_max_position_embeddings"]
    smooth = (original / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1.0 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
