"""Attention over a paged cache: softmax(q·kᵀ·scale)·v with a running maximum (arXiv:2205.14135).

Rows: query heads that share a key/value head are packed, with as many queries as fit, into the rows of a tile. Order,
the same for every row whatever its company: keys go TILE at a time; SPLIT keys, cut at multiples of SPLIT of the
absolute position, give one partial (peak, total, acc); partials are folded in index order. Keys a row may not see
leave its state as it was, bit for bit, so it does not matter which tiles its neighbours need.

    prompt  in Triton: a program takes a tile of rows of one sequence through all of their splits; the grid is an
            upper bound made of host integers, and programs beyond the last row leave at once
    decode  ops/decode.cu: sequences with one query. Few of them: blocks share the splits of a row and write the
            partials, another kernel folds them. Many: one block per row folds its own. When all sequences of a step
            have one, it can begin with what comes before: add up the projection's sums, rotate, store.

Both give a row the same bits. Products have 16-bit operands and a float32 sum on the tensor cores; the sum of the
weights is such a product too, with a matrix of ones, because a sum over lanes would depend on how a tile is spread
over warps. Fused multiply-adds are written out and the compiler's own are off, so that both round alike.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product

import torch
import triton
from torch import Tensor

from worker_orcd.kernels.attention_kernels import LOG2_E, SPLIT, fold_kernel, prompt_kernel
from worker_orcd.kernels.driver import Argument, divide_l1
from worker_orcd.kernels.gpu import Card, Gpu, Work
from worker_orcd.kernels.linear.plan import BLOCK_RESERVE, MULTIPROCESSORS
from worker_orcd.kernels.ops.ops import KV_BITS, Ops, Part, rope_source, slices_ahead
from worker_orcd.kernels.source import Source, defined

DECODE_ROWS = 8  # query heads of a block
UNROLL = 8  # partials loaded at once when they are folded
HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 256
WIDE_HEAD = 128  # numbers; beyond, tiles have half as many keys
KV_TYPES = (torch.float16, torch.bfloat16)
PROGRAMS = 512  # decode blocks wanted
SHARED_PER_SM = 227 * 1024  # bytes, of which blocks of a multiprocessor take a part each
MOST_SLOTS = 8  # a split of keys and values
MOST_SEQS, SAMPLE_SPLITS = 256, (1, 2, 4, 16, 64, 512)  # that meet every launch
MOST_WARPS, FEW_BLOCKS = 4, 4  # of a block; on a multiprocessor, as decode.cu sees to


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


@dataclass(frozen=True)
class Pages:
    """Where each sequence's keys lie. Sequence s owns rows query_starts[s] … query_starts[s+1] - 1, at least one.

    They are its last positions in order. A sequence whose context length is 0 is padding: its row becomes zeros.
    """

    query_starts: Tensor  # i64 [S + 1]
    context_lens: Tensor  # i64 [S], this step's rows included
    block_table: Tensor  # i64 [S, blocks], contiguous


@dataclass(frozen=True)
class Unrotated:
    """What q, k and v are made of, for steps in which every sequence has one row: its last position."""

    sums: Sequence[Part]  # of q, k and v side by side
    cos: Tensor  # f32 [context, pairs]: row p holds the angles of position p
    sin: Tensor
    is_interleaved: bool  # pairs are (2i, 2i + 1), not (i, i + pairs)


@dataclass(frozen=True)
class PromptLaunch:
    """How a kernel is run; nothing in it changes a bit of the result."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeLaunch:
    """How a kernel is run; nothing in it changes a bit of the result."""

    num_warps: int  # of a block
    num_slots: int  # tiles of keys or values on their way or at work
    num_parts: int = 1  # blocks that share the splits of one row
    is_whole: bool = False  # a block has one split, and a slot for each of its tiles: all at once


@dataclass(frozen=True)
class Call:
    """The arguments of one `attend` or `store_and_attend`, and where its result goes."""

    out: Tensor
    q: Tensor | Unrotated
    k: Tensor
    v: Tensor
    pages: Pages
    form: Form
    sinks: Tensor | None

    @property
    def image_groups(self) -> int:
        """Groups of 8 tokens when the result is an image; 0 when it is rows."""
        return self.out.shape[1] if self.out.ndim == 4 else 0

    @property
    def image_pad(self) -> int:
        """Columns of an image that no head fills."""
        return self.out.shape[0] * 64 - self.form.num_heads * self.form.head_dim if self.out.ndim == 4 else 0

    @property
    def num_seqs(self) -> int:
        return self.pages.context_lens.shape[0]

    @property
    def max_splits(self) -> int:
        """Partials of the longest sequence the block table has room for."""
        positions = self.pages.block_table.shape[1] * self.k.shape[1]
        return triton.cdiv(positions, SPLIT.value)  # type: ignore[no-any-return]

    @property
    def factor(self) -> float:
        """Of scores: to the base 2 unless there is a soft cap, else divided by it."""
        form = self.form
        return form.scale / form.soft_cap if form.soft_cap else form.scale * LOG2_E.value

    @property
    def numbers(self) -> ctypes.Structure:
        """As decode.cu takes them."""
        form, half, is_interleaved = self.form, 0, False
        if isinstance(self.q, Unrotated):
            half, is_interleaved = self.q.cos.shape[1], self.q.is_interleaved
        table_width = self.pages.block_table.shape[1]
        integers = form.num_heads, form.num_kv_heads, form.window, table_width, half, is_interleaved
        return _Numbers(*integers, self.image_groups, self.image_pad, self.factor, form.soft_cap)


