"""MixMAE against the released code's answers, and against what it is by definition."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import mixmae
from common import data
from common.data import InputError
from mixmae import MixClassifier, MixEncoder, MixMAE, MixPlan, ModelConfig
from tests.conftest import ROOT, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    near,
    norms,
    on_meta,
    same,
    take_step,
    trained,
    watched,
)
from tests.scripts import before_training as stopped_before_training
from tests.scripts import equal

TEST = mixmae.MODELS["test"]
before_training = partial(stopped_before_training, mixmae)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("threads")


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The model with every trainable parameter from the filling rule."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), seed)))
    return model


def plan_of(config: ModelConfig, mask: np.ndarray) -> MixPlan:
    return mixmae.to_device(mixmae.plan_mix(config, mask), CPU)


# ── golden files: what is compared ──────────────────────────────────────────────────────

LOSS, PREDICTION, GRADIENT, STEP = 2e-6, 3e-6, 3e-6, 1e-6  # spec, section 12


def bound(fixture: Fixture, name: str, rtol: float) -> float:
    """The spec's, or four times what float32 and float64 differed by in the released code."""
    spread = fixture.meta.get("float32_vs_float64", {}).get(name, {}).get("max_abs", 0.0)
    return max(rtol * np.abs(fixture.arrays[name]).max(initial=0.0), 4 * spread)


def compare(fixture: Fixture, name: str, ours: object, rtol: float = PREDICTION) -> None:
    """An array to `rtol` of its maximum."""
    if name in fixture:
        fixture.near(name, ours, atol=bound(fixture, name, rtol))


def check_features(fixture: Fixture, found: dict[str, Tensor]) -> None:
    """Whole tensors, their norms, first values, and norms of the first tokens of image 0."""
    for key in fixture.named("full/"):
        compare(fixture, key, found[key.split("/")[1]])
    for key in fixture.named("feat/"):
        _, point, what = key.split("/")
        x = found[point]
        ours = {"norm": x.double().norm(), "first64": x.flatten()[:64],
                "token_norms_image0": x[0].double().norm(dim=-1)[:256]}[what]  # fmt: skip
        compare(fixture, key, ours)


def encoder_points(model: MixEncoder, found: dict[str, Tensor], plan: MixPlan) -> dict[str, Tensor]:
    """What passed `encoder_sites`, in raster order and by the names of the fixtures."""
    stages = range(len(model.layers))
    raster = {f"stage{i + 1}_blocks": found[f"blocks{i}"][:, plan.places[i]] for i in stages}
    raster |= {f"stage{i + 1}_out": found[f"merged{i}"][:, plan.places[i + 1]] for i in stages[:-1]}
    raster[f"stage{len(stages)}_out"] = raster[f"stage{len(stages)}_blocks"]
    raster["mixed_plus_pos"] = found["mixed_plus_pos"][:, plan.places[0]]
    return raster | {"encoder_norm": found["encoder_norm"]}


def encoder_sites(model: MixEncoder) -> dict[str, tuple[nn.Module, str]]:
    sites = {f"blocks{i}": (layer, "out") for i, layer in enumerate(model.layers)}
    sites |= {f"merged{i}": (x.downsample, "out") for i, x in enumerate(model.layers[:-1])}
    return sites | {"mixed_plus_pos": (model.layers[0], "in"), "encoder_norm": (model.norm, "out")}


def check_state(fixture: Fixture, model: nn.Module) -> None:
    """Names and shapes of the released state dict, index buffers as exported."""
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    exported = mixmae.export_state(model, "official").items()
    shapes |= {k: list(v.shape) for k, v in exported if k.endswith("position_index")}
    assert shapes == fixture.told("shapes", shapes)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    counts = {"n_params_all": sum(p.numel() for p in model.parameters())}
    counts["n_params_trainable"] = counts["n_params_all"]
    counts["n_params_all"] += sum(b.numel() for b in model.buffers())  # the frozen tables
    assert counts == {key: fixture.told(key, number) for key, number in counts.items()}


def check_training(
    fixture: Fixture, model: nn.Module, groups: list[dict], betas: tuple[float, float]
) -> None:
    """Gradients; decay and rate of every parameter; all norms after one step, and of that step."""
    check_gradients(fixture, model, GRADIENT)
    parameters = trained(fixture, model)
    by_name = {id(p): group for group in groups for p in group["params"]}
    for key in ("weight_decay", "lr_scale"):
        ours = {name: by_name[id(p)][key] for name, p in parameters.items()}
        stored = fixture.told(key, ours)
        assert ours.keys() == stored.keys()
        near(list(ours.values()), [stored[k] for k in ours], rtol=1e-6, message=key)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    reach = take_step(model, groups, betas)
    check_after_step(fixture, "param_after_step", parameters, reach, STEP)
    if "param_step_delta" in fixture:
        ours = norms([p - before[name] for name, p in parameters.items()])
        noise, _, in_doubt = np.array([reach[name] for name in parameters]).T
        rounded = 2.0**-22 * norms(list(before.values()))  # of a difference of near numbers
        allowed = 1e-5 * ours + rounded + noise + in_doubt
        near(ours, fixture.take("param_step_delta"), atol=allowed, message="param_step_delta")


# ── golden files: pre-training ──────────────────────────────────────────────────────────

THEIR_NAMES = {"img_size": "input_size"}


def config_of(model: dict) -> ModelConfig:
    """Architecture from the `model` entry of a fixture."""
    given = dict(model.get("overrides", model))
    given.pop("num_classes", None)
    given = {THEIR_NAMES.get(k, k): tuple(v) if isinstance(v, list) else v
             for k, v in given.items()}  # fmt: skip
    base = mixmae.MODELS[mixmae.known_model(model.get("name", "mixmim_base"))]
    return replace(base, **given)


def noise_of(seed: int, units: int) -> np.ndarray:
    return ((uniform("mask/noise", (1, 1, units), seed) + 1) / 2).astype(np.float32).reshape(-1)


def check_mask(fixture: Fixture, config: ModelConfig) -> np.ndarray:
    """The mask by its noise, and what every stage sees of it."""
    meta = fixture.meta
    noise = fixture.arrays.pop("noise", None)
    rule = noise_of(meta["noise_seed"], config.units**2)
    same(rule, rule if noise is None else noise)
    mask = mixmae.hidden_units(rule, meta["mask_ratio"] + meta.get("range_mask_extra", 0.0))
    if "mask" in fixture:
        same(mask, fixture.take("mask").astype(bool))
    pixels = plan_of(config, mask).pixels
    for name in fixture.named("mask_s"):
        stride = config.patch_size * 2 ** (int(name[-1]) - 1)
        same(pixels[::stride, ::stride], fixture.take(name).astype(bool))
    assert fixture.told("masked", mask.sum()) == mask.sum()
    assert fixture.told("patches", mask.size) == mask.size
    return mask


def check_pretraining(fixture: Fixture) -> None:
    meta = fixture.meta
    config = config_of(meta["model"])
    mixmae.model_config(config)  # it is one that may be asked for
    model = fill(MixMAE(config), meta["weight_seed"]).eval()
    check_state(fixture, model)
    images = torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))
    mask = check_mask(fixture, config)
    plan = plan_of(config, mask)

    sites = encoder_sites(model) | {
        "decoder_embed": (model.decoder_embed, "out"),
        "decoder_in": (model.decoder_blocks[0], "in"),
    }
    with torch.no_grad(), watched(sites) as found:
        latent = model.encode(mixmae.mix(images, plan.pixels), plan)
        decoded = model.decode(latent, plan.hidden)
    whole = model.decoder_pred(model.decoder_norm(decoded)).detach()  # (2B, U, P), as released
    points = found | encoder_points(model, found, plan) | {"decoder_blocks": decoded}
    every = torch.arange(config.side(0) ** 2)
    points["patch_embed"] = model.patch_embed(images, every).detach()  # of the unmixed images
    check_features(fixture, points)
    target = mixmae.patchify(images, config.mask_unit)
    if config.norm_pix_loss:
        target, _, _ = mixmae.normalize_patches(target)
    for name, x in (("pred", whole), ("target", target)):
        compare(fixture, name, x[:, :: meta.get("slice_token", 1), :: meta.get("slice_channel", 1)])
        compare(fixture, f"{name}_token_norms", x.double().norm(dim=-1))
    x = whole.double()
    compare(fixture, "pred_mean_std_l2", torch.stack([x.mean(), x.std(), x.norm()]))

    loss, prediction = model(images, mask)
    fixture.near("loss", loss, rtol=LOSS)
    compare(fixture, "loss_per_patch", (prediction - target).square().mean(-1))
    hidden = torch.from_numpy(mask)[:, None]
    released = torch.where(hidden, *(x if i == 0 else x.flip(0)
                                     for i, x in enumerate(whole.chunk(2))))  # fmt: skip
    near(prediction, released, atol=PREDICTION * released.abs().max().item())
    loss.backward()
    groups = mixmae.parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] in ([0.05, 0.0], [0.0, 0.05])
    check_training(fixture, model, groups, (0.9, 0.95))


# ── golden files: fine-tuning ───────────────────────────────────────────────────────────


def soft_targets(labels: Tensor, classes: int, lam: float, smoothing: float) -> Tensor:
    smooth = F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    return lam * smooth + (1 - lam) * smooth.flip(0)


def check_takeover(fixture: Fixture, config: ModelConfig, classes: int, folder: Path) -> nn.Module:
    """A classifier that takes over a pre-training file of another size, head by the rule."""
    meta = fixture.meta
    source = fill(MixMAE(config_of(meta["source_model"])), meta["source_weight_seed"])
    torch.save({"model": source.state_dict()}, folder / "source.pth")
    file = data.read_checkpoint(folder / "source.pth")
    make = partial(MixClassifier, config, classes)
    model, said = mixmae.load_weights(make, "source.pth", file, fresh_head=True)
    there, here = source.state_dict(), model.state_dict()
    changed = {k: [list(there[k].shape), list(v.shape)] for k, v in here.items()
               if k in there and there[k].shape != v.shape}  # fmt: skip
    assert changed == fixture.told("interpolated", changed)
    assert f"{len(changed)} position tables interpolated; the head starts fresh" in said
    missing = set(here) - set(there)
    assert missing == set(fixture.told("missing_keys", missing))
    assert fixture.told("missing_index_buffers", sum(config.depths)) == sum(config.depths)
    for key in fixture.named("interp/"):
        table = key.replace("pos_embed_", "pos_embed/").removeprefix("interp/")
        name, what = table.split("/")
        x = here[name].reshape(-1, here[name].shape[-1])
        ours = {"norm": x.double().norm(), "first64": x.flatten()[:64], "full": x,
                "last64": x.flatten()[-64:]}.get(what, x.double().norm(dim=-1))  # fmt: skip
        compare(fixture, key, ours)
    with torch.no_grad():
        for name, p in model.head.named_parameters(prefix="head"):
            p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), meta["weight_seed"])))
    return model


