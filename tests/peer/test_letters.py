"""Rows that were not stacked are mixed as a block of them would be."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfl.algorithm import Inbox
from p2pfl.learning.pieces import Pieces
from p2pfl.peer.letters import WIDE, Letters, unstacked

D = WIDE + 1


class Said(NamedTuple):
    x: Tensor
    age: Tensor


def heard(k: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Said]:
    draw = torch.Generator().manual_seed(seed)
    return [
        Said(
            torch.randn(1, D, generator=draw, dtype=torch.float64).to(dtype),
            torch.rand(1, 1, generator=draw, dtype=torch.float64).to(dtype),
        )
        for _ in range(k)
    ]


def both(rows: list[Said], own: int = 0) -> tuple[Letters[Said], Inbox[Said]]:
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)).double() + 0.1
    weights /= weights.sum()
    block = Said(*(torch.cat(field) for field in zip(*rows, strict=True)))
    stacked = Inbox(weights.unsqueeze(0), block, torch.tensor([own]))
    return unstacked(weights.tolist(), rows, own), stacked


@given(st.integers(1, 7), st.integers(0, 1000), st.data())
@settings(max_examples=20, deadline=None)
def test_the_methods_give_what_a_block_gives(k, seed, data):
    one, other = both(heard(k, seed), own := data.draw(st.integers(0, k - 1)))
    assert isinstance(one.heard.x, tuple)  # else nothing is tested
    assert isinstance(one.heard.age, Tensor)
    close = torch.testing.assert_close
    close(one.mix(one.heard.x), other.mix(other.heard.x))
    by = one.heard.age + 1
    close(one.mix(one.heard.x, by), other.mix(other.heard.x, by))
    close(one.mix(one.heard.age), other.mix(other.heard.age))
    close(one.mean(one.heard.x, by), other.mean(other.heard.x, by))
    close(one.largest(one.heard.age), other.largest(other.heard.age))
    close(one.mine(one.heard.x), other.heard.x[own : own + 1])
    close(one.mine(one.heard.age), other.mine(other.heard.age))
    for mine, theirs in zip(one.gather(one.heard.x), other.gather(other.heard.x), strict=True):
        close(mine, theirs)


@given(st.integers(1, 5), st.integers(0, 1000), st.data())
@settings(max_examples=20, deadline=None)
def test_rows_in_pieces_give_what_whole_ones_give_to_the_bit(k, seed, data):
    rows, own = heard(k, seed, torch.float32), data.draw(st.integers(0, k - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, D - 1), max_size=4)))
    columns = [*zip([0, *cuts], [*cuts, D], strict=True)]
    parted = [
        row
        if sender == own
        else row._replace(x=Pieces([row.x[:, a:b] for a, b in columns], columns))
        for sender, row in enumerate(rows)
    ]
    whole, _ = both(rows, own)
    pieces = unstacked(whole.weights[0].tolist(), parted, own)
    by = whole.heard.age + 1
    assert torch.equal(pieces.mix(pieces.heard.x), whole.mix(whole.heard.x))
    assert torch.equal(pieces.mix(pieces.heard.x, by), whole.mix(whole.heard.x, by))
    assert torch.equal(pieces.mean(pieces.heard.x, by), whole.mean(whole.heard.x, by))
    assert torch.equal(pieces.mine(pieces.heard.x), rows[own].x)
    for mine, theirs in zip(
        pieces.gather(pieces.heard.x), whole.gather(whole.heard.x), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_the_mean_is_over_those_heard_alone():
    rows = heard(3, 0)
    inbox = unstacked([0.5, 0.0, 0.5], rows, 0)
    expected = (rows[0].x + 3 * rows[2].x) / 4
    torch.testing.assert_close(
        inbox.mean(inbox.heard.x, torch.tensor([[1.0], [9.0], [3.0]])), expected
    )


def test_what_was_heard_is_not_written_to():
    rows = heard(3, 1)
    before = [row.x.clone() for row in rows]
    inbox, _ = both(rows)
    inbox.mix(inbox.heard.x)
    assert all(torch.equal(row.x, x) for row, x in zip(rows, before, strict=True))


def test_weights_that_differ_by_a_rounding_give_the_same_to_the_bit():
    """What is left for a peer itself is not to the last bit what the others take of it."""
    rows = heard(6, 3, torch.float32)
    inboxes = []
    for own in range(6):
        weights = [1 / 6] * 6
        weights[own] = 1 - 5 * (1 / 6)
        inboxes.append(unstacked(weights, rows, own))
    assert inboxes[0].weights[0, 0] != inboxes[0].weights[0, 1]  # else nothing is tested
    mixed = [inbox.mix(inbox.heard.x) for inbox in inboxes]
    assert all(torch.equal(one, mixed[0]) for one in mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_single(dtype):
    rows = heard(9, 2, dtype)
    inbox, _ = both(rows)
    exact = sum(w * row.x.double() for w, row in zip(inbox.weights[0], rows, strict=True))
    mixed = inbox.mix(inbox.heard.x)
    assert mixed.dtype == dtype
    once = 0.501 * torch.finfo(dtype).eps  # no more than one rounding
    torch.testing.assert_close(mixed.double(), exact, rtol=once, atol=1e-6)
