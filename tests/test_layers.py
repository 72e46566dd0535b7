"""The import rule: a module imports its own folder and lower layers only; importing has no effect, needs no GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import worker_orcd

ROOT = Path(worker_orcd.__file__).parent
LAYERS = [
    {"errors", "config", "narration", "signals"},
    {"gguf", "quant"},
    {"kernels"},
    {"backends"},
    {"models", "kv", "vram", "tokenizer"},
    {"engine"},
    {"server"},
    {"assemble", "cli", "worker", "engine_process", "commands", "synthetic", "reports", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
THIRD_PARTY = {  # folder → what its modules may import from outside, beside the standard library
    "errors": set(),
    "narration": {"msgspec"},
    "signals": set(),
    "config": {"cyclopts"},
    "gguf": {"numpy"},
    "kv": {"torch"},
    "engine": {"torch", "numpy", "msgspec", "zmq", "prometheus_client", "llguidance"},
    "tokenizer": {"tokenizers", "jinja2", "msgspec", "numpy"},
    "server": {"starlette", "uvicorn", "msgspec", "httptools", "uvloop"},
}
NEIGHBOURS = {("config", "errors"), ("quant", "gguf")}  # the only imports within a layer
SEAM_ONLY = {("server", "engine"): {"worker_orcd.engine.request", "worker_orcd.engine.metrics"}}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names += [f"{base}.{alias.name}" for alias in node.names] if base == "worker_orcd" else [base]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    mine = part(path)
    if mine == "__init__":
        assert imports(path) in ([], ["__future__"])
        return
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "worker_orcd":
            theirs = rest[0]
            if theirs in (mine, "__version__"):
                continue
            lower = RANK[theirs] < RANK[mine] or (mine, theirs) in NEIGHBOURS or RANK[mine] == len(LAYERS) - 1
            assert lower, f"{mine} (layer {RANK[mine]}) imports {name} (layer {RANK[theirs]})"
            assert theirs != "kernels" or path.name in ("cuda.py", "doctor.py")  # which looks at compiler and cache
            seam = SEAM_ONLY.get((mine, theirs))
            assert seam is None or name in seam, f"{mine} may see of {theirs} only {seam}, not {name}"
        elif top not in sys.stdlib_module_names and mine in THIRD_PARTY:
            assert top in THIRD_PARTY[mine], f"{mine} imports {top}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_rebinds_globals_or_runs_code(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), "a `global` statement"
    if path.name == "__main__.py":
        return
    loose = [n for n in tree.body if isinstance(n, ast.Expr) and not isinstance(n.value, ast.Constant)]
    assert not loose, f"line {loose[0].lineno} runs at import" if loose else ""


TORCH_IN_ENGINE = {
    f"{name}.py" for name in ["filters", "graphs", "logprobs", "pack", "plain_step", "runtime", "sampler", "score"]
}


def test_scheduling_and_the_way_between_processes_know_no_torch() -> None:
    with_torch = {path.name for path in (ROOT / "engine").glob("*.py") if "torch" in imports(path)}
    assert with_torch == TORCH_IN_ENGINE
    assert {path.name for path in (ROOT / "kv").glob("*.py") if "torch" in imports(path)} == {"pool.py"}


QUICK = ["cli", "reports", "gguf.reader", "tokenizer.load", "server.app", "engine.request", "narration", "vram.plan"]
QUICK += ["commands.chat", "commands.bench", "commands.pull", "commands.doctor", "commands.haiku", "synthetic"]
QUICK += ["assemble", "worker", "engine.client", "engine.process", "engine.metrics"]  # the API process: all of it


@pytest.mark.parametrize("module", QUICK)
def test_what_must_be_quick_does_not_import_torch(module: str) -> None:
    code = f"import sys, worker_orcd.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
