from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest

from p2pfl.errors import UserError
from p2pfl.topology import Link, files, read_network

TOPOLOGIES = Path(__file__).parents[2] / "topologies"

TOML = """
directed = false
[defaults]
latency = 0.02
[[nodes]]
id = 10
address = "tcp://127.0.0.1:7001"
[[nodes]]
id = "b"
speed = 0.5
[[nodes]]
id = 9
[[edges]]
between = [10, "b"]
bandwidth = 1.25e6
[[edges]]
between = [9, 10]
latency = 0
loss = 0.01
"""


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_toml(tmp_path):
    network = read_network(write(tmp_path, "net.toml", TOML))
    assert network.names == ("9", "10", "b")
    assert network.addresses == {1: "tcp://127.0.0.1:7001"}
    assert network.speed == {2: 0.5}
    quick, usual = Link(0.0, None, 0.01), Link(0.02, 1.25e6, None)
    assert network.links == {(0, 1): quick, (1, 0): quick, (1, 2): usual, (2, 1): usual}
    assert set(network.graph.edges) == {(0, 1), (1, 2)}


def test_directed_toml(tmp_path):
    text = "directed = true\nnodes = [{id = 0}, {id = 1}]\n"
    text += "edges = [{from = 0, to = 1, loss = 1}, {from = 1, to = 0}]"
    network = read_network(write(tmp_path, "net.toml", text))
    assert network.graph.is_directed()
    assert network.links == {(0, 1): Link(loss=1.0), (1, 0): Link()}


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("ending", ["graphml", "json"])
def test_round_trip_of_what_networkx_writes(tmp_path, ending, directed):
    graph = nx.DiGraph() if directed else nx.Graph()
    graph.add_node("n2", address="tcp://host:80", speed=2.0, club="other")
    graph.add_node("n10")
    graph.add_edge("n2", "n10", latency=0.5, bandwidth=1e6, loss=0.25, weight=3)
    graph.add_edge("n10", "n2", latency=0.5, bandwidth=1e6, loss=0.25)
    path = tmp_path / f"net.{ending}"
    if ending == "graphml":
        nx.write_graphml(graph, path)
    else:
        path.write_text(json.dumps(nx.node_link_data(graph, edges="links")))
    network = read_network(path)
    assert network.names == ("n10", "n2")
    assert network.graph.is_directed() == directed
    assert network.addresses == {1: "tcp://host:80"}
    assert network.speed == {1: 2.0}
    assert network.links == dict.fromkeys([(0, 1), (1, 0)], Link(0.5, 1e6, 0.25))


def test_json_may_call_its_links_edges(tmp_path):
    graph = nx.cycle_graph(5)
    path = write(tmp_path, "net.json", json.dumps(nx.node_link_data(graph, edges="edges")))
    assert nx.utils.graphs_equal(read_network(path).graph, graph)


@pytest.mark.parametrize("ending", ["edges", "edgelist", "txt"])
def test_edge_lists(tmp_path, ending):
    path = tmp_path / f"net.{ending}"
    nx.write_edgelist(nx.cycle_graph(12), path)
    assert nx.utils.graphs_equal(read_network(path).graph, nx.cycle_graph(12))
    path.write_text("# a comment\n\na b latency=0.02 loss=0.5 # another\n")
    assert read_network(path).links[1, 0] == Link(latency=0.02, loss=0.5)


def test_defaults_of_graphml_are_heeded(tmp_path):
    text = """<?xml version="1.0" encoding="utf-8"?>
    <graphml><key id="d0" for="edge" attr.name="latency"><default>0.5</default></key>
    <graph edgedefault="undirected"><node id="a"/><node id="b"/>
    <edge source="a" target="b"/></graph></graphml>"""
    assert read_network(write(tmp_path, "net.graphml", text)).links[0, 1] == Link(latency=0.5)


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "addresses"),
    [
        ("ring8.toml", 8, 8, 8),
        ("office_lan.toml", 8, 15, 8),
        ("karate.graphml", 34, 78, 0),
        ("davis.json", 32, 89, 0),
        ("two_cliques.edges", 16, 57, 0),
    ],
)
def test_shipped_files(name, nodes, edges, addresses):
    network = read_network(TOPOLOGIES / name)
    assert network.graph.number_of_nodes() == nodes
    assert network.graph.number_of_edges() == edges
    assert len(network.addresses) == addresses
    if name.endswith(".toml"):
        assert all(None not in link for link in network.links.values())


def pair(nodes='{id="a"}, {id="b"}', edges='{between=["a","b"]}', rest=""):
    return f"{rest}\nnodes = [{nodes}]\nedges = [{edges}]"


