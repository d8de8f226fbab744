"""The guide of `emajit.migrating` is run as it stands: each library beside emajit."""

from __future__ import annotations

import ast
import copy
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import emajit
from bench import contestants
from emajit import checkpoint, cli, migrating, schedules
from tests import reference

GUIDE = str(migrating.__doc__)
STEPS = 20


def _timm() -> Any:
    return contestants.timm("utils/model_ema.py")


def _published() -> Any:
    module: Any = ModuleType("ldm.modules.ema")
    module.LitEma = reference.LitEma
    return module


class Library(NamedTuple):
    """What the guide's section of a library needs to be run.

    module: the module that the section imports.
    stands_in: makes it where the installed one cannot be imported, or is none.
    package: what must be installed.
    update: calls an update of the library, for the table; steps from 0.
    averages: the averages that emajit must have too, by name.
    ulps: the averages may differ by this many ulps of their largest number; 0 is bit for bit.
    float32: whether the library computes the decay in float32.
    steps: how many steps are trained before the comparison, and again after the checkpoint.
    """

    module: str
    package: str
    update: Callable[[Any, nn.Module, int], Any]
    averages: Callable[[Any, nn.Module], dict[str, Tensor]]
    stands_in: Callable[[], Any] | None = None
    ulps: int = 0
    float32: bool = False
    steps: int = STEPS


def by_position(ema: Any, model: nn.Module) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


def by_flat_name(ema: Any, model: nn.Module) -> dict[str, Tensor]:
    return {name: ema.get_buffer(name.replace(".", "")) for name, _ in model.named_parameters()}


def floating(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


LIBRARIES = {
    "AveragedModel of torch": Library(
        "torch.optim.swa_utils",
        "torch",
        lambda ema, model, step: ema.update_parameters(model),  # noqa: ARG005
        lambda ema, model: ema.module.state_dict(),  # noqa: ARG005
        float32=True,  # 1 / (n_averaged + 1)
    ),
    "ModelEmaV3 of timm": Library(
        "timm.utils",
        "timm",
        lambda ema, model, step: ema.update(model, step + 1),
        lambda ema, model: ema.module.state_dict(),  # noqa: ARG005
        stands_in=_timm,
    ),
    "EMAModel of diffusers": Library(
        "diffusers.training_utils",
        "diffusers",
        lambda ema, model, step: ema.step(model.parameters()),  # noqa: ARG005
        by_position,
        ulps=2,
    ),
    "EMA of ema-pytorch": Library(
        "ema_pytorch",
        "ema_pytorch",
        lambda ema, model, step: ema.update(),  # noqa: ARG005
        lambda ema, model: floating(ema.ema_model.state_dict()),  # noqa: ARG005
        ulps=4,
        float32=True,
        steps=155,
    ),
    "ExponentialMovingAverage of torch_ema": Library(
        "torch_ema",
        "torch_ema",
        lambda ema, model, step: ema.update(),  # noqa: ARG005
        by_position,
        ulps=2,
    ),
    "LitEma of latent-diffusion": Library(
        "ldm.modules.ema",
        "torch",
        lambda ema, model, step: ema(model),  # noqa: ARG005
        by_flat_name,
        stands_in=_published,
        ulps=2,
        float32=True,
    ),
}


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## (.*)\n", GUIDE, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks(section: str, kind: str) -> list[str]:
    """The Python below a heading, and below the same heading `at evaluation`."""
    heading = rf"^\*\*{kind}(?:, at evaluation)?\*\*\n\n```python\n(.*?)^```$"
    return re.findall(heading, sections()[section], flags=re.MULTILINE | re.DOTALL)


def rows(section: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `(.+)` \| `(.+)` \|$", sections()[section], flags=re.MULTILINE)


def loop(section: str, kind: str) -> str:
    """The training loop of the code below a heading."""
    body = ast.parse("".join(blocks(section, kind))).body
    (found,) = (node for node in body if isinstance(node, ast.For))
    return ast.unparse(found)


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "emajit.migrating", "exec"), names)  # noqa: S102


def batches(section: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 3, generator=generator) for _ in range(LIBRARIES[section].steps)]


