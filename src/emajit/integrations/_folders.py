"""The averages in the folder of a checkpoint of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from emajit import _module, _names, _shards, _warn
from emajit.integrations import _average, _exports, _sharded, _zero
from emajit.integrations._average import ONLY, Averages

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

_SUFFIX = ".safetensors"


def at(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint at the present step."""
    return Path(args.output_dir or "", f"checkpoint-{state.global_step}")


def named(stem: str, name: str) -> str:
    """The name of a file or folder for an average: "averages" of a single one, else with a name."""
    return stem if name == ONLY else f"{stem}-{name}"


def files(folder: Path) -> dict[str, Path]:
    """The files of averages in a folder, by the names of the averages; folders of shards too."""
    held = [path for path in folder.glob("averages*") if path.is_dir() or path.suffix == _SUFFIX]
    found = {path.name.removesuffix(_SUFFIX): path for path in sorted(held)}
    return {stem.removeprefix("averages").removeprefix("-"): found[stem] for stem in found}


def save(
    folder: Path,
    averages: Averages,
    names: Sequence[str],
    objects: Mapping[str, Any],
    *,
    writes: bool,
) -> None:
    """Write a folder for `from_pretrained` for each average in `names`, and a file for each one.

    The file has a fingerprint of the weights that the model has. Of a model in shards all processes
    call this, and one of them `writes`; where the Trainer saves shards, every process writes its
    own into a folder in place of the file.
    """
    model, is_whole = objects["model"], _sharded.is_whole(objects["optimizer"])
    bare = getattr(model, "_orig_mod", model)
    for name in names if is_whole else ():
        with averages.scope(model, name):
            weights = _sharded.weights(model, keeps=writes)
            if writes:
                own = folder / named("averaged", name)
                _exports.export(bare, own, objects["processing_class"], weights)
    of = _fingerprint([*averages[None].named_averages()], model)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for name, shadow in averages.state(whole=False).items():
        stem = folder / named("averages", name)
        path = stem.with_name(stem.name + _SUFFIX) if is_whole else stem
        told = shadow, averages.shapes, averages.updates, of
        _sharded.save(path, *told, is_whole=is_whole, writes=writes)


def resumed(model: nn.Module, options: Mapping[str, Any], folders: Sequence[Path]) -> Averages:
    """The averages in the checkpoint that is resumed; new averages if it has none, with a warning.

    Raises ValueError as `load`.
    """
    found = [folder for folder in folders if folder.is_dir()]
    if found and not any(map(files, found)):
        _warn.warn(f"{found[0]} has no averages of EMACallback; they start from its weights")
        return Averages(model, options)
    return load(model, options, folders, all_of_them=True)


def load(
    model: nn.Module, options: Mapping[str, Any], folders: Sequence[Path], *, all_of_them: bool
) -> Averages:
    """The averages that were saved beside the weights that the model has.

    Missing averages of parameters start from these weights, unless a file must have `all_of_them`.

    Raises ValueError where no folder has the averages, or averages do not fit.
    """
    wanted = _average.names_of(options)
    _shards.reshard(model)
    for found in filter(None, map(files, folders)):
        if not {*wanted} <= {*found}:
            _average.check_alike(wanted, found)
        names, _ = _sharded.told(found[wanted[0]])
        averages = Averages(model, options, names)
        every = averages[None].named_averages()
        like = {name: every[name] for name in names if name in every}
        prints = {_sharded.told(found[which])[1] for which in wanted}
        if prints == {_fingerprint([*like], model)}:
            shapes = averages.shapes
            loaded = {which: _sharded.load(found[which], like, shapes) for which in wanted}
            others = {} if all_of_them else every  # without which `restore` names them
            shadows = {which: others | shadow for which, (shadow, _) in loaded.items()}
            averages.restore(shadows, loaded[wanted[0]][1])
            return averages
    raise ValueError(
        "expected averages.safetensors that was saved beside the weights that the model has, "
        f"found it in none of {[str(folder) for folder in folders]}; "
        "pass the folder in TrainingArguments(resume_from_checkpoint=...)"
    )


def _fingerprint(names: list[str], model: nn.Module) -> str:
    """The fingerprint of the averaged parameters' trained weights, to recognise a training."""
    _shards.reshard(model)
    params, shapes = _module.named_parameters(_zero.mirror(model)), _zero.shapes(model)
    averaged = {*_names.match(params, names).values()}
    return _average.fingerprint(
        _zero.whole(name, p.detach(), shapes) for name, p in params.items() if name in averaged
    )
