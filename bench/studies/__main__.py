"""Run a study, print its table, and write it and a picture into `bench/results/`."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from bench.studies import anytime, scaling, wsm

RESULTS = Path(__file__).parents[1] / "results"
STUDIES = {"wsm": wsm.study, "scaling": scaling.study, "anytime": anytime.study}


def main() -> int:
    """Run a study, print its table, write `study-NAME.md` and `study-NAME.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    report = STUDIES[arguments.study](arguments.seeds)
    seconds = time.perf_counter() - start
    rows = [f"| {' | '.join(row)} |" for row in report.table]
    rows.insert(1, "| --- " * len(report.table[0]) + "|")
    claim = (STUDIES[arguments.study].__doc__ or "").strip()
    when = f"{datetime.now(tz=UTC).date()}, {platform.machine()}, torch {torch.__version__}"
    lines = "\n".join(line.strip() for line in claim.splitlines())
    page = "\n\n".join([f"# {arguments.study}", lines, "\n".join(rows), *report.setting])
    page += (
        f"\n\nRun in {seconds:.0f} s on one thread, {when}.\n\n![](study-{arguments.study}.png)\n"
    )
    print(page)  # noqa: T201, it is what the command is for
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"study-{arguments.study}.md").write_text(page)
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    report.draw(axes)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / f"study-{arguments.study}.png", dpi=120)
    plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
