"""Checkpoints: what is in the files, which are kept, and what is made of damaged ones."""

from __future__ import annotations

import errno
import json
import stat

import pytest
import torch
from checkpoint_cases import FOLDER, SimFS, checkpoints, right, save, tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from p2pfl.results import tensor_file
from p2pfl.results.checkpoint import CheckpointError, Checkpoints, Timetable
from p2pfl.results.durable import DRAFT, Disk


def test_a_checkpoint_comes_back_to_the_bit(tmp_path):
    made = {
        "wide": torch.randn(7, 5, dtype=torch.float64),
        "half": torch.randn(3, 3).bfloat16(),
        "keys": torch.tensor([2**62, -5]),
        "none": torch.empty(0, 4),
        "number": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "columns": torch.arange(12.0).reshape(3, 4).T,
        "row": torch.arange(3.0).expand(4, 3),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    }
    kept = Checkpoints(tmp_path / "c", "run 1")
    kept.save(12, made, {"a": [1, {"b": "ü"}]})
    found = kept.newest()
    assert (found.number, found.about, found.skipped) == (12, {"a": [1, {"b": "ü"}]}, [])
    assert found.tensors.keys() == made.keys()
    for name, tensor in made.items():
        back = found.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert bytes(b"".join(tensor_file._parts(back))) == b"".join(tensor_file._parts(tensor))


def test_the_safetensors_library_reads_the_file(tmp_path):
    kept = Checkpoints(tmp_path, "run 1")
    made = tensors(4) | {"b": torch.randn(5).bfloat16(), "c": torch.tensor([True])}
    kept.save(4, made, {"n": 4})
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
        assert texts["format"] == "p2pfl-checkpoint 1"
        assert (texts["run"], texts["number"], json.loads(texts["about"])) == (
            "run 1",
            "4",
            {"n": 4},
        )
        assert len(texts["sha256"]) == 64
        for name, tensor in made.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_large_tensors_are_written_and_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "CHUNK", 1 << 10)
    kept = Checkpoints(tmp_path, "run")
    made = {"x": torch.randn(3, 1001, dtype=torch.float64), "y": torch.arange(999).byte()}
    kept.save(1, made, {})
    found = kept.newest().tensors
    assert all(torch.equal(found[name], made[name]) for name in made)


def test_the_newest_are_kept(tmp_path):
    kept = checkpoints(Disk(), tmp_path / "c", keep=3)
    assert kept.newest() is None
    for number in (1, 2, 5, 9, 10):
        save(kept, number)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == [f"{number:08d}.safetensors" for number in (5, 9, 10)]


def test_what_killed_writers_have_left_is_removed(tmp_path):
    (tmp_path / f".00000003.safetensors{DRAFT}").write_bytes(b"half a file")
    (tmp_path / "notes.txt").write_text("mine")
    save(checkpoints(Disk(), tmp_path), 4)
    assert {path.name for path in tmp_path.iterdir()} == {"00000004.safetensors", "notes.txt"}


