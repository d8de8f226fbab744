"""Every schedule against an independent formula, in Python numbers and in tensors."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import emajit
from emajit import schedules
from emajit.schedules import Schedule

# Name, schedule, and its value at step t, written down independently.
CASES: list[tuple[str, Schedule, Callable[[int], float]]] = [
    ("constant", schedules.constant(0.99), lambda _: 0.99),
    ("warmup", schedules.warmup(0.999), lambda t: min(0.999, (t + 2) / (t + 11))),
    ("inverse_gamma", schedules.inverse_gamma(), lambda t: min(0.9999, 1 - 1 / (1 + t) ** (2 / 3))),
    (
        "inverse_gamma clamped",
        schedules.inverse_gamma(2.0, 0.75, 0.5, 0.9),
        lambda t: sorted((0.5, 1 - (1 + t / 2) ** -0.75, 0.9))[1],
    ),
    ("power_function", schedules.power_function(gamma=6.94), lambda t: (t / (t + 1)) ** 7.94),
    (
        "half_life",
        schedules.half_life(500, 32, 0.1),
        lambda t: math.exp(-math.log(2) * 32 / min(500, 3.2 * t)) if t else 0.0,
    ),
    ("half_life without ramp", schedules.half_life(500, 32, None), lambda _: 0.5 ** (32 / 500)),
    ("debiased", schedules.debiased(0.9), lambda t: 0.9 * (1 - 0.9**t) / (1 - 0.9 ** (t + 1))),
    ("debiased 0", schedules.debiased(0.0), lambda _: 0.0),
    ("debiased 1", schedules.debiased(1.0), lambda t: 1 - 1 / (t + 1)),
    ("uniform", schedules.uniform(), lambda t: 1 - 1 / (t + 1)),
    (
        "cosine",
        schedules.cosine(0.9, 1.0, 40),
        lambda t: 1.0 - 0.1 * math.cos(math.pi * min(t, 40) / 80) ** 2,
    ),
    ("linear", schedules.linear(0.9, 0.99, 40), lambda t: 0.9 + 0.09 * min(t / 40, 1)),
    (
        "delay",
        schedules.delay(schedules.uniform(), 5),
        lambda t: 0.0 if t < 5 else (t - 5) / (t - 4),
    ),
    (
        "every",
        schedules.every(schedules.power_function(gamma=3.0), 10),
        lambda t: (1 - 1 / (t + 1)) ** 4,
    ),
    ("every constant", schedules.every(schedules.constant(0.99), 7), lambda _: 0.99**7),
    (
        "half_life_fraction",
        schedules.half_life_fraction(0.05),
        lambda t: math.exp(-20 * math.log(2) / (t + 1)),
    ),
    (
        "exponential_ramp",
        schedules.exponential_ramp(0.9998, 50),
        lambda t: 0.9998 - 0.9998 * math.exp(-(t + 1) / 50),
    ),
    (
        "momentum_annealing",
        schedules.momentum_annealing(0.02, 100),
        lambda t: 1 - max(0.02, 100 / (100 + t)),
    ),
    (
        "inverse_power",
        schedules.inverse_power(0.5, 10, 2.0, 0.05),
        lambda t: 1 - max(0.05, 1 / math.sqrt(10 + 2 * t)),
    ),
    ("scaled constant", schedules.scaled(schedules.constant(0.99), 2.5), lambda _: 0.99**2.5),
    (
        "scaled",
        schedules.scaled(schedules.power_function(gamma=3.0), 0.3),
        lambda t: (0.3 * t / (0.3 * t + 1)) ** 1.2,
    ),
    (
        "scaled delay",
        schedules.scaled(schedules.delay(schedules.uniform(), 5), 1.5),
        lambda t: 0.0 if 1.5 * t < 5 else ((1.5 * t - 5) / (1.5 * t - 4)) ** 1.5,
    ),
    (
        "scaled twice",
        schedules.scaled(schedules.scaled(schedules.uniform(), 2), 1.5),
        lambda t: (3 * t / (3 * t + 1)) ** 3,
    ),
    (
        "scaled every",
        schedules.scaled(schedules.every(schedules.uniform(), 4), 1.5),
        lambda t: (6 * t / (6 * t + 4)) ** 1.5,
    ),
]


@pytest.mark.parametrize(("schedule", "formula"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
class TestEachSchedule:
    STEPS = (0, 1, 2, 3, 4, 5, 6, 39, 40, 41, 1000, 10**6)

    def test_equals_its_formula(self, schedule: Schedule, formula: Callable[[int], float]) -> None:
        for step in self.STEPS:
            found = schedule(step)
            assert isinstance(found, float)
            assert found == pytest.approx(formula(step), rel=1e-12, abs=1e-12)

    def test_tensor_steps_give_the_same(
        self, schedule: Schedule, formula: Callable[[int], float]
    ) -> None:
        for step in self.STEPS:
            found = schedule(torch.tensor(step, dtype=torch.int32))
            assert_close(float(found), formula(step), rtol=1e-12, atol=1e-12)
            assert not isinstance(found, torch.Tensor) or found.dtype == torch.float64

    def test_traces_into_one_graph(
        self, schedule: Schedule, formula: Callable[[int], float]
    ) -> None:
        torch._dynamo.reset()  # all schedules are called by one method, of which it keeps 8 graphs
        compiled = torch.compile(schedule, fullgraph=True, backend="aot_eager")
        compiled(torch.tensor(0))
        with torch.compiler.set_stance("fail_on_recompile"):
            for step in self.STEPS:
                assert_close(float(compiled(torch.tensor(step))), formula(step))

    def test_is_a_share(self, schedule: Schedule, formula: Callable[[int], float]) -> None:
        assert all(0 <= float(schedule(step)) <= 1 >= formula(step) for step in range(200))


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # LitEma and TensorFlow: n = t + 1 begins at 2/11, and 0.9999 is reached at n = 89,990.
        (schedules.warmup(0.9999), {0: 2 / 11, 89_988: 0.9999 - 1e-9, 89_989: 0.9999}),
        # k-diffusion: a power of 2/3 "reaches decay factor 0.999 at 31.6K steps, 0.9999 at 1M
        # steps", one of 3/4 "0.999 at 10K steps, 0.9999 at 215.4k steps".
        (schedules.inverse_gamma(power=2 / 3, max_decay=1.0), {31_600: 0.999, 10**6: 0.9999}),
        (schedules.inverse_gamma(power=3 / 4, max_decay=1.0), {10_000: 0.999, 215_400: 0.9999}),
        # arXiv 2312.02696, section 3.1: (1 - 1/n)^(gamma + 1).
        (schedules.power_function(gamma=6.94), {0: 0.0, 9: 0.9**7.94, 99: 0.99**7.94}),
        # arXiv 2206.00364, CIFAR-10: 0.5M images at batch 512, after a ramp-up of 5%.
        (schedules.half_life(500_000, 512), {10**6: 2 ** (-512 / 500_000), 100: 2 ** (-1 / 5)}),
        # arXiv 2006.07733, section 3.2: from 0.996 to 1, so half way at 0.998.
        (schedules.cosine(0.996, 1.0, 1000), {0: 0.996, 500: 0.998, 1000: 1.0}),
        # arXiv 2202.03555, speech: from 0.999 to 0.9999 in 30,000 updates.
        (schedules.linear(0.999, 0.9999, 30_000), {0: 0.999, 15_000: 0.99945, 30_000: 0.9999}),
        # arXiv 1803.05407, algorithm 1: w <- (w n + w_new) / (n + 1).
        (schedules.uniform(), {0: 0.0, 1: 1 / 2, 9: 9 / 10}),
        # arXiv 1412.6980, section 3: the second value weighs 1/1.9 of the average at 0.9.
        (schedules.debiased(0.9), {0: 0.0, 1: 1 - 1 / 1.9}),
        # torchtitan: 0.05 "matches the common decay = 2 ** (-20 / t) rule of thumb".
        (schedules.half_life_fraction(), {0: 2**-20, 19: 1 / 2, 39: 2**-0.5}),
        # ultralytics: decay * (1 - exp(-updates / tau)), counted before the update.
        (schedules.exponential_ramp(), {0: 0.9999 * 4.9987502e-4, 1999: 0.9999 * (1 - 1 / math.e)}),
        # mmdetection: a momentum of (1 - 0.0002) exp(-(1 + steps) / 2000) + 0.0002.
        (schedules.exponential_ramp(0.9998), {1999: 1 - (0.9998 / math.e + 0.0002)}),
        # mmengine: max(momentum, gamma / (gamma + steps)).
        (schedules.momentum_annealing(), {0: 0.0, 100: 1 / 2, 499_900: 0.9998, 10**6: 0.9998}),
        # TRL: a weight of (10 + step) ** -0.5 for the parameters.
        (schedules.inverse_power(), {390: 1 - 1 / 20, 9990: 0.99}),
        # arXiv 2307.13813, definition 1.2: a momentum of rho ** kappa.
        (schedules.scaled(schedules.constant(0.996), 8), {0: 0.996**8, 10**6: 0.996**8}),
    ],
)
def test_published_values(schedule: Schedule, values: dict[int, float]) -> None:
    for step, value in values.items():
        assert schedule(step) == pytest.approx(value, rel=1e-5, abs=1e-8)


def test_published_gammas() -> None:
    """arXiv 2312.02696: sigma_rel 0.05 is gamma 16.97, and 0.10 is 6.94; 0.15 is 3.56."""
    gammas = [schedules.sigma_rel_to_gamma(s) for s in (0.05, 0.10, 0.15, 12**-0.5)]
    assert [round(g, 2) for g in gammas] == [16.97, 6.94, 3.56, 0.0]


def test_warmup_ends_where_it_is_said_to() -> None:
    reached = [step for step in (89_988, 89_989) if schedules.warmup(0.9999)(step) == 0.9999]
    assert reached == [89_989]


def test_half_of_an_average_is_younger_than_its_half_life() -> None:
    schedule = schedules.half_life(6400, 64, None)
    assert math.prod(float(schedule(step)) for step in range(100)) == pytest.approx(0.5)


@given(st.floats(0.0, 200.0))
def test_sigma_rel_is_inverted(gamma: float) -> None:
    sigma = math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3)
    assert schedules.sigma_rel_to_gamma(sigma) == pytest.approx(gamma, rel=1e-9, abs=1e-6)


def test_sigma_rel_is_the_width_of_the_profile() -> None:
    assert width(schedules.power_function(sigma_rel=0.1), 2000) == pytest.approx(0.1, rel=1e-3)


def width(schedule: Schedule, steps: int) -> float:
    """The standard deviation of the profile of an average, relative to the run."""
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        beta = schedule(step)
        weights = weights * beta
        weights[step] = 1 - beta
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    mean = (weights * t).sum()
    return float((weights * (t - mean) ** 2).sum().sqrt())


def test_a_half_life_fraction_is_a_power_function_average() -> None:
    """Of the exponent log(2) / fraction - 1; a relative length of 0.063 for torchtitan's 0.05."""
    for fraction in (0.05, 0.2):
        sigma = schedules.gamma_to_sigma_rel(math.log(2) / fraction - 1)
        assert width(schedules.half_life_fraction(fraction), 2000) == pytest.approx(sigma, rel=5e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(0.9995),
        schedules.warmup(0.9999),
        schedules.cosine(0.99, 1.0, 8000),
        schedules.power_function(sigma_rel=0.1),
    ],
    ids=repr,
)
def test_a_scaled_average_is_as_long_in_samples(schedule: Schedule) -> None:
    """A quarter of the updates, each of four times as many samples."""
    dense = width(schedule, 4000)
    assert width(schedules.scaled(schedule, 4), 1000) == pytest.approx(dense, rel=0.02)


