"""Tables read from files the tests write."""

from __future__ import annotations

import math

import pytest
import torch

from p2pfl.data import DATASETS, HOLDOUTS, PARTITIONERS, Column, Encoder, federate
from p2pfl.errors import UserError

csv = DATASETS["csv"]

BANK = """age, job, sex, city, good
30, clerk, f, Bern, 1
41.5, smith, m, Bonn, 2
?, clerk, f, Bern, 1
50, , m, Rome, 2
"""


@pytest.fixture
def bank(tmp_path):
    (tmp_path / "bank.csv").write_text(BANK)
    return tmp_path


def load(folder, *args, only=None, **keys):
    return csv(*args, **keys).load(folder, only)


def refused(folder, *args, **keys):
    with pytest.raises(UserError) as caught:
        load(folder, *args, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_numbers_categories_and_missing_values(bank):
    data = load(bank, "bank.csv", "good", drop=("city",), categorical=("job", "sex"))
    assert data.features == ("age", "job=clerk", "job=smith", "sex=f", "sex=m")
    assert data.numeric.tolist() == [True, False, False, False, False]
    assert data.classes == ("1", "2")
    assert (data.outputs, data.shape) == (2, (5,))
    assert data.y.tolist() == [0, 1, 0, 1]
    nan = torch.nan
    expected = [[30, 1, 0, 1, 0], [41.5, 0, 1, 0, 1], [nan, 1, 0, 1, 0], [50, nan, nan, 0, 1]]
    torch.testing.assert_close(data.x, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


def test_drop_missing_looks_only_at_what_is_used(bank):
    data = load(bank, "bank.csv", "good", features=("age",), drop_missing=True)
    assert data.x.flatten().tolist() == [30, 41.5, 50]
    assert data.y.tolist() == [0, 1, 1]


def test_features_choose_the_order(bank):
    data = load(bank, "bank.csv", "good", features=("sex", "age"), categorical=("sex",))
    assert data.features == ("sex=f", "sex=m", "age")


def test_binary_targets_and_regression(bank):
    keys = {"features": ("sex",), "categorical": ("sex",)}
    assert load(bank, "bank.csv", "good", positive=2, **keys).y.tolist() == [0, 1, 0, 1]
    assert load(bank, "bank.csv", "city", positive=("Rome", "Bonn"), **keys).y.tolist() == [
        *(0, 1, 0, 1)
    ]
    above = load(bank, "bank.csv", "age", target_above=35, drop_missing=True, **keys)
    assert (above.y.tolist(), above.classes) == ([0, 1, 1], ("0", "1"))
    number = load(bank, "bank.csv", "age", task="regression", drop_missing=True, **keys)
    assert (number.y.tolist(), number.classes, number.outputs) == ([30, 41.5, 50], (), 1)
    ordered = load(bank, "bank.csv", "city", classes=("Rome", "Bonn", "Bern", "Oslo"), **keys)
    assert (ordered.y.tolist(), ordered.outputs) == ([2, 1, 2, 0], 4)


def test_groups_own_rows(bank):
    data = load(bank, "bank.csv", "good", features=("age",), group="city")
    assert data.group_names == ("Bern", "Bonn", "Rome")
    assert data.groups.tolist() == [0, 1, 0, 2]
    short = load(bank, "bank.csv", "good", features=("age",), group="city", group_prefix=2)
    assert short.group_names == ("Be", "Bo", "Ro")
    both = load(bank, "bank.csv", "good", group="city", categorical=("job", "sex", "city"))
    assert "city=Rome" in both.features


def test_no_header_other_delimiter_row_numbers_and_byte_order_mark(tmp_path):
    (tmp_path / "a").write_text("1;2.0;x\n2;3.0;y\n")
    data = load(tmp_path, "a", "t", columns=("a", "b", "t"), delimiter=";")
    assert (data.features, data.classes) == (("a", "b"), ("x", "y"))
    (tmp_path / "b").write_text('\ufeff"v","w"\n"1",5,0\n"2",6,1\n\n')
    data = load(tmp_path, "b", "w", row_numbers=True)
    assert (data.features, data.x.tolist(), data.y.tolist()) == (("v",), [[5], [6]], [0, 1])


def test_whole_numbers_are_one_category_however_written(tmp_path):
    (tmp_path / "t.csv").write_text("k,y\n1,0\n1.0,1.0\n10.0,0.0\n9,1\n")
    data = load(tmp_path, "t.csv", "y", categorical=("k",))
    assert data.features == ("k=1", "k=9", "k=10")
    assert data.x.argmax(1).tolist() == [0, 0, 2, 1]
    assert data.y.tolist() == [0, 1, 0, 1]


HOSPITALS = {
    "path": ("a.csv", "b.csv", "c.csv"),
    "target": "ill",
    "target_above": 0,
    "categorical": {"ward": ("x", "y", "z")},
}


@pytest.fixture
def hospitals(tmp_path):
    for name, text in {"a": "1,x,0\n2,y,3\n", "b": "3,x,0\n4,z,0\n?,z,0\n", "c": "6,y,1\n"}.items():
        (tmp_path / f"{name}.csv").write_text("age,ward,ill\n" + text)
    return tmp_path


def test_one_file_per_node(hospitals):
    source = csv(**HOSPITALS)
    whole = source.load(hospitals, None)
    assert source.files == 3
    assert whole.groups.tolist() == [0, 0, 1, 1, 1, 2]
    assert whole.group_names == ("a.csv", "b.csv", "c.csv")
    for peer in range(3):
        part = source.load(hospitals, peer)
        mine = whole.groups == peer
        assert (part.only, part.classes, part.features) == (peer, whole.classes, whole.features)
        assert part.groups.tolist() == [peer] * int(mine.sum())
        torch.testing.assert_close(part.x, whole.x[mine], equal_nan=True)
        assert part.y.equal(whole.y[mine])


def test_a_peer_opens_no_other_file(hospitals):
    (hospitals / "a.csv").unlink()
    source = csv(**HOSPITALS)
    assert len(source.load(hospitals, 1).y) == 3
    with pytest.raises(UserError, match=r"a\.csv: there is no such file"):
        source.load(hospitals, None)
    with pytest.raises(UserError, match="no file for node 3"):
        source.load(hospitals, 3)


@pytest.mark.parametrize("peer", range(3))
def test_a_peer_has_what_the_full_federation_gives_it(hospitals, peer):
    source, natural = csv(**HOSPITALS), PARTITIONERS["natural_id"]()
    holdout = HOLDOUTS["per_node"](0.4)
    whole = federate(source.load(hospitals, None), natural, holdout, 3, 5)
    alone = federate(source.load(hospitals, peer), natural, holdout, 3, 5, peer)
    assert alone.test is None
    assert len(whole.test.y) == sum(whole.own_test.count.tolist())
    for mine, theirs in ((alone.train, whole.train), (alone.own_test, whole.own_test)):
        torch.testing.assert_close(mine.rows_of(peer), theirs.rows_of(peer), equal_nan=True)


def test_a_peer_cannot_do_what_needs_all_rows(hospitals):
    data = csv(**HOSPITALS).load(hospitals, 1)
    natural, none = PARTITIONERS["natural_id"](), HOLDOUTS["none"]()
    with pytest.raises(UserError, match="use the partition natural_id"):
        federate(data, PARTITIONERS["iid"](), none, 3, 0, 1)
    with pytest.raises(UserError, match="use the holdout per_node"):
        federate(data, natural, HOLDOUTS["random"](), 3, 0, 1)
    with pytest.raises(UserError, match="only the file of node 1"):
        federate(data, natural, none, 3, 0)


def test_a_list_with_a_group_is_one_table(hospitals):
    source = csv(("a.csv", "b.csv"), "ill", target_above=0, group="ward")
    data = source.load(hospitals, 1)
    assert (source.files, data.only, len(data.y)) == (None, None, 5)
    assert data.group_names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"path": "no.csv"}, ["no.csv", "no such file"]),
        ({"target": "goood"}, ["bank.csv", "'goood'", "'age', 'job', 'sex', 'city', 'good'"]),
        ({"drop": ("ages",)}, ["drop", "'ages'"]),
        ({"features": ("ages",)}, ["features", "'ages'"]),
        ({"categorical": ("jobs",)}, ["categorical", "'jobs'"]),
        ({"group": "town"}, ["group", "'town'"]),
        ({}, ["bank.csv, line 2", "'job'", "'clerk'", "categorical"]),
        (
            {"categorical": {"job": ("smith",), "sex": ("f", "m")}, "drop": ("city",)},
            ["line 2", "'job'", "'clerk'", "known are 'smith'"],
        ),
        ({"features": ("age",), "missing": ()}, ["line 4", "'age'", "'?'"]),
        ({"features": ("age",), "classes": (1, 3)}, ["line 3", "'2'", "'1', '3'"]),
        ({"features": ("age",), "positive": 3}, ["same class", "'good'"]),
        ({"features": ("sex",), "target": "age"}, ["line 4", "'age'", "drop_missing"]),
        ({"features": ("age",), "group": "job"}, ["line 5", "'job'", "owner is missing"]),
        ({"features": ("age",), "drop": ("job",)}, ["exclude each other"]),
        ({"features": ("good",)}, ["'good'", "cannot be a feature"]),
        ({"features": ("age",), "categorical": ("job",)}, ["'job'", "leave out"]),
        ({"drop": ("age", "job", "sex", "city")}, ["no column is left"]),
        ({"positive": 1, "target_above": 2.0}, ["positive and target_above exclude"]),
        ({"positive": ()}, ["positive = []"]),
        ({"classes": ("a", "a")}, ["two or more different"]),
        ({"classes": (1, 2), "task": "regression"}, ["not for regression"]),
        ({"delimiter": "::"}, ["one character"]),
        ({"group_prefix": 3}, ["group_prefix"]),
        ({"path": ()}, ["names no file"]),
        ({"path": ("bank.csv",)}, ["one file per node", "'good'", "target_above"]),
        ({"path": ("bank.csv",), "categorical": ("job",)}, ["table of allowed values"]),
        ({"row_numbers": True}, ["line 2", "5 fields", "5 columns"]),
    ],
)
def test_refusals_of_a_good_file(bank, keys, parts):
    message = refused(bank, **{"path": "bank.csv", "target": "good", **keys})
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no rows"]),
        ("a,y\n", ["no rows"]),
        ("a,y\n1,0\n2,1,7\n", ["line 3", "3 fields", "row_numbers"]),
        ("a,y\n1,0\n2\n", ["line 3", "1 fields"]),
        ("a,a,y\n1,1,0\n", ["two columns", "'a'", "columns"]),
        ("a,y\n1,0\n1e60,1\n", ["line 3", "'1e60'", "finite"]),
        ("a,y\n1,0\nInf,1\n", ["line 3", "'Inf'", "finite"]),
        ("a,y\n1,1\n2,1\n", ["same class"]),
        ("a,y\n" + "".join(f"1,{k}\n" for k in range(30)), ["30 different", "regression"]),
    ],
)
def test_refusals_of_bad_files(tmp_path, text, parts):
    (tmp_path / "t.csv").write_text(text)
    message = refused(tmp_path, "t.csv", "y")
    for part in ["t.csv", *parts]:
        assert part in message


