"""Bodies in and out: strict JSON, the fields of `/execute` with their ranges, and the error body.

Every limit on a field of a request is in this module. Unknown fields are ignored; fields that other servers
know and this one does not serve are refused by name, unless they ask for what happens anyway.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import msgspec

from worker_orcd.errors import FieldError, InvalidRequest, WorkerError

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_JSON_DEPTH = 64
# Nothing else runs while the parser does: bounds that it reaches within some 20 ms.
MAX_JSON_VALUES = 2**18
MAX_JSON_KEYS = 2**16  # and lists and objects
MAX_STOP_TOKENS = 32
MAX_UINT64 = 2**64 - 1

Problem = tuple[str, str] | None  # constraint word and message, or None: the value is fine
JobState = Literal["ready", "busy", "draining", "failed"]


@dataclass(frozen=True)
class Integer:
    """A whole number written without a fraction; true and 1.0 are none."""

    low: int
    high: int

    def check(self, value: object) -> Problem:
        if type(value) is not int:
            return "type", f"must be an integer from {self.low} to {self.high}"
        if not self.low <= value <= self.high:
            return "range", f"must be from {self.low} to {self.high}"
        return None


@dataclass(frozen=True)
class Number:
    low: float
    high: float

    def check(self, value: object) -> Problem:
        if type(value) not in (int, float):
            return "type", f"must be a number from {self.low} to {self.high}"
        assert isinstance(value, int | float)
        if not self.low <= value <= self.high:
            return "range", f"must be from {self.low} to {self.high}"
        return None


@dataclass(frozen=True)
class Text:
    """A string; lengths count Unicode code points."""

    max_chars: int
    is_name: bool = False  # printable characters only, as in an identifier that is logged

    def check(self, value: object) -> Problem:
        if not isinstance(value, str):
            return "type", f"must be a string of 1 to {self.max_chars} characters"
        if not 1 <= len(value) <= self.max_chars:
            return "length", f"has {len(value)} characters; 1 to {self.max_chars} are allowed"
        if self.is_name and not value.isprintable():
            return "format", "may hold printable characters only"
        return None


@dataclass(frozen=True)
class Flag:
    def check(self, value: object) -> Problem:
        return None if isinstance(value, bool) else ("type", "must be true or false")


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]

    def check(self, value: object) -> Problem:
        return None if value in self.values else ("value", f"must be one of {', '.join(self.values)}")


@dataclass(frozen=True)
class Texts:
    """A list of non-empty strings. `max_chars` only bounds the work of counting their tokens."""

    max_items: int
    max_chars: int

    def check(self, value: object) -> Problem:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return "type", f"must be a list of at most {self.max_items} strings"
        if len(value) > self.max_items:
            return "length", f"has {len(value)} strings; at most {self.max_items} are allowed"
        if not all(value):
            return "length", "holds an empty string; every stop string needs at least one character"
        if max(map(len, value), default=0) > self.max_chars:
            return "length", f"holds a string of more than {self.max_chars} characters"
        return None


Rule = Integer | Number | Text | Flag | Choice | Texts

JOB_ID = Text(256, is_name=True)
PRIORITIES = {"interactive": 0, "batch": 1}  # the smaller goes first


class ExecuteBody(msgspec.Struct, frozen=True, kw_only=True):
    """A checked `/execute` body. `seed` is drawn by the worker when None."""

    job_id: str
    prompt: str
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    stop: list[str] = msgspec.field(default_factory=list)
    seed: int | None = None
    apply_chat_template: bool = False
    priority: str = "interactive"
    metrics: bool = False


def execute_rules(max_tokens: int, vocab_size: int) -> dict[str, Rule]:
    """The rule of every field of `ExecuteBody`."""
    return {
        "job_id": JOB_ID,
        "prompt": Text(32768),
        "max_tokens": Integer(1, max_tokens),
        "temperature": Number(0.0, 2.0),
        "top_p": Number(0.0, 1.0),
        "top_k": Integer(0, vocab_size),
        "repetition_penalty": Number(0.0, 2.0),
        "min_p": Number(0.0, 1.0),
        "stop": Texts(4, 4096),
        "seed": Integer(0, MAX_UINT64),
        "apply_chat_template": Flag(),
        "priority": Choice(tuple(PRIORITIES)),
        "metrics": Flag(),
    }


REQUIRED = frozenset({"job_id", "prompt"})

# What other servers offer and this one does not, by the values that ask for nothing (null always does).
_NEUTRAL: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("stream", (True,)),
    ("n best_of length_penalty dry_base dynatemp_exponent typical_p tfs_z", (1,)),
    ("presence_penalty frequency_penalty mirostat xtc_probability dry_multiplier dynatemp_range", (0,)),
    ("top_a min_tokens n_probs n_keep", (0,)),
    ("logprobs top_logprobs prompt_logprobs", (False, 0)),
    ("echo ignore_eos use_beam_search return_token_ids return_tokens", (False,)),
    ("grammar suffix system_prompt guided_regex guided_grammar", ("",)),
    ("logit_bias json_schema guided_json structured_outputs", ({}, [])),
    ("guided_choice dry_sequence_breakers samplers lora", ([],)),
    ("tools images image_data messages stop_token_ids bad_words", ([],)),
    ("tool_choice", ("none",)),
    ("response_format", ({"type": "text"},)),
    ("mirostat_tau mirostat_eta xtc_threshold top_n_sigma", ()),
    ("dry_allowed_length dry_penalty_last_n repeat_last_n no_repeat_ngram_size", ()),
)
UNSUPPORTED = {name: neutral for names, neutral in _NEUTRAL for name in names.split()}


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # never goes back, not even for one without an end
_OPENERS = (b"[", b"{", b":")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, strictly: UTF-8, no NaN, duplicate keys or lone surrogates, within the limits."""
    _check_quantity(body)
    try:
        document = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidRequest("body is not UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        what = error.msg.partition(":")[0]  # what follows a colon is the client's text
        raise InvalidRequest(f"body is not JSON: {what} at character {error.pos}") from None
    except ValueError:  # the interpreter's bound, which a worker lowers
        raise InvalidRequest("body holds an integer of too many digits") from None
    if not isinstance(document, dict):
        raise InvalidRequest("body must be a JSON object")
    _check_tree(document)
    return document


def check_fields(
    document: Mapping[str, Any], rules: Mapping[str, Rule], required: frozenset[str]
) -> tuple[dict[str, Any], list[FieldError]]:
    """The good fields of `document`, null ones left out, and one error for each bad one."""
    good, errors = {}, []
    for name, rule in rules.items():
        value = document.get(name)
        if value is None:
            if name in required:
                errors.append(FieldError(name, "required", f"{name} is missing"))
        elif problem := rule.check(value):
            errors.append(FieldError(name, problem[0], f"{name} {problem[1]}", _shown(value)))
        else:
            good[name] = float(value) if isinstance(rule, Number) else value
    return good, errors


def check_unsupported(document: Mapping[str, Any]) -> list[FieldError]:
    """One error for each field of `UNSUPPORTED` that asks for something."""
    return [
        FieldError(name, "unsupported", f"{name} is not served by this worker; leave it out", _shown(value))
        for name, neutral in UNSUPPORTED.items()
        if (value := document.get(name)) is not None and not any(_same(value, item) for item in neutral)
    ]


def error_body(error: WorkerError, correlation_id: str) -> bytes:
    """The JSON body of every answer that is no success."""
    details = dict(error.details)
    if isinstance(error, InvalidRequest) and error.fields:
        details["errors"] = [asdict(field) for field in error.fields]
    content = {
        "code": error.code,
        "message": error.message,
        "retriable": error.retriable,
        "correlation_id": correlation_id,
        "details": details,
    }
    return msgspec.json.encode({"error": content})


def _check_quantity(body: bytes) -> None:
    """Refuse what has too many parts, without parsing it."""
    if body.count(b",") <= MAX_JSON_VALUES and sum(map(body.count, _OPENERS)) <= MAX_JSON_KEYS:
        return
    values = keys = end = 0
    for text in _STRING.finditer(body):  # the same marks within strings do not count
        values += body.count(b",", end, text.start())
        keys += sum(body.count(mark, end, text.start()) for mark in _OPENERS)
        end = text.end()
        if values > MAX_JSON_VALUES or keys > MAX_JSON_KEYS:
            break
    values += body.count(b",", end)
    keys += sum(body.count(mark, end) for mark in _OPENERS)
    if values > MAX_JSON_VALUES or keys > MAX_JSON_KEYS:
        raise InvalidRequest(f"body holds more than {MAX_JSON_VALUES} values, or {MAX_JSON_KEYS} keys and lists")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise InvalidRequest("body has an object that names the same key twice")
    return document


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"body holds {name}, which is not JSON")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"body is nested deeper than {MAX_JSON_DEPTH} levels")


def _check_tree(document: dict[str, Any]) -> None:
    level: list[Any] = [document]
    for _ in range(MAX_JSON_DEPTH):
        children: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                children += node
                children += node.values()
            else:
                children += node
        for child in children:
            if isinstance(child, str) and not _is_encodable(child):
                raise InvalidRequest("body has a string with half of a surrogate pair")
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep()


def _is_encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _same(value: object, neutral: object) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _shown(value: object) -> int | float | bool | str | None:
    """What an error may repeat of `value`: numbers of ordinary size; else the name of its JSON type."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else "integer"
    if isinstance(value, float):
        return value if math.isfinite(value) else "number"
    names: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return names.get(type(value))
