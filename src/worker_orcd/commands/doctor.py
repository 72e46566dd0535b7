"""`worker-orcd doctor`: whether this machine can serve, what is missing, and what would fit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worker_orcd.assemble import draw_up, embedded_model, load_texts
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import WorkerError
from worker_orcd.kernels.nvrtc import cache_folder, nvrtc_version
from worker_orcd.synthetic import write_header

PROBE_S = 120.0
READ_BYTES, PIECE_BYTES = 2**27, 2**22
LEAST_TIMED_BYTES = 2**24
SLOW_DISK_GBPS, SLOW_PCIE_GBPS = 0.5, 4.0  # below, loading takes noticeably long
LEAST_MEMORY_BYTES = 2**31  # two processes with Python and torch, and the buffers of a load
LEAST_CAPABILITY = (8, 0)  # bfloat16 on the tensor cores
WELL_KNOWN = (
    "qwen2.5-0.5b:Q4_K_M", "qwen3-0.6b:Q8_0", "llama-3.2-1b:Q4_K_M", "phi-3-mini:Q4_K_M", "mistral-7b:Q4_K_M",
    "qwen2.5-7b:Q4_K_M", "qwen3-8b:Q4_K_M", "llama-3.1-8b:Q4_K_M", "llama-3.1-8b:Q8_0", "gpt-oss-20b:MXFP4",
)  # fmt: skip
CONTEXT = 8192  # tokens of one sequence in the table of what fits

Grade = Literal["ok", "slow", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `missing` means that `serve` will not work; then, as with `slow`, a remedy is given."""

    name: str
    grade: Grade
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class Fit:
    """A model and the bytes `serve` plans for it; `fits` is None where the free memory is not known."""

    model: str
    planned_bytes: int
    fits: bool | None
    remark: str = ""


def run_doctor(config: WorkerConfig, as_json: bool) -> int:
    """Show the findings; exit status 1 when one is missing that `serve` needs with this configuration."""
    gpu = _probe(config) if config.device == "cuda" else {}
    free = gpu.get("free_bytes") if config.device == "cuda" else _memory_bytes()
    findings = list(_findings(config, gpu, free))
    fits = list(_fits(config, free))
    is_well = all(finding.grade != "missing" for finding in findings)
    if as_json:
        report = {"can_serve": is_well, "findings": [asdict(f) for f in findings], "fits": [asdict(f) for f in fits]}
        print(json.dumps(report))
    else:
        _show(Console(highlight=False), findings, fits, is_well)
    return 0 if is_well else 1


def _findings(config: WorkerConfig, gpu: dict[str, Any], free_bytes: int | None) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    torch = _version("torch")
    yield _found("torch", torch, "pip install torch")
    if config.device == "cuda":
        yield from _gpu(gpu, config.gpu_device)
        if not config.is_reference:
            yield _found("triton", _version("triton"), "pip install 'worker-orcd[gpu]'")
            yield _nvrtc()
            yield _kernel_cache()
    yield _address(config)
    model = _model(config, free_bytes)
    yield model
    if model.grade == "ok":
        yield _disk(config)
    memory = _memory_bytes()
    is_enough = memory >= LEAST_MEMORY_BYTES
    remedy = "" if is_enough else f"close other programs; loading needs about {_size(LEAST_MEMORY_BYTES)}"
    yield Finding("host memory", "ok" if is_enough else "slow", f"{_size(memory)} free", remedy)


def _found(name: str, value: str | None, remedy: str) -> Finding:
    return Finding(name, "ok", value) if value else Finding(name, "missing", "not installed", remedy)


def _gpu(gpu: dict[str, Any], index: int) -> Iterator[Finding]:
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        words = driver.read_text().splitlines()[0].partition("Kernel Module")[2].split()
        yield Finding("driver", "ok", next((word for word in words if word[0].isdigit()), "loaded"))
    elif "error" in gpu:  # under WSL a driver works without that file
        yield Finding("driver", "missing", "no NVIDIA driver is loaded", "install it, or use --device cpu for tests")
    if gpu.get("cuda") is None and "torch" in gpu:
        remedy = "install a build with CUDA, as https://pytorch.org/get-started says"
        yield Finding("torch CUDA", "missing", f"torch {gpu['torch']} is built without CUDA", remedy)
    if "error" in gpu:
        yield Finding("GPU", "missing", gpu["error"], "check `nvidia-smi` and --gpu-device, or use --device cpu")
        return
    capability = tuple(map(int, gpu["capability"].split(".")))
    about = f"{index}: {gpu['name']}, compute capability {gpu['capability']}, "
    about += f"{_size(gpu['free_bytes'])} of {_size(gpu['total_bytes'])} free"
    if capability < LEAST_CAPABILITY:
        yield Finding("GPU", "missing", about, "a GPU of compute capability 8.0 (Ampere) or newer is needed")
    else:
        yield Finding("GPU", "ok", about)
    speed = gpu["pcie_gb_per_s"]
    remedy = "" if speed >= SLOW_PCIE_GBPS else "loading will take long; check the slot's width and generation"
    yield Finding("PCIe", "slow" if remedy else "ok", f"{speed} GB/s to the device", remedy)


def _nvrtc() -> Finding:
    try:
        return Finding("NVRTC", "ok", nvrtc_version())
    except WorkerError as error:
        return Finding("NVRTC", "missing", "not found", error.message)


