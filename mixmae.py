"""MixMAE: masked image modelling that fills the holes of an image with another image.

Liu, Huang, Zheng, Liu, Li: "MixMAE: Mixed and Masked Autoencoder for Efficient Pretraining of
Hierarchical Vision Transformers", CVPR 2023, arXiv 2205.13137; at first called MixMIM.
The method is this file, from "masking" to "model".

The idea. MAE drops masked tokens before its plain ViT; a hierarchical ViT needs them for its
windows and its 2x2 merging, and mask tokens in their place cost compute and never occur in
fine-tuning. Here the holes are filled with what another image has there: the encoder sees a dense,
mixed image of real pixels, in which a token attends only to tokens of its own image. Then the two
images are taken apart, mask tokens fill the holes, and a light ViT decoder reconstructs both. What
is masked is a unit of 32 px, as large as one token of the last stage (a patch, which is embedded,
has 4 px): a 2x2 block is of one image as a whole, and merging just works. Unlike in MAE all images
of a batch share one mask, and image i is mixed with image B-1-i: each unit of either is visible in
one of the two mixtures and reconstructed from the other, exactly once. What is predicted of an
image depends on that image alone; its partner only fills the holes.

    z_i = I_i where m = 0, I_(B-1-i) where m = 1       I an image, m the mask, 1 = hidden (0)
    x = norm(embed(patches of z)) + position                                              (1)
    x = x + proj(softmax(q k^T / sqrt(d) + R + M) v), q, k, v = linear(norm(x)) by window (2)
    x = x + fc2(gelu(fc1(norm(x))))                                                       (3)
    x = linear(norm([x(0,0), x(1,0), x(0,1), x(1,1)])) (row, column) in a 2x2 block       (4)
    t = (u - mean(u)) / sqrt(var(u) + 1e-6)            u the pixels of one unit           (5)
    loss = mean over all units of (p - t)^2            p of (8)                           (6)
    a_i = y_i where m = 0, else mask token             y = linear(norm(x)) of mixture i,
    b_i = y_i where m = 1, else mask token             after the last stage               (7)
    p_i = decoder(a_i) where m = 1, decoder(b_(B-1-i)) where m = 0                        (8)

R is the learned relative position bias; M is 0 between tokens of one image, else -inf. Windows are
large and never shifted, so all blocks of a stage attend alike, and the tokens of a stage are kept
in the order that attention wants, window after window; only merging moves them. A token's place in
that order is its slot. A stage of one window needs no M: the tokens of image i come first, those
of its partner after them, and each part attends by itself. All else but attention and merging
acts on single tokens, so that the two images never meet. Windows that attend alike are a `Span`:
    start, windows K       its first slot, and the number of its windows, of S slots each
    index (S, S)           for each pair of a window's slots, query and key, its row of R's table
    apart (K, 1, S, S)     where M is -inf; None if it is 0 everywhere

Data flow of Swin-B at 224 px, windows 14, 14, 14, 7: U = 49 units, 24 of them hidden. Stages count
from 0, as in the parameter names.
    images (B, 3, 224, 224) -> mixed images -> patches of 4 px             (B, 3136, 128)
    stage 0, merge (B, 784, 256) -> stage 1, merge (B, 196, 512) -> stage 2, merge (B, 49, 1024)
    stage 3, norm, Linear (B, 49, 512) -> unmixed, with mask tokens        (2B, 49, 512)
    eight ViT blocks (2B, 49, 512) -> of both what was hidden, norm, Linear (B, 49, 3072)

Paper, released code, and here:
  - The network is called Swin, but never shifts a window, and adds a fixed position table.
  - The paper adds mix embeddings, to tell the two images apart, in every stage. Released code has
    none. Here they are an option, off by default: a vector for each source and stage (ours).
  - Released code works out the whole prediction and uses half; here half is worked out. It adds
    -1e30 where M is -inf here, and keeps M in stages of one window: the same but for rounding.
  - In a batch of odd size the middle image is mixed with itself, and so is one alone: as released,
    and the log says so. No harm is done: by M its two parts are as strange to each other as two
    images are.
  - Released fine-tuning draws the head anew, next to zero, even where the file has one; here a
    head that fits is kept. Its learning rate is that of the last block, as released.
  - Weight decay of the tables of R and of the mask token is as released, too; a list there that
    would exempt the latter is never read.

Letters: B batch, N tokens, U units, C channels, D decoder width, K windows, S slots of a window,
h heads, d head width, P values of a unit; H, W pixels, (h, w) tokens of a map.
Comments say where a value is from: (paper), (released ...), (MAE), (ours) = chosen here.

Usage:
    python mixmae.py demo                                  a minute and a half, two CPU cores
    torchrun --nproc_per_node 8 mixmae.py --accum_iter 2 --data_path /imagenet     batch 2048
    torchrun --nproc_per_node 8 mixmae.py finetune --data_path /imagenet \
        --weights output/mixmae/pretrain/backbone.pth
    python mixmae.py {evaluate,reconstruct,export,features} --help
Feature maps for dense heads: `maps = load_backbone(FILE).maps(images)`, of any height and width.
To copy: this file and `common/`. The method alone: `ModelConfig`, and from "masking" to "model".
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import inspect
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
from einops import rearrange
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
UNDECAYED = (".bias",)  # ends of names without weight decay, beside vectors
LAYER_NORM_EPS = 1e-5  # of every LayerNorm (released)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture only; stored in every checkpoint."""
    input_size: Annotated[int, (1, 4096)] = 224
    patch_size: Annotated[int, (1, 64)] = 4
    embed_dim: Annotated[int, (1, 4096)] = 128
    depths: tuple[Annotated[int, (1, 99)], ...] = (2, 2, 18, 2)
    num_heads: tuple[Count, ...] = (4, 8, 16, 32)
    window_size: tuple[Annotated[int, (1, 1024)], ...] = (14, 14, 14, 7)
    mlp_ratio: Annotated[float, (0.01, 100.0)] = 4.0
    decoder_dim: Annotated[int, (4, 4096)] = 512
    decoder_depth: Annotated[int, (1, 99)] = 8
    decoder_num_heads: Count = 16
    norm_pix_loss: bool = True
    mix_embed: bool = False
    qkv_bias: bool = True  # of the encoder; the decoder always has it

    @property
    def mask_unit(self) -> int:
        """Side of a mask unit in pixels: one token of the last stage."""
        return self.patch_size * self.unit_tokens(0)

    @property
    def units(self) -> int:
        """Mask units per side of the image."""
        return self.input_size // self.mask_unit

    def unit_tokens(self, stage: int) -> int:
        """Tokens per side of a mask unit: 8, 4, 2, 1 in stages 0 to 3 of Swin."""
        return 2 ** (len(self.depths) - 1 - stage)

    def side(self, stage: int) -> int:
        """Tokens per side of a stage's map."""
        return self.units * self.unit_tokens(stage)

    def window(self, stage: int) -> int:
        """Window that a stage's bias tables are made for: no larger than its map."""
        return min(self.window_size[stage], self.side(stage))


