"""Compilation: equal results, one graph for each structure, the user's own compiled step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import emajit
from emajit import _choose, _compile, _kernels, _rounding, _torch, schedules
from emajit._kernels import Update
from tests import reference, strategies
from tests.counting import Counting

auto_compiles_here = pytest.mark.skipif(
    not _torch.without_guards(), reason="before torch 2.8 auto compiles nothing on a CPU"
)


def test_freezing_and_options_do_not_exhaust_dynamo(counting: tuple[str, Counting]) -> None:
    name, counter = counting
    params = {f"{i}": nn.Parameter(torch.ones(2).bfloat16()) for i in range(12)}
    shadow = emajit.init(params, dtype=torch.float32)
    for step, p in enumerate(params.values()):
        emajit.update_(shadow, params, step, decay=0.5, backend=name)
        p.requires_grad_(False)
    detached = {key: p.detach() for key, p in params.items()}
    with torch.compiler.set_stance("fail_on_recompile"):
        emajit.update_(shadow, detached, 0, decay=0.5, backend=name)
    assert counter.graphs == 1
    emajit.update_(shadow, detached, 0, decay=0.5, backend=name, nonfinite="skip")
    assert counter.graphs == 2


def test_new_tensors_of_one_structure_share_a_graph(counting: tuple[str, Counting]) -> None:
    name, counter = counting
    for _ in range(20):
        shadow, params = ([torch.randn(3), torch.randn(4)] for _ in range(2))
        emajit.update(shadow, params, 0, decay=0.9, backend=name)
    assert counter.graphs == 1


def relaid(_: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    params["0"].data = params["0"].data.mT.contiguous().mT


def average_relaid(shadow: dict[str, Tensor], _: dict[str, Tensor]) -> None:
    shadow["0"] = shadow["0"].mT.contiguous().mT


def widened(_: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    params["0"].data = params["0"].data.double()


def negated(_: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    pairs = torch.view_as_complex(torch.randn(3, 4, 2))
    params["0"] = pairs.conj().imag  # by a bit beside the memory


def frozen(_: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    params["0"].requires_grad_(False)


def replaced_by_one(_: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    params["1"] = params["0"]


def forgotten(_: dict[str, Tensor], __: dict[str, Tensor]) -> None:
    torch.compiler.reset()


def of_inference(_: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        params["0"] = params["0"].clone()


@pytest.mark.parametrize("several", [1, 2])
def test_groups_of_a_large_model_share_a_graph(
    monkeypatch: pytest.MonkeyPatch, several: int
) -> None:
    monkeypatch.setattr(_choose, "GROUP_ELEMENTS", 1)
    params = {f"{i}": torch.randn(2 + i % 3).bfloat16() for i in range(80)}
    shadows = [emajit.init(params, dtype=torch.float32) for _ in range(several)]
    params = {name: p + 1 for name, p in params.items()}
    decays: Any = [0.5, 0.75][:several]
    expected = emajit.update_many(shadows, params, 0, decays=decays, backend="eager")
    made = _compile.kernel.cache_info().misses
    found = emajit.update_many(shadows, params, 0, decays=decays, backend="aot_eager")
    assert _compile.kernel.cache_info().misses == made + 2  # for those alike, for the rest
    assert_close(found, expected)
    emajit.update_many_(shadows, params, 0, decays=decays, backend="aot_eager")
    assert_close(shadows, expected)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_leaves_of_which_none_can_be_compiled(rounding: Any) -> None:
    shadow = {"n": torch.tensor([1]), "c": torch.zeros(2, dtype=torch.complex64)}
    params = {name: leaf + 2 for name, leaf in shadow.items()}
    emajit.update_(shadow, params, 0, decay=0.5, rounding=rounding, backend="aot_eager")
    assert shadow["n"].item() == 3
    assert shadow["c"].tolist() == [1, 1]


def test_a_few_elements_beside_many_that_no_graph_can_have() -> None:
    many = torch.zeros(_choose.WORTH_COMPILING, dtype=torch.complex64)
    few = torch.zeros(4)
    update = Update([many, few], [many + 1, few.bfloat16()], [0.1])
    kernels = [kernel for _, kernel in _choose.groups(update, "auto", in_place=True)]
    assert kernels == [_kernels.single_tensor_]


LAYOUTS = [relaid, average_relaid, widened, negated, replaced_by_one]
FLAGS = [frozen, forgotten, of_inference]  # code of Inductor is the same for them
CHANGES = [
    *((change, "aot_eager") for change in (*LAYOUTS, *FLAGS)),
    *(pytest.param(change, "inductor", marks=pytest.mark.inductor) for change in LAYOUTS),
    *(
        pytest.param(change, "inductor", marks=[pytest.mark.inductor, pytest.mark.slow])
        for change in FLAGS
    ),
]


@pytest.mark.parametrize(("change", "compiler"), CHANGES)
def test_what_changes_between_two_calls(
    change: Callable[[dict[str, Tensor], dict[str, Tensor]], None], compiler: str
) -> None:
    """A graph has no guards of dynamo's: what it was made for is told by its key."""
    params: dict[str, Tensor] = {
        name: nn.Parameter(torch.randn(3, 4).bfloat16()) for name in ("0", "1")
    }
    shadow = emajit.init(params, dtype=torch.float32)
    emajit.update_(shadow, params, 0, decay=0.5, backend=compiler)
    change(shadow, params)
    for _ in range(2):
        expected = emajit.update(shadow, params, 1, decay=0.5, backend="eager")
        pure = emajit.update(shadow, params, 1, decay=0.5, backend=compiler)
        emajit.update_(shadow, params, 1, decay=0.5, backend=compiler)
        assert_close(shadow, expected)
        assert_close(pure, expected)


