"""MetricsHook: where numbers leave the worker, after a step and never inside it; and the page they end on.

Recording costs an addition or two: no lock (all calls come from one thread) and no objects of the client library,
which only writes the page.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Literal, Protocol, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from worker_orcd.engine.request import EngineStatus, StepStats

Outcome = Literal["success", "error", "cancelled", "timeout"]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GAP_MS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 5000)
LATENCY_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 300_000)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NO_LABELS: Mapping[str, str] = {}


class MetricsHook(Protocol):
    """Called on the event loop of the API process; must not block. All times in milliseconds."""

    def record_first_token_latency(self, ms: float) -> None:
        """From the arrival of a request to its first token."""
        ...

    def record_queue_time(self, ms: float) -> None:
        """From arrival to admission."""
        ...

    def record_token_generation(self, count: int, gap_ms: float | None) -> None:
        """A stream got `count` tokens at once, `gap_ms` after those before; None for its first ones."""
        ...

    def record_inference_complete(self, outcome: Outcome, total_ms: float, tokens_in: int) -> None: ...

    def record_cancel_latency(self, ms: float) -> None:
        """From the wish to end a request early until the engine had freed everything of it."""
        ...

    def record_refusal(self, code: str) -> None:
        """A request was not taken: OVERLOADED, SHUTTING_DOWN, INVALID_REQUEST …"""
        ...

    def record_client_disconnect(self) -> None:
        """A client went away before its answer was complete."""
        ...

    def record_step(self, stats: StepStats) -> None: ...


class MetricsPage(MetricsHook, Protocol):
    """A hook whose numbers can be read."""

    def render(self, status: EngineStatus) -> bytes:
        """The page, as `CONTENT_TYPE`. Gauges are of `status`."""
        ...


class NoOpMetrics:
    """Records nothing."""

    def record_first_token_latency(self, ms: float) -> None:
        pass

    def record_queue_time(self, ms: float) -> None:
        pass

    def record_token_generation(self, count: int, gap_ms: float | None) -> None:
        pass

    def record_inference_complete(self, outcome: Outcome, total_ms: float, tokens_in: int) -> None:
        pass

    def record_cancel_latency(self, ms: float) -> None:
        pass

    def record_refusal(self, code: str) -> None:
        pass

    def record_client_disconnect(self) -> None:
        pass

    def record_step(self, stats: StepStats) -> None:
        pass


class Spread:
    """How often a value fell at or below each bound and above the one before."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def record(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, help: str, labels: Mapping[str, str] = NO_LABELS) -> Metric:
        totals = map(float, accumulate(self._counts))
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        family = HistogramMetricFamily(f"worker_{name}", help, labels=list(labels))
        family.add_metric(list(labels.values()), list(zip(bounds, totals, strict=True)), self._sum)
        return family


