"""The averages of a checkpoint, written in the layout of another library."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emajit import _alias, _tree
from emajit.checkpoint import files
from emajit.checkpoint.averaged import Averaged, averages_of, listed
from emajit.checkpoint.layouts import WRITERS, diffusers
from emajit.checkpoint.layouts.litema import CONTROLS
from emajit.checkpoint.like import fitted, write_copy, write_folder
from emajit.checkpoint.saved import TIED, count
from emajit.checkpoint.sources import OF_TORCH


def write(
    path: str | os.PathLike[str],
    averaged: Averaged,
    *,
    layout: str = "state_dict",
    names: Iterable[str] | torch.nn.Module | None = None,
    like: str | os.PathLike[str] | None = None,
    decay: float | None = None,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    tell: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the averages that `read` has found into a file of another library, whole or not at all.

    Args:
        path: the file. A flat layout ("state_dict", "litema") is written as safetensors, or with
            `torch.save` into a `.ckpt`, `.pt`, `.pth` or `.bin`. The others are always written with
            `torch.save`, and refuse a `.safetensors`.
        averaged: from `read`. "diffusers-ema" writes its `options`, where there are some.
        layout: "state_dict" for the averaged weights alone, as a model loads them; "litema",
            "averaged-model", "ema-pytorch", "timm", "diffusers-ema", "torch-ema" or "mmcv"; or
            "lightning", "emajit-lightning" or "mmengine", a copy of the trainer's checkpoint
            `like`. The modules of `emajit.checkpoint.layouts` describe their files.
        names: for a layout by position, such as "diffusers-ema", the names of the model's
            parameters in order; or the model: its buffers are left out, and its parameters
            without an average get their trained value.
        like: a file or a folder of the model's weights, whose names and shapes the averages must
            have, except tied names that it lacks. For a folder of diffusers' or transformers'
            `save_pretrained`, `path` becomes such a folder, with its config and tokenizer: with
            "state_dict" for the model's `from_pretrained`, with "diffusers-ema" for the
            `from_pretrained` of `EMAModel`.

            For a trainer's layout, a checkpoint of the run that is to go on. `path` becomes a copy
            with these averages, in the place of its own or of none, in the dtypes of its own.
            Their names may have other attributes before them. All else keeps its bytes (trained
            weights, optimizers, loops, tensors without an average such as buffers), and no pickled
            object is loaded, of whatever class. Without a step the checkpoint's is kept.
        decay: the decay to go on with, for layouts that hold one; default, `averaged.decay`.
        step: how many updates the averages have taken, likewise.
        dtype: the dtype of floating-point tensors; default, their own. Not for a trainer's layout.
        tell: called with the number of bytes of each written piece.

    Raises:
        ValueError: `layout` is unknown; `dtype` is not floating-point, or too narrow for a finite
            number; the decay is outside [0, 1], the step negative; the layout needs something that
            is missing: the trained weights, a step, a decay, the names of all averages, or `like`;
            names or shapes differ from those in `like` (the first five are shown); `like` is of
            another trainer, has several averages, or averages that share memory with other tensors
            or have no dtype for these; `path` ends in `.safetensors` for a layout of `torch.save`.
        TypeError: `averaged` is not from `read`.
        OSError: the file cannot be written.
    """
    path, averaged = Path(path), _checked(averaged, layout, decay, step, dtype)
    writer = WRITERS[layout]
    if writer.state is None:
        _check_copied(path, layout, dtype)
        write_copy(path, averaged, writer, like, tell)
        return
    if like is not None:
        averaged = averaged._replace(weights=fitted(averaged.weights, like))
        if Path(like).is_dir():
            config = _config(averaged, layout)
            casts = files.float_casts(averaged.weights, dtype)
            write_folder(path, averaged.weights, Path(like), config, casts=casts, tell=tell)
            return
    if isinstance(names, torch.nn.Module) and writer.by_position:
        averaged = _parameters(averaged, names)
    if writer.safetensors and path.suffix not in OF_TORCH:
        state = writer.state(averaged, listed(names))
        narrowed = {name: value for name, value in state.items() if name not in CONTROLS}
        casts, header = files.float_casts(narrowed, dtype), {"format": "pt"}
        if tied := _alias.ties(state):  # the file has a copy of a tied tensor for each name
            header[TIED] = json.dumps(tied)
        files.write_tensors(path, state, lambda *_: header, casts=casts, tell=tell)
        return
    _check_suffix(path, layout)
    weights, raw = (_cast(part, dtype) for part in (averaged.weights, averaged.raw))
    state = writer.state(averaged._replace(weights=weights, raw=raw), listed(names))
    files.write_torch(path, {writer.torch_key: state} if writer.torch_key else state, tell)


def _checked(
    averaged: Averaged,
    layout: str,
    decay: float | None,
    step: int | None,
    dtype: torch.dtype | None,
) -> Averaged:
    """The averages with the decay and the step that are given; raises as `write`."""
    if not isinstance(averaged, Averaged):
        raise TypeError(
            f"averaged: expected what read has found, found {type(averaged).__qualname__}"
        )
    _tree.check_dtype(dtype)
    if decay is not None:
        if isinstance(decay, bool) or not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], found {decay}")
        averaged = averaged._replace(decay=float(decay))
    if step is not None:
        averaged = averaged._replace(step=count(step))
    if layout not in WRITERS:
        raise ValueError(f"layout: expected {' or '.join(WRITERS)}, found {layout!r}")
    return averaged


def _check_suffix(path: Path, layout: str) -> None:
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: expected a name with {' or '.join(OF_TORCH)} for {layout}")


def _check_copied(path: Path, layout: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError for what a copy of a trainer's checkpoint has no place for."""
    _check_suffix(path, layout)
    if dtype is not None:
        raise ValueError(f"dtype: expected none, since {layout} keeps the trainer's, found {dtype}")


def _config(averaged: Averaged, layout: str) -> dict[str, Any]:
    """The state of an `EMAModel` that diffusers keeps in the config.json of its weights."""
    if layout == "state_dict":
        return {}
    if layout != "diffusers-ema":
        raise ValueError(
            f"layout: expected state_dict or diffusers-ema in a folder, found {layout}"
        )
    state = diffusers.state(averaged, listed([*averages_of(averaged)]))
    return {key: value for key, value in state.items() if key != "shadow_params"}


def _parameters(averaged: Averaged, model: torch.nn.Module) -> Averaged:
    """`averaged` without the buffers of `model`, and with its frozen parameters as averages."""
    params, buffers = (dict(model.named_parameters()), dict(model.named_buffers()))
    return averaged._replace(
        weights={name: v for name, v in averaged.weights.items() if name not in buffers},
        raw_only=tuple(name for name in averaged.raw_only if name not in params),
    )


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """`tensors` in `dtype`, if one is given and they are floating-point; tied ones stay tied."""
    cast: dict[Hashable, Tensor] = {}
    for name, narrow in files.float_casts(tensors, dtype).items():
        if (identity := _alias.identity(tensors[name])) not in cast:
            cast[identity] = files.cast(repr(name), tensors[name], narrow)
    return {name: cast.get(_alias.identity(v), v) for name, v in tensors.items()}
