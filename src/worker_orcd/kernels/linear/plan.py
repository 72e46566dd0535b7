"""How a matrix is multiplied: slices of K, which decide the bits, and variants, which decide only the speed.

The slices are a pure function of shape and format, the same on every card and for every number of tokens, so a row's
result is too. The rules are what measurements on an H200 (132 multiprocessors) came to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Card
from worker_orcd.quant.tiles import TILE_K, tile_bytes, tile_grid

if TYPE_CHECKING:
    from worker_orcd.kernels.ops.ops import Activation

MULTIPROCESSORS = 132  # the slices are chosen for; a constant, so that they do not depend on the card
WARPS_PER_SM = 16  # strips times slices aimed at, per multiprocessor, with 128 registers a thread
MORE_WARPS_PER_SM = 20  # with 96
MOST_WARPS_PER_SM = 28  # with 72
MAX_DIMENSION = 2**31 - 256  # rounded up to whole tiles it is still an int
LONGEST_SLICE = 4096  # inputs; x of 8 tokens then takes 64 KiB of shared memory
FEW_TOKENS = 16  # up to here by mma.sync
SHORT_K = 8192  # inputs
DEEP_SLICE = 8  # tiles; x of a longer one leaves room for fewer blocks
MOST_AHEAD = {128: 3, 256: 1}  # tiles of so many inputs; of large ones one is enough, and takes the least code
SHORT_SLICE_BYTES = 52 * 128  # of tiles, which are asked for all at once or nearly: registers have them sooner
WIDE_STRIPS = 64
ENOUGH_BLOCKS = MULTIPROCESSORS // 2  # of qgemm to go through the slices one after the other
BLOCK_RESERVE = 1024  # bytes of shared memory that each block takes beyond its own
MOST_SHARED = 8  # blocks of a multiprocessor, beyond which no care is taken that all have as many
MOST_NUMBERS = 12  # of a column of an operand that is made: four columns of them are in registers
SAMPLE_TOKENS = (1, 16, *(2**i for i in range(5, 16)))  # numbers of tokens that meet every variant of a plan


@dataclass(frozen=True)
class Made:
    """An operand of one row that the blocks of qmm.cu make themselves: act(gate) · up of what a matmul left."""

    activation: Activation
    gate_numbers: int  # of each column that are added up: its slices, and a bias where there is one
    up_numbers: int  # 0: act(gate) alone

    @property
    def numbers(self) -> int:
        return self.gate_numbers + self.up_numbers


@dataclass(frozen=True)
class FewTokens:
    """A variant of qmm.cu: 8 · `groups` tokens a block of `warps`, `ctas` blocks on a multiprocessor."""

    groups: int
    warps: int
    depth: int  # tiles fetched ahead
    ctas: int
    early: bool  # the first tile is expanded before the kernel ahead has ended
    has_tiles_in_registers: bool = False  # else in shared memory
    is_long: bool = False  # for long slices: x is waited for tile by tile, and the loop is unrolled
    made: Made | None = None  # x, for one token; else it is copied from an image


@dataclass(frozen=True)
class ManyTokens:
    """A variant of qgemm.cu: `tokens` tokens and 64 · `warpgroups` rows a block."""

    tokens: int
    warpgroups: int
    depth: int
    stages: int  # buffers for x; what one holds is `ring`'s
    sequential: bool  # slices one after the other in a block; else side by side, with partial sums
    ctas: int = 1  # blocks on a multiprocessor
    activation: str = ""  # of gate above up: what leaves is the next matmul's image, not sums

    @property
    def groups(self) -> int:
        return self.tokens // 8

    @property
    def warps(self) -> int:
        """Of consumers."""
        return 4 * self.warpgroups

    @property
    def has_shared_sums(self) -> bool:
        """Whether registers cannot hold the sums of slices beside those of the slice at work, or others read them."""
        is_large = self.tokens > 128 or self.ctas > 1 or self.warpgroups > 2
        return self.sequential and (is_large or self.activation != "")

    @property
    def has_tiles_in_registers(self) -> bool:
        """As shared memory is full of x and sums."""
        return self.tokens * self.warpgroups >= 512 and self.has_shared_sums


Variant = FewTokens | ManyTokens


@dataclass(frozen=True)
class LinearPlan:
    """For a matrix [N, K] of a format: its slices, and the variant for any number of tokens."""

    type: GgmlType
    shape: tuple[int, int]
    slices: int

    @cached_property
    def longest_slice_tiles(self) -> int:
        depth = tile_grid(self.type, self.shape)[1]
        return max(depth * (s + 1) // self.slices - depth * s // self.slices for s in range(self.slices))

    def shared_bytes(self, variant: Variant) -> int:
        """Shared memory of a block."""
        tiles = 0 if variant.has_tiles_in_registers else variant.warps * variant.depth * tile_bytes(self.type)
        if isinstance(variant, ManyTokens):
            sums = 256 * variant.tokens * variant.warpgroups if variant.has_shared_sums else 0
            pieces, buffers = ring(self.type, variant)
            return 3072 + 128 * variant.tokens * pieces * buffers + sums + tiles
        inputs = self.longest_slice_tiles * TILE_K[self.type]
        if variant.made is not None:
            return 1024 + inputs * (2 + 4 * variant.made.numbers) + tiles
        return 1024 + inputs * 16 * variant.groups + tiles

    def is_whole(self, variant: Variant) -> bool:
        """Whether a variant leaves sums, not one partial sum a slice."""
        return self.slices == 1 or (isinstance(variant, ManyTokens) and variant.sequential)

    @lru_cache(maxsize=1024)  # noqa: B019 - plans are a few numbers each
    def activated(self, variant: Variant, kind: str) -> ManyTokens | None:
        """`variant` with the activation of gate above up at its end; None where that takes a launch of its own.

        Half of a block's rows are gate's, half up's. One slice is taken as slices are, one after the other.
        """
        if not isinstance(variant, ManyTokens) or not self.is_whole(variant):
            return None
        if variant.warpgroups % 2 or self.shape[0] % (64 * variant.warpgroups):
            return None
        if variant.tokens == 256:
            variant = replace(variant, depth=2, stages=3)
        return replace(variant, sequential=True, activation=kind)

    @lru_cache(maxsize=1024)  # noqa: B019
    def making(self, variant: Variant, made: Made, card: Card) -> FewTokens | None:
        """`variant` with an operand that it makes, for one token; None where there is no room for what that takes."""
        if not isinstance(variant, FewTokens) or variant.groups > 1 or made.numbers > MOST_NUMBERS:
            return None
        wanted = [replace(variant, made=made, ctas=ctas) for ctas in range(variant.ctas, 0, -1)]
        return next((variant for variant in wanted if self.fits(variant, card)), None)

    @lru_cache(maxsize=4096)  # noqa: B019
    def variant(self, num_tokens: int, card: Card) -> Variant:
        """Raises ValueError where x of a slice leaves no room for tiles; only slices asked for can be that long."""
        if card.has_wgmma and num_tokens > FEW_TOKENS:
            return self._many(num_tokens)
        most = 1 if num_tokens <= 8 else 2 if num_tokens <= 16 else 4
        wanted = (variant for groups in (4, 2, 1) if groups <= most for variant in self._few(groups))
        found = next((variant for variant in wanted if self.fits(variant, card)), None)
        if found is None:
            raise ValueError(f"{self.longest_slice_tiles} tiles a slice: no room in {card.shared_bytes} bytes")
        return found

    def fits(self, variant: Variant, card: Card) -> bool:
        """Whether a multiprocessor has shared memory for the blocks that are to be on it."""
        return variant.ctas * (self.shared_bytes(variant) + BLOCK_RESERVE) <= card.shared_bytes + BLOCK_RESERVE

    def variants(self, card: Card) -> set[Variant]:
        """All that `variant` gives."""
        return {self.variant(num_tokens, card) for num_tokens in SAMPLE_TOKENS}

    def _few(self, groups: int) -> list[FewTokens]:
        """In order of preference; shared memory may not have room for the first ones."""
        small = [FewTokens(groups, 8, 1, 1, early=False), FewTokens(groups, 4, 1, 1, early=False)]
        if groups == 4:
            return small
        if not self.is_quantized:
            return [FewTokens(groups, 8, 2, 1, early=False), *small]
        return [*self._wide(groups), *small]

    def _wide(self, groups: int) -> list[FewTokens]:
        per_sm, longest, most = self._per_sm, self.longest_slice_tiles, MOST_AHEAD[TILE_K[self.type]]
        if per_sm <= WARPS_PER_SM // 2 and longest > DEEP_SLICE:
            blocks = [(8, 2, 2), (8, 1, 2), (8, 2, 1)]
            return [FewTokens(groups, *block, early=True, is_long=True) for block in blocks]
        if per_sm <= WARPS_PER_SM and longest * tile_bytes(self.type) <= SHORT_SLICE_BYTES:
            depth = 1 if longest <= 2 else 2
            return [FewTokens(groups, 4, depth, 4, early=True, has_tiles_in_registers=True)]
        if per_sm <= MORE_WARPS_PER_SM:
            ctas = 4 if per_sm <= WARPS_PER_SM else 5
            blocks = [*((4, depth, ctas) for depth in range(min(longest, most), 0, -1)), (8, 1, 2)]
        elif per_sm <= MOST_WARPS_PER_SM:
            return [FewTokens(groups, 14, depth, 2, early=False) for depth in range(min(2, most), 0, -1)]
        else:
            blocks = [(8, 3, 2), (8, 2, 2), (16, 2, 1), (16, 1, 1)]
        return [FewTokens(groups, *block, early=True) for block in blocks]

    @property
    def is_quantized(self) -> bool:
        """Not of 16 or 32 bits a weight."""
        return tile_bytes(self.type) < 32 * 128

    @cached_property
    def _per_sm(self) -> float:
        """Strips of all slices, for each multiprocessor."""
        return tile_grid(self.type, self.shape)[0] * self.slices / MULTIPROCESSORS

    def _many(self, num_tokens: int) -> ManyTokens:
        tokens = next((t for t in (32, 64, 128) if num_tokens <= t), 256)
        if tile_bytes(self.type) >= 64 * 128:
            tokens = min(tokens, 64)
        if tokens == 256 and self.slices > 1 and not self._is_sequential(num_tokens, 256):
            tokens = self._narrow(num_tokens)
        sequential = self._is_sequential(num_tokens, tokens)
        if tokens <= 64 and self.is_quantized:
            return self._wave(num_tokens, tokens, sequential)
        if tokens == 256:
            return ManyTokens(256, 2, 2, 3, sequential) if sequential else ManyTokens(256, 2, 1, 4, sequential)
        return ManyTokens(tokens, 2, 2 if self.is_quantized else 1, {32: 6, 64: 4}.get(tokens, 6), sequential)

    def _wave(self, num_tokens: int, tokens: int, sequential: bool) -> ManyTokens:
        """By 32 or 64 tokens: blocks as wide as let the busiest multiprocessor end first.

        As measured, a wave of blocks, one on each multiprocessor, takes as long as a block has warpgroups and half a
        one more: a single wave of wide blocks that fills the card is best. Gate above up needs an even number, and is
        among what leaves no partial sums.
        """
        is_whole = sequential or self.slices == 1
        columns = -(-num_tokens // tokens) * (1 if is_whole else self.slices)

        def time(warpgroups: int) -> float:
            blocks = -(-self.shape[0] // (64 * warpgroups)) * columns
            return -(-blocks // MULTIPROCESSORS) * (warpgroups + 0.5)

        warpgroups = min((4, 2) if is_whole else (4, 3, 2, 1), key=time)
        depth, stages = 2 if TILE_K[self.type] == 128 else 1, 6 if tokens == 32 else 4
        return ManyTokens(tokens, warpgroups, depth, stages, sequential)

    def _narrow(self, num_tokens: int) -> int:
        """Tokens of a block for a matrix of few rows: short slices are better taken in turn, by fewer tokens."""
        if self._is_sequential(num_tokens, 128):
            return 128
        is_short = self.shape[1] <= SHORT_K and self._is_sequential(num_tokens, 64)
        return 64 if is_short else 256 if num_tokens <= 256 and self.longest_slice_tiles > 2 else 128

    def _blocks(self, num_tokens: int, tokens: int) -> int:
        return -(-self.shape[0] // 128) * -(-num_tokens // tokens)

    def _is_sequential(self, num_tokens: int, tokens: int) -> bool:
        return self.slices > 1 and self._blocks(num_tokens, tokens) >= ENOUGH_BLOCKS


def ring(type: GgmlType, variant: ManyTokens) -> tuple[int, int]:
    """Of qgemm's buffers for x: how many pieces of 64 inputs one holds, and how many there are.

    Few tokens take the matrix unit so little time that a barrier for each piece would be felt, most where few
    instructions expand a tile. No tile's pieces lie in two buffers.
    """
    if variant.tokens > 64:
        return 1, variant.stages
    if variant.tokens <= 32 and TILE_K[type] == 128:
        return 4, max(2, -(-variant.stages // 2))
    return 2, variant.stages


def plan_linear(n: int, k: int, type: GgmlType, slices: int | None = None) -> LinearPlan:
    """The plan for a matrix [n, k]; a benchmark may ask for other `slices`. Raises ValueError for a bad shape."""
    if min(n, k) < 1 or max(n, k) > MAX_DIMENSION:
        raise ValueError(f"a matrix of {n} x {k}: each side must be from 1 to {MAX_DIMENSION}")
    return LinearPlan(type, (n, k), choose_slices(n, k, type) if slices is None else slices)


def choose_slices(n: int, k: int, type: GgmlType) -> int:
    """About WARPS_PER_SM strips in flight, an even cut where one is near, no slice beyond LONGEST_SLICE.

    Half as many where K is long: what few rows lose, many gain, whose partial sums are megabytes a slice. A matrix
    that one slice fills the card with to between half and MOST_WARPS_PER_SM is cut once, for a full one. One of
    WIDE_STRIPS and more keeps two wide tiles in a slice: their partial sums cost more than the warps bring.
    """
    strips, depth = tile_grid(type, (n, k))
    fewest = -(-depth * TILE_K[type] // LONGEST_SLICE)
    wanted = max(1, (WARPS_PER_SM if k <= SHORT_K else WARPS_PER_SM // 2) * MULTIPROCESSORS // strips)
    if wanted == 1 and 2 * strips <= MOST_WARPS_PER_SM * MULTIPROCESSORS:
        wanted = 2
    most = depth // 2 if depth > 1 and TILE_K[type] == 256 and strips >= WIDE_STRIPS else depth
    wanted = max(fewest, min(most, wanted))
    even = [s for s in range(max(fewest, -(-wanted // 2)), wanted + 1) if depth % s == 0]
    return even[-1] if even else wanted


def choose_expert_slices(n: int, k: int, type: GgmlType, num_used: int) -> int:
    """For the matrices [n, k] of experts, `num_used` of which a row takes: one row alone should fill the card."""
    strips, depth = tile_grid(type, (n * num_used, k))
    fewest = -(-depth * TILE_K[type] // LONGEST_SLICE)
    return min(depth, max(fewest, -(-WARPS_PER_SM * MULTIPROCESSORS // strips)))


def even_share(blocks: int, num_sms: int, card: Card) -> int:
    """Shared memory a block, in bytes: so much that a multiprocessor has room for no more than its share of `blocks`.

    Blocks that begin while the kernel ahead ends go where there is room, several to one multiprocessor and none to
    another. 0 where kernels do not overlap, and where the share is more than a few.
    """
    share = -(-blocks // num_sms)
    if not card.has_clusters or share > MOST_SHARED:  # both came with the same generation of GPUs
        return 0
    whole = card.shared_bytes + BLOCK_RESERVE
    return whole // (share + 1) // 128 * 128 + 128 - BLOCK_RESERVE


@dataclass(frozen=True)
class Pair:
    """How two matrices are multiplied in one launch; nothing in it changes a bit of the results."""

    variant: FewTokens
    blocks: tuple[int, int]  # that share the strips of each, for every slice
    shared_bytes: int  # of a block


@lru_cache(maxsize=1024)
def plan_pair(first: LinearPlan, second: LinearPlan, num_rows: int, card: Card, num_sms: int) -> Pair | None:
    """None where a launch of its own is better for each: many rows, or formats of other numbers of registers."""
    if not 0 < num_rows <= FEW_TOKENS:
        return None
    one, two = first.variant(num_rows, card), second.variant(num_rows, card)
    if not isinstance(one, FewTokens) or not isinstance(two, FewTokens) or first.is_quantized != second.is_quantized:
        return None
    wanted = [replace(v, early=one.early and two.early) for v in (one, two)]
    wanted += [replace(v, depth=1) for v in wanted]
    variant = next((v for v in wanted if first.fits(v, card) and second.fits(v, card)), None)
    if variant is None:
        return None
    columns = -(-num_rows // (8 * variant.groups))
    blocks = _divided(first, second, variant.warps, variant.ctas * num_sms // columns)
    launched = (blocks[0] * first.slices + blocks[1] * second.slices) * columns
    needed = max(first.shared_bytes(variant), second.shared_bytes(variant))
    return Pair(variant, blocks, max(needed, even_share(launched, num_sms, card)))


def _divided(first: LinearPlan, second: LinearPlan, warps: int, most: int) -> tuple[int, int]:
    """Of `most` blocks, those for a slice of each, so that no warp has many more bytes to read than others."""

    def strips(plan: LinearPlan) -> int:
        return tile_grid(plan.type, plan.shape)[0]

    def longest(plan: LinearPlan, blocks: int) -> int:
        return -(-strips(plan) // (blocks * warps)) * plan.longest_slice_tiles * tile_bytes(plan.type)

    def fit(plan: LinearPlan, left: int) -> int:
        return max(1, min(-(-strips(plan) // warps), left // plan.slices))

    divisions = [
        (blocks, fit(second, most - blocks * first.slices))
        for blocks in range(1, fit(first, most - second.slices) + 1)
    ]
    return min(divisions, key=lambda d: sorted((longest(first, d[0]), longest(second, d[1])), reverse=True))
