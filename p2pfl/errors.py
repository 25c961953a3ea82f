"""What can go wrong, by who is at fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any


class P2pflError(Exception):
    """The root of every error this package raises on purpose.

    Attributes:
        links: what is to be said of the links of a peer that failed, for its summary.
    """

    links: Mapping[str, Any] = MappingProxyType({})


class UserError(P2pflError):
    """Something the user wrote or named cannot work; the message says what and why.

    The command line prints the message as one line and exits with code 2.
    """


class RunError(P2pflError):
    """A run failed through no mistake in its description (a peer died, a port was taken).

    The command line prints the message as one line and exits with code 1.
    """


def diverged(node: int, when: str, loss: float) -> RunError:
    """Return the error of a node whose training loss is no longer finite."""
    return RunError(
        f"node {node} diverged {when}: its training loss is {loss}"
        " (a smaller learning rate, or clipping, may help)"
    )


class ProtocolError(P2pflError):
    """A rule of the protocol between peers was broken."""


class LocalProtocolError(ProtocolError):
    """Our own runtime told the peer something that cannot have happened: a bug here."""


class RemoteProtocolError(ProtocolError):
    """Another peer sent something it must not send: drop it and count it, but go on."""


@contextmanager
def short_of_memory() -> Iterator[None]:
    """Tell in one line that memory has run out, which Python, numpy and torch do in many.

    Raises:
        RunError: memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = (str(error).splitlines() or [""])[0]
        # torch has a class of its own for this on GPUs only.
        _, found, rest = text.partition("can't allocate memory: ")
        if not found and not isinstance(error, MemoryError) and "out of memory" not in text:
            raise
        asked = rest.partition(".")[0] or text
        raise RunError(f"out of memory: {asked}" if asked else "out of memory") from error


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line.

    >>> first_line(ValueError("too many\\nmore about it"))
    'ValueError: too many'
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def reason(error: BaseException) -> str:
    """Return the same without its type, which stands for an exception that says nothing.

    >>> reason(ValueError("too many\\nmore about it")), reason(ValueError())
    ('too many', 'ValueError')
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__
