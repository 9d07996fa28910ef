"""What survives: kills, signals, lost readers, full disks, damaged files, input that cannot work.

A run ends in bounded time, with one sentence and no traceback, leaves no process behind, and what
it had saved stays whole. Killed and stopped runs are processes of their own, see tests/scripts.py.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from common import data
from common.data import InputError
from tests import scripts
from tests.scripts import (
    CPU,
    FAST,
    FIRST,
    MAIN,
    TINY,
    Forked,
    Forks,
    assert_same_end,
    contents,
    each_script,
    environment,
    equal,
    error_line,
    finite,
    last,
    load,
    log,
    process,
    refused,
    run,
    short,
    wait_for,
)  # fmt: skip

one_thread, empty_folder, forks = scripts.one_thread, scripts.empty_folder, scripts.forks
photos, pretrained, finetuned = scripts.photos, scripts.pretrained, scripts.finetuned

LONG = {  # two epochs of 24 steps, each step saved
    "pretrain": [*TINY, *FAST, "--data_path", "drawn:96", "--batch_size", "4", "--epochs", "2",
                 "--save_every", "0", "--seed", "5"],
    "finetune": ["finetune", *TINY, *FAST, "--data_path", "drawn:96", "--batch_size", "4",
                 "--epochs", "2", "--save_every", "0", "--mixup", "0.8", "--cutmix", "1",
                 "--drop_path", "0.3", "--reprob", "0.5", "--ema", "0.9"],
}  # fmt: skip
SLOW = f"""
import time
import torch
import {FIRST.SCRIPT} as script

torch.set_num_threads(1)
copy = script.running_statistics


def slow(model):
    time.sleep(0.05)
    return copy(model)


script.running_statistics = slow
"""  # from the sixth step to the end of the first epoch it then takes a second at least


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folder of each long run that nobody disturbs."""
    folders = {command: tmp_path_factory.mktemp(command) for command in LONG}
    for command, words in LONG.items():
        run(*words, "--output_dir", folders[command], "--save_every", 30)
    return folders


def reached(running: Forked, output: Path, step: int = 5) -> Forked:
    """The run, once its last checkpoint is at `step`, or once it has ended."""
    path = output / "checkpoint-last.pth"
    wait_for(lambda: running.ended() or (path.exists() and load(path)["step"] >= step))
    return running


def sentence(running: Forked) -> str:
    """The one sentence on stderr of a run that had to end; nothing of it is left over."""
    assert running.all_gone(), "it left processes behind"
    return error_line(running.err)


