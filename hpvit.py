"""HPViT: a plain ViT, pre-trained as a masked autoencoder, made hierarchical afterwards.

Xu, Zhang, Zhang, Tao: "Rethinking Hierarchies in Pre-trained Plain Vision Transformer", 2022,
arXiv 2211.01785. Its code was announced and never released; only the abstract says what it is. So
this is a first implementation, not a copy, and claims none of the paper's figures. Pre-training is
MAE: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
The method is this file, from "masking" to "model"; plain becomes hierarchical in `convert`.

The idea. Hierarchical networks need special machinery for masked pre-training. A plain ViT does
not: hidden patches are left out, and a quarter of the tokens costs a quarter. So pre-train a plain
ViT, or take one that was, and only then let the embedding move by 4 px instead of 16, and pool the
tokens between blocks: the same blocks, with the same weights, now go through maps of 1/4, 1/8,
1/16 and 1/32 of the image, and are fine-tuned as such. In pre-training each image has a mask of
its own: noise sorts its patches, the first quarter stays visible.

    x = W patch + b + position                                                            (1)
    x = x + proj(softmax(q k^T / sqrt(d)) v), q, k, v = linear(norm(x)), in windows or not (2)
    x = x + fc2(gelu(fc1(norm(x))))                                                       (3)
    x(i, j) = mean of x(2i..2i+1, 2j..2j+1), or a convolution of stride 2 of x            (4)
    t = (u - mean(u)) / sqrt(var(u) + 1e-6)            u the pixels of one patch          (5)
    loss = mean over hidden patches of (prediction - t)^2                                 (6)
    patch (i, j) = 16x16 px about the centre of cell (i, j) of 4x4 px, zeros outside      (7)
    position(i, j) = plain table, bicubic, at ((i + 1/2) / r - 1/2, (j + 1/2) / r - 1/2)  (8)

(1) to (3), (5) and (6) are MAE; (4), (7), (8) and the windows of (2) make it hierarchical. r is the
side of a patch over its stride, 16 / 4; (8) reads the table where (7) has the centre of the patch.
The variance of (5) is the unbiased one.

Data flow of ViT-B at 224 px. Stages count from 0, blocks and pools too.
    pre-training: images (B, 3, 224, 224) -> U = 196 patches of 16 px, V = 49 visible ones of them
    class token, 12 blocks, norm, Linear (B, 50, 512) -> mask tokens in their places (B, 197, 512)
    eight blocks (B, 197, 512) -> the hidden patches, norm, Linear         (B, 147, 768)
    fine-tuning: images (B, 3, 224, 224) -> a patch of 16 px every 4 px    (B, 3136, 768)
    stage 0, windows of 14x14, pool (B, 784, 768) -> stage 1, the same, pool (B, 196, 768)
    stage 2, pool (B, 49, 768) -> stage 3, mean, norm, Linear              (B, classes)

What is certain, by grade (`ModelConfig` grades its fields in these words):
  abstract: MAE pre-training of a plain ViT; stride 16 to 4; pools, convolutions or averages,
    between blocks; maps of 1/4 to 1/32; off-the-shelf weights. Width and blocks, then, stay.
  authors, their code for neighbouring problems: a kernel of 16 px as before, zeros around the image
    so that (7) is centred (ViTPose); windows of 14 in the stages of many tokens (ViTAEv2, ViTDet),
    padded right and bottom, the padding not masked: it takes its share of the softmax, with the
    biases as keys and values; no class token (ViTPose, ViTDet); a pool learns at the rate of the
    block before it (ViTDet).
  MAE, released: all of pre-training, bicubic (8), the head on the mean token, the recipes.
  ours, where nothing decides: pools after 2, 4 and 10 of 12 blocks (Swin's 2, 2, 6, 2; ViT-L
    2, 2, 18, 2), all of HPViT-H and light, averages by default, convolutions of 2x2 that begin as
    averages, the alternatives `4sum`, `corner`, `sincos`, `--pool_lr full`.
A reader of the abstract alone may want attention over the whole map everywhere: --windows 0,0,0,0.

Released MAE, and here: it predicts all patches and uses the hidden ones, here only these are
predicted. Kept: the bias of the embedding is drawn as PyTorch does, class and mask token decay in
pre-training, the class token not in fine-tuning, the last norm is dropped where the head is on the
mean token.

Letters: B batch, N tokens, V visible and U all patches, C channels, h heads, d head width,
P values of a patch; H, W pixels, (h, w) tokens of a map.
Comments say where a value is from: (paper), (released ...), (MAE), (ours) = chosen here.

Usage:
    python hpvit.py demo                                           a minute or two, two CPU cores
    torchrun --nproc_per_node 8 hpvit.py --model hpvit_base --data_path /imagenet
    torchrun --nproc_per_node 8 hpvit.py finetune --data_path /imagenet --model hpvit_base \
        --weights mae_pretrain_vit_base.pth          (or plain_base: MAE's own fine-tuning)
    python hpvit.py {evaluate,reconstruct,export,features} --help
Feature maps for dense heads: `maps = load_backbone(FILE).maps(images)`, of any height and width.
Of released MAE `reconstruct` takes full files, and with --no_norm_pix_loss the visualize ones.
To copy: this file and `common/`. The method alone: `ModelConfig`, and from "masking" to "model".
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import typing
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import augment, data
from common.data import InputError, TrainingError

# ── config ────────────────────────────────────────────────────────────────────────────
# A field's type says what it may hold, its trailing comment is the help of its flag. To read the
# method, `ModelConfig` is enough; then go on at "masking".

Count = Annotated[int, (1, 10**6)]
Whole = Annotated[int, (0, 2**63 - 1)]
Workers = Annotated[int, (0, 1024)]
Amount = Annotated[float, (0.0, 1e30)]
Share = Annotated[float, (0.0, 1.0)]
Pixels = Annotated[int, (1, 4096)] | tuple[int, int]  # a side, or 224x320: height and width
DType = Literal["auto", "fp32", "bf16", "fp16"]
SCRIPT = Path(__file__).stem
UNDECAYED = ("cls_token", "pos_embed")  # ends of names without weight decay in fine-tuning (MAE)
LAYER_NORM_EPS = 1e-6  # of every LayerNorm (MAE)
Window = Annotated[int, (0, 1024)]
Kernel, Padding = Literal["keep", "4sum"], Literal["center", "corner"]
Pool, Initial = Literal["avg", "dwconv", "conv"], Literal["avg", "default"]
Position = Literal["interp", "sincos"]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture only; stored in every checkpoint. Pre-training uses the plain part of it."""
    input_size: Annotated[int, (1, 4096)] = 224
    patch_size: Annotated[int, (1, 64)] = 16  # of the plain ViT
    embed_dim: Annotated[int, (4, 4096)] = 768  # in every stage
    depth: Annotated[int, (1, 99)] = 12
    num_heads: Count = 12
    # The hierarchical part, with grades.
    depths: tuple[Annotated[int, (1, 99)], ...] = (2, 2, 6, 2)  # blocks a stage (ours)
    windows: tuple[Window, ...] = (14, 14, 0, 0)  # tokens a side, 0 = the whole map (authors)
    patch_stride: Annotated[int, (1, 64)] = 4  # (abstract)
    patch_kernel: Kernel = "keep"  # as pre-trained (authors); 4sum: of a quarter (ours)
    patch_pad: Padding = "center"  # all around (authors); corner: right, bottom (ours)
    pool: Pool = "avg"  # (abstract)
    pool_kernel: Annotated[int, (2, 3)] = 2  # of convolutions; averages are of 2x2 (ours)
    pool_init: Initial = "avg"  # default: as PyTorch draws convolutions (ours)
    pos: Position = "interp"  # (MAE); sincos: its formula at the new places (ours)
    cls_token: bool = False  # pools leave it alone (authors; MAE: plain networks have one)
    global_pool: bool = True  # the head sees the mean token, not the class token (MAE)
    mlp_ratio: Annotated[float, (0.01, 100.0)] = 4.0
    decoder_dim: Annotated[int, (4, 4096)] = 512
    decoder_depth: Annotated[int, (1, 99)] = 8
    decoder_num_heads: Count = 16
    norm_pix_loss: bool = True

    @property
    def plain(self) -> bool:
        """Whether this is the very network that is pre-trained."""
        return (self.patch_stride == self.patch_size and self.windows == (0,)
                and self.patch_kernel == "keep" and self.cls_token)

    @property
    def units(self) -> int:
        """Patches per side of the image in pre-training."""
        return self.input_size // self.patch_size

    @property
    def kernel(self) -> int:
        """Side of what is embedded as a token."""
        return self.patch_size if self.patch_kernel == "keep" else self.patch_size // 4

    @property
    def stride(self) -> int:
        """Pixels per side of a token of the last stage: it divides the sides of images."""
        return self.patch_stride * 2 ** (len(self.depths) - 1)

    def side(self, stage: int) -> int:
        """Tokens per side of a stage's map."""
        return self.input_size // self.patch_stride // 2**stage


def plain_twin(config: ModelConfig) -> ModelConfig:
    """The plain network that `config` is made from."""
    return replace(config, depths=(config.depth,), windows=(0,), patch_stride=config.patch_size,
                   patch_kernel="keep", cls_token=True)


HIERARCHICAL = {  # pixels, patch, width, depth, heads; then, by name, what else differs
    "hpvit_base": ModelConfig(),
    "hpvit_base_light": ModelConfig(depths=(1, 1, 8, 2)),  # 43 instead of 69 G multiply-adds
    "hpvit_large": ModelConfig(224, 16, 1024, 24, 16, depths=(2, 2, 18, 2)),
    "hpvit_huge": ModelConfig(224, 14, 1280, 32, 16, depths=(2, 2, 26, 2)),
    "hpvit_tiny": ModelConfig(  # ours
        128, 16, 192, 12, 3, windows=(8, 8, 0, 0), decoder_dim=192, decoder_depth=2,
        decoder_num_heads=6),
    "demo": ModelConfig(  # ours
        64, 16, 96, 6, 3, (2, 4), (4, 0), 8, decoder_dim=64, decoder_depth=1,
        decoder_num_heads=2),
    "test": ModelConfig(  # ours
        64, 16, 16, 3, 2, (1, 1, 1), (6, 4, 0), decoder_dim=16, decoder_depth=1,
        decoder_num_heads=2),
}
MODELS = HIERARCHICAL | {f"plain_{name.removeprefix('hpvit_')}": plain_twin(config)
                         for name, config in HIERARCHICAL.items() if name != "hpvit_base_light"}
