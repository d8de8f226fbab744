"""The averages of the callbacks: the options, the state in whole tensors, and a fingerprint."""

from __future__ import annotations

import random
import re
import sys
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from emajit import (
    _choose,
    _controls,
    _devices,
    _exchange,
    _module,
    _names,
    _paths,
    _shards,
    _tree,
    _warn,
    functional,
    schedules,
)
from emajit.combine import pull_
from emajit.functional import Nonfinite, Rounding
from emajit.integrations import _snapshots, _zero
from emajit.litema import LitEma, moved
from emajit.posthoc import PostHoc

ONLY = ""  # the name of a single average
_NAME = re.compile("[A-Za-z0-9_-]+")
_OPTIONS = "rounding", "nonfinite", "backend"


def checked(
    decay: Any,
    every: int,
    *,
    dtype: torch.dtype | None,
    buffers: _module.Policy,
    rounding: Rounding,
    nonfinite: Nonfinite,
    backend: str,
    pull: tuple[float, int] | None,
    posthoc: PostHoc | None,
    **others: Any,
) -> dict[str, Any]:
    """The options of `Averages`; ValueError and TypeError name an unusable option."""
    if not isinstance(posthoc, PostHoc | None):
        raise TypeError(f"posthoc: expected a PostHoc, found {type(posthoc).__qualname__}")
    if pull is not None:
        _check_pull(pull)
    _tree.check_dtype(dtype)
    _module.check_policy(buffers)
    _controls.check_steps("every", every)
    _choose.check_options(rounding=rounding, nonfinite=nonfinite, backend=backend)
    return {
        "decay": _schedules(decay),
        "dtype": dtype,
        "buffers": buffers,
        "rounding": rounding,
        "nonfinite": nonfinite,
        "backend": backend,
        "pull": pull,
        "posthoc": posthoc,
        **others,
    }


def _check_pull(pull: Any) -> None:
    if not (isinstance(pull, tuple) and len(pull) == 2):
        raise TypeError(f"pull: expected (share, steps), found {pull!r}")
    share, steps = pull
    if not isinstance(share, float | int) or isinstance(share, bool) or not 0.0 < share <= 1.0:
        raise ValueError(f"pull: expected a share in (0, 1], found {share!r}")
    _controls.check_steps("pull", steps)


def _schedules(decay: Any) -> Any:
    """A schedule, or a dict of schedules by name."""
    if isinstance(decay, Mapping):
        bad = [n for n in decay if not (isinstance(n, str) and _NAME.fullmatch(n)) or n == "all"]
        if bad or not decay:
            found = repr(bad[0]) if bad else "none"
            raise ValueError(
                "decay: expected names of letters, digits, _ and -, and none called all, found "
                f"{found}"
            )
        return {name: _schedule(one, f"decay[{name!r}]") for name, one in decay.items()}
    return _schedule(decay, "decay")


def _schedule(decay: Any, which: str) -> functional.Schedule:
    """A schedule: of a number, that decay at each update, so that updates are counted."""
    try:
        functional.check_decay(decay)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("decay", which, 1)) from None
    return decay if callable(decay) else schedules.constant(decay)


def evaluated(options: Mapping[str, Any], evaluate: str | None) -> list[str]:
    """The names of the averages to evaluate, in order: the first, a given one, or "all"."""
    names = named_of(options)
    if evaluate in ("all", None):
        return names if evaluate else names[:1]
    if evaluate not in names or evaluate == ONLY:
        told = ", ".join(["all", *filter(None, names)])
        raise ValueError(f"evaluate: expected one of {told}, found {evaluate!r}")
    return [evaluate]


def named_of(options: Mapping[str, Any]) -> list[str]:
    """The names of the averages to evaluate and to export."""
    decay = options["decay"]
    return [*decay] if isinstance(decay, Mapping) else [ONLY]


def names_of(options: Mapping[str, Any]) -> list[str]:
    """The names of all averages, with those for snapshots."""
    return [*named_of(options), *_snapshots.decays_of(options["posthoc"])]


def _decays(options: Mapping[str, Any]) -> dict[str, functional.Schedule]:
    decay = options["decay"]
    own = decay if isinstance(decay, Mapping) else {ONLY: decay}
    return {**own, **_snapshots.decays_of(options["posthoc"])}


