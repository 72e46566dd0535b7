"""The page of numbers, read back by the client library's own parser."""

from __future__ import annotations

import bisect
import random
import re

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from worker_orcd.engine.metrics import GAP_MS, LATENCY_MS, MetricsHook, NoOpMetrics, PrometheusMetrics
from worker_orcd.engine.request import EngineStatus, StepStats

ME = {"worker_id": "w-1", "quant_kind": "Q4_K_M"}
CONTRACT = {
    "worker_vram_bytes": "gauge",
    "worker_requests": "counter",
    "worker_tokens_in": "counter",
    "worker_tokens_generated": "counter",
    "worker_inference_duration_ms": "histogram",
    "worker_uptime_seconds": "counter",
}


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics("w-1", "Q4_K_M")


def status(running: int = 0, used: int = 0, cached: int = 0) -> EngineStatus:
    return EngineStatus(True, True, "", True, 7000, running, 2, 200, used, cached, 1, {"weights": 6000})


def families(metrics: PrometheusMetrics, now: EngineStatus | None = None) -> dict[str, Metric]:
    found = list(text_string_to_metric_families(metrics.render(now or status()).decode()))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def value(metrics: PrometheusMetrics, name: str, now: EngineStatus | None = None, **labels: str) -> float:
    samples = [sample for family in families(metrics, now).values() for sample in family.samples]
    [found] = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    return found


def step(**given: float) -> StepStats:
    names = StepStats.__struct_fields__
    return StepStats(**(dict.fromkeys(names, 0) | given))  # type: ignore[arg-type]


def use_everything(hook: MetricsHook) -> None:
    hook.record_first_token_latency(1.0)
    hook.record_queue_time(1.0)
    hook.record_token_generation(2, 3.0)
    hook.record_inference_complete("success", 10.0, 4)
    hook.record_cancel_latency(1.0)
    hook.record_refusal("OVERLOADED")
    hook.record_client_disconnect()
    hook.record_step(step(num_sequences=3, step_ms=2.0))


def test_names_types_and_labels_of_the_contract(metrics: PrometheusMetrics) -> None:
    found = families(metrics)
    assert {name: found[name].type for name in CONTRACT} == CONTRACT
    for name in CONTRACT:
        assert all(ME.items() <= sample.labels.items() for sample in found[name].samples)
    outcomes = {sample.labels["outcome"] for sample in found["worker_requests"].samples}
    assert outcomes == {"success", "error", "cancelled", "timeout"}


