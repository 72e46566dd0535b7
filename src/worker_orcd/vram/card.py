"""What a GPU has free, without a CUDA context and without torch: for planning."""

from __future__ import annotations

import ctypes
import os


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def free_vram_bytes(index: int) -> int | None:
    """By NVML; `index` counts as CUDA counts. None when there is no such GPU, or nobody says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        numbers = visible.split(",")
        if index >= len(numbers) or not numbers[index].strip().isdecimal():
            return None
        index = int(numbers[index])
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
        return None
    return None if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else int(memory.free)
