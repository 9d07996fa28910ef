"""Rules of the code base that no linter knows, checked on the sources."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import greenmim
from tests import same
from tests.conftest import ROOT

METHODS = [f"{name}.py" for name in same.METHODS]
SCRIPTS = [ROOT / name for name in METHODS if (ROOT / name).exists()]
COMMON = sorted((ROOT / "common").glob("*.py"))
SOURCES = [*SCRIPTS, *COMMON]
README = ROOT / "README.md"

LINE_LENGTH = 100
SCRIPT_LINES = {  # fastmim has four backbones, distill_lite a teacher
    "greenmim.py": 1600, "mixmae.py": 1696, "hpvit.py": 1726, "distill_lite.py": 2404,
    "fastmim.py": 2466,
}  # fmt: skip
COMMON_LINES = 1426  # all modules together
FUNCTION_LINES = 60
LOOP_LINES = 90
LOOPS = ("train", "pretrain", "finetune")
README_LINES = 200
TOP_LEVEL = {  # pictures lie in docs/
    *METHODS, "common", "tests", "docs", "README.md", "Makefile", "pyproject.toml",
    "requirements.txt", "LICENSE", ".gitignore", ".ci",
}  # fmt: skip

NEEDED = ("torch", "numpy", "einops", "PIL", "tqdm", "common")
OPTIONAL = ("timm", "safetensors", "tensorboard")  # used inside functions, where installed
BANNER_WIDTH = 88
BANNERS = (
    "config", "masking", "layers", "encoder", "decoder and target", "model", "weights",
    "distributed and optimisation", "pre-training", "fine-tuning", "other commands",
    "command line",
)  # fmt: skip
EXTRA_BANNERS = ("planning", "training loop", *(
    f"backbone {name}" for name in ("vit", "swin", "pvtv2", "cmt")))  # fmt: skip
# Of fastmim.py, whose method is the same for four backbones, and stands before them.
METHOD_FIRST = ("config", "masking", "decoder and target", "model", "layers", "encoder")

# Names that stand for something else in each script; every other shared name is one source.
DIFFERENT = {
    # what the network is, and its recipes
    "ModelConfig", "MODELS", "OTHER_NAMES", "RECIPES",
    "MethodConfig", "PretrainConfig", "FinetuneConfig", "UseConfig", "model_config",
    # its files
    "identify", "load_weights", "export_state",
    "UNDECAYED", "LAYER_NORM_EPS", "layer_id",
    # what trains and uses it
    "pretrain", "finetune", "open_model", "load_backbone", "embed", "reconstruct",
    "draw_reconstructions", "export", "demo", "COMMANDS",
}  # fmt: skip
# What runs any method: in every script, the same text, and no method is named in it.
RUNNING = {
    "SCRIPT", "RunConfig", "FileConfig", "known_model", "choose_config",
    "Process", "setup_process", "parameter_groups", "lr_at", "apply_gradients",
    "prepare", "resume", "train", "save_training", "accuracy",
    "nearest_neighbours", "features", "fit", "configure", "parse_config", "main",
}  # fmt: skip
METHOD_WORDS = (
    "greenmim", "mixmae", "mixmim", "fastmim", "hpvit", "distill", "swin", "hiera", "vit",
    "window", "release", "mask", "ratio", "norm_pix", "unit", "patch", "decoder", "heads", "hog",
    "teacher", "student", "progressive", "blr", "epochs", "naming",
)  # fmt: skip

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


def drifted(texts: dict[str, str]) -> list[str]:
    """Names that stand for different sources in two of the scripts."""
    sources: dict[str, dict[str, str]] = {}
    for script, text in texts.items():
        for name, source in same.definitions(text).items():
            sources.setdefault(name, {})[script] = source
    return [
        f"{name}: {', '.join(found)}"
        for name, found in sources.items()
        if len(set(found.values())) > 1 and name not in DIFFERENT
    ]


def test_same_name_same_source() -> None:
    found = drifted({path.name: path.read_text() for path in SCRIPTS})
    assert found == [], (
        "these names have several sources; `make same` copies greenmim.py's to the others (what "
        "has to differ needs a name of its own, or a place in DIFFERENT)"
    )


@each_script
def test_what_runs_a_method_names_none(path: Path) -> None:
    sources = same.definitions(path.read_text())
    assert RUNNING - sources.keys() == set(), "missing, or renamed"
    assert set() == RUNNING & DIFFERENT
    names = re.compile("greenmim|mixmae|mixmim|fastmim|hpvit|distill|swin", re.I)
    assert [name for name in RUNNING if names.search(sources[name])] == []


@each_script
def test_shared_fields_are_of_no_method(path: Path) -> None:
    script = importlib.import_module(path.stem)
    for kind in (script.RunConfig, script.FileConfig):
        names = [field.name for field in dataclasses.fields(kind)]
        assert names
        assert [n for n in names for word in METHOD_WORDS if word in [*n.split("_"), n]] == []


def test_drift_is_seen() -> None:
    one = "@cache\ndef f(x):\n    return x\n\nA, B = 1, 2\nMODELS = 1\nclass C: pass\n"
    assert drifted({"a": one, "b": one.replace("MODELS = 1", "MODELS = 2")}) == []
    for old, new in (("return x", "return -x"), ("@cache\n", ""), ("1, 2", "1, 3"), ("pass", "0")):
        assert len(drifted({"a": one, "b": one.replace(old, new)})) in (1, 2)
    assert len(drifted({"a": one, "b": one.replace("A, B", "# Why.\nA, B")})) == 2


SHARED = """\
import os