class _Numbers(ctypes.Structure):
    _fields_ = (*((f"i{n}", ctypes.c_int) for n in range(8)), ("factor", ctypes.c_float), ("cap", ctypes.c_float))


class FlashAttention:
    """The kernels on one GPU."""

    def __init__(self, gpu: Gpu, ops: Ops) -> None:
        self._gpu, self._ops = gpu, ops
        self._begun = set[tuple[Form, torch.dtype, int]]()  # those whose decodes are being compiled

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Pages, form: Form, sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q [T, Hq, D] over k, v [blocks, block_size, Hk, D] → [T, Hq, D], float32. Never waits for the device.

        sinks [Hq] f32: a logit per head that takes part in the sum of weights and has no value. `out` may be an
        image, bf16 [pieces, groups, 8, 64]: heads side by side in the order of the matmuls, zeros after the last.
        Raises ValueError before a launch that cannot be right.
        """
        _check_form(form)
        _check_cache(k, v, form)
        if q.shape[1:] != (form.num_heads, form.head_dim) or q.ndim != 3:
            raise ValueError(f"queries {tuple(q.shape)} for {form.num_heads} heads of {form.head_dim}")
        _check_rows(q.shape, pages, form, sinks, out)
        _check_memory(q, (k, v), pages, [x for x in (sinks, out) if x is not None])
        self._gpu.require(k, v, dtype=k.dtype)  # decodes copy 16 bytes at a time
        call = Call(torch.empty_like(q) if out is None else out, q, k, v, pages, form, sinks)
        if q.shape[0] > call.num_seqs:
            launch_prompts(call, prompt_launch(form))
        if call.num_seqs > 1 or q.shape[0] == 1:
            self.launch_decodes(call, decode_launch(form, call.num_seqs, call.max_splits, self._gpu.card))
        return call.out

    def store_and_attend(
        self, made_of: Unrotated, k: Tensor, v: Tensor, pages: Pages, form: Form, sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `attend`, for rows that are first added up, rotated and stored: one kernel for two, the same bits.

        A sequence whose context length is 0 stores nothing. Raises ValueError before a launch that cannot be right.
        """
        cos, sin, num_seqs = made_of.cos, made_of.sin, pages.context_lens.shape[0]
        _check_form(form)
        _check_cache(k, v, form)
        if cos.ndim != 2 or cos.shape != sin.shape or not can_rotate(form.head_dim, cos.shape[1]):
            raise ValueError(f"tables {tuple(cos.shape)} and {tuple(sin.shape)} for heads of {form.head_dim}")
        shape = num_seqs, form.num_heads, form.head_dim
        out = cos.new_empty(shape) if out is None else out
        _check_rows(shape, pages, form, sinks, out)
        _check_memory(cos, (k, v), pages, [x for x in (sin, sinks, out) if x is not None])
        self._gpu.require(k, v, dtype=k.dtype)
        call = Call(out, made_of, k, v, pages, form, sinks)
        self.launch_decodes(call, decode_launch(form, num_seqs, call.max_splits, self._gpu.card))
        return out

    def launch_decodes(self, call: Call, launch: DecodeLaunch) -> None:
        """The rows of all sequences that have exactly one."""
        form, partials, made_of = call.form, None, call.q
        if launch.num_parts > 1:
            partials = call.out.new_empty(partial_elems(form, call.num_seqs, call.max_splits), dtype=torch.float32)
        begin: list[Argument]
        if isinstance(made_of, Unrotated):
            width = (form.num_heads + 2 * form.num_kv_heads) * form.head_dim
            begin = [self._ops.sums(made_of.sums, call.num_seqs, width), made_of.cos, made_of.sin]
            half, ahead = made_of.cos.shape[1], slices_ahead(made_of.sums)
        else:
            begin, half, ahead = [made_of], 0, 0
        pages = call.pages
        args: list[Argument] = [call.out, *begin, call.k, call.v, call.sinks]
        args += [pages.query_starts, pages.context_lens, pages.block_table, partials, call.numbers]
        grid = call.num_seqs, form.num_kv_heads * triton.cdiv(form.group, DECODE_ROWS), launch.num_parts
        work = Work(grid, 32 * launch.num_warps, shared_bytes(form, launch, half))
        self._begin(call, ahead)
        source = decode_source(form.head_dim, call.k.dtype, call.k.shape[1], launch, ahead)
        self._gpu.launch(source, "decode", work, args)
        if partials is not None:
            _launch_fold(call, partials)

    def _begin(self, call: Call, ahead: int) -> None:
        """Begin to compile for what will come, and hold up a step then: other decodes, prompts of few rows."""
        if (key := (call.form, call.k.dtype, ahead)) in self._begun:
            return
        self._begun.add(key)
        if isinstance(q := call.q, Unrotated):
            self._gpu.compile_ahead(rope_source(q.sums, call.form.head_dim, call.k.dtype, q.is_interleaved))
        coming = product(range(1, MOST_SEQS + 1), SAMPLE_SPLITS)
        launches = {replace(decode_launch(call.form, *n, self._gpu.card), num_parts=1) for n in coming}
        for launch, slices in product(launches, {ahead, min(ahead, 1)}):
            self._gpu.compile_ahead(decode_source(call.form.head_dim, call.k.dtype, call.k.shape[1], launch, slices))


