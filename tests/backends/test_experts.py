"""Experts on the reference backend: right against float64, and each row the same bits among any neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worker_orcd.backends.base import Experts, Operand, PackedWeight, Projection, SharedExpert
from worker_orcd.backends.torch_ref import TorchBackend, choose
from worker_orcd.gguf.types import GgmlType

NUM, WIDTH, FFN = 6, 48, 40


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[TorchBackend]:
    """Tensors of a test are made on the backend's device."""
    torch.manual_seed(0)
    torch.set_default_device(request.param)
    yield TorchBackend(torch.device(request.param))
    torch.set_default_device(None)


def matrix(backend: TorchBackend, n: int, k: int, has_bias: bool) -> tuple[PackedWeight, Tensor | None]:
    raw = (torch.randn(n, k) * 2 / k**0.5).view(torch.uint8).flatten()
    return backend.pack(raw, GgmlType.F32, (n, k)), torch.randn(n) if has_bias else None


def gpt_oss_like(backend: TorchBackend) -> Experts:
    """With biases, and activations large enough to be clamped."""
    experts = Experts(
        NUM,
        4,
        True,
        router=(matrix(backend, NUM, WIDTH, True),),
        gate_up=(matrix(backend, NUM * FFN, WIDTH, True), matrix(backend, NUM * FFN, WIDTH, True)),
        down=(matrix(backend, NUM * WIDTH, FFN, True),),
        activation="clamped",
    )
    for weight, _ in experts.gate_up:
        weight.parts[0].mul_(3.0)
    return experts


def qwen2_like(backend: TorchBackend) -> Experts:
    """Weights that do not add up to one, and a shared expert of another width."""
    shared = SharedExpert(
        (matrix(backend, 1, WIDTH, False),),
        (matrix(backend, 56, WIDTH, False), matrix(backend, 56, WIDTH, False)),
        (matrix(backend, WIDTH, 56, False),),
    )
    return Experts(
        NUM,
        2,
        False,
        router=(matrix(backend, NUM, WIDTH, False),),
        gate_up=(matrix(backend, NUM * FFN, WIDTH, False), matrix(backend, NUM * FFN, WIDTH, False)),
        down=(matrix(backend, NUM * WIDTH, FFN, False),),
        activation="silu",
        shared=shared,
    )


KINDS = {"gpt-oss": gpt_oss_like, "qwen2": qwen2_like}


def exact(x: Tensor, experts: Experts) -> Tensor:
    """One row at a time, in float64, by the definition."""

    def product(row: Tensor, projection: Projection, expert: int, count: int) -> list[Tensor]:
        outs = []
        for weight, bias in projection:
            n = weight.shape[0] // count
            out = weight.parts[0][expert * n : (expert + 1) * n].double() @ row
            outs.append(out if bias is None else out + bias[expert * n : (expert + 1) * n].double())
        return outs

    def mlp(row: Tensor, gate_up: Projection, down: Projection, expert: int, count: int) -> Tensor:
        gate, up = product(row, gate_up, expert, count)
        if experts.activation == "clamped":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        else:
            h = torch.nn.functional.silu(gate) * up
        return product(h, down, expert, count)[0]

    rows = []
    for row in x.double():
        scores = product(row, experts.router, 0, 1)[0]
        best = sorted(range(NUM), key=lambda e: (-scores[e].item(), e))[: experts.num_used]
        weights = scores[best].softmax(0) if experts.is_normalized else scores.softmax(0)[best]
        total = sum(w * mlp(row, experts.gate_up, experts.down, e, NUM) for w, e in zip(weights, best, strict=True))
        if (shared := experts.shared) is not None:
            gate = torch.sigmoid(product(row, shared.gate, 0, 1)[0])
            total = total + gate * mlp(row, shared.gate_up, shared.down, 0, 1)
        rows.append(total)
    return torch.stack(rows)


def run(backend: TorchBackend, x: Tensor, experts: Experts) -> Tensor:
    return backend.total(backend.experts(Operand(x, *x.shape), experts))


@pytest.mark.parametrize("kind", KINDS)
def test_right_against_float64(backend: TorchBackend, kind: str) -> None:
    experts = KINDS[kind](backend)
    x = torch.randn(37, WIDTH)
    expected = exact(x, experts)
    found = run(backend, x, experts)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert run(backend, x[:0], experts).shape == (0, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_company(backend: TorchBackend, kind: str) -> None:
    """Alone, among others, and among copies of itself that crowd its experts."""
    experts = KINDS[kind](backend)
    x = torch.randn(64, WIDTH)
    alone = torch.cat([run(backend, row[None], experts) for row in x])
    assert torch.equal(run(backend, x, experts), alone)
    for _ in range(10):
        rows = torch.randint(0, 64, (int(torch.randint(1, 40, ())),))
        assert torch.equal(run(backend, x[rows], experts), alone[rows])


def test_equal_scores_go_to_the_lower_index(backend: TorchBackend) -> None:
    experts = replace(gpt_oss_like(backend), num_used=3)
    chosen, weights = choose(torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, 2.0], [0.0] * 6]), experts)
    assert chosen.tolist() == [[1, 5, 2], [0, 1, 2]]
    torch.testing.assert_close(weights[0], torch.tensor([2.0, 2.0, 1.0]).softmax(0))
    over_all = choose(torch.zeros(1, NUM), replace(experts, is_normalized=False))[1]
    torch.testing.assert_close(over_all, torch.full((1, 3), 1 / NUM))


def test_slots_are_added_best_first(backend: TorchBackend) -> None:
    """In float32 the order shows: 1e8 + 1 is 1e8."""
    experts = gpt_oss_like(backend)
    for projection in (experts.router, experts.gate_up, experts.down):
        for weight, bias in projection:
            weight.parts[0].zero_()
            assert bias is not None
            bias.zero_()
    scores, outputs = experts.router[0][1], experts.down[0][1]
    assert scores is not None
    assert outputs is not None
    scores.copy_(torch.tensor([3.0, 1.0, 2.0, 0.0, -9.0, -9.0]))
    weights = torch.tensor([3.0, 2.0, 1.0, 0.0]).exp()
    wanted = torch.tensor([1e8, 1.0, -1e8, 4.0]) / weights  # of the experts 0, 2, 1, 3
    outputs.view(NUM, WIDTH)[[0, 2, 1, 3]] = wanted[:, None].expand(-1, WIDTH)
    slots = backend.experts(Operand(torch.zeros(1, WIDTH), 1, WIDTH), experts)[0].slices[:, 0, 0]
    assert slots.sign().tolist() == [1.0, 1.0, -1.0, 1.0]
    assert run(backend, torch.zeros(1, WIDTH), experts)[0, 0] == ((slots[0] + slots[1]) + slots[2]) + slots[3]