MODELS = {  # pixels, patch, width, depths, heads, windows, MLP ratio; decoder: width, depth, heads
    "swin_b": ModelConfig(),
    "swin_l": ModelConfig(embed_dim=192, num_heads=(6, 12, 24, 48)),
    "swin_h": ModelConfig(embed_dim=352, num_heads=(11, 22, 44, 88)),
    "swin_b_384": ModelConfig(384, window_size=(16, 16, 24, 12)),
    "swin_l_384": ModelConfig(384, 4, 192, (2, 2, 18, 2), (6, 12, 24, 48), (16, 16, 24, 12)),
    "swin_n": ModelConfig(
        128, 4, 48, (2, 2, 6, 2), (3, 6, 12, 24), (8, 8, 8, 4), 4.0, 192, 2, 6),  # ours
    "demo": ModelConfig(64, 8, 64, (2, 2), (2, 4), (4, 4), 4.0, 96, 1, 3),  # ours
    "test": ModelConfig(64, 4, 16, (2, 2, 2), (1, 2, 4), (4, 4, 4), 4.0, 32, 1, 2),  # ours
}
OTHER_NAMES = {  # the constructors of released code
    "mixmim_base": "swin_b", "mixmim_large": "swin_l", "mixmim_huge": "swin_h",
    "mixmim_base_384": "swin_b_384", "mixmim_large_384": "swin_l_384",
}
RECIPES = {  # by command, recipe and, where it matters, model: what differs from the classes below
    ("pretrain", "small"): {
        "model": "swin_n", "batch_size": 64, "blr": 1.6e-3, "epochs": 100, "warmup_epochs": 5.0},
    ("finetune", "small"): {
        "model": "swin_n", "batch_size": 32, "blr": 8e-3, "epochs": 60, "warmup_epochs": 3.0,
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
    """What MixMAE lets one change of the network; None = as the file or the model has it."""
    window_size: tuple[Count, ...] | None = None  # tokens a side, one a stage: 14,14,14,7 (paper)


@dataclass(frozen=True)
class PretrainConfig(RunConfig, MethodConfig):
    """Recipe of the released slurm script, 16 processes, for Swin-B; nothing else is published."""
    output_dir: str = f"output/{SCRIPT}/pretrain"  # checkpoints, log.txt, pictures (ours)
    batch_size: Count = 128  # images per process (released script)
    epochs: Count = 600  # passes over the data (released script)
    warmup_epochs: Amount = 40.0  # linear warm-up (released default)
    blr: Amount = 1.5e-4  # learning rate per 256 images (released script)
    min_lr: Amount = 0.0  # end of the cosine (released default)
    weight_decay: Amount = 0.05  # AdamW (released script)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (released default)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.2  # smallest crop, share of the image (released)
    mask_ratio: Share = 0.5  # share of hidden units, which its partner's mixture shows (paper)
    mask_ratio_range: Share = 0.0  # each step adds up to this to the ratio (released default)
    norm_pix_loss: bool | None = None  # normalise each target unit; none = yes (released script)
    mix_embed: bool | None = None  # learned vectors tell the two images apart; none = no (paper)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig, MethodConfig):
    """Recipe of the released fine-tuning script, 8 processes, for Swin-B at 224 px."""
    output_dir: str = f"output/{SCRIPT}/finetune"  # checkpoints and log.txt (ours)
    linear_probe: bool = False  # train the head only: plain crops, no mixing (ours)
    nb_classes: Count | None = None  # outputs; none = the number of class folders (ours)
    batch_size: Count = 128  # images per process (released script)
    epochs: Count = 100  # passes over the data (released script)
    warmup_epochs: Amount = 5.0  # linear warm-up (released default)
    blr: Amount = 5e-4  # learning rate per 256 images (released script)
    min_lr: Amount = 1e-6  # end of the cosine, before layer decay (released default)
    weight_decay: Amount = 0.05  # AdamW (released script)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (released default)
    layer_decay: Share = 0.7  # learning rate factor from layer to layer (released script)
    drop_path: Annotated[float, (0.0, 0.99999)] = 0.1  # stochastic depth, last block (released)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.08  # smallest crop, share of the image (released)
    mixup: Amount = 0.8  # Beta parameter, 0 = off (released script)
    cutmix: Amount = 1.0  # Beta parameter, 0 = off (released script)
    smoothing: Share = 0.1  # label smoothing (released default)
    reprob: Share = 0.25  # probability of random erasing (released default)
    aa: str = "rand-m9-mstd0.5-inc1"  # RandAugment policy, none = off (released default)
    ema: Annotated[float, (0.0, 0.99999)] = 0.0  # decay of averaged weights, 0 = off (ours)
    test_freq: Count = 1  # epochs between tests; the last is always tested (ours)


@dataclass(frozen=True)
class UseConfig(FileConfig, MethodConfig):
    """What the commands that do not train need."""
    naming: Literal["official", "swin", "timm"] = "official"  # export: whose parameter names (ours)
    mask_ratio: Share | None = None  # reconstruct: none = the file's, else 0.5 (ours)
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
    if isinstance(config.input_size, tuple):
        raise InputError(f"--input_size {data.sides(config.input_size)}: here images are square")
    check_size(config.input_size, config.mask_unit)
    widths = [config.embed_dim * 2**i for i in range(len(config.depths))] + [config.decoder_dim]
    heads = [*config.num_heads, config.decoder_num_heads]
    if len(heads) != len(widths) or any(w % h for w, h in zip(widths, heads, strict=True)):
        raise InputError(f"heads {heads} do not divide the widths {widths} of stages and decoder")
    if len(config.window_size) != len(config.depths):
        raise InputError(f"--window_size {config.window_size}: give {len(config.depths)}, one a "
                         f"stage, as in {','.join(map(str, base.window_size))}")
    check_windows(config)
    return config


def check_windows(config: ModelConfig) -> None:
    """InputError, which names the nearest that do, unless every window divides its map."""
    def fits(size: int) -> bool:
        there = replace(config, input_size=size)
        return all(there.side(i) % there.window(i) == 0 for i in range(len(there.depths)))

    size, unit, near = config.input_size, config.mask_unit, []
    if fits(size):
        return
    for stage, asked in enumerate(config.window_size):
        side = config.side(stage)
        divisors = [w for w in range(1, side + 1) if side % w == 0]
        near.append(str(min(divisors, key=lambda w: abs(w - asked))))
    made = [name for name, m in MODELS.items() if (m.input_size, m.embed_dim, m.depths)
            == (size, config.embed_dim, config.depths)]
    sizes = [str(s) for s in range(2 * unit, max(2 * size, 16 * unit), unit) if fits(s)]
    sizes = " or ".join(sorted(sizes, key=lambda s: abs(int(s) - size))[:2])
    near = ",".join(near) + (f", or --input_size {sizes}" if sizes else "")
    near += f"; made for {size} px: --model {made[0]}" if made else ""
    raise InputError(f"windows {config.window_size} do not divide the maps of {size} px; the "
                     f"nearest that do: --window_size {near}")


def check_size(size: Pixels, unit: int) -> None:
    """InputError, which names the nearest that do, unless `unit` divides every side of `size`."""
    for side in size if isinstance(size, tuple) else (size,):
        low = max(2, side // unit) * unit
        if side % unit or side < low:
            raise InputError(f"--input_size {data.sides(size)} does not fit: a side must be a "
                             f"multiple of {unit}, the nearest are {low} and {low + unit}")


# ── masking ───────────────────────────────────────────────────────────────────────────

def hidden_units(noise: np.ndarray, mask_ratio: float) -> np.ndarray:
    """(U,) bool, True = hidden, from (U,) noise: the int(U ratio) smallest are hidden, also none
    or all of them."""
    mask = np.zeros(noise.shape, bool)
    mask[np.argsort(noise, kind="stable")[:int(noise.size * mask_ratio)]] = True
    return mask


def mix(images: Tensor, hidden: Tensor) -> Tensor:
    """Eq. (0): (B, 3, H, W), bool (H, W) -> (B, 3, H, W), hidden pixels are the partner's."""
    return torch.where(hidden, images.flip(0), images)


# ── planning ──────────────────────────────────────────────────────────────────────────
# All that a mask decides is worked out on the host before the step, so that the model only
# indexes: no host synchronisation, no shape that depends on device data.

@dataclass(frozen=True)
class Span:
    """Windows, one after another in the slots of a stage, that attend alike."""
    start: int  # first slot
    windows: int  # K
    index: Tensor  # (S, S) row of the bias table for each pair of a window's slots, query and key
    apart: Tensor | None  # (K, 1, S, S) bool, True = of unlike source; None = all see all


@dataclass(frozen=True)
class MixPlan:
    """What the model has to know about one mask: NumPy arrays, or tensors after `to_device`."""
    hidden: Tensor  # (U, 1) bool, True = hidden
    pixels: Tensor  # (H, W) bool, the same for pixels
    patches: Tensor  # (N,) the patch that stands in each slot of stage 0
    spans: list[list[Span]]  # for each stage: its slots, from first to last
    merges: list[Tensor]  # for each stage but the last: slots, every four make one of the next
    places: list[Tensor]  # for each stage, (h * w,): the slot of each token in raster order
    sources: list[Tensor]  # for each stage, by slot: 1 = of image B-1-i; only with mix embeddings


def plan_mix(config: ModelConfig, mask: np.ndarray) -> MixPlan:
    """Plan for `mask`, bool (rows, columns) of units, or flat (U,) for a square of the model's
    size, else ValueError; True = hidden."""
    mask = np.asarray(mask, bool)
    if mask.ndim < 2 and mask.size != config.units**2:
        raise ValueError(f"the mask has {mask.size} units, the model {config.units**2}")
    mask = mask if mask.ndim == 2 else mask.reshape(config.units, config.units)
    spans, orders, places, sources = [], [], [], []
    for stage in range(len(config.depths)):
        k = config.unit_tokens(stage)
        source = mask.repeat(k, 0).repeat(k, 1)  # (h, w) tokens
        order, stage_spans = plan_stage(source.astype(np.int64), config.window(stage))
        slots = np.flatnonzero(order >= 0)  # the others are padding
        place = np.empty(source.size, np.int64)
        place[order[slots]] = slots
        order = np.maximum(order, 0)  # padding reads token 0
        spans.append(stage_spans)
        orders.append(order)
        places.append(place)
        sources.append(source.reshape(-1)[order].astype(np.int64))
    merges = [plan_blocks(place, order, mask.shape[1] * config.unit_tokens(stage))
              for stage, (place, order) in enumerate(zip(places, orders[1:], strict=False))]
    pixels = mask.repeat(config.mask_unit, 0).repeat(config.mask_unit, 1)
    return MixPlan(mask.reshape(-1, 1), pixels, orders[0], spans, merges, places,
                   sources if config.mix_embed else [])


def plan_stage(source: np.ndarray, window: int) -> tuple[np.ndarray, list[Span]]:
    """(N,) the token in each slot of a stage, -1 = padding, and its spans, for an (h, w) map of
    sources. Windows that the border cuts (in `maps` and evaluation at other sizes) are padded; what
    pads is a source of its own."""
    (h, w), (p, q) = source.shape, np.minimum(source.shape, window)
    pad, layout = ((0, -h % p), (0, -w % q)), "(a p) (b q) -> (a b) (p q)"
    tokens = np.pad(np.arange(h * w).reshape(h, w), pad, constant_values=-1)
    tokens = rearrange(tokens, layout, p=p, q=q)  # (K, S)
    source = rearrange(np.pad(source, pad, constant_values=2), layout, p=p, q=q)
    y, x = np.divmod(np.arange(p * q), q)
    index = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    if len(tokens) > 1:
        apart = source[:, :, None] != source[:, None, :]
        return tokens.reshape(-1), [Span(0, len(tokens), index, apart[:, None]
                                         if apart.any() else None)]
    # One window: the tokens of each source by themselves, one after another.
    parts = [part for part in (np.flatnonzero(source[0] == s) for s in (0, 1)) if len(part)]
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    spans = [Span(start, 1, index[np.ix_(part, part)], None)
             for start, part in zip(starts, parts, strict=False)]
    return tokens[0, np.concatenate(parts)], spans


def plan_blocks(place: np.ndarray, order: np.ndarray, across: int) -> np.ndarray:
    """(N,) slots of a stage, `across` tokens wide, block by block as `order` lists the blocks, that
    is the tokens of the next stage; inside a block in the order of (4)."""
    blocks = rearrange(place, "(h p w q) -> (h w) (q p)", p=2, q=2, w=across // 2)
    return blocks[order].reshape(-1)


def draw_mix(config: ModelConfig, mask_ratio: float, ratio_range: float,
             seed: Sequence[int]) -> MixPlan:
    """Plan of the mask that belongs to `seed` (run seed, step, rank): one mask for the batch."""
    rng = np.random.default_rng(seed)
    noise = rng.random(config.units**2, np.float32)
    return plan_mix(config, hidden_units(noise, mask_ratio + ratio_range * rng.random()))


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


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, all (B, heads, S, d); the bias (1, heads, S, S) learns."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
    # On the CPU no fused kernel takes a bias that needs a gradient, and its fallback runs
    # bf16 in fp32: written out, attention took half the time there.
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)) + bias
    return torch.matmul(logits.softmax(-1, dtype=torch.float32).to(v.dtype), v)


class MixedWindowAttention(nn.Module):
    """Eq. (2) without its norm and residual: window attention among tokens of one source."""

    def __init__(self, dim: int, num_heads: int, window: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        rows = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, spans: list[Span]) -> Tensor:
        """(B, N, C) -> (B, N, C), tokens in the slots of the spans."""
        x, outputs = self.qkv(x), []  # (B, N, 3C)
        for span in spans:
            size = len(span.index)
            part = x[:, span.start : span.start + span.windows * size]
            layout = "b (k s) (three h d) -> three b (k h) s d"  # a head of a window
            q, k, v = rearrange(part, layout, three=3, s=size, h=self.num_heads)
            bias = self.relative_position_bias_table.index_select(0, span.index.reshape(-1))  # R
            bias = rearrange(bias, "(s t) h -> 1 h s t", s=size).expand(span.windows, -1, -1, -1)
            if span.apart is not None:
                bias = bias.masked_fill(span.apart, -math.inf)  # R + M
            part = attend(q, k, v, bias.flatten(0, 1).unsqueeze(0))  # (B, K * h, S, d), Eq. (2)
            outputs.append(rearrange(part, "b (k h) s d -> b (k s) (h d)", k=span.windows))
        return self.proj(torch.cat(outputs, dim=1))


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


class PatchEmbed(nn.Module):
    """Eq. (1): the convolution with stride as a matrix product, on the patches that are listed."""

    def __init__(self, patch_size: int, dim: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        """(B, 3, H, W), (N,) -> (B, N, C)"""
        p, q = self.proj.kernel_size
        x = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        x = F.linear(x.index_select(1, patches), self.proj.weight.flatten(1), self.proj.bias)
        return self.norm(x)


class PatchMerging(nn.Module):
    """Eq. (4): a 2x2 block of tokens becomes one; `merge` (N,) lists them block by block."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, merge: Tensor) -> Tensor:
        """(B, N, C) -> (B, N / 4, 2C)"""
        x = rearrange(x.index_select(1, merge), "b (n four) c -> b n (four c)", four=4)
        return self.reduction(self.norm(x))


class MixStage(nn.Module):
    """Blocks that attend in the same windows, and the merging after them."""

    def __init__(self, config: ModelConfig, stage: int, rates: list[float]) -> None:
        super().__init__()
        dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        attention = partial(
            MixedWindowAttention, dim, heads, config.window(stage), config.qkv_bias)
        self.blocks = nn.ModuleList(
            Block(dim, attention(), config.mlp_ratio, LAYER_NORM_EPS, rate) for rate in rates)
        last = stage == len(config.depths) - 1
        self.downsample = nn.Identity() if last else PatchMerging(dim, LAYER_NORM_EPS)

    def forward(self, x: Tensor, spans: list[Span], recompute: bool) -> Tensor:
        """(B, N, C) -> (B, N, C), before merging; `recompute` keeps no activations for later."""
        for block in self.blocks:
            x = checkpoint(block, x, spans, use_reentrant=False) if recompute else block(x, spans)
        return x


# ── encoder ───────────────────────────────────────────────────────────────────────────

class MixEncoder(nn.Module):
    """Swin of unshifted windows with a fixed position table, for images of any size; two images
    in one if a plan says where which is."""

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.channels = [config.embed_dim * 2**i for i in range(len(config.depths))]
        self.strides = [config.patch_size * 2**i for i in range(len(config.depths))]
        self.register_buffer("absolute_pos_embed",
                             sincos_embedding(config.embed_dim, config.side(0)))
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim, LAYER_NORM_EPS)
        rates = iter(np.linspace(0, drop_path, sum(config.depths)).tolist())
        self.layers = nn.ModuleList(
            MixStage(config, stage, [next(rates) for _ in range(depth)])
            for stage, depth in enumerate(config.depths))
        self.norm = nn.LayerNorm(self.channels[-1], LAYER_NORM_EPS)
        self.dense_plans: dict[tuple, MixPlan] = {}
        self.grad_checkpoint = False
        self.apply(init_linear)

    def dense_plan(self, height: int, width: int, device: torch.device) -> MixPlan:
        """The plan with nothing masked for images of that many pixels, kept by size."""
        unit, key = self.config.mask_unit, (height, width, device)
        if height % unit or width % unit:
            raise ValueError(f"images of {height}x{width} px: {unit} must divide both sides")
        if key not in self.dense_plans:
            nothing = np.zeros((height // unit, width // unit), bool)
            with torch.inference_mode(False):  # so that it also serves a later training
                self.dense_plans[key] = to_device(plan_mix(self.config, nothing), device)
        return self.dense_plans[key]

    def stages(self, images: Tensor, plan: MixPlan,
               mix_embed: Sequence[Tensor] = ()) -> list[Tensor]:
        """(B, 3, H, W), mixed or not -> tokens (B, N, C) in the slots of every stage, before
        merging and norm. `mix_embed` (2, C) a stage is added to its tokens by source."""
        x = self.patch_embed(images, plan.patches)  # (B, N, C)
        shape = [side // self.config.patch_size for side in images.shape[-2:]]
        x = x + stretch(self.absolute_pos_embed[0], shape).index_select(0, plan.patches)  # Eq. (1)
        outputs = []
        for stage, layer in enumerate(self.layers):
            if len(mix_embed):
                x = x + mix_embed[stage].to(x.dtype).index_select(0, plan.sources[stage])
            x = layer(x, plan.spans[stage], self.grad_checkpoint and self.training)
            outputs.append(x)
            if stage < len(self.layers) - 1:
                x = layer.downsample(x, plan.merges[stage])
        return outputs

    def encode(self, images: Tensor, plan: MixPlan | None = None,
               mix_embed: Sequence[Tensor] = ()) -> Tensor:
        """(B, 3, H, W) -> (B, U, C), in raster order; without a plan nothing is mixed."""
        plan = self.dense_plan(*images.shape[-2:], images.device) if plan is None else plan
        x = self.stages(images, plan, mix_embed)[-1]
        return self.norm(x.index_select(1, plan.places[-1]))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, U, C)"""
        return self.encode(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> a map (B, C, h, w) of every stage, before merging and norm.
        Any H and W that the last of `strides` divides. Windows that the border cuts stay cut; on
        a map smaller than the window the middle of the bias table is used."""
        plan = self.dense_plan(*images.shape[-2:], images.device)
        tokens = zip(self.stages(images, plan), plan.places, self.strides, strict=True)
        return [rearrange(x.index_select(1, place), "b (h w) c -> b c h w",
                          h=images.shape[-2] // stride) for x, place, stride in tokens]


def init_linear(module: nn.Module) -> None:
    """Xavier for linear layers; the patch embedding keeps PyTorch's default, as released."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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

def sincos_embedding(dim: int, side: int) -> Tensor:
    """(1, side^2, dim) fixed table, raster order: sin and cos of the column, then of the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = torch.arange(side**2, dtype=torch.float64).unsqueeze(1)
    rows, columns = place // side * omega, place % side * omega
    table = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
    return table.float().unsqueeze(0)


def patchify(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, U, P): squares of `size` pixels, each as (row, column, channel)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, P) -> Eq. (5), and the mean and deviation (B, U, 1) that undo it."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as released
    deviation = (variance + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


# ── model ─────────────────────────────────────────────────────────────────────────────

class MixMAE(MixEncoder):
    """Encoder on mixed images, decoder on both images of a mixture, pixels of what was hidden.
    A mask is (U,) bool, True = hidden, the same for all images of the batch, as an array or a
    tensor (one on a GPU is copied to the host, which waits for it), or its plan, made ahead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.decoder_dim
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mix_embed = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(2, width), std=0.02)
            for width in self.channels if config.mix_embed)
        self.register_buffer("decoder_pos_embed", sincos_embedding(dim, config.units))
        self.decoder_embed = nn.Linear(self.channels[-1], dim)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, Attention(dim, config.decoder_num_heads), config.mlp_ratio, LAYER_NORM_EPS)
            for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(dim, config.mask_unit**2 * 3)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def plan(self, images: Tensor, mask: MixPlan | np.ndarray | Tensor) -> MixPlan:
        """The plan of `mask` on the images' device; ValueError if they are not of this model."""
        if images.shape[-2:] != (self.config.input_size,) * 2:
            raise ValueError(f"images are {tuple(images.shape)}, not {self.config.input_size} px")
        if not isinstance(mask, MixPlan):
            mask = plan_mix(self.config, torch.as_tensor(mask).cpu().numpy().reshape(-1))
        if mask.pixels.shape != images.shape[-2:]:
            raise ValueError(f"the plan is for images of {tuple(mask.pixels.shape)}")
        return to_device(mask, images.device)

    def decode(self, latent: Tensor, hidden: Tensor) -> Tensor:
        """(B, U, C), bool (U, 1) -> (2B, U, D): first all a_i, then all b_i, through the blocks."""
        x = self.decoder_embed(latent)
        token = self.mask_token.to(x.dtype)
        x = torch.cat([torch.where(hidden, token, x), torch.where(hidden, x, token)])  # Eq. (7)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def forward(self, images: Tensor,
                mask: MixPlan | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Loss (), and predictions (B, U, P) of all units, for (B, 3, H, W) images."""
        plan = self.plan(images, mask)
        latent = self.encode(mix(images, plan.pixels), plan, self.mix_embed)
        a, b = self.decode(latent, plan.hidden).chunk(2)
        x = torch.where(plan.hidden, a, b.flip(0))  # Eq. (8)
        prediction = self.decoder_pred(self.decoder_norm(x)).float()
        target = patchify(images, self.config.mask_unit)
        if self.config.norm_pix_loss:
            target, _, _ = normalize_patches(target)
        return F.mse_loss(prediction, target), prediction  # Eq. (6)


# ── weights ───────────────────────────────────────────────────────────────────────────

# Computed here, so not needed from a file and in no checkpoint.
INDEX_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")
MMPRETRAIN = {  # its names, as regular expressions, and the official ones
    r"^backbone\.": "", r"\.ln([12])\.": r".norm\1.", r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.", r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^head\.fc\.": "head."}


def identify(file: dict) -> tuple[str, ModelConfig]:
    """Name and architecture of the network in a file: by its args if it is ours, else by shapes."""
    args, state = file["args"], official_names(file["model"])
    if args:
        hints = typing.get_type_hints(ModelConfig, include_extras=True)
        config = ModelConfig(**{k: fit(hint, args["config"][k]) for k, hint in hints.items()})
        table = state.get("absolute_pos_embed")
        if table is not None and table.shape[1:2] != (config.side(0) ** 2,):  # else it is stretched
            raise ValueError(f"its args say input_size {config.input_size}, its weights do not")
        return known_model(str(args["model"])), model_config(config)
    table = "layers.{}.blocks.{}.attn.relative_position_bias_table"
    counts = [sum(table.format(i, j) in state for j in range(99)) for i in range(8)]
    depths = tuple(filter(None, counts))
    needed = ("absolute_pos_embed", "patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.bias")
    if not depths or any(k not in state for k in needed):
        raise ValueError("it holds no MixMIM encoder (absolute_pos_embed, layers.0.blocks.0, ...)")
    tables = [state[table.format(i, 0)] for i in range(len(depths))]
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    found = {"input_size": math.isqrt(state["absolute_pos_embed"].shape[1]) * patch,
             "patch_size": patch, "embed_dim": dim, "depths": depths,
             "num_heads": tuple(t.shape[1] for t in tables),
             "window_size": tuple((math.isqrt(len(t)) + 1) // 2 for t in tables),
             "mlp_ratio": len(state["layers.0.blocks.0.mlp.fc1.bias"]) / dim,
             "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state}
    if "decoder_embed.weight" in state:
        blocks = [k for k in state if re.fullmatch(r"decoder_blocks\.\d+\.norm1\.weight", k)]
        found |= {"decoder_dim": len(state["decoder_embed.weight"]), "decoder_depth": len(blocks),
                  "mix_embed": "mix_embed.0" in state}
    alike = min(MODELS, key=lambda n: sum(getattr(MODELS[n], k) != v for k, v in found.items()))
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


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict in the official names, from those or mmpretrain's, whose merging layers hold the
    channels of a block (channel, cell) with cells row by row instead of (cell, channel) as (4)."""
    if not any(k.startswith("backbone.") for k in state):
        return state
    found = {}
    for key, value in state.items():
        for theirs, ours in MMPRETRAIN.items():
            key = re.sub(theirs, ours, key)
        if ".downsample." in key:
            value = value.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :].flatten(-2)
        if not key.startswith("neck."):  # its decoder, in names of its own
            found[key] = value
    return found


