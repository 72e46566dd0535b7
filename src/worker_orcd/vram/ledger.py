"""What is set aside on a device, by purpose: every tensor that stays, by name, and what is kept for steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from worker_orcd.backends.base import Rope

TOLERANCE = 0.02  # of what the driver says is taken
UNCOUNTED_BYTES = 160 * 2**20  # code of kernels and libraries, which the driver counts and no ledger can
OURS = "worker_orcd."  # only into objects of our own classes is looked
NOT_OWNED = frozenset({"backend"})


class Ledger:
    """Tensors are entered as they are allocated; memory that several share counts once, for the first."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._purposes: dict[int, tuple[str, int]] = {}  # by address: what for, and how much

    def enter(self, purpose: str, name: str, thing: object) -> None:
        """All tensors that `thing` holds; those of rotation tables have a purpose of their own."""
        for path, owner, tensor in _tensors_in(thing, name, purpose, set()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._purposes:
                self._purposes[storage.data_ptr()] = owner, storage.nbytes()
                self.tensors[path] = tensor

    def by_purpose(self) -> dict[str, int]:
        totals = Counter[str]()
        for purpose, nbytes in self._purposes.values():
            totals[purpose] += nbytes
        return dict(totals)

    def with_workspace(self, held_bytes: int) -> dict[str, int]:
        """As `by_purpose`; the rest of what torch's allocator holds is for the steps."""
        known = self.by_purpose()
        return known | {"workspace": max(0, held_bytes - sum(known.values()))}


def _tensors_in(thing: Any, path: str, purpose: str, seen: set[int]) -> Iterator[tuple[str, str, Tensor]]:
    if isinstance(thing, Tensor):
        yield path, purpose, thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Mapping):
        parts = [(str(key), value) for key, value in thing.items()]
    elif isinstance(thing, list | tuple):
        parts = [(str(i), value) for i, value in enumerate(thing)]
    elif type(thing).__module__.startswith(OURS):
        parts = [(key, value) for key, value in getattr(thing, "__dict__", {}).items() if key not in NOT_OWNED]
    else:
        return
    purpose = "rope_tables" if isinstance(thing, Rope) else purpose
    for key, value in parts:
        yield from _tensors_in(value, f"{path}.{key}", purpose, seen)


def disagreement(memory: Mapping[str, int], taken_bytes: int, planned_workspace_bytes: int) -> str:
    """What the ledger and others see differently; empty when they agree."""
    known, found = sum(memory.values()), []
    if abs(taken_bytes - known) > max(TOLERANCE * taken_bytes, UNCOUNTED_BYTES):
        found.append(f"the driver says {taken_bytes} bytes were taken, the ledger {known}")
    if memory.get("workspace", 0) > planned_workspace_bytes:
        found.append(f"steps took {memory['workspace']} bytes of workspace, {planned_workspace_bytes} were planned")
    return "; ".join(found)
