"""What a step is said to hold against the kernels' own rules, and against what one really held."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny, tiny_moe
from tests.kernels.emulator.gpu import EmulatedGpu
from tests.running import runtime_of
from worker_orcd import assemble
from worker_orcd.assemble import draw_up
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.config import WorkerConfig
from worker_orcd.engine import graphs, scheduler
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.loop import warm_up
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.score import score
from worker_orcd.engine.sequence import Chunk
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.attention import Form, decode_launch, partial_elems
from worker_orcd.kernels.gpu import Card
from worker_orcd.kernels.linear.plan import choose_expert_slices, choose_slices, plan_linear
from worker_orcd.kernels.ops.experts import unit_counts, unit_rows
from worker_orcd.kernels.ops.ops import image_shape
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.kv.pool import KVShape, allocate_pool
from worker_orcd.models.tensors import tensor_table
from worker_orcd.models.weights import load_weights
from worker_orcd.vram import workspace
from worker_orcd.vram.ledger import Ledger
from worker_orcd.vram.plan import _matrices
from worker_orcd.vram.workspace import Dims, attention_partial_bytes, forward_bytes, image_bytes, product_bytes

TYPES = [GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.Q8_0, GgmlType.MXFP4, GgmlType.F16, GgmlType.F32]
SHAPES = [(16, 256), (96, 96), (896, 896), (4864, 896), (896, 4864), (1024, 4096), (4096, 4096), (28672, 4096),
          (4096, 14336), (5760, 2880), (128256, 4096), (49, 16384)]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_products_leave_no_more_than_planned_and_not_much_less(kind: GgmlType) -> None:
    for shape in SHAPES:
        plan = plan_linear(*shape, kind)
        assert choose_slices(*shape, kind) <= workspace.most_slices(kind, shape)
        assert choose_expert_slices(*shape, kind, 4) == workspace.expert_slices(kind, shape, 4)
        most = 0
        for rows in (1, 8, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 257, 384, 500, 512):
            for card in (
                Card(has_wgmma=True, shared_bytes=227 * 1024),
                Card(has_wgmma=False, shared_bytes=99 * 1024),
            ):
                at_once = rows if card.has_wgmma else min(rows, 128)
                count = 1 if plan.is_whole(plan.variant(at_once, card)) else plan.slices
                beside = 0 if at_once == rows else rows + 2 * at_once  # the whole, and a piece while it is added up
                held = 4 * shape[0] * (count * at_once + beside)
                assert held <= product_bytes(rows, kind, shape), (shape, rows, card)
                most = max(most, held)
        assert product_bytes(512, kind, shape) <= 2.2 * most, shape


def test_operands_and_partial_results_have_the_kernels_sizes() -> None:
    for rows in (1, 7, 8, 9, 64, 129, 256, 257, 512):
        for width in (64, 256, 2880):
            assert image_bytes(rows, width) == 2 * prod(image_shape(rows, width))
    for num_heads, num_kv_heads, max_batch in ((32, 8, 64), (14, 2, 256), (71, 1, 3), (32, 32, 64)):
        form, planned = Form(num_heads, num_kv_heads, 64, 1.0), 0
        dims = dims_of(num_heads=num_heads, num_kv_heads=num_kv_heads, max_batch=max_batch, context_length=8192)
        for num_seqs in range(1, max_batch + 1):
            if decode_launch(form, num_seqs, 32, Card(has_wgmma=True, shared_bytes=227 * 1024)).num_parts > 1:
                planned = max(planned, 4 * partial_elems(form, num_seqs, 32))
        assert planned == attention_partial_bytes(dims)


def test_constants_are_those_of_engine_and_kernels() -> None:
    assert (workspace.GRAPH_ROWS, workspace.SCORE_ROWS) == (graphs.ROWS, scheduler.SCORE_ROWS)
    assert (workspace.GRAPH_TOKENS, workspace.GRAPH_GROWTH) == (graphs.WIDTH_TOKENS, graphs.WIDTH_GROWTH)
    for has_wgmma in (False, True):
        for pairs in (1, 32, 33, 64, 128, 129, 256, 257, 384, 385, 1000, 5000):
            small, large = unit_rows(pairs, 8, has_wgmma)
            assert large == workspace.expert_unit(pairs, 8, has_wgmma)
            smalls, larges = unit_counts(pairs, 8, small, large)
            assert smalls * small + larges * large < pairs + 8 * large, "what is planned"


def dims_of(**given: int) -> Dims:
    names = Dims.__dataclass_fields__
    return Dims(**(dict.fromkeys(names, 64) | given))


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and alive, and remembers the most."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.there = {key_of(x) for x in there}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {key_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} | self.there
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := key_of(x)) not in given and key not in self.sizes:
                self.sizes[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def key_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated GPU needs g++")
@pytest.mark.parametrize("case", ["llama", "gpt-oss"])
def test_a_step_holds_what_is_planned(case: str, tmp_path: Path) -> None:
    """The kernels run on an emulated GPU; weights and cache are as planned, too."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
    built = tiny.build(case, **sizes) if case == "llama" else tiny_moe.build(case)
    config = WorkerConfig(model=built.write(tmp_path / "tiny.gguf"), max_batch=1, max_tokens_per_step=64,
                          context_length=64)  # fmt: skip
    blueprint = draw_up(config)
    gpu = EmulatedGpu() if case == "llama" else EmulatedGpu(has_wgmma=True, shared_bytes=227 * 1024)
    gguf, spec = blueprint.gguf, blueprint.spec
    backend, table = CudaBackend(gpu.device, gpu), tensor_table(spec, gguf.tensors)
    adapter = assemble._adapter(spec)(spec, load_weights(gguf, table, backend, 2**20, lambda *_: None), backend, 64)
    kv = allocate_pool(
        KVShape(spec.num_layers, 2, 32, spec.num_kv_heads, spec.head_dim, torch.float16), backend.device
    )
    ledger = Ledger()
    ledger.enter("weights", "model", adapter)
    ledger.enter("kv_cache", "cache", kv)
    for purpose, nbytes in ledger.by_purpose().items():
        assert blueprint.plan.nbytes(purpose) == nbytes, purpose
    runtime, ids = Runtime(adapter, kv, PagedAllocator(2, 32), backend.device), [7 * i % 321 for i in range(64)]
    score(runtime, ids, 64)  # tables that stay are made
    with Held(ledger.tensors.values()) as held:
        score(runtime, ids, 64)
    planned = forward_bytes(assemble._dims(spec, blueprint.cache, config, 64), _matrices(gguf.tensors, table), 64, 64)
    print(case, held.peak, planned)
    assert held.peak <= planned <= (1.4 if case == "llama" else 2.0) * held.peak  # units for wgmma are padded further


