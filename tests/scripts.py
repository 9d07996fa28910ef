"""What the tests of commands share: the list of scripts, their runs, and processes of their own.

A process that only has to live and die by itself is forked from one that has imported torch
already (`python -m tests.scripts`): a fork takes milliseconds, an import seconds. It has an empty
standard input, files as its other streams, an environment, a folder and a session of its own, and
leaves through the interpreter's usual exit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.same import METHODS

SCRIPTS = [importlib.import_module(name) for name in METHODS if (ROOT / f"{name}.py").exists()]
FIRST = SCRIPTS[0]  # on which tests that need processes and kills run in full
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.SCRIPT)

CPU = ["--num_workers", "0", "--device", "cpu"]
TINY = ["--model", "test", *CPU]
FAST = ["--lr", "1e-3", "--warmup_epochs", "0"]  # large steps: a lost or doubled one shows
PLAIN = ["--mixup", "0", "--cutmix", "0", "--reprob", "0", "--drop_path", "0"]
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 120  # seconds after which a process hangs; the slowest takes about ten


# ── inside a command ────────────────────────────────────────────────────────────────────


class Built(Exception):
    """Carries what a training command has made out of it, before its first step."""


def before_training(script: ModuleType, command: str, **flags: object) -> dict[str, object]:
    """What a training command hands to its loop, by name."""

    def stop(cfg: object, process: object, parts: dict, loader: object, args: dict,
             schedule: Callable, *_: object) -> None:  # fmt: skip
        raise Built({"parts": parts, "loader": loader, "args": args, "schedule": schedule})

    _, function = script.COMMANDS[command]
    config = script.configure(command, model="test", device="cpu", num_workers=0, **flags)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Built) as built:
        patch.setattr(script, "train", stop)
        function(replace(config, output_dir=""))
    return built.value.args[0]


# ── what a run leaves ───────────────────────────────────────────────────────────────────


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


def measured(record: dict) -> dict:
    """A record of the log without what depends on the clock and the machine."""
    clock = ("images_per_second", "data_wait", "memory_gb")
    return {k: v for k, v in record.items() if k not in clock}


def assert_same_end(first: Path, second: Path) -> None:
    """Two output folders hold bitwise the same weights, optimizer, average and log."""
    a, b = last(first), last(second)
    for key in {"step", "epoch", "model", "optimizer", "ema"} & (a.keys() | b.keys()):
        assert equal(a[key], b[key]), f"{key} differs"
    assert [measured(r) for r in log(first)] == [measured(r) for r in log(second)]


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


# ── runs in this process ────────────────────────────────────────────────────────────────


def run(*argv: object, script: ModuleType = FIRST) -> None:
    """A command that has to succeed, in this process."""
    assert script.main([str(word) for word in argv]) == 0


def refused(capsys: pytest.CaptureFixture, *argv: object, script: ModuleType = FIRST) -> str:
    """The sentence with which a command refuses its input, in this process."""
    capsys.readouterr()
    assert script.main([str(word) for word in argv]) == 2
    return error_line(capsys.readouterr().err)


@contextlib.contextmanager
def at_step(
    script: ModuleType, number: int, act: Callable[[torch.nn.Module], object]
) -> Iterator[None]:
    """Have `act` called on the model when the given step begins, counted from 1."""
    count, copy = 0, script.running_statistics

    def counted(model: torch.nn.Module) -> dict:
        nonlocal count
        count += 1
        if count == number:
            act(model)
        return copy(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "running_statistics", counted)
        yield


def stop_after(steps: int, *argv: object, script: ModuleType = FIRST) -> None:
    """Run in this process; SIGTERM arrives during the given step."""
    with at_step(script, steps, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        run(*argv, script=script)


def skip_steps(script: ModuleType, bad: Callable[[int], bool], patch: pytest.MonkeyPatch) -> None:
    """Have the gradients of the steps that are `bad`, counted from 1, taken for not finite."""
    count, apply = 0, script.apply_gradients

    def counted(optimizer: object, scaler: object, norm: float, clip_grad: object) -> bool:
        nonlocal count
        count += 1
        return apply(optimizer, scaler, math.nan if bad(count) else norm, clip_grad)

    patch.setattr(script, "apply_gradients", counted)


# ── processes ───────────────────────────────────────────────────────────────────────────

MAIN = f"import sys, {FIRST.SCRIPT}; sys.exit({FIRST.SCRIPT}.main(argv))"


def environment(**changes: object) -> dict[str, str]:
    """This process's, outside of any torchrun, on one thread."""
    left_out = (*TORCHRUN_VARIABLES, "PYTHONPATH", "PYTHONIOENCODING")
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | fixed | {k: str(v) for k, v in changes.items()}