def check_finetuning(fixture: Fixture, folder: Path) -> None:
    meta = fixture.meta
    config, classes = config_of(meta["model"]), meta["model"].get("num_classes", 1000)
    if "source_model" in meta:
        model = check_takeover(fixture, config, classes, folder).eval()
    else:
        model = fill(MixClassifier(config, classes), meta["weight_seed"]).eval()
    check_state(fixture, model)
    images = torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))
    labels = (7 * torch.arange(len(images)) + 3) % classes
    if "labels" in fixture:
        same(labels, fixture.take("labels"))
    sites = encoder_sites(model) | {"patch_embed": (model.patch_embed, "out")}
    plan = model.dense_plan(config.input_size, config.input_size, CPU)
    with watched(sites) as found:
        logits = model(images)
    points = found | encoder_points(model, found, plan)
    points["patch_embed"] = found["patch_embed"][:, plan.places[0]]
    check_features(fixture, points)
    compare(fixture, "logits", logits)
    compare(fixture, "pooled_first64", found["encoder_norm"].mean(1).flatten()[:64])
    targets = soft_targets(labels, classes, meta.get("mixup_lam", 1.0), meta.get("smoothing", 0.0))
    losses = {
        "soft": F.cross_entropy(logits, targets),
        "smooth": F.cross_entropy(logits, labels, label_smoothing=meta.get("smoothing", 0.0)),
        "plain": F.cross_entropy(logits, labels),
    }
    for name, value in losses.items():
        if f"loss_{name}" in fixture:
            fixture.near(f"loss_{name}", value, rtol=LOSS)
    loss = losses[meta.get("criterion", "soft")]
    fixture.near("loss", loss, rtol=LOSS)
    loss.backward()
    groups = mixmae.parameter_groups(model, 0.05, config.depths, meta.get("layer_decay", 1.0))
    check_training(fixture, model, groups, (0.9, 0.999))


# ── golden files: nine steps ────────────────────────────────────────────────────────────


def check_trajectory(fixture: Fixture, *_: object) -> None:
    meta = fixture.meta
    per_epoch, epochs, batch = meta["iterations_per_epoch"], meta["epochs"], meta["batch"]
    for part in ("pretrain", "finetune"):
        config = config_of(meta[f"{part}_model"])
        classes = meta[f"{part}_model"].get("num_classes", 0)
        first = part == "pretrain"
        model = fill(MixMAE(config) if first else MixClassifier(config, classes), 601 + 1 - first)
        model.eval()
        layers = ((), 1.0) if first else (config.depths, 0.7)
        groups = mixmae.parameter_groups(model, 0.05, *layers)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95 if first else 0.999))
        stored = fixture.told(part)
        assert set(stored["keys"]) == {name for name, _ in model.named_parameters()}
        losses, rates, gradients = [], [], []
        reach = dict.fromkeys(stored["keys"], 0.0)
        for step in range(per_epoch * epochs):
            shape = (batch, 3, config.input_size, config.input_size)
            images = torch.from_numpy(filled_images(shape, (800 if first else 900) + step))
            lr = mixmae.lr_at(step / per_epoch, 1e-3, 0.0, 0.0 if first else 1e-6, 1, 1, epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            rates.append(max(group["lr"] / group["lr_scale"] for group in optimizer.param_groups))
            if first:
                mask = mixmae.hidden_units(noise_of(700 + step, config.units**2), 0.5)
                if "pretrain/mask" in fixture:
                    same(mask, fixture.arrays["pretrain/mask"][step].astype(bool))
                loss, _ = model(images, mask)
            else:
                labels = (7 * torch.arange(batch) + 3) % classes
                loss = F.cross_entropy(model(images), soft_targets(labels, classes, 0.3, 0.1))
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            named = dict(model.named_parameters())
            gradients.append(np.linalg.norm(norms([p.grad for p in named.values()])))
            before = {k: p.detach().clone() for k, p in named.items() if k.endswith("qkv.bias")}
            optimizer.step()
            rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
            with torch.no_grad():  # keys: their exact gradient is zero, so any step is noise
                for key, old in before.items():
                    third = slice(len(old) // 3, 2 * len(old) // 3)
                    named[key][third] = old[third]
                    reach[key] += rate[id(named[key])] * (len(old) / 3) ** 0.5
        if first and "pretrain/mask" in fixture:
            fixture.take("pretrain/mask")
        for name, ours, rtol in (("loss_steps", losses, LOSS), ("grad_norm", gradients, GRADIENT)):
            fixture.near(f"{part}/{name}", np.array(ours), rtol=rtol)
        scale = 1.0 if first else max(group["lr_scale"] for group in groups)
        fixture.near(f"{part}/lr", np.array(rates) * scale, rtol=1e-12, atol=1e-18)
        if f"{part}/param_norms" in fixture:
            values = fixture.take(f"{part}/param_norms")
            allowed = STEP * values + np.array([reach[key] for key in stored["keys"]])
            near(norms([named[key] for key in stored["keys"]]), values, atol=allowed)


# ── golden files: tables, masks, recipes ────────────────────────────────────────────────


def window_index(window: int) -> Tensor:
    _, (span,) = mixmae.plan_stage(np.zeros((window, window), np.int64), window)
    return torch.from_numpy(span.index)


def check_unit(fixture: Fixture, *_: object) -> None:
    """Window attention with and without a mask, index buffers, position tables, bf16."""
    meta, weights = fixture.meta, []
    dim, window, count = meta["dim"], meta["window"], meta["windows_in_batch"]
    attention = fill(
        mixmae.MixedWindowAttention(dim, meta["heads"], window, True), meta["weight_seed"])
    x = uniform("attention/x", (count, window**2, dim), 8).astype(np.float32)
    x = torch.from_numpy(x).reshape(1, -1, dim)
    source = torch.from_numpy(fixture.take("mask"))
    apart = (source[:, :, None] != source[:, None, :])[:, None]

    def watch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        logits = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
        weights.append(logits.softmax(-1).reshape(count, -1, *logits.shape[2:]).detach())
        return mixmae_attend(q, k, v, bias)

    mixmae_attend = mixmae.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixmae, "attend", watch)
        for name, mask in (("masked", apart), ("unmasked", None)):
            span = mixmae.Span(0, count, window_index(window), mask)
            out = attention(x, [span]).detach().reshape(count, -1, dim)
            compare(fixture, f"out_{name}", out)
            compare(fixture, f"prob_{name}", weights[-1])
            if mask is not None:
                assert (weights[-1].masked_select(apart) == 0).all()
        span = mixmae.Span(0, count, window_index(window), apart)
        half = attention.half()(x.half(), [span]).detach().float().reshape(count, -1, dim)
    if "out_masked_float16" in fixture:
        near(half, fixture.take("out_masked_float16"), atol=2e-2)  # spec, section 12

    for key in fixture.named("relative_position_index"):
        kind, side = key.split("/")
        index = window_index(int(side))
        part = {"row0": index[0], "col0": index[:, 0]}.get(kind.rsplit("_", 1)[1], index)
        same(part, fixture.take(key))
    for side, stored in fixture.told("index_checksum", {}).items():
        i = torch.arange(int(side) ** 2)
        assert (window_index(int(side)) * (31 * i[:, None] + 17 * i + 1)).sum() == stored
    for key in fixture.named("sincos/") + fixture.named("sincos_rows/"):
        width, side = (int(n) for n in key.split("/")[1].split("x"))
        table = mixmae.sincos_embedding(width, side)[0]
        if key.startswith("sincos_rows/"):
            table = table[fixture.take(key.replace("rows/", "rows_index/"))]
        compare(fixture, key, table)
    for case, stored in fixture.told("autocast", {}).items():
        for path in golden_files("mixmae"):
            if path.stem == case:
                check_autocast(Fixture(path).meta, stored)


def check_autocast(meta: dict, stored: dict) -> None:
    """bf16: the loss is float32 and off by what bf16 is off, a few thousandths at most."""
    config = config_of(meta["model"])
    model = fill(MixMAE(config), meta["weight_seed"]).eval()
    images = torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))
    ratio = meta["mask_ratio"] + meta["range_mask_extra"]
    mask = mixmae.hidden_units(noise_of(meta["noise_seed"], config.units**2), ratio)
    with torch.no_grad():
        whole, _ = model(images, mask)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(images, mask)
    near(whole, stored["float32"], rtol=LOSS)
    assert str(loss.dtype) == stored["loss_dtype"]
    near(loss, stored["autocast_bfloat16"], rtol=2e-3)


def check_masking(fixture: Fixture, *_: object) -> None:
    for case in fixture.told("cases"):
        i, config = case["index"], replace(mixmae.MODELS["swin_b"], input_size=case["image"])
        noise = noise_of(case["noise_seed"], config.units**2)
        if f"{i}/noise" in fixture:
            same(noise, fixture.take(f"{i}/noise"))
        mask = mixmae.hidden_units(noise, case["mask_ratio"] + case["range_extra"])
        assert mask.sum() == case["masked"]
        pixels = np.repeat(np.repeat(mask.reshape(config.units, -1), 32, 0), 32, 1)
        for name in fixture.named(f"{i}/mask"):
            stride = 4 * 2 ** (int(name[-1]) - 1) if "_s" in name else 32
            same(pixels[::stride, ::stride], fixture.take(name).astype(bool))
        fits = replace(config, window_size=(8, 8, 8, 8) if case["image"] != 224 else (14,) * 4)
        if all(fits.side(s) % fits.window(s) == 0 for s in range(4)):
            same(mixmae.plan_mix(fits, mask).pixels, pixels)


def check_recipe(fixture: Fixture, *_: object) -> None:
    for name, s in fixture.told("schedules", {}).items():
        for key in fixture.named(f"{name}/lr"):
            scale = 0.7**25 if key.endswith("patch_embed") else 1.0
            ours = [scale * mixmae.lr_at(epoch, s["lr"], 0.0, s["min_lr"], s["warmup_epochs"],
                                         s["warmup_epochs"], s["epochs"])
                    for epoch in fixture.arrays[f"{name}/epochs"]]  # fmt: skip
            near(ours, fixture.take(key), rtol=1e-9, atol=1e-15, message=key)
        fixture.arrays.pop(f"{name}/epochs", None)
    base = mixmae.MODELS["swin_b"]
    models = {"pretrain": MixMAE(base), "finetune": MixClassifier(base, 1000, 0.1)}
    frozen = {"absolute_pos_embed", "decoder_pos_embed"}
    for key, layers in (("finetune_layer_map", True), ("pretrain_weight_decay", False)):
        if not (stored := fixture.told(key)):
            continue
        model = models[key.split("_")[0]]
        how = (base.depths, 0.7) if layers else ()
        groups = mixmae.parameter_groups(model, 0.05, *how)
        by_id = {id(p): group for group in groups for p in group["params"]}
        assert {name for name, v in stored.items() if v in (None, [0, None, None])} <= frozen
        named = dict(model.named_parameters())
        assert named.keys() == stored.keys() - frozen
        for name, p in named.items():
            group, value = by_id[id(p)], stored[name]
            if layers:
                assert mixmae.layer_id(name, base.depths) == value[0], name
                assert group["lr_scale"] == pytest.approx(value[1], rel=1e-12), name
            assert group["weight_decay"] == (value[2] if layers else value), name
        if layers:
            assert len(groups) == fixture.told("finetune_groups", len(groups))
    if stored := fixture.told("drop_path_rates_base_0_1"):
        rates = [b.drop_path for layer in models["finetune"].layers for b in layer.blocks]
        near(rates, stored, atol=1e-7)
    for command, model in models.items():
        exported = model.state_dict() | mixmae.export_state(model, "official")
        if stored := fixture.told(f"shapes_{command}_base"):
            assert {k: list(v.shape) for k, v in exported.items()} == stored
        for name, values in fixture.told(f"init_stats_{command}", {}).items():
            check_initial(name, exported[name], values)
    if stored := fixture.told("dtypes"):
        assert {str(v.dtype) for v in exported.values()} == set(stored)


