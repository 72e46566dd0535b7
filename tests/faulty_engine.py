"""An engine process whose device breaks: once ready, the first step of four sequences reads far outside a tensor."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from worker_orcd import engine_process
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.engine import loop
from worker_orcd.models.llama import LlamaInferenceAdapter

FORWARD, WARM_UP = LlamaInferenceAdapter.forward, loop.warm_up


def forward(self: LlamaInferenceAdapter, batch: Batch, kv: list[LayerKV]) -> Tensor:
    num_logits = len(batch.tokens if batch.sample_rows is None else batch.sample_rows)
    if num_logits == 4 and not torch.cuda.is_current_stream_capturing():
        torch.zeros(8, device=batch.tokens.device)[batch.tokens + 2**40]
    return FORWARD(self, batch, kv)


def warm_up(*args: Any, **more: Any) -> float:
    seconds = WARM_UP(*args, **more)
    LlamaInferenceAdapter.forward = forward  # type: ignore[method-assign]
    return seconds


if __name__ == "__main__":
    loop.warm_up = warm_up
    sys.exit(engine_process.main())
