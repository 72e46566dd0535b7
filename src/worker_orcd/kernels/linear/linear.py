"""Launching the matmuls: an operand's image [T, K] times a matrix [N, K] in tiles → sums of K slices, float32.

A row's bits depend on that row, the matrix and its plan, not on T: slices of K are fixed per shape and format, qmm
and qgemm add in the same order, and mma.sync and wgmma give equal bits (`check_equal_bits` holds that on the card).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from worker_orcd.errors import CudaError
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.linear.plan import (
    SAMPLE_TOKENS,
    FewTokens,
    LinearPlan,
    Made,
    ManyTokens,
    Pair,
    Variant,
    even_share,
    plan_linear,
    plan_pair,
    ring,
)
from worker_orcd.kernels.ops.ops import Activation, Ops, Part, activate_source, image_shape
from worker_orcd.kernels.source import Source, defined
from worker_orcd.quant.tiles import TILE_ROWS, fits_half, packed_shape, strip_bytes, tile_grid

MAX_ROWS = 2**15  # of x in a call; a grid has at most 65,535 rows of blocks
MAX_SLICES = 65_535  # a grid's second axis
ROWS_WITH_PARTIALS = 128  # rows for which slices write partial sums; more are taken in turns
REGISTERS_PER_SM, PRODUCER_REGISTERS = 65_536, 24


@dataclass(frozen=True)
class TiledMatrix:
    """A matrix [N, K] in the tiles of `quant.repack`, with its plan; or several, one under the other."""

    type: GgmlType
    shape: tuple[int, int]
    tiles: Tensor  # u8 [strips, bytes of a strip]
    plan: LinearPlan
    count: int = 1

    def __post_init__(self) -> None:
        strips = tile_grid(self.type, self.shape)[0] * self.count
        expected = strips, strip_bytes(self.type, self.shape[1], self.has_half)
        if tuple(self.tiles.shape) != expected or self.tiles.dtype != torch.uint8:
            raise ValueError(
                f"tiles of {self.type.name} {self.shape} must be u8 {expected}, "
                f"not {self.tiles.dtype} {tuple(self.tiles.shape)}"
            )
        if not self.tiles.is_contiguous() or self.tiles.data_ptr() % 16:
            raise ValueError("tiles must be contiguous and aligned to 16 bytes")
        if (self.plan.type, self.plan.shape) != (self.type, self.shape):
            raise ValueError(f"a plan of {self.plan.type.name} {self.plan.shape} for {self.type.name} {self.shape}")
        if self.count > 1 and self.shape[0] % TILE_ROWS:
            raise ValueError(f"{self.count} matrices of {self.shape[0]} rows: a multiple of {TILE_ROWS} is needed")
        if not 1 <= self.plan.slices <= self.depth:
            raise ValueError(f"{self.plan.slices} slices of a matrix with {self.depth} tiles along K")
        if self.plan.slices > MAX_SLICES or self.depth * self.plan.slices >= 2**31:
            raise ValueError(
                f"{self.plan.slices} slices of {self.depth} tiles along K; at most {MAX_SLICES} are possible, "
                "and 2^31 of both multiplied"
            )

    @cached_property
    def depth(self) -> int:
        """Tiles along K."""
        return tile_grid(self.type, self.shape)[1]

    @cached_property
    def has_half(self) -> bool:
        """Whether the last of them is half a one, as the bytes say: it may have been packed with others."""
        k = self.shape[1]
        return fits_half(self.type, k) and self.tiles.shape[-1] == strip_bytes(self.type, k, has_half=True)


def tiled(tiles: Tensor, type: GgmlType, shape: tuple[int, int], count: int = 1) -> TiledMatrix:
    return TiledMatrix(type, shape, tiles, plan_linear(*shape, type), count)


class Linear:
    """The matmuls on one GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._ops = gpu, Ops(gpu)
        self._begun = set[tuple[LinearPlan, Activation]]()  # those whose kernels are being compiled
        self._begun_pairs = set[tuple[LinearPlan, LinearPlan]]()

    def __call__(self, image: Tensor, num_rows: int, matrix: TiledMatrix) -> Tensor:
        """An operand's image for `num_rows` rows → the sums of the slices, f32 [slices, T, N].

        Raises ValueError before a launch that cannot be right.
        """
        self._check(image, num_rows, matrix)
        step = MAX_ROWS if self._gpu.card.has_wgmma else ROWS_WITH_PARTIALS
        if num_rows > step:
            return self._in_turns(image, num_rows, matrix, step)
        variant = matrix.plan.variant(num_rows, self._gpu.card)
        count = 1 if matrix.plan.is_whole(variant) else matrix.plan.slices
        out = torch.empty(count, num_rows, matrix.shape[0], device=self._gpu.device)
        if num_rows:
            self.multiply(image, matrix, variant, out)
        return out

    def pair(self, image: Tensor, num_rows: int, first: TiledMatrix, second: TiledMatrix) -> tuple[Tensor, Tensor]:
        """The sums of two matrices, each as a call of its own gives them; few rows take one launch where they can.

        Raises ValueError as a call does.
        """
        pair = self._pair(first, second, num_rows)
        if pair is None or first.has_half != second.has_half:
            return self(image, num_rows, first), self(image, num_rows, second)
        self._begin_pairs(first, second)
        self._check(image, num_rows, first)
        self._check(image, num_rows, second)
        variant, args, outs, blocks = pair.variant, list[Argument](), list[Tensor](), 0
        for matrix, share in zip((first, second), pair.blocks, strict=True):
            n, slices = matrix.shape[0], matrix.plan.slices
            outs.append(torch.empty(slices, num_rows, n, device=self._gpu.device))
            args += [matrix.tiles, outs[-1], n, matrix.depth, slices, share]
            blocks += slices * share
        source, name = pair_kernel_of(first.type, second.type, variant, first.has_half)
        work = Work((blocks, 1, -(-num_rows // (8 * variant.groups))), variant.warps * 32, pair.shared_bytes)
        self._gpu.launch(source, name, work, [*args, image, num_rows, image.shape[1]])
        return outs[0], outs[1]

    def _pair(self, first: TiledMatrix, second: TiledMatrix, num_rows: int) -> Pair | None:
        return plan_pair(first.plan, second.plan, num_rows, self._gpu.card, self._gpu.num_sms)

    def _begin_pairs(self, first: TiledMatrix, second: TiledMatrix) -> None:
        """Begin to compile for all numbers of rows that take one launch."""
        if (key := (first.plan, second.plan)) in self._begun_pairs:
            return
        self._begun_pairs.add(key)
        for num_rows in SAMPLE_TOKENS:
            if pair := self._pair(first, second, num_rows):
                source, _ = pair_kernel_of(first.type, second.type, pair.variant, first.has_half)
                self._gpu.compile_ahead(source)

    def up(
        self, image: Tensor, num_rows: int, matrix: TiledMatrix, bias: Tensor | None, kind: Activation
    ) -> Tensor | None:
        """The image of act(gate) · up, N / 2 columns, for a matrix of gate above up; `bias` [N].

        None where that takes two launches: with few rows, and where slices leave partial sums. The same bits.
        """
        self._check(image, num_rows, matrix)
        variant = matrix.plan.activated(matrix.plan.variant(num_rows, self._gpu.card), kind)
        if variant is None or num_rows > MAX_ROWS:
            return None
        if (matrix.plan, kind) not in self._begun:  # others will come; to compile them then would hold up a step
            self._begun.add((matrix.plan, kind))
            for other in matrix.plan.variants(self._gpu.card):
                if found := matrix.plan.activated(other, kind):
                    self._gpu.compile_ahead(kernel_of(matrix.type, found, matrix.has_half)[0])
        return self.activated(image, num_rows, matrix, bias, variant)

    def activated(
        self, image: Tensor, num_rows: int, matrix: TiledMatrix, bias: Tensor | None, variant: ManyTokens
    ) -> Tensor:
        """As `up`, by a variant that has an activation."""
        if bias is not None:
            self._gpu.require(bias)
            if bias.shape != matrix.shape[:1]:
                raise ValueError(f"a bias {tuple(bias.shape)} for {matrix.shape[0]} rows of a matrix")
        out = image.new_empty(image_shape(num_rows, matrix.shape[0] // 2))
        self._multiply((image, image.shape[1]), num_rows, matrix, variant, out, [bias])
        return out

    def of_sums(
        self, gate_up: Sequence[Part], kind: Activation, is_gated: bool, matrix: TiledMatrix
    ) -> Tensor | None:
        """act(gate) · up times `matrix`, in one launch; the bits of a call with the image that Ops.activate makes.

        None where that takes two: with more than one row, which a block could not make in the time.
        """
        if gate_up[0].slices.shape[1] > 1:
            return None
        card, plan = self._gpu.card, matrix.plan
        variant = plan.making(plan.variant(1, card), made_of(gate_up, kind, is_gated), card)
        if variant is None:
            return None
        self._gpu.compile_ahead(activate_source(gate_up, kind, is_gated))  # what more rows will take
        out = torch.empty(plan.slices, 1, matrix.shape[0], device=self._gpu.device)
        self.multiply_sums(gate_up, matrix, variant, out)
        return out

    def multiply_sums(self, gate_up: Sequence[Part], matrix: TiledMatrix, variant: FewTokens, out: Tensor) -> None:
        """As `of_sums`, by a variant that makes its operand."""
        assert variant.made is not None
        made, width = variant.made, matrix.shape[1]
        sums = self._ops.gate_up(gate_up, width, made.activation, made.up_numbers > 0)
        self._gpu.require(matrix.tiles, dtype=torch.uint8)
        self._multiply((sums, width), out.shape[1], matrix, variant, out, [])

    def compile_ahead(self, matrix: TiledMatrix) -> None:
        """Begin to compile what `matrix` will need, on other threads."""
        for variant in matrix.plan.variants(self._gpu.card):
            self._gpu.compile_ahead(kernel_of(matrix.type, variant, matrix.has_half)[0])

    def _in_turns(self, image: Tensor, num_rows: int, matrix: TiledMatrix, step: int) -> Tensor:
        """Pieces of `step` rows, added up one by one: their partial sums would take too much room."""
        whole = torch.empty(1, num_rows, matrix.shape[0], device=self._gpu.device)
        for start in range(0, num_rows, step):
            rows = min(step, num_rows - start)
            groups = image_shape(rows, 1)[1]
            piece = image[:, start // 8 : start // 8 + groups].contiguous()
            part = self(piece, rows, matrix)
            total = part[0]
            for other in part[1:]:
                total = total + other
            whole[0, start : start + rows] = total
        return whole

    def multiply(self, image: Tensor, matrix: TiledMatrix, variant: Variant, out: Tensor) -> None:
        """Write the slices' results [slices, T, N], or [1, T, N] where the variant adds them itself."""
        self._multiply((image, image.shape[1]), out.shape[1], matrix, variant, out, [])

    def _multiply(
        self, operand: tuple[Argument, int], num_rows: int, matrix: TiledMatrix, variant: Variant, out: Tensor,
        more: list[Argument],
    ) -> None:  # fmt: skip
        """`operand`: an image and its groups, or what it is made of and its width. `more`: for an activation."""
        n, depth, slices = matrix.shape[0], matrix.depth, matrix.plan.slices
        turns = -(-num_rows // (8 * variant.groups))
        source, name = kernel_of(matrix.type, variant, matrix.has_half)
        shared = matrix.plan.shared_bytes(variant)  # qmm's follows the longest slice
        args: list[Argument] = [matrix.tiles, operand[0], out, n, depth, num_rows, operand[1]]
        if isinstance(variant, FewTokens):
            most = max(1, variant.ctas * self._gpu.num_sms // (slices * turns))
            grid = min(most, -(-matrix.tiles.shape[0] // variant.warps)), slices, turns
            shared = max(shared, even_share(prod(grid), self._gpu.num_sms, self._gpu.card))
            self._gpu.launch(source, name, Work(grid, variant.warps * 32, shared), args)
        else:
            grid = -(-n // (64 * variant.warpgroups)), 1 if variant.sequential else slices, turns
            work = Work(grid, variant.warpgroups * 128 + 128, shared)
            self._gpu.launch(source, name, work, [*args, slices, 0, *more])

    def _check(self, image: Tensor, num_rows: int, matrix: TiledMatrix) -> None:
        shape = image_shape(num_rows, matrix.shape[1])
        if tuple(image.shape) != shape:
            raise ValueError(f"the image of {num_rows} rows of {matrix.shape[1]} must be {shape}, not {image.shape}")
        self._gpu.require(image, dtype=torch.bfloat16)
        self._gpu.require(matrix.tiles, dtype=torch.uint8)


def consumer_registers(variant: ManyTokens) -> int:
    """Of a thread: what the producer's threads give up goes to the others."""
    threads = (variant.warpgroups + 1) * 128
    launched = min(255, REGISTERS_PER_SM // (variant.ctas * threads)) // 8 * 8  # as the compiler is told
    return min(240, (launched * threads - PRODUCER_REGISTERS * 128) // (variant.warpgroups * 128) // 8 * 8)


def made_of(gate_up: Sequence[Part], kind: Activation, is_gated: bool = True) -> Made:
    """An operand of these sums: of gate and up side by side in one part, or in two; not gated: of up alone."""
    numbers = [len(part.slices) + (part.bias is not None) for part in gate_up]
    return Made(kind, numbers[0], numbers[-1] if is_gated else 0)


@lru_cache(maxsize=1024)
def kernel_of(type: GgmlType, variant: Variant, has_half: bool = False, grouped: bool = False) -> tuple[Source, str]:
    """The source of a variant for a format, and the name of its function."""
    if isinstance(variant, ManyTokens):
        pieces, buffers = ring(type, variant)
        options = defined(
            FORMAT=type.name,
            HALF_END=int(has_half),
            TOKENS=variant.tokens,
            WARPGROUPS=variant.warpgroups,
            DEPTH=variant.depth,
            PIECES=pieces,
            STAGES=buffers,
            TILES_IN_SHARED=int(not variant.has_tiles_in_registers),
            SEQUENTIAL=int(variant.sequential),
            SHARED_SUMS=int(variant.has_shared_sums),
            CTAS=variant.ctas,
            GROUPED=int(grouped),
            CONSUMER_REGISTERS=consumer_registers(variant),
            PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        )
        if variant.activation:
            options += defined(ACTIVATION=variant.activation.upper())
        return Source("linear", "qgemm.cu", options, variant.tokens), "qgemm"
    options = defined(
        FORMAT=type.name,
        HALF_END=int(has_half),
        GROUPS=variant.groups,
        WARPS=variant.warps,
        DEPTH=variant.depth,
        LONG=int(variant.is_long),
        CTAS=variant.ctas,
        EARLY=int(variant.early),
        TILES_IN_SHARED=int(not variant.has_tiles_in_registers),
        GROUPED=int(grouped),
        MADE=int(variant.made is not None),
    )
    if made := variant.made:
        options += defined(ACTIVATION=made.activation.upper(), GATED=int(made.up_numbers > 0))
        options += defined(GATE_NUMBERS=made.gate_numbers, UP_NUMBERS=made.up_numbers)
    return Source("linear", "qmm.cu", options), "qmm"


@lru_cache(maxsize=1024)
def pair_kernel_of(
    first: GgmlType, second: GgmlType, variant: FewTokens, has_half: bool = False
) -> tuple[Source, str]:
    """The source for two formats, and the name of its function; both matrices end with half a tile, or neither."""
    source, _ = kernel_of(first, variant, has_half)
    return replace(source, options=(*source.options, *defined(SECOND=second.name))), "qmm_pair"


def check_equal_bits(linear: Linear, ops: Ops, device: torch.device) -> None:
    """Raises CudaError unless few and many tokens give a row the same bits on this card: random codes, K = 4096."""
    generator = torch.Generator(device).manual_seed(0)
    kind, shape = GgmlType.BF16, (128, 4096)
    x = torch.randn(33, shape[1], device=device, generator=generator)
    strips, size = packed_shape(kind, shape)
    numbers = torch.randn(strips, size // 2, device=device, generator=generator)
    matrix = tiled(numbers.bfloat16().view(torch.uint8), kind, shape)

    def product(rows: Tensor) -> Tensor:
        return ops.total([Part(linear(ops.to_image(rows), len(rows), matrix))])

    many = product(x)
    for start in (0, 8, 25):
        if not torch.equal(product(x[start : start + 8]), many[start : start + 8]):
            raise CudaError(
                "this GPU adds products in another order for few tokens than for many, so results would depend on "
                "the batch; it cannot be used"
            )
