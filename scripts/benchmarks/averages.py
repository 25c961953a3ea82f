"""The average of several models that have been received, and the memory it takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from threading import Condition
from typing import cast

import torch
from crowd import Measured, Meeting, Memory, together
from torch import Tensor

from p2pfl.algorithm import Rows
from p2pfl.algorithms.averaging import Params, dpsgd
from p2pfl.learning.optim import sgd
from p2pfl.learning.scratch import Pool, keep_freed_memory
from p2pfl.peer.letters import Letters, unstacked
from p2pfl.runtime import chunks, flows, wire
from p2pfl.runtime.flows import Expected, Inflow
from p2pfl.runtime.streams import streaming
from p2pfl.runtime.wire import Header, Kind

WARM_UP, TIMES = 1, 5
PHASE, RUN = 0, bytes(8)
Models = Sequence[Tensor]
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
        seconds.append(RIVALS[rival](rows))
    return statistics.median(seconds[WARM_UP:]), memory.grown()


def _timed(average: Callable[[Models], object]) -> Callable[[Models], float]:
    def seconds(rows: Models) -> float:
        began = time.perf_counter()
        made = average(rows)
        taken = time.perf_counter() - began
        del made  # only now: it is the next one's memory
        return taken

    return seconds


def _stacked(rows: Models) -> Tensor:
    return torch.stack([*rows]).mean(0)


def _one_by_one(rows: Models) -> Tensor:
    total = torch.zeros_like(rows[0])
    for row in rows:
        total.add_(row, alpha=1 / len(rows))
    return total


def _read(rows: Models) -> float:
    return sum(float(row.sum()) for row in rows)


def _whole(rows: Models) -> Tensor:
    letters = unstacked([1 / len(rows)] * len(rows), [Params(row) for row in rows], 0)
    letters.into.append(_POOL.empty(tuple(rows[0].shape), rows[0].dtype))
    return letters.mix(letters.heard.x)


def _arriving(rows: Models) -> float:
    """Mix models chunk by chunk as a peer does, whose own is the first; what comes is copied."""
    keep_freed_memory()
    own, arrival = rows[0], _Arrival(rows[1:])
    algorithm = dpsgd(sgd(0.1))
    mixing = streaming(algorithm, lambda: math.inf, arrival.next, _POOL.empty)
    weights = torch.full((1, len(rows)), 1 / len(rows), dtype=torch.float64)
    heard = cast(Tensor, (own, *arrival.streams))  # as a wide field of letters is
    inbox = Letters(weights, Params(heard), own=torch.tensor([0]))
    state = algorithm.init(own, Rows(torch.tensor([0]), torch.tensor([1])))
    before = arrival.seconds
    return _timed(lambda _: mixing.receive(state, inbox))(rows) + before - arrival.seconds


class _Arrival:
    """Models that come in chunk by chunk, of all senders alike."""

    def __init__(self, rows: Models) -> None:
        schema, news = chunks.schema(Params(rows[0])), Condition()
        expected = Expected(schema, flows.window(schema, len(rows)), news=news)
        self.streams: list[Tensor] = []
        self.seconds = 0.0
        self._at = 0
        self._flows = []
        for k, row in enumerate(rows):
            inflow = Inflow()
            inflow.expect(PHASE, expected)
            header = Header(Kind.CHUNK, RUN, PHASE, k + 1, 0, 1, 0.0)
            self._flows.append((inflow, chunks.Outgoing(header, Params(row))))
        self.next()

    def next(self) -> None:
        """Let the next chunk of everybody come in."""
        began = time.perf_counter()
        for inflow, outgoing in self._flows:
            if self._at < len(outgoing):
                inflow.owed()
                frames = [frame.buffer for frame in outgoing.chunk(self._at, checked=False)]
                copies = [memoryview(bytearray(frame)) for frame in frames]
                if model := inflow.take(wire.unpack(copies[0]), copies[1:]):
                    self.streams.append(model.message[0])
        self._at += 1
        self.seconds += time.perf_counter() - began


RIVALS: dict[str, Callable[[Models], float]] = {
    "torch.stack(...).mean(0)": _timed(_stacked),
    "add_, model by model": _timed(_one_by_one),
    "only to read them: sum()": _timed(_read),
    "p2pfl, when all are there": _timed(_whole),
    "p2pfl, as they come in": _arriving,
}
