"""Files of the dense families that must be refused, with the name of the key or tensor that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import tiny, tiny_dense
from worker_orcd.assemble import draw_up
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import ModelLoadFailed

Edit = Callable[[tiny.Tiny], object]


def setting(key: str, value: object) -> Edit:
    return lambda model: model.metadata.__setitem__(key, value)


def without(*names: str) -> Edit:
    return lambda model: [model.tensors.pop(name) for name in names]


def cut(name: str, rows: int) -> Edit:
    return lambda model: model.tensors.__setitem__(name, model.tensors[name][:rows])


def transposed(name: str) -> Edit:
    return lambda model: model.tensors.__setitem__(name, np.ascontiguousarray(model.tensors[name].T))


CASES: list[tuple[str, Edit, str]] = [
    ("mistral", setting("llama.attention.head_count", 7), "head_count 7 does not divide 96"),
    ("mistral", setting("llama.attention.head_count_kv", 3), "4 heads are no multiple of 3"),
    ("mistral", setting("llama.vocab_size", 400), "token_embd.weight has 321 rows, but llama.vocab_size is 400"),
    ("mistral", cut("token_embd.weight", 300), "token_embd.weight has 300 rows, tokenizer.ggml.tokens 321"),
    ("mistral", cut("output.weight", 300), r"output.weight is \[300, 96\], needs \[321, 96\]"),
    ("mistral", setting("llama.hidden_activation", "swoosh"), "llama.hidden_activation is 'swoosh'"),
    ("mistral3", setting("mistral3.rope.scaling.type", "none"), "temperature_scale needs .*original_context_length"),
    ("mistral", setting("llama.attention.clamp_kqv", 8.0), "llama.attention.clamp_kqv is not zero"),
    ("phi3-longrope", without("rope_factors_short.weight"), "missing tensors: rope_factors_short.weight"),
    ("phi3-longrope", cut("rope_factors_long.weight", 8), r"rope_factors_long.weight is \[8\], needs \[9\]"),
    ("phi3-window", setting("phi3.rope.scaling.type", "longrope"), "missing tensors: rope_factors_long.weight"),
    ("gemma2", setting("gemma2.attention.sliding_window", 0), "gemma2.attention.sliding_window.* smallest .* 1"),
    ("gemma2", setting("gemma2.attn_logit_softcapping", -1.0), "gemma2.attn_logit_softcapping"),
    ("gemma2", without("blk.1.post_ffw_norm.weight"), "missing tensors: blk.1.post_ffw_norm.weight"),
    ("mistral", setting("llama.attention.causal", False), "llama.attention.causal is false"),
    ("gemma3", without("blk.6.attn_k_norm.weight"), "missing tensors: blk.6.attn_k_norm.weight"),
    ("gemma3", setting("gemma3.rope.freq_base_swa", 0.0), "gemma3.rope.freq_base_swa"),
    ("olmo3", setting("olmo2.attention.sliding_window_pattern", [True]), "sliding_window_pattern must say yes or no"),
    ("olmo2", cut("blk.0.attn_q_norm.weight", 24), r"blk.0.attn_q_norm.weight is \[24\], needs \[96\]"),
    ("granite", setting("granite.logit_scale", 0.0), "granite.logit_scale"),
    ("granite", setting("granite.residual_scale", float("nan")), "granite.residual_scale"),
    ("smollm3", without("blk.3.attn_q.weight"), "missing tensors: blk.3.attn_q.weight"),
    ("gpt2", without("blk.0.attn_qkv.bias"), "missing tensors: blk.0.attn_qkv.bias"),
    ("gpt2", without("blk.1.ffn_norm.bias"), "missing tensors: blk.1.ffn_norm.bias"),
    ("gpt2", without("position_embd.weight"), "missing tensors: position_embd.weight"),
    ("gpt2", cut("position_embd.weight", 511), r"position_embd.weight is \[511, 96\], needs \[512, 96\]"),
    ("gpt2", transposed("blk.0.attn_qkv.weight"), r"attn_qkv.weight is \[96, 288\], needs \[288, 96\]"),
    ("gpt2", setting("gpt2.attention.head_count", 5), "gpt2.attention.head_count 5 does not divide 96"),
]


@pytest.mark.parametrize(("case", "edit", "reason"), CASES)
def test_refused_by_name(case: str, edit: Edit, reason: str, tmp_path: Path) -> None:
    model = tiny_dense.build(case)
    edit(model)
    with pytest.raises(ModelLoadFailed, match=reason):
        draw_up(WorkerConfig(model=model.write(tmp_path / "bad.gguf"), device="cpu"))
