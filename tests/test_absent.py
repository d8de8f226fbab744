"""Parameters that are not there: placeholders of ZeRO 3, offloaded weights, lazy modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import emajit
from emajit import LitEma


def placeholders() -> nn.Module:
    """As DeepSpeed leaves the parameters of ZeRO 3 between two forwards."""
    model = nn.Linear(2, 2)
    for i, p in enumerate(model.parameters()):
        p.ds_id = i  # type: ignore[attr-defined]
        p.ds_shape = p.shape  # type: ignore[attr-defined]
        p.data = torch.empty(0)
    return model


class TestZero3:
    def test_no_averages_of_placeholders(self) -> None:
        with pytest.raises(ValueError, match=r"weight: .*ZeRO 3; call within .*GatheredParameters"):
            LitEma(placeholders())
        with pytest.raises(ValueError, match=r"params\['weight'\]: .*placeholder of DeepSpeed"):
            emajit.init(dict(placeholders().named_parameters()))

    def test_no_update(self) -> None:
        whole = nn.Linear(2, 2)
        ema, shadow = LitEma(whole), emajit.init(dict(whole.named_parameters()))
        before = {name: average.clone() for name, average in shadow.items()}
        model = placeholders()
        with pytest.raises(ValueError, match=r"expected shape \(2, 2\)"):
            ema(model)
        with pytest.raises(ValueError, match=r"expected shape \(2, 2\)"):
            emajit.update_(shadow, dict(model.named_parameters()), 0, decay=0.5)
        for found in (shadow, ema.named_averages()):
            torch.testing.assert_close(found, before, rtol=0, atol=0)

    def test_no_scope(self) -> None:
        whole, model = nn.Linear(2, 2), placeholders()
        ema = LitEma(whole)
        for scope in (ema.ema_scope(model), emajit.ema_scope(model, ema.named_averages())):
            with pytest.raises(ValueError, match="shape"), scope:
                pass

    def test_gathered_they_are_whole(self) -> None:
        model = placeholders()
        for p in model.parameters():
            p.data = torch.ones(p.ds_shape)  # type: ignore[attr-defined]
        ema = LitEma(model)
        ema(model)
        assert ema.named_averages()["weight"].shape == (2, 2)


class TestLazy:
    def test_no_averages_before_the_first_call(self) -> None:
        model = nn.Sequential(nn.LazyLinear(3))
        with pytest.raises(ValueError, match=r"^0.weight: .* lazy module; call the model once"):
            LitEma(model)
        with pytest.raises(ValueError, match=r"^params\['0.weight'\]: .* lazy module; call the"):
            emajit.init(dict(model.named_parameters()))
        model(torch.ones(1, 2))
        assert LitEma(model).named_averages()["0.weight"].shape == (3, 2)


class TestOffloaded:
    def test_no_scope_and_no_averages(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = nn.Linear(1, 1, bias=False)
        ema = LitEma(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        with (
            pytest.raises(ValueError, match="expected parameters with memory"),
            ema.ema_scope(model),
        ):
            pass
        with pytest.raises(
            ValueError, match=r"weight: .*accelerate has offloaded; build the LitEma"
        ):
            LitEma(model)
        before = ema.named_averages()["weight"].clone()
        with pytest.raises((ValueError, NotImplementedError)):
            ema(model)
        assert torch.equal(ema.named_averages()["weight"], before)

    def test_a_model_that_has_no_memory_yet(self) -> None:
        """As for deferred initialisation: the averages start when there are weights."""
        with torch.device("meta"):
            model = nn.Linear(2, 2)
        ema = LitEma(model)
        model.to_empty(device="cpu")
        model.reset_parameters()
        ema.to_empty(device="cpu")
        with ema.ema_scope(model):
            assert not model.weight.is_meta
