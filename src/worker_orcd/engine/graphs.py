"""Decode steps as CUDA graphs: recorded once for a number of sequences, replayed with one launch instead of hundreds.

A step of decodes only is padded to the next of ROWS sequences and to a block table of the next width, and its
integers are written to where the graph reads them. Rows that pad store nothing and attend to nothing; since a row's
bits do not depend on its neighbours, a replay gives the same bits as the launches one by one. That is checked for
every recording; when it does not hold, or nothing can be recorded, steps are launched one by one, and `refusal` says
why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker_orcd.backends.batch import AttnBatch, Batch
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sequence import Plan
from worker_orcd.errors import CudaError

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # more sequences than these are launched one by one
WIDTH_TOKENS, WIDTH_GROWTH = 1024, 4  # of a block table: 1,024 tokens, 4,096, …
NO_SLOT = -1

Recording = tuple[Callable[[], object], Tensor]  # repeats the work; where its result lies
Record = Callable[[Callable[[], Tensor]], Recording]


class Graphs:
    """The recorded steps of one runtime. They share one memory pool: only one runs at a time."""

    def __init__(self, runtime: Runtime, max_tokens: int, record: Record | None = None) -> None:
        """`max_tokens`: the longest sequence; `record` is replaced in tests."""
        self._runtime, self._max_tokens = runtime, max_tokens
        self._record = record or CudaRecorder()
        self._recorded: dict[tuple[int, int], tuple[Frame, Recording]] = {}
        self.refusal = ""

    def logits(self, plan: Plan, last_sampled: Tensor | None) -> Tensor | None:
        """Those of a step, f32 [S, V], valid until the next call; None when it must be launched one by one."""
        if self.refusal or len(plan) > ROWS[-1] or any(c.num_tokens != 1 or c.num_logits != 1 for c in plan):
            return None
        block_size = plan[0].sequence.block_table.block_size
        rows = next(rows for rows in ROWS if rows >= len(plan))
        width = self._width(max(len(chunk.sequence.block_table.blocks) for chunk in plan), block_size)
        if (rows, width) in self._recorded:
            frame, (replay, logits) = self._recorded[rows, width]
            frame.fill(plan, last_sampled)
            replay()
        else:
            frame = Frame(rows, width, block_size, self._runtime.device)
            frame.fill(plan, last_sampled)
            logits = self._first(frame, rows, width)
        return logits[: len(plan)]

    def _first(self, frame: Frame, rows: int, width: int) -> Tensor:
        """Launch a step, record it, and hold both against each other; all of them store the same keys and values."""

        def work() -> Tensor:
            return self._runtime.adapter.forward(frame.batch, self._runtime.kv)

        launched = work()
        try:
            replay, logits = self._record(work)
            replay()
        except (RuntimeError, CudaError) as error:
            self.refusal = f"a step of {rows} sequences could not be recorded: {str(error).splitlines()[0]}"
            return launched
        if torch.equal(logits.view(torch.int32), launched.view(torch.int32)):
            self._recorded[rows, width] = frame, (replay, logits)
        else:
            self.refusal = f"a recorded step of {rows} sequences gave other bits than one launched"
        return launched

    def _width(self, num_blocks: int, block_size: int) -> int:
        tokens = WIDTH_TOKENS
        while tokens < num_blocks * block_size:
            tokens *= WIDTH_GROWTH
        return max(num_blocks, -(-min(tokens, self._max_tokens) // block_size))


class Frame:
    """The integers of a decode step of `rows` sequences, at places that never change."""

    def __init__(self, rows: int, width: int, block_size: int, device: torch.device) -> None:
        self._rows, self._width = rows, width
        sizes = [rows, rows, rows, rows, rows * width]
        self._padding = np.zeros(sum(sizes), dtype=np.int64)
        self._padding[2 * rows : 3 * rows] = NO_SLOT
        self._flat = torch.from_numpy(self._padding).to(device, copy=True)
        tokens, positions, slots, lens, table = self._flat.split(sizes)  # type: ignore[no-untyped-call]
        starts = torch.arange(rows + 1, device=device)
        attn = AttnBatch(positions, starts, lens, table.view(rows, width), block_size)
        self.batch = Batch(tokens, slots, starts[:rows], attn)

    def fill(self, plan: Plan, last_sampled: Tensor | None) -> None:
        """Write a step's integers; tokens the host does not know yet are taken from `last_sampled`."""
        host = torch.empty(self._flat.shape, dtype=torch.int64, pin_memory=self._flat.is_cuda)
        flat = host.numpy()
        flat[:] = self._padding
        head, tables = flat[: 4 * self._rows].reshape(4, -1), flat[4 * self._rows :].reshape(self._rows, -1)
        unknown: list[tuple[int, int]] = []
        for row, chunk in enumerate(plan):
            seq, position = chunk.sequence, chunk.first
            table = seq.block_table
            blocks, block_size = np.frombuffer(table.blocks, dtype=np.int64), table.block_size
            slot = blocks[position // block_size] * block_size + position % block_size
            head[1:, row] = position, slot, position + 1
            if position < len(seq.tokens):
                head[0, row] = seq.tokens[position]
            else:
                unknown.append((row, seq.sampled_row))
            tables[row, : len(blocks)] = blocks
        self._flat.copy_(host, non_blocking=True)
        if unknown:
            assert last_sampled is not None
            pairs = torch.tensor(unknown, pin_memory=self._flat.is_cuda).to(self._flat.device, non_blocking=True)
            self.batch.tokens[pairs[:, 0]] = last_sampled[pairs[:, 1]]


@dataclass
class CudaRecorder:
    """Records with CUDA's own stream capture, which wants all kernels loaded: the work has run before."""

    pool: Any = None  # a handle of torch's

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result
