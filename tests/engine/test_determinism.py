"""Load never changes an answer: token ids and logits, bit for bit, in 1,000 random schedules."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from torch import Tensor

from tests import tiny
from tests.engine.schedules import Bench
from tests.running import runtime_of
from worker_orcd.backends.batch import Batch, LayerKV
from worker_orcd.models.adapter import ModelAdapter

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
GROUP = 100  # schedules a test
NUM_LAYERS = {"qwen2": 2, "llama": 1}


@pytest.fixture(scope="module", params=NUM_LAYERS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two layers or one, four query heads on two key heads; one family turns halves, the other neighbours."""
    family = request.param
    path = tiny.build(family, num_hidden_layers=NUM_LAYERS[family], **SMALL).write(
        tmp_path_factory.mktemp("model") / "tiny.gguf"
    )
    return Bench(runtime_of(path), num_requests=160)


@pytest.mark.parametrize(
    ("bench", "group"),
    [("qwen2", 0), ("qwen2", 1), *(("llama", group) for group in range(2, 10))],
    indirect=["bench"],
)
def test_every_schedule_gives_the_bits_of_a_run_alone(bench: Bench, group: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(group * GROUP, (group + 1) * GROUP):
        course = bench.run(seed)
        assert not course.differences
        seen += course.seen
    for case in ("preempted", "hits", "crowds", "mixed", "cancelled", "overlapping"):
        assert seen[case] >= 3, f"{case}: {seen}"


def test_the_requests_alone_differ_and_end_in_several_ways(bench: Bench) -> None:
    outcomes = [outcome for outcome, _ in bench.alone.values()]
    assert {outcome.end for outcome in outcomes} == {"eos", "max_tokens"}
    assert len({tuple(outcome.tokens) for outcome in outcomes}) > 0.8 * len(outcomes)
    assert all(len(logits) >= 1 for _, logits in bench.alone.values())
    assert sum(bool(outcome.prompt) for outcome in outcomes) >= 5
    assert sum(len(outcome.logprobs) == len(outcome.tokens) > 0 for outcome in outcomes) >= 5


class Nosy:
    """A model that does to rows what must not be done: `twist` gets the batch and the logits."""

    def __init__(self, adapter: ModelAdapter, twist: str) -> None:
        self.adapter, self.twist = adapter, twist

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        if self.twist == "reads block 0":
            attn = replace(batch.attn, block_table=batch.attn.block_table * 0)
            batch = replace(batch, attn=attn)
        logits = self.adapter.forward(batch, kv)
        if self.twist == "sees its neighbours" and len(logits) > 1:
            logits[0] += logits[1] * 2**-20
        return logits


@pytest.mark.parametrize("twist", ["reads block 0", "sees its neighbours"])
def test_a_model_that_mixes_rows_up_is_found(bench: Bench, twist: str) -> None:
    adapter = Nosy(bench.adapter, twist)
    assert any(bench.run(seed, adapter).differences for seed in range(5))
    assert not bench.run(0).differences
