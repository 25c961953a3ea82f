"""What is done to models before a rule sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.aggregation.columns import trimmed_mean, without_padding
from p2pfl.aggregation.distances import between, lowest
from p2pfl.aggregation.rule import Aggregation, Heard
from p2pfl.learning.checks import at_least

_THEN = 1 << 20  # tells the lots of the rule that follows from those of the next rounds


def nnm(f: int, then: Aggregation | None = None) -> Aggregation:
    """Replace every model by the mean of the ``n - f`` nearest to it (Allouah et al. 2023).

    Nearest-neighbour mixing: what makes other rules hold where data are unlike, with
    ``kappa = 8 f / (n - f) (kappa_then + 1)``.

    Args:
        f: how many attackers it withstands, among more than 2 f models.
        then: the rule that follows, by default ``trimmed_mean`` with the same f.
    """
    at_least("f", f, 0)
    rule = trimmed_mean(f) if then is None else then

    def combine(heard: Heard) -> Tensor:
        k = heard.mask.shape[1]
        count = (heard.senders - f).unsqueeze(1).expand(-1, k)
        near = lowest(between(heard), heard.mask.unsqueeze(1).expand(-1, k, -1), count)
        return rule.combine(heard._replace(models=near @ without_padding(heard)))

    needs = max(2 * f + 1, rule.needs)
    return Aggregation(combine, needs, f"nnm with f = {f}, {rule.title}", draws=rule.draws)


def bucketing(then: Aggregation, s: int = 2) -> Aggregation:
    """Average models in buckets of s, drawn anew in every round (Karimireddy et al. 2022).

    An attacker spoils one bucket, and there are s times fewer buckets than models: the f of the
    rule stays what it was, and asks for more of them.

    Args:
        then: the rule that is given the means of the buckets.
        s: models in a bucket; the last one may have fewer.
    """
    at_least("s", s, 1)

    def combine(heard: Heard) -> Tensor:
        k = heard.mask.shape[1]
        # A lot for each model heard, whatever stands between them.
        lots = rng.uniform(heard.keys, k).gather(1, (heard.mask.cumsum(1) - 1).clamp(min=0))
        order = lots.masked_fill(~heard.mask, 2.0).argsort(dim=1, stable=True)
        bucket = order.argsort(dim=1) // s
        numbers = torch.arange(-(-k // s), device=order.device)
        within = (bucket.unsqueeze(1) == numbers[:, None]) & heard.mask.unsqueeze(1)
        size = within.sum(2)
        shares = within.to(heard.models.dtype) / size.clamp(min=1).unsqueeze(2)
        full = size > 0
        even = full.to(heard.weights.dtype) / full.sum(1, keepdim=True)
        means = shares @ without_padding(heard)
        keys = rng.fold(heard.keys, _THEN)
        return then.combine(Heard(means, full, even, heard.own, keys))

    needs = s * (then.needs - 1) + 1
    title = f"bucketing with s = {s}, {then.title}"
    return Aggregation(combine, needs, title, columnwise=then.columnwise, draws=True)
