"""The parameter shapes of known models, and a module that holds tensors of such shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import nn

Shape = tuple[int, ...]


def mlp() -> list[Shape]:
    """Three layers: 6 tensors, 0.27M elements."""
    sizes = (64, 400, 400, 200)
    return [s for i, o in pairwise(sizes) for s in ((o, i), (o,))]


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


def unet() -> list[Shape]:
    """The U-Net of Stable Diffusion 1, arXiv 2112.10752, at 3/5 of its width: 686 tensors, 314M."""
    base, context = 192, 768
    widths = [base * factor for factor in (1, 2, 4, 4)]

    def affine(*shape: int) -> list[Shape]:
        return [shape, shape[:1]]

    def residual(i: int, o: int) -> list[Shape]:
        convolutions = affine(o, i, 3, 3) + affine(o, 4 * base) + affine(o) + affine(o, o, 3, 3)
        return affine(i) + convolutions + (affine(o, i, 1, 1) if i != o else [])

    def transformer(c: int) -> list[Shape]:
        attention: list[Shape] = [(c, c)] * 3 + affine(c, c)
        cross: list[Shape] = [(c, c), (c, context), (c, context), *affine(c, c)]
        forward = affine(8 * c, c) + affine(c, 4 * c)
        inside = attention + forward + cross + affine(c) * 3
        return affine(c) + affine(c, c, 1, 1) + inside + affine(c, c, 1, 1)

    shapes = affine(4 * base, base) + affine(4 * base, 4 * base) + affine(base, 4, 3, 3)
    skips, c = [base], base
    for level, width in enumerate(widths):
        for _ in range(2):
            shapes += residual(c, width) + (transformer(width) if level < 3 else [])
            skips.append(width)
            c = width
        if level < 3:
            shapes += affine(c, c, 3, 3)
            skips.append(c)
    shapes += residual(c, c) + transformer(c) + residual(c, c)
    for level, width in reversed([*enumerate(widths)]):
        for i in range(3):
            shapes += residual(c + skips.pop(), width) + (transformer(width) if level < 3 else [])
            c = width
            if level and i == 2:
                shapes += affine(c, c, 3, 3)
    return shapes + affine(c) + affine(4, c, 3, 3)


def even(elements: int, tensors: int) -> list[Shape]:
    """As many elements in as many tensors of one size."""
    return [(elements // tensors,)] * tensors


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "MLP": mlp,
    "200 x 32": partial(even, 200 * 32, 200),
    "1000 x 32": partial(even, 1000 * 32, 1000),
    "ResNet-50": resnet50,
    "ViT-B": vit_b,
    "U-Net": unet,
}


class Holder(nn.Module):
    """Random parameters of given shapes, three to a submodule, as layers hold them."""

    def __init__(
        self, shapes: list[Shape], device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        for i in range(0, len(shapes), 3):
            layer = nn.Module()
            for name, shape in zip("abc", shapes[i : i + 3], strict=False):
                values = torch.randn(shape, device=device, dtype=dtype)
                layer.register_parameter(name, nn.Parameter(values))
            self.add_module(f"layer{i // 3}", layer)
