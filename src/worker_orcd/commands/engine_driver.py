"""An engine without HTTP, fed and turned by the one who measures it."""

from __future__ import annotations

import gc
import itertools
import random
import time
from dataclasses import dataclass

import msgspec

from worker_orcd.assemble import build_core, draw_up, load_runtime
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.core import EngineCore, Output
from worker_orcd.engine.loop import EngineFacts, Report
from worker_orcd.engine.request import Finished, Request, SamplingParams, Tokens

SAMPLED, GREEDY = SamplingParams(0, temperature=0.8, top_p=0.95), SamplingParams(0, temperature=0.0)
ENCODE = msgspec.msgpack.Encoder().encode


def load_core(config: WorkerConfig) -> tuple[EngineCore, EngineFacts]:
    """The engine on the model of `config`; no token ends an answer."""
    blueprint = draw_up(config)
    runtime = load_runtime(config, blueprint, lambda *_: None)
    return build_core(config, blueprint, runtime, frozenset(), [])


class Driver:
    """Requests of random ids in, steps out, with the time of every step, its message included."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.step_ms: list[float] = []
        self._numbers, self._random = itertools.count(1), random.Random(0)

    def submit(
        self, prompt: int, max_tokens: int, head: list[int] | None = None, sampling: SamplingParams = SAMPLED
    ) -> None:
        """One more request, of random ids after those of `head`."""
        ids = [*(head or []), *self._random.choices(range(256), k=prompt - len(head or []))]
        number = next(self._numbers)
        sampling = msgspec.structs.replace(sampling, seed=number)
        self.core.submit(number, Request(f"bench-{number}", ids, max_tokens, sampling, timeout_s=1e6))

    def turn(self) -> Output:
        began = time.perf_counter()
        output = self.core.tick()
        ENCODE(Report(output))
        self.step_ms.append((time.perf_counter() - began) * 1e3)
        return output

    def settle(self, size: int) -> None:
        """Until all `size` sequences have their first token."""
        num_begun = 0
        while num_begun < size:
            new = [event for _, event in self.turn().events if isinstance(event, Tokens)]
            num_begun += sum(event.index == 0 for event in new)
        self.step_ms.clear()

    def until_one_ends(self) -> tuple[int, float]:
        """Turns as long as nobody has ended, or to the end when someone has: how many tokens came, in what time."""
        began = ended = time.perf_counter()
        num_tokens = 0
        while self.core.has_work:
            events = [event for _, event in self.turn().events]
            if num_tokens and any(isinstance(event, Finished) for event in events):
                break
            num_tokens += sum(len(event.ids) for event in events if isinstance(event, Tokens))
            ended = time.perf_counter()
        return num_tokens, ended - began

    def finish(self) -> None:
        while self.core.has_work:
            self.turn()


@dataclass(frozen=True)
class Run:
    """One batch, begun at once."""

    prefill_s: float  # until all had their first token
    token_s: float  # a token, of all sequences together, from there until the first of them ends
    step_ms: list[float]  # of every step in between


def run_batch(core: EngineCore, batch: int, prompt: int, tokens: int) -> Run:
    """`batch` requests with `prompt` random ids; all of them decode together for about `tokens` steps."""
    driver = Driver(core)
    core.drop_cache()
    for _ in range(batch):
        driver.submit(prompt, tokens, sampling=GREEDY)
    gc.collect()
    gc.freeze()  # as the engine's own process does: looking through all that is loaded would hold up a step
    try:
        began = time.perf_counter()
        driver.settle(batch)
        prefill_s = time.perf_counter() - began
        num_tokens, decode_s = driver.until_one_ends()
        step_ms = driver.step_ms[:]
        driver.finish()
    finally:
        gc.unfreeze()
    return Run(prefill_s, decode_s / max(1, num_tokens), step_ms)
