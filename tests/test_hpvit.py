"""HPViT and the MAE it is made from, against stored answers and what they are by definition.

Of HPViT no code was released: its fixtures (`status` derived) are released blocks put together as
the top of hpvit.py says. Those of MAE (`status` official) are the answers of released code.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hpvit
from common import augment
from common.data import InputError
from hpvit import MAE, HPViT, HPViTClassifier, ModelConfig, ShufflePlan
from tests.conftest import GOLDEN, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    check_statistics,
    near,
    norms,
    on_meta,
    same,
    take_step,
    trained,
    watched,
)

TEST, BASE = hpvit.MODELS["test"], hpvit.MODELS["hpvit_base"]
CPU = torch.device("cpu")
EPS = hpvit.LAYER_NORM_EPS


pytestmark = pytest.mark.usefixtures("threads")


def fill(model: nn.Module, seed: int, kept: tuple[str, ...] = ()) -> nn.Module:
    """The model with every parameter but those `kept` from the filling rule."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in kept:
                p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), seed)))
    return model


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Inside, `.float()` leaves float64 alone, so that a model can be run in it from end to end."""
    with pytest.MonkeyPatch.context() as patch:
        real = Tensor.float
        patch.setattr(Tensor, "float", lambda x: x if x.dtype is torch.float64 else real(x))
        yield


# ── golden files: what is compared ──────────────────────────────────────────────────────

OUTPUT, GRADIENT, STEP, DOUBLE = 1e-5, 1e-5, 1e-5, 1e-9  # spec, section 12


def filled_inputs(fixture: Fixture) -> Tensor:
    meta = fixture.meta
    return torch.from_numpy(filled_images(tuple(meta["images"]), meta["image_seed"]))


def check_state(fixture: Fixture, model: nn.Module) -> None:
    """Names and shapes of the state dict, number of parameters, eps."""
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == fixture.told("shapes", shapes)
    count = sum(p.numel() for p in model.parameters())
    assert count == fixture.told("parameters", count)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {EPS}


def check_features(fixture: Fixture, found: dict[str, Tensor]) -> None:
    """L2 norm and first 64 values of everything in `feature_names`."""
    names = [name.split(" ")[0] for name in fixture.told("feature_names", [])]
    found |= {name[:-10]: found[name[:-10]].mT for name in fixture.meta.get("feature_names", [])
              if name.endswith(" (B,C,H,W)")}  # fmt: skip
    if "features_l2" in fixture:
        ours = norms([found[name] for name in names])
        near(ours, fixture.take("features_l2"), rtol=1e-6, message="features_l2")
    if "features_head" in fixture:
        ours = [F.pad(x := found[name].flatten()[:64], (0, 64 - len(x))) for name in names]
        near(torch.stack(ours), fixture.take("features_head"), atol=OUTPUT, message="features_head")


def check_double(
    fixture: Fixture, model: nn.Module, answer: Callable[[nn.Module], tuple[Tensor, Tensor]]
) -> None:
    """(loss, output) and every gradient of the model in float64, then as it was before.

    Of a fixture whose positions are interpolated, which is done in float32 and so rounded as the
    CPU does it, four times its own difference between float32 and float64 is allowed.
    """
    spread = fixture.meta["float32_vs_float64"] if "stride" in fixture.meta else {}
    allowed = {"loss64": spread.get("loss_abs", 0.0), "pred64": spread.get("pred", {}).get(
        "max_abs", 0.0), "grad_norms64": spread.get("grad_norms_max_rel", 0.0)}  # fmt: skip
    allowed = {key: max(DOUBLE, 4 * value) for key, value in allowed.items()}
    stored = {k: fixture.arrays.get(k) for k in ("loss64", "pred64", "grad_norms64")}
    with doubles():
        loss, output = answer(model.double())
        loss.backward()
    slices = (slice(None), slice(None, None, 14), slice(None, 48))
    if "pred64_slice" in fixture:
        near(output[slices], fixture.take("pred64_slice"), atol=DOUBLE, message="pred64_slice")
    for key, ours in (("loss64", loss), ("pred64", output)):
        if stored[key] is not None:
            near(ours, stored[key], atol=allowed[key], message=key)
    if stored["grad_norms64"] is not None:
        ours = norms([p.grad for p in trained(fixture, model).values()])
        near(ours, stored["grad_norms64"], rtol=allowed["grad_norms64"], atol=DOUBLE,
             message="grad_norms64")  # fmt: skip
    model.zero_grad()
    model.float()


def check_training(
    fixture: Fixture, model: nn.Module, groups: list[dict], betas: tuple[float, float]
) -> None:
    """Gradients, and the norms of all parameters after one step."""
    check_gradients(fixture, model, GRADIENT)
    if "param_after_step" in fixture:
        parameters = trained(fixture, model)
        check_after_step(fixture, "param_after_step", parameters, take_step(model, groups, betas),
                         STEP)  # fmt: skip


# ── golden files: MAE pre-training ──────────────────────────────────────────────────────

FACTORIES = {"mae_vit_base_patch16": "plain_base", "vit_base_patch16": "plain_base"}


def config_of(meta: dict) -> ModelConfig:
    """Plain architecture from the `factory` or the `args` of a fixture."""
    if "factory" in meta:
        return hpvit.MODELS[hpvit.known_model(meta["factory"])]
    args = meta["args"]
    names = {
        "img_size": "input_size", "patch_size": "patch_size", "embed_dim": "embed_dim",
        "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio",
        "decoder_embed_dim": "decoder_dim", "decoder_depth": "decoder_depth",
        "decoder_num_heads": "decoder_num_heads",
    }  # fmt: skip
    given = {ours: args[theirs] for theirs, ours in names.items() if theirs in args}
    config = replace(BASE, **given)
    return hpvit.model_config(hpvit.plain_twin(config))


def check_pretraining(fixture: Fixture) -> None:
    meta = fixture.meta
    config = replace(config_of(meta), norm_pix_loss=meta["norm_pix_loss"])
    model = fill(MAE(config), meta["weight_seed"])
    check_state(fixture, model)
    images = filled_inputs(fixture)
    if "noise" in fixture:
        noise = fixture.take("noise")
        plan = hpvit.plan_shuffle(*hpvit.shuffle_patches(noise, meta["mask_ratio"]))
    else:
        plan = hpvit.plan_hidden(fixture.arrays["mask"])
    if "mask" in fixture:
        same(plan.restore >= plan.keep.shape[1], fixture.take("mask").astype(bool))
    plan = hpvit.to_device(plan, CPU)

    def whole(model: MAE, images: Tensor) -> Tensor:
        """(B, U, P), predictions of all patches, as released MAE makes them."""
        x = model.decode(model.encode(images, plan), plan)
        return model.decoder_pred(model.decoder_norm(x))[:, 1:]

    def answer(model: MAE) -> tuple[Tensor, Tensor]:
        loss, _ = model(images.double(), plan)
        return loss, whole(model, images.double()).detach()

    check_double(fixture, model, answer)
    sites = {f"{kind}.{i}": (block, "out") for kind in ("blocks", "decoder_blocks")
             for i, block in enumerate(getattr(model, kind))}  # fmt: skip
    sites |= {"norm": (model.norm, "out"), "decoder_embed": (model.decoder_embed, "out")}
    with torch.no_grad(), watched(sites) as found:
        pred = whole(model, images)
    patches = hpvit.cut_patches(images, config.patch_size, config.patch_size)
    found["patch_embed"] = model.patch_embed(patches).detach()
    check_features(fixture, found)
    target = hpvit.patchify(images, config.patch_size)
    if config.norm_pix_loss:
        target, _, _ = hpvit.normalize_patches(target)
    for name, x in (("pred", pred), ("target", target)):
        if name in fixture:
            near(x, fixture.take(name), atol=OUTPUT, message=name)
        if f"{name}_slice" in fixture:
            near(x[:, ::14, :48], fixture.take(f"{name}_slice"), atol=OUTPUT, message=name)
        if f"{name}_stats" in fixture:
            mean, std, norm = fixture.take(f"{name}_stats")
            check_statistics(x, np.array([norm, mean, std]), 1e-6, name)
    fixture.arrays.pop("pred64", None)  # compared in float64
    loss, prediction = model(images, plan)
    near(prediction, hpvit.take(pred, plan.hidden), atol=OUTPUT)
    fixture.near("loss", loss, atol=OUTPUT)
    loss.backward()
    groups = hpvit.parameter_groups(model, 0.05, undecayed=())
    check_training(fixture, model, groups, (0.9, 0.95))


# ── golden files: classifiers, plain and hierarchical ───────────────────────────────────


def soft_targets(labels: list[int], classes: int, lam: float, smoothing: float) -> Tensor:
    smooth = F.one_hot(torch.tensor(labels), classes) * (1 - smoothing) + smoothing / classes
    return lam * smooth + (1 - lam) * smooth.flip(0)


def check_classifier(fixture: Fixture, model: HPViTClassifier, sites: dict) -> None:
    """All that a fixture holds of a filled classifier."""
    meta, images = fixture.meta, filled_inputs(fixture)
    target = soft_targets(meta["labels"], meta["num_classes"], meta["mixup_lambda"],
                          meta["label_smoothing"])  # fmt: skip
    if "soft_target" in fixture:
        stored = fixture.take("soft_target")
        near(target, stored, atol=1e-6)
        target = torch.from_numpy(stored)

    def answer(model: HPViTClassifier) -> tuple[Tensor, Tensor]:
        output = model(images.double())
        return F.cross_entropy(output, target.double()), output.detach()

    model.eval()
    check_double(fixture, model, answer)
    with watched(sites) as found:
        logits = model(images)
    if model.config.cls_token and not model.config.plain:  # maps are stored without it
        found |= {name: x[:, 1:] for name, x in found.items() if name.startswith("stage")}
    check_features(fixture, found)
    loss = F.cross_entropy(logits, target)
    fixture.near("pred", logits, atol=OUTPUT)
    fixture.near("loss", loss, atol=OUTPUT)
    loss.backward()
    groups = hpvit.parameter_groups(model, 0.05, model.config.depths, meta["layer_decay"])
    check_training(fixture, model, groups, (0.9, 0.999))


def check_plain(fixture: Fixture) -> None:
    meta = fixture.meta
    config = replace(config_of(meta), global_pool=meta["global_pool"])
    model = fill(HPViTClassifier(config, meta["num_classes"]), meta["weight_seed"])
    check_state(fixture, model)
    sites = {f"blocks.{i}": (block, "out") for i, block in enumerate(model.blocks)}
    sites |= {name: (getattr(model, name), "out") for name in ("patch_embed", "norm", "fc_norm")}
    check_classifier(fixture, model, sites)


PLAIN = {  # the least that a plain state dict is recognised by
    "cls_token": torch.zeros(1, 1, 4), "norm.weight": torch.ones(4), "norm.bias": torch.zeros(4),
    "patch_embed.proj.weight": torch.zeros(4, 3, 16, 16),
}  # fmt: skip


def check_hierarchical(fixture: Fixture) -> None:
    meta = fixture.meta
    config = hpvit.model_config(ModelConfig(
        meta["mae_grid"] * meta["patch"], meta["patch"], meta["embed_dim"], sum(meta["depths"]),
        meta["heads"], tuple(meta["depths"]), tuple(meta["windows"]), meta["stride"],
        patch_pad=meta["pad"], pool=meta["pool"], pool_kernel=meta["pool_kernel"],
        cls_token=meta["cls_token"],
    ))  # fmt: skip
    model = HPViTClassifier(config, meta["num_classes"])
    table = hpvit.sincos_table(config.embed_dim, meta["mae_grid"], meta["mae_grid"])[0]
    shape = tuple(side // config.patch_stride for side in meta["images"][2:])
    rows = torch.cat([table[: 1 if config.cls_token else 0], hpvit.stretch(table[1:], shape)])
    if shape == model.grid:  # what a checkpoint of MAE becomes
        same(hpvit.convert(PLAIN | {"pos_embed": table[None]}, config)["pos_embed"], rows[None])
    model.pos_embed, model.grid = nn.Parameter(rows[None]), shape
    fill(model, meta["weight_seed"], tuple(meta["kept"]))
    check_state(fixture, model)

    ends = np.cumsum(config.depths) - 1
    sites = {f"stage{i + 1}": (model.blocks[end], "out") for i, end in enumerate(ends)}
    sites |= {f"pools.{i}": (pool, "out") for i, pool in enumerate(model.pools)}
    sites |= {name: (getattr(model, name), "out") for name in ("patch_embed", "fc_norm")}
    if "stage_sizes" in fixture:
        with torch.no_grad():
            maps = model.maps(filled_inputs(fixture))
        same([x.shape[-2:] for x in maps], fixture.take("stage_sizes"))
    check_classifier(fixture, model, sites)


# ── golden files: tables, embeddings, recipes, invariants ───────────────────────────────


def check_tables(fixture: Fixture) -> None:
    """Position tables, and what becomes of them."""
    meta = fixture.meta
    dim, grid = meta["dim"], meta["grid"]
    tiny, table = hpvit.sincos_table(16, 4, 4)[0], hpvit.sincos_table(dim, grid, grid)[0]
    learned = torch.from_numpy(parameter("pos_embed", (1, 17, 16), 301))[0]

    def resized(table: Tensor, *shape: int) -> Tensor:
        return torch.cat([table[:1], hpvit.stretch(table[1:], shape)])

    whole = {
        "tiny_sincos": tiny, "tiny_interp": resized(tiny, 16, 16),
        "tiny_interp_rect": resized(tiny, 16, 24), "learned_interp": resized(learned, 16, 16),
    }  # fmt: skip
    for name, ours in whole.items():
        if name in fixture:
            near(ours[None], fixture.take(name), atol=2e-6, message=name)
    if "tiny_sincos64" in fixture:
        with doubles():
            near(hpvit.sincos_table(16, 4, 4)[0], fixture.take("tiny_sincos64"), atol=1e-12)
    for name in fixture.named("interp_") + fixture.named("sincos_"):
        _, *side, what = name.split("_")
        ours = resized(table, *2 * [int(side[0])]) if side else table
        stored = fixture.take(name)
        if what == "stats":
            check_statistics(ours, stored[[2, 0, 1]], 1e-6, name)
            continue
        rows = meta["arrays"][name].split("[")[1].split("]")[0].split(",")
        near(ours[[int(row) for row in rows]], stored, atol=2e-6, message=name)
    formula = hpvit.sincos_table(dim, grid, 56)[0, 1:]
    if "analytic_rows" in fixture:
        near(formula[[0, 1, 56, 1596, 3135]], fixture.take("analytic_rows"), atol=2e-6)
    if stored := fixture.told("bicubic_vs_analytic_abs_difference"):
        difference = (hpvit.stretch(table[1:], (56, 56)) - formula).abs().reshape(56, 56, -1)
        border = stored["border_tokens_excluded"]
        inner = difference[border:-border, border:-border]
        near([difference.max(), inner.max()], [stored["max"], stored["max_away_from_border"]],
             atol=2e-6)  # fmt: skip


def check_embeddings(fixture: Fixture) -> None:
    """Strides, paddings and kernels, tiny and full."""
    meta = fixture.meta
    size = meta["kernel"]
    for prefix, dim, side in (("tiny", 8, 32), ("full", 768, 224)):
        module = hpvit.PatchProjection(size, dim)
        weights = fill(module, 0)  # names differ: filled below as the fixture says
        seed = meta["weight_seed"]
        with torch.no_grad():
            for name, p in weights.proj.named_parameters(prefix="patch_embed.proj"):
                p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), seed)))
        images = torch.from_numpy(filled_images((1, 3, side, side), meta["image_seed"]))
        for name in fixture.named(f"{prefix}_"):
            if name in fixture:
                what = name.removeprefix(f"{prefix}_")
                part = next((p for p in ("_slice", "_stats") if what.endswith(p)), "")
                ours = embedded(module, images, what.removesuffix(part))
                stored = fixture.take(name)
                if part == "_stats":
                    check_statistics(ours, stored[[2, 0, 1]], 1e-6, name)
                    continue
                step = int(meta["arrays"][name].split("::")[1].split(",")[0]) if part else 1
                near(ours[0, :32, ::step, ::step] if part else ours, stored, atol=OUTPUT,
                     message=name)  # fmt: skip


def embedded(module: nn.Module, images: Tensor, how: str) -> Tensor:
    """(1, D, h, w), the patch embedding as the name of an array says."""
    size, side = module.proj.kernel_size[0], images.shape[-1]
    stride, pad = size, "center"
    weight = module.proj.weight
    if how.startswith("stride"):
        stride, pad = int(how[6]), how.split("_")[1]
    if how.startswith("kernel4"):
        stride = 4
        state = PLAIN | {"patch_embed.proj.weight": weight, "pos_embed": torch.zeros(1, 5, 4)}
        config = replace(BASE, input_size=8, patch_kernel="4sum")
        if how.endswith("blocksum"):
            weight = hpvit.convert(state, config)["patch_embed.proj.weight"]
        else:  # which no option of ours makes
            weight = F.interpolate(weight, (4, 4), mode="bicubic", align_corners=False)
        bias, module, size = module.proj.bias, hpvit.PatchProjection(4, len(weight)), 4
        module.proj.weight, module.proj.bias = nn.Parameter(weight), bias
    with torch.no_grad():
        if pad == "nopad":
            whole = hpvit.cut_patches(images, size, stride, "corner")
            count = side // stride
            kept = (side - size) // stride + 1
            whole = module(whole).reshape(1, count, count, -1)[:, :kept, :kept]
            return whole.permute(0, 3, 1, 2)
        x = module(hpvit.cut_patches(images, size, stride, pad))
    return x.reshape(1, side // stride, side // stride, -1).permute(0, 3, 1, 2)


def check_recipe(fixture: Fixture) -> None:
    meta = fixture.meta
    epochs, rates = [], []
    for s in fixture.told("schedules", {}).values():
        lr = s["blr"] * s["effective_batch"] / 256
        assert lr == pytest.approx(s["peak_lr"], rel=1e-12)
        warmup = s["warmup_epochs"]
        ours = [hpvit.lr_at(e, lr, 0.0, s["min_lr"], warmup, warmup, s["epochs"])
                for e in s["at_epoch"]]  # fmt: skip
        near(ours, s["lr"], rtol=1e-9, atol=1e-18)
        epochs, rates = epochs + s["at_epoch"], rates + s["lr"]
    for name, ours in (("epochs", epochs), ("lrs", rates)):
        if name in fixture:
            near(ours, fixture.take(name), rtol=1e-12)
    check_published(meta.get("schedules", {}))

    plain = on_meta(partial(HPViTClassifier, hpvit.MODELS["plain_base"], 1000))
    large = on_meta(partial(HPViTClassifier, hpvit.MODELS["plain_large"], 1000))
    conv = on_meta(partial(HPViTClassifier, replace(BASE, pool="conv"), 1000))
    for key, model, decay in (
        ("layer_map_base_0_65", plain, 0.65), ("layer_map_large_0_75_subset", large, 0.75),
        ("hpvit_layer_map_0_65_subset", conv, 0.65),
    ):  # fmt: skip
        groups = hpvit.parameter_groups(model, 0.05, model.config.depths, decay)
        check_groups(model, groups, fixture.told(key, {}), "subset" not in key)
    model = on_meta(partial(MAE, hpvit.MODELS["plain_base"]))
    groups = hpvit.parameter_groups(model, 0.05, undecayed=())
    stored = {k: [0, 1.0, v] for k, v in fixture.told("weight_decay_pretrain_base", {}).items()}
    check_groups(model, groups, stored, True)
    for key, stored in fixture.told("drop_path_per_block", {}).items():
        size, rate = key.split()
        config = hpvit.MODELS[f"hpvit_{size}"]
        assert hpvit.configure("finetune", model=f"hpvit_{size}").drop_path == float(rate)
        blocks = on_meta(partial(HPViT, config, float(rate))).blocks
        near([block.drop_path for block in blocks], stored, atol=1e-7)
    for stored in fixture.told("mixup_targets", {}).values():
        labels = torch.tensor([3, 7, 7])
        smooth = augment.smooth_one_hot(labels, 10, 0.1)
        near(0.7 * smooth + 0.3 * smooth.flip(0), stored, atol=1e-6)
    check_counts(fixture.told("parameter_counts", {}))


def check_published(schedules: dict) -> None:
    """The recipes of hpvit.py have the values of the stored schedules."""
    for name, s in schedules.items():
        command, _, size = name.removeprefix("mae_").partition("_")
        size = size if command == "finetune" else "base"
        for kind in ("hpvit", "plain"):
            cfg = hpvit.configure(command, model=f"{kind}_{size}")
            keys = ("blr", "warmup_epochs", "min_lr", *(("epochs",) if "1600" not in name else ()))
            assert {k: getattr(cfg, k) for k in keys} == {k: s[k] for k in keys}


def check_groups(
    model: nn.Module, groups: list[dict], stored: dict[str, list], complete: bool
) -> None:
    """name -> [layer id, lr_scale, weight decay] of all parameters, or of some."""
    by_id = {id(p): group for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert named.keys() == stored.keys() or not complete or not stored
    for name, (layer, scale, decay) in stored.items():
        group = by_id[id(named[name])]
        assert group["lr_scale"] == pytest.approx(scale, rel=1e-9), name
        assert group["weight_decay"] == decay, name
        if isinstance(model, HPViT):
            assert hpvit.layer_id(name, model.config.depths) == layer, name


def check_counts(stored: dict[str, int]) -> None:
    for key, count in stored.items():
        factory, *what = key.split(" ")
        config = hpvit.MODELS[hpvit.known_model(factory)]
        if factory.startswith("vit_"):
            config = replace(config, global_pool="global_pool=True" in what)
            model = on_meta(partial(HPViTClassifier, config, 1000))
            ours = sum(p.numel() for p in model.parameters())
        else:
            model = on_meta(partial(MAE, config))
            ours = {
                "all": sum(x.numel() for x in model.state_dict().values()),
                "trainable": sum(p.numel() for p in model.parameters()),
                "encoder": encoder_count(model),
            }[what[0]]  # fmt: skip
        assert ours == count, key


def encoder_count(model: MAE) -> int:
    return sum(v.numel() for k, v in model.state_dict().items()
               if not k.startswith(("decoder_", "mask_token")))  # fmt: skip


def check_invariants(fixture: Fixture) -> None:
    for key in ("plain_tiny", "plain_base"):
        case = fixture.told(key)
        config = config_of(case if "args" in case else {"factory": "vit_base_patch16"})
        model = HPViTClassifier(config, case["classes"]).eval()
        with torch.no_grad():
            model.pos_embed.copy_(hpvit.sincos_table(config.embed_dim, config.units, config.units))
        fill(model, case["weight_seed"], ("pos_embed",))
        images = torch.from_numpy(filled_images(tuple(case["images"]), case["image_seed"]))
        with torch.no_grad():
            near(model(images), fixture.take(f"{key}_logits"), atol=OUTPUT, message=key)
            with doubles():
                logits = model.double()(images.double())
            near(logits, fixture.take(f"{key}_logits64"), atol=DOUBLE, message=key)
    for side, sizes in fixture.told("stage_sizes", {}).items():
        config = hpvit.model_config(BASE, input_size=int(side))
        assert [[config.side(i)] * 2 for i in range(4)] == sizes
    keys = {k for k in on_meta(partial(MAE, BASE)).state_dict()
            if not k.startswith(("decoder_", "mask_token"))}  # fmt: skip
    assert keys == set(fixture.told("mae_encoder_keys", keys))
    fixture.told("invariants")  # each is a test of its own
    for name, stored in fixture.told("cost", {}).items():
        check_cost(name, stored)


def check_cost(name: str, stored: dict) -> None:
    """Parameters and multiply-adds of the network that a name tells, by an operation counter."""
    kind = "plain" if "plain" in name else "hpvit"
    config = hpvit.MODELS[f"{kind}_{'base' if name.startswith('ViT-B') else 'large'}"]
    changes = {"input_size": int(re.search(r"\b(224|512|1024)\b", name)[1])}
    if kind == "hpvit":
        depths, pool = re.search(r"\((.*)\) (\w+)", name).groups()
        window, kernel = (re.search(f"{word} (\\d+)", name) for word in ("window", "kernel"))
        window = int(window[1]) if window else 0
        changes |= {"depths": tuple(int(n) for n in depths.split(",")), "pool": pool,
                    "windows": (window, window, 0, 0)}  # fmt: skip
        changes |= {"pool_kernel": int(kernel[1])} if kernel else {}
    model = on_meta(partial(HPViTClassifier, hpvit.model_config(config, **changes), 1000))
    if "parameters" in stored:
        assert sum(p.numel() for p in model.parameters()) == stored["parameters"], name
    macs, attention = multiply_adds(model, changes["input_size"])
    assert macs / 1e9 == pytest.approx(stored["gmacs"], abs=6e-4), name
    if "attention_gmacs" in stored:
        assert attention / 1e9 == pytest.approx(stored["attention_gmacs"], abs=6e-4), name


def multiply_adds(model: HPViTClassifier, size: int) -> tuple[int, int]:
    """Those of a forward pass on one image, and those of products of queries, keys and values."""
    inside = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inside.append(q.shape[:-1].numel() * k.shape[-2] * (k.shape[-1] + v.shape[-1]))
        return torch.empty_like(q)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", counted)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2 + sum(inside), sum(inside)


# ── golden files: one test each ─────────────────────────────────────────────────────────

KINDS = {  # by what `meta` has
    "mask_ratio": check_pretraining, "global_pool": check_plain, "stride": check_hierarchical,
    "definitions": check_embeddings, "bicubic_vs_analytic_abs_difference": check_tables,
    "schedules": check_recipe, "plain_tiny": check_invariants,
}  # fmt: skip


def golden_cases() -> list:
    params = []
    for path in golden_files("hpvit"):
        meta = Fixture(path).meta
        large = "factory" in meta or meta.get("embed_dim", 0) > 500
        marks = [pytest.mark.slow] if large else []
        params.append(pytest.param(path, marks=marks, id=path.stem))
    return params


@pytest.mark.parametrize("path", golden_cases())
def test_golden_hpvit(path: Path) -> None:
    fixture = Fixture(path)
    checks = [check for key, check in KINDS.items() if key in fixture.meta]
    assert len(checks) == 1, "no check for such a fixture"
    checks[0](fixture)
    fixture.finish()


# ── what it is by definition: pre-training ──────────────────────────────────────────────


def pictures(config: ModelConfig, batch: int = 2, seed: int = 5) -> Tensor:
    return torch.from_numpy(filled_images((batch, 3, config.input_size, config.input_size), seed))


def plan_of(config: ModelConfig, batch: int = 2, ratio: float = 0.6, seed: int = 0) -> ShufflePlan:
    return hpvit.to_device(hpvit.draw_shuffle(config, ratio, batch, (seed,)), CPU)


def mask_of(plan: ShufflePlan) -> Tensor:
    return plan.restore >= plan.keep.shape[1]


def mae(config: ModelConfig = TEST, seed: int = 1) -> MAE:
    return fill(MAE(config), seed)


def attention_by_hand(block: nn.Module, x: Tensor) -> Tensor:
    """A pre-norm block on (N, C), head by head."""
    attn, width = block.attn, x.shape[1] // block.attn.num_heads
    y = F.layer_norm(x, x.shape[1:], block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = attn.qkv(y).chunk(3, dim=1)
    heads = []
    for at in range(0, x.shape[1], width):
        part = slice(at, at + width)
        heads.append((q[:, part] @ k[:, part].T / width**0.5).softmax(1) @ v[:, part])
    x = x + attn.proj(torch.cat(heads, dim=1))
    y = F.layer_norm(x, x.shape[1:], block.norm2.weight, block.norm2.bias, 1e-6)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(y)))


def test_pretraining_by_hand() -> None:
    """Loss and predictions, image by image, patch by patch."""
    config, images = TEST, pictures(TEST)
    model, plan = mae(), plan_of(TEST)
    loss, prediction = model(images, plan)
    errors, size = [], config.patch_size
    for image, keep, hidden, ours in zip(images, plan.keep, plan.hidden, prediction, strict=True):
        squares = [image[:, i : i + size, j : j + size] for i in range(0, 64, size)
                   for j in range(0, 64, size)]  # fmt: skip
        tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
        for u in keep:
            token = model.patch_embed.proj(squares[u][None])[0, :, 0, 0]
            tokens.append(token + model.pos_embed[0, 1 + u])
        x = torch.stack(tokens)
        for block in model.blocks:
            x = attention_by_hand(block, x)
        x = model.decoder_embed(model.norm(x))
        full = model.mask_token[0].repeat(1 + len(squares), 1)
        full[0] = x[0]
        for u, token in zip(keep, x[1:], strict=True):
            full[1 + u] = token
        x = full + model.decoder_pos_embed[0]
        for block in model.decoder_blocks:
            x = attention_by_hand(block, x)
        for u, row in zip(hidden, ours, strict=True):
            near(row, model.decoder_pred(model.decoder_norm(x[1 + u])), atol=1e-5)
            pixels = squares[u].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors += (row - target).square().tolist()
    near(loss, np.mean(errors), rtol=1e-5)


def test_mask_is_an_argument() -> None:
    """As bool array or tensor, in any order, the same loss; each image has its own."""
    model, images, plan = mae(), pictures(TEST), plan_of(TEST)
    loss, prediction = model(images, plan)
    mask = mask_of(plan)
    assert mask[0].tolist() != mask[1].tolist() and mask.sum(1).tolist() == [10, 10]
    for given in (mask, mask.numpy()):
        other, sorted_prediction = model(images, given)
        near(other, loss, rtol=1e-6)
        order = plan.hidden.argsort(1)
        near(sorted_prediction, hpvit.take(prediction, order), atol=1e-5)
    plain = replace(TEST, norm_pix_loss=False)
    raw, prediction = mae(plain)(images, plan)
    target = hpvit.take(hpvit.patchify(images, 16), plan.hidden)
    near(raw, (prediction - target).square().mean(), rtol=1e-6)


def test_wrong_masks_are_refused() -> None:
    model, images = mae(), pictures(TEST)
    mask = mask_of(plan_of(TEST))
    uneven = mask.clone()
    uneven[0, mask[0].nonzero()[0]] = False
    for wrong in (uneven, torch.ones_like(mask), torch.zeros_like(mask), mask[:1], mask[:, :9]):
        with pytest.raises(ValueError, match=r"mask"):
            model(images, wrong)
    with pytest.raises(ValueError, match=r"not 64 px"):
        model(torch.zeros(2, 3, 32, 64), mask)
    for ratio in (0.0, 1.0, 0.99):
        with pytest.raises(InputError, match=r"--mask_ratio"):
            hpvit.draw_shuffle(TEST, ratio, 2, (0,))


def test_hidden_pixels_do_not_change_what_is_visible() -> None:
    model, images, plan = mae(), pictures(TEST), plan_of(TEST)
    before = model.encode(images, plan)
    hidden = mask_of(plan).reshape(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(hidden, torch.randn_like(images), images)
    assert not torch.equal(other, images)
    assert torch.equal(model.encode(other, plan), before)


def test_masks_are_a_function_of_the_seed() -> None:
    same(*(hpvit.draw_shuffle(BASE, 0.75, 4, (0, 3, 1, 1)).keep for _ in "ab"))
    keeps = [hpvit.draw_shuffle(BASE, 0.75, 4, (0, step, rank)).keep
             for step in (0, 1) for rank in (0, 1)]  # fmt: skip
    assert len({keep.tobytes() for keep in keeps}) == 4
    assert keeps[0].shape == (4, 49)
    plan = hpvit.draw_shuffle(BASE, 0.75, 4, (0,))
    both = np.concatenate([plan.keep, plan.hidden], axis=1)
    same(np.take_along_axis(both, plan.restore, 1), np.tile(np.arange(196), (4, 1)))


def test_initial_weights_of_pretraining() -> None:
    torch.manual_seed(0)
    model = MAE(replace(BASE, depth=1, depths=(1,), windows=(0,), decoder_depth=1))
    for name, p in model.named_parameters():
        bound, what = 1.0, name.rsplit(".", 1)[-1]
        if "norm" in name:
            assert (p == (1 if what == "weight" else 0)).all(), name
        elif name.endswith("token"):
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
        elif name == "patch_embed.proj.bias":
            assert 0 < p.abs().max() <= 768**-0.5, name
        elif what == "bias":
            assert (p == 0).all(), name
        else:
            fan_out, fan_in = p.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.99 * bound < p.abs().max() <= bound, name


# ── what it is by definition: the fourteen invariants of the conversion ─────────────────


def classifier(config: ModelConfig = TEST, seed: int = 3, classes: int = 5) -> HPViTClassifier:
    return fill(HPViTClassifier(config, classes), seed).eval()


def with_weights(model: nn.Module, config: ModelConfig, **changes: object) -> HPViTClassifier:
    """The classifier of a changed config with the same weights, as far as both have them."""
    other = HPViTClassifier(hpvit.model_config(config, **changes), model.head.out_features).eval()
    own = other.state_dict()
    other.load_state_dict(own | {k: v for k, v in model.state_dict().items() if k in own})
    return other


def test_1_plain_network_is_a_plain_vit() -> None:
    """By hand here; against released code: the fixtures mae_classifier_* and invariants."""
    config = hpvit.plain_twin(TEST)
    images = pictures(config)
    for pooled in (True, False):
        model = classifier(replace(config, global_pool=pooled))
        for image, ours in zip(images, model(images), strict=True):
            x = model.patch_embed.proj(image[None])[0].flatten(1).T
            x = torch.cat([model.cls_token[0], x]) + model.pos_embed[0]
            for block in model.blocks:
                x = attention_by_hand(block, x)
            x = model.fc_norm(x[1:].mean(0)) if pooled else model.norm(x)[0]
            near(ours, model.head(x), atol=1e-5)


def test_2_stages_without_pools_are_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TEST, windows=(0, 0, 0))
    model = classifier(config)
    one = with_weights(model, config, depths=(3,), windows=(0,))
    monkeypatch.setattr(HPViT, "shrink", lambda self, x, shape, pool: (x, shape))
    assert torch.equal(model(pictures(config)), one(pictures(config)))


def embedding(images: Tensor, stride: int, pad: str, size: int = 16) -> Tensor:
    """(B, C, h, w) by the module of the network."""
    module = fill(hpvit.PatchProjection(size, 8), 2)
    with torch.no_grad():
        x = module(hpvit.cut_patches(images, size, stride, pad))
    return x.mT.unflatten(2, [side // stride for side in images.shape[2:]])


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_3_corner_padding_keeps_the_plain_tokens(stride: int) -> None:
    images = torch.randn(2, 3, 64, 96)
    whole, step = embedding(images, stride, "corner"), 16 // stride
    near(whole[:, :, ::step, ::step], embedding(images, 16, "corner"), atol=1e-6)


@pytest.mark.parametrize(("stride", "grid"), [(4, 56), (8, 28), (16, 14)])
def test_4_center_padding_is_that_of_a_padded_convolution(stride: int, grid: int) -> None:
    images, conv = torch.randn(1, 3, 224, 224), fill(hpvit.PatchProjection(16, 8), 2).proj
    ours = embedding(images, stride, "center")
    assert ours.shape == (1, 8, grid, grid)
    padding = (16 - stride) // 2
    near(ours, F.conv2d(images, conv.weight, conv.bias, stride, padding), atol=1e-5)


@pytest.mark.parametrize("pad", ["center", "corner"])
def test_5_rolling_by_a_stride_shifts_by_a_token(pad: str) -> None:
    images = torch.randn(1, 3, 64, 64)
    moved = embedding(images.roll((4, 4), (2, 3)), 4, pad)[:, :, 1:, 1:]
    still = embedding(images, 4, pad)[:, :, :-1, :-1]
    inner = (..., slice(3, -3), slice(3, -3))
    near(moved[inner], still[inner], atol=1e-6)


def test_6_summed_kernel_embeds_the_enlarged_image() -> None:
    config = hpvit.model_config(TEST, patch_kernel="4sum")
    plain, images = mae(), pictures(TEST)
    state = hpvit.convert(plain.state_dict(), config)
    weight = state["patch_embed.proj.weight"]
    assert weight.shape == (16, 3, 4, 4) and config.kernel == 4
    large = F.interpolate(images, scale_factor=4, mode="nearest")
    wanted = plain.patch_embed(hpvit.cut_patches(large, 16, 16))
    bias = plain.patch_embed.proj.bias
    near(F.conv2d(images, weight, bias, 4).flatten(2).mT, wanted, atol=1e-5)
    model = with_weights(classifier(config), config)
    assert model.patch_embed.proj.weight.shape == weight.shape
    assert [x.shape[-1] for x in model.maps(images)] == [16, 8, 4]


def test_7_average_of_a_constant_map() -> None:
    x = torch.randn(2, 1, 1, 8).expand(2, 6, 4, 8)
    assert torch.equal(hpvit.AveragePool()(x), x[:, :3, :2])
    x = torch.randn(2, 6, 4, 8)
    wanted = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    near(hpvit.AveragePool()(x), wanted, atol=1e-6)


@pytest.mark.parametrize("pool", ["dwconv", "conv"])
def test_8_convolutions_begin_as_averages(pool: str) -> None:
    images = pictures(TEST)
    average = classifier()
    near(with_weights(average, TEST, pool=pool)(images), average(images), atol=1e-5)
    other = with_weights(average, TEST, pool=pool, pool_init="default")(images)
    assert (other - average(images)).abs().max() > 1e-2
    config = hpvit.model_config(TEST, pool=pool, pool_kernel=3)
    x = torch.randn(2, 8, 6, config.embed_dim)
    wanted = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1, count_include_pad=True)
    near(hpvit.make_pool(config)(x), wanted.permute(0, 2, 3, 1), atol=1e-6)


def test_9_windows_as_large_as_the_map_are_global() -> None:
    model, images = classifier(replace(TEST, windows=(0, 0, 0))), pictures(TEST)
    for windows in ((16, 8, 4), (99, 99, 99)):
        assert torch.equal(with_weights(model, TEST, windows=windows)(images), model(images))
    assert not torch.equal(with_weights(model, TEST, windows=(15, 8, 4))(images), model(images))


def test_10_maps_are_of_a_quarter_to_a_thirty_second() -> None:
    model = HPViT(hpvit.model_config(TEST, depth=4, depths=(1, 1, 1, 1), windows=(6, 4, 0, 0)))
    assert model.strides == [4, 8, 16, 32] and model.channels == [16] * 4
    for height, width in ((64, 64), (96, 64), (32, 128)):
        maps = model.maps(torch.zeros(1, 3, height, width))
        assert [x.shape for x in maps] == [(1, 16, height // s, width // s) for s in model.strides]


COUNTS = {  # spec, 2.1 and 2.3
    ("hpvit_base", "avg", 2): 88_824_040, ("hpvit_base", "dwconv", 2): 88_835_560,
    ("hpvit_base", "dwconv", 3): 88_847_080, ("hpvit_base", "conv", 2): 95_904_232,
    ("hpvit_base", "conv", 3): 104_751_592, ("hpvit_large", "avg", 2): 307_335_144,
    ("hpvit_large", "dwconv", 2): 307_350_504, ("hpvit_large", "dwconv", 3): 307_365_864,
    ("hpvit_large", "conv", 2): 319_921_128, ("hpvit_large", "conv", 3): 335_649_768,
    ("hpvit_huge", "avg", 2): 635_729_640, ("plain_base", "avg", 2): 86_567_656,
    ("plain_large", "avg", 2): 304_326_632, ("plain_huge", "avg", 2): 632_045_800,
}  # fmt: skip
COSTS = {  # G multiply-adds of spec, 1.2, 2.1 and 2.3, at 224 px; windows 14 but where said
    "hpvit_base": 69.08, "hpvit_base_light": 43.05, "hpvit_large": 151.32, "hpvit_huge": 265.12,
    "plain_base": 17.56, "plain_large": 61.55, "plain_huge": 167.30,
}  # fmt: skip


def test_11_parameter_counts() -> None:
    for (name, pool, kernel), count in COUNTS.items():
        config = hpvit.model_config(hpvit.MODELS[name], pool=pool, pool_kernel=kernel)
        model = on_meta(partial(HPViTClassifier, config, 1000))
        assert sum(p.numel() for p in model.parameters()) == count, (name, pool, kernel)
    for size, count, trained_count in (
        ("base", 111_907_840, 111_655_680), ("large", 329_541_888, 329_239_296),
        ("huge", 657_074_508, 656_613_964),
    ):  # fmt: skip
        model = on_meta(partial(MAE, hpvit.MODELS[f"hpvit_{size}"]))
        assert sum(x.numel() for x in model.state_dict().values()) == count
        assert sum(p.numel() for p in model.parameters()) == trained_count
    large = on_meta(partial(HPViTClassifier, hpvit.model_config(BASE, input_size=512), 1000))
    assert sum(p.numel() for p in large.parameters()) == 98_998_504


@pytest.mark.parametrize("name", COSTS)
def test_11_cost(name: str) -> None:
    """The formula of spec 1.2 and 2.3 and the operations of the network are the same number."""
    config = hpvit.MODELS[name]
    macs, attention = multiply_adds(on_meta(partial(HPViTClassifier, config, 1000)), 224)
    assert macs / 1e9 == pytest.approx(COSTS[name], abs=0.006)
    dim, formula = config.embed_dim, 0
    for stage, (depth, window) in enumerate(zip(config.depths, config.windows, strict=True)):
        side = config.side(stage)
        tokens = side**2 + config.cls_token
        attending = min(window or side, side) ** 2 + config.cls_token
        formula += depth * tokens * (12 * dim**2 + 2 * attending * dim)
    formula += 3 * config.kernel**2 * dim * config.side(0) ** 2 + 1000 * dim
    assert macs == formula
    assert 0 < attention < macs


def converted(config: ModelConfig, state: dict, classes: int = 5) -> tuple[HPViTClassifier, str]:
    file = {"model": state, "args": {}}
    return hpvit.load_weights(partial(HPViTClassifier, config, classes), "file", file, True)


@pytest.mark.parametrize("cls_token", [False, True])
def test_12_conversion_uses_drops_and_makes(cls_token: bool) -> None:
    """Key sets of spec 7.3, of ViT-B by names and of a small network by values."""
    changes = {"cls_token": True, "windows": (0, 0, 0, 0)} if cls_token else {}
    config = hpvit.model_config(BASE, pool="dwconv", **changes)
    encoder = {k: v for k, v in on_meta(partial(MAE, BASE)).state_dict().items()
               if not k.startswith(("decoder_", "mask_token"))}  # fmt: skip
    assert len(encoder) == 150
    own = on_meta(partial(HPViTClassifier, config, 1000)).state_dict().keys()
    dropped = {"norm.weight", "norm.bias"} | (set() if cls_token else {"cls_token"})
    made = {f"{part}.{kind}" for part in ("fc_norm", "head", "pools.0", "pools.1", "pools.2")
            for kind in ("weight", "bias")}  # fmt: skip
    assert encoder.keys() - own == dropped and own - encoder.keys() == made
    assert len(encoder.keys() & own) == (148 if cls_token else 147)
    with torch.device("meta"):
        assert hpvit.convert(encoder, config).keys() == own - made

    small = replace(TEST, windows=(0, 0, 0), cls_token=cls_token)
    plain = mae()
    model, said = converted(small, plain.state_dict())
    state, own = plain.state_dict(), model.state_dict()
    assert "new: fc_norm; the head starts fresh" in said
    assert "positions from a table of 17 to" in said
    for key in own.keys() - {"pos_embed"} - {k for k in own if k.startswith(("fc_norm", "head"))}:
        assert torch.equal(own[key], state[key]), key
    assert (model.fc_norm.weight == 1).all() and (model.fc_norm.bias == 0).all()
    assert 0 < model.head.weight.abs().max() < 2e-4 and (model.head.bias == 0).all()
    table = hpvit.stretch(state["pos_embed"][0, 1:], (16, 16))
    near(model.pos_embed[0, int(cls_token) :], table, atol=0)
    if cls_token:
        assert (model.pos_embed[0, 0] == 0).all()


def test_13_the_same_grid_is_left_alone() -> None:
    table = torch.randn(49, 8)
    assert hpvit.stretch(table, (7, 7)) is table
    plain = hpvit.plain_twin(TEST)
    state = hpvit.convert(mae().state_dict(), plain)
    assert torch.equal(state["pos_embed"], mae().pos_embed)
    again = hpvit.convert(classifier().state_dict(), TEST)  # converted before: nothing happens
    assert again.keys() == classifier().state_dict().keys()
    assert all(torch.equal(v, classifier().state_dict()[k]) for k, v in again.items())


def test_14_training_without_drop_path_is_evaluation() -> None:
    model, images = classifier(), pictures(TEST)
    assert torch.equal(model.train()(images), model.eval()(images))


# ── what it is by definition: network ───────────────────────────────────────────────────


def test_windows_that_need_padding_by_hand() -> None:
    """Each window by itself; what pads is zero behind the norm, and attended to."""
    attn = fill(hpvit.WindowAttention(16, 2), 4)
    x, (h, w), p = torch.randn(2, 7 * 10, 16), (7, 10), 4
    ours = attn(x, (h, w), p).reshape(2, h, w, 16)
    padded = torch.zeros(2, 8, 12, 16)
    padded[:, :h, :w] = x.reshape(2, h, w, 16)
    for i in range(0, 8, p):
        for j in range(0, 12, p):
            window = padded[:, i : i + p, j : j + p].reshape(2, p * p, 16)
            wanted = hpvit.Attention.forward(attn, window).reshape(2, p, p, 16)
            there = ours[:, i : i + p, j : j + p]
            near(there, wanted[:, : there.shape[1], : there.shape[2]], atol=1e-6)


NETWORKS = {
    "default": {}, "dense": {"pool": "conv", "pool_kernel": 3}, "depthwise": {"pool": "dwconv"},
    "token": {"windows": (0, 0, 0), "cls_token": True}, "corner": {"patch_pad": "corner"},
    "token_head": {"windows": (0, 0, 0), "cls_token": True, "global_pool": False},
    "summed": {"patch_kernel": "4sum"}, "stride_8": {"patch_stride": 8},
    "plain": {"patch_stride": 16, "depths": (3,), "windows": (0,), "cls_token": True},
}  # fmt: skip
each_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> ModelConfig:
    return hpvit.model_config(TEST, **NETWORKS[name])


@each_network
def test_every_parameter_learns(name: str) -> None:
    model = classifier(network(name)).train()
    F.cross_entropy(model(pictures(model.config)), torch.tensor([0, 3])).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_parameter_of_pretraining_learns() -> None:
    model = mae()
    model(pictures(TEST), plan_of(TEST))[0].backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_network
def test_maps_of_any_size(name: str) -> None:
    """Finite, of the right shapes; of one image what they are of that image among others."""
    model = classifier(network(name))
    unit = model.config.stride
    for height, width in ((64, 64), (4 * unit, 7 * unit), (unit, 2 * unit)):
        images = torch.randn(3, 3, height, width)
        with torch.no_grad():
            maps, alone = model.maps(images), model.maps(images[1:2])
        assert len(maps) == len(model.channels) == len(model.strides)
        for x, single, channels, stride in zip(
            maps, alone, model.channels, model.strides, strict=True
        ):
            assert x.shape == (3, channels, height // stride, width // stride)
            near(x[1:2], single, atol=1e-5)
    with pytest.raises(ValueError, match="must divide both sides"):
        model.maps(torch.zeros(1, 3, 64, 64 + unit // 2))


def test_a_class_token_cannot_be_in_windows() -> None:
    config = replace(TEST, windows=(16, 8, 0), cls_token=True)
    model = classifier(hpvit.model_config(config))
    assert model(pictures(TEST)).shape == (2, 5)
    with pytest.raises(ValueError, match="class token"):
        model.maps(torch.zeros(1, 3, 64, 128))


def test_maps_behind_chosen_blocks() -> None:
    model, images = classifier(network("plain")), pictures(TEST)
    first, last = model.maps(images, blocks=[1, 3])
    near(last, model.maps(images)[0], atol=0)
    assert first.shape == last.shape == (2, 16, 4, 4) and not torch.equal(first, last)
    early, late = classifier().maps(images, blocks=[1, 2])
    near(early, classifier().maps(images)[0], atol=0)
    near(late, classifier().maps(images)[1], atol=0)


def test_positions_of_another_size_learn() -> None:
    model = classifier()
    model.maps(torch.randn(1, 3, 96, 64))[-1].square().sum().backward()
    assert model.pos_embed.grad.ne(0).all(dim=2).float().mean() > 0.9
    square = model.positions((16, 16))
    assert square is not None and torch.equal(square, model.pos_embed[0])
    assert model.positions((8, 32)).shape == (256, 16)
    assert not torch.equal(model.positions((8, 32)), square)


def test_drop_path_drops_whole_images() -> None:
    """Of the last block, so that an image is one of two things: with its branches or without."""
    config = hpvit.model_config(TEST, depth=1, depths=(1,), windows=(6,))
    model = fill(HPViT(config, 0.0), 1).train()
    model.blocks[0].drop_path = 0.5
    model.blocks[0].mlp.fc2.weight.data.zero_()
    model.blocks[0].mlp.fc2.bias.data.zero_()
    images = pictures(config, 1).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    ((x, _),) = model.outputs(images, [1])
    kinds = torch.unique(x, dim=0)
    assert len(kinds) == 2


@pytest.mark.parametrize("name", ["default", "plain"])
def test_grad_checkpoint_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And recomputes the blocks of two stages, or all of a plain network and of MAE."""
    count, real = [], hpvit.checkpoint
    monkeypatch.setattr(hpvit, "checkpoint", lambda *a, **k: count.append(1) or real(*a, **k))
    model = classifier(network(name)).train()
    gradients = []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(pictures(TEST)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(count) == (2 if name == "default" else 3)
    model = mae().train()
    model.grad_checkpoint = True
    model(pictures(TEST), plan_of(TEST))[0].backward()
    assert len(count) == (2 if name == "default" else 3) + 4


def test_low_precision_stays_near() -> None:
    for model, given in ((classifier(), ()), (mae(), (plan_of(TEST),))):
        with torch.no_grad():
            whole = model(pictures(TEST), *given)
            with torch.autocast("cpu", torch.bfloat16):
                half = model(pictures(TEST), *given)
        if given:
            assert half[0].dtype == half[1].dtype == torch.float32
            near(half[0], whole[0], rtol=2e-2)
        else:
            near(half, whole, atol=0.1)


# ── options and their errors ────────────────────────────────────────────────────────────

WRONG = {  # spec, 2.4, and what else cannot be
    "are 9 blocks, the network has 12": {"depths": (2, 2, 3, 2)},
    "give 4, one a stage": {"windows": (14, 14, 0)},
    "would leave pixels out": {"patch_stride": 32, "depths": (12,), "windows": (0,)},
    "is centred on no cell": {"patch_stride": 7, "input_size": 224},
    "a class token sees whole maps": {"cls_token": True},
    "averages are of 2x2": {"pool_kernel": 3},
    "needs a class token": {"global_pool": False},
    "a multiple of 32, the nearest are 224 and 256": {"input_size": 240},
    "4 does not divide patches of 14": {"patch_size": 14, "patch_kernel": "4sum"},
    "a kernel of 4 px would": {"patch_kernel": "4sum", "patch_stride": 8},
    "no multiple of 7 heads": {"num_heads": 7},
    "here images are square": {"input_size": (224, 256)},
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_options_that_do_not_fit(said: str) -> None:
    with pytest.raises(InputError) as caught:
        hpvit.model_config(BASE, **WRONG[said])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_all_models_fit() -> None:
    for name, config in hpvit.MODELS.items():
        assert hpvit.model_config(config) == config
        assert config.plain == name.startswith("plain_")
        assert hpvit.plain_twin(config).plain
        hpvit.check_size(config.input_size, config.patch_size)
        on_meta(partial(MAE, config)), on_meta(partial(HPViT, config))
    assert hpvit.MODELS["hpvit_base_light"].depths == (1, 1, 8, 2)
    assert hpvit.configure(model="vit_base_patch16_224").model == "plain_base"
    assert hpvit.configure(model="mae_vit_huge_patch14").model == "plain_huge"


def test_options_reach_the_network() -> None:
    flags = (
        "finetune --model test --depths 1,1,1 --windows 0,0,0 --patch_pad corner --pool dwconv "
        "--pool_kernel 3 --pool_init default --pos sincos --cls_token --patch_stride 8"
    )
    _, cfg = hpvit.parse_config(flags.split())
    _, config = hpvit.choose_config(cfg, None)
    wanted = {"depths": (1, 1, 1), "windows": (0, 0, 0), "patch_pad": "corner", "pool": "dwconv",
              "pool_kernel": 3, "pool_init": "default", "pos": "sincos", "cls_token": True,
              "patch_stride": 8}  # fmt: skip
    assert {k: getattr(config, k) for k in wanted} == wanted


def test_positions_by_the_formula() -> None:
    config = hpvit.model_config(TEST, pos="sincos")
    model, _ = converted(config, MAE(TEST).state_dict())
    assert torch.equal(model.pos_embed, hpvit.sincos_table(16, 4, 16)[:, 1:])
    learned = MAE(TEST).state_dict() | {"pos_embed": torch.randn(1, 17, 16)}
    with pytest.raises(InputError, match="positions were learned"):
        converted(config, learned)
    converted(TEST, learned)


def test_rates_of_pools() -> None:
    """Those of the block before, or the head's; all parameters are in one group each."""
    model = classifier(replace(network("dense"), depth=3))
    for pool_lr, wanted in (("block", {0.65**3, 0.65**2}), ("full", {1.0})):
        cfg = hpvit.configure("finetune", model="test", pool_lr=pool_lr)
        groups = hpvit.tuning_groups(model, cfg)
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        assert len(scales) == sum(len(group["params"]) for group in groups)
        assert scales.keys() == {id(p) for p in model.parameters()}
        assert {scales[id(p)] for p in model.pools.parameters()} == wanted
        assert scales[id(model.head.weight)] == 1.0
        assert all(p.requires_grad for p in model.parameters())
    rates = [0.65 ** (13 - n) for n in (2, 4, 10)]
    names = [f"pools.{i}.weight" for i in range(3)]
    near([0.65 ** (13 - hpvit.layer_id(n, (2, 2, 6, 2))) for n in names], rates, rtol=1e-12)


# ── weights ─────────────────────────────────────────────────────────────────────────────


def official(kind: str, config: ModelConfig = TEST, seed: int = 1) -> dict[str, Tensor]:
    """A state dict as published: encoder, full, finetuned (mean), finetuned_token."""
    state = mae(config, seed).state_dict()
    if kind == "full":
        return state
    state = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}
    if kind.startswith("finetuned"):
        plain = replace(hpvit.plain_twin(config), global_pool=kind == "finetuned")
        return fill(HPViTClassifier(plain, 7), seed).state_dict()
    return state


def written(folder: Path, state: dict, **more: object) -> str:
    torch.save({"model": state, "epoch": 1, **more}, folder / "file.pth")
    return str(folder / "file.pth")


def opened(path: str, **flags: object) -> nn.Module:
    return hpvit.open_model(hpvit.configure("features", weights=path, device="cpu", **flags))[1]


@pytest.mark.parametrize("kind", ["encoder", "full", "finetuned", "finetuned_token"])
def test_official_files_load(kind: str, tmp_path: Path) -> None:
    """Whole, into the plain network; every kind but one into the hierarchical one, too."""
    state = official(kind)
    path = written(tmp_path, state)
    model = opened(path)  # plain_test, by its shapes
    own = model.state_dict()
    tuned = kind.startswith("finetuned")
    assert isinstance(model, HPViTClassifier) == tuned
    wanted = {k for k in state if not k.startswith(("decoder_", "mask_token"))}
    assert own.keys() == wanted and all(torch.equal(own[k], state[k]) for k in own)
    if kind == "finetuned_token":
        return
    model = opened(path, model="test")
    assert isinstance(model, HPViTClassifier) == tuned
    if tuned:
        assert torch.equal(model.head.weight, state["head.weight"])
        assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    assert model.pos_embed.shape == (1, 256, 16)


@pytest.mark.parametrize("kind", ["encoder", "full", "finetuned"])
@pytest.mark.parametrize("plain", [False, True])
def test_files_that_are_not_whole_are_refused(kind: str, plain: bool, tmp_path: Path) -> None:
    flags, state = {"model": "plain_test" if plain else "test"}, official(kind)
    for key in state:
        lost = {k: v for k, v in state.items() if k != key}
        if key.startswith(("decoder_", "mask_token")):
            continue  # not needed
        with pytest.raises(InputError, match=r"refused"):
            opened(written(tmp_path, lost), **flags)
    with pytest.raises(InputError, match=r"blocks\.3\.norm1\.bias is unexpected"):
        opened(written(tmp_path, state | {"blocks.3.norm1.bias": torch.zeros(16)}), **flags)
    with pytest.raises(InputError, match=r"extra is unexpected"):
        opened(written(tmp_path, state | {"extra": torch.zeros(1)}), **flags)


def test_full_files_reconstruct(tmp_path: Path) -> None:
    """With every key; at another size the fixed tables are made anew."""
    state = official("full")
    path = written(tmp_path, state)
    kind = partial(hpvit.configure, "reconstruct", weights=path, device="cpu", model="test")
    _, model, *_ = hpvit.open_model(kind(), whole=True)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    _, model, *_ = hpvit.open_model(kind(input_size=96), whole=True)
    assert torch.equal(model.pos_embed, hpvit.sincos_table(16, 6, 6))
    for key in state:
        lost = {k: v for k, v in state.items() if k != key}
        with pytest.raises(InputError, match=r"refused"):
            hpvit.open_model(kind(weights=written(tmp_path, lost)), whole=True)
    with pytest.raises(InputError, match=r"no decoder"):
        hpvit.open_model(kind(weights=written(tmp_path, official("encoder"))), whole=True)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_networks_are_recognised(size: str) -> None:
    """By shapes alone, as files of MAE tell nothing else."""
    config = hpvit.MODELS[f"plain_{size}"]
    full = on_meta(partial(MAE, config)).state_dict()
    encoder = {k: v for k, v in full.items() if not k.startswith(("decoder_", "mask_token"))}
    tuned = on_meta(partial(HPViTClassifier, config, 1000)).state_dict()
    for state in (full, encoder, tuned):
        assert hpvit.identify({"model": state, "args": {}}) == (f"plain_{size}", config)
    token = on_meta(partial(HPViTClassifier, replace(config, global_pool=False), 1000)).state_dict()
    assert hpvit.identify({"model": token, "args": {}})[1] == replace(config, global_pool=False)
    larger = replace(config, input_size=2 * config.input_size)
    state = on_meta(partial(HPViTClassifier, larger, 10)).state_dict()
    assert hpvit.identify({"model": state, "args": {}}) == (f"plain_{size}", larger)
    hierarchical = hpvit.MODELS[f"hpvit_{size}"]
    state = on_meta(partial(HPViTClassifier, hierarchical, 10)).state_dict()
    assert hpvit.identify({"model": state, "args": {}}) == (f"hpvit_{size}", hierarchical)


def run(command: str, **flags: object) -> dict:
    _, function = hpvit.COMMANDS[command]
    cpu = {} if command == "export" else {"device": "cpu", "num_workers": 0}
    return function(hpvit.configure(command, **cpu, **flags))


def trained_files(folder: Path, **flags: object) -> tuple[Path, Path]:
    """backbone.pth of a short pre-training and best.pth of a fine-tuning with `flags`."""
    both = {"model": "test", "batch_size": 4, "epochs": 1, "warmup_epochs": 0}
    run("pretrain", **both, data_path="drawn:8", output_dir=str(folder / "a"))
    weights = folder / "a" / "backbone.pth"
    run("finetune", **both, **flags, data_path="drawn:40", weights=str(weights),
        output_dir=str(folder / "b"))  # fmt: skip
    return weights, folder / "b" / "best.pth"


@each_network
def test_export_and_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What is exported answers as what was trained; plain networks in timm's names, too."""
    _, tuned = trained_files(tmp_path, **NETWORKS[name])
    images, before = pictures(TEST), opened(str(tuned))
    assert before.config == network(name)
    for naming in ("official", "timm"):
        path = str(tmp_path / f"{naming}.pth")
        if naming == "timm" and name not in ("plain",):
            with pytest.raises(InputError, match="--naming timm: no network of timm"):
                run("export", weights=str(tuned), output=path, naming=naming)
            continue
        capsys.readouterr()
        run("export", weights=str(tuned), output=path, naming=naming)
        said = capsys.readouterr().out
        assert ("global_pool='avg'" in said) == (name == "plain")
        after = opened(path)
        assert torch.equal(after(images), before(images))


def manifests() -> dict[str, dict]:
    """State-dict names and shapes of timm's ViTs, by model name."""
    with np.load(GOLDEN / "augment" / "timm_keys.npz") as arrays:
        models = json.loads(str(arrays["meta"]))["models"]
    return {name: models[name] for name in models if name.startswith(("vit_base", "vit_large"))}


@pytest.mark.parametrize("name", manifests())
def test_export_has_the_names_and_shapes_of_timm(name: str) -> None:
    config = hpvit.MODELS[hpvit.known_model(name.split(":")[0])]
    config = replace(config, global_pool="avg" in name)
    state = on_meta(partial(HPViTClassifier, config, 1000)).state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == manifests()[name]["shapes"]
    if "avg" not in name:  # without its head, that of a pre-training
        state = {k for k in on_meta(partial(MAE, config)).state_dict()
                 if not k.startswith(("decoder_", "mask_token"))}  # fmt: skip
        assert state | {"head.weight", "head.bias"} == manifests()[name]["shapes"].keys()


def test_one_pretraining_is_every_network(tmp_path: Path) -> None:
    """backbone.pth names the hierarchical network; a flag makes the plain one of it."""
    weights, _ = trained_files(tmp_path)
    encoder = hpvit.load_backbone(weights)
    assert encoder.config == TEST and encoder.strides == [4, 8, 16]
    norms_of = hpvit.load_backbone(weights, map_norm=True)
    for x in norms_of.maps(torch.randn(2, 3, 64, 96)):
        near(x.mean(1), np.zeros((2, *x.shape[2:])), atol=1e-5)
    plain = opened(str(weights), model="plain_test")
    state = hpvit.data.read_checkpoint(weights)["model"]
    own = plain.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)
    answer = run("export", weights=str(weights), naming="timm", output=str(tmp_path / "e.pth"),
                 model="plain_test")  # fmt: skip
    assert answer["tensors"] == len(state)
    assert torch.load(tmp_path / "e.pth", weights_only=True).keys() == state.keys()


