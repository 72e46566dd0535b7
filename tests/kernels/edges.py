"""Every kernel at shapes that end inside a tile, a few launches each; to be run under compute-sanitizer.

compute-sanitizer --tool memcheck python -m tests.kernels.edges [FORMAT ...]
"""

from __future__ import annotations

import sys

import torch

from tests.kernels.weights import random_raw
from worker_orcd.gguf.types import GgmlType
from worker_orcd.kernels.linear.linear import Linear, tiled
from worker_orcd.kernels.ops.ops import Ops
from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.repack import pack


def main() -> None:
    device = torch.device("cuda", 0)
    linear, ops = Linear(device), Ops(device)
    kinds = [GgmlType[name] for name in sys.argv[1:]] or list(FORMATS)
    for kind in kinds:
        k = 512 if kind.block_elems == 256 else 416
        for n in (1, 1000):
            matrix = tiled(pack(random_raw(kind, n, k, "cuda"), kind, (n, k)), kind, (n, k))
            for num_rows in (1, 9, 33, 130):
                y = linear(torch.randn(num_rows, k, device="cuda"), matrix, torch.randn(n, device="cuda"))
                assert y.isfinite().all()
    x = torch.randn(5, 97, device="cuda")
    ops.norm(x, x[0].contiguous(), 1e-5)
    ops.silu_times(x, x)
    cache = tuple(torch.zeros(30, 16, 2, 24, device="cuda") for _ in range(2))
    q, k_, v = torch.randn(5, 6, 24, device="cuda"), *torch.randn(2, 5, 2, 24, device="cuda")
    positions = torch.arange(5, device="cuda") + 400
    angles = torch.rand(480, 10, device="cuda")
    ops.rope_store((q, k_, v), cache, (positions, positions), (angles, angles), True)
    torch.cuda.synchronize()
    print("all launched")


if __name__ == "__main__":
    main()
