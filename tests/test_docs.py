"""What docs/ and deploy/ say of the code is so: metrics, error codes, flags."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import ScriptedEngine
from tests.server.client import live
from worker_orcd import errors
from worker_orcd.assemble import STEP_TOKENS
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.metrics import PrometheusMetrics
from worker_orcd.engine.request import SAMPLER_ORDER, EngineStatus

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy").iterdir())]
OTHERS_FLAGS = {"--gpus", "--tmpfs", "--read-only", "--cap-drop", "--no-cache-dir", "--no-install-recommends"}
ROW = re.compile(r"^\| (`worker_[^|]*) \| (\w+) \|", re.MULTILINE)


def exported() -> dict[str, str]:
    """Name on the page, as a query would use it, to type."""
    status = EngineStatus(True, True, "", True, 0, 0, 0, 8, 0, 0, 1, {"weights": 1})
    page = PrometheusMetrics("w", "F32").render(status).decode()
    suffix = {"counter": "_total"}
    kinds = {family.name: family.type for family in text_string_to_metric_families(page)}
    return {n + ("" if n == "worker_uptime_seconds" else suffix.get(kind, "")): kind for n, kind in kinds.items()}


def test_every_metric_is_in_the_table_and_nothing_else() -> None:
    rows = ROW.findall((ROOT / "docs" / "operations.md").read_text())
    table = {name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}
    assert table == exported()


def test_the_dashboard_asks_for_what_there_is() -> None:
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    kinds = exported()
    parts = {
        name + part for name, kind in kinds.items() if kind == "histogram" for part in ("_bucket", "_sum", "_count")
    }
    used = {name for query in queries for name in re.findall(r"worker_(?!id\b)\w+", query)}
    assert used <= parts | {name for name, kind in kinds.items() if kind != "histogram"}
    shown = {re.sub("_(bucket|sum|count)$", "", name) if name in parts else name for name in used}
    assert shown == set(kinds), "every metric has its place on the dashboard"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def kinds_of(error: type[errors.WorkerError]) -> list[type[errors.WorkerError]]:
    return [error, *(kind for below in error.__subclasses__() for kind in kinds_of(below))]


def test_every_error_code_is_in_the_table_with_its_status() -> None:
    section = (ROOT / "docs" / "api.md").read_text().split("## Errors", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| ([A-Z_, ]+) \| ([^|]+) \|", section, re.MULTILINE)
    table = {code: status for codes, status in rows for code in codes.split(", ")}
    ours = [kind for kind in kinds_of(errors.WorkerError) if kind.__module__ == errors.__name__]
    assert set(table) == {kind.code for kind in ours}
    for kind in ours:
        told = table[kind.code]
        assert told in ("(stream)", "exit 1") or str(kind.http_status) in told, kind


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_flags_and_variables_exist(path: Path) -> None:
    text = path.read_text()
    settings = {field.name for field in dataclasses.fields(WorkerConfig)}
    variables = set(re.findall(r"\bLLORCH_([A-Z_]+)\b", text)) - {"CONFIG"}
    assert {name.lower() for name in variables} <= settings
    if path.name in ("README.md", "operations.md", "api.md", "commands.md"):
        commands = [ROOT / "src/worker_orcd/cli.py", *(ROOT / "src/worker_orcd/commands").glob("*.py")]
        declared = {name for file in commands for name in re.findall(r"^ +(\w+): Annotated", file.read_text(), re.M)}
        flags = {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z][a-z-]+", text)} - OTHERS_FLAGS
        assert {flag[2:].replace("-", "_") for flag in flags} <= settings | declared | {"config", "help"}


def test_defaults_that_only_the_code_chooses_are_told() -> None:
    told = get_type_hints(WorkerConfig, include_extras=True)["max_tokens_per_step"].__metadata__[-1].help
    tuning = (ROOT / "docs" / "operations.md").read_text().split("## Tuning", 1)[1]
    for steps in STEP_TOKENS.values():
        assert str(steps) in told
        assert str(steps) in tuning


def test_the_routes_in_the_tables_of_the_dialects_are_served() -> None:
    text = (ROOT / "docs" / "openai.md").read_text()
    served = set(json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"])
    routes = {
        path for row in re.findall(r"^\| `(?:POST|GET) .*?\|", text, re.M) for path in re.findall(r"/[\w/{}-]+", row)
    }
    assert routes <= served
    assert all(path in text for path in served if path.startswith("/v1/") and not path.startswith("/v1/requests"))
    assert ", ".join(f"`{name}`" for name in SAMPLER_ORDER) in " ".join(text.split())


def test_the_unit_and_the_image_start_the_command() -> None:
    unit = (ROOT / "deploy" / "worker-orcd.service").read_text()
    assert "/bin/worker-orcd serve --config " in unit
    timeout_s = int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0])
    assert timeout_s > WorkerConfig().shutdown_timeout_sec + 5
    image = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "USER 10001" in image
    assert 'ENTRYPOINT ["/opt/worker-orcd/bin/worker-orcd"]' in image
    check = re.findall(r"^HEALTHCHECK .* CMD (.*)$", image.replace("\\\n", ""), re.MULTILINE)[0]
    with live(ScriptedEngine(lambda _: [])) as server:
        for port, status in ((server.port, 0), (9, 1)):
            env = os.environ | {"LLORCH_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
            done = subprocess.run([sys.executable, *json.loads(check)[1:]], env=env, capture_output=True, timeout=30)
            assert done.returncode == status, done.stderr
    for source in re.findall(r"^COPY (?!--)(.*) \S+$", image, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
