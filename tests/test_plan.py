"""A cached plan is found again only for the call that it was made for: each part of its key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard

import emajit
from emajit import _plan
from tests import shards

BF16 = torch.bfloat16
Trees = dict[str, Tensor]


def noisy(count: int = 2, dtype: torch.dtype = BF16) -> Trees:
    torch.manual_seed(0)
    return {f"p{i}": torch.randn(64).to(dtype) for i in range(count)}


def renamed(tree: Trees) -> Trees:
    return {f"q{i}": leaf for i, leaf in enumerate(tree.values())}


def swapped(tree: Trees) -> Trees:
    first, *others = tree
    return {first: tree[others[-1]], others[-1]: tree[first]}


Change = Callable[[Trees, Trees, dict[str, Any]], tuple[Trees, Trees, dict[str, Any]]]
CHANGES: dict[str, Change] = {
    "rounding": lambda s, p, o: (s, p, o | {"rounding": "nearest"}),
    "nonfinite": lambda s, p, o: (s, p, o | {"nonfinite": "skip"}),
    "names": lambda s, p, o: (renamed(s), renamed(p), o),
    "decay": lambda s, p, o: (s, p, o | {"decay": torch.tensor(0.25, dtype=torch.float64)}),
    "params": lambda s, p, o: (s, swapped(p), o),
    "shadow": lambda s, p, o: (swapped(s), p, o),
}


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_call_is_computed_as_if_it_were_the_first(change: str, rounding: str) -> None:
    """The pure update takes no plan from the cache."""
    shadow, params = noisy(), {name: leaf + 1 for name, leaf in noisy().items()}
    params["p0"][:8] = torch.nan
    options: dict[str, Any] = {"decay": 0.9, "rounding": rounding, "nonfinite": "propagate"}
    clean = copy.deepcopy(shadow)
    for _ in range(2):
        emajit.update_(shadow, params, 3, **options)
    for name, leaf in shadow.items():
        leaf.copy_(clean[name])
    shadow, params, options = CHANGES[change](shadow, params, options)
    expected = emajit.update(copy.deepcopy(shadow), params, 3, **options)
    emajit.update_(shadow, params, 3, **options)
    for name, leaf in expected.items():
        assert torch.equal(shadow[name].nan_to_num(7.0), leaf.nan_to_num(7.0)), name


@pytest.mark.parametrize("first", ["eager", "auto"])
def test_a_backend_that_does_not_exist_is_refused_after_another(first: str) -> None:
    shadow, params = noisy(), noisy()
    emajit.update_(shadow, params, 0, decay=0.9, backend=first)
    with pytest.raises(ValueError, match="backend: expected"):
        emajit.update_(shadow, params, 1, decay=0.9, backend="inductive")


def test_the_noise_of_shards_is_that_of_their_place() -> None:
    """The memory is the same, and the meshes of two processes are equal."""

    def noised(s: Tensor, p: Tensor) -> Tensor:
        found: Tensor = emajit.update([s], [p], 0, decay=0.9, rounding="stochastic")[0]
        return found

    whole = torch.zeros(8, 8, dtype=BF16), torch.rand(8, 8).to(BF16)
    lower, alone = noised(*whole)[4:], noised(*(leaf[4:] for leaf in whole))
    assert not torch.equal(lower, alone)
    own = [leaf[4:].clone() for leaf in whole]
    cases: list[Any] = [(0, Shard(0), alone), (1, Shard(0), lower), (1, Replicate(), alone)]
    for rank, placement, expected in cases:
        with shards.as_rank(rank, 2):
            mesh = shards.line(2)
            s, p = ([DTensor.from_local(t, mesh, [placement], run_check=False)] for t in own)
            own[0].zero_()
            emajit.update_(s, p, 0, decay=0.9, rounding="stochastic")
        assert torch.equal(own[0], expected), (rank, placement)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_plan_made_of_fake_tensors_is_not_kept(rounding: Any) -> None:
    """Its hash keys would be fake, too, and so would all that is computed with them."""
    shadow, params = {"w": torch.zeros(100, dtype=torch.bfloat16)}, {"w": torch.ones(100)}
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            emajit.update_(shadow, params, 0, decay=0.5, rounding=rounding)
        with FakeTensorMode():
            fake = {"w": torch.zeros(5, dtype=torch.bfloat16)}
            emajit.update_(fake, {"w": torch.ones(5)}, 0, decay=0.5, rounding=rounding)
    assert not shadow["w"].any()
    emajit.update_(shadow, params, 0, decay=0.5, rounding=rounding)
    assert (shadow["w"] == 0.5).all()


@pytest.mark.parametrize("several", [1, 2])
def test_a_decay_on_a_device_has_a_plan_of_its_own(several: int) -> None:
    """The plan of a number would read it back."""
    decays: list[Any] = [0.9] * several
    on_device = [torch.tensor(0.9, dtype=torch.float64)] * several

    def kernels(*calls: list[Any]) -> list[Any]:
        _plan._plans.clear()
        shadows, params = [noisy(dtype=torch.float32) for _ in decays], noisy(dtype=torch.float32)
        for call in calls:
            found, *_ = _plan.find(shadows, params, call, "nearest", "propagate", "eager")
        return [kernel for _, kernel in found.groups]

    assert kernels(on_device) != kernels(decays)
    assert kernels(decays, on_device) == kernels(on_device)
    assert kernels(on_device, decays) == kernels(decays)
