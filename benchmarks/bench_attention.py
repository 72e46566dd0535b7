"""Attention alone: µs of a decode step's layer against the bytes of its keys and values, TFLOP/s of a prompt.

python benchmarks/bench_attention.py [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from ceiling import copy_gbps, median_us
from results import add_out, finish
from torch import Tensor

from worker_orcd.kernels.attention import Form, Pages, attend

BLOCK_SIZE = 32
BATCHES, CONTEXTS, PROMPT = (1, 8, 64, 256), (512, 2048, 8192), 2048
COLD_BYTES = 2**29  # of keys and values in one measurement, many times what the caches of a GPU hold
REPEATS = 7
FORMS = {
    "qwen2.5-0.5b": Form(14, 2, 64, 64**-0.5),
    "llama-3.1-8b": Form(32, 8, 128, 128**-0.5),
    "phi-3-mini": Form(32, 32, 96, 96**-0.5),
}


def caches(form: Form, blocks: int, layers: int) -> list[tuple[Tensor, Tensor]]:
    """Random float16 keys and values [blocks, BLOCK_SIZE, Hk, D] of each layer."""
    size = (blocks, BLOCK_SIZE, form.num_kv_heads, form.head_dim)
    pair = lambda: torch.empty(size, dtype=torch.float16, device="cuda").normal_()  # noqa: E731
    return [(pair(), pair()) for _ in range(layers)]


def pages(starts: list[int], lens: list[int]) -> Pages:
    """Blocks in random order."""
    width = max(lens) // BLOCK_SIZE
    table = torch.randperm(len(lens) * width, device="cuda").view(len(lens), width)
    return Pages(torch.tensor(starts, device="cuda"), torch.tensor(lens, device="cuda"), table)


def replayed_us(runs: list[Callable[[], object]]) -> float:
    """Microseconds of one of `runs`, from a graph of all of them."""
    runs[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return median_us(graph.replay, REPEATS) / len(runs)


def decode_us(form: Form, batch: int, context: int) -> float:
    """One layer of one step: `batch` sequences of `context` tokens."""
    layer_bytes = batch * context * form.num_kv_heads * form.head_dim * 4
    layers = max(1, min(32, -(-COLD_BYTES // layer_bytes)))
    where = pages(list(range(batch + 1)), [context] * batch)
    q = torch.randn(batch, form.num_heads, form.head_dim, device="cuda")
    stores = caches(form, where.block_table.numel(), layers)
    return replayed_us([lambda kv=kv: attend(q, *kv, where, form) for kv in stores])  # type: ignore[misc]


def prompt_us(form: Form) -> float:
    where = pages([0, PROMPT], [PROMPT])
    q = torch.randn(PROMPT, form.num_heads, form.head_dim, device="cuda")
    return replayed_us([lambda kv=kv: attend(q, *kv, where, form) for kv in caches(form, PROMPT // BLOCK_SIZE, 8)])  # type: ignore[misc]


def measure(form: Form, ceiling: float) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for batch in BATCHES:
        for context in CONTEXTS:
            us = decode_us(form, batch, context)
            gbps = batch * context * form.num_kv_heads * form.head_dim * 4 / us / 1e3
            numbers[f"B={batch} ctx={context}"] = {
                "us": round(us, 2),
                "gb_per_s": round(gbps),
                "of_copy": round(gbps / ceiling, 3),
            }
    us = prompt_us(form)
    flop = 2 * PROMPT * (PROMPT + 1) * form.num_heads * form.head_dim
    numbers[f"prompt={PROMPT}"] = {"us": round(us, 1), "tflop_per_s": round(flop / us / 1e6)}
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_out(parser)
    args = parser.parse_args()
    ceiling = copy_gbps()
    numbers: dict[str, Any] = {"copy_gb_per_s": round(ceiling)}
    for name, form in FORMS.items():
        numbers[name] = measure(form, ceiling)
    finish("attention", {"cache": "float16", "block_size": BLOCK_SIZE}, numbers, args.out)


if __name__ == "__main__":
    main()
