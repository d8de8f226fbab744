"""Every private or version-bound name of torch, each with what is done where it does not exist.

Whether a name exists is asked once, when this module is imported, or when a part of torch that
emajit does not import by itself is first used. Without a name the numbers stay the same; what is
lost stands beside it. Other modules call these functions through the module.
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
    """Whether a tree is a leaf: no container that pytrees know."""
    ask = getattr(pytree, "tree_is_leaf", None)  # not in torch 2.6
    if ask is not None:
        return bool(ask(tree))
    leaves = pytree.tree_leaves(tree)
    return len(leaves) == 1 and leaves[0] is tree


def _find(path: str) -> Any:
    """The object of that dotted path, of modules that are imported already; None without it."""
    found: Any = sys.modules.get("torch")
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
    return found


# The multi-tensor operators. Without one of them: the same operator, tensor by tensor.


def _each(operator: Callable[..., Any], tensors: Any, *others: Any) -> list[Tensor]:
    lists = [o if isinstance(o, (list, tuple)) else [o] * len(tensors) for o in others]
    return [operator(*row) for row in zip(tensors, *lists, strict=True)]


def _foreach(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    return _find(f"torch._foreach_{name}") or partial(_each, operator)


foreach_sub = _foreach("sub", torch.sub)
foreach_mul = _foreach("mul", torch.mul)
foreach_add = _foreach("add", torch.add)
foreach_add_ = _foreach("add_", Tensor.add_)
foreach_div_ = _foreach("div_", Tensor.div_)
foreach_copy_ = _foreach("copy_", Tensor.copy_)
foreach_lerp = _foreach("lerp", torch.lerp)
foreach_lerp_ = _foreach("lerp_", Tensor.lerp_)


# Which code runs now.

_transforms_are_active = _find("torch._C._are_functorch_transforms_active")
_transform_level = _find("torch._C._functorch.maybe_current_level")


def in_transform() -> bool:
    """Whether a `torch.func` transform is active, or derivatives are taken forward.

    The tensors of a transform have no addresses, and `no_grad` lets tangents through.
    """
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    if _transforms_are_active is not None:
        return bool(_transforms_are_active())
    if _transform_level is None or torch.compiler.is_compiling():
        return False
    return _transform_level() is not None


_dispatch_modes = _find("torch._C._len_torch_dispatch_stack")


def in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` is on: Dynamo runs no graph inside of one, but raises.

    Without the name compiled updates cannot run inside of such a mode.
    """
    return _dispatch_modes is not None and _dispatch_modes() > 0


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a graph, which reads nothing back."""
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    asked = getattr(module, "is_current_stream_capturing", None)
    return asked is not None and bool(asked())


# What tensors are.

_TensorGuards = _find("torch._C._dynamo.guards.TensorGuards")


def forms(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that tells whether as many tensors still have these forms; it keeps none alive.

    By Dynamo's guards, in C++, 35 ns a tensor; they take no tensor twice. Without them a comparison
    in Python takes 2 us a tensor.
    """
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
    """Which of these tensors of one storage AOTAutograd takes for one input; else all of them."""
    if _overlapping is None:
        return range(len(tensors))
    return _overlapping(tensors, symbolic=False)  # type: ignore[no-any-return]


_set_version = _find("torch._C._autograd._unsafe_set_version_counter")


def setting_versions(tensors: Sequence[Tensor], versions: Sequence[int]) -> list[tuple[Any, ...]]:
    """The calls that give tensors these versions, by which autograd knows what was written.

    Without the name a graph that crosses the boundary of an `ema_scope` goes unnoticed.
    """
    if _set_version is None or not tensors:
        return []
    try:
        _set_version((), ())
    except TypeError:  # torch 2.6 takes one
        return [(_set_version, *row) for row in zip(tensors, versions, strict=True)]
    return [(_set_version, tuple(tensors), tuple(versions))]


def parametrized() -> dict[Any, Any]:
    """The weights that `parametrize.cached` keeps; without the name they would be used on."""
    held: dict[Any, Any] | None = _find("torch.nn.utils.parametrize._cache")
    return {} if held is None else held


