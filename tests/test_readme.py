"""What README promises: its guarantees name tests that exist, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


def test_every_guarantee_names_tests_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    guarantees = text.partition("## Guarantees")[2].partition("\n## ")[0]
    items = re.split(r"\n- ", guarantees)[1:]
    assert len(items) >= 10
    for item in items:
        named = re.findall(r"`(tests/[\w/]+\.py)`:((?:[\s,]*`\w+`)+)", item)
        assert named, item
        for file, functions in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            known = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            for function in re.findall(r"`(\w+)`", functions):
                assert function in known, f"{file} has no {function}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_named_in_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for file in re.findall(r"`((?:tests|docs|recipes|convert|mlx_posttrain)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_wrapped(page):
    """At 100 columns, but for tables, addresses and code."""
    code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.startswith("```")
        free = code or line.startswith(("|", "    ", "![")) or "http" in line
        assert free or len(line) <= 100, f"{page.name}:{number} has {len(line)} columns"
