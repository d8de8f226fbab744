"""The parameter shapes of known models, and a module that holds tensors of such shapes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

Shape = tuple[int, ...]


def mlp() -> list[Shape]:
    """Three layers: 6 tensors, 0.27M elements."""
    sizes = (64, 400, 400, 200)
    return [s for i, o in pairwise(sizes) for s in ((o, i), (o,))]


def tiny() -> list[Shape]:
    """1000 tensors of 32 elements."""
    return [(32,)] * 1000


def resnet50() -> list[Shape]:
    """He et al., arXiv 1512.03385: 161 tensors, 25.6M elements."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            outside = 4 * width
            convolutions = [(width, inside, 1, 1), (width, width, 3, 3), (outside, width, 1, 1)]
            if block == 0:
                convolutions.append((outside, inside, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            inside = outside
    return [*shapes, (1000, 2048), (1000,)]


def vit_b() -> list[Shape]:
    """ViT-B/16, Dosovitskiy et al., arXiv 2010.11929: 152 tensors, 86.6M elements."""
    d = 768
    norm: list[Shape] = [(d,), (d,)]
    attention: list[Shape] = [(3 * d, d), (3 * d,), (d, d), (d,)]
    feed_forward: list[Shape] = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    start: list[Shape] = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)]
    return [*start, *(norm + attention + norm + feed_forward) * 12, *norm, (1000, d), (1000,)]


class Holder(nn.Module):
    """Random parameters of given shapes, three to a submodule, as layers hold them."""

    def __init__(self, shapes: list[Shape], device: str) -> None:
        super().__init__()
        for i in range(0, len(shapes), 3):
            layer = nn.Module()
            for name, shape in zip("abc", shapes[i : i + 3], strict=False):
                layer.register_parameter(name, nn.Parameter(torch.randn(shape, device=device)))
            self.add_module(f"layer{i // 3}", layer)
