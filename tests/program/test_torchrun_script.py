"""launch/torchrun.sh: torchrun, with the program's own exit status."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"


@pytest.fixture
def torchrun(program):
    """A function that starts the script with two processes on the small world, as from a terminal."""

    def heed_ctrl_c():
        # background jobs of a shell ignore it, as these tests may, and bash cannot trap an inherited ignored signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    started = []

    def start(*overrides, stdout=subprocess.PIPE):
        command = ["bash", str(SCRIPT), "--nproc-per-node=2", str(program.config), f"run.dir={program.folder / 'run'}"]
        process = subprocess.Popen(
            [*command, *overrides],
            stdout=stdout, stderr=subprocess.STDOUT, text=True, env=program.environment(), cwd=program.folder,
            preexec_fn=heed_ctrl_c,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def wait_for_step(program, step, process):
    deadline = time.monotonic() + 120
    path = program.folder / "run" / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached")


def test_it_trains_as_torchrun_does(torchrun, assert_same_run):
    process = torchrun()
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "torchrun, 2 process(es)" in output
    assert_same_run(2)


def test_a_config_that_cannot_be_used_ends_before_anything_is_launched(torchrun):
    process = torchrun("train.max_step=3")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 2
    assert output.count("\n") == 1
    assert "train.max_steps" in output


def test_data_that_are_missing_end_with_2_and_not_with_torchruns_1(torchrun):
    process = torchrun("data.path=nowhere")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 2, output


# SLURM sends SIGUSR1 before a time limit; it would kill torchrun itself
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_ends_in_a_checkpoint_and_75(program, torchrun, undisturbed, number):
    process = torchrun("train.max_steps=100000")
    wait_for_step(program, 4, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 75, output
    [end] = program.events(kind="end")
    assert (program.folder / "run" / "checkpoints" / f"step-{end['step']:08d}").is_dir()
    assert torchrun(f"train.max_steps={max(20, end['step'] + 1)}").wait() == 0
    losses, _ = undisturbed(2)
    assert {step: loss for step, loss in program.losses().items() if step <= 20} == losses


def test_an_earlier_runs_exit_json_is_ignored(program, torchrun):
    (program.folder / "run").mkdir()
    (program.folder / "run" / "exit.json").write_text(json.dumps({"status": 3, "reason": "an earlier run"}))
    process = torchrun("train.max_steps=100000")
    wait_for_step(program, 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
    for worker in workers:
        subprocess.run(["kill", "-KILL", worker], check=False)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 1, output


def test_a_run_directory_in_use_is_refused_before_anything_is_launched(program, torchrun, tmp_path):
    log = tmp_path / "holder.log"
    with log.open("w") as stdout:
        holder = torchrun("train.max_steps=100000", stdout=stdout)
    wait_for_step(program, 2, holder)
    second = torchrun()
    output, _ = second.communicate()
    assert second.returncode == 2, output
    assert output.count("\n") == 1
    assert "in use" in output
    holder.send_signal(signal.SIGTERM)
    assert holder.wait() == 75, log.read_text()
