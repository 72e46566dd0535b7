# ruff: noqa: E501 (templates stand as they are published)
"""Chat templates: the same text as `transformers` makes of them, errors that say nothing of the conversation."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.tokenizer.vocabularies import CONTROL, bpe_metadata, written
from worker_orcd.assemble import draw_up, load_texts
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import ModelLoadFailed, TemplateError
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

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = message.reasoning_content if message.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + message.content.lstrip('\\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- for document in documents or [] %}{{- '<doc>' + document.title | upper + '</doc>' }}{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

HARMONY = """{#- The shape of gpt-oss: macros that call themselves, namespaces, a date, no tool result without a call. #}
{%- macro type_of(spec, required=[]) -%}
    {%- if spec.type == "array" -%}
        {%- set inner = type_of(spec['items']) -%}
        {{- "any[]" if inner|length > 50 else inner + "[]" -}}
    {%- elif spec.type == "string" -%}
        {%- if spec.enum -%}{{- '"' + spec.enum|join('" | "') + '"' -}}{%- else -%}{{- "string" -}}{%- endif -%}
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{\\n" }}
        {%- for name, inner in spec.properties.items() -%}
            {{- name -}}{%- if name not in (spec.required or []) -%}{{- "?" -}}{%- endif -%}{{- ": " }}
            {{- type_of(inner) }}{%- if not loop.last -%}{{-", " }}{%- endif -%}
        {%- endfor -%}
        {{- "}" }}
    {%- else -%}
        {{- spec.type if spec.type is string else spec.type | default([]) | join(" | ") }}
    {%- endif -%}
{%- endmacro -%}
{{- "<|start|>system<|message|>Today is " + strftime_now("%Y-%m-%d") + "\\n" }}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
{{- "Reasoning: " + reasoning_effort + "<|end|>" }}
{%- if messages[0].role in ["developer", "system"] %}
    {%- set instructions = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set instructions = "" %}{%- set rest = messages %}
{%- endif %}
{%- if instructions or tools %}
    {{- "<|start|>developer<|message|>" + instructions }}
    {%- for tool in tools or [] %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\\ntype " + tool.name + " = (_: " + type_of(tool.parameters) + ") => any;\\n" }}
    {%- endfor %}
    {{- "<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in rest -%}
    {%- if message.role == 'assistant' -%}
        {%- if "tool_calls" in message %}
            {%- set later = namespace(found=false) %}
            {%- for other in rest[loop.index:] %}
                {%- if other.role == 'assistant' and "tool_calls" not in other %}{%- set later.found = true %}{%- endif %}
            {%- endfor %}
            {%- if message.thinking and not later.found %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
            {{- call.arguments|tojson }}{{- "<|call|>" }}
            {%- set last.name = call.name %}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
            {%- set last.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last.name is none %}{{- raise_exception("No call before this result") }}{%- endif %}
        {{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" }}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}"""

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": "<é>", "n": [1, 2.5]}}}
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
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "", "reasoning_content": "\nI look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "2"},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "3 é"},
    ],
    [{"role": "developer", "content": "Be brief."}, {"role": "tool", "content": "no call before"}],
]
PROPERTIES = {
    "x": {"type": "string", "enum": ["é", "<b>"]},
    "n": {"type": "array", "items": {"type": ["null", "number"]}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "Does 'it' & more",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": ["x"], "é": [1, 2.5, None, True]},
        },
    }
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "reasoning_effort": "high", "documents": [{"title": "é", "text": "t"}]},
]


def _transformers(source: str, messages: list[dict[str, Any]], **extras: Any) -> str:
    texts, _ = render_jinja_template([messages], chat_template=source, bos_token="<s>", eos_token="</s>", **extras)
    return str(texts[0])


@pytest.mark.parametrize(
    "source",
    [CHATML, PHI3, LLAMA31, MISTRAL, QWEN3_PARTS, QWEN3, HARMONY],
    ids=["chatml", "phi3", "llama31", "mistral", "qwen3-parts", "qwen3", "harmony"],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_text_is_that_of_transformers(source: str, add_generation_prompt: bool, tools: Any) -> None:
    template = ChatTemplate(source, "<s>", "</s>")
    for messages, given in product(CONVERSATIONS, EXTRAS):
        extras = {"add_generation_prompt": add_generation_prompt, "tools": tools} | given
        try:
            expected = _transformers(source, messages, **extras)
        except jinja2.TemplateError as error:
            with pytest.raises(TemplateError, match=f"refuses the conversation: {error}|UndefinedError"):
                template.render(messages, **extras)
        else:
            assert template.render(messages, **extras) == expected


def test_reasoning_has_both_of_its_names_and_tools_a_description() -> None:
    messages = [{"role": "user", "content": "1"}, CONVERSATIONS[3][1] | {"reasoning": "x"}]
    assert "analysis<|message|>\nI look.<|end|>" in ChatTemplate(HARMONY).render(messages)
    bare = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert "// \ntype f = (_: object) => any;" in ChatTemplate(HARMONY).render(messages, tools=bare)
    assert "description" not in ChatTemplate(QWEN3).render(messages, tools=bare)


def test_tool_calls_become_json() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "<é>"}}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    expected = _transformers(LLAMA31, messages, add_generation_prompt=True, tools=None)
    assert ChatTemplate(LLAMA31, "<s>").render(messages) == expected
    assert '{"name": "f", "parameters": {"x": "<é>"}}' in expected


def test_extras_reach_the_template_and_dates_are_offered() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ strftime_now('%Y')|length }}{{ tools is none }}")
    assert template.render([], enable_thinking=False) == "False 4True"


def test_plain_fields_are_formatted() -> None:
    source = "{{ '<{}|{}|{a}|{{}}>'.format('é', 3, a=[1]) }}{{ '{1}{0}'.format(1, 2) }}"
    assert ChatTemplate(source).render([]) == "<é|3|[1]|{}>21"


def test_template_of_a_model_file(tmp_path: Path) -> None:
    """Its own, another for conversations with tools, or a file in their place."""
    metadata = bpe_metadata({"<s>": CONTROL, "</s>": CONTROL}, bos_token_id=98, eos_token_id=99)
    gguf = written(tmp_path, metadata)
    tokenizer = load_tokenizer(gguf)
    assert ChatTemplate.load(gguf, tokenizer) is None
    key, source = "tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    gguf = written(tmp_path, metadata | {key: source, f"{key}.tool_use": "<tool_call>{{ tools[0] }}"})
    template = ChatTemplate.load(gguf, tokenizer)
    assert template is not None
    assert template.render([{"content": "x"}]) == "<s>x</s>"
    assert template.render([{"content": "x"}], tools=[1]) == "<tool_call>1"
    assert "<tool_call>" in template.source
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }} é{{ eos_token }}\n")
    template = ChatTemplate.load(gguf, tokenizer, file)
    assert template is not None
    assert template.render([{"content": "x"}], tools=[1]) == "x é</s>"
    with pytest.raises(ModelLoadFailed, match=r"absent\.jinja|No such file"):
        ChatTemplate.load(gguf, tokenizer, tmp_path / "absent.jinja")
    file.write_text("{% if %}")
    with pytest.raises(ModelLoadFailed, match=r"chat\.jinja: the chat template is not valid, line 1"):
        ChatTemplate.load(gguf, tokenizer, file)
    file.write_bytes(b"x" * (MAX_SOURCE_BYTES + 1))
    with pytest.raises(ModelLoadFailed, match="more than"):
        ChatTemplate.load(gguf, tokenizer, file)


def test_template_by_flag(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("<{{ messages[0].content }}>")
    config = WorkerConfig(device="cpu", chat_template=file)
    template = load_texts(config, draw_up(config)).chat_template
    assert template is not None
    assert template.render([{"content": "x"}]) == "<x>"


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
        ("{{ '{}'.format() }}", "failed on line 1"),
        ("x" * (MAX_SOURCE_BYTES + 1), f"{MAX_SOURCE_BYTES + 1} bytes, the limit is {MAX_SOURCE_BYTES}"),
    ],
    ids=range(10),
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
