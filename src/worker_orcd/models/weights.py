"""From the tensors of a file to weights on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from worker_orcd.backends.base import Backend, PackedWeight
from worker_orcd.gguf.reader import GgufFile, TensorInfo
from worker_orcd.models.tensors import Shape
from worker_orcd.quant.format import format_of

OnProgress = Callable[[int, int, int], None]  # percent, bytes done, bytes in all


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
    """Read, move and pack every tensor of `table`, in file order, `chunk_bytes` at a time."""
    weights = Weights({}, {})
    progress = _Progress(sum(gguf.tensors[name].nbytes for name in table), on_progress)
    for name, info in gguf.tensors.items():
        raw = _read(gguf, info, backend.device, chunk_bytes, progress)
        if len(info.shape) == 2:
            weights.matrices[name] = backend.pack(raw, info.type, (info.shape[0], info.shape[1]))
        else:
            blocks = raw.view(-1, info.type.block_bytes)
            weights.vectors[name] = format_of(info.type).dequantize(blocks).view(info.shape)
    return weights


def _read(gguf: GgufFile, info: TensorInfo, device: torch.device, chunk_bytes: int, progress: _Progress) -> Tensor:
    """The tensor's bytes on the device: u8 [nbytes]."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8, device=device)
    staging = None if device.type == "cpu" else torch.empty(chunk_bytes, dtype=torch.uint8)
    for start in range(0, info.nbytes, chunk_bytes):
        part = raw[start : start + chunk_bytes]
        host = part if staging is None else staging[: len(part)]
        gguf.read(info.name, host.numpy().data, start, len(part))
        if staging is not None:
            part.copy_(host)
        progress.add(len(part))
    return raw


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
