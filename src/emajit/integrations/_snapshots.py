"""The snapshots of a training, for averages whose length is chosen afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emajit import posthoc, schedules
from emajit.posthoc import PostHoc


def decays_of(options: PostHoc | None) -> dict[str, schedules.Schedule]:
    """The schedules of the averages by the names that they have in the callbacks' files."""
    lengths = options.sigma_rel if options else ()
    return {f"posthoc-{one:.6g}": schedules.power_function(float(one)) for one in lengths}


def begin(options: PostHoc, step: int) -> None:
    """Prepare the folder for a training that goes on after `step` updates.

    Raises ValueError, and removes nothing, where the folder is of another run: it has snapshots
    before the first update, or snapshots of other lengths.
    """
    folder = Path(options.folder)
    found = posthoc.snapshots(folder) if folder.is_dir() else []
    if found and not (step or options.overwrite):
        raise ValueError(
            f"{folder}: expected no snapshots before the first update, found {found[0].path.name}; "
            "give each run a folder of its own, or PostHoc(..., overwrite=True)"
        )
    gammas = [schedules.sigma_rel_to_gamma(float(one)) for one in options.sigma_rel]
    for snapshot in found:
        if not any(abs(snapshot.gamma - gamma) < 1e-6 * (1 + gamma) for gamma in gammas):
            length = schedules.gamma_to_sigma_rel(snapshot.gamma)
            raise ValueError(
                f"{snapshot.path}: expected a length of {[*options.sigma_rel]}, found {length:g}"
            )
    for snapshot in reversed(found):
        if snapshot.step > step:
            snapshot.path.unlink()


def write(options: PostHoc, shadows: Sequence[Any], step: int) -> None:
    """Save the averages, then remove the oldest snapshots that are not to be kept."""
    folder, lengths = Path(options.folder), [*options.sigma_rel]
    posthoc.save(folder, [*shadows], step, sigma_rel=lengths, dtype=options.dtype)
    if options.keep is not None:
        found = posthoc.snapshots(folder)
        kept = sorted({snapshot.step for snapshot in found})[-options.keep :]
        for snapshot in found:
            if snapshot.step < kept[0]:
                snapshot.path.unlink()
