"""Ranks of torchrun: what the environment must say, and who tells what has gone wrong."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from p2pfl.errors import UserError
from p2pfl.launch.joining import _first, joined


@pytest.mark.parametrize(
    ("size", "told"),
    [("2", r"WORLD_SIZE = 2 .* but not RANK, MASTER_ADDR, MASTER_PORT"), ("two", "whole number")],
)
def test_half_of_what_torchrun_says_is_refused(size, told, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=told), joined("simulate", "cpu"):
        pass


class Gone:
    def add(self, key, amount):
        raise dist.DistNetworkError("connection was closed")


def test_a_rank_whose_store_has_gone_tells_for_itself():
    assert _first(Gone(), 1)
    store = dist.HashStore()
    assert [_first(store, code) for code in (2, 1)] == [True, False]
    assert store.get("code") == b"2"
