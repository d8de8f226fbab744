"""Devices without float64, such as MPS: meta stands in for one, and the CPU for its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import emajit
from emajit import LitEma, _compile, _controls, _devices, posthoc, schedules
from emajit.integrations import _average

SCHEDULES = [
    schedules.constant(0.999999),
    schedules.warmup(0.999999),
    schedules.inverse_gamma(max_decay=0.999999),
    schedules.power_function(sigma_rel=0.1),
    schedules.half_life(5e8, batch_size=512),
    schedules.debiased(0.999999),
    schedules.uniform(),
    schedules.cosine(0.996, 1.0, steps=200_000),
    schedules.linear(0.99, 0.999999, steps=200_000),
    schedules.delay(schedules.uniform(), start=5),
    schedules.half_life_fraction(),
    schedules.exponential_ramp(0.999999),
    schedules.momentum_annealing(1e-6),
    schedules.inverse_power(0.9, min_alpha=1e-6),
    schedules.scaled(schedules.constant(0.999999), 2.5),
    schedules.every(schedules.warmup(0.999999), 3),
    schedules.every(schedules.uniform(), 2),
    schedules.delay(schedules.every(schedules.constant(0.9999), 2), start=3),
    lambda step: step / (step + 1),  # nobody has told its alpha
]


def named(schedule: Any) -> str:
    """A name that is the same in each process that runs tests."""
    return getattr(schedule, "__name__", str(schedule))


class NoFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses float64 on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.is_meta and leaf.dtype == torch.float64:
                raise TypeError(f"{func}: the device has no float64")
        return found


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_devices, "WITHOUT_FLOAT64", {"meta"})
    with NoFloat64():  # type: ignore[no-untyped-call]
        yield "meta"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_devices, "WITHOUT_FLOAT64", {"cpu"})


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("schedule", SCHEDULES[:-1], ids=named)
def test_alpha_of_a_step_tensor_is_right_to_float32(schedule: Any) -> None:
    """Where 1 minus the decay in float32 is off by 3 % at 0.999999."""
    for step in (0, 1, 2, 7, 100, 12_345, 199_990, 1_000_000):
        found = emajit.functional._alpha(schedule, torch.tensor(step))
        assert not isinstance(found, Tensor) or found.dtype == torch.float32
        expected = 1.0 - float(schedule(step))
        assert float(found) == pytest.approx(expected, rel=2e-6, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES[:-1], ids=named)
def test_alpha_is_one_minus_the_decay(schedule: Any) -> None:
    for step in (0, 1, 2, 7, 100, 12_345, 199_990, 1_000_000):
        for at in (step, torch.tensor(step)):
            expected = 1.0 - float(schedule(step))
            assert float(schedule.alpha(at)) == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "decay", [0.9999, 0.999999, 0.99991234, 2 ** (-1 / 1234567), 0.5, 0.0, 1.0]
)
@pytest.mark.parametrize("updates", [-1, 0, 50, 10**7])
def test_the_decay_of_a_lit_ema_on_its_device(decay: float, updates: int) -> None:
    for written in (decay, 0.1):  # as constructed, or loaded
        controls = _controls.Controls(written, first_update=0, must_count=False, every=1)
        controls.decay.fill_(decay)
        controls.num_updates.fill_(updates)
        exact = decay if written == decay else _controls.decimal(_controls.float32(decay))
        warm = exact if updates < 0 else schedules.warmup(exact)(updates)
        known: Any = controls._decay_on_device()
        found = emajit.functional._alpha(known, controls.num_updates)
        assert float(found) == pytest.approx(1 - float(warm), rel=1e-6, abs=1e-9)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("schedule", [*SCHEDULES, torch.tensor(0.9999)], ids=named)
def test_an_update_at_a_step_tensor(schedule: Any) -> None:
    s, p = torch.zeros(3), torch.ones(3)
    found = emajit.update(s, p, torch.tensor(20), decay=schedule)
    decay = float(schedule(20) if callable(schedule) else schedule)
    torch.testing.assert_close(found, torch.full((3,), 1 - decay), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("schedule", [*SCHEDULES, 0.9], ids=named)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_entry_of_the_core(meta: str, schedule: Any, rounding: Any) -> None:
    params = {"w": torch.ones(3, device=meta), "h": torch.ones(2, device=meta).bfloat16()}
    shadow = emajit.init(params)
    steps: tuple[Any, ...] = 20, torch.tensor(20), torch.tensor(20, device=meta)
    decay_tensor = torch.tensor(0.9, device=meta)
    for step in steps:
        for decay in (schedule, decay_tensor):
            options: Any = {"rounding": rounding, "nonfinite": "skip"}
            emajit.update(shadow, params, step, decay=decay, **options)
            emajit.update_(shadow, params, step, decay=decay, **options)
            emajit.update_many([shadow, emajit.init(params)], params, step, decays=[decay, 0.5])
            emajit.update_many_([shadow], params, step, decays=[decay], **options)


def test_a_lit_ema_that_moves_with_its_host(meta: str) -> None:
    model = nn.Linear(2, 2)
    model.ema = LitEma(nn.Linear(2, 2), decay=0.9999)
    model.to(meta)
    ema: Any = model.ema
    host = nn.Linear(2, 2, device=meta)
    ema(host)
    ema.load_state_dict(ema.state_dict())
    ema.copy_to(host)
    with ema.ema_scope(host):
        host(torch.ones(1, 2, device=meta))
    for options in ({"decay": schedules.cosine(0.9, 1.0, 10)}, {"rounding": "stochastic"}):
        ema = LitEma(host, **options)
        ema(host)
        ema.reset_num_updates()
        ema.state_dict()


def test_alphas_of_a_graph(meta: str) -> None:
    assert _compile.scalars([0.9999], torch.device(meta))[0].dtype == torch.float32


def test_profiles(meta: str) -> None:
    assert posthoc.profile(torch.ones(3, device=meta), 10, 2.0).dtype == torch.float32


@pytest.mark.usefixtures("narrow")
def test_fingerprints_of_a_cast_to_float64_are_those_of_the_host() -> None:
    weights = [torch.randn(3, 2)]
    found = _average.fingerprint(weights, torch.float64)
    assert found == _average.fingerprint([w.double() for w in weights])
