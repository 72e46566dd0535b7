"""`doctor`: what it finds on this machine, and what it would say of others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.tokenizer.vocabularies import unpack
from worker_orcd.commands import doctor, gpu_probe
from worker_orcd.commands.worker_process import free_port
from worker_orcd.config import WorkerConfig

H200 = {
    "torch": "2.13.0", "cuda": "13.0", "name": "NVIDIA H200", "capability": "9.0", "free_bytes": 140 * 10**9,
    "total_bytes": 150 * 10**9, "pcie_gb_per_s": 52.1,
}  # fmt: skip


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker_orcd", "doctor", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_a_machine_that_can_serve_on_the_cpu(tmp_path: Path) -> None:
    model = tiny.build("llama").write(tmp_path / "tiny.gguf")
    done = run("--device", "cpu", "--model", str(model), "--port", str(free_port()), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["can_serve"] is True
    assert {finding["name"] for finding in report["findings"]} == {
        "python", "torch", "address", "model", "disk", "host memory",
    }  # fmt: skip
    [fit] = report["fits"]
    assert fit["fits"] is True
    assert fit["planned_bytes"] > 2**28  # Python and torch alone


def missing(capsys: pytest.CaptureFixture[str], **settings: Any) -> dict[str, str]:
    """Name and remedy of all that keeps `serve` from working on the CPU, which the exit status says too."""
    status = doctor.run_doctor(WorkerConfig(device="cpu", **{"port": free_port()} | settings), as_json=True)
    report = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding["remedy"] for finding in report["findings"] if finding["grade"] == "missing"}
    assert (status, report["can_serve"]) == ((1, False) if found else (0, True))
    return found


def test_what_serve_would_refuse_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama").write(tmp_path / "tiny.gguf")
    assert not missing(capsys, model=model)
    for name, content in {"empty": b"", "text": b"words of a sentence", "cut": model.read_bytes()[:5000]}.items():
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(content)
        assert str(bad) in missing(capsys, model=bad)["model"]
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path, why in (
        (unpack("phi-3", tmp_path), "holds a vocabulary"),
        (fifo, "FIFO"),
        (tmp_path / "no.gguf", "No such"),
    ):
        assert why in missing(capsys, model=path)["model"]
    template = tmp_path / "chat.jinja"
    template.write_text("{% if %}")
    assert "not valid" in missing(capsys, model=model, chat_template=template)["model"]
    assert "nowhere" in missing(capsys, model=model, api_key_file=Path("nowhere"))["address"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in missing(capsys, model=model, port=port)["address"]
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: 10**6)
    assert "1000000 are free" in missing(capsys)["model"], "the embedded one, which serve takes"


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.dumps(gpu_probe.probe(0))  # in this process, which has torch already
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, told, ""))
    config = WorkerConfig(model=tiny.build("llama").write(tmp_path / "tiny.gguf"))
    assert doctor.run_doctor(config, as_json=False) == 1
    shown = capsys.readouterr().out
    assert "Not ready to serve" in shown
    assert "→" in shown
    assert doctor.run_doctor(config, as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    missing = {finding["name"]: finding["remedy"] for finding in report["findings"] if finding["grade"] == "missing"}
    assert {"driver", "GPU"} <= set(missing)
    assert all(missing.values()), "each with its remedy"
    assert [fit["fits"] for fit in report["fits"]] == [None]


def test_what_fits_of_well_known_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "WELL_KNOWN", ("llama-3.1-8b:Q4_K_M", "llama-3.1-8b:Q8_0"))
    small, large = doctor._fits(WorkerConfig(), free_bytes=10 * 10**9)
    assert (small.model, small.fits, large.fits) == ("llama-3.1-8b Q4_K_M", True, False)
    assert 5e9 < small.planned_bytes < 10e9 < large.planned_bytes < 14e9
    capped, _ = doctor._fits(WorkerConfig(kv_cache_size_mb=64), free_bytes=10 * 10**9)
    assert (capped.fits, capped.remark) == (True, "512 tokens of context"), "as serve would have it"


def grades(gpu: dict[str, Any]) -> dict[str, str]:
    return {finding.name: finding.grade for finding in doctor._gpu(gpu, 0)}


def test_gpus_of_other_machines() -> None:
    assert (grades(H200)["GPU"], grades(H200)["PCIe"]) == ("ok", "ok")
    assert grades(H200 | {"pcie_gb_per_s": 1.5})["PCIe"] == "slow"
    assert grades(H200 | {"capability": "7.5"})["GPU"] == "missing"
    assert grades({"torch": "2.13.0+cpu", "cuda": None, "error": "none"})["torch CUDA"] == "missing"


def test_a_probe_that_hangs_or_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], -11, "", "Segmentation fault")

    def hang(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("probe", 1)

    for fake, words in ((crash, "status -11: Segmentation fault"), (hang, "did not answer")):
        monkeypatch.setattr(doctor.subprocess, "run", fake)
        assert words in doctor._probe(WorkerConfig())["error"]


def test_what_does_not_fit_is_said_so(tmp_path: Path) -> None:
    model = tiny.build("llama").write(tmp_path / "tiny.gguf")
    [fit] = doctor._fits(WorkerConfig(model=model), free_bytes=10**6)
    assert fit.fits is False
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    [fit] = doctor._fits(WorkerConfig(model=broken), free_bytes=10**12)
    assert fit.fits is False
    assert "broken.gguf" in fit.remark


def test_a_kernel_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    finding = doctor._kernel_cache()
    assert finding.grade == "slow"
    assert "XDG_CACHE_HOME" in finding.remedy