def load_weights(make: Callable[[], nn.Module], path: str, file: dict | None,
                 fresh_head: bool = False) -> tuple[nn.Module, str]:
    """What `make` builds (MixMAE, encoder, classifier) with the weights of a file that was read,
    if there is one, and a sentence on what was adapted; InputError names what does not fit.

    Only if `fresh_head` a head that does not fit is left out; it is then drawn next to zero."""
    if file is None:
        return make(), ""
    with data.blaming(path):
        with torch.device("meta"):  # no memory is taken before all shapes are known to agree
            skeleton = make()
        own, notes = skeleton.state_dict(), []
        state = {k: v for k, v in official_names(file["model"]).items()
                 if not k.endswith(INDEX_BUFFERS)}
        if not isinstance(skeleton, MixMAE):
            decoder = ("decoder_", "mask_token", "mix_embed.")
            state = {k: v for k, v in state.items() if not k.startswith(decoder)}
        elif "decoder_pred.weight" not in state:
            raise ValueError("it has no decoder (mask_token): give pretrain's checkpoint-*.pth")
        elif ("mix_embed.0" in state) != ("mix_embed.0" in own):
            raise ValueError("--mix_embed has to be as in the file, --no-mix_embed without it")
        tables = [k for k in own if k.endswith(("bias_table", "pos_embed")) and k in state
                  and state[k].ndim == own[k].ndim and state[k].shape != own[k].shape
                  and state[k].mT.shape[:-1] == own[k].mT.shape[:-1]]  # other numbers of rows
        for key in tables:
            if key.endswith("bias_table") and len(state[key]) % 2 == 0:
                raise ValueError(f"{key} of {len(state[key])} rows is of no window")
            rows, side = state[key].flatten(0, -2), math.isqrt(own[key].shape[-2])
            state[key] = stretch(rows, (side, side)).reshape(own[key].shape)
        notes += [f"{len(tables)} position tables interpolated"] if tables else []
        head = [k for k in ("head.weight", "head.bias") if k in own]
        fresh = fresh_head and any(k not in state or state[k].shape != own[k].shape for k in head)
        notes += ["the head starts fresh"] if fresh else []
        skipped = ("head.weight", "head.bias") if fresh or not head else ()
        own, state = ({k: v for k, v in x.items() if k not in skipped} for x in (own, state))
        data.check_keys(state, own)
    model = make()
    if fresh:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # released, after a pre-training
    model.load_state_dict(state, strict=False)
    return model, f"loaded {path}: {'; '.join(notes) or 'all weights as they are'}"