FLOATS_WITHOUT_ARITHMETIC = {  # without a sign, and two to an element
    getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)
}


def lasting_buffers(module: nn.Module) -> Iterable[str]:
    """The names of a module's own buffers that a `state_dict` has; without the name, of all."""
    return module._buffers.keys() - getattr(module, "_non_persistent_buffers_set", set())


def wraps(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that holds others, to which `.data =` does not reach.

    Such are DTensors, and the quantised weights of torchao. Without the name: any subclass.
    """
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    ask = _find("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
    return ask is None or bool(ask(tensor))


def shard(tensor: Any) -> Any:
    """The part of a DTensor that this process holds, the very tensor."""
    held = getattr(tensor, "_local_tensor", None)
    return tensor.to_local() if held is None else held


def shard_offsets(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> Sequence[int]:
    """The index in the whole of the first element of this process's shard."""
    from torch.distributed import tensor  # noqa: PLC0415, who has DTensors has it

    compute = getattr(
        getattr(tensor, "_utils", None), "compute_local_shape_and_global_offset", None
    )
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


def constant_in_traces(function: Any) -> Any:
    """`torch.compiler.assume_constant_result`, which would import all of Dynamo for this mark."""
    function._dynamo_marked_constant = True
    return function


def compile_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises before the function has run."""
    errors = _find("torch._dynamo.exc.TorchDynamoException")
    return (errors or RuntimeError, OSError)  # OSError: of its cache on disk


_cache_entries = _find("torch._C._dynamo.eval_frame._debug_get_cache_entry_list")


def has_no_graph(code: Any) -> bool:
    """Whether Dynamo has not traced this code yet, or has forgotten it since.

    Without the name it is never known to be traced, which costs a view of each tensor at each call.
    """
    return _cache_entries is None or not _cache_entries(code)


def drops_guards() -> bool:
    """Whether a graph need have no guards; not before torch 2.8."""
    from torch._dynamo.hooks import Hooks  # noqa: PLC0415, heavy

    return hasattr(Hooks, "guard_filter_fn")


def without_guards() -> dict[str, Any]:
    """The option by which a graph has no guards; none where all guards are kept."""
    if not drops_guards():
        return {}
    skip_all: Any = _find("torch.compiler.skip_all_guards_unsafe")
    return {"guard_filter_fn": skip_all or (lambda entries: [False] * len(entries))}


def inductor_options(wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted options of Inductor that this torch has; none where it does not tell."""
    import_module("torch._inductor")  # heavy
    tell = _find("torch._inductor.list_options")
    known = {*tell()} if tell else set()
    return {name: value for name, value in wanted.items() if name in known}


def graph_passes() -> tuple[type, Callable[..., Any]] | None:
    """The class of Inductor's passes over a graph, and its hash of files; without them no pass."""
    import_module("torch._inductor.custom_graph_pass")  # heavy
    found = _find("torch._inductor.custom_graph_pass")
    pass_class = getattr(found, "CustomGraphPass", None)
    hash_of_files = getattr(found, "get_hash_for_files", None)
    return pass_class and hash_of_files and (pass_class, hash_of_files)


def computes(operator: Any) -> bool:
    """Whether an operator of a graph makes a new tensor: it is no view and writes nothing."""
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    return not (operator.is_view or operator._schema.is_mutable)


def step_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The hooks that `optimizer.step` calls; without the names, one that nobody knows."""
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
    """Tell that it has stepped: learning-rate schedulers warn if it has not."""
    optimizer._opt_called = True


def has_been_unscaled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the GradScaler that calls has unscaled this optimizer; False without the names."""
    frame, code = sys._getframe(1).f_back, torch.amp.GradScaler.step.__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    states = getattr(frame.f_locals["self"] if frame else None, "_per_optimizer_states", {})
    return getattr(states.get(id(optimizer), {}).get("stage"), "name", "") == "UNSCALED"


def is_of_a_scheduler(step: Any) -> bool:
    """Whether a scheduler has wrapped this `step`, only to know that it was called."""
    return hasattr(step, "_wrapped_by_lr_sched")
