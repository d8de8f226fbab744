"""Ctrl-C at any moment of a scope: real signals, which Python handles between two instructions."""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import emajit
from emajit import LitEma, _exchange, scope
from emajit._context import contextmanager

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")


@pytest.fixture(autouse=True)
def ring() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # hypothesis looks on, and what is raised there is lost
    yield
    gc.enable()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def start(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)


def network() -> nn.Module:
    layers = [[nn.Linear(3, 3), nn.BatchNorm1d(3)] for _ in range(20)]
    return nn.Sequential(*[layer for pair in layers for layer in pair])


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    inner = [x for t in tensors for x in _exchange.within(t)]
    values = [t.detach().clone() for t in inner]
    addresses = [t.data_ptr() for t in inner]
    return [[*map(id, tensors)], [t._version for t in tensors], addresses, values]


def same(a: list[Any], b: list[Any]) -> bool:
    return a[:-1] == b[:-1] and all(map(torch.equal, a[-1], b[-1]))


USES: dict[str, Callable[[nn.Module, LitEma], AbstractContextManager[None]]] = {
    "ema_scope": lambda model, ema: emajit.ema_scope(model, ema.named_averages()),
    "ema_scope(copy=True)": lambda model, ema: emajit.ema_scope(
        model, ema.named_averages(), copy=True
    ),
    "LitEma.ema_scope": lambda model, ema: ema.ema_scope(model, "Validation"),
}


def of_wrapping_tensors() -> nn.Module:
    """Such as quantised weights: what is done to them is Python, between the tensors in them."""
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(10)])
    for layer in model:
        a, b = torch.rand(2, 2), torch.rand(2, 2)
        layer.weight = nn.Parameter(TwoTensor(a, b))  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("moment", ["entering", "leaving"])
@pytest.mark.parametrize("make", [network, of_wrapping_tensors])
@pytest.mark.parametrize("use", USES)
def test_a_scope_that_is_interrupted_leaves_the_training_weights(
    use: str, make: Callable[[], nn.Module], moment: str
) -> None:
    model = make()
    ema = LitEma(model)
    for average in ema.named_averages().values():
        average.add_(1)
    before, interrupts, lost, inside = state(model), 0, 0, 0
    for _ in range(2):
        began = time.perf_counter()
        with USES[use](model, ema):
            if moment == "leaving":
                began = time.perf_counter()
        took = time.perf_counter() - began
    for i in range(1, 121):
        try:
            if moment == "entering":
                start(i / 120 * took)
                with USES[use](model, ema):
                    pass
            else:
                with USES[use](model, ema):
                    start(i / 120 * took)
            start(0)
        except KeyboardInterrupt:
            interrupts += 1
            # What handles the interrupt, such as one that saves the model, finds it as it was.
            lost += not same(before, state(model))
            inside += bool(scope._inside)
            scope._inside.clear()
    assert interrupts > 10
    assert (lost, inside) == (0, 0)


def test_restore_that_is_interrupted_can_be_repeated() -> None:
    """The training weights are in the model, or all still stored; never stored beside new ones."""
    model = network()
    ema = LitEma(model, buffers="copy")
    for average in ema.named_averages().values():
        average.add_(1)
    before, interrupts = state(model)[-1], 0
    for i in range(200):
        ema.store(model.parameters())
        ema.copy_to(model)
        try:
            start(1e-5 + i * 1e-6)
            ema.restore(model.parameters())
            start(0)
        except KeyboardInterrupt:
            interrupts += 1
            if ema.collected_params:
                assert not all(map(torch.equal, before, state(model)[-1]))
                ema.restore(model.parameters())
        assert all(map(torch.equal, before, state(model)[-1]))
        assert not ema.collected_params
    assert interrupts > 20


def test_no_python_runs_before_the_weights_are_back() -> None:
    """Python looks for signals at the start of each function that is written in it."""
    model = network()
    shadow = {name: p.detach() + 1 for name, p in model.named_parameters()}
    weight, own = next(model.parameters()), next(model.parameters()).data_ptr()
    called: list[tuple[str, bool]] = []

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is not leave.__code__:
            called.append((frame.f_code.co_qualname, weight.data_ptr() == own))

    def leave() -> None:
        with emajit.ema_scope(model, shadow):
            sys.setprofile(trace)

    try:
        leave()
    finally:
        sys.setprofile(None)
    # `close` resumes the two generators in the midst, where Python does not look.
    assert {name for name, is_back in called if not is_back} <= {"ema_scope", "exchanged"}


class TestContextManager:
    def test_leaves_whatever_is_raised(self) -> None:
        told: list[str] = []

        @contextmanager
        def within() -> Iterator[None]:
            told.append("in")
            try:
                yield
            finally:
                told.append("out")

        for error in (ValueError, KeyboardInterrupt, GeneratorExit, StopIteration):
            with pytest.raises(error), within():
                raise error
        with within():
            pass
        assert told == ["in", "out"] * 5

    def test_is_left_if_it_is_lost(self) -> None:
        model = nn.Linear(2, 2)
        weight: Tensor = model.weight.detach().clone()
        entered = emajit.ema_scope(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        entered.__enter__()
        assert not torch.equal(model.weight, weight)
        del entered
        assert torch.equal(model.weight, weight)

    def test_as_a_decorator(self) -> None:
        model = nn.Linear(2, 2)
        shadow = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}

        @emajit.ema_scope(model, shadow)  # type: ignore[operator]
        def evaluate() -> float:
            return float(model(torch.ones(2)).detach()[0])

        assert evaluate() == evaluate() == 3.0

    def test_a_second_entry_that_is_refused_does_not_end_the_first(self) -> None:
        model = nn.Linear(2, 2)
        ones = torch.ones(2, 2)
        both = emajit.ema_scope(model, {"weight": ones, "bias": torch.ones(2)})
        with both:
            with pytest.raises(RuntimeError, match="outside of ema_scope"):
                both.__enter__()
            assert torch.equal(model.weight, ones)
        assert not torch.equal(model.weight, ones)
