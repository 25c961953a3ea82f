"""Every process gives its model to all the others and averages: the rivals.

A rival is a generator. It binds a port if it needs one and yields; resumed, it exchanges the
models once, and yields them all, its own among them. All of them average as p2pfl does.
"""

from __future__ import annotations

import pickle
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import wire_ours
import zmq
from crowd import PATIENCE, Measured, Meeting, Memory, together
from one_way import MB, QUEUE, Values, read_some

from p2pfl.learning.pieces import Row

WARM_UP, TIMES = 2, 7  # rounds that are not counted, and that are

Exchange: TypeAlias = Callable[[int, Meeting, Values], Iterator[Iterable[Values | Row]]]


def measure(rival: str, processes: int, params: int) -> Measured:
    """Return what a round of one of the `RIVALS` has come to, as a median.

    Counted is from the first process to begin until the last has averaged, and the memory of
    the process that took most. Each one's model has so many float32 values.
    """
    times, extra = zip(*together(_work, processes, rival, params), strict=True)
    seconds = [
        max(end for _, end in each) - min(begin for begin, _ in each)
        for each in zip(*times, strict=True)
    ]
    return Measured(statistics.median(seconds[WARM_UP:]), max(extra))


def _work(
    rank: int, meeting: Meeting, rival: str, params: int
) -> tuple[list[tuple[float, float]], float]:
    """Return when each round began and ended here (monotonic, so of all processes), and MB."""
    torch.set_num_threads(1)
    models = np.full((meeting.size, params), np.nan, np.float32)
    models[rank] = rank
    mean, times = torch.ones(params), []
    exchanging = RIVALS[rival](rank, meeting, models)
    next(exchanging)
    memory = Memory()
    for _ in range(WARM_UP + TIMES):
        meeting.wait()
        begin = time.monotonic()
        wire_ours.average(mean, next(exchanging))
        times.append((begin, time.monotonic()))
    meeting.wait()
    extra = memory.grown()
    torch.testing.assert_close(mean, torch.full_like(mean, (meeting.size - 1) / 2))
    return times, extra


def _sockets(rank: int, meeting: Meeting, models: Values) -> Iterator[Iterable[Values]]:
    """Raw TCP: one connection for two processes, none of which ever waits for one alone."""
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        meeting.ports[rank] = listener.getsockname()[1]
        yield ()
        links: dict[int, socket.socket] = {}
        for other in range(rank):
            address = ("127.0.0.1", meeting.ports[other])
            links[other] = stack.enter_context(socket.create_connection(address, PATIENCE))
            links[other].sendall(bytes([rank]))
        for _ in range(rank + 1, meeting.size):
            link = stack.enter_context(listener.accept()[0])
            links[link.recv(1)[0]] = link
        for link in links.values():
            link.setblocking(False)
        while True:
            _swap(selector, links, models, rank)
            yield models


def _swap(
    selector: selectors.BaseSelector, links: dict[int, socket.socket], models: Values, rank: int
) -> None:
    """Send our model on every link, and receive one."""
    for other, link in links.items():
        parts = [models[at].data.cast("B") for at in (rank, other)]
        selector.register(link, selectors.EVENT_WRITE | selectors.EVENT_READ, (link, parts))
    while selector.get_map():
        for key, ready in selector.select(PATIENCE):
            link, parts = key.data
            if ready & selectors.EVENT_WRITE:
                parts[0] = parts[0][link.send(parts[0]) :]
            if ready & selectors.EVENT_READ:
                parts[1] = read_some(link, parts[1])
            wanted = (bool(parts[0]) and selectors.EVENT_WRITE) | (
                bool(parts[1]) and selectors.EVENT_READ
            )
            if not wanted:
                selector.unregister(link)
            elif wanted != key.events:
                selector.modify(link, wanted, key.data)


