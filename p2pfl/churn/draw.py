"""A churn script as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from p2pfl.churn.script import Script
from p2pfl.churn.text import clock_text
from p2pfl.churn.tracks import Track, tracks
from p2pfl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart by colour-blind people too.
COLOURS = {"up": "#009E73", "slow": "#E69F00", "stopped": "#56B4E9", "away": "#e6eaee"}
STEPS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200)  # seconds
TICKS = 8
INK, FAULT, GRID = "#1d2733", "#D55E00", "#d9e0e7"


def draw(script: Script, path: str | Path, until: float | None = None) -> None:
    """Draw who is there when, and what is broken, into a PNG file.

    Args:
        script: what happens.
        path: the file to write.
        until: where the picture ends, in seconds; by default after the last happening.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'p2pfl-gossip[plots]'") from None
    found = tracks(script, until)
    height = min(12.0, 2.5 + 0.2 * script.nodes)
    figure = Figure(figsize=(9, height * len(found)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory and needs no display
    all_axes = figure.subplots(
        2 * len(found), 1, squeeze=False, height_ratios=[1, max(1, height - 2)] * len(found)
    )[:, 0]
    for i, track in enumerate(found):
        _draw_there(all_axes[2 * i], track, script.nodes)
        _draw_lanes(all_axes[2 * i + 1], track)
    handles, names = all_axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    try:
        figure.savefig(path, format="png", facecolor="white")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _draw_there(axes: Axes, track: Track, n: int) -> None:
    from matplotlib.ticker import MaxNLocator

    times, counts = zip(*track.there, (track.end, track.there[-1][1]), strict=True)
    axes.fill_between(times, counts, step="post", color=COLOURS["up"], alpha=0.3, linewidth=0)
    axes.step(times, counts, where="post", color=COLOURS["up"])
    axes.set_ylim(0, n * 1.05)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("there", color=INK)
    _dress(axes, track)


def _draw_lanes(axes: Axes, track: Track) -> None:
    for look, colour in COLOURS.items():
        for node, spans in enumerate(track.peers):
            bars = [(span.start, span.end - span.start) for span in spans if span.look == look]
            axes.broken_barh(bars, (node - 0.4, 0.8), color=colour, linewidth=0)
        axes.plot([], [], color=colour, linewidth=6, label=look)
    n = len(track.peers)
    size = max(0.8, n / 40)  # faults stay legible below many peers
    rows = [n + size * (i + 0.5) for i in range(len(track.faults))]
    for row, spans in zip(rows, track.faults.values(), strict=True):
        bars = [(span.start, span.end - span.start) for span in spans]
        axes.broken_barh(bars, (row - 0.4 * size, 0.8 * size), color=FAULT, linewidth=0)
        for span in spans:
            axes.annotate(f" {span.look}", (span.start, row), fontsize=7, va="center", color=INK)
    every = max(1, n // 20)
    axes.set_yticks([*range(0, n, every), *rows], [*map(str, range(0, n, every)), *track.faults])
    axes.set_ylim(n + size * len(rows) - 0.4, -0.6)  # node 0 at the top
    axes.set_ylabel("node", color=INK)
    axes.set_xlabel(track.clock, color=INK)
    _dress(axes, track)


def _dress(axes: Axes, track: Track) -> None:
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    axes.set_xlim(0, track.end)
    wide = [step for step in STEPS if track.end / step <= TICKS]
    if track.clock == "time" and wide and track.end > TICKS // 2:
        axes.xaxis.set_major_locator(MultipleLocator(wide[0]))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=track.clock == "round"))
    axes.xaxis.set_major_formatter(lambda value, _: clock_text(value, track.clock))
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#8fa3b8")
