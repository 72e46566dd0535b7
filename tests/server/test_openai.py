"""The OpenAI dialect over a scripted engine: framing, ends, failures, fields."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.fakes import EOS, ByteTokenizer, ScriptedEngine, Step, forever, text_script
from tests.server.client import Answer, Rig, eventually, live, make_rig
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.request import (
    Failed,
    Grammar,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenLogprob,
    Tokens,
)
from worker_orcd.errors import InvalidRequest, TemplateError
from worker_orcd.server.anthropic import MessagesAnswer, MessagesBody
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Run
from worker_orcd.server.openai.bodies import ChatBody, CompletionBody
from worker_orcd.server.openai.chat import ChatAnswer
from worker_orcd.server.openai.choice import Choice
from worker_orcd.server.openai.completions import CompletionAnswer
from worker_orcd.server.openai.prepare import MAX_TOKENIZED, Preparer
from worker_orcd.server.openai.responses import ResponseAnswer, ResponseBody
from worker_orcd.server.output import parser_for
from worker_orcd.tokenizer.chat import ChatTemplate
from worker_orcd.tokenizer.stream import TextStream

CHAT = "/v1/chat/completions"
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
QWEN = PLAIN + "{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}{{ effort or '' }}"
CALLS = '<tool_call>\n{"name": "look", "arguments": {"place": "sea"}}\n</tool_call>'
TWO_CALLS = f"{CALLS}\n{CALLS}"
TOOLS = [{"type": "function", "function": {"name": "look", "strict": True, "parameters": {"type": "object"}}}]
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def rig_of(script: Any = "hi", template: str = PLAIN, **options: Any) -> Rig:
    """An application whose model answers with a text, or plays a script."""
    play = (lambda _: text_script(script)) if isinstance(script, str) else script
    engine = options.pop("engine", None) or ScriptedEngine(play)
    return make_rig(engine, ChatTemplate(template), **options)


def chunks(answer: Answer) -> list[dict[str, Any]]:
    """The documents of a stream, held to its framing: data lines only, the last one [DONE]."""
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *frames, end = answer.body.split(b"\n\n")
    assert end == b""
    frames = [frame for frame in frames if frame != b": keep-alive"]
    assert frames.pop() == b"data: [DONE]"
    assert all(frame.startswith(b"data: {") for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def deltas(documents: list[dict[str, Any]], name: str = "content", index: int = 0) -> str:
    choices = [choice for document in documents for choice in document["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(name) or "" for choice in choices)


def test_a_stream_has_role_text_one_end_usage_and_done() -> None:
    answer = rig_of("hé").call("POST", CHAT, HELLO | {"stream": True, "stream_options": {"include_usage": True}})
    first, *middle, last, tail = chunks(answer)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [{"content": "h"}, {"content": "é"}]
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert tail["choices"] == []
    assert (tail["usage"]["completion_tokens"], tail["usage"]["prompt_tokens"]) == (3, len("<user>hello<bot>"))
    assert {chunk["id"] for chunk in (first, last, tail)} == {first["id"]}
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert {chunk["object"] for chunk in (first, *middle, last, tail)} == {"chat.completion.chunk"}


def test_an_answer_that_goes_out_whole() -> None:
    engine = ScriptedEngine(lambda _: text_script("hi there"), cached_tokens=5)
    answer = rig_of(engine=engine).call("POST", CHAT, HELLO | {"max_completion_tokens": 2, "max_tokens": 7})
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    (choice,) = answer.json["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert engine.freed == [answer.json["id"]]


def test_a_large_answer_goes_out_in_pieces() -> None:
    answer = rig_of("x" * 40_000, max_tokens_out=50_000).call("POST", CHAT, HELLO)
    assert answer.json["choices"][0]["message"]["content"] == "x" * 40_000
    assert max(map(len, answer.writes)) <= 16 * 1024


@pytest.mark.parametrize("seed", range(20))
def test_half_a_stop_string_never_shows_and_scores_are_of_what_shows(seed: int) -> None:
    """However the tokens come together, and whatever begins like the stop string without being it."""
    text, stop = "one ENOugh ENDED", ["END", "EN!"]
    rng, ids = random.Random(seed), list(text.encode())
    cuts = sorted({0, len(ids), *rng.sample(range(len(ids)), 5)})
    events: list[Step] = [
        Tokens(a, ids[a:b], [TokenLogprob(-0.5, [(i, -0.5)]) for i in ids[a:b]]) for a, b in itertools.pairwise(cuts)
    ]
    rig = rig_of(lambda _: [*events, "eos"])
    documents = chunks(
        rig.call("POST", CHAT, HELLO | {"stream": True, "stop": stop, "logprobs": True, "top_logprobs": 1})
    )
    assert deltas(documents) == "one ENOugh "
    choices = [document["choices"][0] for document in documents]
    scored = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert bytes(byte for entry in scored for byte in entry["bytes"]).decode() == "one ENOugh "
    assert choices[-1]["finish_reason"] == "stop"
    whole = rig.call("POST", CHAT, HELLO | {"stop": stop}).json["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("one ENOugh ", "stop")


def test_scores_of_bytes_and_of_the_impossible_are_json() -> None:
    ids = list("é".encode())
    scores = [TokenLogprob(-math.inf, [(ids[0], -0.1), (EOS, -math.inf)]), TokenLogprob(-0.2, [(ids[1], -0.2)])]
    rig = rig_of(lambda _: [Tokens(0, ids, scores), "eos"])
    body = HELLO | {"logprobs": True, "top_logprobs": 2}
    first, second = rig.call("POST", CHAT, body).json["choices"][0]["logprobs"]["content"]
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])
    assert first["logprob"] == -9999.0
    assert [entry["logprob"] for entry in first["top_logprobs"]] == [-0.1, -9999.0]
    assert rig.engine.requests[-1].num_logprobs == 2


def test_n_answers_share_a_prompt_and_follow_the_first() -> None:
    """The others start when the first has its prompt in the cache, and wait here while the engine is full."""

    def script(request: Request) -> list[Step]:
        return text_script("abc"[request.sampling.sample_index] * 3, 0.002)

    engine = ScriptedEngine(script, max_running=1, max_queue=0)
    documents = chunks(rig_of(engine=engine).call("POST", CHAT, HELLO | {"n": 3, "seed": 5, "stream": True}))
    assert [deltas(documents, index=i) for i in range(3)] == ["aaa", "bbb", "ccc"]
    reasons = [choice["finish_reason"] for document in documents for choice in document["choices"]]
    assert reasons.count("stop") == 3
    asked = {request.id: request for request in engine.requests}
    assert sorted(request.sampling.sample_index for request in asked.values()) == [0, 1, 2]
    assert {request.sampling.seed for request in asked.values()} == {5}
    whole = rig_of(engine=ScriptedEngine(script)).call("POST", CHAT, HELLO | {"n": 3}).json
    assert whole["usage"]["prompt_tokens"] == len("<user>hello<bot>")
    assert whole["usage"]["completion_tokens"] == 9
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["aaa", "bbb", "ccc"]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_cancels_all_its_runs(is_streamed: bool) -> None:
    engine = ScriptedEngine(lambda _: forever())
    with live(engine) as server:
        body = {"prompt": ["a", "b"], "n": 2, "stream": is_streamed, "max_tokens": 2000}
        with server.send("/v1/completions", body):
            eventually(lambda: len(engine.running) == 4)
        eventually(lambda: len(engine.cancelled) == 4)
        assert not engine.running
        metrics = server.rig.scrape()
    assert any("disconnect" in name and value == 1 for name, value in metrics.items())


@pytest.mark.parametrize(("is_streamed", "status"), [(True, 200), (False, 499)])
def test_cancel_by_id_and_a_failure_under_way(is_streamed: bool, status: int) -> None:
    rig = rig_of(lambda _: forever())

    async def talk() -> Answer:
        answer = asyncio.create_task(rig.acall("POST", CHAT, HELLO | {"stream": is_streamed}))
        while rig.engine.num_tokens < 3:
            await asyncio.sleep(0.002)
        (job_id,) = rig.engine.running
        assert (await rig.acall("POST", "/cancel", {"job_id": job_id})).status == 202
        return await answer

    answer = asyncio.run(talk())
    assert answer.status == status
    error = chunks(answer)[-1]["error"] if is_streamed else answer.error
    assert error["code"] == "CANCELLED"


def test_failures_before_and_within_a_stream() -> None:
    before = rig_of(lambda _: [Failed("NUMERIC_FAULT", "nan", False)]).call("POST", CHAT, HELLO)
    assert (before.status, before.error["code"]) == (500, "NUMERIC_FAULT")
    assert before.error["type"] == "server_error"
    script: list[Step] = [ord("a"), Failed("VRAM_OOM", "full", True)]
    *_, last = chunks(rig_of(lambda _: script).call("POST", CHAT, HELLO | {"stream": True}))
    assert last["error"] == {"message": "full", "type": "server_error", "param": None, "code": "VRAM_OOM"}
    assert rig_of(lambda _: [RuntimeError("secret")]).call("POST", CHAT, HELLO).status == 500
    full = rig_of(engine=ScriptedEngine(max_running=0, max_queue=0)).call("POST", CHAT, HELLO)
    assert (full.status, full.headers["retry-after"], full.error["type"]) == (429, "2", "rate_limit_error")
    late = rig_of().call("POST", CHAT, HELLO, {"X-Deadline": "1"})
    assert (late.status, late.error["code"]) == (504, "INFERENCE_TIMEOUT")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", None),
        ({"messages": None}, "messages", None),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "refusal": "no"}]}, "messages[0].content", None),
        ({"messages": [{"role": "assistant", "refusal": 1}]}, "messages[0].refusal", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "unsup"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", None),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "context_length_exceeded"),
        ({"temperature": 2.5}, "temperature", None),
        ({"temperature": "hot"}, "temperature", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"seed": 2**64}, "seed", None),
        ({"n": 17}, "n", None),
        ({"stop": ["a", ""]}, "stop", None),
        ({"logit_bias": {"257": 1}}, "logit_bias", None),
        ({"logit_bias": {"-1": 1}}, "logit_bias", None),
        ({"stop_token_ids": [257]}, "stop_token_ids", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", None),
        ({"samplers": ["top_k", "magic"]}, "samplers", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", None),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", None),
        ({"structured_outputs": {"regex": "a", "json": {}, "choice": ["b"]}}, "structured_outputs", None),
        ({"tools": [{"type": "code"}]}, "tools[0].type", "unsup"),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", None),
        ({"continue_final_message": True}, "continue_final_message", None),
        ({"functions": [{"name": "f"}]}, "functions", "unsup"),
        ({"best_of": 2}, "best_of", "unsup"),
        ({"modalities": ["audio"]}, "modalities", "unsup"),
        ({"guided_json": {}}, "guided_json", "unsup"),
        ({"suffix": "x"}, "suffix", "unsup"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str, code: str | None) -> None:
    rig = rig_of()
    answer = rig.call("POST", CHAT, HELLO | fields)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["code"].startswith(code or "INVALID_REQUEST")
    assert set(answer.error) == {"message", "type", "param", "code", "correlation_id"}
    assert not rig.engine.requests


def test_unknown_and_neutral_fields_change_nothing() -> None:
    fields = {"user": "me", "metadata": {"a": "b"}, "best_of": 1, "store": False, "suffix": None, "future_field": [1]}
    assert rig_of().call("POST", CHAT, HELLO | fields | {"model": "any", "temperature": None}).status == 200


NASTY = [-1, 0, 257, 2**31, 2**63, 2**64, 10**400, 1.5, -1e308, True, "x", "", [], [[]], {}, {"0": "x"}, [-1], [None]]
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": "y", "reasoning_content": "z", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "w", "name": "look"},
]  # fmt: skip
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "look"}}
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"},
                                      {"type": "tool_use", "id": "c", "name": "look", "input": {}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": ""}]}]},
]  # fmt: skip
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]},
    {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "w"},
]
BODIES: list[tuple[Any, type[msgspec.Struct], dict[str, Any]]] = [
    (ChatAnswer, ChatBody, {
        "messages": TURNS, "tools": TOOLS, "tool_choice": NAMED, "response_format": SCHEMA, "logit_bias": {"7": 1},
        "stop": ["a"], "stream_options": {"include_usage": True}, "chat_template_kwargs": {"effort": "x"},
        "structured_outputs": {"choice": ["a"]},
    }),
    (CompletionAnswer, CompletionBody, {"prompt": [[1, 2], "x"], "response_format": SCHEMA, "stop_token_ids": [1]}),
    (ResponseAnswer, ResponseBody, {
        "input": ITEMS, "tools": [{"type": "function", "name": "look", "parameters": {}}],
        "tool_choice": {"type": "function", "name": "look"}, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    }),
    (MessagesAnswer, MessagesBody, {
        "messages": BLOCKS, "max_tokens": 5, "system": [{"type": "text", "text": "s"}],
        "thinking": {"type": "enabled"},
        "tools": [{"name": "look", "description": "d", "input_schema": {}}], "stop_sequences": ["a"],
        "tool_choice": {"type": "tool", "name": "look", "disable_parallel_tool_use": True},
    }),
]  # fmt: skip


def changed(value: Any) -> Iterator[Any]:
    """The document with one part of it, at any depth, replaced or left out."""
    if not isinstance(value, dict | list):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        for nasty in [*NASTY, None, *changed(value[key])]:
            copy = value.copy()
            copy[key] = nasty  # type: ignore[index]
            yield copy


@pytest.mark.parametrize(("answer", "body", "good"), BODIES, ids=[kind.__name__ for kind, *_ in BODIES])
def test_no_value_of_any_field_is_an_accident(answer: Any, body: type[msgspec.Struct], good: dict[str, Any]) -> None:
    """Served or refused by name; never an error of ours, and no id out of range gets to the engine."""
    engine = ScriptedEngine()
    preparer = Preparer(engine, ByteTokenizer(), ChatTemplate(QWEN), WorkerConfig())
    every = dict.fromkeys(body.__struct_fields__) | good
    assert answer.read(preparer, json.dumps(good).encode(), Exchange("id", None)).runs
    num_served = 0
    for document in changed(every):
        try:
            (run, *_) = answer.read(preparer, json.dumps(document).encode(), Exchange("id", None)).runs
        except InvalidRequest as failure:
            if failure.fields or isinstance(failure, TemplateError) or "digits" in failure.message:
                continue
            raise
        num_served += 1
        request = run.request
        ids = [*request.prompt_ids, *request.stop_ids, *request.sampling.logit_bias]
        assert 0 <= min(ids) <= max(ids) < 257
        assert 0 <= request.sampling.seed < 2**64
        assert 1 <= request.max_tokens <= 2048
        assert len(request.grammar.text if request.grammar else "") < 10_000
    assert num_served > 20


def test_fields_reach_the_engine() -> None:
    rig = rig_of(template=QWEN)
    fields = {
        "temperature": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": 0.2, "frequency_penalty": -0.2,
        "repetition_penalty": 1.1, "logit_bias": {"7": -3}, "seed": -1, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [9], "mirostat": 2, "dry_multiplier": 0.8, "samplers": ["top_k", "temperature"],
        "priority": "batch", "max_tokens": 10**6, "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"effort": "hard"},
    }  # fmt: skip
    assert rig.call("POST", CHAT, HELLO | fields).status == 200
    (request,) = rig.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0.5, 0, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (0.2, -0.2, {7: -3.0})
    assert (sampling.seed, sampling.mirostat_tau, sampling.order) == (2**64 - 1, 5.0, ("top_k", "temperature"))
    assert set(sampling.dry_breaker_ids) == set(b'\n:"*')
    assert (request.min_tokens, request.ignore_eos, request.stop_ids, request.priority) == (2, True, [9], 1)
    assert request.max_tokens == 2048  # the worker's own limit: clients ask for more by default
    assert request.grammar == Grammar("json_object")
    assert bytes(request.prompt_ids).endswith(b"<bot>hard")


def test_grammars_of_structured_outputs() -> None:
    rig = rig_of()
    wishes = [{"json": {"type": "string"}}, {"regex": "a+"}, {"grammar": 'start: "x"'}, {"choice": ["a", 'b"']}]
    wishes += [{"json": '{"format": "password"}'}, {"json": True}]
    for wish in wishes:
        assert rig.call("POST", "/v1/completions", {"prompt": "x", "structured_outputs": wish}).status == 200
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}
    assert rig.call("POST", CHAT, HELLO | {"response_format": schema}).status == 200
    assert [request.grammar for request in rig.engine.requests] == [
        Grammar("json_schema", '{"type": "string"}'),
        Grammar("regex", "a+"),
        Grammar("lark", 'start: "x"'),
        Grammar("lark", 'start: "a" | "b\\""'),
        Grammar("json_schema", "{}"),
        Grammar("json_schema", "{}"),
        Grammar("json_schema", '{"type": "object"}'),
    ]


def test_a_grammar_that_is_none_is_refused() -> None:
    for wish in ({"regex": "("}, {"grammar": "start: nothing"}, {"json": {"type": "moon"}}, {"regex": "a" * 70_000}):
        answer = rig_of().call("POST", "/v1/completions", {"prompt": "x", "structured_outputs": wish})
        assert (answer.status, answer.error["code"]) == (400, "GRAMMAR_ERROR")
        assert answer.error["param"] == "structured_outputs"
    form = {"type": "json_schema", "schema": {"not": {}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
    for path, wish, param in (
        (CHAT, {"tools": [tool], "tool_choice": "required"}, "tools"),
        (CHAT, {"response_format": form | {"json_schema": form}}, "response_format"),
        ("/v1/responses", {"text": {"format": form}}, "text.format"),
    ):
        answer = rig_of().call("POST", path, HELLO | {"input": "x"} | wish)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "GRAMMAR_ERROR", param)
        assert answer.error["message"].startswith(param)


def test_the_last_event_or_the_body_has_a_receipt() -> None:
    rig, asked = rig_of("hi"), {"X-Receipt": "full"}
    *_, last = chunks(rig.call("POST", CHAT, HELLO | {"stream": True, "seed": 3}, asked))
    whole = rig.call("POST", CHAT, HELLO | {"seed": 3}, asked).json
    assert last["receipt"] == whole["receipt"]
    assert whole["receipt"]["prompt_ids"] == list(b"<user>hello<bot>")
    plain = rig.call("POST", CHAT, HELLO | {"n": 2}).json
    assert [receipt["output_tokens"] for receipt in plain["receipts"]] == [2, 2]
    assert "prompt_ids" not in plain["receipts"][0]
    for path, body in (("/v1/responses", {"input": "x"}), ("/v1/messages", HELLO | {"max_tokens": 9})):
        assert rig.call("POST", path, body).json["receipt"]["output_tokens"] == 2
        last_event = rig.call("POST", path, body | {"stream": True}).body.split(b"data: ")[-1]
        assert json.loads(last_event)["receipt"]["output_tokens"] == 2


def test_a_key_names_the_tenant() -> None:
    rig = rig_of(api_key="sesame")
    assert rig.call("POST", CHAT, HELLO, {"Authorization": "Bearer sesame"}).status == 200
    assert rig.engine.requests[0].tenant
    wrong = rig.call("POST", CHAT, HELLO, {"Authorization": "Bearer other"})
    assert (wrong.status, wrong.error["type"]) == (401, "authentication_error")
    claude = rig.call("POST", "/v1/messages", HELLO)
    assert (claude.status, claude.json["type"], claude.error["type"]) == (401, "error", "authentication_error")


def test_tool_calls_whole_and_streamed() -> None:
    rig = rig_of(f"Let me see.{TWO_CALLS}", QWEN)
    whole = rig.call("POST", CHAT, HELLO | {"tools": TOOLS}).json["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Let me see."
    calls = whole["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"place": "sea"}] * 2
    assert len({call["id"] for call in calls}) == 2
    documents = chunks(rig.call("POST", CHAT, HELLO | {"tools": TOOLS, "stream": True}))
    assert deltas(documents) == "Let me see."
    parts = [part for d in documents for part in d["choices"][0]["delta"].get("tool_calls", [])]
    for index in (0, 1):
        first, *rest = [part for part in parts if part["index"] == index]
        assert first["function"]["name"] == "look"
        assert first["type"] == "function"
        assert all("id" not in part and "name" not in part["function"] for part in rest)
        arguments = "".join(part["function"]["arguments"] for part in (first, *rest))
        assert json.loads(arguments) == {"place": "sea"}
    assert documents[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tool_choice_and_parallel_calls() -> None:
    rig = rig_of(TWO_CALLS, QWEN)
    one = rig.call("POST", CHAT, HELLO | {"tools": TOOLS, "parallel_tool_calls": False}).json["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1
    none = rig.call("POST", CHAT, HELLO | {"tools": TOOLS, "tool_choice": "none"}).json["choices"][0]
    assert none["message"]["content"] == TWO_CALLS
    named = {"type": "function", "function": {"name": "look"}}
    for choice in ("required", named):
        assert rig.call("POST", CHAT, HELLO | {"tools": TOOLS, "tool_choice": choice}).status == 200
        assert "look" in (rig.engine.requests[-1].grammar or Grammar("regex")).text
    assert b'"look"' in bytes(rig.engine.requests[0].prompt_ids)
    assert b"strict" not in bytes(rig.engine.requests[0].prompt_ids)
    assert b'"look"' not in bytes(rig.engine.requests[1].prompt_ids)


def test_messages_as_templates_read_them() -> None:
    template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": "1\\ud83d"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "sea"},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    answer = rig_of(template=template).call("POST", "/apply-template", {"messages": messages})
    system, assistant, tool, refusal = map(json.loads, answer.json["prompt"].splitlines())
    assert system == {"role": "system", "content": "be\nbrief"}
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"a": "1\ufffd"}
    assert (assistant["content"], assistant["reasoning_content"]) == ("", "hm")
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "sea"}
    assert refusal == {"role": "assistant", "content": "no"}


def test_reasoning_is_told_apart() -> None:
    rig = rig_of("I think</think>so", PLAIN + "<think>{# </think> #}")
    message = rig.call("POST", CHAT, HELLO).json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("I think", "so")
    documents = chunks(rig.call("POST", CHAT, HELLO | {"stream": True}))
    assert (deltas(documents, "reasoning_content"), deltas(documents)) == ("I think", "so")


@pytest.mark.parametrize("group", [1, 2, 10])
def test_reasoning_tokens_are_the_same_however_tokens_come(group: int) -> None:
    """A token whose text is held back counts with the piece that it becomes a part of."""
    words = ["<think>", "I ", "think ", "so", ".", "</think>", "\n", "Yes", ", it", " is."]
    tokenizer = SimpleNamespace(token_bytes=lambda token_id: words[token_id].encode())
    run = Run(Request("a", [1], 20, SamplingParams(1)), TextStream(tokenizer, []))
    choice = Choice(run, parser_for("<think> </think>", "qwen3", None, ""))
    for first in range(0, 10, group):
        choice.push(Tokens(first, list(range(first, first + group))))
    choice.finish(run.text.finish())
    assert (choice.num_reasoning_tokens, choice.reasoning, choice.content) == (5, "I think so.", "Yes, it is.")
    run = Run(Request("a", [1], 20, SamplingParams(1)), TextStream(tokenizer, [" so far"]))
    cut = Choice(run, parser_for("<think> </think>", "qwen3", None, ""))
    words[3] = " so"
    cut.push(Tokens(0, [0, 1, 3]))
    cut.finish(run.text.finish())
    assert (cut.num_reasoning_tokens, cut.reasoning) == (3, "I  so")


def test_a_final_message_is_continued() -> None:
    rig = rig_of()
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Once "}]
    for fields, end in (
        ({"continue_final_message": True}, "<assistant>Once "),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<assistant>Once "),
        ({"add_generation_prompt": False}, "<assistant>Once "),
        ({}, "Once <bot>"),
    ):
        prompt = rig.call("POST", "/apply-template", {"messages": messages} | fields).json["prompt"]
        assert prompt.endswith(end), fields


def test_completions_of_texts_and_ids() -> None:
    rig = rig_of(lambda request: [*request.prompt_ids, "eos"])
    for prompt, texts in (("ab", ["ab"]), ([97, 98], ["ab"]), (["a", "b"], ["a", "b"]), ([[97], [98]], ["a", "b"])):
        answer = rig.call("POST", "/v1/completions", {"prompt": prompt, "echo": True, "n": 2})
        choices = answer.json["choices"]
        assert [choice["text"] for choice in choices] == [text * 2 for text in texts for _ in range(2)]
        assert [choice["index"] for choice in choices] == list(range(2 * len(texts)))
        assert answer.json["usage"]["prompt_tokens"] == 2
    for prompt in ([], [[]], "", ["a", 1], [257], [-1], [True], {"a": 1}, ["a"] * 129, [[97, "b"]], None):
        answer = rig.call("POST", "/v1/completions", {"prompt": prompt})
        assert (answer.status, answer.error["param"].partition("[")[0]) == (400, "prompt"), prompt


def test_half_a_character_of_the_prompt_is_not_completed_by_the_answer() -> None:
    rig = rig_of(lambda _: [0xA9, ord("a"), "eos"])
    answer = rig.call("POST", "/v1/completions", {"prompt": [ord("x"), 0xC3]})
    assert answer.json["choices"][0]["text"] == "\ufffda"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_offsets_count_characters(is_streamed: bool) -> None:
    """All the bytes of a character begin where it does; half of one at the end of the prompt is one of its own."""
    prompt, text = [*"a😀b".encode(), 0xF0], "é😀c!"
    scores = [TokenLogprob(-1.0, [])] * 8
    ids = list(text.encode())
    script: list[Step] = [
        PromptLogprobs(0, [None, *scores[:2]]),
        PromptLogprobs(3, scores[2:6]),
        Tokens(0, ids[:4], scores[:4]),
    ]
    rig = rig_of(lambda _: [*script, Tokens(4, ids[4:], scores[: len(ids) - 4]), "eos"])
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "stream": is_streamed}
    answer = rig.call("POST", "/v1/completions", body)
    choices = [document["choices"][0] for document in chunks(answer)] if is_streamed else answer.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "a😀b\ufffd" + text
    offsets = [offset for choice in choices for offset in (choice["logprobs"] or {}).get("text_offset", [])]
    assert offsets == [0, 1, 1, 1, 1, 2, 3, 4, 4, 5, 5, 5, 5, 6, 7]


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_is_scored(is_streamed: bool, max_tokens: int) -> None:
    prompt = [None, TokenLogprob(-0.25, [(98, -0.25)])]
    rig = rig_of(
        lambda _: [PromptLogprobs(0, prompt), Tokens(0, [99], [TokenLogprob(-1.0, [(100, -0.5)])]), "max_tokens"]
    )
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": is_streamed}
    answer = rig.call("POST", "/v1/completions", body)
    assert rig.engine.requests[0].prompt_logprobs
    choices = [document["choices"][0] for document in chunks(answer)] if is_streamed else answer.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "abc"[: 2 + max_tokens]
    assert choices[-1]["finish_reason"] == "length"
    joined: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        for name in joined:
            joined[name] += (choice["logprobs"] or {}).get(name, [])
    num = 2 + max_tokens
    assert joined == {
        "tokens": ["a", "b", "c"][:num],
        "token_logprobs": [None, -0.25, -1.0][:num],
        "top_logprobs": [None, {"b": -0.25}, {"d": -0.5, "c": -1.0}][:num],
        "text_offset": [0, 1, 2][:num],
    }


def test_others_get_their_turn_while_a_long_prompt_is_scored() -> None:
    count = 200  # steps' worth that wait already
    rig = rig_of(lambda _: [*(PromptLogprobs(i, [TokenLogprob(-1.0, [])]) for i in range(count)), 99, "max_tokens"])

    async def turns() -> int:
        body = {"prompt": "a" * count, "echo": True, "logprobs": 1, "max_tokens": 0}
        task = asyncio.create_task(rig.acall("POST", "/v1/completions", body))
        num_turns = 0
        while not task.done():
            await asyncio.sleep(0)
            num_turns += 1
        assert len(task.result().json["choices"][0]["logprobs"]["tokens"]) == count
        return num_turns

    assert asyncio.run(turns()) > count


def test_models_texts_and_tokens() -> None:
    rig = rig_of()
    (model,) = rig.call("GET", "/v1/models").json["data"]
    assert rig.call("GET", f"/v1/models/{model['id']}").json == model
    missing = rig.call("GET", "/v1/models/other/model")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")
    assert rig.call("POST", "/v1/embeddings", {"input": "x"}).status == 400
    for name in ("content", "prompt"):
        assert rig.call("POST", "/tokenize", {name: "aé"}).json["tokens"] == list("aé".encode())
    assert rig.call("POST", "/detokenize", {"tokens": list("aé".encode())}).json["content"] == "aé"
    assert rig.call("POST", "/detokenize", {"tokens": [257]}).status == 400
    assert len(rig.call("POST", "/tokenize", {"content": "x" * MAX_TOKENIZED}).json["tokens"]) == MAX_TOKENIZED
    for num in (MAX_TOKENIZED + 1, 2 * 2**20):
        refused = rig.call("POST", "/tokenize", {"prompt": "x" * num})
        assert (refused.status, refused.bad_fields) == (400, {"prompt": "length"})


def test_a_prompt_far_too_long_is_refused_without_a_count_of_its_own() -> None:
    long = "x" * 2**20
    chat = {"messages": [{"role": "user", "content": long}]}
    for path, body, param in ((CHAT, chat, "messages"), ("/v1/completions", {"prompt": ["x", long]}, "prompt[1]")):
        error = rig_of().call("POST", path, body).error
        assert error["message"] == (
            f"{param} has more than 4095 tokens; the limit is 4095, of a context of 4096. Shorten it"
        )
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    counted = rig_of().call("POST", "/v1/messages/count_tokens", chat)
    assert counted.error["message"] == f"messages has more than {MAX_TOKENIZED} tokens; send it in parts"


def test_no_template_no_chat() -> None:
    answer = make_rig().call("POST", CHAT, HELLO)
    assert (answer.status, answer.error["code"]) == (400, "unsupported_parameter")


def test_no_text_of_a_request_shows_in_log_or_error() -> None:
    canary = "canary-6f1"
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": canary, "content": canary}]},
        {"messages": [{"role": "user", "content": canary}], "tool_choice": canary},
        {"messages": [{"role": "user", "content": canary}], "priority": canary, "n": 2},
        {"messages": [{"role": "user", "content": canary}], "response_format": {"type": canary}},
        {"messages": [{"role": "user", "content": canary}], "tools": [{"type": "function", "function": canary}]},
        {"messages": [{"role": "user", "content": canary}], "logit_bias": {canary: 1}},
        {"messages": [{"role": "user", "content": canary}], "max_tokens": 3},
    ]
    rig = rig_of()
    for body in bodies:
        answer = rig.call("POST", CHAT, body)
        assert canary.encode() not in answer.body
    assert answer.status == 200
    assert canary not in json.dumps(rig.log.events())
