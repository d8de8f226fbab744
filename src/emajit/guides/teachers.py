"""Use averages as a second network: target networks, teachers, ensembles.

`emajit.averaged_module` returns a module like the model whose parameters are the tensors of the
shadow. It follows each update, as the teacher of a self-supervised student does:

>>> import torch
>>> from torch import nn
>>> import emajit
>>> from emajit import schedules
>>> student = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))
>>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
>>> state = {**dict(student.named_parameters()), **dict(student.named_buffers())}
>>> shadow = emajit.init(state)
>>> teacher = emajit.averaged_module(student, shadow).eval()
>>> decay = schedules.cosine(0.99, 1.0, steps=1000)  # BYOL, DINO
>>> x = torch.randn(64, 8)
>>> for step in range(3):
...     with torch.no_grad():
...         wanted = teacher(x)
...     optimizer.zero_grad()
...     (student(x) - wanted).square().mean().backward()
...     optimizer.step()
...     _ = emajit.update_(shadow, state, step, decay=decay)

The shadow has the buffers here, so that the teacher has averaged statistics of BatchNorm. Without
them the teacher has copies of the buffers, made at the call.

## Adapters

Parameters without an average are shared. So the averaged adapter of a `PeftModel` is a teacher
beside the trained one, with one base in memory:

    adapter = {name: p for name, p in student.named_parameters() if p.requires_grad}
    shadow = emajit.init(adapter)
    teacher = emajit.averaged_module(student, shadow)  # run it under torch.no_grad()
    ...
    emajit.update_(shadow, adapter, step, decay=decay)  # after each optimizer step

`teacher.disable_adapter()` is the base alone. When it ends, PEFT makes the adapter require grad.

## Target networks

A target network needs no second module, only a second set of parameters:

>>> from torch.func import functional_call
>>> network = nn.Linear(8, 4)
>>> params = dict(network.named_parameters())
>>> target = emajit.init(params)
>>> with torch.no_grad():
...     best = functional_call(network, target, (x,)).amax(dim=1)
>>> _ = emajit.update_(target, params, 0, decay=0.995)  # a soft update

A hard update copies: `decay=0.0` at every 100th step.

## Ensembles

The stacked parameters of several models are a tree like any other:

>>> models = [nn.Linear(8, 1) for _ in range(3)]
>>> params, _ = torch.func.stack_module_state(models)
>>> shadow = emajit.init(params)
>>> _ = emajit.update_(shadow, params, 0, decay=0.99)
>>> one = lambda p: functional_call(models[0], p, (x,))
>>> torch.vmap(one)(shadow).shape
torch.Size([3, 64, 1])

## A scope or a module?

| | `emajit.ema_scope` | `emajit.averaged_module` |
| --- | --- | --- |
| computes with the averages | the model itself, inside | another module, always |
| meant for | an evaluation | a teacher, an export, a trace, another thread |
| memory | none, if dtypes are equal | copies of the buffers |
| the training weights meanwhile | return at the end | stay in the model |
| a model of `fully_shard` | yes | no |

For an `emajit.LitEma`: `averaged_module(model, ema.named_averages())`.

## BatchNorm statistics

Instead of averaging the statistics, compute them for the averages, from the training data:

>>> from torch.optim.swa_utils import update_bn
>>> shadow = emajit.init(dict(student.named_parameters()))
>>> teacher = emajit.averaged_module(student, shadow)
>>> update_bn([x], teacher)

Do this on such a module: the end of an `emajit.ema_scope` undoes writes to the statistics.

## Limits

- The module follows `emajit.update_` and `emajit.LitEma`. It does not follow `emajit.update`, which
  returns new tensors.
- It computes in the dtype of the shadow: float32 averages of a bfloat16 model need float32 inputs,
  or `torch.autocast`.
- It is in the mode of the model. Call `eval()`, or BatchNorm writes the averaged statistics.
- Functions among its attributes are shared with the model; one that holds a layer warns.

Three programs of this kind, a deep Q-network, a BYOL teacher and an ensemble in one `vmap`, are
trained by `tests/test_examples.py`.
"""
