"""Averages of adapters of PEFT: in the callback for transformers, and as a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import emajit

pytest.importorskip("peft", reason="adapters of PEFT")
pytest.importorskip("transformers", reason="the model below the adapters")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")

import peft
from transformers import BertTokenizer

from emajit.integrations.transformers import EMACallback
from tests import test_transformers as trainers
from tests.test_transformers import DECAY, Recorder, assert_same, averages, settings, tiny, trained

_quiet = trainers._quiet
# of transformers: PEFT asks for the attribute
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SAVING = {"save_strategy": "steps", "save_steps": 2}
State = dict[str, Tensor]


def lora(**options: Any) -> Any:
    given: dict[str, Any] = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    return peft.LoraConfig(task_type="CAUSAL_LM", **given | options)


def adapted(seed: int = 0, others: tuple[str, ...] = (), **options: Any) -> Any:
    """A tiny model with a frozen base and an adapter "default", and `others` that do not train."""
    base = tiny()
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, lora(**options))
    for name in others:
        model.add_adapter(name, lora(**options))
    randomized(model)
    return model


def randomized(model: nn.Module) -> None:
    """B is zero at the start, and the adapter does nothing."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()


def adapter(model: nn.Module, name: str = "default") -> State:
    return {key: value for key, value in trained(model).items() if f".{name}." in key}


def loaded(folder: Path, name: str = "default") -> State:
    """An adapter as PEFT's own loader has it on the same base."""
    return adapter(peft.PeftModel.from_pretrained(tiny(), folder, adapter_name=name), name)


@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["ln_f"]}], ids=["lora", "with a layer saved whole"]
)
def test_saved_as_an_adapter_and_resumed(tmp_path: Path, options: dict[str, Any]) -> None:
    without, ema, recorder = Recorder(), EMACallback(DECAY), Recorder()
    chosen = {**settings("steps"), "max_steps": 6}
    alone = trainers.trainer_of(tmp_path / "a", without, model=adapted(**options), **chosen)
    alone.train()
    whole = trainers.trainer_of(tmp_path / "b", ema, recorder, model=adapted(**options), **chosen)
    start = adapter(whole.model)
    whole.train()
    for a, b in zip(without.steps, recorder.steps, strict=True):
        assert_same(a, b)
    for step in (2, 4, 6):
        steps = [{name: each[name] for name in start} for each in recorder.steps[:step]]
        saved = loaded(tmp_path / "b" / f"checkpoint-{step}" / "averaged" / "default")
        trainers.assert_near(saved, trainers.reference(start, steps))
    folder = tmp_path / "b" / "checkpoint-4"
    again = EMACallback(DECAY)
    resumed = trainers.trainer_of(tmp_path / "b", again, model=adapted(1, **options), **chosen)
    resumed.train(resume_from_checkpoint=str(folder))
    assert [*resumed.model.peft_config] == ["default"]
    assert_same(trained(resumed.model), trained(whole.model))
    assert_same(averages(again), averages(ema))
    assert_same(loaded(tmp_path / "b" / "checkpoint-6" / "averaged" / "default"), averages(ema))


