"""Where a test runs: on the emulated GPU, always; on the real one, where there is one."""

from __future__ import annotations

import os

import pytest

from tests.kernels.conftest import NO_COMPILER, NO_GPU

ON_GPU = (pytest.mark.gpu, NO_GPU)
ON_EMULATED = (
    NO_COMPILER,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU that is there"),
)
