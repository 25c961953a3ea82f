"""Peers that know one address, or none, find each other and train."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from socket import AF_INET, IP_ADD_MEMBERSHIP, IP_MULTICAST_IF, IPPROTO_IP, SOCK_DGRAM, inet_aton
from socket import socket as new_socket
from typing import Any

import pytest
import zmq
from launch_cases import free_address, p2pfl, small, summary, wait_for
from secure_cases import Scene

from p2pfl.errors import RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.membership import Membership
from p2pfl.launch.serving import Served, serve
from p2pfl.runtime import finding, wire
from p2pfl.runtime.discovery import Discovery
from p2pfl.runtime.wire import Header, Kind
from p2pfl.security.curve import secure_dialler
from p2pfl.security.keys import make_keys

pytestmark = pytest.mark.processes


class Peers:
    """Peers of one experiment, as threads: with what they would be told on a command line."""

    def __init__(self, scene: Scene, pool: ThreadPoolExecutor) -> None:
        self.scene, self.pool = scene, pool
        self.phases: dict[int, str] = {}
        self.stopped = False

    def start(self, node: int, keyed: bool = True, **more: Any) -> Future[Served]:
        """Start a peer that listens at its address, and asks peer 0 for the others' unless told."""
        given = {"contact": f"0@{self.scene.addresses[0]}", "discover": False, **more}
        folder, sections = self.scene.folder, given.pop("sections", {})
        join_timeout = given.pop("join_timeout", 6.0)
        peers, keys = (folder / "peers.toml", folder / f"{node}.key") if keyed else (None, None)
        members = Membership.read(peers, keys, insecure=False)
        bind = given.pop("bind", self.scene.addresses[node])
        post = members.post(None if keyed else node, bind, **given)
        post = post.__class__(**{**vars(post), "join_timeout": join_timeout})
        described = small(nodes=len(self.scene.addresses), **sections)
        experiment = Experiment.from_dict(described)

        def phase(name: str) -> None:
            self.phases[node] = name

        return self.pool.submit(
            serve, experiment, post, lambda row, mark: None, lambda: not self.stopped, phase
        )

    def meeting(self, *nodes: int) -> None:
        """Wait until these peers look for each other."""
        wait_for(lambda: all(self.phases.get(node) == "meeting" for node in nodes))


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Callable[..., Peers]]:
    with ThreadPoolExecutor(4) as pool:
        made = []

        def make(nodes: int = 3, **more: Any) -> Peers:
            made.append(Peers(Scene(tmp_path, nodes, addressed=False, **more), pool))
            return made[-1]

        try:
            yield make
        finally:
            for one in made:
                one.stopped = True


def test_processes_with_keys_and_one_address_train(tmp_path: Path):
    scene = Scene(tmp_path, 3, addressed=False)

    def line(node: int) -> tuple[object, ...]:
        more = ("--contact", f"0@{scene.addresses[0]}", "--bind", scene.addresses[node])
        return scene.line(node, *more)

    assert scene.run(line(2), line(1), line(0)) == [(0, "")] * 3
    for node in range(3):
        told = summary(tmp_path / f"out-{node}")
        assert (told["status"], told["encrypted"], told["missed"]) == ("finished", True, 0)


@pytest.mark.parametrize("keyed", [True, False], ids=["with keys", "in clear"])
def test_the_one_who_is_asked_may_come_last(peers, keyed: bool):
    all_ = peers()
    others = [all_.start(node, keyed) for node in (2, 1)]
    all_.meeting(1, 2)
    for peer in (all_.start(0, keyed), *others):
        served = peer.result(60)
        assert served.ending.reason == "all rounds done"
        assert served.ending.missed == 0
        assert served.links["rejections"] == {}


def test_the_one_who_is_asked_need_be_no_neighbour(peers):
    all_ = peers(4, topology={"name": "ring"})  # of peer 2 it is none
    sections = {"topology": {"name": "ring"}}
    ends = [all_.start(node, sections=sections) for node in range(4)]
    assert [end.result(60).ending.missed for end in ends] == [0] * 4


def test_a_contact_of_another_run_says_so(peers):
    all_, ring = peers(4), {"topology": {"name": "ring"}}
    contact = all_.start(0, sections=ring)
    all_.meeting(0)
    with pytest.raises(UserError) as caught:
        all_.start(2, sections={"seed": 4, **ring}).result(60)
    asked, differs = all_.scene.addresses[0], "their experiments or seeds differ"
    assert str(caught.value) == f"{asked} cannot help: peers take part in another run: {differs}"
    with pytest.raises(UserError, match=f"refused peer 1 .* seed: '3' here, '4' there|{differs}"):
        all_.start(1, sections={"seed": 4, **ring}).result(60)  # its neighbour
    all_.stopped = True
    contact.result(60)