def test_a_tuned_file_at_another_size(tmp_path: Path) -> None:
    """Fine-tuning goes on at 128 px: positions of the hierarchical map are interpolated."""
    _, tuned = trained_files(tmp_path)
    file = hpvit.data.read_checkpoint(tuned)
    config = hpvit.model_config(TEST, input_size=128)
    make = partial(HPViTClassifier, config, len(file["model"]["head.bias"]))
    model, said = hpvit.load_weights(make, str(tuned), file, True)
    assert said.endswith("positions from a table of 256 to 1024")
    table = hpvit.stretch(file["model"]["pos_embed"][0], (32, 32))
    assert torch.equal(model.pos_embed[0], table)
    with torch.no_grad():
        same_map = opened(str(tuned)).maps(torch.ones(1, 3, 128, 128))[0]
        near(model.eval().maps(torch.ones(1, 3, 128, 128))[0], same_map, atol=1e-5)


# ── commands ────────────────────────────────────────────────────────────────────────────


def test_pretraining_says_what_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for model, said in (("test", True), ("plain_test", False)):
        run("pretrain", model=model)
        assert ("the plain ViT that test is made from" in capsys.readouterr().out) == said
    with pytest.raises(InputError, match="a multiple of 16"):
        run("pretrain", model="test", input_size=72, patch_stride=2, depths=(3,), windows=(0,))


