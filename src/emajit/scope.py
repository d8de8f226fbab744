"""Evaluate a model with its averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from emajit import _names


@contextmanager
def ema_scope(model: nn.Module, shadow: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which `model` computes with the tensors of `shadow` themselves.

    Nothing is copied: each parameter refers to the memory of its average inside, and to its own
    again afterwards, whatever was raised. The `nn.Parameter` objects stay the same, so optimizers,
    hooks, tied weights and compiled models keep working. A shadow in another dtype makes the model
    compute in that dtype.

    Args:
        model: any module; one inside `torch.compile`, DDP or activation checkpointing is fine.
        shadow: averages by the names of `named_parameters()`, with or without the prefixes that
            such wrappers add. Averages of buffers may be among them. A parameter that does not
            require grad may be left out, and so may all but one of the names of a tied one.

    Raises:
        ValueError: a name is missing in `shadow` or unknown to `model`, a shape or device differs,
            or tied parameters have different averages. The model is then untouched.

    >>> model, shadow = nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[2.0]])}
    >>> with torch.no_grad(), ema_scope(model, shadow):
    ...     model(torch.ones(1))
    tensor([2.])
    """
    averages = _averages(model, shadow)
    raw = [(tensor, tensor.data) for tensor, _ in averages]
    try:
        for tensor, average in averages:
            tensor.data = average
        yield
    finally:
        for tensor, data in raw:
            tensor.data = data


def _averages(model: nn.Module, shadow: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each parameter and buffer of the model that has an average, once, with that average."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    partners = _names.match(tensors, shadow)
    unknown = [name for name in shadow if name not in partners]
    if unknown:
        raise ValueError(f"shadow: expected names of parameters of the model, found {unknown}")
    averages: dict[Tensor, tuple[str, Tensor]] = {}
    for name, partner in partners.items():
        tensor, average = tensors[partner], shadow[name]
        if average.shape != tensor.shape or average.device != tensor.device:
            expected, found = (f"{tuple(t.shape)} on {t.device}" for t in (tensor, average))
            raise ValueError(f"shadow[{name!r}]: expected shape {expected}, found {found}")
        first, known = averages.setdefault(tensor, (name, average))
        if not (known.is_set_to(average) or torch.equal(known, average)):
            raise ValueError(
                f"shadow[{name!r}]: expected the average of {first!r}, to which the model ties it, "
                "found another"
            )
    missing = [
        name for name, p in model.named_parameters() if p.requires_grad and p not in averages
    ]
    if missing:
        raise ValueError(
            f"shadow: expected an average of each trainable parameter, missing {missing}"
        )
    return [(tensor, average.detach()) for tensor, (_, average) in averages.items()]
