"""How public code calls its copy of `LitEma`: each pattern runs unchanged, with the same result.

A pattern is a function of the class, and returns tensors. It is run with emajit's class, and with
the one that stands in for the copy of that repository.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from emajit import LitEma
from tests import reference

Pattern = Callable[[Any], list[Tensor]]
PATTERNS: dict[str, tuple[Any, Pattern]] = {}


class Swaps(reference.LitEma):
    """A copy that exchanges weights and averages, by the memory they are in."""

    def swap(self, model: nn.Module) -> None:
        shadows = dict(self.named_buffers())
        for name, p in model.named_parameters():
            average = shadows[self.m_name2s_name[name]]
            average.data, p.data = p.data, average.data


class StartsAt(reference.LitEma):
    """A copy that takes the number of updates to go on from."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, init_num_updates: int = 0) -> None:
        super().__init__(model, decay)
        self.num_updates.fill_(init_num_updates)


class SpellsIt(reference.LitEma):
    """A copy that spells the argument as it is meant."""

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True
    ) -> None:
        super().__init__(model, decay, use_num_updates)


class Resets(reference.LitEma):
    def reset_num_updates(self) -> None:
        del self.num_updates
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))


def of(repository: str, copy: Any = reference.LitEma) -> Callable[[Pattern], Pattern]:
    def add(pattern: Pattern) -> Pattern:
        PATTERNS[f"{repository}: {pattern.__name__}"] = copy, pattern
        return pattern

    return add


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.1).add_(0.1)


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def averages(ema: Any) -> list[Tensor]:
    buffers = dict(ema.named_buffers())
    return [buffers[key].clone() for key in ema.m_name2s_name.values()]


class Engine(nn.Module):
    """A training module that averages a part of itself, as most do."""

    def __init__(self, ema: Any, **options: Any) -> None:
        super().__init__()
        self.model = net()
        self.model_ema = ema(self.model, **options)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        try:
            yield None
        finally:
            self.model_ema.restore(self.model.parameters())

    def train_batch(self) -> None:
        step(self.model)
        self.model_ema(self.model)

    def found(self) -> list[Tensor]:
        """The weights inside and after a scope, and the state."""
        with self.ema_scope():
            inside = values(self.model)
        state = self.model_ema.state_dict()
        return [*inside, *values(self.model), *(state[key] for key in sorted(state))]


@of("CompVis/latent-diffusion")
def trains_and_validates(ema: Any) -> list[Tensor]:
    engine = Engine(ema)
    count = len(list(engine.model_ema.buffers()))  # "Keeping EMAs of ..."
    for _ in range(3):
        engine.train_batch()
    return [torch.tensor(count), *engine.found(), *values(engine)]


@of("Stability-AI/stablediffusion", Resets)
def resets_the_count_after_loading(ema: Any) -> list[Tensor]:
    engine, other = Engine(ema), Engine(ema)
    for _ in range(3):
        engine.train_batch()
    other.load_state_dict(engine.state_dict(), strict=False)
    other.model_ema.reset_num_updates()
    other.train_batch()
    return other.found()


@of("Stability-AI/stablediffusion")
def a_new_one_of_pure_weights(ema: Any) -> list[Tensor]:
    engine = Engine(ema)
    engine.train_batch()
    engine.model_ema = ema(engine.model)
    return engine.found()


class Autoencoder(nn.Module):
    """The base class has the averages, and the derived one has the layers later."""

    def __init__(self, ema: Any) -> None:
        super().__init__()
        self.model_ema = ema(self, decay=0.9)
        self.layers = net()


@of("Stability-AI/generative-models")
@of("THUDM/CogVideo")
def infers_with_averages_from_before_the_layers(ema: Any) -> list[Tensor]:
    autoencoder = Autoencoder(ema)
    autoencoder.load_state_dict(Autoencoder(ema).state_dict())
    layers: Any = autoencoder.layers
    return [layers(torch.ones(2)), *autoencoder.state_dict().values()]


@of("Stability-AI/generative-models")
def validates_a_frozen_first_stage(ema: Any) -> list[Tensor]:
    autoencoder = Autoencoder(ema).requires_grad_(False)
    autoencoder.model_ema.store(autoencoder.parameters())
    autoencoder.model_ema.copy_to(autoencoder)
    inside = values(autoencoder)
    autoencoder.model_ema.restore(autoencoder.parameters())
    return [*inside, *values(autoencoder)]


@of("Stability-AI/generative-models")
def averages_with_a_decay_of_its_own(ema: Any) -> list[Tensor]:
    engine = Engine(ema, decay=0.5)
    for _ in range(12):
        engine.train_batch()
    return engine.found()


@of("CompVis/latent-diffusion")
def averages_all_of_itself(ema: Any) -> list[Tensor]:
    engine: Any = nn.Module()
    engine.add_module("model", net())
    engine.add_module("model_ema", ema(engine))
    step(engine)
    engine.model_ema(engine)
    return [*averages(engine.model_ema), *engine.state_dict().values()]


@of("AIGText/GlyphControl-release", StartsAt)
def starts_from_a_number_of_updates(ema: Any) -> list[Tensor]:
    found = []
    for number in (0, 200):
        model = net()
        averaged = ema(model, init_num_updates=number)
        step(model)
        averaged(model)
        found += [*averages(averaged), averaged.num_updates]
    return found


