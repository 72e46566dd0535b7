"""WorkerConfig: the one source of flags, `LLORCH_*` variables, the YAML file and their documentation."""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, Token

from worker_orcd.errors import StartFailed

KIB, MIB = 1024, 1024 * 1024
ATTENTION_SPLIT = 256  # positions; attention cuts the context at its multiples, and blocks must not cross a cut
PATHS = ("model", "api_key_file", "tls_cert_file", "tls_key_file", "tokenizer_json", "chat_template")
WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _integer(_: type, tokens: Sequence[Token]) -> int:
    """Raises ValueError, also for 3.5, which cyclopts itself rounds."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not an integer") from None


INTEGER = Parameter(converter=_integer)


def _help(text: str, *names: str) -> Parameter:
    return Parameter(name=names or None, help=text)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Everything a worker can be told. Values are checked once, here, and never change afterwards."""

    model: Annotated[Path | None, _help("GGUF file to serve; the embedded haiku model when left out.")] = None
    device: Annotated[
        Literal["cuda", "cpu"],
        _help("cuda, or cpu for the reference backend; never chosen on its own."),
    ] = "cuda"
    backend: Annotated[
        Literal["cuda", "reference"] | None,
        _help(
            "cuda keeps weights quantized; reference is plain torch in float32, and all there is on the CPU. When "
            "left out: cuda, on the CPU reference."
        ),
    ] = None
    gpu_device: Annotated[int, INTEGER, _help("Index of the GPU.", "--gpu-device", "--gpu")] = 0
    host: Annotated[str, _help("Address to listen on; any but a loopback address needs an API key.")] = "127.0.0.1"
    port: Annotated[int, INTEGER, _help("TCP port, 1024-65535.")] = 8080
    api_key: Annotated[
        str, _help("Key that requests must carry. Set it as LLORCH_API_KEY: flags show in the list of processes.")
    ] = field(default="", repr=False)
    api_key_file: Annotated[
        Path | None, _help("File of such keys, one a line: KEY, or tenant:KEY. Tenants share no cached prefixes.")
    ] = None
    tls_cert_file: Annotated[Path | None, _help("Certificate chain in PEM; serves HTTPS.")] = None
    tls_key_file: Annotated[Path | None, _help("Private key of the certificate, in PEM, unencrypted.")] = None
    worker_id: Annotated[str, _help("Name in events and logs; a new UUID when left out.")] = ""
    tokenizer_json: Annotated[
        Path | None, _help("tokenizer.json to use; one beside the model file is found without this.")
    ] = None
    chat_template: Annotated[
        Path | None, _help("File with a Jinja chat template to use instead of the model file's own.")
    ] = None
    context_length: Annotated[
        int | None,
        INTEGER,
        _help(
            "Tokens per sequence, prompt and answer together; when left out the model's own, or as many as "
            "--kv-cache-size-mb holds."
        ),
    ] = None
    max_tokens_in: Annotated[int | None, INTEGER, _help("Longest prompt in tokens; the context when left out.")] = (
        None
    )
    max_tokens_out: Annotated[int, INTEGER, _help("Largest max_tokens a request may ask for.")] = 2048
    max_batch: Annotated[int, INTEGER, _help("Requests computed together in one step.")] = 64
    max_tokens_per_step: Annotated[
        int | None,
        INTEGER,
        _help(
            "Tokens computed in one step, prompts and answers together; when left out 2048 on a GPU and 64 on the "
            "CPU, but at least --max-batch."
        ),
    ] = None
    max_queue: Annotated[int, INTEGER, _help("Requests that may wait; the next one gets 429 with Retry-After.")] = 128
    scheduling_policy: Annotated[
        Literal["fcfs", "priority", "shortest-prompt-first"],
        _help("Who leaves the queue first; within a policy the older request."),
    ] = "fcfs"
    kv_cache_size_mb: Annotated[
        int | None,
        INTEGER,
        _help(
            "Size of the KV cache in MiB; when left out every place of the batch gets a full context, as far as free "
            "VRAM goes (on the CPU 256 MiB), but at least one of them does."
        ),
    ] = None
    vram_reserve_mb: Annotated[
        int, INTEGER, _help("VRAM in MiB that a cache without a given size leaves free, for what no plan foresees.")
    ] = 512
    kv_layout: Annotated[
        Literal["paged", "contiguous"],
        _help("paged shares the cache in blocks; contiguous gives each request a full context, and no prefix cache."),
    ] = "paged"
    kv_block_size: Annotated[int, INTEGER, _help("Tokens in a block of the paged cache: a divisor of 256.")] = 32
    cuda_graphs: Annotated[
        bool, _help("Record the steps that only generate, and replay them; the answers are the same without.")
    ] = True
    prefix_cache: Annotated[bool, _help("Keep the blocks of ended requests for others that begin alike.")] = True
    inference_timeout_sec: Annotated[
        float, _help("Seconds from arrival after which a request ends with INFERENCE_TIMEOUT.")
    ] = 300.0
    shutdown_timeout_sec: Annotated[
        float, _help("Seconds that running requests get to finish after SIGTERM or POST /shutdown.")
    ] = 30.0
    load_chunk_bytes: Annotated[int, INTEGER, _help("Bytes read from the model file at once.")] = MIB
    log_level: Annotated[
        Literal["debug", "info", "warn", "error", "mute"], _help("Least level written to the log.")
    ] = "info"

    @property
    def is_reference(self) -> bool:
        """Whether the float32 reference backend runs the model."""
        return self.device == "cpu" or self.backend == "reference"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the worker."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __post_init__(self) -> None:
        in_range("port", self.port, 1024, 65535)
        in_range("gpu_device", self.gpu_device, 0, 1023)
        in_range("max_tokens_out", self.max_tokens_out, 1, 2**20)
        in_range("max_queue", self.max_queue, 0, 2**16)
        in_range("max_batch", self.max_batch, 1, 1024)
        if self.max_tokens_per_step is not None:
            in_range("max_tokens_per_step", self.max_tokens_per_step, self.max_batch, 2**20)
        if self.kv_block_size < 1 or ATTENTION_SPLIT % self.kv_block_size:
            raise StartFailed(f"kv_block_size is {self.kv_block_size}; it must be a divisor of {ATTENTION_SPLIT}")
        in_range("load_chunk_bytes", self.load_chunk_bytes, KIB, 2048 * MIB)
        in_range("vram_reserve_mb", self.vram_reserve_mb, 0, 2**20)
        for name, least in (("context_length", 2), ("max_tokens_in", 1), ("kv_cache_size_mb", 1)):
            if (value := getattr(self, name)) is not None:
                in_range(name, value, least, 2**31 - 1)
        for name in ("inference_timeout_sec", "shutdown_timeout_sec"):
            in_range(name, getattr(self, name), 0.001, 86400.0)
        if self.device == "cpu" and self.backend == "cuda":
            raise StartFailed("backend is cuda and device is cpu; leave --backend out, or choose --device cuda")
        if not self.worker_id:
            object.__setattr__(self, "worker_id", str(uuid.uuid4()))  # the one moment before it is frozen
        if not WORKER_ID.fullmatch(self.worker_id):
            raise StartFailed(
                f"worker_id is {self.worker_id[:80]!r}; it must be a UUID or 1-64 letters, digits, '-', '_' and '.'"
            )
        for name in PATHS:
            if getattr(self, name) == Path():  # an empty flag, too
                raise StartFailed(f"{name} is empty; name a file, or leave it out")
        if self.model is not None and self.model.suffix.lower() != ".gguf":
            raise StartFailed(f"model is {str(self.model)!r}; a path ending in .gguf is needed")
        self._check_exposure()

    def _check_exposure(self) -> None:
        if not all("!" <= char <= "~" for char in self.api_key):
            raise StartFailed("api_key must be printable ASCII without spaces")
        if not self.is_loopback and not self.api_key and self.api_key_file is None:
            raise StartFailed(
                f"host is {self.host!r}, which others can reach; that needs an API key: set LLORCH_API_KEY or pass "
                "--api-key-file, or stay on a loopback address (127.0.0.1, ::1, localhost)"
            )
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise StartFailed("tls_cert_file and tls_key_file go together; one of them is missing")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Raises StartFailed with value and limits."""
    if not low <= value <= high:
        raise StartFailed(f"{name} is {value}; it must be from {low} to {high}")
