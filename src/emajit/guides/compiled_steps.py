"""Update the average inside your own `torch.compile`; and what emajit compiles by itself.

`emajit.update` is traced into your graph, without a graph break. Pass the step as a tensor, and
nothing recompiles as it grows:

```python
import torch
from torch import nn
from torch.func import functional_call, grad
import emajit
from emajit import schedules

model = nn.Linear(8, 1)
x = torch.randn(64, 8)


@torch.compile(fullgraph=True)
def train_step(params, shadow, step):
    gradients = grad(lambda p: functional_call(model, p, (x,)).square().mean())(params)
    params = {name: p - 0.01 * gradients[name] for name, p in params.items()}
    return params, emajit.update(shadow, params, step, decay=schedules.warmup(0.999))


params = {name: p.detach() for name, p in model.named_parameters()}
shadow = emajit.init(params)
for step in range(10):
    params, shadow = train_step(params, shadow, torch.tensor(step))
```

On a GPU the multi-tensor operators of the update become one kernel for all leaves of a precision
(as counted in Inductor's schedule). `emajit.update_`, `emajit.update_many` and the call of an
`emajit.LitEma` are traced in the same way. `emajit.fused` compiles an optimizer of `torch.optim`
together with the average.

## Inside your graph

- The step: a 0-d integer tensor. An int recompiles as it grows; before torch 2.7 it compiles a
  graph for each number.
- The decay: a float, a 0-d tensor or a schedule. A schedule gets the step as a tensor. In a
  schedule of your own, index a table by `step.long()`.
- `backend` has no effect, and the values of a step or decay in a tensor are not checked.
- A trace does not see memory: overlap is not checked, and leaves are tied only if they are one
  object.
- An update reads nothing back from the device, so that a CUDA graph can capture it. An
  `emajit.LitEma` with `every` above 1 raises RuntimeError in a compiled or captured step, where
  calls cannot be counted.
- A captured graph of an evaluation reads the addresses of the parameters: capture it for an
  `emajit.averaged_module`, or replay it in `ema_scope(model, shadow, copy=True)`.

## What emajit compiles by itself

Outside of your graphs `backend="auto"`, the default, takes the faster way for each leaf:

| leaves | how they are computed |
| --- | --- |
| float32 of float32, float64 of float64 | one multi-tensor operator for all, never compiled |
| mixed or 16-bit dtypes, `nonfinite="skip"` | compiled from 1M elements on |
| the same with `rounding="stochastic"` | compiled from 256k elements on |
| any, if the step is a tensor on a GPU | compiled from 1M elements on |
| complex, integer, subclasses of Tensor | leaf by leaf, never compiled |

At decays of 1/2 and below, where a warm-up begins, nothing is compiled. The first compiled call
takes seconds to half a minute, less once Inductor has the kernel on the disk. `backend="eager"`
never compiles. `backend="inductor"`, or the name of another backend, compiles all leaves that a
graph can have.

## Limits

- Before torch 2.8 `backend="auto"` compiles nothing on a CPU, where Inductor would be slower.
- Without a compiler, a cache folder or a disk to write on, "auto" goes on in eager mode, with
  one warning.
- Nothing here has been run on a GPU yet.
"""
