"""The program of a campaign's jobs: train.py, which pauses at a planned place until a disturbance has been sent.

A signal from outside, such as by scancel, cannot be timed to a few milliseconds. So a plan (a small file that the
campaign writes before the job starts) names a place. The process that reaches it writes a note and waits there until
the campaign reports that its signal is on its way. Nothing else differs from `python train.py`.
"""

import dataclasses
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BEFORE_IMPORTS = "while Python is started"
LONGEST_SECONDS = 30.0
AFTERWARDS_SECONDS = 0.3  # from the campaign's report to the signal's arrival through SLURM's daemons
STARTER = """import sys
sys.path[0] = {root!r}
from tests.support.pausing import main
sys.exit(main({plans!r}))
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where one start of a job pauses; `point` is None if it does not pause at one.

    rank: the one that pauses. step, count: as for `kill_points.Kill`. step_seconds: added to each training step.
    """

    point: str | None = None
    rank: int = 0
    step: int = 0
    count: int = 1
    step_seconds: float = 0.0


class PlanFolder:
    """The plan of one start of a job, and the notes of its processes.

    Args: folder, with all plans; job, the name of the job; restart, how often it was started before.
    """

    def __init__(self, folder: Path, job: str, restart: int):
        self._stem = folder / f"{job}-{restart}"

    def _path(self, kind: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{kind}")

    def write(self, plan: Plan) -> None:
        _write(self._path("json"), dataclasses.asdict(plan))

    def read(self) -> Plan:
        path = self._path("json")
        return Plan(**json.loads(path.read_text())) if path.exists() else Plan()

    def note_start(self, rank: int) -> None:
        _write(self._path(f"rank{rank}"), {"node": os.environ.get("SLURMD_NODENAME", ""), "pid": os.getpid()})

    def started(self, rank: int) -> dict[str, Any] | None:
        """Return the node and process of a rank, once it runs."""
        path = self._path(f"rank{rank}")
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def is_pausing(self) -> bool:
        """Whether a process has reached the planned place."""
        return self._path("at").exists()

    def release(self) -> None:
        """Record that the disturbance was sent."""
        self._path("sent").touch()

    def pause(self) -> None:
        """Wait for `release`; only the first process that gets here does."""
        try:
            with self._path("at").open("x") as note:
                note.write(f"{os.getpid()} on {socket.gethostname()}\n")
        except FileExistsError:
            return
        deadline = time.monotonic() + LONGEST_SECONDS
        while not self._path("sent").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(AFTERWARDS_SECONDS)


def make_project(folder: Path) -> Path:
    """Create a project in `folder` with the shipped launch scripts and a train.py that reads plans; return its path.

    It runs a copy of the program: ranks refuse to train with different sources, and ROOT may be edited meanwhile. Its
    jobs need ROOT in PYTHONPATH (the batch script runs topoflow.config_io to find run.dir).
    """
    project, plans, program = folder / "project", folder / "plans", folder / "program"
    plans.mkdir(parents=True)
    for name in ("topoflow", "tests/support"):
        shutil.copytree(ROOT / name, program / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", program)
    shutil.copytree(ROOT / "launch", project / "launch")
    (project / "train.py").write_text(STARTER.format(root=str(program), plans=str(plans)))
    return project


def main(plans: str) -> int:
    """Run the program as `python train.py` does, with the plan of this start of this job."""
    environ = os.environ
    job, restart = environ["SLURM_JOB_NAME"], int(environ.get("SLURM_RESTART_COUNT", "0"))
    rank, files = int(environ["SLURM_PROCID"]), PlanFolder(Path(plans), job, restart)
    plan = files.read()
    files.note_start(rank)
    if plan.point == BEFORE_IMPORTS and rank == plan.rank:
        files.pause()
    import train as program  # here and not above: a signal may arrive before torch is imported
    from tests.support.pause_points import install
    from topoflow.terminal import run_program

    install(plan, files.pause, pauses_here=rank == plan.rank)
    return run_program(program.main)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write in one rename, for readers on other nodes."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{socket.gethostname()}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