class Averages:
    """The averages of a model by name, which one pass updates; a single average is `ONLY`."""

    def __init__(
        self, model: nn.Module, options: Mapping[str, Any], names: Collection[str] = ()
    ) -> None:
        """Start from the trainable parameters and those in `names`.

        `names` are frozen parameters with a saved average: unfrozen in the training that is
        resumed, and frozen again now.
        """
        own = {"decay", "pull", "posthoc"}
        others = {key: value for key, value in options.items() if key not in own}
        self._pull: tuple[float, int] | None = options["pull"]
        self._posthoc: PostHoc | None = options["posthoc"]
        # The shapes of the averages that are flat: of parameters that ZeRO 3 has divided.
        self.shapes = _zero.shapes(model)
        model = _zero.mirror(model)
        params = _module.named_parameters(model)
        # The parameters that have required grad.
        self._known = {name for name, p in params.items() if p.requires_grad}
        matched = _names.match(params, names).values()
        frozen = [params[name] for name in matched if name not in self._known]
        try:
            for p in frozen:
                p.requires_grad_(True)
            self._of = {
                name: LitEma(model, decay=decay, **others)
                for name, decay in _decays(options).items()
            }
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def __getitem__(self, name: str | None) -> LitEma:
        """An average, by default the first; ValueError for an unknown name."""
        found = next(iter(self._of.values())) if name is None else self._of.get(name)
        if found is None:
            told = ", ".join(filter(None, self._of)) or "none, since there is only one"
            raise ValueError(f"name: expected {told}, found {name!r}")
        return found

    @property
    def updates(self) -> int:
        """The number of updates, which is not read back from a device.

        Before the first, the averages are the initial weights: an untrained model.
        """
        ema = self[None]
        known = ema._host_updates.read(ema.num_updates)
        return int(ema.num_updates) if known is None else int(known)

    def follow(self, model: nn.Module) -> None:
        """Track the parameters that require grad only now."""
        model = _zero.mirror(model)
        trainable = {name for name, p in _module.named_parameters(model).items() if p.requires_grad}
        if not trainable <= self._known:
            for ema in self._of.values():
                ema.track(model)
        self._known |= trainable

    def update(self, model: nn.Module) -> None:
        """Update all averages, and read each parameter once; raises as `LitEma.forward`.

        An update that a signal interrupts is counted as by `LitEma.forward`.
        """
        emas, model = [*self._of.values()], _zero.mirror(model)
        if len(emas) == 1:
            emas[0](model)
            return
        prepared = [ema._prepare_update(model) for ema in emas]
        shadows, every, counts, decays = map(list, zip(*prepared, strict=True))
        params, updates = every[0], counts[0]
        last = _controls.last_of(shadows[-1], updates)
        options: Any = {name: getattr(emas[0], name) for name in _OPTIONS}
        try:
            try:
                functional.update_many_(shadows, params, updates, decays=decays, **options)
            except _paths.DeviceError:
                params = moved(params, shadows[0])
                functional.update_many_(shadows, params, updates, decays=decays, **options)
            for ema in emas:
                ema._finish_update(model, updates)
        except BaseException:
            for ema in emas:
                ema._count_if_written(last, updates)
            raise

    def pull(self, model: nn.Module, name: str) -> None:
        """Pull the trainable parameters towards an average, if that is due after an update."""
        share, steps = self._pull or (0.0, 0)
        if self._pull and self.updates % steps == 0:
            averages, params = self[name]._pairs(_zero.mirror(model))
            trainable = {n: p for n, p in params.items() if p.requires_grad}
            pull_(trainable, {n: averages[n] for n in trainable}, share)

    def begin(self) -> None:
        """Prepare the folder of the snapshots; the first process calls this."""
        if self._posthoc is not None:
            _snapshots.begin(self._posthoc, self.updates)

    def snapshot(self, *, is_writer: bool, at_end: bool = False) -> None:
        """Write the snapshots that are due after an update, or at the end of the training.

        All processes must call this; one is the writer.
        """
        options = self._posthoc
        if options is None:
            return
        updates = self.updates
        if not updates or bool(updates % options.every) != at_end:
            return
        shadows = [self[name].named_averages() for name in _snapshots.decays_of(options)]
        whole = [{n: _zero.whole(n, s, self.shapes) for n, s in each.items()} for each in shadows]
        if is_writer:
            _snapshots.write(options, whole, updates)

    def scope(self, model: nn.Module, name: str | None = None) -> AbstractContextManager[object]:
        """A context in which the model has an average, if there was an update."""
        ema = self[name]
        if not self.updates:
            return nullcontext()
        return _zero.scope(model, ema.ema_scope(_zero.mirror(model)))

    def state(self, *, whole: bool = True) -> dict[str, dict[str, Tensor]]:
        """The averages by name, in whole tensors unless told; then all processes must call this.

        Warns once of averages that are not finite.
        """
        state = {}
        for which, ema in self._of.items():
            averages = ema.named_averages()
            if ema.nonfinite != "skip":
                here = _shards.local(averages.values())
                _warn.warn_of_nonfinite(ema, dict(zip(averages, here, strict=True)))
            state[which] = {n: _shards.whole(a) for n, a in averages.items()} if whole else averages
        return state

    def restore(self, shadows: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Load averages of `state`; raises ValueError if one does not fit."""
        check_alike(self._of, shadows)
        loaded = [(ema, _flat(ema, shadows[name], step)) for name, ema in self._of.items()]
        try:
            for ema, state in loaded:
                ema.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def check_alike(wanted: Collection[str], found: Collection[str]) -> None:
    """Raise ValueError where a checkpoint has averages of other names."""
    if {*wanted} != {*found}:
        told = [
            ", ".join(sorted(name or "one without a name" for name in names))
            for names in (wanted, found)
        ]
        raise ValueError(f"averages: expected {told[0]}, as the options say, found {told[1]}")


def _flat(ema: LitEma, shadow: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """The state of a LitEma for some averages; raises ValueError for other names."""
    keys = ema._keys_by_name()
    missing, unknown = sorted(keys.keys() - shadow.keys()), sorted(shadow.keys() - keys.keys())
    if missing or unknown:
        raise ValueError(
            "averages: expected those of the model and of the option buffers, found "
            f"{_paths.few(missing)} missing and {_paths.few(unknown)} unknown"
        )
    flat = {
        keys[name]: _shards.split_as(ema.get_buffer(keys[name]), value)
        for name, value in shadow.items()
    }
    return {**flat, "decay": ema.decay, "num_updates": torch.tensor(step, dtype=torch.int32)}


@contextmanager
def isolated_rng() -> Iterator[None]:
    """A context after which torch, NumPy and Python draw the numbers that they would without it."""
    is_there = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if is_there else None
    kind = "cuda" if device is None or device.type == "mps" else device.type  # which takes no index
    devices = range(torch.accelerator.device_count()) if device and kind == device.type else ()
    numpy = sys.modules.get("numpy")
    state, numpys = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpys)


@contextmanager
def replaced(owner: object, attribute: str, value: object) -> Iterator[None]:
    """A context in which an object has another value, or method, as an attribute of its own."""
    held = vars(owner)
    old = {attribute: held[attribute]} if attribute in held else {}
    held[attribute] = value
    try:
        yield
    finally:
        del held[attribute]
        held.update(old)


def fingerprint(weights: Iterable[Tensor], dtype: torch.dtype | None = None) -> str:
    """A fingerprint of this process's shards of some weights, cast to `dtype` if given.

    It distinguishes the weights of two trainings: a hash of the sums of the bits, as integers, in
    each row and in each column.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    code = 0
    # One by one: they may be gathered from shards.
    shards = (shard for weight in weights for shard in _shards.local([weight.detach()]))
    for weight in chain.from_iterable(map(_exchange.within, shards)):
        if weight.numel():
            if dtype == torch.float64 != _devices.widest(weight.device):
                weight = weight.cpu()  # noqa: PLW2901
            cast = weight.to(dtype) if dtype and weight.is_floating_point() else weight
            plain = cast.resolve_conj().resolve_neg().contiguous()
            rows = plain.view(len(cast) if cast.ndim > 1 else 1, -1)
            rows = rows.view(integers.get(cast.itemsize, torch.int64))
            for dim in (0, 1):
                sums = rows.sum(dim, dtype=torch.int64).tolist()
                code = zlib.crc32(repr(sums).encode(), code)
    return f"{code:08x}"


def identity(module: nn.Module) -> tuple[weakref.ref[nn.Module], set[str]]:
    """A module, and fingerprints of its weights: as they are, and cast as a Trainer may cast."""
    _shards.reshard(module)
    casts = None, torch.float16, torch.bfloat16, torch.float32, torch.float64
    return weakref.ref(module), {fingerprint(module.parameters(), dtype) for dtype in casts}


def is_same(module: nn.Module, seen: weakref.ref[nn.Module] | None, prints: set[str]) -> bool:
    """Whether a module has the weights of an `identity`, and is its module unless that is gone."""
    _shards.reshard(module)
    is_it = seen is None or seen() is module
    return is_it and fingerprint(module.parameters()) in prints
