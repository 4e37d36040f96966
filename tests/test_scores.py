"""Score records written to files and formatted as a table."""

import json

import pytest

from topoflow.metrics import format_scores, write_scores


def record(target="pm25", lead=12, unit="ug m-3", **scores):
    numbers = {
        "rmse": 20.0,
        "rmse_where_present": 19.0,
        "persistence_rmse": 30.0,
        "climatology_rmse": 25.0,
        "damped_persistence_rmse": 18.5,
        "seasonal_damped_persistence_rmse": None,
        "ridge_rmse": None,
        "crps": None,
        "coverage_80": None,
    }
    return {"target": target, "lead_hours": lead, "unit": unit, "n": 7, **numbers, **scores}


def test_table_marks_the_wins_on_the_same_samples():
    records = [
        record(),
        record(lead=24, persistence_rmse=19.5, climatology_rmse=19.5, damped_persistence_rmse=19.5),
        record("co", 12, "mg m-3", rmse=0.4, rmse_where_present=0.3811, persistence_rmse=0.3811),
        record("co", 24, "mg m-3", rmse=None, rmse_where_present=None, persistence_rmse=None, climatology_rmse=None),
    ]
    lines = [" ".join(line.split()) for line in format_scores(records).splitlines()]
    assert lines[1] == "target unit lead model model* persistence climatology damped persistence"
    assert lines[2] == "PM2.5 ug m-3 12 h 20.00 19.00 30.00+ 25.00+ 18.50"
    # 19.0 where the present value exists beats 19.5; 20.0 on all samples does not
    assert lines[3] == "24 h 20.00 19.00 19.50+ 19.50 19.50+"
    assert lines[4] == "CO mg m-3 12 h 0.400 0.381 0.381 25.000+ 18.500+"
    assert lines[5] == "24 h - - - - 18.50"
    assert lines[-1] == "The model beats persistence in 2 of 4, climatology in 2 of 4, damped persistence in 2 of 4."
    assert max(map(len, format_scores(records).splitlines())) <= 110


def test_table_has_the_seasonal_baseline_where_there_is_one():
    records = [record(seasonal_damped_persistence_rmse=19.5), record(lead=24, seasonal_damped_persistence_rmse=18.0)]
    lines = [" ".join(line.split()) for line in format_scores(records).splitlines()]
    assert lines[1].endswith("damped persistence seasonal")
    assert lines[2].endswith("18.50 19.50+")
    assert lines[3].endswith("18.50 18.00")
    assert lines[-2].endswith("damped persistence in 0 of 2, seasonal in 1 of 2.")
    assert lines[-1].endswith("mean over targets and leads: 1.027")  # 19 / 18.5


def test_table_says_where_the_network_adds_nothing_to_the_ridge():
    line = "The network adds less than 1 %: its RMSE is"
    assert line in format_scores([record(ridge_rmse=19.1), record(lead=24, ridge_rmse=19.1)])
    assert line not in format_scores([record(ridge_rmse=19.3), record(lead=24, ridge_rmse=19.3)])
    assert line not in format_scores([record(), record(lead=24)])


def test_table_says_what_the_intervals_hold():
    lines = format_scores([record(coverage_80=0.75), record(lead=24, coverage_80=0.85)])
    assert "hold 80.0% of the observations (75.0% to 85.0% by target and lead)" in lines
    assert "intervals" not in format_scores([record()])


def test_undefined_scores_are_null_and_an_empty_field(tmp_path):
    write_scores([record(rmse=None)], tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    assert json.loads((folder / "scores.json").read_text())[0]["rmse"] is None
    assert (folder / "scores.csv").read_text().splitlines()[1].startswith("pm25,12,ug m-3,7,,19.0")
    assert {path.name for path in folder.iterdir()} == {"scores.json", "scores.csv"}


def test_nan_is_never_written_and_the_file_before_stays(tmp_path):
    write_scores([record()], tmp_path)
    before = (tmp_path / "scores.json").read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_scores([record(rmse=float("nan"))], tmp_path)
    assert (tmp_path / "scores.json").read_text() == before
