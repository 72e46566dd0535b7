"""`pull` against a hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker_orcd.commands.pull import HOSTS, PullFailed, RemoteFile, check_host, choose
from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One repository, acme/tiny. `cut` ends a download after so many bytes, once; `elsewhere` is a redirect."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.digests = files, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.cut = 0
        self.elsewhere = ""
        self.ranges: list[str | None] = []
        self.tokens: list[str | None] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.tokens.append(self.headers["authorization"])
        if self.path.startswith("/api/models/acme/tiny"):
            siblings = [
                {"rfilename": name, "size": len(data), "lfs": {"sha256": self.hub.digests[name], "size": len(data),
                 "pointerSize": 130}} for name, data in self.hub.files.items()
            ]  # fmt: skip
            self._answer(200, json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith(f"/acme/tiny/resolve/{COMMIT}/"):
            self._file(self.path.rpartition(f"{COMMIT}/")[2])
        else:
            self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        data, told = self.hub.files[name], self.headers["range"]
        start = int(told.removeprefix("bytes=").rstrip("-")) if told else 0
        headers = {"ETag": f'"{self.hub.digests[name]}"', "X-Repo-Commit": COMMIT}
        if self.hub.elsewhere:  # as the real one does it
            linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(data))}
            self._answer(302, b"", headers | linked | {"Location": self.hub.elsewhere})
            return
        if told:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.ranges.append(told)
        self._answer(206 if told else 200, data[start:], headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if 0 < self.hub.cut < len(body):
            body, self.hub.cut = body[: self.hub.cut], 0
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    path = tmp_path / "model.gguf"
    weights = ("w", (1024, 3500), GgmlType.F32, bytes(1024 * 3500 * 4))  # more than what the library reads at once
    write_gguf(path, {"general.architecture": "llama", "general.file_type": 15}, [weights])
    data = path.read_bytes()
    running = Hub({"tiny-Q4_K_M.gguf": data, "tiny-Q8_0.gguf": b"no model", "README.md": b"words"})
    yield running
    running.server.shutdown()
    running.server.server_close()


def pull(hub: Hub, source: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """As a user calls it, with a token that belongs to the real hub."""
    command = [sys.executable, "-m", "worker_orcd", "pull", source, "--to", str(folder), "--endpoint", hub.url]
    env = os.environ | {"HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_secret"}
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, env=env)


def test_a_download_that_broke_off_goes_on_and_is_checked(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 12_000_000
    done = pull(hub, "acme/tiny:q4_k_m", tmp_path / "to", "--allow-host", "127.0.0.1")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "to" / "tiny-Q4_K_M.gguf"
    assert done.stdout == f"worker-orcd serve --model {path}\n"
    assert path.read_bytes() == hub.files[path.name]
    assert "Q4_K_M" in done.stderr
    assert hub.ranges == [None, f"bytes={10 * 2**20}-"]
    assert set(hub.tokens) == {None}, "the token of the hub is not for others"
    assert pull(hub, "acme/tiny:tiny-Q4_K_M.gguf", tmp_path / "to", "--allow-host", "127.0.0.1").returncode == 0
    assert len(hub.ranges) == 2, "what is there is not fetched again"


def test_a_file_with_the_wrong_checksum_is_removed(hub: Hub, tmp_path: Path) -> None:
    hub.digests["tiny-Q4_K_M.gguf"] = "0" * 64
    done = pull(hub, "acme/tiny:Q4_K_M", tmp_path, "--allow-host", "127.0.0.1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("PULL_FAILED: ")
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "tiny-Q4_K_M.gguf").exists()


def test_hosts_are_those_of_the_list_even_after_a_redirect(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub, "acme/tiny:Q4_K_M", tmp_path)
    assert done.returncode == 1
    assert "--allow-host 127.0.0.1" in done.stderr
    assert not hub.tokens, "nothing was asked"
    hub.elsewhere = "http://localhost:9/evil.gguf"
    done = pull(hub, "acme/tiny:Q4_K_M", tmp_path, "--allow-host", "127.0.0.1")
    assert done.returncode == 1
    assert "localhost is not on the list" in done.stderr


def test_a_repository_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub, "acme/none:Q4_K_M", tmp_path, "--allow-host", "127.0.0.1")
    assert done.returncode == 1
    assert "acme/none was not found" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("https://huggingface.co/x", True), ("https://cdn-lfs.huggingface.co/x", True), ("https://a.b.hf.co/", True),
        ("http://huggingface.co/x", False), ("https://huggingface.co.evil.org/", False),
        ("https://evilhf.co/", False), ("https://huggingface.co@evil.org/", False),
        ("file:///etc/passwd", False), ("", False), ("foo", False), ("https://[x", False),
        ("https://hf.co:abc", False), ("https://hf.co:99999", False), ("https://hf.co:443", True),
    ],
)  # fmt: skip
def test_which_hosts_are_allowed(url: str, is_allowed: bool) -> None:
    if is_allowed:
        check_host(url, HOSTS)
    else:
        with pytest.raises(PullFailed):
            check_host(url, HOSTS)


NAMES = ["m-Q4_K_M.gguf", "m-Q4_K.gguf", "m-IQ4_K.gguf", "big/m-Q8_0-00002-of-00002.gguf",
         "big/m-Q8_0-00001-of-00002.gguf", "mmproj-F16.gguf", "m-F16.gguf", "../m-Q2_K.gguf"]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]), ("q4_k", ["m-Q4_K.gguf"]), ("m-F16.gguf", ["m-F16.gguf"]),
        ("F16", ["m-F16.gguf"]),
        ("Q8_0", ["big/m-Q8_0-00001-of-00002.gguf", "big/m-Q8_0-00002-of-00002.gguf"]),
        ("m-Q8_0-00001-of-00002.gguf", ["big/m-Q8_0-00001-of-00002.gguf", "big/m-Q8_0-00002-of-00002.gguf"]),
        ("Q2_K", None), ("Q3_K", None), ("m", None), (None, None),
    ],
)  # fmt: skip
def test_which_file_is_meant(what: str | None, names: list[str] | None) -> None:
    files = [RemoteFile(name, 1, None) for name in NAMES]
    if names is None:
        with pytest.raises(InvalidRequest, match="there are: "):
            choose(files, what, "acme/tiny")
    else:
        assert [file.name for file in choose(files, what, "acme/tiny")] == names
