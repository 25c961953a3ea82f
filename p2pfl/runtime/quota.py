"""How many messages one connection may send: who goes beyond that is cut off."""

from __future__ import annotations

import time
from collections import OrderedDict

RATE, BURST = 2000.0, 4000.0  # messages a second in the long run, and at once
REFUSED = 30.0  # messages that one counts for which had to be refused
CLAIM = 64  # bytes about members that count for a message: about one claim
MOST = 1000  # connections that are told apart; the one that was silent longest is forgotten


class Quota:
    """A bucket of tokens for each connection."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def spend(self, connection: bytes, cost: float = 1.0) -> bool:
        """Take the tokens for one message; return whether they were there."""
        now = time.monotonic()
        tokens, before = self._buckets.pop(connection, (BURST, now))
        tokens = min(BURST, tokens + RATE * (now - before)) - cost
        self._buckets[connection] = max(tokens, 0.0), now
        if len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
        return tokens >= 0
