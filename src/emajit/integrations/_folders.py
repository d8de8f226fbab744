"""The averages in the folder of a checkpoint of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from emajit import _module, _names, _warn, checkpoint
from emajit.checkpoint import saved
from emajit.integrations import _average
from emajit.integrations._average import ONLY, Averages

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

_OF = "trained"


def at(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint at the present step."""
    return Path(args.output_dir or "", f"checkpoint-{state.global_step}")


def named(stem: str, name: str) -> str:
    """The name of a file or folder for an average: "averages" of a single one, else with a name."""
    return stem if name == ONLY else f"{stem}-{name}"


def files(folder: Path) -> dict[str, Path]:
    """The files of averages in a folder, by the names of the averages."""
    single = folder / "averages.safetensors"
    several = folder.glob("averages-*.safetensors")
    found = {path.stem.removeprefix("averages-"): path for path in several}
    return {ONLY: single, **found} if single.is_file() else found


def save(folder: Path, averages: Averages, model: nn.Module) -> None:
    """Write a file for each average, with a fingerprint of the weights that the model has."""
    of = {_OF: _fingerprint([*averages[None].named_averages()], model)}
    for name, shadow in averages.state().items():
        file = folder / f"{named('averages', name)}.safetensors"
        checkpoint.save(file, shadow, averages.updates, metadata=of)


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
    for found in filter(None, map(files, folders)):
        if not {*wanted} <= {*found}:
            _average.check_alike(wanted, found)
        with saved.opened(found[wanted[0]]) as file:
            names = file.names()
        averages = Averages(model, options, names)
        every = averages[None].named_averages()
        like = {name: every[name] for name in names if name in every}
        if {_of(found[which]) for which in wanted} == {_fingerprint([*like], model)}:
            loaded = {which: checkpoint.load(found[which], like=like) for which in wanted}
            others = {} if all_of_them else every  # without which `restore` names them
            shadows = {which: others | shadow for which, (shadow, _) in loaded.items()}
            averages.restore(shadows, loaded[wanted[0]][1])
            return averages
    raise ValueError(
        "expected averages.safetensors that was saved beside the weights that the model has, "
        f"found it in none of {[str(folder) for folder in folders]}; "
        "pass the folder in TrainingArguments(resume_from_checkpoint=...)"
    )


def _of(path: Path) -> str | None:
    """The fingerprint of the trained weights in a file."""
    with saved.opened(path) as file:
        return file.record.metadata.get(_OF)


def _fingerprint(names: list[str], model: nn.Module) -> str:
    """The fingerprint of the averaged parameters' trained weights, to recognise a training."""
    params = _module.named_parameters(model)
    averaged = {*_names.match(params, names).values()}
    return _average.fingerprint(p for name, p in params.items() if name in averaged)
