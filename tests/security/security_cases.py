"""A guarded listener, and clients of all kinds."""

import zmq
from zmq.utils.monitor import recv_monitor_message

from p2pfl.security.curve import secure_dialler, secure_listener, sender_key
from p2pfl.security.gate import Gate
from p2pfl.security.keys import make_keys

PATIENCE = 10_000  # milliseconds a test waits for what should take few
REFUSED = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
}


class Door:
    """A listener with its gate, and the sockets that dial it."""

    def __init__(self, *allowed, gate=True, **limits):
        self.context, self.keys = zmq.Context(), make_keys()
        self.gate = (
            Gate(self.context, [keys.public for keys in allowed], **limits) if gate else None
        )
        self.listener = self.context.socket(zmq.ROUTER)
        secure_listener(self.listener, self.keys)
        self.listener.rcvhwm = 8
        if gate:
            self.gate.watch(self.listener)
        self.listener.bind("tcp://127.0.0.1:*")
        self.address = self.listener.last_endpoint.decode()
        self.outside, self.dialled = zmq.Context(), []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.listener.close(0)
        if self.gate:
            self.gate.close()
        self.context.destroy(0)
        self.outside.destroy(0)

    def dial(self, keys=None, server_key=None, body=b"hello", **options):
        """Dial as a client with keys (or in clear), and send a message."""
        socket = self.outside.socket(zmq.DEALER)
        socket.linger, socket.sndtimeo, socket.rcvtimeo = 0, PATIENCE, PATIENCE
        if keys:
            secure_dialler(socket, keys, server_key or self.keys.public)
        for name, value in options.items():
            setattr(socket, name, value)
        self.dialled.append(socket)  # or it would be closed with its last reference
        socket.get_monitor_socket(zmq.EVENT_ALL)
        socket.connect(self.address)
        socket.send(body)
        return socket

    def read(self, timeout=PATIENCE):
        """Return (key, body) of the next message, as an application would; None: there is none."""
        if not self.listener.poll(timeout):
            return None
        frames = self.listener.recv_multipart(copy=False)
        key = sender_key(frames[-1])
        size = sum(len(frame) for frame in frames)
        self.gate.taken(frames[-1].get(zmq.SRCFD), size, key)
        return key, frames[-1].bytes


def event(socket, among):
    """Return the next event of a socket that is one of these."""
    monitor = socket.get_monitor_socket()
    while monitor.poll(PATIENCE):
        happened = recv_monitor_message(monitor)["event"]
        if happened in among:
            return happened
    raise AssertionError("nothing has happened")


def is_refused(socket):
    """Say whether a client is turned away, rather than let in."""
    return event(socket, REFUSED | {zmq.EVENT_HANDSHAKE_SUCCEEDED}) in REFUSED


def wait_for_news(gate, wanted):
    """Return the last news of each kind, once all that is wanted has been heard."""
    heard = {}
    poller = zmq.Poller()
    poller.register(gate.fileno(), zmq.POLLIN)
    while not wanted <= heard.keys():
        assert poller.poll(PATIENCE)
        heard |= {(news.link, news.event): news for news in gate.news()}
    return heard
