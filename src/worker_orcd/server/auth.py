"""API keys: who may ask, and in whose name.

A key comes as `Authorization: Bearer KEY`, as `x-api-key: KEY` or, for browsers, as the password of HTTP Basic. Keys
are kept as SHA-256 and compared in constant time; no error and no log line repeats one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterator
from pathlib import Path

from starlette.datastructures import Headers

from worker_orcd.config import WorkerConfig
from worker_orcd.errors import StartFailed, Unauthorized

MAX_FILE_BYTES = 1024 * 1024
# a browser reads the first only
CHALLENGE = {"www-authenticate": 'Basic realm="worker-orcd", Bearer realm="worker-orcd"'}
_KEY = re.compile(r"[!-~]+")  # what a header can carry without doubt
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ApiKeys:
    """The keys of this worker. False when there are none: then everybody may ask, and all are one tenant."""

    def __init__(self, named: list[tuple[str, str]]) -> None:
        """`named` holds tenant and key; a key without a name is a tenant of its own."""
        self._tenants: dict[bytes, str] = {}
        for name, key in named:
            digest = _digest(key)
            self._tenants[digest] = name or f"key-{digest.hex()[:12]}"

    @classmethod
    def of(cls, config: WorkerConfig) -> ApiKeys:
        """The keys that are configured. Raises StartFailed when the file cannot be read or holds something else."""
        named = [("", config.api_key)] if config.api_key else []
        if config.api_key_file is not None:
            named += _read(config.api_key_file)
        return cls(named)

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, headers: Headers) -> str:
        """In whose name the request is made. Raises Unauthorized, always the same one."""
        if not self._tenants:
            return ""
        tenant = ""
        for credential in _credentials(headers):
            digest = _digest(credential)
            for known, name in self._tenants.items():  # all of them, whichever it is
                if hmac.compare_digest(known, digest):
                    tenant = name
        if not tenant:
            raise Unauthorized("a valid API key is needed, as `Authorization: Bearer KEY` or as `x-api-key: KEY`")
        return tenant


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _credentials(headers: Headers) -> Iterator[str]:
    yield from headers.getlist("x-api-key")
    for value in headers.getlist("authorization"):
        scheme, _, credential = value.partition(" ")
        if scheme.lower() == "bearer":
            yield credential.strip()
        elif scheme.lower() == "basic":
            yield _password(credential)


def _password(credential: str) -> str:
    """Of `user:password` in base64; empty when it is something else."""
    try:
        return base64.b64decode(credential, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _read(path: Path) -> list[tuple[str, str]]:
    """Tenant and key of each line `KEY` or `name:KEY`; empty lines and those that begin with # do not count."""
    if not path.is_file():
        raise StartFailed(f"api_key_file {path} is not a regular file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StartFailed(f"api_key_file {path}: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise StartFailed(f"api_key_file {path} is larger than {MAX_FILE_BYTES} bytes")
    named = []
    for number, line in enumerate(raw.decode("latin-1").splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            name, colon, key = text.partition(":") if ":" in text else ("", "", text)
            if not _KEY.fullmatch(key) or (colon and not _NAME.fullmatch(name)):
                raise StartFailed(
                    f"api_key_file {path}, line {number}: a key of printable ASCII without spaces is needed, alone "
                    "or after a name of letters, digits, '-', '_' and '.' and a colon"
                )
            named.append((name, key))
    if not named:
        raise StartFailed(f"api_key_file {path} holds no key")
    if len({key for _, key in named}) < len(named):
        raise StartFailed(f"api_key_file {path} holds a key twice")
    return named
