"""Map the tensors of a model to the averages of a `LitEma`, also after the model has changed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _module, _names, _paths, _shards, functional, scope
from emajit._controls import Controls
from emajit.functional import Schedule


class Tracking(Controls):
    """Each average is a buffer under its key in `m_name2s_name`."""

    def __init__(
        self,
        decay: float | Schedule,
        chosen: _names.Filter,
        policy: _module.Policy,
        dtype: torch.dtype | None,
        **controls: Any,
    ) -> None:
        super().__init__(decay, **controls)
        # Every attribute is set before the keys are chosen, so that no average takes its name.
        self.m_name2s_name: dict[str, str] = {}
        self._chosen, self._policy, self._dtype = chosen, policy, dtype
        # Where the tracked model has its parameters and buffers (module and attribute), with the
        # names of their averages. A weak reference to a tensor would keep torch from swapping it.
        self._tracked: list[tuple[weakref.ref[nn.Module], str, str | None]] = []
        self._is_updated = False
        # The copies of `store`; the models that `copy_to` wrote since, with their old buffers.
        self.collected_params: list[Tensor] = []
        self._overwritten: list[tuple[nn.Module, dict[str, Tensor]]] = []
        # Whether the last model has shards; if so, that model.
        self._is_sharded = False
        self._seen: weakref.ref[nn.Module] | None = None
        # Keys of averages that were neither updated nor loaded. The averages in `_uninitialised`,
        # a subset, start from the model at the next use.
        self._untouched: set[str] = set()
        self._uninitialised: set[str] = set()
        # Keys of buffers that are copied.
        self._copied: set[str] = set()
        # The `m_name2s_name` matched last: callers of the original class may replace the dict.
        self._matched = self.m_name2s_name
        # For the last model: the names of its tensors, the same names without wrapper prefixes,
        # the keys of their averages, and the names that the filter leaves out.
        self._known: list[str] = []
        self._bare: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._left_out: set[str] = set()

    def track(self, model: nn.Module) -> None:
        """Average the trainable parameters that `model` has now; call this after it has changed.

        New and unfrozen parameters (and buffers, by the option) start from their values. All others
        keep their averages, also where their module has moved and they have another name. A
        parameter of the same name in another module counts as the same parameter. A resized
        parameter (`resize_token_embeddings`) keeps the average of the block that begins at index 0
        in each dimension. To start a parameter anew, track the model without it in between.
        Averages without a parameter are dropped; tied parameters keep only the first average. The
        number of updates goes on: no parameter has a warm-up of its own.

        The state loads into a `LitEma` built on the changed model, and the other way round.

        Raises RuntimeError inside a scope and between `store` and `restore`, and ValueError for
        parameters that are missing or were sharded meanwhile; nothing is changed then.
        """
        if self.collected_params:
            raise RuntimeError(
                "track: expected no stored parameters, found some; call restore() first"
            )
        if isinstance(model, nn.Module):
            _shards.reshard(model)
            self._is_sharded = _shards.are_in(model.parameters())
        tensors = self._tensors_of(model)
        places = _module.places(model, tensors)
        partners = self._partners(tensors, places)
        taken, copied = self._taken(model, tensors, partners)
        held, old_keys = self._buffers, {*self.m_name2s_name.values()}
        old: dict[str, Any] = {
            name: held[key]
            for name, partner in partners.items()
            if (key := self.m_name2s_name[partner]) not in self._uninitialised
        }
        averages = _continued(old, taken, self._dtype)
        names = self._names_of(taken, partners)
        flat = _names.flat_keys(
            names.values(), lambda key: hasattr(self, key) and key not in old_keys
        )
        keys = {name: flat[names[name]] for name in taken}
        untouched = {n for n, p in partners.items() if self.m_name2s_name[p] in self._untouched}
        untouched |= {name for name in taken if averages[name] is not old.get(name)}
        others = {key: buffer for key, buffer in held.items() if key not in old_keys}
        vars(self).update(  # no interrupt comes between them
            m_name2s_name=flat,
            _buffers=others | {keys[name]: average for name, average in averages.items()},
            _untouched={keys[name] for name in untouched},
            _uninitialised=set(),
            _copied={keys[name] for name in copied},
            _tracked=_located(places, names),
            _is_updated=False,
            _known=[],
        )
        self._match(model, tensors)  # before a trace, which cannot match patterns

    def _taken(
        self, model: nn.Module, tensors: Mapping[str, Tensor], partners: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors to average, without a LitEma's own, and the names of buffers to copy."""
        params, buffers = _module.averaged(model, self._policy, self._chosen)
        inside = {
            id(buffer)
            for module in model.modules()
            if isinstance(module, Tracking)
            for buffer in module._buffers.values()
        }
        chosen = params.keys() | buffers.keys() | partners.keys()
        taken = {n: t for n, t in tensors.items() if n in chosen and id(t) not in inside}
        kept = {name: buffer for name, buffer in buffers.items() if name in taken}
        return taken, _module.copied(kept, self._policy, tensors.keys())

    def _partners(
        self, tensors: Mapping[str, Tensor], places: Mapping[str, tuple[nn.Module, str]]
    ) -> dict[str, str]:
        """The old name of each averaged tensor, found by its module, else by its name."""
        same = self._at(places)
        found = set(same.values())
        left = [name for name in self.m_name2s_name if name not in found]
        by_name = _names.match(left, [name for name in tensors if name not in same])
        return by_name | {name: partner for name, partner in same.items() if partner is not None}

    def _at(self, places: Mapping[str, tuple[nn.Module, str]]) -> dict[str, str | None]:
        """The names of the averages that tensors at these places had in `track`."""
        tracked = {(at(), own): name for at, own, name in self._tracked}
        return {name: tracked[place] for name, place in places.items() if place in tracked}

    def _names_of(self, taken: Mapping[str, Tensor], partners: Mapping[str, str]) -> dict[str, str]:
        """The names of averages: the old names, whatever wraps the model, else the model's."""
        old = self.m_name2s_name
        is_bare = bool(old) and all(_names.canonical(name) == name for name in old)
        names = _names.canonical_of(taken) if is_bare else {name: name for name in taken}
        for name, partner in partners.items():
            if _names.canonical(partner) == _names.canonical(name):
                names[name] = partner
        return names if len({*names.values()}) == len(names) else {name: name for name in taken}

    def named_averages(self) -> dict[str, Tensor]:
        """The averages themselves, by the parameters' names in the unwrapped model.

        Pass them to `emajit.ema_scope` or `torch.func.functional_call`, or save them.

        Raises RuntimeError if a loaded state lacked averages that have not started from the model
        yet.
        """
        if self._uninitialised:
            raise RuntimeError(
                f"named_averages: expected all averages, found {len(self._uninitialised)} that the "
                f"state_dict did not have, {min(self._uninitialised)} for one; ema_scope(model) "
                "and copy_to(model) start them from the model's weights"
            )
        return {name: self.get_buffer(key) for name, key in self._keys_by_name().items()}

    def _keys_by_name(self) -> dict[str, str]:
        bare = _names.canonical_of(self.m_name2s_name)
        return {bare[name]: key for name, key in self.m_name2s_name.items()}

    def _match(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Find the average of each tensor of a model, by name."""
        names = [*tensors]
        partners = _names.match(self.m_name2s_name, names)
        found = set(partners.values())
        missing = [name for name in self.m_name2s_name if name not in found]
        if missing:
            tied = _names.match(missing, _names.named(model, "parameters", twice=True))
            told = f"{_paths.few([*tied])} tied to another parameter since"
            told = told if tied else f"it lacks {_paths.few(missing)}"
            raise ValueError(
                f"model: expected every averaged parameter, found {told}; call "
                "track(model) to average what the model has now"
            )
        if not torch.compiler.is_compiling():
            places = _module.places(model, tensors)
            was = self._at(places)
            moved = [name for name in partners if was.get(name, partners[name]) != partners[name]]
            if moved:
                raise ValueError(
                    "model: expected modules in their places, found others at "
                    f"{_paths.few(moved)}; call track(model) to average what the model has now"
                )
            if all(at() is None for at, _, _ in self._tracked):  # this is a copy, or was pickled
                self._tracked = _located(places, partners)
        self._bare = _names.canonical_of(names)
        self._keys = {n: self.m_name2s_name[partners[n]] for n in names if n in partners}
        self._left_out = {name for name, bare in self._bare.items() if not self._chosen.keeps(bare)}
        self._known, self._matched = names, self.m_name2s_name

    def _pairs(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The averages and their parameters, both by the names in `model`."""
        params = self._tensors_of(model)
        # Under Dynamo (torch 2.6) `is` fails for one and the same dict.
        is_other = self._matched is not self.m_name2s_name and not torch.compiler.is_compiling()
        if list(params) != self._known or is_other:
            self._match(model, params)
        buffers: dict[str, Any] = self._buffers
        averages = {name: buffers[key] for name, key in self._keys.items()}
        if len(averages) < len(params):
            others = {name: params.pop(name) for name in [*params] if name not in averages}
            new = [n for n, p in others.items() if p.requires_grad and n not in self._left_out]
            if new:
                more = len(new) - 1
                found = f"it and {more} more that require" if more else "this one requires"
                raise ValueError(
                    f"{new[0]}: expected no trainable parameter beside the averaged ones, found "
                    f"{found} grad; call track(model) to average what the model has now"
                )
        if self._uninitialised:  # averages that a loaded state lacked start from the weights
            _module.check_shapes(averages, params)
            for name, key in self._keys.items():
                if key in self._uninitialised:
                    averages[name].copy_(params[name].detach())
            self._uninitialised.clear()
        return averages, params

    def _check_trained(self, averages: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
        """Raise an error unless the parameters hold training weights and some are averaged.

        RuntimeError where `copy_to` has written averages into them since `store`; ValueError where
        the LitEma has no averages.
        """
        ids = {*map(id, params.values())}
        if any(id(p) in ids for model, _ in self._overwritten for p in model.parameters()):
            raise RuntimeError(
                "model: expected its training weights, found the averages that copy_to has written "
                "since store(); call restore() first"
            )
        if not averages and self._buffers.keys() == {"decay", "num_updates"}:
            raise ValueError(
                "model: expected averaged parameters, found none, since it had no trainable ones "
                "when LitEma was built; call track(model) when it has"
            )

    def _tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of a model, and its buffers by the option; raises inside a scope."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, found {type(model).__qualname__}")
        if self._is_sharded:
            _shards.reshard(model)
            self._seen = weakref.ref(model)
        tensors = _module.named_parameters(model)
        if self._policy != "ignore":
            tensors |= dict(model.named_buffers())
        scope.check_outside(tensors.values())
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        """Without weak references and an entered scope, which cannot be pickled.

        A copy matches the first model that it is used with anew.
        """
        return {**vars(self), "_seen": None, "_tracked": [], "_known": [], "_swapped": None}


def _located(
    places: Mapping[str, tuple[nn.Module, str]], names: Mapping[str, str]
) -> list[tuple[weakref.ref[nn.Module], str, str | None]]:
    return [(weakref.ref(at), own, names.get(name)) for name, (at, own) in places.items()]


def _continued(
    old: Mapping[str, Tensor], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The average of each tensor: the old average, or if resized a new one with the old block."""
    kept = {name: average for name, average in old.items() if average.shape == tensors[name].shape}
    _module.check_shapes(kept, tensors)
    new = {name: tensor for name, tensor in tensors.items() if name not in kept}
    beside = {(tensors[name].device, tensors[name].dtype): old[name] for name in old}
    for name, start in functional.init(new, dtype=dtype).items():
        like = beside.get((new[name].device, new[name].dtype), start)
        if like is not start:  # not a cast of `start`, which may have been rounded
            start = new[name].detach().to(like.device, like.dtype, copy=True)  # noqa: PLW2901
        new[name] = start
        if name in old:
            _module.copy_common(new[name], old[name])
    return {name: kept[name] if name in kept else new[name] for name in tensors}
