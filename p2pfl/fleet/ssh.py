"""A host at the other end of an SSH connection: ask it something, follow it, send and fetch."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shlex
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from p2pfl.errors import RunError, UserError
from p2pfl.fleet.host import Host

try:
    import asyncssh
except ImportError as missing:
    raise UserError(
        "peers on other machines are started over SSH: pip install 'p2pfl-gossip[lan]'"
    ) from missing

T = TypeVar("T")

PATIENCE = 10.0  # seconds to wait for a connection, and for a login
KEEPALIVE = 5.0  # seconds between two signs of life; three missed ones are a lost connection
ANSWER = 60.0  # seconds a command may take; to import torch from a cold disk takes some
SILENCE = 30.0  # seconds without news after which whoever we follow is taken for lost


class HostError(RunError):
    """A host cannot be reached, or cannot do what it is asked; the message names it."""


class Done(NamedTuple):
    """What a command has come to."""

    code: int
    out: str
    err: str


class Shell:
    """A connection to a host. Make one with `connect`, and close it."""

    def __init__(self, host: Host, connection: asyncssh.SSHClientConnection) -> None:
        self.host, self._connection = host, connection

    @classmethod
    async def connect(cls, host: Host) -> Self:
        """Log in.

        Raises:
            HostError: it says why that cannot be.
        """
        options: dict[str, Any] = {}
        if host.ssh_port:
            options["port"] = host.ssh_port
        if host.user:
            options["username"] = host.user
        if host.ssh_key:
            options["client_keys"] = [host.ssh_key]
        if host.known_hosts:
            options["known_hosts"] = host.known_hosts
        with _telling(host):
            connection = await asyncssh.connect(
                host.ssh_host or host.address,
                connect_timeout=PATIENCE,
                login_timeout=PATIENCE,
                keepalive_interval=KEEPALIVE,
                **options,
            )
        return cls(host, connection)

    @classmethod
    @asynccontextmanager
    async def to(cls, host: Host) -> AsyncIterator[Self]:
        """Log in for the length of a block.

        Raises:
            HostError: as `connect`.
        """
        shell = await cls.connect(host)
        try:
            yield shell
        finally:
            shell.close()

    def close(self) -> None:
        """Close the connection at once."""
        self._connection.abort()

    async def run(self, command: str, text: str = "") -> Done:
        """Run a line of shell with this text on standard input.

        Raises:
            HostError: it does not end in time, or the connection is lost.
        """
        with _telling(self.host):
            try:
                async with asyncio.timeout(ANSWER):
                    process = await self._connection.create_process(command)
                    with suppress(BrokenPipeError):  # it has ended already, and says why
                        process.stdin.write(text)
                        process.stdin.write_eof()
                    done = await process.wait()
            except TimeoutError:
                raise HostError(
                    f"{self.host.name}: its shell, or Python, does not answer within {ANSWER:g} s"
                ) from None
        code = -1 if done.returncode is None else done.returncode  # None: it was killed
        return Done(code, str(done.stdout), str(done.stderr))

    async def python(self, words: str, text: str = "") -> Done:
        """Run the host's Python with these words on its command line, quoted where they must."""
        return await self.run(f"{quoted(self.host.interpreter)} {words}", text)

    async def ask(self, verb: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
        """Let `p2pfl.fleet.remote` do something there, and return what it answers.

        Raises:
            HostError: it could not, or the connection is lost.
        """
        done = await self.python(f"-m p2pfl.fleet.remote {verb}", json.dumps(fields) + "\n")
        if done.code:
            raise HostError(f"{self.host.name}: {last_line(done.err) or f'{verb} failed'}")
        try:
            answer: dict[str, Any] = json.loads(last_line(done.out))
        except ValueError:
            raise HostError(f"{self.host.name}: what it answers cannot be understood") from None
        return answer

    async def news(
        self, folder: str, at: Mapping[int, int], wait: bool = True, log: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield what `p2pfl.fleet.remote.follow` prints.

        Raises:
            HostError: it cannot be run or was killed, or the connection is lost or was silent
                for too long.
        """
        fields = {"folder": folder, "at": at, "wait": wait, "log": log}
        command = f"{quoted(self.host.interpreter)} -m p2pfl.fleet.remote follow"
        with _telling(self.host):
            async with self._connection.create_process(command) as process:
                with suppress(BrokenPipeError):  # it has ended already, and says why
                    process.stdin.write(json.dumps(fields) + "\n")
                while True:
                    async with asyncio.timeout(SILENCE):
                        line = await process.stdout.readline()
                    if not line:
                        async with asyncio.timeout(SILENCE):
                            done = await process.wait()
                        if done.returncode != 0:  # None: the connection is lost
                            why = last_line(str(done.stderr)) or "the connection is lost"
                            raise HostError(f"{self.host.name}: {why}")
                        return
                    if (news := _parsed(line)) is not None:
                        yield news

    async def send(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Write files below a folder that is there."""
        async with self._files() as sftp:
            for name, content in files.items():
                path = f"{folder}/{name}"
                await sftp.makedirs(path.rpartition("/")[0], exist_ok=True)
                async with sftp.open(path, "wb") as file:
                    await file.write(content)

    async def fetch(self, names: Iterable[tuple[str, Path]]) -> None:
        """Copy files from there to here; those that are not there are left out."""
        async with self._files() as sftp:
            for there, here in names:
                if await sftp.isfile(there):
                    here.parent.mkdir(parents=True, exist_ok=True)
                    await sftp.get(there, here)

    @asynccontextmanager
    async def _files(self) -> AsyncIterator[asyncssh.SFTPClient]:
        with _telling(self.host):
            try:
                async with asyncio.timeout(ANSWER):
                    client = await self._connection.start_sftp_client()
            except asyncssh.ChannelOpenError as error:
                if error.code != asyncssh.OPEN_REQUEST_SESSION_FAILED:
                    raise HostError(f"{self.host.name}: {error.reason}") from error
                raise HostError(
                    f"{self.host.name}: its SSH server has no SFTP, which copies files:"
                    f" {error.reason} (`Subsystem sftp` in its sshd_config)"
                ) from error
            async with client as sftp:
                yield sftp


async def everywhere(asked: Iterable[Awaitable[T]], cannot: str) -> list[T]:
    """Do something on all hosts at the same time.

    Args:
        asked: what is done, for each host.
        cannot: what to say of hosts that have a fault, as ``"cannot take part"``.

    Raises:
        RunError: with the faults of all hosts that have some.
    """
    answers = await asyncio.gather(*asked, return_exceptions=True)
    faults = [answer for answer in answers if isinstance(answer, BaseException)]
    for fault in faults:
        if not isinstance(fault, HostError):
            raise fault
    if faults:
        lines = "\n".join(map(str, faults))
        raise RunError(f"{len(faults)} of {len(answers)} hosts {cannot}\n{lines}")
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty; Python's tracebacks end with the cause."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def quoted(path: str) -> str:
    """Quote a path for a shell, which would take a quoted ``~`` for a name."""
    first, slash, rest = path.partition("/")
    return f'"$HOME"{slash}{shlex.quote(rest)}' if first == "~" else shlex.quote(path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        news = json.loads(line)
    except ValueError:  # a login script may print something
        return None
    return news if isinstance(news, dict) else None


@contextmanager
def _telling(host: Host) -> Iterator[None]:
    """Turn what SSH complains of into one line that names the host."""
    try:
        yield
    except (asyncssh.Error, OSError, ValueError) as error:  # ValueError: a key, ~/.ssh/config
        raise HostError(f"{host.name}: {_why(host, error)}") from error


def _why(host: Host, error: Exception) -> str:  # noqa: C901 - a line for each
    where = f"{host.ssh_host or host.address}" + (f" port {host.ssh_port}" if host.ssh_port else "")
    match error:
        case asyncssh.HostKeyNotVerifiable():
            return (
                f"the host key of {where} is unknown or has changed: compare it, and add it to"
                f" {host.known_hosts or '~/.ssh/known_hosts'}"
            )
        case asyncssh.PermissionDenied():
            return f"login is refused to {host.user or 'this user'}: wrong user, or wrong ssh key"
        case asyncssh.KeyImportError() | asyncssh.KeyEncryptionError():
            return f"the ssh key {host.ssh_key} cannot be read: {error}"
        case TimeoutError():
            return f"{where} does not answer"
        case asyncssh.SFTPError():
            return f"a file cannot be copied: {error.reason}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):  # SFTP has words of its own for theirs
            return f"its files cannot be kept on this machine: {error.strerror}"
        case OSError(filename=str() | bytes() as file):  # a key; the network has no names
            return f"{os.fsdecode(file)} on this machine: {error.strerror}"
        case OSError():
            return f"{where} cannot be reached: {error.strerror or error}"
    return f"ssh: {error}"
