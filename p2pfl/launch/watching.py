"""What the parent of the peer processes makes of their news."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable
from typing import Any

from p2pfl.churn.script import Happening
from p2pfl.errors import RunError, UserError
from p2pfl.launch.books import Books, Watch
from p2pfl.launch.crew import GRACE, Crew, News
from p2pfl.launch.nemesis import Nemesis
from p2pfl.launch.story import Story
from p2pfl.runtime.setup import Row

LOOK = 0.2  # seconds between two looks around while there is no news


class Watching:
    """Follows the news of the peer processes.

    Args:
        crew: the processes.
        nemesis: what is done to them; it begins when all founders are training.
        founders: who is there from the start.
        books: where everything is noted.
        watch: who is told.
        alone: whether each trains by itself, so that who comes back needs nobody.

    Attributes:
        interrupted: whether Ctrl-C has ended the run.
        failed: the peers that did not get through, and why.
    """

    def __init__(
        self,
        crew: Crew,
        nemesis: Nemesis,
        founders: Iterable[int],
        books: Books,
        watch: Watch,
        alone: bool = False,
    ) -> None:
        self.crew, self.nemesis, self.books, self.watch = crew, nemesis, books, watch
        self._alone, self.interrupted = alone, False
        self.failed: dict[int, str] = {}
        self._phase: dict[int, str] = {}
        self._untrained = set(founders)
        self._done: set[int] = set()
        self._story = Story(sorted(nemesis.down))

    def until_the_end(self) -> None:
        """Return when all have ended who are waited for, or when only frozen ones are left.

        Raises:
            UserError, RunError: a peer failed before training, so the run cannot be whole.
        """
        try:
            while not (self.nemesis.is_over or self._only_frozen_left()):
                for happening in self.nemesis.carry_out():
                    self._happened(happening)
                self._listen(self.nemesis.seconds_left(LOOK))
                self._give_up_who_comes_too_late()
        except KeyboardInterrupt:
            self.interrupted = True
            self.books.event("interrupted")
            self.crew.ask_to_end()
            deadline = time.monotonic() + GRACE
            while self.crew.running and time.monotonic() < deadline:
                self._listen(LOOK)  # what they say on their way out
        if self.nemesis.left:
            self.books.event("churn_dropped", happenings=self.nemesis.left)

    @property
    def absent(self) -> set[int]:
        """Who was not there at the end, as the script would have it."""
        return self.nemesis.down | self.nemesis.frozen

    def error(self) -> str | None:
        """Say which peers failed, and how."""
        if not self.failed:
            return None
        return "; ".join(f"peer {node} {how}" for node, how in sorted(self.failed.items()))

    def churn(self) -> dict[str, Any]:
        """Return what a summary says of the script that was carried out."""
        return self._story.summary(self.nemesis.began or time.monotonic())

    def _listen(self, seconds: float) -> None:
        for node, news in self.crew.hear(seconds):
            self._hear(node, news)

    def _give_up_who_comes_too_late(self) -> None:
        """Wait for nobody who comes back, or late, when the others have done all rounds."""
        if self._alone or self._untrained or not self._done:
            return
        left = self.crew.running - self.nemesis.idle - self._done - self.failed.keys()
        if not any(self._phase.get(node) == "training" for node in left):
            for node in sorted(left):
                self._tell(node, "has come too late: the others have ended")
            self.nemesis.give_up(left)

    def _only_frozen_left(self) -> bool:
        left = self.crew.running - self.nemesis.idle
        frozen = left & self.crew.silent()
        if not (self._done or self.failed) or not left or frozen != left:
            return False
        if any(self._phase.get(node) != "training" for node in frozen):
            return False
        self.failed |= dict.fromkeys(frozen, "had stopped answering and was ended")
        return True

    def _hear(self, node: int, news: News) -> None:
        if "row" in news:
            numbers = [math.nan if value is None else value for value in news["row"].values()]
            self._ended_round(Row._make(numbers))
        elif "phase" in news:
            self._entered(node, news["phase"])
        elif "noticed" in news:
            self._story.noticed(node, **news["noticed"])
        elif "membership" in news:
            self._story.spoke(news["membership"])
        elif "status" in news:
            self._ended(node, news["status"])
        elif "error" in news and node not in self.nemesis.down:
            self._failed(node, f"failed: {news['error']}", news)
        elif "exit" in news:
            self._exited(node, news["exit"])

    def _happened(self, happening: Happening) -> None:
        self._story.happened(happening)
        self.books.event("churn", **happening.about())

    def _ended_round(self, row: Row) -> None:
        self.watch.rows([row])
        self._story.ended_round(row.node)
        self.nemesis.came_to(row.round + 1)

    def _entered(self, node: int, phase: str) -> None:
        self._phase[node] = phase
        self._tell(node, phase)
        if phase == "training" and node in self._untrained:
            self._untrained.remove(node)
            if not self._untrained:
                self.nemesis.begin()

    def _ended(self, node: int, status: str) -> None:
        if node in self.nemesis.down:
            return
        self._done.add(node)
        self.nemesis.done(node)
        self._tell(node, status)
        if status == "interrupted" and not self.interrupted:
            self.failed[node] = "was asked to end by somebody else"

    def _exited(self, node: int, code: int | None) -> None:
        if node in self.nemesis.down:
            self._tell(node, "gone")
        elif node not in self._done and not self.interrupted:
            how = f"ended with code {code}"
            if code is not None and code < 0:
                how = f"was killed by {_signal_name(-code)}"
            self._failed(node, how, {"error": f"peer {node} {how}"})
        if not self.interrupted:
            self.nemesis.ended(node)

    def _failed(self, node: int, how: str, news: News) -> None:
        """Take note of a failure; before training it ends everybody.

        A peer that only repeats what a neighbour told it goes by: that neighbour's own word
        is on its way.
        """
        if node in self.failed or (self.interrupted and news.get("echo")):
            return
        self.failed[node] = how
        self._tell(node, how)
        started = self.nemesis.began is not None or self._phase.get(node) == "training"
        if not started and not self.interrupted and not news.get("echo"):
            raise (UserError if news.get("user") else RunError)(news["error"])

    def _tell(self, node: int, phase: str) -> None:
        self.books.event("peer", node=node, phase=phase)
        self.watch.phase(node, phase)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