OTHER_NAMES = {  # timm's, and the constructors of released MAE
    name.format(size, patch): f"plain_{size}"
    for size, patch in (("base", 16), ("large", 16), ("huge", 14))
    for name in ("vit_{}_patch{}_224", "vit_{}_patch{}", "mae_vit_{}_patch{}",
                 "mae_vit_{}_patch{}_dec512d8b", "vit_{}_patch{}_224.mae")
}
RECIPES = {  # by command, recipe and, where it matters, model: what differs from the classes below
    ("finetune", "published", f"{kind}_{size}"): {
        "blr": 1e-3, "epochs": 50, "layer_decay": 0.75, "drop_path": drop_path}
    for kind in ("hpvit", "plain") for size, drop_path in (("large", 0.2), ("huge", 0.3))
} | {
    ("pretrain", "small"): {
        "model": "hpvit_tiny", "batch_size": 64, "blr": 1.6e-3, "epochs": 100,
        "warmup_epochs": 5.0},
    ("finetune", "small"): {
        "model": "hpvit_tiny", "batch_size": 32, "blr": 8e-3, "epochs": 60, "warmup_epochs": 3.0,
        "layer_decay": 0.8, "clip_grad": 1.0, "crop_min": 0.35, "mixup": 0.0, "cutmix": 0.0,
        "reprob": 0.0, "aa": "none"},
}


@dataclass(frozen=True)
class RunConfig:
    """What every training run needs, whatever the method."""
    model: str = ""  # network, also by other names; none = that of --weights, else the first (ours)
    recipe: str = "published"  # or small: some hundred to ten thousand images of your own (ours)
    data_path: str = ""  # images; none = a dry run, drawn:N = N built-in ones (ours)
    weights: str = ""  # file to start from, ours or released (ours)
    resume: str = "auto"  # a checkpoint; auto = newest in output_dir, none = afresh (ours)
    input_size: Pixels | None = None  # pixels; none = as the weights or the model (ours)
    accum_iter: Count = 1  # micro-batches per update (MAE)
    lr: Amount | None = None  # absolute learning rate, overrides blr (MAE)
    num_workers: Workers | None = None  # loader processes; none = by the number of cores (ours)
    seed: Whole = 0  # every random draw is a function of it (MAE)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ... (ours)
    dtype: DType = "auto"  # auto = bf16 (old GPUs: fp16) on CUDA, fp32 on the CPU (ours)
    compile: bool = False  # torch.compile; masks that change shapes make it recompile (ours)
    grad_checkpoint: bool = False  # recompute blocks in the backward pass (ours)
    fast_decode: bool = False  # JPEG draft decoding for camera-size photographs (ours)
    save_freq: Count = 20  # epochs between checkpoints that are kept (MAE)
    save_every: Amount = 30.0  # minutes between writes of checkpoint-last.pth (ours)
    log_every: Count = 50  # steps between log lines (ours)


@dataclass(frozen=True)
class FileConfig:
    """What the commands that use a file of weights need, whatever the method."""
    weights: str = ""  # checkpoint, ours or released (ours)
    model: str = ""  # network; none = as the file says (ours)
    data_path: str = ""  # folder, file or drawn:N; evaluate: with val/<class>/ (ours)
    output: str = ""  # file to write; none = a name by the command (ours)
    input_size: Pixels | None = None  # pixels, or HxW; none = the file's (ours)
    per_stage: bool = False  # features: maps of every stage instead of a vector (ours)
    count: Count = 8  # reconstruct: number of images (ours)
    batch_size: Count = 64  # images per process (ours)
    num_workers: Workers | None = None  # loader processes; none = by the number of cores (ours)
    seed: Whole = 0  # of the mask; demo: of everything (ours)
    device: str = "auto"  # auto, cpu, cuda, ... (ours)
    dtype: DType = "auto"  # auto = bf16 (old GPUs: fp16) on CUDA, fp32 on the CPU (ours)


@dataclass(frozen=True)
class MethodConfig:
    """What HPViT lets one change of the network; None = as the file or the model has it."""
    depths: tuple[Count, ...] | None = None  # blocks a stage, pools between: 2,2,6,2 (ours)
    windows: tuple[Window, ...] | None = None  # tokens a side, 0 = all: 14,14,0,0 (released ViTDet)
    patch_stride: Count | None = None  # px between tokens: 4, 8, or 16 = plain (paper: 4)
    patch_kernel: Kernel | None = None  # keep (released ViTPose), or sums of 4x4 values (ours)
    patch_pad: Padding | None = None  # zeros all around (released ViTPose) or right, below (ours)
    pool: Pool | None = None  # average, or depthwise or dense convolution (paper: both kinds)
    pool_kernel: Annotated[int, (2, 3)] | None = None  # of convolutions: 2 or 3 (ours)
    pool_init: Initial | None = None  # convolutions begin as averages, or PyTorch's way (ours)
    pos: Position | None = None  # interpolate the table (MAE), or the formula anew (ours)
    cls_token: bool | None = None  # off (released ViTDet), on needs whole maps (plain: MAE)
    global_pool: bool | None = None  # head on the mean token, else class token (MAE)


@dataclass(frozen=True)
class PretrainConfig(RunConfig, MethodConfig):
    """Recipe of released MAE, 64 processes."""
    output_dir: str = f"output/{SCRIPT}/pretrain"  # checkpoints, log.txt, pictures (ours)
    batch_size: Count = 64  # images per process (MAE: 4096 in all)
    epochs: Count = 800  # passes over the data (MAE; 1600 for its published weights)
    warmup_epochs: Amount = 40.0  # linear warm-up (MAE)
    blr: Amount = 1.5e-4  # learning rate per 256 images (MAE)
    min_lr: Amount = 0.0  # end of the cosine (MAE)
    weight_decay: Amount = 0.05  # AdamW (MAE)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (MAE)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.2  # smallest crop, share of the image (MAE)
    mask_ratio: Share = 0.75  # share of hidden patches (MAE)
    norm_pix_loss: bool | None = None  # normalise each target patch; none = yes (MAE)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig, MethodConfig):
    """Recipe of MAE's fine-tuning, 32 processes: of ViT-B; that of the model in RECIPES."""
    output_dir: str = f"output/{SCRIPT}/finetune"  # checkpoints and log.txt (ours)
    linear_probe: bool = False  # train the head only: plain crops, no mixing (ours)
    nb_classes: Count | None = None  # outputs; none = the number of class folders (ours)
    batch_size: Count = 32  # images per process (MAE: 1024 in all)
    epochs: Count = 100  # passes over the data (MAE)
    warmup_epochs: Amount = 5.0  # linear warm-up (MAE)
    blr: Amount = 5e-4  # learning rate per 256 images (MAE)
    min_lr: Amount = 1e-6  # end of the cosine, before layer decay (MAE)
    weight_decay: Amount = 0.05  # AdamW (MAE)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (MAE)
    layer_decay: Share = 0.65  # learning rate factor from layer to layer (MAE)
    pool_lr: Literal["block", "full"] = "block"  # as the block before (released ViTDet) or 1 (ours)
    drop_path: Annotated[float, (0.0, 0.99999)] = 0.1  # stochastic depth, last block (MAE)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.08  # smallest crop, share of the image (MAE)
    mixup: Amount = 0.8  # Beta parameter, 0 = off (MAE)
    cutmix: Amount = 1.0  # Beta parameter, 0 = off (MAE)
    smoothing: Share = 0.1  # label smoothing (MAE)
    reprob: Share = 0.25  # probability of random erasing (MAE)
    aa: str = "rand-m9-mstd0.5-inc1"  # RandAugment policy, none = off (MAE)
    ema: Annotated[float, (0.0, 0.99999)] = 0.0  # decay of averaged weights, 0 = off (ours)
    test_freq: Count = 1  # epochs between tests; the last is always tested (ours)


@dataclass(frozen=True)
class UseConfig(FileConfig, MethodConfig):
    """What the commands that do not train need."""
    naming: Literal["official", "timm"] = "official"  # export: whose parameter names (ours)
    mask_ratio: Share | None = None  # reconstruct: none = the file's, else 0.75 (ours)
    norm_pix_loss: bool | None = None  # reconstruct: as in pre-training; none = the file's (ours)


def known_model(name: str) -> str:
    """Our name of a network; InputError with the closest names if there is none."""
    if OTHER_NAMES.get(name, name) not in MODELS:
        near = difflib.get_close_matches(name, [*MODELS, *OTHER_NAMES], 3, 0)
        raise InputError(f"unknown model {name!r}; the closest names are {', '.join(near)}")
    return OTHER_NAMES.get(name, name)


def model_config(base: ModelConfig, **changes: object) -> ModelConfig:
    """`base` with `changes` (None = keep); checks that all fit together."""
    config = replace(base, **{k: v for k, v in changes.items() if v is not None})
    kernel, stride = config.kernel, config.patch_stride
    if isinstance(config.input_size, tuple):
        raise InputError(f"--input_size {data.sides(config.input_size)}: here images are square")
    if sum(config.depths) != config.depth:
        raise InputError(f"--depths {config.depths} are {sum(config.depths)} blocks, the network "
                         f"has {config.depth}")
    if len(config.windows) != len(config.depths):
        raise InputError(f"--windows {config.windows}: give {len(config.depths)}, one a stage, "
                         "0 = the whole map, as in 14,14,0,0")
    if config.patch_kernel == "4sum" and config.patch_size % 4:
        raise InputError(f"--patch_kernel 4sum: 4 does not divide patches of {config.patch_size}")
    if kernel < stride:
        raise InputError(f"--patch_stride {stride}: a kernel of {kernel} px would leave pixels out")
    if config.patch_pad == "center" and (kernel - stride) % 2:
        raise InputError(f"--patch_stride {stride}: a kernel of {kernel} px is centred on no "
                         "cell of that size; --patch_pad corner works")
    if config.pool == "avg" and config.pool_kernel != 2:
        raise InputError(f"--pool_kernel {config.pool_kernel}: averages are of 2x2 tokens; "
                         "--pool dwconv and --pool conv have kernels")
    if not config.cls_token and not config.global_pool:
        raise InputError("--no_global_pool: the head needs a class token, --cls_token")
    cut = [i for i, w in enumerate(config.windows) if 0 < w < config.side(i)]
    if config.cls_token and cut:
        raise InputError(f"--cls_token: a class token sees whole maps, --windows {config.windows} "
                         f"cuts that of stage {cut[0]}; 0 does not")
    for width, heads in ((config.embed_dim, config.num_heads),
                         (config.decoder_dim, config.decoder_num_heads)):
        if width % heads or width % 4:
            raise InputError(f"a width of {width} is no multiple of {heads} heads and of 4")
    check_size(config.input_size, config.stride)
    return config