# ── killed and stopped ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", list(LONG))
def test_sigkill_and_resume(
    command: str, forks: Forks, uninterrupted: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    running = forks.start(*LONG[command], "--output_dir", output, code=SLOW + MAIN)
    os.kill(reached(running, output).pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    at = last(output)["step"]
    assert 5 <= at < 24, "not killed in the middle of the first epoch"
    assert (output / ".lock").exists()
    for name in ("checkpoint-last.pth.part", "log.txt.part", "backbone.pth.part"):
        (output / name).write_bytes(b"left by a kill")
    run(*LONG[command], "--output_dir", output, "--save_every", 30)
    assert f"resumed at step {at} of 48" in capsys.readouterr().out
    assert_same_end(uninterrupted[command], output)
    assert [record["epoch"] for record in log(output)] == [0, 1]


# Number of the signal, whether all processes get it (as from Slurm and torchrun; those that load
# images too), their number, exit code.
STOPS = [
    (signal.SIGTERM, False, 0, 0), (signal.SIGTERM, True, 2, 0), (signal.SIGTERM, False, 2, 0),
    (signal.SIGINT, False, 2, 130), (signal.SIGINT, True, 1, 130),
]  # fmt: skip


@pytest.mark.parametrize(("number", "group", "workers", "code"), STOPS)
def test_first_signal_saves_and_exits(
    number: int, group: bool, workers: int, code: int, forks: Forks,
    uninterrupted: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    output = tmp_path / "out"
    words = [*LONG["pretrain"], "--num_workers", workers, "--output_dir", output]
    running = forks.start(*words, code=SLOW + MAIN)
    (os.killpg if group else os.kill)(reached(running, output).pid, number)
    assert running.wait(60) == code, running.err
    assert running.all_gone()
    assert "Traceback" not in running.err and "(the default) continues" in running.out
    assert running.err.splitlines() == (["error: interrupted"] if code else [])
    step = int(re.search(r"stopped after step (\d+)", running.out)[1])
    assert 5 <= last(output)["step"] == step < 48
    if (number, workers) == (signal.SIGTERM, 2) and group:
        run(*words, "--save_every", 30)
        assert_same_end(uninterrupted["pretrain"], output)


HANGING = f"""
import pathlib
import time
import {FIRST.SCRIPT} as script


def hang(model):
    pathlib.Path("in the step").touch()
    time.sleep(600)


script.running_statistics = hang
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(number: int, forks: Forks, empty_folder: Path) -> None:
    words = [*LONG["pretrain"], "--num_workers", 1, "--output_dir", "out"]
    running = forks.start(*words, code=HANGING + MAIN)
    wait_for((empty_folder / "in the step").exists)
    status = Path(f"/proc/{running.pid}/status")

    def handled() -> bool:  # the first signal must have been seen, or the two are one
        if not status.exists():
            return True
        masks = re.findall(r"^SigCgt:\s*(\w+)", status.read_text(), re.M)
        return not int(masks[0], 16) >> (number - 1) & 1

    os.kill(running.pid, number)
    wait_for(handled)
    assert not running.ended(), "the first signal lets the step in progress end"
    os.kill(running.pid, number)
    assert running.wait(10) == -number
    assert running.all_gone() and "Traceback" not in running.err


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_in_evaluate(
    workers: int, forks: Forks, finetuned: Path, empty_folder: Path
) -> None:
    slow = f"""
import pathlib
import time
import {FIRST.SCRIPT} as script


def normalize(images):
    pathlib.Path("busy").touch()
    time.sleep(600)


script.data.normalize = normalize
"""
    words = ["evaluate", "--weights", finetuned / "best.pth", "--data_path", "drawn:600",
             "--device", "cpu", "--num_workers", workers]  # fmt: skip
    drawn = slow + "\nscript.data.check_classes = lambda *_: None\n"
    running = forks.start(*words, code=drawn + MAIN)
    wait_for((empty_folder / "busy").exists)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(60) == 130
    assert sentence(running) == "error: interrupted"


# ── errors while workers load images ────────────────────────────────────────────────────

FAILING = f"""
import {FIRST.SCRIPT} as script


def fail(model):
    raise RuntimeError("the model is broken\\nin two lines")


script.running_statistics = fail
"""


def test_uncaught_error_with_workers(forks: Forks, empty_folder: Path) -> None:
    words = [*LONG["pretrain"], "--num_workers", 2, "--output_dir", "out"]
    running = forks.start(*words, code=FAILING + MAIN)
    assert running.wait(60) == 1
    said = sentence(running)
    assert "the model is broken" in said and "two lines" not in said


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for workers in /proc")
def test_killed_worker_ends_the_run(forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [*LONG["pretrain"], "--num_workers", 2, "--output_dir", output, "--epochs", 20]
    running = reached(forks.start(*words, code=SLOW + MAIN), output)
    workers = children(running.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert running.wait(60) in (1, 2)
    said = sentence(running)
    assert "a process that loads images was killed" in said and "--num_workers 0" in said
    assert finite(last(output)["model"])


def test_killed_worker_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """The news may come anywhere: the handler of a signal raises it."""

    def write(file: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(InputError, match="a process that loads images was killed"):
        data.save_file(tmp_path / "checkpoint-last.pth", write)
    assert contents(tmp_path) == {}


# ── streams that cannot be written ──────────────────────────────────────────────────────


def test_training_outlives_its_streams(
    forks: Forks, photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    """A reader that goes away, a full disk, closed streams: all train on to the end."""
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "head": {"stdout": str(tmp_path / "pipe")}, "both_full": dict.fromkeys(
            ("stdout", "stderr"), "/dev/full"), "no_stderr": {"stderr": ""},
        "no_stdout": {"stdout": ""}, "neither": {"stdout": "", "stderr": ""},
    }  # fmt: skip
    if not Path("/dev/full").exists():
        del cases["both_full"]
    runs = {
        name: forks.start(*short(photos, tmp_path / name, "--log_every", 1, "--num_workers",
                                 2 if name == "head" else 0), **streams)
        for name, streams in cases.items()
    }  # fmt: skip
    with open(tmp_path / "pipe") as pipe:
        assert "recipe" in pipe.readline()
    for name, running in runs.items():
        assert running.wait() == 0, (name, running.err)
        assert running.all_gone() and running.err == ""
        assert_same_end(pretrained, tmp_path / name)


def test_errors_without_a_stream_to_say_them(forks: Forks, tmp_path: Path) -> None:
    words = ["--data_path", tmp_path / "absent", "--device", "cpu"]
    runs = [forks.start(*words, **streams)
            for streams in ({"stderr": ""}, {"stdout": "", "stderr": "/dev/null"})]  # fmt: skip
    assert [running.wait() for running in runs] == [2, 2]


def test_ascii_streams(
    forks: Forks, pretrained: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Names with other letters are shown with escapes."""
    folder, output = image_folder / "train" / "ants", tmp_path / "größe.npz"
    (folder / "0.jpg").rename(folder / "größe.jpg")
    (folder / "häßlich.jpg").write_text("no image")
    weights = pretrained / "backbone.pth"
    words = ["features", *CPU, "--weights", weights, "--data_path", image_folder]
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    running = forks.start(*words, "--output", output, env=env)
    missing = forks.start(*words, "--data_path", tmp_path / "größe", env=env)
    assert running.wait() == 0, running.err
    assert "gr\\xf6\\xdfe.npz" in running.out and "h\\xe4\\xdflich.jpg" in running.err
    assert any("größe.jpg" in name for name in np.load(output)["names"])
    assert missing.wait() == 2 and "gr\\xf6\\xdfe" in error_line(missing.err)


# ── interrupted while writing ───────────────────────────────────────────────────────────

DYING = f"""
import os
import torch
import {FIRST.SCRIPT}

where, at, *argv = argv
save, replace, count = torch.save, os.replace, 0


def dying_save(content, file):
    global count
    count += "step" in content
    if where == "save" and count == int(at):
        save(content, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os._exit(9)
    save(content, file)


def dying_replace(source, target):
    if where == "replace" and count == int(at):
        os._exit(9)
    replace(source, target)
    if where == "log" and str(target).endswith("log.txt"):
        os._exit(9)


torch.save, os.replace = dying_save, dying_replace
"""


@pytest.mark.parametrize(("where", "step"), [("save", 5), ("replace", 5), ("log", 23)])
def test_killed_while_writing(
    where: str, step: int, forks: Forks, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    """Also between the log and the checkpoint at the end of an epoch."""
    output = tmp_path / "out"
    running = forks.start(where, 6, *LONG["pretrain"], "--output_dir", output, code=DYING + MAIN)
    assert running.wait() == 9, running.err
    assert last(output)["step"] == step
    assert (output / "log.txt").exists() == (where == "log")
    run(*LONG["pretrain"], "--output_dir", output, "--save_every", 30)
    assert_same_end(uninterrupted["pretrain"], output)
    assert not list(output.glob("*.part"))


# A step's checkpoint, or the picture at the end of an epoch, is the first that does not fit.
@pytest.mark.parametrize(("limit", "save_every"), [(1_000_000, 0), (20_000, 30)])
def test_disk_full(
    limit: int, save_every: int, forks: Forks, photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(pretrained, tmp_path / "out"))
    before = contents(output)
    words = short(photos, output, "--save_every", save_every, "--epochs", 3)
    running = forks.start(*words, limit=limit)
    assert running.wait() == 2, running.err
    assert "File too large" in error_line(running.err)
    after = contents(output)
    assert {path: after.get(path) for path in before} == before
    assert not list(output.glob("*.part"))
    run(*words)
    assert last(output)["step"] == 9


def test_one_run_in_a_folder(
    forks: Forks, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The second is refused while the first runs, also under another command; not after a kill."""
    output = tmp_path / "out"
    words = [*LONG["pretrain"], "--output_dir", output, "--epochs", 50]
    running = reached(forks.start(*words, code=SLOW + MAIN), output, 1)
    for command in ([], ["finetune"]):
        said = refused(capsys, *command, *words)
        assert str(output) in said and "another run" in said
    assert not running.ended()
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    scripts.stop_after(1, *words)
    assert not (output / ".lock").exists()


# ── damaged checkpoints ─────────────────────────────────────────────────────────────────


def edit_model(change: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda file: change(file["model"])


def edit_state(name: str, value: object) -> Callable[[dict], object]:
    return lambda file: file["optimizer"]["state"][0].update({name: value})


KEY = "encoder.norm.weight"
DAMAGES: dict[str, Callable[[dict], object]] = {
    "moments too short": edit_state("exp_avg", torch.zeros(1)),
    "second moments too short": edit_state("exp_avg_sq", torch.zeros(1)),
    "moments not finite": lambda f: f["optimizer"]["state"][0]["exp_avg"].fill_(math.nan),
    "moments no tensor": edit_state("exp_avg", "x"),
    "steps no tensor": edit_state("step", 3),
    "state of other names": lambda f: f["optimizer"]["state"].update(
        {0: dict(zip("abc", f["optimizer"]["state"][0].values(), strict=True))}),
    "state short": lambda f: f["optimizer"]["state"].pop(0),
    "state of another": lambda f: f["optimizer"]["state"].update({99: {"a": torch.ones(1)}}),
    "optimizer none": lambda f: f.update(optimizer=None),
    "optimizer empty": lambda f: f.update(optimizer={}),
    "a group short": lambda f: f["optimizer"]["param_groups"].pop(),
    "groups no list": lambda f: f["optimizer"].update(param_groups=3),
    "optimizer missing": lambda f: f.pop("optimizer"),
    "step a word": lambda f: f.update(step="x"),
    "step negative": lambda f: f.update(step=-5),
    "step a float": lambda f: f.update(step=3.5),
    "step huge": lambda f: f.update(step=10**9),
    "step missing": lambda f: f.pop("step"),
    "key missing": edit_model(lambda m: m.pop(KEY)),
    "key misshapen": edit_model(lambda m: m.update({KEY: torch.zeros(3)})),
    "key unexpected": edit_model(lambda m: m.update({"extra": torch.zeros(3)})),
    "key a number": edit_model(lambda m: m.update({5: torch.zeros(3)})),
    "weight no tensor": edit_model(lambda m: m.update({KEY: [1.0]})),
    "weight not finite": edit_model(lambda m: m[KEY].fill_(math.nan)),
    "weight sparse": edit_model(lambda m: m.update({KEY: m[KEY].to_sparse()})),
    "weight meta": edit_model(lambda m: m.update({KEY: m[KEY].to("meta")})),
    "weight repeated": edit_model(lambda m: m.update({KEY: torch.ones(1).expand(len(m[KEY]))})),
    "weight complex": edit_model(lambda m: m.update({KEY: m[KEY].to(torch.complex64)})),
    "weight of no shape": edit_model(lambda m: m.update({KEY: torch.tensor(1.0)})),
    "model empty": lambda f: f.update(model={}),
    "model a list": lambda f: f.update(model=[1]),
    "log missing": lambda f: f.pop("log"),
    "log none": lambda f: f.update(log=None),
    "log a word": lambda f: f.update(log="x"),
    "log empty": lambda f: f.update(log={}),
    "log records a number": lambda f: f["log"].update(records=5),
    "log records words": lambda f: f["log"].update(records=["a", "b"]),
    "log sums a list": lambda f: f["log"].update(epoch=[1]),
    "log sums words": lambda f: f["log"].update(epoch={"loss": "x"}),
    "log of too few epochs": lambda f: f["log"]["records"].pop(),
    "args a list": lambda f: f.update(args=[1]),
    "args empty": lambda f: f.update(args={}),
    "config missing": lambda f: f["args"].pop("config"),
    "config empty": lambda f: f["args"].update(config={}),
    "config without release": lambda f: f["args"]["config"].pop("release"),
    "config of strings": lambda f: f["args"]["config"].update(input_size="big"),
    "config of none": lambda f: f["args"].update(config=None),
    "settings none": lambda f: f["args"].update(settings=None),
    "settings a list": lambda f: f["args"].update(settings=[1]),
}  # fmt: skip


def damage(path: Path, change: Callable[[dict], object]) -> None:
    file = load(path)
    change(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about exotic tensors
        torch.save(file, path)


@pytest.fixture(scope="module")
def damaged(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each damage a folder with that checkpoint, which stopped after four steps, alone."""
    root, folders = tmp_path_factory.mktemp("damaged"), {}
    for name, change in DAMAGES.items():
        folders[name] = root / name.replace(" ", "_")
        folders[name].mkdir()
        shutil.copy(pretrained / "checkpoint-last.pth", folders[name])
        damage(folders[name] / "checkpoint-last.pth", change)
    return folders


@pytest.mark.parametrize("name", [name for name in DAMAGES if "moments" not in name])
def test_damaged_checkpoint_is_not_resumed(
    name: str, photos: Path, damaged: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    before = contents(damaged[name])
    said = refused(capsys, *short(photos, damaged[name], "--epochs", 3))
    assert "checkpoint-last.pth" in said
    assert contents(damaged[name]) == before


MANY = f"""
import json
import {FIRST.SCRIPT}

print(json.dumps([{FIRST.SCRIPT}.main(words) for words in json.loads(argv[0])]))
"""


def test_damaged_moments_crash_nothing(
    forks: Forks, photos: Path, damaged: dict[str, Path]
) -> None:
    folders = [folder for name, folder in damaged.items() if "moments" in name]
    before = contents(*folders)
    commands = [short(photos, folder, "--epochs", 3) for folder in folders]
    running = forks.start(json.dumps(commands), code=MANY)
    assert running.wait() == 0, running.err
    assert json.loads(running.out.splitlines()[-1]) == [2] * len(folders)
    for folder, said in zip(folders, running.err.splitlines(), strict=True):
        assert f"{folder}/checkpoint-last.pth" in error_line(said)
    assert contents(*folders) == before


def test_average_missing_is_not_resumed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = short(photos, tmp_path / "out", "--ema", 0.5, command="finetune")
    scripts.stop_after(4, *words)
    shutil.rmtree(tmp_path / "out" / "best.pth", ignore_errors=True)
    path, whole = tmp_path / "out" / "checkpoint-last.pth", last(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-0.pth").unlink()
    for change in (lambda f: f.pop("ema"), lambda f: f["ema"].popitem(),
                   lambda f: f.update(ema=None)):  # fmt: skip
        torch.save(whole, path)
        damage(path, change)
        before = contents(tmp_path / "out")
        assert "checkpoint-last.pth" in refused(capsys, *words)
        assert contents(tmp_path / "out") == before
    torch.save(whole, path)
    run(*words)


def flip(path: Path, rng: np.random.Generator, count: int) -> None:
    """Flip that many random bits of a file."""
    pixels = np.fromfile(path, np.uint8)
    for place in rng.integers(len(pixels), size=count):
        pixels[place] ^= np.uint8(1 << rng.integers(8))
    pixels.tofile(path)


def test_flipped_bits_are_seen(pretrained: Path, tmp_path: Path) -> None:
    """What is read is what was written, or nothing is."""
    path, whole = tmp_path / "checkpoint-last.pth", last(pretrained)
    rng, refusals = np.random.default_rng(0), 0
    for k in range(60):
        shutil.copy(pretrained / "checkpoint-last.pth", path)
        flip(path, rng, 1 + k % 10)
        try:
            file = data.read_checkpoint(path)
        except InputError as error:
            refusals += 1
            assert "checkpoint-last.pth" in str(error) and "\n" not in str(error)
        else:
            assert equal({key: file[key] for key in whole}, whole)
    assert refusals > 40


def test_flipped_bits_fall_back(
    photos: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = Path(shutil.copytree(pretrained, tmp_path / "out"))
    weights = load(output / "checkpoint-last.pth")["model"]["encoder.norm.weight"].numpy()
    for name in ("checkpoint-last.pth", "checkpoint-1.pth"):
        raw = bytearray((output / name).read_bytes())
        raw[raw.index(weights.tobytes()) + 5] ^= 1
        (output / name).write_bytes(raw)
        assert "damaged" in refused(capsys, "export", "--weights", output / name)
    run(*short(photos, output))
    assert "resumed at step 3 of 6" in capsys.readouterr().out
    assert_same_end(pretrained, output)


def test_weights_ask_for_no_more_memory_than_their_file(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A file that says it is of a huge network, with the weights of a small one."""
    path = tmp_path / "huge.pth"
    for changes in ({"input_size": 1024, "decoder_dim": 4096}, {"embed_dim": 4096}):
        shutil.copy(pretrained / "checkpoint-last.pth", path)
        damage(path, lambda f, c=changes: f["args"]["config"].update(c))
        tracemalloc.start()
        said = refused(capsys, "reconstruct", *CPU, "--weights", path, "--data_path", "drawn:8")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "huge.pth" in said and peak < 60e6, f"{peak / 1e6:.0f} MB"


# ── bad input ───────────────────────────────────────────────────────────────────────────


class Unsafe:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def bad(
    photos: Path, pretrained: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Damaged data sets, damaged weights."""
    folder, good = tmp_path_factory.mktemp("bad"), finetuned / "checkpoint-last.pth"
    (folder / "empty").mkdir()
    (folder / "taken").write_text("a file")
    for name in ("no_val", "no_train", "empty_class", "other_classes"):
        shutil.copytree(photos, folder / name)
    shutil.rmtree(folder / "no_val" / "val")
    shutil.rmtree(folder / "no_train" / "train")
    (folder / "empty_class" / "train" / "dodos").mkdir()
    (folder / "other_classes" / "val" / "ants").rename(folder / "other_classes" / "val" / "bats")
    listed = [photos / "train" / "ants" / "RGB.jpg", folder / "gone.jpg"]
    (folder / "list.txt").write_text("".join(f"{path}\n" for path in listed))
    (folder / "void.txt").write_text("\n\n")

    whole = good.read_bytes()
    for share, name in ((0.5, "half.pth"), (0.999, "almost.pth"), (0, "nothing.pth")):
        (folder / name).write_bytes(whole[: int(share * len(whole))])
    (folder / "text.pth").write_text("these are no weights\n")
    (folder / "list.pth").write_bytes(pickle.dumps([1, 2, 3]))
    torch.save([torch.zeros(3)], folder / "tensors.pth")
    torch.save({"model": {"a": 1, "b": "c"}}, folder / "values.pth")
    torch.save({"model": {"a": np.zeros(3)}}, folder / "arrays.pth")
    (folder / "unsafe_plain.pth").write_bytes(pickle.dumps(Unsafe(folder / "EXECUTED")))
    torch.save({"model": Unsafe(folder / "EXECUTED")}, folder / "unsafe.pth")

    state = load(good)["model"]
    other = {"script": "mixmae", "command": "pretrain", "model": "mixmae_b", "config": {}}
    head = {"head.weight": torch.zeros(3, 9), "head.bias": torch.zeros(3)}
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    files = {
        "method": {"model": state, "args": other},
        "head_width": load(good) | {"model": state | head},
        "head_alone": load(good) | {"model": {k: v for k, v in state.items() if k != "head.bias"}},
        "head_point": load(good) | {"model": state | {"head.weight": torch.tensor(1.0)}},
        "head_bare": {"model": state | {"head.bias": torch.zeros(4)}},
        "nan": {"model": {k: v * math.nan for k, v in state.items()}},
        "inf": load(good) | {"model": {k: v / 0 for k, v in state.items()}},
        "table_even": {"model": state | {table: torch.zeros(36, 1)}},
        "table_none": {"model": state | {table: torch.zeros(0, 1)}},
        "table_flat": {"model": state | {table: torch.zeros(25)}},
    }
    for name, file in files.items():
        torch.save(file, folder / f"{name}.pth")
    return folder


# Name: command line, what the sentence has to say. {d} holds good images, {b} the bad things, {p}
# and {f} are the folders of a pre-training and of a fine-tuning run, {l} is a name of 300 letters.
TRAIN = "--model test --num_workers 0 --device cpu --epochs 1 --batch_size 4 --output_dir out"
TUNE = "finetune --data_path {d}"
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
    "long data name": ("--data_path {l}", "{l}"),
    "long data name, finetune": ("finetune --data_path {l}", "{l}"),
    "long weights name": (TUNE + " --weights {l}", "{l}"),
    "long output name": ("--data_path {d} --output_dir {l}", "{l}"),
    "long resume name": ("--data_path {d} --resume {l}", "{l}"),
    "unknown model": ("--data_path {d} --model swin_bb", "swin_bb swin_b,"),
    "unknown model, finetune": (TUNE + " --model tets", "test"),
    "unknown model, timm": ("--model swin_base_patch4_window7_225", "swin_base_patch4_window7_224"),
    "unknown command": ("pretain --data_path {d}", "pretain pretrain"),
    "unknown recipe": ("--data_path {d} --recipe big", "--recipe big published small"),
    "unknown recipe, finetune": (TUNE + " --recipe big", "--recipe big published small"),
    "unknown flag": ("--data_path {d} --bath_size 4", "--bath_size"),
    "abbreviated flag": ("--data {d}", "--data"),
    "flag without value": ("--data_path {d} --seed", "--seed"),
    "word for a number": ("--data_path {d} --seed one", "--seed one"),
    "size": ("--data_path {d} --input_size 100", "100 96 112"),
    "size, finetune": (TUNE + " --input_size 60", "60 48 64"),
    "size not square": ("--data_path {d} --input_size 64x96", "--input_size 64x96 square"),
    "size of three": ("--data_path {d} --input_size 64x96x3", "--input_size"),
    "window too large": ("--data_path {d} --window_size 17", "--window_size 17 16"),
    "window zero": ("--data_path {d} --window_size 0", "--window_size 0"),
    "nothing visible": ("--data_path {d} --mask_ratio 0.99", "--mask_ratio 0.99 visible"),
    "nothing hidden": ("--data_path {d} --mask_ratio 0", "--mask_ratio hidden"),
    "ratio above one": ("--data_path {d} --mask_ratio 1.5", "--mask_ratio"),
    "ratio below zero": ("--data_path {d} --mask_ratio -0.5", "--mask_ratio"),
    "ratio not a number": ("--data_path {d} --mask_ratio nan", "--mask_ratio"),
    "seed too large": ("--data_path {d} --seed 18446744073709551616", "--seed"),
    "epochs too many": ("--data_path {d} --epochs 1" + 400 * "0", "--epochs"),
    "epochs of too many digits": ("--data_path {d} --epochs 1" + 5000 * "0", "--epochs"),
    "rate too large": ("--data_path {d} --lr 1e400", "--lr"),
    "rate not a number": ("--data_path {d} --lr nan", "--lr"),
    "odd batch": (TUNE + " --batch_size 3", "--batch_size 3 mixup"),
    "too few outputs": (TUNE + " --nb_classes 2", "3 2"),
    "batch too large": ("--data_path {d} --batch_size 13", "12 13 --batch_size"),
    "accumulation too large": ("--data_path {d} --accum_iter 4", "12 16 --batch_size"),
    "accumulation far too large": ("--data_path {d} --accum_iter 13", "12 52 --accum_iter"),
    "policy": (TUNE + " --aa rand-x9", "--aa rand-x9"),
    "release": ("--data_path {d} --release 2021", "--release 2021"),
    "dtype": ("--data_path {d} --dtype float", "--dtype float bf16"),
    "device": ("--data_path {d} --device gpu", "--device gpu"),
    "device meta": ("--data_path {d} --device meta", "--device meta"),
    "device meta, dry run": ("--device meta", "--device meta"),
    "no CUDA": ("--data_path {d} --device cuda", "--device cuda"),
    "no CUDA, dry run": ("--device cuda", "--device cuda"),
    "no such CUDA": ("--data_path {d} --device cuda:9", "cuda:9"),
    "output in a file's place": ("--data_path {d} --output_dir {b}/taken", "taken"),
    "output below a file": ("--data_path {d} --output_dir {b}/taken/out", "taken"),
    "weights missing": (TUNE + " --weights {b}/gone.pth", "gone.pth"),
    "weights a folder": (TUNE + " --weights {b}/empty", "empty"),
    "weights cut in half": (TUNE + " --weights {b}/half.pth", "half.pth"),
    "weights cut at the end": (TUNE + " --weights {b}/almost.pth", "almost.pth"),
    "weights empty": (TUNE + " --weights {b}/nothing.pth", "nothing.pth"),
    "weights a text": (TUNE + " --weights {b}/text.pth", "text.pth"),
    "weights a list": (TUNE + " --weights {b}/list.pth", "list.pth"),
    "weights tensors": (TUNE + " --weights {b}/tensors.pth", "tensors.pth"),
    "weights values": (TUNE + " --weights {b}/values.pth", "values.pth"),
    "weights arrays": (TUNE + " --weights {b}/arrays.pth", "arrays.pth NumPy"),
    "weights unsafe": (TUNE + " --weights {b}/unsafe.pth", "unsafe.pth system"),
    "weights unsafe pickle": ("--data_path {d} --weights {b}/unsafe_plain.pth", "unsafe_plain.pth"),
    "weights of NaN": (TUNE + " --weights {b}/nan.pth", "nan.pth finite"),
    "weights of NaN, pretrain": ("--data_path {d} --weights {b}/nan.pth", "nan.pth finite"),
    "weights infinite": (TUNE + " --weights {b}/inf.pth", "inf.pth finite"),
    "weights of an even table": (TUNE + " --weights {b}/table_even.pth", "table_even.pth"),
    "weights of no table": (TUNE + " --weights {b}/table_none.pth", "table_none.pth"),
    "weights of a flat table": (TUNE + " --weights {b}/table_flat.pth", "table_flat.pth"),
    "weights of another model": (
        TUNE + " --model demo --weights {p}/backbone.pth",
        "backbone.pth --model patch_embed.proj.weight",
    ),
    "pretrain from another model": (
        "--data_path {d} --model demo --weights {p}/checkpoint-last.pth",
        "checkpoint-last.pth encoder",
    ),
    "resume without steps": ("--data_path {d} --resume {p}/backbone.pth", "backbone.pth --weights"),
    "resume of another command": (
        TUNE + " --resume {p}/checkpoint-last.pth", "checkpoint-last.pth",
    ),
}  # fmt: skip
USE = "--num_workers 0 --device cpu"
WEIGHTS = " --weights {p}/checkpoint-last.pth --data_path {d}"
BAD_USE = {
    "evaluate without weights": ("evaluate --data_path {d}", "--weights"),
    "reconstruct without weights": ("reconstruct --data_path {d}", "--weights"),
    "features without weights": ("features --data_path {d}", "--weights"),
    "export without weights": ("export", "--weights"),
    "evaluate without data": ("evaluate --weights {f}/best.pth", "--data_path"),
    "features without data": ("features --weights {f}/best.pth", "--data_path"),
    "no decoder": ("reconstruct --weights {f}/best.pth --data_path {d}", "best.pth mask_token"),
    "head of another width": ("evaluate --weights {b}/head_width.pth --data_path {d}", "head.w"),
    "head without bias": ("evaluate --weights {b}/head_alone.pth --data_path {d}", "head.bias"),
    "head of no shape": ("evaluate --weights {b}/head_point.pth --data_path {d}", "head_point"),
    "head of two sizes": ("evaluate --weights {b}/head_bare.pth --data_path {d}", "head.bias"),
    "head for other data": ("evaluate --weights {f}/best.pth --data_path drawn:20", "classes ants"),
    "evaluate NaN": ("evaluate --weights {b}/nan.pth --data_path {d}", "nan.pth finite"),
    "evaluate without val": (
        "evaluate --weights {f}/best.pth --data_path {b}/no_val", "no_val/val",
    ),
    "neighbours without train": (
        "evaluate --weights {p}/backbone.pth --data_path {b}/no_train", "no_train/train",
    ),
    "neighbours of other classes": (
        "evaluate --weights {p}/backbone.pth --data_path {b}/other_classes", "ants bats",
    ),
    "evaluate other classes": (
        "evaluate --weights {f}/best.pth --data_path {b}/other_classes", "ants bats",
    ),
    "evaluate another model": (
        "evaluate --model demo --weights {f}/best.pth --data_path {d}", "best.pth patch_embed",
    ),
    "evaluate another method": (
        "evaluate --weights {b}/method.pth --data_path {d}", "method.pth mixmae",
    ),
    "evaluate truncated": ("evaluate --weights {b}/half.pth --data_path {d}", "half.pth"),
    "features of nothing": (
        "features --weights {p}/checkpoint-last.pth --data_path {b}/empty", "empty images",
    ),
    "reconstruct nothing hidden": ("reconstruct --mask_ratio 0" + WEIGHTS, "--mask_ratio"),
    "reconstruct as no picture": ("reconstruct --output a.txt" + WEIGHTS, "a.txt"),
    "reconstruct below a file": ("reconstruct --output {b}/taken/a.png" + WEIGHTS, "taken/a.png"),
    "features below a file": ("features --output {b}/taken/a.npz" + WEIGHTS, "taken/a.npz"),
    "export below a file": (
        "export --weights {f}/best.pth --output {b}/taken/a.pth", "taken/a.pth",
    ),
    "export over a folder": ("export --weights {f}/best.pth --output {b}/empty", "empty"),
    "export to no name": ("export --weights {f}/best.pth --output .", "cannot write ."),
    "features to no name": ("features --output ." + WEIGHTS, "cannot write ."),
    "reconstruct to no name": ("reconstruct --output ." + WEIGHTS, "--output ."),
    "export to a long name": ("export --weights {f}/best.pth --output {l}", "{l}"),
    "features to a long name": ("features --output {l}" + WEIGHTS, "{l}"),
    "reconstruct to a long name": ("reconstruct --output {l}.png" + WEIGHTS, "{l}"),
    "long weights name, use": ("evaluate --weights {l} --data_path {d}", "{l}"),
    "long data name, use": ("features --weights {f}/best.pth --data_path {l}", "{l}"),
    "export naming": ("export --weights {f}/best.pth --naming mmseg", "--naming timm official"),
    "export unsafe": ("export --weights {b}/unsafe.pth", "unsafe.pth"),
    "use size": ("evaluate --weights {f}/best.pth --data_path {d} --input_size 70", "70 64 80"),
    "use size of two": ("features --input_size 64x70" + WEIGHTS, "64x70 64 80"),
    "use dtype": ("evaluate --weights {f}/best.pth --data_path {d} --dtype int8", "--dtype int8"),
    "use meta": ("features --device meta" + WEIGHTS, "--device meta"),
}  # fmt: skip
# Numbers that mean nothing: better refused than a traceback from deep inside.
ODD_VALUES = {
    flag: (f"{command} --data_path {{d}} --{flag.split()[0]} {flag.split()[1]}", flag.split()[0])
    for command, flags in {
        "pretrain": ("batch_size 0", "batch_size -4", "accum_iter 0", "save_freq 0",
                     "log_every 0", "num_workers -1", "seed -1", "epochs 0", "save_every -1"),
        "finetune": ("drop_path 1.5", "ema 1.5", "layer_decay 2", "nb_classes 0"),
    }.items()
    for flag in flags
}  # fmt: skip
ALL_BAD = [
    *(pytest.param(*row, TRAIN, id=name) for name, row in BAD_INPUT.items()),
    *(pytest.param(*row, USE, id=name) for name, row in BAD_USE.items()),
    *(pytest.param(*row, TRAIN, id=name) for name, row in ODD_VALUES.items()),
]
LONG_NAME = 300 * "n"


def stamps(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Every file below the folders, with its size and time."""
    found = {path: path.lstat() for folder in folders for path in folder.rglob("*")}
    return {path: (s.st_size, s.st_mtime_ns) for path, s in found.items() if not path.is_dir()}


@pytest.fixture
def unchanged(bad: Path, pretrained: Path, finetuned: Path, tmp_path: Path) -> Iterator[None]:
    """Nothing is written, nothing that a file brings is run."""
    folders = (bad, pretrained, finetuned, tmp_path)
    before = stamps(*folders)
    yield
    assert stamps(*folders) == before


@pytest.mark.parametrize(("line", "wanted", "rest"), ALL_BAD)
def test_bad_input(
    line: str, wanted: str, rest: str, photos: Path, bad: Path, pretrained: Path, finetuned: Path,
    unchanged: None, capsys: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    places = {"d": photos, "b": bad, "p": pretrained, "f": finetuned, "l": LONG_NAME}
    given, defaults = line.format(**places).split(), rest.split()
    command = [given.pop(0)] if not given[0].startswith("-") else []
    flags = [] if command == ["export"] else defaults  # what is given comes last and wins
    said = refused(capsys, *command, *flags, *given)
    assert [word for word in wanted.format(**places).split() if word not in said] == [], said
    assert not [str(warning.message) for warning in recwarn]  # would be lines on stderr


@pytest.mark.parametrize("name", ["missing folder", "unknown flag", "weights unsafe", "device",
                                  "weights cut in half", "seed too large", "long output name"])
@each_script
def test_bad_input_of_each_script(
    script: ModuleType, name: str, photos: Path, bad: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    line, wanted = BAD_INPUT[name]
    places = {"d": photos, "b": bad, "l": LONG_NAME}
    given = line.format(**places).split()
    command = [given.pop(0)] if not given[0].startswith("-") else []
    said = refused(capsys, *command, *TRAIN.split(), *given, script=script)
    assert [word for word in wanted.format(**places).split() if word not in said] == [], said
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("flags", [("--batch_size", 13), ("--batch_size", 3, "--accum_iter", 5)])
def test_a_batch_too_large_is_told_what_fits(
    flags: tuple, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = refused(capsys, *short(photos, tmp_path / "out", *flags))
    fits = re.search(r"--batch_size (\d+) or less fits", said)
    assert fits and "--recipe small" in said
    run(*short(photos, tmp_path / "out", *flags, "--batch_size", fits[1]))


def test_bad_input_of_a_process(tmp_path: Path) -> None:
    done = process([FIRST.__file__, "--data_path", tmp_path / "absent"])
    assert done.returncode == 2
    assert "absent" in error_line(done.stderr)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_variables_of_torchrun_that_are_no_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(name, "abc")
    said = refused(capsys, "--model", "test", "--device", "cpu")
    assert "abc" in said


# ── two processes ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_other(rank: int, forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [*LONG["pretrain"], "--epochs", 50, "--batch_size", 2, "--output_dir", output]
    both = forks.start_two(*words, code=SLOW + MAIN)
    reached(both[0], output, 1)
    os.kill(both[rank].pid, signal.SIGKILL)
    assert both[1 - rank].wait(60) in (1, 2)
    sentence(both[1 - rank])
    assert finite(last(output)["model"])


def test_error_on_one_rank_ends_the_other(forks: Forks, tmp_path: Path) -> None:
    """Rank 0 finds the folder locked by another run; rank 1 must not wait for it."""
    output = tmp_path / "out"
    words = [*LONG["pretrain"], "--epochs", 50, "--output_dir", output]
    first = reached(forks.start(*words, code=SLOW + MAIN), output, 1)
    both = forks.start_two(*words, "--batch_size", 2)  # the same global batch
    codes = [running.wait(60) for running in both]
    assert codes[0] == 2 and "another run" in sentence(both[0])
    assert codes[1] in (1, 2) and "cannot resume" not in sentence(both[1])
    os.kill(first.pid, signal.SIGKILL)


def test_sigterm_to_one_rank_stops_both(forks: Forks, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [*LONG["pretrain"], "--epochs", 50, "--batch_size", 2, "--output_dir", output]
    both = forks.start_two(*words, code=SLOW + MAIN)
    os.kill(reached(both[0], output, 1).pid, signal.SIGTERM)
    assert [running.wait(60) for running in both] == [0, 0]
    assert [running.err for running in both] == ["", ""]
    assert last(output)["step"] == int(re.search(r"stopped after step (\d+)", both[0].out)[1])


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = environment(
            RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        done = process([FIRST.__file__, "--model", "test", "--device", "cpu"], env)
    assert done.returncode == 2, done.stderr
    said = error_line(done.stderr)
    assert str(port) in said and "--master_port" in said
