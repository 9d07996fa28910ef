"""GreenMIM against the released code's answers, and against what it is by definition."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import tracemalloc
import typing
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenmim
from common import augment, data, grouping
from common.data import InputError
from greenmim import GreenMIM, MaskPlan, ModelConfig, SwinClassifier, SwinEncoder
from tests.conftest import ROOT, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    check_statistics,
    names_in,
    near,
    on_meta,
    same,
    take_step,
    watched,
)
from tests.scripts import before_training as stopped_before_training
from tests.scripts import equal
from tests.test_grouping import SIZINGS

TEST = greenmim.MODELS["test"]
before_training = partial(stopped_before_training, greenmim)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("threads")


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The model with every trainable parameter from the filling rule."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), seed)))
    return model


def build(config: ModelConfig, seed: int = 0) -> GreenMIM:
    return fill(GreenMIM(config), seed)


def plan_of(config: ModelConfig, mask: np.ndarray, noise: np.ndarray | None = None) -> MaskPlan:
    return greenmim.to_device(greenmim.plan_mask(config, mask, noise), CPU)


def predict(model: GreenMIM, images: Tensor, mask: MaskPlan | np.ndarray) -> Tensor:
    """Predictions (B, U, P) of all units, the visible ones, too."""
    plan = model.plan(images, mask)
    x = model.decode(model.encoder(images, plan), plan)
    return model.decoder_pred(model.decoder_norm(x)).float()


def pictures(config: ModelConfig, batch: int = 2, seed: int = 7) -> Tensor:
    return torch.from_numpy(filled_images((batch, 3, *(config.input_size,) * 2), seed))


def some_mask(config: ModelConfig, ratio: float = 0.6, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).random(config.units**2)
    return greenmim.random_mask(noise, ratio)


# ── golden files: what is compared ──────────────────────────────────────────────────────

LOSS, PREDICTION, RELATIVE, STEP = 1e-6, 1e-5, 1e-5, 1e-6  # spec, section 12


def prediction_bound(fixture: Fixture, key: str) -> float:
    """The spec's, or four times what float32 and float64 differed by in the released code."""
    spread = fixture.meta.get("f32_vs_f64", {}).get(key, {}).get("max_abs", 0.0)
    return max(PREDICTION, 4 * spread)


def check_features(found: dict[str, Tensor], fixture: Fixture) -> None:
    for key in fixture.named("feat/"):
        name, stored = key.removeprefix("feat/"), fixture.take(key)
        bound = RELATIVE * np.abs(stored).max()
        near(found[name].flatten()[: stored.size], stored.flatten(), atol=bound, message=name)
    for key in fixture.named("featstat/"):
        name = key.removeprefix("featstat/")
        check_statistics(found[name], fixture.take(key), RELATIVE, name)


def stage_sites(encoder: SwinEncoder) -> dict[str, tuple[nn.Module, str]]:
    """Input, output before merging (`pre`) and after it (`out`) of every stage."""
    *merging, last = enumerate(encoder.layers)
    sites = {f"stage{i}_in": (layer, "in") for i, layer in (*merging, last)}
    sites |= {f"stage{i}_pre": (layer.downsample, "in") for i, layer in merging}
    sites |= {f"stage{i}_out": (layer.downsample, "out") for i, layer in merging}
    return sites | {f"stage{last[0]}_out": (encoder.norm, "in")}


def check_training(
    fixture: Fixture, model: nn.Module, groups: list[dict], betas: tuple[float, float]
) -> None:
    """Gradients, and parameters after a step of AdamW."""
    check_gradients(fixture, model, RELATIVE)
    if fixture.named("param_after_step"):
        keys = fixture.meta.get("grad_keys", [n for n, _ in model.named_parameters()])
        reach = take_step(model, groups, betas)
        after = {key: dict(model.named_parameters())[key] for key in keys}
        check_after_step(fixture, "param_after_step", after, reach, STEP)


# ── golden files: pre-training ──────────────────────────────────────────────────────────


def pretrain_config(b: dict, release: str) -> ModelConfig:
    """Architecture from the `build` entry of a fixture."""
    encoder, decoder = b["encoder"], b["decoder"]
    config = ModelConfig(
        encoder["img_size"], encoder["patch_size"], encoder["embed_dim"],
        tuple(encoder["depths"]), tuple(encoder["num_heads"]), encoder["window_size"],
        encoder["mlp_ratio"], decoder["decoder_embed_dim"], decoder["decoder_depth"],
        decoder["decoder_num_heads"], b["norm_pix_loss"], release,
    )  # fmt: skip
    assert config.mask_unit == decoder["patch_size"]
    assert config.units**2 == decoder["decoder_num_patches"]
    return config


def check_state(model: nn.Module, eps: float | None, fixture: Fixture) -> None:
    """Names and shapes of the released state dict, but for index buffers."""
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    wanted = fixture.told("shapes", shapes)
    buffers = {k for k in fixture.told("kept", wanted) if k.endswith(greenmim.INDEX_BUFFERS)}
    assert shapes == {k: v for k, v in wanted.items() if k not in buffers}
    found = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    assert eps is None or found == {eps}


def check_mask(fixture: Fixture, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The mask, and the noise it comes from."""
    meta, shape = fixture.meta, (1, config.units**2)
    noise = fixture.arrays.pop("noise", None)
    if "noise_seed" in meta:
        rule = ((uniform("noise", shape, meta["noise_seed"]) + 1) / 2).astype(np.float32)
        noise = rule if noise is None else noise
        same(rule, noise)
    mask = greenmim.random_mask(noise[0], meta["mask_ratio"])
    if "mask" in fixture:
        same(mask, fixture.take("mask"))
    plan = greenmim.plan_mask(config, mask, noise[0])
    if "ids_restore" in fixture:
        same(plan.restore[~mask], fixture.take("ids_restore")[~mask])
    counts = {"masked_units": mask.sum(), "visible_units": (~mask).sum()}
    for key, number in (counts | {"num_mask_units": len(mask)}).items():
        assert number == fixture.told(key, number), key
    if order := fixture.told("decoder_permutation"):
        assert order["visible_positions"] == np.flatnonzero(~mask).tolist()
        restored = plan.restore[order["visible_positions"]]
        assert order["latent_index_placed_there"] == restored.tolist()
    return mask, noise[0]


def coordinates(config: ModelConfig, plan: MaskPlan) -> list[np.ndarray]:
    """(N, 2) row and column of the tokens of every stage, followed through the merging."""
    tokens = config.input_size // config.patch_size
    found = [np.stack(np.divmod(plan.patches.numpy(), tokens), 1)]
    for merge in plan.merges:
        blocks = found[-1][merge.numpy()].reshape(-1, 4, 2)
        assert (blocks - blocks[:, :1] == [[0, 0], [1, 0], [0, 1], [1, 1]]).all()  # Eq. (4)
        assert (blocks[:, 0] % 2 == 0).all()
        found.append(blocks[:, 0] // 2)
    return found


def check_windows(config: ModelConfig, plan: MaskPlan, fixture: Fixture) -> None:
    """Window counts and the released partition of every plan, in the order they are made."""
    calls, places = fixture.told("grouping_calls"), coordinates(config, plan)
    calls = None if calls is None else iter(calls)
    for stage, plans in enumerate(plan.windows):
        window, shift = config.window(stage), config.window(stage) // 2
        assert len(plans) == (2 if shift and config.side(stage) > window else 1)
        for made, s in zip(plans, (0, shift), strict=False):
            ids = grouping.window_ids(*places[stage].T, window, s)
            counts = np.unique(ids, return_counts=True)[1].tolist()
            seen = (made.apart == 0).sum(-1).flatten()
            seen = seen if made.places is None else seen[made.places]
            assert sorted(seen.tolist()) == sorted(np.repeat(counts, counts).tolist())
            if calls is None:
                continue
            call, tokens = next(calls), len(places[stage])
            assert [window, s, tokens] == [call[key] for key in ("window", "shift", "tokens")]
            released = grouping.released_groups(counts, window**2)
            if call["mode"] == "masking":
                assert released == [list(range(len(counts)))]
                continue
            assert call["mode"] == "grouping" and counts == call["window_counts"]
            assert released == grouping.pack(counts, call["group_size"]) == call["groups"]
            assert len(released) == call["num_groups"]
            assert [sum(counts[w] for w in g) for g in released] == call["group_fill"]
    assert calls is None or next(calls, None) is None


def check_prediction(
    fixture: Fixture, model: GreenMIM, images: Tensor, plan: MaskPlan
) -> tuple[Tensor, float]:
    """Features, prediction of all units, target; the prediction and its bound."""
    encoder, bound = model.encoder, prediction_bound(fixture, "pred")
    sites = stage_sites(encoder) | {
        "latent": (encoder.norm, "out"),
        "decoder_embed": (model.decoder_embed, "out"),
        "decoder_in": (model.decoder_blocks[0], "in"),
        "decoder_norm": (model.decoder_norm, "out"),
    }
    with torch.no_grad(), watched(sites) as found:
        prediction = predict(model, images, plan)
    check_features(found | {"decoder_pos_embed": model.decoder_pos_embed}, fixture)
    where = re.fullmatch(r"whole|pred\[(.*)\]", fixture.meta.get("pred_slice", "whole"))[1] or ":"
    part = [
        slice(*(int(n) if n else None for n in axis.strip().split(":")))
        for axis in where.split(",")
    ]
    fixture.near("pred", prediction[tuple(part)], atol=bound)
    fixture.near("pred_norm", prediction.double().norm(dim=-1), rtol=RELATIVE)
    if "pred_stat" in fixture:
        check_statistics(prediction, fixture.take("pred_stat"), RELATIVE, "pred")
    target = greenmim.patchify(images, model.config.mask_unit)
    if model.config.norm_pix_loss:
        target, _, _ = greenmim.normalize_patches(target)
    fixture.near("target_norm", target.double().norm(dim=-1), rtol=RELATIVE)
    if "target_head" in fixture:
        head = fixture.take("target_head")
        near(target[..., : head.shape[-1]], head, atol=PREDICTION)
    return prediction, bound


def check_pretraining(fixture: Fixture, *_: object) -> None:
    meta = fixture.meta
    first = "first release" in str(meta.get("model")).lower()
    first |= bool(fixture.named("loss_current_"))
    config = pretrain_config(meta["build"], "2022" if first else "2023")
    model = build(config, meta["weight_seed"])
    filled = {k: v.clone() for k, v in model.state_dict().items()}
    if first:  # the model merges by Eq. (4) always: what was read is reordered, once
        model.load_state_dict(greenmim.swap_merging(filled))
    check_state(model, fixture.told("layer_norm_eps", meta["build"].get("layer_norm_eps")), fixture)
    images = torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))
    mask, noise = check_mask(fixture, config)
    plan = plan_of(config, mask, noise)
    if not first:
        check_windows(config, plan, fixture)
    for stage, places in enumerate(coordinates(config, plan)):
        if f"coords{stage}" in fixture:
            same(places, fixture.take(f"coords{stage}"))
    for key in fixture.named("relative_position_index/"):
        window = int(key.split("/")[1])
        rows, columns = np.divmod(np.arange(window**2), window)
        assert window in [config.window(stage) for stage in range(len(config.depths))]
        full = grouping.window_ids(rows, columns, window, 0)
        full = grouping.plan_groups(rows, columns, full, window, grouping.cheapest_groups)
        same(full.index[0], fixture.take(key))

    prediction, bound = check_prediction(fixture, model, images, plan)
    if first:
        check_later_code_on_first_release(fixture, model, filled, images, plan, noise)
    else:
        corrected = GreenMIM(replace(config, release="corrected"))
        corrected.load_state_dict(filled)
        with torch.no_grad():
            fixture.near("loss_raster", corrected(images, mask)[0], rtol=LOSS)
            raster = predict(corrected, images, mask).double().norm(dim=-1)
            fixture.near("pred_raster_norm", raster, rtol=RELATIVE)

    loss, hidden = model(images, plan)
    fixture.near("loss", loss, rtol=LOSS)
    near(hidden, prediction[:, mask], atol=bound)
    loss.backward()
    groups = greenmim.parameter_groups(model, 0.05)
    for group in groups:
        names = fixture.told("decay" if group["weight_decay"] else "no_decay")
        assert names is None or sorted(names_in(model, group)) == sorted(names)
    check_training(fixture, model, groups, (0.9, 0.95))


def check_later_code_on_first_release(
    fixture: Fixture, model: GreenMIM, filled: dict[str, Tensor], images: Tensor, plan: MaskPlan,
    noise: np.ndarray,
) -> None:  # fmt: skip
    """Today's released code with the weights as they are filled, reordered, misread, too."""
    config = replace(model.config, release="2023")
    mask = np.ones(config.units**2, bool)
    mask[np.setdiff1d(np.arange(mask.size), plan.hidden)] = False
    today, later = plan_of(config, mask, noise), GreenMIM(config)
    with torch.no_grad():
        later.load_state_dict(filled)
        fixture.near("loss_current_same_weights", later(images, today)[0], rtol=LOSS)
        later.load_state_dict(model.state_dict())
        fixture.near("loss_current_permuted", later(images, today)[0], rtol=LOSS)
        mixed = replace(today, windows=plan.windows)
        name = "loss_current_permuted_legacy_coords"
        fixture.near(name, later(images, mixed)[0], rtol=LOSS)


# ── golden files: fine-tuning ───────────────────────────────────────────────────────────


def position_index(window: int) -> Tensor:
    """(w^2, w^2) row of the relative position table for each pair of places, spec 2.3."""
    places = [divmod(place, window) for place in range(window**2)]
    reach, across = window - 1, 2 * window - 1
    rows = [[(a[0] - b[0] + reach) * across + a[1] - b[1] + reach for b in places] for a in places]
    return torch.tensor(rows)


def released_file(model: GreenMIM, path: Path) -> dict[str, Tensor]:
    """Save the layout of a published file: index buffers, training state, a Namespace."""
    state = dict(model.state_dict())
    for i, depth in enumerate(model.config.depths):
        for j in range(depth):
            key = f"encoder.layers.{i}.blocks.{j}.attn.relative_position_index"
            state[key] = position_index(model.config.window(i))
    args = argparse.Namespace(model="green_mim_swin_base_patch4_dec512b1", epochs=800)
    torch.save({"model": state, "optimizer": {}, "epoch": 0, "scaler": {}, "args": args}, path)
    return state


def load(
    make: Callable[[], nn.Module], path: str | Path, release: str | None = None,
    fresh_head: bool = False,
) -> tuple[nn.Module, str]:  # fmt: skip
    file = data.read_checkpoint(path)
    return greenmim.load_weights(make, str(path), file, release, fresh_head)


def without_buffers(names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith(greenmim.INDEX_BUFFERS)}


def transferred(fixture: Fixture, make: Callable[[], nn.Module], path: Path) -> SwinClassifier:
    """The classifier with the weights of a pre-training file of the stored build, head filled."""
    meta = fixture.meta
    source = build(pretrain_config(meta["pretrain_build"], "2023"), meta["weight_seed"])
    saved = released_file(source, path)
    used = {f"encoder.{k}" for k in greenmim.swin_names(saved)}
    unused = fixture.told("pretrain_keys_not_used")
    assert unused is None or saved.keys() - used == set(unused)
    model, said = load(make, path, fresh_head=True)
    parameters = dict(model.named_parameters())
    tables = {k for k, p in parameters.items()
              if f"encoder.{k}" in used and p.shape != saved[f"encoder.{k}"].shape}  # fmt: skip
    assert tables == set(fixture.told("interpolated", tables))
    assert not fixture.told("unexpected_keys", [])
    assert f"{len(tables)} relative position tables interpolated" in said and "head" in said
    head = {"head.weight", "head.bias"}
    assert without_buffers(fixture.told("missing_keys", head)) == head
    with torch.no_grad():
        for name in head:
            p = parameters[name]
            p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), meta["weight_seed"])))
    return model


