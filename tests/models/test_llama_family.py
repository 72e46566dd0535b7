"""The Llama family against transformers: the same random weights, logits to 1e-4 relative."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.running import all_logits

LENGTHS = (1, 7, 64, 300)


@pytest.mark.parametrize("case", tiny.configs())
def test_logits_agree_with_transformers(case: str, tmp_path: Path) -> None:
    model = tiny.build(case)
    path = model.write(tmp_path / "model.gguf")
    generator = torch.Generator().manual_seed(1)
    for length in LENGTHS:
        ids = torch.randint(3, 321, (length,), generator=generator).tolist()
        with torch.no_grad():
            expected = model.model(torch.tensor([ids])).logits[0]
        ours = all_logits(path, ids)
        assert ours.shape == expected.shape
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-4, f"{length} tokens"
        assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()


def test_dimensions_given_layer_by_layer(tmp_path: Path) -> None:
    model = tiny.build("qwen2")
    plain = model.write(tmp_path / "plain.gguf")
    model.metadata |= {"qwen2.attention.head_count_kv": [2, 2], "qwen2.feed_forward_length": [160, 160]}
    assert torch.equal(all_logits(plain, [5, 6, 7]), all_logits(model.write(tmp_path / "arrays.gguf"), [5, 6, 7]))
