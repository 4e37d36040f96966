"""`topoflow evaluate`: score a checkpoint with its own config and normalization, on data of the user's choice."""

import logging
from collections.abc import Sequence
from pathlib import Path

from topoflow.build import build_network, observed_cells, open_data, restore_normalization
from topoflow.checkpoint.directory import find_checkpoint
from topoflow.checkpoint.state import load_weights, read_everywhere
from topoflow.config import CHANNELS, NETWORK, Config
from topoflow.config_io import changed_keys, override_config, without_replaced
from topoflow.data.contents import Contents
from topoflow.data.grid import Grid
from topoflow.errors import ConfigError
from topoflow.evaluation import evaluate_model
from topoflow.files import require_writable
from topoflow.metrics import Record
from topoflow.ranks import Context
from topoflow.reproducibility import set_deterministic, set_tf32

log = logging.getLogger(__name__)


def score_checkpoint(
    context: Context,
    source: Path,
    split: str,
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> list[Record]:
    """Score a checkpoint, or the best (else the last) one of a run, on a split; call on all ranks.

    Scores and plots are written to `output`, by default to `evaluation` in the run directory or, without one, in the
    folder that holds the checkpoint. Splits other than test get a subfolder named after the split.

    Raises:
        MissingPath, ResumeRefused: the checkpoint is missing or damaged.
        ConfigError, DataError: an override, the data or `output` cannot be used.
        StopRequested: a signal arrived on any rank.
    """
    context.watch.enter("evaluation")
    path, saved = read_everywhere(context, lambda: find_checkpoint(source), ("model", "data", "config"))
    if output is None:
        in_run = path.parent.name == "checkpoints"
        output = (path.parent.parent if in_run else path.parent) / "evaluation"
        output = output if split == "test" else output / split
    with context.together("output"):
        if context.is_main:
            require_writable(output)  # before the work
    with context.together("config"):
        config = override_config(without_replaced(saved["config"]), overrides, f"the checkpoint {path}")
        _require_same_network(saved["config"], config, path)
        set_deterministic(config.run)
        set_tf32(config.train.tf32)
    data = open_data(config, context, only=(split,))
    with context.together("model"):
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
    log.info("scoring %s on the %s split", path, split)
    return evaluate_model(context, model, data, normalization, split, config.train, output)


def _require_same_network(saved: dict, config: Config, path: Path) -> None:
    refused = [change for change in changed_keys(saved, config) if change.alters & (NETWORK | CHANNELS)]
    if refused:
        raise ConfigError(f"{'; '.join(map(str, refused))}: expected as in {path}: its weights fit these channels only")
