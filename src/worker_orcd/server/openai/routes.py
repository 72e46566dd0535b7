"""The routes of the OpenAI dialect, and those beside it that show what the worker makes of text."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from worker_orcd.errors import FieldError, InvalidRequest
from worker_orcd.server import body
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Answer
from worker_orcd.server.openai.bodies import ChatBody, read_body, refuse
from worker_orcd.server.openai.chat import ChatAnswer
from worker_orcd.server.openai.completions import CompletionAnswer
from worker_orcd.server.openai.prepare import Preparer
from worker_orcd.server.openai.responses import ResponseAnswer
from worker_orcd.server.openai.wire import encode
from worker_orcd.server.pipeline import Endpoint, Pipeline, Prepare


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """`/tokenize`, in the words of both llama-server (content) and vLLM (prompt)."""

    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool = False


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """`/detokenize`."""

    tokens: Annotated[list[int], Meta(max_length=1_000_000)]


class ModelNotFound(InvalidRequest):
    http_status = 404


def document_endpoint(pipeline: Pipeline, make: Prepare[dict[str, Any]]) -> Callable[[HttpRequest], Any]:
    """An endpoint that answers with what `make` makes of the body, off the event loop."""

    async def answer(request: HttpRequest) -> Response:
        raw = await body.read_body(request)
        document = await pipeline.work(request, make, raw)
        return Response(encode(document), media_type="application/json")

    return answer


class TextRoutes:
    """Tokens, texts and the model's name."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer
        self._born_s = int(time.time())

    def tokenize(self, raw: bytes, exchange: Exchange) -> dict[str, Any]:  # noqa: ARG002 - every Prepare gets it
        asked, tokenizer = read_body(raw, TokenizeBody), self._preparer.tokenizer
        param = "content" if asked.prompt is None else "prompt"
        text = asked.content if asked.prompt is None else asked.prompt
        if text is None:
            refuse(param, "required", "is missing")
        wishes = [wish for wish in (asked.add_special, asked.add_special_tokens) if wish is not None]
        ids = self._preparer.tokenized(text, param, wishes[0] if wishes else False)
        tokens = [{"id": i, "piece": tokenizer.decode([i], skip_special=False)} for i in ids]
        limit = self._preparer.info.context_length
        return {"tokens": tokens if asked.with_pieces else ids, "count": len(ids), "max_model_len": limit}

    def detokenize(self, raw: bytes, exchange: Exchange) -> dict[str, Any]:  # noqa: ARG002
        ids = read_body(raw, DetokenizeBody).tokens
        limit = self._preparer.tokenizer.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            refuse("tokens", "range", f"holds a token id outside 0 to {limit - 1}")
        text = self._preparer.tokenizer.decode(ids, skip_special=False)
        return {"content": text, "prompt": text}

    def apply_template(self, raw: bytes, exchange: Exchange) -> dict[str, Any]:  # noqa: ARG002
        text, _, _ = self._preparer.written(read_body(raw, ChatBody))
        return {"prompt": text}

    async def models(self, request: HttpRequest) -> Response:  # noqa: ARG002
        return Response(encode({"object": "list", "data": [self._model()]}), media_type="application/json")

    async def model(self, request: HttpRequest) -> Response:
        if request.path_params["id"] != self._preparer.info.name:
            message = f"there is no such model; this worker serves {self._preparer.info.name}"
            raise ModelNotFound(message, [FieldError("model", "model", message)])
        return Response(encode(self._model()), media_type="application/json")

    async def embeddings(self, request: HttpRequest) -> Response:  # noqa: ARG002
        refuse("model", "unsupported", "is no embedding model; load one that is, in a worker of its own")

    def _model(self) -> dict[str, Any]:
        info = self._preparer.info
        return {
            "id": info.name,
            "object": "model",
            "created": self._born_s,
            "owned_by": "worker-orcd",
            "max_model_len": info.context_length,
            "meta": {
                "architecture": info.architecture,
                "quant_kind": info.quant_kind,
                "vocab_size": info.vocab_size,
                "context_length": info.context_length,
            },
        }


def openai_routes(pipeline: Pipeline, preparer: Preparer) -> list[BaseRoute]:
    texts = TextRoutes(preparer)
    generating: dict[str, Prepare[Answer]] = {
        "/v1/chat/completions": partial(ChatAnswer.read, preparer),
        "/v1/completions": partial(CompletionAnswer.read, preparer),
        "/v1/responses": partial(ResponseAnswer.read, preparer),
    }
    making = {
        "/tokenize": texts.tokenize,
        "/detokenize": texts.detokenize,
        "/apply-template": texts.apply_template,
    }
    return [
        Route("/v1/models", texts.models, methods=["GET"]),
        Route("/v1/models/{id:path}", texts.model, methods=["GET"]),
        Route("/v1/embeddings", texts.embeddings, methods=["POST"]),
        *(Route(path, Endpoint(pipeline, make), methods=["POST"]) for path, make in generating.items()),
        *(Route(path, document_endpoint(pipeline, work), methods=["POST"]) for path, work in making.items()),
    ]
