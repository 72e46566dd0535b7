"""Running a model file in tests without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from worker_orcd.assemble import build_core, draw_up, load_runtime
from worker_orcd.backends.batch import Batch, token_ids
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.engine import BatchEngine
from worker_orcd.engine.metrics import NoOpMetrics
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.score import score

EOS = 2  # of the tiny models


def runtime_of(path: Path, **settings: Any) -> Runtime:
    config = WorkerConfig(model=path, **({"device": "cpu"} | settings))
    return load_runtime(config, draw_up(config), lambda *_: None)


def last_tokens(batch: Batch) -> Tensor:
    """The token of each row whose logits are wanted."""
    tokens = token_ids(batch.tokens, batch.sampled)
    return tokens if batch.sample_rows is None else tokens[batch.sample_rows]


def all_logits(path: Path, ids: list[int], chunk: int = 128) -> Tensor:
    """float32 [len(ids), vocab], computed `chunk` tokens a step."""
    return score(runtime_of(path), ids, chunk)


def engine_of(path: Path, max_queue: int = 128, **settings: Any) -> BatchEngine:
    """An engine on a thread of this process; id 0 is never generated."""
    config = WorkerConfig(model=path, **({"device": "cpu"} | settings))
    blueprint = draw_up(config)
    runtime = load_runtime(config, blueprint, lambda *_: None)
    core, facts = build_core(config, blueprint, runtime, frozenset({EOS}), [0])
    return BatchEngine(core, facts, max_queue, NoOpMetrics())
