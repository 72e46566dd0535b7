"""The sampling kernel and engine/sampler.py draw the same tokens from vocabularies of the true sizes."""

from __future__ import annotations

import random

import pytest
import torch

from tests.gpu.conftest import ON_EMULATED, ON_GPU
from tests.gpu.models import backend_on
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.sequence import Sequence
from worker_orcd.kv.prefix import PrefixChain

WAYS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 0.9, "repetition_penalty": 1.2},  # not for the kernel: its neighbours are
)


@pytest.mark.parametrize(
    ("device", "vocab_size", "num_rows"),
    [
        pytest.param("emulated", 1009, 7, marks=ON_EMULATED),
        *(
            pytest.param("cuda", vocab_size, num_rows, marks=ON_GPU)
            for vocab_size in (32_064, 151_936, 201_088)
            for num_rows in (1, 7, 256)
        ),
    ],
)
@pytest.mark.parametrize("spread", [0.5, 4.0])  # nearly flat, and as of a model that knows
def test_the_kernel_draws_what_torch_draws(device: str, vocab_size: int, num_rows: int, spread: float) -> None:
    backend, rng, banned = backend_on(device), random.Random(num_rows), [0, vocab_size - 1]
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * spread).to(backend.device)
    rows = []
    for i in range(num_rows):
        params = SamplingParams(rng.getrandbits(64), **WAYS[i % len(WAYS)])  # type: ignore[arg-type]
        rows.append(Sequence.of(Request(str(i), [5] * (i + 1), 4, params), i, PrefixChain(b"", 16)))
    with_kernel = Sampler(banned, backend.device, kernel=backend.sample_kernel(banned, vocab_size))
    found = with_kernel.choose(logits, rows, None)
    expected = Sampler(banned, backend.device).choose(logits, rows, None)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.is_finite.all()
    assert not set(found.ids.tolist()) & set(banned)
    assert torch.equal(with_kernel.choose(logits, rows, None).ids, found.ids), "run twice"
