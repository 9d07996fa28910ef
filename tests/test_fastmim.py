"""FastMIM against the stored answers of released code, and what it is by definition."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmim
from common import data
from common.data import InputError
from common.hog import gaussian, hog, sobel
from fastmim import BACKBONES, FastMIM, ModelConfig
from tests.conftest import GOLDEN, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    check_statistics,
    key_third,
    near,
    norms,
    on_meta,
    same,
    take_step,
    watched,
)

TEST = fastmim.MODELS["test"]
FAMILIES = {"vit": "test", "swin": "test_swin", "pvtv2": "test_pvtv2", "cmt": "test_cmt"}
CPU = torch.device("cpu")
each_family = pytest.mark.parametrize("family", FAMILIES)


pytestmark = pytest.mark.usefixtures("threads")


def released_name(model: nn.Module, name: str) -> str:
    """That of a parameter, or buffer, in released files."""
    plain = isinstance(model, FastMIM) and model.config.family == "vit"
    return name.removeprefix("encoder.") if plain else name


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The model with every parameter that learns, and all statistics, from the filling rule."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                key = released_name(model, name)
                p.copy_(torch.from_numpy(parameter(key, tuple(p.shape), seed)))
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                u = torch.from_numpy(uniform(name, tuple(b.shape), seed))
                b.copy_(1 + 0.1 * u.abs() if name.endswith("var") else 0.1 * u)
    return model


# ── golden files: what is compared ──────────────────────────────────────────────────────

LOSS, OUTPUT, GRADIENT, STEP = 1e-5, 1e-5, 1e-4, 1e-5  # spec, section 12
NAMES = {
    "img_size": "input_size", "patch_size": "patch_size", "mlp_ratios": "mlp_ratios",
    "sr_ratios": "sr_ratios", "stem_channel": "stem_dim", "fc_dim": "fc_dim",
    "window_size": "window_size", "block_size": "block_size", "decoder_embed_dim": "decoder_dim",
    "decoder_depth": "decoder_depth", "norm_pix_loss": "norm_pix_loss",
    "global_pool": "global_pool",
}  # fmt: skip


def config_of(model: dict, side: int = 0) -> ModelConfig:
    """Architecture of a fixture; fed images of another `side`, blocks grow with them."""
    given, family = model["kwargs"], model["family"]
    changes = {ours: given[theirs] for theirs, ours in NAMES.items() if theirs in given}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    if "official_name" in model:
        base = fastmim.MODELS[fastmim.known_model(model["official_name"])]
        if model["task"] == "finetune":
            changes |= {"input_size": 224}
    else:
        base = fastmim.MODELS[{"vit": "vit_b", "swin": "swin_b", "pvtv2": "pvtv2_b2",
                               "cmt": "cmt_s"}[family]]  # fmt: skip
        single = family == "vit"
        depths = (given["depth"],) if single else tuple(given["depths"])
        dims = given.get("embed_dims") or [given["embed_dim"] * 2**i for i in range(len(depths))]
        heads = given["num_heads"]
        changes |= {"depths": depths, "embed_dims": tuple(dims), "pretrain_heads": (),
                    "num_heads": (heads,) if single else tuple(heads)}  # fmt: skip
    if "mim_loss" in given:
        changes["target"] = {"HOG": "hog", "l2": "pixel"}[given["mim_loss"]]
    if family != "swin":
        changes.pop("window_size", None)
    built = changes["input_size"]
    if side and side != built:
        changes |= {"input_size": side, "block_size": side * changes["block_size"] // built}
    return fastmim.model_config(replace(base, **changes))


def filled_inputs(meta: dict) -> Tensor:
    return torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))


def site(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module whose output, or input, is stored under a name of the release."""
    end = "in" if name.startswith("input_to_") else "out"
    name = name.removeprefix("input_to_")
    if isinstance(model, FastMIM) and not name.startswith(("decoder_", "encoder.")):
        name = f"encoder.{name}"
    module = model.get_submodule(name)
    if isinstance(module, fastmim.ShiftedStage):  # merging belongs to the stage there
        last = isinstance(module.downsample, nn.Identity)
        module = module.blocks[-1] if last else module.downsample
    return module, end


def check_features(fixture: Fixture, found: dict[str, Tensor]) -> None:
    """L2 norm and first 64 values of every listed feature."""
    features, spread = fixture.told("features"), fixture.meta["f32_vs_f64"]["features_worst"][1]
    for name, shape in features:
        assert list(found[name].shape) == shape, name
    fixture.near("feat_l2", norms([found[name] for name, _ in features]), rtol=OUTPUT)
    ours = torch.stack([F.pad(x := found[name].flatten()[:64], (0, 64 - len(x)))
                        for name, _ in features])  # fmt: skip
    stored = torch.from_numpy(fixture.take("feat_first64"))
    error = (ours - stored).norm(dim=1) / stored.norm(dim=1)
    assert error.max() <= max(OUTPUT, 4 * spread), error


def near_in_norm(ours: Tensor, stored: np.ndarray, spread: float, message: str) -> None:
    """Relative L2 distance, by the spec's bound or four times that of float32 and float64."""
    stored = torch.from_numpy(stored)
    assert ours.shape == stored.shape, message
    error = ((ours.detach() - stored).norm() / stored.norm()).item()
    assert error <= max(OUTPUT, 4 * spread), f"{message} is off by {error}"


def check_spread(x: Tensor, stored: np.ndarray) -> None:
    """Mean, deviation, L2 norm."""
    check_statistics(x, stored[[2, 0, 1]], OUTPUT, "statistics")


def no_gradient(fixture: Fixture) -> Callable[[str, Tensor], Tensor]:
    """Which elements have a gradient of exactly zero: keys' biases and what a norm cancels."""
    listed = fixture.meta["f32_vs_f64"].get("grad_keys_numerically_zero", [])
    batch = fixture.meta["mode"] == "train"

    def zero(name: str, p: Tensor) -> Tensor:
        at = key_third(name, p)
        if name.endswith("attn.kv.bias"):
            at.view(2, -1)[0] = True
        before = ("attn.sr.0.bias", "mlp.conv2.0.bias", "mlp.proj_bn.bias")
        cancelled = batch and "blocks_" in name and name.endswith(before)
        return at | (name in listed or name.endswith("attn.k.bias") or cancelled)

    return zero


