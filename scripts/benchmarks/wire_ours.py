"""What p2pfl's own links make of the jobs of `one_way.py` and `all_to_all.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from threading import Condition
from typing import NamedTuple, cast

import numpy as np
import torch
from crowd import Meeting
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.learning.pieces import Row
from p2pfl.learning.scratch import keep_freed_memory
from p2pfl.peer.events import Received, Send
from p2pfl.peer.letters import unstacked
from p2pfl.runtime import chunks, parts
from p2pfl.runtime.endpoint import Endpoint, Keyring
from p2pfl.runtime.finding import Book
from p2pfl.runtime.handshake import Terms
from p2pfl.runtime.links import Links
from p2pfl.runtime.streams import Stream
from p2pfl.security.keys import KeyPair

MEETING, POLL = 60.0, 20  # seconds, milliseconds

Values = NDArray[np.float32]


class Model(NamedTuple):
    """The message."""

    x: Tensor  # [1, d]


class Peer:
    """One process with its links to all the others.

    Args:
        rank: which one it is.
        meeting: what all share.
        secure: whether links are encrypted.
    """

    def __init__(self, rank: int, meeting: Meeting, secure: bool) -> None:
        keep_freed_memory()
        public, secret = (key.decode() for key in meeting.keys)
        everybody = dict.fromkeys(range(meeting.size), public)
        keyring = Keyring(KeyPair(public, secret), everybody) if secure else None
        self.rank, self._meeting, self._rounds = rank, meeting, 0
        self._endpoint = Endpoint("tcp://127.0.0.1:*", meeting.size, keyring)
        meeting.ports[rank] = int(self._endpoint.listener.address.rpartition(":")[2])

    def meet(self, params: int, stay: bool = False, news: Condition | None = None) -> None:
        """Meet the others, once all of them listen.

        Args:
            params: values of a model.
            stay: whether models stay where they came, if it is worth it.
            news: if models are to be mixed while they arrive: where who mixes them waits.
        """
        while not all(self._meeting.ports):
            time.sleep(0.01)
        ports = {peer: f"tcp://127.0.0.1:{port}" for peer, port in enumerate(self._meeting.ports)}
        others = ports.keys() - {self.rank}
        book = Book(len(ports), ports)
        self.links = Links(self.rank, self._endpoint, others, Terms({}), book)
        self.links.meet(MEETING)
        schema = chunks.schema(Model(torch.empty(1, params)))
        stay = stay and parts.can_stay(schema, len(others))
        self.links.expect(0, schema, stay=stay, news=news)

    def exchange(self, model: Values | None, to: Iterable[int], count: int) -> list[Received]:
        """Send a model to some; return so many that have come, once all of ours has left."""
        if model is not None:
            message = Model(torch.from_numpy(model).unsqueeze(0))
            self.links.send(Send(tuple(to), self._rounds, 1, 0.0, message))
        self._rounds += 1
        found: list[Received] = []
        while len(found) < count or self._is_sending():
            self.links.wait(math.inf, POLL)
            for event in self.links.events():
                assert isinstance(event, Received), (event, self.links.report())
                found.append(event)
        return found

    def columns(self) -> Iterator[Tensor]:
        """Yield the columns of the next model as they come, ready to be mixed."""
        row = cast(Stream, self.exchange(None, [], 1)[0].message[0])
        left = row.numel()
        while left:
            part = row.take_columns(0.0) if row.held else None
            if part is None:
                self.links.wait(math.inf, POLL)
                assert not self.links.events()
            else:
                yield part
                left -= part.numel()
                row.done()

    def _is_sending(self) -> bool:
        return any(one.outflow.waiting for one in self.links._neighbours.values())


def send(meeting: Meeting, values: Values, secure: bool) -> Iterator[None]:
    """Send a model to process 1 whenever resumed."""
    peer = Peer(0, meeting, secure)
    peer.meet(len(values))
    while True:
        peer.exchange(values, [1], 0)
        yield


def receive(meeting: Meeting, params: int, secure: bool) -> Iterator[object]:
    """Yield what process 0 has sent."""
    peer = Peer(1, meeting, secure)
    yield None
    peer.meet(params)
    while True:
        yield peer.exchange(None, [], 1)[0]


def mix(meeting: Meeting, params: int, secure: bool) -> Iterator[object]:
    """Take in what process 0 has sent as peers do that mix it while it arrives."""
    peer = Peer(1, meeting, secure)
    yield None
    peer.meet(params, news=Condition())
    while True:
        for _ in peer.columns():
            pass
        yield None


def all_to_all(
    rank: int, meeting: Meeting, models: Values, secure: bool
) -> Iterator[Iterable[Row]]:
    """Send a model to all, and yield all there are, as they lie in memory."""
    peer = Peer(rank, meeting, secure)
    yield ()
    others = [other for other in range(meeting.size) if other != rank]
    peer.meet(models.shape[1], stay=True)
    while True:
        found = peer.exchange(models[rank], others, len(others))
        yield [torch.from_numpy(models[rank : rank + 1]), *(event.message[0] for event in found)]


def average(mean: Tensor, models: Iterable[Values | Row]) -> None:
    """Write the mean of models into `mean`, ``[d]``, as peers do; the first is one's own."""
    rows = [
        torch.from_numpy(one).unsqueeze(0) if isinstance(one, np.ndarray) else one for one in models
    ]
    each = [Model(cast(Tensor, row)) for row in rows]
    letters = unstacked([1 / len(each)] * len(each), each, own=0)
    letters.into.append(mean.unsqueeze(0))
    assert letters.mix(letters.heard.x).data_ptr() == mean.data_ptr()
