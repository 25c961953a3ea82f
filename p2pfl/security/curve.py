"""Encrypted links: the options that make ZeroMQ authenticate both ends, in the right order."""

from __future__ import annotations

import zmq

from p2pfl.errors import RunError
from p2pfl.security.keys import KeyPair

DOMAIN = "p2pfl"  # without one, ZeroMQ would let in any key unasked
LARGEST = 1 << 16  # bytes of a frame that a listener takes in, also of strangers
HANDSHAKE = 3000  # milliseconds

Socket = zmq.Socket[bytes]


def require_curve() -> None:
    """Check that ZeroMQ can encrypt, and has no known holes.

    Raises:
        RunError: it is too old, or was built without encryption.
    """
    if zmq.zmq_version_info() < (4, 3, 5) or not zmq.has("curve"):
        raise RunError(
            f"encrypted links need libzmq 4.3.5 with CURVE; this is {zmq.zmq_version()}"
            f" {'with' if zmq.has('curve') else 'without'} it (pip install -U pyzmq)"
        )


def secure_listener(socket: Socket, keys: KeyPair) -> None:
    """Let only clients in that prove a key which the gate of this context allows.

    Without a gate in the same context nobody gets in. Frames are limited to 64 KiB, and a
    handshake to 3 seconds.

    Raises:
        RunError: the socket is bound already, or ZeroMQ cannot encrypt.
    """
    _check(socket)
    socket.curve_server = True
    socket.curve_secretkey, socket.curve_publickey = keys.secret.encode(), keys.public.encode()
    socket.zap_domain = DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # with no gate to ask, nobody gets in
    socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE)
    if socket.type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_HANDOVER, 0)  # nobody takes over another's connection


def secure_dialler(socket: Socket, keys: KeyPair, server_key: str) -> None:
    """Talk only to a listener that proves `server_key`, and prove our own key to it.

    Raises:
        RunError: the socket is connected already, or ZeroMQ cannot encrypt.
    """
    _check(socket)
    socket.curve_serverkey = server_key.encode()
    socket.curve_secretkey, socket.curve_publickey = keys.secret.encode(), keys.public.encode()
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE)


def sender_key(frame: zmq.Frame) -> str | None:
    """Return the key that the sender of a frame has proved; None if it has proved none."""
    try:
        return str(frame.get("User-Id")) or None
    except zmq.ZMQError:  # no such property
        return None


def _check(socket: Socket) -> None:
    require_curve()
    if socket.last_endpoint:
        raise RunError("a socket must be secured before it is bound or connected")
