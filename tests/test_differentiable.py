"""Derivatives of an update: cut as a rule, through by the formula where they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import emajit
from emajit import offload

# Of torch 2.15 itself, where derivatives are first taken forward.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

DECAYS = (0.9, 0.25)
forward_ad: Any = torch.autograd.forward_ad


def update(shadow: Tensor, param: Tensor, decay: float = 0.9, **options: Any) -> Tensor:
    return emajit.update({"w": shadow}, {"w": param}, 0, decay=decay, **options)["w"]


def many(shadow: Tensor, param: Tensor, decay: float = 0.9, **options: Any) -> Tensor:
    shadows = [{"w": shadow}, {"w": shadow + 1}]
    return emajit.update_many(shadows, {"w": param}, 0, decays=[decay, 0.5], **options)[0]["w"]


@pytest.mark.parametrize("function", [update, many])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("through", [False, True])
def test_gradient_and_tangent_are_the_same(
    function: Callable[..., Tensor], decay: float, through: bool
) -> None:
    """Of the shadow the decay, of the params 1 - decay; both 0 where they are cut."""
    s, p, ones = torch.zeros(3), torch.arange(3.0), torch.ones(3)

    def new(s: Tensor, p: Tensor) -> Tensor:
        return function(s, p, decay, differentiable=through)

    for place, share in ((0, decay), (1, 1 - decay)):
        expected = torch.full((3,), share * through)
        by_grad = grad(lambda s, p: new(s, p).sum(), place)(s, p)
        tangents = (ones, 0 * ones) if place == 0 else (0 * ones, ones)
        for found in (by_grad, jvp(new, (s, p), tangents)[1]):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(jacrev(new, place)(s, p), torch.diag(expected))
        batched = vmap(grad(lambda s, p: new(s, p).sum(), place))(s[None], p[None])
        torch.testing.assert_close(batched[0], expected)


@pytest.mark.parametrize("through", [False, True])
def test_derivatives_of_derivatives(through: bool) -> None:
    p, ones = torch.arange(1.0, 4.0), torch.ones(3)

    def loss(p: Tensor) -> Tensor:
        return update(torch.zeros(3), p, differentiable=through).pow(3).sum()

    expected = through * 6 * 0.1**3 * p
    forward_over_reverse = jvp(grad(loss), (p,), (ones,))[1]
    reverse_over_forward = grad(lambda p: jvp(loss, (p,), (ones,))[1])(p)
    reverse_over_reverse = grad(lambda p: grad(loss)(p).sum())(p)
    for found in (forward_over_reverse, reverse_over_forward, reverse_over_reverse):
        torch.testing.assert_close(found, expected)


def test_autograd_through_several_updates() -> None:
    """A meta-parameter that is trained through an average."""
    start = torch.zeros(2, requires_grad=True)
    param = torch.ones(2, requires_grad=True)
    shadow = {"w": start, "n": torch.tensor(0)}
    for step in range(3):
        params = {"w": param * (step + 1), "n": torch.tensor(step)}
        shadow = emajit.update(shadow, params, step, decay=0.5, differentiable=True)
    shadow["w"].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(start.grad, torch.full((2,), 0.125))
    torch.testing.assert_close(param.grad, torch.full((2,), 0.125 + 2 * 0.25 + 3 * 0.5))
    assert shadow["n"] == 2
    with torch.no_grad():
        assert not update(start, param, differentiable=True).requires_grad
    assert not update(start, param).requires_grad


def test_of_other_dtypes_and_of_a_decay_tensor() -> None:
    half = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    double = torch.ones(2, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.5, requires_grad=True)
    update(half, double, decay, differentiable=True).sum().backward()  # type: ignore[arg-type, no-untyped-call]
    assert half.grad is not None
    assert double.grad is not None
    assert half.grad.tolist() == [0.5, 0.5]
    assert double.grad.tolist() == [0.5, 0.5]
    assert decay.grad is None


def test_skipped_elements_have_no_gradient_of_the_parameter_and_no_nan() -> None:
    s = torch.zeros(3, requires_grad=True)
    p = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    update(s, p, nonfinite="skip", differentiable=True).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(s.grad, torch.tensor([0.9, 1.0, 1.0]))
    torch.testing.assert_close(p.grad, torch.tensor([0.1, 0.0, 0.0]))
    tangent = jvp(
        lambda p: update(torch.zeros(3), p, nonfinite="skip", differentiable=True),
        (p.detach(),),
        (torch.ones(3),),
    )[1]
    torch.testing.assert_close(tangent, torch.tensor([0.1, 0.0, 0.0]))


@pytest.mark.parametrize("through", [False, True])
def test_in_a_compiled_step(through: bool) -> None:
    p = torch.arange(3.0, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(p: Tensor) -> Tensor:
        return update(torch.zeros(3), p, differentiable=through) + 0 * p

    step(p).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(p.grad, torch.full((3,), 0.1 * through))


def test_a_backend_that_does_not_exist_is_refused() -> None:
    def update(s: Tensor, *, through: bool = False) -> Any:
        return emajit.update(s, ones, 0, decay=0.5, backend="none", differentiable=through)

    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="backend: expected auto"):
        update(ones, through=True)
    with pytest.raises(ValueError, match="backend: expected auto"):
        vmap(update)(ones)


def test_rounding_at_random_has_no_derivative() -> None:
    with pytest.raises(ValueError, match=r"differentiable: expected rounding='nearest', found"):
        update(torch.zeros(1), torch.ones(1), rounding="stochastic", differentiable=True)


def test_no_tangent_gets_into_averages_in_place() -> None:
    """A plan that is cached for these tensors must not be taken for them with tangents."""
    model = nn.Linear(2, 2)
    names = [name for name, _ in model.named_parameters()]
    ema = emajit.LitEma(model, decay=0.5, use_num_upates=False)
    shadow = emajit.init(dict(model.named_parameters()))
    plain = dict(model.named_parameters())
    for _ in range(2):
        emajit.update_(shadow, plain, 0, decay=0.5)
    with forward_ad.dual_level():
        for name in names:
            value = getattr(model, name).detach() + 1
            delattr(model, name)
            setattr(model, name, forward_ad.make_dual(value, torch.ones_like(value)))
        duals = {name: getattr(model, name) for name in names}
        emajit.update_(shadow, duals, 0, decay=0.5)
        emajit.update_many_([shadow], duals, 0, decays=[0.5])
        ema_shadow = emajit.update_(ema.named_averages(), duals, 0, decay=0.5)
        for average in (*shadow.values(), *ema_shadow.values()):
            assert forward_ad.unpack_dual(average).tangent is None
        for average in emajit.init(duals).values():
            assert forward_ad.unpack_dual(average).tangent is None
        assert (
            forward_ad.unpack_dual(emajit.update(shadow, duals, 0, decay=0.5)["weight"])[1] is None
        )
    for name, average in shadow.items():
        torch.testing.assert_close(average, plain[name].detach() + 0.75)


def test_in_place_under_jvp_the_shadow_keeps_no_tangent() -> None:
    def function(s: Tensor, p: Tensor) -> Tensor:
        s = s.clone()
        emajit.update_({"w": s}, {"w": p}, 0, decay=0.9)
        return s

    ones = torch.ones(3)
    value, tangent, *_ = jvp(function, (torch.zeros(3), ones), (ones, ones))
    torch.testing.assert_close(value, torch.full((3,), 0.1))
    assert tangent.tolist() == [0, 0, 0]


def test_a_shadow_that_requires_grad_is_refused_in_a_transform() -> None:
    """Its update would have no derivative, and its old values a wrong one."""

    def loss(p: Tensor) -> Tensor:
        shadow = {"w": p.clone()}
        emajit.update_(shadow, {"w": p}, 0, decay=0.5)
        return shadow["w"].sum()

    with pytest.raises(
        ValueError, match=r"shadow\['w'\]: expected an average, found a tensor that"
    ):
        grad(loss)(torch.ones(3))


def test_a_module_of_averages_is_differentiated_in_its_input_alone() -> None:
    model = nn.Linear(2, 1)
    shadow = emajit.init(dict(model.named_parameters()))
    teacher = emajit.averaged_module(model, shadow)
    x = torch.ones(2)
    tangent = jvp(teacher, (x,), (x,))[1]
    torch.testing.assert_close(tangent, shadow["weight"].sum()[None])
    with forward_ad.dual_level(), emajit.ema_scope(model, shadow):
        assert forward_ad.unpack_dual(model(x)).tangent is None
    torch.testing.assert_close(teacher(x), functional_call(model, shadow, (x,)))


def test_no_tangent_gets_into_averages_of_buffers_or_in_host_memory() -> None:
    norm = nn.BatchNorm1d(2)
    shadow = {"w": torch.zeros(2)}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        norm.running_mean = dual
        ema = emajit.LitEma(norm, buffers="average")
        ema(norm)
        offload.update_(shadow, {"w": dual}, 0, decay=0.5)
        for average in (*ema.named_averages().values(), shadow["w"]):
            assert forward_ad.unpack_dual(average).tangent is None
    assert shadow["w"].tolist() == [0.5, 0.5]
