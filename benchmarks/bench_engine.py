"""Speed of the engine loop without HTTP: prefill, decode and first token. One JSON line last.

python benchmarks/bench_engine.py [--model FILE] [--device cuda|cpu] [--prompt 32] [--tokens 128] [--repeat 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from worker_orcd import __version__
from worker_orcd.assemble import draw_up, embedded_model, load_runtime
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.sequence import Chunk, Sequence
from worker_orcd.engine.step import PlainStep


def measure(runtime: Runtime, prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and its first token, and for `tokens` more; random ids, greedy."""
    step = PlainStep(runtime, Sampler([]))
    ids = torch.randint(0, 1000, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    request = Request("bench", ids, tokens, SamplingParams(seed=0, temperature=0.0))
    seq = Sequence.of(request, runtime.allocator.new_table())
    step.start(seq)
    try:
        began = time.perf_counter()
        while seq.num_pending > 1:
            step.next_token([Chunk(seq, min(128, seq.num_pending))])
        first = time.perf_counter()
        for _ in range(tokens):
            step.next_token([Chunk(seq, 1)])
        return first - began, time.perf_counter() - first
    finally:
        step.free(seq)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=128, help="generated tokens")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    config = WorkerConfig(model=args.model, device=args.device, context_length=args.prompt + args.tokens + 1)
    began = time.perf_counter()
    blueprint = draw_up(config)
    runtime = load_runtime(config, blueprint, lambda *_: None)
    load_s = time.perf_counter() - began
    measure(runtime, args.prompt, 2)
    runs = [measure(runtime, args.prompt, args.tokens) for _ in range(args.repeat)]
    prefill_s, decode_s = (statistics.median(column) for column in zip(*runs, strict=True))
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    result = {
        "model": args.model.name,
        "quant": blueprint.gguf.quant_kind,
        "backend": "torch-reference",
        "device": device,
        "prefill_tokens_per_second": round(args.prompt / prefill_s, 1),
        "decode_tokens_per_second": round(args.tokens / decode_s, 1),
        "first_token_ms": round(prefill_s * 1e3, 2),
        "load_s": round(load_s, 2),
        "prompt": args.prompt,
        "tokens": args.tokens,
        "torch": torch.__version__,
        "version": __version__,
    }
    for name, value in result.items():
        print(f"{name:28}{value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
