"""MAE-Lite, D-MAE, D2-MAE and Hiera against the released code's answers, and against what they are
by definition."""

from __future__ import annotations

import math
import re
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

import distill_lite
from common import augment
from distill_lite import DistilledMAE, MaskedDecoder, ModelConfig, ShufflePlan
from tests.conftest import THREADS, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter, uniform
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    key_third,
    near,
    same,
    take_step,
    trained,
)

MODELS = distill_lite.MODELS
TEST, HIERA = MODELS["test"], MODELS["test_hiera"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for small models: on a busy machine two wait for each other at every product."""
    before = torch.get_num_threads()
    if not THREADS:
        torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)


def fill(model: nn.Module, seed: int, prefix: str = "") -> nn.Module:
    """The model with every trainable parameter from the filling rule; tables that do not learn
    are buffers here."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(parameter(prefix + name, tuple(p.shape), seed)))
    return model


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without storage: names, shapes and counts only."""
    with torch.device("meta"):
        return make()


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
        stored |= dict.fromkeys(told.get("decay", []), (told["weight_decay"], 1.0))
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
    shape = (config.input_size // config.stride,) * 2
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
            x = block(x)
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
    _, sums = distill_lite.examine(model, torch.cat(images), process)
    count = meta["full_batch"] * len(batches)
    for k, (name, scale) in enumerate((("entropy", 1.0), ("distance", 14 / 16))):
        compare(fixture, f"{name}_model", torch.stack([x[k] for x in sums]) / count * scale)


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
