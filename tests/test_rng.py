from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pfl import rng

INT64 = st.integers(-(2**63), 2**63 - 1)


def splitmix64(state: int, count: int) -> list[int]:
    """The reference generator, in Python's unbounded integers."""
    mask, made = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        made.append(z ^ (z >> 31))
    return made


@given(INT64)
def test_uniform_is_splitmix64(key):
    expected = [(z >> 11) * 2.0**-53 for z in splitmix64(key % 2**64, 5)]
    assert rng.uniform(torch.tensor(key), 5).tolist() == expected


@given(INT64)
def test_signs_are_the_bits_of_splitmix64(key):
    bits = [z >> k & 1 for z in splitmix64(key % 2**64, 3) for k in range(64)]
    expected = torch.tensor([2 * bit - 1 for bit in bits], dtype=torch.int8)
    for width in (0, 1, 64, 130, 192):
        assert torch.equal(rng.signs(torch.tensor([key]), width)[0], expected[:width])


def test_splitmix64_known_values():
    # The first outputs from the seed 1234567, as published with the reference code.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9), INT64, INT64)
def test_rows_do_not_depend_on_their_block(nodes, seed, step):
    block = rng.fold(rng.keys(seed, torch.tensor(nodes)), step)
    for i, node in enumerate(nodes):
        alone = rng.fold(rng.keys(seed, torch.tensor([node])), step)
        assert torch.equal(alone, block[i : i + 1])
        assert torch.equal(rng.normal(alone, 3)[0], rng.normal(block, 3)[i])


@given(INT64, INT64)
def test_folding_an_integer_is_folding_a_tensor(key, data):
    key = torch.tensor([key])
    assert torch.equal(rng.fold(key, data), rng.fold(key, torch.tensor([data])))


def test_width_only_adds_numbers():
    key = rng.keys(3, torch.arange(4))
    assert torch.equal(rng.uniform(key, 9)[:, :4], rng.uniform(key, 4))
    assert rng.uniform(key, 0).shape == (4, 0)


def test_keys_differ():
    key = rng.keys(0, torch.arange(1000))
    below = torch.stack([rng.fold(key, step) for step in range(20)])
    assert below.unique().numel() == 20_000


def test_folding_is_not_symmetric():
    key = rng.keys(0, torch.arange(5))
    assert (rng.fold(rng.fold(key, 1), 2) != rng.fold(rng.fold(key, 2), 1)).all()


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_vmap_draws_the_same(draw):
    key = rng.keys(5, torch.arange(6))
    stacked = torch.func.vmap(lambda one, step: draw(rng.fold(rng.fold(one, 4), step), 7))
    steps = torch.arange(6)
    assert torch.equal(stacked(key, steps), draw(rng.fold(rng.fold(key, 4), steps), 7))


def test_moments():
    key = rng.keys(11, torch.arange(100))
    flat, bell = rng.uniform(key, 1000), rng.normal(key, 1000)
    # 10^5 numbers: five standard errors.
    assert flat.min() >= 0
    assert flat.max() < 1
    assert abs(flat.mean() - 0.5) < 5 * 0.2887 / 10**2.5
    assert abs(bell.mean()) < 5 / 10**2.5
    assert abs(bell.var() - 1) < 5 * 2**0.5 / 10**2.5
    assert abs(bell.pow(4).mean() - 3) < 5 * 96**0.5 / 10**2.5


def test_neighbouring_rows_are_uncorrelated():
    bell = rng.normal(rng.keys(0, torch.arange(30)), 2000)
    off = torch.corrcoef(bell) - torch.eye(30, dtype=torch.float64)
    assert off.abs().max() < 5 / 2000**0.5
