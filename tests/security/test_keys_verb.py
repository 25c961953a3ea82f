"""``p2pfl keys`` as an operator uses it."""

import json
import sys

import pytest
from typer.testing import CliRunner

from p2pfl.cli import app, main
from p2pfl.errors import UserError
from p2pfl.security.keys import make_keys, read_keys
from p2pfl.security.roster import read_roster


def p2pfl(*words):
    return CliRunner().invoke(app, ["keys", *map(str, words)])


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    path = tmp_path / "mine" / "keys.toml"
    monkeypatch.setenv("P2PFL_KEYS", str(path))
    return path


@pytest.mark.parametrize("verb", ["new", "show", "allow", "revoke"])
def test_help_has_an_example(verb):
    done = p2pfl(verb, "--help")
    assert f"p2pfl keys {verb}" in done.stdout.split("Example:", 1)[1]


def test_keys_are_made_once_and_only_the_public_one_is_shown(path):
    assert isinstance(p2pfl("show").exception, UserError)
    made = p2pfl("new")
    keys = read_keys(path)
    assert made.stdout == p2pfl("show").stdout == f"{keys.public}\n"
    assert isinstance(p2pfl("new").exception, UserError)
    again = p2pfl("new", "--if-missing", "--format", "json")
    assert json.loads(again.stdout) == {"public": keys.public, "file": str(path)}
    other = p2pfl("new", "--keys", path.with_name("other.toml"))
    assert other.stdout != made.stdout


def test_a_name_that_is_too_long_is_a_mistake(tmp_path):
    done = p2pfl("new", "--if-missing", "--keys", tmp_path / ("k" * 300))
    assert isinstance(done.exception, UserError)
    assert str(done.exception).endswith("k cannot be read: File name too long")


def test_allow_and_revoke(tmp_path):
    peers, key = tmp_path / "peers.toml", make_keys().public
    options = ["--id", 2, "--name", "ward-a", "--address", "tcp://10.0.0.1:7000"]
    assert p2pfl("allow", peers, key, *options).exit_code == 0
    assert read_roster(peers).keys == {2: key}
    assert p2pfl("revoke", peers, "ward-a").stdout == f"{peers}: peer 2 is revoked\n"
    assert read_roster(peers).keys == {}
    assert isinstance(p2pfl("revoke", peers, "ward-b").exception, UserError)
    everywhere = p2pfl("allow", peers, key, "--id", 2, "--address", "tcp://*:7000")
    assert "others cannot dial tcp://*:7000" in str(everywhere.exception)


def test_an_error_is_told_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["p2pfl", "keys", "show", "--keys", ":x:/[b]/k.toml"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("p2pfl: :x:/[b]/k.toml is not there")
