"""Averages of PEFT adapters, merged into the weights of their base."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emajit import _paths
from emajit.checkpoint.streaming import Piece
from emajit.checkpoint.summing import PIECE, Source, Sum, wide

CONFIG = "adapter_config.json"

# Of PEFT 0.21's LoraConfig, what leaves a change at $s B A$: what is read here, says where the
# pairs are, or acts in training alone. Anything else that is set may give A and B another meaning.
_KNOWN = {
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "init_lora_weights",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "lora_dropout",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
}
# The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base in memory, not in its file.
_INITS = [None, True, False, "gaussian", "eva", "orthogonal", "mica"]
_PREFIX = "base_model.model."
_A = re.compile(r".*\.lora_(?:A\.weight|embedding_A)")
_FACTOR = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB])$")


class _Pair(NamedTuple):
    """The two factors of a change: `a` of shape (r, in, ...) and `b` of shape (out, r, ...)."""

    a: Tensor
    b: Tensor
    scale: float
    is_turned: bool

    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], math.prod(self.a.shape[1:])

    def factors(self) -> tuple[Tensor, Tensor]:
        """The matrices whose product is the change of the weight."""
        b, a = self.b.flatten(1), self.a.flatten(1)
        return (a.T, b.T) if self.is_turned else (b, a)


class Deltas(Sum):
    r"""A base model plus $\sum_j c_j s_j B_j A_j$; whole tensors of adapters replace the base's."""

    def __init__(self, base: Source, held: Sequence[Source], c: Sequence[float]) -> None:
        super().__init__([base], [1.0], "last")
        self._sources, self._shares = held, c
        self._adapters = [_pairs(source, base) for source in held]
        self._whole = Sum(held, c, "last")
        whole = [{*_whole(source)} for source in held]
        if uneven := {name for names in whole for name in names ^ whole[0]}:
            found = _paths.some(sorted(uneven))
            raise ValueError(f"expected the same whole tensors in all adapters, found {found}")
        paired = {name for each in self._adapters for name in each}
        self._replaced: dict[str, str] = {}
        for kept in whole[0]:
            name = kept.removeprefix(_PREFIX).replace(".base_layer.", ".")
            for source in held:
                _check_shape(base, name, source, kept, tuple(source.tensors[kept].shape))
                # PEFT may save the weight of a layer with a pair too, which is not trained.
                if name in paired and not torch.equal(source.leaf(kept), base.leaf(name)):
                    raise ValueError(f"{source.path}: expected {kept!r} as in {base.path}")
            self._replaced |= {} if name in paired else {name: kept}
        changed = {*self._replaced, *paired}
        self.tied = {a: b for a, b in self.tied.items() if not changed & {a, b}}

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[Piece]:
        """In float64, by rows of the weight."""
        each = zip(self._sources, self._adapters, self._shares, strict=True)
        found = [(source, held[name], x) for source, held, x in each if name in held]
        if name in self._replaced:
            yield from self._whole.pieces(self._replaced[name], dtype)
        elif not found:
            yield from super().pieces(name, dtype)
        else:
            value = self.first.leaf(name).contiguous()
            self.first.note(value)
            for source, pair, _ in found:
                source.note(pair.a.contiguous())
                source.note(pair.b.contiguous())
            rows = max(1, PIECE // math.prod(value.shape[1:]))
            for start in range(0, len(value), rows):
                part = slice(start, start + rows)
                total = value[part].flatten(1).to(wide(value), copy=True)
                for source, pair, x in found:
                    left, right = pair.factors()
                    left, right = left[part].to(total.dtype), right.to(total.dtype)
                    total.addmm_(left, right, alpha=x * pair.scale)
                    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                        raise ValueError(f"{source.path}: expected finite numbers for {name!r}")
                yield self._rounded(name, dtype, total.view(-1))


def _pairs(source: Source, base: Source) -> dict[str, _Pair]:
    """The pair of factors for each weight that an adapter changes.

    Raises ValueError for another adapter than LoRA, and where the base lacks a weight or has it in
    another shape.
    """
    file = source.path / CONFIG
    told = _config(file)
    found = {}
    contradicted = False
    for a in [name for name in source.tensors if _A.fullmatch(name)]:
        module, b = a[: a.rindex(".lora_")], a.replace(".lora_A.", ".lora_B.")
        b = b.replace(".lora_embedding_A", ".lora_embedding_B")
        bare = module.removeprefix(_PREFIX)
        if b not in source.tensors:
            raise ValueError(f"{source.path}: expected pairs of A and B, found {a!r} alone")
        name = f"{bare}.weight"
        rank = _of_pattern(told.get("rank_pattern"), bare, told["r"])
        alpha = _of_pattern(told.get("alpha_pattern"), bare, told["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
        turned = bool(told.get("fan_in_fan_out")) or "lora_embedding" in a
        pair = _Pair(source.leaf(a), source.leaf(b), scale, turned)
        if name in base.tensors and pair.a.shape[0] == pair.b.shape[1]:
            shape = base.tensors[name].shape
            flat = (shape[0], math.prod(shape[1:]))
            fits = flat == pair.shape(), flat == pair.shape()[::-1]
            if fits[not turned] and not fits[turned]:  # PEFT asks the module, not its config
                contradicted, pair = True, pair._replace(is_turned=not turned)
        out, into = pair.shape()[::-1] if pair.is_turned else pair.shape()
        _check_shape(base, name, source, f"{a}, {b}", (out, into))
        found[name] = pair
    squares = [name for name, (a, b, *_) in found.items() if a.numel() == b.numel()]
    if contradicted and squares:
        raise ValueError(
            f"{file}: expected fan_in_fan_out as in the shapes of other weights, found another; "
            f"whether {squares[0]!r} is transposed cannot be told"
        )
    if not found:
        raise ValueError(f"{source.path}: expected pairs of lora_A and lora_B, found none")
    return found


def _config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent}: expected a folder of a PEFT adapter, found none")
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
        kind = told.get("peft_type")
        if kind == "LORA":
            float(told["r"]), float(told["lora_alpha"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: expected the config of a PEFT adapter, found another") from None
    if kind != "LORA":
        raise ValueError(f"{file}: expected LoRA, found {kind}")
    if others := [f"{key} {told[key]!r}" for key in told if told[key] and key not in _KNOWN]:
        raise ValueError(f"{file}: expected plain LoRA, found {_paths.some(others)}")
    init = told.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise ValueError(
            f"{file}: expected a change of the base in its file, found init_lora_weights {init!r}, "
            "which changes the base in memory; save the adapter as plain LoRA, by PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion"
        )
    return told  # type: ignore[no-any-return]


def _of_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first PEFT pattern that matches a module's name, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _whole(source: Source) -> list[str]:
    """The tensors that replace the base's: trained biases, and PEFT's modules_to_save.

    Raises ValueError for another part of an adapter.
    """
    names = [name for name in source.tensors if ".lora_" not in name]
    pairs = [name for name in source.tensors if _FACTOR.search(name)]
    if unknown := source.tensors.keys() - {*names, *pairs}:
        found = _paths.some(sorted(unknown))
        raise ValueError(f"{source.path}: expected pairs of lora_A and lora_B, found {found}")
    return names


def _check_shape(base: Source, name: str, source: Source, of: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError where the base has no floating-point weight of a shape at `name`."""
    if name not in base.tensors:
        raise ValueError(
            f"{base.path}: expected the weights that the adapters change, found none at {name!r}"
        )
    value = base.tensors[name]
    held = tuple(value.shape)
    flat = (held[0], math.prod(held[1:])) if held else ()
    if shape not in (held, flat) or not value.is_floating_point():
        raise ValueError(
            f"{source.path}: expected {name!r} of shape {held} in {value.dtype} as in {base.path}, "
            f"found {shape} in {of}"
        )