class Scaled(Tensor):
    """A number beside the elements, as quantized weights have one."""

    held: Tensor
    scale: float

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, _: Any, args: Any, kwargs: Any = None
    ) -> Any:
        plain = [x.held * x.scale if isinstance(x, Scaled) else x for x in args]
        return func(*plain, **(kwargs or {}))


def scaled(held: Tensor, scale: float) -> Scaled:
    wrapper: Any = Tensor._make_wrapper_subclass
    new: Scaled = wrapper(Scaled, held.shape, dtype=held.dtype)
    new.held, new.scale = held, scale
    return new


def test_a_subclass_may_hold_what_no_graph_knows() -> None:
    for scale in (1.0, 3.0):
        params = [scaled(torch.ones(2), scale)]
        found = emajit.update([torch.zeros(2)], params, 0, decay=0.5, backend="aot_eager")
        assert found[0].tolist() == [0.5 * scale] * 2


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_views_in_stripes_of_one_buffer(compiler: str) -> None:
    for first in (0, 4, 2):
        buffer = torch.zeros(24)
        shadow = [buffer[first : first + 16 : 2], buffer[first + 1 : first + 17 : 2]]
        params = [torch.full((8,), 2.0), torch.full((8,), 4.0)]
        emajit.update_(shadow, params, 0, decay=0.5, backend=compiler)
        expected = torch.zeros(24)
        expected[first : first + 16] = torch.tensor([1.0, 2.0]).repeat(8)
        assert_close(buffer, expected)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_views_that_overlap_leave_no_graph_for_others(compiler: str) -> None:
    """Weights and averages in one buffer; of the weights two are one memory, as of tied layers."""
    buffer = torch.arange(24.0)
    shadow = {"a": buffer[:8], "b": buffer[8:16]}
    for _ in range(2):
        params = {"a": buffer[16:], "b": buffer[16:]}
        expected = {name: (shadow[name] + params[name]) / 2 for name in "ab"}
        emajit.update_(shadow, params, 0, decay=0.5, nonfinite="skip", backend=compiler)
        assert_close(shadow, expected)
    for seed in range(2):
        torch.manual_seed(seed)
        own, params = ({name: torch.randn(8) for name in "ab"} for _ in range(2))
        expected = {name: (own[name] + params[name]) / 2 for name in "ab"}
        emajit.update_(own, params, 0, decay=0.5, nonfinite="skip", backend=compiler)
        assert_close(own, expected)


