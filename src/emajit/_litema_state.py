"""The state of a `LitEma`: show, load, save and cast its buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from emajit import _module, _names, _paths, _shards, _torch, _warn
from emajit._controls import decimal
from emajit._tracking import Tracking

_RANGES = {"decay": (0, 1), "num_updates": (-1, 2**31 - 1)}


class LitEmaState(Tracking):
    """Controls and averages as the buffers of a module, whose state is the original's."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Hide from a parent module in a process group, once the averages were updated.

        `DistributedDataParallel` then does not broadcast the averages, except when it is built
        before the first update: they may still differ between processes then.
        """
        hidden = prefix and self._is_updated and dist.is_available() and dist.is_initialized()
        if not hidden:
            yield from super().named_modules(memo, prefix, remove_duplicate)

    def extra_repr(self) -> str:
        """The decay or schedule, the number of updates, and the number and dtypes of averages."""
        decay, count = self._written_decay[0], self._first_update
        if not self.decay.is_meta:
            decay, count = decimal(float(self.decay)), int(self.num_updates)
        averages = [self.get_buffer(key) for key in self.m_name2s_name.values()]
        dtypes = sorted({str(average.dtype).removeprefix("torch.") for average in averages})
        warm_up = " after a warm-up" if count >= 0 and self.schedule is None else ""
        updates = f"updates={count}, " if count >= 0 else ""
        held = f"averages={len(averages)}" + f" in {', '.join(dtypes)}" * bool(dtypes)
        return f"decay={self.schedule or decay}{warm_up}, {updates}{held}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEmaState:
        """Cast or move the averages; move the controls without a cast.

        Buffers that leave the meta device start anew: the controls from the constructor's values,
        the averages from the model's weights at the next use.
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
                self._uninitialised.add(key)
                self._untouched.add(key)
        for key, old in (("decay", decay), ("num_updates", num_updates)):
            new = self.get_buffer(key)
            if new.dtype != old.dtype:  # in float16, 0.9999 is 1
                self.register_buffer(key, old.to(new.device))
            elif not old.is_meta:  # after `to_empty` there is no value
                new.copy_(old)
        self._host_decay.moved(decay, self.decay)
        self._host_updates.moved(num_updates, self.num_updates)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save the schedule's decay of the last update, and omit averages without values.

        Warns once of averages on the CPU that are not finite.
        """
        if self.schedule is not None and not self.num_updates.is_meta:
            self.decay.fill_(float(self.schedule(max(0, int(self.num_updates) - 1))))
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.nonfinite != "skip":
            keys = {n: k for n, k in self.m_name2s_name.items() if k not in self._uninitialised}
            held = _shards.local([self.get_buffer(key) for key in keys.values()])
            named = dict(zip(keys, held, strict=True))
            _warn.warn_of_nonfinite(self, {n: a for n, a in named.items() if a.is_cpu})
        for key in self._uninitialised:
            del destination[prefix + key]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the whole state, or raise and load nothing; a signal cannot split it.

        With `strict=False` averages may be missing: a missing average that was never updated or
        loaded starts from the model at the next use; any other stays. `assign` copies the loaded
        values too, but in their own dtype and on their own device. When a parent module loads its
        state, a misfit changes no average either, but torch reports missing keys only after it has
        loaded the others.

        A decay or number of updates saved in fewer than 32 bits is ignored, with a warning.

        Raises RuntimeError for missing and unexpected keys (if `strict`), for a value that is no
        tensor, is on the meta device, or has another shape, kind of number or placement, for a
        decay outside [0, 1], and for a number of updates that is no integer from -1 to 2**31 - 1.
        """
        if strict and isinstance(state_dict, Mapping):
            known = self.state_dict().keys() | self._uninitialised
            found = _names.unwrap_flat_keys(state_dict, known).keys()
            told = [f'missing key "{key}"' for key in sorted(known - found)]
            told += [f'unexpected key "{key}"' for key in sorted(found - known)]
            if told:
                raise RuntimeError(
                    f"LitEma: expected the keys of its state, found {_paths.some(told)}"
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
            _warn.warn(
                f"{' and '.join(broken)} were saved in {state[broken[0]].dtype}, which cannot hold "
                "them; the present ones are kept",
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
        if self._must_count and state.get(prefix + "num_updates") == -1:
            _warn.warn(
                f"{prefix}num_updates is -1: the updates of this state were not counted; they are "
                "now, from 0"
            )
            state[prefix + "num_updates"] = torch.zeros_like(self.num_updates)
        assign = local_metadata.get("assign_to_params_buffers", False)
        buffers: dict[str, Any] = {
            key: buffer
            for key, buffer in self._buffers.items()
            if prefix + key in state and (assign or not buffer.is_meta)  # type: ignore[union-attr]
        }
        values: dict[str, Tensor] = {key: state[prefix + key].detach() for key in buffers}
        # torch would load one tensor after the other: it loads the rest, and finds missing keys.
        loaded = {prefix + key for key in buffers}
        rest = {key: value for key, value in state.items() if key not in loaded}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key not in loaded]
        if error_msgs:
            return
        untouched = {key for key in self._untouched if prefix + key not in state}
        if assign:
            new = {
                key: _own(value, buffers[key] if key in _RANGES else value)
                for key, value in values.items()
            }
            load: list[tuple[Any, ...]] = [(self._buffers.update, new)]
        else:
            shards = [_shards.local(of.values()) for of in (buffers, values)]
            load = [(_torch.foreach_copy_, *shards)] if buffers else []
        flags = {"_untouched": untouched, "_uninitialised": {*untouched}}
        _module.at_once(*load, (vars(self).update, flags))
        if untouched:
            _warn.warn(
                f"{len(untouched)} of {len(self.m_name2s_name)} averages are not in the "
                f"state_dict, {prefix}{min(untouched)} for one; at the next use they "
                "start from the model's weights",
            )


def _own(value: Tensor, like: Tensor) -> Tensor:
    """A fresh copy of a loaded value, in the dtype of `like`."""
    return torch.empty_like(value, dtype=like.dtype, requires_grad=False).copy_(value)


def _misfit(key: str, value: object, buffer: Any) -> str:
    """Why a value cannot be loaded into a buffer; "" if it can."""
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