@lru_cache(maxsize=256)
def decode_source(head_dim: int, dtype: torch.dtype, block_size: int, launch: DecodeLaunch, ahead: int) -> Source:
    """dtype: of the cache; ahead: slices of sums fetched at once, 0: queries are there already."""
    options = defined(DIM=head_dim, KV_BITS=KV_BITS[dtype], BLOCK=block_size)
    options += defined(WARPS=launch.num_warps, SLOTS=launch.num_slots, IS_WHOLE=int(launch.is_whole))
    return Source("ops", "decode.cu", (*options, *defined(ROTATED=int(ahead > 0), AHEAD=ahead)))


def shared_bytes(form: Form, launch: DecodeLaunch, half: int = 0) -> int:
    """Of a block of decode.cu; `half` pairs of a head turn."""
    stride, tile, warps = 2 * form.head_dim + 16, _tile(form.head_dim), launch.num_warps
    shared = (launch.num_slots * tile + DECODE_ROWS) * stride + 4 * form.head_dim
    if warps > 1:  # weights and peaks
        shared += (16 * tile + 4 * warps * DECODE_ROWS) * (SPLIT.value // tile if launch.is_whole else 1)
    return shared + 4 * (-(-2 * half // 4) * 4 + (min(DECODE_ROWS, form.group) + 2) * form.head_dim)


def _tile(head_dim: int) -> int:
    return 64 if head_dim <= WIDE_HEAD else 32


def can_rotate(head_dim: int, num_pairs: int) -> bool:
    """Whether `store_and_attend` takes heads of which so many pairs turn."""
    return takes(head_dim) and 2 * num_pairs <= head_dim and num_pairs % 2 == 0


def takes(head_dim: int) -> bool:
    """Whether heads are of a size that the tensor cores can take."""
    return 0 < head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0


def _check_form(form: Form) -> None:
    dim, heads, kv_heads = form.head_dim, form.num_heads, form.num_kv_heads
    if not takes(dim):
        raise ValueError(f"heads of {dim} numbers: a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM} is needed")
    if min(heads, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads")
    if not form.scale > 0:
        raise ValueError(f"a scale of {form.scale}: it must be above 0")


def _check_cache(k: Tensor, v: Tensor, form: Form) -> None:
    if k.shape != v.shape or k.ndim != 4 or k.shape[2:] != (form.num_kv_heads, form.head_dim):
        heads = f"{form.num_kv_heads} heads of {form.head_dim}"
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} for {heads}")
    if not 0 < k.shape[1] <= SPLIT.value or SPLIT.value % k.shape[1]:
        raise ValueError(f"blocks of {k.shape[1]} tokens: a divisor of {SPLIT.value} is needed")
    if k.dtype != v.dtype or k.dtype not in KV_TYPES:
        raise ValueError(f"keys of {k.dtype} and values of {v.dtype}; one of {KV_TYPES} is needed")


def _check_rows(shape: tuple[int, ...], pages: Pages, form: Form, sinks: Tensor | None, out: Tensor | None) -> None:
    """shape: of the queries, [T, Hq, D]."""
    starts, lens, table = pages.query_starts, pages.context_lens, pages.block_table
    num_seqs = lens.shape[0]
    if starts.shape != (num_seqs + 1,) or table.ndim != 2 or table.shape[0] != num_seqs:
        raise ValueError(f"{len(starts)} starts and a block table {tuple(table.shape)} for {num_seqs} sequences")
    if sinks is not None and sinks.shape != (form.num_heads,):
        raise ValueError(f"sinks {tuple(sinks.shape)} for {form.num_heads} heads")
    if out is not None and not _has_room(out, shape):
        raise ValueError(f"{out.dtype} {tuple(out.shape)} has no room for {tuple(shape)}")


def _check_memory(q: Tensor, cache: tuple[Tensor, Tensor], pages: Pages, others: list[Tensor]) -> None:
    integers = (pages.query_starts, pages.context_lens, pages.block_table)
    if q.dtype != torch.float32 or any(x.dtype != torch.int64 for x in integers):
        raise ValueError(
            f"queries of {q.dtype} and integers of {[x.dtype for x in integers]}; float32 and int64 are needed"
        )
    for x in (*cache, *integers, *others):
        if x.device != q.device:
            raise ValueError(f"a tensor lies on {x.device}, not on {q.device}")
    if not all(x.is_contiguous() for x in (q, *cache, *integers, *others)):
        raise ValueError("queries, cache and integers must be contiguous")


def _has_room(out: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `out` is as large as the queries, or an image of as many rows."""
    num_rows, num_heads, head_dim = shape
    if out.ndim != 4:
        return out.shape == shape and out.dtype == torch.float32
    if out.dtype != torch.bfloat16:
        return False
    return out.shape[0] * 64 >= num_heads * head_dim and out.shape[1] * 8 >= num_rows and out.shape[2:] == (8, 64)


@lru_cache(maxsize=64)
def prompt_launch(form: Form) -> PromptLaunch:
    stages = 5 if form.head_dim <= 64 else 3
    return PromptLaunch(max(64, triton.next_power_of_2(form.group)), 4 if form.head_dim <= WIDE_HEAD else 8, stages)


@lru_cache(maxsize=4096)
def decode_launch(form: Form, num_seqs: int, max_splits: int, card: Card) -> DecodeLaunch:
    """`benchmarks/bench_attention.py --sweep` compares it with others.

    Few blocks: several warps each, and room for a split of keys and values at once. Many: as many blocks on a
    multiprocessor as its shared memory holds with two tiles each.
    """
    rows = num_seqs * form.num_kv_heads
    num_parts = max(1, min(max_splits, PROGRAMS // rows))
    per_sm = triton.cdiv(rows * triton.cdiv(form.group, DECODE_ROWS) * num_parts, MULTIPROCESSORS)
    room = min(card.shared_bytes, SHARED_PER_SM // per_sm - BLOCK_RESERVE)
    warps = min(MOST_WARPS, _tile(form.head_dim) // 16) if per_sm <= FEW_BLOCKS else 2
    has_all = warps > 1 and MOST_SLOTS * _tile(form.head_dim) == 2 * SPLIT.value and num_parts == max_splits
    wanted = DecodeLaunch(warps, MOST_SLOTS, num_parts, has_all), DecodeLaunch(warps, 4, num_parts)
    fitting = (launch for launch in wanted if shared_bytes(form, launch, form.head_dim // 2) <= room)
    return next(fitting, DecodeLaunch(warps, 2, num_parts))


def launch_prompts(call: Call, launch: PromptLaunch) -> None:
    """Rows of all sequences that have more than one."""
    pages, form, overlaps = call.pages, call.form, _overlaps(call.out.device)
    assert isinstance(call.q, Tensor)
    num_tiles = call.q.shape[0] // (launch.rows // form.group) + call.num_seqs
    launched = prompt_kernel[(num_tiles, form.num_kv_heads, 1)](
        *(call.out, call.q, call.k, call.v, call.sinks),
        *(pages.query_starts, pages.context_lens, pages.block_table, call.num_seqs),
        *(pages.block_table.shape[1], call.image_groups, call.factor),
        *(form.soft_cap, form.group, form.head_dim, call.k.shape[1], form.window, launch.rows),
        *(call.image_pad, overlaps),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,
        launch_pdl=overlaps,
    )
    if overlaps:
        divide_l1(launched.function)


def _launch_fold(call: Call, partials: Tensor) -> None:
    pages, form, overlaps = call.pages, call.form, _overlaps(call.out.device)
    kernel = fold_kernel[(call.num_seqs, form.num_heads)](
        *(call.out, partials, call.sinks, pages.query_starts, pages.context_lens, call.max_splits),
        *(call.image_groups, form.head_dim, form.window, UNROLL, call.image_pad, overlaps),
        num_warps=1,
        enable_fp_fusion=False,
        launch_pdl=overlaps,
    )
    if overlaps:
        divide_l1(kernel.function)


def partial_elems(form: Form, num_seqs: int, max_splits: int) -> int:
    """float32 numbers of workspace: acc [S, Hq, splits, D], then peak and total [S, Hq, splits, 2]."""
    return num_seqs * form.num_heads * max_splits * (form.head_dim + 2)


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended: on GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