def check_initial(name: str, x: Tensor, stored: list[float]) -> None:
    """[mean, deviation, min, max] of another draw: within six standard errors, a tenth more for
    the extremes of what is unbounded; what is not drawn exactly."""
    mean, std, low, high = stored
    ours = [x.mean().item(), x.std().item(), x.min().item(), x.max().item()]
    if std == 0 or name.endswith("pos_embed"):
        near(ours, stored, atol=2e-6, message=name)
        return
    error = 6 * std / x.numel() ** 0.5
    near(ours[:2], [mean, std], atol=2 * error, message=name)
    uniform_edge = 3**0.5 * std  # of a uniform distribution; a normal one goes further
    edge = 1.6 * max(abs(low), high) if max(abs(low), high) > 1.2 * uniform_edge else 1.02 * max(
        abs(low), high, uniform_edge)
    assert -edge <= ours[2] and ours[3] <= edge, name


# ── golden files: one test each ─────────────────────────────────────────────────────────

KINDS = {
    "pretrain": check_pretraining, "finetune": check_finetuning, "trajectory": check_trajectory,
    "unit": check_unit, "masking": check_masking, "recipe": check_recipe,
}  # fmt: skip


def golden_cases() -> list:
    params = []
    for path in golden_files("mixmae"):
        meta = Fixture(path).meta
        large = "name" in meta.get("model", {}) or meta.get("kind") == "recipe"
        marks = [pytest.mark.slow] if large else []
        params.append(pytest.param(path, meta.get("kind"), marks=marks, id=path.stem))
    return params


@pytest.mark.parametrize(("path", "kind"), golden_cases())
def test_golden_mixmae(path: Path, kind: str, tmp_path: Path) -> None:
    fixture = Fixture(path)
    assert kind in KINDS, f"no check for a fixture of kind {kind}"
    args = (tmp_path,) if kind == "finetune" else ()
    KINDS[kind](fixture, *args)
    fixture.finish()


# ── small models, masks, files ──────────────────────────────────────────────────────────

# Windows of whole units; across units; across units in four stages; one in every stage.
GEOMETRIES = {
    "whole_units": TEST,
    "straddling": replace(TEST, input_size=48, window_size=(6, 3, 3)),
    "four_stages": replace(
        TEST, input_size=96, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
        window_size=(12, 6, 6, 3)),
    "one_window": replace(TEST, window_size=(16, 8, 4)),
}  # fmt: skip
each_geometry = pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def build(config: ModelConfig, seed: int = 0) -> MixMAE:
    return fill(MixMAE(config), seed)


def pictures(config: ModelConfig, batch: int = 2, seed: int = 7) -> Tensor:
    side = config.input_size
    return torch.from_numpy(filled_images((batch, 3, side, side), seed))


def some_mask(config: ModelConfig, ratio: float = 0.5, seed: int = 1) -> np.ndarray:
    return mixmae.hidden_units(np.random.default_rng(seed).random(config.units**2), ratio)


def tokens_of(config: ModelConfig, mask: np.ndarray, stage: int) -> np.ndarray:
    """The mask, flat or (rows, columns), as (h, w) tokens of a stage."""
    k = config.unit_tokens(stage)
    square = mask if mask.ndim == 2 else mask.reshape(config.units, config.units)
    return square.repeat(k, 0).repeat(k, 1)