class Released(nn.Module):
    """Lets the shared checks see a model's parameters under released names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        for name, p in self.model.named_parameters():
            yield released_name(self.model, name), p


def check_training(
    fixture: Fixture, model: nn.Module, groups: list[dict], betas: tuple[float, float]
) -> None:
    """Gradients; groups; the norms of all parameters and of their change after one step."""
    zero, named = no_gradient(fixture), Released(model)
    check_gradients(fixture, named, GRADIENT, zero)
    meta = fixture.meta
    group_of = {id(p): group for group in groups for p in group["params"]}
    keys = fixture.told("grad_keys")
    parameters = {k: p for k, p in named.named_parameters() if p.requires_grad}
    parameters = {k: parameters[k] for k in keys}
    if "no_decay_keys" in meta:
        ours = {k for k, p in parameters.items() if group_of[id(p)]["weight_decay"] == 0}
        assert ours == set(fixture.told("no_decay_keys"))
    for name, key in (("lr_scale", "lr_scale"), ("weight_decay", "weight_decay")):
        if name in fixture:
            near([group_of[id(p)][key] for p in parameters.values()], fixture.take(name), rtol=1e-9)
    if "param_after_step" not in fixture:
        return
    before = {k: p.detach().clone() for k, p in parameters.items()}
    reach = take_step(named, groups, betas, meta["step_lr"], zero)
    check_after_step(fixture, "param_after_step", parameters, reach, STEP)
    noise, _, in_doubt = np.array([reach[k] for k in parameters]).T
    moved = norms([p.double() - before[k].double() for k, p in parameters.items()])
    rounding = 6e-8 * norms(list(before.values()))
    for key, stored, _ in fixture.answers("param_delta"):
        bound = STEP * stored + in_doubt + rounding + (0 if key.endswith("_f64") else noise)
        near(moved, stored, atol=bound, message=key)


def check_state(fixture: Fixture, model: nn.Module) -> None:
    """Names and shapes of released files, but for what is worked out here; parameters."""
    stored = fixture.told("state_dict_shapes")
    stored = {k: v for k, v in stored.items() if not k.endswith(fastmim.INDEX_BUFFERS)}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == stored
    count = sum(p.numel() for p in model.parameters())
    assert count == fixture.told("parameters_total")


# ── golden files: pre-training and classifiers ──────────────────────────────────────────


@contextlib.contextmanager
def layout_of_the_release(wanted: bool) -> Iterator[None]:
    """Inside, maps of CMT lie in memory as in the release, if it is `wanted`.

    On the CPU PyTorch (2.13 is one) takes the gradient of BatchNorm in evaluation mode from the
    wrong places if there is one image and the gradient lies channels-last in memory: a bias then
    gets another gradient than the sum over the map. The release meets that, so its stored gradients
    of one image are not those of its loss (which `test_gradients_of_one_image` shows ours to be).
    """
    def embed(self: nn.Module, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.contiguous()).flatten(2).mT)

    def mlp(self: nn.Module, x: Tensor, shape: tuple[int, int]) -> Tensor:
        x = self.conv1(x.mT.unflatten(2, shape))
        return self.conv2(self.proj_bn(F.gelu(x + self.proj(x)))).flatten(2).mT

    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(fastmim.InvertedMlp, "forward", mlp)
            patch.setattr(fastmim.ConvEmbed, "forward", embed)
        yield


def check_pretraining(fixture: Fixture) -> None:
    meta, images = fixture.meta, filled_inputs(fixture.meta)
    config = config_of(meta["model"], images.shape[-1])
    model = fill(FastMIM(config), meta["weight_seed"]).train(meta["mode"] == "train")
    if config.input_size == meta["model"]["kwargs"]["img_size"]:
        check_state(fixture, model)
    mask = fastmim.hide_blocks(fixture.take("noise"), meta["mask_ratio"])
    same(mask, fixture.take("mask").astype(bool))
    if "loss_mask" in fixture:
        stored = fixture.take("loss_mask").astype(bool)
        same(fastmim.enlarge(torch.from_numpy(mask), stored.shape[-1]), stored)
    spread = meta["f32_vs_f64"]

    target = fastmim.make_target(images, config)
    if "target" in fixture:
        stored = fixture.take("target")
        scale = max(1.0, np.abs(stored).max())
        near(target, stored, atol=1e-5 * scale, message="target")
    if "target_stats" in fixture:
        check_spread(target, fixture.take("target_stats"))
        near(target[0, :64].flatten(1)[:, :16], fixture.take("target_slice"), atol=1e-5)

    sites = {name: site(model, name) for name, _ in meta["features"]}
    with watched(sites) as found:
        loss, prediction = model(images, mask)
    fixture.near("loss", loss, rtol=LOSS)
    if "pred" in fixture:
        near_in_norm(prediction, fixture.take("pred"), spread["pred"][1], "pred")
    if "pred_slice" in fixture:
        near_in_norm(prediction[0, :2, :64], fixture.take("pred_slice"), spread["pred"][1], "slice")
        check_spread(prediction, fixture.take("pred_stats"))
    check_features(fixture, found)
    if "bn_after_forward_l2" in fixture:
        buffers = dict(model.named_buffers())
        ours = norms([buffers[key] for key in fixture.told("bn_after_keys")])
        near(ours, fixture.take("bn_after_forward_l2"), rtol=1e-5)
    with layout_of_the_release(meta["mode"] == "eval" and len(images) == 1):
        model(images, mask)[0].backward()
    groups = fastmim.parameter_groups(model, meta["weight_decay"], undecayed=())
    check_training(fixture, model, groups, (0.9, 0.95))


def check_classifier(fixture: Fixture) -> None:
    meta, images = fixture.meta, filled_inputs(fixture.meta)
    given, config = meta["model"]["kwargs"], config_of(meta["model"])
    classes = given["num_classes"]
    model = BACKBONES[config.family](config, classes, given["drop_path_rate"])
    fill(model, meta["weight_seed"]).eval()
    check_state(fixture, model)
    smooth = F.one_hot(torch.tensor(meta["labels"]), classes) * 0.9 + 0.1 / classes
    soft = meta["lam"] * smooth + (1 - meta["lam"]) * smooth.flip(0)
    if "soft" in fixture:
        near(soft, fixture.take("soft"), atol=1e-6)
    sites = {name: site(model, name) for name, _ in meta["features"]}
    with watched(sites) as found:
        logits = model(images)
    loss = F.cross_entropy(logits, soft)
    spread = meta["f32_vs_f64"]["pred"][1]
    if "pred" in fixture:
        near_in_norm(logits, fixture.take("pred"), spread, "logits")
    if "pred_slice" in fixture:
        near_in_norm(logits[:, :64], fixture.take("pred_slice"), spread, "slice")
        check_spread(logits, fixture.take("pred_stats"))
    fixture.near("loss", loss, rtol=LOSS)
    check_features(fixture, found)
    loss.backward()
    groups = fastmim.parameter_groups(model, meta["weight_decay"], config.depths,
                                      meta["layer_decay"])  # fmt: skip
    check_training(fixture, model, groups, (0.9, 0.999))


def check_transfer(fixture: Fixture) -> None:
    """Pre-trained weights in a classifier of another size, filled otherwise before."""
    for row in fixture.told("rows"):
        before = fill(FastMIM(config_of(row["pretrain"])), row["pretrain_weight_seed"])
        config, classes = config_of(row["finetune"]), row["finetune"]["kwargs"]["num_classes"]
        filled = fill(BACKBONES[config.family](config, classes), row["finetune_weight_seed"])
        head = filled.head.weight.detach().clone()
        kept = {k for k, v in filled.state_dict().items() if "num_batches" not in k}
        own = {k: v.clone() for k, v in filled.state_dict().items()}

        def make(filled: nn.Module = filled, config: ModelConfig = config,
                 classes: int = classes) -> nn.Module:  # fmt: skip
            meta = torch.get_default_device().type == "meta"
            return BACKBONES[config.family](config, classes) if meta else filled

        file = {"model": before.state_dict(), "args": {}}
        model, said = fastmim.load_weights(make, "file", file, fresh_head=True)
        assert "head starts fresh" in said
        kept = {k for k in kept if k not in ("head.weight", "head.bias")
                and torch.equal(own[k], model.state_dict()[k])} | {"head.weight", "head.bias"}
        missing = {k for k in row["missing"] if not k.endswith(fastmim.INDEX_BUFFERS)}
        assert kept == missing
        names = {k.removeprefix("encoder.") for k in file["model"]}
        left = ("mask_token", "decoder_", "norm.")
        unexpected = {k for k in names if k.startswith(left)} - own.keys()
        assert unexpected == {k for k in row["unexpected"]
                              if not k.endswith(fastmim.INDEX_BUFFERS)}  # fmt: skip
        with torch.no_grad():
            model.head.weight.copy_(head)
            images = torch.from_numpy(filled_images(tuple(row["image_shape"]), row["image_seed"]))
            logits = model.eval()(images)
        near_in_norm(logits, fixture.take(f"{row['name']}/logits"), 0.0, row["name"])


# ── golden files: HOG, tables, recipes, initial weights ─────────────────────────────────


def check_hog(fixture: Fixture) -> None:
    for row in fixture.told("rows"):
        key, shape = row["key"], tuple(row["images"]["shape"])
        images = filled_images(shape, row["images"]["seed"])
        if row["images"]["kind"] == "photo":
            pixels = np.clip(np.rint(127.5 + 50 * images), 0, 255).astype(np.uint8)
            if (name := f"{key.split('/')[0]}/uint8") in fixture:
                same(pixels, fixture.take(name))
            images = data.normalize(torch.from_numpy(pixels)).numpy()
        options = row["options"]
        bins, cell = options["nbins"], options["pool"]
        ours = hog(torch.from_numpy(images), bins, cell, options["norm_pix_loss"],
                   options["gaussian_window"])  # fmt: skip
        stored = fixture.take(key)
        assert ours.shape == stored.shape
        ours, stored = (np.asarray(x).reshape(shape[0], 3, bins, *x.shape[2:])
                        for x in (ours, stored))  # fmt: skip
        sure = np.ones((shape[0], 3, 1, *stored.shape[3:]), bool)
        if f"{key}/ambiguous" in fixture:
            bits = np.unpackbits(fixture.take(f"{key}/ambiguous"))[: sure.size]
            sure = ~bits.reshape(sure.shape).astype(bool)
        assert (~sure).sum() == row["ambiguous_cells"]
        scale = 1.0 if options["norm_pix_loss"] else np.abs(stored).max()
        near(np.where(sure, ours, 0), np.where(sure, stored, 0), atol=1e-5 * scale, message=key)
    first = fixture.meta["rows"][0]["images"]
    gx, gy = sobel(torch.from_numpy(filled_images(tuple(first["shape"]), first["seed"])))
    gx, gy = gx[0, 0], gy[0, 0]
    bins = (torch.atan2(gx, gy) / np.pi * 9).floor().remainder(9)
    for name, ours in (("gx", gx), ("gy", gy), ("bin", bins)):
        if f"wave32/{name}" in fixture:
            near(ours, fixture.take(f"wave32/{name}"), atol=2e-6, message=name)
    if "gaussian_window_16" in fixture:
        near(gaussian(16), fixture.take("gaussian_window_16"), atol=1e-8)


def check_tables(fixture: Fixture) -> None:
    """Bias tables and positions for other sizes."""
    for row in fixture.told("rows"):
        kind, name = row["key"].split("/")
        if kind in ("simmim", "interpolate"):
            source, side = row["src"], row["dst"]
            key = "layers.0.blocks.0.attn.relative_position_bias_table"
            table = torch.from_numpy(parameter(key, (source**2, row["heads"]), row["seed"]))
            ours = fastmim.stretch(table, (side, side))
            if kind == "simmim":
                places = fastmim.geometric_positions(source, side)
                near(places, row["positions"], rtol=1e-9)
                operator = fastmim.spline_operator(places, np.arange(side) - side // 2)
                if f"operator/{name}" in fixture:
                    near(operator, fixture.take(f"operator/{name}"), atol=1e-9, message=name)
                ours = fastmim.remap_table(table, side)
            near(ours, fixture.take(row["key"]), atol=2e-6, message=row["key"])
            continue
        if kind == "pos_embed":
            table = fastmim.sincos_table(row["dim"], row["grid_from"], row["grid_from"])
            side = row["grid_to"]
            adapted, _ = fastmim.fit_tables(
                {"pos_embed": table}, {"pos_embed": torch.empty(1, side**2 + 1, row["dim"])}, False)
            ours = adapted["pos_embed"]
        elif kind == "sincos":
            ours = fastmim.sincos_table(row["dim"], row["grid"], row["grid"])[0]
        else:
            shape = tuple(row["shape_from"])
            table = torch.from_numpy(parameter(row["weight_name"], shape, row["seed"]))
            adapted, _ = fastmim.fit_tables(
                {"relative_pos_a": table}, {"relative_pos_a": torch.empty(row["shape_to"])}, False)
            ours = adapted["relative_pos_a"]
        if f"{row['key']}_l2" in fixture:
            near(norms([ours])[0], fixture.take(f"{row['key']}_l2"), rtol=1e-6)
        for stored in fixture.named(row["key"]):
            cut = tuple(slice(*[int(n) if n else None for n in part.split(":")])
                        if ":" in part else int(part)
                        for part in (row["slice"] or "[:]").strip("[]").split(", "))  # fmt: skip
            near(ours[cut], fixture.take(stored), atol=2e-6, message=stored)


def check_recipe(fixture: Fixture) -> None:
    """Schedules, layer maps, groups, drop path and phases."""
    for row in fixture.told("schedules"):
        s, key = row["args"], row["name"]
        epochs, stored = fixture.take(f"epoch/{key}"), fixture.take(f"lr/{key}")
        cfg = fastmim.PretrainConfig(**{k: v for k, v in s.items() if k != "lr"})
        ours = [fastmim.pretraining_lr(cfg, e, s["lr"]) for e in epochs]
        near(ours, stored, rtol=1e-9, atol=1e-18)
        if row["kind"] != "cosine":  # an option that no recipe uses
            assert "decay_epoch" in s
            continue
        warmup = s["warmup_epochs"]
        command, model = key.split("_")[0], "vit_b" if "vit" in key else "swin_b"
        cfg = fastmim.configure(command, model=model)
        assert (cfg.epochs, cfg.warmup_epochs, cfg.min_lr) == (s["epochs"], warmup, s["min_lr"])
        assert cfg.blr * cfg.batch_size * 8 / 256 == pytest.approx(s["lr"])
    for name, stored in fixture.told("layer_decay_maps").items():
        config = fastmim.MODELS[fastmim.known_model(name)]
        model = on_meta(partial(BACKBONES[config.family], replace(config, input_size=224), 1000))
        decay = stored["layer_decay"]
        groups = fastmim.parameter_groups(model, 0.05, config.depths, decay)
        group_of = {id(p): group for group in groups for p in group["params"]}
        assert dict(model.named_parameters()).keys() == stored["map"].keys()
        for key, p in model.named_parameters():
            layer, scale, weight_decay = stored["map"][key]
            assert fastmim.layer_id(key, config.depths) == layer, key
            assert group_of[id(p)]["lr_scale"] == pytest.approx(scale, rel=1e-9)
            assert group_of[id(p)]["weight_decay"] == weight_decay, key
    for name, stored in fixture.told("pretrain_weight_decay_groups").items():
        model = on_meta(partial(FastMIM, fastmim.MODELS[fastmim.known_model(name)]))
        groups = fastmim.parameter_groups(model, 0.05, undecayed=())
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        found = {"no_decay": set(), "decay": set(), "frozen": set()}
        for key, p in Released(model).named_parameters():
            kind = {0.0: "no_decay", 0.05: "decay", None: "frozen"}[decays.get(id(p))]
            found[kind].add(key)
        assert found == {kind: set(keys) for kind, keys in stored.items()}
    for key, stored in fixture.told("drop_path").items():
        name, rate = key.split()
        config = fastmim.MODELS[fastmim.known_model({
            "vit_base": "vit_b", "swin_base": "swin_b"}.get(name, name))]  # fmt: skip
        model = on_meta(partial(BACKBONES[config.family], config, 10, float(rate)))
        ours = [m.drop_path for m in model.modules() if hasattr(m, "drop_path")]
        near(ours, stored, atol=1e-7)
    check_phases(fixture.told("progressive"))


def check_phases(stored: dict) -> None:
    """Size, batch and rate of each phase of FastMIM-P, along one cosine."""
    s = stored["args"]
    rows = zip(s["mim_pt_size"], s["mim_pt_step"], s["mim_pt_bs"], strict=True)
    cfg = fastmim.configure(
        "pretrain", model="pvtv2_b2", epochs=s["epochs"], warmup_epochs=s["warmup_epochs"],
        blr=s["blr"], progressive=",".join(":".join(map(str, row)) for row in rows))  # fmt: skip
    phases = fastmim.plan_phases(cfg, fastmim.MODELS["pvtv2_b2"])
    for epoch, number, size, batch, accum, peak, rate in stored["rows"]:
        phase = next(p for p in phases if p.start <= epoch < p.end)
        assert (phase.number, phase.config.input_size, phase.batch_size) == (number, size, batch)
        lr = cfg.blr * batch * accum * s["world"] / 256
        assert lr == pytest.approx(peak)
        warmup = cfg.warmup_epochs
        ours = fastmim.lr_at(epoch, lr, 0.0, cfg.min_lr, warmup, warmup, cfg.epochs)
        assert ours == pytest.approx(rate, rel=1e-9, abs=1e-18)


def check_initial(fixture: Fixture) -> None:
    """Mean, deviation and largest magnitude of every parameter of one draw."""
    for name, kwargs in fixture.told("constructors").items():
        task = "pretrain" if name.startswith("mim_") else "finetune"
        config = fastmim.MODELS[fastmim.known_model(name)]
        family = {"family": config.family, "task": task, "official_name": name, "kwargs": kwargs}
        config = config_of(family)
        torch.manual_seed(0)
        model = (FastMIM(config) if task == "pretrain"
                 else BACKBONES[config.family](config, 1000))  # fmt: skip
        parameters = dict(Released(model).named_parameters())
        keys = dict(fixture.meta["keys"][name])
        assert {k: list(p.shape) for k, p in parameters.items()} == keys
        for key, (mean, std, most) in zip(keys, fixture.take(name), strict=True):
            p = parameters[key].detach().double()
            ours, count = (p.mean(), p.std(correction=0), p.abs().max()), p.numel()
            if count < 10:  # which tell nothing
                assert max(abs(x) for x in ours) < 5 * most + 1e-9
                continue
            if std < 1e-9:  # a constant
                near(ours, [mean, 0, most], atol=1e-6, message=key)
                continue
            if most > 50 * std:  # a number that the truncation at 2, of 100 deviations, cut off
                std, most = (std**2 - most**2 / count) ** 0.5, ours[2].item()
            # Six deviations of the estimates' own noise; their magnitudes are within a tenth.
            near(ours[0], mean, atol=6 * 1.5 * std / count**0.5, message=f"{name} {key} mean")
            near(ours[1], std, atol=6 * std / count**0.5, message=f"{name} {key} deviation")
            assert count < 10**5 or abs(ours[2] / most - 1) < 0.35, f"{name} {key} magnitude"


def check_fixture(fixture: Fixture) -> None:
    """By what `meta` says it is."""
    meta = fixture.meta
    if "model" in meta:
        check = {"pretrain": check_pretraining, "finetune": check_classifier}[meta["model"]["task"]]
    elif "constructors" in meta:
        check = check_initial
    elif "schedules" in meta:
        check = check_recipe
    else:
        row = meta["rows"][0]
        check = {"options" in row: check_hog, "pretrain" in row: check_transfer,
                 "src" in row: check_tables}[True]  # fmt: skip
    check(fixture)


def is_large(path: Path) -> bool:
    return path.name.startswith(("full_", "init"))


@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * is_large(path))
    for path in golden_files("fastmim")])  # fmt: skip
def test_golden(path: Path) -> None:
    fixture = Fixture(path)
    check_fixture(fixture)
    fixture.finish()


# ── what it is by definition: masks, target, loss ───────────────────────────────────────


def small(family: str = "vit", **changes: object) -> ModelConfig:
    return fastmim.model_config(fastmim.MODELS[FAMILIES[family]], **changes)


def made(config: ModelConfig, seed: int = 0) -> FastMIM:
    torch.manual_seed(seed)
    return FastMIM(config)


def pictures(count: int = 2, size: int | tuple[int, int] = 64, seed: int = 0) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.from_numpy(filled_images((count, 3, height, width), seed))


def drawn_mask(config: ModelConfig, count: int = 2, seed: int = 0) -> np.ndarray:
    return fastmim.draw_blocks(config, 0.75, count, (seed,))


@pytest.mark.parametrize(("blocks", "ratio", "kept"), [
    (16, 0.75, 4), (64, 0.75, 16), (100, 0.9, 9), (36, 0.6, 14), (4, 0.6, 1)])  # fmt: skip
def test_as_many_blocks_are_hidden_in_each_image(blocks: int, ratio: float, kept: int) -> None:
    noise = np.random.default_rng(0).random((5, blocks), np.float32)
    mask = fastmim.hide_blocks(noise, ratio).reshape(5, -1)
    assert ((~mask).sum(1) == kept).all()
    for row, values in zip(mask, noise, strict=True):
        assert values[~row].max() < values[row].min()
    assert len({row.tobytes() for row in mask}) > 1  # each image has its own


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_a_ratio_hides_something_and_leaves_something(ratio: float) -> None:
    with pytest.raises(InputError, match="at least one must stay visible"):
        fastmim.hide_blocks(np.zeros((1, 16)), ratio)


def test_masks_are_a_function_of_their_seed() -> None:
    config = small()
    assert (drawn_mask(config, 9, 1) == drawn_mask(config, 9, 1)).all()
    assert (drawn_mask(config, 9, 1) != drawn_mask(config, 9, 2)).any()


@pytest.mark.parametrize("target", ["hog", "pixel"])
@pytest.mark.parametrize("block", [8, 16, 32])
@each_family
def test_loss_by_loops(family: str, block: int, target: str) -> None:
    """Every masked cell, or patch, by itself: where it is in a prediction, and what it counts."""
    config = small(family, block_size=block, target=target)
    model, images, mask = made(config), pictures(), drawn_mask(small(family, block_size=block))
    loss, prediction = model(images, mask)
    cell, stride = config.cell, config.stride
    assert cell == (8 if target == "hog" else min(block, stride))
    r, across, errors = stride // cell, 64 // stride, []
    described = hog(images)
    for b in range(2):
        for y in range(0, 64, cell):
            for x in range(0, 64, cell):
                if not mask[b, y // block, x // block]:
                    continue
                token = prediction[b, y // stride * across + x // stride]
                place = y % stride // cell * r + x % stride // cell
                ours = token.reshape(-1, r * r)[:, place]
                wanted = described[b, :, y // cell, x // cell] if target == "hog" else None
                if wanted is None:
                    pixels = images[b, :, y : y + cell, x : x + cell].permute(1, 2, 0).flatten()
                    wanted = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                errors.append((ours - wanted).square().mean())
    near(loss, torch.stack(errors).mean().detach(), rtol=1e-5)


@each_family
def test_hidden_pixels_change_no_prediction(family: str) -> None:
    """They are painted over; what is visible does."""
    config = small(family, block_size=16)
    model, images, mask = made(config).eval(), pictures(), drawn_mask(config)
    hidden = fastmim.enlarge(torch.from_numpy(mask), 64)
    with torch.no_grad():
        _, before = model(images, mask)
        _, other = model(torch.where(hidden, torch.randn_like(images), images), mask)
        _, seen = model(torch.where(hidden, images, images + 1), mask)
        painted = model.paint(images, torch.from_numpy(mask))
    assert torch.equal(before, other) and not torch.allclose(before, seen)
    assert torch.equal(painted.where(~hidden, 0), images.where(~hidden, 0))
    token = model.mask_token.detach().expand_as(images)
    assert torch.equal(painted.where(hidden, 0), token.where(hidden, 0))


@pytest.mark.parametrize("changes", [
    {}, {"target": "pixel", "norm_pix_loss": False}, {"decoder_depth": 0, "decoder_dim": 0}],
    ids=["hog", "pixel", "no decoder"])  # fmt: skip
@each_family
def test_every_parameter_gets_a_gradient(family: str, changes: dict) -> None:
    if "decoder_depth" in changes:
        changes = changes | {"decoder_dim": small(family).embed_dims[-1]}
    config = small(family, block_size=16, **changes)
    model = made(config)
    model(pictures(4), drawn_mask(config, 4))[0].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert not p.requires_grad or p.grad.any(), name
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == (["encoder.pos_embed"] if family == "vit" else [])
    assert model.mask_token.grad.ne(0).all()


@each_family
def test_learns_one_batch(family: str) -> None:
    config = small(family, block_size=16)
    model, images, mask = made(config), pictures(4), drawn_mask(config, 4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(60):
        loss, _ = model(images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0], losses[::10]


def test_gradients_of_one_image() -> None:
    """Of CMT in evaluation mode, by differences of the loss in float64."""
    config = small("cmt")
    model, images, mask = made(config).eval().double(), pictures(1).double(), drawn_mask(config, 1)

    def loss() -> Tensor:
        return model(images, mask)[0]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Tensor, "float", lambda x: x)
        with torch.enable_grad():
            loss().backward()
        for name, p in model.named_parameters():
            if name.endswith(("bn.bias", "conv2.1.bias", "sr.1.bias", "conv1.0.weight", "token")):
                step = 1e-3 * torch.randn_like(p)  # large: softmax is float32
                p += step
                after = loss().item()
                p -= 2 * step
                rise = after - loss().item()
                p += step
                wanted = 2 * (p.grad * step).sum().item()
                assert rise == pytest.approx(wanted, rel=1e-2, abs=1e-7), name


def test_half_precision_leaves_the_target_alone() -> None:
    config = small()
    model, images, mask = made(config), pictures(), drawn_mask(config)
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction = model(images, mask)
        target = fastmim.make_target(images, config)
    assert loss.dtype == prediction.dtype == torch.float32
    assert torch.equal(target, hog(images))


def test_what_does_not_fit_is_said() -> None:
    config = small()
    model = made(config)
    with pytest.raises(ValueError, match="not 64 px"):
        model(pictures(size=96), drawn_mask(config))
    with pytest.raises(ValueError, match="not of 2 images and 4x4 blocks"):
        model(pictures(), np.zeros((2, 16), bool))
    for changes, words in (
        ({"block_size": 24}, "as 8, 16, 32 do"), ({"block_size": 4}, "consist of cells of 8"),
        ({"input_size": 72}, "a multiple of 16"), ({"decoder_dim": 200}, "no multiple of its 6"),
        ({"decoder_depth": 0, "decoder_dim": 64}, "--decoder_dim 32"), ({"drop_last": 2}, "leaves"),
        ({"num_heads": (3,)}, "do not divide"), ({"num_heads": (2, 2)}, "give 1, one a stage"),
        ({"patch_size": 4}, "--target pixel works"), ({"input_size": (64, 96)}, "are square"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            fastmim.check_masking(small(**changes))
    with pytest.raises(InputError, match=r"--window_size 7 does not divide .* 128 px; .*2, 4, 8"):
        fastmim.model_config(fastmim.MODELS["swin_b"], window_size=7)


# ── backbones ───────────────────────────────────────────────────────────────────────────


def classifier(family: str, classes: int = 3, seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    return BACKBONES[family](small(family, **changes), classes).eval()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (4, 4), (12, 8), (6, 9), (3, 10), (5, 3)])
def test_windows_by_loops(shape: tuple[int, int], shifted: bool) -> None:
    """Attention among the tokens of a window, each pair with its bias; windows are cut where the
    map ends, and shifted ones where the roll would bring together what is apart."""
    torch.manual_seed(0)
    (h, w), window, heads, dim = shape, 4, 2, 8
    attention = fastmim.ShiftedWindowAttention(dim, heads, window)
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, h * w, dim)
    plan = fastmim.to_device(fastmim.cut_windows(shape, window, shifted), CPU)
    ours = attention(x, plan)
    moved = [window // 2 if shifted and side > window else 0 for side in shape]

    def cell(token: int) -> tuple[int, int]:
        y, x = divmod(token, w)
        return (y - moved[0]) // min(window, h), (x - moved[1]) // min(window, w)

    q, k, v = attention.qkv(x).reshape(2, h * w, 3, heads, dim // heads).unbind(2)
    out = torch.zeros(2, h * w, heads, dim // heads)
    for i in range(h * w):
        there = [j for j in range(h * w) if cell(i) == cell(j)]
        rows = [(i // w - j // w + 3) * 7 + i % w - j % w + 3 for j in there]
        logits = torch.einsum("bhd,bjhd->bhj", q[:, i], k[:, there]) * (dim // heads) ** -0.5
        logits = logits + attention.relative_position_bias_table[rows].T
        out[:, i] = torch.einsum("bhj,bjhd->bhd", logits.softmax(-1), v[:, there])
    near(ours, attention.proj(out.flatten(2)).detach(), atol=1e-5)


@pytest.mark.parametrize("size", [64, (64, 96), (96, 32), (32, 32)])
@each_family
def test_maps_of_any_size(family: str, size: int | tuple[int, int]) -> None:
    model = classifier(family)
    images = pictures(size=size)
    maps = model.maps(images)
    height, width = images.shape[-2:]
    assert [tuple(x.shape) for x in maps] == [
        (2, c, height // s, width // s)
        for c, s in zip(model.channels, model.strides, strict=True)]  # fmt: skip
    assert all(x.isfinite().all() for x in maps)
    sum(x.square().mean() for x in maps).backward()  # also what is interpolated learns
    for name, p in model.named_parameters():
        if ("pos" in name or "bias_table" in name) and size != (32, 32):  # one token, one window
            assert p.grad is not None and p.grad.any(), name
    with pytest.raises(ValueError, match="must divide both sides"):
        model.maps(torch.zeros(1, 3, 64, 72))


def test_maps_of_chosen_blocks() -> None:
    model = classifier("vit")
    first, last = model.maps(pictures(), [1, 2])
    assert torch.equal(last, model.maps(pictures())[0]) and not torch.equal(first, last)


def test_biases_of_cmt_are_stretched_over_queries_then_keys() -> None:
    """Where the table is a product of a map of queries and one of keys, so is the stretched one."""
    model = classifier("cmt")
    torch.manual_seed(1)
    queries, keys = torch.randn(1, 256), torch.randn(1, 4)
    with torch.no_grad():
        model.relative_pos_a.copy_(queries[:, :, None] * keys[:, None])
        ours = model.bias(0, (16, 24))
    wide = fastmim.stretch(queries.T, (16, 24)) * fastmim.stretch(keys.T, (2, 3)).T
    near(ours[0], wide, atol=1e-5)
    assert model.bias(0, (16, 16)) is model.relative_pos_a


@each_family
def test_grad_checkpoint_changes_nothing(family: str) -> None:
    """Nor do running statistics move twice."""
    config, found = small(family, block_size=16), []
    for again in (False, True):
        model = made(config)
        model.encoder.grad_checkpoint = again
        model(pictures(), drawn_mask(config))[0].backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad]
                     + [b.clone() for b in model.buffers()])  # fmt: skip
    assert all(map(torch.equal, *found))


@each_family
def test_drop_path_is_off_in_evaluation(family: str) -> None:
    torch.manual_seed(0)
    model = BACKBONES[family](small(family), 3, 0.5)
    images = pictures()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


# ── weights ─────────────────────────────────────────────────────────────────────────────


def run(command: str, **flags: object) -> dict:
    _, function = fastmim.COMMANDS[command]
    cpu = {} if command == "export" else {"device": "cpu", "num_workers": 0}
    return function(fastmim.configure(command, **cpu, **flags))


def trained(folder: Path, family: str, **flags: object) -> Path:
    """backbone.pth of a short pre-training."""
    run("pretrain", **({"model": FAMILIES[family], "batch_size": 4, "epochs": 1,
        "warmup_epochs": 0, "data_path": "drawn:8", "lr": 1e-3} | flags),
        output_dir=str(folder))  # fmt: skip
    return folder / "backbone.pth"


def tuned(folder: Path, weights: Path, **flags: object) -> Path:
    run("finetune", **({"weights": str(weights), "batch_size": 4, "epochs": 1, "warmup_epochs": 0,
        "data_path": "drawn:40"} | flags), output_dir=str(folder))  # fmt: skip
    return folder / "best.pth"


def opened(path: Path, **flags: object) -> nn.Module:
    return fastmim.open_model(
        fastmim.configure("evaluate", weights=str(path), device="cpu", **flags))[1]


@each_family
def test_export_and_back(family: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What is exported answers as what was trained, after pre-training and after fine-tuning."""
    backbone = trained(tmp_path / "a", family)
    best = tuned(tmp_path / "b", backbone)
    for path in (backbone, best):
        before, images = opened(path), pictures()
        out = tmp_path / "official.pth"
        run("export", weights=str(path), output=str(out))
        assert torch.equal(opened(out)(images), before(images))
        if family == "cmt":
            with pytest.raises(InputError, match="timm has no CMT"):
                run("export", weights=str(path), naming="timm", output=str(tmp_path / "t.pth"))
            continue
        capsys.readouterr()
        run("export", weights=str(path), naming="timm", output=str(tmp_path / "t.pth"))
        assert "timm.create_model(" in capsys.readouterr().out
        state = torch.load(tmp_path / "t.pth", weights_only=True)
        assert len(state) == len(before.state_dict())


