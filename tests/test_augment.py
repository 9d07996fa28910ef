"""RandAugment, erasing, mixup and cutmix against timm's answers and against their definitions."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from common import augment, data
from tests.conftest import golden_files

DRAWS = 20_000
ELSEWHERE = {
    "crop": "tests/test_data.py compares crops and resizing",
    "timm_keys": "the export tests of tests/test_<method>.py compare state-dict names",
}


# ── golden files ──────────────────────────────────────────────────────────────────────────


def check_arguments(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    assert list(augment.OPERATIONS) == meta["op_order"]
    assert list(augment.FILL) == meta["fill_colour"]
    assert set(meta["level_table"]) == set(augment.OPERATIONS)
    for name, row in meta["level_table"].items():
        for k, magnitude in enumerate(meta["magnitudes"]):
            positive = augment.operation_argument(name, magnitude, False)
            negative = augment.operation_argument(name, magnitude, True)
            assert positive == (row["arg"] and row["arg"][k]), (name, magnitude)
            assert negative == (row["arg_negated"][k] if row["signed"] else positive)
            assert type(positive).__name__.removesuffix("Type").lower() == row["kind"]


def check_operations(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    fill = tuple(meta["fill_colour"])
    for case in meta["cases"]:
        drawn = case["op"], case["arg"], case["resample"], fill
        out = [
            np.asarray(augment.apply_operation(Image.fromarray(pixels), *drawn))
            for pixels in arrays["images"]
        ]
        np.testing.assert_array_equal(
            np.stack([out[k] for k in case["images"]]), arrays[case["array"]], err_msg=str(case)
        )
        assert [zlib.crc32(pixels.tobytes()) for pixels in out] == case["crc32"], case
        np.testing.assert_allclose([pixels.mean() for pixels in out], case["mean"], atol=1e-6)


def check_mixing(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    images, labels = torch.tensor(arrays["x"]), torch.tensor(arrays["y"])
    logits, classes = torch.tensor(arrays["logits"]), meta["dims"]["classes"]
    for k, case in enumerate(meta["cases"]):
        mixup = augment.Mixup(smoothing=case["smoothing"], num_classes=classes)
        mixed, targets = mixup.mix(images, labels, case["mode"], case["lam"], case["centre"])
        close(mixed, arrays[f"mixed/{k}"])
        close(targets, arrays[f"target/{k}"])
        assert targets.dtype == torch.float32
        assert targets.sum().item() == pytest.approx(case["target_sum"], abs=1e-6)
        assert cross_entropy(logits, targets).item() == pytest.approx(case["loss"], abs=2e-6)
        if case["mode"] == "cutmix":
            box = augment.cutmix_box(*images.shape[2:], case["lam"], *case["centre"])
            assert box == pytest.approx(case["box"], abs=1e-12)
    np.testing.assert_array_equal(images, arrays["x"])


def check_losses(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    labels, logits = torch.tensor(arrays["y"]), torch.tensor(arrays["logits"])
    for smoothing, loss in meta["label_smoothing_ce"].items():
        targets = augment.smooth_one_hot(labels, logits.shape[1], float(smoothing))
        assert cross_entropy(logits, targets).item() == pytest.approx(loss, abs=2e-6)
        smoothed = cross_entropy(logits, labels, label_smoothing=float(smoothing))
        assert smoothed.item() == pytest.approx(loss, abs=2e-6)


def check_cutmix_boxes(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for row, box in zip(meta["box_rows"], meta["boxes"], strict=True):
        assert augment.cutmix_box(*row) == pytest.approx(box, abs=1e-12), row


def check_erased(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    height, width = arrays["x"].shape[1:]
    for case in meta["cases"]:
        size = case["height"], case["width"]
        *refused, accepted = [augment.erase_size(height, width, *t) for t in case["tries"]]
        assert refused == [None] * len(refused) and accepted == size, case
        assert case["position_ranges"] == [[0, height - size[0]], [0, width - size[1]]]
        box = case["top"], case["left"], *size
        close(erase_with(arrays["x"], box, arrays["noise"]), arrays[case["array"]])


def check_erase_sizes(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for *drawn, accepted, h, w in meta["sizes"]:
        assert augment.erase_size(*drawn) == ((h, w) if accepted else None), drawn


def check_mixup_draws(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    side = 224  # the size of the stored draws (spec, section 9)
    stored, levels, rng = meta["statistics"], meta["quantile_levels"], np.random.default_rng(0)
    drawn = [augment.Mixup().draw(rng, side, side) for _ in range(DRAWS)]
    boxes = [
        (*augment.cutmix_box(side, side, lam, *center), lam)
        for mode, lam, center in drawn
        if mode == "cutmix"
    ]
    y0, y1, x0, x1, corrected, lam = np.array(boxes).T
    share_matches(len(boxes), DRAWS, stored["cutmix_fraction"], stored["draws"])
    ours = {
        "mixup_lambda": [lam for mode, lam, _ in drawn if mode == "mixup"],
        "cutmix_lambda_drawn": lam,
        "cutmix_box_area_fraction": (y1 - y0) * (x1 - x0) / side**2,
        "cutmix_lambda_after": corrected,
        "cutmix_height": y1 - y0,
        "cutmix_width": x1 - x0,
        "cutmix_top": y0,
        "cutmix_left": x0,
    }
    # Other Beta parameters are spelled in the key: mixup_lambda_alpha_0_2 is Beta(0.2, 0.2).
    for key in (key for key in stored if key.startswith("mixup_lambda_alpha_")):
        alpha = float(key.removeprefix("mixup_lambda_alpha_").replace("_", "."))
        mixup = augment.Mixup(mixup=alpha, cutmix=0.0)
        ours[key] = [mixup.draw(rng, side, side)[1] for _ in range(DRAWS)]
    assert ours.keys() | {"draws", "cutmix_fraction"} == stored.keys()
    for key, values in ours.items():
        distribution_matches(values, stored[key], levels)


def check_erase_draws(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    assert meta["statistics"].keys() <= {"random_erasing", "random_resized_crop", "rand_augment"}
    for stored in meta["statistics"]["random_erasing"].values():
        (height, width), rng = stored["size"], np.random.default_rng(1)
        boxes = [augment.sample_erase_box(height, width, rng) for _ in range(DRAWS)]
        top, left, h, w = np.array([box for box in boxes if box]).T
        ours = {
            "area_fraction": h * w / (height * width),
            "log_aspect_h_over_w": np.log(h / w),
            "height": h,
            "width": w,
            "top": top,
            "left": left,
            "top_share": top / (height - h),
            "left_share": left / (width - w),
        }
        torch.manual_seed(0)
        noise, erased, images = [], 0, 4096
        for _ in range(images // 64):
            batch = torch.zeros(64, 1, height, width)
            augment.random_erase(batch, rng, stored["probability"])
            erased += int(batch.flatten(1).any(1).sum())
            noise.append(batch[batch != 0][::257])
        ours["pixel_value"] = torch.cat(noise).numpy()
        share_matches(erased, images, stored["erased_fraction"], stored["draws"])
        assert ours.keys() | {"draws", "size", "probability", "erased_fraction"} == stored.keys()
        for key, values in ours.items():
            distribution_matches(values, stored[key], meta["quantile_levels"])


def check_rand_augment_draws(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for policy, stored in meta["statistics"]["rand_augment"].items():
        assert policy == stored["spec"]
        randaugment, rng, n = augment.RandAugment(policy), np.random.default_rng(2), stored["draws"]
        drawn = [randaugment.draw(rng) for _ in range(DRAWS)]
        acting = Counter(len(operations) for operations in drawn)
        for count, share in stored["ops_applied_fraction"].items():
            share_matches(acting.pop(int(count)), DRAWS, share, n)
        assert not acting
        twice = sum(len(o) == 2 and o[0][0] == o[1][0] for o in drawn)
        share_matches(twice, DRAWS, stored["same_op_twice_fraction"], n)

        per_op = stored["per_op_applied_fraction"]
        acted = Counter(name for operations in drawn for name, _ in operations)
        assert set(acted) == set(augment.OPERATIONS) == set(per_op)
        for name, share in per_op.items():
            share_matches(acted[name], DRAWS, share, n)

        # About DRAWS arguments of each operation, which the quantile rule asks for.
        every = augment.RandAugment(f"{policy}-n{len(per_op)}-p1")
        arguments = {name: [] for name in per_op}
        for _ in range(DRAWS):
            for name, argument in every.draw(rng):
                arguments[name].append(argument)
        magnitudes = []
        for name, share in stored["negative_fraction"].items():
            neutral, full = (augment.operation_argument(name, m, False) for m in (0, 10))
            change = (np.array(arguments[name]) - neutral) / (full - neutral) * 10
            count = round(per_op[name] * n)
            share_matches(int((change < 0).sum()), len(change), share, count)
            magnitudes.extend(np.abs(change).round(9))
        # Rounded on both sides: the way through the argument moves a clipped 10 by one bit.
        rounded = dict(stored["magnitude"], quantiles=np.round(stored["magnitude"]["quantiles"], 9))
        distribution_matches(magnitudes, rounded, meta["quantile_levels"])
        clipped, count = stored["magnitude_at_10_fraction"], stored["magnitude"]["n"]
        share_matches(magnitudes.count(10), len(magnitudes), clipped, count)

        for name, row in stored["integer_arguments"].items():
            if "quantiles" in row:
                distribution_matches(arguments[name], row, meta["quantile_levels"])
                continue
            count = round(per_op[name] * n)
            for value in {*map(int, row), *arguments[name]}:
                ours = arguments[name].count(value)
                share_matches(ours, len(arguments[name]), row.get(str(value), 0.0), count)


def check_pipelines(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    size = meta["size"], meta["size"]
    for case in meta["cases"]:
        top, left, h, w = case["crop"]
        pixels = arrays["image"][top : top + h, left : left + w]
        filter_name = case.get("interpolation", "bicubic")
        # Two one-sided resizes, width first, are what every Pillow below 13 did in one call.
        resample, image = Image.Resampling[filter_name.upper()], Image.fromarray(pixels)
        image = image.resize((size[1], h), resample).resize((size[1], size[0]), resample)
        ours = data.resize(pixels, size, filter_name).astype(int)
        assert np.abs(ours - np.asarray(image)).max() <= 1, case
        if case["flip"]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for step in case.get("ops", []):
            if step["applied"]:
                magnitude = min(max(step["magnitude"], 0), 10)
                argument = augment.operation_argument(step["op"], magnitude, step["negated"])
                assert argument == step["argument"], step
                image = augment.apply_operation(image, step["op"], argument)
        batch = data.normalize(torch.tensor(np.asarray(image)).permute(2, 0, 1)[None])
        out = batch[0].numpy()
        if case.get("erase"):
            out = erase_with(out, case["erase"], arrays["noise"]).numpy()
        close(out, arrays[case["array"]])
        assert out.mean(dtype=np.float64) == pytest.approx(case["mean"], abs=1e-6)
        assert np.linalg.norm(out.astype(np.float64)) == pytest.approx(case["l2"], rel=1e-6)


def close(ours: torch.Tensor | np.ndarray, stored: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(ours), stored, rtol=0, atol=1e-6)


def erase_with(image: np.ndarray, box: Iterable[int], noise: np.ndarray) -> torch.Tensor:
    """`random_erase` of one image (3, H, W) where the box and the noise are given."""
    top, left, h, w = box
    block = torch.tensor(noise[:, :h, :w])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "sample_erase_box", lambda *_: (top, left, h, w))
        patch.setattr(torch.Tensor, "normal_", lambda erased: erased.copy_(block))
        images = torch.tensor(image)[None]
        return augment.random_erase(images, np.random.default_rng(0), probability=1.0)[0]


def share_matches(count: int, draws: int, share: float, stored_draws: int) -> None:
    """Both shares are draws of one probability: at most five standard errors apart."""
    pooled = (count + share * stored_draws) / (draws + stored_draws)
    error = math.sqrt(pooled * (1 - pooled) * (1 / draws + 1 / stored_draws))
    assert abs(count / draws - share) <= 5 * error, (count / draws, share)


def distribution_matches(values: Iterable[float], stored: dict, levels: list[float]) -> None:
    """The rule of the fixtures' `statistics_help`."""
    values = np.asarray(values, dtype=np.float64)
    for level, quantile in zip(levels, stored["quantiles"], strict=True):
        assert (values < quantile).mean() <= level + 0.02, (level, quantile)
        assert (values <= quantile).mean() >= level - 0.02, (level, quantile)
    error = math.sqrt(values.var() / len(values) + stored["std"] ** 2 / stored["n"])
    assert abs(values.mean() - stored["mean"]) <= 5 * error, (values.mean(), stored["mean"])