def check_size(size: Pixels, unit: int) -> None:
    """InputError, which names the nearest that do, unless `unit` divides every side of `size`."""
    for side in size if isinstance(size, tuple) else (size,):
        low = max(2, side // unit) * unit
        if side % unit or side < low:
            raise InputError(f"--input_size {data.sides(size)} does not fit: a side must be a "
                             f"multiple of {unit}, the nearest are {low} and {low + unit}")


# ── masking ───────────────────────────────────────────────────────────────────────────

def shuffle_patches(noise: np.ndarray, mask_ratio: float) -> tuple[np.ndarray, int]:
    """(B, U) noise -> patches (B, U) of each image by rising noise, and how many of them stay
    visible: the first V = int(U (1 - ratio))."""
    units = noise.shape[1]
    kept = int(units * (1 - mask_ratio))
    if not 1 <= kept < units:
        raise InputError(f"--mask_ratio {mask_ratio} leaves {kept} of {units} patches visible: "
                         "at least one must stay visible and one be hidden")
    return np.argsort(noise, axis=1, kind="stable"), kept


# ── planning ──────────────────────────────────────────────────────────────────────────
# All that a mask decides is worked out on the host before the step, so that the model only
# indexes: no host synchronisation, no shape that depends on device data.

@dataclass(frozen=True)
class ShufflePlan:
    """What the model has to know about the masks: NumPy arrays, or tensors after `to_device`."""
    keep: Tensor  # (B, V) the visible patches of each image, in the order the encoder has them
    hidden: Tensor  # (B, U - V) the hidden ones, in the order of predictions
    restore: Tensor  # (B, U) for each patch its place in [*keep, *hidden]


def plan_shuffle(order: np.ndarray, kept: int) -> ShufflePlan:
    """Plan for patches (B, U) in the order of which the first `kept` stay visible."""
    return ShufflePlan(order[:, :kept], order[:, kept:], np.argsort(order, axis=1))


def plan_hidden(mask: np.ndarray) -> ShufflePlan:
    """Plan for `mask`, bool (B, U), True = hidden; of each image as many have to be hidden."""
    mask = np.asarray(mask, bool)
    counts = np.unique((~mask).sum(1))
    if len(counts) > 1 or counts[0] == 0:
        raise ValueError(f"masks leave {counts.tolist()} patches visible: the same number of every "
                         "image has to be, one at least")
    return plan_shuffle(np.argsort(mask, axis=1, kind="stable"), int(counts[0]))


def draw_shuffle(config: ModelConfig, mask_ratio: float, batch: int,
                 seed: Sequence[int]) -> ShufflePlan:
    """Plan of the masks that belong to `seed` (run seed, step, rank): one for each image."""
    noise = np.random.default_rng(seed).random((batch, config.units**2), np.float32)
    return plan_shuffle(*shuffle_patches(noise, mask_ratio))


def to_device(plan: object, device: torch.device) -> object:
    """The plan with its arrays as tensors on `device`, copied without waiting for the device."""
    if isinstance(plan, np.ndarray):
        tensor = torch.from_numpy(plan)
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor.to(device, non_blocking=True)
    if is_dataclass(plan):
        return replace(plan, **{k: to_device(v, device) for k, v in vars(plan).items()})
    return [to_device(item, device) for item in plan] if isinstance(plan, list) else plan


# ── layers ────────────────────────────────────────────────────────────────────────────

def drop_path(x: Tensor, probability: float) -> Tensor:
    """Drop the branch of whole samples and scale the others to keep the mean (training only)."""
    if probability == 0.0:
        return x
    keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - probability)
    return x * keep / (1 - probability)


def take(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, C), (B, K) -> (B, K, C): of each image its own tokens."""
    rows = index + x.shape[1] * torch.arange(len(x), device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def cut_patches(images: Tensor, size: int, stride: int, pad: str = "center") -> Tensor:
    """(B, 3, H, W) -> (B, N, P): a square of `size` px every `stride` px, row by row, each as
    (channel, row, column). Eq. (7), or a literal reading that pads at two sides only."""
    before = (size - stride) // 2 if pad == "center" else 0
    after = size - stride - before
    images = F.pad(images, (before, after, before, after))
    squares = images.unfold(2, size, stride).unfold(3, size, stride)  # a view
    return rearrange(squares, "b c h w p q -> b (h w) (c p q)")


class PatchProjection(nn.Module):
    """Eq. (1) without its position: the convolution as a matrix product, on patches cut out."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, size, size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, P) -> (B, N, C)"""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Full self-attention, without norm and residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        layout = "b n (three h d) -> three b h n d"
        q, k, v = rearrange(self.qkv(x), layout, three=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class WindowAttention(Attention):
    """Eq. (2) without its norm and residual: on a whole map, or in windows of it."""

    def forward(self, x: Tensor, shape: tuple[int, int], window: int) -> Tensor:
        """(B, N, C) -> (B, N, C), the tokens of an (h, w) map; 0 = no windows. What pads the last
        windows is zero after the norm and not masked, so its keys and values are the biases."""
        (h, w), p = shape, window
        if p == 0 or max(h, w) <= p:
            return super().forward(x)
        x = F.pad(rearrange(x, "b (h w) c -> b h w c", h=h), (0, 0, 0, -w % p, 0, -h % p))
        down, across = x.shape[1] // p, x.shape[2] // p
        x = super().forward(rearrange(x, "b (h p) (w q) c -> (b h w) (p q) c", p=p, q=p))
        x = rearrange(x, "(b h w) (p q) c -> b (h p) (w q) c", h=down, w=across, p=p)
        return x[:, :h, :w].flatten(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block around any attention; `plan` goes to the attention."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, eps: float,
                 drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps)
        fc1, fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))
        self.drop_path = drop_path

    def forward(self, x: Tensor, *plan: object) -> Tensor:
        dropped = self.drop_path if self.training else 0.0
        x = x + drop_path(self.attn(self.norm1(x), *plan), dropped)  # Eq. (2)
        return x + drop_path(self.mlp(self.norm2(x)), dropped)  # Eq. (3)


class AveragePool(nn.Module):
    """Eq. (4) by reshape: a map stays channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h / 2, w / 2, C)"""
        return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)


