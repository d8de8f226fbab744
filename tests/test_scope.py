"""`ema_scope`: the model computes with the shadow, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import emajit


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def shadow_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


class Spy:
    """What must be as before once a scope is left."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.objects = list(model.parameters()) + list(model.buffers())
        self.addresses = [t.data_ptr() for t in self.objects]
        self.values = [t.detach().clone() for t in self.objects]

    def assert_untouched(self) -> None:
        found = list(self.model.parameters()) + list(self.model.buffers())
        assert all(a is b for a, b in zip(self.objects, found, strict=True))
        assert self.addresses == [t.data_ptr() for t in found]
        assert all(torch.equal(a, b) for a, b in zip(self.values, found, strict=True))


def test_computes_with_the_shadow_itself() -> None:
    model, x = small().eval(), torch.randn(4, 2)
    shadow, spy = shadow_of(model), Spy(model)
    expected = torch.func.functional_call(model, shadow, (x,))
    raw = model(x)
    with emajit.ema_scope(model, shadow):
        for name, p in model.named_parameters():
            assert isinstance(p, nn.Parameter)
            assert p.data_ptr() == shadow[name].data_ptr()
        assert_close(model(x), expected, rtol=0, atol=0)
    spy.assert_untouched()
    assert_close(model(x), raw, rtol=0, atol=0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_is_raised(error: type[BaseException]) -> None:
    model = small()
    spy = Spy(model)
    with pytest.raises(error), emajit.ema_scope(model, shadow_of(model)):
        raise error
    spy.assert_untouched()


def test_a_swap_that_fails_half_way() -> None:
    model = small()
    shadow = shadow_of(model)
    shadow["2.weight"] = torch.randn(1, 3).to_sparse()
    spy = Spy(model)
    with pytest.raises(RuntimeError), emajit.ema_scope(model, shadow):
        pytest.fail("entered")
    spy.assert_untouched()


def test_one_scope_at_a_time() -> None:
    model = small()
    first, second = (emajit.ema_scope(model, shadow_of(model)) for _ in range(2))
    spy = Spy(model)
    with first, pytest.raises(RuntimeError, match="outside of ema_scope, found it inside"), second:
        pytest.fail("entered")
    spy.assert_untouched()
    with emajit.ema_scope(model, shadow_of(model)):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_not_averaged(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    params = dict(model.named_parameters())
    shadow = emajit.init(params, dtype=torch.float32)
    with emajit.ema_scope(model, shadow):
        for update in (emajit.update, emajit.update_):
            with pytest.raises((RuntimeError, ValueError), match=r"outside of ema_scope|overlaps"):
                update(shadow, params, 0, decay=0.5)
    emajit.update_(shadow, params, 0, decay=0.5)


def test_two_threads_cannot_be_inside_at_once() -> None:
    """One of them enters, the other raises; neither sees the other's weights."""
    model = small()
    shadows, outcomes, wrong = [shadow_of(model) for _ in range(4)], Counter[str](), []
    spy, start = Spy(model), threading.Barrier(4)

    def work(shadow: dict[str, Tensor]) -> None:
        for _ in range(100):
            start.wait()
            try:
                with emajit.ema_scope(model, shadow):
                    for name, p in model.named_parameters():
                        time.sleep(0)
                        if p.data_ptr() != shadow[name].data_ptr():
                            wrong.append(name)
                    outcomes["entered"] += 1
            except RuntimeError:
                outcomes["refused"] += 1

    threads = [threading.Thread(target=work, args=(shadow,)) for shadow in shadows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert outcomes.total() == 400
    assert outcomes["entered"] >= 100
    assert outcomes["refused"] >= 100
    spy.assert_untouched()


def test_another_dtype_is_cast() -> None:
    model, x = nn.Linear(2, 3).bfloat16(), torch.randn(4, 2).bfloat16()
    shadow = {name: s.float() for name, s in shadow_of(model).items()}
    with emajit.ema_scope(model, shadow):
        found = model(x)
    cast = {name: s.bfloat16() for name, s in shadow.items()}
    assert_close(found, torch.func.functional_call(model, cast, (x,)), rtol=0, atol=0)
    hooked: list[int] = []
    model.weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda _: hooked.append(1)
    )
    model(x).sum().backward()
    assert hooked == [1]


def test_a_graph_does_not_cross_the_boundary_unnoticed() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0]))

    model, x = Scale(), torch.ones(1, requires_grad=True)
    shadow = {"w": torch.tensor([10.0])}
    before = x * model.w
    with emajit.ema_scope(model, shadow):
        inside = x * model.w
        (gradient,) = torch.autograd.grad(x * model.w, x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(before, x, retain_graph=True)
    assert gradient.item() == 10
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(inside, x, retain_graph=True)
    shadow["w"].fill_(20.0)
    with (
        emajit.ema_scope(model, shadow),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        torch.autograd.grad(inside, x)
    assert torch.autograd.grad(before, x)[0].item() == 3


def test_a_graph_from_inside_after_a_step_of_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shadow = emajit.init(dict(model.named_parameters()))
    model(torch.ones(2)).sum().backward()
    with emajit.ema_scope(model, shadow):
        inside = model(torch.ones(2)).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


def test_a_buffer_that_the_forward_replaces() -> None:
    class Counter(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self) -> None:
            self.seen = self.seen + 1

    model = Counter()
    with emajit.ema_scope(model, {"seen": torch.full((1,), 100.0)}):
        model()
        assert model.seen.item() == 101
    assert model.seen.item() == 0


def test_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        shadow = shadow_of(model)
        with emajit.ema_scope(model, shadow):
            assert torch.equal(model.weight, shadow["weight"])


@pytest.mark.parametrize(
    ("model", "shadow", "message"),
    [
        ({}, small(), "model: expected a module, found dict"),
        (small(), [torch.ones(1)], "shadow: expected a mapping of names to averages, found list"),
        (
            small(),
            emajit.LitEma(small()),
            r"found LitEma; pass a dict .* as its named_averages\(\)",
        ),
        (
            small(),
            {"0.weight": 1.0},
            "expected names and averages or None, found '0.weight': float",
        ),
        (small(), {0: torch.ones(1)}, "expected names and averages or None, found 0: Tensor"),
    ],
)
def test_swapped_arguments(model: Any, shadow: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message), emajit.ema_scope(model, shadow):
        pytest.fail("entered")


def test_none_is_no_average() -> None:
    model = nn.Linear(2, 2)
    shadow: dict[str, Any] = {"weight": torch.ones(2, 2), "bias": None}
    with pytest.raises(ValueError, match=r"missing \['bias'\]"), emajit.ema_scope(model, shadow):
        pytest.fail("entered")
    model.bias.requires_grad_(False)
    with emajit.ema_scope(model, shadow):
        pass


def test_tied_weights() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    average = torch.ones(2, 2)
    for shadow in (
        {"a.weight": average},
        {"b.weight": average},
        {"a.weight": average, "b.weight": average.clone()},
    ):
        with emajit.ema_scope(model, shadow):
            assert_close(model["b"].weight, average)
            assert model["a"].weight is model["b"].weight
    with (
        pytest.raises(ValueError, match=r"shadow\['b.weight'\]: .* average of 'a.weight'"),
        emajit.ema_scope(model, {"a.weight": average, "b.weight": average + 1}),
    ):
        pytest.fail("entered")


def test_lstm_holds_its_weights_elsewhere_too() -> None:
    model, x = nn.LSTM(2, 3), torch.randn(4, 1, 2)
    shadow = shadow_of(model)
    other = nn.LSTM(2, 3)
    other.load_state_dict(shadow)
    with emajit.ema_scope(model, shadow):
        assert_close(model(x)[0], other(x)[0], rtol=0, atol=0)


def test_compiled_model_without_recompiling() -> None:
    model, x = nn.Linear(2, 3), torch.randn(4, 2)
    compiled: Any = torch.compile(model, backend="aot_eager")
    shadow = shadow_of(model)
    raw = compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        with emajit.ema_scope(compiled, shadow):
            averaged = compiled(x)
        assert_close(compiled(x), raw, rtol=0, atol=0)
    assert_close(averaged, torch.func.functional_call(model, shadow, (x,)))


def test_prefixes_on_both_sides() -> None:
    model = small()
    compiled: Any = torch.compile(model)
    plain = shadow_of(model)
    prefixed = {f"module._orig_mod.{name}": average for name, average in plain.items()}
    for target, shadow in ((compiled, plain), (model, prefixed), (compiled, prefixed)):
        with emajit.ema_scope(target, shadow):
            assert torch.equal(model[0].weight, plain["0.weight"])  # type: ignore[index]


def test_buffers_and_state_dict() -> None:
    model = small()
    shadow = emajit.init(model.state_dict())
    shadow["1.running_mean"] += 5
    spy = Spy(model)
    with emajit.ema_scope(model, shadow):
        assert model.state_dict()["1.running_mean"].tolist() == [5.0] * 3
    spy.assert_untouched()


def test_frozen_parameters_may_be_left_out() -> None:
    model = small()
    for p in model[0].parameters():  # type: ignore[index]
        p.requires_grad_(False)
    shadow = {name: s for name, s in shadow_of(model).items() if not name.startswith("0.")}
    with emajit.ema_scope(model, shadow):
        assert torch.equal(model[2].weight, shadow["2.weight"])  # type: ignore[index]


def test_optimizer_and_graph_in_flight() -> None:
    model, x = small(), torch.randn(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(x).sum()
    with emajit.ema_scope(model, shadow_of(model)), torch.no_grad():
        model.eval()(x)
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        assert_close(p.detach(), old - 0.1 * p.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), r"missing \['0.bias'\]"),
        (lambda s: s.update({"9.w": torch.zeros(1)}), r"found \['9.w'\]"),
        (
            lambda s: s.update({"0.bias": torch.zeros(2)}),
            r"shadow\['0.bias'\]: expected shape \(3,\) on cpu, found \(2,\) on cpu",
        ),
        (lambda s: s.update({"0.bias": torch.zeros(3, device="meta")}), "found .* on meta"),
        (lambda s: s.clear(), "missing"),
    ],
)
def test_errors_name_the_parameter(change: Any, message: str) -> None:
    model = small()
    shadow, spy = shadow_of(model), Spy(model)
    change(shadow)
    with pytest.raises(ValueError, match=message), emajit.ema_scope(model, shadow):
        pytest.fail("entered")
    spy.assert_untouched()


