"""Answers made of choices: one object that goes out whole, or chunks of it up to [DONE]."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

from worker_orcd.engine.request import ModelInfo
from worker_orcd.errors import WorkerError
from worker_orcd.server.exchange import Exchange
from worker_orcd.server.generation import Answer, Run
from worker_orcd.server.openai.bodies import Sampling
from worker_orcd.server.openai.choice import Choice, usage
from worker_orcd.server.openai.prepare import digest
from worker_orcd.server.openai.wire import DONE, FINGERPRINT, data_frame, encode, error_document
from worker_orcd.server.receipt import receipt_of


class ChoicesAnswer(Answer):
    """What chats and completions have in common."""

    _kinds: tuple[str, str]  # of the whole object, and of a chunk

    def __init__(
        self, job_id: str, choices: list[Choice], prompt: str, body: Sampling, info: ModelInfo, exchange: Exchange
    ) -> None:
        super().__init__(job_id, [choice.run for choice in choices], len(prompt), digest(prompt))
        self.is_streamed = body.stream
        self._choices, self._info = choices, info
        self._wants_usage = bool(body.stream_options.include_usage)
        self._is_full = exchange.wants_full_receipt
        self._head = {
            "id": job_id,
            "object": self._kinds[body.stream],
            "created": int(time.time()),
            "model": info.name,
            "system_fingerprint": FINGERPRINT,
        }

    def closing(self) -> bytes:
        total = usage(self.runs, sum(choice.num_reasoning_tokens for choice in self._choices))
        if self.is_streamed:
            tail = data_frame(self._head | {"choices": [], "usage": total}) if self._wants_usage else b""
            return tail + DONE
        choices = [self._whole(choice) for choice in self._choices]
        receipts = [receipt_of(run, self._info, self._is_full) for run in self.runs]
        extension = {"receipt": receipts[0]} if len(receipts) == 1 else {"receipts": receipts}
        return encode(self._head | {"choices": choices, "usage": total} | extension)

    def failed(self, error: WorkerError) -> bytes:
        return data_frame(error_document(error, error.http_status)) + DONE

    @abstractmethod
    def _whole(self, choice: Choice) -> dict[str, Any]:
        """A choice that has ended, as a part of the one object."""

    def _frame(self, choice: dict[str, Any], ended: Run | None = None) -> bytes:
        """A chunk of one choice; the last one when its run has `ended`."""
        document: dict[str, Any] = self._head | {"choices": [choice]}
        if self._wants_usage:
            document["usage"] = None
        if ended is not None:
            document["receipt"] = receipt_of(ended, self._info, self._is_full)
        return data_frame(document)
