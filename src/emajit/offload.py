r"""Averages in host memory for parameters on a GPU (experimental: not yet measured on a GPU).

For a model that leaves no room for its averages on the GPU. `init` and `update_` stand in place of
`emajit.init` and `emajit.update_`; `fetch` brings the averages to the device for an evaluation:

>>> import torch
>>> from torch import nn
>>> from emajit import ema_scope, offload
>>> model = nn.Linear(2, 1)  # .cuda()
>>> params = dict(model.named_parameters())
>>> shadow = offload.init(params, dtype=torch.float32, pin_memory=True)
>>> for step in range(3):  # train, then
...     _ = offload.update_(shadow, params, step, decay=0.999)
>>> with torch.no_grad(), ema_scope(model, offload.fetch(shadow)):
...     prediction = model(torch.ones(2))

An update copies the averages to the device of their parameters, averages there, and copies back:
piece by piece, so that the device needs little memory whatever the size of the model (16 to 160
MiB). It runs in a side stream. With page-locked averages, `pin_memory=True`, neither the host nor
the training waits. A read of an average waits for the device. The bits are those of
`emajit.update_` on the device. `update_many_` is for several averages.
`emajit.checkpoint.save` and `load` take the shadow as any other.

## Limits

- CUDA devices only. For parameters on a CPU the shadow is an ordinary one.
- For an evaluation the device has to hold all averages. Free memory of the training before.
- Page-locked memory is rounded up to powers of two, to at most twice its size; see `init`.
- Before anything but an optimizer of `torch.optim` writes the parameters, call
  `torch.cuda.synchronize()`.
- DTensors are refused, and so are captures of CUDA graphs.
- Tested with stand-ins for a device and its streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from emajit import _kernels, _paths, _plan, _shards, _torch, _tree, functional, scope
from emajit._kernels import Update
from emajit._shards import Region
from emajit._torch import pytree
from emajit.functional import Decay, Nonfinite, Rounding, Schedule, Step, Tree

__all__ = ["init", "update_", "update_many_", "fetch"]  # noqa: RUF022, in the order of use

# The most numbers in a piece. It takes at most 80 bytes for each on the device, 160 MiB.
_PIECE = 2**21

_streams: dict[torch.device, torch.cuda.Stream] = {}
_hooks: list[Any] = []


def init(params: Tree, *, dtype: torch.dtype | None = None, pin_memory: bool = False) -> Tree:
    """`emajit.init` in host memory, for `offload.update_`.

    A read of such a leaf, or of a view of it, waits for the device. So does the call of `numpy()`,
    but a later read of the array does not wait: call `torch.cuda.synchronize()` before it.

    Args:
        params: as in `emajit.init`, on CUDA devices or the CPU.
        dtype: as in `emajit.init`.
        pin_memory: lock the pages, so that `update_` runs in a side stream while host and training
            go on. The next `step` of an optimizer of `torch.optim` waits for this stream on the
            device. For leaves that require no grad, such as buffers, the training waits at once.
            Call `torch.cuda.synchronize()` before anything else writes the parameters, such as
            operators of your own or an optimizer in a CUDA graph. PyTorch rounds the locked bytes
            of each leaf up to a power of two, at most twice its size; newer releases have the
            option `PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:...` to limit this. Without a
            CUDA device `pin_memory` has no effect.

    Raises:
        TypeError: a leaf is neither a tensor nor None.
        ValueError: `dtype` is not a real floating-point dtype; the parameters are DTensors, or on a
            device that is neither a CPU nor CUDA.
    """
    _tree.check_dtype(dtype)
    _paths.check_leaves("params", params)
    if _shards.are_in(pytree.tree_leaves(params)):
        raise ValueError("params: expected whole tensors, found DTensors")
    pairs = _tree.pair([params], params)
    pinned = pin_memory and torch.cuda.is_available()
    copies: list[Tensor] = []
    for i, p in zip(_tree.firsts(pairs.slots), pairs.params, strict=True):
        if p.device.type not in ("cpu", "cuda"):
            where = _paths.path("params", params, i)
            raise ValueError(f"{where}: expected it on cpu or cuda, found {p.device}")
        held = torch.empty_like(
            p.detach(), dtype=_tree.copy_dtype(p, dtype), device="cpu", pin_memory=pinned
        ).copy_(p.detach())
        copies.append(held if p.is_cpu else offloaded(held, p.device))
    return _tree.rebuild(params, copies, pairs.slots)  # type: ignore[no-any-return]


def update_(
    shadow: Tree,
    params: Any,
    step: Step,
    *,
    decay: Decay | Schedule,
    rounding: Rounding = "nearest",
    nonfinite: Nonfinite = "propagate",
) -> Tree:
    """`emajit.update_` of a shadow from `init`, with the same bits as on the device.

    It takes up to 160 MiB on the device, more for a large leaf that is not contiguous, which cannot
    be split. Leaves of the shadow that are on the device are averaged there.

    Raises ValueError, TypeError and RuntimeError as `emajit.update_`; ValueError also where a
    parameter has changed its device, RuntimeError in a capture of a CUDA graph.
    """
    _update_([shadow], params, step, [decay], rounding, nonfinite)
    return shadow


def update_many_(
    shadows: Sequence[Tree],
    params: Any,
    step: Step,
    *,
    decays: Sequence[Decay | Schedule],
    rounding: Rounding = "nearest",
    nonfinite: Nonfinite = "propagate",
) -> Sequence[Tree]:
    """`emajit.update_many_` of shadows from `init`, as `update_`."""
    _update_(shadows, params, step, decays, rounding, nonfinite)
    return shadows


def fetch(shadow: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Copies of the averages on the devices of their parameters, for `emajit.ema_scope`."""
    return {
        name: leaf.to(leaf.home) if isinstance(leaf, Offloaded) else leaf
        for name, leaf in shadow.items()
    }


