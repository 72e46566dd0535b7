"""Loading and launching machine code through the CUDA driver, with ctypes; works under stream capture.

Every return code is checked; a bad one becomes CudaError with the driver's own name for it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from worker_orcd.errors import CudaError

MAX_DYNAMIC_SHARED, SHARED_PERCENT = 8, 9  # CUfunction_attribute: bytes of a block, share of what is also L1
MAX_SHARED_BY_ASKING = 97  # CUdevice_attribute
SHARED_WITHOUT_ASKING_BYTES = 48 * 1024
EARLY_START = 6  # CUlaunchAttributeID: programmatic stream serialization

Argument = Tensor | int | float | ctypes.Structure | None  # a device pointer, int32, float32, struct, null pointer
Value = ctypes.c_void_p | ctypes.c_int | ctypes.c_float | ctypes.Structure
NUMBERS = int, float


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


class _Thread(threading.local):
    context: ctypes.c_void_p | None = None  # what this thread was last given here


_thread = _Thread()


@lru_cache(maxsize=1024)
def divide_l1(function: int) -> None:
    """Ask for one division of L1 and shared memory, the same for every kernel of a step; `function`: a CUfunction.

    To change it a multiprocessor must come to rest, and then a kernel cannot start beside the end of the one before:
    2 µs at each attention of a decode step.
    """
    check(_driver().cuFuncSetAttribute(ctypes.c_void_p(function), SHARED_PERCENT, 100), "dividing L1")


class Kernel:
    """One function of compiled code, loaded on a device. `shared_bytes` of shared memory for each block.

    What a launch hands over is kept and written anew each time: only one thread, the engine's, may launch at a time.
    """

    def __init__(self, code: bytes, name: str, shared_bytes: int, device: int) -> None:
        self.name, self.shared_bytes, self.device = name, shared_bytes, device
        self._context = _primary_context(device)
        self._enter()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        lib = _driver()
        check(lib.cuModuleLoadData(ctypes.byref(module), code), f"loading {name}")
        check(lib.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
        self._function = function
        divide_l1(function.value or 0)
        if shared_bytes > SHARED_WITHOUT_ASKING_BYTES:
            code_ = lib.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared_bytes)
            check(code_, f"{shared_bytes} bytes of shared memory for {name}")
        self._prepare()

    def _prepare(self) -> None:
        """What stays the same from launch to launch."""
        self._early = _Attribute(id=EARLY_START)
        self._early.value[0] = 1
        self._launch = _Launch(shared_bytes=self.shared_bytes, attributes=ctypes.addressof(self._early))
        self._launch.block[:], self._launch.num_attributes = (1, 1, 1), 1
        self._grid, self._block = self._launch.grid, self._launch.block  # the same memory
        self._launch_at, self._cu_launch = ctypes.byref(self._launch), _driver().cuLaunchKernelEx
        self._values: list[Any] = []
        self._pointers = (ctypes.c_void_p * 0)()

    def __call__(self, grid: tuple[int, int, int], threads: int, args: Sequence[Argument], stream: int) -> None:
        """Launch; `stream` is a raw CUstream. The kernel may start before the one ahead of it has ended."""
        if _thread.context is not self._context:
            self._enter()
        self._place(args)
        self._grid[:] = grid
        self._block[0], self._launch.stream = threads, stream
        code = self._cu_launch(self._launch_at, self._function, self._pointers, None)
        if code:
            check(
                code,
                f"launching {self.name} on a grid of {grid}, {threads} threads, {self.shared_bytes} bytes shared",
            )

    def _place(self, args: Sequence[Argument]) -> None:
        """Write the arguments to where the driver reads them; each is of the kind it was at the first launch."""
        if len(args) != len(self._values):
            self._values = [value_of(arg) for arg in args]
            self._pointers = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, self._values))
        for i, arg in enumerate(args):
            if arg is None or isinstance(arg, NUMBERS):
                self._values[i].value = arg
            elif isinstance(arg, Tensor):
                self._values[i].value = arg.data_ptr()
            else:
                self._pointers[i] = ctypes.addressof(arg)

    def _enter(self) -> None:
        """Make the device's context this thread's, for good: one that never called CUDA has none."""
        check(_driver().cuCtxSetCurrent(self._context), "setting the context")
        _thread.context = self._context


def value_of(arg: Argument) -> Value:
    """An argument as a kernel takes it."""
    if arg is None:
        return ctypes.c_void_p(0)
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, ctypes.Structure):
        return arg
    return ctypes.c_int(arg) if isinstance(arg, int) else ctypes.c_float(arg)
