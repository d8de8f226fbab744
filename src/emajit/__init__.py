r"""Exponential moving averages (EMA) of PyTorch weights.

An average follows the weights of a model in training; the model is then evaluated with it.

>>> import torch
>>> from torch import nn
>>> from emajit import LitEma
>>> model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 1))
>>> optimizer = torch.optim.AdamW(model.parameters())
>>> ema = LitEma(model, decay=0.999)
>>> x = torch.randn(64, 8)
>>> for _ in range(10):
...     optimizer.zero_grad()
...     model(x).square().mean().backward()
...     optimizer.step()
...     ema(model)
>>> with torch.no_grad(), ema.ema_scope(model):
...     prediction = model(x)

Each update computes $s \leftarrow s + \alpha (p - s)$, where $s$ is the average, $p$ the parameter,
and $\alpha = 1 - \beta$ for the decay $\beta$. The average reaches back about $1 / \alpha$ steps.

## Which do I use?

| for | use |
| --- | --- |
| a model in your own training loop | `LitEma` |
| any tree of tensors, as a function | `init`, `update`, `update_` |
| several averages of one model | `update_many`, `update_many_` |
| some of the parameters only | `select`; `include` and `exclude` of `LitEma` |
| a decay that changes in training | `emajit.schedules` |
| evaluation with averages | `ema_scope`, `LitEma.ema_scope` |
| averages that go back into training, or ahead of it | `pull_`, `bema` |
| a teacher, an export, another thread | `averaged_module`, `emajit.guides.teachers` |
| Lightning, transformers, accelerate | `emajit.integrations` |
| saving, resuming, checkpoints of other libraries | `emajit.checkpoint` |
| the averaging length, chosen after training | `emajit.posthoc` |
| a mean of checkpoints that were saved anyway | `emajit.merging` |
| weights in bfloat16 or float16 | `emajit.guides.low_precision` |
| your own `torch.compile`, CUDA graphs | `emajit.guides.compiled_steps` |
| FSDP, tensor parallel, DDP | `emajit.guides.sharding` |
| a GPU whose memory is full (experimental) | `emajit.offload` |
| optimizer and average in one graph (experimental) | `emajit.fused` |
| a training script that uses another library | `emajit.migrating` |

Coming from a `LitEma` of your own? Replace its import by `from emajit import LitEma`. The
constructor, the buffers, the `state_dict`, `store`, `copy_to` and `restore` are the same, and old
checkpoints load. `emajit.migrating` tells what else changes.

## As a function

The parameters are any pytree of tensors: a dict, a `state_dict()` with its buffers, the stacked
weights of an ensemble. The averages, called the shadow, are a tree of the same structure.

>>> import emajit
>>> from emajit import schedules
>>> params = dict(model.named_parameters())
>>> shadow = emajit.init(params, dtype=torch.float32)
>>> for step in range(10):  # train, then
...     _ = emajit.update_(shadow, params, step, decay=schedules.warmup(0.999))
>>> with torch.no_grad(), emajit.ema_scope(model, shadow):
...     prediction = model(x)
>>> prediction = torch.func.functional_call(model, shadow, (x,))  # the same

- `update_` writes the shadow; `update` returns a new one, and with `differentiable=True` gradients
  and tangents go through it.
- The step counts the updates that the shadow has taken, from 0. Save it beside the shadow.
- The decay is a number, a 0-d tensor or a schedule.
- The averages have the dtype of the shadow, here float32, also if the model is in bfloat16.
- A tree of `model.state_dict()` averages the buffers too, such as the statistics of BatchNorm. A
  `LitEma` does it with `buffers="average"`, or keeps their last values with `buffers="copy"`. Then
  call `model.eval()` before a scope: code that writes buffers inside writes the averages.
- `select` chooses parameters by name; then enter `ema_scope` with `strict=False`.
- `nonfinite="skip"` keeps NaN and infinity out of the averages.

`update_many_` updates several averages in one pass over the parameters, each with its own decay:

>>> decays = [0.99, schedules.uniform()]
>>> shadows = [emajit.init(params) for _ in decays]
>>> _ = emajit.update_many_(shadows, params, 0, decays=decays)

## Install

In a clone, with Python 3.11 or newer:

| command | brings |
| --- | --- |
| `pip install .` | all that needs nothing but torch 2.6 or newer |
| `pip install ".[checkpoint]"` | `emajit.checkpoint`, `emajit.posthoc` and `emajit.merging` |
| `pip install ".[cli]"` | the command: see `emajit --help` |
| `pip install ".[demo]"` | `emajit demo`, what averaging gains on a small diffusion model |
| `pip install ".[lightning]"` | the callback for Lightning |
| `pip install ".[transformers]"` | the callback for transformers, and accelerate |

## For developers

An update goes through `functional` (alpha of the decay and the step), `_plan.find` (the leaves,
checked and paired by `_tree`; the cache), `_choose` (which kernel for which leaf) and `_kernels`
(the arithmetic), with `_compile` in between where leaves are compiled. What a change touches,
beside its tests:

| a change of | is in |
| --- | --- |
| a schedule, a bias-corrected average | `schedules.py` |
| averages that go back into training | `combine.py` |
| a layout of checkpoints | `checkpoint/layouts/`: a module, and a line in `__init__.py` |
| a torch release | `_torch.py` |
| how "auto" chooses | `_choose.py` |
| an integration | `integrations/`: a module; `pyproject.toml` for its extra |
| a command | `cli/`: a module, and an entry in `main.py` |
| a decay for each parameter | `functional.py` (alphas), `_plan.py` (one for each leaf) |
| what counts as one tensor, or overlaps | `_alias.py`, `_tree.py` |
| which average is of which parameter | `_tracking.py`, `_names.py` |
| a device without float64 (MPS) | `_devices.py`, and its callers |
| a rounding mode | `_rounding.py`, `_kernels.py`, `_choose.py`, `functional.py` |
| how a scope is entered and left | `scope.py`, `_exchange.py` (tensors), `_context.py` (signals) |
"""

from emajit import schedules
from emajit._names import select
from emajit.combine import bema, pull_
from emajit.functional import init, update, update_, update_many, update_many_
from emajit.litema import LitEma
from emajit.scope import averaged_module, ema_scope

__all__ = [  # noqa: RUF022, in the order of use
    "LitEma",
    "init",
    "update",
    "update_",
    "update_many",
    "update_many_",
    "select",
    "ema_scope",
    "averaged_module",
    "pull_",
    "bema",
    "schedules",
]
