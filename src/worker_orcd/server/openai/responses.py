"""`/v1/responses`, without memory: nothing is stored, so every request brings its whole conversation."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

from worker_orcd.errors import WorkerError
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Run
from worker_orcd.server.openai.blocks import Block, BlockAnswer, Event, chat_body, response_format
from worker_orcd.server.openai.bodies import (
    ONE_ANSWER,
    ChatBody,
    PositiveCount,
    Sampling,
    Unsupported,
    read_body,
    refuse,
)
from worker_orcd.server.openai.choice import usage
from worker_orcd.server.openai.messages import checked_function, text_of
from worker_orcd.server.openai.prepare import Preparer
from worker_orcd.server.openai.wire import encode

_UNSUPPORTED: Unsupported = (
    Sampling.unsupported
    | ONE_ANSWER
    | {
        "store": (False,),
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
        "include": ([], ["reasoning.encrypted_content"]),  # reasoning comes and goes as it is
        "context_management": ([],),
    }
)
_NAMES = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


class ResponseBody(Sampling, frozen=True, kw_only=True):
    """`/v1/responses`."""

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: PositiveCount | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] = field(default_factory=list)
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def chat(self) -> ChatBody:
        """The same wish as a chat. Raises InvalidRequest."""
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
        effort = self.reasoning.get("effort")
        if effort is not None and not isinstance(effort, str):
            refuse("reasoning.effort", "type", "must be a string")
        return chat_body(
            self,
            _messages(self.input, self.instructions),
            tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=effort,
            max_completion_tokens=self.max_output_tokens,
            response_format=response_format(self.text.get("format"), "text.format"),
        )


def _tool(tool: dict[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        refuse(f"{param}.type", "unsupported", "must be function; this worker runs no tools of its own")
    return {"type": "function", "function": checked_function(tool, param)}


def _messages(given: str | list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """Items as the messages of a chat; calls join the message of the assistant before them."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for i, item in enumerate(given):
        param, kind = f"input[{i}]", item.get("type", "message")
        if kind == "message":
            if item.get("role") not in ("user", "assistant", "system", "developer"):
                refuse(f"{param}.role", "value", "must be user, assistant, system or developer")
            message = {"role": item["role"], "content": text_of(_needed(item, "content", param), f"{param}.content")}
            _append(messages, message)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not all(isinstance(value, str) for value in function.values()):
                refuse(param, "type", "needs a name and arguments, both strings")
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            _append(messages, {"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            output, call_id = text_of(_needed(item, "output", param), f"{param}.output"), item.get("call_id")
            if not isinstance(call_id, str | None):
                refuse(f"{param}.call_id", "type", "must be a string")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        elif kind == "reasoning":
            thoughts = text_of(item.get("content") or [], f"{param}.content")
            _append(messages, {"role": "assistant", "content": "", "reasoning_content": thoughts})
        else:
            refuse(f"{param}.type", "unsupported", "is of a kind that this worker does not read, or does not store")
    if not messages:
        refuse("input", "length", "is empty")
    return messages


def _needed(item: dict[str, Any], name: str, param: str) -> Any:
    if item.get(name) is None:
        refuse(f"{param}.{name}", "required", "is missing")
    return item[name]


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """What the assistant did in one turn is one message."""
    last = messages[-1] if messages else {"role": ""}
    if message["role"] != "assistant" or last["role"] != "assistant":
        messages.append(message)
        return
    last["content"] += message["content"]
    for name, nothing in (("tool_calls", []), ("reasoning_content", "")):
        if name in message:
            last[name] = last.get(name, nothing) + message[name]


class ResponseAnswer(BlockAnswer):
    """The events, or the one object, of a response."""

    grammar_param, prompt_param = "text.format", "input"

    def __init__(self, preparer: Preparer, body: ResponseBody, exchange: Exchange) -> None:
        """Raises InvalidRequest or TemplateError."""
        job_id = f"resp_{uuid.uuid4().hex}"
        super().__init__(preparer, body.chat(), exchange, job_id)
        self._num_events = 0
        self._items: list[dict[str, Any]] = []
        self._document: dict[str, Any] = {
            "id": job_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": preparer.info.name,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.get("effort"), "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": body.metadata,
        }

    @classmethod
    def read(cls, preparer: Preparer, raw: bytes, exchange: Exchange) -> ResponseAnswer:
        return cls(preparer, read_body(raw, ResponseBody), exchange)

    def started(self, run: Run) -> bytes:  # noqa: ARG002
        return self._frames([self._whole("response.created"), self._whole("response.in_progress")])

    def closing(self) -> bytes:
        is_cut = self._choice.finish_reason == "length"
        self._document["status"] = "incomplete" if is_cut else "completed"
        self._document["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        total = usage(self.runs, self._choice.num_reasoning_tokens)
        self._document["usage"] = {
            "input_tokens": total["prompt_tokens"],
            "input_tokens_details": total["prompt_tokens_details"],
            "output_tokens": total["completion_tokens"],
            "output_tokens_details": total["completion_tokens_details"],
            "total_tokens": total["total_tokens"],
        }
        if not self.is_streamed:
            return encode(self._document | self._receipt())
        return self._frames([self._whole(f"response.{self._document['status']}") | self._receipt()])

    def failed(self, error: WorkerError) -> bytes:
        self._document |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._frames([self._whole("response.failed")])

    def _opened(self, block: Block) -> list[Event]:
        self._items.append(item := self._item(block))
        part = [] if block.kind == "call" else [self._event("content_part.added", block, part=_part(block))]
        return [self._event("output_item.added", block, item=item), *part]

    def _added(self, block: Block, text: str) -> list[Event]:
        fields: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        return [self._event(f"{_NAMES[block.kind]}.delta", block, delta=text, **fields)]

    def _closed(self, block: Block) -> list[Event]:
        is_cut = self._choice.run.stop_reason in ("max_tokens", "context_length")
        item = self._items[-1] = self._item(block, "incomplete" if is_cut else "completed")
        if block.kind == "call":
            done = [self._event("function_call_arguments.done", block, arguments=block.text, name=block.name)]
        else:
            item["content"] = [part := _part(block)]
            fields: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            done = [
                self._event(f"{_NAMES[block.kind]}.done", block, text=block.text, **fields),
                self._event("content_part.done", block, part=part),
            ]
        return [*done, self._event("output_item.done", block, item=item)]

    def _whole(self, kind: str) -> Event:
        return {"type": kind, "response": self._document}

    def _event(self, kind: str, block: Block, **fields: Any) -> Event:
        event = {"type": f"response.{kind}", "output_index": block.index, **fields}
        if "item" not in fields:
            event["item_id"] = self._item(block)["id"]
            event |= {} if block.kind == "call" else {"content_index": 0}
        return event

    def _item(self, block: Block, status: str = "in_progress") -> dict[str, Any]:
        item = {"id": f"{_PREFIXES[block.kind]}_{self.job_id[5:]}{block.index}", "status": status}
        if block.kind == "call":
            return item | {"type": "function_call", "call_id": block.id, "name": block.name, "arguments": block.text}
        if block.kind == "reasoning":
            return item | {"type": "reasoning", "summary": [], "content": []}
        return item | {"type": "message", "role": "assistant", "content": []}

    def _frames(self, events: list[Event]) -> bytes:
        for event in events:
            event["sequence_number"] = self._num_events
            self._num_events += 1
        return super()._frames(events)


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
