"""Launching what stands between the matmuls: residual and norm, rotation, activation; rows.cu says what they compute.

Sums come as (slices f32 [S, T, N], bias f32 [N] or None) side by side. An image is an operand in the order matmuls
read it: bf16 [pieces of 64 inputs, groups, 8 tokens, 64], for the fewest groups of 8 tokens that every variant takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.source import Source, defined

MAX_GRID_Y = 65_535
MAX_PARTS = 3
MAX_HEAD_DIM = 512
NORM_THREADS, ROW_THREADS, HEADS_PER_BLOCK = 512, 64, 4  # of rows.cu
WIDEST_NORM = 2**16
KV_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 17}

Norm = tuple[Tensor, Tensor | None, float]  # weight, bias, eps
Activation = Literal["silu", "gelu", "gelu_tanh", "clamped"]


class Part(NamedTuple):
    """Outputs of one matrix: slices f32 [S, T, N], to be added in order, and then the bias."""

    slices: Tensor
    bias: Tensor | None = None  # f32 [N], or [E N] with `experts`
    experts: Tensor | None = None  # i32 [T]: whose bias each row takes; negative: the row is padding


class _Part(ctypes.Structure):
    _fields_ = (
        ("slices", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        ("width", ctypes.c_int),
        ("count", ctypes.c_int),
    )


class _Sums(ctypes.Structure):
    _fields_ = (("part", _Part * MAX_PARTS),)


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


def image_shape(num_rows: int, width: int) -> tuple[int, int, int, int]:
    """Inputs are padded with zeros to whole tiles; groups are what the widest variant for so many rows takes."""
    groups = next((g for g in (1, 2, 4, 8, 16) if num_rows <= 8 * g), -(-num_rows // 256) * 32)
    return -(-width // 256) * 4, groups, 8, 64


class Ops:
    """The kernels of rows.cu on one GPU. Everything is checked before a launch; ValueError says what is wrong."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def add_norm(self, x: Tensor, y: Part | None, norm: Norm | None, after: Norm | None = None, factor: float = 1.0
                 ) -> Tensor | None:  # fmt: skip
        """x [T, K] += after(y) · factor, in place; → the image of norm(x), if asked for."""
        num_rows, width = x.shape
        self._gpu.require(x)
        if not 0 < width <= WIDEST_NORM or width % 4:
            raise ValueError(f"rows of {width} numbers: a multiple of 4 up to {WIDEST_NORM} is needed")
        image = None if norm is None else self.image(num_rows, width)
        groups = 0 if image is None else image.shape[1]
        args: list[Argument] = [x, self.part(y, num_rows, width), self._norm(after, width), float(factor)]
        args += [self._norm(norm, width), image, num_rows, groups]
        source = Source("ops", "rows.cu", defined(WIDTH=width))
        self._gpu.launch(source, "add_norm", Work((num_rows, 1, 1), NORM_THREADS), args)
        return image

    def rope_store(
        self, qkv: Sequence[Part], heads: tuple[int, int, int], norms: tuple[Norm | None, Norm | None],
        cache: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor], interleaved: bool,
    ) -> Tensor:  # fmt: skip
        """heads: Hq, Hk, D; at: positions, slots i64 [T]; table: cos, sin f32 [context, half] → q [T, Hq, D]."""
        num_heads, num_kv_heads, dim = heads
        num_rows, half = len(at[0]), table[0].shape[1]
        self._gpu.require(*table)
        self._gpu.require(*at, dtype=torch.int64)
        if dim % 2 or not 0 < dim <= MAX_HEAD_DIM or 2 * half > dim or table[0].shape != table[1].shape:
            raise ValueError(f"heads of {dim} numbers, of which {2 * half} rotate, cannot be taken")
        if len(at[1]) != num_rows:
            raise ValueError(f"{num_rows} positions and {len(at[1])} slots")
        for side in cache:
            if side.shape[2:] != (num_kv_heads, dim) or side.dtype not in KV_BITS or side.dtype != cache[0].dtype:
                raise ValueError(f"a cache {side.dtype} {tuple(side.shape)} for {num_kv_heads} heads of {dim}")
            self._gpu.require(side, dtype=side.dtype)
        if cache[0].shape != cache[1].shape:
            raise ValueError(f"keys {tuple(cache[0].shape)} and values {tuple(cache[1].shape)} differ in size")
        q = torch.empty(num_rows, num_heads, dim, device=self._gpu.device)
        args: list[Argument] = [self.sums(qkv, num_rows, (num_heads + 2 * num_kv_heads) * dim)]
        args += [*(self._norm(norm, dim) for norm in norms), q, *cache, *table, *at]
        args += [num_rows, num_heads, num_kv_heads, half]
        options = defined(DIM=dim, KV_BITS=KV_BITS[cache[0].dtype], INTERLEAVED=int(interleaved))
        blocks = -(-(num_heads + 2 * num_kv_heads) // HEADS_PER_BLOCK)
        self.rows(Source("ops", "rows.cu", options), "rope_store", blocks, num_rows, HEADS_PER_BLOCK * 32, args)
        return q

    def activate(
        self, gate_up: Sequence[Part], width: int, kind: Activation = "silu", is_gated: bool = True
    ) -> Tensor:
        """The image of act(gate) · up, the first and the second `width` columns; not gated: of act(up)."""
        num_rows = gate_up[0].slices.shape[1]
        if width % 4 or len(gate_up) > 2 or (len(gate_up) == 2 and gate_up[0].slices.shape[2] != width):
            raise ValueError(f"gate and up of {width} numbers in parts of {[p.slices.shape[2] for p in gate_up]}")
        if kind == "clamped" and not is_gated:
            raise ValueError("the clamped activation has a gate")
        image = self.image(num_rows, width)
        sums = self.sums(gate_up, num_rows, (1 + is_gated) * width)
        source = Source("ops", "rows.cu", defined(ACTIVATION=kind.upper(), GATED=int(is_gated)))
        args: list[Argument] = [sums, image, width, num_rows, image.shape[1]]
        self.rows(source, "activate", -(-width // 256), num_rows, ROW_THREADS, args)
        return image

    def gather_rows(self, tiles: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """Rows of a matrix in tiles u8 [strips, depth, tile bytes], as stored: i64 [T] → u8 [T, depth, bytes].

        places i32 [16, bits of a row in a tile]: where in the tile each bit lies.
        """
        (_, depth, tile_bytes), row_bytes = tiles.shape, places.shape[1] // 8
        if depth * row_bytes >= 2**31:
            raise ValueError(f"rows of {depth * row_bytes} bytes; at most {2**31 - 1} are possible")
        self._gpu.require(tiles, dtype=torch.uint8)
        self._gpu.require(places, dtype=torch.int32)
        self._gpu.require(rows, dtype=torch.int64)
        if places.shape != (16, tile_bytes // 2):
            raise ValueError(f"places {tuple(places.shape)} for tiles of {tile_bytes} bytes")
        out = torch.empty(len(rows), depth, row_bytes, dtype=torch.uint8, device=self._gpu.device)
        args: list[Argument] = [tiles, places, rows, out, depth, tile_bytes, row_bytes]
        self.rows(PLAIN, "gather_rows", -(-depth * row_bytes // 64), len(rows), 64, args)
        return out

    def to_image(self, x: Tensor) -> Tensor:
        """x [T, K] as an image."""
        num_rows, width = x.shape
        self._gpu.require(x)
        image = self.image(num_rows, width)
        self.rows(PLAIN, "to_image", -(-width // 256), num_rows, ROW_THREADS, [x, image, width, image.shape[1]])
        return image

    def total(self, sums: Sequence[Part]) -> Tensor:
        """The sums added up: f32 [T, N]."""
        num_rows, width = sums[0].slices.shape[1], sum(part.slices.shape[2] for part in sums)
        y = torch.empty(num_rows, width, device=self._gpu.device)
        self.rows(
            PLAIN, "total", -(-width // 256), num_rows, 256, [self.sums(sums, num_rows, width), y, num_rows, width]
        )
        return y

    def rows(self, source: Source, name: str, blocks: int, num_rows: int, threads: int, args: list[Argument]) -> None:
        if num_rows > MAX_GRID_Y:
            raise ValueError(f"{num_rows} rows in a step; at most {MAX_GRID_Y} are possible")
        self._gpu.launch(source, name, Work((blocks, num_rows, 1), threads), args)

    def image(self, num_rows: int, width: int, zeroed: bool = False) -> Tensor:
        """Room for one; zeroed for who does not write the inputs that pad it."""
        make = torch.zeros if zeroed and width % 256 else torch.empty
        return make(image_shape(num_rows, width), dtype=torch.bfloat16, device=self._gpu.device)

    def sums(self, parts: Sequence[Part], num_rows: int, width: int) -> ctypes.Structure:
        if not 0 < len(parts) <= MAX_PARTS or sum(part.slices.shape[2] for part in parts) != width:
            raise ValueError(f"{width} columns are needed, not parts of {[part.slices.shape[2] for part in parts]}")
        found = _Sums()
        for i, part in enumerate(parts):
            found.part[i] = self.part(part, num_rows, part.slices.shape[2])
        return found

    def part(self, part: Part | None, num_rows: int, width: int) -> ctypes.Structure:
        if part is None:
            return _Part()
        slices, bias, experts = part
        self._gpu.require(slices)
        if slices.shape[1:] != (num_rows, width):
            raise ValueError(f"sums {tuple(slices.shape)} are not [S, {num_rows}, {width}]")
        if bias is not None:
            self._gpu.require(bias)
            if bias.ndim != 1 or (bias.shape[0] != width if experts is None else bias.shape[0] % width):
                raise ValueError(f"the bias must be float32 [{width}], not {tuple(bias.shape)}")
        if experts is not None:
            self._gpu.require(experts, dtype=torch.int32)
            if experts.shape != (num_rows,):
                raise ValueError(f"{tuple(experts.shape)} experts for {num_rows} rows")
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in part)
        return _Part(*pointers, width, len(slices))

    def _norm(self, norm: Norm | None, width: int) -> _Norm:
        if norm is None:
            return _Norm()
        weight, bias, eps = norm
        for vector in (weight, bias):
            if vector is not None:
                if vector.shape != (width,):
                    raise ValueError(f"a norm of rows of {width} numbers has a weight {tuple(vector.shape)}")
                self._gpu.require(vector)
        return _Norm(weight.data_ptr(), None if bias is None else bias.data_ptr(), eps)


PLAIN = Source("ops", "rows.cu", defined(PLAIN=1))