def manifest(name: str) -> dict[str, list[int]]:
    import json

    with np.load(GOLDEN / "augment" / "timm_keys.npz") as arrays:
        return json.loads(str(arrays["meta"]))["models"][name]["shapes"]


@pytest.mark.parametrize(("name", "changes"), [
    ("vit_base_patch16_224:global_pool=avg", {}), ("vit_large_patch16_224:global_pool=avg", {}),
    ("vit_base_patch16_224", {"global_pool": False}), ("swin_base_patch4_window7_224", {}),
    ("swin_large_patch4_window7_224", {"window_size": 7}),
    ("swin_base_patch4_window7_224:window_size=14", {"window_size": 14}), ("pvt_v2_b2", {}),
])  # fmt: skip
def test_export_has_the_names_and_shapes_of_timm(name: str, changes: dict) -> None:
    ours = fastmim.known_model({"swin_large_patch4_window7_224": "swin_l"}.get(
        name.split(":")[0], name.split(":")[0]))  # fmt: skip
    config = fastmim.model_config(fastmim.MODELS[ours], input_size=224, **changes)
    model = BACKBONES[config.family](replace(config, depths=config.depths), 1000)
    state = {k: list(v.shape) for k, v in fastmim.export_state(model, "timm").items()}
    assert state == manifest(name)
    headless = set(fastmim.export_state(FastMIM(config).encoder, "timm"))
    wanted = {k for k in state if not k.startswith(("head.", "fc_norm."))}
    last = set() if config.family == "pvtv2" else {"norm.weight", "norm.bias"}
    assert headless == wanted | last


