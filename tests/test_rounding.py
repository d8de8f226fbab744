"""Stochastic rounding: right in the mean, never more than one number away, the same every time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import emajit
from emajit import _rounding
from tests.counting import Counting

HALVES = (torch.bfloat16, torch.float16)
DRAWS = 2**17
CPU = torch.device("cpu")


def key(path: str = "['w']", step: int | Tensor = 0) -> Tensor:
    return _rounding.of_paths([path], [None], CPU).at(step).words[0]


def noise(path: str = "['w']", step: int | Tensor = 0) -> Tensor:
    """The noise of `DRAWS` elements, as numbers in [-1/2, 1/2)."""
    return _rounding._noise(torch.zeros(DRAWS), key(path, step), None).double() / 2**32


def rounded(x: Tensor, dtype: torch.dtype, step: int = 0) -> Tensor:
    return _rounding.stochastic(x, torch.zeros_like(x), dtype, key(step=step))


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit dtype, ascending."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = numbers[numbers.isfinite()].double()
    return torch.tensor(sorted(set(finite.tolist())), dtype=torch.float64)


def standard_errors(sample: Tensor) -> float:
    """How many standard errors the mean of `sample` is away from 0."""
    return abs(float(sample.mean() / sample.std() * math.sqrt(sample.numel())))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["one", "negative", "small", "between powers"])
def test_the_mean_of_many_draws_is_the_number(
    dtype: torch.dtype, fraction: float, kind: str
) -> None:
    info = torch.finfo(dtype)
    below, distance = {
        "one": (1.0, info.eps),
        "negative": (-3.0, 2 * info.eps),
        "small": (
            (3 * info.smallest_normal * info.eps, info.smallest_normal * info.eps)  # subnormal
            if dtype == torch.float16
            else (3 * info.smallest_normal, 2 * info.smallest_normal * info.eps)
        ),
        "between powers": (2 - info.eps, info.eps),
    }[kind]
    x = torch.tensor(below + fraction * distance, dtype=torch.float32).expand(DRAWS)
    found = rounded(x, dtype).double()
    assert set(found.tolist()) == {below, below + distance}
    assert standard_errors(found - x.double()) < 4


@pytest.mark.parametrize("dtype", HALVES)
def test_only_the_two_neighbours_are_ever_taken(dtype: torch.dtype) -> None:
    numbers = every_number(dtype)
    x = (torch.randn(DRAWS) * torch.exp2(torch.empty(DRAWS).uniform_(-150, 127))).float()
    if dtype == torch.float16:
        x = torch.randn(DRAWS) * torch.exp2(torch.empty(DRAWS).uniform_(-30, 13))
    place = torch.searchsorted(numbers, x.double()).clamp(1, len(numbers) - 1)
    found = rounded(x, dtype).double()
    nearest = x.to(dtype).double()
    inside = x.abs() < torch.finfo(dtype).max
    assert inside.sum() > 0.9 * DRAWS
    assert ((found == numbers[place]) | (found == numbers[place - 1]))[inside].all()
    assert torch.equal(found[~inside], nearest[~inside])
    assert (found * x >= 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_dtype_holds_is_never_moved(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    number = ~numbers.isnan()  # among them both infinities and the largest numbers
    for step in range(20):
        found = rounded(numbers.float(), dtype, step)
        assert torch.equal(found[number], numbers[number])
        assert found[~number].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_nan_stays_nan_and_no_finite_number_becomes_one(dtype: torch.dtype) -> None:
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)
    largest = torch.finfo(dtype).max
    half = 2.0 ** (math.floor(math.log2(largest)) - (8 if dtype == torch.bfloat16 else 11))
    edge = torch.tensor([largest + 0.9 * half, -largest - 0.9 * half])
    for step in range(50):
        found = rounded(nans.view(torch.float32), dtype, step)
        assert found.isnan().all()
        found = rounded(edge, dtype, step)
        assert found.tolist() == [largest, -largest]


def test_the_noise_is_uniform() -> None:
    for step in range(20):
        counts = torch.histc(noise(step=step), 256, -0.5, 0.5)
        expected = DRAWS / 256
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi2 - 255) < 4.5 * math.sqrt(2 * 255)


@pytest.mark.parametrize(
    "other",
    [
        lambda t: noise(step=t).roll(1),
        lambda t: noise(step=t).roll(2),
        lambda t: noise(step=t).roll(64),
        lambda t: noise(step=t).roll(768),
        lambda t: noise(step=t + 1),
        lambda t: noise(step=t + 2),
        lambda t: noise(step=t + 2**32),
        lambda t: noise(step=t + 1).roll(1),
        lambda t: noise("['v']", t),
        lambda t: noise(f"[{t}]['w']", t),
    ],
)
def test_no_two_are_correlated(other: Callable[[int], Tensor]) -> None:
    """Neighbours in a leaf, successive steps, other leaves, other averages."""
    steps = 30
    errors = torch.tensor([standard_errors(noise(step=t) * other(t)) for t in range(steps)])
    assert errors.max() < 4.5
    assert abs(errors.square().mean() - 1) < 4.5 * math.sqrt(2 / steps)


def test_ten_thousand_steps_follow_the_float32_average() -> None:
    """To nearest, the same average does not move at all."""
    start = torch.rand(4096) + 1
    nearest, noisy = {}, {}
    for dtype in HALVES:
        nearest[f"{dtype}, float32"] = start.to(dtype).float()
        nearest[f"{dtype}, nearest"] = start.to(dtype)
        noisy[f"{dtype}, stochastic"] = start.to(dtype)
    begin = {str(dtype): start.to(dtype).float() for dtype in HALVES}
    goal = start + 1
    for step in range(10_000):
        emajit.update_(nearest, dict.fromkeys(nearest, goal), step, decay=0.9999)
        emajit.update_(noisy, dict.fromkeys(noisy, goal), step, decay=0.9999, rounding="stochastic")
    moved = {
        name: float((s.float() - begin[name.split(",")[0]]).mean())
        for name, s in (nearest | noisy).items()
    }
    for dtype in HALVES:
        wide = moved[f"{dtype}, float32"]
        assert wide == pytest.approx(1 - 0.9999**10_000, rel=2e-3)
        assert moved[f"{dtype}, stochastic"] == pytest.approx(wide, rel=0.01)
    assert moved[f"{torch.bfloat16}, nearest"] == 0
    assert moved[f"{torch.float16}, nearest"] < 0.5 * moved[f"{torch.float16}, float32"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("start", [1.0, -1.5, 300.0])
@pytest.mark.parametrize("towards", [-1.0, 1.0])
def test_a_step_that_float32_loses_counts(dtype: torch.dtype, start: float, towards: float) -> None:
    """Also to the neighbour below a power of two, which is half as far away."""
    base = torch.tensor(start).to(dtype)
    other = torch.nextafter(base, towards * torch.tensor(math.inf, dtype=dtype)).double()
    gap = float(other - base.double())
    share = 0.4 * 2.0 ** -(16 if dtype == torch.bfloat16 else 13)
    step = torch.tensor(share * gap, dtype=torch.float32)
    assert base.float() + step == base
    draws = 2**21
    found = _rounding.stochastic(base.float().expand(draws), step, dtype, key())
    moved = int((found != base).sum())
    assert (found[found != base].double() == other).all()
    assert abs(moved - share * draws) < 4 * math.sqrt(share * draws)


def test_the_noise_has_31_bits_beside_the_sign() -> None:
    noise = torch.tensor([0, 1, 2, 255, 256, 2**31 - 1, -1, -(2**31)], dtype=torch.int32)
    numbers = (noise & 0x7FFFFFFF | 1).to(torch.float32) * 2.0**-31
    assert torch.equal(_rounding._uniform(noise, 0), numbers)


def test_float16_follows_the_float64_average_where_float32_stalls() -> None:
    start, goal = torch.ones(2**15), torch.full((2**15,), 1.01)
    shadows = {"float32": start.clone(), "float16": start.half()}
    for step in range(1000):
        emajit.update_(
            shadows, dict.fromkeys(shadows, goal), step, decay=0.999999, rounding="stochastic"
        )
    assert torch.equal(shadows["float32"], start)
    truth = (float(goal[0]) - 1) * (1 - 0.999999**1000) * 2**10  # in ulps of float16
    moved = float((shadows["float16"].double() - 1).mean()) * 2**10
    assert abs(moved - truth) < 3 * math.sqrt(truth * (1 - truth) / 2**15)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("dtype", HALVES)
def test_ten_thousand_steps_follow_the_float64_average(dtype: torch.dtype) -> None:
    """Of parameters an ulp, a half and a hundredth away, at decays up to 1 - 1e-6."""
    elements, steps = 20_000, 10_000
    shadow, params, ulps = {}, {}, {}
    for start in (1.0, 1e-3, 300.0):
        base = torch.tensor(start).to(dtype)
        ulp = float(torch.nextafter(base, torch.tensor(math.inf, dtype=dtype)) - base)
        for share in (1, 0.5, 0.01):
            name = f"{start}, {share}"
            shadow[name], ulps[name] = base.repeat(elements), ulp
            params[name] = torch.full((elements,), float(base) + share * ulp)
    errors = []
    for decay in (0.99, 0.999, 0.9999, 0.99999, 0.999999):
        average = emajit.init(shadow)
        for step in range(steps):
            emajit.update_(
                average, params, step, decay=decay, rounding="stochastic", backend="inductor"
            )
        for name, ulp in ulps.items():
            begin, goal = float(shadow[name][0]), float(params[name][0])
            truth = (goal - begin) / ulp * (1 - decay**steps)
            moved = float((average[name].double() - begin).mean()) / ulp
            deviation = math.sqrt(max(truth * (1 - truth), 1e-12) / elements)
            errors.append((moved - truth) / deviation)
    squares = torch.tensor(errors).square()
    assert squares.max() < 4.5**2  # where two elements are expected to move, seven may
    assert squares.mean() < 1.5


def tree(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (40, 30), "b": (30,), "scalar": ()}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def update(
    shadow: dict[str, Tensor],
    step: int | Tensor = 3,
    params: dict[str, Tensor] | None = None,
    backend: str = "eager",
) -> dict[str, Tensor]:
    params = params or {name: p + 1 for name, p in tree(torch.float32).items()}
    return emajit.update(shadow, params, step, decay=0.5, rounding="stochastic", backend=backend)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, leaf in expected.items():
        assert torch.equal(found[name], leaf), name


@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    expected = update(tree(dtype))
    assert torch.equal(torch.get_rng_state(), before)
    assert not all(torch.equal(expected[n], update(tree(dtype), step=4)[n]) for n in expected)
    assert_same_bits(update(tree(dtype)), expected)
    assert_same_bits(update(tree(dtype), step=torch.tensor(3, dtype=torch.int16)), expected)
    assert_same_bits(update(dict(reversed(tree(dtype).items()))), expected)
    transposed = {n: s.t().contiguous().t() if s.ndim > 1 else s for n, s in tree(dtype).items()}
    assert_same_bits(update(transposed), expected)


def in_both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A shadow in both dtypes, for one graph, and its parameters."""
    shadow = {f"{n} {dtype}": s for dtype in HALVES for n, s in tree(dtype).items()}
    params = {f"{n} {dtype}": p + 1 for dtype in HALVES for n, p in tree(torch.float32).items()}
    return shadow, params


