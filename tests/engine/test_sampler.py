"""Sampling against float64 written out by hand, and the counter-based draw against its published vectors."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker_orcd.engine import sampler as sampler_module
from worker_orcd.engine.draws import philox, uniforms
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.sampler import Sampler, SamplingBatch, draw, filtered, penalize
from worker_orcd.engine.sequence import Sequence
from worker_orcd.kv.prefix import PrefixChain

CPU = torch.device("cpu")
DRAWS = 20_000
GREEDY = SamplingParams(seed=0, temperature=0.0)


def sequence(params: SamplingParams, generated: list[int] | None = None, prompt: int = 1) -> Sequence:
    seq = Sequence.of(Request("a", [9] * prompt, 50, params), 0, PrefixChain(b"", 16))
    seq.tokens += generated or []
    return seq


def batch(rows: list[Sequence], last_sampled: Tensor | None = None) -> SamplingBatch:
    return SamplingBatch.of(rows, last_sampled, CPU)


def choose(logits: Any, rows: list[Sequence], unsampleable: list[int] | None = None) -> list[int]:
    """The token of each row; `logits` [V] for all rows or [R, V]."""
    table = torch.as_tensor(logits, dtype=torch.float32)
    table = table.expand(len(rows), -1) if table.ndim == 1 else table
    ids, is_finite = Sampler(unsampleable or [], CPU).sample(table, batch(rows))
    assert is_finite.all()
    return ids.tolist()  # type: ignore[no-any-return]


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], dtype=np.uint64) for value in values)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key: tuple[int, ...], counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Random123's published test vectors for philox4x32-10."""
    got = philox(words(*key), words(*counter))  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in got) == expected


