"""From the tensors of a file to weights on a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from worker_orcd.backends.base import Backend, PackedWeight
from worker_orcd.errors import InsufficientVram
from worker_orcd.gguf.reader import GgufFile, TensorInfo
from worker_orcd.models.tensors import Shape
from worker_orcd.quant.format import format_of

OnProgress = Callable[[int, int, int], None]  # percent, bytes done, bytes in all
RING = 8  # buffers of a chunk each between file and device
READERS = 3  # threads that fill them: one alone does not keep up with a fast disk


@dataclass(frozen=True)
class Weights:
    """Tensors by GGUF name: matrices packed by the backend, vectors in float32."""

    matrices: dict[str, PackedWeight]
    vectors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.matrices.values()) + sum(v.nbytes for v in self.vectors.values())


def load_weights(
    gguf: GgufFile, table: dict[str, Shape], backend: Backend, chunk_bytes: int, on_progress: OnProgress
) -> Weights:
    """Read, move and pack every tensor of the file, in its order, `chunk_bytes` at a time.

    Raises ModelLoadFailed when the file changes meanwhile, and InsufficientVram when the device is full.
    """
    weights = Weights({}, {})
    progress = _Progress(sum(gguf.tensors[name].nbytes for name in table), on_progress)
    if backend.device.type == "cpu":
        stored = _read(gguf, chunk_bytes, progress.add)
    else:
        stored = read_ahead(gguf, CudaLane(backend.device), chunk_bytes, progress.add)
    try:
        for info, raw in stored:
            shape = table[info.name]
            if info.name.endswith(".weight") and len(shape) > 1:  # of experts: one matrix under the other
                rows, count = prod(shape[:-1]), prod(shape[:-2])
                weights.matrices[info.name] = backend.pack(raw, info.type, (rows, shape[-1]), count)
            else:
                blocks = raw.view(-1, info.type.block_bytes)
                weights.vectors[info.name] = format_of(info.type).dequantize(blocks).flatten()
    except torch.OutOfMemoryError as error:
        raise InsufficientVram(f"{backend.device} is full after {weights.nbytes} bytes of weights") from error
    return weights


def _read(gguf: GgufFile, chunk_bytes: int, on_read: Callable[[int], None]) -> Iterator[tuple[TensorInfo, Tensor]]:
    """The bytes of each tensor in the host's memory: u8 [nbytes]."""
    for info in gguf.tensors.values():
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        for start in range(0, info.nbytes, chunk_bytes):
            part = raw[start : start + chunk_bytes]
            gguf.read(info.name, part.numpy().data, start, len(part))
            on_read(len(part))
        yield info, raw


class Lane(Protocol):
    """The way to a device, beside what it computes."""

    def buffer(self, nbytes: int) -> Tensor:
        """Memory of the host to copy from: u8 [nbytes]."""
        ...

    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device: u8 [nbytes]."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Begin to copy; the answer waits until `source` may be written again, on any thread."""
        ...

    def arrive(self, target: Tensor) -> None:
        """What is computed from now on finds `target` copied."""
        ...


class CudaLane:
    """A stream of its own, and memory that its copies take without waiting for what still uses the last one's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, nbytes: int) -> Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        copied: torch.cuda.Event = self._stream.record_event()
        return copied.synchronize

    def arrive(self, target: Tensor) -> None:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        target.record_stream(computing)  # its memory is not the lane's again before that has read it


def read_ahead(
    gguf: GgufFile, lane: Lane, chunk_bytes: int, on_copied: Callable[[int], None]
) -> Iterator[tuple[TensorInfo, Tensor]]:
    """The bytes of each tensor on the device: u8 [nbytes].

    Threads fill a ring of buffers while others are copied and the tensor before is packed. The host never holds more
    of the file than the ring.
    """
    chunks = [(info, start) for info in gguf.tensors.values() for start in range(0, info.nbytes, chunk_bytes)]
    ring = [lane.buffer(chunk_bytes) for _ in range(min(RING, len(chunks)))]
    wait_copied: list[Callable[[], None]] = [lambda: None] * len(ring)

    def fill(number: int) -> Tensor:
        (info, start), slot = chunks[number], number % len(ring)
        wait_copied[slot]()
        part = ring[slot][: min(chunk_bytes, info.nbytes - start)]
        gguf.read(info.name, part.numpy().data, start, len(part))
        return part

    with ThreadPoolExecutor(READERS, "loader") as readers:
        filling = deque(readers.submit(fill, number) for number in range(len(ring)))
        for number, (info, start) in enumerate(chunks):
            if start == 0:
                raw = lane.empty(info.nbytes)
            part = filling.popleft().result()
            wait_copied[number % len(ring)] = lane.copy(raw[start : start + len(part)], part)
            if number + len(ring) < len(chunks):
                filling.append(readers.submit(fill, number + len(ring)))
            on_copied(len(part))
            if start + len(part) == info.nbytes:
                lane.arrive(raw)
                yield info, raw


class _Progress:
    """Calls back exactly five times: at 0, 25, 50, 75 and 100 percent."""

    def __init__(self, total: int, callback: OnProgress) -> None:
        self._total, self._callback = total, callback
        self._done, self._next = 0, 0
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        while self._next <= 100 and self._done * 100 >= self._next * self._total:
            self._callback(self._next, self._done, self._total)
            self._next += 25
