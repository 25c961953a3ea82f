"""Peers on three hosts, from the command line to the run folder."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from fleet_cases import NAMES, experiment, fleet, hosts_file, rounds, small, summary, wait_for
from typer.testing import CliRunner

import p2pfl
from p2pfl.cli import app
from p2pfl.errors import RunError
from p2pfl.fleet import launch
from p2pfl.fleet.collect import gather, open_folder
from p2pfl.fleet.interrupts import heeding_signals
from p2pfl.fleet.launch import Launch, conclude
from p2pfl.fleet.launch import up as launch_up
from p2pfl.fleet.record import Place, Record, locked
from p2pfl.fleet.remote import pid
from p2pfl.results.runs import read_run

pytestmark = pytest.mark.processes
LONG = {"rounds": 100_000, "patience": 2.0}


@pytest.fixture
def run(tmp_path, sshd):
    return tmp_path / "run"


def write(tmp_path, **sections):
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(small(**sections)))
    return path


def call(*words):
    done = CliRunner().invoke(app, list(map(str, words)))
    if isinstance(done.exception, RunError):
        return 1, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def up(tmp_path, run, hosts, *options, **sections):
    return call("up", write(tmp_path, **sections), "--hosts", hosts, "--out", run, *options)


def training(sshd):
    """Return where the peers are on their hosts, once all have ended a round."""
    places = sshd.places()
    return places if len(places) == 3 and all(map(rounds, places)) else None


MODEL = """
from torch import nn

def make(shape, outputs):
    return nn.Linear(shape[0], outputs)
