"""Shared by all tests: command-line options, golden files, thread count, tiny image folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Of torch, where it is set; 0: each test file uses what suits it.
THREADS = int((os.environ.get("OMP_NUM_THREADS") or "0").split(",")[0])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=GOLDEN, help="folder of <method>/*.npz")
    parser.addoption("--checkpoints", type=Path, default=None, help="folder of published files")
    parser.addoption("--demo_seeds", type=int, default=1, help="seeds of each demo, up to three")


def pytest_configure(config: pytest.Config) -> None:
    global GOLDEN
    GOLDEN = Path(config.getoption("--golden")).resolve()
    config.addinivalue_line("markers", "slow: full-size models or long runs")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(THREADS or 2)


def golden_files(method: str) -> list[Path]:
    """Every fixture of a method, from tests/golden, where none is an error, or --golden DIR."""
    files = sorted((GOLDEN / method).glob("*.npz"))
    assert files or GOLDEN != ROOT / "tests" / "golden", f"no fixtures in {GOLDEN / method}"
    return files


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for small models: on a busy machine two wait for each other at every product."""
    before = torch.get_num_threads()
    if not THREADS:
        torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and val/ with three classes of four JPEGs each, of several sizes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, grey in (("ants", 40), ("bees", 120), ("crows", 200)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(4):
                height, width = rng.integers(40, 90, 2)
                pixels = rng.normal(grey, 30, (height, width, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.jpg")
    return tmp_path / "images"
