"""Models in files: what is saved of a predictor, and how one is made of it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2pfl.data.encoder import choices
from p2pfl.data.statistics import Affine
from p2pfl.errors import UserError
from p2pfl.experiment import config
from p2pfl.experiment.building import build_model
from p2pfl.learning.models import MODELS as MODEL_FACTORIES
from p2pfl.results.predictor import Predictor, Signature
from p2pfl.results.record import MODELS, PEERS
from p2pfl.results.runs import read_experiment, read_summary

FORMAT = "p2pfl-model 1"


def save_tensors(
    predictor: Predictor, round: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `load` needs of a predictor: its tensors, and texts about them.

    A tensor is a copy only where such files ask for it.

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
    tensors, held = {}, set()
    for name, place in _places(predictor).items():
        tensor = place.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in held else tensor  # no two may share theirs
        held.add(memory)
    return tensors, texts


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
    module = _build(experiment, signature, summary.get("base"))
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
        why = {
            "running": "it is not finished",
            "finished": "output.models was 'none' in its experiment",
        }.get(status, f"its status is {status!r}")
        raise UserError(f"{folder} holds no models: {why}")
    name = "mean" if node is None else f"node-{node:>04}"
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


def _build(experiment: Mapping[str, Any], signature: Signature, base: str | None) -> nn.Module:
    """Build the model of an experiment, as yet without its weights.

    What a model of the user's draws and does not save is drawn from the same seed again.
    """
    section = config.read("model", experiment.get("model", {}), config.Kind(MODEL_FACTORIES))
    if "factory" in section.values:
        factory = _located(section.values["factory"], base)
        section = section._replace(values={**section.values, "factory": factory})
    seed = experiment.get("seed", 0)
    return build_model(section, seed, signature.shape, signature.outputs)


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
