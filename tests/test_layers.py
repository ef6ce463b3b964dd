"""The layers of the code: a module imports from its own layer and from those below, never up."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
FOLDERS = {
    "dash_onnx.exporters": ROOT / "exporters",
    "dash_onnx.runtime": ROOT / "runtime",
    "dash_onnx": ROOT / "dash_onnx",
}

PACKAGE = ("core", "runtime", "exporters", "report bench eval serve", "cli")
"""From the bottom up; those in one string do not know each other."""

EXPORTERS = ("quantize", "sources", "architectures", "graphs", "calibration", "export train fused")
"""Likewise, inside `dash_onnx.exporters`."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its installed name."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return {name for name in found if name.startswith("dash_onnx.")}


def violations(parent: str, layers: tuple[str, ...]) -> list[str]:
    """Imports from one part of a package to another that is not below it."""
    height = {name: at for at, names in enumerate(layers) for name in names.split()}

    def part(module: str) -> str | None:
        name = module.removeprefix(f"{parent}.").partition(".")[0]
        return name if module.startswith(f"{parent}.") and name in height else None

    return [
        f"{module} imports {target}"
        for module, path in modules()
        if (here := part(module))
        for target in sorted(imported(path))
        if (there := part(target)) and there != here and height[there] >= height[here]
    ]


@pytest.mark.parametrize(
    ("parent", "layers"), [("dash_onnx", PACKAGE), ("dash_onnx.exporters", EXPORTERS)]
)
def test_imports_point_down(parent: str, layers: tuple[str, ...]) -> None:
    assert violations(parent, layers) == []


def test_an_import_that_points_up_is_found() -> None:
    assert violations("dash_onnx", tuple(reversed(PACKAGE)))


def told() -> dict[str, set[str]]:
    """What each part of the package may import, by the table of CONTRIBUTING.md."""
    rows = re.findall(r"^\| (`[^|]+/`) \|.*\| ([^|]+) \|$", CONTRIBUTING.read_text("utf-8"), re.M)
    direct = {
        name: set(re.split("[,;] ", allowed))
        for folders, allowed in rows
        for name in re.findall(r"(\w+)/`", folders)
    }
    parts = {name for names in PACKAGE for name in names.split()}
    found: dict[str, set[str]] = {}
    for name in (name for names in PACKAGE for name in names.split()):  # from the bottom up
        below = parts if "everything" in direct[name] else direct[name] & parts
        found[name] = {name, *below, *(more for one in below - {name} for more in found[one])}
    return found


def test_each_import_is_one_that_the_table_allows() -> None:
    allowed, found = told(), set()
    for module, path in modules():
        here = module.split(".")[1] if "." in module else ""
        for target in imported(path) if here in allowed else ():
            there = target.split(".")[1]
            if there in allowed and there not in allowed[here]:
                found.add(f"{module} imports {target}")
    assert found == set()
    assert "exporters" not in allowed["serve"] and "eval" not in allowed["bench"]


def test_no_file_is_longer_than_400_lines() -> None:
    benchmarks = (ROOT / "benchmarks").rglob("*.py")
    for path in (*(path for _, path in modules()), *benchmarks):
        assert len(path.read_text("utf-8").splitlines()) <= 400, path


def test_every_package_has_a_layer_and_says_what_it_holds() -> None:
    folders = {path.parent for _, path in modules()}
    for layers, parents in (
        (PACKAGE, (ROOT, ROOT / "dash_onnx")),
        (EXPORTERS, (ROOT / "exporters",)),
    ):
        found = {folder.name for folder in folders if folder.parent in parents} - {"dash_onnx"}
        assert found == {name for names in layers for name in names.split()}
    for folder in folders:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))), folder


def edges() -> dict[str, set[str]]:
    """What each module imports when it or a function of it runs; not for types alone."""
    found, known = {}, {name for name, _ in modules()}
    for module, path in modules():
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        names = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        }
        names &= known  # and of a package only what is taken from it
        found[module] = {
            name for name in names if not any(other.startswith(f"{name}.") for other in names)
        }
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = graphlib.TopologicalSorter(edges())
    graph.prepare()  # raises CycleError, which names them


def test_a_cycle_is_found() -> None:
    cycle = {**edges(), "dash_onnx.core.errors": {"dash_onnx.runtime.model"}}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(cycle).prepare()
