"""launch/srun.sh and the batch scripts, with a SLURM made of a few shell scripts (tests/slurm has a real one)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
BATCH = ("train.sbatch", "lumi.sbatch")
USER = f"tester{os.getpid()}"

# runs its command as the second task of two on a node, and records its options and the signals that it gets
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$SRUN_CPUS_PER_TASK" >> "$NOTES/cpus"
while [[ $1 = -* ]]; do echo "$1" >> "$NOTES/options"; shift; done
for name in USR1 TERM; do trap "echo $name >> $NOTES/signals; kill -s $name \\$task" $name; done
SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=2 "$@" &
task=$!
status=0
while wait $task || status=$?; [ $status -gt 128 ] && kill -0 $task 2>/dev/null; do status=0; done
exit "${SRUN_STATUS:-$status}"
"""
# a mock of the program that records its arguments and environment
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  *topoflow.config*)
    if [ -n "${{CONFIG_WAITS-}}" ]; then
      touch "$NOTES/reading"
      until [ -e "$NOTES/go" ]; do :; done
    fi
    echo "$RUN_DIR" ;;
  -c*) exec {sys.executable} "$@" ;;
  *train.py*)
    printf '%s\\n' "$@" > "$NOTES/arguments"
    env > "$NOTES/environ"
    [ -z "${{WAIT_FOR_USR1-}}" ] || exec {sys.executable} -c "
import pathlib, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
pathlib.Path('$NOTES/waiting').touch()
signal.sigwait([signal.SIGUSR1])
raise SystemExit(75)"
    if [ -n "${{SAVES-}}" ]; then mkdir -p "$RUN_DIR/checkpoints"; echo "$SAVES" > "$RUN_DIR/checkpoints/last"; fi
    if [ -n "${{EXIT_JSON-}}" ]; then echo "$EXIT_JSON" > "$RUN_DIR/exit.json"; fi
    exit "${{TASK_STATUS:-0}}" ;;
esac
"""
NOTE = """#!/usr/bin/env bash
echo "$*" >> "$NOTES/{name}"
{answer}
"""


class Machine:
    """A project's folder with copies of the scripts, and a PATH with mocks of SLURM's commands and Python."""

    def __init__(self, folder: Path):
        self.folder, self.notes, self.run_dir = folder / "a project", folder / "notes", folder / "run"
        for made in (self.folder, self.notes, self.run_dir, folder / "bin"):
            made.mkdir()
        shutil.copytree(LAUNCH, self.folder / "launch")
        for name, text in (
            ("srun", SRUN),
            ("python3", PYTHON),
            ("scontrol", NOTE.format(name="scontrol", answer="exit ${SCONTROL_STATUS:-0}")),
            ("squeue", NOTE.format(name="squeue", answer='cat "$NOTES/state" 2>/dev/null')),
            # the controller answers from the second question on
            ("sleep", NOTE.format(name="sleep", answer='echo RUNNING > "$NOTES/state"')),
        ):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environ = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "NOTES": str(self.notes), "RUN_DIR": str(self.run_dir),
            "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "7", "USER": USER,
        }  # fmt: skip

    def start(self, script: str, **environ: str) -> subprocess.Popen:
        command = ["bash", str(self.folder / "launch" / script), "my config.yaml", "train.max_steps=3"]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environ | environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, script: str, **environ: str) -> tuple[int, str]:
        process = self.start(script, **environ)
        _, output = process.communicate(timeout=60)
        return process.returncode, output

    def read(self, name: str) -> list[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []

    def read_environ(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.read("environ") if "=" in line)


@pytest.fixture
def machine(tmp_path):
    yield Machine(tmp_path)
    for cache in Path("/tmp").glob(f"{USER}-miopen-*"):
        cache.rmdir()


@pytest.mark.parametrize("name", [path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")])
def test_shellcheck_passes(name):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-x", f"launch/{name}"], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def directives(name: str) -> list[str]:
    """Return the #SBATCH lines that SLURM reads: those above the first command."""
    found = []
    for line in (LAUNCH / name).read_text().splitlines():
        if line.startswith("#SBATCH "):
            found.append(line.removeprefix("#SBATCH "))
        elif line.strip() and not line.startswith("#"):
            break
    return found


@pytest.mark.parametrize("name", BATCH)
def test_a_batch_script_has_the_settings_that_the_program_requires(name):
    assert {"--requeue", "--open-mode=append", "--signal=USR1@300", "--output=slurm-%j.out"} <= set(directives(name))
    assert any(option.startswith("--time=") for option in directives(name))
    assert len(directives(name)) == len(re.findall("^#SBATCH ", (LAUNCH / name).read_text(), re.MULTILINE))


def test_lumi_sbatch_asks_for_all_devices_of_a_node_and_a_task_for_each():
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=7"} <= set(directives("lumi.sbatch"))