PUBLISHED = ("vit_b", "vit_l", "swin_b", "swin_l", "pvtv2_b2", "pvtv2_b5", "cmt_s")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_recognised(name: str) -> None:
    """By shapes alone, with the buffers that released files hold."""
    config = fastmim.MODELS[name]
    state = on_meta(partial(FastMIM, config)).state_dict()
    if config.family == "swin":
        state["encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.empty(16, 16)
    whole = fastmim.pretraining(config)
    found = fastmim.identify({"model": state, "args": {}})
    assert found[0] == name and fastmim.pretraining(found[1]) == whole
    larger = fastmim.model_config(config, input_size=224)
    state = on_meta(partial(BACKBONES[config.family], larger, 10)).state_dict()
    assert fastmim.identify({"model": state, "args": {}}) == (name, larger)


@each_family
def test_a_released_file(family: str, tmp_path: Path) -> None:
    """Its names, its buffers, its Namespace; also of a pixel target."""
    import argparse

    for target in ("hog", "pixel"):
        config = small(family, target=target)
        model = made(config)
        state = dict(model.state_dict())
        prefix = "" if family == "vit" else "encoder."
        assert ("pos_embed" in state) == (family == "vit")
        assert any(k.startswith(prefix + "patch_embed") for k in state)
        if family == "swin":
            key = "encoder.layers.0.blocks.0.attn.relative_position_index"
            state[key] = torch.zeros(16, 16, dtype=torch.int64)
        path = tmp_path / f"{target}.pth"
        torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 799}, path)
        answer = run("reconstruct", weights=str(path), data_path="drawn:2", mask_ratio=0.5,
                     output=str(tmp_path / "r.png"), model=FAMILIES[family],
                     input_size=64)  # fmt: skip
        assert np.isfinite(answer["loss"])
        encoder = fastmim.load_backbone(path)
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, state[prefix + key]), key