def _chunks(rank: int, meeting: Meeting, models: Values) -> Iterator[Iterable[Values]]:
    """ZeroMQ: chunks of 1 MB, sent without a copy and put together in kept buffers."""
    router, dealers = yield from _dialled(rank, meeting)
    own, whole = models[rank].data.cast("B"), models[rank].nbytes
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    while True:
        sent = dict.fromkeys(dealers, 0)
        got = dict.fromkeys(set(range(meeting.size)) - {rank}, 0)
        for dealer in dealers:
            poller.register(dealer, zmq.POLLOUT)
        while min(got.values()) < whole or min(sent.values()) < whole:
            for ready, _ in poller.poll(int(1000 * PATIENCE)):
                if ready is router:
                    other, chunk = int(router.recv()), router.recv(copy=False).buffer
                    place = slice(got[other], got[other] + len(chunk))
                    models[other].data.cast("B")[place] = chunk
                    got[other] = place.stop
                    continue
                ready.send(own[sent[ready] : sent[ready] + MB], copy=False)
                sent[ready] += MB
                if sent[ready] >= whole:
                    poller.unregister(ready)
        yield models


def _pickled(rank: int, meeting: Meeting, models: Values) -> Iterator[Iterable[Values]]:
    """ZeroMQ: a model pickled once, and sent to all as one message."""
    router, dealers = yield from _dialled(rank, meeting)
    while True:
        message = pickle.dumps({"weights": models[rank]})
        for dealer in dealers:
            dealer.send(message)
        found = [models[rank]]
        for _ in dealers:
            router.recv()
            found.append(pickle.loads(router.recv())["weights"])  # our own processes have sent it
        yield found


def _pickled_tensors(rank: int, meeting: Meeting, models: Values) -> Iterator[Iterable[Values]]:
    """ZeroMQ: a dictionary of tensors, pickled anew for everybody it is sent to."""
    router, dealers = yield from _dialled(rank, meeting)
    model = {
        f"layer{k}": one.clone() for k, one in enumerate(torch.from_numpy(models[rank]).chunk(8))
    }
    while True:
        for dealer in dealers:
            dealer.send(pickle.dumps({"weights": model, "from": rank}))
        found = [models[rank]]
        for _ in dealers:
            router.recv()
            got = pickle.loads(router.recv())["weights"]  # our own processes have sent it
            found.append(torch.cat(list(got.values())).numpy())
        yield found


def _dialled(
    rank: int, meeting: Meeting
) -> Generator[tuple[()], None, tuple[zmq.Socket[bytes], list[zmq.Socket[bytes]]]]:
    """Listen, yield once for the others to do so, and dial all."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    router = context.socket(zmq.ROUTER)
    dealers = [context.socket(zmq.DEALER) for _ in range(meeting.size - 1)]
    for link in (router, *dealers):
        link.linger, link.rcvhwm, link.sndhwm = 0, QUEUE, QUEUE
        link.rcvtimeo = link.sndtimeo = int(1000 * PATIENCE)
    meeting.ports[rank] = router.bind_to_random_port("tcp://127.0.0.1")
    yield ()
    others = [other for other in range(meeting.size) if other != rank]
    for dealer, other in zip(dealers, others, strict=True):
        dealer.routing_id = str(rank).encode()
        dealer.connect(f"tcp://127.0.0.1:{meeting.ports[other]}")
    return router, dealers


def _gloo(rank: int, meeting: Meeting, models: Values) -> Iterator[Iterable[Values]]:
    """All of them gathered by torch.distributed."""
    meeting.join_gloo(rank)
    rows = list(torch.from_numpy(models))
    yield ()
    while True:
        dist.all_gather(rows, rows[rank])
        yield models


RIVALS: dict[str, Exchange] = {  # the first is what the others are compared with
    "raw TCP, non-blocking": _sockets,
    "ZeroMQ, 1 MB chunks": _chunks,
    "gloo all_gather": _gloo,
    "ZeroMQ, pickled once": _pickled,
    "ZeroMQ, tensors pickled for each": _pickled_tensors,
    "p2pfl, plain": partial(wire_ours.all_to_all, secure=False),
    "p2pfl, CURVE": partial(wire_ours.all_to_all, secure=True),
}
