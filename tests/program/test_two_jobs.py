"""Two jobs on one run directory: one is refused, or the other finds that it was replaced."""

import os
import signal
import time

import pytest

from topoflow.lease import Lease
from topoflow.trainer import Trainer

ENDLESS = ("train.max_steps=100000", "data.validation=[]", "checkpoint.every_steps=1")


def contents(run):
    """Return the bytes of every file, except curves (each process has its own) and files being written."""
    paths = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    return {path: (run / path).read_bytes() for path in paths if "tensorboard" not in path and ".writing-" not in path}


def stopped_in_training(program, *overrides, **environ):
    """A job paused by SIGSTOP after its first checkpoint."""
    process = program.start(*ENDLESS, *overrides, env=environ)
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    while not list(program.folder.glob("run/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    return process


def newest_step(program):
    return max(int(path.name.removeprefix("step-")) for path in program.folder.glob("run/checkpoints/step-*"))


def test_the_second_is_refused_and_follows_at_once_when_the_first_is_killed(program):
    first = stopped_in_training(program, "data.threads=2")
    try:
        before = contents(program.folder / "run")
        refused = program.train(*ENDLESS)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert f"in use by process {first.pid} on " in refused.stderr
        assert contents(program.folder / "run") == before
    finally:
        first.kill()
    first.wait()
    followed = program.train(*ENDLESS, f"train.max_steps={newest_step(program) + 2}")
    assert followed.returncode == 0, followed.stderr
    first.stdout.close()


def assert_ended_as_replaced(output, status):
    assert status == 2, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].endswith("generation 2; this process held generation 1: nothing was written")
    assert len({line for line in output.splitlines() if "taken over by process" in line}) == 1


def test_a_restart_takes_over_from_a_stopped_job_which_changes_nothing_when_it_wakes(program, monkeypatch):
    first = stopped_in_training(program, "data.threads=0", SLURM_JOB_ID="17")
    try:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        followed = program.train(*ENDLESS, "data.threads=0", f"train.max_steps={newest_step(program) + 2}")
        assert followed.returncode == 0, followed.stderr
        warning = f"warning: run.dir {program.folder / 'run'}: taken over from an earlier start of this job"
        assert warning in followed.stderr
        assert warning.partition(": ")[2] in (program.folder / "run" / "train.log").read_text()
        before = contents(program.folder / "run")
        first.send_signal(signal.SIGCONT)
        assert_ended_as_replaced(first.communicate(timeout=60)[0], first.returncode)
    finally:
        first.kill()
    assert contents(program.folder / "run") == before


# the first write after the takeover: a line of metrics.jsonl, or a checkpoint
@pytest.mark.parametrize("log_every_steps", [1, 1000])
def test_a_job_that_was_replaced_between_two_steps_writes_nothing_more(program, monkeypatch, log_every_steps):
    successor, before, step = Lease(program.folder / "run", "17", 1), {}, Trainer.train_step

    def step_and_lose(self, *arguments, **options):
        result = step(self, *arguments, **options)
        if self.state.progress.step == 2 and not before:
            successor.take()
            before.update(contents(program.folder / "run"))
        return result

    monkeypatch.setattr(Trainer, "train_step", step_and_lose)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    options = ("data.threads=0", "train.max_steps=20", f"train.log_every_steps={log_every_steps}")
    ended = program.train(*ENDLESS, *options)
    assert_ended_as_replaced(ended.stderr, ended.returncode)
    assert contents(program.folder / "run") == before
    successor.release()
