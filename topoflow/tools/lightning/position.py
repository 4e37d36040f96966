"""Where Lightning's run stood when it saved, from its own counters, and where that is in a run of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topoflow.errors import ResumeRefused


@dataclass(frozen=True)
class Position:
    """step: optimizer steps. epoch: how many are behind. batches, steps: made since then."""

    step: int
    epoch: int
    batches: int
    steps: int
    epoch_batches: int | None
    """Batches of a whole epoch, where the counters tell."""

    def samples_in_epoch(self, batch_samples: int | None, global_batch_size: int, steps_per_epoch: int) -> int:
        """Samples of the epoch that are behind, as a place between two of our steps.

        Args: batch_samples, of one batch of all devices; None if unknown, then it goes by optimizer steps.

        Raises:
            ResumeRefused: the place is inside a step of ours, or past the end of our epoch.
        """
        if self.batches == 0:
            return 0
        samples = self.steps * global_batch_size if batch_samples is None else self.batches * batch_samples
        if samples % global_batch_size or samples >= steps_per_epoch * global_batch_size:
            counted = f"{self.steps} steps"
            if batch_samples is not None:
                counted = f"{self.batches} batches of {batch_samples} samples"
            raise ResumeRefused(
                f"position: {counted} of epoch {self.epoch} are done, {samples} samples, which is no place between two "
                f"steps of an epoch of {steps_per_epoch} batches of train.global_batch_size = {global_batch_size}: "
                "expected sizes that fit, or a checkpoint from the end of an epoch"
            )
        return samples

    def scheduler_steps(self, schedulers: Sequence[Mapping[str, Any]], interval: str, here: int) -> int:
        """Where our schedule, which counts optimizer steps, stands when it is as far as the file's.

        Args:
            interval: optim.schedule_interval.
            here: steps from the beginning if epochs had always been ours. In epochs the schedule goes by it, so that
                rates change where our order of samples begins anew, whatever the length of Lightning's epochs.

        Raises:
            ResumeRefused: the file's schedule stands elsewhere than its run.
        """
        steps, expected = (here, self.epoch) if interval == "epoch" else (self.step, self.step)
        if schedulers and schedulers[0]["last_epoch"] != expected:
            raise ResumeRefused(
                f"lr_schedulers: last_epoch {schedulers[0]['last_epoch']} after {self.step} steps and {self.epoch} "
                f"whole epochs: expected {expected} for optim.schedule_interval={interval}"
            )
        return steps


def read_position(checkpoint: Mapping[str, Any]) -> Position:
    """The position in a checkpoint.

    Three kinds of save look alike: inside an epoch, after its last batch, and after the run (which counts its last
    epoch as complete even where max_steps cut it short; Lightning goes on inside it). So an epoch is behind when its
    last batch is. A save at the end of a training batch counts that batch as processed and not yet as completed.

    Raises:
        ResumeRefused: the counters are not there.
    """
    try:
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        optimization = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        entered, ended = int(epochs["started"]), bool(batches["is_last_batch"])
        processed, total = int(batches["current"]["processed"]), int(batches["total"]["processed"])
        steps, step = int(optimization["step"]["current"]["completed"]), int(checkpoint["global_step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ResumeRefused(
            f"loops: no {error} in the file: expected the counters of Lightning 2 (fit_loop with epoch_progress, "
            "epoch_loop.batch_progress and automatic optimization)"
        ) from None
    if ended:
        return Position(step, entered, 0, 0, processed)
    behind = max(entered - 1, 0)
    return Position(step, behind, processed, steps, (total - processed) // behind if behind else None)
