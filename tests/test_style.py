"""Rules of the code base that no linter knows, checked on the sources."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import greenmim
from tests.conftest import ROOT

METHODS = ("greenmim.py", "mixmae.py", "fastmim.py", "hpvit.py", "distill_lite.py")
SCRIPTS = [ROOT / name for name in METHODS if (ROOT / name).exists()]
COMMON = sorted((ROOT / "common").glob("*.py"))
SOURCES = [*SCRIPTS, *COMMON]
README = ROOT / "README.md"

LINE_LENGTH = 100
SCRIPT_LINES = 1750  # 1,100 was wished for; commands, weights and robustness take the rest
COMMON_LINES = 900  # all modules together
FUNCTION_LINES = 60
LOOP_LINES = 90
LOOPS = ("train",)
README_LINES = 200

NEEDED = ("torch", "numpy", "einops", "PIL", "tqdm", "common")
OPTIONAL = ("timm", "safetensors", "tensorboard")  # used inside functions, where installed
BANNER_WIDTH = 88
BANNERS = (
    "config", "masking", "layers", "encoder", "decoder and target", "model", "weights",
    "distributed and optimisation", "pre-training", "fine-tuning", "other commands",
    "command line",
)  # fmt: skip
EXTRA_BANNERS = ("planning", "training loop")

# Names that stand for something else in each script; every other shared name is one source.
DIFFERENT = {
    "ModelConfig", "MODELS", "OTHER_NAMES", "RECIPES", "PretrainConfig", "FinetuneConfig",
    "UseConfig", "model_config", "layer_id", "swin_names", "load_encoder", "load_model",
    "export_state", "pretrain", "finetune", "reconstruct", "features", "demo",
}  # fmt: skip

each_source = pytest.mark.parametrize(
    "path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES]
)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=[path.name for path in SCRIPTS])


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def imported(tree: ast.AST) -> list[str]:
    """Full names of all imported modules and members, `from a import b` as a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


# ── imports ─────────────────────────────────────────────────────────────────────────────


def forbidden_imports(tree: ast.Module, allowed: tuple[str, ...]) -> list[str]:
    """Modules outside the standard library and `allowed`, optional ones only in functions."""
    inside = {name for function in functions(tree) for name in imported(function)}
    wrong = []
    for name in imported(tree):
        top = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0]
        if top in OPTIONAL:
            wrong += [name] * (name not in inside)
        elif top not in (*sys.stdlib_module_names, *allowed):
            wrong.append(name)
    return wrong


@each_source
def test_imports(path: Path) -> None:
    # A common module is a leaf: neither scripts nor other common modules.
    allowed = NEEDED if path in SCRIPTS else tuple(name for name in NEEDED if name != "common")
    assert forbidden_imports(parse(path), allowed) == []


def test_imports_are_seen() -> None:
    text = "import os\nimport timm\nfrom common import data\nfrom . import x\nimport mixmae\n"
    inside = "def f():\n    import safetensors.torch\n    import pandas\n"
    wrong = forbidden_imports(ast.parse(text + inside), NEEDED)
    assert wrong == ["timm", "..x", "mixmae", "pandas"]


IMPORT = """
import json, os, signal, sys
import numpy, torch, einops, tqdm, PIL.Image, PIL.ImageDraw, PIL.ImageEnhance, PIL.ImageOps
import torch.distributed, torch.utils.checkpoint, torch.utils.data

written = []


def watch(event, details):
    if event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(details[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "socket.connect"):
        written.append(event)


def state():
    precision = torch.get_float32_matmul_precision(), str(torch.get_default_dtype())
    handlers = [str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    seeds = torch.initial_seed(), str(numpy.random.get_state())
    return torch.get_num_threads(), precision, handlers, seeds, dict(os.environ)


before = state()
sys.addaudithook(watch)
for name in sys.argv[1:]:
    __import__(name)
assert state() == before, "an import changes the state of the process"
assert not written, written
"""


def test_nothing_happens_on_import(tmp_path: Path) -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT, *names], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@each_source
def test_module_level_only_defines(path: Path) -> None:
    plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    docstring, *statements = parse(path).body or [ast.Expr(ast.Constant(""))]
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    for node in statements:
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, plain) or main, f"line {node.lineno}"


# ── one name, one source ────────────────────────────────────────────────────────────────


