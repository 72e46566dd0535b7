"""Attention of prompts, and what joins the partials of decodes; attention.py says what they compute."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SPLIT = tl.constexpr(256)  # keys in a partial
LOG2_E = tl.constexpr(1.4426950408889634)
ONES = tl.constexpr(32)  # columns of the product that sums
LOWEST = tl.constexpr(-1e30)  # a running maximum before anything was seen; finite, so that differences are defined


@triton.jit(do_not_specialize=["num_seqs", "table_width", "groups"])
def prompt_kernel(
    out,  # [T, Hq, D], or an operand's image
    q,  # [T, Hq, D]
    k,  # [blocks, BLOCK, Hk, D]
    v,
    sinks,  # [Hq] or None
    query_starts,  # [S + 1]
    context_lens,  # [S]
    block_table,  # [S, table_width]
    num_seqs,
    table_width,
    groups,  # of 8 tokens in the image; 0: there is none
    factor,  # of scores; to the base 2 unless there is a soft cap, else divided by it
    SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    PAD: tl.constexpr,  # columns of the image beyond Hq · D; they become zeros
    OVERLAPS: tl.constexpr,  # this kernel starts before the one before it has ended
):
    """Program (tile, key/value head): ROWS rows of a sequence that has several queries."""
    if OVERLAPS:
        gdc_launch_dependents()
    QUERIES: tl.constexpr = ROWS // GROUP
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts start first
    seq = _sequence_of(number, query_starts, num_seqs, QUERIES)
    begin, num_queries = _queries_of(seq, query_starts)
    first = (number - begin // QUERIES - seq) * QUERIES
    context_len = tl.load(context_lens + seq, cache_modifier=".cg").to(tl.int32)  # together with the starts
    if OVERLAPS:  # the integers are there since before the step's first kernel; who leaves must have waited, too
        gdc_wait()
    if not ((num_queries > 1) & (first < num_queries)):
        return
    where, tensors = (seq, begin, num_queries, first, context_len), (out, q, k, v, block_table)
    _attend(where, tensors, sinks, table_width, groups, factor, SOFT_CAP, GROUP, DIM, BLOCK, WINDOW, ROWS, PAD)


@triton.jit
def _attend(
    where,  # the sequence, its first row, how many it has, the first of them to work on, the context's length
    tensors,
    sinks,
    table_width,
    groups,
    factor,
    SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    PAD: tl.constexpr,
):
    """ROWS query rows in registers, keys and values stream by."""
    QUERIES: tl.constexpr = ROWS // GROUP
    TILE: tl.constexpr = _tile(DIM)
    kv_head, num_heads = tl.program_id(1), tl.num_programs(1) * GROUP
    seq, begin, num_queries, first, context_len = where
    out, q, k, v, block_table = tensors
    rows = tl.arange(0, ROWS)
    query, heads = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = (rows < QUERIES * GROUP) & (query < num_queries)
    limits = context_len - num_queries + query  # the last position each row sees
    first_limit = context_len - num_queries + first
    last_limit = context_len - num_queries + tl.minimum(first + QUERIES, num_queries) - 1
    low, high = 0, last_limit + 1
    if WINDOW:
        low = tl.maximum(first_limit - WINDOW + 1, 0) // TILE * TILE

    table = block_table + seq.to(tl.int64) * table_width
    d = tl.arange(0, triton.next_power_of_2(DIM))
    at = ((begin + query).to(tl.int64) * num_heads + heads) * DIM
    inside = is_row[:, None] & (d < DIM)[None, :]
    queries = tl.load(q + at[:, None] + d[None, :], mask=inside, other=0.0).to(k.dtype.element_ty)
    run_acc, totals = tl.zeros((ROWS, d.shape[0]), tl.float32), tl.zeros((ROWS, ONES), tl.float32)
    run_peak, run_total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc, peak = run_acc, run_peak
    sight, cache = (limits, first_limit, last_limit), (k, v, table, context_len, kv_head)
    # two loops: products of many rows run on their own, and are awaited only after a loop
    for split in range(low // SPLIT, tl.cdiv(high, SPLIT)):
        acc, totals, peak = tl.zeros_like(acc), tl.zeros_like(totals), tl.full((ROWS,), LOWEST, tl.float32)
        for start in range(tl.maximum(low, split * SPLIT), tl.minimum(high, (split + 1) * SPLIT), TILE):
            acc, totals, peak = _step(
                acc, totals, peak, queries, start, cache, sight, factor, SOFT_CAP, DIM, BLOCK, TILE, WINDOW
            )
        total = tl.max(totals, 1)  # its columns are equal
        run_acc, run_peak, run_total = _fold(run_acc, run_peak, run_total, acc, peak, total)
    result = _finish(run_acc, run_peak, run_total, sinks, heads, is_row)
    tokens, columns = (begin + query).to(tl.int64)[:, None], (heads * DIM)[:, None] + d[None, :]
    _store(out, result, tokens, columns, inside, num_heads * DIM, groups)
    if kv_head + 1 == tl.num_programs(1):
        is_last = is_row & (heads + 1 == num_heads)
        _store_zeros(out, tokens, is_last[:, None], num_heads * DIM, groups, PAD)


@triton.jit
def _step(
    acc,  # [ROWS, D padded]
    totals,  # [ROWS, ONES], equal columns
    peak,  # [ROWS]
    queries,
    start,
    cache,  # k, v, the sequence's block table, its context length, key/value head
    sight,  # the last position each row sees [ROWS], and the first and the last of them
    factor,
    SOFT_CAP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Take the keys at start … start + TILE - 1 into (acc, totals, peak)."""
    k, v, table, context_len, kv_head = cache
    limits, first_limit, last_limit = sight
    d = tl.arange(0, triton.next_power_of_2(DIM))
    places, token_elems = tl.arange(0, TILE), tl.num_programs(1) * DIM
    positions = start + places
    is_key = positions < context_len
    # BLOCK and TILE are powers of two and a tile starts at a multiple of TILE, so start and places divide apart
    blocks = tl.load(table + (start // BLOCK + places // BLOCK), mask=is_key, other=0)
    offsets = start % BLOCK * token_elems + kv_head * DIM + places % BLOCK * token_elems
    slots = blocks.to(tl.int32).to(tl.int64) * (token_elems * BLOCK) + offsets  # one wide multiplication a key
    cells, inside = slots[:, None] + d[None, :], is_key[:, None] & (d < DIM)[None, :]
    keys = tl.load(k + cells, mask=inside, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if SOFT_CAP > 0:
        scores = SOFT_CAP * _tanh(scores * factor)
    if (start + TILE - 1 > first_limit) | ((WINDOW > 0) & (start <= last_limit - WINDOW)):
        is_seen = positions[None, :] <= limits[:, None]
        if WINDOW:
            is_seen &= positions[None, :] > limits[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
    to_base_2 = LOG2_E if SOFT_CAP > 0 else factor
    new_peak = tl.maximum(peak, tl.max(scores, 1) * to_base_2)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, to_base_2, tl.float32), -new_peak[:, None]))
    rescale = tl.exp2(peak - new_peak)[:, None]
    acc, totals = acc * rescale, totals * rescale
    values = tl.load(v + cells, mask=inside, other=0.0)
    weights = weights.to(values.dtype)
    totals = tl.dot(weights, tl.full((TILE, ONES), 1.0, values.dtype), totals, input_precision="ieee")
    return tl.dot(weights, values, acc, input_precision="ieee"), totals, new_peak


@triton.jit(do_not_specialize=["max_splits", "groups"])
def fold_kernel(
    out,
    partials,
    sinks,
    query_starts,
    context_lens,
    max_splits,
    groups,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
    PAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program (sequence, query head): the partials of one row, in index order."""
    if OVERLAPS:
        gdc_launch_dependents()
    seq, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, num_queries = _queries_of(seq, query_starts)
    context_len = tl.load(context_lens + seq, cache_modifier=".cg").to(tl.int32)
    if OVERLAPS:
        gdc_wait()
    if num_queries != 1:
        return
    low, high = 0, tl.cdiv(context_len, SPLIT)
    if WINDOW:
        low = tl.maximum(context_len - WINDOW, 0) // SPLIT
    d = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    row = (seq.to(tl.int64) * num_heads + head) * max_splits
    stats = partials + tl.num_programs(0).to(tl.int64) * num_heads * max_splits * DIM
    acc = tl.zeros(d.shape, tl.float32)
    peak, total = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32)
    for start in range(low, high, UNROLL):
        for i in tl.static_range(UNROLL):
            split = start + i + tl.arange(0, 1)
            part, is_there = row + split, split < high
            part_acc = tl.load(partials + part[:, None] * DIM + d, mask=is_there[:, None] & (d < DIM), other=0.0)
            part_peak = tl.load(stats + part * 2, mask=is_there, other=LOWEST)
            part_total = tl.load(stats + part * 2 + 1, mask=is_there, other=0.0)
            acc, peak, total = _fold(acc, peak, total, part_acc, part_peak, part_total)
    heads = head + tl.arange(0, 1)
    result = _finish(acc, peak, total, sinks, heads, heads >= 0)
    token = begin.to(tl.int64) + tl.zeros((1, 1), tl.int64)
    _store(out, result, token, head * DIM + d, d < DIM, num_heads * DIM, groups)
    if head + 1 == num_heads:
        _store_zeros(out, token, token >= 0, num_heads * DIM, groups, PAD)


@triton.jit
def _sequence_of(number, query_starts, num_seqs, QUERIES: tl.constexpr):
    """The sequence of tile `number`, when sequence s is given the tiles from query_starts[s] // QUERIES + s on."""
    low, high = number * 0, number * 0 + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(query_starts + middle, cache_modifier=".cg").to(tl.int32) // QUERIES + middle <= number
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _queries_of(seq, query_starts):
    """First row of the sequence, and how many it has."""
    begin = tl.load(query_starts + seq, cache_modifier=".cg").to(tl.int32)
    return begin, tl.load(query_starts + seq + 1, cache_modifier=".cg").to(tl.int32) - begin


@triton.constexpr_function
def _tile(head_dim):
    """Keys at a time: part of the order of addition."""
    return 64 if head_dim <= 128 else 32


@triton.jit
def _fold(acc, peak, total, part_acc, part_peak, part_total):
    """Add a partial to the running acc [rows, D], peak [rows], total [rows]; an empty one changes no bit."""
    new_peak = tl.maximum(peak, part_peak)
    weight, part_weight = tl.exp2(peak - new_peak), tl.exp2(part_peak - new_peak)
    acc = tl.fma(part_acc, tl.broadcast_to(part_weight[:, None], acc.shape), acc * weight[:, None])
    return acc, new_peak, tl.fma(part_total, part_weight, total * weight)


@triton.jit
def _finish(acc, peak, total, sinks, heads, is_row):
    """acc / total, with the sinks' share in the total; zeros where nothing was seen."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=is_row, other=0.0) * LOG2_E
        one = tl.full(total.shape, 1.0, tl.float32)
        acc, peak, total = _fold(acc, peak, total, tl.zeros_like(acc), sink, one)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2 * LOG2_E)))


@triton.jit
def _store(out, values, tokens, columns, mask, width, groups):
    """Write values [rows, D] of tokens [rows, 1] to columns [rows, D], in rows or in the order of the matmuls.

    That order is defined by store4 in ops/flow.cuh.
    """
    if out.dtype.element_ty == tl.bfloat16:  # an image; rows are float32
        unit = (columns & 31) >> 1  # of 16 in a chunk of 128 columns
        piece = (columns >> 7) * 2 + (unit >> 3)
        token = (piece.to(tl.int64) * groups + (tokens >> 3)) * 8 + (tokens & 7)
        places = (token * 8 + ((unit & 7) ^ (tokens & 7))) * 8 + ((columns >> 5) & 3) * 2 + (columns & 1)
    else:
        places = tokens * width + columns
    tl.store(out + places, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_zeros(out, tokens, mask, width, groups, PAD: tl.constexpr):
    """Zeros into columns width … width + PAD - 1 of tokens [rows, 1] of an image."""
    if PAD:
        pad = tl.arange(0, triton.next_power_of_2(PAD))[None, :] + tl.zeros(tokens.shape, tl.int32)
        _store(out, tl.zeros(pad.shape, tl.float32), tokens, width + pad, mask & (pad < PAD), width, groups)
