"""GreenMIM: masked image modelling that runs Swin on the visible tokens only.

Huang, You, Zheng, Wang, Qian, Yamasaki: "Green Hierarchical Vision Transformer for Masked Image
Modeling", NeurIPS 2022, arXiv 2205.13515. Fine-tuning follows SimMIM, arXiv 2111.09886.

The idea. MAE drops masked tokens before its plain ViT; a hierarchical ViT needs them for its
windows and its 2x2 merging. Here the mask unit is as large as one token of the last stage, so a
2x2 block is visible or hidden as a whole and merging just works. Local windows then hold unequal
numbers of visible tokens: whole windows are packed into groups of equal size, and attention runs
inside groups, masked so that a token sees its own window only. The result is exactly window
attention on the visible tokens, at about a quarter of the cost.

    x = embed(patches)[visible]                                                     (1)
    x = x + proj(softmax(q k^T / sqrt(d) + B + M) v)    q, k, v gathered by group   (2)
    x = x + fc2(gelu(fc1(norm(x))))                     real tokens, no padding     (3)
    x = W norm([x(0,0), x(1,0), x(0,1), x(1,1)])        (row, column) in a block    (4)
    t = (p - mean(p)) / sqrt(var(p) + 1e-6)             p one 32x32x3 patch         (5)
    loss = mean over hidden patches of (prediction - t)^2                           (6)

B is the learned relative position bias, M is 0 inside a window and -inf between windows.

Data flow of Swin-B at 224 px, window 7, ratio 0.75: U = 49 units of 32 px, V = 12 visible
    images (B, 3, 224, 224) -> patches of 4 px, the visible ones only    (B, 768, 128)
    stage 1, merge (B, 192, 256) -> stage 2, merge (B, 48, 512) -> stage 3, merge (B, 12, 1024)
    stage 4, norm, Linear (B, 12, 512) -> add mask tokens, restore order (B, 49, 512)
    one ViT block, norm, Linear on the 37 hidden positions               (B, 37, 3072)

Paper, released code, and here:
  - The paper searches the group size that costs least; released code fixes min(w^2, fullest
    window) and runs padding through every layer. Here `cheapest_groups`, and no padded rows.
  - Released code hands latents to the decoder in the order of the mask's noise, not of position:
    `release = "2023"`. Correct order is "corrected", the default, also right for old weights.
  - The first release (2022) merges in the order (0,0), (0,1), (1,0), (1,1) and reads wrong token
    coordinates in stages 2 and 3: `release = "2022"`. By all signs the published files date from
    then: give --release 2022 with them (the setting that is right reconstructs best).
    Fine-tuning permutes their merging weights into (4).
  - Released fine-tuning uses LayerNorm eps 1e-5 after pre-training with 1e-6; kept.

Letters: B batch, N tokens, V visible and U all mask units, C channels, G groups, S slots per
group, h heads, d head width, P values of a patch.

Usage:
    python greenmim.py demo                                          two minutes, two CPU cores
    torchrun --nproc_per_node 8 greenmim.py --model swin_b --data_path /imagenet
    torchrun --nproc_per_node 8 greenmim.py finetune --weights output/pretrain/backbone.pth \
        --model swin_b --data_path /imagenet
    python greenmim.py {evaluate,reconstruct,export,features} --help

To copy: this file and `common/`. The method alone: from "masking" to "model".
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import inspect
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import statistics
import sys
import threading
import time
import typing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import augment, data, grouping
from common.data import InputError

# ── config ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ModelConfig:
    """Architecture only; stored in every checkpoint."""

    input_size: int = 224
    patch_size: int = 4
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 7
    mlp_ratio: float = 4.0
    decoder_dim: int = 512
    decoder_depth: int = 1
    decoder_num_heads: int = 16
    norm_pix_loss: bool = True
    release: str = "corrected"  # or "2023", "2022": which released behaviour

    @property
    def mask_unit(self) -> int:
        """Side of a mask unit in pixels: one token of the last stage."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def units(self) -> int:
        """Mask units per side of the image."""
        return self.input_size // self.mask_unit

    def unit_tokens(self, stage: int) -> int:
        """Tokens per side of a mask unit: 8, 4, 2, 1 in the four stages of Swin."""
        return 2 ** (len(self.depths) - 1 - stage)

    def window(self, stage: int) -> tuple[int, int]:
        """(window, shift): a map no larger than the window is one window and never shifted."""
        resolution = self.units * self.unit_tokens(stage)
        if resolution <= self.window_size:
            return resolution, 0
        return self.window_size, self.window_size // 2


