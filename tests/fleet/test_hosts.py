"""The hosts file, and what is made of it."""

import subprocess
from pathlib import Path

import pytest

from p2pfl.errors import UserError
from p2pfl.fleet.hosts import read_hosts
from p2pfl.fleet.ssh import quoted

GOOD = """
[defaults]
user = "p2pfl"
venv = "/opt/p2pfl"
keys = "~/keys.toml"
data = "/srv/data"

[[hosts]]
name = "a"
address = "10.0.0.1"
ports = [7000, 7001]
[[hosts.peers]]
port = 7001
device = "cuda:1"
threads = 2

[[hosts]]
name = "b"
address = "10.0.0.2"
ports = [7000]
user = "me"
data = "/data"
"""


def read(tmp_path, text):
    path = tmp_path / "hosts.toml"
    path.write_text(text)
    return read_hosts(path)


def test_nodes_are_handed_out_in_the_order_of_the_file(tmp_path):
    fleet = read(tmp_path, GOOD)
    assert [seat.node for seat in fleet.seats] == [0, 1, 2]
    assert [seat.address for seat in fleet.seats] == [
        "tcp://10.0.0.1:7000",
        "tcp://10.0.0.1:7001",
        "tcp://10.0.0.2:7000",
    ]
    assert [seat.device for seat in fleet.seats] == ["cpu", "cuda:1", "cpu"]
    assert [seat.threads for seat in fleet.seats] == [0, 2, 0]
    assert [seat.data for seat in fleet.seats] == ["/srv/data", "/srv/data", "/data"]
    assert [host.user for host in fleet.hosts] == ["p2pfl", "me"]
    assert fleet.hosts[0].interpreter == "/opt/p2pfl/bin/python"
    assert not fleet.is_loopback


def test_no_two_peers_have_the_same_keys(tmp_path):
    seats = read(tmp_path, GOOD).seats
    assert [seat.keys for seat in seats] == ["~/keys-7000.toml", "~/keys-7001.toml", "~/keys.toml"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('user = "p2pfl"', 'usr = "p2pfl"', "defaults.usr is unknown; did you mean 'user'?"),
        ('user = "me"', 'pyton = "x"', r"hosts\[1\].pyton is unknown; did you mean 'python'?"),
        ("threads = 2", "seed = 2", r"hosts\[0\].peers\[0\].seed is unknown"),
        ("port = 7001", "port = 7002", r"peers\[0\].port = 7002 is none of the host's ports"),
        ("threads = 2", "threads = -2", "threads = -2"),
        ('"10.0.0.2"', '"10.0.0.1"', "address tcp://10.0.0.1:7000 stands there twice"),
        ('name = "b"', 'name = "a"', "host name a stands there twice"),
        ('name = "b"', 'name = "101"', "peer 2: name = '101' must be .* not a number"),
        ('name = "b"', 'name = "a-7001"', "name = 'a-7001' is listed twice"),
        ('"10.0.0.2"', '"ward-b.lan"', r"hosts\[1\].address = 'ward-b.lan': expected an IPv4"),
        ('"10.0.0.2"', '"0.0.0.0"', r"hosts\[1\].address = '0.0.0.0' is that of no machine"),
        ('"10.0.0.2"', '"239.1.1.1"', "address = '239.1.1.1' is that of no machine"),
        ('"10.0.0.2"', '"255.255.255.255"', "address = '255.255.255.255' is that of no machine"),
        ('"10.0.0.2"', '"127.0.0.1"', "b has the address 127.0.0.1, .* but a has 10.0.0.1"),
        ("ports = [7000]", "ports = [70000]", "70000 is no port"),
        ('user = "me"', "ssh_port = 70000", r"hosts\[1\].ssh_port: 70000 is no port"),
        ('user = "me"', "ssh_port = -1", r"hosts\[1\].ssh_port: -1 is no port"),
        ('user = "me"', "ssh_port = 0", r"hosts\[1\].ssh_port: 0 is no port"),
        ("threads = 2", f"threads = {2**63 - 1}", "threads = 9223372036854775807: expected 0 to"),
        ('"~/keys.toml"', '"~me/keys.toml"', "'~me/keys.toml': of all homes only that of `user`"),
        ('"/opt/p2pfl"', '"~me"', "'~me': of all homes only that of `user`"),
        ('venv = "/opt/p2pfl"', 'python = "~me/python"', "'~me/python': of all homes only"),
        ("threads = 2", 'data = "~me/data"', "'~me/data': of all homes only that of `user`"),
        ("ports = [7000]", "ports = []", r"hosts\[1\].ports is missing"),
        ("ports = [7000]", 'ports = "7000"', r"hosts\[1\].ports = '7000': expected array"),
        ('user = "me"', 'python = "p"', r"hosts\[1\] has both python and venv"),
        ('user = "me"', 'ssh_key = "/none"', "ssh_key = '/none': there is no such file here"),
        ('keys = "~/keys.toml"', "", None),
        ('keys = "~/keys.toml"', "hosts = 1", "defaults.hosts is unknown"),
        ("[defaults]", "[default]", "the file.default is unknown; did you mean 'defaults'?"),
        ("[defaults]", "[defaults", "is not valid TOML"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, old, new, said):
    text = GOOD.replace(old, new)
    assert text != GOOD
    if said is None:
        assert {seat.keys for seat in read(tmp_path, text).seats} == {None}
        return
    with pytest.raises(UserError, match=said.replace("?", r"\?")) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "hosts.toml"))


def test_files_of_this_machine_start_at_the_hosts_file(tmp_path, monkeypatch):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id").touch()
    (tmp_path / "known").touch()
    files = 'ssh_key = "keys/id"\nknown_hosts = "~/known"\n'
    (tmp_path / "hosts.toml").write_text(GOOD.replace("[[hosts]]", f"{files}[[hosts]]", 1))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    host = read_hosts(Path(tmp_path.name, "hosts.toml")).hosts[0]
    assert (host.ssh_key, host.known_hosts) == (f"{tmp_path}/keys/id", f"{tmp_path}/known")


def test_a_home_of_nobody_is_one_line(tmp_path):
    text = GOOD.replace("[[hosts]]", 'ssh_key = "~nobody-at-all/id"\n[[hosts]]', 1)
    with pytest.raises(UserError, match="ssh_key or known_hosts: Could not determine home"):
        read(tmp_path, text)


def test_relative_paths_of_a_host_start_at_the_home_there(tmp_path):
    text = GOOD.replace("~/keys", "keys").replace("/srv/", "").replace("/opt/", "venvs/")
    fleet = read(tmp_path, text.replace("threads = 2", 'data = "own"'))
    assert [seat.data for seat in fleet.seats] == ["~/data", "~/own", "/data"]
    assert fleet.seats[2].keys == "~/keys.toml"
    assert fleet.hosts[0].interpreter == "~/venvs/p2pfl/bin/python"


@pytest.mark.parametrize(
    ("path", "there"), [("~", ""), ("~/a b", "/a b"), ("~/~b", "/~b"), ("~b", None)]
)
def test_a_shell_takes_a_path_as_python_does(path, there):
    done = subprocess.run(["sh", "-c", f"echo {quoted(path)}"], capture_output=True, text=True)
    assert done.stdout == (path if there is None else str(Path.home()) + there) + "\n"


@pytest.mark.parametrize("none", ["", 'keys = ""'])
def test_keys_of_some_only(tmp_path, none):
    text = GOOD.replace('keys = "~/keys.toml"', none).replace('user = "me"', 'keys = "k"')
    with pytest.raises(UserError, match="a has no `keys`, but others have"):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_hosts(tmp_path / "none.toml")
