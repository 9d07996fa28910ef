"""GreenMIM against the released code's answers, and against what it is by definition."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
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
from tests.test_grouping import SIZINGS

TEST = greenmim.MODELS["swin_test"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for small models: on a busy machine two wait for each other at every product."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)


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


def pictures(config: ModelConfig, batch: int = 2, seed: int = 7) -> Tensor:
    return torch.from_numpy(filled_images((batch, 3, *(config.input_size,) * 2), seed))


def some_mask(config: ModelConfig, ratio: float = 0.6, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).random(config.units**2)
    return greenmim.random_mask(noise, ratio)


# ── golden files: what is compared ──────────────────────────────────────────────────────
# A check pops what it has compared; what is left in the end nobody compared, and that fails.

LOSS, PREDICTION, RELATIVE, STEP, STEP_NOISE = 1e-6, 1e-5, 1e-5, 1e-6, 3e-4  # spec, section 12


def same(ours: object, stored: np.ndarray, message: str = "") -> None:
    np.testing.assert_array_equal(np.asarray(ours), stored, err_msg=message)


def near(
    ours: object, stored: np.ndarray, *, rtol: float = 0.0, atol: float | np.ndarray = 0.0,
    message: str = "",
) -> None:  # fmt: skip
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    assert ours.shape == stored.shape, message
    error, allowed = np.abs(ours - stored), atol + rtol * np.abs(stored)
    # Written so that NaN is an error.
    bad = np.argwhere(~(error <= allowed)).tolist()
    assert not bad, f"{message}: {bad} differ, by up to {error.max()}"


def check_statistics(x: Tensor, stored: np.ndarray, name: str) -> None:
    """[L2 norm, mean, standard deviation], the mean relative to the deviation."""
    x = x.detach().double()
    ours = [x.norm().item(), x.mean().item(), x.std(correction=0).item()]
    near(ours, stored, atol=RELATIVE * np.array([stored[0], stored[2], stored[2]]), message=name)


def check_features(found: dict[str, Tensor], arrays: dict[str, np.ndarray]) -> None:
    for key in [key for key in arrays if key.startswith("feat/")]:
        name, stored = key.removeprefix("feat/"), arrays.pop(key)
        scale = np.abs(stored).max()
        near(found[name].flatten()[: len(stored)], stored, atol=RELATIVE * scale, message=name)
        check_statistics(found[name], arrays.pop(f"featstat/{name}"), name)


@contextlib.contextmanager
def watched(sites: dict[str, tuple[nn.Module, str]]) -> Iterator[dict[str, Tensor]]:
    """What passes the sites, name -> (module, "in" or "out"), inside the context."""
    found, hooks = {}, []
    for name, (module, end) in sites.items():

        def keep(_: nn.Module, args: tuple, *out: Tensor, name: str = name) -> None:
            found[name] = (out or args)[0].detach()

        hook = module.register_forward_pre_hook if end == "in" else module.register_forward_hook
        hooks.append(hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def stage_sites(encoder: SwinEncoder) -> dict[str, tuple[nn.Module, str]]:
    """Input, output before merging (`pre`) and after it (`out`) of every stage."""
    *merging, last = enumerate(encoder.layers)
    sites = {f"stage{i}_in": (layer, "in") for i, layer in (*merging, last)}
    sites |= {f"stage{i}_pre": (layer.downsample, "in") for i, layer in merging}
    sites |= {f"stage{i}_out": (layer.downsample, "out") for i, layer in merging}
    return sites | {f"stage{last[0]}_out": (encoder.norm, "in")}


def norms(tensors: list[Tensor]) -> np.ndarray:
    return np.array([t.detach().double().norm().item() for t in tensors])


def check_gradients(model: nn.Module, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Norms of the gradients, and of the parameters after an AdamW step of `parameter_groups`."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == set(meta["grad_keys"])
    assert not meta.get("keys_without_grad")
    ordered = [parameters[key] for key in meta["grad_keys"]]
    gradients = norms([p.grad for p in ordered])
    for key in {"grad_norms", "grad_norms64"} & arrays.keys():
        near(gradients, arrays.pop(key), rtol=RELATIVE, message=key)
    if "grad_total_norm" in arrays:
        total = np.linalg.norm(gradients)
        near(total, arrays.pop("grad_total_norm"), rtol=RELATIVE)


def check_step(
    model: nn.Module, groups: list[dict], betas: tuple[float, float], meta: dict, arrays: dict
) -> None:
    keys, noisy = meta["grad_keys"], set(meta["step_noise_keys"])
    parameters = dict(model.named_parameters())
    before = {key: p.detach().clone() for key, p in parameters.items()}
    for group in groups:
        group["lr"] = 1e-3 * group["lr_scale"]
    torch.optim.AdamW(groups, betas=betas, eps=1e-8).step()

    # Softmax does not see a bias of the keys: its gradient is zero but for rounding, of which
    # AdamW makes steps. float32 norms of qkv biases hold that noise, listed or not; in float64 it
    # is gone, so with the key third put back every one of them must agree closely.
    biases = {key for key in keys if key.endswith("qkv.bias")}
    rtol = np.array([STEP_NOISE if key in noisy | biases else STEP for key in keys])
    stored = arrays.pop("param_after_step")
    near(norms([parameters[k] for k in keys]), stored, atol=rtol * stored, message="after step")
    with torch.no_grad():
        for key in biases:
            parameters[key].view(3, -1)[1] = before[key].view(3, -1)[1]
    rtol = np.array([STEP_NOISE if key in noisy - biases else STEP for key in keys])
    stored = arrays.pop("param_after_step64")
    near(norms([parameters[k] for k in keys]), stored, atol=rtol * stored, message="in float64")


def names_in(model: nn.Module, group: dict) -> list[str]:
    ids = {id(p) for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in ids]


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


def check_state(model: nn.Module, eps: float, meta: dict) -> None:
    """Names and shapes of the released state dict, but for the index buffers of `kept`."""
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    buffers = [k for k in meta["kept"] if k.endswith(greenmim.INDEX_BUFFERS)]
    assert shapes == {k: v for k, v in meta["shapes"].items() if k not in buffers}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {eps}


def check_mask(config: ModelConfig, meta: dict, arrays: dict) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the noise it comes from."""
    noise = arrays.pop("noise")
    same(((uniform("noise", noise.shape, meta["noise_seed"]) + 1) / 2).astype(np.float32), noise)
    mask = greenmim.random_mask(noise[0], meta["mask_ratio"])
    same(mask, arrays.pop("mask"))
    if "ids_restore" in arrays:
        plan = greenmim.plan_mask(config, mask, noise[0])
        same(plan.restore[~mask], arrays.pop("ids_restore")[~mask])
        assert [mask.sum(), (~mask).sum()] == [meta["masked_units"], meta["visible_units"]]
        assert meta["num_mask_units"] == config.units**2
        order = meta["decoder_permutation"]
        assert order["visible_positions"] == np.flatnonzero(~mask).tolist()
        restored = plan.restore[order["visible_positions"]]
        assert order["latent_index_placed_there"] == restored.tolist()
    return mask, noise[0]


