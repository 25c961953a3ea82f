"""Peers with keys, as an operator starts them: they train, or say in one line why not."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_cases import command, metrics, p2pfl, summary, wait_for
from secure_cases import Ending, Scene, ending, only_line

import p2pfl as package
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch import membership
from p2pfl.launch.membership import Membership
from p2pfl.launch.serving import open_links
from p2pfl.runtime.handshake import Terms
from p2pfl.security.keys import make_keys
from p2pfl.security.roster import revoke

pytestmark = pytest.mark.processes
Here = Callable[..., Ending]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.fixture
def here(scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Here:
    """Do what a process with a command line would do, in ours."""
    return lambda *words: scene.here(monkeypatch, capsys, *words)


def test_two_peers_train_encrypted_with_the_numbers_of_links_in_clear(scene: Scene):
    assert scene.run(scene.line(0), scene.line(1)) == [(0, ""), (0, "")]
    simulated = package.run(scene.folder / "e.toml", on="simulate")
    for node in range(2):
        told = summary(scene.folder / f"out-{node}")
        assert (told["status"], told["node"]) == ("finished", node)  # which it is, its key says
        assert told["encrypted"] is True
        assert told["rejections"] == {}
        mine = package.load(scene.folder / f"out-{node}").parameters()
        for ours, theirs in zip(mine, simulated.model(node).parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def mistake(before: Callable[[Scene], object], told: str, *more: object) -> Any:
    return pytest.param(before, more, told, id=told)


@pytest.mark.parametrize(
    ("before", "more", "told"),
    [
        mistake(lambda s: s.list((1, s.keys[1])), "our key {key} is not listed in peers.toml"),
        mistake(
            lambda s: revoke(s.folder / "peers.toml", "0"), "our key {key} is revoked in peers.toml"
        ),
        mistake(
            lambda s: s.list((0, s.keys[1]), (1, s.keys[0])),
            "--id 0, but our key is listed in peers.toml for peer 1",
            *("--id", 0),
        ),
        mistake(
            lambda s: s.list((0, s.keys[0]), (1, None)),
            "peer 0: peers [1] have no key listed, or are revoked",
        ),
        mistake(
            lambda s: revoke(s.folder / "peers.toml", "1"),
            "peer 0: peers [1] have no key listed, or are revoked",
        ),
        mistake(
            lambda s: s.list((0, None), (1, None)),
            "--keys needs the keys of the others too, and peers.toml lists no keys",
        ),
        mistake(
            lambda s: (s.folder / "0.key").chmod(0o644),
            "0.key is open to other users; `chmod 600` it, or make new keys",
        ),
        mistake(
            lambda s: (s.folder / "0.key").unlink(),
            "0.key is not there; `p2pfl keys new` makes it",
        ),
        mistake(
            lambda s: None,
            "--keys encrypts every link, --insecure none: give one of them",
            "--insecure",
        ),
        mistake(
            lambda s: None,
            "cannot listen on tcp://192.0.2.1:7000: Cannot assign requested address",
            *("--bind", "tcp://192.0.2.1:7000"),
        ),
        mistake(
            lambda s: None, "--bind tcp://[::1:7000: expected tcp", "--bind", "tcp://[::1:7000"
        ),
        mistake(lambda s: None, "--device banana: Expected one of", "--device", "banana"),
        mistake(lambda s: None, "--device privateuseone: ", "--device", "privateuseone"),
        mistake(lambda s: None, "--join-timeout nan: seconds", "--join-timeout", "nan"),
        mistake(lambda s: None, "--threads 99999999999: expected 0 to", "--threads", 99999999999),
        mistake(lambda s: None, "--threads -1: expected 0 to", "--threads", -1),
        mistake(lambda s: s.leave(1), "out-0 is the folder of peer 1, not of peer 0", "--resume"),
    ],
)
def test_a_mistake_is_said_in_one_line(
    scene: Scene, here: Here, before: Callable[[Scene], object], more: tuple[object, ...], told: str
):
    before(scene)
    code, err = here(*scene.line(0, *more))
    assert only_line(err).startswith(told.format(key=scene.keys[0].public))
    assert code == 2


def test_one_that_has_finished_says_so_again(scene: Scene):
    (scene.folder / "out-0").mkdir()
    scene.leave(0)
    with command(*scene.line(0, "--resume", "--format", "json"), cwd=scene.folder) as process:
        out, _ = process.communicate(timeout=60)
    assert json.loads(out) == summary(scene.folder / "out-0")


def test_a_folder_that_cannot_be_read_is_a_mistake(scene: Scene, here: Here):
    code, err = here(*scene.line(0, "--resume", "--out", "x" * 300))
    assert only_line(err).endswith("x/experiment.toml cannot be read: File name too long")
    assert code == 2


def test_without_keys_a_peer_stays_on_its_machine(scene: Scene, here: Here):
    scene.list((0, None), (1, None))
    words = ("peer", "e.toml", "--id", 0, "--peers", "peers.toml", "--bind", "tcp://0.0.0.0:7000")
    code, err = here(*p2pfl(*words))
    assert code == 2
    assert only_line(err).startswith("tcp://0.0.0.0:7000 is beyond this machine, and without keys")


def test_a_taken_port_is_a_failure(scene: Scene, here: Here):
    port = int(scene.addresses[0].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        code, err = here(*scene.line(0))
    assert only_line(err) == f"{scene.addresses[0]} is taken by another program"
    assert code == 1


def test_a_neighbour_that_cannot_be_reached_is_named(scene: Scene, here: Here):
    code, err = here(*scene.line(0, "--join-timeout", 0.5))
    told = f"peer 0: nothing heard within 0.5 s of peer 1 at {scene.addresses[1]}"
    assert only_line(err) == told
    assert code == 1
    assert summary(scene.folder / "out-0")["error"] == told


def test_a_peer_that_fails_tells_of_its_links_and_can_be_started_again(scene: Scene, here: Here):
    words = ("peer", "e.toml", "--keys", "0.key", "--peers", "peers.toml", "--join-timeout", 0.2)
    for name in ("small-peer-000", "small-peer-000-2"):
        code, err = here(*p2pfl(*words))
        assert (code, only_line(err).partition(" within")[0]) == (1, "peer 0: nothing heard")
        found = summary(scene.folder / "runs" / name)
        assert (found["status"], found["encrypted"], found["rejections"]) == ("failed", True, {})


@pytest.mark.parametrize("trained", [False, True])
def test_who_comes_back_does_not_wait_for_whom_was_revoked_meanwhile(scene: Scene, trained: bool):
    revoke(scene.folder / "peers.toml", "1")
    experiment = Experiment.load(scene.folder / "e.toml")
    members = Membership.read(scene.folder / "peers.toml", scene.folder / "0.key", False)
    home = scene.folder / "out-0"
    home.mkdir()
    post = replace(members.post(None, None, None, False), home=home, resume=True)
    if not trained:
        for _ in range(2):  # a life that has not begun to train is none to come back to
            with pytest.raises(UserError, match=r"peers \[1\] have no key listed, or are revoked"):
                open_links(experiment, post, Terms({}))
        return
    links = open_links(experiment, replace(post, elapsed=1.0), Terms({}))
    try:
        assert links.meet(1.0)
        assert links.lookout is not None
        assert links.lookout.live == (0,)
    finally:
        links.close("done", 0.0, True)


def has_ipv6() -> bool:
    """Say whether anything can listen on the loopback address of IPv6."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


