"""Runs whose network adds to a forecast in closed form."""

import json

import numpy as np
import pytest
import torch

from tests.support.prepared import prepare_world
from topoflow import bases, build, cli

BASE = ("model.base=damped", "data.anomalies=true", "model.tokens=with_data")
RIDGE = ("model.base=ridge", *BASE[1:])
TEST_SPLIT = "data.test=[[2018-10-09, 2018-10-10]]"


def leaves(state):
    """Yield each tensor or plain value of nested dicts."""
    for key, value in sorted(state.items()):
        yield from ([(key, value)] if not isinstance(value, dict) else ((key, *leaf) for leaf in leaves(value)))


def same(one, other):
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(
        a[:-1] == b[:-1] and (torch.equal(a[-1], b[-1]) if isinstance(a[-1], torch.Tensor) else a[-1] == b[-1])
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("base", "leads", "baseline"), [(BASE, "conditioned", "damped_persistence"), (RIDGE, "joint", "ridge")]
)
def test_before_its_first_update_a_network_is_its_base(program, base, leads, baseline):
    changes = ("optim.learning_rate=1e-30", "train.max_steps=1", f"model.leads={leads}")
    done = program.train(*base, TEST_SPLIT, *changes)
    assert done.returncode == 0, done.stderr
    records = json.loads((program.folder / "run" / "evaluation" / "scores.json").read_text())
    assert len(records) == 12
    for record in records:
        assert record["rmse_where_present"] == pytest.approx(record[f"{baseline}_rmse"], rel=1e-4)
        assert record["seasonal_damped_persistence_rmse"] is None  # six days do not cover a year
        assert record["ridge_rmse"] != pytest.approx(record["damped_persistence_rmse"], rel=1e-3)
    label = (
        "mean over targets and leads: 1.000" if baseline != "ridge" else "RMSE is 1.000 times the ridge regression's"
    )
    assert label in done.stderr


def test_two_processes_fit_the_same_base_and_take_it_from_a_checkpoint(program):
    form = (*RIDGE, "model.leads=joint")
    done = program.train(*form, "train.max_steps=6")
    assert done.returncode == 0, done.stderr
    one = program.state(step=6)["data"]["base"]
    ridge = {f"ridge_{name}" for name in ("pooled", "own", "strengths", "known", "blocks")}
    assert set(one) == {"hourly", "annual", "filled", "slope", "squares", "lead_times_hours", *ridge}
    assert one["slope"].abs().min() > 0
    assert one["ridge_pooled"].abs().amax(dim=(1, 2, 3)).min() > 0
    for overrides in (("run.dir=" + str(program.folder / "two"),), ()):
        done = program.train(*form, "train.max_steps=7", *overrides, processes=2)
        assert done.returncode == 0, done.stderr
    assert same(program.state("two", 7)["data"]["base"], one)
    assert "resume from" in done.stderr
    assert same(program.state(step=7)["data"]["base"], one)


