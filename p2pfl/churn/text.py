"""A churn script as text: a bar for each peer, lines for what is broken, how many are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from p2pfl.churn.script import Script
from p2pfl.churn.tracks import LOOKS, Span, Track, tracks

MOST = 40  # peers up to which each has a line
_MARKS = {"up": "█", "slow": "▓", "stopped": "░", "away": "·"}
_HEIGHTS = " ▁▂▃▄▅▆▇█"


def as_text(script: Script, until: float | None = None, width: int = 60) -> str:
    """Return a picture of a script in characters.

    A character stands for a stretch of time and shows the worst in it: a peer that was away for
    a moment only can be seen.

    Args:
        script: what happens.
        until: where the picture ends, in seconds; by default after the last happening.
        width: characters along time.
    """
    parts = ["\n".join(_lines(track, script.nodes, width)) for track in tracks(script, until)]
    return "\n\n".join([*parts, "\n".join([_counts(script), *script.remarks])])


def clock_text(value: float, clock: str) -> str:
    """Return a moment as one would say it.

    >>> clock_text(90, "time"), clock_text(5400, "time"), clock_text(3, "round")
    ('1.5m', '1.5h', '3')
    """
    if clock == "round":
        return f"{value:.3g}"
    for unit, seconds in (("d", 86400 * 2), ("h", 3600), ("m", 60)):
        if value >= seconds:
            return f"{value / {'d': 86400, 'h': 3600, 'm': 60}[unit]:.3g}{unit}"
    return f"{value:.3g}s"


def _lines(track: Track, n: int, width: int) -> Iterable[str]:
    shown = list(range(n))
    if n > MOST:  # those to whom something happens first
        shown.sort(key=lambda node: (len(track.peers[node]) == 1, node))
        shown = sorted(shown[:MOST])
    step = track.end / width
    for node in shown:
        yield f"{node:>9}  {_bar(track.peers[node], step, width)}"
    if n > MOST:
        yield f"{'':>9}  and {n - MOST} more"
    for kind, spans in track.faults.items():
        told = ", ".join(list(dict.fromkeys(span.look for span in spans))[:3])
        marks = ["#" if found else " " for found in _touched(spans, step, width)]
        yield f"{kind:>9}  {''.join(marks)}  {told}"
    low = [_HEIGHTS[round(8 * count / n)] for count in _least(track, step, width)]
    counts = sorted({count for _, count in track.there})
    told = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    yield f"{'there':>9}  {''.join(low)}  {told} of {n}"
    middle, end = (clock_text(part * track.end, track.clock) for part in (0.5, 1))
    yield f"{track.clock:>9}  0{middle:^{width - 1 - len(end)}}{end}"


def _bar(spans: Iterable[Span], step: float, width: int) -> str:
    worst = [0] * width
    for span in spans:
        rank = LOOKS.index(span.look)
        for cell in _cells(span, step, width):
            worst[cell] = max(worst[cell], rank)
    return "".join(_MARKS[LOOKS[rank]] for rank in worst)


def _touched(spans: Iterable[Span], step: float, width: int) -> list[bool]:
    cells = {cell for span in spans for cell in _cells(span, step, width)}
    return [cell in cells for cell in range(width)]


def _least(track: Track, step: float, width: int) -> list[int]:
    least = [track.there[0][1]] * width
    ends = [when for when, _ in track.there[1:]] + [track.end]
    seen: set[int] = set()
    for (start, count), end in zip(track.there, ends, strict=True):
        for cell in _cells(Span(start, end, ""), step, width):
            least[cell] = min(least[cell], count) if cell in seen else count
            seen.add(cell)
    return least


def _cells(span: Span, step: float, width: int) -> range:
    """Return which characters a span touches."""
    first = min(int(span.start / step + 1e-9), width - 1)
    return range(first, max(first + 1, min(width, int(-(-span.end // step) + 1e-9))))


def _counts(script: Script) -> str:
    """Return how often what happens to how many."""
    counts = Counter(one.kind for one in script.happenings for _ in one.nodes or (0,))
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing happens"
    marks = ", ".join(f"{mark} {look}" for look, mark in _MARKS.items())
    return f"{told}  ({marks})"
