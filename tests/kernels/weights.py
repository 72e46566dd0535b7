"""Random matrices in every format, with scales as they are in real files."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import TiledMatrix, tiled
from worker_orcd.kernels.linear.plan import plan_linear
from worker_orcd.quant.format import format_of
from worker_orcd.quant.repack import pack

HALVES = {  # byte of each fp16 scale in a block → its range
    GgmlType.Q4_0: {0: (2e-3, 6e-3)},
    GgmlType.Q4_1: {0: (2e-3, 6e-3), 2: (-5e-2, -2e-2)},
    GgmlType.Q5_0: {0: (1e-3, 3e-3)},
    GgmlType.Q5_1: {0: (1e-3, 3e-3), 2: (-5e-2, -2e-2)},
    GgmlType.Q8_0: {0: (2e-4, 1e-3)},
    GgmlType.Q4_K: {0: (1e-4, 4e-4), 2: (5e-4, 3e-3)},
    GgmlType.Q5_K: {0: (5e-5, 2e-4), 2: (5e-4, 3e-3)},
    GgmlType.Q6_K: {208: (1e-5, 5e-5)},
}
PLAIN = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}


def random_raw(kind: GgmlType, n: int, k: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Stored bytes of a matrix [n, k], about N(0, 0.03²): u8 [n · row bytes]."""
    generator = torch.Generator(device).manual_seed(seed)
    if kind in PLAIN:
        numbers = torch.randn(n * k, generator=generator, device=device) * 0.03
        return numbers.to(PLAIN[kind]).view(torch.uint8)
    raw = torch.randint(
        0, 256, (n * k // kind.block_elems, kind.block_bytes), dtype=torch.uint8, generator=generator, device=device
    )
    for byte, (low, high) in HALVES.get(kind, {}).items():
        scale = torch.empty(len(raw), 1, device=device).uniform_(low, high, generator=generator)
        raw[:, byte : byte + 2] = scale.half().view(torch.uint8)
    if kind is GgmlType.MXFP4:
        raw[:, 0] = 119 + raw[:, 0] % 5
    return raw.flatten()


def dequantized(kind: GgmlType, raw: Tensor, n: int, k: int) -> Tensor:
    """f64 [n, k]."""
    return format_of(kind).dequantize(raw.view(-1, kind.block_bytes)).view(n, k).double()


def matrix_of(gpu: Gpu, kind: GgmlType, shape: tuple[int, int], slices: int, count: int = 1) -> TiledMatrix:
    """A random one, or several, one under the other, in so many slices."""
    n, k = shape
    raw = random_raw(kind, n * count, k, str(gpu.device))
    whole = tiled(pack(raw, kind, (n * count, k)), kind, shape, count)
    return replace(whole, plan=plan_linear(n, k, kind, slices))


def random(gpu: Gpu, *shape: int) -> Tensor:
    """The same numbers for a shape, always."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])).to(gpu.device)
