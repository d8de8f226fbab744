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
    parameter with the dots removed. If two parameters would share that key, or another attribute
    has it, the dots become slashes. A parameter that is frozen later is still averaged.

    Args:
        model: the module whose trainable parameters are averaged; call `track` after it has got
            new ones. The LitEma holds only weak references to it. With several processes, build
            the LitEma where all have the same weights: after `DistributedDataParallel`, or with
            one seed.
        decay: the share of the average that an update keeps, in [0, 1]; or a schedule of the number
            of updates (see `emajit.schedules`). With a schedule, saving writes the decay of the
            last update to the buffer `decay`, and a loaded decay has no effect.
        use_num_upates: warm up with `min(decay, (1 + n) / (10 + n))` at update n = 1, 2, ...; no
            effect beside a schedule.
        use_num_updates: the same argument, in the spelling of many copies of the class.
        init_num_updates: the first value of `num_updates`, if updates are counted.
        dtype: the dtype of the averages; default, the dtype of each parameter.
        buffers: "ignore" leaves the model's buffers, such as the statistics of BatchNorm, as they
            are in training. "copy" keeps the values at the last update of all buffers that a
            `state_dict` has. "average" averages the floating-point buffers among them, and copies
            the others, and also u and v of `spectral_norm`, masks of pruned weights, scales of
            quantised tensors, and buffers with infinite values.
        include, exclude: names of parameters and buffers (without the prefixes of wrappers) with
            wildcards such as "encoder.*", one or a list, or a predicate on the name. By default
            all are included. Excluded parameters keep their training weights in a scope.
        every: update at each `every`-th call, counted from the construction. A state does not hold
            the number of calls since the last update; with the decay `schedules.every(...)`
            each call counts as an update, so that a loaded state goes on exactly.
        rounding, nonfinite, backend: as in `emajit.update`. Saving a state on the CPU warns once of
            averages that are not finite.

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
        _choose.check_options(rounding=rounding, nonfinite=nonfinite, backend=backend)
        _controls.check_steps("every", every)
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

        An update that a signal interrupts is counted if the last average was written, which eager
        updates write last; a compiled one if the graph of the last average had begun.

        Raises, before anything is written: ValueError where the model lacks an averaged parameter,
        has a new trainable parameter that is not excluded, or a shape differs; TypeError if
        it is no module; RuntimeError inside a scope, after `store` and `copy_to` until `restore`,
        and in a compiled or captured step with `every`, where calls cannot be counted.
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
                params = moved(params, averages)
                functional.update_(averages, params, step, **options)
            self._finish_update(model, updates)
        except BaseException as error:
            self._count_if_written(last, updates)
            if isinstance(error, ValueError):
                _module.check_shapes(averages, params)  # its message names `track`
            raise

    def _prepare_update(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], int | Tensor, Decay | Schedule]:
        """The averages of the next update, their parameters, the updates so far and the decay.

        The number of updates is -1 without warm-up, and a tensor if the host must not read it.
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
        if self.rounding == "stochastic":  # the noise is a hash of the names, without wrappers
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
        """Count an update and copy buffers, unless the flag `unless` on the device is true."""
        self._count(updates, unless)  # first: the next update makes up for a missed copy
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
        """Copy all averages into `model`, or raise and copy none.

        An interrupt never comes between two parameters; an error of the device may.
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

        Raises RuntimeError if a copy is kept already: it holds the training weights.
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
        """Copy the stored values back into `parameters`, in order, and release the copy.

        If `copy_to` has written a model since `store`, its buffers get back their values from
        before `copy_to`, also where `update_bn` has written them. After an interrupt all values are
        back, or all are still stored and can be restored again.

        Raises RuntimeError if nothing is stored, and ValueError if number or shapes differ.
        """
        parameters = _module.listed("restore", parameters, self._seen)
        scope.check_outside(parameters)
        if not self.collected_params:
            if not parameters:  # `store` of an empty list keeps nothing
                return
            raise RuntimeError("restore: expected store() before, found nothing stored")
        _module.check_stored(self.collected_params, parameters)
        buffers, values = _module.overwritten_beside(self._overwritten, parameters)
        copy = _module.copying(parameters + buffers, self.collected_params + values)
        released: dict[str, Any] = {"collected_params": [], "_overwritten": []}
        _module.at_once(copy, (vars(self).update, released))

    def swap(self, model: nn.Module) -> None:
        """Enter `ema_scope(model)`, or leave the scope that the last call has entered.

        For callers of copies of the class that exchange weights and averages by two calls. Here
        the averages stay in their buffers, so that a state saved in between holds the averages.
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

        As `emajit.ema_scope`, whose docstring says what is copied and what a scope is not for. Code
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


def moved(params: dict[str, Tensor], averages: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters on their averages' devices; as they are where that is the meta device."""
    devices = {name: averages[name].device for name in params}
    return {n: p if devices[n].type == "meta" else p.to(devices[n]) for n, p in params.items()}
