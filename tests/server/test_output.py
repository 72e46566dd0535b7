"""What a model says, told apart: the ways of speaking, any cutting of the text, grammars that the parsers read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.vocabularies import CONTROL, USER_DEFINED, bpe_metadata, written
from worker_orcd.engine.grammar import GrammarCompiler
from worker_orcd.engine.grammar_source import SPACE as SCHEMA_SPACE
from worker_orcd.engine.request import Grammar
from worker_orcd.errors import GrammarError
from worker_orcd.server.output import (
    Content,
    OutputParser,
    Piece,
    Reasoning,
    ToolCall,
    adapted,
    parser_for,
    tool_grammar,
)
from worker_orcd.server.output.json_schema import SPACE
from worker_orcd.tokenizer.load import load_tokenizer

WEATHER = {
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "$defs": {"City": {"type": "string"}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
TEMPLATES = {  # what tells the ways of speaking apart
    "plain": "{{ messages }}",
    "qwen3": "{% if '</think>' in message.content %}…<tool_call>\n",
    "qwen2.5": "within <tool_call></tool_call> XML tags",
    "r1": "{{ content.split('</think>')[-1] }}",
    "mistral": "[TOOL_CALLS]",
    "llama": '<|python_tag|>{"name": function name, "parameters": dictionary}',
    "phi4": "<|tool_call|>",
    "harmony": "<|start|>assistant<|channel|>final<|message|>",
}
PARIS = '{"city": "Paris"}'


def parser(style: str, tools: Any = TOOLS, prompt: str = "") -> OutputParser:
    return parser_for(TEMPLATES[style], "llama", tools, prompt)


def joined(pieces: Sequence[Piece]) -> list[tuple[str, ...]]:
    """Neighbours of one kind joined; ids, which are random, left out."""
    parts: list[tuple[str, ...]] = []
    for piece in pieces:
        match piece:
            case ToolCall(index, call_id, name, delta):
                assert (call_id is None) == (name is None)
                if name is not None:
                    assert index == sum(part[0] == "call" for part in parts)
                    parts.append(("call", name, ""))
                assert parts[-1][0] == "call", "more of a call follows the call"
                parts[-1] = (*parts[-1][:2], parts[-1][2] + delta)
            case Content(text) | Reasoning(text):
                kind = type(piece).__name__.lower()
                if not parts or parts[-1][0] != kind:
                    parts.append((kind, ""))
                parts[-1] = (kind, parts[-1][1] + text)
    return parts


def parsed(parser: OutputParser, chunks: Sequence[str]) -> list[tuple[str, ...]]:
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    return joined(pieces + parser.finish())


def call(arguments: str = PARIS, name: str = "get_weather") -> tuple[str, str, str]:
    return ("call", name, arguments)


def content(text: str) -> tuple[str, str]:
    return ("content", text)


def reasoning(text: str) -> tuple[str, str]:
    return ("reasoning", text)


JSON_CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
LLAMA_CALL = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TAGGED = f"<tool_call>\n{JSON_CALL}\n</tool_call>"
COMMENTARY = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}"
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|>"
SAID = {
    "plain": [(" <think>a</think> {} ", [content(" <think>a</think> {} ")])],
    "r1": [
        ("<think>\nhm\n</think>\n\nYes. ", [reasoning("hm"), content("Yes. ")]),
        ("<think>cut off", [reasoning("cut off")]),
        ("Say <think>no</think>", [content("Say <think>no</think>")]),
        ("</think>\n1 < 2", [content("</think>\n1 < 2")]),
    ],
    "qwen3": [
        (f"<think>\nhm\n</think>\n\n{TAGGED}\n{TAGGED}", [reasoning("hm"), call(), call()]),
        (f"\n\n Sure:\n{TAGGED}\n", [content("\n\n Sure:"), call()]),
        (f"{TAGGED} and more", [call(), content("and more")]),
        ("<tool_call>get_weather</tool_call>!", [content("<tool_call>get_weather</tool_call>!")]),
        (" <tool_call> </tool_call>", [content(" <tool_call> </tool_call>")]),
        ('a <tool_call>{"name": 7}</tool_call>', [content('a <tool_call>{"name": 7}</tool_call>')]),
        ('<tool_call>\n{"name": "now"}', [call("{}", "now")]),
        ('<tool_call>{"name": "now", "arguments": {"a"', [call('{"a"', "now")]),
        ('<tool_call>{"name": "now", "argu', [content('<tool_call>{"name": "now", "argu')]),
        ('<tool_call>{"name": "f", "arguments": {"a": "}"}, "id": "x"}</tool_call>', [call('{"a": "}"}', "f")]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', [call('{"a": 1}', "now")]),
        ('<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', [call('{"a": 1}', "now")]),
        ('<tool_call>{"arguments": {"a": ["\\ud83d", "\\ud83d\\ude00", NaN, 1e999]}, "name": "now"}</tool_call>',
         [call('{"a": ["\ufffd", "\U0001f600", "NaN", "1e999"]}', "now")]),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
         [content('<tool_call>{"name": "now", "arguments": [1]}</tool_call>')]),
        (f"<tool_call>[{JSON_CALL}, {JSON_CALL}]</tool_call>", [call(), call()]),
        (f"{TAGGED[:-12]}, oops</tool_call>", [call(), content("oops</tool_call>")]),
        ('{"city": 1}', [content('{"city": 1}')]),
    ],
    "mistral": [
        (f"[TOOL_CALLS][{JSON_CALL}, {JSON_CALL}]", [call(), call()]),
        (f"[TOOL_CALLS] {JSON_CALL}", [call()]),
        (f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]now[CALL_ID]1a[ARGS]{{}}", [call(), call("{}", "now")]),
        (f"Let me see.[TOOL_CALLS]get_weather{PARIS}", [content("Let me see."), call()]),
        ("[TOOL_CALLS]get_weather please", [content("[TOOL_CALLS]get_weather please")]),
        (f"[{JSON_CALL}]", [call()]),
        ("[1, 2]", [content("[1, 2]")]),
    ],
    "llama": [
        (f"{LLAMA_CALL}; {LLAMA_CALL}", [call(), call()]),
        (f"<|python_tag|>{LLAMA_CALL}", [call()]),
        ("<|python_tag|>print(1)", [content("<|python_tag|>print(1)")]),
        ('{"name": "Ada", "parameters": {}}', [content('{"name": "Ada", "parameters": {}}')]),
        ('{"answer": 42}', [content('{"answer": 42}')]),
        (f"See: {LLAMA_CALL}", [content(f"See: {LLAMA_CALL}")]),
        ('{"type": "function", "function": ' + JSON_CALL + "}", [call()]),
    ],
    "phi4": [(f"<|tool_call|>[{JSON_CALL}]<|/tool_call|>", [call()])],
    "harmony": [
        (f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>Hi.", [reasoning("Hm."), content("Hi.")]),
        (f"{ANALYSIS}<|start|>assistant{COMMENTARY}", [reasoning("Hm."), call()]),
        (f" to=functions.get_weather<|channel|>commentary json<|message|>{PARIS}<|call|>", [call()]),
        (f"{COMMENTARY}<|call|><|start|>assistant{COMMENTARY}", [call(), call()]),
        ("<|channel|>commentary<|message|>I will look.<|end|>", [content("I will look.")]),
        ("<|channel|>analysis to=browser.find <|message|>{}", [reasoning("{}")]),
        ("Just words, < 3", [content("Just words, < 3")]),
        ("to", [content("to")]),
        ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Hi.", [reasoning("Hm."), content("Hi.")]),
        ("<|channel|>analysis lost words<|end|>x", [content(" lost wordsx")]),
        ("<|channel|>commentary to=functions.now <|constrain|>json", []),
        ("<|channel|>" + "x" * 600 + "<|message|>y", [content("x" * 600 + "<|message|>y")]),
        (f"{ANALYSIS}stray<|start|>assistant", [reasoning("Hm."), content("stray")]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("style", "text", "expected"), [(s, *case) for s in SAID for case in SAID[s]])
def test_what_was_said(style: str, text: str, expected: list[tuple[str, ...]]) -> None:
    """In one piece, letter by letter, and cut in two at every place."""
    for chunks in ([text], list(text), *([text[:i], text[i:]] for i in range(len(text)))):
        assert parsed(parser(style), chunks) == expected, chunks


@pytest.mark.parametrize(
    ("style", "prompt", "text", "expected"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", "\nhm\n</think>\n\nYes", [reasoning("hm"), content("Yes")]),
        ("qwen3", "<think>\n\n</think>\n\n", "Yes", [content("Yes")]),
        ("harmony", "<|start|>user<|message|>x<|end|><|start|>assistant", ANALYSIS, [reasoning("Hm.")]),
        ("harmony", "<|end|><|start|>assistant<|channel|>final<|message|>It", " is", [content(" is")]),
        ("harmony", "<|start|>assistant<|channel|>analysis<|message|>It", " is<|end|>", [reasoning(" is")]),
    ],
)
def test_an_answer_begun_by_the_prompt(style: str, prompt: str, text: str, expected: list[tuple[str, ...]]) -> None:
    assert parsed(parser(style, prompt=prompt), list(text)) == expected


def test_without_tools_calls_are_content() -> None:
    for style, text in (("qwen3", TAGGED), ("llama", LLAMA_CALL), ("mistral", f"[TOOL_CALLS][{JSON_CALL}]")):
        assert parsed(parser(style, tools=None), [text]) == [content(text)]
    assert parsed(parser("harmony", tools=None), [COMMENTARY]) == [content(PARIS)]


def test_special_tokens_are_shown_where_they_carry_the_structure() -> None:
    needy = {style for style in TEMPLATES if parser(style).needs_special}
    assert needy == {"qwen3", "qwen2.5", "mistral", "llama", "phi4", "harmony"}
    assert {style for style in TEMPLATES if parser(style, tools=None).needs_special} == {"harmony"}
    assert parser_for("", "gpt-oss", None, "").needs_special


@pytest.mark.parametrize(
    ("style", "text", "at_once"),
    [
        ("qwen3", "<think>Hm, so", [reasoning("Hm, so")]),
        ("qwen3", "Hello <tool", [content("Hello")]),
        ("qwen3", '<tool_call>\n{"name": "now", "arguments": {"a": "b', [call('{"a": "b', "now")]),
        ("llama", '{"a', []),
        ("llama", '{"an', [content('{"an')]),
        ("llama", '{"name": "Ada"', [content('{"name": "Ada"')]),
        ("harmony", "<|channel|>commentary to=functions.now<|message|>", [call("", "now")]),
        ("harmony", "Hello", [content("Hello")]),
    ],
)
def test_nothing_is_held_back_that_is_decided(style: str, text: str, at_once: list[tuple[str, ...]]) -> None:
    told = parser(style)
    assert joined([piece for letter in text for piece in told.feed(letter)]) == at_once


MARKS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>", "assistant",
    "analysis", "commentary", "final", " to=functions.now", "<|tool_call|>", "<|/tool_call|>", '{"name": "now", ',
    '"arguments": ', '"parameters": {', '{"a": "\\"}"}', "{", "}", "[", "]", '"', "\\", ",", ":", ";", " ", "\n", "<",
    "<|", "null", "now", "é", "\ud800", "\0", JSON_CALL, TAGGED, COMMENTARY,
]  # fmt: skip
HOSTILE = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=4)), max_size=14).map("".join)


@settings(max_examples=400)
@given(st.sampled_from(sorted(TEMPLATES)), HOSTILE, st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_any_cut_of_any_text_gives_the_same(style: str, text: str, cuts: list[int], is_thinking: bool) -> None:
    prompt = "<think>" if is_thinking else ""
    expected = parsed(parser(style, prompt=prompt), [text])
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    chunks = [text[begin:end] for begin, end in pairwise(places)]
    assert parsed(parser(style, prompt=prompt), chunks) == expected
    assert parsed(parser(style, prompt=prompt), list(text)) == expected
    if style != "harmony" and all(part[0] != "call" for part in expected):
        assert _letters("".join(part[1] for part in expected)) == _letters(text), "nothing is lost or made up"


def _letters(text: str) -> str:
    """Without white space and the marks of reasoning."""
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


@pytest.fixture(scope="module")
def accepts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Grammar, str], bool]:
    """Whether a grammar, as the engine compiles it, lets a model say a text and end there."""
    control = dict.fromkeys(re.findall(r"<[|]\w+[|]>", "".join(MARKS)), CONTROL)
    metadata = bpe_metadata(control | {"<tool_call>": USER_DEFINED, "</tool_call>": USER_DEFINED})
    tokenizer = load_tokenizer(written(tmp_path_factory.mktemp("vocabulary"), metadata))
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)

    def accepts(grammar: Grammar, text: str) -> bool:
        matcher = compiler.compile(grammar).result().raw
        ids = tokenizer.encode(text, add_special=False)
        return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())

    return accepts


@pytest.mark.parametrize(
    ("style", "prompt", "good", "bad"),
    [
        ("qwen2.5", "", [TAGGED, f"{TAGGED}\n{TAGGED}"], ["Hello", JSON_CALL, TAGGED.replace("Paris", '"')]),
        ("qwen3", "", [TAGGED, f"<think>\nhm\n</think>\n\n{TAGGED}"], ["<think>\nhm", "no"]),
        ("qwen3", "<think>\n", [f"hm</think>{TAGGED}"], [TAGGED, "hm</think>Hello"]),
        ("mistral", "", [JSON_CALL], ["Hello", JSON_CALL.replace("city", "town")]),
        ("llama", "", [LLAMA_CALL], [JSON_CALL]),
        (
            "harmony",
            "",
            [COMMENTARY, f"{ANALYSIS}<|start|>assistant{COMMENTARY}"],
            ["<|channel|>final<|message|>Hi", COMMENTARY.replace("weather", "time"), ANALYSIS],
        ),
    ],
)
def test_a_call_that_must_be_made(
    style: str, prompt: str, good: list[str], bad: list[str], accepts: Callable[[Grammar, str], bool]
) -> None:
    """The grammar lets a model only write what the parser takes for a call."""
    grammar = tool_grammar(TOOLS, "required", TEMPLATES[style], "llama", prompt)
    for text in good:
        assert accepts(grammar, text)
        kinds = {part[0] for part in parsed(parser(style, prompt=prompt), list(text))}
        assert "call" in kinds
        assert "content" not in kinds
    assert not any(accepts(grammar, text) for text in bad)


def test_the_one_function_that_must_be_called(accepts: Callable[[Grammar, str], bool]) -> None:
    grammar = tool_grammar(TOOLS, "now", TEMPLATES["llama"], "", "")
    assert accepts(grammar, '{"name": "now", "parameters": {}}')
    assert not accepts(grammar, LLAMA_CALL)


def test_white_space_in_a_call_ends(accepts: Callable[[Grammar, str], bool]) -> None:
    """A weak model would go on with line ends until its tokens are spent."""
    for style in ("qwen2.5", "harmony"):
        call = TAGGED if style == "qwen2.5" else COMMENTARY
        grammar = tool_grammar(TOOLS, "required", TEMPLATES[style], "", "")
        assert accepts(grammar, call.replace('{"city"', '{\n  "city"'))
        assert not accepts(grammar, call.replace('{"city"', '{\n\n\n"city"'))
    assert SPACE == SCHEMA_SPACE


def test_formats_that_cannot_be_enforced_are_remarks(accepts: Callable[[Grammar, str], bool]) -> None:
    schema = {
        "properties": {"format": {"type": "string", "format": "password"}, "day": {"format": "date"}},
        "additionalProperties": True,
        "enum": [{"format": "password"}],
        "items": [{"format": "binary"}, {"uniqueItems": False}],
    }
    assert adapted(schema, "response_format") == {
        "properties": {"format": {"type": "string"}, "day": {"format": "date"}},
        "additionalProperties": True,
        "enum": [{"format": "password"}],
        "items": [{}, {}],
    }
    tool = {"name": "open", "parameters": {"properties": {"path": {"type": "string", "format": "uri-reference"}}}}
    grammar = tool_grammar([{"type": "function", "function": tool}], "required", TEMPLATES["mistral"], "", "")
    assert accepts(grammar, '{"name": "open", "arguments": {"path": "../a"}}')


def test_a_call_has_the_parameters_that_are_listed(accepts: Callable[[Grammar, str], bool]) -> None:
    now = tool_grammar(TOOLS, "now", TEMPLATES["mistral"], "", "")
    assert accepts(now, '{"name": "now", "arguments": {}}')
    assert not accepts(now, '{"name": "now", "arguments": {"more": 1}}')
    for parameters in ({}, {"type": "object"}, {"type": "object", "properties": {}}, {"required": []}):
        function = {"type": "function", "function": {"name": "now", "parameters": parameters}}
        now = tool_grammar([function], "required", TEMPLATES["mistral"], "", "")
        assert accepts(now, '{"name": "now", "arguments": {}}')
        assert not accepts(now, '{"name": "now", "arguments": {"more": 1}}'), parameters
    for parameters in (
        {"additionalProperties": True},
        {"properties": {}, "additionalProperties": {"type": "integer"}},
        {"patternProperties": {"^m": {}}},
        {"minProperties": 1},
        {"required": ["more"]},
        {"$ref": "#/$defs/any", "$defs": {"any": {"type": "object"}}},
        {"anyOf": [{"properties": {"more": {}}}, {"properties": {"less": {}}}]},
        {"allOf": [{"properties": {"more": {}}}, {"properties": {"less": {}}}]},
    ):
        function = {"type": "function", "function": {"name": "now", "parameters": parameters}}
        assert accepts(
            tool_grammar([function], "required", TEMPLATES["mistral"], "", ""),
            '{"name": "now", "arguments": {"more": 1}}',
        ), parameters
    look = tool_grammar(TOOLS, "get_weather", TEMPLATES["mistral"], "", "")
    assert not accepts(look, '{"name": "get_weather", "arguments": {"city": "Paris", "more": 1}}')


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
        {"required": ["a"], "oneOf": [{"properties": {"b": {}}}]},
        {"$ref": "#/$defs/x", "properties": {"a": {}}, "$defs": {"x": {"properties": {"b": {}}}}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "minProperties": 2},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"type": "object"},
        True,
    ],
)
def test_objects_that_may_have_more_stay_open(schema: Any) -> None:
    assert adapted(schema, "response_format") == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**53 + 1},
        {"enum": ["a", {"b": [-(2**53) - 1]}]},
        {"type": "integer", "minimum": 2**53 + 1},
        {"properties": {"a": {"items": {"exclusiveMaximum": -1e300}}}},
        {"multipleOf": 2**60},
        {"const": 1e300},
        {"const": 2**64},
    ],
)
def test_numbers_that_a_grammar_would_change_are_refused(schema: Any) -> None:
    with pytest.raises(GrammarError, match=r"^text\.format: \w+ has a number beyond 2\^53") as caught:
        adapted(schema, "text.format")
    assert caught.value.fields[0].field == "text.format"
    tool = {"name": "f", "parameters": {"properties": {"x": schema}}}
    with pytest.raises(GrammarError, match=r"^tools: "):
        tool_grammar([{"type": "function", "function": tool}], "required", "", "", "")


def test_numbers_up_to_those_are_exact(accepts: Callable[[Grammar, str], bool]) -> None:
    most = 2**53
    schema = {"enum": [most, -most], "default": most + 1, "properties": {"const": {"maximum": most}}}
    grammar = Grammar("json_schema", json.dumps(adapted(schema, "response_format")))
    assert [accepts(grammar, str(n)) for n in (most, most - 1, -most, -most - 1)] == [True, False, True, False]
    for value in (2**60, -(10**16)):
        grammar = Grammar("json_schema", json.dumps(adapted({"const": value}, "response_format")))
        assert [accepts(grammar, str(n)) for n in (value, value + 1, value - 1)] == [True, False, False]


def test_bounds_of_machine_numbers_are_kept_within_what_is_exact(accepts: Callable[[Grammar, str], bool]) -> None:
    most = 2**53
    for bounds in (
        {"minimum": -(2**63), "maximum": 2**63 - 1},
        {"minimum": -3.4e38, "maximum": 3.4e38},
        {"exclusiveMinimum": -1.7e308, "exclusiveMaximum": 1.7e308},
    ):
        grammar = Grammar("json_schema", json.dumps(adapted({"type": "integer"} | bounds, "response_format")))
        numbers = (0, most - 1, 1 - most, most + 2, -most - 2)
        assert [accepts(grammar, str(n)) for n in numbers] == [True] * 3 + [False] * 2
    grammar = Grammar("json_schema", json.dumps(adapted({"type": "number", "maximum": 2**64 - 1}, "x")))
    assert accepts(grammar, "1500.5")


def test_objects_whose_properties_are_listed_are_closed() -> None:
    inner = {"properties": {"b": {}}, "required": ["b"]}
    closed = inner | {"additionalProperties": False}
    schema = {"anyOf": [inner, {"type": "null"}], "$defs": {"x": inner, "y": {"properties": {}}}}
    empty = {"properties": {}, "additionalProperties": False}
    assert adapted(schema, "response_format") == {
        "anyOf": [closed, {"type": "null"}],
        "$defs": {"x": closed, "y": empty},
    }
