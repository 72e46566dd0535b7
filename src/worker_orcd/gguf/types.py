"""The numbers a GGUF file uses for types: tensors (`GgmlType`), metadata values (`ValueType`), whole files.

Ids and block sizes are those of ggml's type table; ids missing here are retired or never stored in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

DEFAULT_ALIGNMENT = 32
"""Bytes to which tensors are placed in a file without `general.alignment`."""


class GgmlType(IntEnum):
    """Storage type of a tensor. A row of K elements is K / `block_elems` blocks of `block_bytes` bytes each.

    All types a file may hold are here so that any file can be listed; `quant` decides which ones can run.
    """

    block_elems: int
    block_bytes: int

    def __new__(cls, type_id: int, block_elems: int, block_bytes: int) -> GgmlType:
        member = int.__new__(cls, type_id)
        member._value_ = type_id
        member.block_elems = block_elems
        member.block_bytes = block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` elements; `k` must be a multiple of `block_elems`."""
        assert k % self.block_elems == 0, f"{k} is not a multiple of {self.block_elems}"
        return k // self.block_elems * self.block_bytes


GGML_TYPES: Mapping[int, GgmlType] = MappingProxyType({int(member): member for member in GgmlType})
"""Type by its id in the file."""


class ValueType(IntEnum):
    """Type tag of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


VALUE_TYPES: Mapping[int, ValueType] = MappingProxyType({int(member): member for member in ValueType})
"""Type by its tag in the file."""

FILE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        7: "Q8_0",
        8: "Q5_0",
        9: "Q5_1",
        10: "Q2_K",
        11: "Q3_K_S",
        12: "Q3_K_M",
        13: "Q3_K_L",
        14: "Q4_K_S",
        15: "Q4_K_M",
        16: "Q5_K_S",
        17: "Q5_K_M",
        18: "Q6_K",
        19: "IQ2_XXS",
        20: "IQ2_XS",
        21: "Q2_K_S",
        22: "IQ3_XS",
        23: "IQ3_XXS",
        24: "IQ1_S",
        25: "IQ4_NL",
        26: "IQ3_S",
        27: "IQ3_M",
        28: "IQ2_S",
        29: "IQ2_M",
        30: "IQ4_XS",
        31: "IQ1_M",
        32: "BF16",
        36: "TQ1_0",
        37: "TQ2_0",
        38: "MXFP4",
        39: "NVFP4",
        40: "Q1_0",
    }
)
"""`general.file_type` → the name people know the file by (38 is MXFP4 experts with Q8_0 for the rest)."""
