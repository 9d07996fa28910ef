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
from dataclasses import replace
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
from tests.conftest import GOLDEN, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.test_grouping import SIZINGS

TEST = greenmim.MODELS["swin_test"]
CPU = torch.device("cpu")


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
        state, stored = greenmim.export_state(model.encoder, "official"), arrays.pop(key)
        indices = [v for k, v in state.items() if k.endswith("relative_position_index")]
        ours = [index for index in indices if index.shape == stored.shape]
        assert ours
        for index in ours:
            same(index, stored)

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
    """Merging weights of the first release for today's order and back: channel blocks 0, 2, 1, 3."""
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


def released_file(model: GreenMIM, path: Path) -> dict[str, Tensor]:
    """Save the layout of a published file: index buffers, training state, a Namespace."""
    state = dict(model.state_dict())
    official = greenmim.export_state(model.encoder, "official")
    state |= {f"encoder.{k}": v for k, v in official.items() if k.endswith("position_index")}
    args = argparse.Namespace(model="green_mim_swin_base_patch4_dec512b1", epochs=800)
    torch.save({"model": state, "optimizer": {}, "epoch": 0, "scaler": {}, "args": args}, path)
    return state


def transferred(model: SwinClassifier, meta: dict, path: Path, capsys: pytest.CaptureFixture) -> None:
    """Load a pre-training file of the stored build into `model`, and fill its head."""
    source = build(pretrain_config(meta["pretrain_build"], "2023"), meta["weight_seed"])
    saved = released_file(source, path)
    used = {f"encoder.{k}" for k in greenmim.swin_names(saved)}
    assert saved.keys() - used == set(meta["pretrain_keys_not_used"])
    capsys.readouterr()
    greenmim.load_encoder(model, str(path))
    said = capsys.readouterr().out
    assert set(re.findall(r"layers\.\S*bias_table", said)) == set(meta["interpolated"])
    assert "head" in said and not meta["unexpected_keys"]
    official = greenmim.export_state(model, "official").keys()
    fresh = {k for k in official if k.endswith(greenmim.INDEX_BUFFERS) or k.startswith("head.")}
    assert fresh == set(meta["missing_keys"])
    head = {"head." + n: p for n, p in model.head.named_parameters()}
    with torch.no_grad():
        for name, p in head.items():
            p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), meta["weight_seed"])))


def check_finetuning(
    meta: dict, arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    b = meta["build"]
    config = ModelConfig(
        b["img_size"], b["patch_size"], b["embed_dim"], tuple(b["depths"]),
        tuple(b["num_heads"]), b["window_size"], b["mlp_ratio"],
    )  # fmt: skip
    model = SwinClassifier(config, b["num_classes"], b["drop_path_rate"]).eval()
    check_state(model, meta["layer_norm_eps"], meta)
    if "pretrain_build" in meta:
        transferred(model, meta, tmp_path / "checkpoint-799.pth", capsys)
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


def check_finetune_schedule(stored: dict, arrays: dict[str, np.ndarray]) -> None:
    k, train, swin = stored["index"], stored["config"]["TRAIN"], stored["config"]["MODEL"]
    per, iterations, depths = stored["total_batch"] / 512, stored["iterations_per_epoch"], None
    lr, warmup_lr, min_lr = (
        float(train[key]) * per for key in ("BASE_LR", "WARMUP_LR", "MIN_LR")
    )
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
def test_golden_greenmim(
    path: Path, check: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    check(json.loads(str(arrays.pop("meta"))), arrays, tmp_path, capsys)
    assert not arrays, f"nothing compares {sorted(arrays)}"