def test_no_digit_is_lost_near_decay_1() -> None:
    small = schedules.momentum_annealing(1e-12, 1)
    for kappa in (0.5, 3):
        found: Any = schedules.scaled(small, kappa)
        assert found.alpha(10**14) == pytest.approx(kappa * 1e-12, rel=1e-11)
        assert float(found.alpha(torch.tensor(10**14))) == pytest.approx(kappa * 1e-12, rel=1e-11)
    slow: Any = schedules.half_life_fraction(1.0)
    assert slow.alpha(10**15) == pytest.approx(math.log(2) * 1e-15, rel=1e-11)
    ramp: Any = schedules.exponential_ramp(1.0, tau=1.0)
    assert ramp.alpha(49) == pytest.approx(math.exp(-50), rel=1e-11)


def average(values: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    shadow = torch.full_like(values[0], 123.0)
    for step, value in enumerate(values):
        shadow = emajit.update(shadow, value, step, decay=schedule)
    return shadow


def test_uniform_is_the_mean() -> None:
    values = torch.randn(100, 3, dtype=torch.float64)
    assert_close(average(values, schedules.uniform()), values.mean(0))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999, 1 - 1e-9])
def test_debiased_is_adams_average(decay: float) -> None:
    values = torch.randn(100, 3, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    for value in values:
        zero = decay * zero + (1 - decay) * value
    expected = zero / -math.expm1(100 * math.log(decay))
    assert_close(average(values, schedules.debiased(decay)), expected, rtol=1e-6, atol=1e-9)


def test_every_equals_the_dense_average_of_held_parameters() -> None:
    held = torch.randn(5, 3, dtype=torch.float64)
    dense = average(held.repeat_interleave(4, 0), schedules.uniform())
    sparse = average(held, schedules.every(schedules.uniform(), 4))
    assert_close(sparse, dense)


def test_small_integer_steps_do_not_overflow() -> None:
    sparse = schedules.every(schedules.warmup(0.99999), 1000)
    assert_close(float(sparse(torch.tensor(3_000_000, dtype=torch.int32))), sparse(3_000_000))
    late = schedules.delay(schedules.warmup(0.99), 300)
    assert float(late(torch.tensor(100, dtype=torch.uint8))) == 0.0
    held = schedules.every(schedules.warmup(0.9), 200)
    assert float(held(torch.tensor(100, dtype=torch.int8))) == held(100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.every(0.9, 2), "schedule: expected a schedule, step -> decay, found"),  # type: ignore[arg-type]
        (lambda: schedules.delay(0.9, 2), "schedule: expected a schedule, step -> decay, found"),  # type: ignore[arg-type]
        (lambda: schedules.every(schedules.uniform(), 2.5), "interval: expected an integer"),  # type: ignore[arg-type]
        (lambda: schedules.constant(1.5), r"decay: expected a number in \[0, 1\], found 1.5"),
        (lambda: schedules.warmup(math.nan), r"decay: expected a number in \[0, 1\], found nan"),
        (lambda: schedules.debiased(-0.1), "decay: expected a number"),
        (lambda: schedules.inverse_gamma(gamma=0), "gamma: expected a number > 0, found 0"),
        (lambda: schedules.inverse_gamma(power=-1), "power: expected a number > 0, found -1"),
        (lambda: schedules.inverse_gamma(min_decay=0.9, max_decay=0.8), "min_decay <= max_decay"),
        (schedules.power_function, "expected one of sigma_rel and gamma, found None"),
        (lambda: schedules.power_function(0.1, 3.0), "expected one of sigma_rel and gamma"),
        (lambda: schedules.power_function(0.3), "sigma_rel: expected 0 < sigma_rel"),
        (lambda: schedules.power_function(gamma=-1.0), "gamma: expected a number >= 0, found -1"),
        (lambda: schedules.half_life(0, 1), "images: expected a number > 0, found 0"),
        (lambda: schedules.half_life(1, 0), "batch_size: expected a number > 0, found 0"),
        (lambda: schedules.half_life(1, 1, 0), "rampup_ratio: expected a number > 0 or None"),
        (
            lambda: schedules.half_life(1, 1, math.inf),
            "rampup_ratio: expected a number > 0 or None",
        ),
        (lambda: schedules.cosine(0, 2, 1), r"end: expected a number in \[0, 1\], found 2"),
        (lambda: schedules.linear(-1, 1, 1), r"start: expected a number in \[0, 1\], found -1"),
        (lambda: schedules.linear(0, 1, "9"), "steps: expected an integer >= 1, found '9'"),  # type: ignore[arg-type]
        (lambda: schedules.linear(0, 1, 0), "steps: expected an integer >= 1, found 0"),
        (lambda: schedules.delay(schedules.uniform(), -1), "start: expected an integer >= 0"),
        (lambda: schedules.every(schedules.uniform(), 0), "interval: expected an integer >= 1"),
        (lambda: schedules.half_life_fraction(0), "fraction: expected a number > 0, found 0"),
        (lambda: schedules.exponential_ramp(2), r"decay: expected a number in \[0, 1\], found 2"),
        (lambda: schedules.exponential_ramp(1, 0), "tau: expected a number > 0, found 0"),
        (lambda: schedules.momentum_annealing(-1), r"momentum: expected a number in \[0, 1\]"),
        (lambda: schedules.momentum_annealing(0, 0), "gamma: expected a number > 0, found 0"),
        (lambda: schedules.inverse_power(-1), "power: expected a number >= 0, found -1"),
        (lambda: schedules.inverse_power(lag=0.5), "lag: expected a number >= 1, found 0.5"),
        (lambda: schedules.inverse_power(multiplier=-1), "multiplier: expected a number >= 0"),
        (lambda: schedules.inverse_power(min_alpha=2), r"min_alpha: expected a number in \[0, 1\]"),
        (lambda: schedules.scaled(schedules.uniform(), 0), "kappa: expected a number > 0, found 0"),
        (
            lambda: schedules.scaled(schedules.uniform(), math.inf),
            "kappa: expected a number > 0, found inf",
        ),
        (lambda: schedules.scaled(0.9, 2), "schedule: expected a schedule, step -> decay, found"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.warmup("0.9"), r"for a schedule, found warmup\('0.9'\)"),  # type: ignore[arg-type]
        (lambda: schedules.power_function("x"), r"expected numbers .*power_function\('x'\)"),  # type: ignore[arg-type]
        (lambda: schedules.linear(0, [1], 3), r"found linear\(0, \[1\], 3\)"),  # type: ignore[arg-type]
        (schedules.warmup, "missing a required argument: 'decay'"),
        (lambda: schedules.delay(schedules.warmup, 3), r"^schedule: .* call it: warmup\(\.\.\.\)"),  # type: ignore[arg-type]
        (lambda: schedules.every(torch.nn.Linear(1, 1), 3), "^schedule: .*found a module, Linear"),
    ],
)
def test_arguments_of_another_type(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("step", [0, 5, torch.tensor(5)])
@pytest.mark.parametrize("name", ["warmup", "uniform", "cosine", "power_function"])
def test_a_forgotten_call(name: str, step: int | torch.Tensor) -> None:
    decay: Any = getattr(schedules, name)
    message = rf"decay: expected a schedule, found {name} itself; call it: {name}\(\.\.\.\)"
    with pytest.raises(TypeError, match=message):
        emajit.update_({"w": torch.zeros(1)}, {"w": torch.ones(1)}, step, decay=decay)
    with pytest.raises(TypeError, match=message):
        emajit.LitEma(torch.nn.Linear(1, 1), decay=decay)


def test_a_module_is_no_schedule() -> None:
    decay: Any = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"decay: .*found a module, Linear"):
        emajit.LitEma(decay, decay=decay)
    with pytest.raises(TypeError, match=r"decay: .*found a module, Linear"):
        emajit.update_({"w": torch.zeros(1)}, {"w": torch.ones(1)}, 0, decay=decay)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(0.9),
        schedules.warmup(decay=0.999),
        schedules.inverse_gamma(1.0, power=0.75),
        schedules.power_function(0.1),
        schedules.half_life(1000, 32),
        schedules.debiased(0.9),
        schedules.uniform(),
        schedules.cosine(0.9, 1.0, 10),
        schedules.linear(0.9, 1.0, 10),
        schedules.delay(schedules.every(schedules.warmup(0.9), 2), start=3),
        schedules.half_life_fraction(0.1),
        schedules.exponential_ramp(tau=100),
        schedules.momentum_annealing(0.001, gamma=10),
        schedules.inverse_power(0.5, lag=20),
        schedules.scaled(schedules.warmup(0.9), kappa=2.5),
    ],
    ids=repr,
)
def test_pickled_printed_and_compared_as_its_call(schedule: schedules.Schedule) -> None:
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule == eval(repr(schedule), vars(schedules))  # noqa: S307
    assert hash(again) == hash(schedule)
    assert [again(step) for step in range(9)] == [schedule(step) for step in range(9)]
    assert schedule != schedules.constant(0.123)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.half_life_fraction(0.1),
        schedules.exponential_ramp(0.99, 10),
        schedules.momentum_annealing(0.01, 10),
        schedules.inverse_power(),
        schedules.scaled(schedules.warmup(0.9), 2.5),
    ],
    ids=repr,
)
def test_a_litema_goes_on_with_it_after_a_restart(schedule: Schedule) -> None:
    model = torch.nn.Linear(2, 1)
    ema = emajit.LitEma(model, decay=schedule)
    expected = model.weight.detach().double()
    for step in range(6):
        if step == 3:
            ema = pickle.loads(pickle.dumps(ema))
        with torch.no_grad():
            model.weight += 1
        ema(model)
        beta = float(schedule(step))
        expected = beta * expected + (1 - beta) * model.weight.detach().double()
    assert_close(ema.named_averages()["weight"].double(), expected, rtol=1e-6, atol=0)
    assert repr(schedule) in repr(ema)


def test_one_call_however_it_is_written() -> None:
    pairs = [
        (schedules.constant(1), schedules.constant(decay=1.0)),
        (schedules.inverse_gamma(gamma=2.0), schedules.inverse_gamma(2.0)),
        (
            schedules.every(schedules.uniform(), 2),
            schedules.every(interval=2, schedule=schedules.uniform()),
        ),
    ]
    for a, b in pairs:
        assert a == b
        assert hash(a) == hash(b)


def test_integers_of_numpy() -> None:
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    assert schedules.cosine(0.0, 1.0, np.int64(2))(1) == 0.5
    assert schedules.every(schedules.constant(0.5), np.int32(2))(0) == 0.25
    warm = schedules.warmup(0.9999)
    assert schedules.every(warm, np.int16(10))(5000) == schedules.every(warm, 10)(5000)
    assert schedules.every(warm, 10)(np.int16(5000)) == schedules.every(warm, 10)(5000)
    assert schedules.delay(warm, np.uint8(10))(300) == schedules.delay(warm, 10)(300)
    found, expected = (
        emajit.update(torch.zeros(1), torch.ones(1), step, decay=schedules.every(warm, 10))
        for step in (np.int16(5000), 5000)
    )
    assert found == expected
