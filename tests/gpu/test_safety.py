"""What a kernel could not survive is refused before it is launched, with the numbers that do not fit.

One table for all launchers. Nothing here is ever launched, so a missing check is a failure and not a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.emulator.gpu import EmulatedGpu
from tests.kernels.test_attention import SMALL
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels import attention
from worker_orcd.kernels.attention import FlashAttention, Form, Pages
from worker_orcd.kernels.linear.linear import Linear, TiledMatrix, tiled
from worker_orcd.kernels.linear.plan import MAX_DIMENSION, plan_linear
from worker_orcd.kernels.ops.experts import ExpertOps
from worker_orcd.kernels.ops.ops import Ops, Part, image_shape
from worker_orcd.kernels.ops.sample import sample
from worker_orcd.quant.tiles import packed_shape

Q8, META = GgmlType.Q8_0, torch.device("meta")  # memory of another device
Call = Callable[[], object]


class Launched(Exception):
    """Nothing stopped it."""


class IdleGpu(EmulatedGpu):
    def __init__(self, launches: bool = False) -> None:
        super().__init__()
        self.launches = launches  # whether to go on as if it had been done

    def launch(self, *_: Any) -> None:
        if not self.launches:
            raise Launched


GPU = IdleGpu()
OPS, LINEAR = Ops(GPU), Linear(GPU)
FLASH = FlashAttention(GPU, OPS)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = GPU.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def shifted(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Contiguous, and one element behind a multiple of 16 bytes."""
    flat = zeros(int(torch.tensor(shape).prod()) + 64, dtype=dtype)
    first = -(flat.data_ptr() // dtype.itemsize) % (16 // dtype.itemsize) + 1
    return flat[first : first + flat.numel() - 64].view(shape)


def tiles(n: int, k: int, device: torch.device = GPU.device) -> Tensor:
    return zeros(*packed_shape(Q8, (n, k)), dtype=torch.uint8, device=device)


def matrix(**changes: Any) -> TiledMatrix:
    """[64, 256], or what `changes` make of it."""
    return replace(tiled(tiles(64, 256), Q8, (64, 256)), **changes)


def image(rows: int, width: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = GPU.device) -> Tensor:
    return zeros(*image_shape(rows, width), dtype=dtype, device=device)


PRODUCTS: dict[str, tuple[str, Call]] = {
    "no inputs": ("64 x 0", lambda: plan_linear(64, 0, Q8)),
    "more rows than an int holds": (str(2**31), lambda: plan_linear(2**31, 256, Q8)),
    "rows whose tiles overflow": (str(2**31 - 1), lambda: plan_linear(2**31 - 1, 256, Q8)),
    "more slices than a grid has": (r"\d{6} slices", lambda: matrix_of_meta(16, 2**29)),
    "tiles of another shape": ("64, 512", lambda: tiled(tiles(64, 256), Q8, (64, 512))),
    "tiles of another type": ("float32", lambda: tiled(tiles(64, 256).float(), Q8, (64, 256))),
    "tiles with gaps": ("contiguous", lambda: tiled(tiles(128, 256)[::2], Q8, (64, 256))),
    "tiles off 16 bytes": (
        "16 bytes",
        lambda: tiled(shifted(*tiles(64, 256).shape, dtype=torch.uint8), Q8, (64, 256)),
    ),
    "a plan of another matrix": ("32, 256", lambda: matrix(plan=plan_linear(32, 256, Q8))),
    "more slices than tiles": ("3 slices", lambda: matrix(plan=plan_linear(64, 256, Q8, slices=3))),
    "experts that end inside a tile": ("40 rows", lambda: tiled(tiles(96, 256), Q8, (40, 256), 2)),
    "an image of another width": ("2 rows of 256", lambda: LINEAR(image(2, 512), 2, matrix())),
    "an image of fewer rows": ("9 rows of 256", lambda: LINEAR(image(8, 256), 9, matrix())),
    "an image of another type": ("float16", lambda: LINEAR(image(2, 256, torch.float16), 2, matrix())),
    "an image elsewhere": ("lies on meta", lambda: LINEAR(image(2, 256, device=META), 2, matrix())),
    "an image off 16 bytes": (
        "16 bytes",
        lambda: LINEAR(shifted(*image_shape(2, 256), dtype=torch.bfloat16), 2, matrix()),
    ),
    "tiles elsewhere": ("lies on meta", lambda: LINEAR(image(2, 256), 2, tiled(tiles(64, 256, META), Q8, (64, 256)))),
    "an image of another width than both": ("2 rows of 256", lambda: LINEAR.pair(image(2, 512), 2, *[matrix()] * 2)),
    "an image of another width than the second": (
        "2 rows of 512",
        lambda: LINEAR.pair(image(2, 256), 2, matrix(), tiled(tiles(64, 512), Q8, (64, 512))),
    ),
    "an image of fewer rows for two": ("9 rows of 256", lambda: LINEAR.pair(image(8, 256), 9, *[matrix()] * 2)),
    "an image elsewhere for two": (
        "lies on meta",
        lambda: LINEAR.pair(image(2, 256, device=META), 2, *[matrix()] * 2),
    ),
    "tiles of the second elsewhere": (
        "lies on meta",
        lambda: LINEAR.pair(image(2, 256), 2, matrix(), tiled(tiles(64, 256, META), Q8, (64, 256))),
    ),
}


def matrix_of_meta(n: int, k: int) -> TiledMatrix:
    return tiled(tiles(n, k, META), Q8, (n, k))


def route(experts: int = 8, used: int = 2, rows: int = 3) -> object:
    return ExpertOps(GPU, OPS).route([Part(zeros(1, rows, 8))], experts, used, True)


def multiplied(
    rows: Tensor | None = None, weights: TiledMatrix | None = None, bias: Tensor | None = None, count: int = 4
) -> object:
    """Three rows with two of four experts each, [64, 256]."""
    idle = IdleGpu(launches=True)
    routing = ExpertOps(idle, Ops(idle)).route([Part(zeros(1, 3, count))], count, 2, True)
    weights = weights or tiled(tiles(4 * 64, 256), Q8, (64, 256), 4)
    rows = image(routing.num_places, 256) if rows is None else rows
    given = ExpertOps(GPU, OPS).multiply(rows, weights, bias, routing)
    return ExpertOps(GPU, OPS).combine(given, routing)


EXPERTS: dict[str, tuple[str, Call]] = {
    "none used": ("0 of 8", lambda: route(used=0)),
    "more used than there are": ("9 of 8", lambda: route(used=9)),
    "too many": ("2 of 257", lambda: route(experts=257)),
    "scores of another number": ("7 columns", lambda: route(experts=7)),
    "more pairs than a grid has": ("66000", lambda: route(rows=33_000)),
    "an image of another width": (r"rows of 256", lambda: multiplied(rows=image(64, 512))),
    "an image of fewer rows": (r"rows of 256", lambda: multiplied(rows=image(8, 256))),
    "an image of another type": ("float16", lambda: multiplied(rows=image(64, 256, torch.float16))),
    "an image elsewhere": ("lies on meta", lambda: multiplied(rows=image(64, 256, device=META))),
    "tiles elsewhere": (
        "lies on meta",
        lambda: multiplied(weights=tiled(tiles(4 * 64, 256, META), Q8, (64, 256), 4)),
    ),
    "matrices of fewer experts": ("3 matrices", lambda: multiplied(weights=tiled(tiles(192, 256), Q8, (64, 256), 3))),
}


def norm(width: int, dtype: torch.dtype = torch.float32, device: torch.device = GPU.device) -> Any:
    return zeros(width, dtype=dtype, device=device), None, 1e-5


def rope(**changes: Any) -> Call:
    """Four rows; two heads of 24 numbers for q, k and v each, of which twelve rotate; two blocks of 8 tokens."""
    cache, at, angles = zeros(2, 8, 2, 24), zeros(4, dtype=torch.int64), zeros(16, 6)
    args = {"qkv": [Part(zeros(1, 4, 6 * 24))], "heads": (2, 2, 24), "norms": (None, None), "cache": (cache, cache),
            "at": (at, at), "table": (angles, angles), "interleaved": False}  # fmt: skip
    return lambda: OPS.rope_store(**(args | changes))


def embed(
    table: Tensor | None = None, shape: tuple[int, int] = (16, 128), tokens: Tensor | None = None,
    sampled: Tensor | None = None,
) -> object:  # fmt: skip
    tokens = zeros(2, dtype=torch.int64) if tokens is None else tokens
    return OPS.embed(tokens, tiles(*shape) if table is None else table, Q8, shape, sampled)


LAYER: dict[str, tuple[str, Call]] = {
    "rows of no multiple of 4": ("rows of 95", lambda: OPS.add_norm(zeros(4, 95), None, None)),
    "rows too wide": ("rows of 65540", lambda: OPS.add_norm(zeros(1, 2**16 + 4), None, norm(2**16 + 4))),
    "rows of another type": ("float16", lambda: OPS.add_norm(zeros(4, 96, dtype=torch.float16), None, norm(96))),
    "rows with gaps": ("contiguous", lambda: OPS.add_norm(zeros(96, 4).T, None, norm(96))),
    "rows elsewhere": ("lies on meta", lambda: OPS.add_norm(zeros(4, 96, device=META), None, norm(96))),
    "rows off 16 bytes": ("16 bytes", lambda: OPS.add_norm(shifted(4, 96), None, norm(96))),
    "sums of other rows": ("1, 3, 96", lambda: OPS.add_norm(zeros(4, 96), Part(zeros(1, 3, 96)), None)),
    "sums of another width": ("1, 4, 92", lambda: OPS.add_norm(zeros(4, 96), Part(zeros(1, 4, 92)), None)),
    "sums off 16 bytes": ("16 bytes", lambda: OPS.add_norm(zeros(4, 96), Part(shifted(1, 4, 96)), None)),
    "sums elsewhere": ("lies on meta", lambda: OPS.add_norm(zeros(4, 96), Part(zeros(1, 4, 96, device=META)), None)),
    "a bias of another width": (r"\[96\].*95", lambda: OPS.total([Part(zeros(1, 4, 96), zeros(95))])),
    "a norm of another width": ("rows of 96.*92", lambda: OPS.add_norm(zeros(4, 96), None, norm(92))),
    "a norm elsewhere": ("96|meta", lambda: OPS.add_norm(zeros(4, 96), None, norm(96, device=META))),
    "a norm of another type": ("float16", lambda: OPS.add_norm(zeros(4, 96), None, norm(96, torch.float16))),
    "a norm with gaps": ("contiguous", lambda: OPS.add_norm(zeros(4, 96), None, (zeros(192)[::2], None, 1e-5))),
    "a gate of no multiple of 4": ("95", lambda: OPS.activate([Part(zeros(1, 4, 190))], 95)),
    "a gate without up": ("192 columns.*96", lambda: OPS.activate([Part(zeros(1, 4, 96))], 96)),
    "gate and up cut elsewhere": ("96.*64, 128", lambda: OPS.activate([*map(Part, gate_and_up(64, 128))], 96)),
    "gate and up in three": ("96.*48, 48, 96", lambda: OPS.activate([*map(Part, gate_and_up(48, 48, 96))], 96)),
    "more rows than a grid has": ("70000", lambda: OPS.to_image(zeros(70_000, 4))),
    "more parts than there can be": ("4 columns", lambda: OPS.total([Part(zeros(1, 2, 1))] * 4)),
    "heads of an odd size": ("heads of 23", rope(heads=(2, 2, 23))),
    "heads too large": ("heads of 514", rope(heads=(2, 2, 514))),
    "more angles than pairs": ("26 rotate", rope(table=(zeros(16, 13), zeros(16, 13)))),
    "sines of another shape": ("cannot be taken", rope(table=(zeros(16, 6), zeros(16, 5)))),
    "other heads in qkv": ("120 columns", rope(heads=(1, 2, 24))),
    "a cache of other heads": ("8, 1, 24", rope(cache=(zeros(2, 8, 2, 24), zeros(2, 8, 1, 24)))),
    "a cache of another type": ("float64", rope(cache=(zeros(2, 8, 2, 24, dtype=torch.float64),) * 2)),
    "keys and values of other sizes": ("2, 8, 2, 24", rope(cache=(zeros(2, 8, 2, 24), zeros(1, 8, 2, 24)))),
    "a cache elsewhere": ("lies on meta", rope(cache=(zeros(2, 8, 2, 24, device=META),) * 2)),
    "positions of another type": ("int32", rope(at=(zeros(4, dtype=torch.int32), zeros(4, dtype=torch.int64)))),
    "fewer slots than positions": (
        "4 positions and 3 slots",
        rope(at=(zeros(4, dtype=torch.int64), zeros(3, dtype=torch.int64))),
    ),
    "fewer rows than positions": (r"1, 4, 144.*5", rope(at=(zeros(5, dtype=torch.int64),) * 2)),
    "a table of another format": ("Q8_0.*2176.*1088", lambda: embed(zeros(1, 1, 1088, dtype=torch.uint8))),
    "a table of fewer rows": (r"33, 128.*\(3, 2176\)", lambda: embed(tiles(32, 128), (33, 128))),
    "a table of another type": ("int8", lambda: embed(tiles(16, 128).view(torch.int8))),
    "a table with gaps": ("contiguous", lambda: embed(zeros(1, 4352, dtype=torch.uint8)[..., ::2])),
    "a table elsewhere": ("lies on meta", lambda: embed(tiles(16, 128, META))),
    "a table off 16 bytes": ("16 bytes", lambda: embed(shifted(1, 2176, dtype=torch.uint8))),
    "a table of no multiple of 4": ("126", lambda: embed(shape=(16, 126))),
    "tokens of another type": ("int32", lambda: embed(tokens=zeros(2, dtype=torch.int32))),
    "tokens elsewhere": ("lies on meta", lambda: embed(tokens=zeros(2, dtype=torch.int64, device=META))),
    "sampled tokens of another type": ("int32", lambda: embed(sampled=zeros(2, dtype=torch.int32))),
    "sampled tokens elsewhere": ("lies on meta", lambda: embed(sampled=zeros(2, dtype=torch.int64, device=META))),
    "tokens of two dimensions": ("2, 1", lambda: embed(tokens=zeros(2, 1, dtype=torch.int64))),
    "more tokens than a grid has": ("70000", lambda: embed(tokens=zeros(70_000, dtype=torch.int64))),
}  # fmt: skip


def gate_and_up(*widths: int) -> list[Tensor]:
    return [zeros(1, 4, width) for width in widths]


def cache(*shape: int, device: torch.device = GPU.device) -> Tensor:
    return zeros(*shape, dtype=torch.float16, device=device)


def attended(form: Form = SMALL, rows: int = 5, **changes: Any) -> Call:
    """Two sequences with 4 and 1 rows and contexts of 20 and 3, in three blocks of 16."""
    starts, lens = torch.tensor([0, rows - 1, rows]), torch.tensor([20, 3])
    sides = {"k": cache(3, 16, 2, 16), "v": cache(3, 16, 2, 16)}
    given = {"q": zeros(rows, 4, 16), "sinks": None, "out": None} | sides
    pages = {"query_starts": starts, "context_lens": lens, "block_table": zeros(2, 2, dtype=torch.int64)}
    given |= {name: value for name, value in changes.items() if name in given}
    pages |= {name: value for name, value in changes.items() if name in pages}
    return lambda: FLASH.attend(**given, pages=Pages(**pages), form=form)  # type: ignore[arg-type]


ATTENTION: dict[str, tuple[str, Call]] = {
    "other heads in q": ("5, 3, 16.*4", attended(q=zeros(5, 3, 16))),
    "heads that do not divide": ("4 .*3", attended(Form(4, 3, 16, 0.1), k=cache(3, 16, 3, 16),
                                                   v=cache(3, 16, 3, 16))),
    "heads of another size": ("24", attended(replace(SMALL, head_dim=24), q=zeros(5, 4, 24), k=cache(3, 16, 2, 24),
                                             v=cache(3, 16, 2, 24))),
    "heads too large": ("272", attended(replace(SMALL, head_dim=272), q=zeros(5, 4, 272), k=cache(3, 16, 2, 272),
                                        v=cache(3, 16, 2, 272))),
    "a scale that turns the order": ("-0.1", attended(replace(SMALL, scale=-0.1))),
    "keys and values of other sizes": ("3, 16, 2, 16.*2, 16, 2, 16", attended(v=cache(2, 16, 2, 16))),
    "keys and values of other types": ("float16.*float32", attended(v=zeros(3, 16, 2, 16))),
    "a cache of another type": ("float64", attended(k=zeros(3, 16, 2, 16, dtype=torch.float64),
                                                    v=zeros(3, 16, 2, 16, dtype=torch.float64))),
    "blocks that no split is cut into": ("24", attended(k=cache(3, 24, 2, 16), v=cache(3, 24, 2, 16))),
    "queries of another type": ("float16", attended(q=zeros(5, 4, 16, dtype=torch.float16))),
    "queries with gaps": ("contiguous", attended(q=zeros(4, 5, 16).transpose(0, 1))),
    "a cache elsewhere": ("meta", attended(k=cache(3, 16, 2, 16, device=META), v=cache(3, 16, 2, 16, device=META))),
    "sinks of other heads": ("3", attended(sinks=zeros(3))),
    "fewer starts than sequences": ("2 .*2", attended(query_starts=torch.tensor([0, 5]))),
    "a table of fewer sequences": ("1, 2", attended(block_table=zeros(1, 2, dtype=torch.int64))),
    "a table of another type": ("int32", attended(block_table=zeros(2, 2, dtype=torch.int32))),
    "lengths of another type": ("int32", attended(context_lens=torch.tensor([20, 3], dtype=torch.int32))),
    "room of another shape": ("5, 4, 16", attended(out=zeros(4, 4, 16))),
    "an image of fewer rows": ("1, 8, 64", attended(rows=9, q=zeros(9, 4, 16), out=image(8, 64))),
}  # fmt: skip


def sampled(logits: Tensor | None = None, table: Tensor | None = None, banned: Tensor | None = None) -> Call:
    given = [zeros(2, 40), zeros(6, 2, dtype=torch.float64), zeros(2, dtype=torch.int32)]
    given = [old if new is None else new for old, new in zip(given, (logits, table, banned), strict=True)]
    return lambda: sample(GPU, *given)


SAMPLE: dict[str, tuple[str, Call]] = {
    "parameters of other rows": ("6, 3.*2, 40", sampled(table=zeros(6, 3, dtype=torch.float64))),
    "a parameter too few": ("5, 2.*2, 40", sampled(table=zeros(5, 2, dtype=torch.float64))),
    "parameters of another type": ("float32", sampled(table=zeros(6, 2))),
    "bans of another vocabulary": ("3.*2, 40", sampled(banned=zeros(3, dtype=torch.int32))),
    "logits of another type": ("float16", sampled(zeros(2, 40, dtype=torch.float16))),
    "logits with gaps": ("contiguous", sampled(zeros(40, 2).T)),
    "logits elsewhere": ("lies on meta", sampled(zeros(2, 40, device=META))),
    "no vocabulary": ("2, 0", sampled(zeros(2, 0), banned=zeros(0, dtype=torch.int32))),
}
TABLE = {"products": PRODUCTS, "experts": EXPERTS, "layer": LAYER, "attention": ATTENTION, "sample": SAMPLE}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in TABLE.items() for case in cases])
def test_refused_before_a_launch(kind: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: object, **__: object) -> None:
        raise Launched

    monkeypatch.setattr(attention, "launch_prompts", launched)
    message, call = TABLE[kind][case]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_right_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the table would prove nothing."""

    def launched(*_: object, **__: object) -> None:
        raise Launched

    monkeypatch.setattr(attention, "launch_prompts", launched)
    right: list[Call] = [
        lambda: LINEAR(image(2, 256), 2, matrix()),
        lambda: LINEAR.pair(image(2, 256), 2, matrix(), matrix()),
        route,
        multiplied,
        lambda: OPS.add_norm(zeros(4, 96), Part(zeros(1, 4, 96)), norm(96)),
        lambda: OPS.activate([*map(Part, gate_and_up(96, 96))], 96),
        embed,
        rope(),
        attended(),
        sampled(),
    ]
    for call in right:
        with pytest.raises(Launched):
            call()
    assert plan_linear(MAX_DIMENSION, 256, Q8).slices == 1
