"""File + config → a worker that can serve: the only module that names concrete classes.

What the API process needs (`draw_up`, `load_texts`) imports no torch; the rest runs in the engine's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from worker_orcd import __version__
from worker_orcd.config import MIB, WorkerConfig
from worker_orcd.errors import CudaError, ModelLoadFailed, StartFailed
from worker_orcd.gguf.fingerprint import fingerprint
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models.rope import FACTORS
from worker_orcd.models.spec import ModelSpec, read_spec
from worker_orcd.models.tensors import check_tensors, tensor_table, use_gguf_names
from worker_orcd.vram.plan import (
    HOST_CACHE_BYTES,
    CacheSize,
    Plan,
    kv_bytes_per_token,
    plan_cuda,
    plan_reference,
    size_contiguous,
    size_paged,
)
from worker_orcd.vram.workspace import F16, F32, Dims

if TYPE_CHECKING:  # torch takes seconds to import; `plan` and `inspect` come through here and must not wait
    import torch

    from worker_orcd.backends.base import Backend
    from worker_orcd.engine.core import EngineCore
    from worker_orcd.engine.loop import EngineFacts
    from worker_orcd.engine.runtime import Runtime
    from worker_orcd.kv.allocator import KVCacheAllocator
    from worker_orcd.models.adapter import ModelAdapter
    from worker_orcd.models.weights import OnProgress, Weights
    from worker_orcd.tokenizer.base import Tokenizer
    from worker_orcd.tokenizer.chat import ChatTemplate

STEP_TOKENS = {"cpu": 64, "cuda": 2048}  # by default: bounds workspace, and how long a cancel can go unseen
MAX_ROWS = 65_535  # that a kernel of kernels/ops takes; with experts a token has one for each it uses


def embedded_model() -> Path:
    """The haiku model that comes with the package."""
    return Path(str(files("worker_orcd") / "assets" / "haiku.gguf"))


@dataclass(frozen=True)
class Blueprint:
    """A model file found fit to run under this configuration; nothing is loaded yet."""

    gguf: GgufFile
    spec: ModelSpec
    cache: CacheSize
    max_step_tokens: int
    plan: Plan

    @property
    def context_length(self) -> int:
        """Tokens one sequence may hold."""
        return self.cache.context_length


def draw_up(config: WorkerConfig) -> Blueprint:
    """Open and check the model and plan its memory. Raises ModelLoadFailed or StartFailed."""
    gguf = GgufFile.open(config.model or embedded_model())
    use_gguf_names(gguf)
    spec = read_spec(gguf)
    check_tensors(gguf, tensor_table(spec, gguf.tensors))
    max_step_tokens = config.max_tokens_per_step or max(STEP_TOKENS[config.device], config.max_batch)
    most = MAX_ROWS // (spec.experts.num_used if spec.experts else 1)
    if max_step_tokens > most and not config.is_reference:
        raise StartFailed(f"max_tokens_per_step is {max_step_tokens}; this model allows {most} on the GPU")
    cache = _cache_size(config, spec, HOST_CACHE_BYTES if config.is_reference else 0)
    return Blueprint(gguf, spec, cache, max_step_tokens, _plan(config, gguf, spec, cache, max_step_tokens))


def fill_vram(config: WorkerConfig, blueprint: Blueprint, free_bytes: int) -> Blueprint:
    """The same with a cache that takes what nothing else needs of `free_bytes`; not for the reference backend."""
    if config.is_reference:
        return blueprint
    gguf, spec = blueprint.gguf, blueprint.spec
    cache = _cache_size(config, spec, blueprint.plan.cache_room(free_bytes))
    return replace(blueprint, cache=cache, plan=_plan(config, gguf, spec, cache, blueprint.max_step_tokens))


def _plan(config: WorkerConfig, gguf: GgufFile, spec: ModelSpec, cache: CacheSize, max_step_tokens: int) -> Plan:
    dims = _dims(spec, cache, config, max_step_tokens)
    kept = {name: info for name, info in gguf.tensors.items() if name not in FACTORS}  # those end in the tables
    if config.is_reference:
        return plan_reference(kept, dims, config.device == "cuda")
    table = {name: shape for name, shape in tensor_table(spec, gguf.tensors).items() if name not in FACTORS}
    return plan_cuda(kept, table, dims, config.cuda_graphs, config.vram_reserve_mb * MIB)


def _cache_size(config: WorkerConfig, spec: ModelSpec, room_bytes: int) -> CacheSize:
    """As many contexts as `room_bytes` or --kv-cache-size-mb hold, of --context-length tokens or the model's own.

    Without --kv-cache-size-mb at least one; what that holds may shorten the model's own, never one asked for.
    """
    if config.context_length is not None and config.context_length > spec.context_length:
        raise StartFailed(
            f"context_length is {config.context_length}; {spec.architecture} model allows {spec.context_length}"
        )
    per_token = kv_bytes_per_token(spec.num_layers, spec.kv_width, _cache_bytes(config))
    context = config.context_length or spec.context_length
    block = config.kv_block_size if config.kv_layout == "paged" else 1
    least = -(-context // block) * block * per_token
    limit = max(room_bytes, least)
    if config.kv_cache_size_mb is not None:
        limit = config.kv_cache_size_mb * MIB
    if config.kv_layout == "paged":
        cache = size_paged(per_token, context, config.max_batch, limit, config.kv_block_size)
    else:
        cache = size_contiguous(per_token, context, config.max_batch, limit)
    if context < 2:
        raise StartFailed(f"context_length is {context}; a prompt token and an answer token need 2")
    if cache.context_length < 2:
        raise StartFailed(
            f"kv_cache_size_mb is {config.kv_cache_size_mb}; a token takes {per_token} bytes, and the smallest cache "
            f"has a block of {config.kv_block_size}"
        )
    if cache.context_length < (config.context_length or 0):
        raise StartFailed(
            f"context_length is {context}, which takes {-(-least // MIB)} MiB of cache; kv_cache_size_mb is "
            f"{config.kv_cache_size_mb}, which holds {cache.context_length} tokens"
        )
    return cache


def shortened(config: WorkerConfig, blueprint: Blueprint) -> str:
    """A warning where the given size of the cache shortens the model's context, else empty."""
    context, own = blueprint.context_length, blueprint.spec.context_length
    if config.context_length is not None or context == own:
        return ""
    size = config.kv_cache_size_mb
    return f"context_length is {context}, not the model's {own}: kv_cache_size_mb {size} holds no more"


