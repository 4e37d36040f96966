"""A run that was stopped and resumed ends bit-identical to one that never stopped."""

import functools
import json
import os
import shutil
import signal
import time

import pytest
from seen_samples import note_samples, noted_samples
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from topoflow.errors import RunDirectoryError
from topoflow.lease import Lease
from topoflow.logs import MetricsWriter
from topoflow.trainer import Trainer


def stop_after(process, step, number):
    """Send a signal once the step has been logged; return the output of the process."""
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
            break
    output.append(process.communicate()[0])
    return "".join(output)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_stopped_at_a_step_and_resumed(program, assert_same_run, processes):
    # step 13, with 7 per epoch: in the middle of an epoch, between two checkpoints; max_steps may be raised
    first = program.train("train.max_steps=13", processes=processes)
    assert first.returncode == 0, first.stderr
    resumed = program.train(processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert "weights 48/48" in resumed.stderr
    assert "moments 48/48" in resumed.stderr
    # the shorter run also validated at its end, which `progress` counts
    assert_same_run(processes, parts=("model", "optimizer", "scheduler"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_commits_a_checkpoint_and_the_run_resumes(program, undisturbed, number):
    process = program.start("train.max_steps=100000")
    output = stop_after(process, 9, number)
    assert process.returncode == 75, output
    assert f"stopped by {number.name} after step" in output
    assert "Traceback" not in output
    assert program.exit_record()["status"] == 75
    stopped = program.events(kind="end")[0]["step"]
    assert (program.folder / "run" / "checkpoints" / f"step-{stopped:08d}").is_dir()
    assert program.train(f"train.max_steps={max(20, stopped + 1)}").returncode == 0
    losses, _ = undisturbed(1)
    assert {step: loss for step, loss in program.losses().items() if step <= 20} == losses
    assert program.exit_record() == {"status": 0, "reason": "done"}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed(program, assert_same_run, processes):
    process = program.start("data.threads=0", processes=processes)
    output = stop_after(process, 8, signal.SIGKILL)
    assert process.returncode != 0, output
    wait_until_free(program.folder / "run")
    assert program.train(processes=processes).returncode == 0
    assert_same_run(processes)


def wait_until_free(run):
    """Wait while the processes of a killed launcher still hold the run directory."""
    for _ in range(600):
        try:
            return Lease(run).check()
        except RunDirectoryError:
            time.sleep(0.1)
    raise AssertionError("the run directory is still held")


def test_the_report_lists_what_was_restored(program):
    assert program.train("train.max_steps=7").returncode == 0
    resumed = program.train("train.max_steps=8")
    report = json.loads((program.folder / "run" / "resume.json").read_text())
    assert report["step"] == 7
    assert (report["weights"], report["weights_expected"], report["moments"], report["moments_expected"]) == (48,) * 4
    assert report["new"] == report["moved"] == []
    assert set(report["learning_rates"]) == {"vit_blocks", "wind_embedding", "head", "others"}
    assert "step-00000007" in report["from"]
    assert "lines after step 7 moved to metrics-abandoned.jsonl" in resumed.stderr


def test_tensorboard_curves_continue_without_overlap(program):
    assert program.train("train.max_steps=9").returncode == 0
    shutil.rmtree(program.folder / "run" / "checkpoints" / "step-00000009")  # so that steps 7-9 run twice
    time.sleep(1)  # TensorBoard sorts the files of one second by their number as text: 10 before 9
    assert program.train("train.max_steps=12").returncode == 0
    reader = EventAccumulator(str(program.folder / "run" / "tensorboard"))
    reader.Reload()
    assert [point.step for point in reader.Scalars("loss/train")] == list(range(1, 13))
    assert sorted(program.losses()) == list(range(1, 13))


def test_resuming_a_finished_run_changes_nothing(program, undisturbed):
    assert program.train("train.max_steps=6").returncode == 0
    before = program.losses()
    again = program.train("train.max_steps=6")
    assert again.returncode == 0, again.stderr
    assert program.losses() == before


def test_rerunning_from_the_resolved_config_is_the_same_run(program, undisturbed):
    assert program.train("train.max_steps=5", "optim.schedule_length=null").returncode == 0
    program.config = program.folder / "run" / "config.yaml"
    assert program.train(run="again").returncode == 0
    assert program.losses("again") == program.losses("run")


def test_a_raised_length_keeps_the_schedule(program):
    options = ("optim.schedule_length=null",)
    assert program.train(*options, "train.max_steps=6").returncode == 0
    assert program.train(*options, "train.max_steps=8").returncode == 0
    assert program.state(step=8)["config"]["optim"]["schedule_length"] == 6


@pytest.mark.slow
def test_another_world_size_continues_with_the_same_samples(program, forked):
    """Saved by 2 ranks in the middle of an epoch and resumed by 1 and by 4: the next samples are those of 2 ranks."""

    options = ("train.max_steps=30", "checkpoint.every_steps=10", "data.validation=[]", "data.threads=0")

    def train(processes, *overrides):
        folder, run = program.folder / f"seen-{processes}", f"{processes}"
        folder.mkdir()
        arguments = program.command(*options, *overrides, run=run)[2:]
        ending = forked.run(arguments, processes, prepare=functools.partial(note_samples, folder))
        assert ending.done, ending.output
        return noted_samples(folder), {step: float.fromhex(loss) for step, loss in program.losses(run).items()}

    seen, losses = train(2)
    first_epoch = [index for step in range(1, 17) for index in seen[step]]
    assert len(first_epoch) == len(set(first_epoch)) == 16 * 16
    saved = program.folder / "2" / "checkpoints" / "step-00000010"
    for processes in (1, 4):
        seen_now, losses_now = train(processes, f"checkpoint.resume={saved}")
        assert list(losses_now) == list(range(11, 31))
        assert seen_now == {step: seen[step] for step in range(11, 31)}
        for step, loss in losses_now.items():
            assert loss == pytest.approx(losses[step], rel=1e-6), step


def test_the_best_pointer_survives_a_kill_before_it_was_written(program):
    assert program.train("train.max_steps=9").returncode == 0
    folder = program.folder / "run" / "checkpoints"
    (folder / "best").unlink()
    shutil.rmtree(folder / "step-00000009")
    (folder / ".writing-step-00000010-1").mkdir()
    assert program.train("train.max_steps=9").returncode == 0
    validated = {event["step"]: event["loss"] for event in program.events(kind="validation")}
    assert (folder / "best").read_text().split()[0] == f"step-{min(validated, key=validated.get):08d}"
    assert not (folder / ".writing-step-00000010-1").exists()


def test_the_best_is_the_lowest_validation_and_old_checkpoints_are_deleted(program):
    options = (
        "train.validate_every_steps=2",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
        "train.max_steps=9",
    )
    assert program.train(*options).returncode == 0
    validated = {event["step"]: event["loss"] for event in program.events(kind="validation")}
    best = min(validated, key=validated.get)
    folder = program.folder / "run" / "checkpoints"
    assert (folder / "best").read_text().split()[0] == f"step-{best:08d}"
    kept = {int(path.name.removeprefix("step-")) for path in folder.glob("step-*")}
    assert kept == {8, 9, best}


def test_a_named_checkpoint_of_another_run_and_its_requeue(program):
    assert program.train("train.max_steps=6").returncode == 0
    asked = f"checkpoint.resume={program.folder / 'run'}"
    assert program.train(asked, "train.max_steps=8", run="second").returncode == 0
    assert sorted(program.losses("second")) == [7, 8]
    requeued = program.train(asked, "train.max_steps=10", run="second")
    assert requeued.returncode == 0, requeued.stderr
    assert sorted(program.losses("second")) == [7, 8, 9, 10]


def test_a_named_older_checkpoint_rewinds_the_run(program):
    assert program.train("train.max_steps=8", "checkpoint.every_steps=2").returncode == 0
    folder = program.folder / "run" / "checkpoints"
    assert program.train("train.max_steps=5", f"checkpoint.resume={folder / 'step-00000004'}").returncode == 0
    assert sorted(program.losses()) == [1, 2, 3, 4, 5]
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert names == [
        "abandoned-step-00000006",
        "abandoned-step-00000008",
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]


def test_a_crash_in_the_middle_of_a_rewind_leaves_no_later_checkpoint_to_be_taken(program, monkeypatch):
    assert program.train("train.max_steps=8", "checkpoint.every_steps=2").returncode == 0
    rewind = f"checkpoint.resume={program.folder / 'run' / 'checkpoints' / 'step-00000004'}"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "resume", lambda *arguments: 1 / 0)  # after resume.json, before the first step
        with pytest.raises(ZeroDivisionError):
            program.train(rewind, "train.max_steps=6")
    for asked in (rewind, "checkpoint.resume=auto"):
        done = program.train(asked, "train.max_steps=6")
        assert done.returncode == 0, done.stderr
        assert sorted(program.losses()) == [1, 2, 3, 4, 5, 6]


def test_a_warning_reports_that_a_checkpoint_requested_before_is_not_taken_again(program):
    assert program.train("train.max_steps=4", "checkpoint.every_steps=2").returncode == 0
    folder = program.folder / "run" / "checkpoints"
    rewind = f"checkpoint.resume={folder / 'step-00000002'}"
    assert program.train(rewind, "train.max_steps=3").returncode == 0
    again = program.train(rewind, "train.max_steps=5")
    assert again.returncode == 0
    assert "started from" in again.stderr
    assert "resumes from step-00000003" in again.stderr
    newest = f"checkpoint.resume={folder / 'step-00000005'}"
    assert program.train(newest, "train.max_steps=5").returncode == 0
    state = folder / "step-00000005" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    damaged = program.train(newest, "train.max_steps=6")
    assert damaged.returncode == 3  # an explicit path is never skipped
    assert "step-00000005: state.pt has" in damaged.stderr


def test_a_report_of_an_earlier_resume_that_cannot_be_read(program):
    assert program.train("train.max_steps=2").returncode == 0
    (program.folder / "run" / "resume.json").write_bytes(b"")
    done = program.train(f"checkpoint.resume={program.folder / 'run'}", "train.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert "resume.json: unreadable" in done.stderr


def test_a_resume_of_another_run_with_no_step_left_is_complete(program):
    test = ("data.test=[[2018-10-09, 2018-10-10]]", "train.max_steps=2")
    assert program.train(*test[1:]).returncode == 0
    done = program.train(*test, f"checkpoint.resume={program.folder / 'run'}", run="second")
    assert done.returncode == 0, done.stderr
    assert program.state("second", step=2)["progress"]["step"] == 2
    assert (program.folder / "second" / "evaluation" / "scores.json").is_file()


def test_a_fine_tune_with_channels_in_another_order_is_refused(program):
    assert program.train("train.max_steps=1").returncode == 0
    reversed_targets = "data.targets=[o3, co, no2, so2, pm10, pm25]"
    init = f"checkpoint.init_from={program.folder / 'run'}"
    done = program.train(init, reversed_targets, "train.max_steps=1", run="tuned")
    assert done.returncode == 2
    assert "data.targets: ['pm25'" in done.stderr
    allowed = program.train(
        init, reversed_targets, "checkpoint.allow_changed=[data.targets]", "train.max_steps=1", run="tuned"
    )
    assert allowed.returncode == 0, allowed.stderr
    assert "fine-tune from" in allowed.stderr


def test_an_allowed_change_of_the_epochs_length_takes_the_schedule_of_the_config(program):
    options = ("optim.schedule_interval=epoch", "optim.schedule_length=20", "checkpoint.every_steps=1")
    assert program.train(*options, "train.max_steps=16").returncode == 0  # an epoch
    shorter = "data.train=[[2018-10-01, 2018-10-04]]"
    done = program.train(*options, shorter, "checkpoint.allow_changed=[data.train]", "train.max_steps=17")
    assert done.returncode == 0, done.stderr
    assert "from the config, as checkpoint.allow_changed permits" in done.stderr


def test_a_run_that_began_with_an_empty_batch_resumes(program, without_targets_in_step):
    without_targets_in_step(1)
    options = ("data.threads=0", "data.validation=[]")
    assert program.train(*options, "train.max_steps=1").returncode == 0
    assert program.state(step=1)["optimizer"]["state"] == {}
    done = program.train(*options, "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert len(program.state(step=2)["optimizer"]["state"]) == 48


def test_a_validation_interrupted_by_a_signal_is_done_after_the_resume(program, assert_same_run, monkeypatch):
    to_device = Trainer._to_device

    def meet_signal(self, batch):
        if self.context.watch.phase == "validation after step 8":
            os.kill(os.getpid(), signal.SIGUSR1)
        return to_device(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_to_device", meet_signal)
        done = program.train()
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGUSR1 after step 8" in done.stderr
    assert not program.events(kind="validation")
    # as if the resumed run had been killed between that line and its checkpoint
    with (program.folder / "run" / "metrics.jsonl").open("a") as lines:
        lines.write('{"event": "validation", "step": 8, "loss": 0.0}\n')
    assert program.train().returncode == 0
    assert_same_run(1)
    assert [event["step"] for event in program.events(kind="validation")] == [8, 16, 20]
