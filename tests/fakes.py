"""Stand-ins for the parts below the edge: an engine that follows scripts and a tokenizer of bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from worker_orcd.engine.request import (
    EngineStatus,
    Event,
    Failed,
    Finished,
    ModelInfo,
    OnFreed,
    PromptLogprobs,
    Request,
    Started,
    Timings,
    Tokens,
)
from worker_orcd.errors import JobConflict, Overloaded, ShuttingDown, WorkerError

EOS = 256
FREED = Timings(1.5, 2.0, 30.0, 31.5, num_steps=7, num_chunks=3, num_preempted=1)  # the engine's last word on all
STOP_REASONS = ("eos", "max_tokens", "context_length", "stop_sequence")


class ByteTokenizer:
    """Token ids 0 to 255 are bytes, 256 ends the text."""

    kind: Literal["gguf-bpe"] = "gguf-bpe"
    model: Literal["bpe"] = "bpe"
    vocab_size = 257
    bos_id = None
    eos_id = EOS
    eog_ids = frozenset({EOS})
    unsampleable: Sequence[int] = ()

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:  # noqa: ARG002
        return list(text.encode())

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:  # noqa: ARG002
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""

    def is_control(self, token_id: int) -> bool:
        return token_id == EOS


class UserTemplate:
    """A chat template in two brackets."""

    source = "developer"  # a word that templates are searched for

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **extras: Any,  # noqa: ARG002
    ) -> str:
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


# A token id, several at once, seconds to wait, a stop reason, an event as it is, or an exception to raise.
Step = int | list[int] | float | str | Failed | PromptLogprobs | Tokens | Exception


def echo(request: Request) -> list[Step]:
    """The prompt, then the end of the text."""
    return [*request.prompt_ids, "eos"]


def text_script(text: str, pause_s: float = 0.0) -> list[Step]:
    """The bytes of `text`, each after a pause, then the end of the text."""
    steps: list[Step] = []
    for byte in text.encode():
        steps += [pause_s, byte] if pause_s else [byte]
    return [*steps, "eos"]


def forever(pause_s: float = 0.005) -> Iterable[Step]:
    """Tokens without end."""
    while True:
        yield pause_s
        yield ord("x")


@dataclass
class ScriptedEngine:
    """An `InferenceEngine` that plays `script(request)`.

    At most `max_running` requests play at once and `max_queue` wait. `freed` lists the ids of requests in the order
    they let go of what they held, `cancelled` those among them that did not come to their end. Once `failure` is set,
    from any thread, the engine has failed for good.
    """

    script: Callable[[Request], Iterable[Step]] = echo
    max_running: int = 4
    max_queue: int = 16
    is_healthy: bool = True
    is_ready: bool = True
    is_closed: bool = False
    failure: WorkerError | None = None
    cached_tokens: int = 0
    context_length: int = 4096
    memory: dict[str, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    freed: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self._asked: set[str] = set()
        self.on_freed: OnFreed = lambda *_: None
        self.info = ModelInfo(
            name="scripted",
            path="/models/scripted.gguf",
            architecture="llama",
            quant_kind="Q4_K_M",
            context_length=self.context_length,
            vocab_size=257,
            device="cpu",
            backend="scripted",
        )

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        self._admit(request)
        has_ended = False
        try:
            began_s = time.monotonic()
            while len(self.running) >= self.max_running or self.waiting[0] != request.id:
                await asyncio.sleep(0.002)
                if end := self._early_end(request):
                    has_ended = True
                    yield end
                    return
            self.waiting.remove(request.id)
            self.running.add(request.id)
            async with aclosing(self._play(request, began_s)) as events:
                async for event in events:
                    has_ended = isinstance(event, Finished | Failed)
                    yield event
        finally:
            self._free(request.id, has_ended)
            self.on_freed(request, FREED)

    def cancel(self, request_id: str, tenant: str = "") -> bool:  # noqa: ARG002 - one tenant is enough here
        if request_id not in self.running and request_id not in self.waiting:
            return False
        self._asked.add(request_id)
        return True

    def status(self) -> EngineStatus:
        num_running = len(self.running)
        return EngineStatus(
            healthy=self.is_healthy and self.failure is None,
            ready=self.is_ready and self.failure is None,
            reason="" if self.is_ready else "no step for 5 s",
            resident=self.is_healthy,
            vram_bytes_used=1 << 20,
            num_running=num_running,
            num_waiting=len(self.waiting),
            blocks_total=64,
            blocks_used=num_running,
            blocks_cached=8,
            retry_after_s=2,
            memory=self.memory,
        )

    async def watch(self) -> WorkerError:
        while self.failure is None:
            await asyncio.sleep(0.005)
        return self.failure

    def close(self) -> None:
        self.is_closed = True

    def check_room(self, num_coming: int = 0) -> None:
        if self.is_closed or self.failure is not None:
            raise ShuttingDown("the engine is closed")
        if len(self.running) + len(self.waiting) + num_coming >= self.max_running + self.max_queue:
            raise Overloaded(f"{self.max_queue} requests wait already", retry_after_s=self.status().retry_after_s)

    def _admit(self, request: Request) -> None:
        self.requests.append(request)
        if request.id in self.running or request.id in self.waiting:
            raise JobConflict("this id is running")
        self.check_room()
        self.waiting.append(request.id)

    async def _play(self, request: Request, began_s: float) -> AsyncGenerator[Event, None]:
        yield Started(self.cached_tokens)
        started_s, num_tokens = time.monotonic(), 0
        for step in self.script(request):
            if end := self._early_end(request):
                yield end
                return
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            elif isinstance(step, Failed):
                yield step
                return
            elif isinstance(step, PromptLogprobs | Tokens):
                yield step
            elif isinstance(step, str):
                assert step in STOP_REASONS
                yield Finished(step, _timings(began_s, started_s))  # type: ignore[arg-type]
                return
            else:
                ids = (step if isinstance(step, list) else [step])[: request.max_tokens - num_tokens]
                yield Tokens(num_tokens, ids)
                num_tokens += len(ids)
                self.num_tokens += len(ids)
                if num_tokens == request.max_tokens:
                    yield Finished("max_tokens", _timings(began_s, started_s))
                    return

    def _early_end(self, request: Request) -> Failed | None:
        if self.failure is not None:
            return Failed(self.failure.code, self.failure.message, self.failure.retriable)
        return Failed("CANCELLED", "cancelled", False) if request.id in self._asked else None

    def _free(self, request_id: str, has_ended: bool) -> None:
        self.running.discard(request_id)
        if request_id in self.waiting:
            self.waiting.remove(request_id)
        self._asked.discard(request_id)
        self.freed.append(request_id)
        if not has_ended:
            self.cancelled.append(request_id)


def _timings(began_s: float, started_s: float) -> Timings:
    now_s = time.monotonic()
    return Timings((started_s - began_s) * 1e3, 0.0, (now_s - started_s) * 1e3, (now_s - began_s) * 1e3)
