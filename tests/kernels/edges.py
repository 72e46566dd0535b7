"""Every kernel at shapes that end inside a tile, a few launches each; to be run under compute-sanitizer.

compute-sanitizer --tool memcheck python -m tests.kernels.edges [FORMAT ...]
"""

from __future__ import annotations

import sys

import torch

from tests.kernels.weights import random_raw
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.linear.linear import Linear, tiled
from worker_orcd.kernels.ops.ops import Ops, Part
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.repack import pack


def main() -> None:
    gpu = Gpu(torch.device("cuda", 0))
    linear, ops = Linear(gpu), Ops(gpu)
    kinds = [GgmlType[name] for name in sys.argv[1:]] or list(FORMATS)
    for kind in kinds:
        k = 512 if kind.block_elems == 256 else 416
        for n in (1, 1000):
            matrix = tiled(pack(random_raw(kind, n, k, "cuda"), kind, (n, k)), kind, (n, k))
            for num_rows in (1, 9, 33, 130):
                image = ops.to_image(torch.randn(num_rows, k, device="cuda"))
                sums = Part(linear(image, num_rows, matrix), torch.randn(n, device="cuda"))
                assert ops.total([sums]).isfinite().all()
    for width in (36, 2052):
        x, y, weight = (torch.randn(*s, width, device="cuda") for s in ((5,), (3, 5), ()))
        ops.add_norm(x, Part(y, weight), (weight, weight, 1e-5), (weight, None, 1e-5))
        ops.activate([Part(y), Part(y, weight)], width)
    cache = tuple(torch.zeros(30, 16, 2, 24, device="cuda") for _ in range(2))
    qkv, positions = torch.randn(2, 5, 10 * 24, device="cuda"), torch.arange(5, device="cuda") + 400
    norm, angles = (torch.randn(24, device="cuda"), None, 1e-5), torch.rand(480, 10, device="cuda")
    at, table = (positions, positions), (angles, angles)
    ops.rope_store([Part(qkv)], (6, 2, 24), (norm, norm), cache, at, table, True)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    print("all launched")


if __name__ == "__main__":
    main()