def export_state(model: MixEncoder, naming: str) -> dict[str, Tensor]:
    """State dict of encoder and head: as "official" what the released loader takes (a classifier
    strictly, index buffers and all), as "swin" what official Swin of the same windows takes."""
    decoder = ("decoder_", "mask_token", "mix_embed.")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()
             if not k.startswith(decoder)}
    if naming == "swin":
        return {k: v for k, v in state.items() if k != "absolute_pos_embed"}
    for stage, layer in enumerate(model.layers):  # index buffers, which its strict loader wants
        window = model.config.window(stage)
        _, (span,) = plan_stage(np.zeros((window, window), np.int64), window)
        for j in range(len(layer.blocks)):
            name = f"layers.{stage}.blocks.{j}.attn.relative_position_index"
            state[name] = torch.from_numpy(span.index).clone()
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
    """0 for the patch embedding, 1.. for blocks; a merging counts with the block after it, the
    head with the last block, as released (in MAE it would be one more)."""
    found = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if not found:
        return 0 if name.startswith("patch_embed.") else sum(depths)
    stage, block = int(found[1]), found[2]
    return sum(depths[:stage + (block is None)]) + int(block or 0) + 1


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
    if cfg.mask_ratio + cfg.mask_ratio_range > 1:
        raise InputError(f"--mask_ratio {cfg.mask_ratio} and --mask_ratio_range "
                         f"{cfg.mask_ratio_range} together exceed 1")
    shown = draw_mix(config, cfg.mask_ratio, 0.0, (cfg.seed,))  # of the pictures
    crop = data.TrainCrop(config.input_size, (cfg.crop_min, 1.0), fast_decode=cfg.fast_decode)
    cfg, loader, lr, args = prepare(replace(cfg, model=name), process, config, "", crop, 256)
    process.say(odd_batch(cfg.batch_size))

    torch.manual_seed(cfg.seed)
    model, said = load_weights(partial(MixMAE, config), cfg.weights, file)
    process.say(said and f"{said}; {config.input_size} px, windows {config.window_size}")
    model.grad_checkpoint = cfg.grad_checkpoint
    groups = parameter_groups(model.to(process.device), cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95), fused=process.device.type != "mps")

    plan_of = lru_cache(2)(lambda number: draw_mix(
        config, cfg.mask_ratio, cfg.mask_ratio_range, (cfg.seed, number, process.rank, 1)))

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
            picture, _ = draw_reconstructions(model, pixels, shown)
            data.save_picture(picture, output / f"reconstruction-{epoch}.png")
            backbone = {"model": export_state(model, "official"), "args": args}
            data.save_file(output / "backbone.pth", partial(torch.save, backbone))
        return {}

    parts = {"model": model, "optimizer": optimizer}
    record = train(cfg, process, parts, loader, args, schedule, loss_of, end_of_epoch)
    if not cfg.data_path:
        process.say("dry run: to pre-train on your images, give --data_path FOLDER")
    return record