def test_peers_with_keys_train_over_ipv6(scene: Scene):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    scene.addresses[:] = [a.replace("127.0.0.1", "[::1]") for a in scene.addresses]
    scene.list(*enumerate(scene.keys))
    assert scene.run(scene.line(0), scene.line(1)) == [(0, ""), (0, "")]
    told = [summary(scene.folder / f"out-{node}") for node in range(2)]
    assert [(one["encrypted"], one["rejections"]) for one in told] == [(True, {})] * 2


def test_a_list_is_taken_once_it_stays_and_lists_our_own_key(scene: Scene, monkeypatch: Any):
    monkeypatch.setattr(membership, "LOOK_EVERY", 0.0)
    file = scene.folder / "peers.toml"
    members = membership.Membership.read(file, scene.folder / "0.key", insecure=False)
    relisted, whole = members.post(None, None, None, False).relisted, file.read_text()

    def looks() -> list[Any]:
        return [relisted() for _ in range(3)]

    own, other = (keys.public for keys in scene.keys)
    assert looks() == [None] * 3
    file.write_text("")  # as editors do first
    assert looks() == [None] * 3
    file.write_text(whole[: whole.index(own)])
    assert looks() == [None] * 3
    file.write_text(whole[: whole.rindex("[[peers]]")])
    assert relisted() is None
    file.write_text(whole)
    assert looks() == [None, {0: own, 1: other}, None]
    revoke(file, "0")  # ourselves: there is nobody left who lets us in, but the list is whole
    assert looks() == [None, {1: other}, None]


