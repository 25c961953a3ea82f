"""Who takes part, as one peer is told: the file of peers, our own keys, and where we stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from p2pfl.addresses import is_address, is_loopback, is_wildcard
from p2pfl.errors import UserError
from p2pfl.launch.serving import Post
from p2pfl.runtime.endpoint import Keyring
from p2pfl.security.keys import KeyPair, default_path, read_keys
from p2pfl.security.roster import Roster, read_roster

LOOK_EVERY = 1.0  # seconds between two looks at the file of peers
IN_CLEAR = (
    "WARNING: links are in clear (--insecure). Anybody on the network can read every model,"
    " change it, and take part as any peer."
)


@dataclass(frozen=True)
class Membership:
    """What one peer knows of all before it starts.

    Attributes:
        file: of peers; None: there is none.
        roster: what it says.
        own: our keys; None: links are in clear.
        insecure: whether that may be so beyond this machine.
        warning: what is given up by that.
    """

    file: Path | None
    roster: Roster
    own: KeyPair | None
    insecure: bool

    @classmethod
    def read(cls, file: Path | None, keys: Path | None, insecure: bool) -> Membership:
        """Read the file of peers and our keys.

        Our keys are those in `keys`, or, if the file lists keys, those of this user.

        Raises:
            UserError: a file is missing or malformed, or `insecure` contradicts the keys.
        """
        roster = read_roster(file) if file else Roster([])
        if keys and insecure:
            raise UserError("--keys encrypts every link, --insecure none: give one of them")
        if keys and not roster.keys:
            where = f"{file} lists no keys" if file else "there is no --peers file"
            raise UserError(f"--keys needs the keys of the others too, and {where}")
        if insecure or not (keys or roster.keys):
            return cls(file, roster, None, insecure)
        return cls(file, roster, read_keys(keys or default_path()), insecure)

    @property
    def warning(self) -> str:
        """What to tell who asked for links in clear."""
        return IN_CLEAR if self.own is None else ""

    def post(self, id: int | None, bind: str | None, contact: str | None, discover: bool) -> Post:
        """Return where this peer stands.

        Args:
            id: which it is; None: whose key we hold.
            bind: where it listens; None: at the address that is listed for it.
            contact: ``"K@tcp://HOST:PORT"``, or None.
            discover: whether to look for the others by mDNS.

        Raises:
            UserError: that does not say who or where it is, or is not safe.
        """
        node = self._node(id)
        friend = _contact(contact) if contact else None
        if friend and discover:
            raise UserError("--contact and --discover: one of them is enough")
        addresses = dict(self.roster.addresses)
        if friend:
            addresses.setdefault(friend[0], friend[1])
        listen = bind or addresses.get(node)
        if bind and not (is_address(bind) or is_wildcard(bind)):
            raise UserError(f"--bind {bind}: expected tcp://HOST:PORT, as in tcp://10.0.0.1:7000")
        if listen is None:
            raise UserError(f"where does peer {node} listen? List its address, or give --bind")
        if self.own is None and not self.insecure:
            _check_loopback([listen, *addresses.values()], discover)
        keyring = Keyring(self.own, self.roster.keys) if self.own else None
        return Post(
            node,
            listen,
            addresses,
            keyring=keyring,
            contact=friend,
            discover=discover,
            insecure=self.insecure,
            revoked=self.roster.revoked,
            relisted=self._relisted(),
        )

    def _relisted(self) -> Callable[[], Mapping[int, str] | None]:
        if self.own is None or self.file is None:
            return lambda: None
        return _Relisted(self.file, self.own.public)

    def _node(self, id: int | None) -> int:
        if self.own is None:
            if id is None:
                raise UserError("which peer is this? Give --id")
            return id
        key = self.own.public
        listed = self.roster.id_of(key)
        if listed is None:
            known = any(one.key == key for one in self.roster.members)
            how = "revoked" if known else "not listed"
            raise UserError(f"our key {key} is {how} in {self.file}")
        if id not in (None, listed):
            raise UserError(f"--id {id}, but our key is listed in {self.file} for peer {listed}")
        return listed


class _Relisted:
    """Looks at a file of peers now and then, and returns its keys when it has changed.

    Who is revoked stays so for this run, so a file that is only half there must not be taken for
    a new one: it has to stay as it is for two looks, and to have our own key in it.
    """

    def __init__(self, file: Path, own: str) -> None:
        self._file, self._own, self._next = file, own, 0.0
        self._taken = self._seen = _stamp(file)

    def __call__(self) -> Mapping[int, str] | None:
        if (now := time.monotonic()) < self._next:
            return None
        self._next = now + LOOK_EVERY
        before, self._seen = self._seen, _stamp(self._file)
        if self._seen in (None, self._taken) or self._seen != before:
            return None
        try:
            roster = read_roster(self._file)
        except UserError:  # the old list holds until there is one that can be read
            return None
        if all(one.key != self._own for one in roster.members):
            return None
        self._taken = self._seen
        return roster.keys


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _contact(text: str) -> tuple[int, str]:
    peer, _, address = text.partition("@")
    if not peer.isdecimal() or not address.startswith("tcp://"):
        raise UserError(
            f"--contact {text}: expected K@tcp://HOST:PORT, as in 0@tcp://10.0.0.1:7000"
        )
    return int(peer), address


def _check_loopback(addresses: list[str], discover: bool) -> None:
    outside = [address for address in addresses if not is_loopback(address)]
    if outside or discover:
        where = f"{outside[0]} is" if outside else "peers found by --discover are"
        raise UserError(
            f"{where} beyond this machine, and without keys anybody on the network could read and"
            " change models. Make keys (`p2pfl keys new` on each host) and list them in the"
            " --peers file, or accept the risk with --insecure"
        )
