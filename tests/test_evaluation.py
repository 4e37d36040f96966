"""Evaluation records equal numpy's on the same fields, for any batch size and number of ranks."""

import csv
import dataclasses
import json
import logging
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from tests.support.prepared import write_prepared
from topoflow import evaluation, plots
from topoflow.config import DataConfig, TrainConfig
from topoflow.data.assembly import open_forecast_data
from topoflow.data.forecast_error import ForecastSkill
from topoflow.data.normalization import Normalization
from topoflow.errors import ConfigError, StopRequested, TrainingDiverged
from topoflow.evaluation import Evaluator, evaluate_model
from topoflow.launch import Launch
from topoflow.ranks import Context
from topoflow.run_dir import StopFlag
from topoflow.tools.evaluate import fit_weather_errors

HOURS, SHAPE, LEADS = 24 * 10, (4, 6), (12, 24)
TEST_DAYS = ("2019-01-07", "2019-01-10")
NORMALIZATION = Normalization(
    {"pm25": 40.0, "co": 900.0, "elevation": 1000.0, "u": 0.0, "v": 0.0},
    {"pm25": 20.0, "co": 300.0, "elevation": 500.0, "u": 5.0, "v": 5.0},
)


@pytest.fixture
def real_plots():
    """Request this fixture in tests that need the plots themselves."""


@pytest.fixture(autouse=True)
def plots_are_empty_files(request, monkeypatch):
    """Skip drawing, which takes a second; tests/test_plots.py tests the plots."""
    if "real_plots" not in request.fixturenames:
        for name in ("plot_skill", "plot_case"):
            monkeypatch.setattr(plots, name, lambda _, path: path.touch())


