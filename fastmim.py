"""FastMIM: masked image modelling of any backbone, of small images, with HOG as its target.

Guo, Han, Wu, Tang, Wang, Xu: "FastMIM: Expediting Masked Image Modeling Pre-training for Vision",
2022, arXiv 2212.06593. The method is this file from "masking" to "model", with `common/hog.py`,
and stands before the backbones: ViT, Swin, PVTv2 and CMT, each of which can be read alone.

The idea. Masked image modelling is slow: on pyramids hidden patches cannot just be left out. Here
nothing is left out; hidden blocks of pixels are painted over with one learned colour before the
image is embedded, so that any backbone takes it as it is, and time is saved where it costs least.
The images are small, 128 px instead of 192 or 224, which is two to three times as fast. And what
is predicted is not pixels but histograms of oriented gradients (HOG): unlike pixels they hardly
change with resolution, so that what was learned from small images holds for larger ones.

    z = e where m = 1, else I        I the image, e the mask token, three numbers, m the mask (1)
    x = x + proj(softmax(q k^T / sqrt(d) + R) v), q, k, v = linear(norm(x))               (2)
    x = x + fc2(gelu(fc1(norm(x))))                                                       (3)
    t_b = sum of |g| over the pixels of a cell with floor(9 atan2(gx, gy) / pi) mod 9 = b,
          for each colour, g = (gx, gy) Sobel's gradient of I; t / max(norm of t, 1e-12)  (4)
    t = (u - mean(u)) / sqrt(var(u) + 1e-6)           u a patch of pixels, instead of (4) (5)
    loss = sum of m (p - t)^2 / (K sum of m)          over cells and their K channels     (6)
    x = linear(norm([x(0,0), x(1,0), x(0,1), x(1,1)]))  (row, column) of a 2x2 block      (7)
    R' = M R M^T, M a cubic spline through geometric positions                            (8)

(2) and (3) are the plain block: of ViT, of every decoder and, in windows, of Swin. R is the learned
relative position bias of Swin, of all windows of a block, and of CMT, of all blocks of a stage;
(7) merges Swin's tokens, (8) makes its tables fit other windows.

Data flow at 128 px, cells of 8 px and K = 27 channels in (4). Stages count from 0.
    images (B, 3, 128, 128), masks (B, g, g) of blocks -> painted images   (B, 3, 128, 128)
    ViT-B, blocks of 16 px, g = 8: patches of 16 px, a class token         (B, 65, 768)
    pyramids, blocks of 32 px, g = 4: maps of 1/4, 1/8, 1/16, 1/32         (B, 16, C)
    Linear, plain blocks (B, N, 256), norm, Linear                         (B, N, 27 r^2)
    a token's r x r cells in their places (r = 2 for ViT, 4): p            (B, 27, 16, 16)
    target of the image that was not painted: t                            (B, 27, 16, 16)

FastMIM-P pre-trains in phases of growing resolution (`--progressive 128:0,160:200,192:300`), which
released code begins and leaves unfinished: no model of it takes another size. Here the network of
a phase is that of the last one, with what depends on the size made anew: ViT's fixed table; Swin's
windows, as many tokens a side as the last map has, by (8); CMT's R by interpolation. All else goes
on, moments of the optimizer included; those of a parameter of a new shape begin at zero.

Paper, released code, and here:
  - ViT-B is pre-trained with 6 heads and fine-tuned with 12, of the same shapes, by an oversight
    in the release; that is its recipe, so it is done here, and said. `--num_heads 12` is for both.
  - Released HOG is worked out in half precision, which moves one pixel in a hundred into another
    bin; here in float32. atan2 has its arguments the other way round than in the textbook, here
    as there: it only counts bins from another axis.
  - The last blocks can be left out of pre-training, the paper says: `--drop_last N` (not released).
  - Released fine-tuning loses the last norm of Swin and of ViT by renaming it; so does this, unless
    `--keep_norm`. CMT's R does not fit 224 px there; its interpolation is imported but not called.
  - Logits between unlike regions of a shifted window get -100 there, -inf here. Windows must
    divide maps in training; elsewhere border windows are cut.
  - PVTv2 and CMT have no published command: theirs is Swin-B's with 800 epochs (ours).

Letters: B batch, N tokens, C channels, K channels of a cell, h heads, d head width, S tokens of a
window; H, W pixels, (h, w) tokens of a map, g blocks a side, r cells of a token a side.
Comments say where a value is from: (paper), (released ...), (MAE), (ours) = chosen here.

Usage:
    python fastmim.py demo                                        about a minute, two CPU cores
    torchrun --nproc_per_node 8 fastmim.py --data_path /imagenet                        ViT-B
    torchrun --nproc_per_node 8 fastmim.py --model swin_b --data_path /imagenet
    torchrun --nproc_per_node 8 fastmim.py finetune --data_path /imagenet \
        --weights output/fastmim/pretrain/backbone.pth
    python fastmim.py {evaluate,reconstruct,export,features} --help
Feature maps for dense heads: `maps = load_backbone(FILE).maps(images)`, of any height and width.
To copy: this file and `common/`. The method alone: `ModelConfig`, from "masking" to "model", a
backbone, and `common/hog.py`.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import augment, data
from common.data import InputError, TrainingError
from common.hog import draw, hog

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
HOG_BINS, HOG_CELL = 9, 8  # unsigned directions, and pixels a side of a cell (released)
Target = Literal["hog", "pixel"]
Width = Annotated[int, (4, 4096)]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture only; stored in every checkpoint. Tuples have an entry a stage."""
    family: Literal["vit", "swin", "pvtv2", "cmt"] = "vit"
    input_size: Annotated[int, (1, 4096)] = 128
    patch_size: Annotated[int, (1, 64)] = 16  # pixels a side of a token of stage 0
    embed_dims: tuple[Width, ...] = (768,)
    depths: tuple[Annotated[int, (1, 99)], ...] = (12,)
    num_heads: tuple[Count, ...] = (12,)
    pretrain_heads: tuple[Count, ...] = ()  # in pre-training, if it has others
    mlp_ratios: tuple[Annotated[float, (0.01, 100.0)], ...] = (4.0,)
    sr_ratios: tuple[Annotated[int, (1, 64)], ...] = ()  # PVTv2, CMT: side of tokens a key is of
    stem_dim: Annotated[int, (0, 4096)] = 0  # CMT
    fc_dim: Annotated[int, (0, 8192)] = 0  # CMT, before the head
    window_size: Annotated[int, (0, 1024)] = 0  # Swin; 0 = the side of the last map
    global_pool: bool = True  # ViT: the head sees the mean token, not the class token
    drop_last: Annotated[int, (0, 99)] = 0  # blocks that pre-training leaves out
    block_size: Annotated[int, (1, 4096)] = 16  # pixels a side of what is masked
    decoder_dim: Annotated[int, (32, 4096)] = 256
    decoder_depth: Annotated[int, (0, 99)] = 1
    target: Target = "hog"
    norm_pix_loss: bool = True

    @property
    def stride(self) -> int:
        """Pixels per side of a token of the last stage: it divides the sides of images."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def cell(self) -> int:
        """Pixels per side of what the target describes as one: a cell of HOG, or a patch."""
        return HOG_CELL if self.target == "hog" else math.gcd(self.stride, self.block_size)

    @property
    def blocks(self) -> int:
        """g, blocks per side of the image."""
        return self.input_size // self.block_size

    @property
    def drop_stage(self) -> int:
        """The stage whose last blocks pre-training may leave out: the third, or the only one."""
        return min(2, len(self.depths) - 1)

    def side(self, stage: int) -> int:
        """Tokens per side of a stage's map."""
        return self.input_size // self.patch_size // 2**stage

    def window(self, stage: int) -> int:
        """Tokens per side of a stage's windows."""
        return min(self.window_size or self.side(len(self.depths) - 1), self.side(stage))


def pretraining(config: ModelConfig) -> ModelConfig:
    """The encoder as it is pre-trained: with heads of its own, without its last blocks."""
    depths = list(config.depths)
    depths[config.drop_stage] -= config.drop_last
    return replace(config, depths=tuple(depths), drop_last=0, pretrain_heads=(),
                   num_heads=config.pretrain_heads or config.num_heads)


PYRAMID = partial(ModelConfig, patch_size=4, mlp_ratios=(4, 4, 4, 4), block_size=32,
                  decoder_depth=4)
PVT = partial(PYRAMID, "pvtv2", embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8),
              sr_ratios=(8, 4, 2, 1))
SMALL = partial(PYRAMID, input_size=64, depths=(1, 1, 2, 1), embed_dims=(16, 16, 32, 32),
                num_heads=(1, 2, 4, 2), decoder_dim=32, decoder_depth=1)
