"""What `p2pfl up` and `p2pfl status` print."""

from typing import Any

import pytest
import tomli_w
from fleet_cases import experiment, small
from typer.testing import CliRunner

from p2pfl.cli import app
from p2pfl.cli.live import LiveView
from p2pfl.errors import RunError, UserError
from p2pfl.fleet import control, launch
from p2pfl.fleet.hosts import read_hosts
from p2pfl.launch.membership import IN_CLEAR


def hosts_file(folder, address, **keys: Any):
    host = {"name": "a", "address": address, "ports": [7000, 7001, 7002], **keys}
    path = folder / "hosts.toml"
    path.write_text(tomli_w.dumps({"hosts": [host]}))
    return path


@pytest.mark.parametrize(("address", "warned"), [("10.0.0.1", True), ("127.0.0.1", False)])
def test_links_in_clear_are_warned_of(tmp_path, monkeypatch, address, warned):
    async def refuse(*_):
        raise RunError("enough")

    monkeypatch.setattr(launch, "up", refuse)
    (tmp_path / "small.toml").write_text(tomli_w.dumps(small()))
    words = ["up", str(tmp_path / "small.toml"), "--hosts", str(hosts_file(tmp_path, address))]
    done = CliRunner().invoke(app, [*words, "--insecure", "--quiet"])
    assert isinstance(done.exception, RunError)
    assert (IN_CLEAR in done.stderr) == warned


def test_keys_and_insecure_contradict_each_other(tmp_path):
    fleet = read_hosts(hosts_file(tmp_path, "10.0.0.1", keys="~/keys.toml"))
    wanted = launch.Launch(experiment(), fleet, insecure=True)
    assert not wanted.warning
    with pytest.raises(UserError, match=r"has `keys`, .* --insecure none: give one of them"):
        wanted.check()


def test_blank_lines_of_a_log_stay_blank(tmp_path, monkeypatch):
    async def logs(folder, say, warn, peer, follow):
        for line in ("before", "", "after"):
            say({"node": 1, "log": line})
        say({"node": 1, "line": "{}"})

    monkeypatch.setattr(control, "logs", logs)
    told = CliRunner().invoke(app, ["logs", str(tmp_path)]).output
    assert told == "  1  before\n  1  \n  1  after\n  1  {}\n"


def test_names_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    async def status(_):
        return [control.PeerStatus(0, ":x:", "[b]training", 3, 1.0, "why " * 50 + "not")]

    monkeypatch.setattr(control, "status", status)
    told = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert ":x:" in told
    assert "[b]training" in told
    assert told.splitlines()[-1].rstrip().endswith("why " * 50 + "not")
    LiveView(1, 1, "title").note("host :x: [b]")
    assert capsys.readouterr().err == "host :x: [b]\n"
