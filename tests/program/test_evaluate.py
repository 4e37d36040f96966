"""`topoflow evaluate` on a run of train.py."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

from tests.support.prepared import prepare_world
from topoflow import cli
from topoflow.checkpoint.directory import CheckpointDirectory
from topoflow.tools.prepare.command import load_recipe, prepare
from topoflow.tools.prepare.recipe import Advect

TEST_SPLIT = "data.test=[[2018-10-09, 2018-10-10]]"


@pytest.fixture
def run(program):
    assert program.train("train.max_steps=8", TEST_SPLIT).returncode == 0
    return program.folder / "run"


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_evaluate_repeats_the_scores_at_the_end_of_training(program, run):
    at_the_end = scores(run / "evaluation")
    assert {(record["target"], record["lead_hours"]) for record in at_the_end} == {
        (target, lead) for target in ("pm25", "pm10", "so2", "no2", "co", "o3") for lead in (6, 12)
    }
    for record in at_the_end:
        assert record["n"] > 0
        assert record["unit"] == ("mg m-3" if record["target"] == "co" else "ug m-3")
    assert {path.name for path in (run / "evaluation").iterdir()} == {
        "scores.json", "scores.csv", "skill.png", "case.png",
    }  # fmt: skip
    output = program.folder / "again"
    assert cli.main(["evaluate", str(run), "--output", str(output)]) == 0
    assert scores(output) == at_the_end


def test_two_processes_and_another_batch_size_give_the_same_scores(program, run):
    output = program.folder / "two"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "topoflow",
        "evaluate", str(run), "--output", str(output), "train.micro_batch_size=8",
    ]  # fmt: skip
    done = subprocess.run(command, env=program.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(scores(output), scores(run / "evaluation"), strict=True):
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), key


def test_the_lead_times_of_a_joint_network_are_those_of_its_training(program, capsys):
    joint, elsewhere = "model.leads=joint", "data.lead_times_hours=[6, 18]"
    assert program.train(joint, "train.max_steps=1").returncode == 0
    run = program.folder / "run"
    assert cli.main(["evaluate", str(run), elsewhere, TEST_SPLIT]) == 2
    assert "data.lead_times_hours: [6, 12] -> [6, 18]: expected as in" in capsys.readouterr().err
    for other, change in ((joint, elsewhere), ("model.leads=conditioned", "train.max_steps=1")):
        refused = program.train(other, change, f"checkpoint.init_from={run}", run="tuned")
        assert refused.returncode == 2
    assert "model.leads: 'joint' -> 'conditioned': expected the same channels" in refused.stderr


def test_a_checkpoint_and_a_split_can_be_chosen(program, run, capsys):
    checkpoint = run / "checkpoints" / "step-00000006"
    assert cli.main(["evaluate", str(checkpoint), "--split", "validation"]) == 0
    assert "step-00000006 on the validation split" in capsys.readouterr().err
    assert scores(run / "evaluation" / "validation") != scores(run / "evaluation")
    assert cli.main(["evaluate", str(checkpoint), "data.test=[]"]) == 2
    assert "data.test" in capsys.readouterr().err


@pytest.mark.parametrize("gone", ["", "state.pt"])
def test_evaluation_and_fine_tuning_use_the_last_checkpoint_where_the_best_is_gone(program, run, gone, capsys):
    best = run / "checkpoints" / "step-00000006"
    CheckpointDirectory(best.parent).point("best", best)
    shutil.rmtree(best) if gone == "" else (best / gone).unlink()
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--split", "validation"]) == 0
    done = program.train("train.max_steps=1", f"checkpoint.init_from={run}", run="tuned")
    assert done.returncode == 0, done.stderr
    for output in (capsys.readouterr().err, done.stderr):
        assert best.name in output
        assert "using the last one instead" in output
        assert "step-00000008" in output


def test_a_checkpoint_with_code_in_it_is_refused(program, run, capsys):
    trap = program.folder / "trap"

    class Malicious:
        def __reduce__(self):
            return (open, (str(trap), "w"))

    (run / "evil").mkdir()
    torch.save({"model": Malicious()}, run / "evil" / "state.pt")
    assert cli.main(["evaluate", str(run / "evil")]) == 3
    (run / "evil" / "state.pt").write_bytes(pickle.dumps(Malicious()))
    assert cli.main(["evaluate", str(run / "evil")]) == 3
    assert not trap.exists()
    assert "Traceback" not in capsys.readouterr().err


def test_model_options_that_the_checkpoint_does_not_fit_are_refused(program, run, capsys):
    for override in ("model.depth=3", "data.targets=[o3, co, no2, so2, pm10, pm25]", "data.availability=false"):
        assert cli.main(["evaluate", str(run), override]) == 2
        assert override.partition("=")[0] in capsys.readouterr().err
    for correlations, expected in (("24:2", "HOURS:CORRELATION"), ("24:0.9", "hours > 0 in data.hours")):
        assert cli.main(["evaluate", str(run), "--forecast-error", correlations]) == 2
        assert expected in capsys.readouterr().err


def test_weather_with_errors_is_scored_in_a_folder_of_its_own(program, world, capsys):
    wind = "data.hours={u: [0, 6, 12], v: [0, 6, 12]}"
    done = program.train("train.max_steps=2", TEST_SPLIT, wind, "data.advect=[o3, population]", "model.wind=none")
    assert done.returncode == 0, done.stderr
    folder = program.folder / "run" / "evaluation"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert cli.main(["evaluate", str(folder.parent), "--forecast-error", "0:1,12:0"]) == 0
    assert "are correlated with those of the data by 0.5 at 6 h, 0 at 12 h" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert [record["rmse"] for record in scores(folder / "forecast-error")] != [r["rmse"] for r in scores(folder)]
    recipe = load_recipe([str(world.with_name("data-raw"))])
    recipe = dataclasses.replace(recipe, advect=Advect(("o3",), (6, 12)))
    assert prepare(recipe, program.folder / "carried", progress=False).is_decided
    carried = f"data.path={program.folder / 'carried'}"
    assert cli.main(["evaluate", str(folder.parent), carried, "--forecast-error", "0:1,12:0"]) == 2
    assert "carried holds o3_advected+6h, made with wind that has no error" in capsys.readouterr().err


def test_an_output_that_cannot_be_created_is_refused_before_the_work(program, run, capsys):
    for folder in (program.config / "below", Path("/proc/self/net")):  # below a file; a read-only folder
        assert cli.main(["evaluate", str(run), "--output", str(folder)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith(f"error: {folder}: cannot be written: ")
        assert not [line for line in lines if "scoring" in line or "RMSE" in line]


def test_a_read_only_run_is_refused_before_the_work_and_scored_elsewhere(program, run):
    """A mount of its own makes the folder read-only even for root, which runs CI."""
    evaluate = [sys.executable, "-m", "topoflow", "evaluate", str(run)]
    script = 'mount -o bind,ro "$1" "$1" || exit 99; shift; exec "$@"'

    def read_only(*options):
        command = ["unshare", "-m", "sh", "-c", script, "sh", str(run), *evaluate, *options]
        return subprocess.run(command, env=program.environment(), capture_output=True, text=True)

    shutil.rmtree(run / "evaluation" / "validation", ignore_errors=True)
    done = read_only("--split", "validation")
    if done.returncode in (1, 99) and "topoflow" not in done.stderr:
        pytest.skip(f"no read-only mount here: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr
    folder = run / "evaluation" / "validation"
    assert done.stderr.splitlines()[-1].startswith(f"error: {folder}: cannot be written: Read-only file system")
    assert "Traceback" not in done.stderr
    assert "scoring" not in done.stderr
    done = read_only("--output", str(program.folder / "mine"))
    assert done.returncode == 0, done.stderr
    assert scores(program.folder / "mine")


@pytest.mark.parametrize("command", ["evaluate", "import-lightning"])
def test_float32_is_multiplied_as_train_tf32_demands(program, run, command):
    """As in training, on whose losses a certificate is compared to the bit; here without a GPU, by torch's setting."""
    arguments = [str(run), "train.tf32=true", "--output", str(program.folder / "again")]
    if command == "import-lightning":
        arguments = [
            "missing.ckpt",
            "--config",
            str(program.config),
            "-o",
            str(program.folder / "new"),
            "train.tf32=true",
        ]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        assert cli.main([command, *arguments]) == (0 if command == "evaluate" else 2)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def moved(program, world):
    """The same world one degree further north."""
    [file] = world.with_name(f"{world.name}-raw").glob("*.nc")
    with xr.open_dataset(file) as dataset:
        dataset.assign_coords(lat=("lat", dataset.lat.values + 1, dataset.lat.attrs)).to_netcdf(
            program.folder / "raw.nc"
        )
    assert program.topoflow("prepare", program.folder / "raw.nc", "-o", program.folder / "moved").returncode == 0
    return program.folder / "moved"


