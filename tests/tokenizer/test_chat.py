# ruff: noqa: E501 (templates stand as they are published)
"""Chat templates: the same text as `transformers` makes of them, errors that say nothing of the conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.tokenizer.vocabularies import CONTROL, bpe_metadata, written
from worker_orcd.errors import TemplateError
from worker_orcd.tokenizer.chat import MAX_SOURCE_BYTES, ChatTemplate
from worker_orcd.tokenizer.load import load_tokenizer

CHATML = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nAnswer briefly.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PHI3 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + '\n' + message['content']
 + '<|end|>' + '\n' + '<|assistant|>' + '\n' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n'
 }}{% endif %}{% endfor %}"""

LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' ~ (tool_call.arguments | tojson) ~ '}' }}
    {%- elif message.content is mapping or message.content is iterable %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{
 raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user'
 %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{%
 else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

QWEN3_PARTS = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<t>') and message.content.endswith('</t>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.last %}{% break %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {% generation %}{{- message.role ~ ':' ~ content ~ (reasoning or 'none') ~ loop.index0 ~ ns.last_query_index }}{% endgeneration %}
{%- endfor %}
{%- macro show(items, sep=', ') -%}{{ items | map(attribute='role') | join(sep) }}{%- endmacro %}
{{- show(messages) }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{%- for key, value in messages[0] | dictsort %}{{ key | upper }}={{ value | replace('a', 'b') }};{% endfor %}
{{ 'x' * 3 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ '%s-%d' % ('a', 3) }} {{ [1, 2] + [3] }} {{ {'k': (1, 2)} }} {{ "a\\nb" | indent(2) }}
{% set block %}in {{ messages | length }}{% endset %}{{ block }}{% if tools %}tools{% endif %}{{ undefined_thing }}"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello, <b>wörld</b> & 'you'"}],
    [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "古池"},
    ],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"},
        {"role": "user", "content": "3"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"x": {"type": "number", "é": [1, 2.5, None, True]}}},
    }
]


def _transformers(source: str, messages: list[dict[str, Any]], **extras: Any) -> str:
    variables = {"bos_token": "<s>", "eos_token": "</s>", "documents": None} | extras
    text: str = _compile_jinja_template(source).render(messages=messages, **variables)
    return text


@pytest.mark.parametrize(
    "source", [CHATML, PHI3, LLAMA31, MISTRAL, QWEN3_PARTS], ids=["chatml", "phi3", "llama31", "mistral", "qwen3"]
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_text_is_that_of_transformers(source: str, add_generation_prompt: bool, tools: Any) -> None:
    template = ChatTemplate(source, "<s>", "</s>")
    for messages in CONVERSATIONS:
        extras = {"add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            expected = _transformers(source, messages, **extras)
        except Exception as error:
            with pytest.raises(TemplateError, match=f"refuses the conversation: {error}"):
                template.render(messages, **extras)
        else:
            assert template.render(messages, **extras) == expected


def test_tool_calls_become_json() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "<é>"}}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    expected = _transformers(LLAMA31, messages, add_generation_prompt=True, tools=None)
    assert ChatTemplate(LLAMA31, "<s>").render(messages) == expected
    assert '{"name": "f", "parameters": {"x": "<é>"}}' in expected


def test_extras_reach_the_template_and_dates_are_offered() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ strftime_now('%Y')|length }}{{ tools is none }}")
    assert template.render([], enable_thinking=False) == "False 4True"


def test_template_of_a_model_file(tmp_path: Path) -> None:
    metadata = bpe_metadata({"<s>": CONTROL, "</s>": CONTROL}, bos_token_id=98, eos_token_id=99)
    gguf = written(tmp_path, metadata)
    tokenizer = load_tokenizer(gguf)
    assert ChatTemplate.from_gguf(gguf, tokenizer) is None
    gguf = written(
        tmp_path, metadata | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    )
    template = ChatTemplate.from_gguf(gguf, tokenizer)
    assert template is not None
    assert template.render([{"content": "x"}]) == "<s>x</s>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "not valid, line 1"),
        ("a\n{{ x | nofilter }}", "not valid, line 2.*nofilter"),
        ("\n{{ messages[0].content.missing.attribute }}", "failed on line 2: UndefinedError"),
        ("{{ messages[0].content + 1 }}", "failed on line 1: TypeError"),
        ("{{ {}[messages[0].content].x }}", "UndefinedError"),
        ("{{ raise_exception('Roles must alternate') }}", "refuses the conversation: Roles must alternate"),
        ("{{ raise_exception('Bad: ' + messages[0].content) }}", "refuses the conversation: for a reason of its own"),
        ("{% include 'x' %}", "failed on line 1"),
        ("x" * (MAX_SOURCE_BYTES + 1), f"{MAX_SOURCE_BYTES + 1} bytes, the limit is {MAX_SOURCE_BYTES}"),
    ],
    ids=range(9),
)  # fmt: skip
def test_errors_name_the_line_and_never_the_conversation(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "my secret"}])
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__, "no traceback of the template"


def test_long_conversations_are_within_the_budget() -> None:
    """Two thousand messages, and a megabyte in one, through the template with the most passes over its input."""
    short = [{"role": ("user", "assistant")[i % 2], "content": f"message {i}"} for i in range(2000)]
    long = [{"role": "user", "content": "word " * 200_000}]
    for messages in (short, long):
        assert ChatTemplate(LLAMA31, "<s>", cpu_s=5).render(messages).count("<|eot_id|>") == len(messages) + 1
        assert messages[-1]["content"] in ChatTemplate(CHATML, cpu_s=5).render(messages)
