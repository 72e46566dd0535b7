"""Loading: what arrives is what the file holds, in bounded memory, or an error that says what went wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
import torch
from torch import Tensor

from tests import tiny
from worker_orcd.backends.torch_ref import TorchBackend
from worker_orcd.errors import InsufficientVram, ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.models import weights
from worker_orcd.models.spec import read_spec
from worker_orcd.models.tensors import tensor_table
from worker_orcd.models.weights import RING, load_weights, read_ahead

CHUNK = 1024


class LateLane:
    """Copies begin late, on a thread of their own, one after the other: a buffer filled too soon is seen."""

    def __init__(self) -> None:
        self._copying = ThreadPoolExecutor(1)
        self.buffers: list[int] = []
        self.num_copies = self.num_arrived = 0

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    def empty(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        self.num_copies += 1

        def late() -> None:
            if self.num_copies % 7 == 0:
                sleep(0.001)
            target.copy_(source)

        done = self._copying.submit(late)
        return lambda: done.result()

    def arrive(self, target: Tensor) -> None:  # noqa: ARG002
        self.num_arrived += 1
        self._copying.submit(lambda: None).result()  # all that was begun is done


@pytest.fixture
def gguf(tmp_path: Path) -> Iterator[GgufFile]:
    with GgufFile.open(tiny.build("llama").write(tmp_path / "tiny.gguf")) as file:
        yield file


@pytest.mark.parametrize("chunk_bytes", [CHUNK, 5000, 2**24])
def test_what_goes_through_the_ring_is_what_the_file_holds(gguf: GgufFile, chunk_bytes: int) -> None:
    lane, counts = LateLane(), list[int]()
    found = 0
    for info, raw in read_ahead(gguf, lane, chunk_bytes, counts.append):
        found += 1
        assert lane.num_arrived == found
        assert raw.numpy().tobytes() == gguf.read(info.name).tobytes(), info.name
    assert found == len(gguf.tensors)
    assert sum(counts) == sum(info.nbytes for info in gguf.tensors.values())
    assert len(counts) == lane.num_copies > len(lane.buffers) or chunk_bytes > CHUNK
    assert lane.buffers == [chunk_bytes] * min(RING, lane.num_copies), "the host holds no more than the ring"


class Loading:
    """load_weights on the CPU, straight or through the ring; `react` is called at each of the five events."""

    def __init__(self, gguf: GgufFile, react: Callable[[int], object]) -> None:
        self.events: list[tuple[int, int, int]] = []
        self._gguf, self._react = gguf, react

    def __call__(self) -> weights.Weights:
        table = tensor_table(read_spec(self._gguf), self._gguf.tensors)
        return load_weights(self._gguf, table, TorchBackend(torch.device("cpu")), CHUNK, self._tell)

    def _tell(self, *event: int) -> None:
        self.events.append(event)  # type: ignore[arg-type]
        self._react(event[0])


@pytest.fixture(params=["straight", "ring"])
def is_ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "ring":
        monkeypatch.setattr(weights, "_read", lambda gguf, *rest: read_ahead(gguf, LateLane(), *rest))
    return bool(request.param == "ring")


@pytest.mark.usefixtures("is_ring")
def test_progress_is_told_five_times(gguf: GgufFile) -> None:
    loading = Loading(gguf, lambda _: None)
    loaded, total = loading(), sum(info.nbytes for info in gguf.tensors.values())
    assert [event[0] for event in loading.events] == [0, 25, 50, 75, 100]
    assert all(done * 100 >= percent * total and of == total for percent, done, of in loading.events)
    assert loaded.nbytes == total, "float32, as the file has them"


@pytest.mark.usefixtures("is_ring")
@pytest.mark.parametrize("harm", ["shrinks", "changes"])
def test_a_file_that_is_written_to_meanwhile_is_refused(gguf: GgufFile, harm: str) -> None:
    def react(percent: int) -> None:
        if percent == 25 and harm == "shrinks":
            os.truncate(gguf.path, gguf.size_bytes // 2)
        elif percent == 25:
            os.utime(gguf.path, ns=(1, 1))

    loading = Loading(gguf, react)
    with pytest.raises(ModelLoadFailed, match="load it again") as refused:
        loading()
    assert str(gguf.path) in refused.value.message
    assert loading.events[-1][0] < 100


def test_a_device_that_is_full_says_so(gguf: GgufFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TorchBackend, "pack", full)
    with pytest.raises(InsufficientVram, match="cpu is full after 0 bytes"):
        Loading(gguf, lambda _: None)()
