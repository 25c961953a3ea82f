"""How often something was refused, and why: who invents reasons hides only its own."""

from __future__ import annotations

from collections import Counter

MOST_REASONS = 20  # of one source that are told apart; anybody could make up any number
MOST_SOURCES = 200  # that are told apart: a stranger may have many addresses


class Refusals(Counter[str]):
    """How often something was refused, by reason."""

    def __init__(self) -> None:
        super().__init__()
        self._told_apart: Counter[str] = Counter()  # reasons, by source

    def note(self, source: str, reason: str) -> None:
        """Count one more.

        Args:
            source: from whom it came, as far as that is certain.
            reason: what there is to say of it, the source included.
        """
        self[reason if reason in self else self._listed(source, reason)] += 1

    def _listed(self, source: str, reason: str) -> str:
        """Return what a new reason is listed as."""
        if source not in self._told_apart and len(self._told_apart) >= MOST_SOURCES:
            return "other reasons"
        if self._told_apart[source] >= MOST_REASONS:
            return f"{source}: other reasons"
        self._told_apart[source] += 1
        return reason
