"""The peers file: read in all its forms, changed without losing anything, refused in one line."""

import errno
import os
import threading

import pytest

from p2pfl.errors import UserError
from p2pfl.security.keys import make_keys
from p2pfl.security.roster import Member, allow, read_roster, revoke

A, B, C = (make_keys().public for _ in range(3))
FULL = f"""# who takes part

[[peers]]
id = 0
name = "ward-a"   # on the first floor
address = "tcp://10.0.0.1:7000"
key = "{A}"

[[peers]]
id = 4
key = "{B}"
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "peers.toml"
    path.write_text(FULL)
    return path


def test_members_addresses_and_keys(path):
    roster = read_roster(path)
    assert roster.members == (Member(0, "ward-a", "tcp://10.0.0.1:7000", A), Member(4, key=B))
    assert roster.addresses == {0: "tcp://10.0.0.1:7000"}
    assert roster.keys == {0: A, 4: B}
    assert (roster.id_of(A), roster.id_of(B), roster.id_of(C)) == (0, 4, None)


def test_the_short_form(path):
    path.write_text('0 = "tcp://127.0.0.1:7000"\n12 = "ipc:///tmp/x"\n')
    roster = read_roster(path)
    assert roster.addresses == {0: "tcp://127.0.0.1:7000", 12: "ipc:///tmp/x"}
    assert roster.keys == {}


def test_a_network_file(path):
    path.write_text(
        '[[nodes]]\nid = "a"\naddress = "tcp://127.0.0.1:7000"\n[[nodes]]\nid = "b"\n'
        '[[edges]]\nbetween = ["a", "b"]\n'
    )
    assert read_roster(path).addresses == {0: "tcp://127.0.0.1:7000"}


@pytest.mark.parametrize("which", ["0", "ward-a", A], ids=["id", "name", "key"])
def test_revoking_by_id_name_or_key_and_allowing_again(path, which):
    assert revoke(path, which).id == 0
    roster = read_roster(path)
    assert [one.revoked for one in roster.members] == [True, False]
    assert (roster.keys, roster.addresses, roster.id_of(A)) == ({4: B}, {}, None)
    allow(path, Member(0, key=A))
    assert path.read_text() == FULL


def test_changes_keep_what_the_user_wrote(path):
    allow(path, Member(1, "ward-c", "tcp://10.0.0.3:7000", C))
    text = path.read_text()
    assert text.startswith(FULL)
    assert read_roster(path).members[2] == Member(1, "ward-c", "tcp://10.0.0.3:7000", C)
    allow(path, Member(4, address="tcp://10.0.0.9:1"))
    assert read_roster(path).members[1] == Member(4, None, "tcp://10.0.0.9:1", B)


def test_a_new_key_takes_the_place_of_a_revoked_one_only(path):
    with pytest.raises(UserError, match="revoke that one first"):
        allow(path, Member(0, key=C))
    revoke(path, "0")
    allow(path, Member(0, key=C))
    assert read_roster(path).keys == {0: C, 4: B}


def test_a_file_is_made_and_its_mode_and_link_are_kept(tmp_path):
    path, link = tmp_path / "peers.toml", tmp_path / "link.toml"
    allow(path, Member(0, key=A))
    path.chmod(0o640)
    link.symlink_to(path)
    allow(link, Member(1, key=B))
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert read_roster(path).keys == {0: A, 1: B}
    assert {one.name for one in tmp_path.iterdir()} == {"peers.toml", "link.toml"}


@pytest.mark.parametrize("last", ["", "\n# the end", "\n[[peers]]\nid = 7"])
def test_a_last_line_without_an_end_is_a_line_all_the_same(path, last):
    path.write_text(FULL.rstrip() + last)
    before = read_roster(path).members
    allow(path, Member(1, key=C))
    assert read_roster(path).members == (*before, Member(1, key=C))
    revoke(path, "1")
    assert read_roster(path).revoked == {1}


def test_nothing_is_left_of_a_change_that_cannot_be_written(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        allow(path, Member(1, key=C))
    assert path.read_text() == FULL
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_changes_at_the_same_time_are_all_kept(tmp_path):
    path = tmp_path / "peers.toml"
    threads = [
        threading.Thread(target=allow, args=(path, Member(id, key=make_keys().public)))
        for id in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_roster(path).keys.keys() == set(range(8))


PEER = "[[peers]]\nid = 0\n"
BAD = {
    "peers = 3": "peers must be tables",
    "peers = [": "TOML",
    "[[peers]]": "no id",
    "[[peers]]\nid = -1": "id = -1",
    "[[peers]]\nid = true": "id = True",
    '[[peers]]\nid = "0"': "id = '0'",
    PEER + PEER: "id = 0 is listed twice",
    PEER + f'key = "{A}"\n[[peers]]\nid = 1\nkey = "{A}"': "is listed twice",
    PEER + 'name = "a"\n[[peers]]\nid = 1\nname = "a"': "name = 'a' is listed twice",
    PEER + 'key = "short"': "40 characters",
    PEER + f'key = "{"#" * 40}"': "40 characters",
    PEER + 'name = "7"': "not a number",
    PEER + 'name = "a\\nb"': "name =",
    PEER + 'address = "10.0.0.1:7000"': "tcp://host:port",
    PEER + 'address = "tcp://10.0.0.1:70000"': "tcp://host:port",
    PEER + "adress = 1": "'adress' is none of",
    PEER + "revoked = 1": "true or false",
    '0 = "10.0.0.1"': "expected",
    'x = "tcp://10.0.0.1:1"': "expected",
    '0 = "tcp://a:1"\n00 = "tcp://b:2"': "id = 0 is listed twice",
    '0 = "tcp://a:1"\n1 = "tcp://a:1"': "address = 'tcp://a:1' is listed twice",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: BAD[text])
def test_a_mistake_is_one_line_that_names_the_file(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match=BAD[text]) as caught:
        read_roster(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (Member(1, key=A), "listed twice"),
        (Member(1, name="ward-a"), "listed twice"),
        (Member(1, key="short"), "40 characters"),
        (Member(-1, key=C), "from 0 on"),
    ],
)
def test_a_change_that_is_refused_changes_nothing(path, member, why):
    with pytest.raises(UserError, match=why):
        allow(path, member)
    with pytest.raises(UserError, match="no peer"):
        revoke(path, "nobody")
    assert path.read_text() == FULL


def test_files_that_cannot_be_used(tmp_path):
    for path in (tmp_path, tmp_path / "missing.toml"):
        with pytest.raises(UserError, match="cannot be read"):
            read_roster(path)
    short = tmp_path / "short.toml"
    short.write_text('0 = "tcp://127.0.0.1:7000"\n')
    with pytest.raises(UserError, match=r"lists no \[\[peers\]\]"):
        allow(short, Member(0, key=A))
    with pytest.raises(UserError, match="cannot be opened"):
        allow(tmp_path / "no" / "peers.toml", Member(0, key=A))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop cannot be"):
        allow(tmp_path / "loop", Member(0, key=A))
