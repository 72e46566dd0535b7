"""The replay receipt in the last event of an answer: what `worker-orcd replay` needs to run it again and compare."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import msgspec

from worker_orcd.engine.request import Grammar, ModelInfo, SamplingParams, StopReason

if TYPE_CHECKING:
    from worker_orcd.server.generation import Run


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Hashes of token ids are SHA-256, in hex, over 32-bit little-endian words."""

    model: str
    fingerprint: str  # of the model file; see gguf/fingerprint.py
    kernels: str  # what computed: the same name on the same kind of device gives the same bits
    sampling: SamplingParams
    context_length: int
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_ids: list[int] = []
    stop_reason: StopReason
    prompt_tokens: int
    prompt_sha256: str
    output_tokens: int
    output_sha256: str
    prompt_ids: list[TokenId] | None = None  # when asked for by `X-Receipt: full`, like the grammar
    grammar: Grammar | None = None


def receipt_of(run: Run, info: ModelInfo, is_full: bool) -> Receipt:
    """The receipt of a run that has ended; `is_full` is `Exchange.wants_full_receipt`."""
    request = run.request
    assert run.stop_reason is not None
    return Receipt(
        model=info.name,
        fingerprint=info.fingerprint,
        kernels=info.kernels,
        sampling=_terse(request.sampling),
        context_length=info.context_length,
        max_tokens=request.max_tokens,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop_ids=request.stop_ids,
        stop_reason=run.stop_reason,
        prompt_tokens=len(request.prompt_ids),
        prompt_sha256=ids_sha256(request.prompt_ids),
        output_tokens=len(run.output_ids),
        output_sha256=ids_sha256(run.output_ids),
        prompt_ids=request.prompt_ids if is_full else None,
        grammar=request.grammar if is_full else None,
    )


def _terse(sampling: SamplingParams) -> SamplingParams:
    """The same, encoded without neutral fields: msgspec leaves one out if it is the very object of the default."""
    plain = SamplingParams(seed=sampling.seed)
    names = [name for name in sampling.__struct_fields__ if getattr(sampling, name) != getattr(plain, name)]
    return SamplingParams(**{"seed": sampling.seed} | {name: getattr(sampling, name) for name in names})


def ids_sha256(ids: Iterable[int]) -> str:
    return hashlib.sha256(array("I", ids).tobytes()).hexdigest()