def coordinates(config: ModelConfig, plan: MaskPlan) -> list[np.ndarray]:
    """(N, 2) row and column of the tokens of every stage, followed through the merging."""
    tokens = config.input_size // config.patch_size
    found = [np.stack(np.divmod(plan.patches.numpy(), tokens), 1)]
    for merge in plan.merges:
        blocks = found[-1][merge.numpy()].reshape(-1, 4, 2) // 2
        assert (blocks == blocks[:, :1]).all()
        found.append(blocks[:, 0])
    return found


def check_windows(config: ModelConfig, plan: MaskPlan, meta: dict) -> None:
    """Window counts and the released partition of every plan, in the order they are made."""
    calls, places = iter(meta["grouping_calls"]), coordinates(config, plan)
    for stage, plans in enumerate(plan.windows):
        window, shift = config.window(stage)
        for made, s in zip(plans, (0, shift), strict=False):
            call, tokens = next(calls), len(places[stage])
            assert [window, s, tokens] == [call[key] for key in ("window", "shift", "tokens")]
            ids = grouping.window_ids(*places[stage].T, window, s)
            counts = np.unique(ids, return_counts=True)[1].tolist()
            seen = (made.bias == 0).sum(-1).flatten()
            seen = seen if made.places is None else seen[made.places]
            assert sorted(seen.tolist()) == sorted(np.repeat(counts, counts).tolist())
            released = grouping.released_groups(counts, window**2)
            if call["mode"] == "masking":
                assert released == [list(range(len(counts)))]
                continue
            assert call["mode"] == "grouping" and counts == call["window_counts"]
            assert released == grouping.pack(counts, call["group_size"]) == call["groups"]
            assert len(released) == call["num_groups"]
            assert [sum(counts[w] for w in g) for g in released] == call["group_fill"]
    assert next(calls, None) is None


def check_prediction(model: GreenMIM, images: Tensor, plan: MaskPlan, meta: dict,
                     arrays: dict) -> Tensor:  # fmt: skip
    encoder, size = model.encoder, model.config.mask_unit
    sites = stage_sites(encoder) | {
        "latent": (encoder.norm, "out"),
        "decoder_embed": (model.decoder_embed, "out"),
        "decoder_in": (model.decoder_blocks[0], "in"),
        "decoder_norm": (model.decoder_norm, "out"),
    }
    with torch.no_grad(), watched(sites) as found:
        prediction = model.predict(images, plan)
    check_features(found | {"decoder_pos_embed": model.decoder_pos_embed}, arrays)
    where = re.fullmatch(r"whole|pred\[(.*)\]", meta["pred_slice"])[1] or ":"
    part = [
        slice(*(int(n) if n else None for n in axis.strip().split(":")))
        for axis in where.split(",")
    ]
    near(prediction[tuple(part)], arrays.pop("pred"), atol=PREDICTION)
    near(prediction.double().norm(dim=-1), arrays.pop("pred_norm"), rtol=RELATIVE)
    check_statistics(prediction, arrays.pop("pred_stat"), "pred")
    target = greenmim.patchify(images, size)
    if model.config.norm_pix_loss:
        target, _, _ = greenmim.normalize_patches(target)
    if "target_norm" in arrays:
        near(target.double().norm(dim=-1), arrays.pop("target_norm"), rtol=RELATIVE)
        head = arrays.pop("target_head")
        near(target[..., : head.shape[-1]], head, atol=PREDICTION)
    return prediction


