"""The main module of the engine's process: `python -m worker_orcd.engine_process ADDRESS`. Started by worker.py."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from worker_orcd.config import WorkerConfig


class Setup(msgspec.Struct, frozen=True):
    """What the API process decides."""

    config: WorkerConfig
    eog_ids: list[int]
    unsampleable: list[int]  # token ids that must never be generated

    def encode(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=_bytes_of)

    @classmethod
    def decode(cls, line: bytes) -> Setup:
        return msgspec.json.decode(line, type=cls, dec_hook=_path)


def _bytes_of(path: Path) -> str:
    """A path is bytes, not text: one character for each."""
    return os.fsencode(path).decode("latin-1")


def _path(kind: type, value: str) -> Path:
    assert kind is Path
    return Path(os.fsdecode(value.encode("latin-1")))


def main() -> int:
    """Load, say so, serve; returns the exit status."""
    from worker_orcd.engine.loop import Broken
    from worker_orcd.engine.process import FATAL_EXIT, EngineHost

    host = EngineHost(sys.argv[1])
    try:
        core, inspect = _load(host)
    except Exception as error:
        host.tell(Broken.by(error))
        host.end()
        return FATAL_EXIT
    return host.serve(core, inspect)


def _load(host: Any) -> Any:
    """The engine of a Setup that is still to come, and what looks after its memory.

    Torch is imported while the API process prepares the setup. All objects it makes stay, so nobody looks for garbage
    among them, now or before serving.
    """
    gc.disable()
    import torch  # noqa: F401

    gc.freeze()
    gc.enable()

    from worker_orcd.assemble import build_core, draw_up, load_runtime
    from worker_orcd.engine.process import Progress

    setup = Setup.decode(host.setup())
    blueprint = draw_up(setup.config)
    runtime = load_runtime(setup.config, blueprint, lambda *done: host.tell(Progress(*done)))
    core, facts = build_core(setup.config, blueprint, runtime, frozenset(setup.eog_ids), setup.unsampleable)
    blueprint.gguf.close()
    host.tell(facts)
    return core, runtime.inspect


if __name__ == "__main__":
    sys.exit(main())
