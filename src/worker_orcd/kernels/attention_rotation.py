"""What attention of decodes does before it reads a key: it asks L2 for keys, adds up, rotates and stores its own."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl

MOST_SLICES = tl.constexpr(8)  # fetched at once


@triton.jit
def fetch_ahead(k, v, table, low, high, DIM: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Ask L2 for the keys and values at low … high - 1, AHEAD at most. It keeps one just being written up to date."""
    LINE: tl.constexpr = 1024 // k.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    positions = low + tl.arange(0, AHEAD)
    is_key = positions < high
    blocks = tl.load(table + positions // BLOCK, mask=is_key, other=0, cache_modifier=".cg")
    rows = (blocks * BLOCK + positions % BLOCK) * tl.num_programs(1) + tl.program_id(1)
    d = tl.arange(0, triton.next_power_of_2(triton.cdiv(DIM, LINE))) * LINE
    cells, inside = (rows * DIM)[:, None] + d[None, :], is_key[:, None] & (d < DIM)[None, :]
    _prefetch(k + cells, inside)
    _prefetch(v + cells, inside)


@triton.jit
def _prefetch(pointers, mask):
    code: tl.constexpr = "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.s32 $0, 0;}"
    tl.inline_asm_elementwise(code, "=r,l,r", [pointers, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1)


@triton.jit
def known(
    parts, table, position, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROTATION: tl.constexpr
):  # fmt: skip
    """What `make` can have before there are sums: where they lie, biases, angles [D], the key's place in the cache.

    Each of q, k and v is (slices, bias, width of a row, number of slices). A sine has the sign with which the partner
    in a pair is added.
    """
    PAIRS: tl.constexpr = ROTATION[0]
    q, k, v, cos, sin = parts[0], parts[1], parts[2], parts[3], parts[4]
    rows, d, inside = _places(GROUP, DIM)
    kv_head = tl.program_id(1)
    first = tl.where(rows < GROUP, kv_head * GROUP + rows, kv_head) * DIM
    width = _of_rows(rows, q[2], k[2], v[2], GROUP).to(tl.int64)
    slices = _of_rows(rows, q[0], k[0], v[0], GROUP) + (tl.program_id(0) * width + first)
    source = slices, tl.num_programs(0) * width, _of_rows(rows, q[3], k[3], v[3], GROUP)
    bias = tl.zeros(inside.shape, tl.float32)
    if q[1] is not None:
        biases = _of_rows(rows, q[1], k[1], v[1], GROUP) + first
        bias = tl.load(biases[:, None] + d[None, :], mask=inside, other=0.0)
    cosine, sine = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    if PAIRS:
        pair, is_first = (d // 2, d % 2 == 0) if ROTATION[1] else (d % PAIRS, d < PAIRS)
        at, is_turned = position.to(tl.int64) * PAIRS + pair, d < 2 * PAIRS
        cosine = tl.load(cos + at, mask=is_turned, other=0.0)
        sine = tl.load(sin + at, mask=is_turned, other=0.0) * tl.where(is_first, -1.0, 1.0)  # 0 - x is no -0
    block = tl.load(table + position // BLOCK, cache_modifier=".cg").to(tl.int64)
    place = ((block * BLOCK + position % BLOCK) * tl.num_programs(1) + kv_head) * DIM
    return source, bias, cosine, sine, place


@triton.jit
def make(facts, GROUP: tl.constexpr, DIM: tl.constexpr, ROTATION: tl.constexpr):
    """The rotated queries of this key/value head, its rotated key, its value: GROUP + 2 rows, and some of zeros.

    Sums are added up slice by slice from +0 on, the bias last, and every product and every sum is rounded, all as
    rope_store in ops/rows.cu does. Numbers beyond the pairs that turn pass. Returns the place in the cache, too.
    """
    PAIRS: tl.constexpr = ROTATION[0]
    SLICES: tl.constexpr = ROTATION[2]
    AT_ONCE: tl.constexpr = min(SLICES, MOST_SLICES)
    source, bias, cosine, sine, place = facts
    at, step, count = source
    rows, d, inside = _places(GROUP, DIM)
    own = tl.zeros(inside.shape, tl.float32)
    for start in tl.static_range(0, SLICES, AT_ONCE):
        found = ()  # first all are asked for, then added
        for i in tl.static_range(AT_ONCE):
            is_there = inside & (start + i < count)[:, None]
            found += (tl.load(at[:, None] + d[None, :], mask=is_there, other=0.0),)  # type: ignore[assignment]
            at += step
        for i in tl.static_range(AT_ONCE):
            own += found[i]
    own += bias
    if PAIRS:
        partner = d ^ 1 if ROTATION[1] else tl.where(d < 2 * PAIRS, (d + PAIRS) % (2 * PAIRS), d)
        other = tl.gather(own, tl.broadcast_to(partner[None, :], own.shape), 1)
        turned = own * cosine[None, :] + other * sine[None, :]
        own = tl.where((rows <= GROUP)[:, None] & (d < 2 * PAIRS)[None, :], turned, own)
    return own, place


@triton.jit
def _places(GROUP: tl.constexpr, DIM: tl.constexpr):
    """Rows of `make`, numbers of a row, and which of all there are."""
    rows, d = tl.arange(0, triton.next_power_of_2(GROUP + 2)), tl.arange(0, triton.next_power_of_2(DIM))
    return rows, d, (rows < GROUP + 2)[:, None] & (d < DIM)[None, :]


@triton.jit
def _of_rows(rows, q, k, v, GROUP: tl.constexpr):
    return tl.where(rows < GROUP, q, tl.where(rows == GROUP, k, v))


@triton.jit
def store_made(made, k, v, place, GROUP: tl.constexpr, DIM: tl.constexpr):
    """The key and the value among the rows of `make` go to the cache."""
    rows, d = tl.arange(0, made.shape[0]), tl.arange(0, made.shape[1])
    is_new = ((rows == GROUP) | (rows == GROUP + 1))[:, None] & (d < DIM)[None, :]
    tl.store(tl.where(rows == GROUP, k, v)[:, None] + (place + d)[None, :], made, mask=is_new)