@pytest.mark.inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gives_the_bits_of_eager(backend: str) -> None:
    shadow, params = in_both()
    for step in (3, torch.tensor(4)):
        found = update(shadow, step, params, backend=backend)
        assert_same_bits(found, update(shadow, step, params))

    traced = torch.compile(update, fullgraph=True, backend=backend)
    traced(shadow, torch.tensor(2), params)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(3, 6):
            found = traced(shadow, torch.tensor(step), params)
            assert_same_bits(found, update(shadow, step, params))


def test_transforms_of_torch_func() -> None:
    """One in another, one after the other: what a call has made for itself is of no use later."""
    shadow, params = {"w": torch.zeros(3, dtype=torch.bfloat16)}, torch.randn(3)

    def loss(p: Tensor) -> Tensor:
        new = emajit.update(shadow, {"w": p}, 0, decay=0.9, rounding="stochastic")["w"]
        return (p * new.float()).sum()

    for _ in range(2):
        torch.func.grad(lambda p: torch.func.grad(loss)(p).sum())(params)
        assert torch.equal(torch.func.functionalize(loss)(params), loss(params))
        assert torch.equal(torch.func.grad(loss)(params), torch.func.grad(loss)(params))


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.11 has no batching rule for Tensor.view(dtype)"
)
@pytest.mark.parametrize("dtype", HALVES)
def test_examples_of_a_vmap_share_the_noise(dtype: torch.dtype) -> None:
    batched = {n: torch.stack([s, s]) for n, s in tree(dtype).items()}
    params = {n: torch.stack([p + 1, p + 1]) for n, p in tree(torch.float32).items()}
    found = torch.func.vmap(lambda s, p: update(s, 3, p))(batched, params)
    expected = update(tree(dtype))
    assert_same_bits(found, {n: torch.stack([s, s]) for n, s in expected.items()})