def test_blocks_are_of_no_concern_to_fine_tuning(tmp_path: Path) -> None:
    backbone = trained(tmp_path / "a", "vit", block_size=32, epochs=1)
    best = tuned(tmp_path / "b", backbone, input_size=80)
    assert opened(best).config.input_size == 80
    with pytest.raises(InputError, match="--block_size 32"):
        run("pretrain", model="test", block_size=32, input_size=80)


def test_heads_of_vit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Six in pre-training, twelve in fine-tuning, as released and said; --num_heads is for both."""
    config = fastmim.MODELS["vit_b"]
    assert fastmim.pretraining(config).num_heads == (6,) and config.num_heads == (12,)
    both = fastmim.model_config(config, num_heads=(12,))
    assert fastmim.pretraining(both).num_heads == both.num_heads == (12,)
    backbone = trained(tmp_path / "a", "vit")
    assert "1 heads in pre-training, 2 in fine-tuning, as released" in capsys.readouterr().out
    assert opened(backbone).blocks[0].attn.num_heads == 1
    assert opened(backbone, num_heads=(2,)).blocks[0].attn.num_heads == 2
    assert opened(tuned(tmp_path / "b", backbone)).blocks[0].attn.num_heads == 2
    backbone = trained(tmp_path / "c", "vit", num_heads=(4,))
    assert opened(backbone).blocks[0].attn.num_heads == 4
    assert opened(tuned(tmp_path / "d", backbone)).blocks[0].attn.num_heads == 4


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_keep_norm(family: str, tmp_path: Path) -> None:
    """The last norm is lost as released, or taken over under its new name."""
    state = trained(tmp_path / "a", family)
    learned = data.read_checkpoint(state)["model"]["norm.weight"]
    nudged = {"model": data.read_checkpoint(state)["model"] | {"norm.weight": learned + 1}}
    torch.save(nudged, tmp_path / "n.pth")
    make = partial(BACKBONES[family], small(family), 3)
    for keep in (False, True):
        file = data.read_checkpoint(tmp_path / "n.pth")
        model, said = fastmim.load_weights(make, "n", file, True, keep)
        wanted = learned + 1 if keep else torch.ones_like(learned)
        assert torch.equal(model.fc_norm.weight, wanted) and ("fc_norm" in said) == (not keep)


@each_family
def test_drop_last(family: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The last block of the third stage is not pre-trained, and begins anew in fine-tuning."""
    stage = small(family).drop_stage
    backbone = trained(tmp_path / "a", family, drop_last=1)
    encoder = opened(backbone)
    assert encoder.config.depths[stage] == small(family).depths[stage] - 1
    capsys.readouterr()
    best = tuned(tmp_path / "b", backbone)
    name = {"vit": "blocks.1", "swin": "layers.2.blocks.1", "pvtv2": "block3.1",
            "cmt": "blocks_c.1"}[family]  # fmt: skip
    assert f"new: {name}" in capsys.readouterr().out
    assert opened(best).config.depths == small(family).depths
    state = data.read_checkpoint(backbone)
    lost = {k: v for k, v in state["model"].items() if not fastmim.part_of(k).endswith(".0")}
    torch.save({"model": lost}, tmp_path / "lost.pth")
    with pytest.raises(InputError):
        run("finetune", weights=str(tmp_path / "lost.pth"), model=FAMILIES[family])