# A key of `meta` that only this kind of file has, and what is compared. The random resized crops
# in the statistics of the erasing file are common/data.py's: tests/test_data.py.
CHECKS: dict[str, tuple[Callable[[dict, dict], None], ...]] = {
    "op_order": (check_arguments, check_operations),
    "boxes_help": (check_mixing, check_losses, check_cutmix_boxes, check_mixup_draws),
    "statistics_help": (
        check_erased,
        check_erase_sizes,
        check_erase_draws,
        check_rand_augment_draws,
    ),
    "noise": (check_pipelines,),
}


def unclaimed(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    pytest.fail(f"no check for a fixture with the keys {sorted(meta)}")


def golden_checks() -> list:
    """One test per file and check; files of other test modules are skipped by name."""
    params = []
    for path in golden_files("augment"):
        if path.stem in ELSEWHERE:
            skip = pytest.mark.skip(reason=ELSEWHERE[path.stem])
            params.append(pytest.param(path, unclaimed, marks=skip, id=path.stem))
            continue
        with np.load(path) as arrays:
            meta = json.loads(str(arrays["meta"]))
        checks = [check for key, some in CHECKS.items() if key in meta for check in some]
        for check in checks or [unclaimed]:
            name = f"{path.stem}-{check.__name__.removeprefix('check_')}"
            params.append(pytest.param(path, check, id=name))
    return params


@pytest.mark.parametrize(("path", "check"), golden_checks())
def test_golden_augment(path: Path, check: Callable[[dict, dict], None]) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    check(json.loads(str(arrays.pop("meta"))), arrays)


# ── RandAugment ───────────────────────────────────────────────────────────────────────────


def picture(height: int = 40, width: int = 56) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_randaugment_is_a_function_of_its_seed_and_survives_pickling() -> None:
    original = augment.RandAugment("rand-m10-n3-mstd0.5-p1-inc1", "bilinear")
    copy = pickle.loads(pickle.dumps(original))
    assert copy == original and hash(copy) == hash(original)
    seen = set()
    for seed in range(20):
        ours, again = (r(picture(), np.random.default_rng(seed)) for r in (original, copy))
        assert ours.size == (56, 40) and ours.mode == "RGB"
        assert ours.tobytes() == again.tobytes()
        seen.add(ours.tobytes())
    assert len(seen) == 20


def test_randaugment_applies_what_it_draws() -> None:
    randaugment = augment.RandAugment("rand-m9-n4-p0.9-inc1", "bilinear")
    expected = picture()
    for name, argument in randaugment.draw(np.random.default_rng(5)):
        expected = augment.apply_operation(expected, name, argument, "bilinear")
    assert randaugment(picture(), np.random.default_rng(5)).tobytes() == expected.tobytes()


def magnitudes(policy: str) -> np.ndarray:
    """Magnitudes of the rotations among 3,000 draws."""
    rng, randaugment = np.random.default_rng(4), augment.RandAugment(policy)
    drawn = itertools.chain.from_iterable(randaugment.draw(rng) for _ in range(3000))
    return np.array([abs(angle) / 3 for name, angle in drawn if name == "Rotate"])


def test_policy_sections_are_obeyed() -> None:
    for policy in ("rand-m7-inc1", "rand-inc1-m7", "rand-m7-mstd0-inc1-n2-p0.5-mmax10"):
        np.testing.assert_allclose(magnitudes(policy), 7, atol=1e-12)
    assert len(magnitudes("rand-m7-n4-p1-inc1")) == pytest.approx(3000 * 4 / 15, rel=0.15)
    assert magnitudes("rand-m9-mstd1-mmax8-inc1").max() == pytest.approx(8)
    assert magnitudes("rand-m1-mstd3-inc1").min() == 0
    uniform = magnitudes("rand-m8-mstd101-p1-inc1")
    assert uniform.mean() == pytest.approx(4, abs=0.6) and uniform.max() < 8
    assert np.histogram(uniform, 4, (0, 8))[0].min() > 0.18 * len(uniform)
    assert augment.RandAugment("rand-m9-n0-inc1").draw(np.random.default_rng(0)) == []


@pytest.mark.parametrize(
    "policy",
    [
        "",
        "rand",
        "m9-inc1",
        "augmix-m9-inc1",
        "rand-m9-mstd0.5",
        "rand-m9-inc0",
        "rand-m9-inc2",
        "rand-m-inc1",
        "rand-m9-w0-inc1",
        "rand-m9--inc1",
        "rand-m9-inc1-",
        "rand-m-9-inc1",
        "rand-n1.5-inc1",
        "rand-p1.5-inc1",
        "rand-mmax11-inc1",
        "rand-m9-inc1 ",
    ],
)
def test_a_bad_policy_is_one_sentence(policy: str) -> None:
    with pytest.raises(ValueError, match="RandAugment policy") as error:
        augment.RandAugment(policy)
    assert repr(policy) in str(error.value) and "\n" not in str(error.value)


def test_zero_bits_are_black_and_neutral_arguments_change_nothing() -> None:
    black = augment.apply_operation(picture(), "PosterizeIncreasing", 0)
    assert not np.asarray(black).any()
    for name, (_, base, _) in augment.OPERATIONS.items():
        if base is not None and name != "PosterizeIncreasing":
            argument = augment.operation_argument(name, 0, True)
            assert augment.apply_operation(picture(), name, argument) == picture(), name


def test_translation_moves_the_image_and_uncovers_the_fill_colour() -> None:
    pixels, fill = np.asarray(picture(40, 40)), (1, 2, 3)
    moved = augment.apply_operation(picture(40, 40), "TranslateXRel", 0.25, "bilinear", fill)
    np.testing.assert_array_equal(np.asarray(moved)[:, :30], pixels[:, 10:])
    np.testing.assert_array_equal(np.asarray(moved)[:, 30:], np.full((40, 10, 3), fill))
    moved = augment.apply_operation(picture(40, 40), "TranslateYRel", -0.25, "bilinear", fill)
    np.testing.assert_array_equal(np.asarray(moved)[10:], pixels[:30])


# ── random erasing ────────────────────────────────────────────────────────────────────────


def test_random_erase_fills_one_box_in_each_chosen_image() -> None:
    images = torch.full((32, 3, 24, 30), 7.0)
    torch.manual_seed(0)
    out = augment.random_erase(images, np.random.default_rng(0), probability=1.0)
    assert out is images
    for image in images:
        changed = (image != 7).all(0).nonzero()
        assert ((image != 7).any(0) == (image != 7).all(0)).all()
        h, w = (changed.amax(0) - changed.amin(0) + 1).tolist()
        assert len(changed) == h * w and h < 24 and w < 30
        assert 0.01 < h * w / (24 * 30) < 0.36
    assert images[images != 7].std().item() == pytest.approx(1, abs=0.03)


def test_boxes_follow_the_generator_and_noise_follows_torch() -> None:
    def erased(seed: int, noise_seed: int) -> torch.Tensor:
        torch.manual_seed(noise_seed)
        return augment.random_erase(torch.zeros(16, 3, 20, 20), np.random.default_rng(seed))

    assert erased(0, 0).equal(erased(0, 0))
    assert (erased(0, 0) != 0).equal(erased(0, 1) != 0) and not erased(0, 0).equal(erased(0, 1))
    assert not (erased(0, 0) != 0).equal(erased(1, 0) != 0)
    untouched = augment.random_erase(torch.zeros(16, 3, 20, 20), np.random.default_rng(0), 0.0)
    assert not untouched.any()


def test_erasing_gives_up_after_ten_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [None] * 9 + [(2, 3)]
    monkeypatch.setattr(augment, "erase_size", lambda *_: sizes.pop(0))
    assert augment.sample_erase_box(8, 8, np.random.default_rng(0))[2:] == (2, 3)
    sizes = [None] * 10
    assert augment.sample_erase_box(8, 8, np.random.default_rng(0)) is None and not sizes


def test_the_block_is_smaller_than_the_image() -> None:
    assert augment.erase_size(10, 40, 0.25, 0.0) is None  # 10 x 10: as high as the image
    assert augment.erase_size(40, 10, 0.25, 0.0) is None
    assert augment.erase_size(11, 40, 100 / 440, 0.0) == (10, 10)
    assert augment.erase_size(50, 50, 0.1, math.log(2.5)) == (25, 10)  # aspect is h / w


# ── mixup and cutmix ──────────────────────────────────────────────────────────────────────


def batch(size: int = 6, height: int = 16, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(size, 3, height, width, generator=generator)
    return images, torch.arange(size) % 10


def test_targets_are_the_shares_of_the_pixels() -> None:
    """Image i is the constant i, so its pixels say how much of its partner it holds."""
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 16, 12)
    labels, mixup = torch.arange(6), augment.Mixup(smoothing=0.0, num_classes=6)
    for seed in range(40):
        mixed, targets = mixup(images, labels, np.random.default_rng(seed))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(6.0))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert (targets.flip(0).flip(1) - targets).abs().max() < 1e-6
        partners = {frozenset(row.nonzero().flatten().tolist()) for row in targets}
        assert partners <= {frozenset(pair) for i in range(6) for pair in ([i], [i, 5 - i])}


