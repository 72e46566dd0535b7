"""Plans: slices follow from shape and format alone, variants fit the card."""

from __future__ import annotations

import pytest

from worker_orcd.gguf.types import GgmlType as G
from worker_orcd.kernels.linear.linear import consumer_registers
from worker_orcd.kernels.linear.plan import (
    LONGEST_SLICE,
    SAMPLE_TOKENS,
    Card,
    FewTokens,
    ManyTokens,
    even_share,
    plan_linear,
)
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.tiles import TILE_K, tile_bytes, tile_grid

HOPPER, ADA, AMPERE = Card(True, 227 * 1024), Card(False, 99 * 1024), Card(False, 163 * 1024)
SHAPES = [(n, k) for n in (1, 16, 100, 896, 4096, 28672, 151936) for k in (256, 512, 4864, 4096, 14336, 28672)]


@pytest.mark.parametrize(
    ("kind", "n", "k", "slices"),
    [
        (G.Q4_K, 28672, 4096, 2), (G.Q4_K, 6144, 4096, 4), (G.Q4_K, 4096, 4096, 8), (G.Q4_K, 4096, 14336, 4),
        (G.Q6_K, 128256, 4096, 1), (G.Q4_K, 9216, 3072, 3), (G.Q4_K, 3072, 3072, 6), (G.Q4_K, 16384, 3072, 2),
        (G.Q4_K, 3072, 8192, 8), (G.Q5_0, 1152, 896, 7), (G.Q5_0, 9728, 896, 3), (G.Q4_K, 896, 4864, 19),
        (G.Q8_0, 5120, 2880, 6), (G.Q8_0, 2880, 4096, 8), (G.Q8_0, 201088, 2880, 1), (G.Q6_K, 128256, 8192, 2),
    ],
)  # fmt: skip
def test_slices_of_known_shapes(kind: G, n: int, k: int, slices: int) -> None:
    assert plan_linear(n, k, kind).slices == slices


@pytest.mark.parametrize(
    ("kind", "n", "k", "warpgroups", "depth"),
    [
        (G.Q4_K, 28672, 4096, 4, 1), (G.Q4_K, 4096, 14336, 2, 1), (G.Q4_K, 6144, 4096, 3, 1),
        (G.Q4_K, 5120, 4096, 3, 1), (G.Q4_K, 4096, 4096, 4, 1), (G.Q6_K, 128256, 4096, 4, 1),
        (G.Q8_0, 5120, 2880, 4, 2), (G.Q8_0, 2880, 4096, 3, 2), (G.MXFP4, 8192, 2880, 4, 2),
        (G.Q4_K, 16384, 3072, 2, 1), (G.Q6_K, 1024, 4096, 1, 1),
    ],
)  # fmt: skip
def test_a_wave_of_wide_blocks_takes_32_or_64_tokens(kind: G, n: int, k: int, warpgroups: int, depth: int) -> None:
    """As measured; the last two are too small for wide blocks, half the multiprocessors would have none."""
    plan, sequential = plan_linear(n, k, kind), n in (28672, 16384)
    for num_tokens, tokens, stages in ((17, 32, 6), (32, 32, 6), (33, 64, 4), (64, 64, 4)):
        wanted = ManyTokens(tokens, warpgroups, depth, stages, sequential)
        assert plan.variant(num_tokens, HOPPER) == wanted


@pytest.mark.parametrize(
    ("kind", "n", "k", "expected"),
    [
        (G.Q5_0, 1152, 896, True), (G.Q5_0, 9728, 896, True), (G.Q6_K, 896, 4864, True), (G.Q4_K, 4096, 4096, True),
        (G.Q4_K, 6144, 4096, False), (G.Q4_K, 28672, 4096, False), (G.Q4_K, 4096, 14336, False),
        (G.Q8_0, 151936, 896, False), (G.BF16, 4096, 4096, False),
    ],
)  # fmt: skip
def test_registers_have_the_tiles_of_short_slices(kind: G, n: int, k: int, expected: bool) -> None:
    """All others, and those of many rows but where the sums of 256 fill shared memory, are copied there."""
    plan = plan_linear(n, k, kind)
    for card in (HOPPER, ADA):
        assert plan.variant(1, card).has_tiles_in_registers is expected
    for num_tokens in (32, 64, 128):
        assert not plan.variant(num_tokens, HOPPER).has_tiles_in_registers
    many = plan.variant(2048, HOPPER)
    assert many.has_tiles_in_registers is (isinstance(many, ManyTokens) and many.tokens == 256 and many.sequential)


