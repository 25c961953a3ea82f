from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.algorithms.averaging import Params
from p2pfl.churn.script import Script
from p2pfl.peer.events import Send
from p2pfl.runtime import chunks
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.post import Post
from p2pfl.runtime.turmoil import Turmoil


def over(network: NetworkModel) -> Post:
    return Post(network, Turmoil(Script("", 3, (0, 1, 2)), network))


# Around every length that a number may have in a header.
NUMBERS = st.sampled_from([0, 1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**40])


@given(NUMBERS, NUMBERS, NUMBERS, st.integers(1, 50))
def test_a_message_is_as_large_as_on_the_wire(sender, round, degree, d):
    send = Send((1, 2, 3), round, degree, 0.5, Params(torch.zeros(1, d)))
    post = over(NetworkModel())
    assert post.size(sender, send) == chunks.size(sender, send)
    assert post.sent(sender, round) == 3 * chunks.size(sender, send)
    assert post.sent(sender, round) == 0


def test_messages_of_a_link_arrive_in_order_and_goodbyes_after_them():
    post = over(NetworkModel(latency=1.0, jitter=50.0, seed=3))
    due = [post.due(0, 1, 10, now) for now in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert due == sorted(due)
    assert due[0] >= 1.0
    assert post.not_before(0, 1, 0.5) == due[-1]
    assert post.not_before(1, 0, 0.5) == 0.5  # nothing was ever sent that way


def test_lost_messages_never_arrive_and_hold_nothing_up():
    post = over(NetworkModel(latency=1.0, links={(0, 1): {"loss": 1.0}}))
    assert post.due(0, 1, 10, 0.0) == math.inf
    assert post.not_before(0, 1, 0.5) == 0.5
    assert post.due(0, 2, 10, 0.0) == pytest.approx(1.0)


def test_a_sender_has_one_line_and_each_link_its_own():
    post = over(NetworkModel(latency=0.0, uplink=10.0))
    assert [post.due(0, dst, 10, 0.0) for dst in (1, 2, 3)] == pytest.approx([1.0, 2.0, 3.0])
    post = over(NetworkModel(latency=0.0, bandwidth=10.0))
    assert [post.due(0, dst, 10, 0.0) for dst in (1, 2, 1)] == pytest.approx([1.0, 1.0, 2.0])