def check_pretraining(meta: dict, arrays: dict[str, np.ndarray], *_: object) -> None:
    legacy = "loss_current_permuted" in arrays
    config = pretrain_config(meta["build"], "2022" if legacy else "2023")
    model = build(config, meta["weight_seed"])
    check_state(model, meta["build"]["layer_norm_eps"], meta)
    images = torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))
    mask, noise = check_mask(config, meta, arrays)
    plan = plan_of(config, mask, noise)
    if not legacy:
        check_windows(config, plan, meta)
    for stage, places in enumerate(coordinates(config, plan)):
        if f"coords{stage}" in arrays:
            same(places, arrays.pop(f"coords{stage}"))
    for key in [key for key in arrays if key.startswith("relative_position_index/")]:
        window = int(key.split("/")[1])
        rows, columns = np.divmod(np.arange(window**2), window)
        assert window in [config.window(stage)[0] for stage in range(len(config.depths))]
        full = grouping.window_ids(rows, columns, window, 0)
        full = grouping.plan_groups(rows, columns, full, window, grouping.cheapest_groups)
        same(full.index[0], arrays.pop(key))

    prediction = check_prediction(model, images, plan, meta, arrays)
    if legacy:
        check_later_code_on_first_release(model, images, mask, noise, arrays)
    else:
        corrected = GreenMIM(replace(config, release="corrected"))
        corrected.load_state_dict(model.state_dict())
        with torch.no_grad():
            near(corrected(images, mask)[0], arrays.pop("loss_raster"), rtol=LOSS)
            raster = corrected.predict(images, mask).double().norm(dim=-1)
            near(raster, arrays.pop("pred_raster_norm"), rtol=RELATIVE)

    loss, hidden = model(images, plan)
    for key in {"loss", "loss64"} & arrays.keys():
        near(loss, arrays.pop(key), rtol=LOSS, message=key)
    near(hidden, prediction[:, mask].numpy(), atol=PREDICTION)
    loss.backward()
    check_gradients(model, meta, arrays)
    groups = greenmim.parameter_groups(model, 0.05)
    for group in groups:
        key = "decay" if group["weight_decay"] else "no_decay"
        if meta.get(key):
            assert names_in(model, group) == sorted(meta[key], key=meta["grad_keys"].index)
    if "param_after_step" in arrays:
        check_step(model, groups, (0.9, 0.95), meta, arrays)


def swap_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merging weights of the first release for today's order, and back."""
    return {
        k: torch.cat([v.chunk(4, -1)[i] for i in (0, 2, 1, 3)], -1) if ".downsample." in k else v
        for k, v in state.items()
    }


def check_later_code_on_first_release(
    model: GreenMIM, images: Tensor, mask: np.ndarray, noise: np.ndarray, arrays: dict
) -> None:
    config = replace(model.config, release="2023")
    today, first = plan_of(config, mask, noise), plan_of(model.config, mask, noise)
    later = GreenMIM(config)
    with torch.no_grad():
        later.load_state_dict(model.state_dict())
        near(later(images, today)[0], arrays.pop("loss_current_same_weights"), rtol=LOSS)
        later.load_state_dict(swap_blocks(model.state_dict()))
        near(later(images, today)[0], arrays.pop("loss_current_permuted"), rtol=LOSS)
        mixed = replace(first, merges=today.merges)
        stored = arrays.pop("loss_current_permuted_legacy_coords")
        near(later(images, mixed)[0], stored, rtol=LOSS)


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
            state[key] = position_index(model.config.window(i)[0])
    args = argparse.Namespace(model="green_mim_swin_base_patch4_dec512b1", epochs=800)
    torch.save({"model": state, "optimizer": {}, "epoch": 0, "scaler": {}, "args": args}, path)
    return state


def transferred(model: SwinClassifier, meta: dict, path: Path) -> None:
    """Load a pre-training file of the stored build into `model`, and fill its head."""
    source = build(pretrain_config(meta["pretrain_build"], "2023"), meta["weight_seed"])
    saved = released_file(source, path)
    used = {f"encoder.{k}" for k in greenmim.swin_names(saved)}
    assert saved.keys() - used == set(meta["pretrain_keys_not_used"])
    said = greenmim.load_encoder(model, str(path))
    parameters = dict(model.named_parameters())
    tables = {k for k, p in parameters.items()
              if f"encoder.{k}" in used and p.shape != saved[f"encoder.{k}"].shape}  # fmt: skip
    assert tables == set(meta["interpolated"]) and not meta["unexpected_keys"]
    assert f"{len(tables)} relative position tables interpolated" in said and "head" in said
    official = greenmim.export_state(model, "official").keys()
    fresh = {k for k in official if k.endswith(greenmim.INDEX_BUFFERS) or k.startswith("head.")}
    assert fresh == set(meta["missing_keys"])
    with torch.no_grad():
        for name in ("head.weight", "head.bias"):
            p = parameters[name]
            p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), meta["weight_seed"])))


def check_finetuning(meta: dict, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    b = meta["build"]
    config = ModelConfig(
        b["img_size"], b["patch_size"], b["embed_dim"], tuple(b["depths"]),
        tuple(b["num_heads"]), b["window_size"], b["mlp_ratio"],
    )  # fmt: skip
    model = SwinClassifier(config, b["num_classes"], b["drop_path_rate"]).eval()
    check_state(model, meta["layer_norm_eps"], meta)
    if "pretrain_build" in meta:
        transferred(model, meta, tmp_path / "checkpoint-799.pth")
    else:
        fill(model, meta["weight_seed"])

    classes, smoothing = b["num_classes"], 0.1
    a, c = (torch.tensor(meta[f"labels_{key}"]) for key in "ab")
    target = meta["lam"] * augment.smooth_one_hot(a, classes, smoothing)
    target = target + (1 - meta["lam"]) * augment.smooth_one_hot(c, classes, smoothing)
    stored = arrays.pop("target")
    near(target[:, : stored.shape[1]], stored, atol=1e-6)

    images = torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["image_seed"]))
    sites = {"patch_embed": (model.patch_embed, "out"), "norm": (model.norm, "out")}
    sites |= stage_sites(model) | {"pooled": (model.head, "in")}
    with watched(sites) as found:
        logits = model(images)
    check_features(found, arrays)
    near(logits, arrays.pop("logits"), atol=PREDICTION)
    loss = F.cross_entropy(logits, target)
    for key in ("loss", "loss64"):
        near(loss, arrays.pop(key), rtol=LOSS, message=key)
    loss.backward()
    check_gradients(model, meta, arrays)

    groups = greenmim.parameter_groups(model, 0.05, config.depths, meta["layer_decay"])
    ours = {
        name: [1e-3 * group["lr_scale"], group["weight_decay"]]
        for group in groups
        for name in names_in(model, group)
    }
    assert ours.keys() == meta["step_groups"].keys()
    for name, group in meta["step_groups"].items():
        assert ours[name] == pytest.approx(group, rel=1e-12), name
    check_step(model, groups, (0.9, 0.999), meta, arrays)


