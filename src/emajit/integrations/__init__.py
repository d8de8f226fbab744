"""Averages in the training loops of Lightning, transformers and accelerate.

The callbacks average after each optimizer step, evaluate with the averages, train with the trained
weights, and save both. Training is what it would be without them, and resuming is exact.
`pip install ".[lightning]"` and `pip install ".[transformers]"` bring the libraries.

## Lightning

```python
from lightning.pytorch import Trainer
from emajit import schedules
from emajit.integrations.lightning import EMACallback

ema = EMACallback(schedules.warmup(0.999), save="averaged")
trainer = Trainer(callbacks=[ema])
trainer.fit(module)
```

Validation, test and prediction use the averages. A checkpoint holds both kinds of weights; `save`
chooses the ones that `load_from_checkpoint` gets, "raw" or "averaged". Checkpoints of Lightning's
own `WeightAveraging` are resumed too. A file of `save_weights_only=True` has the trained weights:
Lightning calls no callback for it. `emajit.integrations.lightning` has the options.

## transformers

```python
import torch
from transformers import Trainer
from emajit import schedules
from emajit.integrations.transformers import EMACallback

ema = EMACallback(schedules.warmup(0.999), dtype=torch.float32)
trainer = Trainer(model, args, train_dataset=data, callbacks=[ema])
trainer.train()
with ema.averaged(model):
    trainer.evaluate()
```

The evaluations in training use the averages; your own calls of `evaluate` do so only inside of
`averaged`. Beside the weights of each checkpoint there is a folder `averaged/` for
`from_pretrained`. To resume from a folder outside of `output_dir`, set
`TrainingArguments(resume_from_checkpoint=...)` too, since the Trainer does not tell callbacks its
folder. `emajit.integrations.transformers` has the options.

## accelerate

There is no callback, since the loop is yours:

```python
from accelerate import Accelerator
from emajit import LitEma

accelerator = Accelerator(gradient_accumulation_steps=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
ema = LitEma(model, decay=0.999)  # before or after prepare
accelerator.register_for_checkpointing(ema)
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).mean())
        optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            ema(accelerator.unwrap_model(model))
        optimizer.zero_grad()
```

`save_state` and `load_state` then include the averages. Call no `save_state` inside of
`ema.ema_scope(model)`, or it saves the averages as the trained weights.

Register the `LitEma`, then call `load_state`. A checkpoint from before you had a `LitEma` needs the
other order, since accelerate refuses a folder with another number of registered objects: call
`load_state`, build the `LitEma`, which then starts at the loaded weights, and register it.
`emajit.migrating` tells how to go on from the averages of diffusers' scripts.

## Several averages

```python
from lightning.pytorch.callbacks import ModelCheckpoint

ema = EMACallback({"short": 0.99, "long": 0.9999}, evaluate="all")
best = ModelCheckpoint(monitor="val_loss_long")
Trainer(callbacks=[ema, best]).fit(module)
with ema.averaged(module, "long"):
    ...
```

One pass updates all. `evaluate` chooses the average of evaluations, the first by default; with
"all" each has its metrics, in Lightning `val_loss` of the first and `val_loss_long`, in
transformers `eval_loss` and `eval_long_loss`. There it needs the Trainer too:
`trainer.add_callback(EMACallback(..., evaluate="all", trainer=trainer))`. A checkpoint holds all,
and is resumed with the same names. `emajit extract --key emajit.shadows.long` takes one out of
Lightning's file; transformers' folder has `averages-long.safetensors` and `averaged-long/`.

## A length chosen after the training

```python
from emajit import posthoc

ema = EMACallback(schedules.warmup(0.999), posthoc=posthoc.PostHoc("lengths", every=100))
Trainer(callbacks=[ema]).fit(module)
weights = posthoc.reconstruct(posthoc.snapshots("lengths"), 0.07)
module.load_state_dict(weights, strict=False)
```

Two more averages are kept, and saved in each checkpoint. A resumed training goes on in the same
folder: the snapshots after its checkpoint are removed and written again. A training that begins
refuses a folder with snapshots, unless `overwrite=True`. `emajit.posthoc` has the rest.

## Options of both callbacks

The decay, `dtype`, `buffers`, `include`, `exclude`, `every`, `rounding`, `nonfinite` and `backend`
are those of `emajit.LitEma`. `every` counts optimizer steps. `pull=(share, steps)` moves the
parameters towards their average after each `steps`-th update, by `emajit.pull_`: a share of 1 is
Switch EMA (arXiv 2402.09240).

## Limits

- With FSDP accelerate's `save_state` saves only the first process's shards of the averages, which
  the others refuse to load. Save all with
  `emajit.checkpoint.save_sharded(folder, ema.named_averages(), step)`.
- The callback for Lightning refuses the strategy "fsdp"; "model_parallel" works. The callback for
  transformers takes FSDP with `fsdp_config={"version": 2}` and DeepSpeed's ZeRO 1, 2 and 3, and
  refuses FSDP 1 and tensor parallel.
- With DeepSpeed the callback refuses `pull`, and parameters that ZeRO 3 keeps on another device.
  DeepSpeed resumes with the number of processes that saved. Tested with 0.19.8 on a CPU, in float32
  and bfloat16.
- A Trainer takes one `EMACallback`, which may have several averages.
- `evaluate="all"` runs each evaluation once for each average; other callbacks see only one run.
- With an optimizer of `fused=True` accelerate does not tell that a gradient scaler has skipped a
  step; these steps are averaged too.
"""
