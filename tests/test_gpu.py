"""What only a GPU can show of this slice: the reference backend on CUDA, schedules that overlap, and the plan."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.engine.schedules import Bench
from tests.running import engine_of, last_tokens, runtime_of
from tests.server.client import Answer
from tests.workers import ROOT, running
from worker_orcd.assemble import build_core, draw_up, embedded_model, load_runtime
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.engine import BatchEngine
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.request import Event, Failed, Finished, Request, SamplingParams, Tokens
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.engine.score import score
from worker_orcd.errors import InsufficientVram, StartFailed
from worker_orcd.models.adapter import ModelAdapter
from worker_orcd.synthetic import parse_name, write_synthetic

pytestmark = pytest.mark.gpu
BACKENDS = ["reference", "cuda"]
IDS = [7 * i % 321 for i in range(300)]


def logits(path: Path, device: str, chunk: int = 128) -> torch.Tensor:
    return score(runtime_of(path, device=device, backend="reference"), IDS, chunk)


@pytest.mark.parametrize("case", tiny.configs())
def test_logits_on_the_gpu_are_those_of_the_cpu_and_do_not_depend_on_chunks(case: str, tmp_path: Path) -> None:
    path = tiny.build(case).write(tmp_path / "tiny.gguf")
    ours, reference = logits(path, "cuda"), logits(path, "cpu")
    assert ((ours - reference).norm() / reference.norm()).item() < 1e-4
    for chunk in (1, 7, 64, 300):
        assert torch.equal(logits(path, "cuda", chunk), ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["qwen2", "llama"])
def test_every_schedule_on_the_gpu_gives_the_bits_of_a_run_alone(case: str, backend: str, tmp_path: Path) -> None:
    """Half of them launch a step before the tokens of the one before are read."""
    path = tiny.build(case).write(tmp_path / "tiny.gguf")
    bench, seen = Bench(runtime_of(path, device="cuda", backend=backend), 80), Counter[str]()
    for seed in range(20):
        course = bench.run(seed)
        assert not course.differences
        seen += course.seen
    assert seen["overlapping"] >= 3
    assert seen["preempted"] >= 1
    assert seen["hits"] >= 1


class PoisonAfter:
    """A model whose logits turn NaN for every row that ends in `token`."""

    def __init__(self, adapter: ModelAdapter, token: int) -> None:
        self.adapter, self.token = adapter, token

    def forward(self, batch: Batch, kv: list[LayerKV]) -> torch.Tensor:
        logits = self.adapter.forward(batch, kv)
        is_bad = last_tokens(batch) == self.token
        return torch.where(is_bad[:, None], torch.nan, logits)


def test_nan_in_one_row_leaves_the_others_their_bits(tmp_path: Path) -> None:
    runtime = runtime_of(tiny.build("qwen2").write(tmp_path / "tiny.gguf"), device="cuda", kv_block_size=8)
    good = [Request(f"good {i}", [20 + i] * 9, 12, SamplingParams(i)) for i in range(5)]
    bad = Request("bad", [5] * 9 + [300], 12, SamplingParams(0))

    def run(requests: list[Request]) -> dict[str, list[Event]]:
        poisoned = Runtime(PoisonAfter(runtime.adapter, 300), runtime.kv, runtime.allocator, runtime.device)
        step = PlainStep(poisoned, Sampler([0, 300], runtime.device))
        assert step.overlaps
        core = EngineCore(step, SchedulerLimits(8, 64, 128), frozenset({2}), {})
        for number, req in enumerate(requests):
            core.submit(number, req)
        events: dict[str, list[Event]] = {req.id: [] for req in requests}
        while core.has_work:
            for number, event in core.tick().events:
                events[requests[number].id].append(event)
        assert core.check() == ""
        core.drop_cache()
        return events

    expected, got = run(good), run([*good[:2], bad, *good[2:]])
    assert isinstance(got["bad"][-1], Failed)
    assert got["bad"][-1].code == "NUMERIC_FAULT"
    for req in good:
        assert tokens_of(got[req.id]) == tokens_of(expected[req.id])


def tokens_of(events: list[Event]) -> list[int]:
    assert isinstance(events[-1], Finished)
    return [token for event in events if isinstance(event, Tokens) for token in event.ids]


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_streams_of_the_haiku_model_are_what_each_is_alone(backend: str) -> None:
    rng = random.Random(0)
    requests = [
        Request(
            str(i), [rng.randrange(40, 3000) for _ in range(rng.randint(1, 60))], 30, SamplingParams(i, top_p=0.95)
        )
        for i in range(48)
    ]

    async def read(engine: BatchEngine, req: Request) -> list[int]:
        return tokens_of([event async for event in engine.run(req)])

    async def together(engine: BatchEngine) -> list[list[int]]:
        return list(await asyncio.gather(*(read(engine, req) for req in requests)))

    async def alone(engine: BatchEngine) -> list[list[int]]:
        return [await read(engine, req) for req in requests]

    engine = engine_of(embedded_model(), device="cuda", backend=backend, max_batch=64)
    try:
        expected = asyncio.run(alone(engine))
        assert asyncio.run(together(engine)) == expected
        assert asyncio.run(together(engine)) == expected
        assert engine.status().ready
    finally:
        engine.close()


def test_the_haiku_command_on_the_gpu() -> None:
    command = [sys.executable, "-m", "worker_orcd", "haiku", "--device", "cuda", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["repeat_identical"] is True


@pytest.mark.parametrize(("backend", "slack_mib"), [("reference", 300), ("cuda", 700)])
def test_the_plan_bounds_what_the_driver_says_was_taken(backend: str, slack_mib: int) -> None:
    """Packing takes a fixed amount that a small model does not use up."""
    code = (
        "import torch\n"
        "from worker_orcd.assemble import *\n"
        "from worker_orcd.assemble import build_core\n"
        "import pynvml; pynvml.nvmlInit(); h = pynvml.nvmlDeviceGetHandleByIndex(0)\n"
        "used = lambda: pynvml.nvmlDeviceGetMemoryInfo(h).used\n"
        "before = used()\n"
        f"config = WorkerConfig(device='cuda', backend='{backend}', kv_cache_size_mb=64, vram_reserve_mb=0)\n"
        "blueprint = draw_up(config)\n"
        "runtime = load_runtime(config, blueprint, lambda *_: None)\n"
        "build_core(config, blueprint, runtime, frozenset({2}), [0])  # tries the largest step\n"
        "torch.cuda.synchronize()\n"
        "print(blueprint.plan.total_bytes, used() - before, torch.cuda.max_memory_allocated())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    planned, taken, _ = map(int, done.stdout.split())
    print(done.stdout)
    assert taken <= planned, (planned, taken)
    assert taken >= planned - slack_mib * 2**20, "the plan is far above what is needed"


LOAD = """
import json, sys
from pathlib import Path
from worker_orcd.assemble import draw_up, load_runtime
from worker_orcd.config import WorkerConfig

