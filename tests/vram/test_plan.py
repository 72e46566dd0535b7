"""The plan against what is really allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.running import runtime_of
from worker_orcd.assemble import draw_up, embedded_model
from worker_orcd.backends import torch_ref
from worker_orcd.config import WorkerConfig
from worker_orcd.engine import sampler
from worker_orcd.errors import InsufficientVram, StartFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models.llama import LlamaInferenceAdapter
from worker_orcd.vram import plan as plan_module
from worker_orcd.vram.plan import DEFAULT_CACHE_BYTES, CacheSize, size_contiguous, size_paged

MIB = 2**20


def items(config: WorkerConfig) -> dict[str, int]:
    return {item.purpose: item.nbytes for item in draw_up(config).plan.items}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen3").write(tmp_path_factory.mktemp("plan") / "tiny.gguf")


CACHES: list[dict[str, object]] = [
    {},
    {"kv_cache_size_mb": 1},
    {"max_batch": 3, "context_length": 100, "kv_block_size": 64},
    {"kv_layout": "contiguous", "max_batch": 3},
    {"kv_layout": "contiguous", "kv_cache_size_mb": 1},
]


@pytest.mark.parametrize("settings", CACHES)
def test_the_planned_cache_and_tables_are_the_allocated_ones(model: Path, settings: dict[str, object]) -> None:
    planned = items(WorkerConfig(model=model, device="cpu", **settings))  # type: ignore[arg-type]
    runtime = runtime_of(model, **settings)
    assert planned["kv_cache"] == sum(layer.k.nbytes + layer.v.nbytes for layer in runtime.kv)
    adapter, allocator = runtime.adapter, runtime.allocator
    assert isinstance(adapter, LlamaInferenceAdapter)
    assert planned["rope_tables"] == adapter.rope.cos.nbytes + adapter.rope.sin.nbytes
    assert runtime.kv[0].k.shape[:2] == (allocator.num_blocks, allocator.block_size)
    assert allocator.available() == allocator.num_blocks


def test_planned_weights_are_the_allocated_weights(model: Path) -> None:
    planned, adapter = items(WorkerConfig(model=model, device="cpu")), runtime_of(model).adapter
    assert isinstance(adapter, LlamaInferenceAdapter)
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
    assert plan_module.SAMPLE_TILE == sampler.ROW_TILE


def test_device_decides_the_place_and_the_context(model: Path) -> None:
    settings: dict[str, Any] = {"model": model, "backend": "reference", "max_tokens_per_step": 64}
    cpu, cuda = (draw_up(WorkerConfig(device=d, **settings)).plan for d in ("cpu", "cuda"))
    assert (cpu.place, cuda.place) == ("host memory", "VRAM")
    without = plan_module.CUDA_CONTEXT_BYTES - plan_module.PROCESS_BYTES
    assert cuda.total_bytes - cpu.total_bytes == without


def test_on_the_gpu_weights_keep_their_bits_and_the_cache_has_half_of_them() -> None:
    """The embedded model: Q4_K, Q6_K and others, padded to tiles; packing is tested in tests/quant."""
    ours, reference = (items(WorkerConfig(backend=b, context_length=256)) for b in ("cuda", "reference"))
    with GgufFile.open(embedded_model()) as gguf:
        stored = sum(info.nbytes for info in gguf.tensors.values())
    assert stored <= ours["weights"] < 1.1 * stored < reference["weights"] / 4
    assert ours["kv_cache"] * 2 == reference["kv_cache"]
    assert {"workspace", "load_scratch", "cuda_context", "rope_tables"} <= ours.keys()


@pytest.mark.parametrize(
    ("context", "max_batch", "limit_bytes", "block", "expected"),
    [
        (100, 4, None, 32, (16, 32, 100)),  # a full context for everyone, in whole blocks
        (
            2048,
            512,
            None,
            32,
            (DEFAULT_CACHE_BYTES // (1000 * 32), 32, 2048),
        ),  # as long as it stays below the default
        (10**6, 2, None, 256, (3907, 256, 10**6)),  # but always one full context
        (100, 4, 10 * MIB, 32, (16, 32, 100)),  # never more than can be used
        (2048, 64, 10 * MIB, 32, (327, 32, 2048)),
        (2048, 64, MIB, 32, (32, 32, 1024)),  # a small cache shortens the context
        (2048, 64, 32_000, 32, (1, 32, 32)),
        (2048, 64, 31_999, 32, (0, 32, 0)),
        (1, 1, None, 1, (1, 1, 1)),
    ],
)
def test_paged_cache_at_1000_bytes_a_token(
    context: int, max_batch: int, limit_bytes: int | None, block: int, expected: tuple[int, int, int]
) -> None:
    size = size_paged(1000, context, max_batch, limit_bytes, block)
    assert size == CacheSize(*expected)
    assert limit_bytes is None or size.num_tokens * 1000 <= limit_bytes
    assert size.context_length <= size.num_tokens


@pytest.mark.parametrize(
    ("context", "max_batch", "limit_bytes", "expected"),
    [
        (100, 4, None, (4, 100, 100)),
        (2048, 512, None, (131, 2048, 2048)),
        (10**6, 2, None, (1, 10**6, 10**6)),
        (2048, 64, 10 * MIB, (5, 2048, 2048)),
        (2048, 64, MIB, (1, 1048, 1048)),
        (2048, 64, 999, (64, 0, 0)),  # not one token: the caller refuses it
    ],
)
def test_contiguous_cache_at_1000_bytes_a_token(
    context: int, max_batch: int, limit_bytes: int | None, expected: tuple[int, int, int]
) -> None:
    assert size_contiguous(1000, context, max_batch, limit_bytes) == CacheSize(*expected)


def test_context_length_and_cache_cap_shrink_the_cache(model: Path) -> None:
    full = draw_up(WorkerConfig(model=model))
    assert full.context_length == 512
    assert full.cache.num_tokens == 64 * 512
    assert draw_up(WorkerConfig(model=model, context_length=100)).context_length == 100
    half = items(WorkerConfig(model=model, context_length=256))
    assert half["kv_cache"] * 2 == items(WorkerConfig(model=model))["kv_cache"]
    per_token = half["kv_cache"] // (64 * 256)
    capped = draw_up(WorkerConfig(model=tiny_long(model), kv_cache_size_mb=1))
    assert capped.context_length == MIB // per_token // 32 * 32
    whole = draw_up(WorkerConfig(model=tiny_long(model), kv_cache_size_mb=1, kv_layout="contiguous"))
    assert whole.context_length == MIB // per_token
    with pytest.raises(StartFailed, match="allows 512"):
        draw_up(WorkerConfig(model=model, context_length=513))


def test_a_cache_too_small_for_anything_is_refused(model: Path) -> None:
    wide = tiny.build("llama-tied", num_hidden_layers=8)  # 24,576 bytes a token, 256 tokens a block
    path = wide.write(model.with_name("wide.gguf"))
    with pytest.raises(StartFailed, match=r"kv_cache_size_mb is 1; a token takes \d+ bytes"):
        draw_up(WorkerConfig(model=path, device="cpu", kv_cache_size_mb=1, kv_block_size=256))


def test_batch_and_step_size_grow_the_workspace(model: Path) -> None:
    def workspace(**settings: int) -> int:
        return items(WorkerConfig(model=model, device="cpu", **settings))["workspace"]  # type: ignore[arg-type]

    assert workspace(max_batch=64) == workspace()
    assert workspace(max_batch=64, max_tokens_per_step=64) == workspace(), "the default of the CPU"
    more = 2 * 4 * 321  # two float32 rows of logits for each sequence
    assert workspace(max_batch=5) - workspace(max_batch=4) == more
    assert workspace(max_tokens_per_step=128) > workspace()
    assert draw_up(WorkerConfig(model=model, device="cpu", max_batch=100)).max_step_tokens == 100
    assert draw_up(WorkerConfig(model=model, device="cuda", max_batch=100)).max_step_tokens == 512
    assert draw_up(WorkerConfig(model=model, max_batch=7, max_tokens_per_step=77)).max_step_tokens == 77


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
