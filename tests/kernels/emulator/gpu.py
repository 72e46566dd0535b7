"""A GPU that is not there: kernels are compiled for the processor (cuda.h) and run on tensors in host memory.

For tests only: everything of CudaBackend runs, bit for bit the same for any number of rows.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from worker_orcd.kernels.driver import Argument, value_of
from worker_orcd.kernels.gpu import Card, Gpu, Work
from worker_orcd.kernels.source import Source

HEADER = Path(__file__).parent / "cuda.h"
STAND_INS = dict.fromkeys(("ptx.cuh", "async.cuh", "wgmma.cuh"), '#include "cuda.h"\n')
FLAGS = ("-std=c++17", "-O1", "-march=x86-64-v3", "-ffp-contract=off", "-fPIC", "-shared", "-w")
FLAGS += ("-fno-gnu-unique", "-fvisibility-inlines-hidden")  # two variants' shared memory of one name is not the same
FLAGS += ("-nostdinc++", "-nostdlib")  # C headers and libraries: the C++ ones take as long as our kernels
LIBRARIES = ("-lm", "-lgcc", "-lc")
COMPILER = shutil.which("g++")


class EmulatedGpu(Gpu):
    """`order` is the order in which the threads of a block take their turns: 0, 1 or 2."""

    def __init__(
        self, num_sms: int = 3, shared_bytes: int = 99 * 1024, order: int = 0, has_wgmma: bool = False
    ) -> None:
        self.device = torch.device("cpu")
        self.card = Card(has_wgmma=has_wgmma, shared_bytes=shared_bytes, has_clusters=True)
        self.num_sms, self.order = num_sms, order

    def compile_ahead(self, source: Source) -> None:  # type: ignore[override]
        """Nothing: most of what could be compiled is not run in a test."""

    def launch(self, source: Source, name: str, work: Work, args: Sequence[Argument]) -> None:
        if 0 in work.grid:
            return
        assert work.threads % 32 == 0
        assert work.shared_bytes <= self.card.shared_bytes
        values = [value_of(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        shape = (ctypes.c_int * 6)(*work.grid, work.threads, work.shared_bytes, cluster_of(source, name))
        compiled(source, name)(pointers, shape, self.order)

    def require(self, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().require(*tensors, dtype=dtype)
        assert all(t.data_ptr() % 16 == 0 for t in tensors if t.storage_offset() == 0), "as the device allocates"


def cluster_of(source: Source, name: str) -> int:
    """Blocks of a cluster of kernel `name`, as its text or an option says."""
    options = dict(option[2:].split("=") for option in source.options)
    found = re.search(rf"__cluster_dims__\((\d+), 1, 1\)[^\n]* {name}\(", source.text)
    return int(options.get("CLUSTER", found[1] if found else 1))


@lru_cache(maxsize=256)
def compiled(source: Source, name: str) -> ctypes._NamedFuncPointer:
    text = source.text.replace("extern __shared__ __align__(1024) char shared[];", "char* shared = emu::shared_base;")
    text = re.sub(r"#pragma unroll.*", "", text)
    text = re.sub(r"asm volatile\((?:[^()]|\([^()]*\))*\);", ";", text)  # waits for wgmma, and registers' numbers
    entry = f"decltype(emu::of({name}))::entry<{name}>"
    text += f'\nextern "C" void emu_run(void** a, int* shape, int order) {{ emu::run({entry}, a, shape, order); }}\n'
    parts = {**source.headers, **STAND_INS, "cuda.h": HEADER.read_text(), "kernel.cpp": text}
    digest = hashlib.sha256("\0".join([*FLAGS, *source.options, *parts, *parts.values(), name]).encode()).hexdigest()
    library = Path(tempfile.gettempdir()) / "worker-orcd-emulated" / f"{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            for file, content in parts.items():
                (Path(folder) / file).write_text(content)
            made = Path(folder) / "made.so"
            command = [str(COMPILER), *FLAGS, *source.options, f"-I{folder}", str(Path(folder) / "kernel.cpp")]
            subprocess.run([*command, *LIBRARIES, "-o", str(made)], check=True)
            made.rename(library)
    return ctypes.CDLL(str(library)).emu_run
