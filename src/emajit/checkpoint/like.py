"""Write averages as a model's own file or folder, after a check of names and shapes."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from emajit import _alias, _paths
from emajit.checkpoint import files, search, sources

# Stems of weight files, and the suffixes of files to copy: no weights, no training state.
_STEMS = "diffusion_pytorch_model", "adapter_model"  # of diffusers, and PEFT
_TOLD = ".json", ".txt", ".model", ".md", ".jinja", ".py"


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
