"""The short version of ``p2pfl up``: start a peer on every port of every host, print, wait.

    python scripts/spawn_lan.py EXPERIMENT.toml hosts.toml [--insecure]

Nothing is checked beforehand, nothing is collected, no keys are made, and the peers end with
this script. It is here to be read and changed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path, PurePosixPath

import asyncssh

from p2pfl.errors import P2pflError, RunError
from p2pfl.experiment.experiment import Experiment
from p2pfl.fleet.host import Fleet, Host, Seat
from p2pfl.fleet.hosts import read_hosts
from p2pfl.fleet.parcel import parcel
from p2pfl.fleet.ssh import quoted


async def main(experiment: Experiment, fleet: Fleet, insecure: bool) -> None:
    """Start all peers and wait until they have ended."""
    files = parcel(experiment, fleet, keys={})
    await asyncio.gather(*(on_host(host, fleet.on(host), files, insecure) for host in fleet.hosts))


async def on_host(host: Host, seats: list[Seat], files: dict[str, bytes], insecure: bool) -> None:
    """Send the experiment to a host and run its peers."""
    options = {
        "port": host.ssh_port,
        "username": host.user,
        "client_keys": host.ssh_key,
        "known_hosts": host.known_hosts,
    }
    given = {key: value for key, value in options.items() if value}
    async with asyncssh.connect(host.ssh_host or host.address, **given) as shell:
        made = await shell.run("mktemp -d", check=True)
        folder = PurePosixPath(str(made.stdout).strip())
        async with shell.start_sftp_client() as sftp:
            for name, content in files.items():
                await sftp.makedirs(folder / PurePosixPath(name).parent, exist_ok=True)
                async with sftp.open(folder / name, "wb") as file:
                    await file.write(content)
        print(f"{host.name}: {folder}")
        await asyncio.gather(*(run_peer(shell, host, seat, folder, insecure) for seat in seats))


async def run_peer(
    shell: asyncssh.SSHClientConnection,
    host: Host,
    seat: Seat,
    folder: PurePosixPath,
    insecure: bool,
) -> None:
    """Run one peer and print what it says."""
    words = [host.interpreter, "-m", "p2pfl", "peer", "experiment.toml", "--peers", "peers.toml"]
    words += ["--id", str(seat.node), "--out", f"{seat.node:03d}"]
    words += ["--device", seat.device, "--threads", str(seat.threads)]
    words += ["--data", seat.data] if seat.data else []
    words += ["--insecure"] if insecure else []
    command = f"cd {folder} && exec {' '.join(map(quoted, words))}"
    async with shell.create_process(command, stderr=asyncssh.STDOUT) as peer:
        while line := await peer.stdout.readline():
            print(f"{seat.node:>3} {host.name}: {line}", end="", flush=True)
        code = (await peer.wait()).returncode
    if code:
        raise RunError(f"peer {seat.node} on {host.name} ended with code {code}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", type=Path)
    parser.add_argument("hosts", type=Path)
    parser.add_argument("--insecure", action="store_true", help="talk in clear between machines")
    given = parser.parse_args()
    try:
        experiment, fleet = Experiment.load(given.experiment), read_hosts(given.hosts)
        asyncio.run(main(experiment, fleet, given.insecure))
    except KeyboardInterrupt:
        sys.exit(130)
    except (P2pflError, asyncssh.Error, OSError, ValueError) as error:
        sys.exit(f"spawn_lan: {error}")
