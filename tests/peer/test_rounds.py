from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_cases import ALGORITHMS, letter, make_peer, snapshot, train, vector

from p2pfl import codec
from p2pfl.algorithm import Inbox
from p2pfl.algorithms import choco
from p2pfl.codec import Sparse
from p2pfl.errors import LocalProtocolError, RemoteProtocolError
from p2pfl.learning.optim import sgd
from p2pfl.peer.events import (
    PeerDown,
    PeerUp,
    Received,
    Report,
    Send,
    SetTimer,
    Skip,
    Skipped,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.plan import BACKLOG
from p2pfl.peer.rounds import Phase
from p2pfl.peer.stopping import target
from p2pfl.topology import metropolis


def ready(**more):
    """A peer that has trained and waits."""
    peer = make_peer(**more)
    return peer, train(peer, peer.handle(Started()))


def inbox_of(peer, *events) -> Inbox:
    """Return what the peer mixes when these events close its round."""
    seen = []
    receive = peer.algorithm.receive

    def watch(state, inbox):
        seen.append(inbox)
        return receive(state, inbox)

    peer.algorithm = peer.algorithm._replace(receive=watch)
    for event in events:
        peer.handle(event)
    (inbox,) = seen
    return inbox


def test_the_share_of_the_missing_stays_with_oneself():
    """So the mean is kept where the other end does the same."""
    peer, _ = ready(to=(0, 2, 3), patience=5.0, x=(8.0, 0.0))
    inbox = inbox_of(peer, letter(3, 0, 0.0, 8.0, degree=7), letter(0, 0, 4.0, 4.0), TimerFired(0))
    assert inbox.weights.tolist() == [[1 / 4, 1 - 1 / 4 - 1 / 8, 1 / 8]]
    assert inbox.own.tolist() == [1]
    torch.testing.assert_close(peer.params, vector(1.0 + 5.0, 1.0 + 1.0))


@given(st.permutations([0, 1, 3, 4]), st.integers(0, 10**6))
def test_all_add_up_in_the_order_of_the_ids(order, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 2, generator=draw, dtype=torch.float64)
    peer, _ = ready(me=2, to=(0, 1, 3, 4), x=tuple(x[2].tolist()))
    inbox = inbox_of(peer, *(letter(j, 0, *x[j].tolist(), degree=4) for j in order))
    assert torch.equal(inbox.heard.x, x)
    assert inbox.own.tolist() == [2]
    other, _ = ready(me=2, to=(0, 1, 3, 4), x=tuple(x[2].tolist()))
    for j in sorted(order):
        other.handle(letter(j, 0, *x[j].tolist(), degree=4))
    assert torch.equal(peer.params, other.params)


def test_a_frozen_peer_keeps_only_so_much_mail():
    peer = make_peer(patience=5.0, rounds=999)
    peer.handle(Started())
    for round in range(500):
        peer.handle(letter(0, round, round, 0.0))
    (mail,) = peer.mail.unopened.values()
    assert [m.round for m in mail] == list(range(500 - BACKLOG, 500))


@pytest.mark.parametrize(
    ("algorithm", "patience"), [("choco", 5.0), ("push_sum", math.inf), ("dpsgd", math.inf)]
)
def test_no_mail_is_dropped_where_all_of_it_counts(algorithm, patience):
    peer = make_peer(algorithm, patience=patience, rounds=999)
    peer.handle(Started())
    more = {"push_sum": {"w": 1.0}, "choco": {"dense": True}}.get(algorithm, {})
    for round in range(50):
        peer.handle(letter(0, round, 0.0, 0.0, **more))
    assert len(peer.mail.unopened[0]) == 50


def test_who_has_run_far_ahead_and_is_caught_up_with_is_waited_for_again():
    peer, _ = ready(patience=5.0, rounds=99, backlog=2, to=(0,))
    for round in range(4):
        peer.handle(letter(0, round, 1.0, 1.0))
    assert peer.round == 1  # the first letter has ended the round; three fill the box
    asked = [Train(1, 1, peer.state)]
    asked = train(peer, asked)
    assert peer.round == 2  # at once, by the newest
    asked = train(peer, asked)
    assert (peer.round, peer.phase) == (3, Phase.TRAINING)
    asked = train(peer, asked)
    asked = train(peer, asked)
    assert peer.round == 5  # now ahead itself
    peer.handle(letter(0, 4, 1.0, 1.0))
    train(peer, asked)
    assert (peer.round, peer.phase) == (5, Phase.WAITING)
    peer.handle(letter(0, 5, 1.0, 1.0))
    assert peer.round == 6


def test_choco_remembers_the_silent_and_does_not_mix_them():
    """A copy of who may be dead would pull at its neighbours, round by round."""
    peer, _ = ready(algorithm="choco", patience=5.0, rounds=9)
    peer.handle(letter(0, 0, 3.0, 0.0, dense=True))
    train(peer, peer.handle(letter(2, 0, 0.0, 6.0, dense=True)))
    late = TimerFired(1)  # node 2
    inbox = inbox_of(peer, letter(0, 1, 3.0, 0.0, dense=True), late)
    assert inbox.heard.x[0].tolist() == [6.0, 0.0]  # its changes, added up
    assert len(inbox.heard.x) == 2
    train(peer, [Train(peer.step, 1, peer.state)])
    peer.handle(letter(2, 1, 0.0, 1.0, dense=True))
    peer.handle(letter(2, 2, 0.0, 1.0, dense=True))
    inbox = inbox_of(peer, letter(0, 2, 3.0, 0.0, dense=True))
    assert inbox.heard.x[2].tolist() == [0.0, 8.0]


def test_what_cannot_be_decoded_is_refused_and_changes_nothing():
    peer, _ = ready(algorithm="choco top_k")
    beyond = Sparse(vector(1.0), torch.tensor([[2]], dtype=torch.int32))
    bad, before = Received(0, 0, 2, -math.inf, beyond, 10), snapshot(peer)
    with pytest.raises(RemoteProtocolError, match="message of 0: a column outside"):
        peer.handle(bad)
    assert snapshot(peer) == before


def top(field: torch.Tensor) -> torch.Tensor:
    """The largest numbers that such a field can have."""
    kind = torch.finfo if field.is_floating_point() else torch.iinfo
    return torch.full_like(field, kind(field.dtype).max)


@pytest.mark.parametrize("name", ["half", "bfloat16", "int8", "qsgd", "wavelet"])
def test_what_is_decoded_to_more_than_a_number_can_be_is_refused(name: str, monkeypatch):
    """All that has travelled is finite, so nobody has found anything to say against it."""
    more = {"k": 2} if name == "wavelet" else {"levels": 127} if name == "qsgd" else {}
    one = codec.CODECS[name](**more)
    monkeypatch.setitem(ALGORITHMS, name, (choco(sgd(0.5), one, 0.5), metropolis()))
    peer, _ = ready(algorithm=name)
    packed = one.encode(vector(1.0, 2.0), torch.tensor([1]))
    sent = type(packed)(*(top(field) if field.is_floating_point() else field for field in packed))
    assert all(field.isfinite().all() for field in sent)
    bad, before = Received(0, 0, 2, -math.inf, sent, 10), snapshot(peer)
    with pytest.raises(RemoteProtocolError, match="message of 0: numbers that are not finite"):
        peer.handle(bad)
    assert snapshot(peer) == before


def test_a_late_score_is_not_counted():
    """It answers an earlier question."""
    peer, _ = ready(patience=5.0, rounds=9, stop=target(2.0, "train_loss"))
    peer.handle(letter(0, 0, 0.0, 0.0, score=-9.0))  # not yet there
    effects = peer.handle(TimerFired(0))  # without node 2
    assert Stop not in map(type, effects)
    train(peer, effects)
    peer.handle(letter(2, 0, 0.0, 0.0, score=-9.0))
    effects = peer.handle(letter(0, 1, 0.0, 0.0, score=-1.0))
    assert Stop not in map(type, effects)  # node 2 has still not been heard
    train(peer, effects)
    peer.handle(letter(2, 1, 0.0, 0.0, score=-9.0))
    peer.handle(letter(2, 2, 0.0, 0.0, score=-1.0))
    effects = peer.handle(letter(0, 2, 0.0, 0.0, score=-1.0))
    assert effects[-1] == Stop("converged")


def test_who_misses_a_message_takes_it_for_a_no_and_passes_it_on():
    peer, _ = ready(patience=5.0, rounds=9, stop=target(2.0, "train_loss"), width=3)
    peer.handle(letter(0, 0, 0.0, 0.0, score=9.0))
    effects = peer.handle(TimerFired(0))  # without node 2
    for round in (1, 2):
        (said,) = (e for e in train(peer, effects) if isinstance(e, Send))
        assert said.score == -math.inf
        if round == 1:
            peer.handle(letter(2, 0, 0.0, 0.0, score=9.0))
        peer.handle(letter(2, round, 0.0, 0.0, score=9.0))
        effects = peer.handle(letter(0, round, 0.0, 0.0, score=9.0))
        assert Stop not in map(type, effects)
    for round in (3, 4, 5):  # all is heard in the next window
        (said,) = (e for e in train(peer, effects) if isinstance(e, Send))
        assert said.score == -1.0
        peer.handle(letter(2, round, 0.0, 0.0, score=9.0))
        effects = peer.handle(letter(0, round, 0.0, 0.0, score=9.0))
    assert effects[-1] == Stop("converged")


def test_the_dead_do_not_keep_the_living_from_agreeing():
    peer, _ = ready(patience=5.0, rounds=9, stop=target(2.0, "train_loss"))
    peer.handle(PeerDown(2))
    assert peer.handle(letter(0, 0, 0.0, 0.0, score=9.0))[-1] == Stop("converged")


@pytest.mark.parametrize(
    ("patience", "timer"), [(math.inf, False), (0.0, False), (2.5, True), (1e300, True)]
)
def test_a_timer_is_set_for_a_deadline_only(patience, timer):
    _, effects = ready(patience=patience)
    assert any(isinstance(effect, SetTimer) for effect in effects) is timer


def test_no_local_steps_have_no_loss_and_that_is_no_divergence():
    peer = make_peer(steps=0)
    train(peer, peer.handle(Started()), loss=math.nan)
    effects = peer.handle(letter(0, 0, 0.0, 0.0)) + peer.handle(letter(2, 0, 0.0, 0.0))
    (report,) = (effect for effect in effects if isinstance(effect, Report))
    assert math.isnan(report.loss)


def test_alone_in_the_world():
    peer = make_peer(to=(), rounds=3, x=(1.0, 2.0))
    effects = peer.handle(Started())
    for _ in range(3):
        effects = train(peer, effects)
        (sent,) = (effect for effect in effects if isinstance(effect, Send))
        assert (sent.to, sent.degree) == ((), 0)
    assert isinstance(effects[-1], Stop)
    assert peer.params.tolist() == [[1.0, 2.0]]


def test_one_way_links():
    """Node 1 hears 0 and sends to 2: it waits for the one and not for the other."""
    peer = make_peer(to=(2,), hears=(0,))
    sent, *_ = train(peer, peer.handle(Started()))
    assert sent.to == (2,)
    with pytest.raises(RemoteProtocolError):
        peer.handle(letter(2, 0, 0.0, 0.0))
    peer.handle(letter(0, 0, 0.0, 0.0, degree=1))
    assert peer.round == 1


def test_who_was_given_up_wrongly_is_not_waited_for_before_it_is_heard():
    peer, _ = ready(rounds=9)
    peer.handle(letter(0, 0, 0.0, 0.0))
    effects = peer.handle(PeerDown(2))
    peer.handle(PeerUp(2))
    sent, *_ = train(peer, effects)
    assert sent.to == (0, 2)
    peer.handle(letter(0, 1, 0.0, 0.0))
    assert peer.round == 2


def directed(hops, rounds, gone, **more):
    """A peer, 1, that has ended so many rounds, in which somebody was gone.

    Returns:
        the peer, and to whom it has spoken in each round.
    """
    peer, told = make_peer(hops=hops, rounds=99, **more), []
    peer.handle(PeerDown(gone))
    effects = peer.handle(Started())
    for round in range(rounds):
        sent, *_ = train(peer, effects)
        told.append(sent.to)
        (sender,) = peer._view.hears_from
        effects = peer.handle(letter(sender, round, 0.0, 0.0, degree=1))
    assert (peer.round, peer.phase) == (rounds, Phase.TRAINING)
    return peer, told


def test_who_is_to_hear_us_in_a_round_that_we_have_spoken_in_is_told():
    """It may not have come to that round yet, and would wait for ever."""
    peer, told = directed(hops=(1,), rounds=2, gone=2)
    assert told == [(3,), (3,)]
    assert peer.handle(PeerUp(2)) == [Skip((2,), 0), Skip((2,), 1)]
    assert peer.handle(PeerDown(9)) == []  # it has been told
    peer, told = directed(hops=(1, 2, 4), rounds=3, gone=4)
    assert told == [(2,), (3,), (6,)]
    assert peer.handle(PeerUp(4)) == [Skip((5,), 2)]
    peer, told = directed(hops=(1, 2, 4), rounds=3, gone=3)
    assert told == [(2,), (4,), (6,)]
    assert peer.handle(PeerUp(3)) == [Skip((3,), 1), Skip((5,), 2)]


def test_who_is_done_and_who_waits_for_nobody_need_not_be_told():
    peer, _ = directed(hops=(1,), rounds=2, gone=2)
    assert peer.handle(PeerDown(3, done=True)) == []
    peer = make_peer(hops=(1,), rounds=99, patience=0.0)
    peer.handle(PeerDown(2))
    train(peer, peer.handle(Started()))
    assert (peer.round, peer.phase) == (1, Phase.TRAINING)
    assert peer.handle(PeerUp(2)) == []


def test_who_has_spoken_to_others_is_not_waited_for_in_that_round():
    peer = make_peer(hops=(1,), rounds=99)
    train(peer, peer.handle(Started()))
    assert peer.awaited == [0]
    peer.handle(Skipped(0, 2))
    assert peer.awaited == [0]  # what it has said before may be on its way
    for round in (0, 1):
        train(peer, peer.handle(letter(0, round, 0.0, 0.0, degree=1)))
    assert (peer.round, peer.phase) == (3, Phase.TRAINING)


def test_those_who_are_done_keep_their_place_where_all_wait_for_each_other():
    """Each has heard of it in another round, and would forget them in another."""
    for patience, last in ((math.inf, (2,)), (5.0, (3,))):
        peer, _ = directed(hops=(1,), rounds=1, gone=9, patience=patience)
        peer.handle(PeerDown(2, done=True))
        assert peer._view_in(1).sends_to == (2,)
        assert peer._view_in(50).sends_to == last


def reunited(**more):
    """A peer in a ring of six, in the round after both its neighbours have come back."""
    peer, _ = ready(ring=tuple(range(6)), rounds=9, **more)
    for gone in (0, 2):
        effects = peer.handle(PeerDown(gone))
    for back in (0, 2):
        peer.handle(PeerUp(back))
    assert (peer.round, peer.phase) == (1, Phase.TRAINING)
    train(peer, effects)
    return peer


def test_nobody_runs_away_from_those_who_have_come_back():
    peer = reunited()
    assert (peer.round, peer.phase) == (1, Phase.WAITING)
    peer.handle(letter(0, 1, 0.0, 0.0))  # who hears one of them has somebody to keep pace with
    assert peer.round == 2
    peer = reunited(patience=5.0)
    peer.handle(TimerFired(1))
    assert peer.round == 2
    peer = reunited()
    peer.handle(letter(5, 7, 0.0, 0.0))  # others are ahead, and may wait for us
    assert peer.round == 2


def test_the_peer_does_nothing_any_more_when_it_is_done():
    peer, _ = ready(rounds=1, to=(0,))
    effects = peer.handle(letter(0, 0, 0.0, 0.0))
    assert isinstance(effects[-1], Stop)
    for event in (PeerDown(0), PeerUp(0), TimerFired(0)):
        assert peer.handle(event) == []
    assert peer.params.tolist() == [[0.0, 0.0]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_mean_weights_sum_to_one_and_are_never_negative(data):
    degree = data.draw(st.integers(0, 5))
    peer, _ = ready(me=9, to=tuple(range(degree)), patience=5.0)
    heard = data.draw(st.sets(st.integers(0, degree - 1))) if degree else set()
    if len(heard) < degree or not degree:
        events = [letter(j, 0, 0.0, 0.0, degree=data.draw(st.integers(0, 9))) for j in heard]
        if degree:
            inbox = inbox_of(peer, *events, TimerFired(0))
            assert float(inbox.weights.sum()) == pytest.approx(1.0, abs=1e-15)
            assert float(inbox.weights.min()) > 0
            assert float(inbox.weights[0, inbox.own[0]]) >= 1 / (1 + degree) - 1e-15


def test_trained_twice_is_our_own_mistake():
    peer = make_peer()
    with pytest.raises(LocalProtocolError, match="step 0 trained while idle"):
        peer.handle(Trained(0, peer.state, 1.0))
