"""Dense families against transformers: the same random weights, logits to 1e-4 relative."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from tests import tiny_dense
from tests.models.truth import check_close, tokens
from tests.running import all_logits, runtime_of
from worker_orcd.assemble import draw_up
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.score import score
from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf
from worker_orcd.models.rope import RopeSpec, rotation_table
from worker_orcd.models.spec import read_spec

LENGTHS = (1, 7, 64, 300)
DECODE_STEPS = 50


@pytest.mark.parametrize("case", tiny_dense.configs())
def test_logits_agree_with_transformers(case: str, tmp_path: Path) -> None:
    model = tiny_dense.build(case)
    runtime = runtime_of(model.write(tmp_path / "model.gguf"))
    for length in LENGTHS:
        if case != "phi3-longrope" or length > tiny_dense.ORIGINAL_CONTEXT:
            check_close(score(runtime, tokens(length), 128), model, tokens(length))
    ids = tokens(64 + DECODE_STEPS)
    in_company = score(runtime, ids, 57)
    assert torch.equal(score(runtime, ids, 1), in_company), "a token a step"
    check_close(in_company, model, ids)


def test_longrope_takes_the_short_factors_for_a_short_context(tmp_path: Path) -> None:
    model = tiny_dense.build("phi3-longrope")
    short = runtime_of(model.write(tmp_path / "model.gguf"), context_length=tiny_dense.ORIGINAL_CONTEXT)
    for length in (1, 7, 64):
        check_close(score(short, tokens(length), 128), model, tokens(length))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_of_a_rotation_are_above_zero(wrong: float) -> None:
    factors = np.array([1.0, wrong, 8.0], np.float32)
    with pytest.raises(ModelLoadFailed, match=r"tensor rope_freqs\.weight has factors that are not above 0"):
        rotation_table(RopeSpec(10000.0, 6), factors, 16)


def test_gpt2_with_the_names_of_its_checkpoint(tmp_path: Path) -> None:
    model = tiny_dense.build("gpt2-own-head")
    expected = all_logits(model.write(tmp_path / "gguf.gguf"), tokens(7))
    back = {v: k for k, v in (tiny_dense.GPT_NAMES | tiny_dense.GPT_TOP | {"lm_head": "output"}).items()}
    renamed = {}
    for name, value in model.tensors.items():
        stem, kind = name.rsplit(".", 1)
        layer = stem.split(".")[1] if stem.startswith("blk.") else None
        inner = back[stem if layer is None else stem.split(".", 2)[2]]
        renamed[f"{inner}.{kind}" if layer is None else f"transformer.h.{layer}.{inner}.{kind}"] = value
    model.tensors = renamed | {"transformer.h.0.attn.bias": np.zeros((1, 1, 4, 4), np.float32)}  # the causal mask
    assert "transformer.h.1.mlp.c_fc.weight" in renamed
    assert torch.equal(all_logits(model.write(tmp_path / "prefixed.gguf"), tokens(7)), expected)
    model.tensors = {name.removeprefix("transformer."): value for name, value in model.tensors.items()}
    model.metadata = {
        key.replace("gpt2.", "gpt.") if key.startswith("gpt2.") else key: value
        for key, value in model.metadata.items()
    } | {"general.architecture": "gpt"}
    assert torch.equal(all_logits(model.write(tmp_path / "plain.gguf"), tokens(7)), expected)


def test_gpt2_with_the_exact_gelu(tmp_path: Path) -> None:
    model = tiny_dense.build("gpt2")
    for block in model.model.transformer.h:
        block.mlp.act = torch.nn.GELU()
    model.metadata["gpt2.hidden_activation"] = "gelu"
    check_close(all_logits(model.write(tmp_path / "exact.gguf"), tokens(64)), model, tokens(64))


@pytest.mark.parametrize("case", ["mistral", "gemma2", "gpt2"])
def test_mxfp4_reaches_every_matrix(case: str, tmp_path: Path) -> None:
    """Embedding, positions, attention, MLP and head in MXFP4, beside the same values in float32."""
    model = tiny_dense.build(case)
    rows: list[tuple[str, tuple[int, ...], GgmlType, np.ndarray]] = []
    for name, value in model.tensors.items():
        if value.ndim == 2:
            stored = quants.quantize(value, GGMLQuantizationType.MXFP4)
            model.tensors[name] = quants.dequantize(stored, GGMLQuantizationType.MXFP4)
            rows.append((name, value.shape, GgmlType.MXFP4, stored))
        else:
            rows.append((name, value.shape, GgmlType.F32, value))
    write_gguf(tmp_path / "mxfp4.gguf", model.metadata, rows)
    expected = all_logits(model.write(tmp_path / "float32.gguf"), tokens(64))
    assert torch.equal(all_logits(tmp_path / "mxfp4.gguf", tokens(64)), expected)


@pytest.mark.parametrize(
    ("case", "layers", "scale"), [("gemma2", 46, 24**-0.5), ("gemma2", 42, 32**-0.5), ("gemma3", 62, 24**-0.5)]
)
def test_one_size_of_gemma_scales_by_its_width(case: str, layers: int, scale: float, tmp_path: Path) -> None:
    model = tiny_dense.build(case)  # width 96, 4 heads of 32
    model.metadata[f"{case}.block_count"] = layers
    spec = read_spec(GgufFile.open(model.write(tmp_path / "model.gguf")))
    assert spec.attn_scale == pytest.approx(scale)
    assert (len(spec.windows), spec.windows[:2]) == (layers, (20, 0) if case == "gemma2" else (20, 20))


@pytest.mark.parametrize("pattern", [3, [True, True, False, True, True]])
def test_a_file_may_say_which_layers_have_a_window(pattern: object, tmp_path: Path) -> None:
    model = tiny_dense.build("olmo3")
    model.metadata["olmo2.attention.sliding_window_pattern"] = pattern
    spec = read_spec(GgufFile.open(model.write(tmp_path / "model.gguf")))
    assert spec.windows == (20, 20, 0, 20, 20)


@pytest.mark.parametrize("case", tiny_dense.configs())
def test_the_facts_that_health_tells(case: str, tmp_path: Path) -> None:
    blueprint = draw_up(WorkerConfig(model=tiny_dense.build(case).write(tmp_path / "model.gguf"), device="cpu"))
    spec = blueprint.spec
    assert (spec.architecture, spec.vocab_size) == (tiny_dense.configs()[case][0], 321)
    assert (blueprint.context_length, blueprint.gguf.quant_kind) == (512, "F32")