@pytest.mark.parametrize(("leaves", "graphs"), [(12, 1), (20, 2), (40, 2), (100, 2)])
def test_leaves_of_all_sizes_in_several_graphs(
    leaves: int, graphs: int, counting: tuple[str, Counting]
) -> None:
    """Those that are alike share a graph; each has its own average and its own noise."""
    name, counter = counting
    sizes = [(8, 3, 5)[i % 3] for i in range(leaves)]
    shadow = {str(i): torch.randn(n).bfloat16() for i, n in enumerate(sizes)}
    params = {str(i): torch.randn(n) for i, n in enumerate(sizes)}
    expected = update(shadow, 3, params)
    assert_same_bits(update(shadow, 3, params, backend=name), expected)
    emajit.update_(shadow, params, 3, decay=0.5, rounding="stochastic", backend=name)
    assert_same_bits(shadow, expected)
    assert counter.graphs == 2 * graphs


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_call_on_fake_tensors_leaves_nothing_behind() -> None:
    def updated() -> Tensor:
        shadow = {"seen by nobody else": torch.zeros(3, dtype=torch.bfloat16)}
        params = {"seen by nobody else": torch.full((3,), 0.3)}
        emajit.update_(shadow, params, 0, decay=0.9, rounding="stochastic", backend="eager")
        return shadow["seen by nobody else"]

    with FakeTensorMode():
        updated()
    assert updated().gt(0).all()


