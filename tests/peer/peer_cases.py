"""Peers to play with, and the language of the golden scenarios.

A scenario is a text: ``peer`` makes one, ``> event`` tells it something, and the indented
lines below say what it wants done. Lines with ``#`` are comments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from p2pfl import codec
from p2pfl.algorithm import Algorithm, Rows
from p2pfl.algorithms import choco, dpsgd, push_sum
from p2pfl.algorithms.averaging import Params
from p2pfl.algorithms.push_sum import Mass
from p2pfl.errors import ProtocolError, RemoteProtocolError, RunError
from p2pfl.learning.optim import sgd
from p2pfl.peer.events import (
    Discard,
    Effect,
    Evaluate,
    Evaluated,
    Event,
    PeerDown,
    PeerSuspected,
    PeerUp,
    Received,
    Report,
    Send,
    SetTimer,
    Skip,
    Skipped,
    Started,
    Stop,
    TimerFired,
    Train,
    Trained,
)
from p2pfl.peer.plan import Pace, View, Views
from p2pfl.peer.rounds import Peer
from p2pfl.peer.stopping import target
from p2pfl.topology import Mixing, metropolis, push

# Blocks are small: more threads only get into each other's way, the more so on a busy machine.
torch.set_num_threads(1)

ALGORITHMS: dict[str, tuple[Algorithm[Any, Any, Any], Mixing]] = {
    "dpsgd": (dpsgd(sgd(0.5)), metropolis()),
    "push_sum": (push_sum(sgd(0.5)), push()),
    "choco": (choco(sgd(0.5), codec.identity(), 0.5), metropolis()),
    "choco top_k": (choco(sgd(0.1), codec.top_k(1)), metropolis()),
}


def vector(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def make_peer(  # noqa: PLR0913 - all that makes a peer
    algorithm: str = "dpsgd",
    me: int = 1,
    to: tuple[int, ...] = (0, 2),
    hears: tuple[int, ...] | None = None,
    x: tuple[float, ...] = (0.0, 0.0),
    ring: tuple[int, ...] = (),
    hops: tuple[int, ...] = (),
    **pace: Any,
) -> Peer[Any, Any, Any]:
    view = View(to, to if hears is None else hears)
    views = Views(lambda round, gone: view)
    if ring:
        views = Views(lambda round, gone: ring_among(me, ring, gone), follow=True, mutual=True)
    if hops:
        views = Views(lambda round, gone: one_way_among(me, hops, round, gone), follow=True)
    rows = Rows(torch.tensor([me]), torch.tensor([1]))
    how, rule = ALGORITHMS[algorithm]
    paced = Pace(**{"rounds": 3, "evaluate_every": 100, **pace})
    return Peer(how, rule, views, paced, vector(*x), rows)


def ring_among(me: int, ring: tuple[int, ...], gone: frozenset[int]) -> View:
    """Return one's neighbours in a ring of those who are there."""
    live = [peer for peer in ring if peer not in gone]
    i = live.index(me)
    both = tuple(sorted({live[i - 1], live[(i + 1) % len(live)]} - {me}))
    return View(both, both)


def one_way_among(me: int, hops: tuple[int, ...], round: int, gone: frozenset[int]) -> View:
    """Return who is so many places further and back among those of ten who are there.

    How many it is in each round `hops` says, again and again.
    """
    live = [peer for peer in range(10) if peer not in gone]
    i, hop = live.index(me), hops[round % len(hops)]
    return View((live[(i + hop) % len(live)],), (live[i - hop],))


def letter(
    sender: int, round: int, *x: float, degree: int = 2, score: float = -math.inf, **more: Any
) -> Received:
    message: tuple[Tensor, ...] = Params(vector(*x))
    if "w" in more:
        message = Mass(vector(*x), vector(more["w"]))
    if "dense" in more:
        message = codec.Dense(vector(*x))
    return Received(sender, round, degree, score, message, 100)


def train(peer: Peer[Any, Any, Any], effects: list[Effect], loss: float = 1.0) -> list[Effect]:
    """Answer a `Train` among the effects, with zero gradients."""
    (asked,) = (effect for effect in effects if isinstance(effect, Train))
    return peer.handle(Trained(asked.step, asked.state, loss))


def snapshot(peer: Peer[Any, Any, Any]) -> str:
    """Say everything a peer remembers."""
    parts = [vars(peer), vars(peer.mail), vars(peer._agreement)]
    fixed = ("algorithm", "mail", "_views", "_agreement", "_algorithm", "_mixing", "_rule")
    parts += [vars(peer._company)]
    fixed += ("_company",)
    return repr([{k: v for k, v in part.items() if k not in fixed} for part in parts])


# The language.


