"""`topoflow evaluate`: score a checkpoint with its own config and normalization, on data of the user's choice."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from topoflow.build import build_network, observed_cells, open_data, restore_normalization
from topoflow.checkpoint.directory import find_checkpoint
from topoflow.checkpoint.state import load_weights, read_everywhere
from topoflow.config import CHANNELS, NETWORK, Config
from topoflow.config_io import changed_keys, override_config, without_replaced
from topoflow.data.assembly import ForecastData
from topoflow.data.channels import hours_ahead
from topoflow.data.contents import Contents
from topoflow.data.forecast_error import ForecastSkill, WeatherErrors
from topoflow.data.grid import Grid
from topoflow.errors import ConfigError
from topoflow.evaluation import evaluate_model
from topoflow.files import require_writable
from topoflow.metrics import Record
from topoflow.physics.climatology import Climatology, covers_the_year, fit_climatologies
from topoflow.ranks import Context
from topoflow.reproducibility import set_deterministic, set_tf32

log = logging.getLogger(__name__)


def score_checkpoint(
    context: Context,
    source: Path,
    split: str,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    forecast_error: str | None = None,
) -> list[Record]:
    """Score a checkpoint, or the best (else the last) one of a run, on a split; call on all ranks.

    Scores and plots are written to `output`, by default to `evaluation` in the run directory or, without one, in the
    folder that holds the checkpoint. Splits other than test get a subfolder named after the split, and scores with
    `forecast_error` (see `ForecastSkill.parse`) one named forecast-error: the weather after the start has such errors.

    Raises:
        MissingPath, ResumeRefused: the checkpoint is missing or damaged.
        ConfigError, DataError: an override, the data or `output` cannot be used.
        StopRequested: a signal arrived on any rank.
    """
    context.watch.enter("evaluation")
    with context.together("options"):
        skill = None if forecast_error is None else ForecastSkill.parse(forecast_error)
    path, saved = read_everywhere(context, lambda: find_checkpoint(source), ("model", "data", "config"))
    if output is None:
        in_run = path.parent.name == "checkpoints"
        output = (path.parent.parent if in_run else path.parent) / "evaluation"
        output = output if split == "test" else output / split
        output = output if skill is None else output / "forecast-error"
    with context.together("output"):
        if context.is_main:
            require_writable(output)  # before the work
    with context.together("config"):
        config = override_config(without_replaced(saved["config"]), overrides, f"the checkpoint {path}")
        _require_same_network(saved["config"], config, path)
        if skill is not None and not hours_ahead(config.data):
            raise ConfigError(
                f"--forecast-error: {path} has no input after the start: expected hours > 0 in data.hours"
            )
        if skill is not None and config.data.forecast is not None:
            raise ConfigError(
                f"--forecast-error: {path} reads forecasts (data.forecast), which have errors of their own: expected a "
                "run without"
            )
        set_deterministic(config.run)
        set_tf32(config.train.tf32)
    data = open_data(config, context, only=(split,))
    with context.together("model"):
        if skill is not None and data.prepared_advected:
            raise ConfigError(
                f"--forecast-error: {config.data.path} holds {data.prepared_advected[0]}, made with wind that has no "
                "error: expected data prepared without advect"
            )
        if split not in data.splits:
            raise ConfigError(f"data.{split}: no range is configured: expected at least one to score")
        expected = tuple(config.model.img_size or ())
        if data.grid.shape != expected:
            raise ConfigError(f"data.path: grid {data.grid.shape}: expected {expected} as in {path}")
        trained_at = saved["data"].get("grid")
        if trained_at is not None and not Grid.from_dict(trained_at).is_at(data.grid):
            raise ConfigError(
                f"data.path: {config.data.path} is elsewhere: {data.grid.describe()}: expected the place of {path}, "
                f"whose weights know it: {Grid.from_dict(trained_at).describe()}"
            )
    contents = saved["data"].get("contents")
    difference = Contents.from_dict(contents).difference(data.contents, all_days=False) if contents else None
    if difference is not None:
        log.warning("data.path: %s differs from the data used in training: %s", config.data.path, difference)
    normalization = restore_normalization(saved["data"], context)
    with context.together("model"):
        model = build_network(config, data.grid, observed_cells(data, normalization.base)).to(context.device)
    load_weights(context, model, saved["model"])
    errors = None if skill is None else fit_weather_errors(context, data, skill, config.run.seed)
    log.info("scoring %s on the %s split", path, split)
    return evaluate_model(context, model, data, normalization, split, config.train, output, errors)


def fit_weather_errors(context: Context, data: ForecastData, skill: ForecastSkill, seed: int) -> WeatherErrors:
    """Fit the climatology of the weather after the start on the training split: the seasonal one if that covers a year.

    Every rank fits all of it. Cells outside the mask are inputs too.
    """
    source, times, ahead = data.source, data.times("train"), hours_ahead(data.config)
    everywhere, seasonal = np.ones(data.grid.shape, bool), covers_the_year(source.times[times])
    with context.together("climatology of the weather"):
        fitted = [
            fit_climatologies(source, name, times, everywhere, seasonal, context.watch.tick)[-1] for name in ahead
        ]
    parts = {part: [getattr(one, part) for one in fitted] for part in ("hourly", "annual", "filled")}
    climatology = Climatology(**{part: np.concatenate(arrays).astype(np.float32) for part, arrays in parts.items()})
    hours = sorted({hour for of_variable in ahead.values() for hour in of_variable})
    return WeatherErrors(source, tuple(ahead), climatology.at, hours, skill, seed)


def _require_same_network(saved: dict, config: Config, path: Path) -> None:
    refused = [change for change in changed_keys(saved, config) if change.alters & (NETWORK | CHANNELS)]
    if refused:
        raise ConfigError(f"{'; '.join(map(str, refused))}: expected as in {path}: its weights fit these channels only")
