"""What a launch hands to the driver, read as the driver reads it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from worker_orcd.errors import CudaError
from worker_orcd.kernels import driver
from worker_orcd.kernels.driver import EARLY_START, Argument, Kernel

KINDS = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_void_p  # as the kernel of the test declares them


class Pair(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int), ("second", ctypes.c_float))


@dataclass
class FakeDriver:
    """Knows no GPU; keeps what it was told to launch."""

    code: int = 0  # what launches return
    launched: list[tuple[Any, ...]] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        def launch(config: int, function: int, values: int, _: int) -> int:
            told = driver._Launch.from_address(config)
            early = driver._Attribute.from_address(told.attributes)
            assert (told.num_attributes, early.id, early.value[0]) == (1, EARLY_START, 1)
            at = (ctypes.c_void_p * (len(KINDS) + 1)).from_address(values)
            numbers = [kind.from_address(at[i]).value for i, kind in enumerate(KINDS)]
            pair = Pair.from_address(at[len(KINDS)])
            shape = tuple(told.grid), tuple(told.block), told.shared_bytes, told.stream
            self.launched.append((function, *shape, *numbers, (pair.first, pair.second)))
            return self.code

        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(launch)

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:  # noqa: N802
        assert context.value is not None
        self.contexts.append(context.value)
        return 0

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = f"CUDA_ERROR_{code}".encode()
        return 0

    def cuModuleGetFunction(self, function: Any, *_: object) -> int:  # noqa: N802
        function._obj.value = 77
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake, context = FakeDriver(), ctypes.c_void_p(1234)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "_primary_context", lambda _: context)
    monkeypatch.setattr(driver, "_thread", driver._Thread())
    return fake


def test_every_launch_has_its_own_values(fake: FakeDriver) -> None:
    kernel, x, y = Kernel(b"", "f", 512, 0), torch.zeros(4), torch.zeros(4)
    first: list[Argument] = [x, 7, 0.5, None, Pair(1, 2.0)]
    second: list[Argument] = [None, -(2**31), -1.5, y, Pair(3, 4.0)]
    kernel((1, 2, 3), 64, first, 5)
    kernel((9, 8, 7), 96, second, 0)
    kernel((1, 2, 3), 64, first, 5)
    before = (77, (1, 2, 3), (64, 1, 1), 512, 5, x.data_ptr(), 7, 0.5, None, (1, 2.0))
    between = (77, (9, 8, 7), (96, 1, 1), 512, None, None, -(2**31), -1.5, y.data_ptr(), (3, 4.0))
    assert fake.launched == [before, between, before]


def test_a_number_where_a_pointer_was_is_refused(fake: FakeDriver) -> None:
    kernel = Kernel(b"", "f", 0, 0)
    args: list[Argument] = [None, 7, 0.5, None, Pair(1, 2.0)]
    kernel((1, 1, 1), 32, args, 0)
    with pytest.raises(TypeError):
        kernel((1, 1, 1), 32, [1.5, *args[1:]], 0)
    assert len(fake.launched) == 1


def test_each_thread_gets_the_context_once(fake: FakeDriver) -> None:
    kernel = Kernel(b"", "f", 0, 0)
    args: list[Argument] = [None, 7, 0.5, None, Pair(1, 2.0)]
    with ThreadPoolExecutor(1) as other:
        for _ in range(2):
            kernel((1, 1, 1), 32, args, 0)
            other.submit(kernel, (1, 1, 1), 32, args, 0).result()
    assert fake.contexts == [1234, 1234]


def test_what_the_driver_refuses_is_named(fake: FakeDriver) -> None:
    kernel, fake.code = Kernel(b"", "f", 512, 0), 701
    with pytest.raises(CudaError, match=r"launching f on a grid of \(1, 2, 3\), 64 threads, 512 .*CUDA_ERROR_701"):
        kernel((1, 2, 3), 64, [None, 7, 0.5, None, Pair(1, 2.0)], 0)