class PrometheusMetrics:
    """A `MetricsPage` in the text format of Prometheus, with a registry of its own."""

    _status: EngineStatus  # of the page being written

    def __init__(self, worker_id: str, quant_kind: str) -> None:
        self._identity = {"worker_id": worker_id, "quant_kind": quant_kind}
        self._born_s = time.monotonic()
        self._outcomes: Counter[str] = Counter(dict.fromkeys(get_args(Outcome), 0))
        self._refusals: Counter[str] = Counter({"OVERLOADED": 0, "SHUTTING_DOWN": 0})
        self._num_tokens_in = self._num_tokens_out = self._num_disconnects = 0
        self._num_rows = self._num_preempted = self._num_evicted = self._num_prompt = self._num_cached = 0
        self._duration, self._first_token, self._gap = Spread(LATENCY_MS), Spread(LATENCY_MS), Spread(GAP_MS)
        self._queue, self._cancel = Spread(LATENCY_MS), Spread(LATENCY_MS)
        self._step, self._batch = Spread(GAP_MS), Spread(BATCH_SIZES)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def record_first_token_latency(self, ms: float) -> None:
        self._first_token.record(ms)

    def record_queue_time(self, ms: float) -> None:
        self._queue.record(ms)

    def record_token_generation(self, count: int, gap_ms: float | None) -> None:
        self._num_tokens_out += count
        if gap_ms is not None:
            self._gap.record(gap_ms / count, count)

    def record_inference_complete(self, outcome: Outcome, total_ms: float, tokens_in: int) -> None:
        self._outcomes[outcome] += 1
        self._duration.record(total_ms)
        self._num_tokens_in += tokens_in

    def record_cancel_latency(self, ms: float) -> None:
        self._cancel.record(ms)

    def record_refusal(self, code: str) -> None:
        self._refusals[code] += 1

    def record_client_disconnect(self) -> None:
        self._num_disconnects += 1

    def record_step(self, stats: StepStats) -> None:
        if stats.num_rows:
            self._step.record(stats.step_ms)
            self._batch.record(stats.num_sequences)
        self._num_rows += stats.num_rows
        self._num_preempted += stats.num_preempted
        self._num_evicted += stats.num_evicted
        self._num_prompt += stats.prompt_tokens
        self._num_cached += stats.cached_tokens

    def render(self, status: EngineStatus) -> bytes:
        self._status = status
        page = generate_latest(self._registry)
        # a counter by contract, whose name the library would not let be without _total
        return page.replace(b"TYPE worker_uptime_seconds gauge", b"TYPE worker_uptime_seconds counter")

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from self._requests()
        yield from self._latencies()
        yield from self._steps()
        yield from self._cache()

    def _requests(self) -> Iterator[Metric]:
        me, uptime_s = self._identity, time.monotonic() - self._born_s
        yield _gauge("vram_bytes", "Device memory in use.", self._status.vram_bytes_used, me)
        memory = GaugeMetricFamily("worker_memory_bytes", "Memory set aside at start.", labels=["purpose"])
        for purpose, nbytes in self._status.memory.items():
            memory.add_metric([purpose], nbytes)
        yield memory
        yield _gauge("uptime_seconds", "Seconds since the worker was ready.", uptime_s, me)
        yield _counters("requests", "Requests that were taken and ended.", "outcome", self._outcomes, me)
        yield _counters(
            "refusals", "Requests answered with an error instead of a stream.", "code", self._refusals, {}
        )
        yield _counter("tokens_in", "Prompt tokens of ended requests.", self._num_tokens_in, me)
        yield _counter("tokens_generated", "Tokens generated.", self._num_tokens_out, me)
        yield _counter("client_disconnects", "Clients gone before their answer was complete.", self._num_disconnects)

    def _latencies(self) -> Iterator[Metric]:
        yield self._duration.family("inference_duration_ms", "From arrival to the last event.", self._identity)
        yield self._queue.family("queue_time_ms", "From arrival to admission.")
        yield self._first_token.family("first_token_latency_ms", "From arrival to the first token.")
        yield self._gap.family("per_token_latency_ms", "Between tokens of one stream.")
        yield self._cancel.family("cancellation_latency_ms", "From the wish to end a request until all is freed.")

    def _steps(self) -> Iterator[Metric]:
        yield self._step.family("step_duration_ms", "Of one step, from plan to results.")
        yield self._batch.family("batch_size", "Sequences in one step.")
        yield _counter("computed_tokens", "Tokens put through the model, prompts included.", self._num_rows)
        yield _gauge("running_requests", "Requests being computed.", self._status.num_running)
        yield _gauge("waiting_requests", "Requests in the queue.", self._status.num_waiting)
        yield _counter("preemptions", "Sequences that gave up their blocks to older ones.", self._num_preempted)

    def _cache(self) -> Iterator[Metric]:
        used, cached, total = self._status.blocks_used, self._status.blocks_cached, self._status.blocks_total
        blocks = GaugeMetricFamily("worker_kv_blocks", "Blocks of the KV cache.", labels=["state"])
        for state, count in (("used", used), ("cached", cached), ("free", total - used - cached)):
            blocks.add_metric([state], count)
        yield blocks
        yield _gauge("kv_capacity_blocks", "All blocks of the KV cache.", total)
        yield _counter("evicted_blocks", "Cached blocks given up for new ones.", self._num_evicted)
        yield _counter("prefix_cache_prompt_tokens", "Prompt tokens of admitted requests.", self._num_prompt)
        yield _counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", self._num_cached)


def _gauge(name: str, help: str, value: float, labels: Mapping[str, str] = NO_LABELS) -> Metric:
    family = GaugeMetricFamily(f"worker_{name}", help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, help: str, value: float, labels: Mapping[str, str] = NO_LABELS) -> Metric:
    """Its name gets the suffix _total."""
    family = CounterMetricFamily(f"worker_{name}", help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counters(name: str, help: str, label: str, counts: Mapping[str, int], labels: Mapping[str, str]) -> Metric:
    family = CounterMetricFamily(f"worker_{name}", help, labels=[*labels, label])
    for value, count in counts.items():
        family.add_metric([*labels.values(), value], count)
    return family
