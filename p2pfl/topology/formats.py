"""The texts a network may be written in, read into one plain form.

Nothing here trusts its input and nothing in it can execute: TOML, JSON, XML without document
types, and lines of words.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple
from xml.etree import ElementTree

NODE_KEYS = ("address", "speed")
LINK_KEYS = ("latency", "bandwidth", "loss")


class Wrong(Exception):
    """A text is not a network; the message says where and why."""


class Raw(NamedTuple):
    """A network as written: names and attributes, nothing checked but their presence."""

    directed: bool
    nodes: list[tuple[str, dict[str, Any]]]  # name, attributes
    edges: list[tuple[str, str, dict[str, Any]]]  # sender, receiver, attributes


def parse_toml(text: str) -> Raw:
    """Read the project's own format, in which every key must be known."""
    document = tomllib.loads(text)
    _known(document, ("directed", "nodes", "edges", "defaults"), "the file")
    directed = document.get("directed", False)
    if not isinstance(directed, bool):
        raise Wrong(f"directed = {directed!r} is neither true nor false")
    defaults = document.get("defaults", {})
    if not isinstance(defaults, dict):
        raise Wrong("defaults must be a table: [defaults]")
    _known(defaults, LINK_KEYS, "[defaults]")
    nodes, edges = _tables(document, "nodes"), _tables(document, "edges")
    for place, node in nodes:
        _known(node, ("id", *NODE_KEYS), place)
    return Raw(
        directed,
        [(_name(node, "id", place), _only(node, NODE_KEYS)) for place, node in nodes],
        [_toml_edge(edge, place, directed, defaults) for place, edge in edges],
    )


def parse_json(text: str) -> Raw:
    """Read node-link JSON, as written by networkx and d3; attributes not ours are ignored."""
    document = json.loads(text)
    if not isinstance(document, dict):
        raise Wrong("node-link JSON is an object with nodes and links")
    directed = document.get("directed", False)
    if not isinstance(directed, bool):
        raise Wrong(f"directed = {directed!r} is neither true nor false")
    key = "edges" if "edges" in document else "links"
    edges = [
        (_name(edge, "source", place), _name(edge, "target", place), _only(edge, LINK_KEYS))
        for place, edge in _tables(document, key)
    ]
    nodes = _tables(document, "nodes")
    return Raw(
        directed,
        [(_name(node, "id", place), _only(node, NODE_KEYS)) for place, node in nodes],
        edges,
    )


def parse_graphml(text: str) -> Raw:
    """Read GraphML; attributes not ours are ignored, hyperedges and nested graphs refused."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise Wrong("document types and entities are not read")
    root = ElementTree.fromstring(text)
    graphs = _all(root, "graph")
    if len(graphs) != 1 or _all(root, "hyperedge"):
        raise Wrong(f"has {len(graphs)} graphs; want one, and no hyperedges")
    keys = {key.get("id"): key for key in _all(root, "key")}
    directed = graphs[0].get("edgedefault") == "directed"
    nodes = [(_xml(node, "id"), _data(node, keys, NODE_KEYS)) for node in _all(root, "node")]
    edges = []
    for edge in _all(root, "edge"):
        if edge.get("directed") not in (None, "true" if directed else "false"):
            raise Wrong("directed and undirected edges are mixed")
        ends = _xml(edge, "source"), _xml(edge, "target")
        edges.append((*ends, _data(edge, keys, LINK_KEYS)))
    return Raw(directed, nodes, edges)


def parse_edges(text: str) -> Raw:
    """Read an undirected edge list: two names per line, then ``key=value``; ``#`` comments."""
    names: dict[str, None] = {}
    edges = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) < 2:
            raise Wrong(f"line {number}: want two names, found {words[0]!r} alone")
        attributes = dict(_pair(word, number) for word in words[2:] if word != "{}")
        names |= dict.fromkeys(words[:2])
        edges.append((words[0], words[1], attributes))
    return Raw(False, [(name, {}) for name in names], edges)


PARSERS: dict[str, Callable[[str], Raw]] = {
    ".toml": parse_toml,
    ".json": parse_json,
    ".graphml": parse_graphml,
    ".edges": parse_edges,
    ".edgelist": parse_edges,
    ".txt": parse_edges,
}


def _known(table: dict[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in table:
        if key not in keys:
            raise Wrong(f"unknown key {key!r} in {place}; it takes {', '.join(keys)}")


def _only(table: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: table[key] for key in keys if key in table}


def _tables(document: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the tables below a key, each with the words by which an error points to it."""
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise Wrong(f"{key} must be a list of tables")
    return [(f"{key}[{index}]", table) for index, table in enumerate(tables)]


def _name(table: dict[str, Any], key: str, place: str) -> str:
    if key not in table:
        raise Wrong(f"{place} has no {key!r}")
    return _text(table[key], f"{place}.{key}")


def _text(value: object, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise Wrong(f"{place} = {value!r} is no name; want a number or a text")
    return str(value)


def _toml_edge(
    edge: dict[str, Any], place: str, directed: bool, defaults: dict[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    ends = ("from", "to") if directed else ("between",)
    _known(edge, (*ends, *LINK_KEYS), f"{place} (directed = {str(directed).lower()})")
    attributes = _only({**defaults, **edge}, LINK_KEYS)
    if directed:
        return _name(edge, "from", place), _name(edge, "to", place), attributes
    between = edge.get("between")
    if not isinstance(between, list) or len(between) != 2:
        raise Wrong(f"{place}.between = {between!r} is not a pair of nodes, like [0, 1]")
    first, second = (_text(end, f"{place}.between") for end in between)
    return first, second, attributes


def _all(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if element.tag.rpartition("}")[2] == tag]


def _xml(element: ElementTree.Element, key: str) -> str:
    value = element.get(key)
    if not value:
        raise Wrong(f"a <{element.tag.rpartition('}')[2]}> has no {key!r}")
    return value


def _data(
    element: ElementTree.Element,
    keys: dict[str | None, ElementTree.Element],
    wanted: tuple[str, ...],
) -> dict[str, Any]:
    """Return the attributes of a node or an edge, from its data or the default of their key."""
    found = {}
    for key in keys.values():
        for default in _all(key, "default"):
            found[key.get("attr.name")] = default.text or ""
    for data in _all(element, "data"):
        if data.get("key") not in keys:
            raise Wrong(f"a <data> names the key {data.get('key')!r}, which is not declared")
        found[keys[data.get("key")].get("attr.name")] = data.text or ""
    return {name: _number(found[name], name) for name in wanted if name in found}


def _pair(word: str, number: int) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or key not in LINK_KEYS:
        raise Wrong(f"line {number}: {word!r} is not {' or '.join(f'{k}=...' for k in LINK_KEYS)}")
    return key, _number(value, key)


def _number(text: str, key: str) -> str | float:
    if key == "address":
        return text.strip()
    try:
        return float(text)
    except ValueError:
        raise Wrong(f"{key} = {text!r} is not a number") from None
