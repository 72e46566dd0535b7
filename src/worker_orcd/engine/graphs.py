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
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker_orcd.backends.batch import AttnBatch, Batch
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sequence import Chunk, Plan
from worker_orcd.errors import CudaError

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # more sequences than these are launched one by one
WIDTH_TOKENS, WIDTH_GROWTH = 256, 4  # of a block table: 256 tokens, for which attention is one kernel, 1,024, …
PADDING = np.array([[0], [0], [-1], [0]])  # a row's integers beside its blocks; it stores nothing
HEAD = len(PADDING)

Recording = tuple[Callable[[], object], Tensor]  # repeats the work; where its result lies
Record = Callable[[Callable[[], Tensor]], Recording]


class Graphs:
    """The recorded steps of one runtime. They share one memory pool: only one runs at a time."""

    def __init__(self, runtime: Runtime, max_tokens: int, record: Record | None = None) -> None:
        """`max_tokens`: the longest sequence; `record` is replaced in tests.

        Recorded steps read at `sampled` what the step before has sampled; the sampler may write it there.
        """
        self._runtime, self._max_tokens = runtime, max_tokens
        self._record = record or CudaRecorder()
        self._recorded: dict[tuple[int, int], tuple[Frame, Recording]] = {}
        self.sampled = torch.zeros(2 * ROWS[-1], dtype=torch.int64, device=runtime.device)
        self.refusal = ""

    def logits(self, plan: Plan, last_sampled: Tensor | None) -> Tensor | None:
        """Those of a step, f32 [S, V], valid until the next call; None when it must be launched one by one."""
        if self.refusal or len(plan) > ROWS[-1] or not all(map(_is_decode, plan)):
            return None
        if last_sampled is not None and not self._has_taken(last_sampled):
            return None
        block_size = plan[0].sequence.block_table.block_size
        rows = next(rows for rows in ROWS if rows >= len(plan))
        width = self._width(max([len(chunk.sequence.block_table.blocks) for chunk in plan]), block_size)
        if (rows, width) in self._recorded:
            frame, (replay, logits) = self._recorded[rows, width]
            frame.fill(plan)
            replay()
        else:
            frame = Frame(rows, width, block_size, self.sampled)
            frame.fill(plan)
            logits = self._first(frame, rows, width)
        return logits[: len(plan)]

    def _has_taken(self, last_sampled: Tensor) -> bool:
        """Bring it to where recorded steps read it, unless it is there; False if there is no room."""
        if last_sampled.data_ptr() == self.sampled.data_ptr():
            return True
        if len(last_sampled) > len(self.sampled):
            return False
        self.sampled[: len(last_sampled)].copy_(last_sampled)
        return True

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


def _is_decode(chunk: Chunk) -> bool:
    """One row, whose logits are wanted."""
    return chunk.num_tokens == 1 and (chunk.samples or chunk.scores)


def _token(chunk: Chunk) -> int:
    """The one it computes; if the host does not know it yet, where the step before has sampled it."""
    seq = chunk.sequence
    return seq.tokens[chunk.first] if chunk.first < len(seq.tokens) else -1 - seq.sampled_row


class Frame:
    """The integers of a decode step of `rows` sequences, at places that never change.

    The host keeps what the device has: it writes those block tables that have changed, and sends all when one has.
    """

    def __init__(self, rows: int, width: int, block_size: int, sampled: Tensor) -> None:
        device = sampled.device
        self._host = torch.zeros(rows * (HEAD + width), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = self._host.to(device, copy=True)
        self._sent = torch.cuda.Event() if self._device.is_cuda else None  # type: ignore[no-untyped-call]
        flat, self._head_size = self._host.numpy(), HEAD * rows
        self._head, self._tables = flat[: HEAD * rows].reshape(HEAD, rows), flat[HEAD * rows :].reshape(rows, width)
        self._unknown = [b"?"] * rows  # no table is this
        self._known = self._unknown  # each row's blocks
        self._rows = np.arange(rows)
        tokens, positions, slots, lens = self._device[: HEAD * rows].view(HEAD, rows)
        starts, table = torch.arange(rows + 1, device=device), self._device[HEAD * rows :].view(rows, width)
        self.batch = Batch(tokens, slots, None, AttnBatch(positions, starts, lens, table, block_size), sampled)

    def fill(self, plan: Plan) -> None:
        """Write a step's integers."""
        if self._sent is not None:
            self._sent.synchronize()  # does not wait: what was sent last was there when the step before began
        blocks = [chunk.sequence.block_table.blocks.tobytes() for chunk in plan]
        blocks += [b""] * (len(self._known) - len(plan))
        known, self._known = self._known, self._unknown  # should this fail, the next step writes all
        if has_changed := blocks != known:
            self._write_tables(blocks, known)
        self._write_head(plan)
        size = len(self._host) if has_changed else self._head_size
        self._device[:size].copy_(self._host[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        self._known = blocks

    def _write_tables(self, blocks: list[bytes], known: list[bytes]) -> None:
        for row, (mine, before) in enumerate(zip(blocks, known, strict=True)):
            if mine != before:
                ids = np.frombuffer(mine, dtype=np.int64)
                self._tables[row, : len(ids)] = ids
                self._tables[row, len(ids) :] = 0

    def _write_head(self, plan: Plan) -> None:
        count, block_size = len(plan), self.batch.attn.block_size
        positions = np.array([chunk.first for chunk in plan])
        blocks = self._tables[self._rows[:count], positions // block_size]
        self._head[:, count:] = PADDING
        self._head[1:4, :count] = positions, blocks * block_size + positions % block_size, positions + 1
        self._head[0, :count] = [_token(chunk) for chunk in plan]


@dataclass
class CudaRecorder:
    """Records with CUDA's own stream capture, which wants all kernels loaded: the work has run before."""

    pool: Any = None  # a handle of torch's

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        """The result's memory goes back to the pool, like all the work's: another recording may write there, too."""
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = work()
        place = SimpleNamespace(__cuda_array_interface__=result.__cuda_array_interface__)
        return graph.replay, torch.as_tensor(place, device=result.device)  # reads there, without keeping it
