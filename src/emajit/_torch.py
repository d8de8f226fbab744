"""Every private or version-bound name of torch, each with its fallback.

Each name is looked up once, when this module is imported, or at the first use of a part of torch
that emajit does not import by itself. Without a name the numbers stay the same; each docstring
says what is lost. Other modules call these functions through the module.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree  # torch has no public pytrees, and never renamed these

__all__ = ["pytree"]  # and the functions below


def is_leaf(tree: Any) -> bool:
    """Whether a tree is a leaf, not a registered pytree container."""
    if hasattr(pytree, "tree_is_leaf"):  # not in torch 2.6
        return bool(pytree.tree_is_leaf(tree))
    leaves = pytree.tree_leaves(tree)
    return len(leaves) == 1 and leaves[0] is tree


def _find(path: str) -> Any:
    """The object at a dotted path in modules already imported; None if there is none."""
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, "__dict__", {}).get(name)  # torch imports some parts on `getattr`
    return found


# The multi-tensor operators. Fallback: the single-tensor operator, tensor by tensor.


def _each(operator: Callable[..., Any], tensors: Any, *others: Any, **options: Any) -> list[Tensor]:
    lists = [o if isinstance(o, (list, tuple)) else [o] * len(tensors) for o in others]
    return [operator(*row, **options) for row in zip(tensors, *lists, strict=True)]


def _foreach(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    return _find(f"torch._foreach_{name}") or partial(_each, operator)


foreach_sub = _foreach("sub", torch.sub)
foreach_mul = _foreach("mul", torch.mul)
foreach_mul_ = _foreach("mul_", Tensor.mul_)
foreach_add = _foreach("add", torch.add)
foreach_add_ = _foreach("add_", Tensor.add_)
foreach_div_ = _foreach("div_", Tensor.div_)
foreach_copy_ = _foreach("copy_", Tensor.copy_)
foreach_lerp = _foreach("lerp", torch.lerp)
foreach_lerp_ = _foreach("lerp_", Tensor.lerp_)


_transforms_are_active = _find("torch._C._are_functorch_transforms_active")
_transform_level = _find("torch._C._functorch.maybe_current_level")


def in_transform() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active.

    The tensors of a transform have no addresses, and `no_grad` lets tangents through.
    """
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    if _transforms_are_active is not None:
        return bool(_transforms_are_active())
    if _transform_level is None or torch.compiler.is_compiling():
        return False
    return _transform_level() is not None


# How many `TorchDispatchMode`s are on: Dynamo raises inside one instead of running a graph. Without
# the name compiled updates raise inside such a mode.
dispatch_modes: Callable[[], int] = _find("torch._C._len_torch_dispatch_stack") or (lambda: 0)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a graph; then the host must read nothing."""
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    asked = getattr(module, "is_current_stream_capturing", None)
    return asked is not None and bool(asked())


_TensorGuards = _find("torch._C._dynamo.guards.TensorGuards")


def forms(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that checks whether as many tensors have the same forms; it keeps none alive.

    What is one object must be one again. Dynamo's guards, in C++, take 35 ns a tensor; without the
    name a comparison in Python takes 2 us a tensor.
    """
    places: dict[int, int] = {}
    firsts = [places.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]
    if len(places) < len(tensors):
        each = [*places.values()]  # the guards want each object once
        fit = forms([tensors[i] for i in each])
        again = [(i, first) for i, first in enumerate(firsts) if i != first]
        return lambda *found: (
            all(found[i] is found[j] for i, j in again) and fit(*[found[i] for i in each])
        )
    if _TensorGuards is not None:
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guards.check  # type: ignore[no-any-return]
    expected = [*map(_form, tensors)]
    return lambda *found: [*map(_form, found)] == expected


def _form(tensor: Tensor) -> tuple[Any, ...]:
    bits = tensor.is_conj(), tensor.is_neg(), tensor.is_inference()
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, bits


_overlapping = _find("torch._C._dynamo.guards.compute_overlapping_tensors")


def overlapping(tensors: list[Tensor]) -> Iterable[int]:
    """The indices of tensors of one storage that AOTAutograd merges; without the name, all."""
    if _overlapping is None:
        return range(len(tensors))
    return _overlapping(tensors, symbolic=False)  # type: ignore[no-any-return]


_set_version = _find("torch._C._autograd._unsafe_set_version_counter")


def setting_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> list[tuple[Any, ...]]:
    """The calls that set the version counters of tensors, by which autograd notices writes.

    Without the name a graph that crosses the boundary of an `ema_scope` goes unnoticed.
    """
    if _set_version is None or not tensors:
        return []
    try:
        _set_version((), ())
    except TypeError:  # torch 2.6 takes one tensor a call
        return [(_set_version, *row) for row in zip(tensors, versions, strict=True)]
    return [(_set_version, tuple(tensors), tuple(versions))]


def parametrized() -> dict[Any, Any]:
    """The weights that `parametrize.cached` keeps; without the name they stay in use, stale."""
    held: dict[Any, Any] | None = _find("torch.nn.utils.parametrize._cache")
    return {} if held is None else held


# The class and the property of a parametrized module; without the names copies share the cache.
inject_class = _find("torch.nn.utils.parametrize._inject_new_class")
inject_property = _find("torch.nn.utils.parametrize._inject_property")

FLOATS_WITHOUT_ARITHMETIC = {  # without a sign, and two to an element
    getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)
}


