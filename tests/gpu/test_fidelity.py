"""benchmarks/bench_fidelity.py on tiny models: near the truth, layers cut off, another engine beside it."""

from __future__ import annotations

import json
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
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.synthetic import MODELS, Shape


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
    assert numbers["kl_p50"] < 1e-12
    assert numbers["kl_p99"] == pytest.approx(loss / 100, rel=1e-3), "of 100 numbers in order, at 98.01"
    assert numbers["top1"] == 1.0
    assert numbers["logit_error"] == pytest.approx(float((found + 5.0 - truth).norm() / truth.norm()), rel=1e-3)
    assert bench.distance(found * 7, truth * 7, torch.device("cpu"))["unit_kl_mean"] == numbers["unit_kl_mean"]
    found[:50] = found[:50].flip(1)
    assert bench.distance(found, truth, torch.device("cpu"))["top1"] == 0.5


def played_llama_cpp(seen: list[int]) -> ModuleType:
    """llama_cpp played by the reference backend; adds to `seen` the number of layers it is given."""

    def llama(path: str, **settings: object) -> SimpleNamespace:
        assert settings["n_gpu_layers"] == 0
        runtime, answer = runtime_of(Path(path)), SimpleNamespace()
        seen.append(len(runtime.kv))
        answer.eval = lambda ids: setattr(answer, "scores", score(runtime, ids, 64).numpy())
        return answer

    played = ModuleType("llama_cpp")
    played.Llama = llama  # type: ignore[attr-defined]
    return played


@pytest.mark.parametrize("device", [pytest.param("emulated", marks=ON_EMULATED), pytest.param("cuda", marks=ON_GPU)])
def test_a_cut_beside_llama_cpp(
    device: str, model: Path, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp is played by the reference, so its figures must be nearly nothing, on the layers it is given."""
    seen = list[int]()
    monkeypatch.setitem(sys.modules, "llama_cpp", played_llama_cpp(seen))
    monkeypatch.setattr(bench, "STEPS", 3)
    for layers in (1, None):
        path = bench.model_file(str(model), layers, tmp_path)
        numbers = bench.compare(path, backend_on(device), 20, "llama.cpp")
        assert numbers.pop("other")["kl_mean"] < 1e-8
        assert set(numbers) == {"prefill", "decode"}
        for found in numbers.values():
            assert 1e-6 < found["kl_mean"] < 0.05
            assert 1e-4 < found["logit_error"] < 0.1
            assert found["kl_p99"] >= found["kl_mean"] / 2
            assert found["top1"] >= 0.6
    assert seen[0] == 1 < seen[1] == len(runtime_of(model).kv)


def test_another_engine_through_files(
    model: Path,
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is exported is what is compared later, and logits for other ids or of another length are found out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder, logits = tmp_path / "out", str(tmp_path / "logits")
    bench.main(["--model", str(model), "--layers", "1", "--tokens", "20", "--export", str(folder)])
    ids = [int(word) for word in (folder / "ids.txt").read_text().split()]
    runtime = runtime_of(folder / "model.gguf")
    assert len(runtime.kv) == 1
    assert len(ids) == 20

    def compared(answers: torch.Tensor) -> dict[str, float]:
        answers.numpy().tofile(logits)
        bench.main(["--model", str(folder / "model.gguf"), "--tokens", "20", "--compare", logits])
        numbers = json.loads(capsys.readouterr().out.splitlines()[-1])["numbers"]
        return dict(numbers[str(folder / "model.gguf")]["other"])

    answers = score(runtime, ids, 64)
    assert compared(answers)["kl_mean"] < 1e-8
    assert compared(answers.flip(0))["kl_mean"] > 1e-4
    with pytest.raises(SystemExit, match="not 20 tokens"):
        compared(answers[1:])
    with pytest.raises(SystemExit):
        bench.main(["--model", str(model), str(model), "--compare", logits])


def test_a_synthetic_model_of_few_layers(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Shape("qwen2", 4, 64, 96, 4, 2, 16, 500, 128, tied=True)
    monkeypatch.setitem(MODELS, "tiny", tiny)
    with GgufFile.open(bench.model_file("synthetic:tiny:Q8_0", 2, tmp_path)) as gguf:
        assert gguf.metadata["qwen2.block_count"] == 2
        assert {name.split(".")[1] for name in gguf.tensors if name.startswith("blk.")} == {"0", "1"}
