"""Attention over a paged cache, in Triton: softmax(q·kᵀ·scale)·v with a running maximum (arXiv:2205.14135).

Rows: the G = Hq / Hk query heads that share a key/value head are packed with as many queries as fit into ROWS rows.
Order, the same for every row whatever its company: keys go TILE at a time; SPLIT keys, cut at multiples of SPLIT of
the absolute position, give one partial (peak, total, acc); partials are folded in index order. Keys a row may not see
leave its state as it was, bit for bit, so it does not matter which tiles its neighbours need.

    prompt  a program takes ROWS rows of one sequence through all of their splits; the grid is an upper bound made of
            host integers, and programs beyond the last row leave at once
    decode  sequences with one query. Few of them: programs share the splits of a row and write the partials, a
            second kernel folds them. Many: one program per row folds its own. Same bits.

Products have 16-bit operands and a float32 sum on the tensor cores (a float32 cache: plain float32); the sum of the
weights is such a product too, with a matrix of ones, because a sum over lanes would depend on how a tile is spread
over warps. Fused multiply-adds are written out and the compiler's own are off, so that both forms round alike.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = tl.constexpr(256)  # keys in a partial
LOG2_E = tl.constexpr(math.log2(math.e))
DECODE_ROWS = 16  # the fewest rows of a tensor core product
UNROLL = 8  # partials loaded at once when they are folded
PROGRAMS = 512  # decode programs wanted: as many as an H200 holds at once; measured
ONES = tl.constexpr(32)  # columns of the product that sums; more than DECODE_ROWS, so that warps divide columns
LOWEST = tl.constexpr(-1e30)  # a running maximum before anything was seen; finite, so that differences are defined


@dataclass(frozen=True)
class Form:
    """Constants of attention in one layer."""

    num_heads: int  # Hq
    num_kv_heads: int  # Hk, a divisor of Hq
    head_dim: int  # D, a multiple of 16, at most 256
    scale: float  # multiplies q·k; above 0
    window: int = 0  # a query sees the last `window` positions, its own included; 0: all of them
    soft_cap: float = 0.0  # scores become cap · tanh(score / cap); 0: they do not

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def tile(self) -> int:
        """Keys at a time: part of the order of addition, so one number per head size."""
        return 64 if self.head_dim <= 128 else 32


@dataclass(frozen=True)
class Pages:
    """Where each sequence's keys lie. Sequence s owns rows query_starts[s] … query_starts[s+1] - 1, at least one.

    They are its last positions in order. A sequence whose context length is 0 is padding: its row becomes zeros.
    """

    query_starts: Tensor  # i64 [S + 1]
    context_lens: Tensor  # i64 [S], this step's rows included
    block_table: Tensor  # i64 [S, blocks], contiguous


@dataclass(frozen=True)
class Launch:
    """How a kernel is run; nothing in it changes a bit of the result."""

    rows: int
    num_warps: int
    num_stages: int
    num_parts: int = 1  # programs that share the splits of one row
    max_registers: int | None = None  # of a thread


def attend(q: Tensor, k: Tensor, v: Tensor, pages: Pages, form: Form, sinks: Tensor | None = None) -> Tensor:
    """q [T, Hq, D] over k, v [blocks, block_size, Hk, D] → [T, Hq, D] of q's type. Never waits for the device.

    sinks [Hq] f32: a logit per head that takes part in the sum of weights and has no value.
    """
    assert all(x.is_contiguous() for x in (q, k, v, pages.block_table))
    assert SPLIT.value % k.shape[1] == 0
    assert q.shape[1:] == (form.num_heads, form.head_dim)
    assert k.shape[2:] == v.shape[2:] == (form.num_kv_heads, form.head_dim)
    call = Call(torch.empty_like(q), q, k, v, pages, form, sinks)
    if q.shape[0] > call.num_seqs:
        launch_prompts(call, prompt_launch(form))
    if call.num_seqs > 1 or q.shape[0] == 1:
        launch_decodes(call, decode_launch(form, call.num_seqs, call.max_splits))
    return call.out


@dataclass(frozen=True)
class Call:
    """The arguments of one `attend`, and where its result goes."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    pages: Pages
    form: Form
    sinks: Tensor | None

    @property
    def num_seqs(self) -> int:
        return len(self.pages.context_lens)

    @property
    def max_splits(self) -> int:
        """Partials of the longest sequence the block table has room for."""
        positions = self.pages.block_table.shape[1] * self.k.shape[1]
        return triton.cdiv(positions, SPLIT.value)  # type: ignore[no-any-return]


def prompt_launch(form: Form) -> Launch:
    return Launch(max(64, triton.next_power_of_2(form.group)), 4 if form.head_dim <= 128 else 8, 3)