def test_every_family_is_named_and_explained(metrics: PrometheusMetrics) -> None:
    use_everything(metrics)
    allowed = {"worker_id", "quant_kind", "outcome", "code", "state", "le", "purpose"}
    for family in families(metrics).values():
        assert re.fullmatch(r"worker_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert all(sample.labels.keys() <= allowed for sample in family.samples)
        if family.type == "histogram":
            assert family.name.endswith(("_ms", "_size"))


def test_nothing_is_shared(metrics: PrometheusMetrics) -> None:
    use_everything(metrics)
    other = PrometheusMetrics("w-2", "Q4_0")
    assert value(other, "worker_tokens_generated_total") == 0
    assert value(metrics, "worker_tokens_generated_total") == 2
    assert not any(family.name.startswith("worker_") for family in REGISTRY.collect())


def test_the_silent_hook_takes_every_call() -> None:
    use_everything(NoOpMetrics())


@pytest.mark.parametrize(
    ("bounds", "name"), [(LATENCY_MS, "worker_queue_time_ms"), (GAP_MS, "worker_per_token_latency_ms")]
)
def test_histograms_count_as_defined(metrics: PrometheusMetrics, bounds: tuple[float, ...], name: str) -> None:
    rng = random.Random(7)
    values = [*bounds, 0.0, 1e9, *(10 ** rng.uniform(-2, 7) for _ in range(500))]
    for ms in values:
        if bounds is GAP_MS:
            metrics.record_token_generation(1, ms)
        else:
            metrics.record_queue_time(ms)
    for bound in bounds:
        at_most = bisect.bisect_right(sorted(values), bound)
        assert value(metrics, f"{name}_bucket", le=str(float(bound))) == at_most
    assert value(metrics, f"{name}_bucket", le="+Inf") == value(metrics, f"{name}_count") == len(values)
    assert value(metrics, f"{name}_sum") == pytest.approx(sum(values))


def test_tokens_that_come_together_share_their_gap(metrics: PrometheusMetrics) -> None:
    metrics.record_token_generation(3, None)  # the first: no gap
    metrics.record_token_generation(4, 20.0)
    assert value(metrics, "worker_tokens_generated_total") == 7
    assert value(metrics, "worker_per_token_latency_ms_count") == 4
    assert value(metrics, "worker_per_token_latency_ms_bucket", le="5.0") == 4
    assert value(metrics, "worker_per_token_latency_ms_bucket", le="3.0") == 0
    assert value(metrics, "worker_per_token_latency_ms_sum") == pytest.approx(20.0)


def test_requests_and_refusals(metrics: PrometheusMetrics) -> None:
    metrics.record_inference_complete("success", 100.0, 7)
    metrics.record_inference_complete("timeout", 300_001.0, 5)
    metrics.record_refusal("OVERLOADED")
    metrics.record_refusal("INVALID_REQUEST")
    metrics.record_client_disconnect()
    metrics.record_cancel_latency(12.0)
    assert value(metrics, "worker_requests_total", outcome="success") == 1
    assert value(metrics, "worker_requests_total", outcome="timeout") == 1
    assert value(metrics, "worker_requests_total", outcome="error") == 0
    assert value(metrics, "worker_tokens_in_total") == 12
    assert value(metrics, "worker_refusals_total", code="OVERLOADED") == 1
    assert value(metrics, "worker_refusals_total", code="INVALID_REQUEST") == 1
    assert value(metrics, "worker_refusals_total", code="SHUTTING_DOWN") == 0
    assert value(metrics, "worker_client_disconnects_total") == 1
    assert value(metrics, "worker_cancellation_latency_ms_sum") == 12


def test_steps_add_up(metrics: PrometheusMetrics) -> None:
    metrics.record_step(
        step(num_sequences=3, num_rows=20, step_ms=4.0, num_preempted=1, num_evicted=2, prompt_tokens=9)
    )
    metrics.record_step(step(num_sequences=5, num_rows=5, step_ms=2.0, prompt_tokens=6, cached_tokens=4))
    metrics.record_step(step(num_sequences=5, num_rows=5))
    expected = {
        "computed_tokens_total": 30,
        "preemptions_total": 1,
        "evicted_blocks_total": 2,
        "prefix_cache_prompt_tokens_total": 15,
        "prefix_cache_hit_tokens_total": 4,
        "step_duration_ms_sum": 6,
        "batch_size_count": 3,
        "batch_size_sum": 13,
    }
    assert {name: value(metrics, f"worker_{name}") for name in expected} == expected


def test_gauges_are_of_the_status(metrics: PrometheusMetrics) -> None:
    metrics.record_step(step(num_running=5, blocks_used=30))
    now = status(running=1, used=3, cached=4)
    names = ("running_requests", "waiting_requests", "vram_bytes", "kv_capacity_blocks")
    assert [value(metrics, f"worker_{name}", now) for name in names] == [1, 2, 7000, 200]
    blocks = {s: value(metrics, "worker_kv_blocks", now, state=s) for s in ("used", "cached", "free")}
    assert blocks == {"used": 3, "cached": 4, "free": 193}
    assert value(metrics, "worker_memory_bytes", now, purpose="weights") == 6000


def test_uptime_grows(metrics: PrometheusMetrics) -> None:
    assert b"\nworker_uptime_seconds{" in metrics.render(status())
    first = value(metrics, "worker_uptime_seconds_total")  # the parser's spelling of any counter
    assert 0 <= first < value(metrics, "worker_uptime_seconds_total")
