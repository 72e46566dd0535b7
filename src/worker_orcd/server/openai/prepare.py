"""From a checked body to tokenized requests within every limit; blocking, for the thread that prepares."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.request import SAMPLER_ORDER, Grammar, InferenceEngine, Request, SamplingParams
from worker_orcd.errors import FieldError, InvalidRequest
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Run
from worker_orcd.server.openai.bodies import DRY_BREAKERS, MAX_RUNS, ChatBody, Sampling, refuse
from worker_orcd.server.openai.grammars import after_reasoning, grammar_of
from worker_orcd.server.openai.messages import check_tools, chosen_tool, template_messages
from worker_orcd.server.output import OutputParser, parser_for, tool_grammar
from worker_orcd.server.prepare import ChatTemplate
from worker_orcd.server.schemas import MAX_UINT64, PRIORITIES
from worker_orcd.tokenizer.base import encode_within
from worker_orcd.tokenizer.stream import TextStream

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer

MAX_TOKENIZED = 2**18  # tokens of a text that is only counted, or as many as the context has
_RESERVED = frozenset({"self", "messages", "add_generation_prompt", "tools"})


@dataclass(frozen=True)
class Wish:
    """What a dialect asks of its runs beside the sampling."""

    max_tokens: int | None = None
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    grammar: Grammar | None = None
    shows_special: bool = False


@dataclass(frozen=True)
class Chat:
    """A conversation as the model gets it."""

    prompt: str
    ids: list[int]
    tools: list[dict[str, Any]] | None  # that may be called
    choice: str


class Preparer:
    """Makes prompts and runs."""

    def __init__(
        self, engine: InferenceEngine, tokenizer: Tokenizer, template: ChatTemplate | None, config: WorkerConfig
    ) -> None:
        self.info, self.tokenizer = engine.info, tokenizer
        self._template, self._source = template, template.source if template else ""
        self._max_tokens = config.max_tokens_out
        self._timeout_s = config.inference_timeout_sec
        longest = engine.info.context_length - 1  # room for one answer token
        self._max_prompt_tokens = min(config.max_tokens_in or longest, longest)
        self._breakers = lru_cache(maxsize=16)(self._find_breakers)

    # ------------------------------------------------------------------ prompts

    def chat(self, body: ChatBody, param: str = "messages") -> Chat:
        """The rendered and tokenized conversation, which came in `param`. Raises InvalidRequest or TemplateError."""
        text, tools, choice = self.written(body)
        return Chat(text, self.encode(text, param), tools, choice)

    def written(self, body: ChatBody) -> tuple[str, list[dict[str, Any]] | None, str]:
        """The text of a conversation, however long; the tools that may be called, and the choice among them."""
        tools = check_tools(body.tools)
        choice = chosen_tool(body.tool_choice, tools)
        return self.render(body, tools if choice != "none" else []), tools if choice != "none" else None, choice

    def render(self, body: ChatBody, tools: list[dict[str, Any]]) -> str:
        """The text of a conversation, up to where the answer begins."""
        if self._template is None:
            refuse(
                "messages", "unsupported", "need a chat template, and the model file has none; use /v1/completions"
            )
        extras: dict[str, Any] = dict(body.chat_template_kwargs)
        for name in extras:
            if name in _RESERVED or not name.isidentifier():
                refuse("chat_template_kwargs", "value", f"may not set {name[:32]!a}")
        if tools:
            extras["tools"] = tools
        if body.reasoning_effort is not None:
            extras.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            extras.setdefault("enable_thinking", False)  # the switch of templates that know no efforts
        messages = template_messages(body.messages, "developer" in self._source)
        if not body.continue_final_message:
            return self._template.render(messages, body.add_generation_prompt is not False, **extras)
        if body.add_generation_prompt:
            refuse("add_generation_prompt", "value", "and continue_final_message exclude each other")
        mark = secrets.token_hex(16)  # templates may trim what follows, but not this
        last = messages[-1]
        if last["role"] != "assistant":
            refuse("continue_final_message", "value", "needs a last message of the assistant")
        messages[-1] = last | {"content": last["content"] + mark}
        text, found, _ = self._template.render(messages, False, **extras).rpartition(mark)
        if not found:
            refuse("continue_final_message", "unsupported", "does not go with this model's chat template")
        return text

    def parser(self, chat: Chat) -> OutputParser:
        return parser_for(self._source, self.info.architecture, chat.tools, chat.prompt)

    def tokenized(self, text: str, param: str, add_special: bool = True) -> list[int]:
        """Token ids of a text that is counted, not answered: it may be longer than a prompt."""
        limit = max(MAX_TOKENIZED, self.info.context_length)
        ids = encode_within(self.tokenizer, text, limit, add_special)
        if ids is None or len(ids) > limit:
            refuse(param, "length", f"has more than {limit} tokens; send it in parts")
        return ids

    def encode(self, text: str, param: str) -> list[int]:
        """Token ids of a prompt that fits."""
        ids = encode_within(self.tokenizer, text, self._max_prompt_tokens)
        if ids is None:
            raise self._too_long(param, None)
        return self.checked(ids, param)

    def checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            refuse(param, "length", "gives no tokens; write at least one character")
        if len(ids) > self._max_prompt_tokens:
            raise self._too_long(param, len(ids))
        return self._check_ids(ids, param)

    def _too_long(self, param: str, num_tokens: int | None) -> InvalidRequest:
        """`num_tokens` is None when nobody counted to the end."""
        limit, context = self._max_prompt_tokens, self.info.context_length
        size = f"more than {limit}" if num_tokens is None else num_tokens
        message = f"{param} has {size} tokens; the limit is {limit}, of a context of {context}. Shorten it"
        return InvalidRequest(message, [FieldError(param, "context_length", message, num_tokens)])

    # ------------------------------------------------------------------ runs

    def runs(
        self, body: Sampling, prompts: Sequence[list[int]], exchange: Exchange, job_id: str, wish: Wish
    ) -> list[Run]:
        """`body.n` runs of each prompt; those with the same prompt follow the first of them."""
        if len(prompts) * body.n > MAX_RUNS:
            refuse("n", "range", f"times the number of prompts is {len(prompts) * body.n}; {MAX_RUNS} are allowed")
        if not all(body.stops):
            refuse("stop", "length", "holds an empty string")
        sampling, max_tokens = self._sampling(body), self._num_tokens(body, wish)
        remaining_s = exchange.remaining_s()
        num_runs, runs = len(prompts) * body.n, list[Run]()
        for i in range(num_runs):
            request = Request(
                id=job_id if num_runs == 1 else f"{job_id}-{i}",
                prompt_ids=prompts[i // body.n],
                max_tokens=max_tokens,
                sampling=SamplingParams(**sampling, sample_index=i % body.n),
                timeout_s=self._timeout_s if remaining_s is None else min(self._timeout_s, remaining_s),
                priority=PRIORITIES[body.priority],
                tenant=exchange.tenant or "",
                min_tokens=body.min_tokens,
                ignore_eos=body.ignore_eos,
                stop_ids=self._check_ids(body.stop_token_ids, "stop_token_ids"),
                num_logprobs=wish.num_logprobs,
                prompt_logprobs=wish.prompt_logprobs,
                grammar=wish.grammar,
            )
            spelling = _Spelled(self.tokenizer) if wish.shows_special else self.tokenizer
            leader = runs[i - i % body.n] if i % body.n else None
            runs.append(Run(request, TextStream(spelling, body.stops), leader, i))
        return runs

    def _num_tokens(self, body: Sampling, wish: Wish) -> int:
        """How long the answer may be. More than the worker allows is not refused: clients ask for it by default."""
        asked = body.max_tokens if wish.max_tokens is None else wish.max_tokens
        if asked is not None and asked < max(1, body.min_tokens):
            refuse("max_tokens", "range", "must be at least 1, and not below min_tokens")
        max_tokens = self._max_tokens if asked is None else min(asked, self._max_tokens)
        if body.min_tokens > max_tokens:
            refuse("min_tokens", "range", f"must not be above {max_tokens}")
        return max_tokens

    def _sampling(self, body: Sampling) -> dict[str, Any]:
        """The arguments of SamplingParams."""
        names = (
            "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty typical_p xtc_probability "
            "xtc_threshold dry_multiplier dry_base dry_allowed_length dynatemp_range dynatemp_exponent mirostat_eta"
        )
        fields = {name: getattr(body, name) for name in names.split()}
        fields["seed"] = secrets.randbelow(MAX_UINT64 + 1) if body.seed is None else body.seed & MAX_UINT64
        fields["top_k"] = min(max(body.top_k, 0), self.info.vocab_size)
        fields["mirostat_tau"] = body.mirostat_tau if body.mirostat else 0.0
        fields["order"] = tuple(body.samplers)
        if not set(body.samplers) <= set(SAMPLER_ORDER) or len(set(body.samplers)) < len(body.samplers):
            refuse("samplers", "value", f"may hold each of these once: {', '.join(SAMPLER_ORDER)}")
        if body.dry_multiplier:
            fields["dry_breaker_ids"] = self._breakers(
                DRY_BREAKERS if body.dry_sequence_breakers is None else tuple(body.dry_sequence_breakers)
            )
        if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in body.logit_bias):
            refuse("logit_bias", "type", "must have token ids as keys")
        fields["logit_bias"] = bias = {int(key): value for key, value in body.logit_bias.items()}
        self._check_ids(list(bias), "logit_bias")
        return fields

    def _check_ids(self, ids: list[int], param: str) -> list[int]:
        if ids and not 0 <= min(ids) <= max(ids) < self.info.vocab_size:
            refuse(param, "range", f"holds a token id outside 0 to {self.info.vocab_size - 1}")
        return ids

    def _find_breakers(self, texts: tuple[str, ...]) -> list[int]:
        """Every token that holds one of the texts."""
        breakers = [text.encode() for text in texts if text]
        spelled = ((i, self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))
        return [i for i, token in spelled if any(breaker in token for breaker in breakers)]

    def chat_grammar(self, body: ChatBody, chat: Chat, param: str) -> Grammar | None:
        """What the answer must be, if it is told: a call first of all; `param` as for `grammar_of`."""
        if chat.tools and chat.choice != "auto":
            return tool_grammar(chat.tools, chat.choice, self._source, self.info.architecture, chat.prompt)
        grammar = grammar_of(body, param)
        return grammar and after_reasoning(grammar, self._source, chat.prompt)


def grammar_param(body: Sampling, usual: str, chat: Chat | None = None) -> str:
    """Which field of `body` its grammar comes from."""
    if chat and chat.tools and chat.choice != "auto":
        return "tools"
    return "structured_outputs" if body.structured_outputs else usual


def digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


class _Spelled:
    """The bytes of tokens, those with a meaning instead of a text spelled out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def token_bytes(self, token_id: int) -> bytes:
        if self._tokenizer.is_control(token_id):
            return self._tokenizer.decode([token_id], skip_special=False).encode()
        return self._tokenizer.token_bytes(token_id)
