"""Finding the other peers on a local network by mDNS, so that nobody writes addresses down.

A peer announces ``_p2pfl._tcp.local.`` with its port, its id and its run, and listens for
others of the same run. Anybody on the network may announce anything, and may withdraw what
others have announced: mDNS says where to dial, never who is there. That is for the handshake
to find out, by keys that were agreed on elsewhere. So a false announcement can waste dials and
can keep peers from finding each other, but lets nobody in. Where that is not good enough, a
file of addresses is.
"""

from __future__ import annotations

import hashlib
import importlib
import ipaddress
import secrets
import threading
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from p2pfl.errors import UserError

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf

SERVICE = "_p2pfl._tcp.local."
FEW = 4  # addresses remembered of one peer, so that a flood of announcements fills no memory


class _Place(NamedTuple):
    """Where a peer is said to listen."""

    name: str  # of the announcement
    address: str


class Discovery:
    """Announces one peer and finds the others, in threads of its own.

    Several addresses may be announced for one id: a machine has several networks, a peer has
    crashed and come back elsewhere, somebody lies. The first that came is offered until it is
    withdrawn or `skip` says that it is no good, so that a liar who comes late changes nothing,
    and one who comes early is passed over.

    Args:
        node: the id of the peer to announce.
        address: where others dial it, ``tcp://IPV4:PORT``; it is announced on that network alone.
        run: what all peers of one run have in common and others have not: a hex digest.
        key: the peer's public key, of which a fingerprint is announced for people to read.
        nodes: how many peers the run has; announcements of other ids are ignored.

    Raises:
        UserError: zeroconf is not installed, or it is no IPv4 address of this machine.
    """

    def __init__(self, node: int, address: str, run: str, key: str | None, nodes: int) -> None:
        library = _library()
        host, port = _host_and_port(address)
        self._node, self._run, self._nodes = node, run.encode(), nodes
        self._places: dict[int, list[_Place]] = {}
        self._lock = threading.Lock()
        try:
            self._zeroconf: Zeroconf = library.Zeroconf([host], ip_version=library.IPVersion.V4Only)
        except OSError as error:
            raise UserError(f"cannot find peers by mDNS on {host}: {error.strerror}") from error
        text = {"id": str(node), "run": run}
        if key is not None:
            text["key"] = hashlib.sha256(key.encode()).hexdigest()[:16]
        name = f"p2pfl-{node}-{secrets.token_hex(8)}"  # nobody else has it, so nobody is asked
        about = library.ServiceInfo(
            SERVICE,
            f"{name}.{SERVICE}",
            port,
            properties=text,
            server=f"{name}.local.",
            parsed_addresses=[host],
        )
        self._zeroconf.register_service(about, cooperating_responders=True)
        library.ServiceBrowser(self._zeroconf, SERVICE, handlers=[self._changed])

    def found(self) -> dict[int, str]:
        """Return where the other peers of this run are, as far as they have been found, by id."""
        with self._lock:
            return {node: places[0].address for node, places in self._places.items() if places}

    def skip(self, node: int, address: str) -> None:
        """Put an address behind the others announced for that peer: who is there is not it."""
        with self._lock:
            self._places.get(node, []).sort(key=lambda place: place.address == address)

    def close(self) -> None:
        """Withdraw the announcement, and find nobody any more; takes some tenths of a second."""
        self._zeroconf.close()

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Note an announcement that is new, has changed, or was withdrawn."""
        withdrawn = state_change is _library().ServiceStateChange.Removed
        node, addresses = (-1, []) if withdrawn else self._read(zeroconf, name)
        with self._lock:
            for other, places in self._places.items():
                places[:] = [
                    place
                    for place in places
                    if place.name != name or (other == node and place.address in addresses)
                ]
            for address in addresses:
                places = self._places.setdefault(node, [])
                if _Place(name, address) not in places:
                    # The newest gives way to one newer still: the first, which is offered, stays.
                    places[FEW - 1 :] = [_Place(name, address)]

    def _read(self, zeroconf: Zeroconf, name: str) -> tuple[int, list[str]]:
        """Return whom an announcement is about, and its addresses: none if it is not for us."""
        library = _library()
        try:
            about = library.ServiceInfo(SERVICE, name)
        except library.Error:  # the name of something else
            return -1, []
        about.load_from_cache(zeroconf)
        node, port = about.properties.get(b"id") or b"", about.port
        if about.properties.get(b"run") != self._run or not node.isdigit() or not port:
            return -1, []
        if not int(node) < self._nodes or int(node) == self._node:
            return -1, []
        hosts = about.parsed_addresses(library.IPVersion.V4Only)[:FEW]
        return int(node), [f"tcp://{host}:{port}" for host in hosts]


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        return importlib.import_module("zeroconf")
    except ImportError as error:
        raise UserError(
            "finding peers by mDNS needs zeroconf: pip install 'p2pfl-gossip[lan]'"
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.port:
            return str(ipaddress.IPv4Address(parts.hostname)), parts.port
    except ValueError:
        pass
    raise UserError(f"{address} cannot be announced by mDNS: expected tcp://IPV4:PORT")
