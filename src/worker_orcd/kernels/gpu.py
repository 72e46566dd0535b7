"""One GPU as the launchers see it: what it can do, and its kernels, compiled as they are first needed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from worker_orcd.kernels.driver import Argument, Kernel, shared_bytes_per_block
from worker_orcd.kernels.nvrtc import architecture, cubin
from worker_orcd.kernels.source import Source

MAX_COMPILERS = 8
ALIGNMENT_BYTES = 16  # of what kernels read or copy by the vector


@dataclass(frozen=True)
class Card:
    """What a variant may use."""

    has_wgmma: bool
    shared_bytes: int  # of one block
    has_clusters: bool = False  # blocks that run together and read each other's shared memory


@dataclass(frozen=True)
class Work:
    """The shape of a launch."""

    grid: tuple[int, int, int]  # blocks
    threads: int  # of a block
    shared_bytes: int = 0  # of a block


class Gpu:
    """Launches go to torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(self.device)
        self.card = Card(properties.major == 9, shared_bytes_per_block(index), properties.major >= 9)
        self.num_sms: int = properties.multi_processor_count
        self._arch = architecture((properties.major, properties.minor))
        self._code: dict[Source, Future[bytes]] = {}
        self._kernels: dict[tuple[Source, str, int], Kernel] = {}
        self._compilers = ThreadPoolExecutor(MAX_COMPILERS, "nvrtc")  # NVRTC lets go of the interpreter

    def compile_ahead(self, source: Source) -> Future[bytes]:
        """Begin to compile on another thread, unless that was begun before."""
        if source not in self._code:
            self._code[source] = self._compilers.submit(
                cubin, source.text, source.headers, source.options, self._arch
            )
        return self._code[source]

    def launch(self, source: Source, name: str, work: Work, args: Sequence[Argument]) -> None:
        """Run function `name` of `source`; nothing is launched for an empty grid."""
        if 0 in work.grid:
            return
        key = source, name, work.shared_bytes
        kernel = self._kernels.get(key)
        if kernel is None:
            code = self.compile_ahead(source).result()
            kernel = self._kernels[key] = Kernel(code, name, work.shared_bytes, self.device.index)
        # torch.cuda.current_stream makes an object around this number, which takes longer than the launch
        kernel(work.grid, work.threads, args, torch._C._cuda_getCurrentRawStream(self.device.index))

    def require(self, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError unless all are contiguous, of `dtype`, aligned and on this GPU: kernels trust pointers.

        Integers of 64 bits are read one by one and may begin anywhere.
        """
        alignment = 1 if dtype is torch.int64 else ALIGNMENT_BYTES
        for tensor in tensors:
            if tensor.dtype is not dtype or not tensor.is_contiguous():
                raise ValueError(f"{dtype} and contiguous is needed, not {tensor.dtype} {tensor.stride()}")
            if tensor.device != self.device:
                raise ValueError(f"a tensor lies on {tensor.device}, not on {self.device}")
            if offset := tensor.data_ptr() % alignment:
                raise ValueError(
                    f"{dtype} {tuple(tensor.shape)} begins {offset} bytes past a multiple of {ALIGNMENT_BYTES} bytes"
                )
