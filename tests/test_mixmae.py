"""MixMAE against the released code's answers, and against what it is by definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import mixmae
from mixmae import MixClassifier, MixEncoder, MixMAE, MixPlan, ModelConfig
from tests.conftest import THREADS, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    near,
    norms,
    same,
    take_step,
    trained,
    watched,
)

TEST = mixmae.MODELS["test"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for small models: on a busy machine two wait for each other at every product."""
    before = torch.get_num_threads()
    if not THREADS:
        torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The model with every trainable parameter from the filling rule."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), seed)))
    return model


def plan_of(config: ModelConfig, mask: np.ndarray) -> MixPlan:
    return mixmae.to_device(mixmae.plan_mix(config, mask), CPU)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without storage: names, shapes and counts only."""
    with torch.device("meta"):
        return make()


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
    file = mixmae.read_checkpoint(folder / "source.pth")
    make = partial(MixClassifier, config, classes)
    model, said = mixmae.load_weights(make, "source.pth", file, fresh_head=True)
    there, here = source.state_dict(), model.state_dict()
    changed = {k: [list(there[k].shape), list(v.shape)] for k, v in here.items()
               if k in there and there[k].shape != v.shape}  # fmt: skip
    assert changed == fixture.told("interpolated", changed)
    assert f"{len(changed)} position tables interpolated, the head starts fresh" in said
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