def _update_(
    shadows: Sequence[Any],
    params: Any,
    step: Step,
    decays: Sequence[Decay | Schedule],
    rounding: str,
    nonfinite: str,
) -> None:
    alphas = functional.alphas_of(shadows, decays, step)
    homes = {
        id(leaf.raw): leaf.home  # not its address: empty leaves have none
        for leaf in pytree.tree_leaves([*shadows])
        if isinstance(leaf, Offloaded)
    }
    raw = pytree.tree_map_only(Offloaded, lambda leaf: leaf.raw, [*shadows])
    plan, held, partners = _plan.find(
        raw, params, alphas, rounding, nonfinite, "eager", same_device=False
    )
    scope.check_outside(partners)
    if _torch.in_transform():  # where `no_grad` lets tangents through
        partners = [p.detach() for p in partners]
    expected = [homes.get(id(s), s.device) for s in held]
    for i, (home, p) in enumerate(zip(expected, partners, strict=True)):
        if p.device != home:
            leaf = _tree.firsts(plan.slots)[i]
            where = _paths.path("params", params, leaf % (len(plan.slots) // len(shadows)))
            raise ValueError(f"{where}: expected device {home} as in shadow, found {p.device}")
    keys = plan.keys
    with torch.no_grad():
        update = replace(plan, keys=None).update(held, partners, alphas, step)
        ways: dict[tuple[bool, torch.device], list[int]] = {}
        for i, (s, p) in enumerate(zip(update.shadows, update.params, strict=True)):
            ways.setdefault((s.device != p.device, p.device), []).append(i)
        if any(away for away, _ in ways) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "update_: expected no capture of a CUDA graph for a shadow on the host"
            )
        for (away, home), leaves in ways.items():
            part = update.part(leaves)
            if keys is not None:  # hash on the device and in the stream that know the step
                own = keys.part(leaves)
                words = own.words.to(home, non_blocking=True)
                part = part._replace(keys=own._replace(words=words).at(step))
            if away:
                _average_away_(part, home)
            else:
                _kernels.single_tensor_(part)


def _average_away_(update: Update, home: torch.device) -> None:
    """Launch the pieces in the side stream.

    The optimizer hook does not protect leaves that require no grad, such as buffers: for these
    leaves the training stream waits.
    """
    training, side = torch.cuda.current_stream(home), side_stream(home)
    for tensor in (*update.params, *update.alphas, *(update.keys or ())):
        if isinstance(tensor, Tensor):
            tensor.record_stream(side)
    side.wait_stream(training)
    trained = [p.requires_grad for p in update.params]
    for is_trained in (False, True):
        part = update.part([i for i, grad in enumerate(trained) if grad == is_trained])
        with torch.cuda.stream(side):
            for piece in _pieces(part):
                _average_piece_(piece, home)
        if part.shadows and not is_trained:
            training.wait_stream(side)


def _average_piece_(piece: Update, home: torch.device) -> None:
    there = [s.to(home, non_blocking=True) for s in piece.shadows]
    _kernels.single_tensor_(piece._replace(shadows=there))
    for held, average in zip(piece.shadows, there, strict=True):
        held.copy_(average, non_blocking=True)


class _Slice(NamedTuple):
    """All of a leaf of the update, or a `region` of it."""

    leaf: int
    shadow: Tensor
    param: Tensor
    region: Region | None


def _pieces(update: Update) -> Iterator[Update]:
    """Split the update into parts of at most `_PIECE` numbers, or of one non-contiguous leaf."""
    slices: list[_Slice] = []
    count = 0
    for i in range(len(update.shadows)):
        for part in _slices(update, i):
            if slices and count + part.shadow.numel() > _PIECE:
                yield _of(update, slices)
                slices, count = [], 0
            slices.append(part)
            count += part.shadow.numel()
    if slices:
        yield _of(update, slices)


def _slices(update: Update, leaf: int) -> Iterator[_Slice]:
    s, p = update.shadows[leaf], update.params[leaf]
    if s.numel() <= _PIECE or not (s.is_contiguous() and p.is_contiguous()):
        yield _Slice(leaf, s, p, None)
        return
    for begin in range(0, s.numel(), _PIECE):
        part = slice(begin, begin + _PIECE)
        yield _Slice(leaf, s.view(-1)[part], p.view(-1)[part], Region(begin, (1,)))


def _of(update: Update, slices: list[_Slice]) -> Update:
    leaves, shadows, params, regions = map(list, zip(*slices, strict=True))
    part = update.part(leaves)
    keys = part.keys and part.keys._replace(regions=regions)
    return part._replace(shadows=shadows, params=params, keys=keys)


class Offloaded(Tensor):
    """A tensor in host memory that a device may still be writing; a read waits for the device.

    A read of a view waits too. `raw` is the same memory without the wait, and `home` the device of
    the parameters.
    """

    raw: Tensor
    home: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        homes: dict[int, torch.device] = {}

        def waited_for(leaf: Offloaded) -> Tensor:
            if leaf.home in _streams:
                _streams[leaf.home].synchronize()
            homes[leaf.raw.untyped_storage().data_ptr()] = leaf.home
            return leaf.raw

        args, kwargs = pytree.tree_map_only(Offloaded, waited_for, (args, kwargs or {}))
        result = func(*args, **kwargs)

        def rewrap(value: Any) -> Any:
            if type(value) is Tensor and value.is_cpu:
                home = homes.get(value.untyped_storage().data_ptr())
                return value if home is None else offloaded(value, home)
            return value

        return result if isinstance(result, torch.Size) else pytree.tree_map(rewrap, result)

    def __copy__(self) -> Tensor:
        return self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = like(self, self.clone())
        return copied


def offloaded(raw: Tensor, home: torch.device) -> Offloaded:
    """The host tensor `raw` as the average of a parameter on the device `home`."""
    leaf = raw.as_subclass(Offloaded)
    leaf.raw, leaf.home = raw, home
    return leaf


def like(leaf: Any, held: Tensor) -> Tensor:
    """`held`, offloaded and page-locked if `leaf` is."""
    if type(leaf) is not Offloaded:
        return held
    return offloaded(held.pin_memory() if leaf.raw.is_pinned() else held, leaf.home)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The side stream of a device. The first call makes writers of parameters wait for all."""
    if not _hooks:
        _hooks.append(torch.compiler.disable(hold_training))  # type: ignore[no-untyped-call]
        register_optimizer_step_pre_hook(_hooks[0])
        scope.before_writing.append(hold_training)
    if device not in _streams:
        _streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return _streams[device]


def is_hook(hook: Any) -> bool:
    """Whether an optimizer's hook is our hook that waits for the side streams."""
    return hook in _hooks


def hold_training(*_: object) -> None:
    """Make later launches wait, on the device, for the work queued in the side streams.

    A stream in capture of a CUDA graph does not wait.
    """
    for device, stream in _streams.items():
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(device).wait_stream(stream)
