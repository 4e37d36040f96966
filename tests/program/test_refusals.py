"""Errors that users see: one line with what, where and what was expected, and the exit status."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr

import train
from tests.support.prepared import prepare_world
from topoflow import cli


def refused(done, status, *words):
    """Check for one line on stderr, the last of the output, without a traceback; return it."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last
    return last


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rat=1", ["optim.learning_rat", "did you mean optim.learning_rate?"]),
        ("train.max_steps=many", ["train.max_steps", "'many'", "integer"]),
        ("model.drop_rate=1.5", ["model.drop_rate", "1.5"]),
        ("data.path=nowhere", ["data.path", "nowhere"]),
        ("data.variables=[u, v, ozone]", ["data.variables", "'ozone'"]),
        ("data.train=[2031]", ["data.train", "2031"]),
        ("data.train=[[2018-10-01, 2018-12-31]]", ["data.train", "2018-12-31"]),
        ("data.validation=[[2018-10-05, 2018-10-08]]", ["data.train", "data.validation", "overlaps"]),
        ("data.hours={u: [0, 500]}", ["data.train", "+500 h"]),
        ("data.lead_times_hours=[500]", ["data.train", "500"]),
        ("model.patch_size=5", ["model.patch_size", "5", "8 x 12"]),
        ("model.img_size=[8, 8]", ["model.img_size", "[8, 8]", "[8, 12]"]),
        ("train.global_batch_size=1024", ["data.train", "1024"]),
        ("checkpoint.resume=nowhere", ["nowhere", "not found"]),
        ("checkpoint.init_from=nowhere", ["nowhere", "not found"]),
    ],
)
def test_config_and_data_that_cannot_be_used(program, override, words):
    done = program.train(override)
    refused(done, 2, *words)
    assert not (program.folder / "run" / "checkpoints").exists()


def test_a_missing_config_file(program):
    program.config = program.folder / "nothing.yaml"
    refused(program.train(), 2, "nothing.yaml", "not found")


def test_a_refusal_is_reported_once_by_two_processes_and_its_status_is_in_exit_json(program):
    done = program.train("data.path=nowhere", processes=2)
    lines = [line for line in done.stderr.splitlines() if "nowhere" in line]
    assert len(lines) == 1, done.stderr
    assert program.exit_record()["status"] == 2


def test_a_world_size_that_does_not_divide(program):
    done = program.train(processes=3)
    assert "expected a world size of 1, 2, 4" in done.stderr
    assert program.exit_record()["status"] == 2


def test_data_that_are_not_prepared(program, world):
    raw = world.with_name(f"{world.name}-raw")
    refused(program.train(f"data.path={raw}"), 2, "data.path", f"python -m topoflow prepare {raw} -o OUT")


def test_a_run_directory_in_use(program):
    holder = program.start("train.max_steps=100000", "checkpoint.every_steps=null", "data.validation=[]")
    try:
        for line in holder.stdout:
            if line.startswith("step 1/"):
                break
        refused(program.train(), 2, "run.dir", "in use")
        assert not (program.folder / "run" / "exit.json").exists()
    finally:
        holder.kill()
        holder.communicate()


def test_never_resume_in_a_directory_with_checkpoints(program):
    assert program.train("train.max_steps=2").returncode == 0
    refused(program.train("checkpoint.resume=never"), 2, "checkpoint.resume", "never", "step-00000002")


def test_a_changed_config_is_refused_unless_it_is_allowed(program):
    assert program.train("train.max_steps=2").returncode == 0
    changed = ("train.max_steps=3", "optim.weight_decay=0.5")
    refused(program.train(*changed), 3, "optim.weight_decay: 0.01 -> 0.5", "checkpoint.allow_changed")
    done = program.train(*changed, "checkpoint.allow_changed=[optim.weight_decay]")
    assert done.returncode == 0, done.stderr
    assert "optim.weight_decay: 0.01 -> 0.5" in done.stderr


def test_another_batch_size_may_not_cut_a_batch_of_the_epoch(program):
    assert program.train("train.max_steps=2").returncode == 0  # 32 samples of 264
    allowed = "checkpoint.allow_changed=[train.global_batch_size]"
    refused(program.train("train.max_steps=3", allowed, "train.global_batch_size=24"), 3, "24", "32 samples")
    done = program.train(allowed, "train.global_batch_size=8", "train.max_steps=32", "data.validation=[]")
    refused(done, 3, "data.validation")
    allowed = "checkpoint.allow_changed=[train.global_batch_size, data.validation]"
    done = program.train(allowed, "train.global_batch_size=8", "train.max_steps=32", "data.validation=[]")
    assert done.returncode == 0, done.stderr
    progress = program.state(step=32)["progress"]  # 4 batches of 8 were done, 29 more complete the epoch of 33
    assert (progress["epoch"], progress["samples_in_epoch"]) == (1, 8)


