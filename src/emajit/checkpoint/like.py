"""Write averages as a model's own file or folder, or into a copy of a trainer's checkpoint.

Names and shapes are checked before.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from emajit import _alias, _names, _paths
from emajit.checkpoint import files, search, sources
from emajit.checkpoint.averaged import Averaged, Place, Writer, averages_of, is_copied
from emajit.checkpoint.patching import Archive, Changes, Held, same

# Stems of weight files, and the suffixes of files to copy: no weights, no training state.
_STEMS = "diffusion_pytorch_model", "adapter_model"  # of diffusers, and PEFT
_TOLD = ".json", ".txt", ".model", ".md", ".jinja", ".py"
_DEEPEST = 100  # attributes before a name


def fitted(averages: Mapping[str, Tensor], like: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The averages of the names in `like`, a file or a folder of weights, in its order.

    Tied names that `like` lacks are left out. Raises ValueError, with the first five differences,
    where names or shapes differ, and where `like` holds more than one model.
    """
    wanted = _weights_in(Path(like))
    tied = _alias.ties(averages)
    missing = [name for name in wanted if name not in averages]
    unknown = [name for name in averages if name not in wanted and name not in tied]
    shapes = [
        f"{name} of shape {tuple(averages[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in averages and averages[name].shape != value.shape
    ]
    told = [*(f"no {name}" for name in missing), *(f"{name} beside" for name in unknown), *shapes]
    if told:
        raise ValueError(f"expected averages of the weights in {like}, found {_paths.some(told)}")
    return {name: averages[name] for name in wanted}


def _weights_in(path: Path) -> dict[str, Tensor]:
    held = search.parts(search.containers(sources.content(path)))
    if path.is_dir() and not (path / ".metadata").is_file():
        # The model of the folder itself: beside it may be averages, and other models in folders.
        held = [part for part in held if len(part.path) == 1] or held
    try:
        return search.one_model(held)[1]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_copy(
    path: Path,
    averaged: Averaged,
    writer: Writer,
    like: str | os.PathLike[str] | None,
    tell: Callable[[int], object],
) -> None:
    """Write a copy of the checkpoint `like` of a trainer with these averages in their place.

    They take the dtypes that they have there. Raises ValueError, with the first five differences,
    where names or shapes differ, and as `Archive`.
    """
    if like is None or writer.place is None:
        raise ValueError(
            f"{writer.name}: expected a checkpoint of the trainer, of which a copy is written, "
            "found none; pass like=, on the command line --like FILE"
        )
    archive = Archive(Path(like))
    try:
        try:
            place = writer.place(archive.tree)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"expected its averages, found {error!r}") from None
        archive.write(path, _changes(averaged, place), tell)
    except ValueError as error:
        raise ValueError(f"{writer.name}: {like}: {error}") from None


def _changes(averaged: Averaged, place: Place) -> Changes:
    there = None if place.averages is None else _held(place.averages)
    trained = _held(place.trained)
    averages = _placed(averaged, trained, there)
    if place.averages is None and averaged.step is None:
        raise ValueError(
            "expected a checkpoint that tells its step, or a step to write, found none; pass "
            "step=, on the command line --step"
        )
    return place.put(averages, averaged.step)


def _held(state: Any) -> dict[str, Held]:
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise ValueError(f"expected a state_dict, found {kind}")  # noqa: TRY004, it is a broken file
    return {name: value for name, value in state.items() if isinstance(value, Held)}


