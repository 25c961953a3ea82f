"""Ranks of torchrun: what the environment must say, and who tells what has gone wrong."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from p2pfl.errors import RunError, UserError
from p2pfl.launch.joining import _first, joined


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = two in the environment: expected a whole number"),
        ({"RANK": "x"}, "RANK = x in the environment: expected a whole number"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT = abc in the environment: expected a whole number"),
        ({"LOCAL_RANK": None}, "WORLD_SIZE = 2 in the environment, but not LOCAL_RANK: torchrun"),
        ({"RANK": None, "MASTER_ADDR": None}, "but not RANK, MASTER_ADDR: torchrun sets them all"),
    ],
)
def test_half_of_what_torchrun_says_is_refused(changes, told, monkeypatch):
    whole = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    whole |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7000"}
    for name, value in (whole | changes).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told), joined("simulate", "cpu"):
        pass


def test_a_port_that_is_taken_is_told_in_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        about = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (about | {"MASTER_PORT": str(other.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(RunError, match=r"^the ranks cannot meet: .*"),
            joined("simulate", "cpu"),
        ):
            pass


class Gone:
    def add(self, key, amount):
        raise dist.DistNetworkError("connection was closed")


def test_a_rank_whose_store_has_gone_tells_for_itself():
    assert _first(Gone(), 1)
    store = dist.HashStore()
    assert [_first(store, code) for code in (2, 1)] == [True, False]
    assert store.get("code") == b"2"
