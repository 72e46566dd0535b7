"""The sampler alone: µs of one draw for every row of logits, replayed from a graph, and GB/s of reading them once.

python benchmarks/bench_sample.py [--out FILE]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bench_attention import replayed_us
from results import add_out, finish

from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.ops.sample import banned_bits, cluster, sample

VOCABS, ROWS = (32064, 151936, 201088), (1, 8, 64, 256)
DEVIATION = 3.0  # of the logits, normally distributed: many more tokens share the mass than with a trained model
OFF = 2.0**62
CALLS = 16  # in a graph
KINDS = {  # temperature, greedy, top-k, top-p, min-p
    "greedy": (1.0, 1.0, OFF, 1.0, 0.0),
    "temperature": (0.8, 0.0, OFF, 1.0, 0.0),
    "top-p": (0.8, 0.0, OFF, 0.95, 0.0),
    "top-k top-p min-p": (0.8, 0.0, 40.0, 0.95, 0.05),
}


def measure(gpu: Gpu, vocab: int, rows: int, kind: str) -> dict[str, Any]:
    logits = torch.randn(rows, vocab, device=gpu.device) * DEVIATION
    draws = torch.rand(1, rows, dtype=torch.float64)
    table = torch.tensor(KINDS[kind], dtype=torch.float64)[:, None].expand(-1, rows)
    table = torch.cat([table, draws]).to(gpu.device)
    bans = banned_bits([vocab - 1], vocab, gpu.device)
    is_greedy = kind == "greedy"
    us = replayed_us([lambda: sample(gpu, logits, table, bans, is_greedy=is_greedy)] * CALLS)
    blocks = cluster(gpu, rows, vocab, is_greedy)
    return {"us": round(us, 2), "gb_per_s": round(logits.numel() * 4 / us / 1e3), "blocks_of_a_row": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_out(parser)
    args = parser.parse_args()
    gpu = Gpu(torch.device("cuda"))
    numbers = {
        f"V={vocab} R={rows}": {kind: measure(gpu, vocab, rows, kind) for kind in KINDS}
        for vocab in VOCABS
        for rows in ROWS
    }
    finish("sample", {"deviation": DEVIATION, "calls": CALLS}, numbers, args.out)


if __name__ == "__main__":
    main()
