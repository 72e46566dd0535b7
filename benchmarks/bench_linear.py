"""Time of the quantized matmuls, as a fraction of the time the copy bandwidth allows for the file's bytes.

Launches follow each other in a captured graph over rotating copies of the weights (about 500 MB), random data. `us`
is the matmul, with partial sums left in memory where K is sliced; `whole_us` with the conversion of x and the sum.

    python benchmarks/bench_linear.py [--shapes llama,phi,...] [--tokens 1,8,16] [--sweep] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from ceiling import copy_gbps
from results import add_out, driver, finish

from worker_orcd.errors import CudaError
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import Linear, TiledMatrix, kernel_of
from worker_orcd.kernels.linear.plan import FewTokens, ManyTokens, Variant, plan_linear
from worker_orcd.kernels.nvrtc import nvrtc_version
from worker_orcd.kernels.ops.ops import Ops, Part
from worker_orcd.quant.repack import pack

G = GgmlType
SHAPES: dict[str, list[tuple[GgmlType, int, int]]] = {
    "llama": [
        (G.Q4_K, 6144, 4096), (G.Q4_K, 4096, 4096), (G.Q4_K, 28672, 4096), (G.Q4_K, 4096, 14336),
        (G.Q6_K, 4096, 14336), (G.Q6_K, 128256, 4096),
    ],
    "phi": [
        (G.Q5_K, 9216, 3072), (G.Q4_K, 3072, 3072), (G.Q4_K, 16384, 3072), (G.Q4_K, 3072, 8192),
        (G.Q6_K, 32064, 3072),
    ],
    "qwen": [
        (G.Q5_0, 1152, 896), (G.Q5_0, 896, 896), (G.Q5_0, 9728, 896), (G.Q4_K, 896, 4864), (G.Q8_0, 151936, 896),
    ],
    "gptoss": [(G.Q8_0, 5120, 2880), (G.Q8_0, 2880, 4096), (G.Q8_0, 201088, 2880)],
    "formats": [
        (kind, 28672, 4096)
        for kind in (G.Q4_0, G.Q4_1, G.Q5_0, G.Q5_1, G.Q8_0, G.Q5_K, G.Q6_K, G.MXFP4, G.BF16, G.F16)
    ],
}  # fmt: skip
ROTATED_BYTES = 500e6
REPEATS = 5


class Bench:
    """One shape with as many copies of the weights as the cache cannot hold."""

    def __init__(self, gpu: Gpu, kind: GgmlType, n: int, k: int, slices: int | None) -> None:
        self.gpu, self.linear, self.ops = gpu, Linear(gpu), Ops(gpu)
        self.bytes, self.flops = n * kind.row_bytes(k), 2 * n * k
        rows = min(n, 2048)
        tiles = pack(random_raw(kind, rows, k), kind, (rows, k))
        copies = max(1, min(64, int(ROTATED_BYTES / self.bytes)))
        strips = -(-n // 16)
        whole = torch.cat([tiles] * -(-strips // len(tiles)))[:strips].contiguous()
        plan = plan_linear(n, k, kind, slices)
        self.matrices = [TiledMatrix(kind, (n, k), whole.clone(), plan) for _ in range(copies)]

    def with_slices(self, slices: int) -> list[TiledMatrix]:
        return [replace(m, plan=plan_linear(*m.shape, m.type, slices)) for m in self.matrices]

    def matmul_us(
        self, num_tokens: int, variant: Variant, matrices: list[TiledMatrix], and_sum: bool = False
    ) -> float:
        first = matrices[0]
        x = torch.randn(num_tokens, first.shape[1], device="cuda")
        image = self.ops.to_image(x)
        part = torch.empty(
            1 if first.plan.is_whole(variant) else first.plan.slices, num_tokens, first.shape[0], device="cuda"
        )

        def launch(number: int) -> None:
            self.linear.multiply(image, matrices[number % len(matrices)], variant, part)
            if and_sum and len(part) > 1:
                self.ops.total([Part(part)])

        return graph_us(launch, len(matrices))

    def whole_us(self, num_tokens: int, slices: int | None = None) -> float:
        """With the plan's slices of K, or others."""
        x = torch.randn(num_tokens, self.matrices[0].shape[1], device="cuda")
        matrices = self.matrices if slices is None else self.with_slices(slices)

        def launch(number: int) -> None:
            matrix = matrices[number % len(matrices)]
            self.ops.total([Part(self.linear(self.ops.to_image(x), num_tokens, matrix))])

        return graph_us(launch, len(matrices))

    def order_percent(self, num_tokens: int) -> float:
        """What it costs that the slices, and so the order of addition, are the same for every number of tokens."""
        depth = self.matrices[0].depth
        fixed = self.whole_us(num_tokens)
        others = [_try(partial(self.whole_us, num_tokens, s)) for s in (1, 2, 3, 4, 6, 8, 12, 16) if s <= depth]
        return 100 * (fixed / min(fixed, *(us for us in others if us is not None)) - 1)


