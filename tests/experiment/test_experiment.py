"""What an experiment file may say, and how it is told that something cannot be."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from examples import ARGUMENTS

from p2pfl.algorithms import ALGORITHMS
from p2pfl.errors import UserError
from p2pfl.experiment.config import NESTED
from p2pfl.experiment.experiment import Experiment
from p2pfl.experiment.files import located, shipped
from p2pfl.experiment.sections import SECTIONS
from p2pfl.topology import Topology

ROOT = Path(__file__).parents[2]


def problem(tables=None, *changes):
    with pytest.raises(UserError) as caught:
        Experiment.from_dict(tables or {}, changes=changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("algorithm=dpsdg", ["algorithm.name", "'dpsdg'", "did you mean 'dpsgd'", "push_sum"]),
        ("algorithm.gamma=0.3", ["algorithm.gamma", "fedavg takes: weight"]),
        ("optimiser.lr='fast'", ["optimiser.lr", "'fast'", "cosine"]),
        ("optimiser.lr=-1.0", ["optimiser", "lr", "-1.0"]),
        ("optimiser.momentum=true", ["optimiser.momentum", "True", "float"]),
        ("pace.rounds=2.5", ["pace.rounds", "2.5", "int"]),
        ("pace.rounds=0", ["rounds = 0", "below 1"]),
        ("pace={local_steps=3,local_epochs=1}", ["either local_steps or local_epochs"]),
        ("pace.patience=-1.0", ["patience = -1.0"]),
        ("pace={patience=0.0,stop='plateau'}", ["stopping rule", "patience"]),
        ("pace={patience=0.0,overlap=true}", ["overlap", "patience must be above 0"]),
        ("pace={name='timer',overlap=true}", ["pace.overlap", "timer"]),
        ("pace.stop={name='plateau',metric='acc'}", ["pace.stop.metric", "'acc'", "'eval_acc'"]),
        ("pace.stop='plateu'", ["pace.stop.name", "did you mean 'plateau'"]),
        ("nodes=0", ["nodes = 0"]),
        ("nodes='8'", ["nodes = '8'", "whole number"]),
        ("seed=-1", ["seed = -1"]),
        ("name='a/b'", ["name = 'a/b'"]),
        ("name='.'", ["name = '.'"]),
        ("name='..'", ["name = '..'"]),
        ('name="a\\u0000"', ["name = 'a\\x00'"]),
        ("base=5", ["base = 5", "folder"]),
        ('base="a\\u0000"', ["base = 'a\\x00'", "folder"]),
        ('output.dir="a\\u0000"', ["output.dir = 'a\\x00'"]),
        ("holdout.seed=9223372036854775808", ["holdout.seed = 9223372036854775808", "2^63"]),
        ("model.hidden=[8,9223372036854775808]", ["model.hidden[1] = ", "below 2^63"]),
        ("optimiser.weight_decay=-1e39", ["optimiser.weight_decay = -1e+39", "1e+38"]),
        ("algorithm={name='fedadam',tau=1e20}", ["tau", "at most 1e19", "1e+20"]),
        ("pace.stop='target:value=nan'", ["pace.stop", "value", "finite", "nan"]),
        ("pace.stop='plateau:min_delta=inf'", ["pace.stop", "min_delta", "finite", "inf"]),
        ("rounds=3", ["rounds", "no section", "pace"]),
        ("topology.degree=3", ["topology.degree", "complete takes no keys"]),
        ("topology=ring", ["fedavg", "'ring'", "complete", "dpsgd"]),
        ("mixing=''", ["mixing.name = ''", "metropolis"]),
        ("mixing=0", ["mixing = 0", "a section or a string"]),
        ("mixing=push", ["mixing.name = 'push'", "'fedavg'", "metropolis"]),
        ("partition={name='dirichlet'}", ["partition.alpha is missing"]),
        ("data=mnist", ["data.name = 'mnist'", "digits"]),
        ("data=csv", ["data.path is missing"]),
        ("model.hidden='64'", ["model.hidden", "'64'"]),
        ("model={name='custom',factory='nowhere.py:make'}", ["nowhere.py"]),
        ("training.backend=fast", ["training.backend", "'fast'", "'looped'"]),
        ("training.batch_size=0", ["batch_size = 0"]),
        ("training.batch_size=all", ["training.batch_size", "'all'"]),
        ("training.proximal=-0.1", ["proximal = -0.1"]),
        ("network.loss=2.0", ["loss = 2.0", "[0, 1]"]),
        ("evaluation.on=own", ["evaluation.on", "per_node", "random"]),
    ],
)
def test_a_mistake_is_named_with_its_key_its_value_and_the_choices(change, words):
    message = problem(None, change)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"nodes": 6, "topology": "hypercube", "algorithm": "dpsgd"}, ["n = 6", "4, 8"]),
        (
            {"nodes": 8, "topology": "random_regular:degree=8", "algorithm": "dpsgd"},
            ["degree = 8", "n = 8"],
        ),
        ({"nodes": 8, "topology": "torus:rows=3,cols=3", "algorithm": "dpsgd"}, ["3", "8"]),
        (
            {"algorithm": "push_sum", "mixing": "uniform", "topology": "star"},
            ["push_sum", "use push"],
        ),
        ({"algorithm": "dpsgd", "mixing": "push"}, ["dpsgd", "push_sum"]),
        ({"algorithm": "choco", "topology": "ring"}, ["algorithm.codec is missing"]),
        (
            {"algorithm": {"name": "choco", "codec": "top_k"}, "topology": "ring"},
            ["either k", "share"],
        ),
        (
            {"algorithm": {"name": "choco", "codec": "top_k:k=0"}, "topology": "ring"},
            ["algorithm.codec", "k = 0"],
        ),
        (
            {"algorithm": {"name": "choco", "codec": "top_k:k=9", "gamma": 2.0}},
            ["gamma = 2.0", "(0, 1]"],
        ),
        (
            {"algorithm": "d2", "topology": "exponential", "pace": {"local_steps": 1}},
            ["d2", "both ways"],
        ),
        ({"algorithm": "d2", "topology": "ring"}, ["d2", "pace.local_steps = 1"]),
        (
            {
                "algorithm": "d2",
                "nodes": 16,
                "topology": "torus",
                "mixing": "metropolis",
                "pace": {"local_steps": 1},
            },
            ["d2", "-0.600", "lazy = true"],
        ),
        (
            {"algorithm": "gradient_tracking", "pace": {"patience": 0.0}},
            ["gradient_tracking", "patience = 0"],
        ),
        ({"algorithm": "gradient_tracking", "pace": "timer"}, ["gradient_tracking", "timer"]),
        (
            {"algorithm": "gossip", "topology": "ring", "pace": {"overlap": True}},
            ["gossip", "pace.overlap", "fedavg"],
        ),
        (
            {
                "algorithm": {"name": "dpsgd", "order": "combine_then_adapt"},
                "pace": {"overlap": True},
            },
            ["dpsgd", "adapt_then_combine"],
        ),
        ({"algorithm": "fedavg", "pace": "timer"}, ["fedavg", "gossip"]),
        (
            {"algorithm": "local", "preprocess": {"standardise": "pooled"}},
            ["local", "standardise = 'own'"],
        ),
        (
            {"holdout": "none", "pace": {"stop": "target:value=0.9"}},
            ["eval_acc", "never measured"],
        ),
        ({"topology": "nowhere.toml", "algorithm": "dpsgd"}, ["nowhere.toml"]),
    ],
)
def test_impossible_combinations_are_refused(tables, words):
    message = problem(tables)
    for word in words:
        assert word in message


def test_a_partition_that_starves_a_node_is_refused_when_the_data_are_loaded():
    experiment = Experiment.from_dict({"nodes": 64, "partition": "dirichlet:alpha=0.01"})
    with pytest.raises(UserError, match=r"alpha = 0\.01.*min_partition_size"):
        experiment.federation()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_what_is_resolved_reads_as_itself(name):
    experiment = Experiment.load(name)
    again = Experiment.from_dict(tomllib.loads(experiment.to_toml()), experiment.base)
    assert again.to_dict() == experiment.to_dict()


def test_a_folder_whose_name_no_run_could_write_down_is_refused():
    with pytest.raises(
        UserError, match=r"^'/tmp/d\\udcff': the name of a folder here is not UTF-8"
    ):
        Experiment.from_dict({}, "/tmp/d\udcff")


def test_every_default_is_spelled_out():
    tables = Experiment.from_dict({}).to_dict()
    assert tables["optimiser"] == {
        "name": "sgd",
        "lr": 0.1,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
    }
    assert set(SECTIONS) <= set(tables)
    assert tables["nodes"] == 8


def test_nested_sections_and_short_forms_are_the_same():
    short = Experiment.from_dict(
        {"algorithm": {"name": "choco", "codec": "top_k:k=5", "gamma": 0.3}, "topology": "ring"}
    )
    long = Experiment.from_dict(
        {
            "algorithm": {"name": "choco", "gamma": 0.3, "codec": {"name": "top_k", "k": 5}},
            "topology": {"name": "ring"},
        }
    )
    assert short.to_dict() == long.to_dict()


def test_a_chain_of_optimisers_with_a_schedule():
    experiment = Experiment.from_dict(
        {
            "optimiser": {
                "name": "chain",
                "parts": [
                    {"name": "clip_norm", "norm": 1.0},
                    {"name": "sgd", "lr": {"name": "cosine", "start": 0.1, "steps": 50}},
                ],
            }
        }
    )
    assert experiment.to_dict()["optimiser"]["parts"][1]["lr"]["steps"] == 50
    message = problem({"optimiser": {"name": "chain", "parts": [{"name": "sgd", "lr": "cosin"}]}})
    assert "optimiser.parts[0].lr.name = 'cosin'" in message


def test_changes_are_made_before_anything_is_checked():
    experiment = Experiment.from_dict(
        {"topology": "ring"}, changes=["algorithm.name=dpsgd", "topology.name=grid", "nodes=9"]
    )
    assert experiment.topology.n == 9
    assert experiment.sections["topology"].name == "grid"


def with_algorithm(name: str) -> Experiment:
    """Return an experiment with an algorithm and what it cannot do without."""
    algorithm = {"name": name, **ARGUMENTS.get(name, {})}
    pulled = {"topology": "el_local:s=8,pull=true", "nodes": 16} if name == "rpel" else {}
    graph = {"relay": "chain", "powergossip": "ring"}.get(name, "complete")
    rounds = ARGUMENTS.get(name, {}).get("rounds", 4)
    pace = {"local_steps": 1, "rounds": rounds, "train_every": 2 if name == "chebyshev" else 1}
    tables = {"algorithm": algorithm, "pace": pace, "topology": graph}
    return Experiment.from_dict(tables | pulled)


def test_what_the_refusal_of_an_overlap_names_can_do_it():
    pace = {"local_steps": 1}
    able = {name for name in ALGORITHMS if with_algorithm(name).algorithm.carry}
    message = problem({"algorithm": "d2", "topology": "ring", "pace": pace | {"overlap": True}})
    named = re.findall(r"\w+", message.partition(": use ")[2].partition(" with order")[0])
    assert {*named} - {"or"} == able


def test_peers_with_and_without_overlap_do_not_go_together():
    pair = [Experiment.from_dict({"pace": {"overlap": overlap}}) for overlap in (False, True)]
    federation = pair[0].federation()
    found = [each.terms(each.task(federation, None)) for each in pair]
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"pace.overlap"}


def test_the_number_of_nodes_follows_from_the_topology(tmp_path):
    (tmp_path / "net.edges").write_text("0 1\n1 2\n2 3\n3 0\n")
    file = Experiment.from_dict({"algorithm": "dpsgd", "topology": "net.edges"}, tmp_path)
    sides = Experiment.from_dict({"algorithm": "dpsgd", "topology": "torus:rows=3,cols=4"})
    assert (file.nodes, sides.nodes) == (4, 12)
    with pytest.raises(UserError, match=r"nodes = 5.*has 4"):
        Experiment.from_dict({"nodes": 5, "algorithm": "dpsgd", "topology": "net.edges"}, tmp_path)


def test_the_mixing_rule_follows_the_algorithm():
    rule = {name: with_algorithm(name).sections["mixing"] for name in ALGORITHMS}
    assert rule["push_sum"].name == "push"
    assert rule["d2"].values == {"lazy": True}
    assert rule["dpsgd"].values == {"lazy": False}


def test_a_model_of_the_users_own_and_the_same_weights_everywhere(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make(shape, outputs, width):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, outputs))\n"
    )
    tables = {
        "nodes": 2,
        "model": {"name": "custom", "factory": "mine.py:make", "options": {"width": 3}},
    }
    experiment = Experiment.from_dict(tables, tmp_path)
    whole = experiment.task(experiment.federation(), None)
    alone = experiment.task(experiment.federation(only=1), None)
    assert whole.d == 64 * 3 + 3 + 3 * 10 + 10
    assert torch.equal(whole.init(torch.tensor([1])), alone.init(torch.tensor([1])))


def test_a_peer_holds_its_own_part_only():
    experiment = Experiment.from_dict({"nodes": 5, "partition": "dirichlet:alpha=0.5"})
    whole, alone = experiment.federation(), experiment.federation(only=3)
    assert alone.train.nodes.tolist() == [3]
    assert torch.equal(alone.train.x, whole.train.rows_of(3).x)


def test_terms_differ_where_the_experiments_do_and_nowhere_else():
    def terms(**tables):
        experiment = Experiment.from_dict({"nodes": 3, "model": "logistic"} | tables)
        return experiment.terms(experiment.task(experiment.federation(only=0), None))

    base = terms()
    assert terms(output={"models": "none"}, network={"loss": 0.5}, name="other") == base
    for changed, key in (
        ({"seed": 1}, "seed"),
        ({"optimiser": "sgd:lr=0.2"}, "optimiser.lr"),
        ({"topology": "ring", "algorithm": "dpsgd"}, "topology.name"),
    ):
        other = terms(**changed)
        assert key in {k for k in base.keys() | other.keys() if base.get(k) != other.get(k)}


def test_a_biased_mixing_is_remarked_on():
    star = Experiment.from_dict({"algorithm": "dpsgd", "topology": "star", "mixing": "uniform"})
    assert "push_sum" in star.notes[0]
    assert Experiment.from_dict({"algorithm": "dpsgd", "topology": "star"}).notes == []


def test_the_largest_whole_number_is_a_seed():
    seed = 2**63 - 1
    resolved = Experiment.from_dict({"seed": seed, "algorithm": "choco:codec=int8"}).to_dict()
    assert resolved["algorithm"]["seed"] == seed


def test_a_file_with_a_number_of_thousands_of_digits_is_told_in_one_line(tmp_path):
    (tmp_path / "long.toml").write_text(f"nodes = 1{'0' * 5000}")
    with pytest.raises(UserError, match=r"long\.toml is not valid TOML"):
        Experiment.load(tmp_path / "long.toml")


def test_a_path_that_cannot_be_looked_at_is_told_in_one_line():
    with pytest.raises(UserError, match=r"x\.toml cannot be read: File name too long"):
        Experiment.load("x" * 300 + ".toml")
    factory = "x" * 300 + ".py:make"
    with pytest.raises(UserError, match=r"x\.py cannot be read: File name too long"):
        Experiment.from_dict({"model": {"name": "custom", "factory": factory}})


def test_the_reference_page_is_up_to_date():
    command = [sys.executable, ROOT / "scripts" / "write_reference.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run scripts/write_reference.py"


def test_the_reference_page_lists_parameters_only():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    tables = [*(kind.table for kind in SECTIONS.values()), *NESTED.values()]
    factories = [factory for table in tables for factory in table.values()]
    known = {name for factory in factories for name in inspect.signature(factory).parameters}
    assert set(re.findall(r"^- `(\w+)`: ", page, re.MULTILINE)) <= known


@pytest.mark.parametrize(
    ("change", "rate"), [("optimiser.momentum=0.9", 0.1), ("optimiser.name=adam", 0.001)]
)
def test_the_default_optimiser_makes_way_for_another(change, rate):
    assert Experiment.from_dict({}, changes=[change]).to_dict()["optimiser"]["lr"] == rate


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("boom", "mine.py:boom): RuntimeError: no such luck"),
        ("wide", "mine.py:wide): RuntimeError: mat1 and mat2"),
        ("few", "makes [3] of an example, not [10]"),
        ("nothing", "not an nn.Module"),
        ("two", "mine.py:two) makes a tuple of examples, not a tensor"),
        ("aside", "mine.py:aside) keeps parameters in a place of its own as well, where training"),
    ],
)
def test_what_is_wrong_with_a_model_of_the_users_own_is_told_in_one_line(tmp_path, name, words):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def boom(shape, outputs): raise RuntimeError('no such luck')\n"
        "def wide(shape, outputs): return nn.Sequential(nn.Flatten(), nn.Linear(3, outputs))\n"
        "def few(shape, outputs): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
        "def nothing(shape, outputs): return None\n"
        "class Two(nn.Module):\n"
        "    def forward(self, x): return x, x\n"
        "def two(shape, outputs): return Two()\n"
        "class Aside(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(64, 10)\n"
        "        self.weights = [self.linear.weight]\n"
        "    def forward(self, x): return x.flatten(1) @ self.weights[0].T + self.linear.bias\n"
        "def aside(shape, outputs): return Aside()\n"
    )
    tables = {"nodes": 2, "model": {"name": "custom", "factory": f"mine.py:{name}"}}
    experiment = Experiment.from_dict(tables, tmp_path)
    with pytest.raises(UserError) as caught:
        experiment.task(experiment.federation(), None)
    assert words in str(caught.value)


def test_missing_values_that_nothing_fills_in_are_refused(tmp_path):
    rows = "\n".join(f"{i},{'' if i % 7 == 0 else i * 2},{i % 2}" for i in range(60))
    (tmp_path / "t.csv").write_text(f"a,b,y\n{rows}\n")
    tables = {"nodes": 2, "data": "csv:path=t.csv,target=y", "model": "logistic"}
    experiment = Experiment.from_dict(tables, tmp_path)
    with pytest.raises(UserError, match=r"column b has missing values.*standardise"):
        experiment.task(experiment.federation(), None)
    own = Experiment.from_dict(tables | {"preprocess": {"standardise": "own"}}, tmp_path)
    federation = own.federation()
    assert own.task(federation, own.affine(federation)).d == 2 * 2 + 2


def test_what_draws_lots_follows_the_seed_unless_it_has_its_own():
    def graph(of_all, **own):
        topology = {"name": "random_regular", "degree": 3} | own
        tables = {"nodes": 20, "algorithm": "dpsgd", "topology": topology} | {"seed": of_all}
        return Experiment.from_dict(tables).topology.links(0).senders.tolist()

    assert graph(1) != graph(2)
    assert graph(1, seed=7) == graph(2, seed=7)


def test_a_resolved_experiment_finds_its_files_from_anywhere(tmp_path, monkeypatch):
    rows = "\n".join(f"{i},{i % 2}" for i in range(60))
    (tmp_path / "t.csv").write_text(f"a,y\n{rows}\n")
    experiment = Experiment.from_dict({"nodes": 2, "data": "csv:path=t.csv,target=y"}, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.toml").write_text(experiment.to_toml())
    again = Experiment.load(tmp_path / "run" / "experiment.toml")
    assert len(again.federation().train.y) == len(experiment.federation().train.y)


@pytest.mark.parametrize(
    ("section", "spec", "key"),
    [
        ("topology", "d_cliques:path=counts.json,size=2", "path"),
        ("topology", "file:path=net.edges", "path"),
        ("model", "custom:factory=net.py:make", "factory"),
    ],
)
def test_paths_in_short_sections_start_at_the_folder_of_the_experiment(
    section, spec, key, tmp_path
):
    value = located(section, spec, tmp_path)
    assert isinstance(value, dict)
    assert str(value[key]).startswith(str(tmp_path))
    assert located(section, "ring", tmp_path) == {"name": "ring"}


def test_a_folder_does_not_hide_an_experiment_that_ships(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Experiment.load("digits").name == "digits"


def test_the_matrix_of_every_round_is_that_of_its_links():
    experiment = Experiment.from_dict({"nodes": 4, "algorithm": "dpsgd", "topology": "ring"})
    task = experiment.task(experiment.federation(), None)
    ring, links = experiment.setup(task), experiment.topology.links(0)
    assert torch.equal(ring.weights(7), ring.weights(0))
    asked = []

    def never_the_same(round):
        asked.append(round)
        return links

    object.__setattr__(experiment, "topology", Topology(4, never_the_same, None))
    assert experiment.setup(task).weights(7).shape == (4, 4)
    assert asked == [7]
    assert type(asked[0]) is int
