"""How many messages a connection may send."""

from types import SimpleNamespace

import pytest

from p2pfl.runtime import quota
from p2pfl.runtime.quota import BURST, MOST, RATE, Quota


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(quota, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def spent(one: Quota, connection: bytes, count: int) -> int:
    """Return how many of so many messages are let through."""
    return sum(one.spend(connection) for _ in range(count))


def test_a_burst_is_let_through_and_then_so_many_a_second(clock: SimpleNamespace):
    one = Quota()
    assert spent(one, b"a", int(BURST) + 100) == BURST
    clock.now += 0.5
    assert spent(one, b"a", int(BURST)) == RATE / 2
    clock.now += 3600.0  # none are saved up beyond a burst
    assert spent(one, b"a", 2 * int(BURST)) == BURST


def test_who_keeps_below_the_rate_is_never_cut(clock: SimpleNamespace):
    one = Quota()
    for _ in range(3 * int(BURST)):
        clock.now += 1.001 / RATE
        assert one.spend(b"a")


def test_connections_do_not_share(clock: SimpleNamespace):
    one = Quota()
    assert spent(one, b"a", 2 * int(BURST)) == BURST
    assert spent(one, b"b", int(BURST)) == BURST
    assert not one.spend(b"a")


def test_any_number_of_connections_takes_no_more_memory(clock: SimpleNamespace):
    one = Quota()
    assert spent(one, b"flood", int(BURST)) == BURST
    for number in range(3 * MOST):
        one.spend(number.to_bytes(4, "big"))
        assert not one.spend(b"flood")  # who goes on is not forgotten
    assert len(one._buckets) == MOST
