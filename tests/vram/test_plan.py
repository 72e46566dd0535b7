"""The plan against what is really allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.running import runtime_of
from worker_orcd.assemble import draw_up
from worker_orcd.backends import torch_ref
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import InsufficientVram, StartFailed
from worker_orcd.models.llama import LlamaInferenceAdapter
from worker_orcd.vram import plan as plan_module


def items(config: WorkerConfig) -> dict[str, int]:
    return {item.purpose: item.nbytes for item in draw_up(config).plan.items}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3").write(tmp_path_factory.mktemp("plan") / "tiny.gguf")


def test_planned_bytes_are_the_allocated_bytes(model: Path) -> None:
    planned = items(WorkerConfig(model=model, device="cpu"))
    runtime = runtime_of(model)
    adapter = runtime.adapter
    assert isinstance(adapter, LlamaInferenceAdapter)
    assert planned["kv_cache"] == sum(layer.k.nbytes + layer.v.nbytes for layer in runtime.kv)
    assert planned["rope_tables"] == adapter.rope.cos.nbytes + adapter.rope.sin.nbytes
    tensors = {id(adapter.token_embd.parts[0]): adapter.token_embd.nbytes, id(adapter.output_norm): 4 * 96}
    tensors[id(adapter.output.parts[0])] = adapter.output.nbytes
    for layer in adapter.layers:
        for projection in (layer.qkv, layer.attn_output, layer.gate_up, layer.ffn_down):
            for weight, bias in projection:
                assert bias is None
                tensors[id(weight.parts[0])] = weight.nbytes
        for vector in (layer.attn_norm, layer.ffn_norm, layer.attn_q_norm, layer.attn_k_norm):
            assert vector is not None
            tensors[id(vector)] = vector.nbytes
    assert planned["weights"] == sum(tensors.values())


def test_constants_are_those_of_the_backend() -> None:
    for name in ("SPLIT", "QUERY_TILE", "ROW_TILE", "PIECE_ELEMS"):
        assert getattr(plan_module, name) == getattr(torch_ref, name)


def test_device_decides_the_place_and_the_context(model: Path) -> None:
    cpu, cuda = (draw_up(WorkerConfig(model=model, device=d)).plan for d in ("cpu", "cuda"))
    assert (cpu.place, cuda.place) == ("host memory", "VRAM")
    assert cuda.total_bytes - cpu.total_bytes == plan_module.CUDA_CONTEXT_BYTES


def test_context_length_and_cache_cap_shrink_the_cache(model: Path) -> None:
    full = draw_up(WorkerConfig(model=model))
    assert full.context_length == 512
    assert draw_up(WorkerConfig(model=model, context_length=100)).context_length == 100
    half = items(WorkerConfig(model=model, context_length=256))
    assert half["kv_cache"] * 2 == items(WorkerConfig(model=model))["kv_cache"]
    per_token = half["kv_cache"] // 256
    capped = draw_up(WorkerConfig(model=tiny_long(model), kv_cache_size_mb=1))
    assert capped.context_length == 2**20 // per_token
    with pytest.raises(StartFailed, match="allows 512"):
        draw_up(WorkerConfig(model=model, context_length=513))


def tiny_long(model: Path) -> Path:
    """The same model, claiming a context whose cache exceeds 1 MiB."""
    built = tiny.build("qwen3")
    built.metadata["qwen3.context_length"] = 100_000
    return built.write(model.with_name("long.gguf"))


def test_too_little_memory_is_refused_with_every_number(model: Path) -> None:
    plan = draw_up(WorkerConfig(model=model)).plan
    plan.require(plan.total_bytes, "cuda:0", "m.gguf")
    with pytest.raises(InsufficientVram) as refused:
        plan.require(plan.total_bytes - 1, "cuda:0", "m.gguf")
    for part in (str(plan.total_bytes), str(plan.total_bytes - 1), "cuda:0", "m.gguf", "kv_cache"):
        assert part in refused.value.message
    assert refused.value.details["needed_bytes"] == plan.total_bytes
