"""States become named tensors and plain values, and the same states again, to the bit."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from examples import example

from p2pfl import rng
from p2pfl.algorithm import Inbox, Rows
from p2pfl.algorithms import ALGORITHMS, average, dpsgd, proximal
from p2pfl.learning.optim import OPTIMISERS, adam, adamw, chain, clip_norm, sgd
from p2pfl.learning.packing import pack, unpack
from p2pfl.learning.schedules import exponential
from p2pfl.learning.tree import leaves, tree_map
from p2pfl.peer.addressed import side_by_side, spread
from p2pfl.peer.stopping import plateau
from p2pfl.topology import complete_graph, static

BUILD = {
    **{name: partial(example, name) for name in ALGORITHMS},
    "combine_then_adapt": lambda opt: dpsgd(opt, order="combine_then_adapt"),
    "proximal": lambda opt: proximal(dpsgd(opt), 0.1),
    "average": lambda opt: average(),
}
OPTS = {
    "sgd": sgd(0.1),
    "momentum": sgd(exponential(0.1, 0.9), momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": adam(),
    "adamw": adamw(exponential(0.1, 0.9)),
    "chain": chain([clip_norm(1.0), adam(), OPTIMISERS["scale"](0.5)]),
}


def after_some_rounds(algorithm, dtype, rounds):
    nodes, d = torch.arange(3), 6
    x = rng.normal(rng.keys(1, nodes), d).to(dtype)
    others = torch.tensor([[1, 2], [0, 2], [0, 1]])
    state = algorithm.init(x, Rows(nodes, torch.tensor([4, 5, 6]), others))
    weights, heard, variants = torch.full((3, 3), 1 / 3), None, 1
    for k in range(rounds):
        state = algorithm.step(state, rng.normal(rng.keys(k, nodes), d).to(dtype))
        message = algorithm.send(state)
        if algorithm.needs.addressed:
            variants, message = message[0].shape[1], side_by_side(message)
        heard = algorithm.absorb(heard, message, d)
        links = static(complete_graph(3)).links(0)
        known = spread(weights, links, variants) if algorithm.needs.addressed else weights
        state = algorithm.receive(state, Inbox(known, heard, nodes * variants))
    return state, heard


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    else:
        assert one == other or (one != one and other != other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimiser", OPTS)
@pytest.mark.parametrize("name", BUILD)
def test_states_of_all_algorithms_and_optimisers_come_back(name, optimiser, dtype):
    algorithm = BUILD[name](OPTS[optimiser])
    held = after_some_rounds(algorithm, dtype, 3)
    tensors, plain = pack(held)
    assert len(tensors) == len(list(leaves(held)))
    like = tree_map(lambda leaf: leaf.to("meta"), after_some_rounds(algorithm, dtype, 1))
    same(unpack(tensors, json.loads(json.dumps(plain)), like), held)


class Mixed(NamedTuple):
    numbers: Any
    nothing: None
    tensor: torch.Tensor


def test_plain_leaves_come_back_through_strict_json():
    numbers = (3, -0.0, 1e-300, 0.1 + 0.2, math.inf, -math.inf, math.nan, True, "text", 2**62)
    state = (Mixed(numbers, None, torch.tensor(1)), plateau().start(2), ())
    like = (Mixed(tuple(type(n)() for n in numbers), None, torch.tensor(0)), plateau().start(2), ())
    tensors, plain = pack(state)
    back = unpack(tensors, json.loads(json.dumps(plain, allow_nan=False)), like)
    same(back, state)
    assert math.copysign(1, back[0].numbers[1]) == -1


def test_tensors_are_handed_on_and_not_copied():
    state = (torch.zeros(3),)
    tensors, plain = pack(state)
    assert tensors["0"] is state[0]
    assert unpack(tensors, plain, state)[0] is state[0]


@pytest.mark.parametrize(
    ("state", "like", "place"),
    [
        ((torch.zeros(3),), (torch.zeros(4),), "0 is float32 .3., not float32 .4."),
        ((torch.zeros(3),), (torch.zeros(3, dtype=torch.float64),), "0 is float32"),
        ((1, 2), (1,), "1 is only"),
        ((1,), (1, torch.zeros(1)), "1 is only"),
        ((1, (2, 3)), (1, (2, 3.0)), "1.1 = 3"),
        ((1,), (True,), "0 = 1"),
        ((None,), (torch.zeros(1),), "0 is not a tensor"),
        ((torch.zeros(1),), (None,), "0 = "),
        (("inf",), (1,), "0 = 'inf'"),
    ],
)
def test_a_state_of_another_outline_is_refused_by_place(state, like, place):
    with pytest.raises(ValueError, match=place):
        unpack(*pack(state), like)


def test_what_cannot_be_packed_is_named():
    with pytest.raises(TypeError, match=r"1\.0 of a state is a list"):
        pack((1, ([],)))
