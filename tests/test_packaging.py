"""What is installed, on which machines, and what must never be committed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def sources(root: Path) -> list[Path]:
    """The project's own files: what git tracks, or without git everything but what .gitignore names."""
    done = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    if done.returncode == 0 and done.stdout:
        return [root / line for line in done.stdout.splitlines() if (root / line).is_file()]
    ignored = {".venv", ".git", "runs", "build", "dist"}
    return [
        p
        for p in root.rglob("*")
        if p.is_file() and p.relative_to(root).parts[0] not in ignored and "__pycache__" not in p.parts
    ]


def test_every_package_is_listed(root, project):
    """The list in pyproject.toml is written by hand, because folders outside mlx_posttrain/ are part of the
    package.
    """
    listed = set(project["tool"]["setuptools"]["packages"])
    found = set()
    for top, name in (
        ("mlx_posttrain", "mlx_posttrain"),
        ("convert", "mlx_posttrain.convert"),
        ("recipes", "mlx_posttrain.recipes"),
    ):
        for file in (root / top).rglob("__init__.py"):
            found.add(".".join([name, *file.parent.relative_to(root / top).parts]))
    assert listed == found


def test_no_file_of_the_package_is_ignored(root):
    """A pattern that is meant for what runs leave must not match a folder of the package."""
    folders = ["mlx_posttrain", "convert", "recipes", "tests"]
    listed = ["git", "-C", str(root), "ls-files", "-oi", "--exclude-per-directory=.gitignore", "--", *folders]
    done = subprocess.run(listed, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout")
    assert [line for line in done.stdout.splitlines() if not line.endswith(".pyc")] == []


@pytest.mark.slow
def test_the_wheel_contains_everything(root, tmp_path):
    """Build from a copy: setuptools leaves its build folder behind."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for file in sources(root):
        target = source / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            str(tmp_path),
            str(source),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {"mlx_posttrain/py.typed"}
    for top, inside in (
        ("mlx_posttrain", "mlx_posttrain"),
        ("convert", "mlx_posttrain/convert"),
        ("recipes", "mlx_posttrain/recipes"),
    ):
        for file in (f for f in (source / top).rglob("*") if f.is_file()):
            relative = file.relative_to(source / top)
            if file.suffix in (".py", ".yaml") or "assets" in relative.parts:
                expected.add(f"{inside}/{relative.as_posix()}")
    assert expected <= names, sorted(expected - names)
    assert any(re.search(r"dist-info/.*LICENSE", name) for name in names)
    outside = {name.split("/")[0] for name in names}
    assert {name for name in outside if not name.endswith(".dist-info")} == {"mlx_posttrain"}


def test_the_installed_package_finds_its_folders():
    import mlx_posttrain
    import mlx_posttrain.convert
    import mlx_posttrain.recipes

    assert re.match(r"\d+\.\d+", mlx_posttrain.__version__)
    assert mlx_posttrain.convert.__file__
    assert mlx_posttrain.recipes.__file__


MACHINES = {
    "apple": {"sys_platform": "darwin", "platform_machine": "arm64"},
    "intel mac": {"sys_platform": "darwin", "platform_machine": "x86_64"},
    "linux": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "linux arm": {"sys_platform": "linux", "platform_machine": "aarch64"},
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_markers_give_each_machine_its_engine(project, root, machine, python):
    requirements = pytest.importorskip("packaging.requirements")
    if machine == "intel mac" and python == "3.13":
        pytest.skip("no PyTorch for it; the Makefile refuses")
    environment = {
        **MACHINES[machine],
        "python_version": python,
        "python_full_version": python + ".0",
        "extra": "",
    }
    wanted: dict[str, list] = {}
    for line in [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["torch"]]:
        requirement = requirements.Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            wanted.setdefault(requirement.name, []).append(requirement)
    assert all(len(lines) == 1 for lines in wanted.values())
    assert ("mlx" in wanted) == ("mlx-lm" in wanted) == (machine != "intel mac")
    assert "torch" in wanted
    assert ("scipy" in wanted) == machine.startswith("linux")
    if "mlx" in wanted:
        assert wanted["mlx"][0].extras == ({"cpu"} if machine.startswith("linux") else set())
    assert wanted["torch"][0].specifier.contains("2.13.0") == (machine != "intel mac")
    assert wanted["numpy"][0].specifier.contains("2.2.6") == (machine != "intel mac")
    assert wanted["transformers"][0].specifier.contains("5.20.2") == (machine != "intel mac")

    pins: dict[str, list] = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = requirements.Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                pins.setdefault(pin.name, []).append(pin)
    assert all(len(lines) == 1 for lines in pins.values())
    for name, (pin,) in pins.items():
        (version,) = [specifier.version for specifier in pin.specifier]
        assert name not in wanted or wanted[name][0].specifier.contains(version), (
            f"{name}: the pin contradicts pyproject.toml"
        )
    assert pins["torch"][0].specifier.contains("2.2.2" if machine == "intel mac" else "2.13.0")


FORBIDDEN = {
    # split, so that this file does not contain what it looks for
    "a machine's path": re.compile(
        "/(?:"
        + "|".join(["root/", "work/", "home/(?!some)[a-z]", "Users/(?!some)[a-z]", "opt/(?:wheels|pypi)"])
        + ")"
    ),
    "a package index": re.compile("(?:index-url|find-links|trusted-host)" + r"[ =:]+[\"']?(?:https?|file|/)"),
    "a token": re.compile("hf_" + "[A-Za-z]{30,}|gh[pousr]_" + "[A-Za-z0-9]{30,}"),
    "a private key": re.compile("-----BEGIN [A-Z ]*PRIVATE" + " KEY"),
}


def test_nothing_of_one_machine_is_committed(root):
    found = []
    for file in sources(root):
        if file.stat().st_size > 2_000_000 or file.suffix in (".safetensors", ".png", ".jsonl"):
            continue
        text = file.read_text(encoding="utf-8", errors="ignore")
        for what, pattern in FORBIDDEN.items():
            for match in pattern.finditer(text):
                found.append(f"{file.relative_to(root)}: {what}: {match.group()}")
    assert not found, "\n".join(found)


def test_version_needs_no_git(project):
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|a\d+|b\d+|rc\d+)?", project["project"]["version"])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("machine", "arguments", "said"),
    [("Linux x86_64", "", True), ("Linux x86_64", "--no-index", False), ("Darwin arm64", "", False)],
)
def test_make_says_before_a_large_download_how_to_avoid_it(machine, arguments, said, root, tmp_path):
    programs = {"uname": f"echo {machine}", "venv/bin/pip": "", "venv/bin/python": 'echo "installing $*"'}
    for name, script in programs.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path / name)
    done = subprocess.run(
        ["make", "venv/.installed-dev", "VENV=venv", f"PIP_ARGS={arguments}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    *before, install = [
        line for line in done.stdout.splitlines() if line.startswith(("make: on Linux", "installing"))
    ]
    assert install.startswith("installing -m pip install") and bool(before) is said
    assert all("PIP_ARGS" in line and "CONTRIBUTING.md" in line for line in before)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_refuses_an_unsuitable_python(root, tmp_path):
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    shutil.copy(root / "Makefile", tmp_path / "Makefile")
    shutil.copy(root / "pyproject.toml", tmp_path / "pyproject.toml")
    shutil.copy(root / "constraints.txt", tmp_path / "constraints.txt")
    done = subprocess.run(["make", "demo", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no suitable Python: install Python 3.10 to 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and timeout"
)
def test_ci_fetches_a_browser_as_root_and_goes_on_without_one(root, tmp_path):
    """apt-get is asked once where there is no browser, says nothing, and its failure is one line and no
    end.
    """
    tools, asked = tmp_path / "bin", tmp_path / "asked"
    tools.mkdir()
    for name in ("bash", "dirname", "timeout"):
        (tools / name).symlink_to(str(shutil.which(name)))

    def stub(name: str, does: str) -> None:
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{does}\n")
        (tools / name).chmod(0o755)

    stub("id", "echo 0")
    stub("apt-get", f'echo "$@" >> {asked}; echo noise; exit 100')
    stub("make", 'echo "make $@"')
    (tmp_path / ".ci").mkdir()
    shutil.copy(root / ".ci" / "run", tmp_path / ".ci" / "run")

    def said() -> list[str]:
        done = subprocess.run(
            [tools / "bash", tmp_path / ".ci" / "run"],
            capture_output=True,
            text=True,
            env={"PATH": str(tools)},
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.splitlines()

    alone = said()
    assert (
        len(alone) == 3
        and "no Chromium could be installed" in alone[0]
        and alone[1:] == ["make test-gpu-paths", "make test"]
        and asked.read_text().count("\n") == 1
    )
    asked.unlink()
    stub("chromium", "exit 0")
    assert said() == alone[1:] and not asked.exists()
    (tools / "chromium").unlink()
    stub("id", "echo 1000")  # nobody is asked for a password
    assert said() == alone[1:] and not asked.exists()
