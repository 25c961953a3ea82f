"""The same job on gossipy's simulator, all to all or by pushing, on the same graph.

    python scripts/benchmarks/gossipy_run.py [--exchange all|shared|push] [--model mlp] ...

In an environment of its own: ``pip install gossipy-dfl``.

All to all: each round a node merges the models of all its neighbours with its own, all with the
same weight, goes once through its data, which are as many batches as there are local steps, and
sends its model to every neighbour. The release has no such node, so `AllToAllNode` is written
here, to do what `All2AllGossipNode` in gossipy's repository does. It decides only when, and to
whom. The rest is gossipy's: its simulator runs the nodes and delivers, its nodes send, its handler
merges, trains and copies, its messages and its cache carry the copies. Its nodes copy the handler
whenever they send, so once for every neighbour: `All2AllGossipNode` sends in the same way.

Shared: the same with what gossipy does not do: one copy a round is shared by all neighbours.

Push: gossipy's own node. It pushes its model to one random neighbour each round; the receiver
averages it with its own and goes once through its data. So there is less to mix, and as much to
train.

Counted is `GossipSimulator.start`: sending, averaging, training. Not counted are imports, the
making of data, nodes and initial models, the first round, and evaluation, of which there is none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import networkx as nx
import torch
from jobs import (
    BATCH,
    RATE,
    SHAPE,
    WARM_UP,
    Job,
    build,
    fastest_threads,
    graph,
    job,
    made_up,
    options,
    report,
)
from torch import Tensor

# gossipy imports torchvision for data sets to download, which nobody needs here.
sys.modules.setdefault("torchvision", ModuleType("torchvision"))

from gossipy import CACHE, LOG, CacheKey, set_seed  # type: ignore[import-not-found]  # noqa: E402
from gossipy.core import (  # type: ignore[import-not-found]  # noqa: E402
    AntiEntropyProtocol,
    CreateModelMode,
    Message,
    MessageType,
    StaticP2PNetwork,
)
from gossipy.data import DataDispatcher  # type: ignore[import-not-found]  # noqa: E402
from gossipy.data.handler import (  # type: ignore[import-not-found]  # noqa: E402
    ClassificationDataHandler,
)
from gossipy.model import TorchModel  # type: ignore[import-not-found]  # noqa: E402
from gossipy.model.handler import TorchModelHandler  # type: ignore[import-not-found]  # noqa: E402
from gossipy.node import GossipNode  # type: ignore[import-not-found]  # noqa: E402
from gossipy.simul import GossipSimulator  # type: ignore[import-not-found]  # noqa: E402

TIMES = 10  # points of time in a round of pushing; each node sends at one of them


class Model(TorchModel):  # type: ignore[misc]
    """The job's model, as gossipy wants it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = build(name)

    def init_weights(self) -> None:
        """Keep the weights that torch has drawn."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``[b, 10]`` for images ``[b, 784]``."""
        outputs: Tensor = self.inner(x.view(-1, *SHAPE))
        return outputs


class Counted(torch.nn.CrossEntropyLoss):
    """A cross-entropy that counts how often it is asked: once in each local step."""

    steps = 0

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss."""
        Counted.steps += 1
        return super().forward(input, target)


class AllToAllNode(GossipNode):  # type: ignore[misc]
    """A node that hears all its neighbours before it trains, and sends to all of them.

    gossipy's simulator lets a node send one message at a time. So this one merges and trains at
    the first point of time of a round, and sends to another neighbour at each: a round needs as
    many points of time as a node has neighbours.
    """

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(**settings)
        self.peers: Iterator[int] = itertools.cycle(self.p2p_net.get_peers(self.idx))
        self.heard: list[CacheKey] = []

    def timed_out(self, t: int) -> bool:
        """Return True: there is a neighbour to send to at every point of time."""
        return True

    def get_peer(self) -> int:
        """Return the next neighbour in turn."""
        return next(self.peers)

    def send(self, t: int, peer: int, protocol: AntiEntropyProtocol) -> Message:
        """Return a message with the model; merge and train before the first one of a round."""
        if t % self.round_len == 0:
            self.update()
        return super().send(t, peer, protocol)

    def receive(self, t: int, msg: Message) -> None:
        """Keep the key of a model until the next round."""
        self.heard.append(msg.value[0])

    def update(self) -> None:
        """Merge what was heard, and go once through the data; not if there was nothing yet."""
        if self.heard:
            self.model_handler([CACHE.pop(key) for key in self.heard], self.data[0])
            self.heard.clear()


class SharingNode(AllToAllNode):
    """The same, but all neighbours share one copy of its model."""

    def send(self, t: int, peer: int, protocol: AntiEntropyProtocol) -> Message:
        """Return a message with the model; copy it for the first one of a round alone."""
        if t % self.round_len == 0:
            message = super().send(t, peer, protocol)
            self.key = message.value[0]
            return message
        CACHE.push(self.key, CACHE[self.key])  # one more reference to the same copy
        return Message(t, self.idx, peer, MessageType.PUSH, (self.key,))


NODES = {"all": AllToAllNode, "shared": SharingNode, "push": GossipNode}


def main() -> None:
    """Run the job and print the figures."""
    parser = options(__doc__)
    parser.add_argument("--exchange", choices=[*NODES], default="all")
    asked = parser.parse_args()
    given = job(asked)
    torch.set_num_threads(fastest_threads(given.model, given.threads))
    LOG.disabled = True
    set_seed(0)
    simulator = prepare(given, asked.exchange)
    with contextlib.redirect_stdout(sys.stderr):  # where its progress bars belong
        simulator.start(n_rounds=WARM_UP)
        Counted.steps = 0
        began = time.perf_counter()
        simulator.start(n_rounds=given.rounds)
        seconds = time.perf_counter() - began
    report("gossipy", importlib.metadata.version("gossipy-dfl"), Counted.steps, seconds)


def prepare(job: Job, exchange: str) -> GossipSimulator:
    """Return a simulator whose nodes have their data and their first models.

    Args:
        job: what is to be done.
        exchange: one of `NODES`.
    """
    x, y = made_up(job.nodes, job.local_steps)
    data = ClassificationDataHandler(x.view(-1, 784), y.view(-1), test_size=0)
    handler = TorchModelHandler(
        net=Model(job.model),
        optimizer=torch.optim.SGD,
        optimizer_params={"lr": RATE},
        criterion=Counted(),
        local_epochs=1,
        batch_size=BATCH,
        create_model_mode=CreateModelMode.MERGE_UPDATE,
    )
    dispatcher = DataDispatcher(data, n=job.nodes, eval_on_user=False)
    adjacency = nx.to_numpy_array(graph(job), nodelist=range(job.nodes))
    network = StaticP2PNetwork(job.nodes, adjacency)
    times = TIMES if exchange == "push" else job.degree
    nodes = NODES[exchange].generate(dispatcher, network, handler, times, sync=True)
    simulator = GossipSimulator(nodes, dispatcher, times, AntiEntropyProtocol.PUSH)
    simulator.init_nodes()
    return simulator


if __name__ == "__main__":
    main()