def test_sizes_are_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Pre-trained at 64 px, fine-tuned at 96: what depends on the size is fitted, and said."""
    for family, said in (("vit", "positions interpolated"), ("swin", "bias tables remapped"),
                         ("cmt", "relative positions fitted"), ("pvtv2", "")):  # fmt: skip
        backbone = trained(tmp_path / family, family)
        capsys.readouterr()
        best = tuned(tmp_path / f"{family}96", backbone, input_size=96)
        assert said in capsys.readouterr().out
        model = opened(best)
        assert model.config.input_size == 96 and model(pictures(size=96)).shape == (2, 10)


# ── FastMIM-P ───────────────────────────────────────────────────────────────────────────

PHASES = {"epochs": 3, "data_path": "drawn:16", "progressive": "64:0,96:1", "save_freq": 1}


@pytest.mark.parametrize(("text", "said"), [
    ("64", "neither side:epoch"), ("64:0,x:1", "'x:1' is neither"), ("64:1", "rise from 0"),
    ("64:0,96:1,128:1", "rise from 0"), ("64:0,96:3", "stay below the 3"), ("96:0,64:1", "to grow"),
    ("64:0,96:1:0", "0 at a time"), ("64:0,72:1", "a multiple of 16"), ("64:0:1:2", "neither"),
])  # fmt: skip
def test_phases_that_cannot_be(text: str, said: str) -> None:
    cfg = fastmim.configure("pretrain", model="test", epochs=3, progressive=text)
    with pytest.raises(InputError, match=said):
        fastmim.plan_phases(cfg, TEST)


def test_phases_that_the_images_do_not_fill() -> None:
    """Refused at the start and not when the phase begins."""
    flags = {"model": "test", "epochs": 3, "progressive": "64:0:8,96:1:16", "output_dir": ""}
    cfg = fastmim.configure("pretrain", **flags, data_path="drawn:8")
    with pytest.raises(InputError, match="--output_dir"):
        fastmim.pretrain(cfg)
    cfg = replace(cfg, output_dir="nowhere")
    with pytest.raises(InputError, match="8 images do not fill one global batch of 16 in phase 2"):
        fastmim.pretrain(cfg)
    assert not Path("nowhere").exists()


def test_a_dry_run_is_of_the_largest_images(capsys: pytest.CaptureFixture) -> None:
    flags = {"model": "test", "epochs": 3, "progressive": "64:0,96:1", "batch_size": 2}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastmim, "train", lambda *_: seen.append(_[4]["config"]["input_size"]) or {})
        fastmim.pretrain(fastmim.configure("pretrain", **flags, device="cpu"))
    assert seen == [96] and "dry run" in capsys.readouterr().out


def test_windows_of_one_token_fit_any() -> None:
    table = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fastmim.remap_table(table, 7), table.expand(49, 2))
    assert torch.equal(fastmim.remap_table(fastmim.remap_table(table, 7), 1), table)


def test_phases_name_all_sizes() -> None:
    """Not even the model's own has to fit, and no other may be given."""
    flags = {"model": "test_swin", "window_size": 5, "epochs": 3, "progressive": "160:0,320:1"}
    with pytest.raises(InputError, match="leave out --input_size"):
        fastmim.pretrain(fastmim.configure("pretrain", **flags, input_size=160))
    flags |= {"progressive": "160:0", "mask_ratio": 1.0, "data_path": "drawn:8", "batch_size": 4}
    with pytest.raises(InputError, match="--window_size 5"):
        fastmim.pretrain(fastmim.configure("pretrain", **flags | {"progressive": "64:0"}))
    with pytest.raises(InputError, match="mask_ratio"):  # all else fits
        fastmim.pretrain(fastmim.configure("pretrain", **flags))


def test_blocks_in_pixels_or_in_cells() -> None:
    config = fastmim.MODELS["swin_b"]
    flags = {"model": "swin_b", "epochs": 400, "progressive": "128:0,160:200:64,192:300"}
    phases = fastmim.plan_phases(fastmim.configure("pretrain", **flags), config)
    assert [(p.config.block_size, p.config.blocks) for p in phases] == [(32, 4), (32, 5), (32, 6)]
    assert [p.config.window(0) for p in phases] == [4, 5, 6]
    assert [(p.start, p.end, p.batch_size) for p in phases] == [
        (0, 200, 256), (200, 300, 64), (300, 400, 256)]  # fmt: skip
    flags["progressive_blocks"] = "cells"
    phases = fastmim.plan_phases(fastmim.configure("pretrain", **flags), config)
    assert [(p.config.block_size, p.config.blocks) for p in phases] == [(32, 4), (40, 4), (48, 4)]
    for phase in phases:
        FastMIM(replace(phase.config, depths=(1, 1, 1, 1)))


@each_family
def test_a_phase_begins_where_the_last_ended(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Parameters are equal, or remapped; moments are kept, or zero for those of a new shape."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        enter = fastmim.enter_phase

        def watch(cfg: object, process: object, parts: dict, args: dict, step: int) -> None:
            path = tmp_path / "checkpoint-last.pth"
            found["before"] = torch.load(path, weights_only=True)
            enter(cfg, process, parts, args, step)
            found["after"], found["parts"] = torch.load(path, weights_only=True), parts

        patch.setattr(fastmim, "enter_phase", watch)
        trained(tmp_path, family, **PHASES)
    assert "phase 2 of 2, from epoch 1: 96 px" in capsys.readouterr().out
    before, after = found["before"], found["after"]
    assert (after["step"], after["args"]["phase"]) == (4, 1)
    assert after["args"]["config"]["input_size"] == 96
    changed = 0
    for key, value in after["model"].items():
        old = before["model"][key]
        if value.shape == old.shape:
            assert torch.equal(value, old), key
            continue
        changed += 1
        if key == "pos_embed":
            wanted = fastmim.sincos_table(value.shape[-1], 6, 6)
        elif key.endswith("bias_table"):
            wanted = fastmim.remap_table(old, int(len(value) ** 0.5))
        else:
            wanted = F.interpolate(old[None], value.shape[1:], mode="bicubic")[0]
        assert torch.equal(value, wanted), key
    assert changed == {"vit": 1, "swin": 5, "pvtv2": 0, "cmt": 4}[family]
    parameters = [p for g in found["parts"]["optimizer"].param_groups for p in g["params"]]
    fresh = 0
    for i, moments in after["optimizer"]["state"].items():
        assert moments["exp_avg"].shape == parameters[i].shape
        old = before["optimizer"]["state"][i]
        if old["exp_avg"].shape == parameters[i].shape:
            assert all(torch.equal(moments[k], old[k]) for k in old)
        else:
            fresh += 1
            assert not moments["exp_avg"].any() and not moments["step"]
    assert fresh == (changed if family != "vit" else 0)
    # The model of the end learned in the second phase, at its size.
    end = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert end["step"] == 12
    rows = [(record["phase"], record["input_size"]) for record in end["log"]["records"]]
    assert rows == [(1, 64), (2, 96), (2, 96)]
    assert fastmim.identify(data.read_checkpoint(tmp_path / "backbone.pth"))[1].input_size == 96


@pytest.mark.parametrize("family", ["vit", "swin", "cmt"])
def test_a_run_stopped_in_any_phase_ends_the_same(family: str, tmp_path: Path) -> None:
    """In the first phase, at its end before the next has a checkpoint, and in the second."""
    from tests.scripts import assert_same_end, at_step

    flags = PHASES | {"progressive": "64:0,96:1:2"}  # 4 steps an epoch, then 8
    trained(tmp_path / "whole", family, **flags)

    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    for number in (3, 7):  # steps of both phases are counted
        with pytest.raises(Killed), at_step(fastmim, number, kill):
            trained(tmp_path / "parts", family, **flags, save_every=0.0)
    with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastmim, "enter_phase", kill)
        trained(tmp_path / "edge", family, **flags)
    for name in ("parts", "edge"):
        trained(tmp_path / name, family, **flags)
        assert_same_end(tmp_path / "whole", tmp_path / name)


# ── commands ────────────────────────────────────────────────────────────────────────────


def test_statistics_of_a_skipped_step_are_put_back(tmp_path: Path) -> None:
    from tests.scripts import skip_steps

    counts = {}
    for name, bad in (("all", ()), ("skipped", (2,))):
        with pytest.MonkeyPatch.context() as patch:
            skip_steps(fastmim, lambda number, bad=bad: number in bad, patch)
            trained(tmp_path / name, "cmt", data_path="drawn:16")
        state = data.read_checkpoint(tmp_path / name / "checkpoint-last.pth")["model"]
        counts[name] = int(state["encoder.stem_norm1.num_batches_tracked"])
    assert counts == {"all": 4, "skipped": 3}


@pytest.mark.parametrize("target", ["hog", "pixel"])
def test_pictures_show_what_is_visible(target: str) -> None:
    """Painted where hidden, pasted where visible; strokes for HOG."""
    config = small(target=target, norm_pix_loss=target == "hog")
    model, mask, found = made(config), drawn_mask(config), {}
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastmim.data, "draw_columns", lambda columns, labels: found.update(
            columns=columns, labels=labels))  # fmt: skip
        fastmim.draw_reconstructions(model, pixels, mask)
    columns, images = found["columns"], data.normalize(pixels)
    assert len(columns) == len(found["labels"]) == (4 if target == "hog" else 3)
    scale = 2 if target == "hog" else 1
    hidden = fastmim.enlarge(torch.from_numpy(mask), 64 * scale).expand_as(columns[0])
    assert torch.equal(columns[0], F.interpolate(images, scale_factor=float(scale)))
    assert torch.equal(columns[1][~hidden], columns[0][~hidden])
    assert torch.equal(columns[-1][~hidden], columns[-2 if target == "hog" else 0][~hidden])
    token = model.mask_token.detach().expand_as(columns[1])
    assert torch.equal(columns[1][hidden], token[hidden])


def test_sync_bn_needs_gpus_and_processes() -> None:
    model = classifier("cmt")
    two = fastmim.Process(0, 2, CPU, torch.float32)
    with pytest.raises(InputError, match="no BatchNorm"):
        fastmim.synchronised(classifier("vit"), two, True)
    assert fastmim.synchronised(model, two, False) is model
    assert fastmim.synchronised(model, replace(two, world_size=1), True) is model
    with pytest.raises(InputError, match="--sync_bn"):
        fastmim.synchronised(model, two, True)


def test_recipes() -> None:
    """The commands of the release, and ours where it has none."""
    for model, pretrain, finetune in (
        ("vit_b", (512, 800, 20.0, 100), (6e-4, 0.7)),
        ("swin_b", (256, 400, 10.0, 50), (1e-3, 0.8)),
        ("swin_l", (256, 400, 10.0, 50), (1e-3, 0.8)),
        ("pvtv2_b2", (256, 800, 10.0, 50), (1e-3, 0.8)),
        ("cmt_s", (256, 800, 10.0, 50), (1e-3, 0.8)),
    ):
        cfg = fastmim.configure("pretrain", model=model)
        assert (cfg.batch_size, cfg.epochs, cfg.warmup_epochs, cfg.save_freq) == pretrain
        cfg = fastmim.configure("finetune", model=model)
        assert (cfg.blr, cfg.layer_decay) == finetune and cfg.input_size == 224
    for model, window in (("swin_l", 14), ("swin_b", 7)):
        cfg = fastmim.configure("finetune", model=model)
        assert fastmim.choose_config(cfg, None)[1].window(0) == window


