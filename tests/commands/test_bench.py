"""`bench`: the numbers of a small model in this process and of a server over HTTP, and the files they go to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.fakes import ScriptedEngine
from tests.server.client import live
from worker_orcd.commands.bench import run_bench
from worker_orcd.commands.options import BenchOptions
from worker_orcd.commands.plot import draw_charts
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import InvalidRequest
from worker_orcd.synthetic import MODELS, Shape

BENCH = [sys.executable, "-m", "worker_orcd", "bench"]


def bench(folder: Path, *flags: str) -> tuple[str, dict[str, object]]:
    """What it printed and what it wrote."""
    command = [*BENCH, *flags, "--json", str(folder / "out.json"), "--plot", str(folder / "out.svg")]
    env = os.environ | {"XDG_CACHE_HOME": str(folder), "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)
    assert done.returncode == 0, done.stderr
    ET.parse(folder / "out.svg")
    return done.stdout, json.loads((folder / "out.json").read_text())


def check(report: dict[str, object], batches: list[int]) -> None:
    rows = report["rows"]
    assert isinstance(rows, list)
    assert [row["batch"] for row in rows] == batches
    for row in rows:
        assert all(value > 0 for value in row.values())
        assert row["tokens_per_second_each"] == pytest.approx(row["tokens_per_second"] / row["batch"], abs=0.01)
        assert row["token_ms_p99"] >= row["token_ms"]


def test_a_server_over_http(tmp_path: Path) -> None:
    def script(request):  # type: ignore[no-untyped-def]
        assert request.ignore_eos
        return [0.01, *[step for _ in range(request.max_tokens) for step in (ord("x"), 0.002)]]

    engine = ScriptedEngine(script, max_running=8)
    with live(engine) as server:
        url = f"http://127.0.0.1:{server.port}"
        shown, report = bench(tmp_path, "--url", url, "--batches", "1,4", "--prompt-tokens", "100", "--tokens", "6")
    check(report, [1, 4])
    assert "scripted at http://127" in shown
    assert "100 tokens in, 6 out" in shown
    asked = engine.requests[1:]  # the first one finds out how many tokens a word has
    assert len(asked) == 3 * (1 + 4)
    assert {request.max_tokens for request in asked} == {6}
    assert all(70 < len(request.prompt_ids) < 130 for request in asked)
    assert len({tuple(request.prompt_ids) for request in asked}) == len(asked), "no prefix is found in the cache"


def test_a_random_model_is_written_once_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mini = Shape("llama", 2, 64, 128, 4, 2, 16, 300, 512)
    monkeypatch.setitem(MODELS, "mini", mini)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "worker-orcd" / "synthetic" / "mini-Q8_0.gguf"
    options = BenchOptions(
        synthetic="mini:q8_0", batches="1,3", prompt_tokens=8, tokens=4, repeat=1, json=tmp_path / "out.json"
    )
    written = []
    for length in (None, 512):
        assert run_bench(WorkerConfig(device="cpu", context_length=length), options) == 0
        assert ("the context is 13, what is needed, not 512" in capsys.readouterr().err) is (length == 512)
        written.append(file.stat().st_mtime_ns)
        check(json.loads((tmp_path / "out.json").read_text()), [1, 3])
    assert written[0] == written[1]
    with pytest.raises(InvalidRequest, match=r"qwen2\.5-0\.5b"):
        run_bench(WorkerConfig(device="cpu"), BenchOptions(synthetic="nope:Q4_0"))


def test_what_cannot_work_is_refused_before_the_measuring(tmp_path: Path) -> None:
    config = WorkerConfig(device="cpu")
    wrong = BenchOptions(tokens=99999), BenchOptions(json=tmp_path / "no" / "x"), BenchOptions(json=tmp_path)
    for options, reason in zip(wrong, ("this model allows 2048", "cannot write", "cannot write"), strict=True):
        with pytest.raises(InvalidRequest, match=reason):
            run_bench(config, options)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"batches": "1,x"}, "batches"), ({"batches": "0"}, "batches"), ({"tokens": 1}, "tokens"),
        ({"plot": Path("a.png")}, ".svg"), ({"url": "http://a", "synthetic": "b:c"}, "exclude"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(wrong: dict[str, object], part: str) -> None:
    with pytest.raises(InvalidRequest, match=part):
        BenchOptions(**wrong)  # type: ignore[arg-type]


def test_a_drawing_shows_every_value_under_its_name() -> None:
    svg = draw_charts("a <model>", "requests", [1, 2, 4], [("speed", [10.0, 19.0, 30.0]), ("wait", [0.0, 0.0, 0.0])])
    root = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert "a <model>" in [text.text for text in root.iter(f"{space}text")]
    heights = [float(dot.attrib["cy"]) for dot in root.iter(f"{space}circle")]
    assert heights[:3] == sorted(heights[:3], reverse=True), "more is higher"
    assert heights[3] == heights[4] == heights[5]
