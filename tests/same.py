"""`make same`: copy what several scripts share from `greenmim.py` to the others, in place.

    python -m tests.same

A class, function or constant at the top level of two scripts is one source, unless it is listed in
`DIFFERENT` of tests/test_style.py, which checks it. So a change is made in `greenmim.py`, and here
carried to the other scripts that define the name; nothing is added to or removed from them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT

METHODS = ("greenmim", "mixmae", "fastmim", "hpvit", "distill_lite")


def spans(text: str) -> dict[str, tuple[int, int]]:
    """First and last line, from 1, of each top-level class, function and assignment by its names,
    with decorators and the comment right above it."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while first > 1 and lines[first - 2].startswith("#") and "──" not in lines[first - 2]:
            first -= 1
        found |= dict.fromkeys(names, (first, node.end_lineno))
    return found


def definitions(text: str) -> dict[str, str]:
    """Source of each top-level name."""
    lines = text.splitlines()
    return {k: "\n".join(lines[first - 1 : end]) for k, (first, end) in spans(text).items()}


def copied(source: str, target: str, different: Sequence[str]) -> tuple[str, list[str]]:
    """`target` with each shared name as in `source`, and the names that were not so."""
    wanted, lines, changed, by_place = definitions(source), target.splitlines(), [], {}
    for name, place in spans(target).items():
        by_place.setdefault(place, []).append(name)  # `A, B = 1, 2` is one statement
    # From the end, so that lines before a change keep their numbers.
    for (first, end), names in sorted(by_place.items(), reverse=True):
        if any(name not in wanted or name in different for name in names):
            continue
        if (new := wanted[names[0]].splitlines()) != lines[first - 1 : end]:
            lines[first - 1 : end] = new
            changed = [*names, *changed]
    return "\n".join(lines) + "\n", changed


def main(folder: Path = ROOT) -> int:
    """Change the scripts of a folder; says what it did."""
    from tests.test_style import DIFFERENT

    first, *others = [folder / f"{name}.py" for name in METHODS]
    others = [path for path in others if path.exists()]
    if not others:
        print(f"{first.name} is the only script: nothing to do")
    for path in others:
        text, changed = copied(first.read_text(), path.read_text(), DIFFERENT)
        if changed:
            path.write_text(text)
        print(f"{path.name}: {', '.join(changed) or 'nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
