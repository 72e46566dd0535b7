"""The edge at length (`make soak`): every route of the OpenAPI document, framings, and streams under fire."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
import time

from tests.fakes import UserTemplate
from tests.server.client import live
from tests.server.conformance import fuzz, operations
from tests.server.hostile import ATTACKS, Attack, Clean, differences, stream, strike
from tests.workers import fake_worker

NUM_CASES = 2000
NUM_FRAMINGS = 20_000
NUM_TOKENS = 1500
EXTRA_GAP_S = 0.020


def main() -> int:
    with live(template=UserTemplate()) as server:
        for name, operation in operations().items():
            began_s = time.monotonic()
            statuses = fuzz(operation, server.port, NUM_CASES, is_random=True)
            print(f"{name}: {dict(statuses)} in {time.monotonic() - began_s:.0f} s", flush=True)
    found, num_taken = asyncio.run(differences(seed=time.time_ns(), num_cases=NUM_FRAMINGS))
    print(f"{NUM_FRAMINGS} framings: {num_taken} requests taken, {len(found)} read in two ways", flush=True)
    alone_s, fired_s = gaps(False), gaps(True)
    print(f"gap between tokens, p99: {alone_s * 1e3:.1f} ms alone, {fired_s * 1e3:.1f} ms under fire", flush=True)
    return 1 if found or fired_s - alone_s > EXTRA_GAP_S else 0


def gaps(is_under_fire: bool) -> float:
    """The 99th percentile of the seconds between tokens of eight streams; whoever attacks does it elsewhere."""

    async def read(port: int) -> list[Clean]:
        bodies = [{"job_id": f"clean{i}", "prompt": "x", "max_tokens": NUM_TOKENS} for i in range(8)]
        return await asyncio.gather(*(stream(port, body) for body in bodies))

    with fake_worker("--step-ms", "10", "--max-batch", "32") as worker, contextlib.ExitStack() as stack:
        worker.wait_for("ready")
        if is_under_fire:
            attacker = subprocess.Popen([sys.executable, "-m", "tests.server.soak", str(worker.port)])
            stack.callback(attacker.wait)
            stack.callback(attacker.kill)
        seconds = [gap for clean in asyncio.run(read(worker.port)) for gap in clean.gaps_s]
    return sorted(seconds)[int(len(seconds) * 0.99)]


async def attack(port: int) -> None:
    """Each kind again and again, all at once, until killed."""

    async def repeat(one: Attack) -> None:
        for i in itertools.count():
            await strike(port, one, i)

    await asyncio.gather(*map(repeat, ATTACKS))


if __name__ == "__main__":
    sys.exit(asyncio.run(attack(int(sys.argv[1]))) if len(sys.argv) > 1 else main())
