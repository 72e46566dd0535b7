"""The clients people have, over a real socket, on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.workers import PROMPT, Worker, real_worker

HAIKU: Any = [{"role": "user", "content": PROMPT}]
LONG: Any = [{"role": "user", "content": PROMPT + ", and about the sea, the moon, the wind and the snow" * 4}]
SCHEMA = {
    "type": "object",
    "properties": {"season": {"enum": ["spring", "winter"]}, "lines": {"type": "integer", "maximum": 9}},
    "required": ["season", "lines"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "save", "description": "Save.", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with real_worker() as worker:
        worker.wait_for("ready")
        yield worker


@pytest.fixture(scope="module")
def base(worker: Worker) -> str:
    return f"http://127.0.0.1:{worker.port}"


@pytest.fixture(scope="module")
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(base: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="haiku", messages=HAIKU, seed=7, n=2)
    chunks = list(
        client.chat.completions.create(
            model="haiku", messages=HAIKU, seed=7, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0].count("\n") == 2
    assert texts[0] != texts[1]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "stop"]


def test_a_prompt_seen_before_is_cached(client: openai.OpenAI) -> None:
    for is_warm in (False, True):
        usage = client.chat.completions.create(model="haiku", messages=LONG, seed=1, max_tokens=4).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert bool(usage.prompt_tokens_details.cached_tokens) == is_warm


def test_scores_belong_to_the_text(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model="haiku", messages=HAIKU, seed=3, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert bytes(byte for entry in entries for byte in entry.bytes or []).decode() == choice.message.content
    assert all(entry.token == entry.top_logprobs[0].token for entry in entries), "greedy takes the likeliest"
    echo = client.completions.create(
        model="haiku", prompt="the quiet moon", echo=True, logprobs=0, max_tokens=0
    ).choices[0]
    assert echo.text == "the quiet moon"
    assert echo.logprobs is not None
    assert "".join(echo.logprobs.tokens or []) == "the quiet moon"
    scores = echo.logprobs.token_logprobs or []
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "haiku", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="haiku", messages=HAIKU, seed=1, response_format=form)
    found = json.loads(answer.choices[0].message.content or "")
    assert found["season"] in ("spring", "winter")
    assert set(found) == {"season", "lines"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "save"}}])
def test_a_tool_is_called_when_it_must_be(client: openai.OpenAI, choice: Any) -> None:
    with client.chat.completions.stream(
        model="haiku", messages=HAIKU, seed=2, tools=TOOLS, tool_choice=choice, max_tokens=200
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.name == "save"
    assert set(json.loads(call.function.arguments)) == {"season", "lines"}


def test_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": "haiku", "input": PROMPT, "instructions": "Be brief.", "extra_body": {"seed": 4}}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert whole.output_text.count("\n") == 2
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="haiku", input="x", previous_response_id="resp_1")


def test_anthropic(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "haiku", "max_tokens": 60, "messages": HAIKU, "extra_body": {"seed": 5}}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text  # type: ignore[union-attr]
    assert (whole.stop_reason, final.stop_reason) == ("end_turn", "end_turn")
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model="haiku", messages=HAIKU)
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="haiku", max_tokens=-1, messages=HAIKU)


def test_langchain(base: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{base}/v1", api_key="none", model="haiku", seed=7, stream_usage=True)  # type: ignore[arg-type]
    text = chat.invoke(PROMPT).text
    assert "".join(chunk.text for chunk in chat.stream(PROMPT)) == text
    assert text.count("\n") == 2


def test_llm_command(base: str, tmp_path: Path) -> None:
    entry = f"- model_id: haiku\n  model_name: haiku\n  api_base: {base}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "haiku", PROMPT], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().count("\n") == 2
