"""Writes docs/openapi.json from the types and rules of the code: `python docs/make_openapi.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from worker_orcd import __version__
from worker_orcd.config import WorkerConfig
from worker_orcd.server import schemas, sse
from worker_orcd.server.anthropic import MessagesBody
from worker_orcd.server.control import Health
from worker_orcd.server.openai.bodies import ChatBody, CompletionBody
from worker_orcd.server.openai.responses import ResponseBody
from worker_orcd.server.openai.routes import DetokenizeBody, TokenizeBody
from worker_orcd.server.passport import Passport

FILE = Path(__file__).with_name("openapi.json")
REF = "#/components/schemas/{name}"
JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
OBJECT: dict[str, Any] = {"type": "object"}
EVENT_TYPES = [sse.StartedEvent, sse.TokenEvent, sse.MetricsEvent, sse.EndEvent, sse.ErrorEvent]
BODIES = [ChatBody, CompletionBody, ResponseBody, MessagesBody, TokenizeBody, DetokenizeBody]


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    summary: str
    body: str | None = None  # name of a schema
    answer: str | None = None  # name of the schema of the 200 or 202; None: an object of the dialect
    media: tuple[str, ...] = (JSON,)
    status: int = 200


OPERATIONS = [
    Operation("post", "/v1/chat/completions", "Chat, in OpenAI's dialect", "ChatBody", media=(JSON, EVENTS)),
    Operation("post", "/v1/completions", "Complete text or tokens", "CompletionBody", media=(JSON, EVENTS)),
    Operation("post", "/v1/responses", "Responses, stateless", "ResponseBody", media=(JSON, EVENTS)),
    Operation("post", "/v1/messages", "Chat, in Anthropic's dialect", "MessagesBody", media=(JSON, EVENTS)),
    Operation("post", "/v1/messages/count_tokens", "Tokens of a conversation", "CountTokensBody"),
    Operation("post", "/v1/embeddings", "Refused: the model is no embedding model", "Object"),
    Operation("get", "/v1/models", "The one model"),
    Operation("get", "/v1/models/{id}", "The one model"),
    Operation("get", "/v1/requests/{id}", "Passport of one of your last requests", answer="Passport"),
    Operation("post", "/tokenize", "Text to token ids", "TokenizeBody"),
    Operation("post", "/detokenize", "Token ids to text", "DetokenizeBody"),
    Operation("post", "/apply-template", "The text a chat becomes", "ChatBody"),
    Operation(
        "post", "/execute", "Generate, as started, token, metrics, end or error", "ExecuteBody", media=(EVENTS,)
    ),
    Operation("post", "/v2/execute", "The same as /execute", "ExecuteBody", media=(EVENTS,)),
    Operation("post", "/cancel", "End a job", "Cancel", "Cancel", status=202),
    Operation("post", "/shutdown", "Finish what runs and stop", "Object", status=202),
    Operation("get", "/health", "Whether the worker lives; needs no key, and then says no more", answer="Health"),
    Operation("get", "/ready", "Whether to send work here"),
    Operation("get", "/metrics", "Numbers for Prometheus", media=(TEXT,)),
]
PATHS_OF_PAGE = frozenset({"/", "/app.js", "/style.css"})  # of the chat page; no interface


def document() -> dict[str, Any]:
    """The whole description, ready to be written."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "worker-orcd",
            "version": __version__,
            "description": "One language model over HTTP. Null in a body is the same as leaving a field out.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:8080"}],
        "security": [{"bearer": []}, {"header": []}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    answer = _ref(operation.answer) if operation.answer else OBJECT
    content = {media: {"schema": answer if media == JSON else {"type": "string"}} for media in operation.media}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path}".translate(str.maketrans("/-", "__", "{}")),
        "responses": {
            str(operation.status): {"description": "The answer", "content": content},
            "default": {"description": "An error", "content": {JSON: {"schema": _ref("Error")}}},
        },
    }
    if "{id}" in operation.path:
        schema = {"type": "string", "minLength": 1}
        described["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
    if operation.body:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(operation.body)}}}
    if operation.path == "/health":
        described["security"] = [{}]
    return described


def _schemas() -> dict[str, Any]:
    _, schemas_ = msgspec.json.schema_components([Health, Passport, *EVENT_TYPES, *BODIES], ref_template=REF)
    schemas_["ChatBody"]["properties"]["messages"]["items"] = _ref("Message")
    schemas_["CompletionBody"]["properties"]["prompt"] = _prompt()
    messages = schemas_["MessagesBody"]
    messages["properties"]["messages"]["items"] = _ref("Turn")
    schemas_["CountTokensBody"] = messages | {"title": "CountTokensBody"}
    schemas_["MessagesBody"] = messages | {"required": [*messages["required"], "max_tokens"]}
    return dict(sorted({**schemas_, **_own_schemas()}.items()))


def _own_schemas() -> dict[str, Any]:
    config = WorkerConfig(worker_id="docs")
    rules = schemas.execute_rules(config.max_tokens_out, vocab_size=2**31 - 1)
    fields = {name: {"anyOf": [_rule(rule), {"type": "null"}]} for name, rule in rules.items()}
    execute = {"properties": fields | {name: _rule(rules[name]) for name in schemas.REQUIRED}}
    error = _object(message={"type": "string"})
    return {
        "Object": OBJECT,
        "Cancel": _object(job_id=_rule(schemas.JOB_ID)),
        "Error": _object(error=error),
        "ExecuteBody": OBJECT | {"required": sorted(schemas.REQUIRED)} | execute,
        "Content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _ref("TextPart")}]},
        "TextPart": _object(type={"const": "text"}, text={"type": "string"}),
        "Message": {
            "anyOf": [
                _object(role={"enum": ["system", "developer", "user", "assistant"]}, content=_ref("Content")),
                _object(role={"const": "tool"}, content=_ref("Content"), tool_call_id={"type": "string"}),
                _object(role={"const": "assistant"}, tool_calls={"type": "array", "items": OBJECT}),
            ]
        },
        "Turn": _object(role={"enum": ["user", "assistant"]}, content=_ref("Content")),
    }


def _object(**properties: Any) -> dict[str, Any]:
    """All of them are needed; more may be there."""
    return OBJECT | {"required": sorted(properties), "properties": properties}


def _prompt() -> dict[str, Any]:
    text, ids = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}
    many = [{"type": "array", "items": kind} for kind in (text, ids)]
    return {"anyOf": [text, ids, *many]}


def _rule(rule: schemas.Rule) -> dict[str, Any]:
    match rule:
        case schemas.Integer():
            return {"type": "integer", "minimum": rule.low, "maximum": rule.high}
        case schemas.Number():
            return {"type": "number", "minimum": rule.low, "maximum": rule.high}
        case schemas.Text():
            return {"type": "string", "minLength": 1, "maxLength": rule.max_chars}
        case schemas.Texts():
            return {"type": "array", "maxItems": rule.max_items, "items": {"type": "string", "minLength": 1}}
        case schemas.Choice():
            return {"enum": list(rule.values)}
        case schemas.Flag():
            return {"type": "boolean"}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(name=name)}


def text() -> str:
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
