"""How many messages one connection may send: who goes beyond that is cut off."""

from __future__ import annotations

import time
from collections import OrderedDict

RATE, BURST = 2000.0, 4000.0  # messages a second in the long run, and at once
MOST = 1000  # connections that are told apart; the one that was silent longest is forgotten


class Quota:
    """A bucket of tokens for each connection."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def spend(self, connection: bytes) -> bool:
        """Take a token for one message; return whether there was one."""
        now = time.monotonic()
        tokens, before = self._buckets.pop(connection, (BURST, now))
        tokens = min(BURST, tokens + RATE * (now - before)) - 1
        self._buckets[connection] = max(tokens, 0.0), now
        if len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
        return tokens >= 0
