"""What is built once the data are known, and what may turn out wrong with it then."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from p2pfl.data.shards import Federation
from p2pfl.data.statistics import Affine, in_two_passes
from p2pfl.errors import UserError
from p2pfl.experiment.config import Section
from p2pfl.experiment.sections import Timer
from p2pfl.learning.backends import BACKENDS
from p2pfl.learning.modules import predict, pure
from p2pfl.learning.spec import Spec
from p2pfl.learning.task import ModelTask, per_node

if TYPE_CHECKING:
    from p2pfl.experiment.experiment import Experiment


DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16")}


def build_task(
    experiment: Experiment, federation: Federation, affine: Affine | None, device: str
) -> ModelTask:
    """Return the learning problem of the nodes whose data `federation` holds.

    Args:
        experiment: what is learned, and how.
        federation: their data.
        affine: how to standardise, ``[held, f]``, a row for each of them; None: not.
        device: where to compute.

    Raises:
        UserError: the loss or the model does not fit the data, or values are missing.
    """
    training, loss = experiment.training, experiment.loss(federation)
    try:
        outputs = loss.outputs(len(federation.classes))
    except ValueError as error:
        raise UserError(f"training.loss: {error}") from error
    if experiment.standardise == "none":
        check_complete(federation)
    model = build_model(experiment.sections["model"], experiment.seed, federation.shape, outputs)
    return ModelTask(
        model,
        loss,
        federation.train,
        federation.own_test if experiment.evaluation.on == "own" else federation.test,
        batch_size=training.batch_size,
        seed=experiment.seed,
        affine=per_node(affine, federation.train.nodes) if affine else None,
        backend=BACKENDS[training.backend],
        dtype=DTYPES[training.dtype],
        compute=DTYPES.get(training.compute),
        block=training.block,
        device=device,
    )


def build_affine(experiment: Experiment, federation: Federation) -> Affine | None:
    """Return how the data of each node are standardised, ``[held, f]``, or None."""
    if experiment.standardise == "none" or federation.numeric is None:
        return None
    pooled = experiment.standardise == "pooled"

    def average(each: Tensor) -> Tensor:
        return each.mean(0, keepdim=True).expand_as(each) if pooled else each

    return in_two_passes(federation.train, federation.numeric, average, experiment.exact)


def build_model(section: Section, seed: int, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build the model, the same for everybody, and try it on two examples.

    Raises:
        UserError: it cannot be built, does not take such examples, or makes something else
            of them than so many outputs.
    """
    own = f" ({section.values['factory']})" if section.name == "custom" else ""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = section.build("model")(shape, outputs)
            with torch.no_grad():
                made = copy.deepcopy(model).eval()(torch.zeros(2, *shape))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model{own}: {error}") from error
    except Exception as error:  # it may be the user's own code: whatever it raises is theirs
        raise UserError(f"model{own}: {type(error).__name__}: {error}") from error
    if not isinstance(made, Tensor):
        raise UserError(f"model{own} makes a {type(made).__name__} of examples, not a tensor")
    if tuple(made.shape) != (2, outputs):
        raise UserError(f"model{own} makes {list(made.shape[1:])} of an example, not [{outputs}]")
    if own and not made.isnan().any() and _keeps_aside(model, torch.zeros(2, *shape)):
        raise UserError(
            f"model{own} keeps parameters in a place of its own as well, where training cannot "
            "replace them: a list has to be an nn.ParameterList"
        )
    return model


def _keeps_aside(model: nn.Module, x: Tensor) -> bool:
    """Say whether a model finds NaN in place of a weight, given all there are; see `pure`."""
    spec = Spec.of(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        outputs = predict(pure(model), spec.unflatten(spec.flatten(model)), {}, x)
    return bool(outputs.isnan().any())


def check_complete(federation: Federation) -> None:
    """Refuse missing values where nothing fills them in.

    Raises:
        UserError: it names a column.
    """
    parts = [federation.train.x, *([federation.test.x] if federation.test else [])]
    for x in parts:
        if x.is_floating_point() and bool(x.isnan().any()):
            column = int(x.isnan().any(0).flatten().nonzero()[0])
            name = federation.features[column] if federation.features else f"number {column}"
            raise UserError(
                f"data: column {name} has missing values; set preprocess.standardise = 'pooled'"
                " or 'own', which fills them in, or data.drop_missing = true"
            )


def check_measured(experiment: Experiment, federation: Federation) -> None:
    """Refuse to stop by what is not measured of some node whose data are here.

    Raises:
        UserError: it names the node.
    """
    rule = None if isinstance(experiment.pace, Timer) else experiment.pace.stop
    if rule is None or rule.metric == "train_loss":
        return
    never = f"pace.stop.metric = {rule.metric!r} is never measured"
    if rule.metric == "eval_acc" and experiment.loss(federation).correct is None:
        raise UserError(f"{never} of a regression: use metric = 'eval_loss'")
    if experiment.evaluation.on == "pooled":
        if federation.test is None:
            raise UserError(
                f"{never}, as there are no test rows here: hold out more, or set evaluation.on ="
                " 'own'"
            )
        return
    own = federation.own_test
    assert own is not None  # on = 'own' goes with a holdout per node
    without = own.nodes[own.count == 0].tolist()
    if without:
        raise UserError(
            f"{never} of node {without[0]}, which holds out no row of its own: hold out more,"
            " share out the rows in another way, or use metric = 'train_loss'"
        )
