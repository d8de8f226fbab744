"""A module whose parameters are the averages."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.func import functional_call
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

import emajit
from emajit import LitEma, averaged_module


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1))


def image() -> Tensor:
    return torch.randn(2, 1, 5, 5)


def train(model: nn.Module) -> None:
    model.train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def shadow_of(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return emajit.init(dict(model.named_parameters()), dtype=dtype)


def update(shadow: dict[str, Tensor], model: nn.Module) -> None:
    train(model)
    emajit.update_(shadow, dict(model.named_parameters()), 0, decay=0.5)


def test_follows_every_update_without_a_copy() -> None:
    model = convolutional()
    shadow, x = shadow_of(model), image()
    teacher = averaged_module(model, shadow).eval()
    assert type(teacher) is type(model)
    for name, p in teacher.named_parameters():
        assert p.data_ptr() == shadow[name].data_ptr()
        assert not p.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    for _ in range(3):
        update(shadow, model)
        model.eval()
        assert_close(teacher(x), functional_call(model, shadow, (x,)), rtol=0, atol=0)
    trained = model(x)
    assert not torch.equal(teacher(x), trained)
    assert_close(model(x), trained, rtol=0, atol=0)


def test_follows_a_litema() -> None:
    model, x = convolutional(), image()
    ema = LitEma(model, decay=0.5, buffers="average")
    teacher = averaged_module(model, ema.named_averages()).eval()
    for _ in range(3):
        train(model)
        model(x)
        ema(model)
        model.eval()
        with ema.ema_scope(model):
            expected = model(x)
        assert_close(teacher(x), expected, rtol=0, atol=0)


class TestBuffers:
    def test_are_the_shadow_s_where_it_has_them(self) -> None:
        model = convolutional()
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        shadow = emajit.init(state)
        teacher = averaged_module(model, shadow)
        model(image())
        emajit.update_(shadow, state, 0, decay=0.0)
        assert_close(dict(teacher.named_buffers()), dict(model.named_buffers()))
        assert (
            teacher.get_buffer("1.running_mean").data_ptr() == shadow["1.running_mean"].data_ptr()
        )

    def test_are_else_copies(self) -> None:
        """A teacher in training mode does not write the statistics of the model."""
        model = convolutional()
        teacher = averaged_module(model, shadow_of(model))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        teacher(image())
        assert teacher.get_buffer("1.num_batches_tracked") == 1
        assert_close(dict(model.named_buffers()), before)

    def test_in_eval_the_shadow_stays(self) -> None:
        model = convolutional()
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        shadow = emajit.init(state)
        before = {name: average.clone() for name, average in shadow.items()}
        averaged_module(model, shadow).eval()(image())
        assert_close(shadow, before, rtol=0, atol=0)


class TestForwardsThatWrite:
    def test_a_bounded_norm_is_that_of_the_averages(self) -> None:
        """An embedding writes its weight in place, which here is the average."""
        model = nn.Embedding(2, 2, max_norm=1.0)
        shadow = {"weight": torch.full((2, 2), 2.0)}
        teacher, before = averaged_module(model, shadow), model.weight.detach().clone()
        teacher(torch.tensor([0]))
        assert_close(shadow["weight"].norm(dim=1), torch.tensor([1.0, 8.0**0.5]))
        assert torch.equal(model.weight, before)

    def test_a_weight_that_is_given_other_memory_follows_no_longer(self) -> None:
        class Bounded(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:  # noqa: A002, its name in torch
                self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
                return super().forward(input)

        model = Bounded(2, 2, bias=False)
        shadow = {"weight": torch.full((2, 2), 2.0)}
        teacher = averaged_module(model, shadow)
        first = teacher(torch.ones(2))
        assert shadow["weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
        shadow["weight"].fill_(-2.0)
        assert torch.equal(teacher(torch.ones(2)), first)


class TestCompilers:
    def test_compiled_once(self) -> None:
        model, x = convolutional().eval(), image()
        shadow = shadow_of(model)
        teacher = torch.compile(averaged_module(model, shadow), fullgraph=True, backend="aot_eager")
        teacher(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                update(shadow, model)
                model.eval()
                assert_close(teacher(x), functional_call(model, shadow, (x,)))

    @pytest.mark.inductor
    def test_compiled_with_inductor(self) -> None:
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        shadow = shadow_of(model)
        teacher = torch.compile(averaged_module(model, shadow), fullgraph=True)
        for _ in range(2):
            assert_close(teacher(x), functional_call(model, shadow, (x,)))
            update(shadow, model)

    def test_of_a_compiled_model(self) -> None:
        model = torch.compile(convolutional(), backend="eager")
        teacher = averaged_module(model, shadow_of(model))  # type: ignore[arg-type]
        assert isinstance(teacher, nn.Sequential)
        assert [*dict(teacher.named_parameters())] == [*shadow_of(convolutional())]

    def test_of_a_data_parallel_model(self) -> None:
        model = convolutional()
        init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
            teacher = averaged_module(wrapped, shadow_of(wrapped))
            assert isinstance(teacher, nn.Sequential)
            update(shadow := shadow_of(model), wrapped.module)
            assert isinstance(averaged_module(wrapped, shadow), nn.Sequential)
        finally:
            destroy_process_group()

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace")
    def test_exported(self) -> None:
        model, x = convolutional(), image()
        shadow = shadow_of(model)
        update(shadow, model)
        teacher = averaged_module(model, shadow).eval()
        expected = teacher(x)
        exported = torch.export.export(teacher, (x,))
        trace: Any = torch.jit.trace
        traced = trace(teacher, (x,))
        update(shadow, model)
        assert_close(exported.module()(x), teacher(x))
        assert not torch.equal(teacher(x), expected)
        assert_close(traced(x), teacher(x))


class TestCopies:
    def test_deep_copies_stand_still(self, tmp_path: Path) -> None:
        model, x = convolutional(), image()
        shadow = shadow_of(model)
        teacher = averaged_module(model, shadow).eval()
        expected = teacher(x)
        torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
        for copied in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
            update(shadow, model)
            assert_close(copied(x), expected, rtol=0, atol=0)
        other = convolutional().eval()
        other.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
        assert_close(other(x), expected)

    def test_tied_parameters_stay_tied(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        teacher: Any = averaged_module(model, shadow_of(model))
        assert teacher[1].weight is teacher[0].weight

    def test_frozen_parameters_are_shared(self) -> None:
        model = convolutional()
        model[0].requires_grad_(False)
        shadow = emajit.init({n: p for n, p in model.named_parameters() if p.requires_grad})
        teacher: Any = averaged_module(model, shadow)
        assert teacher[0].weight is model[0].weight
        assert teacher[1].weight is not model[1].weight

    def test_a_list_of_weights_is_that_of_the_averages(self) -> None:
        """An LSTM keeps its weights in a list beside its parameters."""
        model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
        shadow = shadow_of(model)
        teacher = averaged_module(model, shadow)
        update(shadow, model)
        assert_close(teacher(x)[0], functional_call(model, shadow, (x,))[0])

    def test_a_weight_that_is_computed(self) -> None:
        model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        x = torch.randn(1, 3)
        shadow = shadow_of(model)
        teacher = averaged_module(model, shadow)
        update(shadow, model)
        assert_close(teacher(x), functional_call(model, shadow, (x,)))

    def test_a_weight_that_is_computed_once(self) -> None:
        """Within `parametrize.cached`, whose key is the model's in torch's own deep copies."""
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
        x, shadow = torch.randn(1, 3), shadow_of(model)
        teacher = averaged_module(model, shadow)
        train(model)
        with nn.utils.parametrize.cached():
            trained = model(x)
            found = teacher(x)
            assert_close(model(x), trained)
        assert_close(found, teacher(x))
        assert not torch.allclose(found, trained)

    def test_a_weight_that_a_hook_has_computed(self) -> None:
        model, x = nn.Linear(3, 2), torch.randn(1, 3)
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model)
        model(x)  # `weight` is no leaf now, which torch does not deep-copy
        shadow = shadow_of(model)
        teacher = averaged_module(model, shadow)
        update(shadow, model)
        assert_close(teacher(x), functional_call(model, shadow, (x,)))

    def test_a_method_that_was_put_in_place_computes_with_the_averages(self) -> None:
        model, x = nn.Linear(3, 2), torch.randn(1, 3)
        model.forward = model.forward  # type: ignore[method-assign]
        shadow = shadow_of(model)
        teacher = averaged_module(model, shadow)
        update(shadow, model)
        assert_close(teacher(x), nn.functional.linear(x, shadow["weight"], shadow["bias"]))

    @pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # of torch 2.15 itself
    @pytest.mark.parametrize("make", ["script", "trace", "own"])
    def test_of_a_class_that_copies_itself_in_its_own_way(self, make: str) -> None:
        class Own(nn.Linear):
            def __deepcopy__(self, memo: dict[int, Any]) -> Own:
                new = Own(3, 2)
                new.load_state_dict(self.state_dict())
                return new

        x, plain = torch.randn(4, 3), nn.Sequential(Own(3, 2), nn.BatchNorm1d(2)).eval()
        plain[1].bias.requires_grad_(False)
        made: dict[str, Any] = {
            "script": lambda: torch.jit.script(plain),
            "trace": lambda: torch.jit.trace(plain, x),  # type: ignore[no-untyped-call]
            "own": lambda: plain,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of TorchScript
            model = nn.Sequential(made[make]())
        ema = LitEma(model, decay=0.5)
        teacher = averaged_module(model, ema.named_averages()).eval()
        train(model)
        ema(model)
        with torch.no_grad(), ema.ema_scope(model.eval()):
            expected = model(x)
        assert_close(teacher(x), expected, rtol=0, atol=0)
        assert not any(p.requires_grad for p in teacher.parameters())
        held = {p.data_ptr() for p in teacher.parameters()}
        assert {a.data_ptr() for a in ema.named_averages().values()} < held

    def test_of_a_class_that_loses_its_weights_is_refused(self) -> None:
        class Loses(nn.Linear):
            def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
                return nn.Linear(1, 1)

        model = nn.Sequential(Loses(3, 2))
        with pytest.raises(ValueError, match=r"expected 0\.weight in a deep copy, found a copy of"):
            averaged_module(model, shadow_of(model))

    def test_a_closure_over_a_layer_is_told(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        first = model[0]
        model[1].register_forward_pre_hook(lambda _, given: (first(given[0]),))
        with pytest.warns(UserWarning, match=r"1: expected functions .*<lambda>"):
            averaged_module(model, shadow_of(model))


class TestDtype:
    def test_is_the_shadow_s(self) -> None:
        model, x = convolutional().bfloat16(), image()
        shadow = shadow_of(model, dtype=torch.float32)
        teacher = averaged_module(model, shadow).eval()
        assert {b.dtype for b in teacher.buffers()} == {torch.float32, torch.int64}
        expected = functional_call(convolutional().eval(), shadow, (x,))
        assert_close(teacher(x), expected)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_with_autocast(self) -> None:
        model, x = nn.Linear(3, 2).bfloat16(), torch.randn(1, 3).bfloat16()
        teacher = averaged_module(model, shadow_of(model, dtype=torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(teacher(x), model(x))


def test_gradients_flow_through_it_and_not_into_it() -> None:
    model, x = nn.Linear(3, 2), torch.randn(1, 3, requires_grad=True)
    teacher = averaged_module(model, shadow_of(model))
    teacher(x).sum().backward()
    assert_close(x.grad, model.weight.detach().sum(0, keepdim=True))


def test_in_another_thread() -> None:
    model, x = convolutional().eval(), image()
    shadow = shadow_of(model)
    teacher = averaged_module(model, shadow)
    found: list[Tensor] = []
    with emajit.ema_scope(model, shadow):
        thread = threading.Thread(target=lambda: found.append(teacher(x)))
        thread.start()
        thread.join()
    assert_close(found[0], functional_call(model, shadow, (x,)))


def test_outlives_the_model() -> None:
    model, x = convolutional().eval(), image()
    teacher, expected = averaged_module(model, shadow_of(model)), model(x)
    del model
    assert_close(teacher(x), expected)


class TestRefuses:
    def test_a_model_in_a_scope(self) -> None:
        model = nn.Linear(2, 2)
        shadow = shadow_of(model)
        with (
            emajit.ema_scope(model, shadow),
            pytest.raises(RuntimeError, match="outside of ema_scope"),
        ):
            averaged_module(model, shadow)

    def test_what_does_not_fit(self) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="an average of each trainable parameter"):
            averaged_module(model, {"weight": torch.ones(2, 2)})
        with pytest.raises(ValueError, match=r"shadow\['bias'\]: expected shape \(2,\)"):
            averaged_module(model, {"weight": torch.ones(2, 2), "bias": torch.ones(3)})
        no_model: Any = {}
        with pytest.raises(TypeError, match="model: expected a module"):
            averaged_module(no_model, {})