MODELS = {
    "vit_b": ModelConfig(pretrain_heads=(6,)),
    "vit_l": ModelConfig(embed_dims=(1024,), depths=(24,), num_heads=(16,)),
    "swin_b": PYRAMID("swin", embed_dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2),
                      num_heads=(4, 8, 16, 32)),
    "swin_l": PYRAMID("swin", embed_dims=(192, 384, 768, 1536), depths=(2, 2, 18, 2),
                      num_heads=(6, 12, 24, 48)),
    "pvtv2_b2": PVT(depths=(3, 4, 6, 3), mlp_ratios=(8, 8, 4, 4)),
    "pvtv2_b5": PVT(depths=(3, 6, 40, 3)),
    "cmt_s": PYRAMID("cmt", embed_dims=(64, 128, 256, 512), depths=(3, 3, 16, 3),
                     num_heads=(1, 2, 4, 8), sr_ratios=(8, 4, 2, 1), stem_dim=32, fc_dim=1280),
    # The following are ours.
    "swin_n": PYRAMID("swin", embed_dims=(48, 96, 192, 384), depths=(2, 2, 6, 2),
                      num_heads=(3, 6, 12, 24), decoder_dim=192, decoder_depth=1),
    "demo": ModelConfig("vit", 64, 16, (64,), (3,), (4,), block_size=8, decoder_dim=32),
    "demo_swin": ModelConfig("swin", 64, 8, (32, 64), (1, 2), (2, 4), mlp_ratios=(4, 4),
                             block_size=8, decoder_dim=32),
    "test": ModelConfig("vit", 64, 16, (32,), (2,), (2,), (1,), decoder_dim=32),
    "test_swin": SMALL("swin", embed_dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8)),
    "test_pvtv2": SMALL("pvtv2", sr_ratios=(8, 4, 2, 1)),
    "test_cmt": SMALL("cmt", sr_ratios=(8, 4, 2, 1), stem_dim=8, fc_dim=48),
}
OTHER_NAMES = {  # the constructors of released code, and timm's
    "mim_vit_base": "vit_b", "vit_base_patch16": "vit_b", "vit_base_patch16_224": "vit_b",
    "vit_large_patch16": "vit_l", "vit_large_patch16_224": "vit_l", "mim_swin_base": "swin_b",
    "swin_base_patch4_window7_224": "swin_b", "mim_swin_large": "swin_l",
    "swin_large_patch4_window14_224": "swin_l", "mim_pvtv2_b2": "pvtv2_b2",
    "pvt_v2_b2": "pvtv2_b2", "mim_pvtv2_b5": "pvtv2_b5", "pvt_v2_b5": "pvtv2_b5",
    "mim_cmt_small": "cmt_s", "cmt_small": "cmt_s",
}
RECIPES = {  # by command, recipe and, where it matters, model: what differs from the classes below
    **{("pretrain", "published", name): {
        "batch_size": 256, "warmup_epochs": 10.0, "save_freq": 50, "epochs": epochs}
       for name, epochs in (("swin_b", 400), ("swin_l", 400),  # the latter and the following: ours
                            ("pvtv2_b2", 800), ("pvtv2_b5", 800), ("cmt_s", 800))},
    **{("finetune", "published", name): {"blr": 1e-3, "layer_decay": 0.8} | more
       for names, more in ((("swin_b", "pvtv2_b2", "pvtv2_b5", "cmt_s"), {}),
                           (("swin_l",), {"window_size": 14}))  # of its released classifier
       for name in names},
    **{("finetune", "published", name): {"input_size": config.input_size}
       for name, config in MODELS.items() if config.input_size == 64},
    ("pretrain", "small"): {
        "model": "swin_n", "batch_size": 64, "blr": 1.6e-3, "epochs": 100, "warmup_epochs": 5.0},
    ("finetune", "small"): {
        "model": "swin_n", "input_size": 128, "batch_size": 32, "blr": 8e-3, "epochs": 60,
        "warmup_epochs": 3.0, "layer_decay": 0.8, "clip_grad": 1.0, "crop_min": 0.35, "mixup": 0.0,
        "cutmix": 0.0, "reprob": 0.0, "aa": "none"},
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
    """What FastMIM lets one change of the network; None = as the file or the model has it."""
    window_size: Annotated[int, (0, 1024)] | None = None  # Swin: tokens a side; 0 = last map (ours)
    num_heads: tuple[Count, ...] | None = None  # one a stage, also for pre-training (ours)


@dataclass(frozen=True)
class PretrainConfig(RunConfig, MethodConfig):
    """Recipe of the released command for ViT-B, 8 processes; that of the model in RECIPES."""
    output_dir: str = f"output/{SCRIPT}/pretrain"  # checkpoints, log.txt, pictures (ours)
    batch_size: Count = 512  # images per process (released command)
    epochs: Count = 800  # passes over the data (released command)
    warmup_epochs: Amount = 20.0  # linear warm-up (released command)
    blr: Amount = 1.5e-4  # learning rate per 256 images (released command)
    min_lr: Amount = 0.0  # end of the cosine (released default)
    decay_epoch: Count | None = None  # epochs to each tenth of the rate; none = cosine (released)
    weight_decay: Amount = 0.05  # AdamW (released command)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (released)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.2  # smallest crop, share of the image (released)
    save_freq: Count = 100  # epochs between checkpoints that are kept (released command)
    mask_ratio: Share = 0.75  # share of hidden blocks (paper)
    block_size: Count | None = None  # px a side of a block; none = 16 ViT, 32 pyramids (released)
    target: Target | None = None  # hog or pixel; none = hog (paper)
    norm_pix_loss: bool | None = None  # normalise each target cell; none = yes (released command)
    decoder_dim: Annotated[int, (32, 4096)] | None = None  # channels; none = 256 (released command)
    decoder_depth: Annotated[int, (0, 99)] | None = None  # blocks; none = 1, pyramids 4 (released)
    drop_last: Annotated[int, (0, 99)] | None = None  # last blocks to leave out, of stage 2 (paper)
    progressive: str = ""  # side:first epoch[:batch], ... as 128:0,160:200,192:300 (paper)
    progressive_blocks: Literal["pixels", "cells"] = "pixels"  # what of a block stays (ours)
    sync_bn: bool = False  # CMT: batch statistics over all processes (ours)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig, MethodConfig):
    """Recipe of the released command for ViT-B, 8 processes; that of the model in RECIPES."""
    output_dir: str = f"output/{SCRIPT}/finetune"  # checkpoints and log.txt (ours)
    input_size: Pixels | None = 224  # pixels; none = as the weights or the model (released)
    linear_probe: bool = False  # train the head only: plain crops, no mixing (ours)
    nb_classes: Count | None = None  # outputs; none = the number of class folders (ours)
    batch_size: Count = 128  # images per process (released command)
    epochs: Count = 100  # passes over the data (released command)
    warmup_epochs: Amount = 5.0  # linear warm-up (released command)
    blr: Amount = 6e-4  # learning rate per 256 images (released command)
    min_lr: Amount = 1e-6  # end of the cosine, before layer decay (released default)
    weight_decay: Amount = 0.05  # AdamW (released command)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (released default)
    layer_decay: Share = 0.7  # learning rate factor from layer to layer (released command)
    drop_path: Annotated[float, (0.0, 0.99999)] = 0.1  # stochastic depth, last block (released)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.08  # smallest crop, share of the image (released)
    mixup: Amount = 0.8  # Beta parameter, 0 = off (released command)
    cutmix: Amount = 1.0  # Beta parameter, 0 = off (released command)
    smoothing: Share = 0.1  # label smoothing (released default)
    reprob: Share = 0.25  # probability of random erasing (released command)
    aa: str = "rand-m9-mstd0.5-inc1"  # RandAugment policy, none = off (released default)
    ema: Annotated[float, (0.0, 0.99999)] = 0.0  # decay of averaged weights, 0 = off (released)
    test_freq: Count = 1  # epochs between tests; the last is always tested (ours)
    global_pool: bool | None = None  # ViT: head on the mean token, else class token (released)
    keep_norm: bool = False  # take over the last norm of ViT and Swin, which is lost (released)
    sync_bn: bool = False  # CMT: batch statistics over all processes (ours)


@dataclass(frozen=True)
class UseConfig(FileConfig, MethodConfig):
    """What the commands that do not train need."""
    naming: Literal["official", "timm"] = "official"  # export: whose parameter names (ours)
    mask_ratio: Share | None = None  # reconstruct: none = the file's, else 0.75 (ours)
    block_size: Count | None = None  # reconstruct: none = the file's, else the model's (ours)
    norm_pix_loss: bool | None = None  # reconstruct: as in pre-training; none = the file's (ours)


def known_model(name: str) -> str:
    """Our name of a network; InputError with the closest names if there is none."""
    if OTHER_NAMES.get(name, name) not in MODELS:
        near = difflib.get_close_matches(name, [*MODELS, *OTHER_NAMES], 3, 0)
        raise InputError(f"unknown model {name!r}; the closest names are {', '.join(near)}")
    return OTHER_NAMES.get(name, name)


def model_config(base: ModelConfig, **changes: object) -> ModelConfig:
    """`base` with `changes` (None = keep); checks that all fit together."""
    changes = {k: v for k, v in changes.items() if v is not None}
    if "num_heads" in changes:
        changes["pretrain_heads"] = ()
    config = replace(base, **changes)
    stages = len(config.depths)
    if isinstance(config.input_size, tuple):
        raise InputError(f"--input_size {data.sides(config.input_size)}: here images are square")
    check_size(config.input_size, config.stride)
    for name in ("embed_dims", "num_heads", "mlp_ratios", "sr_ratios", "pretrain_heads"):
        value = getattr(config, name)
        if len(value) != stages and (value or name in ("embed_dims", "num_heads", "mlp_ratios")):
            raise InputError(f"--{name} {value}: give {stages}, one a stage")
    for heads in (config.num_heads, config.pretrain_heads):
        if any(dim % h for dim, h in zip(config.embed_dims, heads, strict=False)):
            raise InputError(f"--num_heads {heads} do not divide the widths {config.embed_dims}")
    if config.drop_last >= config.depths[config.drop_stage]:
        raise InputError(f"--drop_last {config.drop_last} leaves nothing of the "
                         f"{config.depths[config.drop_stage]} blocks it is to shorten")
    for flag, family in (("window_size", "swin"), ("global_pool", "vit")):
        if flag in changes and config.family != family:
            raise InputError(f"--{flag}: a network of the family {config.family} has no such thing")
    if config.family == "swin":
        check_window_size(config)
    return config


def check_masking(config: ModelConfig) -> None:
    """InputError if blocks, target or decoder do not fit the network; only pre-training asks."""
    width = config.decoder_dim
    if config.input_size % config.block_size or config.block_size % config.cell:
        fits = [b for b in range(config.cell, config.input_size)
                if config.input_size % b == 0 and b % config.cell == 0]
        raise InputError(f"--block_size {config.block_size}: blocks have to divide images of "
                         f"{config.input_size} px and consist of cells of {config.cell} px, as "
                         f"{', '.join(map(str, fits))} do")
    if config.stride % config.cell:
        raise InputError(f"--target hog: cells of {config.cell} px do not divide a token's "
                         f"{config.stride} px; --target pixel works")
    if width % (width // 32):
        raise InputError(f"--decoder_dim {width} is no multiple of its {width // 32} heads; "
                         "multiples of 32 are")
    if config.decoder_depth == 0 and width != config.embed_dims[-1]:
        raise InputError(f"--decoder_depth 0 needs --decoder_dim {config.embed_dims[-1]}, the "
                         "width of the encoder")


def check_window_size(config: ModelConfig) -> None:
    """InputError, which names those that do, unless Swin's windows divide their maps."""
    stages, size = range(len(config.depths)), config.input_size

    def fits(window: int) -> bool:
        there = replace(config, window_size=window)
        return all(there.side(i) % there.window(i) == 0 for i in stages)

    if not fits(config.window_size):
        near = [str(w) for w in range(2, config.side(0) + 1) if fits(w)]
        raise InputError(f"--window_size {config.window_size} does not divide the maps of {size} "
                         f"px; {', '.join(near)} do, and 0 stands for the side of the last map")


def check_size(size: Pixels, unit: int) -> None:
    """InputError, which names the nearest that do, unless `unit` divides every side of `size`."""
    for side in size if isinstance(size, tuple) else (size,):
        low = max(2, side // unit) * unit
        if side % unit or side < low:
            raise InputError(f"--input_size {data.sides(size)} does not fit: a side must be a "
                             f"multiple of {unit}, the nearest are {low} and {low + unit}")


# ── masking ───────────────────────────────────────────────────────────────────────────

def hide_blocks(noise: np.ndarray, mask_ratio: float) -> np.ndarray:
    """(B, g * g) noise -> (B, g, g) bool, True = hidden: of each image the int(g^2 (1 - ratio))
    blocks of least noise stay visible."""
    blocks = noise.shape[1]
    kept = int(blocks * (1 - mask_ratio))
    if not 1 <= kept < blocks:
        raise InputError(f"--mask_ratio {mask_ratio} leaves {kept} of {blocks} blocks visible: "
                         "at least one must stay visible and one be hidden")
    mask = np.ones(noise.shape, bool)
    np.put_along_axis(mask, np.argsort(noise, axis=1, kind="stable")[:, :kept], False, axis=1)
    return mask.reshape(len(noise), math.isqrt(blocks), -1)


def draw_blocks(config: ModelConfig, mask_ratio: float, batch: int,
                seed: Sequence[int]) -> np.ndarray:
    """The masks (B, g, g) that belong to `seed` (run seed, step, rank): one for each image."""
    noise = np.random.default_rng(seed).random((batch, config.blocks**2), np.float32)
    return hide_blocks(noise, mask_ratio)


def to_device(plan: object, device: torch.device) -> object:
    """The plan with its arrays as tensors on `device`, copied without waiting for the device."""
    if isinstance(plan, np.ndarray):
        tensor = torch.from_numpy(plan)
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor.to(device, non_blocking=True)
    if is_dataclass(plan):
        return replace(plan, **{k: to_device(v, device) for k, v in vars(plan).items()})
    return [to_device(item, device) for item in plan] if isinstance(plan, list) else plan


def enlarge(mask: Tensor, side: int) -> Tensor:
    """(B, g, g) -> (B, 1, side, side), each block as a square of cells or pixels."""
    times = side // mask.shape[1]
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2).unsqueeze(1)


# ── decoder and target ────────────────────────────────────────────────────────────────

def patchify(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, U, P): squares of `size` pixels, each as (row, column, channel)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, P) -> Eq. (5), and the mean and deviation (B, U, 1) that undo it."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as released
    deviation = (variance + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


def make_target(images: Tensor, config: ModelConfig) -> Tensor:
    """Images (B, 3, H, W), not painted -> (B, K, H / cell, W / cell)."""
    if config.target == "hog":
        return hog(images, HOG_BINS, HOG_CELL, config.norm_pix_loss)  # Eq. (4)
    patches = patchify(images, config.cell)
    if config.norm_pix_loss:
        patches, _, _ = normalize_patches(patches)
    return rearrange(patches, "b (h w) k -> b k h w", h=images.shape[-2] // config.cell)


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. (6) for (B, K, s, s) and (B, g, g), as a dense sum: no shape depends on the mask."""
    hidden = enlarge(mask, target.shape[-1])  # (B, 1, s, s)
    if hidden.device.type == "cpu" and not hidden.any():  # a GPU would have to be waited for
        raise ValueError("nothing is hidden: there is no loss")
    return ((prediction - target).square() * hidden).sum() / (hidden.sum() * target.shape[1])


def sincos_table(dim: int, units: int, side: int) -> Tensor:
    """(1, 1 + side^2, dim) fixed table: zeros for the class token, then in raster order sin and
    cos of the column, then of the row, of `side` places that span a grid of `units`."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = (torch.arange(side, dtype=torch.float64) + 0.5) * units / side - 0.5
    place = place.unsqueeze(1) * omega  # (side, dim / 4)
    rows, columns = place.repeat_interleave(side, 0), place.repeat(side, 1)
    table = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float().unsqueeze(0)


# ── model ─────────────────────────────────────────────────────────────────────────────

class FastMIM(nn.Module):
    """Any backbone on painted images, a decoder of plain blocks, Eq. (6) of what was hidden. The
    mask is (B, g, g) bool, True = hidden, an array or a tensor; released files have as many hidden
    blocks in each image. What a ViT's `encoder` holds has names without that prefix, as released.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_masking(config)
        self.config = config
        plain, width = config.family == "vit", config.decoder_dim
        eps = 1e-6 if plain else 1e-5
        self.mask_token = nn.Parameter(torch.empty(1, 3, 1, 1))
        self.encoder = BACKBONES[config.family](pretraining(config))
        # Without blocks there is no change of width either, as released.
        deep = config.decoder_depth > 0
        self.decoder_embed = nn.Linear(config.embed_dims[-1], width) if deep else nn.Identity()
        self.decoder_blocks = nn.ModuleList(
            Block(width, Attention(width, width // 32), 4, eps)
            for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps)
        # The channels of as many cells as a token has.
        channels = 3 * (HOG_BINS if config.target == "hog" else config.cell**2)
        self.decoder_pred = nn.Linear(width, channels * (config.stride // config.cell) ** 2)

        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if plain:
            self.encoder.fix_positions()

    def paint(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, S, S), (B, g, g) -> (B, 3, S, S)"""
        token = self.mask_token.to(images.dtype)
        return torch.where(enlarge(mask, images.shape[-1]), token, images)  # Eq. (1)

    def decode(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C), with a class token or not -> (B, N, K r^2), without."""
        x = self.decoder_embed(x)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_pred(self.decoder_norm(x))
        return x[:, 1:] if self.config.family == "vit" else x

    def arrange(self, x: Tensor) -> Tensor:
        """(B, N, K r^2) -> (B, K, s, s): a token's channels are (K, cell row, cell column)."""
        r = self.config.stride // self.config.cell
        return rearrange(x, "b (h w) (k p q) -> b k (h p) (w q)",
                         h=self.config.input_size // self.config.stride, p=r, q=r)

    def forward(self, images: Tensor, mask: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Loss (), and predictions (B, N, K r^2) of all tokens, for (B, 3, S, S) images."""
        config, mask = self.config, torch.as_tensor(mask).to(images.device)
        if images.shape[-2:] != (config.input_size,) * 2:
            raise ValueError(f"images are {tuple(images.shape)}, not {config.input_size} px")
        if mask.shape != (len(images), config.blocks, config.blocks):
            raise ValueError(f"masks are {tuple(mask.shape)}, not of {len(images)} images and "
                             f"{config.blocks}x{config.blocks} blocks")
        prediction = self.decode(self.encoder.tokens(self.paint(images, mask))).float()
        target = make_target(images, config)
        return masked_error(self.arrange(prediction), target, mask), prediction

    def state_dict(self, *args: object, **options: object) -> dict[str, Tensor]:
        """Under released names."""
        state = super().state_dict(*args, **options)
        prefix = "encoder." if self.config.family == "vit" else ""
        return {k.removeprefix(prefix): v for k, v in state.items()}

    def load_state_dict(self, state: dict[str, Tensor], *args: object, **options: object) -> object:
        """From released names."""
        if self.config.family == "vit":
            own = ("decoder_", "mask_token")
            state = {k if k.startswith(own) else f"encoder.{k}": v for k, v in state.items()}
        return super().load_state_dict(state, *args, **options)


# ── layers ────────────────────────────────────────────────────────────────────────────
# What several backbones share. Maps are channels-last wherever linear layers work on them; a
# convolution then sees a view, and what is 1x1, or strides as far as it reaches, is a product.


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Drop the branch of whole samples and scale the others to keep the mean (training only)."""
    if probability == 0.0:
        return x
    keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - probability)
    return x * keep / (1 - probability)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, all (B, heads, S, d); the bias (1, heads, S, S) learns."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
    # On the CPU no fused kernel takes a bias that needs a gradient, and its fallback runs
    # bf16 in fp32: written out, attention took half the time there.
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)) + bias
    return torch.matmul(logits.softmax(-1, dtype=torch.float32).to(v.dtype), v)


class Mlp(nn.Module):
    """Eq. (3) without its norm and residual."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


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


def convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution, or BatchNorm, of a channels-last map: (B, h, w, C) -> (B, h', w', C')."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def convolve_patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution that strides as far as it reaches, as a matrix product of a channels-last
    map's patches: (B, h, w, C) -> (B, h / p, w / p, C')."""
    p, q = conv.kernel_size
    x = rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=p, q=q)
    return F.linear(x, conv.weight.flatten(1), conv.bias)


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


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training uses a batch's statistics without counting them again."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked -= 1


# ── encoder ───────────────────────────────────────────────────────────────────────────

class Backbone(nn.Module):
    """What the four have in common. With `num_classes` it is the classifier that fine-tuning
    trains, without it the encoder that was pre-trained; the two differ in their last norms. Each
    has `stages`: (B, 3, H, W) -> tokens (B, N, C) of each stage, and `tokens`: those behind the
    last norm, which a decoder sees."""

    def __init__(self, config: ModelConfig, num_classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.channels = list(config.embed_dims)
        self.strides = [config.patch_size * 2**i for i in range(len(config.depths))]
        self.grad_checkpoint = False
        if num_classes:
            self.head = nn.Linear(config.fc_dim or self.channels[-1], num_classes)

    def draw_linear(self) -> None:
        """Initial weights of linear layers, in a classifier; pre-training draws its own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def rates(self, drop_path: float) -> Iterator[float]:
        """Of drop path for each block of the network, from 0 up."""
        return iter(np.linspace(0, drop_path, sum(self.config.depths)).tolist())

    def shapes(self, images: Tensor) -> list[tuple[int, int]]:
        """(h, w) of each stage's map."""
        height, width = images.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(f"images of {height}x{width} px: {self.config.stride} must divide "
                             "both sides")
        return [(height // stride, width // stride) for stride in self.strides]

    def train(self, mode: bool = True) -> Backbone:
        """BatchNorm that does not learn, in a linear probe, keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = mode and module.weight.requires_grad
        return self

    def plan(self, height: int, width: int, device: torch.device) -> list | None:
        """What Swin works out beforehand for images of a size."""

    def run(self, block: nn.Module, *inputs: object) -> Tensor:
        """A block; with `grad_checkpoint` it is worked out again in the backward pass."""
        if not (self.grad_checkpoint and self.training):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (
            contextlib.nullcontext(), frozen_statistics(block)))

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), what a head sees."""
        return self.tokens(images).mean(1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes), or (B, C) if there is no head."""
        return self.head(self.pooled(images)) if hasattr(self, "head") else self.pooled(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> a map (B, C, h, w) of every stage: its tokens before merging,
        normed in PVTv2 only. Any H and W that the last of `strides` divides."""
        return [rearrange(x, "b (h w) c -> b c h w", h=h) for x, (h, _) in zip(
            self.stages(images), self.shapes(images), strict=True)]


class PatchProjection2d(nn.Module):
    """Patches of an image as tokens: a convolution as a matrix product, and a norm, if any."""

    def __init__(self, size: int, dim: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, size, size)
        self.norm = norm or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C)"""
        x = convolve_patches(images.permute(0, 2, 3, 1), self.proj)
        return self.norm(x.flatten(1, 2))


# ── backbone vit ──────────────────────────────────────────────────────────────────────

class ViT(Backbone):
    """The plain ViT: patches of 16 px, a class token, a table of positions, plain blocks."""

    def __init__(self, config: ModelConfig, num_classes: int = 0, drop_path: float = 0.0) -> None:
        super().__init__(config, num_classes)
        (dim,), (heads,), (ratio,) = config.embed_dims, config.num_heads, config.mlp_ratios
        self.patch_embed = PatchProjection2d(config.patch_size, dim)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        rows = 1 + config.side(0) ** 2
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, rows, dim), std=0.02))
        self.blocks = nn.ModuleList(Block(dim, Attention(dim, heads), ratio, 1e-6, rate)
                                    for rate in self.rates(drop_path))
        pooled = bool(num_classes) and config.global_pool
        self.norm = nn.Identity() if pooled else nn.LayerNorm(dim, 1e-6)
        self.fc_norm = nn.LayerNorm(dim, 1e-6) if pooled else nn.Identity()
        self.draw_linear()

    def fix_positions(self) -> None:
        """Pre-training's initial values, a table that does not learn among them."""
        config = self.config
        self.pos_embed.requires_grad_(False).data = sincos_table(
            config.embed_dims[0], config.side(0), config.side(0)).to(self.pos_embed.device)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # its bias as PyTorch does

    def outputs(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 1 + N, C) behind so many `blocks` from the first."""
        found, table = [], self.pos_embed[0]
        table = torch.cat([table[:1], stretch(table[1:], self.shapes(images)[0])])
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1) + table
        for count, block in enumerate(self.blocks, 1):
            x = self.run(block, x)
            found += [x] if count in blocks else []
        return found

    def stages(self, images: Tensor) -> list[Tensor]:
        return [x[:, 1:] for x in self.outputs(images, [len(self.blocks)])]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + N, C), the class token's first."""
        return self.norm(self.outputs(images, [len(self.blocks)])[0])

    def pooled(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        return self.fc_norm(x[:, 1:].mean(1)) if self.config.global_pool else x[:, 0]

    def maps(self, images: Tensor, blocks: Sequence[int] = ()) -> list[Tensor]:
        """(B, 3, H, W) normalised -> (B, C, h, w) behind so many `blocks` from the first, or behind
        the last, before the norm. Any H and W that patches divide: positions are interpolated."""
        found = self.outputs(images, blocks or [len(self.blocks)])
        h, _ = self.shapes(images)[0]
        return [rearrange(x[:, 1:], "b (h w) c -> b c h w", h=h) for x in found]


# ── backbone swin ─────────────────────────────────────────────────────────────────────

@dataclass(frozen=True)
class Windows:
    """How blocks of a stage that shift alike cut a map: NumPy arrays, or tensors on a device."""
    shape: tuple[int, int]  # (h, w) of the map
    size: tuple[int, int]  # (p, q) of a window
    shift: tuple[int, int]  # by which the map is rolled first
    index: Tensor  # (S, S) row of the bias table for each pair of tokens, query and key
    apart: Tensor | None  # (windows, 1, S, S) bool, True = not neighbours; None = all are


def cut_windows(shape: tuple[int, int], window: int, shifted: bool) -> Windows:
    """Windows of a map (h, w). A side as long as the window or shorter is not cut, nor shifted. The
    map is padded to whole windows and rolled; then in one window may lie what is padding or comes
    from opposite borders, which is kept apart."""
    size = tuple(min(side, window) for side in shape)
    shift = tuple(window // 2 if shifted and side > window else 0 for side in shape)
    axes = []
    for side, length, by in zip(shape, size, shift, strict=True):
        padded = side + -side % length
        place = (np.arange(padded) + by) % padded  # where the rolled map's tokens are from
        axes.append(np.where(place < side, (place - by) // length, -2))
    rows, columns = axes
    region = np.where((rows[:, None] < -1) | (columns < -1), -1,
                      (rows[:, None] + 1) * (len(columns) + 1) + columns + 1)
    region = rearrange(region, "(a p) (b q) -> (a b) (p q)", p=size[0], q=size[1])
    apart = region[:, None, :, None] != region[:, None, None, :]
    y, x = np.divmod(np.arange(math.prod(size)), size[1])
    index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    return Windows(shape, size, shift, index, apart if apart.any() else None)


class ShiftedWindowAttention(Attention):
    """Eq. (2) without its norm and residual, in the windows of a map."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__(dim, num_heads)
        table = torch.empty((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        (h, w), (p, q), (dy, dx) = windows.shape, windows.size, windows.shift
        x = F.pad(rearrange(x, "b (h w) c -> b h w c", h=h), (0, 0, 0, -w % q, 0, -h % p))
        x = x.roll((-dy, -dx), (1, 2)) if dy or dx else x
        count, down = x.shape[1] * x.shape[2] // (p * q), x.shape[1] // p
        x = self.qkv(rearrange(x, "b (i p) (j q) c -> b (i j) (p q) c", p=p, q=q))
        bias = self.relative_position_bias_table.index_select(0, windows.index.flatten())
        bias = rearrange(bias, "(s t) h -> h s t", s=p * q)  # R
        layout = "(b k) h s d"
        if windows.apart is not None:  # a bias for every window
            bias = bias.expand(count, -1, -1, -1).masked_fill(windows.apart, -math.inf)
            bias, layout = bias.flatten(0, 1), "b (k h) s d"
        q_, k_, v_ = rearrange(x, f"b k s (three h d) -> three {layout}", three=3,
                               h=self.num_heads)
        x = attend(q_, k_, v_, bias.unsqueeze(0))  # Eq. (2)
        x = self.proj(rearrange(x, f"{layout} -> b k s (h d)", k=count, h=self.num_heads))
        x = rearrange(x, "b (i j) (p q) c -> b (i p) (j q) c", i=down, p=p)
        x = x.roll((dy, dx), (1, 2)) if dy or dx else x
        return x[:, :h, :w].flatten(1, 2)


class MapMerging(nn.Module):
    """Eq. (7)"""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, 1e-5)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """(B, N, C), a map (h, w) -> (B, N / 4, C'), a map (h / 2, w / 2)"""
        x = rearrange(x, "b (h p w q) c -> b (h w) (q p c)", h=shape[0] // 2, p=2, q=2)
        return self.reduction(self.norm(x))


class ShiftedStage(nn.Module):
    """Blocks, every second of which shifts its windows, and the merging after them."""

    def __init__(self, config: ModelConfig, stage: int, rates: Iterator[float]) -> None:
        super().__init__()
        dim, heads, window = config.embed_dims[stage], config.num_heads[stage], config.window(stage)
        self.blocks = nn.ModuleList(
            Block(dim, ShiftedWindowAttention(dim, heads, window), config.mlp_ratios[stage], 1e-5,
                  next(rates)) for _ in range(config.depths[stage]))
        last = stage == len(config.depths) - 1
        self.downsample = nn.Identity() if last else MapMerging(dim, config.embed_dims[stage + 1])


class Swin(Backbone):
    """Swin: windows of tokens, every second block shifts them by half, 2x2 tokens are merged."""

    def __init__(self, config: ModelConfig, num_classes: int = 0, drop_path: float = 0.0) -> None:
        super().__init__(config, num_classes)
        dim, rates = config.embed_dims[0], self.rates(drop_path)
        self.patch_embed = PatchProjection2d(config.patch_size, dim, nn.LayerNorm(dim, 1e-5))
        self.layers = nn.ModuleList(
            ShiftedStage(config, stage, rates) for stage in range(len(config.depths)))
        # The same norm; that of the classifier has another name, and so begins anew, as released.
        norm = nn.LayerNorm(self.channels[-1], 1e-5)
        self.norm, self.fc_norm = (nn.Identity(), norm) if num_classes else (norm, nn.Identity())
        self.plans: dict[tuple, list[tuple[Windows, Windows]]] = {}
        self.draw_linear()

    def plan(self, height: int, width: int,
             device: torch.device) -> list[tuple[Windows, Windows]]:
        """Of each stage the windows of even and of odd blocks, for images of that many pixels."""
        key = (height, width, device)
        if key not in self.plans:
            with torch.inference_mode(False):  # so that it also serves a later training
                self.plans[key] = [
                    tuple(to_device(cut_windows((height // stride, width // stride),
                                                 self.config.window(stage), shifted), device)
                          for shifted in (False, True))
                    for stage, stride in enumerate(self.strides)]
        return self.plans[key]

    def stages(self, images: Tensor) -> list[Tensor]:
        shapes, x, found = self.shapes(images), self.patch_embed(images), []
        plan = self.plan(*images.shape[-2:], images.device)
        for layer, shape, windows in zip(self.layers, shapes, plan, strict=True):
            for number, block in enumerate(layer.blocks):
                x = self.run(block, x, windows[number % 2])
            found.append(x)
            x = layer.downsample(x, shape) if len(found) < len(shapes) else x
        return found

    def tokens(self, images: Tensor) -> Tensor:
        return self.fc_norm(self.norm(self.stages(images)[-1]))


# ── backbone pvtv2 ────────────────────────────────────────────────────────────────────

class ConvEmbed(nn.Module):
    """A map made smaller by a convolution, as tokens, and a norm. PVTv2's patches overlap."""

    def __init__(self, channels: int, dim: int, size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, stride, size // 2 if size > stride else 0)
        self.norm = nn.LayerNorm(dim, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C')"""
        return self.norm(self.proj(x).flatten(2).mT)


class ReducedAttention(nn.Module):
    """Attention of all tokens to a map of keys that is `ratio` times smaller a side."""

    def __init__(self, dim: int, num_heads: int, ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim, 1e-5) if ratio > 1 else None

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads)
        if self.sr is not None:
            x = convolve_patches(x.unflatten(1, shape), self.sr)
            x = self.norm(x.flatten(1, 2))
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class ConvMlp(Mlp):
    """An MLP with a depth-wise convolution before its activation, which tells positions."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim)
        conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.dwconv = nn.ModuleDict({"dwconv": conv})

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        x = convolve(self.fc1(x).unflatten(1, shape), self.dwconv["dwconv"])
        return self.fc2(F.gelu(x)).flatten(1, 2)


class PVTBlock(nn.Module):
    """Eq. (2) with fewer keys, and Eq. (3) with a convolution."""

    def __init__(self, dim: int, num_heads: int, ratio: int, mlp_ratio: float,
                 drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = ReducedAttention(dim, num_heads, ratio)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        dropped = self.drop_path if self.training else 0.0
        x = x + drop_path(self.attn(self.norm1(x), shape), dropped)
        return x + drop_path(self.mlp(self.norm2(x), shape), dropped)


def draw_convolutions(module: nn.Module, by_group: bool) -> None:
    """Normal weights, of deviation sqrt(2 / (kernel^2 out / groups)), and no bias; CMT's release
    leaves the groups out. Depth-wise ones are told to be channels-last, as their gradients are."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            fan = math.prod(conv.kernel_size) * conv.out_channels
            nn.init.normal_(conv.weight, std=math.sqrt(2 * (conv.groups if by_group else 1) / fan))
            nn.init.zeros_(conv.bias)
            if conv.groups > 1:  # else DDP warns that strides differ, though memory does not
                shape, (p, q) = conv.weight.shape, conv.kernel_size
                weight = torch.empty_strided(shape, (p * q, 1, q, 1), device=conv.weight.device)
                conv.weight.data = weight.copy_(conv.weight.data)


class PVTv2(Backbone):
    """PVTv2: overlapping patches, all tokens attend to a smaller map, positions by convolution."""

    def __init__(self, config: ModelConfig, num_classes: int = 0, drop_path: float = 0.0) -> None:
        super().__init__(config, num_classes)
        rates, channels = self.rates(drop_path), 3
        for i, dim in enumerate(config.embed_dims):
            size = (7, config.patch_size) if i == 0 else (3, 2)
            setattr(self, f"patch_embed{i + 1}", ConvEmbed(channels, dim, *size))
            setattr(self, f"block{i + 1}", nn.ModuleList(
                PVTBlock(dim, config.num_heads[i], config.sr_ratios[i], config.mlp_ratios[i],
                         next(rates)) for _ in range(config.depths[i])))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, 1e-6))
            channels = dim
        self.draw_linear()
        draw_convolutions(self, by_group=True)

    def stages(self, images: Tensor) -> list[Tensor]:
        x, found = images, []
        for i, shape in enumerate(self.shapes(images), 1):
            x = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = self.run(block, x, shape)
            found.append(getattr(self, f"norm{i}")(x))
            x = found[-1].unflatten(1, shape).permute(0, 3, 1, 2)
        return found

    def tokens(self, images: Tensor) -> Tensor:
        return self.stages(images)[-1]


# ── backbone cmt ──────────────────────────────────────────────────────────────────────

class BiasedAttention(nn.Module):
    """Eq. (2) without its norm and residual: of all tokens to a smaller map, with a bias R for each
    pair of positions."""

    def __init__(self, dim: int, num_heads: int, ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.sr = nn.Sequential(nn.Conv2d(dim, dim, ratio, ratio, groups=dim),
                                nn.BatchNorm2d(dim)) if ratio > 1 else None

    def forward(self, x: Tensor, shape: tuple[int, int], bias: Tensor) -> Tensor:
        """(B, N, C), R (h, N, N') -> (B, N, C)"""
        q = self.q(x)
        if self.sr is not None:
            x = convolve(x.unflatten(1, shape), self.sr).flatten(1, 2)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads)
                   for y in (q, self.k(x), self.v(x)))
        return self.proj(rearrange(attend(q, k, v, bias.unsqueeze(0)), "b h n d -> b n (h d)"))


class InvertedMlp(nn.Module):
    """CMT's inverted residual network in the place of an MLP; 1x1 convolutions as products."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(dim, hidden_dim, 1), nn.GELU(),
                                   nn.BatchNorm2d(hidden_dim))
        self.proj = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.proj_bn = nn.BatchNorm2d(hidden_dim)
        self.conv2 = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        x = F.gelu(convolve_patches(x.unflatten(1, shape), self.conv1[0]))
        x = convolve(x, self.conv1[2])
        x = convolve(F.gelu(x + convolve(x, self.proj)), self.proj_bn)
        return convolve(convolve_patches(x, self.conv2[0]), self.conv2[1]).flatten(1, 2)


class CMTBlock(nn.Module):
    """A depth-wise convolution, Eq. (2) with fewer keys, and convolutions instead of Eq. (3)."""

    def __init__(self, dim: int, num_heads: int, ratio: int, mlp_ratio: float,
                 drop_path: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = BiasedAttention(dim, num_heads, ratio)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = InvertedMlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, shape: tuple[int, int], bias: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        dropped = self.drop_path if self.training else 0.0
        x = x + convolve(x.unflatten(1, shape), self.proj).flatten(1, 2)
        x = x + drop_path(self.attn(self.norm1(x), shape, bias), dropped)
        return x + drop_path(self.mlp(self.norm2(x), shape), dropped)


class CMT(Backbone):
    """CMT: a stem of convolutions, convolutions in every block, biases for pairs of positions."""

    def __init__(self, config: ModelConfig, num_classes: int = 0, drop_path: float = 0.0) -> None:
        super().__init__(config, num_classes)
        rates, channels, stem = self.rates(drop_path), config.stem_dim, config.stem_dim
        for i in (1, 2, 3):
            conv = nn.Conv2d(3 if i == 1 else stem, stem, 3, 2 if i == 1 else 1, 1)
            setattr(self, f"stem_conv{i}", conv)
            setattr(self, f"stem_norm{i}", nn.BatchNorm2d(stem))
        self.letters = "abcd"[:len(config.depths)]
        for i, (letter, dim) in enumerate(zip(self.letters, config.embed_dims, strict=True)):
            heads, ratio = config.num_heads[i], config.sr_ratios[i]
            setattr(self, f"patch_embed_{letter}", ConvEmbed(channels, dim, 2, 2))
            keys = (config.side(i) // ratio) ** 2
            bias = nn.Parameter(torch.randn(heads, config.side(i) ** 2, keys))  # R
            setattr(self, f"relative_pos_{letter}", bias)
            setattr(self, f"blocks_{letter}", nn.ModuleList(
                CMTBlock(dim, heads, ratio, config.mlp_ratios[i], next(rates))
                for _ in range(config.depths[i])))
            channels = dim
        if num_classes:
            self._fc = nn.Conv2d(channels, config.fc_dim, 1)
            self._bn = nn.BatchNorm2d(config.fc_dim)
        else:
            self.norm = nn.LayerNorm(channels, 1e-6)
        self.draw_linear()
        draw_convolutions(self, by_group=False)

    def bias(self, stage: int, shape: tuple[int, int]) -> Tensor:
        """R (h, N, N') for a map (h, w): interpolated over queries, then over keys, if it is not
        that of the model's size."""
        table = getattr(self, f"relative_pos_{self.letters[stage]}")
        ratio = self.config.sr_ratios[stage]
        keys = (shape[0] // ratio, shape[1] // ratio)
        if shape == (self.config.side(stage),) * 2:
            return table
        table = stretch(rearrange(table, "h n m -> n (h m)"), shape)
        heads = self.config.num_heads[stage]
        table = stretch(rearrange(table, "n (h m) -> m (h n)", h=heads), keys)
        return rearrange(table, "m (h n) -> h n m", n=math.prod(shape))

    def stages(self, images: Tensor) -> list[Tensor]:
        x, found = images, []
        for i in (1, 2, 3):
            x = getattr(self, f"stem_norm{i}")(F.gelu(getattr(self, f"stem_conv{i}")(x)))
        for stage, shape in enumerate(self.shapes(images)):
            letter, bias = self.letters[stage], self.bias(stage, shape)
            x = getattr(self, f"patch_embed_{letter}")(x)
            for block in getattr(self, f"blocks_{letter}"):
                x = self.run(block, x, shape, bias)
            found.append(x)
            x = x.unflatten(1, shape).permute(0, 3, 1, 2)
        return found

    def tokens(self, images: Tensor) -> Tensor:
        return self.norm(self.stages(images)[-1])

    def pooled(self, images: Tensor) -> Tensor:
        if hasattr(self, "norm"):
            return self.tokens(images).mean(1)
        x = self.stages(images)[-1].unflatten(1, self.shapes(images)[-1])
        x = F.silu(convolve(convolve_patches(x, self._fc), self._bn)).mean((1, 2))
        return F.dropout(x, 0.1, self.training)  # released


BACKBONES = {"vit": ViT, "swin": Swin, "pvtv2": PVTv2, "cmt": CMT}


# ── weights ───────────────────────────────────────────────────────────────────────────

# Computed here, so not needed from a file and in no checkpoint.
INDEX_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
FAMILIES = {  # a weight that only files of this family have, without the prefix of pre-training
    "cmt": "stem_conv1.weight", "pvtv2": "block1.0.norm1.weight",
    "swin": "layers.0.blocks.0.norm1.weight", "vit": "blocks.0.norm1.weight"}


def encoder_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder, and head if there is one, as a classifier names them; no buffers worked out here."""
    return {k.removeprefix("encoder."): v for k, v in state.items()
            if not k.startswith(("decoder_", "mask_token")) and not k.endswith(INDEX_BUFFERS)}


def identify(file: dict) -> tuple[str, ModelConfig]:
    """Name and architecture of the network in a file: by its args if it is ours, else by shapes,
    which do not show the heads of ViT and PVTv2, nor PVTv2's size, nor the masked blocks."""
    args, state = file["args"], encoder_names(file["model"])
    if args:
        hints = typing.get_type_hints(ModelConfig, include_extras=True)
        config = ModelConfig(**{k: fit(hint, args["config"][k]) for k, hint in hints.items()})
        return known_model(str(args["model"])), model_config(config)
    family = next((f for f, k in FAMILIES.items() if k in state), None)
    if family is None:
        raise ValueError(f"it holds no backbone: none of {', '.join(FAMILIES.values())}")
    stages = {"vit": r"(?:)blocks", "swin": r"layers\.(\d+)\.blocks", "pvtv2": r"block(\d)",
              "cmt": "blocks_([a-d])"}[family] + r"\.(\d+)\.norm1\.weight"
    depths, dims = {}, {}
    for key, value in state.items():
        if found := re.fullmatch(stages, key):
            stage = found[1] if family != "vit" else ""
            depths[stage], dims[stage] = depths.get(stage, 0) + 1, len(value)
    tuned = "head.weight" in state
    shape = {"family": family, "embed_dims": tuple(dims.values()), "depths": tuple(depths.values())}
    shape |= {"mlp_ratios": (4.0,) * len(depths)} | found_sizes(state, family, tuned)
    if "decoder_pred.weight" in file["model"]:
        blocks = {k.split(".")[1] for k in file["model"] if k.startswith("decoder_blocks.")}
        channels, width = file["model"]["decoder_pred.weight"].shape
        shape |= {"decoder_dim": width, "decoder_depth": len(blocks),
                  "target": "hog" if channels % 27 == 0 else "pixel"}
    alike = min((n for n in MODELS if MODELS[n].family == family),
                key=lambda n: sum(getattr(MODELS[n], k) != v for k, v in shape.items()))
    return alike, model_config(MODELS[alike], **shape, pretrain_heads=MODELS[alike].pretrain_heads)


def found_sizes(state: dict[str, Tensor], family: str, tuned: bool) -> dict[str, object]:
    """What tables tell of a network: image side, heads, windows."""
    if family == "vit":
        patch = state["patch_embed.proj.weight"].shape[-1]
        return {"patch_size": patch, "input_size": math.isqrt(len(state["pos_embed"][0])) * patch,
                "global_pool": "norm.weight" not in state or not tuned}
    if family == "swin":
        tables = [v for k, v in state.items()
                  if k.endswith("blocks.0.attn.relative_position_bias_table")]
        first, last = ((math.isqrt(len(t)) + 1) // 2 for t in (tables[0], tables[-1]))
        # The last stage's window is its map, in every network of the release.
        return {"num_heads": tuple(t.shape[1] for t in tables),
                "input_size": 4 * last * 2 ** (len(tables) - 1),
                "window_size": 0 if first == last else first}
    if family == "cmt":
        tables = [state[f"relative_pos_{letter}"] for letter in "abcd"
                  if f"relative_pos_{letter}" in state]
        return {"num_heads": tuple(map(len, tables)),
                "input_size": 4 * math.isqrt(tables[0].shape[1]),
                "stem_dim": len(state["stem_conv1.weight"])} | (
                    {"fc_dim": len(state["_fc.weight"])} if tuned else {})
    widths = [(len(state[f"block{i}.0.mlp.fc1.weight"]), len(state[f"norm{i}.weight"]))
              for i in range(1, 5) if f"norm{i}.weight" in state]
    return {"input_size": 224 if tuned else 128,
            "mlp_ratios": tuple(hidden / dim for hidden, dim in widths)}


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
                 fresh_head: bool = False, keep_norm: bool = False) -> tuple[nn.Module, str]:
    """What `make` builds (FastMIM, encoder, classifier) with the weights of a file that was read,
    if there is one, and a sentence on what was adapted; InputError names what does not fit.

    Only if `fresh_head` what a classifier has and the file has not begins anew: a head of other
    classes, drawn next to zero; norms; blocks that pre-training left out."""
    if file is None:
        return make(), ""
    with data.blaming(path):
        with torch.device("meta"):  # no memory is taken before all shapes are known to agree
            skeleton = make()
        own, new, tuned = skeleton.state_dict(), [], "head.weight" in file["model"]
        lost = False
        if isinstance(skeleton, FastMIM):
            if "decoder_pred.weight" not in file["model"]:
                raise ValueError("it has no decoder (mask_token): give pretrain's checkpoint-*.pth")
            state = {k: v for k, v in file["model"].items() if not k.endswith(INDEX_BUFFERS)}
        else:
            state = encoder_names(file["model"])
            if "head.weight" in own and not tuned and "norm.weight" not in own:
                # Released classifiers name their last norm otherwise, so that it is lost.
                kept = {"fc_" + k: v for k, v in state.items() if k.startswith("norm.")}
                state = {k: v for k, v in state.items() if not k.startswith("norm.")}
                kept = kept if "fc_norm.weight" in own else {}
                state, lost = state | (kept if keep_norm else {}), bool(kept) and not keep_norm
        state, notes = fit_tables(state, own, isinstance(skeleton, FastMIM))
        notes += ["the last norm left out, as released (--keep_norm)"] if lost else []
        head = [k for k in ("head.weight", "head.bias") if k in own]
        fresh = fresh_head and any(k not in state or state[k].shape != own[k].shape for k in head)
        if fresh or not head:
            state = {k: v for k, v in state.items() if k not in ("head.weight", "head.bias")}
        there, dropped = {part_of(k) for k in state}, identify(file)[1].drop_last
        if fresh_head and not tuned:
            new = [part for part in dict.fromkeys(map(part_of, own)) if part not in there and (
                part in ("fc_norm", "_fc", "_bn") or (dropped and "block" in part))]
        notes += [f"new: {', '.join(new)}"] if new else []
        notes += ["the head starts fresh"] if fresh else []
        new += ["head"] if fresh else []
        if isinstance(skeleton, FastMIM) and "pos_embed" not in state:
            new.append("pos_embed")  # worked out for this size
        data.check_keys(state, {k: v for k, v in own.items() if part_of(k) not in new})
    model = make()
    if fresh:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # released, after a pre-training
    model.load_state_dict(state, strict=False)
    return model, f"loaded {path}: {'; '.join(notes) or 'all weights as they are'}"


def part_of(key: str) -> str:
    """The block that a weight belongs to, or its first name."""
    return re.match(r".*?block\w*\.\d+|\w+", key)[0]


def fit_tables(state: dict[str, Tensor], own: dict[str, Tensor],
               fixed: bool) -> tuple[dict[str, Tensor], list[str]]:
    """`state` with what depends on the image size as `own` has it, and notes on that. ViT's table
    is left out if it is `fixed`, as it is worked out then."""
    adapted, done = {}, {}
    for key, value in state.items():
        adapted[key], there = value, own.get(key, value)
        if there.ndim != value.ndim or there.shape == value.shape:
            continue
        if key == "pos_embed" and value.shape[::2] == there.shape[::2]:
            side, kind = math.isqrt(there.shape[1]), "positions interpolated"
            grid = stretch(value[0, 1:].double(), (side, side)).to(value.dtype)
            adapted[key] = torch.cat([value[:, :1], grid[None]], 1)
            if fixed:
                del adapted[key]
                kind = "positions worked out"
        elif key.endswith("bias_table") and value.shape[1] == there.shape[1]:
            adapted[key], kind = remap_table(value, math.isqrt(len(there))), "bias tables remapped"
        elif "relative_pos_" in key and len(value) == len(there):  # as the released helper does
            adapted[key], kind = F.interpolate(value.float()[None], there.shape[1:], mode="bicubic",
                                               align_corners=False)[0], "relative positions fitted"
        else:
            continue
        done[kind] = done.get(kind, 0) + 1
    return adapted, [f"{count} {kind} for this size" for kind, count in done.items()]


def remap_table(table: Tensor, side: int) -> Tensor:
    """(a * a, h) bias table of a window -> (side * side, h), of another: Eq. (8), SimMIM's way."""
    source = math.isqrt(len(table))
    if source**2 != len(table) or source % 2 == 0:
        raise ValueError(f"a table of {len(table)} rows is of no window")
    if source in (1, side):  # windows of one token know no distances
        return table.expand(side**2, -1).clone()
    operator = torch.from_numpy(spline_operator(geometric_positions(source, side),
                                                np.arange(side) - side // 2))
    square = table.double().T.reshape(-1, source, source)
    return (operator @ square @ operator.T).flatten(1).T.to(table.dtype)


def geometric_positions(source: int, side: int) -> np.ndarray:
    """(source,) places of a table's distances on the axis of another: 1, 1 + q, 1 + q + q^2, ...
    with a ratio q by which the last just reaches side // 2."""
    n, low, high, q = source // 2, 0.5, 2.0, 1.0
    while high - low > 1e-6:  # the last q that was tried counts, as released
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**n) / (1 - q) > side // 2 else (q, high)
    distances = np.cumsum(q ** np.arange(n))
    return np.concatenate([-distances[::-1], [0.0], distances])


def spline_operator(knots: np.ndarray, places: np.ndarray) -> np.ndarray:
    """M (places, knots): values at the knots -> at the places, by the cubic spline whose third
    derivative has no jump at the first and last inner knot; lines if there are but three knots.
    Places beyond the knots are moved to the outermost."""
    count, h = len(knots), np.diff(knots)
    places = places.clip(knots[0], knots[-1])
    values, curvature = np.eye(count), np.zeros((count, count))  # of each unit vector
    if count > 3:
        system, right = np.zeros((count, count)), np.zeros((count, count))
        for i in range(1, count - 1):
            system[i, i - 1:i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        system[0, :3] = h[1], -(h[0] + h[1]), h[0]
        system[-1, -3:] = h[-1], -(h[-2] + h[-1]), h[-2]
        right[1:-1] = 6 * np.diff(np.diff(values, axis=0) / h[:, None], axis=0)
        curvature = np.linalg.solve(system, right)
    i = np.searchsorted(knots, places, "right").clip(1, count - 1) - 1
    step, a, b = (x[:, None] for x in (h[i], knots[i + 1] - places, places - knots[i]))
    return ((a * values[i] + b * values[i + 1]) / step
            + ((a**3 / step - a * step) * curvature[i]
               + (b**3 / step - b * step) * curvature[i + 1]) / 6)


def export_state(model: Backbone, naming: str) -> dict[str, Tensor]:
    """State dict of encoder and head in the names of released classifiers, or timm's."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if naming == "official" or model.config.family == "vit":  # of ViT both are the same
        return state
    renamed = {  # timm merges and embeds at the start of a stage
        "swin": ((r"(?<=layers\.)\d+(?=\.downsample)", lambda n: str(int(n[0]) + 1)),
                 (r"^fc_norm\.", "norm."), (r"^head\.", "head.fc.")),
        "pvtv2": ((r"^patch_embed1\.", "patch_embed."),
                  (r"^patch_embed(\d)\.", lambda n: f"stages.{int(n[1]) - 1}.downsample."),
                  (r"^block(\d)\.", lambda n: f"stages.{int(n[1]) - 1}.blocks."),
                  (r"^norm(\d)\.", lambda n: f"stages.{int(n[1]) - 1}.norm."),
                  (r"dwconv\.dwconv\.", "dwconv.")),
    }[model.config.family]
    for pattern, name in renamed:
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    return state


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
    """0 for what comes before the blocks, 1.. for blocks and one more for what comes after; what
    stands between stages counts, as released, with the block before it (Swin's merging, PVTv2's
    embeddings and norms) or after it (CMT's embeddings and biases)."""
    before = list(itertools.accumulate(depths, initial=0))  # blocks before each stage
    if name.startswith(("patch_embed.", "pos_embed", "cls_token", "stem_")):
        return 0
    block = r"(?:layers\.(\d+)\.blocks|block(\d)|blocks_([a-d])|blocks)\.(\d+)\."
    if found := re.match(block, name):
        swin, pvt, cmt, number = found.groups()
        stage = int(swin or 0) if not cmt else "abcd".index(cmt)
        return before[int(pvt) - 1 if pvt else stage] + int(number) + 1
    if found := re.match(r"layers\.(\d+)\.downsample\.", name):
        return before[int(found[1]) + 1]
    if found := re.match(r"(?:patch_embed|relative_pos)_([a-d])", name):
        return before["abcd".index(found[1])] + 1
    if found := re.match(r"patch_embed(\d)\.", name):
        return before[int(found[1]) - 1]
    found = re.match(r"norm(\d)\.", name)
    between = found and int(found[1]) < len(depths)
    return before[int(found[1])] if between else sum(depths) + 1


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

@dataclass(frozen=True)
class Phase:
    """A part of pre-training in which images have one size; FastMIM-P has several."""
    number: int
    start: int  # its first epoch
    end: int  # the epoch after its last
    batch_size: int  # images per process
    config: ModelConfig


def phase_rows(cfg: PretrainConfig) -> list[list[int]]:
    """[side, first epoch, batch] of each phase of `--progressive`; InputError if it is none."""
    flag, rows = f"--progressive {cfg.progressive}", []
    if cfg.progressive and cfg.input_size:
        raise InputError(f"{flag} names the sides of images: leave out --input_size")
    if cfg.progressive and cfg.data_path and not cfg.output_dir:
        raise InputError(f"{flag}: a phase begins with the checkpoint of the last; --output_dir")
    for part in cfg.progressive.split(",") if cfg.progressive else ():
        numbers = part.strip().split(":")
        if len(numbers) not in (2, 3) or not all(re.fullmatch(r"\d{1,6}", n) for n in numbers):
            raise InputError(f"{flag}: {part!r} is neither side:epoch nor side:epoch:batch; "
                             "128:0,160:200,192:300 would do")
        rows.append([*map(int, numbers), cfg.batch_size][:3])
        if not 1 <= rows[-1][0] <= 4096 or rows[-1][2] < 1:
            raise InputError(f"{flag}: no images of {rows[-1][0]} px, {rows[-1][2]} at a time")
    sides, starts = [row[0] for row in rows], [row[1] for row in rows]
    if sides != sorted(sides):
        raise InputError(f"{flag}: images have to grow from phase to phase, not {sides} px")
    if rows and (starts[0] or starts != sorted(set(starts)) or starts[-1] >= cfg.epochs):
        raise InputError(f"{flag}: first epochs {starts} have to rise from 0 and stay below the "
                         f"{cfg.epochs} of --epochs")
    return rows


def plan_phases(cfg: PretrainConfig, config: ModelConfig) -> list[Phase]:
    """The phases of `--progressive`, or the only one; InputError says what does not fit."""
    rows = phase_rows(cfg) or [[config.input_size, 0, cfg.batch_size]]
    ends, phases = [*(row[1] for row in rows[1:]), cfg.epochs], []
    for number, (side, start, batch) in enumerate(rows):
        block = config.block_size
        if cfg.progressive_blocks == "cells" and number:  # as many blocks as in the first phase
            if rows[0][0] % block or side % (rows[0][0] // block):
                raise InputError(f"--progressive {cfg.progressive}: {side} px cannot be cut into "
                                 f"the {rows[0][0] // block} blocks a side of the first phase; "
                                 "--progressive_blocks pixels")
            block = side // (rows[0][0] // block)
        there = model_config(config, input_size=side, block_size=block)
        check_masking(there)
        if there.cell != config.cell:
            raise InputError(f"--progressive {cfg.progressive}: patches to predict would change "
                             f"from {config.cell} to {there.cell} px; --target hog works")
        phases.append(Phase(number, start, ends[number], batch, there))
    return phases


def newest(cfg: PretrainConfig) -> tuple[Path, dict] | None:
    """The checkpoint that `resume` would choose, if there is one that loads."""
    paths = [] if cfg.resume == "none" else [Path(cfg.resume)]
    if cfg.resume == "auto":
        found = Path(cfg.output_dir).glob("checkpoint-*.pth") if cfg.output_dir else ()
        paths = sorted(found, key=os.path.getmtime, reverse=True)
    for path in paths:
        with contextlib.suppress(InputError):
            return path, data.read_checkpoint(path, SCRIPT)
    return None


def enter_phase(cfg: PretrainConfig, process: Process, parts: dict, args: dict, step: int) -> bool:
    """Make the last checkpoint of the phase before the first of this one: what depends on the size
    fitted, its moments begin at zero, all else kept. Does nothing if it is of this phase; whether
    it did."""
    found = newest(cfg) if process.rank == 0 else None
    if entered := bool(found) and found[1]["args"].get("phase") == args["phase"] - 1:
        file = found[1]
        with data.blaming(found[0]):
            own = parts["model"].state_dict()
            state, notes = fit_tables(file["model"], own, fixed=True)
            file["model"] = own | state
            parameters = [p for g in parts["optimizer"].param_groups for p in g["params"]]
            for number, moments in file["optimizer"]["state"].items():
                if moments["exp_avg"].shape != parameters[number].shape:
                    shapes = {"exp_avg": parameters[number].shape, "step": ()}
                    shapes["exp_avg_sq"] = shapes["exp_avg"]
                    moments |= {k: torch.zeros(shape) for k, shape in shapes.items()}
        process.say(f"entering it: {'; '.join(notes) or 'all as it was'}")
        content = file | {"args": args, "step": step}
        data.save_file(Path(cfg.output_dir) / "checkpoint-last.pth", partial(torch.save, content))
    # The others wait for the file.
    return process.sum(torch.tensor(float(entered), device=process.device)).item() > 0


def synchronised(model: nn.Module, process: Process, wanted: bool) -> nn.Module:
    """The model, if it is `wanted` with BatchNorm over all processes; released code has it not."""
    if wanted and not running_statistics(model):
        raise InputError("--sync_bn: this network has no BatchNorm")
    if not wanted or process.world_size == 1:
        return model
    if process.device.type != "cuda":
        raise InputError("--sync_bn: PyTorch has BatchNorm over several processes on GPUs only")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def pretrain(cfg: PretrainConfig) -> dict:
    """Pre-train on any tree of images; without --data_path, ten steps on the built-in ones."""
    process = setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT) if cfg.weights else None
    rows = phase_rows(cfg)
    name, config = choose_config(replace(cfg, input_size=rows[0][0]) if rows else cfg, file)
    cfg = replace(cfg, model=name)
    phases = plan_phases(cfg, config)
    images = len(data.open_source(cfg.data_path)) if cfg.data_path and rows else math.inf
    for phase in phases:
        batch = phase.batch_size * cfg.accum_iter * process.world_size
        if images < batch:  # known now, and not when it begins
            raise InputError(f"--progressive {cfg.progressive}: {images} images do not fill one "
                             f"global batch of {batch} in phase {phase.number + 1}")
    phases = phases if cfg.data_path else phases[-1:]  # a dry run is of the largest
    found = newest(cfg) if cfg.data_path and len(phases) > 1 else None
    if config.pretrain_heads:
        process.say(f"{config.pretrain_heads[0]} heads in pre-training, {config.num_heads[0]} in "
                    f"fine-tuning, as released; --num_heads {config.num_heads[0]} is for both")
    # A run goes on in the phase of its newest checkpoint; a later one begins with the checkpoint of
    # the one before, which is in output_dir, whatever --resume says.
    reached = found[1]["args"].get("phase", 0) if found else 0
    ended, found = found[1].get("epoch", 0) if found else 0, None  # lets go of the weights
    for phase in phases[min(reached, len(phases) - 1):]:
        if len(phases) > 1:
            process.say(f"phase {phase.number + 1} of {len(phases)}, from epoch {phase.start}: "
                        f"{phase.config.input_size} px, blocks of {phase.config.block_size} px")
        record = pretrain_phase(cfg, process, file, phase)
        if ended < phase.end:  # else nothing ran, and what --resume names ended this phase
            cfg = replace(cfg, resume="auto")
        if not cfg.data_path:
            process.say("dry run: to pre-train on your images, give --data_path FOLDER")
            break
    return record


def pretraining_lr(cfg: PretrainConfig, epoch: float, lr: float) -> float:
    """Learning rate at a fractional epoch, of all phases together: warm-up, then a cosine, or with
    `decay_epoch` a tenth of it after as many epochs, warm-up included, and so on."""
    warmup = cfg.warmup_epochs
    if cfg.decay_epoch and epoch >= warmup:
        return lr * 0.1 ** (epoch // cfg.decay_epoch)
    return lr_at(epoch, lr, 0.0, cfg.min_lr, warmup, warmup, cfg.epochs)


def pretrain_phase(cfg: PretrainConfig, process: Process, file: dict | None, phase: Phase) -> dict:
    """Epochs of one image size; returns the last record of the log."""
    config, side = phase.config, phase.config.input_size
    draw_blocks(config, cfg.mask_ratio, 1, (cfg.seed,))  # checks the ratio
    crop = data.TrainCrop(side, (cfg.crop_min, 1.0), fast_decode=cfg.fast_decode)
    cfg, loader, lr, args = prepare(replace(cfg, batch_size=phase.batch_size), process, config, "",
                                    crop, 256)
    args["phase"] = phase.number

    torch.manual_seed(cfg.seed)
    model, said = load_weights(partial(FastMIM, config), cfg.weights, file)
    process.say(said and f"{said}; {side} px{in_words(pretraining(config))}")
    model = synchronised(model.to(process.device), process, cfg.sync_bn)
    model.encoder.grad_checkpoint = cfg.grad_checkpoint
    model.encoder.plan(side, side, process.device)
    groups = parameter_groups(model, cfg.weight_decay, undecayed=())
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95), fused=process.device.type != "mps")
    parts = {"model": model, "optimizer": optimizer}
    if phase.number and enter_phase(cfg, process, parts, args, phase.start * len(loader)):
        cfg = replace(cfg, resume="auto")

    @lru_cache(2)
    def masks_of(number: int) -> np.ndarray:
        seed = (cfg.seed, number, process.rank, 1)
        return draw_blocks(config, cfg.mask_ratio, cfg.batch_size, seed)

    def loss_of(net: nn.Module, images: Tensor, _: Tensor, number: int) -> Tensor:
        loss, _ = net(images, to_device(masks_of(number), process.device))
        masks_of(number + 1)  # now, while a GPU is busy with the forward pass
        return loss

    def schedule(step: int, scale: float) -> float:
        return scale * pretraining_lr(cfg, step / len(loader), lr)

    def end_of_epoch(epoch: int, _: list[dict]) -> dict:
        due = (epoch + 1) % cfg.save_freq == 0 or epoch + 1 == phase.end
        if due and cfg.output_dir and process.rank == 0:
            output, view = Path(cfg.output_dir), data.EvalCrop(side, "mae")
            pixels, _, _ = next(data.eval_batches(loader.source, view, batch_size=8, few=8))
            shown = draw_blocks(config, cfg.mask_ratio, len(pixels), (cfg.seed,))
            picture, _ = draw_reconstructions(model, pixels, shown)
            data.save_picture(picture, output / f"reconstruction-{epoch}.png")
            backbone = {"model": export_state(model.encoder, "official"), "args": args}
            data.save_file(output / "backbone.pth", partial(torch.save, backbone))
        return {"phase": phase.number + 1, "input_size": side} if cfg.progressive else {}

    epochs = phase.end if cfg.data_path else 1
    return train(replace(cfg, epochs=epochs), process, parts, loader, args, schedule, loss_of,
                 end_of_epoch)


# ── fine-tuning ───────────────────────────────────────────────────────────────────────

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


def in_words(config: ModelConfig) -> str:
    """What of its shape neither its name nor its size tells, in words."""
    heads = config.num_heads[0]
    words = {"swin": f", windows of {config.window(0)}", "vit": f", {heads} head{'s'[:heads - 1]}"}
    return words.get(config.family, "")


def finetune(cfg: FinetuneConfig) -> dict:
    """Train a classifier on train/<class>/, test on val/<class>/; ten steps without --data_path."""
    process = setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT) if cfg.weights else None
    name, config = choose_config(cfg, file)
    keep_norm = cfg.keep_norm
    if keep_norm and config.family == "cmt":
        raise InputError("--keep_norm: CMT's classifier has no norm that could take it over")
    if cfg.linear_probe and file and "head.weight" not in file["model"]:
        config, keep_norm = pretraining(config), True  # what is frozen has been trained
    config = replace(config, drop_last=0)
    cfg, side, family = replace(cfg, model=name), config.input_size, BACKBONES[config.family]
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
    make = partial(family, config, outputs, cfg.drop_path)
    model, said = load_weights(make, cfg.weights, file, fresh_head=True, keep_norm=keep_norm)
    process.say(said and f"{said}; {side} px{in_words(config)}")
    model = synchronised(model.to(process.device), process, cfg.sync_bn)
    if cfg.linear_probe:
        model.requires_grad_(False)
        for name in ("head", "_fc", "_bn"):  # CMT's last two begin with the classifier
            getattr(model, name, model.head).requires_grad_(True)
    model.grad_checkpoint = cfg.grad_checkpoint
    model.plan(side, side, process.device)
    groups = parameter_groups(model, cfg.weight_decay, config.depths, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr, fused=process.device.type != "mps")
    parts, judged = {"model": model, "optimizer": optimizer}, model
    if cfg.ema:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(cfg.ema)
        parts["ema"] = ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=average, use_buffers=True)  # as released: CMT's statistics too
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
    """Process, the network of --weights (`whole` = with its decoder, else a classifier if the file
    has a head, which is taken off if it is not wanted, or the encoder as it was pre-trained), what
    the file says of itself, and the crop."""
    if not cfg.weights:
        raise InputError("give --weights FILE")
    process = process or setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT)
    name, config = choose_config(cfg if whole else replace(cfg, input_size=None), file)
    state, size = file["model"], cfg.input_size or config.input_size
    check_size(size, config.stride)
    with data.blaming(cfg.weights):
        outputs = [len(state[k]) for k in ("head.weight", "head.bias") if k in state]
    if whole:
        make = partial(FastMIM, config)
    else:
        config = config if outputs else pretraining(config)
        make = partial(BACKBONES[config.family], config, *outputs[:1])
    model, said = load_weights(make, cfg.weights, file)
    if outputs and not head:
        model.head = nn.Identity()
    shown = in_words(pretraining(config) if whole else config)
    process.say(f"{said}; {name}, {data.sides(size)} px{shown}")
    return process, model.to(process.device).eval(), file["args"], data.EvalCrop(size, "mae")


def load_backbone(path: str | Path, **flags: object) -> nn.Module:
    """Encoder with the weights of any file that this script reads, and `flags` as of `features`,
    for what a file does not tell: .maps, .channels, .strides."""
    alone = Process(0, 1, torch.device("cpu"), torch.float32)  # the program around it is not ours
    cfg = configure("features", weights=str(path), **flags)
    return open_model(cfg, head=False, process=alone)[1]


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
def draw_reconstructions(model: FastMIM, pixels: Tensor,
                         mask: np.ndarray) -> tuple[Image.Image, float]:
    """Labelled grid for uint8 (B, 3, S, S): image, what the encoder saw, and of HOG the target and
    the prediction as strokes, else the reconstruction; what was visible is pasted; loss."""
    model.eval()
    config, device = model.config, model.mask_token.device
    images, mask = data.normalize(pixels.to(device)), to_device(mask, device)
    loss, prediction = model(images, mask)
    prediction, painted = model.arrange(prediction), model.paint(images, mask)
    hidden = enlarge(mask, prediction.shape[-1])
    if config.target == "hog":
        target = make_target(images, config)
        filled = torch.where(hidden, prediction, target)
        white = target.unflatten(1, (-1, HOG_BINS)).mean(1).max().item()  # for both
        strokes = [draw(x, HOG_BINS, 2 * HOG_CELL, white) for x in (target, filled)]
        columns = [*(F.interpolate(x, scale_factor=2.0) for x in (images, painted)),
                   *(data.normalize((255 * x).byte().expand(-1, 3, -1, -1)) for x in strokes)]
        labels = ("image", "painted", "its HOG", "predicted, where hidden")
        return data.draw_columns(torch.stack(columns), labels), loss.item()
    patches, label = patchify(images, config.cell), "reconstruction"
    x = rearrange(prediction, "b k h w -> b (h w) k")
    if config.norm_pix_loss:
        _, mean, deviation = normalize_patches(patches)
        x, label = x * deviation + mean, f"{label}, true mean and contrast"
    x = torch.where(hidden.flatten(2).mT, x, patches)
    x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=hidden.shape[-1], p=config.cell,
                  q=config.cell)
    columns = torch.stack([images, painted, x])
    return data.draw_columns(columns, ("image", "painted", label)), loss.item()


def reconstruct(cfg: UseConfig) -> dict:
    """PNG grid of images, their painted form and what was predicted by a pre-trained file."""
    output = Path(cfg.output or "reconstruction.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {output}: pictures are written as .png")
    process, model, args, crop = open_model(cfg, whole=True)
    ratio = args.get("settings", {}).get("mask_ratio", 0.75)
    ratio = ratio if cfg.mask_ratio is None else cfg.mask_ratio
    draw_blocks(model.config, ratio, 1, (cfg.seed,))  # checks the ratio
    source = data.open_source(cfg.data_path)
    pixels, _, _ = next(data.eval_batches(source, crop, batch_size=cfg.count, few=cfg.count))
    mask = draw_blocks(model.config, ratio, len(pixels), (cfg.seed,))
    picture, loss = draw_reconstructions(model, pixels, mask)
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
    """Encoder, and head if there is one, in the official or timm's parameter names."""
    if cfg.input_size:
        raise InputError("export writes a network as its file has it: leave out --input_size")
    process, model, args, _ = open_model(cfg)
    config, output = model.config, Path(cfg.output or f"{Path(cfg.weights).stem}-{cfg.naming}.pth")
    if cfg.naming == "timm" and config.family == "cmt":
        raise InputError("--naming timm: timm has no CMT; official works")
    state = export_state(model, cfg.naming)
    result = save_state(process, output, state, state if cfg.naming == "timm"
                        else {"model": state, "args": args})
    if config.family != "cmt" and (cfg.naming == "timm" or config.family == "vit"):
        process.say(f"{timm_create(model)} loads it strictly")
    return result


def timm_create(model: Backbone) -> str:
    """The call that makes this network in timm."""
    config = model.config
    outputs = model.head.out_features if hasattr(model, "head") else 0
    if config.family == "vit":
        return (f"timm.create_model('vit_base_patch16_224', img_size={config.input_size}, "
                f"patch_size={config.patch_size}, embed_dim={config.embed_dims[0]}, "
                f"depth={config.depths[0]}, num_heads={config.num_heads[0]}, "
                f"mlp_ratio={config.mlp_ratios[0]}, num_classes={outputs}, "
                f"global_pool='{'avg' if outputs and config.global_pool else 'token'}')")
    if config.family == "swin":
        return (f"timm.create_model('swin_base_patch4_window7_224', img_size={config.input_size}, "
                f"patch_size={config.patch_size}, embed_dim={config.embed_dims[0]}, "
                f"depths={config.depths}, num_heads={config.num_heads}, "
                f"window_size={config.window(0)}, num_classes={outputs})")
    return (f"timm.create_model('pvt_v2_b2', embed_dims={config.embed_dims}, "
            f"depths={config.depths}, num_heads={config.num_heads}, "
            f"mlp_ratios={config.mlp_ratios}, sr_ratios={config.sr_ratios}, num_classes={outputs})")


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


def step_speed(config: ModelConfig, process: Process) -> float:
    """Images a second, forward and backward, of batches of 32."""
    model, seconds = FastMIM(config).to(process.device), []
    images = torch.randn(32, 3, config.input_size, config.input_size, device=process.device)
    for step in range(6):
        began = time.perf_counter()
        loss, _ = model(images, draw_blocks(config, 0.75, len(images), (0, step)))
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return len(images) / min(seconds)


def demo(cfg: UseConfig) -> dict:
    """Pre-train a small model on built-in images; fine-tune it and a from-scratch twin. By --model
    demo_swin a Swin."""
    began, output = time.monotonic(), Path(cfg.output or f"output/{SCRIPT}/demo")
    # HOG is an even function of the image, so that nothing linear tells it, and for long only its
    # mean is learned; of small blocks with a low ratio more sooner.
    name = cfg.model or "demo"
    if name not in ("demo", "demo_swin"):
        raise InputError(f"--model {name}: the demo is of demo, a ViT, or of demo_swin")
    epochs = 5 if MODELS[name].family == "vit" else 7
    both = {"model": name, "seed": cfg.seed, "device": cfg.device, "num_workers": 1,
            "resume": "none", "crop_min": 0.6, "log_every": 1000}
    process, config = setup_process(cfg.device, "auto"), MODELS[name]
    torch.manual_seed(cfg.seed)
    # The twin starts where pre-training starts, so that only pre-training tells them apart.
    start = {"model": export_state(FastMIM(config).encoder, "official")}
    if process.rank == 0:
        data.save_file(output / "start.pth", partial(torch.save, start))
    pretrain(PretrainConfig(
        **both, data_path="drawn:8192", output_dir=str(output / "pretrain"), batch_size=32,
        epochs=epochs, warmup_epochs=0.2, lr=3e-3, mask_ratio=0.25))
    result = {"images_per_second": {
        size: round(step_speed(replace(config, input_size=size), process), 1)
        for size in (config.input_size, config.input_size // 2)}}
    for tried, weights in (("pretrained", "pretrain/backbone.pth"), ("scratch", "start.pth")):
        tested = finetune(FinetuneConfig(
            **both, input_size=config.input_size, data_path="drawn:1000",
            weights=str(output / weights), output_dir=str(output / tried), batch_size=25, epochs=6,
            warmup_epochs=1, lr=2e-3, clip_grad=1.0, layer_decay=0.8, mixup=0, cutmix=0, reprob=0,
            aa="", drop_path=0, ema=0.97, test_freq=6))
        result[f"{tried}_acc1"] = round(tested["test_acc1"], 1)
    picture = output / "pretrain" / f"reconstruction-{epochs - 1}.png"
    result |= {"chance": 10.0, "picture": str(picture),
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
