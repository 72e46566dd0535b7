"""Speed of the engine in one process, without HTTP. One JSON line last.

Without --model the fake step of fake_engine.py takes the place of a model, and what is measured is the engine itself:
host time per step, from the plan to the encoded message, in steady decode, with prompts in chunks beside it, for a
burst of arrivals and for prompts found in the prefix cache.

With --model it is the speed of that model through the same engine: prefill and decode in tokens a second.

    python benchmarks/bench_engine.py [--sizes 1,8,64,256] [--steps 400] [--profile] [--out FILE]
    python benchmarks/bench_engine.py --model FILE --device cuda [--batch 1,8,64] [--prompt 512] [--tokens 128]
    python benchmarks/bench_engine.py --model synthetic:llama-3.1-8b:Q4_K_M --batch 1,64 [--kernels]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fake_engine import build_fake_core
from fake_options import FakeOptions
from results import add_out, finish, spread
from rich.console import Console

from worker_orcd.assemble import embedded_model
from worker_orcd.commands.bench import synthetic_model
from worker_orcd.commands.engine_driver import GREEDY, Driver, load_core, run_batch
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.request import Finished

CONTEXT = 4096
BLOCK = 32


def fake_driver(max_batch: int, max_step_tokens: int = 512) -> Driver:
    rows = max(max_step_tokens, max_batch)
    num_blocks = 2 * max_batch * CONTEXT // BLOCK
    options = FakeOptions(num_blocks=num_blocks, block_size=BLOCK, max_batch=max_batch, max_step_tokens=rows,
                          context_length=CONTEXT)  # fmt: skip
    return Driver(build_fake_core(options)[0])


def steady_decode(size: int, steps: int) -> dict[str, float]:
    """`size` sequences, one token each in every step."""
    driver = fake_driver(size)
    for _ in range(size):
        driver.submit(128, steps + 64)
    driver.settle(size)
    for _ in range(steps):
        driver.turn()
    return spread(driver.step_ms)


def mixed(steps: int) -> dict[str, float]:
    """64 decodes, and beside them always the chunk of a long prompt that fills the step's 512 tokens."""
    driver = fake_driver(65)
    for _ in range(64):
        driver.submit(128, steps + 1024)
    driver.settle(64)
    driver.submit(CONTEXT - 8, 1)
    for _ in range(steps):
        if any(isinstance(event, Finished) for _, event in driver.turn().events):
            driver.submit(CONTEXT - 8, 1)
    return spread(driver.step_ms)


def burst(size: int) -> dict[str, float]:
    """`size` requests with prompts of 32 tokens at once: to queue them all, and the steps that admit them."""
    driver = fake_driver(size, max_step_tokens=32 * size)
    began = time.perf_counter()
    for _ in range(size):
        driver.submit(32, 8)
    submit_ms = (time.perf_counter() - began) * 1e3
    driver.turn()
    return {"submit_all": round(submit_ms, 3), "admit_all": round(driver.step_ms[0], 3)}


def prefix_hits(size: int) -> dict[str, float]:
    """`size` prompts of 2,048 tokens that share all but their last 64: without and with what came before cached."""
    driver = fake_driver(size, max_step_tokens=64 * size)
    head = random.Random(1).choices(range(256), k=2048 - 64)
    driver.submit(2048, 4, head)
    driver.finish()
    cold_ms = sum(driver.step_ms)
    driver.step_ms.clear()
    for _ in range(size):
        driver.submit(2048, 4, head)
    output = driver.turn()
    assert output.stats is not None
    share = output.stats.cached_tokens / output.stats.prompt_tokens
    return {"one_cold": round(cold_ms, 3), "admit_all": round(driver.step_ms[0], 3), "hit_share": round(share, 3)}


