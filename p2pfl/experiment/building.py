"""What is built once the data are known, and what may turn out wrong with it then."""

from __future__ import annotations

import copy

import torch
from torch import nn

from p2pfl.data.shards import Federation
from p2pfl.errors import UserError
from p2pfl.experiment.config import Section


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
    if tuple(made.shape) != (2, outputs):
        raise UserError(f"model{own} makes {list(made.shape[1:])} of an example, not [{outputs}]")
    return model


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
