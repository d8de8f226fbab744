"""With a real Accelerator: which steps count, and what `save_state` goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import emajit
from emajit import LitEma, checkpoint, schedules
from emajit.fused import FusedOptimizer
from tests import reference

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

DECAY = schedules.warmup(0.9)


class Shadow:
    """The functional shadow, as `register_for_checkpointing` takes it."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.averages, self.step = emajit.init(dict(params)), 0

    def update(self, params: Mapping[str, Tensor]) -> None:
        emajit.update_(self.averages, dict(params), self.step, decay=DECAY)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.averages, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages, self.step = state["shadow"], state["step"]


class Run:
    """A model in training, with both kinds of averages, and what they should be."""

    def __init__(self, seed: int, *, scaled: bool = False, **options: Any) -> None:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        if scaled:  # as mixed_precision="fp16" does on a GPU
            self.accelerator.scaler = torch.amp.GradScaler("cpu")
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(24, 3, generator=generator))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, optimizer, DataLoader(data, batch_size=4)
        )
        self.ema, self.shadow = LitEma(model, 0.9), Shadow(self.params())
        self.accelerator.register_for_checkpointing(self.ema, self.shadow)
        self.expected: dict[str, Tensor] = {name: p.double() for name, p in self.params().items()}
        self.updates = 0

    def params(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p.detach() for name, p in model.named_parameters()}

    def epoch(self, bad: tuple[int, ...] = ()) -> None:
        """One pass over six batches; the loss of some of them is infinite."""
        accelerator = self.accelerator
        for number, (x,) in enumerate(self.loader):
            with accelerator.accumulate(self.model):
                loss = self.model(x).square().mean()
                accelerator.backward(loss / 0 if number in bad else loss)
                before = {name: p.clone() for name, p in self.params().items()}
                self.optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    self.ema(accelerator.unwrap_model(self.model))
                    self.shadow.update(self.params())
                if any(not torch.equal(before[name], p) for name, p in self.params().items()):
                    beta = float(DECAY(self.updates))
                    self.expected = reference.update(self.expected, self.params(), beta)
                    self.updates += 1
                self.optimizer.zero_grad()

    def found(self) -> dict[str, Tensor]:
        with self.ema.ema_scope(self.model):
            return {name: p.clone() for name, p in self.params().items()}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Each Accelerator from the start: its state is the process's."""
    yield
    _reset()


def _reset() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def assert_as_expected(run: Run, updates: int) -> None:
    assert run.updates == run.shadow.step == int(run.ema.num_updates) == updates
    for found in (run.found(), run.shadow.averages):
        for name, expected in run.expected.items():
            assert_close(found[name].double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("accumulated", "updates"), [(1, 12), (2, 6), (4, 4)])
def test_averages_each_optimizer_step(accumulated: int, updates: int) -> None:
    """Of 6 batches, the fourth and (since it is the last) the sixth step with 4 accumulated."""
    run = Run(0, gradient_accumulation_steps=accumulated)
    run.epoch()
    run.epoch()
    assert_as_expected(run, updates)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_fused_optimizer_is_prepared(accumulated: int, scaled: bool, tmp_path: Path) -> None:
    """It steps, and averages, only where gradients are synchronised; and it is saved."""

    def run(fuse: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        _reset()
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        if scaled:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
            accelerator.native_amp = True
        model = nn.Linear(3, 1)
        ema = LitEma(model)
        inner: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
        if fuse:
            inner = FusedOptimizer(inner, ema, model, backend="aot_eager")
        prepared, optimizer = accelerator.prepare(model, inner)
        for step in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(torch.ones(4, 3) * step).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                optimizer.step()
                if accelerator.sync_gradients and not fuse:
                    ema(model)
                optimizer.zero_grad()
        state = accelerator.save_state(str(tmp_path / str(fuse)))
        saved = torch.load(Path(state) / "optimizer.bin")
        assert saved["state"][0]["step"] == 6 // accumulated
        return dict(model.named_parameters()), ema.named_averages(), int(ema.num_updates)

    expected, found = run(fuse=False), run(fuse=True)
    assert found[2] == expected[2] == 6 // accumulated
    assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)


def test_a_prepared_optimizer_is_not_fused() -> None:
    accelerator, model = accelerate.Accelerator(cpu=True), nn.Linear(3, 1)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match="build the FusedOptimizer first, and wrap or prepare it"):
        FusedOptimizer(optimizer, LitEma(model), model)


def test_a_skipped_step_does_not_count() -> None:
    run = Run(0, scaled=True)
    run.epoch(bad=(1, 4))
    assert_as_expected(run, 4)


def test_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Run(0, gradient_accumulation_steps=2)
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()

    resumed = Run(1, gradient_accumulation_steps=2)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.epoch()
    assert resumed.shadow.step == int(resumed.ema.num_updates) == 6
    for mine, theirs in (
        (resumed.params(), whole.params()),
        (resumed.found(), whole.found()),
        (resumed.shadow.averages, whole.shadow.averages),
    ):
        assert_close(mine, theirs, rtol=0, atol=0)


def test_emajit_reads_what_it_saved(tmp_path: Path) -> None:
    run = Run(0)
    run.epoch()
    run.accelerator.save_state(str(tmp_path))
    for i, expected in enumerate((run.found(), run.shadow.averages)):
        found = checkpoint.read(tmp_path / f"custom_checkpoint_{i}.pkl", names=[*expected])
        assert_close(found.weights, expected, rtol=0, atol=0)
        assert found.step == 6
