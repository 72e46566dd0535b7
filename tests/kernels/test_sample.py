"""The sampler on the device: the tokens of engine/sampler.py, for every mixture of parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.conftest import NO_COMPILER
from tests.kernels.emulator.gpu import EmulatedGpu
from worker_orcd.kernels.gpu import Card, Gpu
from worker_orcd.kernels.ops.sample import STATE_BYTES, banned_bits, cluster, sample

OFF = 2.0**62
UNITS = 2.0**40


def clustered(num_rows: int, blocks: int, shared_bytes: int = 227 * 1024, order: int = 0) -> EmulatedGpu:
    """A GPU on which so many blocks share each of `num_rows` rows; the most that can if a row has no room."""
    gpu = EmulatedGpu(num_sms=num_rows * blocks, order=order)
    gpu.card = Card(has_wgmma=False, shared_bytes=shared_bytes, has_clusters=True)
    return gpu


def expected(logits: Tensor, table: Tensor, banned: list[int]) -> list[int]:
    """By the definition: sort, keep a prefix, walk along the vocabulary."""
    tokens = []
    for row, (temperature, greedy, top_k, top_p, min_p, uniform) in zip(logits, table.T.tolist(), strict=True):
        scores = row.double().clone()
        scores[banned] = -torch.inf
        if greedy:
            tokens.append(int(scores.argmax()))
            continue
        scores = scores / temperature
        weights = (torch.exp(scores - scores.max()) * UNITS).round().long()
        order = scores.argsort(descending=True, stable=True)
        kept = weights[order].clone()
        kept[int(min(top_k, len(kept))) :] = 0
        before = kept.cumsum(0) - kept
        keep = (before.double() < top_p * float(kept.sum())) | torch.tensor(top_p >= 1)
        keep &= kept.double() >= min_p * float(kept[0])
        keep[0] = True
        final = torch.zeros_like(weights).scatter_(0, order, kept * keep)
        total = int(final.sum())
        target = min(int(uniform * total), total - 1)
        tokens.append(int((final.cumsum(0) <= target).sum()))
    return tokens


def table_of(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


def run(gpu: Gpu, logits: Tensor, table: Tensor, banned: list[int]) -> tuple[list[int], list[int]]:
    bits = banned_bits(banned, logits.shape[1], gpu.device)
    tokens, finite = sample(gpu, logits.to(gpu.device), table.to(gpu.device), bits).tolist()
    return tokens, finite


def mixture(vocab: int) -> tuple[Tensor, Tensor, list[int]]:
    """Logits, a table and bans: every parameter alone and together."""
    generator = torch.Generator().manual_seed(vocab)
    draws = torch.rand(14, generator=generator, dtype=torch.float64).tolist()
    base = (1.0, 0.0, OFF, 1.0, 0.0)
    params = [base, (0.5, *base[1:]), (1.0, 1.0, *base[2:]), (1.0, 0, 5, 1.0, 0.0), (2.0, 0, OFF, 0.7, 0.0),
              (1.0, 0, OFF, 1.0, 0.2), (1.5, 0, 40, 0.9, 0.05), (1.0, 0, 1, 0.5, 0.0), (1.0, 0, OFF, 1e-9, 0.0),
              (1e-4, *base[1:]), (1.0, 0, OFF, 1.0, 1.0), (100.0, 0, vocab, 0.999999, 0.0), base, base]  # fmt: skip
    draws[-2:] = [0.0, 1.0 - 2**-53]
    table = table_of(*((*p, u) for p, u in zip(params, draws, strict=True)))
    logits = torch.randn(len(params), vocab, generator=generator) * 4
    return logits, table, [1, vocab - 2, 7] if vocab > 10 else []


@pytest.mark.parametrize("vocab", [1, 31, 1000, 3001])
def test_every_parameter(vocab: int, gpu: Gpu) -> None:
    logits, table, banned = mixture(vocab)
    tokens, finite = run(gpu, logits, table, banned)
    assert tokens == expected(logits, table, banned)
    assert all(finite)


@pytest.mark.parametrize("vocab", [31, 1000, 3001])
def test_rows_that_are_all_greedy_may_be_said_to_be(vocab: int, gpu: Gpu) -> None:
    logits, table, banned = mixture(vocab)
    table[1] = 1.0
    logits[3, vocab // 2] = torch.nan
    bits, on_device = banned_bits(banned, vocab, gpu.device), (logits.to(gpu.device), table.to(gpu.device))
    found = sample(gpu, *on_device, bits, is_greedy=True)
    assert torch.equal(found, sample(gpu, *on_device, bits))
    assert found[1].tolist() == [row != 3 for row in range(len(logits))]


def test_a_place_for_the_result(gpu: Gpu) -> None:
    logits, table, banned = mixture(31)
    bits, place = banned_bits(banned, 31, gpu.device), torch.full((40,), -7, device=gpu.device)
    logits, table = logits.to(gpu.device), table.to(gpu.device)
    found = sample(gpu, logits, table, bits, place)
    assert found.data_ptr() == place.data_ptr()
    assert found.tolist() == sample(gpu, logits, table, bits).tolist()
    assert place[2 * len(logits) :].tolist() == [-7] * (40 - 2 * len(logits))
    assert sample(gpu, logits, table, bits, place[:9]).data_ptr() != place.data_ptr(), "no room"


@NO_COMPILER
@pytest.mark.parametrize("vocab", [3, 1000, 5003])
@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_a_row_that_blocks_share(blocks: int, vocab: int) -> None:
    logits, table, banned = mixture(vocab)
    tokens, finite = run(clustered(len(logits), blocks, order=blocks // 4), logits, table, banned)
    assert tokens == expected(logits, table, banned)
    assert all(finite)


@NO_COMPILER
@pytest.mark.parametrize("vocab", [1000, 5003])
@pytest.mark.parametrize("gpu", [EmulatedGpu(shared_bytes=STATE_BYTES), clustered(14, 8, STATE_BYTES)])
def test_a_row_that_shared_memory_cannot_hold(gpu: EmulatedGpu, vocab: int) -> None:
    logits, table, banned = mixture(vocab)
    assert run(gpu, logits, table, banned)[0] == expected(logits, table, banned)


LARGE = torch.randn(2, 151936, generator=torch.Generator().manual_seed(0)) * 3
LARGE_TABLE = table_of((0.8, 0.0, OFF, 0.95, 0.0, 0.6), (1.0, 0.0, 3000.0, 0.9, 0.001, 0.9))


def test_a_large_vocabulary(gpu: Gpu) -> None:
    assert run(gpu, LARGE, LARGE_TABLE, [5])[0] == expected(LARGE, LARGE_TABLE, [5])


@NO_COMPILER
def test_a_large_vocabulary_that_blocks_share() -> None:
    assert run(clustered(2, 8), LARGE, LARGE_TABLE, [5])[0] == expected(LARGE, LARGE_TABLE, [5])


def test_other_rows_do_not_matter(gpu: Gpu) -> None:
    """So many of them that blocks which share a row become fewer."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(140, 1001, generator=generator) * 4
    draws = torch.rand(140, generator=generator, dtype=torch.float64).tolist()
    table = table_of(*((0.7 + u, 0.0, 600.0, 0.9, 0.0, u) for u in draws))
    tokens, _ = run(gpu, logits, table, [3])
    for first, last in ((0, 1), (1, 9), (9, 40), (40, 140)):
        few = run(gpu, logits[first:last].clone(), table[:, first:last].contiguous(), [3])
        assert few[0] == tokens[first:last]


