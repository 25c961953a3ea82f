"""What a topology costs, and how good D-PSGD and QG are on it.

    python scripts/compare_topologies.py [--data DIR] ...

As compare_algorithms.py, which says what may be given, what is written and how rates are chosen,
with few methods and many topologies: first those which send least, and of them the best.

It is here to be read and changed: what is compared stands in METHODS and TOPOLOGIES, all
else in EXPERIMENT of compare_algorithms.py.
"""

from __future__ import annotations

from compare_algorithms import METHODS as ALL
from compare_algorithms import arguments, compare

from p2pfl.cli.tables import print_table

METHODS = {name: ALL[name] for name in ("dpsgd", "qg")}
TOPOLOGIES = (
    "complete",
    "chain",
    "random_regular:degree=4",
    "equi_static:m=2",
    "base:k=2",
    "el_local:s=2",
    "el_oracle:s=2",
    "el_oracle:s=4",
)


def main() -> None:
    """Compare, and show it."""
    given = arguments(__doc__, "runs/compare-topologies", METHODS, TOPOLOGIES)
    cells = compare(METHODS, given)
    rows = []
    for topology in given.topologies:
        here = [cell for cell in cells if cell.topology == topology]
        sent = min((cell.models for cell in here if not cell.why), default=0.0)
        best = max(cell.accuracy for cell in here)
        rows.append((sent, -best, (topology, f"{sent:.1f}", *here)))
    print_table(
        ("mean / worst node, %", "models a round", *given.methods),
        [row for _, _, row in sorted(rows, key=lambda row: row[:2])],
        texts=["mean / worst node, %"],
    )


if __name__ == "__main__":
    main()