SMALL = {"embed_dim": 96, "num_heads": (3, 6, 12, 24)}
LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}
DEMO = {"input_size": 48, "embed_dim": 64, "depths": (2, 4), "num_heads": (2, 4)}
TEST = {"input_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}
MODELS = {
    "swin_b": ModelConfig(),
    "swin_b_win14": ModelConfig(window_size=14),
    "swin_l_win14": ModelConfig(**LARGE, window_size=14),
    "swin_t": ModelConfig(**SMALL, depths=(2, 2, 6, 2)),  # ours, by the same recipe
    "swin_s": ModelConfig(**SMALL),  # ours, by the same recipe
    "swin_demo": ModelConfig(**DEMO, window_size=6, decoder_dim=96, decoder_num_heads=3),  # ours
    "swin_test": ModelConfig(**TEST, window_size=3, decoder_dim=32, decoder_num_heads=2),  # ours
}
OTHER_NAMES = {  # timm's, and the constructors of released code
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "green_mim_swin_base_patch4_dec512b1": "swin_b",
    "green_mim_swin_base_patch4_win14_dec512b1": "swin_b_win14",
    "green_mim_swin_large_patch4_win14_dec512b1": "swin_l_win14",
}
RECIPES = {  # where the released scripts differ from the defaults below
    ("pretrain", "swin_b_win14"): {"blr": 1.5e-4},
    ("finetune", "swin_l_win14"): {
        "blr": 1e-3, "warmup_lr": 2e-7, "min_lr": 3.5e-7, "layer_decay": 0.8, "drop_path": 0.3,
    },
}  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """What every training run needs; a field's trailing comment is the flag's help."""

    model: str = "swin_b"  # network, our name or timm's (ours)
    data_path: str = ""  # images; none = a dry run, drawn:N = N built-in ones (ours)
    output_dir: str = "output"  # folder for checkpoints and log.txt (MAE)
    weights: str = ""  # file to start from, ours or released (ours)
    release: str = "corrected"  # corrected, 2023 or 2022: see the top of this file (ours)
    resume: str = "auto"  # a checkpoint; auto = newest in output_dir, none = afresh (ours)
    input_size: int | None = None  # pixels; none = the model's (paper: 224)
    window_size: int | None = None  # tokens per side; none = the model's (paper: 7 or 14)
    accum_iter: int = 1  # micro-batches per update (MAE)
    lr: float | None = None  # absolute learning rate, overrides blr (MAE)
    weight_decay: float = 0.05  # AdamW (released script)
    num_workers: int | None = None  # loader processes; none = by the number of cores (ours)
    seed: int = 0  # every random draw is a function of it (released script)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ... (ours)
    dtype: str = "auto"  # fp32 (TF32 on CUDA), bf16, fp16; auto = bf16 on CUDA, else fp32 (ours)
    compile: bool = False  # torch.compile; pre-training recompiles as groups change (ours)
    grad_checkpoint: bool = False  # recompute blocks in the backward pass (ours)
    fast_decode: bool = False  # JPEG draft decoding for camera-size photographs (ours)
    save_freq: int = 20  # epochs between checkpoints that are kept (MAE)
    save_every: float = 30.0  # minutes between writes of checkpoint-last.pth (ours)
    log_every: int = 50  # steps between log lines (ours)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Recipe of the released slurm scripts, 8 processes."""

    output_dir: str = "output/pretrain"  # checkpoints, log.txt, pictures, backbone (ours)
    batch_size: int = 256  # images per process (released script)
    epochs: int = 800  # passes over the data (released script)
    warmup_epochs: float = 40.0  # linear warm-up (released script)
    blr: float = 1e-4  # learning rate per 256 images (released script)
    min_lr: float = 0.0  # end of the cosine (released script)
    clip_grad: float | None = None  # largest gradient norm; none = any (released script)
    crop_min: float = 0.2  # smallest random crop, share of the image (released script)
    mask_ratio: float = 0.75  # share of hidden units (paper, Sec. 4.1)
    norm_pix_loss: bool = True  # normalise each target patch (released script)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """SimMIM's recipe with the values of GreenMIM's README, 8 processes."""

    output_dir: str = "output/finetune"  # checkpoints and log.txt (ours)
    linear_probe: bool = False  # train the head only: plain crops, no mixing (ours)
    nb_classes: int | None = None  # outputs; none = the number of class folders (ours)
    batch_size: int = 96  # images per process (released README: 768 in all)
    epochs: int = 100  # passes over the data (released config)
    warmup_epochs: float = 20.0  # linear warm-up (released config)
    blr: float = 1.25e-3  # learning rate per 512 images (released config)
    warmup_lr: float = 2.5e-7  # start of the warm-up, per 512 images (released config)
    min_lr: float = 2.5e-7  # end of the cosine, per 512 images (released config)
    clip_grad: float | None = 5.0  # largest gradient norm (SimMIM)
    layer_decay: float = 0.9  # learning rate factor from layer to layer (released config)
    drop_path: float = 0.1  # stochastic depth of the last block (released config)
    crop_min: float = 0.08  # smallest random crop, share of the image (SimMIM)
    mixup: float = 0.8  # Beta parameter, 0 = off (SimMIM)
    cutmix: float = 1.0  # Beta parameter, 0 = off (SimMIM)
    smoothing: float = 0.1  # label smoothing (SimMIM)
    reprob: float = 0.25  # probability of random erasing (SimMIM)
    aa: str = "rand-m9-mstd0.5-inc1"  # RandAugment policy, none = off (SimMIM)
    ema: float = 0.0  # decay of averaged weights, 0 = off (ours)
    test_freq: int = 1  # epochs between tests; the last is always tested (ours)


@dataclass(frozen=True)
class UseConfig:
    """What the commands that do not train need."""

    weights: str = ""  # checkpoint, ours or released (ours)
    model: str = ""  # network; none = as the checkpoint says, else swin_b (ours)
    data_path: str = ""  # folder, file or drawn:N; evaluate: with val/<class>/ (ours)
    output: str = ""  # file to write; none = a name by the command (ours)
    naming: str = "timm"  # export: timm or official parameter names (ours)
    release: str = "corrected"  # give 2022 for the published files (ours)
    per_stage: bool = False  # features: maps of every stage instead of a vector (ours)
    count: int = 8  # reconstruct: number of images (ours)
    mask_ratio: float = 0.75  # reconstruct: share of hidden units (paper, Sec. 4.1)
    input_size: int | None = None  # pixels; none = the checkpoint's (ours)
    window_size: int | None = None  # tokens per side; none = the checkpoint's (ours)
    batch_size: int = 64  # images per process (ours)
    num_workers: int | None = None  # loader processes; none = by the number of cores (ours)
    seed: int = 0  # of the mask; demo: of everything (ours)
    device: str = "auto"  # auto, cpu, cuda, ... (ours)
    dtype: str = "auto"  # fp32 (TF32 on CUDA), bf16, fp16; auto = bf16 on CUDA, else fp32 (ours)


LIMITS = {  # smallest and largest value: flags
    (1, math.inf): "batch_size accum_iter epochs save_freq log_every test_freq count nb_classes",
    (0, math.inf): "num_workers seed warmup_epochs lr blr min_lr warmup_lr weight_decay clip_grad "
    "save_every mixup cutmix",
    (0, 1): "mask_ratio layer_decay smoothing reprob",
    (0.001, 1): "crop_min",
    (0, 0.99999): "drop_path ema",
}


def model_config(name: str, base: ModelConfig | None = None, **changes: object) -> ModelConfig:
    """The named architecture, or `base`, with `changes` (None = keep); checks that all fit."""
    name = OTHER_NAMES.get(name, name)
    if not base and name not in MODELS:
        near = difflib.get_close_matches(name, [*MODELS, *OTHER_NAMES], 3, 0)
        raise InputError(f"unknown model {name!r}; the closest names are {', '.join(near)}")
    config = replace(base or MODELS[name], **{k: v for k, v in changes.items() if v is not None})
    unit, size, tokens = config.mask_unit, config.input_size, config.input_size // config.patch_size
    if size % unit or size < 2 * unit:
        low = max(2, size // unit) * unit
        raise InputError(
            f"--input_size {size} does not fit {name}: it must be a multiple of {unit}, "
            f"the nearest are {low} and {low + unit}"
        )
    if not 1 <= config.window_size <= tokens:
        raise InputError(f"--window_size {config.window_size} does not fit: it is 1 to {tokens}")
    if config.release not in ("corrected", "2023", "2022"):
        raise InputError(f"--release {config.release!r} is none of corrected, 2023, 2022")
    return config


# ── masking ───────────────────────────────────────────────────────────────────────────


def random_mask(noise: np.ndarray, mask_ratio: float) -> np.ndarray:
    """(U,) bool, True = hidden, from (U,) noise: the int(U (1 - ratio)) smallest stay visible."""
    kept = int(noise.size * (1 - mask_ratio))
    if not 1 <= kept < noise.size:
        raise InputError(
            f"--mask_ratio {mask_ratio} leaves {kept} of {noise.size} units visible: "
            "at least one must stay visible and one be hidden"
        )
    mask = np.ones(noise.shape, bool)
    mask[np.argsort(noise, kind="stable")[:kept]] = False
    return mask


# ── planning ──────────────────────────────────────────────────────────────────────────
# All that a mask decides is worked out on the host before the step, so that the model only
# indexes: no host synchronisation, no shape that depends on device data.


@dataclass(frozen=True)
class MaskPlan:
    """What the model has to know about one mask: NumPy arrays, or tensors after `to_device`."""

    patches: Tensor  # (N,) visible patches, raster order
    windows: list[list[grouping.GroupPlan]]  # for each stage: [plain] or [plain, shifted]
    merges: list[Tensor]  # for each stage but the last, (N,): tokens of 2x2 blocks side by side
    restore: Tensor  # (U,) for each decoder position: a latent, or V + i for a mask token
    hidden: Tensor  # (U - V,) decoder positions to predict


def plan_mask(config: ModelConfig, mask: np.ndarray, noise: np.ndarray | None = None) -> MaskPlan:
    """Plan for `mask` (U,) bool, True = hidden.

    `noise` (U,), which the mask was drawn from, matters to `release` "2023" and "2022" only.
    """
    if np.size(mask) != config.units**2:
        raise ValueError(f"the mask has {np.size(mask)} units, the model {config.units**2}")
    keep = ~np.asarray(mask, bool).reshape(config.units, config.units)
    legacy = config.release == "2022"
    tokens, windows = [], []
    for stage in range(len(config.depths)):
        k = config.unit_tokens(stage)
        side = config.units * k
        rows, columns = np.nonzero(keep.repeat(k, 0).repeat(k, 1))  # raster order
        tokens.append((rows, columns, side))
        if legacy and stage > 0:
            # The first release stored tokens unit by unit but read coordinates in raster order.
            n = (rows // k * config.units + columns // k) * k**2 + rows % k * k + columns % k
            rows, columns = n // side, n % side
        window, shift = config.window(stage)
        # Padding costs gathers rather than layers here, but this cost measured fastest (README).
        cost = grouping.layer_cost(config.embed_dim * 2**stage)
        sizing = partial(grouping.cheapest_groups, cost=cost)
        windows.append([])
        for s in (0, shift) if shift else (0,):
            ids = grouping.window_ids(rows, columns, window, s)
            windows[-1].append(grouping.plan_groups(rows, columns, ids, window, sizing))

    rows, columns, side = tokens[0]
    keep = keep.reshape(-1)
    visible, hidden = np.flatnonzero(keep), np.flatnonzero(~keep)
    order = np.arange(len(visible))
    if noise is not None and config.release != "corrected":
        order = np.argsort(np.argsort(noise[visible]))  # released code: rank of the noise
    restore = np.empty(keep.size, np.int64)
    restore[visible], restore[hidden] = order, len(visible) + np.arange(len(hidden))
    merges = [plan_merge(*stage, legacy) for stage in tokens[:-1]]
    return MaskPlan(rows * side + columns, windows, merges, restore, hidden)


def plan_merge(rows: np.ndarray, columns: np.ndarray, side: int, legacy: bool) -> np.ndarray:
    """(N,) visible tokens of a (side, side) map, block by block, inside a block as Eq. (4)."""
    number = np.full((side, side), -1)
    number[rows, columns] = np.arange(len(rows))
    inside = "(p q)" if legacy else "(q p)"
    blocks = rearrange(number, f"(h p) (w q) -> (h w) {inside}", p=2, q=2)
    return blocks[blocks[:, 0] >= 0].reshape(-1)


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
    if isinstance(plan, list):
        return [to_device(item, device) for item in plan]
    if is_dataclass(plan):
        moved = {f.name: to_device(getattr(plan, f.name), device) for f in fields(plan)}
        return replace(plan, **moved)
    return plan


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


class Mlp(nn.Module):
    """Eq. (3) without its residual."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GroupWindowAttention(nn.Module):
    """Eq. (2) without its residual: window attention over whatever tokens the plan groups.

    With nothing masked this is Swin's (shifted) window attention: every group is then a window,
    or the pieces of cut windows that Swin's roll would put side by side.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        rows = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, plan: grouping.GroupPlan) -> Tensor:
        """(B, N, C) -> (B, N, C); for the plan's fields see `grouping.GroupPlan`."""
        groups, _, size, _ = plan.bias.shape
        x = self.qkv(x)  # (B, N, 3C)
        if plan.slots is not None:
            x = x.index_select(1, plan.slots)  # (B, G * S, 3C)
        layout = "b (g s) (three h d) -> three b (g h) s d"
        q, k, v = rearrange(x, layout, three=3, g=groups, h=self.num_heads)
        bias = self.relative_position_bias_table.index_select(0, plan.index.reshape(-1))
        bias = rearrange(bias, "(g s t) h -> g h s t", g=groups, s=size) + plan.bias
        x = attend(q, k, v, bias.flatten(0, 1).unsqueeze(0))  # Eq. (2)
        x = rearrange(x, "b (g h) s d -> b (g s) (h d)", g=groups)
        if plan.places is not None:
            x = x.index_select(1, plan.places)  # (B, N, C)
        return self.proj(x)


class Attention(nn.Module):
    """Full self-attention of the decoder."""

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

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, eps: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, *plan: grouping.GroupPlan) -> Tensor:
        dropped = self.drop_path if self.training else 0.0
        x = x + drop_path(self.attn(self.norm1(x), *plan), dropped)
        return x + drop_path(self.mlp(self.norm2(x)), dropped)  # Eq. (3)


class PatchEmbed(nn.Module):
    """Eq. (1): the stride-4 convolution as a matrix product, on the visible patches only."""

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
    """Eq. (4): a visible 2x2 block becomes one token; units are whole, so blocks are too."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, merge: Tensor) -> Tensor:
        """(B, N, C) -> (B, N / 4, 2C)"""
        x = rearrange(x.index_select(1, merge), "b (n four) c -> b n (four c)", four=4)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Blocks that alternate between the plain and the shifted plan, then merging."""

    def __init__(
        self, config: ModelConfig, stage: int, eps: float, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
        window, _ = config.window(stage)
        self.blocks = nn.ModuleList(
            Block(dim, GroupWindowAttention(dim, heads, window), config.mlp_ratio, eps, p)
            for p in drop_paths
        )
        last = stage == len(config.depths) - 1
        self.downsample = nn.Identity() if last else PatchMerging(dim, eps)
        self.grad_checkpoint = False

    def forward(self, x: Tensor, windows: list[grouping.GroupPlan]) -> Tensor:
        for j, block in enumerate(self.blocks):
            plan = windows[j % len(windows)]
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, plan, use_reentrant=False)
            else:
                x = block(x, plan)
        return x


# ── encoder ───────────────────────────────────────────────────────────────────────────


class SwinEncoder(nn.Module):
    """Swin over the visible tokens; with nothing masked, plain Swin."""

    def __init__(self, config: ModelConfig, eps: float = 1e-6, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim, eps)
        rates = iter(np.linspace(0, drop_path, sum(config.depths)).tolist())
        self.layers = nn.ModuleList(
            SwinStage(config, stage, eps, [next(rates) for _ in range(depth)])
            for stage, depth in enumerate(config.depths)
        )
        self.num_features = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.norm = nn.LayerNorm(self.num_features, eps)
        self.dense_plans: dict[torch.device, MaskPlan] = {}

    def dense_plan(self, device: torch.device) -> MaskPlan:
        """The plan with nothing masked, made once."""
        if device not in self.dense_plans:
            nothing = np.zeros(self.config.units**2, bool)
            self.dense_plans[device] = to_device(plan_mask(self.config, nothing), device)
        return self.dense_plans[device]

    def stages(self, images: Tensor, plan: MaskPlan | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> visible tokens (B, N, C) of every stage, before merging and norm."""
        if images.shape[-2:] != (self.config.input_size,) * 2:
            raise ValueError(f"images are {tuple(images.shape)}, not {self.config.input_size} px")
        plan = self.dense_plan(images.device) if plan is None else plan
        x = self.patch_embed(images, plan.patches)  # (B, N, C)
        outputs = []
        for stage, layer in enumerate(self.layers):
            x = layer(x, plan.windows[stage])
            outputs.append(x)
            if stage < len(self.layers) - 1:
                x = layer.downsample(x, plan.merges[stage])
        return outputs

    def forward(self, images: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, V, C): units that the plan leaves visible, all without a plan."""
        return self.norm(self.stages(images, plan)[-1])


# ── decoder and target ────────────────────────────────────────────────────────────────


def sincos_embedding(dim: int, side: int) -> Tensor:
    """(1, side^2, dim) fixed table, raster order: sin and cos of the column, then of the row."""
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    rows, columns = (axis[:, None] * omega for axis in np.divmod(np.arange(side**2), side))
    table = np.hstack([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)])
    return torch.from_numpy(table).float().unsqueeze(0)


def patchify(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, U, P), a patch as (row, column, channel)."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, U, P) -> Eq. (5), and the mean and deviation (B, U, 1) that undo it."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as released
    deviation = (variance + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


# ── model ─────────────────────────────────────────────────────────────────────────────


class GreenMIM(nn.Module):
    """Encoder on visible tokens, one-block decoder on all units, pixels of the hidden ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.decoder_dim
        self.encoder = SwinEncoder(config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("decoder_pos_embed", sincos_embedding(dim, config.units))
        self.decoder_embed = nn.Linear(self.encoder.num_features, dim)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, Attention(dim, config.decoder_num_heads), config.mlp_ratio, 1e-6)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, 1e-6)
        self.decoder_pred = nn.Linear(dim, config.mask_unit**2 * 3)

        nn.init.normal_(self.mask_token, std=0.02)
        # Released code lets the wrapper re-initialise the encoder, but not the bias of the
        # patch embedding, which keeps PyTorch's default.
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def decode(self, latent: Tensor, plan: MaskPlan) -> Tensor:
        """(B, V, C) -> (B, U, D): latents and mask tokens in their places, through the blocks."""
        x = self.decoder_embed(latent)
        tokens = self.mask_token.to(x.dtype).expand(len(x), len(plan.hidden), -1)
        x = torch.cat([x, tokens], dim=1).index_select(1, plan.restore) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def predict(self, images: Tensor, mask: MaskPlan | np.ndarray | Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, U, P) predictions of all units, the visible ones too."""
        plan = self.plan(mask, images.device)
        x = self.decode(self.encoder(images, plan), plan)
        return self.decoder_pred(self.decoder_norm(x)).float()

    def forward(
        self, images: Tensor, mask: MaskPlan | np.ndarray | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss, and predictions (B, U - V, P) of the hidden units, for (B, 3, H, W) images.

        `mask` is (U,) bool, True = hidden, the same for all images; or its plan, made ahead.
        """
        plan = self.plan(mask, images.device)
        x = self.decode(self.encoder(images, plan), plan).index_select(1, plan.hidden)
        prediction = self.decoder_pred(self.decoder_norm(x)).float()
        target = patchify(images, self.config.mask_unit).index_select(1, plan.hidden)
        if self.config.norm_pix_loss:
            target, _, _ = normalize_patches(target)
        return F.mse_loss(prediction, target), prediction  # Eq. (6)

    def plan(self, mask: MaskPlan | np.ndarray | Tensor, device: torch.device) -> MaskPlan:
        if isinstance(mask, MaskPlan):
            return mask
        mask = torch.as_tensor(mask).cpu().numpy().reshape(-1)
        return to_device(plan_mask(self.config, mask), device)


# ── weights ───────────────────────────────────────────────────────────────────────────

CONFIG = {f.name for f in fields(ModelConfig)}  # what our files say of the architecture
# Computed here, so neither needed from a file nor saved (but see `export_state`).
INDEX_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")


def read_checkpoint(path: str | Path) -> dict:
    """A .pth or .safetensors file as {"model": state dict, ...}; never runs code from the file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such weights file")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return {"model": load_file(path), "args": {}}
        torch.serialization.add_safe_globals([argparse.Namespace])  # in released files
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols
            file = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path}: to read it, pip install safetensors") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"would run code ({found[1]})" if found else "is not a PyTorch checkpoint"
        raise InputError(f"{path}: refused, because it {reason}") from None
    except Exception as error:  # truncated or foreign files raise almost anything
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(file, dict) or not isinstance(file.get("model"), dict):
        file = {"model": file}
    state, run = file["model"], file.get("args", {})
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state dict, at the top or under 'model'")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    run = vars(run) if isinstance(run, argparse.Namespace) else run
    run = run if isinstance(run, dict) else {}
    if not isinstance(run.get("config"), dict):  # not ours: only a model that we know means a thing
        run = {k: v for k, v in run.items() if k not in ("config", "classes")}
        if not isinstance(run.get("model"), str) or run["model"] not in OTHER_NAMES:
            run.pop("model", None)
    elif not set(run["config"]) <= CONFIG:
        raise InputError(f"{path}: was written by another script than greenmim.py")
    return file | {"model": state, "args": run}


def swin_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoder and head in Swin's names, from GreenMIM, SimMIM, Swin or timm ones."""
    if any(k.startswith("encoder.") for k in state):
        state = {k[8:]: v for k, v in state.items() if k.startswith("encoder.")}
    dropped = (*INDEX_BUFFERS, "mask_token")  # SimMIM keeps a mask token in its encoder
    state = {k: v for k, v in state.items() if not k.endswith(dropped)}
    if "layers.0.downsample.norm.weight" not in state:  # timm merges at the start of a stage
        stage = re.compile(r"layers\.(\d+)\.downsample")
        state = {
            stage.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample", k): v
            for k, v in state.items()
        }
    return {k.replace("head.fc.", "head."): v for k, v in state.items()}


def swap_merging(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first release's merging order (0,0), (0,1), (1,0), (1,1) to Eq. (4), or back."""
    return {
        k: v.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2) if ".downsample." in k else v
        for k, v in state.items()
    }


def load_encoder(model: SwinEncoder, path: str, release: str = "corrected") -> str:
    """Load `path` into an encoder or classifier, of which only a head may stay fresh.

    Our files know their `release`. Returns a sentence on what was adapted; InputError names what
    does not fit.
    """
    file, own, notes = read_checkpoint(path), model.state_dict(), []
    state = swin_names(file["model"])
    if file["args"].get("config", {"release": release})["release"] == "2022":
        state = swap_merging(state)
        notes.append("merging weights of the first release reordered")
    if resized := resize_tables(state, own):
        notes.append(f"{resized} relative position tables interpolated")
    head = {k for k in own if k.startswith("head.")}
    if any(k not in state or state[k].shape != own[k].shape for k in head):
        notes.append("the head starts fresh")
        own = {k: v for k, v in own.items() if k not in head}
        head = set()
    state = {k: v for k, v in state.items() if k in head or not k.startswith("head.")}
    check_keys(f"{path} (of --model {file['args'].get('model', 'unknown')})", state, own)
    model.load_state_dict(state, strict=False)
    return f"loaded {path}: {', '.join(notes) or 'all weights as they are'}"


def load_model(model: GreenMIM, path: str) -> None:
    """Load a whole pre-training file, ours or released."""
    state, own = read_checkpoint(path)["model"], model.state_dict()
    state = {k: v for k, v in state.items() if not k.endswith(INDEX_BUFFERS)}
    if not any(k.startswith("decoder_pred.") for k in state):
        raise InputError(f"{path} has no decoder (mask_token, ...): give a pre-training checkpoint")
    resize_tables(state, own)
    state["decoder_pos_embed"] = own["decoder_pos_embed"]  # computed, for the size in use
    check_keys(path, state, own)
    model.load_state_dict(state)


def resize_tables(state: dict[str, Tensor], own: dict[str, Tensor]) -> int:
    """Interpolate the relative position tables of `state` that are of another window; how many."""
    tables = [k for k in own if k.endswith("bias_table") and k in state]
    resized = {
        k: resize_bias_table(state[k], len(own[k]))
        for k in tables
        if len(state[k]) != len(own[k]) and state[k].shape[1] == own[k].shape[1]
    }
    state.update(resized)
    return len(resized)


def check_keys(path: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """InputError that names the differences between a file and a model, three in full."""
    wrong = [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
             for k in own if k in state and state[k].shape != own[k].shape]  # fmt: skip
    wrong += [f"{k} is missing" for k in own if k not in state]
    wrong += [f"{k} is unexpected" for k in state if k not in own]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path} is not of this --model: {'; '.join(wrong[:3])}{more}")


def resize_bias_table(table: Tensor, rows: int) -> Tensor:
    """((2w - 1)^2, h) relative position table -> (rows, h), as SimMIM does it.

    Old entries are taken to stand at geometrically growing distances x that span the new window;
    a bicubic not-a-knot spline through them is read at the new distances t: W Z W^T per head.
    """
    source, target = math.isqrt(len(table)), math.isqrt(rows)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (source // 2)) / (1 - q) > target // 2:
            high = q
        else:
            low = q
    steps = np.cumsum(q ** np.arange(source // 2))
    x = np.concatenate([-steps[::-1], [0.0], steps])
    t = np.clip(np.arange(target) - target // 2, x[0], x[-1])

    def basis(at: np.ndarray) -> np.ndarray:
        # Not-a-knot: no third derivative jumps at the second and the last but one point.
        at, knots = at[:, None] / max(x[-1], 1), x[2:-2] / max(x[-1], 1)
        cubic = at ** np.arange(min(source, 4))
        return np.hstack([cubic, np.maximum(at - knots, 0) ** 3])

    w = torch.from_numpy(np.linalg.solve(basis(x).T, basis(t).T).T)
    z = rearrange(table.double(), "(r c) h -> h r c", r=source)
    return rearrange(w @ z @ w.T, "h r c -> (r c) h").to(table.dtype)


def export_state(model: SwinEncoder, naming: str) -> dict[str, Tensor]:
    """State dict that loads strictly into timm's or the official Swin of the same size."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    state = swap_merging(state) if model.config.release == "2022" else state
    if naming == "timm":
        stage = re.compile(r"layers\.(\d+)\.downsample")
        state = {
            stage.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample", k): v
            for k, v in state.items()
        }
        return {re.sub(r"^head\.", "head.fc.", k): v for k, v in state.items()}
    if naming != "official":
        raise InputError(f"--naming {naming!r} is none of timm, official")
    for i, layer in enumerate(model.layers):
        window, shift = model.config.window(i)
        side = model.config.units * model.config.unit_tokens(i)
        rows, columns = np.divmod(np.arange(window**2), window)
        one = grouping.plan_groups(rows, columns, rows * 0, window, grouping.cheapest_groups)
        for j in range(len(layer.blocks)):
            prefix = f"layers.{i}.blocks.{j}."
            state[prefix + "attn.relative_position_index"] = torch.from_numpy(one.index[0].copy())
            if shift and j % 2 and side % window == 0:  # else Swin itself does not exist
                # Swin rolls the map, cuts it into whole windows and masks what the roll joined.
                edge = (np.arange(side) >= side - window) * 1 + (np.arange(side) >= side - shift)
                region = torch.from_numpy(3 * edge[:, None] + edge)
                region = rearrange(region, "(h p) (w q) -> (h w) (p q)", p=window, q=window)
                state[prefix + "attn_mask"] = (region[:, :, None] != region[:, None]) * -100.0
    return state


def save_state(content: dict, path: Path) -> None:
    """`save_file` for a .pth or .safetensors file."""
    if path.suffix != ".safetensors":
        return save_file(path, lambda file: torch.save(content, file))
    try:
        from safetensors.torch import save
    except ImportError:
        raise InputError(f"{path}: to write it, pip install safetensors") from None
    save_file(path, lambda file: file.write(save(content)))


def save_file(path: Path, write: Callable[[typing.BinaryIO], None]) -> None:
    """Write a file so that a crash or a full disk leaves an earlier one whole."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        reason = (str(error.__context__ or error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"cannot write {path}, what was there is intact: {reason}") from None


# ── distributed and optimisation ──────────────────────────────────────────────────────


@dataclass(frozen=True)
class Process:
    """This process among all; device and number format of its work."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def setup_process(device: str, dtype: str) -> Process:
    """Join torchrun's group, if any; InputError if the device cannot do what is asked."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if device.startswith("cuda"):
        if not cuda:
            raise InputError(f"--device {device}: this machine has no usable CUDA device")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
        torch.set_float32_matmul_precision("high")  # TF32
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device} does not work here: {reason}") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype == "auto":
        dtype = "bf16" if device.startswith("cuda") else "fp32"
    if dtype not in kinds:
        raise InputError(f"--dtype {dtype!r} is none of auto, {', '.join(kinds)}")
    old = device.startswith("cuda") and torch.cuda.get_device_capability() < (8, 0)
    if dtype == "bf16" and old and torch.version.hip is None:  # it would be emulated, slowly
        raise InputError("this GPU has no bf16; --dtype fp16 and --dtype fp32 work")
    if device == "cpu":
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except (RuntimeError, ValueError) as error:
            port, reason = os.environ.get("MASTER_PORT"), str(error).splitlines()[0]
            raise InputError(
                f"cannot meet the other processes at port {port}; if it is in use, choose another "
                f"with torchrun --master_port: {reason}"
            ) from None
    return Process(rank, world_size, torch.device(device), kinds[dtype])


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of returning them to the system.

    Every step frees and takes the same gigabyte; clearing its pages anew cost 4% of a step of
    Swin-B in fp32 and 15% in bf16 on two cores.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def parameter_groups(
    model: nn.Module, weight_decay: float, depths: Sequence[int] = (), layer_decay: float = 1.0
) -> list[dict]:
    """AdamW groups: no decay for vectors, biases, tables and tokens; `lr_scale` by layer."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith((".bias", "bias_table")) or "token" in name
        scale = layer_decay ** (sum(depths) + 1 - layer_id(name, depths))
        if parameter.requires_grad:
            key = (0.0 if exempt else weight_decay, scale)
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "weight_decay": d, "lr_scale": s} for (d, s), p in groups.items()]


def layer_id(name: str, depths: Sequence[int]) -> int:
    """0 for the patch embedding, 1.. for blocks; a merging counts with the block before it."""
    if name.startswith("patch_embed."):
        return 0
    if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
        return sum(depths[: int(found[1])]) + int(found[2]) + 1
    if found := re.match(r"layers\.(\d+)\.downsample\.", name):
        return sum(depths[: int(found[1]) + 1])
    return sum(depths) + 1


def pretrain_lr(epoch: float, lr: float, min_lr: float, warmup: float, epochs: float) -> float:
    """MAE's schedule at a fractional epoch: linear from 0, then a cosine to min_lr."""
    if epoch < warmup:
        return lr * epoch / warmup
    cosine = math.cos(math.pi * (epoch - warmup) / (epochs - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + cosine)


def finetune_lr(
    update: int, lr: float, warmup_lr: float, min_lr: float, warmup: int, total: int
) -> float:
    """SimMIM's schedule: one update late, and its cosine is not moved by the warm-up."""
    t = max(update - 1, 0)
    if t < warmup:
        return warmup_lr + t * (lr - warmup_lr) / warmup
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * t / total))


def apply_gradients(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> bool:
    """Step, or return False (on every process: they share gradients) if one is not finite."""
    scaler.unscale_(optimizer)
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm()
    if finite := bool(norm.isfinite()):  # the one host synchronisation of a step
        if clip_grad:
            for gradient in gradients:
                gradient.mul_((clip_grad / (norm + 1e-6)).clamp(max=1.0))
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return finite


def find_checkpoint(cfg: RunConfig, run: dict) -> dict | None:
    """The checkpoint to continue from; an error rather than a silent fresh start."""
    paths, problems = [Path(cfg.resume)], []
    if cfg.resume in ("auto", "none"):
        found = Path(cfg.output_dir).glob("checkpoint-*.pth") if cfg.output_dir else ()
        newest_first = sorted(found, key=os.path.getmtime, reverse=True)
        paths = newest_first if cfg.resume == "auto" else []
    for path in paths:
        try:
            file = read_checkpoint(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if not {"step", "optimizer", "scaler"} <= set(file) or "config" not in file["args"]:
            raise InputError(f"{path} is no checkpoint to resume; --weights can start from it")
        there, here = ({**r["config"], **r, "config": None} for r in (file["args"], run))
        wrong = [f"{k} {v!r}, not {here.get(k)!r}" for k, v in there.items() if v != here.get(k)]
        if wrong:
            raise InputError(f"cannot resume: {path} has {'; '.join(wrong)}")
        for problem in problems:
            print(f"{problem}; resuming from {path} instead", file=sys.stderr)
        return file
    if problems:
        raise InputError(f"no checkpoint can be resumed: {'; '.join(problems)}")
    return None


def restore(
    cfg: RunConfig, process: Process, run: dict, parts: dict, loader: data.TrainLoader
) -> int:
    """Load the newest checkpoint, if any, into `parts`; the step to go on from."""
    batch = cfg.batch_size * cfg.accum_iter * process.world_size
    run |= {"batch": batch, "images": len(loader.source)}
    run |= {"fp16": process.dtype is torch.float16}
    keys = ("seed", "weight_decay", "layer_decay", "linear_probe", "ema", "nb_classes")
    run |= {key: getattr(cfg, key) for key in keys if hasattr(cfg, key)}
    step = 0
    if state := find_checkpoint(cfg, run):
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        process.say(f"resumed at step {step} of {cfg.epochs * len(loader)}")
    if process.sum(torch.tensor(float(step), device=process.device)) != step * process.world_size:
        raise InputError("the processes found different checkpoints; all nodes must share a disk")
    return step


def worker_count(asked: int | None) -> int:
    """Loader processes: as asked, else by the cores for each process of this node, at most 8."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, (os.cpu_count() or 1) // here) if asked is None else asked


def prepare(
    cfg: RunConfig, process: Process, source: data.ImageFiles | None, crop: Callable, per: int
) -> tuple[RunConfig, data.TrainLoader, float]:
    """Loader and peak learning rate (cfg.blr is for `per` images); no source = a dry run."""
    if dry := source is None:
        if process.device.type == "cpu" and cfg.batch_size == type(cfg).batch_size:
            cfg = replace(cfg, batch_size=8)  # a recipe's batch is made for a GPU
        cfg = replace(cfg, epochs=1, warmup_epochs=0, output_dir="", resume="none", num_workers=0)
    batch = cfg.batch_size * cfg.accum_iter * process.world_size
    source = data.DrawnImages("train", 10 * batch) if dry else source
    if cfg.output_dir and process.rank == 0:  # an error now rather than after hours
        probe = Path(cfg.output_dir) / ".writable"
        save_file(probe, lambda file: None)
        probe.unlink()
    loader = data.TrainLoader(
        source, crop, batch_size=cfg.batch_size, seed=cfg.seed, rank=process.rank,
        world_size=process.world_size, accum_iter=cfg.accum_iter,
        num_workers=worker_count(cfg.num_workers), pin_memory=process.device.type == "cuda",
    )  # fmt: skip
    lr = cfg.blr * batch / per if cfg.lr is None else cfg.lr
    process.say(
        f"{len(source)} images, {len(loader)} steps an epoch; batch {cfg.batch_size} x "
        f"{cfg.accum_iter} x {process.world_size} processes = {batch}; lr {lr:.3g}"
        + ("" if cfg.lr is not None else f" = blr {cfg.blr:g} * {batch} / {per}")
    )
    return cfg, loader, lr


# ── training loop ─────────────────────────────────────────────────────────────────────


def train(
    cfg: RunConfig,
    process: Process,
    parts: dict,
    loader: data.TrainLoader,
    run: dict,
    schedule: Callable[[int, float], float],
    loss_of: Callable[[nn.Module, Tensor, Tensor, int], Tensor],
    end_of_epoch: Callable[[int], dict],
) -> None:
    """The loop of `pretrain` and `finetune`.

    `parts` (model, optimizer, ema) and `run` (must agree on resuming) make a checkpoint.
    `schedule(step, lr_scale)` is a group's learning rate, `loss_of(net, images, labels, number)`
    the loss of micro-batch `number`, `end_of_epoch(epoch)` adds to the log.
    """
    device, output = process.device, Path(cfg.output_dir)
    batch = cfg.batch_size * cfg.accum_iter * process.world_size
    writes = bool(cfg.output_dir) and process.rank == 0
    scaler = torch.amp.GradScaler(device.type, enabled=process.dtype is torch.float16)
    optimizer, net, parts = parts["optimizer"], parts["model"], parts | {"scaler": scaler}
    per_epoch, total = len(loader), cfg.epochs * len(loader)
    step = restore(cfg, process, run, parts, loader)
    good = output / "checkpoint-last.pth" if step else "none yet"

    def save(name: str) -> Path:
        content = {name: part.state_dict() for name, part in parts.items()}
        content |= {"epoch": step // per_epoch, "step": step, "args": run}
        save_state(content, output / name)
        return output / name

    net = process.wrap(torch.compile(net) if cfg.compile else net)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    batches, saved = loader.batches(step, total), time.monotonic()
    losses, seconds, waited, skipped, in_a_row, stopping = [], [], 0.0, 0, 0, False
    bar = tqdm(total=total, initial=step, disable=process.rank > 0 or not sys.stderr.isatty())
    while step < total and not stopping:
        started = time.perf_counter()
        net.train()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, group["lr_scale"])
        seeds = np.random.SeedSequence((cfg.seed, step, process.rank, 0))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
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
        anyone = process.sum(torch.full((), float(stop.is_set()), device=device))
        finite = apply_gradients(optimizer, scaler, cfg.clip_grad)
        stopping = bool(anyone)  # the host has just waited for the device
        skipped, in_a_row = skipped + (not finite), 0 if finite else in_a_row + 1
        if in_a_row == 20:
            raise SystemExit(f"20 steps without a finite gradient; last good checkpoint: {good}")
        step += 1
        bar.update()
        seconds.append(time.perf_counter() - started)
        speed = batch / statistics.median(seconds[-99:])
        if step % cfg.log_every == 0 and bar.disable:
            loss = torch.stack(losses[-cfg.log_every :]).mean().item()
            process.say(f"step {step}/{total}: loss {loss:.4f}, {speed:.1f} images/s")
        if step % per_epoch == 0:
            epoch = step // per_epoch - 1
            record = {"epoch": epoch} | epoch_totals(process, losses, loader.unreadable)
            record |= {"train_lr": max(group["lr"] for group in optimizer.param_groups)}
            record |= {"images_per_second": speed, "data_wait": waited / sum(seconds)}
            record |= {"memory_gb": memory_gb(device), "skipped_steps": skipped}
            record |= end_of_epoch(epoch)
            if writes:
                write_log(output, record)
                if (epoch + 1) % cfg.save_freq == 0 or step == total:
                    save(f"checkpoint-{epoch}.pth")
            losses, seconds, waited = [], [], 0.0
            process.say(", ".join(f"{k} {v:.4g}" for k, v in record.items()))
        if writes and (step % per_epoch == 0 or time.monotonic() - saved > 60 * cfg.save_every):
            good, saved = save("checkpoint-last.pth"), time.monotonic()
    if writes and stopping:
        good = save("checkpoint-last.pth")
    process.sum(torch.zeros((), device=device))  # nobody leaves before all is written
    if stopping and step < total:
        process.say(f"stopped after step {step}; the same command continues from {good}")
        raise SystemExit(0)


def epoch_totals(process: Process, losses: list[Tensor], unreadable: int) -> dict:
    """Mean of the finite losses and number of unreadable images, over all processes."""
    loss = torch.stack(losses)
    kept = loss.isfinite()
    counts = torch.stack([loss[kept].sum(), kept.sum(), torch.full_like(loss[0], unreadable)])
    total, number, unreadable = process.sum(counts).tolist()
    return {"train_loss": total / max(number, 1), "unreadable_images": int(unreadable)}


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def write_log(output: Path, record: dict) -> None:
    """Append to log.txt, and to TensorBoard where it is installed."""
    try:
        with open(output / "log.txt", "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {output / 'log.txt'}: {error.strerror}") from None
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(output)) as board:
            for name, value in record.items():
                board.add_scalar(name, value, record["epoch"])
            picture = output / f"reconstruction-{record['epoch']}.png"
            if picture.exists():
                pixels = np.asarray(Image.open(picture))
                board.add_image("reconstruction", pixels, record["epoch"], dataformats="HWC")


# ── pre-training ──────────────────────────────────────────────────────────────────────


def pretrain(cfg: PretrainConfig) -> None:
    """Pre-train on any tree of images; without --data_path, ten steps on the built-in ones."""
    process = setup_process(cfg.device, cfg.dtype)
    config = model_config(
        cfg.model, input_size=cfg.input_size, window_size=cfg.window_size, release=cfg.release,
        norm_pix_loss=cfg.norm_pix_loss,
    )  # fmt: skip
    shown = draw_plan(config, cfg.mask_ratio, (cfg.seed,))  # of the pictures; checks the ratio
    source = open_images(cfg.data_path) if cfg.data_path else None
    crop = data.TrainCrop(config.input_size, (cfg.crop_min, 1.0), fast_decode=cfg.fast_decode)
    cfg, loader, lr = prepare(cfg, process, source, crop, 256)

    torch.manual_seed(cfg.seed)
    model = GreenMIM(config)
    if cfg.weights:
        load_model(model, cfg.weights)
    for layer in model.encoder.layers:
        layer.grad_checkpoint = cfg.grad_checkpoint
    model.to(process.device)
    groups = parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95), fused=process.device.type != "mps")
    run = {"command": "pretrain", "model": cfg.model, "config": asdict(config)}

    # Masks are planned one micro-batch ahead on a thread, so never on the device's time.
    planner, ahead = ThreadPoolExecutor(1), {}

    def loss_of(net: nn.Module, images: Tensor, _: Tensor, number: int) -> Tensor:
        for n in (number, number + 1):
            if n not in ahead:
                seed = (cfg.seed, n, process.rank, 1)
                ahead[n] = planner.submit(draw_plan, config, cfg.mask_ratio, seed)
        loss, _ = net(images, to_device(ahead.pop(number).result(), process.device))
        return loss

    def schedule(step: int, scale: float) -> float:
        epoch = step / len(loader)
        return scale * pretrain_lr(epoch, lr, cfg.min_lr, cfg.warmup_epochs, cfg.epochs)

    def end_of_epoch(epoch: int) -> dict:
        due = (epoch + 1) % cfg.save_freq == 0 or epoch == cfg.epochs - 1
        if due and cfg.output_dir and process.rank == 0:
            output = Path(cfg.output_dir)
            crop = data.EvalCrop(config.input_size)
            pixels, _, _ = next(data.eval_batches(loader.source, crop, batch_size=8))
            picture = draw_reconstructions(model, pixels, shown)
            save_picture(picture, output / f"reconstruction-{epoch}.png")
            plain = run | {"config": asdict(replace(config, release="corrected"))}
            backbone = {"model": export_state(model.encoder, "official"), "args": plain}
            save_state(backbone, output / "backbone.pth")
        return {}

    parts = {"model": model, "optimizer": optimizer}
    train(cfg, process, parts, loader, run, schedule, loss_of, end_of_epoch)
    if not cfg.data_path:
        process.say("dry run: to pre-train on your images, give --data_path FOLDER")


# ── fine-tuning ───────────────────────────────────────────────────────────────────────


class SwinClassifier(SwinEncoder):
    """Dense Swin with a linear head on the mean token, in Swin's own parameter names."""

    def __init__(self, config: ModelConfig, num_classes: int, drop_path: float = 0.0) -> None:
        super().__init__(config, eps=1e-5, drop_path=drop_path)
        self.head = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        return self.head(super().forward(images).mean(1))


def build_classifier(
    cfg: FinetuneConfig, config: ModelConfig, num_classes: int, say: Callable[[str], None]
) -> SwinClassifier:
    """Classifier with the weights of `cfg`; for a linear probe only the head can learn."""
    model = SwinClassifier(config, num_classes, cfg.drop_path)
    if cfg.weights:
        say(load_encoder(model, cfg.weights, cfg.release))
    if cfg.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    for layer in model.layers:
        layer.grad_checkpoint = cfg.grad_checkpoint
    return model


def best_so_far(cfg: FinetuneConfig) -> float:
    """Top-1 of best.pth if this run goes on from a checkpoint, else 0."""
    output = Path(cfg.output_dir)
    resumes = cfg.output_dir and cfg.resume != "none" and any(output.glob("checkpoint-*.pth"))
    if not resumes or not (output / "best.pth").exists():
        return 0.0
    return read_checkpoint(output / "best.pth").get("test_acc1", 0.0)


def finetune_crop(cfg: FinetuneConfig, size: int) -> data.TrainCrop:
    """Random crop, flip and RandAugment; InputError if policy or batch do not work."""
    if (cfg.mixup or cfg.cutmix) and cfg.batch_size % 2:
        raise InputError(f"--batch_size {cfg.batch_size} is odd: mixup and cutmix pair images")
    try:
        policy = augment.RandAugment(cfg.aa) if cfg.aa not in ("", "none") else None
    except ValueError as error:
        raise InputError(f"--aa: {error}") from None
    scale = (cfg.crop_min, 1.0)
    return data.TrainCrop(size, scale, augment=policy, fast_decode=cfg.fast_decode)


@torch.no_grad()
def accuracy(
    model: nn.Module, process: Process, source: data.ImageFiles, batch_size: int, workers: int
) -> dict:
    """Loss, top-1 and top-5 in percent over a labelled source, each image counted once."""
    model.eval()
    totals = torch.zeros(4, device=process.device)
    crop = data.EvalCrop(model.config.input_size, "simmim")
    batches = data.eval_batches(
        source, crop, batch_size=batch_size, rank=process.rank,
        world_size=process.world_size, num_workers=workers,
    )  # fmt: skip
    for images, labels, _ in batches:
        labels = labels.to(process.device)
        with process.autocast():
            logits = model(data.normalize(images.to(process.device))).float()
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = torch.tensor(float(len(labels)), device=process.device)
        totals += torch.stack([loss, right[:, 0].sum(), right.any(1).sum(), count])
    loss, top1, top5, count = process.sum(totals).tolist()
    if not count:
        raise InputError("none of the validation images can be read")
    return {"test_loss": loss / count, "test_acc1": 100 * top1 / count,
            "test_acc5": 100 * top5 / count, "test_images": int(count)}  # fmt: skip


def finetune(cfg: FinetuneConfig) -> dict:
    """Train a classifier on train/<class>/, test it on val/<class>/; returns the last accuracy."""
    process = setup_process(cfg.device, cfg.dtype)
    sizes = {"input_size": cfg.input_size, "window_size": cfg.window_size}
    config = model_config(cfg.model, release=cfg.release, **sizes)
    config = replace(config, release="corrected")  # loading adapts older weights
    plain = {"mixup": 0, "cutmix": 0, "smoothing": 0, "reprob": 0, "aa": "", "drop_path": 0}
    cfg = replace(cfg, **plain) if cfg.linear_probe else cfg
    source, test, classes = None, None, [str(c) for c in range(1000)]  # of a dry run
    if cfg.data_path:
        source, test = (open_images(cfg.data_path, split) for split in ("train", "val"))
        classes = source.classes
        check_classes(classes, test.classes, cfg.nb_classes or len(classes))
    num_classes = cfg.nb_classes or len(classes)
    cfg, loader, lr = prepare(cfg, process, source, finetune_crop(cfg, config.input_size), 512)
    mixup = augment.Mixup(cfg.mixup, cfg.cutmix, smoothing=cfg.smoothing, num_classes=num_classes)

    torch.manual_seed(cfg.seed)
    model = build_classifier(cfg, config, num_classes, process.say).to(process.device)
    model.dense_plan(process.device)  # not while torch.compile looks on
    groups = parameter_groups(model, cfg.weight_decay, config.depths, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr, fused=process.device.type != "mps")
    parts, judged = {"model": model, "optimizer": optimizer}, model
    if cfg.ema:
        average = swa_utils.get_ema_multi_avg_fn(cfg.ema)
        ema = swa_utils.AveragedModel(model, multi_avg_fn=average)
        optimizer.register_step_post_hook(lambda *_: ema.update_parameters(model))
        parts, judged = parts | {"ema": ema}, ema.module
    run = {"command": "finetune", "model": cfg.model, "config": asdict(config), "classes": classes}

    def loss_of(net: nn.Module, images: Tensor, labels: Tensor, number: int) -> Tensor:
        rng = np.random.default_rng((cfg.seed, number, process.rank, 2))
        if cfg.reprob:
            images = augment.random_erase(images, rng, cfg.reprob)
        images, targets = mixup(images, labels, rng)
        return F.cross_entropy(net(images).float(), targets)

    total, warmup = cfg.epochs * len(loader), int(cfg.warmup_epochs * len(loader))
    start, low = (value * (lr / cfg.blr if cfg.blr else 1) for value in (cfg.warmup_lr, cfg.min_lr))

    def schedule(step: int, scale: float) -> float:
        return finetune_lr(step, lr * scale, start, low, warmup, total)

    result, best, best_file = {}, best_so_far(cfg), Path(cfg.output_dir) / "best.pth"

    def end_of_epoch(epoch: int) -> dict:
        nonlocal best
        if not test or ((epoch + 1) % cfg.test_freq and epoch + 1 < cfg.epochs):
            return {}
        result.update(accuracy(judged, process, test, cfg.batch_size, loader.num_workers))
        if result["test_acc1"] >= best and cfg.output_dir and process.rank == 0:
            best = result["test_acc1"]
            file = {"model": judged.state_dict(), "args": run, "epoch": epoch}
            save_state(file | result, best_file)
        return result

    train(cfg, process, parts, loader, run, schedule, loss_of, end_of_epoch)
    if not cfg.data_path:
        process.say("dry run: to fine-tune, give --data_path FOLDER with train/ and val/<class>/")
    return result


# ── other commands ────────────────────────────────────────────────────────────────────


def open_images(data_path: str, split: str = "") -> data.ImageFiles | data.DrawnImages:
    """Images of a path, labelled ones of a split; "drawn:N" stands for N built-in images."""
    if data_path.startswith("drawn:") and data_path[6:].isdecimal():
        return data.DrawnImages(split or "train", int(data_path[6:]))
    if not data_path:
        raise InputError("give --data_path")
    return data.find_labelled(data_path, split) if split else data.find_images(data_path)


def check_classes(trained: Sequence[str], tested: Sequence[str], outputs: int) -> None:
    """InputError unless labels of both mean the same and the model has enough outputs."""
    if len(trained) > outputs:
        raise InputError(f"the data has {len(trained)} classes, more than the {outputs} outputs")
    if list(trained) != list(tested):
        odd = sorted(set(trained) ^ set(tested))[:3]
        raise InputError(f"the classes differ from those of training: {', '.join(odd)}")


def open_weights(cfg: UseConfig) -> tuple[dict, ModelConfig]:
    """The file of --weights and the architecture it is for."""
    if not cfg.weights:
        raise InputError("give --weights FILE")
    file = read_checkpoint(cfg.weights)
    run = file["args"]
    name = cfg.model or run.get("model", "swin_b")
    if "config" in run and OTHER_NAMES.get(name, name) != run["model"]:
        raise InputError(f"{cfg.weights} is of --model {run['model']}, not {name}")
    base = ModelConfig(**run["config"]) if "config" in run else None
    release = None if base else cfg.release  # our files know theirs
    return file, model_config(
        name, base, input_size=cfg.input_size, window_size=cfg.window_size, release=release
    )


def open_encoder(cfg: UseConfig) -> tuple[dict, SwinEncoder, str]:
    """The file of --weights, its encoder or classifier, and what was adapted in loading."""
    file, config = open_weights(cfg)
    head, plain = swin_names(file["model"]).get("head.weight"), replace(config, release="corrected")
    model = SwinEncoder(plain) if head is None else SwinClassifier(plain, len(head))
    return file, model, load_encoder(model, cfg.weights, cfg.release)


def evaluate(cfg: UseConfig) -> dict:
    """Top-1 and top-5 of a fine-tuned file on val/<class>/, each image counted once."""
    process = setup_process(cfg.device, cfg.dtype)
    file, model, adapted = open_encoder(cfg)
    if not isinstance(model, SwinClassifier):
        raise InputError(f"{cfg.weights} has no classification head; make one with finetune")
    source = open_images(cfg.data_path, "val")
    classes, outputs = file["args"].get("classes"), model.head.out_features
    if not classes and len(source.classes) != outputs:
        raise InputError(f"the data has {len(source.classes)} classes, the model {outputs}")
    check_classes(classes or source.classes, source.classes, outputs)
    process.say(adapted)
    workers = worker_count(cfg.num_workers)
    result = accuracy(model.to(process.device), process, source, cfg.batch_size, workers)
    process.say(json.dumps(result))
    return result


@torch.no_grad()
def draw_reconstructions(model: GreenMIM, pixels: Tensor, plan: MaskPlan) -> Image.Image:
    """Labelled grid for uint8 (B, 3, S, S): image, what the encoder saw, reconstruction."""
    model.eval()
    size, device = model.config.mask_unit, model.mask_token.device
    plan = to_device(plan, device)
    images = data.normalize(pixels.to(device))
    patches = patchify(images, size)
    prediction = model.predict(images, plan)
    if model.config.norm_pix_loss:
        _, mean, deviation = normalize_patches(patches)
        prediction = prediction * deviation + mean
    seen, filled = patches.clone(), patches.clone()
    seen[:, plan.hidden] = 0.0  # the mean colour
    filled[:, plan.hidden] = prediction[:, plan.hidden]
    mean, std = (torch.tensor(v, device=device) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    rows = torch.stack([patches, seen, filled], 1).unflatten(-1, (-1, 3)) * std + mean
    layout = "b k (h w) (p q) c -> (b h p) (k w q) c"
    grid = rearrange(rows, layout, h=model.config.units, p=size).clamp(0, 1) * 255
    picture = Image.fromarray(grid.round().byte().cpu().numpy())
    zoom = -(-160 // pixels.shape[-1])  # room for the labels
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)
    labelled = Image.new("RGB", (picture.width, picture.height + 16), "white")
    labelled.paste(picture, (0, 16))
    for k, text in enumerate(("image", "visible to the encoder", "reconstruction")):
        ImageDraw.Draw(labelled).text((k * picture.width // 3 + 4, 2), text, fill="black")
    return labelled


def save_picture(picture: Image.Image, path: Path) -> None:
    """`save_file` for a PNG."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--output {path}: pictures are written as .png")
    encoded = io.BytesIO()  # Pillow would hide the reason of a failed write
    picture.save(encoded, "PNG")
    save_file(path, lambda file: file.write(encoded.getvalue()))


def reconstruct(cfg: UseConfig) -> None:
    """PNG grid of images, their visible parts and reconstructions by a pre-trained file."""
    process = setup_process(cfg.device, cfg.dtype)
    _, config = open_weights(cfg)
    model = GreenMIM(config)
    load_model(model, cfg.weights)
    crop = data.EvalCrop(config.input_size)
    source = open_images(cfg.data_path)
    pixels, _, _ = next(data.eval_batches(source, crop, batch_size=cfg.count), (None,) * 3)
    if pixels is None:
        raise InputError(f"{cfg.data_path}: none of the images can be read")
    plan = draw_plan(config, cfg.mask_ratio, (cfg.seed,))
    output = cfg.output or "reconstruction.png"
    picture = draw_reconstructions(model.to(process.device), pixels, plan)
    if process.rank == 0:
        save_picture(picture, Path(output))
    process.say(f"wrote {output}")


def export(cfg: UseConfig) -> None:
    """Encoder, and head if there is one, in timm's or official Swin's parameter names."""
    _, model, adapted = open_encoder(cfg)
    state = export_state(model, cfg.naming)
    output = Path(cfg.output or f"{Path(cfg.weights).stem}-{cfg.naming}.pth")
    bare = output.suffix == ".safetensors" or cfg.naming == "timm"
    save_state(state if bare else {"model": state}, output)
    print(f"{adapted}; wrote {len(state)} tensors to {output}")
    stages = [(model.config.units * model.config.unit_tokens(i), model.config.window(i)[0])
              for i in range(len(model.layers))]  # fmt: skip
    if any(side % window for side, window in stages):
        print("note: timm pads windows that do not divide a map, official Swin refuses them; "
              "here they are cut, so answers differ")  # fmt: skip


@torch.no_grad()
def features(cfg: UseConfig) -> None:
    """Pooled features (n, C), or maps (n, C, h, w) of every stage, and file names, as .npz."""
    process = setup_process(cfg.device, cfg.dtype)
    _, model, adapted = open_encoder(cfg)
    process.say(adapted)
    model.to(process.device).eval()
    source, found = open_images(cfg.data_path), {}
    crop = data.EvalCrop(model.config.input_size)
    workers = worker_count(cfg.num_workers)
    batches = data.eval_batches(source, crop, batch_size=cfg.batch_size, num_workers=workers)
    for images, _, indices in tqdm(batches, disable=not sys.stderr.isatty()):
        with process.autocast():
            maps = model.stages(data.normalize(images.to(process.device)))
            parts = {"features": model.norm(maps[-1]).mean(1)}
        if cfg.per_stage:
            side = [math.isqrt(x.shape[1]) for x in maps]
            parts = {f"stage{i + 1}": rearrange(x, "b (h w) c -> b c h w", h=side[i])
                     for i, x in enumerate(maps)}  # fmt: skip
        for key, value in parts.items():
            found.setdefault(key, []).append(value.float().cpu().numpy())
        found.setdefault("names", []).append(np.array([source.name(int(i)) for i in indices]))
    if not found:
        raise InputError(f"{cfg.data_path}: none of the images can be read")
    output = cfg.output or "features.npz"
    arrays = {k: np.concatenate(v) for k, v in found.items()}
    if process.rank == 0:
        save_file(Path(output), lambda file: np.savez(file, **arrays))
    process.say(f"wrote {', '.join(f'{k} {v.shape}' for k, v in arrays.items())} to {output}")


def demo(cfg: UseConfig) -> None:
    """Pre-train a small model on built-in images; fine-tune it and a from-scratch twin."""
    began, output = time.monotonic(), Path(cfg.output or "output/demo")
    both = {"model": "swin_demo", "seed": cfg.seed, "device": cfg.device, "num_workers": 1,
            "resume": "none", "crop_min": 0.6, "lr": 2e-3, "log_every": 1000}  # fmt: skip
    config = model_config("swin_demo")
    torch.manual_seed(cfg.seed)
    # The twin starts where pre-training starts, so that only pre-training tells them apart.
    start = {"model": export_state(GreenMIM(config).encoder, "official")}
    process = setup_process(cfg.device, "auto")
    if process.rank == 0:
        save_state(start, output / "start.pth")
    pretrain(PretrainConfig(
        **both, data_path="drawn:8192", output_dir=str(output / "pretrain"),
        batch_size=64, epochs=6, warmup_epochs=1,
    ))  # fmt: skip
    result = {}
    for name, weights in (("pretrained", "pretrain/backbone.pth"), ("scratch", "start.pth")):
        tested = finetune(FinetuneConfig(
            **both, data_path="drawn:1000", weights=str(output / weights),
            output_dir=str(output / name), batch_size=25, epochs=7, warmup_epochs=1.5,
            layer_decay=0.8, mixup=0, cutmix=0, reprob=0, aa="", drop_path=0, test_freq=7,
        ))  # fmt: skip
        result[f"{name}_acc1"] = round(tested["test_acc1"], 1)
    result |= {"chance": 10.0, "picture": str(output / "pretrain" / "reconstruction-5.png")}
    process.say(json.dumps(result | {"seconds": round(time.monotonic() - began, 1)}))


# ── command line ──────────────────────────────────────────────────────────────────────

COMMANDS = {
    "pretrain": (PretrainConfig, pretrain),
    "finetune": (FinetuneConfig, finetune),
    "evaluate": (UseConfig, evaluate),
    "reconstruct": (UseConfig, reconstruct),
    "export": (UseConfig, export),
    "features": (UseConfig, features),
    "demo": (UseConfig, demo),
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (see --help)")


def or_none(kind: type) -> Callable[[str], object]:
    """Type of a flag whose value may also be the word none."""

    def parse(text: str) -> object:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # for argparse's message
    return parse


def parse_config(argv: Sequence[str]) -> tuple[Callable, object]:
    """The command's function and its config: class defaults, then the recipe, then the flags."""
    command = argv[0] if argv and not argv[0].startswith("-") else "pretrain"
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
    config_class, function = COMMANDS[command]
    parser = Parser(
        prog=f"greenmim.py {command}", description=function.__doc__, allow_abbrev=False,
        epilog=f"commands: {', '.join(COMMANDS)}; each has its own --help",
    )  # fmt: skip
    hints, helps = typing.get_type_hints(config_class), {}
    for base in reversed(config_class.__mro__[:-1]):  # help = the field's trailing comment
        helps |= dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), re.M))
    for field in fields(config_class):
        kind, *optional = typing.get_args(hints[field.name]) or (hints[field.name],)  # T | None
        names = dict.fromkeys([f"--{field.name}", "--" + field.name.replace("_", "-")])
        how = {"type": or_none(kind) if optional else kind}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        text = f"{helps[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(*names, default=argparse.SUPPRESS, help=text, **how)
    flags = argv[1:] if argv[:1] == [command] else argv
    flags = ["--no-" + flag[5:] if flag.startswith("--no_") else flag for flag in flags]
    given = vars(parser.parse_args(flags))
    name = given.get("model", config_class.model)
    given["model"] = name = OTHER_NAMES.get(name, name)
    recipe = config_class(**RECIPES.get((command, name), {}))
    for (low, high), names in LIMITS.items():
        for key in [k for k in names.split() if given.get(k) is not None]:
            if not low <= given[key] <= high or math.isinf(given[key]):
                raise InputError(f"--{key} {given[key]} does not lie between {low} and {high}")
    usual = asdict(recipe)
    places = ("model", "data_path", "output_dir", "weights", "num_workers", "device", "resume")
    usual |= {key: given[key] for key in places if key in given}
    changed = [f"{k} {v!r} (recipe: {usual[k]!r})" for k, v in given.items() if v != usual[k]]
    if command in ("pretrain", "finetune") and changed and os.environ.get("RANK", "0") == "0":
        print(f"differs from the recipe: {', '.join(changed)}")
    return function, replace(recipe, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 = done, 2 = one sentence on stderr says what is wrong with the input."""
    try:
        function, cfg = parse_config(sys.argv[1:] if argv is None else list(argv))
        function(cfg)
    except InputError as error:  # others may be waiting for this process: no common farewell
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stopped:  # by SIGTERM, with code 0; else with a sentence
        if stopped.code:
            raise
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
