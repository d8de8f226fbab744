"""`ema_scope` and what others do with the model: buffers, shared memory, caches, what is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import emajit
from emajit import LitEma, averaged_module
from tests.test_scope import Spy, shadow_of, small

Scope = Callable[..., AbstractContextManager[None]]


def of_function(model: nn.Module, **options: Any) -> AbstractContextManager[None]:
    shadow = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}
    return emajit.ema_scope(model, shadow, **options)


def of_method(model: nn.Module, **options: Any) -> AbstractContextManager[None]:
    ema = LitEma(model)
    for average in ema.named_averages().values():
        average.fill_(2.0)
    return ema.ema_scope(model, **options)


both = pytest.mark.parametrize("enter", [of_function, of_method])


class TestBuffersOfTraining:
    @both
    def test_update_bn_inside_leaves_the_statistics_of_training(self, enter: Scope) -> None:
        model = small()
        data = [torch.randn(8, 2) for _ in range(3)]
        for x in data:
            model(x)
        spy = Spy(model)
        with enter(model):
            update_bn(data, model)
            assert not torch.equal(spy.values[-2], model[1].running_var)  # type: ignore[index]
        spy.assert_untouched()

    @both
    def test_a_forward_in_training_mode_inside(self, enter: Scope) -> None:
        model = small().train()
        spy = Spy(model)
        with enter(model):
            model(torch.randn(8, 2))
        spy.assert_untouched()

    @both
    def test_buffers_that_are_replaced_or_added_to_what_is_none(self, enter: Scope) -> None:
        model: Any = small()
        model.register_buffer("mask", None)
        model[1].register_buffer("calls", torch.zeros(1))
        spy = Spy(model)
        with enter(model):
            model.mask = torch.ones(2)
            model[1].calls = model[1].calls + 1
        assert model.mask is None
        spy.assert_untouched()

    def test_buffers_that_cannot_be_written(self) -> None:
        model: Any = small()
        model.register_buffer("rows", torch.arange(3).expand(4, 3))
        model.register_buffer("sparse", torch.eye(2).to_sparse())
        model.register_buffer("nowhere", torch.ones(2, device="meta"))
        with torch.inference_mode():
            model.register_buffer("inferred", torch.ones(2))
        with of_function(model):
            model.inferred = model.inferred + 1
        assert model.inferred.tolist() == [1, 1]
        with torch.inference_mode(), of_function(model):
            model.get_buffer("inferred").add_(1)
        assert model.inferred.tolist() == [1, 1]
        assert model.rows.shape == (4, 3)

    def test_a_graph_in_flight_may_use_them(self) -> None:
        model, x = small().eval(), torch.randn(4, 2, requires_grad=True)
        loss = model(x).sum()
        with of_function(model):
            model(x)
        loss.backward()

    @pytest.mark.parametrize("buffers", ["ignore", "average"])
    def test_update_bn_between_copy_to_and_restore(self, buffers: Any) -> None:
        model = small()
        model.register_buffer("rows", torch.arange(3).expand(4, 3))
        ema, spy = LitEma(model, buffers=buffers, exclude="rows"), Spy(model)
        ema.store(model.parameters())
        ema.copy_to(model)
        update_bn([torch.randn(8, 2)], model)
        ema.restore(model.parameters())
        spy.assert_untouched()

    def test_averages_with_statistics_of_their_own(self) -> None:
        """The README's recipe gives what torch's AveragedModel and update_bn give."""
        torch.manual_seed(0)
        model = small()
        averaging = get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
        theirs = AveragedModel(model, multi_avg_fn=averaging)
        ema = LitEma(model, decay=0.5, use_num_upates=False)
        data = [torch.randn(8, 2) for _ in range(3)]
        theirs.update_parameters(model)  # its first one copies
        for x in data:
            model(x)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))
            theirs.update_parameters(model)
            ema(model)
        update_bn(data, theirs)
        ours = averaged_module(model, ema.named_averages())
        update_bn(data, ours)
        assert_close(dict(ours.named_buffers()), dict(theirs.module.named_buffers()))
        assert_close(ours.eval()(data[0]), theirs.eval()(data[0]))


class TestMemoryThatOthersRead:
    """A scope copies into it, and copies the training weights back."""

    @both
    def test_of_other_processes(self, enter: Scope) -> None:
        model = nn.Linear(2, 2).share_memory()
        elsewhere, spy = model.weight.detach(), Spy(model)  # what a queue hands over
        with enter(model):
            assert elsewhere.tolist() == [[2, 2], [2, 2]]
        spy.assert_untouched()

    @both
    def test_in_a_flat_buffer(self, enter: Scope) -> None:
        model, flat = nn.Linear(2, 2), torch.zeros(6)
        model.weight.data, model.bias.data = flat[:4].view(2, 2), flat[4:]
        spy = Spy(model)
        with enter(model):
            assert flat.tolist() == [2.0] * 6
        spy.assert_untouched()
        assert flat.tolist() == [0.0] * 6

    @both
    def test_that_cannot_be_seen(self, enter: Scope) -> None:
        model = nn.Linear(2, 2)
        view, spy = model.weight.view(-1), Spy(model)
        before = view.tolist()
        with enter(model):
            assert view.tolist() == before
        with enter(model, copy=True):
            assert view.tolist() == [2.0] * 4
            assert model.weight.tolist() == [[2, 2], [2, 2]]
        assert view.tolist() == before
        spy.assert_untouched()

    def test_copies_are_cast(self) -> None:
        model = nn.Linear(2, 2).bfloat16()
        shadow = {name: s.float() for name, s in shadow_of(model).items()}
        spy = Spy(model)
        with emajit.ema_scope(model, shadow, copy=True):
            assert torch.equal(model.weight, shadow["weight"].bfloat16())
        spy.assert_untouched()

    def test_a_graph_does_not_cross_the_boundary_unnoticed(self) -> None:
        model, x = nn.Linear(2, 2), torch.ones(2, requires_grad=True)
        before = model(x).sum()
        with of_function(model, copy=True):
            inside = model(x).sum()
            torch.autograd.grad(model(x).sum(), x)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(before, x, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(inside, x)
        assert_close(torch.autograd.grad(before, x)[0], model.weight.detach().sum(0))

    def test_averages_are_not_averaged(self) -> None:
        model = nn.Linear(2, 2)
        params = dict(model.named_parameters())
        shadow = emajit.init(params)
        with (
            emajit.ema_scope(model, shadow, copy=True),
            pytest.raises(RuntimeError, match="outside of ema_scope"),
        ):
            emajit.update_(shadow, params, 0, decay=0.5)


class TestParametersThatChange:
    def test_removed_parametrizations_are_told(self) -> None:
        model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        spy = Spy(model)
        with pytest.raises(RuntimeError, match="found 1 new and 2 missing"), of_function(model):
            parametrize.remove_parametrizations(model, "weight")
        assert not torch.equal(model.bias, torch.full((2,), 2.0))
        for tensor, value in zip(spy.objects, spy.values, strict=True):
            assert torch.equal(tensor, value)

    @both
    def test_new_modules_are_told(self, enter: Scope) -> None:
        model: Any = small()
        with pytest.raises(RuntimeError, match="found 2 new and 2 missing"), enter(model):
            model[2] = nn.Linear(3, 1)

    def test_an_error_inside_is_told_instead(self) -> None:
        model: Any = small()
        with pytest.raises(ZeroDivisionError), of_function(model):
            model[2] = nn.Linear(3, 1)
            raise ZeroDivisionError
        try:
            model["missing"]
        except TypeError:
            with pytest.raises(RuntimeError, match="found 2 new"), of_function(model):
                model[2] = nn.Linear(3, 1)

    @both
    def test_a_cast_inside_is_undone(self, enter: Scope) -> None:
        model: Any = small()
        spy = Spy(model)
        with enter(model):
            model.double().half()
        spy.assert_untouched()


class TestParametrizeCached:
    """What it keeps of the training weights is not used with averages, nor the other way round."""

    def model(self) -> nn.Module:
        model: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(1, 1))
        for p in model.parameters():
            nn.init.ones_(p)
        return model

    @both
    def test_around_a_scope(self, enter: Scope) -> None:
        model, x = self.model(), torch.ones(1)
        with torch.no_grad(), parametrize.cached():
            assert model(x).item() == 2
            with enter(model):
                assert model(x).item() == 4
            assert model(x).item() == 2

    def test_around_copy_to_and_restore(self) -> None:
        model, x = self.model(), torch.ones(1)
        ema = LitEma(model)
        for average in ema.named_averages().values():
            average.fill_(2.0)
        with torch.no_grad(), parametrize.cached():
            model(x)
            ema.store(model.parameters())
            ema.copy_to(model)
            assert model(x).item() == 4
            ema.restore(model.parameters())
            assert model(x).item() == 2


class TestWhatOutlivesIt:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing_across_the_boundary_is_not_noticed(
        self, *, reentrant: bool
    ) -> None:
        """As documented: the forward is computed again outside, with the training weights."""
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        for p in model.parameters():
            nn.init.constant_(p, 3.0)
        x = torch.ones(1, requires_grad=True)
        with of_function(model):
            y = checkpoint(model, x, use_reentrant=reentrant)
            (inside,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False), x)
            without = model(x)
        assert (y.item(), inside.item()) == (4, 4)
        y.backward()
        assert x.grad is not None
        assert x.grad.item() == 9  # of the training weights, not of y
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            without.backward()

    def test_a_kept_state_dict_follows_the_averages(self) -> None:
        model = nn.Linear(1, 1, bias=False)
        shadow = {"weight": torch.zeros(1, 1)}
        with emajit.ema_scope(model, shadow):
            kept = model.state_dict()
            copied = {name: value.clone() for name, value in model.state_dict().items()}
        shadow["weight"].fill_(1.0)
        assert (kept["weight"].item(), copied["weight"].item()) == (1, 0)


class TestNestedMappings:
    """The parts of a parameter's name, as a pytree of averages has them."""

    def nested(self, model: nn.Module) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for name, average in shadow_of(model).items():
            *modules, last = name.split(".")
            below = tree
            for module in modules:
                below = below.setdefault(module, {})
            below[last] = average
        return tree

    def test_in_a_scope(self) -> None:
        model = small()
        shadow = self.nested(model)
        with emajit.ema_scope(model, shadow):
            assert torch.equal(model[0].weight, shadow["0"]["weight"])  # type: ignore[index]

    def test_in_a_module_of_averages(self) -> None:
        model = small()
        shadow = self.nested(model)
        teacher = averaged_module(model, shadow)
        assert teacher.get_parameter("2.bias").data_ptr() == shadow["2"]["bias"].data_ptr()

    def test_parts_in_one_name(self) -> None:
        model = nn.Sequential(small())
        inner = shadow_of(model[0])
        with emajit.ema_scope(model, {"0": inner}):
            assert torch.equal(model.get_parameter("0.2.bias"), inner["2.bias"])

    def test_the_same_name_twice(self) -> None:
        twice: dict[str, Any] = {"0.weight": torch.ones(1), "0": {"weight": torch.ones(1)}}
        with pytest.raises(ValueError, match=r"found two of '0.weight'"):
            averaged_module(small(), twice)

    def test_what_is_no_average(self) -> None:
        wrong: dict[str, Any] = {"0": {"weight": 1.0}}
        with pytest.raises(TypeError, match="found 'weight': float"):
            averaged_module(small(), wrong)


