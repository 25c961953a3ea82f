"""Key files: private from the first byte, never overwritten, never half believed."""

import os
import traceback

import pytest
import zmq

from p2pfl.errors import UserError
from p2pfl.security.keys import KeyPair, default_path, is_key, make_keys, new_keys, read_keys


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_only_the_owner_can_read_a_new_file_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = tmp_path / "keys.toml"
        keys = new_keys(path)
    finally:
        os.umask(before)
    assert mode(path) == 0o600
    assert read_keys(path) == keys


def test_a_new_file_is_private_before_anything_is_in_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fchmod", lambda descriptor, _: seen.append(os.fstat(descriptor)))
    before = os.umask(0)
    try:
        new_keys(tmp_path / "deep" / "keys.toml")
    finally:
        os.umask(before)
    assert [(status.st_mode & 0o777, status.st_size) for status in seen] == [(0o600, 0)]
    assert mode(tmp_path / "deep") == 0o700


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be made: "):
        new_keys(tmp_path / "file" / "keys.toml")


def test_keys_are_never_overwritten(tmp_path):
    path = tmp_path / "keys.toml"
    keys = new_keys(path)
    with pytest.raises(UserError, match="already"):
        new_keys(path)
    assert read_keys(path) == keys
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already"):
        new_keys(tmp_path / "link")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o610])
def test_a_file_that_is_open_to_others_is_refused_also_through_a_link(tmp_path, mode):
    path, link = tmp_path / "keys.toml", tmp_path / "link"
    new_keys(path)
    link.symlink_to(path)
    assert read_keys(link)
    path.chmod(mode)
    for one in (path, link):
        with pytest.raises(UserError, match="open to other users"):
            read_keys(one)


def test_a_file_of_another_user_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "keys.toml"
    new_keys(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(UserError, match="another user"):
        read_keys(path)


SECRET = "2" * 40
OTHER = make_keys()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not hold"),
        (f'secret = "{SECRET}"', "does not hold"),
        (f'public = "{OTHER.public}"\nsecret = "{SECRET}"', "does not belong"),
        (f'public = "{OTHER.public}"\nsecret = "{SECRET}', "TOML"),
        (f'public = "{OTHER.public}"\nsecret = "{SECRET[1:]}"', "does not hold"),
        (f'public = "{OTHER.public}"\nsecret = "{SECRET}"\nx = 1', "does not hold"),
        (f'public = 1\nsecret = "{SECRET}"', "does not hold"),
        (f'secret = "{SECRET}" # ' + "x" * 5000, "not a key file"),
        ("\udcff", "TOML"),
    ],
)
def test_a_malformed_file_is_one_line_without_the_secret(tmp_path, text, why):
    path = tmp_path / "keys.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(UserError, match=why) as caught:
        read_keys(path)
    assert "\n" not in str(caught.value)
    assert SECRET[1:] not in "".join(traceback.format_exception(caught.value))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path, why in [("pipe", "not a key file"), (".", "not a key|cannot be"), ("x", "not there")]:
        with pytest.raises(UserError, match=why):
            read_keys(tmp_path / path)


def test_the_secret_is_not_printed():
    keys = KeyPair("public", "hidden")
    assert "hidden" not in f"{keys} {keys!r}"


def test_new_keys_are_keys_and_no_options():
    for _ in range(300):
        keys = make_keys()
        assert is_key(keys.public)
        assert not keys.public.startswith("-")
    assert zmq.curve_public(keys.secret.encode()).decode() == keys.public


def test_what_is_no_key():
    bad = ["", "x" * 39, "x" * 41, '"' * 40, "é" * 40, "#" * 40, b"x" * 40, None]
    assert not any(map(is_key, bad))


def test_where_keys_are_looked_for(monkeypatch):
    monkeypatch.delenv("P2PFL_KEYS", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/alice")
    assert str(default_path()) == "/home/alice/.config/p2pfl/keys.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/settings")
    assert str(default_path()) == "/settings/p2pfl/keys.toml"
    monkeypatch.setenv("P2PFL_KEYS", "/run/keys.toml")
    assert str(default_path()) == "/run/keys.toml"
