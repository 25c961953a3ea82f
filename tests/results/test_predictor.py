from __future__ import annotations

import copy
import csv
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

import p2pfl
from p2pfl.cli.predict import Format, predict
from p2pfl.data import PARTITIONERS, Affine, Dataset, federate, moments_by_node, standardise
from p2pfl.data.datasets import DATASETS
from p2pfl.data.holdout import HOLDOUTS
from p2pfl.errors import RunError, UserError
from p2pfl.learning import LOSSES, MODELS, ModelTask, default_loss, per_node
from p2pfl.results.predictor import Predictor, Signature
from p2pfl.results.record import Recorder
from p2pfl.results.saved import load, save_tensors

CLINIC = """age;kind;pain;ill
41;a;1.5;no
?;b;2;yes
63;;0.5;yes
37;a;;no
50;b;1;no
58;a;3;yes
"""
HEADLESS = 'name = "tiny"\n'


def clinic(tmp_path):
    (tmp_path / "clinic.csv").write_text(CLINIC)
    source = DATASETS["csv"](
        path="clinic.csv", target="ill", categorical=["kind"], delimiter=";", classes=["no", "yes"]
    )
    return source.load(tmp_path, None)


def trained(dataset, model, loss=None, dtype=torch.float32):
    """Return a task over two nodes, its federation, and models ``[2, d]`` off the start."""
    federation = federate(dataset, PARTITIONERS["iid"](), HOLDOUTS["none"](), 2, seed=0)
    loss = loss or default_loss(len(federation.classes))
    affine = None
    if federation.numeric is not None:
        moments = moments_by_node(federation.train, federation.numeric)
        affine = per_node(standardise(moments, federation.numeric, dtype))
    torch.manual_seed(0)
    module = model(federation.shape, loss.outputs(len(federation.classes)))
    task = ModelTask(module, loss, federation.train, affine=affine, dtype=dtype, batch_size=4)
    nodes = torch.arange(2)
    params = task.init(nodes)
    for step in range(3):
        params = params - 0.1 * task.grad(params, nodes, torch.full((2,), step))[1]
    return task, Signature.of(federation, loss), params


def recorded(folder, predictors, model, **meta):
    recorder = Recorder(folder, f"{HEADLESS}model = {model}\n", **meta)
    for which, predictor in predictors.items():
        recorder.model(which, *save_tensors(predictor, round=3))
    recorder.finish("finished", {})
    return folder


MODEL = '{name = "mlp", hidden = [5]}'


@pytest.fixture
def heart(tmp_path):
    """A run over the clinic's table, with its predictors by node."""
    task, signature, params = trained(clinic(tmp_path), MODELS["mlp"](hidden=[5]))
    predictors = {node: Predictor.of(task, signature, params[node], node) for node in (0, 1)}
    return recorded(tmp_path / "run", predictors, MODEL), predictors, task, params


def test_a_predictor_does_what_the_task_does(heart):
    _, predictors, task, params = heart
    raw = task.train.x
    for node, predictor in predictors.items():
        seen = task.standardised(raw[None], torch.tensor([node]))[0]
        due = task.predictor(params[node], node)(seen)
        torch.testing.assert_close(predictor(raw), due, rtol=0, atol=0)
        chances = predictor.probabilities(raw)
        torch.testing.assert_close(chances, due.softmax(1))
        assert predictor.predict(raw) == [predictor.classes[k] for k in due.argmax(1)]
    assert not torch.equal(predictors[0].shift, predictors[1].shift)


