"""A model on a device with its cache: what steps run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from worker_orcd.backends.base import SampleKernel
from worker_orcd.backends.batch import LayerKV
from worker_orcd.kv.allocator import KVCacheAllocator
from worker_orcd.models.adapter import ModelAdapter
from worker_orcd.vram.ledger import Ledger


@dataclass(frozen=True)
class Runtime:
    adapter: ModelAdapter
    kv: list[LayerKV]
    allocator: KVCacheAllocator
    device: torch.device
    can_record: bool = False  # steps never wait for the device, so that they can be recorded
    ledger: Ledger = field(default_factory=Ledger)
    free_before: int = 0  # bytes free on the device before anything was loaded
    sample_kernel: Callable[[list[int], int], SampleKernel | None] | None = None  # of the backend, if it has one
    inspect: Callable[[], str] | None = None  # says what is wrong with where tensors lie; None: nothing can be
