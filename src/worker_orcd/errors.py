"""Every error a user can meet.

    WorkerError
    ├── InvalidRequest        400  INVALID_REQUEST      the body, a field or a limit
    │   ├── JobConflict       409  INVALID_REQUEST      job_id already running
    │   ├── GrammarError      400  GRAMMAR_ERROR        a schema or grammar is wrong, or costs too much
    │   └── TemplateError     400  TEMPLATE_ERROR       the chat template failed or overran its budget
    ├── Unauthorized          401  UNAUTHORIZED         no API key, or one that is not known
    ├── StartFailed           500  WORKER_START_FAILED  bad configuration, port in use, no GPU
    ├── ModelLoadFailed       500  MODEL_LOAD_FAILED    the file is missing, malformed or unsupported
    ├── InsufficientVram      503  INSUFFICIENT_VRAM    the plan does not fit; carries the numbers
    ├── VramOom               500  VRAM_OOM             one job ran out of device memory; retriable
    ├── CudaError             500  CUDA_ERROR           the device failed
    ├── InferenceTimeout      504  INFERENCE_TIMEOUT
    ├── Cancelled             499  CANCELLED
    ├── Overloaded            429  OVERLOADED           the queue is full; retriable, carries Retry-After
    ├── ShuttingDown          503  SHUTTING_DOWN        retriable elsewhere
    ├── SlowClient            499  SLOW_CLIENT          the reader fell too far behind
    ├── NumericFault          500  NUMERIC_FAULT        NaN or Inf in this request's logits
    └── Internal              500  INTERNAL             a bug of ours

`code` is stable and part of the API; the HTTP status counts only before a stream has begun, afterwards the
code travels in the `error` event. Messages name the thing, the value, the limit and the remedy, and never
contain prompt or output text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


class WorkerError(Exception):
    """Base of all errors shown to users; `details` is a JSON-able dict for the error body."""

    code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


@dataclass(frozen=True)
class FieldError:
    """One thing wrong with one field: `constraint` is a stable word (`required`, `type`, `range`, …)."""

    field: str
    constraint: str
    message: str
    value: int | float | bool | str | None = None  # numbers, null, type names; never text of a client


class InvalidRequest(WorkerError):
    """The request cannot be served as it stands; lists every field at fault."""

    code = "INVALID_REQUEST"
    http_status = 400

    def __init__(self, message: str, fields: list[FieldError] | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.fields = fields or []


class JobConflict(InvalidRequest):
    http_status = 409


class GrammarError(InvalidRequest):
    code = "GRAMMAR_ERROR"


class TemplateError(InvalidRequest):
    code = "TEMPLATE_ERROR"


class Unauthorized(WorkerError):
    """The same words for a key that is missing and for one that is wrong."""

    code = "UNAUTHORIZED"
    http_status = 401


class StartFailed(WorkerError):
    code = "WORKER_START_FAILED"


class ModelLoadFailed(WorkerError):
    code = "MODEL_LOAD_FAILED"


class InsufficientVram(WorkerError):
    code = "INSUFFICIENT_VRAM"
    http_status = 503


class VramOom(WorkerError):
    code = "VRAM_OOM"
    retriable = True


class CudaError(WorkerError):
    code = "CUDA_ERROR"


class InferenceTimeout(WorkerError):
    code = "INFERENCE_TIMEOUT"
    http_status = 504
    retriable = True


class Cancelled(WorkerError):
    code = "CANCELLED"
    http_status = 499


class Overloaded(WorkerError):
    """The bounded queue is full. `retry_after_s` goes out as Retry-After."""

    code = "OVERLOADED"
    http_status = 429
    retriable = True

    def __init__(self, message: str, retry_after_s: int = 1, **details: Any) -> None:
        super().__init__(message, **details)
        self.retry_after_s = retry_after_s


class ShuttingDown(WorkerError):
    code = "SHUTTING_DOWN"
    http_status = 503
    retriable = True


class SlowClient(WorkerError):
    code = "SLOW_CLIENT"
    http_status = 499


class NumericFault(WorkerError):
    code = "NUMERIC_FAULT"


class Internal(WorkerError):
    """A bug of ours, reported without its internals."""


def error_of(code: str, message: str, details: dict[str, Any]) -> WorkerError:
    """The error that another process meant by `code`."""
    kinds = {kind.code: kind for kind in (*InvalidRequest.__subclasses__(), *WorkerError.__subclasses__())}
    return kinds.get(code, Internal)(message, **details)
