"""The CUDA text of the matmuls, and the options of each variant."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.linear.plan import FewTokens, ManyTokens, Variant

HEADERS = ("ptx.cuh", "async.cuh", "plain.cuh", "block32.cuh", "kquant.cuh", "weight.cuh")
REGISTERS = {1: (216, 40), 2: (232, 40), 3: (152, 32), 4: (112, 24)}  # consumers', producer's; by warpgroups


@lru_cache(maxsize=16)
def text(name: str) -> str:
    return (files("worker_orcd.kernels.linear") / name).read_text()


def headers(tokens: int | None = None) -> Mapping[str, str]:
    """What a kernel may include; with the wgmma of `tokens` columns."""
    found = {name: text(name) for name in HEADERS}
    if tokens is not None:
        found["wgmma.cuh"] = wgmma(tokens)
    return MappingProxyType(found)


def options(type: GgmlType, variant: Variant) -> tuple[str, ...]:
    """Definitions that make `variant` of qmm.cu or qgemm.cu."""
    if isinstance(variant, FewTokens):
        values = {
            "GROUPS": variant.groups,
            "WARPS": variant.warps,
            "DEPTH": variant.depth,
            "CTAS": variant.ctas,
            "EARLY": int(variant.early),
        }
    else:
        consumer, producer = REGISTERS[variant.warpgroups]
        values = {
            "TOKENS": variant.tokens,
            "WARPGROUPS": variant.warpgroups,
            "DEPTH": variant.depth,
            "STAGES": variant.stages,
            "SEQUENTIAL": int(variant.sequential),
            "CONSUMER_REGISTERS": consumer,
            "PRODUCER_REGISTERS": producer,
        }
    return (f"-DFORMAT={type.name}", *(f"-D{name}={value}" for name, value in values.items()))


def kernel_text(variant: Variant) -> tuple[str, str, Mapping[str, str]]:
    """Name of the function, its source, its headers."""
    if isinstance(variant, ManyTokens):
        return "qgemm", text("qgemm.cu"), headers(variant.tokens)
    return "qmm", text("qmm.cu"), headers()


def wgmma(tokens: int) -> str:
    """wgmma m64 n`tokens` k16: A from registers, B from shared memory (K-major), float32 sums. Always adds."""
    count = tokens // 2
    sums = ",".join(f"%{i}" for i in range(count))
    outputs = ",".join(f'"+f"(d[{i}])' for i in range(count))
    a = ",".join(f"%{count + i}" for i in range(4))
    return f"""#pragma once
DEVICE void wgmma(float* d, const u32* a, u64 b) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16 {{{sums}}},{{{a}}},%{count + 4},1,1,1,0;"
    : {outputs} : "r"(a[0]),"r"(a[1]),"r"(a[2]),"r"(a[3]),"l"(b));
}}
"""
