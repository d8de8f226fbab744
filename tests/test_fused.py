"""Optimizer and average in one graph do what the two calls do, one after the other."""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import emajit
from emajit import LitEma, _compile, _optimizer, _torch, schedules
from emajit.fused import FusedOptimizer

Build = Callable[[Iterable[Any]], torch.optim.Optimizer]

# A compiled Adam has its bias corrections in float32: 1 - 0.999 is off by 6e-5 of itself.
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}

OPTIMIZERS: dict[str, Build] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD momentum": lambda params: torch.optim.SGD(
        params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "AdamW amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def gradients(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


class Twins:
    """One model trained with the two calls, and one with the fused one."""

    def __init__(self, build: Build, backend: str = "aot_eager", **options: Any) -> None:
        self.models = network(), network()
        self.optimizers = tuple(build(model.parameters()) for model in self.models)
        self.params = [dict(model.named_parameters()) for model in self.models]
        self.shadows: list[Any] = [
            emajit.init(params, dtype=torch.float32) for params in self.params
        ]
        self.options: dict[str, Any] = {"decay": schedules.warmup(0.9)} | options
        self.fused = FusedOptimizer(
            self.optimizers[1], self.shadows[1], self.params[1], backend=backend, **self.options
        )

    def step(self, step: int) -> None:
        for model in self.models:
            gradients(model, step)
        self.optimizers[0].step()
        emajit.update_(self.shadows[0], self.params[0], step, **self.options)
        self.fused.step(step)

    def compare(self) -> None:
        assert_close(self.params[1], self.params[0], **CLOSE)
        assert_close(self.shadows[1], self.shadows[0], **CLOSE)
        assert_close(
            self.optimizers[1].state_dict()["state"],
            self.optimizers[0].state_dict()["state"],
            **CLOSE,
        )


def test_a_learning_rate_is_not_rounded_to_float32() -> None:
    weights = [nn.Parameter(torch.ones(3).double()) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in weights]
    shadow = {"w": torch.zeros(3).double()}
    fused = FusedOptimizer(optimizers[1], shadow, {"w": weights[1]}, decay=0.5, backend="aot_eager")
    for step in range(3):
        for p in weights:
            p.grad = torch.ones(3).double()
        optimizers[0].step()
        fused.step(step)
        assert_close(weights[1], weights[0], rtol=1e-15, atol=0)


# With a momentum, with two moments, and as a single operator; the others are slow.
BY_INDUCTOR = ("SGD momentum", "AdamW", "AdamW fused")
PAIRS = [
    *((name, "aot_eager") for name in OPTIMIZERS),
    *(
        pytest.param(
            name,
            "inductor",
            marks=[pytest.mark.inductor, *([] if name in BY_INDUCTOR else [pytest.mark.slow])],
        )
        for name in OPTIMIZERS
    ),
]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_agrees_with_the_two_calls(name: str, backend: str) -> None:
    twins = Twins(OPTIMIZERS[name], backend)
    for step in range(5):
        twins.step(step)
        twins.compare()
    assert list(twins.fused._graphs.values()) != [None]


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "stochastic"},
        {"nonfinite": "skip"},
        {"decay": 0.5},
        {"decay": torch.tensor(0.5)},
    ],
)
def test_options_are_those_of_update(options: dict[str, Any]) -> None:
    twins = Twins(OPTIMIZERS["AdamW"], **options)
    for step in range(3):
        twins.step(step)
    twins.compare()


def test_several_averages() -> None:
    model = network()
    optimizer, params = torch.optim.SGD(model.parameters(), lr=0.1), dict(model.named_parameters())
    decays: list[Any] = [0.5, schedules.warmup(0.9)]
    shadows, expected = ([emajit.init(params) for _ in decays] for _ in range(2))
    fused = FusedOptimizer(optimizer, shadows, params, decays=decays, backend="aot_eager")
    for step in range(4):
        gradients(model, step)
        fused.step(step)
        emajit.update_many_(expected, params, step, decays=decays)
    assert_close(shadows, expected)


