"""Launching a mixture of experts: each row's experts, and products of rows with the matrices of their own.

Pairs (row, slot) get places, expert by expert, each expert's from a multiple of `unit` rows; the grouped matmul takes
a unit at a time. Shapes depend on the number of rows alone, never on where the router sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.linear.linear import TiledMatrix, kernel_of
from worker_orcd.kernels.linear.plan import FewTokens
from worker_orcd.kernels.ops.ops import MAX_GRID_Y, ROW_THREADS, Ops, Part
from worker_orcd.kernels.source import Source, defined

MAX_EXPERTS, MAX_USED = 256, 16
ARRANGE_THREADS = 1024


@dataclass(frozen=True)
class Routing:
    """Where the rows go."""

    weights: Tensor  # f32 [T, used]
    places: Tensor  # i32 [T used], the place of each pair
    experts: Tensor  # i32 [P], whose place it is, or -1
    owners: Tensor  # i32 [P / unit]
    unit: int
    num_experts: int
    source: Source

    @property
    def num_places(self) -> int:
        return len(self.experts)


class ExpertOps:
    def __init__(self, gpu: Gpu, ops: Ops) -> None:
        self._gpu, self._ops = gpu, ops

    def route(self, scores: Sequence[Part], num_experts: int, num_used: int, over_chosen: bool) -> Routing:
        """Sums [T, E] → the best `num_used` of each row; weights are a softmax over those, or over all."""
        if not 0 < num_used <= min(num_experts, MAX_USED) or num_experts > MAX_EXPERTS:
            raise ValueError(f"{num_used} of {num_experts} experts; at most {MAX_USED} of {MAX_EXPERTS} are possible")
        num_rows, device = scores[0].slices.shape[1], self._gpu.device
        source = Source("ops", "rows.cu", defined(EXPERTS=num_experts, USED=num_used))
        pairs = num_rows * num_used
        if pairs > MAX_GRID_Y:
            raise ValueError(
                f"{num_rows} rows take {num_used} experts each, {pairs} places; at most {MAX_GRID_Y} fit"
            )
        unit = unit_rows(pairs, num_experts)
        num_units = pairs // unit + min(num_experts, pairs)
        chosen, places = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
        weights = torch.empty(num_rows, num_used, device=device)
        experts = torch.empty(num_units * unit, dtype=torch.int32, device=device)
        owners = torch.empty(num_units, dtype=torch.int32, device=device)
        args: list[Argument] = [self._ops.sums(scores, num_rows, num_experts), chosen, weights, num_rows]
        self._gpu.launch(source, "route", Work((num_rows, 1, 1), 32), [*args, int(over_chosen)])
        args = [chosen, places, experts, owners, pairs, num_units, unit]
        self._gpu.launch(source, "arrange", Work((int(num_rows > 0), 1, 1), ARRANGE_THREADS), args)
        return Routing(weights, places, experts, owners, unit, num_experts, source)

    def spread(self, image: Tensor, routing: Routing) -> Tensor:
        """The image of T rows → that of P places."""
        pieces, groups = image.shape[:2]
        self._gpu.require(image, dtype=torch.bfloat16)
        if image.shape[2:] != (8, 64) or groups * 8 < len(routing.weights):
            raise ValueError(f"an image {tuple(image.shape)} for {len(routing.weights)} rows")
        out = image.new_empty(pieces, routing.num_places // 8, 8, 64)
        args: list[Argument] = [image, out, routing.places, pieces * 8, groups, out.shape[1]]
        blocks, pairs = -(-pieces * 8 // ROW_THREADS), len(routing.places)
        self._ops.rows(routing.source, "spread", blocks, pairs, ROW_THREADS, args)
        return out

    def multiply(self, image: Tensor, matrix: TiledMatrix, bias: Tensor | None, routing: Routing) -> Part:
        """Each place times the matrix of its expert; `bias` [E N]."""
        n, depth = matrix.shape[0], matrix.tiles.shape[1]
        if image.shape[0] != -(-matrix.shape[1] // 256) * 4 or image.shape[1] * 8 < routing.num_places:
            raise ValueError(f"an image {tuple(image.shape)} for {routing.num_places} rows of {matrix.shape[1]}")
        if matrix.count != routing.num_experts or (bias is not None and bias.shape != (matrix.count * n,)):
            found = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"{matrix.count} matrices of {n} rows and a bias {found} for {routing.num_experts} experts"
            )
        self._gpu.require(image, dtype=torch.bfloat16)
        self._gpu.require(matrix.tiles, dtype=torch.uint8)
        slices, units, share = matrix.plan.slices, len(routing.owners), 1
        variant = FewTokens(routing.unit // 8, 8, 2, 1, early=False)
        while variant.groups > 1 and matrix.plan.shared_bytes(variant) > self._gpu.card.shared_bytes:
            variant, share = replace(variant, groups=variant.groups // 2), 2 * share
        out = torch.empty(slices, routing.num_places, n, device=self._gpu.device)
        shared = matrix.plan.shared_bytes(variant)
        most = max(1, 2 * self._gpu.num_sms // (slices * max(1, min(units, matrix.count))))
        blocks = min(most, -(-n // 16 // variant.warps))
        args: list[Argument] = [matrix.tiles, image, out, n, depth]
        args += [routing.num_places, image.shape[1], routing.owners, share]
        source, name = kernel_of(matrix.type, variant, grouped=True)
        work = Work((blocks, slices, units * share), variant.warps * 32, shared)
        self._gpu.launch(source, name, work, args)
        return Part(out, bias, routing.experts)

    def combine(self, given: Part, routing: Routing) -> Tensor:
        """What the places gave → rows f32 [T, N], slot by slot in order."""
        num_rows, width = routing.weights.shape[0], given.slices.shape[2]
        if width % 4:
            raise ValueError(f"rows of {width} numbers: a multiple of 4 is needed")
        y = torch.empty(num_rows, width, device=self._gpu.device)
        part = self._ops.part(given, routing.num_places, width)
        args: list[Argument] = [part, routing.places, routing.weights, y, routing.num_places]
        self._ops.rows(routing.source, "combine", -(-width // 256), num_rows, ROW_THREADS, args)
        return y


def unit_rows(pairs: int, num_experts: int) -> int:
    """Rows of an expert that are multiplied at a time: about as many as one has."""
    return next((unit for unit in (8, 16) if pairs <= unit * num_experts), 32)