def test_pictures_show_what_is_visible() -> None:
    """Second column: grey where hidden; third: pasted where visible."""
    config = replace(TEST, norm_pix_loss=False)
    model, plan = mae(config), hpvit.draw_shuffle(config, 0.6, 2, (0,))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpvit.data, "draw_columns", lambda columns, labels: found.update(
            columns=columns, labels=labels))  # fmt: skip
        _, loss = hpvit.draw_reconstructions(model, pixels, plan)
    whole, seen, filled = found["columns"]
    assert found["labels"] == ("image", "visible", "reconstruction")
    hidden = mask_of(hpvit.to_device(plan, CPU)).reshape(2, 1, 4, 4)
    hidden = hidden.repeat_interleave(16, 2).repeat_interleave(16, 3).expand_as(whole)
    assert torch.equal(whole, hpvit.data.normalize(pixels))
    assert (seen[hidden] == 0).all() and torch.equal(seen[~hidden], whole[~hidden])
    assert torch.equal(filled[~hidden], whole[~hidden])
    near((filled - whole)[hidden].square().mean(), loss, rtol=1e-5)


def test_features_are_what_a_head_sees(tmp_path: Path) -> None:
    weights, tuned = trained_files(tmp_path)
    for path, flags in ((weights, {}), (tuned, {}), (weights, {"model": "plain_test"})):
        out = str(tmp_path / "f.npz")
        run("features", weights=str(path), data_path="drawn:3", output=out, **flags)
        encoder = hpvit.open_model(
            hpvit.configure("features", weights=str(path), device="cpu", **flags), head=False
        )[1]
        crop = hpvit.data.EvalCrop(64, "mae")
        source = hpvit.data.open_source("drawn:3")
        images, *_ = next(hpvit.data.eval_batches(source, crop, batch_size=3))
        with np.load(out) as stored, torch.no_grad():
            near(encoder(hpvit.data.normalize(images)), stored["features"], atol=1e-5)


