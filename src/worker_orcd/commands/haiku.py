"""`worker-orcd haiku`: a worker seen from outside, start to stop, over its own HTTP interface."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from worker_orcd.commands.client import WorkerClient, refusal_of
from worker_orcd.commands.worker_process import private, running_worker
from worker_orcd.config import WorkerConfig
from worker_orcd.gguf.reader import GgufFile

SEED = 42
MAX_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    first_token_ms: float
    tokens_per_second: float


def run_haiku(config: WorkerConfig, prompt: str, as_json: bool) -> int:
    """Exit status: 0 when both answers are the same and the worker stopped cleanly."""
    config = private(config)
    assert config.model is not None
    if config.device == "cpu":
        print("Running the float32 reference backend on the CPU, because --device cpu asks for it.")
    print(f"Starting a worker on {config.model} …", flush=True)
    client = WorkerClient(f"http://127.0.0.1:{config.port}", config.api_key, config.inference_timeout_sec)
    body = {
        "prompt": prompt,
        "temperature": 0.0,
        "seed": SEED,
        "max_tokens": min(MAX_TOKENS, config.max_tokens_out),
        "apply_chat_template": _has_chat_template(config.model),
    }
    with running_worker(config) as worker:
        print(f"> {prompt}\n")
        first = ask(client, body | {"job_id": "haiku-1"}, show=True)
        second = ask(client, body | {"job_id": "haiku-2"}, show=False)
        client.post("/shutdown", {}).close()
        stopped = worker.wait(timeout=config.shutdown_timeout_sec + 10)
    identical = first.token_ids == second.token_ids
    print(f"\nAsked twice with seed {SEED}: the token ids are {'identical' if identical else 'DIFFERENT'}.")
    print(
        f"{len(second.token_ids)} tokens, {second.tokens_per_second:.0f} tokens/s, "
        f"first token after {second.first_token_ms:.0f} ms; worker stopped with status {stopped}."
    )
    if as_json:
        print(_json_line(first, second, identical))
    return 0 if identical and stopped == 0 else 1


def _json_line(first: Answer, second: Answer, identical: bool) -> str:
    report = {
        "text": first.text,
        "token_ids": first.token_ids,
        "repeat_identical": identical,
        "tokens_per_second": round(second.tokens_per_second, 1),
        "first_token_ms": round(second.first_token_ms, 2),
    }
    return json.dumps(report)


def ask(client: WorkerClient, body: dict[str, object], show: bool) -> Answer:
    """One POST /execute, its stream read to the end. Raises RequestRefused when the worker reports an error."""
    began = time.perf_counter()
    first = last = began
    text, ids = "", list[int]()
    with closing(client.events("/execute", body)) as events:
        for event, data in events:
            if event == "error":
                raise refusal_of(data, "the answer broke off")
            if event == "token":
                last = time.perf_counter()
                first = last if not ids else first
                ids.append(int(data["id"]))
            piece = str(data.get("t", ""))
            text += piece
            if show:
                print(piece, end="", flush=True)
    if show:
        print()
    speed = (len(ids) - 1) / (last - first) if last > first else 0.0
    return Answer(text, ids, (first - began) * 1e3, speed)


def _has_chat_template(model: Path) -> bool:
    with GgufFile.open(model) as gguf:
        return "tokenizer.chat_template" in gguf.metadata
