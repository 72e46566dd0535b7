"""What the two processes of a fake worker share; imports no torch, which the API process does without."""

from __future__ import annotations

from typing import Literal

import msgspec

FATAL_SEED = 13  # under the fault `cuda`, computing a request with this seed loses the device
CRASH_STATUS = 7  # what a child ends with under `crash-load`

Fault = Literal["none", "refuse-load", "crash-load", "hang-load", "cuda"]


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True):
    num_blocks: int = 4096
    block_size: int = 32  # tokens
    max_batch: int = 64
    max_step_tokens: int = 512
    context_length: int = 4096
    step_ms: float = 0.0  # what the device would take; it works beside the host, one step after the other
    fault: Fault = "none"