def stage_tokens(model: MixMAE, images: Tensor, plan: MixPlan) -> list[Tensor]:
    """Tokens of the mixtures after every stage, in raster order."""
    with torch.no_grad():
        tokens = model.stages(mixmae.mix(images, plan.pixels), plan, model.mix_embed)
    return [x[:, place] for x, place in zip(tokens, plan.places, strict=True)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def our_file(model: MixEncoder, path: Path, **config: object) -> Path:
    """A checkpoint as our commands write it, without the state of training."""
    args = {"script": "mixmae", "command": "pretrain", "model": "test", "classes": [],
            "config": asdict(model.config) | config, "settings": {}}  # fmt: skip
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


def load(
    make: Callable[[], nn.Module], path: Path, fresh_head: bool = False
) -> tuple[nn.Module, str]:
    return mixmae.load_weights(make, str(path), data.read_checkpoint(path), fresh_head)


def refuses(path: Path, command: str, **flags: object) -> str:
    """A command has one sentence for its --weights, which names the file."""
    _, function = mixmae.COMMANDS[command]
    with pytest.raises(InputError, match=re.escape(str(path))) as refused:
        function(mixmae.configure(command, weights=str(path), device="cpu", **flags))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


# ── masks and mixing ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.3, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("side", [2, 3, 7])
def test_mask_hides_the_smallest_noise(side: int, ratio: float) -> None:
    noise = np.random.default_rng(side).random(side**2)
    mask = mixmae.hidden_units(noise, ratio)
    assert mask.shape == (side**2,) and mask.dtype == bool
    assert mask.sum() == int(side**2 * ratio)
    assert noise[mask].max(initial=-1) < noise[~mask].min(initial=2)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_hidden_pixels_are_the_partners(batch: int) -> None:
    images, hidden = torch.randn(batch, 3, 2, 4), torch.zeros(2, 4, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 2:] = True
    mixed = mixmae.mix(images, hidden)
    assert mixed.shape == images.shape
    for i in range(batch):
        for y in range(2):
            for x in range(4):
                source = batch - 1 - i if hidden[y, x] else i
                assert torch.equal(mixed[i, :, y, x], images[source, :, y, x])
    if batch % 2:
        assert torch.equal(mixed[batch // 2], images[batch // 2])


def test_the_mask_of_a_plan_is_that_of_units_pixels_and_sources() -> None:
    config = replace(GEOMETRIES["straddling"], mix_embed=True)
    mask = some_mask(config)
    plan = plan_of(config, mask)
    assert torch.equal(plan.hidden, torch.from_numpy(mask)[:, None])
    for y in range(config.input_size):
        for x in range(config.input_size):
            unit = y // config.mask_unit * config.units + x // config.mask_unit
            assert plan.pixels[y, x] == mask[unit]
    for stage, (place, source) in enumerate(zip(plan.places, plan.sources, strict=True)):
        same(source[place], tokens_of(config, mask, stage).reshape(-1))


def test_a_drawn_mix_is_a_function_of_its_seed_alone() -> None:
    np.random.seed(0)  # noqa: NPY002 - the global stream must neither matter nor move
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = (mixmae.draw_mix(TEST, 0.5, 0.2, (0, 5, 1)) for _ in range(2))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert equal(*(vars(mixmae.to_device(replace(p, spans=[]), CPU)) for p in (first, again)))
    others = [mixmae.draw_mix(TEST, 0.5, 0.2, seed) for seed in ((1, 5, 1), (0, 6, 1), (0, 5, 2))]
    assert len({tuple(plan.hidden.flatten()) for plan in (first, *others)}) == 4
    drawn = [mixmae.draw_mix(TEST, 0.5, 0.0, (0, step)).hidden for step in range(400)]
    assert np.abs(np.mean(drawn, 0) - 0.5).max() < 0.1  # four standard errors


def test_the_number_of_hidden_units_varies_only_if_a_range_is_asked_for() -> None:
    def counts(*how: float) -> set[int]:
        return {int(mixmae.draw_mix(TEST, *how, (0, k)).hidden.sum()) for k in range(60)}

    assert counts(0.5, 0.0) == {8}
    assert counts(0.5, 0.25) == {8, 9, 10, 11}
    assert counts(0.0, 0.0) == {0} and counts(1.0, 0.0) == {16}


# ── plans ───────────────────────────────────────────────────────────────────────────────

# Rectangles of units, and windows that the border cuts or that are larger than the map.
PADDED = {
    "cut": (replace(TEST, window_size=(5, 3, 2)), (3, 2)),
    "cut_in_one_axis": (replace(TEST, window_size=(8, 4, 3)), (2, 3)),
    "larger_than_the_map": (replace(TEST, window_size=(16, 8, 4)), (2, 3)),
    "larger_than_one_side": (replace(TEST, window_size=(10, 5, 3)), (2, 4)),
}
LAYOUTS = {k: (c, (c.units, c.units)) for k, c in GEOMETRIES.items()} | PADDED
each_layout = pytest.mark.parametrize(("config", "shape"), LAYOUTS.values(), ids=LAYOUTS.keys())


def two_masks(shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """One of half the units, and one of none."""
    count = shape[0] * shape[1]
    yield mixmae.hidden_units(np.random.default_rng(3).random(count), 0.5).reshape(shape)
    yield np.zeros(shape, bool)


def tokens_in_slots(plan: MixPlan, stage: int) -> np.ndarray:
    """(N,) the raster index of the token in each slot, -1 = padding."""
    slots = len(plan.merges[stage - 1]) // 4 if stage else len(plan.patches)
    tokens = np.full(slots, -1)
    tokens[plan.places[stage]] = np.arange(len(plan.places[stage]))
    return tokens


@each_layout
def test_every_token_stands_in_one_slot(config: ModelConfig, shape: tuple[int, int]) -> None:
    for mask in two_masks(shape):
        plan = mixmae.plan_mix(config, mask)
        for stage, (place, spans) in enumerate(zip(plan.places, plan.spans, strict=True)):
            area = tokens_of(config, mask, stage).size
            slots = len(tokens_in_slots(plan, stage))
            assert len(place) == area == len(set(place.tolist())) <= slots
            covered = [slot for s in spans
                       for slot in range(s.start, s.start + s.windows * len(s.index))]  # fmt: skip
            assert covered == list(range(slots))
            if shape == (config.units, config.units):  # nothing pads
                assert slots == area
        tokens = tokens_in_slots(plan, 0)
        same(plan.patches[tokens >= 0], tokens[tokens >= 0])


@each_layout
def test_tokens_see_their_window_and_source(config: ModelConfig, shape: tuple[int, int]) -> None:
    """For each pair of tokens the row of the bias table, or -1, against the definition; so what
    pads is seen by none, and `apart` is "of unlike source"."""
    for mask in two_masks(shape):
        plan = mixmae.plan_mix(config, mask)
        for stage, spans in enumerate(plan.spans):
            source, tokens = tokens_of(config, mask, stage), tokens_in_slots(plan, stage)
            ours = np.full((source.size, source.size), -1)
            for span in spans:
                size = len(span.index)
                for w in range(span.windows):
                    inside = tokens[span.start + w * size :][:size]
                    sees = np.ones((size, size), bool) if span.apart is None else ~span.apart[w, 0]
                    assert sees.any(1).all()  # or softmax would be NaN, in padding, too
                    assert not (sees & (inside >= 0)[:, None] & (inside < 0)).any()
                    i, j = np.nonzero(sees & (inside >= 0)[:, None])
                    assert (ours[inside[i], inside[j]] == -1).all()
                    ours[inside[i], inside[j]] = span.index[i, j]
            h, w = source.shape
            window, (y, x) = config.window(stage), np.divmod(np.arange(h * w), w)
            cell = (y // min(window, h)) * w + x // min(window, w)
            pair = lambda v: (v[:, None], v[None])  # noqa: E731
            together = np.equal(*pair(cell)) & np.equal(*pair(source.reshape(-1)))
            dy, dx = np.subtract(*pair(y)), np.subtract(*pair(x))
            rows = (dy + window - 1) * (2 * window - 1) + dx + window - 1
            same(ours, np.where(together, rows, -1))


@each_geometry
def test_a_stage_of_one_window_attends_source_by_source(config: ModelConfig) -> None:
    mask = some_mask(config)
    plan = mixmae.plan_mix(config, mask)
    alone = [stage for stage in range(len(config.depths))
             if config.window(stage) == config.side(stage)]  # fmt: skip
    assert alone
    for stage, spans in enumerate(plan.spans):
        if stage not in alone:
            (span,) = spans
            assert span.windows == (config.side(stage) // config.window(stage)) ** 2
            continue
        source = tokens_of(config, mask, stage).reshape(-1)
        tokens = tokens_in_slots(plan, stage)
        for span, value in zip(spans, (False, True), strict=True):
            inside = tokens[span.start :][: len(span.index)]
            assert span.apart is None and span.windows == 1
            same(inside, np.flatnonzero(source == value))
    for ratio in (0.0, 1.0):  # one source alone
        plan = mixmae.plan_mix(config, some_mask(config, ratio))
        assert all(len(spans) == 1 and spans[0].apart is None for spans in plan.spans)


@each_layout
def test_merging_takes_blocks_in_the_order_of_4(
    config: ModelConfig, shape: tuple[int, int]
) -> None:
    """Stage by stage, and followed from the patches to the units."""
    for mask in two_masks(shape):
        plan = mixmae.plan_mix(config, mask)
        made_of = plan.patches[:, None]  # (N, patches) of each slot
        for stage, merge in enumerate(plan.merges):
            w = tokens_of(config, mask, stage).shape[1]
            blocks = tokens_in_slots(plan, stage)[merge].reshape(-1, 4)
            following = tokens_in_slots(plan, stage + 1)
            for block, token in zip(blocks.tolist(), following.tolist(), strict=True):
                y, x = divmod(max(token, 0), w // 2)  # padding repeats token 0
                cells = ((2 * y + dy) * w + 2 * x + dx for dx in (0, 1) for dy in (0, 1))
                assert block == list(cells)
            made_of = made_of[merge].reshape(len(following), -1)
        made_of, k = made_of[plan.places[-1]], config.unit_tokens(0)
        patches = np.arange(mask.size * k**2).reshape(shape[0] * k, shape[1] * k)
        for unit, found in enumerate(made_of):
            top, left = (k * n for n in divmod(unit, shape[1]))
            same(np.sort(found), np.sort(patches[top : top + k, left : left + k].reshape(-1)))


def test_masks_of_another_size_are_refused() -> None:
    for size in (9, 15, 32):
        with pytest.raises(ValueError, match=rf"{size} units.*16"):
            mixmae.plan_mix(TEST, np.zeros(size, bool))
        with pytest.raises(ValueError, match=rf"{size} units.*16"):
            MixMAE(TEST)(pictures(TEST), torch.zeros(size))
    for shape in ((96, 96), (64, 96), (32, 32)):
        with pytest.raises(ValueError, match=rf"{shape[1]}\).*64 px"):
            MixMAE(TEST)(torch.zeros(1, 3, *shape), some_mask(TEST))


# ── who sees whom ───────────────────────────────────────────────────────────────────────


@each_geometry
def test_no_token_knows_the_other_image_of_its_mixture(config: ModelConfig) -> None:
    model, mask, batch, i = build(config).eval(), some_mask(config), 4, 1
    plan, images = plan_of(config, mask), pictures(config, batch)
    changed = images.clone()
    changed[i] = pictures(config, batch, seed=9)[i]
    pairs = zip(*(stage_tokens(model, x, plan) for x in (images, changed)), strict=True)
    for stage, (before, after) in enumerate(pairs):
        source = tokens_of(config, mask, stage).reshape(-1)
        own = torch.zeros(batch, len(source), dtype=torch.bool)
        own[i], own[batch - 1 - i] = torch.from_numpy(~source), torch.from_numpy(source)
        moved = (after - before).abs().amax(-1)
        assert moved[~own].max() <= 1e-6 and moved[own].min() > 1e-2


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@each_geometry
def test_each_unit_is_predicted_from_its_image_where_it_is_not(
    config: ModelConfig, batch: int
) -> None:
    """Of a prediction where m = 1 only pixels of the same image where m = 0 know, and the other
    way round: over the pair of mixtures no unit is left out, and none sees itself. So, too, in the
    image that is mixed with itself."""
    model, mask, images = build(config).eval(), some_mask(config), pictures(config, batch)
    _, prediction = model(images.requires_grad_(), mask)
    for i in range(batch):
        for part in (mask, ~mask):
            score = prediction[i, part].square().sum()
            (gradient,) = torch.autograd.grad(score, images, retain_graph=True)
            known = mixmae.patchify(gradient, config.mask_unit).abs().amax(-1) > 0
            wanted = torch.zeros(batch, config.units**2, dtype=torch.bool)
            wanted[i, ~part] = True
            assert torch.equal(known, wanted)


def test_predictions_are_those_of_the_right_sequence_in_raster_order() -> None:
    """With a decoder that says which of its sequences and positions it was asked for."""
    config, batch = replace(TEST, decoder_dim=4, decoder_num_heads=1), 3
    model, mask, units = MixMAE(config), some_mask(config), config.units**2
    rows, places = np.divmod(np.arange(2 * batch * units), units)
    code = torch.from_numpy(np.stack([rows, places, 0 * rows, 0 * rows], 1)).float()
    model.decode = lambda latent, hidden: code.view(2 * batch, units, 4)
    model.decoder_norm = nn.Identity()
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.weight[:4] = torch.eye(4)
        _, prediction = model(pictures(config, batch), mask)
    assert prediction.shape == (batch, units, 3 * config.mask_unit**2)
    for i in range(batch):
        for unit in range(units):
            row = i if mask[unit] else batch + batch - 1 - i
            assert prediction[i, unit, :2].tolist() == [row, unit]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_one_window_split_is_one_window_masked(ratio: float) -> None:
    """Forward and backward in float64 (softmax is float32 in either)."""
    config = GEOMETRIES["one_window"]
    mask, side = some_mask(config, ratio), config.side(1)
    plan = plan_of(config, mask)
    assert len(plan.spans[1]) == 2
    tokens = torch.from_numpy(tokens_in_slots(plan, 1))
    source = torch.from_numpy(tokens_of(config, mask, 1).reshape(-1))[tokens]
    apart = (source[:, None] != source[None])[None, None]
    masked = mixmae.Span(0, 1, window_index(side)[tokens][:, tokens], apart)
    attention = fill(mixmae.MixedWindowAttention(8, 2, side, True), 3).double()
    data_, weight = (torch.from_numpy(uniform(n, (2, side**2, 8), 0)) for n in ("x", "weight"))
    answers = []
    for spans in (plan.spans[1], [masked]):
        attention.zero_grad()
        x = data_.clone().requires_grad_()
        out = attention(x, spans)
        (out * weight).sum().backward()
        answers.append([out, x.grad, *gradients(attention).values()])
    for a, b in zip(*answers, strict=True):
        near(a, b.detach().numpy(), atol=3e-6 * b.abs().max().item())


def test_a_batch_shares_its_mask_and_pairs_and_nothing_else() -> None:
    model, images, mask = build(TEST).eval(), pictures(TEST, 4), some_mask(TEST)
    with torch.no_grad():
        together = model(images, mask)[1]
        pairs = [model(images[[i, 3 - i]], mask)[1] for i in (0, 1)]
    near(together, torch.stack([pairs[0][0], pairs[1][0], pairs[1][1], pairs[0][1]]), atol=1e-5)


def test_masks_of_any_type_are_accepted() -> None:
    model, images, mask = build(TEST).eval(), pictures(TEST), some_mask(TEST)
    tensor = torch.from_numpy(mask)
    accepted = [mask, mask.astype(np.uint8), mask.astype(np.float32), tensor, tensor.byte(),
                tensor.long(), mask.reshape(TEST.units, -1), plan_of(TEST, mask)]  # fmt: skip
    with torch.no_grad():
        assert len({model(images, m)[0].item() for m in accepted}) == 1
        assert model(images, mask)[0] != model(images, some_mask(TEST, seed=2))[0]


@each_geometry
def test_a_mask_and_its_complement_are_one_task(config: ModelConfig) -> None:
    """What is visible of an image in one mixture is hidden in the other, and the other way round;
    only mix embeddings tell which is which."""
    images, mask = pictures(config, 4), some_mask(config)
    for mix_embed in (False, True):
        model = build(replace(config, mix_embed=mix_embed)).eval()
        with torch.no_grad():
            ours, theirs = (model(images, m)[1] for m in (mask, ~mask))
        assert ((ours - theirs).abs().max() > 1e-3) == mix_embed
        if not mix_embed:
            near(ours, theirs, atol=1e-5)


# ── gradients ───────────────────────────────────────────────────────────────────────────

VARIANTS = {
    "plain": TEST,
    "straddling": GEOMETRIES["straddling"],
    "mix_embed": replace(TEST, mix_embed=True),
    "no_qkv_bias": replace(TEST, qkv_bias=False),
}


@pytest.mark.parametrize("kind", ["pretrain", "recompute", "classify"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_gets_a_gradient(config: ModelConfig, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "classify":
        model = MixClassifier(config, 5)
        loss = F.cross_entropy(model(pictures(config)), torch.tensor([0, 3]))
    else:
        model = MixMAE(config)
        model.grad_checkpoint = kind == "recompute"
        loss, _ = model(pictures(config), some_mask(config))
    loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize("mix_embed", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_with_one_source_alone_the_encoder_learns_nothing(ratio: float, mix_embed: bool) -> None:
    config = replace(TEST, mix_embed=mix_embed)
    model = build(config)
    loss, prediction = model(pictures(config, 3), some_mask(config, ratio))
    loss.backward()
    assert loss.isfinite() and prediction.isfinite().all()
    assert torch.equal(prediction[0], prediction[1])  # of the mask token alone
    ours = {"mask_token", *(n for n, _ in model.named_parameters() if n.startswith("decoder_"))}
    ours -= {"decoder_embed.weight", "decoder_embed.bias"}
    for name, gradient in gradients(model).items():
        assert gradient is not None and bool(gradient.any()) == (name in ours), name


def test_recomputed_blocks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, found = [], []
    real = mixmae.checkpoint
    monkeypatch.setattr(mixmae, "checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))
    for recompute in (False, True):
        model = build(TEST).train()
        model.grad_checkpoint = recompute
        model(pictures(TEST), some_mask(TEST))[0].backward()
        found.append(gradients(model))
        assert len(calls) == recompute * sum(TEST.depths)
    assert equal(*found)
    model.eval()(pictures(TEST), some_mask(TEST))
    assert len(calls) == sum(TEST.depths)


def test_mix_embeddings_are_of_a_source_and_a_stage() -> None:
    config, mask, images = replace(TEST, mix_embed=True), some_mask(TEST), pictures(TEST)
    off, on = build(TEST).eval(), build(config).eval()
    shapes = {k: tuple(p.shape) for k, p in on.named_parameters() if k not in off.state_dict()}
    assert shapes == {f"mix_embed.{i}": (2, width) for i, width in enumerate((16, 32, 64))}
    assert off.state_dict().keys() == on.state_dict().keys() - shapes.keys()
    wanted, hidden = off(images, mask)[1], torch.from_numpy(mask)
    for stage, row in [(None, 0), *((s, r) for s in range(3) for r in (0, 1))]:
        with torch.no_grad():
            for table in on.mix_embed:
                table.zero_()
            if stage is not None:
                on.mix_embed[stage][row] = torch.linspace(-1, 1, on.channels[stage])
            moved = (on(images, mask)[1] - wanted).abs().amax(-1)
        touched = hidden if row == 0 else ~hidden  # row 0 is of visible tokens, which predict these
        if stage is None:
            touched = torch.zeros_like(hidden)
        assert moved[:, ~touched].amax() < 1e-5
        assert stage is None or moved[:, touched].amin() > 1e-2
    dense = [x.eval()(images) for x in (fill(MixEncoder(c), 1) for c in (TEST, config))]
    assert torch.equal(*dense)  # they are of mixtures only


# ── loss, initialisation ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("normalised", [True, False])
def test_loss_by_hand(normalised: bool) -> None:
    config = replace(GEOMETRIES["straddling"], norm_pix_loss=normalised)
    model, images = build(config).eval(), pictures(config, 3)
    with torch.no_grad():
        loss, prediction = model(images, some_mask(config))
    size, errors = config.mask_unit, []
    for b, image in enumerate(images.numpy().astype(np.float64)):
        for unit in range(config.units**2):
            top, left = (size * k for k in divmod(unit, config.units))
            patch = np.array([image[c, top + y, left + x] for y in range(size)
                              for x in range(size) for c in range(3)])  # fmt: skip
            if normalised:
                patch -= patch.mean()
                patch /= np.sqrt((patch**2).sum() / (len(patch) - 1) + 1e-6)
            errors.append(((prediction[b, unit].double().numpy() - patch) ** 2).mean())
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-6)


def test_one_batch_can_be_learned() -> None:
    torch.manual_seed(0)
    config = mixmae.model_config(TEST, input_size=32, depths=(1, 1, 1), window_size=(4, 2, 2))
    model, images, plan = MixMAE(config), pictures(config), plan_of(config, some_mask(config))
    optimizer, losses = torch.optim.AdamW(mixmae.parameter_groups(model, 0.0), 5e-3), []
    for _ in range(60):
        loss, _ = model(images, plan)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and losses[-1] < 0.1


def test_initialisation() -> None:  # spec, section 5
    torch.manual_seed(0)
    model = MixMAE(replace(TEST, embed_dim=64, decoder_dim=128, mix_embed=True))

    def spread(x: Tensor, wanted: float, bound: float = math.inf) -> bool:
        close = abs(x.std().item() / wanted - 1) < 4 / math.sqrt(x.numel())
        return close and x.abs().max().item() <= 1.0001 * bound

    for module in model.modules():
        if isinstance(module, nn.Linear):
            edge = math.sqrt(6 / sum(module.weight.shape))  # qkv as one matrix
            assert spread(module.weight, edge / math.sqrt(3), edge), module
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
    edge = 1 / math.sqrt(48)
    for p in model.patch_embed.proj.parameters():
        assert spread(p, edge / math.sqrt(3), edge)
    normal = [p for n, p in model.named_parameters()
              if n.endswith("bias_table") or n.startswith("mix_embed") or n == "mask_token"]
    assert len(normal) == 6 + 3 + 1 and all(spread(p, 0.02) for p in normal)
    assert spread(torch.cat([p.flatten() for p in normal]), 0.02, 0.2)
    frozen = {n for n, _ in model.named_buffers()}
    assert frozen == {"absolute_pos_embed", "decoder_pos_embed"} <= model.state_dict().keys()


# ── whole images of any size ────────────────────────────────────────────────────────────


def plain_attention(x: Tensor, get: Callable[[str], Tensor | None], heads: int) -> Tensor:
    """Attention of spec section 2.2 over a map (B, h, w, C), by windows that the border cuts."""
    table = get("attn.relative_position_bias_table")
    window, (batch, h, w, dim) = (math.isqrt(len(table)) + 1) // 2, x.shape
    table = table.view(2 * window - 1, 2 * window - 1, heads)
    qkv = F.linear(x, get("attn.qkv.weight"), get("attn.qkv.bias"))
    out = torch.empty_like(x)
    for top in range(0, h, window):
        for left in range(0, w, window):
            part = qkv[:, top : top + window, left : left + window]
            rows, columns = part.shape[1:3]
            q, k, v = part.reshape(batch, rows * columns, 3, heads, -1).permute(2, 0, 3, 1, 4)
            y, x_ = (i.reshape(-1) for i in torch.meshgrid(
                torch.arange(rows), torch.arange(columns), indexing="ij"))  # fmt: skip
            dy, dx = y[:, None] - y + window - 1, x_[:, None] - x_ + window - 1
            logits = q @ k.transpose(-2, -1) / math.sqrt(dim // heads)
            seen = (logits + table[dy, dx].permute(2, 0, 1)).softmax(-1) @ v
            seen = seen.transpose(1, 2).reshape(batch, rows, columns, dim)
            out[:, top : top + window, left : left + window] = seen
    return F.linear(out, get("attn.proj.weight"), get("attn.proj.bias"))


def dense_maps(encoder: MixEncoder, images: Tensor) -> list[Tensor]:
    """(B, 3, H, W) -> (B, h, w, C) of every stage, before merging, and the last after the norm:
    written from the specification, float64."""
    config, found = encoder.config, []
    state = {k: v.double() for k, v in encoder.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images.double(), weight, bias, stride=config.patch_size).permute(0, 2, 3, 1)
    x, side = norm(x, "patch_embed.norm"), config.input_size // config.patch_size
    table = state["absolute_pos_embed"].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if x.shape[1:3] != (side, side):
        table = F.interpolate(table, x.shape[1:3], mode="bicubic", align_corners=False)
    x = x + table.permute(0, 2, 3, 1)
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            get = lambda key, name=name: state.get(f"{name}.{key}")  # noqa: E731
            x = x + plain_attention(norm(x, f"{name}.norm1"), get, config.num_heads[i])
            y = F.linear(norm(x, f"{name}.norm2"), get("mlp.fc1.weight"), get("mlp.fc1.bias"))
            x = x + F.linear(F.gelu(y), get("mlp.fc2.weight"), get("mlp.fc2.bias"))
        found.append(x)
        if i < len(config.depths) - 1:
            x = [x[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = norm(torch.cat(x, -1), f"layers.{i}.downsample.norm")
            x = F.linear(x, state[f"layers.{i}.downsample.reduction.weight"])
    return [*found, norm(x, "norm")]


SIZES = [(64, 64), (64, 96), (32, 160), (16, 16), (16, 112), (80, 48), (144, 64)]
WINDOWS = [(4, 4, 4), (8, 4, 2), (16, 8, 4), (5, 3, 2), (7, 8, 1), (1, 1, 3), (99, 99, 99)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("windows", WINDOWS, ids=lambda windows: "_".join(map(str, windows)))
def test_maps_are_plain_window_attention(windows: tuple, size: tuple[int, int]) -> None:
    """Windows that divide no map, maps smaller than the window, and a stretched position table."""
    config = replace(TEST, window_size=windows, qkv_bias=windows != (8, 4, 2))
    encoder = fill(MixEncoder(config), 1).eval()
    images = torch.from_numpy(filled_images((2, 3, *size), 3))
    with torch.no_grad():
        maps, flat = encoder.maps(images), encoder(images)
    *dense, last = dense_maps(encoder, images)
    assert encoder.channels == [16, 32, 64] and encoder.strides == [4, 8, 16]
    for x, wanted, c, stride in zip(maps, dense, encoder.channels, encoder.strides, strict=True):
        assert x.shape == (2, c, size[0] // stride, size[1] // stride)
        near(x, wanted.permute(0, 3, 1, 2), atol=1e-5 * wanted.abs().max().item())
    near(flat, last.flatten(1, 2), atol=1e-5 * last.abs().max().item())


def test_the_classifier_is_linear_in_the_mean_token() -> None:
    model = fill(MixClassifier(TEST, 5), 2).eval()
    for size in (64, 96):
        images = torch.from_numpy(filled_images((2, 3, size, size), 3))
        pooled = dense_maps(model, images)[-1].mean((1, 2))
        wanted = F.linear(pooled, *(p.double() for p in model.head.parameters()))
        near(model(images), wanted.detach().numpy(), atol=2e-5)


@each_geometry
def test_nothing_hidden_is_the_plain_encoder(config: ModelConfig) -> None:
    model, images = build(config).eval(), pictures(config)
    with torch.no_grad():
        for ratio, whole in ((0.0, images), (1.0, images.flip(0))):
            plan = plan_of(config, some_mask(config, ratio))
            mixed = model.encode(mixmae.mix(images, plan.pixels), plan)
            near(mixed, model.encode(whole), atol=1e-6)


def test_plans_are_kept_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, planned = MixEncoder(TEST), []
    real = mixmae.plan_mix
    monkeypatch.setattr(mixmae, "plan_mix", lambda c, m: planned.append(m.shape) or real(c, m))
    for size in ((64, 96), (96, 64), (64, 96), (64, 64), (64, 64), (96, 64)):
        encoder.maps(torch.zeros(1, 3, *size))
    assert planned == [(4, 6), (6, 4), (4, 4)]
    assert encoder.dense_plan(64, 96, CPU) is encoder.dense_plan(64, 96, CPU)
    assert not [k for k in encoder.state_dict() if "plan" in k]


@pytest.mark.parametrize("size", [(72, 64), (64, 72), (8, 64), (40, 40)])
def test_sizes_that_the_unit_does_not_divide_are_refused(size: tuple[int, int]) -> None:
    encoder = MixEncoder(TEST)
    for refuse in (lambda: encoder.dense_plan(*size, CPU),
                   lambda: encoder.maps(torch.zeros(1, 3, *size)),
                   lambda: encoder(torch.zeros(1, 3, *size))):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} px: 16 must divide"):
            refuse()
    assert not encoder.dense_plans


def test_maps_let_gradients_through() -> None:
    encoder = fill(MixEncoder(replace(TEST, window_size=(5, 3, 4))), 1)
    images = torch.from_numpy(filled_images((1, 3, 32, 96), 3)).requires_grad_()
    sum(x.square().mean() for x in encoder.maps(images)).backward()
    unused = {"norm.weight", "norm.bias"}
    assert {n for n, p in encoder.named_parameters() if p.grad is None} == unused
    assert all(g.isfinite().all() for n, g in gradients(encoder).items() if n not in unused)
    assert images.grad.abs().amax((0, 1)).min() > 0


# ── models and recipes ──────────────────────────────────────────────────────────────────


def counts(model: nn.Module) -> tuple[int, int]:
    """All and trainable; the frozen tables, which are parameters in released code, are buffers."""
    trainable = sum(p.numel() for p in model.parameters())
    return trainable + sum(b.numel() for b in model.buffers()), trainable


PUBLISHED = {  # spec, section 2: pre-training, classifier of 1000 classes
    "swin_b": ((114_665_784, 114_239_288), (88_344_352, 87_942_944)),
    "swin_l": ((223_468_244, 222_841_044), (197_396_668, 196_794_556)),
    "swin_h": ((684_709_594, 683_580_634), (659_262_658, 658_158_786)),
    "swin_b_384": (None, (89_577_440, 88_397_792)),
    "swin_l_384": (None, (199_246_300, 197_476_828)),
}


@pytest.mark.parametrize("name", mixmae.MODELS)
def test_models_build_and_have_as_many_parameters_as_published(name: str) -> None:
    config = mixmae.MODELS[name]
    assert mixmae.model_config(config) == config
    models = on_meta(partial(MixMAE, config)), on_meta(partial(MixClassifier, config, 1000))
    for model, published in zip(models, PUBLISHED.get(name, (None, None)), strict=True):
        assert published is None or counts(model) == published
    tables = [p for n, p in models[0].named_parameters() if n.endswith("bias_table")]
    stages = [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]
    assert [tuple(t.shape) for t in tables] == [
        ((2 * config.window_size[stage] - 1) ** 2, config.num_heads[stage]) for stage in stages]


def test_other_names_are_the_same_networks() -> None:
    assert mixmae.known_model("mixmim_base_384") == "swin_b_384"
    assert {mixmae.known_model(name) for name in mixmae.MODELS} == mixmae.MODELS.keys()
    for other, ours in mixmae.OTHER_NAMES.items():
        assert mixmae.known_model(other) == ours and ours in PUBLISHED
        assert mixmae.configure("export", model=other).model == ours
    for name in ("mixmim_bas", "", "swin_b_385"):
        with pytest.raises(InputError, match=r"closest names are .*(swin|mixmim)"):
            mixmae.known_model(name)


def divides(config: ModelConfig) -> bool:
    """Released code takes it: a window is no smaller than its map or divides it."""
    sides = [config.input_size // config.patch_size // 2**i for i in range(len(config.depths))]
    return all(w >= side or side % w == 0
               for w, side in zip(config.window_size, sides, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test", {"window_size": (5, 4, 4)}), ("test", {"window_size": (4, 4, 3)}),
        ("test", {"input_size": 96}), ("test", {"input_size": 80, "window_size": (3, 3, 3)}),
        ("swin_b", {"input_size": 256}), ("swin_b", {"input_size": 384}),
        ("swin_b_384", {"input_size": 416}), ("swin_l", {"window_size": (14, 14, 12, 7)}),
        ("test", {"input_size": 32, "window_size": (5, 4, 4)}),
        ("test", {"input_size": 32, "window_size": (3, 3, 3)}),
        ("test", {"input_size": 48, "window_size": (7, 5, 2)}),
    ],
)  # fmt: skip
def test_windows_that_do_not_divide_are_refused_and_those_named_do(
    name: str, changes: dict
) -> None:
    base = mixmae.MODELS[name]
    assert not divides(replace(base, **changes))
    with pytest.raises(InputError) as refused:
        mixmae.model_config(base, **changes)
    said = str(refused.value)
    assert "\n" not in said
    windows, *sizes, made = re.search(
        r"--window_size ([\d,]+)(?:, or --input_size (\d+)(?: or (\d+))?)?"
        rf"(?:; made for {replace(base, **changes).input_size} px: --model (\w+))?$", said).groups()
    windows, asked = tuple(map(int, windows.split(","))), replace(base, **changes)
    for stage, (near_, window) in enumerate(zip(windows, asked.window_size, strict=True)):
        fit = [w for w in range(1, asked.side(stage) + 1) if asked.side(stage) % w == 0]
        assert near_ in fit and abs(near_ - window) == min(abs(w - window) for w in fit)
    assert mixmae.model_config(base, **changes | {"window_size": windows})
    assert made is None or mixmae.MODELS[made] == mixmae.model_config(mixmae.MODELS[made])
    assert (made == "swin_b_384") == (name == "swin_b" and changes == {"input_size": 384})
    for size in filter(None, sizes):
        config = mixmae.model_config(base, **changes | {"input_size": int(size)})
        assert divides(config)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("test", {"input_size": 72}, r"\b64\b.*\b80\b"),
        ("test", {"input_size": 16}, r"\b32\b"),
        ("test", {"input_size": (64, 96)}, "square"),
        ("swin_b", {"input_size": 100}, r"\b96\b.*\b128\b"),
        ("test", {"window_size": (4, 4)}, "give 3"),
        ("swin_b", {"window_size": (7,)}, "give 4"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        mixmae.model_config(mixmae.MODELS[name], **changes)
    assert "\n" not in str(refused.value)


RECIPES = {  # spec, sections 6 and 7
    "pretrain": {
        "batch_size": 2048 // 16, "epochs": 600, "warmup_epochs": 40, "blr": 1.5e-4, "min_lr": 0,
        "weight_decay": 0.05, "clip_grad": None, "crop_min": 0.2, "mask_ratio": 0.5,
        "mask_ratio_range": 0, "accum_iter": 1,
    },
    "finetune": {
        "batch_size": 1024 // 8, "epochs": 100, "warmup_epochs": 5, "blr": 5e-4, "min_lr": 1e-6,
        "weight_decay": 0.05, "clip_grad": None, "layer_decay": 0.7, "drop_path": 0.1,
        "crop_min": 0.08, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.25,
        "aa": "rand-m9-mstd0.5-inc1", "ema": 0, "accum_iter": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("model", [None, "swin_l", "mixmim_base", "test"])
@pytest.mark.parametrize("command", RECIPES)
def test_the_published_recipe_is_the_default(command: str, model: str | None) -> None:
    config = mixmae.configure(command, **({"model": model} if model else {}))
    wanted = RECIPES[command]
    assert {key: getattr(config, key) for key in wanted} == wanted
    name, network = mixmae.choose_config(config, None)
    assert (name, network) == (config.model, mixmae.MODELS[mixmae.known_model(model or "swin_b")])
    assert network.norm_pix_loss and not network.mix_embed


def test_flags_come_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    source = replace(TEST, input_size=128, mix_embed=True)
    file = data.read_checkpoint(our_file(MixMAE(source), tmp_path / "ours.pth"))

    def chosen(file: dict | None, **flags: object) -> tuple[str, ModelConfig]:
        return mixmae.choose_config(mixmae.configure("export", **flags), file)

    assert chosen(None) == ("swin_b", mixmae.MODELS["swin_b"])
    assert chosen(file) == ("test", source)
    changes = {"input_size": 64, "window_size": (8, 4, 2)}
    assert chosen(file, **changes) == ("test", replace(source, **changes))
    assert chosen(file, model="swin_n") == ("swin_n", mixmae.MODELS["swin_n"])


# ── weights ─────────────────────────────────────────────────────────────────────────────


def answers(model: MixEncoder) -> Tensor:
    """Logits, or tokens of the encoder."""
    model.eval()
    with torch.no_grad():
        return (model.encode if isinstance(model, MixMAE) else model)(pictures(model.config))


def with_buffers(model: MixEncoder) -> dict[str, Tensor]:
    """The released state dict, index buffers included, of a model, whole or not."""
    return model.state_dict() | mixmae.export_state(model, "official")


FIVE = partial(MixClassifier, num_classes=5)


@pytest.mark.parametrize("make", [MixEncoder, FIVE, MixMAE])
def test_official_exports_have_buffers_and_come_back(
    make: Callable[[ModelConfig], MixEncoder], tmp_path: Path
) -> None:
    config = GEOMETRIES["straddling"]
    source, kind = fill(make(config), 1), MixEncoder if make is MixMAE else make
    state = mixmae.export_state(source, "official")
    for i, j in ((i, j) for i, depth in enumerate(config.depths) for j in range(depth)):
        index = state.pop(f"layers.{i}.blocks.{j}.attn.relative_position_index")
        assert index.dtype == torch.int64 and torch.equal(index, window_index(config.window(i)))
    assert state.keys() == on_meta(partial(kind, config)).state_dict().keys()
    for wrap in (lambda x: x, lambda x: {"model": x}):
        torch.save(wrap(mixmae.export_state(source, "official")), tmp_path / "official.pth")
        target, said = load(partial(kind, config), tmp_path / "official.pth")
        assert "as they are" in said and str(tmp_path / "official.pth") in said
        same_state(target, source.state_dict())


def manifests() -> dict[str, dict]:
    """State-dict names and shapes of official Swins."""
    with np.load(ROOT / "tests" / "golden" / "augment" / "timm_keys.npz") as arrays:
        models = json.loads(str(arrays["meta"]))["models"]
    return {name: models[name] for name in models if name.startswith("official_swin")}


OFFICIAL = {
    "official_swin_base": replace(mixmae.MODELS["swin_b"], window_size=(7, 7, 7, 7)),
    "official_swin_base:window_size=14": mixmae.MODELS["swin_b"],
    "official_swin_tiny": replace(mixmae.MODELS["swin_b"], embed_dim=96, depths=(2, 2, 6, 2),
                                  num_heads=(3, 6, 12, 24), window_size=(7, 7, 7, 7)),
}  # fmt: skip


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("name", manifests())
def test_swin_exports_have_the_names_of_official_swin(name: str, with_head: bool) -> None:
    manifest, config = manifests()[name], OFFICIAL[name]
    make = partial(MixClassifier, config, 1000) if with_head else partial(MixEncoder, config)
    state = mixmae.export_state(on_meta(make).to_empty(device="cpu"), "swin")
    wanted = {k: v for k, v in manifest["shapes"].items()
              if k not in manifest["buffers"] and (with_head or not k.startswith("head."))}
    assert {k: list(v.shape) for k, v in state.items()} == wanted
    buffers = {k for k in manifest["buffers"] if k.endswith("relative_position_index")}
    official = mixmae.export_state(on_meta(make).to_empty(device="cpu"), "official")
    assert official.keys() - state.keys() == buffers | {"absolute_pos_embed"}


def export(path: Path, **flags: object) -> dict[str, Tensor]:
    output = path.with_name("exported.pth")
    mixmae.export(mixmae.configure(
        "export", weights=str(path), output=str(output), device="cpu", **flags))  # fmt: skip
    return torch.load(output, weights_only=True)["model"]


def test_the_command_exports_what_the_naming_can_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = build(TEST)
    path = our_file(source, tmp_path / "ours.pth")
    assert equal(export(path), mixmae.export_state(source, "official"))
    assert equal(export(path, naming="swin"), mixmae.export_state(source, "swin"))
    assert "answers differ" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"timm.*official and swin work"):
        export(path, naming="timm")
    clamped = replace(TEST, input_size=32, window_size=(8, 4, 2))  # window 8, on smaller maps too
    assert export(our_file(build(clamped), path), naming="swin")
    other = replace(TEST, window_size=(8, 8, 2))
    with pytest.raises(InputError, match=r"one window size for all stages, not \[8, 8, 2\]"):
        export(our_file(build(other), path), naming="swin")


def test_swin_has_no_windows_of_384_px(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(partial(MixEncoder, mixmae.MODELS["swin_b_384"]))
    monkeypatch.setattr(mixmae, "open_model", lambda cfg: (None, model, {}, None))
    with pytest.raises(InputError, match=r"\[16, 16, 24, 12\]"):
        mixmae.export(mixmae.configure("export", weights="a.pth", naming="swin"))


# mmpretrain's names for ours (spec, section 8).
THEIRS = {r"\.norm([12])\.": r".ln\1.", r"\.mlp\.fc1\.": ".ffn.layers.0.0.",
          r"\.mlp\.fc2\.": ".ffn.layers.1.", r"^patch_embed\.proj\.": "patch_embed.projection.",
          r"^(?!head)": "backbone.", r"^head\.": "head.fc."}  # fmt: skip


def mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that mmpretrain would save, of the official one."""
    found = {}
    for key, value in state.items():
        for ours, theirs in THEIRS.items():
            key = re.sub(ours, theirs, key)
        if ".downsample." in key:
            cells = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
            value = rearrange(cells, "... four c -> ... (c four)")
        found[key] = value
    return found


@pytest.mark.parametrize("make", [MixMAE, FIVE])
def test_files_of_mmpretrain_answer_alike(make: Callable, tmp_path: Path) -> None:
    source, path = fill(make(TEST), 1), tmp_path / "mmpretrain.pth"
    state = mmpretrain(mixmae.export_state(source, "official"))
    assert "backbone.layers.0.blocks.1.ffn.layers.0.0.weight" in state
    if make is MixMAE:
        state |= {"neck.mask_token": torch.zeros(1, 1, 32), "neck.decoder_pos_embed": torch.zeros(
            1, 16, 32), "neck.decoder_blocks.0.ln1.weight": torch.ones(32)}  # fmt: skip
    torch.save({"meta": {"epoch": 300, "cfg": "model = dict()"}, "state_dict": state}, path)
    name, found = mixmae.identify(data.read_checkpoint(path))
    assert (name, found) == ("test", TEST)
    images = pictures(TEST)
    with torch.no_grad():
        for a, b in zip(mixmae.load_backbone(path).maps(images),
                        source.eval().maps(images), strict=True):  # fmt: skip
            assert torch.equal(a, b)
    if make is not MixMAE:
        model, _ = load(partial(make, TEST), path)
        assert torch.equal(answers(model), answers(source))
        same_state(model, source.state_dict())
    assert "no decoder" in refuses(path, "reconstruct", data_path="drawn:2")


def test_merging_of_mmpretrain_unfolds_row_by_row() -> None:
    """It merges by nn.Unfold, whose channels are (channel, row, column)."""
    model = fill(MixEncoder(TEST), 1)
    state = mmpretrain(model.state_dict())
    reduction, weight, bias = (state[f"backbone.layers.0.downsample.{k}"] for k in (
        "reduction.weight", "norm.weight", "norm.bias"))  # fmt: skip
    x = torch.randn(2, 16, 16, 16)
    columns = F.unfold(x, 2, stride=2).transpose(1, 2)
    wanted = F.linear(F.layer_norm(columns, (64,), weight, bias, 1e-5), reduction)
    plan = model.dense_plan(64, 64, CPU)
    slots = torch.empty(2, 256, 16)
    slots[:, plan.places[0]] = x.flatten(2).transpose(1, 2)
    merged = model.layers[0].downsample(slots, plan.merges[0])[:, plan.places[1]]
    near(merged, wanted.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("mix_embed", [False, True])
def test_released_files_load_whole_and_as_encoder(mix_embed: bool, tmp_path: Path) -> None:
    source, path = build(replace(TEST, mix_embed=mix_embed)), tmp_path / "checkpoint.pth"
    args = argparse.Namespace(model="mixmim_base", epochs=600)
    torch.save({"model": with_buffers(source), "optimizer": {}, "epoch": 9, "scaler": {},
                "args": args}, path)  # fmt: skip
    file = data.read_checkpoint(path)
    assert file["args"] == {} and mixmae.identify(file) == ("test", source.config)
    model, said = load(partial(MixMAE, source.config), path)
    assert "as they are" in said
    same_state(model, source.state_dict())
    encoder, _ = load(partial(MixEncoder, source.config), path)
    assert torch.equal(answers(encoder), answers(source))


LARGER = replace(TEST, input_size=96, window_size=(4, 6, 6))


@pytest.mark.parametrize("make", [MixEncoder, MixMAE, partial(MixClassifier, num_classes=3)])
def test_at_another_size_tables_are_stretched(make: Callable, tmp_path: Path) -> None:
    source = build(TEST)
    torch.save({"model": with_buffers(source)}, tmp_path / "small.pth")
    model, said = load(partial(make, LARGER), tmp_path / "small.pth", fresh_head=True)
    stretched = 0
    for name, value in model.state_dict().items():
        old = source.state_dict().get(name)
        if name.startswith("head.") or torch.equal(value, old):
            continue
        side, new = (math.isqrt(x.shape[-2]) for x in (old, value))
        grid = old.double().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
        near(value.reshape(new**2, -1), grid[0].flatten(1).T, atol=1e-5)
        stretched += 1
    assert stretched == 4 + 1 + (make is MixMAE)
    assert f"{stretched} position tables interpolated" in said
    assert model.config == LARGER and model.absolute_pos_embed.shape == (1, 576, 16)
    if make is MixMAE:
        assert model(pictures(LARGER), some_mask(LARGER))[0].isfinite()


def test_a_head_is_kept_where_it_fits_and_else_begun_afresh_if_asked(tmp_path: Path) -> None:
    source, path = fill(MixClassifier(TEST, 5), 1), tmp_path / "classifier.pth"
    torch.save({"model": with_buffers(source)}, path)
    for fresh_head in (False, True):
        kept, said = load(partial(MixClassifier, TEST, 5), path, fresh_head)
        assert "head starts" not in said and torch.equal(answers(kept), answers(source))
    with pytest.raises(InputError, match=r"head\.weight is \(5, 64\), not \(400, 64\)"):
        load(partial(MixClassifier, TEST, 400), path)
    torch.save({"model": with_buffers(build(TEST))}, tmp_path / "pretraining.pth")
    with pytest.raises(InputError, match=r"head\.weight is missing"):
        load(partial(MixClassifier, TEST, 400), tmp_path / "pretraining.pth")
    for file in (path, tmp_path / "pretraining.pth"):
        model, said = load(partial(MixClassifier, TEST, 400), file, fresh_head=True)
        assert "the head starts fresh" in said and not model.head.bias.any()
        assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    encoder, _ = load(partial(MixEncoder, TEST), path)
    same_state(encoder, source.state_dict())


# ── what a file is ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("naming", ["whole", "encoder", "classifier", "mmpretrain"])
@pytest.mark.parametrize("name", mixmae.MODELS)
def test_shapes_tell_every_model(name: str, naming: str) -> None:
    config = mixmae.MODELS[name]
    make = {"whole": MixMAE, "classifier": FIVE}.get(naming, MixEncoder)
    model = on_meta(partial(make, config))
    state = model.state_dict()
    state = mmpretrain(state) if naming == "mmpretrain" else state
    assert mixmae.identify({"model": state, "args": {}}) == (name, config)


OTHERS = [
    ("swin_b", {"input_size": 448, "window_size": (14, 14, 28, 14)}),
    ("swin_l", {"input_size": 384, "window_size": (16, 16, 24, 12)}),
    ("test", {"input_size": 96, "window_size": (6, 6, 6), "mix_embed": True}),
    ("test", {"patch_size": 8, "input_size": 128, "decoder_dim": 64, "decoder_depth": 2}),
    ("test", {"num_heads": (2, 2, 8), "qkv_bias": False}),
    ("test", {"depths": (2, 1, 2), "mlp_ratio": 2.0}),
]


@pytest.mark.parametrize(("name", "changes"), OTHERS)
def test_shapes_tell_networks_of_other_sizes(name: str, changes: dict) -> None:
    config = replace(mixmae.MODELS[name], **changes)
    state = on_meta(partial(MixMAE, config)).state_dict()
    _, found = mixmae.identify({"model": state, "args": {}})
    assert asdict(found) | {"decoder_num_heads": 0} == asdict(config) | {"decoder_num_heads": 0}
    assert found.decoder_dim % found.decoder_num_heads == 0


@pytest.mark.parametrize("name", mixmae.MODELS)
def test_args_tell_every_model(name: str) -> None:
    changes = {"norm_pix_loss": False, "decoder_num_heads": 1, "mlp_ratio": 3.3}
    config = replace(mixmae.MODELS[name], **changes)
    plain = json.loads(json.dumps(asdict(config)))  # tuples have become lists
    state = on_meta(partial(MixMAE, config)).state_dict()
    args = {"script": "mixmae", "model": name, "config": plain}
    assert mixmae.identify({"model": state, "args": args}) == (name, config)


def test_a_backbone_is_no_whole_model(tmp_path: Path) -> None:
    torch.save({"model": mixmae.export_state(build(TEST), "official")}, tmp_path / "backbone.pth")
    with pytest.raises(InputError, match="has no decoder"):
        load(partial(MixMAE, TEST), tmp_path / "backbone.pth")
    assert "has no decoder" in refuses(tmp_path / "backbone.pth", "reconstruct")


def test_a_plain_swin_is_said_to_be_foreign(tmp_path: Path) -> None:
    foreign = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.weight": torch.ones(8)}
    for state in (mixmae.export_state(MixEncoder(TEST), "swin"), foreign):
        torch.save({"model": state}, tmp_path / "foreign.pth")
        for flags in ({}, {"model": "test"}):
            said = refuses(tmp_path / "foreign.pth", "export", **flags)
            assert "no MixMIM encoder (absolute_pos_embed" in said


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    others = [(replace(TEST, embed_dim=32), r"patch_embed\.proj\.weight is \(32, 3, 4, 4\)"),
              (replace(TEST, depths=(2, 2, 3)), r"layers\.2\.blocks\.2\.\S+ is unexpected"),
              (replace(TEST, depths=(2, 1, 2)), r"layers\.1\.blocks\.1\.\S+ is missing"),
              (replace(TEST, num_heads=(2, 2, 4)), r"bias_table is \(49, 2\), not \(49, 1\)"),
              (replace(TEST, qkv_bias=False), r"qkv\.bias is missing")]  # fmt: skip
    for other, said in others:
        torch.save({"model": MixMAE(other).state_dict()}, tmp_path / "other.pth")
        for kind in (MixMAE, MixEncoder):
            made = []
            with pytest.raises(InputError, match=said) as refused:
                load(lambda made=made, kind=kind: made.append(kind(TEST)) or made[-1],
                     tmp_path / "other.pth")  # fmt: skip
            assert "\n" not in str(refused.value) and "other.pth" in str(refused.value)
            assert [p.device.type for m in made for p in m.parameters()][:1] == ["meta"]
            assert len(made) == 1  # no memory was taken for a model that would not fit


TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
TABLES = [TABLE.replace("0", str(i), 1).replace("blocks.0", f"blocks.{j}")
          for i in range(3) for j in range(2)]  # fmt: skip
POSITIONS, PATCHES, MERGING = (
    "absolute_pos_embed", "patch_embed.proj.weight", "layers.0.downsample.norm.weight")
ODD_STATES: dict[str, dict[str, Tensor | None]] = {
    "no_positions": {POSITIONS: None},
    "positions_0d": {POSITIONS: torch.tensor(1.0)},
    "positions_1d": {POSITIONS: torch.zeros(256)},
    "positions_2d": {POSITIONS: torch.zeros(256, 16)},
    "positions_4d": {POSITIONS: torch.zeros(1, 16, 16, 16)},
    "positions_of_four_images": {POSITIONS: torch.zeros(4, 64, 16)},
    "positions_of_no_square": {POSITIONS: torch.zeros(1, 257, 16)},
    "positions_of_less_than_a_square": {POSITIONS: torch.zeros(1, 255, 16)},
    "positions_narrow": {POSITIONS: torch.zeros(1, 256, 8)},
    "positions_wide": {POSITIONS: torch.zeros(1, 256, 32)},
    "positions_wide_and_few": {POSITIONS: torch.zeros(1, 64, 64)},
    "positions_of_nothing": {POSITIONS: torch.zeros(1, 0, 16)},
    "positions_of_no_width": {POSITIONS: torch.zeros(1, 256, 0)},
    "even_table": {TABLE: torch.zeros(64, 1)},
    "even_table_inside": {TABLES[3]: torch.zeros(36, 2)},
    "even_tables": {k: torch.zeros(64, 2 ** (i // 2)) for i, k in enumerate(TABLES)},
    "table_of_no_square": {TABLE: torch.zeros(26, 1)},
    "table_of_no_length": {TABLE: torch.zeros(0, 1)},
    "table_of_no_heads": {TABLE: torch.zeros(49, 0)},
    "table_0d": {TABLE: torch.tensor(1.0)},
    "table_1d": {TABLE: torch.zeros(49)},
    "table_3d": {TABLE: torch.zeros(49, 1, 1)},
    "table_of_other_heads": {TABLE: torch.zeros(49, 2)},
    "heads_that_do_not_divide": {k: torch.zeros(49, 3) for k in TABLES[:2]},
    "tables_of_no_length": {k: torch.zeros(0, 1) for k in TABLES},
    "no_first_table": {TABLE: None},
    "no_patches": {PATCHES: None},
    "patches_0d": {PATCHES: torch.tensor(1.0)},
    "patches_of_nothing": {PATCHES: torch.zeros(0, 3, 4, 4)},
    "patches_of_no_size": {PATCHES: torch.zeros(16, 3, 0, 0)},
    "patches_not_square": {PATCHES: torch.zeros(16, 3, 4, 8)},
    "patches_of_five_axes": {PATCHES: torch.zeros(16, 3, 1, 4, 4)},
    "mlp_0d": {"layers.0.blocks.0.mlp.fc1.bias": torch.tensor(1.0)},
    "norm_of_nothing": {"norm.weight": torch.zeros(0)},
    "head_0d": {"head.weight": torch.tensor(1.0), "head.bias": torch.tensor(1.0)},
    "head_of_nothing": {"head.weight": torch.zeros(0, 64), "head.bias": torch.zeros(1)},
    "merging_0d": {MERGING: torch.tensor(1.0)},
    "merging_of_five": {MERGING: torch.zeros(5)},
    "merging_of_mmpretrain": {"backbone.layers.0.downsample.norm.weight": torch.zeros(5)},
    "decoder_0d": {"decoder_embed.weight": torch.tensor(1.0)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("odd", ODD_STATES.values(), ids=ODD_STATES.keys())
def test_odd_shapes_are_one_sentence(odd: dict, tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    state = MixEncoder(TEST).state_dict() | odd
    torch.save({"model": {k: v for k, v in state.items() if v is not None}}, path)
    refuses(path, "export", output=str(tmp_path / "out.pth"))
    refuses(path, "export", output=str(tmp_path / "out.pth"), model="test")


def test_refusals_show_the_shapes_of_the_file(tmp_path: Path) -> None:
    torch.save({"model": MixEncoder(TEST).state_dict() | ODD_STATES["positions_narrow"]},
               tmp_path / "odd.pth")  # fmt: skip
    assert "absolute_pos_embed is (1, 256, 8), not (1, 256, 16)" in refuses(
        tmp_path / "odd.pth", "export", model="test")  # fmt: skip


def test_a_file_of_ours_cannot_ask_for_larger_tables_than_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its args say another size than its tables have: no table is stretched to that."""
    made, real = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, **how: made.append(size) or real(
        x, (2, 2), **how))  # fmt: skip
    path = our_file(MixEncoder(TEST), tmp_path / "ours.pth", input_size=4096)
    refuses(path, "export", output=str(tmp_path / "out.pth"))
    assert not made


# ── pictures ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_picture_shows_images_mixtures_and_both_reconstructions(
    batch: int, normalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TEST, norm_pix_loss=normalised)
    model, plan, drawn = build(config), mixmae.draw_mix(config, 0.5, 0.0, (3,)), []
    draw = data.draw_columns
    monkeypatch.setattr(data, "draw_columns", lambda *a: drawn.append(a) or draw(*a))
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (batch, 3, 64, 64), np.uint8))
    picture, loss = mixmae.draw_reconstructions(model.train(), pixels, plan)
    ((columns, labels),) = drawn
    assert columns.shape == (4, batch, 3, 64, 64) and picture.width == 4 * 64 * 3
    assert labels[:2] == ("image", "mixed") and labels[3] == "of the partner"
    assert labels[2] == "reconstruction" + ", true contrast" * normalised

    images, hidden = data.normalize(pixels), torch.from_numpy(plan.hidden[:, 0])
    with torch.no_grad():
        found, prediction = model.eval()(images, plan.hidden)
    assert loss == pytest.approx(found.item(), rel=1e-6)
    patches = mixmae.patchify(images, config.mask_unit)
    if normalised:
        mean, std = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
        prediction = prediction * std + mean
    shown = [mixmae.patchify(x, config.mask_unit) for x in columns]
    for i in range(batch):
        j = batch - 1 - i
        assert torch.equal(shown[0][i], patches[i])
        for unit, is_hidden in enumerate(hidden.tolist()):
            assert torch.equal(shown[1][i, unit], patches[j if is_hidden else i, unit])
            for column, k, predicted in ((2, i, is_hidden), (3, j, not is_hidden)):
                if predicted:
                    near(shown[column][i, unit], prediction[k, unit].numpy(), atol=1e-4)
                else:
                    assert torch.equal(shown[column][i, unit], patches[k, unit])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_reconstruct_says_once_if_an_image_has_no_partner(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = our_file(build(TEST), tmp_path / "ours.pth")
    found = mixmae.reconstruct(mixmae.configure(
        "reconstruct", weights=str(path), data_path="drawn:8", count=count, device="cpu",
        num_workers=0, output=str(tmp_path / "grid.png")))  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("mixed with itself") == count % 2
    assert found["images"] == count and (tmp_path / "grid.png").is_file()


# ── as a part of other programs ─────────────────────────────────────────────────────────


def test_maps_keep_the_number_format_of_the_model() -> None:
    model = MixEncoder(TEST).bfloat16()
    for size in (64, 96):
        maps = model.maps(torch.randn(1, 3, size, size).bfloat16())
        assert {x.dtype for x in maps} == {torch.bfloat16}


def test_the_method_alone_runs_as_the_docstring_says() -> None:
    text = (ROOT / "mixmae.py").read_text()
    imports = text[text.index("from __future__") : text.index("# ── config")]
    config = text[text.index("Count = ") : text.index("MODELS = {")]
    method = text[text.index("# ── masking") : text.index("# ── weights")]
    space: dict[str, object] = {"__file__": "alone.py", "__name__": "alone"}
    sys.modules["alone"] = types.ModuleType("alone")  # dataclasses look it up
    try:
        exec(compile(imports + config + method, "alone.py", "exec"), space)
    finally:
        del sys.modules["alone"]
    model = space["MixMAE"](space["ModelConfig"](**asdict(TEST)))
    assert model(pictures(TEST), np.arange(TEST.units**2) % 2 == 0)[0].isfinite()


def test_a_probe_trains_its_head_at_the_rate_that_is_printed() -> None:
    run = before_training("finetune", linear_probe=True, data_path="drawn:64", batch_size=4)
    assert [group["lr_scale"] for group in run["parts"]["optimizer"].param_groups] == [1.0, 1.0]


def test_windows_and_size_are_taken_together_when_a_file_is_used(tmp_path: Path) -> None:
    path = our_file(MixClassifier(TEST, 3), tmp_path / "ours.pth")

    def opened(**flags: object) -> ModelConfig:
        cfg = mixmae.configure("evaluate", weights=str(path), device="cpu", **flags)
        return mixmae.open_model(cfg)[1].config

    assert opened(input_size=96) == TEST
    there = opened(input_size=96, window_size=(6, 6, 6))
    assert there == replace(TEST, input_size=96, window_size=(6, 6, 6))
    with pytest.raises(InputError, match="leave out --input_size"):
        mixmae.export(mixmae.configure("export", weights=str(path), input_size=96))
