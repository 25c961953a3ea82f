"""What is measured of models at the end of rounds, of several at a time.

The models are `Later` ones: to mix them is shared out among threads, as it is in training.
"""

from __future__ import annotations

import math
import time

import torch

from p2pfl.learning.crew import share_out
from p2pfl.peer.events import Evaluate, Evaluated, PeerId, Report
from p2pfl.runtime.gathering import Gathering
from p2pfl.runtime.later import later
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.sketch import sketch

TOGETHER = 64  # models which wait to be measured, at most
STACKED = 16  # of them that are copied side by side


class Measuring:
    """Models that peers have reported, or want to have evaluated.

    Args:
        setup: the run.
        rounds: where what is found goes.

    Attributes:
        seconds: spent on it, mixing not included.
    """

    def __init__(self, setup: Setup, rounds: Gathering) -> None:
        self._setup, self._rounds = setup, rounds
        self._attackers = set(setup.attackers.tolist())
        self._reported: list[tuple[PeerId, Report]] = []
        self._asked: list[tuple[PeerId, Evaluate]] = []
        stop = getattr(setup.pace, "stop", None)
        # Who is to know how good its model is before it goes on does not wait for others.
        self._most = 1 if stop and stop.metric != "train_loss" else TOGETHER
        self.seconds = 0.0

    def report(self, peer: PeerId, report: Report) -> bool:
        """Take in a model that is to be compared with others; say whether to `measure` now."""
        self._reported.append((peer, report))
        return len(self._reported) >= TOGETHER

    def ask(self, peer: PeerId, evaluate: Evaluate) -> bool:
        """Take in a model that is to be evaluated; say whether to `measure` now."""
        self._asked.append((peer, evaluate))
        return len(self._asked) >= self._most

    def forget(self, peer: PeerId) -> None:
        """Evaluate nothing for a peer that is gone; what it has reported stays."""
        self._asked = [one for one in self._asked if one[0] != peer]

    def settle(self) -> None:
        """Work out the models that wait: who works out one for itself does not keep it."""
        waiting = [report.params for _, report in self._reported]
        waiting += [evaluate.params for _, evaluate in self._asked]
        laters = list(dict.fromkeys(map(later, waiting)))

        def work_out(block: slice) -> None:
            for one in laters[block]:
                one.now()

        share_out(work_out, len(laters), STACKED, self._setup.task.parallel)

    def measure(self) -> list[tuple[PeerId, Evaluated]]:
        """Measure all that waits for it, and return what to tell whom."""
        self.settle()
        began = time.perf_counter()
        reported, self._reported = self._reported, []
        for peer, report in reported:
            self._mark(peer, report)
        asked, self._asked = self._asked, []
        cuts = [slice(start, start + STACKED) for start in range(0, len(asked), STACKED)]
        told = [one for cut in cuts for one in self._evaluated(asked[cut])]
        self.seconds += time.perf_counter() - began
        return told

    def _mark(self, peer: PeerId, report: Report) -> None:
        mark = sketch(later(report.params).params)
        if peer in self._attackers:
            mark = torch.full_like(mark, math.nan)
        self._rounds.marked(peer, report.round, mark)

    def _evaluated(self, asked: list[tuple[PeerId, Evaluate]]) -> list[tuple[PeerId, Evaluated]]:
        models = torch.cat([later(one.params).params for _, one in asked])
        nodes = torch.tensor([peer for peer, _ in asked])
        scores = self._setup.task.evaluate(models, nodes)
        each = zip(asked, *(field.tolist() for field in scores), strict=True)
        told = [(peer, Evaluated(one.round, loss, acc)) for (peer, one), loss, acc in each]
        for peer, one in told:
            self._rounds.evaluated(peer, one.round, one.loss, one.acc)
        return told
