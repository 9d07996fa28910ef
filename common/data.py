"""Everything that reads pixels: image files, built-in images, crops, loaders, smaller copies; and
what files and consoles do to a run: errors in a sentence, files whole, checkpoints checked before
anything of them is used, streams that may go away.

Use alone: `loader = TrainLoader(find_images("photos"), TrainCrop(224), batch_size=64)`, then
`for images, labels in loader.batches(0, 1000): normalize(images.cuda())`; images travel as uint8
(B, 3, H, W). `python -m common.data shrink SRC DST --short_side 160` copies a data set smaller.
No random state is kept: an order is a function of (seed, epoch), a crop of (seed, epoch, index).
Whoever may stop early wraps `batches` in `contextlib.closing`: that ends the worker processes.
Sources: crops as in torchvision, evaluation as in timm, MAE and SimMIM; resizing is torch's.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import io
import math
import os
import re
import resource
import signal
import sys
import threading
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
Size, Box, Range = tuple[int, int], tuple[int, int, int, int], tuple[float, float]
Transform = Callable[[Image.Image, np.random.Generator], np.ndarray]
Batches = Generator[list[torch.Tensor], None, None]


class InputError(Exception):
    """What the user gave cannot work; the message is one sentence to print before exit 2."""


class TrainingError(InputError):
    """Training cannot go on; the message is one sentence to print before exit 1."""

    code = 1


@contextlib.contextmanager
def blaming(path: str | Path) -> Generator[None, None, None]:
    """Whatever goes wrong with a file inside becomes one InputError that names it."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: refused, {error}") from None
    except Exception as error:  # truncated, foreign and hostile files raise almost anything
        kind = "" if isinstance(error, ValueError) else f" ({type(error).__name__})"
        reason = str(error).strip().partition("\n")[0][:500] + kind
        if reason.startswith("Weights only load failed"):  # and how to load it unsafely
            reason = "it is no PyTorch file of tensors and plain values"
        if isinstance(error, KeyError):
            reason = f"what it holds is not as expected, {error}"
            if isinstance(error.args[0], int):  # of PyTorch's unpickler
                reason = "it is no PyTorch file"
        if isinstance(error, EOFError):
            reason = "it is empty or cut off"
        if isinstance(error, ImportError):
            reason = f"pip install {error.name.partition('.')[0]} for such files"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            array = found[1].startswith("numpy")
            reason = "holds NumPy arrays, save tensors" if array else f"would run code ({found[1]})"
        raise InputError(f"{path}: refused, {reason}") from None


