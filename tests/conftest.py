"""What holds for the whole suite."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, which may import Triton: tests share the cores, and without a GPU kernels are interpreted.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Hypothesis fails an example that takes over 200 ms, which on shared cores is a matter of who else is at work.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: garbage is not looked for among them."""
    atexit.register(gc.unfreeze)  # or Triton, when the process ends, calls them leaks
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
