"""No device is named but the tensors' own: tensors of another device find any slip.

Those of the device "meta" have no numbers, and refuse to meet any of another device.
"""

from __future__ import annotations

import pytest
import torch
from examples import example
from learning_cases import MODELS, build

from p2pfl import rng
from p2pfl.algorithm import Inbox, Rows
from p2pfl.algorithms import ALGORITHMS
from p2pfl.codec import identity, random_k, top_k
from p2pfl.learning import Quadratics, backends, losses, optim, schedules
from p2pfl.learning.modules import pure
from p2pfl.peer.addressed import side_by_side
from p2pfl.runtime.memory import needed
from p2pfl.runtime.setup import Setup
from p2pfl.topology import complete_graph, static

OPTIMISERS = {
    "sgd": optim.sgd(0.1),
    "falling": optim.sgd(schedules.cosine(0.1, 10, warmup=2), momentum=0.9),
    "adam": optim.chain([optim.clip_norm(1.0), optim.adamw(1e-3)]),
}


def test_a_slip_is_found():
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device="meta") + torch.zeros(3)


@pytest.mark.parametrize("kind", [backends.Stacked, backends.Vmapped])
@pytest.mark.parametrize("name", ["mlp", "linear", "cnn"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_gradients(kind, name, loss):
    outputs = 3 if loss == "cross_entropy" else 1
    shape, factory = MODELS[name]
    made = pure(factory(shape, outputs).to("meta"))
    params = torch.zeros(5, made.spec.size, device="meta")
    x = torch.zeros(5, 4, *shape, device="meta")
    y = torch.zeros(5, 4, dtype=torch.int64, device="meta")
    keys = rng.fold(rng.keys(3, torch.arange(5, device="meta")), 1)
    backend = kind(made, losses.LOSSES[loss](), None)
    found, grads = backend(params, x, y, keys)
    assert (found.device.type, grads.device.type) == ("meta", "meta")
    backend.descend(params, [(x, y, keys)], torch.zeros(1, 5, 1, device="meta"))


# They look at the numbers of what they have heard, of which there are none.
LOOK = ("balance", "fedasync", "gossip", "jwins", "moniqua", "rpel", "ubar")
LOOK += ("divshare", "powergossip", "relay")


@pytest.mark.parametrize("opt", OPTIMISERS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name, opt):
    algorithm = example(name, OPTIMISERS[opt], identity())
    x = torch.zeros(4, 6, device="meta")
    nodes = torch.arange(4, device="meta")
    state = algorithm.init(x, Rows(nodes, nodes, nodes.unsqueeze(1)))
    state = algorithm.step(state, torch.zeros_like(x))
    if algorithm.factor is not None:
        factor, _ = algorithm.factor(state)
        assert factor.device.type == "meta"
    message = algorithm.send(state)
    if algorithm.needs.addressed:  # to one neighbour each
        message = side_by_side(message)
    if name in LOOK:
        return
    heard = algorithm.absorb(None, message, 6)
    weights = torch.zeros(4, 4, dtype=torch.float64, device="meta")
    state = algorithm.receive(state, Inbox(weights, heard, nodes))
    assert algorithm.model(state).device.type == "meta"


@pytest.mark.parametrize("codec", [top_k(2), random_k(2)])
def test_codecs(codec):
    keys = rng.keys(0, torch.arange(4, device="meta"))
    for field in codec.encode(torch.zeros(4, 6, device="meta"), keys):
        assert field.device.type == "meta"


class Elsewhere(Quadratics):
    def init(self, nodes):
        return torch.zeros(len(nodes), 6, device="meta")


@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - {"jwins"}))  # which looks at masks
def test_the_memory_is_reckoned_there(name):
    algorithm = example(name, OPTIMISERS["sgd"], identity())
    setup = Setup(algorithm, Elsewhere(3, 6), static(complete_graph(3)), *[None] * 4)
    assert needed(setup, 3).state >= 3 * 6 * 4


def test_a_model_is_built_where_it_is_wanted():
    _, model = build("mlp")
    made = pure(model.to("meta"))
    assert {p.device.type for p in made.training.parameters()} == {"meta"}