@pytest.mark.parametrize(("name", "parameters"), [
    ("vit_b", (86_712_175, 85_697_283, 86_567_656)),
    ("swin_b", (90_231_083, 86_698_107, 87_768_224)),
    ("swin_l", (198_591_847, 194_927_799, 196_794_556)),
    ("pvtv2_b2", (28_251_763, 24_849_859, 25_362_856)),
    ("pvtv2_b5", (84_844_915, 81_443_011, 81_956_008)),
    ("cmt_s", (27_461_491, 24_059_587, 26_256_160)),
])  # fmt: skip
def test_parameter_counts(name: str, parameters: tuple[int, int, int]) -> None:
    """Of the release: pre-training, encoder and mask token, classifier at 224 px."""
    config = fastmim.MODELS[name]
    whole = on_meta(partial(FastMIM, config))
    encoder = sum(p.numel() for p in whole.encoder.parameters()) + 3
    tuned, _ = fastmim.choose_config(fastmim.configure("finetune", model=name), None)[::-1]
    head = on_meta(partial(BACKBONES[config.family], tuned, 1000))
    counts = [sum(p.numel() for p in m.parameters()) for m in (whole, head)]
    assert (counts[0], encoder, counts[1]) == parameters


# ── what a run is made of ───────────────────────────────────────────────────────────────


def test_values_of_the_released_commands() -> None:
    """Specification 6 and 7, of each published network; where there is no command, ours."""
    for name in PUBLISHED:
        cfg, vit = fastmim.configure("pretrain", model=name), name.startswith("vit")
        assert (cfg.weight_decay, cfg.blr, cfg.min_lr, cfg.clip_grad) == (0.05, 1.5e-4, 0.0, None)
        assert (cfg.mask_ratio, cfg.crop_min, cfg.accum_iter) == (0.75, 0.2, 1)
        assert not cfg.sync_bn and cfg.progressive_blocks == "pixels"
        _, config = fastmim.choose_config(cfg, None)
        assert (config.target, config.norm_pix_loss, config.input_size) == ("hog", True, 128)
        assert config.block_size == (16 if vit else 32)
        assert (config.decoder_dim, config.decoder_depth) == (256, 1 if vit else 4)
        cfg = fastmim.configure("finetune", model=name)
        assert (cfg.batch_size, cfg.epochs, cfg.warmup_epochs) == (128, 100, 5.0)
        assert (cfg.weight_decay, cfg.min_lr, cfg.clip_grad) == (0.05, 1e-6, None)
        assert (cfg.drop_path, cfg.mixup, cfg.cutmix, cfg.smoothing) == (0.1, 0.8, 1.0, 0.1)
        assert (cfg.reprob, cfg.crop_min, cfg.aa) == (0.25, 0.08, "rand-m9-mstd0.5-inc1")
        assert not (cfg.ema or cfg.keep_norm or cfg.sync_bn)
        assert fastmim.choose_config(cfg, None)[1].global_pool
    heads = {"vit_b": (12,), "vit_l": (16,), "swin_b": (4, 8, 16, 32), "swin_l": (6, 12, 24, 48),
             "pvtv2_b2": (1, 2, 5, 8), "pvtv2_b5": (1, 2, 5, 8),
             "cmt_s": (1, 2, 4, 8)}  # fmt: skip
    assert {name: fastmim.MODELS[name].num_heads for name in PUBLISHED} == heads


def planned(command: str, patch: pytest.MonkeyPatch, **flags: object) -> list[dict]:
    """What `train` is given, once for each phase, and the crops; nothing is trained."""
    calls, crops = [], []
    names = list(inspect.signature(fastmim.train).parameters)

    def train(*args: object) -> dict:
        calls.append(dict(zip(names, args, strict=True)) | {"crops": list(crops)})
        return {}

    def crop(size: int, scale: tuple[float, float], **options: object) -> object:
        crops.append((size, scale, options.get("augment")))
        return made_crop(size, scale, **options)

    made_crop = data.TrainCrop
    with patch.context() as inside:
        inside.setattr(fastmim, "train", train)
        inside.setattr(fastmim.data, "TrainCrop", crop)
        run(command, **({"batch_size": 4, "data_path": "drawn:40"} | flags))
    return calls


@each_family
def test_optimizer_of_a_run(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Betas, decay and rates of every parameter, drop path: as released."""
    flags = {"model": FAMILIES[family], "output_dir": str(tmp_path)}
    (call,) = planned("pretrain", monkeypatch, **flags)
    model, optimizer = call["parts"]["model"], call["parts"]["optimizer"]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        wanted = None if name == "encoder.pos_embed" else 0.05 if p.ndim > 1 else 0.0
        assert decay.get(id(p)) == wanted, name
    assert call["crops"] == [(64, (0.2, 1.0), None)]

    (call,) = planned("finetune", monkeypatch, **flags, layer_decay=0.5)
    model, optimizer = call["parts"]["model"], call["parts"]["optimizer"]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    depths = model.config.depths
    for name, p in model.named_parameters():
        exempt = p.ndim <= 1 or name in ("cls_token", "pos_embed")
        assert groups[id(p)]["weight_decay"] == (0.0 if exempt else 0.05), name
        wanted = 0.5 ** (sum(depths) + 1 - fastmim.layer_id(name, depths))
        assert groups[id(p)]["lr_scale"] == pytest.approx(wanted), name
    rates = [m.drop_path for m in model.modules() if hasattr(m, "drop_path")]
    near(rates, np.linspace(0, 0.1, sum(depths)), atol=1e-7)
    assert call["crops"][0][:2] == (64, (0.08, 1.0)) and call["crops"][0][2] is not None


def test_rates_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One cosine over all phases, times the batch of each; released warm-ups; layers' shares."""
    def cosine(epoch: float, peak: float, low: float, warmup: float, epochs: int) -> float:
        if epoch < warmup:
            return peak * epoch / warmup
        share = (epoch - warmup) / (epochs - warmup)
        return low + (peak - low) * 0.5 * (1 + np.cos(np.pi * share))

    calls = planned("pretrain", monkeypatch, model="test", epochs=40, warmup_epochs=4,
                    progressive="64:0,96:20:2", output_dir=str(tmp_path / "a"))  # fmt: skip
    assert [call["cfg"].epochs for call in calls] == [20, 40]
    for call, batch in zip(calls, (4, 2), strict=True):
        for step in (0, 7, 45, 111, 399):
            wanted = cosine(step * batch / 40, 1.5e-4 * batch / 256, 0.0, 4, 40)
            assert call["schedule"](step, 1.0) == pytest.approx(wanted, rel=1e-6)
    (call,) = planned("finetune", monkeypatch, model="test", output_dir=str(tmp_path / "b"))
    for step in (0, 7, 45, 111, 999):
        wanted = 0.3 * cosine(step / 10, 6e-4 * 4 / 256, 1e-6, 5, 100)
        assert call["schedule"](step, 0.3) == pytest.approx(wanted, rel=1e-6)


def test_losses_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another mask at every step; erasing, mixup, cutmix and smoothing as the recipe has them."""
    seen = []
    (call,) = planned("pretrain", monkeypatch, model="test", output_dir=str(tmp_path / "a"))

    def net(images: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        seen.append(mask.clone())
        return images.sum(), None

    for number in (0, 1, 0):
        call["loss_of"](net, pictures(4), torch.zeros(4), number)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert int(seen[0].sum()) == 4 * 12

    mixup, erase = fastmim.augment.Mixup, fastmim.augment.random_erase
    monkeypatch.setattr(fastmim.augment, "Mixup", lambda *given, **options: seen.append(
        (given, options)) or mixup(*given, **options))  # fmt: skip
    monkeypatch.setattr(fastmim.augment, "random_erase", lambda images, rng, share: seen.append(
        share) or erase(images, rng, share))  # fmt: skip
    seen.clear()
    (call,) = planned("finetune", monkeypatch, model="test", output_dir=str(tmp_path / "b"))
    images, inputs = pictures(4), []
    call["loss_of"](lambda x: inputs.append(x) or torch.zeros(4, 10), images, torch.arange(4), 0)
    assert seen == [((0.8, 1.0), {"smoothing": 0.1, "num_classes": 10}), 0.25]
    assert not torch.equal(inputs[0], images)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_flags_reach_the_model(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = []
    monkeypatch.setattr(fastmim, "synchronised", lambda model, _, asked: wanted.append(
        asked) or model)  # fmt: skip
    for asked in (False, True):
        (call,) = planned(command, monkeypatch, model="test_cmt", sync_bn=asked,
                          grad_checkpoint=asked, output_dir=str(tmp_path))  # fmt: skip
        model = call["parts"]["model"]
        assert getattr(model, "encoder", model).grad_checkpoint == asked
    assert wanted == [False, True]


def test_tests_take_the_released_crop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """224 of 256, by the rule that does not enlarge what is above 224."""
    made_crop, rules = data.EvalCrop, []
    monkeypatch.setattr(fastmim.data, "EvalCrop", lambda size, rule="simmim": rules.append(
        rule) or made_crop(size, rule))  # fmt: skip
    best = tuned(tmp_path / "b", trained(tmp_path / "a", "vit"))
    run("evaluate", weights=str(best), data_path="drawn:40")
    assert rules and set(rules) == {"mae"}


def test_a_fresh_head_and_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to zero after a pre-training; CMT's drops a tenth of what it sees."""
    backbone = trained(tmp_path / "a", "cmt")
    (call,) = planned("finetune", monkeypatch, weights=str(backbone), nb_classes=100,
                      output_dir=str(tmp_path / "b"))  # fmt: skip
    model = call["parts"]["model"]
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not model.head.bias.any()
    seen = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: seen.append((p, training)) or x)
    model.train()(pictures())
    model.eval()(pictures())
    assert seen == [(0.1, True), (0.1, False)]


