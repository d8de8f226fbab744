"""A stand-in for DeepSpeed: a model that is divided as ZeRO 3 divides it, without DeepSpeed.

A parameter is empty, and `ds_tensor` holds this process's part: flat, padded to one size. Some stay
gathered, as small ones do. Where DeepSpeed is installed, `zero_ranks.py` runs DeepSpeed itself.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from emajit import _shards, schedules
from emajit.integrations import _average, _zero

SMALL = 8  # a parameter of so many numbers stays gathered


class Optimizer:
    """The calls of DeepSpeed's optimizer around checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        # Weak: a cycle would keep the group of processes until the interpreter ends.
        self.model = weakref.proxy(model)

    def checkpoint_event_prologue(self) -> None:
        for p in self.model.parameters():
            p.data = torch.empty(0)

    def checkpoint_event_epilogue(self) -> None:
        for p in self.model.parameters():
            if p.ds_numel <= SMALL:
                p.data = value_of(p)


def divided(model: nn.Module) -> Any:
    optimizer = Optimizer(model)
    for i, p in enumerate(model.parameters()):
        held: Any = p
        held.ds_id, held.ds_shape, held.ds_numel = i, p.shape, p.numel()
        held.ds_process_group, held._z3_optimizer = dist.group.WORLD, optimizer
        held.ds_tensor = part_of(p.detach())
    optimizer.checkpoint_event_prologue()
    optimizer.checkpoint_event_epilogue()
    return model


def part_of(value: Tensor) -> Tensor:
    size = -(-value.numel() // dist.get_world_size())
    padded = torch.full((size * dist.get_world_size(),), torch.nan)
    padded[: value.numel()] = value.flatten()
    return padded[size * dist.get_rank() :][:size].clone()


def value_of(param: Any) -> Tensor:
    parts = [torch.empty_like(param.ds_tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, param.ds_tensor)
    return torch.cat(parts)[: param.ds_numel].reshape(param.ds_shape)


def write(model: nn.Module, values: nn.Module) -> None:
    """Write all parts, as an optimizer's step does."""
    for p, value in zip(model.parameters(), values.parameters(), strict=True):
        part: Any = p.ds_tensor  # type: ignore[attr-defined]
        part.copy_(part_of(value.detach()))
    p._z3_optimizer.checkpoint_event_epilogue()  # type: ignore[attr-defined]


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters; a gathered one must have the numbers of the parts."""
    found = {name: value_of(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.numel() == (found[name].numel() if found[name].numel() <= SMALL else 0)
        assert torch.equal(p, found[name]) or not p.numel()
    return found


def averages_of(model: nn.Module, decay: float, **options: Any) -> _average.Averages:
    given: dict[str, Any] = {
        "dtype": None,
        "buffers": "ignore",
        "rounding": "nearest",
        "nonfinite": "propagate",
        "backend": "auto",
        "pull": None,
        "posthoc": None,
    }
    assert _zero.prepare(model)
    chosen = _average.checked(schedules.constant(decay), 1, **given | options)
    return _average.Averages(model, chosen)


def whole_of(averages: _average.Averages) -> dict[str, Tensor]:
    held = averages[None].named_averages()
    return {
        name: _shards.whole(value).reshape(averages.shapes[name]) for name, value in held.items()
    }
