"""The averages of the callbacks: the options, the state in whole tensors, and a fingerprint."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from emajit import (
    _choose,
    _controls,
    _devices,
    _exchange,
    _module,
    _names,
    _paths,
    _shards,
    _tree,
    _warn,
    functional,
    schedules,
)
from emajit.functional import Nonfinite, Rounding
from emajit.litema import LitEma


def checked(
    decay: Any,
    every: int,
    *,
    dtype: torch.dtype | None,
    buffers: _module.Policy,
    rounding: Rounding,
    nonfinite: Nonfinite,
    backend: str,
    **others: Any,
) -> dict[str, Any]:
    """The options of a `LitEma`; ValueError and TypeError name an unusable option."""
    functional.check_decay(decay)
    _tree.check_dtype(dtype)
    _module.check_policy(buffers)
    _controls.check_every(every)
    _choose.check_options(rounding, nonfinite)
    _choose.check_backend(backend)
    return {
        # A number becomes a schedule: the decay of every update, with updates counted.
        "decay": decay if callable(decay) else schedules.constant(decay),
        "dtype": dtype,
        "buffers": buffers,
        "rounding": rounding,
        "nonfinite": nonfinite,
        "backend": backend,
        **others,
    }


def started(
    model: nn.Module, options: Mapping[str, Any], names: Collection[str] = ()
) -> tuple[LitEma, set[str]]:
    """A LitEma of the trainable parameters and those in `names`; and the trainable names.

    `names` are frozen parameters with a saved average: unfrozen in the training that is resumed,
    and frozen again now.
    """
    params = _module.named_parameters(model)
    trainable = {name for name, p in params.items() if p.requires_grad}
    frozen = [
        params[name] for name in _names.match(params, names).values() if name not in trainable
    ]
    try:
        for p in frozen:
            p.requires_grad_(True)
        return LitEma(model, **options), trainable
    finally:
        for p in frozen:
            p.requires_grad_(False)


def follow(ema: LitEma, model: nn.Module, known: set[str]) -> set[str]:
    """Track parameters that now require grad; returns their names and the `known` names."""
    trainable = {name for name, p in _module.named_parameters(model).items() if p.requires_grad}
    if not trainable <= known:
        ema.track(model)
    return trainable | known


def has_begun(ema: LitEma) -> bool:
    """Whether there was an update.

    Before the first, the averages are the initial weights: an untrained model.
    """
    return int(ema.num_updates) > 0


def averaged(ema: LitEma, model: nn.Module) -> AbstractContextManager[object]:
    """A context in which the model has the averages, if there was an update."""
    return ema.ema_scope(model) if has_begun(ema) else nullcontext()


def state_of(ema: LitEma) -> dict[str, Any]:
    """The state for `restore`, in whole tensors; all processes must call this.

    Warns once of averages that are not finite.
    """
    averages = ema.named_averages()
    if ema.nonfinite != "skip":
        here = _shards.local(averages.values())
        _warn.warn_of_nonfinite(ema, dict(zip(averages, here, strict=True)))
    return {
        "shadow": {name: _shards.whole(average) for name, average in averages.items()},
        "step": int(ema.num_updates),
    }


def restore(ema: LitEma, state: Mapping[str, Any]) -> None:
    """Load a state of `state_of`; raises ValueError and changes nothing if it does not fit."""
    shadow, step = state["shadow"], torch.tensor(state["step"], dtype=torch.int32)
    keys = ema._keys_by_name()
    missing, unknown = sorted(keys.keys() - shadow.keys()), sorted(shadow.keys() - keys.keys())
    if missing or unknown:
        raise ValueError(
            "averages: expected those of the model and of the option buffers, found "
            f"{_paths.few(missing)} missing and {_paths.few(unknown)} unknown"
        )
    flat = {
        keys[name]: _shards.split_as(ema.get_buffer(keys[name]), value)
        for name, value in shadow.items()
    }
    try:
        ema.load_state_dict({**flat, "decay": ema.decay, "num_updates": step})
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def fingerprint(weights: Iterable[Tensor], dtype: torch.dtype | None = None) -> str:
    """A fingerprint of this process's shards of some weights, cast to `dtype` if given.

    It distinguishes the weights of two trainings: a hash of the sums of the bits, as integers, in
    each row and in each column.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    code = 0
    shards = _shards.local([weight.detach() for weight in weights])
    for weight in chain.from_iterable(map(_exchange.within, shards)):
        if weight.numel():
            if dtype == torch.float64 != _devices.widest(weight.device):
                weight = weight.cpu()  # noqa: PLW2901
            cast = weight.to(dtype) if dtype and weight.is_floating_point() else weight
            plain = cast.resolve_conj().resolve_neg().contiguous()
            rows = plain.view(len(cast) if cast.ndim > 1 else 1, -1)
            rows = rows.view(integers.get(cast.itemsize, torch.int64))
            for dim in (0, 1):
                sums = rows.sum(dim, dtype=torch.int64).tolist()
                code = zlib.crc32(repr(sums).encode(), code)
    return f"{code:08x}"