RECIPES = {  # spec, sections 6 and 7.1
    "pretrain": {
        "batch_size": 4096 // 64, "epochs": 800, "warmup_epochs": 40, "blr": 1.5e-4, "min_lr": 0,
        "weight_decay": 0.05, "clip_grad": None, "crop_min": 0.2, "mask_ratio": 0.75,
        "accum_iter": 1,
    },
    "finetune": {
        "batch_size": 1024 // 32, "warmup_epochs": 5, "min_lr": 1e-6, "weight_decay": 0.05,
        "clip_grad": None, "crop_min": 0.08, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
        "reprob": 0.25, "aa": "rand-m9-mstd0.5-inc1", "ema": 0, "pool_lr": "block",
        "accum_iter": 1,
    },
}  # fmt: skip
BY_SIZE = {  # epochs, blr, layer decay, drop path of fine-tuning
    "base": (100, 5e-4, 0.65, 0.1), "large": (50, 1e-3, 0.75, 0.2), "huge": (50, 1e-3, 0.75, 0.3),
}  # fmt: skip
NETWORKS_OF_SPEC = {  # 2.1 and 2.2: pixels, patch, width, blocks, heads, depths
    "base": (224, 16, 768, 12, 12, (2, 2, 6, 2)), "large": (224, 16, 1024, 24, 16, (2, 2, 18, 2)),
    "huge": (224, 14, 1280, 32, 16, (2, 2, 26, 2)),
}  # fmt: skip


