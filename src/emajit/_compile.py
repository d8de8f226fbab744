"""The only call of `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import chain
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _devices, _kernels, _torch, _warn
from emajit._kernels import Alpha, Kernel, Update


@lru_cache(maxsize=256)
def kernel(_layout: Hashable, backend: str, *, in_place: bool) -> Kernel:
    """The compiled kernel for updates of this layout, from a cache."""
    return CompiledKernel(backend, in_place=in_place)


class Layout(NamedTuple):
    """A key that is equal for updates which share a graph; it ignores `requires_grad`."""

    aliases: Hashable
    alphas: Hashable
    regions: Hashable
    skip: bool
    forms: tuple[Hashable, ...]  # of each leaf


def layout(update: Update) -> Layout:
    pairs = zip(update.shadows, update.params, strict=True)
    return Layout(
        alias_pattern([*update.shadows, *update.params]),
        alias_pattern(update.alphas),
        None if update.keys is None else tuple(update.keys.regions),
        update.skip,
        tuple([(s.shape, s.stride(), s.dtype, p.stride(), p.dtype) for s, p in pairs]),
    )


def alias_pattern(objects: Sequence[Any]) -> Hashable:
    """Which of the alphas or tensors are one object, and the device of each, if any."""
    different = {id(x): x for x in objects}
    places = {
        i: (place, getattr(x, "device", None)) for place, (i, x) in enumerate(different.items())
    }
    if len(places) == len(objects) and len({device for _, device in places.values()}) == 1:
        return len(objects), next(iter(places.values()))[1]  # the usual case, shorter
    return tuple([places[id(x)] for x in objects])


class CompiledKernel:
    """A kernel as one graph, without Dynamo's guards: our key covers them.

    The guards would take 0.6 us a tensor (1 to 3 % of ResNet-50 to a U-Net). Without them a tensor
    marked static, such as a parameter of a compiled optimizer, would become a constant of the
    graph, and the alignment of a `Parameter` would go unchecked. So a graph is traced with detached
    views of the tensors.

    The backend "auto" is Inductor. It runs single-tensor where an alpha is at least 1/2, since the
    first steps of a warm-up do not earn back a graph for both ends, and after a compilation has
    failed on this type of device. Within a `TorchDispatchMode` every
    backend runs single-tensor.
    """

    def __init__(self, backend: str, *, in_place: bool) -> None:
        self.backend = "inductor" if backend == "auto" else backend
        self.is_auto = backend == "auto"
        self.function = _kernels.traced_ if in_place else _kernels.traced
        self.eager: Kernel = _kernels.single_tensor_ if in_place else _kernels.single_tensor
        # By number of threads: the code object, the compiled function, whether it has guards.
        self.graphs: dict[int, tuple[Any, Any, bool]] = {}

    def __call__(self, update: Update) -> Any:
        """Run the update; an error while compiling is raised before anything is written."""
        shadows, params, alphas, skip, keys = update
        device = shadows[0].device
        threads = torch.get_num_threads()
        avoids = self.is_auto and (
            any(isinstance(a, float) and a >= 0.5 for a in alphas)
            or (device.type in _without_compiler and threads not in self.graphs)
        )
        if avoids or _torch.dispatch_modes():
            return self.eager(update)
        numbers: list[Any] = scalars(alphas, device)
        if self.is_auto:  # fix the shadow as the nearer end, which halves the time to compile
            rows = zip(alphas, numbers, strict=True)
            numbers = [(False, n) if isinstance(alpha, float) else n for alpha, n in rows]
        try:
            if threads not in self.graphs:
                function = with_own_code(self.function)
                run = compiled(function, self.backend, drop_guards=True)
                self.graphs[threads] = function.__code__, run, not _torch.without_guards()
            code, run, has_guards = self.graphs[threads]
            if has_guards or not _torch.graphs_of(code):  # Dynamo looks at the tensors
                raw = {id(leaf): leaf.detach() for leaf in (*shadows, *params)}
                shadows, params = ([raw[id(t)] for t in tensors] for tensors in (shadows, params))
            return run(Update(shadows, params, numbers, skip, keys))
        except errors() as error:
            if not self.is_auto:
                raise
            self.graphs.pop(threads, None)
            _without_compiler.add(device.type)
            _warn.warn(
                f"emajit goes on without a compiler on {device.type}: torch.compile failed: "
                f"{error}",
                RuntimeWarning,
            )
            return self.eager(update)


# The types of devices on which "auto" has failed to compile; it tries no other graph there.
_without_compiler: set[str] = set()


def tries(device: torch.device) -> bool:
    """Whether "auto" compiles on a device.

    Not after a failure, and on a CPU not before torch 2.8, which keeps guards and whose Inductor
    does not vectorise 16-bit dtypes: 18 ms in place of 16.
    """
    if device.type in _without_compiler:
        return False
    try:
        return device.type != "cpu" or bool(_torch.without_guards())
    except Exception:  # noqa: BLE001, raised again, and told, by the first graph
        return True


def scalars(alphas: Sequence[Alpha], device: torch.device) -> list[Tensor]:
    """The alphas as 0-d tensors, so that a graph serves any value; one object stays one."""
    tensors: dict[int, Any] = {}
    for alpha in alphas:
        if id(alpha) not in tensors:
            # `full` hands the number to a kernel; `tensor` would copy it from the host.
            tensors[id(alpha)] = (
                alpha
                if isinstance(alpha, Tensor)
                else torch.full((), alpha, dtype=_devices.widest(device), device=device)  # type: ignore[arg-type]
            )
    return [tensors[id(alpha)] for alpha in alphas]


def with_own_code(function: Any) -> Any:
    """`function` with a code object of its own.

    Dynamo keeps its cache with the code and gives up after 8 entries, which several models would
    exhaust together.
    """
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def compiled(
    function: Callable[..., Any], backend: str, *, drop_guards: bool = False, **inductor: Any
) -> Any:
    """`function`, compiled, with further options of Inductor; raises UnsupportedError."""
    try:
        options = _torch.without_guards() if drop_guards else {}
        if backend == "inductor":
            wanted = {
                # The size asserts repeat what the guards have checked, 0.5 us a tensor.
                "size_asserts": False,
                # Inductor compares a leaf with this many others to fuse them; leaves share only an
                # alpha. With 64, ResNet-50 compiles in 20 s in place of 15, its AdamW in 126 for
                # 76.
                "max_fusion_buffer_group_pairwise_attempts": 8,
                **inductor,
            }
            # With AVX-512 Inductor loads 16-bit numbers by masked half registers: 2.9 ms for 1.7.
            if torch.backends.cpu.get_cpu_capability() == "AVX512":
                wanted["cpp.simdlen"] = 256
            options |= _torch.inductor_options(wanted)
        return torch.compile(
            function, fullgraph=True, dynamic=False, backend=backend, options=options or None
        )
    except Exception as error:
        raise UnsupportedError(str(error)) from error


class UnsupportedError(RuntimeError):
    """`torch.compile` does not start, such as where Python is too new for it."""


def errors() -> tuple[type[Exception], ...]:
    """The errors of a compilation, also where `torch.compile` does not start."""
    return UnsupportedError, *_torch.compile_errors()


def compilable(update: Update, leaves: Sequence[int]) -> list[int]:
    """Those of the leaves that a graph may have.

    Inductor has no code for complex numbers and overlooks a negation bit; integers are copied. A
    subclass may hold more than its numbers, which a graph would freeze and our key lacks.
    """
    pairs = {i: (update.shadows[i], update.params[i]) for i in leaves}
    raw = {
        i: pair
        for i, pair in pairs.items()
        if all(type(t) in _torch.PLAIN and t.is_floating_point() and not t.is_neg() for t in pair)
    }
    aliased = aliased_inputs([*chain.from_iterable(raw.values())])
    return [i for i, pair in raw.items() if aliased.isdisjoint(map(id, pair))]


def aliased_inputs(leaves: Sequence[Tensor]) -> set[int]:
    """The ids of inputs that share a storage and that AOTAutograd may take for one input.

    If inputs overlap or interleave, AOTAutograd bakes their offsets into the graph. Reused for
    other leaves of the same form, also from its cache on disk, the graph would write at the offsets
    of its trace (torch 2.11 to 2.13).
    """
    different = [*{id(leaf): leaf for leaf in leaves}.values()]
    by_storage: dict[int, list[Tensor]] = {}
    for leaf in different:
        by_storage.setdefault(leaf.untyped_storage().data_ptr(), []).append(leaf)
    if len(by_storage) == len(different):
        return set()
    return {
        id(together[i])
        for together in by_storage.values()
        if len(together) > 1
        for i in _torch.overlapping(together)
    }
