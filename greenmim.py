"""GreenMIM: masked image modelling that runs Swin on the visible tokens only.

Huang, You, Zheng, Wang, Qian, Yamasaki: "Green Hierarchical Vision Transformer for Masked Image
Modeling", NeurIPS 2022, arXiv 2205.13515. Fine-tuning follows SimMIM, arXiv 2111.09886.
The method is this file, from "masking" to "model", and `common/grouping.py`, which packs windows.

The idea. MAE drops masked tokens before its plain ViT; a hierarchical ViT needs them for its
windows and its 2x2 merging. Here what is masked is a unit of 32 px, as large as one token of the
last stage (a patch, which is embedded, has 4 px): a 2x2 block is visible or hidden as a whole, and
merging just works. Windows then hold unequal numbers of visible tokens: whole windows are packed
into groups of equal size, and attention runs inside groups, masked so that a token sees its own
window only. The result is exactly window attention on the visible tokens, at about a quarter of
the cost. Unlike in MAE all images of a batch share one mask, so that they share one packing.

    x = norm(embed(patches)[visible])                                                     (1)
    x = x + proj(softmax(q k^T / sqrt(d) + R + M) v), q, k, v = linear(norm(x)) by group  (2)
    x = x + fc2(gelu(fc1(norm(x))))                                                       (3)
    x = W norm([x(0,0), x(1,0), x(0,1), x(1,1)])       (row, column) in a 2x2 block       (4)
    t = (u - mean(u)) / sqrt(var(u) + 1e-6)            u the pixels of one unit           (5)
    loss = mean over hidden units of (prediction - t)^2                                   (6)

R is the learned relative position bias; M is 0 inside a window and -inf between windows. A group
has S slots; those that its windows leave empty hold copies of token 0, which count as a window of
their own, so that no row of M is all -inf, and which nobody reads. `grouping.GroupPlan` holds
    slots (G * S,)         the token in each slot: how q, k, v are gathered into groups
    places (N,)            the slot of each token: how results are put back in token order
    index (G, S, S)        for each pair of slots its row of the table of R
    apart (G, 1, S, S)     M

Data flow of Swin-B at 224 px, window 7, ratio 0.75: U = 49 units, V = 12 visible. Stages count
from 0, as in the parameter names.
    images (B, 3, 224, 224) -> patches of 4 px, the visible ones only      (B, 768, 128)
    stage 0, merge (B, 192, 256) -> stage 1, merge (B, 48, 512) -> stage 2, merge (B, 12, 1024)
    stage 3, norm, Linear (B, 12, 512) -> add mask tokens, in their places (B, 49, 512)
    one ViT block, norm, Linear on the 37 hidden positions                 (B, 37, 3072)

Paper, released code, and here:
  - The paper searches the group size that costs least; released code fixes min(w^2, fullest
    window) and runs padding through every layer. Here `cheapest_groups`, and no padded rows.
  - Released code ("2023") places latents as if they stood in the order of the mask's random
    numbers, while they stand in raster order: at wrong positions. "corrected", the default, does
    not; weights trained either way work with it.
  - The first release, "2022", does that too, merges in the order (0,0), (0,1), (1,0), (1,1), and
    reads wrong token coordinates in stages 1 and 2. By all signs the published files are of this
    release: give --release 2022 with them, and merging weights are put in the order of (4) as
    they are read. To find out what a file needs, `reconstruct` with each: the right release has
    the lowest loss. Files written here know what they are.
  - Released fine-tuning uses LayerNorm eps 1e-5 after pre-training with 1e-6; kept.

Letters: B batch, N tokens, V visible and U all units, C channels, D decoder width, G groups,
S slots of a group, h heads, d head width, P values of a unit; H, W pixels, (h, w) tokens of a map.
Comments say where a value is from: (paper), (released ...), (SimMIM), (MAE), (ours) = chosen here.

Usage:
    python greenmim.py demo                                          about a minute, two CPU cores
    torchrun --nproc_per_node 8 greenmim.py --model swin_b --data_path /imagenet
    torchrun --nproc_per_node 8 greenmim.py finetune --data_path /imagenet \
        --weights output/greenmim/pretrain/backbone.pth
    python greenmim.py {evaluate,reconstruct,export,features} --help
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

from common import augment, data, grouping
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
UNDECAYED = (".bias", "bias_table", "token")  # ends of names without weight decay, beside vectors


@dataclass(frozen=True)
class ModelConfig:
    """Architecture only; stored in every checkpoint."""
    input_size: Annotated[int, (1, 4096)] = 224
    patch_size: Annotated[int, (1, 64)] = 4
    embed_dim: Annotated[int, (1, 4096)] = 128
    depths: tuple[Annotated[int, (1, 99)], ...] = (2, 2, 18, 2)
    num_heads: tuple[Count, ...] = (4, 8, 16, 32)
    window_size: Annotated[int, (1, 1024)] = 7
    mlp_ratio: Annotated[float, (0.01, 100.0)] = 4.0
    decoder_dim: Annotated[int, (4, 4096)] = 512
    decoder_depth: Annotated[int, (1, 99)] = 1
    decoder_num_heads: Count = 16
    norm_pix_loss: bool = True
    release: Literal["corrected", "2023", "2022"] = "corrected"  # which released behaviour

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
        return min(self.window_size, self.side(stage))


MODELS = {  # pixels, patch, width, depths, heads, window, MLP ratio; decoder: width, depth, heads
    "swin_b": ModelConfig(),
    "swin_b_win14": ModelConfig(window_size=14),
    "swin_l_win14": ModelConfig(embed_dim=192, num_heads=(6, 12, 24, 48), window_size=14),
    "swin_t": ModelConfig(224, 4, 96, (2, 2, 6, 2), (3, 6, 12, 24)),  # ours, by the same recipe
    "swin_s": ModelConfig(224, 4, 96, (2, 2, 18, 2), (3, 6, 12, 24)),  # ours, by the same recipe
    "swin_n": ModelConfig(128, 4, 48, (2, 2, 6, 2), (3, 6, 12, 24), 8, 4.0, 256, 1, 8),  # ours
    "demo": ModelConfig(64, 8, 64, (2, 4), (2, 4), 4, 4.0, 96, 1, 3),  # ours
    "test": ModelConfig(64, 4, 16, (2, 2, 2), (1, 2, 4), 3, 4.0, 32, 1, 2),  # ours
}
OTHER_NAMES = {  # timm's, and the constructors of released code
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "green_mim_swin_base_patch4_dec512b1": "swin_b",
    "green_mim_swin_base_patch4_win14_dec512b1": "swin_b_win14",
    "green_mim_swin_large_patch4_win14_dec512b1": "swin_l_win14",
}
RECIPES = {  # by command, recipe and, where it matters, model: what differs from the classes below
    ("pretrain", "published", "swin_b_win14"): {"blr": 1.5e-4},
    ("finetune", "published", "swin_l_win14"): {
        "blr": 1e-3, "warmup_lr": 2e-7, "min_lr": 3.5e-7, "layer_decay": 0.8, "drop_path": 0.3},
    ("pretrain", "small"): {
        "model": "swin_n", "batch_size": 64, "blr": 1.6e-3, "epochs": 100, "warmup_epochs": 5.0,
        "mask_ratio": 0.6},
    ("finetune", "small"): {
        "model": "swin_n", "batch_size": 32, "blr": 1.6e-2, "epochs": 60, "warmup_epochs": 3.0,
        "min_lr": 1e-6, "layer_decay": 0.8, "clip_grad": 1.0, "crop_min": 0.35, "mixup": 0.0,
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
    """What GreenMIM lets one change of the network; None = as the file or the model has it."""
    window_size: Count | None = None  # tokens a side (paper: 7 or 14)
    release: Literal["corrected", "2023", "2022"] | None = None  # see the top of the file (ours)


@dataclass(frozen=True)
class PretrainConfig(RunConfig, MethodConfig):
    """Recipe of the released slurm scripts, 8 processes."""
    output_dir: str = f"output/{SCRIPT}/pretrain"  # checkpoints, log.txt, pictures (ours)
    batch_size: Count = 256  # images per process (released script)
    epochs: Count = 800  # passes over the data (released script)
    warmup_epochs: Amount = 40.0  # linear warm-up (released script)
    blr: Amount = 1e-4  # learning rate per 256 images (released script)
    min_lr: Amount = 0.0  # end of the cosine (released script)
    weight_decay: Amount = 0.05  # AdamW (released script)
    clip_grad: Amount | None = None  # largest gradient norm; none = any (released script)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.2  # smallest crop, share of the image (released)
    mask_ratio: Share = 0.75  # share of hidden units (paper)
    norm_pix_loss: bool | None = None  # normalise each target unit; none = yes (released script)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig, MethodConfig):
    """SimMIM's recipe with the values of GreenMIM's README, 8 processes."""
    output_dir: str = f"output/{SCRIPT}/finetune"  # checkpoints and log.txt (ours)
    linear_probe: bool = False  # train the head only: plain crops, no mixing (ours)
    nb_classes: Count | None = None  # outputs; none = the number of class folders (ours)
    batch_size: Count = 96  # images per process (released README: 768 in all)
    epochs: Count = 100  # passes over the data (released config)
    warmup_epochs: Amount = 20.0  # linear warm-up (released config)
    blr: Amount = 1.25e-3  # learning rate per 512 images (released config)
    warmup_lr: Amount = 2.5e-7  # start of the warm-up, per 512 images (released config)
    min_lr: Amount = 2.5e-7  # end of the cosine, per 512 images (released config)
    weight_decay: Amount = 0.05  # AdamW (released config)
    clip_grad: Amount | None = 5.0  # largest gradient norm; none = any (SimMIM)
    layer_decay: Share = 0.9  # learning rate factor from layer to layer (released config)
    drop_path: Annotated[float, (0.0, 0.99999)] = 0.1  # stochastic depth, last block (released)
    crop_min: Annotated[float, (0.001, 1.0)] = 0.08  # smallest crop, share of the image (SimMIM)
    mixup: Amount = 0.8  # Beta parameter, 0 = off (SimMIM)
    cutmix: Amount = 1.0  # Beta parameter, 0 = off (SimMIM)
    smoothing: Share = 0.1  # label smoothing (SimMIM)
    reprob: Share = 0.25  # probability of random erasing (SimMIM)
    aa: str = "rand-m9-mstd0.5-inc1"  # RandAugment policy, none = off (SimMIM)
    ema: Annotated[float, (0.0, 0.99999)] = 0.0  # decay of averaged weights, 0 = off (ours)
    test_freq: Count = 1  # epochs between tests; the last is always tested (ours)


@dataclass(frozen=True)
class UseConfig(FileConfig, MethodConfig):
    """What the commands that do not train need."""
    naming: Literal["timm", "official"] = "timm"  # export: whose parameter names (ours)
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
    if isinstance(config.input_size, tuple):
        raise InputError(f"--input_size {data.sides(config.input_size)}: here images are square")
    check_size(config.input_size, config.mask_unit)
    tokens = config.input_size // config.patch_size
    if config.window_size > tokens:
        raise InputError(f"--window_size {config.window_size} does not fit: it is 1 to {tokens}")
    return config


def check_size(size: Pixels, unit: int) -> None:
    """InputError, which names the nearest that do, unless `unit` divides every side of `size`."""
    for side in size if isinstance(size, tuple) else (size,):
        low = max(2, side // unit) * unit
        if side % unit or side < low:
            raise InputError(f"--input_size {data.sides(size)} does not fit: a side must be a "
                             f"multiple of {unit}, the nearest are {low} and {low + unit}")


# ── masking ───────────────────────────────────────────────────────────────────────────

def random_mask(noise: np.ndarray, mask_ratio: float) -> np.ndarray:
    """(U,) bool, True = hidden, from (U,) noise: the int(U (1 - ratio)) smallest stay visible."""
    kept = int(noise.size * (1 - mask_ratio))
    if not 1 <= kept < noise.size:
        raise InputError(f"--mask_ratio {mask_ratio} leaves {kept} of {noise.size} units visible: "
                         "at least one must stay visible and one be hidden")
    mask = np.ones(noise.shape, bool)
    mask[np.argsort(noise, kind="stable")[:kept]] = False
    return mask


# ── planning ──────────────────────────────────────────────────────────────────────────
# All that a mask decides is worked out on the host before the step, so that the model only
# indexes: no host synchronisation, no shape that depends on device data.

@dataclass(frozen=True)
class MaskPlan:
    """What the model has to know about one mask: NumPy arrays, or tensors after `to_device`."""
    patches: Tensor  # (N,) which of all patches are visible, in raster order
    windows: list[list[grouping.GroupPlan]]  # for each stage: [plain] or [plain, shifted]
    merges: list[Tensor]  # for each stage but the last, (N,): its tokens, 2x2 block by 2x2 block
    restore: Tensor  # (U,) what stands at a decoder position: latent i, or V + i for a mask token
    hidden: Tensor  # (U - V,) the decoder positions to predict


def plan_mask(config: ModelConfig, mask: np.ndarray, noise: np.ndarray | None = None) -> MaskPlan:
    """Plan for `mask`, bool (rows, columns) of units or flat (U,) for a square, True = hidden.
    `noise` (U,), which the mask was drawn from, is needed for `release` "2023" and "2022" only.
    Raises ValueError if the mask is of another size or leaves nothing visible."""
    mask = np.asarray(mask, bool)
    if mask.ndim < 2 and mask.size != config.units**2:
        raise ValueError(f"the mask has {mask.size} units, the model {config.units**2}")
    keep = ~mask if mask.ndim == 2 else ~mask.reshape(config.units, config.units)
    if not keep.any():
        raise ValueError("the mask leaves nothing visible")
    sides = [config.unit_tokens(stage) for stage in range(len(config.depths))]
    maps = [keep.repeat(k, 0).repeat(k, 1) for k in sides]  # (h, w) of a stage, True = visible
    windows = []
    for stage, seen in enumerate(maps):
        # Tokens stand in raster order in every stage: merging goes through the blocks in it.
        rows, columns = np.nonzero(seen)
        if config.release == "2022" and stage > 0:
            rows, columns = misread_coordinates(rows, columns, sides[stage], seen.shape[1])
        windows.append(plan_windows(config, stage, rows, columns, seen.shape))
    patches, merges = np.flatnonzero(maps[0]), [plan_merge(seen) for seen in maps[:-1]]

    visible, hidden = np.flatnonzero(keep), np.flatnonzero(~keep)
    latents = np.arange(len(visible))
    if config.release != "corrected" and len(hidden):
        if noise is None:
            raise ValueError(f"release {config.release} places latents by noise: plan with it")
        latents = np.argsort(np.argsort(noise[visible]))  # rank of the noise
    restore = np.empty(keep.size, np.int64)
    restore[visible], restore[hidden] = latents, len(visible) + np.arange(len(hidden))
    return MaskPlan(patches, windows, merges, restore, hidden)


def plan_windows(config: ModelConfig, stage: int, rows: np.ndarray, columns: np.ndarray,
                 shape: tuple[int, int]) -> list[grouping.GroupPlan]:
    """[plain] or [plain, shifted] for tokens at (rows, columns), both (N,), of an (h, w) map."""
    window = config.window(stage)
    # As in Swin, an axis that one window covers is never shifted.
    shift = tuple(window // 2 if side > window else 0 for side in shape)
    # The paper's cost of a group size: multiply-adds of a layer whose projections run on padded
    # slots too. Here they do not, yet of the costs tried it gives the fastest layer (README).
    cost = grouping.layer_cost(config.embed_dim * 2**stage)
    sizing = partial(grouping.cheapest_groups, cost=cost)
    ids = [grouping.window_ids(rows, columns, window, s) for s in dict.fromkeys([(0, 0), shift])]
    return [grouping.plan_groups(rows, columns, found, window, sizing) for found in ids]


def plan_merge(visible: np.ndarray) -> np.ndarray:
    """(N,) visible tokens of an (h, w) map, block by block, inside a block in the order of (4)."""
    number = np.where(visible, np.cumsum(visible).reshape(visible.shape) - 1, -1)
    blocks = rearrange(number, "(h p) (w q) -> (h w) (q p)", p=2, q=2)
    return blocks[blocks[:, 0] >= 0].reshape(-1)


def misread_coordinates(rows: np.ndarray, columns: np.ndarray, k: int,
                        across: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates that the first release took tokens at (rows, columns) for, `k` a unit's side.
    It stored tokens unit by unit but read their coordinates off in raster order."""
    unit = rows // k * (across // k) + columns // k
    return np.divmod(unit * k**2 + rows % k * k + columns % k, across)


