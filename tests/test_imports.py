"""Who imports whom: no circles, and mlx and torch only where arrays are made."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "mlx_posttrain": "mlx_posttrain",
    "convert": "mlx_posttrain.convert",
    "recipes": "mlx_posttrain.recipes",
}
#: The one other place: a benchmark times the libraries themselves and other trainers.
MAY_IMPORT_ARRAYS = ("mlx_posttrain.engines.", "mlx_posttrain.convert.", "mlx_posttrain.bench.")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: Collection[str] = ()) -> set[str]:
    """What a module imports, at the top or in a function, but for what is there for type checkers only.

    ``from package import module`` is the module where it is ``known``, else the package.
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(whole & set(known))
            if whole - set(known):
                names.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def test_no_module_imports_itself_by_a_detour():
    known = modules()
    graph = {name: (imported(path, known) & set(known)) - {name} for name, path in known.items()}
    done: set[str] = set()

    def search(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name in done:
            return
        for other in sorted(graph[name]):
            search(other, (*way, name))
        done.add(name)

    for name in sorted(graph):
        search(name, ())


def test_the_search_finds_a_circle(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from mlx_posttrain import errors\n")
    assert imported(tmp_path / "a.py", ["mlx_posttrain.errors"]) == {"mlx_posttrain.errors"}
    (tmp_path / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlx\n")
    assert "mlx" not in imported(tmp_path / "b.py")


def test_mlx_and_torch_are_imported_by_engines_and_convert_only():
    for name, path in modules().items():
        libraries = {i.partition(".")[0] for i in imported(path)} & {"mlx", "mlx_lm", "torch", "peft"}
        assert not libraries or f"{name}.".startswith(MAY_IMPORT_ARRAYS), f"{name} imports {libraries}"


def test_methods_are_recognised_in_one_place():
    """Nothing outside methods/ asks which method a recipe has; the table says what there is to know."""
    for name, path in modules().items():
        if name.startswith("mlx_posttrain.methods"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                names = [side for side in sides if re.search(r"(\bmethod|'method'\]|get\('method'\))$", side)]
                literal = any(
                    isinstance(c, ast.Constant) and isinstance(c.value, str) for c in node.comparators
                )
                assert not (names and literal), f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_no_module_is_long_without_a_reason():
    """A module that cannot be read in one sitting says here why it is not two."""
    reasons = {
        "mlx_posttrain.cli": "one function for each command, and nothing else",
        "mlx_posttrain.config": "every section that methods share, and how recipes are read, in one place",
        "mlx_posttrain.memory.plan": "rows and rollouts share the peak's parts and the advice",
        "mlx_posttrain.engines.base": "the whole protocol, most of it docstrings",
        "mlx_posttrain.engines.mlx.model": "one class, the protocol's Model",
        "mlx_posttrain.engines.torch.model": "one class, the protocol's Model",
    }
    for name, path in modules().items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 420 or name in reasons, f"{name} has {lines} lines"


def test_docstrings_start_with_one_line():
    """A summary is one line, and what follows stands apart from it."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                lines = (ast.get_docstring(node) or "").split("\n")
                where = f"{name}.{getattr(node, 'name', '')}: {lines[0]}"
                assert len(lines) == 1 or not lines[1], where
