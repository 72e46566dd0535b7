"""Bodies of the OpenAI dialect, with the fields other servers have added to it, and their ranges.

Unknown fields are ignored, null is the same as leaving a field out, and fields that are known and not served are
refused by name, unless they ask for what happens anyway.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from worker_orcd.errors import FieldError, InvalidRequest
from worker_orcd.server.schemas import MAX_UINT64, parse_object

MAX_N = 16
MAX_RUNS = 128  # prompts of one body, times n
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_COUNT = 2**31 - 1
DRY_BREAKERS = ("\n", ":", '"', "*")

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Stops = Annotated[list[Annotated[str, Meta(max_length=MAX_STOP_CHARS)]], Meta(max_length=MAX_STOPS)]
StopIds = Annotated[list[int], Meta(max_length=MAX_STOP_IDS)]
Biases = Annotated[dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=MAX_BIASES)]


# What is known and not served, by the values that ask for nothing.
Unsupported = dict[str, tuple[object, ...]]
_UNSUPPORTED: Unsupported = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "suffix": ("",),
    "prompt_logprobs": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "lora": ([],),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema"), ()),
    **dict.fromkeys(("grammar", "top_a", "tfs_z", "top_n_sigma"), ()),
}
_UNSUPPORTED_CHAT = _UNSUPPORTED | {
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "store": (False,),
    "documents": ([],),
    "chat_template": (),
    "prompt": (),
}
ONE_ANSWER: Unsupported = {"n": (1,), "response_format": ({"type": "text"},)}  # of dialects that have neither
_INSTEAD = {
    "guided": "use structured_outputs",
    "json_s": "use response_format",
    "functi": "use tools",
    "respon": "here it is text.format (/v1/messages: output_config.format)",
}


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = False


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What every generation may say; the meaning of the filters is that of `SamplingParams`."""

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] = 1
    seed: int | None = None  # -2^63 … 2^64 - 1
    stop: Annotated[str, Meta(max_length=MAX_STOP_CHARS)] | Stops = []
    stop_token_ids: StopIds = []
    ignore_eos: bool = False
    min_tokens: Count = 0
    priority: Literal["interactive", "batch"] = "interactive"
    logit_bias: Biases = {}
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 1.0
    top_p: Unit = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=MAX_COUNT)] = 0  # -1 and 0: off
    min_p: Unit = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.0, le=2.0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    typical_p: Unit = 1.0
    xtc_probability: Unit = 0.0
    xtc_threshold: Unit = 0.1
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    dry_base: Annotated[float, Meta(ge=1.0, le=100.0)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=1, le=4096)] = 2
    dry_sequence_breakers: Stops | None = None  # those of `DRY_BREAKERS`
    dynatemp_range: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.0
    dynatemp_exponent: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    mirostat: Literal[0, 2] = 0
    mirostat_tau: Annotated[float, Meta(ge=0.0, le=100.0)] = 5.0
    mirostat_eta: Unit = 0.1
    samplers: Annotated[list[str], Meta(max_length=32)] = []
    response_format: dict[str, Any] = {}
    structured_outputs: dict[str, Any] = {}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatBody(Sampling, frozen=True, kw_only=True):
    """`/v1/chat/completions`."""

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED_CHAT
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] = []
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None  # as the other way round of the next
    continue_final_message: bool = False


class CompletionBody(Sampling, frozen=True, kw_only=True):
    """`/v1/completions`."""

    prompt: Any  # text, token ids, or a list of either
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False
    max_tokens: Count | None = 16


B = TypeVar("B", bound=msgspec.Struct)
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"Object missing required field `(\w+)`")


def refuse(param: str, constraint: str, message: str, value: int | float | None = None) -> NoReturn:
    """Raise the InvalidRequest that names `param`."""
    message = f"{param} {message}"
    raise InvalidRequest(message, [FieldError(param, constraint, message, value)])


def read_body(raw: bytes, kind: type[B]) -> B:
    """The body in `raw`. Raises InvalidRequest naming the first bad field."""
    return convert(parse_object(raw), kind)


def convert(document: dict[str, Any], kind: type[B]) -> B:
    """`document` as `kind`. Raises InvalidRequest naming the first bad field."""
    fields = {name: value for name, value in document.items() if value is not None}
    check_unsupported(fields, getattr(kind, "unsupported", {}))
    try:
        body = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    seed = fields.get("seed", 0)
    if isinstance(body, Sampling) and not -(2**63) <= seed <= MAX_UINT64:
        refuse("seed", "range", "must be from -2^63 to 2^64 - 1")
    return body


def check_unsupported(fields: dict[str, Any], unsupported: Unsupported) -> None:
    """Refuse the first field that is known, not served, and asks for something."""
    for name, neutral in unsupported.items():
        if name in fields and not any(type(fields[name]) is type(item) and fields[name] == item for item in neutral):
            instead = _INSTEAD.get(name[:6], "leave it out")
            refuse(name, "unsupported", f"is not supported by this worker; {instead}")


def _named(text: str) -> InvalidRequest:
    """What msgspec says of a field, without the value it may repeat."""
    if missing := _MISSING.search(text):
        path, constraint, message = missing[1], "required", "is missing"
    else:
        found = _PATH.search(text)
        path, what = (found[1], text[: found.start()]) if found else ("body", text)
        is_value = what.startswith("Invalid enum value")
        constraint = "value" if is_value else "range" if "=" in what else "type"
        message = "has a value that is not allowed" if is_value else f"is not valid: {what[:1].lower()}{what[1:]}"
    message = f"{path} {message}"
    return InvalidRequest(message, [FieldError(path, constraint, message)])
