"""DeepSpeed's ZeRO 3 in a real Trainer: `torchrun --nproc-per-node N zero_ranks.py RESULTS SHARED`.

Each check is a function of the folder that all runs share; what it raises is written to RESULTS.
Importing this file needs no DeepSpeed. A group of processes of its own for each number of
processes, since DeepSpeed and the Trainer keep what they are told first for the whole process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.testing import assert_close

import emajit
from emajit import checkpoint, posthoc
from emajit.integrations import _sharded
from emajit.integrations.transformers import EMACallback
from tests import ranks
from tests import test_transformers as tests

Check = Callable[[Path], None]
CHECKS: dict[str, Check] = {}
WORLDS = (2, 1)  # one process reads what two have saved
ALL: list[tuple[str, int]] = []
State = dict[str, Tensor]


def check(*worlds: int) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[function.__name__] = function
        ALL.extend((function.__name__, world) for world in worlds)
        return function

    return add


def settings(stage: int = 3, *, keeps: int = 100, gathers: bool = True, **zero: Any) -> Any:
    """DeepSpeed's configuration: parameters of up to `keeps` numbers stay gathered."""
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": keeps}
        zero |= {"stage3_gather_16bit_weights_on_model_save": gathers}
    sizes = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
    return {
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,  # else it compiles an Adam of its own
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys((*sizes, "gradient_clipping"), "auto"),
    }


def values(model: nn.Module) -> State:
    import deepspeed  # noqa: PLC0415

    with deepspeed.zero.GatheredParameters([*model.parameters()]):
        return tests.trained(model)


class Recorder(tests.Recorder):
    """The whole weights after each step and of each batch of an evaluation."""

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None: ...

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self.steps.append(values(kwargs["model"]))

    def on_prediction_step(self, *_: Any, **kwargs: Any) -> None:
        self.evaluated.append(values(kwargs["model"]))


