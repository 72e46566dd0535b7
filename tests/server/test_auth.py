"""API keys, tenants, and what a worker that others can reach asks for."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shlex
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from starlette.routing import Route

from tests.fakes import ScriptedEngine, forever
from tests.server.client import Rig, eventually, live, make_rig
from worker_orcd import cli
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import StartFailed, WorkerError
from worker_orcd.server.auth import ApiKeys
from worker_orcd.server.run import bind, tls_context
from worker_orcd.signals import StopRequest

ALICE, BOB, NOBODY = "alice-secret-key", "bob-secret-key", "nameless-secret-key"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# people\nalice:{ALICE}\n\n bob:{BOB} \n{NOBODY}\n")
    return file


@pytest.fixture(scope="module")
def rig(key_file: Path) -> Rig:
    return make_rig(api_key_file=key_file)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"user:{key}".encode()).decode()}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("wrong"),
        bearer(ALICE[:-1]),
        bearer(ALICE + "x"),
        bearer(f"alice:{ALICE}"),
        {"authorization": ALICE},
        {"authorization": f"Token {ALICE}"},
        {"authorization": "Basic !!"},
        basic("wrong"),
        {"x-api-key": ""},
        {"x-api-key": "é"},
        {"cookie": f"key={ALICE}"},
    ],
)
def test_without_a_key_there_is_one_answer_only(rig: Rig, headers: dict[str, str]) -> None:
    answer = rig.call("POST", "/execute", {"job_id": "a", "prompt": "hi"}, headers)
    assert (answer.status, answer.error["code"], answer.error["retriable"]) == (401, "UNAUTHORIZED", False)
    assert answer.headers["www-authenticate"].startswith("Basic "), "the first is the one that browsers answer"
    bare = rig.call("POST", "/execute", b"", {"x-correlation-id": "same"})
    again = rig.call("POST", "/execute", b"", headers | {"x-correlation-id": "same"})
    assert again.body == bare.body
    assert rig.engine.requests == []


@pytest.mark.parametrize(
    "headers", [bearer(ALICE), {"authorization": f"bearer  {BOB}"}, {"x-api-key": ALICE}, basic(BOB)]
)
def test_a_key_opens_every_route(rig: Rig, headers: dict[str, str]) -> None:
    assert rig.call("GET", "/ready", headers=headers).status == 200
    assert rig.call("GET", "/nowhere", headers=headers).status == 404


def test_every_route_but_liveness_needs_one(rig: Rig) -> None:
    """Also those that do not exist, and the other ways to spell those that do."""
    routes = [route for route in rig.app.routes if isinstance(route, Route)]
    paths = {route.path.replace("{id}", "x") for route in routes} | {"/nowhere", "/docs", "/openapi.json"}
    paths |= {"/health/", "//health", "/HEALTH", "/health/../execute", "/execute/../health", "/health;", "/"}
    assert {"/execute", "/metrics", "/shutdown"} <= paths
    for path in sorted(paths):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            status = rig.call(method, path).status
            is_open = path == "/health" and method in ("GET", "HEAD")
            assert status == (200 if is_open else 401), (method, path)


def test_liveness_tells_strangers_no_more_than_that(rig: Rig) -> None:
    for headers in ({}, bearer("wrong")):
        assert rig.call("GET", "/health", headers=headers).json == {"status": "healthy", "state": "ready"}
    assert rig.call("GET", "/health", headers=bearer(ALICE)).json["model"] == "scripted"
    assert "model" in make_rig().call("GET", "/health").json  # without keys nobody is a stranger


def test_the_tenant_is_the_name_of_the_key(key_file: Path) -> None:
    rig = make_rig(api_key_file=key_file, api_key="one-more")
    for i, key in enumerate((ALICE, BOB, NOBODY, "one-more")):
        answer = rig.execute(bearer(key), job_id=f"j{i}", tenant="alice", user="alice")
        assert answer.status == 200
    alice, bob, nameless, other = (request.tenant for request in rig.engine.requests)
    assert (alice, bob) == ("alice", "bob")
    assert nameless.startswith("key-")
    assert other.startswith("key-")
    assert nameless != other
    assert NOBODY not in nameless
    assert make_rig().execute().status == 200


def test_tenants_do_not_see_each_others_jobs(key_file: Path) -> None:
    engine = ScriptedEngine(lambda _: forever())
    with live(engine, api_key_file=key_file) as server:

        def ask(key: str, path: str, body: object) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("POST", path, json.dumps(body), bearer(key))
            return connection.getresponse()

        stream = ask(ALICE, "/execute", {"job_id": "same", "prompt": "x"})
        assert stream.status == 200
        assert ask(ALICE, "/execute", {"job_id": "same", "prompt": "x"}).status == 409
        assert ask(BOB, "/cancel", {"job_id": "same"}).status == 202
        assert stream.readline()
        assert engine.cancelled == []
        assert ask(ALICE, "/cancel", {"job_id": "same"}).status == 202
        eventually(lambda: engine.cancelled == ["same"])
        assert ask(ALICE, "/shutdown", {}).status == 202


def test_keys_show_nowhere(key_file: Path) -> None:
    rig = make_rig(api_key_file=key_file, api_key="environment-secret")
    shown = [repr(WorkerConfig(api_key="environment-secret"))]
    for key in (ALICE, BOB, "environment-secret", "wrong-secret"):
        for path in ("/execute", "/health", "/nowhere", "/metrics"):
            answer = rig.call("POST", path, {"prompt": 1}, bearer(key))
            shown += [repr(answer), rig.call("GET", path, headers={"x-api-key": key}).body.decode()]
    assert "secret" not in "".join(shown) + rig.log.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("good-key\ntwo words\n", "line 2"),
        ("clé\n", "line 1"),
        ("na me:key\n", "line 1"),
        (":key\n", "line 1"),
        ("name:\n", "line 1"),
        ("a:same\nb:same\n", "twice"),
        ("x" * (2**20 + 1), "larger"),
    ],
)
def test_bad_key_files_are_refused_without_showing_them(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(StartFailed, match=reason) as caught:
        ApiKeys.of(WorkerConfig(api_key_file=file))
    assert "same" not in caught.value.message
    assert "words" not in caught.value.message


def test_a_key_file_must_be_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(StartFailed, match="not a regular file"):
            ApiKeys.of(WorkerConfig(api_key_file=path))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"host": "0.0.0.0"}, "LLORCH_API_KEY"),
        ({"host": "::"}, "LLORCH_API_KEY"),
        ({"host": "example.org", "api_key": ""}, "LLORCH_API_KEY"),
        ({"api_key": "two words"}, "printable ASCII"),
        ({"api_key": "line\n"}, "printable ASCII"),
        ({"tls_cert_file": Path("c")}, "go together"),
        ({"tls_key_file": Path("k")}, "go together"),
    ],
)
def test_exposure_without_protection_is_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(StartFailed, match=reason) as caught:
        WorkerConfig(**values)  # type: ignore[arg-type]
    assert "two words" not in caught.value.message


def test_where_others_can_reach_the_worker_any_host_name_and_its_own_origin_will_do() -> None:
    rig = make_rig(host="0.0.0.0", api_key="k")
    key = bearer("k")
    assert rig.call("GET", "/ready", headers=key | {"host": "gpu.example:8080"}).status == 200
    assert rig.call("GET", "/ready", headers={"host": "gpu.example:8080"}).status == 401
    same = {"host": "gpu.example:8080", "origin": "https://GPU.example:8080"}
    assert rig.call("GET", "/ready", headers=key | same).status == 200
    for origin in ("https://evil.example", "null", "http://localhost", "https://gpu.example"):
        answer = rig.call("GET", "/ready", headers=key | {"host": "gpu.example:8080", "origin": origin})
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
    local = make_rig(api_key="k")
    assert local.call("GET", "/ready", headers=key | {"host": "gpu.example"}).status == 421


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost -keyout {shlex.quote(str(key))} -out {shlex.quote(str(cert))}",
        shell=True,
        check=True,
        capture_output=True,
    )
    return cert, key


def test_tls_streams_an_answer(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    config = WorkerConfig(tls_cert_file=cert, tls_key_file=key)
    with live(tls=tls_context(config)) as server:
        trust = ssl.create_default_context(cafile=str(cert))
        peer = http.client.HTTPSConnection("localhost", server.port, context=trust, timeout=10)
        peer.request("POST", "/execute", json.dumps({"job_id": "a", "prompt": "over TLS"}))
        answer = peer.getresponse()
        assert answer.status == 200
        assert b"event: end" in answer.read()
        peer.request("POST", "/shutdown", "{}", {"Connection": "close"})
        assert peer.getresponse().status == 202
        peer.close()
        server.thread.join(10)
    with pytest.raises(StartFailed, match="cannot be used"):
        tls_context(WorkerConfig(tls_cert_file=cert, tls_key_file=cert))
    with pytest.raises(StartFailed, match="No such file"):
        tls_context(WorkerConfig(tls_cert_file=cert, tls_key_file=cert.parent / "missing"))


@pytest.mark.parametrize(
    ("flags", "key", "reason"),
    [
        (["--host", "0.0.0.0"], None, "set LLORCH_API_KEY or pass --api-key-file"),
        (["--host", "0.0.0.0"], "", "set LLORCH_API_KEY or pass --api-key-file"),
        (["--api-key-file", "KEYS"], None, "line 1"),
        (["--tls-cert-file", "KEYS", "--tls-key-file", "KEYS"], None, "cannot be used"),
        (["--host", "0.0.0.0"], "k", "none.gguf"),
    ],
)
def test_the_command_refuses_at_once_and_names_the_remedy(
    flags: list[str], key: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is even looked for."""
    unheard = StopRequest()  # entered, it would leave this process deaf to signals
    monkeypatch.setattr(cli, "StopRequest", lambda: contextlib.nullcontext(unheard))
    (tmp_path / "keys").write_text("two words\n")
    for name in [name for name in os.environ if name.startswith("LLORCH_")]:
        monkeypatch.delenv(name)
    if key is not None:
        monkeypatch.setenv("LLORCH_API_KEY", key)
    flags = [flag.replace("KEYS", str(tmp_path / "keys")) for flag in flags]
    with bind("127.0.0.1", 0) as probe:
        port = str(probe.getsockname()[1])
    arguments = ["serve", "--model", str(tmp_path / "none.gguf"), "--port", port, *flags]
    with pytest.raises(WorkerError, match=reason):
        cli.app.meta(arguments, exit_on_error=False, result_action="return_value")
