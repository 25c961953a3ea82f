"""Peers find each other by mDNS, on loopback and between two network namespaces."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing

import pytest

from p2pfl.errors import UserError
from p2pfl.runtime.discovery import FEW, SERVICE, Discovery

zeroconf = pytest.importorskip("zeroconf")

RUN, OTHER = "ab" * 8, "cd" * 8
PATIENCE = 15.0  # seconds for what takes less than one
GROUP, PORT = "224.0.0.251", 5353
RESPONSE = 0x8400  # flags of an announcement: a response, by who owns the name
INTERNET, TTL = 1, 120


def until(condition):
    """Wait for the network, which has no event to wait for."""
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module", autouse=True)
def _multicast():
    with ExitStack() as stack:
        ear, mouth = (
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)
        )
        here = socket.inet_aton("127.0.0.1")
        ear.bind(("", 0))
        ear.settimeout(2)
        try:
            join = struct.pack("4s4s", socket.inet_aton(GROUP), here)
            ear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, join)
            mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            mouth.sendto(b"?", (GROUP, ear.getsockname()[1]))
            ear.recv(1)
        except OSError as error:
            pytest.skip(f"no multicast on loopback: {error}")


@pytest.fixture
def peer():
    """Make peers of a run of four."""
    with ExitStack() as stack:

        def make(node, run=RUN, port=7000, key=None):
            address = f"tcp://127.0.0.1:{port + node}"
            return stack.enter_context(closing(Discovery(node, address, run, key, nodes=4)))

        yield make


@pytest.fixture
def liar():
    """Announce anything: ``liar(name, text, port)``, and with ``ttl=0`` withdraw it."""
    with closing(zeroconf.Zeroconf(["127.0.0.1"], ip_version=zeroconf.IPVersion.V4Only)) as own:

        def announce(name, text, port=9, ttl=TTL, pointer=None):
            whole, server = pointer or f"{name}.{SERVICE}", f"{name}.local."
            info = zeroconf.ServiceInfo(SERVICE, f"{name}.{SERVICE}", properties=text)
            packet = zeroconf.DNSOutgoing(RESPONSE)
            for record in (
                zeroconf.DNSPointer(SERVICE, 12, INTERNET, ttl, whole),
                zeroconf.DNSService(whole, 33, INTERNET, ttl, 0, 0, port, server),
                zeroconf.DNSText(whole, 16, INTERNET, ttl, info.text),
                zeroconf.DNSAddress(server, 1, INTERNET, ttl, socket.inet_aton("127.0.0.1")),
            ):
                packet.add_answer_at_time(record, 0)
            own.send(packet)

        yield announce


def about(node, run=RUN):
    return {"id": str(node), "run": run}


def test_peers_of_a_run_find_each_other_and_nobody_else(peer):
    one, two, stranger = peer(0), peer(1, key="k" * 40), peer(2, OTHER)
    third, other = peer(2), peer(3, OTHER)
    assert until(lambda: len(one.found()) == len(two.found()) == len(third.found()) == 2)
    assert one.found() == {1: "tcp://127.0.0.1:7001", 2: "tcp://127.0.0.1:7002"}
    assert until(lambda: stranger.found() == {3: "tcp://127.0.0.1:7003"})
    assert until(lambda: other.found() == {2: "tcp://127.0.0.1:7002"})


def test_a_peer_that_ends_is_withdrawn_and_may_come_back_elsewhere(peer):
    one, two = peer(0), peer(1)
    assert until(one.found)
    two.close()
    two.close()
    assert until(lambda: not one.found())
    peer(1, port=8000)
    assert until(lambda: one.found() == {1: "tcp://127.0.0.1:8001"})


def test_the_first_is_offered_until_it_is_withdrawn_or_skipped(peer, liar):
    one = peer(0)
    for number, port in enumerate((1001, 1002, 1003)):
        liar(f"n{number}", about(1), port)
        assert until(lambda: 1 in one.found())
    liar("last", about(2), 1004)
    assert until(lambda: 2 in one.found())
    assert one.found()[1] == "tcp://127.0.0.1:1001"
    one.skip(1, "tcp://127.0.0.1:1001")
    assert one.found()[1] == "tcp://127.0.0.1:1002"
    liar("n1", about(1), 1002, ttl=0)
    assert until(lambda: one.found()[1] == "tcp://127.0.0.1:1003")
    one.skip(1, "tcp://127.0.0.1:1003")
    assert one.found()[1] == "tcp://127.0.0.1:1001"
    one.skip(3, "tcp://127.0.0.1:1")  # nobody has announced that one


def test_a_flood_fills_no_memory_and_hides_nobody_who_came_before(peer, liar):
    one, two = peer(0), peer(1)
    assert until(one.found)
    for number in range(500):
        liar(f"node{number}", about(number % 100), 1000 + number)
        liar(f"same{number}", about(1), 2000 + number)
    # A datagram may be lost in the flood, so this one is repeated.
    assert until(lambda: liar("last", about(3), 4242) or 3 in one.found())
    assert set(one.found()) <= {1, 2, 3}
    assert one.found()[1] == "tcp://127.0.0.1:7001"
    places = []
    for _ in range(FEW + 1):
        places.append(one.found()[1])
        one.skip(1, places[-1])
    assert len(set(places)) == FEW
    assert places[-1] == places[0]
    assert two.found()


def test_what_makes_no_sense_is_ignored(peer, liar):
    one = peer(0)
    texts = [{}, {"id": "1"}, {"run": RUN}, {"id": None, "run": RUN}]
    texts += [about(node) for node in ("-1", "1 ", "٣", "", "9" * 200, 0, 4)]
    for number, text in enumerate(texts):
        liar(f"bad{number}", text)
    liar("elsewhere", about(1), pointer="something._else._tcp.local.")
    liar("portless", about(1), port=0)
    liar("good", about(2), 4242)
    assert until(lambda: 2 in one.found())
    assert one.found() == {2: "tcp://127.0.0.1:4242"}


@pytest.mark.parametrize(
    "address",
    [
        "ipc:///tmp/x",
        "tcp://[::1]:7000",
        "tcp://somewhere:7000",
        "tcp://*:7000",
        "tcp://127.0.0.1",
        "tcp://1:99999",
    ],
)
def test_only_an_ipv4_address_can_be_announced(address):
    with pytest.raises(UserError, match=r"expected tcp://IPV4:PORT"):
        Discovery(0, address, RUN, None, 2)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UserError, match=r"cannot find peers by mDNS on 192\.0\.2\.1: "):
        Discovery(0, "tcp://192.0.2.1:7000", RUN, None, 2)


def test_without_zeroconf_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(UserError, match=r"pip install 'p2pfl-gossip\[lan\]'"):
        Discovery(0, "tcp://127.0.0.1:7000", RUN, None, 2)


NEIGHBOUR = f"""
import sys, time
from p2pfl.runtime.discovery import Discovery
node = int(sys.argv[1])
discovery = Discovery(node, f"tcp://{{sys.argv[2]}}:7000", "{RUN}", None, 2)
while not discovery.found():
    time.sleep(0.02)
