"""Speed and memory of every method on this machine, each beside its dense baseline.

Run by hand, where nothing else runs: of two busy cores a matrix product loses little, a step most
of its speed. The tables are Markdown.

    python -m tests.benchmark                                  everything, Swin-B
    python -m tests.benchmark methods --json methods.json
    python -m tests.benchmark greenmim --dtype fp32 --profile
    python -m tests.benchmark dense grouping loader --steps 20 --json tables.json

Topics: `methods` one line a method, its pre-training step beside its baseline's; a method's name
times that step in detail, beside all its baselines'; `dense` two ways to cut windows where nothing
is masked; `grouping` the rules that pack windows; `loader` one core's images per second. Times are
medians. A further method is a function that returns its `Workload`, listed in METHODS. Matrix
products are timed between the steps: a share compares figures of one minute. `--model test` takes
the smallest networks, to try the benchmark itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import distill_lite
import fastmim
import greenmim
import hpvit
import mixmae
from common import data, grouping

WARM_UP = 2
TURN = "waiting for its turn"
MASK_RATIO = 0.75
# Per image through the released code, forward and backward.
RELEASED_GFLOP = {("greenmim", "swin_b"): 24.5, ("mixmae", "swin_b"): 114.0}

# ── measuring ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Workload:
    """A training step to measure."""

    label: str
    model: nn.Module
    input_size: int
    plan: Callable[[int], object]  # step number -> what the host prepares, NumPy arrays
    loss: Callable[[Tensor, object], Tensor]  # (normalised images, plan on the device) -> loss
    gflop: float | None = None  # per image: a fixed reading to compare speeds by
    slowness: int = 1  # the number of steps is divided by this
    batch_size: int = 0  # instead of --batch_size
    forward: Callable[[], object] | None = None  # to count multiply-adds of, without storage
    executed: bool = False  # count those of both passes, else the forward pass's times three
    baseline: int = 0  # the row of this dtype that ratios are to
    target: Callable[[Tensor], object] | None = None  # of normalised images: timed alone, too


TABLES: list[dict] = []  # all that were printed, for --json


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print an aligned Markdown table, floats with three digits, and keep it for --json."""
    TABLES.append({"title": title, "header": list(header), "rows": [list(row) for row in rows]})

    def form(value: object) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"

    cells = [[form(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    print(f"\n### {title}\n")
    for first, *others in cells:
        right = (v.rjust(w) for v, w in zip(others, widths[1:], strict=True))
        print("|", " | ".join([first.ljust(widths[0]), *right]), "|", flush=True)


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


def run_step(
    work: Workload, optimizer: torch.optim.Optimizer, process: greenmim.Process, number: int,
    pixels: Tensor,
) -> dict[str, float]:  # fmt: skip
    """Seconds of each part of a step as `greenmim.train` does it and of all; peak memory in GB."""
    device, parts = process.device, ("planning", "data", "forward", "backward", "optimizer")
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of the matrix products between the steps
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
    norm, *_ = greenmim.tell_all(process, optimizer, scaler, [loss.detach()], [])
    if not greenmim.apply_gradients(optimizer, scaler, norm, None):
        raise RuntimeError(f"{work.label}: a gradient is not finite, so no step was taken")
    marks.append(clock(device))
    split = dict(zip(parts, np.diff(marks).tolist(), strict=True))
    # Training plans while a GPU is busy with the forward pass; on a CPU it takes a core's time.
    step = marks[-1] - marks[1 if device.type == "cuda" else 0]
    return split | {"step": step, "memory": data.memory_gb(device)}


def kind(operator: str) -> str:
    """What an operator works for; "" if it neither multiplies matrices nor attends."""
    if operator in ("mm", "addmm", "_addmm_activation", "mkldnn_linear"):
        return "matrix product"
    attention = ("bmm", "baddbmm", "_softmax", "_softmax_backward_data")
    return "attention" if operator in attention or "attention" in operator else ""


def print_profile(title: str, step: Callable[[], dict[str, float]], cuda: bool) -> None:
    """The longest operators of a step, and what neither multiplies, attends nor optimizes."""
    with torch.profiler.profile() as profiler:
        split = step()
    field = f"self_{'device' if cuda else 'cpu'}_time_total"  # microseconds
    operators = [e for e in profiler.key_averages() if e.key.startswith("aten::")]
    seconds = {e.key[6:]: getattr(e, field) / 1e6 for e in operators}
    longest = sorted(seconds, key=seconds.get, reverse=True)[:12]
    rows = [[k, kind(k), 1e3 * seconds[k], f"{seconds[k] / split['step']:.1%}"] for k in longest]
    table(f"{title}: longest operators", ["operator", "works for", "ms", "of the step"], rows)
    useful = sum(s for k, s in seconds.items() if kind(k)) + split["optimizer"]
    print(f"\n{1 - useful / split['step']:.1%} of this step is outside matrix products, attention "
          "(products and softmax) and the optimizer.")  # fmt: skip


def measure(work: Workload, process: greenmim.Process, args: argparse.Namespace) -> dict:
    """A row of a method's table, and the numbers to compare rows by."""
    device, batch, size = process.device, work.batch_size or args.batch_size, work.input_size
    pixels = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
    parameters = work.model.train().parameters()
    groups = [{"params": list(parameters), "weight_decay": 0.05, "lr_scale": 1.0}]
    optimizer = torch.optim.AdamW(groups, 1e-4, (0.9, 0.95), fused=True)
    step = partial(run_step, work, optimizer, process, pixels=pixels)
    splits, rates = [], [product_rate(process)]
    for number in range(WARM_UP + max(1, args.steps // work.slowness)):
        take_turn()
        splits.append(step(number))
        rates.append(product_rate(process))
    memory, rate = max(s["memory"] for s in splits), statistics.median(rates)
    split = {part: statistics.median(s[part] for s in splits[WARM_UP:]) for part in splits[0]}
    # The counter knows matrix products, so attention has to be made of them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(work.executed):
            if work.forward:
                work.forward()
            else:
                plan = greenmim.to_device(work.plan(0), device)
                loss = work.loss(data.normalize(pixels.to(device)), plan)
        if work.executed:
            loss.backward()
    flop = counter.get_total_flops() / batch  # the backward pass has twice those of the forward
    executed = flop if work.executed else 3 * flop
    speed = batch / split["step"]
    fixed = f"{speed * work.gflop * 1e9 / rate:.0%}" if work.gflop else ""
    target, images = [], data.normalize(pixels.to(device))
    for _ in range(5 if work.target else 0):
        started = clock(device)
        work.target(images)
        target.append((clock(device) - started) / split["step"])
    if args.profile:
        title = f"{work.label}, {process.dtype}".replace("torch.", "")
        print_profile(title, partial(step, 0), device.type == "cuda")
    times = [split[part] for part in ("planning", "data", "forward", "backward", "optimizer")]
    gmac, share = flop / 2e9, f"{speed * executed / rate:.0%}"
    row = [speed, *times, f"{split['planning'] / split['step']:.1%}", memory, gmac, rate / 1e9,
           share, fixed]  # fmt: skip
    return {"row": [work.label, *row], "speed": speed, "memory": memory, "rate": rate,
            "baseline": work.baseline, "input_size": size, "gmac": gmac, "share": share,
            "target": f"{statistics.median(target):.2%}" if target else ""}  # fmt: skip


def take_turn() -> None:
    """Wait until the process that started this one lets it go on."""
    print(TURN, flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark that asked for this row has ended")


def listen(child: subprocess.Popen) -> dict | None:
    """What `measure` found, or None if the process waits for its turn."""
    for line in child.stdout:
        if line.strip() == TURN:
            return None
        if line.startswith("{"):
            return json.loads(line)
        print(line, end="")  # of its profile
    raise SystemExit(f"a row failed: {' '.join(child.args)}")


def measure_apart(
    topic: str, numbers: Sequence[int], dtype: str, args: argparse.Namespace
) -> list[dict]:
    """`measure` of rows of ROWS: in a process each, so that peaks of memory are apart, which take
    their steps in turns, so that what else the machine does slows all of them down alike."""
    command, found = [sys.executable, "-m", "tests.benchmark", *args.argv, "--row"], {}
    with contextlib.ExitStack() as stack:
        children = {}
        for number in numbers:
            child = subprocess.Popen([*command, f"{topic}:{number}:{dtype}"], text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
            children[number] = stack.enter_context(child)
            listen(child)
        while len(found) < len(children):
            for number in children.keys() - found.keys():
                print(file=children[number].stdin, flush=True)
                if result := listen(children[number]):
                    found[number] = result
    return [found[number] for number in numbers]


# ── methods ───────────────────────────────────────────────────────────────────────────


class DenseMIM(nn.Module):
    """SimMIM's compute: all tokens encoded, one linear map to pixels, L1 loss on hidden patches.

    Its mask token, an elementwise choice between two tokens, is left out.
    """

    def __init__(self, encoder: nn.Module, unit: int) -> None:
        super().__init__()
        self.encoder, self.unit = encoder, unit
        self.decoder = nn.Linear(encoder.channels[-1], unit**2 * 3)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """(B, 3, H, W), (U - V,) -> loss"""
        prediction = self.decoder(self.encoder(images)).float()
        target = greenmim.patchify(images, self.unit)
        return F.l1_loss(prediction.index_select(1, hidden), target.index_select(1, hidden))


class DenseViT(hpvit.HPViT):
    """MAE's encoder on all tokens."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C)"""
        [(x, _)] = self.outputs(images, [self.config.depth])
        return self.norm(x)[:, 1:]


def network(script: ModuleType, name: str, args: argparse.Namespace) -> str:
    """`name`, or, with --model test, the script's smallest network of that kind."""
    if args.model != "test":
        return name
    kind = name.split("_")[0]
    return next(n for n in (f"{kind}_test", f"test_{kind}", "test") if n in script.MODELS)


def model_named(name: str, **changes: int) -> greenmim.ModelConfig:
    """The architecture of --model, in another size or with another window."""
    return greenmim.model_config(greenmim.MODELS[greenmim.known_model(name)], **changes)


def draw_mask(config: greenmim.ModelConfig | hpvit.ModelConfig, number: int) -> np.ndarray:
    """(U,) bool, True = hidden: the mask of a pre-training step."""
    noise = np.random.default_rng((0, number, 0, 1)).random(config.units**2, np.float32)
    return greenmim.random_mask(noise, MASK_RATIO)


def greenmim_work(args: argparse.Namespace, device: torch.device) -> Workload:
    config = model_named(args.model)
    model = greenmim.GreenMIM(config).to(device)
    return Workload(
        f"GreenMIM, {config.input_size} px", model, config.input_size,
        plan=lambda number: greenmim.draw_plan(config, MASK_RATIO, (0, number, 0, 1)),
        loss=lambda images, plan: model(images, plan)[0],
        gflop=RELEASED_GFLOP.get(("greenmim", args.model)),
    )  # fmt: skip


def dense_work(args: argparse.Namespace, device: torch.device, small: bool) -> Workload:
    config = model_named(args.model)
    if small:  # 192 px and window 6 beside 224 and 7, as SimMIM pre-trains
        size = config.input_size - config.mask_unit
        window = round(config.window_size * size / config.input_size)
        config = model_named(args.model, input_size=size, window_size=window)
    model = DenseMIM(greenmim.SwinEncoder(config), config.mask_unit).to(device)
    return Workload(
        f"all tokens, {config.input_size} px", model, config.input_size,
        plan=lambda number: np.flatnonzero(draw_mask(config, number)), loss=model, slowness=3,
    )  # fmt: skip


def in_one_part(plan: mixmae.MixPlan) -> mixmae.MixPlan:
    """The plan with a mask where a stage of one window attends to each source by itself."""
    spans = []
    for stage in range(len(plan.spans)):
        parts = plan.spans[stage]
        if len(parts) == 2:
            window = math.isqrt(len(plan.places[stage]))
            _, (whole,) = mixmae.plan_stage(np.zeros((window, window), np.int64), window)
            tokens = np.argsort(plan.places[stage])  # in each slot
            source = np.arange(len(tokens)) >= parts[1].start
            apart = (source[:, None] != source)[None, None]
            parts = [mixmae.Span(0, 1, whole.index[np.ix_(tokens, tokens)], apart)]
        spans.append(parts)
    return replace(plan, spans=spans)


def mixmae_work(args: argparse.Namespace, device: torch.device, masked: bool) -> Workload:
    config = mixmae.MODELS[mixmae.known_model(args.model)]
    model, change = mixmae.MixMAE(config).to(device), in_one_part if masked else lambda plan: plan
    return Workload(
        f"MixMAE, {config.input_size} px{', masked in every stage' * masked}", model,
        config.input_size,
        plan=lambda number: change(mixmae.draw_mix(config, 0.5, 0.0, (0, number, 0, 1))),
        loss=lambda images, plan: model(images, plan)[0],
        gflop=RELEASED_GFLOP.get(("mixmae", args.model)), slowness=3,
    )  # fmt: skip


def unmixed_work(args: argparse.Namespace, device: torch.device) -> Workload:
    """Fine-tuning's step: the same encoder, nothing mixed, no decoder."""
    config = mixmae.MODELS[mixmae.known_model(args.model)]
    model = mixmae.MixClassifier(config, 1000).to(device)
    labels = torch.arange(args.batch_size, device=device)
    return Workload(
        f"not mixed, {config.input_size} px", model, config.input_size, plan=lambda number: [],
        loss=lambda images, _: F.cross_entropy(model(images).float(), labels), slowness=3,
    )  # fmt: skip


def mae_work(args: argparse.Namespace, device: torch.device) -> Workload:
    """Pre-training of the plain ViT that an HPViT is made from."""
    config = hpvit.MODELS[network(hpvit, "plain_base", args)]
    model = hpvit.MAE(config).to(device)
    return Workload(
        f"MAE ViT-B, {config.input_size} px, batch {args.batch_size}", model, config.input_size,
        plan=lambda number: hpvit.draw_shuffle(config, 0.75, args.batch_size, (0, number, 0, 1)),
        loss=lambda images, plan: model(images, plan)[0], slowness=3,
    )  # fmt: skip


def dense_mae_work(args: argparse.Namespace, device: torch.device) -> Workload:
    """The same ViT pre-trained on all tokens."""
    config = replace(hpvit.MODELS[network(hpvit, "plain_base", args)], global_pool=False)
    model = DenseMIM(DenseViT(config), config.patch_size).to(device)
    return Workload(
        f"all tokens, {config.input_size} px", model, config.input_size,
        plan=lambda number: np.flatnonzero(draw_mask(config, number)), loss=model, slowness=3,
    )  # fmt: skip


HIERARCHIES = {  # network, and whether every stage attends globally
    "plain ViT-B": ("plain_base", False), "HPViT-B light": ("hpvit_base_light", False),
    "HPViT-B": ("hpvit_base", False), "HPViT-B, all global": ("hpvit_base", True),
}  # fmt: skip


def hierarchy_work(
    args: argparse.Namespace, device: torch.device, label: str, size: int
) -> Workload:
    """Fine-tuning's step of one image."""
    name, everywhere = HIERARCHIES[label]
    config = hpvit.MODELS[network(hpvit, name, args)]
    windows = (0,) * len(config.depths) if everywhere else None
    config = hpvit.model_config(config, input_size=size, windows=windows)
    model, target = hpvit.HPViTClassifier(config, 1000).to(device), torch.zeros(1, device=device)

    def forward() -> Tensor:
        with torch.device("meta"):
            return hpvit.HPViTClassifier(config, 1000)(torch.empty(1, 3, size, size))

    return Workload(
        f"{label}, {size} px", model, size, plan=lambda number: [], slowness=9, batch_size=1,
        forward=forward,
        loss=lambda images, _: F.cross_entropy(model(images).float(), target.long()),
    )  # fmt: skip


DISTILLED = (  # label, student, what is distilled, the teacher and its dtype, the row to compare to
    ("MAE-Tiny", "vit_tiny", "none", "", None, 0),
    ("D-MAE, ViT-B teaches", "vit_tiny", "attention", "vit_base", None, 0),
    ("D-MAE, its teacher in bf16", "vit_tiny", "attention", "vit_base", torch.bfloat16, 1),
    ("D2-MAE", "vit_tiny", "decoupled", "vit_base", None, 0),
    ("D2-MAE, its teacher in bf16", "vit_tiny", "decoupled", "vit_base", torch.bfloat16, 3),
    ("Hiera-Tiny", "hiera_tiny", "none", "", None, 5),
    ("Hiera-Tiny, Hiera-B teaches", "hiera_tiny", "attention", "hiera_base", None, 5),
    ("the same, its teacher in bf16", "hiera_tiny", "attention", "hiera_base", torch.bfloat16, 6),
)


def distilled_work(args: argparse.Namespace, device: torch.device, row: int) -> Workload:
    """Pre-training of a small ViT or Hiera, alone or with a teacher."""
    label, name, distill, teacher, dtype, baseline = DISTILLED[row]
    name, there = network(distill_lite, name, args), None
    config = replace(distill_lite.MODELS[name], distill=distill)
    if teacher:
        teacher = network(distill_lite, teacher, args)
        there = distill_lite.teacher_model(distill_lite.MODELS[teacher]).requires_grad_(False)
        there = distill_lite.lower(there, dtype or torch.float32).to(device).eval()
    model = distill_lite.DistilledMAE(config, there, dtype).to(device)
    ratio = MASK_RATIO if config.kind == "vit" else distill_lite.HIERA_RATIO
    return Workload(
        label, model, config.input_size, executed=True, baseline=baseline,
        plan=lambda number: distill_lite.draw_masks(
            config, ratio, args.batch_size, (0, number, 0, 1)),
        loss=lambda images, plan: model(images, plan)[0],
    )  # fmt: skip


def fastmim_work(
    args: argparse.Namespace, device: torch.device, name: str, size: int, target: str = "hog"
) -> Workload:
    """Pre-training of one backbone, of images of one size."""
    name = network(fastmim, name, args)
    config = fastmim.model_config(fastmim.MODELS[name], input_size=size, target=target)
    model = fastmim.FastMIM(config).to(device)

    return Workload(
        f"{name}, {size} px, {target}", model, size, slowness=3,
        plan=lambda number: fastmim.draw_blocks(config, 0.75, args.batch_size, (0, number, 0, 1)),
        loss=lambda images, mask: model(images, mask)[0],
        target=partial(fastmim.make_target, config=config),
    )  # fmt: skip


METHODS: dict[str, list[Callable[[argparse.Namespace, torch.device], Workload]]] = {
    "greenmim": [greenmim_work, partial(dense_work, small=False), partial(dense_work, small=True)],
    "mixmae": [partial(mixmae_work, masked=False), partial(mixmae_work, masked=True), unmixed_work],
    "hpvit": [mae_work, *(partial(hierarchy_work, label=label, size=size)
                          for size in (224, 512) for label in HIERARCHIES)],
    "distill_lite": [partial(distilled_work, row=row) for row in range(len(DISTILLED))],
    "fastmim": [
        partial(fastmim_work, name=name, size=size, target=target)
        for name in ("vit_b", "swin_b", "pvtv2_b2", "cmt_s")
        for size, target in ((128, "hog"), (128, "pixel"), (192, "hog"), (224, "hog"))
    ],
}
COMPARED = (  # method, its script, network, what its baseline is, the steps of both
    ("GreenMIM", greenmim, "", "all tokens", greenmim_work, partial(dense_work, small=False)),
    *(("FastMIM", fastmim, name, "at 224 px", partial(fastmim_work, name=name, size=128),
       partial(fastmim_work, name=name, size=224)) for name in ("swin_b", "vit_b")),
    ("MixMAE", mixmae, "", "not mixed", partial(mixmae_work, masked=False), unmixed_work),
    ("MAE", hpvit, "plain_base", "all tokens", mae_work, dense_mae_work),
    ("D-MAE", distill_lite, "vit_tiny", "no teacher", partial(distilled_work, row=1),
     partial(distilled_work, row=0)),
)  # fmt: skip
ROWS = METHODS | {"methods": [work for *_, own, baseline in COMPARED for work in (own, baseline)]}


def methods_topic(args: argparse.Namespace) -> None:
    """A method a line, its steps in turns with its baseline's."""
    rows = []
    for dtype in args.dtype:
        for k, (method, script, name, baseline, *_) in enumerate(COMPARED):
            own, other = measure_apart("methods", (2 * k, 2 * k + 1), dtype, args)
            name = network(script, name or args.model, args)
            rows.append([method, dtype, name, own["input_size"], own["speed"], baseline,
                         other["speed"], f"{own['speed'] / other['speed']:.2f}", own["gmac"],
                         own["share"], own["memory"]])  # fmt: skip
    table(f"methods, batch {args.batch_size}", [
        "method", "dtype", "network", "px", "images/s", "baseline", "its images/s", "ratio",
        "GMAC/image", "share", "peak GB"], rows)  # fmt: skip
    print("\nA step of pre-training. Baselines: GreenMIM, MAE: the same encoder on all tokens, a "
          "linear map to pixels;\nFastMIM: itself at 224 px; MixMAE: its encoder fine-tuned, so "
          "nothing mixed, no decoder; D-MAE, whose teacher\nis a ViT-B: the student alone. "
          "Multiply-adds executed in both passes, a teacher's too; share: of the rate of\n"
          "plain matrix products between the steps.")  # fmt: skip


def method_topic(method: str, args: argparse.Namespace) -> None:
    """A method's step beside its baselines."""
    rows, rates, targets = [], [], []
    for dtype in args.dtype:
        results = []
        for number in range(len(METHODS[method])):
            results += measure_apart(method, [number], dtype, args)
            result, first = results[-1], results[results[-1]["baseline"]]
            ratios = (f"{result[k] / first[k]:.2f}" for k in ("speed", "memory"))
            label, *values = result["row"]
            rows.append([label, dtype, *values, *ratios])
            targets.append((f"{label}, {dtype}", result["target"]))
        rate = statistics.median(result["rate"] for result in results)
        rates.append(f"{dtype} {rate / 1e9:.0f} GFLOP/s")
    header = ["step", "dtype", "images/s", "planning s", "data s", "forward s", "backward s",
              "optimizer s", "planning", "peak GB", "GMAC/image", "product GFLOP/s", "share",
              "fixed share", "speed ratio", "memory ratio"]  # fmt: skip
    batch = f", batch {args.batch_size}"
    named = f", {args.model}{batch}"
    named = method + {"hpvit": "", "distill_lite": batch, "fastmim": batch}.get(method, named)
    counted, first = "counted in a forward pass, times three", "first row of the dtype"
    if method == "distill_lite":  # a share of fp32 says nothing of a teacher in bf16
        counted, first = "executed, the teacher's too", "student alone, or its teacher in fp32"
    table(named, header, rows)
    print(f"\nPlain matrix products between the steps: {', '.join(rates)}. Share of that rate: by "
          "the multiply-adds\n"
          f"{counted}; fixed share: by the FLOP of the released code. Ratios: to the "
          f"{first}.")  # fmt: skip
    if targets := [f"{label} {share}" for label, share in targets if share]:
        print(f"The target alone, of a step: {'; '.join(targets)}.")


# ── dense windows ─────────────────────────────────────────────────────────────────────


class RolledWindowAttention(nn.Module):
    """Swin's attention by rolling and reshaping the map, with the weights of a grouped one."""

    def __init__(
        self, attn: greenmim.GroupWindowAttention, side: int, window: int, shift: int
    ) -> None:
        super().__init__()
        self.attn, self.side, self.window, self.shift = attn, side, window, shift
        y, x = np.divmod(np.arange(window**2), window)
        dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
        self.register_buffer("index", torch.from_numpy(dy * (2 * window - 1) + dx).flatten())
        wrapped = torch.arange(side) >= side - shift  # after the roll
        piece = rearrange(2 * wrapped[:, None] + wrapped.int(), "(y p) (x q) -> (y x) (p q)",
                          p=window, q=window)  # fmt: skip
        apart = (piece[:, :, None] != piece[:, None, :]).unsqueeze(1)
        self.register_buffer("mask", torch.zeros(apart.shape).masked_fill(apart, -np.inf))

    def forward(self, x: Tensor, _: object = None) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        attn, s, size = self.attn, self.shift, {"p": self.window, "q": self.window}
        across, heads = self.side // self.window, attn.num_heads
        x = rearrange(x, "b (h w) c -> b h w c", h=self.side)
        x = x.roll((-s, -s), (1, 2)) if s else x
        x = attn.qkv(rearrange(x, "b (y p) (x q) c -> b (y x) (p q) c", **size))
        bias = attn.relative_position_bias_table[self.index]
        bias = rearrange(bias, "(s t) h -> h s t", s=self.window**2)
        bias = (bias + self.mask).flatten(0, 1) if s else bias
        layout = "b (w h) s d" if s else "(b w) h s d"  # only a shift needs a bias for each window
        q, k, v = rearrange(x, f"b w s (three h d) -> three {layout}", three=3, h=heads)
        x = greenmim.attend(q, k, v, bias.unsqueeze(0))
        x = attn.proj(rearrange(x, f"{layout} -> b w s (h d)", w=across**2, h=heads))
        x = rearrange(x, "b (y x) (p q) c -> b (y p) (x q) c", y=across, **size)
        x = x.roll((s, s), (1, 2)) if s else x
        return rearrange(x, "b h w c -> b (h w) c")


def dense_stage(
    config: greenmim.ModelConfig, stage: int, process: greenmim.Process, args: argparse.Namespace
) -> np.ndarray:
    """Seconds of a block, forward and backward, grouped and rolled; mean of plain and shifted."""
    window, side, device = config.window(stage), config.side(stage), process.device
    shift = window // 2 if side > window else 0
    if side % window:
        raise data.InputError(f"dense: a map of {side} tokens is not cut evenly by {window}")
    plan = greenmim.plan_mask(config, np.zeros(config.units**2, bool))
    plans = greenmim.to_device(plan.windows[stage], device)
    blocks = greenmim.SwinEncoder(config).layers[stage].blocks[: len(plans)].to(device)
    for block in blocks:  # large enough for a wrong bias to show
        nn.init.normal_(block.attn.relative_position_bias_table)
    grouped = [block.attn for block in blocks]
    rolled = [RolledWindowAttention(attn, side, window, shift * i).to(device)
              for i, attn in enumerate(grouped)]  # fmt: skip
    x = torch.randn(args.batch_size, side**2, blocks[0].norm1.weight.numel(), device=device)
    gradient, seconds, outputs = torch.randn_like(x), ([], []), {}
    for _ in range(WARM_UP + args.steps):
        for path, attentions in enumerate((grouped, rolled)):
            started, y = clock(device), x.detach().requires_grad_()
            with process.autocast():
                for block, attn, plan in zip(blocks, attentions, plans, strict=True):
                    block.attn = attn
                    y = block(y, plan)
            outputs[path] = y.detach()
            y.backward(gradient)
            seconds[path].append(clock(device) - started)
    if process.dtype is torch.float32 and device.type == "cpu":  # bf16 and TF32 round too coarsely
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    return np.median(np.array(seconds)[:, WARM_UP:], axis=1) / len(blocks)


def dense_topic(args: argparse.Namespace) -> None:
    """Is one way to cut windows enough: the grouped gather where nothing is masked?"""
    config, rows = model_named(args.model), []
    for dtype in args.dtype:
        process, total = greenmim.setup_process(args.device, dtype), np.zeros(2)
        for stage, depth in enumerate(config.depths):
            times = 1e3 * dense_stage(config, stage, process, args)
            rows.append([f"{stage}", dtype, depth, *times, f"{times[0] / times[1]:.2f}"])
            total += depth * times
        depth = sum(config.depths)
        rows.append(["sum over blocks", dtype, depth, *total, f"{total[0] / total[1]:.2f}"])
    table(f"dense, {args.model}, batch {args.batch_size}: a block, forward and backward",
          ["stage", "dtype", "blocks", "grouped ms", "rolled ms", "ratio"], rows)  # fmt: skip


# ── grouping ──────────────────────────────────────────────────────────────────────────


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


def attention_ms(
    attn: nn.Module, x: Tensor, plan: grouping.GroupPlan, process: greenmim.Process
) -> float:
    """Forward and backward of one attention layer, projections included."""
    for _ in range(2):  # the first call may compile kernels for a new shape
        started = clock(process.device)
        with process.autocast():
            y = attn(x, plan)
        y.backward(torch.ones_like(y))
    return 1e3 * (clock(process.device) - started)


def stage_costs(
    config: greenmim.ModelConfig, stage: int, args: argparse.Namespace
) -> dict[tuple[int, str], np.ndarray]:
    """(shift, rule) -> (masks, columns): slots, groups, padding, n g^2, ms to plan, to attend."""
    window, k = config.window(stage), config.unit_tokens(stage)
    shift = window // 2 if config.side(stage) > window else 0
    dim, costs = config.embed_dim * 2**stage, defaultdict(list)
    processes = [greenmim.setup_process(args.device, dtype) for dtype in args.dtype]
    device = processes[0].device
    attn = greenmim.GroupWindowAttention(dim, config.num_heads[stage], window).to(device)
    for number in range(WARM_UP + args.masks):
        keep = ~draw_mask(config, number).reshape(config.units, config.units)
        rows, columns = np.nonzero(keep.repeat(k, 0).repeat(k, 1))
        x = torch.randn(args.batch_size, len(rows), dim, device=device, requires_grad=True)
        for s in sorted({0, shift}):
            ids = grouping.window_ids(rows, columns, window, s)
            for name, rule in sizings(dim).items():
                started = time.perf_counter()
                plan = grouping.plan_groups(rows, columns, ids, window, rule)
                planning = 1e3 * (time.perf_counter() - started)
                groups, _, size, _ = plan.apart.shape
                shape = [size, groups, groups * size - len(rows), groups * size**2]
                plan = greenmim.to_device(plan, device)
                attending = [attention_ms(attn, x, plan, process) for process in processes]
                costs[s, name].append([*shape, planning, *attending])
    return {key: np.array(found[WARM_UP:]) for key, found in costs.items()}


def grouping_topic(args: argparse.Namespace) -> None:
    """What each rule of packing windows costs, counted (means) and timed (medians)."""
    timed = ["planning ms", *(f"attention ms, {dtype}" for dtype in args.dtype)]
    usual = model_named(args.model).window_size
    for window in (usual, 2 * usual):
        config, rows = model_named(args.model, window_size=window), []
        totals = defaultdict(float)
        for stage, depth in enumerate(config.depths):
            costs = stage_costs(config, stage, args)
            shifts = sorted({s for s, _ in costs})
            for (s, name), found in costs.items():
                size, groups, padding, cost = found[:, :4].mean(0)
                times = np.median(found[:, 4:], axis=0)
                slots = f"{size:.1f} ({found[:, 0].min():.0f}-{found[:, 0].max():.0f})"
                place = f"{stage}, shift {s}"
                rows.append([place, name, slots, groups, padding, f"{cost:.0f}", *times])
                # Blocks alternate between the shifts; they all share the plan made once.
                blocks = len(range(shifts.index(s), depth, len(shifts)))
                totals[name] += np.array([blocks * cost, times[0], *blocks * times[1:]])
        table(f"grouping, {args.model}, window {window}, batch {args.batch_size}, {args.masks} "
              f"masks, {MASK_RATIO:.0%} hidden", ["stage", "rule", "slots g (range)", "groups n",
              "padding", "n g^2", *timed], rows)  # fmt: skip
        sums = [[name, f"{cost:.0f}", *times] for name, (cost, *times) in totals.items()]
        table(f"grouping, window {window}, over all blocks", ["rule", "n g^2", *timed], sums)


# ── loader ────────────────────────────────────────────────────────────────────────────


def write_photographs(folder: Path, count: int = 64) -> float:
    """500x375 JPEGs of drawn shapes under noise, which makes files so large; their mean in KB."""
    source, rng = data.DrawnImages("train", count, 500), np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        pixels = np.asarray(source.open(index))[:375]
        pixels = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.jpg", quality=95)
    return sum(path.stat().st_size for path in folder.iterdir()) / count / 1e3


def pillow_crop(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """What TrainCrop does, by Pillow alone."""
    top, left, h, w = data.sample_crop(image.height, image.width, (0.2, 1.0), rng)
    image = image.convert("RGB").crop((left, top, left + w, top + h))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    flipped = rng.random() < 0.5
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image)


def pass_rate(source: data.ImageFiles, crop: data.Transform) -> float:
    """Images per second of one pass in this process."""
    started = time.perf_counter()
    for index in range(len(source)):
        with source.open(index) as image:
            crop(image, np.random.default_rng(index))
    return len(source) / (time.perf_counter() - started)


def loader_rate(source: data.ImageFiles, size: int, workers: int) -> float:
    """Images per second of TrainLoader, from its first batch on."""
    loader = data.TrainLoader(source, data.TrainCrop(size), batch_size=16, num_workers=workers)
    batches = loader.batches(0, len(loader))
    next(batches)
    started = time.perf_counter()
    images = sum(len(batch) for batch, _ in batches)
    return images / (time.perf_counter() - started)


def loader_topic(args: argparse.Namespace) -> None:
    """Images per second from files to uint8 tensors."""
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        photographs, copies = Path(folder, "photographs"), Path(folder, "copies")
        kilobytes = write_photographs(photographs)
        shrink = [sys.executable, "-m", "common.data", "shrink", str(photographs), str(copies)]
        subprocess.run(shrink, capture_output=True, check=True)
        large, small = data.find_images(photographs), data.find_images(copies)
        # Many enough for what the workers have ready at the first batch not to matter.
        many = data.ImageFiles([large.name(i) for i in range(len(large))] * 8)
        for size in (128, 160, 192, 224):
            ours, pillow = data.TrainCrop(size), partial(pillow_crop, size=size)
            tasks = ((large, pillow), (large, ours), (small, ours))
            rates = [[pass_rate(*task) for task in tasks] for _ in range(1 + args.steps)]
            plain, full, copied = np.median(rates[1:], axis=0)
            workers = [loader_rate(many, size, workers) for workers in (1, 2)]
            rows.append([f"{size}", plain, full, f"{full / plain:.2f}", copied,
                         f"{copied / full:.2f}", *workers])  # fmt: skip
    torch.set_num_threads(threads)
    table("loader, images/s: one core, then TrainLoader with workers", [
        "pixels", "plain Pillow", "ours", "to Pillow", "ours, shrunk copies", "to full size",
        "1 worker", "2 workers"], rows)  # fmt: skip
    print(f"\n500x375 JPEGs of quality 95: drawn images under noise, {kilobytes:.0f} KB each, "
          "about as much as photographs, so that they decode\nlike them. Shrunk: short side 160. "
          "Crop and flip are those of pre-training. Workers read the full size.")  # fmt: skip


# ── command line ──────────────────────────────────────────────────────────────────────

TOPICS: dict[str, Callable[[argparse.Namespace], None]] = {
    "methods": methods_topic,
    **{method: partial(method_topic, method) for method in METHODS},
    "dense": dense_topic, "grouping": grouping_topic, "loader": loader_topic,
}  # fmt: skip


def machine() -> str:
    """Processor, threads, load, GPU and versions in a line."""
    name, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists() and "model name" in (text := info.read_text()):
        name = text.split("model name", 1)[1].split("\n")[0].strip("\t :")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"{name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}; {gpu}; torch {torch.__version__}")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Print the tables of the topics asked for; with --row, measure one row of a method."""
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
    parser.add_argument("--json", type=Path, help="file for what the tables show [none]")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.topics) - set(TOPICS):
        parser.error(f"unknown topic {', '.join(unknown)}; there are {', '.join(TOPICS)}")
    args.argv = argv
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.row:
        topic, number, dtype = args.row.split(":")
        process = greenmim.setup_process(args.device, dtype)
        work = ROWS[topic][int(number)](args, process.device)
        if topic == "methods":  # one way to count, and as many steps of each
            work = replace(work, executed=True, slowness=1)
        print(json.dumps(measure(work, process, args)))
        return 0
    print(machine())
    try:
        model_named(args.model)
        # In this order, methods first: Linux counts a parent's memory in the peak of its children.
        for topic, function in TOPICS.items():
            if topic in (args.topics or TOPICS):
                function(args)
    except data.InputError as error:
        parser.error(str(error))
    if args.json:
        shown = {"machine": machine(), "tables": TABLES}
        args.json.write_text(json.dumps(shown, indent=1, default=float))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