def train_step(model: nn.Module, batch: Tensor) -> None:
    loss = (model.train()(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
    params = [*model.parameters()]
    for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.data.sub_(gradient, alpha=0.1)
    model.eval()  # for the prediction


def names_for(section: str) -> dict[str, Any]:
    """All that the guide says its code needs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    loader, x = batches(section, 1), torch.linspace(-1, 1, 6).view(2, 3)
    return {"model": model, "loader": loader, "train_step": train_step, "x": x}


def ours(names: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = names["ema"].named_averages() if "ema" in names else names["shadow"]
    return found


def assert_same(section: str, theirs: dict[str, Any], names: dict[str, Any]) -> None:
    library = LIBRARIES[section]
    wanted, found = library.averages(theirs["ema"], theirs["model"]), ours(names)
    assert found.keys() >= wanted.keys()
    assert not floating(found).keys() - wanted.keys()
    near = library.ulps * torch.finfo(torch.float32).eps
    for name, average in wanted.items():
        error = float((found[name] - average).abs().max())
        assert error <= near * float(average.abs().max()), name
    for name, trained in theirs["model"].named_parameters():
        assert not torch.allclose(wanted[name], trained, rtol=1e-3), name


@pytest.fixture(autouse=True)
def importable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a section import its library; skip the test where it is not installed."""
    section = getattr(request.node, "callspec", None) and request.node.callspec.params["section"]
    if not section:
        return
    library = LIBRARIES[section]
    if find_spec(library.package) is None:
        pytest.skip(f"{library.package} is of the bench extra")
    if library.stands_in is None:
        import_module(library.module)
        return
    module, parts = library.stands_in(), library.module.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    monkeypatch.setitem(sys.modules, library.module, module)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A batch norm of 24 numbers waits for all threads: 50 ms each on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_section_is_run() -> None:
    *libraries, last = sections()
    assert libraries == [*LIBRARIES]
    assert last == "What goes wrong in the copied LitEma"


@pytest.mark.parametrize("section", LIBRARIES)
def test_before_after_and_from_the_checkpoint(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after, (read,) = (
        blocks(section, kind) for kind in ("Before", "After", "The checkpoint")
    )
    for block in (*before, *after, read):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        assert len(lines) <= 8, block

    theirs, names = names_for(section), names_for(section)
    run("".join(before), theirs)
    run("".join(after), names)
    assert_same(section, theirs, names)
    assert_close(names["prediction"], theirs["prediction"])
    for name, value in names["model"].state_dict().items():
        assert torch.equal(value, theirs["model"].state_dict()[name]), name

    (saved,) = re.findall(r"^# saved by (.*\n(?:# .*\n)*)", read, flags=re.MULTILINE)
    run(re.sub(r"^# *", "", saved, flags=re.MULTILINE), {**theirs, "torch": torch})
    resumed = names_for(section) | {"model": copy.deepcopy(theirs["model"])}
    run(read, resumed)
    assert_same(section, theirs, resumed)
    theirs["loader"] = resumed["loader"] = batches(section, 2)
    run(loop(section, "Before"), theirs)
    run(loop(section, "After"), resumed)
    assert_same(section, theirs, resumed)


@pytest.mark.parametrize("section", LIBRARIES)
def test_decays_in_the_names_of_emajit(section: str) -> None:
    """Each row of a table: an average of 1, updated with 0, is the decay."""
    library = LIBRARIES[section]
    found = rows(section)
    assert len(found) >= 2
    for peer, schedule in found:
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        model.weight.data.zero_()
        names = {"model": model, "params": [*model.parameters()]}
        names |= vars(import_module(library.module))
        ema, decay = eval(peer, names), eval(schedule, dict(vars(schedules)))  # noqa: S307
        (average,) = library.averages(ema, model).values()
        for step in range(150):
            average.data.fill_(1)
            library.update(ema, model, step)
            near = 1e-7 if library.float32 else 1e-15
            assert average.item() == pytest.approx(decay(step), rel=0, abs=near), (peer, step)


@pytest.mark.parametrize(
    ("section", "theirs", "ours"),
    [
        ("AveragedModel of torch", "use_buffers=True", 'buffers="average"'),
        ("ModelEmaV3 of timm", "exclude_buffers=True", 'buffers="copy"'),
    ],
)
def test_other_options_for_buffers(section: str, theirs: str, ours: str) -> None:
    for option in (theirs, ours):
        assert f"`{option}`" in sections()[section]
    (before,), (after,) = blocks(section, "Before"), blocks(section, "After")
    peer, names = names_for(section), names_for(section)
    run(re.sub(r"(ema = .*)\)\n", rf"\1, {theirs})\n", before), peer)
    run(re.sub(r'buffers="\w+"', ours, after), names)
    for name, average in floating(peer["ema"].module.state_dict()).items():
        assert torch.equal(names["ema"].named_averages()[name], average), name
    trained = peer["model"].state_dict()
    count = names["ema"].named_averages()["2.num_batches_tracked"]
    assert count == trained["2.num_batches_tracked"] == STEPS


def test_the_states_of_litema_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter way of the guide."""
    monkeypatch.chdir(tmp_path)
    section = "LitEma of latent-diffusion"
    (code,) = re.findall(r"`(ema\.load_state_dict\(.*\))`", sections()[section])
    theirs, names = names_for(section), names_for(section)
    theirs["LitEma"] = reference.LitEma
    run("ema = LitEma(model)\n" + loop(section, "Before"), theirs)
    torch.save(theirs["ema"].state_dict(), "ema.pt")
    run(f"import torch\nfrom emajit import LitEma\nema = LitEma(model)\n{code}", names)
    wanted = theirs["ema"].state_dict()
    assert names["ema"].state_dict().keys() == wanted.keys()
    for key, value in names["ema"].state_dict().items():
        assert torch.equal(value, wanted[key]), key


def fenced(kind: str, heading: str) -> str:
    """The first block of a kind for the scripts of diffusers, below a heading."""
    text = sections()["EMAModel of diffusers"].partition(heading)[2]
    found: list[str] = re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)
    return found[0]


def sides(diff: str) -> tuple[str, str]:
    """The code before and after."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(x[1:] for x in lines if x[0] in signs) for signs in (" -", " +"))
    return before, after


def script(code: str) -> dict[str, Any]:
    """The names of a new process of a diffusers script, with hooks as in `code`."""
    diffusers, training = import_module("diffusers"), import_module("diffusers.training_utils")
    accelerator = import_module("accelerate").Accelerator(cpu=True)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
    model = diffusers.UNet2DModel(**sizes, **blocks, block_out_channels=(4,), norm_num_groups=2)
    names = {"accelerator": accelerator, "model": accelerator.prepare(model), "os": os}
    names |= {"UNet2DModel": diffusers.UNet2DModel, "EMAModel": training.EMAModel}
    names |= {"LitEma": emajit.LitEma, "schedules": schedules}
    run(code, names)
    accelerator.register_save_state_pre_hook(names["save_model_hook"])
    accelerator.register_load_state_pre_hook(names["load_model_hook"])
    return names


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


@pytest.mark.skipif(
    not (find_spec("diffusers") and find_spec("accelerate")), reason="they are of the bench extra"
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name:FutureWarning")
def test_a_script_of_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hooks, its folder, a folder for `from_pretrained`, and back to `EMAModel`."""
    monkeypatch.chdir(tmp_path)
    before, after = sides(fenced("diff", "### "))
    register = "accelerator.register_for_checkpointing(ema)\n"
    folder, export = (
        fenced("python", heading) for heading in ("**The folder**", "**A folder for `from_pre")
    )
    assert len([line for line in folder.splitlines() if line]) <= 8
    assert after.count(register) == folder.count(register) == 1

    theirs = script(before)
    for seed in range(15):
        move(theirs["model"], seed)
        theirs["ema"].step(theirs["model"].parameters())
    theirs["accelerator"].save_state("checkpoint-15")

    with pytest.raises(RuntimeError, match="Registered objects: 1"):
        script(after)["accelerator"].load_state("checkpoint-15")
    names = script(after.replace(register, ""))
    names["accelerator"].load_state("checkpoint-15")
    run(folder, names)
    (shown,) = re.findall(r"`(float\(decay\(.*?\)\))`", sections()["EMAModel of diffusers"])
    for seed in range(15, 20):
        for each in (theirs, names):
            move(each["model"], seed)
        theirs["ema"].step(theirs["model"].parameters())
        names["ema"](names["model"])
        assert eval(shown, names) == theirs["ema"].cur_decay_value  # noqa: S307
    wanted = by_position(theirs["ema"], theirs["model"])
    assert_close(names["ema"].named_averages(), wanted)
    names["accelerator"].save_state("checkpoint-20")

    resumed = script(after)
    resumed["accelerator"].load_state("checkpoint-20")
    assert resumed["ema"].num_updates == 20
    exact = names["ema"].named_averages()
    assert_close(resumed["ema"].named_averages(), exact, rtol=0, atol=0)
    assert_close(resumed["model"].state_dict(), theirs["model"].state_dict())

    run(export, resumed)
    exported = resumed["UNet2DModel"].from_pretrained("unet_ema")
    assert_close(dict(exported.named_parameters()), exact, rtol=0, atol=0)

    command = fenced("sh", "**Back to EMAModel**").split()
    assert command[0] == "emajit"
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main() == 0
    back = resumed["EMAModel"].from_pretrained("back", resumed["UNet2DModel"])
    assert (back.optimization_step, back.decay) == (20, 0.999)
    assert_close(by_position(back, exported), exact, rtol=0, atol=0)

    resumed["model"].save_pretrained("checkpoint-20/unet_ema")  # a second average
    with pytest.raises(ValueError, match="found two"):
        checkpoint.read("checkpoint-20")
    (key,) = re.findall(r'`key="(.*?)"`', sections()["EMAModel of diffusers"])
    found = checkpoint.read("checkpoint-20", key=key)
    assert (found.layout, found.step) == ("LitEma", 20)
    assert_close(found.weights, exact, rtol=0, atol=0)
