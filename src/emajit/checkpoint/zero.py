"""Folders of DeepSpeed's ZeRO: weights in shards, joined by DeepSpeed's own converter.

`save_checkpoint(folder, client_state={"ema": ...})` writes a folder for each step, and its name
into the file `latest`. The averages of a script are in its client state, which is a part of
`*_model_states.pt`; the float32 weights are shards in `*_optim_states.pt`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

from emajit import _paths
from emajit.checkpoint import pickled

_SHARDS = "*zero_pp_rank_*_optim_states.pt"  # in a run in bfloat16, "bf16_" is before it
_STATES = "*mp_rank_*_model_states.pt"
# What DeepSpeed needs of a state of its own to join the shards again.
_OF_SHARDS = {"frozen_param_fragments", "frozen_param_shapes", "param_shapes", "shared_params"}
# All that the converter, which unpickles any object, may meet: DeepSpeed's own, and arguments.
_TRUSTED = {
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def is_one(path: Path) -> bool:
    """Whether a folder holds such shards, itself or in the folder of a step."""
    return any(any(path.glob(pattern)) for pattern in (_SHARDS, f"*/{_SHARDS}"))


def content(path: Path) -> dict[str, Any]:
    """The state that DeepSpeed saved, with whole float32 weights at "module", and its client state.

    Raises ValueError where DeepSpeed is not installed, for objects that its converter would
    unpickle, and where the step is not told or its folder is broken.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"{path}: expected whole weights, found the shards of DeepSpeed's ZeRO; install "
            "deepspeed, or join them first, with the zero_to_fp32.py in the folder; averages in "
            f"the client state are in {_STATES}"
        )
    folder = path if any(path.glob(_SHARDS)) else _latest(path)
    states = sorted(folder.glob(_STATES))
    if not states:
        raise ValueError(f"{folder}: expected the states of DeepSpeed, found no {_STATES}")
    _check_trusted([*states, *folder.glob(_SHARDS)])
    try:
        with redirect_stdout(sys.stderr):  # it prints how far it is
            from deepspeed.utils import zero_to_fp32  # noqa: PLC0415

            joined = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name
            )
    except Exception as error:  # noqa: BLE001, whatever a broken folder makes of the converter
        raise ValueError(
            f"{folder}: expected shards that DeepSpeed can join, found {error!r:.300}"
        ) from None
    held = {key: v for key, v in pickled.load_torch(states[0]).items() if key not in _OF_SHARDS}
    # The converter leaves frozen parameters out at stage 1; at stage 3 those in shards are empty.
    whole = {k: v for k, v in held["module"].items() if isinstance(v, Tensor) and v.numel()}
    return held | {"module": whole | {name: v.detach() for name, v in joined.items()}}


def _latest(path: Path) -> Path:
    """The folder of the last step, as the file `latest` or the only such folder says."""
    told = path / "latest"
    steps = sorted({each.parent for each in path.glob(f"*/{_SHARDS}")})
    if told.is_file():
        name = told.read_text(encoding="utf-8").strip()
        steps = [each for each in steps if each.name == name]
    if len(steps) != 1:
        found = _paths.some([each.name for each in steps]) or "none"
        raise ValueError(
            f"{path}: expected a file `latest` with the folder of a step, found {found}"
        )
    return steps[0]


def _check_trusted(held: Iterable[Path]) -> None:
    for file in held:
        names = pickled.unsafe_names(file)
        if unknown := sorted(set(names) - _TRUSTED):
            raise ValueError(
                f"{file}: expected tensors and plain containers, since DeepSpeed's converter runs "
                f"what it unpickles, found {_paths.some(unknown)}; if you trust the file, join the "
                "shards first, with the zero_to_fp32.py in the folder"
            )