@pytest.mark.parametrize(
    ("kind", "n", "k", "is_long", "depth"),
    [
        (G.Q4_K, 4096, 14336, True, 2), (G.Q6_K, 4096, 14336, True, 2), (G.Q4_K, 6144, 4096, False, 1),
        (G.Q4_K, 28672, 4096, False, 1), (G.Q8_0, 5120, 2880, False, 3),
    ],
)  # fmt: skip
def test_only_long_slices_take_more_code(kind: G, n: int, k: int, is_long: bool, depth: int) -> None:
    """And of tiles of 256 inputs one comes ahead, of 128 several."""
    variant = plan_linear(n, k, kind).variant(1, HOPPER)
    assert isinstance(variant, FewTokens)
    assert (variant.is_long, variant.depth) == (is_long, depth)


@pytest.mark.parametrize("blocks", [1, 23, 132, 133, 456, 1056, 1057])
def test_no_multiprocessor_has_room_for_more_than_its_share(blocks: int) -> None:
    """228 KiB of an H100 or H200, of which a block takes 1 KiB beyond what it asks for."""
    card, share = Card(True, 227 * 1024, has_clusters=True), -(-blocks // 132)
    asked = even_share(blocks, 132, card)
    if share > 8:
        assert asked == 0
    else:
        assert share * (asked + 1024) <= 228 * 1024 < (share + 1) * (asked + 1024)
    assert even_share(blocks, 132, AMPERE) == 0, "kernels do not overlap"


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_every_variant_fits_its_card(kind: G) -> None:
    for shape in SHAPES:
        plan = plan_linear(*shape, kind)
        assert 1 <= plan.slices <= tile_grid(kind, shape)[1]
        assert plan.longest_slice_tiles * TILE_K[kind] <= LONGEST_SLICE
        for card in (HOPPER, ADA, AMPERE):
            known = plan.variants(card)
            for num_tokens in (*range(1, 70), 127, 128, 129, 500, 2048):
                variant = plan.variant(num_tokens, card)
                assert plan.shared_bytes(variant) <= card.shared_bytes
                assert variant in known, "it would not be compiled ahead"
                if isinstance(variant, FewTokens):
                    assert variant.ctas * (plan.shared_bytes(variant) + 1024) <= card.shared_bytes + 1024
                    assert num_tokens <= 16 or not card.has_wgmma
                    assert variant.warps * variant.ctas <= 28, "fewer than 72 registers a thread"
                else:
                    assert card.has_wgmma
                    sums = variant.tokens // 2 * (2 if variant.sequential and not variant.has_shared_sums else 1)
                    tiles = variant.depth if variant.has_tiles_in_registers else 1
                    used = sums + 32 + tile_bytes(kind) // 128 * tiles
                    few = variant.tokens == 32 or TILE_K[kind] == 128  # of scales; 6 bits by 32 tokens spill four
                    spare = 12 if few else 20
                    assert used + spare <= consumer_registers(variant), "registers of a thread"


def test_sample_tokens_meet_every_rule() -> None:
    assert SAMPLE_TOKENS[0] == 1
    assert {type(plan_linear(4096, 4096, G.Q4_K).variant(t, HOPPER)) for t in SAMPLE_TOKENS} == {
        FewTokens,
        ManyTokens,
    }


def test_a_benchmark_may_cut_otherwise() -> None:
    assert plan_linear(4096, 4096, G.Q4_K, slices=5).slices == 5
    with pytest.raises(ValueError, match="56 tiles a slice: no room in 232448 bytes"):
        plan_linear(4096, 14336, G.Q4_K, slices=1).variant(1, HOPPER)
