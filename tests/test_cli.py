"""The command line as a user meets it: child processes, their output and their exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.running import all_logits
from tests.tokenizer.vocabularies import unpack
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf


def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "worker_orcd", *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLORCH_")}
    return subprocess.run(command, input=stdin, capture_output=True, env=clean, timeout=60)


def ok(*arguments: object, stdin: bytes = b"") -> bytes:
    done = run(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def failure(*arguments: object, stdin: bytes = b"") -> str:
    """The one line on stderr of a command that exits with 1."""
    done = run(*arguments, stdin=stdin)
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("phi3").write(tmp_path_factory.mktemp("cli") / "tiny.gguf")


def test_inspect(model: Path) -> None:
    report = json.loads(ok("inspect", model, "--json"))
    with GgufFile.open(model) as gguf:
        assert report["architecture"] == "phi3"
        assert report["num_tensors"] == len(gguf.tensors) == len(report["tensors"])
        assert report["tensor_bytes"] == sum(t["bytes"] for t in report["tensors"]) == report["types"]["F32"]["bytes"]
        assert report["parameters"] * 4 == report["tensor_bytes"]
        assert report["size_bytes"] == model.stat().st_size
        assert set(report["metadata"]) == set(gguf.metadata)
    assert report["metadata"]["tokenizer.ggml.tokens"]["length"] == 321
    text = ok("inspect", model).decode()
    for part in ("phi3.block_count", "blk.1.ffn_up.weight", "320×96", "F32"):
        assert part in text


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"\x7fELF" + b"\0" * 100])
def test_inspect_says_in_one_line_what_is_wrong(tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    line = failure("inspect", bad)
    assert line.startswith("MODEL_LOAD_FAILED: ")
    assert " at byte " in line


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path in (tmp_path / "missing.gguf", tmp_path, fifo, Path("/dev/zero")):
        assert failure("inspect", path).startswith("MODEL_LOAD_FAILED: ")


def test_plan(model: Path) -> None:
    report = json.loads(ok("plan", model, "--json", "--device", "cpu", "--context-length", "100", "--max-batch", "1"))
    assert report["total_bytes"] == sum(item["bytes"] for item in report["items"])
    purposes = {item["purpose"]: item["bytes"] for item in report["items"]}
    assert purposes["weights"] == report["tensor_bytes"]  # this file is float32 already
    assert purposes["kv_cache"] == 2 * 2 * 4 * 24 * 4 * 128  # whole blocks of 32 tokens
    assert "total" in ok("plan", model).decode()
    assert failure("plan", "/nonexistent.gguf").startswith("MODEL_LOAD_FAILED: ")


def test_tokenize(tmp_path: Path) -> None:
    vocab = unpack("qwen2", tmp_path)
    assert json.loads(ok("tokenize", "--model", vocab, stdin=b"Hello world")) == {"ids": [9707, 1879]}
    assert json.loads(ok("tokenize", "--model", vocab, stdin=b"")) == {"ids": []}
    assert json.loads(ok("tokenize", "--model", vocab, stdin=b"<|im_end|>")) == {"ids": [151645]}
    plain = json.loads(ok("tokenize", "--model", vocab, "--no-parse-special", stdin=b"<|im_end|>"))
    assert len(plain["ids"]) > 1
    phi = unpack("phi-3", tmp_path)
    assert json.loads(ok("tokenize", "--model", phi, "--add-special", stdin=b"Hello"))["ids"][0] == 1
    assert failure("tokenize", "--model", vocab, stdin=b"ok \xff").endswith("not UTF-8 at byte 3")


def test_logits(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    ok("logits", "--model", model, "--ids", "1,2,3,320", "--out", out, "--device", "cpu")
    values = np.load(out)
    assert values.dtype == np.float32
    assert np.array_equal(values, all_logits(model, [1, 2, 3, 320]).numpy())


@pytest.mark.parametrize("ids", ["", "1,,2", "a", "321", "-1", ",".join(["1"] * 513)])
def test_logits_refuses_bad_ids(model: Path, tmp_path: Path, ids: str) -> None:
    line = failure("logits", "--model", model, f"--ids={ids}", "--out", tmp_path / "x.npy", "--device", "cpu")
    assert line.startswith("INVALID_REQUEST: ids: ")


def test_without_a_gpu_nothing_starts_unless_the_cpu_is_asked_for(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker_orcd", "logits", "--model", model, "--ids", "1", "--out", tmp_path / "x"]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"--device cpu" in done.stderr
    assert b"Traceback" not in done.stderr


def test_closed_and_full_files_and_odd_names_cause_no_traceback(model: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/b\xffd.gguf")
    Path(odd).write_bytes(model.read_bytes())
    python, quoted = sys.executable, str(model)
    for command in (
        f"{python} -m worker_orcd tokenize --model {quoted} <&-",
        f"{python} -m worker_orcd inspect {quoted} >/dev/full",
        f"PYTHONIOENCODING=ascii {python} -m worker_orcd inspect {quoted}",
        f"{python} -m worker_orcd plan --json {tmp_path}/b*.gguf",
        f"{python} -m worker_orcd inspect --json {tmp_path}/b*.gguf",
        f"{python} -m worker_orcd inspect {quoted} <&- >&- 2>&-",
    ):
        done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
        assert b"Traceback" not in done.stderr, command
        assert done.returncode in (0, 1)


def test_a_hostile_tensor_name_stays_on_its_line(tmp_path: Path) -> None:
    built = tiny.build("qwen2")
    built.tensors["evil\nMODEL_OK\x1b[31m"] = np.zeros(4, np.float32)
    line = failure("plan", built.write(tmp_path / "evil.gguf"))
    assert "MODEL_OK" in line
    assert "\x1b" not in line


def test_plan_refuses_what_serve_would_refuse(tmp_path: Path) -> None:
    built = tiny.build("qwen2")
    rows = [(n, a.shape, GgmlType.F32, a) for n, a in built.tensors.items() if n != "output_norm.weight"]
    path = tmp_path / "odd.gguf"
    write_gguf(path, built.metadata, [*rows, ("output_norm.weight", (96,), GgmlType.I16, np.zeros(96, np.int16))])
    assert "output_norm.weight is I16" in failure("plan", path)


def test_a_reader_that_leaves_early_causes_no_traceback(model: Path) -> None:
    command = f"{sys.executable} -m worker_orcd inspect {model} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
