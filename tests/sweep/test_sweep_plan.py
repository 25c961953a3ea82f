"""Sweep files: what they ask for, and mistakes that show before anything has run."""

import re
import tomllib
from pathlib import Path

import pytest

from p2pfl.errors import UserError
from p2pfl.sweep import run_sweep
from p2pfl.sweep.combine import combinations, runs, seeds
from p2pfl.sweep.plan import read_plan

ROOT = Path(__file__).parents[2]
TINY = {"nodes": 3, "seed": 4, "model": "logistic", "pace": {"rounds": 2, "local_steps": 1}}


def planned(**tables):
    return runs(read_plan({"experiment": TINY, **tables}))


def test_cases_times_grid_times_seeds():
    cases = [
        {"label": "plain", "set": {"algorithm": "fedavg"}},
        {"label": "ring", "set": {"algorithm": "dpsgd", "topology": "ring"}},
    ]
    found = planned(cases=cases, grid={"pace.rounds": [1, 2, 3], "nodes": [3, 4]}, seeds=[7, 9])
    assert len(found) == 2 * 3 * 2 * 2
    assert len({run.name for run in found}) == len(found)
    assert found[0].name == "plain,rounds=1,nodes=3-seed7"
    assert found[-1].name == "ring,rounds=3,nodes=4-seed9"
    assert found[0].combination.varied == {"case": "plain", "pace.rounds": 1, "nodes": 3}


def test_a_number_of_seeds_counts_from_the_experiments_own():
    assert seeds(read_plan({"experiment": TINY, "seeds": 3})) == [4, 5, 6]
    assert seeds(read_plan({"experiment": TINY, "seeds": 2, "set": {"seed": 10}})) == [10, 11]
    assert seeds(read_plan({"experiment": TINY, "seeds": [3, 1]})) == [3, 1]


def test_what_draws_lots_follows_the_seed_of_the_run():
    drawn = {"name": "random_regular", "degree": 2}
    one, two = planned(set={"algorithm": "dpsgd", "topology": drawn, "nodes": 6}, seeds=[1, 2])
    assert re.search(r"^\[topology\][^[]*^seed = 1$", one.text, flags=re.M)
    assert re.search(r"^\[topology\][^[]*^seed = 2$", two.text, flags=re.M)


@pytest.mark.parametrize("quote", ['"', ""])
def test_dotted_keys_change_one_key_with_or_without_quotes(quote, tmp_path):
    key = f"{quote}pace.rounds{quote}"
    (tmp_path / "mine.toml").write_text('model = "logistic"\n[pace]\nrounds = 9\nlocal_steps = 7\n')
    file = tmp_path / "s.toml"
    file.write_text(f'experiment = "mine.toml"\nset = {{ {key} = 5 }}\n')
    (run,) = runs(read_plan(file))
    assert "rounds = 5" in run.text
    assert "local_steps = 7" in run.text
    file.write_text(f'experiment = "mine.toml"\n[grid]\n{key} = [3, 4]\n')
    assert ["rounds = 3" in run.text for run in runs(read_plan(file))] == [True, False]


def test_whole_sections_as_texts_and_as_tables():
    torus = [{"name": "torus", "rows": 3, "cols": 4}, "torus:rows=4,cols=3", "ring"]
    found = planned(set={"algorithm": "dpsgd", "nodes": 12}, grid={"topology": torus})
    assert [run.combination.label for run in found] == [
        "topology=torus:rows=3,cols=4",
        "topology=torus:rows=4,cols=3",
        "topology=ring",
    ]
    assert all(f"rows = {rows}" in run.text for run, rows in zip(found, (3, 4), strict=False))


def test_a_table_without_a_name_changes_only_the_keys_in_it():
    found = planned(grid={"pace": [{"rounds": 5}, {"rounds": 6, "local_steps": 2}, {}]})
    paces = [tomllib.loads(run.text)["pace"] for run in found]
    assert [(p["rounds"], p["local_steps"]) for p in paces] == [(5, 1), (6, 2), (2, 1)]


def test_names_of_folders_are_safe_and_all_different():
    labels = ["a b", "a/b", "a:b", "..", "ä", "ö", "x" * 300, "x" * 301]
    cases = [{"label": label} for label in labels]
    found = combinations(read_plan({"experiment": TINY, "cases": cases, "grid": {"nodes": [3]}}))
    assert len({combination.slug for combination in found}) == len(labels)
    for combination in found:
        assert re.fullmatch(r"[A-Za-z0-9_=,+-][A-Za-z0-9._=,+-]{0,200}", combination.slug)


def test_a_plan_that_grows_leaves_every_run_in_its_folder():
    cases = [{"label": label} for label in ("a b", "a-b", "a/b", "c")]
    few, many = planned(cases=cases[:1]), planned(cases=cases)
    assert many[0].name == few[0].name
    assert [run.name for run in many[1::2]] == ["a-b-seed4", "c-seed4"]


