"""ema-pytorch's `EMA` and `KarrasEMA`: `initted`, `step`, and the averages below `ema_model.`.

The trained weights may be below `online_model.`. "ema-pytorch" writes the state of an `EMA`, which
copies the model again until `step` exceeds its `update_after_step`. `step` counts all calls, but by
default only each tenth averages (`update_every`, which no file holds).

`PostHocEMA` has several averages: below `ema_models.INDEX.` in its state, and in files
`INDEX.STEP.pt`, by default in float16. Neither holds their lengths: the index is the place in the
`sigma_rels` (or `gammas`) that the training script gave it. So tell them, `sigma_rel=(0.05, 0.28)`
in `checkpoint.read` and `read_all`, `--sigma-rel 0.05,0.28` in `emajit inspect`; of `gammas` with
`emajit.schedules.gamma_to_sigma_rel`. Only with `update_every=1`, which is not the default and in
no file either, has an average this length, and the profile of `emajit.posthoc`. Then these are
snapshots for it:

```python
for each in checkpoint.read_all("post-hoc-ema-checkpoints", sigma_rel=(0.05, 0.28)):
    posthoc.save("snapshots", each.weights, each.step, sigma_rel=each.sigma_rel)
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from emajit import _names
from emajit.checkpoint.averaged import (
    Averaged,
    Layout,
    Names,
    Reading,
    Writer,
    prefixes,
    required,
    step_of,
    tensors_of,
)

_FILE = re.compile(r"(\d+)\.(\d+)")  # the index and the step in the name of a file


def _read(tree: Mapping[str, Any]) -> list[Reading]:
    state = tensors_of(tree)
    found = []
    places = sorted(prefixes(state, "initted", "step"), key=_numbers)
    for prefix in places:
        number = re.search(r"(?:^|\.)ema_models\.(\d+)\.$", prefix)
        found.append(_reading(state, prefix, int(number[1]) if number else None))
    files = {key: name for key in tree if (name := _FILE.fullmatch(str(key)))}
    for key in sorted(files, key=lambda key: (int(files[key][2]), int(files[key][1]))):
        if is_file(files[key].string, tree[key]):
            index, step = map(int, files[key].groups())
            reading = _reading(tensors_of(tree[key]), "", index)
            found.append(reading._replace(step=step, path=f"{key}.{reading.path}"))
    return found


def is_file(stem: str, content: Any) -> bool:
    """Whether `PostHocEMA` wrote a file, which its name and content tell."""
    is_state = isinstance(content, Mapping) and {"initted", "step"} <= content.keys()
    return is_state and _FILE.fullmatch(stem) is not None


def _reading(state: Mapping[str, Any], prefix: str, index: int | None) -> Reading:
    averages = _names.below(f"{prefix}ema_model.", state)
    if not averages:
        raise ValueError(f"ema-pytorch: expected averages below {prefix}ema_model, found none")
    step = state[f"{prefix}step"]
    # A float16 step is rounded, and infinite from 65520 on.
    taken = None if step.is_floating_point() else step_of(step)
    raw = _names.below(f"{prefix}online_model.", state) or None
    layout = "ema-pytorch"
    if index is not None:
        layout += f" PostHocEMA, length {index} in the order of its sigma_rels"
    return Reading(layout, averages, taken, raw=raw, path=f"{prefix}ema_model", number=index)


def _numbers(prefix: str) -> list[int]:
    """The numbers in a prefix: safetensors puts 10 before 2."""
    return [int(number) for number in re.findall(r"\d+", prefix)]


def _state(averaged: Averaged, _: Names) -> dict[str, Any]:
    step = torch.tensor(required("step", "ema-pytorch", averaged))
    online = {f"online_model.{name}": value for name, value in averaged.raw.items()}
    average = {f"ema_model.{name}": value for name, value in averaged.weights.items()}
    return {"initted": torch.tensor(True), "step": step, **online, **average}


LAYOUT = Layout(_read, Writer("ema-pytorch", _state))
