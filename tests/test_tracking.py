"""`LitEma.track`: averages are carried through a change of the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import emajit
from emajit import LitEma
from emajit.fused import FusedOptimizer

Change = Callable[[Any], object]


class Net(nn.Module):
    """An embedding, three layers of which the last is frozen, BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.layers[2].requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def averaged(**options: Any) -> tuple[nn.Module, LitEma, dict[str, Tensor]]:
    """A model, its averages, which differ from its weights, and copies of them."""
    model: nn.Module = Net()
    ema = LitEma(model, decay=0.9, **options)
    for _ in range(3):
        train(model)
        ema(model)
    train(model)
    return model, ema, {name: average.clone() for name, average in ema.named_averages().items()}


def resized(old: nn.Embedding, rows: int) -> nn.Embedding:
    """As `resize_token_embeddings` does it: the leading rows keep their weights."""
    new = nn.Embedding(rows, old.embedding_dim)
    kept = min(rows, old.num_embeddings)
    with torch.no_grad():
        new.weight[:kept] = old.weight[:kept]
    return new


class Adapter(nn.Module):
    """A layer in an adapter of low rank, which renames the layer, as peft does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.Linear(3, 1, bias=False)


def adapt(model: Any) -> None:
    for i in range(3):
        model.layers[i] = Adapter(model.layers[i])


CHANGES: dict[str, tuple[Change, dict[str, str]]] = {
    # What is done to the model, and the former names of averages that have another one afterwards.
    "unfrozen": (lambda m: m.layers[2].requires_grad_(True), {}),
    "frozen": (lambda m: m.layers[0].requires_grad_(False), {}),
    "a layer more": (lambda m: m.layers.append(nn.Linear(3, 3)), {}),
    "a layer in front": (
        lambda m: m.layers.insert(0, nn.Linear(3, 3)),
        {f"layers.{i + 1}.{of}": f"layers.{i}.{of}" for i in (0, 1) for of in ("weight", "bias")},
    ),
    "a layer less": (lambda m: m.layers.pop(1), {}),
    "adapters": (
        adapt,
        {
            f"layers.{i}.base_layer.{of}": f"layers.{i}.{of}"
            for i in (0, 1)
            for of in ("weight", "bias")
        },
    ),
    "a module more": (lambda m: m.add_module("more", nn.Linear(1, 1)), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_new_parameters_start_from_their_weights_and_all_others_keep_their_averages(
    change: str,
) -> None:
    model, ema, before = averaged()
    tensors = ema.named_averages()
    act, former = CHANGES[change]
    act(model)
    ema.track(model)
    params = dict(model.named_parameters())
    after = ema.named_averages()
    was = {name: former.get(name, name) for name in after}
    is_new = {
        n for n in after if was[n] not in before or (n in former.values() and n not in former)
    }
    for name, average in after.items():
        if name in is_new:
            assert torch.equal(average, params[name]), name
        else:
            assert average is tensors[was[name]], name
            assert torch.equal(average, before[was[name]]), name
    trainable = {name for name, p in params.items() if p.requires_grad}
    assert after.keys() >= trainable
    assert {*map(was.get, after.keys() - trainable)} <= before.keys()
    # The count goes on, for all: update 4 of the warm-up.
    train(model)
    expected = {n: a + (params[n] - a) * (1 - 5 / 14) for n, a in after.items()}
    ema(model)
    assert_close(ema.named_averages(), {n: e.detach() for n, e in expected.items()})
    assert int(ema.num_updates) == 4


@pytest.mark.parametrize("rows", [3, 8])
def test_resized_embeddings_keep_the_averages_of_the_rows_they_had(rows: int) -> None:
    model, ema, before = averaged()
    model.embedding = resized(model.embedding, rows)  # type: ignore[arg-type]
    for use in (ema, ema.copy_to):
        with pytest.raises(ValueError, match=r"embedding\.weight: expected shape .*track\(model"):
            use(model)
    ema.track(model)
    expected = model.embedding.weight.detach().clone()
    kept = min(rows, 5)
    expected[:kept] = before["embedding.weight"][:kept]
    assert torch.equal(ema.named_averages()["embedding.weight"], expected)
    ema(model)


def test_a_wider_convolution_keeps_the_averages_of_the_channels_it_had() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 2, 1))
    ema = LitEma(model)
    model[0] = nn.Conv2d(9, 2, 1)
    ema.track(model)
    held = ema.get_buffer("0weight")
    assert torch.equal(held[:, 4:], model[0].weight[:, 4:])
    assert not torch.equal(held[:, :4], model[0].weight[:, :4])


@pytest.mark.parametrize("shape", [(5, 2), (4, 4), (3,), (3, 3, 1)])
def test_of_a_shape_that_neither_contains_nor_is_contained_it_starts_anew(shape: Any) -> None:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(3, 3)))
    ema = LitEma(model)
    model.register_parameter("w", nn.Parameter(torch.ones(shape)))
    ema.track(model)
    if shape == (4, 4):
        expected = torch.ones(4, 4)
        expected[:3, :3] = 0
    else:
        expected = torch.ones(shape)
    assert torch.equal(ema.get_buffer("w"), expected)


def test_a_parameter_starts_anew_where_the_model_was_tracked_without_it() -> None:
    model, ema, before = averaged()
    model.head = nn.Identity()
    ema.track(model)
    assert before.keys() - ema.named_averages().keys() == {"head.weight"}
    model.head = nn.Linear(3, 5, bias=False)
    ema.track(model)
    assert torch.equal(ema.named_averages()["head.weight"], model.head.weight)


def test_without_a_change_nothing_changes() -> None:
    model, ema, before = averaged()
    tensors, state = ema.named_averages(), ema.state_dict()
    ema.track(model)
    for name, average in ema.named_averages().items():
        assert average is tensors[name]
        assert torch.equal(average, before[name])
    assert [*ema.state_dict()] == [*state]


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_is_that_of_a_litema_of_the_changed_model(change: str) -> None:
    model, ema, _ = averaged()
    CHANGES[change][0](model)
    ema.track(model)
    other = copy.deepcopy(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.requires_grad_(p.requires_grad)
    built = LitEma(other, decay=0.9)
    is_subset = change in ("frozen", "adapters")  # which LitEma does not average when it is built
    built.load_state_dict(
        {k: v for k, v in ema.state_dict().items() if not is_subset or k in built.state_dict()}
    )
    for name, average in built.named_averages().items():
        assert torch.equal(average, ema.named_averages()[name])
    train(model)
    other.load_state_dict(model.state_dict())
    ema(model)
    built(other)
    for name, average in built.named_averages().items():
        assert torch.equal(average, ema.named_averages()[name])
    if not is_subset:
        ema.load_state_dict(built.state_dict())


def test_a_state_from_before_the_change_loads_without_strict() -> None:
    model, ema, before = averaged()
    state = copy.deepcopy(ema.state_dict())
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    built = LitEma(model, decay=0.9)
    with pytest.warns(UserWarning, match="2 of 10 averages are not in the state_dict, layers3bias"):
        built.load_state_dict(state, strict=False)
    ema.track(model)
    built(model)
    ema(model)
    assert_close(built.state_dict(), ema.state_dict())
    assert before.keys() < built.named_averages().keys()


def test_an_average_that_a_load_left_out_starts_from_the_weights() -> None:
    model, ema, _ = averaged()
    state = copy.deepcopy(ema.state_dict())
    del state["headweight"]
    ema = LitEma(model)
    with pytest.warns(UserWarning, match="1 of 8 averages"):
        ema.load_state_dict(state, strict=False)
    train(model)
    ema.track(model)
    assert torch.equal(ema.named_averages()["head.weight"], model.head.weight)  # type: ignore[union-attr, arg-type]


def test_keys_are_those_of_the_changed_model_where_names_would_share_one() -> None:
    model = nn.Module()
    model.add_module("ab", nn.ParameterDict({"c": nn.Parameter(torch.zeros(1))}))
    ema = LitEma(model)
    model.ab.c.data.fill_(1.0)  # type: ignore[union-attr, operator]
    model.add_module("a", nn.ParameterDict({"bc": nn.Parameter(torch.full((1,), 5.0))}))
    ema.track(model)
    assert ema.m_name2s_name == LitEma(model).m_name2s_name == {"ab.c": "ab/c", "a.bc": "a/bc"}
    assert [float(a) for a in ema.named_averages().values()] == [0.0, 5.0]


def test_new_averages_have_dtype_and_device_of_those_beside() -> None:
    model, ema, _ = averaged(dtype=torch.float64)
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    ema.track(model)
    assert {average.dtype for average in ema.named_averages().values()} == {torch.float64}
    ema.to(torch.float32)
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    ema.track(model)
    assert {average.dtype for average in ema.named_averages().values()} == {torch.float32}


def test_the_filter_holds_for_new_parameters() -> None:
    model, ema, _ = averaged(exclude="layers.*")
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    model.add_module("neck", nn.Linear(1, 1))
    del model.layers
    ema.track(model)
    assert {name.split(".")[0] for name in ema.named_averages()} == {
        *("embedding", "norm", "head", "neck")
    }
    ema(model)


@pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
def test_buffers_come_by_the_option(buffers: Any) -> None:
    model, ema, _ = averaged(buffers=buffers)
    model.add_module("more", nn.BatchNorm1d(2))
    ema.track(model)
    model.more.running_mean.fill_(9.0)  # type: ignore[union-attr, operator]
    ema(model)
    expected = LitEma(model, buffers=buffers)
    assert ema.named_averages().keys() == expected.named_averages().keys()
    if buffers != "ignore":
        mean = float(ema.named_averages()["more.running_mean"][0])
        assert (mean == 9.0) == (buffers == "copy")
        assert int(ema.named_averages()["norm.num_batches_tracked"]) == 0


class TestTies:
    def test_a_tie_made_later_is_told_and_tracked(self) -> None:
        model, ema, before = averaged()
        model.head.weight = model.embedding.weight  # type: ignore[union-attr]
        for use in (ema, ema.copy_to):
            with pytest.raises(ValueError, match=r"\['head\.weight'\] tied to another .* track"):
                use(model)
        ema.track(model)
        assert torch.equal(ema.named_averages()["embedding.weight"], before["embedding.weight"])
        assert "head.weight" not in ema.named_averages()
        ema(model)

    def test_the_other_way_round_the_first_name_keeps_its_average(self) -> None:
        model, ema, before = averaged()
        model.embedding.weight = model.head.weight  # type: ignore[union-attr]
        ema.track(model)
        assert torch.equal(ema.named_averages()["embedding.weight"], before["embedding.weight"])

    def test_a_tie_that_was_cut(self) -> None:
        model: Any = Net()
        model.head.weight = model.embedding.weight
        ema = LitEma(model)
        model.head.weight = nn.Parameter(torch.ones(5, 3))
        ema.track(model)
        assert torch.equal(ema.named_averages()["head.weight"], torch.ones(5, 3))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_is_the_same_model(wrap: Any) -> None:
    model, ema, _ = averaged()
    tensors = ema.named_averages()
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    wrapped = wrap(model)
    ema.track(wrapped)
    assert ema.m_name2s_name.keys() == LitEma(model).m_name2s_name.keys()
    assert all(ema.named_averages()[name] is tensors[name] for name in tensors)
    ema(model)
    ema(wrapped)


COPIES = copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_tracked_by_names(copied: Any) -> None:
    model, ema, before = averaged()
    model, ema = copied((model, ema))
    model.layers.append(nn.Linear(3, 3))
    ema.track(model)
    for name, average in before.items():
        assert torch.equal(ema.named_averages()[name], average)


def test_new_averages_beside_some_that_were_cast_start_from_the_exact_weights() -> None:
    """Not from weights rounded to the dtype that the LitEma was built with."""
    model, ema, _ = averaged(dtype=torch.bfloat16)
    ema.float()
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    model.embedding = grown = resized(model.embedding, 7)  # type: ignore[arg-type]
    ema.track(model)
    averages = ema.named_averages()
    assert torch.equal(averages["layers.3.weight"], model.layers[3].weight)  # type: ignore[index, union-attr]
    assert torch.equal(averages["embedding.weight"][5:], grown.weight[5:])


class TestRefused:
    def test_inside_of_a_scope(self) -> None:
        model, ema, _ = averaged()
        with ema.ema_scope(model), pytest.raises(RuntimeError, match="outside of ema_scope"):
            ema.track(model)

    def test_between_store_and_restore(self) -> None:
        model, ema, _ = averaged()
        ema.store(model.parameters())
        with pytest.raises(RuntimeError, match="track: expected no stored parameters"):
            ema.track(model)
        ema.restore(model.parameters())
        ema.track(model)

    def test_what_is_no_module(self) -> None:
        _, ema, _ = averaged()
        with pytest.raises(TypeError, match="model: expected a module, found dict"):
            ema.track({})  # type: ignore[arg-type]


def test_names_of_many_parameters_are_few_in_the_message() -> None:
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(200))
    ema = LitEma(model)
    for layer in range(200):
        model[layer] = nn.ModuleDict({"base_layer": model[layer]})
    with pytest.raises(ValueError, match=r"lacks \['0\.weight', .*\] and 395 more; call") as told:
        ema(model)
    assert len(str(told.value)) < 250
    model = nn.ModuleList([nn.Linear(1, 1)])
    ema = LitEma(model)
    model.extend(nn.Linear(1, 1) for _ in range(200))
    with pytest.raises(ValueError, match=r"^1\.weight: .* found it and 399 more .* track") as told:
        ema(model)
    assert len(str(told.value)) < 250


def test_an_optimizer_that_averages_goes_on_with_the_new_parameters() -> None:
    model: Any = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = LitEma(model, decay=0.5, use_num_upates=False)
    fused = FusedOptimizer(optimizer, ema, model, backend="eager")
    x = torch.tensor([0, 1, 2])

    def step() -> dict[str, Tensor]:
        before = {n: a.clone() for n, a in ema.named_averages().items()}
        h = model.embedding(x)
        for layer in model.layers:
            h = layer(h)
        model.head(model.norm(h)).square().sum().backward()
        fused.step()
        optimizer.zero_grad()
        params = dict(model.named_parameters())
        return {name: (a + params[name].detach()) / 2 for name, a in before.items()}

    for _ in range(3):
        assert_close(ema.named_averages(), step())
    model.layers[2].requires_grad_(True)
    optimizer.add_param_group({"params": [*model.layers[2].parameters()]})
    ema.track(model)
    for _ in range(3):
        expected = step()
        assert len(expected) == len(ema.named_averages()) == 10
        assert_close(ema.named_averages(), expected)


def test_a_module_of_the_averages_follows_what_was_kept() -> None:
    model, ema, _ = averaged()
    teacher: Any = emajit.averaged_module(model, ema.named_averages())
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    ema.track(model)
    train(model)
    ema(model)
    assert torch.equal(teacher.head.weight, ema.named_averages()["head.weight"])


def test_stochastic_rounding_goes_on() -> None:
    model, ema, _ = averaged(dtype=torch.bfloat16, rounding="stochastic")
    model.layers.append(nn.Linear(3, 3))  # type: ignore[union-attr, operator]
    ema.track(model)
    other = copy.deepcopy(ema)
    built = LitEma(model, decay=0.9, dtype=torch.bfloat16, rounding="stochastic")
    built.load_state_dict(other.state_dict())
    ema(model)
    built(model)
    for name, average in ema.named_averages().items():
        assert torch.equal(average, built.named_averages()[name])


def test_from_nothing() -> None:
    """As where a base class builds the LitEma before its model has layers."""
    model = nn.Module()
    ema = LitEma(model)
    model.add_module("layer", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layer\.weight: expected no trainable .* track\(model\)"):
        ema(model)
    ema.track(model)
    ema(model)
    assert [*ema.named_averages()] == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
def test_averages_in_the_model_are_not_averaged(buffers: Any) -> None:
    model: Any = Net()
    model.ema = LitEma(model, buffers=buffers)
    model.slow = LitEma(model, decay=0.5, buffers=buffers)
    expected = [*model.ema.m_name2s_name]
    for ema in (model.ema, model.slow):
        ema.track(model)
        ema(model)
        assert [*ema.m_name2s_name] == expected


@pytest.mark.parametrize("made", [lambda pair: pair, *COPIES])
def test_modules_that_have_moved_are_told_of(made: Any) -> None:
    """By its name, the frozen layer in front would be averaged into the first one.

    A copy, or what was pickled, knows the modules of its first use.
    """
    model: Any = Net()
    model.layers[2].requires_grad_(True)
    model, ema = made((model, LitEma(model)))
    model.layers[2].requires_grad_(False)
    ema(model)
    before = ema.named_averages()
    model.layers.insert(0, nn.Linear(3, 3).requires_grad_(False))
    for use in (ema, ema.copy_to):
        with pytest.raises(ValueError, match=r"found others at \['layers\.1\.weight', .* track"):
            use(model)
    ema.track(model)
    ema(model)
    after = ema.named_averages()
    assert "layers.0.weight" not in after
    assert all(after[f"layers.{i + 1}.weight"] is before[f"layers.{i}.weight"] for i in range(3))
