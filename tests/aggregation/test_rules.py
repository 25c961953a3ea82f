"""Aggregation rules: what theory promises of them, by hand, and against known numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfl import aggregation as rules
from p2pfl import rng
from p2pfl.aggregation import Aggregation, Heard, b_hat, combined
from p2pfl.aggregation.distances import between, lowest
from p2pfl.algorithm import Inbox
from p2pfl.algorithms.averaging import Params

torch.set_num_threads(1)

N, F = 11, 3
LAWS = settings(max_examples=60, deadline=None)


def factor(f: int, n: int = N) -> float:
    return 1 + f / (n - 2 * f)


# Upper bounds of kappa, for N models of which F lie.
BOUNDS = {
    "median": (rules.median(), 4 * factor(F) ** 2),
    "trimmed_mean": (rules.trimmed_mean(F), 6 * F / (N - 2 * F) * factor(F)),
    "krum": (rules.krum(F), 6 * factor(F)),
    "geometric_median": (rules.geometric_median(), 4 * factor(F) ** 2),
}
BOUNDS |= {
    f"nnm {name}": (rules.nnm(F, then=rule), 8 * F / (N - F) * (kappa + 1))
    for name, (rule, kappa) in BOUNDS.items()
}
ALL: dict[str, Aggregation] = {
    **{name: rule for name, (rule, _) in BOUNDS.items()},
    "mean": rules.mean(),
    "multi_krum": rules.multi_krum(F),
    "multi_krum m": rules.multi_krum(F, m=2),
    "nna": rules.nna(F),
    "nnm mean": rules.nnm(F, then=rules.mean()),
    "centred_clipping": rules.centred_clipping(1.0, iterations=3),
    "clipped_gossip": rules.clipped_gossip(tau=1.0),
    "clipped_gossip f": rules.clipped_gossip(f=F),
    "bucketing": rules.bucketing(rules.median(), s=2),
    "bucketing nna": rules.bucketing(rules.nna(1), s=3),
}


def heard(models: Tensor, own: int = 0, weights: Tensor | None = None) -> Heard:
    """Return what one row has heard, ``[k, d]``, all alike unless there are weights."""
    k = len(models)
    line = torch.full((1, k), 1 / k, dtype=models.dtype) if weights is None else weights[None]
    everybody = torch.ones(1, k, dtype=torch.bool)
    return Heard(models[None], everybody, line, models[None, own], torch.tensor([7]))


def result(rule: Aggregation, models: Tensor, own: int = 0) -> Tensor:
    return rule.combine(heard(models, own))[0]


def normal(seed: int, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=draw)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


LIES = {
    "random": lambda good, lot: 3 * lot,
    "far": lambda good, lot: good.mean(0) + 1e4 * lot[:1],
    "a little": lambda good, lot: good.mean(0) - 1.5 * good.std(0),
    "opposite": lambda good, lot: -2 * good.mean(0),
    "copy": lambda good, lot: good[:1],
    "edge": lambda good, lot: good.max(0).values + 1e-3,
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("lie", LIES)
@LAWS
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.1, 1.0, 10.0]))
def test_rules_are_as_robust_as_is_proven(name, lie, seed, spread):
    """``|F - mean|^2 <= kappa * variance`` of the honest models (Allouah et al. 2023)."""
    rule, kappa = BOUNDS[name]
    good = normal(seed, N - F, 5) * spread + normal(seed + 1, 5)
    models = torch.cat([good, LIES[lie](good, normal(seed + 2, F, 5)).expand(F, -1)])
    models = models[torch.randperm(N, generator=torch.Generator().manual_seed(seed))]
    error = (result(rule, models) - good.mean(0)).square().sum()
    variance = (good - good.mean(0)).square().sum(1).mean()
    assert error <= kappa * variance


@pytest.mark.parametrize("b", range(6))
def test_where_rules_break(b):
    """The errors where b of 11 send 1e6: bounded exactly as long as b is withstood."""
    table = np.random.default_rng(5).normal(size=(N, 5))
    good = torch.from_numpy(table[: N - b])
    models = torch.cat([good, torch.full((b, 5), 1e6, dtype=torch.float64)])

    def error(rule: Aggregation) -> float:
        return float((result(rule, models) - good.mean(0)).norm())

    assert (error(rules.mean()) < 10) == (b == 0)
    for f in range(1, 6):
        assert (error(rules.trimmed_mean(f)) < 10) == (b <= f)
        assert (error(rules.nna(f)) < 10) == (b <= f)
        assert (error(rules.nnm(f)) < 10) == (b <= f)
    for f in range(1, 5):
        assert error(rules.krum(f)) < 10 or b > f
    assert error(rules.median()) < 10  # b < n / 2
    assert error(rules.geometric_median()) < 10


def test_more_than_half_breaks_everything():
    models = torch.cat([normal(1, 5, 5), torch.full((6, 5), 1e6, dtype=torch.float64)])
    for rule in (rules.median(), rules.geometric_median(), rules.trimmed_mean(5), rules.nnm(5)):
        assert result(rule, models).norm() > 1e5


def test_fixed_vectors():
    models = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)
    centre = models[1]
    for rule in (rules.median(), rules.trimmed_mean(1), rules.geometric_median()):
        close(result(rule, models), centre, 1e-6)
    close(result(rules.krum(1), models), models[0])  # ties go to the first
    close(result(rules.multi_krum(1), models), torch.tensor([2.5, 3.5, 4.5]).double())
    seen: list[Tensor] = []
    spy = Aggregation(lambda h: seen.append(h.models) or h.own, 1, "spy")
    result(rules.nnm(1, then=spy), models)
    expected = [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]]
    close(seen[0][0], torch.tensor(expected).double())
    close(result(rules.median(), models[:2]), torch.tensor([2.5, 3.5, 4.5]).double())


def test_krum_by_hand():
    models = normal(4, 9, 3)
    far = torch.cdist(models, models).square().numpy()
    scores = [np.sort(np.delete(far[i], i))[: 9 - 2 - 2].sum() for i in range(9)]
    close(result(rules.krum(2), models), models[int(np.argmin(scores))])
    best = np.argsort(scores)[:4].copy()
    close(result(rules.multi_krum(2, m=4), models), models[best].mean(0))


def test_the_geometric_median_leaves_a_model_that_is_not_it():
    """The median of each parameter is the first one, against which the others pull hard."""
    models = torch.tensor([[0, 0], [10, -0.1], [-0.1, 10], [1, 1], [-1, -1]], dtype=torch.float64)
    close(result(rules.geometric_median(), models), torch.ones(2).double(), 1e-5)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_no_model_has_a_lesser_sum_of_distances_than_the_geometric_median(seed):
    models = (normal(seed, 5, 2) * 2).round()  # some are the same, or in line
    point = result(rules.geometric_median(tolerance=1e-9, iterations=2000), models)
    sums = (models[:, None] - torch.cat([models, point[None]])).norm(dim=2).sum(0)
    assert sums[-1] <= sums[:-1].min() * (1 + 1e-4)


def test_nested_buckets_are_not_those_of_the_round_before():
    """What the inner rule draws from must not be what the outer one draws from a round later."""
    seen: list[int] = []
    spy = Aggregation(lambda heard: (seen.append(int(heard.keys[0])), heard.own)[1], 1, "a spy")
    rule = rules.bucketing(spy, s=2)
    models = normal(0, 4, 3)
    one = heard(models)
    rule.combine(one)
    assert seen[0] not in (int(one.keys[0]), int(rng.fold(one.keys, 1)[0]))


def test_the_geometric_median_has_the_least_sum_of_distances():
    models = normal(8, 9, 4)
    point = result(rules.geometric_median(tolerance=1e-12, iterations=1000), models)
    pull = (models - point) / (models - point).norm(dim=1, keepdim=True)
    assert pull.sum(0).norm() < 1e-4


def test_clipped_models_move_a_row_by_tau_times_their_weights_and_no_further():
    weights = torch.tensor([0.5, 0.3, 1 / 6, 1 / 30], dtype=torch.float64)
    models = torch.zeros(4, 3, dtype=torch.float64)
    models[2] = torch.tensor([0.0, 1e9, 0.0])
    moved = rules.clipped_gossip(tau=1.0).combine(heard(models, 0, weights))[0]
    assert moved.norm() == pytest.approx(1 / 6, rel=1e-12)  # equality is reached
    moved = rules.centred_clipping(tau=1.0).combine(heard(models, 0, weights))[0]
    assert moved.norm() == pytest.approx(1 / 4, rel=1e-12)


@LAWS
@given(seed=st.integers(0, 2**32), f=st.integers(0, 3), size=st.sampled_from([1.0, 1e3, 1e9]))
def test_the_influence_of_clipped_attackers_is_bounded(seed, f, size):
    good, bad = normal(seed, 6, 4), normal(seed + 1, f, 4) * size
    weights = torch.rand(6 + f, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = weights / weights.sum()
    rule = rules.clipped_gossip(f=f)
    with_bad = rule.combine(heard(torch.cat([good, bad]), 0, weights))[0]
    longest = (good - good[0]).norm(dim=1).max()
    assert (with_bad - good[0]).norm() <= longest * weights[1:].sum() + 1e-12


@pytest.mark.parametrize("name", ALL)
def test_agreed_models_stay(name):
    same = normal(3, 1, 6).expand(N, -1)
    close(result(ALL[name], same), same[0])


@pytest.mark.parametrize("name", [n for n in ALL if "bucketing" not in n])
@given(seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_senders_does_not_matter(name, seed, data):
    models, order = normal(seed, N, 4), torch.tensor(data.draw(st.permutations(range(N))))
    own = int((order == 0).nonzero())
    close(result(ALL[name], models[order], own), result(ALL[name], models), 1e-9)


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 2**32), gaps=st.lists(st.booleans(), min_size=3, max_size=18))
@settings(max_examples=10, deadline=None)
def test_padding_does_not_matter(name, seed, gaps):
    """Whatever it holds, and wherever it stands."""
    plain = heard(normal(seed, N, 4))
    places = [i for i, gap in enumerate([*gaps, *[False] * N]) if not gap][:N]
    k = places[-1] + 1 + len(gaps) % 2

    def spread(part: Tensor, fill: float) -> Tensor:
        wide = part.new_full((1, k, *part.shape[2:]), fill)
        wide[:, places] = part
        return wide

    models, mask = spread(plain.models, math.nan), spread(plain.mask, False)
    padded = Heard(models, mask, spread(plain.weights, 0.0), plain.own, plain.keys)
    close(ALL[name].combine(padded), ALL[name].combine(plain), 1e-9)


def test_ties_go_to_the_first():
    zeros, everybody = torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool)
    assert lowest(zeros, everybody, torch.tensor([2])).tolist() == [[0.5, 0.5, 0, 0, 0]]
    hidden = torch.tensor([[False, True, True, False, True]])
    infinite = torch.full((1, 5), torch.inf)
    assert lowest(infinite, hidden, torch.tensor([2])).tolist() == [[0, 0.5, 0.5, 0, 0]]
    apart = between(heard(torch.tensor([[0.0], [3.0]])))[0]
    assert apart.tolist() == [[0, 3], [3, 0]]


@pytest.mark.parametrize("name", ALL)
def test_who_hears_too_few_keeps_its_own(name):
    rule = ALL[name]
    for k in range(1, N + 1):
        models = torch.cat([normal(k, 1, 3), torch.full((k - 1, 3), 1e6, dtype=torch.float64)])
        weights = torch.full((1, k), 1 / k, dtype=torch.float64)
        inbox = Inbox(weights, Params(models), torch.tensor([0]))
        after = combined(rule, inbox, models, torch.tensor([1]))
        assert torch.equal(after, models[:1]) == (k < rule.needs or k == 1), k


def test_no_number_is_too_large():
    """The largest that single precision holds, of as many as are withstood."""
    top = torch.finfo(torch.float32).max
    lies = torch.tensor([[top], [-top], [top]]).expand(F, 4)
    models = torch.cat([normal(2, N - F, 4).float(), lies])
    for name in ALL.keys() - {"mean", "bucketing nna", "nnm mean"}:
        assert result(ALL[name], models).isfinite().all(), name


def test_buckets_are_drawn_anew_for_every_key():
    seen = []
    spy = Aggregation(lambda h: seen.append(h.models[0].flatten().tolist()) or h.own, 1, "spy")
    rule, models = rules.bucketing(spy, s=3), torch.arange(7.0, dtype=torch.float64).unsqueeze(1)
    for key in (1, 1, 2):
        rule.combine(heard(models)._replace(keys=torch.tensor([key])))
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) == 3
    sizes = [3, 3, 1]
    assert sum(s * m for s, m in zip(sizes, seen[0], strict=True)) == pytest.approx(21)


@pytest.mark.parametrize(
    ("nodes", "attackers", "s", "met"),
    [(100, 10, 15, 8), (100, 10, 20, 9), (100, 20, 30, 15), (30, 6, 15, 6), (16, 2, 8, 2)],
)
def test_how_many_attackers_are_met(nodes, attackers, s, met):
    assert b_hat(nodes, attackers, s, rounds=200) == met


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: rules.trimmed_mean(-1), "f = -1"),
        (lambda: rules.multi_krum(1, m=0), "m = 0"),
        (lambda: rules.centred_clipping(0.0), "tau = 0.0"),
        (lambda: rules.centred_clipping(math.inf), "tau = inf"),
        (lambda: rules.clipped_gossip(), "either tau"),
        (lambda: rules.clipped_gossip(1.0, 1), "either tau"),
        (lambda: rules.geometric_median(tolerance=0), "tolerance = 0"),
        (lambda: rules.bucketing(rules.median(), s=0), "s = 0"),
        (lambda: b_hat(4, 4, 2, 10), "attackers = 4"),
        (lambda: b_hat(4, 1, 4, 10), "s = 4"),
    ],
)
def test_wrong_settings_are_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()