def test_data_of_another_place_are_refused_and_of_another_time_are_not(program, run, world, moved, capsys):
    assert cli.main(["evaluate", str(run), f"data.path={moved}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"data.path: {moved} is elsewhere: 8 x 12 cells, latitude " in line
    other = prepare_world(program.folder / "other", days=10, seed=1)
    assert cli.main(["evaluate", str(run), f"data.path={other}", "--output", str(program.folder / "out")]) == 0
    said = capsys.readouterr().err
    assert f"{other} differs from the data used in training: elevation" in said


def test_fine_tuning_says_where_and_with_which_constants(program, run, moved, capsys):
    init = f"checkpoint.init_from={run}"
    here = program.train("train.max_steps=1", init, run="here")
    assert here.returncode == 0, here.stderr
    assert "another place" not in here.stderr
    assert "normalization: computed over this run's training split; to keep that of " in here.stderr
    there = program.train("train.max_steps=1", init, f"data.path={moved}", run="there")
    assert there.returncode == 0, there.stderr
    assert "another place: " in there.stderr
    assert cli.main(["inspect", str(run / "checkpoints" / "step-00000008")]) == 0
    printed = capsys.readouterr().out
    assert "10 days from 2018-10-01 to 2018-10-10 of co, no2, " in printed
    assert "8 x 12 cells, latitude " in printed
    constants = program.state(step=8)["data"]["normalization"]
    given = f"data.normalization={json.dumps(constants)}"
    kept = program.train("train.max_steps=1", init, given, run="kept")
    assert "normalization: the constants of data.normalization" in kept.stderr
    assert program.state("kept", step=1)["data"]["normalization"] == constants
