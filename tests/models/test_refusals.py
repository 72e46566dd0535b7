"""Model files that must be refused: one error that names what is wrong, before a byte of a tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from worker_orcd.assemble import draw_up, load_runtime
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf

Edit = Callable[[tiny.Tiny], object]


def setting(key: str, value: object) -> Edit:
    return lambda model: model.metadata.__setitem__(key, value)


def without(*names: str) -> Edit:
    return lambda model: [model.tensors.pop(name) for name in names]


def reshaped(name: str, shape: tuple[int, ...]) -> Edit:
    return lambda model: model.tensors.__setitem__(name, np.zeros(shape, np.float32))


CASES: dict[str, tuple[Edit, str]] = {
    "unknown architecture": (setting("general.architecture", "mamba9"), "'mamba9'.* gemma2, .* llama, .* qwen3"),
    "heads by layer": (setting("qwen2.attention.head_count_kv", [2, 1]), "head_count_kv differs from layer to layer"),
    "no layers": (setting("qwen2.block_count", 0), "qwen2.block_count"),
    "too many layers": (setting("qwen2.block_count", 2**31), "qwen2.block_count"),
    "heads no multiple": (setting("qwen2.attention.head_count_kv", 3), "4 heads are no multiple of 3"),
    "odd head": (setting("qwen2.attention.key_length", 23), "head size 23 is odd"),
    "values unlike keys": (setting("qwen2.attention.value_length", 12), "value_length"),
    "rotates too much": (setting("qwen2.rope.dimension_count", 48), "rope.dimension_count 48 exceeds 24"),
    "odd rotation": (setting("qwen2.rope.dimension_count", 7), "rope.dimension_count 7 is odd"),
    "unknown scaling": (setting("qwen2.rope.scaling.type", "warp"), "rope.scaling.type is 'warp'"),
    "epsilon of wrong type": (setting("qwen2.attention.layer_norm_rms_epsilon", "tiny"), "layer_norm_rms_epsilon"),
    "missing key": (lambda m: m.metadata.pop("qwen2.embedding_length"), "qwen2.embedding_length"),
    "no embedding": (without("token_embd.weight"), "token_embd.weight is missing"),
    "missing tensors": (
        without("blk.1.attn_norm.weight", "blk.0.ffn_down.weight"),
        "missing tensors: blk.0.ffn_down.weight, blk.1.attn_norm.weight",
    ),
    "missing biases": (without("blk.0.attn_q.bias"), "missing tensors: blk.0.attn_q.bias"),
    "left over": (reshaped("blk.7.extra.weight", (4, 4)), "does not use: blk.7.extra.weight"),
    "wrong shape": (
        reshaped("blk.1.ffn_up.weight", (160, 95)),
        r"blk.1.ffn_up.weight is \[160, 95\], needs \[160, 96\]",
    ),
    "embedding of wrong width": (reshaped("token_embd.weight", (321, 64)), "embedding_length is 96"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    edit, reason = CASES[case]
    model = tiny.build("qwen2")
    edit(model)
    path = model.write(tmp_path / "bad.gguf")
    with pytest.raises(ModelLoadFailed, match=reason):
        draw_up(WorkerConfig(model=path))


def test_all_that_is_wrong_with_the_tensors_is_listed_at_once(tmp_path: Path) -> None:
    model = tiny.build("qwen2")
    for edit in (CASES["missing tensors"][0], CASES["left over"][0], CASES["wrong shape"][0]):
        edit(model)
    with pytest.raises(ModelLoadFailed) as refused:
        draw_up(WorkerConfig(model=model.write(tmp_path / "bad.gguf")))
    for part in ("missing tensors", "does not use", "wrong shapes"):
        assert part in refused.value.message


def test_a_type_without_a_format_is_named(tmp_path: Path) -> None:
    model = tiny.build("qwen2")
    rows = [(n, a.shape, GgmlType.F32, a) for n, a in model.tensors.items() if n != "output_norm.weight"]
    path = tmp_path / "bad.gguf"
    write_gguf(path, model.metadata, [*rows, ("output_norm.weight", (96,), GgmlType.I16, np.zeros(96, np.int16))])
    config = WorkerConfig(model=path, device="cpu")
    with pytest.raises(ModelLoadFailed, match="I16"):
        load_runtime(config, draw_up(config), lambda *_: None)


def test_a_file_cut_while_loading_is_a_load_error(tmp_path: Path) -> None:
    path = tiny.build("qwen2").write(tmp_path / "cut.gguf")
    config = WorkerConfig(model=path, device="cpu", load_chunk_bytes=1024)

    def cut(percent: int, *_: int) -> None:
        if percent == 50:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)

    with pytest.raises(ModelLoadFailed, match=r"cut\.gguf"):
        load_runtime(config, draw_up(config), cut)


@pytest.mark.parametrize("chunk", [1024, 4097, 2**20])
def test_progress_is_told_five_times_whatever_the_chunk(tmp_path: Path, chunk: int) -> None:
    path = tiny.build("qwen2").write(tmp_path / "model.gguf")
    config = WorkerConfig(model=path, device="cpu", load_chunk_bytes=chunk)
    told: list[tuple[int, int, int]] = []
    blueprint = draw_up(config)
    load_runtime(config, blueprint, lambda *step: told.append(step))
    assert [percent for percent, _, _ in told] == [0, 25, 50, 75, 100]
    total = sum(info.nbytes for info in blueprint.gguf.tensors.values())
    assert told[-1] == (100, total, total)
    assert all(done * 100 >= percent * total for percent, done, _ in told)
