"""MAE-Lite, D-MAE, D2-MAE and Hiera against the released code's answers, and against what they are
by definition."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import distill_lite
from common import augment, data
from common.data import InputError
from distill_lite import DistilledMAE, MaskedDecoder, ModelConfig, ShufflePlan
from tests.conftest import ROOT, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    key_third,
    near,
    on_meta,
    same,
    take_step,
    trained,
)
from tests.scripts import equal

MODELS = distill_lite.MODELS
TEST, HIERA = MODELS["test"], MODELS["test_hiera"]
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("threads")


def fill(model: nn.Module, seed: int, prefix: str = "") -> nn.Module:
    """The model with every trainable parameter from the filling rule; tables that do not learn
    are buffers here."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(parameter(prefix + name, tuple(p.shape), seed)))
    return model


# ── golden files: what is compared ──────────────────────────────────────────────────────

LOSS, OUTPUT, GRADIENT, STEP = 1e-6, 1e-5, 1e-5, 1e-4  # spec, section 13
NAMES = {
    "img_size": "input_size", "depth": "depths", "stages": "depths",
    "decoder_embed_dim": "decoder_dim", "use_mean_pooling": "global_pool",
    "distilled": "two_heads", "use_abs_pos_emb": "abs_pos", "init_values": "layer_scale",
}  # fmt: skip
DISTILLATION = {
    "distill_attn_idx": "attn_layers", "distill_attn_alpha": "attn_weight",
    "use_attn_adapter": "attn_adapter", "distill_hidden_idx": "hidden_layers",
    "distill_hidden_alpha": "hidden_weight", "use_hidden_adapter": "hidden_adapter",
    "tch_distill_attn_idx": "teacher_attn_layers", "decode_idx": "decode_depth",
}  # fmt: skip


def config_of(told: dict | str) -> ModelConfig:
    """Architecture from a released constructor: a name, or its arguments."""
    told = {"name": told} if isinstance(told, str) else dict(told)
    kind = "hiera" if "stages" in told else "vit"
    name = distill_lite.known_model(told.pop("name", f"{kind}_tiny").split()[0])
    found = {NAMES.get(k, k): v for k, v in told.items() if v is not None}
    for key in ("input_size", "depths"):
        if isinstance(size := found.get(key), list):
            found[key] = tuple(size) if key == "depths" else size[0]
    if isinstance(found.get("depths"), int):
        found["depths"] = (found["depths"],)
    own, shared = (found.pop(k, False) for k in ("use_rel_pos_bias", "use_shared_rel_pos_bias"))
    found["rpe"] = ("none", "block", "shared", "both")[own + 2 * shared]
    found["qkv_bias"] = "qv" if found.pop("qv_bias", False) else "qkv"
    known = {k: v for k, v in found.items() if k in ModelConfig.__dataclass_fields__}
    return replace(MODELS[name], **known)


def configs_of(meta: dict) -> tuple[ModelConfig, ModelConfig | None]:
    """Student and teacher of a fixture."""
    told, how = meta["constructor"], meta.get("distillation")
    if not how:
        return config_of(told), None
    student = config_of(told["student"])
    changes = {DISTILLATION[k]: tuple(v) if isinstance(v, list) else v for k, v in how.items()
               if k in DISTILLATION}  # fmt: skip
    changes["distill"] = "decoupled" if "decode_idx" in how else "attention"
    if "distill_std_attn_idx" in how:
        changes["teacher_attn_layers"] = changes["attn_layers"]
        changes["attn_layers"] = tuple(how["distill_std_attn_idx"])
        if isinstance(told["student"], dict):  # the block that is cut off counts in their depth
            changes["depths"] = (student.depths[0] - 1,)
    return distill_lite.model_config(student, **changes), config_of(told["teacher"])


def digest(x: Tensor) -> np.ndarray:
    x = x.detach().double().flatten()
    return torch.cat([torch.stack([x.norm(), x.mean(), x.std(correction=0)]), x[:64]]).numpy()


def bound(fixture: Fixture, name: str, rtol: float) -> float:
    """The spec's, of the largest value, or four times what float32 and float64 differed by."""
    spread = fixture.meta.get("float32_vs_float64", {}).get(name, {}).get("max_abs", 0.0)
    return max(rtol * np.abs(fixture.arrays[name]).max(initial=0.0), 4 * spread)


def compare(fixture: Fixture, name: str, ours: object, rtol: float = OUTPUT) -> None:
    """An array, or its digest, to `rtol` of its maximum."""
    if name not in fixture:
        return
    stored = fixture.arrays[name]
    if isinstance(ours, Tensor) and stored.ndim == 1 and stored.shape != ours.shape:
        ours, most = digest(ours), np.abs(stored[3:]).max()
        limits = rtol * np.concatenate([[stored[0], stored[2], stored[2]], 0 * stored[3:] + most])
        spread = fixture.meta.get("float32_vs_float64", {}).get(name, {}).get("max_abs", 0.0)
        limits = np.maximum(limits, 4 * spread * (np.arange(len(limits)) == 0))
        near(ours, fixture.take(name), atol=limits, message=name)
    else:
        atol = bound(fixture, name, rtol)
        near(ours, fixture.take(name), atol=atol, message=name)


def check_state(fixture: Fixture, model: nn.Module, teacher: nn.Module | None = None) -> None:
    """Names and shapes, index buffers as exported; of the teacher all that is used."""
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    if hasattr(model, "channels") and not isinstance(model, MaskedDecoder):
        exported = distill_lite.export_state(model).items()
        shapes |= {k: list(v.shape) for k, v in exported if k.endswith("position_index")}
    stored = dict(fixture.told("shapes", shapes))
    if teacher is not None:
        there = {f"tch_model.{k}": list(v.shape) for k, v in teacher.state_dict().items()}
        assert there.items() <= stored.items()
        unused = {k for k in stored if k.startswith("tch_model.")} - there.keys()
        assert {k.split(".")[1] for k in unused} <= {"encoder_norm", "multi_scale_fusion_heads"}
        stored = {k: v for k, v in stored.items() if not k.startswith("tch_model.")}
    assert shapes == stored
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def check_training(
    fixture: Fixture, model: nn.Module, groups: list[dict], betas: tuple[float, float],
    zero: Callable = key_third,
) -> None:  # fmt: skip
    """Gradients; decay and rate of every parameter; all norms after one step."""
    check_gradients(fixture, model, GRADIENT, zero)
    parameters = trained(fixture, model)
    by_id = {id(p): group for group in groups for p in group["params"]}
    ours = {k: (by_id[id(p)]["weight_decay"], by_id[id(p)]["lr_scale"])
            for k, p in parameters.items()}  # fmt: skip
    if told := fixture.told("optimizer"):
        stored = {name: (g["weight_decay"], g["lr_scale"])
                  for g in told.get("groups", []) for name in g["names"]}  # fmt: skip
        stored |= dict.fromkeys(told.get("no_decay", []), (0.0, 1.0))
        stored |= dict.fromkeys(told.get("decay", []), (told.get("weight_decay"), 1.0))
        assert ours.keys() == stored.keys()
        for key, value in ours.items():
            assert value == pytest.approx(stored[key], rel=1e-9), key
        assert tuple(told["betas"]) == betas
    if "param_after_step" in fixture:
        reach = take_step(model, groups, betas, zero=zero)
        check_after_step(fixture, "param_after_step", parameters, reach, STEP)


def shown(fixture: Fixture) -> Tensor:
    meta = fixture.meta
    return torch.from_numpy(filled_images(tuple(meta["image_shape"]), meta["seed"]))


# ── golden files: pre-training ──────────────────────────────────────────────────────────


def check_mask(fixture: Fixture, config: ModelConfig) -> ShufflePlan:
    """The plan by the noise, and all that is stored of masks."""
    meta = fixture.meta
    shape = (meta["image_shape"][0], config.units**2)
    noise = ((uniform("mask/noise", shape, meta["seed"]) + 1) / 2).astype(np.float32)
    if "noise" in fixture:
        same(noise, fixture.take("noise"))
    plan = distill_lite.plan_noise(config, noise, meta["mask_ratio"])
    mask = np.ones(shape, bool)
    np.put_along_axis(mask, plan.keep, False, 1)
    if "mask" in fixture:
        same(mask, fixture.take("mask").astype(bool))
    if "ids_shuffle" in fixture:
        same(np.concatenate([plan.keep, plan.hidden], 1), fixture.take("ids_shuffle"))
    if "mask_pred" in fixture:
        finer = mask.reshape(-1, config.units, config.units).repeat(2, 1).repeat(2, 2)
        same(finer.reshape(len(mask), -1), fixture.take("mask_pred").astype(bool))
    return distill_lite.to_device(plan, CPU)


def released_order(x: Tensor, units: int, dim: int = 1) -> Tensor:
    """Tokens (unit, coarse, ..., fine) of Hiera in the order of released code, along an axis:
    (fine, ..., coarse, unit)."""
    cells = x.shape[dim] // units
    x = x.movedim(dim, 0)
    levels = (4,) * round(math.log(cells, 4))
    x = x.unflatten(0, (units, *levels))
    order = [*reversed(range(len(levels) + 1)), *range(len(levels) + 1, x.ndim)]
    return x.permute(order).flatten(0, len(levels)).movedim(0, dim)


def tokens_of(config: ModelConfig, x: Tensor, visible: int) -> Tensor:
    return x if config.kind == "vit" else released_order(x, visible)


def check_blocks(
    fixture: Fixture, who: str, encoder: nn.Module, seen: Tensor, plan: ShufflePlan
) -> None:
    """What every block gives, their logits, hidden states: of all that is stored."""
    config, visible = encoder.config, plan.keep.shape[1]
    depth = sum(config.depths)
    wanted = {name: int(re.search(r"\d+$", name)[0]) for name in fixture.arrays
              if re.match(rf"(feat_)?{who}_(block|logits|hidden)\d+$", name)}  # fmt: skip
    attn = [i for name, i in wanted.items() if "logits" in name]
    hidden = [i for name, i in wanted.items() if "hidden" in name]
    ends = [i + 1 for name, i in wanted.items() if "block" in name]
    shape = (config.input_size // config.patch_stride,) * 2
    with torch.no_grad():
        x = encoder.embed(seen, shape, plan.keep)
        outputs, logits, states = distill_lite.trace(encoder, x, ends, attn, hidden)
    for name, i in wanted.items():
        if "block" in name:
            assert i < depth
            compare(fixture, name, tokens_of(config, outputs[i + 1], visible))
        elif "hidden" in name:
            compare(fixture, name, states[i])
        else:
            x = logits[i]
            if config.kind == "hiera":
                x = released_order(released_order(x, visible, 2), visible, 3)
            compare(fixture, name, x)


def check_predictions(
    fixture: Fixture, model: MaskedDecoder, latent: Tensor, patches: Tensor, plan: ShufflePlan
) -> None:
    """Predictions of all patches, or of Hiera's hidden ones row by row, and their targets."""
    with torch.no_grad():
        decoded = model.decode(latent, plan)[:, model.lead :]
        whole, target = model.decoder_pred(model.decoder_norm(decoded)), model.target(patches)
    stored = latent
    if model.config.kind == "hiera":
        side = 2 * model.config.units
        mask = torch.zeros(len(whole), model.config.units**2, dtype=torch.bool)
        mask.scatter_(1, plan.hidden, True)
        mask = rearrange(mask, "b (r q) -> b r q", q=model.config.units)
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).view(-1, side**2)
        whole, target = whole[mask], target[mask]
        stored = rearrange(latent, "b (v y x) c -> b v y x c", y=2, x=2)
    compare(fixture, "latent", stored)
    compare(fixture, "latent_digest", latent if stored is latent else stored)
    for name, x in (("pred", whole), ("target", target)):
        compare(fixture, name, x)
        compare(fixture, f"{name}_digest", x)
        compare(fixture, f"{name}_slice", x[:, :4, :64] if x.ndim == 3 else x[:8, :64])