def draw_plan(config: ModelConfig, mask_ratio: float, seed: Sequence[int]) -> MaskPlan:
    """Plan of the mask that belongs to `seed` (run seed, step, rank): one mask for the batch."""
    noise = np.random.default_rng(seed).random(config.units**2, np.float32)
    return plan_mask(config, random_mask(noise, mask_ratio), noise)


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


class GroupWindowAttention(Attention):
    """Eq. (2) without its norm and residual: window attention over the tokens that a plan groups.
    With nothing masked this is Swin's (shifted) window attention, however windows are grouped;
    border windows are cut where Swin rolls the map and masks what the roll joined."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__(dim, num_heads)
        rows = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, plan: grouping.GroupPlan) -> Tensor:
        """(B, N, C) -> (B, N, C); `slots` and `places` are None where tokens need not move."""
        groups, _, size, _ = plan.apart.shape
        x = self.qkv(x)  # (B, N, 3C)
        if plan.slots is not None:
            x = x.index_select(1, plan.slots)  # (B, G * S, 3C), padding included
        layout = "b (g s) (three h d) -> three b (g h) s d"  # each head of each group by itself
        q, k, v = rearrange(x, layout, three=3, g=groups, h=self.num_heads)
        bias = self.relative_position_bias_table.index_select(0, plan.index.reshape(-1))  # R
        bias = rearrange(bias, "(g s t) h -> g h s t", g=groups, s=size) + plan.apart  # R + M
        x = attend(q, k, v, bias.flatten(0, 1).unsqueeze(0))  # (B, G * h, S, d), Eq. (2)
        x = rearrange(x, "b (g h) s d -> b (g s) (h d)", g=groups)
        if plan.places is not None:
            x = x.index_select(1, plan.places)  # (B, N, C), padding left behind
        return self.proj(x)


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


class SwinStage(nn.Module):
    """Blocks that alternate between the plain and the shifted plan, and the merging after them."""

    def __init__(self, config: ModelConfig, stage: int, eps: float, rates: list[float]) -> None:
        super().__init__()
        dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        attention = partial(GroupWindowAttention, dim, heads, config.window(stage))
        self.blocks = nn.ModuleList(
            Block(dim, attention(), config.mlp_ratio, eps, rate) for rate in rates)
        last = stage == len(config.depths) - 1
        self.downsample = nn.Identity() if last else PatchMerging(dim, eps)

    def forward(self, x: Tensor, windows: list[grouping.GroupPlan], recompute: bool) -> Tensor:
        """(B, N, C) -> (B, N, C), before merging; `recompute` keeps no activations for later."""
        for j, block in enumerate(self.blocks):
            plan = windows[j % len(windows)]
            x = checkpoint(block, x, plan, use_reentrant=False) if recompute else block(x, plan)
        return x


# ── encoder ───────────────────────────────────────────────────────────────────────────

class SwinEncoder(nn.Module):
    """Swin over the visible tokens; with nothing masked, plain Swin for images of any size."""

    def __init__(self, config: ModelConfig, eps: float = 1e-6, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.channels = [config.embed_dim * 2**i for i in range(len(config.depths))]
        self.strides = [config.patch_size * 2**i for i in range(len(config.depths))]
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim, eps)
        rates = iter(np.linspace(0, drop_path, sum(config.depths)).tolist())
        self.layers = nn.ModuleList(
            SwinStage(config, stage, eps, [next(rates) for _ in range(depth)])
            for stage, depth in enumerate(config.depths))
        self.norm = nn.LayerNorm(self.channels[-1], eps)
        self.dense_plans: dict[tuple, MaskPlan] = {}
        self.grad_checkpoint = False

    def dense_plan(self, height: int, width: int, device: torch.device) -> MaskPlan:
        """The plan with nothing masked for images of that many pixels, kept by size.
        Its coordinates are right whatever the release: fine-tuning never had the wrong ones."""
        unit, key = self.config.mask_unit, (height, width, device)
        if height % unit or width % unit:
            raise ValueError(f"images of {height}x{width} px: {unit} must divide both sides")
        if key not in self.dense_plans:
            nothing = np.zeros((height // unit, width // unit), bool)
            plan = plan_mask(replace(self.config, release="corrected"), nothing)
            with torch.inference_mode(False):  # so that it also serves a later training
                self.dense_plans[key] = to_device(plan, device)
        return self.dense_plans[key]

    def stages(self, images: Tensor, plan: MaskPlan | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> visible tokens (B, N, C) of every stage, before merging and norm."""
        plan = self.dense_plan(*images.shape[-2:], images.device) if plan is None else plan
        x, outputs = self.patch_embed(images, plan.patches), []  # (B, N, C)
        for stage, layer in enumerate(self.layers):
            x = layer(x, plan.windows[stage], self.grad_checkpoint and self.training)
            outputs.append(x)
            if stage < len(self.layers) - 1:
                x = layer.downsample(x, plan.merges[stage])
        return outputs

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, V, C): units that the plan leaves visible, all without a plan."""
        return self.norm(self.stages(images, plan)[-1])

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> a map (B, C, h, w) of every stage, before merging and norm.
        Any H and W that the last of `strides` divides. Windows that the border cuts stay cut; on
        a map smaller than the window the middle of the bias table is used."""
        return [rearrange(x, "b (h w) c -> b c h w", h=images.shape[-2] // stride)
                for x, stride in zip(self.stages(images), self.strides, strict=True)]


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

class GreenMIM(nn.Module):
    """Encoder on visible tokens, one-block decoder on all units, pixels of the hidden ones.
    A mask is (U,) bool, True = hidden, the same for all images of the batch, as an array or a
    tensor (one on a GPU is copied to the host, which waits for it), or its plan, made ahead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.decoder_dim
        self.encoder = SwinEncoder(config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("decoder_pos_embed", sincos_embedding(dim, config.units))
        self.decoder_embed = nn.Linear(self.encoder.channels[-1], dim)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, Attention(dim, config.decoder_num_heads), config.mlp_ratio, 1e-6)
            for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, 1e-6)
        self.decoder_pred = nn.Linear(dim, config.mask_unit**2 * 3)

        nn.init.normal_(self.mask_token, std=0.02)
        # Released: the wrapper re-initialises the encoder, save the bias of the patch embedding.
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def plan(self, images: Tensor, mask: MaskPlan | np.ndarray | Tensor) -> MaskPlan:
        """The plan of `mask` on the images' device; ValueError if they are not of this model."""
        if images.shape[-2:] != (self.config.input_size,) * 2:
            raise ValueError(f"images are {tuple(images.shape)}, not {self.config.input_size} px")
        if not isinstance(mask, MaskPlan):
            mask = plan_mask(self.config, torch.as_tensor(mask).cpu().numpy().reshape(-1))
        if len(mask.hidden) == 0:
            raise ValueError("the mask hides nothing, so there is nothing to reconstruct")
        return to_device(mask, images.device)

    def decode(self, latent: Tensor, plan: MaskPlan) -> Tensor:
        """(B, V, C) -> (B, U, D): latents and mask tokens in their places, through the blocks."""
        x = self.decoder_embed(latent)
        tokens = self.mask_token.to(x.dtype).expand(len(x), len(plan.hidden), -1)
        x = torch.cat([x, tokens], dim=1).index_select(1, plan.restore) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def forward(self, images: Tensor,
                mask: MaskPlan | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Loss (), and predictions (B, U - V, P) of the hidden units, for (B, 3, H, W) images."""
        plan = self.plan(images, mask)
        x = self.decode(self.encoder(images, plan), plan).index_select(1, plan.hidden)
        prediction = self.decoder_pred(self.decoder_norm(x)).float()
        target = patchify(images, self.config.mask_unit).index_select(1, plan.hidden)
        if self.config.norm_pix_loss:
            target, _, _ = normalize_patches(target)
        return F.mse_loss(prediction, target), prediction  # Eq. (6)


# ── weights ───────────────────────────────────────────────────────────────────────────

# Computed here, so not needed from a file and in no checkpoint.
INDEX_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")


def identify(file: dict) -> tuple[str, ModelConfig]:
    """Name and architecture of the network in a file: by its args if it is ours, else by shapes."""
    args, state = file["args"], swin_names(file["model"])
    if args:
        hints = typing.get_type_hints(ModelConfig, include_extras=True)
        config = ModelConfig(**{k: fit(hint, args["config"][k]) for k, hint in hints.items()})
        return known_model(str(args["model"])), model_config(config)
    table = "layers.{}.blocks.{}.attn.relative_position_bias_table"
    counts = [sum(table.format(i, j) in state for j in range(99)) for i in range(8)]
    depths = tuple(filter(None, counts))
    if not depths or "patch_embed.proj.weight" not in state:
        raise ValueError("it holds no Swin (layers.0.blocks.0.attn.qkv.weight, ...)")
    tables = [state[table.format(i, 0)] for i in range(len(depths))]
    windows = [(math.isqrt(len(t)) + 1) // 2 for t in tables]
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    found = {"patch_size": patch, "embed_dim": dim, "depths": depths, "window_size": max(windows),
             "num_heads": tuple(t.shape[1] for t in tables)}
    alike = min(MODELS, key=lambda n: sum(getattr(MODELS[n], k) != v for k, v in found.items()))
    side = windows[-1] * patch * 2 ** (len(depths) - 1)  # of an image of one window at last
    if windows[-1] < max(windows) or side > MODELS[alike].input_size:
        found["input_size"] = side
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


def swin_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder and head in Swin's names, from GreenMIM, SimMIM, Swin or timm ones."""
    state = {k[8:]: v for k, v in state.items() if k.startswith("encoder.")} or state
    dropped = (*INDEX_BUFFERS, "mask_token")  # SimMIM keeps a mask token in its encoder
    state = {k.replace("head.fc.", "head."): v for k, v in state.items() if not k.endswith(dropped)}
    # timm merges at the start of a stage
    return state if "layers.0.downsample.norm.weight" in state else move_merging(state, -1)


def move_merging(state: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Merging weights moved to another stage: timm has them one stage later than Swin."""
    stage = re.compile(r"(?<=layers\.)\d+(?=\.downsample)")
    return {stage.sub(lambda number: str(int(number[0]) + by), k): v for k, v in state.items()}


def swap_merging(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first release's merging order (0,0), (0,1), (1,0), (1,1) to Eq. (4), or back."""
    return {k: v.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2)
            if ".downsample." in k else v for k, v in state.items()}


def load_weights(make: Callable[[], nn.Module], path: str, file: dict | None,
                 release: str | None = None, fresh_head: bool = False) -> tuple[nn.Module, str]:
    """What `make` builds (GreenMIM, encoder, classifier) with the weights of a file that was read,
    if there is one, and a sentence on what was adapted; InputError names what does not fit.
    `release` is a foreign file's; only if `fresh_head` a head that does not fit is left out."""
    if file is None:
        return make(), ""
    with data.blaming(path):
        with torch.device("meta"):  # no memory is taken before all shapes are known to agree
            skeleton = make()
        own, state, notes = skeleton.state_dict(), file["model"], []
        skipped = (*INDEX_BUFFERS, "decoder_pos_embed")  # the latter is made for the size in use
        if not isinstance(skeleton, GreenMIM):
            state = swin_names(state)
        elif not any(k.startswith("decoder_pred.") for k in state):
            raise ValueError("it has no decoder (mask_token): give pretrain's checkpoint-*.pth")
        if release == "2022" and not file["args"]:
            state, notes = swap_merging(state), ["merging weights of the first release reordered"]
        tables = [k for k in own if k.endswith("bias_table") and k in state and state[k].ndim == 2]
        resized = [k for k in tables if len(state[k]) != len(own[k])]
        state = state | {k: resize_bias_table(state[k], len(own[k])) for k in resized}
        notes += [f"{len(resized)} relative position tables interpolated"] if resized else []
        head = [k for k in ("head.weight", "head.bias") if k in own]
        fresh = fresh_head and any(k not in state or state[k].shape != own[k].shape for k in head)
        notes += ["the head starts fresh"] if fresh else []
        skipped += ("head.weight", "head.bias") if fresh or not head else ()
        own, state = ({k: v for k, v in x.items() if not k.endswith(skipped)} for x in (own, state))
        data.check_keys(state, own)
    model = make()
    model.load_state_dict(state, strict=False)
    return model, f"loaded {path}: {'; '.join(notes) or 'all weights as they are'}"


def resize_bias_table(table: Tensor, rows: int) -> Tensor:
    """((2w - 1)^2, h) relative position table -> (rows, h), as SimMIM does it.
    Old entries are taken to stand at geometrically growing distances x that span the new window;
    a bicubic not-a-knot spline through them is read at the new distances t: W Z W^T per head."""
    source, target = math.isqrt(len(table)), math.isqrt(rows)
    if source**2 != len(table) or source % 2 == 0:
        raise ValueError(f"a relative position table of {len(table)} rows is of no window")
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        too_far = (1 - q ** (source // 2)) / (1 - q) > target // 2
        low, high = (low, q) if too_far else (q, high)
    steps = np.cumsum(q ** np.arange(source // 2))
    x = np.concatenate([-steps[::-1], [0.0], steps])
    t = np.clip(np.arange(target) - target // 2, x[0], x[-1])
    # Not-a-knot: no third derivative jumps at the second and the last but one point.
    at, knots = (values / max(x[-1], 1) for values in (np.append(x, t)[:, None], x[2:-2]))
    basis = np.hstack([at ** np.arange(min(source, 4)), np.maximum(at - knots, 0) ** 3])
    w = torch.from_numpy(np.linalg.solve(basis[:source].T, basis[source:].T).T)
    z = rearrange(table.double(), "(r c) h -> h r c", r=source)
    return rearrange(w @ z @ w.T, "h r c -> (r c) h").to(table.dtype)


def export_state(model: SwinEncoder, naming: str) -> dict[str, Tensor]:
    """State dict that loads strictly into timm's or the official Swin of the same size."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if naming == "official":
        return state
    return {re.sub(r"^head\.", "head.fc.", k): v for k, v in move_merging(state, 1).items()}


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
    """0 for the patch embedding, 1.. for blocks; a merging counts with the block before it."""
    found = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if not found:
        return 0 if name.startswith("patch_embed.") else sum(depths) + 1
    stage, block = int(found[1]), found[2]
    return sum(depths[:stage]) + (depths[stage] if block is None else int(block) + 1)


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
    shown = draw_plan(config, cfg.mask_ratio, (cfg.seed,))  # of the pictures; checks the ratio
    crop = data.TrainCrop(config.input_size, (cfg.crop_min, 1.0), fast_decode=cfg.fast_decode)
    cfg, loader, lr, args = prepare(replace(cfg, model=name), process, config, "", crop, 256)

    torch.manual_seed(cfg.seed)
    model, said = load_weights(partial(GreenMIM, config), cfg.weights, file, cfg.release)
    process.say(said and f"{said}; {config.input_size} px, window {config.window_size}")
    model.encoder.grad_checkpoint = cfg.grad_checkpoint
    groups = parameter_groups(model.to(process.device), cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95), fused=process.device.type != "mps")

    plan_of = lru_cache(2)(lambda number: draw_plan(
        config, cfg.mask_ratio, (cfg.seed, number, process.rank, 1)))

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
            output, view = Path(cfg.output_dir), data.EvalCrop(config.input_size)
            pixels, _, _ = next(data.eval_batches(loader.source, view, batch_size=8, few=8))
            picture, _ = draw_reconstructions(model, pixels, shown)
            data.save_picture(picture, output / f"reconstruction-{epoch}.png")
            backbone = {"model": export_state(model.encoder, "official"), "args": args}
            data.save_file(output / "backbone.pth", partial(torch.save, backbone))
        return {}

    parts = {"model": model, "optimizer": optimizer}
    record = train(cfg, process, parts, loader, args, schedule, loss_of, end_of_epoch)
    if not cfg.data_path:
        process.say("dry run: to pre-train on your images, give --data_path FOLDER")
    return record


# ── fine-tuning ───────────────────────────────────────────────────────────────────────

class SwinClassifier(SwinEncoder):
    """Dense Swin with a linear head on the mean token, in Swin's own parameter names."""

    def __init__(self, config: ModelConfig, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(config, eps=1e-5, drop_path=drop_path)
        self.head = nn.Linear(self.channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        return self.head(super().forward(images).mean(1))


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
    config = replace(config, release="corrected")  # nothing is masked, and loading reorders
    cfg, side = replace(cfg, model=name), config.input_size
    if cfg.linear_probe:
        cfg = replace(cfg, mixup=0.0, cutmix=0.0, smoothing=0.0, reprob=0.0, aa="", drop_path=0.0)
    if (cfg.mixup or cfg.cutmix) and cfg.batch_size % 2:
        raise InputError(f"--batch_size {cfg.batch_size} is odd: mixup and cutmix pair images")
    with data.blaming(f"--aa {cfg.aa}"):
        policy = augment.RandAugment(cfg.aa) if cfg.aa not in ("", "none") else None
    crop = data.TrainCrop(side, (cfg.crop_min, 1.0), augment=policy, fast_decode=cfg.fast_decode)
    cfg, loader, lr, args = prepare(cfg, process, config, "train", crop, 512)
    classes = loader.source.classes
    outputs = cfg.nb_classes or (len(classes) if cfg.data_path else 1000)
    test = data.open_source(cfg.data_path, "val") if cfg.data_path else loader.source
    data.check_classes(classes, test.classes, outputs)
    mixup = augment.Mixup(cfg.mixup, cfg.cutmix, smoothing=cfg.smoothing, num_classes=outputs)

    torch.manual_seed(cfg.seed)
    make = partial(SwinClassifier, config, outputs, cfg.drop_path)
    model, said = load_weights(make, cfg.weights, file, cfg.release, fresh_head=True)
    process.say(said and f"{said}; {side} px, window {config.window_size}")
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

    total, warmup = cfg.epochs * len(loader), int(cfg.warmup_epochs * len(loader))
    start, end = (value * (lr / cfg.blr if cfg.blr else 1) for value in (cfg.warmup_lr, cfg.min_lr))

    def schedule(step: int, scale: float) -> float:
        # SimMIM: one update late, and the cosine is not moved by the warm-up.
        return lr_at(max(step - 1, 0), lr * scale, start, end, warmup, 0, total)

    def end_of_epoch(epoch: int, records: list[dict]) -> dict:
        if not cfg.data_path or ((epoch + 1) % cfg.test_freq and epoch + 1 < cfg.epochs):
            return {}
        view = data.EvalCrop(side, "simmim")
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
    name, config = choose_config(cfg if whole else replace(cfg, input_size=None), file)
    weight, size = swin_names(file["model"]).get("head.weight"), cfg.input_size or config.input_size
    check_size(size, config.mask_unit)
    with data.blaming(cfg.weights):
        # Whoever has had a head was trained with its eps.
        encoder = partial(SwinEncoder, config, 1e-6 if weight is None else 1e-5)
        make = partial(GreenMIM, config) if whole else encoder
        if weight is not None and head and not whole:
            make = partial(SwinClassifier, config, len(weight))
    model, said = load_weights(make, cfg.weights, file, cfg.release)
    process.say(f"{said}; {name}, {data.sides(size)} px, window {config.window_size}")
    return process, model.to(process.device).eval(), file["args"], data.EvalCrop(size)


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
def draw_reconstructions(model: GreenMIM, pixels: Tensor,
                         plan: MaskPlan) -> tuple[Image.Image, float]:
    """Labelled grid for uint8 (B, 3, S, S): image, what the encoder saw, reconstruction; loss."""
    model.eval()
    size, device, label = model.config.mask_unit, model.mask_token.device, "reconstruction"
    plan, images = to_device(plan, device), data.normalize(pixels.to(device))
    patches = patchify(images, size)
    loss, prediction = model(images, plan)
    if model.config.norm_pix_loss:
        _, mean, deviation = normalize_patches(patches[:, plan.hidden])
        prediction, label = prediction * deviation + mean, f"{label}, true mean and contrast"
    seen, filled = patches.clone(), patches.clone()
    seen[:, plan.hidden], filled[:, plan.hidden] = 0.0, prediction  # 0 is the mean colour
    layout = "k b (h w) (p q c) -> k b c (h p) (w q)"
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
    plan, source = draw_plan(model.config, ratio, (cfg.seed,)), data.open_source(cfg.data_path)
    pixels, _, _ = next(data.eval_batches(source, crop, batch_size=cfg.count, few=cfg.count))
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
    """Encoder, and head if there is one, in timm's or the official Swin's parameter names."""
    if cfg.input_size:
        raise InputError("export writes a network as its file has it: leave out --input_size")
    process, model, *_ = open_model(cfg)
    config, output = model.config, Path(cfg.output or f"{Path(cfg.weights).stem}-{cfg.naming}.pth")
    state = export_state(model, cfg.naming)
    result = save_state(process, output, state, state if cfg.naming == "timm" else {"model": state})
    if cfg.naming == "timm":
        names = ("patch_size", "embed_dim", "depths", "num_heads", "window_size")
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names)
        outputs = model.head.out_features if isinstance(model, SwinClassifier) else 0
        process.say("timm.create_model('swin_base_patch4_window7_224', img_size="
                    f"{config.input_size}, {sizes}, num_classes={outputs}) loads it strictly")
    if any(config.side(i) % config.window(i) for i in range(len(config.depths))):
        process.say("note: timm pads windows that do not divide a map, official Swin refuses them; "
                    "here they are cut, so answers differ")
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
    start = {"model": export_state(GreenMIM(MODELS["demo"]).encoder, "official")}
    if process.rank == 0:
        data.save_file(output / "start.pth", partial(torch.save, start))
    pretrain(PretrainConfig(**both, data_path="drawn:8192", output_dir=str(output / "pretrain"),
                            batch_size=64, epochs=5, warmup_epochs=1, lr=2e-3))
    result = {}
    for name, weights in (("pretrained", "pretrain/backbone.pth"), ("scratch", "start.pth")):
        tested = finetune(FinetuneConfig(
            **both, data_path="drawn:1000", weights=str(output / weights),
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
