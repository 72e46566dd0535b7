"""Against logits stored once from llama.cpp (tests/data/llama_cpp): we differ by its 8-bit activations and no more.

llama.cpp rounds the inputs of a quantized matmul to 8 bits: in blocks of 32 with an fp16 scale (Q8_0) beside the
32-block formats, of 256 with a float scale (Q8_K) beside the K formats. We keep them in float32. So our logits must
be near its logits, and very near once our inputs are rounded the same way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from worker_orcd.assemble import draw_up, embedded_model
from worker_orcd.backends.base import PackedWeight
from worker_orcd.backends.torch_ref import TorchBackend
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.score import score
from worker_orcd.kv.allocator import ContiguousAllocator
from worker_orcd.kv.pool import KVShape, allocate_pool
from worker_orcd.models.llama import LlamaInferenceAdapter
from worker_orcd.models.tensors import tensor_table
from worker_orcd.models.weights import load_weights

DATA = Path(__file__).parents[1] / "data" / "llama_cpp"
FILES = {"haiku": embedded_model(), "llama": DATA / "llama.gguf", "phi3": DATA / "phi3.gguf"}
REST = {"haiku": 1e-5, "llama": 1e-5, "phi3": 0.012}  # relative distance left once activations are rounded alike


class EightBitActivations(TorchBackend):
    """Rounds what goes into a quantized matmul as llama.cpp's CPU code does."""

    def _product(self, x: Tensor, weight: PackedWeight) -> Tensor:
        block = {1: 0, 32: 32, 256: 256}[weight.type.block_elems]
        return super()._product(_round(x, block) if block else x, weight)


def _round(x: Tensor, block: int) -> Tensor:
    blocks = x.reshape(-1, block)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    stored = scale.half().float() if block == 32 else scale
    return ((blocks / scale.clamp_min(1e-30)).round() * stored).view_as(x)


def logits(path: Path, ids: list[int], backend: TorchBackend) -> np.ndarray:
    config = WorkerConfig(model=path, device="cpu")
    blueprint = draw_up(config)
    spec, device = blueprint.spec, torch.device("cpu")
    table = tensor_table(spec, blueprint.gguf.tensors)
    weights = load_weights(blueprint.gguf, table, backend, 2**20, lambda *_: None)
    pool = allocate_pool(KVShape(spec.num_layers, 1, 64, spec.num_kv_heads, spec.head_dim, torch.float32), device)
    adapter = LlamaInferenceAdapter(spec, weights, backend, 64)
    return score(Runtime(adapter, pool, ContiguousAllocator(1, 64), device), ids, 64).numpy()


@pytest.mark.parametrize("case", FILES)
def test_only_the_rounding_of_activations_differs(case: str) -> None:
    stored = np.load(DATA / "logits.npz")
    ids, theirs = stored["ids"].tolist(), stored[case]
    exact = logits(FILES[case], ids, TorchBackend(torch.device("cpu")))
    rounded = logits(FILES[case], ids, EightBitActivations(torch.device("cpu")))

    def distance(ours: np.ndarray) -> float:
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    assert distance(exact) < 0.06
    assert distance(rounded) < REST[case] < distance(exact) / 2
    assert (exact.argmax(1) == theirs.argmax(1)).mean() >= 0.8