class TestParametersThatAreWritten:
    """An evaluation only reads parameters; code that writes them is undone, or told of."""

    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_an_embedding_of_bounded_norm_changes_no_average(self, kind: Any) -> None:
        """Its forward scales rows of the weight in place, in an evaluation too."""
        model, rows = kind(4, 2, max_norm=1.0), torch.arange(4)[:, None]
        nn.init.constant_(model.weight, 0.1)
        ema, spy = LitEma(model), Spy(model)
        average = ema.named_averages()["weight"].fill_(2.0)
        for _ in range(2):
            with torch.no_grad(), ema.ema_scope(model):
                assert_close(model(rows).flatten(0, -2).norm(dim=1), torch.ones(4))
            with torch.no_grad(), emajit.ema_scope(model, {"weight": average}):
                model(rows)
        assert average.tolist() == [[2.0, 2.0]] * 4
        spy.assert_untouched()

    @both
    def test_a_step_or_a_load_inside_is_told(self, enter: Scope) -> None:
        model = nn.Linear(2, 2)
        spy = Spy(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        told = r"only read inside, found some that were written: \['weight', 'bias'\]"
        with pytest.raises(RuntimeError, match=told), enter(model):
            model.load_state_dict(state)
        with pytest.raises(RuntimeError, match=told), enter(model):
            model(torch.ones(2)).sum().backward()
            optimizer.step()
        with pytest.raises(ZeroDivisionError), enter(model):
            model.load_state_dict(state)
            raise ZeroDivisionError
        spy.assert_untouched()

    @both
    def test_copies_may_be_written(self, enter: Scope) -> None:
        model = nn.Linear(2, 2)
        spy = Spy(model)
        with torch.no_grad(), enter(model, copy=True):
            model.weight.zero_()
        with torch.no_grad(), enter(model):
            assert model.weight.tolist() == [[2.0, 2.0], [2.0, 2.0]]
        spy.assert_untouched()

    @both
    @pytest.mark.parametrize("options", [{}, {"copy": True}])
    def test_a_parameter_that_is_given_other_memory(self, enter: Scope, options: Any) -> None:
        """As layers do that bound the norm of their weight in the forward, and a cast."""
        model = nn.Linear(2, 2)
        spy = Spy(model)
        with enter(model, **options):
            model.weight.data = torch.renorm(model.weight.data, p=2, dim=0, maxnorm=0.5)
        spy.assert_untouched()
        with enter(model, **options):
            assert model.weight.tolist() == [[2.0, 2.0], [2.0, 2.0]]
            model.double()
        spy.assert_untouched()
        spy = Spy(model.share_memory())
        with enter(model):
            model.weight.data = model.weight.data + 1
        spy.assert_untouched()
        assert model.weight.untyped_storage().is_shared()

    @both
    def test_weights_that_are_flattened_again_in_a_forward(self, enter: Scope) -> None:
        """As cuDNN's recurrent layers are by `flatten_parameters()`: all into one new tensor."""

        def flatten(model: nn.Module) -> None:
            params = [*model.parameters()]
            flat = torch.cat([p.detach().flatten() for p in params])
            parts = flat.split([p.numel() for p in params])  # type: ignore[no-untyped-call]
            with torch.no_grad():
                for p, part in zip(params, parts, strict=True):
                    p.set_(part.view_as(p))

        model, x = nn.LSTM(2, 2), torch.ones(1, 2)
        flatten(model)
        before, spy = model(x)[0], Spy(model)
        with torch.no_grad(), enter(model):
            flatten(model)
            assert not torch.equal(model(x)[0], before)
        spy.assert_untouched()
        assert torch.equal(model(x)[0], before)

    @both
    def test_a_cast_that_swaps_tensors_writes_nothing(self, enter: Scope) -> None:
        model = nn.Linear(2, 2)
        spy = Spy(model)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with enter(model):
                model.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        spy.assert_untouched()