def test_weights_and_averages_of_two_dtypes_in_one_buffer(counting: tuple[str, Counting]) -> None:
    name, counter = counting
    raw = torch.zeros(8 * 6, dtype=torch.uint8)
    shadow, params = {"w": raw[16:].view(torch.float32)}, {"w": raw[:16].view(torch.bfloat16)}
    params["w"].fill_(2.0)
    emajit.update_(shadow, params, 0, decay=0.5, backend=name)
    assert shadow["w"].tolist() == [1.0] * 8
    assert counter.graphs == 0


def test_the_weights_of_a_compiled_optimizer(counting: tuple[str, Counting]) -> None:
    """torch.compile marks them static, and makes a constant of what is so marked."""
    name, counter = counting
    for value in (1.0, 5.0, 9.0):
        weight = nn.Parameter(torch.full((3,), value))
        weight.grad = torch.zeros(3)
        torch.compile(torch.optim.SGD([weight]).step, backend="eager")()
        shadow = {"w": torch.zeros(3)}
        emajit.update_(shadow, {"w": weight}, 0, decay=0.0, backend=name)
        assert shadow["w"].tolist() == [value] * 3
        weight.data = torch.zeros(3)
        emajit.update_(shadow, {"w": weight}, 1, decay=0.5, backend=name)
        assert shadow["w"].tolist() == [value / 2] * 3
    assert counter.graphs == 1
    torch.compiler.reset()
    weights = [nn.Parameter(torch.full((3,), value)) for value in (1.0, 5.0)]
    for weight in weights:
        torch._dynamo.mark_static_address(weight)
        shadow = {"w": torch.zeros(3)}
        emajit.update_(shadow, {"w": weight}, 0, decay=0.0, backend=name)
        assert torch.equal(shadow["w"], weight)


def test_two_averages_of_one_parameter_or_of_two() -> None:
    a, b = torch.ones(3), torch.full((3,), 2.0)
    for params in ([a, a], [a, b], [b, a], [a, a]):
        shadow = [torch.zeros(3), torch.zeros(3)]
        emajit.update_(shadow, params, 0, decay=0.5, backend="aot_eager")
        assert_close(shadow, [0.5 * p for p in params])
        both = [{"w": torch.zeros(3)}, {"w": torch.zeros(3)}]
        emajit.update_many_(both, {"w": params[0]}, 0, decays=[0.5, 0.75], backend="aot_eager")
        assert_close(both, [{"w": 0.5 * params[0]}, {"w": 0.25 * params[0]}])


def test_equal_decays_of_one_call_differ_at_the_next(counting: tuple[str, Counting]) -> None:
    name, counter = counting
    both = [{"w": torch.zeros(2)}, {"w": torch.zeros(2)}]
    for decays in ([0.5, 0.5], [0.0, 1.0]):
        before = [{"w": s["w"].clone()} for s in both]
        emajit.update_many_(both, {"w": torch.ones(2)}, 0, decays=decays, backend=name)
        for s, old, decay in zip(both, before, decays, strict=True):
            assert_close(s["w"], decay * old["w"] + (1 - decay))
    assert counter.graphs == 1


def test_one_graph_for_both_ends(counting: tuple[str, Counting]) -> None:
    """At decay 1/2 and below the equation starts from the parameter, exact for decay 0."""
    name, counter = counting
    shadow, params = {"w": torch.full((2,), 1e8)}, {"w": torch.ones(2)}
    for decay in (1.0, 0.75, 0.5, 0.0):
        expected = emajit.update(shadow, params, 0, decay=decay, backend="eager")
        emajit.update_(shadow, params, 0, decay=decay, backend=name)
        assert_close(shadow, expected)
    assert shadow["w"].tolist() == [1.0, 1.0]
    assert counter.graphs == 1


def test_a_mixed_tree_is_one_graph(counting: tuple[str, Counting]) -> None:
    name, counter = counting
    shadow = [torch.zeros(2, dtype=d) for d in strategies.DTYPES]
    params = [torch.ones(2, dtype=d) for d in strategies.DTYPES]
    found = emajit.update(shadow, params, 0, decay=0.75, backend=name)
    assert counter.graphs == 1
    for leaf in found:
        whole = leaf.dtype in strategies.WHOLE
        assert leaf.tolist() == ([1, 1] if whole else [0.25, 0.25])