def without_gradient(config: ModelConfig) -> Callable[[str, Tensor], Tensor]:
    """Keys' biases: softmax does not see them, but where logits are distilled the teacher does."""
    tapped = {f"blocks.{i - 1}." for i in config.attn_layers or (config.last,)}
    tapped = tapped if config.distill != "none" else set()

    def zero(name: str, p: Tensor) -> Tensor:
        at = re.search(r"(?<!decoder_)blocks\.\d+\.", name)
        return torch.zeros_like(p, dtype=torch.bool) if at and at[0] in tapped else key_third(
            name, p)

    return zero


def check_pretraining(fixture: Fixture) -> None:
    meta = fixture.meta
    config, there = configs_of(meta)
    teacher = there and fill(distill_lite.teacher_model(there), meta["seed"], "tch_model.").eval()
    wrapped = DistilledMAE(config, teacher)
    model = fill(wrapped if there else wrapped.model, meta["seed"]).eval()
    student = wrapped.model
    check_state(fixture, model, teacher)
    images, plan = shown(fixture), check_mask(fixture, config)
    patches = distill_lite.patchify(images, config.patch_size)
    seen = student.see(images, patches, plan)
    for array in list(fixture.named("feat_enc_block")):
        fixture.arrays[array.replace("enc", "student")] = fixture.arrays.pop(array)
        names = fixture.meta["float32_vs_float64"]
        names[array.replace("enc", "student")] = names.get(array, {})
    check_blocks(fixture, "student", student, seen, plan)
    if there:
        check_blocks(fixture, "teacher", teacher, seen, plan)
    with torch.no_grad():
        latent, *_ = student.encode(seen, plan)
        x = student.decode_tokens(latent, plan)
        for i, block in enumerate(student.decoder_blocks):
            x, _ = block(x)
            compare(fixture, f"feat_dec_block{i}", x)
    check_predictions(fixture, student, latent, patches, plan)

    losses, prediction = wrapped.losses(images, plan)
    for name, key in (("recon", "reconstruction"), ("attn", "attention"), ("hidden", "hidden")):
        fixture.near(f"loss_{name}", losses[key].item(), rtol=LOSS)
    loss, again = wrapped(images, plan)
    assert torch.equal(prediction, again)
    fixture.near("loss", loss.item(), rtol=LOSS)
    loss.backward()
    counts = {"student": student, "teacher": teacher, "adapters": wrapped.attn_adapter}
    told = fixture.told("parameters", {})
    told = {"student": told} if isinstance(told, int) else told
    for key in counts.keys() & told.keys() & {"student"}:
        size = sum(v.numel() for v in counts[key].state_dict().values())
        assert size == told[key]
    if "adapters" in told:
        adapters = (*wrapped.attn_adapter.parameters(), *wrapped.hidden_adapter.parameters())
        assert sum(p.numel() for p in adapters) == told["adapters"]
    groups = distill_lite.parameter_groups(model, 0.05, undecayed=())
    check_training(fixture, model, groups, (0.9, 0.95), without_gradient(config))


# ── golden files: fine-tuning ───────────────────────────────────────────────────────────


def check_classifier(fixture: Fixture) -> None:
    meta, config = fixture.meta, config_of(fixture.meta["constructor"])
    distill_lite.model_config(config)  # it is one that may be asked for
    classes, seed, mix = meta["classes"], meta["seed"], meta["mixup"]
    model = fill(distill_lite.classifier(config, classes), seed).train()
    check_state(fixture, model)
    count = sum(p.numel() for p in model.parameters())
    assert fixture.told("parameters", count) == count
    images, lam = shown(fixture), mix["lam"]
    labels = (7 * torch.arange(len(images)) + seed) % classes
    if "labels" in fixture:
        same(labels, fixture.take("labels"))
    with torch.no_grad():
        logits = model(images)
        if config.two_heads:
            logits, second = logits
            compare(fixture, "logits_dist_train", second[:, :64])
        answer = model.eval()(images)
        model.train()
    compare(fixture, "logits_train", logits[:, :64])
    answer = answer.softmax(-1) if config.kind == "hiera" else answer  # as released Hiera does
    compare(fixture, "output_eval", answer[:, :64])
    compare(fixture, "output_eval_digest", answer.flatten()[None])
    mixed = images * lam + images.flip(0) * (1 - lam)
    targets = augment.smooth_one_hot(labels, classes, mix["label_smoothing"])
    targets = lam * targets + (1 - lam) * targets.flip(0)
    compare(fixture, "mixed_image_digest", mixed)
    compare(fixture, "mixed_target", targets[:, :64])
    ends = [int(name[10:]) + 1 for name in fixture.named("feat_block")]
    with torch.no_grad():
        outputs, *_ = model.look(mixed, ends)
    for end in ends:
        x = tokens_of(config, outputs[end], config.units**2)
        compare(fixture, f"feat_block{end - 1}", x)
    answer = model(mixed)
    if config.two_heads:
        kind, share, temperature = meta["distill"]
        cfg = distill_lite.configure("finetune", class_distill=kind, class_weight=share,
                                     temperature=temperature)  # fmt: skip
        theirs = torch.from_numpy(fixture.take("teacher_logits"))
        loss = distill_lite.two_headed_loss(*answer, targets, theirs, cfg)
    else:
        loss = F.cross_entropy(answer, targets)
    fixture.near("loss", loss.item(), rtol=LOSS)
    loss.backward()
    groups = distill_lite.parameter_groups(model, 0.05, config.depths, meta["layer_decay"])
    check_training(fixture, model, groups, (0.9, 0.999))


# ── golden files: recipe and analysis ───────────────────────────────────────────────────


def check_recipe(fixture: Fixture) -> None:
    for name, s in fixture.told("schedules", {}).items():
        counts = [round(e * s["iters_per_epoch"]) for e in s["at_epochs"]]
        if f"count/{name}" in fixture:
            same(counts, fixture.take(f"count/{name}"))
        if f"lr/{name}" in fixture:
            ours = [distill_lite.lr_at(c / s["iters_per_epoch"], s["peak_lr"], s["warmup_lr"],
                                       s["end_lr"], s["warmup_epochs"], s["warmup_epochs"],
                                       s["epochs"]) for c in counts]  # fmt: skip
            near(ours, fixture.take(f"lr/{name}"), rtol=1e-9, atol=1e-15, message=name)
    for name, stored in fixture.told("layer_decay", {}).items():
        config = MODELS[distill_lite.known_model(re.split("[, ]", name)[0])]
        if "_rpe" in name:
            config = replace(config, rpe="block", qkv_bias="qv", layer_scale=0.1)
        model = on_meta(partial(distill_lite.classifier, config, 1000))
        groups = distill_lite.parameter_groups(model, 0.05, config.depths, 0.85)
        check_map(model, groups, {k: (v[1], v[2]) for k, v in stored.items()})
        assert {k: distill_lite.layer_id(k, config.depths) for k in stored} == {
            k: v[0] for k, v in stored.items()}
    for name, stored in fixture.told("pretrain_weight_decay", {}).items():
        hiera = "Hiera" in name
        config = MODELS["hiera_tiny" if hiera else "vit_tiny"]
        teacher = None
        if not hiera:
            config = replace(config, distill="attention")
            teacher = on_meta(partial(distill_lite.teacher_model, MODELS["vit_base"]))
        model = on_meta(partial(DistilledMAE, config, teacher))
        groups = distill_lite.parameter_groups(model, 0.05, undecayed=())
        check_map(model, groups, {k: (1.0, v) for k, v in stored.items()})
    check_counts(fixture)
    check_settings(fixture)


def check_map(model: nn.Module, groups: list[dict], stored: dict[str, tuple]) -> None:
    by_id = {id(p): (group["lr_scale"], group["weight_decay"])
             for group in groups for p in group["params"]}  # fmt: skip
    ours = {name: by_id[id(p)] for name, p in model.named_parameters()}
    assert ours.keys() == stored.keys()
    for name, value in ours.items():
        assert value == pytest.approx(stored[name], rel=1e-12), name


def check_counts(fixture: Fixture) -> None:
    for name, stored in fixture.told("parameter_counts", {}).items():
        config = MODELS[distill_lite.known_model(re.split("[, ]", name)[0])]
        if "_rpe" in name:
            old = {"qkv_bias": "qv", "layer_scale": 0.1} if "q/v" in name else {}
            config = replace(config, rpe="block", **old)
        if name.startswith("mae_"):
            model = on_meta(partial(distill_lite.masked_model, config))
        else:
            model = on_meta(partial(distill_lite.classifier, config, 1000))
        whole = sum(v.numel() for v in model.state_dict().values())
        if "_d13_" in name:  # before its last block is cut
            config = replace(config, depths=(13,))
            model = on_meta(partial(distill_lite.masked_model, config))
            whole = sum(v.numel() for v in model.state_dict().values())
        around = distill_lite.PRETRAINING
        inside = sum(v.numel() for k, v in model.state_dict().items() if not k.startswith(around))
        norm = model.state_dict().get("encoder_norm.weight", torch.empty(0)).numel()
        ours = {"all": whole, "trainable": sum(p.numel() for p in model.parameters()),
                "encoder": inside, "decoder_fusion_mask": whole - inside - 2 * norm}  # fmt: skip
        assert {k: ours[k] for k in stored} == stored, name


SETTINGS = {
    "epochs": "epochs", "warmup_epochs": "warmup_epochs", "weight_decay": "weight_decay",
    "clip_grad": "clip_grad", "mask_ratio": "mask_ratio", "layer_decay": "layer_decay",
    "mixup": "mixup", "cutmix": "cutmix", "smoothing": "smoothing", "reprob": "reprob",
    "min_lr": "min_lr", "opt": "opt", "drop_path": "drop_path", "aa": "aa",
}  # fmt: skip
# Of the released script, not of its class (spec, section 7).
ELSEWHERE = {"rpe": {"epochs": 1000}, "transfer": {"epochs": 50, "warmup_epochs": 10.0, "lr": 0.1}}


def check_settings(fixture: Fixture) -> None:
    """Every value of the recipes, and the learning rate for their whole batch."""
    for name, s in fixture.told("settings", {}).items():
        batch = int(re.search(r"\((\d+)\)", name)[1])
        command = "finetune" if name.startswith("finetuning") else "pretrain"
        kind = re.match(r"finetuning_(\w+)_exp", name)
        recipe = {"mae": "plain"}.get(kind[1], kind[1]) if kind else "published"
        model = "hiera_tiny" if "hiera" in name else "vit_tiny"
        cfg = distill_lite.configure(command, model=model, recipe=recipe)
        changes = ELSEWHERE.get(recipe, {})
        for theirs, ours in SETTINGS.items():
            if hasattr(cfg, ours) and theirs in s:
                wanted = changes.get(ours, s[theirs])
                value = getattr(cfg, ours)
                value = None if value == "none" else value
                assert value == (0.0 if wanted is None and ours == "drop_path" else wanted), (
                    name, ours)
        assert cfg.batch_size * 8 == batch
        assert cfg.crop_min == s["scale"][0]
        lr = changes.get("lr", s["basic_lr_per_img"] * batch)
        assert (cfg.lr or cfg.blr * batch / 256) == pytest.approx(lr)
    assert fixture.told("transforms", {"pretrain": 0})["pretrain"] is not None


