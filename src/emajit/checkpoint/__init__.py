r"""Save averages, resume, and read the averages in everybody's checkpoints.

`save` writes a shadow and its step into one file of safetensors, and `load` reads them back:

>>> import tempfile
>>> from pathlib import Path
>>> import torch
>>> from torch import nn
>>> import emajit
>>> from emajit import checkpoint
>>> folder = Path(tempfile.mkdtemp())
>>> model = nn.Linear(8, 1)
>>> params = dict(model.named_parameters())
>>> shadow = emajit.init(params)
>>> path = folder / "ema.safetensors"
>>> checkpoint.save(path, shadow, step=10)  # the step of the next update
>>> shadow, step = checkpoint.load(path, like=emajit.init(params))

The file appears whole or not at all, even if the process is killed, and replaces the old one.
Loading verifies a checksum of each tensor. `like` gives the expected structure, shapes and dtypes.
The averages go on bit for bit. In the file the parameters have their own names, for any program
that reads safetensors. `save_sharded` and `load_sharded` do it for a shadow of DTensors, see
`emajit.guides.sharding`.

Without this module: `torch.save({"shadow": shadow, "step": step}, path)`, loaded with
`weights_only=True`, also resumes exactly, but unchecked. So does the `state_dict` of an
`emajit.LitEma`.

## Read any checkpoint

>>> from torch.optim.swa_utils import AveragedModel
>>> torch.save(AveragedModel(model).state_dict(), folder / "swa.pt")
>>> found = checkpoint.read(folder / "swa.pt")
>>> model.load_state_dict(found.weights)
<All keys matched successfully>
>>> found.layout, found.step, found.raw_only
('AveragedModel', 0, ())

`read` takes a file, a folder, or the content of a file, and searches it at any depth. It finds
averages by the layout of a library, else by a key such as `ema`, `model_avg` or `teacher`. The
averages get the names of the trained weights beside them, without the prefixes of wrappers.
`Averaged` lists what else is known: the step, the decay, which weights are not averages.

These are read:

- **States of libraries**: `LitEma`, alone or in a checkpoint of latent-diffusion, SGM or CogVideo;
  `AveragedModel`, timm, ema-pytorch with its `KarrasEMA` and `PostHocEMA`, diffusers, torch_ema,
  Lightning, NeMo, d2go, mmengine, MMCV, Composer, torchtitan, EDM2, emajit.
- **Files of scripts**: DiT, score_sde, MDLM, denoising-diffusion, F5-TTS, stable-audio-tools,
  k-diffusion, torchvision, OpenFold, DINO, MoCo, BYOL, RT-DETR, BasicSR, StyleGAN2, pytorch-ddpm,
  Diffusion Policy, fairseq, icefall, hand-written classes with a `shadow`.
- **Folders**: the Trainer of transformers, accelerate, diffusers' pipelines, shards with an index,
  `torch.distributed.checkpoint`, DeepSpeed's ZeRO (joined by its own converter, which must be
  installed).
- **Whole files** of any script that names them so, such as `ema_0.9999_100000.pt`.

`emajit.checkpoint.layouts` describes the file of each library.

`read` never guesses. If it finds no average, several, or trained weights in two places, the error
is a table of the candidates; `key=` and `raw_key=` choose, and `read_all` reads several averages:

>>> torch.save({"ema": dict(params), "ema_fast": dict(params)}, folder / "two.pt")
>>> checkpoint.read(folder / "two.pt", key="ema_fast").path
'ema_fast'

## Write another library's layout

`write` writes what `read` has found, to go on in another library. On the command line:

```sh
pip install ".[cli]"
emajit inspect model.ckpt
emajit extract model.ckpt -o averaged.safetensors
emajit convert model.ckpt -o swa.pt --layout averaged-model
emajit convert model.pt -o next.ckpt --layout lightning --like last.ckpt
```

- `inspect` shows the candidates in a file, the one that is read as the average and the reason, its
  step, decay and length, and the distance of averages and trained weights, by module.
- `extract` writes the averages as a `state_dict`. With `--like MODEL` it checks names and shapes
  against a file of the model, or writes a folder for `from_pretrained`.
- `convert` writes the layout of latent-diffusion, `AveragedModel`, ema-pytorch, timm, MMCV,
  diffusers or torch_ema. Where the checkpoint does not hold them, give `--decay` and `--step`.
- Lightning and mmengine resume from a whole checkpoint alone. So `--like LAST` gives `convert` one
  of the run that is to go on, with averages or without: it writes a copy with the new averages.
  The trained weights, optimizers, loops and all else in it stay, also objects that are pickled,
  which are copied and not loaded. `lightning` is for Lightning's `WeightAveraging` and emajit's
  `EMACallback`, `emajit-lightning` for `EMACallback`, `mmengine` for `EMAHook`.

## Limits

- Only tensors and plain containers are unpickled. A module that was pickled whole is not read: load
  it where its class is, and save a `state_dict()`.
- Averages that are stored by position (diffusers, torch_ema, NeMo) need `names=model`, if there are
  no trained weights that give the names in order. Safetensors keeps no order.
- ema-pytorch's `PostHocEMA` keeps several averages, and their lengths in no file: they are told
  apart by their places. Give the lengths with `sigma_rel=(0.05, 0.28)`, in the order of the
  training script; on the command line `emajit inspect --sigma-rel 0.05,0.28`.
- `save` needs tensors that are dense and whole, of dtypes that safetensors has.
- `load_sharded` checks no checksums.
"""

from emajit.checkpoint.averaged import Averaged
from emajit.checkpoint.native import load, load_sharded, save, save_sharded
from emajit.checkpoint.reading import Candidate, candidates, read, read_all
from emajit.checkpoint.writing import write

__all__ = [  # noqa: RUF022, in the order of use
    "save",
    "load",
    "save_sharded",
    "load_sharded",
    "read",
    "read_all",
    "Averaged",
    "write",
    "candidates",
    "Candidate",
]
