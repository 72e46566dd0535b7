"""Request passports: what became of the requests of late, for whoever made them (`GET /v1/requests/{id}`)."""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC, datetime

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from worker_orcd.engine.request import Request, StopReason, Timings
from worker_orcd.narration import rfc3339
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Answer, Run

MAX_PASSPORTS = 1000  # of answers, a few hundred bytes each; the oldest go first


class Passport(msgspec.Struct, kw_only=True):
    """One answer. What is not known yet, or never came to be, is null.

    The engine's account (from `queue_ms` on) comes when it has freed all that the request held, which is within one
    step of the end.
    """

    id: str
    correlation_id: str
    received_at: str  # RFC 3339
    state: str = "queued"  # then running, ended
    seed: int
    prompt_tokens: int
    cached_tokens: int | None = None  # of the prompt, found in the prefix cache
    completion_tokens: int = 0
    stop_reason: StopReason | None = None
    error_code: str | None = None  # why it ended early
    queue_ms: float | None = None
    first_token_ms: float | None = None  # from leaving the queue
    decode_ms: float | None = None  # from leaving the queue to the end
    total_ms: float | None = None
    steps: int | None = None
    chunks: int | None = None  # of those, steps that computed tokens of the prompt
    preemptions: int | None = None
    others: list[Passport] = []  # further answers to the same request, after the first

    def follow(self, run: Run) -> None:
        """Take over how far it is."""
        if run.started_s is not None:
            self.state, self.cached_tokens = "running", run.cached_tokens
        self.completion_tokens, self.stop_reason = run.num_tokens, run.stop_reason

    def account(self, timings: Timings) -> None:
        self.queue_ms = round(timings.queue_ms, 3)
        self.first_token_ms = None if timings.first_token_ms is None else round(timings.first_token_ms, 3)
        self.decode_ms, self.total_ms = round(timings.decode_ms, 3), round(timings.total_ms, 3)
        self.steps, self.chunks, self.preemptions = timings.num_steps, timings.num_chunks, timings.num_preempted


Key = tuple[str, str]  # tenant, id


class Passports:
    """Of what runs and of the last that ended."""

    def __init__(self, limit: int = MAX_PASSPORTS) -> None:
        self._limit = limit
        self._pages: OrderedDict[Key, Passport] = OrderedDict()  # by job, oldest first
        self._by_request: dict[Key, Passport] = {}
        self._running: dict[Key, Answer] = {}

    def open(self, answer: Answer, exchange: Exchange) -> None:
        """A request has been accepted; one of the same name that is over is forgotten."""
        tenant, received_at = exchange.tenant or "", rfc3339(datetime.now(UTC))
        key = (tenant, answer.job_id)
        self._forget(key)
        passports = [
            Passport(
                id=run.request.id,
                correlation_id=exchange.correlation_id,
                received_at=received_at,
                seed=run.request.sampling.seed,
                prompt_tokens=len(run.request.prompt_ids),
            )
            for run in answer.runs
        ]
        passports[0].others = passports[1:]
        self._pages[key], self._running[key] = passports[0], answer
        self._by_request |= {(tenant, passport.id): passport for passport in passports}
        while len(self._by_request) > self._limit and len(self._pages) > 1:
            self._forget(next(iter(self._pages)))

    def close(self, answer: Answer, exchange: Exchange, code: str | None) -> None:
        """It has ended; `code` says why, if not by itself."""
        key = (exchange.tenant or "", answer.job_id)
        if self._running.get(key) is answer:
            for passport, run in zip(_all(self._pages[key]), self._running.pop(key).runs, strict=True):
                passport.follow(run)
                passport.state, passport.error_code = "ended", None if run.stop_reason else code

    def account(self, request: Request, timings: Timings) -> None:
        """What the engine has to say of a request that it has freed."""
        if (passport := self._by_request.get((request.tenant, request.id))) is not None:
            passport.account(timings)

    async def show(self, request: HttpRequest) -> Response:
        exchange: Exchange = request.scope["state"]["exchange"]
        key = (exchange.tenant or "", request.path_params["id"])
        page = self._pages.get(key)
        if page is None:
            raise HTTPException(404, f"no request of this name among your last ones; {self._limit} are kept")
        if (answer := self._running.get(key)) is not None:
            for passport, run in zip(_all(page), answer.runs, strict=True):
                passport.follow(run)
        return Response(msgspec.json.encode(page), media_type="application/json")

    def _forget(self, key: Key) -> None:
        self._running.pop(key, None)
        if (page := self._pages.pop(key, None)) is not None:
            for passport in _all(page):
                self._by_request.pop((key[0], passport.id), None)


def _all(page: Passport) -> list[Passport]:
    return [page, *page.others]
