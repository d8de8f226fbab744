"""Within one `torch.autocast`, which keeps casts of parameters, a forward has the right weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import emajit
from emajit import LitEma, averaged_module
from emajit.fused import FusedOptimizer


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"])
def autocast(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param), torch.autocast("cpu", torch.bfloat16):
        yield


def linear(value: float) -> nn.Linear:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def out(model: nn.Module) -> float:
    found: Tensor = model(torch.ones(1, 4))
    return float(found.detach()[0, 0])


def averages_of_one(model: nn.Module) -> LitEma:
    ema = LitEma(model)
    for average in ema.named_averages().values():
        average.fill_(1.0)
    return ema


@pytest.mark.usefixtures("autocast")
class TestScope:
    def test_after_a_forward_in_training(self) -> None:
        model = linear(2.0)
        ema = averages_of_one(model)
        assert out(model) == 10.0
        with ema.ema_scope(model):
            assert out(model) == 5.0
        assert out(model) == 10.0
        with emajit.ema_scope(model, ema.named_averages()):
            assert out(model) == 5.0

    def test_before_a_forward_in_training(self) -> None:
        model = linear(2.0)
        ema = averages_of_one(model)
        with pytest.raises(ZeroDivisionError), ema.ema_scope(model):
            assert out(model) == 5.0
            raise ZeroDivisionError
        assert out(model) == 10.0

    def test_copies(self) -> None:
        model = linear(2.0)
        ema = averages_of_one(model)
        assert out(model) == 10.0
        ema.store(model.parameters())
        ema.copy_to(model)
        assert out(model) == 5.0
        ema.restore(model.parameters())
        assert out(model) == 10.0


@pytest.mark.usefixtures("autocast")
def test_a_module_of_averages_follows_an_update() -> None:
    model = linear(2.0)
    shadow = emajit.init(dict(model.named_parameters()))
    teacher = averaged_module(model, shadow)
    assert out(teacher) == 10.0
    params = {name: torch.ones_like(average) for name, average in shadow.items()}
    emajit.update_(shadow, params, 0, decay=0.0)
    assert out(teacher) == 5.0
    target = {name: average.clone() for name, average in shadow.items()}
    x = torch.ones(1, 4)
    for value in (1.0, 3.0):
        params = {name: torch.full_like(average, value) for name, average in target.items()}
        emajit.update_(target, params, 0, decay=0.0)
        found = torch.func.functional_call(model, target, (x,))
        assert float(found.detach()[0, 0]) == 5 * value


def test_a_fused_step() -> None:
    model = linear(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = LitEma(model, decay=0.0, use_num_updates=False)
    fused = FusedOptimizer(optimizer, ema, model, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        for expected in (10.0, 5.0, 0.0):
            assert out(model) == expected
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            fused.step()