def _kernel_cache() -> Finding:
    folder = cache_folder()
    entries = list(folder.glob("*.cubin")) if folder.is_dir() else []
    about = f"{folder}: {len(entries)} kernels, {_size(sum(entry.stat().st_size for entry in entries))}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding("kernel cache", "ok", about)
    except OSError as error:
        remedy = "every start compiles anew; make it writable or point XDG_CACHE_HOME elsewhere"
        return Finding("kernel cache", "slow", f"{about}, not writable: {error.strerror}", remedy)


def _address(config: WorkerConfig) -> Finding:
    """Keys, certificate and port, by what `serve` does with them."""
    from worker_orcd.server.auth import ApiKeys
    from worker_orcd.server.run import bind, tls_context

    about = f"{config.host} port {config.port}"
    try:
        ApiKeys.of(config)
        tls_context(config)
        bind(config.host, config.port).close()
    except WorkerError as error:
        return Finding("address", "missing", f"{about} cannot be served", error.message)
    return Finding("address", "ok", about)


def _model(config: WorkerConfig, free_bytes: int | None) -> Finding:
    """What `serve` asks of a model before it loads it: a sound file, its texts, and room."""
    path = config.model or embedded_model()
    try:
        blueprint = draw_up(config)
        with blueprint.gguf:
            load_texts(config, blueprint)
        if free_bytes is not None:
            blueprint.plan.in_context().require(free_bytes, config.device, str(path))
    except WorkerError as error:
        return Finding("model", "missing", f"{path} cannot be served", error.message)
    return Finding("model", "ok", f"{path.name}, {blueprint.spec.architecture}, {blueprint.gguf.quant_kind}")


def _disk(config: WorkerConfig) -> Finding:
    """Speed of reading the model file, or one written for it, past the page cache where that can be done."""
    if config.model is not None:
        size = config.model.stat().st_size
        if size < LEAST_TIMED_BYTES:
            return Finding("disk", "ok", f"{config.model.name} has {_size(size)}, too few to be timed")
        return _read_speed(config.model, f"where {config.model.name} lies")
    here = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path(tempfile.gettempdir())
    try:
        with tempfile.NamedTemporaryFile(dir=here) as file:
            piece = os.urandom(PIECE_BYTES)
            for _ in range(READ_BYTES // PIECE_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            return _read_speed(Path(file.name), f"in {here}")
    except OSError as error:
        return Finding("disk", "slow", f"{here}: {error.strerror}", "free some space to have its speed measured")


def _read_speed(path: Path, where: str) -> Finding:
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began, done = time.perf_counter(), 0
            while done < READ_BYTES and (piece := file.read(PIECE_BYTES)):
                done += len(piece)
            speed = done / max(1e-9, time.perf_counter() - began) / 1e9
    except OSError as error:
        return Finding("disk", "missing", f"{path}: {error.strerror}", "name a file that can be read")
    remedy = "" if speed >= SLOW_DISK_GBPS else "loading will take long; put the model on a faster disk"
    return Finding("disk", "slow" if remedy else "ok", f"{speed:.2f} GB/s {where}", remedy)


def _fits(config: WorkerConfig, free_bytes: int | None) -> Iterator[Fit]:
    """The model of `config`, or well-known ones, with what `serve` would plan for each."""
    if config.model is not None:
        yield _fit(str(config.model), config, free_bytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name_and_quant in WELL_KNOWN:
            name, _, quant = name_and_quant.partition(":")
            path = Path(folder) / "model.gguf"
            own = write_header(path, name, quant)
            is_capped = config.kv_cache_size_mb is not None and config.context_length is None
            length = None if is_capped else min(own, config.context_length or CONTEXT)  # else what the cache holds
            yield _fit(f"{name} {quant}", replace(config, model=path, context_length=length), free_bytes)


def _fit(name: str, config: WorkerConfig, free_bytes: int | None) -> Fit:
    try:
        blueprint = draw_up(config)
    except WorkerError as error:
        return Fit(name, 0, False, error.message)
    blueprint.gguf.close()
    plan = blueprint.plan
    is_room = None if free_bytes is None else plan.in_context().total_bytes <= free_bytes  # a probe has its context
    return Fit(name, plan.total_bytes, is_room, f"{blueprint.context_length} tokens of context")


def _probe(config: WorkerConfig) -> dict[str, Any]:
    """What gpu_probe.py says, or why it said nothing."""
    command = [sys.executable, "-P", "-m", "worker_orcd.commands.gpu_probe", str(config.gpu_device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S)
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"the driver did not answer within {PROBE_S:g} s"}
    except (IndexError, ValueError):
        last = (done.stderr.splitlines() or ["no word"])[-1]
        return {"error": f"torch ended with status {done.returncode}: {last}"}
    return facts


def _memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def _show(console: Console, findings: list[Finding], fits: list[Fit], is_well: bool) -> None:
    marks = {"ok": "[green]✓[/]", "slow": "[yellow]![/]", "missing": "[red]✗[/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(marks[finding.grade], finding.name, escape(finding.value))
        if finding.remedy:
            table.add_row("", "", f"[dim]→ {escape(finding.remedy)}[/]")
    console.print(table)
    console.print()
    table = Table("model", "planned", "fits", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for fit in fits:
        verdict = {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}[fit.fits]
        table.add_row(
            escape(fit.model), _size(fit.planned_bytes) if fit.planned_bytes else "–", verdict, escape(fit.remark)
        )
    console.print(table)
    console.print("\nReady to serve." if is_well else "\nNot ready to serve: what is marked ✗ is missing.")
