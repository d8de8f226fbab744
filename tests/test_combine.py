"""Averages back into training, and BEMA."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import emajit
from emajit import _warn, schedules, scope
from tests.counting import Operators

pytestmark = pytest.mark.usefixtures("one_thread")


def tree(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"a": torch.randn(3, 2, dtype=dtype), "b": torch.randn(4, dtype=dtype)}


def grown(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.clone().requires_grad_() for name, p in params.items()}


class TestPull:
    @pytest.mark.parametrize("c", [0, 0.1, 0.5, 0.9, 1])
    @pytest.mark.parametrize(
        ("of_params", "of_shadow"),
        [
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.float64),
            (torch.complex64, torch.complex64),
        ],
    )
    def test_is_its_formula(self, of_params: torch.dtype, of_shadow: torch.dtype, c: float) -> None:
        before, shadow = tree(of_params), tree(of_shadow)
        params, kept = grown(before), emajit.init(shadow)
        assert emajit.pull_(params, shadow, c) is params
        wide = torch.complex128 if of_params.is_complex else torch.float64
        for name, p in params.items():
            theta, s = before[name].to(wide), shadow[name].to(wide)
            expected = ((1 - c) * theta + c * s).to(of_params)
            near = torch.finfo(of_params).eps
            assert_close(p.detach(), expected, rtol=near, atol=near)
            assert p.requires_grad
            assert p.dtype == of_params
        assert_close(shadow, kept, rtol=0, atol=0)
        if c in {0, 1}:
            ends = before if c == 0 else {name: s.to(of_params) for name, s in shadow.items()}
            assert_close(params, ends, rtol=0, atol=0)

    def test_is_one_operator(self) -> None:
        params, shadow = grown(tree()), tree()
        emajit.pull_(params, shadow, 0.5)
        with Operators() as seen:
            emajit.pull_(params, shadow, 0.5)
        assert seen.counts["aten._foreach_lerp_.Scalar"] == 1
        # a view of each parameter, its version shared; the rest are checks
        assert set(seen.counts) <= {
            "aten._foreach_lerp_.Scalar",
            "aten.can_cast.default",
            "aten.detach.default",
        }

    def test_a_small_pull_is_no_average_that_stalls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_warn, "_told", set())
        params, shadow = grown(tree(torch.bfloat16)), tree(torch.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            emajit.pull_(params, shadow, 0.01)

    def test_copies_integers_and_leaves_none(self) -> None:
        params: dict[str, Any] = {"n": torch.tensor(3), "m": torch.tensor([True]), "none": None}
        shadow: dict[str, Any] = {"n": torch.tensor(7), "m": torch.tensor([False]), "none": None}
        emajit.pull_(params, shadow, 0.25)
        assert params == {"n": torch.tensor(7), "m": torch.tensor([False]), "none": None}

    def test_tied_parameters_are_pulled_once(self) -> None:
        w = torch.ones(2, requires_grad=True)
        params = {"a": w, "b": w}
        shadow = emajit.init({"a": torch.zeros(2), "b": None})
        shadow["b"] = shadow["a"]
        emajit.pull_(params, shadow, 0.5)
        assert w.tolist() == [0.5, 0.5]

    def test_autograd_notices(self) -> None:
        w = torch.ones(2, requires_grad=True)
        loss: Any = (w * w).sum()
        emajit.pull_({"w": w}, {"w": torch.zeros(2)}, 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize("c", [0.5, 1.0])
    def test_training_goes_on_with_the_optimizers_state(self, c: float) -> None:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        params = dict(model.named_parameters())
        shadow: Any = emajit.init(params)
        for step in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
            emajit.update_(shadow, params, step, decay=0.5)
            if step % 3 == 2:
                state = {
                    key: value.clone()
                    for held in optimizer.state.values()
                    for key, value in held.items()
                }
                expected = {
                    name: torch.lerp(p, shadow[name], c).detach() for name, p in params.items()
                }
                emajit.pull_(params, shadow, c)
                assert_close({name: p.detach() for name, p in params.items()}, expected)
                for held in optimizer.state.values():
                    assert all(key in state for key in held)
                after = {k: v for held in optimizer.state.values() for k, v in held.items()}
                assert_close(after, state, rtol=0, atol=0)
                assert all(map(lambda a, b: a is b, model.parameters(), params.values()))

    def test_for_some_parameters(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        last = emajit.select(model.named_parameters(), include="1.*")
        shadow = {name: torch.zeros_like(p) for name, p in last.items()}
        emajit.pull_(last, shadow)
        assert_close(dict(model.named_parameters()), {**before, **shadow}, rtol=0, atol=0)

    def test_is_refused_inside_a_scope(self) -> None:
        model = nn.Linear(2, 2)
        params = dict(model.named_parameters())
        shadow: Any = emajit.init(params)
        with (
            emajit.ema_scope(model, shadow),
            pytest.raises(RuntimeError, match="outside of ema_scope"),
        ):
            emajit.pull_(params, shadow)

    def test_caches_of_the_weights_are_cleared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, shadow = nn.Linear(2, 2), {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
        told: list[Tensor] = []
        monkeypatch.setattr(
            scope, "before_writing", [lambda: told.append(model.weight.detach().clone())]
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.ones(1, 2)).any()
            emajit.pull_(dict(model.named_parameters()), shadow)
            assert not model(torch.ones(1, 2)).any()
        assert len(told) == 1
        assert told[0].any()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda s: s.pop("b"), ValueError, "shadow: expected the structure of params, .*lacks"),
            (
                lambda s: s.update(b=torch.zeros(5)),
                ValueError,
                r"shadow\['b'\]: expected shape \(4,\) as in params, found \(5,\)",
            ),
            (
                lambda s: s.update(b=torch.zeros(4, device="meta")),
                ValueError,
                r"shadow\['b'\]: expected device cpu as in params, found meta",
            ),
            (
                lambda s: s.update(b=torch.zeros(4, dtype=torch.complex64)),
                ValueError,
                r"shadow\['b'\]: expected a number that torch.float32 as in params can hold",
            ),
            (
                lambda s: s.update(b=torch.zeros(4, dtype=torch.int64)),
                ValueError,
                r"shadow\['b'\]: expected an average of torch.float32, found torch.int64",
            ),
            (lambda s: s.update(b=None), ValueError, r"shadow\['b'\]: expected a tensor as in par"),
            (lambda s: s.update(b=1.0), TypeError, r"shadow\['b'\]: expected a tensor or None"),
        ],
    )
    def test_errors_before_anything_is_written(
        self, change: Any, error: type[Exception], message: str
    ) -> None:
        params, shadow = grown(tree()), dict(tree())
        before = emajit.init(params)
        change(shadow)
        with pytest.raises(error, match=message):
            emajit.pull_(params, shadow)
        assert_close({name: p.detach() for name, p in params.items()}, before, rtol=0, atol=0)

    def test_errors_of_the_params(self) -> None:
        params: Any = {"params": torch.zeros(1).expand(3)}
        with pytest.raises(ValueError, match=r"^params\['params'\]: expected memory of its own"):
            emajit.pull_(params, {"params": torch.ones(3)})
        with pytest.raises(ValueError, match="found that it overlaps"):
            emajit.pull_({"w": (w := torch.ones(3))}, {"w": w})
        model = nn.Linear(2, 2)
        named = dict(model.named_parameters())
        with pytest.raises(ValueError, match=re.escape("pass its named_averages()")):
            emajit.pull_(named, emajit.LitEma(model))
        with pytest.raises(TypeError, match=r"^params: expected a tensor or None, found Linear"):
            emajit.pull_(model, named)
        for c in (-0.1, 1.5, math.nan):
            with pytest.raises(ValueError, match=r"c: expected a number in \[0, 1\]"):
                emajit.pull_(named, named, c)
        for no_number in ("1", True):
            with pytest.raises(TypeError, match=r"c: expected a number in \[0, 1\]"):
                emajit.pull_(named, named, no_number)  # type: ignore[arg-type]

    @pytest.mark.skipif(
        torch.__version__ < "2.12", reason="torch 2.11 breaks the graph at autocast"
    )
    def test_in_a_compiled_step(self) -> None:
        def step(params: Any, shadow: Any) -> Any:
            return emajit.pull_(params, shadow, 0.25)

        params, shadow = grown(tree()), tree()
        eager = emajit.pull_(grown(emajit.init(params)), shadow, 0.25)
        torch.compile(step, fullgraph=True, backend="aot_eager")(params, shadow)
        assert_close(params, eager)


class Published:
    """The formulas of TRL's `BEMACallback`, in float64, with its defaults but the interval."""

    def __init__(self, theta: Tensor, update_freq: int, update_after: int = 0) -> None:
        self.start, self.ema, self.bema = theta.clone(), theta.clone(), theta.clone()
        self.update_freq, self.update_after = update_freq, update_after

    def on_step_end(self, step: int, theta: Tensor) -> None:
        if step == self.update_after:
            self.start, self.ema = theta.clone(), theta.clone()
        elif step > self.update_after and (step - self.update_after) % self.update_freq == 0:
            beta, alpha = (10 + step) ** -0.5, (10 + step) ** -0.2
            self.ema = (1 - beta) * self.ema + beta * theta
            self.bema = self.ema + alpha * (theta - self.start)


