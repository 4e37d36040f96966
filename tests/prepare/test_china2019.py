"""The README's real run: the recipe prepares the data on which the README's baselines were computed."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from topoflow.config_io import load_config
from topoflow.data.assembly import ForecastData, open_forecast_data
from topoflow.evaluation import Evaluator
from topoflow.launch import Launch
from topoflow.ranks import Context
from topoflow.tools.prepare.command import load_recipe, prepare

ROOT = Path(__file__).parents[2]
ROWS = {
    "persistence": "persistence_rmse",
    "climatology": "climatology_rmse",
    "damped persistence": "damped_persistence_rmse",
    "seasonal damped persistence": "seasonal_damped_persistence_rmse",
    "ridge regression": "ridge_rmse",
}


class Mean(nn.Module):
    """Forecasts the mean of each target, so that scoring takes no time."""

    def forward(self, x, lead_time_hours, elevation_m, wind_ms):
        return torch.zeros(len(x), 6, *x.shape[2:])


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared_dir) -> ForecastData:
    """The config's data, prepared as the README says, in a copy of the project that has the files."""
    project = tmp_path_factory.mktemp("project")
    recipe = project / "configs/recipes/china2019.yaml"
    recipe.parent.mkdir(parents=True)
    shutil.copy(ROOT / "configs/recipes/china2019.yaml", recipe)
    for name in ("china_cnemc_2019_hourly.nc", "terrain_asia_20min.nc"):
        (project / name).symlink_to(shared_dir / "data" / name)
    done = prepare(load_recipe([str(recipe)]), project / "data/china2019", progress=False)
    assert done.is_decided, done.lines
    config = load_config(ROOT / "configs/china2019.yaml").data
    config = dataclasses.replace(config, path=str(project / config.path), anomalies=False)  # the mean has no base
    return open_forecast_data(config, False, with_terrain=True)


def test_the_grid_and_the_starts_are_those_of_the_readme(data):
    rows, columns = data.grid.shape
    fields = (data.source.read(name, np.arange(8760)) for name in data.target_names)
    observed = np.any([np.isfinite(field).any(axis=0) for field in fields], axis=0)
    text = (ROOT / "README.md").read_text()
    assert f"{rows} x {columns} cells, {observed.sum()} of them with stations" in text
    assert f"({len(data.splits['test'].starts)} start times)" in text


def test_the_baselines_are_those_of_the_readme_to_the_printed_digit(data):
    dataset = data.dataset("test", data.build_normalization())
    context = Context(Launch("none", "a test"), torch.device("cpu"))
    heights_m = torch.from_numpy(data.source.heights_m())
    evaluator = Evaluator(context, Mean(), dataset, heights_m, "fp32", batch_size=64, threads=0)
    starts = (data.starts(split).starts for split in ("train", "validation"))
    baselines = evaluator.fit_baselines(data.times("train"), *starts)
    records = evaluator.score(baselines, evaluator.sum_observations())
    text = (ROOT / "README.md").read_text()
    for row, score in ROWS.items():
        printed = re.search(rf"^\| {row} \|(.*)\|$", text, re.MULTILINE)
        assert printed is not None
        expected = printed[1].replace("|", " ").split()
        decimals = [len(number.partition(".")[2]) for number in expected]
        found = [f"{record[score]:.{digits}f}" for record, digits in zip(records, decimals, strict=True)]
        assert found == expected, row
