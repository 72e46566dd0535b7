"""PlainStep: one forward pass and one sample for each sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from worker_orcd.engine.filters import mirostat_mu
from worker_orcd.engine.graphs import Graphs
from worker_orcd.engine.logprobs import describe, log_probabilities
from worker_orcd.engine.pack import pack, to_device
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Choice, Sampler
from worker_orcd.engine.sequence import Chunk, Plan
from worker_orcd.engine.step import CachedStep, Launched, Result, Scored
from worker_orcd.errors import CudaError, NumericFault, VramOom


@contextmanager
def device_errors() -> Iterator[None]:
    """Torch's errors in our terms. After a CudaError the device takes no more work from this process."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise VramOom("a step found too little device memory; try again, or with a shorter prompt") from error
    except torch.AcceleratorError as error:
        raise CudaError(f"the device failed: {str(error).splitlines()[0]}") from error


class PlainStep(CachedStep):
    """Implements InferenceStep. Nothing here logs, measures or talks to anyone."""

    max_new_tokens = 1

    def __init__(self, runtime: Runtime, sampler: Sampler, graphs: Graphs | None = None) -> None:
        super().__init__(runtime.allocator)
        self._runtime, self._sampler, self._graphs = runtime, sampler, graphs
        self._last_sampled: Tensor | None = None  # i64 [R] of the step before, on the device
        self.overlaps = runtime.device.type == "cuda"

    @property
    def warning(self) -> str:
        """Why steps are launched one by one that were to be recorded."""
        return self._graphs.refusal if self._graphs else ""

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        with device_errors():
            return self._launch(plan)

    def _launch(self, plan: Plan) -> Launched:
        logits = None if self._graphs is None else self._graphs.logits(plan, self._last_sampled)
        if logits is None:
            batch = pack(plan, self._runtime.device, self._last_sampled)
            logits = self._runtime.adapter.forward(batch, self._runtime.kv)
        rows = [chunk.sequence for chunk in plan if chunk.samples]
        mine = logits if len(logits) == len(rows) else logits[_sampled_rows(plan, logits.device)]
        place = None if self._graphs is None else self._graphs.sampled
        choice = self._sampler.choose(mine, rows, self._last_sampled, place)
        for row, seq in enumerate(rows):
            seq.sampled_row = row
        self._last_sampled = choice.ids
        return PlainLaunched(plan, choice, self._score(plan, logits, choice.ids))

    def _score(self, plan: Plan, logits: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor] | None:
        """Log-probabilities of what was sampled, and of prompts, for those who ask; rows in the order of the plan."""
        asking = [chunk for chunk in plan if chunk.sequence.wants_logprobs]
        if not asking:
            return None
        rows, targets, late = list[int](), list[int](), list[tuple[int, int]]()
        num_logits = num_sampled = 0
        for chunk in plan:
            rows += range(num_logits, num_logits + len(chunk.scored))
            targets += chunk.scored
            num_logits += chunk.num_logits
            if chunk.samples and chunk.sequence.request.num_logprobs is not None:
                late.append((len(targets), num_sampled))
                rows.append(num_logits - 1)
                targets.append(0)
            num_sampled += chunk.samples
        if not rows:
            return torch.empty(0, 1), torch.empty(0, 1)
        table = to_device(np.array([rows, targets]), logits.device)
        if late:
            places = to_device(np.array(late), logits.device)
            table[1, places[:, 0]] = sampled[places[:, 1]]
        num_top = max(chunk.sequence.request.num_logprobs or 0 for chunk in asking)
        return log_probabilities(logits, table, num_top, self._sampler.unsampleable)


def _sampled_rows(plan: Plan, device: torch.device) -> Tensor:
    ends = np.cumsum([chunk.num_logits for chunk in plan])
    return to_device(ends[[chunk.samples for chunk in plan]] - 1, device)


@dataclass
class PlainLaunched:
    """The tokens are on their way to the host while the device goes on with the next step."""

    plan: Plan
    choice: Choice  # R rows
    scores: tuple[Tensor, Tensor] | None  # as of `log_probabilities`

    def __post_init__(self) -> None:
        both, surprise = self.choice
        self._both = _sent(both)
        self._surprise = None if surprise is None else _sent(surprise)
        self._scores = self.scores and tuple(map(_sent, self.scores))
        self._done: torch.cuda.Event | None = None
        if both.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[Result]:
        if self._done is not None:
            with device_errors():
                self._done.synchronize()
        tokens, finite = self._both.tolist()
        surprises = repeat(0.0) if self._surprise is None else self._surprise.tolist()
        sampled = zip(tokens, finite, surprises)  # noqa: B905 (zeros without end)
        if self._scores is None and self._surprise is None:
            if len(tokens) == len(self.plan) and all(finite):
                return [[token] for token in tokens]
            return [_plain(chunk, *next(sampled)[:2]) if chunk.samples else [] for chunk in self.plan]
        values, ids = self._scores or (torch.empty(0), torch.empty(0))
        scores = zip(values.tolist(), ids.tolist(), strict=True)
        return [_result(chunk, sampled, scores) for chunk in self.plan]


def _sent(tensor: Tensor) -> Tensor:
    """A copy for the host; it is there when the device has come so far. The next step may write to the same place."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _plain(chunk: Chunk, token: int, is_finite: int) -> Result:
    return [token] if is_finite else _fault(chunk)


def _fault(chunk: Chunk) -> NumericFault:
    return NumericFault(f"logits for position {chunk.first + chunk.num_tokens}: not finite")


def _result(
    chunk: Chunk, sampled: Iterator[tuple[int, int, float]], scores: Iterator[tuple[list[float], list[int]]]
) -> Result:
    """Takes from both iterators what is the chunk's."""
    seq, own = chunk.sequence, None
    num_top = seq.request.num_logprobs or 0
    prompt = [describe(*next(scores), num_top) for _ in chunk.scored]
    is_sound = all(math.isfinite(entry.logprob) for entry in prompt)
    tokens: list[int] = []
    if chunk.samples:
        token, is_finite, surprise = next(sampled)
        tokens, is_sound = [token], is_sound and bool(is_finite)
        if seq.request.num_logprobs is not None:
            own = [describe(*next(scores), num_top)]
        if is_sound and seq.program and "mirostat" in seq.program:
            seq.mirostat_mu = mirostat_mu(seq.request.sampling, seq.mirostat_mu, surprise)
    if not is_sound:
        return _fault(chunk)
    return Scored(tokens, own, prompt) if chunk.scores or own is not None else tokens
