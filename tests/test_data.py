"""Files, crops, loaders and smaller copies: against fixtures, Pillow and slow definitions."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import data
from tests.conftest import GOLDEN, ROOT, golden_files
from tests.filling import images as filled_images

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves and noise, uint8 (height, width, 3), made as the images of the fixtures."""
    x = filled_images((1, 3, height, width), seed)[0].transpose(1, 2, 0)
    return np.clip(np.rint(x.astype(np.float64) * 64 + 128), 0, 255).astype(np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image that JPEG and resizing change little."""
    return Image.fromarray(photo(7, 9, seed)).resize((width, height), RESAMPLING["bicubic"])


def save(path: Path, height: int = 48, width: int = 64, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth(height, width, seed).save(path)
    return path


# ── golden files ────────────────────────────────────────────────────────────────────────


def read_meta(path: Path) -> dict:
    with np.load(path) as arrays:
        return json.loads(str(arrays["meta"]))


def crop_files() -> list[Path]:
    files = [path for path in golden_files("augment") if "crops" in read_meta(path)]
    assert files or GOLDEN != ROOT / "tests" / "golden", "no fixture of crops"
    return files


def crop_statistics() -> list:
    found = []
    for path in golden_files("augment"):
        meta = read_meta(path)
        for name, case in meta.get("statistics", {}).get("random_resized_crop", {}).items():
            found.append(pytest.param(case, meta["quantile_levels"], id=f"{path.stem}-{name}"))
    assert found or GOLDEN != ROOT / "tests" / "golden", "no statistics of random resized crops"
    return found


def assert_close_pixels(ours: np.ndarray, theirs: np.ndarray, most: int, name: str) -> None:
    difference = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.uint8, name
    assert difference.max() <= most, (name, difference.max())
    assert difference.mean() < 0.05, (name, difference.mean())


def check_crop(case: dict, source: np.ndarray, theirs: np.ndarray) -> None:
    box = source[case["top"] :, case["left"] :][: case["height"], : case["width"]]
    ours = data.resize(box, tuple(case["out"]), case["interpolation"])
    measured = case["torch_uint8_antialias"]["max"]
    assert measured <= 2
    assert_close_pixels(ours, theirs, max(1, measured), str(case))


def check_crops(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for case in meta["crops"]:
        theirs = arrays[case["array"]]
        assert zlib.crc32(theirs.tobytes()) == case["crc32"]
        check_crop(case, arrays["image"], theirs)


def check_large(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """The 375 x 500 image is not stored: Pillow, width first, must answer the stored CRC."""
    source = photo(375, 500, meta["seed"] + 1)
    for case in meta["large"]:
        top, left = case["top"], case["left"]
        box = Image.fromarray(source[top : top + case["height"], left : left + case["width"]])
        (h, w), filter_name = case["out"], RESAMPLING[case["interpolation"]]
        theirs = np.asarray(box.resize((w, box.height), filter_name).resize((w, h), filter_name))
        assert zlib.crc32(theirs.tobytes()) == case["crc32"]
        check_crop(case, source, theirs)


def check_eval(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for case in meta["eval"]:
        name = case["array"]
        pixels = data.EvalCrop(case["size"], case["rule"])(Image.fromarray(arrays[f"{name}/image"]))
        theirs = arrays[f"{name}/pixels"]
        assert zlib.crc32(theirs.tobytes()) == case["crc32"]
        assert_close_pixels(pixels, theirs, 1, name)
        tensor = data.normalize(torch.from_numpy(theirs.copy()).permute(2, 0, 1)[None])[0].double()
        assert tensor.mean().item() == pytest.approx(case["tensor_mean"], abs=1e-6)
        assert tensor.norm().item() == pytest.approx(case["tensor_l2"], rel=1e-6)
        if f"{name}/tensor" in arrays:
            np.testing.assert_array_equal(tensor.float(), arrays[f"{name}/tensor"])


def check_squash(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    theirs = arrays["eval_squash/pixels"]
    ours = data.resize(arrays["eval_squash/image"], theirs.shape[:2])
    assert_close_pixels(ours, theirs, 1, "squash")


def check_centre(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for case in meta["centre"]:
        ours = data.center_crop(arrays[f"{case['array']}/image"], tuple(case["size"]))
        np.testing.assert_array_equal(ours, arrays[f"{case['array']}/pixels"])
        assert zlib.crc32(ours.tobytes()) == case["crc32"]


def check_geometry(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for key, rows in meta["geometry"].items():
        rule, size = key.split("/")
        short = data.eval_resize(int(size), rule)
        for height, width, h, w, top, left in rows:
            assert data.resized_shape(height, width, short) == (h, w), (key, height, width)
            corner = []
            for side in (h, w):  # pixels that hold their own position tell where the crop starts
                positions = np.arange(side).reshape(side, 1, 1)
                corner.append(data.center_crop(positions, (int(size), 1))[0, 0, 0])
            assert corner == [top, left], (key, height, width)


def check_fallback(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for key, box in meta["fallback"].items():
        assert data.fallback_crop(*map(int, key.split("x"))) == tuple(box), key


def check_sizes(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for height, width, fraction, log_ratio, accepted, h, w in meta["sizes"]:
        size = data.crop_size(height, width, fraction, log_ratio)
        assert size == ((h, w) if accepted else None), (height, width, fraction, log_ratio)


def check_normalise(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    ours = data.normalize(levels)[0, :, 0]
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours, arrays["normalise"])
    assert data.normalize(levels, torch.bfloat16).dtype == torch.bfloat16


CROP_CHECKS = {
    "crops": check_crops,
    "large": check_large,
    "eval": check_eval,
    "squash": check_squash,
    "centre": check_centre,
    "geometry": check_geometry,
    "fallback": check_fallback,
    "sizes": check_sizes,
    "normalise_help": check_normalise,
}
DESCRIPTIONS = {"source", "pillow", "torch", "seed", "image", "pass_order", "format", "normalise"}


@pytest.mark.parametrize("path", crop_files(), ids=lambda path: path.stem)
def test_golden_crop_kinds_are_known(path: Path) -> None:
    kinds = {key for key in read_meta(path) if not key.endswith("_help")}
    assert kinds <= DESCRIPTIONS | set(CROP_CHECKS)


@pytest.mark.parametrize("path", crop_files(), ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", CROP_CHECKS)
def test_golden_crop(path: Path, kind: str) -> None:
    meta = read_meta(path)
    with np.load(path) as arrays:
        if kind in meta or (kind == "normalise_help" and "normalise" in arrays):
            CROP_CHECKS[kind](meta, dict(arrays))


@pytest.mark.parametrize(("case", "levels"), crop_statistics())
def test_golden_random_resized_crop(case: dict, levels: list[float]) -> None:
    """The rule of the fixture's `statistics_help`, on as many draws."""
    (height, width), n, rng = case["size"], case["draws"], np.random.default_rng(0)
    boxes = [data.sample_crop(height, width, case["scale"], rng) for _ in range(n)]
    top, left, h, w = np.array(boxes).T
    assert min(top.min(), left.min()) == 0
    assert (top + h).max() <= height and (left + w).max() <= width
    ours = {
        "area_fraction": h * w / (height * width),
        "log_ratio_w_over_h": np.log(w / h),
        "height": h,
        "width": w,
        "top": top,
        "left": left,
        "top_share": (top / np.maximum(height - h, 1))[h < height],
        "left_share": (left / np.maximum(width - w, 1))[w < width],
    }
    for name, values in ours.items():
        theirs = case[name]
        error = math.sqrt(values.var() / len(values) + theirs["std"] ** 2 / theirs["n"])
        assert abs(values.mean() - theirs["mean"]) <= 5 * error, name
        for level, quantile in zip(levels, theirs["quantiles"], strict=True):
            # Many draws equal the quantile up to the last bit of a logarithm.
            assert (values < quantile - 1e-9).mean() <= level + 0.02, (name, level)
            assert (values <= quantile + 1e-9).mean() >= level - 0.02, (name, level)
    whole = np.mean([box == tuple(case["fallback_box"]) for box in boxes])
    assert whole == pytest.approx(case["fallback_box_fraction"], abs=0.02)
    spread = 5 * case["area_fraction"]["std"] * height * width * math.sqrt(2 / n)
    assert (h * w).mean() == pytest.approx(case["mean_crop_pixels"], abs=spread)


# ── finding files ───────────────────────────────────────────────────────────────────────


def test_find_images_reads_only_train(image_folder: Path) -> None:
    source = data.find_images(image_folder)
    assert len(source) == 12 and source.labels is None
    assert all("/train/" in source.name(index) for index in range(len(source)))
    assert len(data.find_images(image_folder / "val")) == 12


def test_find_images_in_a_list_and_alone(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a b.png"), save(tmp_path / "deep" / "c.JPG")
    listing = tmp_path / "list.txt"
    listing.write_text("\ndeep/c.JPG\n\na b.png\n")
    assert names_of(data.find_images(listing)) == [str(second), str(first)]
    assert data.find_images(first).name(0) == str(first)


def names_of(source: data.ImageFiles, root: Path | str = "/") -> list[str]:
    names = [source.name(index) for index in range(len(source))]
    return names if root == "/" else [os.path.relpath(name, root) for name in names]


def test_names_in_a_list_are_taken_as_they_stand(tmp_path: Path) -> None:
    odd = ["plain.png", " before.png", "after.png ", "a\x0bb\x0cc\x1cd.png", "e\u2028f\x85g.png"]
    for name in odd:
        save(tmp_path / "plain.png").replace(tmp_path / name)
    save(tmp_path / "plain.png")
    listing = tmp_path / "list.txt"
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-8-sig", "\n\n")):
        listing.write_bytes(end.join(["", *odd]).encode(encoding))
        assert names_of(data.find_images(listing), tmp_path) == odd


def test_order_of_files_is_that_of_image_folder(tmp_path: Path) -> None:
    names = ["b/z.png", "b/a/y.png", "b/a-c/x.png", "b/B.PNG", "a/10.webp", "a/9.bmp", "a/skip.gif"]
    for name in names:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    source = data.find_labelled(tmp_path, "train")
    found = [
        os.path.relpath(source.name(index), tmp_path / "train") for index in range(len(source))
    ]
    # torchvision sorts whole folder paths ("a-c" before "a/"), then the names in each folder.
    assert found == ["a/10.webp", "a/9.bmp", "b/B.PNG", "b/z.png", "b/a/y.png", "b/a-c/x.png"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 1] and source.labels.dtype == np.int64
    assert source.classes == ["a", "b"]


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "1.png")
    save(tmp_path / "data" / "own" / "2.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "own" / "loop").symlink_to(tmp_path / "data")
    source = data.find_images(tmp_path / "data")
    assert names_of(source, tmp_path / "data") == ["linked/1.png", "own/2.png"]


def test_a_folder_is_visited_once(tmp_path: Path) -> None:
    """Four folders, each with links to all, to what is above them and to themselves."""
    root = tmp_path / "data"
    for name in "abcd":
        save(root / name / "1.png")
    for name, other in itertools.product("abcd", "abcd"):
        (root / name / f"to {other}").symlink_to(root / other)
    for name in "abcd":
        (root / name / "up").symlink_to("..")
        (root / name / "top").symlink_to(tmp_path.parent)
        (root / name / "self").symlink_to("self")
    save(tmp_path / "out" / "2.png")
    (root / "x").symlink_to(tmp_path / "out")
    (root / "a" / "x").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(root)
    (tmp_path / "out" / "above").symlink_to(tmp_path)
    wanted = [*(f"{name}/1.png" for name in "abcd"), "x/2.png"]
    assert names_of(data.find_images(root), root) == wanted


def test_links_do_not_change_labels(tmp_path: Path) -> None:
    """What lies in a class folder, also if that is a link, is of this class; links in it that
    lead to the split, above it, or to another class are not followed."""
    root = tmp_path / "data" / "train"
    for name in ("ants/1.png", "crows/young/3.png"):
        save(root / name)
    save(tmp_path / "store" / "bees" / "2.png")
    save(tmp_path / "more" / "4.png")
    save(tmp_path / "data" / "val" / "ants" / "5.png")
    (root / "bees").symlink_to(tmp_path / "store" / "bees")
    for folder in (root / "ants", root / "crows", tmp_path / "store" / "bees"):
        for name, target in {
            "split": root, "above": tmp_path / "data", "ants": root / "ants",
            "bees": root / "bees", "young": root / "crows" / "young", "up": folder.parent,
        }.items():  # fmt: skip
            (folder / f"to {name}").symlink_to(target)
    (root / "crows" / "more").symlink_to(tmp_path / "more")
    source = data.find_labelled(tmp_path / "data", "train")
    wanted = ["ants/1.png", "bees/2.png", "crows/more/4.png", "crows/young/3.png"]
    assert names_of(source, root) == wanted
    assert source.classes == ["ants", "bees", "crows"] and source.labels.tolist() == [0, 1, 2, 2]


def test_classes_keep_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("a/x/1.png", "a-c/2.png", "a/3.png"):
        save(tmp_path / "train" / name)
    source = data.find_labelled(f"{tmp_path}/", "train")
    assert names_of(source, tmp_path / "train") == ["a/3.png", "a/x/1.png", "a-c/2.png"]
    assert source.labels.tolist() == [0, 0, 1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    save(tmp_path / "train" / "ants" / "1.png")
    os.mkfifo(tmp_path / "train" / "ants" / "f.jpg")
    (tmp_path / "train" / "ants" / "linked.jpg").symlink_to("f.jpg")
    (tmp_path / "list.txt").write_text("train/ants/1.png\ntrain/ants/f.jpg\n")
    assert len(data.find_images(tmp_path)) == len(data.find_labelled(tmp_path, "train")) == 1
    for path in ("train/ants/f.jpg", "list.txt"):
        with pytest.raises(data.InputError, match=r"f\.jpg"):
            data.find_images(tmp_path / path)


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    assert names_of(data.find_images(tmp_path), tmp_path) == ["1.png", "2.png"]


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "train" / "ants" / "1.png")
    save(tmp_path / "train" / "ants" / "secret" / "2.png")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for find in (data.find_images, functools.partial(data.find_labelled, split="train")):
        with pytest.raises(data.InputError, match="ants/secret cannot be read: Permission denied"):
            find(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".png", "/".join(["y" * 200] * 30)])
def test_names_that_are_too_long_are_errors_of_input(tmp_path: Path, name: str) -> None:
    for split in ("", "train"):
        with pytest.raises(data.InputError, match=name[:200]):
            data.open_source(str(tmp_path / name), split)
    (tmp_path / "list.txt").write_text(name)
    with pytest.raises(data.InputError, match="line 1"):
        data.find_images(tmp_path / "list.txt")


def test_open_source(image_folder: Path) -> None:
    assert names_of(data.open_source(str(image_folder))) == names_of(data.find_images(image_folder))
    assert data.open_source(str(image_folder), "val").classes == ["ants", "bees", "crows"]
    for split, name in (("", "train/2"), ("val", "val/2")):
        drawn = data.open_source("drawn:3", split)
        assert len(drawn) == 3 and drawn.name(2) == name
    with pytest.raises(data.InputError, match="give --data_path"):
        data.open_source("")
    wrong = ("drawn:", "drawn:0", "drawn:-1", "drawn:1.5", "drawn:abc", "drawn:10000001")
    for text in (*wrong, "drawn:" + "9" * 5000):
        with pytest.raises(data.InputError, match="from 1 to 10000000"):
            data.open_source(text)


def test_check_classes() -> None:
    data.check_classes(["a", "b"], ["a", "b"], 2)
    data.check_classes(["a", "b"], ["a", "b"], 3)
    for trained, tested, said in (
        (["a", "b"], ["a", "b"], "2 classes, more than the 1"),
        (["a"], ["b"], "training: a, b"),
        (["a"], ["a", "b"], "training: b"),
    ):
        with pytest.raises(data.InputError, match=said):
            data.check_classes(trained, tested, 1)
    with pytest.raises(data.InputError, match="order"):
        data.check_classes(["a", "b"], ["b", "a"], 2)


def test_worker_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (data.worker_count(None), data.worker_count(0), data.worker_count(20)) == (8, 0, 20)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (data.worker_count(None), data.worker_count(5)) == (3, 5)


@pytest.mark.parametrize(
    ("made", "read", "said"),
    [
        ([], "absent", "absent"),
        ([], "", "no images"),
        (["train/"], "", "no images"),
        (["note.txt"], "", "no images"),
        (["list.txt:a.png\n\nb.png\n", "a.png"], "list.txt", "line 3: .*b.png"),
        (["list.txt:\n\n"], "list.txt", "list.txt holds no images"),
        (["noise.bin:\udcff\udcfe"], "noise.bin", "noise.bin is no folder"),
    ],
)
def test_find_images_says_what_is_wrong(
    tmp_path: Path, made: list[str], read: str, said: str
) -> None:
    for name in made:
        name, _, text = name.partition(":")
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(data.InputError, match=said) as error:
        data.find_images(tmp_path / read)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_find_labelled_says_what_is_wrong(tmp_path: Path) -> None:
    save(tmp_path / "train" / "ants" / "1.png")
    (tmp_path / "flat").mkdir()
    (tmp_path / "hole" / "ants").mkdir(parents=True)
    save(tmp_path / "hole" / "bees" / "1.png")
    for split, said in {
        "val": "val does not exist: expected .*val/<class>/",
        "flat": "flat holds no classes",
        "hole": "hole/ants holds no images",
    }.items():
        with pytest.raises(data.InputError, match=said) as error:
            data.find_labelled(tmp_path, split)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# ── decoding ────────────────────────────────────────────────────────────────────────────


def decoded(path: Path) -> np.ndarray:
    with data.ImageFiles([path]).open(0) as image:
        rgb = data.to_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


@pytest.mark.filterwarnings("ignore:Palette images")
def test_eight_bit_modes(tmp_path: Path) -> None:
    colour = photo(20, 30)
    image, grey = Image.fromarray(colour), Image.fromarray(colour[..., 0])
    grey.save(tmp_path / "L.png")
    np.testing.assert_array_equal(decoded(tmp_path / "L.png"), np.dstack([colour[..., 0]] * 3))
    grey.convert("1").save(tmp_path / "1.png")
    assert set(np.unique(decoded(tmp_path / "1.png"))) == {0, 255}
    alpha = np.dstack([colour, np.full((20, 30), 40, np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "RGBA.png")
    np.testing.assert_array_equal(decoded(tmp_path / "RGBA.png"), colour)
    Image.fromarray(alpha[..., 2:]).save(tmp_path / "LA.png")
    np.testing.assert_array_equal(decoded(tmp_path / "LA.png"), np.dstack([colour[..., 2]] * 3))
    palette = image.quantize(16)
    palette.save(tmp_path / "P.png", transparency=bytes(range(16)))
    table = np.array(palette.getpalette(), dtype=np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(decoded(tmp_path / "P.png"), table[np.asarray(palette)])
    image.convert("CMYK").save(tmp_path / "CMYK.jpg", quality=100, subsampling=0)
    assert Image.open(tmp_path / "CMYK.jpg").mode == "CMYK"
    assert np.abs(decoded(tmp_path / "CMYK.jpg").astype(int) - colour).mean() < 2
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(decoded(tmp_path / "turned.png"), colour)


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 77
    if suffix == "ppm":  # written by hand: Pillow reads 16-bit PGM as mode I
        path = tmp_path / "deep.pgm"
        path.write_bytes(b"P5 16 16 65535\n" + levels.astype(">u2").tobytes())
    else:
        path = tmp_path / f"deep.{suffix}"
        Image.fromarray(levels).save(path)
    assert Image.open(path).mode.startswith("I")
    np.testing.assert_array_equal(decoded(path)[..., 1], levels // 256)


def test_big_endian_and_32_bit_integers() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 77
    for image in (
        Image.frombytes("I;16B", (16, 16), levels.astype(">u2").tobytes()),
        Image.fromarray(levels.astype(np.int32)),
    ):
        np.testing.assert_array_equal(np.asarray(data.to_rgb(image))[..., 2], levels // 256)


@pytest.mark.parametrize(("top", "scale"), [(1.0, 255.0), (255.0, 1.0), (65535.0, 1 / 256)])
def test_floats_take_the_range_that_holds_them(tmp_path: Path, top: float, scale: float) -> None:
    values = (np.linspace(0, 1, 400).reshape(20, 20) * top).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert np.abs(decoded(tmp_path / "f.tif")[..., 0] - values * scale).max() <= 1


# ── transforms ──────────────────────────────────────────────────────────────────────────


def test_resize_keeps_a_right_size_and_reads_views() -> None:
    pixels = photo(40, 56)
    np.testing.assert_array_equal(data.resize(pixels, (40, 56)), pixels)
    part = pixels[3:33, 8:40]
    np.testing.assert_array_equal(data.resize(part, (16, 20)), data.resize(part.copy(), (16, 20)))


def test_train_crop_is_crop_resize_flip() -> None:
    pixels = photo(90, 120)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        top, left, h, w = data.sample_crop(90, 120, (0.2, 1.0), rng)
        expected = data.resize(pixels[top : top + h, left : left + w], (32, 32))
        if rng.random() < 0.5:
            expected = expected[:, ::-1]
        ours = data.TrainCrop(32)(Image.fromarray(pixels), np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, expected)


def test_train_crop_options() -> None:
    image = Image.fromarray(photo(90, 120))

    def crop(seed: int, **options: object) -> np.ndarray:
        return data.TrainCrop(24, **options)(image, np.random.default_rng(seed))

    np.testing.assert_array_equal(crop(3, flip=0.0), crop(3, flip=1.0)[:, ::-1])
    same = {
        name: sum(
            np.array_equal(crop(seed, interpolation="random", flip=0), made)
            for seed, made in enumerate(crop_without_random(image, name))
        )
        for name in RESAMPLING
    }
    assert same["bilinear"] > 5 and same["bicubic"] > 5 and sum(same.values()) == 40
    drawn = []

    def invert(seen: Image.Image, rng: np.random.Generator) -> Image.Image:
        drawn.append(rng.random())
        return Image.fromarray(255 - np.asarray(seen))

    np.testing.assert_array_equal(crop(5, augment=invert), 255 - crop(5))
    assert len(drawn) == 1


def crop_without_random(image: Image.Image, name: str) -> list[np.ndarray]:
    boxes = [data.sample_crop(90, 120, (0.2, 1), np.random.default_rng(s)) for s in range(40)]
    pixels = np.asarray(image)
    return [data.resize(pixels[t : t + h, x : x + w], (24, 24), name) for t, x, h, w in boxes]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_fast_decode_only_where_nothing_is_enlarged(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "big.jpg"
    smooth(601, 803).convert(mode).save(path, quality=95)
    slow, fast = data.TrainCrop(48), data.TrainCrop(48, fast_decode=True)
    factors = set()
    for seed in range(12):
        _, _, h, w = data.sample_crop(601, 803, (0.2, 1.0), np.random.default_rng(seed))
        factor = max(k for k in (1, 2, 4, 8) if k == 1 or min(h, w) >= 48 * k)
        with Image.open(path) as image:
            ours = fast(image, np.random.default_rng(seed))
            assert image.size == (-(-803 // factor), -(-601 // factor))
        with Image.open(path) as image:
            exact = slow(image, np.random.default_rng(seed)).astype(int)
            # A shift by one pixel would make 4 to 12 levels.
            assert np.abs(ours - exact).mean() < 3, (seed, factor)
        factors.add(factor)
    assert {4, 8} <= factors
    small = data.TrainCrop(400, fast_decode=True)
    with Image.open(path) as image:
        small(image, np.random.default_rng(0))
        assert image.size == (803, 601)
    plain = Image.fromarray(photo(400, 400))
    both = (crop(plain, np.random.default_rng(0)) for crop in (slow, fast))
    np.testing.assert_array_equal(*both)


def test_eval_crop_of_small_sizes_only_resizes() -> None:
    pixels = photo(60, 90)
    small = data.EvalCrop(32, "simmim")(Image.fromarray(pixels))
    np.testing.assert_array_equal(small, data.resize(pixels, (32, 32)))
    cropped = data.EvalCrop(32, "mae")(Image.fromarray(pixels))
    assert cropped.shape == (32, 32, 3) and not np.array_equal(cropped, small)
    with pytest.raises(KeyError):
        data.eval_resize(224, "unknown")


@pytest.mark.parametrize("rule", ["simmim", "timm", "mae"])
@pytest.mark.parametrize("shape", [(40, 40), (30, 33), (16, 256), (256, 16), (3, 48), (100, 1600)])
def test_eval_crop_of_usual_images_is_resize_and_crop(rule: str, shape: tuple[int, int]) -> None:
    pixels = photo(*shape)
    short = data.eval_resize(48, rule)
    whole = data.resize(pixels, data.resized_shape(*shape, short))
    ours = data.EvalCrop(48, rule)(Image.fromarray(pixels))
    np.testing.assert_array_equal(ours, data.center_crop(whole, (48, 48)))
    np.testing.assert_array_equal(data.EvalCrop((48, 48), rule)(Image.fromarray(pixels)), ours)


@pytest.mark.parametrize(
    ("shape", "size", "resized"),
    [
        ((60, 90), (48, 64), (54, 81)),  # 54 is 256/224 of 48: the height decides
        ((90, 60), (48, 64), (109, 73)),  # and 73 that of 64: the width
        ((48, 64), (64, 48), (73, 97)),
        ((300, 20), (48, 64), (1095, 73)),
    ],
)
def test_eval_crop_covers_a_rectangle(
    shape: tuple[int, int], size: tuple[int, int], resized: tuple[int, int]
) -> None:
    pixels = photo(*shape)
    ours = data.EvalCrop(size)(Image.fromarray(pixels))
    assert ours.shape == (*size, 3) and data.EvalCrop(size, "timm").size == size
    np.testing.assert_array_equal(ours, data.center_crop(data.resize(pixels, resized), size))
    assert data.EvalCrop((24, 32))(Image.fromarray(pixels)).shape == (24, 32, 3)


@pytest.mark.parametrize("shape", [(1, 65000), (65000, 1), (2, 30000), (30000, 2)])
def test_strips_do_not_grow_huge(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing larger than 40 times the crop is made on the way, and colours stay in place."""
    made = []

    def resize(pixels: np.ndarray, size: tuple[int, int], mode: str = "bicubic") -> np.ndarray:
        made.append(size[0] * size[1])
        assert made[-1] < 40 * 64 * 64
        return real(pixels, size, mode)

    real = data.resize
    monkeypatch.setattr(data, "resize", resize)
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[tuple(slice(max(0, n // 2 - 100), n // 2 + 100) for n in shape)] = 200
    image = Image.fromarray(pixels)
    for crop in (data.EvalCrop(64), data.EvalCrop(64, "mae"), data.EvalCrop((48, 64))):
        assert (crop(image) == 200).all(), crop
    for seed in range(3):
        assert data.TrainCrop(64)(image, np.random.default_rng(seed)).shape == (64, 64, 3)
    assert len(made) == 6
    image.save(tmp_path / "in.png")
    assert data._shrink(str(tmp_path), str(tmp_path / "out"), 1, 90, "in.png") == ""
    with Image.open(tmp_path / "out" / "in.png") as after:
        assert min(after.size) == 1 and max(after.size) <= max(shape)


# ── built-in images ─────────────────────────────────────────────────────────────────────


def test_drawn_images_are_pinned() -> None:
    source = data.DrawnImages("train", 20, 64)
    assert len(source.classes) == 10 and source.labels.tolist() == [*range(10), *range(10)]
    pixels = [np.asarray(source.open(index)) for index in range(20)]
    assert {p.shape for p in pixels} == {(64, 64, 3)}
    assert zlib.crc32(np.stack(pixels).tobytes()) == 3933517919
    longer = data.DrawnImages("train", 500, 64)
    np.testing.assert_array_equal(np.asarray(longer.open(7)), pixels[7])
    others = [data.DrawnImages("val", 20, 64).open(index) for index in range(20)]
    assert not any(np.array_equal(a, np.asarray(b)) for a in pixels for b in others)


def test_ten_million_drawn_images_take_no_memory() -> None:
    tracemalloc.start()
    source = data.open_source("drawn:10000000")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert len(source) == 10**7 and source.name(9_999_999) == "train/9999999"
    assert source.labels[[0, 11, 9_999_999]].tolist() == [0, 1, 9]
    np.testing.assert_array_equal(source.open(7), data.DrawnImages("train", 20).open(7))


def test_drawn_shapes_differ_in_any_rotation() -> None:
    """Two classes never cover the same pixels, whatever the angle and (equal) area."""
    grid = np.linspace(-1.2, 1.2, 49)
    x, y = np.meshgrid(grid, grid)

    def mask(name: str, angle: float) -> np.ndarray:
        shape = data.SHAPES[name]
        span = math.sqrt((shape(x, y) < 0).sum() / 600)
        u, v = (
            math.cos(angle) * x + math.sin(angle) * y,
            math.cos(angle) * y - math.sin(angle) * x,
        )
        return shape(u * span, v * span) < 0

    for one, two in itertools.combinations(data.SHAPES, 2):
        still = mask(one, 0)
        for angle in np.linspace(0, 2 * math.pi, 24, endpoint=False):
            turned = mask(two, angle)
            overlap = (still & turned).sum() / (still | turned).sum()
            assert overlap < 0.9, (one, two, angle, overlap)


# ── loaders ─────────────────────────────────────────────────────────────────────────────


class Numbered:
    """Images whose label is their index; `bad` ones raise as damaged files do."""

    classes: tuple[str, ...] = ()

    def __init__(self, length: int, bad: tuple[int, ...] = ()) -> None:
        self.labels, self.bad, self.opened = np.arange(length), bad, 0

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"number {index}"

    def open(self, index: int) -> Image.Image:
        self.opened += 1
        if index in self.bad:
            raise KeyError("broken header")
        return Image.new("RGB", (4, 4), (index % 256, 0, 0))


def noise(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The image's colour beside a draw of its generator."""
    return np.dstack([np.asarray(image)[..., :2], rng.integers(0, 256, (4, 4), np.uint8)])


def run(loader: data.TrainLoader, start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images, labels) for images, labels in loader.batches(start, stop)]


def assert_same(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_order_and_draws_follow_their_definition() -> None:
    loader = data.TrainLoader(Numbered(23), noise, batch_size=5, seed=9)
    assert len(loader) == 4
    for step, (images, labels) in enumerate(loader.batches(0, 10)):
        epoch, update = divmod(step, 4)
        order = data.permutation(9, epoch, 23)
        assert sorted(order) == list(range(23))
        assert labels.tolist() == order[update * 5 : update * 5 + 5].tolist()
        assert images.dtype == torch.uint8 and images.shape == (5, 3, 4, 4)
        assert images.is_contiguous() and labels.dtype == torch.int64
        for image, index in zip(images, labels.tolist(), strict=True):
            drawn = np.random.default_rng([9, epoch, index]).integers(0, 256, (4, 4), np.uint8)
            assert (image[0] == index).all() and np.array_equal(image[2], drawn)
    assert step == 9
    orders = {tuple(data.permutation(s, e, 23)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    options = {"batch_size": 3, "seed": 1, "accum_iter": 2}
    source, crop = data.DrawnImages("train", 20, 32), data.TrainCrop(16)
    alone = run(data.TrainLoader(source, crop, **options), 0, 8)
    assert len(alone) == 16
    state = torch.get_rng_state()
    helped = data.TrainLoader(source, crop, num_workers=workers, **options)
    assert_same(run(helped, 0, 8), alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(run(helped, 5, 8), alone[10:])  # a resumed run continues the same stream


def test_spawned_workers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, crop = data.DrawnImages("train", 8, 32), data.TrainCrop(16, fast_decode=True)
    alone = run(data.TrainLoader(source, crop, batch_size=4), 0, 3)
    spawned = functools.partial(data.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(data, "DataLoader", spawned)
    assert_same(run(data.TrainLoader(source, crop, batch_size=4, num_workers=1), 0, 3), alone)
    assert pickle.loads(pickle.dumps(data.EvalCrop(64))) == data.EvalCrop(64)


@pytest.mark.parametrize(("world", "accumulated"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_order_depends_on_the_global_batch_only(world: int, accumulated: int) -> None:
    source, size = Numbered(50), 8 // (world * accumulated)
    alone = run(data.TrainLoader(source, noise, batch_size=8, seed=3), 0, 13)
    ranks = [
        run(
            data.TrainLoader(
                source, noise, batch_size=size, seed=3, rank=rank, world_size=world,
                accum_iter=accumulated,
            ),
            0,
            13,
        )
        for rank in range(world)
    ]  # fmt: skip
    for step, (images, labels) in enumerate(alone):
        parts = [
            ranks[rank][step * accumulated + micro]
            for micro in range(accumulated)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_images_without_labels_get_zero(tmp_path: Path) -> None:
    for k in range(4):
        save(tmp_path / f"{k}.png")
    loader = data.TrainLoader(data.find_images(tmp_path), data.TrainCrop(8), batch_size=4)
    assert run(loader, 0, 1)[0][1].tolist() == [0, 0, 0, 0]


def test_a_global_batch_larger_than_the_data_is_an_error() -> None:
    for sizes, told, advice in (
        ((256, 1, 1), "256 (--batch_size 256 x --accum_iter 1 x 1 processes)", "--batch_size 26"),
        ((7, 2, 2), "28 (--batch_size 7 x --accum_iter 2 x 2 processes)", "--batch_size 6 or less"),
        ((10**15, 3, 1), "--batch_size 1000000000000000 x", "--batch_size 8 or less"),
        ((2, 9, 3), "54 (", "not even --batch_size 1 fits"),
    ):
        size, accumulated, world = sizes
        options = {"batch_size": size, "accum_iter": accumulated, "world_size": world}
        with pytest.raises(data.InputError) as error:
            data.TrainLoader(Numbered(26), noise, **options)
        said = str(error.value)
        assert said.startswith("26 images do not fill one global batch of ")
        assert told in said and advice in said and ("small" in said) == (size != 2)
    data.TrainLoader(Numbered(26), noise, batch_size=6, accum_iter=2, world_size=2)


@pytest.fixture
def damaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """30 good images; truncated, empty, no image, and a decompression bomb among them."""
    for k in range(30):
        save(tmp_path / f"good{k}.jpg", seed=k)
    whole = save(tmp_path / "cut.jpg", 60, 60).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "fake.webp").write_text("no image at all")
    save(tmp_path / "bomb.png", 75, 75)
    # 5625 pixels: between the limit and twice the limit, where Pillow would only warn.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    return tmp_path


BAD = ("bomb.png", "cut.jpg", "empty.png", "fake.webp")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_named_once(
    damaged_folder: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data.find_images(damaged_folder)
    source.labels = np.arange(34)
    names = [Path(source.name(index)).name for index in range(34)]
    bad = [names.index(name) for name in BAD]
    loader = data.TrainLoader(source, data.TrainCrop(16), batch_size=4, num_workers=workers)
    met = 0
    for step, (images, labels) in enumerate(loader.batches(0, 24)):
        assert images.shape == (4, 3, 16, 16)
        epoch, update = divmod(step, 8)
        order = data.permutation(0, epoch, 34).tolist()
        for position, label in enumerate(labels.tolist(), update * 4):
            around = itertools.islice(itertools.cycle(order), position, None)
            assert label == next(index for index in around if index not in bad)
        met += len(bad_images_met(order, range(update * 4, update * 4 + 4), bad))
        assert loader.unreadable == met
    assert met >= 9  # of four bad images in each of three passes, as two images are left out
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    for name in BAD:
        told = [line for line in lines if str(damaged_folder / name) + " (" in line]
        assert len(told) == 1 and told[0].startswith("unreadable image skipped: ")
    assert len(lines) == 4 and "decompression bomb" in " ".join(lines)


def bad_images_met(order: list[int], positions: range, bad: Sequence[int]) -> set[int]:
    """The bad images between each position and the next good image."""
    met = set()
    for position in positions:
        while order[position % len(order)] in bad:
            met.add(order[position % len(order)])
            position += 1
    return met


def test_a_resumed_run_counts_the_same_bad_images() -> None:
    loader = data.TrainLoader(Numbered(50, (3, 20, 21)), noise, batch_size=5, accum_iter=2)

    def counts(start: int, stop: int) -> list[int]:
        totals = [0, *(loader.unreadable for _ in loader.batches(start, stop))]
        return np.diff(totals).tolist()

    whole = counts(0, 20)
    assert sum(whole) >= 12  # three images in each of four passes
    assert [*counts(0, 7), *counts(7, 13), *counts(13, 20)] == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_stop_the_run(
    workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tuple(range(0, 40, 3))
    loader = data.TrainLoader(Numbered(60, bad), noise, batch_size=4, num_workers=workers)
    with pytest.raises(data.InputError, match="more than 1%") as error:
        run(loader, 0, 100)
    named = str(error.value).count("number ")
    assert 6 <= named <= 10 and "\n" not in str(error.value)
    assert capsys.readouterr().err.count("KeyError") == named


def test_five_bad_images_never_stop_a_small_folder() -> None:
    loader = data.TrainLoader(Numbered(20, (1, 2, 3, 4, 5)), noise, batch_size=4)
    assert len(run(loader, 0, 30)) == 30 and loader.unreadable >= 30  # in six passes
    with pytest.raises(data.InputError):
        run(data.TrainLoader(Numbered(20, (1, 2, 3, 4, 5, 6)), noise, batch_size=4), 0, 30)


@pytest.mark.parametrize("length", [3, 2000])
def test_nothing_readable_gives_up_early(length: int) -> None:
    source = Numbered(length, tuple(range(length)))
    with pytest.raises(data.InputError, match="number "):
        run(data.TrainLoader(source, noise, batch_size=2), 0, 1)
    assert source.opened <= 2 + max(5, length // 100) + 1


def test_running_out_of_memory_is_no_bad_image() -> None:
    def hungry(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        raise MemoryError

    with pytest.raises(MemoryError):
        run(data.TrainLoader(Numbered(8), hungry, batch_size=2), 0, 1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_eval_counts_each_image_once(world: int, workers: int) -> None:
    source, seen = Numbered(11, bad=(4,)), []
    for rank in range(world):
        batches = data.eval_batches(
            source, noise, batch_size=3, rank=rank, world_size=world, num_workers=workers
        )
        for images, labels, indices in batches:
            assert len(images) == len(labels) <= 3 and torch.equal(labels, indices)
            assert all(index % world == rank for index in indices.tolist())
            seen += indices.tolist()
    assert sorted(seen) == [index for index in range(11) if index != 4]


def test_eval_skips_empty_batches_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    source = Numbered(4, bad=(2, 3))
    batches = list(data.eval_batches(source, noise, batch_size=2))
    assert [indices.tolist() for _, _, indices in batches] == [[0, 1]]
    assert capsys.readouterr().err.count("unreadable image skipped: number") == 2
    assert list(data.eval_batches(source, noise, batch_size=2, rank=5, world_size=6)) == []


def test_eval_of_nothing_readable_is_an_error() -> None:
    source = Numbered(6, bad=(0, 1, 2, 3, 5))
    said = r"none of the 3 images can be read, the first: number 1 \(KeyError: 'broken header'\)"
    with pytest.raises(data.InputError, match=said):
        next(data.eval_batches(source, noise, batch_size=2, rank=1, world_size=2))
    assert len(list(data.eval_batches(source, noise, batch_size=2, world_size=2))) == 1
    source.opened = 0
    data.eval_batches(source, noise, batch_size=2)
    assert source.opened == 0


def test_a_console_that_cannot_show_a_name_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Numbered(8, bad=(2,))
    source.name = "bild-\u00fc\udcff-{}".format
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for stream in (io.TextIOWrapper(io.BytesIO(), "ascii", "strict"), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        loader = data.TrainLoader(source, noise, batch_size=4)
        assert len(run(loader, 0, 4)) == 4 and loader.unreadable >= 2


# ── processes ───────────────────────────────────────────────────────────────────────────

PREAMBLE = """
import contextlib, multiprocessing, os, resource, signal, sys, time
import numpy as np
from common import data

def start(crop=data.TrainCrop(8)):
    source = data.DrawnImages("train", 64, 16)
    return data.TrainLoader(source, crop, batch_size=4, num_workers=2).batches(0, 10**9)

def workers():
    return multiprocessing.active_children()
"""


def python(code: str, **options: object) -> subprocess.Popen:
    """A script that starts loaders, in a session of its own as behind a terminal."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", PREAMBLE + code]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) once it and all its workers, who share the pipes, are gone."""
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def test_closing_ends_the_workers() -> None:
    def workers() -> int:
        return len(multiprocessing.active_children())

    before, source = workers(), data.DrawnImages("train", 64, 16)
    loader = data.TrainLoader(source, data.TrainCrop(8), batch_size=4, num_workers=2)
    with contextlib.closing(loader.batches(0, 10**9)) as batches:
        next(batches)
        tests = data.eval_batches(source, data.EvalCrop(8), batch_size=4, num_workers=1)
        next(tests)
        assert workers() == before + 3
        tests.close()
        assert workers() == before + 2
        next(batches)
    assert workers() == before
    broken = data.TrainLoader(Numbered(60, tuple(range(0, 40, 3))), noise, batch_size=4,
                              num_workers=1)  # fmt: skip
    with pytest.raises(data.InputError) as error:
        run(broken, 0, 100)
    assert workers() == before and error.traceback  # which holds the generator


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_workers_outlive_the_first_signals_but_not_the_second(how: str) -> None:
    code = """
batches = start()
next(batches)
for worker in workers():
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
for _ in range(40):
    next(batches)
assert len(workers()) == 2
os.kill(workers()[0].pid, signal.HOW)
try:
    for _ in batches:
        pass
except data.InputError as error:
    print(error)
except RuntimeError as error:  # raised by torch's handler outside of the generator
    print(data.worker_death(error))
batches.close()
assert not workers()
assert data.worker_death(RuntimeError("another")) is None
"""
    status, output, errors = finish(python(code.replace("HOW", how)))
    assert status == 0, errors
    assert "was killed" in output and "--num_workers 0" in output and output.count("\n") == 1


def test_an_error_in_the_main_process_ends_all() -> None:
    status, _, errors = finish(python("batches = start()\nnext(batches)\nraise ValueError('boom')"))
    assert status == 1 and "boom" in errors and "Exception ignored" not in errors


def test_ctrl_c_is_for_the_main_process() -> None:
    """The whole group gets it; two loaders are open, and nobody catches KeyboardInterrupt."""
    code = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # in case it was ignored
batches, more = start(), start()
next(batches), next(more)
os.killpg(0, signal.SIGINT)
time.sleep(60)
"""
    status, _, errors = finish(python(code))
    assert status == -signal.SIGINT and errors.count("KeyboardInterrupt\n") == 1


def test_workers_do_not_outlive_the_main_process() -> None:
    code = """
batches = start()
next(batches)
print("ready", flush=True)
time.sleep(60)
"""
    process = python(code)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory lies in files on Linux")
def test_full_shared_memory_is_an_error_not_a_wait() -> None:
    code = """
def crop(image, rng):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return np.zeros((64, 64, 3), np.uint8)
try:
    next(start(crop))
except data.InputError as error:
    print(error)
"""
    status, output, errors = finish(python(code))
    assert status == 0, errors
    assert "File too large" in output and "--num_workers 0" in output and output.count("\n") == 1


# ── smaller copies ──────────────────────────────────────────────────────────────────────


def shrink(source: Path, target: Path, *more: str) -> int:
    command = ["shrink", str(source), str(target), "--short_side", "40", "--num_workers", "1"]
    return data.main([*command, *more])


def test_shrink_keeps_names_and_formats(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("train/a/1.jpg", "train/a/2.PNG", "val/b/3.webp", "val/4.bmp", "5.tif", "6.ppm"):
        save(source / name, 90, 121)
    smooth(80, 100).convert("CMYK").save(source / "cmyk.jpg")
    Image.fromarray(np.full((64, 50), 40_000, np.uint16)).save(source / "deep.png")
    smooth(80, 100).save(source / "png.jpeg", "PNG")
    smooth(80, 100).save(source / "gif.jpg", "GIF")
    save(source / "tiny.jpg", 40, 300)
    save(source / "tinier.png", 10, 12)
    (source / "cut.png").write_bytes((source / "train/a/2.PNG").read_bytes()[:200])
    (source / "notes.txt").write_text("not an image")
    assert shrink(source, target) == 0
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    wanted = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert found == wanted - {"notes.txt", "cut.png"}
    output = "".join(capsys.readouterr())
    assert output.count(str(source / "cut.png")) == 1 and "1 unreadable" in output
    for name in found:
        with Image.open(source / name) as before, Image.open(target / name) as after:
            assert after.format == before.format, name
            short = min(40, *before.size)
            assert after.size == data.resized_shape(before.height, before.width, short)[::-1], name
            wide = np.asarray(data.to_rgb(before))
            exact = data.resize(wide, (after.height, after.width)).astype(int)
            limit = 12 if before.format == "GIF" else 4  # 256 colours
            assert np.abs(np.asarray(data.to_rgb(after)) - exact).mean() < limit, name
    for name in ("tiny.jpg", "tinier.png"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_shrink_tells_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A copy of another size is not made anew: its user hears of it."""
    for name in ("a.png", "b.png"):
        data.save_picture(Image.new("RGB", (60, 60)), tmp_path / "in" / name)
    assert shrink(tmp_path / "in", tmp_path / "out") == 0
    assert "2 images in" in (said := capsys.readouterr().err) and "left as they were" not in said
    (tmp_path / "out" / "a.png").unlink()
    assert shrink(tmp_path / "in", tmp_path / "out") == 0
    assert "1 of them left as they were" in capsys.readouterr().err


def test_transparent_palettes_give_no_warning() -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30] * 256)
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.to_rgb(image).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize(("length", "few", "found"), [
    (10, 3, [0, 3, 6]), (3, 8, [0, 1, 2]), (8, 8, [*range(8)]), (9, 8, [*range(8)]),
])  # fmt: skip
def test_few_images_are_from_all_over(length: int, few: int, found: list[int]) -> None:
    source = data.DrawnImages("train", length)
    *_, indices = next(data.eval_batches(source, data.EvalCrop(8), batch_size=few, few=few))
    assert indices.tolist() == found


def test_shrink_restarts(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for k in range(3):
        save(source / f"{k}.png", 90, 120)
    target.mkdir()
    (target / "0.png").write_bytes(b"finished earlier")
    (target / "1.png.tmp").write_bytes(b"half-written")
    assert shrink(source, target, "--quality", "80") == 0
    assert (target / "0.png").read_bytes() == b"finished earlier"
    assert sorted(p.name for p in target.iterdir()) == ["0.png", "1.png", "2.png"]
    written = (target / "1.png").stat().st_mtime_ns
    assert shrink(source, target, "--num_workers", "0") == 0
    assert (target / "1.png").stat().st_mtime_ns == written


def test_shrink_refuses_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "in" / "1.png", 90, 90)
    (tmp_path / "file").touch()
    for source, target in (("in", "in"), ("in", "in/small"), ("absent", "out"), ("file", "out"),
                           ("x" * 300, "out")):  # fmt: skip
        assert shrink(tmp_path / source, tmp_path / target) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / source) in error
    for workers in ("0", "1"):  # where nothing can be written
        assert shrink(tmp_path / "in", tmp_path / "file", "--num_workers", workers) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "file" in error
    command = [sys.executable, "-m", "common.data", "shrink", str(tmp_path / "no"), str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1


def test_shrink_of_circles_and_pipes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in "ab":
        save(tmp_path / "in" / name / "1.png", 90, 120)
        (tmp_path / "in" / name / "loop").symlink_to(tmp_path / "in" / "ba"["ab".index(name)])
        os.mkfifo(tmp_path / "in" / name / "f.jpg")
    assert shrink(tmp_path / "in", tmp_path / "out") == 0
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert written == ["a/1.png", "b/1.png"]
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("\n") == 1  # the summary, and no bar


def test_shrink_ends_on_ctrl_c(tmp_path: Path) -> None:
    save(tmp_path / "in" / "0.jpg", 1500, 1500)
    for k in range(1, 3000):
        (tmp_path / "in" / f"{k}.jpg").symlink_to("0.jpg")
    process = python(f"""
signal.signal(signal.SIGINT, signal.default_int_handler)  # in case it was ignored
sys.exit(data.main(["shrink", {str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}]))
""")
    began = time.monotonic()
    while not list(tmp_path.glob("out/*.jpg")) and time.monotonic() < began + 60:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    status, output, errors = finish(process)
    assert status == 130 and (output + errors).count("\n") == 1, errors
    assert 0 < len(list(tmp_path.glob("out/*.jpg"))) < 3000
