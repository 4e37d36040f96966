"""What happens to the terminal of a run must not change how the run ends."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ("train.max_steps=4", "data.validation=[]", "data.threads=0")


def assert_whole(program):
    assert program.exit_record()["status"] == 0
    assert sorted(program.losses()) == [1, 2, 3, 4]
    assert "step 4/4" in (program.folder / "run" / "train.log").read_text()


@pytest.mark.parametrize(("before", "steps", "status"), [([], 100000, 75), (["nohup"], 12, 0)])
def test_a_terminal_that_closes_ends_in_a_checkpoint_unless_nohup_is_used(program, before, steps, status):
    main, side = pty.openpty()
    command = [*before, *program.command(f"train.max_steps={steps}", "data.validation=[]", "data.threads=0")]

    def take_terminal():
        os.setsid()
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    # nohup would otherwise write nohup.out
    output = subprocess.DEVNULL if before else side
    process = subprocess.Popen(
        command, stdin=side, stdout=output, stderr=output, env=program.environment(), preexec_fn=take_terminal
    )
    os.close(side)
    metrics = program.folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes()):
        assert process.poll() is None
        time.sleep(0.01)
    os.close(main)
    assert process.wait(timeout=120) == status
    last = program.events(kind="train")[-1]["step"]
    assert program.events(kind="end")[0]["step"] == last
    assert (program.folder / "run" / "checkpoints" / f"step-{last:08d}").is_dir()
    assert program.exit_record()["status"] == status


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_without_stderr_trains(program, closed):
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *program.command(*SHORT)]
    assert subprocess.run(command, env=program.environment()).returncode == 0
    assert_whole(program)


def test_a_run_whose_stderr_has_no_reader_any_more_trains(program):
    process = program.start(*SHORT)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert_whole(program)


def test_a_refusal_that_nobody_reads_has_its_status(program):
    reader, writer = os.pipe()
    os.close(reader)
    command = program.command("model.depth=0")
    assert subprocess.run(command, stderr=writer, env=program.environment()).returncode == 2
    os.close(writer)


@pytest.mark.parametrize(
    "command",
    [
        f"{sys.executable} -m topoflow.run_dir",
        f"{sys.executable} -m topoflow.config_io --print run.dir none.yaml",
        f"{sys.executable} -m topoflow.config_io --print run.dir README.md",
        "bash launch/torchrun.sh none.yaml",
        "bash launch/torchrun.sh",
    ],
)
def test_a_launch_script_without_stderr_has_its_status(program, command):
    environ = program.environment({"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], cwd=ROOT, env=environ, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("command", ["inspect RUN", "inspect RUN --json", "prepare RAW -o out", "doctor"])
def test_a_full_disk_behind_stdout_is_one_line(program, world, command):
    assert program.train(*SHORT).returncode == 0
    words = [{"RUN": str(program.folder / "run"), "RAW": f"{world}-raw"}.get(word, word) for word in command.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "topoflow", *words],
            cwd=program.folder, env=program.environment(), stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "topoflow: stdout: cannot be written: No space left on device"
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_a_reader_of_stdout_that_leaves_does_not_change_the_status(program):
    assert program.train(*SHORT).returncode == 0
    inspect = [sys.executable, "-m", "topoflow", "inspect", str(program.folder / "run")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(inspect, env=program.environment(), stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def has_loaded(process, library):
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    "program_arguments", [["train.py", "configs/demo.yaml"], ["-m", "topoflow", "evaluate", "runs/nowhere"]]
)
@pytest.mark.parametrize(("library", "delay"), [("libtorch_cpu", 0.0), ("libtorch_python", 0.05)])
def test_interrupted_while_it_imports_a_program_prints_one_line(program_arguments, library, delay):
    process = subprocess.Popen(
        [sys.executable, *program_arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not has_loaded(process, library):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "topoflow: interrupted\n")
