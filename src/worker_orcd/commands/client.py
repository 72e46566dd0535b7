"""A worker's HTTP interface from the client's side; any server that speaks OpenAI's dialect will do for chat."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Generator
from contextlib import closing
from typing import Any
from urllib.parse import SplitResult, urlsplit

from worker_orcd.errors import InvalidRequest, WorkerError

MAX_ERROR_BYTES = 65536


class WorkerUnreachable(WorkerError):
    """Nothing answers at the address, or the connection broke."""

    code = "WORKER_UNREACHABLE"


class RequestRefused(WorkerError):
    """The server answered with an error, in its own words."""

    code = "REQUEST_REFUSED"


class WorkerClient:
    """One request at a time, each on a connection of its own. `key` is the API key, or empty."""

    def __init__(self, url: str, key: str = "", timeout_s: float = 300.0) -> None:
        if (parts := _parts(url)) is None:
            raise InvalidRequest(f"url is {url!r}; an address such as http://127.0.0.1:8080 is needed")
        self.url = url
        self._parts, self._timeout_s = parts, timeout_s
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def model(self) -> str:
        """The name of the first model served."""
        try:
            return str(self.get("/v1/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RequestRefused(f"{self.url} names no model at /v1/models") from None

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        with closing(self._ask("GET", path, None)) as response:
            return _decoded(response.read())

    def post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """The response to a POST, its body not yet read; close it. Raises RequestRefused on any error status."""
        return self._ask("POST", path, json.dumps(body).encode())

    def events(self, path: str, body: dict[str, Any]) -> Generator[tuple[str, Any], None, None]:
        """Event name and decoded data of a stream; `[DONE]` is None. Closing the iterator closes the connection."""
        name = ""
        with closing(self.post(path, body)) as response:
            try:
                for line in response:
                    field, colon, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
                    value = value.removeprefix(" ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        yield name, None if value == "[DONE]" else _decoded(value.encode())
                    elif not field and not colon:  # the end of an event
                        name = ""
            except (OSError, http.client.HTTPException) as error:
                raise self._lost(error) from None

    def _ask(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        host, port = self._parts.hostname or "", self._parts.port
        connection: http.client.HTTPConnection
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        try:
            connection.request(method, self._parts.path.rstrip("/").removesuffix("/v1") + path, body, self._headers)
            response = connection.getresponse()
            if response.status >= 300:
                raise _refusal(response)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._lost(error) from None
        except RequestRefused:
            connection.close()
            raise
        return response

    def _lost(self, error: Exception) -> WorkerUnreachable:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return WorkerUnreachable(f"{self.url}: {what}; start one with `worker-orcd serve`, or check the address")


def _parts(url: str) -> SplitResult | None:
    """None for what http.client could not ask: it would fail on some of it in other ways than on a broken network."""
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in ("http", "https") and parts.port != 0 and (parts.hostname or "").encode("idna")
    except ValueError:
        return None
    return parts if is_sound and parts.path.isascii() and url.isprintable() and " " not in url else None


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        raise RequestRefused("the server answered with something that is not JSON") from None


def _refusal(response: http.client.HTTPResponse) -> RequestRefused:
    try:
        error = json.loads(response.read(MAX_ERROR_BYTES))["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    return refusal_of(error, f"the server answered {response.status} {response.reason}")


def refusal_of(error: Any, otherwise: str) -> RequestRefused:
    """From the error object of an answer or of a stream, whatever is in it."""
    told = error if isinstance(error, dict) else {}
    code = f" ({told['code']})" if isinstance(told.get("code"), str) else ""
    details = told.get("details")
    fields = details.get("errors") if isinstance(details, dict) else None
    said = [str(field["message"]) for field in fields or () if isinstance(field, dict) and field.get("message")]
    return RequestRefused(f"{told.get('message') or otherwise}{code}" + (f": {'; '.join(said)}" if said else ""))
