"""The README's commands work: every fenced block marked `bash run` is run, in order, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```bash run\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_marked_commands_of_the_readme_work(tmp_path):
    assert BLOCKS
    project = tmp_path / "topoflow"
    shutil.copytree(
        ROOT, project, ignore=lambda folder, names: {name for name in names if name.startswith(".") or name == "runs"}
    )
    shutil.rmtree(project / "data", ignore_errors=True)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in BLOCKS:
        done = subprocess.run(["bash", "-euxc", block], cwd=project, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_reading_path_exists_and_is_as_long_as_stated():
    section = (ROOT / "README.md").read_text().partition("## Read the code")[2]
    stated = int(re.search(r"about ([\d,]+) lines in all", section)[1].replace(",", ""))
    files = re.findall(r"^\| \[(.+?)\]\(\1\) \|", section, re.MULTILINE)
    assert files[0] == "train.py"
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in files)
    assert abs(lines - stated) < 0.05 * stated, lines