def lasting_buffers(module: nn.Module) -> Iterable[str]:
    """The names of a module's own persistent buffers; without the name, of all its buffers."""
    return {*module._buffers.keys()} - getattr(module, "_non_persistent_buffers_set", set())


PLAIN = {Tensor, nn.Parameter}  # the classes that are no subclass of the user's or a library's


def wraps(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that wraps tensors, which `.data =` does not exchange.

    DTensors and the quantised weights of torchao wrap tensors. Without the name: any subclass.
    """
    if type(tensor) in PLAIN:
        return False
    ask = _find("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
    return ask is None or bool(ask(tensor))


def shard(tensor: Any) -> Any:
    """The local shard of a DTensor, the tensor itself."""
    held = getattr(tensor, "_local_tensor", None)
    return tensor.to_local() if held is None else held


def shard_offsets(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> Sequence[int]:
    """The index of the first element of this process's shard in the whole tensor."""
    compute = _find("torch.distributed.tensor._utils.compute_local_shape_and_global_offset")
    if compute is not None:
        return compute(shape, mesh, placements)[1]  # type: ignore[no-any-return]
    sizes, offsets = [*shape], [0] * len(shape)
    parts = zip(mesh.get_coordinate(), mesh.shape, placements, strict=True)
    # Tensor parallelism divides first what FSDP has divided upon it.
    for place, n, placement in sorted(parts, key=lambda part: hasattr(part[2], "split_factor")):
        if placement.is_shard():  # as torch.chunk divides
            size = math.ceil(sizes[placement.dim] / n)
            start = min(size * place, sizes[placement.dim])
            offsets[placement.dim] += start
            sizes[placement.dim] = min(size, sizes[placement.dim] - start)
    return offsets


def gathers_right(tensor: Any) -> bool:
    """Whether `full_tensor` is right: in torch 2.8 not for uneven shards of FSDP upon another."""
    strided = [p for p in tensor.placements if hasattr(p, "split_factor")]
    uneven = [p for p in strided if tensor.shape[p.dim] % math.prod(tensor.device_mesh.shape)]
    return all("_local_shard_size_and_offset" in vars(type(p)) for p in uneven)


def constant_in_traces(function: Any) -> Any:
    """`torch.compiler.assume_constant_result` without its import of all of Dynamo."""
    function._dynamo_marked_constant = True
    return function


def compile_errors() -> tuple[type[Exception], ...]:
    """The errors of Dynamo and Inductor, raised while they compile."""
    found = _find("torch._dynamo.exc.TorchDynamoException") or RuntimeError
    return found, OSError  # of Inductor's cache on disk


# The graphs that Dynamo has of a code object. Without the name none, which costs a view of each
# tensor at each call.
_graphs = _find("torch._C._dynamo.eval_frame._debug_get_cache_entry_list")
graphs_of: Callable[[Any], Sequence[Any]] = _graphs or (lambda _code: ())


def without_guards() -> dict[str, Any]:
    """The option that drops all guards of a graph; none before torch 2.8."""
    from torch._dynamo.hooks import Hooks  # noqa: PLC0415, heavy

    if not hasattr(Hooks, "guard_filter_fn"):
        return {}
    skip_all: Any = _find("torch.compiler.skip_all_guards_unsafe")
    return {"guard_filter_fn": skip_all or (lambda entries: [False] * len(entries))}


def inductor_options(wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted options of Inductor that this torch has; none if it does not list them."""
    import_module("torch._inductor")  # heavy
    known: Any = (_find("torch._inductor.list_options") or list)()
    return {name: value for name, value in wanted.items() if name in known}


def graph_passes() -> tuple[type, Callable[..., Any]] | None:
    """Inductor's class for graph passes, and its hash of files; None if one is missing."""
    import_module("torch._inductor.custom_graph_pass")  # heavy
    found = _find("torch._inductor.custom_graph_pass")
    pass_class = getattr(found, "CustomGraphPass", None)
    hash_of_files = getattr(found, "get_hash_for_files", None)
    return pass_class and hash_of_files and (pass_class, hash_of_files)


def computes(operator: Any) -> bool:
    """Whether an operator of a graph makes a new tensor: not a view and not a write."""
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    return not (operator.is_view or operator._schema.is_mutable)


def step_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The hooks that `optimizer.step` calls; None among them if names are missing."""
    from torch.optim import optimizer as module  # noqa: PLC0415

    every = [
        getattr(owner, name, {None: None})
        for owner, names in (
            (module, ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")),
            (optimizer, ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")),
        )
        for name in names
    ]
    return [hook for hooks in every for hook in hooks.values()]


def mark_stepped(optimizer: Any) -> None:
    """Mark an optimizer as stepped: learning-rate schedulers warn if it is not."""
    optimizer._opt_called = True


def has_been_unscaled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the calling GradScaler has unscaled this optimizer; False without the names."""
    frame, code = sys._getframe(1).f_back, torch.amp.GradScaler.step.__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    states = getattr(frame.f_locals["self"] if frame else None, "_per_optimizer_states", {})
    return getattr(states.get(id(optimizer), {}).get("stage"), "name", "") == "UNSCALED"


def is_of_a_scheduler(step: Any) -> bool:
    """Whether a learning-rate scheduler has wrapped this `step` to notice calls."""
    return hasattr(step, "_wrapped_by_lr_sched")
