import json
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SAY_WHO = (sys.executable, str(Path(__file__).parent / "say_who.py"))


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


def groups_of(cluster, *command: str) -> list[dict]:
    """Return the output of rank 0 of each group of processes that the command started."""
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_uneven_step_numbers_its_tasks_over_the_nodes(cluster):
    # SLURM_STEP_TASKS_PER_NODE is "3,1"
    [said] = groups_of(cluster, "srun", "-w", "n[1-2]", "-n4", "-m", "plane=3", *SAY_WHO)
    assert said["everyone"] == [[0, 0, 3, 0, "n1"], [1, 1, 3, 0, "n1"], [2, 2, 3, 0, "n1"], [3, 0, 1, 1, "n2"]]
    assert said["said"].startswith("srun, 4 process(es) on 2 node(s), meeting at n1:")
    assert "of 4 tasks" in said["reason"]


PORT = 23000 + os.getpid() % 1000
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
C10D = (*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=7")
STATIC = (*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=n1", f"--master-port={PORT}", "--node-rank")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (shlex.join([*C10D, f"--rdzv-endpoint=n1:{PORT}", SAY_WHO[1]]), "meeting at n"),
        (f"{shlex.join(STATIC)} $SLURM_NODEID {SAY_WHO[1]}", f"meeting at n1:{PORT}"),
    ],
    ids=["c10d", "static"],
)
def test_srun_starts_torchrun(cluster, command, said):
    [group] = groups_of(cluster, "srun", "-w", "n[1-2]", "-n2", "bash", "-c", f"exec {command}")
    assert group["said"].startswith(f"torchrun, 2 process(es) on 2 node(s), {said}")
    assert group["reason"].endswith("which take precedence over SLURM's")
    assert [who[:2] for who in group["everyone"]] == [[0, 0], [1, 0]]
    assert {who[4] for who in group["everyone"]} == {"n1", "n2"}


def test_two_jobs_on_the_same_nodes_do_not_collide(cluster):
    # each waits until both are running
    command = ("srun", "-w", "n[1-2]", "-n2", *SAY_WHO, "2")
    with ThreadPoolExecutor(2) as pool:
        [[one], [other]] = pool.map(lambda _: groups_of(cluster, *command), range(2))
    for group in (one, other):
        assert group["said"].startswith("srun, 2 process(es) on 2 node(s), meeting at n1:")
    assert one["said"] != other["said"]


def test_a_shell_or_batch_script_is_one_process_although_its_job_has_more_tasks(cluster):
    [shell] = groups_of(cluster, "salloc", "-Q", "-N2", "-n4", *SAY_WHO)
    assert shell["said"] == "single process, 1 process(es)"
    assert shell["reason"].endswith(
        "not a task of a step, although the job has 4 tasks: srun launch/srun.sh starts that many"
    )
    # a terminal on a node (srun --pty bash), which is a step of one task in a job for four
    terminal = ("srun", "-n1", "-N1", "bash", "-c", shlex.join(SAY_WHO))
    [in_terminal] = groups_of(cluster, "salloc", "-Q", "-N2", "-n4", *terminal)
    assert in_terminal["said"] == "srun, 1 process(es)"
    assert in_terminal["reason"].endswith("of 1 task")
    job = cluster.send("-N2", "-n4", "--output=job.out", "--wrap", shlex.join(SAY_WHO))
    assert cluster.wait_for(job) == 0
    assert json.loads((cluster.folder / "job.out").read_text()) == {
        **shell, "reason": shell["reason"].replace(shell["reason"].split()[8], f"{job},"),
        "everyone": [[0, 0, 1, 0, cluster.describe(job, "BatchHost")]],
    }  # fmt: skip


EXPORTED = ("RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0", "MASTER_ADDR=n1", "MASTER_PORT=29500")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("env", *EXPORTED, "srun", "-N2", "-n2", "-K", *SAY_WHO), ["RANK=0 with SLURM_PROCID=1"]),
        (("srun", "-m", "arbitrary", "-w", "n2,n1", "-n2", *SAY_WHO), ["SLURM_DISTRIBUTION=arbitrary", "MASTER_ADDR"]),
    ],
    ids=["exported rank", "arbitrary"],
)
def test_a_contradiction_ends_a_step_at_once(cluster, command, words):
    srun = cluster.run(*command, timeout=60)  # shorter than the set-up's limit
    assert srun.returncode != 0
    for word in words:
        assert word in srun.stderr


def test_rank_0_on_another_node_than_the_first_is_found_by_master_addr(cluster):
    srun = ("srun", "-m", "arbitrary", "-w", "n2,n1", "-n2")
    [said] = groups_of(cluster, "env", "MASTER_ADDR=n2", *srun, *SAY_WHO)
    assert [who[4] for who in said["everyone"]] == ["n2", "n1"]


