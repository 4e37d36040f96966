"""Where Lightning's run was when it saved, by its own counters, and where that is in a run of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topoflow.errors import ResumeRefused
from topoflow.tools.lightning.reading import take


@dataclass(frozen=True)
class Position:
    """step: optimizer steps. epoch: how many are complete. batches, steps: made since then."""

    step: int
    epoch: int
    batches: int
    steps: int
    epoch_batches: int | None
    """Batches of a whole epoch, where the counters tell."""

    def samples_in_epoch(self, batch_samples: int | None, global_batch_size: int, steps_per_epoch: int) -> int:
        """Return how many samples of the epoch are done; raise ResumeRefused if it is no place between two steps.

        Args: batch_samples, of one batch of all devices; None if unknown, then optimizer steps are counted.
        """
        counted, samples = f"{self.steps} steps", self.steps * global_batch_size
        if batch_samples is not None:
            counted, samples = f"{self.batches} batches of {batch_samples} samples", self.batches * batch_samples
        if samples % global_batch_size or (samples and samples >= steps_per_epoch * global_batch_size):
            raise ResumeRefused(
                f"position: {counted} of epoch {self.epoch} are done, {samples} samples, which is no place between two "
                f"steps of an epoch of {steps_per_epoch} batches of train.global_batch_size = {global_batch_size}: "
                "expected sizes that fit, or a checkpoint from the end of an epoch"
            )
        return samples


def read_position(checkpoint: Mapping[str, Any]) -> Position:
    """Return the position in a checkpoint; raise ResumeRefused if its counters are missing or contradict each other.

    Saves inside an epoch, after its last batch, and after the run (which counts its last epoch as completed even where
    max_steps cut it short; Lightning resumes inside it) have similar counters. So an epoch is complete when its last
    batch is done. `started` may be one too small after a resume from the last batch of an epoch (Lightning 2.6); so an
    epoch is also known to be entered by a batch that is not yet completed, or by being processed and not completed.
    """
    loop = ("loops", "fit_loop")
    batch, epochs = (*loop, "epoch_loop.batch_progress"), (*loop, "epoch_progress", "current")
    optimizer = (*loop, "epoch_loop.automatic_optimization.optim_progress", "optimizer")
    step, epoch = take(checkpoint, int, "global_step"), take(checkpoint, int, "epoch")
    started, ended = take(checkpoint, int, *epochs, "started"), take(checkpoint, int, *epochs, "processed")
    processed, completed = (take(checkpoint, int, *batch, "current", key) for key in ("processed", "completed"))
    total = take(checkpoint, int, *batch, "total", "processed")
    steps = take(checkpoint, int, *optimizer, "step", "current", "completed")
    entered = max(started, epoch + (completed < processed or ended == epoch + 1))
    behind = max(entered - 1, 0)
    for fits, contradiction in (
        (started - 1 <= epoch <= started + 1, f"epoch {epoch}, but {started} epochs were started"),
        (steps <= processed <= total, f"{steps} steps, but {processed} batches in this epoch and {total} in all"),
        (behind + steps <= step <= total, f"global_step {step}, but {behind} epochs, {steps} steps, {total} batches"),
        (behind > 0 or steps == step, f"global_step {step}, but {steps} steps in the first epoch"),
    ):
        if not fits:
            raise ResumeRefused(f"loops: {contradiction}: the file's counters contradict each other")
    if take(checkpoint, bool, *batch, "is_last_batch"):
        return Position(step, entered, 0, 0, processed)
    return Position(step, behind, processed, steps, (total - processed) // behind if behind else None)