MALFORMED = [
    ("net.toml", "directed = ", "is not toml: "),
    ("net.toml", "colour = 1", "unknown key 'colour' in the file; it takes directed, nodes"),
    ("net.toml", pair('{id="a", adress="x"}'), "unknown key 'adress' in nodes[0]"),
    ("net.toml", pair(edges='{between=["a","b"], lag=1}'), "unknown key 'lag' in edges[0]"),
    ("net.toml", pair(rest="defaults = {lag = 1}"), "unknown key 'lag' in [defaults]"),
    ("net.toml", pair(rest="defaults = 1"), "defaults must be a table"),
    ("net.toml", pair(rest="directed = 1"), "directed = 1 is neither true nor false"),
    ("net.toml", pair(edges='{from="a", to="b"}'), "unknown key 'from' in edges[0] (directed = f"),
    ("net.toml", pair(edges='{between=["a"]}'), "edges[0].between = ['a'] is not a pair"),
    ("net.toml", pair(edges="{latency=1}"), "edges[0].between = None is not a pair"),
    ("net.toml", pair(rest="directed = true", edges='{from="a"}'), "edges[0] has no 'to'"),
    ("net.toml", "nodes = 3", "nodes must be a list of tables"),
    ("net.toml", pair("{speed=1.0}"), "nodes[0] has no 'id'"),
    ("net.toml", pair("{id=true}"), "nodes[0].id = True is no name"),
    ("net.toml", pair('{id="a"}, {id="a"}'), "node 'a' is there twice"),
    ("net.toml", "", "has no nodes"),
    ("net.toml", pair(edges='{between=["a","c"]}'), "names 'c', which is not among the nodes"),
    ("net.toml", pair(edges='{between=["a","a"]}'), "edge 'a' - 'a' joins a node to itself"),
    ("net.toml", pair(edges='{between=["a","b"]}, {between=["b","a"]}'), "is there twice"),
    ("net.toml", pair(edges=""), "is not connected: it falls into 2 parts, one of them 'a'"),
    (
        "net.toml",
        pair(rest="directed = true", edges='{from="a", to="b"}'),
        "not strongly connected",
    ),
    ("net.toml", pair(edges='{between=["a","b"], loss=1.5}'), "loss = 1.5 must be a probability"),
    ("net.toml", pair(edges='{between=["a","b"], loss=nan}'), "loss = nan must be a probability"),
    ("net.toml", pair(edges='{between=["a","b"], latency=-1}'), "latency = -1 must be seconds"),
    ("net.toml", pair(edges='{between=["a","b"], latency=inf}'), "latency = inf must be seconds"),
    ("net.toml", pair(edges='{between=["a","b"], bandwidth=0}'), "bandwidth = 0 must be bytes"),
    ("net.toml", pair(edges='{between=["a","b"], loss=true}'), "loss = True is not a number"),
    ("net.toml", pair(edges='{between=["a","b"], loss="x"}'), "loss = 'x' is not a number"),
    ("net.toml", pair('{id="a", speed=0}, {id="b"}'), "node 'a': speed = 0 must be a factor"),
    ("net.toml", pair('{id="a", address="here"}, {id="b"}'), "address = 'here' is not like tcp://"),
    ("net.toml", pair('{id="a", address="tcp://h:0"}, {id="b"}'), "address = 'tcp://h:0' is not"),
    ("net.toml", pair('{id="a", address=7}, {id="b"}'), "address = 7 is not like tcp://"),
    (
        "net.toml",
        pair('{id="a", address="tcp://h:1"}, {id="b", address="tcp://h:1"}'),
        "node 'b': address = 'tcp://h:1' is another node's too",
    ),
    ("net.json", "{", "is not json: "),
    ("net.json", "[]", "node-link JSON is an object"),
    ("net.json", "[" * 100_000, "is not json: "),
    ("net.json", '{"nodes": [{"id": 0}], "links": [3]}', "links must be a list of tables"),
    ("net.json", '{"nodes": [{"id": 0}], "links": [{"source": 0}]}', "links[0] has no 'target'"),
    ("net.json", '{"nodes": [{"id": 0}], "directed": "no"}', "directed = 'no' is neither"),
    (
        "net.json",
        '{"nodes": [{"id": 0}, {"id": 1}], "links": [{"source": 0, "target": 1, "latency": 1'
        + "0" * 400
        + "}]}",
        "must be seconds",
    ),
    ("net.graphml", "<graphml>", "is not graphml: "),
    ("net.graphml", "<graphml/>", "has 0 graphs; want one"),
    ("net.graphml", "<graphml><graph><node/></graph></graphml>", "a <node> has no 'id'"),
    ("net.graphml", "<!DOCTYPE x [<!ENTITY a 'b'>]><graphml/>", "document types and entities"),
    (
        "net.graphml",
        "<graphml><graph><node id='a'><data key='k'>1</data></node></graph></graphml>",
        "names the key 'k', which is not declared",
    ),
    (
        "net.graphml",
        "<graphml><key id='k' attr.name='speed'/><graph><node id='a'><data key='k'>x</data></node>"
        "</graph></graphml>",
        "speed = 'x' is not a number",
    ),
    (
        "net.graphml",
        "<graphml><graph><node id='a'/><node id='b'/><edge source='a' target='b' directed='true'/>"
        "</graph></graphml>",
        "directed and undirected edges are mixed",
    ),
    ("net.edges", "a b\nc", "line 2: want two names, found 'c' alone"),
    ("net.edges", "a b {'latency': 1}", "line 1: \"{'latency':\" is not latency=... or"),
    ("net.edges", "a b latency=soon", "latency = 'soon' is not a number"),
    ("net.edges", "", "has no nodes"),
    ("net.gml", "graph []", "its ending is none of .toml, .json"),
]


@pytest.mark.parametrize(("name", "text", "message"), MALFORMED)
def test_malformed_files_name_the_file_and_the_key(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError) as error:
        read_network(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_what_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="none\\.toml: cannot be read: No such file"):
        read_network(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        read_network(tmp_path / "folder.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(UserError, match="is not toml: 'utf-8' codec"):
        read_network(tmp_path / "latin.toml")
    monkeypatch.setattr(files, "LARGEST", 2**20)
    with pytest.raises(UserError, match="has 2 MB; a network has at most 1"):
        read_network(write(tmp_path, "huge.toml", "#" * 2**21))
