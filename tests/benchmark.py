"""Speed and memory of every method on this machine, each beside its dense baseline.

Run by hand, on a quiet machine:

    python -m tests.benchmark                                everything, Swin-B, a quarter of an hour
    python -m tests.benchmark greenmim --dtype fp32 --profile
    python -m tests.benchmark loader grouping dense --steps 20

Topics: a method's name times its training step and its baselines' (`greenmim`); `dense` compares
two ways to cut windows where nothing is masked; `grouping` the rules that pack windows; `loader`
the images per second of one core. Tables are Markdown. To add a method, write functions that
return a `Workload` and list them in METHODS, the method itself first.

Every time is a median. Matrix products are timed between the steps, so that a share compares
two figures of the same minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import greenmim
from common import data, grouping

WARM_UP = 2
MASK_RATIO = 0.75
PARTS = ("planning", "data", "forward", "backward", "optimizer")
RELEASED_GFLOP = {"swin_b": 24.5}  # an image through the released code, forward and backward

# ── measuring ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Workload:
    """A training step to measure."""

    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    input_size: int
    plan: Callable[[int], object]  # step number -> what the host prepares, NumPy arrays
    loss: Callable[[Tensor, object], Tensor]  # (normalised images, plan on the device) -> loss
    gflop: float | None = None  # per image, a fixed reading to compare speeds by
    slowness: int = 1  # the number of steps is divided by this


def clock(device: torch.device) -> float:
    """Seconds, read once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_rate(process: greenmim.Process) -> float:
    """FLOP/s of a large plain matrix product in the number format of the process."""
    size, repeats = (8192, 20) if process.device.type == "cuda" else (2048, 3)
    a, b = (torch.rand(size, size, device=process.device).to(process.dtype) for _ in range(2))
    torch.matmul(a, b)
    started = clock(process.device)
    for _ in range(repeats):
        torch.matmul(a, b)
    return repeats * 2 * size**3 / (clock(process.device) - started)


