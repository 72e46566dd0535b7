"""Speed of a worker as its clients see it, over real HTTP. One JSON line last.

The worker runs already (--url), or is started here: without a model (--fake), or on one (--model, --device).
Clients are in a process of their own. --concurrency is a closed loop: each client sends its next request when its
last one is answered. --rate is an open loop: requests arrive at random moments, whatever the worker does.

    python benchmarks/bench_serve.py --fake [--step-ms 0] [--concurrency 64] [--requests 512]
    python benchmarks/bench_serve.py --model FILE --device cuda --rate 20 --prompt-tokens 512 --max-tokens 128
    python benchmarks/bench_serve.py --url http://127.0.0.1:8080 --concurrency 8

TTFT: from just before connecting to the read that holds the first token. TPOT: of each request, from its first token
to its last, divided by the tokens between. Gaps: between neighbouring tokens of one stream; tokens that arrive in one
read have gaps of 0. Tokens per second: over the time from the first request to the end of the last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import msgspec
from load_client import Load, Outcome
from results import add_out, finish, spread

HERE = Path(__file__).parent
START_S = 300.0  # a large model takes its time to load
WORDS = ("time", "house", "river", "number", "people", "water", "light", "story", "green", "music", "paper", "stone")


def main() -> None:
    args = parse_args()
    with _worker(args) as (host, port, pids):
        load = Load(
            host=host, port=port, num_requests=args.requests, concurrency=args.concurrency, rate=args.rate,
            prompts=_prompts(host, port, args), max_tokens=args.max_tokens, temperature=args.temperature,
            seed=args.seed, name=f"bench-{os.getpid()}",
        )  # fmt: skip
        warm_up = msgspec.structs.replace(
            load, num_requests=min(args.requests, 2 * args.concurrency), rate=0.0, name=f"{load.name}-warm-up"
        )
        run(warm_up, {})
        outcomes, cpu_s = run(load, pids)
    names = ("requests", "concurrency", "rate", "prompt_tokens", "shared_prompt_tokens", "max_tokens", "step_ms")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    settings["worker"] = "fake" if args.fake else args.url or f"{args.model} on {args.device}"
    finish("serve", settings, summary(outcomes, cpu_s), args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a worker that runs")
    where.add_argument("--fake", action="store_true", help="start one without a model")
    where.add_argument("--model", type=Path, help="start one on this GGUF file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="for --model")
    parser.add_argument("--step-ms", type=float, default=0.0, help="for --fake: what the device takes for a step")
    parser.add_argument("--max-batch", type=int, default=64, help="of the worker started here (default 64)")
    parser.add_argument("--profile", type=Path, help="for --fake: profile of the API process, which slows it")
    parser.add_argument("--concurrency", type=int, default=64, help="clients of the closed loop (default 64)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second of the open loop")
    parser.add_argument("--requests", type=int, default=512, help="how many (default 512)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="about (default 128)")
    parser.add_argument("--shared-prompt-tokens", type=int, default=0, help="of them, the same in all prompts")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1, help="of prompts, arrivals and requests")
    add_out(parser)
    return parser.parse_args()


def run(load: Load, pids: dict[str, int]) -> tuple[list[Outcome], dict[str, float]]:
    """The outcomes, and the seconds of processor time that each of `pids` and the client took."""
    before = {name: _cpu_s(pid) for name, pid in pids.items()}
    client = subprocess.Popen(
        [sys.executable, str(HERE / "load_client.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    own_before = os.times().children_user + os.times().children_system
    output, _ = client.communicate(msgspec.json.encode(load) + b"\n")
    if client.returncode:
        raise SystemExit(f"the client ended with status {client.returncode}")
    cpu_s = {name: round(_cpu_s(pid) - before[name], 2) for name, pid in pids.items()}
    own = os.times().children_user + os.times().children_system - own_before
    return msgspec.json.decode(output, type=list[Outcome]), cpu_s | {"client": round(own, 2)}


def summary(outcomes: list[Outcome], cpu_s: dict[str, float]) -> dict[str, Any]:
    whole = [outcome for outcome in outcomes if outcome.end == "end"]
    refused = Counter(str(outcome.status) for outcome in outcomes if outcome.status not in (0, 200))
    broken = Counter(o.end for o in outcomes if o.status in (0, 200) and o.end != "end")
    wall_s = max(o.ended_s for o in outcomes) - min(o.began_s for o in outcomes)
    num_tokens = sum(count for outcome in outcomes for _, count in outcome.reads)
    answered = [outcome for outcome in whole if outcome.reads]
    return {
        "tokens_per_second": round(num_tokens / wall_s, 1),
        "requests_per_second": round(len(whole) / wall_s, 2),
        "ttft_ms": spread([(o.reads[0][0] - o.began_s) * 1e3 for o in answered]),
        "tpot_ms": spread([tpot for outcome in answered if (tpot := _tpot_ms(outcome)) is not None]),
        "gap_ms": spread([gap for outcome in answered for gap in _gaps_ms(outcome)]),
        "tokens_per_read": round(num_tokens / max(1, sum(len(o.reads) for o in outcomes)), 2),
        "requests": {"whole": len(whole), "refused": dict(refused), "broken": dict(broken)},
        "prompt_tokens": round(sum(o.prompt_tokens for o in answered) / max(1, len(answered)), 1),
        "tokens": num_tokens,
        "wall_s": round(wall_s, 3),
        "cpu_s": cpu_s,
    }


def _tpot_ms(outcome: Outcome) -> float | None:
    after_first = sum(count for _, count in outcome.reads) - 1
    return (outcome.reads[-1][0] - outcome.reads[0][0]) * 1e3 / after_first if after_first else None


def _gaps_ms(outcome: Outcome) -> Iterator[float]:
    last_s = None
    for moment_s, count in outcome.reads:
        if last_s is not None:
            yield (moment_s - last_s) * 1e3
        yield from [0.0] * (count - 1)
        last_s = moment_s


def _prompts(host: str, port: int, args: argparse.Namespace) -> list[str]:
    """Prompts of about as many tokens as asked for; how many tokens a word has is found out by asking the worker."""
    draw, num_words = random.Random(args.seed), 64
    if args.fake:
        letters = string.ascii_lowercase + " "
        shared = "".join(draw.choices(letters, k=args.shared_prompt_tokens))
        rest = args.prompt_tokens - len(shared)
        return [shared + "".join(draw.choices(letters, k=rest)) for _ in range(256)]
    probe = Load(
        host=host, port=port, num_requests=1, concurrency=1, rate=0.0, prompts=[" ".join(draw.choices(WORDS, k=64))],
        max_tokens=1, temperature=0.0, seed=0, name=f"bench-{os.getpid()}-probe",
    )  # fmt: skip
    (outcome,), _ = run(probe, {})
    if not outcome.prompt_tokens:
        raise SystemExit(f"the worker does not answer: status {outcome.status}, {outcome.end}")
    words_per_token = num_words / outcome.prompt_tokens
    shared = " ".join(draw.choices(WORDS, k=round(args.shared_prompt_tokens * words_per_token)))
    rest = round((args.prompt_tokens - args.shared_prompt_tokens) * words_per_token)
    return [f"{shared} {' '.join(draw.choices(WORDS, k=rest))}".strip() for _ in range(256)]


@contextlib.contextmanager
def _worker(args: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, int]]]:
    """Host, port and processes of a worker that is ready."""
    if args.url:
        parts = urlsplit(args.url)
        yield parts.hostname or "127.0.0.1", parts.port or 80, {}
        return
    port = _free_port()
    process = subprocess.Popen(_command(args, port), env=os.environ | {"PYTHONPATH": str(HERE)})
    try:
        _wait_until_ready(process, port)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield "127.0.0.1", port, {"api": process.pid, "engine": int(children[0])}
    finally:
        process.terminate()
        process.wait()


def _command(args: argparse.Namespace, port: int) -> list[str]:
    common = ["--port", str(port), "--max-batch", str(args.max_batch), "--log-level", "error"]
    if args.fake:
        profile = ["--profile", str(args.profile)] if args.profile else []
        return [sys.executable, str(HERE / "fake_worker.py"), *common, "--step-ms", str(args.step_ms), *profile]
    model = [] if str(args.model) == "haiku" else ["--model", str(args.model)]
    return [sys.executable, "-m", "worker_orcd", "serve", *common, *model, "--device", args.device]


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"the worker ended with status {process.returncode} while starting")
        with contextlib.suppress(URLError, OSError), urlopen(f"http://127.0.0.1:{port}/ready") as answer:
            assert json.load(answer)["ready"]
            return
        time.sleep(0.05)
    raise SystemExit(f"the worker was not ready within {START_S:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
