"""Runs whose inputs after the start are real forecasts."""

import pytest

from tests.program.conftest import same_state
from tests.support.prepared import prepare_world
from topoflow import cli

HOURS = "data.hours={u: [0, 6, 12], v: [0, 6, 12]}"
TEST_SPLIT = "data.test=[[2018-10-09, 2018-10-10]]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared data of 16 days, and the forecasts of their weather."""
    folder = tmp_path_factory.mktemp("weather")
    prepare_world(folder / "data", days=16, forecasts=folder / "forecasts")
    return folder


@pytest.fixture
def form(folders):
    return (HOURS, f"data.path={folders / 'data'}", f"data.forecast={folders / 'forecasts'}")


def test_a_stopped_run_resumes_to_the_same_bits_with_its_forecasts_elsewhere(program, form, folders):
    whole = program.train(*form, run="whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    assert "6 starts skipped for which data.forecast has no forecast" in whole.stderr  # none is there before 6 h
    assert program.train(*form, "train.max_steps=7", processes=2).returncode == 0
    (program.folder / "moved").symlink_to(folders / "forecasts")
    resumed = program.train(*form[:2], f"data.forecast={program.folder / 'moved'}", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert program.losses() == program.losses("whole")
    for part in ("model", "optimizer"):
        assert same_state(program.state()[part], program.state("whole")[part])


def test_other_forecasts_and_none_are_refused_on_resume(program, form, folders, tmp_path):
    assert program.train(*form, "train.max_steps=2").returncode == 0
    prepare_world(tmp_path / "other", days=16, seed=1, forecasts=tmp_path / "others")
    done = program.train(*form[:2], f"data.forecast={tmp_path / 'others'}")
    assert done.returncode == 3
    assert "first difference: forecasts of u on 2018-10-01" in done.stderr
    done = program.train(*form[:2])
    assert done.returncode == 3
    assert "data.forecast" in done.stderr


def test_scores_say_that_the_weather_was_forecast(program, form, folders, capsys):
    done = program.train(*form, "train.max_steps=2", TEST_SPLIT)
    assert done.returncode == 0, done.stderr
    said = f"inputs after the start (u+6h, u+12h, v+6h, v+12h) are forecasts of {folders / 'forecasts'}"
    assert said in done.stderr
    assert "perfect prognosis" not in done.stderr
    run = str(program.folder / "run")
    assert cli.main(["evaluate", run, "--forecast-error", "24:0.9"]) == 2
    assert "reads forecasts (data.forecast), which have errors of their own" in capsys.readouterr().err