def test_another_data_set_is_refused(program, tmp_path):
    assert program.train("train.max_steps=2").returncode == 0
    other = prepare_world(tmp_path / "other", days=10, seed=1)
    done = program.train("train.max_steps=3", f"data.path={other}")
    refused(done, 3, "data.fingerprint", "first difference: elevation")


def test_a_damaged_checkpoint(program):
    assert program.train("train.max_steps=2", "checkpoint.every_steps=1").returncode == 0
    folder = program.folder / "run" / "checkpoints"
    newest = folder / "step-00000002" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-10] + b"0123456789")
    explicit = program.train("train.max_steps=3", f"checkpoint.resume={newest.parent}")
    refused(explicit, 3, "step-00000002", "state.pt", "damaged")
    older = program.train("train.max_steps=3")
    assert older.returncode == 0
    assert "taking the next older one" in older.stderr
    assert sorted(program.losses()) == [1, 2, 3]
    for path in folder.glob("step-*/manifest.json"):
        path.unlink()
    refused(program.train("train.max_steps=4"), 3, "none of 2 checkpoints is intact")


def test_a_missing_name_is_refused_and_listed_as_new(program):
    options = ("model.terrain=none", "train.max_steps=2")
    assert program.train(*options).returncode == 0
    changed = ("train.max_steps=3", "checkpoint.allow_changed=[model.terrain]")
    refused(program.train(*changed), 3, "blocks.0.attn.elevation_alpha", "checkpoint.allow_new")
    allowed = "checkpoint.allow_new=[blocks.0.attn.elevation_alpha, blocks.0.attn.H_scale]"
    # the terrain height is now read, so the data set has one field more
    done = program.train(*changed[:1], "checkpoint.allow_changed=[model.terrain, data.fingerprint]", allowed)
    assert done.returncode == 0, done.stderr
    report = json.loads((program.folder / "run" / "resume.json").read_text())
    assert report["new"] == ["blocks.0.attn.elevation_alpha", "blocks.0.attn.H_scale"]
    assert (report["moments"], report["moments_expected"]) == (47, 47)


def test_a_fine_tune_takes_weights_only(program):
    assert program.train("train.max_steps=3").returncode == 0
    done = program.train("train.max_steps=1", f"checkpoint.init_from={program.folder / 'run'}", run="tuned")
    assert done.returncode == 0, done.stderr
    assert "fine-tune" in done.stderr
    assert sorted(program.losses("tuned")) == [1]
    assert program.state("tuned", 1)["optimizer"]["state"]["head.0.bias"]["step"] == 1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(program, processes):
    assert program.train("train.max_steps=2", processes=processes).returncode == 0
    done = program.train(
        "optim.learning_rate=1e30", "optim.grad_clip_norm=null", "optim.warmup_steps=0",
        "checkpoint.allow_changed=[optim.*]", "checkpoint.every_steps=null", "train.validate_every_steps=1000",
        processes=processes,
    )  # fmt: skip
    assert "is not finite" in done.stderr
    assert "step 4" in done.stderr or "step 3" in done.stderr
    assert program.exit_record()["status"] == 4
    assert 'train.py", line' not in done.stderr  # the only traceback is torchrun's
    again = program.train("train.max_steps=3", processes=processes)
    assert again.returncode == 0, again.stderr


def test_help_shows_every_key(capsys):
    for main, arguments in ((train.main, ["--help"]), (cli.main, ["evaluate", "--help"])):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        output = capsys.readouterr().out
        assert ended.value.code == 0
        assert "optim.group_multipliers" in output
        assert "Learning rate of each parameter group over the base rate." in output


def test_bad_usage_is_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([])
    assert ended.value.code == 2
    assert "CONFIG" in capsys.readouterr().err


def test_a_shrunk_training_split_that_ends_before_the_position_is_refused(program):
    assert program.train("train.max_steps=12", "data.validation=[]").returncode == 0
    changed = ("data.train=[[2018-10-01, 2018-10-03]]", "checkpoint.allow_changed=[data.train]", "data.validation=[]")
    refused(program.train(*changed), 3, "192 samples of the epoch")


def test_a_changed_mask_is_refused_and_a_moved_data_set_is_not(program, world):
    assert program.train("train.max_steps=1").returncode == 0
    moved = program.folder / "moved"
    shutil.copytree(world, moved)
    assert program.train("train.max_steps=2", f"data.path={moved}").returncode == 0
    masked = prepare_world(program.folder / "masked", days=10, mask=np.arange(96).reshape(8, 12) > 10)
    refused(program.train("train.max_steps=3", f"data.path={masked}"), 3, "data.fingerprint", "first difference: mask")


