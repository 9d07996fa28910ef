"""The filling rule of the golden fixtures: every tensor is a function of (name, shape, seed).

A fixture stores only what the released code answered; weights and images are made here, from
NumPy's PCG64 uniform stream seeded with the CRC-32 of the name, so no weight file is needed.
"""

from __future__ import annotations

import math
import zlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float64 array of `shape` in [-1, 1)."""
    bits = np.random.PCG64([zlib.crc32(name.encode()), seed])
    return 2.0 * np.random.Generator(bits).random(shape) - 1.0


def parameter(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 value of the parameter with the released key `name`.

    Vectors: norm scales (`*weight`) lie around 1, biases around 0. Tensors with a leading axis of
    one are tokens and position tables; all others have variance 1 / fan_in.
    """
    u = uniform(name, shape, seed)
    if len(shape) < 2:
        filled = 0.1 * u + (1.0 if name.endswith("weight") else 0.0)
    elif shape[0] == 1:
        filled = u / 2
    else:
        filled = u * math.sqrt(3.0 / math.prod(shape[1:]))
    return filled.astype(np.float32)


def images(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 images (batch, channels, height, width): eight plane waves a channel plus noise."""
    batch, channels, height, width = shape
    rows = (np.arange(height) / height)[:, None]
    columns = (np.arange(width) / width)[None, :]
    waves = uniform("images/waves", (batch, channels, 8, 4), seed)
    total = np.zeros(shape)
    for b in range(batch):
        for c in range(channels):
            for fy, fx, phase, amplitude in waves[b, c]:
                angle = 2 * np.pi * (9 * fy * rows + 9 * fx * columns + phase)
                total[b, c] += amplitude * np.cos(angle)
    total += 0.1 * uniform("images/noise", shape, seed)
    return (total / 1.2).astype(np.float32)
