"""From logits to the next token, for all rows of a step at once, on the device that holds the logits.

Order: logit bias and masks → repetition, presence and frequency penalty → temperature → top-k → top-p → min-p → one
draw by inverse CDF. Temperature 0 is argmax (lowest id among equals) after the penalties. Requests that use more, or
another order, form groups of their own (engine/filters.py).

A row's token must not depend on its neighbours, but the order in which a device adds up a row may. So probabilities
become integers, in units of 2^-40 of the likeliest token's: integer sums are exact in every order. What is rarer than
half a unit is never drawn, less than 10^-6 of the mass for any vocabulary. The draw is a counter-based function of
(seed, sample index, position), so history cannot matter either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker_orcd.backends.base import SampleKernel
from worker_orcd.engine import filters
from worker_orcd.engine.draws import draws
from worker_orcd.engine.filters import FILTERS, MIN_TEMPERATURE, Program, dry_penalties, has_penalty, weigh
from worker_orcd.engine.grammar import fill_masks
from worker_orcd.engine.pack import overwrite, to_device
from worker_orcd.engine.sequence import Sequence

MIN_PENALTY = 1e-6  # a repetition penalty of 0 is legal; it divides
ROW_TILE = 8  # rows worked on at once: bounds the float64 and int64 copies of the logits
KERNEL: Program = ("kernel",)  # the rows that one kernel of the backend samples


def parameters(rows: list[Sequence]) -> NDArray[np.float64]:
    """[6, R]: temperature (1 for greedy rows), greedy, top-k (huge when off), top-p, min-p, the draw.

    Draws are made when any row needs one.
    """
    params = [seq.request.sampling for seq in rows]
    greedy = [p.temperature < MIN_TEMPERATURE for p in params]
    columns = [
        [1.0 if is_greedy else p.temperature for p, is_greedy in zip(params, greedy, strict=True)],
        greedy,
        [p.top_k or 2**62 for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [0.0] * len(rows) if all(greedy) else draws(rows),
    ]
    return np.array(columns, dtype=np.float64)  # top-k is at most 2^53 or off


@dataclass(frozen=True)
class Entries:
    """Values for a few ids of each of R rows."""

    values: Tensor  # f64 [K, P], K for each (row, id) below
    rows: Tensor  # i64 [P]
    ids: Tensor  # i64 [P]
    starts: list[int]  # [R + 1], where the entries of each row begin
    largest_id: int = 0  # as far as the host knows

    @classmethod
    def of(cls, entries: list[list[tuple[int, float]]], device: torch.device) -> Entries | None:
        """One list of (id, value) a row; None when all are empty."""
        sizes = [len(row) for row in entries]
        if not any(sizes):
            return None
        rows = np.repeat(np.arange(len(entries)), sizes)
        ids = np.array([token for row in entries for token, _ in row], dtype=np.int64)
        values = np.array([[value for row in entries for _, value in row]], dtype=np.float64)
        columns = to_device(np.stack([rows, ids]), device)
        starts = [0, *np.cumsum(sizes).tolist()]
        return cls(to_device(values, device), columns[0], columns[1], starts, int(ids.max()))

    def tile(self, first: int, last: int) -> Entries:
        """Those of rows `first` to `last - 1`."""
        starts = self.starts[first : last + 1]
        mine = slice(starts[0], starts[-1])  # known to the host: a mask would make it wait for the device
        starts = [start - starts[0] for start in starts]
        return Entries(self.values[:, mine], self.rows[mine] - first, self.ids[mine], starts, self.largest_id)

    def add_to(self, scores: Tensor, sign: float = 1.0) -> None:
        assert self.largest_id < scores.shape[1], "an id past the vocabulary would end the device's work for good"
        scores.index_put_((self.rows, self.ids), self.values[0] * sign, accumulate=True)


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling parameters of R rows as columns [R, 1], on the device of the logits."""

    temperature: Tensor  # f64; 1 for greedy rows
    is_greedy: Tensor  # bool
    top_k: Tensor  # i64; the largest integer when off
    top_p: Tensor  # f64
    min_p: Tensor  # f64
    uniform: Tensor  # f64, the draw
    history: Entries | None  # [3, P] repetition, presence, frequency of generated ids; as often as they came
    bias: Entries | None  # [1, P] added to the logits
    mask: Tensor | None  # i32 [R, V / 32], bit for bit the ids a grammar allows
    has_filters: bool  # top-k, top-p or min-p in any row
    is_all_greedy: bool
    program: Program  # the same for all rows
    columns: dict[str, Tensor]  # f64, the parameters of its filters
    dry: Entries | None  # [1, P] subtracted from the scores

    @classmethod
    def of(
        cls,
        rows: list[Sequence],
        last_sampled: Tensor | None,
        device: torch.device,
        program: Program = (),
        eog_ids: frozenset[int] = frozenset(),
    ) -> SamplingBatch:
        """For the next token of each sequence. Ids the host does not know yet come from `last_sampled` [R before]."""
        params = [seq.request.sampling for seq in rows]
        table = parameters(rows)
        floats = to_device(table, device).unsqueeze(-1)
        coins = draws(rows, stream=1) if "xtc" in program else np.zeros(len(rows))
        dry = [[*dry_penalties(s.tokens, s.request.sampling).items()] for s in rows] if "dry" in program else []
        return cls(
            floats[0], floats[1] > 0, floats[2].long(), floats[3], floats[4], floats[5],
            history=_history(rows, last_sampled, device) if any(map(has_penalty, params)) else None,
            bias=_bias(rows, eog_ids, device) if any(seq.has_bias for seq in rows) else None,
            mask=_mask(rows, eog_ids, device) if any(seq.matcher is not None for seq in rows) else None,
            has_filters=not program and any(p.top_k or p.top_p < 1.0 or p.min_p for p in params),
            is_all_greedy=bool(table[1].all()),
            program=program,
            columns=_columns(rows, program, coins, device),
            dry=Entries.of(dry, device),
        )  # fmt: skip

    def tile(self, first: int, last: int) -> SamplingBatch:
        """Rows `first` to `last - 1`."""
        rows = slice(first, last)
        history, bias, dry = (e and e.tile(first, last) for e in (self.history, self.bias, self.dry))
        return SamplingBatch(
            self.temperature[rows], self.is_greedy[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows],
            self.uniform[rows], history, bias, None if self.mask is None else self.mask[rows],
            self.has_filters, self.is_all_greedy, self.program,
            {name: column[rows] for name, column in self.columns.items()}, dry,
        )  # fmt: skip


