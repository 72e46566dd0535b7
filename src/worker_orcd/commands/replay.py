"""`worker-orcd replay`: runs the request of a receipt again and compares what comes out."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from worker_orcd.assemble import Blueprint, build_core, draw_up, load_runtime, load_texts
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.loop import EngineFacts
from worker_orcd.engine.request import Failed, Finished, Request, StopReason, Tokens
from worker_orcd.errors import InvalidRequest, error_of
from worker_orcd.gguf.fingerprint import fingerprint
from worker_orcd.server.receipt import Receipt, ids_sha256

MAX_RECEIPT_BYTES = 64 * 1024 * 1024
NO_LIMIT_S = 1e9
Receipts = Annotated[list[Receipt], msgspec.Meta(min_length=1)]


def run_replay(path: Path, config: WorkerConfig) -> int:
    """Exit status: 0 when the same token ids come out, 1 when others do. Raises WorkerError when nothing can run."""
    receipts = read_receipts(path)
    context = receipts[0].context_length
    if config.context_length not in (None, context):
        print(f"note: the context is {context}, as it was then, not {config.context_length}", file=sys.stderr)
    config = replace(config, max_batch=1, context_length=context)
    blueprint = draw_up(config)
    for receipt in receipts:
        _check(receipt, blueprint)
    core, facts = load_core(config, blueprint)
    if facts.info.kernels != receipts[0].kernels:
        print(f"note: computed then by {receipts[0].kernels}, now by {facts.info.kernels}", file=sys.stderr)
    verdicts = [_is_same(core, number, receipt) for number, receipt in enumerate(receipts, 1)]
    return 0 if all(verdicts) else 1


def _is_same(core: EngineCore, number: int, receipt: Receipt) -> bool:
    """Run it as request `number` and say how that went."""
    ids, reason = rerun(core, number, receipt)
    is_cut = receipt.stop_reason == "stop_sequence"  # which the edge finds; the engine would have gone on
    is_same = ids_sha256(ids) == receipt.output_sha256 and (is_cut or reason == receipt.stop_reason)
    print(
        f"{'identical' if is_same else 'DIFFERENT'}: {len(ids)} tokens, {reason}, sha256 {ids_sha256(ids)[:12]}; the "
        f"receipt says {receipt.output_tokens} tokens, {receipt.stop_reason}, sha256 {receipt.output_sha256[:12]}"
    )
    return is_same


def read_receipts(path: Path) -> list[Receipt]:
    """A receipt, or those in an event, a stream or a body that carries them. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            document = _document(file.read(MAX_RECEIPT_BYTES))
        if isinstance(document, dict):
            document = document.get("receipts") or [document.get("receipt", document)]
        receipts: list[Receipt] = msgspec.convert(document, Receipts, str_keys=True)
    except OSError as error:
        raise InvalidRequest(f"receipt {path}: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"receipt {path} is none: {error}") from None
    except (ValueError, RecursionError):
        raise InvalidRequest(f"receipt {path} is neither JSON nor a stream with a receipt in it") from None
    for receipt in receipts:
        if receipt.prompt_ids is None:
            raise InvalidRequest(
                f"receipt {path} holds no prompt; send the request with the header `X-Receipt: full`"
            )
        if ids_sha256(receipt.prompt_ids) != receipt.prompt_sha256:
            raise InvalidRequest(f"receipt {path} was changed: its prompt_ids do not give its prompt_sha256")
    return receipts


def _document(raw: bytes) -> Any:
    """JSON, or the receipts in events of a stream, whole or a part of it. Raises ValueError."""
    found = []
    for line in raw.splitlines():
        if line.startswith(b"data:") and b'"receipt"' in line:
            with suppress(ValueError):  # where it was cut off
                event = msgspec.json.decode(line.removeprefix(b"data:"))
                found += [event["receipt"]] if isinstance(event, dict) and "receipt" in event else []
    return found or msgspec.json.decode(raw)


def rerun(core: EngineCore, number: int, receipt: Receipt) -> tuple[list[int], StopReason]:
    """Token ids and how they ended. Raises what the engine ends the request with."""
    is_cut = receipt.stop_reason == "stop_sequence"
    request = Request(
        id=f"replay-{number}",
        prompt_ids=receipt.prompt_ids or [],
        max_tokens=receipt.output_tokens if is_cut else receipt.max_tokens,
        sampling=receipt.sampling,
        timeout_s=NO_LIMIT_S,
        min_tokens=receipt.min_tokens,
        ignore_eos=receipt.ignore_eos,
        stop_ids=receipt.stop_ids,
        grammar=receipt.grammar,
    )
    core.submit(number, request)
    ids: list[int] = []
    while True:
        for _, event in core.tick().events:
            if isinstance(event, Tokens):
                ids += event.ids
            elif isinstance(event, Finished):
                return ids, event.reason
            elif isinstance(event, Failed):
                raise error_of(event.code, event.message, {})


def _check(receipt: Receipt, blueprint: Blueprint) -> None:
    """Raise InvalidRequest when the receipt is of another file, or of none at all."""
    vocab_size, found = blueprint.spec.vocab_size, fingerprint(blueprint.gguf)
    if found != receipt.fingerprint:
        raise InvalidRequest(
            f"{blueprint.gguf.path} is not the file of this receipt, {receipt.model}: fingerprint {found[:12]}, not "
            f"{receipt.fingerprint[:12]}; pass the right one as --model"
        )
    ids = [*(receipt.prompt_ids or []), *receipt.stop_ids, *receipt.sampling.logit_bias]
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise InvalidRequest(f"the receipt holds token id {wrong[0]}; this model has 0-{vocab_size - 1}")


def load_core(config: WorkerConfig, blueprint: Blueprint) -> tuple[EngineCore, EngineFacts]:
    """The engine that `serve` would run, in this process and without a loop."""
    tokenizer = load_texts(config, blueprint).tokenizer
    unsampleable = [*tokenizer.unsampleable, *range(tokenizer.vocab_size, blueprint.spec.vocab_size)]
    runtime = load_runtime(config, blueprint, lambda *_: None)
    return build_core(config, blueprint, runtime, frozenset(tokenizer.eog_ids), unsampleable)
