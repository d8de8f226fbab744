"""Names of wrapped models, and LitEma's keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emajit import _names

names = st.lists(
    st.lists(
        st.sampled_from(["a", "b", "ab", "a/", "_orig_mod", "module"]), min_size=1, max_size=3
    ).map(".".join),
    unique=True,
)


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.a.w",
        "module.a.w",
        "a._checkpoint_wrapped_module.w",
        "module._orig_mod.a.w",
        "_fsdp_wrapped_module.a._fsdp_wrapped_module.w",
    ],
)
def test_wrappers_are_seen_through_on_both_sides(wrapped: str) -> None:
    assert _names.match(["a.w"], [wrapped]) == {wrapped: "a.w"}
    assert _names.match([wrapped], ["a.w"]) == {"a.w": wrapped}


def test_a_parameter_may_be_called_like_a_wrapper() -> None:
    assert _names.canonical("a.module") == "a.module"


def test_the_same_name_comes_first() -> None:
    both = ["module.w", "w"]
    assert _names.match(both, both) == {"module.w": "module.w", "w": "w"}
    assert _names.match(["w"], both) == {"w": "w"}


def test_ambiguity_raises() -> None:
    with pytest.raises(ValueError, match=r"_orig_mod.w: expected one .* found \['module.w', 'w'\]"):
        _names.match(["module.w", "w"], ["_orig_mod.w"])
    with pytest.raises(
        ValueError, match=r"w: expected one partner, found \['module.w', '_orig_mod"
    ):
        _names.match(["w"], ["module.w", "_orig_mod.w"])
    # DataParallel's names of the same model: that both have a "module.w" does not make it one.
    with pytest.raises(ValueError, match=r"module.module.w: .* found \['w', 'module.w'\]"):
        _names.match(["w", "module.w"], ["module.w", "module.module.w"])


@given(names)
def test_flat_keys_are_unique_and_without_dots(found: list[str]) -> None:
    keys = _names.flat_keys(found, {"a", "ab"}.__contains__)
    assert list(keys) == found
    assert len(set(keys.values())) == len(found)
    assert not [key for key in keys.values() if "." in key or key in ("a", "ab")]


def test_flat_keys_of_another_wrapping_are_renamed() -> None:
    state = {"ema._orig_modaw": 1, "ema.moduleb": 2, "ema.c": 3, "ema.unknown": 4}
    renamed = _names.unwrap_flat_keys(state, ["ema.aw", "ema.b", "ema.c"])
    assert renamed == {"ema.aw": 1, "ema.b": 2, "ema.c": 3, "ema.unknown": 4}
    assert _names.unwrap_flat_keys({"aw": 1}, ["_orig_modaw"]) == {"_orig_modaw": 1}
    both = {"_orig_modaw": 1, "aw": 2}
    assert _names.unwrap_flat_keys(both, ["aw"]) == both


def test_ambiguous_flat_keys_are_left_alone() -> None:
    state = {"_orig_modlist": 1}
    assert _names.unwrap_flat_keys(state, ["list", "modulelist"]) == state
    twice = {"_orig_modlist": 1, "modulelist": 2}
    assert _names.unwrap_flat_keys(twice, ["list"]) == {"list": 1, "modulelist": 2}
