"""Launching norm, rotation and activation; shapes as in `backends.base`, bits of a row its own."""

from __future__ import annotations

import struct
from functools import lru_cache
from importlib.resources import files

import torch
from torch import Tensor

from worker_orcd.kernels.driver import Argument, Kernel
from worker_orcd.kernels.nvrtc import architecture, cubin

BLOCK = 256  # threads, of rows.cu
MAX_GRID_Y = 65_535
KV_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 17}


class Ops:
    """The kernels of ops/ on one device, compiled as they are first needed."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._arch = architecture(torch.cuda.get_device_capability(device))
        self._kernels: dict[tuple[str, ...], Kernel] = {}

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        k = x.shape[-1]
        self._check(x, weight)
        if weight.shape != (k,):
            raise ValueError(f"the norm's weight has shape {tuple(weight.shape)}, rows have {k} elements")
        y = torch.empty_like(x)
        if x.numel():
            self._launch("rms_norm", (x.numel() // k, 1, 1), [x, weight, y, k, _bits(eps)])
        return y

    def silu_times(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up [T, F], rows the same distance apart → [T, F] contiguous."""
        num_rows, width = gate.shape
        if gate.stride() != up.stride() or gate.stride(1) != 1:
            gate, up = gate.contiguous(), up.contiguous()
        if gate.shape != up.shape:
            raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
        y = torch.empty(num_rows, width, dtype=torch.float32, device=gate.device)
        for start in range(0, num_rows, MAX_GRID_Y):
            rows = slice(start, start + MAX_GRID_Y)
            part = y[rows]
            grid = (-(-width // BLOCK), len(part), 1)
            self._launch("silu_times", grid, [gate[rows], up[rows], part, width, gate.stride(0)])
        return y

    def rope_store(
        self, qkv: tuple[Tensor, Tensor, Tensor], cache: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor],
        table: tuple[Tensor, Tensor], interleaved: bool,
    ) -> Tensor:  # fmt: skip
        """`at`: positions and slots i64 [T]; `table`: cos and sin f32 [context, half]; → rotated q."""
        q, k, v = (part.contiguous() for part in qkv)
        num_rows, num_heads, dim = q.shape
        self._check(q, k, v, *table)
        if k.shape != v.shape or k.shape[2] != dim or cache[0].shape[2:] != k.shape[1:]:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, cache {tuple(cache[0].shape)} do not match")
        out = torch.empty_like(q)
        if num_rows:
            args: list[Argument] = [q, k, v, out, *cache, *table, *at]
            args += [num_heads, k.shape[1], dim, table[0].shape[1], int(interleaved)]
            grid = (num_rows, num_heads + 2 * k.shape[1], 1)
            self._launch("rope_store", grid, args, (_kv_option(cache[0]),))
        return out

    def _launch(
        self, name: str, grid: tuple[int, int, int], args: list[Argument], options: tuple[str, ...] = ()
    ) -> None:
        kernel = self._kernels.get((name, *options))
        if kernel is None:
            code = cubin(_text("rows.cu"), {}, options, self._arch)
            kernel = self._kernels[name, *options] = Kernel(code, name, 0, self._index)
        kernel(grid, BLOCK, args, torch.cuda.current_stream(self._index).cuda_stream)

    def _check(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(f"float32 and contiguous is needed, not {tensor.dtype} {tensor.stride()}")
            if (tensor.device.type, tensor.device.index) != ("cuda", self._index):
                raise ValueError(f"a tensor lies on {tensor.device}, not on cuda:{self._index}")


@lru_cache(maxsize=4)
def _text(name: str) -> str:
    return (files("worker_orcd.kernels.ops") / name).read_text()


def _kv_option(cache: Tensor) -> str:
    if cache.dtype not in KV_BITS or not cache.is_contiguous():
        raise ValueError(f"a cache must be contiguous and float32, float16 or bfloat16, not {cache.dtype}")
    return f"-DKV_BITS={KV_BITS[cache.dtype]}"


def _bits(value: float) -> int:
    """A float32 as the int32 of the same bits: arguments of kernels are pointers and ints."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
