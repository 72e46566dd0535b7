"""What the headers of one HTTP exchange say: who may ask, under which correlation id, until when."""

from __future__ import annotations

import ipaddress
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

_CORRELATION_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_UNIX_MS = re.compile(r"[0-9]{1,15}")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_LONGEST_S = 86400.0
_PORT = re.compile(r":[0-9]{0,5}\Z")


@dataclass
class Exchange:
    """`deadline_s` (None: none) and `arrived_s` are on the monotonic clock. The connection sets `is_stalled` when it
    gives up, and `has_left` when it ends before the answer does; `tenant` is whose key the request carried, None only
    where none is needed and none was sent."""

    correlation_id: str
    deadline_s: float | None
    is_deadline_malformed: bool = False
    is_stalled: bool = False
    has_left: bool = False
    tenant: str | None = ""
    wants_full_receipt: bool = False  # a replay receipt with the prompt's ids
    arrived_s: float = field(default_factory=time.monotonic)

    def age_ms(self) -> float:
        """Milliseconds since the request arrived."""
        return (time.monotonic() - self.arrived_s) * 1e3

    def remaining_s(self) -> float | None:
        return None if self.deadline_s is None else self.deadline_s - time.monotonic()


def read_exchange(headers: Headers) -> Exchange:
    """Never fails: a correlation id that is missing, repeated or malformed is replaced by a new UUIDv4."""
    ids = headers.getlist("x-correlation-id")
    is_usable = len(ids) == 1 and _CORRELATION_ID.fullmatch(ids[0]) is not None
    correlation_id = ids[0] if is_usable else str(uuid.uuid4())
    exchange = Exchange(correlation_id, None, wants_full_receipt=headers.get("x-receipt", "").lower() == "full")
    if deadlines := headers.getlist("x-deadline"):
        unix_s = parse_deadline(deadlines[0]) if len(deadlines) == 1 else None
        exchange.is_deadline_malformed = unix_s is None
        if unix_s is not None:
            exchange.deadline_s = time.monotonic() + min(unix_s - time.time(), _LONGEST_S)
    return exchange


def parse_deadline(text: str) -> float | None:
    """Unix seconds from an X-Deadline: RFC 3339 with an offset, or Unix milliseconds; None when it is neither."""
    if _UNIX_MS.fullmatch(text):
        return int(text) / 1000
    if _RFC3339.fullmatch(text):
        try:
            return datetime.fromisoformat(text.upper()).timestamp()
        except (ValueError, OverflowError):
            return None
    return None


def check_origin(headers: Headers, is_loopback: bool, needs_host: bool) -> None:
    """Refuse pages of other sites that reach the worker through a browser: by name (rebinding) or cross-origin.

    Unless the worker listens on `is_loopback` only, it cannot know its names; there every request needs a key.
    HTTP/1.0, which no browser speaks, `needs_host` not.
    """
    hosts = [host.lower() for host in headers.getlist("host")]
    if len(hosts) != 1 and (hosts or needs_host):
        raise HTTPException(400, "exactly one Host header is needed")
    if is_loopback and hosts and not is_loopback_host(hosts[0]):
        raise HTTPException(421, "Host must name the loopback interface: localhost, 127.0.0.1 or [::1]")
    for origin in headers.getlist("origin"):
        netloc = _netloc(origin)
        if not (is_loopback_host(netloc) if is_loopback else netloc.lower() in hosts):
            raise HTTPException(403, "requests from pages of other origins are refused")


def is_loopback_host(host: str) -> bool:
    """True for `localhost` and loopback addresses, with or without a port."""
    name = _PORT.sub("", host) if not host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