def test_memory_under_another_name_has_the_noise_of_that_name() -> None:
    """A cached plan knows names, not addresses alone."""
    start, param = torch.full((1000,), 1.0).bfloat16(), torch.full((1000,), 1.004).bfloat16()
    held, options = start.clone(), {"decay": 0.5, "rounding": "stochastic"}
    found = []
    for name in ("a", "b", "a"):
        held.copy_(start)
        emajit.update_({name: held}, {name: param}, 0, **options)  # type: ignore[arg-type]
        new = emajit.update({name: start}, {name: param}, 0, **options)  # type: ignore[arg-type]
        assert torch.equal(held, new[name])
        found.append(new[name])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_in_place_and_tied() -> None:
    expected, shadow = update(tree(torch.bfloat16)), tree(torch.bfloat16)
    shadow |= {"tied": shadow["w"]}
    params = {n: p + 1 for n, p in tree(torch.float32).items()}
    params |= {"tied": params["w"]}
    emajit.update_(shadow, params, 3, decay=0.5, rounding="stochastic")
    assert shadow["tied"] is shadow["w"]
    del shadow["tied"]
    assert_same_bits(shadow, expected)


def test_averages_of_one_list_have_noise_of_their_own() -> None:
    shadows = [{"w": torch.ones(1000, dtype=torch.bfloat16)} for _ in range(2)]
    params = {"w": torch.full((1000,), 1.0 + 2**-8)}
    emajit.update_many_(shadows, params, 0, decays=[0.5, 0.5], rounding="stochastic")
    first, second = (shadow["w"] > 1 for shadow in shadows)
    assert 150 < first.sum() < 350
    assert 150 < second.sum() < 350
    assert 30 < (first & second).sum() < 100


def test_wider_leaves_round_to_nearest() -> None:
    expected = emajit.update(tree(torch.float32), tree(torch.float64), 0, decay=0.3)
    found = emajit.update(
        tree(torch.float32), tree(torch.float64), 0, decay=0.3, rounding="stochastic"
    )
    assert_same_bits(found, expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_parts_are_rounded_apart() -> None:
    shadow = {"w": torch.ones(4096, dtype=torch.complex32)}
    params = {"w": torch.full((4096,), complex(1 + 2**-11, 2**-11))}
    new = emajit.update(shadow, params, 0, decay=0.5, rounding="stochastic")["w"]
    parts = torch.view_as_real(new).double()
    assert set(parts[:, 0].tolist()) == {1.0, 1.0 + 2**-10}
    assert float(parts[:, 1].mean()) == pytest.approx(2**-12, rel=1e-3)


def test_eight_bits_are_refused_by_path() -> None:
    shadow = {"w": torch.ones(3).to(torch.float8_e4m3fn)}
    message = r"shadow\['w'\]: expected bfloat16, float16 or wider .* found torch.float8_e4m3fn"
    with pytest.raises(ValueError, match=message):
        emajit.update(shadow, {"w": torch.ones(3)}, 0, decay=0.5, rounding="stochastic")