def test_the_input_batch_is_untouched_and_lam_one_leaves_it() -> None:
    images, labels = batch()
    mixup, kept = augment.Mixup(num_classes=10), images.clone()
    for mode, lam, center in (("mixup", 0.3, None), ("cutmix", 0.3, (5, 5))):
        mixed, _ = mixup.mix(images, labels, mode, lam, center)
        assert images.equal(kept) and not mixed.equal(kept)
    mixed, targets = mixup.mix(images, labels, "mixup", 1.0, None)
    assert mixed.equal(kept)
    torch.testing.assert_close(targets, augment.smooth_one_hot(labels, 10, 0.1))


def test_parameters_choose_the_mode() -> None:
    rng = np.random.default_rng(8)

    def modes(**options: float) -> Counter:
        drawn = [augment.Mixup(**options).draw(rng, 32, 32) for _ in range(2000)]
        return Counter("none" if lam == 1 else mode for mode, lam, _ in drawn)

    assert modes(cutmix=0.0).keys() == {"mixup"}
    assert modes(mixup=0.0).keys() == {"cutmix"}
    assert modes(mixup=0.0, cutmix=0.0).keys() == {"none"}
    assert modes(probability=0.0).keys() == {"none"}
    assert modes(probability=0.3)["none"] == pytest.approx(1400, abs=100)
    assert modes(switch_probability=0.8)["cutmix"] == pytest.approx(1600, abs=100)
    centers = [augment.Mixup(mixup=0.0).draw(rng, 3, 5)[2] for _ in range(500)]
    assert set(centers) == set(itertools.product(range(3), range(5)))