def process(
    words: Sequence[object], env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess:
    """`python *words` as a process that imports everything itself."""
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=TIMEOUT,
        env=env or environment(), **options,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what: Callable[[], object], seconds: float = TIMEOUT) -> object:
    """The first answer of `what` that is true."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < end, f"nothing came within {seconds} s"
        time.sleep(0.01)
    return answer


class Forked:
    """A forked process: its number, its streams, its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def pid(self) -> int:
        path = self.folder / "pid"
        return int(wait_for(lambda: path.exists() and path.read_text()))

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def ended(self) -> bool:
        return (self.folder / "code").exists()

    def wait(self, seconds: float = TIMEOUT) -> int:
        """The exit code, negative for a signal; a process that does not end fails the test."""
        try:
            wait_for(self.ended, seconds)
        except AssertionError:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"no end within {seconds} s: {self.out} {self.err}") from None
        return int((self.folder / "code").read_text())

    def all_gone(self, seconds: float = 30) -> bool:
        """Whether it and all that it started (its session) are gone, after a while."""

        def gone() -> bool:
            for status in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    state, _, _, session = status.read_text().rpartition(") ")[2].split()[:4]
                    if int(session) == self.pid and state != "Z":
                        return False
            return True

        with contextlib.suppress(AssertionError):
            wait_for(gone, seconds)
        return gone()


class Forks:
    """Starts forked processes; ends with the process that made it, its forks with `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.scripts"], stdin=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment(PYTHONPATH=ROOT),
        )  # fmt: skip

    def start(
        self, *argv: object, code: str = MAIN, env: dict[str, object] | None = None,
        cwd: Path | None = None, limit: int | None = None, **streams: str,
    ) -> Forked:  # fmt: skip
        """Run `code` on `argv`; `limit` is the largest file it may write, `streams` name files
        for stdout and stderr, "" closes one."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        request = {
            "argv": [str(word) for word in argv], "code": code, "cwd": str(cwd or Path.cwd()),
            "env": environment(**(env or {})), "folder": str(folder), "limit": limit,
            "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr"), **streams,
        }  # fmt: skip
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.started.append(Forked(folder))
        return self.started[-1]

    def start_two(self, *argv: object, **options: object) -> list[Forked]:
        """Two ranks of one group, as torchrun would start them."""
        group = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return [self.start(*argv, env=group | {"RANK": rank, "LOCAL_RANK": rank}, **options)
                for rank in (0, 1)]  # fmt: skip

    def close(self) -> None:
        for forked in self.started:
            if not forked.ended():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(forked.pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait(TIMEOUT)


def serve() -> None:
    """The process that forks: a request a line."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers below
    for line in sys.stdin:
        if os.fork() == 0:
            return keep(json.loads(line))


def keep(request: dict) -> None:
    """Fork once more, tell the child's number, wait, and tell its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (child := os.fork()) == 0:
        return play(request)

    def tell(name: str, value: int) -> None:
        path = Path(request["folder"], name)
        path.with_suffix(".part").write_text(str(value))
        path.with_suffix(".part").rename(path)

    tell("pid", child)
    tell("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def play(request: dict) -> None:
    """Be a new process: as Python itself would start, with streams and environment as asked."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    encoding = request["env"].get("PYTHONIOENCODING", "utf-8")
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = None
        if request[name]:
            file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
            errors = "strict" if number == 1 else "backslashreplace"
            stream = open(number, "w", encoding=encoding, errors=errors, closefd=False,  # noqa: SIM115
                          buffering=number - 1 or -1)  # fmt: skip
        else:
            os.close(number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if request["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"],) * 2)
    exec(compile(request["code"], "<driver>", "exec"), {"argv": request["argv"]})


# ── fixtures: each test file that uses them names them ──────────────────────────────────


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Where helps of flags come from; it parses the script anew each time, a sixth of a second.
        patch.setattr(inspect, "getsource", functools.lru_cache(inspect.getsource))
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


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    started = Forks(tmp_path_factory.mktemp("forks"))
    yield started
    started.close()


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


def short(photos: Path, output: Path, *argv: object, command: str = "pretrain") -> list[str]:
    """Words of a run of two epochs of three steps."""
    words = [command, *TINY, *FAST, "--data_path", photos, "--output_dir", output]
    return [str(w) for w in (*words, "--batch_size", 4, "--epochs", 2, "--save_freq", 1, *argv)]


@pytest.fixture(scope="module")
def pretrained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of `short` pre-training."""
    output = tmp_path_factory.mktemp("pretrained")
    run(*short(photos, output))
    return output


@pytest.fixture(scope="module")
def finetuned(photos: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of `short` fine-tuning from the backbone that pre-training wrote."""
    output = tmp_path_factory.mktemp("finetuned")
    weights = pretrained / "backbone.pth"
    run(*short(photos, output, "--weights", weights, command="finetune"))
    return output


if __name__ == "__main__":
    serve()
