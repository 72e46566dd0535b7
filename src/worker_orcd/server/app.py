"""The ASGI application: routes, and around them the edge that names, guards and answers for every exchange."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker_orcd.config import WorkerConfig
from worker_orcd.engine.metrics import MetricsPage
from worker_orcd.engine.request import InferenceEngine
from worker_orcd.errors import Internal, InvalidRequest, Overloaded, Unauthorized, WorkerError
from worker_orcd.narration import Narrator
from worker_orcd.server import anthropic
from worker_orcd.server.auth import CHALLENGE, ApiKeys
from worker_orcd.server.control import Control, ControlRoutes
from worker_orcd.server.exchange import Exchange, check_origin, read_exchange
from worker_orcd.server.execute import Execute
from worker_orcd.server.openai.prepare import Preparer as ChatPreparer
from worker_orcd.server.openai.routes import openai_routes
from worker_orcd.server.openai.wire import error_document
from worker_orcd.server.page import page_routes
from worker_orcd.server.pipeline import Endpoint, Pipeline
from worker_orcd.server.prepare import ChatTemplate, Preparer
from worker_orcd.server.schemas import error_body

if TYPE_CHECKING:
    from worker_orcd.tokenizer.base import Tokenizer

RETRY_ELSEWHERE_S = "1"  # another worker can take it at once
LIVENESS = ("/health", frozenset({"GET", "HEAD"}))  # the one route that answers without a key


def create_app(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    config: WorkerConfig,
    narrator: Narrator,
    metrics: MetricsPage,
) -> Starlette:
    """The application over `engine`; its `Control` is `app.state.control`."""
    control = Control(config.shutdown_timeout_sec)
    routes = ControlRoutes(control, engine, tokenizer, config, metrics)
    preparer = Preparer(engine, tokenizer, chat_template, config)
    pipeline = Pipeline(engine, control, narrator, metrics)
    execute = Endpoint(pipeline, Execute(engine, tokenizer, preparer).prepare, preparer.is_quick)
    chats = ChatPreparer(engine, tokenizer, chat_template, config)
    errors = Errors(narrator, metrics)
    app = Starlette(
        routes=[
            Route("/execute", execute, methods=["POST"], name="execute"),
            Route("/v2/execute", execute, methods=["POST"], name="execute_v2"),
            Route("/health", routes.health, methods=["GET"]),
            Route("/ready", routes.ready, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/cancel", routes.cancel, methods=["POST"]),
            Route("/shutdown", routes.shutdown, methods=["POST"]),
            Route("/v1/requests/{id:path}", pipeline.passports.show, methods=["GET"]),
            *openai_routes(pipeline, chats),
            *anthropic.anthropic_routes(pipeline, chats),
            *page_routes(),
        ],
        middleware=[Middleware(Edge, errors=errors, keys=ApiKeys.of(config), is_loopback=config.is_loopback)],
        exception_handlers={HTTPException: errors.answer, WorkerError: errors.answer},
    )
    app.router.redirect_slashes = False
    app.state.control = control
    return app


class Errors:
    """Answers failed exchanges with the error body, counts and narrates them."""

    def __init__(self, narrator: Narrator, metrics: MetricsPage) -> None:
        self._narrator = narrator
        self._metrics = metrics

    async def answer(self, connection: HTTPConnection, failure: Exception) -> Response:
        """The response to `failure`, whatever it is; never shows more of it than its own message."""
        exchange: Exchange = connection.scope["state"]["exchange"]
        error, status, headers = _classify(failure)
        self._metrics.record_refusal(error.code)
        self._narrate(exchange, error, status, failure)
        body = _error_body(connection.scope["path"], error, status, exchange.correlation_id)
        return Response(body, status, headers, media_type="application/json")

    def warn_deadline(self, exchange: Exchange) -> None:
        self._narrator.narrate(
            "error",
            "ignored an X-Deadline that is neither RFC 3339 nor Unix milliseconds",
            level="warn",
            component="server",
            action="ignore",
            target="x-deadline",
            correlation_id=exchange.correlation_id,
            reason="malformed X-Deadline",
        )

    def _narrate(self, exchange: Exchange, error: WorkerError, status: int, failure: Exception) -> None:
        cause = failure.__cause__ or failure
        fields = [field.field for field in error.fields] if isinstance(error, InvalidRequest) else []
        self._narrator.narrate(
            "error",
            f"answered {status} {error.code}",
            level="error" if status >= 500 and not error.retriable else "warn",
            component="server",
            action="refuse",
            correlation_id=exchange.correlation_id,
            code=error.code,
            http_status=status,
            retriable=error.retriable,
            fields=fields or None,
            reason=type(cause).__name__,
        )


def _error_body(path: str, error: WorkerError, status: int, correlation_id: str) -> bytes:
    """In the dialect of the route."""
    if path.startswith(anthropic.PATH):
        return msgspec.json.encode(anthropic.error_document(error, status, correlation_id))
    if path.startswith("/v1/") and not path.startswith("/v1/requests/"):
        return msgspec.json.encode(error_document(error, status, correlation_id))
    return error_body(error, correlation_id)


def _classify(failure: Exception) -> tuple[WorkerError, int, dict[str, str]]:
    if isinstance(failure, HTTPException):
        message = failure.detail or HTTPStatus(failure.status_code).phrase
        return InvalidRequest(message), failure.status_code, dict(failure.headers or {})
    if isinstance(failure, Overloaded):
        return failure, failure.http_status, {"retry-after": str(failure.retry_after_s)}
    if isinstance(failure, Unauthorized):
        return failure, failure.http_status, CHALLENGE
    if isinstance(failure, WorkerError):
        is_elsewhere = failure.retriable and failure.http_status == 503
        return failure, failure.http_status, {"retry-after": RETRY_ELSEWHERE_S} if is_elsewhere else {}
    return Internal("the worker failed while serving this request"), 500, {}


class Edge:
    """Outermost: gives each exchange its correlation id, checks who asks from where, catches what nobody caught."""

    def __init__(self, app: ASGIApp, errors: Errors, keys: ApiKeys, is_loopback: bool) -> None:
        self._app = app
        self._errors = errors
        self._keys = keys
        self._is_loopback = is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = read_exchange(headers)
        scope.setdefault("state", {})["exchange"] = exchange
        sender = _Sender(send, exchange.correlation_id)
        try:
            if exchange.is_deadline_malformed:
                self._errors.warn_deadline(exchange)
            check_origin(headers, self._is_loopback, scope["http_version"] != "1.0")
            exchange.tenant = self._tenant(scope, headers)
            await self._app(scope, receive, sender)
        except ClientDisconnect:
            return
        except Exception as failure:
            response = await self._errors.answer(HttpRequest(scope), failure)
            if not sender.has_started:
                await response(scope, receive, sender)

    def _tenant(self, scope: Scope, headers: Headers) -> str | None:
        try:
            return self._keys.tenant(headers)
        except Unauthorized:
            path, methods = LIVENESS
            if scope["path"] == path and scope["method"] in methods:
                return None
            raise


class _Sender:
    """Adds the correlation id to the response, and remembers whether one has begun."""

    def __init__(self, send: Send, correlation_id: str) -> None:
        self._send = send
        self._correlation_id = correlation_id
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            MutableHeaders(scope=message)["x-correlation-id"] = self._correlation_id
        await self._send(message)