def peak_memory_gb(device: torch.device) -> float:
    """Peak of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def run_step(
    work: Workload, process: greenmim.Process, pixels: Tensor, number: int
) -> dict[str, float]:
    """Seconds of each of PARTS of a training step, waiting for the device after each."""
    device = process.device
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    marks = [clock(device)]
    plan = work.plan(number)
    marks.append(clock(device))
    plan = greenmim.to_device(plan, device)
    images = data.normalize(pixels.to(device, non_blocking=True))
    marks.append(clock(device))
    with process.autocast():
        loss = work.loss(images, plan)
    marks.append(clock(device))
    loss.backward()
    marks.append(clock(device))
    if not greenmim.apply_gradients(work.optimizer, scaler, None):
        raise RuntimeError(f"{work.label}: a gradient is not finite, so no step was taken")
    marks.append(clock(device))
    return dict(zip(PARTS, np.diff(marks).tolist(), strict=True))


def step_seconds(split: dict[str, float], device: torch.device) -> float:
    """A CPU plans on the cores that train; beside a GPU, planning costs nothing (see pretrain)."""
    return sum(split.values()) - (split["planning"] if device.type == "cuda" else 0.0)


def measure(work: Workload, process: greenmim.Process, args: argparse.Namespace) -> dict:
    """One row of a method's table."""
    pixels = torch.randint(256, (args.batch_size, 3, work.input_size, work.input_size))
    pixels = pixels.to(torch.uint8)
    work.model.train()
    rates, splits = [product_rate(process)], []
    for number in range(WARM_UP + max(1, args.steps // work.slowness)):
        splits.append(run_step(work, process, pixels, number))
        rates.append(product_rate(process))
    memory, device = peak_memory_gb(process.device), process.device
    seconds = statistics.median(step_seconds(s, device) for s in splits[WARM_UP:])
    # The counter knows matrix products, so attention has to be made of them.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plan = greenmim.to_device(work.plan(0), device)
        work.loss(data.normalize(pixels.to(device)), plan)
    speed, rate = args.batch_size / seconds, statistics.median(rates)
    flop = 3 * counter.get_total_flops() / args.batch_size  # the backward pass has two products
    return {
        "label": work.label,
        "images_per_second": speed,
        "split": {part: statistics.median(s[part] for s in splits[WARM_UP:]) for part in PARTS},
        "planning": statistics.median(s["planning"] for s in splits[WARM_UP:]) / seconds,
        "memory_gb": memory,
        "gmac": flop / 6e9,
        "rate": rate,
        "share": speed * flop / rate,
        "fixed_share": speed * work.gflop * 1e9 / rate if work.gflop else None,
        "profile": profile(work, process, pixels) if args.profile else None,
    }


def kind(operator: str) -> str:
    """What an operator works for, "" for everything that neither multiplies nor attends."""
    name = operator.removeprefix("aten::")
    if name in ("mm", "addmm", "_addmm_activation", "mkldnn_linear"):
        return "matrix product"
    attention = ("bmm", "baddbmm", "_softmax", "_softmax_backward_data")
    return "attention" if name in attention or "attention" in name else ""


def profile(work: Workload, process: greenmim.Process, pixels: Tensor) -> dict:
    """Operators that take longest in a step, and the share that neither multiplies nor attends."""
    with torch.profiler.profile() as profiler:  # the device too, where there is one
        split = run_step(work, process, pixels, WARM_UP)
    field = f"self_{'device' if process.device.type == 'cuda' else 'cpu'}_time_total"
    operators = [e for e in profiler.key_averages() if e.key.startswith("aten::")]
    seconds = {e.key: getattr(e, field) / 1e6 for e in operators}
    total = step_seconds(split, process.device)
    useful = split["optimizer"] + sum(s for name, s in seconds.items() if kind(name))
    longest = sorted(seconds, key=seconds.get, reverse=True)[:12]
    rows = [[name, kind(name), 1e3 * seconds[name], 100 * seconds[name] / total]
            for name in longest]  # fmt: skip
    return {"rows": rows, "outside": 1 - useful / total}


# ── methods ─────────────────────────────────────────────────────────────────────────────


class DenseMIM(nn.Module):
    """SimMIM's compute: Swin on all tokens, one linear map to pixels, L1 loss on hidden patches.

    Its mask token, an elementwise choice between two tokens, is left out.
    """

    def __init__(self, config: greenmim.ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = greenmim.SwinEncoder(config)
        self.decoder = nn.Linear(self.encoder.num_features, config.mask_unit**2 * 3)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, 3, H, W), (U - V,) -> loss"""
        prediction = self.decoder(self.encoder(images)).float()
        target = greenmim.patchify(images, self.config.mask_unit)
        return F.l1_loss(prediction.index_select(1, hidden), target.index_select(1, hidden))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of pre-training."""
    return torch.optim.AdamW(greenmim.parameter_groups(model, 0.05), 1e-4, (0.9, 0.95), fused=True)


def greenmim_workload(args: argparse.Namespace, device: torch.device) -> Workload:
    config = greenmim.model_config(args.model)
    model = greenmim.GreenMIM(config).to(device)

    def plan(number: int) -> greenmim.MaskPlan:
        return greenmim.draw_plan(config, MASK_RATIO, (0, number, 0, 1))

    return Workload(
        f"GreenMIM, {config.input_size} px", model, adamw(model), config.input_size, plan,
        lambda images, plan: model(images, plan)[0], RELEASED_GFLOP.get(args.model),
    )  # fmt: skip


def dense_workload(args: argparse.Namespace, device: torch.device, small: bool) -> Workload:
    config = greenmim.model_config(args.model)
    if small:  # 192 px and window 6 beside 224 and 7, as SimMIM pre-trains
        size = config.input_size - config.mask_unit
        window = round(config.window_size * size / config.input_size)
        config = greenmim.model_config(args.model, input_size=size, window_size=window)
    model = DenseMIM(config).to(device)

    def plan(number: int) -> np.ndarray:
        noise = np.random.default_rng(number).random(config.units**2)
        return np.flatnonzero(greenmim.random_mask(noise, MASK_RATIO))

    label = f"all tokens, {config.input_size} px"
    return Workload(label, model, adamw(model), config.input_size, plan, model, slowness=3)


METHODS: dict[str, list[Callable[[argparse.Namespace, torch.device], Workload]]] = {
    "greenmim": [
        greenmim_workload, partial(dense_workload, small=False), partial(dense_workload, small=True)
    ],
}  # fmt: skip


def child(args: argparse.Namespace) -> None:
    """Measure one row and print it as JSON, in a process that has held nothing else."""
    method, row, dtype = args.row.split(":")
    process = greenmim.setup_process(args.device, dtype)
    torch.manual_seed(0)
    work = METHODS[method][int(row)](args, process.device)
    print(json.dumps(measure(work, process, args)))


def method_topic(method: str, args: argparse.Namespace) -> None:
    """A method's step beside its baselines."""
    rows, profiles, rates = [], {}, []
    for dtype in args.dtype:
        results = []
        for row in range(len(METHODS[method])):
            command = [sys.executable, "-m", "tests.benchmark", *args.argv]
            command += ["--row", f"{method}:{row}:{dtype}"]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
        rates.append(f"{dtype} {statistics.median(r['rate'] for r in results) / 1e9:.0f}")
        first = results[0]
        for r in results:
            fixed = f"{r['fixed_share']:.0%}" if r["fixed_share"] else ""
            rows.append([
                r["label"], dtype, r["images_per_second"],
                f"{r['images_per_second'] / first['images_per_second']:.2f}",
                *(r["split"][part] for part in PARTS), f"{r['planning']:.1%}",
                r["memory_gb"], f"{r['memory_gb'] / first['memory_gb']:.2f}", r["gmac"],
                r["rate"] / 1e9, f"{r['share']:.0%}", fixed,
            ])  # fmt: skip
            if r["profile"]:
                profiles[f"{r['label']}, {dtype}"] = r["profile"]
    header = ["step", "dtype", "images/s", "ratio", *(f"{part} s" for part in PARTS), "planning",
              "peak GB", "ratio", "GMAC/image", "product GFLOP/s", "share", "fixed share"]  # fmt: skip
    table(f"{method}, {args.model}, batch {args.batch_size}, {MASK_RATIO:.0%} hidden", header, rows)
    print(f"\nPlain matrix products, timed between the steps: {', '.join(rates)} GFLOP/s. Share: of "
          "that rate, by the multiply-adds counted in one forward pass, times three;\nfixed share: "
          "by the FLOP of the released code. Ratios are to the first row of the dtype.")  # fmt: skip
    for label, found in profiles.items():
        table(f"{label}: longest operators", ["operator", "for", "ms", "% of step"], found["rows"])
        print(f"\n{found['outside']:.1%} of the step is outside matrix products, attention (its "
              "products and softmax) and the optimizer.")  # fmt: skip


# ── dense windows ───────────────────────────────────────────────────────────────────────


class RolledWindowAttention(nn.Module):
    """Swin's attention by rolling and reshaping the map, with the weights of a grouped one."""

    def __init__(self, attn: greenmim.GroupWindowAttention, side: int, window: int, shift: int):
        super().__init__()
        self.attn, self.side, self.window, self.shift = attn, side, window, shift
        y, x = np.divmod(np.arange(window**2), window)
        dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
        self.register_buffer("index", torch.from_numpy(dy * (2 * window - 1) + dx).flatten())
        edge = np.arange(side)  # after the roll, the last window of an axis holds two pieces
        piece = (edge >= side - shift).astype(int) if shift else 0 * edge
        regions = torch.from_numpy(2 * piece[:, None] + piece)
        regions = rearrange(regions, "(y p) (x q) -> (y x) (p q)", p=window, q=window)
        apart = regions[:, :, None] != regions[:, None, :]
        self.register_buffer("mask", torch.zeros(apart.shape).masked_fill(apart, -np.inf))

    def forward(self, x: Tensor, _: object = None) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        attn, size = self.attn, {"p": self.window, "q": self.window}
        across, heads = self.side // self.window, {"h": attn.num_heads}
        x = rearrange(x, "b (h w) c -> b h w c", h=self.side)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = attn.qkv(rearrange(x, "b (y p) (x q) c -> b (y x) (p q) c", **size))
        bias = attn.relative_position_bias_table[self.index]
        bias = rearrange(bias, "(s t) h -> h s t", s=self.window**2)
        # Only a shifted map needs a bias for each window.
        inside = "(b w) h s d" if not self.shift else "b (w h) s d"
        q, k, v = rearrange(x, f"b w s (three h d) -> three {inside}", three=3, **heads)
        if self.shift:
            bias = (bias + self.mask[:, None]).flatten(0, 1)  # (windows * h, s, s)
        x = greenmim.attend(q, k, v, bias.unsqueeze(0))
        x = rearrange(x, f"{inside} -> b w s (h d)", w=across**2, **heads)
        x = rearrange(attn.proj(x), "b (y x) (p q) c -> b (y p) (x q) c", y=across, **size)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return rearrange(x, "b h w c -> b (h w) c")


def dense_stage(
    config: greenmim.ModelConfig, stage: int, process: greenmim.Process, args: argparse.Namespace
) -> tuple[list[float], int]:
    """Median seconds of a plain and a shifted block, grouped and rolled; the number of blocks."""
    window, shift = config.window(stage)
    side = config.units * config.unit_tokens(stage)
    if side % window:
        raise data.InputError(f"dense: {side} tokens are not whole windows of {window}")
    device, dim = process.device, config.embed_dim * 2**stage
    shifts = (0, shift) if shift else (0,)
    plans = greenmim.to_device(greenmim.plan_mask(config, np.zeros(config.units**2, bool)), device)
    blocks = greenmim.SwinEncoder(config).layers[stage].blocks[: len(shifts)].to(device)
    grouped = [block.attn for block in blocks]
    for attn in grouped:  # large enough for a wrong bias to show
        nn.init.normal_(attn.relative_position_bias_table)
    rolled = [RolledWindowAttention(attn, side, window, s).to(device)
              for attn, s in zip(grouped, shifts, strict=True)]  # fmt: skip
    x = torch.randn(args.batch_size, side**2, dim, device=device, requires_grad=True)
    gradient, seconds, outputs = torch.randn_like(x), ([], []), [None, None]
    for _ in range(WARM_UP + args.steps):
        for path, attentions in enumerate((grouped, rolled)):
            started, y = clock(device), x
            with process.autocast():
                for block, attn, plan in zip(blocks, attentions, plans.windows[stage], strict=True):
                    block.attn = attn
                    y = block(y, plan)
            outputs[path] = y.detach()
            y.backward(gradient)
            seconds[path].append(clock(device) - started)
    if process.dtype is torch.float32 and device.type == "cpu":  # others round too coarsely
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    return [statistics.median(s[WARM_UP:]) for s in seconds], len(blocks)


def dense_topic(args: argparse.Namespace) -> None:
    """Is one way to cut windows enough: the grouped gather where nothing is masked?"""
    config, rows = greenmim.model_config(args.model), []
    for dtype in args.dtype:
        process, totals = greenmim.setup_process(args.device, dtype), np.zeros(2)
        for stage, depth in enumerate(config.depths):
            seconds, blocks = dense_stage(config, stage, process, args)
            totals += np.array(seconds) * depth / blocks
            times = (1e3 * s / blocks for s in seconds)
            rows.append([f"{stage + 1}", dtype, depth, *times, f"{seconds[0] / seconds[1]:.2f}"])
        rows.append(["all blocks", dtype, sum(config.depths), *(1e3 * totals),
                     f"{totals[0] / totals[1]:.2f}"])  # fmt: skip
    header = ["stage", "dtype", "blocks", "grouped ms/block", "rolled ms/block", "grouped / rolled"]
    table(f"dense, {args.model}, batch {args.batch_size}: forward and backward", header, rows)
    print("\nThe last row of a dtype is the sum over all blocks.")


# ── grouping ────────────────────────────────────────────────────────────────────────────


def sizings(channels: int) -> dict[str, grouping.Sizing]:
    """Rules to compare; `channels` matters to the search under the cost of a whole layer."""
    layer = grouping.layer_cost(channels)
    return {
        "released": grouping.released_groups,
        "search, n g^2": grouping.cheapest_groups,
        "search, layer": lambda counts, _: grouping.search_groups(counts, layer)[1],
        "one group": lambda counts, _: [list(range(len(counts)))],
        "window = group": lambda counts, _: [[w] for w in range(len(counts))],
    }


def attention_seconds(
    attn: nn.Module, x: Tensor, plan: grouping.GroupPlan, process: greenmim.Process
) -> float:
    """Forward and backward of one attention layer, projections included."""
    plan = greenmim.to_device(plan, process.device)
    started = clock(process.device)
    with process.autocast():
        y = attn(x, plan)
    y.backward(torch.ones_like(y))
    return clock(process.device) - started


def stage_records(
    config: greenmim.ModelConfig, stage: int, args: argparse.Namespace
) -> dict[tuple[int, str], np.ndarray]:
    """(shift, rule) -> (masks, columns): size, groups, padding, n g^2, seconds to plan, to attend.

    The masks are those of the method's own table, less the warm-up.
    """
    window, shift = config.window(stage)
    dim, k = config.embed_dim * 2**stage, config.unit_tokens(stage)
    processes = [greenmim.setup_process(args.device, dtype) for dtype in args.dtype]
    device = processes[0].device
    attn = greenmim.GroupWindowAttention(dim, config.num_heads[stage], window).to(device)
    records = defaultdict(list)
    for number in range(WARM_UP + args.masks):
        noise = np.random.default_rng((0, number, 0, 1)).random(config.units**2, np.float32)
        keep = ~greenmim.random_mask(noise, MASK_RATIO).reshape(config.units, config.units)
        rows, columns = np.nonzero(keep.repeat(k, 0).repeat(k, 1))
        x = torch.randn(args.batch_size, len(rows), dim, device=device, requires_grad=True)
        for s in (0, shift) if shift else (0,):
            ids = grouping.window_ids(rows, columns, window, s)
            for name, rule in sizings(dim).items():
                started = time.perf_counter()
                plan = grouping.plan_groups(rows, columns, ids, window, rule)
                planning = time.perf_counter() - started
                groups, _, size, _ = plan.bias.shape
                layout = [size, groups, groups * size - len(rows), groups * size**2]
                attending = [attention_seconds(attn, x, plan, p) for p in processes]
                records[s, name].append([*layout, planning, *attending])
    return {key: np.array(found[WARM_UP:]) for key, found in records.items()}


def grouping_topic(args: argparse.Namespace) -> None:
    """What each rule of packing windows costs, counted and timed."""
    base = greenmim.model_config(args.model)
    timed = [f"attention ms, {dtype}" for dtype in args.dtype]
    for window in (base.window_size, 2 * base.window_size):
        config = greenmim.model_config(args.model, window_size=window)
        rows, totals = [], defaultdict(float)
        for stage, depth in enumerate(config.depths):
            records = stage_records(config, stage, args)
            shifts = sorted({s for s, _ in records})
            for (s, name), found in records.items():
                size, groups, padding, cost = found[:, :4].mean(0)
                planning, *attending = 1e3 * np.median(found[:, 4:], 0)
                span = f"{size:.1f} ({found[:, 0].min():.0f}-{found[:, 0].max():.0f})"
                rows.append([f"{stage + 1}, shift {s}", name, span, groups, padding, f"{cost:.0f}",
                             planning, *attending])  # fmt: skip
                # Blocks alternate between the shifts; a plan is made once and serves all of them.
                blocks = len(range(shifts.index(s), depth, len(shifts)))
                totals[name] += np.array([blocks * cost, planning, *(blocks * t for t in attending)])
        title = f"grouping, {args.model}, window {window}, {args.masks} masks, {MASK_RATIO:.0%}"
        table(f"{title} hidden, batch {args.batch_size}", [
            "stage", "rule", "slots g (range)", "groups n", "padding", "n g^2", "planning ms", *timed
        ], rows)  # fmt: skip
        table("the same, summed over the encoder's blocks", ["rule", "n g^2", "planning ms", *timed],
              [[name, f"{total[0]:.0f}", *total[1:]] for name, total in totals.items()])  # fmt: skip


# ── loader ──────────────────────────────────────────────────────────────────────────────


def write_photographs(folder: Path, count: int = 64) -> float:
    """500x375 JPEGs of drawn shapes and noise, which sets the size of the files; their mean KB."""
    source, rng, folder = data.DrawnImages("train", count, 500), np.random.default_rng(0), folder
    folder.mkdir()
    for index in range(count):
        pixels = np.asarray(source.open(index))[:375]
        pixels = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.jpg", quality=95)
    return sum(path.stat().st_size for path in folder.iterdir()) / count / 1e3


def pillow_crop(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """What TrainCrop does, by Pillow alone."""
    top, left, h, w = data.sample_crop(image.height, image.width, (0.2, 1.0), rng)
    image = image.convert("RGB").crop((left, top, left + w, top + h))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def pass_seconds(source: data.ImageFiles, crop: data.Transform) -> float:
    """Seconds to read and crop every image once."""
    started = time.perf_counter()
    for index in range(len(source)):
        with source.open(index) as image:
            crop(image, np.random.default_rng(index))
    return time.perf_counter() - started


def loader_rate(source: data.ImageFiles, size: int, workers: int) -> float:
    """Images per second of TrainLoader with `workers` processes, from the first batch on."""
    loader = data.TrainLoader(source, data.TrainCrop(size), batch_size=16, num_workers=workers)
    batches = loader.batches(0, len(loader))
    next(batches)
    started = time.perf_counter()
    images = sum(len(batch) for batch, _ in batches)
    return images / (time.perf_counter() - started)


def loader_topic(args: argparse.Namespace) -> None:
    """Images per second from files to uint8 tensors."""
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)  # the figures are for a core, as in a worker
    with tempfile.TemporaryDirectory() as folder:
        photographs, copies = Path(folder, "photographs"), Path(folder, "copies")
        kilobytes = write_photographs(photographs)
        shrink = [sys.executable, "-m", "common.data", "shrink", str(photographs), str(copies)]
        subprocess.run(shrink, capture_output=True, check=True)
        large, small = (data.find_images(path) for path in (photographs, copies))
        # Long enough for the workers' first batches not to matter.
        many = data.ImageFiles([large.name(i) for i in range(len(large))] * 8)
        for size in (128, 160, 192, 224):
            ours, pillow = data.TrainCrop(size), partial(pillow_crop, size=size)
            passes = [[pass_seconds(*task) for task in ((large, pillow), (large, ours),
                       (small, ours))] for _ in range(1 + args.steps)]  # fmt: skip
            rates = len(large) / np.median(passes[1:], axis=0)
            workers = [loader_rate(many, size, workers) for workers in (1, 2)]
            rows.append([f"{size}", *rates, f"{rates[1] / rates[0]:.2f}",
                         f"{rates[2] / rates[1]:.2f}", *workers])  # fmt: skip
    torch.set_num_threads(threads)
    table("loader, images/s of one core, and of the loader with workers", [
        "pixels", "plain Pillow", "ours", "shrunk copies", "ours / Pillow", "copies / ours",
        "1 worker", "2 workers",
    ], rows)  # fmt: skip
    print(f"\n500x375 JPEGs, quality 95, {kilobytes:.0f} KB each: drawn images with noise, so that "
          "decoding takes as long as a photograph's;\ncopies have short sides of 160. No "
          "augmentation but the random crop and the flip of pre-training.")  # fmt: skip


# ── command line ────────────────────────────────────────────────────────────────────────

TOPICS = {method: partial(method_topic, method) for method in METHODS} | {
    "dense": dense_topic,
    "grouping": grouping_topic,
    "loader": loader_topic,
}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print an aligned Markdown table; floats with three significant digits."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
        return str(value)

    cells = [[str(name) for name in header], *([cell(v) for v in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    print(f"\n### {title}\n")
    for row in cells:
        padded = (v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True)))
        print(f"| {' | '.join(padded)} |", flush=True)


def machine() -> str:
    """Processor, threads, torch and GPU in a line."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    parts = [f"{name}, {os.cpu_count()} CPUs", f"{torch.get_num_threads()} threads"]
    parts += [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return "; ".join(parts)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", allow_abbrev=False)
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"of {', '.join(TOPICS)} [all]")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=9, help="timed, after warm-up [%(default)s]")
    parser.add_argument("--masks", type=int, default=20, help="of grouping [%(default)s]")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=8)
    parser.add_argument("--model", default="swin_b", help="as in greenmim.py [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda [%(default)s]")
    parser.add_argument("--threads", type=int, help="of torch [its own choice]")
    parser.add_argument("--profile", action="store_true", help="list the longest operators")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # method:row:dtype, see `child`
    args = parser.parse_args(argv)
    if unknown := set(args.topics) - set(TOPICS):
        parser.error(f"unknown topic {', '.join(unknown)}; there are {', '.join(TOPICS)}")
    args.argv = list(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.row:
        child(args)
        return 0
    print(machine())
    # A method's rows come first: Linux counts the parent's memory in a child's peak.
    for topic, function in TOPICS.items():
        if topic in (args.topics or TOPICS):
            function(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
