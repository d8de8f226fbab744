"""Averages from anywhere, in the checkpoint of a trainer that goes on with them."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from emajit import LitEma, checkpoint, cli
from tests.test_formats import Hyperparameters, parameters

LIGHTNING: dict[str, Any] = {"pytorch-lightning_version": "2.6.0", "epoch": 1, "global_step": 40}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def names_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"net.{name}": value for name, value in model.state_dict().items()}


def optimizer(model: nn.Module) -> dict[str, Any]:
    adam = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    adam.step()
    return adam.state_dict()


def of_lightning(averages: dict[str, Tensor] | None, **beside: Any) -> dict[str, Any]:
    model = net()
    rest: dict[str, Any] = {"optimizer_states": [optimizer(model)], "loops": {"fit": [1, {}]}}
    raw = names_of(model)
    if averages is None:
        return {"state_dict": raw, **LIGHTNING, **rest, **beside}
    both = {"state_dict": averages, "current_model_state": raw}
    state = {"n_averaged": torch.tensor(9)}
    return {**both, "averaging_state": state, **LIGHTNING, **rest, **beside}


def of_callback(averages: dict[str, Tensor], saved: str = "raw", **beside: Any) -> dict[str, Any]:
    tree = of_lightning(None, **beside)
    raw = tree["state_dict"]
    ours: dict[str, Any] = {"shadow": averages, "step": 9, "averaged_at": 39}
    if saved == "averaged":
        ours["raw"] = {name: raw[name] for name in averages}
        tree["state_dict"] = raw | {name: v.clone() for name, v in averages.items()}
    return {**tree, "emajit": ours}


def of_mmengine(averages: dict[str, Tensor] | None, **beside: Any) -> dict[str, Any]:
    """As its Runner saves; the classes of `message_hub` are replaced by one of these tests."""
    model = net()
    told = {"meta": {"mmengine_version": "0.10.7", "iter": 40}, "optimizer": optimizer(model)}
    state = OrderedDict(names_of(model))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    if averages is None:
        return {"state_dict": state, **told, **beside}
    ema = {"steps": torch.tensor(9), **{f"module.{name}": v for name, v in state.items()}}
    return {"state_dict": {**state, **averages}, "ema_state_dict": ema, **told, **beside}


def of_params() -> dict[str, Tensor]:
    return {f"net.{name}": value for name, value in parameters(net()).items()}


# The layout, and a checkpoint with averages of its own, or without any.
CASES: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "lightning": ("lightning", lambda **beside: of_lightning(names_of(net()), **beside)),
    "lightning, none yet": ("lightning", lambda **beside: of_lightning(None, **beside)),
    "callback": ("emajit-lightning", lambda **beside: of_callback(of_params(), **beside)),
    "callback, saved averages": (
        "emajit-lightning",
        lambda **beside: of_callback(of_params(), "averaged", **beside),
    ),
    "callback, none yet": ("emajit-lightning", lambda **beside: of_lightning(None, **beside)),
    "mmengine": ("mmengine", lambda **beside: of_mmengine(names_of(net()), **beside)),
    "mmengine, none yet": ("mmengine", lambda **beside: of_mmengine(None, **beside)),
}
SHARED = r"expected averages apart from all other tensors, found one of shape \(.*\) that shares"
OWN = {"state_dict", "current_model_state", "averaging_state", "emajit", "ema_state_dict"}


def given(path: Path, names: Callable[[str], str] = str) -> dict[str, Tensor]:
    """A file of other averages with 77 updates."""
    averages = {name: torch.randn_like(p) for name, p in net().named_parameters()}
    checkpoint.save(path, {names(name): v for name, v in averages.items()}, 77)
    return averages


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert [*a] == [*b]
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefix", ["", "net.", "_orig_mod.", "model.net."])
def test_averages_change_and_all_else_stays(tmp_path: Path, case: str, prefix: str) -> None:
    layout, make = CASES[case]
    like, out = tmp_path / "last.ckpt", tmp_path / "next.ckpt"
    torch.save(tree := make(), like)
    averages = given(tmp_path / "own", lambda name: f"{prefix}{name}")
    before = like.read_bytes()
    found = checkpoint.read(tmp_path / "own")
    checkpoint.write(out, found, layout=layout, like=like)
    assert like.read_bytes() == before
    old, new = checkpoint.read(tree) if "none" not in case else None, checkpoint.read(out)
    assert new.step == 77
    for name, value in averages.items():
        assert torch.equal(new.weights[f"net.{name}"], value)
    trained = tree["state_dict"] if old is None else old.raw
    assert new.raw.keys() == trained.keys()
    for name, value in new.raw.items():
        assert torch.equal(value, trained[name])
        if "running" in name or "num_batches" in name:  # of the trainer, not of the source
            kept = value if old is None else old.weights[name]
            assert torch.equal(new.weights[name], kept)
    written = torch.load(out, weights_only=True, mmap=True)
    assert all(value.data_ptr() % 64 == 0 for value in written["state_dict"].values())
    if layout == "mmengine" and old is None:
        assert written["state_dict"]._metadata == {"": {"version": 1}}
    if "saved" in case:  # which `load_from_checkpoint` gets
        assert torch.equal(written["state_dict"]["net.0.bias"], averages["0.bias"])
    rest = [{k: v for k, v in each.items() if k not in OWN} for each in (tree, written)]
    assert_same(*rest)


@pytest.mark.parametrize("case", CASES)
def test_objects_of_any_class_stay_and_do_not_run(tmp_path: Path, case: str) -> None:
    layout, make = CASES[case]
    like, out, folder = tmp_path / "last.ckpt", tmp_path / "next.ckpt", tmp_path / "folder"
    folder.mkdir()
    beside = {"hyper_parameters": Hyperparameters(folder), "message_hub": {"path": Path("a")}}
    torch.save(make(**beside, tail=[torch.ones(3), OrderedDict(a=1)]), like)
    averages = given(tmp_path / "own")
    checkpoint.write(out, checkpoint.read(tmp_path / "own"), layout=layout, like=like)
    assert not [*folder.iterdir()]
    with zipfile.ZipFile(like) as old, zipfile.ZipFile(out) as new:
        assert new.testzip() is None
        names = old.namelist()
        assert new.namelist()[: len(names)] == names
        same = {name for name in names if old.read(name) == new.read(name)}
        (pickled,) = [name for name in names if name.endswith("data.pkl")]
        assert new.read(pickled).startswith(old.read(pickled)[:-1])
        version = pickled.replace("data.pkl", ".format_version")
        assert all("/data" in name for name in {*names} - same - {version})
    written = torch.load(out, weights_only=False)
    assert [*folder.iterdir()]  # the class is there, for those who load it
    assert written["message_hub"] == {"path": Path("a")}
    assert torch.equal(written["tail"][0], torch.ones(3))
    assert checkpoint.read(out).weights["net.0.bias"].equal(averages["0.bias"])


def test_the_dtypes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    like, out = tmp_path / "last.ckpt", tmp_path / "next.ckpt"
    averages = given(tmp_path / "own")
    found = checkpoint.read(tmp_path / "own")
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in names_of(net()).items()}
    torch.save(of_lightning(half), like)
    checkpoint.write(out, found, layout="lightning", like=like)
    value = checkpoint.read(out).weights["net.0.bias"]
    assert torch.equal(value, averages["0.bias"].bfloat16())
    torch.save(of_lightning({n: v.half() if v.ndim else v for n, v in half.items()}), like)
    large = found._replace(weights={n: v * 1e6 for n, v in found.weights.items()})
    with pytest.raises(
        ValueError, match=r"lightning: .*last.ckpt: .* expected numbers up to 65504"
    ):
        checkpoint.write(tmp_path / "no.ckpt", large, layout="lightning", like=like)
    torch.save({**of_lightning(None), "state_dict": half}, like)  # a new shadow stays in float32
    checkpoint.write(out, found, layout="emajit-lightning", like=like)
    assert torch.equal(checkpoint.read(out).weights["net.0.bias"], averages["0.bias"])
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "next.ckpt", "own"}


@pytest.mark.parametrize("case", CASES)
def test_tied_weights_are_one(tmp_path: Path, case: str) -> None:
    layout, make = CASES[case]
    like, out = tmp_path / "last.ckpt", tmp_path / "next.ckpt"
    tree = make()
    for state in (tree["state_dict"], tree.get("current_model_state", {})):
        if state:
            state["net.tied"] = state["net.0.weight"]
    if "ema_state_dict" in tree:
        tree["ema_state_dict"]["module.net.tied"] = tree["ema_state_dict"]["module.net.0.weight"]
    if "raw" in tree.get("emajit", {}):
        tree["emajit"]["raw"]["net.tied"] = tree["emajit"]["raw"]["net.0.weight"]
    torch.save(tree, like)
    averages = given(tmp_path / "own")
    checkpoint.write(out, checkpoint.read(tmp_path / "own"), layout=layout, like=like)
    new = checkpoint.read(out)
    for name in ("net.0.weight", "net.tied"):
        assert torch.equal(new.weights[name], averages["0.weight"])
    if case == "callback, none yet":  # it averages a tied weight once
        assert torch.load(out)["emajit"]["shadow"].keys() == of_params().keys()


@pytest.mark.parametrize("case", CASES)
def test_a_tied_source_fills_weights_that_the_file_has_twice(tmp_path: Path, case: str) -> None:
    """A trainer that gathers weights one by one writes a tied weight twice."""
    layout, make = CASES[case]
    like, out = tmp_path / "last.ckpt", tmp_path / "next.ckpt"
    tree = make()
    ours = tree.get("emajit", {})
    raw = {n.removeprefix("module."): v for n, v in tree.get("ema_state_dict", {}).items()}
    for prefix, state in (
        ("", tree["state_dict"]),
        ("", tree.get("current_model_state")),
        ("module.", tree.get("ema_state_dict")),
        ("", ours.get("shadow")),
        ("", ours.get("raw")),
    ):
        if state is not None:
            state[f"{prefix}net.tied"] = state[f"{prefix}net.0.weight"].clone()
    torch.save(tree, like)
    given(tmp_path / "own")
    found = checkpoint.read(tmp_path / "own")
    average = found.weights["0.weight"]
    tied = {"elsewhere": average, **found.weights, "tied": average}
    checkpoint.write(out, found._replace(weights=tied), layout=layout, like=like)
    new = checkpoint.read(out)
    for name in ("net.0.weight", "net.tied"):
        assert torch.equal(new.weights[name], average)
    trained = tree.get("current_model_state") or raw or ours.get("raw") or tree["state_dict"]
    assert torch.equal(new.raw["net.tied"], trained["net.0.weight"])
    if "saved" in case:
        assert torch.equal(torch.load(out)["state_dict"]["net.tied"], average)


def of_two(averages: dict[str, Any], raw: dict[str, Any], **beside: Any) -> dict[str, Any]:
    """A checkpoint of Lightning whose averages have the names a and b, or one of them."""
    both = {"state_dict": averages, "current_model_state": raw}
    return {**both, "averaging_state": {"n_averaged": torch.tensor(9)}, **LIGHTNING, **beside}


def averaged(step: int = 77, **weights: Tensor) -> checkpoint.Averaged:
    return checkpoint.Averaged(weights, "test", step)


def tagged(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value)
    parameter.tag = 1  # type: ignore[attr-defined]
    return parameter


@pytest.mark.parametrize(
    "tree",
    [
        of_two({"a": torch.zeros(3), "b": torch.zeros(3)}, {"a": torch.zeros(3)}),
        of_two(
            {"a": torch.zeros(3), "b": torch.zeros(3)},
            {"a": torch.zeros(3), "b": tagged(torch.zeros(3))},
        ),
        {
            "state_dict": {"a": torch.zeros(3), "c": torch.zeros(3)},
            "emajit": {
                "shadow": {"a": torch.zeros(3), "b": torch.zeros(3)},
                "step": 9,
                "averaged_at": 3,
            },
            **LIGHTNING,
        },
    ],
    ids=["absent", "with attributes", "shadow"],
)
def test_an_average_changes_without_its_trained_weight(tmp_path: Path, tree: Any) -> None:
    torch.save(tree, like := tmp_path / "last.ckpt")
    layout = "emajit-lightning" if "emajit" in tree else "lightning"
    found = averaged(a=torch.ones(3), b=torch.ones(3))
    checkpoint.write(tmp_path / "next.ckpt", found, layout=layout, like=like)
    new = torch.load(tmp_path / "next.ckpt", weights_only=True)
    got = new["emajit"]["shadow"] if "emajit" in tree else new["state_dict"]
    assert_same(got, {"a": torch.ones(3), "b": torch.ones(3)})


def test_the_places_that_torch_computes(tmp_path: Path) -> None:
    """torch may compute where its own writer puts each record, which a copy does not follow."""
    module = pytest.importorskip("torch.utils.serialization", reason="torch reads them")
    if not hasattr(module.config.load, "calculate_storage_offsets"):
        pytest.skip("this torch computes no places")
    torch.save(of_lightning(names_of(net())), like := tmp_path / "last.ckpt")
    given(tmp_path / "own")
    found = checkpoint.read(tmp_path / "own")
    checkpoint.write(tmp_path / "next.ckpt", found, layout="lightning", like=like)
    plain = torch.load(tmp_path / "next.ckpt", weights_only=True)
    with module.config.patch({"load.calculate_storage_offsets": True}):
        computed = torch.load(tmp_path / "next.ckpt", weights_only=True, mmap=True)
    assert_same(plain, computed)


def test_numbers_that_only_their_bits_tell(tmp_path: Path) -> None:
    """NaN is not equal to itself; torch conjugates and negates some tensors as it reads them."""
    like, out = tmp_path / "last.ckpt", tmp_path / "next.ckpt"
    nan = torch.tensor([1, float("nan"), 2])
    zeros = torch.zeros(3)
    torch.save(of_two({"a": zeros, "b": zeros}, {"a": zeros + 1, "b": zeros + 1}), like)
    found = averaged(a=nan, b=nan.clone())
    checkpoint.write(out, found, layout="lightning", like=like)
    assert_close(checkpoint.read(out).weights["a"], nan, rtol=0, atol=0, equal_nan=True)
    conjugated = torch.randn(3, dtype=torch.complex64).conj()
    torch.save({"state_dict": {"a": torch.zeros_like(conjugated), "b": zeros}, **LIGHTNING}, like)
    found = averaged(a=conjugated, b=conjugated.imag)
    checkpoint.write(out, found, layout="lightning", like=like)
    new = checkpoint.read(out).weights
    assert torch.equal(new["a"], conjugated)
    assert torch.equal(new["b"], conjugated.imag)


def test_versions_of_modules_stay_in_lightning(tmp_path: Path) -> None:
    """Modules migrate a state_dict of an older version, or of none, as they load it."""
    state = OrderedDict(names_of(net()))
    state._metadata = {"": {"version": 3}}  # type: ignore[attr-defined]
    tree = {**of_lightning(None), "state_dict": state}
    torch.save(tree, like := tmp_path / "last.ckpt")
    given(tmp_path / "own")
    found = checkpoint.read(tmp_path / "own")
    checkpoint.write(tmp_path / "next.ckpt", found, layout="lightning", like=like)
    new = torch.load(tmp_path / "next.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert new[key]._metadata == {"": {"version": 3}}


def test_averages_of_float8_into_averages(tmp_path: Path) -> None:
    torch.save(of_two({"a": torch.zeros(3)}, {"a": torch.zeros(3)}), like := tmp_path / "last.ckpt")
    narrow = torch.tensor([1.0, 2.0, 0.5]).to(torch.float8_e5m2)
    checkpoint.write(tmp_path / "o.ckpt", averaged(a=narrow), layout="lightning", like=like)
    assert torch.equal(checkpoint.read(tmp_path / "o.ckpt").weights["a"], narrow.float())


def test_a_float8_tensor_beside_stays(tmp_path: Path) -> None:
    narrow = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    tree = of_two({"a": torch.zeros(3), "x": narrow}, {"a": torch.ones(3), "x": narrow.clone()})
    torch.save(tree, like := tmp_path / "last.ckpt")
    checkpoint.write(tmp_path / "o.ckpt", averaged(a=torch.ones(3)), layout="lightning", like=like)
    new = torch.load(tmp_path / "o.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(new["x"].float(), narrow.float())


def test_averages_in_one_storage_with_others(tmp_path: Path) -> None:
    """As of a flat parameter: each tensor has numbers of its own in it."""
    flat = torch.arange(20.0)
    tree = of_two({"a": flat[2:6], "b": flat[6:9]}, {"a": flat[10:14], "b": flat[14:17]})
    torch.save(tree, like := tmp_path / "last.ckpt")
    found = averaged(a=torch.zeros(4), b=torch.ones(3))
    checkpoint.write(tmp_path / "o.ckpt", found, layout="lightning", like=like)
    new = torch.load(tmp_path / "o.ckpt", weights_only=True)
    assert_same(new["state_dict"], dict(found.weights))
    assert_same(new["current_model_state"], tree["current_model_state"])


def test_averages_of_a_trainer_with_its_buffers(tmp_path: Path) -> None:
    """A source may have averages of buffers, which stay where a place for them is missing."""
    source = checkpoint.read(of_lightning(names_of(net())))
    assert "net.1.running_mean" not in source.raw_only
    like, out = tmp_path / "last.ckpt", tmp_path / "next.ckpt"
    torch.save(of_callback(of_params()), like)
    checkpoint.write(out, source, layout="emajit-lightning", like=like)
    shadow = torch.load(out, weights_only=True)["emajit"]["shadow"]
    assert shadow.keys() == of_params().keys()
    torch.save(of_lightning(names_of(net())), like)
    checkpoint.write(out, source, layout="lightning", like=like)
    kept = checkpoint.read(out).weights
    assert all(torch.equal(value, kept[name]) for name, value in source.weights.items())


def test_a_frozen_weight_without_an_average_stays(tmp_path: Path) -> None:
    raw = names_of(net())
    ema = {name: v + 1 for name, v in raw.items() if name in of_params()}
    del ema["net.0.weight"]
    source = checkpoint.read({"ema_state": ema, "model": raw})
    assert "net.0.weight" in source.raw_only
    torch.save(tree := of_lightning(names_of(net())), like := tmp_path / "last.ckpt")
    checkpoint.write(tmp_path / "out.ckpt", source, layout="lightning", like=like, step=1)
    got = checkpoint.read(tmp_path / "out.ckpt").weights
    assert torch.equal(got["net.0.weight"], tree["state_dict"]["net.0.weight"])
    assert torch.equal(got["net.0.bias"], ema["net.0.bias"])


class TestRefused:
    @pytest.fixture
    def found(self, tmp_path: Path) -> checkpoint.Averaged:
        given(tmp_path / "own")
        return checkpoint.read(tmp_path / "own")

    def refuse(self, found: Any, tmp_path: Path, tree: Any, layout: str, match: str) -> None:
        like = tmp_path / "last.ckpt"
        torch.save(tree, like)
        with pytest.raises(ValueError, match=f"^{layout}: {like}: {match}"):
            checkpoint.write(tmp_path / "out.ckpt", found, layout=layout, like=like)
        assert not (tmp_path / "out.ckpt").exists()

    @pytest.mark.parametrize("case", [name for name in CASES if "none" not in name])
    def test_other_names_and_shapes(self, found: Any, tmp_path: Path, case: str) -> None:
        layout, make = CASES[case]
        weights = {**found.weights, "0.weight": torch.ones(4, 5), "more.w": torch.ones(2)}
        weights["also.w"] = weights.pop("2.bias")
        match = r"expected averages of its weights, found no net\.2\.bias, .*more\.w beside.*"
        self.refuse(found._replace(weights=weights), tmp_path, make(), layout, match)
        match = r".*found net\.0\.weight of shape \(4, 5\) for \(4, 3\)$"
        weights = {**found.weights, "0.weight": torch.ones(4, 5)}
        self.refuse(found._replace(weights=weights), tmp_path, make(), layout, match)
        other = {f"layer.{i}.w": torch.ones(2) for i in range(9)}
        match = r"expected averages of its weights, found (no net[^,]*, ){4}no net[^,]* and 10 more"
        self.refuse(found._replace(weights=other), tmp_path, make(), layout, match)

    @pytest.mark.parametrize("case", [name for name in CASES if "none" in name])
    def test_without_averages_of_its_own(self, found: Any, tmp_path: Path, case: str) -> None:
        layout, make = CASES[case]
        unknown = found._replace(step=None)
        self.refuse(unknown, tmp_path, make(), layout, "expected a checkpoint that tells its step")
        more = found._replace(weights={**found.weights, "more.w": torch.ones(2)})
        self.refuse(more, tmp_path, make(), layout, r".*found net\.more\.w beside$")
        none = found._replace(weights={}, raw_only=())
        self.refuse(none, tmp_path, make(), layout, ".*found none")

    def test_two_averages_of_one_weight(self, found: Any, tmp_path: Path) -> None:
        tree = of_lightning(None)
        tree["state_dict"]["net.tied"] = tree["state_dict"]["net.0.weight"]
        weights = {**found.weights, "tied": torch.zeros(4, 3)}
        match = r"expected one average of net\.tied, found another under a second name"
        self.refuse(found._replace(weights=weights), tmp_path, tree, "lightning", match)
        weights["tied"] = weights["0.weight"].clone()
        like, out = tmp_path / "last.ckpt", tmp_path / "out.ckpt"
        checkpoint.write(out, found._replace(weights=weights), layout="lightning", like=like)
        out.unlink()
        weights = {**found.weights, "module.0.weight": torch.zeros(4, 3)}
        match = r"expected one average of net\.0\.weight, found another"
        self.refuse(
            found._replace(weights=weights), tmp_path, of_lightning(None), "lightning", match
        )

    def test_averages_that_are_the_trained_weights(self, found: Any, tmp_path: Path) -> None:
        """New averages would change the trained weights too."""
        tree = of_lightning(names_of(net()))
        tree["current_model_state"] = dict(tree["state_dict"])
        self.refuse(found, tmp_path, tree, "lightning", SHARED)

    def test_averages_that_share_memory(self, tmp_path: Path) -> None:
        a, flat, image = torch.zeros(3), torch.arange(8.0), torch.ones(4, 3, 1, 1)
        other = torch.ones(3)
        strided = image.as_strided(image.shape, (3, 1, 3, 3))  # the same numbers
        held = {"a": a}
        module = nn.Identity()
        module.a = a
        ones = averaged(a=torch.ones(3))
        for tree, found, match in (
            (of_two({"a": strided}, {"a": image}), averaged(a=image * 2), SHARED),
            (of_two({"a": flat[:5]}, {"a": flat[3:]}), averaged(a=torch.ones(5)), SHARED),
            (of_two({"a": a}, {"a": other}, callbacks={"best": {"a": a}}), ones, SHARED),
            (of_two(held, {"a": other}, callbacks={"best": held}), ones, SHARED),
            (of_two({"a": a}, {"a": other}, tail=[(tagged(a),)]), ones, SHARED),
            (of_two({"a": a}, {"a": other}, tail=module), ones, SHARED),
            (
                of_two({"a": a, "b": a}, {"a": other, "b": other.clone()}),
                averaged(a=torch.zeros(3), b=torch.ones(3)),
                r"expected one average of shape \(3,\), found two in one place",
            ),
        ):
            self.refuse(found, tmp_path, tree, "lightning", match)

    def test_places_whose_numbers_are_not_their_own(self, tmp_path: Path) -> None:
        z = torch.randn(3, dtype=torch.complex64)
        zeros = torch.zeros(3)
        for held, average in (
            (z.conj(), z),
            (z.conj().imag, zeros),
            (torch.zeros(1).expand(3), zeros),
            (torch.zeros(5).as_strided((3, 3), (1, 1)), torch.ones(3, 3)),
        ):
            tree, found = of_two({"a": held}, {"a": average.clone()}), averaged(a=average)
            match = "expected a place with each number once as it is, found "
            self.refuse(found, tmp_path, tree, "lightning", match)
        tree = {"state_dict": {"a": z.conj()}, **LIGHTNING}
        match = "expected tensors as they are, found a conjugated or negated view"
        self.refuse(averaged(a=z), tmp_path, tree, "lightning", match)

    def test_numbers_of_another_kind(self, tmp_path: Path) -> None:
        one = torch.ones(3)
        whole = one.long()
        counted = of_two({"a": one}, {"a": one.clone()})
        counted["averaging_state"]["n_averaged"] = torch.tensor(9, dtype=torch.uint8)
        match = "expected numbers that fit torch.uint8, found others in torch.int64"
        self.refuse(averaged(300, a=one), tmp_path, counted, "lightning", match)
        for held, average in ((one, one + 1j), (whole, one), (whole, one + 1j)):
            tree = of_two({"a": held, "b": one}, {"a": held.clone(), "b": one.clone()})
            match = f"expected an average that fits {held.dtype}, found {average.dtype}"
            self.refuse(averaged(a=average, b=one * 2), tmp_path, tree, "lightning", match)
        narrow = averaged(a=one.to(torch.float8_e5m2))
        tree = {"state_dict": {"a": one}, **LIGHTNING}
        match = "expected averages in .*, found torch.float8_e5m2"
        self.refuse(narrow, tmp_path, tree, "lightning", match)
        nowhere = averaged(a=torch.empty(3, device="meta"))
        match = "a: expected a dense tensor, found"
        self.refuse(nowhere, tmp_path, tree, "lightning", match)

    def test_places_without_tensors(self, found: Any, tmp_path: Path) -> None:
        lightning, mmengine = of_lightning(names_of(net())), of_mmengine(names_of(net()))
        lightning["averaging_state"]["n_averaged"] = 3
        match = "expected a tensor where the average goes, found int"
        self.refuse(found, tmp_path, lightning, "lightning", match)
        del lightning["averaging_state"], mmengine["ema_state_dict"]["steps"]
        match = "expected its averages, found KeyError"
        self.refuse(found, tmp_path, lightning, "lightning", match)
        self.refuse(found, tmp_path, mmengine, "mmengine", match)
        callback = of_callback(of_params())
        callback["emajit"]["shadow"]["net.0.bias"] = Path("a")
        match = r".*found net\.0\.bias beside"
        self.refuse(found, tmp_path, callback, "emajit-lightning", match)

    def test_a_step_that_is_not_known_stays(self, found: Any, tmp_path: Path) -> None:
        for layout, make in CASES.values():
            torch.save(tree := make(), tmp_path / "last.ckpt")
            if tree.keys() & {"emajit", "averaging_state", "ema_state_dict"}:
                options: Any = {"layout": layout, "like": tmp_path / "last.ckpt"}
                checkpoint.write(tmp_path / "out.ckpt", found._replace(step=None), **options)
                assert checkpoint.read(tmp_path / "out.ckpt").step == 9

    def test_other_checkpoints(self, found: Any, tmp_path: Path) -> None:
        other = {"state_dict": names_of(net()), "ema_state_dict": names_of(net())}
        lightning, callback = of_lightning(names_of(net())), of_callback(of_params())
        several = copy.deepcopy(callback)
        several["emajit"]["shadows"] = {"posthoc-0.05": several["emajit"]["shadow"]}
        for tree, layout, match in (
            (other, "lightning", r"expected a checkpoint of Lightning, found \['state_dict', 'em"),
            (other, "emajit-lightning", "expected a checkpoint of Lightning, found"),
            (other, "mmengine", "expected a checkpoint of mmengine, found"),
            (lightning, "mmengine", "expected a checkpoint of mmengine, found"),
            (callback, "lightning", ".* which have the layout emajit-lightning"),
            (lightning, "emajit-lightning", ".* write the layout lightning, with which EMACallb"),
            (several, "emajit-lightning", "expected one average, found 2, which share"),
            ({**LIGHTNING, "state_dict": 3}, "lightning", "expected a state_dict, found int"),
        ):
            self.refuse(found, tmp_path, tree, layout, match)
        state = {**names_of(net()), "net._extra_state": Path("a")}
        tree = {**LIGHTNING, "state_dict": state}
        match = "expected tensors beside the averages, found a pickled"
        self.refuse(found, tmp_path, tree, "lightning", match)

    def test_files_that_are_no_such_archive(self, found: Any, tmp_path: Path) -> None:
        like, out = tmp_path / "last.ckpt", tmp_path / "out.ckpt"
        ours = tmp_path / "last.safetensors"
        checkpoint.save(ours, of_params(), 3)
        options: Any = {"layout": "lightning", "like": like}
        for save in (
            lambda: torch.save(of_lightning(None), like, _use_new_zipfile_serialization=False),
            lambda: torch.save(of_lightning(None), like, pickle_protocol=4),
            lambda: torch.save([1], like),
            lambda: like.write_bytes(b"PK"),
            lambda: like.write_bytes(pickle.dumps(os.getcwd)),
            lambda: ours.rename(like),
        ):
            save()
            with pytest.raises(ValueError, match=f"^{like}: expected a "):
                checkpoint.write(out, found, **options)
        torch.save(of_lightning(None), like)
        with zipfile.ZipFile(like) as old:
            records = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(like, "w") as new:
            for name, content in records.items():
                new.writestr(name, content + b"more" * name.endswith("data.pkl"))
        with pytest.raises(ValueError, match=f"^{like}: expected a dict pickled by protocol 2"):
            checkpoint.write(out, found, **options)
        torch.save(of_lightning(None), like)
        whole = like.read_bytes()
        for length in range(0, len(whole), 997):
            like.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"^{like}: expected a whole"):
                checkpoint.write(out, found, **options)
        like.unlink()
        for missing, error in ((like, FileNotFoundError), (tmp_path, IsADirectoryError)):
            with pytest.raises(error):
                checkpoint.write(out, found, layout="lightning", like=missing)
        assert not out.exists()

    def test_options_without_a_place(self, found: Any, tmp_path: Path) -> None:
        torch.save(of_lightning(None), like := tmp_path / "last.ckpt")
        for layout in ("lightning", "emajit-lightning", "mmengine"):
            with pytest.raises(ValueError, match=f"{layout}: expected a checkpoint of the trainer"):
                checkpoint.write(tmp_path / "out.ckpt", found, layout=layout)
            with pytest.raises(
                ValueError, match=r"dtype: expected none, since .* found torch.float16"
            ):
                checkpoint.write(
                    tmp_path / "out.ckpt", found, layout=layout, like=like, dtype=torch.float16
                )

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_an_interruption_leaves_the_old_file(
        self, found: Any, tmp_path: Path, error: type[BaseException]
    ) -> None:
        """Also where a checkpoint is replaced by its own copy."""
        torch.save(of_lightning(None), like := tmp_path / "last.ckpt")
        before, sizes = like.read_bytes(), list[int]()

        def tell(size: int) -> None:
            sizes.append(size)
            if len(sizes) == 5:
                raise error

        options: Any = {"layout": "lightning", "like": like}
        with pytest.raises(error):
            checkpoint.write(like, found, tell=tell, **options)
        assert like.read_bytes() == before
        checkpoint.write(like, found, **options)
        assert checkpoint.read(like).step == 77
        assert {path.name for path in tmp_path.iterdir()} == {"own", "last.ckpt"}


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(of_lightning(None), "last.ckpt")
    averages = given(Path("own"))
    options = ["emajit", "convert", "own", "-o", "next.ckpt", "--layout"]
    monkeypatch.setattr(sys, "argv", [*options, "lightning", "--like", "last.ckpt"])
    assert cli.main() == 0
    assert capsys.readouterr().out == "emajit: 6 averages, written into next.ckpt\n"
    assert checkpoint.read("next.ckpt").weights["net.0.bias"].equal(averages["0.bias"])
    monkeypatch.setattr(sys, "argv", [*options, "mmengine"])
    assert cli.main() == 2
    assert "pass like=, on the command line --like FILE" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # Lightning's hints
class TestLightning:
    """The real Trainer resumes from the copy."""

    @pytest.mark.parametrize(
        ("of", "by"),
        [
            ("none", "WeightAveraging"),
            ("none", "EMACallback"),
            ("WeightAveraging", "WeightAveraging"),
            ("WeightAveraging", "EMACallback"),
            ("EMACallback", "EMACallback"),
            ("EMACallback saved", "EMACallback"),
        ],
    )
    def test_goes_on_with_the_averages(self, tmp_path: Path, of: str, by: str) -> None:
        pytest.importorskip("lightning", reason="lightning is not installed")
        from lightning.pytorch.callbacks import (  # noqa: PLC0415
            Callback,
            EMAWeightAveraging,
            ModelCheckpoint,
        )

        from emajit.integrations.lightning import EMACallback  # noqa: PLC0415
        from tests import test_lightning as tests  # noqa: PLC0415

        class Seen(Callback):
            """What the Trainer has when the resumed training starts."""

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.raw, self.step = copy.deepcopy(pl_module.state_dict()), trainer.global_step
                self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])

        made: dict[str, Callable[[], list[Any]]] = {
            "none": list,
            "WeightAveraging": lambda: [EMAWeightAveraging(decay=0.5)],
            "EMACallback": lambda: [EMACallback(0.5)],
            "EMACallback saved": lambda: [EMACallback(0.5, save="averaged")],
        }
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        tests.trainer_of(tmp_path, *made[of](), saver, max_epochs=1).fit(
            tests.Regression(), tests.data()
        )
        like, out = tmp_path / "step=4.ckpt", tmp_path / "next.ckpt"
        averages = given(tmp_path / "own")
        layout = "lightning" if of == "WeightAveraging" or by == "WeightAveraging" else None
        found = checkpoint.read(tmp_path / "own")
        checkpoint.write(out, found, layout=layout or "emajit-lightning", like=like)
        before = torch.load(like, weights_only=True)
        trained = before.get("current_model_state", before["state_dict"])
        trained = {**trained, **before.get("emajit", {}).get("raw", {})}

        seen, (callback,), model = Seen(), made[by](), tests.Regression()
        trainer = tests.trainer_of(tmp_path, callback, seen, max_epochs=1, limit_train_batches=5)
        trainer.fit(model, tests.data(), ckpt_path=out)
        assert seen.step == 4
        assert_close(seen.raw, trained, rtol=0, atol=0)
        assert_close(seen.optimizer, before["optimizer_states"][0]["state"], rtol=0, atol=0)
        # After one more step.
        if by == "EMACallback":
            with callback.averaged(model):
                got = parameters(model)
            assert callback._averages.updates == 78
            new = parameters(model)
        else:
            got = parameters(callback._average_model.module)
            assert int(callback._average_model.n_averaged) == 78
            new = {}
        for name, value in averages.items():
            assert got[f"net.{name}"].shape == value.shape
            if new:  # Lightning's callback leaves the averages in the model
                assert_close(got[f"net.{name}"], 0.5 * value + 0.5 * new[f"net.{name}"])

    @pytest.mark.parametrize("gathered", [False, True], ids=["tied", "gathered one by one"])
    def test_goes_on_with_tied_weights(self, tmp_path: Path, gathered: bool) -> None:
        pytest.importorskip("lightning", reason="lightning is not installed")
        from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: PLC0415

        from emajit.integrations.lightning import EMACallback  # noqa: PLC0415
        from tests import test_lightning as tests  # noqa: PLC0415

        class Tied(tests.Regression):
            def __init__(self) -> None:
                super().__init__()
                self.tied = nn.Linear(3, 4, bias=False)
                self.tied.weight = self.get_parameter("net.0.weight")

        saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        tests.trainer_of(tmp_path, saver, max_epochs=1).fit(Tied(), tests.data())
        like, out = tmp_path / "step=4.ckpt", tmp_path / "next.ckpt"
        if gathered:
            tree = torch.load(like, weights_only=True)
            tree["state_dict"]["tied.weight"] = tree["state_dict"]["tied.weight"].clone()
            torch.save(tree, like)
        given(tmp_path / "own", lambda name: f"net.{name}")
        found = checkpoint.read(tmp_path / "own")
        average = found.weights["net.0.weight"]
        found = found._replace(weights={**found.weights, "tied.weight": average})
        checkpoint.write(out, found, layout="emajit-lightning", like=like)
        callback, model = EMACallback(0.5), Tied()
        trainer = tests.trainer_of(tmp_path, callback, max_epochs=1, limit_train_batches=5)
        trainer.fit(model, tests.data(), ckpt_path=out)
        new = model.tied.weight.detach().clone()
        with callback.averaged(model):
            assert_close(model.tied.weight.detach(), 0.5 * average + 0.5 * new)


@pytest.mark.filterwarnings("ignore")  # of mmengine itself
def test_mmengine_itself(tmp_path: Path) -> None:
    """Its Runner resumes from a copy of its own checkpoint, and its hook has these averages."""
    pytest.importorskip("mmengine", reason="mmengine needs packages that emajit does not test with")
    hooks, model, runner = map(
        import_module, (f"mmengine.{n}" for n in ("hooks", "model", "runner"))
    )

    class Model(model.BaseModel):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            return {"loss": self.net(x).square().mean()}

    class Seen(hooks.Hook):  # type: ignore[name-defined]
        def before_train(self, runner: Any) -> None:
            own = [each for each in runner.hooks if isinstance(each, hooks.EMAHook)]
            self.ema = copy.deepcopy(own[0].ema_model.state_dict()) if own else {}
            self.raw, self.step = copy.deepcopy(runner.model.state_dict()), runner.iter

    def train(name: str, custom: list[Any], epochs: int, resumed: Path | None = None) -> Seen:
        data = [{"x": x} for x in torch.randn(24, 3)]
        loader = {"dataset": data, "batch_size": 4, "sampler": {"type": "DefaultSampler"}}
        seen = Seen()
        runner.Runner(
            Model(),
            str(tmp_path / name),
            train_dataloader={**loader, "collate_fn": {"type": "default_collate"}},
            train_cfg={"by_epoch": True, "max_epochs": epochs},
            optim_wrapper={"optimizer": {"type": "Adam"}},
            custom_hooks=[*custom, seen],
            load_from=resumed and str(resumed),
            resume=resumed is not None,
            experiment_name=f"{name}{epochs}",
            log_level="ERROR",
        ).train()
        return seen

    averages = given(tmp_path / "own")
    for name, custom in (("with", [{"type": "EMAHook"}]), ("without", [])):
        train(name, custom, 1)
        like, out = tmp_path / name / "epoch_1.pth", tmp_path / f"{name}.pth"
        found = checkpoint.read(tmp_path / "own")
        checkpoint.write(out, found, layout="mmengine", like=like)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # its files need it since 2.6
            seen = train(name, [{"type": "EMAHook"}], 2, out)
        assert (seen.step, int(seen.ema["steps"])) == (6, 77)
        for key, value in averages.items():
            assert torch.equal(seen.ema[f"module.net.{key}"], value)
        old = torch.load(like, weights_only=False)
        ema = old.get("ema_state_dict", {})
        for key, value in seen.raw.items():
            assert torch.equal(value, ema.get(f"module.{key}", old["state_dict"][key]))


def test_a_litema_goes_on_in_a_trainer(tmp_path: Path) -> None:
    """From a state of latent-diffusion into a checkpoint of Lightning without averages."""
    host: Any = nn.Module()
    host.model = net()
    host.model_ema = LitEma(host.model, decay=0.5)
    host.model_ema(host.model)
    torch.save(of_lightning(None), like := tmp_path / "last.ckpt")
    found = checkpoint.read(copy.deepcopy(host.state_dict()))
    checkpoint.write(tmp_path / "next.ckpt", found, layout="emajit-lightning", like=like)
    new = checkpoint.read(tmp_path / "next.ckpt")
    assert new.step == 1
    assert torch.equal(new.weights["net.0.bias"], host.model_ema.named_averages()["0.bias"])
