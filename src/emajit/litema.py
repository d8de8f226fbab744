"""A drop-in for the `LitEma` of latent-diffusion, SGM and CogVideo."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emajit import _names, functional, schedules, scope

_log = logging.getLogger(__name__)


class LitEma(nn.Module):
    """Averages of a model's trainable parameters, held as the buffers of a module.

    Interface and `state_dict` are those of latent-diffusion's class: the buffers `decay` (float32,
    0-d), `num_updates` (int32, 0-d; -1 without warm-up), and each average under the name of its
    parameter with the dots removed. Where two parameters would share that key, or something else
    has it, the dots become slashes. Averages go on for a parameter that is frozen later.

    Args:
        model: the module whose trainable parameters are averaged. No reference to it is kept.
        decay: the share of the average that an update keeps, in [0, 1].
        use_num_upates: warm up with `min(decay, (1 + n) / (10 + n))` at update n = 1, 2, ...
        dtype: of the averages; default that of each parameter.
        backend: as in `emajit.update`.

    Raises:
        ValueError: `decay` is not in [0, 1], or no parameter of `model` requires grad.

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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"Decay must be between 0 and 1, found {decay}")
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError(
                f"model: expected parameters that require grad, found none in "
                f"{type(model).__name__}; build LitEma after the layers of the model"
            )
        self.backend = backend
        self.m_name2s_name: dict[str, str] = {}
        self.collected_params: list[Tensor] = []
        self._exact_decay = float(decay)
        self._float32_decay = torch.tensor(decay, dtype=torch.float32, device="cpu").item()
        self._inside_scope = False
        self._names: list[str] = []
        self._keys: list[str | None] = []
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        updates = 0 if use_num_upates else -1
        self.register_buffer("num_updates", torch.tensor(updates, dtype=torch.int32))
        self.m_name2s_name = _names.flat_keys(params, lambda key: hasattr(self, key))
        for name, average in functional.init(params, dtype=dtype).items():
            self.register_buffer(self.m_name2s_name[name], average)
        # Averages that were neither updated nor loaded, and those to take from the model.
        self._untouched = set(self.m_name2s_name.values())
        self._orphans: set[str] = set()

    def forward(self, model: nn.Module) -> None:
        """Update the averages with the parameters of `model`, without a host synchronisation.

        Raises ValueError, before anything is written, where the model lacks an averaged parameter,
        has a trainable one that is not averaged, or a shape differs.
        """
        pairs = self._pairs(model)
        averages = {name: average for name, average, _ in pairs}
        params = {
            name: p if p.device == average.device else p.to(average.device)
            for name, average, p in pairs
        }
        on_host = self.num_updates.is_cpu and not torch.compiler.is_compiling()
        decay = self._decay_on_host() if on_host else self._decay_on_device()
        functional.update_(averages, params, self.num_updates, decay=decay, backend=self.backend)
        self.num_updates += self.num_updates >= 0
        self._untouched.clear()

    # The decay that was given is used as it was written, while the float32 buffer still holds it.
    # Any other comes from a checkpoint and is taken for the decimal number next to it: 1 minus the
    # float32 next to 0.9999 is 1.7e-4 of itself above 1e-4.

    def _decay_on_host(self) -> float:
        """In Python numbers, which take a tenth of the time of a dozen 0-d tensor operators."""
        step, decay = int(self.num_updates), float(self.decay)
        decay = self._exact_decay if decay == self._float32_decay else round(decay, 7)
        return decay if step < 0 else float(schedules.warmup(decay)(step))

    def _decay_on_device(self) -> Tensor:
        """In tensors that are never read back."""
        decimal = torch.round(self.decay.to(torch.float64), decimals=7)
        decay = torch.where(self.decay == self._float32_decay, self._exact_decay, decimal)
        warm = torch.as_tensor(schedules.warmup(decay)(self.num_updates))
        return torch.where(self.num_updates < 0, decay, warm)

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages into the parameters of `model`; all of them, or an error and none."""
        pairs = self._pairs(model)
        for name, average, p in pairs:
            if average.shape != p.shape:
                expected, found = tuple(average.shape), tuple(p.shape)
                raise ValueError(f"{name}: expected shape {expected} as averaged, found {found}")
        with torch.no_grad():
            for _, average, p in pairs:
                p.data.copy_(average)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep a copy of `parameters` for `restore`.

        Raises RuntimeError if a copy is kept already: a second one would replace the training
        weights by whatever the model holds now.
        """
        if self.collected_params:
            raise RuntimeError("store: expected restore() after the last store(), found it pending")
        self.collected_params = [p.detach().clone() for p in parameters]

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Copy what `store` kept back into `parameters`, in order, and release it.

        Raises RuntimeError if nothing is stored, and ValueError if number or shapes differ.
        """
        parameters = list(parameters)
        if not self.collected_params:
            raise RuntimeError("restore: expected store() before, found nothing stored")
        expected = [tuple(stored.shape) for stored in self.collected_params]
        found = [tuple(p.shape) for p in parameters]
        if len(expected) != len(found):
            raise ValueError(f"restore: expected {len(expected)} parameters, found {len(found)}")
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if a != b:
                raise ValueError(f"restore: expected shape {a} for parameter {i}, found {b}")
        for stored, p in zip(self.collected_params, parameters, strict=True):
            p.data.copy_(stored)
        self.collected_params = []

    @contextmanager
    def ema_scope(self, model: nn.Module, context: str | None = None) -> Iterator[None]:
        """Inside, `model` computes with the averages; afterwards its training weights are back.

        They are never written, and the averages are copied only where their dtype or device is
        another than the parameter's. With `context` both switches are logged under that name.

        Raises RuntimeError if the scope is entered twice, and ValueError as `forward` does.
        """
        if self._inside_scope:
            raise RuntimeError("ema_scope: expected to be outside of it, found it entered already")
        averages = {name: average.to(p.device, p.dtype) for name, average, p in self._pairs(model)}
        with scope.ema_scope(model, averages):
            self._inside_scope = True
            try:
                if context is not None:
                    _log.info("%s: Switched to EMA weights", context)
                yield
            finally:
                self._inside_scope = False
        if context is not None:
            _log.info("%s: Restored training weights", context)

    def reset_num_updates(self) -> None:
        """Start the warm-up again; without warm-up there is nothing to reset."""
        self.num_updates.clamp_(max=0)

    def _pairs(self, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """Name, average and parameter of each averaged parameter of `model`."""
        found = list(model.named_parameters())
        names = [name for name, _ in found]
        if names != self._names:
            self._keys, self._names = self._match(names), names
        pairs: list[tuple[str, Tensor, Tensor]] = []
        for (name, p), key in zip(found, self._keys, strict=True):
            average = self._buffers[key] if key is not None else None
            if average is not None:
                pairs.append((name, average, p))
            elif p.requires_grad:
                raise ValueError(
                    f"{name}: expected no trainable parameter beside the averaged ones, found this "
                    "one requires grad; build a new LitEma to average it"
                )
        if self._orphans:
            with torch.no_grad():
                for key, (_, p) in zip(self._keys, found, strict=True):
                    if key in self._orphans:
                        self.get_buffer(key).copy_(p)
            self._orphans.clear()
        return pairs

    def _match(self, names: list[str]) -> list[str | None]:
        """For each parameter of a model the key of its average; None for one without."""
        partners = _names.match(self.m_name2s_name, names)
        missing = sorted(self.m_name2s_name.keys() - partners.values())
        if missing:
            raise ValueError(f"model: expected every averaged parameter, found it lacks {missing}")
        return [self.m_name2s_name[partners[name]] if name in partners else None for name in names]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEma:
        """Keep `decay` in float32, where 0.9999 is not 1, whatever the averages are cast to."""
        decay = self.decay
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.decay.dtype != torch.float32:
            self.decay = decay.to(self.decay.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = _names.unwrap_flat_keys(state_dict, [prefix + key for key in self._buffers])
        controls = {prefix + key: self._buffers[key] for key in ("decay", "num_updates")}
        broken = [key for key in controls if key in state and state[key].dtype.itemsize < 4]
        if broken:
            warnings.warn(
                f"{' and '.join(broken)} were saved in {state[broken[0]].dtype}, which cannot hold "
                "them; the present ones are kept",
                stacklevel=2,
            )
            state |= {key: controls[key] for key in broken}
        super()._load_from_state_dict(state, prefix, *args, **kwargs)
        self._untouched = {key for key in self._untouched if prefix + key not in state}
        if self._untouched:
            warnings.warn(
                f"{len(self._untouched)} of {len(self.m_name2s_name)} averages are not in the "
                f"state_dict, {prefix}{min(self._untouched)} for one; at the next use they start "
                "from the model's weights",
                stacklevel=2,
            )
            self._orphans = set(self._untouched)