def checked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` if all its values are ordinary finite tensors; ValueError names the first other."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is no tensor but {type(value).__name__}")
        plain = value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.is_nested or value.is_quantized or value.is_complex():
            raise ValueError(f"{name} is no ordinary tensor")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} repeats its elements")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return state


def save_file(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a file so that a crash or a full disk leaves an earlier one whole."""
    path = Path(path)
    try:
        part = path.with_name(path.name + ".part")
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
    except (OSError, RuntimeError, ValueError) as error:  # torch.save wraps a full disk
        if death := worker_death(error):  # news that may come anywhere
            raise death from None
        reason = (str(error.__context__ or error).strip() or repr(error)).partition("\n")[0]
        raise InputError(f"cannot write {path} (an earlier one stays whole): {reason}") from None


def _tensors(tree: object) -> Generator[torch.Tensor, None, None]:
    """Plain tensors on the CPU anywhere in nested dictionaries and sequences."""
    if isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
    elif isinstance(tree, torch.Tensor) and tree.layout is torch.strided and tree.is_cpu:
        yield tree


def read_checkpoint(path: str | Path, script: str = "") -> dict:
    """A .pth or .safetensors file as {"model": state dict, "args": dict, ...}, checked.
    Runs no code from the file, and asks for no more memory than the file has bytes. "args" is
    what a script of ours wrote there, or empty."""
    with blaming(path):
        if not os.path.isfile(path):
            raise InputError(f"{path}: there is no such weights file")
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return {"model": checked(load_file(path)), "args": {}}
        with open(path, "rb") as opened:
            zipped = opened.read(2) == b"PK"  # PyTorch's format since 2020; it checks no CRC
        if zipped:
            with zipfile.ZipFile(path) as archive:
                sizes = [entry.file_size for entry in archive.infolist()]
                packed = any(entry.compress_type for entry in archive.infolist())  # not by PyTorch
                if packed or sum(sizes) > os.path.getsize(path) or archive.testzip():
                    raise ValueError("it is damaged: contents and checksums disagree")
        torch.serialization.add_safe_globals([argparse.Namespace])  # in released files
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols and exotic tensors
            file = torch.load(path, map_location="cpu", weights_only=True)
        # A storage is as long as its record, which older PyTorch takes on trust.
        storages = [x.untyped_storage() for x in _tensors(file)]
        lengths = {storage.data_ptr(): storage.nbytes() for storage in storages}
        if zipped and Counter(filter(None, lengths.values())) - Counter(sizes):
            raise ValueError("it is damaged: tensors are longer than what it holds of them")
        names = ("model", "state_dict", "model_state") if isinstance(file, dict) else ()
        keys = [k for k in names if k in file]
        file = file | {"model": file[keys[0]]} if keys else {"model": file}
        if not isinstance(file["model"], dict) or not file["model"]:
            raise ValueError("it holds no state dict, at the top, under 'model' or 'state_dict'")
        state = {str(k).removeprefix("module."): v for k, v in checked(file["model"]).items()}
        args = file.get("args")
        args = args if isinstance(args, dict) and "script" in args else {}
        if args and script and args["script"] != script:
            raise ValueError(f"it was written by {args['script']}.py, not by {script}.py")
        return file | {"model": state, "args": args}


def check_keys(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """ValueError that names the differences between a file and a model, three in full."""
    wrong = [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
             for k in own if k in state and state[k].shape != own[k].shape]
    wrong += [f"{k} is missing" for k in own if k not in state]
    wrong += [f"{k} is unexpected" for k in state if k not in own]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"it is not of this --model: {'; '.join(wrong[:3])}{more}")


# Settings that name places or machinery: they neither belong to a recipe nor change a result.
PLACES = ("data_path", "output_dir", "weights", "resume", "num_workers", "device", "compile",
          "grad_checkpoint", "save_freq", "save_every", "log_every")


def differences(now: dict, then: dict, word: str) -> str:
    """What of `now` is not so `then`, places and machinery aside, in words."""
    return ", ".join(f"{k} {v!r} ({word} {then.get(k)!r})" for k, v in now.items()
                     if v != then.get(k) and k not in PLACES)


def check_resumable(file: dict, args: dict, parts: dict, total: int) -> None:
    """ValueError unless a run with these `args` can go on from a file: part by part, by name."""
    lacking = sorted({"step", "epoch", "log", *parts} - file.keys())
    if lacking or "settings" not in file["args"]:
        raise ValueError(f"to resume it lacks {', '.join(lacking)}; --weights can start from it")
    # Other values of these would misplace steps, images or parameters.
    keys = ("command", "model", "classes", "seed", "batch", "images", "linear_probe")
    there, here = ({k: (r["settings"] | r).get(k) for k in keys} | r["config"]
                   for r in (file["args"], args))
    if there["model"] != here["model"]:
        here = {"model": here["model"]}  # from which all else follows
    if wrong := differences(here, there, "the file has"):
        raise ValueError(f"--resume none starts afresh: it cannot go on with {wrong}")
    if type(file["step"]) is not int or not 0 <= file["step"] <= total:
        raise ValueError(f"its step {file['step']!r} is not between 0 and the {total} of --epochs")
    records, sums = file["log"]["records"], file["log"]["epoch"].values()
    fits = len(records) == file["epoch"] and all(isinstance(record, dict) for record in records)
    if not fits or not all(isinstance(value, int | float) for value in sums):
        raise ValueError("its log is not that of its epochs")
    for name in parts.keys() & {"model", "ema"}:
        check_keys(checked(file[name]), parts[name].state_dict())
    own, there = parts["optimizer"], file["optimizer"]
    mine, found = ([len(g["params"]) for g in x["param_groups"]] for x in (own.state_dict(), there))
    parameters = [p for group in own.param_groups for p in group["params"]]
    if mine != found or len(there["state"]) not in (0, len(parameters)):
        raise ValueError("its optimizer has other parameters")
    # A fused optimizer takes the memory of its state on trust: a tensor too short is a crash.
    names = ("step", "exp_avg", "exp_avg_sq") if "betas" in own.defaults else ("momentum_buffer",)
    wanted = {f"{k} of parameter {i}": torch.zeros(()) if k == "step" else p
              for i, p in enumerate(parameters) for k in names}
    found = {f"{k} of parameter {i}": v for i, x in there["state"].items() for k, v in x.items()}
    check_keys(checked(found), wanted if there["state"] else {})


def open_board(output: Path, step: int) -> Callable[..., None]:
    """A function (values, step, picture) that writes to TensorBoard where that is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda *_: None
    writer = SummaryWriter(str(output), purge_step=step)

    def write(values: dict[str, float], step: int, picture: Path | None = None) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        if picture and picture.exists():
            pixels = np.asarray(Image.open(picture))
            writer.add_image("reconstruction", pixels, step, dataformats="HWC")
        writer.flush()

    return write


@contextlib.contextmanager
def only_run(folder: Path) -> Generator[None, None, None]:
    """Hold the lock of an output folder, which also proves that one can write there."""
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115 - open as long as the run
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino != os.stat(lock).st_ino:
            raise BlockingIOError  # a run that ended meanwhile took this lock file with it
    except (BlockingIOError, PermissionError):
        raise InputError(f"--output_dir {folder}: another run has it, or it is protected") from None
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {folder}: {error.strerror}") from None
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Unbreakable:
    """A standard stream that drops what it cannot write: its reader has gone, its disk is full."""

    def __init__(self, stream: TextIO | None) -> None:
        # A stream that was closed before the start left its number to the next file: to this.
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except UnicodeEncodeError:  # an ASCII console
            self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # drops what is in its buffer, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def _say(sentence: str) -> None:
    """Write to stderr, beside a progress bar; a console that cannot show it ends no run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, lacks a letter, None
        tqdm.write(sentence, file=sys.stderr)


class ImageFiles:
    """Image files, labels (integers or None), class names; any source of this shape will do."""

    def __init__(self, paths: Iterable[str | Path], labels: Sequence[int] | None = None,
                 classes: Sequence[str] = ()) -> None:
        # One array: a million strings would be copied into every worker by reference counting.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = None if labels is None else np.array(labels, dtype=np.int64)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def open(self, index: int) -> Image.Image:
        """The image, not decoded yet: a crop chooses how."""
        with warnings.catch_warnings():
            # Pillow itself refuses a decompression bomb only from twice its limit on.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(self.name(index))


def _images_under(root: str | Path) -> list[str]:
    """Images at any depth, in ImageFolder's order: folders, then names. A folder is visited once,
    by its own path rather than by a link; links to folders above are not followed."""
    found, seen, folders, links = [], set(), [str(root)], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status, entries = os.stat(folder), sorted(os.scandir(folder), key=os.fspath)
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            # A link to nothing counts as a file, so that it is named as unreadable; a pipe or a
            # device does not, since opening one may wait for ever.
            is_link, target = entry.is_symlink(), Path(entry.path)
            if (is_link and not os.path.exists(target)) or entry.is_file():
                if entry.name.lower().endswith(SUFFIXES):
                    found.append((folder, entry.name))
            elif entry.is_dir() and not is_link:
                folders.append(entry.path)
            elif entry.is_dir():
                above = (*Path(root).resolve().parents, *Path(folder).resolve().parents)
                links += [entry.path] if target.resolve() not in above else []
    return [os.path.join(*parts) for parts in sorted(found)]


def find_images(data_path: str | Path) -> ImageFiles:
    """Unlabelled images: a tree of folders (only `train` if there is one), a single image, or a
    text file with a path a line, relative to its own folder."""
    path = Path(data_path)
    if os.path.isdir(path):  # unlike Path.is_dir, no error if the name is too long
        paths = _images_under(path / "train" if (path / "train").is_dir() else path)
    elif os.path.isfile(path) and path.name.lower().endswith(SUFFIXES):
        paths = [path]
    else:
        try:
            if not os.path.isfile(path):
                raise FileNotFoundError(path)
            # Nothing but "\n" and "\r\n" ends a line: all else may be part of a name.
            with open(path, encoding="utf-8-sig", newline="\n") as file:
                lines = [line.removesuffix("\n").removesuffix("\r") for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no folder, image or text file with paths") from error
        listed = {n: path.parent / line for n, line in enumerate(lines, 1) if line.strip()}
        for number, image in listed.items():
            if not os.path.isfile(image):
                raise InputError(f"{path}, line {number}: expected an image, {image} is no file")
        paths = list(listed.values())
    if not paths:
        raise InputError(f"{path} holds no images: expected files ending in {' '.join(SUFFIXES)}")
    return ImageFiles(paths)


def find_labelled(data_path: str | Path, split: str) -> ImageFiles:
    """Images of data_path/split/<class>/..., labelled by the sorted names of the class folders."""
    root = Path(data_path) / split
    wanted = f"expected {root}/<class>/ folders of images"
    if not os.path.isdir(root):
        raise InputError(f"{root} does not exist: {wanted}")
    paths = _images_under(root)
    found = {entry.name: [] for entry in sorted(root.iterdir()) if os.path.isdir(entry)}
    for path in paths:
        name, _, inside = path[len(f"{root}/") :].partition("/")
        if inside:
            found[name].append(path)
    if not found:
        raise InputError(f"{root} holds no classes: {wanted}")
    for name in found:
        if not found[name]:
            raise InputError(f"{root / name} holds no images of its own: {wanted}")
    labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found.values()])
    return ImageFiles([path for paths in found.values() for path in paths], labels, [*found])


def _box(u: np.ndarray, v: np.ndarray, half_u: float, half_v: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


# Signed distances, negative inside, in a frame where each shape about fills the unit disc.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.18,
    "square": lambda u, v: _box(u, v, 0.7, 0.7),
    "triangle": lambda u, v: np.maximum(0.75**0.5 * np.abs(u) + v / 2, -v) - 0.5,
    # The second nearest of the five side lines of a pentagon bounds its star.
    "star": lambda u, v: np.hypot(u, v)
    * np.cos(0.4 * np.pi - np.abs(np.arctan2(v, u) % (0.4 * np.pi) - 0.2 * np.pi)) - 0.34,
    "plus": lambda u, v: np.minimum(_box(u, v, 0.95, 0.28), _box(u, v, 0.28, 0.95)),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.92, 0.72 - np.hypot(u - 0.45, v)),
    "heart": lambda u, v: np.minimum(
        _box(u, v, 0.55, 0.55), np.minimum(np.hypot(u - 0.55, v), np.hypot(u, v - 0.55)) - 0.55),
    "ell": lambda u, v: np.minimum(_box(u + 0.42, v, 0.26, 0.9), _box(u, v - 0.64, 0.68, 0.26)),
    "bars": lambda u, v: _box(u, np.abs(v) - 0.52, 0.8, 0.26),
}


def _texture(random: Callable[..., np.ndarray], size: int) -> np.ndarray:
    """Gradient, stripes, checks or blotches, (S, S, 1) in [-1, 1], from a small random grid."""
    axes, sharpness = [], 1 + 7 * random() ** 2
    for cells in 1 + (8 * random(2)).astype(int):
        near = np.abs(np.linspace(0, cells - 1, size)[:, None] - np.arange(cells))
        near = (0.5 + sharpness * (near - 0.5)).clip(0, 1)
        axes.append((1 - near) ** 2 * (1 + 2 * near))  # smoothstep: each row adds up to one
    grid = 2 * random((axes[0].shape[1], axes[1].shape[1])) - 1
    return (axes[0] @ grid @ axes[1].T)[..., None]


class DrawnImages(ImageFiles):
    """Built-in images of ten shapes, label = index % 10; (split, index) alone decides an image.
    Place, size, rotation, colours and textures are drawn alike for all: only outlines differ."""

    def __init__(self, split: str, length: int, size: int = 64) -> None:
        self.split, self.size, self.classes = split, size, list(SHAPES)
        self.labels = np.resize(np.arange(len(SHAPES), dtype=np.int8), length)
        self.drawn: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.split}/{index}"

    def open(self, index: int) -> Image.Image:
        if index not in self.drawn:
            if len(self.drawn) == 10_000:  # 120 MB of 64 px
                self.drawn.clear()
            self.drawn[index] = self.draw(index)
        return self.drawn[index].copy()

    def draw(self, index: int) -> Image.Image:
        """The image, drawn anew."""
        random = np.random.default_rng(list(self.name(index).encode())).random
        background = random(3)
        colours = background, (background + 0.3 + 0.4 * random(3)) % 1
        strengths = (0.5, 0.2) * (random((2, 3)) - 0.5).T  # the ground is the busier one
        image, foreground = (
            colour + _texture(random, self.size) * strength
            for colour, strength in zip(colours, strengths.T, strict=True)
        )
        y, x = np.ogrid[-1 : 1 : self.size * 1j, -1 : 1 : self.size * 1j]
        radius, angle = 0.55 + 0.3 * random(), 0.5 * (2 * random() - 1)
        cx, cy = 0.7 * (1 - 0.9 * radius) * (2 * random(2) - 1)
        cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
        u, v = cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)
        distance = SHAPES[self.classes[self.labels[index]]](u, v) * radius * self.size / 2
        image = image + (0.5 - distance).clip(0, 1)[..., None] * (foreground - image)
        return Image.fromarray(np.rint(image.clip(0, 1) * 255).astype(np.uint8))


def open_source(data_path: str, split: str = "") -> ImageFiles:
    """Images of a path, labelled ones of a split; "drawn:N" stands for N built-in images."""
    if not data_path:
        raise InputError("give --data_path FOLDER")
    if data_path.startswith("drawn:"):
        number = data_path.removeprefix("drawn:")
        # The length first: int() refuses thousands of digits with an error of its own.
        if not (number.isdecimal() and len(number) <= 8 and 1 <= int(number) <= 10_000_000):
            raise InputError(f"{data_path}: expected drawn:N with N from 1 to 10000000")
        return DrawnImages(split or "train", int(number))
    return find_labelled(data_path, split) if split else find_images(data_path)


def sides(size: int | Size) -> str:
    """A size as a flag has it: 224, or 224x320, height and width."""
    return "x".join(map(str, size if isinstance(size, tuple) else (size,)))


def check_classes(trained: Sequence[str], tested: Sequence[str], outputs: int) -> None:
    """InputError unless labels of both mean the same and the model has enough outputs."""
    if len(trained) > outputs:
        raise InputError(f"the data has {len(trained)} classes, more than the {outputs} outputs")
    if list(trained) != list(tested):
        odd = sorted(set(trained) ^ set(tested))[:3] or ["their order"]
        raise InputError(f"the classes differ from those of training: {', '.join(odd)}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB: alpha is dropped, EXIF orientation ignored."""
    image.load()
    if image.mode[0] in "IF":
        # Pillow would clip. Integers have 16 bits; floats the smallest usual range that fits.
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = values.max() if image.mode == "F" else 65535
        scale = 255 if top <= 1 else 1 if top <= 255 else 1 / 256
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Palette images")  # with several transparencies
        return image if image.mode == "RGB" else image.convert("RGB")


def crop_size(height: int, width: int, area_fraction: float, log_ratio: float) -> Size | None:
    """One try of the random resized crop: (h, w) of that area and ln(w / h), None if too large."""
    area, ratio = area_fraction * (height * width), math.exp(log_ratio)
    h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
    return (h, w) if 0 < h <= height and 0 < w <= width else None


def fallback_crop(height: int, width: int, ratio: Range = (3 / 4, 4 / 3)) -> Box:
    """(top, left, h, w) of the largest centred box of allowed width / height."""
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def sample_crop(height: int, width: int, scale: Range, rng: np.random.Generator,
                ratio: Range = (3 / 4, 4 / 3)) -> Box:
    """(top, left, h, w) of a random resized crop: area uniform in `scale`, ratio log-uniform."""
    for _ in range(10):
        fraction, log_ratio = rng.uniform(*scale), rng.uniform(*map(math.log, ratio))
        if size := crop_size(height, width, fraction, log_ratio):
            top, left = (int(rng.integers(n + 1)) for n in (height - size[0], width - size[1]))
            return top, left, *size
    return fallback_crop(height, width, ratio)


def resize(pixels: np.ndarray, size: Size, interpolation: str = "bicubic") -> np.ndarray:
    """Antialiased resize of uint8 (H, W, 3) to `size` (h, w), within one level of Pillow's."""
    # Contiguous for torch's channels-last kernel, writable because it warns about Pillow's arrays.
    image = torch.from_numpy(np.require(pixels, requirements="CW")).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(image, size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def center_crop(pixels: np.ndarray, size: Size) -> np.ndarray:
    """The middle `size` (h, w) of (H, W, C); a shorter side is padded with black first."""
    missing = [max(wanted - side, 0) for side, wanted in zip(pixels.shape[:2], size, strict=True)]
    pixels = np.pad(pixels, [*((n // 2, n - n // 2) for n in missing), (0, 0)])
    # round() takes ties to even, as torchvision does since 0.9.
    top, left = round((pixels.shape[0] - size[0]) / 2), round((pixels.shape[1] - size[1]) / 2)
    return pixels[top : top + size[0], left : left + size[1]]


def eval_resize(size: int, rule: str) -> int:
    """Short side to resize to before the centre crop of `size`."""
    sides = {"timm": int(size / 0.875), "simmim": int(256 / 224 * size)}
    return {**sides, "mae": sides["timm"] if size <= 224 else size}[rule]


def resized_shape(h: int, w: int, short: int | Size) -> Size:
    """(h, w) with the short side at `short`, or just covering (height, width); the other side is
    truncated."""
    height, width = (short, short) if isinstance(short, int) else short
    covered = w * height <= h * width  # by the image at this width
    return (int(width * h / w), width) if covered else (height, int(height * w / h))


@dataclass(frozen=True)
class TrainCrop:
    """Random resized crop and flip of a PIL image not decoded yet -> uint8 (size, size, 3).

    `interpolation` "random" draws bilinear or bicubic (MAE-Lite); `augment` maps (PIL image, rng)
    to a PIL image; `fast_decode` reads JPEG at 1/2 to 1/8 where nothing is enlarged afterwards."""
    size: int
    scale: Range = (0.2, 1.0)
    interpolation: str = "bicubic"
    flip: float = 0.5
    augment: Callable[[Image.Image, np.random.Generator], Image.Image] | None = None
    fast_decode: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        (width, height), mode = image.size, self.interpolation
        top, left, h, w = sample_crop(height, width, self.scale, rng)
        if mode == "random":
            mode = ("bilinear", "bicubic")[rng.integers(2)]
        box = left, top, left + w, top + h
        k = next((k for k in (8, 4, 2) if self.fast_decode and min(h, w) >= k * self.size), 1)
        # draft answers None, and changes nothing, for anything but a JPEG not decoded yet.
        if k > 1 and image.draft(None, (width // k, height // k)):
            box = [round(side / k) for side in box]
        pixels = np.asarray(to_rgb(image).crop(box))
        pixels = resize(pixels, (self.size, self.size), mode)
        pixels = pixels[:, ::-1] if rng.random() < self.flip else pixels
        return np.asarray(self.augment(Image.fromarray(pixels), rng)) if self.augment else pixels


@dataclass(frozen=True)
class EvalCrop:
    """Resize by `rule` (the short side, or to cover (height, width)), then centre crop: PIL image
    -> uint8 (size, size, 3) or (height, width, 3)."""
    size: int | Size
    rule: str = "simmim"

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        pixels = np.asarray(to_rgb(image))
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        if self.rule == "simmim" and max(size) <= 32:  # SimMIM does not crop small images
            return resize(pixels, size)
        # A strip of 65000 x 1 pixels would become gigabytes: first drop most of what is cropped.
        (h, w), most = pixels.shape[:2], 1 + 16 * max(size) // min(size)
        pixels = center_crop(pixels, (min(h, most * w), min(w, most * h)))
        height, width = (eval_resize(max(size), self.rule) * side // max(size) for side in size)
        return center_crop(resize(pixels, resized_shape(*pixels.shape[:2], (height, width))), size)


def draw_columns(columns: torch.Tensor, labels: Sequence[str]) -> Image.Image:
    """Normalised (k, B, 3, H, W) -> a picture: an image a row, a column a label, names on top."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    colours = (columns.detach().cpu().float() * std + mean).clamp(0, 1)
    # (k, B, 3, H, W) -> (B * H, k * W, 3)
    pixels = (colours * 255).round().byte().permute(1, 3, 0, 4, 2).flatten(2, 3).flatten(0, 1)
    grid, zoom = Image.fromarray(pixels.numpy()), max(1, round(200 / columns.shape[-1]))
    grid = grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (grid.width, grid.height + 16), "white")
    picture.paste(grid, (0, 16))
    for k, label in enumerate(labels):
        ImageDraw.Draw(picture).text((k * grid.width // len(columns) + 4, 2), label, fill="black")
    return picture


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """`save_file` for a PNG, encoded first: Pillow would hide why a write failed."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    save_file(path, lambda file: file.write(encoded.getvalue()))


def normalize(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> ImageNet-normalised `dtype`, computed in float32 on their device."""
    scaled = images.float().div_(255)
    # Channel by channel with Python numbers: a table would be copied to the device at each call.
    for c in range(3):
        scaled[:, c].sub_(IMAGENET_MEAN[c]).div_(IMAGENET_STD[c])
    return scaled.to(dtype)


@lru_cache(maxsize=1)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Order of the images in an epoch, int64 (length,); cached, so not to be written to."""
    # `length` keeps this stream apart from those of the images, whose index is smaller.
    return np.random.default_rng([seed, epoch, length]).permutation(length)


def worker_count(asked: int | None) -> int:
    """Loader processes: as asked, else by the cores for each process of this node, at most 8."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, (os.cpu_count() or 1) // here) if asked is None else asked


INSTEAD = "--num_workers 0 loads in the main process"
KILLED = f"a process that loads images was killed (out of memory?); {INSTEAD}"


def worker_death(error: BaseException) -> InputError | None:
    """What to say if `error` is torch's for a worker that is gone. A handler of signals raises it
    wherever the main thread happens to be: in a model as well as in a loader."""
    return InputError(KILLED) if str(error).startswith("DataLoader worker (pid") else None


def _prepare_worker(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes: the main one decides what they mean.
    Whoever sends a second SIGTERM means the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _work(data: Sequence, keys: Iterable, count: int | None, **options: object) -> Generator:
    """data[key] of each key; the workers end with this generator, or else with the process."""
    # A generator of its own, because DataLoader would draw from the global one.
    options |= {"sampler": keys, "batch_size": None, "generator": torch.Generator()}
    options |= {"num_workers": worker_count(count), "worker_init_fn": _prepare_worker}
    workers = []
    try:
        with contextlib.ExitStack() as ending:
            # At exit multiprocessing sends one SIGTERM, which workers outlive, and waits for them.
            atexit.register(ending.close)
            ending.callback(atexit.unregister, ending.close)
            # Workers inherit the mask: no signal comes before they are prepared.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                batches = iter(DataLoader(data, **options))
                workers += getattr(batches, "_workers", [])
                for worker in workers:  # at last, should one hang in a system call
                    ending.callback(worker.join, 5)
                    ending.callback(worker.kill)
                # First what dropping the iterator does, but a traceback may hold it for long.
                ending.callback(getattr(batches, "_shutdown_workers", lambda: None))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        # A worker that dies while it sends shows as almost any error, its exit code tells.
        killed = worker_death(error) or any(worker.exitcode for worker in workers)
        reason = str(error).strip().rpartition("\n")[2]  # the end of a worker's traceback
        told = KILLED if killed else f"loading images failed ({reason}); {INSTEAD}"
        raise InputError(told) from error


@dataclass
class _Batches:
    """Batches by key (epoch, positions in its order); without a seed, in the order of `source`."""
    source: ImageFiles
    transform: Transform
    seed: int | None = None
    tries: int = 1  # images to try at a position and after it, until one can be read

    def __getitem__(self, key: tuple[int, range]) -> list:
        """Images uint8 (B, 3, S, S), labels (B,), indices (B,), {index: reason} of bad images."""
        (epoch, positions), length, seed = key, len(self.source), self.seed or 0
        order = range(length) if self.seed is None else permutation(seed, epoch, length)
        indices, pixels, bad = [], [], {}
        for position in positions:
            for place in range(position, position + self.tries):
                index = int(order[place % length])
                if index in bad:
                    continue
                try:
                    with self.source.open(index) as image:
                        rng = np.random.default_rng([seed, epoch, index])
                        pixels.append(self.transform(image, rng).transpose(2, 0, 1))
                    indices.append(index)
                    break
                except MemoryError:
                    raise
                except Exception as error:  # damaged files make Pillow raise almost anything
                    bad[index] = f"{type(error).__name__}: {error}"
        labels = [0 if self.source.labels is None else self.source.labels[i] for i in indices]
        columns = ((pixels, np.uint8), (labels, np.int64), (indices, np.int64))
        batch = [torch.from_numpy(np.array(values, kind)) for values, kind in columns]
        if get_worker_info() and indices:
            # Else torch does it in a thread, and if memory lacks, nobody hears of it: a hang.
            batch = [column.share_memory_() for column in batch]
        return [*batch, bad]

    def load(self, keys: Iterable, bad: dict[int, str], workers: int | None, pin: bool) -> Batches:
        """Images, labels, indices, number of bad images of each key; adds the bad ones to `bad`,
        naming each once."""
        with contextlib.closing(_work(self, keys, workers, pin_memory=pin)) as loaded:
            for *batch, found in loaded:
                for i in [i for i in found if i not in bad]:
                    bad[i] = f"{self.source.name(i)} ({found[i]})"
                    _say(f"unreadable image skipped: {bad[i]}")
                yield [*batch, len(found)]


@dataclass
class TrainLoader:
    """Shuffled micro-batches; len() is the number of optimizer updates in an epoch. The order is a
    function of the global batch, not of the processes and `accum_iter` that share it."""
    source: ImageFiles
    transform: Transform
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accum_iter: int = 1
    num_workers: int | None = 0  # None = worker_count(None)
    pin_memory: bool = False

    def __post_init__(self) -> None:
        self.unreadable = 0  # bad images met in the micro-batches that `batches` gave so far
        length, shares = len(self.source), self.world_size * self.accum_iter
        self._steps, fits = length // (self.batch_size * shares), length // shares
        if not self._steps:
            advice = "not even --batch_size 1 fits, lower --accum_iter or start fewer processes"
            if fits:
                fits -= fits % 2 if fits > 1 else 0  # mixup pairs images
                advice = f"--batch_size {fits} or less fits, and --recipe small is for few images"
            raise InputError(
                f"{length} images do not fill one global batch of {self.batch_size * shares} "
                f"(--batch_size {self.batch_size} x --accum_iter {self.accum_iter} x "
                f"{self.world_size} processes): {advice}")

    def __len__(self) -> int:
        return self._steps

    def _key(self, number: int) -> tuple[int, range]:
        epoch, number = divmod(number, len(self) * self.accum_iter)
        first = (number * self.world_size + self.rank) * self.batch_size
        return epoch, range(first, first + self.batch_size)

    def batches(self, start_step: int, total_steps: int) -> Batches:
        """Images uint8 (B, 3, S, S), labels (B,): `accum_iter` pairs for each optimizer update."""
        # More than 1% of bad images is the user's to mend; five must pass for small folders' sake.
        bad, limit = {}, max(5, len(self.source) // 100 // self.world_size)
        data, self.unreadable = _Batches(self.source, self.transform, self.seed, limit + 1), 0
        keys = map(self._key, range(start_step * self.accum_iter, total_steps * self.accum_iter))
        load = data.load(keys, bad, self.num_workers, self.pin_memory)
        with contextlib.closing(load) as loaded:
            for images, labels, _, found in loaded:
                if len(bad) > limit or len(images) < self.batch_size:
                    names = ", ".join(self.source.name(index) for index in list(bad)[:10])
                    raise InputError(f"more than 1% of the images cannot be read: {names}")
                # Not len(bad): a resumed run must count what the run never stopped counts.
                self.unreadable += found
                yield images, labels


def eval_batches(source: ImageFiles, transform: Transform, *, batch_size: int, rank: int = 0,
                 world_size: int = 1, num_workers: int | None = 0, pin_memory: bool = False,
                 few: int = 0) -> Batches:
    """Images, labels and indices, each image once, or only so many `few` from all over the source;
    those that cannot be read are left out, but InputError if that is all. Reads nothing before the
    first batch is asked for."""
    mine, bad = range(rank, len(source), world_size), {}
    mine = mine[:: max(1, len(mine) // few)][:few] if few else mine
    keys = [(0, mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]
    loaded = _Batches(source, transform).load(keys, bad, num_workers, pin_memory)
    with contextlib.closing(loaded):
        for *batch, _ in loaded:
            if len(batch[0]):
                yield batch
    if mine and len(bad) == len(mine):
        first = next(iter(bad.values()))
        raise InputError(f"none of the {len(mine)} images can be read, the first: {first}")


@contextlib.contextmanager
def catching_signals() -> Generator[list[int], None, None]:
    """SIGTERM or Ctrl-C, listed as it comes, lets the step in progress end; a second one kills."""
    caught, previous = [], {}

    def note(number: int, _: object) -> None:
        caught.append(number)
        for other in previous:
            signal.signal(other, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
        previous = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code(work: Callable[[], object]) -> int:
    """Run a command: 0 = done, or stopped by SIGTERM and saved; else one sentence on stderr, and
    2 = the input cannot work, 130 = stopped by Ctrl-C, 1 = anything else."""
    out, err = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            work()
            return 0
        except SystemExit as stopped:  # --help, or SIGTERM
            return int(stopped.code or 0)
        except KeyboardInterrupt:
            code, said = 130, "interrupted"
        except (InputError, OSError) as error:
            code, said = getattr(error, "code", 2), str(error)
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            frames = traceback.extract_tb(error.__traceback__)
            frame = ([f for f in frames if "site-packages" not in f.filename] or frames)[-1]
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            code, said = 1, f"{reason} ({place}; python -X dev shows how it came to this)"
            said = worker_death(error) or said
        print(f"error: {said}", file=sys.stderr)
        return code


def _shrink(source: str, target: str, short_side: int, quality: int, name: str) -> str | None:
    """Write one smaller copy; None if it is there already, the reason if none can be made."""
    source, target = os.path.join(source, name), os.path.join(target, name)
    if os.path.exists(target):
        return None
    try:
        with ImageFiles([source]).open(0) as image:
            kind, rgb = image.format, to_rgb(image)
    except Exception as error:
        return f"unreadable image skipped: {source} ({type(error).__name__}: {error})"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if min(rgb.size) <= short_side:
        Path(f"{target}.tmp").write_bytes(Path(source).read_bytes())
    else:
        kind = "JPEG" if kind == "MPO" else kind if kind in Image.SAVE else "PNG"
        options = {"quality": quality} if kind in ("JPEG", "WEBP") else {}
        pixels = resize(np.asarray(rgb), resized_shape(rgb.height, rgb.width, short_side))
        Image.fromarray(pixels).save(f"{target}.tmp", kind, **options)
    os.replace(f"{target}.tmp", target)  # a killed run leaves no half-written image
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """`shrink SRC DST`: same folders, names and formats, short sides of `--short_side` at most."""
    parser = argparse.ArgumentParser(prog="python -m common.data", description=main.__doc__)
    parser.add_argument("command", choices=["shrink"])
    parser.add_argument("source", metavar="SRC", type=os.path.realpath)
    parser.add_argument("target", metavar="DST", type=os.path.realpath)
    parser.add_argument("--short_side", "--short-side", type=int, default=160,
                        help="pixels [%(default)s]")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG and WebP")
    parser.add_argument("--num_workers", "--num-workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    work = partial(_shrink, args.source, args.target, max(1, args.short_side), args.quality)
    bad, old, hidden = 0, 0, sys.stderr is None or not sys.stderr.isatty()
    try:
        names = [os.path.relpath(path, args.source) for path in _images_under(args.source)]
        if not names or f"{args.target}/".startswith(f"{args.source}/"):
            raise InputError(f"expected {args.source} to hold images, {args.target} outside")
        done = _work(names, range(len(names)), max(0, args.num_workers), collate_fn=work)
        with contextlib.closing(done):
            for reason in tqdm(done, total=len(names), disable=hidden):
                old += reason is None
                if reason:
                    bad += 1
                    _say(reason)
    except KeyboardInterrupt:
        _say("stopped: the same command goes on from here")
        return 130
    except InputError as error:
        _say(f"error: {error}")
        return 2
    kept = f", {old} of them left as they were" if old else ""
    _say(f"{len(names) - bad} images in {args.target}{kept}, {bad} unreadable")
    return 0


if __name__ == "__main__":
    sys.exit(main())
