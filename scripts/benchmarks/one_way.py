"""One model from one process to another: the rivals, each a few lines.

A rival is a pair of functions. ``receive`` binds a port of its own, says which, and yields the
values of one model after the other; ``send`` connects to it and sends a model whenever it is
resumed. A model counts as received when its values lie in the receiver's memory as float32.
"""

from __future__ import annotations

import pickle
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import wire_ours
import zmq
from crowd import PATIENCE, Measured, Meeting, Memory, together
from numpy.typing import NDArray

from p2pfl.launch import cores

WARM_UP, TIMES = 1, 5  # models that are not counted, and that are
QUEUE = 8  # chunks that may wait at either end
LAYERS = 16  # of the model that is pickled
MB = 1 << 20

Values: TypeAlias = NDArray[np.float32]
Send: TypeAlias = Callable[[Meeting, Values], Iterator[None]]
Receive: TypeAlias = Callable[[Meeting, int], Iterator[object]]


class Rival(NamedTuple):
    """A way to send a model.

    Attributes:
        send: sends the values it is given, whenever resumed.
        receive: yields what has come.
        bound: whether each end is kept on cores of its own, as ``--on local`` does with peers.
    """

    send: Send
    receive: Receive
    bound: bool = False


def measure(rival: str, params: int) -> Measured:
    """Return what one of the `RIVALS` has come to, as a median over some models.

    Counted is from when the values are handed over until they are there, and the memory of the
    receiver. A model has so many float32 values.
    """
    begun, (ended, extra) = together(_work, 2, rival, params)
    seconds = [end - begin for begin, end in zip(begun, ended, strict=True)]
    return Measured(statistics.median(seconds[WARM_UP:]), extra)


def _work(rank: int, meeting: Meeting, name: str, params: int) -> Any:  # noqa: ANN401
    rival = RIVALS[name]
    torch.set_num_threads(1)
    if rival.bound:
        cores.bind(cores.deal(meeting.size)[rank])
    return _receiver(rival, meeting, params) if rank else _sender(rival, meeting, params)


def _sender(rival: Rival, meeting: Meeting, params: int) -> list[float]:
    """Return when each model was handed over (monotonic, so of all processes)."""
    values = np.random.default_rng(0).standard_normal(params, dtype=np.float32)
    meeting.wait()
    sending, begun = rival.send(meeting, values), []
    for _ in range(WARM_UP + TIMES):
        meeting.wait()
        begun.append(time.monotonic())
        next(sending)
        meeting.wait()
    return begun


def _receiver(rival: Rival, meeting: Meeting, params: int) -> tuple[list[float], float]:
    """Return when each model was there, and the MB it took beyond a buffer that is kept."""
    receiving = rival.receive(meeting, params)
    next(receiving)  # listens
    memory, ended = Memory(), []
    meeting.wait()
    for _ in range(WARM_UP + TIMES):
        meeting.wait()
        got = next(receiving)
        ended.append(time.monotonic())
        del got
        meeting.wait()
    return ended, memory.grown()


def _tcp_send(meeting: Meeting, values: Values) -> Iterator[None]:
    with socket.create_connection(("127.0.0.1", meeting.ports[1]), PATIENCE) as link:
        while True:
            link.sendall(values.data)
            yield


