"""Log-probabilities against float64, and their way from a model to the events of a request."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.running import last_tokens, runtime_of
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.logprobs import log_probabilities
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.request import (
    Event,
    Failed,
    Finished,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenLogprob,
    Tokens,
)
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.scheduler import SCORE_ROWS, SchedulerLimits
from worker_orcd.engine.score import score
from worker_orcd.errors import Cancelled
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.models.adapter import ModelAdapter

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
HIDDEN = [0, 299]  # unsampleable


def best(logits: Tensor, target: int, k: int, hidden: list[int]) -> tuple[list[float], list[int]]:
    """Naively: the target's, then the k largest by value and id."""
    exact = logits.double().log_softmax(-1).tolist()
    ids = sorted((i for i in range(len(exact)) if i not in hidden), key=lambda i: (-float(logits[i]), i))[:k]
    return [exact[i] for i in [target, *ids]], [target, *ids]


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.5, 40.0]) | st.floats(-80, 80, width=32), min_size=9, max_size=9),
        min_size=1, max_size=20,
    ),
    k=st.integers(0, 7),
    hidden=st.lists(st.integers(0, 8), max_size=2, unique=True),
    data=st.data(),
)  # fmt: skip
def test_values_and_ids_are_those_of_a_sort(rows: list[list[float]], k: int, hidden: list[int], data: Any) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.integers(0, 8)), min_size=1, max_size=30))
    values, ids = log_probabilities(logits, torch.tensor(pairs).T, k, torch.tensor(hidden, dtype=torch.int64))
    for i, (row, target) in enumerate(pairs):
        expected, order = best(logits[row], target, k, hidden)
        assert ids[i].tolist() == order
        assert values[i].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("vocab", [33, 151_937])
def test_a_row_has_the_same_bits_beside_any_others(vocab: int) -> None:
    logits = torch.randn(21, vocab, generator=torch.Generator().manual_seed(0)) * 4
    pairs = torch.stack([torch.arange(21), torch.arange(21) % vocab])
    hidden = torch.tensor(HIDDEN[:1])
    values, ids = log_probabilities(logits, pairs, 5, hidden)
    for i in range(21):
        alone = log_probabilities(logits[i : i + 1], torch.tensor([[0], [i % vocab]]), 3, hidden)
        assert torch.equal(alone[0][0].view(torch.int32), values[i, :4].view(torch.int32))
        assert torch.equal(alone[1][0], ids[i, :4])


# ---------------------------------------------------------------------- through the engine


