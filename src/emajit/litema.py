"""A drop-in for the `LitEma` of latent-diffusion, SGM and CogVideo."""

from __future__ import annotations

import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from emajit import (
    _buffers,
    _decay,
    _host,
    _memory,
    _names,
    _shards,
    _tree,
    functional,
    schedules,
    scope,
)

_log = logging.getLogger(__name__)
_RANGES = {"decay": (0, 1), "num_updates": (-1, 2**31 - 1)}


_warmup = functools.lru_cache(schedules.warmup)


def _check_not_captured(averages: dict[str, Tensor]) -> None:
    on_gpu = averages and next(iter(averages.values())).is_cuda
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "num_updates: expected it on the device of a CUDA graph, which would repeat a step of "
            "the warm-up for ever, found it on cpu; move the LitEma there before"
        )


class LitEma(nn.Module):
    """Averages of a model's trainable parameters, held as the buffers of a module.

    Interface and `state_dict` are those of latent-diffusion's class: the buffers `decay` (float32,
    0-d), `num_updates` (int32, 0-d; -1 without warm-up), and each average under the name of its
    parameter with the dots removed. Where two parameters would share that key, or something else
    has it, the dots become slashes. Averages go on for a parameter that is frozen later.

    Args:
        model: the module whose trainable parameters are averaged. Only a weak reference is kept, to
            one that is sharded. With several processes, build it where all have the same weights:
            after `DistributedDataParallel`, or with one seed.
        decay: the share of the average that an update keeps, in [0, 1].
        use_num_upates: warm up with `min(decay, (1 + n) / (10 + n))` at update n = 1, 2, ...
        dtype: of the averages; default that of each parameter.
        buffers: "ignore" leaves the model's buffers, such as the statistics of BatchNorm, as they
            are in training. "copy" holds their values at the last update, and "average" averages
            those that are floating-point; both are among the averages from then on, but for
            buffers that are not in a `state_dict`.
        backend: as in `emajit.update`.

    Raises:
        ValueError: `decay` is not in [0, 1], no parameter of `model` requires grad, or an unknown
            option.
        TypeError: `model` is no module, or `decay` no number.

    >>> model = nn.Linear(2, 2)
    >>> ema = LitEma(model, decay=0.999)
    >>> ema(model)  # after each optimizer step
    >>> with ema.ema_scope(model):
    ...     prediction = model(torch.ones(2))
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        use_num_upates: bool = True,
        *,
        dtype: torch.dtype | None = None,
        buffers: _buffers.Policy = "ignore",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(decay, float | int):
            found = type(decay).__qualname__
            raise TypeError(
                f"decay: expected a number, found {found}; emajit.update_ has schedules"
            )
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"Decay must be between 0 and 1, found {decay}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
        functional.check_backend(backend)
        _shards.reshard(model)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError(
                f"model: expected parameters that require grad, found none in "
                f"{type(model).__name__}; build LitEma after the layers of the model"
            )
        kept = _buffers.held(model, buffers)
        # Every attribute is set before the keys are chosen, so that no average takes its name.
        self.backend = backend
        self.m_name2s_name: dict[str, str] = {}
        self.collected_params: list[Tensor] = []
        self._written_decay = float(decay), _decay.float32(decay)
        self._first_update = 0 if use_num_upates else -1
        self._is_updated = False
        # Keys of averages that were neither updated nor loaded, and of those among them that are
        # to start from the model at the next use.
        self._untouched: set[str] = set()
        self._orphans: set[str] = set()
        # Keys of buffers that are copied.
        self._copied: set[str] = set()
        self._takes_buffers, self._is_sharded = bool(kept), _shards.are_in(params.values())
        # Models that `copy_to` has written since `store`, and what their buffers held.
        self._overwritten: list[tuple[nn.Module, dict[str, Tensor]]] = []
        # The model seen last, weakly, if it is sharded.
        self._seen = weakref.ref(model) if self._is_sharded else None
        # Of the model seen last: the names of its parameters, and the key of each one's average.
        self._known: list[str] = []
        self._keys: dict[str, str] = {}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(self._first_update, dtype=torch.int32))
        self.m_name2s_name = _names.flat_keys([*params, *kept], lambda key: hasattr(self, key))
        for name, average in functional.init(params | kept, dtype=dtype).items():
            self.register_buffer(self.m_name2s_name[name], average)
        if buffers == "copy":
            self._copied.update(self.m_name2s_name[name] for name in kept)
        self._untouched.update(self.m_name2s_name.values())

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of any module; but in a process group a host finds no `LitEma` that was updated.

        `DistributedDataParallel` broadcasts the buffers that it finds: at its construction, when
        the averages may still differ, and in each forward, when they cannot.
        """
        hidden = prefix and self._is_updated and dist.is_available() and dist.is_initialized()
        if not hidden:
            yield from super().named_modules(memo, prefix, remove_duplicate)

    def forward(self, model: nn.Module) -> None:
        """Update the averages with the parameters of `model`, without a host synchronisation.

        Raises ValueError, before anything is written, where the model lacks an averaged parameter,
        has a trainable one that is not averaged, or a shape differs; TypeError for what is no
        module, and RuntimeError inside of a scope.
        """
        averages, params, updates, decay = self._due(model)
        step = updates if isinstance(updates, Tensor) else max(0, updates)
        try:
            functional.update_(averages, params, step, decay=decay, backend=self.backend)
        except ValueError:  # to ask each tensor for its device before takes as long as to update it
            there = {
                name: p if averages[name].is_meta else p.to(averages[name].device)
                for name, p in params.items()
            }
            if all(there[name] is p for name, p in params.items()):
                raise
            functional.update_(averages, there, step, decay=decay, backend=self.backend)
        self._done(model, updates)

    def _due(
        self, model: nn.Module
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], int | Tensor, float | Tensor]:
        """The next update: the averages, their parameters, the updates so far and the decay.

        The number of updates is -1 without warm-up, and a tensor where it must not be read.
        """
        averages, params = self._pairs(model)
        if self._copied:
            copies = self._copies()
            _check_shapes(copies, params)
            averages, params = (
                {name: tensor for name, tensor in tensors.items() if name not in copies}
                for tensors in (averages, params)
            )
        updates: Any = self._buffers["num_updates"]
        if updates.is_cpu and not torch.compiler.is_compiling():
            updates = updates.item()
            if updates >= 0:
                _check_not_captured(averages)
        return averages, params, updates, self._decay_at(updates)

    def _copies(self) -> dict[str, Tensor]:
        """The copies of buffers, under the names of the model seen last."""
        names = [name for name, key in self._keys.items() if key in self._copied]
        return {name: self.get_buffer(self._keys[name]) for name in names}

    def _done(self, model: nn.Module, updates: int | Tensor, unless: Tensor | None = None) -> None:
        """Copy buffers and count an update; a flag on the device may say that it was left out."""
        if self._copied:
            copies, buffers = self._copies(), dict(model.named_buffers())
            values = [buffers[name] for name in copies]
            if unless is not None:
                pairs = zip(copies.values(), values, strict=True)
                values = [torch.where(unless, old, new) for old, new in pairs]
            _copy([*copies.values()], values)
        if unless is not None:  # only the device knows, so that is where the updates are counted
            self.decay, self.num_updates = (
                control.to(unless.device) for control in (self.decay, self.num_updates)
            )
            self.num_updates.add_((self.num_updates >= 0) & ~unless)
        elif isinstance(updates, Tensor):
            updates.add_(updates >= 0)
        elif updates >= 0:
            self.num_updates.add_(1)
        self._untouched.clear()
        vars(self)["_is_updated"] = True  # past the checks of Module.__setattr__, a microsecond

    # The decay that was given counts as it was written, while the float32 buffer still holds it.
    # Another one, from a checkpoint, is taken for the number of 7 decimals that has this float32,
    # if there is one: 1 minus the float32 of 0.9999 is 1.7e-4 of itself above 1e-4.

    def _decay_at(self, updates: int | Tensor) -> float | Tensor:
        """In Python numbers, which take a tenth of the time of a dozen 0-d tensor operators."""
        if isinstance(updates, Tensor):
            return self._decay_on_device()
        buffer: Any = self._buffers["decay"]
        held = buffer.item()
        written, as_held = self._written_decay
        decay = written if held == as_held else _decay.decimal(held)
        return decay if updates < 0 else float(_warmup(decay)(updates))

    def _decay_on_device(self) -> Tensor:
        """In tensors that are never read back."""
        written, as_held = self._written_decay
        if not (self._is_updated or torch.compiler.is_compiling()):
            averaged = {*self.m_name2s_name.values()} - self._copied
            dtypes = {self.get_buffer(key).dtype for key in averaged}
            functional.warn_of_stalls(dtypes, 1.0 - written)
        held = self.decay.to(torch.float64)
        decimal = torch.round(held, decimals=7)
        decay = torch.where(decimal.to(torch.float32) == self.decay, decimal, held)
        decay = torch.where(self.decay == as_held, written, decay)
        warm = torch.as_tensor(schedules.warmup(decay)(self.num_updates))
        return torch.where(self.num_updates < 0, decay, warm)

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages into `model`; all of them, or an error and none.

        Ctrl-C does not come between two parameters. An error of the device within the copy may.
        """
        averages, params = self._pairs(model)
        _check_shapes(averages, params)
        if self.collected_params and not any(seen is model for seen, _ in self._overwritten):
            buffers = {n: p.clone() for n, p in params.items() if not isinstance(p, nn.Parameter)}
            self._overwritten.append((model, buffers))
        _copy([params[name] for name in averages], [*averages.values()])

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep a copy of `parameters` for `restore`.

        Raises RuntimeError if a copy is kept already: a second one would replace the training
        weights by whatever the model holds now.
        """
        if self.collected_params:
            raise RuntimeError(
                "store: expected restore() after the last store(), found parameters still stored; "
                "call restore() first"
            )
        parameters = self._listed("store", parameters)
        scope.check_outside(parameters)
        self.collected_params = [p.detach().clone() for p in parameters]
        self._overwritten = []

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Copy what `store` kept back into `parameters`, in order, and release it.

        Buffers of their model that `copy_to` has overwritten since then get theirs back too.

        Raises RuntimeError if nothing is stored, and ValueError if number or shapes differ.
        """
        parameters = self._listed("restore", parameters)
        scope.check_outside(parameters)
        if not self.collected_params:
            raise RuntimeError("restore: expected store() before, found nothing stored")
        expected = [tuple(stored.shape) for stored in self.collected_params]
        found = [tuple(p.shape) for p in parameters]
        if len(expected) != len(found):
            raise ValueError(f"restore: expected {len(expected)} parameters, found {len(found)}")
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if a != b:
                raise ValueError(f"restore: expected shape {a} for parameter {i}, found {b}")
        buffers, values = self._overwritten_beside(parameters)
        _copy(parameters + buffers, self.collected_params + values)
        self.collected_params, self._overwritten = [], []

    def _overwritten_beside(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The buffers of the models of these parameters, and what they held at `store`."""
        passed = {*map(_memory.identity, _shards.local(parameters))}
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for model, values in self._overwritten:
            theirs = map(_memory.identity, _shards.local(model.parameters()))
            if not passed.isdisjoint(theirs):
                for name, buffer in model.named_buffers():
                    if name in values and values[name].shape == buffer.shape:
                        found.setdefault(id(buffer), (buffer, values[name]))
        return [buffer for buffer, _ in found.values()], [value for _, value in found.values()]

    @contextmanager
    def ema_scope(self, model: nn.Module, context: str | None = None) -> Iterator[None]:
        """Inside, `model` computes with the averages; afterwards its training weights are back.

        They are never written, and the averages are copied only where their dtype or device is
        another than the parameter's. What writes parameters or buffers inside writes the averages:
        call `model.eval()` before, if buffers are averaged. With `context` both switches are logged
        under that name.

        Raises RuntimeError if the model is inside of a scope already, and ValueError as `forward`.
        """
        averages, params = self._pairs(model)
        averages = {name: average.to(params[name].device) for name, average in averages.items()}
        with scope.ema_scope(model, averages):
            if context is not None:
                _log.info("%s: Switched to EMA weights", context)
            try:
                yield
            finally:
                if context is not None:
                    _log.info("%s: Restored training weights", context)

    def reset_num_updates(self) -> None:
        """Start the warm-up again; without warm-up there is nothing to reset."""
        self.num_updates.clamp_(max=0)

    def named_averages(self) -> dict[str, Tensor]:
        """The averages themselves, under the names that the parameters have in the bare model.

        A shadow for `emajit.ema_scope`, `torch.func.functional_call` and `checkpoint.save`.

        Raises RuntimeError after a load without some of them, which start from the model's weights
        at the next use of the model.
        """
        if self._orphans:
            raise RuntimeError(
                f"named_averages: expected all averages, found {len(self._orphans)} that the "
                f"state_dict did not have, {min(self._orphans)} for one; ema_scope(model) and "
                "copy_to(model) start them from the model's weights"
            )
        return {name: self.get_buffer(key) for name, key in self._keys_by_name().items()}

    def _keys_by_name(self) -> dict[str, str]:
        bare = _names.canonical_of(self.m_name2s_name)
        return {bare[name]: key for name, key in self.m_name2s_name.items()}

    def _pairs(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The averages and the parameters of `model` that they are of, under its names."""
        params = self._tensors_of(model)
        if list(params) != self._known:
            self._keys, self._known = self._match(list(params)), list(params)
        buffers: dict[str, Any] = self._buffers
        averages = {name: buffers[key] for name, key in self._keys.items()}
        if len(averages) < len(params):
            for name in [name for name in params if name not in averages]:
                if params.pop(name).requires_grad:
                    raise ValueError(
                        f"{name}: expected no trainable parameter beside the averaged ones, found "
                        "this one requires grad; build a new LitEma to average it"
                    )
        if self._orphans:  # the averages that a checkpoint did not have start from the weights
            _check_shapes(averages, params)
            for name, key in self._keys.items():
                if key in self._orphans:
                    averages[name].copy_(params[name].detach())
            self._orphans.clear()
        return averages, params

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of a model outside of a scope, and its buffers if some are averaged."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
        if self._is_sharded:
            _shards.reshard(model)
            self._seen = weakref.ref(model)
        tensors = _named_parameters(model)
        if self._takes_buffers:
            tensors |= dict(model.named_buffers())
        scope.check_outside(tensors.values())
        return tensors

    def _listed(self, use: str, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The parameters; the shards of the model seen last, where a forward left them whole."""
        model = self._seen() if self._seen else None
        if model is None:
            return _tensors(use, parameters)
        _shards.reshard(model)
        tensors = _tensors(use, parameters)
        own = set(map(id, model.parameters()))
        if any(not _shards.is_one(p) and id(p) not in own for p in tensors):
            raise ValueError(
                f"{use}: expected the parameters as shards, found whole ones; list them after "
                "model.reshard()"
            )
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        """Without weak references, which cannot be pickled."""
        return {**vars(self), "_seen": None}

    def _match(self, names: list[str]) -> dict[str, str]:
        """The key of the average for each parameter of a model that has one."""
        partners = _names.match(self.m_name2s_name, names)
        found = set(partners.values())
        missing = [name for name in self.m_name2s_name if name not in found]
        if missing:
            raise ValueError(f"model: expected every averaged parameter, found it lacks {missing}")
        return {name: self.m_name2s_name[partners[name]] for name in names if name in partners}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEma:
        """Keep the dtypes of the controls, whatever the averages are cast to.

        What was on the meta device and gets memory starts as it was built: the averages from the
        model's weights at the next use.
        """
        decay, num_updates = self.decay, self.num_updates
        on_meta = [key for key, buffer in self._buffers.items() if buffer.is_meta]  # type: ignore[union-attr]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key in on_meta:
            if self.get_buffer(key).is_meta:
                continue
            if key in _RANGES:
                first = self._written_decay[0] if key == "decay" else self._first_update
                self.get_buffer(key).fill_(first)
            else:
                self._orphans.add(key)
                self._untouched.add(key)
        if self.decay.dtype != torch.float32:  # in float16, 0.9999 is 1
            self.decay = decay.to(self.decay.device)
        if self.num_updates.dtype != torch.int32:
            self.num_updates = num_updates.to(self.num_updates.device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Leave out averages that wait for the model's weights: theirs mean nothing."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in self._orphans:
            del destination[prefix + key]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load all of it, or raise and load nothing.

        With `strict=False` averages may be missing: those that were never updated or loaded start
        from the model at the next use, the others stay. With `assign` the values are copied all the
        same, in their own dtype and on their device. Loaded as part of another module, a value that
        does not fit still leaves all averages as they are, but of missing ones torch tells only
        when the others are loaded.

        Raises RuntimeError for missing and unexpected keys (if `strict`), for a value that is no
        tensor or of another shape or kind of number, for a decay outside [0, 1], and for a
        negative number of updates other than -1.
        """
        if strict and isinstance(state_dict, Mapping):
            known = self.state_dict().keys() | self._orphans
            found = _names.unwrap_flat_keys(state_dict, known).keys()
            told = [f'missing key "{key}"' for key in sorted(known - found)]
            told += [f'unexpected key "{key}"' for key in sorted(found - known)]
            if told:
                raise RuntimeError(
                    f"LitEma: expected the keys of its state, found {_tree.some(told)}"
                )
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = _names.unwrap_flat_keys(state_dict, [prefix + key for key in self._buffers])
        controls = {prefix + "decay": self.decay, prefix + "num_updates": self.num_updates}
        held = {key: state[key] for key in controls if isinstance(state.get(key), Tensor)}
        broken = [key for key, value in held.items() if value.dtype.itemsize < 4]
        if broken:
            warnings.warn(
                f"{' and '.join(broken)} were saved in {state[broken[0]].dtype}, which cannot hold "
                "them; the present ones are kept",
                stacklevel=2,
            )
            state |= {key: controls[key] for key in broken}
        misfits = [
            f"{prefix}{key}: {misfit}"
            for key, buffer in self._buffers.items()
            if prefix + key in state and (misfit := _misfit(key, state[prefix + key], buffer))
        ]
        if misfits:
            error_msgs += misfits
            return
        if local_metadata.get("assign_to_params_buffers"):
            for key in [prefix + key for key in self._buffers if prefix + key in state]:
                own = torch.empty_like(state[key], requires_grad=False).copy_(state[key].detach())
                state[key] = own.to(controls[key].dtype) if key in controls else own
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._untouched = {key for key in self._untouched if prefix + key not in state}
        self._orphans = set(self._untouched)
        if self._orphans:
            warnings.warn(
                f"{len(self._orphans)} of {len(self.m_name2s_name)} averages are not in the "
                f"state_dict, {prefix}{min(self._orphans)} for one; at the next use they start "
                "from the model's weights",
                stacklevel=2,
            )


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """`dict(model.named_parameters())`, in 0.6 to 0.8 of the time where that is torch's own.

    That asks of each parameter whether it was there before; here ties are looked for once.
    """
    if getattr(model.named_parameters, "__func__", None) is nn.Module.named_parameters:
        params = {}
        for prefix, module in model.named_modules():
            start = prefix and f"{prefix}."
            for name, p in module._parameters.items():
                if p is not None:
                    params[start + name] = p
        if len(set(map(id, params.values()))) == len(params):
            return params
    return dict(model.named_parameters())


def _tensors(use: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    listed = [parameters] if isinstance(parameters, nn.Module) else list(parameters)
    for one in listed:
        if not isinstance(one, Tensor):
            found = type(one).__qualname__
            raise TypeError(f"{use}: expected tensors, as model.parameters() gives, found {found}")
    return listed  # type: ignore[return-value]


def _misfit(key: str, value: object, buffer: Any) -> str:
    """What is wrong with a value that is to be loaded into a buffer; nothing if it fits."""
    if not isinstance(value, Tensor):
        return f"expected a tensor, found {type(value).__qualname__}"
    if value.shape != buffer.shape or value.layout is not torch.strided:
        found = tuple(value.shape) if value.layout is torch.strided else value.layout
        return f"expected shape {tuple(buffer.shape)}, found {found}"
    if value.is_meta and not buffer.is_meta:
        return "expected numbers, found a tensor on the meta device"
    if key in _RANGES and not (value.is_complex() or value.is_meta):
        # of any dtype: converters cast them along with the rest
        (low, high), number = _RANGES[key], value.item()
        fits = low <= number <= high and (key == "decay" or number % 1 == 0)
        return "" if fits else f"expected a number in [{low}, {high}], found {number}"
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (value, buffer)]
    if kinds[0] != kinds[1]:
        return f"expected a number of the kind of {buffer.dtype}, found {value.dtype}"
    return _shards.misplaced(value, buffer)


def _copy(params: list[Tensor], values: list[Tensor]) -> None:
    """In one call, so that no interrupt comes between two tensors; what it would refuse before."""
    for i, (p, value) in enumerate(zip(params, values, strict=True)):
        if misplaced := _shards.misplaced(p, value):
            raise ValueError(f"parameter {i}: {misplaced}")
    params, values = _shards.local(params), _shards.local(values)
    for i, (p, value) in enumerate(zip(params, values, strict=True)):
        if p.layout is not torch.strided or _memory.repeats_itself(p.shape, p.stride()):
            found = "one that repeats an element" if p.layout is torch.strided else str(p.layout)
            raise ValueError(f"parameter {i}: expected a dense tensor to write, found {found}")
        if p.is_meta != value.is_meta:
            expected, found = str(value.device), str(p.device)
            raise ValueError(f"parameter {i}: expected one on {expected}, found {found}")
    _host.hold_training()
    alike = [v.to(p.device, p.dtype) for p, v in zip(params, values, strict=True)]
    torch._foreach_copy_([p.data for p in params], alike)


def _check_shapes(averages: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    for name, average in averages.items():
        expected, found = tuple(average.shape), tuple(params[name].shape)
        if expected != found:
            raise ValueError(f"{name}: expected shape {expected} as averaged, found {found}")