def test_texts_are_written_as_toml_whatever_is_in_them(tmp_path):
    odd = "".join(map(chr, range(1, 32))) + '\x7f"\\é😀'
    plan = read_plan({"experiment": TINY | {"name": odd, f"\0{odd}": 1}, "cases": [{"label": odd}]})
    (tmp_path / "sweep.toml").write_text(plan.to_toml([1]), encoding="utf-8")
    assert read_plan(tmp_path / "sweep.toml").cases == plan.cases
    assert read_plan(tmp_path / "sweep.toml").experiment == plan.experiment


def test_the_plan_in_the_folder_asks_for_the_same(tmp_path):
    (tmp_path / "mine.toml").write_text('model = "logistic"\nseed = 3\n')
    file = tmp_path / "plan.toml"
    file.write_text(
        'experiment = "mine.toml"\nseeds = 2\nset = { pace.rounds = 2 }\n'
        '[grid]\nalgorithm = ["fedavg", {name = "dpsgd"}, {name = "fedavg", weight = "uniform"}]\n'
        '[[cases]]\nlabel = "few"\nset = { nodes = 3 }\n'
    )
    plan = read_plan(file)
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / "sweep.toml"
    again.write_text(plan.to_toml(seeds(plan)))
    assert runs(read_plan(again)) == runs(plan)


def test_a_whole_section_goes_before_the_keys_in_it():
    common = {"optimiser.lr": 0.3, "optimiser": {"name": "sgd", "momentum": 0.5}}
    found = planned(set=common, grid={"pace.rounds": [2, 3]})
    assert all("lr = 0.3\nmomentum = 0.5" in run.text for run in found)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sedes": 3}, r"sweep\.sedes is unknown; did you mean 'seeds'"),
        ({"experiment": "digitz"}, r"no experiment 'digitz'"),
        ({"on": "cluster"}, r"sweep\.on = 'cluster'.*simulate"),
        ({"seeds": 0}, "seeds = 0"),
        ({"seeds": []}, r"seeds = \[\]"),
        ({"seeds": [1, 1]}, "seeds holds 1 twice"),
        ({"name": "a/b"}, "name = 'a/b'"),
        ({"name": ".."}, r"name = '\.\.'"),
        ({"name": "a\0b"}, r"sweep\.name = 'a\\x00b'"),
        ({"grid": {"nodes": []}}, r"grid\.nodes = \[\]"),
        ({"grid": {"nodes": 4}}, r"grid\.nodes = 4: expected a list"),
        ({"grid": {"nodes": [4, 4]}}, r"grid\.nodes holds 4 twice"),
        ({"grid": {"seed": [1, 2]}}, "seed stands in the grid or a case"),
        ({"grid": {"nodes": [3, 0]}}, "combination nodes=0, seed 4: nodes = 0"),
        ({"grid": {"pace.rounds": [1, "few"]}}, r"combination rounds=few.*pace\.rounds = 'few'"),
        ({"grid": {"algorithm": ["fedavg", "dpsdg"]}}, "algorithm=dpsdg.*did you mean 'dpsgd'"),
        ({"cases": []}, r"cases = \[\]"),
        ({"cases": [{"set": {}}]}, r"cases\[0\]\.label is missing"),
        ({"cases": [{"label": "a", "set": {}}] * 2}, "cases holds 'a' twice"),
        (
            {"cases": [{"label": "a", "set": {"nodes": 3}}], "grid": {"nodes": [3]}},
            r"grid\.nodes would undo nodes of case 'a'",
        ),
    ],
)
def test_mistakes_show_before_anything_has_run(wrong, told, tmp_path):
    with pytest.raises(UserError, match=told) as caught:
        run_sweep({"experiment": TINY, **wrong}, tmp_path / "out", jobs=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["experiment = ", None])
def test_a_file_that_cannot_be_read(text, tmp_path):
    if text is not None:
        (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UserError, match=r"s\.toml (is not valid TOML|cannot be read)"):
        read_plan(tmp_path / "s.toml")


def test_what_is_wrong_in_a_file_is_told_with_its_name(tmp_path):
    (tmp_path / "s.toml").write_text("seeds = 2")
    with pytest.raises(UserError, match=r"s\.toml: sweep\.experiment is missing"):
        read_plan(tmp_path / "s.toml")


def test_the_script_is_valid():
    assert len(runs(read_plan(ROOT / "scripts/sweeps/topologies.toml"))) == 4 * 2 * 3


def test_the_examples_of_the_page_are_valid(tmp_path):
    page = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    plan, cases = re.findall(r"```toml\n(.*?)```", page, flags=re.S)
    (tmp_path / "s.toml").write_text(plan + cases)
    assert len(runs(read_plan(tmp_path / "s.toml"))) == 2 * 2 * 3 * 5
