"""MetricsHook: where numbers leave the engine, after a step and never inside it."""

from __future__ import annotations

from typing import Protocol


class MetricsHook(Protocol):
    """Called from the engine's thread; must not block. All times in milliseconds."""

    def record_first_token_latency(self, ms: float) -> None: ...

    def record_token_generation(self, token_id: int) -> None: ...

    def record_inference_complete(self, total_ms: float) -> None: ...


class NoOpMetrics:
    def record_first_token_latency(self, ms: float) -> None:
        pass

    def record_token_generation(self, token_id: int) -> None:
        pass

    def record_inference_complete(self, total_ms: float) -> None:
        pass