def _bias(rows: list[Sequence], eog_ids: frozenset[int], device: torch.device) -> Entries | None:
    """The request's own, and -inf for ids that may not end the answer; under a grammar its mask sees to those."""
    entries = [[*seq.request.sampling.logit_bias.items()] for seq in rows]
    for seq, own in zip(rows, entries, strict=True):
        if seq.matcher is None:
            own += [(token, -np.inf) for token in seq.banned_ids(eog_ids)]
    return Entries.of(entries, device)


def _mask(rows: list[Sequence], eog_ids: frozenset[int], device: torch.device) -> Tensor:
    masks = fill_masks([seq.matcher for seq in rows], [seq.banned_ids(eog_ids) for seq in rows])
    return to_device(masks, device)


def _columns(
    rows: list[Sequence], program: Program, coins: NDArray[np.float64], device: torch.device
) -> dict[str, Tensor]:
    names = sorted({name for step in program if step in FILTERS for name in FILTERS[step][1]})
    params = [seq.request.sampling for seq in rows]
    values = [coins if name == "coin" else [getattr(p, name) for p in params] for name in names]
    if "mirostat" in program:
        names.append("mirostat")
        values.append([filters.mirostat_share(seq.request.sampling, seq.mirostat_mu) for seq in rows])
    if not names:
        return {}
    table = to_device(np.array(values, dtype=np.float64), device).unsqueeze(-1)
    return dict(zip(names, table, strict=True))


def _history(rows: list[Sequence], last_sampled: Tensor | None, device: torch.device) -> Entries:
    """The penalties of every generated token of rows with any."""
    penalties, owners, ids, starts = list[tuple[float, float, float]](), list[int](), list[int](), [0]
    late_at, late_sources = list[int](), list[int]()
    for row, seq in enumerate(rows):
        p = seq.request.sampling
        if has_penalty(p):
            ids += seq.generated
            if seq.num_unknown:
                late_at.append(len(ids))
                late_sources.append(seq.sampled_row)
                ids.append(0)
            owners += [row] * (len(ids) - starts[-1])
            own = max(p.repetition_penalty, MIN_PENALTY), p.presence_penalty, p.frequency_penalty
            penalties += [own] * (len(ids) - starts[-1])
        starts.append(len(ids))
    columns = to_device(np.array([owners, ids], dtype=np.int64), device)
    if late_at:
        assert last_sampled is not None
        late = to_device(np.array([late_at, late_sources], dtype=np.int64), device)
        columns[1, late[0]] = last_sampled[late[1]]
    values = np.array(penalties, dtype=np.float64).reshape(-1, 3)
    return Entries(to_device(np.ascontiguousarray(values.T), device), columns[0], columns[1], starts)


