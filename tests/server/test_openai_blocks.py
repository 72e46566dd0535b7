"""Responses and Anthropic messages over a scripted engine, read by their official clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from llguidance import LLTokenizer

from tests.fakes import ScriptedEngine, text_script
from tests.server.client import Live, live
from worker_orcd.engine.grammar_source import Bytes, new_matcher
from worker_orcd.engine.request import Failed, Grammar, Request
from worker_orcd.server.openai.grammars import after_reasoning
from worker_orcd.tokenizer.chat import ChatTemplate

TEMPLATE = (
    "{% for m in messages %}{{ m | tojson }}\n{% endfor %}{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}{{ 'quick' if enable_thinking is false }}<think>{# </think> #}{% endif %}"
)
ANSWER = 'Hm.</think>Look:<tool_call>\n{"name": "look", "arguments": {"place": "sea"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"place": "sea"}'}


@pytest.fixture
def server() -> Iterator[Live]:
    with live(
        ScriptedEngine(lambda _: text_script(ANSWER), cached_tokens=3), template=ChatTemplate(TEMPLATE)
    ) as server:
        yield server


def prompt_of(request: Request) -> list[dict[str, Any]]:
    """The messages as the template got them."""
    return [json.loads(line) for line in bytes(request.prompt_ids).decode().splitlines() if line.startswith("{")]


def test_a_response_reasons_speaks_and_calls(server: Live) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0)
    tool: Any = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}
    asked: Any = {"model": "m", "input": "x", "tools": [tool]}
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response  # type: ignore[union-attr]
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    whole = client.responses.create(**asked)
    for response in (final, whole):
        reasoning, message, call = response.output
        assert reasoning.content[0].text == "Hm."  # type: ignore[union-attr, index]
        assert message.content[0].text == "Look:"  # type: ignore[union-attr, index]
        assert (call.name, json.loads(call.arguments)) == ("look", {"place": "sea"})  # type: ignore[union-attr]
        assert response.usage is not None
        assert response.usage.input_tokens_details.cached_tokens == 3
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert json.loads(deltas) == {"place": "sea"}
    for index, kind in enumerate(["reasoning", "message", "function_call"]):
        added, *_, done = [event for event in events if getattr(event, "output_index", None) == index]
        assert (added.type, done.type) == ("response.output_item.added", "response.output_item.done")
        assert (added.item.type, done.item.type) == (kind, kind)  # type: ignore[union-attr]
        assert added.item.id == done.item.id  # type: ignore[union-attr]


def test_a_conversation_comes_back_as_items(server: Live) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0)
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "where?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Look:"}]},
        CALL,
        {"type": "function_call_output", "call_id": "c1", "output": "waves"},
    ]
    client.responses.create(model="m", input=items, instructions="Be brief.", max_output_tokens=9)
    (request,) = server.rig.engine.requests
    system, user, assistant, tool = prompt_of(request)
    assert (system["content"], user["content"], tool["content"]) == ("Be brief.", "where?", "waves")
    assert (assistant["content"], assistant["reasoning_content"]) == ("Look:", "Hm.")
    assert assistant["tool_calls"][0]["function"] == {"name": "look", "arguments": {"place": "sea"}}
    assert request.max_tokens == 9
    bad: list[tuple[dict[str, Any], str]] = [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
        ({"input": []}, "input"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": "x" * 5000}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "call_id": "c1"}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "call_id": 1, "output": "x"}]}, "input[0].call_id"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": [1]}]}, "tools[0].parameters"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"const": 2**60 + 1}}}}, "text.format"),
    ]
    for fields, param in bad:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**({"model": "m", "input": "x"} | fields))  # type: ignore[call-overload]
        assert caught.value.param == param
        assert str(caught.value.body["message"]).startswith(param)  # type: ignore[index]


def test_a_message_thinks_speaks_and_calls(server: Live) -> None:
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="x", max_retries=0)
    asked: Any = {
        "model": "m", "max_tokens": 500, "messages": [{"role": "user", "content": "x"}],
        "tools": [{"name": "look", "input_schema": SCHEMA}],
    }  # fmt: skip
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    for message in (whole, final):
        thinking, text, call = message.content
        assert thinking.thinking == "Hm."  # type: ignore[union-attr]
        assert text.text == "Look:"  # type: ignore[union-attr]
        assert (call.name, call.input) == ("look", {"place": "sea"})  # type: ignore[union-attr]
        assert message.stop_reason == "tool_use"
        assert message.usage.cache_read_input_tokens == 3
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('{"a": "\\ud83d", "b": NaN, "c": 1e999}', {"a": "\ufffd", "b": "NaN", "c": "1e999"}),
        ('{"a": "line\nline"}', {"a": "line\nline"}),
        ('{"a": "cut', {}),
    ],
)
def test_arguments_that_are_no_json_reach_the_client(arguments: str, told: dict[str, Any]) -> None:
    call = '<tool_call>{"name": "look", "arguments": ' + arguments
    with live(ScriptedEngine(lambda _: text_script(f"</think>{call}")), template=ChatTemplate(TEMPLATE)) as server:
        client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="x", max_retries=0)
        tools: Any = [{"name": "look", "input_schema": SCHEMA}]
        message = client.messages.create(
            model="m", max_tokens=99, messages=[{"role": "user", "content": "x"}], tools=tools
        )
    assert message.content[-1].input == told  # type: ignore[union-attr]


def test_what_anthropic_messages_become(server: Live) -> None:
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="x", max_retries=0)
    messages: Any = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "tool_use", "id": "c1", "name": "look", "input": {"place": "sea"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "waves"}]},
            {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}},
        ]},
    ]  # fmt: skip
    client.messages.create(
        model="m", max_tokens=500, messages=messages, system=[{"type": "text", "text": "Be brief."}],
        stop_sequences=["k:"], thinking={"type": "disabled"},
    )  # fmt: skip
    (request,) = server.rig.engine.requests
    system, user, assistant, tool, last = prompt_of(request)
    assert [item["content"] for item in (system, user, tool, last)] == ["Be brief.", "where?", "waves", "and?"]
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"place": "sea"}
    assert assistant["reasoning_content"] == "Hm."
    assert b"quick" in bytes(request.prompt_ids)
    prefilled = [*messages[:1], {"role": "assistant", "content": "Well"}]
    stopped = client.messages.create(model="m", max_tokens=500, messages=prefilled, stop_sequences=["k:"])
    assert bytes(server.rig.engine.requests[-1].prompt_ids).endswith(b"Well")
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "k:")
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    client.messages.create(model="m", max_tokens=500, messages=messages, extra_body={"output_config": form})
    grammar = server.rig.engine.requests[-1].grammar
    assert grammar is not None
    assert json.dumps(SCHEMA)[:-1] in grammar.text
    for fields in (
        {"max_tokens": -1},
        {"messages": []},
        {"tool_choice": {"type": "some"}},
        {"top_k": "x"},
        {"mcp_servers": [1]},
        {"n": 2},
        {"system": "s", "messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
    ):
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(**({"model": "m", "max_tokens": 5, "messages": messages} | {"extra_body": fields}))
        assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_refusals_of_messages_name_their_own_fields(server: Live) -> None:
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="x", max_retries=0)
    messages: Any = [{"role": "user", "content": "x"}]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].name "),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": "x"}]}]},
         "messages[0].content[0].input "),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 1}]}]},
         "messages[0].content[0].tool_use_id "),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name "),
        ({"tools": [{"name": "f", "input_schema": [1]}]}, "tools[0].input_schema "),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice must name one of the tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a call"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema "),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type "),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"const": 2**60 + 1}}}},
         "output_config.format: "),
    ]  # fmt: skip
    for fields, begin in bad:
        asked: Any = {"model": "m", "max_tokens": 5, "messages": messages, "system": "s"} | fields
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(**asked)
        assert caught.value.body["error"]["message"].startswith(begin)  # type: ignore[index]
    image: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "source": {}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[1\] is not text"):
        client.messages.create(model="m", max_tokens=5, messages=image)


def test_tokens_are_counted_beyond_the_context(server: Live) -> None:
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="x", max_retries=0)
    short, long = (
        client.messages.count_tokens(model="m", messages=[{"role": "user", "content": "x" * length}]).input_tokens
        for length in (1, 9001)
    )
    assert long - short == 9000
    redacted: Any = [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]
    with pytest.raises(anthropic.BadRequestError, match="messages hold nothing"):
        client.messages.count_tokens(model="m", messages=redacted)


def test_failures_within_a_stream() -> None:
    script = [ord("a"), Failed("VRAM_OOM", "full", True)]
    with live(ScriptedEngine(lambda _: script), template=ChatTemplate("{{ messages[0].content }}")) as server:
        base = f"http://127.0.0.1:{server.port}"
        messages: Any = [{"role": "user", "content": "x"}]
        claude = anthropic.Anthropic(base_url=base, api_key="x", max_retries=0)
        with pytest.raises(anthropic.APIStatusError, match="full"):
            list(claude.messages.create(model="m", max_tokens=5, messages=messages, stream=True))
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="x", max_retries=0)
        *_, last = client.responses.create(model="m", input="x", stream=True)
        assert last.type == "response.failed"
        assert last.response.error is not None
        with pytest.raises(openai.APIError, match="full"):
            list(client.chat.completions.create(model="m", messages=messages, stream=True))
        whole = claude.with_options(max_retries=0)
        with pytest.raises(anthropic.InternalServerError, match="full"):
            whole.messages.create(model="m", max_tokens=5, messages=messages)


THINK = "<think>{# </think> #}"


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json_object"), '{"a": 1}', "[1]"),
        (Grammar("json_schema", '{"enum": ["a"]}'), '"a"', '"b"'),
        (Grammar("regex", r"a/b\/[0-9]"), "a/b/7", "ab"),
        (Grammar("lark", 'start: "x" foo\nfoo: "y"'), "xy", "yx"),
    ],
)
def test_reasoning_may_come_before_what_a_grammar_asks(grammar: Grammar, good: str, bad: str) -> None:
    for prompt, before in (("ask", ""), ("ask", "<think>a { b</think>\n"), ("ask <think>\n", "a { b</think>")):
        whole = after_reasoning(grammar, THINK, prompt)
        for text, is_fine in ((before + good, True), (before + bad, False)):
            matcher = new_matcher(LLTokenizer(Bytes(whole.text)), whole)  # type: ignore[arg-type]
            assert all(matcher.consume_token(byte) for byte in text.encode()) == is_fine, (prompt, text)
    assert after_reasoning(grammar, "no marks", "ask") is grammar
