"""One peer of an experiment, in this process: load its data, meet the others, take part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pfl.addresses import is_wildcard
from p2pfl.data.shards import Federation
from p2pfl.data.statistics import Affine, in_two_passes
from p2pfl.errors import P2pflError, RunError, UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.launch.averaging import Averaging, Interrupted
from p2pfl.launch.catching_up import Patience, catch_up, constants
from p2pfl.launch.comeback import Comeback, next_life
from p2pfl.launch.resuming import digest
from p2pfl.learning.task import ModelTask, per_node
from p2pfl.runtime import finding
from p2pfl.runtime.discovery import Discovery
from p2pfl.runtime.endpoint import Endpoint, Keyring
from p2pfl.runtime.finding import Book, Finder
from p2pfl.runtime.handshake import NeighbourGone, Terms
from p2pfl.runtime.links import Links
from p2pfl.runtime.lookout import Roll
from p2pfl.runtime.serve import OnEvent, OnRow, Part, Server
from p2pfl.runtime.setup import Ending

FAILED_LINGER = 1.0  # seconds for a goodbye in a hurry


@dataclass(frozen=True)
class Post:
    """Where a peer stands.

    Attributes:
        node: its id.
        bind: the address it listens on.
        addresses: where peers listen, by id; more than its neighbours do no harm. Its own is
            what others are told, by default `bind`.
        data_dir: the folder relative data paths start from, by default the experiment's.
        device: where it computes.
        join_timeout: seconds to wait for its neighbours at the start.
        linger: seconds to wait for its last messages to be read at the end.
        descriptor: a socket that listens at `bind` already, to be taken over.
        keyring: what all links prove, and are encrypted by; None: in clear.
        contact: a peer, and where it listens, to be asked for addresses that are not given.
        discover: whether to look for them by mDNS.
        insecure: whether links may be in clear beyond this machine.
        revoked: whose keys are; who comes back does not wait for them.
        relisted: asked now and then for a new list of keys; None: it is as it was.
        home: the folder in which it keeps checkpoints, and counts its lives; None: nowhere.
        resume: whether it goes on from a checkpoint, if there is one.
        elapsed: seconds that it had been training before.
    """

    node: int
    bind: str
    addresses: Mapping[int, str]
    data_dir: Path | None = None
    device: str = "cpu"
    join_timeout: float = 60.0
    linger: float = 10.0
    descriptor: int | None = None
    keyring: Keyring | None = None
    contact: tuple[int, str] | None = None
    discover: bool = False
    insecure: bool = False
    revoked: Set[int] = frozenset()
    relisted: Callable[[], Mapping[int, str] | None] = lambda: None
    home: Path | None = None
    resume: bool = False
    elapsed: float = 0.0


@dataclass(frozen=True)
class Served:
    """What a peer ends with.

    Attributes:
        began: whether training did, so that there is a model.
        links: what is to be said of its links.
    """

    ending: Ending
    federation: Federation
    task: ModelTask
    affine: Affine | None
    began: bool = True
    links: Mapping[str, Any] = field(default_factory=dict)


def serve(
    experiment: Experiment,
    post: Post,
    on_row: OnRow,
    go_on: Callable[[], bool] = lambda: True,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_event: OnEvent = lambda kind, **about: None,
) -> Served:
    """Take part in an experiment as one of its peers.

    Args:
        experiment: the same at every peer; the handshake compares.
        post: which peer this is.
        on_row: told of every round that has ended.
        go_on: asked a few times a second; when it says no, the peer says goodbye.
        on_phase: told ``"loading"``, ``"meeting"``, ``"averaging statistics"``,
            ``"catching up"``, ``"training"``.
        on_event: told of checkpoints, and of what it notices of the others.

    Raises:
        UserError: the experiment cannot work, or a neighbour takes part in another one.
        RunError: an address is taken, a neighbour does not turn up or is lost before
            training, training diverged.
    """
    node = post.node
    _check_ids(post, experiment.nodes - 1)
    on_phase("loading")
    federation = experiment.federation(post.data_dir, only=node)
    task = experiment.task(federation, None, post.device)
    setup = experiment.setup(task)
    kept = _comeback(experiment, task, post, on_event)
    links = open_links(experiment, post, Terms(experiment.terms(task)), on_event)
    go_on = _minding(links, post, go_on)
    reason, linger, done = "failed", FAILED_LINGER, False
    try:
        try:
            affine = _prepare(experiment, federation, links, post, go_on, on_phase)
            elapsed = post.elapsed
            begin = kept.last(setup.fresh(torch.tensor([node]))) if kept and post.resume else None
            if links.friends:
                on_phase("catching up")
                patience = Patience(post.join_timeout, go_on)
                features = _agreed_features(experiment, federation)
                begin, agreed, elapsed = catch_up(setup, links, node, features, begin, patience)
                affine = agreed or affine
        except (RunError, Interrupted):
            if go_on():
                raise
            reason = "interrupted"  # who ends at the same time, for the same reason, is no failure
            return _in_vain(task, federation, node)
        if affine is not None:
            task.affine = per_node(affine, federation.train.nodes)
        on_phase("training")
        keep = kept.keep if kept else None
        part = Part(
            begin=begin, keep=keep, constants=constants(experiment, affine), elapsed=elapsed
        )
        ending = Server(setup, node, links, part).run(on_row, go_on, on_event)
        if links.lookout:
            on_event("membership", **links.lookout.report())
        reason, done = ending.reason, ending.reason != "interrupted"
        about = links.report()
        linger = post.linger if reason != "interrupted" else FAILED_LINGER
    except P2pflError as error:
        reason, error.links = str(error), links.report()
        raise
    finally:
        links.close(reason, linger, done)
    return Served(ending, federation, task, affine, links=about)


def _prepare(
    experiment: Experiment,
    federation: Federation,
    links: Links,
    post: Post,
    go_on: Callable[[], bool],
    on_phase: Callable[[str], None],
) -> Affine | None:
    """Meet the neighbours; return the constants of this node's features, ``[1, f]``, or None."""
    on_phase("meeting")
    if not _meet(links, post, go_on):
        raise Interrupted
    if experiment.standardise == "none" or federation.numeric is None:
        return None
    average = _alone
    if experiment.standardise == "pooled" and links.friends:  # they have agreed without us
        return None
    if experiment.standardise == "pooled":
        on_phase("averaging statistics")
        average = Averaging(experiment, links, post.node, post.join_timeout, go_on)
    return in_two_passes(federation.train, federation.numeric, average, experiment.exact)