config, seen = WorkerConfig(model=Path(sys.argv[1]), device="cuda", kv_cache_size_mb=64), []
blueprint = draw_up(config)
runtime = load_runtime(config, blueprint, lambda percent, *_: seen.append(percent))
stored = sum(info.nbytes for info in blueprint.gguf.tensors.values())
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held when it forked
host_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps([stored, runtime.ledger.by_purpose()["weights"], host_mib, seen]))
"""


@pytest.mark.parametrize(
    ("model", "share"),
    [
        ("qwen2.5-0.5b:Q4_K_M", 0.02),
        ("llama-3.1-8b:Q4_K_M", 0.02),
        ("phi-3-mini:Q4_0", 0.02),
        ("gpt2:Q8_0", 0.02),
        ("gpt-oss-20b:MXFP4", 0.02),
    ],
)
def test_weights_take_little_more_than_the_file_holds(model: str, share: float, tmp_path: Path) -> None:
    """Of true shapes, with four layers: in VRAM, and in the host's memory on the way; and all is given back."""
    path = tmp_path / "model.gguf"
    write_synthetic(path, *parse_name(model), layers=4)
    before = torch.cuda.mem_get_info()[0]
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stored, taken, host_mib, percents = json.loads(done.stdout.splitlines()[-1])
    print(f"{model}: {stored} bytes stored, {taken} taken, {host_mib:.0f} MiB of host memory at most")
    assert taken <= stored * (1 + share)
    assert host_mib < 1536
    assert percents == [0, 25, 50, 75, 100]
    assert torch.cuda.mem_get_info()[0] > before - 64 * 2**20


def test_the_engine_knows_the_vram_it_holds() -> None:
    config = WorkerConfig(device="cuda")
    blueprint = draw_up(config)
    runtime = load_runtime(config, blueprint, lambda *_: None)
    _, facts = build_core(config, blueprint, runtime, frozenset({2}), [0])
    planned = {item.purpose: item.nbytes for item in blueprint.plan.items}
    assert facts.vram_bytes >= planned["weights"] + planned["kv_cache"]
    assert facts.info.device == "cuda:0"


def test_too_little_vram_and_a_gpu_that_is_not_there_are_refused() -> None:
    torch.cuda.empty_cache()
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


def test_a_device_that_really_fails_ends_every_stream_and_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access in the engine's process; after it the device takes no more work from that process."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    start = "from worker_orcd import cli, worker; worker.ENGINE_MODULE = 'tests.faulty_engine'; cli.main()"
    with running((sys.executable, "-c", start, "serve", "--device", "cuda")) as worker:
        worker.wait_for("ready")

        async def four() -> list[Answer]:
            return await asyncio.gather(*(worker.ask(max_tokens=200, temperature=1.5, seed=i) for i in range(4)))

        for answer in asyncio.run(four()):
            last = answer.events[-1]
            assert (last.name, last.data["code"]) == ("error", "CUDA_ERROR")
        assert worker.end(timeout=10) == 1
        assert [event["code"] for event in worker.events("error") if event["level"] == "FATAL"] == ["CUDA_ERROR"]
    with running((sys.executable, "-m", "worker_orcd", "serve", "--device", "cuda")) as healthy:
        healthy.wait_for("ready")
        assert healthy.execute(temperature=0.0)[-1][0] == "end"
