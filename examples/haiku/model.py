"""A small qwen2: the decoder that the engine and llama.cpp know under that name, in plain torch.

Shapes: B sequences, T positions, D width, H heads. Linear weights are fake-quantized to 4 bits while training,
so that the network learns to live with what Q4_K will do to it.
"""

from __future__ import annotations

import torch
from config import Config
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 32  # weights that share a scale and a minimum, as in Q4_K


def fake_quantize(weight: Tensor) -> Tensor:
    """Round each block of 32 to 16 levels between its extremes; gradients pass straight through."""
    blocks = weight.detach().float().reshape(-1, BLOCK)
    low = blocks.amin(1, keepdim=True).clamp(max=0)
    scale = ((blocks.amax(1, keepdim=True) - low) / 15).clamp(min=1e-8)
    rounded = ((blocks - low) / scale).round() * scale + low
    return weight + (rounded.reshape(weight.shape) - weight.detach())


class Linear(nn.Linear):
    """A linear layer that sees its weight as Q4_K would store it while training."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, fake_quantize(self.weight) if self.training else self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions on the halves of each head; x [B,H,T,D], positions 0 … T-1."""
    half = x.shape[-1] // 2
    inverse = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    left, right = x.float().split(half, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_size
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn_q = Linear(config.width, config.width)
        self.attn_k = Linear(config.width, kv_width)
        self.attn_v = Linear(config.width, kv_width)
        self.attn_output = Linear(config.width, config.width, bias=False)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_gate = Linear(config.width, config.hidden, bias=False)
        self.ffn_up = Linear(config.width, config.hidden, bias=False)
        self.ffn_down = Linear(config.hidden, config.width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, -1, self.config.head_size)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.attn_q, self.attn_k, self.attn_v))
        q, k = rotate(q, self.config.rope_base), rotate(k, self.config.rope_base)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.attn_output(out.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.attn_norm(x))
        h = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Qwen2(nn.Module):
    """Token ids [B,T] to logits [B,T,V]; the head is the embedding. Parameters carry their GGUF names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.vocab_size, config.width)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_norm = RMSNorm(config.width, config.norm_eps)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else 0.04)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def features(self, tokens: Tensor) -> Tensor:
        x = self.token_embd(tokens).float()
        for block in self.blk:
            x = block(x)
        return self.output_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.linear(self.features(tokens), self.token_embd.weight)


@torch.no_grad()
def generate(model: Qwen2, prompt: list[int], stop: int, count: int, temperature: float = 0.7) -> list[list[int]]:
    """`count` continuations of a prompt, without `stop`, at most 64 tokens each; recomputes every step."""
    device = model.token_embd.weight.device
    rows = torch.tensor([prompt] * count, device=device)
    for _ in range(64):
        logits = model(rows)[:, -1].float()
        chances = torch.softmax(logits / temperature, -1)
        rows = torch.cat([rows, torch.multinomial(chances, 1)], dim=1)
        if (rows[:, len(prompt) :] == stop).any(1).all():
            break
    ends = (row[len(prompt) :].tolist() for row in rows)
    return [row[: row.index(stop)] if stop in row else row for row in ends]
