"""File + config → a worker that can serve: the only module that names concrete classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from worker_orcd.config import MIB, WorkerConfig
from worker_orcd.errors import ModelLoadFailed, StartFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models.spec import ModelSpec, read_spec
from worker_orcd.models.tensors import check_tensors, tensor_table
from worker_orcd.vram.plan import Dims, Plan, kv_bytes_per_token, plan_reference

if TYPE_CHECKING:  # torch takes seconds to import; `plan` and `inspect` come through here and must not wait
    import torch

    from worker_orcd.engine.engine import SerialEngine
    from worker_orcd.engine.runtime import Runtime
    from worker_orcd.models.weights import OnProgress
    from worker_orcd.tokenizer.base import Tokenizer
    from worker_orcd.tokenizer.chat import ChatTemplate

PREFILL_CHUNK = 128  # prompt tokens a step: bounds workspace, and how long a cancel can go unseen


def embedded_model() -> Path:
    """The haiku model that comes with the package."""
    return Path(str(files("worker_orcd") / "assets" / "haiku.gguf"))


@dataclass(frozen=True)
class Blueprint:
    """A model file found fit to run under this configuration; nothing is loaded yet."""

    gguf: GgufFile
    spec: ModelSpec
    context_length: int
    plan: Plan


def draw_up(config: WorkerConfig) -> Blueprint:
    """Open and check the model and plan its memory. Raises ModelLoadFailed or StartFailed."""
    gguf = GgufFile.open(config.model or embedded_model())
    spec = read_spec(gguf)
    check_tensors(gguf, tensor_table(spec, gguf.tensors))
    context = _context_length(config, spec)
    return Blueprint(gguf, spec, context, plan_reference(gguf.tensors, _dims(spec, context), config.device == "cuda"))


def _context_length(config: WorkerConfig, spec: ModelSpec) -> int:
    """The model's own, lowered by --context-length and by what --kv-cache-size-mb can hold."""
    if config.context_length is not None and config.context_length > spec.context_length:
        raise StartFailed(
            f"context_length is {config.context_length}; {spec.architecture} model allows {spec.context_length}"
        )
    context = config.context_length or spec.context_length
    if config.kv_cache_size_mb is not None:
        context = min(context, config.kv_cache_size_mb * MIB // kv_bytes_per_token(_dims(spec, context)))
        if context < 1:
            raise StartFailed(f"kv_cache_size_mb is {config.kv_cache_size_mb}; that is less than one token takes")
    return context


def _dims(spec: ModelSpec, context_length: int) -> Dims:
    return Dims(
        num_layers=spec.num_layers,
        hidden=spec.hidden,
        ffn=spec.ffn,
        q_width=spec.q_width,
        kv_width=spec.kv_width,
        rope_dim=spec.rope_dim,
        vocab_size=spec.vocab_size,
        context_length=context_length,
        prefill_chunk=PREFILL_CHUNK,
    )


@dataclass(frozen=True)
class Texts:
    """Everything between text and token ids."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


def load_texts(config: WorkerConfig, blueprint: Blueprint) -> Texts:
    """Tokenizer and chat template of the file. Raises ModelLoadFailed when they do not fit the model."""
    from worker_orcd.tokenizer.chat import ChatTemplate
    from worker_orcd.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(blueprint.gguf, config.tokenizer_json)
    if tokenizer.vocab_size > blueprint.spec.vocab_size:
        raise ModelLoadFailed(
            f"the tokenizer knows {tokenizer.vocab_size} tokens, "
            f"token_embd.weight has {blueprint.spec.vocab_size} rows"
        )
    tokenizer.prepare()
    return Texts(tokenizer, ChatTemplate.from_gguf(blueprint.gguf, tokenizer))


def select_device(config: WorkerConfig) -> torch.device:
    """The device that was asked for, or StartFailed; never another one."""
    import torch

    if config.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise StartFailed(
            "no usable NVIDIA GPU was found. The CPU is never used unless asked for: pass --device cpu to run "
            "the (slow) reference backend"
        )
    if config.gpu_device >= count:
        raise StartFailed(f"gpu_device is {config.gpu_device}; this machine has {count} (0-{count - 1})")
    return torch.device("cuda", config.gpu_device)


def _free_bytes(device: torch.device) -> int:
    """What the driver, or for the CPU the kernel, says can still be taken."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise StartFailed("/proc/meminfo does not say how much memory is available")


def load_runtime(config: WorkerConfig, blueprint: Blueprint, on_progress: OnProgress) -> Runtime:
    """Weights onto the device, cache reserved. Raises InsufficientVram before loading when the plan does not fit."""
    import torch

    from worker_orcd.backends.torch_ref import TorchBackend
    from worker_orcd.engine.runtime import Runtime
    from worker_orcd.kv.allocator import ContiguousAllocator
    from worker_orcd.kv.pool import KVShape, allocate_pool
    from worker_orcd.models.llama import LlamaInferenceAdapter
    from worker_orcd.models.weights import load_weights

    device = select_device(config)
    if device.type == "cpu":  # leave a core to HTTP: threads that share theirs wait whole time slices for each other
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    gguf, spec, context = blueprint.gguf, blueprint.spec, blueprint.context_length
    blueprint.plan.require(_free_bytes(device), str(device), str(gguf.path))
    backend = TorchBackend(device)
    weights = load_weights(gguf, tensor_table(spec, gguf.tensors), backend, config.load_chunk_bytes, on_progress)
    adapter = LlamaInferenceAdapter(spec, weights, backend, context)
    kv = allocate_pool(KVShape(spec.num_layers, 1, context, spec.num_kv_heads, spec.head_dim, torch.float32), device)
    return Runtime(adapter, kv, ContiguousAllocator(num_sequences=1, max_tokens=context), device)


def _model_name(gguf: GgufFile) -> str:
    name = gguf.metadata.get("general.name")
    return name if isinstance(name, str) and name else gguf.path.stem


def build_engine(config: WorkerConfig, blueprint: Blueprint, runtime: Runtime, tokenizer: Tokenizer) -> SerialEngine:
    """Start the engine thread on a loaded model."""
    import torch

    from worker_orcd.engine.engine import EngineLimits, SerialEngine
    from worker_orcd.engine.metrics import NoOpMetrics
    from worker_orcd.engine.request import ModelInfo
    from worker_orcd.engine.sampler import Sampler
    from worker_orcd.engine.step import PlainStep

    gguf, spec, device = blueprint.gguf, blueprint.spec, runtime.device
    padding = range(tokenizer.vocab_size, spec.vocab_size)
    info = ModelInfo(
        name=_model_name(gguf),
        path=str(gguf.path),
        architecture=spec.architecture,
        quant_kind=gguf.quant_kind,
        context_length=blueprint.context_length,
        vocab_size=spec.vocab_size,
        device=str(device),
        backend="torch-reference",
    )
    vram_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return SerialEngine(
        info,
        PlainStep(runtime, Sampler([*tokenizer.unsampleable, *padding])),
        runtime.allocator,
        tokenizer.eog_ids,
        NoOpMetrics(),
        EngineLimits(config.max_queue, PREFILL_CHUNK, vram_bytes),
    )