def test_uniforms_are_in_range_and_depend_on_every_argument() -> None:
    positions = list(range(500))
    draws = [
        u for seed in (0, 1, 2**32, 2**64 - 1) for index in (0, 3) for u in uniforms([seed] * 500, positions, index)
    ]
    assert all(0.0 <= u < 1.0 for u in draws)
    assert len(set(draws)) == len(draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.03
    together = uniforms([5, 2**64 - 1, 0], [1, 2, 3])
    assert together.tolist() == [uniforms([s], [p])[0] for s, p in ((5, 1), (2**64 - 1, 2), (0, 3))]


# ---------------------------------------------------------------------- distribution


def expected_distribution(logits: list[float], p: SamplingParams, generated: list[int]) -> np.ndarray:
    """The filters written out naively in float64: probabilities [V]."""
    x = np.array(logits, np.float64) / p.temperature
    for i in set(generated):
        penalty = max(p.repetition_penalty, 1e-6)
        x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
    alive = np.ones(len(x), bool)
    if p.top_k:
        alive &= np.argsort(np.argsort(-x, kind="stable"), kind="stable") < p.top_k
    probs = np.where(alive, np.exp(x - x.max()), 0.0)
    probs /= probs.sum()
    if p.top_p < 1:
        kept, mass = np.zeros(len(x), bool), 0.0
        for i in np.argsort(-probs, kind="stable"):
            if mass >= p.top_p and kept.any():
                break
            kept[i], mass = probs[i] > 0 or not kept.any(), mass + probs[i]
        probs = np.where(kept, probs, 0.0)
        probs /= probs.sum()
    if p.min_p > 0:
        probs = np.where(probs >= p.min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """z-score of the chi-square statistic over the outcomes that may happen (Wilson and Hilferty)."""
    alive = probs > 1e-9
    assert counts[~alive].sum() == 0
    expected = probs[alive] * counts.sum()
    degrees = max(1, alive.sum() - 1)
    statistic = ((counts[alive] - expected) ** 2 / expected).sum()
    return float(((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees)))


LOGITS = [2.0, 1.5, 1.0, 0.4, 0.0, -0.5, -1.0, -2.5, 1.9, 0.7]
CASES: dict[str, dict[str, float]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top-k": {"top_k": 4},
    "top-k above vocabulary": {"top_k": 10},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.25},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.5},
    "zero penalty": {"repetition_penalty": 0.0},
    "all": {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = [1, 5, 5, 0]
    rows = [sequence(SamplingParams(seed, **CASES[case]), generated) for seed in range(DRAWS)]  # type: ignore[arg-type]
    few = choose(LOGITS, rows[:100])
    monkeypatch.setattr(sampler_module, "ROW_TILE", DRAWS)
    many = choose(LOGITS, rows)
    assert many[:100] == few, "rows in tiles, and all at once"
    counts = np.bincount(many, minlength=len(LOGITS))
    assert abs(chi_square(counts, expected_distribution(LOGITS, rows[0].request.sampling, generated))) < 4.0


def test_draws_of_one_request_follow_the_distribution_too() -> None:
    """Same seed, other positions."""
    rows = [sequence(SamplingParams(7), [3] * n) for n in range(4000)]
    counts = np.bincount(choose(LOGITS, rows), minlength=len(LOGITS))
    assert abs(chi_square(counts, expected_distribution(LOGITS, SamplingParams(7), []))) < 4.0


@settings(max_examples=150)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    temperature=st.floats(0.01, 2.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.0, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_parameters_choose_some_likely_token(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    (token,) = choose(logits, [sequence(SamplingParams(seed, temperature, top_k, top_p, min_p))])
    assert 0 <= token < len(logits)
    if top_k:
        assert sum(x > logits[token] for x in logits) < top_k
    if top_p == 0.0 or min_p == 1.0 or top_k == 1:
        assert logits[token] == max(logits)


# ---------------------------------------------------------------------- filters


def slow_filter(weights: list[int], p: SamplingParams) -> list[int]:
    """Top-k, then top-p, then min-p, token by token."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = order[: p.top_k or len(weights)]
    total, before, kept = sum(weights[i] for i in order), 0, []
    for i in order:
        if not kept or p.top_p >= 1.0 or before < p.top_p * total:
            kept.append(i)
        before += weights[i]
    kept = [i for i in kept if i == order[0] or weights[i] >= p.min_p * weights[order[0]]]
    return [weight if i in kept else 0 for i, weight in enumerate(weights)]


@settings(max_examples=300)
@given(
    weights=st.lists(st.integers(0, 20) | st.integers(0, 2**40), min_size=1, max_size=30),
    top_k=st.integers(0, 35),
    top_p=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]) | st.floats(0.0, 1.0),
    min_p=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 1.0),
)
def test_filters_keep_what_a_slow_loop_keeps(weights: list[int], top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(0, 1.0, top_k, top_p, min_p)
    neighbour = [1] * len(weights)
    both = torch.tensor([neighbour, weights])
    got = filtered(both, both, batch([sequence(SamplingParams(0)), sequence(params)]))
    assert got.tolist() == [neighbour, slow_filter(weights, params)]


def test_a_row_without_filters_keeps_all_its_weights_beside_one_with() -> None:
    """Above 2^53 a float64 cannot tell the last small weights from nothing; such a row must not be cut."""
    weights = torch.full((1, 2**16), 2**40)
    weights[0, 5:9] = torch.tensor([1, 2, 3, 0])
    assert torch.equal(filtered(weights, weights, batch([sequence(SamplingParams(0))])), weights)


# ---------------------------------------------------------------------- greedy, penalty, unsampleable


def test_temperature_zero_is_argmax_and_ties_go_to_the_lowest_id() -> None:
    assert choose([1.0, 3.0, 3.0, 2.0], [sequence(GREEDY)]) == [1]
    wide = torch.zeros(3, 150_001)
    wide[0, [140_000, 150_000]], wide[1, -1], wide[2, :] = 5.0, 0.5, -7.0
    assert choose(wide, [sequence(GREEDY)] * 3) == [140_000, 150_000, 0]
    hot = sequence(SamplingParams(1))
    assert choose(torch.tensor([[1.0, 3.0, 3.0]] * 2), [sequence(GREEDY), hot])[0] == 1, "beside a row that draws"


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-7])
def test_a_temperature_near_zero_is_argmax(temperature: float) -> None:
    params = SamplingParams(seed=3, temperature=temperature, repetition_penalty=1.2, top_p=0.9)
    assert choose([-50.0, 30.0, 29.9, -1e30], [sequence(params, [0])]) == [1]


@pytest.mark.parametrize(
    ("score", "penalty", "expected"),
    [
        (4.0, 2.0, 2.0),  # positive: divided
        (-4.0, 2.0, -8.0),  # negative: multiplied
        (0.0, 2.0, 0.0),
        (4.0, 0.5, 8.0),  # below one it rewards
        (-4.0, 0.5, -2.0),
        (1.0, 0.0, 1e6),  # zero is legal
        (-math.inf, 2.0, -math.inf),
    ],
)
def test_penalty_table(score: float, penalty: float, expected: float) -> None:
    """Each generated id once, however often it came; the prompt and the neighbours' ids do not count."""
    scores = torch.tensor([[score, 1.0, score], [score, score, score]], dtype=torch.float64)
    params = SamplingParams(0, repetition_penalty=penalty)
    rows = [sequence(params, [0, 0, 0]), sequence(params, [2])]
    rows[0].request.prompt_ids[0] = rows[0].tokens[0] = 1
    penalize(scores, batch(rows))
    assert scores[0].tolist() == [pytest.approx(expected, rel=1e-12), 1.0, score]
    assert scores[1].tolist() == [score, score, pytest.approx(expected, rel=1e-12)]


def test_a_penalty_can_turn_the_choice() -> None:
    params = SamplingParams(0, temperature=0.0, repetition_penalty=2.0)
    assert choose([1.0, 3.0, 2.9], [sequence(params), sequence(params, [1])]) == [1, 2]


def test_a_token_the_host_does_not_know_yet_counts_like_a_known_one() -> None:
    rng = random.Random(0)
    logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(0))
    known, late = [], []
    last_sampled = torch.tensor([rng.randrange(50) for _ in range(20)])
    for i in range(12):
        params = SamplingParams(i, temperature=i % 3 / 2, repetition_penalty=rng.choice((1.0, 5.0)))
        generated = [rng.randrange(50) for _ in range(rng.randint(0, 4))]
        waiting = sequence(params, generated)
        waiting.num_unknown, waiting.sampled_row = 1, rng.randrange(20)
        late.append(waiting)
        known.append(sequence(params, [*generated, int(last_sampled[waiting.sampled_row])]))
    sampler = Sampler([], CPU)
    expected, _ = sampler.sample(logits, batch(known))
    got, _ = sampler.sample(logits, batch(late, last_sampled))
    assert got.tolist() == expected.tolist()
    forgotten, _ = sampler.sample(logits, batch(late, last_sampled * 0))
    assert forgotten.tolist() != expected.tolist(), "the late tokens made no difference"


def test_unsampleable_ids_never_win_and_the_logits_are_not_written_to() -> None:
    logits = torch.tensor([0.0, 9.0, 1.0, 9.0]).repeat(200, 1)
    hot = [sequence(SamplingParams(seed, temperature=2.0)) for seed in range(199)]
    assert choose(logits, [sequence(GREEDY), *hot], [1, 3])[0] == 2
    assert set(choose(logits, [sequence(GREEDY), *hot], [1, 3])) == {0, 2}
    rewarded = [sequence(SamplingParams(0, repetition_penalty=0.0, top_k=3), [1, 3])]
    assert choose(logits[:1], rewarded, [1, 3]) in ([0], [2])
    assert torch.equal(logits, torch.tensor([0.0, 9.0, 1.0, 9.0]).repeat(200, 1))


# ---------------------------------------------------------------------- rows stand alone


def mixed_rows(count: int, vocab: int, seed: int = 0) -> list[Sequence]:
    """Greedy, hot, filtered and penalized rows of several lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        params = SamplingParams(
            rng.getrandbits(64),
            temperature=rng.choice((0.0, 0.7, 1.0, 1.9)),
            top_k=rng.choice((0, 0, 1, 5, vocab)),
            top_p=rng.choice((1.0, 1.0, 0.5, 0.99)),
            min_p=rng.choice((0.0, 0.0, 0.1)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.4)),
        )
        rows.append(sequence(params, [rng.randrange(vocab) for _ in range(rng.randint(0, 6))], rng.randint(1, 30)))
    return rows


@pytest.mark.parametrize(("vocab", "count"), [(7, 64), (321, 40), (151_937, 5)])
def test_a_row_is_the_same_alone_and_in_any_batch(vocab: int, count: int) -> None:
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(1)) * 3
    rows = mixed_rows(count, vocab)
    together = choose(logits, rows)
    for i in range(count):
        assert choose(logits[i : i + 1], [rows[i]]) == [together[i]], f"row {i}: {rows[i].request.sampling}"
    rng = random.Random(2)
    for size in {2, 3, min(9, count), count}:
        some = rng.sample(range(count), size)
        assert choose(logits[some], [rows[i] for i in some]) == [together[i] for i in some]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 5, 8])
def test_logits_that_are_not_finite_are_flagged_and_harm_nobody_else(bad: float, row: int) -> None:
    logits = torch.randn(12, 33, generator=torch.Generator().manual_seed(3))
    rows, sampler = mixed_rows(12, 33, seed=3), Sampler([0], CPU)
    expected, _ = sampler.sample(logits, batch(rows))
    logits[row, 17] = bad
    ids, is_finite = sampler.sample(logits, batch(rows))
    assert is_finite.tolist() == [i != row for i in range(12)]
    assert [t for i, t in enumerate(ids.tolist()) if i != row] == [
        t for i, t in enumerate(expected.tolist()) if i != row
    ]
    assert 0 <= ids[row] < 33, "whatever it is, the next step may look it up"


def test_no_rows_give_no_tokens() -> None:
    ids, is_finite = Sampler([0], CPU).sample(torch.empty(0, 33), batch([]))
    assert (ids.shape, is_finite.shape) == ((0,), (0,))


# ---------------------------------------------------------------------- the draw


@pytest.mark.parametrize("scale", [1, 2**40, 2**58])
def test_draws_at_the_edges_of_the_unit_interval(scale: int) -> None:
    weights = torch.tensor([[0, 0, 3, 0, 2, 0, 1, 0]]) * scale
    just_below = 1.0 - 2.0**-53

    def drawn(u: float) -> int:
        return int(draw(weights, torch.tensor([[u]], dtype=torch.float64)))

    assert drawn(0.0) == 2
    assert drawn(just_below) == 6
    assert [drawn(n / 60 + 1e-9) for n in range(60)] == [2] * 30 + [4] * 20 + [6] * 10
    assert [drawn(np.nextafter(0.5, u)) for u in (0.0, 1.0)] == [2, 4]


def test_the_only_token_is_drawn_by_every_uniform() -> None:
    for weight in (1, 2**40, 2**62):
        for u in (0.0, 0.5, 1.0 - 2.0**-53):
            assert draw(torch.tensor([[0, weight, 0]]), torch.tensor([[u]], dtype=torch.float64)).tolist() == [1]


def test_a_large_vocabulary_is_drawn_from_evenly() -> None:
    vocab, draws = 2**17 + 3, 96
    ids = choose(torch.zeros(vocab), [sequence(SamplingParams(seed)) for seed in range(draws)])
    counts = np.bincount(np.array(ids) * 8 // vocab, minlength=8)
    assert abs(chi_square(counts, np.full(8, 1 / 8))) < 4.0
