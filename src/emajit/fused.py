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

from emajit import _compile, _host, _kernels, _memory, _shards, functional, scope
from emajit._compile import Work
from emajit._rounding import Keys
from emajit.functional import Decay, Schedule, Step
from emajit.litema import LitEma

_GRAPHS = 8


class FusedOptimizer:
    r"""Steps `optimizer` and updates an average of the weights, in one compiled graph.

    `step` does what `optimizer.step()` and then `ema(model)` or `emajit.update_` do, within
    rounding: a compiled Adam has its bias corrections in float32, off by up to 6e-5 of themselves,
    and before torch 2.13 weights in 16 bits are averaged as they were before they were rounded.
    The optimizer stays the owner of its state: learning-rate schedulers, `zero_grad`, `state_dict`
    and `load_state_dict` go to it as before. A learning rate may change at every step.

    The first step runs the two one after the other, since it creates the optimizer's state; the
    second one compiles, seconds to minutes. Part of the graph are the other options of the
    parameter groups, and which gradients are None. One after the other, as long as it is so, run
    complex weights, 0-d ones in float64, DTensors, an optimizer with step hooks, and, with a
    warning, options that differ at nearly every step (`OneCycleLR` with its momentum) and what
    `torch.compile` refuses (sparse gradients).

    It is itself what `torch.amp.GradScaler` takes: `scaler.step(fused)`, `scaler.unscale_(fused)`.
    Gradients are unscaled within the graph, and where one is infinite or NaN, nothing changes,
    without a host synchronisation.

    Args:
        optimizer: one of `torch.optim`'s own, not `LBFGS`, which needs a closure.
        ema: a `LitEma`, or a shadow from `emajit.init`.
        params: the model of the `LitEma`, or the parameters of the shadow.
        decay, rounding, nonfinite: as in `emajit.update_`, for a shadow only.
        backend: "inductor", or the name of another `torch.compile` backend; "auto" is "inductor",
            and without a compiler one after the other, with a warning.

    Raises:
        TypeError: `optimizer` is not of a class of `torch.optim`; `decay` is missing beside a
            shadow; the model of a `LitEma` is no module.
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
        # Another's step may keep numbers in its state or options, which a graph would freeze.
        if not f"{type(optimizer).__module__}.".startswith("torch.optim."):
            found = type(optimizer).__qualname__
            raise TypeError(f"optimizer: expected one of torch.optim's own, found {found}")
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
        try:
            self._step(self._work(step))
        except BaseException:  # GradScaler clears them after a step that succeeds, and only then
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise

    def _step(self, work: Work) -> None:
        _host.hold_training()
        scale, skipped = vars(self).get("grad_scale"), self._skipped()
        key = self._key(work, scale, skipped)
        graph = self._graph(key, work, scale is not None)
        if not graph or not self._run(graph, key, work, scale, skipped):
            self._one_after_the_other(work, scale, skipped)
        if isinstance(self._ema, LitEma):
            self._ema._done(self._params, self._ema.num_updates, unless=skipped)

    def _skipped(self) -> Tensor | None:
        """A flag on the device, whether the step is to be left out; None without GradScaler."""
        if "found_inf" not in vars(self):
            return None
        if not isinstance(self.found_inf, Tensor):
            raise RuntimeError(  # noqa: TRY004, as GradScaler does
                "found_inf: expected a tensor, found that no parameter has a gradient"
            )
        return (self.found_inf != 0).reshape(())

    def _work(self, step: Step | None) -> Work:
        """What is to be averaged, checked."""
        scope.check_outside(self._weights())
        shadow, params, options = self._ema, self._params, self._options
        if isinstance(shadow, LitEma):
            if step is not None:
                raise TypeError(f"step: expected none, since a LitEma counts, found {step}")
            shadow, params, updates, decay = shadow._due(params)
            step = updates if isinstance(updates, Tensor) else max(0, updates)
            options = (decay, "nearest", "propagate")
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
        leaves = [*(p for p in own if id(p) not in mine), *mine.values()]
        others = len(leaves) - len(mine)
        for i, j in _memory.overlaps(leaves, others):
            if j >= others:
                raise ValueError(
                    f"params: expected the optimizer's own tensors or none of their memory, found "
                    f"a view of shape {tuple(leaves[i].shape)}"
                )
        return own

    def _graph(self, key: Hashable, work: Work, is_scaled: bool) -> Any:
        """The graph for this step; nothing where the two are to run one after the other."""
        optimizer = self.optimizer
        if self._state is not optimizer.state:  # another one was loaded
            self._state = optimizer.state
            self._graphs.clear()
        leaves = (*work.shadows, *work.params)
        scaled = [g for g in self._gradients() if g.layout is torch.strided] if is_scaled else []
        if (
            _memory.in_dispatch_mode()
            or _shards.are_in(self._weights())
            or any(leaf.is_complex() or leaf.is_neg() for leaf in leaves)
            or _compile.merged((*leaves, *self._weights(), *scaled))
            or any(not _host.is_hook(hook) for hook in _hooks(optimizer))
            or not _steps_on_its_own(optimizer)
            or (self._backend == "auto" and not _compile.can_compile(work.device.type))
        ):
            return None
        graph = self._graphs.get(key, False)
        if graph is None:  # to be made
            # Dynamo takes an optimizer on a GPU for capturable. It would move `step` as it traces,
            # too late for what a skipped step puts back, and leave NAdam's `mu_product`.
            for p, state in optimizer.state.items():
                numbers = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim == 0}
                state.update({k: v.to(p.device) for k, v in numbers.items()})
            # torch.compile loses a write to a 0-d float64 tensor (2.11 to 2.13).
            lost = any(t.ndim == 0 and t.dtype == torch.float64 for t in self._written())
            graph = not lost and _compiled(optimizer, work.skip, self._backend)
            self._graphs[key] = graph
        return graph

    def _run(
        self,
        graph: Any,
        key: Hashable,
        work: Work,
        scale: Tensor | None,
        skipped: Tensor | None,
    ) -> bool:
        """Whether the graph could be made, and then has done the step."""
        weights, keys = _compile.scalars(work), work.keys()
        gradients = [] if scale is None else self._gradients()
        written = [] if skipped is None else [*self._written(), *work.shadows]
        try:
            with self._traceable_groups():
                graph(work.shadows, work.params, weights, keys, gradients, scale, written, skipped)
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything is written
            self._graphs[key] = False
            self._warn(f"torch.compile failed: {error}")
            return False
        # Learning-rate schedulers warn without it.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        return True

    def _one_after_the_other(
        self, work: Work, scale: Tensor | None, skipped: Tensor | None
    ) -> None:
        if scale is not None:
            torch._foreach_div_(self._gradients(), scale)
        if skipped is not None and skipped:
            return
        self.optimizer.step()
        _compile.average_(work, "auto")
        # Only now there is all the state that a graph would have to put back.
        key = self._key(work, scale, skipped)
        if key not in self._graphs and len(self._graphs) < _GRAPHS:
            self._graphs[key] = None
        elif key not in self._graphs:
            self._warn(
                f"options of {type(self.optimizer).__name__} beside lr, or which gradients are "
                f"None, took more than {_GRAPHS} forms"
            )

    def _warn(self, reason: str) -> None:
        message = f"FusedOptimizer runs optimizer and average one after the other: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=5)

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which belong to the optimizer that they were made for."""
        return vars(self) | {"_graphs": {}, "_state": None}

    def _key(self, work: Work, scale: Tensor | None, skipped: Tensor | None) -> Hashable:
        """What a graph depends on."""
        options = tuple(
            (name, value if isinstance(value, Hashable) else repr(value))
            for group in self.param_groups
            for name, value in group.items()
            if name not in ("params", "lr")
        )
        weights = self._weights()
        gradients = [p.grad for p in weights]
        averaged = {*map(id, work.params)}
        forms = (
            tuple([g if g is None else (g.dtype, _strides(g)) for g in gradients]),
            tuple([p.stride() for p in weights if id(p) not in averaged]),
        )
        numbers = [
            v for group in self.param_groups for v in group.values() if isinstance(v, Tensor)
        ]
        same = _compile.same([*work.params, *weights, *numbers])
        state = tuple(map(id, self.optimizer.state))
        scaling = scale is None, skipped is None
        return options, forms, state, same, _compile.layout(work), scaling

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

    @contextmanager
    def _traceable_groups(self) -> Iterator[None]:
        """Inside, the groups ask for the form of the step that a graph is made of.

        Learning rates are tensors, whose values a graph does not depend on; in float64, as Python
        numbers are, since in float32 `1 - lr * weight_decay` is off. Inductor fuses the operators
        of single tensors, and nothing with the kernels of `foreach` and `fused`.
        """
        names = "lr", "foreach", "fused"
        before = [{n: group[n] for n in names if n in group} for group in self.param_groups]
        while len(self._rates) < len(before):
            self._rates.append(torch.zeros((), dtype=torch.float64))
        for group, rate in zip(self.param_groups, self._rates, strict=False):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate.fill_(group["lr"])
            group.update({name: False for name in names[1:] if name in group})
        try:
            yield
        finally:
            for group, options in zip(self.param_groups, before, strict=True):
                group.update(options)


