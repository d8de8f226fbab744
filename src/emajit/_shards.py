"""DTensors: the shard that this process holds, and its place in the whole tensor."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emajit import _torch

_LAZY = nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer


class Region(NamedTuple):
    """The indices of a shard in the row-major order of the whole: `first + sum(i * strides)`."""

    first: int
    strides: tuple[int, ...]


def _kind() -> Any:
    """The class of DTensors; () while its module is not loaded, since there are none then."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def is_one(leaf: Any) -> bool:
    """Whether the leaf is a DTensor."""
    return isinstance(leaf, _kind())


def are_in(leaves: Iterable[Any]) -> bool:
    """Whether a DTensor is among the leaves."""
    others = set(map(type, leaves)) - {Tensor, nn.Parameter}  # torch 2.6 cannot trace `PLAIN` here
    return bool(others) and any(issubclass(other, _kind()) for other in others)


def local(leaves: Iterable[Any]) -> list[Any]:
    """The shards of DTensors that this process holds; other tensors unchanged."""
    kind = _kind()
    return [_torch.shard(leaf) if isinstance(leaf, kind) else leaf for leaf in leaves]


def placed(leaves: Iterable[Any]) -> list[Any]:
    """The whole shape, mesh, placements and place in the mesh of each DTensor; None for others.

    The place is needed: a mesh unpickled from another process's file equals our own.
    """
    kind = _kind()
    return [
        (leaf.shape, leaf.device_mesh, leaf.placements, _place_in(leaf.device_mesh))
        if isinstance(leaf, kind)
        else None
        for leaf in leaves
    ]


def opened(
    shadows: list[Any], params: list[Any]
) -> tuple[tuple[Any, ...], tuple[list[Any], list[Any]]] | None:
    """The placements of the params, and the shards of both lists; None without DTensors.

    None, too, where the placement of a shadow differs from its parameter's.
    """
    if not are_in((*shadows, *params)):
        return None
    places = placed(params)
    if placed(shadows) != places * (len(shadows) // max(1, len(params))):
        return None
    return tuple(places), (local(shadows), local(params))


def _place_in(mesh: Any) -> tuple[int, ...]:
    """The coordinates of this process in a mesh; () outside the mesh."""
    return tuple(mesh.get_coordinate() or ())


def misplaced(found: Any, expected: Any) -> str:
    """How the placement of a tensor differs from the expected one; "" if it does not."""
    if not are_in([found, expected]) or placed([found]) == placed([expected]):
        return ""
    return f"expected {described(expected)}, found {described(found)}"


def reshard(model: Any) -> None:
    """Reshard the parameters of FSDP2, which a forward may have left whole.

    Raises ValueError for the older FSDP, which gathers its parameters from memory of its own.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        for part in model.modules():
            if isinstance(part, module.FSDPModule):
                part.reshard()
            elif isinstance(part, module.FullyShardedDataParallel):
                found = type(part).__name__
                raise ValueError(f"model: expected fully_shard, found {found}")  # noqa: TRY004


def has_fsdp(model: nn.Module) -> bool:
    """Whether `fully_shard` has wrapped a part of the model."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and any(isinstance(m, module.FSDPModule) for m in model.modules())


def is_absent(leaf: Any) -> bool:
    """Whether a leaf has no values: of a lazy module, or a placeholder of DeepSpeed's ZeRO 3."""
    return isinstance(leaf, _LAZY) or (hasattr(leaf, "ds_id") and leaf.numel() == 0)


def check_present(name: str, leaf: Any) -> None:
    """Raise ValueError where `is_absent`."""
    if isinstance(leaf, _LAZY):
        raise ValueError(  # noqa: TRY004, a parameter all the same
            f"{name}: expected a parameter with values, found one of a lazy module; call the "
            "model once before"
        )
    if is_absent(leaf):
        raise ValueError(
            f"{name}: expected a parameter, found a placeholder of DeepSpeed ZeRO 3; call within "
            "deepspeed.zero.GatheredParameters(model.parameters()), or use ZeRO 2 or fully_shard"
        )


def described(leaf: Any) -> str:
    """A DTensor or a tensor in words for an error."""
    if not is_one(leaf):
        return f"a whole tensor of shape {tuple(leaf.shape)}"
    placements = ", ".join(map(repr, leaf.placements))
    mesh = leaf.device_mesh
    return f"shape {tuple(leaf.shape)} as {placements} on {mesh} at {_place_in(mesh)}"


def like(leaf: Any, shard: Tensor) -> Any:
    """`shard` as a DTensor placed like `leaf`, if `leaf` is a DTensor."""
    if not is_one(leaf):
        return shard
    return type(leaf.data).from_local(
        shard,
        leaf.device_mesh,
        leaf.placements,
        run_check=False,
        shape=leaf.shape,
        stride=leaf.stride(),
    )


def whole(tensor: Any) -> Tensor:
    """A DTensor gathered into host memory, which all processes must call; others unchanged.

    Raises RuntimeError where torch would put the shards together in a wrong order.
    """
    if is_one(tensor) and not _torch.gathers_right(tensor):
        raise RuntimeError(
            f"expected shards of one size, found {described(tensor)}, which this torch "
            f"({torch.__version__}) gathers in a wrong order; use torch 2.10 or later"
        )
    gathered: Tensor = tensor.full_tensor().cpu() if is_one(tensor) else tensor
    return gathered


def split_as(leaf: Any, tensor: Tensor) -> Any:
    """A whole tensor, split and placed like `leaf` if `leaf` is a DTensor."""
    if not is_one(leaf) or is_one(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415, as in `_computed_region`

    # Every process has the whole tensor; torch 2.6 sends the first one's all the same.
    has_option = "src_data_rank" in inspect.signature(distribute_tensor).parameters
    options: Any = {"src_data_rank": None} if has_option else {}
    return distribute_tensor(tensor.to(leaf.device), leaf.device_mesh, leaf.placements, **options)


def region(leaf: Any) -> Region | None:
    """The region of a DTensor's local shard; None for a whole tensor."""
    if not is_one(leaf):
        return None
    found: Region = _region(leaf.shape, leaf.device_mesh, leaf.placements)
    return found


@_torch.constant_in_traces
def _region(shape: torch.Size, mesh: Any, placements: tuple[Any, ...]) -> Region:
    return _computed_region(shape, mesh, placements, _place_in(mesh))


@lru_cache(maxsize=1024)
def _computed_region(
    shape: torch.Size,
    mesh: Any,
    placements: tuple[Any, ...],
    _place: tuple[int, ...],  # equal meshes may differ in it
) -> Region:
    for i, placement in enumerate(placements):
        parts = getattr(placement, "split_factor", None)
        later = [
            mesh.size(j)
            for j in range(i + 1, mesh.ndim)
            if getattr(placements[j], "dim", None) == getattr(placement, "dim", None)
        ]
        if parts not in (None, math.prod(later)):  # equal for FSDP upon tensor parallelism
            raise ValueError(f"expected shards that are blocks of the whole, found {placements}")
    strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    offsets = _torch.shard_offsets(shape, mesh, placements)
    return Region(sum(o * s for o, s in zip(offsets, strides, strict=True)), strides)
