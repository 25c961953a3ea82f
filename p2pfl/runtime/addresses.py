"""Addresses such as ``tcp://10.0.0.1:7000``: from where they can be reached."""

from __future__ import annotations

import errno
import ipaddress
from urllib.parse import urlsplit

import zmq


def is_loopback(address: str) -> bool:
    """Say whether an address cannot be reached from beyond this machine."""
    try:
        parts = urlsplit(address)
        if parts.scheme in ("ipc", "inproc") or parts.hostname == "localhost":
            return True
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def is_direct(address: str) -> bool:
    """Say whether nothing lies between us and an address of this machine, not even a proxy.

    The other addresses of a loopback device are what proxies listen on.
    """
    direct = (None, "localhost", "127.0.0.1", "::1")
    return is_loopback(address) and urlsplit(address).hostname in direct


def is_wildcard(address: str) -> bool:
    """Say whether an address is no single place that others could dial."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host in ("*", "0.0.0.0", "[::]") or port == "*"


def check_port(address: str) -> None:
    """Refuse a port that ZeroMQ would take for another: 70000 is 4464 to it.

    Raises:
        ZMQError: there is no such port.
    """
    port = address.rpartition(":")[2]
    if address.startswith("tcp://") and port.isdecimal() and not 0 < int(port) < 2**16:
        raise zmq.ZMQError(errno.EINVAL, f"there is no port {port}")