@pytest.mark.parametrize("form", [(*BASE, "model.leads=joint"), RIDGE])
def test_a_resumed_run_takes_the_base_of_its_checkpoint(program, form):
    assert program.train(*form, run="whole").returncode == 0
    assert program.train(*form, "train.max_steps=12", "optim.schedule_length=20").returncode == 0

    def fit(*_, **__):
        raise AssertionError("fitted again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "fit_damped_persistence", fit)
        patch.setattr(bases, "fit_ridge", fit)
        resumed = program.train(*form)
    assert resumed.returncode == 0, resumed.stderr
    assert program.losses() == program.losses("whole")
    for part in ("model", "optimizer", "scheduler"):
        assert same(program.state()[part], program.state("whole")[part]), part
    assert same(program.state()["data"]["base"], program.state("whole")["data"]["base"])


def test_a_resume_with_another_base_is_refused(program):
    assert program.train(*BASE, "train.max_steps=6").returncode == 0
    refused = program.train("data.anomalies=true", "model.base=seasonal")
    assert refused.returncode == 3
    assert "model.base: 'damped' -> 'seasonal'; model.tokens: 'with_data' -> 'all'" in refused.stderr


def test_inspect_shows_and_compares_bases(program, capsys):
    for name, base in (("run", "damped"), ("other", "seasonal")):
        changes = (f"model.base={base}", "data.train=[[2018-10-02, 2018-10-06]]") if name == "other" else ()
        assert program.train(*BASE, *changes, "train.max_steps=1", run=name).returncode == 0
    assert cli.main(["inspect", str(program.folder / "run")]) == 0
    assert "hourly float32[6, 24, 8, 12] " in capsys.readouterr().out
    assert cli.main(["inspect", str(program.folder / "run"), str(program.folder / "other")]) == 0
    assert "base.slope: float32[6, 2, 8, 12] " in capsys.readouterr().out


def test_a_base_of_other_bits_is_not_proved(program, monkeypatch):
    assert program.train(*BASE, "train.max_steps=6").returncode == 0
    whole = build.restore_normalization

    def altered(saved, context):
        normalization = whole(saved, context)
        normalization.base.slope[0, 0, 0, 0] += np.float32(1e-6)
        return normalization

    monkeypatch.setattr("topoflow.resume.restore_normalization", altered)
    refused = program.train(*BASE)
    assert refused.returncode == 3
    assert "the resume is not proved: normalization fingerprint" in refused.stderr


def test_patches_without_data_have_the_forecast_of_the_base(tmp_path, make_program):
    mask = np.zeros((8, 12), bool)
    mask[2:5, 3:9] = True
    program = make_program(tmp_path)
    data = prepare_world(tmp_path / "masked", days=10, mask=mask)
    done = program.train(*BASE, TEST_SPLIT, f"data.path={data}")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "scores"
    assert cli.main(["evaluate", str(tmp_path / "run"), "--output", str(output)]) == 0
    assert (output / "scores.json").read_bytes() == (tmp_path / "run" / "evaluation" / "scores.json").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.anomalies=true"], "data.anomalies: True is not usable: expected false with model.base=none"),
        (["model.tokens=with_data"], "model.tokens: 'with_data' is not usable: expected all with model.base=none"),
        (["model.base=ridges"], "model.base: 'ridges' is not usable: expected none | damped | seasonal | ridge"),
    ],
)
def test_settings_that_need_a_base_are_refused(program, overrides, message):
    refused = program.train(*overrides)
    assert refused.returncode == 2
    assert message in refused.stderr


def test_a_training_split_of_a_season_has_no_seasonal_base(program):
    done = program.train("model.base=seasonal", "train.max_steps=1")
    assert done.returncode == 0
    assert "model.base: the training split does not cover the seasons of a year" in done.stderr
    assert program.state(step=1)["data"]["base"]["annual"].shape[1] == 0


def test_a_training_split_without_anomalies_is_refused(program):
    # each hour once: every value is the mean of its hour
    refused = program.train(*BASE, "data.train=[[2018-10-01, 2018-10-01]]", "data.lead_times_hours=[6]")
    assert refused.returncode == 2
    assert "model.base: 'pm25' has no anomalies in the training split" in refused.stderr


def test_other_lead_times_are_refused_by_evaluate(program, capsys):
    assert program.train(*BASE, TEST_SPLIT, "train.max_steps=1").returncode == 0
    assert cli.main(["evaluate", str(program.folder / "run"), "data.lead_times_hours=[12, 18]"]) == 2
    assert "data.lead_times_hours: [12, 18]: expected [6, 12], those of the base" in capsys.readouterr().err


def test_fine_tuning_fits_the_base_of_its_own_data(program):
    assert program.train(*BASE, "train.max_steps=6").returncode == 0
    elsewhere = ("data.train=[[2018-10-03, 2018-10-06]]", f"checkpoint.init_from={program.folder / 'run'}")
    done = program.train(*BASE, *elsewhere, "train.max_steps=1", run="tuned")
    assert done.returncode == 0, done.stderr
    before, after = program.state(step=6)["data"]["base"], program.state("tuned", 1)["data"]["base"]
    assert not torch.equal(before["hourly"], after["hourly"])
