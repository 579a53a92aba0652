"""What README promises: its guarantees name tests that exist, and its links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from mlx_posttrain import engines
from tests.helpers import cli

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


@pytest.mark.exhaustive
@pytest.mark.skipif(
    "mlx" not in engines.available() or sys.platform == "darwin", reason="the transcript is of MLX on a CPU"
)
def test_the_run_in_the_readme_prints_what_stands_there(tmp_path, monkeypatch, capfd):
    """Counts and answers exactly; losses and memory within what other rounding makes of 60 steps."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text[text.index("    $ mlx-posttrain run demo_sft ") :].partition("\n\n")[0]
    shown, _, samples = re.sub("^    ", "", shown, flags=re.M).partition("\n$ grep yesterday ")
    command, *lines = shown.splitlines()
    monkeypatch.chdir(tmp_path)
    assert cli(*shlex.split(command)[2:]) == 0
    number = r"(\d+(?:[.,]\d+)*)"
    printed = capfd.readouterr().err.splitlines()
    for line in lines:
        line = line.partition(" (1% of")[0]
        parts = re.sub(number, "0", line).split("[...]")
        pattern = ".*".join(re.escape(part).replace("0", number) for part in parts)
        counts = re.findall(number, line)
        found = [match for one in printed if (match := re.match(pattern, one))]
        close = [
            all(
                float(theirs) == pytest.approx(float(ours), rel=0.05) if "." in ours else theirs == ours
                for ours, theirs in zip(counts, match.groups(), strict=True)
            )
            for match in found
        ]
        assert any(close), (line, printed)
    rows = [json.loads(line) for line in Path("runs/first/samples.jsonl").read_text().splitlines()]
    answers = {row["step"]: row for row in rows if "yesterday" in row["prompt"]}
    told = re.findall(r'\{"step": (\d+), "prompt": (".*?"),\s+"answer": "(.*?)"\}', samples)
    assert len(told) == 2
    for step, prompt, answer in told:
        row = answers[int(step)]
        assert row["prompt"] == json.loads(prompt)
        assert row["answer"].startswith(answer.removesuffix(" [...]"))
        assert answer.endswith(" [...]") or row["answer"] == answer
