"""Every family on the CUDA backend: near the truth, and the same bits however its texts are cut into steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests import tiny, tiny_dense, tiny_moe
from tests.gpu.conftest import ON_EMULATED, ON_GPU
from tests.gpu.models import backend_on, divergence, last_row, random_text, runtime_on, walk
from tests.kernels.test_graphs import recorder
from tests.models.test_gpt_oss import check_types
from worker_orcd.backends.base import PackedWeight
from worker_orcd.backends.torch_ref import TorchBackend
from worker_orcd.engine.graphs import Graphs
from worker_orcd.engine.runtime import Runtime
from worker_orcd.gguf.types import GgmlType
from worker_orcd.synthetic import parse_name, write_synthetic

SOURCES: dict[str, ModuleType] = {
    case: module for module in (tiny, tiny_dense, tiny_moe) for case in module.configs()
}
CONTEXT = 512
EMULATED = ("phi3-longrope", "granite", "olmo2", "gpt2", "mixtral", "qwen2moe", "qwen3moe")
UNIFORM = (GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.MXFP4)
TRUE_SHAPES = (
    "qwen2.5-0.5b:Q4_K_M",
    "llama-3.1-8b:Q4_K_M",
    "phi-3-mini:Q4_K_M",
    "gpt2:Q8_0",
    "gpt-oss-20b:MXFP4",
    "gpt-oss-20b:Q4_0",
    "qwen3-8b:Q6_K",
    "llama-3.2-1b:BF16",
)
EMULATED_WIDE = ("gpt-oss",)
LENGTHS = {"cuda": (300, 130, 64, 17, 1), "emulated": (20, 9, 1)}
SIZES = {"cuda": ((1,), (7,), (33,), (300,)), "emulated": ((1,), (7,))}
RECORDED = {"cuda": 90, "emulated": 1}  # steps
MIXES = {"cuda": ((300, 1, 7), (1,), (33, 5, 2, 1), (64,)), "emulated": ((7, 1, 3),)}


def families() -> list[object]:
    """Case, device, and whether heads are such as the tensor cores take; phi3-longrope has factors for others."""
    found: list[object] = [pytest.param(case, "emulated", False, marks=ON_EMULATED) for case in EMULATED]
    found += [pytest.param(case, "emulated", True, marks=ON_EMULATED) for case in EMULATED_WIDE]
    for case in SOURCES:
        for is_wide in (False, True)[: 1 if case == "phi3-longrope" else 2]:
            found.append(pytest.param(case, "cuda", is_wide, marks=ON_GPU))
    return found


class Rounded(TorchBackend):
    """What plain torch gives with operands in bfloat16 and sums in float32."""

    def _product(self, x: Tensor, weight: PackedWeight) -> Tensor:
        matrix = weight.parts[0].bfloat16().float()
        return super()._product(x.bfloat16().float(), PackedWeight(weight.type, weight.shape, (matrix,)))


def write_tiny(case: str, folder: Path, has_wide_heads: bool) -> Path:
    """A tiny model of the family; with heads of 32 numbers, which the tensor cores take, or of 24."""
    module = SOURCES[case]
    arch, config = module.configs()[case]
    if has_wide_heads and arch == "gpt2":
        config.n_head = 3
    elif has_wide_heads:
        config.hidden_size, config.head_dim = 128, 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "configs", lambda **_: {case: (arch, config)})
        return module.build(case).write(folder / f"{case}.gguf")  # type: ignore[no-any-return]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(found, expected, strict=True))


def check_truth(path: Path, runtime: Runtime, ids: list[int], found: Tensor) -> None:
    """A row whose router was nearly undecided may meet another expert, in bfloat16 as here; so medians."""
    references = TorchBackend(runtime.device), Rounded(runtime.device)
    truth, rounded = (walk(runtime_on(path, it, torch.float32), [ids], [len(ids)])[0] for it in references)
    agree = (found.argmax(-1) == truth.argmax(-1)).float().mean()
    for measure, factor in ((row_error, 2), (divergence, 4)):  # a divergence grows with the square of the error
        loss, budget = measure(found, truth), factor * measure(rounded, truth).median()
        print(f"{measure.__name__}: {loss.mean():.1e}, median {loss.median():.1e} of {budget:.1e}, top-1 {agree:.3f}")
        assert loss.median() <= budget + 1e-12
    assert agree >= 0.8


def row_error(found: Tensor, truth: Tensor) -> Tensor:
    """Relative, of all logits of a row: f64 [T]."""
    return (found.double() - truth.double()).norm(dim=1) / truth.double().norm(dim=1)


def check_steps(runtime: Runtime, texts: list[list[int]], alone: list[Tensor], device: str) -> None:
    """The bits of a text alone and whole, whatever its steps and its neighbours; launched, and recorded."""
    if device == "cuda" or not runtime.can_record:  # bits of interpreted attention follow the shape of a tile
        for sizes in SIZES[device]:
            assert same(walk(runtime, texts[:1], sizes), alone[:1]), f"steps of {sizes} tokens"
        for sizes in MIXES[device]:
            assert same(walk(runtime, texts, sizes), alone), f"side by side, {sizes}"
    if runtime.can_record:
        graphs, short = Graphs(runtime, CONTEXT, recorder(runtime)), [ids[: RECORDED[device]] for ids in texts]
        launched = walk(runtime, short, (1,))
        for _ in range(2):
            assert same(walk(runtime, short, (1,), graphs), launched), "recorded"
        assert not graphs.refusal
        assert graphs._recorded


@pytest.mark.parametrize(("case", "device", "is_wide"), families())
def test_family(case: str, device: str, is_wide: bool, tmp_path: Path) -> None:
    check_model(write_tiny(case, tmp_path, is_wide), device)


@pytest.mark.parametrize("model", [pytest.param(model, marks=ON_GPU) for model in TRUE_SHAPES])
def test_true_shapes(model: str, tmp_path: Path) -> None:
    """Widths at which matrices are cut and launched as in use; two layers, random weights."""
    path = tmp_path / "model.gguf"
    write_synthetic(path, *parse_name(model), layers=2)
    check_model(path, "cuda")


def check_model(path: Path, device: str) -> None:
    texts = [random_text(length, seed) for seed, length in enumerate(LENGTHS[device])]
    runtime = runtime_on(path, backend_on(device), torch.float16)
    alone = [walk(runtime, [ids], [len(ids)])[0] for ids in texts]
    assert same([walk(runtime, texts[:1], [len(texts[0])])[0]], alone[:1]), "run twice"
    assert same([last_row(runtime, ids) for ids in texts], [rows[-1] for rows in alone]), "one row of many"
    check_truth(path, runtime, texts[0], alone[0])
    check_steps(runtime, texts, alone, device)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ON_GPU, id=kind.name) for kind in UNIFORM])
def test_every_matrix_in_one_format(kind: GgmlType, tmp_path: Path) -> None:
    """Of a model with experts, whose widths are whole blocks; files quantized by another writer."""
    check_types(tiny_moe.build("gpt-oss"), (kind,) * 3, tmp_path)
    path = tmp_path / "quantized.gguf"
    runtime, ids = runtime_on(path, backend_on("cuda"), torch.float16), random_text(130, 0)
    found = walk(runtime, [ids], [130])
    check_truth(path, runtime, ids, found[0])
    assert same(walk(runtime, [ids], (7, 1)), found)


@pytest.mark.parametrize(
    ("device", "cases"),
    [
        pytest.param("emulated", ["qwen3moe"], marks=ON_EMULATED),
        pytest.param("cuda", ["qwen2", "gpt2", "gpt-oss", "gemma3"], marks=ON_GPU),
    ],
)
def test_two_processes_give_the_same_bits(device: str, cases: list[str], tmp_path: Path) -> None:
    paths = [str(write_tiny(case, tmp_path, has_wide_heads=device == "cuda")) for case in cases]
    command = [sys.executable, "-m", "tests.gpu.models", device, *paths]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=110)[0].split() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    assert len(set(first)) == len(cases)