@pytest.mark.inductor
@pytest.mark.parametrize("nonfinite", ["propagate", pytest.param("skip", marks=pytest.mark.slow)])
def test_inductor_is_the_equation(nonfinite: Any) -> None:
    """Within the units in the last place that tests/test_properties.py allows eager mode."""
    half = {torch.bfloat16, torch.float16}  # Inductor warns where the two are mixed
    mixes = [(s, p) for s in strategies.FLOATS for p in strategies.FLOATS if {s, p} != half]
    kinds = strategies.LAYOUTS
    leaves = [
        (
            strategies.layout(strategies.random((2, 3, 4, 8), s, i), kinds[i % 4]),
            strategies.layout(strategies.random((2, 3, 4, 8), p, i + 99), kinds[i // 2 % 4]),
        )
        for i, (s, p) in enumerate(mixes)
    ]
    leaves += [(torch.zeros(()), torch.ones(())), (torch.zeros(0), torch.ones(0))]
    leaves += [(torch.zeros(()).double(), torch.ones(()).double())]
    shadow, params = [s for s, _ in leaves], [p for _, p in leaves]
    for step in (0, torch.tensor(7)):
        decay = schedules.warmup(0.99)
        options: Any = {"decay": decay, "nonfinite": nonfinite, "backend": "inductor"}
        found = emajit.update(shadow, params, step, **options)
        reference.assert_within(2, found, shadow, params, float(decay(step)))
        assert [f.stride() for f in found] == [torch.empty_like(s).stride() for s in shadow]
        emajit.update_(shadow, params, step, **options)
        assert_close(shadow, found, rtol=0, atol=0)


@pytest.mark.inductor
@auto_compiles_here
def test_auto_compiles_what_would_need_temporaries() -> None:
    shadow = torch.zeros(_choose.WORTH_COMPILING)
    before = _compile.kernel.cache_info().misses
    emajit.update_(shadow, torch.ones_like(shadow), 0, decay=0.75)
    assert _compile.kernel.cache_info().misses == before
    emajit.update_(shadow, torch.ones_like(shadow).bfloat16(), 0, decay=0.75)
    assert _compile.kernel.cache_info().misses == before + 1
    assert shadow[:2].tolist() == [0.4375, 0.4375]


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compiled_train_step(compiler: str) -> None:
    """One graph, no recompile over 200 steps, and the shadow of the uncompiled loop."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(32, 4)
    y = x.sum(1, keepdim=True).sin()

    def train_step(params: Any, shadow: Any, step: Tensor) -> tuple[Any, Any]:
        grads = grad(lambda q: (functional_call(model, q, (x,)) - y).pow(2).mean())(params)
        params = {name: p - 0.1 * grads[name] for name, p in params.items()}
        return params, emajit.update(shadow, params, step, decay=schedules.warmup(0.99))

    def run(train: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
        params: Any = {name: p.detach().clone() for name, p in model.named_parameters()}
        params, shadow = train(params, emajit.init(params), torch.tensor(0))
        with torch.compiler.set_stance("fail_on_recompile"):
            for step in range(1, 200):
                params, shadow = train(params, shadow, torch.tensor(step))
        return params, shadow

    compiled = run(torch.compile(train_step, fullgraph=True, backend=compiler))
    plain = run(train_step)
    assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain[1]["0.weight"], plain[0]["0.weight"])


def test_several_averages_are_one_graph(counting: tuple[str, Counting]) -> None:
    name, counter = counting
    decays: list[Any] = [schedules.warmup(0.99), 0.9, torch.tensor(0.5).double()]
    params = {"a": torch.randn(5), "b": torch.randn(3).bfloat16()}
    shadows = [emajit.init(params, dtype=torch.float32) for _ in decays]
    params = {key: p + 1 for key, p in params.items()}
    for step in (0, torch.tensor(1), 2):
        expected = emajit.update_many(shadows, params, step, decays=decays, backend="eager")
        emajit.update_many_(shadows, params, step, decays=decays, backend=name)
        assert_close(shadows, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(50):  # values that coincide, and that change their order
            several: list[Any] = [schedules.warmup(0.5), schedules.uniform(), 0.5]
            emajit.update_many_(shadows, params, step, decays=several, backend=name)
    assert counter.graphs == 1


def test_several_averages_inside_a_trace() -> None:
    step = torch.compile(emajit.update_many, fullgraph=True, backend="aot_eager")
    shadows = [{"w": torch.zeros(2)}, {"w": torch.zeros(2)}]
    new = step(shadows, {"w": torch.ones(2)}, torch.tensor(0), decays=[0.5, schedules.uniform()])
    assert [s["w"].tolist() for s in new] == [[0.5, 0.5], [1.0, 1.0]]


def test_in_place_and_ties_inside_a_trace() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(shadow: Any, params: Any, n: Tensor) -> Any:
        emajit.update_(shadow, params, n, decay=schedules.warmup(0.9))
        return emajit.update(shadow, params, n, decay=0.5), emajit.init(params)

    leaf, param = torch.zeros(3), nn.Parameter(torch.ones(3))
    shadow, params = {"a": leaf, "b": leaf, "n": None}, {"a": param, "b": param, "n": None}
    new, fresh = step(shadow, params, torch.tensor(0))
    assert_close(leaf, torch.full((3,), 9 / 11))
    assert new["a"] is new["b"]
    assert_close(new["a"], torch.full((3,), 10 / 11))
    assert fresh["a"].tolist() == [1.0] * 3


def test_mixed_dtypes_and_tied_state_dicts_inside_a_trace() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).bfloat16()
    model["b"].weight = model["a"].weight
    shadow = emajit.init(model.state_dict(), dtype=torch.float32)
    expected = emajit.update(shadow, model.state_dict(), 0, decay=0.5)
    step = torch.compile(emajit.update, fullgraph=True, backend="aot_eager")
    found = step(shadow, model.state_dict(), torch.tensor(0), decay=0.5)
    assert_close(found, expected)
    assert found["a.weight"] is found["b.weight"]


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="Dynamo of torch 2.6 compiles a graph for each int"
)
def test_int_steps_inside_a_trace() -> None:
    """They recompile while dynamo learns that the step varies, and are right."""
    step = torch.compile(emajit.update, fullgraph=True, backend="aot_eager")
    shadow = torch.zeros(3)
    for n in range(12):
        shadow = step(shadow, torch.ones(3), n, decay=schedules.warmup(0.9))
    expected = torch.zeros(3)
    for n in range(12):
        expected = emajit.update(expected, torch.ones(3), n, decay=schedules.warmup(0.9))
    assert_close(shadow, expected)


def test_mismatch_inside_a_trace_raises() -> None:
    step = torch.compile(lambda s, p: emajit.update(s, p, 0, decay=0.5), backend="aot_eager")
    with pytest.raises(Exception, match=r"expected shape \(2,\)"):
        step({"a": torch.zeros(2)}, {"a": torch.zeros(3)})


class Scheduled(Exception):  # noqa: N818, no error
    """The kernels that Inductor would make of a graph, on a device that has Triton."""


def kernels_of(function: Callable[..., Any], *arguments: Any) -> list[int]:
    """How many leaves each kernel has that Inductor plans; none is generated, without a GPU."""
    from torch._inductor import graph, scheduler  # noqa: PLC0415
    from torch._inductor.codegen.common import BackendFeature  # noqa: PLC0415
    from torch._inductor.codegen.triton import TritonScheduling  # noqa: PLC0415

    has_feature = graph.GraphLowering.has_feature
    planned: list[int] = []

    def generate(self: Any) -> None:
        planned.extend(len(getattr(node, "snodes", [node])) for node in self.nodes)
        raise Scheduled

    with pytest.MonkeyPatch.context() as gpu:
        gpu.setattr(
            graph.GraphLowering,
            "has_feature",
            lambda *of: of[2] == BackendFeature.FOREACH or has_feature(*of),
        )
        gpu.setattr(scheduler.Scheduler, "get_backend", cache(lambda of, _: TritonScheduling(of)))
        gpu.setattr(scheduler.Scheduler, "codegen", generate)
        torch.compiler.reset()
        fresh = torch._inductor.config.patch(fx_graph_cache=False)
        whole = torch._functorch.config.patch(enable_autograd_cache=False)
        with fresh, whole, pytest.raises(Exception, match="Scheduled"):
            torch.compile(function, fullgraph=True, dynamic=False)(*arguments)
    return planned


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("update", "dtypes", "options", "others"),
    [
        (emajit.update_, (torch.float32, torch.float32), {}, 0),
        (emajit.update, (torch.float32, torch.bfloat16), {}, 0),
        (emajit.update, (torch.bfloat16, torch.bfloat16), {"nonfinite": "skip"}, 0),
        # and what all leaves share: the hash of the step
        (emajit.update_, (torch.bfloat16, torch.float32), {"rounding": "stochastic"}, 3),
    ],
)
def test_one_kernel_for_all_leaves_of_a_precision(
    update: Any, dtypes: tuple[torch.dtype, torch.dtype], options: Any, others: int
) -> None:
    """In the user's own compiled step, whose decay is a tensor, without an option of Inductor."""
    leaves = 12
    shadow, params = (
        {str(i): torch.randn(3 + i % 5, 4).to(dtype) for i in range(leaves)} for dtype in dtypes
    )

    def step(shadow: Any, params: Any, n: Tensor) -> Any:
        return update(shadow, params, n, decay=schedules.warmup(0.9), **options)

    kernels = kernels_of(step, shadow, params, torch.tensor(3))
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    most = 1 if version >= (2, 12) else 2  # older ones take a second one for noise
    assert 1 <= kernels.count(leaves) <= most
    assert len(kernels) <= most + others


@pytest.mark.inductor
def test_under_a_mode_that_sees_each_operator() -> None:
    """Compiled code does not run there; nothing is applied twice, and later it does again."""
    shadow = {"w": torch.zeros(_choose.WORTH_COMPILING + 1), "v": torch.zeros(1)}
    params = {"w": torch.ones(_choose.WORTH_COMPILING + 1).bfloat16(), "v": torch.ones(1)}
    mode = FlopCounterMode(display=False)
    contexts: list[Any] = [mode, nullcontext(), mode, nullcontext()]
    for step, context in enumerate(contexts):
        with context:
            emajit.update_(shadow, params, step, decay=0.75)
        assert {leaf[0].item() for leaf in shadow.values()} == {1 - 0.75 ** (step + 1)}
    with mode:
        emajit.update_(shadow, params, 0, decay=0.0, backend="inductor")
    assert shadow["w"][0] == 1


@pytest.mark.inductor
@auto_compiles_here
def test_what_does_not_compile_is_not_half_applied() -> None:
    shadow = {"v": torch.zeros(1), "w": torch.zeros(_choose.WORTH_COMPILING + 7)}
    params = {name: torch.ones_like(leaf) for name, leaf in shadow.items()}
    params["w"] = params["w"].bfloat16()
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        emajit.update_(shadow, params, 0, decay=0.75)
    assert not any(leaf.any() for leaf in shadow.values())


WITHOUT_COMPILER = """
import torch, warnings, emajit
from emajit import _choose
shadow = torch.zeros(_choose.WORTH_COMPILING)
params = torch.ones_like(shadow).bfloat16()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(3):
        emajit.update_(shadow, params, step, decay=0.75)
    for size in (1, 2):
        other = torch.zeros(_choose.WORTH_COMPILING + size)
        emajit.update_(other, torch.ones_like(other).bfloat16(), 0, decay=0.75)
        assert other[:2].tolist() == [0.25] * 2
told = [str(w.message) for w in caught if "emajit" in str(w.message)]
assert len(told) == 1 and "without a compiler on cpu: torch.compile failed" in told[0], told
assert shadow[:2].tolist() == [1 - 0.75**3] * 2
try:
    emajit.update_(shadow, params, 3, decay=0.75, backend="inductor")
except Exception as error:
    print("raised", type(error).__name__)
"""


@pytest.mark.inductor
@auto_compiles_here
@pytest.mark.parametrize(
    "environment",
    [
        {"CXX": "{}/none", "TORCHINDUCTOR_CACHE_DIR": "{}"},
        {"TORCHINDUCTOR_CACHE_DIR": "{}/file/cache"},
        {"TORCHINDUCTOR_CACHE_DIR": "/proc/cache"},  # where not even root can write
    ],
    ids=["no compiler", "no cache folder", "read-only disk"],
)
def test_without_a_compiler_auto_warns_once(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env=os.environ | {name: value.format(tmp_path) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("raised")


@pytest.mark.inductor
@auto_compiles_here
def test_a_disk_that_fills_up_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can no longer be compiled runs eager, after one warning; plans from before go on."""
    monkeypatch.setattr(_compile, "_without_compiler", set())
    before = [torch.zeros(_choose.WORTH_COMPILING + 5)]
    ones = [torch.ones_like(before[0]).bfloat16()]
    emajit.update_(before, ones, 0, decay=0.75)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    shadow = torch.zeros(_choose.WORTH_COMPILING + 3)
    params = torch.ones_like(shadow).bfloat16()
    with pytest.warns(RuntimeWarning, match="goes on without a compiler on cpu: .*Not a dir"):
        emajit.update_(shadow, params, 0, decay=0.75)
    emajit.update_(shadow, params, 1, decay=0.75)
    assert shadow[:2].tolist() == [0.4375, 0.4375]
    scalars = Mock(side_effect=_compile.scalars)  # for graphs only
    monkeypatch.setattr(_compile, "scalars", scalars)
    emajit.update_(before, ones, 1, decay=0.75)
    assert before[0][:2].tolist() == [0.4375, 0.4375]
    assert scalars.call_count == 1
    with pytest.raises((OSError, RuntimeError), match="Not a directory"):
        emajit.update(shadow, params, 2, decay=0.75, backend="inductor")


@auto_compiles_here
def test_a_python_that_torch_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*_: Any, **__: Any) -> Any:  # noqa: A001
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(_compile, "_without_compiler", set())
    shadow = torch.zeros(_choose.WORTH_COMPILING + 9)
    params = torch.ones_like(shadow).bfloat16()
    with pytest.warns(RuntimeWarning, match=r"without a compiler on cpu: .* on Python 3\.99"):
        emajit.update_(shadow, params, 0, decay=0.75)
    emajit.update_(shadow, params, 1, decay=0.75)
    assert shadow[:2].tolist() == [0.4375, 0.4375]
    with pytest.raises(RuntimeError, match="not supported on Python"):
        emajit.update_(shadow, params, 2, decay=0.75, backend="inductor")
    assert shadow[:2].tolist() == [0.4375, 0.4375]


@auto_compiles_here
def test_an_interrupt_after_the_compiler_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves are then written in their order, not in that of graphs: the last one last."""
    monkeypatch.setattr(_compile, "_without_compiler", {"cpu"})
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 4)).bfloat16()
    ema = emajit.LitEma(model, rounding="stochastic", decay=schedules.constant(0.9))
    ema(model)
    for p in model.parameters():
        nn.init.ones_(p)
    stochastic, sizes = _rounding.stochastic, []

    def interrupted(base: Tensor, *rest: Any) -> Tensor:
        sizes.append(base.numel())
        if len(sizes) == 4:
            raise KeyboardInterrupt
        return stochastic(base, *rest)

    monkeypatch.setattr(_rounding, "stochastic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ema(model)
    assert sizes == [2**18, 512, 2048, 4]
    assert ema.num_updates.item() == 1


def test_import_is_light() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import emajit;"
        "print([m for m in set(sys.modules) - before if not m.startswith('emajit')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = ("torch._dynamo", "torch._inductor", "numpy", "typer", "rich", "matplotlib")
    assert not [name for name in heavy if name in done.stdout]
