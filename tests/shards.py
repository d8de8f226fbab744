"""One process in the place of any rank of a group, which never communicates."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

# Whether each process can split what it has, without a message; not before torch 2.7.
EACH_SPLITS = "src_data_rank" in inspect.signature(distribute_tensor).parameters


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def split(whole: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    options: Any = {"src_data_rank": None} if EACH_SPLITS else {}
    return distribute_tensor(whole.clone(), mesh, placements, **options)


def line(world: int, name: str | None = None) -> DeviceMesh:
    """A mesh of one dimension. Torch caches by equal meshes: another rank takes another name."""
    names = None if name is None else (name,)
    return DeviceMesh("cpu", torch.arange(world), mesh_dim_names=names)


def grid(world: int, name: int) -> DeviceMesh:
    """A mesh of two dimensions, or of a world of 3 as `line`."""
    if world % 2:
        return line(world, f"{name}")
    return DeviceMesh(
        "cpu", torch.arange(world).view(2, -1), mesh_dim_names=(f"{name}a", f"{name}b")
    )
