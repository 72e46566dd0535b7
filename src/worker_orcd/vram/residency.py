"""Whether weights and cache lie where they were put: in the memory of the GPU, not managed, mapped or moved."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

from torch import Tensor

from worker_orcd.errors import CudaError

MEMORY_TYPE, IS_MANAGED, ORDINAL = 2, 8, 9  # CUpointer_attribute
HOST_MEMORY, DEVICE_MEMORY = 1, 2  # CUmemorytype


class Residency:
    """`locate` asks the driver where an address lies and answers as `place` is written: "device 0"."""

    def __init__(self, tensors: Mapping[str, Tensor], place: str, locate: Callable[[int], str]) -> None:
        self._addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor.numel()}
        self._place, self._locate = place, locate

    def __call__(self) -> str:
        """What is wrong; empty when all is well. One call of the driver for each tensor, about a microsecond."""
        for name, address in self._addresses.items():
            if (found := self._locate(address)) != self._place:
                return f"{name} lies in {found}, not on {self._place}"
        return ""


def locate_by_driver() -> Callable[[int], str]:
    """Answers "device 0", "host memory", "managed memory" or "unknown memory".

    For a thread that has a CUDA context. Raises CudaError without a driver, and where it refuses to answer.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the NVIDIA driver's library was not found: {error}") from error
    kind, managed, ordinal = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    attributes = (ctypes.c_int * 3)(MEMORY_TYPE, IS_MANAGED, ORDINAL)
    values = (ctypes.c_void_p * 3)(*map(ctypes.addressof, (kind, managed, ordinal)))

    def locate(address: int) -> str:
        managed.value = 0  # the driver writes a byte of it
        if code := driver.cuPointerGetAttributes(3, attributes, values, ctypes.c_uint64(address)):
            raise CudaError(f"the driver does not say where memory lies (error {code})", cuda_error=code)
        if managed.value:
            return "managed memory"
        known = {DEVICE_MEMORY: f"device {ordinal.value}", HOST_MEMORY: "host memory"}
        return known.get(kind.value, "unknown memory")

    return locate
