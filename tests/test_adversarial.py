"""Files that look like another layout: the averages are read right, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emajit import checkpoint
from tests.test_layouts import (
    AVERAGE,
    LITEMA,
    NAMES,
    OPTIMIZER,
    OTHER,
    POSITIONS,
    RAW,
    READ,
    SHADOW,
    below,
    own,
)

IS_AVERAGE = {id(value) for value in AVERAGE.values()}
IS_RAW = {id(value) for value in RAW.values()}
PARTNERS = {id(AVERAGE[name]): RAW[name] for name in NAMES}
SWAPPED = PARTNERS | {id(RAW[name]): AVERAGE[name] for name in NAMES}
LATER = {name: v + 5 if v.is_floating_point() else v for name, v in RAW.items()}


def each(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """A tree with other tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: each(value, change) for key, value in tree.items()}
    return [each(value, change) for value in tree] if isinstance(tree, list) else tree


def emptied(tree: Any, new: Any) -> Any:
    """A tree with `new` for each container of averages."""
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    here = {id(value) for value in values}
    if here & IS_AVERAGE and not here & IS_RAW:
        return new
    if not isinstance(tree, dict):
        return tree
    return {k: emptied(v, new) for k, v in tree.items() if id(v) not in IS_AVERAGE}


def is_(found: checkpoint.Averaged, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found.weights[name], expected[name]) for name in NAMES)


ALIKE: dict[str, Callable[[Any], Any]] = {
    "one level deeper": lambda tree: {"checkpoint": {"inner": tree}},
    "in a list": lambda tree: {"runs": [tree]},
    "in another order": lambda tree: dict(reversed(tree.items())),
    "beside optimizers whose tensors have the same shapes": lambda tree: {
        **tree,
        "optimizer_states": [OPTIMIZER],
        "optim": {"state": {0: {"exp_avg": AVERAGE, "ema": RAW}}, "param_groups": []},
    },
    "beside options and statistics that sound like averages": lambda tree: {
        **tree,
        "history": {"ema_loss": [0.1]},
        "ema_decay": 0.9,
        "use_ema": True,
        "stats": {"ema_mean": torch.ones(4)},
    },
    "with trained weights in 16 bits": lambda tree: each(
        tree, lambda v: v.bfloat16() if id(v) in IS_RAW and v.is_floating_point() else v
    ),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "None": lambda tree: emptied(tree, None),
    "empty": lambda tree: emptied(tree, {}),
    "of another network": lambda tree: each(
        tree, lambda v: torch.ones(9, 9) if id(v) in IS_AVERAGE and v.ndim else v
    ),
    "beside the average of another network": lambda tree: {
        **tree,
        "disc": OTHER,
        "disc_ema": each(OTHER, lambda v: v + 1),
    },
    "with another head": lambda tree: each(
        tree, lambda v: torch.ones(7, 4) if v is AVERAGE["b.weight"] else v
    ),
}


@pytest.mark.parametrize("project", READ)
class TestEachLayout:
    def test_averages_that_are_there(self, project: str) -> None:
        for name, change in ALIKE.items():
            assert is_(checkpoint.read(change(READ[project][0])), AVERAGE), name

    def test_averages_that_are_not(self, project: str) -> None:
        for change in REFUSED.values():
            with pytest.raises(ValueError, match="expected"):
                checkpoint.read(change(READ[project][0]))

    def test_names_decide_and_not_numbers(self, project: str) -> None:
        tree = READ[project][0]
        assert is_(checkpoint.read(each(tree, lambda v: SWAPPED.get(id(v), v))), RAW)
        equal = each(tree, lambda v: PARTNERS.get(id(v), v).clone())  # before the first update
        assert is_(checkpoint.read(equal), RAW)


class TestOfOthers:
    """What looks like a layout of a library, and is not."""

    @pytest.mark.parametrize(
        "tree",
        [
            {"ema": AVERAGE, "non_ema": RAW},
            {"model_ema": AVERAGE, "model_without_ema": RAW},
            {"state_dict": below("net.", RAW) | below("ema_net.", AVERAGE)},
            {"model": RAW, "ema": AVERAGE, "current_step": 5},  # as NeMo's optimizer
            {"model": RAW, "ema": SHADOW, "current_step": 5},
            {"model": RAW, "ema": {}, "model_ema": AVERAGE},
            {"model": RAW, "state_dict_ema": None, "ema": AVERAGE},  # as timm's
            {"model": RAW, "ema": POSITIONS | {"collected_params": [RAW[n] for n in NAMES]}},
            {"model": RAW, "ema": {str(i): value for i, value in enumerate(SHADOW)}},
            {"model": RAW, "ema": AVERAGE, "ema_grads": LATER, "grads": LATER},
            {"g": LATER, "G": RAW, "G_EMA": AVERAGE, "D": OTHER},
            {"model": RAW, "modelEma": AVERAGE, "targets": SHADOW},
        ],
    )
    def test_the_averages_are_read(self, tree: dict[str, Any]) -> None:
        found = checkpoint.read(tree)
        assert is_(found, AVERAGE)
        assert all(torch.equal(found.raw[name], RAW[name]) for name in NAMES)

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            ({"model": AVERAGE, "model_non_ema": RAW}, "found none among"),
            ({"model": AVERAGE, "weights_before_ema": RAW}, "found none among"),
            ({"state_dict": below("a.", AVERAGE) | below("a_non_ema.", RAW)}, "found none among"),
            ({"model": RAW, "target": SHADOW}, "found none among"),
            ({"state_dict": RAW, "state_dict_ema": None}, "found none among"),
            ({"state_dict": RAW, "ema_state_dict": None, "message_hub": {}}, "found none among"),
            ({"model": RAW, "ema_0.999": AVERAGE, "ema_0.9999": LATER}, "found two"),
            ({"model": RAW, "ema": AVERAGE, "best": {"ema": LATER}}, "found two"),
            ({"student": RAW, "teacher": AVERAGE, "teacher_ema": LATER}, "found two"),
            ({"model": RAW, "ema": {"ema": AVERAGE, "model": RAW}}, "found two"),
            ({"state_dict": {**RAW, **{f"{n}_ema": AVERAGE[n] for n in RAW}}}, "found none among"),
            ({"model": RAW, "ema": AVERAGE | {"extra.w": torch.ones(2)}}, "of the same names"),
            ({"model": RAW, "ema": POSITIONS | {"shadow_params": SHADOW[::-1]}}, "expected names"),
            ({"state_dict": below("model.", OTHER) | below("model_ema.", LITEMA)}, "found 0"),
            (
                {
                    "g": RAW | {"b.bias": torch.ones(5)},
                    "d": {name: value + 7 for name, value in RAW.items()},
                    "ema": {"g": AVERAGE},
                },
                r"'b.bias': expected an average of shape \(5,\), found \(2,\)",
            ),
        ],
    )
    def test_the_file_is_refused(self, tree: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            checkpoint.read(own(tree))

    @pytest.mark.parametrize("name", ["model_non_ema.pt", "weights.no_ema.pt", "pre_average.pt"])
    def test_a_file_whose_name_denies_it(self, name: str, tmp_path: Path) -> None:
        torch.save(RAW, tmp_path / name)
        with pytest.raises(ValueError, match="found none among"):
            checkpoint.read(tmp_path / name)
