"""The only call of `torch.compile`; chooses for each leaf how its average is computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _kernels, _memory, _tree
from emajit._kernels import Weight
from emajit._rounding import Keys, Noise
from emajit._shards import Region
from emajit._tree import Memo

Kernel = Any  # of (shadows, params, weights, skip, keys): a plain function, or one compiled


class Kernels(NamedTuple):
    """One form of the update: to compile, to run leaf by leaf, and for what `foreach` can do."""

    compiled: Kernel
    eager: Kernel
    foreach: Kernel


_PURE = Kernels(_kernels.average, _kernels.average, _kernels.foreach_average)
_IN_PLACE = Kernels(_kernels.average_, _kernels.eager_average_, _kernels.foreach_average_)

# "auto" compiles only what `foreach` cannot do in one pass: mixed or low precision,
# nonfinite="skip", a weight that lives on a CUDA device.
# Milliseconds of update_ on the 161 tensors of ResNet-50, eager / compiled, interleaved medians, on
# 2 cores of an AMD EPYC, torch 2.13, 2026-11-22:
#   float32 3.1 / 3.3, float32 of bfloat16 10 / 3.6, bfloat16 16 / 3.7 (with noise 65 / 10.5),
#   "skip" 36 / 4.1
# Below this many elements a step takes some ms at the most, and does not earn back in 10,000 steps
# the seconds to minutes of a compilation, which grow with the number of leaves; with noise, below a
# quarter of it.
_WORTH_COMPILING = 2**20

# A call of one more graph takes 0.3 ms, which is 1 % of what so many elements take.
_WORTH_A_CALL = 2**26

# With the noise of more leaves in a function, gcc inlines no longer: 9.3 ms become 13.9.
_NOISY_LEAVES = 32


class Work(NamedTuple):
    """What is to be averaged, as lists for `_kernels`, and how; `memo` as in `_tree.Pairs`."""

    shadows: list[Tensor]
    params: list[Tensor]
    weights: list[Weight]
    skip: bool
    noise: Noise | Keys | None
    memo: Memo | None = None

    def part(self, leaves: Sequence[int]) -> Work:
        """Some of the leaves, in this order; a `range` is all of them."""
        if isinstance(leaves, range) or leaves == [*range(len(self.shadows))]:
            return self
        return Work(
            [self.shadows[i] for i in leaves],
            [self.params[i] for i in leaves],
            self.weights if len(self.weights) == 1 else [self.weights[i] for i in leaves],
            self.skip,
            self.noise and self.noise.part(leaves),
        )

    def rows(self) -> Iterable[tuple[Tensor, Tensor, Weight]]:
        """Shadow, parameter and weight of each leaf."""
        weights = _kernels.each(self.weights, self.shadows)
        return zip(self.shadows, self.params, weights, strict=True)

    @property
    def is_traced(self) -> bool:
        """As `_memory.is_traced`; a trace has no memo."""
        return self.memo is None and _memory.is_traced()

    @property
    def device(self) -> torch.device:
        return self.shadows[0].device if self.shadows else torch.device("cpu")

    @property
    def dtypes(self) -> _tree.Dtypes:
        return self.memo.dtypes if self.memo else _tree.dtypes(self.shadows, self.params)

    @property
    def regions(self) -> tuple[Region | None, ...] | None:
        return tuple(self.noise.regions) if self.noise else None

    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Weight], bool, Keys | None]:
        """Those of a `Kernel`."""
        return self.shadows, self.params, self.weights, self.skip, self.keys()

    def keys(self) -> Keys | None:
        return self.noise.keys(self.device) if self.noise and self.shadows else None


def average(work: Work, backend: str) -> list[Tensor]:
    """`_kernels.average`, each leaf in the way that suits it."""
    if work.is_traced:
        return _kernels.average(*work.arguments())
    new: dict[int, Tensor] = {}
    for leaves, run in _plan(_PURE, work, backend):
        new |= zip(leaves, run(work.part(leaves)), strict=True)
    return [_laid_out_as(s, new[i]) for i, s in enumerate(work.shadows)]


def average_(work: Work, backend: str) -> None:
    """`_kernels.average_`, each leaf in the way that suits it."""
    if work.is_traced:
        _kernels.average_(*work.arguments())
    else:
        for leaves, run in _plan(_IN_PLACE, work, backend):
            run(work.part(leaves))


def _laid_out_as(shadow: Tensor, average: Tensor) -> Tensor:
    """The average in the strides that `empty_like` gives it: the shadow's, if that is dense.

    Inductor takes the parameter's where the two differ.
    """
    if average.stride() == shadow.stride():
        return average
    laid_out = torch.empty_like(shadow)
    return average if average.stride() == laid_out.stride() else laid_out.copy_(average)


Way = tuple[Sequence[int], Callable[[Work], Any]]  # some leaves, and what averages those


def _plan(kernels: Kernels, work: Work, backend: str) -> list[Way]:
    """How the leaves are averaged: where there is a memo, made once for each set of options."""
    if _memory.in_dispatch_mode():
        backend = "eager"
    if not work.shadows:
        return []
    if backend in ("auto", "eager") and _kernels.lerps(work.dtypes, work.weights, work.skip):
        return [(range(len(work.shadows)), _foreach_way(kernels))]
    if work.memo is None:
        return _new_plan(kernels, work, backend)
    options = backend, work.skip, torch.get_num_threads()
    key = kernels, options, same(work.weights), work.regions
    if key not in work.memo.plans:
        work.memo.plans[key] = _new_plan(kernels, work, backend)
    return work.memo.plans[key]  # type: ignore[no-any-return]


def _new_plan(kernels: Kernels, work: Work, backend: str) -> list[Way]:
    plan: list[Way] = []
    for way, leaves in _ways(work, backend).items():
        part = work.part(leaves)
        if way == "foreach":
            plan.append((leaves, _foreach_way(kernels)))
        elif way == "eager" or (backend == "auto" and not _pays(part)):
            plan.append((leaves, lambda part: kernels.eager(*part.arguments())))
        else:
            plan += [
                (group, _compiled_way(kernels, work.part(group), backend))
                for group in _in_graphs(leaves, part)
            ]
    return plan


def _in_graphs(leaves: Sequence[int], work: Work) -> list[Sequence[int]]:
    """All leaves in one graph; with noise or of a large model in groups, of which many are alike.

    Groups that are alike share a graph: the blocks of a network repeat. Of a form of leaf that is
    there `n` times, each of `k` groups gets `n // k`, and what remains is divided in the same way.
    Small leaves come first, before the threads start: behind large ones, they too would keep gcc
    from inlining.
    """
    if work.device.type != "cpu":
        return [leaves]
    regions = work.regions or [None] * len(leaves)
    forms: dict[tuple[Any, ...], list[int]] = {}
    for leaf, (s, p, w), region in zip(leaves, work.rows(), regions, strict=True):
        form = s.numel(), _form(s, p), id(w), region
        forms.setdefault(form, []).append(leaf)
    columns = [(form[0], forms[form]) for form in sorted(forms, key=itemgetter(0))]
    least = 1 if work.noise else _WORTH_A_CALL
    most = _NOISY_LEAVES if work.noise else len(leaves)
    groups: list[Sequence[int]] = []
    while columns:
        times = _times(columns, least)
        for j in range(times):
            shares = [c[len(c) // times * j : len(c) // times * (j + 1)] for _, c in columns]
            group = [*chain.from_iterable(shares)]
            groups += [group[i : i + most] for i in range(0, len(group), most)]
        rests = [(size, c[len(c) // times * times :]) for size, c in columns]
        columns = [(size, rest) for size, rest in rests if rest]
    return groups if work.noise or len(groups) > 1 else [leaves]


def _times(columns: list[tuple[int, list[int]]], elements: int) -> int:
    """How many groups can be alike, of at least 24 leaves and so many elements each."""

    def suffices(groups: int) -> bool:
        shares = [(size, len(c) // groups) for size, c in columns]
        return sum(n for _, n in shares) >= 24 and sum(size * n for size, n in shares) >= elements

    most = sum(len(c) for _, c in columns) // 24
    return next(filter(suffices, range(most, 1, -1)), 1)


def _foreach_way(kernels: Kernels) -> Callable[[Work], Any]:
    return lambda part: kernels.foreach(*part[:3])


def _compiled_way(kernels: Kernels, work: Work, backend: str) -> Callable[[Work], Any]:
    key = layout(work), work.skip, torch.get_num_threads()
    run = _compiled(kernels, key, backend)
    return lambda part: run(*part[:2], scalars(part), part.skip, part.keys())


def layout(work: Work) -> Hashable:
    """What a graph depends on, beside the options; whether a parameter is trained is no part."""
    ties = same([*work.weights, *work.shadows, *work.params])
    pairs = zip(work.shadows, work.params, strict=True)
    return ties, work.regions, tuple([_form(s, p) for s, p in pairs])


def _form(shadow: Tensor, param: Tensor) -> tuple[Hashable, ...]:
    return shadow.shape, shadow.stride(), shadow.dtype, param.stride(), param.dtype


def same(objects: Sequence[Any]) -> Hashable:
    """Which of the weights and tensors are one, and which device each is on, if any."""
    if len({*map(id, objects)}) == 1:  # as the weights mostly are
        return len(objects), getattr(objects[0], "device", None)
    different = {id(x): x for x in objects}
    places = {
        i: (place, getattr(x, "device", None)) for place, (i, x) in enumerate(different.items())
    }
    return tuple([places[id(x)] for x in objects])


def scalars(work: Work) -> list[Tensor]:
    """The weights as 0-d tensors, whose values a graph does not depend on.

    What is one object stays one: two decays may have the same value at one step, not at the next.
    """
    tensors = {i: _scalar(w, work.device) for i, w in {id(w): w for w in work.weights}.items()}
    return [tensors[id(w)] for w in work.weights]


def _scalar(weight: Weight, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    # `full` hands the number to a kernel; `tensor` would copy it from the host.
    return torch.full((), weight, dtype=torch.float64, device=device)


def _ways(work: Work, backend: str) -> dict[Hashable, list[int]]:
    """The leaves for `foreach`, the ones for an eager kernel, and for each device the rest."""
    foreach = backend in ("auto", "eager")
    compilable = _compilable(work) if backend != "eager" else set()
    ways: dict[Hashable, list[int]] = {}
    for i, (s, p, w) in enumerate(work.rows()):
        way: Hashable
        if foreach and _kernels.lerps({(s.dtype, p.dtype)}, [w], work.skip):
            way = "foreach"
        elif {id(s), id(p)} <= compilable:
            way = s.device
        else:
            way = "eager"
        ways.setdefault(way, []).append(i)
    # What is compiled comes first: it may fail before it writes, the others do not.
    return dict(sorted(ways.items(), key=lambda item: item[0] in ("foreach", "eager")))


def _compilable(work: Work) -> set[int]:
    """The ids of the leaves that a graph may have."""
    plain = [leaf for leaf in (*work.shadows, *work.params) if _is_plain(leaf)]
    return {id(leaf) for leaf in plain} - merged(plain)


def _is_plain(leaf: Tensor) -> bool:
    # Inductor has no code for complex numbers and overlooks a negation bit; integers are copied.
    # A graph is made for what a subclass holds beside its numbers, which nothing tells here.
    is_tensor = type(leaf) in (Tensor, torch.nn.Parameter)
    return is_tensor and leaf.is_floating_point() and not leaf.is_neg()


def merged(leaves: Sequence[Tensor]) -> set[int]:
    """The ids of leaves that AOTAutograd may take for one input.

    Those of one storage, if they overlap or lie between each other's rows. The graph would have
    their offsets in it, and be used for any leaves of the same form, in this process and, from its
    cache on disk, in others: it would write where it was traced (2.11 to 2.13).
    """
    different = [*{id(leaf): leaf for leaf in leaves}.values()]
    storages = [leaf.untyped_storage()._cdata for leaf in different]
    if len(set(storages)) == len(different):
        return set()
    by_storage: dict[int, list[Tensor]] = {}
    for storage, leaf in zip(storages, different, strict=True):
        by_storage.setdefault(storage, []).append(leaf)
    found: set[int] = set()
    for together in by_storage.values():
        if len(together) == 1:
            continue
        if len({leaf.itemsize for leaf in together}) == 1:  # else it does not look at addresses
            pairs = _memory.touching(*_memory.ranges(together), len(together))
            together = [together[i] for i in sorted({*chain.from_iterable(pairs)})]  # noqa: PLW2901
        if len(together) > 1:
            places = torch._C._dynamo.guards.compute_overlapping_tensors(together, symbolic=False)
            found |= {id(together[i]) for i in places}
    return found


def _pays(work: Work) -> bool:
    elements = sum(s.numel() for s in work.shadows)
    least = _WORTH_COMPILING // 4 if work.noise else _WORTH_COMPILING
    return elements >= least and can_compile(work.device.type)


@lru_cache(maxsize=256)
def _compiled(kernels: Kernels, _key: Hashable, backend: str) -> Kernel:
    """The kernel, compiled for the leaves and options that `_key` tells."""
    return _IfItCompiles(kernels) if backend == "auto" else _Unguarded(kernels.compiled, backend)


class _Unguarded:
    """A compiled kernel without dynamo's guards, which look again at what its key has told.

    They would take 0.6 us a tensor. One of them is needed, that of a tensor marked static, such as
    the weights of a compiled optimizer: it would be a constant of the graph, and a `Parameter`
    would go unchecked for its alignment. So the graph is traced with other tensors of the same
    memory.
    """

    def __init__(self, kernel: Kernel, backend: str) -> None:
        kernel = fresh(kernel)
        self.code = kernel.__code__
        no_guards = torch.compiler.skip_all_guards_unsafe
        self.run = compiled(kernel, backend, guard_filter_fn=no_guards)

    def __call__(self, shadows: list[Tensor], params: list[Tensor], *others: Any) -> Any:
        graphs = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(self.code)
        if not graphs:  # not traced yet, or reset since
            plain = {id(leaf): leaf.detach() for leaf in (*shadows, *params)}
            shadows, params = ([plain[id(leaf)] for leaf in leaves] for leaves in (shadows, params))
        return self.run(shadows, params, *others)


class _IfItCompiles:
    """A compiled kernel; an eager one from when that fails to compile, before it writes."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.run: Kernel = None

    def __call__(self, *arguments: Any) -> Any:
        try:
            self.run = self.run or _Unguarded(self.kernels.compiled, "inductor")
            return self.run(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # OSError: of its cache
            if self.run is self.kernels.eager:
                raise
            message = f"emajit runs an update without a compiler: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            self.run = self.kernels.eager
            return self.run(*arguments)


def fresh(function: Any) -> Any:
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


def compiled(function: Any, backend: str, *, guard_filter_fn: Any = None, **options: Any) -> Any:
    """`function`, compiled, and with further options of Inductor."""
    all_options: dict[str, Any] = {"guard_filter_fn": guard_filter_fn}
    if backend == "inductor":
        # The size asserts repeat what the guards have checked, 0.5 us a tensor. On a GPU each leaf
        # would be a launch of its own: combined, the 686 of a U-Net are 86, those of AdamW with an
        # average on the 161 of ResNet-50 are 42 in place of 322 (counted in Inductor's code).
        all_options |= {"size_asserts": False, "combo_kernels": True, **options}
        # With how many others a leaf is compared, to fuse them: leaves share no more than a weight.
        # Of 64, ResNet-50 takes 20 s to compile in place of 15, its AdamW 126 in place of 76.
        all_options["max_fusion_buffer_group_pairwise_attempts"] = 8
        # torch 2.13 takes the outputs for new memory, of which it would combine only so much.
        if "combo_kernel_peak_memory_pct_threshold" in torch._inductor.list_options():
            all_options["combo_kernel_peak_memory_pct_threshold"] = None
        # Of AVX-512 Inductor loads 16 bits as half a register, masked: 2.9 ms in place of 1.7.
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            all_options["cpp.simdlen"] = 256
    return torch.compile(
        function, fullgraph=True, dynamic=False, backend=backend, options=all_options
    )


@lru_cache(maxsize=8)
def can_compile(device: str) -> bool:
    """Whether Inductor works here for a device; the reason why not is told in one warning."""
    one = [torch.zeros(1, device=device)]
    try:
        work = Work(one, one, [1.0], False, None)
        _compiled_way(_PURE, work, "inductor")(work)
    except Exception as error:  # noqa: BLE001, what fails without a compiler differs by platform
        message = f"emajit runs without a compiler on {device}, since torch.compile failed: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True
