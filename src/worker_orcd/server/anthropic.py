"""The Anthropic dialect: `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Annotated, Any, ClassVar

from msgspec import Meta, field
from starlette.routing import BaseRoute, Route

from worker_orcd.errors import WorkerError
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Run
from worker_orcd.server.openai.blocks import Block, BlockAnswer, Event, chat_body, response_format
from worker_orcd.server.openai.bodies import (
    MAX_STOP_CHARS,
    MAX_STOPS,
    ONE_ANSWER,
    ChatBody,
    Sampling,
    Unsupported,
    read_body,
    refuse,
)
from worker_orcd.server.openai.messages import checked_function, text_of, text_of_part
from worker_orcd.server.openai.prepare import Preparer
from worker_orcd.server.openai.routes import document_endpoint
from worker_orcd.server.openai.wire import encode
from worker_orcd.server.output import decoded
from worker_orcd.server.pipeline import Endpoint, Pipeline

PATH = "/v1/messages"
_UNSUPPORTED: Unsupported = (
    Sampling.unsupported
    | ONE_ANSWER
    | {
        "mcp_servers": ([],),
        "container": (),
        "output_format": (),
        "service_tier": ("auto", "standard_only"),
    }
)
_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_STOPS = {"eos": "end_turn", "stop_sequence": "stop_sequence", "max_tokens": "max_tokens"}
_OPEN: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
}
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class MessagesBody(Sampling, frozen=True, kw_only=True):
    """`/v1/messages`."""

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    system: str | list[dict[str, Any]] = ""
    stop_sequences: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]], Meta(max_length=MAX_STOPS)
    ] = field(default_factory=list)
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] = field(default_factory=list)
    tool_choice: dict[str, Any] = field(default_factory=dict)
    thinking: dict[str, Any] = field(default_factory=dict)
    output_config: dict[str, Any] = field(default_factory=dict)

    def chat(self) -> ChatBody:
        """The same wish as a chat; a last message of the assistant is continued. Raises InvalidRequest."""
        system = text_of(self.system, "system")
        messages = [made for i, item in enumerate(self.messages) for made in _messages(item, f"messages[{i}]")]
        if not messages:
            refuse("messages", "value", "hold nothing that a model reads; add a message of the user")
        last, choice = messages[-1], self.tool_choice.get("type", "auto")
        thinks = self.thinking.get("type")  # adaptive, too, leaves it to the model
        kwargs = {"enable_thinking": thinks == "enabled"} if thinks in ("enabled", "disabled") else {}
        return chat_body(
            self,
            [{"role": "system", "content": system}, *messages] if system else messages,
            stop=[*self.stops, *self.stop_sequences],
            tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)],
            tool_choice=_choice(choice, self.tool_choice.get("name")),
            parallel_tool_calls=not self.tool_choice.get("disable_parallel_tool_use", False),
            continue_final_message=last["role"] == "assistant" and "tool_calls" not in last,
            chat_template_kwargs=kwargs,
            response_format=response_format(self.output_config.get("format"), "output_config.format"),
        )


def _choice(kind: Any, name: Any) -> Any:
    if kind == "tool":
        return {"type": "function", "function": {"name": name}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        refuse("tool_choice.type", "value", "must be auto, any, tool or none")
    return _CHOICES[kind]


def _tool(tool: dict[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        refuse(f"{param}.type", "unsupported", "must be custom; this worker runs no tools of its own")
    function = {"description": ""} | checked_function(tool, param, "input_schema")  # templates take it for granted
    return {"type": "function", "function": function}


def _messages(message: dict[str, Any], param: str) -> list[dict[str, Any]]:
    """One message as those of a chat: results of tools are messages of their own there."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        refuse(f"{param}.role", "value", "must be user or assistant")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not content:
        refuse(f"{param}.content", "type", "must be a string or a list of blocks")
    results, texts, made = [], [], {"role": role}
    for i, block in enumerate(content):
        where = f"{param}.content[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            text = text_of(block.get("content"), f"{where}.content")
            if not isinstance(call_id := block.get("tool_use_id"), str | None):
                refuse(f"{where}.tool_use_id", "type", "must be a string")
            results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        elif kind == "tool_use" and role == "assistant":
            made.setdefault("tool_calls", []).append(_call(block, where))
        elif kind == "thinking" and role == "assistant":
            made["reasoning_content"] = made.get("reasoning_content", "") + str(block.get("thinking", ""))
        elif kind != "redacted_thinking":
            texts.append(text_of_part(block, where))
    if texts or len(made) > 1:
        results.append(made | {"content": "\n".join(texts)})
    return results