def test_what_is_loaded_is_what_was_saved(heart):
    folder, predictors, task, _ = heart
    state = torch.random.get_rng_state()
    for node, before in predictors.items():
        after = load(folder, node)
        assert after.signature == before.signature
        assert not after.training
        torch.testing.assert_close(after(task.train.x), before(task.train.x), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


class Normed(nn.Module):
    """Has running statistics, tied weights, a lasting and a passing buffer, a frozen scale."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = nn.Linear(inputs, inputs)
        self.again = self.inner
        self.norm = nn.BatchNorm1d(inputs)
        self.head = nn.Linear(inputs, outputs)
        self.frozen = nn.Parameter(torch.rand(inputs), requires_grad=False)
        self.register_buffer("kept", torch.rand(inputs))
        self.register_buffer("passing", torch.ones(inputs), persistent=False)

    def forward(self, x):
        x = self.norm(self.again(self.inner(x)))
        return self.head(x * self.frozen + self.kept * self.passing)


OWN = """
from tests_normed import Normed


def make(shape, outputs, scale=1):
    return Normed(shape[0], outputs)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_statistics_and_all_else_of_an_own_model_come_back(tmp_path, monkeypatch, dtype):
    import sys

    monkeypatch.setitem(sys.modules, "tests_normed", sys.modules[__name__])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model.py").write_text(OWN)
    model = lambda shape, outputs: Normed(shape[0], outputs)  # noqa: E731
    task, signature, params = trained(DATASETS["wine"]().load(tmp_path, None), model, dtype=dtype)
    before = Predictor.of(task, signature, params[1], 1)
    assert before.model.norm.running_mean.abs().max() > 0.01
    section = '{name = "custom", factory = "model.py:make"}'
    folder = recorded(tmp_path / "run", {1: before}, section, base=tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    after = load(folder)  # the only one there is
    assert next(after.parameters()).dtype == dtype
    torch.testing.assert_close(after(task.train.x), before(task.train.x), rtol=0, atol=0)
    (tmp_path / "own" / "model.py").rename(tmp_path / "model.py")  # it was moved here
    torch.testing.assert_close(load(folder)(task.train.x), before(task.train.x), rtol=0, atol=0)
    (tmp_path / "model.py").unlink()
    with pytest.raises(UserError, match=r"no file model\.py"):
        load(folder)


DRAWN = """
import torch
from torch import nn

class Scrambled(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("order", torch.randperm(inputs), persistent=False)
        self.head = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.head(x[:, self.order])

def make(shape, outputs):
    return Scrambled(shape[0], outputs)
"""


def test_what_a_model_draws_and_does_not_save_is_drawn_again(tmp_path):
    (tmp_path / "drawn.py").write_text(DRAWN)
    model = {"name": "custom", "factory": "drawn.py:make"}
    about = {"seed": 3, "nodes": 2, "data": "wine", "model": model, "pace": {"rounds": 1}}
    result = p2pfl.run(p2pfl.Experiment.from_dict(about, tmp_path), out=tmp_path / "run")
    x = torch.randn(5, 13)
    assert torch.equal(load(tmp_path / "run")(x), result.model()(x))
    with pytest.raises(UserError, match="holds no model of node a; there are: "):
        load(tmp_path / "run", node="a")


def test_a_run_that_was_to_keep_no_models_says_so(tmp_path):
    about = {"nodes": 2, "output": {"models": "none"}, "pace": {"rounds": 1}}
    p2pfl.run(p2pfl.Experiment.from_dict(about, tmp_path), out=tmp_path / "run")
    with pytest.raises(UserError, match=r"holds no models: output\.models was 'none'"):
        load(tmp_path / "run")


def test_a_csv_gives_what_the_tensors_give(heart, tmp_path):
    folder, predictors, _, _ = heart
    dataset = clinic(tmp_path)
    found = load(folder, 1).predict_csv(tmp_path / "clinic.csv")
    labels = predictors[1].predict(dataset.x)
    chances = predictors[1].probabilities(dataset.x)
    assert [row["prediction"] for row in found] == labels
    got = torch.tensor([[row[f"p({name})"] for name in ("no", "yes")] for row in found])
    torch.testing.assert_close(got, chances)
    shuffled = tmp_path / "shuffled.csv"
    lines = list(csv.DictReader(CLINIC.splitlines(), delimiter=";"))
    with shuffled.open("w") as file:
        writer = csv.DictWriter(file, ["note", "pain", "age", "kind"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**line, "note": "x, y"} for line in lines)
    assert load(folder, 1).predict_csv(shuffled) == found
    assert load(folder, 1).predict_rows(lines) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age,pain\n1,2\n", r"columns 'kind' are missing; the first line names 'age', 'pain'"),
        ("age,kind,pain\n1,a,2\n1,z,2\n", r"line 3, column 'kind': unknown category 'z'"),
        ("age,kind,pain\nold,a,2\n", r"line 2, column 'age': 'old' is not a number"),
        ("age,kind,pain\n1,a\n", r"line 2: 2 fields, but there are 3 columns"),
        ("age,kind,pain\n", "no rows"),
        ("", "missing"),
        (None, "no such file"),
    ],
)
def test_a_bad_csv_is_told_by_place(heart, tmp_path, text, message):
    path = tmp_path / "input.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(heart[0], 0).predict_csv(path)


