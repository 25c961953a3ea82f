"""Files are replaced whole or not at all."""

import errno
import os

import pytest

from p2pfl import files


def test_a_file_is_written_and_written_again(tmp_path):
    path = tmp_path / "a file"
    for data in (b"one", b"", b"three"):
        files.replace(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["a file"]  # noqa: PTH208


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_who_could_read_it_still_can_and_nobody_else(tmp_path, mode):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    files.replace(path, b"new")
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, there):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.replace(path, b"new")
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == (
        {"file": b"old"} if there else {}
    )


def test_what_a_crash_has_left_is_no_hindrance(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"half of it, and then the power")
    files.replace(tmp_path / "file", b"whole")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_who_writes_a_draft_may_make_a_file_of_its_own(tmp_path):
    path, usual = tmp_path / "file", tmp_path / "usual"
    usual.touch()
    with files.replacing(path) as draft:
        draft.unlink()
        draft.touch(0o600)
        draft.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert path.stat().st_mode == usual.stat().st_mode


def test_whatever_goes_wrong_no_draft_stays(tmp_path):
    def interrupted(draft):
        draft.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "file") as draft:
        interrupted(draft)
    assert [*tmp_path.iterdir()] == []
