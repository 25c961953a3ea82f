"""Models that are mixed while they arrive, so that they are never in memory in whole.

Where every parameter is mixed by itself, the columns that have come of all neighbours can be
mixed, and forgotten, before the next ones are asked for. What that takes does not grow
with the number of neighbours. A neighbour that is lost on the way takes part in the
columns it has sent: what it would have had of the others goes back to oneself, so that each
column is a proper average.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Condition
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox
from p2pfl.learning.tree import columns, has_columns, leaves, tree_map
from p2pfl.peer.events import PeerId, Received
from p2pfl.peer.letters import WIDE, Letters
from p2pfl.runtime.chunks import Empty, Incoming, Piece, Schema, check_values, fresh
from p2pfl.runtime.wire import Header

LEAD = 4096  # bytes that the small fields of a message may have


class Wide(NamedTuple):
    """The one large field of a message, and which of its columns each chunk brings."""

    field: int
    columns: tuple[tuple[int, int], ...]


def wide_field(schema: Schema) -> Wide | None:
    """Return the one large field of a message; None: it is not made like that.

    Chunks must bring whole numbers of it, and all the rest must lie in the first one. It must
    be too large for an inbox to lay side by side with others.
    """
    sizes = [field.nbytes for field in schema.fields]
    largest = sizes.index(max(sizes))
    rest, field = sum(sizes) - sizes[largest], schema.fields[largest]
    if rest > LEAD or rest % field.dtype.itemsize or math.prod(field.shape) <= WIDE:
        return None
    return Wide(largest, schema.columns(largest))


class Stream(Incoming):
    """A model that is mixed while it arrives; it stands in a message in place of the large field.

    The thread that reads the links checks chunks and puts them in, another takes columns out.

    Attributes:
        held: chunks that have come and have not been mixed.
    """

    def __init__(self, header: Header, schema: Schema, news: Condition) -> None:
        super().__init__(header, schema)
        wide = wide_field(schema)
        assert wide is not None
        self._wide, self._news = wide, news
        self.sender: PeerId = header.sender
        self.held = 0
        self._chunks: deque[Tensor] = deque()
        self._small: dict[int, Tensor] = {}
        self._ended = False
        self.device = torch.device("cpu")

    def numel(self) -> int:
        """Return how many columns there are."""
        return self._wide.columns[-1][1]

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """Which columns come together."""
        return self._wide.columns

    def received(self) -> Received:
        """Return the model, of which the first chunk must be there."""
        fields: list[Any] = [self._small.get(k, self) for k in range(len(self.schema.fields))]
        return self._received(*fields)

    def end(self) -> None:
        """Let nobody wait for the rest."""
        with self._news:
            self._ended = True
            self._news.notify_all()

    def drop(self) -> None:
        """Forget what is held, and what will come."""
        with self._news:
            self._ended, self.held = True, 0
            self._chunks.clear()

    def take_columns(self, deadline: float) -> Tensor | None:
        """Return the next columns, ``[1, columns]``; None: they are not there in time.

        They lie in memory of the network's, and stay there until `done` is called.
        """
        with self._news:
            while not self._chunks and not self._ended and time.monotonic() < deadline:
                self._news.wait(min(deadline - time.monotonic(), 3600.0))
            if not self._chunks:
                self._ended = True
                return None
            return self._chunks[0]

    def done(self) -> None:
        """Let go of the columns taken last, if there were any."""
        with self._news:
            if self._chunks:
                self._chunks.popleft()
                self.held -= 1

    def _keep(self, pieces: Sequence[Piece], frames: Sequence[memoryview]) -> None:
        for (k, _, _), frame in zip(pieces, frames, strict=True):
            field = self.schema.fields[k]
            values = torch.frombuffer(frame, dtype=field.dtype)
            check_values(values, field)
            if k == self._wide.field:
                self._put(values.unsqueeze(0))
            else:
                self._small[k] = values.reshape(field.shape).clone()  # its message is let go of

    def _put(self, columns: Tensor) -> None:
        with self._news:
            if not self._ended:
                self._chunks.append(columns)
                self.held += 1
                self._news.notify_all()


def streaming(
    algorithm: Algorithm[Any, Any, Any],
    deadline: Callable[[], float],
    mixed: Callable[[], None],
    empty: Empty = fresh,
) -> Algorithm[Any, Any, Any]:
    """Return an algorithm for one row whose `receive` mixes streams as they come.

    Args:
        algorithm: treats every parameter by itself.
        deadline: asked until when (monotonic) to wait for streams.
        mixed: told after every few columns that there is room for more.
        empty: provides memory for what comes of it.
    """

    def receive(state: Any, inbox: Inbox[Any]) -> Any:  # noqa: ANN401
        streams = [row for row in _rows(inbox) if isinstance(row, Stream)]
        if not streams:
            return algorithm.receive(state, inbox)
        whole = _After(state, streams[0].numel(), empty)
        return _mix(algorithm, whole, cast(Letters[Any], inbox), deadline(), mixed)

    return algorithm._replace(receive=receive)


def _rows(inbox: Inbox[Any]) -> tuple[Tensor | Stream, ...]:
    return next((field for field in inbox.heard if isinstance(field, tuple)), ())


def _mix(
    algorithm: Algorithm[Any, Any, Any],
    whole: _After,
    inbox: Letters[Any],
    deadline: float,
    mixed: Callable[[], None],
) -> Any:  # noqa: ANN401
    """Return the state after the exchange, whose large fields are new."""
    rows = _rows(inbox)
    streams = [row for row in rows if isinstance(row, Stream)]
    here, some = list[int](), inbox
    for start, stop in streams[0].columns:
        parts = {}
        for k, row in enumerate(rows):
            part = row[:, start:stop] if isinstance(row, Tensor) else row.take_columns(deadline)
            if part is not None:
                parts[k] = part
        if here != list(parts):
            here, some = list(parts), _among(inbox, list(parts))
        fields = (tuple(parts.values()) if isinstance(f, tuple) else f for f in some.heard)
        heard = type(some.heard)(*fields)
        letters = replace(some, heard=heard, into=whole.room(start, stop))
        before = whole.cut(start, stop)
        whole.write(before, algorithm.receive(before, letters), start, stop)
        for stream in streams:
            stream.done()
        mixed()
    return whole.state()


def _among(inbox: Letters[Any], here: list[int]) -> Letters[Any]:
    """Return an inbox of some of its senders, as yet with the rows of all."""
    own = here.index(int(inbox.own))
    weights = inbox.weights[:, here]
    weights[0, own] += 1 - weights.sum()
    fields = (field if isinstance(field, tuple) else field[here] for field in inbox.heard)
    return Letters(weights, type(inbox.heard)(*fields), torch.tensor([own]))


class _After:
    """The state after an exchange, written some columns at a time."""

    def __init__(self, state: Any, d: int, empty: Empty) -> None:  # noqa: ANN401
        self._state, self._d, self._empty = state, d, empty
        self._before = list(leaves(state))
        self._after = list(self._before)

    def cut(self, start: int, stop: int) -> Any:  # noqa: ANN401
        """Return some columns of the state before the exchange, as views."""
        return columns(self._state, self._d, slice(start, stop))

    def room(self, start: int, stop: int) -> list[Tensor]:
        """Return where a sum of these columns may be worked out, as `Letters` want it.

        That is where the first field lies that changes, once it is known which; mostly to stay.
        """
        each = zip(self._before, self._after, strict=True)
        changed = [new for old, new in each if new is not old and has_columns(old, self._d)]
        return [field[:, start:stop] for field in changed[:1]]

    def write(self, part: Any, after: Any, start: int, stop: int) -> None:  # noqa: ANN401
        """Put columns in their place; those that are still what they were are not copied."""
        room, moved = {one.data_ptr() for one in self.room(start, stop)}, []
        for k, (old, new) in enumerate(zip(leaves(part), leaves(after), strict=True)):
            if not has_columns(self._before[k], self._d):
                self._after[k] = new  # the same in all blocks
            elif new.data_ptr() != old.data_ptr():
                if self._after[k] is self._before[k]:  # which may still be on its way to others
                    before = self._before[k]
                    self._after[k] = self._empty(tuple(before.shape), before.dtype)
                place = self._after[k][:, start:stop]
                if new.data_ptr() != place.data_ptr():  # what is in another's place makes way
                    moved.append((place, new.clone() if new.data_ptr() in room else new))
        for place, new in moved:
            place.copy_(new)

    def state(self) -> Any:  # noqa: ANN401
        """Return the whole."""
        each = iter(self._after)
        return tree_map(lambda field: next(each), self._state)
