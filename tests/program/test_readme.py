"""The README's commands work: each block is run as it stands, or NOT_RUN has the reason why it is not.

Blocks marked `bash run` are run from top to bottom in one shell, in a copy of the project with shortened configs.
`bash run measurements` marks the block that needs the real measurements.
"""

import datetime
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from tests.lightning.lightning_runs import LightningRun
from tests.lightning.restated import VARIABLES, Network

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(.*)\n((?s:.*?))^```$", README, re.MULTILINE)
RUN = ("bash run", "bash run measurements")
NOT_RUN = {
    "bash launch/test.sh": "runs this test; CI starts with this command",
    "bash -c '. launch/env.sh; make_venv'": "downloads packages, needs a cluster; tests/launch has make_venv",
    "SIF=/path/to/pytorch-rocm.sif": "needs LUMI's container; tests/slurm has launch/lumi.sbatch",
    "python3 -m pip download": "downloads packages",
    "srun --ntasks=2 --kill-on-bad-exit=1 launch/srun.sh": "needs a cluster; tests/slurm has both commands",
    "srun --ntasks=2 python -m topoflow doctor": "needs a cluster; tests/slurm has the command",
    "resume from runs/demo": "output, no command",
}


def test_every_block_is_run_or_listed():
    others = [text for kind, text in BLOCKS if kind not in RUN]
    assert [text for text in others if not text.startswith(tuple(NOT_RUN))] == []
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in others)] == []


@pytest.mark.slow
def test_the_commands_work_from_top_to_bottom(tmp_path):
    project = copy_project(tmp_path / "topoflow")
    write_installed_venv(project)
    write_own_files(project)
    run_blocks("bash run", project)


@pytest.mark.slow
def test_the_commands_on_real_measurements_work(tmp_path, shared_dir):
    project = copy_project(tmp_path / "topoflow")
    for file in (shared_dir / "data").glob("*.nc"):
        (project / file.name).symlink_to(file)
    run_blocks("bash run measurements", project)


def run_blocks(kind, project):
    commands = "".join(text for its_kind, text in BLOCKS if its_kind == kind)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euxc", commands], cwd=project, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_project(folder):
    """Copy the project without what its users made, and shorten each config's splits and training."""
    made = {ROOT / "data", ROOT / "runs"}
    shutil.copytree(
        ROOT,
        folder,
        ignore=lambda parent, names: {name for name in names if name.startswith(".") or Path(parent, name) in made},
    )
    for name in ("demo", "china2019", "beijing"):
        path = folder / f"configs/{name}.yaml"
        config = yaml.safe_load(path.read_text())
        config["model"].update(embed_dim=16, depth=1, num_heads=2)
        config["train"].update(max_steps=4, validate_every_steps=2)
        config["checkpoint"].update(every_steps=2)
        for split in ("train", "validation", "test"):
            first = config["data"][split][0][0]
            if (name, split) == ("beijing", "train"):
                first += datetime.timedelta(days=120)  # it did not rain in March
            config["data"][split] = [[first, first + datetime.timedelta(days=4 if name == "demo" else 5)]]
        path.write_text(yaml.safe_dump(config))
    return folder


def write_installed_venv(project):
    """Make the project's .venv as make_venv leaves it, with the packages of this Python: nothing is downloaded."""
    venv.create(project / ".venv", symlinks=True)
    python = project / ".venv/bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    (packages / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    recipe = [(project / name).read_text() for name in ("setup.cfg", "pyproject.toml", "launch/constraints.txt")]
    (project / ".venv/installed-").write_text("".join([f"{project}\n", *recipe]))


def write_own_files(project):
    """Write the files that the reader brings: station measurements, terrain, a Lightning checkpoint and its config."""
    generator = np.random.default_rng(0)
    time = np.datetime64("2019-12-31T00", "ns") + np.arange(48) * np.timedelta64(1, "h")
    lat, lon = np.linspace(20, 53, 9), np.linspace(73, 138, 9)  # more than 64 x 128 cells of half a degree
    values = generator.uniform(1, 90, (len(time), len(lat)))
    measured = {name: (("time", "station"), values, {"units": "ug m-3"}) for name in ("pm25", "o3")}
    coordinates = {"time": time, "lat": ("station", lat), "lon": ("station", lon)}
    xr.Dataset(measured, coordinates, {"time_zone": "UTC"}).to_netcdf(project / "stations.nc")

    lat, lon = np.arange(18.25, 56, 0.5), np.arange(71.25, 141, 0.5)
    heights = generator.uniform(0, 3000, (len(lat), len(lon)))
    terrain = {"elevation": (("lat", "lon"), heights, {"units": "m"})}
    xr.Dataset(terrain, {"lat": lat, "lon": lon}).to_netcdf(project / "terrain.nc")

    run = LightningRun(Network(True, (24, 32)), img_size=(24, 32))
    run.train(4)
    torch.save(run.checkpoint(), project / "old.ckpt")
    config = yaml.safe_load((project / "configs/demo.yaml").read_text())
    config["data"].update(variables=list(VARIABLES), hours={}, forecast=None, anomalies=False, availability=False)
    config["model"].update(patch_size=2, depth=2, mlp_ratio=4.0, wind="none", relative_position=True, patch_norm=True)
    config["model"].update(base="none", leads="conditioned")
    config["optim"] = {"learning_rate": 1e-3}
    config["train"].update(global_batch_size=4, micro_batch_size=2)
    (project / "configs/mine.yaml").write_text(yaml.safe_dump(config))


def test_the_reading_path_exists_and_is_as_long_as_stated():
    section = README.partition("## Read the code")[2]
    stated = int(re.search(r"about ([\d,]+) lines in all", section)[1].replace(",", ""))
    files = re.findall(r"^\| \[(.+?)\]\(\1\) \|", section, re.MULTILINE)
    assert files[0] == "train.py"
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in files)
    assert abs(lines - stated) < 0.05 * stated, lines
