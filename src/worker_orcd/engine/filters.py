"""The sampling filters that a request may put in any order, and those beyond the usual ones.

A filter takes the scores f64 [R, V] of rows that all use it, what earlier filters removed at -inf, and its parameters
as columns [R, 1]. Sums are over integers (see `weigh`), so a row's outcome is the same beside any neighbours.

penalties    repetition penalty (arXiv:1909.05858), presence and frequency penalty: engine/sampler.py
dry          "Don't repeat yourself": text-generation-webui, pull request 5677
temperature  divides; with `dynatemp_range`, by the entropy: koboldcpp's "dynamic temperature", as in llama.cpp
top_k, top_p (arXiv:1904.09751), min_p (arXiv:2407.01082)
typical_p    locally typical sampling, arXiv:2202.00666
xtc          "exclude top choices": text-generation-webui, pull request 6335
mirostat     version 2, arXiv:2007.14966; comes last, in place of all filters that remove tokens
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from worker_orcd.engine.request import SAMPLER_ORDER, SamplingParams

Program = tuple[str, ...]  # names of filters in the order they apply; () = the usual ones in the usual order

MIN_TEMPERATURE = 1e-6  # below it the likeliest token has all the mass, and dividing could overflow
UNITS = 2.0**40  # weight of the likeliest token; the sum over 2^20 ids stays below 2^63
SCORING = ("penalties", "dry", "temperature")  # filters that remove nothing
DRY_WINDOW = 4096  # latest tokens that are searched for repetitions
DRY_REACH = 128  # longer repetitions count as this long
DRY_MOST = 1e6  # a penalty never exceeds this: the scores stay finite


def program(params: SamplingParams) -> Program:
    """Which filters have something to do for these parameters. Temperature 0 is argmax after those that score."""
    is_active = {
        "penalties": has_penalty(params),
        "dry": params.dry_multiplier > 0,
        "temperature": params.temperature != 1.0 or params.dynatemp_range > 0,
        "top_k": params.top_k > 0,
        "typical_p": params.typical_p < 1.0,
        "top_p": params.top_p < 1.0,
        "min_p": params.min_p > 0,
        "xtc": params.xtc_probability > 0,
    }
    names = [name for name in params.order or SAMPLER_ORDER if is_active[name]]
    if params.temperature < MIN_TEMPERATURE:
        names = [name for name in names if name in ("penalties", "dry")]
    elif params.mirostat_tau > 0:
        names = [name for name in names if name in SCORING] + ["mirostat"]
    if params.dynatemp_range > 0:
        names = ["dynamic_temperature" if name == "temperature" else name for name in names]
    is_usual = not {"dry", "dynamic_temperature", "typical_p", "xtc", "mirostat"}.intersection(names)
    return () if is_usual and not params.order else (*names, "draw")


def has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def weigh(scores: Tensor) -> Tensor:
    """Probabilities as integers i64 [R, V], in units of 2^-40 of the likeliest token's: they add up exactly."""
    return (torch.exp(scores - scores.amax(-1, keepdim=True)) * UNITS).round().long()


def entropy(weights: Tensor) -> Tensor:
    """Nats, f64 [R, 1]."""
    p = weights.double() / weights.sum(-1, keepdim=True)
    return (torch.xlogy(p, p) * -UNITS).round().long().sum(-1, keepdim=True).double() / UNITS


def temperature(scores: Tensor, value: Tensor) -> Tensor:
    return scores / value


def dynamic_temperature(scores: Tensor, value: Tensor, reach: Tensor, exponent: Tensor) -> Tensor:
    """From `value` - `reach` where the model is sure to `value` + `reach` where all tokens are equally likely."""
    num_left = (scores > -torch.inf).sum(-1, keepdim=True)
    share = entropy(weigh(scores)) / torch.log(num_left.clamp_min(2).double())
    low, high = (value - reach).clamp_min(0.0), value + reach
    power = torch.exp(exponent * torch.log(share.clamp(1e-300, 1.0)))
    return scores / (low + (high - low) * power).clamp_min(MIN_TEMPERATURE)


def top_k(scores: Tensor, k: Tensor) -> Tensor:
    order, rank = _ranked(scores)
    return _kept(scores, order, rank < k)


def top_p(scores: Tensor, p: Tensor) -> Tensor:
    order, rank = _ranked(scores)
    return _kept(scores, order, _within(weigh(scores).gather(-1, order), p) | (rank == 0))


