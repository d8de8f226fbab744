"""Checkpoints that hold an average twice, or several in the place of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

import emajit
from emajit import LitEma, checkpoint


def controls() -> dict[str, Tensor]:
    return {"decay": torch.tensor(0.999), "num_updates": torch.tensor(3, dtype=torch.int32)}


class TestTwoKeysOfOneParameter:
    def state(self, other: float) -> dict[str, Tensor]:
        flat = {"weight": torch.ones(2), "_orig_modweight": torch.full((2,), other)}
        averages = {f"model_ema.{key}": v for key, v in (controls() | flat).items()}
        return {"model.weight": torch.zeros(2), **averages}

    def test_that_differ(self) -> None:
        with pytest.raises(ValueError, match=r"expected one average of 'model.weight', found an"):
            checkpoint.read(self.state(2.0))

    def test_that_are_the_same(self) -> None:
        found = checkpoint.read(self.state(1.0))
        assert found.weights["model.weight"].tolist() == [1.0, 1.0]

    def test_in_a_litema(self) -> None:
        ema = LitEma(nn.Linear(2, 2))
        state = ema.state_dict() | {"_orig_modweight": torch.zeros(2, 2)}
        with pytest.raises(RuntimeError, match='unexpected key "_orig_modweight"'):
            ema.load_state_dict(state)


class TestSeveralShadows:
    @pytest.mark.parametrize("kind", [list, tuple])
    def test_a_list_of_shadows_is_not_one(self, kind: Any, tmp_path: Path) -> None:
        params = dict(nn.Linear(2, 2).named_parameters())
        shadows = kind([emajit.init(params), emajit.init(params)])
        tree = {"shadow": shadows, "step": 3}
        torch.save(tree, tmp_path / "two.pt")
        for source in (tree, tmp_path / "two.pt"):
            with pytest.raises(ValueError, match=r"found two: emajit\n  shadow.0: 2 tensors"):
                checkpoint.read(source)
        assert_close(checkpoint.read_all(tree)[1].weights, shadows[1])
        found = checkpoint.read({"shadow": shadows[1], "step": 3})
        assert_close(found.weights, shadows[1])

    def test_a_list_of_layers_is_one(self) -> None:
        shadow = [{"w": torch.ones(2, 3)}, {"w": torch.ones(3, 1)}, torch.ones(1)]
        found = checkpoint.read({"shadow": shadow, "step": 3})
        assert [*found.weights] == ["0.w", "1.w", "2"]


class TestTiesInAFileThatKnowsNone:
    def held(self, second: Tensor, first: Tensor) -> dict[str, Tensor]:
        raw = {"model.emb.weight": first, "model.head.weight": second}
        flat = controls() | {"embweight": torch.full_like(first, 7.0)}
        return {**raw, **{f"model_ema.{key}": v for key, v in flat.items()}}

    def test_the_second_name_has_the_average_too(self, tmp_path: Path) -> None:
        first = torch.randn(3, 2)
        save_file(self.held(first.clone(), first), tmp_path / "tied.safetensors")
        found = checkpoint.read(tmp_path / "tied.safetensors")
        for name in ("model.emb.weight", "model.head.weight"):
            assert_close(found.weights[name], torch.full((3, 2), 7.0))
        assert found.raw_only == ()

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (torch.randn(3, 2), torch.randn(3, 2)),
            (torch.zeros(3, 2), torch.zeros(3, 2)),  # as an initialisation may be
            (torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2).double()),
            (torch.arange(40.0).view(20, 2), torch.arange(40.0).view(20, 2).fmod(39.0)),
        ],
    )
    def test_other_weights_stay_as_trained(
        self, first: Tensor, second: Tensor, tmp_path: Path
    ) -> None:
        save_file(self.held(second, first), tmp_path / "apart.safetensors")
        found = checkpoint.read(tmp_path / "apart.safetensors")
        assert_close(found.weights["model.head.weight"], second)
        assert found.raw_only == ("model.head.weight",)


class TestAModuleNamedAsAWrapper:
    """Parameters `w` and `module.w` side by side."""

    def host(self) -> Any:
        host: Any = nn.Module()
        host.model = nn.Module()
        host.model.w = nn.Parameter(torch.zeros(2))
        host.model.module = nn.ParameterDict({"w": torch.ones(2)})
        host.model_ema = LitEma(host.model)
        for p in host.model.parameters():
            p.data.add_(1.0)
        host.model_ema(host.model)
        return host

    def test_both_keys_tell_them_apart(self, tmp_path: Path) -> None:
        host = self.host()
        averages = host.model_ema.named_averages()
        assert [*averages] == ["w", "module.w"]
        found = checkpoint.read(host.state_dict())
        alone = checkpoint.read(host.model_ema.state_dict(), names=host.model)
        checkpoint.write(tmp_path / "again", found, layout="litema")
        again = checkpoint.read(tmp_path / "again")
        for name, average in averages.items():
            assert torch.equal(found.weights[f"model.{name}"], average)
            assert torch.equal(again.weights[f"model.{name}"], average)
            assert torch.equal(alone.weights[name], average)

    def test_one_key_does_not(self) -> None:
        state = self.host().state_dict()
        del state["model_ema.modulew"]
        with pytest.raises(ValueError, match=r"'w': expected one .* found \['model.w', 'model.mod"):
            checkpoint.read(state)

    def test_keys_of_a_wrapped_model_are_not_taken_for_those_of_the_bare_one(self) -> None:
        host = self.host()
        state = host.state_dict()
        state["model_ema.modulemodulew"] = state.pop("model_ema.modulew")
        state["model_ema.modulew"] = state.pop("model_ema.w")
        with pytest.raises(ValueError, match=r"one average of 'model\.module\.w', found an"):
            checkpoint.read(state)