def _tcp_receive(meeting: Meeting, params: int) -> Iterator[object]:
    values = np.ones(params, np.float32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        meeting.ports[1] = listener.getsockname()[1]
        yield None
        link, _ = listener.accept()
        while True:
            rest = values.data.cast("B")
            while rest:
                rest = read_some(link, rest)
            yield values


def read_some(link: socket.socket, rest: memoryview) -> memoryview:
    """Read what has come into `rest`; return what is still to be filled."""
    count = link.recv_into(rest)
    if not count:
        raise ConnectionResetError("the other end is gone")
    return rest[count:]


def _socket(kind: int, secure: bool) -> zmq.Socket[bytes]:
    link: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    link.rcvhwm = link.sndhwm = QUEUE
    link.rcvtimeo = link.sndtimeo = int(1000 * PATIENCE)
    link.linger = 0
    if secure:  # who has which key does not matter here
        link.curve_publickey, link.curve_secretkey = zmq.curve_keypair()
    return link


def _bind(meeting: Meeting, secure: bool) -> zmq.Socket[bytes]:
    link = _socket(zmq.ROUTER, secure)
    link.curve_server = secure
    if secure:
        link.curve_secretkey = meeting.keys[1]
    meeting.ports[1] = link.bind_to_random_port("tcp://127.0.0.1")
    return link


def _dial(meeting: Meeting, secure: bool) -> zmq.Socket[bytes]:
    link = _socket(zmq.DEALER, secure)
    if secure:
        link.curve_serverkey = meeting.keys[0]
    link.connect(f"tcp://127.0.0.1:{meeting.ports[1]}")
    return link


def _chunks(size: int, secure: bool = False) -> tuple[Send, Receive]:
    """Send chunks of so many bytes without a copy, and put them together in a kept buffer."""

    def send(meeting: Meeting, values: Values) -> Iterator[None]:
        link, whole = _dial(meeting, secure), values.data.cast("B")
        while True:
            for begin in range(0, len(whole), size):
                link.send(whole[begin : begin + size], copy=False)
            yield

    def receive(meeting: Meeting, params: int) -> Iterator[object]:
        values, link = np.ones(params, np.float32), _bind(meeting, secure)
        whole = values.data.cast("B")
        yield None
        while True:
            for begin in range(0, len(whole), size):
                link.recv()  # from whom
                whole[begin : begin + size] = link.recv(copy=False).buffer
            yield values

    return send, receive


def _frame_send(meeting: Meeting, values: Values) -> Iterator[None]:
    link = _dial(meeting, secure=False)
    while True:
        link.send(values.data, copy=False)
        yield


def _frame_receive(meeting: Meeting, params: int) -> Iterator[object]:
    link = _bind(meeting, secure=False)
    yield None
    while True:
        link.recv()
        yield np.frombuffer(link.recv(copy=False).buffer, np.float32)


def _pickle_send(meeting: Meeting, values: Values) -> Iterator[None]:
    link = _dial(meeting, secure=False)
    model = {f"layer{k}": layer for k, layer in enumerate(np.array_split(values, LAYERS))}
    while True:
        link.send(pickle.dumps(model))
        yield


def _pickle_receive(meeting: Meeting, params: int) -> Iterator[object]:
    link = _bind(meeting, secure=False)
    yield None
    while True:
        link.recv()
        yield pickle.loads(link.recv())  # our own process has sent it


def _gloo_send(meeting: Meeting, values: Values) -> Iterator[None]:
    meeting.join_gloo(0)
    while True:
        dist.send(torch.from_numpy(values), 1)
        yield


def _gloo_receive(meeting: Meeting, params: int) -> Iterator[object]:
    values = torch.ones(params)
    yield None
    meeting.join_gloo(1)
    while True:
        dist.recv(values, 0)
        yield values


def _ours(receive: Callable[..., Iterator[object]], secure: bool = False) -> tuple[Send, Receive]:
    return partial(wire_ours.send, secure=secure), partial(receive, secure=secure)


# The first is what the others are compared with.
IN_CLEAR = {
    "raw TCP, buffer reused": Rival(_tcp_send, _tcp_receive),
    "ZeroMQ, 1 MB chunks": Rival(*_chunks(MB)),
    "ZeroMQ, 4 MB chunks": Rival(*_chunks(4 * MB)),
    "ZeroMQ, one frame": Rival(_frame_send, _frame_receive),
    "ZeroMQ, pickled": Rival(_pickle_send, _pickle_receive),
    "gloo send/recv": Rival(_gloo_send, _gloo_receive),
    "p2pfl, plain, in one piece": Rival(*_ours(wire_ours.receive), bound=True),
    "p2pfl, plain, as it comes": Rival(*_ours(wire_ours.mix), bound=True),
    "raw TCP, ends bound": Rival(_tcp_send, _tcp_receive, bound=True),
    "p2pfl, plain, not bound": Rival(*_ours(wire_ours.mix)),
}
ENCRYPTED = {
    "ZeroMQ + CURVE, 1 MB chunks": Rival(*_chunks(MB, secure=True)),
    "p2pfl, encrypted, as it comes": Rival(*_ours(wire_ours.mix, secure=True), bound=True),
    "p2pfl, encrypted, in one piece": Rival(*_ours(wire_ours.receive, secure=True), bound=True),
    "ZeroMQ + CURVE, ends bound": Rival(*_chunks(MB, secure=True), bound=True),
    "p2pfl, encrypted, not bound": Rival(*_ours(wire_ours.mix, secure=True)),
}
RIVALS = IN_CLEAR | ENCRYPTED
