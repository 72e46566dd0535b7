"""Plan → Batch, compared with what stands in the plan by hand."""

from __future__ import annotations

import pytest
import torch

from tests.engine.scripted import request
from tests.running import last_tokens
from worker_orcd.backends.batch import token_ids
from worker_orcd.engine.pack import pack
from worker_orcd.engine.sequence import Chunk, Plan, Sequence
from worker_orcd.kv.allocator import BlockTable
from worker_orcd.kv.prefix import PrefixChain

CPU = torch.device("cpu")


def sequence(tokens: list[int], blocks: list[int], computed: int = 0, block_size: int = 4) -> Sequence:
    seq = Sequence.of(request(prompt=tokens), 0, PrefixChain(b"", block_size))
    seq.table, seq.num_computed = BlockTable(block_size), computed
    seq.table.blocks.extend(blocks)
    return seq


def test_decodes_and_prompts_side_by_side() -> None:
    decode = sequence(list(range(100, 106)), [7, 3], computed=5)
    middle = sequence(list(range(200, 210)), [2, 9, 4], computed=3)
    whole = sequence([300, 301], [5])
    batch = pack([Chunk.of(decode, 1), Chunk.of(middle, 4), Chunk.of(whole, 2)], CPU)
    assert batch.tokens.tolist() == [105, 203, 204, 205, 206, 300, 301]
    assert batch.attn.positions.tolist() == [5, 3, 4, 5, 6, 0, 1]
    assert batch.slots.tolist() == [3 * 4 + 1, 2 * 4 + 3, 9 * 4, 9 * 4 + 1, 9 * 4 + 2, 5 * 4, 5 * 4 + 1]
    assert batch.sample_rows is not None
    assert batch.sample_rows.tolist() == [0, 6], "the prompt that goes on later does not sample"
    assert batch.attn.query_starts.tolist() == [0, 1, 5, 7]
    assert batch.attn.context_lens.tolist() == [6, 7, 2]
    assert batch.attn.block_table.tolist() == [[7, 3, 0], [2, 9, 4], [5, 0, 0]]
    assert batch.attn.block_size == 4


def test_one_block_of_the_contiguous_cache() -> None:
    batch = pack([Chunk.of(sequence(list(range(10, 40)), [6], computed=20, block_size=64), 10)], CPU)
    assert batch.slots.tolist() == [6 * 64 + p for p in range(20, 30)]
    assert batch.attn.block_table.tolist() == [[6]]


def test_a_step_may_sample_nothing() -> None:
    batch = pack([Chunk.of(sequence(list(range(8)), [1, 2]), 3)], CPU)
    assert batch.sample_rows is not None
    assert batch.sample_rows.tolist() == []
    assert batch.sample_rows.dtype == torch.int64
    assert batch.tokens.tolist() == [0, 1, 2]


def test_tokens_still_unknown_are_taken_from_the_step_before() -> None:
    last_sampled = torch.tensor([71, 72, 73])
    plan: Plan = []
    for row, tokens in ((2, [10, 11]), (0, [20, 21, 22])):
        seq = sequence(tokens, [row], computed=len(tokens))
        seq.num_unknown, seq.sampled_row = 1, row
        plan.append(Chunk.of(seq, 1))
    known = sequence([30, 31], [3], computed=1)
    resumed = sequence([40, 41, 42], [1])  # several pending tokens, the last one unknown
    resumed.num_unknown, resumed.sampled_row = 1, 1
    batch = pack([plan[0], Chunk.of(known, 1), plan[1], Chunk.of(resumed, 4)], CPU, last_sampled)
    assert batch.tokens.tolist() == [-3, 31, -1, 40, 41, 42, -2]
    assert batch.sampled is last_sampled
    assert token_ids(batch.tokens, batch.sampled).tolist() == [73, 31, 71, 40, 41, 42, 72]
    assert batch.attn.positions.tolist() == [2, 1, 3, 0, 1, 2, 3]
    assert last_tokens(batch).tolist() == [73, 31, 71, 72]
    early = pack([Chunk.of(resumed, 3)], CPU)
    assert token_ids(early.tokens, early.sampled).tolist() == [40, 41, 42]
    assert last_tokens(early).tolist() == []
    with pytest.raises(AssertionError):
        pack(plan, CPU)


def test_rows_are_named_unless_all_are_wanted() -> None:
    decodes = [Chunk.of(sequence([1, 2, 3 + i], [i], computed=2), 1) for i in range(2)]
    assert pack(decodes, CPU).sample_rows is None
    whole = sequence([4, 5], [2])
    found = pack([*decodes, Chunk.of(whole, 2)], CPU).sample_rows
    assert found is not None
    assert found.tolist() == [0, 1, 3]
    whole.is_scoring = True
    assert pack([*decodes, Chunk.of(whole, 2)], CPU).sample_rows is None


def test_a_chunk_without_room_in_the_table_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        pack([Chunk.of(sequence(list(range(9)), [1, 2]), 9)], CPU)
    with pytest.raises(AssertionError):
        Chunk.of(sequence([1, 2, 3], [1]), 4)
    with pytest.raises(AssertionError):
        Chunk.of(sequence([1, 2, 3], [1], computed=3), 0)
