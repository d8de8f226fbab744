"""The averages of a checkpoint, the interface of a layout, and helpers for several layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _alias, _names, _paths
from emajit.checkpoint.patching import Changes

State = Mapping[str, Tensor]
BUFFERS = {"num_batches_tracked", "running_mean", "running_var"}  # of batch normalisation
MOST = 100  # averages in one state
NO_NAMES = "found none; pass names=model, on the command line --names FILE"


class NotOneError(ValueError):
    """A checkpoint has no average, or several, or none at a key; the message has a table."""


class Averaged(NamedTuple):
    """The averages of a checkpoint.

    weights: the averaged parameters, and the trained values of all other tensors (buffers,
        frozen parameters), under the names of the model's own `state_dict`.
    layout: the layout of the checkpoint.
    step: how many updates the averages have taken, if known; for ema-pytorch the number of
        calls, of which by default one in ten is an update.
    decay: the decay of an update, if known: from the layout, else from the one `ema_decay`,
        `ema.decay` or `decay` in a mapping that the average is in.
    raw_only: the names in `weights` that are not averages.
    raw: the trained weights under the same names, if the checkpoint holds them too.
    others: how many tensors of the checkpoint are neither averages nor trained weights.
    path: the path of the averages in the checkpoint, as `key` of `checkpoint.read` takes it.
    raw_path: the path of the trained weights, if the layout has no place for them.
    why: the reason why these are taken for averages.
    sigma_rel: the length of a power-function average relative to the run, if the file tells it
        (EDM2), or the `sigma_rel` given to `checkpoint.read` (ema-pytorch's `PostHocEMA`).
    options: the options of diffusers' `EMAModel` beside its decay, such as the `power` of its
        warm-up; empty for others.
    """

    weights: dict[str, Tensor]
    layout: str
    step: int | None = None
    decay: float | None = None
    raw_only: tuple[str, ...] = ()
    raw: Mapping[str, Tensor] = {}
    others: int = 0
    path: str = ""
    raw_path: str = ""
    why: str = ""
    sigma_rel: float | None = None
    options: Mapping[str, Any] = {}


def is_copied(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is one of batch normalisation, or of integers, which libraries copy."""
    is_number = dtype.is_floating_point or dtype.is_complex
    return name.rpartition(".")[2] in BUFFERS or not is_number


def not_means(averaged: Averaged) -> frozenset[str]:
    """The names in `weights` that are no means over steps, or may be none.

    torch's `AveragedModel` copies buffers unless told, which its file does not tell.
    """
    copied = averaged.weights if averaged.layout == "AveragedModel" else ()
    buffers = [name for name in copied if name.rpartition(".")[2] in BUFFERS]
    return frozenset([*averaged.raw_only, *buffers])


class Reading(NamedTuple):
    """One average as a layout holds it, before its parameters have the names of the model.

    layout: as in `Averaged`.
    averages: by name, or in the order of the parameters.
    step, decay, sigma_rel, options: as in `Averaged`.
    raw: the trained weights, if the layout has a place for them.
    flat: whether `averages` has the keys of a `LitEma`, which are names without their dots.
    path: the path of the averages in the mapping that the layout has read.
    number: the place of its length in the list of lengths, if the file tells the place alone.
    """

    layout: str
    averages: Mapping[str, Any] | Sequence[Any]
    step: int | None = None
    decay: float | None = None
    raw: Mapping[str, Any] | None = None
    flat: bool = False
    path: str = ""
    sigma_rel: float | None = None
    options: Mapping[str, Any] = {}
    number: int | None = None


class Names(NamedTuple):
    """The names of a model's parameters in order (None if not given), and of its buffers."""

    parameters: list[str] | None
    buffers: list[str]


class Place(NamedTuple):
    """The place of averages in a checkpoint of a trainer.

    trained: the trained weights in it, under the names of the model's `state_dict`.
    averages: the averages in it, under the same names; None if it has none yet.
    put: makes the changes to the checkpoint from averages under these names and their step; None
        for the step leaves the step that the checkpoint has.
    """

    trained: Mapping[str, Any]
    averages: Mapping[str, Any] | None
    put: Callable[[dict[str, Tensor], int | None], Changes]


class Writer(NamedTuple):
    """How a layout is written.

    name: its name in `checkpoint.write` and in the command.
    state: makes the content of a file from averages and names. Raises ValueError where the averages
        lack something that the layout holds, such as a step. None for a layout with a `place`.
    safetensors: whether the content is a flat state, which safetensors can hold. Such a layout is
        written with `torch.save` only if the suffix of the path asks for it.
    torch_key: the key under which `torch.save` gets the content; "" for none.
    by_position: whether the averages are a list in the order of the model's parameters.
    options: the options that are written beside the decay where the source holds none.
    place: finds the place of the averages in a checkpoint of the trainer, of which the written file
        is a copy. Raises ValueError for a checkpoint of another trainer. None for a layout that is
        written from the averages alone.
    """

    name: str
    state: Callable[[Averaged, Names], dict[str, Any]] | None
    safetensors: bool = False
    torch_key: str = ""
    by_position: bool = False
    options: Mapping[str, Any] = {}
    place: Callable[[Mapping[str, Any]], Place] | None = None


class Layout(NamedTuple):
    """How one library keeps averages in a checkpoint.

    read: takes a mapping, anywhere in a file, and returns the averages in it: none for another
        layout. It raises ValueError where the layout is its own but is broken. `checkpoint.read`
        turns the errors of a broken structure (KeyError, TypeError and others) into ValueError.
        None if emajit only writes it.
    writer: None if emajit only reads it.
    """

    read: Callable[[Mapping[str, Any]], list[Reading]] | None = None
    writer: Writer | None = None


def listed(names: Iterable[str] | torch.nn.Module | None) -> Names:
    """The `names` argument of `checkpoint.read` and `checkpoint.write`; TypeError for others."""
    if names is None:
        return Names(None, [])
    if isinstance(names, torch.nn.Module):
        return Names(
            [name for name, _ in names.named_parameters()],
            [name for name, _ in names.named_buffers()],
        )
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected a list of names, or the model, found {names!r}")
    parameters = [*names]
    for name in parameters:
        if not isinstance(name, str):
            found = type(name).__qualname__
            raise TypeError(f"names: expected strings, or the model itself, found {found}")
    return Names(parameters, [])


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of a mapping, by name; ValueError for anything but a mapping."""
    if not isinstance(tree, Mapping):
        raise ValueError(  # noqa: TRY004, it is a broken file, not a wrong argument
            f"expected a state_dict, found {type(tree).__qualname__}"
        )
    return {key: v for key, v in tree.items() if isinstance(key, str) and isinstance(v, Tensor)}


def tensors_below(prefix: str, state: State) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it; ValueError if there are none."""
    found = _names.below(prefix, state)
    if not found:
        raise ValueError(f"expected averages below {prefix!r}, found none")
    return found


def prefixes(state: State, *marks: str) -> list[str]:
    """The prefixes below which a state has each of the names in `marks`; ValueError for many."""
    ends = [key.removesuffix(marks[0]) for key in state if f".{key}".endswith(f".{marks[0]}")]
    found = [prefix for prefix in ends if all(prefix + mark in state for mark in marks)]
    if len(found) > MOST:
        raise ValueError(f"expected at most {MOST} averages in one state, found {len(found):,}")
    return found


def step_of(value: Any) -> int | None:
    """The number of updates in a file, or None if the file has none."""
    try:
        return None if value is None else int(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"step: expected a whole number, found {value!r:.100}") from None


def by_position(layout: str, averages: Any, names: Names) -> dict[str, Tensor]:
    """Name the averages in a list by the parameters' names, of which there must be as many."""
    if names.parameters is None:
        raise ValueError(f"{layout}: expected names, since its averages have none, {NO_NAMES}")
    if len(averages) != len(names.parameters):
        found = f"found {len(names.parameters)}"
        hint = "pass names=, on the command line --names FILE, of those that were averaged alone"
        hint = f"; {hint}" if len(averages) < len(names.parameters) else ""
        raise ValueError(f"{layout}: expected {len(averages)} names, {found}{hint}")
    check_unique(layout, names.parameters)
    return dict(zip(names.parameters, averages, strict=True))


def check_unique(layout: str, names: Sequence[str]) -> None:
    """Raise ValueError if a name occurs twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{layout}: expected a name of its own for each, found twice {twice[:5]}")


def completed(
    averages: dict[str, Tensor],
    raw: State,
    layout: str,
    step: int | None = None,
    decay: float | None = None,
) -> Averaged:
    """The averages, completed by the trained values of all other tensors.

    The average of a tied parameter gets every name that the parameter has in `raw`, also
    if the file has its numbers twice (`files.tie_equal`).
    """
    by_identity = {
        _alias.identity(raw[name]): average for name, average in averages.items() if name in raw
    }
    tied = {n: by_identity[i] for n, v in raw.items() if (i := _alias.identity(v)) in by_identity}
    averages = tied | averages
    missing = [name for name in raw if name not in averages]
    weights = {name: averages.get(name, value) for name, value in raw.items()} | averages
    return Averaged(weights, layout, step, decay, tuple(missing), raw)


def averages_of(averaged: Averaged) -> dict[str, Tensor]:
    """The averages alone, tied ones only under their first name."""
    named = {n: v for n, v in averaged.weights.items() if n not in averaged.raw_only}
    tied = _alias.ties(named)
    return {name: value for name, value in named.items() if name not in tied}


def of_parameters(averaged: Averaged, names: Names) -> dict[str, Tensor]:
    """The averages of parameters alone, for a layout that has no place for those of buffers.

    A buffer is one of a model that is given, or of a batch normalisation, or of integers.
    """
    return {
        name: value
        for name, value in averages_of(averaged).items()
        if name not in names.buffers and not is_copied(name, value.dtype)
    }


def required(field: str, layout: str, averaged: Averaged) -> Any:
    """The "step" or the "decay"; ValueError if it is not known."""
    value = getattr(averaged, field)
    if value is None:
        raise ValueError(
            f"{layout}: expected a checkpoint that tells its {field}, or a {field} to write, "
            f"found none; pass {field}=, on the command line --{field}"
        )
    return value


def required_raw(layout: str, averaged: Averaged, averages: State) -> State:
    """The trained weights; ValueError if those of an average are missing."""
    if not averaged.raw.keys() >= averages.keys():
        raise ValueError(f"{layout}: expected the trained weights beside the averages, found none")
    return averaged.raw


def in_order(layout: str, averaged: Averaged, names: Names) -> list[Tensor]:
    """The averages in the order of `names`, which must name each of them and nothing else."""
    if names.parameters is None:
        raise ValueError(
            f"{layout}: expected names of the averages in the order of the model's parameters, "
            f"{NO_NAMES}"
        )
    check_unique(layout, names.parameters)
    held = {n: v for n, v in averaged.weights.items() if n not in averaged.raw_only}
    unknown = [name for name in names.parameters if name not in held]
    named = {_alias.identity(held[name]) for name in names.parameters if name in held}
    averages = averages_of(averaged)
    left_out = [name for name, v in averages.items() if _alias.identity(v) not in named]
    if unknown or left_out:
        hint = "; of the parameters of a model alone with names=model" * bool(left_out)
        told = [f"without {_paths.some(left_out)}"] * bool(left_out)
        told += [f"with {_paths.some(unknown)}, which is no average"] * bool(unknown)
        raise ValueError(
            f"{layout}: expected names of all averages, found them {' and '.join(told)}{hint}"
        )
    return [held[name] for name in names.parameters]
