"""The CUDA text of the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

HEADERS = {
    "linear": (
        "ptx.cuh",
        "async.cuh",
        "plain.cuh",
        "block32.cuh",
        "kquant.cuh",
        "weight.cuh",
        "tiles.cuh",
        "operand.cuh",
        "act.cuh",
        "flow.cuh",
        "activated.cuh",
    ),
    "ops": ("ptx.cuh", "async.cuh", "act.cuh", "flow.cuh", "decode.cuh"),
}


@dataclass(frozen=True)
class Source:
    """A file of `folder`, compiled with `options`; it may include the folder's headers by name."""

    folder: str
    file: str
    options: tuple[str, ...] = ()
    wgmma_tokens: int = 0  # columns of the generated wgmma.cuh; 0: there is none

    @property
    def text(self) -> str:
        return read(self.folder, self.file)

    @property
    def headers(self) -> Mapping[str, str]:
        found = {name: _header(name) for name in HEADERS[self.folder]}
        if self.wgmma_tokens:
            found["wgmma.cuh"] = wgmma(self.wgmma_tokens)
        return MappingProxyType(found)


def defined(**values: object) -> tuple[str, ...]:
    """Options that define macros."""
    return tuple(f"-D{name}={value}" for name, value in values.items())


@lru_cache(maxsize=32)
def read(folder: str, name: str) -> str:
    return (files("worker_orcd.kernels") / folder / name).read_text()


def _header(name: str) -> str:
    return read("ops" if name in ("flow.cuh", "decode.cuh") else "linear", name)


def wgmma(tokens: int) -> str:
    """wgmma m64 n`tokens` k16: A from registers, B from shared memory (K-major), float32 sums.

    What `d` held is forgotten unless `adds`.
    """
    count = tokens // 2
    sums = ",".join(f"%{i}" for i in range(count))
    outputs = ",".join(f'"+f"(d[{i}])' for i in range(count))
    a = ",".join(f"%{count + i}" for i in range(4))
    return f"""#pragma once
DEVICE void wgmma(float* d, const u32* a, u64 b, u32 adds) {{
  asm volatile("{{.reg .pred P; setp.ne.b32 P,%{count + 5},0;"
    "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16 {{{sums}}},{{{a}}},%{count + 4},P,1,1,0;}}"
    : {outputs} : "r"(a[0]),"r"(a[1]),"r"(a[2]),"r"(a[3]),"l"(b),"r"(adds));
}}
"""