def check_analysis(fixture: Fixture) -> None:
    meta, seed = fixture.meta, fixture.meta["seed"]

    def layers(model: str, count: int, batch: int) -> list[Tensor]:
        shape = (meta["batch"], 5, 7)
        shared = uniform(f"rep/shared/layer0/batch{batch}", shape, seed)
        return [torch.from_numpy((
            uniform(f"rep/{model}/layer{i}/batch{batch}", shape, seed).astype(np.float32)
            + np.float32(0.5 * (i + 1)) * shared.astype(np.float32)).astype(np.float32))
            for i in range(count)]

    batches = range(meta["batches"])
    mean = torch.stack([distill_lite.hsic_triple(
        layers("a", meta["layers1"], j), layers("b", meta["layers2"], j)) for j in batches]).mean(0)
    compare(fixture, "hsic_synthetic", mean)
    compare(fixture, "cka_synthetic", distill_lite.minibatch_cka(mean))

    process = distill_lite.Process(0, 1, CPU, torch.float32)
    models = []
    for k in (1, 2):
        told = meta[f"model{k}"]
        config = config_of(told)
        models.append(fill(distill_lite.classifier(config, told["num_classes"]), seed + k - 1))
    triples = []
    for j in batches:
        side = models[0].config.input_size
        images = torch.from_numpy(filled_images((meta["batch"], 3, side, side), seed + 10 + j))
        found = [distill_lite.examine(m.eval(), images, process)[0] for m in models]
        triples.append(distill_lite.hsic_triple(*found))
    compare(fixture, "cka_models", distill_lite.minibatch_cka(torch.stack(triples).mean(0)))

    places = torch.stack(torch.meshgrid(*[torch.arange(14.0)] * 2, indexing="ij"), -1).flatten(0, 1)
    distances = 14 * torch.cdist(places, places)  # released code takes patches for 14 px wide
    found = [torch.stack([distill_lite.attention_statistics(torch.from_numpy(
        (12 * uniform(f"attn/layer{i}/batch{j}", (2, 3, 197, 197), seed)).astype(np.float32)
        )[..., 1:, 1:], distances) for j in batches]).mean(0) for i in range(2)]  # fmt: skip
    for k, name in enumerate(("entropy", "distance")):
        compare(fixture, f"{name}_synthetic", torch.stack([x[k] for x in found]))
    model = fill(distill_lite.classifier(MODELS["vit_tiny"], 10), seed).eval()
    images = [torch.from_numpy(filled_images((meta["full_batch"], 3, 224, 224), seed + 20 + j))
              for j in batches]  # fmt: skip
    _, (entropy, distance) = distill_lite.examine(model, torch.cat(images), process)
    compare(fixture, "entropy_model", entropy)
    compare(fixture, "distance_model", distance * 14 / 16)


# ── golden files: one test each ─────────────────────────────────────────────────────────


def kind_of(meta: dict) -> Callable[[Fixture], None] | None:
    """What checks a fixture, by what its `meta` tells."""
    kinds = {"schedules": check_recipe, "layers1": check_analysis, "classes": check_classifier,
             "mask_ratio": check_pretraining}  # fmt: skip
    return next((check for key, check in kinds.items() if key in meta), None)


def golden_cases() -> list:
    params = []
    for path in golden_files("distill_lite"):
        meta = Fixture(path).meta
        large = meta.get("image_shape", [0, 0, 0])[2] >= 224
        marks = [pytest.mark.slow] if large else []
        params.append(pytest.param(path, marks=marks, id=path.stem))
    return params


@pytest.mark.parametrize("path", golden_cases())
def test_golden_distill_lite(path: Path) -> None:
    fixture = Fixture(path)
    check = kind_of(fixture.meta)
    assert check, "no check for a fixture of this kind"
    check(fixture)
    fixture.finish()


# ── small models and files ──────────────────────────────────────────────────────────────

TEACHER = replace(TEST, embed_dim=32, num_heads=4, depths=(4,))
HIERA_TEACHER = replace(HIERA, embed_dim=12, num_heads=2, depths=(1, 1, 3, 2))
STUDENTS = {  # a student and its teacher
    "none": (TEST, None),
    "attention": (replace(TEST, distill="attention"), TEACHER),
    "decoupled": (replace(TEST, distill="decoupled"), TEACHER),
    "every loss": (replace(TEST, distill="attention", attn_layers=(1, 3), hidden_layers=(0, 2, 3),
                           attn_adapter=False), TEACHER),
    "hidden, decoupled": (replace(TEST, distill="decoupled", hidden_layers=(1, 3)), TEACHER),
    "hiera": (HIERA, None),
    "hiera, attention": (replace(HIERA, distill="attention"), HIERA_TEACHER),
}  # fmt: skip
each_student = pytest.mark.parametrize(("config", "there"), STUDENTS.values(), ids=STUDENTS)


def build(config: ModelConfig, there: ModelConfig | None = None, seed: int = 0) -> DistilledMAE:
    config = distill_lite.model_config(config)
    teacher = there and fill(distill_lite.teacher_model(there), seed + 1)
    if teacher:
        teacher.requires_grad_(False).eval()
    return fill(DistilledMAE(config, teacher), seed)


def pictures(config: ModelConfig, batch: int = 2, seed: int = 7) -> Tensor:
    side = config.input_size
    return torch.from_numpy(filled_images((batch, 3, side, side), seed))


def drawn(config: ModelConfig, batch: int = 2, ratio: float = 0.5, seed: int = 1) -> ShufflePlan:
    plan = distill_lite.draw_masks(config, ratio, batch, (seed,))
    return distill_lite.to_device(plan, CPU)


def our_file(model: nn.Module, config: ModelConfig, path: Path, name: str = "test") -> Path:
    """A checkpoint as our commands write it, without the state of training."""
    args = {"script": "distill_lite", "command": "pretrain", "model": name, "classes": [],
            "config": asdict(config), "settings": {}}  # fmt: skip
    torch.save({"model": model.state_dict(), "args": args}, path)
    return path


def load(make: Callable, path: Path, fresh_head: bool = False) -> tuple[nn.Module, str]:
    return distill_lite.load_weights(
        make, str(path), data.read_checkpoint(path), fresh_head)


def run(command: str, **flags: object) -> dict:
    _, function = distill_lite.COMMANDS[command]
    return function(distill_lite.configure(
        command, device="cpu", num_workers=0, **flags))  # fmt: skip


SHORT = {"model": "test", "data_path": "drawn:16", "batch_size": 4, "epochs": 1,
         "warmup_epochs": 0.0, "lr": 1e-3, "save_freq": 1}  # fmt: skip


# ── masks ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", [TEST, replace(HIERA, input_size=96)], ids=["vit", "hiera"])
def test_masks_keep_the_smallest_noise(config: ModelConfig) -> None:
    noise = np.random.default_rng(3).random((5, config.units**2))
    plan = distill_lite.plan_noise(config, noise, 0.4)
    kept = int(config.units**2 * 0.6)
    for i in range(5):
        visible, order = plan.keep[i], np.argsort(noise[i])
        same(sorted(visible), sorted(order[:kept]))
        same(visible, order[:kept] if config.kind == "vit" else sorted(visible))
        whole = np.concatenate([visible, plan.hidden[i]])
        same(whole[plan.restore[i]], np.arange(config.units**2))


@each_student
def test_a_plan_equals_its_mask(config: ModelConfig, there: ModelConfig | None) -> None:
    """A bool mask, in which visible patches stand in raster order, gives the same loss."""
    model, images = build(config, there), pictures(config)
    plan = drawn(config)
    mask = torch.ones(2, config.units**2, dtype=torch.bool).scatter(1, plan.keep, False)
    with torch.no_grad():
        (planned, _), (masked, _) = model(images, plan), model(images, mask)
    near(masked, planned, rtol=1e-5)


@each_student
def test_hidden_pixels_are_not_seen(config: ModelConfig, there: ModelConfig | None) -> None:
    """Neither by the student nor by its teacher."""
    model, images, plan = build(config, there), pictures(config), drawn(config)
    mask = torch.zeros(2, 1, config.units**2).scatter(2, plan.hidden[:, None], 1.0)
    mask = F.interpolate(mask.view(2, 1, config.units, -1), scale_factor=float(config.mask_unit))
    changed = images + mask * torch.randn_like(images)
    found = []
    for x in (images, changed):
        patches = distill_lite.patchify(x, config.patch_size)
        seen = model.model.see(x, patches, plan)
        with torch.no_grad():
            latent, *_ = model.model.encode(seen, plan)
            found.append([latent, *(model.teach(seen, plan, [4])[0].values() if there else ())])
    assert not torch.equal(images, changed)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("mask", "wanted"), [
    (torch.zeros(2, 16, dtype=torch.bool), "hides nothing"),
    (torch.ones(2, 16, dtype=torch.bool), "visible"),
    (torch.eye(2, 16, dtype=torch.bool).cumsum(1).bool(), "same number"),
    (torch.eye(2, 9, dtype=torch.bool), "9"),
])  # fmt: skip
def test_impossible_masks(mask: Tensor, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        build(TEST)(pictures(TEST), mask)


# ── what trains what ────────────────────────────────────────────────────────────────────


@each_student
def test_every_parameter_gets_a_gradient(config: ModelConfig, there: ModelConfig | None) -> None:
    """Of the block that is cut off, queries and keys: its values exactly zero."""
    model = build(config, there)
    loss, _ = model(pictures(config), drawn(config))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    if config.distill == "decoupled":
        attn = model.model.blocks[3].attn
        for p in (attn.qkv.weight, attn.qkv.bias):
            q, k, v = p.grad.chunk(3)
            assert q.abs().sum() > 0 and k.abs().sum() > 0 and (v == 0).all()
        assert sorted(n for n, _ in model.model.blocks[3].named_parameters()) == [
            "attn.qkv.bias", "attn.qkv.weight", "norm1.bias", "norm1.weight"]


def test_decoupled_parts_the_tasks() -> None:
    """Reconstruction trains the blocks before the decoder, distillation those behind them alone."""
    config, there = STUDENTS["decoupled"]
    touched = {}
    for name in ("reconstruction", "attention"):
        model = build(config, there)
        losses, _ = model.losses(pictures(config), drawn(config))
        losses[name].backward()
        touched[name] = {re.match(r"model\.(blocks\.\d+|\w+)|\w+", n)[0] for n, p in
                         model.named_parameters() if p.grad is not None and p.grad.any()}
    before = {"model.cls_token", "model.patch_embed", "model.blocks.0", "model.blocks.1"}
    decoder = {"model.norm", "model.mask_token", *(f"model.decoder_{part}" for part in (
        "embed", "blocks", "norm", "pred"))}
    assert touched["reconstruction"] == before | decoder
    assert touched["attention"] == before | {"model.blocks.2", "model.blocks.3", "attn_adapter"}


@each_student
def test_the_teacher_is_no_part_of_the_student(
    config: ModelConfig, there: ModelConfig | None
) -> None:
    model = build(config, there)
    (teacher,) = model.frozen
    assert {n.split(".")[0] for n in model.state_dict()} <= {
        "model", "attn_adapter", "hidden_adapter"}
    if teacher is None:
        return
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in teacher.parameters()}
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    groups = distill_lite.parameter_groups(model, 0.05, undecayed=())
    optimizer = torch.optim.AdamW(groups, 0.1)
    for step in range(2):
        loss, _ = model.train()(pictures(config), drawn(config, seed=step))
        loss.backward()
        optimizer.step()
    assert equal(before, teacher.state_dict()) and not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_stops_at_its_last_logits() -> None:
    """No block behind them, and of that one neither values nor what comes after."""
    config, there = replace(TEST, distill="attention", teacher_attn_layers=(3,)), TEACHER
    model, called = build(config, there), []
    (teacher,) = model.frozen
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model(pictures(config), drawn(config))
    assert "blocks.1" in called and "blocks.2.norm1" in called
    assert not [n for n in called if re.match(r"blocks\.2(\.mlp|\.attn\.proj|$)|blocks\.3|norm", n)]