def test_a_contact_that_proves_another_key_is_named(peers):
    all_ = peers(2)
    all_.scene.list((0, all_.scene.keys[0]), (1, make_keys()))
    contact = all_.start(0, join_timeout=6.0)
    all_.meeting(0)
    all_.scene.list((0, make_keys()), (1, all_.scene.keys[1]))
    with pytest.raises(RunError, match="it does not prove the key that is listed for it"):
        all_.start(1, contact=f"0@{all_.scene.addresses[0]}", join_timeout=1.0).result(60)
    all_.stopped = True
    contact.result(60)


def test_a_contact_whose_key_is_not_listed_is_named(peers):
    all_ = peers(4)
    all_.scene.list(*((node, all_.scene.keys[node]) for node in range(3)))
    with pytest.raises(UserError, match=r"peers \[3\] have no key listed"):
        all_.start(
            1, contact=f"3@{all_.scene.addresses[3]}", sections={"topology": {"name": "chain"}}
        ).result(60)


def tell_address(scene: Scene, node: int, address: str) -> None:
    """Tell peer 0 where a peer listens, with that peer's key."""
    run = Experiment.from_dict(small(nodes=len(scene.addresses)))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        secure_dialler(socket, scene.keys[node], scene.keys[0].public)
        socket.connect(scene.addresses[0])
        header = Header(Kind.WHERE, run_of(run), 0, node)
        socket.send_multipart([wire.pack(header), finding.pack({node: address})])
        assert socket.poll(30_000)
        header, book = socket.recv_multipart()
        assert wire.unpack(header).kind is Kind.BOOK
        assert finding.unpack([memoryview(book)])[node] == address


def run_of(experiment: Experiment) -> bytes:
    federation = experiment.federation(None, only=0)
    task = experiment.task(federation, None, "cpu")
    return wire.digest(experiment.terms(task))


def test_an_address_where_somebody_else_listens_wastes_a_dial(peers):
    all_ = peers()
    first = [all_.start(0)]
    all_.meeting(0)
    tell_address(all_.scene, 2, all_.scene.addresses[1])
    first.append(all_.start(1))
    all_.meeting(1)
    for peer in (all_.start(2), *first):
        assert peer.result(60).ending.reason == "all rounds done"


def test_an_address_where_nobody_listens_is_named(peers):
    all_, nowhere = peers(), free_address()
    first = [all_.start(0, join_timeout=2.0)]
    all_.meeting(0)
    tell_address(all_.scene, 2, nowhere)
    with pytest.raises(RunError, match=f"nothing heard within 1 s of peer 2 at {nowhere}"):
        all_.start(1, join_timeout=1.0).result(60)
    with pytest.raises(RunError, match="peer 1 gave up before all had met"):
        first[0].result(60)


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:*", "tcp://*:7000"])
def test_what_others_cannot_dial_is_no_address_to_tell(peers, bind: str):
    all_ = peers()
    with pytest.raises(UserError, match="others cannot dial"):
        all_.start(1, bind=bind).result(60)


@contextmanager
def multicast() -> Iterator[None]:
    """Skip where nothing is heard of what is sent to all on loopback."""
    with new_socket(AF_INET, SOCK_DGRAM) as ear, new_socket(AF_INET, SOCK_DGRAM) as mouth:
        ear.bind(("", 0))
        ear.settimeout(2)
        group, here = "224.0.0.251", inet_aton("127.0.0.1")
        try:
            ear.setsockopt(
                IPPROTO_IP, IP_ADD_MEMBERSHIP, struct.pack("4s4s", inet_aton(group), here)
            )
            mouth.setsockopt(IPPROTO_IP, IP_MULTICAST_IF, here)
            mouth.sendto(b"?", (group, ear.getsockname()[1]))
            ear.recv(1)
        except OSError as error:
            pytest.skip(f"no multicast on loopback: {error}")
    yield


def test_peers_with_keys_find_each_other_by_mdns_past_a_liar(peers):
    pytest.importorskip("zeroconf")
    with multicast():
        all_ = peers()
        run = run_of(Experiment.from_dict(small(nodes=3))).hex()
        with closing(Discovery(2, all_.scene.addresses[0], run, None, 3)) as liar:
            first = [all_.start(node, contact=None, discover=True) for node in (0, 1)]
            all_.meeting(0, 1)
            wait_for(lambda: len(liar.found()) == 2)
            for peer in (*first, all_.start(2, contact=None, discover=True)):
                served = peer.result(60)
                assert served.ending.reason == "all rounds done"
                assert served.links["encrypted"]


def test_without_keys_nobody_is_looked_for_beyond_the_machine(tmp_path: Path, monkeypatch, capsys):
    scene = Scene(tmp_path, 2)
    line = p2pfl("peer", "e.toml", "--id", 0, "--bind", scene.addresses[0], "--discover")
    code, err = scene.here(monkeypatch, capsys, *line)
    assert code == 2
    assert "peers found by --discover are beyond this machine" in err
