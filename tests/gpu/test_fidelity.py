"""benchmarks/bench_fidelity.py on tiny models: near the truth, layers cut off, llama.cpp beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests import tiny_moe
from tests.gpu.conftest import ON_EMULATED, ON_GPU
from tests.gpu.models import backend_on
from tests.models.test_gpt_oss import TYPES, check_types
from tests.running import runtime_of
from tests.workers import ROOT
from worker_orcd.engine.score import score


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_fidelity

    return bench_fidelity


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Experts in MXFP4, biases, sinks, windows: what the reference of the bench must widen or leave alone."""
    check_types(tiny_moe.build("gpt-oss"), TYPES["MXFP4"], tmp_path)
    return tmp_path / "quantized.gguf"


def test_the_truth_is_the_reference_backend(model: Path, bench: ModuleType) -> None:
    ids = bench.random_ids(model, 40)
    expected = score(runtime_of(model), ids, 40)
    assert torch.equal(bench.truth_of(model, torch.device("cpu"), ids), expected)


def test_distance_of_distributions(bench: ModuleType) -> None:
    truth = torch.tensor([[0.0, 1.0]] * 99 + [[3.0, 0.0]])
    found = truth.clone()
    found[99] = 0.0
    share = torch.tensor([3.0, 0.0], dtype=torch.float64).softmax(0)
    loss = float((share * (2 * share).log()).sum())
    numbers = bench.distance(found + 5.0, truth, torch.device("cpu"))
    assert numbers["kl_mean"] == pytest.approx(loss / 100, rel=1e-3)
    assert numbers["kl_p99"] == pytest.approx(loss / 100, rel=1e-3), "of 100 numbers in order, at 98.01"
    assert numbers["top1"] == 1.0
    assert numbers["logit_error"] == pytest.approx(float((found + 5.0 - truth).norm() / truth.norm()), rel=1e-3)
    assert bench.distance(found * 7, truth * 7, torch.device("cpu"))["unit_kl_mean"] == numbers["unit_kl_mean"]
    found[:50] = found[:50].flip(1)
    assert bench.distance(found, truth, torch.device("cpu"))["top1"] == 0.5


@pytest.mark.parametrize("device", [pytest.param("emulated", marks=ON_EMULATED), pytest.param("cuda", marks=ON_GPU)])
def test_a_cut_beside_llama_cpp(
    device: str, model: Path, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp is played by the reference, so its figures must be nearly nothing, on the layers it is given."""
    seen = []

    def llama(path: str, **settings: object) -> SimpleNamespace:
        assert settings["n_gpu_layers"] == 0
        runtime, answer = runtime_of(Path(path)), SimpleNamespace()
        seen.append(len(runtime.kv))
        answer.eval = lambda ids: setattr(answer, "scores", score(runtime, ids, 64).numpy())
        return answer

    played = ModuleType("llama_cpp")
    played.Llama = llama  # type: ignore[attr-defined]
    played.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "llama_cpp", played)
    monkeypatch.setattr(bench, "STEPS", 3)
    backend = backend_on(device)
    numbers = bench.measure(model, backend, 20, 1, tmp_path)
    assert seen == [1]
    assert set(numbers) == {"prefill", "decode", "at_most_2_layers"}
    numbers = bench.measure(model, backend, 20, None, tmp_path)
    assert seen == [1, 2]
    beside = numbers.pop("at_most_2_layers")
    assert beside["llama_cpp"]["kl_mean"] < 1e-8
    for found in (*numbers.values(), beside["ours"]):
        assert 1e-6 < found["kl_mean"] < 0.05
        assert 1e-4 < found["logit_error"] < 0.1
        assert found["kl_p99"] >= found["kl_mean"] / 2
        assert found["top1"] >= 0.6
