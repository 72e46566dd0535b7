"""Launching the matmuls: x [T, K] float32 times a matrix [N, K] in tiles → [T, N] float32.

A row's bits depend on that row, the matrix and its plan, not on T: slices of K are fixed per shape and format, qmm
and qgemm add in the same order, and mma.sync and wgmma give equal bits (`check_equal_bits` holds that on the card).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from worker_orcd.errors import CudaError
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.driver import Argument, Kernel, shared_bytes_per_block
from worker_orcd.kernels.linear import source
from worker_orcd.kernels.linear.plan import Card, FewTokens, LinearPlan, Variant, plan_linear
from worker_orcd.kernels.nvrtc import architecture, cubin
from worker_orcd.quant.tiles import TILE_K, tile_bytes, tile_grid

MAX_ROWS = 2**15  # of x in a call; a grid has at most 65,535 rows of blocks
ROWS_WITH_PARTIALS = 128  # rows for which slices write partial sums; more are taken in turns
MAX_COMPILERS = 8


@dataclass(frozen=True)
class TiledMatrix:
    """A matrix [N, K] in the tiles of `quant.repack`, with its plan."""

    type: GgmlType
    shape: tuple[int, int]
    tiles: Tensor  # u8 [strips, depth, tile bytes]
    plan: LinearPlan

    def __post_init__(self) -> None:
        expected = (*tile_grid(self.type, self.shape), tile_bytes(self.type))
        if tuple(self.tiles.shape) != expected or self.tiles.dtype != torch.uint8:
            raise ValueError(
                f"tiles of {self.type.name} {self.shape} must be u8 {expected}, "
                f"not {self.tiles.dtype} {tuple(self.tiles.shape)}"
            )
        if not self.tiles.is_contiguous() or self.tiles.data_ptr() % 16:
            raise ValueError("tiles must be contiguous and aligned to 16 bytes")
        if (self.plan.type, self.plan.shape) != (self.type, self.shape):
            raise ValueError(f"a plan of {self.plan.type.name} {self.plan.shape} for {self.type.name} {self.shape}")
        if not 1 <= self.plan.slices <= expected[1]:
            raise ValueError(f"{self.plan.slices} slices of a matrix with {expected[1]} tiles along K")


def tiled(tiles: Tensor, type: GgmlType, shape: tuple[int, int]) -> TiledMatrix:
    return TiledMatrix(type, shape, tiles, plan_linear(*shape, type))


class Linear:
    """The matmuls on one device, compiled as they are first needed."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._arch = architecture((properties.major, properties.minor))
        self.card = Card(properties.major == 9, shared_bytes_per_block(self._index))
        self._num_sms: int = properties.multi_processor_count
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._code: dict[tuple[GgmlType, Variant], Future[bytes]] = {}
        self._compilers = ThreadPoolExecutor(MAX_COMPILERS, "nvrtc")  # NVRTC lets go of the interpreter

    def __call__(self, x: Tensor, matrix: TiledMatrix, bias: Tensor | None = None) -> Tensor:
        """[T, K] → [T, N], plus `bias` [N]. Raises ValueError before a launch that cannot be right."""
        self._check(x, matrix, bias)
        y = torch.empty(x.shape[0], matrix.shape[0], dtype=torch.float32, device=x.device)
        step = MAX_ROWS if self.card.has_wgmma else ROWS_WITH_PARTIALS
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            self._rows(x[rows], matrix, bias, y[rows])
        return y

    def compile_ahead(self, matrix: TiledMatrix) -> None:
        """Begin to compile what `matrix` will need, on other threads."""
        for variant in matrix.plan.variants(self.card):
            self._compiled(matrix.type, variant)

    def variant(self, num_tokens: int, matrix: TiledMatrix) -> Variant:
        return matrix.plan.variant(num_tokens, self.card)

    def _rows(self, x: Tensor, matrix: TiledMatrix, bias: Tensor | None, y: Tensor) -> None:
        variant = self.variant(len(x), matrix)
        image = self.image(x, matrix, variant.groups)
        is_whole = matrix.plan.is_whole(variant)
        if is_whole and bias is None:
            self.multiply(image, matrix, variant, y)
            return
        count = 1 if is_whole else matrix.plan.slices
        part = torch.empty(count, *y.shape, dtype=torch.float32, device=y.device)
        self.multiply(image, matrix, variant, part)
        self._sum(part, bias, y)

    def image(self, x: Tensor, matrix: TiledMatrix, groups: int) -> Tensor:
        """x [T, K] in the order of the matmul, bf16, for a multiple of 8 · `groups` tokens."""
        num_tokens, k = x.shape
        chunks = tile_grid(matrix.type, matrix.shape)[1] * TILE_K[matrix.type] // 128
        num_groups = -(-num_tokens // (8 * groups)) * groups
        image = torch.empty(2 * chunks, num_groups, 8, 64, dtype=torch.bfloat16, device=x.device)
        grid = (-(-chunks * 16 // 128), 8 * num_groups, 1)
        self._small("x_image")(grid, 128, [x, image, num_tokens, k, num_groups, chunks], self._stream())
        return image

    def multiply(self, image: Tensor, matrix: TiledMatrix, variant: Variant, y: Tensor) -> None:
        """Write the slices' results [slices, T, N], or [T, N] where the variant adds them itself."""
        n, depth = matrix.shape[0], matrix.tiles.shape[1]
        num_tokens, num_groups = y.shape[-2], image.shape[1]
        turns = num_groups // variant.groups
        kernel = self.kernel(matrix, variant)
        args: list[Argument] = [matrix.tiles, image, y, n, depth, num_tokens, num_groups]
        slices = matrix.plan.slices
        if isinstance(variant, FewTokens):
            most = max(1, variant.ctas * self._num_sms // (slices * turns))
            blocks = min(most, -(-matrix.tiles.shape[0] // variant.warps))
            kernel((blocks, slices, turns), variant.warps * 32, args, self._stream())
        else:
            grid = (-(-n // (64 * variant.warpgroups)), 1 if variant.sequential else slices, turns)
            kernel(grid, variant.warpgroups * 128 + 128, [*args, slices], self._stream())

    def kernel(self, matrix: TiledMatrix, variant: Variant) -> Kernel:
        """The compiled variant for a matrix; qmm's shared memory follows the longest slice."""
        shared = matrix.plan.shared_bytes(variant)
        key = (matrix.type, variant, shared)
        if key not in self._kernels:
            name = source.kernel_text(variant)[0]
            code = self._compiled(matrix.type, variant).result()
            self._kernels[key] = Kernel(code, name, shared, self._index)
        return self._kernels[key]

    def _compiled(self, type: GgmlType, variant: Variant) -> Future[bytes]:
        if (type, variant) not in self._code:
            _, text, headers = source.kernel_text(variant)
            options = source.options(type, variant)
            self._code[type, variant] = self._compilers.submit(cubin, text, headers, options, self._arch)
        return self._code[type, variant]

    def _sum(self, part: Tensor, bias: Tensor | None, y: Tensor) -> None:
        slices, num_tokens, n = part.shape
        grid = (-(-n // 256), num_tokens, 1)
        self._small("sum_slices")(grid, 256, [part, bias, y, num_tokens, n, slices], self._stream())

    def _small(self, name: str) -> Kernel:
        if (name,) not in self._kernels:
            code = cubin(source.text("image.cu"), source.headers(), (), self._arch)
            self._kernels[(name,)] = Kernel(code, name, 0, self._index)
        return self._kernels[(name,)]

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._index).cuda_stream

    def _check(self, x: Tensor, matrix: TiledMatrix, bias: Tensor | None) -> None:
        n, k = matrix.shape
        if x.ndim != 2 or x.shape[1] != k or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"x must be float32 [T, {k}] and contiguous, not {x.dtype} {tuple(x.shape)}")
        if bias is not None and (bias.shape != (n,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
            raise ValueError(f"the bias must be float32 [{n}], not {bias.dtype} {tuple(bias.shape)}")
        for name, tensor in (("x", x), ("the matrix", matrix.tiles), ("the bias", bias)):
            if tensor is not None and (tensor.device.type, tensor.device.index) != ("cuda", self._index):
                raise ValueError(f"{name} lies on {tensor.device}, not on cuda:{self._index}")


def check_equal_bits(linear: Linear) -> None:
    """Raises CudaError unless few and many tokens give a row the same bits on this card: random codes, K = 4096."""
    generator = torch.Generator(linear.device).manual_seed(0)
    kind, shape = GgmlType.BF16, (128, 4096)
    x = torch.randn(33, shape[1], device=linear.device, generator=generator)
    numbers = torch.randn(*tile_grid(kind, shape), tile_bytes(kind) // 2, device=linear.device, generator=generator)
    matrix = tiled(numbers.bfloat16().view(torch.uint8), kind, shape)
    many = linear(x, matrix)
    for start in (0, 8, 25):
        if not torch.equal(linear(x[start : start + 8], matrix), many[start : start + 8]):
            raise CudaError(
                "this GPU adds products in another order for few tokens than for many, so results would depend on "
                "the batch; it cannot be used"
            )
