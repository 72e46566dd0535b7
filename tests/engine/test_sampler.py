"""Sampling against float64 written out by hand, and the counter-based draw against its published vectors."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker_orcd.engine.request import SamplingParams
from worker_orcd.engine.sampler import Sampler, distribution, draw, penalize, philox, uniform
from worker_orcd.errors import NumericFault

GREEDY = SamplingParams(seed=0, temperature=0.0)
DRAWS = 100_000


def test_philox_known_answers() -> None:
    """Random123's published test vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert philox(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox(ones << 32 | ones, (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(0x299F31D0 << 32 | 0xA4093822, pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_is_in_range_and_depends_on_every_argument() -> None:
    draws = [uniform(seed, index, position) for seed in (0, 2**64 - 1) for index in (0, 3) for position in range(500)]
    assert all(0.0 <= u < 1.0 for u in draws)
    assert len(set(draws)) == len(draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.03


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
    alive = probs > 0
    assert counts[~alive].sum() == 0
    expected = probs[alive] * counts.sum()
    degrees = max(1, alive.sum() - 1)
    statistic = ((counts[alive] - expected) ** 2 / expected).sum()
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


LOGITS = [2.0, 1.5, 1.0, 0.4, 0.0, -0.5, -1.0, -2.5, 1.9, 0.7]
CASES = {
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
def test_draws_follow_the_distribution(case: str) -> None:
    params, generated = SamplingParams(seed=12345, **CASES[case]), [1, 5, 5, 0]  # type: ignore[arg-type]
    scores = torch.tensor(LOGITS, dtype=torch.float64) / params.temperature
    penalize(scores, generated, params.repetition_penalty)
    ids, probs = distribution(scores, params)
    drawn = [int(ids[draw(probs, uniform(params.seed, 0, n))]) for n in range(DRAWS // 10)]
    cdf, points = probs.cumsum(0), torch.tensor([uniform(params.seed, 0, n) for n in range(DRAWS)]).double()
    many = ids[torch.searchsorted(cdf, points * cdf[-1], right=True)]
    assert many[: len(drawn)].tolist() == drawn
    counts = np.bincount(many.numpy(), minlength=len(LOGITS))
    assert abs(chi_square(counts, expected_distribution(LOGITS, params, generated))) < 4.0


@settings(max_examples=200, deadline=None)
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
    params = SamplingParams(seed, temperature, top_k, top_p, min_p)
    token = Sampler([]).sample(torch.tensor(logits), params, [], 3)
    assert 0 <= token < len(logits)
    if top_k:
        assert sum(x > logits[token] for x in logits) < top_k
    if top_p == 0.0 or min_p == 1.0 or top_k == 1:
        assert logits[token] == max(logits)


def test_temperature_zero_is_argmax_and_ties_go_to_the_lowest_id() -> None:
    assert Sampler([]).sample(torch.tensor([1.0, 3.0, 3.0, 2.0]), GREEDY, [], 0) == 1
    penalised = msgspec.structs.replace(GREEDY, repetition_penalty=2.0)
    assert Sampler([]).sample(torch.tensor([1.0, 3.0, 2.9]), penalised, [1], 0) == 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-7])
def test_a_temperature_near_zero_is_argmax(temperature: float) -> None:
    params = SamplingParams(seed=3, temperature=temperature, repetition_penalty=1.2, top_p=0.9)
    assert Sampler([]).sample(torch.tensor([-50.0, 30.0, 29.9, -1e30]), params, [0], 0) == 1


def test_penalty_divides_positive_multiplies_negative_and_counts_an_id_once() -> None:
    scores = torch.tensor([4.0, -4.0, 1.0, 0.0], dtype=torch.float64)
    penalize(scores, [0, 0, 1, 3], 2.0)
    assert scores.tolist() == [2.0, -8.0, 1.0, 0.0]


def test_unsampleable_ids_never_win() -> None:
    logits = torch.tensor([0.0, 9.0, 1.0, 9.0])
    assert Sampler([1, 3]).sample(logits, GREEDY, [], 0) == 2
    hot = SamplingParams(seed=1, temperature=2.0)
    assert {Sampler([1, 3]).sample(logits, hot, [], n) for n in range(200)} == {0, 2}
    assert logits.tolist() == [0.0, 9.0, 1.0, 9.0], "the logits were written to"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_a_fault(bad: float, temperature: float) -> None:
    with pytest.raises(NumericFault, match="position 7"):
        Sampler([]).sample(torch.tensor([0.0, bad]), SamplingParams(0, temperature), [], 7)
