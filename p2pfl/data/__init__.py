"""What is learned from: data sets, who holds which part, and batches of it.

Data stay as they were measured (NaN = missing). This package computes statistics but
standardises nothing; the learning task applies an affine map on the fly.
"""

from __future__ import annotations

from p2pfl.data.batches import EpochOrders, batch_indices, batch_sizes
from p2pfl.data.dataset import Dataset, Source
from p2pfl.data.datasets import DATASETS
from p2pfl.data.encoder import Column, Encoder
from p2pfl.data.holdout import HOLDOUTS, Holdout
from p2pfl.data.labels import Labels, Partitioner
from p2pfl.data.partition import PARTITIONERS
from p2pfl.data.shards import Counts, Examples, Federation, Shards, counts_by_label, federate
from p2pfl.data.statistics import Affine, in_two_passes, moments, moments_by_node, standardise

__all__ = [
    "DATASETS",
    "HOLDOUTS",
    "PARTITIONERS",
    "Affine",
    "Column",
    "Counts",
    "Dataset",
    "Encoder",
    "EpochOrders",
    "Examples",
    "Federation",
    "Holdout",
    "Labels",
    "Partitioner",
    "Shards",
    "Source",
    "batch_indices",
    "batch_sizes",
    "counts_by_label",
    "federate",
    "in_two_passes",
    "moments",
    "moments_by_node",
    "standardise",
]
