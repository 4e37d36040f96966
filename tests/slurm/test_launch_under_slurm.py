import json
import shlex
import shutil
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


def losses(run_dir: Path) -> list[tuple[int, str]]:
    events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss_hex"]) for event in events if event["event"] == "train"]


def test_two_tasks_on_two_nodes_train_as_two_processes_of_torchrun(cluster):
    srun = cluster.run("srun", "-N2", "-n2", str(LAUNCH / "srun.sh"), "run.yaml", "run.dir=by srun")
    assert srun.returncode == 0, srun.stderr
    assert "srun, 2 process(es)" in srun.stderr
    torchrun = cluster.run("bash", str(LAUNCH / "torchrun.sh"), "--nproc-per-node=2", "run.yaml", "run.dir=by torchrun")
    assert torchrun.returncode == 0, torchrun.stderr
    assert [step for step, _ in losses(cluster.folder / "by srun")] == [1, 2, 3, 4, 5, 6]
    assert losses(cluster.folder / "by srun") == losses(cluster.folder / "by torchrun")


def test_a_refusal_is_the_exit_status_of_srun(cluster):
    srun = cluster.run("srun", "-N2", "-n2", str(LAUNCH / "srun.sh"), "run.yaml", "data.path=nowhere")
    assert srun.returncode == 2, srun.stderr
    assert srun.stderr.count("nowhere") == 1


def test_an_uneven_step_numbers_its_tasks_over_the_nodes(cluster):
    # 3 tasks on one node and 1 on another: SLURM_STEP_TASKS_PER_NODE is "3,1"
    srun = cluster.run("srun", "-N2", "-n4", "-m", "plane=3", str(LAUNCH / "srun.sh"), "run.yaml", "run.dir=uneven")
    assert srun.returncode == 0, srun.stderr
    assert [step for step, _ in losses(cluster.folder / "uneven")] == [1, 2, 3, 4, 5, 6]


def test_a_batch_script_is_one_process_although_its_job_has_tasks_for_more(cluster):
    script = cluster.folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{shlex.quote(str(LAUNCH / 'srun.sh'))} run.yaml run.dir=batch\n")
    job = cluster.send("-N2", "-n4", "--output=job.out", "job.sh")
    status, said = cluster.wait_for(job), (cluster.folder / "job.out").read_text()
    assert status == 0, said
    assert "single process, 1 process(es)" in said


# the shipped job's lines for a site ask for more than these nodes have
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=0")


@pytest.fixture
def project(cluster):
    """A copy of the project, as a job is sent from there."""
    project = cluster.folder / "a project"
    for name in ("launch", "topoflow"):
        shutil.copytree(LAUNCH.parent / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(LAUNCH.parent / "train.py", project)
    return project


def send_shipped_job(cluster, project: Path, *overrides: str) -> str:
    script = str(project / "launch/train.sbatch")
    return cluster.send(*SMALL, f"--chdir={project}", script, str(cluster.config), "run.dir=run", *overrides)


def test_the_shipped_job_sent_from_elsewhere_is_told_so(cluster):
    job = cluster.send(*SMALL, str(LAUNCH / "train.sbatch"), "run.yaml")
    assert cluster.wait_for(job) == 2
    [said] = [path.read_text() for path in cluster.folder.glob("slurm-*.out")]
    assert said.count("\n") == 1
    assert "no launch/srun.sh" in said


def test_the_shipped_job_when_warned_goes_back_into_the_queue_and_finishes(cluster, project):
    job, metrics = send_shipped_job(cluster, project, "train.max_steps=400"), project / "run/metrics.jsonl"
    cluster.wait_until(lambda: metrics.exists() and '"step": 5,' in metrics.read_text())
    cluster.run("scancel", "--signal=USR1", job)  # what --signal=USR1@300 sends before the time limit
    cluster.wait_until(lambda: '"event": "resume"' in metrics.read_text())
    status, said = cluster.wait_for(job), "".join(path.read_text() for path in project.glob("slurm-*.out"))
    assert status == 0, said
    assert "srun, 2 process(es)" in said
    assert [step for step, _ in losses(project / "run")] == list(range(1, 401))
    assert json.loads((project / "run/exit.json").read_text())["status"] == 0
