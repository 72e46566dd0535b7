"""An engine process whose device breaks: the 20th forward pass reads far outside a tensor, on the GPU itself."""

from __future__ import annotations

import sys
from itertools import count

import torch
from torch import Tensor

from worker_orcd import engine_process
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.models.llama import LlamaInferenceAdapter

FORWARD = LlamaInferenceAdapter.forward
CALLS = count()


def forward(self: LlamaInferenceAdapter, batch: Batch, kv: list[LayerKV]) -> Tensor:
    if next(CALLS) == 20:
        torch.zeros(8, device=batch.tokens.device)[batch.tokens + 2**40]
    return FORWARD(self, batch, kv)


if __name__ == "__main__":
    LlamaInferenceAdapter.forward = forward
    sys.exit(engine_process.main())
