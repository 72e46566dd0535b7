"""The plan against what is really allocated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny, tiny_dense, tiny_moe
from tests.running import runtime_of
from worker_orcd import assemble, reports
from worker_orcd.assemble import Blueprint, draw_up, embedded_model, fill_vram
from worker_orcd.backends import torch_ref
from worker_orcd.config import WorkerConfig
from worker_orcd.engine import sampler
from worker_orcd.errors import InsufficientVram, StartFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models.llama import LlamaInferenceAdapter
from worker_orcd.reports import plan_report
from worker_orcd.synthetic import write_header
from worker_orcd.vram import card, workspace
from worker_orcd.vram import plan as plan_module
from worker_orcd.vram.card import free_vram_bytes
from worker_orcd.vram.plan import HOST_CACHE_BYTES, CacheSize, size_contiguous, size_paged

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
    assert planned["rope_tables"] == sum(rope.cos.nbytes + rope.sin.nbytes for rope in adapter.decoder.ropes.values())
    assert runtime.kv[0].k.shape[:2] == (allocator.num_blocks, allocator.block_size)
    assert allocator.available() == allocator.num_blocks


@pytest.mark.parametrize(("builder", "family"), [(m, f) for m in (tiny, tiny_dense, tiny_moe) for f in m.configs()])
def test_what_is_kept_of_every_family_is_what_was_planned(builder: Any, family: str, tmp_path: Path) -> None:
    path = builder.build(family).write(tmp_path / "tiny.gguf")
    planned, kept = items(WorkerConfig(model=path, device="cpu")), runtime_of(path).ledger.by_purpose()
    assert kept == {
        purpose: planned[purpose] for purpose in ("weights", "rope_tables", "kv_cache") if purpose in kept
    }
    assert {"weights", "kv_cache"} <= kept.keys()


def test_constants_are_those_of_the_backend() -> None:
    for name in ("SPLIT", "QUERY_TILE", "ROW_TILE", "PIECE_ELEMS"):
        assert getattr(workspace, name) == getattr(torch_ref, name)
    assert workspace.SAMPLE_TILE == sampler.ROW_TILE


def test_device_decides_the_place_and_the_context(model: Path) -> None:
    settings: dict[str, Any] = {"model": model, "backend": "reference", "max_tokens_per_step": 64}
    cpu, cuda = (draw_up(WorkerConfig(device=d, **settings)).plan for d in ("cpu", "cuda"))
    assert (cpu.place, cuda.place) == ("host memory", "VRAM")
    without = plan_module.CUDA_CONTEXT_BYTES + plan_module.CUDA_KERNELS_BYTES - plan_module.PROCESS_BYTES
    assert cuda.total_bytes - cpu.total_bytes == without


def test_on_the_gpu_weights_keep_their_bits_and_the_cache_has_half_of_them() -> None:
    """The embedded model: Q4_K, Q6_K and others, padded to tiles; packing is tested in tests/quant."""
    settings: dict[str, Any] = {"context_length": 256, "max_batch": 1}
    ours, reference = (items(WorkerConfig(backend=b, **settings)) for b in ("cuda", "reference"))
    with GgufFile.open(embedded_model()) as gguf:
        stored = sum(info.nbytes for info in gguf.tensors.values())
    assert stored <= ours["weights"] < 1.1 * stored < reference["weights"] / 4
    assert ours["kv_cache"] * 2 == reference["kv_cache"]
    assert {"workspace", "cuda_kernels", "cuda_context", "rope_tables", "cuda_graphs", "reserve"} <= ours.keys()
    without = draw_up(WorkerConfig(vram_reserve_mb=0, cuda_graphs=False, **settings)).plan
    assert without.nbytes("reserve", "cuda_graphs") == 0


@pytest.mark.parametrize(
    ("context", "max_batch", "limit_bytes", "block", "expected"),
    [
        (100, 4, 10 * MIB, 32, (16, 32, 100)),  # never more than can be used
        (2048, 64, 10 * MIB, 32, (327, 32, 2048)),
        (2048, 64, MIB, 32, (32, 32, 1024)),  # a small cache shortens the context
        (2048, 64, 32_000, 32, (1, 32, 32)),
        (2048, 64, 31_999, 32, (0, 32, 0)),
        (1, 1, 1000, 1, (1, 1, 1)),
    ],
)
def test_paged_cache_at_1000_bytes_a_token(
    context: int, max_batch: int, limit_bytes: int, block: int, expected: tuple[int, int, int]
) -> None:
    size = size_paged(1000, context, max_batch, limit_bytes, block)
    assert size == CacheSize(*expected)
    assert size.num_tokens * 1000 <= limit_bytes
    assert size.context_length <= size.num_tokens


@pytest.mark.parametrize(
    ("context", "max_batch", "limit_bytes", "expected"),
    [
        (100, 4, MIB, (4, 100, 100)),
        (2048, 64, 10 * MIB, (5, 2048, 2048)),
        (2048, 64, MIB, (1, 1048, 1048)),
        (2048, 64, 999, (64, 0, 0)),  # not one token: the caller refuses it
    ],
)
def test_contiguous_cache_at_1000_bytes_a_token(
    context: int, max_batch: int, limit_bytes: int, expected: tuple[int, int, int]
) -> None:
    assert size_contiguous(1000, context, max_batch, limit_bytes) == CacheSize(*expected)


@pytest.mark.parametrize("layout", ["paged", "contiguous"])
def test_the_host_gives_every_place_a_context_within_256_mib_but_always_one(model: Path, layout: Any) -> None:
    path = tiny_long(model)

    def tokens(context: int, batch: int) -> int:
        config = WorkerConfig(model=path, device="cpu", kv_layout=layout, context_length=context, max_batch=batch)
        return draw_up(config).cache.num_tokens

    assert tokens(512, 64) == 64 * 512
    per_token = items(WorkerConfig(model=path, device="cpu", context_length=512))["kv_cache"] // (64 * 512)
    fit = HOST_CACHE_BYTES // per_token
    assert fit - 2048 < tokens(2048, 1024) <= fit
    assert fit < 320_000
    assert tokens(320_000, 8) == 320_000


def gpu_blueprint(model: Path, free_mib: int, **settings: Any) -> Blueprint:
    config = WorkerConfig(model=model, **settings)
    return fill_vram(config, draw_up(config), free_mib * MIB)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("header") / "llama.gguf"
    write_header(path, "llama-3.1-8b", "Q4_K_M")
    return path


def test_on_the_gpu_the_cache_takes_what_is_free_and_no_more(llama_8b: Path) -> None:
    block_bytes = 32 * 128 * 1024
    for free_mib in (24_576, 40_000):
        blueprint = gpu_blueprint(llama_8b, free_mib)
        left = free_mib * MIB - blueprint.plan.total_bytes
        assert 0 <= left < block_bytes
        assert blueprint.plan.nbytes("reserve") == 512 * MIB
        assert blueprint.plan.nbytes("kv_cache") == blueprint.cache.num_blocks * block_bytes
        blueprint.plan.require(free_mib * MIB, "cuda:0", "m.gguf")
    small = gpu_blueprint(llama_8b, 40_000, vram_reserve_mb=1512)
    assert (blueprint.cache.num_blocks - small.cache.num_blocks) * block_bytes // MIB == 1000
    full = gpu_blueprint(llama_8b, 400_000, context_length=4096, max_batch=8)
    assert full.cache.num_tokens == 8 * 4096, "more could never be used"
    told = gpu_blueprint(llama_8b, 400_000, kv_cache_size_mb=1024)
    assert told.cache.num_tokens == told.context_length == 8192


def test_on_the_gpu_a_context_is_never_shortened_unasked(llama_8b: Path) -> None:
    blueprint = gpu_blueprint(llama_8b, 16_000)
    assert blueprint.context_length == blueprint.cache.num_tokens == 131_072
    with pytest.raises(InsufficientVram, match="lower --context-length"):
        blueprint.plan.require(16_000 * MIB, "cuda:0", "m.gguf")
    gpu_blueprint(llama_8b, 16_000, context_length=32_768).plan.require(16_000 * MIB, "cuda:0", "m.gguf")


def test_scratch_for_loading_counts_only_where_it_is_more_than_what_comes_after(llama_8b: Path) -> None:
    large = draw_up(WorkerConfig(model=llama_8b)).plan
    assert large.nbytes("load_scratch") == 0
    small = draw_up(WorkerConfig(model=llama_8b, context_length=32, max_batch=1, cuda_graphs=False)).plan
    head = 128_256 * 4096 // 256 * 210  # Q6_K
    assert small.nbytes("load_scratch", "kv_cache", "workspace") == 2 * head + plan_module.REPACK_BYTES
    full = gpu_blueprint(llama_8b, small.total_bytes // MIB, context_length=32, cuda_graphs=False).plan
    assert full.total_bytes == small.total_bytes, "what loading needs is the cache's afterwards"
    assert full.nbytes("kv_cache") > small.nbytes("kv_cache")


def test_experts_are_planned_as_what_is_packed(tmp_path: Path) -> None:
    write_header(tmp_path / "oss.gguf", "gpt-oss-20b", "MXFP4")
    plan = draw_up(WorkerConfig(model=tmp_path / "oss.gguf")).plan
    assert 1.0 <= plan.nbytes("weights") / 12_096_558_336 < 1.03  # tensors of the published file
    assert plan.total_bytes < 24 * 2**30


def test_the_report_says_what_fits_and_what_would(llama_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "free_vram_bytes", lambda index: (24_564 if index == 1 else 16_000) * MIB)
    config = WorkerConfig(gpu_device=1)
    assert json.loads(plan_report(llama_8b, config, as_json=True))["fits"]
    assert "free: fits" in plan_report(llama_8b, config, as_json=False)
    report = json.loads(plan_report(llama_8b, WorkerConfig(), as_json=True))
    assert (report["fits"], report["free_bytes"], report["kv_bytes_per_token"]) == (False, 16_000 * MIB, 131_072)
    told = re.search(r"too few; it would with --context-length (\d+)", plan_report(llama_8b, WorkerConfig(), False))
    assert told is not None
    assert json.loads(plan_report(llama_8b, WorkerConfig(context_length=int(told[1])), True))["fits"]
    report = json.loads(plan_report(llama_8b, WorkerConfig(gpu_device=1), True, vram_total_mb=40_000))
    assert report["total_bytes"] <= 40_000 * MIB
    assert report["cache_tokens"] > 200_000
    monkeypatch.setattr(reports, "free_vram_bytes", lambda _: None)
    assert "it takes what is free" in plan_report(llama_8b, config, as_json=False)
    assert json.loads(plan_report(llama_8b, config, as_json=True))["fits"] is None


class FakeNvml:
    """One GPU, number 1, with 7 bytes free."""

    def __init__(self) -> None:
        self.nvmlInit_v2 = lambda: 0
        self.nvmlDeviceGetHandleByIndex_v2 = lambda index, _: int(index != 1)
        self.nvmlDeviceGetMemoryInfo = self._tell

    def _tell(self, _: object, memory: Any) -> int:
        memory._obj.total, memory._obj.free = 9, 7
        return 0


def test_free_vram_is_asked_of_the_gpu_that_cuda_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card.ctypes, "CDLL", lambda _: FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [free_vram_bytes(index) for index in (0, 1)] == [None, 7]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert [free_vram_bytes(index) for index in (0, 1, 2)] == [None, 7, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert free_vram_bytes(0) is None


def test_context_length_and_cache_cap_shrink_the_cache(model: Path) -> None:
    full = draw_up(WorkerConfig(model=model, device="cpu"))
    assert full.context_length == 512
    assert draw_up(WorkerConfig(model=model, context_length=100)).context_length == 100
    half = items(WorkerConfig(model=model, context_length=256))
    assert half["kv_cache"] * 2 == items(WorkerConfig(model=model))["kv_cache"]
    per_token = half["kv_cache"] // 256
    capped = draw_up(WorkerConfig(model=tiny_long(model), kv_cache_size_mb=1))
    assert capped.context_length == MIB // per_token // 32 * 32
    whole = draw_up(WorkerConfig(model=tiny_long(model), kv_cache_size_mb=1, kv_layout="contiguous"))
    assert whole.context_length == MIB // per_token
    for layout, held in (("paged", MIB // per_token // 32 * 32), ("contiguous", MIB // per_token)):
        settings: dict[str, Any] = {"model": tiny_long(model), "kv_cache_size_mb": 1, "kv_layout": layout}
        assert draw_up(WorkerConfig(context_length=held, **settings)).context_length == held
        with pytest.raises(StartFailed, match=rf"context_length is {held + 1}, which takes 2 MiB .* holds {held} "):
            draw_up(WorkerConfig(context_length=held + 1, **settings))
    with pytest.raises(StartFailed, match="allows 512"):
        draw_up(WorkerConfig(model=model, context_length=513))


def test_a_context_shortened_by_the_size_of_the_cache_is_told(model: Path) -> None:
    path = tiny_long(model)
    told = plan_report(path, WorkerConfig(device="cpu", kv_cache_size_mb=1), as_json=False)
    assert re.search(r"context_length is \d+, not the model's 1000000: kv_cache_size_mb 1 holds no more", told)
    for config in (WorkerConfig(device="cpu", context_length=64, kv_cache_size_mb=1), WorkerConfig(device="cpu")):
        assert "not the model's" not in plan_report(path, config, as_json=False)


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
    assert draw_up(WorkerConfig(model=model, device="cuda", max_batch=100)).max_step_tokens == 2048
    assert draw_up(WorkerConfig(model=model, max_batch=7, max_tokens_per_step=77)).max_step_tokens == 77


def tiny_long(model: Path) -> Path:
    """The same model, claiming a context whose cache exceeds 1 MiB."""
    built = tiny.build("qwen3")
    built.metadata["qwen3.context_length"] = 10**6
    return built.write(model.with_name("long.gguf"))


def test_too_little_memory_is_refused_with_every_number(model: Path) -> None:
    plan = draw_up(WorkerConfig(model=model)).plan
    plan.require(plan.total_bytes, "cuda:0", "m.gguf")
    with pytest.raises(InsufficientVram) as refused:
        plan.require(plan.total_bytes - 1, "cuda:0", "m.gguf")
    largest = sorted(plan.items, key=lambda item: -item.nbytes)[:3]
    for part in (plan.total_bytes, plan.total_bytes - 1, "cuda:0", "m.gguf", *(item.purpose for item in largest)):
        assert str(part) in refused.value.message
    details = refused.value.details
    assert (details["needed_bytes"], details["free_bytes"]) == (plan.total_bytes, plan.total_bytes - 1)
    assert details["items"] == {item.purpose: item.nbytes for item in plan.items}


def test_a_context_that_is_there_is_not_asked_for_again(model: Path) -> None:
    plan = draw_up(WorkerConfig(model=model)).plan
    assert plan.total_bytes - plan.in_context().total_bytes == plan_module.CUDA_CONTEXT_BYTES


def test_too_little_vram_is_refused_before_anything_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "select_device", lambda _: torch.device("cuda", 3))
    monkeypatch.setattr(assemble, "_free_bytes", lambda _: 100 * MIB)
    monkeypatch.setattr(assemble, "_backend", lambda *_: pytest.fail("the device was used"))
    config = WorkerConfig(model=model)
    with pytest.raises(InsufficientVram, match=rf"bytes on cuda:3 are needed, {100 * MIB} are free; {model}"):
        assemble.load_runtime(config, draw_up(config), lambda *_: pytest.fail("something was loaded"))


def test_what_is_loaded_has_the_cache_that_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker for a GPU, on the host: what the driver would say is made up."""
    monkeypatch.setattr(plan_module, "REPACK_BYTES", 0)  # which would be the cache's afterwards
    config = WorkerConfig(model=model, max_batch=8)
    least, blueprint = draw_up(config).plan.in_context().total_bytes, draw_up(config)
    monkeypatch.setattr(assemble, "select_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(assemble, "_backend", lambda *_: torch_ref.TorchBackend(torch.device("cpu")))
    for extra, num_tokens in ((0, 512), (blueprint.plan.nbytes("kv_cache"), 1024), (10**9, 8 * 512)):
        free_bytes = least + extra
        monkeypatch.setattr(assemble, "_free_bytes", lambda _, free_bytes=free_bytes: free_bytes)
        runtime = assemble.load_runtime(config, blueprint, lambda *_: None)
        _, facts = assemble.build_core(config, blueprint, runtime, frozenset({2}), [0])
        assert runtime.allocator.num_blocks * runtime.allocator.block_size == num_tokens
        assert (facts.num_blocks, facts.block_size) == (num_tokens // 32, 32)
        assert facts.memory["kv_cache"] == sum(layer.k.nbytes + layer.v.nbytes for layer in runtime.kv)
        assert facts.memory.keys() == {"weights", "kv_cache", "rope_tables"}