def random_raw(kind: GgmlType, n: int, k: int) -> torch.Tensor:
    """Random bytes with small scales: u8 [n · row bytes]."""
    if kind in (G.BF16, G.F16):
        return (
            torch.randn(n * k, device="cuda")
            .to(torch.bfloat16 if kind is G.BF16 else torch.float16)
            .view(torch.uint8)
        )
    raw = torch.randint(0, 256, (n * k // kind.block_elems, kind.block_bytes), dtype=torch.uint8, device="cuda")
    halves = {G.Q6_K: (208,), G.MXFP4: (), G.Q4_0: (0,), G.Q5_0: (0,), G.Q8_0: (0,)}.get(kind, (0, 2))
    for byte in halves:
        raw[:, byte : byte + 2] = torch.rand(len(raw), 1, device="cuda").mul_(1e-3).half().view(torch.uint8)
    if kind is G.MXFP4:
        raw[:, 0] = 119 + raw[:, 0] % 5
    return raw.flatten()


def graph_us(launch: Callable[[int], object], count: int) -> float:
    """Microseconds of one launch among many, one after another: the median of some replays."""
    count = max(12, count)
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            launch(number)
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def candidates(num_tokens: int) -> Iterator[Variant]:
    """Variants worth trying for a number of tokens."""
    if num_tokens <= 32:
        groups = -(-num_tokens // 8)
        for warps, ctas in ((4, 4), (8, 2), (8, 3), (16, 1), (14, 1), (14, 2), (4, 5), (20, 1)):
            for depth, early, is_long in itertools.product((1, 2, 3), (False, True), (False, True)):
                yield FewTokens(groups, warps, depth, ctas, early, is_long=is_long)
    if num_tokens > 8:
        for tokens, groups, stages in (
            (16, 4, 8),
            (16, 2, 8),
            (32, 2, 6),
            (32, 4, 6),
            (64, 2, 4),
            (64, 3, 4),
            (128, 2, 6),
        ):
            for depth in (1, 2, 3):
                for sequential in (False, True):
                    if tokens >= min(num_tokens, 64) and tokens <= max(32, num_tokens):
                        yield ManyTokens(tokens, groups, depth, stages, sequential)
    if num_tokens > 16:
        for tokens, groups, ctas in ((32, 2, 2), (64, 1, 2), (64, 1, 3), (64, 2, 2), (128, 1, 2)):
            for sequential in (False, True):
                if tokens <= max(64, num_tokens):
                    yield ManyTokens(tokens, groups, 2, 4, sequential, ctas)
    if num_tokens > 128:
        for depth, warpgroups in ((1, 2), (2, 2), (1, 1)):
            yield ManyTokens(256, warpgroups, depth, 6, False)


def sweep(bench: Bench, num_tokens: int, floor_us: float) -> None:
    """Print the best variants, for one token with several numbers of slices; beyond 16 tokens sums included."""
    first = bench.matrices[0]
    tried = {first.plan.slices, *((1, 2, 3, 4, 6, 7, 8, 16) if num_tokens == 1 else ())}
    options = sorted(s for s in tried if s <= first.depth)
    found: list[tuple[float, int, Variant]] = []
    for variant in candidates(num_tokens):
        bench.gpu.compile_ahead(kernel_of(first.type, variant, first.has_half)[0])
    for slices in options:
        matrices = bench.with_slices(slices)
        for variant in candidates(num_tokens):
            if isinstance(variant, ManyTokens) and variant.sequential and (slices == 1 or variant.tokens > 128):
                continue
            if isinstance(variant, FewTokens) and matrices[0].plan.shared_bytes(variant) * variant.ctas > 220e3:
                continue
            us = _try(lambda m=matrices, v=variant: bench.matmul_us(num_tokens, v, m, num_tokens > 16))  # type: ignore[misc]
            if us is not None:
                found.append((us, slices, variant))
    for slices in options:
        for us, _, variant in sorted((f for f in found if f[1] == slices), key=lambda f: f[0])[:2]:
            print(f"    S={slices} {us:8.2f} us {100 * floor_us / us:4.0f} %  {variant}", flush=True)


def _try(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except (CudaError, ValueError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="llama,phi,qwen,gptoss")
    parser.add_argument("--tokens", default="1,8,16,32,64,128,256,2048")
    parser.add_argument("--only", default="", help="only shapes whose name has this text, as in 'Q4_K 4096x4096'")
    parser.add_argument("--slices", type=int, help="instead of the plan's")
    parser.add_argument("--order", action="store_true", help="also the cost of one order of addition for all T")
    parser.add_argument("--sweep", action="store_true", help="try many variants and slices, and print the best")
    add_out(parser)
    args = parser.parse_args()
    gpu, copy = Gpu(torch.device("cuda", 0)), copy_gbps()
    numbers: dict[str, Any] = {"copy_gb_per_s": round(copy)}
    for name in args.shapes.split(","):
        for kind, n, k in SHAPES[name]:
            if args.only not in f"{kind.name} {n}x{k}":
                continue
            torch.cuda.empty_cache()  # pieces of freed copies were up to a third slower to read
            bench = Bench(gpu, kind, n, k, args.slices)
            floor_us = bench.bytes / copy / 1e3
            rows = numbers[f"{kind.name} {n}x{k}"] = {}
            print(f"{kind.name} {n}x{k} floor {floor_us:.2f} us, slices {bench.matrices[0].plan.slices}", flush=True)
            for num_tokens in map(int, args.tokens.split(",")):
                if num_tokens * n > 2**28:
                    continue
                variant = bench.matrices[0].plan.variant(num_tokens, gpu.card)
                us = bench.matmul_us(num_tokens, variant, bench.matrices)
                whole = bench.whole_us(num_tokens)
                rows[f"T={num_tokens}"] = {
                    "us": round(us, 2), "percent": round(100 * floor_us / us, 1),
                    "tflops": round(bench.flops * num_tokens / us / 1e6, 1), "whole_us": round(whole, 2),
                }  # fmt: skip
                if args.order:
                    rows[f"T={num_tokens}"]["order_percent"] = round(bench.order_percent(num_tokens), 1)
                print(f"  T={num_tokens} {rows[f'T={num_tokens}']} {variant}", flush=True)
                if args.sweep:
                    sweep(bench, num_tokens, floor_us)
            del bench
    settings = {"shapes": args.shapes, "tokens": args.tokens, "rotated_bytes": int(ROTATED_BYTES), "repeats": REPEATS}
    settings |= {"driver": driver(), "nvrtc": nvrtc_version()}
    finish("bench_linear", settings, numbers, args.out)


if __name__ == "__main__":
    main()
