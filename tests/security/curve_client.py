"""A CurveZMQ client that does what ZeroMQ never would: run it as a program.

``curve_client.py PORT MODE [PUBLIC SECRET SERVER_KEY]`` with MODE one of

- ``endless``: after the handshake, one message that never ends, in large parts
- ``empty``: the same in empty parts
- ``bomb``: 100 connections, each with one command that is never finished
- ``silent``: 100 connections that say nothing

It prints ``cut`` when the other end breaks the connection.
"""

import ctypes
import socket
import struct
import sys
import time
from pathlib import Path

import zmq
from zmq.utils import z85

LIBRARIES = sorted((Path(zmq.__file__).parents[1] / "pyzmq.libs").glob("libsodium*"))
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)


class Curve:
    """The client's end of one connection (https://rfc.zeromq.org/spec/26/)."""

    def __init__(self, port, public, secret, server_key):
        self.sodium = ctypes.CDLL(str(LIBRARIES[0]))
        public, secret, self.server = map(z85.decode, (public, secret, server_key))
        mine = zmq.curve_keypair()
        self.mine, self.mine_secret = map(z85.decode, mine)
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.count = 0
        self.socket.sendall(GREETING)
        self.receive(64)
        hello = self.box(b"CurveZMQHELLO---", bytes(64), self.server, self.mine_secret)
        self.command(b"\x05HELLO\x01\x00" + bytes(72) + self.mine + hello)
        welcome = self.receive_command()
        assert welcome.startswith(b"\x07WELCOME"), welcome
        opened = self.open(b"WELCOME-" + welcome[8:24], welcome[24:])
        self.passing, cookie = opened[:32], opened[32:]
        vouch = self.sealed(b"VOUCH---" + bytes(16), self.mine + self.server, self.passing, secret)
        about = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
        data = public + bytes(16) + vouch + about
        box = self.box(b"CurveZMQINITIATE", data, self.passing, self.mine_secret)
        self.command(b"\x08INITIATE" + cookie + box)
        ready = self.receive_command()
        assert ready.startswith(b"\x05READY"), ready
        key = ctypes.create_string_buffer(32)
        self.sodium.crypto_box_beforenm(key, self.passing, self.mine_secret)
        self.key = key.raw

    def part(self, body, more):
        """Return a part of a message as it goes over the wire."""
        self.count += 1
        short = struct.pack(">Q", self.count)
        text = bytes([more]) + body
        sealed = ctypes.create_string_buffer(len(text) + 16)
        nonce = b"CurveZMQMESSAGEC" + short
        size = ctypes.c_ulonglong(len(text))
        self.sodium.crypto_box_easy_afternm(sealed, text, size, nonce, self.key)
        return frame(0, b"\x07MESSAGE" + short + sealed.raw)

    def box(self, prefix, text, to, secret):
        self.count += 1
        short = struct.pack(">Q", self.count)
        return short + self.sealed(prefix + short, text, to, secret)

    def sealed(self, nonce, text, to, secret):
        sealed = ctypes.create_string_buffer(len(text) + 16)
        size = ctypes.c_ulonglong(len(text))
        assert self.sodium.crypto_box_easy(sealed, text, size, nonce, to, secret) == 0
        return sealed.raw

    def open(self, nonce, sealed):
        text = ctypes.create_string_buffer(len(sealed) - 16)
        size = ctypes.c_ulonglong(len(sealed))
        sodium = self.sodium.crypto_box_open_easy
        assert sodium(text, sealed, size, nonce, self.server, self.mine_secret) == 0
        return text.raw

    def command(self, body):
        self.socket.sendall(frame(4, body))

    def receive_command(self):
        flags, size = self.receive(2)
        assert flags == 4
        return self.receive(size)

    def receive(self, size):
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            assert more, "refused"
            data += more
        return data


def frame(flags, body):
    if len(body) < 256:
        return struct.pack(">BB", flags, len(body)) + body
    return struct.pack(">BQ", flags | 2, len(body)) + body


def flood(port, keys, size):
    curve = Curve(port, *keys)
    curve.socket.sendall(curve.part(b"hello", more=False))
    time.sleep(1)  # whoever is flooded has read that by now, and knows by it whose key this is
    try:
        while True:
            parts = [curve.part(bytes(size), more=True) for _ in range(1 if size else 1000)]
            curve.socket.sendall(b"".join(parts))
    except OSError:
        print("cut", flush=True)


def crowd(port, bomb):
    sockets = []
    for _ in range(100):
        sockets.append(socket.create_connection(("127.0.0.1", port)))
        if bomb:  # 64 KiB are announced, and all but one byte of them sent
            with_size = struct.pack(">BQ", 6, 65536) + bytes(65535)
            sockets[-1].sendall(GREETING + with_size)
    print("connected", flush=True)
    for one in sockets:
        try:
            while one.recv(4096):
                pass
        except OSError:
            pass
    print("cut", flush=True)


if __name__ == "__main__":
    port, mode, *keys = sys.argv[1:]
    if mode in ("bomb", "silent"):
        crowd(int(port), mode == "bomb")
    else:
        flood(int(port), keys, 60_000 if mode == "endless" else 0)