print(discovery.found(), flush=True)
sys.stdin.read()
discovery.close()
"""


@pytest.mark.processes
def test_two_machines_find_each_other():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 to make network namespaces")
    names = [f"p2pfl-{os.getpid()}-{side}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        ends = ["link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0"]
        subprocess.run(["ip", *ends, "netns", names[1]], check=True)
        for number, name in enumerate(names):
            for words in (f"addr add 10.77.0.{number + 1}/24 dev eth0", "link set eth0 up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        peers = []
        for number, (name, address) in enumerate(
            zip(names, ("10.77.0.1", "10.77.0.2"), strict=True)
        ):
            inside = ["ip", "netns", "exec", name, sys.executable, "-c", NEIGHBOUR]
            peers.append(
                stack.enter_context(
                    subprocess.Popen(
                        [*inside, str(number), address],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
            )
            stack.callback(peers[-1].kill)
        watchdog = threading.Timer(60, lambda: [each.kill() for each in peers])
        watchdog.start()
        stack.callback(watchdog.cancel)
        assert peers[0].stdout.readline() == "{1: 'tcp://10.77.0.2:7000'}\n"
        assert peers[1].stdout.readline() == "{0: 'tcp://10.77.0.1:7000'}\n"
        for each in peers:
            each.stdin.close()
            assert each.wait(30) == 0