@pytest.mark.parametrize(
    ("num_rows", "vocab", "blocks"),
    [(1, 151936, 8), (1, 32064, 8), (16, 151936, 8), (17, 32064, 4), (64, 151936, 4), (64, 32064, 2),
     (256, 32064, 1), (256, 201088, 4), (256, 500000, 8)],
)  # fmt: skip
def test_blocks_fill_the_card_and_hold_the_row(num_rows: int, vocab: int, blocks: int) -> None:
    gpu = clustered(1, 132)
    assert cluster(gpu, num_rows, vocab) == blocks
    assert cluster(gpu, num_rows, vocab, is_greedy=True) == min(blocks, max(1, 128 // num_rows))
    gpu.card = Card(has_wgmma=False, shared_bytes=163 * 1024)
    assert cluster(gpu, num_rows, vocab) == 1


@NO_COMPILER
@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([-3.0, -0.0, 0.0, 1.0, 1.0000001, 2.0, 60.0, -1e30]), min_size=1, max_size=70),
    st.sampled_from([0.3, 1.0, 7.0]),
    st.sampled_from([1.0, 2.0, 5.0, 33.0, OFF]),
    st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0 - 2**-53]),
    st.sampled_from([1, 8]),
)
def test_equal_logits_are_taken_by_index(
    values: list[float], temperature: float, top_k: float, top_p: float, min_p: float, uniform: float, blocks: int
) -> None:
    logits, table = torch.tensor([values]), table_of((temperature, 0.0, top_k, top_p, min_p, uniform))
    tokens, _ = run(clustered(1, blocks), logits, table, [])
    assert tokens == expected(logits, table, [])


