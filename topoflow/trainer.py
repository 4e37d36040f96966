"""The loop: one optimizer step, the validation, and what happens between steps until the run ends."""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from topoflow.checkpoint.saver import CheckpointSaver
from topoflow.config import TrainConfig
from topoflow.data.batch import Batch
from topoflow.data.sampling import build_eval_loader, build_train_loader
from topoflow.errors import DataError, StopRequested, TrainingDiverged
from topoflow.logs import MetricsWriter, Progress
from topoflow.loss import loss_sums
from topoflow.ranks import Context
from topoflow.reduction import CanonicalReduction, DdpReduction
from topoflow.reproducibility import seed_draws
from topoflow.text import shorten
from topoflow.train_state import TrainData, TrainState, total_steps, verify_ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step.

    loss: the mean over the global batch, nan if it has no valid value, None if it was not requested.
    """

    loss: float | None
    grad_norm: float
    learning_rates: dict[str, float]
    stop: bool


@dataclass(frozen=True)
class RunOutput:
    """Where a run writes its checkpoints and its metrics."""

    saver: CheckpointSaver
    writer: MetricsWriter


class Trainer:
    """Trains a state on data until the configured length, an early stop, or a request to stop."""

    def __init__(
        self,
        context: Context,
        state: TrainState,
        reduction: DdpReduction | CanonicalReduction,
        data: TrainData,
        config: TrainConfig,
        output: RunOutput,
    ):
        self.context, self.state, self.reduction, self.data = context, state, reduction, data
        self.config, self.output = config, output
        self.total_steps = total_steps(config, data.plan)
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        self._micro_batches: Iterator[Batch] | None = None

    # ---- one step

    def train_step(self, batches: Sequence[Batch], with_loss: bool = True) -> StepResult:
        """Run one optimizer step over this rank's micro-batches.

        The host waits for the device and for the other ranks once, when all of the step but the update has been queued,
        and once more if `with_loss`.

        Raises:
            TrainingDiverged: a loss or the gradient is not finite on any rank; the step has not changed any weight.
            RunDirectoryError: an earlier checkpoint could not be written, see `CheckpointSaver`; the same holds.
        """
        step = self.state.progress.step + 1
        if not self.state.model.training:  # after a validation, or a probe
            self.state.model.train()
        rows = []
        for index, batch in enumerate(batches):
            self.context.watch.mark("forward and backward")
            seed_draws(self.data.plan.seed, "train", step, self.context.rank * len(batches) + index)
            with self.reduction.micro_batch(index):
                sums, counts = loss_sums(self.reduction.forward, batch, self.data.elevation_m, self.config.precision)
                sums.sum().backward()
            rows.append(torch.stack([sums.detach().double(), counts.double()]))
        losses = torch.stack(rows)  # [micro-batches, (sum, count), targets]
        to_sum = self.reduction.finish()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        count, not_finite, stops, failed_saves, norm = self.context.agree(self._step_flags(losses), norm)
        if failed_saves:
            self.output.saver.handle_failed_save()
        if not_finite:
            self._refuse_loss(step, batches, losses)
        grad_norm = self._apply_gradient(step, gradients, norm, to_sum / count) if count else 0.0
        self.state.optimizer.zero_grad()
        rates = {group["name"]: group["lr"] for group in self.state.optimizer.param_groups}
        self.state.scheduler.step()
        return StepResult(self._mean_loss(losses) if with_loss else None, grad_norm, rates, stops > 0)

    def _step_flags(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the counts to sum over ranks: [valid values, losses not finite, stop requests, failed saves]."""
        here = self.context.stop.signal_name is not None, self.output.saver.poll()
        # filled in on the device: copying them from the host would make it wait
        flags = [losses.new_full((), float(flag)) for flag in here]
        return torch.stack([losses[:, 1].sum(), (~losses[:, 0].isfinite()).any().double(), *flags])

    def _mean_loss(self, losses: torch.Tensor) -> float:
        """Return the mean over all ranks. Each sums the same rows in the same order, so all get identical results."""
        table = self.context.gather_rows(losses).cpu()
        total, count = table[:, 0].sum().item(), table[:, 1].sum().item()
        return total / count if count else math.nan

    def _apply_gradient(self, step: int, gradients: list[torch.Tensor], norm: float, scale: float) -> float:
        """Turn the summed gradient into that of the mean, clip it, update; return its norm before clipping.

        The gradient of the mean is the gradient of the sum over all valid values, divided by their count; the clip
        coefficient is applied in the same pass. A batch without a valid value leaves weights and moments unchanged.

        Args:
            norm: norm of the summed gradient.
            scale: turns the sum into the mean.
        """
        norm *= scale
        if not math.isfinite(norm):
            self._refuse_gradient(step, norm)
        if self.state.grad_clip_norm is not None:
            scale *= min(1.0, self.state.grad_clip_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage] (torch's own optimizers use it)
        self.state.optimizer.step()
        self.state.progress.updates += 1
        return norm

    def _refuse_loss(self, step: int, batches: Sequence[Batch], losses: torch.Tensor) -> None:
        sums = self.context.gather_rows(losses).cpu()[:, 0]
        bad = [row for row in range(len(sums)) if not torch.isfinite(sums[row]).all()]
        mine = [row - self.context.rank * len(batches) for row in bad if row // len(batches) == self.context.rank]
        names = [self.data.train.sample_identity(int(i)) for row in mine for i in batches[row]["index"]]
        samples = [name for part in self.context.gather_objects(names) for name in part]
        ranks = ", ".join(map(str, sorted({row // len(batches) for row in bad})))
        self._refuse(f"step {step}: the loss is not finite on rank(s) {ranks}, in samples {shorten(samples)}")

    def _refuse_gradient(self, step: int, norm: float) -> None:
        named = self.state.model.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
        where = f"in {shorten(bad)}" if bad else "in its norm, though each element is finite"
        self._refuse(f"step {step}: the gradient summed over all ranks is not finite ({norm}), {where}")

    def _refuse(self, message: str) -> None:
        raise TrainingDiverged(f"{message}; this step changed no weight and the last checkpoint is valid", shared=True)

    # ---- validation

    def validate(self) -> tuple[float, dict[str, float]] | None:
        """Return the mean loss over the whole validation split, and that of each target.

        Each sample counts once, whatever the number of ranks. Return None on all ranks if a rank was asked to stop.
        """
        assert self.data.validation is not None, "called without a validation split"
        self.context.watch.enter(f"validation after step {self.state.progress.step}")
        self.state.model.eval()
        mine: dict[int, torch.Tensor] | None = {}
        loader = build_eval_loader(
            self.data.validation,
            self.config.micro_batch_size,
            self.context.rank,
            self.context.world_size,
            self.data.threads,
        )
        with torch.inference_mode():
            for index, batch in loader:
                self.context.watch.tick()
                if self.context.stop_requested() is not None:
                    mine = None
                    break
                batch = self._to_device(batch)
                sums, counts = loss_sums(self.state.model, batch, self.data.elevation_m, self.config.precision)
                mine[index] = torch.stack([sums.double(), counts.double()])
        # copied here and not above, where the host would wait for the device in each batch
        parts = self.context.gather_objects(mine and {index: row.cpu() for index, row in mine.items()})
        if None in parts:
            return None
        rows = {index: row for part in parts for index, row in part.items()}
        sums, counts = torch.stack([rows[index] for index in sorted(rows)]).sum(dim=0)  # [T], [T]
        if counts.sum() == 0:
            raise DataError("data.validation: no target has a valid value in the whole split", shared=True)
        by_target = (sums / counts).tolist()  # nan where a target has no value
        loss = (sums.sum() / counts.sum()).item()
        return loss, dict(zip(self.data.validation.target_names, by_target, strict=True))

    def validate_restored(self) -> None:
        """Validate before the first step of a resumed run, and log the loss next to the checkpoint's."""
        if self.data.validation is not None and (result := self.validate()) is not None:
            loss, progress = result[0], self.state.progress
            saved = "none"
            if progress.validation_loss is not None:
                saved = f"{progress.validation_loss:.6f} after step {progress.validated_step}"
            log.info(
                "validation on resume, after step %d: loss %.6f; in the checkpoint: %s", progress.step, loss, saved
            )

    # ---- the run

    def fit(self) -> None:
        """Train until the run is over.

        Raises:
            StopRequested: a signal arrived on any rank; a checkpoint has been committed.
            TrainingDiverged, RunDirectoryError: see `train_step`.
            RanksDisagree: the ranks no longer hold the same state.
        """
        progress = self.state.progress
        first_step = progress.step
        bar = Progress(first_step, self.total_steps, self.context.is_main)
        # weights and two moments
        self.output.saver.prepare(3 * sum(tensor.nbytes for tensor in self.state.model.state_dict().values()))
        owed = progress.validation_owed = progress.validation_owed and self.data.validation is not None
        try:
            if owed:
                self._validate_and_save(is_stopping=False)
            if not self._is_over():
                self.reduction.warm_up(self._loss_of_zeros)
            while not self._is_over():
                before = progress.step
                for batches in self._steps_of_epoch():
                    self._step_and_after(batches, bar)
                    if self._is_over():
                        break
                assert progress.step > before, "an epoch without a step never ends"
            if progress.step > first_step or owed:
                self.context.watch.enter(f"save after step {progress.step}")
                self.output.saver.require_saved(progress.step, "the end of the run")
            early = progress.step < self.total_steps
            self.output.writer.end(progress.step, "early stopping" if early else "all steps done")
        finally:
            self._micro_batches = None  # ends the loader's threads
            self.output.saver.close()
            bar.close()

    def _loss_of_zeros(self, network: nn.Module) -> torch.Tensor:
        """Return the loss of `network`, in training mode, on a micro-batch of zeros, in which no target counts."""
        network.train()
        size = self.data.plan.micro_batch_size
        batch = {
            name: torch.zeros(size, *shape, dtype=dtype, device=self.context.device)
            for name, (dtype, shape) in self.data.train.layout.items()
        }
        sums, _ = loss_sums(network, batch, self.data.elevation_m, self.config.precision)
        return sums.sum()

    def _is_over(self) -> bool:
        patience = self.config.early_stopping_patience
        waited = patience is not None and self.state.progress.validations_since_best >= patience
        return waited or self.state.progress.step >= self.total_steps

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each remaining step of the epoch."""
        progress, plan = self.state.progress, self.data.plan
        first = progress.samples_in_epoch // plan.global_batch_size
        for _ in range(first, plan.steps_per_epoch):
            self.context.watch.enter(f"step {progress.step + 1}", "loading data")
            if self._micro_batches is None:  # created once; it continues epoch after epoch
                self._micro_batches = iter(
                    build_train_loader(self.data.train, plan, progress.epoch, first, self.data.threads)
                )
            batches: list[Batch] = []
            for batch in itertools.islice(self._micro_batches, plan.accumulation):
                self.context.watch.tick()
                batches.append(self._to_device(batch))
            yield batches

    def _step_and_after(self, batches: list[Batch], bar: Progress) -> None:
        progress, plan = self.state.progress, self.data.plan
        start = time.monotonic()
        due = (progress.step + 1) % self.config.log_every_steps == 0 or progress.step == 0
        result = self.train_step(batches, with_loss=due)
        progress.step += 1
        progress.samples_in_epoch += plan.global_batch_size
        self._log_step(result, time.monotonic() - start, bar)
        epoch_ended = progress.samples_in_epoch >= plan.steps_per_epoch * plan.global_batch_size
        if epoch_ended:
            progress.epoch, progress.samples_in_epoch = progress.epoch + 1, 0
        verify_every = self.context.config.verify_every_steps
        if verify_every and progress.step % verify_every == 0:
            verify_ranks(self.context, self.state, self.data, f"after step {progress.step}")
        if (summary := self.context.watch.end_setup()) is not None:
            log.info("%s", summary)
        progress.validation_owed = self._validation_due(epoch_ended)
        self._validate_and_save(result.stop)

    def _validate_and_save(self, is_stopping: bool) -> None:
        """Validate and save if due, after a new step or, on resume, after the last step before the stop."""
        progress = self.state.progress
        is_best = False
        if progress.validation_owed and not is_stopping:
            result = self.validate()
            is_stopping = result is None
            is_best = result is not None and self._compare(*result)
        if self.output.saver.is_due(progress.step, is_best) or is_stopping:
            self.context.watch.mark("saving")
            self.output.saver.save(progress.step, is_best)
        if is_stopping:
            self._stop()

    def _log_step(self, result: StepResult, seconds: float, bar: Progress) -> None:
        progress, size = self.state.progress, self.data.plan.global_batch_size
        if result.loss is not None:
            self.output.writer.train_step(
                step=progress.step,
                epoch=progress.epoch,
                samples=(progress.epoch * self.data.plan.steps_per_epoch * size) + progress.samples_in_epoch,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.learning_rates,
                seconds=seconds,
                samples_per_second=size / seconds,
            )
        bar.advance(progress.step, result.loss)

    def _validation_due(self, epoch_ended: bool) -> bool:
        if self.data.validation is None:
            return False
        every, step = self.config.validate_every_steps, self.state.progress.step
        return step >= self.total_steps or (epoch_ended if every is None else step % every == 0)

    def _compare(self, loss: float, by_target: dict[str, float]) -> bool:
        """Log and record a validation; return whether its loss is the lowest so far."""
        progress = self.state.progress
        progress.validation_owed = False
        self.output.writer.validation(progress.step, loss, by_target)
        log.info("validation after step %d: loss %.5f", progress.step, loss)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"validation after step {progress.step}: the loss is not finite ({loss})", shared=True
            )
        progress.validation_loss, progress.validated_step = loss, progress.step
        is_best = progress.best_validation_loss is None or loss < progress.best_validation_loss
        if is_best:
            progress.best_validation_loss, progress.best_step = loss, progress.step
        progress.validations_since_best = 0 if is_best else progress.validations_since_best + 1
        return is_best

    def _stop(self) -> None:
        self.context.watch.enter(f"save after step {self.state.progress.step}")
        names = [name for name in self.context.gather_objects(self.context.stop.signal_name) if name]
        step = self.state.progress.step
        self.output.saver.require_saved(step, f"stopped by {names[0]}")
        self.output.writer.end(step, f"stopped by {names[0]}")
        raise StopRequested(f"stopped by {names[0]} after step {step}; its checkpoint is committed", shared=True)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.context.device, non_blocking=True) for name, tensor in batch.items()}