class ListsItself(nn.Linear):
    """A module whose `named_parameters` knows nothing of `remove_duplicate`."""

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:  # type: ignore[override]
        yield from super().named_parameters(prefix, recurse)

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Any:  # type: ignore[override]
        yield from super().named_buffers(prefix, recurse)


def test_a_module_that_lists_its_parameters_in_its_own_way() -> None:
    model, x = ListsItself(2, 2), torch.ones(2)
    shadow = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    with torch.no_grad():
        with emajit.ema_scope(model, shadow):
            assert model(x).tolist() == [6.0, 6.0]
        assert emajit.averaged_module(model, shadow)(x).tolist() == [6.0, 6.0]
        ema = emajit.LitEma(model, decay=0.0, use_num_upates=False)
        model.weight.fill_(3.0)
        ema(model)
        model.weight.zero_()
        with ema.ema_scope(model):
            assert model.weight.tolist() == [[3.0, 3.0]] * 2


def test_names_in_an_error_are_few() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(100)))
    for shadow, told in (
        ({}, r"missing \['0.weight', .*\] and 195 more$"),
        ({f"x{i}": torch.ones(1) for i in range(100)}, r"found \['x0', .*\] and 95 more$"),
    ):
        with pytest.raises(ValueError, match=told), emajit.ema_scope(model, shadow):
            pass
