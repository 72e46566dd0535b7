"""WorkerConfig: what it refuses, and who wins among flag, environment, file and default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker_orcd.config import WorkerConfig
from worker_orcd.errors import StartFailed

BAD: list[tuple[dict[str, object], str]] = [
    ({"port": 0}, "port is 0; it must be from 1024 to 65535"),
    ({"port": 1023}, "port"),
    ({"port": 65536}, "port"),
    ({"gpu_device": -1}, "gpu_device"),
    ({"max_tokens_out": 0}, "max_tokens_out"),
    ({"max_tokens_in": 0}, "max_tokens_in"),
    ({"context_length": 0}, "context_length"),
    ({"kv_cache_size_mb": -5}, "kv_cache_size_mb"),
    ({"max_queue": -1}, "max_queue"),
    ({"load_chunk_bytes": 1023}, "load_chunk_bytes"),
    ({"load_chunk_bytes": 2**31 + 1}, "load_chunk_bytes"),
    ({"inference_timeout_sec": 0.0}, "inference_timeout_sec"),
    ({"inference_timeout_sec": float("nan")}, "inference_timeout_sec"),
    ({"shutdown_timeout_sec": float("inf")}, "shutdown_timeout_sec"),
    ({"worker_id": "two words"}, "worker_id"),
    ({"worker_id": "x" * 65}, "worker_id"),
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


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        (["serve", "--port", "80"], {}, "port is 80"),
        (["serve", "--port", "eighty"], {}, "eighty"),
        (["serve", "--no-such-flag", "1"], {}, "no-such-flag"),
        (["serve", "--device", "tpu"], {}, "tpu"),
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


def test_unknown_keys_in_the_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    for text, reason in {"prot: 9000\n": "prot", "- 1\n": "name: value", "a: [\n": "not YAML"}.items():
        file.write_text(text)
        done = run("--config", str(file), "serve")
        assert done.returncode == 1
        assert reason in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