SITE_BLOCK = re.compile(
    "^# ---- what differs between sites.*?^# ---- end of what differs.*?$", re.MULTILINE | re.DOTALL
)
OF_A_SITE = ("hsn", "lumi", "miopen", "rocr_", "mask_cpu", "partition", "account", "gpus-per-node", "module load")
NEVER = (
    "NCCL_NET_GDR_LEVEL",
    # would disable torch's watchdog, the safety net below the program's own
    "TORCH_NCCL_ENABLE_MONITORING", "ERROR_HANDLING:-0", "NCCL_BLOCKING_WAIT", "TORCH_DISABLE", "NCCL_IB_DISABLE",
)  # fmt: skip


@pytest.mark.parametrize("script", ["srun.sh", "torchrun.sh", *BATCH])
@pytest.mark.parametrize("exists", [True, False])
def test_a_machine_without_torch_is_refused_in_one_line(machine, script, exists):
    tools = machine.folder.parent / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "true", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    if exists:
        (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without packages
        (tools / "python3").chmod(0o755)
    status, error = machine.run(script, PATH=str(tools))
    assert status == 2
    assert error.startswith(f"topoflow: no {machine.folder}/.venv, and python3 has no torch: expected .venv (bash -c ")
    assert error.count("\n") == 1


def test_an_option_of_torchrun_without_its_equals_sign_is_named(machine):
    command = ["bash", "launch/torchrun.sh", "--nproc-per-node", "2", "run.yaml"]
    done = subprocess.run(command, cwd=machine.folder, env=machine.environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("topoflow: --nproc-per-node 2: expected --nproc-per-node=2 ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["env.sh", "srun.sh", "torchrun.sh", *BATCH])
def test_site_settings_are_only_in_their_block_and_none_is_forced(name):
    text = (LAUNCH / name).read_text()
    assert not [word for word in NEVER if word in text]
    outside = re.sub(
        r"launch/lumi\.sbatch|LUMI-G, from|--account=project_\.\.\. ", "", SITE_BLOCK.sub("", text)
    ).lower()
    assert not [word for word in OF_A_SITE if word in outside]
    assert bool(SITE_BLOCK.search(text)) == (name in BATCH)


def test_each_device_of_lumi_has_seven_cores_of_its_own():
    masks = re.search("^cpu_bind=mask_cpu:(.*)$", (LAUNCH / "lumi.sbatch").read_text(), re.MULTILINE)[1].split(",")
    cores = [[core for core in range(64) if int(mask, 16) >> core & 1] for mask in masks]
    # docs.lumi-supercomputer.eu: devices 0-7 are closest to these groups of 8 cores, of which the first is reserved
    assert cores == [list(range(8 * group + 1, 8 * group + 8)) for group in (6, 7, 2, 3, 0, 1, 4, 5)]


def test_a_task_is_the_program_itself(machine):
    process = machine.start("srun.sh", TASK_STATUS="4")
    process.communicate(timeout=60)
    assert process.returncode == 4
    assert machine.read("arguments") == [f"{machine.folder}/train.py", "my config.yaml", "train.max_steps=3"]
    assert machine.read_environ()["OMP_NUM_THREADS"] == "1"


def test_a_signal_to_a_starting_task_is_held_until_the_program_unblocks_it(machine):
    """It would kill a Python that is still starting."""
    (machine.folder / "train.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "pathlib.Path(os.environ['NOTES'], 'starting').touch()\n"
        "time.sleep(0.5)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])\n"
        "time.sleep(30)\n"
    )
    python = machine.folder.parent / "bin/python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    process = machine.start("srun.sh")
    wait_for(machine.notes / "starting")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("script", BATCH)
def test_a_batch_script_runs_the_program_in_each_task_and_gives_its_status(machine, script):
    assert machine.run(script, TASK_STATUS="3") == (3, "")
    assert machine.read("arguments") == [f"{machine.folder}/train.py", "my config.yaml", "train.max_steps=3"]
    assert "--kill-on-bad-exit=1" in machine.read("options")
    assert machine.read("cpus") == ["7"]
    assert machine.read("scontrol") == []


def test_a_task_on_lumi_has_one_device_and_a_cache_of_its_node_and_start(machine):
    assert machine.run("lumi.sbatch", SLURM_RESTART_COUNT="2") == (0, "")
    cache = Path(f"/tmp/{USER}-miopen-17-2-0")
    assert cache.is_dir()
    found = machine.read_environ()
    assert found["ROCR_VISIBLE_DEVICES"] == found["SLURM_LOCALID"] == "1"
    assert found["MIOPEN_USER_DB_PATH"] == found["MIOPEN_CUSTOM_CACHE_DIR"] == str(cache)
    assert found["NCCL_SOCKET_IFNAME"] == "hsn0,hsn1,hsn2,hsn3"
    assert machine.read("options")[1].startswith("--cpu-bind=mask_cpu:0xfe000000000000,")


ARRAY = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("state", "environ", "status", "requeued"),
    [
        ("RUNNING", {"TASK_STATUS": "75"}, 75, ["requeue 17"]),
        ("RUNNING", {"TASK_STATUS": "75", **ARRAY}, 75, ["requeue 12_3"]),
        # a task was killed because another had ended; exit.json of rank 0 has the reason
        ("RUNNING", {"SRUN_STATUS": "137", "EXIT_JSON": json.dumps({"status": 75})}, 75, ["requeue 17"]),
        ("RUNNING", {"SRUN_STATUS": "137", "EXIT_JSON": json.dumps({"status": 5})}, 5, []),
        # killed by SIGINT, SIGUSR1 or SIGTERM while it was starting, or srun itself was
        *(("RUNNING", {"SRUN_STATUS": str(128 + number)}, 75, ["requeue 17"]) for number in (2, 10, 15)),
        ("RUNNING", {"SRUN_STATUS": "137"}, 137, []),
        ("RUNNING", {"TASK_STATUS": "2"}, 2, []),
        ("RUNNING", {}, 0, []),
        # cancelled, or requeued by SLURM: scontrol would restart a cancelled job
        ("COMPLETING", {"TASK_STATUS": "75"}, 75, []),
        ("CANCELLED", {"TASK_STATUS": "75"}, 75, []),
        # the controller does not answer at first
        ("", {"TASK_STATUS": "75"}, 75, ["requeue 17"]),
        ("RUNNING", {"TASK_STATUS": "75", "SCONTROL_STATUS": "1"}, 75, ["requeue 17"] * 3),
    ],
)  # fmt: skip
def test_a_job_that_was_stopped_is_requeued(machine, state, environ, status, requeued):
    (machine.run_dir / "exit.json").write_text(json.dumps({"status": 75}))  # of an earlier start
    (machine.notes / "state").write_text(state)
    assert machine.run("train.sbatch", **environ)[0] == status
    assert machine.read("scontrol") == requeued


def test_a_job_is_no_longer_requeued_after_eight_starts_in_a_row_without_a_new_checkpoint(machine):
    (machine.notes / "state").write_text("RUNNING")

    def start(**environ):
        before = len(machine.read("scontrol"))
        status, output = machine.run("train.sbatch", TASK_STATUS="75", **environ)
        assert status == 75
        assert (len(machine.read("scontrol")) == before) == ("topoflow: not requeued: 8 starts" in output), output
        return not output

    machine.run_dir.rmdir()  # the first starts are too short to create it
    assert all(start() for _ in range(5))
    assert all(start(SAVES=f"step-0000000{step}") for step in (1, 2))
    assert [start() for _ in range(8)] == [True] * 7 + [False]
    assert start(SLURM_JOB_ID="18")  # submitted again


# --signal=B:USR1@300, and TERM, on which srun would kill its tasks
@pytest.mark.parametrize("sent", ["USR1", "TERM"])
def test_a_signal_to_the_batch_script_alone_stops_its_tasks(machine, sent):
    (machine.notes / "state").write_text("RUNNING")
    process = machine.start("train.sbatch", WAIT_FOR_USR1="1")
    wait_for(machine.notes / "waiting")
    process.send_signal(getattr(signal, f"SIG{sent}"))
    _, output = process.communicate(timeout=60)
    assert (process.returncode, machine.read("signals"), machine.read("scontrol")) == (75, ["USR1"], ["requeue 17"])
    assert output == ""


@pytest.mark.parametrize("script", BATCH)
@pytest.mark.parametrize("sent", ["USR1", "TERM"])
def test_a_signal_to_the_batch_script_while_it_reads_the_config_only_requeues(machine, script, sent):
    (machine.notes / "state").write_text("RUNNING")
    process = machine.start(script, CONFIG_WAITS="1")
    wait_for(machine.notes / "reading")
    process.send_signal(getattr(signal, f"SIG{sent}"))
    (machine.notes / "go").touch()
    _, output = process.communicate(timeout=60)
    assert (process.returncode, machine.read("scontrol"), output) == (75, ["requeue 17"], "")
    assert machine.read("arguments") == []


def test_the_term_that_a_requeue_causes_does_not_interrupt_it(machine):
    """It would be repeated after 20 s, and SLURM would kill the script before."""
    (machine.notes / "state").write_text("RUNNING")
    scontrol = machine.folder.parent / "bin/scontrol"
    scontrol.write_text('#!/usr/bin/env bash\necho "$*" >> "$NOTES/scontrol"\nkill -s TERM $PPID $$\n')
    assert machine.run("train.sbatch", TASK_STATUS="75") == (75, "")
    assert machine.read("scontrol") == ["requeue 17"]
