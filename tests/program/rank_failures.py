"""Run train.py and make one rank fail: `python rank_failures.py KIND:PHASE:RANK CONFIG ...`

KIND: raises | killed | exits | sleeps | stopped | other_config. PHASE: data | resume | step | reduced | validation |
save. In `reduced`, the rank fails after the gradients were summed: the other ranks have loaded their data and are
waiting.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


import topoflow.checkpoint.directory
import train
from topoflow.data.assembly import ForecastData
from topoflow.resume import Resume
from topoflow.trainer import Trainer

STEP = 3
"""The optimizer step, or the validation or save after it, in which the rank fails."""


def fail(kind: str) -> None:
    """End this process, or stop its progress."""
    print(f"fails at {time.time()!r}", file=sys.stderr, flush=True)
    if kind == "raises":
        raise ZeroDivisionError("an injected failure")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exits":
        os._exit(0)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1e6)


def prepare(kind: str, phase: str, rank: int) -> None:
    """Arrange the failure if this process is that rank."""
    launch = train.read_launch()
    if launch.rank != rank or launch.attempt > 0:  # torchrun's second attempt is spared
        return
    if kind == "other_config":
        load = train.load_config
        train.load_config = lambda path, overrides: load(path, [*overrides, "optim.learning_rate=0.5"])
        return
    owner, name, is_reached = {
        "data": (ForecastData, "summary" if rank == 0 else "dataset", lambda self: True),
        "resume": (Resume, "prove", lambda self: True),
        "step": (Trainer, "train_step", lambda self: self.state.progress.step + 1 == STEP),
        "reduced": (Trainer, "_step_flags", lambda self: self.state.progress.step + 1 == STEP),
        "validation": (Trainer, "_to_device", lambda self: self.context.watch.phase.startswith("validation")),
        "save": (topoflow.checkpoint.directory.CheckpointDirectory, "save", lambda self: True),
    }[phase]
    original = getattr(owner, name)

    def fail_or_call(*arguments, **options):
        if is_reached(arguments[0]):
            fail(kind)
        return original(*arguments, **options)

    setattr(owner, name, fail_or_call)


def main(words: list[str]) -> int:
    """Run train.py with the failure that the first argument names."""
    kind, phase, rank = words[0].split(":")
    prepare(kind, phase, int(rank))
    return train.main(words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
