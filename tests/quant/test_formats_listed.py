"""The torch-free list of runnable types is the table of formats."""

from worker_orcd.quant.format import FORMATS
from worker_orcd.quant.types import RUNNABLE


def test_both_lists_agree() -> None:
    assert set(FORMATS) == RUNNABLE
