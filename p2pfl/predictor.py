"""Trained models to use: an `nn.Module` that takes raw examples and knows what its outputs mean."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from p2pfl import config
from p2pfl.data.encoder import Column, Encoder, Where, choices
from p2pfl.data.shards import Federation
from p2pfl.data.statistics import Affine
from p2pfl.data.table import Form, read_table
from p2pfl.errors import UserError
from p2pfl.learning.losses import Loss
from p2pfl.learning.task import ModelTask
from p2pfl.record import MODELS, PEERS, read_experiment, read_summary

FORMAT = "p2pfl-model 1"

Label = str | float
Prediction = dict[str, Label]
"""``prediction``, and for classes the probability of each, ``p(class)``."""


class Signature(NamedTuple):
    """What goes into a model and what comes out of it."""

    shape: tuple[int, ...]  # of one example
    outputs: int
    loss: str  # its name in `LOSSES`
    classes: tuple[str, ...] = ()  # () for regression
    features: tuple[str, ...] = ()  # () for images
    encoder: Encoder | None = None  # how raw rows become examples

    @classmethod
    def of(cls, federation: Federation, loss: Loss) -> Signature:
        """Return the signature of the models that are trained on these data with this loss."""
        return cls(
            federation.shape,
            loss.outputs(len(federation.classes)),
            loss.name,
            federation.classes,
            federation.features,
            federation.encoder,
        )

    def metadata(self) -> dict[str, str]:
        """Return the signature as texts, for `from_metadata`."""
        return {
            "shape": json.dumps(self.shape),
            "outputs": str(self.outputs),
            "loss": self.loss,
            "classes": json.dumps(self.classes, ensure_ascii=False),
            "features": json.dumps(self.features, ensure_ascii=False),
            "encoder": self.encoder.to_json() if self.encoder else "",
        }

    @classmethod
    def from_metadata(cls, texts: Mapping[str, str]) -> Signature:
        """Return what `metadata` wrote; ``KeyError`` or ``ValueError`` if something else did."""
        return cls(
            tuple(int(side) for side in json.loads(texts["shape"])),
            int(texts["outputs"]),
            texts["loss"],
            tuple(str(name) for name in json.loads(texts["classes"])),
            tuple(str(name) for name in json.loads(texts["features"])),
            Encoder.from_json(texts["encoder"]) if texts["encoder"] else None,
        )


class Predictor(nn.Module):
    """A trained model with its preprocessing.

    Args:
        model: takes standardised examples, in evaluation mode.
        signature: what its inputs and outputs mean.
        affine: a shift and a scale per feature, ``[f]`` each; None: examples are as they are.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, model: nn.Module, signature: Signature, affine: Affine | None = None
    ) -> None:
        super().__init__()
        self.model, self.signature, self.standardises = model, signature, affine is not None
        like = next(model.parameters())
        for name, values in zip(Affine._fields, affine or (torch.empty(0),) * 2, strict=True):
            self.register_buffer(name, values.detach().reshape(-1).to(like, copy=True))
        self.eval()

    @classmethod
    def of(cls, task: ModelTask, signature: Signature, params: Tensor, node: int) -> Predictor:
        """Return the predictor with a row of parameters, ``[d]``, and a node's statistics."""
        affine = None
        if task.affine is not None:
            nodes = torch.tensor([node], device=task.device)
            affine = Affine(*(field[0] for field in task.affine(nodes)))
        return cls(task.predictor(params, node), signature, affine)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; () for regression."""
        return self.signature.classes

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features; () for images."""
        return self.signature.features

    @property
    def encoder(self) -> Encoder | None:
        """How raw rows become examples, for data sets that are tables."""
        return self.signature.encoder

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the model for raw examples, ``[b, ...] -> [b, outputs]``."""
        if x.is_floating_point():
            x = x.to(self.shift.dtype)
        if self.standardises:
            x = Affine(self.shift, self.scale).apply(x.flatten(1)).reshape(x.shape)
        outputs: Tensor = self.model(x)
        return outputs

    def predict(self, x: Tensor) -> list[Label]:
        """Return a class name, or for regression a number, for each raw example ``[b, ...]``.

        Raises:
            UserError: the examples have another shape than those of the training data.
        """
        return self._labels(self._outputs(x))

    def probabilities(self, x: Tensor) -> Tensor:
        """Return the probability of each class, ``[b, ...] -> [b, classes]``.

        Raises:
            UserError: the model predicts numbers, or the examples have another shape.
        """
        if not self._classifies:
            raise UserError("a model that predicts numbers has no probabilities of classes")
        return self._chances(self._outputs(x))

    def predict_rows(self, rows: Iterable[Mapping[str, str]]) -> list[Prediction]:
        """Predict for raw rows, column name to text, as in the files that were trained on.

        Raises:
            UserError: it names the row, the column and the value that cannot be used.
        """
        encoder = self._table_encoder()
        if encoder is None:
            raise UserError("this model takes images, not rows of named columns")
        rows = list(rows)
        x = encoder.encode(rows)
        self._check_complete(x, encoder, lambda row, column: f"row {row + 1}, column {column!r}")
        return self._predictions(x)

    def predict_csv(self, path: str | Path) -> list[Prediction]:
        """Predict for a CSV file whose first line names the columns, one result per line.

        A model of a table takes the columns it knows, in any order, and leaves the others
        alone. A model of images takes a column for each pixel, row by row, whatever they
        are called, with values as in the training data.

        Raises:
            UserError: it names the file, and the line, column and value that cannot be used.
        """
        path, encoder = Path(path), self._table_encoder()
        header, delimiter = _header(path)
        if encoder is None:
            encoder = self._pixels(path, header)
        lacking = [column.name for column in encoder.columns if column.name not in header]
        if lacking:
            raise UserError(
                f"{path}: the columns {choices(lacking)} are missing; "
                f"the first line names {choices(header)}"
            )
        table = read_table([path], Form(delimiter=delimiter))
        texts = {column.name: table.column(column.name) for column in encoder.columns}
        x = encoder.encode_columns(texts, len(table.rows), table.where)
        self._check_complete(x, encoder, table.where)
        return self._predictions(x.reshape(-1, *self.signature.shape))

    @property
    def _classifies(self) -> bool:
        return self.signature.loss in ("cross_entropy", "binary")

    def _outputs(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.signature.shape or not x.ndim:
            due = ", ".join(map(str, ("b", *self.signature.shape)))
            raise UserError(f"the model takes examples [{due}], not {list(x.shape)}")
        with torch.no_grad():
            return self.forward(x)

    def _chances(self, outputs: Tensor) -> Tensor:
        if self.signature.loss == "binary":
            logit = outputs.reshape(-1, 1)
            return torch.cat([-logit, logit], 1).sigmoid()
        return outputs.softmax(1)

    def _labels(self, outputs: Tensor) -> list[Label]:
        if not self._classifies:
            return [float(value) for value in outputs.flatten().tolist()]
        return [self.classes[k] for k in self._chances(outputs).argmax(1).tolist()]

    def _predictions(self, x: Tensor) -> list[Prediction]:
        outputs = self._outputs(x)
        labels = self._labels(outputs)
        if not self._classifies:
            return [{"prediction": label} for label in labels]
        names = [f"p({name})" for name in self.classes]
        return [
            {"prediction": label, **dict(zip(names, row, strict=True))}
            for label, row in zip(labels, self._chances(outputs).tolist(), strict=True)
        ]

    def _check_complete(self, x: Tensor, encoder: Encoder, where: Where) -> None:
        """Refuse missing values where there is no mean to put in their place."""
        gaps = x.isnan().nonzero()
        if len(gaps) and not self.standardises:
            row, feature = gaps[0].tolist()
            name = encoder.features[feature]
            raise UserError(
                f"{where(row, name)}: the value is missing, and a model trained with "
                "preprocess.standardise = 'none' cannot fill it in"
            )

    def _table_encoder(self) -> Encoder | None:
        if self.encoder is None and self.features:
            return Encoder(tuple(Column(name) for name in self.features))
        return self.encoder

    def _pixels(self, path: Path, header: Sequence[str]) -> Encoder:
        shape, due = self.signature.shape, math.prod(self.signature.shape)
        if len(header) != due:
            sides = " x ".join(map(str, shape))
            raise UserError(
                f"{path}: {len(header)} columns, but an example has {due} values ({sides})"
            )
        if _are_values(header):
            raise UserError(f"{path}, line 1: these are values; the first line names the columns")
        return Encoder(tuple(Column(name) for name in header))


def save_tensors(
    predictor: Predictor, round: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `load` needs of a predictor: copies of its tensors, and texts about them.

    Args:
        predictor: what is to be saved.
        round: after how many rounds, if that is known.
    """
    texts = {
        "format": FORMAT,
        "standardises": str(int(predictor.standardises)),
        "round": "" if round is None else str(round),
        **predictor.signature.metadata(),
    }
    return {name: place.detach().cpu().clone() for name, place in _places(predictor).items()}, texts