@pytest.mark.parametrize("size", BY_SIZE)
def test_the_published_recipe_and_network(size: str) -> None:
    for kind in ("hpvit", "plain"):
        for command, wanted in RECIPES.items():
            cfg = hpvit.configure(command, model=f"{kind}_{size}")
            assert {key: getattr(cfg, key) for key in wanted} == wanted
        values = (cfg.epochs, cfg.blr, cfg.layer_decay, cfg.drop_path)
        assert values == BY_SIZE[size]
        config, (*plain, depths) = hpvit.MODELS[f"{kind}_{size}"], NETWORKS_OF_SPEC[size]
        assert [config.input_size, config.patch_size, config.embed_dim, config.depth,
                config.num_heads] == plain  # fmt: skip
        assert (config.decoder_dim, config.decoder_depth, config.decoder_num_heads) == (512, 8, 16)
        assert (config.mlp_ratio, config.norm_pix_loss, config.global_pool) == (4, True, True)
    config = hpvit.MODELS[f"hpvit_{size}"]
    assert (config.depths, config.windows, config.patch_stride) == (depths, (14, 14, 0, 0), 4)
    assert (config.patch_pad, config.pool, config.pos) == ("center", "avg", "interp")
    light = hpvit.MODELS["hpvit_base_light"]
    assert light == replace(BASE, depths=(1, 1, 8, 2))


