"""`worker-orcd bench`: how fast a model is at each number of requests at once, in this process or over HTTP."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from worker_orcd.assemble import draw_up, embedded_model
from worker_orcd.commands.client import RequestRefused, WorkerClient
from worker_orcd.commands.options import BenchOptions
from worker_orcd.commands.plot import draw_charts
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import InvalidRequest
from worker_orcd.synthetic import parse_name, write_synthetic

WORDS = ("time", "house", "river", "number", "people", "water", "light", "story", "green", "music", "paper", "stone")
PACKAGES = ("worker-orcd", "torch", "triton", "nvidia-cuda-nvrtc")
HEADINGS = ("requests", "prompt tok/s", "tok/s", "tok/s each", "first token ms", "ms per token", "p99")


@dataclass(frozen=True)
class Row:
    """One batch size. Tokens a second are of all requests together unless said otherwise."""

    batch: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    tokens_per_second_each: float
    first_token_ms: float  # until all of them had one
    token_ms: float  # between tokens of one request, median
    token_ms_p99: float


Measure = Callable[[int], Row]


def run_bench(config: WorkerConfig, options: BenchOptions) -> int:
    """Measure, show a table, write what was asked for."""
    console = Console()
    for path in filter(None, (options.json, options.plot)):
        _check_writable(path)  # not after all the measuring
    if options.synthetic is not None:
        config = replace(config, model=synthetic_model(options.synthetic, console))
    with console.status("getting ready …"):
        subject, measure = _over_http(config, options) if options.url else _in_process(config, options)
    table = Table(*HEADINGS, title=f"{subject}: {options.prompt_tokens} tokens in, {options.tokens} out")
    for column in table.columns:
        column.justify = "right"
    rows = []
    for size in options.sizes:
        with console.status(f"{size} at once …"):
            rows.append(_median([measure(size) for _ in range(options.repeat)]))
        table.add_row(
            *(f"{value:,.{0 if value >= 100 or value == size else 2}f}" for value in asdict(rows[-1]).values())
        )
    console.print(table)
    if options.json is not None:
        _write(options.json, json.dumps(_report(subject, options, rows), indent=1) + "\n")
    if options.plot is not None:
        speed = ("tokens per second", [row.tokens_per_second for row in rows])
        wait = ("milliseconds per token", [row.token_ms for row in rows])
        _write(options.plot, draw_charts(subject, "requests at once", options.sizes, [speed, wait]))
    return 0


def synthetic_model(name_and_quant: str, console: Console) -> Path:
    """The file of NAME:QUANT in the cache folder, written unless it is there."""
    name, quant = parse_name(name_and_quant)
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = base / "worker-orcd" / "synthetic" / f"{name}-{quant}.gguf"
    if path.is_file():
        return path
    console.print(f"Writing {path}")
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=None)
            on_bytes = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
            write_synthetic(path, name, quant, on_bytes=on_bytes)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}; XDG_CACHE_HOME says where to") from None
    return path


def _in_process(config: WorkerConfig, options: BenchOptions) -> tuple[str, Measure]:
    from worker_orcd.commands.engine_driver import load_core, run_batch  # torch

    context = options.prompt_tokens + options.tokens + 1
    largest = max(options.sizes)
    if config.context_length not in (None, context):
        print(f"note: the context is {context}, what is needed, not {config.context_length}", file=sys.stderr)
    config = replace(config, model=config.model or embedded_model(), context_length=None, max_batch=largest)
    with (blueprint := draw_up(config)).gguf:
        if context > (allowed := blueprint.spec.context_length):
            raise InvalidRequest(
                f"prompt_tokens is {options.prompt_tokens} and tokens {options.tokens}, which needs a context of "
                f"{context}; this model allows {allowed}"
            )
    core, facts = load_core(replace(config, context_length=context))
    run_batch(core, 1, options.prompt_tokens, 2)  # warms up

    def measure(batch: int) -> Row:
        run = run_batch(core, batch, options.prompt_tokens, options.tokens)
        return _row(batch, batch * options.prompt_tokens, run.prefill_s, 1 / run.token_s, run.step_ms)

    return f"{facts.info.name}, {facts.info.quant_kind}, {facts.info.backend} on {facts.info.device}", measure


@dataclass(frozen=True)
class Stream:
    """One answer over HTTP. Times in seconds on one clock."""

    prompt_tokens: int
    num_tokens: int
    began_s: float
    first_s: float
    last_s: float


def _over_http(config: WorkerConfig, options: BenchOptions) -> tuple[str, Measure]:
    client = WorkerClient(options.url or "", config.api_key, config.inference_timeout_sec)
    model = client.model()
    draw = random.Random(0)
    probe = _stream(client, model, " ".join(draw.choices(WORDS, k=64)), 2)
    num_words = max(1, round(options.prompt_tokens * 64 / max(1, probe.prompt_tokens)))

    def measure(batch: int) -> Row:
        prompts = [" ".join(draw.choices(WORDS, k=num_words)) for _ in range(batch)]
        with ThreadPoolExecutor(batch) as threads:
            jobs = [threads.submit(_stream, client, model, prompt, options.tokens) for prompt in prompts]
            streams = [job.result() for job in jobs]
        began, ended = min(s.began_s for s in streams), max(s.last_s for s in streams)
        all_first = max(s.first_s for s in streams) - began
        after_first = sum(s.num_tokens - 1 for s in streams)
        speed = after_first / max(1e-9, ended - min(s.first_s for s in streams))
        gaps_ms = [(s.last_s - s.first_s) * 1e3 / max(1, s.num_tokens - 1) for s in streams]
        return _row(batch, sum(s.prompt_tokens for s in streams), all_first, speed, gaps_ms)

    return f"{model} at {options.url}", measure


def _stream(client: WorkerClient, model: str, prompt: str, tokens: int) -> Stream:
    """Ask for `tokens` tokens and read them to the end. Raises RequestRefused when none come."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": 1, "ignore_eos": True}
    began = time.perf_counter()
    first = last = 0.0
    usage, pieces = dict[str, Any](), 0
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    with closing(client.events("/v1/completions", body | stream)) as events:
        for _, chunk in events:
            if chunk and chunk.get("error"):
                raise RequestRefused(str(chunk["error"].get("message", "an answer broke off")))
            if chunk and chunk.get("choices"):
                last = time.perf_counter()
                first, pieces = first or last, pieces + 1
            usage = (chunk and chunk.get("usage")) or usage
    if not first:
        raise RequestRefused("an answer came without a token")
    return Stream(usage.get("prompt_tokens", 0), usage.get("completion_tokens", pieces), began, first, last)


def _row(batch: int, prompt_tokens: int, prefill_s: float, speed: float, token_ms: Sequence[float]) -> Row:
    ordered = sorted(token_ms) or [0.0]
    p99 = ordered[max(0, -(-len(ordered) * 99 // 100) - 1)]
    numbers = (prompt_tokens / prefill_s, speed, speed / batch, prefill_s * 1e3, statistics.median(ordered), p99)
    return Row(batch, *(round(number, 3) for number in numbers))


def _median(rows: list[Row]) -> Row:
    """Number by number."""
    columns = zip(*(asdict(row).values() for row in rows), strict=True)
    batch, *numbers = (statistics.median(column) for column in columns)
    return Row(int(batch), *numbers)


def _report(subject: str, options: BenchOptions, rows: list[Row]) -> dict[str, Any]:
    return {
        "name": "bench",
        "subject": subject,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "num_cpus": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "settings": {
            name: getattr(options, name) for name in ("url", "synthetic", "prompt_tokens", "tokens", "repeat")
        },
        "rows": [asdict(row) for row in rows],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InvalidRequest(f"cannot write {path}; name a file in a folder that is there and can be written to")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
