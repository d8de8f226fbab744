"""Average sharded models: FSDP2, HSDP, tensor parallel, and data parallel.

The average of a DTensor is a DTensor of the same placement. Each process averages its own shards,
without communication, and with the bits that one process would get. The code is that of any model:

>>> import tempfile
>>> from pathlib import Path
>>> import torch
>>> from torch import nn
>>> import emajit
>>> from emajit import checkpoint
>>> model = nn.Linear(8, 8)  # fully_shard(model), with several processes
>>> params = dict(model.named_parameters())
>>> shadow = emajit.init(params)
>>> for step in range(3):  # train, then
...     _ = emajit.update_(shadow, params, step, decay=0.999)
>>> with torch.no_grad(), emajit.ema_scope(model, shadow):
...     prediction = model(torch.ones(8))

## Save and resume

All processes call both functions. Each writes and reads its own shards:

>>> folder = Path(tempfile.mkdtemp(), "sharded-000003")  # a new one each time
>>> checkpoint.save_sharded(folder, shadow, step=3)
>>> shadow, step = checkpoint.load_sharded(folder, like=shadow)

The folder has the format of `torch.distributed.checkpoint` and appears when it is complete. Any
number of processes, with any placement, may load it. It has no checksums. For an `emajit.LitEma`
save `ema.named_averages()`. `emajit.checkpoint.read` and the command read the folder as well.

## Data parallel

With `DistributedDataParallel` each process holds the whole model, and the same average. Build the
`emajit.LitEma` where all processes have the same weights: after `DistributedDataParallel`, or with
one seed. One process saves, with `emajit.checkpoint.save`.

```sh
torchrun --nproc-per-node 2 -m emajit demo
```

trains the demo data-parallel, and ends with the losses of one process.

## Limits

- FSDP is `fully_shard`: a scope refuses the older `FullyShardedDataParallel`. DeepSpeed's ZeRO 3
  leaves empty placeholders in place of parameters, and an error says so; the callback for
  transformers averages the parts that the processes hold.
- `emajit.averaged_module` refuses a model that `fully_shard` has wrapped, which cannot be copied.
  Build another model from the full averages, or use `emajit.ema_scope`.
- `emajit.offload` refuses DTensors. `emajit.fused` takes two separate steps for them.
- In Lightning use the strategy "model_parallel"; the callback refuses "fsdp". The callback for
  transformers takes FSDP with `fsdp_config={"version": 2}` and ZeRO 3, and refuses FSDP 1 and
  tensor parallel. With accelerate see `emajit.integrations`.
- torch 2.6 cannot run `fully_shard` on a CPU. With torch 2.8 on a mesh of two dimensions the noise
  of stochastic rounding is not that of the whole.
- Tested with several processes on a CPU, not yet on GPUs.
"""
