"""What is found wrong with hosts before anything starts, and that it is told of all of them."""

import asyncio
import socket
import sys

import asyncssh
import pytest
from fleet_cases import experiment, fleet, free_port

from p2pfl.errors import RunError, UserError
from p2pfl.fleet import launch, preflight, ssh
from p2pfl.fleet.collect import LOG
from p2pfl.fleet.launch import Launch, up
from p2pfl.fleet.record import Place
from p2pfl.fleet.ssh import HostError, Shell
from p2pfl.security.keys import read_keys

pytestmark = pytest.mark.processes  # not peers, but shells


def refusal(sshd, sections=None, **changes):
    """Return what `up` says of hosts that are no good; nothing may have started."""
    launch = Launch(experiment(**(sections or {})), fleet(sshd, **changes))
    with pytest.raises(RunError) as caught:
        asyncio.run(up(launch, lambda: pytest.fail("a run folder was made"), None))
    assert not list(sshd.folder.glob("*/.local"))
    return str(caught.value)


def test_faults_of_all_hosts_are_told(sshd):
    said = refusal(sshd, a={"ssh_port": free_port()}, b={"python": "/nowhere/python"})
    first, *lines = said.splitlines()
    assert first == "2 of 3 hosts cannot take part"
    assert [line.split(":")[0] for line in lines] == ["ward-a", "ward-b"]


def test_a_host_that_cannot_be_reached(sshd):
    port = free_port()
    assert f"ward-a: 127.0.0.1 port {port} cannot be reached" in refusal(sshd, a={"ssh_port": port})


def test_a_wrong_ssh_key(sshd):
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(sshd.folder / "other")
    said = refusal(sshd, b={"ssh_key": str(sshd.folder / "other")})
    assert "ward-b: login is refused to ward-b: wrong user, or wrong ssh key" in said


def test_what_is_no_ssh_key(sshd):
    (sshd.folder / "other").write_text("nonsense")
    said = refusal(sshd, b={"ssh_key": str(sshd.folder / "other")})
    assert f"ward-b: the ssh key {sshd.folder / 'other'} cannot be read" in said


def test_an_ssh_key_that_is_there_no_more(sshd):
    key = sshd.folder / "other"
    key.touch()
    host = fleet(sshd, b={"ssh_key": str(key)}).hosts[1]
    key.unlink()
    with pytest.raises(HostError, match=f"^ward-b: {key} on this machine: No such file"):
        asyncio.run(Shell.connect(host))


def test_a_full_disk_of_this_machine_is_no_fault_of_a_host(sshd):
    (sshd.home("ward-b") / "log").write_text("words")
    (sshd.folder / "here").symlink_to("/dev/full")

    async def fetch() -> None:
        async with Shell.to(fleet(sshd).hosts[1]) as shell:
            await shell.fetch([(str(sshd.home("ward-b") / "log"), sshd.folder / "here")])

    with pytest.raises(HostError, match=r"^ward-b: its files cannot be kept on this machine: No"):
        asyncio.run(fetch())


def test_a_connection_that_was_lost_is_not_told_as_a_server_without_sftp(sshd):
    async def fetch() -> None:
        async with Shell.to(fleet(sshd).hosts[1]) as shell:
            shell.close()
            await shell.fetch([])

    with pytest.raises(HostError, match="ward-b: SSH connection closed"):
        asyncio.run(fetch())


def test_results_are_collected_although_the_connection_was_lost_meanwhile(sshd, tmp_path):
    (sshd.home("ward-b") / "001.log").write_text("words")

    async def collect() -> None:
        host = fleet(sshd).hosts[1]
        shell = await Shell.connect(host)
        shell.close()
        place = Place(host, str(sshd.home("ward-b")), [1])
        await launch._fetch(tmp_path / "run", place, {host.name: shell})

    asyncio.run(collect())
    assert (tmp_path / "run" / "peers" / "001" / LOG).read_text() == "words"


def test_an_unknown_host_key(sshd):
    (sshd.folder / "empty").touch()
    said = refusal(sshd, c={"known_hosts": str(sshd.folder / "empty")})
    assert "ward-c: the host key of 127.0.0.1 port" in said
    assert "is unknown or has changed" in said


def test_python_is_missing(sshd):
    said = refusal(sshd, a={"python": "~/none/python"})
    assert "ward-a: there is no Python at ~/none/python" in said


def test_the_package_is_missing(sshd):
    path = sshd.fake("ward-a", "bare", f'exec {sys.executable} -S -I "$@"')
    assert f"ward-a: {path} has no p2pfl; install p2pfl-gossip" in refusal(
        sshd, a={"python": str(path)}
    )


def test_a_folder_with_the_name_of_the_package(sshd):
    (sshd.home("ward-a") / "p2pfl").mkdir()
    bare = f'unset PYTHONPATH; exec {sys.executable} -S "$@"'
    path = sshd.fake("ward-a", "bare", bare)
    assert f"ward-a: {path} has no p2pfl; install p2pfl-gossip" in refusal(
        sshd, a={"python": str(path)}
    )


def test_something_that_a_peer_imports_is_missing(sshd, monkeypatch):
    monkeypatch.setattr(preflight, "NEEDED", ("none_such",))
    said = refusal(sshd)
    assert said.count("cannot run a peer: No module named 'none_such'") == 3


def test_a_device_that_is_not_there(sshd):
    said = refusal(sshd, b={"device": "cuda:99"})
    assert "ward-b: device cuda:99 cannot be used: " in said