def check_rows_that_are_not_numbers(gpu: Gpu) -> None:
    logits = torch.randn(5, 300)
    table = table_of(*((1.0, float(row == 3), OFF, 0.9, 0.0, 0.3) for row in range(5)))
    whole, _ = run(gpu, logits, table, [0])
    logits[1, 5], logits[2, 299], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    tokens, finite = run(gpu, logits, table, [0])
    assert finite == [1, 0, 0, 0, 1]
    assert [tokens[0], tokens[4]] == [whole[0], whole[4]]


def test_rows_that_are_not_numbers_stay_alone(gpu: Gpu) -> None:
    check_rows_that_are_not_numbers(gpu)


def check_nothing_allowed_and_no_rows(gpu: Gpu) -> None:
    table = table_of((1.0, 0.0, OFF, 1.0, 0.0, 0.5))
    for vocab in (3, 300):
        assert run(gpu, torch.zeros(1, vocab), table, [*range(vocab)]) == ([0], [0])
        assert run(gpu, torch.zeros(1, vocab), table, [*range(vocab - 1)]) == ([vocab - 1], [1])
    assert run(gpu, torch.zeros(0, 3), table[:, :0].contiguous(), []) == ([], [])


def test_nothing_allowed_and_no_rows(gpu: Gpu) -> None:
    check_nothing_allowed_and_no_rows(gpu)
    with pytest.raises(ValueError, match="parameters"):
        run(gpu, torch.zeros(2, 3), table_of((1.0, 0.0, OFF, 1.0, 0.0, 0.5)), [])


@NO_COMPILER
def test_the_same_of_rows_that_blocks_share() -> None:
    check_rows_that_are_not_numbers(clustered(5, 8))
    check_nothing_allowed_and_no_rows(clustered(1, 8))


@NO_COMPILER
@pytest.mark.parametrize("order", [1, 2])
def test_the_order_in_which_threads_run_does_not_matter(order: int) -> None:
    logits = torch.randn(3, 500) * 3
    table = table_of((1.0, 0, 50, 0.9, 0.0, 0.4), (1.0, 0, OFF, 0.5, 0.0, 0.9), (0.7, 0, OFF, 1.0, 0.0, 0.1))
    alone = run(EmulatedGpu(), logits, table, [3])
    assert run(EmulatedGpu(order=order), logits, table, [3]) == alone
    assert run(clustered(3, 8, order=order), logits, table, [3]) == alone
