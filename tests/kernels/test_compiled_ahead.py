"""A worker has seen a prompt, a row alone and many rows before it is ready: no step after that compiles a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels.emulator.gpu import EmulatedGpu
from worker_orcd import synthetic
from worker_orcd.backends import cuda
from worker_orcd.backends.batch import AttnBatch, Batch, LayerKV
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.kernels import attention
from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Work
from worker_orcd.kernels.source import Source
from worker_orcd.kv.pool import KVShape, allocate_pool
from worker_orcd.models.llama import LlamaInferenceAdapter
from worker_orcd.models.spec import read_spec
from worker_orcd.models.tensors import tensor_table
from worker_orcd.models.weights import load_weights

BLOCK, CONTEXT = 32, 4096


class Listening(EmulatedGpu):
    """Compiles and runs nothing, but knows what it was asked for."""

    def __init__(self) -> None:
        super().__init__(132, 227 * 1024, has_wgmma=True)
        self.compiled, self.late, self.is_ready = set[Source](), list[tuple[Source, str]](), False

    def compile_ahead(self, source: Source) -> None:  # type: ignore[override]
        self.compiled.add(source)

    def launch(self, source: Source, name: str, work: Work, args: Sequence[Argument]) -> None:  # noqa: ARG002
        if self.is_ready and source not in self.compiled:
            self.late.append((source, name))
        self.compiled.add(source)


def step(adapter: LlamaInferenceAdapter, kv: list[LayerKV], num_seqs: int, rows_each: int, context: int) -> None:
    zeros, starts = torch.zeros(num_seqs * rows_each).long(), torch.arange(0, num_seqs * rows_each + 1, rows_each)
    table = torch.zeros(num_seqs, context // BLOCK).long()
    where = AttnBatch(zeros, starts, torch.full((num_seqs,), rows_each), table, BLOCK)
    adapter.forward(Batch(zeros, zeros, starts[1:] - 1, where), kv)


@pytest.mark.parametrize(
    ("name", "quant", "changes"),
    [
        ("qwen2.5-0.5b", "Q4_K_M", {"layers": 2, "vocab": 1024}),
        ("gpt-oss-20b", "MXFP4", {"layers": 1, "vocab": 1024, "experts": 6, "hidden": 1024, "ffn": 1024}),
    ],
)
def test_nothing_is_compiled_in_a_step(
    name: str, quant: str, changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(synthetic.MODELS, name, replace(synthetic.MODELS[name], **changes))
    synthetic.write_synthetic(tmp_path / "model.gguf", name, quant)
    for module, function in ((cuda, "check_equal_bits"), (attention, "launch_prompts"), (attention, "_launch_fold")):
        monkeypatch.setattr(module, function, lambda *_: None)
    gpu, gguf = Listening(), GgufFile.open(tmp_path / "model.gguf")
    backend, spec = cuda.CudaBackend(gpu.device, gpu), read_spec(gguf)
    weights = load_weights(gguf, tensor_table(spec, gguf.tensors), backend, 2**26, lambda *_: None)
    adapter = LlamaInferenceAdapter(spec, weights, backend, CONTEXT)
    shape = KVShape(spec.num_layers, 4, BLOCK, spec.num_kv_heads, spec.head_dim, torch.float16)
    kv = allocate_pool(shape, backend.device)
    for num_seqs, rows_each, context in ((1, 2048, 2048), (1, 1, 2048), (256, 8, 256), (256, 1, 256)):
        step(adapter, kv, num_seqs, rows_each, context)
    gpu.is_ready = True
    for num_seqs in (2, 5, 9, 17, 33, 65, 129):
        for context in (BLOCK, 512, CONTEXT):
            step(adapter, kv, num_seqs, 1, context)
        step(adapter, kv, 1, num_seqs, CONTEXT)
        step(adapter, kv, num_seqs, 3, 512)
    assert gpu.late == []
