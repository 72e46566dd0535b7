"""`replay`: a receipt of an answer given in company comes out the same alone, and anything else is noticed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.server.client import Rig
from worker_orcd import cli
from worker_orcd.assemble import draw_up, load_texts
from worker_orcd.commands.replay import load_core, read_receipts, run_replay
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.engine import BatchEngine
from worker_orcd.engine.metrics import PrometheusMetrics
from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf.fingerprint import SAMPLE_BYTES, fingerprint
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.narration import Capture, Narrator
from worker_orcd.server.app import create_app

CASES: dict[str, dict[str, Any]] = {
    "sampled": {"prompt": "one", "max_tokens": 20, "seed": 1},
    "eos": {"prompt": "night", "max_tokens": 60, "seed": 0},
    "empty": {"prompt": "one", "max_tokens": 60, "seed": 5},
    "penalized": {"prompt": "two", "max_tokens": 9, "seed": 2**64 - 1, "repetition_penalty": 1.5, "top_k": 40},
    "greedy": {"prompt": "one", "max_tokens": 12, "temperature": 0.0},
    "context": {"prompt": "x" * 200, "max_tokens": 500, "seed": 1},
}

REASONS = {"eos": "eos", "empty": "eos", "context": "context_length"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    path = tiny.build("qwen2").write(tmp_path_factory.mktemp("replay") / "tiny.gguf")
    return WorkerConfig(model=path, device="cpu")


@pytest.fixture(scope="module")
def receipts(config: WorkerConfig) -> dict[str, dict[str, Any]]:
    """Of all cases, which ran at once."""
    log, metrics = Capture(), PrometheusMetrics("w", "F32")
    small = replace(config, context_length=256)
    engine = BatchEngine(*load_core(small, draw_up(small)), 16, metrics)
    tokenizer = load_texts(config, draw_up(config)).tokenizer
    app = create_app(engine, tokenizer, None, config, Narrator("w", "tiny", None, sink=log), metrics)
    rig = Rig(engine, app, log, metrics)  # type: ignore[arg-type]

    async def ask(name: str) -> dict[str, Any]:
        answer = await rig.acall("POST", "/execute", CASES[name] | {"job_id": name}, {"x-receipt": "full"})
        assert answer.status == 200
        return dict(answer.events[-1].data["receipt"])

    async def score() -> dict[str, Any]:
        body = {"prompt": "one", "echo": True, "max_tokens": 0, "logprobs": 2, "seed": 3}
        answer = await rig.acall("POST", "/v1/completions", body, {"x-receipt": "full"})
        assert answer.json["usage"]["completion_tokens"] == 0
        return dict(answer.json["receipt"])

    async def scenario() -> list[dict[str, Any]]:
        return await asyncio.gather(score(), *map(ask, CASES))

    try:
        return dict(zip(["scored", *CASES], asyncio.run(scenario()), strict=True))
    finally:
        engine.close()


def written(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "receipt.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("name", [*CASES, "scored"])
def test_the_same_comes_out(
    name: str, receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = receipts[name]
    assert receipt["stop_reason"] == REASONS.get(name, "max_tokens")
    path = written(tmp_path, {"tokens_out": 1, "receipt": receipt} if name == "sampled" else receipt)
    assert run_replay(path, config) == 0
    assert capsys.readouterr().out.startswith(f"identical: {receipt['output_tokens']} tokens")


def test_an_answer_cut_by_a_stop_string_is_compared_up_to_there(
    receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path
) -> None:
    whole = receipts["sampled"]
    cut = whole | {"stop_reason": "stop_sequence", "max_tokens": 200}
    assert run_replay(written(tmp_path, cut), config) == 0


def test_several_receipts_are_all_compared(
    receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = receipts["sampled"], receipts["greedy"] | {"max_tokens": 3}
    assert run_replay(written(tmp_path, {"choices": [], "receipts": [good, receipts["eos"]]}), config) == 0
    assert run_replay(written(tmp_path, {"receipts": [bad, good]}), config) == 1
    events = [{"t": '"receipt"'}, {"t": ".", "receipt": good}, {"receipt": bad}]
    stream = "".join(f"event: any\ndata: {json.dumps(event)}\n\n" for event in events)
    assert run_replay(written(tmp_path, f"{stream}data: [DONE]\n\n"), config) == 1
    assert run_replay(written(tmp_path, stream[:-30]), config) == 0, "what was cut off is left out"
    told = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["identical", "identical", "DIFFERENT", "identical", "identical", "DIFFERENT", "identical"]


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"seed": 2}},
        {"sampling": {"seed": 1, "temperature": 0.0}},
        {"max_tokens": 19},
        {"stop_reason": "eos"},
        {"output_sha256": "0" * 64},
    ],
)
def test_what_differs_is_noticed(
    change: dict[str, Any], receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path, capsys: Any
) -> None:
    assert run_replay(written(tmp_path, receipts["sampled"] | change), config) == 1
    assert capsys.readouterr().out.startswith("DIFFERENT")


def test_other_kernels_are_mentioned(
    receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path, capsys: Any
) -> None:
    receipt = receipts["sampled"] | {"kernels": "cuda 9"}
    assert run_replay(written(tmp_path, receipt), config) == 0
    assert "computed then by cuda 9, now by torch-reference" in capsys.readouterr().err


def test_another_context_than_the_one_of_then_is_mentioned(
    receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path, capsys: Any
) -> None:
    receipt, then = receipts["sampled"], receipts["sampled"]["context_length"]
    assert run_replay(written(tmp_path, receipt), replace(config, context_length=then + 1)) == 0
    assert f"the context is {then}, as it was then, not {then + 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("", "neither JSON nor a stream"),
        ("event: end\ndata: {}\n\n", "neither JSON nor a stream"),
        ("[" * 100_000, "neither JSON nor a stream"),
        ("[]", "is none"),
        ("[1]", "is none"),
        ("{}", "missing required field"),
        ({"prompt_ids": None}, "X-Receipt: full"),
        ({"prompt_ids": [1, 2, 3]}, "was changed"),
        ({"prompt_ids": [-1]}, ">= 0"),
        ({"prompt_ids": [2**32]}, "<= 4294967295"),
        ({"sampling": {"seed": "x"}}, "int"),
        ({"sampling": {"seed": 1, "logit_bias": {"99999": 1.0}}}, "token id 99999"),
        ({"stop_ids": [-5]}, "token id -5"),
        ({"fingerprint": "0" * 64}, "not the file of this receipt"),
    ],
)
def test_what_cannot_be_run_is_refused(
    document: Any, reason: str, receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path
) -> None:
    if isinstance(document, dict):
        document = receipts["sampled"] | document
    with pytest.raises(InvalidRequest, match=reason):
        run_replay(written(tmp_path, document), config)


def test_the_command(receipts: dict[str, Any], config: WorkerConfig, tmp_path: Path, capsys: Any) -> None:
    path = written(tmp_path, receipts["greedy"])
    assert read_receipts(path)[0].prompt_tokens == receipts["greedy"]["prompt_tokens"]
    arguments = ["replay", str(path), "--model", str(config.model), "--device", "cpu"]
    assert cli.app.meta(arguments, exit_on_error=False, result_action="return_value") == 0
    assert "identical" in capsys.readouterr().out


def test_fingerprints_tell_files_apart(config: WorkerConfig, tmp_path: Path) -> None:
    assert config.model is not None
    raw = config.model.read_bytes()

    def of(data: bytes) -> str:
        path = tmp_path / "other.gguf"
        path.write_bytes(data)
        with GgufFile.open(path) as gguf:
            return fingerprint(gguf)

    with GgufFile.open(config.model) as gguf:
        info = next(info for info in gguf.tensors.values() if info.nbytes > 4 * SAMPLE_BYTES)
    changed = [raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :] for i in (info.offset, info.offset + info.nbytes - 1)]
    renamed = raw.replace(b"tiny qwen2", b"tiny gwen2", 1)
    assert renamed != raw
    assert of(raw) == of(raw) == fingerprint(GgufFile.open(config.model))
    assert len({of(data) for data in (raw, renamed, *changed)}) == 4