# ── golden files: tables and recipes ────────────────────────────────────────────────────


def check_interpolation(meta: dict, arrays: dict[str, np.ndarray], *_: object) -> None:
    key = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    for case in meta["cases"]:
        rows, target = ((2 * case[f"{k}_window"] - 1) ** 2 for k in ("source", "target"))
        table = torch.from_numpy(parameter(key, (rows, case["heads"]), case["seed"]))
        ours = greenmim.resize_bias_table(table, target)
        near(ours, arrays.pop(f"out{case['index']}"), atol=1e-6, message=str(case))


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without storage: names, shapes and counts only."""
    with torch.device("meta"):
        return make()


def model_named(text: str) -> ModelConfig:
    """ "base_win7", "swin_large win14": the recipes name models by size and window."""
    size, window = re.search(r"(base|large)[ _]win(\d+)", text).groups()
    return greenmim.MODELS[f"swin_{size[0]}" + (f"_win{window}" if window != "7" else "")]


def check_recipe(meta: dict, arrays: dict[str, np.ndarray], *_: object) -> None:
    for schedule in meta["pretrain_schedules"]:
        k, peak = schedule["index"], schedule["peak_lr"]
        assert peak == pytest.approx(schedule["base_lr"] * schedule["total_batch"] / 256)
        shape = peak, schedule["min_lr"], schedule["warmup_epochs"], schedule["epochs"]
        rates = [greenmim.pretrain_lr(e, *shape) for e in arrays.pop(f"pretrain{k}_epoch")]
        near(rates, arrays.pop(f"pretrain{k}_lr"), rtol=1e-9, atol=1e-18)
    for name, stored in meta["pretrain_weight_decay"].items():
        if name.startswith("twins"):  # that backbone is not implemented
            continue
        model = on_meta(lambda name=name: GreenMIM(model_named(name)))
        sizes = {"decay": 0, "no_decay": 0}
        for group in greenmim.parameter_groups(model, 0.05):
            key = "decay" if group["weight_decay"] else "no_decay"
            assert group["weight_decay"] in (0.05, 0) and group["lr_scale"] == 1
            sizes[key] += sum(p.numel() for p in group["params"])
            if key in stored:
                assert set(names_in(model, group)) == set(stored[key])
        assert sizes == {key: stored[f"{key}_numel"] for key in sizes}
        frozen = model.state_dict().keys() - dict(model.named_parameters()).keys()
        assert frozen == set(stored.get("frozen", frozen))
    for stored in meta["finetune"]:
        check_finetune_schedule(stored, arrays)
    for name, layers in meta["finetune_layer_map"].items():
        check_layer_map(model_named(name), meta["finetune"], layers)
    check_key_map(meta)
    check_optimizers(meta)


def check_finetune_schedule(stored: dict, arrays: dict[str, np.ndarray]) -> None:
    k, train, swin = stored["index"], stored["config"]["TRAIN"], stored["config"]["MODEL"]
    per, iterations = stored["total_batch"] / 512, stored["iterations_per_epoch"]
    lr, warmup_lr, min_lr = (float(train[key]) * per for key in ("BASE_LR", "WARMUP_LR", "MIN_LR"))
    scaled = [stored[f"{key}_lr_scaled"] for key in ("base", "warmup", "min")]
    assert [lr, warmup_lr, min_lr] == pytest.approx(scaled, rel=1e-12)
    warmup, total = (train[key] * iterations for key in ("WARMUP_EPOCHS", "EPOCHS"))
    depths = tuple(swin["SWIN"]["DEPTHS"])
    last, decay = sum(depths) + 1, stored["layer_decay"]
    assert decay == train["LAYER_DECAY"]

    def rates(update: int) -> list[float]:
        scales = [decay ** (last - i) for i in range(last + 1)]
        shape = warmup_lr, min_lr, warmup, total
        return [greenmim.finetune_lr(update, lr * scale, *shape) for scale in scales]

    # The stored number counts updates done, ours the update to come.
    ours = [rates(update + 1) for update in arrays.pop(f"finetune{k}_update").tolist()]
    near(ours, arrays.pop(f"finetune{k}_lr"), rtol=1e-9, atol=1e-18)
    assert rates(0) == pytest.approx(stored["lr_before_first_update"] * (last + 1), rel=1e-12)
    config = replace(TEST, input_size=224, depths=depths, num_heads=(1,) * len(depths))
    model = on_meta(lambda: SwinClassifier(config, 10, swin["DROP_PATH_RATE"]))
    blocks = [block.drop_path for layer in model.layers for block in layer.blocks]
    near(blocks, arrays.pop(f"finetune{k}_drop_path"), atol=1e-7)


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


def check_key_map(meta: dict) -> None:
    """Every key of a pre-training file, and where fine-tuning puts it."""
    keys, (name, *_) = list(meta["key_map"]), meta["finetune_layer_map"]
    marked = greenmim.swin_names({key: torch.tensor(i) for i, key in enumerate(keys)})
    taken = {keys[int(marker)]: key for key, marker in marked.items()}
    assert {key: taken.get(key) for key in keys} == meta["key_map"]
    with torch.device("meta"):
        model = SwinClassifier(model_named(name), 1000)
    official = greenmim.export_state(model.to_empty(device="cpu"), "official").keys()
    fresh = {k for k in official - marked.keys() if not k.endswith("relative_position_index")}
    assert fresh == set(meta["fresh_keys"])


class Built(Exception):
    """Carries the optimizer out of a training command before its first step."""


def optimizer_of(command: str) -> torch.optim.Optimizer:
    """The optimizer of a dry run."""
    real = torch.optim.AdamW

    def stop(*args: object, **options: object) -> None:
        raise Built(real(*args, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", stop)
        with pytest.raises(Built) as built:
            greenmim.main([command, "--model", "swin_test", "--device", "cpu"])
    return built.value.args[0]


def check_optimizers(meta: dict) -> None:
    for command in ("pretrain", "finetune"):
        stored = dict(meta[f"{command}_optimizer"])
        optimizer = optimizer_of(command)
        assert stored.pop("name") == type(optimizer).__name__
        decays = {group["weight_decay"] for group in optimizer.param_groups}
        assert decays == {0, stored.pop("weight_decay")}
        config = {"pretrain": greenmim.PretrainConfig, "finetune": greenmim.FinetuneConfig}
        assert config[command]().clip_grad == stored.pop("clip_grad", None)
        ours = {key: optimizer.defaults[key] for key in stored}
        assert ours == stored | {"betas": tuple(stored["betas"])}


# ── golden files: one test each ─────────────────────────────────────────────────────────


def unknown(meta: dict, *_: object) -> None:
    pytest.fail(f"no check for a fixture with the keys {sorted(meta)}")


def kind_of(meta: dict) -> tuple[Callable, list]:
    """The check for a file, and marks, by what `meta` describes."""
    b = meta.get("build", {})
    encoder, marks = b.get("encoder", b), []
    if encoder.get("img_size", 0) >= 224 and encoder.get("embed_dim", 0) >= 96:
        marks.append(pytest.mark.slow)
    if b.get("kind") == "twins":
        marks.append(pytest.mark.skip(reason="the Twins backbone is not implemented"))
    elif b.get("kind") == "swin" and "mask_ratio" in meta:
        return check_pretraining, marks
    elif "num_classes" in b:
        return check_finetuning, marks
    elif "pretrain_schedules" in meta:
        return check_recipe, marks
    elif "source_window" in meta.get("cases", [{}])[0]:
        return check_interpolation, marks
    elif "capacity_limit" in meta.get("cases", [{}])[0]:
        marks.append(pytest.mark.skip(reason="window counts: see tests/test_grouping.py"))
    return unknown, marks


def golden_cases() -> list:
    params = []
    for path in golden_files("greenmim"):
        with np.load(path) as arrays:
            check, marks = kind_of(json.loads(str(arrays["meta"])))
        params.append(pytest.param(path, check, marks=marks, id=path.stem))
    return params


@pytest.mark.parametrize(("path", "check"), golden_cases())
def test_golden_greenmim(path: Path, check: Callable, tmp_path: Path) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    check(json.loads(str(arrays.pop("meta"))), arrays, tmp_path)
    assert not arrays, f"nothing compares {sorted(arrays)}"


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
    flags = ["--model", "swin_test", "--device", "cpu", f"--mask_ratio={ratio}"]
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
            outputs.append((model.encoder(other, plan), model.predict(other, plan)))
    (latent, prediction), hidden, visible = outputs
    assert torch.equal(hidden[0], latent) and torch.equal(hidden[1], prediction)
    assert not torch.equal(visible[0], latent) and not torch.equal(visible[1], prediction)


def swin_attention(x: Tensor, get: Callable[[str], Tensor], heads: int, window: int,
                   shift: int) -> Tensor:  # fmt: skip
    """Shifted-window attention of Swin over a map (B, side, side, C): roll, cut, mask."""
    batch, side, _, dim = x.shape
    n, w, d = side // window, window, dim // heads

    def cut(maps: Tensor) -> Tensor:
        maps = maps.roll((-shift, -shift), (1, 2)).reshape(len(maps), n, w, n, w, -1)
        return maps.transpose(2, 3).reshape(len(maps), n * n, w * w, -1)

    # Before the roll, tokens are told apart by whether they come round from the other edge.
    edge = (torch.arange(side) < shift).long()
    region = cut((2 * edge[:, None] + edge)[None, :, :, None])[0, ..., 0]
    qkv = F.linear(cut(x), get("attn.qkv.weight"), get("attn.qkv.bias"))
    qkv = qkv.reshape(batch, n * n, w * w, 3, heads, d).permute(3, 0, 1, 4, 2, 5)
    table = get("attn.relative_position_bias_table")
    logits = qkv[0] @ qkv[1].transpose(-2, -1) * d**-0.5
    logits = logits + table[position_index(w)].permute(2, 0, 1)
    apart = region[:, :, None] != region[:, None]
    logits = logits.masked_fill(apart[None, :, None], -100.0)
    x = (logits.softmax(-1) @ qkv[2]).transpose(2, 3).reshape(batch, n, n, w, w, dim)
    x = x.transpose(2, 3).reshape(batch, side, side, dim).roll((shift, shift), (1, 2))
    return F.linear(x, get("attn.proj.weight"), get("attn.proj.bias"))


def dense_swin(encoder: SwinEncoder, eps: float, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, N, C): Swin V1 over whole maps, written from its definition, float64."""
    config = encoder.config
    state = {k: v.double() for k, v in encoder.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(images.double(), weight, bias, stride=config.patch_size).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for i, depth in enumerate(config.depths):
        side, window = x.shape[1], min(config.window_size, x.shape[1])
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            shift = window // 2 if j % 2 and side > window else 0
            get = lambda key, name=name: state[f"{name}.{key}"]  # noqa: E731
            y = norm(x, f"{name}.norm1")
            x = x + swin_attention(y, get, config.num_heads[i], window, shift)
            y = F.linear(norm(x, f"{name}.norm2"), get("mlp.fc1.weight"), get("mlp.fc1.bias"))
            x = x + F.linear(F.gelu(y), get("mlp.fc2.weight"), get("mlp.fc2.bias"))
        if i < len(config.depths) - 1:
            x = [x[:, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = norm(torch.cat(x, -1), f"layers.{i}.downsample.norm")
            x = F.linear(x, state[f"layers.{i}.downsample.reduction.weight"])
    return norm(x, "norm").flatten(1, 2)


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
        window, shift = TEST.window(stage)
        for plan, s in zip(made.windows[stage], (0, shift), strict=False):
            ids = grouping.window_ids(*places.T, window, s)
            counts = np.unique(ids, return_counts=True)[1].tolist()
            assert len(plan.bias) == len(sizing(counts, window**2))
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
        together = model.predict(images, mask)
        alone = torch.cat([model.predict(image[None], mask) for image in images])
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
        prediction = model.predict(images, mask).numpy().astype(np.float64)
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
    config = greenmim.model_config(name)
    model = on_meta(lambda: GreenMIM(config))
    classifier = on_meta(lambda: SwinClassifier(config, 1000))
    ours = count(model.encoder), count(model), count(classifier)
    for found, published in zip(ours, PARAMETERS.get(name, ours), strict=True):
        assert published is None or found == published
    head = 1000 * (model.encoder.num_features + 1)
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
    config = greenmim.model_config("swin_test", input_size=size, window_size=window)
    model = build(config)
    loss, prediction = model(pictures(config, 1), some_mask(config, 0.5))
    loss.backward()
    assert prediction.shape == (1, math.ceil(config.units**2 / 2), 3 * config.mask_unit**2)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert build(config).encoder(pictures(config, 1)).shape == (1, config.units**2, 64)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64"):
        SwinEncoder(TEST)(torch.zeros(1, 3, 80, 80))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("swin_test", {"input_size": 72}, r"\b64\b.*\b80\b"),
        ("swin_test", {"input_size": 16}, r"\b32\b"),
        ("swin_b", {"input_size": 100}, r"\b96\b.*\b128\b"),
        ("swin_test", {"window_size": 0}, "window"),
        ("swin_test", {"window_size": 17}, r"window.*\b16\b"),
        ("swin_test", {"release": "2024"}, "corrected.*2023.*2022"),
        ("swin_test", {"release": ""}, "release"),
        ("swin_bb", {}, r"swin_bb.*\bswin_b\b"),
        ("swin_base_patch4_window7_256", {}, "swin_base_patch4_window7_224"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        greenmim.model_config(name, **changes)
    assert "\n" not in str(refused.value)


def test_other_names_are_the_same_networks() -> None:
    assert greenmim.model_config("swin_base_patch4_window7_224") == greenmim.MODELS["swin_b"]
    for other, ours in greenmim.OTHER_NAMES.items():
        assert greenmim.model_config(other) == greenmim.model_config(ours)


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
        "norm_pix_loss": True, "batch_size": 2048 // 8, "clip_grad": None,
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
    wanted = manifest["shapes"]
    if not with_head:
        wanted = {k: v for k, v in wanted.items() if not k.startswith("head.")}
    assert {k: list(v.shape) for k, v in state.items()} == wanted
    types = {k: str(v.dtype).removeprefix("torch.") for k, v in state.items()}
    assert {k: t for k, t in types.items() if t != "float32"} == manifest["dtypes"]
    assert not state.keys() & set(manifest["non_persistent_buffers"])
    assert {k for k in state if k.endswith(greenmim.INDEX_BUFFERS)} == set(manifest["buffers"])
    if with_head:
        assert count(model) == manifest["parameters"]


@pytest.mark.parametrize("config", [DENSE["96_px_window_6"], DENSE["window_4"]])
def test_official_buffers_are_swins(config: ModelConfig) -> None:
    state = greenmim.export_state(SwinEncoder(config), "official")
    for i, depth in enumerate(config.depths):
        side = config.input_size // config.patch_size // 2**i
        window = min(config.window_size, side)
        shift = window // 2 if side > window else 0
        # Nine regions of the rolled map: what the roll brought together stays apart.
        edge = torch.bucketize(torch.arange(side), torch.tensor([side - window, side - shift]),
                               right=True)  # fmt: skip
        region = (3 * edge[:, None] + edge).reshape(side // window, window, side // window, window)
        region = region.transpose(1, 2).reshape(-1, window**2)
        mask = torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)
        for j in range(depth):
            prefix = f"layers.{i}.blocks.{j}"
            index = state[f"{prefix}.attn.relative_position_index"]
            assert torch.equal(index, position_index(window))
            assert (f"{prefix}.attn_mask" in state) == bool(shift and j % 2)
            if shift and j % 2:
                assert torch.equal(state[f"{prefix}.attn_mask"], mask)


def test_export_knows_two_namings() -> None:
    with pytest.raises(InputError, match="timm, official"):
        greenmim.export_state(SwinEncoder(TEST), "keras")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("naming", ["official", "timm"])
@pytest.mark.parametrize("with_head", [True, False])
def test_exports_come_back(with_head: bool, naming: str, wrapped: bool, tmp_path: Path) -> None:
    config = replace(TEST, window_size=4)
    made = [SwinClassifier(config, 5) if with_head else SwinEncoder(config) for _ in range(2)]
    source, target = fill(made[0], 1), made[1]
    state = greenmim.export_state(source, naming)
    path = str(tmp_path / "weights.pth")
    torch.save({"model": state} if wrapped else state, path)
    assert "head" not in greenmim.load_encoder(target, path)
    assert torch.equal(answers(target), answers(source))
    # For a classifier of other classes only the head stays as it was.
    classifier = SwinClassifier(config, 7)
    head = classifier.head.weight.clone()
    assert "head starts fresh" in greenmim.load_encoder(classifier, path)
    assert torch.equal(classifier.head.weight, head)
    assert torch.equal(classifier.norm.weight, source.norm.weight)
    # For an encoder the head is left out.
    encoder = SwinEncoder(config)
    greenmim.load_encoder(encoder, path)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in encoder.state_dict().items())


def test_released_file_loads_whole_and_as_encoder(tmp_path: Path) -> None:
    source, path = build(replace(TEST, window_size=4)), str(tmp_path / "checkpoint-799.pth")
    released_file(source, Path(path))
    file = greenmim.read_checkpoint(path)
    assert file["args"]["epochs"] == 800 and file["epoch"] == 0
    model, encoder = GreenMIM(source.config), SwinEncoder(source.config)
    greenmim.load_model(model, path)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    greenmim.load_encoder(encoder, path)
    assert torch.equal(answers(encoder), answers(source.encoder))


@pytest.mark.parametrize("config", [None, "swin_base.yaml"])
def test_arguments_of_other_projects_do_not_matter(config: object, tmp_path: Path) -> None:
    source, target = fill(SwinEncoder(TEST), 1), SwinEncoder(TEST)
    args = argparse.Namespace(config=config, model="swin", epochs=300)
    torch.save({"model": source.state_dict(), "args": args}, tmp_path / "swin.pth")
    greenmim.load_encoder(target, str(tmp_path / "swin.pth"))
    assert torch.equal(answers(target), answers(source))


def test_wrapper_prefix_of_parallel_training_is_cut(tmp_path: Path) -> None:
    source = build(TEST)
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "parallel.pth")
    model = GreenMIM(TEST)
    greenmim.load_model(model, str(tmp_path / "parallel.pth"))
    assert torch.equal(model.mask_token, source.mask_token)


def test_first_release_is_loaded_for_todays_merging(tmp_path: Path) -> None:
    old = build(replace(TEST, release="2022"))
    path = str(tmp_path / "published.pth")
    torch.save({"model": old.state_dict()}, path)
    encoder = SwinEncoder(TEST)
    greenmim.load_encoder(encoder, path, "2022")
    wanted = swap_blocks(old.encoder.state_dict())
    assert all(torch.equal(v, wanted[k]) for k, v in encoder.state_dict().items())
    exported = greenmim.export_state(old.encoder, "timm")
    torch.save(exported, path)
    again = SwinEncoder(TEST)
    greenmim.load_encoder(again, path)
    assert all(torch.equal(v, wanted[k]) for k, v in again.state_dict().items())
    # Of the first release's two faults only the merging order belongs to the weights: where its
    # false coordinates do not matter, in windows as large as the map, the function is the same.
    wide = replace(TEST, window_size=16, release="2022")
    old, encoder = build(wide), SwinEncoder(replace(wide, release="corrected"))
    torch.save({"model": old.state_dict()}, path)
    greenmim.load_encoder(encoder, path, "2022")
    plan = plan_of(wide, np.zeros(wide.units**2, bool))
    plan = replace(plan, windows=plan_of(encoder.config, np.zeros(wide.units**2, bool)).windows)
    with torch.no_grad():
        images = pictures(wide)
        near(old.encoder(images, plan), encoder(images).numpy(), atol=1e-5)


def test_simmim_file_loads_for_fine_tuning(tmp_path: Path) -> None:
    source = fill(SwinEncoder(replace(TEST, window_size=4)), 3)
    state = {f"encoder.{k}": v for k, v in greenmim.export_state(source, "official").items()}
    state |= {"encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.bias": torch.zeros(768),
              "decoder.0.weight": torch.zeros(768, 64, 1, 1)}  # fmt: skip
    torch.save({"model": state, "optimizer": {}, "epoch": 799}, tmp_path / "simmim.pth")
    model = SwinClassifier(source.config, 5)
    greenmim.load_encoder(model, str(tmp_path / "simmim.pth"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in source.state_dict().items())


def test_swin_classification_file_keeps_its_head_where_it_fits(tmp_path: Path) -> None:
    source = fill(SwinClassifier(replace(TEST, window_size=4), 5), 3)
    state = greenmim.export_state(source, "official")
    torch.save({"model": state, "max_accuracy": 83.5}, tmp_path / "swin.pth")
    model = SwinClassifier(source.config, 5)
    greenmim.load_encoder(model, str(tmp_path / "swin.pth"))
    assert torch.equal(answers(model), answers(source))


def test_tables_of_another_window_are_interpolated(tmp_path: Path) -> None:
    source = fill(SwinEncoder(replace(TEST, window_size=4)), 3)
    torch.save({"model": source.state_dict()}, tmp_path / "window4.pth")
    model, tables = SwinEncoder(replace(TEST, window_size=5)), 0
    said = greenmim.load_encoder(model, str(tmp_path / "window4.pth"))
    for name, p in model.named_parameters():
        old = source.state_dict()[name]
        if p.shape != old.shape:
            near(p, greenmim.resize_bias_table(old, len(p)).numpy(), atol=1e-7)
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
    near(greenmim.resize_bias_table(table.flip(0), rows), ours.flip(0).numpy(), atol=1e-5)
    near(ours[rows // 2], table[side**2 // 2].numpy(), atol=1e-5)


class RunsCode:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>too many requests</html>"),
    "truncated": lambda path: (
        torch.save({"model": build(TEST).state_dict()}, path),
        path.write_bytes(path.read_bytes()[:-2000]),
    ),
    "a_list": lambda path: torch.save([1, 2], path),
    "a_number": lambda path: torch.save({"model": {"a": 1}}, path),
    "code": lambda path: torch.save({"model": {"a": RunsCode(path.with_name("ran"))}}, path),
    "code_beside_weights": lambda path: torch.save(
        {"model": build(TEST).state_dict(), "args": RunsCode(path.with_name("ran"))}, path
    ),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_without_weights_is_refused_in_one_sentence(
    spoil: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "weights.pth"
    spoil(path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        greenmim.read_checkpoint(path)
    capsys.readouterr()
    assert greenmim.main(["export", "--weights", str(path), "--model", "swin_test"]) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and not said.out
    assert not (tmp_path / "ran").exists()


def test_refused_code_is_named(tmp_path: Path) -> None:
    BROKEN["code"](tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"refused.*mkdir"):
        greenmim.read_checkpoint(tmp_path / "weights.pth")


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
    model = GreenMIM(TEST)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for load, target in ((greenmim.load_model, model), (greenmim.load_encoder, model.encoder)):
        with pytest.raises(InputError, match=said) as refused:
            load(target, path)
        assert "\n" not in str(refused.value) and path in str(refused.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_backbone_is_no_whole_model(tmp_path: Path) -> None:
    path = str(tmp_path / "backbone.pth")
    state = greenmim.export_state(SwinEncoder(replace(TEST, window_size=4)), "official")
    torch.save({"model": state}, path)
    with pytest.raises(InputError, match="has no decoder"):
        greenmim.load_model(GreenMIM(replace(TEST, window_size=4)), path)


def test_safetensors_is_asked_for_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "weights.safetensors"
    with pytest.raises(InputError, match="pip install safetensors"):
        greenmim.save_state(SwinEncoder(TEST).state_dict(), path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"{}")
    with pytest.raises(InputError, match="pip install safetensors"):
        greenmim.read_checkpoint(path)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    source, target = fill(SwinEncoder(TEST), 1), SwinEncoder(TEST)
    path = tmp_path / "weights.safetensors"
    greenmim.save_state(greenmim.export_state(source, "timm"), path)
    greenmim.load_encoder(target, str(path))
    assert torch.equal(answers(target), answers(source))


def test_saving_replaces_a_file_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    greenmim.save_state({"model": {"a": torch.ones(3)}}, path)

    def fails(content: object, file: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(InputError, match="No space left"):
        greenmim.save_state({"model": {"a": torch.zeros(3)}}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]
    assert greenmim.read_checkpoint(path)["model"]["a"].tolist() == [1, 1, 1]


# ── published files, with --checkpoints DIR ─────────────────────────────────────────────


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "published" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--checkpoints")
        skip = pytest.mark.skip(reason="no --checkpoints DIR with published files")
        params = [pytest.param(None, marks=skip, id="none")]
        if folder is not None:
            params = [pytest.param(p, id=p.stem) for p in sorted(folder.glob("*.pth"))]
            assert params, f"no .pth file in {folder}"
        metafunc.parametrize("published", params)


def published_config(state: dict[str, Tensor]) -> ModelConfig:
    """The one of MODELS that the shapes of an encoder belong to."""
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    blocks = {key.split(".attn.")[0] for key in state if ".attn.qkv.weight" in key}
    for config in greenmim.MODELS.values():
        shape = (2 * config.window_size - 1) ** 2, config.num_heads[0]
        if (state[table].shape, len(state["patch_embed.norm.bias"]), len(blocks)) == (
            shape, config.embed_dim, sum(config.depths)
        ):  # fmt: skip
            return config
    raise AssertionError(f"a table of {tuple(state[table].shape)} belongs to no model")


def test_published_file_loads_strictly(published: Path) -> None:
    """Files of pre-training must also beat a grey guess on photographs beside them, if any."""
    state = greenmim.read_checkpoint(published)["model"]
    names = greenmim.swin_names(state)
    config, head = published_config(names), names.get("head.weight")
    if "mask_token" not in state:
        model = SwinEncoder(config) if head is None else SwinClassifier(config, len(head))
        greenmim.load_encoder(model, str(published))
        return
    greenmim.load_encoder(SwinClassifier(config, 1000), str(published), "2022")
    losses = []
    for release in ("2022", "2023", "corrected"):
        model = GreenMIM(replace(config, release=release))
        greenmim.load_model(model, str(published))
        if photographs := [p for p in published.parent.iterdir() if p.suffix in data.SUFFIXES]:
            source, crop = data.ImageFiles(photographs), data.EvalCrop(config.input_size)
            pixels, _, _ = next(data.eval_batches(source, crop, batch_size=8))
            with torch.no_grad():
                mask = some_mask(config, 0.75)
                losses.append(model.eval()(data.normalize(pixels), mask)[0].item())
    # The mean colour of each patch scores 1 where patches are normalised.
    assert not losses or min(losses) < 0.9, losses
