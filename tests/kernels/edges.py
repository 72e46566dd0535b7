"""Every kernel at shapes that end inside a tile, a few launches each; to be run under compute-sanitizer.

compute-sanitizer --tool memcheck python -m tests.kernels.edges [FORMAT ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from tests.kernels.test_attention import FLASH, SMALL, Sums, build, pages_of, run, unrotated
from tests.kernels.test_linear import check_variants
from tests.kernels.weights import random_raw
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.attention import Form
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import Linear, TiledMatrix, tiled
from worker_orcd.kernels.ops.experts import ExpertOps, Routing
from worker_orcd.kernels.ops.ops import Ops, Part
from worker_orcd.kernels.ops.sample import banned_bits, sample
from worker_orcd.quant import tiles
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.repack import pack
from worker_orcd.quant.tiles import TILE_K

FORMS = (
    (replace(SMALL, window=40), True),
    (Form(7, 1, 80, 0.1, soft_cap=2.0), False),
    (Form(2, 1, 256, 0.1), True),
    (Form(2, 2, 96, 0.1), False),
)


class Edges:
    def __init__(self, gpu: Gpu, widest: int, most_rows: int) -> None:
        """Matrices of up to about `widest` rows; operands of up to `most_rows`."""
        self.gpu, self.widest, self.most_rows = gpu, widest, most_rows
        self.ops = Ops(gpu)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.gpu.device)

    def matrix(self, kind: GgmlType, n: int, k: int, count: int = 1) -> TiledMatrix:
        raw = random_raw(kind, n * count, k, str(self.gpu.device))
        return tiled(pack(raw, kind, (n * count, k)), kind, (n, k), count)

    def products(self, kind: GgmlType) -> None:
        """Every format: as planned, in every variant, as experts, and rows for an embedding."""
        k = 512 if kind.block_elems == 256 else 416
        linear = Linear(self.gpu)
        for n in (1, self.widest):
            matrix = self.matrix(kind, n, k)
            for num_rows in (1, 9, 33, 130, 300):
                if num_rows <= self.most_rows:
                    image = self.ops.to_image(self.random(num_rows, k))
                    sums = Part(linear(image, num_rows, matrix), self.random(n))
                    assert self.ops.total([sums]).isfinite().all()
            rows = torch.tensor([n - 1, 0, n // 2], device=self.gpu.device)
            assert self.ops.embed(rows, matrix.tiles, kind, (n, k)).isfinite().all()
        self.halves(kind)
        self.pair(kind, k)
        if self.gpu.card.has_wgmma:
            check_variants(kind, (136, 1024), 3, self.gpu)
            self.up(kind, k)
        self.experts(kind, k)

    def halves(self, kind: GgmlType) -> None:
        """Strips that end with half a tile, as a vocabulary's do."""
        with patch.object(tiles, "MANY_ROWS", 1):
            matrix = self.matrix(kind, self.widest, 192 if TILE_K[kind] == 128 else 256)
            rows = torch.tensor([self.widest - 1], device=self.gpu.device)
            assert self.ops.embed(rows, matrix.tiles, kind, matrix.shape).isfinite().all()
        for num_rows in (1, 9, 33):
            if num_rows <= self.most_rows:
                image = self.ops.to_image(self.random(num_rows, matrix.shape[1]))
                assert Linear(self.gpu)(image, num_rows, matrix).isfinite().all()

    def up(self, kind: GgmlType, k: int) -> None:
        """Products that leave activated: as a matrix, and as experts."""
        matrix, experts = self.matrix(kind, 2 * 192, k), ExpertOps(self.gpu, self.ops)
        matrix = replace(matrix, plan=replace(matrix.plan, slices=1))
        for num_rows in (17, 130, 300):
            image = self.ops.to_image(self.random(num_rows, k))
            found = Linear(self.gpu).up(image, num_rows, matrix, self.random(2 * 192), "silu")
            assert found is None or found[:, : num_rows // 8].isfinite().all()
            routing = experts.route([Part(self.random(1, num_rows, 5))], 5, 3, over_chosen=True)
            many, bias = self.matrix(kind, 2 * 192, k, 5), self.random(5 * 2 * 192)
            experts.up(experts.spread(image, routing), many, bias, routing, "clamped")

    def pair(self, kind: GgmlType, k: int) -> None:
        """Beside the smallest matrix of another format."""
        first, second = self.matrix(kind, self.widest, k), self.matrix(GgmlType.Q8_0, 1, k)
        for num_rows in (1, 9):
            sums = Linear(self.gpu).pair(self.ops.to_image(self.random(num_rows, k)), num_rows, first, second)
            assert all(y.isfinite().all() for y in sums)

    def routing(self, num_rows: int) -> Routing:
        return ExpertOps(self.gpu, self.ops).route([Part(self.random(1, num_rows, 5))], 5, 3, num_rows == 9)

    def experts(self, kind: GgmlType, k: int) -> None:
        experts, matrix = ExpertOps(self.gpu, self.ops), self.matrix(kind, 48, k, 5)
        for num_rows in (1, 9, 70):
            if num_rows > self.most_rows:
                continue
            routing = self.routing(num_rows)
            image = experts.spread(self.ops.to_image(self.random(num_rows, k)), routing)
            given = experts.multiply(image, matrix, self.random(5 * 48), routing)
            assert experts.combine(given, routing).isfinite().all()
            self.ops.activate([given, given], 48, "clamped")
        self.made(kind, k)

    def made(self, kind: GgmlType, k: int) -> None:
        """Operands of one row that products make: of a matrix, and of experts."""
        experts, routing = ExpertOps(self.gpu, self.ops), self.routing(1)
        for slices in (1, 2):
            matrix, many = self.matrix(kind, 136, k), self.matrix(kind, 48, k, 5)
            matrix = replace(matrix, plan=replace(matrix.plan, slices=slices))
            gate_up = [Part(self.random(3, 1, k), self.random(k)), Part(self.random(2, 1, k))]
            sums = Linear(self.gpu).of_sums(gate_up, "silu", True, matrix)
            assert sums is not None
            assert self.ops.total([Part(sums)]).isfinite().all()
            places = Part(self.random(slices, routing.num_places, 2 * k), self.random(5 * 2 * k), routing.experts)
            given = experts.of_sums([places], "clamped", many, None, routing)
            assert given is not None
            assert experts.combine(given, routing).isfinite().all()

    def layer(self) -> None:
        """What stands between the products."""
        for width in (36, 2052):
            x, y, weight = self.random(5, width), self.random(3, 5, width), self.random(width)
            self.ops.add_norm(x, Part(y, weight), (weight, weight, 1e-5), (weight, None, 1e-5))
            self.ops.activate([Part(y), Part(y, weight)], width)
            self.ops.activate([Part(y)], width, "gelu", is_gated=False)
        self.ops.to_image(self.random(9, 37))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self.rotation(dtype)

    def rotation(self, dtype: torch.dtype) -> None:
        """Five rows, one of which is padding, into the last block of a cache."""
        device = self.gpu.device
        cache = tuple(torch.zeros(30, 16, 2, 24, dtype=dtype, device=device) for _ in range(2))
        positions = torch.arange(475, 480, device=device)
        slots, angles = positions.where(positions != 477, -1), self.random(480, 10)
        norm = self.random(24), None, 1e-5
        at, table = (positions, slots), (angles, angles)
        for is_interleaved in (True, False):
            qkv = Part(self.random(2, 5, 10 * 24))
            self.ops.rope_store([qkv], (6, 2, 24), (norm, norm), cache, at, table, is_interleaved)  # type: ignore[arg-type]

    def sampling(self) -> None:
        rows = [
            (0.8, 0.0, 5.0, 0.9, 0.05, 0.5),
            (1.0, 1.0, 2.0**62, 1.0, 0.0, 0.0),
            (2.0, 0.0, 2.0**62, 0.7, 0.0, 0.99),
        ]
        table = torch.tensor(rows, dtype=torch.float64, device=self.gpu.device).T.contiguous()
        for vocab_size in (1, 33, 1025, 5003):
            bans = banned_bits([vocab_size - 1][: vocab_size - 1], vocab_size, self.gpu.device)
            tokens, is_finite = sample(self.gpu, self.random(3, vocab_size), table, bans)
            assert is_finite.all()
            assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size


def attention(forms: Sequence[tuple[Form, bool]]) -> None:
    """Prompts of lengths around a tile and a split, then one row of each: by one program, and by several."""
    for form, has_sinks in forms:
        world = build(form, [1, 9, 65, 300], 16, torch.float16, has_sinks)
        assert all(rows.isfinite().all() for rows in run(world, [(s, 0, len(q)) for s, q in enumerate(world.q)]))
        last = [(s, len(q) - 1, len(q)) for s, q in enumerate(world.q)]
        for chunks in (last, last[-1:], [*last[:2], (3, 290, 300)]):
            assert all(rows.isfinite().all() for rows in run(world, chunks))
        widths = (form.num_heads, form.num_kv_heads, form.num_kv_heads)
        for chunks in (last, last[-1:]):
            sums = Sums(widths, (2, 3, 9), has_bias=True, pairs=form.head_dim // 2)
            _, made_of = unrotated(form, sums, len(chunks), 300)
            out = FLASH.store_and_attend(made_of, *world.cache, pages_of(world, chunks), form, world.sinks)
            assert out.isfinite().all()


def main(gpu: Gpu, kinds: Sequence[GgmlType] = tuple(FORMATS), widest: int = 8500, most_rows: int = 300) -> None:
    edges = Edges(gpu, widest, most_rows)
    for kind in kinds:
        edges.products(kind)
    edges.layer()
    edges.sampling()


if __name__ == "__main__":
    main(Gpu(torch.device("cuda", 0)), [GgmlType[name] for name in sys.argv[1:]] or list(FORMATS))
    attention(FORMS)
    torch.cuda.synchronize()
    print("all launched")
