"""Augmentation for fine-tuning: RandAugment, random erasing, mixup and cutmix.

    image = RandAugment("rand-m9-mstd0.5-inc1")(image, rng)         # PIL, after crop and flip
    images = random_erase(images, rng)                              # normalised (B, 3, H, W)
    images, targets = Mixup(num_classes=1000)(images, labels, rng)  # on the device
    loss = torch.nn.functional.cross_entropy(model(images), targets)

`rng` is a `numpy.random.Generator`; only the noise of random erasing is torch's own, drawn on the
images' device. Sources: RandAugment (arXiv:1909.13719), random erasing (1708.04896), mixup
(1710.09412) and CutMix (1905.04899), with the numbers of timm 0.4.12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

FILL = (124, 116, 104)  # ImageNet mean times 255: the colour that an affine operation uncovers
Argument = float | int | None


def _table(value: Callable[[int, int], int]) -> Callable[..., Image.Image]:
    return lambda image, a, *_: image.point([value(v, a) for v in range(256)] * 3)


def _affine(matrix: Callable[[float, int, int], tuple]) -> Callable[..., Image.Image]:
    """`matrix(argument, width, height)` maps output to source pixels."""
    return lambda image, a, resample, fill: image.transform(
        image.size, Image.Transform.AFFINE, matrix(a, *image.size), resample, fillcolor=fill
    )


# Name: (apply(image, argument, resample, fill), base, span). The argument is base ± span * M / 10
# for a float base, and base + int(span * M / 10) for an integer one, at magnitude M. In this set,
# timm's "increasing" one, a larger magnitude is always a stronger change.
OPERATIONS: dict[str, tuple[Callable[..., Image.Image], Argument, float]] = {
    "AutoContrast": (lambda image, *_: ImageOps.autocontrast(image), None, 0),
    "Equalize": (lambda image, *_: ImageOps.equalize(image), None, 0),
    "Invert": (lambda image, *_: ImageOps.invert(image), None, 0),
    "Rotate": (lambda image, a, resample, fill: image.rotate(a, resample, fillcolor=fill), 0.0, 30),
    # A table, since ImageOps.posterize of Pillow 13 refuses the 0 bits of magnitude 10 (black).
    "PosterizeIncreasing": (_table(lambda v, bits: v & (256 - 2 ** (8 - bits))), 4, -4),
    "SolarizeIncreasing": (_table(lambda v, start: v if v < start else 255 - v), 256, -256),
    "SolarizeAdd": (_table(lambda v, add: min(255, v + add) if v < 128 else v), 0, 110),
    # timm clamps these four factors at 0.1 from release 0.5 on, 0.4.12 does not.
    "ColorIncreasing": (lambda im, f, *_: ImageEnhance.Color(im).enhance(f), 1.0, 0.9),
    "ContrastIncreasing": (lambda im, f, *_: ImageEnhance.Contrast(im).enhance(f), 1.0, 0.9),
    "BrightnessIncreasing": (lambda im, f, *_: ImageEnhance.Brightness(im).enhance(f), 1.0, 0.9),
    "SharpnessIncreasing": (lambda im, f, *_: ImageEnhance.Sharpness(im).enhance(f), 1.0, 0.9),
    "ShearX": (_affine(lambda f, width, height: (1, f, 0, 0, 1, 0)), 0.0, 0.3),
    "ShearY": (_affine(lambda f, width, height: (1, 0, 0, f, 1, 0)), 0.0, 0.3),
    "TranslateXRel": (_affine(lambda f, width, height: (1, 0, f * width, 0, 1, 0)), 0.0, 0.45),
    "TranslateYRel": (_affine(lambda f, width, height: (1, 0, 0, 0, 1, f * height)), 0.0, 0.45),
}


def operation_argument(name: str, magnitude: float, negate: bool) -> Argument:
    """Degrees, bits, threshold, factor or share of the size for a magnitude in [0, 10]."""
    _, base, span = OPERATIONS[name]
    change = magnitude / 10 * span
    if isinstance(base, float):
        return base - change if negate else base + change
    return None if base is None else base + int(change)


def apply_operation(
    image: Image.Image, name: str, argument: Argument, resample: str = "bicubic", fill: tuple = FILL
) -> Image.Image:
    """RGB to RGB; `resample` is "bicubic" or "bilinear" and serves rotate, shear and translate."""
    return OPERATIONS[name][0](image, argument, Image.Resampling[resample.upper()], fill)


@dataclass(frozen=True)
class RandAugment:
    """`n` operations drawn with replacement, each acting with probability `p` at its own magnitude.

    The magnitude is Normal(m, mstd), or uniform on [0, m] where mstd > 100, clipped to [0, mmax].
    """

    policy: str = "rand-m9-mstd0.5-inc1"
    resample: str = "bicubic"
    settings: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        section = r"-(m|n|mstd|p|mmax|inc)(\d+(?:\.\d+)?)"
        given = {key: float(value) for key, value in re.findall(section, self.policy)}
        values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "p": 0.5, "mmax": 10.0, "inc": 0.0} | given
        in_range = values["n"] % 1 == 0 and values["p"] <= 1 and values["mmax"] <= 10
        # inc0 is refused because timm up to 1.0.28 reads it as inc1 and later releases do not.
        if not re.fullmatch(f"rand({section})+", self.policy) or not in_range or values["inc"] != 1:
            raise ValueError(
                f"RandAugment policy {self.policy!r} is not 'rand' with inc1 and any of mN, nN, "
                "mstdX, pX (at most 1) and mmaxN (at most 10), joined by '-'"
            )
        object.__setattr__(self, "settings", values)

    def draw(self, rng: Generator) -> list[tuple[str, Argument]]:
        """Names and arguments of the operations that act, in order."""
        mean, deviation = self.settings["m"], self.settings["mstd"]
        acting = []
        for name in rng.choice(list(OPERATIONS), size=int(self.settings["n"])).tolist():
            if rng.random() < self.settings["p"]:
                drawn = rng.uniform(0, mean) if deviation > 100 else rng.normal(mean, deviation)
                magnitude = min(max(drawn, 0.0), self.settings["mmax"])
                acting.append((name, operation_argument(name, magnitude, rng.random() < 0.5)))
        return acting

    def __call__(self, image: Image.Image, rng: Generator) -> Image.Image:
        for name, argument in self.draw(rng):
            image = apply_operation(image, name, argument, self.resample)
        return image


def erase_size(height: int, width: int, area_fraction: float, log_aspect: float) -> tuple | None:
    """(h, w) of a block of aspect h / w; None unless both are smaller than the image's sides."""
    area, aspect = area_fraction * (height * width), math.exp(log_aspect)
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return (h, w) if h < height and w < width else None


