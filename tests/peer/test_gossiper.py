from __future__ import annotations

import math

import pytest
import torch
from peer_cases import vector

from p2pfl.algorithm import Rows
from p2pfl.algorithms import gosgd, gossip, push_sum
from p2pfl.algorithms.gossip import Aged
from p2pfl.algorithms.push_sum import Mass
from p2pfl.errors import LocalProtocolError, RemoteProtocolError, RunError
from p2pfl.learning.optim import sgd
from p2pfl.peer.events import (
    Evaluate,
    PeerDown,
    PeerUp,
    Received,
    Report,
    Send,
    SetTimer,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.gossiper import HALVES, Gossiper, Tempo
from p2pfl.peer.plan import View, Views


def make(to=(0, 2), hears=(0, 2), **tempo):
    rows = Rows(torch.tensor([1]), torch.tensor([5]))
    paced = Tempo(**{"period": 2.0, "ticks": 5, **tempo})
    views = Views(lambda round, gone: View(to, hears))
    return Gossiper(gossip(sgd(0.5)), views, paced, vector(0.0, 0.0), rows)


def model(sender: int, *x: float, age: float = 0.0) -> Received:
    return Received(sender, 0, 1, -math.inf, Aged(vector(*x), vector(age)), 70)


def trained(peer, asked: Train, *gradient: float, loss: float = 1.0):
    state = peer.algorithm.step(asked.state, vector(*gradient))
    return peer.handle(Trained(asked.step, state, loss))


def kinds(effects):
    return [type(effect) for effect in effects]


def test_a_model_that_comes_during_a_step_is_merged_after_it():
    peer = make()
    timer, asked = peer.handle(Started())
    assert timer == SetTimer(2.0, 0)
    assert peer.handle(model(0, 8.0, 0.0)) == []  # one training at a time
    assert peer.handle(model(2, 0.0, 8.0)) == []
    assert peer.params.tolist() == [[0.0, 0.0]]
    (again,) = trained(peer, asked, -4.0, -4.0)
    # x = (2, 2) of age 1 merges with 0's (8, 0) of age 0, as 2 to 1; then with 2's, as 2 to 1.
    torch.testing.assert_close(again.state.x, vector((4.0 * 2) / 3, (4 / 3 * 2 + 8) / 3))
    assert again.step == 1
    assert trained(peer, again, 0.0, 0.0) == []  # no mail, no step


def test_only_the_newest_model_of_a_neighbour_is_merged():
    peer = make()
    _, asked = peer.handle(Started())
    peer.handle(model(0, 100.0, 100.0))
    peer.handle(model(0, 3.0, 3.0))
    (again,) = trained(peer, asked, 0.0, 0.0)
    torch.testing.assert_close(again.state.x, vector(1.0, 1.0))
    report = peer.handle(TimerFired(0))[1]
    assert isinstance(report, Report)
    assert report.received == 140
    assert peer.handle(TimerFired(1))[1].received == 0


def test_a_push_goes_to_one_neighbour_that_is_alive():
    peer = make(ticks=60)
    peer.handle(Started())
    seen = set()
    for tick in range(20):
        send, *_ = peer.handle(TimerFired(tick))
        assert isinstance(send, Send)
        assert len(send.to) == send.degree == 1
        seen |= {*send.to}
    assert seen == {0, 2}
    peer.handle(PeerDown(2))
    assert {peer.handle(TimerFired(tick))[0].to for tick in range(20, 40)} == {(0,)}
    peer.handle(PeerDown(0))
    assert Send not in kinds(peer.handle(TimerFired(40)))
    peer.handle(PeerUp(2))
    assert peer.handle(TimerFired(41))[0].to == (2,)


def test_one_way_links():
    peer = make(to=(2,), hears=(0,))
    _, asked = peer.handle(Started())
    peer.handle(model(0, 2.0, 2.0))
    with pytest.raises(RemoteProtocolError, match="2 is not a neighbour"):
        peer.handle(model(2, 2.0, 2.0))
    (again,) = trained(peer, asked, 0.0, 0.0)
    assert float(again.state.x.sum()) > 0
    peer.handle(PeerUp(0))  # who is heard is not thereby spoken to
    assert {peer.handle(TimerFired(tick))[0].to for tick in range(4)} == {(2,)}


def test_the_last_push_is_measured_and_ends_it():
    peer = make(ticks=3, evaluate_every=2)
    peer.handle(Started())
    each = [kinds(peer.handle(TimerFired(tick))) for tick in range(3)]
    assert each == [
        [Send, Report, SetTimer],
        [Send, Report, Evaluate, SetTimer],
        [Send, Report, Evaluate, Stop],
    ]


def test_a_period_without_mail_trains_all_the_same():
    peer = make(ticks=9)
    _, asked = peer.handle(Started())
    trained(peer, asked, 0.0, 0.0)
    assert Train not in kinds(peer.handle(TimerFired(0)))  # it has trained since the start
    for tick in (1, 2):
        *_, asked = peer.handle(TimerFired(tick))
        assert isinstance(asked, Train)
        trained(peer, asked, 0.0, 0.0)
    (asked,) = peer.handle(model(0, 1.0, 1.0))
    trained(peer, asked, 0.0, 0.0)
    assert Train not in kinds(peer.handle(TimerFired(3)))
    *_, asked = peer.handle(TimerFired(4))
    assert isinstance(asked, Train)
    assert Train not in kinds(peer.handle(TimerFired(5)))  # still at it


def test_divergence_and_misuse():
    peer = make()
    _, asked = peer.handle(Started())
    with pytest.raises(LocalProtocolError, match="step 7"):
        peer.handle(Trained(7, asked.state, 1.0))
    with pytest.raises(RunError, match="node 1 diverged at step 0: its training loss is inf"):
        peer.handle(Trained(0, asked.state, math.inf))
    trained(peer, asked, 0.0, 0.0)
    with pytest.raises(LocalProtocolError, match="step 0 trained, which nobody asked for"):
        peer.handle(Trained(0, asked.state, 1.0))


def test_the_seed_draws_whom_to_push_to():
    def pushes(seed):
        peer = make(seed=seed, ticks=99)
        peer.handle(Started())
        return [peer.handle(TimerFired(tick))[0].to for tick in range(30)]

    assert pushes(1) == pushes(1) != pushes(2)


def test_the_peer_does_nothing_any_more_when_it_is_done():
    peer = make(ticks=1)
    _, asked = peer.handle(Started())
    assert peer.handle(TimerFired(0))[-1] == Stop("all ticks done")
    before = peer.params
    assert trained(peer, asked, 1.0, 1.0) == []
    for event in (model(0, 3.0, 3.0), TimerFired(1), PeerDown(0), PeerUp(0)):
        assert peer.handle(event) == []
    assert peer.params.equal(before)


@pytest.mark.parametrize("order", ["random_walk", "update_then_merge"])
def test_where_each_is_trained_by_itself_models_wait_for_their_turn(order):
    rows = Rows(torch.tensor([1]), torch.tensor([5]))
    views = Views(lambda round, gone: View((0, 2), (0, 2)))
    given = {"merge": "mean"} if order == "update_then_merge" else {}
    algorithm = gossip(sgd(0.5), order=order, **given)
    peer = Gossiper(algorithm, views, Tempo(2.0, 9), vector(0.0, 0.0), rows)

    def done(asked, loss=1.0):
        state = peer.algorithm.step(asked.state, vector(-2.0, -2.0))
        state = algorithm.settle(state) if algorithm.settle else state
        return peer.handle(Trained(asked.step, state, loss))

    _, asked = peer.handle(Started())
    peer.handle(model(2, 0.0, 8.0, age=3.0))
    peer.handle(model(0, 8.0, 0.0, age=7.0))
    (asked,) = done(asked)
    torch.testing.assert_close(asked.state.x, vector(0.0, 8.0))  # the first that came
    assert float(asked.state.age) == 3
    (asked,) = done(asked)
    torch.testing.assert_close(asked.state.x, vector(8.0, 0.0))
    assert done(asked) == []
    merged = vector((9.0 + 1) / 2, (1.0 + 9) / 2)
    torch.testing.assert_close(peer.params, vector(9.0, 1.0) if not given else merged)


# Of a mass, half is pushed.


def make_sharing(build=push_sum, ticks=9, hears=0):
    rows = Rows(torch.tensor([1]), torch.tensor([5]))
    views = Views(lambda round, gone: View((2,), (hears,)))
    return Gossiper(build(sgd(0.5)), views, Tempo(2.0, ticks), vector(8.0, 0.0), rows)


def share(sender: int, round: int, *x: float, w: float) -> Received:
    return Received(sender, round, 1, -math.inf, Mass(vector(*x), vector(w)), 70)


@pytest.mark.parametrize(("build", "moved"), [(push_sum, 8.0), (gosgd, 2.0)])
def test_what_is_pushed_beside_a_step_is_gone_and_the_step_is_not(build, moved):
    peer = make_sharing(build)
    _, asked = peer.handle(Started())
    for tick, (x, w) in enumerate([(4.0, 0.5), (6.0, 0.75)]):  # running sums
        send, *_ = peer.handle(TimerFired(tick))
        assert send.to == (2,)
        torch.testing.assert_close(send.message, Mass(vector(x, 0.0), vector(w)))
    assert trained(peer, asked, 0.0, -4.0) == []  # two to the right, of a model of weight 1
    assert float(peer.state.w) == 0.25
    torch.testing.assert_close(peer.params, vector(8.0, moved))


def test_of_sums_only_what_is_new_is_taken():
    peer = make_sharing()
    _, asked = peer.handle(Started())
    peer.handle(share(0, 3, 2.0, 0.0, w=0.5))
    peer.handle(share(0, 5, 6.0, 0.0, w=1.0))  # which says what the first did, too
    (asked,) = trained(peer, asked, 0.0, 0.0)
    assert asked.state.x.tolist() == [[14.0, 0.0]]
    assert asked.state.w.tolist() == [[2.0]]
    with pytest.raises(RemoteProtocolError, match="0 pushed 5 again, or late"):
        peer.handle(share(0, 5, 6.0, 0.0, w=1.0))
    peer.handle(share(0, 6, 7.0, 0.0, w=1.25))
    (asked,) = trained(peer, asked, 0.0, 0.0)
    assert asked.state.w.tolist() == [[2.25]]


def test_who_has_started_again_is_met_with_empty_hands():
    peer = make_sharing()
    _, asked = peer.handle(Started())
    peer.handle(share(0, 5, 6.0, 0.0, w=1.0))
    peer.handle(TimerFired(0))
    peer.handle(PeerUp(0, anew=True))
    peer.handle(PeerUp(2, anew=True))
    assert trained(peer, asked, 0.0, 0.0) == []  # what its last life gave is not known any more
    send, *_, asked = peer.handle(TimerFired(1))
    assert send.message.w.tolist() == [[0.25]]
    assert trained(peer, asked, 0.0, 0.0) == []
    (asked,) = peer.handle(share(0, 0, 1.0, 0.0, w=0.5))
    assert asked.state.w.tolist() == [[0.75]]


def test_a_neighbour_that_answers_nothing_is_given_two_halves_and_they_are_taken_back():
    peer = make_sharing(hears=2)
    _, asked = peer.handle(Started())
    said = [float(peer.handle(TimerFired(tick))[0].message.w) for tick in range(3)]
    assert said == [0.5, 0.75, 0.75]
    peer.handle(share(2, 0, 1.0, 0.0, w=0.125))
    said = [float(peer.handle(TimerFired(tick))[0].message.w) for tick in range(3, 6)]
    assert said == [0.875, 0.9375, 0.9375]
    assert float(peer.state.w) == 0.0625
    peer.handle(PeerDown(2))
    assert float(peer.state.w) == 0.25  # what came after its word; and it has not been merged yet
    (asked,) = trained(peer, asked, 0.0, 0.0)
    assert float(asked.state.w) == 0.375


def test_who_is_done_has_what_it_was_given():
    peer = make_sharing(hears=2)
    peer.handle(Started())
    peer.handle(TimerFired(0))
    peer.handle(PeerDown(2, done=True))
    assert float(peer.state.w) == 0.5


def test_who_hears_nobody_does_not_give_away_all_it_has_but_goes_on_saying_what_it_gave():
    peer = make_sharing(ticks=999)
    _, asked = peer.handle(Started())
    said = [peer.handle(TimerFired(tick))[0].message for tick in range(300)]
    left = 0.5**HALVES
    assert {float(one.w) for one in said[HALVES:]} == {1 - left}
    assert trained(peer, asked, 0.0, 0.0) == []
    assert peer.state.w.tolist() == [[left]]
    peer.handle(share(0, 5, 6.0, 0.0, w=1.0))
    assert float(peer.handle(TimerFired(300))[0].message.w) == 1 - left + (1 + left) / 2
