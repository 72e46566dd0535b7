"""Random models: what is in them, that they can run, and that writing a large one takes little memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from worker_orcd.assemble import draw_up
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.types import GgmlType
from worker_orcd.models.spec import FAMILIES
from worker_orcd.quant.format import FORMATS
from worker_orcd.synthetic import MODELS, QUANTS, _random_blocks, parse_name, write_header, write_synthetic

BLOCKS = [GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K,
          GgmlType.MXFP4]  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_have_the_deviation_they_should_and_none_is_empty(kind: GgmlType) -> None:
    raw = _random_blocks(np.random.default_rng(1), kind, 2000, 0.02)
    values = FORMATS[kind].dequantize(torch.from_numpy(raw))
    assert values.shape == (2000, kind.block_elems)
    assert torch.isfinite(values).all()
    assert abs(values.mean()) < 0.003  # two's complement has one more below zero
    spread = 2**0.5 if kind == GgmlType.MXFP4 else 1.1  # whose scales are powers of two
    assert 0.02 / spread < values.std() < 0.02 * spread
    assert (values.abs().amax(1) > 0.005).all()


@pytest.mark.parametrize("name", MODELS)
def test_headers_plan_like_whole_files(tmp_path: Path, name: str) -> None:
    shape, path = MODELS[name], tmp_path / "model.gguf"
    for quant in ("Q4_K_M", "MXFP4"):
        assert write_header(path, name, quant) == shape.context
        with GgufFile.open(path) as gguf:
            assert gguf.quant_kind == quant
            assert gguf.tensors["token_embd.weight"].shape == (shape.vocab, shape.hidden)
        assert path.stat().st_blocks * 512 < 2**20, "it takes no room"
        if shape.arch in FAMILIES:
            draw_up(WorkerConfig(model=path, context_length=512)).gguf.close()


def test_published_sizes(tmp_path: Path) -> None:
    """Within a per cent of the files people download (their vocabularies and merges are not here)."""
    path, sizes = tmp_path / "model.gguf", {"llama-3.1-8b": 4.92e9, "qwen2.5-7b": 4.68e9, "mistral-7b": 4.37e9}
    for name, size in sizes.items():
        write_header(path, name, "Q4_K_M")
        assert abs(path.stat().st_size / size - 1) < 0.01, name
    write_header(path, "gpt-oss-20b", "MXFP4")
    assert abs(path.stat().st_size / 12.1e9 - 1) < 0.01


def test_bytes_are_those_of_the_name_and_the_seed(tmp_path: Path) -> None:
    def digest(seed: int) -> str:
        path = tmp_path / f"{seed}.gguf"
        write_synthetic(path, "gpt2", "Q4_0", layers=1, seed=seed)
        with GgufFile.open(path) as gguf:
            norm = np.frombuffer(gguf.read("output_norm.weight"), np.float32)
            assert 0.9 < norm.mean() < 1.1
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert digest(0) == digest(0) != digest(1)


def test_writing_takes_little_memory_and_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    tracemalloc.start()
    write_synthetic(
        tmp_path / "m.gguf", "qwen2.5-0.5b", "Q8_0", layers=1, on_bytes=lambda *bytes_: told.append(bytes_)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "m.gguf").stat().st_size
    assert size > 150e6
    assert peak < 60e6
    assert told[-1][0] == told[-1][1]
    assert size - 10e6 < told[-1][1] < size
    assert told == sorted(told)


def test_names() -> None:
    assert parse_name("Llama-3.1-8B:q4_k_m") == ("llama-3.1-8b", "Q4_K_M")
    for wrong in ("llama-3.1-8b", "llama:Q4_K_M", "gpt2:Q3_K", ""):
        with pytest.raises(InvalidRequest, match=r"gpt-oss-20b.*Q4_K_M"):
            parse_name(wrong)
    assert len(QUANTS) == 8
