"""Whole models on the CUDA backend: near the reference, and the same bits whatever the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.kernels.conftest import NO_GPU
from tests.kernels.weights import random_raw
from worker_orcd.assemble import embedded_model
from worker_orcd.backends.base import Backend, Operand, PackedWeight
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.backends.torch_ref import TorchBackend
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.score import score
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.attention import FlashAttention, Unrotated
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.kv.pool import KVShape, allocate_pool, eraser
from worker_orcd.models.llama import LlamaInferenceAdapter
from worker_orcd.models.spec import read_spec
from worker_orcd.models.tensors import tensor_table
from worker_orcd.models.weights import load_weights
from worker_orcd.quant.format import FORMATS, format_of
from worker_orcd.quant.tiles import packed_bytes

CONTEXT = 512
Q4_K = GgmlType.Q4_K


@pytest.fixture(scope="module")
def backend(gpu: Gpu) -> CudaBackend:
    return CudaBackend(gpu.device, gpu)


def runtime_on(path: Path, backend: Backend) -> Runtime:
    dtype = torch.float32 if isinstance(backend, TorchBackend) else torch.float16
    gguf = GgufFile.open(path)
    spec = read_spec(gguf)
    weights = load_weights(gguf, tensor_table(spec, gguf.tensors), backend, 2**20, lambda *_: None)
    adapter = LlamaInferenceAdapter(spec, weights, backend, CONTEXT)
    kv = allocate_pool(
        KVShape(spec.num_layers, CONTEXT // 16 + 4, 16, spec.num_kv_heads, spec.head_dim, dtype), backend.device
    )
    return Runtime(adapter, kv, PagedAllocator(CONTEXT // 16 + 4, 16, eraser(kv), share=False), backend.device)


def divergence(found: Tensor, truth: Tensor) -> float:
    """Mean over positions of KL(truth ‖ found), in nats."""
    p, q = truth.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def check_model(path: Path, ids: list[int], backend: Backend) -> float:
    is_real = backend.device.type == "cuda"
    ids = ids if is_real else ids[:36]  # attention is emulated too, and slow
    runtime = runtime_on(path, backend)
    logits = score(runtime, ids, 128)
    for chunk in (1, 7, 33, 300) if is_real else (1, 9):
        assert torch.equal(score(runtime, ids, chunk), logits), f"{chunk} tokens a step"
    return divergence(logits, score(runtime_on(path, TorchBackend(backend.device)), ids, 128))


@pytest.mark.parametrize("name", tiny.configs())
def test_tiny_models(name: str, backend: Backend, tmp_path: Path) -> None:
    found = check_model(tiny.build(name).write(tmp_path / "tiny.gguf"), [7 * i % 321 for i in range(300)], backend)
    print(name, f"KL {found:.2e}")
    assert found < 1e-3  # of random weights: 1e-4 to 3e-4


@pytest.mark.gpu
@NO_GPU
def test_the_haiku_model() -> None:
    backend = CudaBackend(torch.device("cuda", 0))
    found = check_model(embedded_model(), [40 + 131 * i % 2900 for i in range(300)], backend)
    print(f"haiku KL {found:.2e}")
    assert found < 3e-4


@pytest.mark.parametrize(("name", "takes_sums"), [("qwen3", False), ("qwen2", True)])
def test_a_model_with_heads_for_the_tensor_cores(
    name: str, takes_sums: bool, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention kernel writes what the next product reads; interpreted, its bits follow the shape of a tile.

    At a token a step it also does what comes before it, unless heads are normalized.
    """
    steps: list[int] = []

    def noted(self: FlashAttention, made_of: Unrotated, *others: Any) -> Tensor:
        steps.append(made_of.sums[0].slices.shape[1])
        return store_and_attend(self, made_of, *others)

    store_and_attend = FlashAttention.store_and_attend
    monkeypatch.setattr(FlashAttention, "store_and_attend", noted)
    path, ids = tiny.build(name, head_dim=32).write(tmp_path / "tiny.gguf"), [7 * i % 321 for i in range(20)]
    truth = score(runtime_on(path, TorchBackend(backend.device)), ids, 20)
    for chunk in (20, 9, 1):
        assert divergence(score(runtime_on(path, backend), ids, chunk), truth) < 1e-3
    assert set(steps) == ({1} if takes_sums else set())


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_embedding_is_the_reference_bit_for_bit(kind: GgmlType, backend: Backend) -> None:
    widths = (256, 512) if kind.block_elems == 256 else (32, 416)
    for k in widths:
        raw, tokens = random_raw(kind, 37, k, str(backend.device)), [36, 0, 15, 16, 16, 7]
        weight = backend.pack(raw.clone(), kind, (37, k))
        assert weight.nbytes == packed_bytes(kind, (37, k))
        found = backend.embed(torch.tensor(tokens, device=backend.device), weight)
        expected = format_of(kind).dequantize(raw.view(-1, kind.block_bytes)).view(37, k)[tokens]
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        assert backend.embed(torch.tensor([], dtype=torch.int64, device=backend.device), weight).shape == (0, k)


def packed(backend: Backend, kind: GgmlType, n: int, k: int) -> PackedWeight:
    return backend.pack(random_raw(kind, n, k, str(backend.device), seed=n), kind, (n, k))


def product(backend: CudaBackend, x: Tensor, *weights: PackedWeight) -> Tensor:
    operand = Operand(backend._ops.to_image(x), *x.shape)
    return backend.total(backend.linear(operand, tuple((weight, None) for weight in weights)))


def test_joined_matrices_give_the_outputs_side_by_side(backend: CudaBackend) -> None:
    parts = [packed(backend, Q4_K, n, 512) for n in (64, 32, 50)]
    joined = backend.join(parts)
    assert joined is not None
    assert joined.shape == (146, 512)
    x = torch.randn(20, 512).to(backend.device)
    side_by_side, found = product(backend, x, *parts), product(backend, x, joined)
    assert ((found - side_by_side).norm() / side_by_side.norm()).item() < 1e-6  # another shape may be cut otherwise
    assert torch.equal(product(backend, x[3:4], joined)[0], found[3])


def test_of_joined_experts_each_has_its_rows_side_by_side(backend: CudaBackend) -> None:
    gate, up = (packed(backend, Q4_K, 3 * n, 512) for n in (32, 16))
    joined = backend.join([gate, up], count=3)
    assert joined is not None
    assert joined.shape == (144, 512)
    rows, ups = gate.parts[0].view(3, 2, *gate.parts[0].shape[1:]), up.parts[0].view(3, 1, *up.parts[0].shape[1:])
    assert torch.equal(joined.parts[0].view(3, 3, *rows.shape[2:]), torch.cat([rows, ups], 1))
    assert backend.join([packed(backend, Q4_K, 32, 256), packed(backend, Q4_K, 24, 256)], count=2) is None, "12 rows"


def test_what_cannot_be_joined(backend: CudaBackend) -> None:
    for pair in (
        ((Q4_K, 16, 256), (GgmlType.Q6_K, 16, 256)),
        ((Q4_K, 16, 256), (Q4_K, 16, 512)),
        ((Q4_K, 17, 256), (Q4_K, 16, 256)),
    ):
        assert backend.join([packed(backend, *each) for each in pair]) is None
