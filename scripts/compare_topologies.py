"""What a topology costs, and how good D-PSGD and QG are on it.

    python scripts/compare_topologies.py [--data DIR] [--seeds 3] [--rounds 600] [--local-steps 1]
                                         [--alpha 0.1] [--jobs 2] [--out runs/compare-topologies]

As compare_algorithms.py, which says what is written and how rates are chosen, with few methods and
many topologies: those who send least come first, and then those who are best.

It is here to be read and changed: what is compared stands in METHODS and TOPOLOGIES, all
else in EXPERIMENT of compare_algorithms.py.
"""

from __future__ import annotations

from compare_algorithms import METHODS as ALL
from compare_algorithms import arguments, compare

from p2pfl.cli.tables import print_table

METHODS = {  # with the rates that are good on most of these topologies
    "dpsgd": ALL["dpsgd"]._replace(rates=(0.2, 0.4)),
    "dpsgd, falling rate": ALL["dpsgd, falling rate"]._replace(rates=(0.4, 0.8)),
    "qg": ALL["qg"]._replace(rates=(0.2, 0.4)),
}
TOPOLOGIES = (
    "complete",
    "chain",
    "ring",
    "torus",
    "random_regular:degree=4",
    "exponential",
    "equi_static:m=2",
    "one_peer_exponential",
    "base:k=2",
    "random_matching",
    "el_local:s=2",
    "el_oracle:s=2",
    "el_oracle:s=4",
)


def main() -> None:
    """Compare, and show it."""
    cells = compare(METHODS, TOPOLOGIES, arguments(__doc__, "runs/compare-topologies"))
    rows = []
    for topology in TOPOLOGIES:
        here = [cell for cell in cells if cell.topology == topology]
        sent = min(cell.models for cell in here if not cell.why)
        best = max(cell.accuracy for cell in here)
        rows.append((sent, -best, (topology, f"{sent:.1f}", *here)))
    print_table(
        ("mean / worst node, %", "models a round", *METHODS),
        [row for _, _, row in sorted(rows, key=lambda row: row[:2])],
        texts=["mean / worst node, %"],
    )


if __name__ == "__main__":
    main()
