"""The test every peer makes of its own door before it starts: do strangers stay outside?"""

from __future__ import annotations

import math
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from p2pfl.errors import RunError
from p2pfl.security.curve import Socket, secure_dialler
from p2pfl.security.keys import make_keys

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_REFUSED |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
_ACCEPTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_EVERYWHERE = {"tcp://0.0.0.0": "tcp://127.0.0.1", "tcp://[::]": "tcp://[::1]"}


def check_listener(address: str, public_key: str, timeout: float = 5.0) -> None:
    """Dial a listener of ours as strangers would, and make sure that it refuses them.

    One stranger knows nothing of encryption, the other has a key that nobody knows. It needs
    nothing of the thread that reads the listener.

    Args:
        address: where it is bound, as in ``tcp://0.0.0.0:7000``.
        public_key: of the listener.
        timeout: seconds.

    Raises:
        RunError: a stranger was let in, or was not refused in time.
    """
    host, _, port = address.rpartition(":")
    host = _EVERYWHERE.get(host, host)
    context: zmq.Context[Socket] = zmq.Context()
    try:
        context.setsockopt(zmq.IPV6, int("[" in host))
        strangers = {
            "without encryption": context.socket(zmq.DEALER),
            "with a key that nobody knows": context.socket(zmq.DEALER),
        }
        secure_dialler(strangers["with a key that nobody knows"], make_keys(), public_key)
        monitors = {how: s.get_monitor_socket(_REFUSED | _ACCEPTED) for how, s in strangers.items()}
        for stranger in strangers.values():
            stranger.setsockopt(zmq.RECONNECT_IVL, -1)
            stranger.connect(f"{host}:{port}")
        deadline = time.monotonic() + timeout
        for how, monitor in monitors.items():
            _expect_refusal(address, how, monitor, deadline)
    finally:
        context.destroy(0)


def _expect_refusal(address: str, how: str, monitor: Socket, deadline: float) -> None:
    left = math.ceil(1000 * (deadline - time.monotonic()))
    if not monitor.poll(max(0, left)):
        raise RunError(f"{address} did not answer its own test in time, so it is not trusted")
    if recv_monitor_message(monitor)["event"] == _ACCEPTED:
        raise RunError(f"{address} lets in a stranger {how}: nothing may run on it")
