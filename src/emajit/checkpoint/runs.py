"""The checkpoints of one run in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from emajit import _paths
from emajit.checkpoint import search, sources


def checkpoints(folder: str | os.PathLike[str]) -> dict[Path, search.Moment | None]:
    """The checkpoints in a folder, in the natural order of names ("step-9" before "step-10").

    A link to another checkpoint there, and a copy with the step and the weights of another, is left
    out. So are the components of a diffusers pipeline that is exported there. Epochs count where
    all tell one, and alone where none tells a step; a moment is None where nothing counts.
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
    if len(told) < len(found) or any(each.step is not None for each in told.values()):
        told = {path: each for path, each in told.items() if each.step is not None}
    if any(each.epoch is None for each in told.values()):
        told = {path: each._replace(epoch=None) for path, each in told.items()}
    copies = _copies(told)
    return {path: told.get(path) for path in found if path not in copies}


def steps(folder: str | os.PathLike[str]) -> dict[Path, search.Moment | None]:
    """The `checkpoints` in a folder with their steps, in the order of the run.

    Where steps and epochs tell two orders, names that differ in their numbers alone choose between
    them, and without that the epochs count only if a step is there twice. A step without epochs
    that is not certainly one of the whole run, or an epoch without steps, must agree with such
    names. Where not all tell a step, nor all an epoch, the order is the natural one.

    Raises ValueError where no order is chosen so, and for two of one step with other weights.
    """
    found = checkpoints(folder)
    told = {path: moment for path, moment in found.items() if moment is not None}
    if not told or len(told) < len(found):
        return found
    _check_apart(told)
    return {path: told[path] for path in _in_order(folder, told)}


def _copies(told: Mapping[Path, search.Moment]) -> set[Path]:
    """The checkpoints that have the step and the weights of another.

    A copy may be of a later epoch, which has begun meanwhile, and where another was saved since.
    """
    copies: set[Path] = set()
    met: dict[float | None, list[Path]] = {}
    for path, each in sorted(told.items(), key=lambda item: item[1].epoch or 0):
        before = met.setdefault(each.epoch if each.step is None else each.step, [])
        if any(_are_copies(other, path) for other in before[-2:]):
            copies.add(path)
        else:
            before.append(path)
    return copies


def _check_apart(told: Mapping[Path, search.Moment]) -> None:
    """Raise ValueError for two of one moment; by epochs alone, names may tell them apart."""
    met: dict[tuple[int | None, float | None], Path] = {}
    for path, each in told.items():
        before = met.setdefault((each.step, each.epoch), path)
        if before != path and not (each.step is None and _are_alike(told)):
            what = "epoch" if each.step is None else "step"
            raise ValueError(
                f"{path}: expected one checkpoint of each {what}, found {before.name} of the same "
                f"{what} with other weights; give the files in their order"
            )


def _in_order(folder: str | os.PathLike[str], told: Mapping[Path, search.Moment]) -> list[Path]:
    """Checkpoints in natural order, in the order that their steps, epochs and names tell."""
    by_name, are_alike, moments = [*told], _are_alike(told), [*told.values()]
    by_step = sorted(told, key=lambda path: told[path].step or 0)
    by_epoch = sorted(told, key=lambda path: (told[path].epoch or 0, told[path].step or 0))
    has_steps, has_epochs = moments[0].step is not None, moments[0].epoch is not None
    if has_steps and has_epochs:
        if by_step == by_epoch or len({each.step for each in moments}) < len(moments):
            return by_epoch
        if are_alike and by_name in (by_step, by_epoch):
            return by_name
        orders = {"steps": by_step, "epochs": by_epoch}
    else:
        what, order = ("steps", by_step) if has_steps else ("epochs", by_epoch)
        if order == by_name or not are_alike or all(each.is_global for each in moments):
            return order
        orders = {what: order, "names": by_name}
    found = " and ".join(
        f"{_paths.some([path.name for path in order])} by their {what}"
        for what, order in orders.items()
    )
    raise ValueError(
        f"{folder}: expected one order of the checkpoints, whose steps and epochs may restart, "
        f"found {found}; give the checkpoints in their order"
    )


def _are_alike(paths: Iterable[Path]) -> bool:
    """Whether names differ in their numbers alone."""
    return len({re.sub(r"\d+", "0", path.name) for path in paths}) == 1


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