def _placed(
    averaged: Averaged, trained: Mapping[str, Held], there: Mapping[str, Held] | None
) -> dict[str, Tensor]:
    """The averages under the names of a trainer's weights, for each average that is `there`.

    Its module may hold the model as an attribute. All of its averages are needed, except those of
    copied buffers and of tensors that the source has without an average, such as frozen ones. Of
    the names of a tied average only one needs a place.
    """
    wanted = trained if there is None else there
    once = averages_of(averaged)
    name_of = _around(
        [n for n, v in once.items() if not is_copied(n, v.dtype)], {**trained, **wanted}
    )
    named: dict[str, Tensor] = {}
    first: dict[Held | str, Tensor] = {}  # of a weight, which may have several names
    for each, value in averaged.weights.items():
        if each in averaged.raw_only:
            continue
        files.check_dense(each, value)
        name = name_of(each)
        given = named.setdefault(name, value)
        if not same(first.setdefault(trained.get(name, name), given), value):
            raise ValueError(f"expected one average of {name}, found another under a second name")
    weight_of = {name: trained.get(name, name) for name in wanted}
    full = {name: first[weight] for name, weight in weight_of.items() if weight in first}
    known = {*full, *map(name_of, averaged.raw_only)}
    needed = [name for name, held in (there or {}).items() if not is_copied(name, held.dtype)]
    missing = [name for name in needed if name not in known]
    placed = {_alias.identity(value) for name, value in named.items() if name in wanted}
    unknown = [
        name
        for name, value in named.items()
        if _alias.identity(value) not in placed and not is_copied(name, value.dtype)
    ]
    shapes = [
        f"{name} of shape {tuple(value.shape)} for {wanted[name].shape}"
        for name, value in full.items()
        if tuple(value.shape) != wanted[name].shape
    ]
    told = [*(f"no {name}" for name in missing), *(f"{name} beside" for name in unknown), *shapes]
    if told or not full:
        raise ValueError(f"expected averages of its weights, found {_paths.some(told) or 'none'}")
    return full


def _around(averages: Iterable[str], names: Collection[str]) -> Callable[[str], str]:
    """How names of averages become `names`, of most of them: attributes before them may change.

    >>> _around(["model.0.w", "model.1.w"], ["net.0.w", "net.1.w", "b"])("model.0.w")
    'net.0.w'
    """
    bare = {short: name for name, short in _names.canonical_of(names).items()}
    before: dict[str, list[str]] = {}  # the attributes before each end of a name
    for name in bare:
        keys = name.split(".")
        for i in range(min(len(keys), _DEEPEST)):
            before.setdefault(".".join(keys[i:]), []).append(".".join([*keys[:i], ""]) if i else "")
    less, rest = "", [_names.canonical(name) for name in averages]
    while rest:
        counts = Counter(each for name in rest for each in before.get(name, ())).most_common(2)
        several = [each for each, count in counts if count == counts[0][1]]
        if counts and 2 * counts[0][1] > len(rest) and (len(several) == 1 or "" in several):
            more = "" if "" in several else several[0]
            return lambda name: bare.get(n := more + _names.canonical(name).removeprefix(less), n)
        attribute = _names.attribute(rest)
        less, rest = less + attribute, [n.removeprefix(attribute) for n in rest if attribute]
    return lambda name: name


def write_folder(
    path: Path,
    weights: Mapping[str, Tensor],
    like: Path,
    config: Mapping[str, Any],
    *,
    casts: Mapping[str, torch.dtype],
    tell: Callable[[int], object],
) -> None:
    """Write a folder with the weights and the other files of `like`, which appears when complete.

    `config` is added to its config.json. Raises FileExistsError where `path` exists.
    """

    def fill(file: Path) -> None:
        files.write_tensors(file, weights, lambda *_: {"format": "pt"}, casts=casts, tell=tell)

    write_folder_of(path, like, fill, config)


def write_folder_of(
    path: Path,
    like: Path,
    fill: Callable[[Path], object],
    config: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """As `write_folder`, where `fill` writes the file of the weights."""
    if path.exists():
        raise FileExistsError(errno.EEXIST, "expected no folder there yet", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir()
        for each in like.iterdir():
            if each.is_file() and each.suffix in _TOLD and not each.name.endswith(".index.json"):
                shutil.copyfile(each, part / each.name)
        if config:
            told = json.loads((part / "config.json").read_text(encoding="utf-8"))
            text = json.dumps({**told, **config}, indent=2) + "\n"
            (part / "config.json").write_text(text, encoding="utf-8")
        fill(part / f"{_stem(like)}.safetensors")
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _stem(like: Path) -> str:
    """The stem of the weight file in a folder of the same library as `like`."""
    names = [each.name for each in like.iterdir()]
    stems = [stem for stem in _STEMS if any(name.startswith(stem) for name in names)]
    return stems[0] if stems else "model"