def test_a_wrong_key_listed_for_a_neighbour_is_named_on_both_sides(scene: Scene, here: Here):
    scene.list((0, make_keys()), (1, scene.keys[1]), file="of-1.toml")
    with scene.started(scene.line(1, "--join-timeout", 3, peers="of-1.toml")) as (other,):
        events = scene.folder / "out-1" / "events.jsonl"
        wait_for(lambda: events.is_file() and "meeting" in events.read_text())
        code, err = here(*scene.line(0, "--join-timeout", 1))
        code_too, err_too = ending(other)
    place = [f"peer {node} at {address}" for node, address in enumerate(scene.addresses)]
    heard = f"peer 0: nothing heard within 1 s of {place[1]} (it does not admit our key)"
    assert (code, only_line(err)) == (1, heard)
    proof = "it does not prove the key that is listed for it"
    assert (code_too, only_line(err_too)) == (
        1,
        f"peer 1: nothing heard within 3 s of {place[0]} ({proof})",
    )


def test_who_is_revoked_while_it_trains_is_cut_and_the_others_finish(tmp_path: Path):
    pace = {"rounds": 120, "local_steps": 60}  # up to 127 a round's number is one byte
    scene = Scene(tmp_path, 3, topology={"name": "complete"}, pace=pace)
    scene.list(*enumerate(scene.keys), file="of-0.toml")
    outs = [tmp_path / f"out-{node}" for node in range(3)]
    lines = [scene.line(0, peers="of-0.toml"), scene.line(1), scene.line(2)]
    with scene.started(*lines) as peers:
        wait_for(lambda: min(len(metrics(out)) for out in outs) >= 2)
        rows = metrics(outs[0])
        with command(*p2pfl("keys", "revoke", "of-0.toml", 2), cwd=tmp_path) as revoking:
            assert ending(revoking) == (0, "")
        told = metrics(outs[0])[-1]
        ended = [ending(peer) for peer in peers]
    assert ended[:2] == [(0, "")] * 2
    assert ended[2] == (0, "peer 0 turns us away: it does not admit our key\n")  # peer 1 does
    of_two, of_one = int(rows[-1]["bytes_received"]), int(metrics(outs[0])[-1]["bytes_received"])
    assert of_one == of_two // 2
    cut = next(r for r in metrics(outs[0]) if int(r["bytes_received"]) == of_one)
    assert float(cut["wall_s"]) - float(told["wall_s"]) < 10
    assert all(summary(out)["rounds"] == pace["rounds"] for out in outs)
    rejections = summary(outs[0])["rejections"]
    assert f"127.0.0.1 ({scene.keys[2].public[:8]}...): a key that is not allowed" in rejections
    assert summary(outs[1])["rejections"] == {}
