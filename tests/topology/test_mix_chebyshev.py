"""Chebyshev's polynomials: measured errors, the bound, and exact ends of other polynomials."""

from __future__ import annotations

from itertools import islice

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.topology import (
    GRAPHS,
    accelerated,
    analyse,
    max_degree,
    metropolis,
    ring_graph,
    static,
    weights,
)
from p2pfl.topology.chebyshev import bound, coefficients

from .strategies import connected_graphs


def ring(n):
    topology = static(ring_graph(n))
    x = torch.arange(n, dtype=torch.float64)[:, None]
    return weights(topology.links(0), metropolis()), analyse(topology, metropolis()).rho, x


def left(y, x):
    return float((y - x.mean(0)).norm() / (x - x.mean(0)).norm())


@pytest.mark.parametrize(
    ("n", "rounds", "plain", "fast", "most"),
    [
        (16, 20, 0.2775, 2.546e-3, 2.974e-3),
        (16, 60, 0.03455, 5.83e-9, 6.577e-9),
        (64, 60, 0.6696, 0.01406, 0.016228),
    ],
)
def test_errors_on_rings(n, rounds, plain, fast, most):
    matrix, rho, x = ring(n)
    *_, last = accelerated(matrix, x, rho, rounds)
    assert left(torch.linalg.matrix_power(matrix, rounds) @ x, x) == pytest.approx(plain, rel=5e-4)
    assert left(last, x) == pytest.approx(fast, rel=5e-4)
    assert bound(rho, rounds) == pytest.approx(most, rel=5e-4)


@given(st.floats(1e-3, 1 - 1e-9))
def test_coefficients_sum_to_one_and_tend_to_the_constant_ones(rho):
    found = list(islice(coefficients(rho), 5000))
    assert found[0] == (1, 0)
    for a, b in found:
        assert a - b == pytest.approx(1, abs=1e-9)
    if rho < 0.999:
        assert found[-1][0] == pytest.approx(2 / (1 + (1 - rho**2) ** 0.5), rel=1e-6)


@given(connected_graphs(largest=24), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_the_mean_is_kept_and_the_bound_holds(graph, rounds):
    topology = static(graph)
    matrix = weights(topology.links(0), metropolis()).to_dense()
    rho = analyse(topology, metropolis()).rho
    x = torch.from_numpy(np.random.default_rng(len(graph)).standard_normal((len(graph), 3)))
    for over in (rho, (1 + rho) / 2) if rho > 1e-6 else (0.5,):  # to overestimate is safe
        for t, y in enumerate(accelerated(matrix, x, over, rounds), 1):
            torch.testing.assert_close(y.mean(0), x.mean(0), rtol=0, atol=1e-9)
            assert left(y, x) <= bound(over, t) * (1 + 1e-6) + 1e-9


def test_it_is_the_chebyshev_polynomial_of_the_matrix():
    matrix, rho, x = ring(9)
    values, vectors = np.linalg.eigh(matrix.numpy())
    for t, y in enumerate(accelerated(matrix, x, rho, 12), 1):
        of = np.polynomial.Chebyshev.basis(t)
        made = vectors @ np.diag(of(values / rho) / of(1 / rho)) @ vectors.T
        np.testing.assert_allclose(y.numpy(), made @ x.numpy(), rtol=0, atol=1e-9)


def test_a_rate_that_is_none_is_refused():
    for rho in (0.0, 1.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            next(coefficients(rho))


@pytest.mark.parametrize(
    ("graph", "rounds"),
    [
        (GRAPHS["hypercube"](16), 4),
        (GRAPHS["torus"](16), 4),
        (GRAPHS["star"](16), 2),
        (nx.petersen_graph(), 2),
        (GRAPHS["ring"](8), 4),
        (GRAPHS["chain"](8), 7),
    ],
)
def test_as_many_rounds_as_the_laplacian_has_eigenvalues_are_exact(graph, rounds):
    """``x <- (I - L / mu) x`` for each of them in turn (Kibangou 2014), with constant weights."""
    plain = weights(static(graph).links(0), max_degree()).to_dense()
    largest = max(degree for _, degree in graph.degree)
    laplacian = (1 + largest) * (torch.eye(len(graph)) - plain)  # W = I - L / (1 + largest)
    found = torch.linalg.eigvalsh(laplacian)
    each = [float(v) for k, v in enumerate(found) if v > 1e-9 and v - found[k - 1] > 1e-9]
    assert len(each) == rounds
    n, product = len(graph), torch.eye(len(graph), dtype=torch.float64)
    for round, value in enumerate(each, 1):
        product = (torch.eye(n) - laplacian / value) @ product
        assert bool((product - 1 / n).abs().max() < 1e-10) == (round == rounds)