def odd_batch(size: int) -> str:
    """What mixing means for a batch of that many images, if not all of them have a partner."""
    what = "the image" if size == 1 else "the middle image of each batch"
    said = f"a batch of {size} is odd: {what} is mixed with itself, what is hidden stays hidden"
    return said if size % 2 else ""


# ── fine-tuning ───────────────────────────────────────────────────────────────────────

class MixClassifier(MixEncoder):
    """The encoder on whole images, with a linear head on the mean token."""

    def __init__(self, config: ModelConfig, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.head = nn.Linear(self.channels[-1], num_classes)
        self.head.apply(init_linear)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        return self.head(self.encode(images).mean(1))


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
    config = replace(config, mix_embed=False)  # no image holds another
    cfg, side = replace(cfg, model=name), config.input_size
    if cfg.linear_probe:
        cfg = replace(cfg, mixup=0.0, cutmix=0.0, smoothing=0.0, reprob=0.0, aa="", drop_path=0.0,
                      layer_decay=1.0)
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
    make = partial(MixClassifier, config, outputs, cfg.drop_path)
    model, said = load_weights(make, cfg.weights, file, fresh_head=True)
    process.say(said and f"{said}; {side} px, windows {config.window_size}")
    if cfg.linear_probe:
        model.requires_grad_(False).head.requires_grad_(True)
    model.grad_checkpoint = cfg.grad_checkpoint
    model.to(process.device).dense_plan(side, side, process.device)  # before compile traces it
    groups = parameter_groups(model, cfg.weight_decay, config.depths, cfg.layer_decay)
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
    file has a head that is wanted, a classifier), what the file says of itself, and the crop."""
    if not cfg.weights:
        raise InputError("give --weights FILE")
    process = process or setup_process(cfg.device, cfg.dtype)
    file = data.read_checkpoint(cfg.weights, SCRIPT)
    # Without new windows the network stays that of its file, which takes images of any size.
    keep = whole or (cfg.window_size and isinstance(cfg.input_size, int))
    name, config = choose_config(cfg if keep else replace(cfg, input_size=None), file)
    state, size = official_names(file["model"]), cfg.input_size or config.input_size
    check_size(size, config.mask_unit)
    with data.blaming(cfg.weights):
        make = partial(MixMAE if whole else MixEncoder, config)
        if "head.weight" in state and head and not whole:
            make = partial(MixClassifier, config, len(state["head.weight"]))
    model, said = load_weights(make, cfg.weights, file)
    other = ", positions stretched, windows cut at the border" if size != config.input_size else ""
    process.say(f"{said}; {name}, {data.sides(size)} px, windows {config.window_size}{other}")
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
            maps = encoder.maps(data.normalize(images.to(process.device)))
            pooled = encoder.norm(maps[-1].flatten(2).transpose(1, 2)).mean(1)
        named = {f"stage{i}": x for i, x in enumerate(maps)} if cfg.per_stage else {}
        named = {k: x.float() for k, x in (named or {"features": pooled}).items()}
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
def draw_reconstructions(model: MixMAE, pixels: Tensor,
                         plan: MixPlan) -> tuple[Image.Image, float]:
    """Labelled grid for uint8 (B, 3, S, S): image, its mixture with image B-1-i, and of that
    mixture the reconstructions of both, what was visible pasted; loss."""
    model.eval()
    size, device, label = model.config.mask_unit, model.mask_token.device, "reconstruction"
    plan, images = to_device(plan, device), data.normalize(pixels.to(device))
    patches = patchify(images, size)
    loss, prediction = model(images, plan)
    if model.config.norm_pix_loss:
        _, mean, deviation = normalize_patches(patches)
        prediction, label = prediction * deviation + mean, "reconstruction, true contrast"
    first = torch.where(plan.hidden, prediction, patches)
    partner = torch.where(plan.hidden, patches, prediction).flip(0)
    columns = torch.stack([patches, patchify(mix(images, plan.pixels), size), first, partner])
    layout = "k b (h w) (p q c) -> k b c (h p) (w q)"
    columns = rearrange(columns, layout, h=model.config.units, p=size, q=size)
    labels = ("image", "mixed", label, "of the partner")
    return data.draw_columns(columns, labels), loss.item()


def reconstruct(cfg: UseConfig) -> dict:
    """PNG grid of images, their mixtures and both reconstructions by a pre-trained file."""
    output = Path(cfg.output or "reconstruction.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {output}: pictures are written as .png")
    process, model, args, crop = open_model(cfg, whole=True)
    ratio = args.get("settings", {}).get("mask_ratio", 0.5)
    ratio = ratio if cfg.mask_ratio is None else cfg.mask_ratio
    plan, source = draw_mix(model.config, ratio, 0.0, (cfg.seed,)), data.open_source(cfg.data_path)
    pixels, _, _ = next(data.eval_batches(source, crop, batch_size=cfg.count, few=cfg.count))
    picture, loss = draw_reconstructions(model, pixels, plan)
    if process.rank == 0:
        data.save_picture(picture, output)
    process.say(odd_batch(len(pixels)))
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
    """Encoder, and head if there is one, in the official or plain Swin's parameter names."""
    if cfg.naming == "timm":
        raise InputError("--naming timm: no network of timm has unshifted windows of a size for "
                         "each stage and a position table; official and swin work")
    if cfg.input_size:
        raise InputError("export writes a network as its file has it: leave out --input_size")
    process, model, *_ = open_model(cfg)
    stages = range(len(model.config.depths))
    windows, sides = ([of(i) for i in stages] for of in (model.config.window, model.config.side))
    if cfg.naming == "swin" and windows != [min(windows[0], side) for side in sides]:
        raise InputError(f"--naming swin: Swin has one window size for all stages, not {windows}")
    output = Path(cfg.output or f"{Path(cfg.weights).stem}-{cfg.naming}.pth")
    state = export_state(model, cfg.naming)
    result = save_state(process, output, state, {"model": state})
    if cfg.naming == "swin":
        process.say(f"note: for a Swin with window_size={windows[0]}, whose answers differ: it has "
                    "no absolute_pos_embed, which is left out, and shifts every second block's "
                    "windows; it cannot be read back here")
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
    """Pre-train a small model on built-in images; fine-tune it and a from-scratch twin."""
    began, output = time.monotonic(), Path(cfg.output or f"output/{SCRIPT}/demo")
    both = {"model": "demo", "seed": cfg.seed, "device": cfg.device, "num_workers": 1,
            "resume": "none", "crop_min": 0.6, "log_every": 1000}
    process = setup_process(cfg.device, "auto")
    torch.manual_seed(cfg.seed)
    # The twin starts where pre-training starts, so that only pre-training tells them apart.
    start = {"model": export_state(MixMAE(MODELS["demo"]), "official")}
    if process.rank == 0:
        data.save_file(output / "start.pth", partial(torch.save, start))
    pretrain(PretrainConfig(**both, data_path="drawn:8192", output_dir=str(output / "pretrain"),
                            batch_size=64, epochs=4, warmup_epochs=1, lr=2e-3))
    result = {}
    for name, weights in (("pretrained", "pretrain/backbone.pth"), ("scratch", "start.pth")):
        tested = finetune(FinetuneConfig(
            **both, data_path="drawn:1000", weights=str(output / weights),
            output_dir=str(output / name), batch_size=25, epochs=5, warmup_epochs=1,
            lr=1e-3, clip_grad=0.5, layer_decay=0.8, mixup=0, cutmix=0, reprob=0, aa="",
            drop_path=0, ema=0.97, test_freq=5))
        result[f"{name}_acc1"] = round(tested["test_acc1"], 1)
    result |= {"chance": 10.0, "picture": str(output / "pretrain" / "reconstruction-3.png"),
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
