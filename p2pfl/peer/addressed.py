"""Messages that differ from neighbour to neighbour, where an algorithm asks for them.

Such a message has variants, fields ``[rows, K, ...]``. Of those a row sends to in a round, in
ascending order of their ids, the t-th is given variant ``t % K``. Its own is variant 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfl.algorithm import M
from p2pfl.learning.tree import tree_map
from p2pfl.topology.mixing import csr
from p2pfl.topology.schedule import Links, out_degrees


def variant(message: M, place: int) -> M:
    """Return what is said to the receiver at some place, ``[rows, K, ...] -> [rows, ...]``."""
    return tree_map(lambda field: field[:, place % field.shape[1]], message)


def side_by_side(message: M) -> M:
    """Return the variants as senders of their own, ``[rows, K, ...] -> [rows * K, ...]``."""
    return tree_map(lambda field: field.flatten(0, 1), message)


def spread(weights: Tensor, links: Links, variants: int) -> Tensor:
    """Return the weights of senders each of whose variants is a sender, ``[n, n * K]``, CSR.

    Args:
        weights: of the senders, ``[n, n]``, dense or CSR.
        links: of the round.
        variants: how many a message has.
    """
    n, nodes = links.n, torch.arange(links.n)
    rows, senders = torch.cat([links.receivers, nodes]), torch.cat([links.senders, nodes])
    places = torch.cat([_places(links) % variants, torch.zeros_like(nodes)])
    order = torch.argsort(rows * n + senders)  # in which a sparse matrix has them already
    rows, columns = rows[order], (senders * variants + places)[order]
    if weights.layout is torch.sparse_csr:
        values = weights.values()
    else:
        values = weights[rows.to(weights.device), senders[order].to(weights.device)]
    device = weights.device
    return csr(rows.to(device), columns.to(device), values, (n, n * variants))


def _places(links: Links) -> Tensor:
    """Return for every link which of its sender's receivers it leads to, from 0, ``[links]``."""
    by_sender = torch.sort(links.senders, stable=True).indices  # and so by receiver
    first = out_degrees(links).cumsum(0) - out_degrees(links)
    places = torch.empty_like(links.senders)
    places[by_sender] = torch.arange(len(by_sender)) - first[links.senders[by_sender]]
    return places
