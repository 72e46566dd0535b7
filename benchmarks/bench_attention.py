"""Attention alone: µs of a decode step's layer against the bytes of its keys and values, TFLOP/s of a prompt.

python benchmarks/bench_attention.py [--out FILE]
python benchmarks/bench_attention.py --sweep [MODEL ...]

--sweep compares launches instead: the best of SWEPT beside the one that attention.py chooses, a line for each case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from ceiling import copy_gbps
from results import add_out, finish
from torch import Tensor
from triton.runtime.errors import OutOfResources

from worker_orcd.errors import CudaError
from worker_orcd.kernels.attention import (
    Call,
    DecodeLaunch,
    FlashAttention,
    Form,
    Pages,
    PromptLaunch,
    Unrotated,
    decode_launch,
    launch_prompts,
    prompt_launch,
)
from worker_orcd.kernels.gpu import Gpu
from worker_orcd.kernels.ops.ops import Ops, Part

BLOCK_SIZE = 32
BATCHES, CONTEXTS, PROMPT = (1, 8, 64, 256), (512, 2048, 8192), 2048
COLD_BYTES = 2**29  # many times what the caches of a GPU hold
REPEATS = 9
FORMS = {
    "qwen2.5-0.5b": Form(14, 2, 64, 64**-0.5),
    "llama-3.1-8b": Form(32, 8, 128, 128**-0.5),
    "phi-3-mini": Form(32, 32, 96, 96**-0.5),
    "gpt-oss-20b": Form(64, 8, 64, 64**-0.5),
    "gpt-oss-20b, window": Form(64, 8, 64, 64**-0.5, window=128),
}
HAVE_SINKS = ("gpt-oss-20b", "gpt-oss-20b, window")

GRAPH_TOKENS = 256  # a recorded step's block table has room for so many at least
SWEPT_BATCHES, SWEPT_CONTEXTS, SHOWN, SLICES = (1, 8, 64, 256), (200, 1000), 3, 4
SWEPT = tuple((warps, slots) for warps in (1, 2, 4) for slots in (2, 3, 4, 6, 8))
SWEPT_PROMPTS = tuple((rows, warps, stages) for rows in (64, 128) for warps in (4, 8) for stages in (3, 5))
GPU = Gpu(torch.device("cuda", 0))
FLASH = FlashAttention(GPU, Ops(GPU))


def caches(form: Form, blocks: int, layers: int) -> list[tuple[Tensor, Tensor]]:
    """Random float16 keys and values [blocks, BLOCK_SIZE, Hk, D] of each layer."""
    size = (blocks, BLOCK_SIZE, form.num_kv_heads, form.head_dim)
    pair = lambda: torch.empty(size, dtype=torch.float16, device="cuda").normal_()  # noqa: E731
    return [(pair(), pair()) for _ in range(layers)]


def pages(starts: list[int], lens: list[int], room: int = 0) -> Pages:
    """Blocks in random order; `room`: tokens for which the block table has entries, at least."""
    used, width = -(-max(lens) // BLOCK_SIZE), -(-max(*lens, room) // BLOCK_SIZE)
    table = torch.zeros(len(lens), width, dtype=torch.int64, device="cuda")
    table[:, :used] = torch.randperm(len(lens) * used, device="cuda").view(len(lens), used)
    return Pages(torch.tensor(starts, device="cuda"), torch.tensor(lens, device="cuda"), table)


def replayed_us(runs: list[Callable[[], object]]) -> float:
    """Microseconds of one of `runs`, from a graph of all of them; the GPU's caches hold nothing of theirs."""
    runs[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    other, times = torch.zeros(COLD_BYTES // 4, device="cuda"), []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.sum()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return median(times) / len(runs)


def decodes(name: str, batch: int, context: int, room: int = 0) -> list[Call]:
    """Layers of one step: `batch` sequences of `context` tokens."""
    form = FORMS[name]
    layer_bytes = batch * context * form.num_kv_heads * form.head_dim * 4
    layers = max(1, min(32, -(-COLD_BYTES // layer_bytes)))
    return calls(name, pages(list(range(batch + 1)), [context] * batch, room), batch, layers)


def prompts(name: str) -> list[Call]:
    return calls(name, pages([0, PROMPT], [PROMPT]), PROMPT, 8)


def calls(name: str, where: Pages, num_rows: int, layers: int) -> list[Call]:
    form = FORMS[name]
    q = torch.randn(num_rows, form.num_heads, form.head_dim, device="cuda")
    sinks = torch.randn(form.num_heads, device="cuda") if name in HAVE_SINKS else None
    blocks = len(where.context_lens) * -(-int(where.context_lens.max()) // BLOCK_SIZE)
    return [Call(torch.empty_like(q), q, *kv, where, form, sinks) for kv in caches(form, blocks, layers)]


def attend_us(layers: list[Call]) -> float:
    """One layer with the launch that attention.py chooses."""
    run = FLASH.attend
    return replayed_us([lambda c=c: run(c.q, c.k, c.v, c.pages, c.form, c.sinks, c.out) for c in layers])  # type: ignore[misc]


def measure(name: str, ceiling: float) -> dict[str, Any]:
    form, numbers = FORMS[name], dict[str, Any]()
    for batch in BATCHES:
        for context in CONTEXTS:
            us = attend_us(decodes(name, batch, context))
            gbps = batch * min(context, form.window or context) * form.num_kv_heads * form.head_dim * 4 / us / 1e3
            numbers[f"B={batch} ctx={context}"] = {
                "us": round(us, 2),
                "gb_per_s": round(gbps),
                "of_copy": round(gbps / ceiling, 3),
            }
    us = attend_us(prompts(name))
    seen = min(PROMPT, form.window or PROMPT)  # keys of the last row
    flop = 2 * (2 * PROMPT + 1 - seen) * seen * form.num_heads * form.head_dim
    numbers[f"prompt={PROMPT}"] = {"us": round(us, 1), "tflop_per_s": round(flop / us / 1e6)}
    return numbers


def unrotated(layers: list[Call], num_slices: int) -> list[Call]:
    """The same with queries, the newest key and its value still to be made: as all steps of decodes are."""
    form, batch = layers[0].form, layers[0].num_seqs
    width = (form.num_heads + 2 * form.num_kv_heads) * form.head_dim
    sums, angles = torch.randn(num_slices, batch, width, device="cuda"), torch.randn(8192, form.head_dim // 2).cuda()
    return [replace(call, q=Unrotated([Part(sums)], angles, angles, False)) for call in layers]


def sweep(name: str) -> None:
    form = FORMS[name]
    for batch in SWEPT_BATCHES:
        for context in SWEPT_CONTEXTS:
            layers = unrotated(decodes(name, batch, context, GRAPH_TOKENS), SLICES if batch <= 64 else 1)
            now = decode_launch(form, batch, layers[0].max_splits, GPU.card)
            launches = [now, *decode_launches(layers[0], now)]
            compare(f"{name}, B={batch} ctx={context}", layers, FLASH.launch_decodes, launches)
    prompt = [PromptLaunch(*swept) for swept in SWEPT_PROMPTS if swept[0] >= form.group]
    compare(f"{name}, prompt={PROMPT}", prompts(name), launch_prompts, [prompt_launch(form), *prompt])


def decode_launches(call: Call, now: DecodeLaunch) -> Iterator[DecodeLaunch]:
    """SWEPT, with one block for a row, with as many as there are partials, and with as many as now."""
    for num_parts in sorted({1, now.num_parts, call.max_splits}):
        yield from (DecodeLaunch(*swept, num_parts) for swept in SWEPT)


def compare(about: str, layers: list[Call], run: Callable[[Call, Any], None], launches: list[Any]) -> None:
    """Print the times of the first of `launches` and of the best."""
    now = launches[0]
    times = {
        launch: replayed_us([lambda c=c, a=launch: run(c, a) for c in layers])  # type: ignore[misc]
        for launch in dict.fromkeys(launches)
        if can_run(layers[0], run, launch)
    }
    best = sorted(times, key=times.__getitem__)[:SHOWN]
    print(f"{about}: now {times[now]:.2f} us {now}", flush=True)
    for launch in best:
        print(f"    {times[launch]:.2f} us {launch}", flush=True)


def can_run(call: Call, run: Callable[[Call, Any], None], launch: Any) -> bool:
    """Whether it is something that a multiprocessor can hold."""
    try:
        run(call, launch)
    except (OutOfResources, CudaError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_out(parser)
    parser.add_argument("--sweep", nargs="*", metavar="MODEL", choices=[[], *FORMS], help="compare launches")
    args = parser.parse_args()
    if args.sweep is not None:
        for name in args.sweep or FORMS:
            sweep(name)
        return
    ceiling = copy_gbps()
    numbers: dict[str, Any] = {"copy_gb_per_s": round(ceiling)}
    for name in FORMS:
        numbers[name] = measure(name, ceiling)
    finish("attention", {"cache": "float16", "block_size": BLOCK_SIZE}, numbers, args.out)


if __name__ == "__main__":
    main()
