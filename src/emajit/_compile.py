"""The only call of `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from emajit import _alias, _devices, _kernels, _torch, _warn
from emajit._kernels import Alpha, Kernel, Update
from emajit._rounding import Keys


def kernel(update: Update, backend: str, *, in_place: bool) -> Kernel:
    """A compiled kernel for updates of this layout, cached.

    The backend "auto" uses Inductor. It falls back to single-tensor if Inductor cannot compile, or
    if an alpha is at least 1/2: the first steps of a warm-up do not earn back a graph for both
    ends.
    """
    return _kernel(layout(update), backend, in_place)


@lru_cache(maxsize=256)
def _kernel(_layout: Hashable, backend: str, in_place: bool) -> Kernel:
    return CompiledKernel(backend, in_place=in_place)


def layout(update: Update) -> Hashable:
    """A key that is equal for updates which share a graph; it ignores `requires_grad`."""
    aliases = alias_pattern([*update.shadows, *update.params])
    alphas = alias_pattern(update.alphas)
    regions = None if update.keys is None else tuple(update.keys.regions)
    forms = tuple([form(s, p) for s, p in zip(update.shadows, update.params, strict=True)])
    return aliases, alphas, regions, update.skip, forms


def form(shadow: Tensor, param: Tensor) -> tuple[Hashable, ...]:
    """The part of the key for one leaf."""
    return shadow.shape, shadow.stride(), shadow.dtype, param.stride(), param.dtype


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
    """

    def __init__(self, backend: str, *, in_place: bool) -> None:
        self.backend = "inductor" if backend == "auto" else backend
        self.is_auto = backend == "auto"
        self.compiles = True
        self.function = _traced_ if in_place else _traced
        self.eager: Kernel = _kernels.single_tensor_ if in_place else _kernels.single_tensor
        self.graphs: dict[int, tuple[Any, Any, bool]] = {}  # for each number of threads

    def __call__(self, update: Update) -> Any:
        """Run the update; an error while compiling is raised before anything is written."""
        alphas = update.alphas
        is_eager = self.is_auto and any(isinstance(a, float) and a >= 0.5 for a in alphas)
        if is_eager or not self.compiles or _torch.in_dispatch_mode():
            return self.eager(update)
        try:
            return self._run(*update)
        except _torch.compile_errors() as error:
            if not self.is_auto:
                raise
            _warn.warn(f"emajit runs an update without a compiler: {error}", RuntimeWarning)
            self.compiles = False
            return self.eager(update)

    def _run(
        self,
        shadows: list[Tensor],
        params: list[Tensor],
        alphas: Sequence[Alpha],
        skip: bool,
        keys: Keys | None,
    ) -> Any:
        threads = torch.get_num_threads()
        if threads not in self.graphs:
            function = with_own_code(self.function)
            options = _torch.without_guards()
            run = compiled(function, self.backend, **options)
            self.graphs[threads] = function.__code__, run, not options
        code, run, has_guards = self.graphs[threads]
        if has_guards or _torch.has_no_graph(code):  # Dynamo looks at the tensors
            raw = {id(leaf): leaf.detach() for leaf in (*shadows, *params)}
            shadows, params = ([raw[id(leaf)] for leaf in leaves] for leaves in (shadows, params))
        numbers: list[Any] = scalars(alphas, shadows[0].device)
        if self.is_auto:  # fix the shadow as the nearer end, which halves the time to compile
            rows = zip(alphas, numbers, strict=True)
            numbers = [(False, n) if isinstance(alpha, float) else n for alpha, n in rows]
        return run(shadows, params, numbers, skip, keys)


def _traced(
    shadows: list[Tensor],
    params: list[Tensor],
    alphas: list[Alpha],
    skip: bool,
    keys: Keys | None,
) -> list[Tensor]:
    return _kernels.traced(Update(shadows, params, alphas, skip, keys))


def _traced_(
    shadows: list[Tensor],
    params: list[Tensor],
    alphas: list[Alpha],
    skip: bool,
    keys: Keys | None,
) -> None:
    _kernels.traced_(Update(shadows, params, alphas, skip, keys))


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
    function: Callable[..., Any], backend: str, *, guard_filter_fn: Any = None, **inductor: Any
) -> Any:
    """`function`, compiled, with further options of Inductor."""
    options: dict[str, Any] = {}
    if backend == "inductor":
        wanted = {
            # The size asserts repeat what the guards have checked, 0.5 us a tensor.
            "size_asserts": False,
            # Inductor compares a leaf with this many others to fuse them; leaves share only an
            # alpha. With 64, ResNet-50 compiles in 20 s in place of 15, its AdamW in 126 for 76.
            "max_fusion_buffer_group_pairwise_attempts": 8,
            **inductor,
        }
        # With AVX-512 Inductor loads 16-bit numbers by masked half registers: 2.9 ms for 1.7.
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            wanted["cpp.simdlen"] = 256
        options = _torch.inductor_options(wanted)
    if guard_filter_fn is not None:
        options["guard_filter_fn"] = guard_filter_fn
    return torch.compile(
        function, fullgraph=True, dynamic=False, backend=backend, options=options or None
    )


@lru_cache(maxsize=8)
def can_compile(device: str) -> bool:
    """Whether Inductor works here for a device; if not, one warning gives the reason."""
    one = [torch.zeros(1, device=device)]
    try:
        kernel(Update(one, one, [0.25]), "inductor", in_place=False)(Update(one, one, [0.25]))
    except Exception as error:  # noqa: BLE001, what fails without a compiler differs by platform
        _warn.warn(
            f"emajit runs without a compiler on {device}, since torch.compile failed: {error}",
            RuntimeWarning,
        )
        return False
    return True


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
    found: set[int] = set()
    for together in by_storage.values():
        if len(together) == 1:
            continue
        if len({leaf.itemsize for leaf in together}) == 1:  # else it does not look at addresses
            pairs = _alias.touching(*_alias.ranges(together), len(together))
            together = [together[i] for i in sorted({*chain.from_iterable(pairs)})]  # noqa: PLW2901
        if len(together) > 1:
            found |= {id(together[i]) for i in _torch.overlapping(together)}
    return found
