"""A drop-in for the `LitEma` of latent-diffusion, SGM and CogVideo."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _choose, _module, _paths, _shards, _torch, functional, scope
from emajit._litema_state import LitEmaState, is_on_host

_log = logging.getLogger(__name__)


class LitEma(LitEmaState):
    """Averages of a model's trainable parameters, as the buffers of a module.

    Interface and `state_dict` are those of latent-diffusion's class: the buffers `decay` (float32,
    0-d), `num_updates` (int32, 0-d; -1 without warm-up), and each average under the name of its
    parameter with the dots removed. Where two parameters would share that key, or something else
    has it, the dots become slashes. Averages go on for a parameter that is frozen later.

    Args:
        model: the module whose trainable parameters are averaged. Only a weak reference is kept, to
            one that is sharded. With several processes, build it where all have the same weights:
            after `DistributedDataParallel`, or with one seed.
        decay: the share of the average that an update keeps, in [0, 1].
        use_num_upates: warm up with `min(decay, (1 + n) / (10 + n))` at update n = 1, 2, ...
        dtype: of the averages; default that of each parameter.
        buffers: "ignore" leaves the model's buffers, such as the statistics of BatchNorm, as they
            are in training. Of the buffers that a `state_dict` has, "copy" holds the values at the
            last update, and "average" averages those that are floating-point.
        backend: as in `emajit.update`.

    Raises:
        ValueError: `decay` is not in [0, 1], no parameter of `model` requires grad, or an unknown
            option.
        TypeError: `model` is no module, or `decay` no number.

    >>> model = nn.Linear(2, 2)
    >>> ema = LitEma(model, decay=0.999)
    >>> ema(model)  # after each optimizer step
    >>> with ema.ema_scope(model):
    ...     prediction = model(torch.ones(2))
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        use_num_upates: bool = True,
        *,
        dtype: torch.dtype | None = None,
        buffers: _module.Policy = "ignore",
        backend: str = "auto",
    ) -> None:
        if not isinstance(decay, float | int):
            found = type(decay).__qualname__
            raise TypeError(
                f"decay: expected a number, found {found}; emajit.update_ has schedules"
            )
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"Decay must be between 0 and 1, found {decay}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
        _choose.check_backend(backend)
        _shards.reshard(model)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError(
                f"model: expected parameters that require grad, found none in "
                f"{type(model).__name__}; build LitEma after the layers of the model"
            )
        kept = _module.held_buffers(model, buffers)
        super().__init__(decay, warm_up=use_num_upates)
        self.backend = backend
        self.collected_params: list[Tensor] = []
        self._takes_buffers, self._is_sharded = bool(kept), _shards.are_in(params.values())
        # Models that `copy_to` has written since `store`, and what their buffers held.
        self._overwritten: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._seen = weakref.ref(model) if self._is_sharded else None
        # The names of the parameters of the model seen last, and the key of each one's average.
        self._known: list[str] = []
        self._keys: dict[str, str] = {}
        self._hold(params, kept, dtype)
        if buffers == "copy":
            self._copied.update(self.m_name2s_name[name] for name in kept)

    def forward(self, model: nn.Module) -> None:
        """Update the averages with the parameters of `model`, without a host synchronisation.

        Raises, before anything is written: ValueError where the model lacks an averaged parameter,
        has a trainable one that is not averaged, or a shape differs; TypeError if it is no module;
        RuntimeError inside of a scope.
        """
        averages, params, updates, decay = self._prepare_update(model)
        step = updates if isinstance(updates, Tensor) else max(0, updates)
        try:
            functional.update_(averages, params, step, decay=decay, backend=self.backend)
        except _paths.DeviceError:
            params = {name: _moved(p, averages[name].device) for name, p in params.items()}
            functional.update_(averages, params, step, decay=decay, backend=self.backend)
        self._finish_update(model, updates)

    def _prepare_update(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], int | Tensor, float | Tensor]:
        """The averages of the next update, their parameters, the updates so far and the decay.

        The number of updates is -1 without warm-up, and a tensor where it must not be read.
        """
        averages, params = self._pairs(model)
        if self._copied:
            copies = self._copies()
            _module.check_shapes(copies, params)
            averages, params = (
                {name: tensor for name, tensor in tensors.items() if name not in copies}
                for tensors in (averages, params)
            )
        updates = self._updates(averages)
        return averages, params, updates, self._decay_at(updates)

    def _updates(self, averages: dict[str, Tensor]) -> int | Tensor:
        """The number of updates, on the host where it is known there or may be read."""
        buffer: Tensor = self._buffers["num_updates"]  # type: ignore[assignment]
        if torch.compiler.is_compiling() or buffer.is_meta:
            return buffer
        average = next(iter(averages.values()), buffer)
        if average.is_cpu or not _torch.is_capturing(average.device):
            updates: int | None = self._host_updates.read(buffer)
            return buffer if updates is None else updates
        if not is_on_host(buffer):
            return buffer
        if buffer.item() >= 0:
            raise RuntimeError(
                "num_updates is on the CPU during CUDA graph capture, so replays would repeat this "
                "warm-up step; move the LitEma to the GPU first"
            )
        return -1

    def _copies(self) -> dict[str, Tensor]:
        """The copies of buffers, under the names of the model seen last."""
        names = [name for name, key in self._keys.items() if key in self._copied]
        return {name: self.get_buffer(self._keys[name]) for name in names}

    def _finish_update(
        self, model: nn.Module, updates: int | Tensor, unless: Tensor | None = None
    ) -> None:
        """Copy buffers and count an update; a flag on the device may say that it was left out."""
        if self._copied:
            copies, buffers = self._copies(), dict(model.named_buffers())
            values = [buffers[name] for name in copies]
            if unless is not None:
                pairs = zip(copies.values(), values, strict=True)
                values = [torch.where(unless, old, new) for old, new in pairs]
            _module.copy_([*copies.values()], values)
        if unless is not None:  # only the device knows, so that is where the updates are counted
            self.decay, self.num_updates = (
                control.to(unless.device) for control in (self.decay, self.num_updates)
            )
            self.num_updates.add_((self.num_updates >= 0) & ~unless)
            self._host_updates.wrote(self.num_updates, None)
        elif isinstance(updates, Tensor):
            updates.add_(updates >= 0)
            if not torch.compiler.is_compiling():
                self._host_updates.wrote(updates, None)
        elif updates >= 0:
            self.num_updates.add_(1)
            self._host_updates.wrote(self.num_updates, updates + 1)
        self._untouched.clear()
        vars(self)["_is_updated"] = True  # past the checks of Module.__setattr__, a microsecond

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages into `model`; all of them, or an error and none.

        An interrupt does not come between two parameters; an error of the device may.
        """
        averages, params = self._pairs(model)
        _module.check_shapes(averages, params)
        if self.collected_params and not any(seen is model for seen, _ in self._overwritten):
            buffers = {n: p.clone() for n, p in params.items() if not isinstance(p, nn.Parameter)}
            self._overwritten.append((model, buffers))
        _module.copy_([params[name] for name in averages], [*averages.values()])

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep a copy of `parameters` for `restore`.

        Raises RuntimeError if a copy is kept already, of the training weights.
        """
        if self.collected_params:
            raise RuntimeError(
                "store: expected restore() after the last store(), found parameters still stored; "
                "call restore() first"
            )
        parameters = self._list_shards("store", parameters)
        scope.check_outside(parameters)
        self.collected_params = [p.detach().clone() for p in parameters]
        self._overwritten = []

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Copy what `store` kept back into `parameters`, in order, and release it.

        Buffers of their model that `copy_to` has overwritten since then get theirs back too.

        Raises RuntimeError if nothing is stored, and ValueError if number or shapes differ.
        """
        parameters = self._list_shards("restore", parameters)
        scope.check_outside(parameters)
        if not self.collected_params:
            raise RuntimeError("restore: expected store() before, found nothing stored")
        _module.check_stored(self.collected_params, parameters)
        buffers, values = _module.overwritten_beside(self._overwritten, parameters)
        _module.copy_(parameters + buffers, self.collected_params + values)
        self.collected_params, self._overwritten = [], []

    @contextmanager
    def ema_scope(self, model: nn.Module, context: str | None = None) -> Iterator[None]:
        """Inside, `model` computes with the averages; afterwards its training weights are back.

        The training weights are never written, and the averages are copied only where their dtype
        or device is another than the parameter's. Code that writes parameters or buffers inside
        writes the averages: call `model.eval()` before, if buffers are averaged. With `context`
        both switches are logged under that name.

        Raises RuntimeError if the model is inside of a scope already, and ValueError as `forward`.
        """
        averages, params = self._pairs(model)
        averages = {name: average.to(params[name].device) for name, average in averages.items()}
        with scope.ema_scope(model, averages):
            if context is not None:
                _log.info("%s: Switched to EMA weights", context)
            try:
                yield
            finally:
                if context is not None:
                    _log.info("%s: Restored training weights", context)

    def _pairs(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The averages and the parameters of `model` that they are of, under its names."""
        params = self._tensors_of(model)
        if list(params) != self._known:
            self._keys, self._known = self._match(list(params)), list(params)
        buffers: dict[str, Any] = self._buffers
        averages = {name: buffers[key] for name, key in self._keys.items()}
        if len(averages) < len(params):
            for name in [name for name in params if name not in averages]:
                if params.pop(name).requires_grad:
                    raise ValueError(
                        f"{name}: expected no trainable parameter beside the averaged ones, found "
                        "this one requires grad; build a new LitEma to average it"
                    )
        if self._uninitialised:  # what a loaded state did not have starts from the weights
            _module.check_shapes(averages, params)
            for name, key in self._keys.items():
                if key in self._uninitialised:
                    averages[name].copy_(params[name].detach())
            self._uninitialised.clear()
        return averages, params

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of a model outside of a scope, and its buffers if some are averaged."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
        if self._is_sharded:
            _shards.reshard(model)
            self._seen = weakref.ref(model)
        tensors = _module.named_parameters(model)
        if self._takes_buffers:
            tensors |= dict(model.named_buffers())
        scope.check_outside(tensors.values())
        return tensors

    def _list_shards(self, use: str, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The parameters; the shards of the model seen last, where a forward left them whole."""
        model = self._seen() if self._seen else None
        if model is None:
            return _module.listed(use, parameters)
        _shards.reshard(model)
        tensors = _module.listed(use, parameters)
        own = set(map(id, model.parameters()))
        if any(not _shards.is_one(p) and id(p) not in own for p in tensors):
            raise ValueError(
                f"{use}: expected the parameters as shards, found whole ones; list them after "
                "model.reshard()"
            )
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        """Without weak references, which cannot be pickled."""
        return {**vars(self), "_seen": None}


def _moved(param: Tensor, device: torch.device) -> Tensor:
    """The parameter on the device of its average; on none, if that has no numbers."""
    return param if device.type == "meta" else param.to(device)