class Watcher:
    """A model that notes how many rows of logits a step asks for, and spoils those after the token `bad`."""

    def __init__(self, adapter: ModelAdapter, bad: int = -1) -> None:
        self.adapter, self.bad, self.num_rows = adapter, bad, list[int]()

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        logits = self.adapter.forward(batch, kv)
        self.num_rows.append(len(logits))
        logits[last_tokens(batch) == self.bad] = torch.nan
        return logits


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    path = tiny.build("qwen2", **SIZES).write(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return runtime_of(path, kv_block_size=4, context_length=256, max_batch=4)


def run(runtime: Runtime, *requests: Request, overlaps: bool = False, bad: int = -1) -> tuple[list[Any], list[int]]:
    """The events of each, and the rows of logits of each step."""
    watcher = Watcher(runtime.adapter, bad)
    step = PlainStep(replace(runtime, adapter=watcher), Sampler(HIDDEN, runtime.device))
    step.overlaps = overlaps
    core = EngineCore(step, SchedulerLimits(4, 512, 256), frozenset({2}), {})
    events: list[list[Event]] = [[] for _ in requests]
    for i, request in enumerate(requests):
        core.submit(i, request)
    while core.has_work:
        for number, event in core.tick().events:
            events[number].append(event)
    assert core.check() == ""
    return events, watcher.num_rows


def ask(length: int, max_tokens: int, **fields: Any) -> Request:
    prompt = [10 + i * 7 % 250 for i in range(length)]
    return Request(f"{length}", prompt, max_tokens, SamplingParams(5, temperature=1.3, top_k=30), **fields)


def check(entry: TokenLogprob | None, logits: Tensor, token: int, num_top: int) -> None:
    values, ids = best(logits, token, num_top, HIDDEN)
    assert entry is not None
    assert entry.logprob == pytest.approx(values[0], abs=1e-6)
    assert [i for i, _ in entry.top] == ids[1:]
    assert [value for _, value in entry.top] == pytest.approx(values[1:], abs=1e-6)


@pytest.mark.parametrize("overlaps", [False, True])
def test_tokens_come_with_the_models_own_probabilities(runtime: Runtime, overlaps: bool) -> None:
    wishes = [None, 0, 4, 20]
    requests = [ask(5 + i, 8, num_logprobs=wish) for i, wish in enumerate(wishes)]
    together, _ = run(runtime, *requests, overlaps=overlaps)
    runtime.allocator.drop_cache()
    for request, wish, events in zip(requests, wishes, together, strict=True):
        ids = [token for event in events if isinstance(event, Tokens) for token in event.ids]
        logits = score(runtime, [*request.prompt_ids, *ids], 64)
        at = len(request.prompt_ids) - 1
        for event in events:
            if isinstance(event, Tokens) and wish is None:
                assert event.logprobs is None
            elif isinstance(event, Tokens):
                assert event.logprobs is not None
                for token, entry in zip(event.ids, event.logprobs, strict=True):
                    check(entry, logits[at], token, wish or 0)
                    at += 1
    runtime.allocator.drop_cache()


def told_first(events: list[Any]) -> tuple[list[Any], list[Any]]:
    """What is told of the prompt, in pieces of a step each, and what comes between that and the end."""
    told: list[Any] = []
    for at, event in enumerate(events[1:-1], 1):
        if not isinstance(event, PromptLogprobs):
            return told, events[at:-1]
        assert event.index == len(told)
        assert 0 < len(event.tokens) <= SCORE_ROWS + 1
        told += event.tokens
    return told, []


@pytest.mark.parametrize("length", [1, 2, 64, 65, 130])
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_prompt_is_scored_whole_and_once(runtime: Runtime, length: int, overlaps: bool) -> None:
    """In pieces of at most 64 rows, although it was in the cache, and beside others."""
    plain, scored = ask(length, 3), ask(length, 3, prompt_logprobs=True, num_logprobs=2)
    (first,), _ = run(runtime, plain)
    (beside, events), num_rows = run(runtime, plain, scored, overlaps=overlaps)
    assert [e for e in beside if isinstance(e, Tokens)] == [e for e in first if isinstance(e, Tokens)]
    assert events[0].cached_tokens == 0
    assert isinstance(events[-1], Finished)
    told, tokens = told_first(events)
    assert all(isinstance(event, Tokens) for event in tokens)
    assert told[0] is None
    assert len(told) == length
    logits = score(runtime, plain.prompt_ids, 64)
    for at in range(1, length):
        check(told[at], logits[at - 1], plain.prompt_ids[at], 2)
    assert max(num_rows) <= SCORE_ROWS + 1
    runtime.allocator.drop_cache()


@pytest.mark.parametrize("overlaps", [False, True])
def test_mirostat_follows_what_was_drawn(runtime: Runtime, overlaps: bool) -> None:
    """Its state is that of the definition applied to the answer, also when steps overlap."""
    params = SamplingParams(3, temperature=1.2, mirostat_tau=4.0, mirostat_eta=0.4)
    step = PlainStep(runtime, Sampler(HIDDEN, runtime.device))
    step.overlaps = overlaps
    core = EngineCore(step, SchedulerLimits(4, 512, 256), frozenset(), {})
    core.submit(1, Request("a", [20, 21], 30, params))
    core.submit(2, ask(9, 30))
    for _ in range(12):
        core.tick()
    seq = core._sequences[1]
    logits, mu = score(runtime, seq.tokens, 64).double(), 2 * params.mirostat_tau
    logits[:, HIDDEN] = -torch.inf
    for at, token in enumerate(seq.generated, 1):
        surprise = -float((logits[at] / params.temperature).log_softmax(-1)[token]) / math.log(2)
        assert surprise <= mu + 1e-3, "it should have been cut off"
        mu -= params.mirostat_eta * (surprise - params.mirostat_tau)
    assert len(seq.generated) >= 10
    assert seq.mirostat_mu == pytest.approx(mu, abs=1e-3)
    core.fail_all(Cancelled("over"))
    while core.has_work:
        core.tick()
    core.drop_cache()


def test_an_answer_of_no_tokens_only_scores(runtime: Runtime) -> None:
    for overlaps in (False, True):
        (events,), _ = run(runtime, ask(70, 0, prompt_logprobs=True), overlaps=overlaps)
        told, tokens = told_first(events)
        assert (events[0].cached_tokens, len(told), tokens, events[-1].reason) == (0, 70, [], "max_tokens")
        assert all(entry.top == [] for entry in told[1:])
        runtime.allocator.drop_cache()
    ((failed,),), _ = run(runtime, ask(70, 0))
    assert isinstance(failed, Failed)
    assert failed.code == "INVALID_REQUEST"


def test_many_prompts_share_the_rows_of_a_step(runtime: Runtime) -> None:
    requests = [ask(length, 2, prompt_logprobs=True) for length in (50, 51, 52, 53)]
    events, num_rows = run(runtime, *requests)
    assert max(num_rows) <= SCORE_ROWS + 4
    assert [len(told_first(each)[0]) for each in events] == [50, 51, 52, 53]
    runtime.allocator.drop_cache()


def test_a_fault_within_the_prompt_ends_that_request_alone(runtime: Runtime) -> None:
    bad = 10 + 7 * 7 % 250  # in the prompt of the longer one
    (events, others), _ = run(runtime, ask(20, 2, prompt_logprobs=True), ask(5, 2), bad=bad)
    assert isinstance(events[-1], Failed)
    assert events[-1].code == "NUMERIC_FAULT"
    assert isinstance(others[-1], Finished)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_prompt_that_lost_its_place_is_told_on_where_it_was(overlaps: bool, tmp_path: Path) -> None:
    """To an older request, which takes a block in every step: there is one more than both prompts need."""
    path = tiny.build("qwen2", **SIZES).write(tmp_path / "tiny.gguf")
    runtime = runtime_of(path, kv_block_size=1, context_length=256, max_batch=4)
    scored = ask(200, 2, prompt_logprobs=True, num_logprobs=2)
    (undisturbed,), num_rows = run(runtime, scored)
    small = replace(runtime, allocator=PagedAllocator(210, 1))
    (_, events), more_rows = run(small, ask(8, 9), scored, overlaps=overlaps)
    assert sum(more_rows) >= sum(num_rows) + 9 + 2 * SCORE_ROWS, "nothing was computed twice"
    assert told_first(events) == told_first(undisturbed)