class Choice(NamedTuple):
    """The next tokens of R rows."""

    both: Tensor  # i64 [2, R]: ids; 0 where the logits are not finite, or nothing is allowed: the id means nothing
    surprise: Tensor | None = None  # f64 [R] bits, what mirostat wants to know; where it is not used it means nothing

    @property
    def ids(self) -> Tensor:
        return self.both[0]

    @property
    def is_finite(self) -> Tensor:
        return self.both[1]


@dataclass
class Group:
    """Rows of one program; kept while steps have the same sequences in the same order."""

    program: Program
    rows: list[Sequence]
    places: Tensor | None = None  # i64, where they stand in the step; None: they are all of it
    _table: Tensor | None = None
    is_greedy: bool = False  # all of it; known from the first table on

    def table(self, device: torch.device) -> Tensor:
        """Of `parameters`, for the kernel. From step to step only the draws change."""
        if self._table is None:
            table = parameters(self.rows)
            self._table, self.is_greedy = to_device(table, device), bool(table[1].all())
        elif not self.is_greedy:
            overwrite(self._table[5], draws(self.rows))
        return self._table


class Sampler:
    """Chooses tokens; `unsampleable` ids (padding and unused rows of the vocabulary) never win.

    `eog_ids` end an answer: what `min_tokens` and `ignore_eos` keep from being drawn.
    """

    def __init__(
        self,
        unsampleable: list[int],
        device: torch.device,
        eog_ids: frozenset[int] = frozenset(),
        kernel: SampleKernel | None = None,
    ) -> None:
        """`kernel` takes the rows whose logits need no change; without it torch samples all."""
        self.unsampleable = torch.tensor(unsampleable, dtype=torch.int64, device=device)
        self._eog_ids, self._kernel = eog_ids, kernel
        self._rows: list[Sequence] = []  # of the last step
        self._groups = [Group((), [])]
        self._order: Tensor | None = None

    def choose(
        self, logits: Tensor, rows: list[Sequence], last_sampled: Tensor | None, place: Tensor | None = None
    ) -> Choice:
        """For every sequence the token after its logits [R, V]; those of one program are sampled together.

        The kernel writes to `place` i64 if all rows are its own; nobody then reads `last_sampled`, perhaps there.
        """
        if rows != self._rows:
            self._groups, self._order = self._grouped(rows, logits.device)
            self._rows = rows
        if self._order is None:
            return self._choose(logits, self._groups[0], last_sampled, place)
        choices = [self._choose(logits, group, last_sampled, None) for group in self._groups]
        surprises = [c.ids.double() if c.surprise is None else c.surprise for c in choices]
        has_surprise = any(choice.surprise is not None for choice in choices)
        both = torch.cat([choice.both for choice in choices], 1).index_select(1, self._order)
        return Choice(both, torch.cat(surprises)[self._order] if has_surprise else None)

    def _grouped(self, rows: list[Sequence], device: torch.device) -> tuple[list[Group], Tensor | None]:
        """The groups, and where each row's choice stands among theirs; None when there is one group."""
        members: dict[Program, list[int]] = {}
        for row, seq in enumerate(rows):
            members.setdefault(self._program(seq), []).append(row)
        if len(members) < 2:
            return [Group(next(iter(members), ()), rows)], None
        groups = [
            Group(program, [rows[row] for row in places], to_device(np.array(places), device))
            for program, places in members.items()
        ]
        return groups, to_device(np.argsort(np.concatenate([*members.values()])), device)

    def _choose(self, logits: Tensor, group: Group, last_sampled: Tensor | None, place: Tensor | None) -> Choice:
        mine = logits if group.places is None else logits[group.places]
        if group.program == KERNEL:
            assert self._kernel is not None
            return Choice(self._kernel(mine, group.table(logits.device), place, group.is_greedy))
        batch = SamplingBatch.of(group.rows, last_sampled, logits.device, group.program, self._eog_ids)
        ids, is_finite, *surprise = self.sample(mine, batch)
        return Choice(torch.stack([ids, is_finite.long()]), *surprise)

    def _program(self, seq: Sequence) -> Program:
        """Depends on the sequence alone, so that its tokens do not depend on who is sampled with it."""
        if seq.program is None:
            seq.program = filters.program(seq.request.sampling)
        is_plain = not (seq.program or has_penalty(seq.request.sampling) or seq.has_bias or seq.matcher)
        return KERNEL if self._kernel is not None and is_plain else seq.program

    def sample(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, ...]:
        """The fields of a Choice for `logits` [R, V]."""
        tiles = range(0, len(logits), ROW_TILE)
        parts = [self._sample(logits[i : i + ROW_TILE], batch.tile(i, i + ROW_TILE)) for i in tiles]
        if not parts:
            return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0, dtype=torch.bool)
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _sample(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, ...]:
        is_finite = torch.isfinite(logits).all(-1)
        scores = torch.where(is_finite[:, None], logits, 0.0).double()
        scores[:, self.unsampleable] = -torch.inf
        if batch.bias is not None or batch.mask is not None:
            is_finite &= constrain(scores, batch)
        scores = adjusted(scores, batch)
        best = scores.argmax(-1)
        if batch.is_all_greedy:
            return best, is_finite
        weights = weigh(scores)
        if "mirostat" in batch.program:
            ids, surprise = _draw_by_surprise(weights, best, batch)
            return ids, is_finite, surprise
        if batch.has_filters:
            weights = filtered(scores, weights, batch)
        return torch.where(batch.is_greedy[:, 0], best, draw(weights, batch.uniform)), is_finite


