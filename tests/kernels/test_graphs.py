"""Recorded decode steps: the same bits as launched one by one, for any number of sequences, overlapping or not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.engine.test_pack import CPU, sequence
from tests.kernels.test_cuda_backend import runtime_on
from worker_orcd.backends.base import SampleKernel
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.graphs import ROWS, CudaRecorder, Frame, Graphs, Recording
from worker_orcd.engine.pack import pack
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.request import Request, SamplingParams, Tokens
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.engine.sequence import Chunk, Sequence
from worker_orcd.errors import CudaError
from worker_orcd.kernels.gpu import Gpu

CONTEXT = 300


@dataclass
class Repeater:
    """Stands in for CUDA's capture: repeats the work, and leaves the result at one place."""

    calls: list[int] = field(default_factory=list)

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        result = work()
        number = len(self.calls)
        self.calls.append(0)

        def replay() -> None:
            self.calls[number] += 1
            result.copy_(work())

        return replay, result


@pytest.fixture(scope="module")
def runtime(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    backend = CudaBackend(gpu.device, gpu)
    path = tiny.build("qwen3", head_dim=32, num_hidden_layers=1, num_attention_heads=2).write(
        tmp_path_factory.mktemp("graphs") / "tiny.gguf"
    )
    runtime = runtime_on(path, backend)
    assert backend.can_record(runtime.kv[0].k.shape[3]), "or nothing here would be tested"
    return runtime


def requests(count: int) -> list[Request]:
    return [
        Request(str(i), [(11 * i + 7 * j) % 321 for j in range(2 + i % 3)], 2 + i % 2,
                SamplingParams(seed=i, temperature=i % 2 * 1.0))
        for i in range(count)
    ]  # fmt: skip


def answers(
    runtime: Runtime, graphs: Graphs | None, wanted: list[Request], kernel: SampleKernel | None = None
) -> dict[int, list[int]]:
    step = PlainStep(runtime, Sampler([0], runtime.device, kernel=kernel), graphs)
    step.overlaps = True  # tokens of the step before are read on the device
    core = EngineCore(step, SchedulerLimits(8, 64, CONTEXT), frozenset({2}), {"model": "m"})
    found: dict[int, list[int]] = {}
    for number, request in enumerate(wanted):
        core.submit(number, request)
    while core.has_work:
        for number, event in core.tick().events:
            if isinstance(event, Tokens):
                found.setdefault(number, []).extend(event.ids)
    return found


def recorder(runtime: Runtime) -> Repeater | CudaRecorder:
    return CudaRecorder() if runtime.device.type == "cuda" else Repeater()


def test_the_same_tokens_with_and_without(runtime: Runtime) -> None:
    record = recorder(runtime)
    graphs, wanted = Graphs(runtime, CONTEXT, record), requests(5)
    expected = answers(runtime, None, wanted)
    assert len(expected) == 5
    assert answers(runtime, graphs, wanted) == expected
    for number in (0, 4):
        assert answers(runtime, graphs, [wanted[number]]) == {0: expected[number]}
    rows = {rows for rows, _ in graphs._recorded}
    assert {1, 8} <= rows, "alone and padded steps were recorded"
    if isinstance(record, Repeater):
        assert all(record.calls), "each was replayed"


def test_the_same_tokens_from_the_sampling_kernel(runtime: Runtime, gpu: Gpu) -> None:
    """In a step with rows that torch samples, since a penalty changes their logits."""
    ways = [{"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.5}, {"min_p": 0.1, "temperature": 0.5}, {}]
    wanted = [
        Request(str(i), [3 + i, 7], 3, SamplingParams(seed=i, **{"temperature": 1.0, **way}))  # type: ignore[arg-type]
        for i, way in enumerate(ways)
    ]
    calls = []
    sample = CudaBackend(gpu.device, gpu).sample_kernel([0], 321)
    assert sample is not None

    def kernel(logits: Tensor, table: Tensor, place: Tensor | None, is_greedy: bool) -> Tensor:
        calls.append((len(logits), place is not None))
        return sample(logits, table, place, is_greedy)

    expected = answers(runtime, None, wanted)
    assert answers(runtime, None, wanted, kernel) == expected
    assert (4, False) in calls
    assert not any(has_place for _, has_place in calls)
    calls.clear()
    graphs = Graphs(runtime, CONTEXT, recorder(runtime))
    assert answers(runtime, graphs, wanted, kernel) == expected
    assert (4, False) in calls, "beside a row of torch's"
    plain = wanted[:2] + wanted[3:]
    assert answers(runtime, graphs, plain, kernel) == answers(runtime, None, plain)
    assert (4, True) in calls, "alone: what it samples is where the next step looks"


def test_rows_that_pad_leave_the_cache_alone(runtime: Runtime) -> None:
    before = [(layer.k.clone(), layer.v.clone()) for layer in runtime.kv]
    for layer in runtime.kv:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    graphs = Graphs(runtime, CONTEXT, recorder(runtime))
    wanted = requests(3)
    found = answers(runtime, graphs, wanted)
    written = sum(int(layer.k[..., 0, 0].isfinite().sum()) for layer in runtime.kv) / len(runtime.kv)
    assert written == sum(len(r.prompt_ids) + len(found[i]) - 1 for i, r in enumerate(wanted))
    for layer, (k, v) in zip(runtime.kv, before, strict=True):
        layer.k.copy_(k)
        layer.v.copy_(v)


ROOM, WIDTH = 8, 6  # sequences, blocks


def some_rows(rng: random.Random, pool: list[Sequence]) -> list[Sequence]:
    """Decodes in another order, of which some end, grow, share a block or have a token that is not known yet."""
    pool[rng.randrange(ROOM)] = sequence([rng.randrange(99) for _ in range(9)], [rng.randrange(50) for _ in range(3)])
    for seq in rng.sample(pool, 3):
        blocks = seq.block_table.blocks
        blocks[rng.randrange(len(blocks))] = rng.randrange(50)
        if len(blocks) < WIDTH:
            blocks.append(rng.randrange(50))
            seq.tokens += [rng.randrange(99)] * 4
    rows = rng.sample(pool, rng.randrange(1, ROOM + 1))
    for seq in rows:
        seq.num_unknown, seq.sampled_row = rng.randrange(2), rng.randrange(ROOM)
    return rows


def test_a_frame_holds_what_a_batch_would() -> None:
    """Step after step in the same place, whatever was there before."""
    rng = random.Random(0)
    sampled = torch.randint(100, (ROOM,))
    frame = Frame(ROOM, WIDTH, 4, sampled)
    pool, rows = [sequence([1] * 9, [1, 2, 3]) for _ in range(ROOM)], list[Sequence]()
    for step in range(60):
        if step % 3 == 2:  # as in the step before, all tokens still unknown
            for row, seq in enumerate(rows):
                seq.num_unknown, seq.sampled_row = 1, row
        else:
            rows = some_rows(rng, pool)
        for seq in rows:
            seq.num_computed = seq.num_tokens - 1
        plan = [Chunk.of(seq, 1) for seq in rows]
        frame.fill(plan)
        found, wanted, count = frame.batch, pack(plan, CPU, sampled), len(plan)
        for mine, theirs in (
            (found.tokens, wanted.tokens),
            (found.attn.positions, wanted.attn.positions),
            (found.attn.context_lens, wanted.attn.context_lens),
        ):
            assert mine.tolist() == theirs.tolist() + [0] * (ROOM - count)
        assert found.slots.tolist() == wanted.slots.tolist() + [-1] * (ROOM - count)
        table = torch.zeros(ROOM, WIDTH, dtype=torch.int64)
        table[:count, : wanted.attn.block_table.shape[1]] = wanted.attn.block_table
        assert torch.equal(found.attn.block_table, table)
        assert found.attn.query_starts.tolist() == list(range(ROOM + 1))
        assert (found.sampled is sampled, found.sample_rows, wanted.sample_rows) == (True, None, None)


def test_tokens_of_the_step_before_are_found_wherever_they_are(runtime: Runtime) -> None:
    """The sampler leaves them where recorded steps look, or elsewhere; of too many sequences there is no room."""
    graphs = Graphs(runtime, CONTEXT, recorder(runtime))
    seq = sequence([3, 4], [1], computed=2, block_size=16)
    seq.num_unknown, seq.sampled_row = 1, 2
    plan = [Chunk.of(seq, 1)]
    found = []
    for token in (7, 9, 7):
        logits = graphs.logits(plan, torch.tensor([1, 2, token], device=runtime.device))
        assert logits is not None
        found.append(logits.clone())
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    graphs.sampled[2] = 9
    logits = graphs.logits(plan, graphs.sampled.view(2, -1)[0])
    assert logits is not None
    assert torch.equal(logits, found[1])
    assert graphs.logits(plan, torch.zeros(len(graphs.sampled) + 1, dtype=torch.int64, device=runtime.device)) is None


def test_a_fill_that_failed_leaves_nothing_behind() -> None:
    frame = Frame(2, WIDTH, 4, torch.zeros(2, dtype=torch.int64))
    good, bad = sequence([5] * 9, [1, 2, 3], 8), sequence([5] * 40, [7], 39)
    frame.fill([Chunk.of(good, 1)])
    with pytest.raises(IndexError):
        frame.fill([Chunk.of(bad, 1)])
    frame.fill([Chunk.of(good, 1)])
    assert frame.batch.slots.tolist() == [3 * 4, -1]
    assert frame.batch.attn.block_table[0].tolist() == [1, 2, 3, 0, 0, 0]


def test_what_is_not_recorded(runtime: Runtime) -> None:
    graphs = Graphs(runtime, CONTEXT, recorder(runtime))
    assert answers(runtime, graphs, [Request("a", [5] * 9, 1, SamplingParams(seed=0))])
    assert not graphs._recorded, "a prompt"
    assert list(ROWS) == sorted(ROWS)


def test_wider_tables_are_recorded_anew(runtime: Runtime) -> None:
    graphs = Graphs(runtime, 100_000, recorder(runtime))
    widths = [graphs._width(blocks, 16) for blocks in (1, 16, 17, 65, 256, 257, 6249)]
    assert widths == [16, 16, 64, 256, 256, 1024, 6250]


def test_only_heads_the_tensor_cores_take_are_recorded(gpu: Gpu) -> None:
    backend = CudaBackend(gpu.device, gpu)
    assert [backend.can_record(dim) for dim in (24, 64, 80, 96, 256, 272)] == [False, True, True, True, True, False]


def test_a_recording_that_gives_other_bits_is_not_used(runtime: Runtime) -> None:
    def wrong(work: Callable[[], Tensor]) -> Recording:
        result = work().clone()
        return lambda: result.mul_(1 + 1e-6), result

    graphs, wanted = Graphs(runtime, CONTEXT, wrong), requests(3)
    assert answers(runtime, graphs, wanted) == answers(runtime, None, wanted)
    assert "other bits" in graphs.refusal


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nmore"), CudaError("launching: CUDA_ERROR 900")])
def test_what_cannot_be_recorded_is_launched(error: Exception, runtime: Runtime) -> None:
    def refuse(work: Callable[[], Tensor]) -> Recording:  # noqa: ARG001
        raise error

    graphs, wanted = Graphs(runtime, CONTEXT, refuse), requests(3)
    assert answers(runtime, graphs, wanted) == answers(runtime, None, wanted)
    assert graphs.refusal.startswith("a step of 4 sequences could not be recorded: ")
    assert PlainStep(runtime, Sampler([], runtime.device), graphs).warning == graphs.refusal
    assert not PlainStep(runtime, Sampler([], runtime.device)).warning
    assert "more" not in graphs.refusal