@of("neggles/neurosis", SpellsIt)
def spells_the_argument_right(ema: Any) -> list[Tensor]:
    found = []
    for counts in (True, False):
        model = net()
        averaged = ema(model, decay=0.99, use_num_updates=counts)
        step(model)
        averaged(model)
        found += [*averages(averaged), averaged.num_updates]
    return found


@of("smirkingface/stable-diffusion", Swaps)
def swaps_twice(ema: Any) -> list[Tensor]:
    engine = Engine(ema)
    engine.train_batch()
    engine.model_ema.swap(engine.model)
    inside = values(engine.model)
    engine.model_ema.swap(engine.model)
    return [*inside, *values(engine.model), *engine.model_ema.state_dict().values()]


@of("smirkingface/stable-diffusion")
def puts_weights_into_the_state_that_it_loads(ema: Any) -> list[Tensor]:
    engine, state = Engine(ema), Engine(ema).state_dict()
    engine.train_batch()
    for name, p in engine.model.named_parameters():
        if p.requires_grad:
            state[f"model_ema.{engine.model_ema.m_name2s_name[name]}"] = p.data
    state["model_ema.num_updates"] = torch.tensor(0, dtype=torch.int)
    engine.load_state_dict(state, strict=True)
    return engine.found()


@of("JulienGaubil/diffmap")
def empties_the_map_of_a_frozen_model(ema: Any) -> list[Tensor]:
    engine = Engine(ema)
    engine.train_batch()
    engine.model.requires_grad_(False)
    engine.model_ema.m_name2s_name = {}
    for _ in range(2):
        engine.train_batch()
    return engine.found()


@of("a script of diffusion for inpainting")
def reads_averages_by_the_map(ema: Any) -> list[Tensor]:
    engine = Engine(ema)
    engine.train_batch()
    keys = engine.model_ema.m_name2s_name
    names = dict(zip(keys.values(), keys.keys(), strict=True))
    state = {names[k]: v for k, v in engine.model_ema.state_dict().items() if k in names}
    engine.model.load_state_dict(state)
    return values(engine.model)


@of("a script of inference")
def copies_for_good(ema: Any) -> list[Tensor]:
    model = net()
    averaged, other = ema(model), net()
    step(model)
    averaged(model)
    loaded = ema(other)
    loaded.load_state_dict(averaged.state_dict())
    loaded.copy_to(other)
    return values(other)


@of("a script of training")
def stores_the_data_of_parameters(ema: Any) -> list[Tensor]:
    engine = Engine(ema)
    engine.train_batch()
    engine.model_ema.store([p.data for p in engine.model.parameters()])
    engine.model_ema.copy_to(engine.model)
    inside = values(engine.model)
    engine.model_ema.restore([p.data for p in engine.model.parameters()])
    return [*inside, *values(engine.model)]


@of("a script of training in several processes")
def needs_no_gradients_of_its_own(ema: Any) -> list[Tensor]:
    engine = Engine(ema, decay=0.9)
    for p in engine.model_ema.parameters():
        p.requires_grad = False
    engine.train_batch()
    return engine.found()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_runs_as_with_the_copy(pattern: str) -> None:
    copy, act = PATTERNS[pattern]
    expected, found = act(copy), act(LitEma)
    assert len(expected) == len(found)
    for e, f in zip(expected, found, strict=True):
        assert_close(f, e)


@pytest.mark.parametrize("decay", [torch.tensor(0.9), torch.tensor(0.9, dtype=torch.float64)])
def test_a_decay_in_a_tensor(decay: Tensor) -> None:
    model = net()
    ema, plain = LitEma(model, decay), LitEma(model, 0.9)
    for _ in range(100):
        step(model)
    ema(model)
    plain(model)
    assert_close(averages(ema), averages(plain))


def test_averages_from_before_the_layers_refuse_their_first_update() -> None:
    autoencoder = Autoencoder(LitEma)
    for use in (autoencoder.model_ema, autoencoder.model_ema.copy_to):
        with pytest.raises(ValueError, match=r"layers\.0\.weight: .* call track\(model\)"):
            use(autoencoder)
    autoencoder.model_ema.track(autoencoder)
    step(autoencoder)
    autoencoder.model_ema(autoencoder)
    assert len(averages(autoencoder.model_ema)) == 4


class TestSwap:
    def test_the_state_in_between_is_that_of_the_averages(self) -> None:
        model = net()
        ema = LitEma(model)
        step(model)
        before = averages(ema)
        ema.swap(model)
        assert_close(values(model), before)
        assert_close(averages(ema), before)
        with pytest.raises(RuntimeError, match="outside of ema_scope"):
            ema(model)
        ema.swap(model)
        ema(model)

    def test_a_swap_that_fails_leaves_nothing_entered(self) -> None:
        model = net()
        ema = LitEma(model)
        with pytest.raises(ValueError, match="lacks"):
            ema.swap(nn.Linear(1, 1))
        ema.swap(model)
        ema.swap(model)
        ema(model)


@pytest.mark.parametrize("number", [-1, 2**31, 0.5, "3"])
def test_a_first_number_that_is_none(number: Any) -> None:
    with pytest.raises(ValueError, match="init_num_updates: expected a number of updates"):
        LitEma(net(), init_num_updates=number)


def test_to_store_and_restore_nothing_does_nothing() -> None:
    model = net()
    ema = LitEma(model)
    ema.restore([])
    ema.store([])
    ema.restore([])
    with pytest.raises(RuntimeError, match="expected store"):
        ema.restore(model.parameters())
