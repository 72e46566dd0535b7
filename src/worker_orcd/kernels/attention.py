"""Attention over a paged cache, in Triton: softmax(q·kᵀ·scale)·v with a running maximum (arXiv:2205.14135).

Rows: the G = Hq / Hk query heads that share a key/value head are packed with as many queries as fit into ROWS rows.
Order, the same for every row whatever its company: keys go TILE at a time; SPLIT keys, cut at multiples of SPLIT of
the absolute position, give one partial (peak, total, acc); partials are folded in index order. Keys a row may not see
leave its state as it was, bit for bit, so it does not matter which tiles its neighbours need.

    prompt  a program takes ROWS rows of one sequence through all of their splits; the grid is an upper bound made of
            host integers, and programs beyond the last row leave at once
    decode  sequences with one query. Few of them: programs share the splits of a row and write the partials, a
            second kernel folds them. Many: one program per row folds its own. Same bits. When all sequences of a
            step have one, it can begin with what comes before: add up the projection's sums, rotate, store.

Products have 16-bit operands and a float32 sum on the tensor cores (a float32 cache: plain float32); the sum of the
weights is such a product too, with a matrix of ones, because a sum over lanes would depend on how a tile is spread
over warps. Fused multiply-adds are written out and the compiler's own are off, so that both forms round alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from worker_orcd.kernels.attention_kernels import LOG2_E, SPLIT, decode_kernel, fold_kernel, prompt_kernel
from worker_orcd.kernels.attention_rotation import MOST_SLICES
from worker_orcd.kernels.driver import divide_l1
from worker_orcd.kernels.ops.ops import Part

DECODE_ROWS = 16  # the fewest rows of a tensor core product
UNROLL = 8  # partials loaded at once when they are folded
HEAD_DIM_STEP, MAX_HEAD_DIM = 16, 256
KV_TYPES = (torch.float32, torch.float16, torch.bfloat16)
PROGRAMS = 512  # decode programs wanted: as many as an H200 holds at once; measured
AHEAD = 256  # keys a program asks L2 for before it may begin; fewer where many programs would fill L2


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
    """What q, k and v are made of, for steps in which every sequence has one row: its last position.

    Slices may be columns of a contiguous tensor.
    """

    q: Part
    k: Part
    v: Part
    cos: Tensor  # f32 [context, pairs]: row p holds the angles of position p
    sin: Tensor
    is_interleaved: bool  # pairs are (2i, 2i + 1), not (i, i + pairs)

    @property
    def sums(self) -> tuple[Part, Part, Part]:
        return self.q, self.k, self.v

    @property
    def rotation(self) -> tuple[int, bool, int]:
        """Pairs that turn, whether they are interleaved, the most slices, rounded up: each is a kernel of its own."""
        most = max(len(part.slices) for part in self.sums)
        step = min(MOST_SLICES.value, triton.next_power_of_2(most))
        return self.cos.shape[1], self.is_interleaved, triton.cdiv(most, step) * step


@dataclass(frozen=True)
class Launch:
    """How a kernel is run; nothing in it changes a bit of the result."""

    rows: int
    num_warps: int
    num_stages: int
    num_parts: int = 1  # programs that share the splits of one row
    max_registers: int | None = None  # of a thread
    ahead: int = 0  # keys a decode asks L2 for before it may begin; a power of two, or 0


def attend(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, form: Form, sinks: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """q [T, Hq, D] over k, v [blocks, block_size, Hk, D] → [T, Hq, D], float32. Never waits for the device.

    sinks [Hq] f32: a logit per head that takes part in the sum of weights and has no value. `out` may be an image,
    bf16 [pieces, groups, 8, 64]: heads side by side in the order of the matmuls, zeros after the last. Raises
    ValueError before a launch that cannot be right.
    """
    _check_form(form)
    _check_cache(k, v, form)
    _check_rows(q, pages, form, sinks, out)
    _check_memory(q, (k, v), pages, [x for x in (sinks, out) if x is not None])
    call = Call(torch.empty_like(q) if out is None else out, q, k, v, pages, form, sinks)
    if q.shape[0] > call.num_seqs:
        launch_prompts(call, prompt_launch(form))
    if call.num_seqs > 1 or q.shape[0] == 1:
        launch_decodes(call, decode_launch(form, call.num_seqs, call.max_splits, k.element_size()))
    return call.out


def store_and_attend(
    made_of: Unrotated, k: Tensor, v: Tensor, pages: Pages, form: Form, sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `attend`, for rows that are first added up, rotated and stored: one kernel instead of two, the same bits.

    A sequence whose context length is 0 stores nothing. Raises ValueError before a launch that cannot be right, and
    where `can_rotate` is False.
    """
    num_seqs = len(pages.context_lens)
    _check_form(form)
    _check_cache(k, v, form)
    _check_made_of(made_of, num_seqs, form)
    q = made_of.q.slices[0].view(num_seqs, form.num_heads, form.head_dim)  # as large as the queries
    out = q.new_empty(q.shape) if out is None else out
    _check_rows(q, pages, form, sinks, out)
    biases = [part.bias for part in made_of.sums]
    others = [x for x in (made_of.sin, sinks, out, *biases) if x is not None]
    _check_memory(made_of.cos, (k, v), pages, others)
    call = Call(out, made_of, k, v, pages, form, sinks)
    launch_decodes(call, decode_launch(form, num_seqs, call.max_splits, k.element_size()))
    return out


