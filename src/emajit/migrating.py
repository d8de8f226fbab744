"""Move a training script from another EMA library to emajit, and go on from its checkpoints.

Each section is about one library: its code before, the same in emajit, how to go on from an old
checkpoint, and what differs. `model`, `loader`, `train_step(model, batch)` (one step of the
optimizer) and the input `x` are yours. The averages stay the same up to rounding: in the tests, to
4 ulps of a tensor's largest number.

Three things hold in every section:

- `LitEma(model, decay)` warms up with `schedules.warmup(decay)`. Without warm-up, give
  `use_num_updates=False`. A schedule in place of `decay` maps the number of updates so far (0 at
  the first one) to the decay. The table of a section gives the schedule, from `emajit.schedules`,
  for the options of the library.
- `LitEma` averages the parameters that require grad. In a scope, and in `averaged_module`, the
  model keeps its own frozen ones.
- The checkpoint block loads the averages. Before it, load model and optimizer as you do now.

Checked with torch 2.13, timm 1.0.31, diffusers 0.42.1, accelerate 1.15.0, ema-pytorch 0.8.3 and
torch_ema 0.3.

## AveragedModel of torch

**Before**

```python
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
for batch in loader:
    train_step(model, batch)
    ema.update_parameters(model)
prediction = ema.eval()(x)
```

**After**

```python
from emajit import LitEma, averaged_module, schedules

decay = schedules.delay(schedules.constant(0.999), 1)
ema = LitEma(model, decay, buffers="copy")
for batch in loader:
    train_step(model, batch)
    ema(model)
prediction = averaged_module(model, ema.named_averages()).eval()(x)
```

**The checkpoint**

```python
# saved by torch.save(ema.state_dict(), "ema.pt")
from emajit import LitEma, checkpoint, schedules

found = checkpoint.read("ema.pt")
decay = schedules.delay(schedules.constant(0.999), 1)
ema = LitEma(model, decay, buffers="copy", init_num_updates=found.step)
for name, average in ema.named_averages().items():
    average.copy_(found.weights[name])
```

| torch | decay |
| --- | --- |
| `AveragedModel(model)` | `uniform()` |
| `AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))` | `delay(constant(0.999), 1)` |
| `AveragedModel(model, avg_fn=lambda s, p, n: s + (p - s) / (n + 1) ** 0.5)` | `lambda t: 1 - 1 / (t + 1) ** 0.5` |

- **Numbers**: the same bits. The first update copies the model.
- **Buffers**: torch copies them at each update. For `use_buffers=True` give `buffers="average"`;
  then torch averages also integers, such as BatchNorm's `num_batches_tracked`, and cuts off the
  fraction, where emajit copies them.
- **Count**: `n_averaged` is the number of updates.
- **In the old class**: `AveragedModel(model, multi_avg_fn=emajit.schedules.multi_avg_fn(decay))`
  takes every schedule, as does Lightning's `WeightAveraging`.
- **The checkpoint** has the averages, the buffers and the count, but neither decay nor function.
- **`averaged_module`** shares the averages: make it once, and it follows every update.
  `torch.optim.swa_utils.update_bn(loader, averaged)` works on it as on an `AveragedModel`.

## ModelEmaV3 of timm

**Before**

```python
from timm.utils import ModelEmaV3

ema = ModelEmaV3(model, decay=0.999)
for batch in loader:
    train_step(model, batch)
    ema.update(model)
prediction = ema.module(x)
```

**After**

```python
from emajit import LitEma, averaged_module

ema = LitEma(model, decay=0.999, use_num_updates=False, buffers="average")
for batch in loader:
    train_step(model, batch)
    ema(model)
prediction = averaged_module(model, ema.named_averages()).eval()(x)
```

**The checkpoint**

```python
# saved by torch.save({"state_dict": model.state_dict(),
#                      "state_dict_ema": ema.module.state_dict()}, "ema.pt")
from emajit import LitEma, checkpoint

found = checkpoint.read("ema.pt")
ema = LitEma(model, decay=0.999, use_num_updates=False, buffers="average")
for name, average in ema.named_averages().items():
    average.copy_(found.weights[name])
```

These are two of the keys that timm's `CheckpointSaver` writes; `found.raw` has the trained weights.

`ema.update(model)` has a constant decay, whatever the other options are. They count in
`ema.update(model, step)`, with steps from 1:

| timm, with a step | decay |
| --- | --- |
| `ModelEmaV3(model, decay=0.999)` | `delay(constant(0.999), 1)` |
| `ModelEmaV3(model, decay=0.999, update_after_step=100)` | `delay(constant(0.999), 101)` |
| `ModelEmaV3(model, decay=0.9, use_warmup=True)` | `inverse_gamma(max_decay=0.9)` |
| `ModelEmaV3(model, use_warmup=True, warmup_gamma=2, warmup_power=3 / 4)` | `inverse_gamma(2, 3 / 4)` |
| `ModelEmaV3(model, use_warmup=True, update_after_step=100)` | `delay(inverse_gamma(), 100)` |
| `ModelEmaV3(model, use_warmup=True, min_decay=0.5)` | `lambda t: inverse_gamma(min_decay=0.5)(t) if t else 0.0` |

- **Numbers**: the same bits in float32. In bfloat16 both can round stochastically, timm by default
  and emajit with `rounding="stochastic"`, with other noise. `dtype=` is the same option.
- **`min_decay`** of timm has no effect on its first update, which copies the model. That of
  `inverse_gamma` has: hence the `if t else 0.0`.
- **Buffers**: averaged, integers copied. For `exclude_buffers=True` give `buffers="copy"`.
- **Count and decay**: the checkpoint has neither. With a schedule give the number of updates
  yourself, as `init_num_updates=`.

## EMAModel of diffusers

**Before**

```python
from diffusers.training_utils import EMAModel

ema = EMAModel(model.parameters(), decay=0.999)
for batch in loader:
    train_step(model, batch)
    ema.step(model.parameters())
```

**Before, at evaluation**

```python
ema.store(model.parameters())
ema.copy_to(model.parameters())
prediction = model(x)
ema.restore(model.parameters())
```

**After**

```python
from emajit import LitEma, schedules

ema = LitEma(model, schedules.delay(schedules.warmup(0.999), 1))
for batch in loader:
    train_step(model, batch)
    ema(model)
with ema.ema_scope(model):
    prediction = model(x)
```

**The checkpoint**

```python
# saved by torch.save(ema.state_dict(), "ema.pt")
from emajit import LitEma, checkpoint, schedules

found = checkpoint.read("ema.pt", names=model)
decay = schedules.delay(schedules.warmup(found.decay), 1)
ema = LitEma(model, decay, init_num_updates=found.step)
for name, average in ema.named_averages().items():
    average.copy_(found.weights[name])
```

| diffusers | decay |
| --- | --- |
| `EMAModel(params, decay=0.9)` | `delay(warmup(0.9), 1)` |
| `EMAModel(params, update_after_step=100)` | `delay(warmup(0.9999), 101)` |
| `EMAModel(params, decay=0.999, min_decay=0.999)` | `delay(constant(0.999), 1)` |
| `EMAModel(params, use_ema_warmup=True)` | `inverse_gamma()` |
| `EMAModel(params, use_ema_warmup=True, inv_gamma=2, power=3 / 4, decay=0.9)` | `inverse_gamma(2, 3 / 4, max_decay=0.9)` |
| `EMAModel(params, use_ema_warmup=True, update_after_step=100)` | `delay(inverse_gamma(), 100)` |
| `EMAModel(params, use_ema_warmup=True, min_decay=0.5)` | `lambda t: inverse_gamma(min_decay=0.5)(t) if t else 0.0` |

- **Numbers**: the same up to rounding. `use_ema_warmup=False` still warms up, by another formula.
- **`min_decay`** of diffusers has no effect on its first update, which copies the model. That of
  `inverse_gamma` has: hence the `if t else 0.0`.
- **`cur_decay_value`**, the decay of the last update, is `float(decay(int(ema.num_updates) - 1))`.
  Do not log `ema.decay`: with a schedule, only saving writes it.
- **Buffers**: not averaged; the model keeps its own.
- **Count**: `optimization_step` is the number of updates.
- **The checkpoint** has averages by position, which `names=model` names, the count, the decay
  and, in `found.options`, those of the warm-up.

### The scripts of diffusers, with accelerate

They save and load the average as a folder `unet_ema/`, in hooks of `save_state` and `load_state`.
accelerate saves and loads a registered `LitEma` itself, so remove the average from the hooks:

```diff
-ema = EMAModel(model.parameters(), 0.999, use_ema_warmup=True, power=3 / 4,
-               model_cls=UNet2DModel, model_config=model.config)
+decay = schedules.inverse_gamma(power=3 / 4, max_decay=0.999)
+ema = LitEma(model, decay)
+accelerator.register_for_checkpointing(ema)
 def save_model_hook(models, weights, output_dir):
-    ema.save_pretrained(os.path.join(output_dir, "unet_ema"))
     models[0].save_pretrained(os.path.join(output_dir, "unet"))
     weights.pop()
 def load_model_hook(models, input_dir):
-    averages = EMAModel.from_pretrained(os.path.join(input_dir, "unet_ema"), UNet2DModel)
-    ema.load_state_dict(averages.state_dict())
     loaded = UNet2DModel.from_pretrained(os.path.join(input_dir, "unet"))
     models.pop().load_state_dict(loaded.state_dict())
```

In the loop, call `ema(accelerator.unwrap_model(model))` after each optimizer step, see
`emajit.integrations`.

**The folder**

To go on from a checkpoint of the old script, call `accelerator.load_state("checkpoint-15")` while
no `LitEma` is registered: accelerate refuses a folder with another number of registered objects.
Then, in place of the `LitEma` above:

```python
from emajit import LitEma, checkpoint, schedules

found = checkpoint.read("checkpoint-15/unet_ema")
decay = schedules.inverse_gamma(power=3 / 4, max_decay=found.decay)  # use_ema_warmup=True
ema = LitEma(model, decay, init_num_updates=found.step)
for name, average in ema.named_averages().items():
    average.copy_(found.weights[name])
accelerator.register_for_checkpointing(ema)
```

The folder has the names, so that `read` needs none; also the count, the decay and, in
`found.options`, those of the warm-up: without `use_ema_warmup` the first rows of the table
apply. From the next checkpoint on, register the `LitEma` before `load_state`.

**A folder for `from_pretrained`**

```python
with ema.ema_scope(model):
    model.save_pretrained("unet_ema")
```

If you do this in `save_model_hook` too, each checkpoint holds the average twice. `checkpoint.read`
then asks for a key: `key="custom_checkpoint_0"` is the `LitEma`, with its count.

**Back to EMAModel**

A folder of `save_pretrained` has no count, and the first step of an `EMAModel` from it overwrites
the average. This command writes one with the count, for `EMAModel.from_pretrained`:

```sh
emajit extract checkpoint-20 --layout diffusers-ema --like checkpoint-20/unet --decay 0.999 -o back
```

The decay is the highest; the checkpoint of a schedule has only the last. Then set the options of
the warm-up in `back/config.json`, such as `use_ema_warmup` and `power`.

`docs/diffusers_ema.py` is a whole script, without hooks.

## EMA of ema-pytorch

**Before**

```python
from ema_pytorch import EMA

ema = EMA(model, beta=0.9999, update_after_step=100, update_every=10)
for batch in loader:
    train_step(model, batch)
    ema.update()
prediction = ema.eval()(x)
```

**After**

```python
import emajit

decay = emajit.schedules.delay(emajit.schedules.inverse_gamma(max_decay=0.9999), 100)
shadow, start = emajit.init(model.state_dict()), 0
for step, batch in enumerate(loader, start):
    train_step(model, batch)
    if step % 10 == 0:
        emajit.update_(shadow, model.state_dict(), step, decay=decay)
prediction = emajit.averaged_module(model, shadow).eval()(x)
```

**The checkpoint**

```python
# saved by torch.save(ema.state_dict(), "ema.pt")
import emajit
from emajit import checkpoint

found = checkpoint.read("ema.pt")
decay = emajit.schedules.delay(emajit.schedules.inverse_gamma(max_decay=0.9999), 100)
shadow, start = emajit.init(model.state_dict()), found.step
for name, average in shadow.items():
    average.copy_(found.weights[name])
```

The left column of the table has `update_every=1`; with another, `t` counts all calls of `update`.

| ema-pytorch | decay |
| --- | --- |
| `EMA(model, update_every=1)` | `delay(inverse_gamma(), 100)` |
| `EMA(model, update_every=1, update_after_step=0, beta=0.9)` | `inverse_gamma(max_decay=0.9)` |
| `EMA(model, update_every=1, inv_gamma=2, power=3 / 4)` | `delay(inverse_gamma(2, 3 / 4), 100)` |
| `EMA(model, update_every=1, update_after_step=-1, beta=0.9, min_value=0.9)` | `delay(constant(0.9), 1)` |
| `KarrasEMA(model, update_every=1, sigma_rel=0.1)` | `lambda t: power_function(0.1)(t + 1) if t else 0.0` |

- **Numbers**: ema-pytorch computes the decay in float32: with a `beta` of 0.9999, 1 - decay is
  too large by 1.7e-4 of itself after the warm-up. emajit uses float64. The rest is rounding.
- **Which calls**: it updates at calls 0, 10, 20 and so on, and copies the model up to call 100.
  `LitEma(every=10)` updates at calls 9, 19, 29, and its decay counts updates, not calls.
- **Buffers**: floating-point ones are averaged. Integers keep their values from the construction;
  emajit copies them.
- **Count**: `step` counts all calls, and so does `found.step`.
- **The checkpoint** has the averages and the count; also the trained weights, in `found.raw`, unless
  `include_online_model=False`; none of the options.
- **`PostHocEMA`**: see `emajit.posthoc`; `emajit.checkpoint.layouts.ema_pytorch` tells how to read
  its files, which do not hold their lengths.

## ExponentialMovingAverage of torch_ema

**Before**

```python
from torch_ema import ExponentialMovingAverage

ema = ExponentialMovingAverage(model.parameters(), decay=0.995)
for batch in loader:
    train_step(model, batch)
    ema.update()
with ema.average_parameters():
    prediction = model(x)
```

**After**

```python
from emajit import LitEma

ema = LitEma(model, decay=0.995)
for batch in loader:
    train_step(model, batch)
    ema(model)
with ema.ema_scope(model):
    prediction = model(x)
```

**The checkpoint**

```python
# saved by torch.save(ema.state_dict(), "ema.pt")
from emajit import LitEma, checkpoint

found = checkpoint.read("ema.pt", names=model)
ema = LitEma(model, found.decay, init_num_updates=found.step)
for name, average in ema.named_averages().items():
    average.copy_(found.weights[name])
```

| torch_ema | decay |
| --- | --- |
| `ExponentialMovingAverage(params, decay=0.9)` | `warmup(0.9)` |
| `ExponentialMovingAverage(params, decay=0.9, use_num_updates=False)` | `constant(0.9)` |

- **Numbers**: the same up to rounding; `use_num_updates=False` is the same option.
- **Buffers**: not averaged; the model keeps its own.
- **Count**: `num_updates` is the number of updates, `None` with `use_num_updates=False`; then leave
  `init_num_updates` out.
- **The checkpoint** has averages by position, which `names=model` names, the count and the decay.

## LitEma of latent-diffusion

**Before**

```python
from ldm.modules.ema import LitEma

ema = LitEma(model, decay=0.9999)
for batch in loader:
    train_step(model, batch)
    ema(model)
```

**Before, at evaluation**

```python
ema.store(model.parameters())
ema.copy_to(model)
prediction = model(x)
ema.restore(model.parameters())
```

**After**

```python
from emajit import LitEma

ema = LitEma(model, decay=0.9999)
for batch in loader:
    train_step(model, batch)
    ema(model)
with ema.ema_scope(model):
    prediction = model(x)
```

`store`, `copy_to` and `restore` work as before; `ema_scope` needs no copy.

**The checkpoint**

```python
# saved by torch.save(ema.state_dict(), "ema.pt")
from emajit import LitEma, checkpoint

found = checkpoint.read("ema.pt", names=model)
ema = LitEma(model, found.decay, init_num_updates=found.step)
for name, average in ema.named_averages().items():
    average.copy_(found.weights[name])
```

Shorter, since the state is the same: `ema.load_state_dict(torch.load("ema.pt"))`. A checkpoint of
the whole model loads as before, too.

| latent-diffusion | decay |
| --- | --- |
| `LitEma(model, 0.9)` | `warmup(0.9)` |
| `LitEma(model, 0.9, use_num_upates=False)` | `constant(0.9)` |

- **Numbers**: the original computes 1 - decay in float32: with a decay of 0.9999 it is too large by
  1.7e-4 of itself after the warm-up. emajit uses float64. The rest is rounding.
- **Buffers**: not averaged, unless you give `buffers="copy"` or `"average"`.
- **Count**: `num_updates` is the number of updates, -1 with `use_num_upates=False`; then
  `found.step` is `None`, and you leave `init_num_updates` out.
- **The checkpoint** has the averages under their names without dots, the count and the decay.

## What goes wrong in the copied LitEma

Most of it silently.

| the `LitEma` that everybody copies | emajit's |
| --- | --- |
| `a.bc` and `ab.c` share one average; a parameter called `decay` replaces the decay | a key of its own for each |
| in another dtype or on another device than the model, it updates a copy: the averages never move | averages in float32 or wider, rounds once |
| `.half()` turns a decay of 0.9999 into 1 | the decay stays float32 |
| 1 - 0.9999 has a relative error of 1.7e-4 | computed in float64 |
| waits for the device twice a step | waits for nothing |
| under `torch.autocast` the scope computes with weights cast before | with the averages inside, with the training weights after |
| empty placeholders of ZeRO 3 and of accelerate's offloading are averaged | an error that says so |
| a forgotten `restore`, a `restore` without `store`, a nested scope or other parameters silently lose the training weights | an error that says so; the scope restores the weights after any exception |
| the stored copy stays in memory, and its autograd history with it | released, detached; `ema_scope` needs no copy |
| freezing or unfreezing a parameter later crashes without its name | still averages a frozen one; `track(model)` adds new ones, also of added adapters, layers and rows |
| `reset_num_updates` turns on a warm-up that was off | leaves it off |
| a lazy module, which has no parameters before its first call, is accepted, and fails at the first step | an error at once |
| a checkpoint without averages leaves random ones | a warning, and at the next use they start from the loaded weights |
"""
