"""Everybody's way of updating an average of a model's parameters, behind one interface.

Each is called as its documentation says, in its fastest setting, with a constant decay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import emajit
from tests import reference

DECAY = 0.9999
LIMIT = "flat lerp_ (the limit)"


class Contestant(ABC):
    """Built from a model, whose parameters are the first average."""

    name: str
    needs: str | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = dict(model.named_parameters())

    def observe(self) -> None:  # noqa: B027, only the limit has something to do
        """Called when the model's parameters have changed."""

    @abstractmethod
    def step(self) -> None:
        """Update the average with the parameters that the model has now."""

    @abstractmethod
    def averages(self) -> list[Tensor]:
        """The averages, in the order of `model.parameters()`."""


class FlatLerp(Contestant):
    """One contiguous tensor of the same size: what the memory allows."""

    name = LIMIT

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = self.flat()
        self.observe()

    def observe(self) -> None:
        self.flat_params = self.flat()

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params.values()])

    def step(self) -> None:
        self.shadow.lerp_(self.flat_params, 1 - DECAY)

    def averages(self) -> list[Tensor]:
        sizes = [p.numel() for p in self.params.values()]
        parts = torch.split(self.shadow, sizes)
        return [a.view_as(p) for a, p in zip(parts, self.params.values(), strict=True)]


class ForeachLerp(Contestant):
    """The operator on lists that are ready: no names, no checks."""

    name = "torch._foreach_lerp_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.tensors: list[Tensor] = list(self.params.values())
        self.shadow = [p.detach().clone() for p in self.tensors]

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_lerp_(self.shadow, self.tensors, 1 - DECAY)

    def averages(self) -> list[Tensor]:
        return self.shadow


class Published(Contestant):
    """LitEma as latent-diffusion has it."""

    name = "LitEma as published"
    litema: type[reference.LitEma | emajit.LitEma] = reference.LitEma

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ema = self.litema(model, DECAY, use_num_upates=False)

    def step(self) -> None:
        self.ema(self.model)

    def averages(self) -> list[Tensor]:
        return list(self.ema.buffers())[2:]


class Averaged(Contestant):
    """torch's own, in its `foreach` form."""

    name = "AveragedModel, multi_avg_fn"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        average = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(model, multi_avg_fn=average)
        self.ema.update_parameters(model)

    def step(self) -> None:
        self.ema.update_parameters(self.model)

    def averages(self) -> list[Tensor]:
        return list(self.ema.module.parameters())


class UpdateInPlace(Contestant):
    name = "emajit.update_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.shadow = emajit.init(self.params)

    def step(self) -> None:
        emajit.update_(self.shadow, self.params, 0, decay=DECAY)

    def averages(self) -> list[Tensor]:
        return list(self.shadow.values())


class Update(UpdateInPlace):
    name = "emajit.update"

    def step(self) -> None:
        self.shadow = emajit.update(self.shadow, self.params, 0, decay=DECAY)


class DropIn(Published):
    """Ours, with the same calls."""

    name = "emajit.LitEma"
    litema = emajit.LitEma


class Peer(Contestant):
    """Of a package; its first update copies the parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ema = self.build(model)
        self.step()

    @abstractmethod
    def build(self, model: nn.Module) -> Any: ...


class EmaPytorch(Peer):
    name = "ema-pytorch, use_foreach"
    needs = "ema_pytorch"

    def build(self, model: nn.Module) -> Any:
        return import_module("ema_pytorch").EMA(
            model,
            beta=DECAY,
            min_value=DECAY,
            update_after_step=-1,
            update_every=1,
            include_online_model=False,
            use_foreach=True,
        )

    def step(self) -> None:
        self.ema.update()

    def averages(self) -> list[Tensor]:
        return list(self.ema.ema_model.parameters())


class TorchEma(Peer):
    name = "torch-ema"
    needs = "torch_ema"

    def build(self, model: nn.Module) -> Any:
        torch_ema = import_module("torch_ema")
        return torch_ema.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)

    def step(self) -> None:
        self.ema.update()

    def averages(self) -> list[Tensor]:
        return list(self.ema.shadow_params)


class Diffusers(Peer):
    name = "diffusers EMAModel, foreach"
    needs = "diffusers"

    def build(self, model: nn.Module) -> Any:
        training_utils = import_module("diffusers.training_utils")
        return training_utils.EMAModel(
            model.parameters(), decay=DECAY, min_decay=DECAY, foreach=True
        )

    def step(self) -> None:
        self.ema.step(self.model.parameters())

    def averages(self) -> list[Tensor]:
        return list(self.ema.shadow_params)


class Timm(Peer):
    name = "timm ModelEmaV3"
    needs = "timm"

    def build(self, model: nn.Module) -> Any:
        return timm("utils/model_ema.py").ModelEmaV3(model, decay=DECAY)

    def step(self) -> None:
        self.ema.update(self.model)

    def averages(self) -> list[Tensor]:
        return list(self.ema.module.parameters())


def timm(file: str) -> Any:
    """A file of timm alone: the package needs torchvision, which these do not."""
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    alone = spec_from_file_location("timm_file", Path(spec.origin).parent / file)
    assert alone is not None
    assert alone.loader is not None
    module = module_from_spec(alone)
    alone.loader.exec_module(module)
    return module


OURS: tuple[type[Contestant], ...] = (UpdateInPlace, DropIn, Update)
PEERS: tuple[type[Contestant], ...] = tuple(
    peer
    for peer in (Averaged, EmaPytorch, Timm, Diffusers, TorchEma, Published)
    if peer.needs is None or find_spec(peer.needs)
)
EVERYBODY: tuple[type[Contestant], ...] = (FlatLerp, ForeachLerp, *OURS, *PEERS)
