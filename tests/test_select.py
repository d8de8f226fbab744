"""Averages of some parameters only: the others follow the training weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import emajit
from tests.test_scope import Spy


class Routed(nn.Module):
    """Two experts and the router that mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 2)
        self.experts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.cat([expert(x) for expert in self.experts], dim=1)
        mixed: Tensor = (self.router(x).softmax(dim=1) * outputs).sum(dim=1)
        return mixed


EXPERTS = ["experts.0.weight", "experts.0.bias", "experts.1.weight", "experts.1.bias"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["router.weight", "router.bias", *EXPERTS]),
        ({"include": "experts.*"}, EXPERTS),
        ({"exclude": "router.*"}, EXPERTS),
        ({"include": ["experts.*", "router.bias"], "exclude": "*.weight"}, None),
        ({"include": lambda name: "expert" in name}, EXPERTS),
        ({"exclude": lambda name: name.endswith(".weight")}, None),
    ],
)
@pytest.mark.parametrize("form", ["dict", "named_parameters", "wrapped"])
def test_as_litema_chooses(options: dict[str, Any], names: list[str] | None, form: str) -> None:
    model: Any = Routed()
    prefix = ""
    if form == "wrapped":
        model, prefix = torch.compile(model, backend="eager"), "_orig_mod."
    params = dict(model.named_parameters())
    chosen = emajit.select(params if form == "dict" else model.named_parameters(), **options)
    expected = [*emajit.LitEma(model, **options).named_averages()]
    assert [name.removeprefix(prefix) for name in chosen] == expected
    assert names is None or expected == names
    assert all(chosen[name] is params[name] for name in chosen)


@pytest.mark.parametrize(
    ("named", "options", "error", "message"),
    [
        (dict(Routed().named_parameters()), {"include": "expert.*"}, ValueError, "include: .*none"),
        (dict(Routed().named_parameters()), {"exclude": ["x"]}, ValueError, "exclude: .*'x'"),
        (dict(Routed().named_parameters()), {"exclude": "*"}, ValueError, "none is left"),
        (dict(Routed().named_parameters()), {"include": 3}, TypeError, "include: expected names"),
        (Routed(), {}, TypeError, r"expected model.named_parameters\(\), found the module Routed"),
    ],
)
def test_errors(named: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        emajit.select(named, **options)


def test_of_nothing_is_nothing() -> None:
    assert emajit.select({}, include="a.*") == {}


def trained(model: Routed, steps: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averages of the experts after some steps, and what they should be."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    experts = emajit.select(model.named_parameters(), exclude="router.*")
    shadow: dict[str, Tensor] = emajit.init(experts)
    expected = {name: p.detach().double() for name, p in experts.items()}
    for step in range(steps):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        emajit.update_(shadow, experts, step, decay=0.5)
        expected = {name: (s + experts[name].double()) / 2 for name, s in expected.items()}
    return shadow, {name: s.detach() for name, s in expected.items()}


def test_a_partial_update() -> None:
    shadow, expected = trained(Routed())
    assert_close({name: s.double() for name, s in shadow.items()}, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("copy", [False, True])
def test_in_a_partial_scope_the_others_keep_their_training_weights(copy: bool) -> None:
    model = Routed()
    shadow, _ = trained(model)
    spy, weights = Spy(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    with emajit.ema_scope(model, shadow, strict=False, copy=copy):
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert_close(found, {**weights, **shadow}, rtol=0, atol=0)
    assert any(not torch.equal(weights[name], shadow[name]) for name in shadow)
    spy.assert_untouched()
    with (
        pytest.raises(RuntimeError, match="written"),
        emajit.ema_scope(model, shadow, strict=False),
    ):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_without_leave_a_partial_scope_is_refused() -> None:
    model = Routed()
    shadow, _ = trained(model)
    for enter in (
        emajit.ema_scope(model, shadow).__enter__,
        lambda: emajit.averaged_module(model, shadow),
    ):
        with pytest.raises(ValueError, match=r"or strict=False, missing \['router.weight', 'rou"):
            enter()
    with pytest.raises(ValueError, match=r"found \['rooter'\]"):
        emajit.averaged_module(model, shadow | {"rooter": torch.ones(1)}, strict=False)


def test_a_partial_teacher_follows_the_others_as_they_train() -> None:
    model = Routed()
    shadow, _ = trained(model)
    teacher = emajit.averaged_module(model, shadow, strict=False)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in model.parameters())
    trained(model)
    expected = {**dict(model.named_parameters()), **shadow}
    assert_close(dict(teacher.named_parameters()), expected, rtol=0, atol=0)
    with emajit.ema_scope(model, shadow, strict=False), torch.no_grad():
        x = torch.randn(4, 3)
        assert torch.equal(model(x), teacher(x))
