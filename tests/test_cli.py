"""Commands and robustness: what a user types, what is written, what survives a crash.

Runs are in this process where that changes nothing; killed, limited and distributed ones are real
processes. All are on one CPU thread, so that "equal" can mean bitwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import greenmim
from common import data
from tests.conftest import ROOT

CPU = ["--num_workers", "0", "--device", "cpu"]
TINY = ["--model", "swin_test", *CPU]
FAST = ["--lr", "1e-3", "--warmup_epochs", "0"]  # large steps: a lost or doubled one shows
COMMANDS = ("pretrain", "finetune", "evaluate", "reconstruct", "export", "features", "demo")
CHECKPOINT_KEYS = {"model", "optimizer", "scaler", "epoch", "step", "args"}
LOG_KEYS = {
    "epoch", "train_loss", "train_lr", "images_per_second", "data_wait", "memory_gb",
    "skipped_steps",
}  # fmt: skip
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 120  # seconds after which a process hangs; the slowest takes about ten


# ── helpers ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs start where nothing is, and outside of any torchrun."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return here


def run(*argv: object) -> None:
    """A command that has to succeed, in this process."""
    assert greenmim.main([str(word) for word in argv]) == 0


def environment(**changes: object) -> dict[str, str]:
    left_out = (*TORCHRUN_VARIABLES, "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | fixed | {k: str(v) for k, v in changes.items()}


def process(
    words: Sequence[object], env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess:
    """`python *words` as a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=TIMEOUT,
        env=env or environment(), **options,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(script: Path, *argv: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    return process([*launch, script, *argv], env)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def last(folder: Path) -> dict:
    return load(folder / "checkpoint-last.pth")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def equal(a: object, b: object) -> bool:
    """Bitwise equality of nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_end(first: Path, second: Path) -> None:
    """Two output folders hold bitwise the same weights and optimizer at the same step."""
    a, b = last(first), last(second)
    for key in ("step", "epoch", "model", "optimizer"):
        assert equal(a[key], b[key]), f"{key} differs"


def contents(*folders: Path) -> dict[Path, str]:
    """Every file below the folders, with a digest."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def error_line(text: str) -> str:
    """The only line on stderr, "error: sentence"."""
    assert "Traceback" not in text
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


# ── dry run ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_dry_run(command: str, empty_folder: Path, capsys: pytest.CaptureFixture) -> None:
    run(command, "--model", "swin_test", "--device", "cpu")
    said = capsys.readouterr()
    assert "10 steps" in said.out and "images_per_second" in said.out and "memory" in said.out
    assert "dry run" in said.out.splitlines()[-1] and "--data_path" in said.out.splitlines()[-1]
    assert said.err == ""
    assert not list(empty_folder.iterdir())


def test_dry_run_under_torchrun(empty_folder: Path) -> None:
    done = torchrun(ROOT / "greenmim.py", "--model", "swin_test", env=environment())
    assert done.returncode == 0, done.stderr
    assert "2 processes = 16" in done.stdout
    assert done.stdout.count("dry run: to pre-train") == 1
    assert not list(empty_folder.iterdir())


def test_default_model_and_every_other_name_exist() -> None:
    assert greenmim.parse_config([])[1].model in greenmim.MODELS
    assert set(greenmim.OTHER_NAMES.values()) <= set(greenmim.MODELS)
    for name in greenmim.MODELS:
        with torch.device("meta"):
            greenmim.GreenMIM(greenmim.model_config(name))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_no_flags(command: str, empty_folder: Path) -> None:
    words = [ROOT / "greenmim.py", *([command] if command != "pretrain" else [])]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "--data_path" in done.stdout.splitlines()[-1]
    assert not list(empty_folder.iterdir())


def test_script_and_common_copied_elsewhere(empty_folder: Path) -> None:
    shutil.copy(ROOT / "greenmim.py", empty_folder)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", empty_folder / "common", ignore=ignore)
    before = contents(empty_folder)
    done = process(["greenmim.py", "--model", "swin_test"], cwd=empty_folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "dry run: to pre-train" in done.stdout
    assert contents(empty_folder) == before


# ── flags ───────────────────────────────────────────────────────────────────────────────


def test_underscores_and_dashes() -> None:
    spelled = "--batch_size 4 --mask_ratio 0.5 --accum_iter 2 --no-norm_pix_loss --grad_checkpoint"
    _, a = greenmim.parse_config(spelled.split())
    _, b = greenmim.parse_config(spelled.replace("_", "-").split())
    assert a == b
    assert (a.batch_size, a.mask_ratio, a.norm_pix_loss, a.grad_checkpoint) == (4, 0.5, False, True)


def test_pretrain_is_the_default_command() -> None:
    assert greenmim.parse_config([]) == greenmim.parse_config(["pretrain"])


def test_timm_names_are_ours() -> None:
    names = {"tiny": "swin_t", "small": "swin_s", "base": "swin_b"}
    for size, ours in names.items():
        for command in ("pretrain", "finetune"):
            timm = [command, "--model", f"swin_{size}_patch4_window7_224"]
            assert greenmim.parse_config(timm) == greenmim.parse_config([command, "--model", ours])


def test_model_selects_its_recipe() -> None:
    for (command, model), recipe in greenmim.RECIPES.items():
        _, cfg = greenmim.parse_config([command, "--model", model])
        assert {key: getattr(cfg, key) for key in recipe} == recipe
        _, cfg = greenmim.parse_config([command, "--model", model, "--blr", "0.5"])
        assert cfg.blr == 0.5


def test_values_off_the_recipe_are_printed(capsys: pytest.CaptureFixture) -> None:
    greenmim.parse_config(["--batch_size", "7"])
    said = capsys.readouterr().out
    assert "batch_size" in said and "7" in said and "256" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_default_and_source_of_each_flag(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cfg = greenmim.parse_config([command])
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("NO_COLOR", "1")
    assert greenmim.main([command, "--help"]) == 0
    flags = capsys.readouterr().out.partition("\noptions:")[2].partition("\n\n")[0]
    sections = re.split(r"\n  (?=-)", flags)[1:]
    sections = {re.match(r"--(\w+)|-h", text)[1]: " ".join(text.split()) for text in sections}
    for field in dataclasses.fields(cfg):
        said = sections[field.name]
        found = re.search(r"\((\w+)[^()]*\) \[(.*)\]$", said)
        assert found, f"no source and default: {said}"
        assert found[1] in ("ours", "MAE", "SimMIM", "paper", "released"), said
        assert found[2] == str(field.default), said


# ── photographs through every command ───────────────────────────────────────────────────


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with three classes of four files: colour, grey, CMYK and alpha."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    kinds = (("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"))
    for split in ("train", "val"):
        for name, level in (("ants", 40), ("bees", 120), ("crows", 200)):
            (root / split / name).mkdir(parents=True)
            for mode, suffix in kinds:
                shape = (*rng.integers(40, 120, 2), 3)
                pixels = rng.normal(level, 30, shape).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(pixels).convert(mode)
                image.save(root / split / name / f"{mode}.{suffix}")
    return root


@pytest.fixture(scope="module")
def pretrained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two epochs of three steps."""
    output = tmp_path_factory.mktemp("pretrained")
    run(*TINY, *FAST, "--data_path", photos, "--output_dir", output, "--batch_size", 4,
        "--epochs", 2, "--save_freq", 1)  # fmt: skip
    return output


@pytest.fixture(scope="module")
def finetuned(photos: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two epochs from the backbone that pre-training wrote."""
    output = tmp_path_factory.mktemp("finetuned")
    run("finetune", *TINY, *FAST, "--data_path", photos, "--output_dir", output, "--batch_size", 4,
        "--epochs", 2, "--weights", pretrained / "backbone.pth")  # fmt: skip
    return output


def test_pretrain_writes(pretrained: Path) -> None:
    names = {path.name for path in pretrained.iterdir()}
    wanted = {"checkpoint-last.pth", "checkpoint-0.pth", "checkpoint-1.pth", "backbone.pth"}
    assert wanted | {"log.txt", "reconstruction-1.png"} <= names
    assert not [name for name in names if name.endswith(".part")]
    for k, record in enumerate(log(pretrained)):
        assert record.keys() >= LOG_KEYS and record["epoch"] == k
        assert math.isfinite(record["train_loss"]) and 0 <= record["data_wait"] <= 1
        assert record["images_per_second"] > 0 and record["memory_gb"] > 0
        assert record["skipped_steps"] == 0
    assert len(log(pretrained)) == 2
    Image.open(pretrained / "reconstruction-1.png").verify()


def test_checkpoint_is_plain(pretrained: Path, finetuned: Path) -> None:
    for folder in (pretrained, finetuned):
        file = last(folder)
        assert file.keys() >= CHECKPOINT_KEYS
        assert (file["epoch"], file["step"], type(file["args"])) == (2, 6, dict)
        assert finite(file["model"])


def test_finetune_starts_from_the_backbone(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run("finetune", *TINY, "--data_path", photos, "--output_dir", tmp_path / "out", "--epochs", 1,
        "--batch_size", 4, "--weights", pretrained / "backbone.pth", "--lr", "1e-30")  # fmt: skip
    assert "head starts fresh" in capsys.readouterr().out
    state, model = last(tmp_path / "out")["model"], last(pretrained)["model"]
    encoder = {k[8:]: v for k, v in model.items() if k.startswith("encoder.")}
    assert {k for k in state if k not in encoder} == {"head.weight", "head.bias"}
    for key, value in encoder.items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-6)


def test_evaluate_repeats_the_log(
    photos: Path, finetuned: Path, capsys: pytest.CaptureFixture
) -> None:
    run("evaluate", *CPU, "--weights", finetuned / "checkpoint-last.pth", "--data_path", photos)
    result, record = json.loads(capsys.readouterr().out.splitlines()[-1]), log(finetuned)[-1]
    assert result["test_images"] == 12
    for key in ("test_loss", "test_acc1", "test_acc5"):
        assert result[key] == pytest.approx(record[key], rel=1e-5)


@pytest.mark.parametrize("naming", ["timm", "official"])
def test_export_loads_back(
    naming: str, photos: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "exported.pth"
    run("export", "--weights", finetuned / "best.pth", "--naming", naming, "--output", output)
    state = load(output)
    state = state if naming == "timm" else state["model"]
    merging = "layers.1.downsample" if naming == "timm" else "layers.0.downsample"
    head = "head.fc.weight" if naming == "timm" else "head.weight"
    assert {f"{merging}.reduction.weight", head, "patch_embed.proj.weight"} <= state.keys()

    answers = []
    for path in (finetuned / "best.pth", output):
        run("evaluate", *TINY, "--weights", path, "--data_path", photos)
        answers.append(capsys.readouterr().out.splitlines()[-1])
    assert answers[0] == answers[1]


def test_export_safetensors(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights, output = pretrained / "checkpoint-last.pth", tmp_path / "exported.safetensors"
    code = greenmim.main(["export", "--weights", str(weights), "--output", str(output)])
    if importlib.util.find_spec("safetensors"):
        assert code == 0 and greenmim.read_checkpoint(output)["model"]
    else:
        assert code == 2 and "pip install safetensors" in error_line(capsys.readouterr().err)
        assert not output.exists()


def test_features(photos: Path, pretrained: Path, tmp_path: Path) -> None:
    words = ["features", *CPU, "--weights", pretrained / "checkpoint-last.pth"]
    files = [str(path) for path in sorted((photos / "train").rglob("*.*"))]
    config = greenmim.MODELS["swin_test"]
    stages = len(config.depths)
    widths = [config.embed_dim * 2**i for i in range(stages)]
    sides = [config.units * config.unit_tokens(i) for i in range(stages)]
    pooled = []
    for batch in (5, 12):
        output = tmp_path / f"pooled-{batch}.npz"
        run(*words, "--data_path", photos, "--output", output, "--batch_size", batch)
        found = np.load(output)
        assert found.keys() == {"features", "names"} and found["names"].tolist() == files
        assert found["features"].shape == (12, widths[-1])
        pooled.append(found["features"])
    np.testing.assert_allclose(*pooled, atol=1e-5)
    assert np.abs(pooled[0] - pooled[0][0]).max() > 1e-3  # each image has features of its own

    run(*words, "--data_path", photos, "--output", tmp_path / "maps.npz", "--per_stage")
    found = np.load(tmp_path / "maps.npz")
    assert found.keys() == {*(f"stage{i + 1}" for i in range(stages)), "names"}
    for i in range(stages):
        assert found[f"stage{i + 1}"].shape == (12, widths[i], sides[i], sides[i])


def test_reconstruct(photos: Path, pretrained: Path, tmp_path: Path) -> None:
    weights = pretrained / "checkpoint-last.pth"
    for source, rows in ((photos, 4), (photos / "val" / "bees" / "RGB.jpg", 1)):
        run("reconstruct", *CPU, "--weights", weights, "--data_path", source, "--count", rows,
            "--output", tmp_path / "grid.png", "--seed", 3)  # fmt: skip
        pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
        side = pixels.shape[1] // 3
        assert pixels.shape[0] > rows * side  # the labels stand above
        image, seen, filled = np.split(pixels[-side:], 3, axis=1)

        config = greenmim.MODELS["swin_test"]
        plan = greenmim.draw_plan(config, 0.75, (3,))
        hidden = np.zeros(config.units**2, bool)
        hidden[plan.hidden] = True
        zoom = side // config.units
        hidden = hidden.reshape(config.units, config.units).repeat(zoom, 0).repeat(zoom, 1)
        for column in (seen, filled):  # visible patches are pasted
            assert np.abs(column - image)[~hidden].max() <= 1
        assert np.abs(seen[hidden] - seen[hidden][0]).max() == 0  # one colour
        assert 0 < np.abs(filled - image)[hidden].mean() < 128
        assert filled[hidden].std() > 1


@pytest.mark.parametrize("command", ["reconstruct", "export", "features"])
def test_output_may_lie_in_a_new_folder(
    command: str, photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    suffix = {"reconstruct": "png", "export": "pth", "features": "npz"}[command]
    output = tmp_path / "new" / f"file.{suffix}"
    run(command, "--weights", pretrained / "checkpoint-last.pth", "--data_path", photos,
        "--output", output)  # fmt: skip
    assert output.exists()


def test_linear_probe_changes_the_head_only(
    photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    run("finetune", *TINY, *FAST, "--data_path", photos, "--output_dir", tmp_path / "out",
        "--weights", pretrained / "backbone.pth", "--linear_probe", "--epochs", 2,
        "--batch_size", 3)  # fmt: skip
    first, after = load(pretrained / "backbone.pth")["model"], last(tmp_path / "out")["model"]
    for key in after.keys() - {"head.weight", "head.bias"}:
        assert torch.equal(first[key], after[key]), key
    assert after["head.bias"].abs().max() > 1e-4  # it started at zero


def test_ema_follows_the_weights(photos: Path, tmp_path: Path) -> None:
    run("finetune", *TINY, *FAST, "--data_path", photos, "--output_dir", tmp_path / "out",
        "--batch_size", 12, "--epochs", 3, "--save_freq", 1, "--ema", 0.75)  # fmt: skip
    files = [load(tmp_path / "out" / f"checkpoint-{k}.pth") for k in range(3)]
    averages = [{k.removeprefix("module."): v for k, v in f["ema"].items()} for f in files]
    for k in (1, 2):
        for key, weight in files[k]["model"].items():
            wanted = 0.75 * averages[k - 1][key] + 0.25 * weight
            torch.testing.assert_close(averages[k][key], wanted, rtol=1e-5, atol=1e-7)
    assert not equal(files[2]["model"]["head.bias"], averages[2]["head.bias"])


def plain_finetune(output: Path, *argv: object) -> list[torch.Tensor]:
    """Fine-tune without anything random on eight images; the images in order."""
    seen, forward = [], greenmim.SwinClassifier.forward

    def watched(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen.append(images.clone())
        return forward(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greenmim.SwinClassifier, "forward", watched)
        run("finetune", *TINY, *FAST, "--data_path", "drawn:8", "--output_dir", output, "--epochs",
            1, "--mixup", 0, "--cutmix", 0, "--reprob", 0, "--drop_path", 0, *argv)  # fmt: skip
    return seen


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    whole = plain_finetune(tmp_path / "a", "--batch_size", 8)
    parts = plain_finetune(tmp_path / "b", "--batch_size", 4, "--accum_iter", 2)
    assert [len(x) for x in whole] == [8] and [len(x) for x in parts] == [4, 4]
    assert torch.equal(torch.cat(parts), whole[0])
    losses = [log(tmp_path / name)[0]["train_loss"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    moments = [last(tmp_path / name)["optimizer"]["state"] for name in "ab"]
    for number, state in moments[0].items():  # a tenth of the gradient, after one step
        torch.testing.assert_close(
            moments[1][number]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision(command: str, dtype: str, photos: Path, tmp_path: Path) -> None:
    losses = {}
    for kind in ("fp32", dtype):
        run(command, *TINY, "--data_path", photos, "--output_dir", tmp_path / kind, "--epochs", 1,
            "--batch_size", 4, "--dtype", kind)  # fmt: skip
        losses[kind] = log(tmp_path / kind)[0]["train_loss"]
        file = last(tmp_path / kind)
        assert finite(file["model"])
        assert all(v.dtype == torch.float32 for v in file["model"].values())
        assert bool(file["scaler"]) == (kind == "fp16")
    assert losses[dtype] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses[dtype] != losses["fp32"]  # it did compute in another format


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_grad_checkpoint_changes_nothing(command: str, photos: Path, tmp_path: Path) -> None:
    extra = ["--drop_path", "0.3"] if command == "finetune" else []
    for name in ("plain", "checkpointed"):
        run(command, *TINY, *FAST, "--data_path", photos, "--output_dir", tmp_path / name,
            "--epochs", 1, "--batch_size", 4, *extra,
            *(["--grad_checkpoint"] if name == "checkpointed" else []))  # fmt: skip
    assert_same_end(tmp_path / "plain", tmp_path / "checkpointed")


def test_text_list(photos: Path, tmp_path: Path) -> None:
    paths = sorted((photos / "train").rglob("*.jpg"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    run(*TINY, "--data_path", tmp_path / "list.txt", "--output_dir", tmp_path / "out",
        "--epochs", 1, "--batch_size", 4)  # fmt: skip
    assert last(tmp_path / "out")["step"] == len(paths) // 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo(seed: int, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "greenmim.py"), "demo", "--seed", str(seed)]
    done = subprocess.run(
        [*words, "--output", str(tmp_path / "demo")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"pretrained_acc1", "scratch_acc1", "chance", "picture", "seconds"} <= result.keys()
    assert result["pretrained_acc1"] - result["scratch_acc1"] >= 5
    assert result["chance"] == 10
    assert result["seconds"] < 180
    Image.open(result["picture"]).verify()


# ── unreadable images ───────────────────────────────────────────────────────────────────


def test_unreadable_images_are_survived(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = image_folder / "train"
    whole = (train / "ants" / "0.jpg").read_bytes()
    (train / "ants" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (train / "bees" / "text.png").write_text("no image")
    (image_folder / "val" / "bees" / "text.png").write_text("no image")
    run("finetune", *TINY, "--data_path", image_folder, "--output_dir", tmp_path / "out",
        "--epochs", 2, "--batch_size", 14)  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    for path in (train / "ants" / "cut.jpg", train / "bees" / "text.png"):
        assert len([line for line in lines if str(path) in line]) == 1, lines
    record = log(tmp_path / "out")[-1]
    assert record["unreadable_images"] == 2 and record["test_images"] == 12


def test_too_many_unreadable_images_stop(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for k in range(8):
        (image_folder / "train" / "ants" / f"bad{k}.jpg").write_text("no image")
    words = [*TINY, "--data_path", image_folder, "--output_dir", tmp_path / "out"]
    assert greenmim.main([str(w) for w in (*words, "--epochs", 1, "--batch_size", 20)]) == 2
    final = capsys.readouterr().err.splitlines()[-1]
    assert final.startswith("error: ") and "1%" in final and "bad3.jpg" in final


# ── killed, stopped, resumed ────────────────────────────────────────────────────────────

LONG = {  # two epochs of 24 steps, each step saved
    "pretrain": [*TINY, *FAST, "--data_path", "drawn:96", "--batch_size", "4", "--epochs", "2",
                 "--save_every", "0", "--seed", "5"],
    "finetune": ["finetune", *TINY, *FAST, "--data_path", "drawn:96", "--batch_size", "4",
                 "--epochs", "2", "--save_every", "0", "--mixup", "0.8", "--cutmix", "1",
                 "--drop_path", "0.3", "--reprob", "0.5", "--ema", "0.9"],
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folder of each long run that nobody disturbs."""
    folders = {command: tmp_path_factory.mktemp(command) for command in LONG}
    for command, words in LONG.items():
        run(*words, "--output_dir", folders[command], "--save_every", 30)
    return folders


def interrupt(
    words: Sequence[str], output: Path, step: int, number: int, kill: Callable = os.kill
) -> tuple[int, str]:
    """Send a signal to a run once its checkpoint is at `step`; exit code and what it said."""
    words = [sys.executable, str(ROOT / "greenmim.py"), *words, "--output_dir", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=environment(), start_new_session=True, **pipes) as running:
        watchdog = threading.Timer(TIMEOUT, running.kill)
        watchdog.start()
        try:
            path = output / "checkpoint-last.pth"
            while running.poll() is None and not (path.exists() and load(path)["step"] >= step):
                time.sleep(0.01)
            kill(running.pid, number)
            said, _ = running.communicate()
        finally:
            watchdog.cancel()
    return running.returncode, said


@pytest.mark.parametrize("command", list(LONG))
def test_sigkill_and_resume(
    command: str, uninterrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, said = interrupt(LONG[command], tmp_path / "out", 5, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    at = last(tmp_path / "out")["step"]
    assert 5 <= at < 24, "not killed in the middle of the first epoch"
    run(*LONG[command], "--output_dir", tmp_path / "out")
    assert f"resumed at step {at} of 48" in capsys.readouterr().out
    assert_same_end(uninterrupted[command], tmp_path / "out")
    if command == "finetune":
        ends = last(uninterrupted[command])["ema"], last(tmp_path / "out")["ema"]
        assert equal(*ends)
    assert [record["epoch"] for record in log(tmp_path / "out")] == [0, 1]


# Slurm and torchrun send the signal to all processes, those that load images too.
@pytest.mark.parametrize(("kill", "workers"), [(os.kill, 0), (os.killpg, 1)])
def test_sigterm_saves_and_exits_cleanly(
    kill: Callable, workers: int, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    words = [*LONG["pretrain"], "--num_workers", str(workers)]
    code, said = interrupt(words, tmp_path / "out", 5, signal.SIGTERM, kill)
    assert code == 0, said
    assert "Traceback" not in said and "the same command continues" in said
    assert 5 <= last(tmp_path / "out")["step"] < 48
    run(*words, "--output_dir", tmp_path / "out")
    assert_same_end(uninterrupted["pretrain"], tmp_path / "out")


def stop_after(steps: int, words: Sequence[object]) -> None:
    """Run in this process; SIGTERM arrives during the given step."""
    count = 0

    def counted(forward: Callable) -> Callable:
        def wrapper(self: torch.nn.Module, *inputs: object) -> object:
            nonlocal count
            count += self.training
            if self.training and count == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return forward(self, *inputs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for model in (greenmim.GreenMIM, greenmim.SwinClassifier):
            patch.setattr(model, "forward", counted(model.forward))
        run(*words)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_steps_and_resume_equal_the_whole(
    command: str, steps: int, photos: Path, tmp_path: Path
) -> None:
    words = [command, *TINY, *FAST, "--data_path", photos, "--batch_size", 4, "--epochs", 2]
    run(*words, "--output_dir", tmp_path / "whole")
    stop_after(steps, [*words, "--output_dir", tmp_path / "parts"])
    assert last(tmp_path / "parts")["step"] == steps
    run(*words, "--output_dir", tmp_path / "parts")
    assert last(tmp_path / "parts")["step"] == 6
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_stop_keeps_the_best_of_before(photos: Path, tmp_path: Path) -> None:
    """best.pth is the best of all epochs, not of those since the last resume."""
    words = ["finetune", *TINY, "--data_path", photos, "--batch_size", 4, "--epochs", 2]
    words += ["--output_dir", tmp_path / "out"]
    answers, accuracy = iter((90.0, 10.0)), greenmim.accuracy

    def scripted(*inputs: object) -> dict:
        return accuracy(*inputs) | {"test_acc1": next(answers)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greenmim, "accuracy", scripted)
        stop_after(4, words)
        run(*words)
    assert [record["test_acc1"] for record in log(tmp_path / "out")] == [90.0, 10.0]
    assert load(tmp_path / "out" / "best.pth")["test_acc1"] == 90.0


def test_finished_run_is_left_alone(
    photos: Path, pretrained: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(pretrained)
    run(*TINY, *FAST, "--data_path", photos, "--output_dir", pretrained, "--batch_size", 4,
        "--epochs", 2, "--save_freq", 1)  # fmt: skip
    assert "resumed at step 6 of 6" in capsys.readouterr().out
    assert contents(pretrained) == before


@pytest.fixture
def resumable(pretrained: Path, tmp_path: Path) -> Path:
    """A copy of the pre-training folder that may be damaged."""
    return Path(shutil.copytree(pretrained, tmp_path / "resumable"))


def resume_words(photos: Path, output: Path, *argv: object) -> list[str]:
    words = [*TINY, *FAST, "--data_path", photos, "--output_dir", output, "--batch_size", 4]
    return [str(word) for word in (*words, "--epochs", 2, "--save_freq", 1, *argv)]


def test_resume_falls_back_to_the_newest_that_loads(
    photos: Path, pretrained: Path, resumable: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("checkpoint-last.pth", "checkpoint-1.pth"):
        whole = (resumable / name).read_bytes()
        (resumable / name).write_bytes(whole[: len(whole) // 2])
    run(*resume_words(photos, resumable))
    assert "resumed at step 3 of 6" in capsys.readouterr().out
    assert_same_end(pretrained, resumable)


def test_resume_from_a_named_file(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = resume_words(photos, tmp_path / "out", "--resume", pretrained / "checkpoint-0.pth")
    run(*words)
    assert "resumed at step 3 of 6" in capsys.readouterr().out
    assert_same_end(pretrained, tmp_path / "out")


def test_resume_refuses_a_missing_file(
    photos: Path, resumable: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(resumable)
    assert greenmim.main(resume_words(photos, resumable, "--resume", "no/file.pth")) == 2
    assert "no/file.pth" in error_line(capsys.readouterr().err)
    assert contents(resumable) == before


def test_resume_refuses_only_unreadable_checkpoints(
    photos: Path, resumable: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in resumable.glob("checkpoint-*.pth"):
        path.write_bytes(path.read_bytes()[:5000])
    before = contents(resumable)
    assert greenmim.main(resume_words(photos, resumable)) == 2
    assert "checkpoint-last.pth" in error_line(capsys.readouterr().err)
    assert contents(resumable) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (["--window_size", "4"], "window_size"),
        (["--input_size", "96"], "input_size"),
        (["--no-norm_pix_loss"], "norm_pix_loss"),
        (["--release", "2023"], "release"),
        (["--model", "swin_demo"], "model"),
    ],
)
def test_resume_names_what_changed(
    changes: list[str], field: str, photos: Path, resumable: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(resumable)
    for resume in ("auto", resumable / "checkpoint-0.pth"):
        assert greenmim.main(resume_words(photos, resumable, "--resume", resume, *changes)) == 2
        assert field in error_line(capsys.readouterr().err)
        assert contents(resumable) == before


# ── interrupted while writing ───────────────────────────────────────────────────────────

KILLED_WRITING = '''
import os
import sys

import torch

import greenmim

where, at = sys.argv[1], int(sys.argv[2])
save, replace, count = torch.save, os.replace, 0


def dying_save(content, file):
    global count
    count += "step" in content
    if where == "save" and count == at:
        save(content, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os._exit(9)
    save(content, file)


def dying_replace(source, target):
    if where == "replace" and count == at:
        os._exit(9)
    replace(source, target)


torch.save, os.replace = dying_save, dying_replace
sys.exit(greenmim.main(sys.argv[3:]))
'''


@pytest.mark.parametrize("where", ["save", "replace"])
def test_killed_while_writing(
    where: str, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "driver.py").write_text(KILLED_WRITING)
    words = [tmp_path / "driver.py", where, 6, *LONG["pretrain"], "--output_dir", tmp_path / "out"]
    done = process(words, environment(PYTHONPATH=ROOT))
    assert done.returncode == 9, done.stderr
    assert last(tmp_path / "out")["step"] == 5
    run(*LONG["pretrain"], "--output_dir", tmp_path / "out")
    assert_same_end(uninterrupted["pretrain"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.part"))


# A step's checkpoint, or the picture at the end of an epoch, is the first that does not fit.
@pytest.mark.parametrize(("limit", "save_every"), [(1_000_000, 0), (20_000, 30)])
def test_disk_full(
    limit: int, save_every: int, photos: Path, resumable: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(resumable)
    words = resume_words(photos, resumable, "--save_every", save_every, "--epochs", 3)
    done = process(
        [ROOT / "greenmim.py", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in error_line(done.stderr)
    after = contents(resumable)
    assert {path: after.get(path) for path in before} == before
    assert not list(resumable.glob("*.part"))
    run(*words)
    assert last(resumable)["step"] == 9


# ── two processes ───────────────────────────────────────────────────────────────────────

DRIVER = '''
import hashlib
import json
import os
import sys
from pathlib import Path

import greenmim

rank, output = os.environ["RANK"], Path(sys.argv[1])
bad_steps, commands = json.loads(sys.argv[2]), json.loads(sys.argv[3])
record = {"weights": [], "masks": [], "images": []}


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def watched(forward):
    def wrapper(self, images, *plan):
        step = len(record["weights"])
        result = forward(self, images, *plan)
        if not self.training:
            return result
        record["weights"].append(digest(*self.parameters()))
        record["images"].append([digest(image) for image in images])
        if plan:
            record["masks"].append(plan[0].patches.tolist())
        if rank == "1" and step in bad_steps:
            result = result[0] * float("nan"), result[1]
        record["model"] = self
        return result
    return wrapper


for model in (greenmim.GreenMIM, greenmim.SwinClassifier):
    model.forward = watched(model.forward)
destroy, greenmim.dist.destroy_process_group = greenmim.dist.destroy_process_group, lambda: None
try:
    for command in commands:
        code = greenmim.main(command)
        if code:
            sys.exit(code)
        greenmim.dist.barrier()  # commands of a user do not overlap either
        if "model" in record:
            record["weights"].append(digest(*record.pop("model").parameters()))
finally:
    record.pop("model", None)
    (output / f"rank{rank}.json").write_text(json.dumps(record))
    destroy()
'''


@dataclasses.dataclass
class TwoProcesses:
    """What a distributed run left: exit code, stderr, and each rank's record by step."""

    folder: Path
    done: subprocess.CompletedProcess
    ranks: list[dict]


def two_processes(
    folder: Path, bad_steps: Sequence[int], *commands: Sequence[str]
) -> TwoProcesses:
    """Run commands in turn in two processes; rank 1's loss is NaN at `bad_steps`."""
    (folder / "driver.py").write_text(DRIVER)
    words = [folder / "driver.py", folder, json.dumps(list(bad_steps)), json.dumps(commands)]
    done = torchrun(*words, env=environment(PYTHONPATH=ROOT))
    paths = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert all(path.exists() for path in paths), done.stderr
    return TwoProcesses(folder, done, [json.loads(path.read_text()) for path in paths])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    """Pre-training of six steps, fine-tuning of three from it, evaluation."""
    folder = tmp_path_factory.mktemp("two")
    pretrain = [*TINY, *FAST, "--data_path", "drawn:13", "--batch_size", "2", "--epochs", "2",
                "--output_dir", str(folder / "pretrain")]  # fmt: skip
    finetune = ["finetune", *TINY, *FAST, "--data_path", "drawn:13", "--batch_size", "2",
                "--weights", str(folder / "pretrain" / "backbone.pth"), "--epochs", "1",
                "--output_dir", str(folder / "finetune")]  # fmt: skip
    weights = str(folder / "finetune" / "checkpoint-last.pth")
    evaluate = ["evaluate", *CPU, "--weights", weights, "--data_path", "drawn:13"]
    result = two_processes(folder, (), pretrain, finetune, evaluate)
    assert result.done.returncode == 0, result.done.stderr
    return result


def test_two_processes_share_weights_not_masks(healthy: TwoProcesses) -> None:
    a, b = healthy.ranks
    assert len(a["weights"]) == 6 + 1 + 3 + 1
    assert a["weights"] == b["weights"] and len(set(a["weights"])) == 11
    assert len(a["masks"]) == len(b["masks"]) == 6
    assert all(x != y for x, y in zip(a["masks"], b["masks"], strict=True))
    assert all(x != y for x, y in zip(a["masks"], a["masks"][1:], strict=False))
    assert last(healthy.folder / "pretrain")["step"] == 6


def test_two_processes_split_the_images(healthy: TwoProcesses) -> None:
    a, b = healthy.ranks
    for epoch in (slice(0, 3), slice(3, 6)):
        seen = [image for rank in (a, b) for step in rank["images"][epoch] for image in step]
        assert len(seen) == len(set(seen)) == 12


def test_two_processes_count_each_test_image_once(
    healthy: TwoProcesses, capsys: pytest.CaptureFixture
) -> None:
    record = log(healthy.folder / "finetune")[-1]
    assert record["test_images"] == 13
    together = json.loads(healthy.done.stdout.splitlines()[-1])
    weights = healthy.folder / "finetune" / "checkpoint-last.pth"
    run("evaluate", *CPU, "--weights", weights, "--data_path", "drawn:13")
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone == pytest.approx(together, rel=1e-5)
    assert record["test_acc1"] == pytest.approx(alone["test_acc1"])


def test_global_order_does_not_depend_on_the_processes(image_folder: Path) -> None:
    source, crop = data.find_labelled(image_folder, "train"), data.TrainCrop(32)
    one = data.TrainLoader(source, crop, batch_size=4, seed=3)
    two = [data.TrainLoader(source, crop, batch_size=2, seed=3, rank=rank, world_size=2)
           for rank in (0, 1)]  # fmt: skip
    assert len(one) == len(two[0]) == 3
    batches = zip(one.batches(0, 6), *(loader.batches(0, 6) for loader in two), strict=True)
    orders = []
    for whole, *halves in batches:
        for k in (0, 1):
            assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
        orders.append(whole[1].tolist())
    assert orders[:3] != orders[3:]  # each epoch has an order of its own


# ── gradients that are not finite ───────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> TwoProcesses:
    """NaN on rank 1 at step 2, and from step 7 to the end; epochs of five steps, all saved."""
    folder = tmp_path_factory.mktemp("sick")
    words = [*TINY, *FAST, "--data_path", "drawn:20", "--batch_size", "2", "--epochs", "10",
             "--output_dir", str(folder / "out"), "--save_every", "0"]  # fmt: skip
    return two_processes(folder, (2, *range(7, 50)), words)


def test_nan_on_one_rank_is_skipped_on_both(sick: TwoProcesses) -> None:
    a, b = (rank["weights"] for rank in sick.ranks)  # before steps 0, 1, ...
    assert a == b
    assert a[2] == a[3] and a[7:] == a[7:8] * 20
    assert len(set(a)) == 7  # the other seven steps but the last each changed the weights
    assert [record["skipped_steps"] for record in log(sick.folder / "out")[:2]] == [1, 4]
    assert all(math.isfinite(record["train_loss"]) for record in log(sick.folder / "out"))


def test_twenty_nan_steps_stop_the_run(sick: TwoProcesses, tmp_path: Path) -> None:
    assert sick.done.returncode != 0
    output = sick.folder / "out"
    sentences = {line for line in sick.done.stderr.splitlines() if str(output) in line}
    assert len(sentences) == 1 and "checkpoint" in sentences.pop(), sick.done.stderr
    assert "greenmim.py\", line" not in sick.done.stderr  # no traceback of ours
    file = last(output)
    assert finite(file["model"]) and file["step"] >= 7

    shutil.copytree(output, tmp_path / "again")
    run(*TINY, *FAST, "--data_path", "drawn:20", "--batch_size", 4, "--epochs", 10,
        "--output_dir", tmp_path / "again")  # fmt: skip
    assert last(tmp_path / "again")["step"] == 50


def test_twenty_nan_steps_alone(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, count = greenmim.GreenMIM.forward, 0

    def broken(self: torch.nn.Module, *inputs: object) -> tuple:
        nonlocal count
        count += 1
        loss, prediction = forward(self, *inputs)
        return loss * (math.nan if count > 3 else 1.0), prediction

    monkeypatch.setattr(greenmim.GreenMIM, "forward", broken)
    words = resume_words(photos, tmp_path / "out", "--epochs", 20)
    try:
        code = greenmim.main(words)
        said = capsys.readouterr().err
    except SystemExit as stopped:  # with a message: printed on exit, and code 1
        code, said = 1, str(stopped.code)
    assert code not in (0, None)
    assert len(said.strip().splitlines()) == 1 and str(tmp_path / "out") in said
    assert count == 3 + 20
    assert finite(last(tmp_path / "out")["model"])


# ── bad input ───────────────────────────────────────────────────────────────────────────


class Unsafe:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def make_bad_things(folder: Path, images: Path, good: Path) -> None:
    """Damaged data sets below `folder`, damaged weights made of the checkpoint `good`."""
    (folder / "empty").mkdir()
    (folder / "taken").write_text("a file")
    for name in ("no_val", "no_train", "empty_class", "other_classes"):
        shutil.copytree(images, folder / name)
    shutil.rmtree(folder / "no_val" / "val")
    shutil.rmtree(folder / "no_train" / "train")
    (folder / "empty_class" / "train" / "dodos").mkdir()
    (folder / "other_classes" / "val" / "ants").rename(folder / "other_classes" / "val" / "bats")
    listed = [images / "train" / "ants" / "0.jpg", folder / "gone.jpg"]
    (folder / "list.txt").write_text("".join(f"{path}\n" for path in listed))
    (folder / "void.txt").write_text("\n\n")

    whole = good.read_bytes()
    for share, name in ((0.5, "half.pth"), (0.999, "almost.pth"), (0, "nothing.pth")):
        (folder / name).write_bytes(whole[: int(share * len(whole))])
    (folder / "text.pth").write_text("these are no weights\n")
    (folder / "list.pth").write_bytes(pickle.dumps([1, 2, 3]))
    torch.save([torch.zeros(3)], folder / "tensors.pth")
    other = {"command": "pretrain", "model": "mixmae_b", "config": {"encoder_stride": 32}}
    torch.save({"model": load(good)["model"], "args": other}, folder / "method.pth")
    torch.save({"model": {"a": 1, "b": "c"}}, folder / "values.pth")
    (folder / "unsafe_plain.pth").write_bytes(pickle.dumps(Unsafe(folder / "EXECUTED")))
    torch.save({"model": Unsafe(folder / "EXECUTED")}, folder / "unsafe.pth")


# Name: command line, what the sentence has to say. {d} holds good images, {b} the bad things.
TRAIN = "--model swin_test --num_workers 0 --device cpu --epochs 1 --batch_size 4 --output_dir out"
BAD_INPUT = {
    "missing folder": ("--data_path {b}/absent", "absent"),
    "empty folder": ("--data_path {b}/empty", "empty images"),
    "missing folder, finetune": ("finetune --data_path {b}/absent", "absent/train"),
    "empty folder, finetune": ("finetune --data_path {b}/empty", "empty/train"),
    "train without val": ("finetune --data_path {b}/no_val", "no_val/val"),
    "val without train": ("finetune --data_path {b}/no_train", "no_train/train"),
    "class without images": ("finetune --data_path {b}/empty_class", "empty_class/train/dodos"),
    "other classes in val": ("finetune --data_path {b}/other_classes", "ants bats"),
    "list with a missing file": ("--data_path {b}/list.txt", "list.txt line 2 gone.jpg"),
    "list of nothing": ("--data_path {b}/void.txt", "void.txt"),
    "unknown model": ("--data_path {d} --model swin_bb", "swin_bb swin_b,"),
    "unknown model, finetune": ("finetune --data_path {d} --model swin_tets", "swin_test"),
    "unknown model, timm": ("--model swin_base_patch4_window7_225", "swin_base_patch4_window7_224"),
    "unknown command": ("pretain --data_path {d}", "pretain pretrain"),
    "unknown flag": ("--data_path {d} --bath_size 4", "--bath_size"),
    "abbreviated flag": ("--data {d}", "--data"),
    "flag without value": ("--data_path {d} --seed", "--seed"),
    "word for a number": ("--data_path {d} --seed one", "--seed one"),
    "size": ("--data_path {d} --input_size 100", "100 96 112"),
    "size, finetune": ("finetune --data_path {d} --input_size 60", "60 48 64"),
    "window too large": ("--data_path {d} --window_size 17", "--window_size 17 16"),
    "window zero": ("--data_path {d} --window_size 0", "--window_size 0"),
    "nothing visible": ("--data_path {d} --mask_ratio 0.99", "--mask_ratio 0.99 visible"),
    "nothing hidden": ("--data_path {d} --mask_ratio 0", "--mask_ratio hidden"),
    "ratio above one": ("--data_path {d} --mask_ratio 1.5", "--mask_ratio"),
    "ratio below zero": ("--data_path {d} --mask_ratio -0.5", "--mask_ratio"),
    "ratio not a number": ("--data_path {d} --mask_ratio nan", "--mask_ratio"),
    "odd batch": ("finetune --data_path {d} --batch_size 3", "--batch_size 3 mixup"),
    "too few outputs": ("finetune --data_path {d} --nb_classes 2", "3 2"),
    "batch too large": ("--data_path {d} --batch_size 13", "12 13"),
    "accumulation too large": ("--data_path {d} --accum_iter 4", "12 16"),
    "policy": ("finetune --data_path {d} --aa rand-x9", "--aa rand-x9"),
    "release": ("--data_path {d} --release 2021", "--release 2021"),
    "dtype": ("--data_path {d} --dtype float", "--dtype float bf16"),
    "device": ("--data_path {d} --device gpu", "--device gpu"),
    "no CUDA": ("--data_path {d} --device cuda", "--device cuda"),
    "no CUDA, dry run": ("--device cuda", "--device cuda"),
    "no such CUDA": ("--data_path {d} --device cuda:9", "cuda:9"),
    "output in a file's place": ("--data_path {d} --output_dir {b}/taken", "taken"),
    "output below a file": ("--data_path {d} --output_dir {b}/taken/out", "taken"),
    "weights missing": ("finetune --data_path {d} --weights {b}/gone.pth", "gone.pth"),
    "weights a folder": ("finetune --data_path {d} --weights {b}/empty", "empty"),
    "weights cut in half": ("finetune --data_path {d} --weights {b}/half.pth", "half.pth"),
    "weights cut at the end": ("finetune --data_path {d} --weights {b}/almost.pth", "almost.pth"),
    "weights empty": ("finetune --data_path {d} --weights {b}/nothing.pth", "nothing.pth"),
    "weights a text": ("finetune --data_path {d} --weights {b}/text.pth", "text.pth"),
    "weights a list": ("finetune --data_path {d} --weights {b}/list.pth", "list.pth"),
    "weights tensors": ("finetune --data_path {d} --weights {b}/tensors.pth", "tensors.pth"),
    "weights values": ("finetune --data_path {d} --weights {b}/values.pth", "values.pth"),
    "weights unsafe": ("finetune --data_path {d} --weights {b}/unsafe.pth", "unsafe.pth system"),
    "weights unsafe pickle": ("--data_path {d} --weights {b}/unsafe_plain.pth", "unsafe_plain.pth"),
    "weights of another model": (
        "finetune --data_path {d} --model swin_demo --weights {p}/backbone.pth",
        "backbone.pth --model patch_embed.proj.weight",
    ),
    "pretrain from another model": (
        "--data_path {d} --model swin_demo --weights {p}/checkpoint-last.pth",
        "checkpoint-last.pth encoder",
    ),
    "resume without steps": ("--data_path {d} --resume {p}/backbone.pth", "backbone.pth --weights"),
    "resume of another command": (
        "finetune --data_path {d} --resume {p}/checkpoint-last.pth",
        "checkpoint-last.pth",
    ),
}  # fmt: skip
USE = "--num_workers 0 --device cpu"
BAD_USE = {
    "evaluate without weights": ("evaluate --data_path {d}", "--weights"),
    "reconstruct without weights": ("reconstruct --data_path {d}", "--weights"),
    "features without weights": ("features --data_path {d}", "--weights"),
    "export without weights": ("export", "--weights"),
    "evaluate without data": ("evaluate --weights {f}/best.pth", "--data_path"),
    "features without data": ("features --weights {f}/best.pth", "--data_path"),
    "no head": ("evaluate --weights {p}/checkpoint-last.pth --data_path {d}", "head finetune"),
    "no head, backbone": (
        "evaluate --model swin_test --weights {p}/backbone.pth --data_path {d}", "head",
    ),
    "no decoder": ("reconstruct --weights {f}/best.pth --data_path {d}", "best.pth mask_token"),
    "evaluate without val": (
        "evaluate --weights {f}/best.pth --data_path {b}/no_val", "no_val/val",
    ),
    "evaluate other classes": (
        "evaluate --weights {f}/best.pth --data_path {b}/other_classes", "ants bats",
    ),
    "evaluate another model": (
        "evaluate --model swin_demo --weights {f}/best.pth --data_path {d}",
        "best.pth swin_demo",
    ),
    "evaluate another method": ("evaluate --weights {b}/method.pth --data_path {d}", "method.pth"),
    "evaluate truncated": ("evaluate --weights {b}/half.pth --data_path {d}", "half.pth"),
    "features of nothing": (
        "features --weights {p}/checkpoint-last.pth --data_path {b}/empty", "empty images",
    ),
    "reconstruct nothing hidden": (
        "reconstruct --weights {p}/checkpoint-last.pth --data_path {d} --mask_ratio 0",
        "--mask_ratio",
    ),
    "reconstruct as no picture": (
        "reconstruct --weights {p}/checkpoint-last.pth --data_path {d} --output a.txt", "a.txt",
    ),
    "reconstruct below a file": (
        "reconstruct --weights {p}/checkpoint-last.pth --data_path {d} --output {b}/taken/a.png",
        "taken/a.png",
    ),
    "features below a file": (
        "features --weights {p}/checkpoint-last.pth --data_path {d} --output {b}/taken/a.npz",
        "taken/a.npz",
    ),
    "export below a file": (
        "export --weights {f}/best.pth --output {b}/taken/a.pth", "taken/a.pth",
    ),
    "export over a folder": ("export --weights {f}/best.pth --output {b}/empty", "empty"),
    "export naming": ("export --weights {f}/best.pth --naming mmseg", "--naming timm official"),
    "export unsafe": ("export --weights {b}/unsafe.pth", "unsafe.pth"),
    "use size": ("evaluate --weights {f}/best.pth --data_path {d} --input_size 70", "70 64 80"),
    "use dtype": ("evaluate --weights {f}/best.pth --data_path {d} --dtype int8", "--dtype int8"),
}  # fmt: skip
# Numbers that mean nothing: better refused than a traceback from deep inside.
ODD_VALUES = {
    flag: (f"{command} --data_path {{d}} --{flag.split()[0]} {flag.split()[1]}", flag.split()[0])
    for command, flags in {
        "pretrain": ("batch_size 0", "batch_size -4", "accum_iter 0", "save_freq 0",
                     "log_every 0", "num_workers -1", "seed -1"),
        "finetune": ("drop_path 1.5", "ema 1.5"),
    }.items()
    for flag in flags
}  # fmt: skip
ALL_BAD = [
    *(pytest.param(*row, TRAIN, id=name) for name, row in BAD_INPUT.items()),
    *(pytest.param(*row, USE, id=name) for name, row in BAD_USE.items()),
    *(pytest.param(*row, TRAIN, id=name) for name, row in ODD_VALUES.items()),
]


@pytest.mark.parametrize(("line", "wanted", "rest"), ALL_BAD)
def test_bad_input(
    line: str, wanted: str, rest: str, image_folder: Path, pretrained: Path, finetuned: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    bad = tmp_path / "bad"
    bad.mkdir()
    make_bad_things(bad, image_folder, finetuned / "checkpoint-last.pth")
    places = {"d": image_folder, "b": bad, "p": pretrained, "f": finetuned}
    given, defaults = line.format(**places).split(), rest.split()
    command = [given.pop(0)] if not given[0].startswith("-") else []
    flags = [] if command == ["export"] else defaults  # what is given comes last and wins
    before = contents(tmp_path, pretrained, finetuned)
    capsys.readouterr()
    assert greenmim.main([*command, *flags, *given]) == 2
    said = error_line(capsys.readouterr().err)
    assert [word for word in wanted.split() if word not in said] == [], said
    assert contents(tmp_path, pretrained, finetuned) == before
    assert not (bad / "EXECUTED").exists()
    assert not [str(warning.message) for warning in recwarn]  # would be lines on stderr


def test_bad_input_of_a_process(tmp_path: Path) -> None:
    done = process([ROOT / "greenmim.py", "--data_path", tmp_path / "absent"])
    assert done.returncode == 2
    assert "absent" in error_line(done.stderr)


def test_port_in_use(empty_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = environment(
            RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        done = process([ROOT / "greenmim.py", "--model", "swin_test", "--device", "cpu"], env)
    assert done.returncode == 2, done.stderr
    said = error_line(done.stderr)
    assert str(port) in said and "--master_port" in said
