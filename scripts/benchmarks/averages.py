"""The average of several models that have been received, and the memory it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from crowd import Measured, Meeting, Memory, together
from torch import Tensor

from p2pfl.algorithms.averaging import Params
from p2pfl.learning.scratch import Pool
from p2pfl.peer.letters import unstacked

WARM_UP, TIMES = 1, 5
_POOL = Pool(0)


def measure(rival: str, models: int, params: int) -> Measured:
    """Return the median time of one of the `RIVALS`, with one thread, in a process of its own."""
    (found,) = together(_work, 1, rival, models, params)
    return Measured(*found)


def _work(rank: int, meeting: Meeting, rival: str, models: int, params: int) -> tuple[float, float]:
    torch.set_num_threads(1)
    rows, seconds = [torch.randn(1, params) for _ in range(models)], []
    memory = Memory()
    for _ in range(WARM_UP + TIMES):
        began = time.perf_counter()
        mean = RIVALS[rival](rows)
        seconds.append(time.perf_counter() - began)
        del mean
    return statistics.median(seconds[WARM_UP:]), memory.grown()


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([*rows]).mean(0)


def _one_by_one(rows: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(rows[0])
    for row in rows:
        total.add_(row, alpha=1 / len(rows))
    return total


def _ours(rows: Sequence[Tensor]) -> Tensor:
    letters = unstacked([1 / len(rows)] * len(rows), [Params(row) for row in rows], 0)
    letters.into.append(_POOL.empty(tuple(rows[0].shape), rows[0].dtype))
    return letters.mix(letters.heard.x)


RIVALS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "torch.stack(...).mean(0)": _stacked,
    "add_, model by model": _one_by_one,
    "p2pfl": _ours,
}
