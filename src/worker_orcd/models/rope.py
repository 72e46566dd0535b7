"""Angles of rotary position embedding (arXiv:2104.09864) and its stretchings for long contexts; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, log, pi
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile

Scaling = Literal["none", "linear", "longrope", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """One way to rotate. Hashable: layers that rotate alike share their tables."""

    base: float
    dim: int  # of the dimensions of a head that rotate; 0: none
    scaling: Scaling = "none"
    factor: float = 1.0  # linear: positions are divided by it; yarn: those of slow pairs are
    original_context: int = 0  # longrope: up to this context length the short factors hold; yarn: see `betas`
    attn_factor: float = 1.0  # multiplies cosines and sines
    betas: tuple[float, float] = (32.0, 1.0)  # yarn: turns over the original context of the last pair that is left
    # as it was, and of the first whose positions are divided by all of the factor
    is_rounded: bool = False  # yarn: these two are moved outwards to whole pairs


UNROTATED = RopeSpec(1.0, 0)
FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


def read_rope(gguf: GgufFile, dim: int, context_length: int, rounds_yarn: bool) -> RopeSpec:
    """A factor without a type means linear scaling; `rope.scale_linear` is its older name.

    Long and short factors are tensors, and mean the scaling of arXiv:2402.13753 with or without its name.
    """
    name = gguf.hparam("rope.scaling.type", str, "linear")
    older = gguf.hparam("rope.scale_linear", float, 1.0, min=1e-3, max=1e6)
    factor = gguf.hparam("rope.scaling.factor", float, older, min=1e-3, max=1e6)
    spec = RopeSpec(gguf.hparam("rope.freq_base", float, 10000.0, min=1.0, max=1e12), dim)
    if "rope_factors_long.weight" in gguf.tensors or name == "longrope":
        original = gguf.hparam("rope.scaling.original_context_length", int, context_length, min=1, max=2**31)
        attn_factor = gguf.hparam("rope.scaling.attn_factor", float, 1.0, min=1e-3, max=1e3)
        return RopeSpec(spec.base, dim, "longrope", 1.0, original, attn_factor)
    if name == "none" or (name == "linear" and factor == 1.0):
        return spec
    if name == "linear":
        return RopeSpec(spec.base, dim, "linear", factor)
    if name == "yarn":
        return _read_yarn(gguf, replace(spec, factor=factor, is_rounded=rounds_yarn), context_length)
    raise ModelLoadFailed(
        f"{gguf.architecture}.rope.scaling.type is {name[:64]!r}; none, linear, longrope and yarn are supported"
    )


def _read_yarn(gguf: GgufFile, spec: RopeSpec, context_length: int) -> RopeSpec:
    """Scores grow by (0.1 ln factor + 1)², for which cosines and sines of q and of k carry one root each.

    Models that were trained to scale their scores so themselves divide it out again: the log multiplier.
    """
    prefix = f"{gguf.architecture}.rope"
    fast = gguf.hparam("rope.scaling.yarn_beta_fast", float, 32.0, min=1e-3, max=1e6)
    slow = gguf.hparam("rope.scaling.yarn_beta_slow", float, 1.0, min=1e-3, max=1e6)
    if slow >= fast:
        raise ModelLoadFailed(f"{prefix}.scaling.yarn_beta_slow is {slow}, not below yarn_beta_fast, {fast}")
    if spec.base <= 1.0:
        raise ModelLoadFailed(f"{prefix}.freq_base is {spec.base}; yarn needs one above 1")
    growth, own = (
        0.1 * share * log(max(1.0, spec.factor)) + 1.0
        for share in (1.0, gguf.hparam("rope.scaling.yarn_log_multiplier", float, 0.0, min=0.0, max=1e3))
    )
    return replace(
        spec,
        scaling="yarn",
        original_context=gguf.hparam("rope.scaling.original_context_length", int, context_length, min=1, max=2**31),
        betas=(fast, slow),
        attn_factor=gguf.hparam("rope.scaling.attn_factor", float, 1.0, min=1e-3, max=1e3) * growth / own,
    )


def factors_name(spec: RopeSpec, context_length: int) -> str:
    """The tensor whose numbers divide the frequencies, for a worker whose sequences hold `context_length` tokens.

    One choice for the life of the worker, as elsewhere: to switch when a sequence outgrows the short factors would
    disagree with the keys already in its cache.
    """
    if spec.scaling != "longrope":
        return "rope_freqs.weight"
    return f"rope_factors_{'long' if context_length > spec.original_context else 'short'}.weight"


def rotation_table(
    spec: RopeSpec, factors: NDArray[np.float32] | None, context_length: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of every position p times the frequency of each pair: f32 [context, dim / 2] each.

    `factors` [dim / 2] divide the frequencies further: Llama 3's corrections, as its converter wrote them, or those
    of longrope. Computed in float64. Raises ModelLoadFailed when one of them is not a number above 0.
    """
    frequencies = _frequencies(spec)
    if factors is not None:
        if not (np.isfinite(factors).all() and (factors > 0.0).all()):
            raise ModelLoadFailed(f"tensor {factors_name(spec, context_length)} has factors that are not above 0")
        frequencies = frequencies / factors.astype(np.float64)
    angles = np.arange(context_length, dtype=np.float64)[:, None] * frequencies
    cos, sin = (spec.attn_factor * wave(angles) for wave in (np.cos, np.sin))
    return cos.astype(np.float32), sin.astype(np.float32)


def _frequencies(spec: RopeSpec) -> NDArray[np.float64]:
    """base^(-2i/dim) / factor of each pair i; yarn divides slow pairs only, by a ramp (arXiv:2309.00071)."""
    pairs = np.arange(spec.dim // 2, dtype=np.float64)
    frequencies = spec.base ** (-2.0 * pairs / max(1, spec.dim))
    if spec.scaling != "yarn":
        return np.asarray(frequencies / spec.factor)
    low, high = yarn_bounds(spec)
    share = np.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
    return np.asarray(frequencies * (1.0 - share + share / spec.factor))


def yarn_bounds(spec: RopeSpec) -> tuple[float, float]:
    """The pairs between which the ramp lies: those that turn `betas` times over the original context."""
    low, high = (
        spec.dim * log(spec.original_context / (turns * 2.0 * pi)) / (2.0 * log(spec.base)) for turns in spec.betas
    )
    if spec.is_rounded:
        low, high = floor(low), ceil(high)
    return max(low, 0.0), min(high, spec.dim - 1.0)
