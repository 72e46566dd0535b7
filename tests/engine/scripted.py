"""An InferenceStep without a model: real blocks, and tokens from a script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from worker_orcd.engine.core import EngineCore, Output
from worker_orcd.engine.request import Event, ModelInfo, Request, SamplingParams
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.engine.sequence import Chunk, Plan
from worker_orcd.engine.step import CachedStep, Launched, Result
from worker_orcd.kv.paged import PagedAllocator

EOS = 2
INFO = ModelInfo("m", "m.gguf", "qwen2", "F32", 64, 321, "cpu", "test")


def request(name: str = "a", *, prompt: int | list[int] = 3, max_tokens: int = 5, **fields: Any) -> Request:
    """`prompt` is a text of ids or a length."""
    ids = [7] * prompt if isinstance(prompt, int) else prompt
    return Request(name, ids, max_tokens, SamplingParams(seed=1, temperature=0.0), **fields)


@dataclass
class ScriptedLaunch:
    plan: Plan
    results: list[Result]
    error: Exception | None = None

    def wait(self) -> list[Result]:
        if self.error is not None:
            raise self.error
        return self.results


@dataclass
class ScriptedStep(CachedStep):
    """Emits 10, 11, 12 … for everyone. `on_chunk` sees each chunk first: it may give another result, or raise."""

    num_blocks: int = 16
    block_size: int = 4
    overlaps: bool = False
    on_chunk: Callable[[Chunk], Result | None] = lambda _: None
    on_wait: Exception | None = None
    plans: list[list[tuple[str, int, int]]] = field(default_factory=list)  # (request, first, tokens) of each launch
    erased: list[int] = field(default_factory=list)
    max_new_tokens: int = 1

    def __post_init__(self) -> None:
        super().__init__(PagedAllocator(self.num_blocks, self.block_size, self.erased.extend))

    def launch(self, plan: Plan) -> Launched:
        self.plans.append([(c.sequence.request.id, c.first, c.num_tokens) for c in plan])
        results: list[Result] = []
        for chunk in plan:
            forced = self.on_chunk(chunk)
            token = 10 + chunk.first + chunk.num_tokens - chunk.sequence.num_prompt
            results.append(([token] if chunk.samples else []) if forced is None else forced)
        return ScriptedLaunch(plan, results, self.on_wait)


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    """An EngineCore on a scripted step, with a clock that stands still."""

    def __init__(self, step: ScriptedStep | None = None, **limits: Any) -> None:
        self.step, self.clock = step or ScriptedStep(), Clock()
        limits = {"max_batch": 4, "max_step_tokens": 16, "context_length": 40} | limits
        self.core = EngineCore(self.step, SchedulerLimits(**limits), frozenset({EOS}), {"model": "m"}, self.clock)
        self.events: dict[str, list[Event]] = {}
        self._names: dict[int, str] = {}

    def submit(self, *requests: Request) -> None:
        for req in requests:
            number = len(self._names) + 1
            self._names[number], self.events[req.id] = req.id, []
            self.core.submit(number, req)

    def cancel(self, name: str) -> None:
        self.core.cancel({known: number for number, known in self._names.items()}[name])

    def tick(self) -> Output:
        output = self.core.tick()
        for number, event in output.events:
            self.events[self._names[number]].append(event)
        return output

    def run(self) -> list[Output]:
        """Until nobody is left; then everything must be free."""
        outputs = []
        while self.core.has_work:
            outputs.append(self.tick())
            assert len(outputs) < 1000
        assert self.core.check() == ""
        return outputs

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.events[name] for token in getattr(event, "ids", [])]

    def end(self, name: str) -> str:
        """The reason of a Finished, the code of a Failed."""
        last = self.events[name][-1]
        return str(getattr(last, "reason", None) or getattr(last, "code", None))