def test_other_refusals(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,y\n\xff\xfe,0\n")
    assert "cannot be read" in refused(tmp_path, "t.csv", "y")
    assert "cannot be read" in refused(tmp_path, ".", "y")
    (tmp_path / "t.csv").write_text("a,y\n?,0\n?,1\n")
    assert "leaves no row" in refused(tmp_path, "t.csv", "y", drop_missing=True)
    (tmp_path / "u.csv").write_text("b,y\n1,0\n1,1\n")
    both = refused(tmp_path, ("t.csv", "u.csv"), "y", classes=(0, 1))
    assert "u.csv: its columns are 'b', 'y'; those of" in both


def test_an_encoder_survives_json_and_encodes_new_rows(bank):
    data = load(bank, "bank.csv", "good", drop=("city",), categorical=("job", "sex"))
    encoder = Encoder.from_json(data.encoder.to_json())
    assert encoder == data.encoder
    header, *lines = [[t.strip() for t in line.split(",")] for line in BANK.splitlines()]
    x = encoder.encode([dict(zip(header, line, strict=True)) for line in lines])
    torch.testing.assert_close(x, data.x, equal_nan=True)
    with pytest.raises(UserError, match="row 1, column 'job' is not there"):
        encoder.encode([{"age": "1"}])
    with pytest.raises(UserError, match="row 1, column 'age': 'x' is not a number"):
        encoder.encode([{"age": "x", "job": "clerk", "sex": "f"}])
    assert math.isnan(encoder.encode([{"age": "NA", "job": "", "sex": "f"}])[0, 0])
    assert encoder.encode([]).shape == (0, 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"columns": [{"name": 3, "values": null}], "missing": []}',
        '{"columns": [{"name": "a", "values": "xy"}], "missing": []}',
    ],
)
def test_what_is_no_encoder_is_refused(text):
    with pytest.raises(UserError, match="not the JSON of an encoder"):
        Encoder.from_json(text)


def test_an_encoder_of_numbers_only():
    encoder = Encoder((Column("a"), Column("b")))
    assert encoder.encode([{"a": "1", "b": " 2 "}]).tolist() == [[1, 2]]
