r"""Optimizer step and average in one graph (experimental: not yet measured on a GPU).

Each new parameter is averaged while it is in cache: the average costs one read and one write more.

>>> import torch
>>> from torch import nn
>>> from emajit import LitEma
>>> from emajit.fused import FusedOptimizer
>>> model = nn.Linear(8, 1)
>>> optimizer = torch.optim.AdamW(model.parameters())
>>> ema = LitEma(model, decay=0.999)
>>> fused = FusedOptimizer(optimizer, ema, model)
>>> loader = [torch.ones(64, 8)]
>>> for x in loader:
...     optimizer.zero_grad()
...     model(x).square().mean().backward()
...     fused.step()  # in place of optimizer.step(); ema(model)

The second step compiles, which takes seconds to minutes. The later steps took 0.43 of the time of
torch's AdamW followed by `emajit.update_`, and 0.93 with torch's `AdamW(fused=True)` (12.6M weights
on 2 cores of a CPU).

## Choices

- **A shadow** in place of a `LitEma`: `FusedOptimizer(optimizer, shadow, params, decay=...)`, and
  with `decays=[...]` a list of shadows.
- **What remains**: schedulers, parameter groups, `zero_grad` and `state_dict` are those of
  `optimizer`.
- **GradScaler, accelerate**: give them `fused` in place of the optimizer: `scaler.step(fused)`,
  `accelerator.prepare(fused)`.

## Limits

- It takes the optimizers of `torch.optim` except LBFGS. For some parameters and options it takes
  two separate steps; `FusedOptimizer` lists them.
- A change of any option but the learning rate compiles again. `OneCycleLR` changes the momentum at
  each step: pass `cycle_momentum=False`.
- An `emajit.LitEma` with `every` above 1 is refused.
- A compiled Adam rounds its bias corrections otherwise: a relative error of up to 6e-5.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from emajit import (
    _alias,
    _choose,
    _compile,
    _optimizer,
    _plan,
    _torch,
    _warn,
    functional,
    offload,
    scope,
)
from emajit._kernels import Update
from emajit.functional import Decay, Nonfinite, Rounding, Schedule, Step
from emajit.litema import LitEma

__all__ = ["FusedOptimizer"]

_GRAPHS = 8


class FusedOptimizer(torch.optim.Optimizer):
    r"""Steps `optimizer` and updates an average of the weights, in one compiled graph.

    `step` equals `optimizer.step()` followed by `ema(model)` or `emajit.update_`, within rounding:
    a compiled Adam computes its bias corrections in float32, with a relative error up to 6e-5, and
    before torch 2.13 the average takes 16-bit weights from before their rounding.
    The optimizer keeps its state: use it with learning-rate schedulers, `zero_grad`, `state_dict`
    and `load_state_dict` as before. A learning rate may change at every step.

    The first step runs optimizer and average separately, since it creates the optimizer's state;
    the second compiles, which takes seconds to minutes. The graph depends on all other options of
    the parameter groups, and on which gradients are None. `step` falls back to two separate steps
    for complex and 0-d float64 parameters, tensor subclasses, an optimizer with step hooks, and,
    with a warning, if options change at nearly every step or `torch.compile` fails (sparse
    gradients). `OneCycleLR` changes the momentum at every step, which torch's optimizers, unlike
    a learning rate, take as a constant: pass `cycle_momentum=False` for the graph.

    `torch.amp.GradScaler` takes it as an optimizer: `scaler.step(fused)`, `scaler.unscale_(fused)`
    or `scaler.unscale_(optimizer)`. The graph unscales the gradients that are not unscaled yet.
    If a gradient is infinite or NaN, nothing changes. The host is not synchronised.
    `accelerator.prepare` takes it too, in place of the optimizer: then it steps and averages only
    after the last batch of an accumulated gradient.

    Args:
        optimizer: an optimizer of `torch.optim`, not `LBFGS`, which needs a closure.
        ema: a `LitEma`, or a shadow from `emajit.init`.
        params: the model of the `LitEma`, or the parameters of the shadow.
        decay, rounding, nonfinite: as in `emajit.update_`, for a shadow only.
        decays: in place of `decay`, a decay for each shadow of a list, as in `emajit.update_many_`.
        backend: "inductor", or the name of another `torch.compile` backend; "auto" is "inductor",
            or without a compiler two separate steps, with a warning.

    Raises:
        TypeError: `optimizer` is not of a class of `torch.optim`; `decay` is missing beside a
            shadow; the model of a `LitEma` is no module.
        ValueError: the optimizer needs a closure or is differentiable; options are given beside a
            `LitEma`, which has its own; its `every` is not 1; an unknown backend.

    >>> model = nn.Linear(2, 2)
    >>> optimizer, ema = torch.optim.AdamW(model.parameters()), LitEma(model)
    >>> fused = FusedOptimizer(optimizer, ema, model)
    >>> model(torch.ones(2)).sum().backward()
    >>> fused.step()  # in place of optimizer.step(); ema(model)
    """

    # GradScaler finds this attribute and sets the other two during a step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        ema: Any,
        params: Any,
        *,
        decay: Decay | Schedule | None = None,
        decays: Sequence[Decay | Schedule] | None = None,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
        backend: str = "auto",
    ) -> None:
        # A foreign step may keep numbers in its state or options, which a graph would freeze.
        if not f"{type(optimizer).__module__}.".startswith("torch.optim."):
            found = type(optimizer).__qualname__
            if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
                found += "; build the FusedOptimizer first, and wrap or prepare it in its place"
            raise TypeError(f"optimizer: expected one of torch.optim's own, found {found}")
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"optimizer: {type(optimizer).__name__} needs a closure at each step")
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ValueError("optimizer: expected differentiable=False, found True")
        if isinstance(ema, LitEma):
            if (decay, decays, rounding, nonfinite) != (None, None, "nearest", "propagate"):
                raise ValueError("decay, rounding, nonfinite: expected none beside a LitEma")
            if ema.every != 1:
                raise ValueError(f"ema: expected a LitEma of every=1, found every={ema.every}")
            rounding, nonfinite = ema.rounding, ema.nonfinite
            if not isinstance(params, nn.Module):
                found = type(params).__qualname__
                raise TypeError(f"params: expected the model of the LitEma, found {found}")
        elif (decay is None) == (decays is None):
            found = "None" if decay is None else "decays too"
            raise TypeError(f"decay: expected one beside a shadow, found {found}")
        _choose.check_options(backend=backend)
        self.optimizer = optimizer
        self._ema, self._params = ema, params
        self._decay, self._decays = decay, decays
        self._options = rounding, nonfinite
        self._backend = backend
        # None if the next step makes the graph, False if it cannot be made, else the graph.
        self._graphs: dict[Any, Any] = {}
        self._rates: list[Tensor] = []
        self._state: Any = None

    # `Optimizer.__init__` is not called: every attribute of an optimizer comes from `optimizer`.

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the optimizer."""
        if name == "optimizer":  # not set yet
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The default options of the optimizer."""
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the optimizer."""
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, step: Step | None = None
    ) -> None:
        """Step the optimizer, then update the average with the new weights.

        Args:
            step: how many updates the shadow has already taken, as in `emajit.update_`; None for a
                `LitEma`, which counts by itself.

        Raises TypeError where `step` is missing for a shadow or given for a `LitEma`, and as
        `ema(model)` or `emajit.update_`; in either case before anything is written.
        """
        try:
            self._step(*self._update(step))
        except BaseException:  # GradScaler clears them only after a step that succeeds
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise

    def _step(self, update: Update, updates: int | Tensor) -> None:
        scope.prepare_to_write()
        scale, skipped = self._scale(), self._skipped()
        key = self._key(update, scale, skipped)
        try:
            graph = self._graph(key, update, scale is not None)
            if graph:
                self._run(graph, update, scale, skipped)
        except _compile.errors() as error:  # before anything is written
            graph = self._graphs[key] = False
            self._warn(f"torch.compile failed: {error}")
        if not graph:
            self._one_after_the_other(update, scale, skipped)
        if isinstance(self._ema, LitEma):
            self._ema._finish_update(self._params, updates, unless=skipped)

    def _scale(self) -> Tensor | None:
        """The divisor of the gradients; None without GradScaler, or if they are unscaled."""
        scale = vars(self).get("grad_scale")
        if "found_inf" in vars(self) and _torch.has_been_unscaled(self.optimizer):
            if scale is None:
                raise RuntimeError(
                    "gradients: expected them unscaled once, found it done for the FusedOptimizer "
                    "and for its optimizer; unscale, or prepare, only one of them"
                )
            return None
        return scale

    def _skipped(self) -> Tensor | None:
        """A flag on the device that is true if the step is skipped; None without GradScaler."""
        if "found_inf" not in vars(self):
            return None
        if not isinstance(self.found_inf, Tensor):
            raise RuntimeError(  # noqa: TRY004, as GradScaler does
                "found_inf: expected a tensor, found that no parameter has a gradient"
            )
        return (self.found_inf != 0).reshape(())

    def _update(self, step: Step | None) -> tuple[Update, int | Tensor]:
        """The checked update of the average, and the number of updates of a LitEma."""
        scope.check_outside(self._weights())
        shadows, params = self._ema, self._params
        decays: Any = self._decays
        updates: int | Tensor = -1
        if isinstance(self._ema, LitEma):
            if step is not None:
                raise TypeError(f"step: expected none, since a LitEma counts, found {step}")
            averages, params, updates, decay = self._ema._prepare_update(params)
            shadows, decays = [averages], [decay]
            step = updates if isinstance(updates, Tensor) else max(0, updates)
        elif step is None:
            raise TypeError("step: expected the number of updates so far, found None")
        elif decays is None:
            shadows, decays = [self._ema], [self._decay]
        alphas = functional.alphas_of(shadows, decays, step)
        plan, s, p = _plan.find(shadows, params, alphas, *self._options, "eager")
        scope.check_outside(p)
        update = plan.update(s, p, alphas, step)
        return update._replace(params=self._own(update.params)), updates

    def _own(self, params: list[Tensor]) -> list[Tensor]:
        """The params, with the optimizer's own tensors in place of views of the same memory.

        Otherwise the graph would write one tensor and read the other as if they were unrelated.
        """
        mine = {id(p): p for p in self._weights()}
        if all(id(p) in mine for p in params):
            return params
        twins = {_alias.identity(p): p for p in mine.values()}
        own = [twins.get(_alias.identity(p), p) for p in params]
        leaves = [*(p for p in own if id(p) not in mine), *mine.values()]
        others = len(leaves) - len(mine)
        for i, j in _alias.overlaps(leaves, others):
            if j >= others:
                raise ValueError(
                    f"params: expected the optimizer's own tensors or separate memory, found "
                    f"a view of shape {tuple(leaves[i].shape)}"
                )
        return own

    def _graph(self, key: Hashable, update: Update, is_scaled: bool) -> Any:
        """The graph for this step; None or False if optimizer and average run separately."""
        optimizer = self.optimizer
        if self._state is not optimizer.state:  # `load_state_dict` has replaced it
            self._state = optimizer.state
            self._graphs.clear()
        leaves = (*update.shadows, *update.params)
        scaled = [g for g in self._gradients() if g.layout is torch.strided] if is_scaled else []
        if (
            _torch.dispatch_modes()
            or any(map(_torch.wraps, (*leaves, *self._weights())))
            or any(leaf.is_complex() or leaf.is_neg() for leaf in leaves)
            or _compile.aliased_inputs((*leaves, *self._weights(), *scaled))
            or any(not offload.is_hook(hook) for hook in _torch.step_hooks(optimizer))
            or not _optimizer.steps_on_its_own(optimizer)
        ):
            return None
        graph, device = self._graphs.get(key, False), _device(update)
        if graph is None and self._backend == "auto" and not _optimizer.can_compile(device.type):
            return None
        if graph is None:  # to be made
            # Dynamo treats an optimizer on a GPU as capturable. It would move `step` while tracing,
            # too late for the copy that a skipped step restores, and not NAdam's `mu_product`.
            for p, state in optimizer.state.items():
                numbers = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim == 0}
                state.update({k: v.to(p.device) for k, v in numbers.items()})
            # torch.compile loses a write to a 0-d float64 tensor (2.11 to 2.13).
            lost = any(t.ndim == 0 and t.dtype == torch.float64 for t in self._written())
            graph = not lost and _optimizer.compiled_step(
                optimizer, update.skip, self._backend, device
            )
            self._graphs[key] = graph
        return graph

    def _run(
        self, graph: Any, update: Update, scale: Tensor | None, skipped: Tensor | None
    ) -> None:
        alphas = _compile.scalars(update.alphas, _device(update))
        gradients = [] if scale is None else self._gradients()
        written = [] if skipped is None else [*self._written(), *update.shadows]
        with _optimizer.traceable_groups(self.optimizer, self._rates):
            graph(
                update.shadows,
                update.params,
                alphas,
                update.keys,
                gradients,
                scale,
                written,
                skipped,
            )
        _torch.mark_stepped(self.optimizer)

    def _one_after_the_other(
        self, update: Update, scale: Tensor | None, skipped: Tensor | None
    ) -> None:
        if scale is not None:
            _torch.foreach_div_(self._gradients(), scale)
        if skipped is not None and skipped:
            return
        self.optimizer.step()
        for leaves, kernel in _choose.groups(update, "eager", in_place=True):
            kernel(update.part(leaves))
        # Only now the optimizer has all the state that a skipped step would have to restore.
        key = self._key(update, scale, skipped)
        if key not in self._graphs and len(self._graphs) < _GRAPHS:
            self._graphs[key] = None
        elif key not in self._graphs:
            self._warn(
                f"options of {type(self.optimizer).__name__} beside lr, or which gradients are "
                f"None, took more than {_GRAPHS} forms"
            )

    def _warn(self, reason: str) -> None:
        message = f"FusedOptimizer runs optimizer and average one after the other: {reason}"
        _warn.warn(message, RuntimeWarning)

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which belong to the optimizer that they were made for."""
        # `step` is there where a learning-rate scheduler has wrapped it.
        held = {name: value for name, value in vars(self).items() if name != "step"}
        return held | {"_graphs": {}, "_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _key(self, update: Update, scale: Tensor | None, skipped: Tensor | None) -> Hashable:
        """A key that is equal for steps which share a graph."""
        options = tuple(
            (name, value if isinstance(value, Hashable) else repr(value))
            for group in self.param_groups
            for name, value in group.items()
            if name not in ("params", "lr")
        )
        weights = self._weights()
        gradients = [p.grad for p in weights]
        averaged = {*map(id, update.params)}
        forms = (
            tuple([g if g is None else (g.dtype, _strides(g)) for g in gradients]),
            tuple([p.stride() for p in weights if id(p) not in averaged]),
        )
        numbers = [
            v for group in self.param_groups for v in group.values() if isinstance(v, Tensor)
        ]
        same = _compile.alias_pattern([*update.params, *weights, *numbers])
        state = tuple(map(id, self.optimizer.state))
        scaling = scale is None, skipped is None
        return options, forms, state, same, _compile.layout(update), scaling

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._weights() if p.grad is not None]

    def _written(self) -> list[Tensor]:
        """The tensors that the optimizer's step writes."""
        stepped = [p for p in self._weights() if p.grad is not None]
        states = [self.optimizer.state.get(p, {}) for p in stepped]
        values = chain.from_iterable(state.values() for state in states)
        return stepped + [value for value in values if isinstance(value, Tensor)]


def _strides(gradient: Tensor) -> Hashable:
    return gradient.stride() if gradient.layout is torch.strided else gradient.layout


def _device(update: Update) -> torch.device:
    return update.shadows[0].device if update.shadows else torch.device("cpu")