def _meet(links: Links, post: Post, go_on: Callable[[], bool]) -> bool:
    try:
        return links.meet(post.join_timeout, go_on)
    except RunError as error:
        if post.elapsed == 0 or isinstance(error, NeighbourGone):
            raise
        raise RunError(
            f"{error}; they have ended since peer {post.node} was here, or are out of reach"
        ) from error


def _agreed_features(experiment: Experiment, federation: Federation) -> int:
    """Return how many features are standardised by constants that all have agreed on."""
    pooled = experiment.standardise == "pooled" and federation.numeric is not None
    return federation.train.x.shape[1] if pooled else 0


def _in_vain(task: ModelTask, federation: Federation, node: int) -> Served:
    nodes = torch.tensor([node])
    ending = Ending(task.init(nodes), nodes, "interrupted")
    return Served(ending, federation, task, None, began=False)


def open_links(
    experiment: Experiment, post: Post, terms: Terms, on_event: OnEvent = lambda kind, **about: None
) -> Links:
    """Open the sockets of a peer and dial its neighbours, as far as their addresses are known.

    Raises:
        UserError: an address or a key is missing, or cannot be used.
        RunError: an address is taken, or strangers could come in.
    """
    # Nobody begins without those who were revoked, but the others have gone on without them.
    away = post.revoked if post.elapsed > 0 else frozenset[int]()
    roll = _roll(experiment, post, away, on_event)
    neighbours = awaited = set[int]().union(*experiment.topology.contacts(post.node))
    if roll:  # whoever is there may become a neighbour, and all look after all
        neighbours = set(range(experiment.nodes)) - {post.node}
        awaited = neighbours - away
    _check_keys(post, awaited)
    mine = post.addresses.get(post.node, post.bind)
    book = Book(experiment.nodes, {**post.addresses, post.node: mine})
    searching = post.contact is not None or post.discover
    if searching and is_wildcard(mine):
        raise UserError(f"others cannot dial {mine}: give an address of this machine")
    missing = sorted(awaited - post.addresses.keys())
    if missing and not searching:
        raise UserError(f"peer {post.node}: no address is given for its neighbours {missing}")
    sockets = (post.keyring, post.descriptor, post.insecure)
    endpoint = Endpoint(post.bind, len(neighbours) + 1, *sockets)
    finder: Finder | None = None
    try:
        if post.discover:
            key = post.keyring.own.public if post.keyring else None
            finder = Discovery(post.node, mine, terms.run.hex(), key, experiment.nodes)
        elif post.contact and post.contact[0] != post.node:
            finder = finding.ask(endpoint, post.contact, post.node, book, terms.run)
        return Links(post.node, endpoint, neighbours, terms, book, finder, roll)
    except BaseException:
        if finder:
            finder.close()
        endpoint.close()
        raise


def _check_ids(post: Post, last: int) -> None:
    """Refuse ids that nobody has."""
    if not 0 <= post.node <= last:
        raise UserError(f"--id {post.node}: the nodes of this experiment are 0 to {last}")
    if post.contact and not 0 <= post.contact[0] <= last:
        raise UserError(f"--contact {post.contact[0]}@...: the nodes are 0 to {last}")


def _check_keys(post: Post, neighbours: Iterable[int]) -> None:
    """Refuse to begin if the key of a neighbour is not known."""
    if post.keyring is None:
        return
    if keyless := sorted({post.node, *neighbours} - post.keyring.of.keys()):
        raise UserError(f"peer {post.node}: peers {keyless} have no key listed, or are revoked")


def _comeback(
    experiment: Experiment, task: ModelTask, post: Post, on_event: OnEvent
) -> Comeback | None:
    """Return where checkpoints are kept, if they are."""
    if post.home is None or not experiment.checkpoint.every:
        return None
    return Comeback(post.home, digest(experiment, task.spec), experiment.checkpoint, on_event)


def _roll(experiment: Experiment, post: Post, away: Set[int], on_event: OnEvent) -> Roll | None:
    """Say how this peer finds out who is there; None: it does not.

    Who is `away` is not there, whatever the experiment says.
    """
    timers = experiment.membership
    if timers is None or experiment.algorithm.needs.weights == "none":
        return None
    founders = experiment.churn.founders if experiment.churn else range(experiment.nodes)
    return Roll(next_life(post.home, on_event), timers, frozenset(founders) - away)


def _minding(links: Links, post: Post, go_on: Callable[[], bool]) -> Callable[[], bool]:
    """Return `go_on`, which is asked a few times a second, with a look at the list of keys."""

    def minding() -> bool:
        if (keys := post.relisted()) is not None:
            links.allow(keys)
        return go_on()

    return minding


def _alone(moments: Tensor) -> Tensor:
    return moments
