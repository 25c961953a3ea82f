"""The runs of a plan: every combination with every seed, checked and with a folder of its own."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from p2pfl.errors import UserError
from p2pfl.experiment.config import Value
from p2pfl.experiment.experiment import Experiment
from p2pfl.sweep.plan import Case, Plan
from p2pfl.sweep.values import brief, flatten, inline

VAGUE = ("name", "seed")  # last parts of keys that do not say of what
ALONE = "base"  # the label where nothing but the seed is varied
LONGEST = 150  # characters of a label in a folder's name; file systems take 255 bytes


class Combination(NamedTuple):
    """One of the settings that are compared.

    Attributes:
        varied: the case, if there are any, and the value of each key in the grid.
        changes: all changes to the experiment, in order, as ``"pace.rounds=2"``.
        label: how it is called in tables and plots.
        slug: the same as part of a folder's name.
    """

    varied: dict[str, Value]
    changes: list[str]
    label: str
    slug: str


class Run(NamedTuple):
    """A run that a plan asks for.

    Attributes:
        combination: its setting.
        seed: its seed.
        text: the checked experiment, every default spelled out, as the text of a file.
    """

    combination: Combination
    seed: int
    text: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.combination.slug}-seed{self.seed}"


def seeds(plan: Plan) -> list[int]:
    """Return the seeds one by one; a number of seeds counts from the experiment's own."""
    if isinstance(plan.seeds, list):
        return plan.seeds
    first = _experiment(plan, combinations(plan)[0], None).seed
    return list(range(first, first + plan.seeds))


def runs(plan: Plan) -> list[Run]:
    """Return all runs of a plan, seed by seed within each combination.

    Raises:
        UserError: a combination makes no valid experiment; the message names it.
    """
    each = seeds(plan)
    return [
        Run(combination, seed, _experiment(plan, combination, seed).to_toml())
        for combination in combinations(plan)
        for seed in each
    ]


def combinations(plan: Plan) -> list[Combination]:
    """Return the combinations: all values of the grid for every case."""
    found = list(_unnamed(plan))
    shared = Counter(combination.label for combination in found)
    return [c._replace(slug=_shortened(c, shared[c.label] > 1)) for c in found]


def _unnamed(plan: Plan) -> Iterator[Combination]:
    titles = _titles(plan.grid)
    for case, values in itertools.product(plan.cases, itertools.product(*plan.grid.values())):
        chosen = dict(zip(plan.grid, values, strict=True))
        label = _label(case, {titles[key]: value for key, value in chosen.items()}) or ALONE
        slug = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", label).strip("-.")
        varied = ({"case": case.label} if case.label else {}) | chosen
        layers = (plan.common, case.changes, chosen)
        changes = [change for layer in layers for change in _changes(layer)]
        yield Combination(varied, changes, label, slug)


def _changes(layer: Mapping[str, Value]) -> list[str]:
    """Return changes as texts, whole sections before the keys in them."""
    flat = dict(flatten(layer))
    return [f"{key}={inline(flat[key])}" for key in sorted(flat, key=lambda k: k.count("."))]


def _titles(grid: Mapping[str, Value]) -> dict[str, str]:
    """Return a short name for each key: its last part, where that says enough."""
    last = {key: key.rpartition(".")[2] for key in grid}
    count = Counter(last.values())
    return {
        key: part if count[part] == 1 and part not in VAGUE else key for key, part in last.items()
    }


def _label(case: Case, values: Mapping[str, Value]) -> str:
    parts = [f"{key}={brief(value)}" for key, value in values.items()]
    return ",".join([case.label, *parts] if case.label else parts)


def _shortened(combination: Combination, shared: bool) -> str:
    """Return a slug that is nobody else's and no longer than a file's name may be.

    It does not depend on who else there is: where a sweep grows, its runs keep their folders.
    Only values that are written alike, as ``"fedavg"`` and ``{name = "fedavg"}``, are told apart
    when they meet.
    """
    exact = combination.slug == combination.label and len(combination.slug) <= LONGEST
    if exact and not shared:
        return combination.slug
    digest = hashlib.sha256(inline(combination.varied).encode()).hexdigest()[:8]
    return f"{combination.slug[:LONGEST]}-{digest}".lstrip("-")


def _experiment(plan: Plan, combination: Combination, seed: int | None) -> Experiment:
    changes = [*combination.changes, *([] if seed is None else [f"seed={seed}"])]
    try:
        if isinstance(plan.experiment, dict):
            return Experiment.from_dict(plan.experiment, changes=changes)
        return Experiment.load(plan.experiment, changes)
    except UserError as error:
        place = combination.label if seed is None else f"{combination.label}, seed {seed}"
        raise UserError(f"combination {place}: {error}") from error