def test_data_that_grew_resume(program, world):
    raw = program.folder / "raw"
    raw.mkdir()
    [whole] = world.with_name(f"{world.name}-raw").glob("*.nc")
    with xr.open_dataset(whole) as dataset:
        dataset.isel(time=slice(0, 8 * 24 + 5)).to_netcdf(raw / "first.nc")
        dataset.isel(time=slice(8 * 24 + 5, None)).to_netcdf(program.folder / "rest.nc")
    growing = program.folder / "growing"
    assert program.topoflow("prepare", raw, "-o", growing).returncode == 0
    assert program.train("train.max_steps=2", f"data.path={growing}").returncode == 0
    (program.folder / "rest.nc").rename(raw / "rest.nc")
    assert program.topoflow("prepare", raw, "-o", growing).returncode == 0
    done = program.train("train.max_steps=4", f"data.path={growing}")
    assert done.returncode == 0, done.stderr
    assert "next 32 samples match the certificate" in done.stderr
    assert program.train("train.max_steps=4", run="on all of it").returncode == 0
    assert program.losses("on all of it") == program.losses()


SAVE_EVERY_STEP = ("checkpoint.every_steps=1", "data.validation=[]", "data.threads=0")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_that_failed_stops_the_run(program, processes):
    (program.folder / "run").mkdir()
    (program.folder / "run" / "checkpoints").write_text("in the way")
    program.train(*SAVE_EVERY_STEP, processes=processes)
    assert program.exit_record()["status"] == 2
    assert "checkpoints: not written: File exists" in program.exit_record()["reason"]
    assert max(program.losses()) <= 2  # the next save waits for the first; the step after it sees the failure


def test_a_save_that_failed_is_never_called_committed(program):
    (program.folder / "run").mkdir()
    (program.folder / "run" / "checkpoints").write_text("in the way")
    done = program.train(*SAVE_EVERY_STEP, "train.max_steps=2", "checkpoint.on_error=continue")
    refused(done, 2, "the end of the run: the checkpoint of step 2 was not written", "File exists")
    assert "training continues" in done.stderr
    assert sorted(program.losses()) == [1, 2]
    assert program.events(kind="checkpoint") == []


def test_files_of_the_run_that_cannot_be_written(program):
    (program.folder / "run" / "config.yaml").mkdir(parents=True)
    for processes in (1, 2):
        done = program.train("train.max_steps=1", processes=processes)
        assert sum("config.yaml: cannot be written" in line for line in done.stderr.splitlines()) == 1
        assert 'train.py", line' not in done.stderr
        assert program.exit_record()["status"] == 2


def test_a_refused_resume_leaves_the_config_as_it_was(program):
    assert program.train("train.max_steps=2").returncode == 0
    before = (program.folder / "run" / "config.yaml").read_text()
    refused(program.train("train.max_steps=3", "model.embed_dim=32"), 3, "model.embed_dim: 16 -> 32")
    assert (program.folder / "run" / "config.yaml").read_text() == before


def test_a_validation_split_without_a_value_is_no_divergence(program, world):
    [file] = world.with_name(f"{world.name}-raw").glob("*.nc")
    with xr.open_dataset(file) as data:
        for name in ("pm25", "pm10", "so2", "no2", "co", "o3"):
            data[name].loc[{"time": slice("2018-10-07", "2018-10-08")}] = np.nan
        data.to_netcdf(program.folder / "data.nc")
    assert program.topoflow("prepare", program.folder / "data.nc", "-o", program.folder / "data").returncode == 0
    done = program.train(f"data.path={program.folder / 'data'}")
    refused(done, 2, "data.validation", "no target has a valid value")


def test_an_accepted_normalization_is_the_one_that_is_used(program):
    names = ("u", "v", "temp", "rh", "psfc", "pm10", "so2", "no2", "co", "o3", "lat2d", "lon2d", "pm25", "elevation")
    constants = ", ".join(f"{name}: [1, 100]" for name in (*names, "population"))
    assert program.train("train.max_steps=1").returncode == 0
    changed = (f"data.normalization={{{constants}}}", "checkpoint.allow_changed=[data.normalization]")
    assert program.train("train.max_steps=2", *changed).returncode == 0
    assert program.state(step=2)["data"]["normalization"]["pm25"] == [1.0, 100.0]


def test_a_network_interface_that_does_not_exist_is_named(program):
    process = program.start(processes=2, env={"GLOO_SOCKET_IFNAME": "nowhere0"})
    printed, _ = process.communicate(timeout=120)
    assert "GLOO_SOCKET_IFNAME=nowhere0: no such network interface" in printed
    assert "expected one of " in printed
    assert "unknown file" not in printed
