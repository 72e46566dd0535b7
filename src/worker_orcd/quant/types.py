"""Which tensor types can be run: what `plan` must know without waiting for torch."""

from __future__ import annotations

from worker_orcd.gguf.types import GgmlType

RUNNABLE: frozenset[GgmlType] = frozenset(
    {
        GgmlType.F32,
        GgmlType.F16,
        GgmlType.BF16,
        GgmlType.Q4_0,
        GgmlType.Q4_1,
        GgmlType.Q5_0,
        GgmlType.Q5_1,
        GgmlType.Q8_0,
        GgmlType.Q4_K,
        GgmlType.Q5_K,
        GgmlType.Q6_K,
        GgmlType.MXFP4,
    }
)
"""The keys of `quant.format.FORMATS`; a test holds them equal."""
