"""CUDA C++ to machine code with NVRTC, through ctypes: no nvcc, no headers, no GPU needed. Results are kept on disk.

A cache entry is the SHA-256 of the code followed by the code, in a file named by the hash of everything the code
depends on. Entries are written under another name and renamed, so readers see a whole file or none; one that does not
match its own hash is compiled again. A cache that cannot be written costs time and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from worker_orcd.errors import CudaError

DIGEST_BYTES = hashlib.sha256().digest_size
LOG_CHARS = 3000


class CompileFailed(CudaError):
    """A kernel that does not compile: a bug of ours, or an NVRTC too old for the card."""


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability; from 9.0 on with that generation's own instructions."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def cubin(source: str, headers: Mapping[str, str], options: tuple[str, ...], arch: str) -> bytes:
    """Machine code of `source`, which may include `headers` by name: from the cache, or compiled."""
    entry = cache_folder() / f"{_key(source, headers, options, arch)}.cubin"
    found = _read(entry)
    if found is None:
        found = compile_cubin(source, headers, options, arch)
        _write(entry, found)
    return found


def compile_cubin(source: str, headers: Mapping[str, str], options: tuple[str, ...], arch: str) -> bytes:
    """Compile now. Raises CompileFailed with the compiler's words."""
    lib, program = nvrtc(), ctypes.c_void_p()
    names, texts = _strings(list(headers)), _strings(list(headers.values()))
    created = lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), texts, names)
    if created:
        raise CompileFailed(f"NVRTC could not take the source: error {created}")
    try:
        arguments = [f"--gpu-architecture={arch}", "--std=c++17", *options]
        if lib.nvrtcCompileProgram(program, len(arguments), _strings(arguments)):
            log = _text(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program).decode(errors="replace")
            raise CompileFailed(f"NVRTC refused a kernel for {arch}: {log[:LOG_CHARS]}")
        return _text(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "worker-orcd" / "kernels"


@lru_cache(maxsize=1)
def nvrtc() -> ctypes.CDLL:
    """The library: of a Python package if there is one, else the system's. Raises CudaError if there is none."""
    for candidate in [*_packaged(), Path("libnvrtc.so.13"), Path("libnvrtc.so.12")]:
        with suppress(OSError):
            for part in candidate.parent.glob("libnvrtc-builtins.so.*") if candidate.is_absolute() else ():
                ctypes.CDLL(str(part))  # NVRTC asks for it by name only, which finds what is loaded already
            return ctypes.CDLL(str(candidate))
    raise CudaError("NVRTC, the run-time compiler of CUDA, was not found; pip install 'worker-orcd[gpu]' brings it")


@lru_cache(maxsize=1)
def nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _packaged() -> list[Path]:
    return [path for base in sys.path for path in sorted(Path(base).glob("nvidia/*/lib/libnvrtc.so.1[23]"))]


def _key(source: str, headers: Mapping[str, str], options: tuple[str, ...], arch: str) -> str:
    parts = [nvrtc_version(), arch, *options, source, *(text for item in sorted(headers.items()) for text in item)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(entry: Path) -> bytes | None:
    try:
        stored = entry.read_bytes()
    except OSError:
        return None
    digest, code = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(entry: Path, code: bytes) -> None:
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=entry.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(name, entry)
        except OSError:
            os.unlink(name)


def _strings(texts: list[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _text(size_of: ctypes._NamedFuncPointer, read: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw
