"""A worker without a model: the real API process over the engine of fake_engine.py.

Token ids are bytes, so a prompt of n ASCII letters has n tokens. It logs, serves and ends as `worker-orcd serve`
does; on SIGUSR1 it logs how many asyncio tasks it has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import gc
import os
import pstats
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, get_args

import msgspec
from fake_options import FakeOptions, Fault

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.client import EngineClient
from worker_orcd.engine.metrics import PrometheusMetrics
from worker_orcd.engine.process import ProcessLink
from worker_orcd.errors import WorkerError
from worker_orcd.narration import BackgroundSink, Narrator
from worker_orcd.server.app import create_app
from worker_orcd.server.run import bind, serve
from worker_orcd.signals import Stopped, StopRequest
from worker_orcd.worker import SWITCH_S


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256 is never generated."""

    kind: Literal["gguf-bpe"] = "gguf-bpe"
    model: Literal["bpe"] = "bpe"
    vocab_size = 257
    bos_id = None
    eos_id = 256
    eog_ids = frozenset({256})
    unsampleable: Sequence[int] = ()

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:  # noqa: ARG002
        return list(text.encode())

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:  # noqa: ARG002
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def is_control(self, token_id: int) -> bool:
        return token_id == 256


def run_fake_worker(
    stop: StopRequest, config: WorkerConfig, options: FakeOptions, send_buffer: int, profile: Path | None
) -> int:
    """Serve until told to stop; returns the exit status."""
    signal.signal(signal.SIGUSR1, lambda *_: print(f"tasks {_num_tasks()}", file=sys.stderr, flush=True))
    with closing(BackgroundSink(sys.stderr.fileno())) as sink:
        narrator = Narrator(config.worker_id, "fake", None, sink, config.log_level)
        link = None
        try:
            listener = bind(config.host, config.port)
            if send_buffer:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
            os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the child finds its module
            link = ProcessLink("fake_engine")
            narrator.narrate("model_load_start", "loading nothing", action="load", bytes_total=0)
            link.configure(msgspec.json.encode(options))
            facts = link.wait_until_ready(lambda *_: None, stop.check)
            metrics = PrometheusMetrics(config.worker_id, "none")
            engine = EngineClient(link, facts, config.max_queue, metrics)
            app = create_app(engine, ByteTokenizer(), None, config, narrator, metrics)
            sys.setswitchinterval(SWITCH_S)
            stop.pass_to(app.state.control.stop)
            with _profiled(profile):
                return serve(app, listener, engine, narrator)
        except Stopped:
            return 0
        except WorkerError as error:
            print(f"{error.code}: {error.message}", file=sys.stderr)
            return 1
        finally:
            if link is not None:
                link.close(is_orderly=False)


def _num_tasks() -> int:
    return sum(isinstance(thing, asyncio.Task) and not thing.done() for thing in gc.get_objects())


@contextlib.contextmanager
def _profiled(out: Path | None) -> Iterator[None]:
    """Write where the time of the API process went, if a file is given."""
    if out is None:
        yield
        return
    profiler = cProfile.Profile()
    try:
        profiler.enable()
        yield
    finally:
        profiler.disable()
        with out.open("w") as file:
            pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(40)


def parse_args() -> tuple[WorkerConfig, FakeOptions, int, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = FakeOptions()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=64, help="requests computed together (default 64)")
    parser.add_argument("--max-queue", type=int, default=128, help="requests that may wait (default 128)")
    parser.add_argument("--num-blocks", type=int, default=default.num_blocks, help="of the KV cache (default 4096)")
    parser.add_argument("--step-ms", type=float, default=0.0, help="what the device takes for a step (default 0)")
    parser.add_argument("--context-length", type=int, default=default.context_length, help="tokens (default 4096)")
    parser.add_argument("--send-buffer", type=int, default=0, help="bytes of an answer the kernel keeps")
    parser.add_argument("--fault", choices=get_args(Fault), default="none", help="what goes wrong (default none)")
    parser.add_argument("--shutdown-timeout-sec", type=float, default=30.0)
    parser.add_argument("--log-level", choices=("info", "error", "mute"), default="info")
    parser.add_argument("--profile", type=Path, help="write a profile of the API process here when it ends")
    args = parser.parse_args()
    config = WorkerConfig(
        port=args.port, max_batch=args.max_batch, max_queue=args.max_queue, log_level=args.log_level,
        shutdown_timeout_sec=args.shutdown_timeout_sec, device="cpu", max_tokens_out=args.context_length,
    )  # fmt: skip
    options = FakeOptions(
        num_blocks=args.num_blocks, max_batch=args.max_batch, max_step_tokens=max(512, args.max_batch),
        step_ms=args.step_ms, fault=args.fault, context_length=args.context_length,
    )  # fmt: skip
    return config, options, args.send_buffer, args.profile


def main() -> int:
    with StopRequest() as stop:
        return run_fake_worker(stop, *parse_args())


if __name__ == "__main__":
    sys.exit(main())
