"""What `init`, `update` and `update_` promise."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
import weakref
from collections import OrderedDict
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import emajit
from emajit import _alias, _choose, _warn, schedules
from tests import reference, strategies

BACKENDS = ("eager", "aot_eager")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]


def assert_equal(expected: Any, found: Any) -> None:
    assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


class TestUpdate:
    def test_a_flipped_sign_or_decay_would_show(self) -> None:
        new = emajit.update(torch.tensor([10.0]), torch.tensor([20.0]), 0, decay=0.9)
        assert new.item() == pytest.approx(11.0)

    def test_weight_is_computed_in_float64(self, backend: str) -> None:
        shadow, params = torch.zeros(1), torch.ones(1)
        weight = emajit.update(shadow, params, 0, decay=0.99999, backend=backend).item()
        assert weight == pytest.approx(1e-5, rel=1e-7)
        assert 1 - torch.tensor(0.99999).item() != pytest.approx(1e-5, rel=1e-4)

    def test_weight_of_a_float32_decay_is_exact_too(self, backend: str) -> None:
        decay = torch.tensor(1 - 2.0**-24)
        found = emajit.update(torch.zeros(1), torch.ones(1), 0, decay=decay, backend=backend)
        assert found.item() == 2.0**-24
        wide = emajit.update(
            torch.zeros(1).double(), torch.ones(1).double(), 0, decay=torch.tensor(0.9999)
        )
        assert wide.item() == 1 - torch.tensor(0.9999).double().item()

    def test_low_precision_is_rounded_once(self, backend: str) -> None:
        s, p = torch.randn(2, 10_000).bfloat16()
        exact = s.double() * 0.9 + p.double() * 0.1
        found = emajit.update(s, p, 0, decay=0.9, backend=backend)
        nearest = exact.bfloat16()
        assert (found == nearest).float().mean() > 0.9999
        assert_close(found, nearest, rtol=2**-7, atol=0)

    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
    def test_complex_numbers_of_half_precision_are_rounded_once(self, backend: str) -> None:
        s, p = torch.randn(2, 10_000, dtype=torch.complex64).to(torch.complex32)
        exact = s.to(torch.complex128) * 0.9 + p.to(torch.complex128) * 0.1
        found = emajit.update(s, p, 0, decay=0.9, backend=backend)
        assert (found == exact.to(torch.complex32)).float().mean() > 0.999

    def test_float32_shadow_of_bfloat16_parameters_moves(self, backend: str) -> None:
        params = torch.ones(4, dtype=torch.bfloat16)
        shadow = emajit.init(torch.zeros(4, dtype=torch.bfloat16), dtype=torch.float32)
        for step in range(100):
            emajit.update_(shadow, params, step, decay=0.9999, backend=backend)
        assert_close(shadow, torch.full((4,), 1 - 0.9999**100), rtol=1e-4, atol=0)

    def test_result_never_requires_grad(self, backend: str) -> None:
        params = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2).bfloat16())}
        shadow = emajit.init(params)
        pure = emajit.update(shadow, params, 0, decay=0.5, backend=backend)
        emajit.update_(shadow, params, 0, decay=0.5, backend=backend)
        wanted = torch.tensor(0.5, requires_grad=True)
        for leaf in tensors((shadow, pure, emajit.update(shadow, params, 0, decay=wanted))):
            assert not leaf.requires_grad
            assert leaf.grad_fn is None

    def test_float8_parameters(self, backend: str) -> None:
        params = {"a": torch.ones(2), "b": torch.ones(2).to(torch.float8_e4m3fn)}
        shadow = {"a": torch.zeros(2), "b": torch.zeros(2)}
        emajit.update_(shadow, params, 0, decay=0.75, backend=backend)
        assert [leaf.tolist() for leaf in shadow.values()] == [[0.25] * 2] * 2

    def test_negated_views(self, backend: str) -> None:
        negated = torch.complex(torch.zeros(4), torch.ones(4)).conj().imag
        assert negated.is_neg()
        new = emajit.update(torch.zeros(4), negated, 0, decay=0.5, backend=backend)
        assert new.tolist() == [-0.5] * 4

    def test_pure_result_shares_no_memory(self) -> None:
        params = {"a": torch.ones(2), "n": torch.tensor([1, 2])}
        new = emajit.update(params, params, 0, decay=0.5)
        assert not {t.data_ptr() for t in tensors(new)} & {t.data_ptr() for t in tensors(params)}


def spoilt(params: dict[str, Tensor], bad: float, where: str) -> dict[str, Tensor]:
    """Copies of `params` with `bad` in one element, in all of one leaf, or everywhere."""
    copies = {name: p.clone() for name, p in params.items()}
    if where == "element":
        copies["w"][1, 2] = bad
    elif where == "leaf":
        copies["w"].fill_(bad)
    else:
        for p in copies.values():
            p.fill_(bad)
    return copies


def assert_others_untouched(
    found: dict[str, Tensor],
    clean: dict[str, Tensor],
    shadow: dict[str, Tensor],
    params: dict[str, Tensor],
    nonfinite: str,
) -> None:
    """Bit for bit as `clean` where the parameter is finite; elsewhere the old average, or none."""
    for name, p in params.items():
        bad = ~torch.isfinite(p)
        expected = torch.where(bad, shadow[name], clean[name])
        if nonfinite == "skip":
            assert torch.equal(found[name], expected)
        else:
            assert torch.equal(found[name][~bad], expected[~bad])
            assert not torch.isfinite(found[name][bad]).any()


POLICIES: list[Any] = ["propagate", "skip"]
BAD = (math.nan, math.inf, -math.inf)
PLACES = ("element", "leaf", "all")


def leaves_in(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"w": (3, 4), "b": (5,), "scalar": ()}
    return {name: strategies.random(shape, dtype, seed) for name, shape in shapes.items()}


class TestNonfinite:
    @pytest.mark.parametrize("where", PLACES)
    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("dtype", [*strategies.FLOATS, *strategies.COMPLEX])
    @pytest.mark.parametrize("nonfinite", POLICIES)
    def test_each_policy(
        self, nonfinite: Any, dtype: torch.dtype, bad: float, where: str, backend: str
    ) -> None:
        shadow, params = leaves_in(dtype, 1), leaves_in(dtype, 9)
        broken = spoilt(params, bad, where)
        for decay in (0.9, 0.2):
            for rounding in ("nearest", "stochastic"):
                options: Any = {"decay": decay, "backend": backend, "rounding": rounding}
                clean = emajit.update(shadow, params, 0, **options)
                found = emajit.update(shadow, broken, 0, nonfinite=nonfinite, **options)
                assert_others_untouched(found, clean, shadow, broken, nonfinite)
                written = {name: s.clone() for name, s in shadow.items()}
                emajit.update_(written, broken, 0, nonfinite=nonfinite, **options)
                assert_equal(found, written)

    @pytest.mark.inductor
    @pytest.mark.parametrize("nonfinite", POLICIES)
    def test_compiled(self, nonfinite: Any) -> None:
        cases = list(itertools.product((torch.float32, torch.bfloat16), BAD, PLACES))
        shadow, params, broken = {}, {}, {}
        for i, (dtype, bad, where) in enumerate(cases):
            shadow[f"{i}"], whole = leaves_in(dtype, i)["w"], leaves_in(dtype, 99 + i)
            params[f"{i}"], broken[f"{i}"] = whole["w"], spoilt(whole, bad, where)["w"]
        options: Any = {"decay": 0.9, "nonfinite": nonfinite, "backend": "inductor"}
        clean = emajit.update(shadow, params, 0, **options)
        found = emajit.update(shadow, broken, 0, **options)
        assert_others_untouched(found, clean, shadow, broken, nonfinite)
        emajit.update_(shadow, broken, 0, **options)
        assert_equal(found, shadow)

    def test_an_average_that_is_kept_may_be_anything(self, backend: str) -> None:
        s = torch.tensor([1.0, math.nan, math.inf, -0.0])
        bad = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
        kept = emajit.update(s, bad, 0, decay=0.5, nonfinite="skip", backend=backend)
        assert torch.equal(kept.view(torch.int32), s.view(torch.int32))

    def test_what_overflows_of_finite_numbers_is_not_skipped(self, backend: str) -> None:
        s, p = torch.tensor([3e38, -3e38]), torch.tensor([-3e38, 3e38])
        found = emajit.update(s, p, 0, decay=0.9, nonfinite="skip", backend=backend)
        assert found.tolist() == [-math.inf, math.inf]

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
    @pytest.mark.parametrize("decay", [0.9, 0.25, torch.tensor(0.25, dtype=torch.float64)], ids=str)
    def test_skip_at_every_entry(self, rounding: Any, decay: Any) -> None:
        """What is not finite keeps its average to the bit; the others get the same as without."""
        shadow: dict[str, Tensor] = {
            str(dtype): torch.full((4,), 1.5, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        }
        params = {n: torch.tensor([2.5, torch.nan, torch.inf, -torch.inf]) for n in shadow}
        whole = {n: torch.full((4,), 2.5) for n in shadow}
        step = 3
        options: Any = {"rounding": rounding, "nonfinite": "skip"}
        expected = emajit.update(shadow, whole, step, decay=decay, rounding=rounding)
        many: Any = {"decays": [decay], **options}

        for found in (
            emajit.update(shadow, params, step, decay=decay, **options),
            emajit.update_(emajit.init(shadow), params, step, decay=decay, **options),
            emajit.update_many([shadow], params, step, **many)[0],
            emajit.update_many_([emajit.init(shadow)], params, step, **many)[0],
        ):
            for name, average in found.items():
                assert average[1:].tolist() == [1.5, 1.5, 1.5]
                if rounding == "nearest":
                    assert average[0] == expected[name][0]
                else:
                    assert abs(average[0] - expected[name][0]) < 0.01


class TestLowPrecision:
    def test_a_float32_shadow_of_bfloat16_parameters_follows_the_truth(self, backend: str) -> None:
        """Over 10,000 steps of a random walk, within 1e-4 of the distance that it went."""
        generator = torch.Generator().manual_seed(5)
        walk = torch.randn(64, generator=generator).double()
        shadow = {"w": walk.bfloat16().float()}
        truth = start = shadow["w"].double()
        for step in range(10_000):
            walk += 0.01 * torch.randn(64, generator=generator)
            params = {"w": walk.bfloat16()}
            emajit.update_(shadow, params, step, decay=0.9999, backend=backend)
            truth = truth + (1 - 0.9999) * (params["w"].double() - truth)
        moved = (truth - start).abs().mean()
        assert moved > 0.1
        assert (shadow["w"] - truth).abs().max() < 1e-4 * moved

    @pytest.mark.parametrize("decay", [0.91, 0.996, 0.9999])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_an_average_that_stalls_warns_once(self, dtype: torch.dtype, decay: float) -> None:
        _warn._told.clear()
        model = nn.Linear(2, 2).to(dtype)
        params = dict(model.named_parameters())
        shadow = emajit.init(params)

        def step(shadow: Any = shadow, decay: Any = decay, step: int = 0, **options: Any) -> None:
            emajit.update_(shadow, params, step, decay=decay, **options)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(emajit.init(params, dtype=torch.float32))
            step(decay=0.9)
            step(decay=1.0)  # nothing is to move
            both = [emajit.init(params, dtype=torch.float32), shadow]
            emajit.update_many_(both, params, 0, decays=[decay, 0.5])
            whole = {"n": torch.zeros(1).to(dtype)}, {"n": torch.ones(1).int()}
            emajit.update(*whole, 0, decay=decay)  # copied
            step(decay=schedules.warmup(decay), step=50)  # 0.85 there
            step(rounding="stochastic")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            both = [emajit.init(params, dtype=torch.float64), shadow]
            emajit.update_many_(both, params, 0, decays=[0.5, decay])
            for _ in range(3):
                step()
            emajit.LitEma(model, use_num_upates=False)(model)
        assert len(told) == 2  # of the updates, and of the LitEma that is built
        for warning in told:
            assert f"an average in {dtype} stalls: at a decay above 0.9" in str(warning.message)
            assert "dtype=torch.float32" in str(warning.message)
            assert "rounding='stochastic'" in str(warning.message)
            assert warning.filename == __file__
        _warn._told.clear()
        with pytest.warns(UserWarning, match="stalls"):  # a schedule that has grown
            step(decay=schedules.warmup(decay), step=10**6)


class TestSeveralAverages:
    DECAYS: ClassVar[list[Any]] = [0.5, schedules.uniform(), torch.tensor(0.75).double()]

    def test_each_backend(self, backend: str) -> None:
        params = {"a": torch.randn(3), "b": torch.randn(2).bfloat16(), "n": torch.tensor([1])}
        shadows = [emajit.init(params, dtype=torch.float32) for _ in self.DECAYS]
        shadows[0] = emajit.init(params)
        params = pytree.tree_map(lambda p: p + 1, params)
        expected = [
            emajit.update(s, params, 2, decay=d, backend=backend)
            for s, d in zip(shadows, self.DECAYS, strict=True)
        ]
        for step in range(2):
            found = emajit.update_many(shadows, params, 2, decays=self.DECAYS, backend=backend)
            assert_equal(expected, found)
            if step:
                emajit.update_many_(shadows, params, 2, decays=self.DECAYS, backend=backend)
        assert_equal(expected, shadows)

    def test_ties_stay_in_each(self) -> None:
        w = torch.ones(2)
        params = {"in": w, "out": w, "b": torch.ones(1)}
        shadows = [emajit.init(params) for _ in range(2)]
        for leaf in tensors(shadows):
            leaf.zero_()
        for step in range(2):
            emajit.update_many_(shadows, params, step, decays=[0.5, 0.75])
        assert [s["in"][0].item() for s in shadows] == [0.75, 0.4375]
        new = emajit.update_many(shadows, params, 0, decays=[0.5, 0.75])
        assert all(s["in"] is s["out"] for s in new)
        assert new[0]["in"] is not new[1]["in"]

    def test_none_at_all(self) -> None:
        assert emajit.update_many([], {"w": torch.ones(1)}, 0, decays=[]) == []

    @pytest.mark.parametrize(
        ("shadows", "message"),
        [
            (lambda s: s, "shadows: expected a list, found dict"),
            (lambda s: [s], "shadows: expected 2, as decays, found 1"),
            (lambda s: [s, s], r"shadows\[1\]\['w'\]: expected a tensor of its own"),
            (lambda s: [s, {"w": torch.zeros(3)}], r"^of shadows\[1\]: params\['w'\]: .* \(3,\)"),
            (lambda s: [s, {"v": torch.zeros(2)}], r"^of shadows\[1\]: .* lacks \['v'\]"),
        ],
    )
    def test_errors(self, shadows: Any, message: str) -> None:
        shadow = {"w": torch.zeros(2)}
        for update in (emajit.update_many, emajit.update_many_):
            with pytest.raises((TypeError, ValueError), match=message):
                update(shadows(shadow), {"w": torch.ones(2)}, 0, decays=[0.5, 0.75])
        assert not shadow["w"].any()


class TestRepeatedUpdates:
    """The second call on the same tensors checks less; what changed in between is noticed."""

    def test_ties_in_any_order(self) -> None:
        a, b, c = (torch.full((2,), float(i)) for i in range(3))
        params = {"p": a, "q": b, "r": a, "s": c, "t": b}
        shadow = emajit.init(params)
        for leaf in shadow.values():
            leaf.zero_()
        for step in range(3):
            emajit.update_(shadow, params, step, decay=0.5)
        assert [leaf[0].item() for leaf in shadow.values()] == [0.0, 0.875, 0.0, 1.75, 0.875]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda p: p.data.fill_(4.0), 2.5),
            (lambda p: setattr(p, "data", torch.full((4,), 4.0)), 2.5),
            (lambda p: setattr(p, "data", torch.full((4,), 4.0).bfloat16()), 2.5),
            (lambda p: setattr(p, "data", torch.full((4,), 4.0).double()), 2.5),
            (lambda p: setattr(p, "data", torch.full((4,), 4, dtype=torch.int32)), 4.0),
        ],
    )
    def test_parameters_that_change_in_place(self, change: Any, expected: float) -> None:
        params, shadow = {"w": nn.Parameter(torch.ones(4), requires_grad=False)}, {}
        shadow["w"] = torch.ones(4)
        for step in range(2):
            emajit.update_(shadow, params, step, decay=0.5)
        change(params["w"])
        emajit.update_(shadow, params, 2, decay=0.5)
        assert shadow["w"].tolist() == [expected] * 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda _, p: setattr(p, "data", p.data[:2]), r"expected shape \(4,\)"),
            (lambda _, p: setattr(p, "data", p.data.view(2, 2)), r"expected shape \(4,\)"),
            (lambda _, p: setattr(p, "data", p.data.view(torch.complex64)), "expected shape"),
            (lambda s, p: setattr(p, "data", s.data), "overlaps"),
            (lambda s, _: setattr(s, "data", s.data[:1].expand(4)), "memory of its own for each"),
        ],
    )
    def test_what_no_longer_fits_is_noticed(self, change: Any, message: str) -> None:
        shadow, params = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
        for step in range(2):
            emajit.update_(shadow, params, step, decay=0.5)
        change(shadow["w"], params["w"])
        with pytest.raises(ValueError, match=message):
            emajit.update_(shadow, params, 2, decay=0.5)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("decay", 1.5),
            ("decay", -0.5),
            ("decay", math.nan),
            ("step", -1),
            ("rounding", "up"),
            ("nonfinite", "ignore"),
            ("backend", "fast"),
        ],
    )
    def test_what_is_wrong_later_is_told(self, name: str, value: Any) -> None:
        shadow, params = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
        given: dict[str, Any] = {"step": 2, "decay": 0.5}
        for _ in range(2):
            emajit.update_(shadow, params, **given)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            emajit.update_(shadow, params, **{**given, name: value})
        assert shadow["w"].tolist() == [0.75] * 4

    @pytest.mark.parametrize("read_once", [False, True])
    def test_several_are_what_each_is(
        self, monkeypatch: pytest.MonkeyPatch, read_once: bool
    ) -> None:
        monkeypatch.setattr(_choose, "READ_ONCE", 0 if read_once else 10**9)
        params = {"a": torch.randn(3, 4), "b": torch.randn(5)}
        decays: list[Any] = [0.5, schedules.uniform(), torch.tensor(0.75).double()]
        shadows = [emajit.init(params) for _ in decays]
        alone = [emajit.init(params) for _ in decays]
        for step in range(4):
            for p in params.values():
                p.add_(1)
            emajit.update_many_(shadows, params, step, decays=decays)
            for shadow, decay in zip(alone, decays, strict=True):
                emajit.update_(shadow, params, step, decay=decay)
            assert_equal(alone, shadows)

    @pytest.mark.parametrize(
        ("decays", "message"),
        [
            ([0.5], "^shadows: expected 1, as decays, found 2"),
            ([], "^shadows: expected 0, as decays, found 2"),
            ([0.5] * 3, "^shadows: expected 3, as decays, found 2"),
            ([0.5, 1.5], "^decay: expected a number"),
            (0.5, "^decays: expected a list, found float"),
        ],
    )
    def test_another_list_of_decays_is_told(self, decays: Any, message: str) -> None:
        shadows, params = [{"w": torch.zeros(4)} for _ in range(2)], {"w": torch.ones(4)}
        for step in range(2):
            emajit.update_many_(shadows, params, step, decays=[0.5, 0.5])
        with pytest.raises((TypeError, ValueError), match=message):
            emajit.update_many_(shadows, params, 2, decays=decays)
        assert [s["w"].tolist() for s in shadows] == [[0.75] * 4] * 2

    def test_several_with_other_ties_are_refused_each_time(self) -> None:
        a, b, c = torch.zeros(2), torch.zeros(2), torch.zeros(2)
        shadows, one = [{"in": a, "out": b}, {"in": c, "out": c}], torch.ones(2)
        for step in range(3):
            with pytest.raises(ValueError, match="found another tie"):
                emajit.update_many_(shadows, {"in": one, "out": one}, step, decays=[0.5, 0.5])
        assert not any(leaf.any() for leaf in (a, b, c))

    def test_an_option_that_is_given_later_counts(self) -> None:
        shadow, params = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        for step in range(2):
            emajit.update_(shadow, params, step, decay=0.5)
        params["w"][0] = math.nan
        emajit.update_(shadow, params, 2, decay=0.5, nonfinite="skip")
        assert shadow["w"].tolist() == [0.75, 0.875]
        emajit.update_(shadow, params, 3, decay=0.5)
        assert shadow["w"][0].isnan()

    def test_inside_of_a_scope_each_call_is_refused(self) -> None:
        model = nn.Linear(2, 2)
        params, other = dict(model.named_parameters()), emajit.init(dict(model.named_parameters()))
        shadow = {name: torch.zeros_like(p) for name, p in other.items()}
        with emajit.ema_scope(model, other):
            for step in range(3):
                with pytest.raises(RuntimeError, match="outside of ema_scope"):
                    emajit.update_(shadow, params, step, decay=0.5)
        assert not any(leaf.any() for leaf in shadow.values())

    def test_one_tensor_twice_becomes_a_part_of_itself(self) -> None:
        shadow, both = {"a": torch.zeros(4), "b": torch.zeros(4)}, torch.ones(4)
        for step in range(2):
            emajit.update_(shadow, {"a": both, "b": both}, step, decay=0.5)
        with pytest.raises(ValueError, match=r"'b'\]: expected shape \(4,\)"):
            emajit.update_(shadow, {"a": both, "b": both[:1]}, 2, decay=0.5)

    def test_nothing_is_kept_alive(self) -> None:
        shadow, params = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
        alive = [weakref.ref(shadow["w"]), weakref.ref(params["w"])]
        emajit.update_(shadow, params, 0, decay=0.5)
        del shadow, params
        assert [ref() for ref in alive] == [None, None]


class Point(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Segment:
    start: Point
    length: Tensor


pytree.register_pytree_node(  # `register_dataclass` came with torch 2.7
    Segment,
    lambda segment: ([segment.start, segment.length], None),
    lambda children, _: Segment(*children),
    flatten_with_keys_fn=lambda segment: (
        [(pytree.GetAttrKey(name), getattr(segment, name)) for name in ("start", "length")],
        None,
    ),
)


class TestTrees:
    @pytest.mark.parametrize(
        "make",
        [
            lambda t: t,
            lambda t: {"a": t, "b": {"c": (t + 1, [t - 1])}},
            lambda t: Point(t, 2 * t),
            lambda t: Segment(Point(t, t + 1), t - 1),
            lambda t: OrderedDict(b=t, a=t + 1),
            lambda t: {"a": None, "b": [t, None]},
            lambda _: {},
        ],
        ids=["leaf", "nested", "namedtuple", "dataclass", "ordered", "none", "empty"],
    )
    def test_any_structure(self, make: Any, backend: str) -> None:
        shadow, params = make(torch.zeros(3)), make(torch.ones(3))
        expected = reference.update(shadow, params, 0.75)
        found = emajit.update(shadow, params, 0, decay=0.75, backend=backend)
        assert type(found) is type(shadow)
        assert_close(tensors(found), tensors(expected))
        emajit.update_(shadow, params, 0, decay=0.75, backend=backend)
        assert_close(tensors(shadow), tensors(expected))

    def test_dicts_match_by_key(self, backend: str) -> None:
        shadow = {"a": torch.zeros(2), "b": torch.ones(3)}
        params = {"b": torch.ones(3), "a": torch.ones(2)}
        new = emajit.update(shadow, params, 0, decay=0.75, backend=backend)
        assert {k: v.tolist() for k, v in new.items()} == {"a": [0.25] * 2, "b": [1.0] * 3}
        assert list(new) == ["a", "b"]

    def test_state_dict_with_integer_buffers(self, backend: str) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        shadow = emajit.init(model.state_dict())
        model(torch.randn(5, 2))
        emajit.update_(shadow, model.state_dict(), 0, decay=0.5, backend=backend)
        assert shadow["1.num_batches_tracked"].item() == 1
        assert_close(shadow["1.running_mean"], model.state_dict()["1.running_mean"] / 2)

    def test_ensemble_of_stack_module_state(self, backend: str) -> None:
        models = [nn.Linear(2, 3) for _ in range(4)]
        params, buffers = torch.func.stack_module_state(models)
        new = emajit.update(emajit.init(params), params, 0, decay=0.5, backend=backend)
        assert new["weight"].shape == (4, 3, 2)
        assert emajit.update(buffers, buffers, 0, decay=0.5) == {}

    def test_in_place_under_vmap(self) -> None:
        shadow, params = torch.zeros(3, 2), torch.arange(6.0).reshape(3, 2)

        def step(s: Tensor, p: Tensor) -> Tensor:
            return emajit.update_({"x": s}, {"x": p}, 0, decay=0.5)["x"]

        assert_equal(params / 2, torch.vmap(step)(shadow, params))

    def test_under_vmap(self) -> None:
        s, p = torch.zeros(3, 2), torch.arange(6.0).reshape(3, 2)
        found = torch.vmap(lambda a, b: emajit.update({"x": a}, {"x": b}, 0, decay=0.5)["x"])(s, p)
        assert_equal(p / 2, found)


class TestTies:
    def test_a_tied_leaf_is_updated_once_and_stays_tied(self, backend: str) -> None:
        weight = nn.Parameter(torch.ones(3))
        params = {"in": weight, "out": weight}
        shadow = emajit.init({"in": torch.zeros(3), "out": torch.zeros(3)})
        shadow["out"] = shadow["in"]
        pure = emajit.update(shadow, params, 0, decay=0.75, backend=backend)
        emajit.update_(shadow, params, 0, decay=0.75, backend=backend)
        for tree in (pure, shadow):
            assert tree["in"] is tree["out"]
            assert tree["in"].tolist() == [0.25] * 3

    def test_ties_of_a_state_dict_survive(self, backend: str) -> None:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        state = model.state_dict()
        assert state["a.weight"] is not state["b.weight"]
        shadow = emajit.init(state)
        assert shadow["a.weight"] is shadow["b.weight"]
        new = emajit.update(shadow, model.state_dict(), 0, decay=0.5, backend=backend)
        assert new["a.weight"] is new["b.weight"]
        views = {name: leaf.view_as(leaf) for name, leaf in new.items()}
        emajit.update_(views, model.state_dict(), 0, decay=0.5, backend=backend)

    def test_tied_shadow_of_untied_params_raises(self) -> None:
        leaf = torch.zeros(2)
        for update in (emajit.update, emajit.update_):
            with pytest.raises(ValueError, match=r"shadow\['b'\] and shadow\['a'\] are tied"):
                update({"a": leaf, "b": leaf}, {"a": leaf + 1, "b": leaf + 2}, 0, decay=0.5)
        assert leaf.tolist() == [0.0, 0.0]

    def test_views_of_one_memory_are_not_tied_to_each_other(self) -> None:
        base = torch.arange(4.0)
        shadow = emajit.init({"row": base[:2], "a": base, "b": base})
        assert shadow["a"] is shadow["b"]
        assert shadow["row"] is not shadow["a"]
        z = torch.tensor([1 + 2j])
        conjugate = emajit.init({"a": z, "b": z.conj(), "c": z.imag, "d": z.conj().imag})
        assert [leaf.item() for leaf in conjugate.values()] == [1 + 2j, 1 - 2j, 2.0, -2.0]

    def test_interleaved_views_are_compared_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base = torch.zeros(8, 8)
        shadow = [base[:, ::2], base[:, 1::2]]
        params = [torch.ones(8, 4), torch.ones(8, 4)]
        emajit.update_(shadow, params, 0, decay=0.5)
        monkeypatch.setattr(_alias, "share_memory", lambda *_: pytest.fail("compared again"))
        emajit.update_(shadow, params, 1, decay=0.5)

    def test_one_empty_leaf_twice(self) -> None:
        empty = torch.zeros(0)
        emajit.update_([empty, empty], [torch.zeros(0), torch.zeros(0)][:1] * 2, 0, decay=0.5)

    def test_empty_leaves_are_not_tied(self) -> None:
        params = {"a": torch.zeros(0), "b": torch.zeros(0)}
        shadow = emajit.update_(emajit.init(params), params, 0, decay=0.5)
        assert shadow["a"] is not shadow["b"]


class TestErrors:
    def test_swapped_arguments_are_refused(self) -> None:
        """`update_(params, shadow, 0, decay=0.0)` would make the model its own average."""
        model = nn.Linear(2, 2)
        params = dict(model.named_parameters())
        shadow = {name: torch.zeros_like(p) for name, p in params.items()}
        before = {name: p.detach().clone() for name, p in params.items()}
        message = r"shadow\['weight'\]: expected an average, found a tensor that requires grad"
        with pytest.raises(ValueError, match=message):
            emajit.update_(params, shadow, 0, decay=0.0)
        with pytest.raises(ValueError, match=r"shadows\[1\]\['weight'\]: expected an average"):
            emajit.update_many_([shadow, params], params, 0, decays=[0.5, 0.5])
        step = torch.compile(emajit.update_, fullgraph=True, backend="aot_eager")
        # Dynamo of torch 2.6 tells that something was raised, and not what
        with pytest.raises(Exception, match=r"expected an average, found a tensor|Observed exc"):
            step(params, shadow, torch.tensor(0), decay=0.0)
        for _ in range(2):
            emajit.update_(shadow, params, 0, decay=0.5)
        shadow["weight"].requires_grad_()  # noticed after a hit, too
        with pytest.raises(ValueError, match=message):
            emajit.update_(shadow, params, 0, decay=0.5)
        with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
            emajit.update_(params, shadow, 0, decay=0.0)
        assert_equal(before, {name: p.detach() for name, p in params.items()})

    def test_of_tied_leaves_the_one_that_requires_grad_is_named(self) -> None:
        w, p = torch.zeros(3, requires_grad=True), torch.zeros(3)
        with pytest.raises(ValueError, match=r"shadow\['b'\]: expected an average"):
            emajit.update_({"a": w.detach(), "b": w}, {"a": p, "b": p}, 0, decay=0.9)

    SHADOW: ClassVar[Any] = {"w": torch.zeros(2, 3), "n": None, "list": [torch.zeros(2)]}

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"w": torch.zeros(3, 2)},
                ValueError,
                r"params\['w'\]: expected shape \(2, 3\) as in shadow, found \(3, 2\)",
            ),
            ({"w": torch.zeros(1, 3)}, ValueError, r"params\['w'\]: expected shape \(2, 3\)"),
            (
                {"w": torch.zeros(2, 3, device="meta")},
                ValueError,
                r"params\['w'\]: expected device cpu as in shadow, found meta",
            ),
            (
                {"w": torch.zeros(2, 3) * 1j},
                ValueError,
                r"params\['w'\]: expected a number that torch.float32 .* found torch.complex64",
            ),
            ({"w": None}, ValueError, r"params\['w'\]: expected a tensor as in shadow, found None"),
            ({"n": torch.zeros(1)}, ValueError, r"params\['n'\]: expected None .* found a tensor"),
            ({"w": 1.0}, TypeError, r"params\['w'\]: expected a tensor or None, found float"),
            ({"more": torch.zeros(1)}, ValueError, r"found that it has \['more'\] too"),
            ({"list": [torch.zeros(2)] * 2}, ValueError, r"found that it has \['list'\]\[1\] too"),
            ({"w": {"a": torch.zeros(2, 3)}}, ValueError, r"\['w'\]: expected a tensor .* dict"),
            ({"list": []}, ValueError, r"found that it lacks \['list'\]\[0\]"),
            ({"list": (torch.zeros(2),)}, ValueError, r"structure of shadow, found another.*tuple"),
        ],
    )
    def test_mismatch(self, change: Any, error: type[Exception], message: str) -> None:
        params = {"w": torch.ones(2, 3), "n": None, "list": [torch.ones(2)]} | change
        for update in (emajit.update, emajit.update_):
            with pytest.raises(error, match=message):
                update(self.SHADOW, params, 0, decay=0.5)
            assert not any(leaf.any() for leaf in tensors(self.SHADOW))

    @pytest.mark.parametrize(
        ("param", "message"),
        [
            (torch.zeros(2, 3, device="meta"), "expected device cpu as in shadow, found meta"),
            (torch.zeros(3, 2), r"expected shape \(2, 3\) as in shadow, found \(3, 2\)"),
            (torch.zeros(2, 3) * 1j, "expected a number that torch.float32"),
        ],
    )
    def test_mismatch_in_a_flat_dict(self, param: Tensor, message: str) -> None:
        shadow = {"v": torch.zeros(1), "w": torch.zeros(2, 3)}
        for update in (emajit.update, emajit.update_):
            with pytest.raises(ValueError, match=rf"params\['w'\]: {message}"):
                update(shadow, {"v": torch.ones(1), "w": param}, 0, decay=0.5)
            assert not shadow["v"].any()

    def test_missing_leaf(self) -> None:
        params = {"w": torch.ones(2, 3), "list": [torch.ones(2)]}
        with pytest.raises(ValueError, match=r"found that it lacks \['n'\]"):
            emajit.update(self.SHADOW, params, 0, decay=0.5)

    def test_integer_shadow_of_a_float_parameter(self) -> None:
        with pytest.raises(
            ValueError, match=r"torch.int64 as in shadow can hold, found torch.float32"
        ):
            emajit.update(torch.zeros(2, dtype=torch.int64), torch.zeros(2), 0, decay=0.5)

    def test_a_shadow_of_inference_mode(self) -> None:
        with torch.inference_mode():
            frozen = torch.zeros(2)
            emajit.update_([frozen], [torch.ones(2)], 0, decay=0.5)
        shadow = {"a": torch.zeros(2), "b": frozen}
        params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}
        with pytest.raises(ValueError, match=r"shadow\['b'\]: .* torch.inference_mode\(\)"):
            emajit.update_(shadow, params, 0, decay=0.5)
        assert not shadow["a"].any()

    def test_a_negated_view(self) -> None:
        shadow = {"a": torch.zeros(2), "b": (1j * torch.ones(2)).conj().imag}
        assert shadow["b"].is_neg()
        params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}
        with pytest.raises(ValueError, match=r"shadow\['b'\]: .* found a negated view"):
            emajit.update_(shadow, params, 0, decay=0.5)
        assert not shadow["a"].any()

    @pytest.mark.parametrize(
        ("shadow", "params", "message"),
        [
            (
                lambda b: [b[:6], b[4:]],
                lambda _: [torch.ones(6), torch.ones(6)],
                r"shadow\[0\]: expected memory of its own, found that it overlaps shadow\[1\]",
            ),
            (lambda b: [b[:6]], lambda b: [b[2:8]], r"shadow\[0\]: .* overlaps params\[0\]"),
            (lambda b: [b[:2]], lambda b: [b[:2]], r"shadow\[0\]: .* overlaps params\[0\]"),
            (
                lambda b: [b[:1].expand(3)],
                lambda _: [torch.ones(3)],
                r"shadow\[0\]: .* found shape \(3,\) with strides \(0,\)",
            ),
            (
                lambda b: [b.as_strided((3, 4), (2, 1))],
                lambda _: [torch.ones(3, 4)],
                r"with strides \(2, 1\)",
            ),
        ],
    )
    def test_overlap(self, shadow: Any, params: Any, message: str) -> None:
        base = torch.zeros(10)
        with pytest.raises(ValueError, match=message):
            emajit.update_(shadow(base), params(base), 0, decay=0.5)
        assert not base.any()

    def test_interleaved_views_do_not_overlap(self, backend: str) -> None:
        base = torch.zeros(4, 4)
        shadow = [base[:, :2], base[:, 2:]]
        params = [torch.ones(4, 2), torch.full((4, 2), 2.0)]
        emajit.update_(shadow, params, 0, decay=0.0, backend=backend)
        assert base.tolist() == [[1.0, 1.0, 2.0, 2.0]] * 4

    def test_pure_update_may_read_what_overlaps(self) -> None:
        base = torch.arange(4.0)
        new = emajit.update([base[:3], base[1:]], [base[1:], base[:3]], 0, decay=0.5)
        assert [leaf.tolist() for leaf in new] == [[0.5, 1.5, 2.5]] * 2

    @pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf])
    def test_decay_out_of_range(self, decay: float) -> None:
        for given_decay in (decay, lambda _: decay):
            with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], found"):
                emajit.update(torch.zeros(1), torch.zeros(1), 0, decay=given_decay)

    def test_decay_tensor_that_is_no_scalar(self) -> None:
        with pytest.raises(ValueError, match=r"decay: expected a 0-d .* found shape \(1,\)"):
            emajit.update(torch.zeros(1), torch.zeros(1), 0, decay=torch.tensor([0.5]))
        with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], found 7.0"):
            emajit.update(torch.zeros(1), torch.zeros(1), 0, decay=torch.tensor(7.0))

    @pytest.mark.parametrize(
        ("step", "error", "message"),
        [
            (-1, ValueError, "step: expected the number of updates so far, >= 0, found -1"),
            (1.0, TypeError, "step: expected an int or a 0-d integer tensor, found 1.0"),
            (torch.tensor(1.0), ValueError, "step: .* found shape .* torch.float32"),
            (torch.tensor([1]), ValueError, r"step: .* found shape \(1,\)"),
        ],
    )
    def test_step(self, step: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            emajit.update(torch.zeros(1), torch.zeros(1), step, decay=0.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rounding": "up"}, "rounding: expected nearest or stochastic, found 'up'"),
            ({"nonfinite": "zero"}, "nonfinite: expected propagate or skip, found 'zero'"),
            ({"backend": "fast"}, "backend: expected auto or eager or inductor or .* found 'fast'"),
            ({"decay": 1.5}, r"decay: expected a number in \[0, 1\], found 1.5 at step 0"),
        ],
    )
    def test_options(self, options: Any, message: str) -> None:
        for update in (emajit.update, emajit.update_):
            with pytest.raises(ValueError, match=message):
                update(torch.zeros(1), torch.zeros(1), 0, **({"decay": 0.5} | options))

    @pytest.mark.parametrize("decay", ["0.9", None, schedules.warmup, lambda _: None])
    def test_decay_that_is_no_number(self, decay: Any) -> None:
        with pytest.raises(TypeError, match="expected a number, a 0-d tensor or a schedule, found"):
            emajit.update(torch.zeros(1), torch.zeros(1), 5, decay=lambda _: decay)

    def test_decay_of_numpy(self) -> None:
        np = pytest.importorskip("numpy", reason="numpy is not installed")
        found = emajit.update(torch.zeros(1), torch.ones(1), 0, decay=np.float32(0.25))
        assert found.item() == 0.75

    def test_a_product_of_a_small_step_does_not_overflow(self) -> None:
        def quadratic(step: Any) -> Any:
            return 1 - 1 / (2 + step * step / 1e9)  # 4.9e9 is more than an int32 holds

        zero, one = (torch.full((1,), value, dtype=torch.float64) for value in (0.0, 1.0))
        expected = 1 / (2 + 4.9)
        for step in (70_000, torch.tensor(70_000, dtype=torch.int32)):
            found = emajit.update(zero, one, step, decay=quadratic).item()
            assert found == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        "wrap", [lambda s: s, lambda s: schedules.every(s, 1)], ids=["bare", "every"]
    )
    def test_a_schedule_of_the_user_s_is_as_exact_for_a_tensor(self, wrap: Any) -> None:
        """A quotient of an integer tensor would be float32, and alpha off by 2e-4 of itself."""
        decay = wrap(lambda step: 1 - 1 / (step + 10_000))
        zero, one = (torch.full((1,), value, dtype=torch.float64) for value in (0.0, 1.0))
        for dtype in (torch.int32, torch.int64):
            step = torch.tensor(12_345, dtype=dtype)
            update = partial(emajit.update, decay=decay)
            traced = torch.compile(update, fullgraph=True, backend="aot_eager")
            for call in (update, traced):
                assert call(zero, one, step).item() == pytest.approx(1 / 22_345, rel=1e-11)

    def test_what_is_no_data_of_a_module_says_where_it_is(self) -> None:
        class TensorDictParams(nn.Module):  # tensordict's is a module, too
            def to_tensordict(self) -> None: ...

        model = TensorDictParams()
        with pytest.raises(TypeError, match="TensorDictParams; pass its `data`"):
            emajit.init(model)
        with pytest.raises(ValueError, match="TensorDictParams; pass its `data`"):
            emajit.update({"w": torch.ones(1)}, model, 0, decay=0.5)

    def test_what_is_no_tree(self) -> None:
        model = nn.Linear(2, 2)
        shadow = emajit.init(dict(model.named_parameters()))
        for params in (model, model.parameters(), model.named_parameters()):
            with pytest.raises(
                ValueError, match=r"params: expected dict as shadow, found .*; pass"
            ):
                emajit.update(shadow, params, 0, decay=0.5)
            with pytest.raises(TypeError, match=r"params: expected a tensor .*; pass dict\(model"):
                emajit.init(params)

    def test_sparse_leaves(self) -> None:
        sparse, dense = torch.eye(2).to_sparse(), torch.eye(2)
        for shadow, params in ((sparse, sparse), (dense, sparse), (sparse, dense)):
            for update in (emajit.update, emajit.update_):
                with pytest.raises(
                    ValueError, match=r"params\['w'\]: expected dense tensors, found"
                ):
                    update({"w": shadow}, {"w": params}, 0, decay=0.5)

    def test_a_class_without_names_for_its_children(self) -> None:
        class Pair:
            def __init__(self, *children: Tensor) -> None:
                self.children = children

        pytree.register_pytree_node(
            Pair, lambda pair: (list(pair.children), None), lambda children, _: Pair(*children)
        )
        new = emajit.update(Pair(torch.zeros(1)), Pair(torch.ones(1)), 0, decay=0.5)
        assert new.children[0].item() == 0.5
        with pytest.raises(ValueError, match=r"params<leaf 0>: expected shape \(1,\)"):
            emajit.update(Pair(torch.zeros(1)), Pair(torch.ones(2)), 0, decay=0.5)


class TestInit:
    def test_dtype_is_for_numbers_with_a_fraction(self) -> None:
        params = [torch.ones(1).half(), torch.ones(1, dtype=torch.complex128), torch.tensor([1])]
        dtypes = [leaf.dtype for leaf in emajit.init(params, dtype=torch.float32)]
        assert dtypes == [torch.float32, torch.complex64, torch.int64]

    def test_keeps_strides(self) -> None:
        p = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        assert emajit.init(p).stride() == p.stride()
        assert emajit.update(emajit.init(p), p, 0, decay=0.5).stride() == p.stride()

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="dtype: expected a floating-point dtype such as"):
            emajit.init(torch.ones(1), dtype=torch.int32)
        with pytest.raises(TypeError, match=r"params\['a'\]: expected a tensor .* found int"):
            emajit.init({"a": 1})

    def test_detached(self) -> None:
        shadow = emajit.init({"a": nn.Parameter(torch.ones(2))})
        assert type(shadow["a"]) is Tensor
        assert not shadow["a"].requires_grad
