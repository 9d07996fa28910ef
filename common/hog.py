"""Histograms of oriented gradients (HOG) as the target of masked image modelling.

FastMIM (Guo et al. 2022, arXiv 2212.06593) and MaskFeat (Wei et al. 2021, arXiv 2112.09133) predict
them instead of pixels. They are MaskFeat's kind: a histogram of unsigned directions a cell and
colour, hard bins, each histogram scaled to length one, no blocks of neighbouring cells.

    from common.hog import draw, hog
    target = hog(images)  # (B, 3, H, W) floats -> (B, 27, H / 8, W / 8)
    picture = draw(target)  # (B, 1, 2 H, 2 W) between 0 and 1: strokes along the edges of a cell

Nothing is imported but torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def hog(
    images: Tensor,
    bins: int = 9,
    cell: int = 8,
    normalise: bool = True,
    gaussian_window: int = 0,
) -> Tensor:
    """Histogram of gradient directions of every cell and colour, weighted by their magnitude.

    (B, C, H, W) -> (B, C * bins, H // cell, W // cell), channel = colour * bins + bin; a remainder
    of rows or columns that fills no cell is left out. normalise: every histogram has length one
    (an empty one stays zero). gaussian_window: magnitudes are weighted by a Gaussian of that many
    pixels, tiled over the image. Always float32 and outside autocast: in half precision one pixel
    in a hundred would fall into another bin. Raises ValueError where a side is below a cell, below
    2 px, or not a multiple of the window.
    """
    if images.ndim != 4:
        raise ValueError(f"images are (B, C, H, W), not {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if min(height, width) < max(cell, 2):
        raise ValueError(f"images of {height}x{width} px are smaller than a cell of {cell} px")
    if gaussian_window and (height % gaussian_window or width % gaussian_window):
        raise ValueError(f"a window of {gaussian_window} px does not tile {height}x{width} px")
    with torch.autocast(images.device.type, enabled=False):
        gx, gy = sobel(images.float())
        # From the vertical axis, as released (the textbook's arguments are the other way round),
        # in bins: [-bins, bins]. Opposite directions share a bin.
        phase = torch.atan2(gx, gy) / math.pi * bins
        index = phase.floor().remainder(bins).long()
        magnitude = (gx.square() + gy.square()).sqrt()
        if gaussian_window:
            window = gaussian(gaussian_window).to(images.device)
            magnitude *= window.repeat(height // gaussian_window, width // gaussian_window)
        index, magnitude = cells(index, cell), cells(magnitude, cell)  # (B, C, h, w, pixels)
        histogram = magnitude.new_zeros(*magnitude.shape[:-1], bins)
        histogram.scatter_add_(-1, index, magnitude)
        if normalise:
            histogram = F.normalize(histogram, dim=-1, eps=1e-12)
    return histogram.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, C * bins, h, w)


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Left minus right and upper minus lower neighbours, smoothed by [1, 2, 1] the other way.

    (B, C, H, W) -> two of the same shape. Borders are reflected, so gx is exactly zero in the first
    and the last column, where it lies on the edge of a bin: hence the difference first, in which
    equal neighbours cancel, and then the sum.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    x = padded[..., :-2] - padded[..., 2:]  # (B, C, H + 2, W)
    y = padded[..., :-2, :] - padded[..., 2:, :]  # (B, C, H, W + 2)
    gx = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    gy = y[..., :-2] + 2 * y[..., 1:-1] + y[..., 2:]
    return gx, gy


def cells(image: Tensor, cell: int) -> Tensor:
    """Pixels of each cell: (B, C, H, W) -> (B, C, H // cell, W // cell, cell * cell)."""
    h, w = image.shape[-2] // cell, image.shape[-1] // cell
    image = image[..., : h * cell, : w * cell]
    return image.unflatten(-2, (h, cell)).unflatten(-1, (w, cell)).transpose(-3, -2).flatten(-2)


def gaussian(side: int) -> Tensor:
    """A centred Gaussian whose deviation is side // 2: (side, side), sum 1."""
    offset = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    weight = torch.exp(-0.5 * (offset / max(side // 2, 1)) ** 2)
    window = weight[:, None] * weight
    return (window / window.sum()).float()


def draw(target: Tensor, bins: int = 9, side: int = 16, white: float | None = None) -> Tensor:
    """Histograms as strokes along the edges they tell of, one square of `side` px a cell.

    (B, C * bins, h, w), as from hog or predicted -> (B, 1, h * side, w * side) between 0 and 1. A
    stroke stands across the gradient at the middle of its bin and is as bright as its mean over the
    colours; white is the value drawn as 1, by default the largest of each image.
    """
    strength = target.float().unflatten(1, (-1, bins)).mean(1).clamp(min=0)  # (B, bins, h, w)
    if white is None:
        strength = strength / strength.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    else:
        strength = strength / white
    offset = torch.arange(side, device=target.device) - (side - 1) / 2
    y, x = offset[:, None], offset[None, :]
    angle = (torch.arange(bins, device=target.device) + 0.5) * (math.pi / bins)
    angle = angle[:, None, None]
    across = (x * angle.sin() + y * angle.cos()).abs()  # (bins, side, side): along the gradient
    inside = (x.square() + y.square()).sqrt() < side / 2 - 0.5
    strokes = (side / 12 + 0.5 - across).clamp(0, 1) * inside
    # The brightest stroke covers the others: added up, three weak ones would look like a strong.
    picture = (strength[..., None, None] * strokes[:, None, None]).amax(1)  # (B, h, w, side, side)
    return picture.transpose(2, 3).flatten(3, 4).flatten(1, 2).clamp(0, 1).unsqueeze(1)
