"""The optimizer's step and the update of an average as one compiled graph.

A new weight is averaged while it is at hand: the average costs one read and one write of itself.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import optimizer as _torch

from emajit import _compile, _kernels, _memory, functional
from emajit._compile import Work
from emajit._kernels import Keys
from emajit.functional import Decay, Schedule, Step
from emajit.litema import LitEma

_GRAPHS = 8


class FusedOptimizer:
    r"""Steps `optimizer` and updates an average of the weights, in one compiled graph.

    `step` does what `optimizer.step()` and then `ema(model)` or `emajit.update_` do, within
    rounding. The optimizer stays the owner of its state: learning-rate schedulers, `zero_grad`,
    `state_dict` and `load_state_dict` go to it as before. A learning rate may change at every step.

    The first step runs the two one after the other, since it creates the optimizer's state; the
    second one compiles, seconds to minutes. Part of the graph are the other options of the
    parameter groups, and which gradients are None: where they differ at nearly every step, as
    with `OneCycleLR` and its momentum, the two go on one after the other, with a warning. So they
    do for complex weights.

    It is itself accepted by `torch.amp.GradScaler.step`: gradients are unscaled within the graph,
    and where one is infinite or NaN, nothing changes, without a host synchronisation.

    Args:
        optimizer: of `torch.optim`, or one whose `step` can be traced; its `step` needs no closure.
        ema: a `LitEma`, or a shadow from `emajit.init`.
        params: the model of the `LitEma`, or the parameters of the shadow.
        decay, rounding, nonfinite: as in `emajit.update_`, for a shadow only.
        backend: "inductor", or the name of another `torch.compile` backend; "auto" is "inductor",
            and without a compiler one after the other, with a warning.

    Raises:
        TypeError: `optimizer` is no `torch.optim.Optimizer`; `decay` is missing beside a shadow;
            the model of a `LitEma` is no module.
        ValueError: the optimizer needs a closure or is differentiable; options beside a `LitEma`,
            which has its own; an unknown backend.

    >>> model = nn.Linear(2, 2)
    >>> optimizer, ema = torch.optim.AdamW(model.parameters()), LitEma(model)
    >>> fused = FusedOptimizer(optimizer, ema, model)
    >>> model(torch.ones(2)).sum().backward()
    >>> fused.step()  # in place of optimizer.step(); ema(model)
    """

    # GradScaler, where it finds this, sets the other two for the time of a step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        ema: Any,
        params: Any,
        *,
        decay: Decay | Schedule | list[Any] | None = None,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        nonfinite: Literal["propagate", "skip"] = "propagate",
        backend: str = "auto",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            found = type(optimizer).__qualname__
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, found {found}")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"optimizer: {type(optimizer).__name__} needs a closure at each step")
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ValueError("optimizer: expected differentiable=False, found True")
        if isinstance(ema, LitEma):
            if (decay, rounding, nonfinite) != (None, "nearest", "propagate"):
                raise ValueError("decay, rounding, nonfinite: expected none beside a LitEma")
            if not isinstance(params, nn.Module):
                found = type(params).__qualname__
                raise TypeError(f"params: expected the model of the LitEma, found {found}")
        elif decay is None:
            raise TypeError("decay: expected one beside a shadow, found None")
        functional.check_backend(backend)
        self.optimizer = optimizer
        self._ema, self._params = ema, params
        self._options: tuple[Any, ...] = decay, rounding, nonfinite
        self._backend = backend
        self._graphs: dict[Any, Any] = {}
        self._rates: list[Tensor] = []
        self._state: Any = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self, step: Step | None = None) -> None:
        """Step the optimizer, then update the average with the new weights.

        Args:
            step: how many updates the shadow has already taken, as in `emajit.update_`; a `LitEma`
                counts on its own, and takes none.

        Raises TypeError where `step` is missing or one too many, and what `ema(model)` or
        `emajit.update_` raise; in either case before anything is written.
        """
        work = self._work(step)
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        skipped = None if found is None else (found != 0).reshape(())
        graph = self._graph(work, scale is None, found is None)
        if graph is None:
            self._one_after_the_other(work, scale, skipped)
        else:
            weights, keys = _compile.scalars(work), work.keys()
            with self._hooked(), self._traceable_groups():
                gradients = [] if scale is None else self._gradients()
                written = [] if skipped is None else [*self._written(), *work.shadows]
                graph(work.shadows, work.params, weights, keys, gradients, scale, written, skipped)
        if isinstance(self._ema, LitEma):
            self._ema._done(unless=skipped)

    def _work(self, step: Step | None) -> Work:
        """What is to be averaged, checked."""
        shadow, params, options = self._ema, self._params, self._options
        if isinstance(shadow, LitEma):
            if step is not None:
                raise TypeError(f"step: expected none, since a LitEma counts, found {step}")
            shadow, params, step, decay = shadow._due(params)
            options = decay, "nearest", "propagate"
        elif step is None:
            raise TypeError("step: expected the number of updates so far, found None")
        _, work = functional.prepare(shadow, params, step, *options, writable=True)
        return work._replace(params=self._own(work.params))

    def _own(self, params: list[Tensor]) -> list[Tensor]:
        """The optimizer's tensors in place of others that lie in the same memory.

        A graph that writes one and reads the other would have to be told that they are one.
        """
        mine = {id(p): p for p in self._weights()}
        if all(id(p) in mine for p in params):
            return params
        twins = {_memory.identity(p): p for p in mine.values()}
        own = [twins.get(_memory.identity(p), p) for p in params]
        places = {p.untyped_storage().data_ptr() for p in mine.values()}
        for p in own:
            if id(p) not in mine and p.numel() and p.untyped_storage().data_ptr() in places:
                raise ValueError(
                    f"params: expected the optimizer's own tensors or none of their memory, found "
                    f"a view of shape {tuple(p.shape)}"
                )
        return own

    def _graph(self, work: Work, *scaling: bool) -> Any:
        """The graph for this step; None where the two are to run one after the other."""
        if self._state is not self.optimizer.state:  # another one was loaded
            self._state = self.optimizer.state
            self._graphs.clear()
        device = work.shadows[0].device.type if work.shadows else "cpu"
        if any(leaf.is_complex() or leaf.is_neg() for leaf in (*work.shadows, *work.params)) or (
            self._backend == "auto" and not _compile.can_compile(device)
        ):
            return None
        key = self._key(work), scaling
        if self._graphs.get(key) is None:
            if key in self._graphs:
                self._graphs[key] = _compiled(self.optimizer, work.skip, self._backend)
            elif len(self._graphs) < _GRAPHS:
                self._graphs[key] = None  # its first step runs apart, since it may create state
            else:
                message = (
                    "FusedOptimizer runs optimizer and average one after the other: options of "
                    f"{type(self.optimizer).__name__} beside lr, or which gradients are None, "
                    f"took more than {_GRAPHS} forms"
                )
                warnings.warn(message, RuntimeWarning, stacklevel=3)
        return self._graphs.get(key)

    def _key(self, work: Work) -> Hashable:
        """What a graph depends on."""
        options = tuple(
            (name, value if isinstance(value, Hashable) else repr(value))
            for group in self.param_groups
            for name, value in group.items()
            if name not in ("params", "lr")
        )
        gradients = tuple([None if p.grad is None else p.grad.dtype for p in self._weights()])
        return options, gradients, _compile.layout(work)

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._weights() if p.grad is not None]

    def _written(self) -> list[Tensor]:
        """What the optimizer's step writes."""
        stepped = [p for p in self._weights() if p.grad is not None]
        states = [self.optimizer.state.get(p, {}) for p in stepped]
        values = chain.from_iterable(state.values() for state in states)
        return stepped + [value for value in values if isinstance(value, Tensor)]

    def _one_after_the_other(
        self, work: Work, scale: Tensor | None, skipped: Tensor | None
    ) -> None:
        if scale is not None:
            torch._foreach_div_(self._gradients(), scale)
        if skipped is None or not skipped:
            self.optimizer.step()
            _compile.average_(work, "auto")

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """What the wrappers of `Optimizer.step` do beside the step itself."""
        optimizer = self.optimizer
        before = _torch._global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks
        after = optimizer._optimizer_step_post_hooks, _torch._global_optimizer_post_hooks
        for hook in chain.from_iterable(hooks.values() for hooks in before):
            hook(optimizer, (optimizer,), {})
        yield
        for hook in chain.from_iterable(hooks.values() for hooks in after):
            hook(optimizer, (optimizer,), {})
        # Learning-rate schedulers warn without it.
        optimizer._opt_called = True  # type: ignore[attr-defined]

    @contextmanager
    def _traceable_groups(self) -> Iterator[None]:
        """Inside, the groups ask for the form of the step that a graph is made of.

        Learning rates are tensors, whose values a graph does not depend on; in float64, as Python
        numbers are, since in float32 `1 - lr * weight_decay` is off. Inductor fuses the operators
        of single tensors, and nothing with the kernels of `foreach` and `fused`.
        """
        before = [dict(group) for group in self.param_groups]
        while len(self._rates) < len(before):
            self._rates.append(torch.zeros((), dtype=torch.float64))
        for group, rate in zip(self.param_groups, self._rates, strict=False):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate.fill_(group["lr"])
            group.update({name: False for name in ("foreach", "fused") if name in group})
        try:
            yield
        finally:
            for group, options in zip(self.param_groups, before, strict=True):
                group.update(options)


def _compiled(optimizer: torch.optim.Optimizer, skip: bool, backend: str) -> Any:
    bare_step = inspect.unwrap(type(optimizer).step)  # below the wrappers that break a graph

    def run(
        shadows: list[Tensor],
        params: list[Tensor],
        weights: list[Tensor],
        keys: Keys,
        gradients: list[Tensor],
        grad_scale: Tensor | None,
        written: list[Tensor],
        skipped: Tensor | None,
    ) -> None:
        if grad_scale is not None:
            torch._foreach_div_(gradients, grad_scale)
        before = [tensor.clone() for tensor in written]
        bare_step(optimizer)
        _kernels.average_(shadows, params, weights, skip, keys)
        if skipped is not None:
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(torch.where(skipped.to(tensor.device), old, tensor))

    return _compile.compiled(run, "inductor" if backend == "auto" else backend)