def test_the_warm_up_asks_for_all_that_steps_may_hold(tmp_path: Path) -> None:
    """The largest step, one that scores a prompt, and all sequences at once; nothing of it stays."""
    path = tiny.build("llama").write(tmp_path / "tiny.gguf")
    runtime = runtime_of(path, kv_block_size=4, context_length=64, max_batch=6, max_tokens_per_step=24)
    step = PlainStep(runtime, Sampler([0], runtime.device, frozenset({2})))
    core = EngineCore(step, scheduler.SchedulerLimits(6, 24, 64), frozenset({2}), {})
    plans: list[list[Chunk]] = []
    launch = step.launch
    step.launch = lambda plan: plans.append(plan) or launch(plan)  # type: ignore[func-returns-value, method-assign]
    assert warm_up(core, 24, 64, max_batch=6) > 0
    assert [chunk.num_tokens for chunk in plans[0]] == [24]
    assert max(sum(chunk.num_logits for chunk in plan) for plan in plans) == 24, "every row of a prompt is scored"
    at_once = [[chunk.num_tokens for chunk in plan] for plan in plans if len(plan) == 6]
    assert at_once == [[4] * 6, [1] * 6, [1] * 6, [1] * 6]
    assert core.check() == ""
    assert step.available() == step.num_blocks
    assert step.usage() == (0, 0, step.usage()[2]), "no prefix is kept"
