"""What holds for every tree, dtype, layout, schedule and step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import emajit
from tests import reference, strategies

# A difference of at most 2 max(|s|, |p|), times a weight of at most 1/2, in which three numbers
# were rounded by half a unit each, and the sum, rounded once more: 2 units at the worst.
# Found, over 4000 pairs of leaves: 0.75, and 1.1 for complex numbers.
ULPS = 2

ROUNDINGS = st.sampled_from(("nearest", "stochastic"))
SCHEDULES = st.one_of(
    strategies.betas,
    st.sampled_from(
        (
            emajit.schedules.warmup(0.999),
            emajit.schedules.inverse_gamma(),
            emajit.schedules.power_function(0.1),
            emajit.schedules.debiased(0.99),
            emajit.schedules.uniform(),
            emajit.schedules.cosine(0.9, 1.0, 100),
            emajit.schedules.delay(emajit.schedules.linear(0.5, 0.9, 10), 7),
            emajit.schedules.every(emajit.schedules.half_life(1000, 32), 5),
        )
    ),
)
STEPS = st.one_of(st.integers(0, 20), st.integers(0, 2**40))


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]


def clone(tree: Any) -> Any:
    """A copy that keeps strides and ties; `Tensor.clone` makes some layouts dense."""
    copies = {id(t): torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in leaves(tree)}
    for t in leaves(tree):
        # An expanded tensor is written whole: through the one element that there is.
        target = copies[id(t)]
        firsts = tuple(slice(0, 1) if step == 0 else slice(None) for step in t.stride())
        target[firsts].copy_(t[firsts])
    return pytree.tree_map(lambda t: None if t is None else copies[id(t)], tree)


def bits(tree: Any) -> list[bytes]:
    return [_bits(t).numpy().tobytes() for t in leaves(tree) if t.numel()]


def _bits(tensor: Tensor) -> Tensor:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return dense.view(-1).view(torch.uint8)


def is_averaged(param: Tensor) -> bool:
    return param.is_floating_point() or param.is_complex()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@given(trees=strategies.tree_pairs(), schedule=SCHEDULES, step=STEPS)
def test_is_the_equation(backend: str, trees: tuple[Any, Any], schedule: Any, step: int) -> None:
    shadow, params = trees
    found = emajit.update(shadow, params, step, decay=schedule, backend=backend)
    beta = schedule(step) if callable(schedule) else schedule
    reference.assert_within(ULPS, found, shadow, params, beta)


@pytest.mark.parametrize("backend", ["auto", "eager", "aot_eager"])
@given(trees=strategies.tree_pairs(), schedule=SCHEDULES, step=STEPS, rounding=ROUNDINGS)
def test_in_place_is_pure_bit_for_bit_and_nothing_else_changes(
    backend: str, trees: tuple[Any, Any], schedule: Any, step: int, rounding: Any
) -> None:
    options: Any = {"decay": schedule, "backend": backend, "rounding": rounding}
    shadow, params = trees
    before = bits(shadow), bits(params)
    pure = emajit.update(shadow, params, step, **options)
    assert before == (bits(shadow), bits(params))
    written = clone(shadow)
    objects, strides = leaves(written), [t.stride() for t in leaves(written)]
    assert emajit.update_(written, params, step, **options) is written
    assert bits(written) == bits(pure)
    assert before == (bits(shadow), bits(params))
    assert all(a is b for a, b in zip(objects, leaves(written), strict=True))
    assert strides == [t.stride() for t in leaves(written)]


@given(trees=strategies.tree_pairs(), schedule=SCHEDULES, step=STEPS)
def test_a_new_tree_is_like_the_shadow(trees: tuple[Any, Any], schedule: Any, step: int) -> None:
    shadow, params = trees
    new = emajit.update(shadow, params, step, decay=schedule)
    assert pytree.tree_structure(new) == pytree.tree_structure(shadow)
    for tree in (new, emajit.init(shadow)):
        twins: dict[int, Tensor] = {}
        for s, n in zip(leaves(shadow), leaves(tree), strict=True):
            assert (s.dtype, s.shape, s.device) == (n.dtype, n.shape, n.device)
            assert n.stride() == torch.empty_like(s).stride()
            assert twins.setdefault(id(s), n) is n  # tied stays tied
            assert not n.requires_grad
        assert len({id(n) for n in leaves(tree)}) == len(twins)
        owned = {n.data_ptr() for n in leaves(tree)} - {0}
        assert not owned & {t.data_ptr() for t in leaves((shadow, params))}


@given(trees=strategies.tree_pairs(), schedule=SCHEDULES, step=st.integers(0, 2**31 - 1))
def test_tensors_for_step_and_decay_are_as_good_as_numbers(
    trees: tuple[Any, Any], schedule: Any, step: int
) -> None:
    shadow, params = trees
    found = emajit.update(shadow, params, torch.tensor(step), decay=schedule)
    beta = schedule(step) if callable(schedule) else schedule
    reference.assert_within(ULPS, found, shadow, params, beta)
    wide = emajit.update(shadow, params, step, decay=torch.tensor(beta, dtype=torch.float64))
    assert bits(wide) == bits(emajit.update(shadow, params, step, decay=beta))


@given(trees=strategies.tree_pairs())
def test_beta_0_copies_and_beta_1_keeps(trees: tuple[Any, Any]) -> None:
    shadow, params = trees
    for backend in ("eager", "aot_eager"):
        copied = emajit.update(shadow, params, 0, decay=0.0, backend=backend)
        kept = emajit.update(shadow, params, 0, decay=1.0, backend=backend)
        for s, p, c, k in zip(*map(leaves, (shadow, params, copied, kept)), strict=True):
            assert torch.equal(c, p.to(s.dtype))
            assert torch.equal(k, s if is_averaged(p) else c)


@given(trees=strategies.tree_pairs(), schedule=SCHEDULES, step=STEPS, rounding=ROUNDINGS)
def test_equal_parameters_are_a_fixed_point(
    trees: tuple[Any, Any], schedule: Any, step: int, rounding: Any
) -> None:
    _, params = trees
    new = emajit.update(params, params, step, decay=schedule, rounding=rounding)
    assert_close(new, params, rtol=0, atol=0)


@given(trees=strategies.tree_pairs(), schedule=SCHEDULES, step=STEPS)
def test_an_average_lies_between(trees: tuple[Any, Any], schedule: Any, step: int) -> None:
    shadow, params = trees
    for backend in ("eager", "aot_eager"):
        new = emajit.update(shadow, params, step, decay=schedule, backend=backend)
        for s, p, n in zip(*map(leaves, (shadow, params, new)), strict=True):
            if is_averaged(p):
                parts = [
                    [x] if not s.is_complex() else [x.real, x.imag] for x in (s, p.to(s.dtype), n)
                ]
                for a, b, between in zip(*parts, strict=True):
                    assert bool((between >= torch.minimum(a, b)).all())
                    assert bool((between <= torch.maximum(a, b)).all())


@given(seed=strategies.seeds, beta=strategies.betas, dtype=st.sampled_from(strategies.FLOATS[:2]))
def test_is_linear(seed: int, beta: float, dtype: torch.dtype) -> None:
    s, p, t, q = (strategies.random((50,), dtype, seed + i) for i in range(4))
    new, other = (emajit.update(*pair, 0, decay=beta) for pair in ((s, p), (t, q)))
    assert bits(emajit.update(4 * s, 4 * p, 0, decay=beta)) == bits(4 * new)
    assert bits(emajit.update(-s, -p, 0, decay=beta)) == bits(-new)
    both = emajit.update(s + t, p + q, 0, decay=beta)
    size = torch.stack([s, p, t, q]).abs().amax(0)
    assert bool(((both - (new + other)).abs() <= 16 * torch.finfo(dtype).eps * size).all())


@given(trees=strategies.tree_pairs(), schedules=st.lists(SCHEDULES, max_size=3), step=STEPS)
def test_several_averages_are_one_after_the_other(
    trees: tuple[Any, Any], schedules: list[Any], step: int
) -> None:
    shadow, params = trees
    shadows = [clone(shadow) for _ in schedules]
    expected = [
        emajit.update(s, params, step, decay=d) for s, d in zip(shadows, schedules, strict=True)
    ]
    pure = emajit.update_many(shadows, params, step, decays=schedules)
    assert bits(pure) == bits(expected)
    emajit.update_many_(shadows, params, step, decays=schedules)
    assert bits(shadows) == bits(expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@given(
    betas=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    seed=strategies.seeds,
)
def test_many_steps_are_the_closed_form(backend: str, betas: list[float], seed: int) -> None:
    """s_n = sum over t of (1 - b_t) b_{t+1} ... b_n p_t, with s_0 in place of the first p."""
    values = strategies.random((len(betas) + 1, 3), torch.float64, seed)
    shadow = values[0].clone()
    for t in range(len(betas)):
        emajit.update_(
            shadow, values[t + 1], t, decay=lambda step: betas[int(step)], backend=backend
        )
    weights = [1.0] + [1 - beta for beta in betas]
    for t, beta in enumerate(betas):
        weights = [w * beta if i <= t else w for i, w in enumerate(weights)]
    expected = (torch.tensor(weights, dtype=torch.float64)[:, None] * values).sum(0)
    assert sum(weights) == pytest.approx(1)
    assert_close(shadow, expected, rtol=0, atol=float(values.abs().max()) * 1e-14)
