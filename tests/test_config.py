"""WorkerConfig: what it refuses, and who wins among flag, environment, file and default."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from worker_orcd import cli
from worker_orcd.assemble import build_core, draw_up, load_runtime
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.errors import StartFailed

BAD: list[tuple[dict[str, object], str]] = [
    ({"port": 0}, "port is 0; it must be from 1024 to 65535"),
    ({"port": 1023}, "port"),
    ({"port": 65536}, "port"),
    ({"gpu_device": -1}, "gpu_device"),
    ({"device": "cpu", "backend": "cuda"}, "backend is cuda and device is cpu"),
    ({"max_tokens_out": 0}, "max_tokens_out"),
    ({"max_tokens_in": 0}, "max_tokens_in"),
    ({"context_length": 1}, "context_length is 1; it must be from 2"),
    ({"kv_cache_size_mb": -5}, "kv_cache_size_mb"),
    ({"max_queue": -1}, "max_queue"),
    ({"max_batch": 0}, "max_batch"),
    ({"max_batch": 1025}, "max_batch"),
    ({"max_tokens_per_step": 63}, "max_tokens_per_step is 63; it must be from 64"),
    ({"max_batch": 8, "max_tokens_per_step": 7}, "max_tokens_per_step is 7; it must be from 8"),
    ({"kv_block_size": 0}, "kv_block_size"),
    ({"kv_block_size": -32}, "kv_block_size"),
    ({"kv_block_size": 48}, "kv_block_size is 48; it must be a divisor of 256"),
    ({"kv_block_size": 512}, "kv_block_size"),
    ({"load_chunk_bytes": 1023}, "load_chunk_bytes"),
    ({"load_chunk_bytes": 2**31 + 1}, "load_chunk_bytes"),
    ({"inference_timeout_sec": 0.0}, "inference_timeout_sec"),
    ({"inference_timeout_sec": float("nan")}, "inference_timeout_sec"),
    ({"shutdown_timeout_sec": float("inf")}, "shutdown_timeout_sec"),
    ({"worker_id": "two words"}, "worker_id"),
    ({"worker_id": "x" * 65}, "worker_id"),
    ({"model": Path()}, "model is empty"),
    ({"model": Path("model.bin")}, r"ending in \.gguf"),
    ({"host": "0.0.0.0"}, "loopback"),
    ({"host": "192.168.1.5"}, "loopback"),
    ({"host": "example.org"}, "loopback"),
]


@pytest.mark.parametrize(("values", "reason"), BAD)
def test_bad_values_are_refused_with_value_and_limit(values: dict[str, object], reason: str) -> None:
    with pytest.raises(StartFailed, match=reason):
        WorkerConfig(**values)  # type: ignore[arg-type]


def test_edges_are_fine_and_ids_are_new() -> None:
    for values in ({"port": 1024}, {"port": 65535}, {"host": "::1"}, {"host": "localhost"}, {"max_queue": 0}):
        WorkerConfig(**values)  # type: ignore[arg-type]
    for block in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        WorkerConfig(kv_block_size=block)
    WorkerConfig(max_batch=1, max_tokens_per_step=1)
    assert WorkerConfig().worker_id != WorkerConfig().worker_id
    assert WorkerConfig(worker_id="worker-abc").worker_id == "worker-abc"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLORCH_")}
    command = [sys.executable, "-m", "worker_orcd", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    return tiny.build("qwen2").write(tmp_path_factory.mktemp("config") / "tiny.gguf")


def planned_context(model: Path, *arguments: str, **environment: str) -> int:
    done = run("plan", str(model), "--json", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["context_length"])


def test_flag_over_environment_over_file_over_default(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("context_length: 64\nmax_queue: 3\n")
    assert planned_context(model) == 512
    assert planned_context(model, LLORCH_CONFIG=str(file)) == 64
    assert run("--config", str(file), "plan", str(model)).returncode == 0
    assert planned_context(model, LLORCH_CONFIG=str(file), LLORCH_CONTEXT_LENGTH="65") == 65
    assert planned_context(
        model, "--context-length", "66", LLORCH_CONFIG=str(file), LLORCH_CONTEXT_LENGTH="65"
    ) == 66  # fmt: skip


def test_an_empty_variable_is_as_good_as_none(model: Path) -> None:
    assert planned_context(model, LLORCH_CONFIG="", LLORCH_MODEL="", LLORCH_CONTEXT_LENGTH="") == 512


def test_a_file_of_settings_is_read_where_there_are_some(model: Path) -> None:
    assert run("inspect", str(model), LLORCH_CONFIG="/nonexistent.yaml").returncode == 0


def report(model: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """What `plan` says; run in this process, because it is asked often."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        for name in [name for name in os.environ if name.startswith("LLORCH_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        cli.app.meta(["plan", str(model), "--json", *arguments], exit_on_error=False, result_action="return_value")
    return json.loads(out.getvalue())  # type: ignore[no-any-return]