def test_a_batch_script_submitted_from_inside_a_step_does_not_wait_for_its_tasks(cluster):
    """sbatch passes on all variables, including those of the step."""
    send = shlex.join(["sbatch", "--wait", "--output=job.out", "-w", "n1", "-n1", "--wrap", shlex.join(SAY_WHO)])
    cluster.run("srun", "-w", "n[3-4]", "-n2", "bash", "-c", f"[ $SLURM_PROCID = 1 ] || {send}")
    said = (cluster.folder / "job.out").read_text()
    assert "SLURMD_NODENAME=n1 with SLURM_STEP_NODELIST=n[3-4]" in said


# the site settings of the shipped job request more than these nodes have
SMALL = (
    "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=0", "--partition=main", "--mem=100",
)  # fmt: skip


@pytest.fixture
def project(cluster):
    """A copy of the project, to submit a job from."""
    project = cluster.folder / "a project"
    for name in ("launch", "topoflow"):
        shutil.copytree(LAUNCH.parent / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(LAUNCH.parent / "train.py", project)
    return project


def submit_shipped_job(cluster, project: Path, *overrides: str, script: str = "train.sbatch", options=()) -> str:
    script = str(project / "launch" / script)
    return cluster.send(*SMALL, *options, f"--chdir={project}", script, str(cluster.config), "run.dir=run", *overrides)


def test_the_shipped_job_submitted_from_another_folder_is_refused(cluster):
    job = cluster.send(*SMALL, str(LAUNCH / "train.sbatch"), "run.yaml")
    assert cluster.wait_for(job) == 2
    [said] = [path.read_text() for path in cluster.folder.glob("slurm-*.out")]
    assert said.count("\n") == 1
    assert "no launch/srun.sh" in said


def test_the_shipped_job_is_requeued_after_the_time_limit_signal_and_finishes(cluster, project):
    job, metrics = submit_shipped_job(cluster, project, "train.max_steps=400"), project / "run/metrics.jsonl"
    cluster.wait_until(lambda: metrics.exists() and '"step": 5,' in metrics.read_text())
    cluster.run("scancel", "--signal=USR1", job)  # what --signal=USR1@300 sends before the time limit
    cluster.wait_until(lambda: '"event": "resume"' in metrics.read_text())
    status, said = cluster.wait_for(job), "".join(path.read_text() for path in project.glob("slurm-*.out"))
    assert status == 0, said
    assert "srun, 2 process(es)" in said
    assert [step for step, _ in losses(project / "run")] == list(range(1, 401))
    assert json.loads((project / "run/exit.json").read_text())["status"] == 0


def test_a_job_with_a_task_that_refuses_to_start_is_not_requeued_without_end(cluster, project):
    """srun then sends TERM to the other tasks, which looks like a request to stop."""
    assert cluster.wait_for(submit_shipped_job(cluster, project, "train.max_steps=1")) == 0
    script = project / "launch" / "srun.sh"  # as from a profile of that node
    broken = '[ "$SLURM_NODEID" = 0 ] || export RANK=7\n'
    script.write_text(script.read_text().replace("set -euo pipefail\n", f"set -euo pipefail\n{broken}"))
    job = submit_shipped_job(cluster, project, "train.max_steps=2", options=("--hold",))
    (project / "run/.stopped-early").write_text(f"{job} step-00000001 6\n")  # two of eight starts are left
    cluster.run("scontrol", "release", job)
    assert cluster.wait_for(job) == 75
    output = (project / f"slurm-{job}.out").read_text()
    assert int(cluster.describe(job, "Restarts")) == 1
    assert output.count("RANK=7 with SLURM_PROCID=1") == 2  # once per start
    assert "topoflow: not requeued: 8 starts in a row" in output


def test_the_job_for_lumi_trains_with_a_cache_on_each_node(cluster, project):
    script = project / "launch" / "lumi.sbatch"  # with the interface of this cluster's nodes
    script.write_text(script.read_text().replace("GLOO_SOCKET_IFNAME=hsn0", "GLOO_SOCKET_IFNAME=eth0"))
    job = submit_shipped_job(cluster, project, "train.max_steps=2", "run.device=cpu", script="lumi.sbatch")
    status, said = cluster.wait_for(job), "".join(path.read_text() for path in project.glob("slurm-*.out"))
    caches = sorted(Path("/tmp").glob(f"*-miopen-{job}-0-*"))
    for cache in caches:
        cache.rmdir()
    assert status == 0, said
    assert "srun, 2 process(es) on 2 node(s)" in said
    assert [cache.name[-4:] for cache in caches] == ["-0-0", "-0-1"]
