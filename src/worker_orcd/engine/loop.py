"""What an engine and its client say to each other, and the loop that turns an EngineCore.

The same messages go through a queue between two threads (engine/engine.py) or over a socket between two processes
(engine/process.py). Requests are known by numbers that are never used twice, so a late word about one that is over
cannot be taken for another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from worker_orcd.engine.core import EngineCore, Output, blame
from worker_orcd.engine.request import ModelInfo, Request, SamplingParams
from worker_orcd.errors import ShuttingDown

IDLE_CHECK_S = 0.2  # quiet for so long, the engine checks that its cache adds up


class Submit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int


class Close(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """End everything that runs, then the loop."""


Command = Submit | Cancel | Close


class EngineFacts(msgspec.Struct, frozen=True, tag=True):
    """The engine is ready; what does not change from here on."""

    info: ModelInfo
    num_blocks: int
    block_size: int  # tokens
    max_batch: int
    vram_bytes: int  # device memory it holds; 0 on the CPU
    slowest_step_s: float  # of the largest step, tried before it was ready


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or cannot go on; `code` is one of errors.py."""

    code: str
    message: str
    details: dict[str, Any]

    @classmethod
    def by(cls, error: Exception) -> Broken:
        cause = blame(error)
        details = {key: _printable(value) for key, value in cause.details.items()}
        return cls(cause.code, _printable(cause.message), details)


def _printable(value: Any) -> Any:
    """Texts may name files, whose names need not be UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class Report(msgspec.Struct, frozen=True, tag=True):
    """One message per step."""

    output: Output


Message = Report | Broken


def run_loop(
    core: EngineCore, receive: Callable[[float | None], list[Command]], send: Callable[[Message], None]
) -> bool:
    """Turn `core` until Close; True when it ended in order.

    `receive` returns what has come in; it waits for something up to so many seconds, with None for ever.
    """
    is_checked = True
    try:
        while True:
            wait_s = 0.0 if core.has_work else (None if is_checked else IDLE_CHECK_S)
            commands = receive(wait_s)
            for command in commands:
                if isinstance(command, Close):
                    core.fail_all(ShuttingDown("the worker is shutting down"))
                    send(Report(core.tick()))
                    return True
                _obey(core, command)
            if core.has_work:
                send(Report(core.tick()))
                is_checked = False
            elif not is_checked and not commands:
                is_checked = True
                send(Report(Output([], None, core.check())))
    except Exception as error:
        send(Broken.by(error))
        return False


def _obey(core: EngineCore, command: Command) -> None:
    if isinstance(command, Submit):
        core.submit(command.number, command.request)
    elif isinstance(command, Cancel):
        core.cancel(command.number)


def warm_up(core: EngineCore, max_step_tokens: int, context_length: int) -> float:
    """Run the largest step and a few small ones before anyone waits; returns seconds of the slowest."""
    prompt = [0] * max(1, min(max_step_tokens, context_length - 1))
    core.submit(0, Request("warm-up", prompt, 4, SamplingParams(seed=0), timeout_s=1e9))
    slowest = 0.0
    while core.has_work:
        stats = core.tick().stats
        slowest = max(slowest, stats.step_ms / 1e3 if stats else 0.0)
    core.drop_cache()
    return slowest
