"""Train a small diffusion model with diffusers and accelerate, and keep its averages by emajit.

In place of diffusers' `EMAModel`, with its numbers: the lines with `ema` or `decay` are all that is
needed. The averages go on after `load_state`, are validated and saved without a copy of the
training weights, and the folder `unet_ema` loads with `UNet2DModel.from_pretrained`.

    python docs/diffusers_ema.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch.nn import functional as F  # noqa: N812, as everybody

from emajit import LitEma, schedules


def train(folder: Path, steps: int = 1000) -> tuple[LitEma, list[dict[str, float]]]:
    """The averages after some steps, and what was logged; goes on from `folder`."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    unet: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    noise_scheduler: Any = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    bare = accelerator.unwrap_model(unet)

    decay = schedules.delay(schedules.warmup(0.999), 1)
    ema = LitEma(bare, decay=decay)
    accelerator.register_for_checkpointing(ema)

    first = 0
    if (folder / "state").exists():
        accelerator.load_state(str(folder / "state"))
        first = int((folder / "step").read_text())
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    logged: list[dict[str, float]] = []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        batch = images[torch.randint(len(images), (16,), generator=generator)]
        noise = torch.randn(batch.shape, generator=generator)
        times = torch.randint(100, (16,), generator=generator)
        noisy = noise_scheduler.add_noise(batch, noise, times).to(accelerator.device)
        predicted = unet(noisy, times.to(accelerator.device)).sample
        loss = F.mse_loss(predicted, noise.to(accelerator.device))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            ema(bare)
        logged.append({"loss": loss.item(), "ema_decay": float(decay(step))})

    accelerator.save_state(str(folder / "state"))
    (folder / "step").write_text(str(steps))
    bare.save_pretrained(folder / "unet")
    with ema.ema_scope(bare):  # validate here, too
        bare.save_pretrained(folder / "unet_ema")
    return ema, logged


if __name__ == "__main__":
    _, log = train(Path("diffusers_ema"))
    print(log[-1])