def test_of_several_adapters_the_trained_one_is_averaged(tmp_path: Path) -> None:
    ema, others = EMACallback(DECAY), ("other", "averaged")
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\n[PAD]\n[CLS]\n[MASK]\na")
    words = BertTokenizer(str(tmp_path / "vocab.txt"))
    options = {**SAVING, "processing_class": words}
    whole = trainers.trainer_of(tmp_path, ema, model=adapted(others=others), **options)
    whole.train()
    folder = tmp_path / "checkpoint-6"
    assert_same(loaded(folder / "averaged" / "default"), averages(ema))
    for name in others:
        assert_same(loaded(folder / "averaged" / name, name), adapter(whole.model, name))
        assert_same(loaded(folder / name, name), adapter(whole.model, name))
        BertTokenizer.from_pretrained(folder / "averaged" / name)
    again = EMACallback(DECAY)
    resumed = trainers.trainer_of(tmp_path, again, model=adapted(1, others=others), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [*resumed.model.peft_config] == ["default", *others]
    assert_same(trained(resumed.model), trained(whole.model))
    assert_same(averages(again), averages(ema))


def test_the_best_adapter_at_the_end(tmp_path: Path) -> None:
    ema = EMACallback(DECAY)
    options = {**settings("steps"), "load_best_model_at_end": True, "learning_rate": 0.5}
    trainer = trainers.trainer_of(tmp_path, ema, model=adapted(), **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    assert_same(adapter(trainer.model), loaded(best))
    assert_same(loaded(best / "averaged" / "default"), averages(ema))
    with ema.averaged(trainer.model):
        assert_same(adapter(trainer.model), averages(ema))


def test_a_model_that_has_an_adapter_of_its_own(tmp_path: Path) -> None:
    """As transformers adds one: `from_pretrained` finds it in `averaged/`."""
    model = tiny()
    model.add_adapter(lora())
    randomized(model)
    ema = EMACallback(DECAY)
    trainers.trainer_of(tmp_path, ema, model=model, **SAVING).train()
    found = tiny()
    found.load_adapter(str(tmp_path / "checkpoint-6" / "averaged"))
    assert_same(adapter(found), averages(ema))


def inputs(seed: int) -> Tensor:
    return torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(seed))


def places(model: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def distilled(student: Any, teacher: Any, steps: int, after: Any) -> list[Tensor]:
    """Train towards the teacher's logits; the losses."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        x = inputs(step)
        with torch.no_grad():
            target = teacher(input_ids=x).logits
        out = student(input_ids=x, labels=x)
        loss = out.loss + (out.logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.detach())
    return losses


def test_an_averaged_adapter_as_a_teacher_beside_the_trained_one() -> None:
    """The base weights are in memory once."""
    student = adapted().eval()
    shadow = emajit.init({n: p for n, p in student.named_parameters() if p.requires_grad})
    teacher = emajit.averaged_module(student, shadow)
    ours, theirs = places(student), places(teacher)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] == theirs[name]) == (name not in shadow), name
    assert {theirs[name] for name in shadow} == {value.data_ptr() for value in shadow.values()}
    assert len(shadow) == 2
    assert not any(p.requires_grad for p in teacher.parameters())

    base = {name: p.detach().clone() for name, p in student.named_parameters() if name in ours}
    updates: list[int] = []

    def average() -> None:
        params = {name: p for name, p in student.named_parameters() if name in shadow}
        emajit.update_(shadow, params, len(updates), decay=0.9)
        updates.append(1)

    losses = distilled(student, teacher, 4, average)
    # A slow reference: a whole second model, into which the averages are copied.
    other = adapted().eval()
    copied = adapted().eval()
    mean = {n: p.detach().clone() for n, p in other.named_parameters() if p.requires_grad}

    def copy_average() -> None:
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name in mean:
                    mean[name].lerp_(p, 1 - 0.9)
            for name, p in copied.named_parameters():
                if name in mean:
                    p.copy_(mean[name])

    expected = distilled(other, copied, 4, copy_average)
    torch.testing.assert_close(losses, expected)
    for name, p in teacher.named_parameters():
        assert (p.data_ptr() == ours[name]) == (name not in shadow)
        if name not in shadow:
            assert torch.equal(p, base[name])
        else:
            assert not torch.equal(p, base[name])


def test_the_teacher_with_its_adapter_disabled_is_the_base() -> None:
    student = adapted().eval()
    shadow = emajit.init({n: p for n, p in student.named_parameters() if p.requires_grad})
    for value in shadow.values():
        value.mul_(2)
    teacher: Any = emajit.averaged_module(student, shadow)
    x, bare = inputs(0), adapted().unload().eval()
    with torch.no_grad():
        base, plain, averaged = (m(input_ids=x).logits for m in (bare, student, teacher))
        with teacher.disable_adapter():
            assert torch.equal(teacher(input_ids=x).logits, base)
            assert torch.equal(student(input_ids=x).logits, plain)
        with student.disable_adapter():
            assert torch.equal(student(input_ids=x).logits, base)
            assert torch.equal(teacher(input_ids=x).logits, averaged)
    assert not torch.equal(plain, averaged)
    assert [n for n, p in student.named_parameters() if p.requires_grad] == [*shadow]
    emajit.update_(shadow, {n: p for n, p in student.named_parameters() if n in shadow}, 0, decay=0)
    with torch.no_grad():  # PEFT makes an adapter require grad when it is enabled again
        assert torch.equal(teacher(input_ids=x).logits, plain)
    student(input_ids=x, labels=x).loss.backward()
    assert all((p.grad is not None) == (n in shadow) for n, p in student.named_parameters())