def test_without_mixing_the_loss_is_label_smoothing() -> None:
    images, labels = batch(5)
    mixup = augment.Mixup(mixup=0.0, cutmix=0.0, smoothing=0.2, num_classes=10)
    same, targets = mixup(images, labels, np.random.default_rng(0))
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    assert same is images
    expected = cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_an_odd_batch_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="even batch, not one of 5") as error:
        augment.Mixup(num_classes=10)(*batch(5), np.random.default_rng(0))
    assert "\n" not in str(error.value)


def test_cutmix_sides_are_even_unless_clipped() -> None:
    rng = np.random.default_rng(9)
    for lam in rng.random(300):
        y0, y1, x0, x1, corrected = augment.cutmix_box(64, 48, lam, 32, 24)
        assert (y1 - y0) % 2 == 0 and (x1 - x0) % 2 == 0
        assert 0 <= (y1 - y0) * (x1 - x0) <= (1 - lam) * 64 * 48 + 1e-9
        assert corrected >= lam - 1e-12
        y0, y1, x0, x1, _ = augment.cutmix_box(64, 48, lam, 0, 47)
        assert y0 == 0 and x1 == 48


def test_everything_stays_on_the_device_of_the_images() -> None:
    images, labels = batch()[0].to("meta"), torch.zeros(6, dtype=torch.int64, device="meta")
    rng, mixup = np.random.default_rng(0), augment.Mixup(num_classes=10)
    for mode, lam, center in (("mixup", 0.3, None), ("cutmix", 0.3, (5, 5))):
        mixed, targets = mixup.mix(augment.random_erase(images, rng), labels, mode, lam, center)
        assert mixed.device.type == targets.device.type == "meta"
        assert mixed.shape == images.shape and targets.shape == (6, 10)
