"""Chat templates: the Jinja source of a model file and a conversation make the text of a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from traceback import walk_tb
from typing import Any, Final, NoReturn

from jinja2 import Template, TemplateSyntaxError, UndefinedError, pass_context
from jinja2.runtime import Context

from worker_orcd.errors import ModelLoadFailed, TemplateError
from worker_orcd.gguf.access import TypedAccess
from worker_orcd.tokenizer.base import Tokenizer
from worker_orcd.tokenizer.budget import Budget, BudgetExceeded
from worker_orcd.tokenizer.files import read_limited
from worker_orcd.tokenizer.sandbox import BUDGET_KEY, Sandbox

MAX_SOURCE_BYTES: Final = 64 * 2**10
MAX_OUTPUT_CHARACTERS: Final = 8 * 2**20
MAX_CPU_S: Final = 0.5
_MAX_DATE_FORMAT: Final = 256
_MAX_JSON_INDENT: Final = 16
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class _Refused(Exception):
    """The template called raise_exception."""


class ChatTemplate:
    """A compiled template. Safe to use from several threads; rendering keeps a core busy for up to MAX_CPU_S.

    Offers what `transformers` offers: raise_exception, strftime_now, the tojson filter, loop controls and the
    `generation` tag. Raises TemplateError for whatever goes wrong; messages never hold text of a conversation.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "", cpu_s: float = MAX_CPU_S) -> None:
        """Never fails: a bad source does not keep a model from loading, `render` says what is wrong with it."""
        self.source = source  # and that of `with_tools`, for who looks for a model's ways in it
        self.with_tools: ChatTemplate | None = None  # renders conversations with tools, if that is another
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._cpu_s = cpu_s
        self._template = self._compiled()

    @classmethod
    def load(cls, gguf: TypedAccess, tokenizer: Tokenizer, file: Path | None = None) -> ChatTemplate | None:
        """The template in `file`, else that of the model; None when it has none.

        Raises ModelLoadFailed for a file that cannot be used; the model's own is not asked for, and may be bad.
        """
        ids = (tokenizer.bos_id, tokenizer.eos_id)
        bos, eos = ("" if i is None else tokenizer.decode([i], skip_special=False) for i in ids)
        if file is not None:
            given = cls(read_limited(file, "chat template", MAX_SOURCE_BYTES).decode("utf-8", "replace"), bos, eos)
            if given.problem:
                raise ModelLoadFailed(f"{file}: {given.problem}")
            return given
        source = gguf.get("tokenizer.chat_template", str, None)
        tool_source = gguf.get("tokenizer.chat_template.tool_use", str, None)
        if source is None:
            return None
        template = cls(source, bos, eos)
        if tool_source is not None:
            template.with_tools = cls(tool_source, bos, eos)
            template.source += tool_source
        return template

    @property
    def problem(self) -> str:
        """Why nothing can be rendered, or empty."""
        return self._template.message if isinstance(self._template, TemplateError) else ""

    def _compiled(self) -> Template | TemplateError:
        size = len(self.source.encode("utf-8", "surrogatepass"))
        if size > MAX_SOURCE_BYTES:
            return TemplateError(f"the chat template has {size} bytes, the limit is {MAX_SOURCE_BYTES}")
        sandbox = Sandbox()
        sandbox.filters["tojson"] = _tojson
        sandbox.globals |= {"raise_exception": self._refuse, "strftime_now": _strftime_now}
        try:
            return sandbox.from_string(self.source)
        except TemplateSyntaxError as error:
            return TemplateError(f"the chat template is not valid, line {error.lineno}: {error.message}")
        except Exception as error:  # too deep for the parser, numbers too long, …
            return TemplateError(f"the chat template cannot be compiled: {type(error).__name__}")

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extras: Any) -> str:
        """The prompt of a conversation. `extras` are further variables, such as `tools`, which are OpenAI's."""
        if extras.get("tools") and self.with_tools is not None:
            return self.with_tools.render(messages, add_generation_prompt, **extras)
        variables = self._tokens | {"tools": None, "documents": None} | extras
        variables |= {"messages": [_with_reasoning(message) for message in messages]}
        variables |= {"add_generation_prompt": add_generation_prompt}
        template = self._template
        if isinstance(template, TemplateError):
            raise TemplateError(template.message)
        try:
            return self._text(template, variables)
        except _Refused as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from None
        except BudgetExceeded:
            raise TemplateError(
                f"the chat template needs more than {self._cpu_s} s, {MAX_OUTPUT_CHARACTERS} characters of output"
                " or the work allowed; shorten the conversation or use another template"
            ) from None
        except Exception as error:
            line = _template_line(template, error)
            raise TemplateError(f"the chat template failed on line {line}: {type(error).__name__}") from None

    def _text(self, template: Template, variables: dict[str, Any]) -> str:
        budget = Budget(self._cpu_s)
        try:
            return "".join(self._pieces(template, variables, budget))
        except UndefinedError:
            if not variables["tools"]:
                raise
        # OpenAI lets descriptions out, some templates cannot do without. The others never see an empty one.
        return "".join(self._pieces(template, variables | {"tools": _described(variables["tools"])}, budget))

    def _pieces(self, template: Template, variables: dict[str, Any], budget: Budget) -> Iterator[str]:
        length = 0
        for piece in template.root_render_func(template.new_context({**variables, BUDGET_KEY: budget})):
            length += len(piece)
            if length > MAX_OUTPUT_CHARACTERS:
                raise BudgetExceeded
            yield piece

    def _refuse(self, message: object) -> NoReturn:
        """`raise_exception`: words of the template are repeated, anything else might be the conversation's."""
        known = isinstance(message, str) and message in self.source
        raise _Refused(message if known else "for a reason of its own")


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with its reasoning under both of the names that templates know."""
    reasoning = next((found for name in _REASONING if (found := message.get(name)) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _described(tools: Any) -> Any:
    """OpenAI's tools, each function with a description."""
    return [tool | {"function": {"description": ""} | tool["function"]} for tool in tools]


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _MAX_DATE_FORMAT or re.search(r"%[^a-zA-Z%]*[0-9]", pattern):
        raise BudgetExceeded
    return datetime.now().strftime(pattern)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the standard library writes it, without Jinja's escapes for HTML."""
    budget: Budget = context.parent[BUDGET_KEY]
    budget.text(value)
    if indent is not None and not 0 <= int(indent) <= _MAX_JSON_INDENT:
        raise BudgetExceeded
    if separators is not None and sum(map(len, separators)) > _MAX_JSON_INDENT:
        raise BudgetExceeded
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):
        budget.string(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _template_line(template: Template, error: Exception) -> int:
    """The last line of the template that the error passed through, 0 when it has passed none."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return template.get_corresponding_lineno(lines[-1]) if lines else 0