@pytest.mark.parametrize("warm", [True, False])
def test_litema(warm: bool) -> None:
    models = network(), network()
    first, second = (torch.optim.AdamW(model.parameters()) for model in models)
    expected, found = (LitEma(model, 0.9, use_num_upates=warm) for model in models)
    fused = FusedOptimizer(second, found, models[1], backend="aot_eager")
    for step in range(4):
        for model in models:
            gradients(model, step)
        first.step()
        expected(models[0])
        fused.step()
    assert_close(found.state_dict(), expected.state_dict(), **CLOSE)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=20, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_changes_the_rate_without_a_recompilation(name: str) -> None:
    twins = Twins(OPTIMIZERS["AdamW"])
    rates = [SCHEDULERS[name](optimizer) for optimizer in twins.optimizers]
    for step in range(10):
        if step == 3:
            torch.compiler.set_stance("fail_on_recompile")
        twins.step(step)
        for rate in rates:
            rate.step()
    torch.compiler.set_stance("default")
    assert any(twins.fused._graphs.values())
    twins.compare()
    for a, b in zip(*(optimizer.param_groups for optimizer in twins.optimizers), strict=True):
        assert isinstance(b["lr"], float)
        assert a["lr"] == b["lr"]


def test_parameter_groups_keep_their_rates() -> None:
    def build(params: Iterable[Any]) -> torch.optim.Optimizer:
        first, *others = params
        groups: list[Any] = [
            {"params": [first], "lr": 0.5, "weight_decay": 0.0},
            {"params": others},
        ]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    twins = Twins(build)
    for step in range(4):
        twins.step(step)
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["lr"] *= 0.7
    twins.compare()
    groups = twins.optimizers[1].param_groups
    assert [group["lr"] for group in groups] == [pytest.approx(0.5 * 0.7**4), 0.01]


def test_options_that_change_at_every_step_run_one_after_the_other() -> None:
    twins = Twins(OPTIMIZERS["AdamW"])

    def run(steps: range) -> None:
        for step in steps:
            for optimizer in twins.optimizers:
                optimizer.param_groups[0]["betas"] = 0.9 + 0.005 * step, 0.999
            twins.step(step)

    run(range(8))
    with pytest.warns(RuntimeWarning, match="options of AdamW beside lr, .* more than 8 forms"):
        run(range(8, 12))
    twins.compare()


def test_gradients_that_come_and_go() -> None:
    twins = Twins(OPTIMIZERS["AdamW"])
    for step in range(8):
        for model in twins.models:
            gradients(model, step)
            if step % 2:
                model.get_parameter("0.bias").grad = None
        twins.optimizers[0].step()
        emajit.update_(twins.shadows[0], twins.params[0], step, **twins.options)
        twins.fused.step(step)
        twins.compare()


def test_the_state_is_saved_and_loaded_as_before() -> None:
    twins = Twins(OPTIMIZERS["AdamW"])
    for step in range(6):
        twins.step(step)
        if step in (0, 3):
            for optimizer in twins.optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins.compare()
    fresh = torch.optim.AdamW(network().parameters())
    fresh.load_state_dict(twins.optimizers[1].state_dict())
    assert fresh.param_groups[0]["lr"] == 0.01


def test_step_hooks_see_what_they_would_see() -> None:
    """One that clips gradients, and one that clips weights."""
    twins = Twins(OPTIMIZERS["SGD"])

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)

    def clamp(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.data.clamp_(-0.2, 0.2)

    for optimizer in twins.optimizers:
        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(clamp)
    for step in range(4):
        twins.step(step)
        twins.compare()


def test_hooks_of_all_optimizers_run_at_every_step() -> None:
    twins, seen = Twins(OPTIMIZERS["SGD"]), []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer))
    for step in range(4):
        twins.step(step)
    handle.remove()
    assert seen == [*twins.optimizers] * 4


