"""Faults planted into posteriors that are known to be right, against every check: what is caught and what is not.

make faults        # prints Markdown, the tables of docs/results/planted_faults.md
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from planted_faults import (  # noqa: E402
    POSTERIOR_FAULTS,
    PREDICTION_FAULTS,
    Classification,
    posterior_cells,
    prediction_cells,
    problem,
    table,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=100, help="refits of simulation-based calibration")
    parser.add_argument("--only", default="", help="faults with this in their name; the default is all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    target = problem()
    cells = {name: posterior_cells(name, target, args.simulations) for name in POSTERIOR_FAULTS if args.only in name}
    print(table(cells, POSTERIOR_FAULTS).to_markdown(), end="\n\n", flush=True)
    names = [name for name in PREDICTION_FAULTS if args.only in name]
    if not names:
        return
    task = Classification()
    cells = {name: prediction_cells(name, task) for name in names}
    print(table(cells, PREDICTION_FAULTS).to_markdown())


if __name__ == "__main__":
    main()
