"""Loading and launching machine code through the CUDA driver, with ctypes; works under stream capture.

Every return code is checked; a bad one becomes CudaError with the driver's own name for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from worker_orcd.errors import CudaError

MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
MAX_SHARED_BY_ASKING = 97  # CUdevice_attribute
SHARED_WITHOUT_ASKING_BYTES = 48 * 1024
EARLY_START = 6  # CUlaunchAttributeID: programmatic stream serialization

Argument = Tensor | int | float | ctypes.Structure | None  # a device pointer, int32, float32, struct, null pointer
Value = ctypes.c_void_p | ctypes.c_int | ctypes.c_float | ctypes.Structure


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the NVIDIA driver's library was not found: {error}") from error


def check(code: int, doing: str) -> None:
    """Raises CudaError unless `code` is success."""
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise CudaError(f"{doing}: {(name.value or b'unknown error').decode()} ({code})", cuda_error=code)


@lru_cache(maxsize=16)
def _primary_context(device: int) -> ctypes.c_void_p:
    """The context torch uses on a device; kept for the life of the process."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(_driver().cuInit(0), "starting the driver")
    check(_driver().cuDeviceGet(ctypes.byref(handle), device), f"looking for device {device}")
    check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"taking the context of device {device}")
    return context


def shared_bytes_per_block(device: int) -> int:
    """The most shared memory a block may ask for."""
    value = ctypes.c_int()
    _primary_context(device)
    code = _driver().cuDeviceGetAttribute(ctypes.byref(value), MAX_SHARED_BY_ASKING, device)
    check(code, "asking for the size of shared memory")
    return value.value


class Kernel:
    """One function of compiled code, loaded on a device. `shared_bytes` of shared memory for each block."""

    def __init__(self, code: bytes, name: str, shared_bytes: int, device: int) -> None:
        self.name, self.shared_bytes, self.device = name, shared_bytes, device
        self._context = _primary_context(device)
        self._enter()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        lib = _driver()
        check(lib.cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
        check(lib.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
        self._function = function
        if shared_bytes > SHARED_WITHOUT_ASKING_BYTES:
            code_ = lib.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared_bytes)
            check(code_, f"{shared_bytes} bytes of shared memory for {name}")

    def __call__(self, grid: tuple[int, int, int], threads: int, args: Sequence[Argument], stream: int) -> None:
        """Launch; `stream` is a raw CUstream. The kernel may start before the one ahead of it has ended."""
        self._enter()
        values = [value_of(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        early = _Attribute(id=EARLY_START)
        early.value[0] = 1
        launch = _Launch(shared_bytes=self.shared_bytes, stream=stream, attributes=ctypes.addressof(early))
        launch.grid[:], launch.block[:], launch.num_attributes = grid, (threads, 1, 1), 1
        code = _driver().cuLaunchKernelEx(ctypes.byref(launch), self._function, pointers, None)
        if code:
            check(
                code,
                f"launching {self.name} on a grid of {grid}, {threads} threads, {self.shared_bytes} bytes shared",
            )

    def _enter(self) -> None:
        """Make the device's context this thread's, unless it is: a thread that never called CUDA has none."""
        current = ctypes.c_void_p()
        check(_driver().cuCtxGetCurrent(ctypes.byref(current)), "asking for the context")
        if current.value != self._context.value:
            check(_driver().cuCtxSetCurrent(self._context), "setting the context")


def value_of(arg: Argument) -> Value:
    """An argument as a kernel takes it."""
    if arg is None:
        return ctypes.c_void_p(0)
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, ctypes.Structure):
        return arg
    return ctypes.c_int(arg) if isinstance(arg, int) else ctypes.c_float(arg)