def load(run: str | Path, node: int | None = None) -> Predictor:
    """Return a model that a run has left, ready to use.

    A model of the user's own code is built by that code again, so it is run.

    Args:
        run: a run folder.
        node: whose model; None is the mean model, or the only one there is.

    Raises:
        UserError: there is no such run or model, or the run's model section does not build
            a model with the names and shapes that were saved.
    """
    folder = Path(run)
    summary, experiment = read_summary(folder), read_experiment(folder)
    path = _find(folder, node, str(summary.get("status")))
    tensors, texts = _read(path)
    try:
        signature = Signature.from_metadata(texts)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its metadata are damaged: {error!r}") from error
    module = _build(experiment.get("model", {}), signature, summary.get("base"))
    module.to(tensors["shift"].dtype if "shift" in tensors else torch.float32)
    features = torch.empty(math.prod(signature.shape))
    affine = Affine(features, features) if texts.get("standardises") == "1" else None
    predictor = Predictor(module, signature, affine)
    _fill(predictor, tensors, path)
    return predictor


def _find(folder: Path, node: int | None, status: str) -> Path:
    """Return the file of a node's model, or of the mean model."""
    files = [*folder.glob(f"{PEERS}/*/{MODELS}/*.safetensors")]
    saved = {path.stem: path for path in sorted(files)}
    saved |= {path.stem: path for path in sorted((folder / MODELS).glob("*.safetensors"))}
    if not saved:
        why = "it is not finished" if status == "running" else f"its status is {status!r}"
        raise UserError(f"{folder} holds no models: {why}")
    name = "mean" if node is None else f"node-{node:04d}"
    if name in saved:
        return saved[name]
    if node is None and len(saved) == 1:
        return next(iter(saved.values()))
    whose = "mean model" if node is None else f"model of node {node}"
    there = choices(stem.removeprefix("node-").lstrip("0") or "0" for stem in saved)
    raise UserError(f"{folder} holds no {whose}; there are: {there}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file and the texts about them."""
    from safetensors import SafetensorError, safe_open  # not needed to make a predictor

    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if texts.get("format") != FORMAT:
        raise UserError(f"{path} is not a model of this version of p2pfl ({FORMAT})")
    return tensors, texts


def _build(table: Any, signature: Signature, base: str | None) -> nn.Module:  # noqa: ANN401
    """Build the model that the section says, as yet without its weights."""
    section = config.read("model", table, config.Kind(config.MODELS))
    if "factory" in section.values:
        factory = _located(section.values["factory"], base)
        section = section._replace(values={**section.values, "factory": factory})
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and overwritten
        try:
            module: nn.Module = section.build("model")(signature.shape, signature.outputs)
        except ValueError as error:
            raise UserError(f"model ({section.name}): {error}") from error
    return module


def _located(factory: str, base: str | None) -> str:
    """Find a file of the user's code from the folder of the experiment, or from here."""
    place, colon, name = factory.rpartition(":")
    folders = [Path(base)] if base else []
    tried = [folder / place for folder in (*folders, Path())]
    tried += [folder / Path(place).name for folder in (*folders, Path())]  # it was moved
    found = next((file for file in tried if place.endswith(".py") and file.is_file()), None)
    return factory if found is None else f"{found}{colon}{name}"


def _places(predictor: Predictor) -> dict[str, Tensor]:
    """Return what is saved, by name: parameters and lasting buffers, shared ones once."""
    lasting = predictor.state_dict(keep_vars=True)
    places = {**dict(predictor.named_parameters()), **dict(predictor.named_buffers())}
    return {name: place for name, place in places.items() if name in lasting}


def _fill(predictor: Predictor, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy saved values into a predictor, if names and shapes are the same."""
    places = _places(predictor)
    shapes, found = ({name: t.shape for name, t in part.items()} for part in (places, tensors))
    wrong = sorted({name for name, _ in shapes.items() ^ found.items()})
    if wrong:
        raise UserError(
            f"{path} does not fit the model of the experiment: {choices(wrong)} differ; "
            "was the section 'model', or the code it names, changed after the run?"
        )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def _header(path: Path) -> tuple[list[str], str]:
    """Return the names in the first line of a file, and what stands between them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text in columns: {error}") from error
    found = {mark: next(csv.reader([line], delimiter=mark), []) for mark in ",;\t|"}
    delimiter = max(found, key=lambda mark: len(found[mark]))
    return [name.strip() for name in found[delimiter]], delimiter


def _are_values(header: Sequence[str]) -> bool:
    """Say whether a first line looks like an example: all numbers, and no mere counting."""
    try:
        numbers = [float(name) for name in header]
    except ValueError:
        return False
    return numbers not in ([*range(len(header))], [*range(1, len(header) + 1)])