def test_keep_norm_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained(tmp_path / "a", "swin", lr=0.1, epochs=2)
    learned = data.read_checkpoint(backbone)["model"]["norm.weight"]
    assert (learned - 1).abs().max() > 1e-3
    for keep in (False, True):
        (call,) = planned("finetune", monkeypatch, weights=str(backbone), keep_norm=keep,
                          output_dir=str(tmp_path / "b"))  # fmt: skip
        assert torch.equal(call["parts"]["model"].fc_norm.weight, learned) == keep


def test_a_linear_probe_leaves_the_encoder_alone(tmp_path: Path) -> None:
    """Statistics too; what CMT's classifier has before its head is no part of the encoder."""
    backbone = trained(tmp_path / "a", "cmt")
    tuned(tmp_path / "b", backbone, linear_probe=True, lr=1e-2)
    before = data.read_checkpoint(backbone)["model"]
    after = data.read_checkpoint(tmp_path / "b" / "checkpoint-last.pth")["model"]
    for key in before.keys() & after.keys():
        assert torch.equal(before[key], after[key]), key
    assert after["_bn.num_batches_tracked"] == 10 and after["_bn.weight"].std() > 0
    assert after["_fc.bias"].any() and after["head.weight"].std() > 1e-3


def test_averages_are_of_statistics_too(tmp_path: Path) -> None:
    """As those of the release, which are of parameters and buffers; they are tested and kept."""
    tuned(tmp_path, "", model="test_cmt", ema=0.99, lr=1e-3)
    file = data.read_checkpoint(tmp_path / "checkpoint-last.pth")
    average = {k.removeprefix("module."): v for k, v in file["ema"].items()}
    for key in ("stem_norm1.running_mean", "stem_conv1.weight"):
        assert not torch.equal(average[key], file["model"][key]), key
    best = data.read_checkpoint(tmp_path / "best.pth")["model"]  # it is what is tested
    assert all(torch.equal(value, average[key]) for key, value in best.items())


def test_calls_of_timm_tell_what_a_network_is() -> None:
    """Whatever its size: windows, heads, widths and outputs."""
    def told(model: nn.Module) -> dict:
        call = fastmim.timm_create(model)
        return eval(call.replace("timm.create_model(", "dict(name=", 1))

    for family in ("vit", "swin", "pvtv2"):
        config = small(family)
        found, one = told(classifier(family)), family == "vit"
        assert found["num_classes"] == 3
        for name, value in (("num_heads", config.num_heads), ("mlp_ratio" if one else "mlp_ratios",
                            config.mlp_ratios), ("depth" if one else "depths", config.depths),
                            ("embed_dims" if family == "pvtv2" else "embed_dim",
                             config.embed_dims)):  # fmt: skip
            wanted = value[0] if one or name == "embed_dim" else value
            assert found.get(name, wanted) == wanted
        if family != "pvtv2":
            assert (found["img_size"], found["patch_size"]) == (64, config.patch_size)
    found = told(BACKBONES["swin"](small("swin")))
    assert (found["window_size"], found["num_classes"]) == (small("swin").window(0), 0)
    assert told(FastMIM(small("vit")).encoder)["num_heads"] == 1


# ── FastMIM-P from a named checkpoint ───────────────────────────────────────────────────


def test_a_phase_begins_with_a_named_file(tmp_path: Path) -> None:
    """That ends the phase before, in another folder or in that of a run that went on."""
    flags = PHASES | {"epochs": 2}
    whole = torch.load(trained(tmp_path / "a", "swin", **flags), weights_only=True)["model"]
    for folder in ("b", "a"):
        named = str(tmp_path / "a" / "checkpoint-0.pth")
        other = torch.load(trained(tmp_path / folder, "swin", **flags, resume=named),
                           weights_only=True)["model"]  # fmt: skip
        assert all(torch.equal(value, other[key]) for key, value in whole.items())
        file = data.read_checkpoint(tmp_path / folder / "checkpoint-last.pth")
        assert file["step"] == 8 and [r["epoch"] for r in file["log"]["records"]] == [0, 1]


def test_phases_need_a_folder() -> None:
    """Each begins with the checkpoint of the last; without one it would begin anew."""
    with pytest.raises(InputError, match="--output_dir"):
        run("pretrain", model="test", batch_size=4, output_dir="", **PHASES)


# ── initial weights, small ──────────────────────────────────────────────────────────────


def wanted_deviation(module: nn.Module, family: str, tuned: bool) -> tuple[float, bool]:
    """Of the weights of a layer by specification 5, and whether they are uniform."""
    if isinstance(module, nn.Linear):
        return (0.02, False) if tuned else ((2 / sum(module.weight.shape)) ** 0.5, True)
    fan = module.weight[0].numel()
    if family == "vit" and not tuned:
        return (2 / (fan + len(module.weight))) ** 0.5, True
    if family in ("vit", "swin"):
        return (3 * fan) ** -0.5, True  # the framework's
    groups = module.groups if family == "pvtv2" else 1
    return (2 * groups / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5, False


@pytest.mark.parametrize("tuned", [False, True])
@each_family
def test_initial_weights(family: str, tuned: bool) -> None:
    """Deviations within six of their own; uniform ones end where they must; biases and norms."""
    model = classifier(family, 50) if tuned else made(small(family))
    draws = {"mask_token": 0.02, "cls_token": 0.02, "pos_embed": 0.02,
             "relative_position_bias_table": 0.02, "relative_pos_a": 1.0, "relative_pos_b": 1.0,
             "relative_pos_c": 1.0, "relative_pos_d": 1.0}  # fmt: skip
    checked = 0
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for key in own.keys() & draws.keys():
            p = own[key].detach()
            if own[key].requires_grad and p.numel() > 8:
                error = 6 * (2 * p.numel()) ** -0.5
                assert p.std().item() == pytest.approx(draws[key], rel=error), key
                checked += 1
        if isinstance(module, nn.Linear | nn.Conv2d):
            deviation, uniform = wanted_deviation(module, family, tuned)
            p = module.weight.detach()
            error = 6 * (2 * p.numel()) ** -0.5
            assert p.std().item() == pytest.approx(deviation, rel=error), name
            assert not uniform or p.abs().max() <= deviation * 3**0.5 * 1.0001, name
            assert uniform or p.numel() < 500 or p.abs().max() > 2 * deviation, name
            if module.bias is not None:
                patch = name.endswith("patch_embed.proj") and family in ("vit", "swin")
                limit = module.weight[0].numel() ** -0.5
                assert module.bias.abs().max() <= limit, name
                assert bool(module.bias.any()) == patch, name
        elif "norm" in name or name.endswith("_bn"):
            assert all((p == (1 if k == "weight" else 0)).all() for k, p in own.items()), name
    assert checked >= {"vit": 1, "swin": 5, "pvtv2": 0, "cmt": 4}[family]


def test_initial_colours() -> None:
    colours = [made(small(), seed).mask_token.detach().flatten() for seed in range(60)]
    assert torch.stack(colours).std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("tuned", [False, True])
@each_family
def test_epsilons_of_norms(family: str, tuned: bool) -> None:
    """Specification 2.2."""
    model = classifier(family) if tuned else made(small(family))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1), name
        elif isinstance(module, nn.LayerNorm):
            coarse = family == "swin" or (family != "vit" and (
                "patch_embed" in name or name.startswith("decoder_") or "attn" in name))
            assert module.eps == (1e-5 if coarse else 1e-6), name


@pytest.mark.parametrize("family", ["vit", "swin", "cmt"])
def test_a_probe_freezes_only_what_was_trained(family: str, tmp_path: Path) -> None:
    """Not the blocks that pre-training left out, nor a norm in the place of the one that is lost
    in fine-tuning; and with the heads of pre-training."""
    backbone = trained(tmp_path / "a", family, drop_last=1)
    before = data.read_checkpoint(backbone)["model"]
    run("finetune", weights=str(backbone), batch_size=4, epochs=1, warmup_epochs=0,
        data_path="drawn:40", linear_probe=True, output_dir=str(tmp_path / "b"))  # fmt: skip
    file = data.read_checkpoint(tmp_path / "b" / "best.pth")
    trained_here = ("head.", "_fc.", "_bn.")
    for key, value in file["model"].items():
        if not key.startswith(trained_here):
            assert torch.equal(value, before[key.replace("fc_norm.", "norm.")]), key


def test_sizes_and_windows_are_told_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Another size does not change the windows a file was trained with."""
    backbone = trained(tmp_path, "swin")
    for size in ((64, 96), 128):
        opened(backbone, input_size=size)
        shown = "64x96" if size == (64, 96) else size
        assert f"test_swin, {shown} px, windows of 2" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "flag"), [
    ("vit", {"window_size": 2}), ("cmt", {"window_size": 2}), ("swin", {"global_pool": False}),
])  # fmt: skip
def test_flags_of_other_families_are_refused(family: str, flag: dict) -> None:
    cfg = fastmim.configure("finetune", model=FAMILIES[family], **flag)
    with pytest.raises(InputError, match=f"--{next(iter(flag))}: .*{family}"):
        fastmim.choose_config(cfg, None)


def test_a_mask_that_hides_nothing_is_refused() -> None:
    config = small()
    with pytest.raises(ValueError, match="nothing is hidden"):
        made(config)(pictures(2), np.zeros((2, config.blocks, config.blocks), bool))
