"""Parameters of a subclass that wraps other tensors, such as quantised weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import emajit
from emajit import LitEma, averaged_module
from emajit.fused import FusedOptimizer


def two(value: float) -> Tensor:
    return TwoTensor(torch.full((2, 2), value), torch.full((2, 2), 10 * value))  # type: ignore[no-untyped-call]


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(two(value))
    return model


def inner(model: nn.Module) -> tuple[float, float]:
    weight = model.weight
    return float(weight.a[0, 0]), float(weight.b[0, 0])  # type: ignore[union-attr, index]


def test_a_scope_reaches_the_wrapped_tensors() -> None:
    model = model_of(0.0)
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    shadow = emajit.init(dict(model.named_parameters()))
    with torch.no_grad():
        model.weight.copy_(two(1.0))
    ema(model)
    emajit.update_(shadow, dict(model.named_parameters()), 0, decay=0.5)
    weight, part = model.weight, model.weight.a  # type: ignore[attr-defined]
    for scope in (ema.ema_scope(model), emajit.ema_scope(model, shadow)):
        with torch.no_grad(), scope:
            assert inner(model) == (0.5, 5.0)
            assert model(torch.ones(1, 2)).a[0, 0] == 1.0
        assert inner(model) == (1.0, 10.0)
        assert model.weight is weight
        assert model.weight.a is part  # type: ignore[attr-defined]


def test_updates_beside_plain_tensors() -> None:
    """A multi-tensor operator would update the plain ones once for each wrapped tensor."""
    params, shadow = ({"wrapped": two(x), "plain": torch.full((2,), x)} for x in (1.0, 0.0))
    new = emajit.update(shadow, params, 0, decay=0.5)
    for found in (new, emajit.update_(shadow, params, 0, decay=0.5)):
        wrapped: Any = found["wrapped"]
        assert type(found["plain"]) is Tensor
        assert found["plain"].tolist() == [0.5, 0.5]
        assert (wrapped.a[0, 0].item(), wrapped.b[0, 0].item()) == (0.5, 5.0)


def test_copies() -> None:
    model = model_of(0.0)
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    with torch.no_grad():
        model.weight.copy_(two(1.0))
    ema(model)
    ema.store(model.parameters())
    ema.copy_to(model)
    assert inner(model) == (0.5, 5.0)
    ema.restore(model.parameters())
    assert inner(model) == (1.0, 10.0)


def test_a_module_of_averages_follows() -> None:
    model = model_of(0.0)
    shadow = emajit.init(dict(model.named_parameters()))
    teacher = averaged_module(model, shadow)
    with torch.no_grad():
        model.weight.copy_(two(1.0))
    emajit.update_(shadow, dict(model.named_parameters()), 0, decay=0.5)
    assert inner(teacher) == (0.5, 5.0)
    assert inner(model) == (1.0, 10.0)


def test_a_fused_step_runs_in_two() -> None:
    model = model_of(0.0)
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fused = FusedOptimizer(optimizer, ema, model, backend="aot_eager")
    for _ in range(3):
        model.weight.grad = two(-1.0)
        fused.step()
    assert inner(model) == (3.0, 30.0)
    average = ema.named_averages()["weight"]
    assert float(average.a[0, 0]) == 2.125  # type: ignore[attr-defined]
    assert float(average.b[0, 0]) == 21.25  # type: ignore[attr-defined]