def min_p(scores: Tensor, p: Tensor) -> Tensor:
    return scores.masked_fill(weigh(scores) < p * UNITS, -torch.inf)


def typical_p(scores: Tensor, p: Tensor) -> Tensor:
    """The tokens whose surprise is nearest to the entropy, up to the mass `p`."""
    weights = weigh(scores)
    surprise = -torch.log(weights.double() / weights.sum(-1, keepdim=True))
    order = (surprise - entropy(weights)).abs().argsort(dim=-1, stable=True)
    is_kept = _within(weights.gather(-1, order), p)
    is_kept[:, 0] = True
    return _kept(scores, order, is_kept)


def xtc(scores: Tensor, probability: Tensor, threshold: Tensor, coin: Tensor) -> Tensor:
    """When `coin` < `probability`, all tokens of at least `threshold` go, except the least likely of them."""
    weights = weigh(scores)
    num_top = (weights >= threshold * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    order, rank = _ranked(scores)
    return _kept(scores, order, (rank >= num_top - 1) | (coin >= probability))


def _ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ids by falling score, equals by id, i64 [R, V]; and the ranks [V]."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order, torch.arange(scores.shape[-1], device=scores.device)


def _within(ordered: Tensor, p: Tensor) -> Tensor:
    """Whether the mass before an entry is below the share `p`."""
    before = ordered.cumsum(-1) - ordered
    return (before < p * ordered.sum(-1, keepdim=True)) | (p >= 1.0)


def _kept(scores: Tensor, order: Tensor, is_kept: Tensor) -> Tensor:
    return scores.masked_fill(~torch.zeros_like(is_kept).scatter_(-1, order, is_kept), -torch.inf)


# name → function, and the parameters it takes: of SamplingParams, or "coin", a second draw in [0, 1)
FILTERS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "temperature": (temperature, ("temperature",)),
    "dynamic_temperature": (dynamic_temperature, ("temperature", "dynatemp_range", "dynatemp_exponent")),
    "top_k": (top_k, ("top_k",)),
    "top_p": (top_p, ("top_p",)),
    "min_p": (min_p, ("min_p",)),
    "typical_p": (typical_p, ("typical_p",)),
    "xtc": (xtc, ("xtc_probability", "xtc_threshold", "coin")),
}


# ---------------------------------------------------------------------- on the host: they need the last token


def mirostat_mu(params: SamplingParams, mu: float | None, surprise: float) -> float:
    """The next cut-off, in bits, after a token of this surprise; it begins at twice the target."""
    before = 2.0 * params.mirostat_tau if mu is None else mu
    return before - params.mirostat_eta * (surprise - params.mirostat_tau)


def mirostat_share(params: SamplingParams, mu: float | None) -> float:
    """Tokens of a smaller probability are cut off."""
    return float(min(1.0, 2.0 ** -(2.0 * params.mirostat_tau if mu is None else max(mu, 0.0))))


def dry_penalties(tokens: list[int], params: SamplingParams) -> dict[int, float]:
    """What to subtract from the score of each token that would prolong a repetition.

    multiplier · base^(n - allowed length) for the longest run of n ≥ allowed length tokens at the end of the text
    that stood earlier before that token. Neither run nor token contain a breaker.
    """
    breakers = frozenset(params.dry_breaker_ids)
    reach = 0
    while reach < min(DRY_REACH, len(tokens)) and tokens[-1 - reach] not in breakers:
        reach += 1
    text = np.array(tokens[-DRY_WINDOW:], dtype=np.int64)
    last = len(text) - 1
    lengths = np.zeros(last, dtype=np.int64)  # of the earlier runs that end at each place
    alike = np.ones(last, dtype=bool)
    for n in range(min(reach, last)):
        alike[:n] = False
        alike[n:] &= text[: last - n] == text[last - n]
        if not alike.any():
            break
        lengths += alike
    ends = np.flatnonzero(lengths >= max(1, params.dry_allowed_length))
    following, which = np.unique(text[ends + 1], return_inverse=True)
    longest = np.zeros(len(following), dtype=np.int64)
    np.maximum.at(longest, which, lengths[ends])
    growth = {
        token: min(_power(params.dry_base, n - params.dry_allowed_length), DRY_MOST)
        for token, n in zip(following.tolist(), longest.tolist(), strict=True)
        if token not in breakers
    }
    return {token: min(params.dry_multiplier * factor, DRY_MOST) for token, factor in growth.items()}


def _power(base: float, exponent: int) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return DRY_MOST
