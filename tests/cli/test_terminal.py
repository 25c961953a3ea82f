"""Ctrl-C at the wrong moment, and a terminal that is closed."""

import csv
import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from p2pfl.cli import main
from p2pfl.cli.terminal import requests

DROPPED = """
import os, signal

try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:  # as torch's own start-up does
    pass
raise SystemExit(77)
"""
WITHIN_A_TEXT = """
from p2pfl import cli

def app():  # what dataclasses and named tuples do while they are made
    exec("raise KeyboardInterrupt")

cli.app = app
cli.main()
"""
VERBS = {
    "run": ("digits",),
    "sweep": ("s.toml",),
    "peer": ("digits",),
    "up": ("digits", "--hosts", "hosts.toml"),
    "predict": ("run", "x.csv"),
}


def hear_all():
    """Heed what a shell's background job, or one under nohup, is started deaf to."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def at_terminal():
    hear_all()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def start(tmp_path, *words, preexec_fn=hear_all, **more):
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    env |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "p2pfl", *map(str, words)]
    return subprocess.Popen(command, env=env, preexec_fn=preexec_fn, **more)


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_while_torch_is_imported_ends_every_verb(tmp_path, verb):
    (tmp_path / "torch.py").write_text(DROPPED)
    with start(tmp_path, verb, *VERBS[verb]) as process:
        assert process.wait(60) == -signal.SIGINT


def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
    (tmp_path / "torch.py").write_text(DROPPED)

    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with start(tmp_path, "run", "digits", preexec_fn=ignore) as process:
        assert process.wait(60) == 77


def test_whoever_calls_main_keeps_ctrl_c_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["p2pfl", "keys", "show", "--keys", str(tmp_path / "none")])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        main()
    assert signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as elsewhere, pytest.raises(SystemExit):
        elsewhere.submit(main).result()  # where no signal can be handled
    assert capsys.readouterr().err.count("is not there; `p2pfl keys new` makes it") == 2


class Terminal:
    """A terminal with a process in it."""

    def __init__(self, tmp_path, *words):
        self._ours, theirs = pty.openpty()
        self.process = start(
            tmp_path,
            *words,
            cwd=tmp_path,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=at_terminal,
        )
        os.close(theirs)

    def read_until(self, what):
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            if select.select([self._ours], [], [], 0.05)[0]:
                os.read(self._ours, 1 << 16)

    def close(self):
        os.close(self._ours)
        os.killpg(self.process.pid, signal.SIGHUP)  # as a shell does; the kernel does the same


def rounds(folder):
    path = folder / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.is_file() else 0


@pytest.mark.processes
@pytest.mark.parametrize("on", ["simulate", "local"])
def test_a_run_whose_terminal_is_closed_was_interrupted(tmp_path, on):
    settings = "nodes=3", "evaluation.baselines=false", "pace.rounds=100000"
    more = [word for setting in settings for word in ("--set", setting)]
    terminal = Terminal(tmp_path, "run", "digits", "--on", on, "--out", "r", *more)
    places = [tmp_path / "r"]
    if on == "local":
        places = [tmp_path / f"r/peers/{node:03d}" for node in range(3)]
    with terminal.process as process:
        terminal.read_until(lambda: all(map(rounds, places)))
        terminal.close()
        process.wait(60)
    for folder in (tmp_path / "r", *places):
        assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert list((tmp_path / "r" / "models").iterdir())


@pytest.mark.processes
@pytest.mark.parametrize("format", ["text", pytest.param("json", marks=pytest.mark.slow)])
def test_a_peer_whose_terminal_is_closed_was_interrupted(tmp_path, format):
    with ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        ports = [server.getsockname()[1] for server in servers]
    lines = [f'{node} = "tcp://127.0.0.1:{port}"\n' for node, port in enumerate(ports)]
    (tmp_path / "peers.toml").write_text("".join(lines))
    settings = ("--set", "nodes=2", "--set", "pace.rounds=100000")
    words = ("peer", "digits", *settings, "--peers", "peers.toml", "--format", format)
    terminals = [Terminal(tmp_path, *words, "--id", k, "--out", f"r{k}") for k in range(2)]
    folders = [tmp_path / f"r{k}" for k in range(2)]
    with terminals[0].process as one, terminals[1].process as other:
        terminals[0].read_until(lambda: all(map(rounds, folders)))
        for terminal in terminals:
            terminal.close()
        one.wait(60)
        other.wait(60)
    for folder in folders:
        assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


def test_a_closed_terminal_asks_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert requests() == [signal.SIGTERM]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert requests() == [signal.SIGTERM, signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.processes
def test_a_sweep_whose_terminal_is_closed_goes_on_later(tmp_path):
    plan = "experiment = 'digits'\nseeds = 2\n[set]\nnodes = 3\n'pace.rounds' = 100000\n"
    (tmp_path / "s.toml").write_text(plan)
    terminal = Terminal(tmp_path, "sweep", "s.toml", "--out", "r", "--jobs", "2")
    with terminal.process as process:
        terminal.read_until(lambda: sum(map(rounds, tmp_path.glob("r/runs/*"))))
        terminal.close()
        assert process.wait(60) == 130
    with (tmp_path / "r" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2  # what is to be done again; its worker may not have come to say why
    assert not any(row["status"] in ("finished", "failed") for row in rows)


def test_an_interrupt_within_a_text_ends_with_the_same_code(tmp_path):
    (tmp_path / "within.py").write_text(WITHIN_A_TEXT)
    words = [sys.executable, "-m", "within"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "p2pfl: interrupted\n")
