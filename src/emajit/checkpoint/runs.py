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


def steps(folder: str | os.PathLike[str]) -> dict[Path, int | None]:
    """The checkpoints in a folder with their steps, in the order of the steps.

    In the natural order of names ("step-9" before "step-10") if one holds no step. A link to
    another checkpoint there, and a copy with the step and the weights of another, is left out. So
    are the components of a diffusers pipeline that is exported there.

    Raises ValueError for two checkpoints of one step with other weights.
    """
    components = sources.told_in(Path(folder, "model_index.json"))
    here = (path for path in Path(folder).iterdir() if path.name not in components)
    paths = sorted(filter(_is_checkpoint, here), key=_natural)
    real = {path.resolve() for path in paths if not path.is_symlink()}
    found: dict[Path, int | None] = {}
    for path in paths:
        if not (path.is_symlink() and path.resolve() in real):
            with suppress(IsADirectoryError):  # a folder of other things
                found[path] = _step_of(path)
    told = {path: step for path, step in found.items() if step is not None}
    if len(told) < len(found):
        return found
    first: dict[int, Path] = {}
    for path in sorted(told, key=told.__getitem__):
        if first.setdefault(told[path], path) is not path:
            _check_copies(first[told[path]], path)
    return {path: step for step, path in first.items()}


def check_order(folder: str | os.PathLike[str], found: Mapping[Path, int | None]) -> None:
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


def _check_copies(one: Path, other: Path) -> None:
    """Raise ValueError unless two checkpoints have the same weights."""
    a, b = (
        {(part.path, i): leaf for part in _parts(path) for i, leaf in enumerate(part.values())}
        for path in (one, other)
    )
    if a.keys() != b.keys() or not all(
        leaf.dtype == b[key].dtype and torch.equal(sources.loaded(leaf), sources.loaded(b[key]))
        for key, leaf in a.items()
    ):
        raise ValueError(
            f"{other}: expected one checkpoint of each step, found {one.name} of the same step "
            "with other weights; give the files in their order"
        )


def _parts(path: Path) -> list[search.Part]:
    return search.parts(search.containers(sources.content(path, on_disk=True)))


def _step_of(path: Path) -> int | None:
    """The step that a checkpoint holds, or None."""
    found = [search.told(part)[0] for part in _parts(path)] or [None]
    return found[0]


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """A key by which "step-9" comes before "step-10"."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(each)) if each.isdecimal() else (1, each) for each in pieces if each]
