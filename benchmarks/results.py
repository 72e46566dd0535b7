"""What the benchmarks share: percentiles, facts about the machine, the table and the one JSON line last."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import numpy
import torch

from worker_orcd import __version__


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the largest, of milliseconds rounded to microseconds."""
    return {f"p{percent}": round(percentile(values, percent), 3) for percent in (50, 99)} | {
        "max": round(max(values, default=0.0), 3)
    }


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    numbers = {"cpu": cpu, "num_cpus": len(os.sched_getaffinity(0)), "gpus": gpus, "system": platform.system()}
    return numbers | ({"driver": driver()} if gpus else {})


def driver() -> str:
    """What the NVIDIA driver says of itself."""
    return next(iter(_lines("/proc/driver/nvidia/version")), "unknown")


def versions() -> dict[str, str]:
    return {
        "worker_orcd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": numpy.__version__,
        "msgspec": msgspec.__version__,
    }


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="also write the JSON to this file (see benchmarks/results/)")


def finish(name: str, settings: dict[str, Any], numbers: dict[str, Any], out: Path | None) -> None:
    """Print a table and, as the last line, everything as JSON; write it to `out`, too."""
    _print_table("", numbers)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"name": name, "date": now, "machine": machine(), "versions": versions()}
    result |= {"settings": settings, "numbers": numbers}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _print_table(prefix: str, numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        if isinstance(value, dict):
            _print_table(f"{prefix}{name} ", value)
        else:
            print(f"{prefix + name:44} {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
