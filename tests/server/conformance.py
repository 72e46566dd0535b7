"""docs/openapi.json, and a fuzzer that follows it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "openapi.json"


def generator() -> ModuleType:
    """docs/make_openapi.py."""
    spec = importlib.util.spec_from_file_location("make_openapi", ROOT / "docs" / "make_openapi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def operations() -> dict[str, Any]:
    """The operations of the document by method and path; not /shutdown, which would end the worker under test."""
    schema = schemathesis.openapi.from_dict(json.loads(FILE.read_text()))
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{one.method.upper()} {one.path}": one for one in found if one.path != "/shutdown"}


def fuzz(operation: Any, port: int, num_cases: int, is_random: bool = False) -> Counter[int]:
    """Statuses of the answers. Fails on a 5xx, and on a 2xx that is not what the document says."""
    statuses: Counter[int] = Counter()
    with requests.Session() as session:

        @settings(
            max_examples=num_cases,
            deadline=None,
            database=None,
            derandomize=not is_random,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            answer = case.call(base_url=f"http://127.0.0.1:{port}", session=session, timeout=30)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, answer.text[:500]
            if answer.status_code < 300:
                described = operation.definition.raw["responses"][str(answer.status_code)]["content"]
                assert answer.headers["content-type"][0].split(";")[0] in described
            else:
                assert answer.json()["error"]["message"]

        run()
    return statuses
