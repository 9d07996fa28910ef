"""HPViT and the MAE it is made from, against stored answers and what they are by definition.

Of HPViT no code was released: its fixtures (`status` derived) are released blocks put together as
the top of hpvit.py says. Those of MAE (`status` official) are the answers of released code.
"""

from __future__ import annotations

import contextlib
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
from tests.conftest import THREADS, golden_files
from tests.filling import images as filled_images
from tests.filling import parameter
from tests.golden import (
    Fixture,
    check_after_step,
    check_gradients,
    check_statistics,
    near,
    norms,
    same,
    take_step,
    trained,
    watched,
)

TEST, BASE = hpvit.MODELS["test"], hpvit.MODELS["hpvit_base"]
CPU = torch.device("cpu")
EPS = hpvit.LAYER_NORM_EPS


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for small models: on a busy machine two wait for each other at every product."""
    before = torch.get_num_threads()
    if not THREADS:
        torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)


def fill(model: nn.Module, seed: int, kept: tuple[str, ...] = ()) -> nn.Module:
    """The model with every parameter but those `kept` from the filling rule."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in kept:
                p.copy_(torch.from_numpy(parameter(name, tuple(p.shape), seed)))
    return model


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without storage: names, shapes and counts only."""
    with torch.device("meta"):
        return make()


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
    """(loss, output) and every gradient of the model in float64, then as it was before."""
    stored = {k: fixture.arrays.get(k) for k in ("loss64", "pred64", "grad_norms64")}
    with doubles():
        loss, output = answer(model.double())
        loss.backward()
    slices = (slice(None), slice(None, None, 14), slice(None, 48))
    if "pred64_slice" in fixture:
        near(output[slices], fixture.take("pred64_slice"), atol=DOUBLE, message="pred64_slice")
    for key, ours in (("loss64", loss), ("pred64", output)):
        if stored[key] is not None:
            near(ours, stored[key], atol=DOUBLE, message=key)
    if stored["grad_norms64"] is not None:
        ours = norms([p.grad for p in trained(fixture, model).values()])
        near(ours, stored["grad_norms64"], rtol=DOUBLE, atol=DOUBLE, message="grad_norms64")
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
        plain = {"cls_token": table[None, :1], "pos_embed": table[None],
                 "patch_embed.proj.weight": model.patch_embed.proj.weight.detach()}  # fmt: skip
        same(hpvit.convert(plain, config)["pos_embed"], rows[None])
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
        state = {"patch_embed.proj.weight": weight, "pos_embed": torch.zeros(1, 4, 4)}
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
