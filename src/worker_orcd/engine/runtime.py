"""A model on a device with its cache: what steps run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker_orcd.backends.batch import LayerKV
from worker_orcd.kv.allocator import KVCacheAllocator
from worker_orcd.models.adapter import ModelAdapter


@dataclass(frozen=True)
class Runtime:
    adapter: ModelAdapter
    kv: list[LayerKV]
    allocator: KVCacheAllocator
    device: torch.device
