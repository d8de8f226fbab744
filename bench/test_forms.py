"""What else an update can be: backends, dtypes, lists, with the optimizer, the first call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emajit
from bench import contestants, measure, shapes
from bench.measure import Calls, Interleave, Times
from bench.results import Publish, Result, Target
from emajit.fused import FusedOptimizer

Params = dict[str, Tensor]

DECAY = contestants.DECAY
LARGE = ("ResNet-50", "ViT-B")


def params_of(name: str, device: str, dtype: torch.dtype = torch.float32) -> Params:
    return dict(shapes.Holder(shapes.MODELS[name](), device, dtype).named_parameters())


def update(
    params: Params, dtype: torch.dtype | None = None, **options: Any
) -> Callable[[], object]:
    """An update in place of a shadow in `dtype`, at one step after the other."""
    shadow, steps = emajit.init(params, dtype=dtype), count()
    return lambda: emajit.update_(shadow, params, next(steps), decay=DECAY, **options)


def run(calls: Calls, rounds: int, interleave: Interleave) -> Times:
    for call in calls.values():  # two, for what compiles at the second
        call()
        call()
    return interleave(calls, rounds)


@pytest.mark.parametrize("name", shapes.MODELS)
def test_backends(name: str, device: str, interleave: Interleave, publish: Publish) -> None:
    params = params_of(name, device)
    backends = "auto", "eager", "inductor"
    calls = {backend: update(params, backend=backend) for backend in backends}
    times = run(calls, 40 if name in LARGE else 100, interleave)
    result = Result("backends", f"{name}, float32: backends", "auto", times)
    worse = max(measure.ratio(times, "auto", other) for other in backends[1:])
    result.targets = [Target(f"auto to the better backend on {name}", worse, 1.1)]
    publish(result)


@pytest.mark.parametrize("name", LARGE)
def test_mixed_precision(name: str, device: str, interleave: Interleave, publish: Publish) -> None:
    """A float32 shadow of bfloat16 parameters."""
    params = params_of(name, device, torch.bfloat16)
    loop = {n: p.detach().float() for n, p in params.items()}

    @torch.no_grad()
    def cast() -> None:
        for n, p in params.items():
            loop[n].lerp_(p.float(), 1 - DECAY)

    calls: Calls = {
        "float32 of float32": update(params_of(name, device)),
        "float32 of bfloat16": update(params, torch.float32),
        "eager": update(params, torch.float32, backend="eager"),
        "loop: s.lerp_(p.float(), w)": cast,
    }
    times = run(calls, 40, interleave)
    memory = {who: measure.peak_memory(call, device) for who, call in calls.items()}
    result = Result("mixed", f"{name}: mixed precision", "float32 of float32", times, memory)
    mixed = "float32 of bfloat16"
    result.targets = [
        Target(
            f"float32 of bfloat16 to float32 of float32, {name}",
            measure.ratio(times, mixed, "float32 of float32"),
            0.95,
        ),
        Target(
            f"float32 of bfloat16 to the loop, {name}",
            measure.ratio(times, mixed, "loop: s.lerp_(p.float(), w)"),
            1 / 1.8,
        ),
    ]
    publish(result)


def test_bandwidth(device: str, interleave: Interleave, publish: Publish) -> None:
    """Of 2^27 elements, as a share of what a copy from tensor to tensor reaches."""
    params: Params = dict(shapes.Holder(shapes.even(2**27, 128), device).named_parameters())
    halves = {n: p.detach().bfloat16() for n, p in params.items()}
    source = torch.cat([p.detach() for p in params.values()])
    target = torch.empty_like(source)
    calls: Calls = {
        "copy": lambda: target.copy_(source),
        "float32": update(params),
        "float32 of bfloat16": update(halves, torch.float32),
    }
    bytes_moved = {"copy": 8, "float32": 12, "float32 of bfloat16": 10}
    times = run(calls, 20, interleave)
    result = Result("bandwidth", "134M elements in 128 tensors", "copy", times)
    for name in ("float32", "float32 of bfloat16"):
        share = measure.ratio(times, name, "copy") * bytes_moved["copy"] / bytes_moved[name]
        result.targets.append(Target(f"time a byte to that of a copy, {name}", share, 1 / 0.9))
    publish(result)


@pytest.mark.parametrize("name", ["MLP", "1000 x 32", *LARGE])
def test_several_averages(name: str, device: str, interleave: Interleave, publish: Publish) -> None:
    params = params_of(name, device)
    decays = [0.999, 0.9999, 0.99999]
    together, apart = ([emajit.init(params) for _ in decays] for _ in range(2))

    def one_by_one() -> None:
        for shadow, decay in zip(apart, decays, strict=True):
            emajit.update_(shadow, params, 0, decay=decay)

    calls: Calls = {
        "three calls": one_by_one,
        "a list of three": lambda: emajit.update_many_(together, params, 0, decays=decays),
    }
    times = run(calls, 60, interleave)
    result = Result("several", f"{name}: three averages", "three calls", times)
    ratio = measure.ratio(times, "a list of three", "three calls")
    result.targets = [Target(f"a list to three calls, {name}", ratio, 0.7)]
    publish(result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["MLP", "ResNet-50"])
def test_rounding(
    name: str, dtype: torch.dtype, device: str, interleave: Interleave, publish: Publish
) -> None:
    params = params_of(name, device, dtype)
    calls = {rounding: update(params, rounding=rounding) for rounding in ("nearest", "stochastic")}
    times = run(calls, 40, interleave)
    title = f"{name}, {str(dtype).removeprefix('torch.')}: rounding"
    result = Result("rounding", title, "nearest", times)
    wanted = 1.1 if device.startswith("cuda") else 4.0
    ratio = measure.ratio(times, "stochastic", "nearest")
    result.targets = [Target(f"stochastic to nearest, {title}", ratio, wanted)]
    publish(result)


def test_fused_with_adamw(device: str, interleave: Interleave, publish: Publish) -> None:
    """12.6M weights in 24 tensors."""
    layer = [(1024, 1024), (1024,), (2048, 1024), (2048,), (1024,), (1024,)]

    def trained(**options: Any) -> tuple[torch.optim.Optimizer, Params]:
        params: Params = dict(shapes.Holder(layer * 4, device).named_parameters())
        for p in params.values():
            p.grad = torch.randn_like(p)
        return torch.optim.AdamW(params.values(), **options), params

    def fused(averaged: bool) -> Callable[[], object]:
        optimizer, params = trained()
        params = params if averaged else {}
        step = FusedOptimizer(optimizer, emajit.init(params), params, decay=DECAY)
        return lambda: step.step(0)

    calls: Calls = {
        "update_": update(trained()[1]),
        "optimizer": trained()[0].step,
        "optimizer, fused=True": trained(fused=True)[0].step,
        "optimizer, compiled": fused(averaged=False),
        "FusedOptimizer": fused(averaged=True),
    }
    times = run(calls, 40, interleave)
    rows = zip(*(times[n] for n in ("FusedOptimizer", "optimizer, compiled")), strict=True)
    times["FusedOptimizer less optimizer"] = [both - alone for both, alone in rows]
    result = Result("fused", "AdamW of 12.6M weights and its average", "update_", times)
    ratio = measure.ratio(times, "FusedOptimizer less optimizer", "update_")
    result.targets = [Target("what the average adds, to update_", ratio, 0.5)]
    publish(result)


COMPILE = """
import sys, time, torch, emajit
from bench import shapes
name, device = sys.argv[1:]
model = shapes.Holder(shapes.MODELS[name](), device, torch.bfloat16)
params = dict(model.named_parameters())
shadow = emajit.init(params, dtype=torch.float32)
began = time.perf_counter()
emajit.update_(shadow, params, 0, decay=0.5)
print(time.perf_counter() - began)
"""


@pytest.mark.parametrize("name", shapes.MODELS)
def test_compilation(name: str, device: str, publish: Publish, tmp_path: Path) -> None:
    """The first call of a float32 shadow of bfloat16 parameters, which `auto` compiles if large."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": "src:."}

    def first_call() -> float:
        done = subprocess.run(  # noqa: S603, our own code
            # A call that falls back to what is not compiled warns.
            [sys.executable, "-W", "error::RuntimeWarning", "-c", COMPILE, name, device],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return float(done.stdout)

    times = {"cold": [first_call()], "warm": [first_call()]}
    result = Result("compilation", f"{name}: first call, milliseconds", "cold", times)
    if name in ("ResNet-50", "1000 x 32"):
        wanted = 30.0 if name == "ResNet-50" else 60.0
        result.targets = [Target(f"seconds cold, {name}", times["cold"][0], wanted)]
    if name == "ResNet-50":
        result.targets.append(Target(f"seconds warm, {name}", times["warm"][0], 5.0))
    publish(result)
