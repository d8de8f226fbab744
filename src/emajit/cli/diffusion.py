r"""The small diffusion model of `emajit demo`, on scikit-learn's digits.

The model sees $x_t = \alpha_t x + \sigma_t \epsilon$ with $\alpha_t = \cos(\pi t / 2)$ and
$\sigma_t = \sin(\pi t / 2)$, and predicts the noise $\epsilon$ (DDPM, arXiv 2006.11239; the
cosine schedule is that of arXiv 2102.09672). Samples are drawn with DDIM (arXiv 2010.02502).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

BATCH = 64


class Denoiser(nn.Module):
    """A residual MLP over 64 pixels and features of the time."""

    def __init__(self, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.inside = nn.Linear(64 + 16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(blocks)
        )
        self.outside = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * math.pi * torch.arange(1, 9, device=t.device)
        h: Tensor = self.inside(torch.cat([x, angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        predicted: Tensor = self.outside(h)
        return predicted


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    angle = t[:, None] * (math.pi / 2)
    return angle.cos(), angle.sin()


def digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of shape (n, 64) in [-1, 1]: four fifths to train on, one fifth held out."""
    images = torch.from_numpy(load_digits().data).float() / 8 - 1
    images = images[torch.randperm(len(images), generator=generator)]
    held_out = len(images) // 5
    return images[held_out:], images[:held_out]


def loss_of(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The mean squared error of the predicted noise."""
    alpha, sigma = alpha_sigma(t)
    return nn.functional.mse_loss(model(alpha * x + sigma * eps, t), eps)


class Trial:
    """The data of a run: training batches, and the held-out loss of any weights."""

    def __init__(self, seed: int, model: Denoiser, rank: int = 0, ranks: int = 1) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.rank, self.ranks = rank, ranks
        self.generator = torch.Generator().manual_seed(seed)
        self.images, held_out = (part.to(self.device) for part in digits(self.generator))
        self.judged = held_out.repeat(8, 1)
        count = len(self.judged)
        self.judged_at = ((torch.arange(count) + 0.5) / count).to(self.device)
        self.judged_noise = self.noise(self.judged.shape)

    def noise(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def batch(self) -> tuple[Tensor, ...]:
        """Images, times and noise: this process's share of a batch."""
        chosen = torch.randint(len(self.images), (BATCH,), generator=self.generator)
        images = self.images[chosen.to(self.device)]
        t = torch.rand(BATCH, generator=self.generator).to(self.device)
        return tuple(
            part[self.rank :: self.ranks] for part in (images, t, self.noise(images.shape))
        )

    @torch.no_grad()
    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """The loss of weights on any device, in any dtype, computed in float32."""
        held = {name: leaf.to(self.device, torch.float32) for name, leaf in weights.items()}

        def weighted(x: Tensor, t: Tensor) -> Tensor:
            predicted: Tensor = functional_call(self.model, held, (x, t))
            return predicted

        return loss_of(weighted, self.judged, self.judged_at, self.judged_noise).item()


@torch.no_grad()
def sample(model: Denoiser, noise: Tensor, steps: int = 60) -> Tensor:
    """Images of shape (n, 64) from noise of that shape."""
    x = noise
    times = torch.linspace(0.99, 0.0, steps + 1, device=noise.device)
    for now, following in pairwise(times):
        t, later = now.expand(len(x)), following.expand(len(x))
        eps = model(x, t)
        alpha, sigma = alpha_sigma(t)
        clean = ((x - sigma * eps) / alpha).clamp(-1, 1)
        alpha, sigma = alpha_sigma(later)
        x = alpha * clean + sigma * eps
    return x
