"""Launching what stands between the matmuls: residual and norm, rotation, activation; rows.cu says what they compute.

Sums come as (slices f32 [S, T, N], bias f32 [N] or None) side by side. An image is an operand in the order matmuls
read it: bf16 [pieces of 64 inputs, groups, 8 tokens, 64], for the fewest groups of 8 tokens that every variant takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.linear.plan import MAX_DIMENSION
from worker_orcd.kernels.source import Source, defined
from worker_orcd.quant.tiles import TILE_K, ends_with_half, packed_shape, tile_bytes

MAX_GRID_Y = 65_535
MAX_PARTS = 3
MAX_HEAD_DIM = 512
ROW_THREADS, HEADS_PER_BLOCK = 64, 4  # of rows.cu
FEW_ROWS = 16
MOST_NORM_THREADS, MOST_NORM_BLOCKS = 512, 8  # more threads would leave each too few registers
WIDEST_NORM = 2**16
MOST_AHEAD, MOST_NORM_AHEAD = 8, 20  # slices fetched at once: what registers hold
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


@lru_cache(maxsize=4096)
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
        shape = norm_shape(width, self._gpu.card.has_clusters)
        ahead = slices_ahead([] if y is None else [y], MOST_NORM_AHEAD if width <= 4 * shape["BLOCK"] else MOST_AHEAD)
        blocks, threads = shape["CLUSTER"], shape["BLOCK"]
        has_bias = any(n is not None and n[1] is not None for n in (norm, after))
        source = rows_source(WIDTH=width, AHEAD=ahead, AFTER=int(after is not None), BIAS=int(has_bias), **shape)
        work = Work((num_rows * blocks, 1, 1), threads, 8 * blocks * threads // 32)  # two sets of a sum for each warp
        self._gpu.launch(source, "add_norm", work, args)
        return image

    def rope_store(
        self, qkv: Sequence[Part], heads: tuple[int, int, int], norms: tuple[Norm | None, Norm | None],
        cache: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor], interleaved: bool,
    ) -> Tensor:  # fmt: skip
        """heads: Hq, Hk, D; at: positions, slots i64 [T]; table: cos, sin f32 [context, half] → q [T, Hq, D]."""
        num_heads, num_kv_heads, dim = heads
        num_rows, half = at[0].shape[0], table[0].shape[1]
        self._gpu.require(*table)
        self._gpu.require(*at, dtype=torch.int64)
        if dim % 2 or not 0 < dim <= MAX_HEAD_DIM or 2 * half > dim or table[0].shape != table[1].shape:
            raise ValueError(f"heads of {dim} numbers, of which {2 * half} rotate, cannot be taken")
        if at[1].shape[0] != num_rows:
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
        source = rope_source(qkv, dim, cache[0].dtype, interleaved)
        blocks = -(-(num_heads + 2 * num_kv_heads) // HEADS_PER_BLOCK)
        self.rows(source, "rope_store", blocks, num_rows, HEADS_PER_BLOCK * 32, args)
        return q

    def activate(
        self, gate_up: Sequence[Part], width: int, kind: Activation = "silu", is_gated: bool = True,
        places: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The image of act(gate) · up, the first and the second `width` columns; not gated: of act(up).

        places i32: the rows that are wanted; others are left as they are.
        """
        num_rows, sums = gate_up[0].slices.shape[1], self.gate_up(gate_up, width, kind, is_gated)
        image = self.image(num_rows, width)
        source = activate_source(gate_up, kind, is_gated)
        wanted = num_rows
        if places is not None:
            self._gpu.require(places, dtype=torch.int32)
            wanted = len(places)
        threads = ROW_THREADS if wanted <= FEW_ROWS else 4 * ROW_THREADS  # few rows should still fill the card
        args: list[Argument] = [sums, image, places, width, num_rows, image.shape[1]]
        self.rows(source, "activate", -(-width // (4 * threads)), wanted, threads, args)
        return image

    def embed(
        self, tokens: Tensor, tiles: Tensor, type: GgmlType, shape: tuple[int, int], sampled: Tensor | None = None
    ) -> Tensor:
        """Rows of a matrix [N, K] in tiles, i64 [T] → f32 [T, K], the format's own values; NaN for rows it lacks.

        A token -1 - r is that of `sampled` i64 [r].
        """
        width, expected = shape[1], packed_shape(type, shape)
        self._gpu.require(tiles, dtype=torch.uint8)
        self._gpu.require(tokens, dtype=torch.int64)
        if tuple(tiles.shape) != expected:
            raise ValueError(f"tiles of {type.name} {shape} must be {expected}, not {tuple(tiles.shape)}")
        if tokens.ndim != 1 or width % 4 or max(shape) > MAX_DIMENSION:
            raise ValueError(f"tokens {tuple(tokens.shape)} with rows of {shape}: one dimension, a multiple of 4")
        y = torch.empty(len(tokens), width, device=self._gpu.device)
        num_sampled = 0
        if sampled is not None:
            self._gpu.require(sampled, dtype=torch.int64)
            num_sampled = len(sampled)
        args: list[Argument] = [tiles, tokens, sampled, y, num_sampled, *shape]
        source = embed_source(type, ends_with_half(type, shape))
        self.rows(source, "embed", -(-width // 256), len(tokens), ROW_THREADS, args)
        return y

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

    def image(self, num_rows: int, width: int) -> Tensor:
        """Room for one; who fills it also writes the zeros that pad its inputs."""
        return torch.empty(image_shape(num_rows, width), dtype=torch.bfloat16, device=self._gpu.device)

    def gate_up(self, parts: Sequence[Part], width: int, kind: Activation, is_gated: bool) -> ctypes.Structure:
        """What an activation of `width` columns is made of, gate and up as a part each; not gated: up alone."""
        if width % 4 or len(parts) > 2 or (len(parts) == 2 and parts[0].slices.shape[2] != width):
            raise ValueError(f"gate and up of {width} numbers in parts of {[p.slices.shape[2] for p in parts]}")
        if kind == "clamped" and not is_gated:
            raise ValueError("the clamped activation has a gate")
        found = self.sums(parts, parts[0].slices.shape[1], (1 + is_gated) * width)
        if is_gated and len(parts) == 1:
            gate, (slices, bias, _) = found.part[0], parts[0]
            up = None if bias is None else bias[width:].data_ptr()
            found.part[1] = _Part(slices[:, :, width:].data_ptr(), up, gate.experts, gate.width, gate.count)
        return found

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
        return _Part(*pointers, width, slices.shape[0])

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


@lru_cache(maxsize=64)
def norm_shape(width: int, has_clusters: bool) -> dict[str, int]:
    """Blocks that share a row, and threads of a block: four numbers for each while there are enough threads."""
    padded = -(-width // 256) * 256
    most = MOST_NORM_BLOCKS if has_clusters else 1
    blocks = next((n for n in (1, 2, 4) if n <= most and padded <= n * 1024), most)
    return {"CLUSTER": blocks, "BLOCK": min(MOST_NORM_THREADS, -(-padded // (256 * blocks)) * 64)}


@lru_cache(maxsize=64)
def embed_source(type: GgmlType, has_half: bool) -> Source:
    options = defined(FORMAT=type.name, TILE_K=TILE_K[type], TILE_BYTES=tile_bytes(type), HALF_END=int(has_half))
    return Source("ops", "embed.cu", options)


def slices_ahead(parts: Sequence[Part], most: int = MOST_AHEAD) -> int:
    """How many slices a kernel fetches at once: all, while there are few; each number is a kernel of its own."""
    slices = max([part.slices.shape[0] for part in parts], default=1)
    return min(most, slices if slices > MOST_AHEAD else 1 << (slices - 1).bit_length())


def activate_source(gate_up: Sequence[Part], kind: Activation, is_gated: bool = True) -> Source:
    return rows_source(ACTIVATION=kind.upper(), GATED=int(is_gated), AHEAD=slices_ahead(gate_up))


def rope_source(qkv: Sequence[Part], head_dim: int, stored: torch.dtype, interleaved: bool) -> Source:
    ahead = slices_ahead(qkv)
    return rows_source(DIM=head_dim, KV_BITS=KV_BITS[stored], INTERLEAVED=int(interleaved), AHEAD=ahead)


@lru_cache(maxsize=256)
def rows_source(**options: object) -> Source:
    return Source("ops", "rows.cu", defined(**options))


PLAIN = rows_source(PLAIN=1)
