"""What torch finds of a GPU, as one JSON line: a process of its own, for a broken driver can take its caller along.

python -m worker_orcd.commands.gpu_probe INDEX
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

COPY_BYTES = 2**28
REPEATS = 5


def probe(index: int) -> dict[str, Any]:
    """Facts about GPU `index`; `error` says why there are none."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            return facts | {"error": f"torch sees {count} GPUs, number {index} is not among them"}
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {"name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
        facts |= {"free_bytes": free, "total_bytes": total}
        return facts | {"pcie_gb_per_s": round(_copy_gbps(device), 1)}
    except RuntimeError as error:
        return facts | {"error": str(error).splitlines()[0]}


def _copy_gbps(device: Any) -> float:
    """Bytes a nanosecond from pinned host memory to the device, as weights are loaded."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return COPY_BYTES / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]))))
