"""GPT-OSS's own parts: rotation by YaRN, windows in turn, the types its files come in, its other name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests import tiny, tiny_dense, tiny_moe
from tests.running import all_logits
from worker_orcd.assemble import draw_up
from worker_orcd.config import WorkerConfig
from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf
from worker_orcd.models.rope import RopeSpec, rotation_table, yarn_bounds

YARN = RopeSpec(150_000.0, 64, "yarn", 32.0, 4096, attn_factor=0.1 * np.log(32.0) + 1.0)
IDS = [5, 17, 203, 64, 99, 131, 7, 250, 301, 12, 12, 45, 88, 160, 222, 3]


@pytest.mark.parametrize(("is_rounded", "bounds"), [(False, (8.0928, 17.3980)), (True, (8.0, 18.0))])
def test_yarn_as_published(is_rounded: bool, bounds: tuple[float, float]) -> None:
    spec = replace(YARN, is_rounded=is_rounded)
    assert yarn_bounds(spec) == pytest.approx(bounds, abs=1e-4)
    config = GptOssConfig()
    config.rope_parameters |= {"truncate": is_rounded}
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert factor == pytest.approx(1.3466, abs=1e-4)
    cos, sin = rotation_table(spec, None, 2)
    np.testing.assert_allclose(np.arctan2(sin[1], cos[1]), frequencies, rtol=1e-5)
    np.testing.assert_allclose(np.hypot(cos, sin), factor, rtol=1e-6)


def test_what_the_file_says_of_yarn_is_what_is_used(tmp_path: Path) -> None:
    model = tiny_moe.build("gpt-oss")
    rope = draw_up(WorkerConfig(model=model.write(tmp_path / "a.gguf"))).spec.rope
    assert rope == RopeSpec(1500.0, 32, "yarn", 8.0, 64, pytest.approx(0.1 * np.log(8) + 1), (4.0, 1.0))  # type: ignore[arg-type]
    qwen = tiny.build("qwen2")
    qwen.metadata |= {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    rope = draw_up(WorkerConfig(model=qwen.write(tmp_path / "b.gguf"))).spec.rope
    assert (rope.is_rounded, rope.betas, rope.original_context) == (True, (32.0, 1.0), 512)


def test_every_other_layer_has_a_window(tmp_path: Path) -> None:
    model = tiny_moe.build("gpt-oss")
    assert draw_up(WorkerConfig(model=model.write(tmp_path / "a.gguf"))).spec.windows == (24, 0, 24)
    model.metadata.pop("gpt-oss.attention.sliding_window")
    assert draw_up(WorkerConfig(model=model.write(tmp_path / "b.gguf"))).spec.windows == (128, 0, 128)


def test_the_other_name_of_the_architecture(tmp_path: Path) -> None:
    model = tiny_moe.build("gpt-oss")
    path = model.write(tmp_path / "a.gguf")
    renamed = {key.replace("gpt-oss.", "gptoss."): value for key, value in model.metadata.items()}
    model.metadata = renamed | {"general.architecture": "gptoss"}
    assert torch.equal(all_logits(path, IDS), all_logits(model.write(tmp_path / "b.gguf"), IDS))


TYPES = {  # of experts, of other matrices, of the head
    "MXFP4": (GgmlType.MXFP4, GgmlType.Q8_0, GgmlType.Q8_0),
    "Q4_0": (GgmlType.MXFP4, GgmlType.Q4_0, GgmlType.Q8_0),
    "Q4_K_M": (GgmlType.MXFP4, GgmlType.Q5_0, GgmlType.Q8_0),
    "all MXFP4": (GgmlType.MXFP4,) * 3,
    "experts not MXFP4": (GgmlType.Q5_1, GgmlType.BF16, GgmlType.F16),
}


def check_types(model: tiny.Tiny, types: tuple[GgmlType, GgmlType, GgmlType], folder: Path) -> None:
    """A file in these types gives the bits of the float32 file that another reader makes of its numbers."""
    experts, others, head = types
    rows, plain = [], []
    for name, values in model.tensors.items():
        kind = experts if "_exps.weight" in name else head if name == "output.weight" else others
        if values.ndim < 2 or name.endswith(".bias") or "_inp" in name or name.startswith("position_embd"):
            kind = GgmlType.F32
        stored = quantize(values, GGMLQuantizationType(kind.value))
        rows.append((name, values.shape, kind, stored))
        back = dequantize(stored, GGMLQuantizationType(kind.value)).astype(np.float32)
        plain.append((name, values.shape, GgmlType.F32, back.reshape(values.shape)))
    write_gguf(folder / "quantized.gguf", model.metadata, rows)
    write_gguf(folder / "plain.gguf", model.metadata, plain)
    assert torch.equal(all_logits(folder / "quantized.gguf", IDS), all_logits(folder / "plain.gguf", IDS))


@pytest.mark.parametrize("types", TYPES)
def test_each_tensor_is_of_its_own_type(types: str, tmp_path: Path) -> None:
    check_types(tiny_moe.build("gpt-oss"), TYPES[types], tmp_path)


@pytest.mark.parametrize("build", [lambda: tiny.build("qwen2"), lambda: tiny_dense.build("gpt2")])
def test_mxfp4_in_every_matrix_of_a_dense_model(build: Callable[[], tiny.Tiny], tmp_path: Path) -> None:
    check_types(build(), TYPES["all MXFP4"], tmp_path)
