"""Trained models to use: an `nn.Module` that takes raw examples and knows what its outputs mean."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from p2pfl.data.encoder import Column, Encoder, Where, choices
from p2pfl.data.shards import Federation
from p2pfl.data.statistics import Affine
from p2pfl.data.table import Form, read_table
from p2pfl.errors import UserError
from p2pfl.learning.losses import Loss
from p2pfl.learning.task import ModelTask

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