def images():
    """Return a predictor of 3 classes for images ``[1, 2, 2]``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 1, 2, 2, generator=generator)
    dataset = Dataset(x, torch.arange(12) % 3, classes=("x", "y", "z"))
    task, signature, params = trained(dataset, MODELS["linear"]())
    return Predictor.of(task, signature, params[0], 0), x


def test_images_come_a_pixel_a_column(tmp_path):
    predictor, x = images()
    np.savetxt(tmp_path / "in.csv", x.flatten(1), "%.9g", ",", header="0,1,2,3", comments="")
    found = predictor.predict_csv(tmp_path / "in.csv")
    assert [row["prediction"] for row in found] == predictor.predict(x)
    for text, message in (
        ("a,b,c\n1,2,3\n", r"3 columns, but an example has 4 values \(1 x 2 x 2\)"),
        ("0.5,0.25,1,0\n1,2,3,4\n", "line 1: these are values"),
        ("a,b,c,d\n1,,3,4\n", "line 2, column 'b': the value is missing"),
    ):
        (tmp_path / "in.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            predictor.predict_csv(tmp_path / "in.csv")
    with pytest.raises(UserError, match="images"):
        predictor.predict_rows([{"a": "1"}])
    with pytest.raises(UserError, match=r"takes examples \[b, 1, 2, 2\], not \[12, 4\]"):
        predictor.predict(x.flatten(1))


def test_one_logit_is_two_probabilities(tmp_path):
    task, signature, params = trained(clinic(tmp_path), MODELS["logistic"](), LOSSES["binary"]())
    predictor = Predictor.of(task, signature, params[0], 0)
    logit = predictor(task.train.x)
    assert logit.shape == (6, 1)
    chances = predictor.probabilities(task.train.x)
    torch.testing.assert_close(chances[:, 1:], logit.sigmoid())
    torch.testing.assert_close(chances.sum(1), torch.ones(6))
    assert predictor.predict(task.train.x) == ["yes" if z > 0 else "no" for z in logit]


def test_a_regression_predicts_numbers(tmp_path):
    dataset = DATASETS["diabetes"]().load(tmp_path, None)
    task, signature, params = trained(dataset, MODELS["linear"]())
    predictor = Predictor.of(task, signature, params[0], 0)
    found = predictor.predict(dataset.x[:3])
    torch.testing.assert_close(torch.tensor(found), predictor(dataset.x[:3])[:, 0])
    rows = [dict(zip(dataset.features, map(str, x.tolist()), strict=True)) for x in dataset.x[:3]]
    assert predictor.predict_rows(rows) == [{"prediction": value} for value in found]
    with pytest.raises(UserError, match="no probabilities"):
        predictor.probabilities(dataset.x)


def test_features_without_an_encoder_are_numbers_by_name():
    signature = Signature((2,), 1, "squared", features=("a", "b"))
    model = nn.Linear(2, 1)
    predictor = Predictor(model, signature, Affine(torch.tensor([1.0, 2.0]), torch.ones(2)))
    (found,) = predictor.predict_rows([{"b": "2", "a": "?"}])
    assert found["prediction"] == pytest.approx(model.bias.item())


def test_which_models_there_are_is_told(tmp_path, heart):
    folder, predictors, _, _ = heart
    with pytest.raises(UserError, match="no model of node 7; there are: '0', '1'"):
        load(folder, 7)
    with pytest.raises(UserError, match="no mean model; there are: '0', '1'"):
        load(folder)
    Recorder(tmp_path / "going on", HEADLESS)
    with pytest.raises(UserError, match="holds no models: it is not finished"):
        load(tmp_path / "going on")
    peer = tmp_path / "going on" / "peers" / "001"
    recorded(peer, {1: predictors[1]}, MODEL)
    (tmp_path / "going on" / "experiment.toml").write_text(f"model = {MODEL}")
    assert load(tmp_path / "going on", 1).predict_csv(tmp_path / "clinic.csv")
    with pytest.raises(UserError, match="no run folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ('{name = "mlp", hidden = [6]}', r"does not fit.*'model\.1\.bias'"),
        (
            '{name = "mlp", hidden = [5, 5]}',
            r"does not fit.*'model\.3\.bias', 'model\.3\.weight', 'model\.5",
        ),
        ('{name = "cnn"}', "model"),
        ('{name = "transformer"}', "choices"),
        ("{}", "model.name is missing"),
    ],
)
def test_another_model_section_is_refused(heart, model, message):
    folder = heart[0]
    (folder / "experiment.toml").write_text(f"model = {model}\n")
    with pytest.raises(UserError, match=message):
        load(folder, 0)


def test_files_that_are_no_models_are_refused(heart):
    from safetensors.torch import save_file

    folder, predictors, _, _ = heart
    path = folder / "models" / "node-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"node-0000\.safetensors cannot be read"):
        load(folder, 0)
    tensors, texts = save_tensors(predictors[0])
    save_file(tensors, path)
    with pytest.raises(UserError, match="is not a model of this version"):
        load(folder, 0)
    save_file(tensors, path, texts | {"shape": "[x]"})
    with pytest.raises(UserError, match="metadata are damaged"):
        load(folder, 0)


def test_a_model_that_cannot_be_written_is_an_error_and_leaves_nothing(
    heart, tmp_path, monkeypatch
):
    def full(tensors, path, texts):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    recorder = Recorder(tmp_path / "full", HEADLESS)
    with pytest.raises(RunError, match=r"safetensors cannot be written: .*No space left"):
        recorder.model(0, *save_tensors(heart[1][0]))
    recorder.finish("failed", {})
    assert [*(tmp_path / "full" / "models").iterdir()] == []


def test_tensors_that_share_memory_are_saved_all_the_same(heart):
    predictor = copy.deepcopy(heart[1][0])
    one = torch.arange(4.0)
    predictor.model.register_buffer("one", one[:2])
    predictor.model.register_buffer("other", one[1:])
    predictor.model.register_buffer("across", torch.ones(3, 2).T)
    tensors, _ = save_tensors(predictor)
    found = safetensors.torch.load(safetensors.torch.save(tensors))
    assert all(torch.equal(found[name], place) for name, place in predictor.state_dict().items())


def test_the_verb_writes_what_was_asked_for(heart, tmp_path, capsys):
    folder, predictors, _, _ = heart
    source, out = tmp_path / "clinic.csv", tmp_path / "out.csv"
    due = predictors[0].predict_csv(source)
    predict(folder, source, node=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["row", "prediction", "probability"]
    assert [line.split()[1] for line in lines[1:]] == [row["prediction"] for row in due]
    predict(folder, source, node=0, format=Format.JSON)
    assert json.loads(capsys.readouterr().out) == due
    predict(folder, source, node=0, out=out)
    assert capsys.readouterr().out == ""
    with out.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["prediction"] for row in read] == [row["prediction"] for row in due]
    assert all(
        math.isclose(float(row["p(no)"]) + float(row["p(yes)"]), 1, abs_tol=1e-6) for row in read
    )
    with pytest.raises(UserError, match="cannot be written"):
        predict(folder, source, node=0, out=tmp_path / "none" / "out.csv")
