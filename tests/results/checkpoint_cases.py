"""A file system that loses its power, fills up and fails; and writers that are not careful."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import torch

from p2pfl.results.checkpoint import Checkpoints, Found
from p2pfl.results.durable import Disk

FOLDER = Path("run/checkpoints")


class Cut(BaseException):
    """The power is gone: nothing runs any more."""


class SimFS:
    """A folder. What was not flushed may or may not be there after a power cut.

    Args:
        left: calls until the power is cut.
        space: bytes it holds.
    """

    def __init__(self, files=(), left=10**9, space=10**9):
        self.left, self.space = left, space
        self.data, self.durable = {}, {}  # by inode
        self.names_now, self.names_durable, self.pending = {}, {}, []
        for inode, (name, content) in enumerate(dict(files).items()):
            self.data[inode] = self.durable[inode] = content
            self.names_now[name] = self.names_durable[name] = inode
        self.failing = None  # an errno that flushing raises

    def tick(self):
        self.left -= 1
        if self.left < 0:
            raise Cut

    def make(self, folder):
        self.tick()

    def names(self, folder):
        return list(self.names_now)

    def open(self, path):
        return io.BytesIO(self.data[self.names_now[path.name]])

    def create(self, path):
        self.tick()
        if path.name in self.names_now:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        inode = len(self.data)
        self.data[inode] = self.durable[inode] = b""
        self.names_now[path.name] = inode
        self.pending.append(("link", path.name, inode))
        return Sink(self, inode)

    def flush(self, file):
        self.tick()
        if self.failing:
            raise OSError(self.failing, os.strerror(self.failing))
        self.durable[file.inode] = self.data[file.inode]

    def flush_folder(self, folder):
        self.tick()
        self.names_durable, self.pending = dict(self.names_now), []

    def rename(self, old, new):
        self.tick()
        inode = self.names_now.pop(old.name)
        self.names_now[new.name] = inode
        self.pending.append(("rename", old.name, new.name, inode))

    def remove(self, path):
        self.tick()
        if path.name not in self.names_now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        del self.names_now[path.name]
        self.pending.append(("remove", path.name))

    def used(self):
        return sum(len(self.data[inode]) for inode in self.names_now.values())

    def after_the_cut(self, chance):
        """Return what is found when the power is back, by name."""
        names = dict(self.names_durable)
        for kind, name, *more in self.pending:  # each is on the disk or not, whatever the others
            if chance.random() < 0.5:
                continue
            if kind == "link":
                names[name] = more[0]
                continue
            names.pop(name, None)
            if kind == "rename":
                names[more[0]] = more[1]
        return {name: self._torn(inode, chance) for name, inode in names.items()}

    def _torn(self, inode, chance):
        kept, now = self.durable[inode], self.data[inode]
        if kept == now:
            return now
        length = chance.randrange(min(len(kept), len(now)), len(now) + 1)
        zeroed = b"\0" * (len(now) - length) if chance.random() < 0.5 else b""
        return now[:length] + zeroed


class Sink:
    """An open file that takes a few bytes at a time."""

    def __init__(self, files, inode):
        self.files, self.inode = files, inode

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def write(self, data):
        self.files.tick()
        part = bytes(data[:160])
        if self.files.used() + len(part) > self.files.space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.files.data[self.inode] += part
        return len(part)


class Unflushed(SimFS):
    """Nothing is ever flushed."""

    def flush(self, file):
        self.tick()

    def flush_folder(self, folder):
        self.tick()


class UnflushedFolder(SimFS):
    """Files are flushed, and their names are not."""

    def flush_folder(self, folder):
        self.tick()


class InPlace(SimFS):
    """There is one file, which is written over, flushed, and given its new name."""

    def create(self, path):
        if not self.names_now:
            return super().create(path)
        self.tick()
        (self.old,) = self.names_now
        inode = self.names_now[self.old]
        self.data[inode] = b""
        return Sink(self, inode)

    def rename(self, old, new):
        super().rename(old if old.name in self.names_now else Path(self.old), new)


class InPlaceDisk(Disk):
    """The same on a real disk."""

    def create(self, path):
        self.old = next((p for p in path.parent.iterdir() if p.suffix == ".safetensors"), None)
        return path.open("wb", buffering=0) if self.old is None else self.old.open("wb", 0)

    def rename(self, old, new):
        (self.old or old).replace(new)


def tensors(number, width=3):
    """Return what checkpoint `number` of a test holds."""
    return {
        "state.x": torch.arange(width, dtype=torch.float32) + number,
        "keys": torch.tensor([number], dtype=torch.int64),
    }


def checkpoints(files, folder=FOLDER, **changes):
    return Checkpoints(folder, "some run", files=files, **changes)


def save(kept: Checkpoints, number: int, width: int = 3) -> None:
    kept.save(number, tensors(number, width), {"n": number})


def right(found: Found, width: int = 3) -> bool:
    """Tell whether all of a checkpoint is as it was saved."""
    wanted = tensors(found.number, width)
    return (
        found.about == {"n": found.number}
        and found.tensors.keys() == wanted.keys()
        and all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)
    )
