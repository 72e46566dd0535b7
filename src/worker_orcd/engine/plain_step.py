"""PlainStep: one forward pass and one sample for each sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from worker_orcd.engine.pack import pack
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler, SamplingBatch
from worker_orcd.engine.sequence import Plan
from worker_orcd.engine.step import CachedStep, Launched, Result
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

    def __init__(self, runtime: Runtime, sampler: Sampler) -> None:
        super().__init__(runtime.allocator)
        self._runtime, self._sampler = runtime, sampler
        self._last_sampled: Tensor | None = None  # i64 [R] of the step before, on the device
        self.overlaps = runtime.device.type == "cuda"

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        with device_errors():
            return self._launch(plan)

    def _launch(self, plan: Plan) -> Launched:
        batch = pack(plan, self._runtime.device, self._last_sampled)
        logits = self._runtime.adapter.forward(batch, self._runtime.kv)
        rows = [chunk.sequence for chunk in plan if chunk.samples]
        sampled, is_finite = self._sampler.sample(logits, SamplingBatch.of(rows, self._last_sampled, logits.device))
        for row, seq in enumerate(rows):
            seq.sampled_row = row
        self._last_sampled = sampled
        return PlainLaunched(plan, sampled, is_finite)


@dataclass
class PlainLaunched:
    """The tokens are on their way to the host while the device goes on with the next step."""

    plan: Plan
    sampled: Tensor  # i64 [R]
    is_finite: Tensor  # bool [R]

    def __post_init__(self) -> None:
        self._done: torch.cuda.Event | None = None
        if self.sampled.is_cuda:
            both = torch.stack([self.sampled, self.is_finite.long()])
            self._host = torch.empty_like(both, device="cpu", pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[Result]:
        if self._done is not None:
            with device_errors():
                self._done.synchronize()
            tokens, finite = self._host.tolist()
        else:
            tokens, finite = self.sampled.tolist(), self.is_finite.tolist()
        row, results = 0, list[Result]()
        for chunk in self.plan:
            if not chunk.samples:
                results.append([])
                continue
            position = chunk.first + chunk.num_tokens
            results.append(
                [tokens[row]] if finite[row] else NumericFault(f"logits for position {position}: not finite")
            )
            row += 1
        return results
