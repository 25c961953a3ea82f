"""Addresses such as ``tcp://10.0.0.1:7000``: what is one, and from where it can be reached."""

from __future__ import annotations

import ipaddress
import re
from typing import TypeGuard
from urllib.parse import urlsplit

_TCP = re.compile(r"tcp://(\[([^\]]+)\]|[^\s:/;\[\]]+):(\d{1,5})")
_IPC = re.compile(r"ipc://\S+")


def is_address(value: object) -> TypeGuard[str]:
    """Say whether somebody may listen there, as in ``tcp://10.0.0.1:7000`` or ``ipc:///a/b``."""
    return isinstance(value, str) and (bool(_IPC.fullmatch(value)) or is_tcp(value))


def is_tcp(address: str) -> bool:
    """Say whether an address is a host and a port, IPv6 in brackets, and nothing besides."""
    match = _TCP.fullmatch(address)
    if match is None or not 0 < int(match[3]) < 2**16:
        return False
    try:
        return match[2] is None or bool(ipaddress.IPv6Address(match[2]))
    except ValueError:
        return False


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