def check_finetuning(fixture: Fixture, tmp_path: Path) -> None:
    meta, b = fixture.meta, fixture.meta["build"]
    config = ModelConfig(
        b["img_size"], b["patch_size"], b["embed_dim"], tuple(b["depths"]),
        tuple(b["num_heads"]), b["window_size"], b["mlp_ratio"],
    )  # fmt: skip
    classes, smoothing = b["num_classes"], 0.1
    make = partial(SwinClassifier, config, classes, b["drop_path_rate"])
    if "pretrain_build" in meta:
        model = transferred(fixture, make, tmp_path / "checkpoint-799.pth").eval()
    else:
        model = fill(make(), meta["weight_seed"]).eval()
    check_state(model, fixture.told("layer_norm_eps"), fixture)

    a, c = (torch.tensor(meta[f"labels_{key}"]) for key in "ab")
    target = meta["lam"] * augment.smooth_one_hot(a, classes, smoothing)
    target = target + (1 - meta["lam"]) * augment.smooth_one_hot(c, classes, smoothing)
    if "target" in fixture:
        stored = fixture.take("target")
        near(target[:, : stored.shape[1]], stored, atol=1e-6)

    images = torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))
    sites = {"patch_embed": (model.patch_embed, "out"), "norm": (model.norm, "out")}
    sites |= stage_sites(model) | {"pooled": (model.head, "in")}
    with watched(sites) as found:
        logits = model(images)
    check_features(found, fixture)
    fixture.near("logits", logits, atol=prediction_bound(fixture, "logits"))
    loss = F.cross_entropy(logits, target)
    fixture.near("loss", loss, rtol=LOSS)
    loss.backward()

    groups = greenmim.parameter_groups(model, 0.05, config.depths, meta["layer_decay"])
    ours = {
        name: [1e-3 * group["lr_scale"], group["weight_decay"]]
        for group in groups
        for name in names_in(model, group)
    }
    stored = fixture.told("step_groups", ours)
    assert ours.keys() == stored.keys()
    for name, group in stored.items():
        assert ours[name] == pytest.approx(group, rel=1e-12), name
    check_training(fixture, model, groups, (0.9, 0.999))


# ── golden files: tables and recipes ────────────────────────────────────────────────────


def check_interpolation(fixture: Fixture, *_: object) -> None:
    key = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    for case in fixture.meta["cases"]:
        rows, target = ((2 * case[f"{k}_window"] - 1) ** 2 for k in ("source", "target"))
        table = torch.from_numpy(parameter(key, (rows, case["heads"]), case["seed"]))
        fixture.near(f"out{case['index']}", greenmim.resize_bias_table(table, target), atol=1e-6)


def model_named(text: str) -> ModelConfig:
    """ "base_win7", "swin_large win14": the recipes name models by size and window."""
    size, window = re.search(r"(base|large)[ _]win(\d+)", text).groups()
    return greenmim.MODELS[f"swin_{size[0]}" + (f"_win{window}" if window != "7" else "")]


def check_recipe(fixture: Fixture, *_: object) -> None:
    for schedule in fixture.told("pretrain_schedules", []):
        check_pretrain_schedule(fixture, schedule)
    for name, stored in fixture.told("pretrain_weight_decay", {}).items():
        if not name.startswith("twins"):  # that backbone is not implemented
            check_decay(on_meta(partial(GreenMIM, model_named(name))), stored)
    recipes = fixture.told("finetune", [])
    for stored in recipes:
        check_finetune_schedule(fixture, stored)
    for name, layers in fixture.told("finetune_layer_map", {}).items():
        check_layer_map(model_named(name), recipes, layers)
    check_key_map(fixture)
    for command in ("pretrain", "finetune"):
        if stored := fixture.told(f"{command}_optimizer"):
            check_optimizer(command, dict(stored))


def check_pretrain_schedule(fixture: Fixture, stored: dict) -> None:
    k, peak, batch = stored["index"], stored["peak_lr"], stored["total_batch"]
    assert peak == pytest.approx(stored["base_lr"] * batch / 256)
    epochs = fixture.arrays.pop(f"pretrain{k}_epoch", None)
    if epochs is None or f"pretrain{k}_lr" not in fixture:
        return
    run = before_training(
        "pretrain", data_path=f"drawn:{7 * batch}", batch_size=batch, blr=stored["base_lr"],
        min_lr=stored["min_lr"], warmup_epochs=stored["warmup_epochs"], epochs=stored["epochs"],
    )  # fmt: skip
    assert len(run["loader"]) == 7
    rates = fixture.take(f"pretrain{k}_lr")
    near([run["schedule"](7 * e, 1.0) for e in epochs], rates, rtol=1e-9, atol=1e-18)
    near([run["schedule"](7 * e, 0.3) for e in epochs], 0.3 * rates, rtol=1e-9, atol=1e-18)


def check_decay(model: GreenMIM, stored: dict) -> None:
    sizes = {"decay": 0, "no_decay": 0}
    for group in greenmim.parameter_groups(model, 0.05):
        key = "decay" if group["weight_decay"] else "no_decay"
        assert group["weight_decay"] in (0.05, 0) and group["lr_scale"] == 1
        sizes[key] += sum(p.numel() for p in group["params"])
        assert key not in stored or set(names_in(model, group)) == set(stored[key])
    assert sizes == {key: stored.get(f"{key}_numel", sizes[key]) for key in sizes}
    frozen = model.state_dict().keys() - dict(model.named_parameters()).keys()
    assert frozen == set(stored.get("frozen", frozen))


def check_finetune_schedule(fixture: Fixture, stored: dict) -> None:
    k, train, swin = stored["index"], stored["config"]["TRAIN"], stored["config"]["MODEL"]
    batch, iterations = stored["total_batch"], stored["iterations_per_epoch"]
    names = {"BASE_LR": "blr", "WARMUP_LR": "warmup_lr", "MIN_LR": "min_lr"}
    flags = {name: float(train[key]) for key, name in names.items()}
    flags |= {"warmup_epochs": train["WARMUP_EPOCHS"], "epochs": train["EPOCHS"]}
    depths, decay = tuple(swin["SWIN"]["DEPTHS"]), stored["layer_decay"]
    assert decay == train["LAYER_DECAY"]
    run = before_training(
        "finetune", data_path=f"drawn:{iterations * batch}", batch_size=batch, **flags
    )
    assert len(run["loader"]) == iterations
    scaled = [stored[f"{key}_lr_scaled"] for key in ("base", "warmup", "min")]
    assert [rate * batch / 512 for rate in list(flags.values())[:3]] == pytest.approx(scaled)

    last = sum(depths) + 1
    scales = [decay ** (last - i) for i in range(last + 1)]
    first = [run["schedule"](0, scale) for scale in scales]
    assert first == pytest.approx(stored["lr_before_first_update"] * (last + 1), rel=1e-12)
    updates = fixture.arrays.pop(f"finetune{k}_update", None)
    if updates is not None and f"finetune{k}_lr" in fixture:
        # The stored number counts updates done, ours the update to come.
        ours = [[run["schedule"](int(u) + 1, scale) for scale in scales] for u in updates]
        near(ours, fixture.take(f"finetune{k}_lr"), rtol=1e-9, atol=1e-18)
    config = replace(TEST, input_size=224, depths=depths, num_heads=(1,) * len(depths))
    model = on_meta(lambda: SwinClassifier(config, 10, swin["DROP_PATH_RATE"]))
    blocks = [block.drop_path for layer in model.layers for block in layer.blocks]
    fixture.near(f"finetune{k}_drop_path", blocks, atol=1e-7)


def check_layer_map(config: ModelConfig, recipes: list[dict], layers: dict) -> None:
    """`layers`: parameter -> [layer id, learning rate scale, weight decay]."""
    decays = {r["layer_decay"] for r in recipes if model_named(r["name"]) == config}
    model = on_meta(lambda: SwinClassifier(config, 1000))
    (decay,) = decays
    found = {}
    for group in greenmim.parameter_groups(model, 0.05, config.depths, decay):
        for name in names_in(model, group):
            layer = greenmim.layer_id(name, config.depths)
            found[name] = [layer, group["lr_scale"], group["weight_decay"]]
    assert found.keys() == layers.keys()
    for name, stored in layers.items():
        assert found[name] == pytest.approx(stored, rel=1e-12), name


def check_key_map(fixture: Fixture) -> None:
    """Every key of a pre-training file, and where fine-tuning puts it."""
    if stored := fixture.told("key_map"):
        keys = list(stored)
        marked = greenmim.swin_names({key: torch.tensor(i) for i, key in enumerate(keys)})
        taken = {keys[int(marker)]: key for key, marker in marked.items()}
        assert {key: taken.get(key) for key in keys} == stored
        own = on_meta(lambda: SwinClassifier(greenmim.MODELS["swin_b"], 1000)).state_dict().keys()
        fresh = own - marked.keys()
        assert fresh == without_buffers(fixture.told("fresh_keys", fresh))


def check_optimizer(command: str, stored: dict) -> None:
    optimizer = before_training(command)["parts"]["optimizer"]
    assert stored.pop("name") == type(optimizer).__name__
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0, stored.pop("weight_decay")}
    assert greenmim.configure(command).clip_grad == stored.pop("clip_grad", None)
    ours = {key: optimizer.defaults[key] for key in stored}
    assert ours == stored | {"betas": tuple(stored["betas"])}


# ── golden files: one test each ─────────────────────────────────────────────────────────


def unknown(fixture: Fixture, *_: object) -> None:
    pytest.fail(f"no check for a fixture with the keys {sorted(fixture.meta)}")


def kind_of(meta: dict) -> tuple[Callable, list]:
    """The check for a file, and marks, by what `meta` describes."""
    b, recipe = meta.get("build", {}), ("pretrain_schedules", "finetune_layer_map", "key_map")
    encoder, marks = b.get("encoder", b), []
    case = meta["cases"][0] if meta.get("cases") else {}
    if encoder.get("img_size", 0) >= 224 and encoder.get("embed_dim", 0) >= 96:
        marks.append(pytest.mark.slow)
    if b.get("kind") == "twins":
        marks.append(pytest.mark.skip(reason="the Twins backbone is not implemented"))
    elif b.get("kind") == "swin" and "mask_ratio" in meta:
        return check_pretraining, marks
    elif "num_classes" in b:
        return check_finetuning, marks
    elif any(key in meta for key in recipe):
        return check_recipe, marks
    elif "source_window" in case:
        return check_interpolation, marks
    elif "capacity_limit" in case:
        marks.append(pytest.mark.skip(reason="window counts: see tests/test_grouping.py"))
    return unknown, marks


def golden_cases() -> list:
    params = []
    for path in golden_files("greenmim"):
        check, marks = kind_of(Fixture(path).meta)
        params.append(pytest.param(path, check, marks=marks, id=path.stem))
    return params


@pytest.mark.parametrize(("path", "check"), golden_cases())
def test_golden_greenmim(path: Path, check: Callable, tmp_path: Path) -> None:
    fixture = Fixture(path)
    check(fixture, tmp_path)
    fixture.finish()


# ── masks and plans ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", [2, 3, 6, 7, 12])
@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.5, 0.6, 0.75])
def test_mask_hides_all_but_the_smallest_noise(side: int, ratio: float) -> None:
    noise = np.random.default_rng(side).random(side**2)
    mask = greenmim.random_mask(noise, ratio)
    assert mask.shape == (side**2,) and mask.dtype == bool
    assert (~mask).sum() == int(side**2 * (1 - ratio))
    assert noise[~mask].max() < noise[mask].min()


