"""Time of the grouped matmuls of a mixture of experts, and the time the copy bandwidth allows for what they read.

The shapes are GPT-OSS-20B's: 32 experts, of which a row takes 4 at random; with --skew each has a score of its own
besides, normal with that deviation: 0.5 to 0.8 makes the fullest expert of 1,024 pairs have some 100. Launches follow
each other in a captured graph over two copies of the weights and a dozen routings.

    python benchmarks/bench_experts.py [--tokens 1,8,64,256] [--skew 0.7] [--units 48,24+48] [--sweep] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from bench_linear import graph_us, random_raw
from ceiling import copy_gbps
from results import add_out, finish

from worker_orcd.errors import CudaError
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import TiledMatrix, kernel_of
from worker_orcd.kernels.linear.plan import FewTokens, ManyTokens, choose_expert_slices, plan_linear
from worker_orcd.kernels.ops.experts import ExpertOps, Grouped, Routing
from worker_orcd.kernels.ops.ops import Ops, Part
from worker_orcd.quant.repack import pack

EXPERTS, USED, HIDDEN, COPIES, ROUTINGS = 32, 4, 2880, 2, 12
SHAPES = {"gate_up": (5760, HIDDEN), "down": (2880, HIDDEN)}


class Bench:
    """One matrix of all experts; the products of some rows with those the router sends them to."""

    def __init__(self, gpu: Gpu, kind: GgmlType, shape: tuple[int, int], skew: float) -> None:
        self.gpu, self.shape, self.kind, self.skew = gpu, shape, kind, skew
        self.ops = Ops(gpu)
        self.experts = ExpertOps(gpu, self.ops)
        one = pack(random_raw(kind, *shape), kind, shape)
        self.tiles = [torch.cat([one] * EXPERTS) for _ in range(COPIES)]
        self.slices = choose_expert_slices(*shape, kind, USED)

    def routings(self, num_tokens: int, sizes: tuple[int, int] | None = None) -> list[Routing]:
        """Rows choose by Gumbel noise, the same experts whatever the sizes of units."""
        made, random = [], torch.Generator("cuda").manual_seed(num_tokens)
        for _ in range(ROUTINGS):
            own = self.skew * torch.randn(EXPERTS, device="cuda", generator=random)
            noise = torch.empty(1, num_tokens, EXPERTS, device="cuda").exponential_(generator=random)
            made.append(self.experts.route([Part(own - noise.log())], EXPERTS, USED, True, sizes))
        return made

    def us(self, num_tokens: int, routings: list[Routing], slices: int, how: Grouped | None) -> float:
        n, k = self.shape
        matrices = [
            TiledMatrix(self.kind, (n, k), t, plan_linear(n, k, self.kind, slices), EXPERTS) for t in self.tiles
        ]
        x = self.ops.to_image(torch.randn(num_tokens, k, device="cuda"))
        images = [self.experts.spread(x, routing) for routing in routings]

        def launch(number: int) -> None:
            at = number % ROUTINGS
            self.experts.multiply(images[at], matrices[number % COPIES], None, routings[at], how)

        return graph_us(launch, ROUTINGS)

    def floor_us(self, routings: list[Routing], gbps: float) -> float:
        distinct = sum(len(set(r.owners.tolist()) - {-1}) for r in routings) / len(routings)
        return distinct * self.kind.row_bytes(self.shape[1]) * self.shape[0] / gbps / 1e3


def candidates(unit: int, n: int, slices: int, active: int, num_sms: int) -> Iterator[Grouped]:
    """Ways to multiply units of so many rows."""
    strips = -(-n // 16)
    if unit <= 32:
        few = ((4, 2, 4), (4, 3, 4), (8, 2, 2), (8, 3, 2), (14, 1, 2), (14, 2, 2), (16, 2, 1), (20, 1, 1), (28, 1, 1))
        for (warps, depth, ctas), early, per_warp in itertools.product(few, (False, True), (1, 2, 3, 6)):
            blocks = max(1, -(-strips // (warps * per_warp)))
            yield Grouped(FewTokens(unit // 8, warps, depth, ctas, early), blocks)
            at_once = max(1, ctas * num_sms // (slices * active))
            if per_warp == 1 and at_once < blocks:
                yield Grouped(FewTokens(unit // 8, warps, depth, ctas, early), at_once)
    if unit >= 16:
        many = ((2, 1, 3, 6), (2, 2, 2, 3), (2, 2, 3, 3), (2, 2, 2, 6), (2, 3, 2, 3), (3, 2, 2, 3), (1, 4, 3, 3))
        for groups, ctas, depth, stages in many:
            for sequential in {slices > 1, False}:
                yield Grouped(ManyTokens(unit, groups, depth, stages, sequential, ctas), -(-n // (64 * groups)))


def sizes_of(text: str) -> tuple[int, int]:
    """Of units: "48", or "24+48"."""
    *small, large = map(int, text.split("+"))
    return sum(small), large


def sweep(bench: Bench, num_tokens: int, units: list[int], gbps: float, ahead: bool) -> None:
    """Print the best ways for each unit and number of slices; `ahead` only begins to compile them."""
    for unit in units:
        routings = [] if ahead else bench.routings(num_tokens, (0, unit))
        active = min(num_tokens * USED, EXPERTS)
        for slices in sorted({1, 2, 3, 4, bench.slices}):
            found = []
            for how in candidates(unit, bench.shape[0], slices, active, bench.gpu.num_sms):
                if ahead:
                    bench.gpu.compile_ahead(kernel_of(bench.kind, how.variant, grouped=True)[0])
                    continue
                try:
                    found.append((bench.us(num_tokens, routings, slices, how), how))
                except (CudaError, ValueError):
                    continue
            floor_us = bench.floor_us(routings, gbps) if found else 0.0
            for us, how in sorted(found, key=lambda f: f[0])[:2]:
                print(f"    unit {unit} S={slices} {us:8.2f} us {100 * floor_us / us:4.0f} %  {how}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,64,256")
    parser.add_argument("--skew", type=float, default=0.0, help="deviation of the experts' own scores")
    parser.add_argument("--units", default="", help="rows of an expert multiplied at a time, small + large: 48,24+48")
    parser.add_argument("--sweep", action="store_true", help="try many variants and slices, for units of one size")
    add_out(parser)
    args = parser.parse_args()
    gpu, gbps = Gpu(torch.device("cuda", 0)), copy_gbps()
    numbers: dict[str, Any] = {"copy_gb_per_s": round(gbps)}
    for name, shape in SHAPES.items():
        bench = Bench(gpu, GgmlType.MXFP4, shape, args.skew)
        for num_tokens in map(int, args.tokens.split(",")):
            asked = [sizes_of(text) for text in args.units.split(",") if text]
            cases: list[tuple[int, int] | None] = [*asked] if asked else [None]
            for sizes in cases:
                routings = bench.routings(num_tokens, sizes)
                us, floor = bench.us(num_tokens, routings, bench.slices, None), bench.floor_us(routings, gbps)
                regions = routings[0].regions
                units = "+".join(str(region.unit) for region in reversed(regions))
                used = [sum(int((r.regions[i].owners >= 0).sum()) for r in routings) for i in range(len(regions))]
                found = {"us": round(us, 1), "percent": round(100 * floor / us, 1)}
                numbers[f"{name} T={num_tokens} units {units}"] = found
                in_use = "+".join(str(round(n / ROUTINGS, 1)) for n in reversed(used))
                print(name, num_tokens, f"units {units}: {in_use} in use", found, f"S={bench.slices}", flush=True)
            if args.sweep:
                alone = [large for small, large in asked if not small] or [regions[0].unit]
                for ahead in (True, False):
                    sweep(bench, num_tokens, alone, gbps, ahead)
        del bench
    finish("experts", {"type": "MXFP4", "experts": EXPERTS, "used": USED}, numbers, args.out)


if __name__ == "__main__":
    main()
