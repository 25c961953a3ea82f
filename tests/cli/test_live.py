"""The live view: how far a run is said to be, also when peers are killed or come late."""

from __future__ import annotations

import io
import math
import sys

import pytest
from rich.console import Console

from p2pfl.cli.live import LiveView
from p2pfl.runtime.setup import Row


def row(node, round, accuracy=0.5):
    return Row(round, node, 1.0, 1.0, accuracy, 9, math.nan, 1, 1, 1.0, math.nan)


def view_of(nodes, done, gone=(), terminal=False):
    """A view of peers that have done so many rounds, each with its own accuracy."""
    view = LiveView(nodes, 100, "title")
    view._console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    for node in gone:
        view.phase(node, "training")
    for node, count in done.items():
        view._printed = math.inf  # nothing is printed yet
        view.rows([row(node, count - 1, node / 10)] if count else [])
    for node in gone:
        view.phase(node, "gone")
    view._printed = -math.inf
    return view


def printed(view):
    """What the view says when somebody ends a round again, or nothing has changed."""
    view.rows([])
    return view._console.file.getvalue()


def shown(view):
    view._console.print(view._render())
    return view._console.file.getvalue()


@pytest.mark.parametrize(
    ("nodes", "done", "gone", "due"),
    [
        (1, {0: 7}, (), 7),
        (2, {0: 7, 1: 9}, (), 7),
        (4, {0: 7, 1: 8, 2: 9, 3: 9}, (), 8),
        (5, {0: 7, 1: 8, 2: 9, 3: 9, 4: 2}, (), 8),
        (4, {0: 20, 1: 20, 2: 20, 3: 2}, (3,), 20),
        (4, {0: 20, 1: 21, 2: 3, 3: 2}, (2, 3), 20),
        (4, {0: 20, 1: 21, 2: 22}, (), 20),  # one is not there yet
        (2, {0: 5, 1: 6}, (0, 1), 0),
    ],
)
def test_progress_is_where_most_of_those_are_who_are_there(nodes, done, gone, due):
    assert f"round {due}/100" in shown(view_of(nodes, done, gone))
    said = printed(view_of(nodes, done, gone))
    assert said.startswith(f"round {due}/100") if due else said == ""


def test_nothing_is_printed_before_most_have_done_a_round():
    assert printed(view_of(4, {0: 1, 1: 1})) == ""
    assert printed(view_of(4, {0: 1, 1: 1, 2: 1})).startswith("round 1/100")


def test_who_is_gone_has_no_part_in_the_scores_until_it_is_back():
    view = view_of(3, {1: 5, 2: 5, 0: 3}, gone=[0])
    assert "accuracy mean 0.1500  worst 0.1000" in printed(view)
    view._printed = -math.inf
    view.rows([row(0, 5, 0.0)])
    assert "accuracy mean 0.1000  worst 0.0000" in view._console.file.getvalue()


def test_peers_that_are_gone_stay_in_the_table():
    text = shown(view_of(3, {0: 5, 1: 5, 2: 3}, gone=[2], terminal=True))
    assert "gone" in text


def test_a_reader_that_goes_away_ends_nothing(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with LiveView(1, 1, "title") as view:
        view.note("nobody reads this")
        view.note("nor this")
