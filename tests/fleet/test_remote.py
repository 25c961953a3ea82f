"""What is done on a host itself."""

import io
import json
import os
import subprocess
import sys

import pytest

from p2pfl.fleet import remote
from p2pfl.fleet.look import look
from p2pfl.launch import cores

SLEEPER = [sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(60)"]
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER[2]


@pytest.fixture
def sleeper():
    with subprocess.Popen(SLEEPER, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def register(folder, process, shift=0):
    _, started = remote._process(process.pid)
    (folder / "003.pid").write_text(f"{process.pid} {started + shift}\n")
    return folder / "003"


def test_a_process_is_stopped(tmp_path, sleeper):
    place = register(tmp_path, sleeper)
    assert remote.pid(place) == sleeper.pid
    assert remote.stop(str(tmp_path), [3]) == {"killed": []}
    assert sleeper.wait(10) == -15
    assert remote.pid(place) is None
    assert remote.ending(place) == {"status": "interrupted", "why": "it was asked to end"}


def test_a_stubborn_process_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        register(tmp_path, process)
        assert remote.stop(str(tmp_path), [3], grace=0.2) == {"killed": [3]}
        assert process.wait(10) == -9
    ending = remote.ending(tmp_path / "003")
    assert ending["status"] == "interrupted"
    assert ending["why"].endswith("did not, and was killed")


@pytest.mark.parametrize("late", [False, True])
def test_one_that_was_asked_to_end_before_it_began(tmp_path, monkeypatch, late):
    """As by `p2pfl down` while `up` still starts peers; `late`: just as this one is started."""
    begun, popen = [], subprocess.Popen

    def start(*words, **options):
        if late:
            remote.stop(str(tmp_path), [3])
        begun.append(popen(*words, **options))
        return begun[-1]

    monkeypatch.setattr(remote.subprocess, "Popen", start)
    if not late:
        assert remote.stop(str(tmp_path), [3]) == {"killed": []}
    remote._start(tmp_path / "003", SLEEPER)
    assert [one.wait(10) for one in begun] == [-15] * late
    ending = remote.ending(tmp_path / "003")
    assert ending == {"status": "interrupted", "why": "it was asked to end"}


def test_one_that_broke_down_before_it_was_asked_to_end_has_failed(tmp_path, sleeper):
    place = register(tmp_path, sleeper)
    sleeper.kill()
    sleeper.wait(10)
    assert remote.stop(str(tmp_path), [3]) == {"killed": []}
    assert remote.ending(place)["status"] == "failed"


def faults(ports=(), modules=(), devices=("cpu",)):
    return look(ports, [], [], modules, devices)["faults"]


def test_what_a_peer_cannot_import_is_told_once():
    assert faults(modules=["json"]) == []
    (fault,) = faults(modules=["none_such", "none_either"], devices=["nonsense"])
    assert "cannot run a peer: No module named 'none_such'; install" in fault


def test_devices_that_are_not_there():
    told = faults(devices=["cpu", "cuda:99", "nonsense"])
    assert [fault.split(" cannot be used: ")[0] for fault in told] == [
        "device cuda:99",
        "device nonsense",
    ]
    assert not any("\n" in fault for fault in told)


def test_a_wrong_address_is_told_once_for_all_its_ports():
    ports = [("192.0.2.1", 7000), ("192.0.2.1", 7001)]
    assert faults(ports) == ["192.0.2.1 is none of its addresses"]


def asked(*nodes):
    about = {"device": "cpu", "threads": 1, "data": None, "keys": None, "insecure": False}
    return [{"node": node, **about} for node in nodes]


def sleeping(monkeypatch):
    """Let peers be processes that sleep; return those that were started."""
    started, popen = [], subprocess.Popen

    def start(command, **more):
        started.append(popen(SLEEPER, **more))
        return started[-1]

    monkeypatch.setattr(remote.subprocess, "Popen", start)
    return started


def test_when_one_cannot_be_started_none_is_left(tmp_path, monkeypatch):
    started = sleeping(monkeypatch)
    (tmp_path / "004.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        remote.start(str(tmp_path), asked(3, 4, 5))
    (first,) = started
    assert first.wait(10) == -15


def test_one_that_nobody_would_find_is_killed(tmp_path, monkeypatch):
    started = sleeping(monkeypatch)
    (tmp_path / "003.pid").mkdir()
    with pytest.raises(IsADirectoryError):
        remote.start(str(tmp_path), asked(3))
    (first,) = started
    assert first.wait(10) == -9


@pytest.mark.parametrize("threads", [0, 1])
def test_peers_of_a_host_are_kept_on_cores_of_their_own_unless_threads_are_given(
    tmp_path, monkeypatch, threads
):
    started, before = sleeping(monkeypatch), cores.usable()
    remote.start(str(tmp_path), [peer | {"threads": threads} for peer in asked(0, 1)])
    found = [os.sched_getaffinity(process.pid) for process in started]
    for process in started:
        process.kill()
        process.wait(10)
    assert found == [*map(set, [before, before] if threads else cores.deal(2))]
    assert cores.usable() == before


def test_a_number_that_was_used_again_is_left_alone(tmp_path, sleeper):
    assert remote.pid(register(tmp_path, sleeper, shift=-1)) is None
    remote.stop(str(tmp_path), [3], grace=0.2)
    assert sleeper.poll() is None


def test_only_whole_lines_are_told(tmp_path, capsys):
    (tmp_path / "003.jsonl").write_bytes(b'{"phase": "loading"}\n{"phase": "tr')
    remote.follow(str(tmp_path), {"3": 0}, wait=True)
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"node": 3, "at": 21, "line": '{"phase": "loading"}'}
    assert last["ended"] == {"status": "failed", "why": "it was killed or broke down"}
    remote.follow(str(tmp_path), {"3": 21}, wait=True)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_nobody_is_followed_for_nobody(tmp_path, sleeper):
    register(tmp_path, sleeper)
    (tmp_path / "003.jsonl").write_text("{}\n")
    ask = json.dumps({"folder": str(tmp_path), "at": {"3": 0}, "wait": True}) + "\n"
    command = [sys.executable, "-m", "p2pfl.fleet.remote", "follow"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(ask)
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()  # as sshd does when the connection is lost
        assert process.wait(30) == 1


def test_how_a_peer_has_ended(tmp_path):
    place = tmp_path / "003"
    place.with_suffix(".log").write_text("a warning\np2pfl: no such column\n\n")
    assert remote.ending(place) == {"status": "failed", "why": "no such column"}
    place.with_suffix(".log").write_text("a warning\n")
    assert (
        remote.ending(place)["why"] == "it was killed or broke down; its log ends with: a warning"
    )
    place.mkdir()
    (place / "summary.json").write_text('{"status": "running"}')
    assert remote.ending(place)["status"] == "failed"
    (place / "summary.json").write_text('{"status": "finished", "reason": "all rounds"}')
    assert remote.ending(place) == {"status": "finished", "why": "all rounds"}


def test_status_of_a_peer_that_trains(tmp_path, sleeper):
    register(tmp_path, sleeper)
    lines = ['{"phase": "training"}', "printed by a model", '{"row": {"round": 4}}', '{"row": {']
    (tmp_path / "003.jsonl").write_text("\n".join(lines))
    (told,) = remote.status(str(tmp_path), [3])["peers"]
    assert (told["node"], told["phase"], told["round"]) == (3, "training", 5)
    assert "ended" not in told


def test_mistakes_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["remote", "make"])
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"workdir": "/proc/none", "name": "x"}\n'))
    with pytest.raises(SystemExit, match=r"^/proc/none.*: No such file"):
        remote.main()
