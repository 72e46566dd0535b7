"""docs/openapi.json is what the code says, describes every route, and no request it can describe is a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.routing import Route

from tests.fakes import UserTemplate
from tests.server.client import Live, live, make_rig
from tests.server.conformance import FILE, fuzz, generator, operations

OPERATIONS = operations()
SLOW = ("messages", "chat", "template", "responses")  # to generate bodies for


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(template=UserTemplate()) as running:
        yield running


def test_the_file_is_current() -> None:
    assert FILE.read_text() == generator().text(), "run `python docs/make_openapi.py`"


def test_every_route_is_described_and_nothing_else() -> None:
    module = generator()
    routes = [route for route in make_rig().app.routes if isinstance(route, Route)]
    methods = {
        (method.lower(), route.path.replace(":path", "")) for route in routes for method in route.methods or ()
    }
    here = {(method, path) for method, path in methods if path not in module.PATHS_OF_PAGE and method != "head"}
    assert {(operation.method, operation.path) for operation in module.OPERATIONS} == here


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_request_is_a_server_error(name: str, server: Live) -> None:
    statuses = fuzz(OPERATIONS[name], server.port, num_cases=8 if any(word in name for word in SLOW) else 40)
    assert statuses
    if "/execute" in name or "chat" in name or name.startswith("GET /health"):
        assert statuses[200], statuses


def test_shutdown_takes_any_body() -> None:
    rig = make_rig()
    for body in (b"", b"{}", b'{"force": true, "x": [1, null]}'):
        assert rig.call("POST", "/shutdown", body).status == 202
    for body in (b"[]", b"\xff", b"{"):
        assert rig.call("POST", "/shutdown", body).status == 400
