"""Every launch script prints --help before it does anything, and none removes what it did not create."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch") and path.name != "env.sh")


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts in a folder of its own, without a .venv."""
    shutil.copytree(LAUNCH, tmp_path / "a project" / "launch")
    return tmp_path / "a project"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["configs/demo.yaml", "run.seed=1", "--help"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed_and_nothing_is_done(project, script, arguments):
    tools = project.parent / "bin"  # no Python, no rm: only what is needed to print the text
    tools.mkdir()
    (tools / "sed").symlink_to(shutil.which("sed"))
    command = [shutil.which("bash"), f"launch/{script}", *arguments]
    before = sorted(project.rglob("*"))
    done = subprocess.run(command, cwd=project, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    assert f"launch/{script}" in done.stdout.splitlines()[0]
    assert "#" not in done.stdout.replace("#SBATCH lines", "")
    assert sorted(project.rglob("*")) == before


PYTHON = """#!/bin/sh
case "$*" in
  *data.forecast*) echo "$DATA_PATH-forecasts" ;;
  *config_io*) echo "$DATA_PATH" ;;
  *" prepare "*)
    echo "${4#--output=}" >> "$NOTES"; for raw; do :; done
    case $raw in "$DATA_PATH-raw" | "$DATA_PATH-forecasts-raw/recipe.yaml") ;; *) exit 1 ;; esac ;;
esac
"""


@pytest.mark.parametrize("path", ["", "-rf", "a folder", "kept/", ".", "*"])
def test_the_demo_removes_nothing_whatever_the_data_path_is(project, path):
    tools = project / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(PYTHON)
    (tools / "python").chmod(0o755)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(LAUNCH.parent / name, project)
    recipe = [f"{project}\n", *((project / name).read_text() for name in ("setup.cfg", "pyproject.toml"))]
    (project / ".venv/installed-").write_text("".join(recipe) + (project / "launch/constraints.txt").read_text())
    kept = [project / name for name in (f"{path.rstrip('/')}.partial/field", "kept/field", "another/field")]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    notes = project.parent / "made"
    environ = {**os.environ, "DATA_PATH": path, "NOTES": str(notes)}
    done = subprocess.run(["bash", "launch/demo.sh"], cwd=project, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(file.read_text() == "mine" for file in kept)
    is_there = path != "" and (project / path).exists()
    assert notes.read_text().splitlines() == [*([] if is_there else [path]), f"{path}-forecasts"]