def _compiled(optimizer: torch.optim.Optimizer, skip: bool, backend: str) -> Any:
    from emajit._hoist import Hoist  # noqa: PLC0415, imports Inductor

    bare_step = inspect.unwrap(type(optimizer).step)  # below the wrappers that break a graph

    def run(
        shadows: list[Tensor],
        params: list[Tensor],
        weights: list[Tensor],
        keys: Keys | None,
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
                # A view of a 0-d tensor, as in `_kernels.average_`.
                new = tensor.view(1) if tensor.ndim == 0 else tensor
                new.copy_(torch.where(skipped.to(new.device), old.view_as(new), new))

    return _compile.compiled(
        _compile.fresh(run),
        "inductor" if backend == "auto" else backend,
        # A weight in 16 bits is averaged as it was rounded, not as it was before.
        emulate_precision_casts=True,
        post_grad_custom_post_pass=Hoist(),
    )


def _strides(gradient: Tensor) -> Hashable:
    return gradient.stride() if gradient.layout is torch.strided else gradient.layout


def _steps_on_its_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` is that of the class, within no wrappers but torch's and a scheduler's."""
    own: Any = type(optimizer).step
    replaced = vars(optimizer).get("step", own)
    if replaced is not own and not (
        hasattr(replaced, "_wrapped_by_lr_sched") and replaced.__wrapped__ is own
    ):
        return False
    while hasattr(own, "__wrapped__"):
        module = getattr(own, "__globals__", {}).get("__name__", "")
        if module.partition(".")[0] != "torch":
            return False
        own = own.__wrapped__
    return True


def _hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    every = (
        *(_torch._global_optimizer_pre_hooks, _torch._global_optimizer_post_hooks),
        *(optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
    )
    return [hook for hooks in every for hook in hooks.values()]
