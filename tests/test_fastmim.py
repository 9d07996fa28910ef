"""FastMIM against the stored answers of released code, and what it is by definition."""

from __future__ import annotations

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
from tests.conftest import GOLDEN, THREADS, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    key_third,
    near,
    norms,
    same,
    take_step,
    watched,
)

TEST = fastmim.MODELS["test"]
FAMILIES = {"vit": "test", "swin": "test_swin", "pvtv2": "test_pvtv2", "cmt": "test_cmt"}
CPU = torch.device("cpu")
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for small models: on a busy machine two wait for each other at every product."""
    before = torch.get_num_threads()
    if not THREADS:
        torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without storage: names, shapes and counts only."""
    with torch.device("meta"):
        return make()


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
    if side and side != changes["input_size"]:
        changes |= {"input_size": side,
                    "block_size": side * changes["block_size"] // changes["input_size"]}  # fmt: skip
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
    if isinstance(module, fastmim.SwinStage):  # merging belongs to the stage there
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
        mean, std, norm = fixture.take("target_stats")
        x = target.double()
        near([x.mean(), x.std(correction=0), x.norm()], [mean, std, norm],
             atol=1e-6 * np.array([std, std, norm]))  # fmt: skip
        near(target[0, :64].flatten(1)[:, :16], fixture.take("target_slice"), atol=1e-5)

    sites = {name: site(model, name) for name, _ in meta["features"]}
    with watched(sites) as found:
        loss, prediction = model(images, mask)
    fixture.near("loss", loss, rtol=LOSS)
    if "pred" in fixture:
        near_in_norm(prediction, fixture.take("pred"), spread["pred"][1], "pred")
    if "pred_slice" in fixture:
        near_in_norm(prediction[0, :2, :64], fixture.take("pred_slice"), spread["pred"][1], "slice")
        mean, std, norm = fixture.take("pred_stats")
        x = prediction.detach().double()
        near([x.mean(), x.std(correction=0), x.norm()], [mean, std, norm],
             atol=OUTPUT * np.array([std, std, norm]))  # fmt: skip
    check_features(fixture, found)
    if "bn_after_forward_l2" in fixture:
        buffers = dict(model.named_buffers())
        ours = norms([buffers[key] for key in fixture.told("bn_after_keys")])
        near(ours, fixture.take("bn_after_forward_l2"), rtol=1e-5)
    loss.backward()
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
    near_in_norm(logits, fixture.take("pred"), meta["f32_vs_f64"]["pred"][1], "logits")
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
        if row["kind"] != "cosine":  # decay in steps, which no recipe uses
            continue
        warmup = s["warmup_epochs"]
        ours = [fastmim.lr_at(e, s["lr"], 0.0, s["min_lr"], warmup, warmup, s["epochs"])
                for e in epochs]  # fmt: skip
        near(ours, stored, rtol=1e-9, atol=1e-18)
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
        keys = {key: shape for key, shape in fixture.meta["keys"][name]}
        assert {k: list(p.shape) for k, p in parameters.items()} == keys
        for key, (mean, std, most) in zip(keys, fixture.take(name), strict=True):
            p = parameters[key].detach().double()
            ours, count = (p.mean(), p.std(correction=0), p.abs().max()), p.numel()
            if std < 1e-9:  # a constant
                near(ours, [mean, 0, most], atol=1e-6, message=key)
                continue
            # Six deviations of the estimates' own noise; their magnitudes are within a tenth.
            near(ours[0], mean, atol=6 * 1.5 * std / count**0.5, message=f"{name} {key} mean")
            near(ours[1], std, atol=6 * std / count**0.5, message=f"{name} {key} deviation")
            assert count < 1000 or abs(ours[2] / most - 1) < 0.35, f"{name} {key} magnitude"


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
