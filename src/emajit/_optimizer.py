"""The step of an optimizer of `torch.optim`, compiled into one graph with an average."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from emajit import _compile, _kernels, _torch, _warn
from emajit._kernels import Update
from emajit._rounding import Keys


def compiled_step(
    optimizer: torch.optim.Optimizer, skip: bool, backend: str, device: torch.device
) -> Any:
    bare_step = inspect.unwrap(type(optimizer).step)  # below the wrappers that break a graph

    def run(
        shadows: list[Tensor],
        params: list[Tensor],
        alphas: list[Tensor],
        keys: Keys | None,
        gradients: list[Tensor],
        grad_scale: Tensor | None,
        written: list[Tensor],
        skipped: Tensor | None,
    ) -> None:
        if grad_scale is not None:
            _torch.foreach_div_(gradients, grad_scale)
        before = [tensor.clone() for tensor in written]
        bare_step(optimizer)
        _kernels.traced_(Update(shadows, params, alphas, skip, keys))
        if skipped is not None:
            for tensor, old in zip(written, before, strict=True):
                # A view of a 0-d tensor, as in `_kernels.traced_`.
                new = tensor.view(1) if tensor.ndim == 0 else tensor
                new.copy_(torch.where(skipped.to(new.device), old.view_as(new), new))

    return _compile.compiled(
        _compile.with_own_code(run),
        "inductor" if backend == "auto" else backend,
        # Average a 16-bit parameter after it is rounded, not before.
        emulate_precision_casts=True,
        post_grad_custom_post_pass=_hoist(),
        # Otherwise each single-tensor operator of the optimizer is a launch: 322 in place of 42.
        **({} if device.type == "cpu" else _COMBINED),
    )


@cache
def can_compile(device: str) -> bool:
    """Whether Inductor works here for a device; if not, one warning gives the reason.

    Asked before an optimizer is traced, which takes up to a minute.
    """
    one = [torch.zeros(1, device=device)]
    update = Update(one, one, [0.25])
    try:
        _compile.kernel(_compile.layout(update), "inductor", in_place=False)(update)
    except Exception as error:  # noqa: BLE001, what fails without a compiler differs by platform
        _warn.warn(
            f"FusedOptimizer runs without a compiler on {device}, since torch.compile failed: "
            f"{error}",
            RuntimeWarning,
        )
        return False
    return True


_COMBINED: dict[str, Any] = {
    "combo_kernels": True,
    # torch 2.13 counts the outputs as new memory, and would limit combining by this threshold.
    "combo_kernel_peak_memory_pct_threshold": None,
}


@cache
def _hoist() -> Any:
    """A pass of Inductor's that computes each 0-d result once, not again for each element.

    On a CPU Inductor inlines the formula of a 0-d result into the loops over the tensors that use
    it. Adam's bias corrections have two powers: AdamW of 12.6M parameters took 11.9 ms, and takes
    4.1 (2 cores of an AMD EPYC, torch 2.13).
    """
    passes = _torch.graph_passes()
    if passes is None:
        return None
    custom_pass, hash_of_files = passes

    class Hoist(custom_pass):  # type: ignore[misc, valid-type]
        def __call__(self, graph: Any) -> None:
            for node in list(graph.nodes):
                larger = [user for user in node.users if _cpu_ndim(user)]
                if larger and _torch.computes(node.target) and _cpu_ndim(node) == 0:
                    with graph.inserting_after(node):
                        # Lowering `as_strided` forces its input into memory.
                        operator = torch.ops.aten.as_strided.default
                        held = graph.call_function(operator, (node, [], []))
                    held.meta = dict(node.meta)
                    for user in larger:
                        user.replace_input_with(node, held)

        def uuid(self) -> bytes:
            """The identity of the pass, for the key of the graph cache on disk."""
            return hash_of_files((__file__,))  # type: ignore[no-any-return]

    return Hoist()


def _cpu_ndim(node: Any) -> int | None:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) and value.device.type == "cpu" else None


@contextmanager
def traceable_groups(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """A context in which the groups' options choose the single-tensor step, for a trace.

    Learning rates are tensors, so that a graph serves any value; in float64, like Python numbers,
    since in float32 `1 - lr * weight_decay` is inexact. Inductor fuses the single-tensor
    operators, but not the kernels of `foreach` and `fused`.
    """
    groups = optimizer.param_groups
    names = "lr", "foreach", "fused"
    before = [{n: group[n] for n in names if n in group} for group in groups]
    while len(rates) < len(before):
        rates.append(torch.zeros((), dtype=torch.float64))
    for group, rate in zip(groups, rates, strict=False):
        if not isinstance(group["lr"], Tensor):
            group["lr"] = rate.fill_(group["lr"])
        group.update({name: False for name in names[1:] if name in group})
    try:
        yield
    finally:
        for group, options in zip(groups, before, strict=True):
            group.update(options)


def steps_on_its_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` is the class's own, wrapped by nothing but torch and schedulers."""
    own: Any = type(optimizer).step
    replaced = vars(optimizer).get("step", own)
    if replaced is not own and not (
        _torch.is_of_a_scheduler(replaced) and replaced.__wrapped__ is own
    ):
        return False
    while hasattr(own, "__wrapped__"):
        module = getattr(own, "__globals__", {}).get("__name__", "")
        if module.partition(".")[0] != "torch":
            return False
        own = own.__wrapped__
    return True
