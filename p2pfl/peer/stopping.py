"""Stopping together: every peer scores its own progress, and all agree on the lowest score.

A stopping rule is written for a block of rows, like everything else. It turns a metric
into a score, and asks for the run to stop once *every* node's score has reached a
threshold. Peers find the lowest score without a server: each message carries the lowest
its sender has heard of, and after as many rounds as the network is wide everybody holds
the same number, so everybody stops after the same round. Who misses a message cannot know
what it would have said, and takes it for a no. Nor is anything concluded from rounds in which,
as links were drawn, not everybody could hear of everybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.learning.checks import require

Metric = Literal["train_loss", "eval_loss", "eval_acc"]


class Progress(NamedTuple):
    """What a rule remembers of each node, ``[rows]`` each."""

    smooth: Tensor  # running mean of the metric
    best: Tensor  # the best it has been
    since: Tensor  # measurements since then
    score: Tensor


class StopRule(NamedTuple):
    """When to stop.

    Attributes:
        metric: what is watched; ``"eval_..."`` only moves in rounds with an evaluation.
        threshold: all scores must reach it.
        update: memory and metric ``[rows]`` (NaN: not measured) to memory with new scores.
    """

    metric: Metric
    threshold: float
    update: Callable[[Progress, Tensor], Progress]

    def start(self, rows: int) -> Progress:
        """Return what is remembered at the outset."""
        none = torch.full((rows,), math.nan, dtype=torch.float64)
        return Progress(none, none, torch.zeros_like(none), torch.full_like(none, -math.inf))


def plateau(
    metric: Metric = "train_loss",
    patience: int = 20,
    min_delta: float = 1e-3,
    smoothing: float = 0.9,
) -> StopRule:
    """Stop when no node has improved by `min_delta` for `patience` measurements.

    The metric of each node is smoothed by an exponential running mean first (`smoothing` in
    [0, 1), 0 to switch it off).
    """
    require(math.isfinite(min_delta), "min_delta", min_delta, "a finite number")
    if patience < 1:
        raise ValueError(f"patience = {patience} is below 1")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing = {smoothing} is not in [0, 1)")
    sign = 1.0 if metric == "eval_acc" else -1.0

    def update(p: Progress, value: Tensor) -> Progress:
        known = ~value.isnan()
        smooth = torch.where(
            p.smooth.isnan(), value, smoothing * p.smooth + (1 - smoothing) * value
        )
        better = p.best.isnan() | (sign * (smooth - p.best) > min_delta)
        best = torch.where(better, smooth, p.best)
        since = torch.where(better, 0.0, p.since + 1)
        fresh = Progress(smooth, best, since, since)
        return Progress(*(torch.where(known, a, b) for a, b in zip(fresh, p, strict=True)))

    return StopRule(metric, float(patience), update)


def target(value: float, metric: Metric = "eval_acc") -> StopRule:
    """Stop when every node has reached `value`: at least for accuracy, at most for a loss."""
    require(math.isfinite(value), "value", value, "a finite number")
    sign = 1.0 if metric == "eval_acc" else -1.0

    def update(p: Progress, measured: Tensor) -> Progress:
        return p._replace(score=torch.where(measured.isnan(), p.score, sign * measured))

    return StopRule(metric, sign * value, update)


STOP_RULES: dict[str, Callable[..., StopRule]] = {"plateau": plateau, "target": target}


class Agreement:
    """The part of some nodes in finding the lowest score, in windows of `width` rounds.

    A peer is one node and hears the others; the simulator is all of them and hears nobody.

    Args:
        rule: when to stop; None: never.
        width: the number of rounds after which what anybody said has reached everybody.
        nodes: how many this is.
        floods: where that is not certain, whether it is so of what is said in a given round.
    """

    def __init__(
        self,
        rule: StopRule | None,
        width: int,
        nodes: int = 1,
        floods: Callable[[int], bool] = lambda round: True,
    ) -> None:
        self._rule, self._width, self._floods = rule, width, floods
        self.progress = rule.start(nodes) if rule else None
        self.lowest = -math.inf

    def measured(self, metric: Metric, values: Tensor | float) -> None:
        """Take note of these nodes' own metric, ``[nodes]``."""
        if self._rule and self.progress and metric == self._rule.metric:
            measured = torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(-1)
            self.progress = self._rule.update(self.progress, measured)

    def begin(self, round: int) -> float:
        """Return what to tell the neighbours in this round."""
        if self.progress and round % self._width == 0:
            self.lowest = float(self.progress.score.min())
        return self.lowest

    def heard(self, score: float) -> None:
        """Take note of what a neighbour said in this round."""
        self.lowest = min(self.lowest, score)

    def missed(self) -> None:
        """Take note that a neighbour was not heard in this round: no conclusion in this window."""
        self.lowest = -math.inf

    def reached(self, round: int) -> bool:
        """Say, at the end of a round, whether everybody stops here."""
        if self._rule is None or (round + 1) % self._width or self.lowest < self._rule.threshold:
            return False
        return self._floods(round + 1 - self._width)