class ConvPool(nn.Conv2d):
    """Eq. (4) that learns; `average` = begins as the mean over its kernel, channel by channel."""

    def __init__(self, dim: int, size: int, groups: int, average: bool) -> None:
        super().__init__(dim, dim, size, 2, (size - 1) // 2, groups=groups)
        if average:
            nn.init.zeros_(self.bias)
            weight = nn.init.zeros_(self.weight.data)
            channel = torch.arange(dim)
            weight[channel, channel % (dim // groups)] = 1 / size**2

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h / 2, w / 2, C)"""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def make_pool(config: ModelConfig) -> nn.Module:
    """A pool, as the config says."""
    if config.pool == "avg":
        return AveragePool()
    groups = config.embed_dim if config.pool == "dwconv" else 1
    return ConvPool(config.embed_dim, config.pool_kernel, groups, config.pool_init == "avg")


# ── encoder ───────────────────────────────────────────────────────────────────────────

class HPViT(nn.Module):
    """The hierarchical ViT, for images of any size, up to its last norm; of a config of one stage
    the plain ViT in which patches are cut every 16 px."""

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = model_config(config)  # checks it
        dim, stages = config.embed_dim, len(config.depths)
        self.channels = [dim] * stages
        self.strides = [config.patch_stride * 2**i for i in range(stages)]
        self.patch_embed = PatchProjection(config.kernel, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.cls_token else None
        self.grid = (config.side(0), config.side(0))  # of the table of positions
        rows = math.prod(self.grid) + config.cls_token
        self.pos_embed = nn.Parameter(torch.empty(1, rows, dim))
        rates = np.linspace(0, drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, WindowAttention(dim, config.num_heads), config.mlp_ratio, LAYER_NORM_EPS,
                  rate) for rate in rates)
        self.pools = nn.ModuleList(make_pool(config) for _ in range(stages - 1))
        # One of them, as in MAE: before the class token is taken, or behind the mean.
        norm, pooled = nn.LayerNorm(dim, LAYER_NORM_EPS), config.global_pool
        self.norm, self.fc_norm = (nn.Identity(), norm) if pooled else (norm, nn.Identity())
        self.map_norms = nn.ModuleList()  # of `maps`, if there are any, one a map
        self.grad_checkpoint = False
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if config.cls_token:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def positions(self, shape: Sequence[int]) -> Tensor:
        """(N, C) for an (h, w) map, the class token's first; interpolated if it is another map."""
        lead = int(self.config.cls_token)
        if tuple(shape) == self.grid:
            return self.pos_embed[0]
        return torch.cat([self.pos_embed[0, :lead], stretch(self.pos_embed[0, lead:], shape)])

    def outputs(self, images: Tensor, blocks: Sequence[int]) -> list[tuple[Tensor, Sequence[int]]]:
        """(B, 3, H, W) -> tokens (B, N, C) behind so many `blocks` from the first, before pooling
        and norm, and (h, w) of the map that they are, after a class token if there is one."""
        config, lead, found, count = self.config, int(self.config.cls_token), [], 0
        height, width = images.shape[-2:]
        if height % (unit := config.stride) or width % unit:
            raise ValueError(f"images of {height}x{width} px: {unit} must divide both sides")
        shape = (height // config.patch_stride, width // config.patch_stride)
        x = cut_patches(images, config.kernel, config.patch_stride, config.patch_pad)
        x = self.patch_embed(x)
        if lead:
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(shape)  # Eq. (1)
        for stage, (depth, window) in enumerate(zip(config.depths, config.windows, strict=True)):
            if stage > 0:
                x, shape = self.shrink(x, shape, self.pools[stage - 1])
            if lead and 0 < window < max(shape):
                raise ValueError(f"a class token cannot be in windows of {window}, map {shape}")
            for block in self.blocks[count:count + depth]:
                if self.grad_checkpoint and self.training and stage < 2:
                    x = checkpoint(block, x, shape, window, use_reentrant=False)
                else:
                    x = block(x, shape, window)
                count += 1
                found += [(x, shape)] if count in blocks else []
        return found

    def shrink(self, x: Tensor, shape: Sequence[int],
               pool: nn.Module) -> tuple[Tensor, Sequence[int]]:
        """(B, N, C) and (h, w) -> (B, N / 4, C) and (h / 2, w / 2); a class token stays."""
        token, x = x.split([x.shape[1] - math.prod(shape), math.prod(shape)], dim=1)
        x = pool(rearrange(x, "b (h w) c -> b h w c", h=shape[0])).flatten(1, 2)  # Eq. (4)
        x = torch.cat([token, x], dim=1) if token.shape[1] else x
        return x, (shape[0] // 2, shape[1] // 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C): what a head sees, the mean token, or the class token."""
        [(x, _)] = self.outputs(images, [self.config.depth])
        if not self.config.global_pool:
            return self.norm(x)[:, 0]
        return self.fc_norm(x[:, int(self.config.cls_token):].mean(1))

    def maps(self, images: Tensor, blocks: Sequence[int] = ()) -> list[Tensor]:
        """(B, 3, H, W) normalised -> a map (B, C, h, w) of every stage, or behind so many `blocks`
        from the first, before pooling; normed only if there are `map_norms`. Any H and W that the
        last of `strides` divides: positions are interpolated, the last windows padded."""
        found = self.outputs(images, blocks or list(itertools.accumulate(self.config.depths)))
        norms = self.map_norms or [nn.Identity()] * len(found)
        return [rearrange(norm(x)[:, int(self.config.cls_token):], "b (h w) c -> b c h w", h=h)
                for norm, (x, (h, _)) in zip(norms, found, strict=True)]


def stretch(table: Tensor, shape: Sequence[int]) -> Tensor:
    """(n * n, C) values on a square grid -> (h * w, C), bicubic, for `shape` (h, w)."""
    side = math.isqrt(len(table))
    if side**2 != len(table):
        raise ValueError(f"a table of {len(table)} positions is of no square")
    if tuple(shape) == (side, side):
        return table
    grid = table.to(torch.promote_types(table.dtype, torch.float32))  # bicubic knows no half
    grid = rearrange(grid, "(h w) c -> 1 c h w", h=side)
    grid = F.interpolate(grid, tuple(shape), mode="bicubic", align_corners=False)
    return rearrange(grid, "1 c h w -> (h w) c").to(table.dtype)


def convert(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights of a plain ViT as MAE trains it -> those of the network of `config`. All blocks stay
    as they are. Dropped: decoder, class token and last norm where there are none. Not made here:
    pools and `fc_norm`, which begin as averages and as 1 and 0.

    Weights that were fine-tuned, plain or hierarchical, pass as well: they have a head or its
    `fc_norm`, and keep their norms; only positions of another size are interpolated."""
    tuned = "head.weight" in state or "fc_norm.weight" in state
    for key in () if tuned else ("cls_token", "norm.weight", "norm.bias"):
        if key not in state:
            raise ValueError(f"it is of no pre-training: {key} is missing")
    dropped = ["mask_token", "decoder_"]
    dropped += [] if config.cls_token else ["cls_token"]
    dropped += ["norm."] if config.global_pool and not tuned else []
    found = {k: v for k, v in state.items() if not k.startswith(tuple(dropped))}
    weight = found["patch_embed.proj.weight"]
    if config.patch_kernel == "4sum" and weight.shape[-1] == config.patch_size:
        found["patch_embed.proj.weight"] = reduce(
            weight, "c three (h p) (w q) -> c three h w", "sum", p=4, q=4)
    lead, side = int("cls_token" in state), config.side(0)
    token, rows = state["pos_embed"][0, :lead], state["pos_embed"][0, lead:]
    if len(rows) != side**2 and config.pos == "sincos":
        units, dim = math.isqrt(len(rows)), rows.shape[1]
        if not torch.allclose(rows.float(), sincos_table(dim, units, units)[0, 1:], atol=1e-4):
            raise ValueError("its positions were learned: --pos sincos does not fit, interp does")
        rows = sincos_table(dim, units, side)[0, 1:]
    rows = stretch(rows, (side, side))  # Eq. (8)
    found["pos_embed"] = (torch.cat([token, rows]) if config.cls_token else rows).unsqueeze(0)
    return found


# ── decoder and target ────────────────────────────────────────────────────────────────

def sincos_table(dim: int, units: int, side: int) -> Tensor:
    """(1, 1 + side^2, dim) fixed table: zeros for the class token, then in raster order sin and
    cos of the column, then of the row, of `side` places that span a grid of `units`."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = (torch.arange(side, dtype=torch.float64) + 0.5) * units / side - 0.5
    place = place.unsqueeze(1) * omega  # (side, dim / 4)
    rows, columns = place.repeat_interleave(side, 0), place.repeat(side, 1)
    table = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float().unsqueeze(0)


def patchify(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, U, P): squares of `size` pixels, each as (row, column, channel)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, P) -> Eq. (5), and the mean and deviation (B, U, 1) that undo it."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as released
    deviation = (variance + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


# ── model ─────────────────────────────────────────────────────────────────────────────

class MAE(nn.Module):
    """The plain ViT on visible patches, decoder on all, pixels of the hidden ones. The mask is
    (B, U) bool, True = hidden, as many of each image, as an array or a tensor (one on a GPU is
    copied to the host, which waits for it), or its plan, made ahead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, width = config.embed_dim, config.decoder_dim

        def blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(dim, Attention(dim, heads), config.mlp_ratio, LAYER_NORM_EPS)
                for _ in range(depth))

        self.patch_embed = PatchProjection(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos_embed", sincos_table(dim, config.units, config.units))
        self.blocks = blocks(dim, config.depth, config.num_heads)
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("decoder_pos_embed", sincos_table(width, config.units, config.units))
        self.decoder_embed = nn.Linear(dim, width)
        self.decoder_blocks = blocks(width, config.decoder_depth, config.decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * 3)
        self.grad_checkpoint = False

        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # its bias as PyTorch does
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def plan(self, images: Tensor, mask: ShufflePlan | np.ndarray | Tensor) -> ShufflePlan:
        """The plan of `mask` on the images' device; ValueError if they are not of this model."""
        if images.shape[-2:] != (self.config.input_size,) * 2:
            raise ValueError(f"images are {tuple(images.shape)}, not {self.config.input_size} px")
        if not isinstance(mask, ShufflePlan):
            mask = plan_hidden(torch.as_tensor(mask).cpu().numpy())
        if mask.restore.shape != (len(images), self.config.units**2):
            raise ValueError(f"masks are {tuple(mask.restore.shape)}, not of {len(images)} images "
                             f"and {self.config.units**2} patches")
        if mask.hidden.shape[1] == 0:
            raise ValueError("the mask hides nothing, so there is nothing to reconstruct")
        return to_device(mask, images.device)

    def run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        for block in blocks:
            again = self.grad_checkpoint and self.training
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    def encode(self, images: Tensor, plan: ShufflePlan) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + V, C): class token and visible patches, through the blocks."""
        patches = cut_patches(images, self.config.patch_size, self.config.patch_size)
        x = self.patch_embed(take(patches, plan.keep)) + self.pos_embed[0, 1:][plan.keep]  # Eq. (1)
        token = self.cls_token + self.pos_embed[:, :1]
        return self.norm(self.run(self.blocks, torch.cat([token.expand(len(x), -1, -1), x], dim=1)))

    def decode(self, latent: Tensor, plan: ShufflePlan) -> Tensor:
        """(B, 1 + V, C) -> (B, 1 + U, D): latents and mask tokens in their places, through the
        blocks."""
        token, x = self.decoder_embed(latent).split([1, plan.keep.shape[1]], dim=1)
        hidden = self.mask_token.to(x.dtype).expand(*plan.hidden.shape, -1)
        x = torch.cat([token, take(torch.cat([x, hidden], dim=1), plan.restore)], dim=1)
        return self.run(self.decoder_blocks, x + self.decoder_pos_embed)

    def forward(self, images: Tensor,
                mask: ShufflePlan | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Loss (), and predictions (B, U - V, P) of the hidden patches, in the order of
        `plan.hidden`, for (B, 3, H, W) images."""
        plan = self.plan(images, mask)
        x = take(self.decode(self.encode(images, plan), plan), 1 + plan.hidden)
        prediction = self.decoder_pred(self.decoder_norm(x)).float()
        target = take(patchify(images, self.config.patch_size), plan.hidden)
        if self.config.norm_pix_loss:
            target, _, _ = normalize_patches(target)
        return F.mse_loss(prediction, target), prediction  # Eq. (6)


# ── weights ───────────────────────────────────────────────────────────────────────────

def identify(file: dict) -> tuple[str, ModelConfig]:
    """Name and architecture of the network in a file: by its args if it is ours, else by shapes,
    which show no heads and, of what is not plain, neither stages nor windows."""
    args, state = file["args"], file["model"]
    if args:
        hints = typing.get_type_hints(ModelConfig, include_extras=True)
        config = ModelConfig(**{k: fit(hint, args["config"][k]) for k, hint in hints.items()})
        return known_model(str(args["model"])), model_config(config)
    depth = len([k for k in state if re.fullmatch(r"blocks\.\d+\.norm1\.weight", k)])
    needed = ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.bias")
    if any(k not in state for k in needed):
        raise ValueError("it holds no ViT (pos_embed, patch_embed.proj.weight, ...)")
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    found = {"embed_dim": dim, "depth": depth, "cls_token": "cls_token" in state,
             "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / dim}
    if found["cls_token"]:
        found |= {"patch_size": patch, "patch_stride": patch, "depths": (depth,), "windows": (0,)}
    if "head.weight" in state:
        found["global_pool"] = "fc_norm.weight" in state
    if "pools.0.weight" in state:
        _, inputs, size, _ = state["pools.0.weight"].shape
        found |= {"pool": "dwconv" if inputs == 1 else "conv", "pool_kernel": size}
    if "decoder_embed.weight" in state:
        blocks = [k for k in state if re.fullmatch(r"decoder_blocks\.\d+\.norm1\.weight", k)]
        found |= {"decoder_dim": len(state["decoder_embed.weight"]), "decoder_depth": len(blocks)}
    alike = min((n for n in MODELS if MODELS[n].embed_dim == dim), default=next(iter(MODELS)),
                key=lambda n: sum(getattr(MODELS[n], k) != v for k, v in found.items()))
    side = math.isqrt(state["pos_embed"].shape[1] - found["cls_token"])
    found["input_size"] = side * found.get("patch_stride", MODELS[alike].patch_stride)
    return alike, model_config(MODELS[alike], **found)


def choose_config(cfg: RunConfig | UseConfig, file: dict | None) -> tuple[str, ModelConfig]:
    """Name and architecture by the flags, else by the file of --weights, else the first model."""
    found, base = "", None
    if file:
        with data.blaming(cfg.weights):
            found, base = identify(file)
    name = known_model(cfg.model or found or next(iter(MODELS)))
    asked = {f.name: getattr(cfg, f.name, None) for f in fields(ModelConfig)}
    return name, model_config(base if name == found else MODELS[name], **asked)


def load_weights(make: Callable[[], nn.Module], path: str, file: dict | None,
                 fresh_head: bool = False) -> tuple[nn.Module, str]:
    """What `make` builds (MAE, HPViT, classifier) with the weights of a file that was read, if
    there is one, and a sentence on what was adapted; InputError names what does not fit.

    Only if `fresh_head` a head that does not fit is left out; it is then drawn next to zero."""
    if file is None:
        return make(), ""
    with data.blaming(path):
        with torch.device("meta"):  # no memory is taken before all shapes are known to agree
            skeleton = make()
        own, state, notes, new = skeleton.state_dict(), file["model"], [], []
        if not isinstance(skeleton, MAE):
            there, state = state["pos_embed"].shape[1], convert(state, skeleton.config)
            parts = {k.partition(".")[0] for k in state}
            new = [part for part in ("pools", *(() if "head" in parts else ("fc_norm",)))
                   if part not in parts and any(k.startswith(f"{part}.") for k in own)]
            if there != own["pos_embed"].shape[1]:
                notes.append(f"positions from a table of {there} to {own['pos_embed'].shape[1]}")
            if not skeleton.config.plain and not parts & {"head", "fc_norm"}:
                notes.append("made hierarchical; a plain_... --model is what was pre-trained")
        elif "decoder_pred.weight" not in state:
            raise ValueError("it has no decoder (mask_token): give pretrain's checkpoint-*.pth")
        elif state["pos_embed"].shape != own["pos_embed"].shape:
            new = ["pos_embed", "decoder_pos_embed"]  # fixed tables, worked out for this size
            state = {k: v for k, v in state.items() if k not in new}
        head = [k for k in ("head.weight", "head.bias") if k in own]
        fresh = fresh_head and any(k not in state or state[k].shape != own[k].shape for k in head)
        if fresh or not head:
            state = {k: v for k, v in state.items() if k not in ("head.weight", "head.bias")}
        notes += [f"new: {', '.join(new)}"] if new else []
        notes += ["the head starts fresh"] if fresh else []
        new += head if fresh else []
        data.check_keys(state, {k: v for k, v in own.items()
                           if k.partition(".")[0] not in new and k not in new})
    model = make()
    if fresh:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # MAE, after a pre-training
    model.load_state_dict(state, strict=False)
    return model, f"loaded {path}: {'; '.join(notes) or 'all weights as they are'}"


def export_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of encoder and head. Of a plain network its names are those of MAE and of timm,
    both of which take it strictly; of a hierarchical one they are the same, and `pools.0`, ..."""
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()
            if not k.startswith(("decoder_", "mask_token"))}


# ── distributed and optimisation ──────────────────────────────────────────────────────

@dataclass(frozen=True)
class Process:
    """This process among all; device and number format of its work."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, self.dtype is not torch.float32)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def say(self, line: str) -> None:
        """Print a line, unless it is empty, once."""
        if self.rank == 0 and line:
            print(line, flush=True)


def setup_process(device: str, dtype: str) -> Process:
    """Join torchrun's group, if any; InputError if the device cannot do what is asked."""
    place, usual = f"--device {device}", torch.float32
    try:
        rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        world_size, cuda = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
        device = ("cuda" if cuda else "cpu") if device == "auto" else device
        chosen = torch.device(f"cuda:{local}" if device == "cuda" else device)
        torch.zeros(1, device=chosen).item()
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.set_float32_matmul_precision("high")  # TF32
            # Below compute capability 8.0 bf16 is emulated, slowly.
            new = torch.version.hip or torch.cuda.get_device_capability() >= (8, 0)
            usual = torch.bfloat16 if new else torch.float16
            if dtype == "bf16" and not new:
                raise ValueError("this GPU has no bf16; --dtype fp16 and --dtype fp32 work")
        elif chosen.type == "cpu":
            # Every step takes the same gigabyte again, and clearing its pages anew cost 4% of a
            # large model's step in fp32, 15% in bf16, on two cores: have glibc keep freed blocks.
            with contextlib.suppress(OSError, AttributeError):  # not glibc
                libc = ctypes.CDLL("libc.so.6")
                libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
                libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        if world_size > 1 and not dist.is_initialized():
            place = f"MASTER_PORT {os.environ.get('MASTER_PORT')} (taken? torchrun --master_port)"
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot start with {place}: {reason}") from None
    kinds = {"auto": usual, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Process(rank, world_size, chosen, kinds[dtype])


def parameter_groups(model: nn.Module, weight_decay: float, depths: Sequence[int] = (),
                     layer_decay: float = 1.0, undecayed: Sequence[str] = UNDECAYED) -> list[dict]:
    """AdamW groups: no decay for vectors and `undecayed` names; `lr_scale` by layer."""
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith(tuple(undecayed))
        scale = layer_decay ** (sum(depths) + 1 - layer_id(name, depths))
        if parameter.requires_grad:
            groups.setdefault((exempt, scale), []).append(parameter)
    return [{"params": group, "weight_decay": 0.0 if exempt else weight_decay, "lr_scale": scale}
            for (exempt, scale), group in groups.items()]


def layer_id(name: str, depths: Sequence[int]) -> int:
    """0 for what comes before the blocks, 1.. for blocks and one more for what comes after; a pool
    counts with the block before it."""
    found = re.match(r"(blocks|pools)\.(\d+)\.", name)
    if not found:
        first = name.startswith(("patch_embed.", "pos_embed", "cls_token"))
        return 0 if first else sum(depths) + 1
    number = int(found[2])
    return number + 1 if found[1] == "blocks" else sum(depths[:number + 1])


def lr_at(t: float, lr: float, start: float, end: float, warmup: float, cosine_from: float,
          total: float) -> float:
    """Linear from `start` to `lr` while t < warmup, then a half cosine to `end` at t = total.
    The cosine counts from `cosine_from`: from the end of the warm-up in MAE, from 0 in SimMIM."""
    if t < warmup:
        return start + (lr - start) * t / warmup
    progress = (t - cosine_from) / (total - cosine_from)
    return end + (lr - end) * 0.5 * (1 + math.cos(math.pi * progress))


def apply_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norm: float,
                    clip_grad: float | None) -> bool:
    """Clip and step if the norm of the gradients is finite, else step over them; whether it is."""
    if finite := math.isfinite(norm):
        if clip_grad is not None and norm > clip_grad:
            gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
            torch._foreach_mul_([g for g in gradients if g is not None], clip_grad / (norm + 1e-6))
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return finite


def prepare(cfg: RunConfig, process: Process, config: ModelConfig, split: str, crop: Callable,
            per: int) -> tuple[RunConfig, data.TrainLoader, float, dict]:
    """Config, loader of a split ("" = all images), peak learning rate (cfg.blr is for `per`
    images) and what a checkpoint says of its run, plain values only.
    Without --data_path the config returned is that of a dry run: ten steps, nothing written."""
    command, device = "pretrain" if isinstance(cfg, PretrainConfig) else "finetune", process.device
    usual = asdict(configure(command, model=cfg.model, recipe=cfg.recipe))
    if changed := data.differences(asdict(cfg), usual, "recipe:"):
        process.say(f"differs from the {cfg.recipe} recipe: {changed}")
    if not cfg.data_path:
        # A recipe's batch is made for a GPU.
        small = device.type == "cpu" and cfg.batch_size == usual["batch_size"]
        cfg = replace(cfg, batch_size=8 if small else cfg.batch_size, epochs=1, warmup_epochs=0.0,
                      output_dir="", resume="none", num_workers=0)
    batch = cfg.batch_size * cfg.accum_iter * process.world_size
    loader = data.TrainLoader(
        data.open_source(cfg.data_path or f"drawn:{10 * batch}", split), crop, seed=cfg.seed,
        batch_size=cfg.batch_size, rank=process.rank, world_size=process.world_size,
        accum_iter=cfg.accum_iter, num_workers=cfg.num_workers, pin_memory=device.type == "cuda")
    if cfg.warmup_epochs >= cfg.epochs:
        process.say(f"--warmup_epochs {cfg.warmup_epochs:g} is not shorter than --epochs "
                    f"{cfg.epochs}: the learning rate never reaches its peak")
    images, lr, rule = len(loader.source), cfg.lr, ""
    if lr is None:
        lr, rule = cfg.blr * batch / per, f" = blr {cfg.blr:g} * {batch} / {per}"
    process.say(f"{cfg.model}: {images} images, {len(loader)} steps an epoch; batch "
                f"{cfg.batch_size} x {cfg.accum_iter} x {process.world_size} processes = {batch}; "
                f"lr {lr:.3g}{rule}")
    args = {"script": SCRIPT, "command": command, "model": cfg.model, "config": asdict(config),
            "classes": list(loader.source.classes),
            "settings": asdict(cfg) | {"batch": batch, "images": images}}
    return cfg, loader, lr, args


def resume(cfg: RunConfig, process: Process, args: dict, parts: dict,
           total: int) -> tuple[int, dict, str]:
    """Continue from the newest checkpoint, if there is one: fill `parts`; its step, its log, and
    the words that name it. An error rather than a silent fresh start."""
    step, log, good = 0, {"records": [], "epoch": {}}, "there is no good checkpoint yet"
    paths, problems, file = [] if cfg.resume == "none" else [Path(cfg.resume)], [], None
    if cfg.resume == "auto":
        found = Path(cfg.output_dir).glob("checkpoint-*.pth") if cfg.output_dir else ()
        paths = sorted(found, key=os.path.getmtime, reverse=True)
    while paths and file is None:
        try:
            file = data.read_checkpoint(path := paths.pop(0), SCRIPT)
        except InputError as error:
            problems.append(str(error))
    if problems and file is None:
        raise InputError(f"no checkpoint can be resumed: {'; '.join(problems)}")
    if file:
        with data.blaming(path):
            data.check_resumable(file, args, parts, total)  # before anything of it is used
            step, log, good = file["step"], file["log"], f"the last good checkpoint is {path}"
            # The options of the groups are this run's; the state of their parameters the file's.
            file["optimizer"]["param_groups"] = parts["optimizer"].state_dict()["param_groups"]
            for name, part in parts.items():
                if name != "scaler" or (part.is_enabled() and file["scaler"]):
                    part.load_state_dict(file[name])
            changed = data.differences(args["settings"], file["args"]["settings"], "was")
        process.say("; ".join([*problems, f"resumed at step {step} of {total} from {path}"]))
        process.say(changed and f"unlike before: {changed}")
    if process.sum(torch.tensor(float(step), device=process.device)) != step * process.world_size:
        raise InputError("the processes found different checkpoints; all nodes must share a disk")
    return step, log, good


# ── training loop ─────────────────────────────────────────────────────────────────────

def train(cfg: RunConfig, process: Process, parts: dict, loader: data.TrainLoader, args: dict,
          schedule: Callable[[int, float], float], loss_of: Callable[..., Tensor],
          end_of_epoch: Callable[[int, list[dict]], dict]) -> dict:
    """The loop of `pretrain` and `finetune`; returns the last record of the log.
    `parts` (model, optimizer, ema) and `args` make a checkpoint. `schedule(step, lr_scale)` is a
    group's learning rate, `loss_of(net, images, labels, number)` the loss of micro-batch `number`,
    `end_of_epoch(epoch, records so far)` adds to the record of an epoch."""
    device, output, optimizer = process.device, Path(cfg.output_dir), parts["optimizer"]
    writes = bool(cfg.output_dir) and process.rank == 0
    scaler = torch.amp.GradScaler(device.type, enabled=process.dtype is torch.float16)
    parts = parts | {"scaler": scaler}
    per_epoch, total = len(loader), cfg.epochs * len(loader)
    batch = cfg.batch_size * cfg.accum_iter * process.world_size
    saved, times, stopping, in_a_row = time.monotonic(), [], False, 0
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(data.only_run(output))
        step, log, good = resume(cfg, process, args, parts, total)
        first = step
        net = torch.compile(parts["model"]) if cfg.compile else parts["model"]
        if process.world_size > 1:
            devices = [device] if device.type == "cuda" else None
            net = nn.parallel.DistributedDataParallel(net, devices, gradient_as_bucket_view=True)
        board = data.open_board(output, step) if writes and step < total else lambda *_: None
        caught = stack.enter_context(data.catching_signals())
        batches = stack.enter_context(contextlib.closing(loader.batches(step, total)))
        hidden = process.rank > 0 or not sys.stderr.isatty()
        bar = stack.enter_context(tqdm(total=total, initial=step, disable=hidden))
        while step < total and not stopping:
            started, waited, losses, unreadable = time.perf_counter(), 0.0, [], loader.unreadable
            net.train()
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, group["lr_scale"])
            seeds = np.random.SeedSequence((cfg.seed, step, process.rank, 0))
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            before = running_statistics(parts["model"])
            for micro in range(cfg.accum_iter):
                waited -= time.perf_counter()
                images, labels = next(batches)
                waited += time.perf_counter()
                images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
                alone = process.world_size > 1 and micro < cfg.accum_iter - 1
                with net.no_sync() if alone else contextlib.nullcontext():
                    with process.autocast():
                        images = data.normalize(images)
                        loss = loss_of(net, images, labels, step * cfg.accum_iter + micro)
                    scaler.scale(loss / cfg.accum_iter).backward()
                losses.append(loss.detach())

            late = time.monotonic() - saved > 60 * cfg.save_every
            mine = [loader.unreadable - unreadable, len(caught), late]
            told = tell_all(process, optimizer, scaler, losses, mine)
            norm, loss, count, bad, stopping, due = told
            finite = apply_gradients(optimizer, scaler, norm, cfg.clip_grad)
            if not finite:
                parts["model"].load_state_dict(before, strict=False)
            in_a_row = 0 if finite else in_a_row + 1
            if in_a_row == min(20, total - first):
                raise TrainingError(f"{in_a_row} steps without a finite gradient; {good}")
            step += 1
            bar.update()
            times.append(time.perf_counter() - started)
            news = {"loss": loss, "losses": count, "unreadable": bad, "skipped": not finite,
                    "seconds": times[-1], "waited": waited}
            log["epoch"] = {k: log["epoch"].get(k, 0) + v for k, v in news.items()}
            speed, loss = batch / float(np.median(times[-99:])), loss / max(count, 1)
            if step % cfg.log_every == 0:
                board({"loss": loss, "images_per_second": speed}, step)
                if bar.disable:
                    process.say(f"step {step}/{total}: loss {loss:.4f}, {speed:.1f} images/s")
            if step % per_epoch == 0:
                record = summary(log, optimizer, device) | {"images_per_second": speed}
                record |= end_of_epoch(record["epoch"], log["records"])
                log = {"records": [*log["records"], record], "epoch": {}}
                process.say(", ".join(f"{k} {v:.4g}" for k, v in record.items()))
                board(record, step, output / f"reconstruction-{record['epoch']}.png")
            if cfg.output_dir and (step % per_epoch == 0 or due or stopping):
                content = {"epoch": step // per_epoch, "step": step, "args": args, "log": log}
                good = save_training(cfg, process, parts, content, good)
                saved = time.monotonic()
        if stopping and step < total:
            process.say(f"stopped after step {step}" + (
                f"; --resume auto (the default) continues: {good}" if writes else ""))
            raise KeyboardInterrupt if signal.SIGINT in caught else SystemExit(0)
    return log["records"][-1]


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what batch normalisation counts (nothing in most models), to undo a step with."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v.clone() for k, v in model.named_buffers() if k.endswith(names)}


def tell_all(process: Process, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
             losses: list[Tensor], mine: list[float]) -> list[float]:
    """[gradient norm, sum and number of finite losses, *mine], the latter summed over processes:
    their one message beside DDP's, and the one host synchronisation of a step."""
    scaler.unscale_(optimizer)
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    values = torch.stack(losses).float()
    finite = values.isfinite()
    # All processes have the same norm; in the sum of its shares a NaN stays one.
    told = [norm / process.world_size, torch.where(finite, values, 0).sum(), finite.sum().float()]
    host = torch.tensor(mine, dtype=torch.float32).to(values.device, non_blocking=True)
    return process.sum(torch.cat([torch.stack(told), host])).tolist()


def summary(log: dict, optimizer: torch.optim.Optimizer, device: torch.device) -> dict:
    """An epoch's record from its sums over steps."""
    sums = log["epoch"]
    return {"epoch": len(log["records"]), "train_loss": sums["loss"] / max(sums["losses"], 1),
            "train_lr": max(group["lr"] for group in optimizer.param_groups),
            "unreadable_images": int(sums["unreadable"]), "skipped_steps": int(sums["skipped"]),
            "data_wait": sums["waited"] / sums["seconds"], "memory_gb": data.memory_gb(device)}


def save_training(cfg: RunConfig, process: Process, parts: dict, content: dict, good: str) -> str:
    """Have rank 0 write checkpoint-last.pth and, at the end of an epoch, log.txt and what
    `save_freq` asks for. Returns the words that name the last good checkpoint, on every rank;
    weights that are not finite are an error."""
    for name, value in parts["model"].state_dict().items():
        if not value.isfinite().all():
            raise TrainingError(f"{name} is no longer finite, try a lower learning rate; {good}")
    output, epoch = Path(cfg.output_dir), content["epoch"]
    paths = [output / "checkpoint-last.pth"]
    if not content["log"]["epoch"]:  # the sums of an epoch that is not whole
        lines = "".join(json.dumps(record) + "\n" for record in content["log"]["records"])
        if process.rank == 0:
            data.save_file(output / "log.txt", lambda file: file.write(lines.encode()))
        if epoch % cfg.save_freq == 0 or epoch == cfg.epochs:
            paths.insert(0, output / f"checkpoint-{epoch - 1}.pth")
    content = {name: part.state_dict() for name, part in parts.items()} | content
    for path in paths if process.rank == 0 else ():
        data.save_file(path, partial(torch.save, content))
    return f"the last good checkpoint is {paths[-1]}"


# ── pre-training ──────────────────────────────────────────────────────────────────────

def pretrain(cfg: PretrainConfig) -> dict:
    """Pre-train on any tree of images; without --data_path, ten steps on the built-in ones."""
    process = setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT) if cfg.weights else None
    name, config = choose_config(cfg, file)
    check_size(config.input_size, config.patch_size)
    draw_shuffle(config, cfg.mask_ratio, 1, (cfg.seed,))  # checks the ratio
    crop = data.TrainCrop(config.input_size, (cfg.crop_min, 1.0), fast_decode=cfg.fast_decode)
    cfg, loader, lr, args = prepare(replace(cfg, model=name), process, config, "", crop, 256)
    if not config.plain:
        process.say(f"what is pre-trained is the plain ViT that {name} is made from, with patches "
                    f"of {config.patch_size} px; finetune --weights makes it hierarchical")

    torch.manual_seed(cfg.seed)
    model, said = load_weights(partial(MAE, config), cfg.weights, file)
    process.say(said and f"{said}; {config.input_size} px")
    model.grad_checkpoint = cfg.grad_checkpoint
    groups = parameter_groups(model.to(process.device), cfg.weight_decay, undecayed=())
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95), fused=process.device.type != "mps")

    plan_of = lru_cache(2)(lambda number: draw_shuffle(
        config, cfg.mask_ratio, cfg.batch_size, (cfg.seed, number, process.rank, 1)))

    def loss_of(net: nn.Module, images: Tensor, _: Tensor, number: int) -> Tensor:
        loss, _ = net(images, to_device(plan_of(number), process.device))
        plan_of(number + 1)  # now, while a GPU is busy with the forward pass
        return loss

    def schedule(step: int, scale: float) -> float:
        epoch, warmup = step / len(loader), cfg.warmup_epochs
        return scale * lr_at(epoch, lr, 0.0, cfg.min_lr, warmup, warmup, cfg.epochs)

    def end_of_epoch(epoch: int, _: list[dict]) -> dict:
        due = (epoch + 1) % cfg.save_freq == 0 or epoch + 1 == cfg.epochs
        if due and cfg.output_dir and process.rank == 0:
            output, view = Path(cfg.output_dir), data.EvalCrop(config.input_size, "mae")
            pixels, _, _ = next(data.eval_batches(loader.source, view, batch_size=8, few=8))
            shown = draw_shuffle(config, cfg.mask_ratio, len(pixels), (cfg.seed,))
            picture, _ = draw_reconstructions(model, pixels, shown)
            data.save_picture(picture, output / f"reconstruction-{epoch}.png")
            backbone = {"model": export_state(model), "args": args}
            data.save_file(output / "backbone.pth", partial(torch.save, backbone))
        return {}

    parts = {"model": model, "optimizer": optimizer}
    record = train(cfg, process, parts, loader, args, schedule, loss_of, end_of_epoch)
    if not cfg.data_path:
        process.say("dry run: to pre-train on your images, give --data_path FOLDER")
    return record


# ── fine-tuning ───────────────────────────────────────────────────────────────────────

class HPViTClassifier(HPViT):
    """The hierarchical, or plain, ViT with a linear head."""

    def __init__(self, config: ModelConfig, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.head = nn.Linear(config.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        return self.head(super().forward(images))


@torch.no_grad()
def accuracy(model: nn.Module, process: Process, source: data.ImageFiles, crop: Callable,
             batch_size: int, num_workers: int | None) -> dict:
    """Loss, top-1 and top-5 in percent over a labelled source, each image counted once."""
    model.eval()
    sums = torch.zeros(4, device=process.device)
    batches = data.eval_batches(source, crop, batch_size=batch_size, rank=process.rank,
                                world_size=process.world_size, num_workers=num_workers)
    for images, labels, _ in batches:
        labels = labels.to(process.device)
        with process.autocast():
            logits = model(data.normalize(images.to(process.device))).float()
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = loss.new_tensor(len(labels))
        sums += torch.stack([loss, right[:, 0].sum(), right.any(1).sum(), count])
    loss, top1, top5, count = process.sum(sums).tolist()
    return {"test_loss": loss / count, "test_acc1": 100 * top1 / count,
            "test_acc5": 100 * top5 / count, "test_images": int(count)}


def describe(config: ModelConfig) -> str:
    """Its shape in words."""
    if config.plain:
        return f"{data.sides(config.input_size)} px, a plain ViT"
    return (f"{data.sides(config.input_size)} px, a token every {config.patch_stride} px, "
            f"blocks {config.depths}, windows {config.windows}")


def tuning_groups(model: HPViTClassifier, cfg: FinetuneConfig) -> list[dict]:
    """AdamW groups with layer decay; of `pool_lr` full, the pools learn at the head's rate."""
    apart = cfg.pool_lr == "full" and not cfg.linear_probe
    if apart:
        model.pools.requires_grad_(False)
    groups = parameter_groups(model, cfg.weight_decay, model.config.depths, cfg.layer_decay)
    if apart:
        groups += parameter_groups(model.pools.requires_grad_(True), cfg.weight_decay)
    return groups


def finetune(cfg: FinetuneConfig) -> dict:
    """Train a classifier on train/<class>/, test on val/<class>/; ten steps without --data_path."""
    process = setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT) if cfg.weights else None
    name, config = choose_config(cfg, file)
    cfg, side = replace(cfg, model=name), config.input_size
    if cfg.linear_probe:
        cfg = replace(cfg, mixup=0.0, cutmix=0.0, smoothing=0.0, reprob=0.0, aa="", drop_path=0.0)
    if (cfg.mixup or cfg.cutmix) and cfg.batch_size % 2:
        raise InputError(f"--batch_size {cfg.batch_size} is odd: mixup and cutmix pair images")
    with data.blaming(f"--aa {cfg.aa}"):
        policy = augment.RandAugment(cfg.aa) if cfg.aa not in ("", "none") else None
    crop = data.TrainCrop(side, (cfg.crop_min, 1.0), augment=policy, fast_decode=cfg.fast_decode)
    cfg, loader, lr, args = prepare(cfg, process, config, "train", crop, 256)
    classes = loader.source.classes
    outputs = cfg.nb_classes or (len(classes) if cfg.data_path else 1000)
    test = data.open_source(cfg.data_path, "val") if cfg.data_path else loader.source
    data.check_classes(classes, test.classes, outputs)
    mixup = augment.Mixup(cfg.mixup, cfg.cutmix, smoothing=cfg.smoothing, num_classes=outputs)

    torch.manual_seed(cfg.seed)
    make = partial(HPViTClassifier, config, outputs, cfg.drop_path)
    model, said = load_weights(make, cfg.weights, file, fresh_head=True)
    process.say(said and f"{said}; {describe(config)}")
    if cfg.linear_probe:
        model.requires_grad_(False).head.requires_grad_(True)
    model.to(process.device).grad_checkpoint = cfg.grad_checkpoint
    groups = tuning_groups(model, cfg)
    optimizer = torch.optim.AdamW(groups, lr, fused=process.device.type != "mps")
    parts, judged = {"model": model, "optimizer": optimizer}, model
    if cfg.ema:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(cfg.ema)
        parts["ema"] = ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        optimizer.register_step_post_hook(lambda *_: ema.update_parameters(model))
        judged = ema.module

    def loss_of(net: nn.Module, images: Tensor, labels: Tensor, number: int) -> Tensor:
        rng = np.random.default_rng((cfg.seed, number, process.rank, 2))
        if cfg.reprob:
            images = augment.random_erase(images, rng, cfg.reprob)
        images, targets = mixup(images, labels, rng)
        return F.cross_entropy(net(images).float(), targets)

    def schedule(step: int, scale: float) -> float:
        epoch, warmup = step / len(loader), cfg.warmup_epochs
        return scale * lr_at(epoch, lr, 0.0, cfg.min_lr, warmup, warmup, cfg.epochs)

    def end_of_epoch(epoch: int, records: list[dict]) -> dict:
        if not cfg.data_path or ((epoch + 1) % cfg.test_freq and epoch + 1 < cfg.epochs):
            return {}
        view = data.EvalCrop(side, "mae")
        result = accuracy(judged, process, test, view, cfg.batch_size, cfg.num_workers)
        best = max((record.get("test_acc1", 0.0) for record in records), default=0.0)
        if result["test_acc1"] >= best and cfg.output_dir and process.rank == 0:
            content = {"model": judged.state_dict(), "args": args, "epoch": epoch} | result
            data.save_file(Path(cfg.output_dir) / "best.pth", partial(torch.save, content))
        return result

    record = train(cfg, process, parts, loader, args, schedule, loss_of, end_of_epoch)
    if not cfg.data_path:
        process.say("dry run: to fine-tune, give --data_path FOLDER with train/ and val/<class>/")
    return record


# ── other commands ────────────────────────────────────────────────────────────────────

def open_model(cfg: UseConfig, whole: bool = False, head: bool = True,
               process: Process | None = None) -> tuple[Process, nn.Module, dict, data.EvalCrop]:
    """Process, the network of --weights (`whole` = with its decoder, else an encoder or, if the
    file has a head that is wanted, a classifier), its "args" as a file would have, and the crop."""
    if not cfg.weights:
        raise InputError("give --weights FILE")
    process = process or setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT)
    name, config = choose_config(cfg if whole else replace(cfg, input_size=None), file)
    state, size = file["model"], cfg.input_size or config.input_size
    check_size(size, config.patch_size if whole else config.stride)
    if not whole:  # is a class token cut off from its map?
        model_config(config, input_size=max(np.atleast_1d(size).tolist()))
    make = partial(MAE if whole else HPViT, config)
    with data.blaming(cfg.weights):
        outputs = [len(state[k]) for k in ("head.weight", "head.bias") if k in state]
    if outputs and head and not whole:
        make = partial(HPViTClassifier, config, outputs[0])
    elif config.plain and not (outputs or whole) and cfg.global_pool is None:  # as pre-trained
        make = partial(HPViT, replace(config, global_pool="fc_norm.weight" in state))
    model, said = load_weights(make, cfg.weights, file)
    shown = replace(plain_twin(config) if whole else config, input_size=size)
    process.say(f"{said}; {name}, {describe(shown)}")
    args = file["args"] | {"script": SCRIPT, "model": name, "config": asdict(model.config)}
    return process, model.to(process.device).eval(), args, data.EvalCrop(size, "mae")


def load_backbone(path: str | Path, map_norm: bool = False, **flags: object) -> nn.Module:
    """Encoder with the weights of any file, and `flags` as of `features` (model="hpvit_base" makes
    one of MAE hierarchical): .maps, .channels, .strides; `map_norm`: a new LayerNorm a map."""
    alone = Process(0, 1, torch.device("cpu"), torch.float32)  # the program around it is not ours
    encoder = open_model(configure("features", weights=str(path), **flags), False, False, alone)[1]
    if map_norm:
        encoder.map_norms.extend(nn.LayerNorm(c, LAYER_NORM_EPS) for c in encoder.channels)
    return encoder


@torch.no_grad()
def embed(encoder: nn.Module, process: Process, source: data.ImageFiles, crop: Callable,
          cfg: UseConfig) -> dict[str, Tensor]:
    """All processes' "features" (n, C), with `per_stage` maps "stage0", ... instead (n, C, h, w),
    and the "labels" and "indices" (n,) of their images, on the CPU."""
    found: dict[str, list[Tensor]] = {}
    batches = data.eval_batches(source, crop, batch_size=cfg.batch_size, rank=process.rank,
                                world_size=process.world_size, num_workers=cfg.num_workers)
    for images, labels, indices in tqdm(batches, disable=not sys.stderr.isatty()):
        with process.autocast():
            images = data.normalize(images.to(process.device))
            maps = encoder.maps(images) if cfg.per_stage else ()
            named = {f"stage{i}": x for i, x in enumerate(maps)} or {"features": encoder(images)}
        named = {k: x.float() for k, x in named.items()}
        for key, value in (named | {"labels": labels, "indices": indices}).items():
            found.setdefault(key, []).append(value.cpu().clone())  # not the loader's
    parts = [{k: torch.cat(v) for k, v in found.items()}] * process.world_size
    if process.world_size > 1:
        dist.all_gather_object(parts, parts[process.rank])
    # Processes beyond the number of images have none.
    return {k: torch.cat([part[k] for part in parts if part]) for k in parts[0]}


def nearest_neighbours(features: Tensor, known: Tensor, labels: Tensor, k: int = 20,
                       temperature: float = 0.07) -> Tensor:
    """(B, C), (n, C), (n,) -> votes (B, classes): each of the k nearest exp(cosine / temperature).
    Weighted k-NN of Wu et al., arXiv 1805.01978, with the k and temperature of DINO."""
    cosine = F.normalize(features, dim=-1) @ F.normalize(known, dim=-1).T
    nearest = cosine.topk(min(k, len(known)))
    votes = torch.zeros(len(features), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[nearest.indices], (nearest.values / temperature).exp())


def evaluate(cfg: UseConfig) -> dict:
    """Top-1 and top-5 on val/<class>/, each image counted once; of a file without a head by the
    nearest neighbours of its features in train/<class>/."""
    process, model, args, crop = open_model(cfg)
    source = data.open_source(cfg.data_path, "val")
    if hasattr(model, "head"):
        outputs, found = model.head.out_features, source.classes
        if not args and len(found) != outputs:
            raise InputError(f"the data has {len(found)} classes, the model {outputs}")
        data.check_classes(args.get("classes") or found, found, outputs)
        result = accuracy(model, process, source, crop, cfg.batch_size, cfg.num_workers)
    else:
        train = data.open_source(cfg.data_path, "train")
        data.check_classes(train.classes, source.classes, len(train.classes))
        known, asked = (embed(model, process, x, crop, cfg) for x in (train, source))
        votes = torch.cat([nearest_neighbours(part, known["features"], known["labels"])
                           for part in asked["features"].split(256)])
        right = votes.topk(min(5, votes.shape[1])).indices == asked["labels"][:, None]
        top1, top5 = (100 * hits.double().mean().item() for hits in (right[:, 0], right.any(1)))
        result = {"knn_acc1": top1, "knn_acc5": top5, "test_images": len(right)}
    process.say(json.dumps(result))
    return result


@torch.no_grad()
def draw_reconstructions(model: MAE, pixels: Tensor,
                         plan: ShufflePlan) -> tuple[Image.Image, float]:
    """Labelled grid for uint8 (B, 3, S, S): image, what the encoder saw, reconstruction; loss."""
    model.eval()
    size, device, label = model.config.patch_size, model.mask_token.device, "reconstruction"
    plan, images = to_device(plan, device), data.normalize(pixels.to(device))
    patches = patchify(images, size)
    loss, prediction = model(images, plan)
    if model.config.norm_pix_loss:
        _, mean, deviation = normalize_patches(take(patches, plan.hidden))
        prediction, label = prediction * deviation + mean, f"{label}, true mean and contrast"
    hidden = plan.hidden.unsqueeze(-1).expand_as(prediction)
    seen, filled = patches.scatter(1, hidden, 0.0), patches.scatter(1, hidden, prediction)
    layout = "k b (h w) (p q c) -> k b c (h p) (w q)"  # 0 is the mean colour
    columns = rearrange([patches, seen, filled], layout, h=model.config.units, p=size, q=size)
    return data.draw_columns(columns, ("image", "visible", label)), loss.item()


def reconstruct(cfg: UseConfig) -> dict:
    """PNG grid of images, their visible parts and reconstructions by a pre-trained file."""
    output = Path(cfg.output or "reconstruction.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {output}: pictures are written as .png")
    process, model, args, crop = open_model(cfg, whole=True)
    ratio = args.get("settings", {}).get("mask_ratio", 0.75)
    ratio = ratio if cfg.mask_ratio is None else cfg.mask_ratio
    draw_shuffle(model.config, ratio, 1, (cfg.seed,))  # checks the ratio
    source = data.open_source(cfg.data_path)
    pixels, _, _ = next(data.eval_batches(source, crop, batch_size=cfg.count, few=cfg.count))
    plan = draw_shuffle(model.config, ratio, len(pixels), (cfg.seed,))
    picture, loss = draw_reconstructions(model, pixels, plan)
    if process.rank == 0:
        data.save_picture(picture, output)
    process.say(f"wrote {output}: {len(pixels)} images, ratio {ratio}, loss {loss:.4f}")
    return {"output": str(output), "images": len(pixels), "mask_ratio": ratio, "loss": loss}


def save_state(process: Process, output: Path, state: dict[str, Tensor], content: dict) -> dict:
    """Write a state dict, once: as .safetensors, or the `content` that holds it as .pth."""
    write = partial(torch.save, content)
    if output.suffix == ".safetensors":
        with data.blaming(output):
            from safetensors.torch import save

        write = lambda file: file.write(save(state))  # noqa: E731
    if process.rank == 0:
        data.save_file(output, write)
    process.say(f"wrote {len(state)} tensors to {output}; it wants RGB / 255, less mean "
                f"{data.IMAGENET_MEAN}, over deviation {data.IMAGENET_STD}")
    return {"output": str(output), "tensors": len(state)}


def export(cfg: UseConfig) -> dict:
    """Encoder, and head if there is one; a plain network in names that MAE and timm share."""
    if cfg.input_size:
        raise InputError("export writes a network as its file has it: leave out --input_size")
    process, model, args, _ = open_model(cfg)
    config, output = model.config, Path(cfg.output or f"{Path(cfg.weights).stem}-{cfg.naming}.pth")
    if cfg.naming == "timm" and not config.plain:
        raise InputError("--naming timm: no network of timm pools a ViT between its blocks; "
                         "official works, and so does a plain --model if the file is of one")
    state = export_state(model)
    content = {"model": state} | ({} if config.plain else {"args": args})  # shapes tell too little
    result = save_state(process, output, state, state if cfg.naming == "timm" else content)
    if not config.plain and output.suffix == ".safetensors":
        process.say("tensors alone do not tell stages and windows: to read it give --model, and "
                    "--depths, --windows and so on where they are not that model's")
    if config.plain:
        names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        pool = "avg" if config.global_pool else "token"
        outputs = model.head.out_features if isinstance(model, HPViTClassifier) else 0
        process.say(f"timm.create_model('vit_base_patch16_224', img_size={config.input_size}, "
                    f"{sizes}, num_classes={outputs}, global_pool='{pool}') loads it strictly")
    return result


def features(cfg: UseConfig) -> dict:
    """Pooled features (n, C), or maps (n, C, h, w) of every stage, and file names, as .npz."""
    process, model, _, crop = open_model(cfg, head=False)
    source, output = data.open_source(cfg.data_path), Path(cfg.output or "features.npz")
    found = embed(model, process, source, crop, cfg)
    indices, order = found.pop("indices").sort()
    arrays = {k: v[order].numpy() for k, v in found.items() if k != "labels"}
    arrays["names"] = np.array([source.name(i) for i in indices.tolist()])
    if process.rank == 0:
        data.save_file(output, lambda file: np.savez(file, **arrays))
    process.say(f"wrote {', '.join(f'{k} {v.shape}' for k, v in arrays.items())} to {output}")
    return {"output": str(output)} | {k: list(v.shape) for k, v in arrays.items()}


def demo(cfg: UseConfig) -> dict:
    """Pre-train a small plain model on built-in images; fine-tune it as a hierarchical one, as a
    plain one, and a hierarchical twin from scratch."""
    began, output = time.monotonic(), Path(cfg.output or f"output/{SCRIPT}/demo")
    both = {"seed": cfg.seed, "device": cfg.device, "num_workers": 1, "resume": "none",
            "crop_min": 0.6, "log_every": 1000}
    process = setup_process(cfg.device, "auto")
    torch.manual_seed(cfg.seed)
    # The twin starts where pre-training starts, so that only pre-training tells them apart.
    start = {"model": export_state(MAE(MODELS["demo"]))}
    if process.rank == 0:
        data.save_file(output / "start.pth", partial(torch.save, start))
    pretrain(PretrainConfig(**both, model="demo", data_path="drawn:8192",
                            output_dir=str(output / "pretrain"),
                            batch_size=64, epochs=5, warmup_epochs=1, lr=2e-3))
    result = {}
    for name, model, weights in (("pretrained", "demo", "pretrain/backbone.pth"),
                                 ("plain", "plain_demo", "pretrain/backbone.pth"),
                                 ("scratch", "demo", "start.pth")):
        tested = finetune(FinetuneConfig(
            **both, model=model, data_path="drawn:1000", weights=str(output / weights),
            output_dir=str(output / name), batch_size=25, epochs=4, warmup_epochs=1,
            lr=4e-3, clip_grad=0.5, layer_decay=0.8, mixup=0, cutmix=0, reprob=0, aa="",
            drop_path=0, ema=0.97, test_freq=4))
        result[f"{name}_acc1"] = round(tested["test_acc1"], 1)
    result |= {"chance": 10.0, "picture": str(output / "pretrain" / "reconstruction-4.png"),
               "seconds": round(time.monotonic() - began, 1)}
    process.say(json.dumps(result))
    return result


# ── command line ──────────────────────────────────────────────────────────────────────

USES = (evaluate, reconstruct, export, features, demo)
COMMANDS = {"pretrain": (PretrainConfig, pretrain), "finetune": (FinetuneConfig, finetune),
            **{function.__name__: (UseConfig, function) for function in USES}}


def fit(hint: object, value: object) -> object:
    """`value`, text of a flag or a Python value, as a field of type `hint` holds it; ValueError
    ends a sentence that begins with the flag: "... does not lie between 0 and 1"."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, (low, high) = options
        number = None
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = kind(value)
        if number is None or (number != value and not isinstance(value, str)):
            raise ValueError(f"is no {'whole ' if kind is int else ''}number")
        if not low <= number <= high:
            raise ValueError(f"does not lie between {low} and {high}")
        return number
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else np.atleast_1d(value).tolist()
        return tuple(fit(options[0], item) for item in items)
    if origin is Literal and value not in options:
        raise ValueError(f"is none of {', '.join(options)}")
    if not options and not isinstance(value, hint):
        raise ValueError(f"is not of type {hint.__name__}")
    if origin is Literal or not options:
        return value
    own = typing.get_args(options[0])  # of a union, from here on; "none" may be one of them
    if type(None) in options and (value is None or (value == "none" and "none" not in own)):
        return None
    pair = value.split("x") if isinstance(value, str) else value
    if tuple[int, int] in options and isinstance(pair, tuple | list) and len(pair) == 2:
        height, width = (fit(options[0], side) for side in pair)
        return height if height == width else (height, width)
    return fit(options[0], value)


def configure(command: str = "pretrain", **given: object) -> RunConfig | UseConfig:
    """The config that the command line would make of these flags: the classes' values, then the
    recipe's, then `given`, checked; InputError says what does not fit."""
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
    kind, _ = COMMANDS[command]
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, value in given.items():
        if name not in hints:
            near = ", ".join(difflib.get_close_matches(name, hints, 3, 0))
            raise InputError(f"{command} has no --{name}; the closest are {near}")
        try:
            given[name] = fit(hints[name], value)
        except ValueError as error:
            raise InputError(f"--{name} {value} {error}") from None
    model, recipe = given.get("model"), {}
    if issubclass(kind, RunConfig):
        asked = given.get("recipe", "published")
        known = sorted({"published", *(key[1] for key in RECIPES if key[0] == command)})
        if asked not in known:
            raise InputError(f"--recipe {asked} is none of {', '.join(known)}")
        if not model and given.get("weights"):
            with data.blaming(given["weights"]):
                model, _ = identify(data.read_checkpoint(given["weights"], SCRIPT))
        recipe = RECIPES.get((command, asked), {})
        model = known_model(model or recipe.get("model") or next(iter(MODELS)))
        recipe = recipe | RECIPES.get((command, asked, model), {})
    return kind(**(recipe | given | ({"model": known_model(model)} if model else {})))


def parse_config(argv: Sequence[str]) -> tuple[Callable, RunConfig | UseConfig]:
    """The command's function and its config; a field is a flag, its trailing comment the help."""
    command = argv[0] if argv and not argv[0].startswith("-") else "pretrain"
    config_class, function = COMMANDS.get(command) or configure(command)  # which knows the error
    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT}.py {command}", description=function.__doc__, allow_abbrev=False,
        exit_on_error=False, epilog=f"commands: {', '.join(COMMANDS)}; each has its own --help; "
                                    f"models: {', '.join(MODELS)}")
    hints, helps = typing.get_type_hints(config_class), {}
    for base in reversed(config_class.__mro__[:-1]):
        helps |= dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), re.M))
    for field in fields(config_class):
        kinds = (hints[field.name], *typing.get_args(hints[field.name]))
        how = {"action": argparse.BooleanOptionalAction} if bool in kinds else {}
        for kind in kinds:
            if typing.get_origin(kind) is Literal:
                how = {"metavar": "{" + ",".join(typing.get_args(kind)) + "}"}
        names = dict.fromkeys([f"--{field.name}", "--" + field.name.replace("_", "-")])
        text = f"{helps[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(*names, default=argparse.SUPPRESS, help=text, **how)
    flags = argv[1:] if argv[:1] == [command] else argv
    flags = ["--no-" + flag[5:] if flag.startswith("--no_") else flag for flag in flags]
    try:
        known, rest = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise InputError(f"{error} (see --help)") from None
    if rest and rest[0].startswith("--"):  # the error that names the closest flags
        configure(command, **{rest[0][2:].partition("=")[0].replace("-", "_"): None})
    if rest:
        raise InputError(f"unrecognized arguments: {' '.join(rest)} (see --help)")
    return function, configure(command, **vars(known))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code, and a sentence on errors, are those of `data.exit_code`."""

    def work() -> None:
        function, cfg = parse_config(sys.argv[1:] if argv is None else list(argv))
        function(cfg)
        if dist.is_initialized():  # on an error others may be waiting: no common farewell then
            dist.barrier()
            dist.destroy_process_group()

    return data.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