def perform(text: str) -> str:
    """Play a scenario and return it with what the peer really did."""
    said: list[str] = []
    stage: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("  "):
            continue
        said.append(line)
        if line.startswith("peer "):
            stage = {"peer": _peer(_words(line)), "asked": []}
        elif line.startswith("> "):
            said += [f"  {effect}" for effect in _tell(stage, line[2:])]
    return "\n".join(said) + "\n"


def _words(line: str) -> dict[str, str]:
    return dict(word.split("=") for word in line.split()[1:])


def _numbers(word: str) -> tuple[float, ...]:
    return tuple(float(number) for number in word.split(",") if number)


def _ids(word: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _numbers(word))


def _peer(words: dict[str, str]) -> Peer[Any, Any, Any]:
    pace: dict[str, Any] = {"rounds": int(words["rounds"]), "patience": float(words["patience"])}
    if "target" in words:
        metric: Any = words.get("metric", "train_loss")
        pace |= {"stop": target(float(words["target"]), metric), "width": int(words["width"])}
    if "evaluate" in words:
        pace["evaluate_every"] = int(words["evaluate"])
    if "overlap" in words:
        pace["overlap"] = True
    if "backlog" in words:
        pace["backlog"] = int(words["backlog"])
    hears = _ids(words["from"]) if "from" in words else None
    name = words.get("algorithm", "dpsgd")
    pace["ring"] = _ids(words.get("ring", ""))
    to = _ids(words.get("to", ""))
    return make_peer(name, int(words["me"]), to, hears, _numbers(words["x"]), **pace)


def _tell(stage: dict[str, Any], line: str) -> Iterator[str]:
    peer: Peer[Any, Any, Any] = stage["peer"]
    before = snapshot(peer)
    try:
        effects = peer.handle(_event(stage, line))
    except (ProtocolError, RunError) as error:
        yield f"! {type(error).__name__}: {error}"
        if isinstance(error, RemoteProtocolError):
            yield "nothing has changed" if snapshot(peer) == before else "SOMETHING HAS CHANGED"
        return
    stage["asked"] += [effect for effect in effects if isinstance(effect, Train)]
    yield from map(_told, effects)


def _event(stage: dict[str, Any], line: str) -> Event:  # noqa: C901 - one case for each
    name, words = line.split()[0], _words(line)
    match name:
        case "started":
            return Started()
        case "trained":
            asked: Train = stage["asked"][-1]
            algorithm = stage["peer"].algorithm
            state = algorithm.step(asked.state, vector(*_numbers(words["gradient"])))
            return Trained(int(words.get("step", asked.step)), state, float(words["loss"]))
        case "evaluated":
            return Evaluated(int(words["round"]), float(words["loss"]), math.nan)
        case "received":
            more = {"w": float(words["w"])} if "w" in words else {}
            return letter(
                int(words["from"]),
                int(words["round"]),
                *_numbers(words["x"]),
                degree=int(words["degree"]),
                score=float(words.get("score", "-inf")),
                **more,
            )
        case "timer":
            return TimerFired(int(words["round"]))
        case "skipped":
            return Skipped(int(words["from"]), int(words["round"]))
        case "suspect":
            return PeerSuspected(int(words["peer"]))
        case "up":
            return PeerUp(int(words["peer"]))
        case "down":
            return PeerDown(int(words["peer"]), words.get("done") == "yes")
    raise ValueError(f"no such event: {line}")


def _told(effect: Effect) -> str:  # noqa: C901 - one case for each
    match effect:
        case Train(step=step, count=count, state=state):
            return f"train step={step} count={count} from x={_row(state.x)}"
        case Send(to=to, round=round, degree=degree, score=score, message=message):
            names = getattr(message, "_fields", ())
            fields = " ".join(f"{k}={_row(v)}" for k, v in zip(names, message, strict=True))
            score_text = "" if score == -math.inf else f" score={score:g}"
            return f"send to={_list(to)} round={round} degree={degree}{score_text} {fields}"
        case SetTimer(after=after, round=round):
            return f"set-timer after={after:g} round={round}"
        case Skip(to=to, round=round):
            return f"skip to={_list(to)} round={round}"
        case Discard(message=message):
            return f"discard x={_row(message[0])}"
        case Report(round=round, loss=loss, params=params, received=size, missed=missed):
            who = f" missed={_list(missed)}" if missed else ""
            who += f" one-sided={effect.one_sided}" if effect.one_sided else ""
            return f"report round={round} loss={loss:g} x={_row(params)} received={size}{who}"
        case Evaluate(round=round, params=params):
            return f"evaluate round={round} x={_row(params)}"
        case Stop(reason=reason):
            return f"stop: {reason}"


def _row(block: Tensor) -> str:
    (only,) = block.tolist()
    return ",".join(f"{value:.6g}" for value in only)


def _list(ids: tuple[int, ...]) -> str:
    return ",".join(map(str, ids)) or "nobody"
