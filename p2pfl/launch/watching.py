"""What the parent of the peer processes makes of their news."""

from __future__ import annotations

import math
import signal
import time

from p2pfl.errors import RunError, UserError
from p2pfl.launch.books import Books, Watch
from p2pfl.launch.crew import GRACE, Crew, News
from p2pfl.runtime.setup import Row


class Watching:
    """Follows the news of the peer processes.

    Attributes:
        interrupted: whether Ctrl-C has ended the run.
        failed: the peers that did not get through, and why.
    """

    def __init__(self, crew: Crew, books: Books, watch: Watch) -> None:
        self.crew, self.books, self.watch = crew, books, watch
        self.interrupted = False
        self.failed: dict[int, str] = {}
        self._phase: dict[int, str] = {}
        self._done: set[int] = set()

    def until_the_end(self) -> None:
        """Return when every process has ended, or when only frozen ones are left.

        Raises:
            UserError, RunError: a peer failed before training, so the run cannot be whole.
        """
        try:
            for node, news in self.crew.news():
                self._hear(node, news)
                if self._only_frozen_left():
                    return
        except KeyboardInterrupt:
            self.interrupted = True
            self.books.event("interrupted")
            self.crew.ask_to_end()
            deadline = time.monotonic() + GRACE
            for node, news in self.crew.news():  # what they say on their way out
                self._hear(node, news)
                if time.monotonic() > deadline:
                    return

    def _only_frozen_left(self) -> bool:
        frozen = self.crew.frozen()
        if not frozen or any(self._phase.get(node) != "training" for node in frozen):
            return False
        self.failed |= dict.fromkeys(frozen, "had stopped answering and was ended")
        return True

    def error(self) -> str | None:
        """Say which peers failed, and how."""
        if not self.failed:
            return None
        return "; ".join(f"peer {node} {how}" for node, how in sorted(self.failed.items()))

    def _hear(self, node: int, news: News) -> None:
        if "row" in news:
            numbers = [math.nan if value is None else value for value in news["row"].values()]
            self.watch.rows([Row._make(numbers)])
        elif "phase" in news:
            self._phase[node] = news["phase"]
            self._tell(node, news["phase"])
        elif "status" in news:
            self._ended(node, news["status"])
        elif "error" in news:
            self._failed(node, f"failed: {news['error']}", news)
        elif "exit" in news and node not in self._done and not self.interrupted:
            code = news["exit"]
            killed = code is not None and code < 0
            how = f"was killed by {_signal_name(-code)}" if killed else f"ended with code {code}"
            self._failed(node, how, {"error": f"peer {node} {how}"})

    def _ended(self, node: int, status: str) -> None:
        self._done.add(node)
        self._tell(node, status)
        if status == "interrupted" and not self.interrupted:
            self.failed[node] = "was asked to end by somebody else"

    def _failed(self, node: int, how: str, news: News) -> None:
        """Take note of a failure; before training it ends everybody.

        A peer that only repeats what a neighbour told it goes by: that neighbour's own word
        is on its way.
        """
        if node in self.failed or (self.interrupted and news.get("echo")):
            return
        self.failed[node] = how
        self._tell(node, how)
        started = self._phase.get(node) == "training"
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