def decode_launch(form: Form, num_seqs: int, max_splits: int) -> Launch:
    """Two warps do where programs are many; one alone is faster with four."""
    num_parts = max(1, min(max_splits, PROGRAMS // (num_seqs * form.num_kv_heads)))
    num_warps = 2 if num_seqs * form.num_kv_heads * num_parts > PROGRAMS // 2 and form.head_dim <= 128 else 4
    rows = max(DECODE_ROWS, triton.next_power_of_2(form.group))
    return Launch(rows, num_warps, 3, num_parts)


def launch_prompts(call: Call, launch: Launch) -> None:
    """Rows of all sequences that have more than one."""
    num_tiles = call.q.shape[0] // (launch.rows // call.form.group) + call.num_seqs
    _launch(call, launch, (num_tiles, call.form.num_kv_heads, 1), is_prompt=True)


def launch_decodes(call: Call, launch: Launch) -> None:
    """The rows of all sequences that have exactly one."""
    form, partials = call.form, None
    if launch.num_parts > 1:
        partials = call.out.new_empty(partial_elems(form, call.num_seqs, call.max_splits), dtype=torch.float32)
    grid = call.num_seqs, form.num_kv_heads, launch.num_parts
    _launch(call, launch, grid, is_prompt=False, partials=partials)
    if partials is not None:
        pages = call.pages
        _fold_kernel[(call.num_seqs, form.num_heads)](
            *(call.out, partials, call.sinks, pages.query_starts, pages.context_lens, call.max_splits),
            *(form.head_dim, form.window, UNROLL),
            num_warps=1,
            enable_fp_fusion=False,
        )


def partial_elems(form: Form, num_seqs: int, max_splits: int) -> int:
    """float32 numbers of workspace: acc [S, Hq, splits, D], then peak and total [S, Hq, splits, 2]."""
    return num_seqs * form.num_heads * max_splits * (form.head_dim + 2)


def _launch(
    call: Call, launch: Launch, grid: tuple[int, int, int], is_prompt: bool, partials: Tensor | None = None
) -> None:
    pages, form = call.pages, call.form
    _attention_kernel[grid](
        *(call.out, call.q, call.k, call.v, call.sinks),
        *(pages.query_starts, pages.context_lens, pages.block_table, partials),
        *(call.num_seqs, pages.block_table.shape[1], form.scale if form.soft_cap else form.scale * LOG2_E.value),
        *(form.soft_cap, form.group, form.head_dim, call.k.shape[1], form.tile, form.window, launch.rows, is_prompt),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["num_seqs", "table_width"])
def _attention_kernel(
    out,  # [T, Hq, D]
    q,  # [T, Hq, D]
    k,  # [blocks, BLOCK, Hk, D]
    v,
    sinks,  # [Hq] or None
    query_starts,  # [S + 1]
    context_lens,  # [S]
    block_table,  # [S, table_width]
    partials,  # acc [S, Hq, splits, D], then (peak, total) [S, Hq, splits, 2]; or None: fold here
    num_seqs,
    table_width,
    factor,  # of scores; to the base 2 unless there is a soft cap
    SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    IS_PROMPT: tl.constexpr,
):
    """Program (tile or sequence, key/value head, part): ROWS query rows in registers, keys and values stream by."""
    QUERIES: tl.constexpr = ROWS // GROUP
    kv_head, num_heads = tl.program_id(1), tl.num_programs(1) * GROUP
    if IS_PROMPT:
        number = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts start first
        seq = _sequence_of(number, query_starts, num_seqs, QUERIES)
        begin, num_queries = _queries_of(seq, query_starts)
        first = (number - begin // QUERIES - seq) * QUERIES
        is_mine = (num_queries > 1) & (first < num_queries)
    else:
        seq, first = tl.program_id(0), 0
        begin, num_queries = _queries_of(seq, query_starts)
        is_mine = num_queries == 1
    if not is_mine:
        return

    context_len = tl.load(context_lens + seq).to(tl.int32)
    rows = tl.arange(0, ROWS)
    query, heads = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = (rows < QUERIES * GROUP) & (query < num_queries)
    limits = context_len - num_queries + query  # the last position each row sees
    first_limit = context_len - num_queries + first
    last_limit = context_len - num_queries + tl.minimum(first + QUERIES, num_queries) - 1
    low, high = 0, last_limit + 1
    if WINDOW:
        low = tl.maximum(first_limit - WINDOW + 1, 0) // TILE * TILE
    if partials is not None:
        low, high = _share(low, high)

    table = block_table + seq.to(tl.int64) * table_width
    d = tl.arange(0, triton.next_power_of_2(DIM))
    at = ((begin + query).to(tl.int64) * num_heads + heads) * DIM
    inside = is_row[:, None] & (d < DIM)[None, :]
    queries = tl.load(q + at[:, None] + d[None, :], mask=inside, other=0.0).to(k.dtype.element_ty)
    run_acc, totals = tl.zeros((ROWS, d.shape[0]), tl.float32), tl.zeros((ROWS, ONES), tl.float32)
    run_peak, run_total = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32)
    acc, peak = run_acc, run_peak
    sight, cache = (limits, first_limit, last_limit), (k, v, table, context_len, kv_head)
    if IS_PROMPT:  # two loops: products of many rows run on their own, and must be awaited before a split is folded
        for split in range(low // SPLIT, tl.cdiv(high, SPLIT)):
            acc, totals, peak = tl.zeros_like(acc), tl.zeros_like(totals), tl.full((ROWS,), LOWEST, tl.float32)
            for start in range(tl.maximum(low, split * SPLIT), tl.minimum(high, (split + 1) * SPLIT), TILE):
                acc, totals, peak = _step(
                    acc, totals, peak, queries, start, cache, sight, factor, SOFT_CAP, DIM, BLOCK, TILE, WINDOW
                )
            run_acc, run_peak, run_total = _fold(run_acc, run_peak, run_total, acc, peak, tl.max(totals, 1))
    else:  # one loop: the loads of the next split are under way while this one ends
        for start in range(low, high, TILE):
            acc, totals, peak = _step(
                acc, totals, peak, queries, start, cache, sight, factor, SOFT_CAP, DIM, BLOCK, TILE, WINDOW
            )
            end = start + tl.full((), TILE, tl.int32)
            if (end % SPLIT == 0) | (end >= high):
                total = tl.max(totals, 1)  # its columns are equal
                if partials is not None:
                    max_splits = (table_width * BLOCK + SPLIT - 1) // SPLIT
                    part = (seq.to(tl.int64) * num_heads + heads) * max_splits + (end - 1) // SPLIT
                    stats = partials + num_seqs.to(tl.int64) * num_heads * max_splits * DIM + part * 2
                    tl.store(partials + (part * DIM)[:, None] + d[None, :], acc, mask=inside)
                    tl.store(stats, peak, mask=is_row)
                    tl.store(stats + 1, total, mask=is_row)
                else:
                    run_acc, run_peak, run_total = _fold(run_acc, run_peak, run_total, acc, peak, total)
                acc, totals, peak = tl.zeros_like(acc), tl.zeros_like(totals), tl.full((ROWS,), LOWEST, tl.float32)
    if partials is None:
        result = _finish(run_acc, run_peak, run_total, sinks, heads, is_row)
        tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside)


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
    positions = start + tl.arange(0, TILE)
    is_key = positions < context_len
    blocks = tl.load(table + positions // BLOCK, mask=is_key, other=0)
    slots = (blocks * BLOCK + positions % BLOCK) * tl.num_programs(1) + kv_head
    cells, inside = (slots * DIM)[:, None] + d[None, :], is_key[:, None] & (d < DIM)[None, :]
    keys = tl.load(k + cells, mask=inside, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if SOFT_CAP > 0:
        scores = SOFT_CAP * _tanh(scores * (factor / SOFT_CAP))
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


@triton.jit
def _fold_kernel(
    out,
    partials,
    sinks,
    query_starts,
    context_lens,
    max_splits,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (sequence, query head): the partials of one row, in index order."""
    seq, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    begin, num_queries = _queries_of(seq, query_starts)
    if num_queries != 1:
        return
    context_len = tl.load(context_lens + seq).to(tl.int32)
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
    at = (begin.to(tl.int64) * num_heads + head) * DIM
    tl.store(out + at + d, result.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit
def _sequence_of(number, query_starts, num_seqs, QUERIES: tl.constexpr):
    """The sequence of tile `number`, when sequence s is given the tiles from query_starts[s] // QUERIES + s on."""
    low, high = number * 0, number * 0 + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(query_starts + middle).to(tl.int32) // QUERIES + middle <= number
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _queries_of(seq, query_starts):
    """First row of the sequence, and how many it has."""
    begin = tl.load(query_starts + seq).to(tl.int32)
    return begin, tl.load(query_starts + seq + 1).to(tl.int32) - begin


@triton.jit
def _share(low, high):
    """This part's piece of the positions low … high - 1: whole splits, as evenly as they go."""
    first = low // SPLIT
    num_splits = tl.cdiv(tl.cdiv(high, SPLIT) - first, tl.num_programs(2))
    begin = (first + tl.program_id(2) * num_splits) * SPLIT
    return tl.maximum(low, begin), tl.minimum(high, begin + num_splits * SPLIT)


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