class TestBema:
    @pytest.mark.parametrize("update_freq", [1, 7, 400])
    def test_has_the_values_of_trl(self, update_freq: int) -> None:
        theta = {"w": torch.randn(5, dtype=torch.float64)}
        published = Published(theta["w"], update_freq)
        initial, shadow = emajit.init(theta), emajit.init(theta)
        for step in range(1, 2 * update_freq + 1):
            theta["w"] += torch.randn(5, dtype=torch.float64)
            published.on_step_end(step, theta["w"])
            if step % update_freq == 0:
                emajit.update_(shadow, theta, step, decay=schedules.inverse_power())
                found = emajit.bema(shadow, theta, initial, step)
                assert_close(found["w"], published.bema, rtol=1e-13, atol=1e-13)
                at = emajit.bema(shadow, theta, initial, torch.tensor(step))
                assert_close(at, found, rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize(
        ("step", "expected"),
        # (10 + t) ** -0.2 at t = 400, 1014 (1024 = 2 ** 10) and 99,990.
        [(400, 410**-0.2), (1014, 0.25), (99_990, 0.1)],
    )
    def test_published_weights(self, step: int, expected: float) -> None:
        zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        assert emajit.bema(zero, one, zero, step)["w"].item() == pytest.approx(expected, rel=1e-6)

    def test_other_constants(self) -> None:
        zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        for options, expected in (
            ({"power": 0.0}, 1.0),
            ({"power": 0.5, "lag": 4, "multiplier": 0.5}, 14**-0.5),
        ):
            found = emajit.bema(zero, one, zero, 20, **options)
            assert found["w"].item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("of_shadow", [torch.float32, torch.float64, torch.bfloat16])
    def test_is_rounded_once_to_the_shadow(self, of_shadow: torch.dtype) -> None:
        shadow, params, initial = tree(of_shadow), grown(tree(torch.bfloat16)), tree(torch.bfloat16)
        kept = emajit.init(shadow)
        found = emajit.bema(shadow, params, initial, 1014)
        for name, average in found.items():
            correction = (params[name].double() - initial[name].double()) / 4
            expected = (shadow[name].double() + correction).to(of_shadow)
            rtol = 1e-6 if of_shadow != torch.bfloat16 else torch.finfo(of_shadow).eps
            assert_close(average, expected.detach(), rtol=rtol, atol=1e-6)
            assert not average.requires_grad
        assert_close(shadow, kept, rtol=0, atol=0)

    def test_keeps_integers_ties_and_none(self) -> None:
        w = torch.zeros(2)
        shadow: dict[str, Any] = {"a": w, "b": w, "n": torch.tensor(3), "none": None}
        p, p0 = torch.ones(2), torch.zeros(2)
        params = {"a": p, "b": p, "n": torch.tensor(5), "none": None}
        initial = {"a": p0, "b": p0, "n": torch.tensor(0), "none": None}
        found = emajit.bema(shadow, params, initial, 1014)
        assert found["a"] is found["b"]
        assert found["a"].tolist() == [0.25, 0.25]
        assert found["n"] == 3
        assert found["n"] is not shadow["n"]
        assert found["none"] is None

    def test_is_evaluated_in_a_scope(self) -> None:
        model = nn.Linear(2, 1)
        params = dict(model.named_parameters())
        initial: Any = emajit.init(params)
        shadow: Any = emajit.init(params)
        with torch.no_grad():
            model.weight += 1
        with emajit.ema_scope(model, emajit.bema(shadow, params, initial, 1014)):
            assert_close(model.weight.detach(), initial["weight"] + 0.25)
            with pytest.raises(RuntimeError, match="outside of ema_scope"):
                emajit.bema(shadow, params, initial, 1014)

    def test_errors_name_the_tree(self) -> None:
        good, bad = {"w": torch.zeros(2)}, {"w": torch.zeros(3)}
        with pytest.raises(ValueError, match=r"^params\['w'\]: expected shape \(2,\) as in shadow"):
            emajit.bema(good, bad, good, 0)
        with pytest.raises(ValueError, match=r"^initial\['w'\]: expected shape \(2,\) as in shad"):
            emajit.bema(good, good, bad, 0)
        with pytest.raises(ValueError, match="lag: expected a number >= 1"):
            emajit.bema(good, good, good, 0, lag=0)
        with pytest.raises(ValueError, match="step: expected the number of updates so far, >= 0"):
            emajit.bema(good, good, good, -1)
        with pytest.raises(TypeError, match="step: expected an int"):
            emajit.bema(good, good, good, 1.5)  # type: ignore[arg-type]

    def test_overshoots_late(self) -> None:
        """The figures of its docstring: ahead of the average at first, behind it at the end."""
        losses = quadratics(3.0, (10, 100, 1000))
        trained, average, corrected = losses[10]
        assert corrected < trained < average
        trained, average, corrected = losses[1000]
        assert average < trained < corrected
        losses[9] = quadratics(0.3, (10,))[10]
        told = " ".join((emajit.bema.__doc__ or "").split())
        for step, start, figures in re.findall(r"step (\d+), from ([\d.]+): ([\d. ,]+\d)", told):
            found = losses.pop(9 if start == "0.3" else int(step))
            assert [*map(float, figures.split(", "))] == pytest.approx(found, rel=0.01)
        assert not losses


def quadratics(start: float, marks: tuple[int, ...]) -> dict[int, tuple[float, float, float]]:
    """The losses of the trained, the averaged and the corrected weights at some steps."""
    curvature = torch.logspace(-2, 0, 64, dtype=torch.float64)
    theta = {"w": torch.full((400, 64), start, dtype=torch.float64)}
    initial, shadow = emajit.init(theta), emajit.init(theta)
    generator = torch.Generator().manual_seed(0)

    def loss(weights: dict[str, Tensor]) -> float:
        return (curvature * weights["w"] ** 2).sum(1).mean().item() / 2

    losses = {}
    for step in range(1, max(marks) + 1):
        noise = torch.randn(400, 64, dtype=torch.float64, generator=generator)
        theta["w"] -= 0.1 * (curvature * theta["w"] + noise)
        emajit.update_(shadow, theta, step, decay=schedules.inverse_power())
        if step in marks:
            corrected = emajit.bema(shadow, theta, initial, step)
            losses[step] = loss(theta), loss(shadow), loss(corrected)
    return losses