def _call(block: dict[str, Any], param: str) -> dict[str, Any]:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str):
        refuse(f"{param}.name", "type", "must be a string")
    if not isinstance(arguments, dict | None):
        refuse(f"{param}.input", "type", "must be an object")
    return {"id": block.get("id"), "type": "function", "function": {"name": name, "arguments": arguments or {}}}


class MessagesAnswer(BlockAnswer):
    """The events, or the one object, of a message."""

    grammar_param = "output_config.format"

    def __init__(self, preparer: Preparer, body: MessagesBody, exchange: Exchange) -> None:
        """Raises InvalidRequest or TemplateError."""
        if body.max_tokens is None:
            refuse("max_tokens", "required", "is missing")
        super().__init__(preparer, body.chat(), exchange, f"msg_{uuid.uuid4().hex}")
        self._model = preparer.info.name

    @classmethod
    def read(cls, preparer: Preparer, raw: bytes, exchange: Exchange) -> MessagesAnswer:
        return cls(preparer, read_body(raw, MessagesBody), exchange)

    def started(self, run: Run) -> bytes:
        message = self._message() | {"usage": self._usage() | {"output_tokens": 1 if run.num_tokens else 0}}
        return self._frames([{"type": "message_start", "message": message}])

    def closing(self) -> bytes:
        reason: dict[str, Any] = {"stop_reason": self._stop_reason(), "stop_sequence": self._choice.run.text.matched}
        if not self.is_streamed:
            content = [_block(block) for block in self._blocks]
            body = self._message() | reason | {"content": content, "usage": self._usage()}
            return encode(body | self._receipt())
        return self._frames(
            [
                {"type": "message_delta", "delta": reason, "usage": self._usage()},
                {"type": "message_stop"} | self._receipt(),
            ]
        )

    def failed(self, error: WorkerError) -> bytes:
        return self._frames([error_document(error, error.http_status)])

    def _opened(self, block: Block) -> list[Event]:
        content = _OPEN.get(block.kind) or {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
        return [{"type": "content_block_start", "index": block.index, "content_block": content}]

    def _added(self, block: Block, text: str) -> list[Event]:
        kind, name = _DELTAS[block.kind]
        return [{"type": "content_block_delta", "index": block.index, "delta": {"type": kind, name: text}}]

    def _closed(self, block: Block) -> list[Event]:
        return [{"type": "content_block_stop", "index": block.index}]

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.job_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self) -> dict[str, int]:
        run = self._choice.run
        return {
            "input_tokens": len(run.request.prompt_ids) - run.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": run.cached_tokens,
            "output_tokens": run.num_tokens,
        }

    def _stop_reason(self) -> str:
        if self._choice.finish_reason == "tool_calls":
            return "tool_use"
        return _STOPS.get(self._choice.run.stop_reason or "", "max_tokens")


def _block(block: Block) -> dict[str, Any]:
    """A block of an answer that goes out whole."""
    if block.kind != "call":
        kind, name = ("text", "text") if block.kind == "text" else ("thinking", "thinking")
        return _OPEN[block.kind] | {"type": kind, name: block.text}
    arguments = decoded(block.text)  # None where it is cut short, as is the answer
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": {} if arguments is None else arguments}


def error_document(error: WorkerError, status: int, correlation_id: str | None = None) -> dict[str, Any]:
    """The body of an answer that is no success, or the last event of a stream."""
    kind = _ERRORS.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    content = {"type": "error", "error": {"type": kind, "message": error.message}}
    return content | ({"request_id": correlation_id} if correlation_id else {})


def anthropic_routes(pipeline: Pipeline, preparer: Preparer) -> list[BaseRoute]:
    def count(raw: bytes, exchange: Exchange) -> dict[str, Any]:  # noqa: ARG001 - every Prepare gets it
        text, _, _ = preparer.written(read_body(raw, MessagesBody).chat())
        return {"input_tokens": len(preparer.tokenized(text, "messages"))}

    return [
        Route(PATH, Endpoint(pipeline, partial(MessagesAnswer.read, preparer)), methods=["POST"]),
        Route(f"{PATH}/count_tokens", document_endpoint(pipeline, count), methods=["POST"]),
    ]
