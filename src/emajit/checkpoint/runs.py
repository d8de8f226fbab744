"""The checkpoints of one run in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from emajit import _paths
from emajit.checkpoint import search, sources


def steps(folder: str | os.PathLike[str]) -> dict[Path, search.Moment | None]:
    """The checkpoints in a folder with their steps, in the order of the run.

    In the natural order of names ("step-9" before "step-10") if one holds no step. A link to
    another checkpoint there, and a copy with the step and the weights of another, is left out. So
    are the components of a diffusers pipeline that is exported there.

    Raises ValueError for two checkpoints of one step with other weights, and where a step may be
    one within its epoch and steps, epochs and names tell more than one order.
    """
    components = sources.told_in(Path(folder, "model_index.json"))
    here = (path for path in Path(folder).iterdir() if path.name not in components)
    paths = sorted(filter(_is_checkpoint, here), key=_natural)
    real = {path.resolve() for path in paths if not path.is_symlink()}
    found: dict[Path, search.Moment | None] = {}
    for path in paths:
        if not (path.is_symlink() and path.resolve() in real):
            with suppress(IsADirectoryError):  # a folder of other things
                found[path] = search.moment(_parts(path))
    told = {path: moment for path, moment in found.items() if moment is not None}
    if len(told) < len(found):
        return found
    if any(each.epoch is None for each in told.values()):
        told = {path: each._replace(epoch=None) for path, each in told.items()}
    told = _without_copies(told)
    return {path: told[path] for path in _in_order(folder, told)}


def _without_copies(told: Mapping[Path, search.Moment]) -> dict[Path, search.Moment]:
    """The checkpoints without copies; ValueError for others of one step that is no other epoch's.

    A copy is of the same step, and may be of a later epoch, which has begun meanwhile.
    """
    kept: dict[Path, search.Moment] = {}
    last: dict[int, Path] = {}
    for path, each in sorted(told.items(), key=lambda item: item[1].epoch or 0):
        before = last.get(each.step)
        if before is not None and _are_copies(before, path):
            continue
        if before is not None and kept[before].epoch == each.epoch:
            raise ValueError(
                f"{path}: expected one checkpoint of each step, found {before.name} of the same "
                "step with other weights; give the files in their order"
            )
        kept[path], last[each.step] = each, path
    return {path: kept[path] for path in told if path in kept}


def _in_order(folder: str | os.PathLike[str], told: Mapping[Path, search.Moment]) -> list[Path]:
    """Checkpoints in natural order, by their steps, or where these restart by epochs and steps."""
    by_step = sorted(told, key=lambda path: told[path].step)
    if all(each.is_global for each in told.values()):
        return by_step
    by_name = [*told]
    are_alike = len({re.sub(r"\d+", "0", path.name) for path in told}) == 1
    if all(each.epoch is None for each in told.values()):
        if by_step == by_name or not are_alike:
            return by_step
        what, other = "names", by_name
    else:
        what, other = "epochs", sorted(told, key=lambda path: (told[path].epoch, told[path].step))
        if other == by_step or len({each.step for each in told.values()}) < len(told):
            return other
        if are_alike and by_name in (other, by_step):
            return by_name
    steps, others = (_paths.some([path.name for path in each]) for each in (by_step, other))
    raise ValueError(
        f"{folder}: expected one order of the checkpoints, whose steps may restart with each "
        f"epoch, found {steps} by their steps and {others} by their {what}; give the checkpoints "
        "in their order"
    )


def check_order(folder: str | os.PathLike[str], found: Mapping[Path, search.Moment | None]) -> None:
    """Raise ValueError where only some of the `steps` hold a step, or a number in their names."""
    for what, holding in (
        ("step", [path for path, step in found.items() if step is not None]),
        ("number in the name", [path for path in found if re.search(r"\d", path.name)]),
    ):
        if len(holding) == len(found):
            return
        if holding:
            lacking = [path for path in found if path not in holding]
            word, fewer = min(("none", lacking), ("one only", holding), key=lambda x: len(x[1]))
            raise ValueError(
                f"{folder}: expected a {what} of each checkpoint or of none, found {word} of "
                f"{_paths.some([path.name for path in fewer])}; give the checkpoints in their order"
            )


def told_apart(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths, of as many parts for all, that tell them apart.

    >>> told_apart([Path("run/1/unet"), Path("run/2/unet")]), told_apart([Path("a/1"), Path("b/2")])
    (['1/unet', '2/unet'], ['1', '2'])
    """
    parts = [path.absolute().parts for path in paths]
    count = next(
        (
            n
            for n in range(1, max(map(len, parts)))
            if len({p[-n:] for p in parts}) == len({*parts})
        ),
        1,
    )
    return [str(Path(*each[-count:])) for each in parts]


def _is_checkpoint(path: Path) -> bool:
    if path.name.startswith(".") or sources.NOT_MODELS.match(path.name):
        return False  # a file that is still being written; or an optimizer's
    return path.is_dir() or (path.is_file() and path.suffix in sources.SUFFIXES)


def _are_copies(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same weights."""
    a, b = (
        {(part.path, i): leaf for part in _parts(path) for i, leaf in enumerate(part.values())}
        for path in (one, other)
    )
    return a.keys() == b.keys() and all(
        leaf.dtype == b[key].dtype and torch.equal(sources.loaded(leaf), sources.loaded(b[key]))
        for key, leaf in a.items()
    )


def _parts(path: Path) -> list[search.Part]:
    return search.parts(search.containers(sources.content(path, on_disk=True)))


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A key by which "step-9" comes before "step-10"."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(each)) if each.isdecimal() else (1, each) for each in pieces if each]
