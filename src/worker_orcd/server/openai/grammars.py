"""What an answer must look like: the wish of a body as a Grammar, and room for the model to reason before it."""

from __future__ import annotations

import json
import re
from typing import Any

from worker_orcd.engine.request import Grammar
from worker_orcd.errors import InvalidRequest
from worker_orcd.server.openai.bodies import Sampling, refuse
from worker_orcd.server.output import adapted, inlined
from worker_orcd.server.schemas import parse_object

_KINDS = {"json": "json_schema", "regex": "regex", "grammar": "lark", "json_object": "json_object", "choice": "lark"}
_THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_HARMONY = '(<|channel|> "analysis" <|message|> prose <|end|> <|start|> "assistant")? <|channel|> "final" <|message|>'

_SLASH = re.compile(r"\\.|/", re.S)  # or what is escaped already


def grammar_of(body: Sampling, param: str) -> Grammar | None:
    """The wish of `structured_outputs` or `response_format`; `param` is what the dialect calls that field."""
    if body.structured_outputs:
        return _structured(body.structured_outputs)
    kind = body.response_format.get("type", "text")
    if kind == "json_schema":
        holder = body.response_format.get("json_schema")
        schema = holder.get("schema") if isinstance(holder, dict) else None
        if not isinstance(schema, dict | bool):
            where = f"{param}.json_schema" if param == "response_format" else param
            refuse(f"{where}.schema", "type", "must be a JSON schema")
        return _of_schema(schema, param)
    if kind == "json_object":
        return Grammar("json_object")
    if kind != "text":
        refuse(f"{param}.type", "value", "must be text, json_object or json_schema")
    return None


def _of_schema(schema: Any, param: str) -> Grammar:
    return Grammar("json_schema", json.dumps({} if schema is True else adapted(schema, param)))


def _parsed(text: str) -> Any:
    """A schema that came as text, within the limits of a body."""
    try:
        return parse_object(text.encode())
    except InvalidRequest as error:
        refuse("structured_outputs.json", "type", f"must hold a JSON schema; its {error.message}")


def _structured(wish: dict[str, Any]) -> Grammar:
    """`structured_outputs`: one of json, json_object, regex, grammar (Lark) and choice."""
    given = [name for name in _KINDS if name in wish and wish[name] not in (None, False)]
    if len(given) != 1:
        refuse("structured_outputs", "value", f"must have exactly one of {', '.join(_KINDS)}")
    name, value = given[0], wish[given[0]]
    if name == "json_object":
        return Grammar("json_object")
    if name == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            refuse("structured_outputs.choice", "type", "must be a list of strings")
        value = "start: " + " | ".join(json.dumps(item) for item in value)
    if name == "json":
        return _of_schema(_parsed(value) if isinstance(value, str) else value, "structured_outputs")
    if not isinstance(value, str):
        refuse(f"structured_outputs.{name}", "type", "must be a string")
    return Grammar(_KINDS[name], value)  # type: ignore[arg-type]


def after_reasoning(grammar: Grammar, template: str, prompt: str) -> Grammar:
    """The grammar for what comes behind the reasoning of a model whose `template` knows some.

    `prompt` is the rendered one, whose end may open the reasoning.
    """
    think = next((pair for pair in _THINK if pair[1] in template), None)
    if "<|channel|>" in template and "<|message|>" in template:
        return Grammar("lark", f"start: {_HARMONY} answer\nprose: /(?s:.*)/\n{_answer(grammar)}")
    if think is None:
        return grammar
    opening, closing = think
    end = re.sub(r"([/\[\]])", r"\\\1", closing)
    is_open = prompt.rstrip().endswith(opening)
    start = "prose /\\s*/ answer" if is_open else f'("{opening}" prose /\\s*/)? answer'
    return Grammar("lark", f"start: {start}\nprose[lazy]: /(?s:.*){end}/\n{_answer(grammar)}")


def _answer(grammar: Grammar) -> str:
    """The grammar as a rule of Lark with this name."""
    match grammar.kind:
        case "json_object":
            return f"answer: {inlined({'type': 'object'})}"
        case "json_schema":
            return f"answer: {inlined(json.loads(grammar.text))}"
        case "regex":
            return f"answer: /{re.sub(_SLASH, _escape, grammar.text)}/"
        case "lark":
            return re.sub(r"\bstart\b(?=\s*(\[.*\])?\s*:)", "answer", grammar.text)


def _escape(found: re.Match[str]) -> str:
    return "\\/" if found[0] == "/" else found[0]
