"""The long form of the proof: `python -m tests.sim.soak [--seeds N | --minutes M]`; exits 1 when a promise breaks.

With --minutes the engine's worlds go on, seed after seed, until the time is over.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.kv.drivers import AllocatorMachine, drive_all, search
from tests.sim.driver import simulate


def machine() -> str:
    run_state_machine_as_test(
        AllocatorMachine,
        settings=settings(
            max_examples=2000, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    return "2,000 examples of up to 60 operations"


def volume() -> str:
    for part in range(10):
        drive_all(100_000, first_seed=100 * part)
        print(f"  {(part + 1) * 100_000:,} operations", flush=True)
    return "1,000,000 operations"


def exhaustive() -> str:
    return f"{search(depth=8):,} states, every sequence of 8 operations"


def worlds(num_seeds: int, minutes: float) -> str:
    began, seed = time.monotonic(), 0
    while (time.monotonic() - began < 60 * minutes) if minutes else (seed < num_seeds):
        simulate(seed)
        seed += 1
        if seed % 100 == 0:
            print(f"  {seed:,} worlds", flush=True)
    return f"{seed:,} worlds of 200 requests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0.0)
    options = parser.parse_args()
    parts: dict[str, Callable[[], str]] = {
        "allocator, by Hypothesis": machine,
        "allocator, by volume": volume,
        "allocator, exhaustively": exhaustive,
        "engine": lambda: worlds(options.seeds, options.minutes),
    }
    summary, num_broken = [], 0
    for name, part in parts.items():
        print(name, flush=True)
        began = time.monotonic()
        try:
            outcome = part()
        except Exception as error:
            traceback.print_exc()
            outcome, num_broken = f"BROKEN: {error}", num_broken + 1
        summary.append(f"{name}: {outcome}, {time.monotonic() - began:.0f} s")
    print("\n".join(summary))
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
