"""Running a model file in tests without a server."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from worker_orcd.assemble import draw_up, load_runtime
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.score import score


def runtime_of(path: Path) -> Runtime:
    config = WorkerConfig(model=path, device="cpu")
    return load_runtime(config, draw_up(config), lambda *_: None)


def all_logits(path: Path, ids: list[int], chunk: int = 128) -> Tensor:
    """float32 [len(ids), vocab], computed `chunk` tokens a step."""
    return score(runtime_of(path), ids, chunk)