def _cache_bytes(config: WorkerConfig) -> int:
    """Of an element: float32 for the reference, else float16."""
    return F32 if config.is_reference else F16


def _dims(spec: ModelSpec, cache: CacheSize, config: WorkerConfig, max_step_tokens: int) -> Dims:
    return Dims(
        num_layers=spec.num_layers,
        hidden=spec.hidden,
        ffn=spec.mlp_width,
        num_experts_used=0 if spec.experts is None else spec.experts.num_used,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rope_dim=spec.rope_dims,
        vocab_size=spec.vocab_size,
        context_length=cache.context_length,
        cache_tokens=cache.num_tokens,
        cache_bytes=_cache_bytes(config),
        table_width=-(-cache.context_length // cache.block_size),
        max_batch=config.max_batch,
        max_step_tokens=max_step_tokens,
        query_scales=cache.context_length if spec.attn_temperature else 0,
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
    return Texts(tokenizer, ChatTemplate.load(blueprint.gguf, tokenizer, config.chat_template))


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

    from worker_orcd.engine.runtime import Runtime
    from worker_orcd.kv.pool import KVShape, allocate_pool, eraser
    from worker_orcd.models.weights import load_weights
    from worker_orcd.vram.ledger import Ledger

    device = select_device(config)
    if device.type == "cpu":  # leave a core to HTTP: threads that share theirs wait whole time slices for each other
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    free_bytes = _free_bytes(device)
    blueprint = fill_vram(config, blueprint, free_bytes + blueprint.plan.nbytes("cuda_context"))
    gguf, spec, cache = blueprint.gguf, blueprint.spec, blueprint.cache
    blueprint.plan.in_context().require(free_bytes, str(device), str(gguf.path))
    backend = _backend(config, device)
    weights = load_weights(gguf, tensor_table(spec, gguf.tensors), backend, config.load_chunk_bytes, on_progress)
    adapter = _adapter(spec)(spec, weights, backend, cache.context_length)
    dtype = torch.float32 if config.is_reference else torch.float16
    shape = KVShape(spec.num_layers, cache.num_blocks, cache.block_size, spec.num_kv_heads, spec.head_dim, dtype)
    if device.type == "cuda":
        del weights
        torch.cuda.empty_cache()  # what loading took for a while is the cache's now
    kv = allocate_pool(shape, device)
    ledger = Ledger()
    ledger.enter("weights", "model", adapter)
    ledger.enter("kv_cache", "cache", kv)
    can_record = backend.can_record(spec.head_dim)
    allocator = _allocator(config, cache, eraser(kv))
    runtime = Runtime(adapter, kv, allocator, device, can_record, ledger, free_bytes, backend.sample_kernel)
    return replace(runtime, inspect=_inspector(runtime)) if device.type == "cuda" else runtime


def _inspector(runtime: Runtime) -> Callable[[], str]:
    """Looks where every tensor lies. Raises CudaError when one is not in VRAM to begin with."""
    from worker_orcd.vram.residency import Residency, locate_by_driver

    inspect = Residency(runtime.ledger.tensors, f"device {runtime.device.index}", locate_by_driver())
    if problem := inspect():
        raise CudaError(problem)
    return inspect


def _adapter(spec: ModelSpec) -> Callable[[ModelSpec, Weights, Backend, int], ModelAdapter]:
    from worker_orcd.models.gpt2 import GPTInferenceAdapter
    from worker_orcd.models.llama import LlamaInferenceAdapter

    return GPTInferenceAdapter if spec.family.adapter == "gpt" else LlamaInferenceAdapter


def _backend(config: WorkerConfig, device: torch.device) -> Backend:
    if config.is_reference:
        from worker_orcd.backends.torch_ref import TorchBackend

        return TorchBackend(device)
    from worker_orcd.backends.cuda import CudaBackend

    return CudaBackend(device)


def _allocator(config: WorkerConfig, cache: CacheSize, erase: Callable[[list[int]], None]) -> KVCacheAllocator:
    from worker_orcd.kv.allocator import ContiguousAllocator
    from worker_orcd.kv.paged import PagedAllocator

    if config.kv_layout == "contiguous":
        return ContiguousAllocator(cache.num_blocks, cache.block_size, erase)
    return PagedAllocator(cache.num_blocks, cache.block_size, erase, share=config.prefix_cache)


def _reload_tokenizer(config: WorkerConfig) -> Tokenizer:
    """The engine's own, for grammars; its process has closed the file by then."""
    from worker_orcd.tokenizer.load import load_tokenizer

    return load_tokenizer(GgufFile.open(config.model or embedded_model()), config.tokenizer_json)


def _model_name(gguf: GgufFile) -> str:
    name = gguf.metadata.get("general.name")
    return name if isinstance(name, str) and name else gguf.path.stem


def _kernel_set(config: WorkerConfig, device: torch.device) -> str:
    """Name and version of all that decides bits."""
    import torch

    backend = "torch-reference" if config.is_reference else "cuda"
    card = f" {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{backend} {__version__} torch {torch.__version__} {device.type}{card}"


def build_core(
    config: WorkerConfig, blueprint: Blueprint, runtime: Runtime, eog_ids: frozenset[int], unsampleable: list[int]
) -> tuple[EngineCore, EngineFacts]:
    """The engine on a loaded model, tried out with its largest step. Ids past the tokenizer's own never win."""
    from worker_orcd.engine.core import EngineCore
    from worker_orcd.engine.grammar import GrammarCompiler
    from worker_orcd.engine.graphs import Graphs
    from worker_orcd.engine.loop import EngineFacts, warm_up
    from worker_orcd.engine.plain_step import PlainStep
    from worker_orcd.engine.request import ModelInfo
    from worker_orcd.engine.sampler import Sampler
    from worker_orcd.engine.scheduler import SchedulerLimits

    gguf, spec, cache, device = blueprint.gguf, blueprint.spec, blueprint.cache, runtime.device
    printable_path = os.fsencode(gguf.path).decode("utf-8", "backslashreplace")
    info = ModelInfo(
        name=_model_name(gguf),
        path=printable_path,
        architecture=spec.architecture,
        quant_kind=gguf.quant_kind,
        context_length=cache.context_length,
        vocab_size=spec.vocab_size,
        device=str(device),
        backend="torch-reference" if config.is_reference else "cuda",
        fingerprint=fingerprint(gguf),
        kernels=_kernel_set(config, device),
    )
    limits = SchedulerLimits(
        config.max_batch, blueprint.max_step_tokens, cache.context_length, config.scheduling_policy
    )
    graphs = Graphs(runtime, cache.context_length) if config.cuda_graphs and runtime.can_record else None
    kernel = runtime.sample_kernel and runtime.sample_kernel(unsampleable, spec.vocab_size)
    step = PlainStep(runtime, Sampler(unsampleable, device, eog_ids, kernel), graphs)
    compiler = GrammarCompiler(lambda: _reload_tokenizer(config), spec.vocab_size)
    scope = {"model": printable_path, "cache": str(runtime.kv[0].k.dtype)}
    core = EngineCore(step, limits, eog_ids, scope, compiler=compiler)
    slowest_s = warm_up(
        core, limits.max_step_tokens, limits.context_length, config.max_batch if device.type == "cuda" else 0
    )
    memory, warning = _memory(runtime, blueprint.plan.nbytes("workspace", "cuda_graphs"))
    vram_bytes = sum(memory.values()) if device.type == "cuda" else 0
    blocks = runtime.allocator.num_blocks, runtime.allocator.block_size
    warnings = [text for text in (step.warning, warning) if text]
    return core, EngineFacts(info, *blocks, config.max_batch, vram_bytes, slowest_s, warnings, memory)


def _memory(runtime: Runtime, planned_workspace_bytes: int) -> tuple[dict[str, int], str]:
    """What is set aside now, by purpose, and what about it does not add up."""
    import torch

    from worker_orcd.vram.ledger import disagreement

    device = runtime.device
    if device.type != "cuda":
        return runtime.ledger.by_purpose(), ""
    memory = runtime.ledger.with_workspace(torch.cuda.memory_reserved(device))
    return memory, disagreement(memory, runtime.free_before - _free_bytes(device), planned_workspace_bytes)
