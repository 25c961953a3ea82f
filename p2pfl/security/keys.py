"""Key pairs: who a peer is. The public key is its name to the others, the secret one proves it.

Keys are CURVE keys as ZeroMQ writes them: 40 characters of Z85.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import zmq
from zmq.utils import z85

from p2pfl.errors import RunError, UserError

LARGEST = 4096  # bytes of a key file


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A public and a secret key; the secret one is kept out of every printed form."""

    public: str
    secret: str = field(repr=False)


def default_path() -> Path:
    """Return where keys are kept: what P2PFL_KEYS says, else keys.toml among the user's settings.

    Raises:
        UserError: there is no home to look in.
    """
    if given := os.environ.get("P2PFL_KEYS"):
        return Path(given)
    if base := os.environ.get("XDG_CONFIG_HOME"):
        return Path(base) / "p2pfl" / "keys.toml"
    try:
        return Path.home() / ".config" / "p2pfl" / "keys.toml"
    except RuntimeError:
        raise UserError("there is no home folder; say where keys are with P2PFL_KEYS") from None


def is_key(text: object) -> TypeGuard[str]:
    """Say whether something is a key as ZeroMQ writes it."""
    if not isinstance(text, str) or len(text) != 40:
        return False
    try:
        z85.decode(text)
    except (KeyError, ValueError, struct.error):
        return False
    return True


def make_keys() -> KeyPair:
    """Return a new key pair, which is nowhere but in memory.

    The public key does not begin with a dash, which command lines take for an option.
    """
    while True:
        public, secret = (key.decode() for key in zmq.curve_keypair())
        if not public.startswith("-"):
            return KeyPair(public, secret)


def new_keys(path: Path) -> KeyPair:
    """Make a key pair and write it to a file that only its owner can read.

    Raises:
        UserError: there is such a file already, or it cannot be written.
    """
    keys = make_keys()
    text = f'public = "{keys.public}"\nsecret = "{keys.secret}"\n'
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror}") from None
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UserError(f"{path} is there already, and is not overwritten") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # a strange umask may have taken even our own rights
            file.write(text.encode())
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
    return keys


def read_keys(path: Path) -> KeyPair:
    """Read a key pair.

    Raises:
        UserError: the file is missing or malformed, or is not the owner's alone.
    """
    try:
        text = _read_private(path)
        table = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; `p2pfl keys new` makes it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # Without the parser's words, which may hold a piece of the secret.
        raise UserError(f"{path} is not valid TOML") from None
    public, secret = table.get("public"), table.get("secret")
    if len(table) != 2 or not is_key(public) or not is_key(secret):
        raise UserError(f"{path} does not hold a public and a secret key of 40 characters each")
    if zmq.curve_public(secret.encode()).decode() != public:
        raise UserError(f"{path}: the public key does not belong to the secret one")
    return KeyPair(public, secret)


def _read_private(path: Path) -> str:
    # What was opened is looked at, not the path: it might lead elsewhere a moment later.
    # Without O_NONBLOCK, opening a named pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise UserError(f"{path} is not a key file")
        if status.st_uid != os.geteuid():
            raise UserError(f"{path} belongs to another user")
        if status.st_mode & 0o077:
            raise UserError(f"{path} is open to other users; `chmod 600` it, or make new keys")
        return file.read(LARGEST).decode()