def host_times(sizes: list[int], steps: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {f"decode_{size}_step_ms": steady_decode(size, steps) for size in sizes}
    return numbers | {
        "mixed_prefill_512_rows_step_ms": mixed(steps),
        "burst_64_ms": burst(64),
        "prefix_hits_64_ms": prefix_hits(64),
    }


def model_speed(config: WorkerConfig, args: argparse.Namespace) -> dict[str, Any]:
    """For each size of a batch, medians of --repeat runs of requests at once, after one run that warms up."""
    began = time.perf_counter()
    core, facts = load_core(config)
    load_s = time.perf_counter() - began
    info = facts.info
    numbers: dict[str, Any] = {"model": info.name, "quant": info.quant_kind, "backend": info.backend}
    numbers["load_s"] = round(load_s, 2)
    for batch in _sizes(args.batch):
        runs = [run_batch(core, batch, args.prompt, args.tokens) for _ in range(args.repeat + 1)][1:]
        prefill_s = statistics.median(run.prefill_s for run in runs)
        numbers[f"B={batch}"] = {
            "prefill_tokens_per_second": round(batch * args.prompt / prefill_s, 1),
            "decode_tokens_per_second": round(1 / statistics.median(run.token_s for run in runs), 1),
            "decode_step_ms": round(statistics.median(statistics.median(run.step_ms) for run in runs), 3),
            "first_token_of_all_ms": round(prefill_s * 1e3, 2),
        }
        print(f"B={batch}", numbers[f"B={batch}"], flush=True)
        if args.kernels:
            print_kernels(core, batch, args.prompt, args.tokens)
        if args.profile:
            profiled(lambda batch=batch: run_batch(core, batch, args.prompt, args.tokens))  # type: ignore[misc]
    return numbers


def print_kernels(core: EngineCore, batch: int, prompt: int, tokens: int, steps: int = 8) -> None:
    """Where the time of the prompts and of a decode step goes on the device, which kernels and how much it idles."""
    driver = Driver(core)
    core.drop_cache()
    for _ in range(batch):
        driver.submit(prompt, tokens, sampling=GREEDY)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prompts:
        driver.settle(batch)
        torch.cuda.synchronize()
    for _ in range(4):
        driver.turn()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as decode:
        for _ in range(steps):
            driver.turn()
        torch.cuda.synchronize()
    _print_times("prompts", prompts, 1)
    _print_times(f"decode, B={batch}", decode, steps)
    driver.finish()


def _print_times(title: str, profiler: torch.profiler.profile, count: int) -> None:
    """A launch is charged with the time from the end of the one before, since launches overlap."""
    found = [e for e in profiler.events() or () if e.device_type.name == "CUDA"]
    found.sort(key=lambda e: e.time_range.end)
    charged: dict[str, list[float]] = {}
    idle, last = 0.0, min(e.time_range.start for e in found)
    for event in found:
        idle += max(0.0, event.time_range.start - last)
        charged.setdefault(event.name, []).append(event.time_range.end - max(last, event.time_range.start))
        last = event.time_range.end
    busy = sum(map(sum, charged.values()))
    print(f"{title}: {busy / count:.0f} us in {len(found) / count:.0f} launches, idle {idle / count:.0f} us")
    for name, times in sorted(charged.items(), key=lambda item: -sum(item[1]))[:16]:
        print(
            f"  {sum(times) / count:9.1f} us {len(times) / count:7.1f} x {sum(times) / len(times):8.2f}  {name[:90]}"
        )


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def profiled(work: Callable[[], object]) -> None:
    with cProfile.Profile() as profiler:
        work()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,8,64,256", help="sequences in steady decode")
    parser.add_argument("--steps", type=int, default=400, help="steps measured in each case (default 400)")
    parser.add_argument("--profile", action="store_true", help="show where the host's time goes")
    parser.add_argument("--model", help="measure this GGUF file, `haiku`, which is embedded, or synthetic:NAME:QUANT")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="for --model")
    parser.add_argument("--batch", default="1", help="requests at once, for --model: one number or several")
    parser.add_argument("--kernels", action="store_true", help="also show the kernels of a step, for --model on CUDA")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens, for --model (default 32)")
    parser.add_argument("--tokens", type=int, default=128, help="generated tokens, for --model (default 128)")
    parser.add_argument("--step-tokens", type=int, help="rows of a step at most, for --model (default: the engine's)")
    parser.add_argument("--repeat", type=int, default=3, help="runs, for --model (default 3)")
    add_out(parser)
    args = parser.parse_args()
    sizes = _sizes(args.sizes)
    if args.profile and args.model is None:
        for size in sizes:
            profiled(partial(steady_decode, size, args.steps))
        return
    if args.model is None:
        settings = {"sizes": sizes, "steps": args.steps}
        finish("engine-host-time", settings, host_times(sizes, args.steps), args.out)
        return
    kind, _, name = args.model.partition("synthetic:")
    model = (
        embedded_model() if kind == "haiku" else Path(kind) if kind else synthetic_model(name, Console(stderr=True))
    )
    context = args.prompt + args.tokens + 1
    most, rows = max(_sizes(args.batch)), args.step_tokens
    config = WorkerConfig(
        model=model, device=args.device, context_length=context, max_batch=most, max_tokens_per_step=rows
    )
    settings = {name: getattr(args, name) for name in ("device", "batch", "prompt", "tokens", "repeat")}
    numbers = model_speed(config, args)
    finish("engine-model", settings, numbers, args.out)


if __name__ == "__main__":
    main()
