"""Three machines on a slow network: namespaces with an address, a link and an sshd each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import tomli_w
from fleet_cases import small, summary

from p2pfl.fleet.remote import pid
from p2pfl.results.runs import read_run

SSHD = "/usr/sbin/sshd"
RATE = "20mbit"

SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
SetEnv OMP_NUM_THREADS=1
Subsystem sftp internal-sftp
"""


def can():
    """Say why this machine cannot do it, if so."""
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    missing = [tool for tool in ("ip", "tc", "ssh-keygen", SSHD) if not shutil.which(tool)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"p2pfl-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "no network namespaces here"
    sh("ip", "netns", "del", name)
    return None


def sh(*words):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)


def inside(space, *words):
    return ["ip", "netns", "exec", space, *map(str, words)]


@pytest.fixture
def spaces(tmp_path):
    """Make four namespaces on a bridge, of which three have an sshd; return their names."""
    if why := can():
        pytest.skip(why)
    names = [f"p2pfl-{os.getpid()}-{i}" for i in range(4)]
    switch = f"p2pfl-{os.getpid()}-switch"
    with ExitStack() as undo:
        for name in (switch, *names):
            sh("ip", "netns", "add", name)
            undo.callback(sh, "ip", "netns", "del", name)
        sh(*inside(switch, "ip", "link", "add", "bridge", "type", "bridge"))
        sh(*inside(switch, "ip", "link", "set", "bridge", "up"))
        for i, name in enumerate(names):
            veth = ("ip", "link", "add", "eth0", "type", "veth", "peer", f"port{i}")
            sh(*inside(name, *veth, "netns", switch))
            sh(*inside(switch, "ip", "link", "set", f"port{i}", "master", "bridge", "up"))
            sh(*inside(name, "ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0"))
            sh(*inside(name, "ip", "link", "set", "lo", "up"))
            sh(*inside(name, "ip", "link", "set", "eth0", "up"))
            shape = ("tbf", "rate", RATE, "burst", "64kb", "latency", "100ms")
            sh(*inside(name, "tc", "qdisc", "add", "dev", "eth0", "root", *shape))
        undo.callback(kill_peers, tmp_path)
        start_sshds(tmp_path, names[:3], undo)
        yield names


def start_sshds(folder, names, undo):
    for key in ("host_key", "id"):
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"10.77.0.{i} {public}" for i in (1, 2, 3)))
    if not Path("/run/sshd").exists():  # sshd asks for this empty folder
        Path("/run/sshd").mkdir(mode=0o755)
        undo.callback(Path("/run/sshd").rmdir)
    for name in names:
        command = inside(name, SSHD, "-D", "-e", "-f", folder / "sshd_config")
        with (folder / f"{name}.log").open("w") as log:
            server = subprocess.Popen(command, stderr=log, start_new_session=True)
        undo.callback(server.wait)
        undo.callback(server.terminate)
        deadline = time.monotonic() + 20
        while "listening on 0.0.0.0" not in (folder / f"{name}.log").read_text():
            assert server.poll() is None, (folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def kill_peers(folder):
    for path in folder.glob("host-*/*/*.pid"):
        if (process := pid(path.with_suffix(""))) is not None:
            os.kill(process, signal.SIGKILL)


def write(folder):
    defaults = {
        "ssh_key": str(folder / "id"),
        "known_hosts": str(folder / "known_hosts"),
        "user": "root",
        "python": sys.executable,
        "threads": 1,
    }
    hosts = [
        {
            "name": f"ward-{i}",
            "address": f"10.77.0.{i}",
            "ports": [7000],
            "workdir": str(folder / f"host-{i}"),
            "keys": str(folder / f"keys-{i}.toml"),
        }
        for i in (1, 2, 3)
    ]
    (folder / "hosts.toml").write_text(tomli_w.dumps({"defaults": defaults, "hosts": hosts}))
    tables = small(data={"name": "digits"}, pace={"rounds": 20})
    (folder / "small.toml").write_text(tomli_w.dumps(tables))


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_on_three_machines(tmp_path, spaces):
    write(tmp_path)
    words = ("up", "small.toml", "--hosts", "hosts.toml", "--out", "run")
    command = inside(spaces[3], sys.executable, "-m", "p2pfl", *words)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path / "run")
    assert (found["status"], found["rounds"], found["nodes"]) == ("finished", 20, 3)
    assert len(read_run(tmp_path / "run").metrics["round"]) == 60
    record = json.loads((tmp_path / "run" / "fleet.json").read_text())
    assert [place["host"]["address"] for place in record["places"]] == [
        f"10.77.0.{i}" for i in (1, 2, 3)
    ]
