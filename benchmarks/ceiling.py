"""Bandwidth of the device's memory, which nothing that reads its operands can beat: a copy, and a read.

python benchmarks/ceiling.py [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from results import add_out, driver, finish

COPY_BYTES = 2**32
REPEATS = 20


def median_us(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Microseconds of one call by the device's clock, after a warm-up."""
    times = []
    for number in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_gbps() -> float:
    """Bytes read and written a nanosecond."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_us(lambda: target.copy_(source)) / 1e3


def read_gbps() -> float:
    """Bytes read a nanosecond, by a sum of 8-byte numbers."""
    source = torch.randint(-9, 9, (COPY_BYTES // 8,), dtype=torch.int64, device="cuda")
    return COPY_BYTES / median_us(source.sum) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_out(parser)
    args = parser.parse_args()
    numbers = {"copy_gb_per_s": round(copy_gbps()), "read_gb_per_s": round(read_gbps())}
    finish("ceiling", {"bytes": COPY_BYTES, "repeats": REPEATS, "driver": driver()}, numbers, args.out)


if __name__ == "__main__":
    main()
