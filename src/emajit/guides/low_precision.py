r"""Average bfloat16 and float16 weights.

Keep the averages in float32, whatever the dtype of the model:

>>> import torch
>>> from torch import nn
>>> import emajit
>>> model = nn.Linear(4, 4).to(torch.bfloat16)
>>> params = dict(model.named_parameters())
>>> shadow = emajit.init(params, dtype=torch.float32)
>>> for step in range(10):  # train, then
...     _ = emajit.update_(shadow, params, step, decay=0.999)
>>> with torch.no_grad(), emajit.ema_scope(model, shadow):
...     prediction = model(torch.ones(4, dtype=torch.bfloat16))

`emajit.LitEma` and the callbacks of `emajit.integrations` take the same `dtype`. The arithmetic is
in float32 for 16-bit and float32 leaves, in float64 for float64 leaves, and the result is rounded
once, to the dtype of the shadow.

## A 16-bit shadow stalls

An increment $\alpha (p - s)$ below half an ulp of $s$ rounds away. In bfloat16 half an ulp is at
least $2^{-9} |s|$. At a decay of 0.9999 the average does not move unless $|p - s| > 19 |s|$. Here
1000 updates, which should bring the average from 1 to 1.63, leave it where it was, with a warning:

>>> params = {"w": torch.full((1000,), 2.0, dtype=torch.bfloat16)}
>>> shadow = {"w": torch.ones(1000, dtype=torch.bfloat16)}
>>> for step in range(1000):
...     _ = emajit.update_(shadow, params, step, decay=0.999)
>>> shadow["w"].mean().item()
1.0

## Half the memory, without the stall

If the memory of a float32 shadow is too much, round at random: up with a probability that makes the
expected value right.

>>> for step in range(1000):
...     _ = emajit.update_(shadow, params, step, decay=0.999, rounding="stochastic")
>>> round(shadow["w"].float().mean().item(), 2)
1.63

The mean is right for increments of any size, also for increments that are too small for a float32
shadow. A single element has noise of a few ulps. The noise is a hash of the step, the path of the
leaf and the index of the element: the same step gives the same bits, on any number of processes,
and after a resume.

| shadow | bytes a number | error |
| --- | --- | --- |
| `dtype=torch.float32` | 4 | one rounding to float32 an update |
| 16 bits, `rounding="stochastic"` | 2 | noise of a few ulps, the mean is right |
| 16 bits, `rounding="nearest"` | 2 | stalls above a decay of about 0.9 |

`emajit.offload` keeps a float32 shadow in host memory instead.

## Limits

- Use each step once: two updates with one step have the same noise.
- An `emajit.LitEma` with `rounding="stochastic"` has to count its updates. For a constant decay
  without a warm-up pass `decay=schedules.constant(0.999)`.
- The warning of a stall comes once for each dtype, and only where the host knows the decay: not in
  a trace, and not if the step is a tensor on a GPU.
- 8-bit shadows stall too; `rounding="stochastic"` refuses them.
- `rounding="stochastic"` has no gradients: `differentiable=True` refuses it.
- Trees of mixed or low precision are compiled if they are large: see
  `emajit.guides.compiled_steps`.
"""