def trained(
    folder: Path,
    *callbacks: Any,
    resume: Path | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    told = None if resume is None else str(resume)
    given = {**tests.settings("steps"), "max_steps": 4, "resume_from_checkpoint": told} | options
    trainer = tests.trainer_of(folder, *callbacks, deepspeed=config or settings(), **given)
    assert trainer.is_deepspeed_enabled
    trainer.train(resume_from_checkpoint=told)
    dist.barrier()
    return trainer


def averages(ema: EMACallback, which: str | None = None) -> State:
    assert ema._averages is not None
    held, shapes = ranks.gathered(tests.averages(ema, which)), ema._averages.shapes
    return {name: value.reshape(shapes.get(name, value.shape)) for name, value in held.items()}


def saved(folder: Path, step: int, name: str = "averages") -> State:
    return dict(checkpoint.read(folder / f"checkpoint-{step}" / f"{name}.safetensors").weights)


def weights_in(file: Path, names: State) -> State:
    from safetensors.torch import load_file  # noqa: PLC0415

    held = load_file(file)
    return {name: held[name] for name in names}


def forget_zero_3() -> None:
    """Else `from_pretrained` would divide the model that it loads."""
    from transformers.integrations import deepspeed  # noqa: PLC0415

    forget: Any = deepspeed.unset_hf_deepspeed_config
    forget()


def assert_same_steps(a: tests.Recorder, b: tests.Recorder) -> None:
    assert len(a.steps) == len(b.steps) > 0
    for mine, theirs in zip(a.steps, b.steps, strict=True):
        tests.assert_same(mine, theirs)


@check(2, 1)
def trains_as_without_evaluates_saves_and_resumes(shared: Path) -> None:
    """Parameters in parts only, or the small ones gathered; weights in shards or gathered too."""
    for keeps, gathers in ((0, False), (100, True)):
        config = settings(keeps=keeps, gathers=gathers)
        folder = shared / f"zero-{keeps}-{dist.get_world_size()}"
        without, recorder, ema = Recorder(), Recorder(), EMACallback(tests.DECAY)
        trained(folder / "without", without, config=config)
        trainer = trained(folder, ema, recorder, config=config)
        assert_same_steps(recorder, without)
        found = averages(ema)
        tests.assert_near(found, tests.reference(tests.trained(tests.tiny()), recorder.steps))
        tests.assert_same(recorder.evaluated[-1], found)
        with ema.averaged(trainer.model):
            tests.assert_same(values(trainer.model), found)
        tests.assert_same(values(trainer.model), recorder.steps[-1])
        last = folder / "checkpoint-4"
        tests.assert_same(saved(folder, 4), found)
        tests.assert_same(weights_in(last / "averaged/model.safetensors", found), found)
        if gathers:
            raw = weights_in(last / "model.safetensors", found)
            tests.assert_same(raw, recorder.steps[-1])
        file, state = last / "averages.safetensors", last / "trainer_state.json"
        assert file.stat().st_mtime_ns < state.stat().st_mtime_ns
        again, resumed = EMACallback(tests.DECAY), Recorder()
        same = trained(folder, again, resumed, config=config, resume=folder / "checkpoint-2")
        tests.assert_same(values(same.model), recorder.steps[-1])
        tests.assert_same(averages(again), found)
        tests.assert_same(resumed.evaluated[-1], found)


@check(2, 1)
def what_it_exports_loads_and_has_the_loss_of_the_evaluation(shared: Path) -> None:
    from transformers import GPT2LMHeadModel  # noqa: PLC0415

    folder, ema = shared / f"exported-{dist.get_world_size()}", EMACallback(tests.DECAY)
    trainer = trained(folder, ema)
    told = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    forget_zero_3()
    model = GPT2LMHeadModel.from_pretrained(folder / "checkpoint-4/averaged")
    tests.assert_same(tests.trained(model), averages(ema))
    other = tests.trainer_of(folder / "other", model=model, deepspeed=settings())
    assert other.evaluate()["eval_loss"] == told[-1]


@check(1)
def another_number_of_processes_reads_the_averages(shared: Path) -> None:
    """DeepSpeed refuses its own checkpoint then."""
    ema, folder = EMACallback(tests.DECAY), shared / "zero-100-2"
    trained(shared / "other", ema, max_steps=1)
    assert ema._averages is not None
    like, shapes = ema._averages[None].named_averages(), ema._averages.shapes
    file = folder / "checkpoint-2/averages.safetensors"
    loaded, step = _sharded.load(file, like, shapes)
    assert step == 2
    whole = {name: value.reshape(shapes[name]) for name, value in ranks.gathered(loaded).items()}
    tests.assert_same(whole, saved(folder, 2))
    with pytest.raises(Exception, match="DP world size of 2 but the current world size is 1"):
        trained(shared / "other", EMACallback(), resume=folder / "checkpoint-2")


@check(2)
def a_model_in_bfloat16(shared: Path) -> None:
    """With averages in float32, and rounded with the noise that the whole gets."""
    start = {n: p.bfloat16() for n, p in tests.trained(tests.tiny()).items()}
    without = Recorder()
    trained(shared / "bf16", without, bf16=True)
    for name, options in (
        ("float32", {"dtype": torch.float32}),
        ("noise", {"rounding": "stochastic"}),
    ):
        folder, given = shared / name, dict[str, Any](options)
        ema, recorder = EMACallback(tests.DECAY, **given), Recorder()
        trained(folder, ema, recorder, bf16=True)
        assert_same_steps(recorder, without)
        found = averages(ema)
        if "dtype" in options:
            tests.assert_near(found, tests.reference(start, recorder.steps))
        else:
            expected = emajit.init(start)
            for step, params in enumerate(recorder.steps):
                emajit.update_(expected, params, step, decay=tests.DECAY, **given)
            tests.assert_same(found, expected)
        tests.assert_same(recorder.evaluated[-1], {n: v.bfloat16() for n, v in found.items()})
        again = EMACallback(tests.DECAY, **given)
        trained(folder, again, bf16=True, resume=folder / "checkpoint-2")
        tests.assert_same(averages(again), found)


@check(2)
def several_averages_each_evaluated_and_snapshots(shared: Path) -> None:
    folder, recorder = shared / "several", Recorder()
    given = {**tests.settings("steps"), "max_steps": 4}
    trainer = tests.trainer_of(folder, recorder, deepspeed=settings(), **given)
    ema = EMACallback(
        {"short": tests.DECAY, "long": 0.9},
        evaluate="all",
        trainer=trainer,
        posthoc=posthoc.PostHoc(shared / "snapshots", 2),
    )
    trainer.add_callback(ema)
    trainer.train()
    dist.barrier()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert all(log["eval_loss"] != log["eval_long_loss"] for log in logs)
    short, long = (saved(folder, 4, f"averages-{name}") for name in ("short", "long"))
    once = len(recorder.evaluated) // 4
    tests.assert_same(recorder.evaluated[-1], short)
    tests.assert_same(recorder.evaluated[2 * once], long)
    start = tests.trained(tests.tiny())
    tests.assert_near(long, tests.reference(start, recorder.steps, lambda _: 0.9))
    chosen = posthoc.reconstruct(posthoc.snapshots(shared / "snapshots"), 0.07)
    assert {n: v.shape for n, v in chosen.items()} == {n: v.shape for n, v in start.items()}


@check(2)
def no_averages_are_saved_as_trained_weights_between_two_evaluations(shared: Path) -> None:
    """The Trainer calls no hook between the last of several evaluations and saving."""
    folder, ema, recorder = shared / "two", EMACallback(tests.DECAY), Recorder()
    sets = {"a": tests.tokens(8, seed=2), "b": tests.tokens(8, seed=3)}
    trained(folder, ema, recorder, eval_dataset=sets)
    for step in (2, 4):
        expected = recorder.steps[step - 1]
        file = folder / f"checkpoint-{step}" / "model.safetensors"
        tests.assert_same(weights_in(file, expected), expected)


@check(2)
def the_best_averages_at_the_end_and_saved_inside_of_averaged(shared: Path) -> None:
    folder, ema = shared / "best", EMACallback(tests.DECAY)
    trainer = trained(
        folder, ema, load_best_model_at_end=True, eval_steps=1, save_steps=1, learning_rate=0.1
    )
    best = Path(trainer.state.best_model_checkpoint)
    found, raw = averages(ema), values(trainer.model)
    tests.assert_same(dict(checkpoint.read(best / "averages.safetensors").weights), found)
    tests.assert_same(weights_in(best / "model.safetensors", raw), raw)
    with ema.averaged(trainer.model):
        trainer.save_model(str(folder / "mine"))
    dist.barrier()
    tests.assert_same(weights_in(folder / "mine/model.safetensors", found), found)
    tests.assert_same(values(trainer.model), raw)


@check(2)
def an_evaluation_that_raises_in_the_midst_of_the_model(shared: Path) -> None:
    def fail(module: nn.Module, *_: Any) -> None:
        if not module.training and len(recorder.steps) == 4:
            raise ArithmeticError

    ema, recorder = EMACallback(tests.DECAY), Recorder()
    given = {**tests.settings("steps"), "max_steps": 4}
    trainer = tests.trainer_of(
        shared / "raising", ema, recorder, deepspeed=settings(keeps=20), **given
    )
    hook = trainer.model.transformer.h[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        trainer.train()
    hook.remove()
    ema.restore()
    for name, p in trainer.model.named_parameters():  # those that are gathered now
        assert not p.numel() or torch.equal(p, recorder.steps[-1][name]), name
    tests.assert_same(values(trainer.model), recorder.steps[-1])


@check(1)
def buffers_are_averaged_too(shared: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(32, 6), nn.BatchNorm1d(6)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.norm(self.embedding(input_ids).mean(1)) - 1).square().mean()}

    class Buffers(tests.Recorder):  # type: ignore[misc, unused-ignore]
        def on_prediction_step(self, *_: Any, **kwargs: Any) -> None:
            self.inside = {n: b.clone() for n, b in kwargs["model"].named_buffers()}

        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            self.after = {n: b.clone() for n, b in kwargs["model"].named_buffers()}

    torch.manual_seed(0)
    seen, ema = Buffers(), EMACallback(tests.DECAY, buffers="average")
    options: dict[str, Any] = {"model": Model(), "prediction_loss_only": True}
    trainer = trained(shared / "buffers", seen, ema, **options)
    found = saved(shared / "buffers", 4)
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(seen.inside[name], found[name])
        assert torch.equal(buffer, seen.after[name])
    assert not torch.equal(found["norm.running_mean"], seen.after["norm.running_mean"])


@check(2)
def an_adapter(shared: Path) -> None:
    from tests import test_adapters as adapters  # noqa: PLC0415

    folder, ema, again = shared / "adapter", EMACallback(tests.DECAY), EMACallback(tests.DECAY)
    trained(folder, ema, model=adapters.adapted())
    found = averages(ema)
    assert len(found) == 2
    trained(folder, again, model=adapters.adapted(), resume=folder / "checkpoint-2")
    tests.assert_same(averages(again), found)
    forget_zero_3()
    tests.assert_same(adapters.loaded(folder / "checkpoint-4/averaged/default"), found)


@check(2)
def other_options_of_deepspeed(shared: Path) -> None:
    """An optimizer and parameters in host memory, and second parts (hpZ); stages 1 and 2."""
    choices: list[dict[str, Any]] = [
        settings(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
        settings(zero_hpz_partition_size=2),
        settings(1),
        settings(2),
    ]
    for i, config in enumerate(choices):
        folder, ema = shared / f"options-{i}", EMACallback(tests.DECAY)
        without, recorder = Recorder(), Recorder()
        trained(folder / "without", without, config=config)
        trained(folder, ema, recorder, config=config)
        assert_same_steps(recorder, without)
        found = averages(ema)
        tests.assert_near(found, tests.reference(tests.trained(tests.tiny()), recorder.steps))
        tests.assert_same(recorder.evaluated[-1], found)
        again = EMACallback(tests.DECAY)
        trained(folder, again, config=config, resume=folder / "checkpoint-2")
        assert_close(averages(again), found, rtol=0, atol=0)


@check(1)
def no_pull_which_the_next_step_would_undo(shared: Path) -> None:
    for stage in (1, 3):
        with pytest.raises(ValueError, match="pull: expected None with DeepSpeed"):
            trained(shared / "pull", EMACallback(pull=(1.0, 1)), config=settings(stage))


def main() -> None:
    import deepspeed  # noqa: PLC0415

    # It would compile its own exchange in shared memory, for a minute or two.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results, shared = map(Path, sys.argv[1:3])
    world = int(os.environ["WORLD_SIZE"])
    ranks.CHECKS.update(CHECKS)
    chosen = sys.argv[3:] or [name for name, worlds in ALL if worlds == world]
    told = ranks.run(world, chosen, shared)
    if int(os.environ["RANK"]) == 0:
        results.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