# How many.
MANY, FEW = 3, 1
MODELS = {"a": 1}


@cache
def answer(x: int) -> int:
    return x + 1


def only_here() -> None: ...


class Thing:
    size = 1
"""


def test_make_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What is shared is copied, with decorators and comments; all else stays where it is."""
    first, second = tmp_path / "greenmim.py", tmp_path / "hpvit.py"
    first.write_text(SHARED)
    assert same.main(tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out

    there = SHARED.replace("MANY, FEW = 3, 1", "MANY, FEW = (\n    4,\n    1,\n)")
    there = there.replace('"a": 1', '"b": 2').replace("# How many.\n", "").replace("@cache\n", "")
    there = there.replace("def only_here() -> None: ...", "class Own:\n    pass")
    there = there.replace("x + 1", "x - 1") + "\n\n# The end.\nLAST = 1\n"
    second.write_text(there)
    assert len(drifted({path.name: path.read_text() for path in (first, second)})) == 3
    assert same.main(tmp_path) == 0
    assert capsys.readouterr().out == "hpvit.py: MANY, FEW, answer\n"
    assert first.read_text() == SHARED
    wanted = SHARED.replace('"a": 1', '"b": 2')
    wanted = wanted.replace("def only_here() -> None: ...", "class Own:\n    pass")
    assert second.read_text() == wanted + "\n\n# The end.\nLAST = 1\n"
    assert drifted({path.name: path.read_text() for path in (first, second)}) == []
    assert same.main(tmp_path) == 0
    assert capsys.readouterr().out == "hpvit.py: nothing to do\n"


# ── size ────────────────────────────────────────────────────────────────────────────────


@each_source
def test_line_length(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > LINE_LENGTH] == []


@each_script
def test_script_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= SCRIPT_LINES[path.name]


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
    titles = [re.fullmatch(r"# ── ([a-z0-9 -]+) ─+", line) for line in lines]
    assert all(titles), "a banner reads '# ── title ───'"
    assert {len(line) for line in lines} == {BANNER_WIDTH}
    known = [title[1] for title in titles if title[1] not in EXTRA_BANNERS]
    order = METHOD_FIRST if path.name == "fastmim.py" else BANNERS[: len(METHOD_FIRST)]
    assert known == [*order, *BANNERS[len(METHOD_FIRST) :]]


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
    flags = words[at + 1 :]
    if "--weights" in flags and "--model" not in flags:  # a file that is not there cannot tell
        flags += ["--model", next(iter(script.MODELS))]
    try:
        function, cfg = script.parse_config(flags)
    except SystemExit as stopped:  # --help
        assert stopped.code == 0
        return
    assert callable(function)
    if isinstance(cfg, script.RunConfig):
        script.choose_config(cfg, None)


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


def test_nothing_else_at_the_top_level() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("only git knows what belongs to the project")
    words = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others",
             "--exclude-standard"]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(name) for name in done.stdout.splitlines() if (ROOT / name).exists()]
    assert {path.parts[0] for path in files} <= TOP_LEVEL
    pictures = [path for path in files if path.suffix in (".png", ".jpg", ".svg", ".gif")]
    assert {path.parts[0] for path in pictures} <= {"docs", "tests"}