def sample_erase_box(height: int, width: int, rng: Generator) -> tuple[int, int, int, int] | None:
    """(top, left, h, w) of 2 to 33% of the area, aspect 0.3 to 3.3; None after ten refusals."""
    for _ in range(10):
        log_aspect = math.log(0.3) * rng.uniform(-1, 1)
        if size := erase_size(height, width, rng.uniform(0.02, 1 / 3), log_aspect):
            top, left = rng.integers(height - size[0] + 1), rng.integers(width - size[1] + 1)
            return int(top), int(left), *size
    return None


def random_erase(images: Tensor, rng: Generator, probability: float = 0.25) -> Tensor:
    """Fill a box in some of the normalised images (B, 3, H, W) with normal noise, in place."""
    for image, chosen in zip(images, rng.random(len(images)) < probability, strict=True):
        if chosen and (box := sample_erase_box(*image.shape[1:], rng)):
            top, left, h, w = box
            image[:, top : top + h, left : left + w].normal_()
    return images


def cutmix_box(
    height: int, width: int, lam: float, center_y: int, center_x: int
) -> tuple[int, int, int, int, float]:
    """(y0, y1, x0, x1) of about 1 - lam of the area, clipped, and lam corrected for that."""
    # Equal halves make odd sides even, as in timm before 1.0.31 and so in the published recipes.
    half_h, half_w = (int(side * math.sqrt(1 - lam)) // 2 for side in (height, width))
    y0, y1 = max(center_y - half_h, 0), min(center_y + half_h, height)
    x0, x1 = max(center_x - half_w, 0), min(center_x + half_w, width)
    return y0, y1, x0, x1, 1 - (y1 - y0) * (x1 - x0) / (height * width)


def smooth_one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels (B,) to float32 (B, num_classes) whose rows sum to 1."""
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


@dataclass(frozen=True)
class Mixup:
    """Mix each image i of a batch with image B - 1 - i, one draw per batch; targets are soft.

    `mixup` and `cutmix` are Beta parameters; 0 switches one off, both 0 leave label smoothing.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch_probability: float = 0.5  # of cutmix, where both are positive
    smoothing: float = 0.1
    num_classes: int = 1000

    def draw(self, rng: Generator, height: int, width: int) -> tuple[str, float, tuple | None]:
        """Mode "mixup" or "cutmix", lam (1 leaves the batch as it is), centre of the cutmix box."""
        if max(self.mixup, self.cutmix) <= 0 or rng.random() >= self.probability:
            return "mixup", 1.0, None
        if self.cutmix > 0 and (self.mixup <= 0 or rng.random() < self.switch_probability):
            center = int(rng.integers(height)), int(rng.integers(width))
            return "cutmix", rng.beta(self.cutmix, self.cutmix), center
        return "mixup", rng.beta(self.mixup, self.mixup), None

    def mix(
        self, images: Tensor, labels: Tensor, mode: str, lam: float, center: tuple | None
    ) -> tuple[Tensor, Tensor]:
        """Mixed images (B, C, H, W), the input untouched, and float32 targets (B, num_classes)."""
        if len(images) % 2 and max(self.mixup, self.cutmix) > 0:
            raise ValueError(f"mixup and cutmix need an even batch, not one of {len(images)}")
        if mode == "cutmix":
            y0, y1, x0, x1, lam = cutmix_box(*images.shape[2:], lam, *center)
            images = images.clone()
            images[:, :, y0:y1, x0:x1] = images[:, :, y0:y1, x0:x1].flip(0)
        elif lam < 1:
            images = images.flip(0).mul_(1 - lam).add_(images, alpha=lam)
        targets = smooth_one_hot(labels, self.num_classes, self.smoothing)
        return images, targets * lam + targets.flip(0) * (1 - lam)

    def __call__(self, images: Tensor, labels: Tensor, rng: Generator) -> tuple[Tensor, Tensor]:
        return self.mix(images, labels, *self.draw(rng, *images.shape[2:]))
