"""From the body of `/execute` to a tokenized `Request` within every limit."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.request import InferenceEngine, Request, SamplingParams
from worker_orcd.errors import FieldError, InvalidRequest
from worker_orcd.server.schemas import (
    MAX_STOP_TOKENS,
    MAX_UINT64,
    PRIORITIES,
    REQUIRED,
    ExecuteBody,
    check_fields,
    check_unsupported,
    execute_rules,
    parse_object,
)

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer


QUICK_BYTES = 2048


class ChatTemplate(Protocol):
    """Renders messages to the text the model was trained on; raises TemplateError."""

    source: str

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extras: Any
    ) -> str: ...


@dataclass(frozen=True)
class Prepared:
    """A checked and tokenized request."""

    request: Request
    stop: tuple[str, ...]
    wants_metrics: bool
    num_prompt_chars: int
    prompt_sha256: str


class Preparer:
    """Turns bodies into requests. Pure and blocking: what is not quick belongs on a thread."""

    def __init__(
        self, engine: InferenceEngine, tokenizer: Tokenizer, template: ChatTemplate | None, config: WorkerConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_tokens = config.max_tokens_out
        self._timeout_s = config.inference_timeout_sec
        self._rules = execute_rules(config.max_tokens_out, engine.info.vocab_size)
        longest = engine.info.context_length - 1  # room for one answer token
        self._max_prompt_tokens = min(config.max_tokens_in or longest, longest)

    @staticmethod
    def is_quick(raw: bytes) -> bool:
        """Whether preparing takes well below a millisecond: a short body whose prompt goes through no template."""
        return len(raw) <= QUICK_BYTES and b"template" not in raw and b"\\u" not in raw  # which could spell it

    def prepare(self, raw: bytes, remaining_s: float | None, tenant: str) -> Prepared:
        """`tenant`'s request in `raw`, bounded by `remaining_s`; raises InvalidRequest naming every bad field."""
        document = parse_object(raw)
        fields, errors = check_fields(document, self._rules, REQUIRED)
        errors += check_unsupported(document)
        errors += self._check_stop(fields.get("stop", []))
        ids, prompt_errors = self._tokenize(fields)
        errors += prompt_errors
        if errors:
            names = ", ".join(dict.fromkeys(error.field for error in errors))
            raise InvalidRequest(f"{len(errors)} problem(s) with the request, in: {names}", errors)
        fields.setdefault("max_tokens", self._max_tokens)
        return self._prepared(ExecuteBody(**fields), ids, remaining_s, tenant)

    def _prepared(self, body: ExecuteBody, ids: list[int], remaining_s: float | None, tenant: str) -> Prepared:
        sampling = SamplingParams(
            seed=secrets.randbelow(MAX_UINT64 + 1) if body.seed is None else body.seed,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
        )
        timeout_s = self._timeout_s if remaining_s is None else min(self._timeout_s, remaining_s)
        priority = PRIORITIES[body.priority]
        request = Request(body.job_id, ids, body.max_tokens, sampling, timeout_s, priority, tenant)
        digest = hashlib.sha256(body.prompt.encode()).hexdigest()
        return Prepared(request, tuple(body.stop), body.metrics, len(body.prompt), digest)

    def _check_stop(self, stop: list[str]) -> list[FieldError]:
        counts = [len(self._tokenizer.encode(text, add_special=False)) for text in stop]
        return [
            FieldError(f"stop[{i}]", "length", f"stop[{i}] has {n} tokens; at most {MAX_STOP_TOKENS} are allowed", n)
            for i, n in enumerate(counts)
            if n > MAX_STOP_TOKENS
        ]

    def _tokenize(self, fields: dict[str, Any]) -> tuple[list[int], list[FieldError]]:
        prompt: str | None = fields.get("prompt")
        if prompt is None:
            return [], []
        if fields.get("apply_chat_template"):
            if self._template is None:
                message = "apply_chat_template is true, but the model file has no chat template; leave it out"
                return [], [FieldError("apply_chat_template", "unsupported", message, True)]
            prompt = self._template.render([{"role": "user", "content": prompt}])
        ids = self._tokenizer.encode(prompt)
        limit, count = self._max_prompt_tokens, len(ids)
        if not ids:
            return ids, [FieldError("prompt", "length", "prompt gives no tokens; write at least one character")]
        if count > limit:
            message = f"prompt has {count} tokens; the limit is {limit}. Shorten it or raise the limit"
            return ids, [FieldError("prompt", "length", message, count)]
        return ids, []