def cut(parts: Sequence[Part], form: Form) -> tuple[Part, Part, Part] | None:
    """The sums of q, k and v, which stand side by side in one to three parts.

    None when a part ends within one of them, or has a bias and another none.
    """
    found, rest = [], list(parts)
    for heads in (form.num_heads, form.num_kv_heads, form.num_kv_heads):
        width, (slices, bias) = heads * form.head_dim, (rest[0].slices, rest[0].bias)
        if slices.shape[2] < width or (bias is None) != (parts[0].bias is None):
            return None
        found.append(Part(slices[:, :, :width], None if bias is None else bias[:width]))
        rest[:1] = [Part(slices[:, :, width:], None if bias is None else bias[width:])]
        if slices.shape[2] == width:
            del rest[0]
    return found[0], found[1], found[2]


def can_rotate(form: Form) -> bool:
    """Whether `store_and_attend` takes heads like these: a program's rows must have room for a key and a value."""
    return takes(form.head_dim) and form.group + 2 <= _decode_rows(form)


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


def _check_made_of(made_of: Unrotated, num_rows: int, form: Form) -> None:
    sums, widths = made_of.sums, [n * form.head_dim for n in (form.num_heads, form.num_kv_heads, form.num_kv_heads)]
    for part, width in zip(sums, widths, strict=True):
        slices, bias = part.slices, part.bias
        if slices.shape[1:] != (num_rows, width) or (bias is not None and bias.shape != (width,)):
            raise ValueError(f"sums {tuple(slices.shape)} for {num_rows} rows of {width} numbers, or their bias")
        row = slices.stride(1)
        if slices.dtype != torch.float32 or slices.stride() != (num_rows * row, row, 1):
            raise ValueError(f"sums of {slices.dtype}, strides {slices.stride()}: columns of float32 rows are needed")
    if len({part.bias is None for part in sums}) > 1 or not can_rotate(form):
        raise ValueError(f"biases of only some sums, or {form.group} query heads for a key head, cannot be taken")
    cos, sin = made_of.cos, made_of.sin
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > form.head_dim:
        raise ValueError(f"tables {tuple(cos.shape)} and {tuple(sin.shape)} for heads of {form.head_dim}")


def _check_cache(k: Tensor, v: Tensor, form: Form) -> None:
    if k.shape != v.shape or k.ndim != 4 or k.shape[2:] != (form.num_kv_heads, form.head_dim):
        heads = f"{form.num_kv_heads} heads of {form.head_dim}"
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} for {heads}")
    if not 0 < k.shape[1] <= SPLIT.value or SPLIT.value % k.shape[1]:
        raise ValueError(f"blocks of {k.shape[1]} tokens: a divisor of {SPLIT.value} is needed")
    if k.dtype != v.dtype or k.dtype not in KV_TYPES:
        raise ValueError(f"keys of {k.dtype} and values of {v.dtype}; one of {KV_TYPES} is needed")


def _check_rows(q: Tensor, pages: Pages, form: Form, sinks: Tensor | None, out: Tensor | None) -> None:
    starts, lens, table = pages.query_starts, pages.context_lens, pages.block_table
    if q.ndim != 3 or q.shape[1:] != (form.num_heads, form.head_dim):
        raise ValueError(f"queries {tuple(q.shape)} for {form.num_heads} heads of {form.head_dim}")
    if starts.shape != (len(lens) + 1,) or table.ndim != 2 or len(table) != len(lens):
        raise ValueError(f"{len(starts)} starts and a block table {tuple(table.shape)} for {len(lens)} sequences")
    if sinks is not None and sinks.shape != (form.num_heads,):
        raise ValueError(f"sinks {tuple(sinks.shape)} for {form.num_heads} heads")
    if out is not None and not _has_room(out, q):
        raise ValueError(f"{out.dtype} {tuple(out.shape)} has no room for {tuple(q.shape)}")


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


