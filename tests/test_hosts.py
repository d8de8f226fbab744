"""In the averaging classes of other libraries: torch, Lightning, diffusers."""

from __future__ import annotations

import pickle
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import emajit
from emajit import schedules
from emajit.schedules import multi_avg_fn
from tests.counting import Operators

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A model with a buffer of each kind."""

    mask: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([True, False]))

    def drift(self) -> None:
        """As a step of training: all that is floating moves, and the counter counts."""
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor), alpha=0.1)
        assert self.norm.num_batches_tracked is not None
        self.norm.num_batches_tracked += 1
        self.mask = ~self.mask


SCHEDULES = [
    0.9,
    schedules.constant(0.99),
    schedules.warmup(0.9999),
    schedules.power_function(sigma_rel=0.1),
    schedules.debiased(0.9),
    schedules.half_life_fraction(0.2),
    schedules.every(schedules.uniform(), 3),
    lambda step: step / (step + 2),
]


class TestAveragedModel:
    @pytest.mark.parametrize("use_buffers", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("decay", SCHEDULES)
    def test_equals_the_functional_core(
        self, decay: Any, dtype: torch.dtype, use_buffers: bool
    ) -> None:
        model = Net(dtype)
        averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn(decay), use_buffers=use_buffers)
        model.drift()
        averaged.update_parameters(model)
        shadow = emajit.init(model.state_dict())
        for step in range(1, 8):
            model.drift()
            averaged.update_parameters(model)
            emajit.update_(shadow, model.state_dict(), step, decay=decay)
        if not use_buffers:
            shadow |= dict(model.named_buffers())
        assert_close(averaged.module.state_dict(), shadow, rtol=0, atol=0)
        assert averaged.n_averaged == 8

    def test_uniform_is_torchs_own_default(self) -> None:
        model = Net(torch.float64)
        ours = AveragedModel(model, multi_avg_fn=multi_avg_fn(schedules.uniform()))
        theirs = AveragedModel(model)
        for _ in range(9):
            model.drift()
            ours.update_parameters(model)
            theirs.update_parameters(model)
        assert_close(ours.state_dict(), theirs.state_dict())

    def test_stochastic_rounding_keeps_bfloat16_from_stalling(self) -> None:
        model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(model.weight)
        ends = {}
        roundings: list[Any] = ["nearest", "stochastic"]
        for rounding in roundings:
            averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn(0.999, rounding=rounding))
            averaged.update_parameters(model)
            moved = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
            nn.init.constant_(moved.weight, 1.5)
            for _ in range(200):
                averaged.update_parameters(moved)
            ends[rounding] = averaged.module.get_parameter("weight").float().mean().item()
        assert ends["nearest"] == 1.0
        assert ends["stochastic"] == pytest.approx(1.5 - 0.5 * 0.999**200, abs=0.01)

    def test_the_step_is_not_read_back(self) -> None:
        """On the meta device, where a read raises."""
        tensors = [torch.zeros(3, device="meta"), torch.zeros(2, device="meta")]
        average = multi_avg_fn(schedules.warmup(0.999))
        average(tensors, [t + 1 for t in tensors], torch.tensor(3, device="meta"))

    def test_is_one_operator(self) -> None:
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
        averages = [p.detach().clone() for p in model.parameters()]
        params = [p.detach() for p in model.parameters()]
        average = multi_avg_fn(schedules.warmup(0.999))
        with Operators() as seen:
            average(averages, params, 3)
        assert set(seen.counts) <= {"aten._foreach_lerp_.Scalar", "aten.can_cast.default"}
        assert seen.counts["aten._foreach_lerp_.Scalar"] == 1

    def test_goes_on_after_a_restart(self) -> None:
        model = Net()
        whole = AveragedModel(model, multi_avg_fn=multi_avg_fn(schedules.warmup(0.999)))
        for step in range(6):
            model.drift()
            whole.update_parameters(model)
            if step == 2:
                function = pickle.loads(pickle.dumps(whole.multi_avg_fn))
                resumed = AveragedModel(Net(), multi_avg_fn=function)
                resumed.load_state_dict(whole.state_dict())
            elif step > 2:
                resumed.update_parameters(model)
        assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("decay", "options", "error"),
        [
            (1.5, {}, ValueError),
            ("0.9", {}, TypeError),
            (0.9, {"rounding": "up"}, ValueError),
            (0.9, {"backend": "none"}, ValueError),
        ],
    )
    def test_bad_arguments_are_refused_at_once(
        self, decay: Any, options: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            multi_avg_fn(decay, **options)


@pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:Checkpoint directory .* exists and is not empty",
)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_lightnings_own_callback(use_buffers: bool, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    lightning = import_module("lightning.pytorch")
    callbacks = import_module("lightning.pytorch.callbacks")
    decay = schedules.power_function(sigma_rel=0.15)
    options: Any = {"multi_avg_fn": multi_avg_fn(decay), "use_buffers": use_buffers}
    states: list[dict[str, Tensor]] = []

    class Regression(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.net(batch[0]).square().mean()
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            states.append({name: t.detach().clone() for name, t in self.state_dict().items()})

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trained(epochs: int, checkpoint: Path | None = None) -> Any:
        model = Regression()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                callbacks.WeightAveraging(**options),
                callbacks.ModelCheckpoint(tmp_path, save_top_k=-1),
            ],
        )
        data = TensorDataset(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)))
        trainer.fit(model, DataLoader(data, batch_size=4), ckpt_path=checkpoint)
        return model

    def expected() -> dict[str, Tensor]:
        shadow = emajit.init(states[0])
        for step, state in enumerate(states):
            emajit.update_(shadow, state, step, decay=decay)
        if not use_buffers:
            shadow |= {name: t for name, t in states[-1].items() if "running" in name}
        return shadow

    found = trained(2).state_dict()
    assert len(states) == 12
    assert_close(found, expected(), rtol=0, atol=0)
    [first] = tmp_path.glob("epoch=0*.ckpt")
    del states[6:]
    assert_close(trained(2, first).state_dict(), found, rtol=0, atol=0)
    assert len(states) == 12


class TestDiffusers:
    def example(self) -> Any:
        for name in ("accelerate", "diffusers"):
            pytest.importorskip(name, reason=f"{name} is of the bench extra")
        return import_module("docs.diffusers_ema")

    def test_is_as_short_as_it_says(self) -> None:
        text = (Path(__file__).parents[1] / "docs/diffusers_ema.py").read_text()
        code = text.split('"""')[2]
        words = ("ema", "decay", "sync_gradients")
        assert sum(any(word in line for word in words) for line in code.splitlines()) <= 12

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_has_the_numbers_of_diffusers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        example = self.example()
        EMAModel = import_module("diffusers.training_utils").EMAModel  # noqa: N806
        peers: list[Any] = []
        decays: list[float] = []

        class Watched(emajit.LitEma):
            def __init__(self, model: nn.Module, decay: Any) -> None:
                super().__init__(model, decay)
                peers.append(EMAModel(model.parameters(), decay=0.999))

            def forward(self, model: nn.Module) -> None:
                super().forward(model)
                peers[0].step(model.parameters())
                decays.append(peers[0].cur_decay_value)

        monkeypatch.setattr(example, "LitEma", Watched)
        ema, logged = example.train(tmp_path, steps=6)
        assert_close([*ema.named_averages().values()], peers[0].shadow_params)
        assert [each["ema_decay"] for each in logged] == pytest.approx(decays)

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_saves_the_averages_and_resumes(self, tmp_path: Path) -> None:
        example, diffusers = self.example(), import_module("diffusers")
        whole, _ = example.train(tmp_path / "whole", steps=6)
        example.train(tmp_path / "parts", steps=3)
        parts, _ = example.train(tmp_path / "parts", steps=6)
        assert_close(parts.named_averages(), whole.named_averages(), rtol=0, atol=0)
        for name in ("whole", "parts"):
            loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / name / "unet_ema")
            assert_close(dict(loaded.named_parameters()), whole.named_averages(), rtol=0, atol=0)
            trained = diffusers.UNet2DModel.from_pretrained(tmp_path / name / "unet")
            assert not torch.equal(trained.conv_in.weight, loaded.conv_in.weight)
