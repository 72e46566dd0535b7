"""Three ways to put a Pair through its paces: by Hypothesis, by the million, and exhaustively."""

from __future__ import annotations

import itertools
import pickle
import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.kv.model import KINDS, Job, Pair

tenants, texts = st.sampled_from("ab"), st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)
spares, indices = st.integers(0, 2), st.integers(0, 100)


class AllocatorMachine(RuleBasedStateMachine):
    """Finds short counterexamples."""

    @initialize(num_blocks=st.integers(1, 8), block_size=st.sampled_from([1, 2, 4]), kind=st.sampled_from(KINDS))
    def build(self, num_blocks: int, block_size: int, kind: str) -> None:
        self.pair = Pair(num_blocks, block_size * (8 if kind == "contiguous" else 1), kind)

    def job(self, index: int) -> Job:
        return self.pair.jobs[index % len(self.pair.jobs)]

    def has_jobs(self) -> bool:
        return bool(self.pair.jobs)

    @rule(tenant=tenants, text=texts, spare=spares)
    def admit(self, tenant: str, text: tuple[int, ...], spare: int) -> None:
        self.pair.admit(tenant, text[: 2 * self.pair.block_size + 1], spare)

    @precondition(has_jobs)
    @rule(index=indices, more=texts, spare=spares)
    def extend(self, index: int, more: tuple[int, ...], spare: int) -> None:
        self.pair.extend(self.job(index), more, spare)

    @precondition(has_jobs)
    @rule(index=indices, fewer=st.integers(0, 3))
    def publish(self, index: int, fewer: int) -> None:
        self.pair.publish(self.job(index), max(0, len(self.job(index).text) - fewer))

    @precondition(has_jobs)
    @rule(index=indices)
    def finish(self, index: int) -> None:
        self.pair.publish(self.job(index), len(self.job(index).text))
        self.pair.release(self.job(index))

    @precondition(has_jobs)
    @rule(index=indices, how=st.sampled_from(["release", "preempt", "condemn", "use_closed"]))
    def interrupt(self, index: int, how: str) -> None:
        getattr(self.pair, how)(self.job(index))

    @precondition(has_jobs)
    @rule(by_pressure=st.booleans())
    def reclaim(self, by_pressure: bool) -> None:
        """Idle blocks are given up, to someone who takes all there is, or to nobody."""
        everything = (9,) * (self.pair.allocator.available() * self.pair.block_size)
        if not by_pressure:
            self.pair.drop_cache()
        elif everything and (job := self.pair.admit("b", everything)) is not None:
            self.pair.release(job)

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.finish()


def drive(seed: int, num_operations: int) -> None:
    """Random operations on a random pool of 1 to 64 blocks; an alphabet of 3 makes texts collide."""
    rng = random.Random(seed)
    pair = Pair(
        rng.choice([1, 2, 3, 5, 8, 16, 64]), rng.choice([1, 2, 4, 16]), rng.choice([*KINDS, "shared", "shared"])
    )
    longest, most = rng.randint(1, 6) * pair.block_size + 1, rng.randint(1, 12)
    for _ in range(num_operations):
        job = rng.choice(pair.jobs) if pair.jobs else None
        text = tuple(rng.choices(range(3), weights=[8, 1, 1], k=rng.randint(1, longest)))
        match rng.choices(
            ["admit", "extend", "publish", "release", "preempt", "condemn", "drop"], [9, 9, 12, 3, 3, 1, 0.2]
        ):
            case ["admit"] if len(pair.jobs) < most:
                pair.admit(rng.choice("aab"), text, rng.choice([0, 0, 1]))
            case ["drop"]:
                pair.drop_cache()
            case ["extend"] if job is not None and len(job.text) < 3 * longest:
                pair.extend(job, text, rng.choice([0, 0, 1]))
            case ["publish"] if job is not None:
                pair.publish(job, rng.randint(0, len(job.text)))
            case ["preempt"] if job is not None:
                pair.preempt(job)
            case ["condemn"] if job is not None:
                pair.condemn(job)
            case _ if job is not None:
                pair.release(job)
        pair.check()
    pair.finish()


def drive_all(num_operations: int, first_seed: int = 0, each: int = 1000) -> None:
    for seed in range(first_seed, first_seed + num_operations // each):
        try:
            drive(seed, each)
        except Exception as error:
            raise AssertionError(f"drive({seed}, {each}) fails") from error


def search(depth: int) -> int:
    """Every sequence of `depth` operations of up to 3 jobs on 3 blocks of 2 slots; returns the number of states.

    Breadth first, so that the first failure is a shortest one. From each state of the model one way is followed.
    """
    layer: list[tuple[bytes, tuple[Operation, ...]]] = [(pickle.dumps(Pair(3, 2)), ())]
    seen = {hash(Pair(3, 2).state())}
    for _ in range(depth):
        following = []
        for frozen, path in layer:
            for operation in _operations(_thaw(frozen)):
                pair = _thaw(frozen)
                try:
                    _apply(pair, *operation)
                    pair.check()
                except Exception as error:
                    raise AssertionError(f"fails after {[*path, operation]}") from error
                if (state := hash(pair.state())) not in seen:
                    seen.add(state)
                    following.append((pickle.dumps(pair), (*path, operation)))
        layer = following
    return len(seen)


Operation = tuple[str, int | str, tuple[int, ...]]  # what, to which job or by which tenant, with which text
STARTS = [text for length in (1, 2, 3) for text in itertools.product((0, 1), repeat=length)]


def _operations(pair: Pair) -> list[Operation]:
    found: list[Operation] = [("drop_cache", 0, ())]
    if len(pair.jobs) < 3:
        found += [("admit", tenant, text) for tenant in "ab" for text in STARTS]
    for index, job in enumerate(pair.jobs):
        found += [(what, index, ()) for what in ("publish", "release", "condemn")]
        if len(job.text) < pair.num_blocks * pair.block_size:
            found += [("extend", index, (symbol,)) for symbol in (0, 1)]
    return found


def _apply(pair: Pair, what: str, where: int | str, text: tuple[int, ...]) -> None:
    if what == "drop_cache":
        pair.drop_cache()
    elif isinstance(where, str):
        pair.admit(where, text)
    elif what == "extend":
        pair.extend(pair.jobs[where], text)
    elif what == "publish":
        pair.publish(pair.jobs[where], len(pair.jobs[where].text))
    else:
        getattr(pair, what)(pair.jobs[where])


def _thaw(frozen: bytes) -> Pair:
    pair: Pair = pickle.loads(frozen)  # noqa: S301 - made by ourselves a moment ago
    return pair