class Stop(Exception):
    """Raised where training would begin."""


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_training_is_set_up_as_published(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW, decay of tokens, schedule, drop path: what the loop is given."""
    seen = {}

    def stop(cfg: object, process: object, parts: dict, loader: object, args: dict,
             schedule: Callable, *_: object) -> None:  # fmt: skip
        seen.update(parts, loader=loader, schedule=schedule)
        raise Stop

    monkeypatch.setattr(hpvit, "train", stop)
    flags = {"drop_path": 0.3, "min_lr": 0.0} if command == "finetune" else {}
    with pytest.raises(Stop):
        run(command, model="test", data_path="drawn:2560", batch_size=256, epochs=8,
            warmup_epochs=2, blr=1e-3, **flags)  # fmt: skip
    model, optimizer = seen["model"], seen["optimizer"]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    of = {name: groups[id(p)] for name, p in model.named_parameters()}
    beta = 0.95 if command == "pretrain" else 0.999
    assert all(g["betas"] == (0.9, beta) and g["eps"] == 1e-8 for g in optimizer.param_groups)
    assert of["blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.05
    assert of["blocks.0.mlp.fc1.bias"]["weight_decay"] == 0
    if command == "pretrain":
        assert {of[k]["weight_decay"] for k in ("cls_token", "mask_token")} == {0.05}
        assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}
    else:
        assert of["pos_embed"]["weight_decay"] == 0
        assert of["pos_embed"]["lr_scale"] == pytest.approx(0.65**4)
        near([block.drop_path for block in model.blocks], [0, 0.15, 0.3], atol=1e-12)
    rates = [seen["schedule"](step, 0.5) for step in (0, 10, 20, 50, 80)]  # ten steps an epoch
    near(rates, [0, 0.25e-3, 0.5e-3, 0.25e-3, 0], atol=1e-12)


def test_initial_weights_of_the_classifier() -> None:
    """Truncated normal 0.02 for matrices, tokens and positions; embedding and pools apart."""
    torch.manual_seed(0)
    config = replace(BASE, input_size=64, depth=4, depths=(1, 1, 1, 1), windows=(0, 0, 0, 0),
                     pool="dwconv", cls_token=True)  # fmt: skip
    model = HPViTClassifier(config, 100)
    for name, p in model.named_parameters():
        what = name.rsplit(".", 1)[-1]
        if "norm" in name:
            assert (p == (1 if what == "weight" else 0)).all(), name
        elif name.startswith("pools"):
            assert (p == (0.25 if what == "weight" else 0)).all(), name
        elif name.startswith("patch_embed"):
            assert 0.99 * 768**-0.5 < p.abs().max() <= 768**-0.5, name
        elif what == "bias":
            assert (p == 0).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


def test_linear_probe_trains_the_head_on_plain_crops(tmp_path: Path) -> None:
    weights, tuned = trained_files(tmp_path, linear_probe=True, pool="dwconv", pool_lr="full")
    settings = hpvit.data.read_checkpoint(tuned)["args"]["settings"]
    keys = ("mixup", "cutmix", "smoothing", "reprob", "drop_path")
    assert [settings[key] for key in keys] == 5 * [0.0] and settings["aa"] == ""
    config = hpvit.model_config(TEST, pool="dwconv")
    before = hpvit.convert(hpvit.data.read_checkpoint(weights)["model"], config)
    after = hpvit.data.read_checkpoint(tuned)["model"]
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert after["head.bias"].abs().max() > 0


def test_sides_are_resized_as_in_mae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 256 before a crop of 224, and so in every command."""
    rules, real = [], hpvit.data.EvalCrop
    monkeypatch.setattr(hpvit.data, "EvalCrop", lambda size, rule: rules.append(rule) or real(
        size, rule))  # fmt: skip
    _, tuned = trained_files(tmp_path)
    run("evaluate", weights=str(tuned), data_path="drawn:40")
    assert len(rules) >= 3 and set(rules) == {"mae"}
    assert hpvit.data.eval_resize(224, "mae") == 256 and hpvit.data.eval_resize(384, "mae") == 384


def test_files_of_mae_as_a_hierarchical_backbone(tmp_path: Path) -> None:
    path = written(tmp_path, official("encoder"))
    assert hpvit.load_backbone(path).strides == [16]
    encoder = hpvit.load_backbone(path, model="test", input_size=None, map_norm=True)
    assert encoder.config == TEST and encoder.strides == [4, 8, 16]
    assert all(norm.eps == EPS for norm in encoder.map_norms)


def test_a_flag_chooses_the_pooled_feature_of_a_plain_file(tmp_path: Path) -> None:
    path = written(tmp_path, official("encoder"))
    images = pictures(TEST)
    token, mean = opened(path), opened(path, global_pool=True)
    assert torch.equal(opened(path, global_pool=False)(images), token(images))
    x = mean.outputs(images, [3])[0][0]
    near(mean(images), F.layer_norm(x[:, 1:].mean(1), (16,), eps=EPS), atol=1e-5)
    assert not torch.equal(mean(images), token(images))


def test_a_class_token_in_windows_is_one_sentence(tmp_path: Path) -> None:
    config = hpvit.model_config(TEST, windows=(16, 8, 0), cls_token=True)
    model = classifier(config)
    path = tmp_path / "file.pth"
    args = {"script": "hpvit", "model": "test", "config": vars(config)}
    torch.save({"model": model.state_dict(), "args": args}, path)
    opened(str(path), input_size=(64, 32))
    with pytest.raises(InputError, match="a class token sees whole maps"):
        opened(str(path), input_size=(64, 128))


def test_networks_that_cannot_be_are_refused_from_python() -> None:
    for wrong in ({"depths": (1, 1, 2)}, {"windows": (0, 0)}, {"patch_stride": 32},
                  {"patch_stride": 5}, {"cls_token": True}):  # fmt: skip
        with pytest.raises(InputError):
            HPViT(replace(TEST, **wrong))


def test_pools_are_recognised() -> None:
    config = hpvit.model_config(BASE, pool="conv", pool_kernel=3)
    state = on_meta(partial(HPViTClassifier, config, 10)).state_dict()
    assert hpvit.identify({"model": state, "args": {}}) == ("hpvit_base", config)


# ── published files, with --checkpoints DIR ─────────────────────────────────────────────


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "published" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--checkpoints")
        skip = pytest.mark.skip(reason="no --checkpoints DIR with mae_*.pth")
        params = [pytest.param(p, id=p.stem) for p in sorted((folder or Path()).glob("mae_*.pth"))]
        if folder is None or not params:
            params = [pytest.param(None, marks=skip, id="none")]
        metafunc.parametrize("published", params)


def test_published_file_loads_strictly(published: Path) -> None:
    """As what it is and made hierarchical; full ones also beat a grey guess on photographs."""
    file = hpvit.data.read_checkpoint(published)
    name, config = hpvit.identify(file)
    assert name.startswith("plain_") and config == replace(
        hpvit.MODELS[name], norm_pix_loss=config.norm_pix_loss)  # fmt: skip
    for model in (name, name.replace("plain_", "hpvit_")):
        opened(str(published), model=model)
    if "decoder_pred.weight" not in file["model"]:
        return
    raw = "visualize" in published.name
    flags = {"weights": str(published), "device": "cpu", "norm_pix_loss": not raw}
    model = hpvit.open_model(hpvit.configure("reconstruct", **flags), whole=True)[1]
    if photographs := [p for p in published.parent.iterdir()
                       if p.suffix in hpvit.data.SUFFIXES]:  # fmt: skip
        source, crop = hpvit.data.ImageFiles(photographs), hpvit.data.EvalCrop(
            config.input_size, "mae")  # fmt: skip
        pixels, *_ = next(hpvit.data.eval_batches(source, crop, batch_size=8))
        with torch.no_grad():
            loss = model(hpvit.data.normalize(pixels), plan_of(config, len(pixels), 0.75))[0]
        assert loss < (0.5 if raw else 0.9)


def test_an_exported_network_is_read_as_what_it_was(tmp_path: Path) -> None:
    """Whatever flags made it, and from a released file, which says nothing of itself."""
    path, images = written(tmp_path, official("encoder")), pictures(TEST)
    for number, flags in enumerate(
        ({"model": "test"}, {"model": "test", "depths": (1, 2), "windows": (0, 0)}, {})
    ):
        encoder = opened(path, **flags)
        out = str(tmp_path / f"{number}.pth")
        run("export", weights=path, output=out, **flags)
        again = opened(out)
        assert again.config == encoder.config
        assert torch.equal(again(images), encoder(images))
