"""The table of formats that can run, by ggml type."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.types import GgmlType
from worker_orcd.quant.block32 import BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from worker_orcd.quant.kquant import Q4_K, Q5_K, Q6_K
from worker_orcd.quant.mxfp4 import MXFP4


class QuantFormat(Protocol):
    """What the stored blocks of one ggml type mean. B is the number of blocks."""

    type: GgmlType

    def dequantize(self, raw: Tensor) -> Tensor:
        """u8 [B, block_bytes] → f32 [B, block_elems] on the same device, in new memory: the truth."""
        ...


_ALL: tuple[QuantFormat, ...] = (
    F32(), F16(), BF16(), Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0(), Q4_K(), Q5_K(), Q6_K(), MXFP4(),
)  # fmt: skip
FORMATS: Mapping[GgmlType, QuantFormat] = MappingProxyType({entry.type: entry for entry in _ALL})


def format_of(ggml_type: GgmlType) -> QuantFormat:
    """The format of a type. Raises ModelLoadFailed when tensors of that type cannot be run."""
    found = FORMATS.get(ggml_type)
    if found is None:
        names = ", ".join(known.name for known in FORMATS)
        problem = f"tensors of type {ggml_type.name} cannot be run, use a file whose tensors are of {names}"
        raise ModelLoadFailed(problem)
    return found
