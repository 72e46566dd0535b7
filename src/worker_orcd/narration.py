"""Narration: one JSON line per event of a worker's life, fit for machines and readable by people.

A line says who did what to what (`actor`, `action`, `target`, and `human`, a sentence of at most 100
characters), which worker, model, device, job and HTTP exchange it belongs to, and the fields its event type
allows (`EVENTS`). Prompt and output text have no field to travel in; secrets that slip into other text are
redacted, and characters that could forge or hide a line are removed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import msgspec

from worker_orcd import __version__

Level = Literal["trace", "debug", "info", "warn", "error", "fatal", "mute"]
LEVELS: tuple[str, ...] = ("trace", "debug", "info", "warn", "error", "fatal", "mute")

EVENTS: Mapping[str, frozenset[str]] = {
    event: frozenset(fields.split())
    for event, fields in {
        "startup": "version pid host port",
        "model_load_start": "bytes_total",
        "model_load_progress": "percent bytes_done bytes_total",
        "model_load_complete": "bytes_total vram_bytes load_ms",
        "ready": "vram_bytes port",
        "execute_start": "tokens_in max_tokens prompt_chars prompt_sha256",
        "execute_end": "outcome code reason stop_reason tokens_in tokens_out first_token_ms decode_time_ms",
        "error": "code http_status retriable fields reason",
        "shutdown": "reason in_flight exit_code",
    }.items()
}
CONTEXT = frozenset({"component", "actor", "action", "target", "job_id", "correlation_id"})
MAX_HUMAN_CHARS = 100

_REDACTED = "[redacted]"
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*KEY-----|\Z)"), _REDACTED),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+(?:\.[\w-]*)?"), _REDACTED),
    (re.compile(r"(?i)\b(bearer|authorization: *basic) +[\w.~+/=-]+"), rf"\1 {_REDACTED}"),
    (re.compile(r"\b(?:sk|pk|rk|hf|gh[opsu]|github_pat|glpat|xox[abprs])[-_][\w-]{8,}"), _REDACTED),
    (re.compile(r"\bAKIA[A-Z0-9]{16}\b"), _REDACTED),
    (re.compile(r"(?i)((?:api[_-]?key|token|secret|passw(?:or)?d)\"? *[:=] *\"?)[^\s\",;&]+"), rf"\1{_REDACTED}"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,31}://[^\s/:@]*):[^\s/]+@"), rf"\1:{_REDACTED}@"),
)
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


class Sink(Protocol):
    """Where lines go; a text stream."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class Narrator:
    """Writes the events of one worker. A sink that fails costs lines (`num_dropped`), never the service."""

    def __init__(
        self,
        worker_id: str,
        model_ref: str,
        gpu_device: int | None,
        sink: Sink,
        level: Level = "info",
    ) -> None:
        self._identity = {"worker_id": worker_id, "model_ref": model_ref, "gpu_device": gpu_device}
        self._sink = sink
        self._least = LEVELS.index(level)
        self.num_dropped = 0

    def narrate(self, event: str, human: str, *, level: Level = "info", **fields: Any) -> None:
        """Write one line.

        `fields` are those of `EVENTS[event]` and of `CONTEXT`; an unknown name is a bug of ours. Fields that
        are None are left out.
        """
        assert event in EVENTS, f"unknown event {event}"
        unknown = fields.keys() - EVENTS[event] - CONTEXT
        assert not unknown, f"{event} may not carry {unknown}"
        if level == "mute" or LEVELS.index(level) < self._least:
            return
        self._write(self._record(event, human, level, fields))

    def _record(self, event: str, human: str, level: str, fields: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC)
        given = {name: value for name, value in fields.items() if value is not None}
        record = {
            "timestamp": rfc3339(now),
            "level": level.upper(),
            "component": "worker",
            **self._identity,
            "event": event,
            "actor": "worker-orcd",
            "action": event,
            "target": str(self._identity["model_ref"]),
            **given,
            "human": human,
            "emitted_by": f"worker-orcd@{__version__}",
            "emitted_at_ms": int(now.timestamp() * 1000),
        }
        record = {name: clean(value) for name, value in record.items()}
        record["human"] = _shorten(record["human"])
        for name in ("actor", "action"):
            record[name] = record[name].encode("ascii", "ignore").decode("ascii")
        return record

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._sink.write(msgspec.json.encode(record).decode() + "\n")
            self._sink.flush()
        except (OSError, ValueError):  # a closed pipe or file; there is nobody left to tell
            self.num_dropped += 1


class BackgroundSink:
    """Writes to a file descriptor from a thread of its own: a reader that stops reading costs lines, not service.

    At most `max_lines` wait; writing more raises BlockingIOError, an OSError as of any broken sink.
    """

    def __init__(self, fd: int, max_lines: int = 10_000) -> None:
        self._fd = fd
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._thread = threading.Thread(target=self._drain, name="narration", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            raise BlockingIOError("nobody reads the log") from None

    def flush(self) -> None:
        pass

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what waits, giving up when nothing moves for `timeout_s`; the sink is of no use afterwards."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def _drain(self) -> None:
        while (text := self._lines.get()) is not None:
            data = text.encode()
            with contextlib.suppress(OSError):  # the reader is gone: keep emptying the queue
                while data:
                    data = data[os.write(self._fd, data) :]


class Capture:
    """A sink that keeps what was written, for tests."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The records written so far, oldest first; only those of one event type when `name` is given."""
        records = [msgspec.json.decode(line, type=dict[str, Any]) for line in self.text.splitlines()]
        return [record for record in records if name in (None, record["event"])]


def clean(value: Any) -> Any:
    """`value` with every string in it, at any depth of lists, freed of invisible characters and secrets."""
    if isinstance(value, str):
        return redact(_visible(value))
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def redact(text: str) -> str:
    """`text` without bearer tokens, API keys, JWTs, private keys and passwords in URLs."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def rfc3339(moment: datetime) -> str:
    """UTC with milliseconds: 2025-01-31T23:59:59.123Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    spaced = re.sub(r"[\r\n\t]+", " ", text)
    return "".join(char for char in spaced if unicodedata.category(char) not in _INVISIBLE)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_HUMAN_CHARS else text[: MAX_HUMAN_CHARS - 1] + "…"