def _has_room(out: Tensor, q: Tensor) -> bool:
    """Whether `out` is as large as the queries, or an image of as many rows."""
    width = q.shape[1] * q.shape[2]
    if out.ndim != 4:
        return out.shape == q.shape and out.dtype == q.dtype
    if out.dtype != torch.bfloat16:
        return False
    return out.shape[0] * 64 >= width and out.shape[1] * 8 >= len(q) and out.shape[2:] == (8, 64)


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
        return len(self.pages.context_lens)

    @property
    def max_splits(self) -> int:
        """Partials of the longest sequence the block table has room for."""
        positions = self.pages.block_table.shape[1] * self.k.shape[1]
        return triton.cdiv(positions, SPLIT.value)  # type: ignore[no-any-return]


def prompt_launch(form: Form) -> Launch:
    stages = 5 if form.head_dim <= 64 else 3
    return Launch(max(64, triton.next_power_of_2(form.group)), 4 if form.head_dim <= 128 else 8, stages)


def decode_launch(form: Form, num_seqs: int, max_splits: int, itemsize: int = 2) -> Launch:
    """itemsize: bytes of a number in the cache. `benchmarks/bench_attention.py --sweep` compares it with others.

    A stage goes to the block table, which must be there before the keys it leads to: with 3 stages the next tile is
    asked for once this one is used up, with 5 meanwhile. Few programs need that; many hide each other's waits, and
    the more of them a multiprocessor holds the better: with 128 registers a thread PROGRAMS of four warps are one
    wave. Beyond that two warps do for each.
    """
    rows = _decode_rows(form)
    num_parts = max(1, min(max_splits, PROGRAMS // (num_seqs * form.num_kv_heads)))
    programs, is_narrow = num_seqs * form.num_kv_heads * num_parts, form.head_dim <= 128
    if programs > PROGRAMS:
        return Launch(rows, 2 if is_narrow else 4, 3, num_parts, ahead=AHEAD // 4)
    if programs > PROGRAMS // 2:
        return Launch(rows, 4, 3, num_parts, 128 if is_narrow and rows == DECODE_ROWS else None, AHEAD // 4)
    fits = rows <= 2 * DECODE_ROWS and itemsize <= 2  # two more tiles in the 99 KiB that the smaller GPUs have
    return Launch(rows, 4, 5 if fits else 3, num_parts, ahead=AHEAD if programs <= PROGRAMS // 4 else AHEAD // 2)


def _decode_rows(form: Form) -> int:
    return max(DECODE_ROWS, triton.next_power_of_2(form.group))  # type: ignore[no-any-return]


def launch_prompts(call: Call, launch: Launch) -> None:
    """Rows of all sequences that have more than one."""
    assert isinstance(call.q, Tensor)
    num_tiles = call.q.shape[0] // (launch.rows // call.form.group) + call.num_seqs
    _launch(prompt_kernel, call, launch, (num_tiles, call.form.num_kv_heads, 1), (call.num_seqs,), ())


def launch_decodes(call: Call, launch: Launch) -> None:
    """The rows of all sequences that have exactly one."""
    form, partials = call.form, None
    if launch.num_parts > 1:
        partials = call.out.new_empty(partial_elems(form, call.num_seqs, call.max_splits), dtype=torch.float32)
    grid = call.num_seqs, form.num_kv_heads, launch.num_parts
    rotation = None if isinstance(call.q, Tensor) else call.q.rotation
    _launch(decode_kernel, call, launch, grid, (partials,), (launch.ahead, rotation))
    if partials is not None:
        pages, overlaps = call.pages, _overlaps(call.out.device)
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


def _launch(
    kernel: Any,
    call: Call,
    launch: Launch,
    grid: tuple[int, int, int],
    own: tuple[Any, ...],
    own_constants: tuple[Any, ...],
) -> None:
    """`own`: the integers or partials that only this kernel takes, after what both have; likewise constants."""
    pages, form, overlaps = call.pages, call.form, _overlaps(call.out.device)
    q = call.q if isinstance(call.q, Tensor) else _argument(call.q)
    launched = kernel[grid](
        *(call.out, q, call.k, call.v, call.sinks),
        *(pages.query_starts, pages.context_lens, pages.block_table, *own),
        *(pages.block_table.shape[1], call.image_groups),
        form.scale if form.soft_cap else form.scale * LOG2_E.value,
        *(form.soft_cap, form.group, form.head_dim, call.k.shape[1], form.window, launch.rows),
        *(call.image_pad, overlaps, *own_constants),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.max_registers,
        enable_fp_fusion=False,
        launch_pdl=overlaps,
    )
    if overlaps:
        divide_l1(launched.function)


def _argument(made_of: Unrotated) -> tuple[Any, ...]:
    """As the kernel takes it."""
    sums = ((part.slices, part.bias, part.slices.stride(1), len(part.slices)) for part in made_of.sums)
    tables = (made_of.cos, made_of.sin) if made_of.cos.shape[1] else (None, None)
    return (*sums, *tables)