def constrain(scores: Tensor, batch: SamplingBatch) -> Tensor:
    """Apply logit bias and mask in place; bool [R] says where a token is left, elsewhere the scores become 0."""
    if batch.bias is not None:
        batch.bias.add_to(scores)
    if batch.mask is not None:
        bits = batch.mask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=scores.device) & 1
        scores.masked_fill_(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)
    has_token = scores.amax(-1) > -torch.inf
    scores.masked_fill_(~has_token[:, None], 0.0)
    return has_token


def adjusted(scores: Tensor, batch: SamplingBatch) -> Tensor:
    """The scores after the filters of the batch's program; of the usual ones, those that remove nothing."""
    if not batch.program:
        penalize(scores, batch)
        return scores.div_(batch.temperature)
    for name in batch.program:
        if name == "penalties":
            penalize(scores, batch)
        elif name == "dry" and batch.dry is not None:
            batch.dry.add_to(scores, -1.0)
        elif name in FILTERS:
            function, parameters = FILTERS[name]
            scores = function(scores, *(batch.columns[parameter] for parameter in parameters))
    return scores


def penalize(scores: Tensor, batch: SamplingBatch) -> None:
    """The three penalties on scores [R, V] of generated ids, in place; over the answer only.

    Repetition (Keskar et al., arXiv:1909.05858, section 4.1): divide positive and multiply negative scores, each id
    once. Presence: subtract once. Frequency: subtract as often as the id came (both as in OpenAI's API).
    """
    if (seen := batch.history) is None:
        return
    repetition, presence, frequency = seen.values
    score = scores[seen.rows, seen.ids]
    changed = torch.where(score > 0, score / repetition, score * repetition) - presence
    scores[seen.rows, seen.ids] = changed  # doubles write the same value
    scores.index_put_((seen.rows, seen.ids), -frequency, accumulate=True)


def filtered(scores: Tensor, weights: Tensor, batch: SamplingBatch) -> Tensor:
    """Weights i64 [R, V] with 0 for what top-k, top-p (arXiv:1904.09751) or min-p (arXiv:2407.01082) leaves out."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ordered = weights.gather(-1, order)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    ordered = ordered * (rank < batch.top_k)
    before = ordered.cumsum(-1) - ordered  # the mass of everything likelier
    is_off = batch.top_p >= 1.0  # said, not computed: float64 rounds the sums of a large vocabulary
    is_kept = is_off | (before < batch.top_p * ordered.sum(-1, keepdim=True))
    is_kept &= ordered >= batch.min_p * ordered[:, :1]
    is_kept[:, 0] = True
    return torch.zeros_like(weights).scatter_(-1, order, ordered * is_kept)


def _draw_by_surprise(weights: Tensor, best: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Mirostat 2: draw among tokens of at least the row's share, or the likeliest; ids [R] and their surprise [R]."""
    total = weights.sum(-1, keepdim=True)
    is_kept = (weights >= batch.columns["mirostat"] * total).scatter_(-1, best[:, None], True)
    ids = draw(weights * is_kept, batch.uniform)
    drawn = weights.gather(-1, ids[:, None]).double()
    return ids, torch.log2(total.double() / drawn)[:, 0]


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index [R] of the first entry whose running sum exceeds `uniform` [R, 1] of the total; weight 0 never wins."""
    total = weights.sum(-1, keepdim=True)
    target = torch.minimum((uniform * total).long(), total - 1)
    return (weights.cumsum(-1) <= target).sum(-1)
