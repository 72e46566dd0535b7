"""InferenceStep: one turn of the engine. PlainStep samples one token a sequence; a speculative one drops in here."""

from __future__ import annotations

from typing import Protocol

import torch

from worker_orcd.engine.pack import pack
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.sequence import Plan, Sequence


class InferenceStep(Protocol):
    def start(self, seq: Sequence) -> None:
        """Claim cache for the sequence; CacheFull leaves all as it was."""
        ...

    def next_token(self, plan: Plan) -> list[list[int]]:
        """Compute the plan; per chunk the new tokens: [] mid-prompt, [t], or several accepted drafts."""
        ...

    def free(self, seq: Sequence) -> None:
        """Give everything back; at any moment after start, once."""
        ...


class PlainStep:
    """One forward pass and one sample. Nothing here logs, measures or talks to anyone."""

    def __init__(self, runtime: Runtime, sampler: Sampler) -> None:
        self._runtime, self._sampler = runtime, sampler

    def start(self, seq: Sequence) -> None:
        self._runtime.allocator.grow(seq.table, len(seq.tokens))

    @torch.inference_mode()
    def next_token(self, plan: Plan) -> list[list[int]]:
        """Raises NumericFault naming no text; CacheFull before anything was computed."""
        for chunk in plan:
            self._runtime.allocator.grow(chunk.sequence.table, chunk.sequence.num_computed + chunk.num_tokens)
        logits = iter(self._runtime.adapter.forward(pack(plan, self._runtime.device), self._runtime.kv))
        tokens: list[list[int]] = []
        for chunk in plan:
            seq = chunk.sequence
            samples = chunk.samples
            seq.num_computed += chunk.num_tokens
            if samples:
                params, position = seq.request.sampling, len(seq.tokens)
                token = self._sampler.sample(next(logits), params, seq.generated, position)
                seq.tokens.append(token)
                tokens.append([token])
            else:
                tokens.append([])
        return tokens

    def free(self, seq: Sequence) -> None:
        self._runtime.allocator.release(seq.table)
