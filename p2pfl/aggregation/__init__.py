"""Aggregation rules: what a row makes of the models it has heard, some of which may lie."""

from __future__ import annotations

from collections.abc import Callable

from p2pfl.aggregation.before import bucketing, nnm
from p2pfl.aggregation.clipping import centred_clipping, clipped_gossip
from p2pfl.aggregation.columns import mean, median, trimmed_mean
from p2pfl.aggregation.distances import geometric_median, krum, multi_krum, nna
from p2pfl.aggregation.epidemic import b_hat
from p2pfl.aggregation.rule import Aggregation, Heard, combined

AGGREGATIONS: dict[str, Callable[..., Aggregation]] = {
    "bucketing": bucketing,
    "centred_clipping": centred_clipping,
    "clipped_gossip": clipped_gossip,
    "geometric_median": geometric_median,
    "krum": krum,
    "mean": mean,
    "median": median,
    "multi_krum": multi_krum,
    "nna": nna,
    "nnm": nnm,
    "trimmed_mean": trimmed_mean,
}

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "Heard",
    "b_hat",
    "bucketing",
    "centred_clipping",
    "clipped_gossip",
    "combined",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "multi_krum",
    "nna",
    "nnm",
    "trimmed_mean",
]
