"""The life of a worker process: load, listen, serve, end. And `logits`, which only loads."""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from worker_orcd import __version__, assemble
from worker_orcd.assemble import Blueprint, Texts, draw_up, load_runtime, load_texts, shortened
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.client import EngineClient
from worker_orcd.engine.loop import EngineFacts
from worker_orcd.engine.metrics import PrometheusMetrics
from worker_orcd.engine.process import ProcessLink
from worker_orcd.engine_process import Setup
from worker_orcd.errors import FieldError, InvalidRequest, WorkerError
from worker_orcd.narration import BackgroundSink, Narrator
from worker_orcd.server.app import create_app
from worker_orcd.server.auth import ApiKeys
from worker_orcd.server.run import bind, serve, tls_context
from worker_orcd.signals import Stopped, StopRequest

SWITCH_S = 0.0005  # how long the event loop waits for a thread that prepares a long prompt; Python's own is 5 ms
MAX_DIGITS = 640  # of an integer in a body, the least Python knows; thousands of longer ones would hold streams up
ENGINE_MODULE = "worker_orcd.engine_process"


def run_worker(config: WorkerConfig, stop: StopRequest) -> int:
    """Serve until told to stop, by `stop` or over HTTP; returns the exit status.

    Raises WorkerError when the worker cannot start.
    """
    model = str(config.model or assemble.embedded_model())
    # stderr is None when it was closed; its number may then belong to something else
    stderr = sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY)
    with closing(BackgroundSink(stderr)) as sink:
        return _live(config, stop, Narrator(config.worker_id, model, _gpu(config), sink, config.log_level))


def _live(config: WorkerConfig, stop: StopRequest, narrator: Narrator) -> int:
    narrator.narrate(
        "startup",
        "starting",
        action="start",
        version=__version__,
        pid=os.getpid(),
        host=config.host,
        port=config.port,
    )
    link: ProcessLink | None = None
    try:
        ApiKeys.of(config)  # what is wrong with them, or with the certificate, is told before the model is loaded
        tls = tls_context(config)
        listener = bind(config.host, config.port)
        stop.check()
        blueprint = draw_up(config)
        link = ProcessLink(ENGINE_MODULE)
        texts = load_texts(config, blueprint)
        for warning in (shortened(config, blueprint), texts.chat_template and texts.chat_template.problem):
            if warning:
                _warn(narrator, "start", warning)
        blueprint.gguf.close()
        _configure(config, blueprint, texts, link)
        facts = _load_model(blueprint, link, stop, narrator)
        metrics = PrometheusMetrics(config.worker_id, facts.info.quant_kind)
        engine = EngineClient(link, facts, config.max_queue, metrics)
        engine.on_inspected = partial(_tell_of_memory, narrator)
        engine.on_warned = partial(_warn, narrator, "step")
        app = create_app(engine, texts.tokenizer, texts.chat_template, config, narrator, metrics)
        sys.setswitchinterval(SWITCH_S)
        sys.set_int_max_str_digits(MAX_DIGITS)
        gc.collect()
        gc.freeze()  # what is there now stays; collecting it again and again would hold streams up
        stop.pass_to(app.state.control.stop)
        return serve(app, listener, engine, narrator, tls)
    except Stopped:
        narrator.narrate("shutdown", "stopped before serving", action="stop", reason="signal", exit_code=0)
        return 0
    except WorkerError as error:
        narrator.narrate(
            "error", error.message[:100], level="fatal", action="start", code=error.code, reason=error.message
        )
        raise
    finally:
        if link is not None:
            link.close(is_orderly=False)


def _configure(config: WorkerConfig, blueprint: Blueprint, texts: Texts, link: ProcessLink) -> None:
    padding = range(texts.tokenizer.vocab_size, blueprint.spec.vocab_size)
    setup = Setup(config, sorted(texts.tokenizer.eog_ids), [*texts.tokenizer.unsampleable, *padding])
    link.configure(setup.encode())


def _load_model(blueprint: Blueprint, link: ProcessLink, stop: StopRequest, narrator: Narrator) -> EngineFacts:
    """The one long part of starting, told as it goes."""
    began = time.monotonic()
    total = sum(info.nbytes for info in blueprint.gguf.tensors.values())
    narrator.narrate("model_load_start", f"loading {total} bytes", action="load", bytes_total=total)

    def tell(percent: int, done: int, total: int) -> None:
        narrator.narrate(
            "model_load_progress",
            f"{percent} % loaded",
            action="load",
            percent=percent,
            bytes_done=done,
            bytes_total=total,
        )

    facts = link.wait_until_ready(tell, stop.check)
    narrator.narrate(
        "model_load_complete",
        f"loaded {total} bytes",
        action="load",
        bytes_total=total,
        vram_bytes=facts.vram_bytes,
        load_ms=round((time.monotonic() - began) * 1e3),
    )
    for warning in facts.warnings:
        _warn(narrator, "start", warning)
    return facts


def _warn(narrator: Narrator, action: str, warning: str) -> None:
    narrator.narrate("error", warning, level="warn", component="engine", action=action, reason=warning)


def _tell_of_memory(narrator: Narrator, problem: str) -> None:
    if problem:
        narrator.narrate("error", problem[:100], level="fatal", action="inspect_memory", code="CUDA_ERROR")


def write_logits(config: WorkerConfig, ids_text: str, out: Path) -> None:
    """Write float32 [tokens, vocab] for the ids in `ids_text` ("1,2,3") as .npy. Raises InvalidRequest."""
    ids = _parse_ids(ids_text, draw_up(config))
    from worker_orcd.engine.score import score  # imports torch, which `serve` leaves to the engine's process

    blueprint = draw_up(replace(config, context_length=max(2, len(ids)), max_batch=1))  # no more than what is asked
    runtime = load_runtime(config, blueprint, lambda *_: None)
    values = score(runtime, ids, blueprint.max_step_tokens).numpy()
    try:
        with out.open("wb") as file:
            np.save(file, values)
    except OSError as error:
        raise InvalidRequest(f"cannot write {out}: {error.strerror}") from error
    print(f"{out}: float32 {list(values.shape)}", file=sys.stderr)


def _parse_ids(text: str, blueprint: Blueprint) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise _bad_ids("type", "comma-separated integers are needed, such as 1,2,3") from None
    vocab = blueprint.spec.vocab_size
    if wrong := [i for i in ids if not 0 <= i < vocab]:
        raise _bad_ids("range", f"{wrong[0]} is outside 0-{vocab - 1}")
    if len(ids) > blueprint.context_length:
        raise _bad_ids("range", f"{len(ids)} tokens, the context holds {blueprint.context_length}")
    return ids


def _bad_ids(constraint: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"ids: {message}", [FieldError("ids", constraint, message)])


def _gpu(config: WorkerConfig) -> int | None:
    return config.gpu_device if config.device == "cuda" else None