"""


def test_a_run_on_three_hosts_is_like_any_other(tmp_path, sshd, run):
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "line.edges").write_text("0 1\n1 2\n")
    files = {"model": {"name": "custom", "factory": "mine.py:make"}, "topology": "line.edges"}
    code, told = up(tmp_path, run, hosts_file(sshd), "--quiet", **files)
    assert code == 0, told
    found = summary(run)
    assert (found["status"], found["on"], found["nodes"]) == ("finished", "lan", 3)
    assert found["node_updates"] > 0
    assert found["eval_acc_mean"] > 0
    assert len(read_run(run).metrics["round"]) == 9
    assert found["consensus_distance"] > 0
    mean, models = p2pfl.load(run), [p2pfl.load(run, node=k) for k in range(3)]
    for place, *those in zip(*(m.parameters() for m in (mean, *models)), strict=True):
        assert place.allclose(sum(those) / 3, atol=1e-6)
    for name in NAMES:
        (folder,) = sshd.home(name).glob(".local/state/p2pfl/small-*")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert call("down", run)[0] == 0  # again, and nothing changes
    assert summary(run) == found


class Watcher:
    """A view that does something once all peers have ended a round."""

    def __init__(self, act):
        self.act, self.seen, self.notes = act, set(), []

    def rows(self, rows):
        self.seen |= {row.node for row in rows}
        if len(self.seen) == 3 and self.act:
            act, self.act = self.act, None
            act()

    def phase(self, node, phase):
        pass

    def note(self, text):
        self.notes.append(text)


def follow(sshd, run, act, on_failure="stop", **sections):
    launch = Launch(experiment(**sections), fleet(sshd), on_failure=on_failure)
    watcher = Watcher(act)
    return asyncio.run(launch_up(launch, lambda: run, watcher)), watcher


def kill_the_last(sshd):
    os.kill(pid(sshd.places()[2]), signal.SIGKILL)


def test_when_a_peer_dies_the_others_are_stopped(sshd, run):
    ended, _ = follow(sshd, run, lambda: kill_the_last(sshd), pace=LONG)
    assert ended.status == summary(run)["status"] == "failed"
    assert ended.error.startswith("peer 2 on ward-c failed: ")
    assert [summary(run / f"peers/{k:03d}")["status"] for k in (0, 1)] == ["interrupted"] * 2
    assert not any(map(pid, sshd.places()))
    assert len(read_run(run).metrics["round"]) >= 3


def test_when_a_peer_dies_the_others_may_go_on(sshd, run):
    pace = {"rounds": 300, "patience": 2.0}
    ended, watcher = follow(sshd, run, lambda: kill_the_last(sshd), "go-on", pace=pace)
    assert ended.status == "failed"
    assert ended.error.startswith("peer 2 on ward-c failed: ")
    assert ended.error.count("failed") == 1
    assert [rounds(place) for place in sshd.places()[:2]] == [300, 300]
    assert "the others go on" in watcher.notes[-1]
    assert p2pfl.load(run).signature == p2pfl.load(run, node=1).signature


@pytest.mark.slow
def test_a_lost_connection_comes_back(sshd, run):
    pace = {"rounds": 300, "patience": 2.0}
    ended, watcher = follow(sshd, run, sshd.drop_all, pace=pace)
    assert (ended.status, ended.error) == ("finished", None)
    for name in NAMES:
        assert any(f"{name}: " in note and "trying again" in note for note in watcher.notes)
    assert len(read_run(run).metrics["round"]) == 900


def test_training_goes_on_without_the_launcher(tmp_path, sshd, run):
    words = ("up", write(tmp_path, pace=LONG), "--hosts", hosts_file(sshd), "--out", run)
    with subprocess.Popen([sys.executable, "-m", "p2pfl", *map(str, words)]) as launcher:
        places = wait_for(lambda: training(sshd))
        launcher.kill()
    code, told = call("status", run)
    assert code == 0
    assert told.count("training") == 3, told
    before = [rounds(place) for place in places]
    wait_for(lambda: all(rounds(p) > n for p, n in zip(places, before, strict=True)))
    code, told = call("logs", run, "--peer", 1)
    assert code == 0
    assert all(line.startswith("  1  ") for line in told.splitlines())
    assert '"phase": "training"' in told
    code, told = call("down", run)
    assert code == 0, told
    assert not any(map(pid, places))
    assert summary(run)["status"] == "interrupted"
    assert len(read_run(run).metrics["round"]) > 3
    assert call("status", run)[1].count(" interrupted ") == 3


def test_detached_peers_are_collected_when_they_have_ended(tmp_path, sshd, run):
    hosts = hosts_file(sshd, a={"keys": "keys.toml"}, b=(keys := {"keys": "~/keys.toml"}), c=keys)
    code, told = up(tmp_path, run, hosts, "--detach")
    assert code == 0, told
    assert f"p2pfl status {run}" in told
    assert summary(run)["status"] == "running"
    assert call("logs", run, "-f")[0] == 0  # until all have ended
    assert call("down", run)[0] == 0
    assert summary(run)["status"] == "finished"


def test_peers_that_cannot_be_asked_to_end_are_not_taken_for_collected(tmp_path, sshd, run):
    """As where Python is gone on a host for a while; `logs` says so as well."""
    gone = sshd.home("ward-c") / "gone"
    script = f'[ -e "{gone}" ] && {{ echo no Python >&2; exit 127; }}; exec "{sys.executable}" "$@"'
    hosts = hosts_file(sshd, c={"python": str(sshd.fake("ward-c", "python", script))})
    code, told = up(tmp_path, run, hosts, "--detach", pace=LONG)
    assert code == 0, told
    places = wait_for(lambda: training(sshd))
    gone.touch()
    code, told = call("logs", run, "--peer", 2)
    assert (code, told) == (1, "1 of 3 hosts cannot be read\nward-c: no Python")
    code, told = call("down", run)
    assert code == 1
    assert told.startswith("1 of 3 hosts have not given all they have: ward-c: no Python; ")
    assert told.endswith(f"`p2pfl down {run}` ends and fetches the rest")
    assert [pid(place) is not None for place in places] == [False, False, True]
    gone.unlink()
    assert call("down", run)[0] == 0
    assert not any(map(pid, places))
    assert summary(run)["status"] == "interrupted"
    assert len(list(run.glob("peers/*/metrics.csv"))) == 3


def test_a_follower_that_is_killed_is_no_end(tmp_path, sshd, run):
    script = f'case "$*" in *follow*) kill -9 $$;; esac; exec "{sys.executable}" "$@"'
    hosts = hosts_file(sshd, b={"python": str(sshd.fake("ward-b", "python", script))})
    assert up(tmp_path, run, hosts, "--detach")[0] == 0
    done = CliRunner().invoke(app, ["logs", str(run), "-f"])
    assert str(done.exception).startswith("1 of 3 hosts cannot be read\nward-b: ")
    assert done.stderr.startswith("ward-b: ")  # at once
    assert call("down", run)[0] == 0


def test_ctrl_c_behind_a_reader_that_is_gone(tmp_path, sshd, run):
    """As of ``p2pfl up ... 2>&1 | tee log``, where Ctrl-C ends `tee` first."""
    words = ("up", write(tmp_path, pace=LONG), "--hosts", hosts_file(sshd), "--out", run)
    words = [sys.executable, "-m", "p2pfl", *map(str, words)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as launcher:
        places = wait_for(lambda: training(sshd))
        launcher.stderr.close()
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(60) == 130
    assert not any(map(pid, places))
    assert summary(run)["status"] == "interrupted"


def test_nohup_keeps_following_when_the_terminal_is_closed():
    async def heeded():
        detach = asyncio.Event()
        with heeding_signals(lambda: None, detach):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        return detach.is_set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not asyncio.run(heeded())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_stops_all_peers(sshd, run):
    ended, watcher = follow(sshd, run, lambda: os.kill(os.getpid(), signal.SIGINT), pace=LONG)
    assert ended.status == summary(run)["status"] == "interrupted"
    assert ended.error is None
    assert "stopping all peers ..." in watcher.notes
    assert not any(map(pid, sshd.places()))
    assert json.loads((run / "fleet.json").read_text())["collected"]


def test_ctrl_c_while_peers_start_that_are_to_be_left_alone(sshd, run, monkeypatch):
    ask = launch.Shell.ask

    async def ask_and_interrupt(shell, verb, **fields):
        if verb == "start" and shell.host.name == NAMES[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return await ask(shell, verb, **fields)

    monkeypatch.setattr(launch.Shell, "ask", ask_and_interrupt)
    wanted = Launch(experiment(pace=LONG), fleet(sshd), detach=True)
    ended = asyncio.run(launch_up(wanted, lambda: run, Watcher(None)))
    assert ended.status == summary(run)["status"] == "interrupted"
    assert len(sshd.places()) == 3
    assert not any(map(pid, sshd.places()))


def test_ctrl_c_while_files_are_sent(sshd, run, monkeypatch):
    async def send(shell, folder, files):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(launch.Shell, "send", send)
    ended = asyncio.run(launch_up(Launch(experiment(), fleet(sshd)), lambda: run, Watcher(None)))
    assert ended.status == summary(run)["status"] == "interrupted"
    assert not sshd.places()


def test_a_mishap_while_files_are_sent(sshd, run, monkeypatch):
    async def send(shell, folder, files):
        raise MemoryError

    monkeypatch.setattr(launch.Shell, "send", send)
    with pytest.raises(MemoryError):
        asyncio.run(launch_up(Launch(experiment(), fleet(sshd)), lambda: run, Watcher(None)))
    assert (summary(run)["status"], summary(run)["error"]) == ("failed", "MemoryError")


def test_peers_that_are_stopped_before_they_heed_it_are_interrupted(sshd, run):
    wanted = Launch(experiment(pace=LONG), fleet(sshd), detach=True)
    assert asyncio.run(launch_up(wanted, lambda: run, Watcher(None))).status == "running"
    assert call("down", run)[0] == 0
    assert summary(run)["status"] == "interrupted"
    assert "error" not in summary(run)


@pytest.mark.slow
def test_who_leaves_while_it_is_collected_is_told_what_completes_it(sshd, run, monkeypatch):
    async def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    wanted, watcher = Launch(experiment(), fleet(sshd)), Watcher(None)
    with monkeypatch.context() as patched:
        patched.setattr(launch, "conclude", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(launch_up(wanted, lambda: run, watcher))
    assert watcher.notes == [f"p2pfl down {run}  ends the peers and collects what they have left"]
    assert call("down", run)[0] == 0
    assert summary(run)["status"] == "finished"


def test_hosts_that_are_away_are_told_as_what_they_are(tmp_path, sshd):
    places = [Place(host, "/nowhere", [node]) for node, host in enumerate(fleet(sshd).hosts)]
    open_folder(tmp_path / "run", experiment())
    (record := Record("now", 3, places)).save(tmp_path / "run")
    ended = asyncio.run(conclude(tmp_path / "run", record, {}, {}, False))
    assert ended.error.startswith("3 of 3 hosts have not given all they have: ward-a: nothing was")


@pytest.mark.slow
def test_down_while_up_follows(sshd, run):
    down = []

    def stop():
        down.append(subprocess.Popen([sys.executable, "-m", "p2pfl", "down", str(run)]))

    ended, watcher = follow(sshd, run, stop, pace=LONG)
    assert down[0].wait(60) == 0
    assert (ended.status, ended.error) == ("interrupted", None)
    assert summary(run)["status"] == "interrupted"
    assert any("was asked to end by somebody else" in note for note in watcher.notes)
    assert len(read_run(run).metrics["round"]) > 3


def test_what_is_collected_by_somebody_else_is_left_as_it_is(tmp_path, sshd):
    places = [Place(host, "/nowhere", [node]) for node, host in enumerate(fleet(sshd).hosts)]
    record, other = Record("now", 3, places), Record("now", 3, places, collected=True)
    open_folder(tmp_path / "run", experiment())
    record.save(tmp_path / "run")

    async def both():
        async with locked(tmp_path / "run"):
            late = asyncio.create_task(conclude(tmp_path / "run", record, {}, {}, False))
            done, _ = await asyncio.wait({late}, timeout=0.3)
            assert not done
            gather(tmp_path / "run", {}, "interrupted", None)
            other.save(tmp_path / "run")
        return await late

    assert asyncio.run(both()).status == summary(tmp_path / "run")["status"] == "interrupted"


def test_peers_of_a_host_where_not_all_start_are_stopped(sshd, run):
    fails = f'"{sys.executable}" "$@"; code=$?; case "$*" in *start*) exit 1;; esac; exit $code'
    path = str(sshd.fake("ward-c", "python", fails))
    launch = Launch(experiment(pace=LONG), fleet(sshd, c={"python": path}))
    ended = asyncio.run(launch_up(launch, lambda: run, Watcher(None)))
    assert ended.error.startswith("peer 2 on ward-c failed: ward-c: start failed")
    assert len(sshd.places()) == 3
    assert not any(map(pid, sshd.places()))


def test_peers_survive_the_terminal(sshd, run):
    ended, _ = follow(sshd, run, lambda: os.kill(os.getpid(), signal.SIGHUP), pace=LONG)
    assert ended.status == summary(run)["status"] == "running"
    assert all(map(pid, sshd.places()))


SCRIPT = Path(__file__).parents[2] / "scripts" / "spawn_lan.py"


def test_the_short_script_works(tmp_path, sshd):
    words = [SCRIPT, write(tmp_path), hosts_file(sshd)]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for node, name in enumerate(NAMES):
        assert any(f"{node} {name}: round 3" in line for line in lines), done.stdout
        assert any(f"{node} {name}: peer {node}: finished" in line for line in lines)
    assert not any(line.endswith(": ") for line in lines)


def test_the_short_script_says_what_is_wrong_in_one_line(tmp_path):
    words = [sys.executable, SCRIPT, "none.toml", "none.toml"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        "spawn_lan: there is no experiment file none.toml\n",
    )


def test_the_short_script_ends_with_ctrl_c(tmp_path, sshd):
    sleeper = {"python": str(sshd.fake("ward-a", "python", "echo here; exec sleep 60"))}
    hosts = hosts_file(sshd, a=sleeper, b=sleeper, c=sleeper)
    words = [sys.executable, SCRIPT, write(tmp_path), hosts]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, words)), **pipes) as script:
        while "here" not in script.stdout.readline():
            pass
        script.send_signal(signal.SIGINT)
        _, err = script.communicate(timeout=60)
    assert (script.returncode, err) == (130, "")