def definitions(text: str) -> dict[str, str]:
    """Source of each top-level class, function and assignment, decorators included."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        source = "\n".join(lines[first - 1 : node.end_lineno])
        found |= dict.fromkeys(names, source)
    return found


def drifted(texts: dict[str, str]) -> list[str]:
    """Names that stand for different sources in two of the scripts."""
    sources: dict[str, dict[str, str]] = {}
    for script, text in texts.items():
        for name, source in definitions(text).items():
            sources.setdefault(name, {})[script] = source
    return [
        f"{name}: {', '.join(found)}"
        for name, found in sources.items()
        if len(set(found.values())) > 1 and name not in DIFFERENT
    ]


def test_same_name_same_source() -> None:
    assert drifted({path.name: path.read_text() for path in SCRIPTS}) == []


def test_drift_is_seen() -> None:
    one = "@cache\ndef f(x):\n    return x\n\nA, B = 1, 2\nMODELS = 1\nclass C: pass\n"
    assert drifted({"a": one, "b": one.replace("MODELS = 1", "MODELS = 2")}) == []
    for old, new in (("return x", "return -x"), ("@cache\n", ""), ("1, 2", "1, 3"), ("pass", "0")):
        assert len(drifted({"a": one, "b": one.replace(old, new)})) in (1, 2)


# ── size ────────────────────────────────────────────────────────────────────────────────


@each_source
def test_line_length(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > LINE_LENGTH] == []


@each_script
def test_script_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= SCRIPT_LINES


def test_common_size() -> None:
    assert sum(len(path.read_text().splitlines()) for path in COMMON) <= COMMON_LINES


@each_source
def test_function_size(path: Path) -> None:
    for function in functions(parse(path)):
        length = function.end_lineno - function.lineno + 1
        limit = LOOP_LINES if function.name in LOOPS else FUNCTION_LINES
        assert length <= limit, f"{function.name} has {length} lines"


# ── sections, hints and docstrings ──────────────────────────────────────────────────────


@each_script
def test_banners(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.startswith("# ──")]
    titles = [re.fullmatch(r"# ── ([a-z -]+) ─+", line) for line in lines]
    assert all(titles), "a banner reads '# ── title ───'"
    assert {len(line) for line in lines} == {BANNER_WIDTH}
    known = [title[1] for title in titles if title[1] not in EXTRA_BANNERS]
    assert known == list(BANNERS)


@each_script
def test_module_docstring(path: Path) -> None:
    text = ast.get_docstring(parse(path))
    assert "arXiv" in text, "cites its paper"
    assert re.search(r"\(1\)$", text, re.M), "numbers its equations"
    assert re.search(r"released", text), "says where released code differs"
    assert re.search(r"^Letters: B batch", text, re.M), "explains the letters of shapes"
    assert f"python {path.name}" in text, "shows how it is used"
    assert re.search(r"^To copy", text, re.M), "says what to copy"


def missing_hints(tree: ast.AST) -> list[str]:
    """Arguments and results without a type hint; self and cls need none."""
    missing = []
    for function in functions(tree):
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        missing += [f"{function.name}({x.arg})" for x in arguments
                    if x and x.annotation is None and x.arg not in ("self", "cls")]  # fmt: skip
        missing += [f"{function.name}() ->"] * (function.returns is None)
    return missing


@each_source
def test_hints(path: Path) -> None:
    assert missing_hints(parse(path)) == []


def test_missing_hints_are_seen() -> None:
    text = "class A:\n    def f(self, x, *y: int, **z): ...\n"
    inner = "def g():\n    def h(b: int) -> int: ..."
    assert missing_hints(ast.parse(text + inner)) == ["g() ->", "f(x)", "f(z)", "f() ->"]


@each_source
def test_public_names_have_docstrings(path: Path) -> None:
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@each_source
def test_nothing_is_left_to_do(path: Path) -> None:
    assert re.findall(r"\b(TODO|FIXME|XXX)\b", path.read_text()) == []


# ── README ──────────────────────────────────────────────────────────────────────────────

needs_readme = pytest.mark.skipif(not README.exists(), reason="there is no README.md")


def readme_commands() -> list[list[str]]:
    """Words of each line of a bash block that starts python or torchrun."""
    text = README.read_text() if README.exists() else ""
    lines = []
    for block in re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```", text, re.M | re.S):
        lines += block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line for line in words if line and line[0] in ("python", "python3", "torchrun")]


@needs_readme
@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_readme_command_parses(words: list[str]) -> None:
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"there is no module {words[2]}"
        return
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert ROOT / words[at] in SCRIPTS, f"there is no {words[at]}"
    script = importlib.import_module(Path(words[at]).stem)
    try:
        function, cfg = script.parse_config(words[at + 1 :])
    except SystemExit as stopped:  # --help
        assert stopped.code == 0
        return
    assert callable(function)
    if hasattr(cfg, "batch_size") and getattr(cfg, "model", ""):
        script.model_config(cfg.model, input_size=cfg.input_size, window_size=cfg.window_size)


@needs_readme
def test_readme_shows_commands() -> None:
    commands = readme_commands()
    for command in ("finetune", "evaluate", "reconstruct", "export", "features"):
        assert any(command in words for words in commands), f"no example of {command}"
    assert any(words[0] == "torchrun" for words in commands)
    assert all(f"make {target}" in README.read_text() for target in ("demo", "test"))


@needs_readme
def test_readme_lists_five_methods() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("|")]
    for name in METHODS:
        row = [line for line in rows if name in line]
        assert row, f"no row for {name}"
        planned = any("planned" in line for line in row)
        assert planned != (ROOT / name).exists(), f"{name} is there, or planned"


@needs_readme
def test_readme_size() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES


@needs_readme
def test_readme_files_exist() -> None:
    """Links inside the repository, pictures included, lead somewhere."""
    links = re.findall(r"\]\(([^)#\s]+)", README.read_text())
    links += re.findall(r'(?:src|href)="([^"#]+)"', README.read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_every_method_is_one_of_five() -> None:
    assert greenmim.__file__ == str(ROOT / "greenmim.py")
    assert {path.name for path in ROOT.glob("*.py")} <= set(METHODS)
