"""Every filter beyond the usual ones against its definition written out by hand, alone and in mixed batches."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.test_sampler import CPU, chi_square, sequence
from worker_orcd.engine import filters
from worker_orcd.engine import sampler as sampler_module
from worker_orcd.engine.filters import DRY_MOST, dry_penalties, mirostat_mu, program
from worker_orcd.engine.request import SAMPLER_ORDER, Request, SamplingParams
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.sequence import Sequence
from worker_orcd.kv.prefix import PrefixChain

DRAWS = 12_000
LOGITS = np.array([2.0, 1.5, 1.0, 0.4, 0.0, -0.5, -1.0, -2.5, 1.9, 0.7])
GENERATED = [0, 5, 5, 1, 0]


def choose(logits: Any, rows: list[Sequence], eog_ids: frozenset[int] = frozenset()) -> list[int]:
    table = torch.as_tensor(logits, dtype=torch.float32)
    table = table.expand(len(rows), -1) if table.ndim == 1 else table
    (ids, is_finite), _ = Sampler([], CPU, eog_ids).choose(table, rows, None)
    assert is_finite.all()
    return ids.tolist()  # type: ignore[no-any-return]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def only(x: np.ndarray, kept: Any) -> np.ndarray:
    return softmax(np.where(np.isin(np.arange(len(x)), list(kept)), x, -np.inf))


def typical(x: np.ndarray, mass: float) -> np.ndarray:
    p = softmax(x)
    h = -(p * np.log(p)).sum()
    kept: list[int] = []
    for i in sorted(range(len(p)), key=lambda i: abs(-math.log(p[i]) - h)):
        if kept and p[kept].sum() >= mass:
            break
        kept.append(i)
    return only(x, kept)


def xtc(x: np.ndarray, probability: float, threshold: float) -> np.ndarray:
    p = softmax(x)
    top = [i for i in np.argsort(-p) if p[i] >= threshold]
    rest = only(x, set(range(len(x))) - set(top[:-1]))
    return probability * rest + (1 - probability) * p


def dynamic(x: np.ndarray, base: float, reach: float, exponent: float) -> np.ndarray:
    p = softmax(x)
    share = -(p * np.log(p)).sum() / math.log(len(p))
    low = max(0.0, base - reach)
    return softmax(x / (low + (base + reach - low) * share**exponent))


def counted(x: np.ndarray, presence: float, frequency: float) -> np.ndarray:
    y = x.copy()
    for token, count in Counter(GENERATED).items():
        y[token] -= presence + count * frequency
    return softmax(y)


def shifted(x: np.ndarray, changes: dict[int, float]) -> np.ndarray:
    y = x.copy()
    for token, change in changes.items():
        y[token] += change
    return softmax(y)


CASES: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = {
    "presence and frequency": (
        {"presence_penalty": 0.6, "frequency_penalty": 0.9},
        lambda x: counted(x, 0.6, 0.9),
    ),
    "negative penalties": ({"presence_penalty": -0.5, "frequency_penalty": -1.0}, lambda x: counted(x, -0.5, -1.0)),
    "bias": ({"logit_bias": {7: 3.0, 0: -100.0}}, lambda x: shifted(x, {7: 3.0, 0: -100.0})),
    "typical": ({"typical_p": 0.5}, lambda x: typical(x, 0.5)),
    "the most typical": ({"typical_p": 0.0}, lambda x: typical(x, 0.0)),
    "xtc": ({"xtc_probability": 0.6, "xtc_threshold": 0.1}, lambda x: xtc(x, 0.6, 0.1)),
    "xtc always": ({"xtc_probability": 1.0, "xtc_threshold": 0.15}, lambda x: xtc(x, 1.0, 0.15)),
    "xtc with one top choice": ({"xtc_probability": 1.0, "xtc_threshold": 0.26}, softmax),
    "dry": (  # after 0 came 5
        {"dry_multiplier": 1.5, "dry_allowed_length": 1, "dry_base": 2.0},
        lambda x: shifted(x, {5: -1.5}),
    ),
    "dynamic temperature": (
        {"temperature": 1.2, "dynatemp_range": 0.8, "dynatemp_exponent": 2.0},
        lambda x: dynamic(x, 1.2, 0.8, 2.0),
    ),
    "mirostat begins at twice its target": (
        {"mirostat_tau": 1.5},
        lambda x: only(x, [i for i, p in enumerate(softmax(x)) if -math.log2(p) <= 3.0]),
    ),
    "order: min-p before temperature": (
        {"order": ("min_p", "temperature"), "min_p": 0.3, "temperature": 2.0, "top_k": 2},
        lambda x: only(x / 2.0, [i for i, p in enumerate(softmax(x)) if p >= 0.3 * softmax(x).max()]),
    ),
    "order: xtc before top-k": (
        {"order": ("xtc", "top_k"), "xtc_probability": 1.0, "xtc_threshold": 0.15, "top_k": 2},
        lambda x: only(x, np.argsort(-xtc(x, 1.0, 0.15))[:2]),
    ),
    "order: none": ({"order": ("dry",), "top_k": 1, "temperature": 5.0}, softmax),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_definition(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, definition = CASES[case]
    rows = [sequence(SamplingParams(seed, **parameters), GENERATED) for seed in range(DRAWS)]
    few = choose(LOGITS, rows[:30])
    monkeypatch.setattr(sampler_module, "ROW_TILE", DRAWS)
    many = choose(LOGITS, rows)
    assert many[:30] == few, "rows in tiles, and all at once"
    expected = definition(LOGITS)
    assert abs(chi_square(np.bincount(many, minlength=len(LOGITS)), expected)) < 4.0


def test_mirostat_holds_the_surprise_at_its_target() -> None:
    """Over 400 tokens of a distribution with a long tail, whatever mu it begins with."""
    logits = torch.tensor(-1.1 * np.log(np.arange(1, 3001)), dtype=torch.float32)
    p = softmax(logits.double().numpy())
    for tau in (3.5, 6.0):  # the likeliest token has 2.5 bits, all together 7.6
        params = SamplingParams(5, mirostat_tau=tau, mirostat_eta=0.2)
        seq, surprises, sampler = sequence(params), list[float](), Sampler([], CPU)
        for _ in range(400):
            (ids, _), surprise = sampler.choose(logits[None], [seq], None)
            assert surprise is not None
            assert float(surprise) == pytest.approx(-math.log2(p[int(ids)]), abs=1e-5)
            seq.mirostat_mu = mirostat_mu(params, seq.mirostat_mu, float(surprise))
            seq.tokens.append(int(ids))
            surprises.append(float(surprise))
        assert np.mean(surprises[50:]) == pytest.approx(tau, abs=0.15)


@settings(max_examples=150)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    temperature=st.floats(0.05, 3.0),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.0, 1.0),
    min_p=st.floats(0.0, 1.0),
    penalty=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_usual_order_said_aloud_changes_nothing(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int
) -> None:
    usual = [SamplingParams(seed + i & 2**64 - 1, temperature, top_k, top_p, min_p, penalty) for i in range(4)]
    aloud = [SamplingParams(p.seed, temperature, top_k, top_p, min_p, penalty, order=SAMPLER_ORDER) for p in usual]
    rows = [[sequence(params, [0, 0]) for params in many] for many in (usual, aloud)]
    assert choose(logits, rows[0]) == choose(logits, rows[1])


def odd_rows(count: int, vocab: int, seed: int) -> list[Sequence]:
    """Every filter, in every company."""
    rng = random.Random(seed)
    choices: dict[str, tuple[Any, ...]] = {
        "temperature": (0.0, 0.7, 1.3), "top_k": (0, 0, 5), "top_p": (1.0, 0.8), "min_p": (0.0, 0.05),
        "repetition_penalty": (1.0, 1.3), "presence_penalty": (0.0, 0.5), "frequency_penalty": (0.0, 0.3),
        "typical_p": (1.0, 1.0, 0.7), "xtc_probability": (0.0, 0.0, 0.5), "xtc_threshold": (0.02,),
        "dry_multiplier": (0.0, 0.0, 1.0), "dry_allowed_length": (1,), "dynatemp_range": (0.0, 0.0, 0.5),
        "dynatemp_exponent": (1.0, 0.3), "mirostat_tau": (0.0, 0.0, 0.0, 4.0), "sample_index": (0, 1, 2),
        "logit_bias": ({}, {3: 4.0, 5: -100.0}), "order": ((), (), SAMPLER_ORDER[::-1], ("top_p", "xtc")),
    }  # fmt: skip
    rows = []
    for i in range(count):
        params = SamplingParams(i, **{name: rng.choice(values) for name, values in choices.items()})
        row = sequence(params, [rng.randrange(min(vocab, 6)) for _ in range(rng.randint(0, 12))], rng.randint(1, 9))
        row.mirostat_mu = rng.choice((None, 1.0, 7.5))
        rows.append(row)
    return rows


@pytest.mark.parametrize(("vocab", "count"), [(11, 120), (333, 120), (60_001, 12)])
def test_a_row_is_the_same_alone_and_in_any_batch(vocab: int, count: int) -> None:
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(1)) * 3
    rows, sampler = odd_rows(count, vocab, seed=vocab), Sampler([2], CPU, frozenset({4}))
    together = sampler.choose(logits, rows, None)
    assert together.surprise is not None
    for i, row in enumerate(rows):
        (ids, is_finite), surprise = sampler.choose(logits[i : i + 1], [row], None)
        assert (int(ids), bool(is_finite)) == (int(together.ids[i]), True), row.request.sampling
        assert surprise is None or torch.equal(surprise, together.surprise[i : i + 1])
    order = random.Random(2).sample(range(count), count)
    assert torch.equal(sampler.choose(logits[order], [rows[i] for i in order], None).ids, together.ids[order])


@pytest.mark.parametrize("ways", [(0.0,), (1.0,), (0.0, 0.7)])
def test_the_kernel_is_told_the_same_by_a_sampler_that_has_seen_other_steps(ways: tuple[float, ...]) -> None:
    """Of sequences that go on, that come and go, and some that are not the kernel's."""
    told: list[Tensor] = []

    def kernel(logits: Tensor, table: Tensor, place: Tensor | None, is_greedy: bool) -> Tensor:  # noqa: ARG001
        assert is_greedy == bool(table[1].all())
        told.append(table.clone())
        return torch.stack([logits.argmax(-1), torch.ones(len(logits), dtype=torch.int64)])

    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    rows = [sequence(SamplingParams(i, ways[i % len(ways)], top_k=i, top_p=0.9)) for i in range(5)]
    rows.insert(2, sequence(SamplingParams(9, repetition_penalty=1.5)))
    sampler = Sampler([], CPU, kernel=kernel)
    for members in ([0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [4, 3], [2], [4, 5], [4, 5], []):
        step, mine = [rows[row] for row in members], logits[members]
        found, expected = sampler.choose(mine, step, None), Sampler([], CPU, kernel=kernel).choose(mine, step, None)
        assert torch.equal(found.both, expected.both)
        if members not in ([2], []):
            assert torch.equal(told[-2], told[-1])
            greedy = [seq.request.sampling.temperature == 0 for seq in step if seq is not rows[2]]
            assert told[-1][1].bool().tolist() == greedy
            assert told[-1][5].any() != all(greedy), "draws are made where they are needed"
        for seq in step:
            seq.tokens.append(1)


def test_neutral_parameters_run_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those of a greedy request, except the penalties and DRY."""

    def forbidden(*_: object) -> None:
        raise AssertionError("a filter that nobody asked for")

    monkeypatch.setattr(filters, "entropy", forbidden)
    monkeypatch.setattr(sampler_module, "dry_penalties", forbidden)
    monkeypatch.setattr(sampler_module, "FILTERS", dict.fromkeys(filters.FILTERS, (forbidden, ())))
    rest = {"typical_p": 0.5, "xtc_probability": 1.0, "dynatemp_range": 0.5, "mirostat_tau": 2.0, "top_k": 3}
    neutral = SamplingParams(1, dry_base=3.0, xtc_threshold=0.4, mirostat_eta=0.5, dynatemp_exponent=2.0)
    greedy = SamplingParams(1, temperature=0.0, **rest)  # type: ignore[arg-type]
    assert program(neutral) == program(greedy) == ()
    assert choose(LOGITS, [sequence(neutral), sequence(greedy)])[1] == 0
    with pytest.raises(AssertionError, match="nobody asked"):
        choose(LOGITS, [sequence(SamplingParams(1, typical_p=0.5))])


def test_bans_hold_until_they_are_over() -> None:
    logits, greedy = [1.0, 9.0, 8.0, 0.0], SamplingParams(0, temperature=0.0)

    def row(generated: list[int], **fields: Any) -> Sequence:
        seq = Sequence.of(Request("a", [3], 9, greedy, **fields), 0, PrefixChain(b"", 16))
        seq.tokens += generated
        return seq

    rows = [row([]), row([3], min_tokens=2, stop_ids=[2]), row([3, 3], min_tokens=2), row([], ignore_eos=True)]
    assert choose(logits, rows, frozenset({1})) == [1, 0, 1, 2]


def test_a_row_that_may_say_nothing_is_a_fault_of_its_own() -> None:
    nothing = SamplingParams(0, logit_bias=dict.fromkeys(range(10), -math.inf))
    rows = [sequence(SamplingParams(0)), sequence(nothing), sequence(SamplingParams(0))]
    (ids, is_finite), _ = Sampler([], CPU).choose(torch.tensor(LOGITS).float().expand(3, -1), rows, None)
    assert is_finite.tolist() == [True, False, True]
    assert ids[0] == ids[2]
    assert 0 <= ids[1] < 10, "whatever it is, the next step may look it up"


# ---------------------------------------------------------------------- DRY


def slow_dry(tokens: list[int], p: SamplingParams) -> dict[int, float]:
    """For every token: the longest run that ends the text and stood before it earlier."""
    found: dict[int, int] = {}
    for at in range(1, len(tokens)):
        n = 0
        while n < at and tokens[at - 1 - n] == tokens[-1 - n] and tokens[-1 - n] not in p.dry_breaker_ids:
            n += 1
        if n >= p.dry_allowed_length and tokens[at] not in p.dry_breaker_ids:
            found[tokens[at]] = max(found.get(tokens[at], 0), n)
    return {t: p.dry_multiplier * p.dry_base ** (n - p.dry_allowed_length) for t, n in found.items()}


@settings(max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40) | st.lists(st.just(1), min_size=1, max_size=20),
    allowed=st.integers(1, 4),
    breakers=st.lists(st.integers(0, 3), max_size=1),
)
def test_dry_penalizes_what_a_slow_search_finds(tokens: list[int], allowed: int, breakers: list[int]) -> None:
    p = SamplingParams(0, dry_multiplier=0.8, dry_base=1.5, dry_allowed_length=allowed, dry_breaker_ids=breakers)
    assert dry_penalties(tokens, p) == pytest.approx(slow_dry(tokens, p))


def test_dry_stays_finite_and_quick_on_endless_repetition() -> None:
    p = SamplingParams(0, dry_multiplier=1e9, dry_base=1e200)
    assert dry_penalties([7] * 100_000, p) == {7: DRY_MOST}
    assert dry_penalties([7] * 500, SamplingParams(0, dry_multiplier=1.0, dry_base=1.0)) == {7: 1.0}


def test_dry_turns_the_choice() -> None:
    greedy = {"temperature": 0.0, "dry_multiplier": 1.0, "dry_allowed_length": 2}
    seq = sequence(SamplingParams(0, **greedy), [1, 2, 0, 1, 2])  # type: ignore[arg-type]
    assert choose([3.0, 2.5, 0.0], [seq, sequence(SamplingParams(0, temperature=0.0))]) == [1, 0]