@pytest.mark.parametrize("name", ["attention", "hiera, attention"])
def test_teacher_dtype(name: str) -> None:
    """A teacher in bf16 gives nearly the same loss, the student stays in fp32; by default it works
    as the student does."""
    (config, there), losses = STUDENTS[name], []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(config, there)
        (teacher,) = model.frozen
        model.teacher_dtype = dtype
        distill_lite.lower(teacher, dtype)
        found, prediction = model.losses(pictures(config), drawn(config))
        losses.append((found["attention"].item(), prediction))
    assert losses[0][0] != losses[1][0] and losses[1][0] == pytest.approx(losses[0][0], rel=0.02)
    assert torch.equal(losses[0][1], losses[1][1])
    model.teacher_dtype = None
    with torch.autocast("cpu", torch.bfloat16):
        assert model(pictures(config), drawn(config))[0].isfinite()


def test_overfits_a_batch() -> None:
    """Reconstruction and imitation at the same time."""
    config, there = STUDENTS["decoupled"]
    model, images, plan = build(config, there), pictures(config), drawn(config)
    groups = distill_lite.parameter_groups(model, 0.0, undecayed=())
    optimizer = torch.optim.AdamW(groups, 3e-3)
    first, _ = model.losses(images, plan)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = model(images, plan)
        loss.backward()
        optimizer.step()
    last, _ = model.losses(images, plan)
    assert last["attention"] < 0.2 * first["attention"]
    assert last["reconstruction"] < 0.8 * first["reconstruction"]


@each_student
def test_recomputing_blocks_changes_nothing(
    config: ModelConfig, there: ModelConfig | None
) -> None:
    found = []
    for again in (False, True):
        model = build(config, there).train()
        model.model.grad_checkpoint = again
        loss, _ = model(pictures(config), drawn(config))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert equal(*found)


WRONG = {
    "decode depth": ({"distill": "decoupled", "decode_depth": 4}, "--decode_depth 4"),
    "no such block": ({"distill": "attention", "attn_layers": (4,)}, "--attn_layers 4"),
    "twice": ({"distill": "attention", "attn_layers": (2, 2)}, "--attn_layers 2,2"),
    "not the cut block": ({"distill": "decoupled", "attn_layers": (3,)}, "4, the block"),
    "layers of nothing": ({"attn_layers": (3,)}, "--distill"),
    "hiera decoupled": ({"kind": "hiera", "distill": "decoupled", "decode_depth": 1}, "ViTs"),
    "hiera local": ({"kind": "hiera", "distill": "attention", "attn_layers": (3,)}, "of 4 to 5"),
    "hiera rpe": ({"kind": "hiera", "rpe": "block"}, "--rpe"),
    "hiera two heads": ({"kind": "hiera", "two_heads": True}, "--class_teacher"),
    "heads": ({"num_heads": 3}, "--num_heads"),
    "size": ({"input_size": 70}, "64 and 80"),
    "sides": ({"input_size": (64, 96)}, "square"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "wanted"), WRONG.values(), ids=WRONG)
def test_configs_that_do_not_fit(changes: dict, wanted: str) -> None:
    base = HIERA if changes.get("kind") == "hiera" else TEST
    with pytest.raises(InputError, match=re.escape(wanted)):
        distill_lite.model_config(base, **changes)


TEACHERS = {
    "kind": ({"distill": "attention"}, HIERA_TEACHER, "vit"),
    "patches": ({"distill": "attention"}, replace(TEACHER, patch_size=8), "8 px"),
    "pairs": ({"distill": "attention", "teacher_attn_layers": (1, 2)}, TEACHER, "give 1,"),
    "depth": ({"distill": "attention", "teacher_attn_layers": (5,)}, TEACHER, "1 to 4"),
    "twice": ({"distill": "attention", "attn_layers": (1, 2), "teacher_attn_layers": (3, 3)},
              TEACHER, "each once"),
    "hidden": ({"distill": "attention", "hidden_layers": (3,)}, replace(TEACHER, depths=(2,)),
               "2 blocks"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "there", "wanted"), TEACHERS.values(), ids=TEACHERS)
def test_teachers_that_do_not_fit(changes: dict, there: ModelConfig, wanted: str) -> None:
    config = distill_lite.model_config(TEST, **changes)
    with pytest.raises(InputError, match=re.escape(wanted)):
        DistilledMAE(config, distill_lite.teacher_model(there))


def test_a_hiera_teacher_is_asked_for_global_attention() -> None:
    config = distill_lite.model_config(HIERA, distill="attention", teacher_attn_layers=(3,))
    with pytest.raises(InputError, match=re.escape("--teacher_attn_layers 3: give each once, of ")):
        distill_lite.layer_pairs(config, HIERA_TEACHER)


