"""ModelAdapter: what the engine knows of a model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from worker_orcd.backends.batch import Batch, LayerKV


class ModelAdapter(Protocol):
    """One model family on one backend. Pure: the cache it is handed is all it writes to."""

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        """Logits of the rows that sample: f32 [R, V]. Stores every row's key and value on the way."""
        ...
