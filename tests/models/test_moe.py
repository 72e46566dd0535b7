"""Mixtures of experts against transformers: the same random weights, logits to 1e-4 relative."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny, tiny_moe
from tests.models.truth import check_close, tokens
from tests.running import all_logits
from worker_orcd.assemble import draw_up
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.fingerprint import fingerprint
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models.tensors import use_gguf_names

LENGTHS = (1, 7, 64, 300)
DECODE_STEPS = 50
Edit = Callable[[tiny.Tiny], object]


@pytest.mark.parametrize("case", tiny_moe.configs())
def test_logits_agree_with_transformers(case: str, tmp_path: Path) -> None:
    model = tiny_moe.build(case)
    path = model.write(tmp_path / "model.gguf")
    for length in LENGTHS:
        check_close(all_logits(path, tokens(length)), model, tokens(length))


@pytest.mark.parametrize("case", ["gpt-oss", "qwen2moe", "qwen3moe", "mixtral"])
def test_decoding_gives_the_bits_of_a_prompt(case: str, tmp_path: Path) -> None:
    """A token a step, so each row of a step meets its experts alone; then the same rows in company."""
    model = tiny_moe.build(case)
    path = model.write(tmp_path / "model.gguf")
    ids = tokens(64 + DECODE_STEPS)
    one_by_one = all_logits(path, ids, chunk=1)
    assert torch.equal(one_by_one, all_logits(path, ids, chunk=57))
    check_close(one_by_one, model, ids)


def setting(key: str, value: object) -> Edit:
    return lambda model: model.metadata.__setitem__(key, value)


def without(*names: str) -> Edit:
    return lambda model: [model.tensors.pop(name) for name in names]


def reshaped(name: str, *shape: int) -> Edit:
    return lambda model: model.tensors.__setitem__(name, np.zeros(shape, np.float32))


BAD: dict[str, tuple[str, Edit, str]] = {
    "no experts": ("qwen3moe", setting("qwen3moe.expert_count", 0), "qwen3moe.expert_count"),
    "more used than there are": (
        "qwen3moe",
        setting("qwen3moe.expert_used_count", 7),
        "qwen3moe.expert_used_count is 7, but expert_count is 6",
    ),
    "none used": ("mixtral", setting("llama.expert_used_count", 0), "llama.expert_used_count"),
    "number used unknown": (
        "gpt-oss",
        lambda model: model.metadata.pop("gpt-oss.expert_used_count"),
        "gpt-oss.expert_used_count",
    ),
    "one expert too few": (
        "qwen2moe",
        reshaped("blk.1.ffn_up_exps.weight", 5, 64, 96),
        r"blk.1.ffn_up_exps.weight is \[5, 64, 96\], needs \[6, 64, 96\]",
    ),
    "experts of another width": (
        "gpt-oss",
        reshaped("blk.2.ffn_down_exps.weight", 6, 96, 128),
        r"blk.2.ffn_down_exps.weight is \[6, 96, 128\], needs \[6, 96, 160\]",
    ),
    "router of another size": (
        "mixtral",
        reshaped("blk.0.ffn_gate_inp.weight", 8, 96),
        r"blk.0.ffn_gate_inp.weight is \[8, 96\], needs \[4, 96\]",
    ),
    "scaled weights": ("qwen2moe", setting("qwen2moe.expert_weights_scale", 2.5), "qwen2moe.expert_weights_scale"),
    "no router": ("mixtral", without("blk.1.ffn_gate_inp.weight"), "missing tensors: blk.1.ffn_gate_inp.weight"),
    "missing biases": (
        "gpt-oss",
        without("blk.0.attn_q.bias", "blk.1.ffn_gate_exps.bias", "blk.1.ffn_gate_inp.bias", "blk.2.attn_output.bias"),
        "missing tensors: blk.0.attn_q.bias, blk.1.ffn_gate_inp.bias, blk.1.ffn_gate_exps.bias, blk.2.attn_output.b",
    ),
    "missing sinks": ("gpt-oss", without("blk.1.attn_sinks.weight"), "missing tensors: blk.1.attn_sinks.weight"),
    "sinks of another length": (
        "gpt-oss",
        reshaped("blk.1.attn_sinks.weight", 8),
        r"blk.1.attn_sinks.weight is \[8\], needs \[4\]",
    ),
    "window of nothing": ("gpt-oss", setting("gpt-oss.attention.sliding_window", 0), "attention.sliding_window"),
    "shared expert missing": (
        "qwen2moe",
        without("blk.0.ffn_down_shexp.weight"),
        "missing tensors: blk.0.ffn_down_shexp.weight",
    ),
    "betas the wrong way round": (
        "gpt-oss",
        setting("gpt-oss.rope.scaling.yarn_beta_slow", 5.0),
        "yarn_beta_slow",
    ),
    "experts where there are none": (
        "mixtral",
        lambda model: model.metadata.pop("llama.expert_count"),
        "does not use: blk.0.ffn_",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    kind, edit, reason = BAD[case]
    model = tiny_moe.build(kind)
    edit(model)
    path = model.write(tmp_path / "bad.gguf")
    with pytest.raises(ModelLoadFailed, match=reason):
        draw_up(WorkerConfig(model=path))


def test_an_expert_width_the_file_does_not_state(tmp_path: Path) -> None:
    """Early qwen2moe files lack the keys of widths."""
    model = tiny_moe.build("qwen2moe")
    stated = model.write(tmp_path / "stated.gguf")
    for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        model.metadata.pop(f"qwen2moe.{key}")
    model.metadata["qwen2moe.feed_forward_length"] = 96
    silent = model.write(tmp_path / "silent.gguf")
    assert torch.equal(all_logits(stated, [5, 6, 7]), all_logits(silent, [5, 6, 7]))


def split_up(model: tiny.Tiny) -> None:
    """As files of 2023 have them: a matrix an expert, those of gate, down and up taking turns."""
    stacked = {name: model.tensors.pop(name) for name in list(model.tensors) if "_exps." in name}
    for layer in range(2):
        for expert in range(4):
            for kind in ("gate", "down", "up"):
                matrix = stacked[f"blk.{layer}.ffn_{kind}_exps.weight"][expert]
                model.tensors[f"blk.{layer}.ffn_{kind}.{expert}.weight"] = matrix


def test_a_matrix_an_expert_is_as_good_as_all_in_one(tmp_path: Path) -> None:
    model = tiny_moe.build("mixtral")
    stacked, ids = model.write(tmp_path / "stacked.gguf"), tokens(40)
    expected = all_logits(stacked, ids)
    whole = model.tensors["blk.1.ffn_down_exps.weight"].tobytes()
    split_up(model)
    path = model.write(tmp_path / "split.gguf")
    assert torch.equal(all_logits(path, ids), expected)
    with GgufFile.open(path) as gguf:
        use_gguf_names(gguf)
        info = gguf.tensors["blk.1.ffn_down_exps.weight"]
        assert (info.shape, info.nbytes) == ((4, 96, 160), len(whole))
        size = len(whole) // 4
        for start, length in (
            (0, len(whole)),
            (size - 8, 16),
            (size, size),
            (5, 3 * size),
            (len(whole) - 1, 1),
            (7, 0),
        ):
            assert bytes(gguf.read(info.name, start=start, length=length)) == whole[start : start + length]
        mark = fingerprint(gguf)
    model.tensors["blk.1.ffn_down.2.weight"][0, 0] += 1
    with GgufFile.open(model.write(tmp_path / "other.gguf")) as gguf:
        use_gguf_names(gguf)
        assert fingerprint(gguf) != mark, "each part counts"


UNLIKE: dict[str, tuple[Edit, str]] = {
    "one is missing": (without("blk.1.ffn_up.2.weight"), "missing tensors: .*blk.1.ffn_up_exps.weight"),
    "another shape": (
        reshaped("blk.0.ffn_down.3.weight", 96, 128),
        r"blk.0.ffn_down.3.weight is F32 \[96, 128\], but blk.0.ffn_down.0.weight is F32 \[96, 160\]",
    ),
    "both forms": (
        reshaped("blk.0.ffn_gate_exps.weight", 4, 160, 96),
        "does not use: blk.0.ffn_gate.0.weight, blk.0.ffn_gate.1",
    ),
    "one too many": (
        reshaped("blk.0.ffn_gate.4.weight", 160, 96),
        r"blk.0.ffn_gate_exps.weight is \[5, 160, 96\], needs \[4, 160, 96\]",
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_experts_apart_are_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    edit, reason = UNLIKE[case]
    model = tiny_moe.build("mixtral")
    split_up(model)
    edit(model)
    path = model.write(tmp_path / "bad.gguf")
    with pytest.raises(ModelLoadFailed, match=reason):
        draw_up(WorkerConfig(model=path))


def test_a_flat_gate_of_the_shared_expert(tmp_path: Path) -> None:
    """Converters of other years wrote [K] where others wrote [1, K]."""
    model = tiny_moe.build("qwen2moe")
    square = model.write(tmp_path / "square.gguf")
    for i in range(2):
        name = f"blk.{i}.ffn_gate_inp_shexp.weight"
        model.tensors[name] = model.tensors[name].reshape(-1)
    flat = model.write(tmp_path / "flat.gguf")
    assert torch.equal(all_logits(square, [5, 6, 7]), all_logits(flat, [5, 6, 7]))
