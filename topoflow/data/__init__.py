"""Gridded air quality data: reading, splitting, normalizing, sampling."""

from topoflow.data.assembly import (
    SPLITS,
    DataIndex,
    ForecastData,
    index_forecast_data,
    open_forecast_data,
    open_indexed_data,
)
from topoflow.data.batch_memory import Batch, make_batch
from topoflow.data.dataset import ForecastDataset
from topoflow.data.grid import Grid, load_mask
from topoflow.data.normalization import Normalization, compute_normalization
from topoflow.data.sampling import BatchPlan, build_eval_loader, build_train_loader
from topoflow.data.source import GriddedSource, open_source
from topoflow.data.splits import StartIndex, check_disjoint, split_starts, split_times
from topoflow.data.variables import POLLUTANTS, VARIABLES, Variable

__all__ = [
    "POLLUTANTS",
    "SPLITS",
    "VARIABLES",
    "Batch",
    "BatchPlan",
    "DataIndex",
    "ForecastData",
    "ForecastDataset",
    "Grid",
    "GriddedSource",
    "Normalization",
    "StartIndex",
    "Variable",
    "build_eval_loader",
    "build_train_loader",
    "check_disjoint",
    "compute_normalization",
    "index_forecast_data",
    "load_mask",
    "make_batch",
    "open_forecast_data",
    "open_indexed_data",
    "open_source",
    "split_starts",
    "split_times",
]