def test_a_host_that_hangs(sshd, monkeypatch):
    monkeypatch.setattr(ssh, "ANSWER", 0.5)
    path = sshd.fake("ward-a", "python", "exec sleep 60")
    said = refusal(sshd, a={"python": str(path)})
    assert "ward-a: its shell, or Python, does not answer within 0.5 s" in said


def test_an_ssh_server_that_copies_no_files(sshd, monkeypatch):
    session = asyncssh.stream.SSHServerStreamSession
    monkeypatch.setattr(session, "subsystem_requested", lambda *_: False)
    assert refusal(sshd).count("its SSH server has no SFTP, which copies files") == 3


def test_another_version(sshd):
    sshd.fake("ward-b", "old", "echo 9.9.9")
    said = refusal(sshd, b={"python": "~/bin/old"})
    assert "ward-b: ~/bin/old has p2pfl 9.9.9, but here it is " in said


@pytest.mark.parametrize(("offset", "way"), [(60, "fast"), (-60, "slow")])
def test_a_clock_that_is_off(sshd, offset, way):
    now = f'exec {sys.executable} -c "import time; print(int(time.time()) + {offset})"'
    sshd.fake("ward-c", "date", now)
    assert f"s {way}; set it, or --max-skew" in refusal(sshd)


def test_a_port_in_use(sshd):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert f"ward-a: port {port} is in use" in refusal(sshd, a={"ports": [port]})


def test_an_address_of_another_machine(sshd):
    launch = Launch(experiment(), beyond(sshd), insecure=True)
    with pytest.raises(RunError, match=r"ward-a: 192.0.2.1 is none of its addresses"):
        asyncio.run(up(launch, lambda: pytest.fail("a run folder was made"), None))


def beyond(sshd):
    """Return hosts with addresses of other machines."""
    addresses = {letter: f"192.0.2.{number}" for number, letter in enumerate("abc", 1)}
    places = {key: {"address": place, "ssh_host": "127.0.0.1"} for key, place in addresses.items()}
    return fleet(sshd, **places)


CSV = {"data": {"name": "csv", "path": "x.csv", "target": "y"}}


def test_data_that_are_not_there(sshd):
    for name in ("ward-a", "ward-c"):
        (sshd.home(name) / "data").mkdir()
    (sshd.home("ward-a") / "data" / "x.csv").touch()
    data = {"data": "~/data"}
    said = refusal(sshd, CSV, a=data, b=data, c=data)
    assert said.splitlines()[1:] == [
        "ward-b: there is no data folder ~/data",
        "ward-c: there is no data file ~/data/x.csv",
    ]


def test_relative_data_need_a_folder(sshd):
    with pytest.raises(UserError, match=r"'x.csv' is relative: the hosts file must say"):
        Launch(experiment(**CSV), fleet(sshd)).check()


def test_keys_that_cannot_be_made(sshd):
    fails = f'case "$*" in *keys*) echo no room >&2; exit 1;; esac; exec {sys.executable} "$@"'
    path = str(sshd.fake("ward-a", "python", fails))
    told = refusal(sshd, a={"keys": "~/k", "python": path}, b={"keys": "~/k"}, c={"keys": "~/k"})
    assert "ward-a: no keys in ~/k: no room" in told


def test_peers_with_the_same_keys_are_refused_before_anything_starts(sshd):
    own, shared = {"keys": "~/keys.toml"}, {"keys": str(sshd.folder / "keys.toml")}
    launch = Launch(experiment(), fleet(sshd, a=own, b=shared, c=shared))
    with pytest.raises(UserError, match=r"^ward-b and ward-c have the same keys: do they share"):
        asyncio.run(up(launch, lambda: pytest.fail("a run folder was made"), None))


def test_a_file_that_cannot_be_sent_is_told_before_a_run_folder_is_made(tmp_path, sshd):
    (tmp_path / "line.edges").write_text("0 1\n1 2\n")
    launch = Launch(experiment(topology=str(tmp_path / "line.edges")), fleet(sshd))
    (tmp_path / "line.edges").unlink()
    with pytest.raises(UserError, match=r"line\.edges cannot be read: No such file"):
        asyncio.run(up(launch, lambda: pytest.fail("a run folder was made"), None))


def test_keys_are_made_once_and_stay_where_they_are(sshd):
    keys = {"keys": "~/.config/keys.toml"}
    hosts = fleet(sshd, a=keys, b=keys, c=keys)
    checks = preflight.Checks(experiment(), hosts, max_skew=5.0)

    async def ask(host):
        shell = await Shell.connect(host)
        try:
            return [await preflight.preflight(shell, checks) for _ in range(2)]
        finally:
            shell.close()

    first, again = asyncio.run(ask(hosts.hosts[1]))
    assert first == again
    path = sshd.home("ward-b") / ".config" / "keys.toml"
    assert first == {1: read_keys(path).public}
    assert path.stat().st_mode & 0o777 == 0o600


def test_ports_and_nodes_must_agree(sshd):
    with pytest.raises(UserError, match=r"has 3 ports, .* nodes = 4"):
        Launch(experiment(nodes=4), fleet(sshd)).check()


def test_machines_do_not_talk_in_clear_unasked(sshd):
    with pytest.raises(UserError, match="would talk in clear"):
        Launch(experiment(), beyond(sshd)).check()
    Launch(experiment(), beyond(sshd), insecure=True).check()
