"""Any sequence of calls of a `LitEma`, while its model changes, against averages in float64."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

import emajit
from emajit import LitEma, schedules

SCHEDULES = (0.5, 0.999, schedules.power_function(0.1), schedules.every(schedules.uniform(), 2))
WRAPPERS: tuple[Callable[[Any], Any], ...] = (
    lambda model: model,
    nn.DataParallel,
    lambda model: torch.compile(model, backend="eager"),
)
COPIES = copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))
positions = st.integers(0, 5)
_numbers = itertools.count()

# The number of a layer, and the name of its parameter: what an average is of, wherever it is.
Key = tuple[int, str]


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.number = next(_numbers)


class Sequences(RuleBasedStateMachine):
    model: nn.Sequential
    ema: LitEma

    @initialize(decay=st.sampled_from(SCHEDULES), nonfinite=st.sampled_from(("propagate", "skip")))
    def start(self, decay: Any, nonfinite: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(Layer(), Layer(), Layer())
        self.model[1].requires_grad_(False)
        self.ema = LitEma(self.model, decay, nonfinite=nonfinite)
        self.decay = decay if callable(decay) else schedules.warmup(decay)
        self.updates = 0
        self.expected: dict[Key, Tensor] = {}
        self.states: list[tuple[dict[str, Tensor], dict[str, Key], dict[Key, Tensor], int]] = []
        self.teacher: nn.Module | None = None
        self.track()

    def keys(self) -> dict[str, Key]:
        """What each parameter of the model is, by its name."""
        return {
            f"{path}.{own}": (layer.number, own)
            for path, layer in self.model.named_modules()
            if isinstance(layer, Layer)
            for own in ("weight", "bias")
        }

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def averages(self) -> dict[str, Tensor]:
        """The weights that the model has in a scope."""
        averages = {name: a.to(torch.float32) for name, a in self.ema.named_averages().items()}
        return self.weights() | averages

    def track(self) -> None:
        self.ema.track(self.model)
        params, keys = dict(self.model.named_parameters()), self.keys()
        self.expected = {
            key: self.expected.get(key, params[name].detach().double())
            for name, key in keys.items()
            if key in self.expected or params[name].requires_grad
        }

    @invariant()
    def averages_are_those_in_float64(self) -> None:
        found, keys = self.ema.named_averages(), self.keys()
        assert {keys[name] for name in found} == self.expected.keys()
        assert int(self.ema.num_updates) == self.updates
        for name, average in found.items():
            assert_close(average.double(), self.expected[keys[name]], rtol=1e-5, atol=1e-6)

    @rule()
    def train(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1 * p.requires_grad)

    @rule(wrap=st.sampled_from(WRAPPERS))
    def update(self, wrap: Callable[[Any], Any]) -> None:
        assume(self.expected)  # an update of nothing is refused
        self.ema(wrap(self.model))
        beta, keys, self.updates = float(self.decay(self.updates)), self.keys(), self.updates + 1
        for name, p in self.model.named_parameters():
            if keys[name] in self.expected:
                self.expected[keys[name]] = torch.lerp(
                    p.detach().double(), self.expected[keys[name]], beta
                )

    @rule(
        how=st.sampled_from(("ema_scope", "swap", "store", "functional")),
        wrap=st.sampled_from(WRAPPERS[:2]),  # Dynamo would compile each model
        in_place=st.booleans(),
        mixed=st.booleans(),
    )
    def evaluate(self, how: str, wrap: Callable[[Any], Any], in_place: bool, mixed: bool) -> None:
        model, ema, x = wrap(self.model), self.ema, torch.ones(2, 3)
        before, averages = self.weights(), self.averages()
        scope: Any = nullcontext()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            expected = functional_call(self.model, averages, (x,))
            trained = model(x)  # which autocast has kept casts of
            if how == "swap":
                ema.swap(model)
            elif how == "store":
                ema.store(model.parameters())
                ema.copy_to(model)
            elif how == "functional":
                scope = emajit.ema_scope(model, ema.named_averages(), copy=in_place)
            else:
                scope = ema.ema_scope(model, copy=in_place)
            with scope:
                found = model(x)
            if how == "swap":
                ema.swap(model)
            elif how == "store":
                ema.restore(model.parameters())
            assert torch.equal(found, expected)
            assert torch.equal(model(x), trained)
        assert all(torch.equal(p, before[name]) for name, p in self.weights().items())

    @rule()
    def save(self) -> None:
        state = {key: value.clone() for key, value in self.ema.state_dict().items()}
        self.states.append((state, self.keys(), dict(self.expected), self.updates))

    @rule(at=positions, assign=st.booleans())
    def load(self, at: int, assign: bool) -> None:
        assume(self.states)
        state, keys, expected, updates = self.states[at % len(self.states)]
        assume(keys == self.keys() and expected.keys() == self.expected.keys())
        self.ema.load_state_dict(state, assign=assign)
        self.expected, self.updates = dict(expected), updates
        self.teacher = None if assign else self.teacher

    @rule(copied=st.sampled_from(COPIES))
    def go_on_with_copies(self, copied: Any) -> None:
        self.model, self.ema = copied((self.model, self.ema))
        with self.ema.ema_scope(self.model):  # of which it learns where the modules are
            pass
        self.teacher = None

    @rule()
    def make_a_teacher(self) -> None:
        assume(all(a.dtype == torch.float32 for a in self.ema.named_averages().values()))
        self.teacher = emajit.averaged_module(self.model, self.ema.named_averages())

    @invariant()
    def the_teacher_follows(self) -> None:
        if self.teacher is not None:
            x = torch.ones(2, 3)
            with torch.no_grad():
                assert_close(self.teacher(x), functional_call(self.model, self.averages(), (x,)))

    @rule(at=positions)
    def unfreeze_and_freeze(self, at: int) -> None:
        layer = self.model[at % len(self.model)]
        layer.requires_grad_(not next(layer.parameters()).requires_grad)
        self.track()
        self.teacher = None  # which shares what was frozen

    @rule(at=positions, is_frozen=st.booleans())
    def insert(self, at: int, is_frozen: bool) -> None:
        assume(len(self.model) < 6)
        self.model.insert(at % len(self.model), Layer().requires_grad_(not is_frozen))
        self.track()
        self.teacher = None

    @rule(at=positions)
    def remove(self, at: int) -> None:
        assume(len(self.model) > 2)
        del self.model[at % len(self.model)]
        self.track()
        self.teacher = None

    @rule(at=positions)
    def wrap_a_layer(self, at: int) -> None:
        self.model[at % len(self.model)] = nn.Sequential(self.model[at % len(self.model)])
        self.track()
        self.teacher = None

    @rule(i=positions, j=positions)
    def exchange(self, i: int, j: int) -> None:
        i, j = i % len(self.model), j % len(self.model)
        self.model[i], self.model[j] = self.model[j], self.model[i]
        self.track()
        self.teacher = None

    @rule(dtype=st.sampled_from((torch.float32, torch.float64)))
    def cast(self, dtype: torch.dtype) -> None:
        self.ema.to(dtype)
        self.teacher = None


TestSequences = Sequences.TestCase
TestSequences.settings = settings(stateful_step_count=30)
