"""Which way of speaking a model has, found in its chat template, and what follows from it."""

from __future__ import annotations

import json
import secrets
import string
from dataclasses import replace
from typing import Any, Final

from worker_orcd.engine.request import Grammar
from worker_orcd.server.output.harmony import CHANNEL, MESSAGE, HarmonyParser
from worker_orcd.server.output.json_schema import adapted, inlined, of_function
from worker_orcd.server.output.pieces import OutputParser, PlainParser
from worker_orcd.server.output.tagged import END_THINK, THINK, TaggedParser, Tags

_CALLS: Final = (  # the first whose `call_open` is in the template
    Tags(call_open="<tool_call>", call_close="</tool_call>"),  # Hermes, Qwen, SmolLM3, Granite 4
    Tags(call_open="[TOOL_CALLS]", is_bare=True, is_named=True),  # Mistral
    Tags(call_open="<|tool_call|>", call_close="<|/tool_call|>", is_bare=True),  # Phi-4-mini, Granite 3
    Tags(call_open="<|python_tag|>", is_bare=True),  # Llama 3.1
    Tags(call_open=" functools", is_bare=True),  # Firefunction
    Tags(is_bare=True),  # Llama 3.2, and models that are told of tools in plain words
)
_ID_LETTERS: Final = string.ascii_letters + string.digits
_REASONING: Final = r"reasoning[lazy]: /(?s:.*)<\/think>/"
_HARMONY_REASONING: Final = "reasoning: /(?s:.*)/"
_HARMONY_START: Final = '(<|channel|> "analysis" <|message|> reasoning <|end|> <|start|> "assistant")? call'


def parser_for(
    chat_template_text: str, architecture: str, tools: list[dict[str, Any]] | None, prompt: str
) -> OutputParser:
    """The parser of one answer to the rendered `prompt`, whose end may open the answer; `tools` are OpenAI's."""
    if _is_harmony(chat_template_text, architecture):
        return HarmonyParser(bool(tools), new_call_id, prompt)
    tags = _tags(chat_template_text)
    names = frozenset(_functions(tools))
    if not (tags.has_think or names):
        return PlainParser()
    return TaggedParser(tags, names, new_call_id, _is_thinking(tags, prompt))


def tool_grammar(
    tools: list[dict[str, Any]], choice: str, chat_template_text: str, architecture: str, prompt: str
) -> Grammar:
    """What an answer must be to call a tool in the way of this template's model; it may reason first.

    `choice` is "required" or names one of `tools`. Raises GrammarError for parameters that cannot be enforced.
    """
    functions = _functions(tools)
    if choice != "required":
        functions = {choice: functions[choice]}
    calls = {name: inlined(adapted(parameters, "tools")) for name, parameters in functions.items()}
    if _is_harmony(chat_template_text, architecture):
        return _lark(_HARMONY_START, _HARMONY_REASONING, [_harmony_call(*call) for call in calls.items()])
    tags = _tags(chat_template_text)
    key = "parameters" if tags.is_bare and '"parameters"' in chat_template_text else "arguments"
    start = "call" if tags.is_bare or choice != "required" else 'call ("\\n" call)*'
    if tags.has_think:
        start = (
            rf"reasoning /\s*/ {start}" if _is_thinking(tags, prompt) else rf'("{THINK}" reasoning /\s*/)? {start}'
        )
    return _lark(start, _REASONING, [_tagged_call(tags, key, *call) for call in calls.items()])


def new_call_id() -> str:
    """Nine letters and digits: Mistral's templates demand just that, and nobody else minds."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


def _is_harmony(template: str, architecture: str) -> bool:
    return CHANNEL in template and MESSAGE in template if template else architecture == "gpt-oss"


def _tags(template: str) -> Tags:
    return replace(next(tags for tags in _CALLS if tags.call_open in template), has_think=END_THINK in template)


def _is_thinking(tags: Tags, prompt: str) -> bool:
    return tags.has_think and prompt.rstrip().endswith(THINK)


def _functions(tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Parameters by name."""
    functions = [tool["function"] for tool in tools or []]
    return {function["name"]: of_function(function.get("parameters")) for function in functions}


def _lark(start: str, reasoning: str, calls: list[str]) -> Grammar:
    return Grammar("lark", "\n".join([f"start: {start}", reasoning, "call: " + "\n  | ".join(calls)]))


def _harmony_call(name: str, schema: str) -> str:
    header = json.dumps(f"commentary to=functions.{name} ")
    return f'<|channel|> {header} <|constrain|> "json" <|message|> {schema}'


def _tagged_call(tags: Tags, key: str, name: str, schema: str) -> str:
    """Only the parameters are a `schema`: what they refer to is found from its root."""
    before, after = f'{{"name": {json.dumps(name)}, "{key}": ', "}"
    if not tags.is_bare:
        before, after = f"{tags.call_open}\n{before}", f"{after}\n{tags.call_close}"
    return f"{json.dumps(before)} {schema} {json.dumps(after)}"
