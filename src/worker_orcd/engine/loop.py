"""What an engine and its client say to each other, and the loop that turns an EngineCore.

The same messages go through a queue between two threads (engine/engine.py) or over a socket between two processes
(engine/process.py). Requests are known by numbers that are never used twice, so a late word about one that is over
cannot be taken for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from worker_orcd.engine.core import EngineCore, Output, blame
from worker_orcd.engine.request import ModelInfo, Request, SamplingParams
from worker_orcd.errors import ShuttingDown

IDLE_CHECK_S = 0.2  # quiet for so long, the engine checks that its cache adds up
INSPECT_S = 60.0  # how often it looks where its tensors lie

Inspect = Callable[[], str]  # what is wrong with where tensors lie; empty when all is well


class Submit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int
    request: Request
    arrived_s: float | None = None  # on the monotonic clock; now when left out


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
    warnings: list[str] = []  # what does not go as it should, and does no harm to answers
    memory: dict[str, int] = {}  # bytes set aside, by purpose


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


class Inspected(msgspec.Struct, frozen=True, tag=True):
    """Where tensors lie has changed: `problem` says how, and is empty when all is well again."""

    problem: str


class Warned(msgspec.Struct, frozen=True, tag=True):
    """Since it was ready, something no longer goes as it should; answers are the same."""

    warning: str


Message = Report | Broken | Inspected | Warned


def run_loop(
    core: EngineCore,
    receive: Callable[[float | None], list[Command]],
    send: Callable[[Message], None],
    inspect: Inspect | None = None,
) -> bool:
    """Turn `core` until Close; True when it ended in order.

    `receive` returns what has come in; it waits for something up to so many seconds, with None for ever.
    """
    is_checked, warning = True, core.warning
    inspector = None if inspect is None else _Inspector(inspect)
    try:
        while True:
            if inspector is not None and (news := inspector.news()) is not None:
                send(news)
            quiet_s = None if inspector is None else INSPECT_S
            wait_s = 0.0 if core.has_work else (quiet_s if is_checked else IDLE_CHECK_S)
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
                if core.warning != warning:
                    warning = core.warning
                    send(Warned(warning))
            elif not is_checked and not commands:
                is_checked = True
                send(Report(Output([], None, core.check())))
    except Exception as error:
        send(Broken.by(error))
        return False


class _Inspector:
    """Looks every INSPECT_S, and speaks up when the answer is another one."""

    def __init__(self, inspect: Inspect) -> None:
        self._inspect, self._problem = inspect, ""
        self._next_s = time.monotonic() + INSPECT_S

    def news(self) -> Inspected | None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return None
        self._next_s = now_s + INSPECT_S
        before, self._problem = self._problem, self._inspect()
        return None if self._problem == before else Inspected(self._problem)


def _obey(core: EngineCore, command: Command) -> None:
    if isinstance(command, Submit):
        core.submit(command.number, command.request, command.arrived_s)
    elif isinstance(command, Cancel):
        core.cancel(command.number)


def warm_up(core: EngineCore, max_step_tokens: int, context_length: int, max_batch: int = 0) -> float:
    """Run the largest step and a few small ones before anyone waits; returns seconds of the slowest.

    Given `max_batch`, also one that scores a prompt and those of so many sequences at once: the allocator of a device
    then holds what steps can ask for.
    """
    lengths = [max_step_tokens]
    if max_batch:
        lengths += [max_step_tokens] + [max_step_tokens // max_batch] * max_batch
    sampling = SamplingParams(seed=0, top_p=0.9)
    slowest = 0.0
    for i, length in enumerate(lengths):
        prompt = [0] * max(1, min(length, context_length - 1))
        request = Request(f"warm-up-{i}", prompt, 4, sampling, 1e9, ignore_eos=True, prompt_logprobs=i == 1)
        core.submit(i - len(lengths), request)
        if i < 2:
            slowest = max(slowest, _run(core))
    slowest = max(slowest, _run(core))
    core.drop_cache()
    return slowest


def _run(core: EngineCore) -> float:
    """To the end of all that was submitted; seconds of the slowest step."""
    slowest = 0.0
    while core.has_work:
        stats = core.tick().stats
        slowest = max(slowest, stats.step_ms / 1e3 if stats else 0.0)
    return slowest
