"""What the user sees while a run goes on: one live view of all peers, or lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from p2pfl.cli.terminal import perhaps_closed

if TYPE_CHECKING:
    from p2pfl.runtime.setup import Row

SHOWN = 24  # peers in the live table; more would not fit a screen
GONE = "gone"  # the phase of a peer that was killed or has left, and may come back


class _Console(Console):
    """One whose reader may go away."""

    def on_broken_pipe(self) -> None:
        """Say nothing more: that nobody reads it is no reason to end what goes on."""
        self.quiet = True


class LiveView:
    """Show progress on standard error: a live table on a terminal, else a line now and then."""

    def __init__(self, nodes: int, rounds: int, title: str, quiet: bool = False) -> None:
        self.nodes, self.rounds, self.title = nodes, rounds, title
        self._console = _Console(stderr=True, quiet=quiet, emoji=False)
        self._last: dict[int, Row] = {}
        self._measured: dict[int, Row] = {}
        self._phase: dict[int, str] = {}
        self._printed = 0.0
        self._started = time.monotonic()
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=8,
            transient=True,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            with perhaps_closed():
                self._live.stop()

    def rows(self, rows: Sequence[Row]) -> None:
        """Take note of nodes that have ended a round."""
        for row in rows:
            self._last[row.node] = row
            self._phase[row.node] = "training"
            if not (math.isnan(row.eval_loss) and math.isnan(row.eval_acc)):
                self._measured[row.node] = row
        due = time.monotonic() - self._printed > 1.0
        if due and not self._console.is_terminal and self._done():
            self._printed = time.monotonic()
            self.note(self._line())

    def note(self, text: str) -> None:
        """Print a line above the view."""
        with perhaps_closed():
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase(self, node: int, phase: str) -> None:
        """Take note of what a node is doing."""
        self._phase[node] = phase

    def _done(self) -> int:
        """Return how many rounds more than half of those who are there have done."""
        gone = sum(phase == GONE for phase in self._phase.values())
        done = sorted((row.round + 1 for row in self._there(self._last)), reverse=True)
        most = (self.nodes - gone) // 2
        return done[most] if most < len(done) else 0

    def _there(self, rows: dict[int, Row]) -> list[Row]:
        return [row for node, row in rows.items() if self._phase.get(node) != GONE]

    def _line(self) -> str:
        parts = [f"round {self._done()}/{self.rounds}", *self._scores()]
        return "  ".join(parts)

    def _scores(self) -> list[str]:
        measured = self._there(self._measured)
        if not measured:
            return []
        accuracies = [row.eval_acc for row in measured]
        if not any(math.isnan(value) for value in accuracies):
            mean, worst = sum(accuracies) / len(accuracies), min(accuracies)
            return [f"accuracy mean {mean:.4f}", f"worst {worst:.4f}"]
        losses = [row.eval_loss for row in measured]
        return [f"loss mean {sum(losses) / len(losses):.4f}", f"worst {max(losses):.4f}"]

    def _render(self) -> RenderableType:
        done = self._done()
        seconds = time.monotonic() - self._started
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.rounds, completed=done, width=30),
            Text(f"round {done}/{self.rounds}"),
            Text(f"{seconds:.0f} s"),
        )
        lines: list[RenderableType] = [bar, Text("  ".join(self._scores()))]
        if self._phase and self.nodes <= SHOWN:
            lines.append(self._table())
        return Group(*lines)

    def _table(self) -> Table:
        from p2pfl.results.report import size

        table = Table(box=None, padding=(0, 1))
        for heading in ("peer", "round", "train loss", "accuracy", "sent a round", ""):
            table.add_column(heading, justify="left" if not heading else "right")
        for node in sorted(self._phase):
            row, seen = self._last.get(node), self._measured.get(node)
            table.add_row(
                str(node),
                str(row.round + 1) if row else "-",
                f"{row.train_loss:.4f}" if row else "-",
                f"{seen.eval_acc:.4f}" if seen and not math.isnan(seen.eval_acc) else "-",
                size(row.bytes_sent) if row else "-",
                self._phase[node],
            )
        return table