def three(tmp_path):
    kept = checkpoints(Disk(), tmp_path, keep=3)
    for number in (1, 2, 3):
        save(kept, number)
    return kept, tmp_path / "00000003.safetensors", (tmp_path / "00000003.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: b"", "0 bytes"),
        (lambda data: data[:5], "5 bytes"),
        (lambda data: data[:40], "too few for its header"),
        (lambda data: data[:-1], "bytes, not"),
        (lambda data: data + b"\0", "bytes, not"),
        (lambda data: b"\xff" * 8 + data[8:], "too few for its header"),
        (lambda data: data[:8] + b"[" * (len(data) - 8), "header is damaged"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA-256"),
        (lambda data: data.replace(b'"number":"3"', b'"number":"4"'), "whatever its name says"),
        (lambda data: data.replace(b'n\\": 3', b'n\\": 4'), "SHA-256"),
        (lambda data: data.replace(b"some run", b"some ran"), "another experiment"),
        (lambda data: data.replace(b"checkpoint 1", b"checkpoint 2"), "format"),
        (
            lambda data: data.replace(b'"F32","shape":[3]', b'"F32","shape":[4]'),
            "header is damaged",
        ),
        (lambda data: data.replace(b'"keys"', b'"kyes"'), "SHA-256"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_reason(tmp_path, damage, why):
    kept, path, data = three(tmp_path)
    assert damage(data) != data
    path.write_bytes(damage(data))
    found = kept.newest()
    assert found.number == 2
    assert right(found)
    (skipped,) = found.skipped
    assert skipped.startswith("00000003.safetensors: ")
    assert why in skipped


@given(st.data())
def test_any_change_of_a_file_is_noticed(data):
    files = SimFS()
    kept = checkpoints(files)
    save(kept, 1)
    save(kept, 2)
    inode = files.names_now["00000002.safetensors"]
    whole = files.data[inode]
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytes([whole[at] ^ data.draw(st.integers(1, 255))])
    files.data[inode] = whole[:at] + changed + whole[at + 1 :]
    assert kept.newest().number == 1


@given(st.binary(max_size=300))
def test_any_bytes_are_either_read_or_refused(content):
    kept = checkpoints(SimFS({"00000001.safetensors": content}))
    with pytest.raises(CheckpointError):
        kept.newest()


def test_a_header_that_claims_much_gets_no_memory(tmp_path):
    shape = [1 << 40]
    table = {
        "__metadata__": {"format": "p2pfl-checkpoint 1"},
        "x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 << 40]},
    }
    head = json.dumps(table).encode()
    (tmp_path / "00000001.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(CheckpointError, match="bytes, not 4398"):
        checkpoints(Disk(), tmp_path).newest()


def test_if_none_is_valid_it_says_why(tmp_path):
    kept, _, _ = three(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00000003.*00000002.*00000001"):
        kept.newest()


def test_others_than_expected_are_not_even_read(tmp_path):
    kept, _, _ = three(tmp_path)
    meta = {name: tensor.to("meta") for name, tensor in tensors(3).items()}
    assert right(kept.newest(meta))
    for wrong in (
        meta | {"more": meta["keys"]},
        {"keys": meta["keys"]},
        meta | {"keys": meta["keys"].double()},
        meta | {"keys": meta["keys"].expand(2)},
    ):
        with pytest.raises(CheckpointError, match=r"not those of this run: (more|state\.x|keys)"):
            kept.newest(wrong)


def test_a_run_that_goes_on_from_an_older_one_replaces_the_newer(tmp_path):
    _, path, data = three(tmp_path)
    path.write_bytes(data[:-1])
    again = checkpoints(Disk(), tmp_path, keep=2)
    assert again.newest().number == 2
    save(again, 3)
    assert again.newest().skipped == []
    path.write_bytes(data[:-1])
    (tmp_path / "00000002.safetensors").unlink()
    save(again, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002.safetensors"]


@pytest.mark.parametrize("trouble", ["space", "flush"])
def test_trouble_leaves_the_last_one_and_no_litter(trouble):
    files = SimFS()
    kept = checkpoints(files)
    save(kept, 1)
    save(kept, 2)
    before = dict(files.names_now)
    if trouble == "space":
        files.space = files.used() + 300
    else:
        files.failing = errno.EIO
    with pytest.raises(CheckpointError, match=f"{FOLDER}: (No space left|Input/output error)"):
        save(kept, 3)
    assert files.names_now == before
    assert right(kept.newest())
    files.space, files.failing = 10**9, None
    save(kept, 4)
    assert kept.newest().number == 4


def test_an_interrupted_writer_leaves_no_litter(tmp_path, monkeypatch):
    def flush(file):
        raise KeyboardInterrupt

    files = Disk()
    kept = checkpoints(files, tmp_path)
    save(kept, 1)
    monkeypatch.setattr(files, "flush", flush)
    with pytest.raises(KeyboardInterrupt):
        save(kept, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001.safetensors"]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def written(table, clock, seconds_per_round, took, rounds=100):
    """Return after which rounds checkpoints were written."""
    done = []
    for k in range(1, rounds + 1):
        clock.now += seconds_per_round
        if table.due(k):
            table.begin(k)
            clock.now += took
            assert table.end() == pytest.approx(took)
            done.append(k)
    return done


def test_rounds_and_seconds_lie_between_two():
    clock = Clock()
    assert written(Timetable(3, 0, 0, clock), clock, 1, 50)[:3] == [3, 6, 9]
    assert written(Timetable(1, 10, 0, clock), clock, 1, 0.1)[:3] == [10, 20, 30]
    assert written(Timetable(7, 10, 5, clock), clock, 1, 0.1)[:3] == [12, 22, 32]
    assert written(Timetable(0, 0, 0, clock), clock, 1, 0) == []


def test_no_more_than_a_twentieth_of_the_time_is_spent():
    clock = Clock()
    began = clock.now
    done = written(Timetable(1, 1.0, 0, clock), clock, 1, 5, rounds=2000)
    assert len(done) > 10
    assert 5 * len(done) / (clock.now - began) < 0.051
