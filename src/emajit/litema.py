"""A drop-in for the `LitEma` of latent-diffusion, SGM and CogVideo."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _choose, _controls, _module, _names, _paths, _warn, functional, scope
from emajit._context import contextmanager
from emajit._litema_state import LitEmaState
from emajit.functional import Decay, Nonfinite, Rounding, Schedule

_log = logging.getLogger(__name__)


class LitEma(LitEmaState):
    """Averages of a model's trainable parameters, as the buffers of a module.

    Interface and `state_dict` are those of latent-diffusion's class: the buffers `decay` (float32,
    0-d), `num_updates` (int32, 0-d; -1 without warm-up), and each average under the name of its
    parameter with the dots removed. Where two parameters would share that key, or something else
    has it, the dots become slashes. Averages go on for a parameter that is frozen later.

    Args:
        model: the module whose trainable parameters are averaged; call `track` where it gets others
            later, or its first ones. It is not kept, except by weak references. With several
            processes, build the LitEma where all have the same weights: after
            `DistributedDataParallel`, or with one seed.
        decay: the share of the average that an update keeps, in [0, 1]; or a schedule of the number
            of updates (see `emajit.schedules`). With a schedule the buffer `decay` holds the decay
            of the last update when the state is saved, and a loaded one has no effect.
        use_num_upates: warm up with `min(decay, (1 + n) / (10 + n))` at update n = 1, 2, ...; no
            effect beside a schedule.
        use_num_updates: the same argument, in the spelling of many copies of the class.
        init_num_updates: the number of updates to go on from, where they are counted.
        dtype: of the averages; default that of each parameter.
        buffers: "ignore" leaves the model's buffers, such as the statistics of BatchNorm, as they
            are in training. Of the buffers that a `state_dict` has, "copy" holds the values at the
            last update, and "average" averages those that are floating-point, except u and v of
            `spectral_norm`, masks of pruned weights, scales of quantised tensors, and those with
            infinite values, which are copied.
        include, exclude: names of parameters and buffers (without the prefixes of wrappers) with
            wildcards such as "encoder.*", one or a list, or a predicate on the name. Included are
            all by default. In a scope what is left out keeps the training weights.
        every: update at every so many calls, counted from the construction. A state does not tell
            how many calls there were since the last update; with the decay `schedules.every(...)`
            each call counts as an update, so that a loaded state goes on exactly.
        rounding, nonfinite, backend: as in `emajit.update`. A state that is saved on the CPU tells
            once, by a warning, of averages that are not finite.

    Raises:
        ValueError: `decay` is not in [0, 1], the filter leaves no trainable parameter or has a name
            that matches none, an unknown option, or `rounding="stochastic"` where updates are not
            counted.
        TypeError: `model` is no module, or `decay` neither a number nor a schedule.

    >>> model = nn.Linear(2, 2)
    >>> ema = LitEma(model, decay=0.999)
    >>> ema(model)  # after each optimizer step
    >>> with ema.ema_scope(model):
    ...     prediction = model(torch.ones(2))
    >>> ema
    LitEma(decay=0.999 after a warm-up, updates=1, averages=2 in float32)
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Tensor | Schedule = 0.9999,
        use_num_upates: bool = True,
        *,
        use_num_updates: bool | None = None,
        init_num_updates: int = 0,
        dtype: torch.dtype | None = None,
        buffers: _module.Policy = "ignore",
        include: _names.Patterns | None = None,
        exclude: _names.Patterns | None = None,
        every: int = 1,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
        backend: str = "auto",
    ) -> None:
        if isinstance(decay, float | int) and not 0.0 <= decay <= 1.0:
            raise ValueError(f"Decay must be between 0 and 1, found {decay}")
        functional.check_decay(decay)
        rate = decay if callable(decay) else float(decay)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
        _choose.check_options(rounding, nonfinite)
        _choose.check_backend(backend)
        _controls.check_every(every)
        _controls.check_first(init_num_updates)
        warms_up = use_num_upates if use_num_updates is None else use_num_updates
        counts = warms_up or callable(decay)
        if rounding == "stochastic" and not counts:
            raise ValueError(
                "rounding: 'stochastic' needs the number of updates, which is not counted without "
                "warm-up; for a constant decay, give decay=emajit.schedules.constant(...)"
            )
        _module.check_policy(buffers)
        chosen = _names.Filter(include, exclude)
        _module.check_filter(model, chosen)
        super().__init__(
            rate,
            chosen,
            buffers,
            dtype,
            first_update=init_num_updates if counts else -1,
            must_count=rounding == "stochastic",
            every=every,
        )
        self.rounding, self.nonfinite, self.backend = rounding, nonfinite, backend
        self._swapped: AbstractContextManager[None] | None = None  # entered by `swap`
        self.track(model)
        if rounding == "nearest":
            for held in {average.dtype for average in self.buffers()}:
                _warn.warn_of_stall(held, 1.0 - self._written_decay[0], again=True)

    def forward(self, model: nn.Module) -> None:
        """Update the averages with the parameters of `model`, without a host synchronisation.

        An update that a signal interrupts is counted if the last average was written.

        Raises, before anything is written: ValueError where the model lacks an averaged parameter,
        has a trainable one that is neither averaged nor left out, or a shape differs; TypeError if
        it is no module; RuntimeError inside of a scope, between `copy_to` after `store` and
        `restore`, and in a compiled or captured step with `every`, where calls cannot be counted.
        """
        if self.every > 1:
            average = self.get_buffer([*self.m_name2s_name.values(), "decay"][0])
            if not self._is_due(average.device):
                return
        averages, params, updates, decay = self._prepare_update(model)
        step = updates if isinstance(updates, Tensor) else max(0, updates)
        options: Any = {
            "decay": decay,
            "rounding": self.rounding,
            "nonfinite": self.nonfinite,
            "backend": self.backend,
        }
        last = _controls.last_of(averages, updates)
        try:
            try:
                functional.update_(averages, params, step, **options)
            except _paths.DeviceError:
                params = {name: _moved(p, averages[name].device) for name, p in params.items()}
                functional.update_(averages, params, step, **options)
            self._finish_update(model, updates)
        except BaseException as error:
            self._count_if_written(last, updates)
            if isinstance(error, ValueError):
                _module.check_shapes(averages, params)  # which tells of `track`
            raise

    def _prepare_update(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], int | Tensor, Decay | Schedule]:
        """The averages of the next update, their parameters, the updates so far and the decay.

        The number of updates is -1 without warm-up, and a tensor where it must not be read.
        """
        averages, params = self._pairs(model)
        if self._overwritten or not averages:
            self._check_trained(averages, params)
        if self._copied:
            copies = self._copies()
            _module.check_shapes(copies, params)
            averages, params = (
                {name: tensor for name, tensor in tensors.items() if name not in copies}
                for tensors in (averages, params)
            )
        if self.rounding == "stochastic":  # a hash of the names, whatever wraps the model
            bare = [self._bare[name] for name in averages]
            averages, params = (
                dict(zip(bare, tensors.values(), strict=True)) for tensors in (averages, params)
            )
        first = next(iter(averages.values())) if averages else self.decay
        updates = self._updates(first.device)
        return averages, params, updates, self._decay_at(updates)

    def _copies(self) -> dict[str, Tensor]:
        """The copies of buffers, under the names of the model seen last."""
        names = [name for name, key in self._keys.items() if key in self._copied]
        return {name: self.get_buffer(self._keys[name]) for name in names}

    def _finish_update(
        self, model: nn.Module, updates: int | Tensor, unless: Tensor | None = None
    ) -> None:
        """Count an update and copy buffers; a flag on the device may say that it was left out."""
        self._count(updates, unless)  # first: what is not copied now is so by the next update
        if self._copied:
            copies, buffers = self._copies(), dict(model.named_buffers())
            values = [buffers[name] for name in copies]
            if unless is not None:
                pairs = zip(copies.values(), values, strict=True)
                values = [torch.where(unless, old, new) for old, new in pairs]
            _module.at_once(_module.copying([*copies.values()], values))
        self._untouched.clear()
        if not self._is_updated:  # to set an attribute of a module takes a microsecond
            self._is_updated = True

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages into `model`; all of them, or an error and none.

        An interrupt does not come between two parameters; an error of the device may.
        """
        averages, params = self._pairs(model)
        _module.check_shapes(averages, params)
        overwritten = self._overwritten
        if self.collected_params and not any(seen is model for seen, _ in overwritten):
            overwritten = [*overwritten, (model, _module.copied_buffers(model))]
        copy = _module.copying([params[name] for name in averages], [*averages.values()])
        _module.at_once((vars(self).update, {"_overwritten": overwritten}), copy)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep a copy of `parameters` for `restore`.

        Raises RuntimeError if a copy is kept already, of the training weights.
        """
        if self.collected_params:
            raise RuntimeError(
                "store: expected restore() after the last store(), found parameters still stored; "
                "call restore() first"
            )
        parameters = _module.listed("store", parameters, self._seen)
        scope.check_outside(parameters)
        stored = [p.detach().clone() for p in parameters]
        vars(self).update(collected_params=stored, _overwritten=[])

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Copy what `store` kept back into `parameters`, in order, and release it.

        Buffers of a model into which `copy_to` has copied since then get their values of before it
        back too, also where `update_bn` has written them. After an interrupt all is back, or all is
        still stored and can be restored again.

        Raises RuntimeError if nothing is stored, and ValueError if number or shapes differ.
        """
        parameters = _module.listed("restore", parameters, self._seen)
        scope.check_outside(parameters)
        if not self.collected_params:
            if not parameters:  # nothing of nothing
                return
            raise RuntimeError("restore: expected store() before, found nothing stored")
        _module.check_stored(self.collected_params, parameters)
        buffers, values = _module.overwritten_beside(self._overwritten, parameters)
        copy = _module.copying(parameters + buffers, self.collected_params + values)
        released: dict[str, Any] = {"collected_params": [], "_overwritten": []}
        _module.at_once(copy, (vars(self).update, released))

    def swap(self, model: nn.Module) -> None:
        """Enter `ema_scope(model)`, or leave the one that the last call has entered.

        For callers of copies of the class that exchange weights and averages by two calls. Here
        the averages stay where they are, so that a state saved in between is that of the averages.
        """
        if self._swapped is None:
            entered = self.ema_scope(model)
            entered.__enter__()
            self._swapped = entered
        else:
            swapped, self._swapped = self._swapped, None
            swapped.__exit__(None, None, None)

    @contextmanager
    def ema_scope(
        self, model: nn.Module, context: str | None = None, *, copy: bool = False
    ) -> Iterator[None]:
        """Inside, `model` computes with the averages; afterwards its training weights are back.

        As `emajit.ema_scope`, where it is told what is copied, and what a scope is not for. Code
        that writes parameters or averaged buffers inside writes the averages: call `model.eval()`
        before. With `context` both switches are logged under that name.

        Raises RuntimeError as `emajit.ema_scope`, and ValueError as `forward`.
        """
        averages, params = self._pairs(model)
        _module.check_shapes(averages, params)
        pairs = [(params[name], average) for name, average in averages.items()]
        with scope.exchanged(model, pairs, copy=copy):
            if context is not None:
                _log.info("%s: Switched to EMA weights", context)
            try:
                yield
            finally:
                if context is not None:
                    _log.info("%s: Restored training weights", context)


def _moved(param: Tensor, device: torch.device) -> Tensor:
    """The parameter on the device of its average; on none, if that has no numbers."""
    return param if device.type == "meta" else param.to(device)
