"""MAE-Lite, D-MAE and D2-MAE: small ViTs, distilled while they are pre-trained as autoencoders.

Gao, Lin, Wang, et al.: "An Experimental Study on Exploring Strong Lightweight Vision Transformers
via Masked Image Modeling Pre-Training", IJCV 2025, arXiv 2404.12210; before it Wang, Gao, et al.:
"A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023, arXiv 2205.14443.
Pre-training is MAE's, arXiv 2111.06377; Hiera is arXiv 2306.00989.
The method is this file, from "masking" to "model"; its argument is measured by `analyse`.

The idea. MAE hides three quarters of the patches, so pre-training a small ViT is cheap; but it
teaches the lower layers well and the upper ones badly, which shows where labels are scarce. A
large MAE encoder, frozen, knows better. It sees the same visible patches, and the attention of the
student, before its softmax, has to resemble that of the teacher. In D-MAE this is a second loss on
the last block (`--distill attention`). In D2-MAE (`--distill decoupled`) the two tasks part: the
decoder reads what the first 8 blocks give, so reconstruction trains these alone, and a 13th block,
cut off after its queries and keys, imitates the teacher's last one, which trains blocks 9 to 12 by
distillation alone. In the end decoder, adapters, the 13th block and the teacher are thrown away.

    x = W patch + b + position                         of the visible patches              (1)
    x = x + proj(softmax(A + R) v)                     A = q k^T / sqrt(d) of norm(x)      (2)
    x = x + fc2(gelu(fc1(norm(x))))                                                        (3)
    loss = reconstruction + a attention + b hidden     a, b: --attn_weight, --hidden_weight (4)
    t = (u - mean(u)) / sqrt(var(u) + 1e-6)            u the pixels of one patch           (5)
    reconstruction = mean over hidden patches of (prediction - t)^2                        (6)
    attention = sum over pairs of blocks of mean (mix(A student) - A teacher)^2            (7)
    hidden = sum over layers of mean (linear(norm(x student)) - norm(x teacher))^2         (8)

`mix`, a 1x1 convolution over heads, turns those of the student into those of the teacher. R, the
relative position bias, is an option of fine-tuning (`--rpe`): zero in pre-training. (8) is off in
the published recipe. Blocks are counted from 1 in flags, from 0 in parameter names.

Hiera. A hierarchical ViT for MAE without windows: 8x8 tokens of 4 px are a mask unit, attention
stays inside units in the first two stages, then is global; a stage begins by merging 2x2 tokens of
the queries, and of the residual path, to the largest. Here tokens stand as (units, cells of a
unit), and cells in the order (coarse row, column, ..., fine row, column): four that merge are
neighbours in a row, so that merging is a reshape, and a hidden unit is left out as a whole.

Data flow of ViT-Tiny, teacher ViT-B, at 224 px, U = 196 patches of 16 px, V = 49 visible:
    images (B, 3, 224, 224) -> visible patches (B, 49, 768) -> class token and they (B, 50, 192)
    8 of 12 blocks, norm, Linear (B, 50, 96) -> mask tokens in their places (B, 197, 96)
    one block (B, 197, 96) -> the hidden patches, norm, Linear               (B, 147, 768)
    blocks 9 to 12, queries and keys of the 13th -> A, 12 heads              (B, 12, 50, 50)
    teacher: 11 blocks, queries and keys of the 12th -> A, 12 heads          (B, 12, 50, 50)
Of Hiera-Tiny U = 49 units, V = 29: 40% are hidden; cells 64, 16, 4, 4 a unit, in fine-tuning 1 at
last. The decoder reads stages 1, 2 and 4, brought to 4 cells a unit and added.

Paper, released code, and here ("released" is the code of 2025; "2023" its first release):
  - The teacher runs all blocks in released code; here up to the last logits that are asked for.
  - ViT-Tiny and ViT-Small have 12 heads, unlike DeiT's and timm's of that name.
  - Released Hiera hides 40% of the units, where Hiera's own code hides 60%; kept.
  - Released pre-training crops from 8% of the image on, not MAE's 20%, resized bilinearly or
    bicubically by chance; class token, mask token, adapters, Hiera's tables decay; kept.
  - With separate biases of queries and values (2023, `--qkv_bias qv`) released code begins
    fine-tuning with zeros; here with those of the file: softmax does not see a bias of the keys.
  - Released Hiera answers probabilities in evaluation, here logits.
  - Released analysis takes a patch for 14 px; here distances are of pixels, on any grid.
  - Swin as a student (SimMIM, released 2025) is not here.

Letters: B batch, U units or patches, V visible ones, N tokens, C channels, D decoder width,
h heads, d head width, P values of a patch; H, W pixels, (h, w) tokens of a map.
Comments say where a value is from: (paper), (released ...), (MAE), (ours) = chosen here.

Usage:
    python distill_lite.py demo                              about five minutes, two CPU cores
    torchrun --nproc_per_node 8 distill_lite.py --model vit_tiny --data_path /imagenet \
        --distill decoupled --teacher mae_pretrain_vit_base.pth
    torchrun --nproc_per_node 8 distill_lite.py finetune --data_path /imagenet \
        --weights output/distill_lite/pretrain/backbone.pth             (also --recipe rpe)
    python distill_lite.py analyse --weights a.pth --other b.pth --data_path /images
    python distill_lite.py {evaluate,reconstruct,export,features} --help
Feature maps for dense heads: `maps = load_backbone(FILE).maps(images)`, of any height and width.
To copy: this file and `common/`. The method alone: `ModelConfig`, and from "masking" to "model".
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import importlib
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
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
Blocks = tuple[Annotated[int, (0, 999)], ...]
Distillation = Literal["none", "attention", "decoupled"]
Relative, Biases = Literal["none", "block", "shared", "both"], Literal["qkv", "qv"]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, and what is distilled; stored in every checkpoint."""
    kind: Literal["vit", "hiera"] = "vit"
    input_size: Annotated[int, (1, 4096)] = 224
    patch_size: Annotated[int, (4, 64)] = 16  # of ViT embedded and predicted, of Hiera predicted
    embed_dim: Annotated[int, (4, 4096)] = 192  # of Hiera in the first stage, then it doubles
    depths: tuple[Annotated[int, (1, 99)], ...] = (12,)  # blocks a stage
    num_heads: Count = 12  # of Hiera in the first stage, then they double
    mlp_ratio: Annotated[float, (0.01, 100.0)] = 4.0
    decoder_dim: Annotated[int, (4, 4096)] = 96
    decoder_depth: Annotated[int, (1, 99)] = 1
    decoder_num_heads: Count = 3
    norm_pix_loss: bool = True
    # Pre-training with a teacher; an empty list means the last block.
    distill: Distillation = "none"
    decode_depth: Annotated[int, (1, 99)] = 8  # decoupled: the decoder reads behind so many blocks
    attn_layers: Blocks = ()  # blocks of the student, from 1, whose A imitates
    teacher_attn_layers: Blocks = ()  # and of the teacher; empty = the same, or its last
    attn_weight: Amount = 1.0
    attn_adapter: bool = True  # else, where heads are equal in number, there is no `mix` in (7)
    hidden_layers: Blocks = ()  # of both: inputs of blocks, from 0, after norm1, or the last norm's
    hidden_weight: Amount = 1.0
    hidden_adapter: bool = True
    # Fine-tuning of ViTs.
    global_pool: bool = True  # the head sees the mean token, not the class token
    two_heads: bool = False  # a second head on the class token, for a teacher that classifies
    abs_pos: bool = True
    rpe: Relative = "none"  # tables of R a block, or one for all
    qkv_bias: Biases = "qkv"
    layer_scale: Annotated[float, (0.0, 1e3)] = 0.0  # what gammas begin at, 0 = there are none

    @property
    def patch_stride(self) -> int:
        """Pixels between embedded tokens."""
        return self.patch_size if self.kind == "vit" else self.patch_size // 4

    @property
    def mask_unit(self) -> int:
        """Side of what is masked as a whole: a patch of ViT, 8x8 tokens of Hiera."""
        return self.patch_size if self.kind == "vit" else 2 * self.patch_size

    @property
    def units(self) -> int:
        """Patches or mask units per side of the image."""
        return self.input_size // self.mask_unit

    @property
    def cells(self) -> int:
        """Predicted patches of a unit."""
        return (self.mask_unit // self.patch_size) ** 2

    @property
    def last(self) -> int:
        """The last block, from 1, that has queries and keys."""
        return sum(self.depths) + (self.distill == "decoupled")

    @property
    def first_global(self) -> int:
        """The first block, from 1, with attention over all of an image."""
        return 1 if self.kind == "vit" else sum(self.depths[:2]) + 2


MODELS = {  # kind, pixels, patch, width, depths, heads, MLP ratio; decoder: width, depth, heads
    "vit_tiny": ModelConfig(),
    "vit_small": ModelConfig(embed_dim=384, decoder_dim=192, decoder_num_heads=6),
    "hiera_tiny": ModelConfig("hiera", 224, 16, 46, (1, 2, 7, 2), 1),
    "vit_base": ModelConfig("vit", 224, 16, 768, (12,), 12, 4.0, 512, 8, 16),
    "vit_large": ModelConfig("vit", 224, 16, 1024, (24,), 16, 4.0, 512, 8, 16),
    "hiera_base": ModelConfig("hiera", 224, 16, 96, (2, 3, 16, 3), 1, 4.0, 512, 8, 16),
    "demo": ModelConfig("vit", 64, 8, 64, (6,), 4, 4.0, 64, 1, 2, decode_depth=4),  # ours
    "demo_teacher": ModelConfig("vit", 64, 8, 128, (6,), 4, 4.0, 64, 2, 2),  # ours
    "test": ModelConfig("vit", 64, 16, 16, (3,), 2, 4.0, 16, 1, 2, decode_depth=2),  # ours
    "test_hiera": ModelConfig("hiera", 64, 16, 8, (1, 1, 2, 1), 1, 4.0, 16, 1, 2),  # ours
}
OTHER_NAMES = {  # timm's, with other heads in the small ones, and the constructors of released code
    f"{before}{ours}{after}": ours for ours in ("vit_tiny", "vit_small", "vit_base", "vit_large")
    for before, after in (("", "_patch16_224"), ("", "_patch16"), ("mae_", "_patch16"))
} | {
    f"{before}{ours}_224": ours for ours in ("hiera_tiny", "hiera_base") for before in ("", "mae_")
} | {
    "mae_tiny": "vit_tiny", "mae_small": "vit_small", "mae_base": "vit_base",
    "mae_large": "vit_large", "mae_hiera_tiny": "hiera_tiny", "mae_hiera_base": "hiera_base",
    "mae_vit_tiny_d13_patch16": "vit_tiny", "vit_tiny_patch16_rpe": "vit_tiny",
}
HIERA_RATIO = 0.4  # share of hidden units (released)
PRETRAINED = {  # the options of fine-tuning as they are in pre-training
    "global_pool": False, "two_heads": False, "abs_pos": True, "rpe": "none", "qkv_bias": "qkv",
    "layer_scale": 0.0}
RECIPES = {  # by command, recipe and, where it matters, model: what differs from the classes below
    ("pretrain", recipe, model): {"mask_ratio": HIERA_RATIO}
    for recipe in ("published", "small") for model in MODELS if "hiera" in model
} | {
    ("pretrain", "small"): {
        "batch_size": 64, "blr": 1.6e-3, "epochs": 100, "warmup_epochs": 5.0, "crop_min": 0.2},
    ("finetune", "published", "vit_small"): {"layer_decay": 0.75},
    ("finetune", "plain"): {
        "epochs": 100, "aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0,
        "smoothing": 0.1, "reprob": 0.25, "drop_path": 0.1},
    ("finetune", "rpe"): {"rpe": "block", "epochs": 1000},
    ("finetune", "transfer"): {
        "opt": "sgd", "batch_size": 64, "lr": 0.1, "epochs": 50, "warmup_epochs": 10.0,
        "weight_decay": 0.0, "clip_grad": 1.0, "layer_decay": 0.75, "aa": "none", "mixup": 0.0},
    ("finetune", "small"): {
        "batch_size": 32, "blr": 8e-3, "epochs": 30, "warmup_epochs": 3.0, "layer_decay": 0.8,
        "clip_grad": 1.0, "crop_min": 0.35, "aa": "none", "mixup": 0.0},
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
    """What the method lets one change of the network; None = as the file or the model has it."""
    num_heads: Count | None = None  # released ViT files do not tell; Hiera: in stage 1 (ours)


@dataclass(frozen=True)
class PretrainConfig(RunConfig, MethodConfig):
    """Recipe of the released experiments, 8 processes."""
    output_dir: str = f"output/{SCRIPT}/pretrain"  # checkpoints, log.txt, pictures (ours)
    batch_size: Count = 512  # images per process (released)
    epochs: Count = 400  # passes over the data (released)
    warmup_epochs: Amount = 40.0  # linear warm-up (released)
    blr: Amount = 1.5e-4  # learning rate per 256 images (released)
    min_lr: Amount = 0.0  # end of the cosine (released)
    weight_decay: Amount = 0.05  # AdamW (released)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (released)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.08  # smallest crop, share of the image (released)
    mask_ratio: Share = 0.75  # share of hidden patches; of Hiera's units 0.4 (released)
    norm_pix_loss: bool | None = None  # normalise each target patch; none = yes (released)
    distill: Distillation | None = None  # attention = D-MAE, decoupled = D2-MAE, none (paper)
    teacher: str = ""  # file of its weights, MAE's, Hiera's or ours (paper: MAE ViT-B)
    teacher_dtype: DType | None = None  # of its work, bf16 is fastest; none = the student's (ours)
    decode_depth: Count | None = None  # decoupled: blocks before the decoder; none = 8 (released)
    attn_layers: Blocks | None = None  # student's blocks, from 1; none = the last (released)
    teacher_attn_layers: Blocks | None = None  # teacher's; none = the same, or its last (released)
    attn_weight: Amount | None = None  # of the attention loss; none = 1 (released)
    attn_adapter: bool | None = None  # convolution over heads; none = yes (released)
    hidden_layers: Blocks | None = None  # layers of hidden states, from 0; none = off (released)
    hidden_weight: Amount | None = None  # of the hidden-state loss; none = 1 (released)
    hidden_adapter: bool | None = None  # linear map of hidden states; none = yes (released)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig, MethodConfig):
    """The paper's improved recipe, 8 processes."""
    output_dir: str = f"output/{SCRIPT}/finetune"  # checkpoints and log.txt (ours)
    linear_probe: bool = False  # train the head only: plain crops, no mixing (ours)
    nb_classes: Count | None = None  # outputs; none = the number of class folders (ours)
    batch_size: Count = 128  # images per process (released)
    epochs: Count = 300  # passes over the data (released)
    warmup_epochs: Amount = 5.0  # linear warm-up (released)
    blr: Amount = 1e-3  # learning rate per 256 images (released)
    min_lr: Amount = 1e-6  # end of the cosine, before layer decay (released)
    weight_decay: Amount = 0.05  # of AdamW, or SGD (released)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (released)
    layer_decay: Share = 0.85  # learning rate factor from layer to layer (released)
    drop_path: Annotated[float, (0.0, 0.99999)] = 0.0  # stochastic depth, last block (released)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.08  # smallest crop, share of the image (released)
    mixup: Amount = 0.2  # Beta parameter, 0 = off (released)
    cutmix: Amount = 0.0  # Beta parameter, 0 = off (released)
    smoothing: Share = 0.0  # label smoothing (released)
    reprob: Share = 0.0  # probability of random erasing (released)
    aa: str = "rand-m10-mstd0.5-inc1"  # RandAugment policy, none = off (released)
    ema: Annotated[float, (0.0, 0.99999)] = 0.0  # decay of averaged weights, 0 = off (ours)
    test_freq: Count = 1  # epochs between tests; the last is always tested (ours)
    rpe: Relative | None = None  # relative position bias a block, shared or both (released: block)
    qkv_bias: Biases | None = None  # qv = of queries and values by themselves (released 2023)
    layer_scale: Amount | None = None  # start of learned factors of branches (released 2023: 0.1)
    global_pool: bool | None = None  # head on the mean token, else class token (released)
    class_teacher: str = ""  # module:function that returns a classifier to learn from (ours)
    class_distill: Literal["hard", "soft"] = "hard"  # its answer or its probabilities (released)
    class_weight: Share = 0.5  # share of that loss (released)
    temperature: Annotated[float, (0.01, 1000.0)] = 1.0  # of soft distillation (released)
    opt: Literal["adamw", "sgd"] = "adamw"  # sgd with Nesterov momentum 0.9 (released transfer)


@dataclass(frozen=True)
class UseConfig(FileConfig, MethodConfig):
    """What the commands that do not train need."""
    naming: Literal["official", "timm"] = "official"  # export: whose parameter names (ours)
    mask_ratio: Share | None = None  # reconstruct: none = the file's, else 0.75, Hiera 0.4 (ours)
    norm_pix_loss: bool | None = None  # reconstruct: as in pre-training; none = the file's (ours)


@dataclass(frozen=True)
class AnalyseConfig(FileConfig, MethodConfig):
    """What comparing layers needs."""
    other: str = ""  # a second file, whose layers those of --weights are compared with (paper)
    images: Count = 1152  # images to look at: nine batches of 128 (released)
    batch_size: Annotated[int, (4, 10**6)] = 128  # CKA is estimated batch by batch (released)


def known_model(name: str) -> str:
    """Our name of a network; InputError with the closest names if there is none."""
    if OTHER_NAMES.get(name, name) not in MODELS:
        near = difflib.get_close_matches(name, [*MODELS, *OTHER_NAMES], 3, 0)
        raise InputError(f"unknown model {name!r}; the closest names are {', '.join(near)}")
    return OTHER_NAMES.get(name, name)


def model_config(base: ModelConfig, **changes: object) -> ModelConfig:
    """`base` with `changes` (None = keep); checks that all fit together."""
    base = without_teacher(base) if changes.get("distill") == "none" else base
    config = replace(base, **{k: v for k, v in changes.items() if v is not None})
    vit, depth = config.kind == "vit", sum(config.depths)
    if isinstance(config.input_size, tuple):
        raise InputError(f"--input_size {data.sides(config.input_size)}: here images are square")
    check_size(config.input_size, config.mask_unit)
    for width, heads in ((config.embed_dim, config.num_heads),
                         (config.decoder_dim, config.decoder_num_heads)):
        if width % heads:
            raise InputError(f"--num_heads: {heads} heads do not divide a width of {width}")
    if vit and (config.embed_dim % 4 or config.decoder_dim % 4):
        raise InputError("widths of a ViT and its decoder are multiples of 4, for their positions")
    if len(config.depths) != (1 if vit else 4):
        raise InputError(f"a {config.kind} of {len(config.depths)} stages: ViT has 1, Hiera has 4")
    if not vit and (config.rpe, config.qkv_bias, config.layer_scale) != ("none", "qkv", 0.0):
        raise InputError("--rpe, --qkv_bias qv and --layer_scale are options of ViTs, not of Hiera")
    if config.two_heads and not (vit and config.global_pool):
        raise InputError("--class_teacher: the second head is on the class token of a ViT that "
                         "has its first on the mean of patches")
    check_distillation(config, depth)
    return config


def check_layers(flag: str, layers: Sequence[int], low: int, high: int) -> None:
    """InputError unless the layers that a flag names are of `low` to `high`, each once."""
    if len(set(layers)) < len(layers) or any(not low <= i <= high for i in layers):
        raise InputError(f"--{flag} {','.join(map(str, layers))}: give each once, of {low} to "
                         f"{high}")


def check_distillation(config: ModelConfig, depth: int) -> None:
    """InputError unless what is to be distilled is there in a student of that many blocks."""
    check_layers("attn_layers", config.attn_layers, config.first_global, config.last)
    check_layers("hidden_layers", config.hidden_layers, 0, depth)
    if config.distill == "none":
        if config.attn_layers or config.teacher_attn_layers or config.hidden_layers:
            raise InputError("--attn_layers, --teacher_attn_layers and --hidden_layers need "
                             "--distill attention or decoupled")
    elif config.kind == "hiera" and (config.distill == "decoupled" or config.hidden_layers):
        raise InputError("--distill decoupled and --hidden_layers are for ViTs; of Hiera there is "
                         "--distill attention")
    elif config.distill == "decoupled":
        if config.decode_depth > depth:
            raise InputError(f"--decode_depth {config.decode_depth}: there are {depth} blocks")
        if config.attn_layers and config.last not in config.attn_layers:
            raise InputError(f"--attn_layers {config.attn_layers}: {config.last}, the block that "
                             "is cut off, has to be one of them")


def layer_pairs(config: ModelConfig, teacher: ModelConfig) -> list[tuple[int, int, str]]:
    """(block of the student, of the teacher, released name of their adapter) of (7); InputError
    unless the teacher can look at the student's visible patches and has what is asked of it."""
    if teacher.kind != config.kind or teacher.patch_size != config.patch_size:
        raise InputError(f"--teacher is a {teacher.kind} with patches of {teacher.patch_size} px, "
                         f"the student a {config.kind} with {config.patch_size} px")
    depth, ours = sum(teacher.depths), config.attn_layers or (config.last,)
    theirs = config.teacher_attn_layers or config.attn_layers or (depth,)
    check_layers("teacher_attn_layers", theirs, teacher.first_global, depth)
    if len(ours) != len(theirs):
        raise InputError(f"--teacher_attn_layers {theirs}: give {len(ours)}, as many as "
                         "--attn_layers")
    if max(config.hidden_layers, default=0) > depth:
        raise InputError(f"--hidden_layers: the teacher has {depth} blocks")
    named = theirs if config.kind == "vit" else ours
    return [(s, t, f"adapter{i - 1}") for s, t, i in zip(ours, theirs, named, strict=True)]


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


def plan_noise(config: ModelConfig, noise: np.ndarray, mask_ratio: float) -> ShufflePlan:
    """Plan of the masks that (B, U) noise makes. A ViT has visible patches in the order of the
    noise, as released, Hiera its units in raster order."""
    order, kept = shuffle_patches(noise, mask_ratio)
    if config.kind == "hiera":
        order = np.concatenate([np.sort(order[:, :kept]), np.sort(order[:, kept:])], axis=1)
    return plan_shuffle(order, kept)


def draw_masks(config: ModelConfig, mask_ratio: float, batch: int,
               seed: Sequence[int]) -> ShufflePlan:
    """Plan of the masks that belong to `seed` (run seed, step, rank): one for each image."""
    noise = np.random.default_rng(seed).random((batch, config.units**2), np.float32)
    return plan_noise(config, noise, mask_ratio)


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


def to_units(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, h * w, C), row by row, -> (B, U * 64, C): unit after unit of 8x8, and in each its cells
    from coarse to fine, so that four neighbours in a row are a 2x2 block, at every level."""
    for level in (4, 16, 64):  # cells, as large as this, of an ever coarser map
        shape = (shape[0] // 2, shape[1] // 2)
        x = rearrange(x, "b (r y q x n) c -> b (r q y x n) c", r=shape[0], q=shape[1], y=2, x=2,
                      n=level // 4)
    return x


def to_raster(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, U * n, C) in units of n cells -> (B, h * w, C) row by row, for `shape` units."""
    rows, columns = shape
    cells = x.shape[1] // (rows * columns)
    while cells > 1:
        cells //= 4
        x = rearrange(x, "b (r q y x n) c -> b (r y q x n) c", r=rows, q=columns, y=2, x=2, n=cells)
        rows, columns = 2 * rows, 2 * columns
    return x


def scores(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """A + R of Eq. (2): (B, h, N, d) twice -> (B, h, N, N)."""
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    return logits if bias is None else logits + bias


@lru_cache(16)
def relative_index(height: int, width: int, device: torch.device) -> Tensor:
    """(N, N) row of the table for each pair of query and key: a class token, then an (h, w) map.
    The last three rows are for the class token: to it, from it, and of it with itself."""
    y, x = np.divmod(np.arange(height * width), width)
    last = (2 * height - 1) * (2 * width - 1)
    index = np.empty((1 + y.size, 1 + y.size), np.int64)
    index[1:, 1:] = ((y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1)
    index[0], index[1:, 0], index[0, 0] = last, last + 1, last + 2
    return torch.from_numpy(index).to(device)


def relative_bias(table: Tensor, shape: Sequence[int]) -> Tensor:
    """(rows, h) -> R (1, h, N, N) for an (h, w) map; the table of another map is interpolated."""
    pairs = (2 * shape[0] - 1, 2 * shape[1] - 1)
    if len(table) != math.prod(pairs) + 3:
        table = torch.cat([stretch(table[:-3], pairs), table[-3:]])
    index = relative_index(*shape, table.device)
    bias = table.index_select(0, index.flatten())
    return rearrange(bias, "(s t) h -> 1 h s t", s=len(index))


class Mlp(nn.Module):
    """Eq. (3) without its norm and residual."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LiteAttention(nn.Module):
    """Eq. (2) without its norm and residual: over all tokens, or inside units of `cells` of them.
    `pooled` = queries are the largest of each four; `rows` of a table of R; cut off, `whole` =
    False, it is of use for its logits only."""

    def __init__(self, dim: int, out: int, num_heads: int, cells: int = 0, pooled: bool = False,
                 qkv_bias: str = "qkv", rows: int = 0, whole: bool = True) -> None:
        super().__init__()
        self.num_heads, self.cells, self.pooled = num_heads, cells, pooled
        self.qkv = nn.Linear(dim, 3 * out, bias=qkv_bias == "qkv")
        self.q_bias, self.v_bias = (
            nn.Parameter(torch.zeros(out)) if qkv_bias == "qv" else None for _ in range(2))
        self.relative_position_bias_table = (
            nn.Parameter(torch.zeros(rows, num_heads)) if rows else None)
        self.proj = nn.Linear(out, out) if whole else None

    def heads(self, x: Tensor, parts: int = 3) -> list[Tensor]:
        """(B, N, C) -> queries, keys and, if `parts` are three, values: (B or B * U, h, n, d)."""
        weight, bias = self.qkv.weight, self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if parts < 3:
            weight, bias = (p[:parts * len(p) // 3] for p in (weight, bias))
        layout, n = "b (u n) (p h d) -> p (b u) h n d", self.cells or x.shape[1]
        q, *others = rearrange(F.linear(x, weight, bias), layout, p=parts, h=self.num_heads, n=n)
        return [q.unflatten(2, (-1, 4)).amax(3) if self.pooled else q, *others]

    def bias(self, shape: Sequence[int] | None, shared: Tensor | None) -> Tensor | None:
        """R (1, h, N, N) of this block's table and the shared one, if there are any."""
        table = self.relative_position_bias_table
        own = None if table is None else relative_bias(table, shape)
        return shared if own is None else own if shared is None else own + shared

    def logits(self, x: Tensor, shape: Sequence[int] | None = None,
               shared: Tensor | None = None) -> Tensor:
        """(B, N, C) -> A + R (B or B * U, h, n, n); the values are not computed."""
        return scores(*self.heads(x, 2), self.bias(shape, shared))

    def forward(self, x: Tensor, tapped: bool = False, shape: Sequence[int] | None = None,
                shared: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> (B, N or N / 4, out), and A + R (B or B * U, h, n, n) if it is `tapped`."""
        (q, k, v), bias, logits = self.heads(x), self.bias(shape, shared), None
        # On the CPU the fused kernel takes no bias that learns, and for few tokens its backward
        # pass, and bf16, take up to 1.8 times as long as what is written out here.
        few = k.shape[2] <= 128 and (q.requires_grad or q.dtype is torch.bfloat16)
        if tapped or (not q.is_cuda and (few or bias is not None)):
            logits = scores(q, k, bias)
            y = torch.matmul(logits.softmax(-1, dtype=torch.float32).to(v.dtype), v)
        else:
            bias = None if bias is None else bias.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, bias)
        y = self.proj(rearrange(y, "(b u) h n d -> b (u n) (h d)", b=len(x)))
        return y, logits if tapped else None


class LiteBlock(nn.Module):
    """Eq. (2) and (3), of a ViT with a learned factor for each branch if `layer_scale` is not 0.
    Where a stage of Hiera begins, the residual is normed, widened and pooled as the queries are."""

    def __init__(self, dim: int, attn: LiteAttention, mlp_ratio: float, drop_path: float = 0.0,
                 layer_scale: float = 0.0) -> None:
        super().__init__()
        out, whole = attn.qkv.out_features // 3, attn.proj is not None
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(out, LAYER_NORM_EPS) if whole else None
        self.mlp = Mlp(out, int(out * mlp_ratio)) if whole else None
        self.proj = nn.Linear(dim, out) if dim != out else None
        self.gamma_1, self.gamma_2 = (
            nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
            for _ in range(2))
        self.drop_path = drop_path

    def forward(self, x: Tensor, tapped: bool = False,
                *plan: object) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> (B, N or N / 4, out), and the logits of its attention if `tapped`."""
        dropped, normed = self.drop_path if self.training else 0.0, self.norm1(x)
        y, logits = self.attn(normed, tapped, *plan)
        if self.proj is not None:
            x = self.proj(normed)
            x = x.unflatten(1, (-1, 4)).amax(2) if self.attn.pooled else x
        x = x + drop_path(y if self.gamma_1 is None else self.gamma_1 * y, dropped)  # Eq. (2)
        y = self.mlp(self.norm2(x))
        return x + drop_path(y if self.gamma_2 is None else self.gamma_2 * y, dropped), logits


class PixelEmbed(nn.Module):
    """Eq. (1) without its position: a convolution, as a matrix product on what `patchify` cuts."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, size, size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, P) -> (B, N, C)"""
        weight = rearrange(self.proj.weight, "d c p q -> d (p q c)")
        return F.linear(patches, weight, self.proj.bias)


# ── encoder ───────────────────────────────────────────────────────────────────────────

Found = tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]


def trace(encoder: nn.Module, x: Tensor, ends: Sequence[int] = (), attn: Sequence[int] = (),
          hidden: Sequence[int] = (), plan: Sequence = ()) -> Found:
    """Tokens through the blocks of an encoder, no further than is asked for: what blocks `ends`
    give, the logits of blocks `attn`, counted from 1, and hidden states, counted from 0: `norm1` of
    what goes into a block, or, behind the last, the encoder's norm of what comes out."""
    outputs, logits, states, blocks = {}, {}, {}, encoder.blocks
    again = encoder.grad_checkpoint and encoder.training
    whole = max([0, *ends, *hidden, *(i - 1 for i in attn)])  # blocks to run as such
    for i in range(whole + 1):
        if i in hidden:
            states[i] = blocks[i].norm1(x) if i < len(blocks) else encoder.fc_norm(encoder.norm(x))
        if i < whole:
            run = partial(checkpoint, blocks[i], use_reentrant=False) if again else blocks[i]
            x, tapped = run(x, i + 1 in attn, *plan)
            if i + 1 in attn:
                logits[i + 1] = tapped
            if i + 1 in ends:
                outputs[i + 1] = x
        elif i + 1 in attn:
            logits[i + 1] = blocks[i].attn.logits(blocks[i].norm1(x), *plan)
    return outputs, logits, states


class LiteViT(nn.Module):
    """ViT on whole images of any size, or on the patches that a plan leaves visible. `fixed` = its
    positions do not learn."""

    def __init__(self, config: ModelConfig, drop_path: float = 0.0, fixed: bool = False) -> None:
        super().__init__()
        self.config, self.grad_checkpoint, dim = config, False, config.embed_dim
        self.channels, self.strides = [dim], [config.patch_size]
        self.patch_embed = PixelEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if fixed:
            self.register_buffer("pos_embed", sincos_table(dim, config.units, config.units))
        else:
            table = nn.Parameter(torch.zeros(1, 1 + config.units**2, dim))
            self.pos_embed = table if config.abs_pos else None
        rates = np.linspace(0, drop_path, sum(config.depths)).tolist()
        rates += [0.0] * (config.distill == "decoupled")  # for the block that is cut off
        rows, self.blocks = (2 * config.units - 1) ** 2 + 3, nn.ModuleList()  # of tables of R
        for i, rate in enumerate(rates):
            attn = LiteAttention(
                dim, dim, config.num_heads, qkv_bias=config.qkv_bias,
                rows=rows * (config.rpe in ("block", "both")), whole=i < sum(config.depths))
            self.blocks.append(LiteBlock(dim, attn, config.mlp_ratio, rate, config.layer_scale))
        self.rel_pos_bias = nn.ParameterDict()
        if config.rpe in ("shared", "both"):
            table = nn.Parameter(torch.zeros(rows, config.num_heads))
            self.rel_pos_bias["relative_position_bias_table"] = table
        norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.norm, self.fc_norm = (nn.Identity(), norm)[:: 1 if config.global_pool else -1]
        draw_linear(self, partial(nn.init.trunc_normal_, std=0.02))
        for table in (self.cls_token, self.pos_embed):
            if isinstance(table, nn.Parameter):
                nn.init.trunc_normal_(table, std=0.02)

    def see(self, images: Tensor, patches: Tensor, plan: ShufflePlan) -> Tensor:
        """What an encoder is shown of (B, 3, H, W), or (B, U, P): its visible patches (B, V, P)."""
        return take(patches, plan.keep)

    def embed(self, seen: Tensor, shape: Sequence[int], keep: Tensor | None = None) -> Tensor:
        """All patches of an (h, w) map, or those to `keep`, (B, V, P) -> (B, 1 + V, C), Eq. (1)."""
        x, token = self.patch_embed(seen), self.cls_token
        if self.pos_embed is not None:
            table = stretch(self.pos_embed[0, 1:], shape)
            x = x + (table if keep is None else table[keep])
            token = token + self.pos_embed[:, :1]
        return torch.cat([token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

    def look(self, images: Tensor, ends: Sequence[int] = (), attn: Sequence[int] = (),
             hidden: Sequence[int] = ()) -> Found:
        """`trace` of whole images (B, 3, H, W); the class token comes first."""
        size = self.config.patch_size
        shape = whole_map(images, size, size)
        shared = self.rel_pos_bias.get("relative_position_bias_table")
        plan = (shape, None if shared is None else relative_bias(shared, shape))
        x = self.embed(patchify(images, size), shape)
        return trace(self, x, ends, attn, hidden, plan if self.config.rpe != "none" else ())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), the mean of all patches, normed."""
        (x,) = self.look(images, [sum(self.config.depths)])[0].values()
        return self.fc_norm(self.norm(x)[:, 1:].mean(1))

    def maps(self, images: Tensor, blocks: Sequence[int] = ()) -> list[Tensor]:
        """(B, 3, H, W) normalised -> the map (B, C, h, w) behind the last block, or behind each of
        `blocks`, from 1, not normed. Any H and W that the patch divides: position tables, those of
        R too, are interpolated."""
        blocks, height = blocks or [sum(self.config.depths)], images.shape[-2] // self.strides[0]
        found, *_ = self.look(images, blocks)
        return [rearrange(found[i][:, 1:], "b (h w) c -> b c h w", h=height) for i in blocks]


class LiteHiera(nn.Module):
    """Hiera on whole images of any size, or on the units that a plan leaves visible. `pools` = how
    often tokens are merged: 3 times, in pre-training 2."""

    def __init__(self, config: ModelConfig, drop_path: float = 0.0, pools: int = 3) -> None:
        super().__init__()
        self.config, self.grad_checkpoint = config, False
        self.channels = [config.embed_dim * 2**i for i in range(4)]
        self.strides = [config.patch_stride * 2 ** min(i, pools) for i in range(4)]
        self.patch_embed, stride = nn.Sequential(), config.patch_stride
        self.patch_embed.proj = nn.Conv2d(  # a token every `stride` pixels, of nearly twice as many
            3, config.embed_dim, 2 * stride - 1, stride, stride - 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, 64 * config.units**2, config.embed_dim))
        rates = np.linspace(0, drop_path, sum(config.depths)).tolist()
        self.blocks, cells, dim = nn.ModuleList(), 64, config.embed_dim
        for stage, depth in enumerate(config.depths):
            for j in range(depth):
                # The first block of a stage still attends as the stage before it did.
                local = stage - (j == 0) < 2
                pooled = j == 0 and 0 < stage <= pools
                out, heads = self.channels[stage], config.num_heads * 2**stage
                attn = LiteAttention(dim, out, heads, cells if local else 0, pooled)
                rate = rates[len(self.blocks)]
                self.blocks.append(LiteBlock(dim, attn, config.mlp_ratio, rate))
                cells, dim = cells // 4 if pooled else cells, out
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS) if config.global_pool else nn.Identity()
        self.fc_norm = nn.Identity()
        draw_linear(self, partial(nn.init.trunc_normal_, std=0.02), 0.02)
        for weight in (self.patch_embed.proj.weight, self.pos_embed):
            nn.init.trunc_normal_(weight, std=0.02)

    def see(self, images: Tensor, patches: Tensor, plan: ShufflePlan) -> Tensor:
        """What an encoder is shown: (B, 3, H, W), zero in hidden units, which the convolution at
        the border of a visible one would reach."""
        mask = torch.zeros_like(plan.restore, dtype=images.dtype).scatter_(1, plan.keep, 1.0)
        mask = mask.unflatten(1, (self.config.units, -1)).unsqueeze(1)
        return images * F.interpolate(mask, scale_factor=float(self.config.mask_unit))

    def embed(self, seen: Tensor, shape: Sequence[int], keep: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) of (h, w) tokens -> (B, U * 64, C), or only of units to `keep`."""
        x = self.patch_embed(seen).flatten(2).transpose(1, 2)
        x = to_units(x + stretch(self.pos_embed[0], shape), shape)
        if keep is None:
            return x
        return take(x.unflatten(1, (-1, 64)).flatten(2), keep).unflatten(2, (64, -1)).flatten(1, 2)

    def look(self, images: Tensor, ends: Sequence[int] = (), attn: Sequence[int] = (),
             hidden: Sequence[int] = ()) -> Found:
        """`trace` of whole images (B, 3, H, W), tokens unit by unit."""
        shape = whole_map(images, self.config.patch_stride, self.config.mask_unit)
        return trace(self, self.embed(images, shape), ends, attn, hidden)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), the mean of all tokens, normed."""
        (x,) = self.look(images, [len(self.blocks)])[0].values()
        return self.norm(x.mean(1))

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> a map (B, C, h, w) of every stage, not normed. Any H and W
        that a unit divides; positions are interpolated."""
        found, *_ = self.look(images, list(itertools.accumulate(self.config.depths)))
        units = [side // self.config.mask_unit for side in images.shape[-2:]]
        return [rearrange(to_raster(x, units), "b (h w) c -> b c h w", h=images.shape[-2] // stride)
                for x, stride in zip(found.values(), self.strides, strict=True)]


def draw_linear(model: nn.Module, draw: Callable[[Tensor], object], bias: float = 0.0) -> None:
    """Linear layers anew, biases, those of norms too, at `bias`; convolutions stay."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.constant_(module.bias, bias)


def whole_map(images: Tensor, stride: int, unit: int) -> tuple[int, int]:
    """(h, w) tokens of images (B, 3, H, W); ValueError unless `unit` divides their sides."""
    height, width = images.shape[-2:]
    if height % unit or width % unit:
        raise ValueError(f"images of {height}x{width} px: {unit} must divide both sides")
    return height // stride, width // stride


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


class MaskedDecoder(nn.Module):
    """What ViT and Hiera do alike with latents: decoder, prediction, loss. For their subclasses,
    which are encoders at the same time; of a ViT a unit is one patch, of Hiera four (`cells`)."""

    def add_decoder(self, width: int, lead: int) -> None:
        """`width` channels in latents, of which the first `lead` are class tokens."""
        config, dim, self.lead = self.config, self.config.decoder_dim, lead
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_embed = nn.Linear(width, dim)
        self.decoder_blocks = nn.ModuleList(
            LiteBlock(dim, LiteAttention(dim, dim, config.decoder_num_heads), config.mlp_ratio)
            for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * 3)

    def plan(self, images: Tensor, mask: ShufflePlan | np.ndarray | Tensor) -> ShufflePlan:
        """The plan of `mask` on the images' device; ValueError if they are not of this model."""
        if images.shape[-2:] != (self.config.input_size,) * 2:
            raise ValueError(f"images are {tuple(images.shape)}, not {self.config.input_size} px")
        if not isinstance(mask, ShufflePlan):
            mask = plan_hidden(torch.as_tensor(mask).cpu().numpy())
        if mask.restore.shape != (len(images), self.config.units**2):
            raise ValueError(f"masks are {tuple(mask.restore.shape)}, not of {len(images)} images "
                             f"and {self.config.units**2} units")
        if mask.hidden.shape[1] == 0:
            raise ValueError("the mask hides nothing, so there is nothing to reconstruct")
        return to_device(mask, images.device)

    def decode_tokens(self, latent: Tensor, plan: ShufflePlan) -> Tensor:
        """(B, lead + V * cells, C) -> (B, lead + U * cells, D): latents and mask tokens in their
        places, behind the class token the patches of the image row by row."""
        units, cells = self.config.units, self.config.cells
        token, x = self.decoder_embed(latent).tensor_split([self.lead], dim=1)
        x = x.unflatten(1, (-1, cells)).flatten(2)  # (B, V, cells * D)
        hidden = self.mask_token.to(x.dtype).repeat(*plan.hidden.shape, cells)
        x = take(torch.cat([x, hidden], dim=1), plan.restore).unflatten(2, (cells, -1))
        x = torch.cat([token, to_raster(x.flatten(1, 2), (units, units))], dim=1)
        return x + self.decoder_pos_embed

    def decode(self, latent: Tensor, plan: ShufflePlan) -> Tensor:
        """(B, lead + V * cells, C) -> (B, lead + U * cells, D), through the blocks."""
        x = self.decode_tokens(latent, plan)
        for block in self.decoder_blocks:
            again = self.grad_checkpoint and self.training
            x, _ = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    def of_hidden(self, x: Tensor, plan: ShufflePlan) -> Tensor:
        """(B, U * cells, C), row by row, -> (B, (U - V) * cells, C), unit by hidden unit."""
        units, side = self.config.units, math.isqrt(self.config.cells)
        x = rearrange(x, "b (r y q x) c -> b (r q) (y x c)", r=units, q=units, y=side, x=side)
        return take(x, plan.hidden).unflatten(2, (side**2, -1)).flatten(1, 2)

    def target(self, patches: Tensor) -> Tensor:
        """Patches as `patchify` cuts them -> what is predicted of them, Eq. (5)."""
        if self.config.kind == "hiera":  # channel by channel
            patches = rearrange(patches, "b n (k c) -> b n (c k)", c=3)
        return normalize_patches(patches)[0] if self.config.norm_pix_loss else patches

    def score(self, latent: Tensor, patches: Tensor, plan: ShufflePlan) -> tuple[Tensor, Tensor]:
        """Loss (), and predictions (B, (U - V) * cells, P) of the hidden patches, Eq. (6)."""
        x = self.of_hidden(self.decode(latent, plan)[:, self.lead:], plan)
        prediction = self.decoder_pred(self.decoder_norm(x)).float()
        return F.mse_loss(prediction, self.target(self.of_hidden(patches, plan))), prediction

    def forward(self, images: Tensor,
                mask: ShufflePlan | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Loss (), and predictions (B, (U - V) * cells, P) of the hidden patches, unit by unit in
        the order of `plan.hidden`, for (B, 3, H, W) images. A mask is (B, U) bool, True = hidden,
        as many of each image, as an array or a tensor, or its plan, made ahead."""
        plan, patches = self.plan(images, mask), patchify(images, self.config.patch_size)
        latent, *_ = self.encode(self.see(images, patches, plan), plan)
        return self.score(latent, patches, plan)


# ── model ─────────────────────────────────────────────────────────────────────────────

class MaskedViT(MaskedDecoder, LiteViT):
    """A ViT as a masked autoencoder, of which more than the latents can be asked."""

    def __init__(self, config: ModelConfig) -> None:
        LiteViT.__init__(self, replace(config, **PRETRAINED), fixed=True)
        self.add_decoder(config.embed_dim, 1)
        self.register_buffer(
            "decoder_pos_embed", sincos_table(config.decoder_dim, config.units, config.units))
        draw_linear(self, nn.init.xavier_uniform_)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # its bias as PyTorch does
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, seen: Tensor, plan: ShufflePlan, attn: Sequence[int] = (),
               hidden: Sequence[int] = ()) -> tuple[Tensor, dict, dict]:
        """(B, V, P) -> latents (B, 1 + V, C), and by block logits and hidden states."""
        end, side = sum(self.config.depths), self.config.units
        end = self.config.decode_depth if self.config.distill == "decoupled" else end
        x = self.embed(seen, (side, side), plan.keep)
        outputs, logits, states = trace(self, x, [end], attn, hidden)
        return self.norm(outputs[end]), logits, states


class MaskedHiera(MaskedDecoder, LiteHiera):
    """Hiera as a masked autoencoder: stages 1, 2 and 4 together are its latents."""

    def __init__(self, config: ModelConfig) -> None:
        LiteHiera.__init__(self, replace(config, global_pool=False), pools=2)
        width, patches = self.channels[-1], config.units**2 * config.cells
        self.multi_scale_fusion_heads = nn.ModuleList(
            nn.Conv2d(self.channels[i], width, size, size) for i, size in ((0, 4), (1, 2)))
        self.encoder_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.add_decoder(width, 0)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, patches, config.decoder_dim))
        draw_linear(self, nn.init.xavier_uniform_)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # its bias as PyTorch does
        for table in (self.pos_embed, self.decoder_pos_embed, self.mask_token):
            nn.init.trunc_normal_(table, std=0.02)

    def encode(self, seen: Tensor, plan: ShufflePlan, attn: Sequence[int] = (),
               hidden: Sequence[int] = ()) -> tuple[Tensor, dict, dict]:
        """(B, 3, H, W) -> latents (B, V * 4, C), and by block logits and hidden states."""
        ends = list(itertools.accumulate(self.config.depths))
        x = self.embed(seen, (8 * self.config.units,) * 2, plan.keep)
        outputs, logits, states = trace(self, x, ends, attn, hidden)
        latent = outputs[ends[3]]
        for head, end in zip(self.multi_scale_fusion_heads, ends, strict=False):
            # The cells of a kernel stand in a row, from coarse to fine.
            weight = rearrange(head.weight, "o c (y p) (x q) -> o (y x p q c)", p=2, q=2)
            cells = head.kernel_size[0] ** 2
            x = outputs[end].unflatten(1, (-1, cells)).flatten(2)
            latent = latent + F.linear(x, weight, head.bias)
        return self.encoder_norm(latent), logits, states


def masked_model(config: ModelConfig) -> MaskedViT | MaskedHiera:
    """The autoencoder of a config."""
    return (MaskedViT if config.kind == "vit" else MaskedHiera)(config)


def teacher_model(config: ModelConfig) -> LiteViT | LiteHiera:
    """The encoder of a config as it is pre-trained."""
    config = replace(config, **PRETRAINED, distill="none")
    return LiteViT(config, fixed=True) if config.kind == "vit" else LiteHiera(config, pools=2)


class DistilledMAE(nn.Module):
    """The student, `model`, with adapters for a teacher, if it has one. The teacher is frozen and
    no part of the module: neither saved, nor moved, nor trained with it."""

    def __init__(self, config: ModelConfig, teacher: nn.Module | None = None,
                 teacher_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.frozen, self.pairs = masked_model(config), (teacher,), []
        self.teacher_dtype = teacher_dtype
        self.attn_adapter, self.hidden_adapter = nn.ModuleDict(), nn.ModuleDict()
        if teacher is None:
            return
        self.pairs = layer_pairs(config, teacher.config)
        for ours, theirs, name in self.pairs:
            heads = [m.blocks[i - 1].attn.num_heads
                     for m, i in ((self.model, ours), (teacher, theirs))]
            if config.attn_adapter or heads[0] != heads[1]:
                self.attn_adapter[name] = nn.Conv2d(*heads, 1, bias=False)
        for i in config.hidden_layers:
            widths = config.embed_dim, teacher.config.embed_dim
            if config.hidden_adapter or widths[0] != widths[1]:
                self.hidden_adapter[f"adapter{i}"] = nn.Linear(*widths, bias=False)

    def losses(self, images: Tensor, mask: ShufflePlan | np.ndarray | Tensor
               ) -> tuple[dict[str, Tensor], Tensor]:
        """"reconstruction", "attention" and "hidden" of Eq. (4) without their weights, and the
        predictions, as of `MaskedDecoder.forward`."""
        student, (teacher,) = self.model, self.frozen
        config, plan = student.config, student.plan(images, mask)
        patches = patchify(images, config.patch_size)
        seen, zero = student.see(images, patches, plan), images.new_zeros(())
        found = {"attention": zero, "hidden": zero}
        ours, theirs = ([pair[i] for pair in self.pairs] for i in (0, 1))
        latent, logits, states = student.encode(seen, plan, ours, config.hidden_layers)
        if teacher is not None:
            wanted, there = self.teach(seen, plan, theirs)
            for i, j, name in self.pairs:  # Eq. (7)
                found["attention"] = found["attention"] + imitation(
                    logits[i], wanted[j], self.attn_adapter, name)
            for i in config.hidden_layers:  # Eq. (8)
                found["hidden"] = found["hidden"] + imitation(
                    states[i], there[i], self.hidden_adapter, f"adapter{i}")
        found["reconstruction"], prediction = student.score(latent, patches, plan)
        return found, prediction

    @torch.no_grad()
    def teach(self, seen: Tensor, plan: ShufflePlan, attn: Sequence[int]) -> tuple[dict, dict]:
        """Logits and hidden states of the teacher for what the student has seen."""
        (teacher,), kind = self.frozen, seen.device.type
        hidden, side = self.model.config.hidden_layers, self.model.config.input_size
        usual = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        dtype = self.teacher_dtype or usual
        with torch.autocast(kind, dtype, dtype is not torch.float32):
            x = teacher.embed(seen, (side // teacher.config.patch_stride,) * 2, plan.keep)
            _, logits, states = trace(teacher, x, (), attn, hidden)
        return logits, states

    def forward(self, images: Tensor,
                mask: ShufflePlan | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Loss (), Eq. (4), and predictions, as of `MaskedDecoder.forward`."""
        config, (found, prediction) = self.model.config, self.losses(images, mask)
        loss = found["reconstruction"] + config.attn_weight * found["attention"]
        return loss + config.hidden_weight * found["hidden"], prediction


def imitation(ours: Tensor, theirs: Tensor, adapters: nn.ModuleDict, name: str) -> Tensor:
    """Mean squared difference, in fp32, after the adapter of that name, if there is one."""
    ours = adapters[name](ours) if name in adapters else ours
    return F.mse_loss(ours.float(), theirs.float())


# ── weights ───────────────────────────────────────────────────────────────────────────

# Computed here, so not needed from a file and in no checkpoint.
INDEX_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
AROUND = ("tch_model.", "attn_adapter.", "hidden_adapter.")  # what stands beside "model."
HIERA_HEADS = {112: 2, 144: 2, 256: 4}  # in stage 1, by width: Hiera-B+, L, H, not in `MODELS`
PRETRAINING = ("decoder_", "mask_token", "encoder_norm.", "multi_scale_fusion_heads.")
TEACHERS = {"vit": "mae_pretrain_vit_base.pth of facebookresearch/mae, MAE ViT-B",
            "hiera": "mae_hiera_base_224.pth of facebookresearch/hiera, Hiera-B"}


def bare_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network in its own names, without teacher and adapters, from released, our or timm's."""
    if any(k.startswith("model.") for k in state):
        state = {k[6:]: v for k, v in state.items() if k.startswith("model.")}
    timm = {"head.norm.": "norm.", "head.fc.": "head.projection."}  # its Hiera
    for theirs, ours in timm.items():
        state = {k.replace(theirs, ours) if k.startswith(theirs) else k: v
                 for k, v in state.items()}
    return {k: v for k, v in state.items() if not k.endswith(INDEX_BUFFERS)}


def identify(file: dict) -> tuple[str, ModelConfig]:
    """Name and architecture of the network in a file: by its args if it is ours, else by its names
    and shapes."""
    args, found = file["args"], told_by_shapes(bare_names(file["model"]))
    if args:
        hints = typing.get_type_hints(ModelConfig, include_extras=True)
        config = ModelConfig(**{k: fit(hint, args["config"][k]) for k, hint in hints.items()})
        for key in ("input_size", "abs_pos", "rpe", "qkv_bias", "two_heads"):
            if found.get(key, getattr(config, key)) != getattr(config, key):  # else it is stretched
                raise ValueError(f"its args say {key} {getattr(config, key)}, its weights do not")
        return known_model(str(args["model"])), model_config(config)
    alike = min(MODELS, key=lambda n: sum(getattr(MODELS[n], k) != v for k, v in found.items()))
    return alike, model_config(MODELS[alike], **found)


def told_by_shapes(state: dict[str, Tensor]) -> dict[str, object]:
    """Fields of `ModelConfig` that names and shapes show: heads only if there are tables of R."""
    widths = [len(state[k]) for i in range(999) if (k := f"blocks.{i}.norm2.weight") in state]
    if not widths or "patch_embed.proj.weight" not in state:
        raise ValueError("it holds no ViT or Hiera (patch_embed.proj.weight, blocks.0.norm2, ...)")
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    vit = "cls_token" in state
    found = {"kind": "vit" if vit else "hiera", "embed_dim": dim,
             "patch_size": patch if vit else 2 * (patch + 1),
             "depths": tuple(widths.count(w) for w in dict.fromkeys(widths)),
             "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / dim}
    if "decoder_embed.weight" in state:
        blocks = [k for k in state if re.fullmatch(r"decoder_blocks\.\d+\.norm1\.weight", k)]
        found |= {"decoder_dim": len(state["decoder_embed.weight"]), "decoder_depth": len(blocks)}
    if "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - vit)
        found["input_size"] = side * (patch if vit else (patch + 1) // 2)
    if not vit:
        heads = HIERA_HEADS.get(dim)
        return found | ({"num_heads": heads} if heads else {})
    tables = [state.get(f"{at}.relative_position_bias_table")
              for at in ("blocks.0.attn", "rel_pos_bias")]
    own, shared = (table is not None for table in tables)
    found |= {"rpe": ("none", "block", "shared", "both")[own + 2 * shared],
              "qkv_bias": "qv" if "blocks.0.attn.q_bias" in state else "qkv",
              "layer_scale": 0.1 if "blocks.0.gamma_1" in state else 0.0,
              "abs_pos": "pos_embed" in state or not (own or shared),
              "two_heads": "head_dist.weight" in state}
    if own or shared:
        rows, heads = tables[shared and not own].shape
        found |= {"input_size": (math.isqrt(rows - 3) + 1) // 2 * patch, "num_heads": heads}
    if "head.weight" in state:
        found["global_pool"] = "fc_norm.weight" in state
    if f"blocks.{len(widths)}.norm1.weight" in state:
        found["distill"] = "decoupled"
    return found


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
    """What `make` builds (autoencoder, with or without adapters, encoder, classifier) with the
    weights of a file that was read, if there is one, and a sentence on what was adapted;
    InputError names what does not fit. Only if `fresh_head` a head that does not fit is left out.

    New where a file has none: adapters, the block that is cut off, tables of R, layer scale and,
    after a pre-training, the norm before the head."""
    if file is None:
        return make(), ""
    with data.blaming(path):
        with torch.device("meta"):  # no memory is taken before all shapes are known to agree
            skeleton = make()
        model = skeleton.model if isinstance(skeleton, DistilledMAE) else skeleton
        own, notes = model.state_dict(), []
        state = there = bare_names(file["model"])
        if not isinstance(model, MaskedDecoder):
            state = {k: v for k, v in state.items() if not k.startswith(PRETRAINING)}
        elif "decoder_pred.weight" not in state:
            raise ValueError("it has no decoder (mask_token): give pretrain's checkpoint-*.pth")
        state, adapted = fit_network(state, model)
        heads = [k for k in own if k.startswith(("head.", "head_dist."))]
        fresh = fresh_head and any(k not in state or state[k].shape != own[k].shape for k in heads)
        if fresh or not heads:
            state = {k: v for k, v in state.items() if not k.startswith(("head.", "head_dist."))}
        # Tables of R and layer scale are new only in fine-tuning, norms only before a new head.
        ends = ("bias_table", "gamma_1", "gamma_2") if fresh_head else ()
        starts = ("norm.", "fc_norm.", "dist_norm.", "head.", "head_dist.") if fresh else ()
        starts = (f"blocks.{sum(model.config.depths)}.", *starts)
        new = [k for k in own if k not in state and (k.startswith(starts) or k.endswith(ends))]
        fixed = [k for k, _ in model.named_buffers() if k not in state and k in there]
        data.check_keys(state, {k: v for k, v in own.items() if k not in (*new, *fixed)})
        parts = dict.fromkeys(re.sub(r"^blocks\.\d+\.(attn\.)?", "", k).split(".")[0]
                              for k in new if k not in heads)
        notes += [*adapted, *([f"new: {', '.join(parts)}"] if parts else []),
                  *(["the head starts fresh"] if fresh else [])]
        if isinstance(skeleton, DistilledMAE):  # adapters for this teacher, if there are
            state = {f"model.{k}": v for k, v in state.items()}
            around = {k: v for k, v in file["model"].items() if k.startswith(AROUND[1:])}
            fits = {k: v.shape for k, v in skeleton.state_dict().items()}
            state |= {k: v for k, v in around.items() if fits.get(k) == v.shape}
    model = make()
    model.load_state_dict(state, strict=False)
    return model, f"loaded {path}: {'; '.join(notes) or 'all weights as they are'}"


def fit_network(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a network for another of its kind, and what was done: tables interpolated, biases
    parted or joined; left out what only pre-training has, the norm before another head, or a second
    head."""
    own, config, notes = model.state_dict(), model.config, []
    cut = f"blocks.{sum(config.depths)}."
    state = {k: v for k, v in state.items() if not k.startswith(cut) or k in own}
    if not isinstance(model, MaskedDecoder):
        state = {k: v for k, v in state.items()
                 if k in own or not k.startswith(("norm.", "fc_norm."))}
        if "head_dist.weight" in state.keys() - own.keys():
            state = {k: v for k, v in state.items() if not k.startswith(("dist_norm", "head_dist"))}
            notes.append("its second head left out")
    if config.kind == "vit" and not config.abs_pos:
        state.pop("pos_embed", None)
    for i in range(sum(config.depths)):
        q, v, both = (f"blocks.{i}.attn.{name}" for name in ("q_bias", "v_bias", "qkv.bias"))
        if q in own and both in state:
            state[q], _, state[v] = state.pop(both).chunk(3)
        elif both in own and {q, v} <= state.keys():
            state[both] = torch.cat([state[q], torch.zeros_like(state[q]), state[v]])
            del state[q], state[v]
    fixed = [k for k, v in model.named_buffers() if k in state and state[k].shape != v.shape
             and state[k].shape[-1:] == v.shape[-1:]]  # made by rule, for another size
    state = {k: v for k, v in state.items() if k not in fixed}
    other = [k for k in own if k in state and k.endswith(("pos_embed", "bias_table"))
             and state[k].shape != own[k].shape and state[k].ndim == own[k].ndim
             and state[k].shape[-1] == own[k].shape[-1]]
    for key in other:
        lead = int(config.kind == "vit" and key.endswith("pos_embed"))
        rows, tail = state[key].flatten(0, -2), 3 * key.endswith("bias_table")
        side = math.isqrt(own[key].shape[-2] - lead - tail)
        middle = stretch(rows[lead:len(rows) - tail], (side, side))
        rows = torch.cat([rows[:lead], middle, rows[len(rows) - tail:]])
        state[key] = rows.reshape(own[key].shape)
    if other:
        notes.append(f"{len(other)} position tables interpolated")
    return state, notes


def load_teacher(path: str, config: ModelConfig) -> tuple[nn.Module, str]:
    """The frozen teacher in a file, for a student of `config`, and a sentence on it."""
    if not path:
        raise InputError(f"--distill {config.distill} needs --teacher FILE: released "
                         f"{TEACHERS[config.kind]}; or one that this script has pre-trained "
                         "(--distill none goes on without)")
    file = data.read_checkpoint(path, SCRIPT)
    with data.blaming(path):
        if any(k.startswith(("head.", "fc_norm.")) for k in file["model"]):
            raise InputError("it is fine-tuned, and a --teacher pre-trained: give its backbone.pth")
        name, theirs = identify(file)
        theirs = replace(theirs, input_size=config.input_size)
        layer_pairs(config, theirs)  # before anything is loaded
    teacher, said = load_weights(partial(teacher_model, theirs), path, file)
    return teacher.requires_grad_(False).eval(), f"teacher {name}, {theirs.num_heads} heads: {said}"


def export_state(model: nn.Module, naming: str = "official") -> dict[str, Tensor]:
    """State dict of encoder and head in the names of released fine-tuning code, or timm's. Of a
    ViT both are the same, but for index buffers, which the released one's strict loader wants."""
    cut = f"blocks.{sum(model.config.depths)}."
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()
             if not k.startswith((*PRETRAINING, cut))}
    if naming == "timm":
        names = {"norm.": "head.norm.", "head.projection.": "head.fc."}
        hiera = model.config.kind == "hiera"
        return {next((names[n] + k.removeprefix(n) for n in names if hiera and k.startswith(n)),
                     k): v for k, v in state.items()}
    index = relative_index(model.config.units, model.config.units, torch.device("cpu"))
    tables = [k for k in state if k.endswith("relative_position_bias_table")]
    return state | {k.replace("bias_table", "index"): index.clone() for k in tables}


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
    """0 for what comes before the blocks, 1.. for blocks and one more for what comes after, the
    shared table of R included."""
    if name.startswith(("patch_embed.", "pos_embed", "cls_token", "mask_token")):
        return 0
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) + 1 if found else sum(depths) + 1


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
    config = model_config(replace(config, **PRETRAINED | {"global_pool": True}))
    draw_masks(config, cfg.mask_ratio, 1, (cfg.seed,))  # checks the ratio
    teacher, said, dtype = None, "", None
    if config.distill != "none":
        teacher, said = load_teacher(cfg.teacher, config)
        dtype = cfg.teacher_dtype and setup_process(cfg.device, cfg.teacher_dtype).dtype
        teacher = lower(teacher, dtype or process.dtype).to(process.device)
    elif cfg.teacher or cfg.teacher_dtype:
        raise InputError("--teacher needs --distill attention or decoupled")
    check_of_use(cfg, config)
    crop = data.TrainCrop(
        config.input_size, (cfg.crop_min, 1.0), "random", fast_decode=cfg.fast_decode)
    cfg, loader, lr, args = prepare(replace(cfg, model=name), process, config, "", crop, 256)
    process.say(said)

    torch.manual_seed(cfg.seed)
    make = partial(DistilledMAE, config, teacher, dtype)
    model, said = load_weights(make, cfg.weights, file)
    process.say(said and f"{said}; {config.input_size} px")
    model.model.grad_checkpoint = cfg.grad_checkpoint
    groups = parameter_groups(model.to(process.device), cfg.weight_decay, undecayed=())
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95), fused=process.device.type != "mps")

    plan_of = lru_cache(2)(lambda number: draw_masks(
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
            output, view = Path(cfg.output_dir), data.EvalCrop(config.input_size, "timm")
            pixels, _, _ = next(data.eval_batches(loader.source, view, batch_size=8, few=8))
            shown = draw_masks(config, cfg.mask_ratio, len(pixels), (cfg.seed,))
            picture, _ = draw_reconstructions(model.model, pixels, shown)
            data.save_picture(picture, output / f"reconstruction-{epoch}.png")
            backbone = {"model": export_state(model.model), "args": args}
            data.save_file(output / "backbone.pth", partial(torch.save, backbone))
        return {}

    parts = {"model": model, "optimizer": optimizer}
    record = train(cfg, process, parts, loader, args, schedule, loss_of, end_of_epoch)
    if not cfg.data_path:
        process.say("dry run: to pre-train on your images, give --data_path FOLDER")
    return record


def check_of_use(cfg: PretrainConfig, config: ModelConfig) -> None:
    """InputError if a flag of distillation was given that would change nothing."""
    for flags, used, needed in (
            ("decode_depth", config.distill == "decoupled", "--distill decoupled"),
            ("attn_weight attn_adapter", config.distill != "none",
             "--distill attention or decoupled"),
            ("hidden_weight hidden_adapter", config.hidden_layers, "--hidden_layers")):
        for flag in flags.split():
            if getattr(cfg, flag) is not None and not used:
                raise InputError(f"--{flag} needs {needed}")


def lower(teacher: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The teacher with linear layers stored as autocast would cast them, each step anew."""
    if dtype is not torch.float32:
        for module in teacher.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
    return teacher


# ── fine-tuning ───────────────────────────────────────────────────────────────────────

class ViTClassifier(LiteViT):
    """ViT with a linear head on the mean of patches, or the class token, and perhaps a second one,
    on the class token, which learns from another classifier."""

    def __init__(self, config: ModelConfig, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        dim, two = config.embed_dim, config.two_heads
        self.head = nn.Linear(dim, num_classes)
        self.dist_norm = nn.LayerNorm(dim, LAYER_NORM_EPS) if two else None
        self.head_dist = nn.Linear(dim, num_classes) if two else None
        draw_linear(self, partial(nn.init.trunc_normal_, std=0.02))
        if config.rpe != "none":  # as BEiT
            nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02)
            nn.init.zeros_(self.patch_embed.proj.bias)
            with torch.no_grad():
                self.head.weight.mul_(0.001)
                for i, block in enumerate(self.blocks, 1):
                    block.attn.proj.weight.div_(math.sqrt(2 * i))
                    block.mlp.fc2.weight.div_(math.sqrt(2 * i))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, classes); of two heads both, in evaluation their mean."""
        (x,) = self.look(images, [sum(self.config.depths)])[0].values()
        pooled, token = x[:, 1:].mean(1), x[:, 0]
        logits = self.head(self.fc_norm(pooled) if self.config.global_pool else self.norm(token))
        if self.head_dist is None:
            return logits
        second = self.head_dist(self.dist_norm(token))
        return (logits, second) if self.training else (logits + second) / 2


class HieraClassifier(LiteHiera):
    """Hiera with a linear head on the normed mean of tokens; logits in evaluation, too."""

    def __init__(self, config: ModelConfig, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.head = nn.Sequential()
        self.head.projection = nn.Linear(self.channels[-1], num_classes)
        self.head.out_features = num_classes
        draw_linear(self.head, partial(nn.init.trunc_normal_, std=2e-5), 2e-5)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        return self.head(super().forward(images))


def classifier(config: ModelConfig, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """The classifier of a config."""
    make = ViTClassifier if config.kind == "vit" else HieraClassifier
    return make(replace(config, distill="none"), num_classes, drop_path)


def class_teacher(path: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What the user's function at module:function returns: normalised images (B, 3, H, W) ->
    logits (B, classes); frozen if it is a module."""
    module, _, name = path.partition(":")
    with data.blaming(f"--class_teacher {path}"):
        sys.path.insert(0, os.getcwd())
        try:
            teacher = getattr(importlib.import_module(module), name)()
        finally:
            sys.path.pop(0)
        if not callable(teacher):
            raise ValueError(f"it returns a {type(teacher).__name__}, not a classifier")
        if isinstance(teacher, nn.Module):
            teacher = teacher.to(device).requires_grad_(False).eval()
        return teacher


def two_headed_loss(logits: Tensor, second: Tensor, targets: Tensor, answer: Tensor,
                    cfg: FinetuneConfig) -> Tensor:
    """Cross-entropy of the first head, and what the second has to learn of another classifier's
    `answer` (B, classes): its choice, or its probabilities at a temperature."""
    if answer.shape != second.shape:
        raise InputError(f"--class_teacher answers {tuple(answer.shape)} for "
                         f"{tuple(second.shape)} images and classes: they must be the same classes")
    if cfg.class_distill == "hard":
        learned = F.cross_entropy(second, answer.argmax(1))
    else:
        t = cfg.temperature
        ours, theirs = (F.log_softmax(x / t, dim=1) for x in (second, answer))
        learned = t**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True) / ours.numel()
    share = cfg.class_weight
    return (1 - share) * F.cross_entropy(logits, targets) + share * learned


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


def finetune(cfg: FinetuneConfig) -> dict:
    """Train a classifier on train/<class>/, test on val/<class>/; ten steps without --data_path."""
    process = setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT) if cfg.weights else None
    name, config = choose_config(cfg, file)
    teacher = class_teacher(cfg.class_teacher, process.device) if cfg.class_teacher else None
    if teacher and cfg.linear_probe:
        raise InputError("--class_teacher trains a second head, --linear_probe only the first")
    config = model_config(replace(without_teacher(config), two_heads=teacher is not None))
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
    make = partial(classifier, config, outputs, cfg.drop_path)
    model, said = load_weights(make, cfg.weights, file, fresh_head=True)
    process.say(said and f"{said}; {side} px")
    if cfg.linear_probe:
        model.requires_grad_(False).head.requires_grad_(True)
    model.to(process.device).grad_checkpoint = cfg.grad_checkpoint
    groups = parameter_groups(model, cfg.weight_decay, config.depths, cfg.layer_decay)
    if cfg.opt == "sgd":
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    else:
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
        if teacher is None:
            return F.cross_entropy(net(images).float(), targets)
        with torch.no_grad():
            answer = teacher(images).float()
        return two_headed_loss(*(x.float() for x in net(images)), targets, answer, cfg)

    def schedule(step: int, scale: float) -> float:
        epoch, warmup = step / len(loader), cfg.warmup_epochs
        return scale * lr_at(epoch, lr, 0.0, cfg.min_lr, warmup, warmup, cfg.epochs)

    def end_of_epoch(epoch: int, records: list[dict]) -> dict:
        if not cfg.data_path or ((epoch + 1) % cfg.test_freq and epoch + 1 < cfg.epochs):
            return {}
        view = data.EvalCrop(side, "timm")
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


def without_teacher(config: ModelConfig) -> ModelConfig:
    """What remains of a config after pre-training."""
    return replace(config, distill="none", attn_layers=(), teacher_attn_layers=(), hidden_layers=())


# ── other commands ────────────────────────────────────────────────────────────────────

def open_model(cfg: UseConfig | AnalyseConfig, whole: bool = False, head: bool = True,
               process: Process | None = None) -> tuple[Process, nn.Module, dict, data.EvalCrop]:
    """Process, the network of --weights (`whole` = with its decoder, else an encoder or, if the
    file has a head that is wanted, a classifier), what the file says of itself, and the crop."""
    if not cfg.weights:
        raise InputError("give --weights FILE")
    process = process or setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT)
    name, config = choose_config(cfg if whole else replace(cfg, input_size=None), file)
    state, size = bare_names(file["model"]), cfg.input_size or config.input_size
    check_size(size, config.mask_unit)
    trained = [k for k in ("head.weight", "head.projection.weight") if k in state]
    if whole:
        make = partial(masked_model, config)
    elif trained and head:
        with data.blaming(cfg.weights):
            make = partial(classifier, config, len(state[trained[0]]))
    else:
        config = without_teacher(config)
        config = config if trained else replace(config, global_pool=False, two_heads=False)
        make = partial(LiteViT if config.kind == "vit" else LiteHiera, config)
    model, said = load_weights(make, cfg.weights, file)
    other = ", positions stretched" if size != config.input_size else ""
    process.say(f"{said}; {name}, {data.sides(size)} px, {config.num_heads} heads{other}")
    return process, model.to(process.device).eval(), file["args"], data.EvalCrop(size, "timm")


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
def draw_reconstructions(model: MaskedDecoder, pixels: Tensor,
                         plan: ShufflePlan) -> tuple[Image.Image, float]:
    """Labelled grid for uint8 (B, 3, S, S): image, what the encoder saw, reconstruction; loss."""
    model.eval()
    config, device, label = model.config, model.mask_token.device, "reconstruction"
    plan, images = to_device(plan, device), data.normalize(pixels.to(device))
    patches = patchify(images, config.patch_size)
    loss, prediction = model(images, plan)
    if config.kind == "hiera":  # channel by channel
        prediction = rearrange(prediction, "b n (c k) -> b n (k c)", c=3)
    if config.norm_pix_loss:
        _, mean, deviation = normalize_patches(model.of_hidden(patches, plan))
        prediction, label = prediction * deviation + mean, f"{label}, true mean and contrast"
    places = torch.arange(patches.shape[1], device=device).view(1, -1, 1).expand(len(images), -1, 1)
    hidden = model.of_hidden(places, plan).expand_as(prediction)
    seen, filled = patches.scatter(1, hidden, 0.0), patches.scatter(1, hidden, prediction)
    layout = "k b (h w) (p q c) -> k b c (h p) (w q)"  # 0 is the mean colour
    columns = torch.stack([patches, seen, filled])
    side = config.input_size // config.patch_size
    columns = rearrange(columns, layout, h=side, p=config.patch_size, q=config.patch_size)
    return data.draw_columns(columns, ("image", "visible", label)), loss.item()


def reconstruct(cfg: UseConfig) -> dict:
    """PNG grid of images, their visible parts and reconstructions by a pre-trained file."""
    output = Path(cfg.output or "reconstruction.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {output}: pictures are written as .png")
    process, model, args, crop = open_model(cfg, whole=True)
    usual = 0.75 if model.config.kind == "vit" else HIERA_RATIO
    ratio = args.get("settings", {}).get("mask_ratio", usual)
    ratio = ratio if cfg.mask_ratio is None else cfg.mask_ratio
    draw_masks(model.config, ratio, 1, (cfg.seed,))  # checks the ratio
    source = data.open_source(cfg.data_path)
    pixels, _, _ = next(data.eval_batches(source, crop, batch_size=cfg.count, few=cfg.count))
    plan = draw_masks(model.config, ratio, len(pixels), (cfg.seed,))
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
    """Encoder, and head if there is one, in the official or timm's parameter names."""
    if cfg.input_size:
        raise InputError("export writes a network as its file has it: leave out --input_size")
    process, model, *_ = open_model(cfg)
    config, output = model.config, Path(cfg.output or f"{Path(cfg.weights).stem}-{cfg.naming}.pth")
    plain = (config.rpe, config.qkv_bias, config.abs_pos, config.layer_scale, config.two_heads)
    if cfg.naming == "timm" and plain != ("none", "qkv", True, 0.0, False):
        raise InputError("--naming timm: timm's ViT has no relative position bias, biases of its "
                         "own for queries and values, or second head on the class token beside a "
                         "mean of patches, and names layer scale otherwise; official works")
    state, timm = export_state(model, cfg.naming), cfg.naming == "timm"
    content = {"model": state} | ({"model_state": state} if config.kind == "hiera" else {})
    result = save_state(process, output, state, state if timm else content)  # Hiera's own key, too
    process.say(timm_call(model) if timm else "")
    return result


def timm_call(model: nn.Module) -> str:
    """The sentence with the call that makes timm's network for an export."""
    config, outputs = model.config, getattr(getattr(model, "head", None), "out_features", 0)
    if config.kind == "hiera":
        how = "strictly" if outputs else "with strict=False: without a head it has no head.norm"
        return (f"timm.models.hiera.Hiera(img_size=({config.input_size}, {config.input_size}), "
                f"embed_dim={config.embed_dim}, num_heads={config.num_heads}, "
                f"stages={config.depths}, num_classes={outputs}) loads it {how}")
    pool = "avg" if config.global_pool else "token"
    return (f"timm.create_model('vit_tiny_patch16_224', img_size={config.input_size}, "
            f"patch_size={config.patch_size}, embed_dim={config.embed_dim}, "
            f"depth={config.depths[0]}, num_heads={config.num_heads}, "
            f"mlp_ratio={config.mlp_ratio}, num_classes={outputs}, global_pool='{pool}') loads it "
            f"strictly; with other than num_heads={config.num_heads}, which shapes do not show, it "
            "loads, too, but answers wrongly")


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


def hsic(k: Tensor, other: Tensor) -> Tensor:
    """(i, n, n), (j, n, n) -> (i, j): the unbiased estimate of Song et al., arXiv 1212.2436, for
    matrices of similarities between n samples, with zeros on their diagonals; n is at least 4."""
    n, ours, theirs = k.shape[-1], k.sum(2), other.sum(2)
    both = ours.sum(1)[:, None] * theirs.sum(1) / ((n - 1) * (n - 2))
    same = torch.einsum("iab,jab->ij", k, other)
    return (same + both - 2 / (n - 2) * ours @ theirs.T) / (n * (n - 3))


def hsic_triple(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Hidden states (n, N, C) of the layers of two models -> (i, j, 3): `hsic` of one with itself,
    of both, of the other with itself. Over batches, these are averaged."""
    flat = [[x.flatten(1).double() for x in states] for states in (ours, theirs)]
    off = 1 - torch.eye(len(ours[0]), dtype=torch.float64)
    k, other = (torch.stack([x @ x.T * off for x in states]) for states in flat)
    own, across, there = hsic(k, k).diag(), hsic(k, other), hsic(other, other).diag()
    return torch.stack([own[:, None].expand_as(across), across, there.expand_as(across)], dim=-1)


def minibatch_cka(mean: Tensor) -> Tensor:
    """(i, j, 3) averages over batches -> (i, j) similarities of layers, 1 = the same but for a
    rotation and a scale; Nguyen et al., arXiv 2010.15327."""
    return mean[..., 1] / (mean[..., 0].sqrt() * mean[..., 2].sqrt())


def attention_statistics(logits: Tensor, distances: Tensor) -> Tensor:
    """(B, h, n, n), (n, n) -> (2, h): entropy of attention in nats, and its mean distance."""
    p = logits.float().softmax(-1)
    entropy = -(p * (p + 1e-6).log()).sum(-1).mean((0, 2))
    return torch.stack([entropy, (p * distances).sum(-1).mean((0, 2))])


def token_distances(model: nn.Module, height: int, width: int) -> list[Tensor]:
    """For each block the pixels between each query and each key, class tokens left out."""
    stride = model.config.patch_stride
    y, x = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride),
                          indexing="ij")
    places = torch.stack([y, x], dim=-1).flatten(0, 1).float() * stride  # (N, 2)
    if model.config.kind == "vit":
        return [torch.cdist(places, places)] * len(model.blocks)
    places, found = to_units(places[None], (height // stride, width // stride))[0], []
    for block in model.blocks:
        keys = places
        if block.attn.pooled:
            places = places.unflatten(0, (-1, 4)).mean(1)
        n = block.attn.cells or len(keys)
        found.append(torch.cdist(places[:n * len(places) // len(keys)], keys[:n]))
    return found


@torch.no_grad()
def examine(model: nn.Module, images: Tensor, process: Process,
            part: int = 16) -> tuple[list[Tensor], Tensor]:
    """Normalised images (B, 3, H, W) -> hidden states (B, N, C) of layers 0 to the last, without
    class token, and `attention_statistics` (2, blocks, h), not a number where a block of Hiera has
    fewer heads than the last."""
    depth, lead = len(model.blocks), int(model.config.kind == "vit")
    distances, states, sums = token_distances(model, *images.shape[-2:]), [], 0.0
    for some in images.split(part):  # attention of many images at once takes gigabytes
        with process.autocast():
            _, logits, found = model.look(
                some.to(process.device), (), range(1, depth + 1), range(depth + 1))
        states.append([x[:, lead:].float().cpu() for x in found.values()])
        heads = [attention_statistics(x[..., lead:, lead:], d.to(x.device)).cpu()
                 for x, d in zip(logits.values(), distances, strict=True)]
        most = heads[-1].shape[1]
        padded = [F.pad(x, (0, most - x.shape[1]), value=math.nan) for x in heads]
        sums += len(some) / len(images) * torch.stack(padded, dim=1)
    return [torch.cat(parts) for parts in zip(*states, strict=True)], sums


def analyse(cfg: AnalyseConfig) -> dict:
    """Similarity (CKA) of all layers of a network, or of two, and entropy and distance of attention
    by layer and head, as .npz and as a picture."""
    output, source = Path(cfg.output or "analysis.npz"), data.open_source(cfg.data_path)
    if output.suffix != ".npz":
        raise InputError(f"--output {output}: numbers are written as .npz, the picture beside them")
    batch = min(cfg.batch_size, cfg.images, len(source))
    if batch < 4:
        raise InputError(f"{batch} images: CKA compares pairs of pairs, of four images at least")
    models, loaders, triples, heads = [], [], [], []
    names = [cfg.weights, cfg.other] if cfg.other else [cfg.weights]
    for weights in names:
        process, model, _, crop = open_model(replace(cfg, weights=weights), head=False)
        models.append(model)  # its loader shuffles, as a source may be in the order of its classes
        loaders.append(data.TrainLoader(
            source, crop, batch_size=batch, seed=cfg.seed, num_workers=cfg.num_workers))
    total = min(cfg.images, len(source)) // batch
    batches = [loader.batches(0, total) for loader in loaders]
    for same in tqdm(zip(*batches, strict=True), total=total, disable=not sys.stderr.isatty()):
        found = [examine(model, data.normalize(images), process)
                 for model, (images, _) in zip(models, same, strict=True)]
        triples.append(hsic_triple(found[0][0], found[-1][0]))
        heads.append([statistics for _, statistics in found])
    arrays = {"cka": minibatch_cka(torch.stack(triples).mean(0)).numpy()}
    for prefix, parts in zip(("", "other_"), zip(*heads, strict=True), strict=False):
        entropy, distance = torch.stack(parts).mean(0).numpy()
        arrays |= {f"{prefix}entropy": entropy, f"{prefix}distance": distance}
    if process.rank == 0:
        data.save_file(output, lambda file: np.savez(file, **arrays))
        data.save_picture(draw_analysis(arrays, names), output.with_suffix(".png"))
    shapes = ", ".join(f"{k} {v.shape}" for k, v in arrays.items())
    process.say(f"wrote {shapes} of {total * batch} images to {output}, picture "
                f"{output.with_suffix('.png')}")
    return {"output": str(output), "images": total * batch} | {
        k: list(v.shape) for k, v in arrays.items()}


def draw_analysis(arrays: dict[str, np.ndarray], names: Sequence[str]) -> Image.Image:
    """The arrays side by side, as tables of numbers on colours."""
    cell, top, widths = 34, 64, [max(400, 60 + 34 * v.shape[1]) for v in arrays.values()]
    height = top + cell * max(map(len, arrays.values())) + 10
    picture = Image.new("RGB", (sum(widths), height), "white")
    names = [name if len(name) <= 32 else f"...{name[-29:]}" for name in names]  # two fit in a line
    draw, anchors = ImageDraw.Draw(picture), [(48, 18, 84), (33, 144, 140), (253, 231, 37)]
    for x0, (name, values) in zip(np.cumsum([10, *widths[:-1]]), arrays.items(), strict=True):
        what = "entropy of attention, nats" if "entropy" in name else "distance of attention, px"
        of, first = names[-1] if name.startswith("other_") else names[0], int(name != "cka")
        title = f"{what}, mean over images\n{of}\ndown: blocks, across: heads"
        if name == "cka":
            title = (f"similarity of layers (CKA), 1 = same but for rotation and scale\ndown: "
                     f"{names[0]}, across: {names[-1]}\n0 = embedding, last = behind the last norm")
        draw.multiline_text((x0, 2), title, fill="black", spacing=1)
        for (i, j), value in np.ndenumerate(values):
            x, y, share = x0 + 20 + j * cell, top + i * cell, value / np.nanmax(values)
            if i == 0:
                draw.text((x + 12, top - 13), str(j + first), fill="black")
            if j == 0:
                draw.text((x0, y + 11), str(i + first), fill="black")
            if np.isfinite(value):
                colour = [int(np.interp(share, (0, 0.5, 1), c)) for c in zip(*anchors, strict=True)]
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=tuple(colour))
                text = f"{value:.1f}" if value >= 10 else f"{value:.2f}"
                draw.text((x + 4, y + 11), text, fill="black" if share > 0.45 else "white")
    return picture


def demo(cfg: UseConfig) -> dict:
    """Pre-train a small teacher on built-in images, then a student alone and one that it teaches,
    for as many steps; fine-tune both and a from-scratch twin."""
    began, output = time.monotonic(), Path(cfg.output or f"output/{SCRIPT}/demo")
    both = {"seed": cfg.seed, "device": cfg.device, "num_workers": 1, "resume": "none",
            "crop_min": 0.6, "log_every": 1000}
    process = setup_process(cfg.device, "auto")
    torch.manual_seed(cfg.seed)
    # The twin starts where pre-training starts, so that only pre-training tells them apart.
    start = {"model": export_state(masked_model(MODELS["demo"]))}
    if process.rank == 0:
        data.save_file(output / "start.pth", partial(torch.save, start))
    training = {**both, "data_path": "drawn:8192", "batch_size": 64, "warmup_epochs": 1, "lr": 2e-3}
    for name, how in (
            ("teacher", {"model": "demo_teacher", "epochs": 5}),
            ("pretrained", {"model": "demo", "epochs": 5}),
            ("distilled", {"model": "demo", "epochs": 5, "distill": "decoupled",
                           "teacher": str(output / "teacher" / "backbone.pth")})):
        pretrain(PretrainConfig(**training, **how, output_dir=str(output / name)))
    result = {}
    for name, weights in (("distilled", "distilled/backbone.pth"),
                          ("pretrained", "pretrained/backbone.pth"), ("scratch", "start.pth")):
        tested = finetune(FinetuneConfig(
            **both, model="demo", data_path="drawn:1000", weights=str(output / weights),
            output_dir=str(output / f"{name}_tuned"), batch_size=25, epochs=10, warmup_epochs=1,
            lr=1e-3, clip_grad=0.5, layer_decay=0.8, mixup=0, aa="", ema=0.97, test_freq=10))
        result[f"{name}_acc1"] = round(tested["test_acc1"], 1)
    result |= {"chance": 10.0, "picture": str(output / "distilled" / "reconstruction-4.png"),
               "seconds": round(time.monotonic() - began, 1)}
    process.say(json.dumps(result))
    return result


# ── command line ──────────────────────────────────────────────────────────────────────

USES = (evaluate, reconstruct, export, features, demo)
COMMANDS = {"pretrain": (PretrainConfig, pretrain), "finetune": (FinetuneConfig, finetune),
            **{function.__name__: (UseConfig, function) for function in USES},
            "analyse": (AnalyseConfig, analyse)}


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
