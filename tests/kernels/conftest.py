"""The GPU that a test runs on: one emulated on the processor, always; the real one where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import pytest
import torch

from tests.kernels.emulator.gpu import EmulatedGpu
from worker_orcd.kernels.driver import Argument
from worker_orcd.kernels.gpu import Gpu, Work
from worker_orcd.kernels.source import Source

HAS_GPU = torch.cuda.is_available()
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated GPU needs g++")
NO_GPU = pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU")
NOT_INTERPRETED = pytest.mark.skipif(
    HAS_GPU, reason="Triton compiles for the GPU here, so attention needs the real one"
)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("emulated", marks=[NO_COMPILER, NOT_INTERPRETED]),
        pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]),
    ],
)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    return EmulatedGpu() if request.param == "emulated" else Gpu(torch.device("cuda", 0))


def watch(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from now on."""
    launched: list[str] = []
    launch = gpu.launch

    def watched(source: Source, name: str, work: Work, args: Sequence[Argument]) -> None:
        launched.append(name)
        launch(source, name, work, args)

    monkeypatch.setattr(gpu, "launch", watched)
    return launched
