"""What only a GPU can show of this slice: the reference backend on CUDA, and the plan against the driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from worker_orcd.assemble import build_engine, draw_up, embedded_model, load_runtime, load_texts
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.score import score
from worker_orcd.errors import InsufficientVram, StartFailed

pytestmark = pytest.mark.gpu
IDS = [7 * i % 321 for i in range(300)]


def logits(path: Path, device: str, chunk: int = 128) -> torch.Tensor:
    config = WorkerConfig(model=path, device=device)  # type: ignore[arg-type]
    return score(load_runtime(config, draw_up(config), lambda *_: None), IDS, chunk)


@pytest.mark.parametrize("case", tiny.configs())
def test_logits_on_the_gpu_are_those_of_the_cpu_and_do_not_depend_on_chunks(case: str, tmp_path: Path) -> None:
    path = tiny.build(case).write(tmp_path / "tiny.gguf")
    ours, reference = logits(path, "cuda"), logits(path, "cpu")
    assert ((ours - reference).norm() / reference.norm()).item() < 1e-4
    for chunk in (1, 7, 64, 300):
        assert torch.equal(logits(path, "cuda", chunk), ours)


def test_the_haiku_command_on_the_gpu() -> None:
    command = [sys.executable, "-m", "worker_orcd", "haiku", "--device", "cuda", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["repeat_identical"] is True


def test_the_plan_bounds_what_the_driver_says_was_taken() -> None:
    code = (
        "import torch\n"
        "from worker_orcd.assemble import *\n"
        "from worker_orcd.engine.score import score\n"
        "import pynvml; pynvml.nvmlInit(); h = pynvml.nvmlDeviceGetHandleByIndex(0)\n"
        "used = lambda: pynvml.nvmlDeviceGetMemoryInfo(h).used\n"
        "before = used()\n"
        "config = WorkerConfig(device='cuda')\n"
        "blueprint = draw_up(config)\n"
        "runtime = load_runtime(config, blueprint, lambda *_: None)\n"
        "score(runtime, list(range(40, 340)), 128)\n"
        "torch.cuda.synchronize()\n"
        "print(blueprint.plan.total_bytes, used() - before, torch.cuda.max_memory_allocated())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    planned, taken, _ = map(int, done.stdout.split())
    print(done.stdout)
    assert taken <= planned, (planned, taken)
    assert taken >= planned - 300 * 2**20, "the plan is far above what is needed"


def test_engine_reports_the_vram_it_holds() -> None:
    config = WorkerConfig(device="cuda")
    blueprint = draw_up(config)
    engine = build_engine(
        config, blueprint, load_runtime(config, blueprint, lambda *_: None), load_texts(config, blueprint).tokenizer
    )
    try:
        status = engine.status()
        weights = next(item.nbytes for item in blueprint.plan.items if item.purpose == "weights")
        assert status.resident
        assert status.vram_bytes_used > weights
        assert engine.info.device == "cuda:0"
    finally:
        engine.close()


def test_too_little_vram_and_a_gpu_that_is_not_there_are_refused() -> None:
    hog = torch.empty(torch.cuda.mem_get_info()[0] - 200 * 2**20, dtype=torch.uint8, device="cuda")
    try:
        config = WorkerConfig(model=embedded_model(), device="cuda")
        with pytest.raises(InsufficientVram, match="bytes on cuda:0"):
            load_runtime(config, draw_up(config), lambda *_: None)
    finally:
        del hog
        torch.cuda.empty_cache()
    config = WorkerConfig(device="cuda", gpu_device=99)
    with pytest.raises(StartFailed, match="gpu_device is 99"):
        load_runtime(config, draw_up(config), lambda *_: None)
