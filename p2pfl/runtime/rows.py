"""The lines of a peer's metrics, until all that belongs to them is there."""

from __future__ import annotations

import math
import time
from collections import Counter

from torch import Tensor

from p2pfl.peer.events import Evaluated, Report
from p2pfl.runtime.setup import Row
from p2pfl.runtime.worker import Marked, Result


class Rows:
    """Rounds that have ended, and whose models are still being evaluated.

    Args:
        node: whose they are.
        examples: how many training examples it holds.
    """

    def __init__(self, node: int, examples: int) -> None:
        self._node, self._examples = node, examples
        self._rows: dict[int, tuple[Row, Tensor | None]] = {}
        self._evaluating: set[int] = set()
        self._sent: Counter[int] = Counter()
        self.start()

    def start(self, elapsed: float = 0.0) -> None:
        """Count the time from now on, of which so many seconds have gone by."""
        self._clock = time.perf_counter() - elapsed

    def sent(self, round: int, size: int) -> None:
        """Take note that so many bytes were sent in a round."""
        self._sent[round] += size

    def wait_for(self, round: int) -> None:
        """Expect an evaluation."""
        self._evaluating.add(round)

    def add(self, report: Report) -> None:
        """Take in a round that has ended."""
        row = Row(
            round=report.round,
            node=self._node,
            train_loss=report.loss,
            eval_loss=math.nan,
            eval_acc=math.nan,
            num_examples=self._examples,
            consensus_distance=math.nan,
            bytes_sent=self._sent.pop(report.round, 0),
            bytes_received=report.received,
            wall_s=time.perf_counter() - self._clock,
            virtual_s=math.nan,
        )
        self._rows[report.round] = row, None

    def note(self, result: Result) -> None:
        """Take in the sketches of a round, or how good the model is that it ended with."""
        match result:
            case Marked(round=round, mark=mark):
                row, _ = self._rows[round]
                self._rows[round] = row, mark
            case Evaluated(round=round, loss=loss, acc=acc):
                row, known = self._rows[round]
                self._rows[round] = row._replace(eval_loss=loss, eval_acc=acc), known
                self._evaluating.discard(round)

    def finished(self, at_the_end: bool = False) -> list[tuple[Row, Tensor]]:
        """Take out the rows whose evaluation is done, or was not asked for."""
        finished = []
        for number in sorted(self._rows):
            row, mark = self._rows[number]
            if mark is not None and (at_the_end or number not in self._evaluating):
                finished.append((row, mark))
                del self._rows[number]
        return finished