class Damped(nn.Module):
    """Returns two thirds of the present (normalized) values, plus a little for the lead, element by element."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2 / 3))
        self.seen = []

    def forward(self, x, lead_time_hours, elevation_m, wind_ms):
        self.seen.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), wind_ms))
        assert elevation_m.shape == x.shape[2:]
        return self.slope * x[:, :2] + 0.01 * lead_time_hours[:, None, None, None]


def make_fields(wind=False):
    """Return random walks of pm25 and co with missing values."""
    rng = np.random.default_rng(8)
    fields = xr.Dataset(
        coords={
            "time": np.datetime64("2019-01-01", "ns") + np.arange(HOURS) * np.timedelta64(1, "h"),
            "lat": np.linspace(40, 30, SHAPE[0]),
            "lon": np.linspace(100, 115, SHAPE[1]),
        }
    )
    for name, mean, step in (("pm25", 40, 3), ("co", 900, 40), *((("u", 2, 0.1), ("v", -1, 0.1)) if wind else ())):
        values = mean + step * np.cumsum(rng.standard_normal((HOURS, *SHAPE)), axis=0)
        values[rng.random(values.shape) < 0.1] = np.nan
        unit = "m s-1" if name in ("u", "v") else "ug m-3"
        fields[name] = (("time", "lat", "lon"), values.astype(np.float32), {"units": unit})
    elevation = rng.uniform(0, 3000, SHAPE).astype(np.float32)
    fields["elevation"] = (("lat", "lon"), elevation, {"units": "m"})
    return fields


def open_fields(fields, folder, mask=None, **changes):
    write_prepared(fields, folder / "data", mask=mask)
    dynamic = tuple(name for name in ("pm25", "co", "u", "v") if name in fields)
    settings = {
        "train": (("2019-01-01", "2019-01-06"),),
        "test": (TEST_DAYS,),
        "variables": (*dynamic, "elevation"),
        "targets": ("pm25", "co"),
        "lead_times_hours": LEADS,
        "threads": 0,
    }
    config = DataConfig(path=str(folder / "data"), **{**settings, **changes})
    return open_forecast_data(config, with_wind="u" in fields, with_terrain=True)


def single_process(stop=None):
    return Context(Launch("none", "a test"), torch.device("cpu"), stop=stop)


def evaluate(data, output, model=None, batch_size=4, precision="fp32", context=None):
    config = TrainConfig(max_steps=1, global_batch_size=batch_size, micro_batch_size=batch_size, precision=precision)
    context = context or single_process()
    return evaluate_model(context, model or Damped(), data, NORMALIZATION, "test", config, output)


def test_weather_after_the_start_is_said_to_be_perfect(tmp_path, caplog):
    for hours, said in (({}, False), ({"u": (0, 12), "v": (-6, 24)}, True)):
        folder = tmp_path / str(said)
        folder.mkdir()
        variables = {"variables": ("pm25", "co", "elevation", "u", "v"), "hours": hours}
        caplog.clear()
        evaluate(open_fields(make_fields(wind=True), folder, **variables), folder / "scores", model=Damped())
        assert ("perfect prognosis: inputs after the start (u+12h, v+24h)" in caplog.text) is said


def test_weather_with_errors_changes_the_scores_of_the_model_alone_and_on_any_number_of_ranks(tmp_path, caplog):
    order = {"variables": ("u", "v", "pm25", "co", "elevation"), "hours": {"u": (12,), "v": (24, 0)}}
    data = open_fields(make_fields(wind=True), tmp_path, **order)  # the model's forecasts are u+12h and v+24h

    def score(context, skill):
        errors = None if skill is None else fit_weather_errors(context, data, ForecastSkill.parse(skill), seed=3)
        config = TrainConfig(max_steps=1, global_batch_size=4, micro_batch_size=4)
        return evaluate_model(context, Damped(), data, NORMALIZATION, "test", config, tmp_path / "out", errors)

    perfect = score(single_process(), None)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="topoflow"):
        wrong = score(single_process(), "0:1,12:0.9,36:0.5")
    assert "(u+12h, v+24h) are correlated with those of the data by 0.9 at 12 h, 0.7 at 24 h" in caplog.text
    assert "perfect" not in caplog.text
    assert score(single_process(), "24:1") == perfect
    assert ThreadRanks(2).run(lambda context: score(context, "0:1,12:0.9,36:0.5")) == [wrong, wrong]
    for one, other in zip(perfect, wrong, strict=True):
        changed = {name for name in one if one[name] != other[name]}
        assert {"rmse", "correlation"} <= changed
        assert not [name for name in changed if name.startswith(("persist", "climat", "damped", "ridge_"))]


def expected_pairs(fields, name, lead, scale):
    """Return (forecast, observed, present) of the test split in display units: float64 [starts, H, W]."""
    values = fields[name].values.astype(np.float64)
    starts = np.arange(24 * 6, HOURS - max(LEADS))
    present, observed = values[starts], values[starts + lead]
    mean, std = NORMALIZATION.mean[name], NORMALIZATION.std[name]
    forecast = mean + std * (2 / 3 * np.nan_to_num((present - mean) / std) + 0.01 * lead)
    return scale * forecast, scale * observed, scale * present


def test_records_equal_numpys_on_the_same_fields(tmp_path):
    fields = make_fields()
    records = evaluate(open_fields(fields, tmp_path), tmp_path / "out")
    assert [(r["target"], r["lead_hours"], r["unit"]) for r in records] == [
        ("pm25", 12, "ug m-3"), ("pm25", 24, "ug m-3"), ("co", 12, "mg m-3"), ("co", 24, "mg m-3"),
    ]  # fmt: skip
    for record in records:
        scale = 1e-3 if record["target"] == "co" else 1.0
        forecast, observed, present = expected_pairs(fields, record["target"], record["lead_hours"], scale)
        error = forecast - observed
        assert record["n"] == np.isfinite(observed).sum()
        assert record["n_where_present"] == np.isfinite(observed - present).sum()
        expected = {
            "rmse": np.sqrt(np.nanmean(error**2)),
            "mae": np.nanmean(np.abs(error)),
            "bias": np.nanmean(error),
            "nmb": np.nansum(error) / np.nansum(observed),
            "persistence_rmse": np.sqrt(np.nanmean((present - observed) ** 2)),
            "rmse_where_present": np.sqrt(np.nanmean((error + 0 * present) ** 2)),
        }
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, rel=2e-6), name
        train = fields[record["target"]].values[: 24 * 6].astype(np.float64).reshape(6, 24, *SHAPE)
        hours = (np.arange(24 * 6, HOURS - max(LEADS)) + record["lead_hours"]) % 24
        climatology = scale * np.nanmean(train, axis=0)[hours]
        assert record["climatology_rmse"] == pytest.approx(np.sqrt(np.nanmean((climatology - observed) ** 2)), rel=1e-9)


def test_files_hold_the_records(tmp_path, real_plots):
    records = evaluate(open_fields(make_fields(), tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == records
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["damped_persistence_rmse"]) for row in rows] == [r["damped_persistence_rmse"] for r in records]
    for name in ("skill.png", "case.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "case.png", "scores.csv", "scores.json", "skill.png",
    ]  # fmt: skip


def test_the_table_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="topoflow"):
        evaluate(open_fields(make_fields(), tmp_path), tmp_path / "out")
    assert "The model beats persistence in" in caplog.text


class JointDamped(Damped):
    """Returns the forecasts of Damped for all leads, [B, L, T, H, W], in memory in another order, as a network may."""

    def forward(self, x, lead_time_hours, *rest):
        leads = [super(JointDamped, self).forward(x, torch.full((len(x),), float(lead)), *rest) for lead in LEADS]
        return torch.stack(leads).transpose(0, 1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_joint_network_with_the_same_forecasts_has_the_same_records_and_case(tmp_path, world_size, monkeypatch):
    cases = []
    monkeypatch.setattr(plots, "plot_case", lambda case, _: cases.append(case))
    fields = make_fields(wind=True)
    data = open_fields(fields, tmp_path)
    joint = dataclasses.replace(data, joint=True)
    reference = evaluate(data, tmp_path / "pairs")
    results = ThreadRanks(world_size).run(
        lambda context: evaluate(joint, tmp_path / "joint", model=JointDamped(), batch_size=5, context=context)
    )
    assert results == [reference] * world_size
    for field in dataclasses.fields(cases[0]):
        np.testing.assert_array_equal(getattr(cases[0], field.name), getattr(cases[1], field.name))


class ThreadRanks:
    """Runs ranks as threads of this process."""

    def __init__(self, world_size):
        self.world_size, self.barrier, self.slots = world_size, threading.Barrier(world_size), [None] * world_size

    def run(self, body):
        """Call body(context) on each rank and return results or exceptions in the order of ranks."""
        results = [None] * self.world_size

        def work(rank):
            try:
                results[rank] = body(ThreadContext(self, rank))
            except TrainingDiverged as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        return results


class ThreadContext:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.world_size, self.is_main = ranks, rank, ranks.world_size, rank == 0
        self.device = torch.device("cpu")
        self.watch = single_process().watch

    def stop_requested(self):
        return None

    def all_reduce_sum(self, tensor):
        self.ranks.slots[self.rank] = tensor.clone()
        self.ranks.barrier.wait(timeout=60)
        tensor.copy_(sum(self.ranks.slots))
        self.ranks.barrier.wait(timeout=60)
        return tensor

    @contextmanager
    def together(self, _phase):
        yield


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 7), (1, 144), (2, 4), (3, 5), (5, 60)])
def test_records_do_not_depend_on_batch_size_nor_on_the_number_of_ranks(tmp_path, world_size, batch_size):
    splits = {"train": (("2019-01-01", "2019-01-04"),), "validation": (("2019-01-05", "2019-01-06"),)}
    data = open_fields(make_fields(), tmp_path, **splits)
    reference = evaluate(data, tmp_path / "one", batch_size=4)
    assert all(0.5 < item["coverage_80"] < 0.95 and 0 < item["crps"] < item["mae"] for item in reference)
    results = ThreadRanks(world_size).run(
        lambda context: evaluate(data, tmp_path / f"rank{context.rank}", batch_size=batch_size, context=context)
    )
    assert results == [reference] * world_size
    assert [(tmp_path / f"rank{rank}").exists() for rank in range(world_size)] == [True] + [False] * (world_size - 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_observations_are_summed_once_over_ranks(tmp_path, world_size, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK_HOURS", 10)
    fields = make_fields()
    dataset = open_fields(fields, tmp_path).dataset("test", NORMALIZATION)

    def body(context):
        return Evaluator(context, Damped(), dataset, torch.zeros(SHAPE), "fp32", 4, 0).sum_observations()

    for sums in ThreadRanks(world_size).run(body):
        assert sums.shape == (2, len(dataset.starts), len(LEADS), 2)
        for t, name in enumerate(("pm25", "co")):
            for k, lead in enumerate(LEADS):
                observed = fields[name].values[dataset.starts + lead].astype(np.float64)
                assert sums[0, :, k, t] == pytest.approx(np.nansum(observed, axis=(1, 2)), rel=1e-12)
                assert np.array_equal(sums[1, :, k, t], np.isfinite(observed).sum(axis=(1, 2)))


def test_a_request_to_stop_ends_the_evaluation_and_writes_nothing(tmp_path):
    stop = StopFlag()

    class Interrupted(Damped):
        def forward(self, *arguments):
            stop.signal_name = "SIGUSR1"
            return super().forward(*arguments)

    data = open_fields(make_fields(), tmp_path)
    with pytest.raises(StopRequested, match="SIGUSR1 during the evaluation") as refusal:
        evaluate(data, tmp_path / "out", model=Interrupted(), context=single_process(stop))
    assert refusal.value.shared
    assert not (tmp_path / "out").exists()


def test_forecast_that_is_not_finite_stops_all_ranks(tmp_path):
    class Broken(Damped):
        def forward(self, x, lead_time_hours, *rest):
            field = super().forward(x, lead_time_hours, *rest)
            field[lead_time_hours == 24] = torch.nan
            return field

    data = open_fields(make_fields(), tmp_path)
    results = ThreadRanks(2).run(lambda context: evaluate(data, tmp_path / "out", model=Broken(), context=context))
    assert [type(result) for result in results] == [TrainingDiverged, TrainingDiverged]
    assert "of pm25 at 24 h" in str(results[0])
    assert not (tmp_path / "out").exists()


def test_model_runs_in_evaluation_mode_without_gradients_and_keeps_its_mode(tmp_path):
    model = Damped().train()
    evaluate(open_fields(make_fields(), tmp_path), tmp_path / "out", model=model)
    assert {call[:3] for call in model.seen} == {(False, False, False)}
    assert model.training


def test_bf16_is_autocast_and_scored_in_float64(tmp_path):
    class Product(Damped):
        def forward(self, x, lead_time_hours, elevation_m, wind_ms):
            field = super().forward(x, lead_time_hours, elevation_m, wind_ms)
            return torch.matmul(field, torch.eye(field.shape[-1]))

    data = open_fields(make_fields(), tmp_path)
    reference = evaluate(data, tmp_path / "out")
    model = Product()
    rounded = evaluate(data, tmp_path / "bf16", model=model, precision="bf16")
    assert {call[2] for call in model.seen} == {True}
    for record, exact in zip(rounded, reference, strict=True):
        assert record["rmse"] == pytest.approx(exact["rmse"], rel=1e-2)
        assert record["rmse"] != pytest.approx(exact["rmse"], rel=1e-9)
        assert record["persistence_rmse"] == exact["persistence_rmse"]


def test_wind_reaches_the_model(tmp_path, real_plots):
    model = Damped()
    evaluate(open_fields(make_fields(wind=True), tmp_path), tmp_path / "out", model=model)
    assert model.seen[0][3].shape == (4, 2, *SHAPE)


def test_one_lead_no_wind_and_one_target(tmp_path, real_plots):
    fields = make_fields()
    data = open_fields(fields, tmp_path, lead_times_hours=(12,), targets=("co",), variables=("co", "pm25"))

    class One(Damped):
        def forward(self, *inputs):
            return super().forward(*inputs)[:, :1]

    records = evaluate(data, tmp_path / "out", model=One())
    assert [(record["target"], record["lead_hours"]) for record in records] == [("co", 12)]
    assert (tmp_path / "out" / "case.png").exists()


def test_target_without_observations_in_the_split_gives_null(tmp_path, real_plots):
    fields = make_fields()
    fields["pm25"].values[24 * 6 :] = np.nan
    records = evaluate(open_fields(fields, tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "scores.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)[0]["rmse"] is None
    assert (records[0]["n"], records[0]["persistence_rmse"], records[0]["climatology_rmse"]) == (0, None, None)
    assert records[2]["n"] > 0
    assert not (tmp_path / "out" / "case.png").exists()
    assert (tmp_path / "out" / "skill.png").exists()


def test_cells_outside_the_mask_do_not_count(tmp_path):
    fields = make_fields()
    mask = np.zeros(SHAPE, bool)
    mask[1, 2:5] = True
    records = evaluate(open_fields(fields, tmp_path, mask), tmp_path / "out")
    forecast, observed, present = (values[:, mask] for values in expected_pairs(fields, "pm25", 24, 1.0))
    assert records[1]["n"] == np.isfinite(observed).sum()
    assert records[1]["rmse"] == pytest.approx(np.sqrt(np.nanmean((forecast - observed) ** 2)), rel=2e-6)
    assert records[1]["persistence_rmse"] == pytest.approx(np.sqrt(np.nanmean((present - observed) ** 2)), rel=1e-9)


def test_split_without_a_range_is_refused(tmp_path):
    data = open_fields(make_fields(), tmp_path, test=())
    with pytest.raises(ConfigError, match=r"data\.test: no range is configured"):
        evaluate(data, tmp_path / "out")


def test_case_is_the_one_with_the_highest_observed_mean(tmp_path):
    fields = make_fields(wind=True)
    fields["pm25"].values[:, 0, 0] = np.nan  # never observed
    fields["pm25"].values[200] += 500.0
    fields["pm25"].values[210, :3] = np.nan  # few observations
    fields["pm25"].values[210, 3] = 5000.0
    data = open_fields(fields, tmp_path)
    dataset = data.dataset("test", NORMALIZATION)
    evaluator = Evaluator(single_process(), Damped(), dataset, torch.zeros(SHAPE), "fp32", 4, 0)
    baselines = evaluator.fit_baselines(np.arange(24 * 6), np.arange(24 * 6 - 24))
    case = evaluator.select_case(baselines, evaluator.sum_observations())
    assert (case.start, case.lead_hours, case.name, case.unit) == (
        np.datetime64("2019-01-01") + np.timedelta64(200 - 24, "h"), 24, "PM2.5", "ug m-3",
    )  # fmt: skip
    assert np.array_equal(case.truth, fields["pm25"].values[200].astype(np.float64), equal_nan=True)
    expected = expected_pairs(fields, "pm25", 24, 1.0)[0][200 - 24 - 24 * 6]
    expected[0, 0] = np.nan
    assert case.forecast == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert np.array_equal(case.wind_ms[1], fields["v"].values[200 - 24], equal_nan=True)