def kv_bytes(model: Path, *arguments: str, **environment: str) -> int:
    plan = report(model, "--backend", "reference", *arguments, **environment)
    return next(int(item["bytes"]) for item in plan["items"] if item["purpose"] == "kv_cache")


TOKEN = 2 * 2 * 2 * 24 * 4  # bytes of the cache: keys and values, layers, heads, head size, float32


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ([], 64 * 512),
        (["--max-batch", "3"], 3 * 512),
        (["--kv-cache-size-mb", "2"], 2 * 2**20 // TOKEN // 32 * 32),
        (["--kv-cache-size-mb", "2", "--kv-block-size", "256"], 2 * 2**20 // TOKEN // 256 * 256),
        (["--kv-cache-size-mb", "2", "--kv-layout", "contiguous"], 2 * 2**20 // TOKEN // 512 * 512),
        (["--kv-layout", "contiguous", "--max-batch", "2", "--context-length", "100"], 2 * 100),
    ],
)
def test_flags_of_the_cache_decide_its_size(model: Path, arguments: list[str], tokens: int) -> None:
    assert kv_bytes(model, *arguments) == tokens * TOKEN


def test_more_tokens_a_step_need_more_room(model: Path) -> None:
    def workspace(*arguments: str, **environment: str) -> int:
        items = report(model, *arguments, **environment)["items"]
        return next(item["bytes"] for item in items if item["purpose"] == "workspace")

    few, many = (workspace("--max-tokens-per-step", str(n)) for n in (64, 4096))
    assert few < many
    assert workspace(LLORCH_MAX_TOKENS_PER_STEP="4096") == many


PASSED_ON: list[tuple[list[str], dict[str, str], dict[str, object]]] = [
    ([], {}, {"prefix_cache": True, "scheduling_policy": "fcfs", "max_queue": 128}),
    (["--no-prefix-cache"], {}, {"prefix_cache": False}),
    (["--no-cuda-graphs"], {}, {"cuda_graphs": False}),
    ([], {"LLORCH_CUDA_GRAPHS": "false"}, {"cuda_graphs": False}),
    ([], {}, {"cuda_graphs": True}),
    ([], {"LLORCH_PREFIX_CACHE": "false"}, {"prefix_cache": False}),
    ([], {"LLORCH_PREFIX_CACHE": "true"}, {"prefix_cache": True}),
    (["--prefix-cache"], {"LLORCH_PREFIX_CACHE": "false"}, {"prefix_cache": True}),
    (["--scheduling-policy", "shortest-prompt-first"], {}, {"scheduling_policy": "shortest-prompt-first"}),
    ([], {"LLORCH_SCHEDULING_POLICY": "priority"}, {"scheduling_policy": "priority"}),
    (["--max-queue", "7", "--max-batch", "9"], {}, {"max_queue": 7, "max_batch": 9}),
    (["--max-batch", "9", "--max-tokens-per-step", "70"], {}, {"max_tokens_per_step": 70}),
    (
        [],
        {"LLORCH_KV_LAYOUT": "contiguous", "LLORCH_KV_BLOCK_SIZE": "8"},
        {"kv_layout": "contiguous", "kv_block_size": 8},
    ),
]


@pytest.mark.parametrize(("arguments", "environment", "expected"), PASSED_ON)
def test_what_the_command_gets(
    arguments: list[str], environment: dict[str, str], expected: dict[str, object], model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[WorkerConfig] = []
    monkeypatch.setattr("worker_orcd.reports.plan_report", lambda _path, config, *_: seen.append(config) or "{}")
    report(model, *arguments, **environment)
    assert {name: getattr(seen[0], name) for name in expected} == expected


def core_of(model: Path, **settings: Any) -> EngineCore:
    config = WorkerConfig(model=model, device="cpu", context_length=64, **settings)
    blueprint = draw_up(config)
    core, _ = build_core(config, blueprint, load_runtime(config, blueprint, lambda *_: None), frozenset({2}), [0])
    return core


def test_a_step_no_larger_than_the_kernels_take(model: Path) -> None:
    with pytest.raises(StartFailed, match="max_tokens_per_step is 65536; this model allows 65535 on the GPU"):
        draw_up(WorkerConfig(model=model, device="cuda", max_tokens_per_step=65_536))
    assert draw_up(WorkerConfig(model=model, device="cpu", max_tokens_per_step=65_536)).max_step_tokens == 65_536


def test_settings_reach_the_engine(model: Path) -> None:
    core = core_of(model, max_batch=3, max_tokens_per_step=5, scheduling_policy="priority", kv_block_size=8)
    assert core._scheduler.limits == SchedulerLimits(3, 5, 64, "priority")
    assert core._step.block_size == 8
    assert core_of(model, kv_layout="contiguous", max_batch=2)._step.block_size == 64


@pytest.mark.parametrize(("is_on", "cached"), [(True, 32), (False, 0)])
def test_prefix_cache_on_and_off(model: Path, is_on: bool, cached: int) -> None:
    core = core_of(model, prefix_cache=is_on)
    for number in (1, 2):
        core.submit(number, Request("a", [9] * 40, 1, SamplingParams(seed=0, temperature=0.0)))
        events = []
        while core.has_work:
            events += core.tick().events
    assert (events[0][0], events[0][1].cached_tokens) == (2, cached)


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (["serve", "--port", "80"], {}, "port is 80"),
        (["serve", "--port", "eighty"], {}, "eighty"),
        (["serve", "--port", "8390.6"], {}, "'8390.6' is not an integer"),
        (["bench", "--tokens", "9.5"], {}, "--tokens"),
        (["serve"], {"LLORCH_MAX_BATCH": "2.0"}, "LLORCH_MAX_BATCH"),
        (["plan", "m.gguf", "--vram-total-mb", "-5"], {}, "vram_total_mb is -5"),
        (["serve", "--no-such-flag", "1"], {}, "no-such-flag"),
        (["serve", "--device", "tpu"], {}, "tpu"),
        (["serve", "--kv-block-size", "48"], {}, "divisor of 256"),
        (["serve"], {"LLORCH_PREFIX_CACHE": "maybe"}, "LLORCH_PREFIX_CACHE"),
        (["serve"], {"LLORCH_PORT": "80"}, "port is 80"),
        (["serve"], {"LLORCH_PORT": "eighty"}, "LLORCH_PORT"),
        (["--config", "/nonexistent/worker.yaml", "serve"], {}, "worker.yaml"),
        (["serve", "--model", "/nonexistent/m.gguf", "--device", "cpu"], {}, "MODEL_LOAD_FAILED"),
        (["serve", "--host", "0.0.0.0"], {}, "loopback"),
        (["no-such-command"], {}, "no-such-command"),
        (["inspect"], {}, "FILE"),
    ],
)
def test_bad_settings_end_with_status_1_and_no_traceback(
    arguments: list[str], environment: dict[str, str], reason: str
) -> None:
    done = run(*arguments, **environment)
    assert done.returncode == 1
    assert reason in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_file_without_settings_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    for text in ("# nothing\n", "null\n", "{}\n"):
        file.write_text(text)
        done = run("--config", str(file), "serve", LLORCH_PORT="x")
        assert done.returncode == 1
        assert "LLORCH_PORT" in done.stderr, "what is wrong elsewhere is what is told"
        assert "Traceback" not in done.stderr


def test_unknown_keys_in_the_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    for text, reason in {
        "prot: 9000\n": "prot", "- 1\n": "name: value", "a: [\n": "not YAML", "serve: {port: 9999}": "'serve' is no",
        "config: 3": "'config' is no", "port: 8390.6": "not an integer", "port: 1\nport: 2": "has 'port' twice",
    }.items():  # fmt: skip
        file.write_text(text)
        done = run("--config", str(file), "serve")
        assert done.returncode == 1
        assert reason in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