def test_mask_counts_of_the_paper() -> None:
    noise = np.random.default_rng(0).random(49)
    visible = {ratio: int((~greenmim.random_mask(noise, ratio)).sum()) for ratio in (0.75, 0.6)}
    assert visible == {0.75: 12, 0.6: 19}  # spec, section 3
    config = greenmim.MODELS["swin_b"]
    plan = greenmim.draw_plan(config, 0.75, (0, 0, 0))
    tokens = [len(plan.patches), *(len(merge) // 4 for merge in plan.merges)]
    assert tokens == [768, 192, 48, 12] and len(plan.hidden) == 37


def parts(plan: object) -> list[object]:
    """The arrays of a plan, in order."""
    if is_dataclass(plan):
        return [part for field in fields(plan) for part in parts(getattr(plan, field.name))]
    return [part for item in plan for part in parts(item)] if isinstance(plan, list) else [plan]


def test_drawn_plan_is_a_function_of_its_seed_alone() -> None:
    np.random.seed(0)  # noqa: NPY002 - the global stream must neither matter nor move
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (greenmim.draw_plan(TEST, 0.6, (0, 5, 1)) for _ in range(2))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    same_parts = [np.array_equal(a, b) for a, b in zip(parts(first), parts(again), strict=True)]
    assert all(same_parts) and len(same_parts) == 1 + 2 + 2 + 4 * 6
    others = [greenmim.draw_plan(TEST, 0.6, seed) for seed in ((1, 5, 1), (0, 6, 1), (0, 5, 2))]
    hidden = {tuple(plan.hidden.tolist()) for plan in (first, *others)}
    assert len(hidden) == 4
    drawn = [greenmim.draw_plan(TEST, 0.5, (0, step)).hidden for step in range(400)]
    shares = np.bincount(np.concatenate(drawn), minlength=TEST.units**2) / len(drawn)
    assert np.abs(shares - 0.5).max() < 0.1  # four standard errors


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 0.98, 1.0, 1.5])
def test_a_ratio_without_visible_or_hidden_units_is_an_error(ratio: float) -> None:
    with pytest.raises(InputError, match="mask_ratio"):
        greenmim.draw_plan(TEST, ratio, (0,))


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 0.98, 1.0, 1.5, math.nan, math.inf])
def test_a_flag_with_such_a_ratio_is_one_sentence(
    ratio: float, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--model", "test", "--device", "cpu", f"--mask_ratio={ratio}"]
    assert greenmim.main(["pretrain", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "mask_ratio" in said


@pytest.mark.parametrize(("ratio", "visible"), [(0.07, 14), (0.5, 8), (0.93, 1)])
def test_a_ratio_with_one_unit_of_each_kind_is_fine(ratio: float, visible: int) -> None:
    plan = greenmim.draw_plan(TEST, ratio, (0,))
    assert len(plan.hidden) == TEST.units**2 - visible


def test_noise_decides_the_order_of_latents_of_released_code_only() -> None:
    noise = np.random.default_rng(3).random(TEST.units**2)
    mask = greenmim.random_mask(noise, 0.5)
    rank, count = np.argsort(np.argsort(noise))[~mask], (~mask).sum()
    for release, expected in (("corrected", range(count)), ("2023", rank), ("2022", rank)):
        plan = greenmim.plan_mask(replace(TEST, release=release), mask, noise)
        assert plan.restore[~mask].tolist() == list(expected)
        assert sorted(plan.restore[mask].tolist()) == list(range(count, mask.size))


def test_released_orders_need_the_noise() -> None:
    mask = some_mask(TEST)
    for release in ("2023", "2022"):
        config = replace(TEST, release=release)
        with pytest.raises(ValueError, match=rf"release {release}.*noise"):
            greenmim.plan_mask(config, mask)
        with pytest.raises(ValueError, match=rf"release {release}.*noise"):
            GreenMIM(config)(pictures(config), mask)
        plan = plan_of(config, mask, np.arange(mask.size))
        assert GreenMIM(config)(pictures(config), plan)[0].isfinite()


@pytest.mark.parametrize("release", ["corrected", "2023", "2022"])
@pytest.mark.parametrize(("hidden", "said"), [(True, "nothing visible"), (False, "hides nothing")])
def test_masks_of_one_kind_are_refused(hidden: bool, said: str, release: str) -> None:
    config = replace(TEST, release=release)
    model, mask = GreenMIM(config), np.full(config.units**2, hidden)
    with pytest.raises(ValueError, match=said):
        model(pictures(config), mask)
    if not hidden:  # an encoder's plan, but nothing to learn from
        with pytest.raises(ValueError, match=said):
            model(pictures(config), plan_of(config, mask))


def test_masks_and_images_of_another_size_are_refused() -> None:
    model = GreenMIM(TEST)
    with pytest.raises(ValueError, match=r"9 units.*16"):
        model(pictures(TEST), np.arange(9) < 5)
    with pytest.raises(ValueError, match=r"96.*64 px"):
        model(torch.zeros(1, 3, 96, 96), some_mask(TEST))
    with pytest.raises(ValueError, match="64 px"):
        model(torch.zeros(1, 3, 64, 96), some_mask(TEST))


def test_merging_goes_through_blocks_in_raster_order() -> None:
    visible = np.zeros((4, 6), bool)
    visible[:2, 2:] = visible[2:, :2] = True  # three of six blocks
    number = {(r, c): n for n, (r, c) in enumerate(zip(*np.nonzero(visible), strict=True))}
    blocks = [(0, 2), (0, 4), (2, 0)]
    slow = [number[r + dr, c + dc] for r, c in blocks for dc in (0, 1) for dr in (0, 1)]
    assert greenmim.plan_merge(visible).tolist() == slow


def test_coordinates_of_the_first_release() -> None:  # spec, section 8.3
    res, k, units = 28, 4, 7
    rows, columns = np.divmod(np.arange(res**2), res)
    ours = greenmim.misread_coordinates(rows, columns, k, res)
    for r, c, row, column in zip(rows, columns, *ours, strict=True):
        n = ((r // k) * units + c // k) * k * k + (r % k) * k + (c % k)
        assert (row, column) == (n // res, n % res)
    same(greenmim.misread_coordinates(rows, columns, 1, res), (rows, columns))
    noise = np.random.default_rng(0).random(TEST.units**2)
    mask = greenmim.random_mask(noise, 0.5)
    right, wrong = (plan_of(replace(TEST, release=r), mask, noise) for r in ("2023", "2022"))
    pairs = zip(right.windows, wrong.windows, strict=True)
    alike = [all(map(same_arrays, *pair)) for pair in pairs]
    assert alike == [True, False, True]  # the first and the last stage are right
    assert all(map(torch.equal, right.merges, wrong.merges))


def same_arrays(a: object, b: object) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(parts(a), parts(b), strict=False))


# ── what must and what must not change the output ───────────────────────────────────────


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """(B, U, P) patches as (row, column, channel) -> (B, 3, H, W)."""
    side = math.isqrt(patches.shape[1])
    x = patches.reshape(-1, side, side, size, size, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, 3, side * size, side * size)


@pytest.mark.parametrize("release", ["corrected", "2023", "2022"])
def test_hidden_pixels_change_nothing(release: str) -> None:
    config = replace(TEST, release=release)
    model, mask = build(config).eval(), some_mask(config)
    plan, images = plan_of(config, mask, np.arange(mask.size)[::-1]), pictures(config)
    patches = greenmim.patchify(images, config.mask_unit)
    outputs = []
    for touched in ([], np.flatnonzero(mask), np.flatnonzero(~mask)[-1:]):
        changed = patches.clone()
        changed[:, touched] = 100 * torch.randn(2, len(touched), patches.shape[-1])
        other = unpatchify(changed, config.mask_unit)
        with torch.no_grad():
            outputs.append((model.encoder(other, plan), predict(model, other, plan)))
    (latent, prediction), hidden, visible = outputs
    assert torch.equal(hidden[0], latent) and torch.equal(hidden[1], prediction)
    assert not torch.equal(visible[0], latent) and not torch.equal(visible[1], prediction)


def swin_attention(x: Tensor, get: Callable[[str], Tensor], heads: int, shifts: tuple[int, int]
                   ) -> Tensor:  # fmt: skip
    """Shifted-window attention of Swin over a map (B, h, w, C): pad to whole windows, roll, cut,
    mask what the roll brought together, and the padding."""
    table = get("attn.relative_position_bias_table")
    window, (batch, *sides, dim) = (math.isqrt(len(table)) + 1) // 2, x.shape
    n, m = (-(-side // window) for side in sides)
    padded = F.pad(x, (0, 0, 0, m * window - sides[1], 0, n * window - sides[0]))

    def cut(maps: Tensor) -> Tensor:
        maps = maps.roll([-s for s in shifts], (1, 2))
        maps = maps.reshape(len(maps), n, window, m, window, -1)
        return maps.transpose(2, 3).reshape(len(maps), n * m, window**2, -1)

    # Before the roll, tokens are told apart by whether they come round from the other edge.
    edges = [(torch.arange(k * window) < s).long() for k, s in zip((n, m), shifts, strict=True)]
    region = 2 * edges[0][:, None] + edges[1]
    region[sides[0] :], region[:, sides[1] :] = 4, 4
    region = cut(region[None, :, :, None])[0, ..., 0]
    qkv = F.linear(cut(padded), get("attn.qkv.weight"), get("attn.qkv.bias"))
    qkv = qkv.reshape(batch, n * m, window**2, 3, heads, dim // heads).permute(3, 0, 1, 4, 2, 5)
    logits = qkv[0] @ qkv[1].transpose(-2, -1) * (dim // heads) ** -0.5
    logits = logits + table[position_index(window)].permute(2, 0, 1)
    apart = region[:, :, None] != region[:, None]
    logits = logits.masked_fill(apart[None, :, None], -100.0)
    x = (logits.softmax(-1) @ qkv[2]).transpose(2, 3)
    x = x.reshape(batch, n, m, window, window, dim).transpose(2, 3)
    x = x.reshape(batch, n * window, m * window, dim).roll(shifts, (1, 2))
    x = x[:, : sides[0], : sides[1]]
    return F.linear(x, get("attn.proj.weight"), get("attn.proj.bias"))


def dense_maps(encoder: SwinEncoder, eps: float, images: Tensor) -> list[Tensor]:
    """(B, 3, H, W) -> (B, h, w, C) of every stage, before merging, and the last after the norm:
    Swin V1 over whole maps, written from its definition, float64."""
    config, found = encoder.config, []
    state = {k: v.double() for k, v in encoder.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images.double(), weight, bias, stride=config.patch_size).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            get = lambda key, name=name: state[f"{name}.{key}"]  # noqa: E731
            rows = len(get("attn.relative_position_bias_table"))
            window = (math.isqrt(rows) + 1) // 2
            shifts = tuple(window // 2 if j % 2 and side > window else 0 for side in x.shape[1:3])
            y = norm(x, f"{name}.norm1")
            x = x + swin_attention(y, get, config.num_heads[i], shifts)
            y = F.linear(norm(x, f"{name}.norm2"), get("mlp.fc1.weight"), get("mlp.fc1.bias"))
            x = x + F.linear(F.gelu(y), get("mlp.fc2.weight"), get("mlp.fc2.bias"))
        found.append(x)
        if i < len(config.depths) - 1:
            x = [x[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = norm(torch.cat(x, -1), f"layers.{i}.downsample.norm")
            x = F.linear(x, state[f"layers.{i}.downsample.reduction.weight"])
    return [*found, norm(x, "norm")]


def dense_swin(encoder: SwinEncoder, eps: float, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, N, C)"""
    return dense_maps(encoder, eps, images)[-1].flatten(1, 2)


DENSE = {
    "window_4": replace(TEST, window_size=4),
    "window_2": replace(TEST, window_size=2),
    "window_8": replace(TEST, window_size=8),
    "window_1": replace(TEST, window_size=1),
    "larger_than_the_map": replace(TEST, window_size=16),
    "96_px_window_3": replace(TEST, input_size=96, window_size=3),
    "96_px_window_6": replace(TEST, input_size=96, window_size=6),
    "160_px_window_5": replace(TEST, input_size=160, window_size=5),
    "four_stages": replace(
        TEST, input_size=128, depths=(1, 2, 3, 2), num_heads=(1, 1, 2, 4), window_size=4
    ),
}


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE.keys())
def test_nothing_masked_is_dense_swin(config: ModelConfig) -> None:
    images = pictures(config)
    encoder = fill(SwinEncoder(config), 1).eval()
    classifier = fill(SwinClassifier(config, 5), 2).eval()
    with torch.no_grad():
        near(encoder(images).double(), dense_swin(encoder, 1e-6, images).numpy(), atol=1e-5)
        nothing = plan_of(config, np.zeros(config.units**2, bool))
        assert torch.equal(encoder(images), encoder(images, nothing))
        pooled = dense_swin(classifier, 1e-5, images).mean(1)
        weight, bias = (p.double() for p in classifier.head.parameters())
        near(classifier(images).double(), F.linear(pooled, weight, bias).numpy(), atol=1e-5)


SIZES = [(64, 96), (32, 160), (160, 32), (16, 16), (16, 112), (80, 48), (128, 96), (208, 64)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 16])
def test_maps_of_any_size_are_dense_swin(window: int, size: tuple[int, int]) -> None:
    """Windows that divide no map, maps smaller than the window, axes of which one is shifted."""
    encoder = fill(SwinEncoder(replace(TEST, window_size=window)), 1).eval()
    images = torch.from_numpy(filled_images((2, 3, *size), 3))
    with torch.no_grad():
        maps, flat = encoder.maps(images), encoder(images)
    *dense, last = dense_maps(encoder, 1e-6, images)
    assert encoder.channels == [16, 32, 64] and encoder.strides == [4, 8, 16]
    for x, wanted, c, stride in zip(maps, dense, encoder.channels, encoder.strides, strict=True):
        assert x.shape == (2, c, size[0] // stride, size[1] // stride)
        near(x, wanted.permute(0, 3, 1, 2), atol=1e-5 * wanted.abs().max().item())
    near(flat, last.flatten(1, 2), atol=2e-5)


@pytest.mark.parametrize("make", [SwinEncoder, partial(SwinClassifier, num_classes=5)])
def test_maps_are_the_stages(make: Callable[[ModelConfig], SwinEncoder]) -> None:
    encoder = fill(make(TEST), 1).eval()
    for side in (64, 96):
        images = torch.from_numpy(filled_images((2, 3, side, side), 3))
        with torch.no_grad():
            maps, stages = encoder.maps(images), encoder.stages(images)
        assert [x.shape[-1] for x in maps] == [side // 4, side // 8, side // 16]
        for x, tokens in zip(maps, stages, strict=True):
            assert torch.equal(x.flatten(2).transpose(1, 2), tokens)


def test_rows_of_the_map_are_rows_of_the_image() -> None:
    encoder = fill(SwinEncoder(replace(TEST, window_size=1)), 1).eval()  # no token sees another
    images = torch.from_numpy(filled_images((1, 3, 32, 96), 3))
    changed = images.clone()
    changed[..., 16:, 80:] += 1
    with torch.no_grad():
        pairs = zip(encoder.maps(images), encoder.maps(changed), strict=True)
        moved = [(a != b).any(1)[0].nonzero().amin(0).tolist() for a, b in pairs]
    assert moved == [[4, 20], [2, 10], [1, 5]]


def test_index_plans_are_kept_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, planned = SwinEncoder(TEST), []
    real = greenmim.plan_mask
    monkeypatch.setattr(greenmim, "plan_mask", lambda c, m: planned.append(m.shape) or real(c, m))
    for size in ((64, 96), (96, 64), (64, 96), (64, 64), (64, 64), (96, 64)):
        encoder.maps(torch.zeros(1, 3, *size))
    assert planned == [(4, 6), (6, 4), (4, 4)]
    assert encoder.dense_plan(64, 96, CPU) is encoder.dense_plan(64, 96, CPU)
    assert not [k for k in encoder.state_dict() if "plan" in k]


@pytest.mark.parametrize("size", [(72, 64), (64, 72), (8, 64), (40, 40)])
def test_sizes_that_the_stride_does_not_divide_are_refused(size: tuple[int, int]) -> None:
    encoder = SwinEncoder(TEST)
    for refuse in (lambda: encoder.dense_plan(*size, CPU),
                   lambda: encoder.maps(torch.zeros(1, 3, *size))):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} px: 16 must divide"):
            refuse()
    assert not encoder.dense_plans


def test_maps_let_gradients_through() -> None:
    encoder = fill(SwinEncoder(TEST), 1)
    images = torch.from_numpy(filled_images((1, 3, 32, 96), 3)).requires_grad_()
    sum(x.square().mean() for x in encoder.maps(images)).backward()
    unused = {"norm.weight", "norm.bias"}
    assert {n for n, p in encoder.named_parameters() if p.grad is None} == unused
    assert images.grad.abs().amin((0, 1)).min() > 0


@pytest.mark.parametrize("release", ["2023", "2022"])
def test_an_encoder_without_a_plan_is_right_whatever_the_release(release: str) -> None:
    right = fill(SwinEncoder(TEST), 1).eval()
    other = fill(SwinEncoder(replace(TEST, release=release)), 1).eval()
    for size in ((64, 64), (32, 96)):
        images = torch.from_numpy(filled_images((2, 3, *size), 3))
        with torch.no_grad():
            assert torch.equal(other(images), right(images))
            near(other(images), dense_swin(right, 1e-6, images), atol=1e-5)


def run_with(
    sizing: grouping.Sizing, config: ModelConfig, mask: np.ndarray
) -> tuple[MaskPlan, Tensor, Tensor, dict[str, Tensor]]:
    """Plan by `sizing`, loss, predictions and gradients of a filled model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "cheapest_groups", lambda c, area, cost: sizing(c, area))
        plan = plan_of(config, mask)
    model = build(config)
    loss, prediction = model(pictures(config), plan)
    loss.backward()
    return plan, loss, prediction, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("ratio", [0.6, 0.2])
@pytest.mark.parametrize("sizing", SIZINGS.values(), ids=SIZINGS.keys())
def test_any_plan_gives_the_same_output(sizing: grouping.Sizing, ratio: float) -> None:
    mask = some_mask(TEST, ratio)
    made, loss, prediction, gradients = run_with(sizing, TEST, mask)
    _, loss0, prediction0, gradients0 = run_with(SIZINGS["one_group"], TEST, mask)
    for stage, places in enumerate(coordinates(TEST, made)):
        window = TEST.window(stage)
        for plan, s in zip(made.windows[stage], (0, window // 2), strict=False):
            ids = grouping.window_ids(*places.T, window, s)
            counts = np.unique(ids, return_counts=True)[1].tolist()
            assert len(plan.apart) == len(sizing(counts, window**2))
    near(loss, loss0.detach().numpy(), rtol=1e-6)
    near(prediction, prediction0.detach().numpy(), atol=1e-5)
    for name, gradient in gradients.items():
        if not name.endswith("qkv.bias"):  # its key third is rounding noise
            scale = gradients0[name].norm().item()
            near(gradient, gradients0[name].numpy(), atol=1e-5 * scale, message=name)


def test_padding_gives_no_nan_and_gets_no_gradient() -> None:
    rows, columns = np.divmod(np.flatnonzero(np.random.default_rng(4).random(100) < 0.4), 10)
    ids = grouping.window_ids(rows, columns, 3, 1)
    made = grouping.plan_groups(rows, columns, ids, 3, lambda c, _: [[w] for w in range(len(c))])
    plan = greenmim.to_device(made, CPU)
    padding = np.setdiff1d(np.arange(len(made.slots)), made.places)
    assert len(padding) > 20
    attention = fill(greenmim.GroupWindowAttention(8, 2, 3), 0)
    x = torch.randn(2, len(ids), 8, requires_grad=True)
    out = attention(x, plan)
    assert out.isfinite().all()

    # Padding repeats a token; what stands in it must reach no output.
    slots = plan.slots.clone()
    slots[padding] = len(ids) - 1
    assert torch.equal(attention(x, replace(plan, slots=slots)), out)

    # Tokens of other windows than the first token's know nothing of it.
    out[:, ids != ids[0]].square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert not x.grad[:, ids == ids[0]].any()
    dr, dc = (a[:, None] - a[None] for a in (rows, columns))
    pairs = (ids[:, None] == ids[None]) & (ids != ids[0])[:, None]
    used = np.unique(((dr + 2) * 5 + dc + 2)[pairs])
    table = attention.relative_position_bias_table.grad
    assert table.isfinite().all() and not table[np.setdiff1d(np.arange(25), used)].any()
    assert table[used].any(1).all()


@pytest.mark.parametrize("kind", ["pretrain", "classify", "recompute"])
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    images = pictures(TEST)
    if kind == "classify":
        model = SwinClassifier(TEST, 5, drop_path=0.0)
        loss = F.cross_entropy(model(images), torch.tensor([0, 3]))
    else:
        model = GreenMIM(TEST)
        for layer in model.encoder.layers:
            layer.grad_checkpoint = kind == "recompute"
        loss, _ = model(images, some_mask(TEST))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any(), name
        assert p.grad.isfinite().all(), name


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = build(TEST).train()
        for layer in model.encoder.layers:
            layer.grad_checkpoint = recompute
        model(pictures(TEST), some_mask(TEST))[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_batch_shares_its_mask_and_nothing_else() -> None:
    model, images, mask = build(TEST).eval(), pictures(TEST, 3), some_mask(TEST)
    with torch.no_grad():
        together = predict(model, images, mask)
        alone = torch.cat([predict(model, image[None], mask) for image in images])
        losses = [model(image[None], mask)[0] for image in images]
        near(model(images, mask)[0], torch.stack(losses).mean().numpy(), rtol=1e-6)
    near(together, alone.numpy(), atol=1e-5)


def test_masks_of_any_type_are_accepted() -> None:
    model, images, mask = build(TEST).eval(), pictures(TEST), some_mask(TEST)
    square = mask.reshape(TEST.units, TEST.units)
    accepted = [mask, torch.from_numpy(mask), square, mask.astype(np.float32), plan_of(TEST, mask)]
    with torch.no_grad():
        losses = [model(images, m)[0].item() for m in accepted]
    assert len(set(losses)) == 1


# ── loss, initialisation, drop path ─────────────────────────────────────────────────────


@pytest.mark.parametrize("normalised", [True, False])
def test_loss_by_hand(normalised: bool) -> None:
    config = replace(TEST, norm_pix_loss=normalised)
    model, images, mask = build(config), pictures(config), some_mask(config)
    with torch.no_grad():
        loss, hidden = model(images, mask)
        prediction = predict(model, images, mask).numpy().astype(np.float64)
    size, total, scored = config.mask_unit, 0.0, 0
    for b, image in enumerate(images.numpy().astype(np.float64)):
        for unit in np.flatnonzero(mask):
            top, left = (size * k for k in divmod(unit, config.units))
            patch = np.array([
                image[c, top + y, left + x] for y in range(size) for x in range(size)
                for c in range(3)
            ])  # fmt: skip
            if normalised:
                patch -= patch.mean()
                patch /= np.sqrt((patch**2).sum() / (len(patch) - 1) + 1e-6)
            total += ((prediction[b, unit] - patch) ** 2).mean()
            scored += 1
    assert loss.item() == pytest.approx(total / scored, rel=1e-6)
    assert scored == 2 * mask.sum() and hidden.shape == (2, mask.sum(), 3 * size**2)


def test_patches_come_apart_and_together() -> None:
    images = torch.randn(2, 3, 12, 12)
    patches = greenmim.patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert patches[1, 5, (2 * 4 + 3) * 3 + 1] == images[1, 1, 4 + 2, 8 + 3]
    assert torch.equal(unpatchify(patches, 4), images)
    normalised, mean, deviation = greenmim.normalize_patches(patches)
    near(normalised * deviation + mean, patches.numpy(), atol=1e-5)


def test_one_batch_can_be_learned() -> None:
    torch.manual_seed(0)
    model, images, mask = GreenMIM(TEST), pictures(TEST, 4), some_mask(TEST)
    plan = plan_of(TEST, mask)
    groups = greenmim.parameter_groups(model, 0.0)
    optimizer, losses = torch.optim.AdamW(groups, 3e-3), []
    for _ in range(150):
        loss, _ = model(images, plan)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and losses[-1] < 0.1


def uniform_in(x: Tensor, bound: float) -> bool:
    """Within the bound, and filling it as a uniform draw of this size does."""
    spread = x.std() * math.sqrt(3) / bound
    return bool(x.abs().max() <= bound * 1.0001) and abs(spread - 1) < 3 / math.sqrt(x.numel())


def check_biases_and_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()


def test_initialisation_for_pre_training() -> None:  # spec, section 5
    torch.manual_seed(0)
    model = GreenMIM(replace(greenmim.MODELS["swin_t"], depths=(2, 2, 2, 2)))
    check_biases_and_norms(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 4 * 8 + 3 + 4 + 2  # blocks, merging, decoder block, decoder
    for module in linear:
        assert uniform_in(module.weight, math.sqrt(6 / sum(module.weight.shape))), module
    proj = model.encoder.patch_embed.proj
    assert uniform_in(proj.weight, math.sqrt(6 / (96 + 48)))
    assert uniform_in(proj.bias, 1 / math.sqrt(48))
    tables = [p.flatten() for n, p in model.named_parameters() if n.endswith("bias_table")]
    assert torch.cat(tables).std().item() == pytest.approx(0.02, rel=0.03)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(torch.cat(tables).mean()) < 1e-3 and abs(model.mask_token.mean()) < 4e-3


def test_initialisation_of_the_classifier() -> None:
    torch.manual_seed(0)
    model = SwinClassifier(replace(greenmim.MODELS["swin_t"], depths=(1, 1, 1, 1)), 100)
    check_biases_and_norms(model)
    for name, p in model.named_parameters():
        if name.endswith("bias_table") or (p.ndim == 2 and "patch_embed" not in name):
            assert p.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(p.numel())), name
    for p in model.patch_embed.proj.parameters():
        assert uniform_in(p, 1 / math.sqrt(48))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 0.5
    assert greenmim.drop_path(x, 0.0) is x
    y = greenmim.drop_path(x, 0.25)
    kept = y.flatten(1).any(1)
    near(y[kept], (x[kept] / 0.75).numpy(), rtol=1e-6)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_both_branches_of_a_block_are_dropped_on_their_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8).expand(200, -1, -1)
    block = fill(greenmim.Block(8, greenmim.Attention(8, 2), 4.0, 1e-6, drop_path=0.5), 0)
    outcomes, counts = block.train()(x).round(decimals=3).unique(dim=0, return_counts=True)
    assert len(outcomes) == 4 and counts.min() > 25
    assert any(torch.allclose(y, x[0], atol=1e-3) for y in outcomes)
    model = fill(SwinClassifier(TEST, 5, drop_path=0.9), 0)
    images = pictures(TEST)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


# ── models, sizes, releases ─────────────────────────────────────────────────────────────


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# Encoder, all of pre-training, classifier of 1000 classes: spec 2.1; Swin's own for t and s.
PARAMETERS = {
    "swin_b": (86_743_224, 91_997_880, 87_768_224),
    "swin_b_win14": (86_917_944, 92_172_600, 87_942_944),
    "swin_l_win14": (195_257_556, 200_774_356, 196_794_556),
    "swin_t": (None, None, 28_288_354),
    "swin_s": (None, None, 49_606_258),
}


@pytest.mark.parametrize("name", greenmim.MODELS)
def test_models_build_and_have_as_many_parameters_as_published(name: str) -> None:
    config = greenmim.MODELS[name]
    assert greenmim.model_config(config) == config
    model = on_meta(lambda: GreenMIM(config))
    classifier = on_meta(lambda: SwinClassifier(config, 1000))
    ours = count(model.encoder), count(model), count(classifier)
    for found, published in zip(ours, PARAMETERS.get(name, ours), strict=True):
        assert published is None or found == published
    head = 1000 * (model.encoder.channels[-1] + 1)
    assert count(classifier) == count(model.encoder) + head
    tables = [p for n, p in model.named_parameters() if n.endswith("bias_table")]
    stages = [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]
    sides = [config.input_size // config.patch_size // 2**stage for stage in stages]
    rows = [(2 * min(config.window_size, side) - 1) ** 2 for side in sides]
    heads = [config.num_heads[stage] for stage in stages]
    assert [tuple(t.shape) for t in tables] == list(zip(rows, heads, strict=True))


@pytest.mark.parametrize("window", [1, 3, 5, 16])
@pytest.mark.parametrize("size", [32, 48, 80, 96])
def test_other_sizes_and_windows_train(size: int, window: int) -> None:
    window = min(window, size // TEST.patch_size)
    config = greenmim.model_config(TEST, input_size=size, window_size=window)
    model = build(config)
    loss, prediction = model(pictures(config, 1), some_mask(config, 0.5))
    loss.backward()
    assert prediction.shape == (1, math.ceil(config.units**2 / 2), 3 * config.mask_unit**2)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert build(config).encoder(pictures(config, 1)).shape == (1, config.units**2, 64)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("test", {"input_size": 72}, r"\b64\b.*\b80\b"),
        ("test", {"input_size": 16}, r"\b32\b"),
        ("test", {"input_size": (64, 96)}, "square"),
        ("swin_b", {"input_size": 100}, r"\b96\b.*\b128\b"),
        ("test", {"window_size": 17}, r"window.*\b16\b"),
        ("swin_b", {"window_size": 57}, r"window.*\b56\b"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        greenmim.model_config(greenmim.MODELS[name], **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("swin_bb", r"swin_bb.*\bswin_b\b"), ("", "closest"),
     ("swin_base_patch4_window7_256", "swin_base_patch4_window7_224")],
)  # fmt: skip
def test_unknown_models_are_refused(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        greenmim.known_model(name)


def test_other_names_are_the_same_networks() -> None:
    assert greenmim.known_model("swin_base_patch4_window7_224") == "swin_b"
    assert {greenmim.known_model(name) for name in greenmim.MODELS} == greenmim.MODELS.keys()
    for other, ours in greenmim.OTHER_NAMES.items():
        assert greenmim.known_model(other) == ours and ours in greenmim.MODELS
        assert greenmim.configure("export", model=other).model == ours


def test_none_keeps_what_a_model_has() -> None:
    kept = greenmim.model_config(TEST, window_size=None, release=None, input_size=80)
    assert kept == replace(TEST, input_size=80)


RECIPES = [  # spec, sections 6 (slurm scripts) and 7
    ("pretrain", "swin_b", {"blr": 1e-4}),
    ("pretrain", "swin_b_win14", {"blr": 1.5e-4}),
    ("pretrain", "swin_l_win14", {"blr": 1e-4}),
    ("finetune", "swin_b", {
        "blr": 1.25e-3, "warmup_lr": 2.5e-7, "min_lr": 2.5e-7, "layer_decay": 0.9, "drop_path": 0.1,
    }),
    ("finetune", "swin_l_win14", {
        "blr": 1e-3, "warmup_lr": 2e-7, "min_lr": 3.5e-7, "layer_decay": 0.8, "drop_path": 0.3,
    }),
]  # fmt: skip
ALL_RECIPES = {
    "pretrain": {
        "epochs": 800, "warmup_epochs": 40, "min_lr": 0, "weight_decay": 0.05, "mask_ratio": 0.75,
        "batch_size": 2048 // 8, "clip_grad": None,
    },
    "finetune": {
        "epochs": 100, "warmup_epochs": 20, "weight_decay": 0.05, "batch_size": 768 // 8,
        "clip_grad": 5.0, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.25,
        "aa": "rand-m9-mstd0.5-inc1",
    },
}  # fmt: skip


@pytest.mark.parametrize(("command", "model", "values"), RECIPES)
def test_a_model_selects_its_published_recipe(command: str, model: str, values: dict) -> None:
    _, config = greenmim.parse_config([command, "--model", model])
    wanted = values | ALL_RECIPES[command]
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert greenmim.choose_config(config, None) == (model, greenmim.MODELS[model])
    assert greenmim.MODELS[model].norm_pix_loss


# ── weights ─────────────────────────────────────────────────────────────────────────────


def answers(model: SwinEncoder) -> Tensor:
    with torch.no_grad():
        return model.eval()(pictures(model.config))


def manifests() -> dict[str, dict]:
    """State-dict names and shapes of timm's and the official Swins, by model name."""
    with np.load(ROOT / "tests" / "golden" / "augment" / "timm_keys.npz") as arrays:
        models = json.loads(str(arrays["meta"]))["models"]
    return {name: models[name] for name in models if "swin" in name}


def unfilled(name: str, with_head: bool) -> SwinEncoder:
    """The network that a manifest names, its parameters not initialised."""
    size = re.search(r"swin_(tiny|base|large)", name)[1]
    window, pixels = (re.search(f"{p}(\\d+)", name) for p in ("window(?:_size=)?", "window\\d+_"))
    if "window_size" in name:
        window = re.search(r"window_size=(\d+)", name)
    config = replace(
        greenmim.MODELS["swin_l_win14" if size == "large" else f"swin_{size[0]}"],
        window_size=int(window[1]) if window else 7,
        input_size=int(pixels[1]) if pixels else 224,
    )
    make = (lambda: SwinClassifier(config, 1000)) if with_head else (lambda: SwinEncoder(config))
    return on_meta(make).to_empty(device="cpu")


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("name", manifests())
def test_export_has_the_names_and_shapes_of_its_model(name: str, with_head: bool) -> None:
    manifest, model = manifests()[name], unfilled(name, with_head)
    naming = "official" if name.startswith("official") else "timm"
    state = greenmim.export_state(model, naming)
    # Of what official Swin computes itself nothing is written: its loader is not strict.
    wanted = {k: v for k, v in manifest["shapes"].items() if k in without_buffers([k])}
    assert manifest["shapes"].keys() - wanted.keys() == set(manifest["buffers"])
    assert naming == "official" or not manifest["buffers"]
    if not with_head:
        wanted = {k: v for k, v in wanted.items() if not k.startswith("head.")}
    assert {k: list(v.shape) for k, v in state.items()} == wanted
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert {k for k, t in manifest["dtypes"].items() if t != "float32"} <= set(manifest["buffers"])
    assert not state.keys() & set(manifest["non_persistent_buffers"])
    if with_head:
        assert count(model) == manifest["parameters"]


def test_merging_moves_to_the_next_stage_and_back() -> None:
    state = SwinEncoder(TEST).state_dict()
    moved = greenmim.move_merging(state, 1)
    assert list(greenmim.move_merging(moved, -1)) == list(state)
    renamed = {k for k in state if k not in moved}
    assert renamed == {k for k in state if k.startswith("layers.0.downsample.")}
    assert {k for k in moved if k not in state} == {
        k for k in moved if k.startswith("layers.2.downsample.")
    }


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("naming", ["official", "timm"])
@pytest.mark.parametrize("with_head", [True, False])
def test_exports_come_back(with_head: bool, naming: str, wrapped: bool, tmp_path: Path) -> None:
    config = replace(TEST, window_size=4)
    make = partial(SwinClassifier, config, 5) if with_head else partial(SwinEncoder, config)
    source = fill(make(), 1)
    state = greenmim.export_state(source, naming)
    path = str(tmp_path / "weights.pth")
    torch.save({"model": state} if wrapped else state, path)
    target, said = load(make, path)
    assert path in said and "head" not in said
    assert torch.equal(answers(target), answers(source))
    # For a classifier of other classes only the head stays as it was, and only if that is asked.
    with pytest.raises(InputError, match=r"head\.weight"):
        load(partial(SwinClassifier, config, 7), path)
    torch.manual_seed(0)
    fresh = SwinClassifier(config, 7).head.weight
    torch.manual_seed(0)
    classifier, said = load(partial(SwinClassifier, config, 7), path, fresh_head=True)
    assert "head starts fresh" in said
    assert torch.equal(classifier.head.weight, fresh)
    assert torch.equal(classifier.norm.weight, source.norm.weight)
    if with_head:  # one that fits is kept
        kept, said = load(partial(SwinClassifier, config, 5), path, fresh_head=True)
        assert "head" not in said and torch.equal(kept.head.weight, source.head.weight)
    # For an encoder the head is left out.
    encoder, _ = load(partial(SwinEncoder, config), path)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in encoder.state_dict().items())


def test_no_file_leaves_a_model_as_it_is_made() -> None:
    made = []
    model, said = greenmim.load_weights(lambda: made.append(SwinEncoder(TEST)) or made[0], "", None)
    assert made == [model] and said == ""


def test_released_file_loads_whole_and_as_encoder(tmp_path: Path) -> None:
    source, path = build(replace(TEST, window_size=4)), tmp_path / "checkpoint-799.pth"
    released_file(source, path)
    file = data.read_checkpoint(path)
    assert file["args"] == {} and file["epoch"] == 0  # a Namespace says nothing to us
    model, said = load(partial(GreenMIM, source.config), path)
    assert "as they are" in said
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    encoder, _ = load(partial(SwinEncoder, source.config), path)
    assert torch.equal(answers(encoder), answers(source.encoder))


def test_pretraining_goes_on_at_another_size(tmp_path: Path) -> None:
    """The position table of the decoder is computed for the size in use, not read."""
    source, config = build(replace(TEST, window_size=3)), replace(TEST, input_size=96)
    torch.save({"model": source.state_dict()}, tmp_path / "small.pth")
    model, said = load(partial(GreenMIM, config), tmp_path / "small.pth")
    assert torch.equal(model.decoder_pos_embed, greenmim.sincos_embedding(config.decoder_dim, 6))
    assert model(pictures(config), some_mask(config))[0].isfinite() and "as they are" in said
    assert all(torch.equal(v, source.state_dict()[k])
               for k, v in model.state_dict().items() if k != "decoder_pos_embed")  # fmt: skip


@pytest.mark.parametrize("config", [None, "swin_base.yaml", {}, {"script": 3}, [1], {1: 2}])
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_arguments_of_other_projects_do_not_matter(
    kind: type, config: object, tmp_path: Path
) -> None:
    source = fill(SwinEncoder(TEST), 1)
    args = kind(config=config, model="swin", epochs=300)
    torch.save({"model": source.state_dict(), "args": args}, tmp_path / "swin.pth")
    target, _ = load(partial(SwinEncoder, TEST), tmp_path / "swin.pth")
    assert torch.equal(answers(target), answers(source))


def test_files_of_other_scripts_are_refused(tmp_path: Path) -> None:
    state = SwinEncoder(TEST).state_dict()
    torch.save({"model": state, "args": {"script": "mixmae"}}, tmp_path / "mixmae.pth")
    with pytest.raises(InputError, match=r"mixmae\.pth: .*written by mixmae\.py, not by greenmim"):
        data.read_checkpoint(tmp_path / "mixmae.pth", "greenmim")


def test_wrapper_prefix_of_parallel_training_is_cut(tmp_path: Path) -> None:
    source = build(TEST)
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "parallel.pth")
    model, _ = load(partial(GreenMIM, TEST), tmp_path / "parallel.pth")
    assert torch.equal(model.mask_token, source.mask_token)


def swap_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merging weights of the first release for today's order, and back; spec, section 8.3."""
    return {
        k: torch.cat([v.chunk(4, -1)[i] for i in (0, 2, 1, 3)], -1) if ".downsample." in k else v
        for k, v in state.items()
    }


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_first_release_is_reordered_once_as_it_is_read(prefix: str, tmp_path: Path) -> None:
    old = fill(SwinEncoder(TEST), 1)
    path, wanted = tmp_path / "published.pth", swap_blocks(old.state_dict())
    torch.save({"model": {prefix + k: v for k, v in old.state_dict().items()}}, path)
    encoder, said = load(partial(SwinEncoder, TEST), path, "2022")
    assert "first release reordered" in said
    assert all(torch.equal(v, wanted[k]) for k, v in encoder.state_dict().items())
    for release in (None, "2023", "corrected"):
        encoder, said = load(partial(SwinEncoder, TEST), path, release)
        assert "reordered" not in said
        assert all(torch.equal(v, old.state_dict()[k]) for k, v in encoder.state_dict().items())
    # Files of ours are in today's order, whatever the release they say they are of.
    config = replace(TEST, release="2022")
    args = {"script": "greenmim", "model": "test", "config": asdict(config)}
    torch.save({"model": wanted, "args": args}, path)
    assert greenmim.identify(data.read_checkpoint(path)) == ("test", config)
    encoder, said = load(partial(SwinEncoder, config), path, "2022")
    assert all(torch.equal(v, wanted[k]) for k, v in encoder.state_dict().items())
    # So an export of them is, too, and what is exported and read again answers alike.
    for naming in ("timm", "official"):
        torch.save(greenmim.export_state(encoder, naming), path)
        again, _ = load(partial(SwinEncoder, TEST), path)
        assert torch.equal(answers(again), answers(encoder))


def test_first_release_of_a_whole_model_is_reordered(tmp_path: Path) -> None:
    source, path = build(replace(TEST, window_size=4)), tmp_path / "published.pth"
    released_file(source, path)
    wanted = swap_blocks(source.state_dict())
    model, _ = load(partial(GreenMIM, replace(source.config, release="2022")), path, "2022")
    assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())


def test_simmim_file_loads_for_fine_tuning(tmp_path: Path) -> None:
    source = fill(SwinEncoder(replace(TEST, window_size=4)), 3)
    state = {f"encoder.{k}": v for k, v in official_file(source).items()}
    state |= {"encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.bias": torch.zeros(768),
              "decoder.0.weight": torch.zeros(768, 64, 1, 1)}  # fmt: skip
    torch.save({"model": state, "optimizer": {}, "epoch": 799}, tmp_path / "simmim.pth")
    make = partial(SwinClassifier, source.config, 5)
    model, _ = load(make, tmp_path / "simmim.pth", fresh_head=True)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in source.state_dict().items())


def test_swin_classification_file_keeps_its_head_where_it_fits(tmp_path: Path) -> None:
    source = fill(SwinClassifier(replace(TEST, window_size=4), 5), 3)
    torch.save({"model": official_file(source), "max_accuracy": 83.5}, tmp_path / "swin.pth")
    make = partial(SwinClassifier, source.config, 5)
    model, _ = load(make, tmp_path / "swin.pth", fresh_head=True)
    assert torch.equal(answers(model), answers(source))


def test_tables_of_another_window_are_interpolated(tmp_path: Path) -> None:
    source = fill(SwinEncoder(replace(TEST, window_size=4)), 3)
    torch.save({"model": source.state_dict()}, tmp_path / "window4.pth")
    make = partial(SwinEncoder, replace(TEST, window_size=5))
    model, said = load(make, tmp_path / "window4.pth")
    tables = 0
    for name, p in model.named_parameters():
        old = source.state_dict()[name]
        if p.shape != old.shape:
            near(p, greenmim.resize_bias_table(old, len(p)), atol=1e-7)
            tables += 1
        else:
            assert torch.equal(p, old), name
    # The map of the third stage is smaller than either window.
    assert tables == 4 and "4 relative position tables" in said


@pytest.mark.parametrize(("source", "target"), [(7, 14), (14, 7), (3, 5), (2, 3), (7, 7), (1, 2)])
def test_interpolation_keeps_constants_symmetry_and_the_centre(source: int, target: int) -> None:
    side, rows = 2 * source - 1, (2 * target - 1) ** 2
    near(greenmim.resize_bias_table(torch.full((side**2, 2), 3.0), rows),
         np.full((rows, 2), 3, np.float32), atol=1e-5)  # fmt: skip
    table = torch.from_numpy(uniform("table", (side**2, 2), 0).astype(np.float32))
    ours = greenmim.resize_bias_table(table, rows)
    assert ours.shape == (rows, 2) and ours.dtype == table.dtype
    near(greenmim.resize_bias_table(table.flip(0), rows), ours.flip(0), atol=1e-5)
    near(ours[rows // 2], table[side**2 // 2], atol=1e-5)


# ── what a file is ──────────────────────────────────────────────────────────────────────


def official_file(model: SwinEncoder) -> dict[str, Tensor]:
    """The state dict of official Swin: index buffers between the weights."""
    config, state = model.config, model.state_dict()
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            state[f"{block}.attn.relative_position_index"] = position_index(config.window(i))
            if j % 2 and config.side(i) > config.window(i):
                area, count = config.window(i) ** 2, (config.side(i) // config.window(i)) ** 2
                state[f"{block}.attn_mask"] = torch.zeros(count, area, area)
    return state


def foreign_names(state: dict[str, Tensor], naming: str) -> dict[str, Tensor]:
    if naming == "timm":
        moved = greenmim.move_merging(state, 1)
        return {re.sub(r"^head\.", "head.fc.", k): v for k, v in moved.items()}
    prefix = {"simmim": "encoder.", "official": ""}[naming]
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize("naming", ["official", "timm", "simmim"])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("name", greenmim.MODELS)
def test_shapes_tell_every_model(name: str, with_head: bool, naming: str) -> None:
    config = greenmim.MODELS[name]
    make = partial(SwinClassifier, config, 9) if with_head else partial(SwinEncoder, config)
    state = foreign_names(on_meta(make).state_dict(), naming)
    assert greenmim.identify({"model": state, "args": {}}) == (name, config)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swin_b", {"input_size": 192, "window_size": 12}),  # SimMIM's, window 12 at 192 px
        ("swin_b", {"input_size": 384, "window_size": 24}),
        ("swin_l_win14", {"input_size": 448, "window_size": 28}),
        ("test", {"input_size": 96, "window_size": 7}),
        ("test", {"patch_size": 8, "input_size": 128, "window_size": 5}),
        ("test", {"num_heads": (2, 2, 8)}),
        ("test", {"depths": (1, 4), "num_heads": (1, 2)}),
        ("test", {"embed_dim": 24, "window_size": 2}),
        ("swin_t", {"window_size": 8, "input_size": 256}),  # Swin's own, no window cut short
        ("swin_b", {"window_size": 12, "input_size": 384}),
    ],
)
def test_shapes_tell_networks_of_other_sizes(name: str, changes: dict) -> None:
    """Input size, too, where a window covers the last map; elsewhere it stays the model's."""
    config = replace(greenmim.MODELS[name], **changes)
    state = on_meta(partial(SwinEncoder, config)).state_dict()
    _, found = greenmim.identify({"model": state, "args": {}})
    if config.side(len(config.depths) - 1) <= config.window_size:
        assert found.input_size == config.input_size
    kept = ("embed_dim", "depths", "num_heads", "window_size", "patch_size", "mask_unit")
    assert [getattr(found, k) for k in kept] == [getattr(config, k) for k in kept]
    made = on_meta(partial(SwinEncoder, found)).state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in state.items()}


def our_file(model: nn.Module, path: Path, name: str = "test", **extra: object) -> Path:
    """A checkpoint as our commands write it, without the state of training."""
    args = {"script": "greenmim", "command": "pretrain", "model": name,
            "config": asdict(model.config), "classes": [], "settings": {}}  # fmt: skip
    torch.save({"model": model.state_dict(), "args": args} | extra, path)
    return path


def test_args_of_our_files_tell_more_than_shapes(tmp_path: Path) -> None:
    config = replace(TEST, input_size=96, norm_pix_loss=False, release="2023", mlp_ratio=4)
    path = our_file(GreenMIM(config), tmp_path / "ours.pth")
    assert greenmim.identify(data.read_checkpoint(path)) == ("test", config)


def test_flags_come_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    path = our_file(GreenMIM(replace(TEST, input_size=96)), tmp_path / "ours.pth")
    file = data.read_checkpoint(path)

    def chosen(file: dict | None, **flags: object) -> tuple[str, ModelConfig]:
        cfg = greenmim.PretrainConfig(weights=str(path) if file else "", **flags)
        return greenmim.choose_config(cfg, file)

    assert chosen(None) == ("swin_b", greenmim.MODELS["swin_b"])
    assert chosen(file) == ("test", replace(TEST, input_size=96))
    changes = {"input_size": 128, "window_size": 5, "release": "2023", "norm_pix_loss": False}
    assert chosen(file, **changes) == ("test", replace(TEST, **changes))
    _, found = chosen(file, model="test", window_size=2)
    assert found == replace(TEST, input_size=96, window_size=2)
    assert chosen(file, model="swin_t") == ("swin_t", greenmim.MODELS["swin_t"])
    assert chosen(None, model="swin_tiny_patch4_window7_224")[0] == "swin_t"


def backbone_files() -> dict[str, Callable[[Path], SwinEncoder]]:
    """Writers of files that hold an encoder; each returns what was written."""
    config = replace(TEST, window_size=4)

    def pretraining(path: Path) -> SwinEncoder:
        model = build(config, 1)
        our_file(model, path, optimizer={"state": {}})
        return model.encoder

    def backbone(path: Path) -> SwinEncoder:
        model = fill(SwinEncoder(config), 1)
        our_file(model, path)
        return model

    def classifier(path: Path) -> SwinEncoder:
        model = fill(SwinClassifier(config, 5), 1)
        our_file(model, path, ema=None)
        return model

    def published(path: Path) -> SwinEncoder:
        model = build(config, 1)
        released_file(model, path)
        return model.encoder

    def exported(naming: str, make: Callable[..., SwinEncoder], path: Path) -> SwinEncoder:
        model = fill(make(config), 1)
        state = greenmim.export_state(model, naming)
        torch.save(state if naming == "timm" else {"model": state}, path)
        return model

    def official(path: Path) -> SwinEncoder:
        model = fill(SwinClassifier(config, 5), 1)
        torch.save({"model": official_file(model), "epoch": 1}, path)
        return model

    five = partial(SwinClassifier, num_classes=5)
    return {
        "pretraining": pretraining, "backbone": backbone, "classifier": classifier,
        "published": published, "official": official,
        "timm": partial(exported, "timm", SwinEncoder),
        "timm_classifier": partial(exported, "timm", five),
        "official_classifier": partial(exported, "official", five),
    }  # fmt: skip


@pytest.mark.parametrize("write", backbone_files().values(), ids=backbone_files().keys())
def test_backbones_come_from_every_kind_of_file(
    write: Callable[[Path], SwinEncoder], tmp_path: Path
) -> None:
    source = write(tmp_path / "weights.pth").eval()
    encoder = greenmim.load_backbone(tmp_path / "weights.pth")
    assert type(encoder) is SwinEncoder and not encoder.training
    assert encoder.channels == [16, 32, 64] and encoder.strides == [4, 8, 16]
    assert encoder.config.window_size == 4 and encoder.config.input_size == 64
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in encoder.state_dict().items())
    images = torch.from_numpy(filled_images((1, 3, 48, 80), 3))
    with torch.no_grad():
        for ours, theirs in zip(encoder.maps(images), source.maps(images), strict=True):
            near(ours, theirs, atol=1e-3)  # the norms of classifiers have another eps
    assert str(greenmim.load_backbone(str(tmp_path / "weights.pth"))) == str(encoder)


# ── malformed and hostile files ─────────────────────────────────────────────────────────


class RunsCode:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def save_with(name: str, make: Callable[[], object]) -> Callable[[Path], None]:
    """A writer of a good file in which one entry of the state dict is what `make` returns."""
    return lambda path: torch.save({"model": build(TEST).state_dict() | {name: make()}}, path)


class Claims:
    """A tensor of three elements that says it has others."""

    def __init__(self, offset: int, size: int) -> None:
        self.shape = offset, (size,), (1,)

    def __reduce__(self) -> tuple:
        storage = torch.ones(3).untyped_storage()
        storage = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, *self.shape, False, {})


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """A good file of 77 numbers, its entries changed and their checksums right."""
    torch.save({"model": {"a": torch.arange(77.0)}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, change(entry, content))


def compressed(path: Path, count: int = 1) -> None:
    """A good file, but its zip is packed; a bomb unpacks to far more than it has bytes."""
    torch.save({"model": {"a": torch.zeros(count)}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


def nan_table() -> Tensor:
    table = torch.zeros(25, 1)
    table[3] = math.nan
    return table


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such weights file"),
    "folder": (lambda path: path.mkdir(), "no such weights file"),
    "empty": (lambda path: path.write_bytes(b""), "refused"),
    "text": (lambda path: path.write_text("<html>too many requests</html>"), "refused"),
    "two_letters": (lambda path: path.write_bytes(b"PK"), "refused"),
    "truncated": (lambda path: (
        torch.save({"model": build(TEST).state_dict()}, path),
        path.write_bytes(path.read_bytes()[:-2000]),
    ), "refused"),
    "half": (lambda path: (
        torch.save({"model": build(TEST).state_dict()}, path),
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    ), "refused"),
    "other_zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "hello"), "refused"),
    "compressed": (compressed, "damaged"),
    "bomb": (partial(compressed, count=10**7), "damaged"),
    "a_list": (lambda path: torch.save([1, 2], path), "no state dict"),
    "a_tensor": (lambda path: torch.save(torch.ones(3), path), "no state dict"),
    "nothing": (lambda path: torch.save({}, path), "no state dict"),
    "no_weights": (lambda path: torch.save({"model": {}}, path), "no state dict"),
    "a_number": (lambda path: torch.save({"model": {"a": 1}}, path), "a is no tensor but int"),
    "a_tree": (save_with("norm", lambda: {"weight": torch.ones(3)}), "norm is no tensor but dict"),
    "numpy": (save_with("norm", lambda: np.ones(3)), "NumPy arrays"),
    "numpy_number": (save_with("norm", lambda: np.float64(3)), "NumPy arrays"),
    "sparse": (save_with("norm", lambda: torch.eye(3).to_sparse()), "norm is no ordinary tensor"),
    "csr": (save_with("norm", lambda: torch.eye(3).to_sparse_csr()), "norm is no ordinary tensor"),
    "quantized": (save_with("norm", lambda: torch.quantize_per_tensor(
        torch.ones(3), 0.1, 0, torch.qint8)), "norm is no ordinary tensor"),
    "meta": (save_with("norm", lambda: torch.empty(10**12, device="meta")),
             "norm is no ordinary tensor"),
    "complex": (save_with("norm", lambda: torch.ones(3) * 1j), "norm is no ordinary tensor"),
    "stride_0": (save_with("norm", lambda: torch.ones(1).expand(10**11)),
                 "norm repeats its elements"),
    "nan": (save_with("norm", nan_table), "norm is not finite"),
    "infinite": (save_with("norm", lambda: torch.tensor(math.inf)), "norm is not finite"),
    "larger_than_its_bytes": (save_with("norm", lambda: Claims(0, 10**9)), "refused"),
    "behind_its_bytes": (save_with("norm", lambda: Claims(10**9, 3)), "refused"),
    "before_its_bytes": (save_with("norm", lambda: Claims(-100, 3)), "refused"),
    "numbers_that_are_not_there": (partial(rewritten, change=lambda name, content: content.replace(
        b"KM", b"J" + (2 * 10**9).to_bytes(4, "little"))), "refused"),
    "fewer_bytes": (partial(rewritten, change=lambda name, content: content[:8]
                            if name.endswith("data/0") else content), "refused"),
    "code": (lambda path: torch.save({"model": {"a": RunsCode(path.with_name("ran"))}}, path),
             r"would run code .*mkdir"),
    "code_beside_weights": (lambda path: torch.save(
        {"model": build(TEST).state_dict(), "args": RunsCode(path.with_name("ran"))}, path
    ), r"would run code .*mkdir"),
}  # fmt: skip


def one_sentence(capsys: pytest.CaptureFixture, *words: str) -> str:
    """What a command that must refuse its input says."""
    capsys.readouterr()
    assert greenmim.main(list(words)) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and not said.out
    return said.err


@pytest.mark.filterwarnings("ignore")  # of exotic tensors, as they are made
@pytest.mark.parametrize(("spoil", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_a_file_without_weights_is_refused_in_one_sentence(
    spoil: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "weights.pth"
    spoil(path)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}.*{said}") as refused:
        data.read_checkpoint(path)
    assert "\n" not in str(refused.value)
    if "code" in str(refused.value) or not path.is_file():
        sentence = one_sentence(capsys, "export", "--weights", str(path), "--model", "test")
        assert str(refused.value) in sentence
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
        try:
            save_with("norm", lambda nested=nested: nested)(path)
        except Exception as error:
            pytest.skip(f"this torch cannot save them: {error}")
        with pytest.raises(InputError, match=re.escape(str(path))):
            data.read_checkpoint(path)


def flips(path: Path, whole: bytes, number: int) -> Iterator[tuple[int, int]]:
    """Bits to flip: anywhere, and in what is no tensor: names, pickle, headers, directory."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path) as archive:
        plain = np.ones(len(whole), bool)
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                end = whole.index(entry.filename.encode(), entry.header_offset)
                start = end + len(entry.filename) + 64  # headers and padding before it count
                plain[start : start + max(0, entry.file_size - 64)] = False
    for places in (np.arange(len(whole)), np.flatnonzero(plain), np.arange(len(whole))[-600:]):
        for place in rng.choice(places, number):
            yield int(place), int(rng.integers(8))


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    """A file with one bit flipped is refused, or is bitwise what it was: never silently other."""
    path, config = tmp_path / "weights.pth", replace(TEST, depths=(1, 1), num_heads=(1, 1))
    our_file(build(replace(config, decoder_dim=8)), path, step=3)
    whole, right = path.read_bytes(), data.read_checkpoint(path)
    refused = total = 0
    for place, bit in flips(path, whole, 130):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        total += 1
        try:
            found = data.read_checkpoint(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert equal(found, right), f"bit {bit} of byte {place}"
    assert refused > total / 2


def with_config(**changes: object) -> dict:
    return asdict(TEST) | changes


ODD_ARGS: dict[str, object] = {
    "empty": {}, "only_the_script": {"script": "greenmim"},
    "no_config": {"model": "test"}, "no_model": {"config": with_config()},
    "a_list_for_config": {"model": "test", "config": [1, 2]},
    "empty_config": {"model": "test", "config": {}},
    "without_release": {"model": "test", "config": {
        k: v for k, v in with_config().items() if k != "release"}},
    "words": {"model": "test", "config": with_config(embed_dim="wide")},
    "unknown_release": {"model": "test", "config": with_config(release="2024")},
    "unknown_model": {"model": "teapot", "config": with_config()},
    "model_is_a_number": {"model": 7, "config": with_config()},
    "nan": {"model": "test", "config": with_config(mlp_ratio=math.nan)},
    "negative": {"model": "test", "config": with_config(embed_dim=-16)},
    "fraction": {"model": "test", "config": with_config(window_size=2.5)},
    "no_stages": {"model": "test", "config": with_config(depths=[], num_heads=[])},
    "heads_of_other_stages": {"model": "test", "config": with_config(num_heads=[1])},
    "depths_is_a_number": {"model": "test", "config": with_config(depths=2)},
    "list_for_a_number": {"model": "test", "config": with_config(embed_dim=[16])},
    "text_for_a_switch": {"model": "test", "config": with_config(norm_pix_loss="no")},
    "another_size": {"model": "test", "config": with_config(input_size=72)},
    "wider": {"model": "test", "config": with_config(embed_dim=4096)},
    "heads_do_not_divide": {"model": "test", "config": with_config(num_heads=[3, 5, 7])},
    "deeper": {"model": "test", "config": with_config(depths=[20, 20, 20])},
    "many_stages": {"model": "test", "config": with_config(
        depths=[1] * 40, num_heads=[1] * 40)},
    "largest": {"model": "test", "config": with_config(
        embed_dim=4096, depths=[20] * 3, num_heads=[1] * 3, mlp_ratio=100.0, decoder_dim=4096,
        decoder_depth=20)},
}  # fmt: skip


def refuses(path: Path, command: str, **flags: object) -> None:
    """A command has one sentence for its --weights, which names the file."""
    _, function = greenmim.COMMANDS[command]
    with pytest.raises(InputError, match=re.escape(str(path))) as refused:
        function(greenmim.configure(command, weights=str(path), device="cpu", **flags))
    assert "\n" not in str(refused.value)


@contextlib.contextmanager
def little_memory(limit: int = 2**26) -> Iterator[None]:
    """Fails if NumPy and Python ask for more than `limit` bytes inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("args", ODD_ARGS.values(), ids=ODD_ARGS.keys())
def test_odd_args_of_our_files_are_one_sentence(args: dict, tmp_path: Path) -> None:
    path = tmp_path / "ours.pth"
    torch.save({"model": build(TEST).state_dict(), "args": {"script": "greenmim"} | args}, path)
    for command in ("export", "reconstruct"):  # the encoder, the whole model
        refuses(path, command)
    with pytest.raises(InputError, match=re.escape(str(path))):
        greenmim.load_backbone(path)


def test_args_that_are_none_of_ours_leave_the_weights(tmp_path: Path) -> None:
    source, path = build(TEST), tmp_path / "foreign.pth"
    for args in ([1, 2], {1: 2, 3: {}}, None, "swin", 5, torch.ones(2), {}):
        torch.save({"model": source.state_dict(), "args": args}, path)
        encoder = greenmim.load_backbone(path)
        assert torch.equal(encoder.norm.weight, source.encoder.norm.weight)
    state = dict(source.state_dict())
    state[0] = state.pop("mask_token")
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match=r"mask_token is missing.*0 is unexpected"):
        load(partial(GreenMIM, TEST), path)


TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
ODD_STATES: dict[str, dict[str, Tensor]] = {
    "even_table": {TABLE: torch.zeros(16, 1)},
    "table_of_no_square": {TABLE: torch.zeros(26, 1)},
    "table_of_no_length": {TABLE: torch.zeros(0, 1)},
    "table_of_no_heads": {TABLE: torch.zeros(25, 0)},
    "table_0d": {TABLE: torch.tensor(1.0)},
    "table_1d": {TABLE: torch.zeros(25)},
    "table_3d": {TABLE: torch.zeros(25, 1, 1)},
    "table_of_other_heads": {TABLE: torch.zeros(49, 2)},
    "tables_of_no_length": {TABLE.replace("0", str(i), 1).replace("0", str(j)): torch.zeros(0, 1)
                            for i in range(3) for j in range(2)},
    "patches_0d": {"patch_embed.proj.weight": torch.tensor(1.0)},
    "patches_of_nothing": {"patch_embed.proj.weight": torch.zeros(0, 3, 4, 4)},
    "patches_of_no_size": {"patch_embed.proj.weight": torch.zeros(16, 3, 0, 0)},
    "patches_not_square": {"patch_embed.proj.weight": torch.zeros(16, 3, 4, 8)},
    "patches_of_five_axes": {"patch_embed.proj.weight": torch.zeros(16, 3, 1, 4, 4)},
    "norm_0d": {"norm.weight": torch.tensor(1.0)},
    "norm_of_nothing": {"norm.weight": torch.zeros(0)},
    "head_0d": {"head.weight": torch.tensor(1.0), "head.bias": torch.tensor(1.0)},
    "head_of_nothing": {"head.weight": torch.zeros(0, 64), "head.bias": torch.zeros(1)},
    "merging_0d": {"layers.0.downsample.norm.weight": torch.tensor(1.0)},
    "merging_of_five": {"layers.0.downsample.norm.weight": torch.zeros(5)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("release", ["2022", "corrected"])
@pytest.mark.parametrize("odd", ODD_STATES.values(), ids=ODD_STATES.keys())
def test_odd_shapes_are_one_sentence(odd: dict, release: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    torch.save({"model": SwinEncoder(TEST).state_dict() | odd}, path)
    refuses(path, "export", release=release)
    refuses(path, "export", release=release, model="test")


def test_files_from_before_zip_load(tmp_path: Path) -> None:
    source, path = build(TEST), tmp_path / "old.pth"
    torch.save({"model": source.state_dict()}, path, _use_new_zipfile_serialization=False)
    model, _ = load(partial(GreenMIM, TEST), path)
    assert equal(dict(model.state_dict()), dict(source.state_dict()))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=re.escape(str(path))):
        data.read_checkpoint(path)


def test_no_swin_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "vit.pth"
    torch.save({"cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.weight": torch.ones(8)}, path)
    assert "holds no Swin" in one_sentence(capsys, "export", "--weights", str(path))


HUGE = {
    "encoder": {"embed_dim": 4096, "depths": (20, 20, 20), "mlp_ratio": 100.0},
    "decoder": {"decoder_dim": 4096, "decoder_depth": 20, "mlp_ratio": 100.0},
    "positions": {"input_size": 1024, "patch_size": 1, "depths": (1,), "num_heads": (1,),
                  "decoder_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("changes", HUGE.values(), ids=HUGE.keys())
def test_a_small_file_cannot_ask_for_a_huge_model(changes: dict, tmp_path: Path) -> None:
    path, config = tmp_path / "small.pth", replace(TEST, **changes)
    args = {"script": "greenmim", "model": "test", "config": asdict(config)}
    torch.save({"model": build(TEST).state_dict(), "args": args}, path)
    file = data.read_checkpoint(path)
    _, found = greenmim.identify(file)
    for kind in (GreenMIM, SwinEncoder):
        with little_memory(), pytest.raises(InputError, match=r"small\.pth.*not of this --model"):
            greenmim.load_weights(partial(kind, found), str(path), file)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(TEST, embed_dim=32), r"patch_embed\.proj\.weight is \(32, 3, 4, 4\)"),
        (replace(TEST, depths=(2, 2, 3)), r"layers\.2\.blocks\.2\.\S+ is unexpected"),
        (replace(TEST, depths=(2, 1, 2)), r"layers\.1\.blocks\.1\.\S+ is missing"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    other: ModelConfig, said: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "other.pth")
    torch.save({"model": GreenMIM(other).state_dict()}, path)
    for kind in (GreenMIM, SwinEncoder):
        made = []
        with pytest.raises(InputError, match=said) as refused:
            load(lambda made=made, kind=kind: made.append(kind(TEST)) or made[-1], path)
        assert "\n" not in str(refused.value) and path in str(refused.value)
        assert [p.device.type for m in made for p in m.parameters()][:1] == ["meta"]
        assert len(made) == 1  # no memory was taken for a model that would not fit


def test_a_backbone_is_no_whole_model(tmp_path: Path) -> None:
    path = str(tmp_path / "backbone.pth")
    state = greenmim.export_state(SwinEncoder(replace(TEST, window_size=4)), "official")
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match="has no decoder"):
        load(partial(GreenMIM, replace(TEST, window_size=4)), path)


def test_safetensors_is_asked_for_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    weights = str(our_file(GreenMIM(TEST), tmp_path / "ours.pth"))
    path = tmp_path / "weights.safetensors"
    words = ["export", "--weights", weights, "--output", str(path)]
    assert greenmim.main(words) == 2
    assert "pip install safetensors" in capsys.readouterr().err
    assert not path.exists()
    path.write_bytes(b"{}")
    with pytest.raises(InputError, match="pip install safetensors"):
        data.read_checkpoint(path)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source, path = fill(SwinEncoder(TEST), 1), tmp_path / "weights.safetensors"
    state = greenmim.export_state(source, "timm")
    data.save_file(path, lambda file: file.write(safetensors.save(state)))
    target, _ = load(partial(SwinEncoder, TEST), path)
    assert torch.equal(answers(target), answers(source))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=re.escape(str(path))):
        data.read_checkpoint(path)


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.pth"
    data.save_file(path, partial(torch.save, {"model": {"a": torch.ones(3)}}))

    def fails(file: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=rf"{re.escape(str(path))}.*No space left"):
        data.save_file(path, fails)
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.pth"]
    assert data.read_checkpoint(path)["model"]["a"].tolist() == [1, 1, 1]
    with pytest.raises(KeyboardInterrupt):  # a crash, not an error of the disk

        def stops(file: object) -> None:
            file.write(b"half of it")
            raise KeyboardInterrupt

        data.save_file(path, stops)
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.pth"]


# ── rates, values of flags, neighbours ──────────────────────────────────────────────────


def test_rates_by_hand() -> None:
    mae = partial(greenmim.lr_at, lr=2.0, start=0.0, end=1.0, warmup=4, cosine_from=4, total=12)
    near([mae(t) for t in (0, 1, 4, 6, 8, 12)],
         [0.0, 0.5, 2.0, 1 + (1 + math.sqrt(0.5)) / 2, 1.5, 1.0], atol=1e-15)  # fmt: skip
    simmim = partial(greenmim.lr_at, lr=2.0, start=1.0, end=0.5, warmup=4, cosine_from=0, total=12)
    near([simmim(t) for t in (0, 2, 4, 6, 12)],
         [1.0, 1.5, 0.5 + 1.5 * 0.75, 0.5 + 1.5 * 0.5, 0.5], atol=1e-15)  # fmt: skip
    none = partial(greenmim.lr_at, lr=2.0, start=0.0, end=0.0, warmup=0, cosine_from=0, total=2)
    near([none(t) for t in (0, 1, 2)], [2.0, 1.0, 0.0], atol=1e-15)


def hint(name: str, kind: type = greenmim.FinetuneConfig) -> object:
    return typing.get_type_hints(kind, include_extras=True)[name]


@pytest.mark.parametrize(
    ("name", "value", "fitted"),
    [
        ("epochs", "3", 3), ("epochs", 3, 3), ("epochs", 3.0, 3), ("epochs", np.int64(3), 3),
        ("seed", "0", 0), ("seed", 2**63 - 1, 2**63 - 1), ("seed", str(2**63 - 1), 2**63 - 1),
        ("blr", "1e-3", 1e-3), ("blr", 1, 1.0), ("blr", np.float32(0.5), 0.5), ("blr", "0", 0.0),
        ("lr", None, None), ("lr", "none", None), ("lr", "2", 2.0), ("clip_grad", "none", None),
        ("smoothing", "1", 1.0), ("smoothing", 0, 0.0), ("drop_path", "0.99", 0.99),
        ("input_size", "224", 224), ("input_size", 224, 224), ("input_size", "224x320", (224, 320)),
        ("input_size", (224, 320), (224, 320)), ("input_size", [64, 96], (64, 96)),
        ("input_size", "96x96", 96), ("input_size", "none", None), ("input_size", None, None),
        ("release", "2022", "2022"), ("release", None, None), ("release", "none", None),
        ("dtype", "bf16", "bf16"), ("compile", True, True), ("compile", False, False),
        ("data_path", "none", "none"), ("data_path", "", ""), ("resume", "none", "none"),
    ],
)  # fmt: skip
def test_values_that_fit(name: str, value: object, fitted: object) -> None:
    found = greenmim.fit(hint(name), value)
    assert found == fitted and type(found) is type(fitted)


NO_NUMBER = [
    "", "x", "3x", "1,5", "none", None, [], [3], (3, 4), {}, "0x10", b"3x", object(), 3j, "--", "³",
]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("epochs", value, "no whole number") for value in (*NO_NUMBER, "3.5", 3.5, "1e3", "nan")),
        *(("blr", value, "no number") for value in (*NO_NUMBER, math.nan, 10**400)),
        *(("epochs", value, "between") for value in (0, -1, "0", 10**6 + 1, 10**400)),
        *(("blr", value, "between") for value in (-1e-9, "-1", math.inf, "inf", "nan", "1e400")),
        *(("epochs", value, "no whole number") for value in (math.inf, math.nan, -math.inf)),
        ("epochs", "1" * 5000, "no whole number"), ("seed", 2**63, "between"),
        ("smoothing", 1.001, "between"), ("smoothing", "-0.1", "between"),
        ("drop_path", 1.0, "between"), ("crop_min", 0, "between"),
        *(("input_size", value, "no whole number") for value in (
            "224x", "x", "axb", "1x2x3", "224,320", (1, 2, 3), "1.5x2", (1.5, 2))),
        *(("input_size", value, "between") for value in (0, "0x32", "32x0", (32, 5000), -32)),
        *(("release", value, "none of corrected, 2023, 2022") for value in ("2024", "", 2022, [])),
        *(("dtype", value, "none of auto, fp32") for value in ("fp8", None, "none", "FP32", 16)),
        *(("compile", value, "not of type bool") for value in ("yes", 1, 0, None, "True")),
        *(("data_path", value, "not of type str") for value in (3, None, b"x", Path("x"))),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(name: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        greenmim.fit(hint(name), value)
    assert "\n" not in str(refused.value)


def test_every_field_refuses_something_and_keeps_its_default() -> None:
    for kind in (greenmim.PretrainConfig, greenmim.FinetuneConfig, greenmim.UseConfig, ModelConfig):
        for field in fields(kind):
            assert greenmim.fit(hint(field.name, kind), field.default) == field.default, field.name
            with pytest.raises(ValueError, match=r"is n|does not"):
                greenmim.fit(hint(field.name, kind), {"no": "value"})


def test_a_config_of_a_file_is_fitted_field_by_field() -> None:
    kinds = typing.get_type_hints(ModelConfig, include_extras=True)
    plain = json.loads(json.dumps(asdict(TEST)))  # tuples have become lists
    assert ModelConfig(**{k: greenmim.fit(kinds[k], v) for k, v in plain.items()}) == TEST
    for depths in ([2, 0], [2, 2.5], [2, "x"], ["2", None]):
        with pytest.raises(ValueError, match=r"whole number|between"):
            greenmim.fit(kinds["depths"], depths)


def test_configure_is_the_command_line() -> None:
    cases = [
        ("finetune", {}), ("export", {"weights": "a.pth", "naming": "official"}),
        ("pretrain", {"model": "swin_b_win14", "epochs": 3, "norm_pix_loss": False}),
        ("finetune", {"model": "swin_l_win14", "layer_decay": 0.5, "linear_probe": True}),
        ("pretrain", {"recipe": "small", "model": "swin_tiny_patch4_window7_224"}),
        ("features", {"weights": "a.pth", "input_size": "64x96", "per_stage": True}),
    ]
    for command, flags in cases:
        words = [command]
        for name, value in flags.items():
            spelled = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(spelled if value else f"--no-{name}")
            else:
                words.append(f"{spelled}={value}")
        function, config = greenmim.parse_config(words)
        assert config == greenmim.configure(command, **flags)
        assert (type(config), function) == greenmim.COMMANDS[command]
        ours = {k: getattr(config, k) for k in flags if k not in ("model", "input_size")}
        assert ours == {k: flags[k] for k in ours}


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("pretrian", {}, "unknown command 'pretrian'.*pretrain"),
        ("pretrain", {"epoch": 3}, "no --epoch; the closest are epochs"),
        ("pretrain", {"mixup": 0.8}, "pretrain has no --mixup"),
        ("export", {"mask_ratios": 0.5}, "mask_ratio"),
        ("pretrain", {"model": "swin_bb"}, "'swin_bb'.*swin_b"),
        ("export", {"model": "swin_bb"}, "'swin_bb'.*swin_b"),
        ("pretrain", {"recipe": "tiny"}, "--recipe tiny is none of published, small"),
        ("pretrain", {"epochs": 0}, "--epochs 0 does not lie between 1 and"),
        ("pretrain", {"release": "2024"}, "--release 2024 is none of corrected, 2023, 2022"),
        ("pretrain", {"window_size": 0}, "--window_size 0 does not lie"),
        ("export", {"naming": "keras"}, "--naming keras is none of timm, official"),
        ("finetune", {"weights": "/nowhere.pth"}, "/nowhere.pth: there is no such"),
    ],
)
def test_configure_refuses_in_one_sentence(command: str, flags: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        greenmim.configure(command, **flags)
    assert "\n" not in str(refused.value)


def test_weights_choose_the_recipe_of_their_model() -> None:
    config = replace(greenmim.MODELS["swin_l_win14"], input_size=448)
    names = on_meta(partial(SwinEncoder, config)).state_dict()
    file = {"model": names, "args": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_checkpoint", lambda *_: file)
        found = greenmim.configure("finetune", weights="large.pth")
        other = greenmim.configure("finetune", weights="large.pth", model="swin_t")
    assert (found.model, found.layer_decay, found.drop_path) == ("swin_l_win14", 0.8, 0.3)
    assert (other.model, other.layer_decay, other.drop_path) == ("swin_t", 0.9, 0.1)


def slow_votes(
    features: np.ndarray, known: np.ndarray, labels: list[int], k: int, temperature: float
) -> np.ndarray:
    votes = np.zeros((len(features), max(labels) + 1))
    for i, f in enumerate(features):
        cosines = [f @ g / np.sqrt(f @ f) / np.sqrt(g @ g) for g in known]
        for j in sorted(range(len(known)), key=lambda j: -cosines[j])[:k]:
            votes[i, labels[j]] += math.exp(cosines[j] / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (5, 0.5), (200, 0.1)])
def test_neighbours_vote_as_defined(k: int, temperature: float) -> None:
    rng = np.random.default_rng(0)
    features, known = rng.normal(size=(9, 6)), rng.normal(size=(50, 6)) + 0.3
    labels = rng.integers(0, 7, 50)
    labels[labels == 3] = 2  # a class that none is of
    ours = greenmim.nearest_neighbours(
        *(torch.from_numpy(x.astype(np.float32)) for x in (features, known)),
        torch.from_numpy(labels), k, temperature,
    )  # fmt: skip
    near(ours, slow_votes(features, known, labels.tolist(), k, temperature), rtol=1e-4, atol=1e-4)
    if (k, temperature) == (20, 0.07):  # DINO's, the defaults
        again = greenmim.nearest_neighbours(
            torch.from_numpy(7 * features).float(), torch.from_numpy(known / 3).float(),
            torch.from_numpy(labels),
        )  # fmt: skip
        near(again, ours, rtol=1e-4, atol=1e-4)  # lengths do not matter


class Shade(nn.Module):
    """Logits of four classes by the mean colour, to be counted by hand."""

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3))
        return torch.stack([level * w + b for w, b in ((1, 0), (-1, 0), (0.5, 0.1), (0, 0.2))], 1)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_accuracy_counts_each_image_once(image_folder: Path, batch_size: int) -> None:
    source, crop = data.open_source(str(image_folder), "val"), data.EvalCrop(32)
    process, model = greenmim.Process(0, 1, CPU, torch.float32), Shade().train()
    found = greenmim.accuracy(model, process, source, crop, batch_size, 0)
    assert not model.training
    losses, first = [], 0
    for k in range(len(source)):
        pixels = torch.from_numpy(crop(source.open(k)))[None]
        logits = model(data.normalize(pixels if pixels.shape[1] == 3 else pixels.movedim(-1, 1)))
        label = int(source.labels[k])
        losses.append(-logits.log_softmax(1)[0, label].item())
        first += int(logits.argmax()) == label
    assert found.pop("test_loss") == pytest.approx(np.mean(losses), rel=1e-4)
    assert found == {"test_acc1": pytest.approx(100 * first / 12), "test_acc5": 100,
                     "test_images": 12}  # fmt: skip


# ── golden tests notice what they are for ───────────────────────────────────────────────


@pytest.fixture
def stored() -> Fixture:
    return Fixture(ROOT / "tests" / "golden" / "greenmim" / "tiny_w3.npz")


def test_a_fixture_with_less_is_no_failure(stored: Fixture) -> None:
    for name in [name for name in stored.arrays if name != "loss"]:
        del stored.arrays[name]
    needed = ("build", "weight_seed", "image_seed", "image_shape", "noise_seed", "mask_ratio")
    stored.meta = {key: stored.meta[key] for key in needed}
    check, _ = kind_of(stored.meta)
    check(stored)
    stored.finish()
    assert stored.compared == 1


def test_a_fixture_of_which_nothing_is_compared_fails(stored: Fixture) -> None:
    stored.arrays = {}
    with pytest.raises(AssertionError, match="nothing that could be compared"):
        stored.finish()


def test_an_array_that_nobody_compares_fails(stored: Fixture) -> None:
    stored.arrays["depth_map"] = np.zeros(3)
    kind_of(stored.meta)[0](stored)
    with pytest.raises(AssertionError, match="depth_map"):
        stored.finish()


def test_a_fixture_of_unknown_kind_fails() -> None:
    for meta in ({}, {"build": {"kind": "vit"}}, {"cases": []}, {"cases": [{"a": 1}]}):
        check, marks = kind_of(meta)
        assert not marks
        with pytest.raises(pytest.fail.Exception):
            check(argparse.Namespace(meta=meta))
    _, (mark,) = kind_of({"build": {"kind": "twins"}, "mask_ratio": 0.5})
    assert mark.name == "skip"


SPOILT = ["loss", "pred", "grad_norms", "param_after_step", "feat/latent", "featstat/latent",
          "coords1", "ids_restore", "loss_raster"]  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_an_answer_that_is_off_fails(stored: Fixture, name: str) -> None:
    """By a two thousandth, in float32 and float64: more than the bound of any array."""
    for key in {name, f"{name}64"} & stored.arrays.keys():
        array = stored.arrays[key]
        stored.arrays[key] = array + 1 if array.dtype.kind == "i" else array * np.float32(1.0005)
    with pytest.raises(AssertionError):
        kind_of(stored.meta)[0](stored)


@pytest.mark.parametrize("name", ["grad_norms64", "param_after_step64"])
def test_a_slightly_wrong_norm_fails(stored: Fixture, name: str) -> None:
    """Of one parameter that no rounding concerns: three bounds too much."""
    place = stored.meta["grad_keys"].index("decoder_norm.weight")
    for key in (name, name.removesuffix("64")):
        stored.arrays[key][place] *= 1 + (3e-5 if "grad" in name else 3e-6)
    with pytest.raises(AssertionError, match=str(place)):
        kind_of(stored.meta)[0](stored)


def test_steps_of_noise_are_allowed_for_and_no_more() -> None:
    """A bias of keys, and one element whose gradient is as small as its rounding error."""
    layer = nn.Module()
    layer.qkv = nn.Linear(4, 12)
    weight, bias = layer.qkv.weight, layer.qkv.bias
    with torch.no_grad():
        bias.copy_(torch.linspace(-1, 1, 12))
        weight.fill_(0.5)
    weight.grad, bias.grad = torch.full_like(weight, 1e-3), torch.full_like(bias, 1e-3)
    bias.grad[4:8], weight.grad[0, 0] = 3e-9, 2e-8
    before = bias.detach().clone()
    named = dict(layer.named_parameters())
    groups = [{"params": list(named.values()), "weight_decay": 0.0, "lr_scale": 0.5}]
    reach = take_step(layer, groups, (0.9, 0.999), 1e-2)
    assert torch.equal(bias[4:8], before[4:8]) and not torch.equal(bias[:4], before[:4])
    assert reach["qkv.bias"][0] == 5e-3 * 2 and reach["qkv.weight"][0] == 0
    assert 0 < reach["qkv.weight"][1] < 5e-3 / math.sqrt(48)  # less than a whole step
    assert reach["qkv.bias"][1] < 1e-7
    exact = float(bias.detach().double().norm())
    keys = {"qkv.bias": bias}
    for name, error, fits in (("after", 9e-3, True), ("after", 1.1e-2, False),
                              ("after64", 9e-7, True), ("after64", 3e-6, False)):  # fmt: skip
        fixture = object.__new__(Fixture)
        fixture.arrays, fixture.meta, fixture.compared = {name: np.array([exact + error])}, {}, 0
        with contextlib.nullcontext() if fits else pytest.raises(AssertionError):
            check_after_step(fixture, name.removesuffix("64"), keys, reach, 1e-6 / exact)


def test_not_a_number_is_not_near() -> None:
    for ours, bound in ((math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)):
        with pytest.raises(AssertionError):
            near(ours, 1.0, atol=bound)
    with pytest.raises(AssertionError, match=r"not \(1,\)"):
        near(1.0, [1.0], atol=1.0)


# ── published files, with --checkpoints DIR ─────────────────────────────────────────────


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "published" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--checkpoints")
        skip = pytest.mark.skip(reason="no --checkpoints DIR with published files")
        params = [pytest.param(None, marks=skip, id="none")]
        if folder is not None:
            files = [p for p in sorted(folder.glob("*.pth")) if not p.name.startswith("mae_")]
            params = [pytest.param(p, id=p.stem) for p in files]
            assert params, f"no .pth file in {folder}"
        metafunc.parametrize("published", params)


def test_published_file_loads_strictly(published: Path) -> None:
    """Files of pre-training must also beat a grey guess on photographs beside them, if any."""
    file = data.read_checkpoint(published)
    name, config = greenmim.identify(file)
    assert config.embed_dim == greenmim.MODELS[name].embed_dim
    assert config.depths == greenmim.MODELS[name].depths
    head = greenmim.swin_names(file["model"]).get("head.weight")
    if "mask_token" not in file["model"]:
        outputs = None if head is None else len(head)
        make = partial(SwinClassifier, config, outputs) if outputs else partial(SwinEncoder, config)
        load(make, published)
        return
    load(partial(SwinClassifier, config, 1000), published, "2022", fresh_head=True)
    losses = []
    for release in ("2022", "2023", "corrected"):
        model, _ = load(partial(GreenMIM, replace(config, release=release)), published, release)
        if photographs := [p for p in published.parent.iterdir() if p.suffix in data.SUFFIXES]:
            source, crop = data.ImageFiles(photographs), data.EvalCrop(config.input_size)
            pixels, _, _ = next(data.eval_batches(source, crop, batch_size=8))
            with torch.no_grad():
                plan = greenmim.to_device(greenmim.draw_plan(model.config, 0.75, (0,)), CPU)
                losses.append(model.eval()(data.normalize(pixels), plan)[0].item())
    # The mean colour of each patch scores 1 where patches are normalised.
    assert not losses or min(losses) < 0.9, losses
