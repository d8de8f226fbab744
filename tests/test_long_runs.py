"""Over 20,000 steps nothing grows; many models in one process do not disturb each other."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import emajit
from emajit import LitEma, _compile, _plan, schedules
from tests.counting import Counting, own_memory, tells_memory

STEPS = 20_000
WARM = 2_000
DECAY = schedules.warmup(0.999)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))


def in_place() -> Callable[[int], object]:
    params = dict(model().named_parameters())
    shadow = emajit.init(params)
    return lambda step: emajit.update_(shadow, params, step, decay=DECAY)


def pure() -> Callable[[int], object]:
    state: dict[str, Any] = {"params": dict(model().named_parameters())}
    state["shadow"] = emajit.init(state["params"])

    def step(n: int) -> None:
        state["shadow"] = emajit.update(state["shadow"], state["params"], n, decay=DECAY)

    return step


def new_parameters_each_step() -> Callable[[int], object]:
    shadow = {"w": torch.zeros(1000), "v": torch.zeros(1000).bfloat16()}

    def step(n: int) -> None:
        params = {name: torch.ones(1000) for name in shadow}
        emajit.update_(shadow, params, n, decay=0.9, rounding="stochastic", nonfinite="skip")

    return step


def litema() -> Callable[[int], object]:
    net = model()
    ema = LitEma(net)

    def step(n: int) -> None:
        ema(net)
        if n % 10 == 0:
            with ema.ema_scope(net):
                pass
            ema.store(net.parameters())
            ema.copy_to(net)
            ema.restore(net.parameters())

    return step


def alive() -> int:
    """How many objects there are, beside the cache of plans, which is bounded."""
    _plan._plans.clear()
    gc.collect()
    return len(gc.get_objects())


@tells_memory
@pytest.mark.parametrize("make", [in_place, pure, new_parameters_each_step, litema])
def test_nothing_grows(make: Callable[[], Callable[[int], object]]) -> None:
    step = make()
    for n in range(WARM):
        step(n)
    objects, memory = [alive()], [own_memory()]
    graphs = _compile.kernel.cache_info().currsize
    for half in (range(WARM, STEPS // 2), range(STEPS // 2, STEPS)):
        for n in half:
            step(n)
        objects.append(alive())
        memory.append(own_memory())
    # What leaks grows in both; what another thread makes once, such as Inductor's, in one.
    assert min(b - a for a, b in pairwise(objects)) < 100
    # 8,000 leaks of 1000 numbers would be 32 MB.
    assert min(b - a for a, b in pairwise(memory)) < 1.5 * 2**20
    assert _compile.kernel.cache_info().currsize == graphs


def test_one_graph_serves_all_steps(counting: tuple[str, Counting]) -> None:
    name, counter = counting
    params = dict(model().named_parameters())
    shadow = emajit.init(params)
    for step in range(2):
        emajit.update_(shadow, params, step, decay=DECAY, backend=name)
    gc.collect()
    objects = len(gc.get_objects())
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(2, STEPS // 4):
            count = step if step < STEPS // 8 else torch.tensor(step)
            emajit.update_(shadow, params, count, decay=DECAY, backend=name)
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert counter.graphs == 1


def test_two_models_twelve_structures_and_what_is_frozen_later(
    counting: tuple[str, Counting],
) -> None:
    name, counter = counting
    nets = [model(), model()]
    emas = [LitEma(net, backend=name) for net in nets]
    trees = [{f"{i}": torch.zeros(2 + i) for i in range(n)} for n in range(1, 13)]
    shadows = [emajit.init(tree) for tree in trees]
    params = [{key: leaf + 1 for key, leaf in tree.items()} for tree in trees]
    for step in range(20):
        if step == 10:
            nets[0][0].weight.requires_grad_(False)  # type: ignore[index]
        with torch.no_grad():
            for net in nets:
                torch._foreach_add_(list(net.parameters()), 1.0)
        for net, ema in zip(nets, emas, strict=True):
            ema(net)
        for shadow, tree in zip(shadows, params, strict=True):
            emajit.update_(shadow, tree, step, decay=0.5, backend=name)
    assert counter.graphs == 13  # the two models have one structure
    for shadow in shadows:
        assert_close(
            list(shadow.values()), [torch.full_like(s, 1 - 0.5**20) for s in shadow.values()]
        )
    first, second = (list(ema.buffers())[2] for ema in emas)
    moved = [b - next(net.parameters()) for b, net in zip((first, second), nets, strict=True)]
    assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-5)
