"""Small clusters: what happens is told line by line, how much is said, and who is wrongly dead."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest

from p2pfl.membership.cluster import Cluster, Network
from p2pfl.membership.members import BOOT, Status
from p2pfl.membership.timers import Timers

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))


def perform(text):
    """Carry out the lines that begin with "at", and return them with what peers then noted."""
    heading, steps = text.splitlines()[0], [x for x in text.splitlines() if x.startswith("at ")]
    n = int(heading.split()[1])
    cluster, done = Cluster(Timers(), seed=1), [heading]
    cluster.boot_all(n)
    noted = 0
    for step in [*steps, "at inf end"]:
        _, time, verb, *rest = shlex.split(step)
        if time == "inf":
            break
        cluster.run(float(time))
        done += lines(cluster.log[noted:])
        noted = len(cluster.log)
        done.append(step)
        act(cluster, n, verb, rest)
    return "\n".join(done) + "\n"


def act(cluster, n, verb, rest):
    match verb, [int(word) if word.isdigit() else float(word) for word in rest]:
        case "crash", [peer]:
            cluster.crash(peer)
        case "freeze", [peer, seconds]:
            cluster.freeze(peer, seconds)
        case "leave", [peer]:
            cluster.leave(peer)
        case "restart", [peer]:
            cluster.boot(peer, contacts=[k for k in range(n) if k != peer][:3])
        case "split", side:
            other = [k for k in range(n) if k not in side]
            links = [(a, b) for a in side for b in other]
            cluster.blocked = frozenset(links + [(b, a) for a, b in links])
        case "heal", []:
            cluster.blocked = frozenset()
        case "look", []:
            pass
        case _:
            raise ValueError(verb)


def lines(log):
    for time, observer, change in log:
        boot, number = change.incarnation >> BOOT, change.incarnation % (1 << BOOT)
        life = f"life {boot}, {number}" if boot else "not heard of"
        yield f"  {time:7.3f} {observer}: {change.peer} {change.status.name} ({life})"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_scenario(path, request):
    text = path.read_text(encoding="utf-8")
    done = perform(text)
    if request.config.getoption("--rewrite-membership", default=False):
        path.write_text(done, encoding="utf-8")
    else:
        assert done.splitlines() == text.splitlines()


def test_there_are_scenarios():
    assert len(GOLDEN) >= 5
    assert all(len(path.read_text().splitlines()) > 5 for path in GOLDEN)


@pytest.mark.parametrize(
    ("n", "seconds"),
    [(4, 60), (16, 40), (64, 10), pytest.param(200, 10, marks=pytest.mark.slow)],
)
def test_few_messages_while_nothing_happens(n, seconds):
    cluster = Cluster(Timers(), seed=n)
    cluster.boot_all(n)
    cluster.run(20)
    before = sum(swim.statistics.messages for swim in cluster.swims().values())
    cluster.run(20 + seconds)
    sent = sum(swim.statistics.messages for swim in cluster.swims().values()) - before
    assert 3 <= sent / n / seconds <= 5
    assert all(swim.live == tuple(range(n)) for swim in cluster.swims().values())
    assert not any(entry.change.status is not Status.ALIVE for entry in cluster.log)


def test_who_leaves_is_known_to_have_left_within_two_seconds_and_never_suspected():
    for seed in range(5):
        cluster = Cluster(Timers(), seed)
        cluster.boot_all(32)
        cluster.run(10)
        cluster.leave(seed)
        cluster.at(10.1, lambda cluster=cluster, seed=seed: cluster.crash(seed))
        cluster.run(12)
        others = [swim for k, swim in cluster.swims().items() if k != seed]
        assert all(swim.members[seed].status is Status.LEFT for swim in others)
        assert not any(entry.change.status is Status.SUSPECT for entry in cluster.log)


def test_who_comes_back_is_known_to_all_within_two_seconds():
    cluster = Cluster(Timers(), seed=1)
    cluster.boot_all(32)
    cluster.run(10)
    cluster.crash(3)
    cluster.run(10.5)
    cluster.boot(3, contacts=[0])
    cluster.run(12.5)
    for swim in cluster.swims().values():
        assert swim.members[3].incarnation >> BOOT == 2
        assert swim.live == tuple(range(32))


def test_a_crash_is_known_to_all_in_time():
    for seed in range(5):
        cluster = Cluster(Timers(), seed)
        cluster.boot_all(16)
        cluster.run(10)
        cluster.crash(seed)
        cluster.run(20)
        assert all(seed not in swim.live for swim in cluster.swims().values())


@pytest.mark.slow
def test_short_freezes_kill_nobody():
    """Every peer freezes for 1 to 3 s once a minute, for 36 peer-hours."""
    n, seconds, deaths = 32, 4050, set()
    rng, cluster = random.Random(5), Cluster(Timers(), 5, Network())
    cluster.boot_all(n)
    for peer in range(n):
        time = rng.expovariate(1 / 60)
        while time < seconds:
            frozen = rng.uniform(1, 3)
            cluster.at(time, lambda peer=peer, frozen=frozen: cluster.freeze(peer, frozen))
            time += frozen + rng.expovariate(1 / 60)
    cluster.run(seconds)
    changes = [entry.change for entry in cluster.log]
    deaths = {(x.peer, x.incarnation) for x in changes if x.status is Status.DEAD}
    assert sum(swim.statistics.stalls for swim in cluster.swims().values()) > 1000
    assert len(deaths) <= 0.1 * n * seconds / 3600
