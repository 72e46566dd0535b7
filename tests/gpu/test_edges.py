"""What runs under compute-sanitizer runs at all: its launches on an emulated GPU, whose own checks are assertions."""

from __future__ import annotations

from tests.kernels import edges
from tests.kernels.conftest import NO_COMPILER
from tests.kernels.emulator.gpu import EmulatedGpu
from worker_orcd.gguf.types import GgmlType


@NO_COMPILER
def test_every_launch_of_the_sanitizer() -> None:
    edges.main(EmulatedGpu(), [GgmlType.Q4_K, GgmlType.MXFP4], widest=40, most_rows=33)
    edges.attention(edges.FORMS[:1])
