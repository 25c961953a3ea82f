"""Networks from files: nodes with addresses and speeds, edges with latency, bandwidth, loss.

One file serves every runtime; each reads what it needs of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import networkx as nx

from p2pfl.addresses import is_address
from p2pfl.errors import UserError
from p2pfl.topology.formats import PARSERS, Raw, Wrong

LARGEST = 64 * 2**20  # bytes


class Link(NamedTuple):
    """What one direction of an edge is like; None is what the file does not say."""

    latency: float | None = None  # seconds
    bandwidth: float | None = None  # bytes per second
    loss: float | None = None  # probability that a message is lost


@dataclass(frozen=True)
class Network:
    """A graph as found in a file.

    Attributes:
        graph: a connected `networkx.Graph` or a strongly connected `networkx.DiGraph` on
            ``0 .. n-1``, numbered in the order of the names: numbers first, then texts.
        names: what the file calls each node.
        addresses: where nodes listen, as in ``tcp://127.0.0.1:7001``; only those in the file.
        links: every direction of every edge, from sender to receiver.
        speed: how fast nodes compute, 1 being usual; only those in the file.
    """

    graph: nx.Graph
    names: tuple[str, ...]
    addresses: dict[int, str]
    links: dict[tuple[int, int], Link]
    speed: dict[int, float]


def read_network(path: str | Path) -> Network:
    """Read a network from TOML, node-link JSON, GraphML or a list of edges.

    The ending of the name tells them apart: ``.toml``, ``.json``, ``.graphml`` and ``.edges``,
    ``.edgelist`` or ``.txt``.

    Raises:
        UserError: there is no such file, or it does not hold a connected network; the message
            names the file and the key.
    """
    path = Path(path)
    try:
        return _network(_parse(path))
    except Wrong as wrong:
        raise UserError(f"{path}: {wrong}") from None


def _parse(path: Path) -> Raw:
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        raise Wrong(f"its ending is none of {', '.join(PARSERS)}")
    try:
        size = path.stat().st_size
        if not path.is_file():  # reading from a pipe would wait for ever
            raise Wrong("is not a file")
        if size > LARGEST:
            raise Wrong(f"has {size / 2**20:.0f} MB; a network has at most {LARGEST >> 20}")
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Wrong(f"cannot be read: {error.strerror or error}") from None
    except (ValueError, ElementTree.ParseError, RecursionError) as error:
        raise Wrong(f"is not {path.suffix[1:]}: {error}") from None


def _network(raw: Raw) -> Network:
    names = sorted((name for name, _ in raw.nodes), key=_order)
    if not names:
        raise Wrong("has no nodes")
    number = {name: index for index, name in enumerate(names)}
    if len(number) < len(names):
        twice = next(name for name, after in pairwise(names) if name == after)
        raise Wrong(f"node {twice!r} is there twice")
    links = _links(raw, number)
    graph = nx.DiGraph() if raw.directed else nx.Graph()
    graph.add_nodes_from(range(len(names)))
    graph.add_edges_from(links)
    _check_connected(graph, names)
    nodes = [(number[name], f"node {name!r}", attributes) for name, attributes in raw.nodes]
    return Network(
        graph,
        tuple(names),
        _addresses(nodes),
        links,
        {node: _speed(given["speed"], place) for node, place, given in nodes if "speed" in given},
    )


def _order(name: str) -> tuple[bool, int, str]:
    # int() reads more than digits ("1_0", " 1"), and takes for ever on very long ones.
    is_number = len(name) <= 18 and re.fullmatch(r"-?[0-9]+", name) is not None
    return not is_number, int(name) if is_number else 0, name


def _links(raw: Raw, number: dict[str, int]) -> dict[tuple[int, int], Link]:
    links: dict[tuple[int, int], Link] = {}
    for sender, receiver, attributes in raw.edges:
        place = f"edge {sender!r} - {receiver!r}"
        for end in (sender, receiver):
            if end not in number:
                raise Wrong(f"{place} names {end!r}, which is not among the nodes")
        if sender == receiver:
            raise Wrong(f"{place} joins a node to itself")
        edge = number[sender], number[receiver]
        if edge in links:
            raise Wrong(f"{place} is there twice")
        link = Link(**{key: _checked(key, value, place) for key, value in attributes.items()})
        links[edge] = link
        if not raw.directed:
            links[edge[::-1]] = link
    return dict(sorted(links.items()))


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "latency": (lambda value: value >= 0, "seconds, at least 0"),
    "bandwidth": (lambda value: value > 0, "bytes per second, above 0"),
    "loss": (lambda value: 0 <= value <= 1, "a probability from 0 to 1"),
    "speed": (lambda value: value > 0, "a factor above 0"),
}


def _checked(key: str, value: object, place: str) -> float:
    allows, wanted = _RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Wrong(f"{place}: {key} = {value!r} is not a number")
    # Compared before it is converted: float() of an integer of 400 digits overflows.
    if abs(value) <= sys.float_info.max and allows(value):
        return float(value)
    raise Wrong(f"{place}: {key} = {value!r} must be {wanted}")


def _speed(value: object, place: str) -> float:
    return _checked("speed", value, place)


def _addresses(nodes: list[tuple[int, str, dict[str, Any]]]) -> dict[int, str]:
    addresses: dict[int, str] = {}
    for node, place, given in nodes:
        if "address" not in given:
            continue
        address = given["address"]
        if not is_address(address):
            raise Wrong(f"{place}: address = {address!r} is not like tcp://host:port")
        if address in addresses.values():
            raise Wrong(f"{place}: address = {address!r} is another node's too")
        addresses[node] = address
    return dict(sorted(addresses.items()))


def _check_connected(graph: nx.Graph, names: list[str]) -> None:
    """Refuse a graph in which some node never hears of another."""
    if graph.is_directed():
        components, kind = nx.strongly_connected_components(graph), "strongly connected"
    else:
        components, kind = nx.connected_components(graph), "connected"
    parts = sorted((sorted(part) for part in components), key=len)
    if len(parts) > 1:
        apart = parts[0]
        some = ", ".join(repr(names[node]) for node in apart[:4]) + ", ..." * (len(apart) > 4)
        raise Wrong(f"is not {kind}: it falls into {len(parts)} parts, one of them {some}")
