"""The weights of checkpoints, leaf by leaf, and their sum."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emajit import _alias, _paths, _tree
from emajit.checkpoint import files, partners, reading, search, sources
from emajit.checkpoint.averaged import Names

Of = Literal["averages", "trained"]
ZERO_CRC = "00000000"
# Numbers: fewer than torch would divide among threads, which wait for each other for a minute where
# the checksums have a core (2 GB on 2 cores, torch 2.13: 62 s by pieces of 2^16, 2 s by these).
_PIECE = 2**15 - 1024


class Source:
    """The weights of one checkpoint, read leaf by leaf."""

    def __init__(self, path: Path, of: Of | None, key: str | None) -> None:
        self.path, self.crc = path, ZERO_CRC
        self._stats = _stats(path)
        self.size = sum(size for _, size, _ in self._stats)
        tree = sources.content(path, on_disk=True)
        self.keys, self.tensors, self.step = _weights(path, tree, of, key)

    def leaf(self, name: str) -> Tensor:
        """A leaf in host memory, or mapped from the disk."""
        return sources.loaded(self.tensors[name])

    def nested(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """A state nested below the keys at which this source has its weights."""
        nested: dict[str, Any] = dict(state)
        for key in reversed(self.keys):
            nested = {key: nested}
        return nested

    def check_unchanged(self) -> None:
        if _stats(self.path) != self._stats:
            raise ValueError(f"{self.path}: expected an unchanged file, found it changed meanwhile")


def _stats(path: Path) -> list[tuple[str, int, int]]:
    """The name, size and time of the file, or of each file in a folder."""
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(each, each.stat()) for each in every if each.is_file()]
    return [(str(each), stat.st_size, stat.st_mtime_ns) for each, stat in found]


def _weights(
    path: Path, tree: Any, of: Of | None, key: str | None
) -> tuple[tuple[str, ...], dict[str, Any], int | None]:
    """The keys that lead to the weights, the weights, and the step beside them."""
    walked = search.containers(tree)
    parts = search.parts(walked)
    found = search.averages(walked, parts)
    if key is not None:
        chosen = [search.Part(tuple(key.split(".")), reading.tensors_at(tree, key), (tree,))]
    elif found and of is None:
        raise ValueError(
            f"{path}: expected a model, found averages beside it or alone; choose with "
            "of='averages' or of='trained', on the command line --of"
        )
    elif found:
        if len(found) > 1:
            raise ValueError(f"{path}: expected one average, found {len(found)}; choose with key")
        averaged = partners.named(found[0], reading.others(parts, found), Names(None, []))
        held = dict(averaged.weights if of == "averages" else averaged.raw)
        if not held:
            raise ValueError(f"{path}: expected trained weights beside the averages, found none")
        return (), held, averaged.step
    else:
        chosen = parts
    try:
        part, tensors = search.one_model(chosen)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; choose with key") from None
    return part.path, tensors, search.told(part)[0]


class Sum:
    """The sum over sources, leaf by leaf."""

    def __init__(self, held: Sequence[Source], c: Sequence[float], integers: str) -> None:
        self.first, self._held, self._c, self._integers = held[0], held, c, integers
        each = [_ties(source) for source in held]
        # The names that are tied to the same other name in all sources.
        self.tied = {n: to for n, to in each[0].items() if all(t.get(n) == to for t in each)}

    def forms(self) -> dict[str, files.Form]:
        return {name: files.Form(tuple(v.shape), v.dtype) for name, v in self.first.tensors.items()}

    def leaf(self, name: str, dtype: torch.dtype) -> Tensor:
        r"""$\sum_j c_j \theta_j$ in `dtype`, or the integers.

        Summed in float64 in pieces that stay in the cache, while another core computes checksums.
        """
        values = [source.leaf(name).contiguous() for source in self._held]
        with ThreadPoolExecutor(1) as other:  # not one for all: a fork would have it without thread
            sums = [
                other.submit(files.checksum, value, int(source.crc, 16))
                for source, value in zip(self._held, values, strict=True)
            ]
            result = self._summed(name, values, dtype)
        for source, crc in zip(self._held, sums, strict=True):
            source.crc = crc.result()
        return result

    def _summed(self, name: str, values: list[Tensor], dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            result = torch.empty(values[0].shape, dtype=dtype)
            flat, flats = result.view(-1), [value.view(-1) for value in values]
            for start in range(0, flat.numel(), _PIECE):
                piece = slice(start, start + _PIECE)
                flat[piece] = self._piece(name, [value[piece] for value in flats], dtype)
        else:
            result = values[-1]
            if self._integers == "equal" and any(not torch.equal(v, result) for v in values):
                raise ValueError(f"{name!r}: expected the same integers in all sources")
        return result

    def _piece(self, name: str, values: list[Tensor], dtype: torch.dtype) -> Tensor:
        total = torch.zeros(values[0].shape, dtype=_tree.copy_dtype(values[0], torch.float64))
        for value, x in zip(values, self._c, strict=True):
            total.add_(value.to(torch.float32) if value.dtype.itemsize == 1 else value, alpha=x)
        # The sum takes one pass; it is not finite if an element is not, or if it overflows.
        if not (torch.isfinite(total.sum()) or torch.isfinite(total).all()):
            each = zip(self._held, values, strict=True)
            broken = [source.path for source, value in each if not torch.isfinite(value).all()]
            raise ValueError(f"{[*broken, self.first.path][0]}: {name!r}: expected finite numbers")
        return files.cast(repr(name), total, dtype)


class Deltas(Sum):
    """A base model and the mean of the products of adapters."""

    def __init__(self, base: Source, held: Sequence[Source], c: Sequence[float]) -> None:
        super().__init__([base], [1.0], "last")
        self._adapters = [_adapter(source) for source in held]
        self._shares, self._sources = c, held
        targets = {name for adapter in self._adapters for name in adapter}
        if missing := sorted(targets - base.tensors.keys()):
            raise ValueError(
                f"{base.path}: expected the weights that the adapters change, found none at "
                f"{_paths.some(missing)}"
            )

    def leaf(self, name: str, dtype: torch.dtype) -> Tensor:
        each = [
            (source, *adapter[name], share)
            for source, adapter, share in zip(
                self._sources, self._adapters, self._shares, strict=True
            )
            if name in adapter
        ]
        if not each:
            return super().leaf(name, dtype)
        total = super().leaf(name, torch.float64)
        for source, a, b, scale, is_turned, share in each:
            down, up = (source.leaf(part) for part in (a, b))
            for value in (down, up):
                source.crc = files.checksum(value.contiguous(), int(source.crc, 16))
            delta = up.double() @ down.double()
            total.add_(delta.T if is_turned else delta, alpha=share * scale)
            if not torch.isfinite(total).all():
                raise ValueError(f"{source.path}: expected finite numbers in {a!r} and {b!r}")
        return files.cast(repr(name), total, dtype)


def _adapter(source: Source) -> dict[str, tuple[str, str, float, bool]]:
    """For each weight that an adapter changes: A, B, their scale, and whether it is transposed."""
    file = source.path / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{source.path}: expected a folder of a PEFT adapter, found none")
    told = json.loads(file.read_text(encoding="utf-8"))
    if told.get("peft_type") != "LORA" or told.get("use_dora"):
        raise ValueError(f"{file}: expected LoRA without DoRA, found {told.get('peft_type')}")
    found = {}
    for a in [name for name in source.tensors if name.endswith(".lora_A.weight")]:
        module = a.removesuffix(".lora_A.weight")
        bare = module.removeprefix("base_model.model.")
        rank = _of_pattern(told.get("rank_pattern"), bare, told["r"])
        alpha = _of_pattern(told.get("alpha_pattern"), bare, told["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
        turned = bool(told.get("fan_in_fan_out"))
        found[f"{bare}.weight"] = (a, f"{module}.lora_B.weight", scale, turned)
    others = [n for n in source.tensors if ".lora_A." not in n and ".lora_B." not in n]
    if others or not found:
        kinds = _paths.some(others) or "nothing"
        raise ValueError(
            f"{source.path}: expected pairs of lora_A and lora_B, found {kinds} beside"
        )
    return found


def _of_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first PEFT pattern that matches a module's name, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _ties(source: Source) -> dict[str, str]:
    return _alias.ties({name: v for name, v in source.tensors.items() if not v.is_meta})


def check_alike(held: Sequence[Source]) -> None:
    """Raise ValueError, with the first five differences, where a source is not like the first."""
    first = held[0]
    for source in held[1:]:
        told = [f"no {name}" for name in first.tensors if name not in source.tensors]
        told += [f"{name} beside" for name in source.tensors if name not in first.tensors]
        for name, value in first.tensors.items():
            other = source.tensors.get(name)
            if other is not None and _kind(other) != _kind(value):
                kinds = [f"{kind} of shape {shape}" for kind, shape in map(_kind, (other, value))]
                told.append(f"{name}, {kinds[0]} for {kinds[1]}")
        if told:
            found = _paths.some(told)
            raise ValueError(f"{source.path}: expected the tensors of {first.path}, found {found}")


def _kind(value: Any) -> tuple[str, tuple[int, ...]]:
    dtype = value.dtype
    kind = "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else str(dtype)
    return kind, tuple(value.shape)