@pytest.mark.parametrize(("flags", "wanted"), [
    ({"decode_depth": 2}, "--decode_depth needs --distill decoupled"),
    ({"attn_weight": 2.0}, "--attn_weight needs --distill attention or decoupled"),
    ({"attn_adapter": False}, "--attn_adapter needs --distill attention or decoupled"),
    ({"hidden_weight": 2.0}, "--hidden_weight needs --hidden_layers"),
    ({"hidden_adapter": False}, "--hidden_adapter needs --hidden_layers"),
])  # fmt: skip
def test_flags_of_no_use_are_refused(flags: dict, wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        run("pretrain", model="test", **flags)


# ── Hiera by its definition ─────────────────────────────────────────────────────────────


def slow_hiera(encoder: nn.Module, image: Tensor, keep: list[int]) -> list[dict]:
    """For an image (3, H, W) with zeros where it is hidden: after every block, the tokens of the
    visible units by row and column of the block's map, one by one."""
    config = encoder.config
    x = encoder.patch_embed.proj(image[None])[0]
    side, units = x.shape[-1], config.units
    table = encoder.pos_embed[0].reshape(side, side, -1)
    tokens, per_unit, found = {}, 8, []
    for unit in keep:
        for i in range(8 * (unit // units), 8 * (unit // units) + 8):
            for j in range(8 * (unit % units), 8 * (unit % units) + 8):
                tokens[i, j] = x[:, i, j] + table[i, j]
    starts = np.cumsum([0, *config.depths]).tolist()
    pools = [starts[i] for i in (1, 2)]
    for number, block in enumerate(encoder.blocks):
        local = number <= starts[2]  # stages 1 and 2, and the first block of stage 3
        heads = config.num_heads * 2 ** sum(number >= s for s in starts[1:4])
        normed = {at: block.norm1(v) for at, v in tokens.items()}
        qkv = {at: block.attn.qkv(v).chunk(3) for at, v in normed.items()}
        merged = (lambda at: (at[0] // 2, at[1] // 2)) if number in pools else (lambda at: at)
        members: dict[tuple, list] = {}
        for at in tokens:
            members.setdefault(merged(at), []).append(at)
        size = per_unit // 2 if number in pools else per_unit
        new = {}
        for place, group in members.items():
            q = torch.stack([qkv[at][0] for at in group]).amax(0)
            unit = (group[0][0] // per_unit, group[0][1] // per_unit)
            seen = [at for at in tokens
                    if not local or (at[0] // per_unit, at[1] // per_unit) == unit]
            out = []
            for h in range(heads):
                part = slice(h * len(q) // heads, (h + 1) * len(q) // heads)
                k, v = (torch.stack([qkv[at][i][part] for at in seen]) for i in (1, 2))
                out.append((k @ q[part] / math.sqrt(len(q) / heads)).softmax(0) @ v)
            residual = torch.stack([tokens[at] if block.proj is None else block.proj(normed[at])
                                    for at in group]).amax(0)
            y = residual + block.attn.proj(torch.cat(out))
            new[place] = y + block.mlp(block.norm2(y))
        tokens, per_unit = new, size
        found.append(tokens)
    return found


def test_hiera_by_its_definition() -> None:
    config = replace(HIERA, input_size=96)
    model = fill(distill_lite.masked_model(config), 5)
    images, plan = pictures(config, 1), drawn(config, 1, 0.6, 2)
    patches = distill_lite.patchify(images, config.patch_size)
    depth, units = sum(config.depths), config.units
    with torch.no_grad():
        seen = model.see(images, patches, plan)
        x = model.embed(seen, (24, 24), plan.keep)
        outputs, *_ = distill_lite.trace(model, x, range(1, depth + 1))
        slow = slow_hiera(model, seen[0], plan.keep[0].tolist())
    for number, x in outputs.items():
        cells = x.shape[1] // plan.keep.shape[1]
        side = math.isqrt(cells)
        whole = x.new_zeros(units**2, cells, x.shape[-1])
        whole[plan.keep[0]] = x[0].unflatten(0, (-1, cells))
        raster = distill_lite.to_raster(whole.flatten(0, 1)[None], (units, units))[0]
        raster = raster.view(units * side, units * side, -1)
        assert len(slow[number - 1]) == x.shape[1]
        for at, value in slow[number - 1].items():
            near(raster[at], value, atol=2e-5, message=f"block {number}, token {at}")


def test_units_and_raster() -> None:
    x = torch.arange(24 * 16.0).view(1, -1, 1)
    units = distill_lite.to_units(x, (24, 16))
    assert torch.equal(distill_lite.to_raster(units, (3, 2)), x)
    for u in range(6):
        inside = units[0, 64 * u : 64 * u + 64, 0].long()
        assert set((inside // 16 // 8).tolist()) == {u // 2}
        assert set((inside % 16 // 8).tolist()) == {u % 2}
        for n in (4, 16, 64):  # each run is a square
            for run in inside.split(n):
                rows, columns = run // 16, run % 16
                assert rows.max() - rows.min() == columns.max() - columns.min() == n**0.5 - 1
    assert units[0, :4, 0].tolist() == [0, 1, 16, 17]


# ── fine-tuned networks ─────────────────────────────────────────────────────────────────

OPTIONS = {
    "plain": {}, "class token": {"global_pool": False}, "tables": {"rpe": "block"},
    "shared": {"rpe": "shared", "abs_pos": False}, "both": {"rpe": "both", "qkv_bias": "qv"},
    "scaled": {"rpe": "block", "qkv_bias": "qv", "layer_scale": 0.1}, "two": {"two_heads": True},
}  # fmt: skip
each_option = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)


def test_tables_of_zeros_change_nothing() -> None:
    """And biases of queries and values alone are those of all three: softmax does not see one that
    all keys share."""
    images, plain = pictures(TEST), fill(distill_lite.classifier(TEST, 5), 3).eval()
    state = plain.state_dict()
    for changes in OPTIONS.values():
        config = replace(TEST, **changes | {"layer_scale": 0.0})
        if not config.abs_pos or not config.global_pool or config.two_heads:
            continue
        model = distill_lite.classifier(config, 5).eval()
        fitted, _ = distill_lite.fit_network(dict(state), model)
        model.load_state_dict(fitted, strict=False)
        near(model(images), plain(images).detach(), atol=1e-5)


@each_option
def test_released_classifiers_are_read_off_their_keys(changes: dict, tmp_path: Path) -> None:
    config = replace(TEST, **changes)
    model = fill(distill_lite.classifier(config, 5), 2).eval()
    state = distill_lite.export_state(model)
    wrapped = {"start_epoch": 300, "best_top1": 78.0,
               "model": {f"module.model.{k}": v for k, v in state.items()}}  # fmt: skip
    torch.save(wrapped, tmp_path / "released.pth.tar")
    file = data.read_checkpoint(tmp_path / "released.pth.tar")
    name, found = distill_lite.identify(file)
    ignored = {"distill": "none", "decode_depth": TEST.decode_depth, "layer_scale": 0.0}
    assert (name, replace(found, **ignored)) == ("test", replace(config, **ignored))
    assert bool(found.layer_scale) == bool(config.layer_scale)
    same_model, said = load(partial(distill_lite.classifier, found, 5),
                            tmp_path / "released.pth.tar")
    assert said.endswith("all weights as they are")
    assert torch.equal(same_model.eval()(pictures(TEST)), model(pictures(TEST)))


@each_option
def test_vit_of_any_size(changes: dict) -> None:
    """Maps of images that are not square; nothing changes where tables fit."""
    model = fill(distill_lite.classifier(replace(TEST, **changes), 5), 2).eval()
    with torch.no_grad():
        (wide,) = model.maps(torch.randn(2, 3, 64, 96))
        first, last = model.maps(pictures(TEST), [1, 3])
    assert wide.shape == (2, 16, 4, 6) and first.shape == last.shape == (2, 16, 4, 4)
    with pytest.raises(ValueError, match="16 must divide"):
        model.maps(torch.randn(1, 3, 64, 90))


def test_hiera_of_any_size() -> None:
    model = fill(distill_lite.classifier(HIERA, 5), 2).eval()
    with torch.no_grad():
        maps = model.maps(torch.randn(2, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [
        (2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    assert model.strides == [4, 8, 16, 32] and model.channels == [8, 16, 32, 64]
    with pytest.raises(ValueError, match="32 must divide"):
        model.maps(torch.randn(1, 3, 64, 80))


def test_relative_index_by_hand() -> None:
    index = distill_lite.relative_index(2, 3, CPU)
    last = 3 * 5
    assert (index[0, 1:] == last).all() and (index[1:, 0] == last + 1).all()
    assert index[0, 0] == last + 2
    for i in range(6):
        for j in range(6):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            assert index[1 + i, 1 + j] == (dy + 1) * 5 + dx + 2


def test_two_headed_loss_by_hand() -> None:
    logits, second, answer = torch.randn(3, 4, 5).unbind()
    logits, second, answer = logits.float(), second, answer
    targets = torch.full((4, 5), 0.2)
    cfg = distill_lite.configure("finetune", class_distill="soft", temperature=2.0,
                                 class_weight=0.3)  # fmt: skip
    p, q = (answer / 2).softmax(1), (second / 2).softmax(1)
    wanted = 0.7 * -(targets * logits.log_softmax(1)).sum(1).mean()
    wanted = wanted + 0.3 * 4 * (p * (p.log() - q.log())).sum() / 20
    near(distill_lite.two_headed_loss(logits, second, targets, answer, cfg), wanted, rtol=1e-5)
    cfg = distill_lite.configure("finetune")
    wanted = -0.5 * (targets * logits.log_softmax(1)).sum(1).mean()
    wanted -= 0.5 * second.log_softmax(1)[range(4), answer.argmax(1)].mean()
    near(distill_lite.two_headed_loss(logits, second, targets, answer, cfg), wanted, rtol=1e-5)


# ── files ───────────────────────────────────────────────────────────────────────────────


def released(model: DistilledMAE, path: Path, teacher: bool = True) -> Path:
    """A file as released pre-training wrote it, teacher included."""
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    if teacher and model.frozen[0]:
        state |= {f"module.tch_model.{k}": v for k, v in model.frozen[0].state_dict().items()}
    torch.save({"start_epoch": 400, "model": state, "scheduler": {"last_count": 5}}, path)
    return path


@each_student
def test_released_pretraining_files(
    config: ModelConfig, there: ModelConfig | None, tmp_path: Path
) -> None:
    """With their teacher inside: network, adapters, and which of the methods it was."""
    config = distill_lite.model_config(config)
    model, path = build(config, there, 4), tmp_path / "last_epoch_ckpt.pth.tar"
    released(model, path)
    name, found = distill_lite.identify(data.read_checkpoint(path))
    assert name == ("test" if config.kind == "vit" else "test_hiera")
    assert (found.distill == "decoupled") == (config.distill == "decoupled")
    again, said = load(partial(DistilledMAE, config, model.frozen[0]), path)
    assert said.endswith("all weights as they are")
    assert equal(again.state_dict(), model.state_dict())
    alone, _ = load(partial(distill_lite.masked_model, config), path)
    assert equal(alone.state_dict(), model.model.state_dict())
    tuned, said = load(partial(distill_lite.classifier, found, 5), path, fresh_head=True)
    assert "norm; the head starts fresh" in said
    state = model.model.state_dict()
    for key, value in tuned.state_dict().items():
        if key.startswith(("blocks.", "patch_embed", "pos_embed", "cls_token")):
            assert torch.equal(value, state[key]), key
    assert not [k for k in tuned.state_dict() if k.startswith(f"blocks.{sum(config.depths)}.")]


def test_official_teachers(tmp_path: Path) -> None:
    """MAE's file, with and without a decoder; Hiera's, under its own key."""
    for kind, config, there in (("vit", *STUDENTS["attention"]),
                                ("hiera", *STUDENTS["hiera, attention"])):
        whole = fill(distill_lite.masked_model(there), 8)
        inside = {k: v for k, v in whole.state_dict().items()
                  if not k.startswith(("decoder_", "mask_token"))}
        wrapper = "model" if kind == "vit" else "model_state"
        for name, state in (("whole", whole.state_dict()), ("encoder", inside)):
            path = tmp_path / f"{kind}_{name}.pth"
            # The heads of such a file are known from its size: here it is ours that says them.
            torch.save({wrapper: state}, path)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(MODELS, "alike", there)
                teacher, said = distill_lite.load_teacher(str(path), config)
            assert said.startswith("teacher alike") and teacher.config.num_heads == there.num_heads
            assert not teacher.training
            assert not any(p.requires_grad for p in teacher.parameters())
            for key, value in teacher.state_dict().items():
                assert torch.equal(value, whole.state_dict()[key]), key


def test_a_teacher_for_images_of_another_size(tmp_path: Path) -> None:
    config, there = STUDENTS["attention"]
    path = our_file(fill(distill_lite.masked_model(there), 1), there, tmp_path / "teacher.pth")
    teacher, _ = distill_lite.load_teacher(str(path), replace(config, input_size=96))
    assert teacher.pos_embed.shape == (1, 37, 32)
    same(teacher.pos_embed, distill_lite.sincos_table(32, 6, 6))
    config, there = STUDENTS["hiera, attention"]
    model = fill(distill_lite.masked_model(there), 1)
    path = our_file(model, there, tmp_path / "hiera.pth", "test_hiera")
    teacher, said = distill_lite.load_teacher(str(path), replace(config, input_size=96))
    assert teacher.pos_embed.shape == (1, 576, 12) and "interpolated" in said


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    model = build(TEST)
    path = our_file(model, TEST, tmp_path / "a.pth")
    state = model.state_dict()
    for change, wanted in (
            (lambda s: s.pop("model.blocks.1.norm2.weight"), "blocks"),
            (lambda s: s.update({"model.extra": torch.ones(1)}), "extra is unexpected"),
            (lambda s: s.update({"model.norm.weight": torch.ones(3)}), r"norm.weight is \(3,\)")):
        file = torch.load(path, weights_only=True)
        file["model"] = dict(state)
        change(file["model"])
        torch.save(file, tmp_path / "b.pth")
        with pytest.raises(InputError, match=rf"b\.pth: refused.*{wanted}"):
            load(partial(DistilledMAE, TEST), tmp_path / "b.pth")
    torch.save({"model": {"head.weight": torch.ones(2, 2)}}, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"c\.pth: refused, it holds no ViT or Hiera"):
        run("evaluate", weights=str(tmp_path / "c.pth"), data_path="drawn:8")


def test_mae_weights_go_on_as_a_decoupled_student(tmp_path: Path) -> None:
    """The block that is cut off is new then, and gone again when they go on without."""
    config, _ = STUDENTS["decoupled"]
    plain = our_file(build(TEST), TEST, tmp_path / "plain.pth")
    model, said = load(partial(DistilledMAE, config), plain)
    assert "new: norm1, qkv" in said
    path = our_file(model, config, tmp_path / "d2.pth")
    back, _ = load(partial(DistilledMAE, TEST), path)
    assert equal(back.state_dict(), torch.load(plain, weights_only=True)["model"])


def test_timm_names_of_hiera(tmp_path: Path) -> None:
    model = fill(distill_lite.classifier(HIERA, 5), 1).eval()
    state = distill_lite.export_state(model, "timm")
    assert {k for k in state if not k.startswith(("blocks.", "patch_embed.", "pos_embed"))} == {
        "head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}
    torch.save(state, tmp_path / "timm.pth")
    again, _ = load(partial(distill_lite.classifier, HIERA, 5), tmp_path / "timm.pth")
    assert equal(again.state_dict(), model.state_dict())


def manifests() -> dict:
    """Names and shapes of timm's networks."""
    with np.load(ROOT / "tests" / "golden" / "augment" / "timm_keys.npz") as arrays:
        models = json.loads(str(arrays["meta"]))["models"]
    return {name: models[name] for name in models if name.startswith(("vit_", "hiera_"))}


@pytest.mark.parametrize("name", manifests())
def test_exports_have_the_names_and_shapes_of_timm(name: str) -> None:
    config = MODELS[distill_lite.known_model(name.split(":")[0])]
    if name.startswith("hiera"):  # timm's hiera_tiny_224 is the wide one
        config = replace(config, embed_dim=96)
    elif "avg" not in name:
        config = replace(config, global_pool=False)
    model = on_meta(partial(distill_lite.classifier, config, 1000)).to_empty(device="cpu")
    state = distill_lite.export_state(model, "timm")
    assert {k: list(v.shape) for k, v in state.items()} == manifests()[name]["shapes"]
    said = distill_lite.timm_call(model)
    assert "strictly" in said and f"num_heads={config.num_heads}" in said


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base", "hiera_tiny", "hiera_base"])
def test_shapes_tell_every_model(name: str) -> None:
    """Of pre-training and of fine-tuning files, without a word from their writer."""
    config = MODELS[name]
    for make in (partial(distill_lite.masked_model, config),
                 partial(distill_lite.classifier, config, 10)):
        state = dict(on_meta(make).state_dict().items())
        found, there = distill_lite.identify({"args": {}, "model": state})
        assert (found, there) == (name, config)


def test_a_second_head_is_left_out_where_there_is_none(tmp_path: Path) -> None:
    """As a backbone, in `analyse`, and to fine-tune a classifier with one head; and said."""
    config = replace(TEST, two_heads=True)
    model = fill(distill_lite.classifier(config, 10), 3).eval()
    path = str(our_file(model, config, tmp_path / "two.pth"))
    near(distill_lite.load_backbone(path)(pictures(TEST)).detach(),
         model.fc_norm(model.look(pictures(TEST), [3])[0][3][:, 1:].mean(1)).detach(), atol=1e-6)
    again, said = load(partial(distill_lite.classifier, TEST, 10), Path(path), fresh_head=True)
    assert said.endswith("its second head left out")
    assert torch.equal(again.head.weight, model.head.weight)
    run("finetune", **SHORT, weights=path, output_dir=str(tmp_path / "tuned"))
    answer = run("analyse", weights=path, data_path="drawn:8", batch_size=4,
                 output=str(tmp_path / "a.npz"))  # fmt: skip
    assert answer["cka"] == [4, 4]


def test_none_is_a_choice_of_its_own(tmp_path: Path) -> None:
    """`--distill none` and `--rpe none` are not "as the file has it", whatever it distilled."""
    for command, flag in (("pretrain", "distill"), ("finetune", "rpe")):
        for value in ("none", None):
            cfg = distill_lite.configure(command, model="test", **{flag: value})
            assert getattr(cfg, flag) == value
    assert distill_lite.configure("finetune", clip_grad="none").clip_grad is None
    assert distill_lite.configure("finetune", recipe="rpe", rpe="none").rpe == "none"
    config = distill_lite.model_config(
        TEST, distill="decoupled", attn_layers=(2, 4), teacher_attn_layers=(2, 3))
    path = our_file(build(config), config, tmp_path / "d2.pth")
    flags = SHORT | {"output_dir": str(tmp_path / "plain"), "weights": str(path)}
    with pytest.raises(InputError, match="--teacher FILE"):
        run("pretrain", **flags)
    run("pretrain", **flags, distill="none")
    file = torch.load(tmp_path / "plain" / "checkpoint-last.pth", weights_only=True)
    there = file["args"]["config"]
    assert (there["distill"], there["attn_layers"]) == ("none", ())
    assert not [k for k in file["model"] if k.startswith("model.blocks.3.")]


def test_hiera_is_exported_for_its_own_loader(tmp_path: Path) -> None:
    """Which wants `model_state`; a ViT stands under `model`, as MAE's."""
    for name, keys in (("test_hiera", {"model", "model_state"}), ("test", {"model"})):
        model = fill(distill_lite.classifier(MODELS[name], 5), 1)
        path = our_file(model, MODELS[name], tmp_path / "a.pth", name)
        run("export", weights=str(path), output=str(tmp_path / "b.pth"))
        file = torch.load(tmp_path / "b.pth", weights_only=True)
        assert file.keys() == keys
        assert all(equal(state, dict(model.state_dict())) for state in file.values())


@pytest.mark.parametrize(("width", "heads", "depths"), [
    (112, 2, (2, 3, 16, 3)), (144, 2, (2, 6, 36, 4)), (256, 4, (2, 6, 36, 4))])  # fmt: skip
def test_heads_of_larger_hieras(width: int, heads: int, depths: tuple[int, ...]) -> None:
    """Which shapes do not show: as teachers they would answer wrongly, without a word."""
    config = replace(MODELS["hiera_base"], embed_dim=width, num_heads=heads, depths=depths)
    for make in (distill_lite.masked_model, distill_lite.teacher_model):
        state = dict(on_meta(partial(make, config)).state_dict())
        found = distill_lite.identify({"args": {}, "model": state})[1]
        assert (found.num_heads, found.embed_dim, found.depths) == (heads, width, depths)


POSITIONS, TABLE = "pos_embed", "blocks.0.attn.relative_position_bias_table"
ODD = {
    "no positions": {POSITIONS: None}, "positions 0d": {POSITIONS: torch.tensor(1.0)},
    "positions 1d": {POSITIONS: torch.zeros(17)}, "positions 2d": {POSITIONS: torch.zeros(17, 16)},
    "positions of no square": {POSITIONS: torch.zeros(1, 19, 16)},
    "positions of nothing": {POSITIONS: torch.zeros(1, 0, 16)},
    "positions narrow": {POSITIONS: torch.zeros(1, 17, 8)},
    "no class token": {"cls_token": None}, "class token 0d": {"cls_token": torch.tensor(1.0)},
    "no patches": {"patch_embed.proj.weight": None},
    "patches 0d": {"patch_embed.proj.weight": torch.tensor(1.0)},
    "patches of no size": {"patch_embed.proj.weight": torch.zeros(16, 3, 0, 0)},
    "patches of no width": {"patch_embed.proj.weight": torch.zeros(0, 3, 16, 16)},
    "table 0d": {TABLE: torch.tensor(1.0)}, "table of nothing": {TABLE: torch.zeros(0, 2)},
    "table of no heads": {TABLE: torch.zeros(52, 0)},
    "table of no square": {TABLE: torch.zeros(51, 2)},
    "a table alone": {TABLE: torch.zeros(52, 2)},
    "mlp 0d": {"blocks.0.mlp.fc1.bias": torch.tensor(1.0)},
    "norm 0d": {"blocks.0.norm2.weight": torch.tensor(1.0)},
    "head 0d": {"head.weight": torch.tensor(1.0)}, "head of nothing": {
        "head.weight": torch.zeros(0, 16), "head.bias": torch.zeros(1)},
    "decoder 0d": {"decoder_embed.weight": torch.tensor(1.0)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_shapes_are_one_sentence(odd: dict, tmp_path: Path) -> None:
    path, out = tmp_path / "odd.pth", str(tmp_path / "out.pth")
    state = distill_lite.classifier(TEST, 3).state_dict() | odd
    torch.save({"model": {k: v for k, v in state.items() if v is not None}}, path)
    for flags in ({}, {"model": "test"}):
        cfg = distill_lite.configure("export", weights=str(path), output=out, **flags)
        with pytest.raises(InputError, match=r"odd\.pth") as refused:
            distill_lite.export(replace(cfg, device="cpu"))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("changes", [{"input_size": 4096}, {"rpe": "both"}, {"two_heads": True}])
def test_a_file_of_ours_cannot_ask_for_more_than_it_has(changes: dict, tmp_path: Path) -> None:
    model = distill_lite.classifier(TEST, 3)
    path = our_file(model, replace(TEST, **changes), tmp_path / "ours.pth")
    with pytest.raises(InputError, match=f"args say {next(iter(changes))}"):
        run("evaluate", weights=str(path), data_path="drawn:8")


# ── loss, initial values, pictures ──────────────────────────────────────────────────────


@pytest.mark.parametrize("config", [TEST, HIERA], ids=["vit", "hiera"])
@pytest.mark.parametrize("normalised", [True, False])
def test_loss_by_hand(config: ModelConfig, normalised: bool) -> None:
    """Patch by patch, from the pixels."""
    config = replace(config, norm_pix_loss=normalised)
    model, images, plan = build(config).model, pictures(config), drawn(config)
    loss, prediction = model(images, plan)
    side, total, number = config.mask_unit // 16, 0.0, 0
    for i in range(2):
        number = 0
        for unit in plan.hidden[i].tolist():
            row, column = divmod(unit, config.units)
            for k in range(side**2):
                y, x = 16 * (side * row + k // side), 16 * (side * column + k % side)
                target = images[i, :, y : y + 16, x : x + 16]
                order = (0, 1, 2) if config.kind == "hiera" else (1, 2, 0)
                target = target.permute(order).flatten().double()
                if normalised:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                total += (prediction[i, number].double() - target).square().mean().item()
                number += 1
    near(loss, total / (2 * number), rtol=1e-5)
    assert prediction.shape == (2, number, 768)


def test_initialisation() -> None:  # spec, section 5
    torch.manual_seed(0)

    def spread(x: Tensor, wanted: float, bound: float = math.inf) -> bool:
        close = abs(x.std().item() / wanted - 1) < 5 / math.sqrt(x.numel())
        return close and x.abs().max().item() <= 1.0001 * bound

    def check_linear(model: nn.Module, std: float | None, bias: float, but: str) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not re.search(but, name):
                edge = math.sqrt(6 / sum(module.weight.shape))  # qkv as one matrix
                assert spread(module.weight, std or edge / math.sqrt(3), edge if not std else 0.2)
                assert (module.bias == bias).all(), name
            if isinstance(module, nn.LayerNorm):
                assert (module.weight == 1).all() and (module.bias == bias).all(), name

    wide = replace(TEST, embed_dim=64, decoder_dim=64, distill="attention")
    model = DistilledMAE(wide, distill_lite.teacher_model(replace(TEACHER, num_heads=8)))
    check_linear(model.model, None, 0.0, "$^")
    edge = math.sqrt(6 / (64 + 768))
    assert spread(model.model.patch_embed.proj.weight, edge / math.sqrt(3), edge)
    assert spread(model.model.patch_embed.proj.bias, 1 / math.sqrt(3 * 768), 1 / math.sqrt(768))
    tokens = torch.cat([model.model.cls_token, model.model.mask_token], -1)
    assert spread(tokens, 0.02)
    (adapter,) = model.attn_adapter.values()
    assert adapter.weight.shape == (8, 2, 1, 1) and adapter.weight.abs().max() <= 2**-0.5
    hiera = distill_lite.masked_model(replace(HIERA, embed_dim=16))
    check_linear(hiera, None, 0.0, "$^")
    for table in (hiera.pos_embed, hiera.decoder_pos_embed, hiera.mask_token):
        assert spread(table, 0.02)
    edge = math.sqrt(6 / (16 + 147))
    assert spread(hiera.patch_embed.proj.weight, edge / math.sqrt(3), edge)
    for head in hiera.multi_scale_fusion_heads:
        edge = 1 / math.sqrt(head.weight[0].numel())
        assert spread(head.weight, edge / math.sqrt(3), edge)
    tuned = distill_lite.classifier(replace(HIERA, embed_dim=16), 100)
    check_linear(tuned, 0.02, 0.02, "head")
    assert spread(tuned.patch_embed.proj.weight, 0.02) and spread(tuned.pos_embed, 0.02)
    assert spread(tuned.head.projection.weight, 2e-5) and (tuned.head.projection.bias == 2e-5).all()
    plain = distill_lite.classifier(replace(TEST, embed_dim=64), 100)
    check_linear(plain, 0.02, 0.0, "$^")
    assert spread(plain.cls_token, 0.02)
    assert spread(plain.pos_embed, 0.02) and spread(plain.patch_embed.proj.bias,
                                                    1 / math.sqrt(3 * 768))
    config = replace(TEST, embed_dim=64, rpe="both", qkv_bias="qv", layer_scale=0.1)
    model = distill_lite.classifier(config, 100)
    for i, block in enumerate(model.blocks, 1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert spread(weight, 0.02 / math.sqrt(2 * i))
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
        zero = (block.attn.relative_position_bias_table, block.attn.q_bias, block.attn.v_bias)
        assert not any(p.any() for p in zero)
    assert spread(model.head.weight, 2e-5) and spread(model.patch_embed.proj.weight, 0.02)
    assert not model.patch_embed.proj.bias.any()


@pytest.mark.parametrize("config", [TEST, HIERA], ids=["vit", "hiera"])
def test_pictures_show_what_is_hidden(config: ModelConfig) -> None:
    """Visible patches as they are, hidden ones grey, then what a perfect model would predict."""
    model, plan = build(config).model, drawn(config)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)

    def perfect(images: Tensor, plan: ShufflePlan) -> tuple[Tensor, Tensor]:
        patches = model.of_hidden(distill_lite.patchify(images, 16), plan)
        return torch.zeros(()), model.target(patches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", perfect)
        picture, _ = distill_lite.draw_reconstructions(model, pixels, plan)
    zoom = picture.width // (3 * 64)
    found = np.asarray(picture)[16::zoom, ::zoom].reshape(2, 64, 3, 64, 3)
    image, seen, filled = found.transpose(2, 0, 1, 3, 4)
    same(image, pixels.permute(0, 2, 3, 1).numpy())
    near(filled.astype(float), image.astype(float), atol=1.0)
    hidden = (seen != image).any(-1)
    assert hidden.mean() == pytest.approx(plan.hidden.shape[1] / config.units**2, abs=0.01)


# ── commands ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pre-trained files of a ViT and a Hiera, as our commands write them."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for kind, model in (("vit", "test"), ("hiera", "test_hiera")):
        run("pretrain", **SHORT | {"model": model}, output_dir=str(folder / kind))
        found[kind] = folder / kind / "backbone.pth"
    return found


@pytest.mark.parametrize(("kind", "how"), [
    ("vit", "attention"), ("vit", "decoupled"), ("hiera", "attention")])  # fmt: skip
def test_distilled_from_end_to_end(
    kind: str, how: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    """No checkpoint holds the teacher, whose file stays as it is; a run stopped and resumed ends
    as the whole one; what is exported is the student's encoder."""
    before = teachers[kind].read_bytes()
    flags = SHORT | {"model": "test_hiera" if kind == "hiera" else "test", "distill": how,
                     "teacher": str(teachers[kind]), "epochs": 2}  # fmt: skip
    run("pretrain", **flags, output_dir=str(tmp_path / "whole"))
    whole = torch.load(tmp_path / "whole" / "checkpoint-last.pth", weights_only=True)
    assert {k.split(".")[0] for k in whole["model"]} == {"model", "attn_adapter"}
    assert len(whole["optimizer"]["state"]) == sum(
        1 for k in whole["model"] if not (kind == "vit" and k.endswith("pos_embed")))
    assert teachers[kind].read_bytes() == before
    (tmp_path / "parts").mkdir()
    first = torch.load(tmp_path / "whole" / "checkpoint-0.pth", weights_only=True)
    torch.save(first, tmp_path / "parts" / "checkpoint-0.pth")
    run("pretrain", **flags, output_dir=str(tmp_path / "parts"))
    parts = torch.load(tmp_path / "parts" / "checkpoint-last.pth", weights_only=True)
    assert equal(parts["model"], whole["model"])
    state = torch.load(tmp_path / "whole" / "backbone.pth", weights_only=True)["model"]
    names = {k.split(".")[0] for k in state}
    assert names <= {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    assert "blocks.3.norm1.weight" not in state or kind == "hiera"
    size = sum(v.numel() for v in whole["model"].values()) * 4
    assert (tmp_path / "whole" / "backbone.pth").stat().st_size < size


@pytest.mark.parametrize(("flags", "wanted"), [
    ({"distill": "attention"}, "mae_pretrain_vit_base.pth"),
    ({"distill": "attention", "model": "test_hiera"}, "mae_hiera_base_224.pth"),
    ({"teacher": "a.pth"}, "--distill"), ({"teacher_dtype": "bf16"}, "--distill"),
    ({"distill": "decoupled", "teacher": "missing.pth"}, "missing.pth"),
])  # fmt: skip
def test_a_teacher_is_asked_for(flags: dict, wanted: str) -> None:
    with pytest.raises(InputError, match=re.escape(wanted)):
        run("pretrain", **{"model": "test"} | flags)


CLASSIFIER = """
import torch

class Brightness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.arange(10.0))

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * self.scale

def bright():
    return Brightness()

def many():
    return lambda images: torch.arange(1000.0).expand(len(images), -1)

def number():
    return 3
"""


def test_two_heads_learn_from_a_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_to_learn_from.py").write_text(CLASSIFIER)
    run("finetune", **SHORT, class_teacher="mine_to_learn_from:bright", output_dir="out")
    state = torch.load("out/best.pth", weights_only=True)["model"]
    assert {"head_dist.weight", "dist_norm.weight", "head.weight"} <= state.keys()
    assert not [k for k in state if "scale" in k]
    result = run("evaluate", weights="out/best.pth", data_path="drawn:16")
    assert result["test_images"] == 16
    for wrong in ("mine_to_learn_from:dark", "there_is_no_such:thing", "mine_to_learn_from"):
        with pytest.raises(InputError, match=re.escape(wrong)):
            run("finetune", **SHORT, class_teacher=wrong, output_dir="no")
    for name, wanted in (("many", r"\(4, 1000\) for \(4, 10\)"), ("number", "returns a int")):
        for how in ("hard", "soft"):
            with pytest.raises(InputError, match=wanted):
                run("finetune", **SHORT, class_teacher=f"mine_to_learn_from:{name}",
                    class_distill=how, output_dir=f"no_{name}_{how}")  # fmt: skip
    for wrong in ({"model": "test_hiera"}, {"linear_probe": True}):
        with pytest.raises(InputError, match="--class_teacher"):
            run("finetune", **SHORT | wrong, output_dir="no",
                class_teacher="mine_to_learn_from:bright")  # fmt: skip


def test_sgd_resumes(tmp_path: Path) -> None:
    flags = SHORT | {"epochs": 2, "recipe": "transfer"}
    run("finetune", **flags, output_dir=str(tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "checkpoint-0.pth").write_bytes(
        (tmp_path / "whole" / "checkpoint-0.pth").read_bytes())
    run("finetune", **flags, output_dir=str(tmp_path / "parts"))
    ends = [torch.load(tmp_path / k / "checkpoint-last.pth", weights_only=True)
            for k in ("whole", "parts")]  # fmt: skip
    assert equal(ends[0]["model"], ends[1]["model"])
    assert equal(ends[0]["optimizer"], ends[1]["optimizer"])


class Stop(Exception):
    """Raised where training would begin."""


def set_up(monkeypatch: pytest.MonkeyPatch, command: str, **flags: object) -> dict:
    """What the loop is given by a command: parts, loader, schedule."""
    seen = {}

    def stop(cfg: object, process: object, parts: dict, loader: object, args: dict,
             schedule: Callable, loss_of: Callable, *_: object) -> None:  # fmt: skip
        seen.update(parts, loader=loader, schedule=schedule, loss_of=loss_of)
        raise Stop

    monkeypatch.setattr(distill_lite, "train", stop)
    usual = {"model": "test", "data_path": "drawn:2560", "batch_size": 256, "epochs": 8,
             "warmup_epochs": 2, "blr": 1e-3}  # fmt: skip
    with pytest.raises(Stop):
        run(command, **usual | flags)
    groups = {id(p): g for g in seen["optimizer"].param_groups for p in g["params"]}
    return seen | {"of": {name: groups[id(p)] for name, p in seen["model"].named_parameters()}}


@pytest.mark.parametrize("model", ["test", "test_hiera"])
def test_pretraining_is_set_up_as_published(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spec, section 6: betas, decay of tokens and learned tables, crops, the first rate 0."""
    seen = set_up(monkeypatch, "pretrain", model=model)
    of, crop = seen["of"], seen["loader"].transform
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 and g["lr_scale"] == 1
               for g in seen["optimizer"].param_groups)  # fmt: skip
    for name, group in of.items():
        assert group["weight_decay"] == (0.0 if name.endswith((".bias", "norm1.weight",
            "norm2.weight", "norm.weight")) else 0.05), name  # fmt: skip
    decayed = {"mask_token", *(("cls_token",) if model == "test" else (
        "pos_embed", "decoder_pos_embed"))}
    assert {f"model.{name}" for name in decayed} <= of.keys()
    assert (crop.scale, crop.interpolation, crop.flip, crop.augment) == (
        (0.08, 1.0), "random", 0.5, None)
    rates = [seen["schedule"](step, 1.0) for step in (0, 10, 20, 50, 80)]  # ten steps an epoch
    near(rates, [0, 0.5e-3, 1e-3, 0.5e-3, 0], atol=1e-12)


@pytest.mark.parametrize("model", ["test", "test_hiera"])
def test_finetuning_is_set_up_as_published(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spec, section 7: betas, decay by layer with its floor, drop path, crops and policy."""
    seen = set_up(monkeypatch, "finetune", model=model, drop_path=0.3)
    of, crop = seen["of"], seen["loader"].transform
    assert all(g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8
               for g in seen["optimizer"].param_groups)  # fmt: skip
    depth = len(seen["model"].blocks)
    assert of["pos_embed"]["weight_decay"] == 0
    assert of["pos_embed"]["lr_scale"] == pytest.approx(0.85 ** (depth + 1))
    assert of["blocks.1.mlp.fc1.weight"]["lr_scale"] == pytest.approx(0.85 ** (depth - 1))
    rates = [block.drop_path for block in seen["model"].blocks]
    near(rates, np.arange(depth) * 0.3 / (depth - 1), atol=1e-12)
    assert (crop.scale, crop.interpolation, crop.flip) == ((0.08, 1.0), "bicubic", 0.5)
    assert crop.augment is not None
    rates = [seen["schedule"](step, 0.5) for step in (0, 10, 20, 50, 80)]
    near(rates, [0, 0.25e-3, 0.5e-3, 0.5 * (0.5e-3 + 0.5e-6), 0.5e-6], atol=1e-12)
    seen = set_up(monkeypatch, "finetune", model=model, recipe="transfer")
    assert all((g["momentum"], g["nesterov"], g["weight_decay"]) == (0.9, True, 0.0)
               for g in seen["optimizer"].param_groups)  # fmt: skip
    assert seen["loader"].transform.augment is None
    assert seen["schedule"](20, 1.0) == pytest.approx(0.1)


def test_smoothing_and_erasing_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"recipe": "small", "mixup": 0.0}
    images, labels = pictures(TEST, 4), torch.arange(4)
    answers = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    seen = set_up(monkeypatch, "finetune", **plain, smoothing=0.1)
    loss = seen["loss_of"](lambda _: answers, images, labels, 0)
    near(loss, F.cross_entropy(answers, labels, label_smoothing=0.1), rtol=1e-5)
    seen, shown = set_up(monkeypatch, "finetune", **plain, reprob=1.0), []
    seen["loss_of"](lambda x: shown.append(x) or answers, images.clone(), labels, 0)
    assert all((a != b).any() for a, b in zip(shown[0], images, strict=True))


def test_drop_path_drops_whole_samples() -> None:
    torch.manual_seed(0)
    x = distill_lite.drop_path(torch.ones(4000, 3, 2), 0.25)
    assert ((x == 0).flatten(1).all(1) | (x == 1 / 0.75).flatten(1).all(1)).all()
    assert x.mean().item() == pytest.approx(1, abs=0.04)


def test_recipes_of_each_model() -> None:
    """What differs from model to model, or is in no fixture; networks of section 2."""
    for recipe in ("published", "small"):
        for name, config in MODELS.items():
            cfg = distill_lite.configure("pretrain", model=name, recipe=recipe)
            assert cfg.mask_ratio == (0.4 if config.kind == "hiera" else 0.75), name
    decay = {name: distill_lite.configure("finetune", model=name).layer_decay for name in MODELS}
    assert decay == dict.fromkeys(MODELS, 0.85) | {"vit_small": 0.75}
    assert distill_lite.configure("finetune", recipe="rpe").rpe == "block"
    cfg = distill_lite.configure("finetune")
    assert (cfg.class_distill, cfg.class_weight, cfg.temperature) == ("hard", 0.5, 1.0)
    cfg = distill_lite.configure("analyse")
    assert (cfg.images, cfg.batch_size) == (1152, 128)
    usual = ModelConfig()
    assert (usual.decode_depth, usual.attn_weight, usual.hidden_weight) == (8, 1.0, 1.0)
    assert usual.attn_adapter and usual.hidden_adapter and usual.norm_pix_loss
    networks = {  # width, depths, heads; decoder: width, depth, heads
        "vit_tiny": (192, (12,), 12, 96, 1, 3), "vit_small": (384, (12,), 12, 192, 1, 6),
        "vit_base": (768, (12,), 12, 512, 8, 16), "vit_large": (1024, (24,), 16, 512, 8, 16),
        "hiera_tiny": (46, (1, 2, 7, 2), 1, 96, 1, 3),
        "hiera_base": (96, (2, 3, 16, 3), 1, 512, 8, 16),
    }  # fmt: skip
    for name, wanted in networks.items():
        c = MODELS[name]
        assert (c.embed_dim, c.depths, c.num_heads, c.decoder_dim, c.decoder_depth,
                c.decoder_num_heads) == wanted  # fmt: skip
        assert (c.input_size, c.patch_size, c.mlp_ratio) == (224, 16, 4.0)


# ── analysis ────────────────────────────────────────────────────────────────────────────


def random_states(seed: int, layers: int = 3, n: int = 6) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(size=(n, 5, 4 + i))) for i in range(layers)]


def slow_hsic(k: np.ndarray, other: np.ndarray) -> float:
    """Eq. (5) of Song et al. by sums over indices that all differ."""
    n, total = len(k), np.zeros(3)
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            total[0] += k[i, j] * other[i, j]
            for q in range(n):
                if q in (i, j):
                    continue
                total[2] += k[i, j] * other[i, q]
                for r in range(n):
                    if r not in (i, j, q):
                        total[1] += k[i, j] * other[q, r]
    counts = np.cumprod([n * (n - 1), n - 2, n - 3])
    return total[0] / counts[0] + total[1] / counts[2] - 2 * total[2] / counts[1]


def test_hsic_by_its_definition() -> None:
    ours, theirs = random_states(1), random_states(2, 2)
    triple = distill_lite.hsic_triple(ours, theirs)
    grams = [[(x.flatten(1) @ x.flatten(1).T).numpy() for x in some] for some in (ours, theirs)]
    for i, a in enumerate(grams[0]):
        for j, b in enumerate(grams[1]):
            wanted = [slow_hsic(a, a), slow_hsic(a, b), slow_hsic(b, b)]
            near(triple[i, j], wanted, rtol=1e-9)


def test_cka_is_blind_to_rotation_and_scale() -> None:
    ours = random_states(3)
    turned = []
    for i, x in enumerate(ours):
        turn, _ = np.linalg.qr(np.random.default_rng(i).normal(size=(x[0].numel(),) * 2))
        turned.append((i + 2.5) * (x.flatten(1) @ torch.from_numpy(turn)).view_as(x))
    cka = distill_lite.minibatch_cka(distill_lite.hsic_triple(ours, turned))
    plain = distill_lite.minibatch_cka(distill_lite.hsic_triple(ours, ours))
    near(cka, plain, atol=1e-9)
    near(cka.diag(), np.ones(3), atol=1e-9)
    assert (cka - torch.eye(3)).abs().max() < 1


def test_entropy_and_distance_by_hand() -> None:
    model = fill(distill_lite.classifier(TEST, 3), 0)
    distances = distill_lite.token_distances(model, 32, 48)
    assert len(distances) == 3 and distances[0].shape == (6, 6)
    assert distances[0][0].tolist() == pytest.approx(
        [0, 16, 32, 16, math.hypot(16, 16), math.hypot(16, 32)])
    even, sharp = torch.zeros(2, 1, 6, 6), torch.full((2, 1, 6, 6), -1e4)
    sharp[..., torch.arange(6), (torch.arange(6) + 3) % 6] = 0  # the patch above or below
    (entropy,), (distance,) = distill_lite.attention_statistics(even, distances[0])
    assert entropy == pytest.approx(math.log(6), abs=1e-4)
    assert distance == pytest.approx(distances[0].mean().item(), rel=1e-5)
    (entropy,), (distance,) = distill_lite.attention_statistics(sharp, distances[0])
    assert entropy == pytest.approx(0, abs=1e-4) and distance == pytest.approx(16)


def test_distances_of_hiera() -> None:
    """Inside units of 8x8, then 4x4 tokens; queries are in the middle of what was merged."""
    model = distill_lite.classifier(HIERA, 3)
    found = distill_lite.token_distances(model, 64, 96)
    assert [tuple(x.shape) for x in found] == [
        (64, 64), (16, 64), (4, 16), (24, 24), (6, 24)]
    assert found[0][0, :4].tolist() == pytest.approx([0, 4, 4, math.hypot(4, 4)])
    assert found[1][0, :4].tolist() == pytest.approx([math.hypot(2, 2)] * 4)
    assert found[3].max() == pytest.approx(math.hypot(48, 80))


def test_examine_in_parts() -> None:
    """Statistics over all images, however many are looked at at once."""
    model = fill(distill_lite.classifier(replace(TEST, rpe="block"), 3), 0).eval()
    process = distill_lite.Process(0, 1, CPU, torch.float32)
    images = pictures(TEST, 5)
    (states, sums), (others, again) = (
        distill_lite.examine(model, images, process, part) for part in (2, 5))
    for a, b in zip([*states, sums], [*others, again], strict=True):
        near(a, b, atol=1e-5)
    assert len(states) == 4 and states[0].shape == (5, 16, 16) and sums.shape == (2, 3, 2)


def test_analyse(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Of one network, of two of other kinds; as many whole batches as were asked for."""
    flags = {"data_path": "drawn:22", "batch_size": 8}
    answer = run("analyse", weights=str(teachers["vit"]), output=str(tmp_path / "a.npz"), **flags)
    with np.load(tmp_path / "a.npz") as arrays:
        assert {k: v.shape for k, v in arrays.items()} == {
            "cka": (4, 4), "entropy": (3, 2), "distance": (3, 2)}
        assert arrays["cka"].diagonal() == pytest.approx(1)
        assert (arrays["entropy"] > 0).all() and (arrays["entropy"] <= math.log(16) + 1e-3).all()
    assert answer["images"] == 16 and answer["cka"] == [4, 4]
    assert (tmp_path / "a.png").exists()
    answer = run("analyse", weights=str(teachers["vit"]), other=str(teachers["hiera"]), images=12,
                 output=str(tmp_path / "b.npz"), **flags)  # fmt: skip
    assert answer["images"] == 8 and answer["cka"] == [4, 6]
    with np.load(tmp_path / "b.npz") as arrays:
        assert arrays["other_entropy"].shape == (5, 8)
        assert np.isnan(arrays["other_entropy"]).sum() == 5 * 8 - (1 + 2 + 4 + 4 + 8)
    for wrong, named in (({"output": "a.png"}, "a.png"), ({"data_path": "drawn:3"}, "four images"),
                         ({"batch_size": 3}, "--batch_size")):
        with pytest.raises(InputError, match=named):
            run("analyse", **{"weights": str(teachers["vit"])} | flags | wrong)


# ── published files, with --checkpoints DIR ─────────────────────────────────────────────


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "published" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--checkpoints")
        skip = pytest.mark.skip(reason="no --checkpoints DIR with published files")
        params = [pytest.param(None, marks=skip, id="none")]
        if folder is not None:
            params = [pytest.param(p, id=p.name) for p in sorted(folder.glob("*.pth*"))]
            assert params, f"no .pth or .pth.tar file in {folder}"
        metafunc.parametrize("published", params)


def test_published_file_loads_strictly(published: Path) -> None:
    """Files of pre-training must also beat a grey guess on photographs beside them, if any."""
    file = data.read_checkpoint(published)
    name, config = distill_lite.identify(file)
    assert (config.embed_dim, config.depths) == (MODELS[name].embed_dim, MODELS[name].depths)
    state = distill_lite.bare_names(file["model"])
    heads = [k for k in ("head.weight", "head.projection.weight") if k in state]
    if "decoder_pred.weight" not in state:
        if heads:
            load(partial(distill_lite.classifier, config, len(state[heads[0]])), published)
        else:
            load(partial(distill_lite.teacher_model, config), published)
        return
    model, said = load(partial(distill_lite.masked_model, config), published)
    assert said.endswith("all weights as they are")
    if photographs := [p for p in published.parent.iterdir() if p.suffix in data.SUFFIXES]:
        source, crop = data.ImageFiles(photographs), data.EvalCrop(config.input_size, "timm")
        pixels, *_ = next(data.eval_batches(source, crop, batch_size=8))
        ratio = 0.75 if config.kind == "vit" else distill_lite.HIERA_RATIO
        with torch.no_grad():
            loss, _ = model.eval()(data.normalize(pixels), drawn(config, len(pixels), ratio))
        assert loss < 0.9  # the mean colour of each patch scores 1 where patches are normalised


def test_plans_of_the_host_are_taken() -> None:
    """As arrays, before they were copied to a device; and so is a mask."""
    config = distill_lite.MODELS["test"]
    model = distill_lite.DistilledMAE(config, None, None)
    images = torch.zeros(2, 3, config.input_size, config.input_size)
    plan = distill_lite.draw_masks(config, 0.75, 2, (0, 0, 0, 1))
    there = distill_lite.to_device(plan, images.device)
    assert torch.equal(model(images, plan)[0], model(images, there)[0])


@pytest.mark.parametrize("head", ["head.weight", "fc_norm.weight", "head.projection.weight"])
def test_a_teacher_is_no_classifier(head: str, tmp_path: Path) -> None:
    """Its last blocks were changed for something else; --distill none is the way on."""
    config = replace(distill_lite.MODELS["test"], distill="attention")
    state = distill_lite.DistilledMAE(distill_lite.MODELS["test"]).model.state_dict()
    path = str(tmp_path / "teacher.pth")
    torch.save({"model": state}, path)
    distill_lite.load_teacher(path, config)
    torch.save({"model": state | {head: torch.ones(2)}}, path)
    with pytest.raises(InputError, match="it is fine-tuned, and a --teacher pre-trained"):
        distill_lite.load_teacher(path, config)
    with pytest.raises(InputError, match="--distill none goes on without"):
        distill_lite.load_teacher("", config)
