"""The HOG target against a slow version of its definition, and on images whose answer is known.

The released layer's answers are compared in tests/test_fastmim.py, with that method's fixtures.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common import data
from common.hog import draw, gaussian, hog, sobel

SMOOTH = ((-1, 1), (0, 2), (1, 1))  # offset, weight


def slow_hog(image: np.ndarray, bins: int, cell: int, normalise: bool) -> np.ndarray:
    """(H, W) -> (bins, H // cell, W // cell), by loops over pixels in double precision."""
    height, width = image.shape

    def pixel(y: int, x: int) -> float:
        y, x = abs(y), abs(x)  # index -1 reads index 1
        return float(image[min(y, 2 * (height - 1) - y), min(x, 2 * (width - 1) - x)])

    histogram = np.zeros((bins, height // cell, width // cell))
    for y in range(height // cell * cell):
        for x in range(width // cell * cell):
            gx = sum(w * (pixel(y + d, x - 1) - pixel(y + d, x + 1)) for d, w in SMOOTH)
            gy = sum(w * (pixel(y - 1, x + d) - pixel(y + 1, x + d)) for d, w in SMOOTH)
            phase = math.atan2(gx, gy) / math.pi * bins
            # The images are such that no direction is decided by rounding.
            assert gx == 0 or gy == 0 or abs(phase - round(phase)) > 1e-5
            histogram[math.floor(phase) % bins, y // cell, x // cell] += math.hypot(gx, gy)
    if normalise:
        histogram /= np.maximum(np.linalg.norm(histogram, axis=0), 1e-12)
    return histogram


@pytest.mark.parametrize("bins", [9, 7, 8])
@pytest.mark.parametrize(("height", "width", "cell"), [(24, 16, 8), (21, 19, 4), (9, 35, 3)])
def test_agrees_with_loops_over_pixels(height: int, width: int, cell: int, bins: int) -> None:
    rng = np.random.default_rng(height)
    images = rng.normal(size=(2, 3, height, width)).astype(np.float32)
    for normalise in (True, False):
        answer = hog(torch.from_numpy(images), bins, cell, normalise)
        assert answer.shape == (2, 3 * bins, height // cell, width // cell)
        slow = [[slow_hog(plane, bins, cell, normalise) for plane in image] for image in images]
        slow = np.array(slow).reshape(answer.shape)
        np.testing.assert_allclose(answer.numpy(), slow, rtol=0, atol=2e-6 * max(1, slow.max()))


def one_bin(answer: Tensor, bins: int = 9) -> int:
    """The only bin that any cell of the answer (1, bins, h, w) has anything in."""
    filled = answer.amax((0, 2, 3)).nonzero().flatten().tolist()
    assert len(filled) == 1, filled
    return filled[0]


def test_a_constant_image_is_exactly_zero() -> None:
    for value in (0.0, 0.1, -2.1179):
        assert hog(torch.full((1, 3, 16, 16), value)).eq(0).all()


def test_ramps_fill_the_bin_of_their_direction() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    inner = slice(1, 2)  # cells whose pixels all lie off the border
    # From the vertical axis, in ninths of a half turn: 0, 4.5, 2.25 and 6.75.
    directions = {0: y, 4: x, 2: x + y, 6: x - y}
    for k, image in directions.items():
        for sign in (1, -1):
            answer = hog(sign * image[None, None], normalise=False)
            middle = answer[..., inner, inner]
            assert one_bin(middle) == k
            # 64 pixels, and the kernels answer 8 per grey level and pixel along an axis.
            length = 64 * 8 * (math.sqrt(2) if k in (2, 6) else 1)
            assert middle.sum().item() == pytest.approx(length, rel=1e-5)


def test_a_checkerboard_of_single_pixels_has_no_gradient() -> None:
    """Neighbours two apart are equal: the differences cancel exactly, also at the border."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    assert hog(((x + y) % 2)[None, None] * 0.3).eq(0).all()


def test_a_checkerboard_of_cells_has_gradients_on_both_sides_of_its_edges() -> None:
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    answer = hog((((x // 8) + (y // 8)) % 2)[None, None].float(), normalise=False)
    torch.testing.assert_close(answer, answer.flip(-1).flip(-2))  # bins are unsigned
    # Seven pixels along each edge with 4 each; at the corner of the cell gx = gy = -2.
    expected = torch.zeros(9)
    expected[[0, 4]], expected[2] = 28.0, math.sqrt(8)
    torch.testing.assert_close(answer[0, :, 0, 0], expected)


def test_an_edge_of_one_pixel() -> None:
    """A bright line in column 3: gx is -4 left and 4 right of it, one bin, nothing elsewhere."""
    image = torch.zeros(1, 1, 8, 8)
    image[..., 3] = 1
    gx, gy = sobel(image)
    assert gy.eq(0).all()
    assert gx[0, 0, 0].tolist() == [0, 0, -4, 0, 4, 0, 0, 0]
    answer = hog(image, normalise=False)
    assert one_bin(answer) == 4
    assert answer.sum().item() == 8 * 8
    assert one_bin(hog(image.mT)) == 0


def test_border_pixels_are_in_the_first_bin() -> None:
    """Reflected borders make gx exactly zero in the first and last column, whatever the values."""
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 16, 16))).float()
    gx, gy = sobel(image)
    assert gx[..., [0, -1]].eq(0).all() and gy[..., [0, -1], :].eq(0).all()
    column = hog(image, cell=1, normalise=False).unflatten(1, (3, 9))[..., [0, -1]]
    assert column[:, :, 1:].eq(0).all()
    torch.testing.assert_close(column[:, :, 0], gy[..., [0, -1]].abs())


def test_length_is_one_or_zero_and_contrast_does_not_matter() -> None:
    image = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, 32, 32))).float()
    image[:, 1, :16, :16] = 0.7
    answer = hog(image)
    length = answer.unflatten(1, (3, 9)).norm(dim=2)
    assert length[:, 1, 0, 0].eq(0).all()
    length[:, 1, 0, 0] = 1
    torch.testing.assert_close(length, torch.ones_like(length))
    torch.testing.assert_close(hog(4 * image), answer)
    torch.testing.assert_close(hog(-image), answer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_the_input_changes_nothing_but_its_rounding(dtype: torch.dtype) -> None:
    image = torch.from_numpy(np.random.default_rng(2).normal(size=(1, 3, 16, 16))).to(dtype)
    answer = hog(image)
    assert answer.dtype == torch.float32
    assert torch.equal(answer, hog(image.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(answer, hog(image))


def test_no_gradient_is_kept() -> None:
    image = torch.randn(1, 3, 16, 16, requires_grad=True)
    assert not hog(image).requires_grad


def test_memory_layout_does_not_matter() -> None:
    image = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 3, 24, 24))).float()
    assert torch.equal(hog(image.to(memory_format=torch.channels_last)), hog(image))
    assert torch.equal(hog(image[..., :17, :23]), hog(image[..., :17, :23].contiguous()))


def test_gaussian_window() -> None:
    window = gaussian(16)
    assert window.shape == (16, 16)
    assert window.sum().item() == pytest.approx(1)
    assert window[7, 8] == window.max()
    assert (window[0, 8] / window[7, 8]).item() == pytest.approx(
        math.exp(-(7.5**2 - 0.5**2) / (2 * 8**2))
    )
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    answer = hog(ramp, normalise=False, gaussian_window=16)[0, 4]
    # Off the border each magnitude is 8: a cell is 8 times the weight of its quarter of a window.
    assert answer[1, 1].item() == pytest.approx(8 * window[8:, 8:].sum().item(), rel=1e-5)
    assert answer[1, 2].item() == pytest.approx(8 * window[8:, :8].sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("side", "options", "message"),
    [
        (7, {}, "smaller than a cell"),
        (1, {"cell": 1}, "smaller than a cell"),
        (24, {"gaussian_window": 16}, "does not tile"),
    ],
)
def test_sizes_that_cannot_work(side: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hog(torch.zeros(1, 3, side, side), **options)


# ── pictures ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("image", "along"),
    [
        (lambda y, x: x, (1, 0)),
        (lambda y, x: y, (0, 1)),
        (lambda y, x: x + y, (1, -1)),
        (lambda y, x: x - y, (1, 1)),
    ],
    ids=["vertical", "horizontal", "rising", "falling"],
)
def test_strokes_lie_along_the_edges(
    image: Callable[[Tensor, Tensor], Tensor], along: tuple[int, int]
) -> None:
    """Second moments of the stroke that a ramp draws, (rows, columns) downwards and rightwards."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    picture = draw(hog(image(y, x)[None, None]), side=32)[0, 0, 32:64, 32:64]
    offset = torch.arange(32) - 15.5
    moments = [
        (picture * offset[:, None] ** 2).sum(),
        (picture * offset[None] ** 2).sum(),
        (picture * offset[:, None] * offset[None]).sum(),
    ]
    angle = 0.5 * math.atan2(2 * moments[2], moments[1] - moments[0])  # of the long axis, from x
    wanted = math.atan2(*along)
    assert abs(math.remainder(angle - wanted, math.pi)) < math.pi / 9 / 2 + 0.02
    assert picture.max() > 0.9


def test_pictures_have_the_range_and_size_they_promise() -> None:
    image = torch.from_numpy(np.random.default_rng(4).normal(size=(2, 3, 32, 16))).float()
    target = hog(image)
    picture = draw(target)
    assert picture.shape == (2, 1, 64, 32)
    assert picture.min() == 0 and 0.9 < picture.max() <= 1
    assert draw(torch.zeros_like(target)).eq(0).all()
    assert draw(-target).eq(0).all(), "predictions below zero are no strokes"
    half = draw(target, white=1.0)
    assert (
        torch.equal(half, draw(target.half(), white=1.0))
        or half.sub(draw(target.half(), white=1.0)).abs().max() < 1e-3
    )
    assert draw(hog(image, bins=4), bins=4).shape == picture.shape


def test_used_alone(tmp_path: Path) -> None:
    """The file copied by itself, in three lines, on a drawn photograph."""
    source = Path(__file__).parent.parent / "common" / "hog.py"
    (tmp_path / "hog.py").write_bytes(source.read_bytes())
    image = np.asarray(data.DrawnImages("train", 1, 64).draw(0).convert("RGB"))
    np.save(tmp_path / "image.npy", image)
    program = (
        "import numpy, torch; from hog import draw, hog\n"
        "image = torch.from_numpy(numpy.load('image.npy')).permute(2, 0, 1)[None] / 255\n"
        "print(tuple(hog(image).shape), tuple(draw(hog(image)).shape))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "(1, 27, 8, 8) (1, 1, 128, 128)", run.stderr