def test_a_step_that_somebody_replaced_is_the_one_that_runs() -> None:
    twins = Twins(OPTIMIZERS["SGD"])
    for optimizer in twins.optimizers:
        vars(optimizer)["step"] = lambda: None
    before = copy.deepcopy(twins.params[1])
    for step in range(3):
        twins.step(step)
    assert_close(twins.params[1], before, rtol=0, atol=0)


def test_a_step_replaced_below_a_scheduler_or_on_the_class_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clipped(self: Any, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad.clamp_(-0.1, 0.1)
        return plain(self, closure)

    plain = torch.optim.SGD.step
    for on_class in (False, True):
        if on_class:
            monkeypatch.setattr(torch.optim.SGD, "step", functools.wraps(plain)(clipped))
        model = nn.Linear(2, 1, bias=False)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
        if not on_class:
            optimizer.step = types.MethodType(clipped, optimizer)
            lr_scheduler.ConstantLR(optimizer, factor=1.0)
        fused = FusedOptimizer(optimizer, LitEma(model), model, backend="aot_eager")
        for _ in range(3):
            before = model.weight.detach().clone()
            model.weight.grad = torch.full_like(before, 5.0)
            fused.step()
            assert_close(before - model.weight, torch.full_like(before, 0.1))


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def sliced(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
@pytest.mark.parametrize("relaid", [transposed, sliced])
@pytest.mark.parametrize("averaged", [True, False])
def test_strides_that_change(
    compiler: str, relaid: Callable[[Tensor], Tensor], averaged: bool
) -> None:
    """Those of a gradient, and of a weight, be it averaged or not."""
    weight, other = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(2))
    params = {"w": weight} if averaged else {"other": other}
    fused = FusedOptimizer(
        torch.optim.SGD([weight, other], lr=1.0),
        emajit.init(params),
        params,
        decay=0.0,
        backend=compiler,
    )
    gradient = torch.arange(12.0).view(4, 3)
    for step in range(6):
        weight.data = torch.zeros(4, 3) if step < 4 else relaid(torch.zeros(4, 3))
        weight.grad = gradient.clone() if step != 3 else relaid(gradient)
        other.grad = torch.ones(2)
        fused.step(step)
        assert_close(weight.detach(), -gradient, rtol=0, atol=0)


class Decorated:
    """A step that is an object, as some decorators make one."""

    hooked = True  # as torch marks its own

    def __init__(self, function: Any) -> None:
        self.__wrapped__ = function

    def __call__(self, *arguments: Any) -> Any:
        return self.__wrapped__(*arguments)

    def __get__(self, optimizer: Any, _: type) -> Any:
        return functools.partial(self, optimizer) if optimizer else self


def test_a_step_that_is_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", Decorated(torch.optim.SGD.step))
    twins = Twins(OPTIMIZERS["SGD"])
    for step in range(3):
        twins.step(step)
        twins.compare()


def test_groups_that_shared_a_rate() -> None:
    rate = torch.tensor(0.1)
    twins = Twins(lambda params: torch.optim.SGD([{"params": [p]} for p in params], lr=rate))
    for step in range(5):
        if step == 3:
            for optimizer in twins.optimizers:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
        twins.step(step)
        twins.compare()


def test_weights_that_changed_places() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ema = LitEma(model, decay=0.0, use_num_upates=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = FusedOptimizer(optimizer, ema, model, backend="aot_eager")
    for step in range(6):
        if step == 3:
            model[0], model[1] = model[1], model[0]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        fused.step()
        assert_close([*ema.named_averages().values()], [p.detach() for p in model.parameters()])


def test_state_that_changed_its_order() -> None:
    """A graph knows it by its place, as what it puts back after a step that GradScaler skips."""
    twins = Twins(OPTIMIZERS["SGD momentum"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=100)
    scaler.scale(torch.ones(()))
    fused: Any = twins.fused
    for step in range(6):
        if step == 3:
            for optimizer in twins.optimizers:
                for p in [*optimizer.state][:1]:
                    optimizer.state[p] = optimizer.state.pop(p)
        for model in twins.models:
            gradients(model, step)
        twins.optimizers[0].step()
        emajit.update_(twins.shadows[0], twins.params[0], step, **twins.options)
        scaler.step(fused, step)
        scaler.update()
        twins.compare()


@pytest.mark.inductor
def test_weights_of_one_memory_leave_no_graph_for_others() -> None:
    def trained(tied: bool, both: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model: Any = nn.Sequential(*[nn.Linear(9, 9, bias=False) for _ in "ab"])
        if tied:
            model[1].weight.data = model[0].weight.data
        params = dict(model.named_parameters())
        shadow = {name: p.detach().clone() for name, p in params.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        fused = FusedOptimizer(optimizer, shadow, params, decay=0.9)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 9)).square().mean().backward()
            if both:
                fused.step(step)
            else:
                optimizer.step()
                emajit.update_(shadow, params, step, decay=0.9)
        return [p.detach() for p in params.values()] + [*shadow.values()]

    for tied in (True, False):
        assert_close(trained(tied, both=True), trained(tied, both=False), **CLOSE)


def test_what_cannot_be_compiled_runs_one_after_the_other() -> None:
    def build(params: Iterable[Any]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(params)

    twins = Twins(build)
    twins.step(0)
    with pytest.warns(RuntimeWarning, match="one after the other: torch.compile failed"):
        twins.step(1)
    for step in range(2, 5):
        twins.step(step)
        twins.compare()


@pytest.mark.inductor
def test_under_a_mode_that_sees_each_operator() -> None:
    twins = Twins(OPTIMIZERS["AdamW"], "inductor")
    mode = FlopCounterMode(display=False)
    contexts: list[Any] = [nullcontext(), mode, nullcontext(), mode, nullcontext()]
    for step, context in enumerate(contexts):
        with context:
            twins.step(step)
        twins.compare()


def test_a_copy_steps_its_own_weights() -> None:
    twins = Twins(OPTIMIZERS["AdamW"])
    for step in range(3):
        twins.step(step)
    before = copy.deepcopy(twins.params[1])
    other = copy.deepcopy(twins.fused)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step(3)
    assert_close(twins.params[1], before, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_close(other._params, before, rtol=0, atol=0)


def test_a_model_inside_of_a_scope_is_refused() -> None:
    twins = Twins(OPTIMIZERS["SGD"])
    gradients(twins.models[1], 0)
    shadow = emajit.init(twins.params[1], dtype=torch.float64)
    with (
        emajit.ema_scope(twins.models[1], shadow),
        pytest.raises(RuntimeError, match="outside of ema_scope"),
    ):
        twins.fused.step(0)
    detached = {name: p.detach() for name, p in twins.params[1].items()}
    fused = FusedOptimizer(twins.optimizers[1], twins.shadows[1], detached, decay=0.9)
    with (
        emajit.ema_scope(twins.models[1], twins.shadows[1]),
        pytest.raises(RuntimeError, match="outside of ema_scope"),
    ):
        fused.step(0)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="Inductor of torch 2.11 leaves out the cast on the CPU"
)
@pytest.mark.inductor
def test_the_average_is_of_weights_as_they_were_rounded() -> None:
    weight = nn.Parameter(torch.randn(1000).bfloat16())
    params, shadow = {"w": weight}, {"w": torch.zeros(1000)}
    fused = FusedOptimizer(torch.optim.SGD([weight], lr=0.1), shadow, params, decay=0.0)
    for step in range(3):
        weight.grad = torch.randn(1000).bfloat16()
        fused.step(step)
        assert_close(shadow["w"], weight.detach().float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum"])
@pytest.mark.parametrize("unscale", ["as fused", "as its optimizer", "in the step"])
def test_a_gradient_scaler_skips_a_step(unscale: str, name: str) -> None:
    """An infinite gradient changes nothing, before and after the graph is there."""
    twins = Twins(OPTIMIZERS[name])
    targets: list[Any] = [twins.optimizers[0], twins.fused]
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in targets]
    for step in range(10):
        infinite = step in (0, 1, 4, 6, 7)
        for model, scaler, target in zip(twins.models, scalers, targets, strict=True):
            scaled_gradients(model, step, scaler, infinite=infinite)
            if unscale != "in the step":
                by_name = unscale == "as its optimizer" and target is twins.fused
                scaler.unscale_(twins.optimizers[1] if by_name else target)
        before = copy.deepcopy((twins.params[1], twins.shadows[1], twins.optimizers[1].state))
        scalers[0].step(targets[0])
        if not infinite:
            emajit.update_(twins.shadows[0], twins.params[0], step, **twins.options)
        scalers[1].step(targets[1], step)
        if infinite:
            after = twins.params[1], twins.shadows[1], twins.optimizers[1].state
            assert_close([*after[:2]], [*before[:2]], rtol=0, atol=0)
            assert_close([*after[2].values()], [*before[2].values()], rtol=0, atol=0)
        for scaler in scalers:
            scaler.update()
        twins.compare()
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_the_first_step_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It creates the optimizer's state; to look for a compiler takes seconds."""
    asked: list[str] = []
    monkeypatch.setattr("emajit._optimizer.can_compile", asked.append)  # and there is none
    twins = Twins(OPTIMIZERS["AdamW"], backend="auto")
    for step in range(3):
        twins.step(step)
        assert asked == ["cpu"] * step
    twins.compare()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small graph is tried, for all forms of a step and all optimizers; one warning tells."""
    for owner, name in ((_optimizer, "can_compile"), (_compile, "kernel")):
        monkeypatch.setattr(owner, name, functools.lru_cache(getattr(owner, name).__wrapped__))
    compile_ = Mock(side_effect=RuntimeError("no Python 3.99"))
    monkeypatch.setattr(torch, "compile", compile_)

    def step_all() -> None:
        for step in range(6):
            for twins in several:
                for optimizer in twins.optimizers:
                    optimizer.param_groups[0]["weight_decay"] = 0.1 / (1 + step // 3)  # a new form
                twins.step(step)
                twins.compare()

    several = [Twins(OPTIMIZERS["AdamW"], backend="auto") for _ in range(2)]
    with pytest.warns(RuntimeWarning, match=r"on cpu, since torch\.compile failed: no Python 3"):
        step_all()
    assert compile_.call_count == 1


def test_gradients_that_were_unscaled_twice_are_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = FusedOptimizer(optimizer, LitEma(model), model, backend="aot_eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled_gradients(model, 0, scaler, infinite=False)
    scaler.unscale_(optimizer)
    assert not _torch.has_been_unscaled(optimizer)  # but by a scaler that is stepping
    scaler.unscale_(fused)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="gradients: expected them unscaled once, found it done"):
        scaler.step(fused)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    scaler.update()
    scaled_gradients(model, 0, scaler, infinite=False)
    scaler.unscale_(optimizer)
    scaler.step(fused)


def test_is_an_optimizer_of_torch() -> None:
    """Whoever asks for one can take it in place of its optimizer."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    shadow = emajit.init(dict(model.named_parameters()))
    fused: Any = FusedOptimizer(
        optimizer, shadow, dict(model.named_parameters()), decay=0.5, backend="aot_eager"
    )
    assert torch.optim.Optimizer in type(fused).mro()
    assert fused.param_groups is optimizer.param_groups
    assert fused.defaults is optimizer.defaults
    scheduler = lr_scheduler.ExponentialLR(fused, 0.5)
    for step in range(3):
        gradients(model, step)
        fused.step(step)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert fused.state is optimizer.state
    state = copy.deepcopy(fused.state_dict())
    fused.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    other = copy.deepcopy(fused)
    assert other.optimizer is not optimizer
    gradients(model, 3)
    fused.step(3)
    fused.load_state_dict(state)
    assert_close(optimizer.state_dict(), other.state_dict())
    called: list[int] = []
    fused.register_step_post_hook(lambda *_: called.append(1))
    fused.step(4)
    assert called == [1]
    fused.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.inductor
def test_a_skipped_step_keeps_a_single_number() -> None:
    weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    params, shadow = {"w": weight}, {"w": torch.tensor(0.0, dtype=torch.float64)}
    fused: Any = FusedOptimizer(torch.optim.AdamW([weight]), shadow, params, decay=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        before = shadow["w"].item(), weight.item()
        weight.grad = scaler.scale(torch.ones((), dtype=torch.float64))
        if step > 2:
            weight.grad.fill_(math.inf)
        scaler.step(fused, step)
        scaler.update()
        assert ((shadow["w"].item(), weight.item()) == before) == (step > 2)


def test_an_error_leaves_no_scale_behind() -> None:
    twins = Twins(OPTIMIZERS["SGD"])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    fused: Any = twins.fused
    scaled_gradients(twins.models[1], 0, scaler, infinite=False)
    with pytest.raises(TypeError, match="step: expected the number"):
        scaler.step(fused)
    assert not {"grad_scale", "found_inf"} & vars(fused).keys()


def test_litema_does_not_count_a_skipped_step() -> None:
    model = network()
    ema = LitEma(model)
    fused: Any = FusedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), ema, model, backend="aot_eager"
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(6):
        scaled_gradients(model, step, scaler, infinite=step in (0, 4))
        scaler.step(fused)
        scaler.update()
    assert int(ema.num_updates) == 4


def scaled_gradients(
    model: nn.Module, seed: int, scaler: torch.amp.GradScaler, *, infinite: bool
) -> None:
    gradients(model, seed)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(scaler.scale(torch.ones(())))
        if infinite:
            p.grad.flatten()[0] = math.inf


def test_detached_parameters_are_the_new_ones() -> None:
    """A state_dict() holds other tensors in the same memory."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params = model.state_dict()
    shadow = emajit.init(params)
    fused = FusedOptimizer(optimizer, shadow, params, decay=0.0, backend="aot_eager")
    for step in range(3):
        gradients(model, step)
        fused.step(step)
        assert_close(shadow, params, rtol=0, atol=0)


def test_a_view_of_the_parameters_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params = {"rows": model.get_parameter("0.weight").detach()[:2]}
    fused = FusedOptimizer(optimizer, emajit.init(params), params, decay=0.5)
    gradients(model, 0)
    with pytest.raises(ValueError, match=r"optimizer's own tensors .* view of shape \(2, 5\)"):
        fused.step(0)


def test_complex_weights_run_one_after_the_other() -> None:
    weight = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    params = {"w": weight}
    shadow = {"w": torch.zeros(3, dtype=torch.complex64)}
    fused = FusedOptimizer(torch.optim.SGD([weight], lr=1.0), shadow, params, decay=0.0)
    for step in range(3):
        weight.grad = torch.full((3,), 1j)
        fused.step(step)
    assert_close(shadow["w"], torch.full((3,), 1 - 3j, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_single_number_in_float64(name: str) -> None:
    ours, theirs = (
        [nn.Parameter(torch.ones(()).double()), nn.Parameter(torch.ones(3).double())]
        for _ in range(2)
    )
    optimizer, expected = (getattr(torch.optim, name)(params, lr=0.1) for params in (ours, theirs))
    shadow, other = emajit.init(ours), emajit.init(theirs)
    fused = FusedOptimizer(optimizer, shadow, ours, decay=0.5, backend="aot_eager")
    for step in range(4):
        for p in (*ours, *theirs):
            p.grad = torch.full_like(p, 1.0 + step)
        fused.step(step)
        expected.step()
        emajit.update_(other, theirs, step, decay=0.5)
    assert_close(shadow, other)
    assert_close(ours, theirs)


def test_nothing_is_written_where_the_average_does_not_fit() -> None:
    twins = Twins(OPTIMIZERS["AdamW"])
    for step in range(3):
        twins.step(step)
    gradients(twins.models[1], 3)
    before = copy.deepcopy(twins.params[1])
    twins.shadows[1]["0.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"params\['0.bias'\]: expected shape \(4,\) as in shadow"):
        twins.fused.step(3)
    assert_close(twins.params[1], before, rtol=0, atol=0)


class TestErrors:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params: ClassVar = dict(model.named_parameters())
    shadow = emajit.init(params)

    def test_optimizer(self) -> None:
        with pytest.raises(TypeError, match=r"optimizer: expected one of torch.optim's own"):
            FusedOptimizer(self.model, self.shadow, self.params, decay=0.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="LBFGS needs a closure"):
            FusedOptimizer(
                torch.optim.LBFGS(self.params.values()), self.shadow, self.params, decay=0.5
            )
        differentiable = torch.optim.SGD(self.params.values(), lr=0.1, differentiable=True)
        with pytest.raises(ValueError, match="expected differentiable=False"):
            FusedOptimizer(differentiable, self.shadow, self.params, decay=0.5)

    def test_average(self) -> None:
        ema = LitEma(self.model)
        with pytest.raises(TypeError, match="decay: expected one beside a shadow"):
            FusedOptimizer(self.optimizer, self.shadow, self.params)
        with pytest.raises(ValueError, match="expected none beside a LitEma"):
            FusedOptimizer(self.optimizer, ema, self.model, decay=0.5)
        with pytest.raises(TypeError, match="expected the model of the LitEma, found dict"):
            FusedOptimizer(self.optimizer, ema, self.params)
        with pytest.raises(ValueError, match="backend: expected auto"):
            FusedOptimizer(self.optimizer, ema, self.model, backend="fast")

    def test_step(self) -> None:
        with pytest.raises(TypeError, match="step: expected the number of updates so far"):
            FusedOptimizer(self.optimizer, self.shadow, self.params, decay=0.5).step()
        with pytest.raises(TypeError, match="step: expected none, since a LitEma counts, found 3"):
            FusedOptimizer(self.optimizer, LitEma(self.model), self.model).step(3)


def test_a_tensor_as_learning_rate() -> None:
    rate = torch.tensor(0.1)
    twins = Twins(lambda params: torch.optim.AdamW(params, lr=rate))
    for step in range(4):
        twins.step(step)
    twins.compare()
    assert twins.optimizers[1].param_groups[0]["lr"] is rate


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_of_a_lit_ema(buffers: Any) -> None:
    emas = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = LitEma(model, 0.75, buffers=buffers)
        fused = FusedOptimizer(optimizer, ema, model, backend="aot_eager")
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 2)).square().sum().backward()
            if fuse:
                fused.step()
            else:
                optimizer.step()
                ema(model)
        emas.append(ema)
    for key, value in emas[0].state_dict().items():
        assert_close(emas[1].state_dict()[key], value)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_skipped_step_leaves_the_buffers_of_a_lit_ema(buffers: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = LitEma(model, 0.75, buffers=buffers)
    fused: Any = FusedOptimizer(optimizer, ema, model, backend="aot_eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):  # one after the other, compiled, and each once skipped
        before = {key: value.clone() for key, value in ema.state_dict().items()}
        optimizer.zero_grad()
        loss = model(torch.randn(8, 2)).square().sum()
        skipped = step in (1, 3)
        scaler.scale(loss * float("inf") if skipped else loss).backward()
        scaler.step(fused)
        scaler.update()
        after = ema.state_dict()
        assert torch.equal(before["1running_mean"], after["1running_mean"]) == skipped
        assert torch.equal(before["num_updates"], after["num_updates"]) == skipped
        if buffers == "copy" and not skipped:
            assert torch.equal(after["1running_mean"], model.get_buffer("1.running_mean"))
