"""The loop: one optimizer step, the validation, and what happens between steps until the run ends."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from topoflow.checkpoint import CheckpointSaver, state_digests
from topoflow.config import TrainConfig
from topoflow.data import BatchPlan, ForecastDataset, build_eval_loader, build_train_loader
from topoflow.distributed import Context
from topoflow.errors import DataError, RunDirectoryError, StopRequested, TrainingDiverged
from topoflow.loss import masked_squared_error
from topoflow.reproducibility import seed_draws
from topoflow.stop import StopFlag
from topoflow.tracking import MetricsWriter, Progress

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


@dataclass
class TrainProgress:
    """Where a run stands; all of it is in a checkpoint."""

    step: int = 0
    updates: int = 0
    """Steps that changed weights: all but those whose batch held no target at all."""
    epoch: int = 0
    samples_in_epoch: int = 0
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0


@dataclass
class TrainState:
    """What training changes. `forward` is the model as it is called in training: itself, or wrapped by DDP."""

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    progress: TrainProgress


@dataclass(frozen=True)
class TrainData:
    """What training reads. elevation_m [H, W]: terrain height on the device, metres."""

    train: ForecastDataset
    validation: ForecastDataset | None
    plan: BatchPlan
    elevation_m: torch.Tensor
    workers: int


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the mean loss of the global batch (nan: nothing in it counted) and what was asked for."""

    loss: float
    grad_norm: float
    learning_rates: dict[str, float]
    stop: bool


class Trainer:
    """Trains a state on data until the configured length, an early stop, or a request to stop."""

    def __init__(
        self,
        context: Context,
        state: TrainState,
        data: TrainData,
        config: TrainConfig,
        *,
        seed: int,
        grad_clip_norm: float | None,
        total_steps: int,
        save_every_steps: int | None,
        verify_every_steps: int | None,
        saver: CheckpointSaver,
        writer: MetricsWriter,
        stop: StopFlag,
    ):
        self.context, self.state, self.data, self.config = context, state, data, config
        self.seed, self.grad_clip_norm, self.total_steps = seed, grad_clip_norm, total_steps
        self.save_every_steps, self.verify_every_steps = save_every_steps, verify_every_steps
        self.saver, self.writer, self.stop = saver, writer, stop
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        self._last_saved_step = state.progress.step if state.progress.step else -1

    # ---- one step

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Raises:
            TrainingDiverged: a loss or the gradient is not finite on any rank; weights are as before the step.
        """
        step = self.state.progress.step + 1
        self.state.model.train()
        rows = []
        for index, batch in enumerate(batches):
            seed_draws(self.seed, "train", step, self.context.rank * len(batches) + index)
            with self._without_reduction(last=index == len(batches) - 1):
                sums, counts = self._loss_sums(self.state.forward, batch)
                sums.sum().backward()
            asked = torch.tensor([self.stop.signal_name is not None], device=sums.device)
            rows.append(torch.cat([sums.detach().double(), counts.double(), asked.double()]))
        # every rank sums the same rows in the same order, whoever computed them
        table = self.context.gather_rows(torch.stack(rows)).cpu()
        targets = (table.shape[1] - 1) // 2
        total, count = table[:, :targets].sum().item(), table[:, targets:-1].sum().item()
        if not math.isfinite(total):
            self._refuse_loss(step, batches, table[:, :targets])
        grad_norm = self._apply_gradient(step, count)
        rates = {group["name"]: group["lr"] for group in self.state.optimizer.param_groups}
        self.state.scheduler.step()
        return StepResult(total / count if count else math.nan, grad_norm, rates, bool(table[:, -1].any()))

    def _loss_sums(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared errors summed, and how many, for each target: [T], [T]."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.context.device.type, torch.bfloat16) if bf16 else nullcontext():
            output = network(batch["x"], batch["lead_time_hours"], self.data.elevation_m, batch.get("wind_ms"))
        return masked_squared_error(output, batch["y"], batch["valid"])

    def _without_reduction(self, last: bool) -> Any:
        """DDP sums gradients over ranks with the last micro-batch only."""
        return nullcontext() if last or self.state.forward is self.state.model else self.state.forward.no_sync()

    def _apply_gradient(self, step: int, count: float) -> float:
        """Scale the summed gradient to that of the mean, clip it, and step; returns its norm before clipping.

        DDP has averaged the ranks' sums, so the gradient of the mean over all that counts is world_size / count times
        what stands in .grad; the clip coefficient goes into the same pass. A batch in which nothing counts says nothing
        about the weights: they, and the moments, stay.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        norm = 0.0
        if count:
            scale = self.context.world_size / count
            norm = torch.nn.utils.get_total_norm(gradients).item() * scale
            if not math.isfinite(norm):
                self._refuse_gradient(step, norm)
            if self.grad_clip_norm is not None:
                scale *= min(1.0, self.grad_clip_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_(gradients, scale)
            self.state.optimizer.step()
            self.state.progress.updates += 1
        self.state.optimizer.zero_grad()
        return norm

    def _refuse_loss(self, step: int, batches: Sequence[Batch], sums: torch.Tensor) -> None:
        bad = [row for row in range(len(sums)) if not torch.isfinite(sums[row]).all()]
        mine = [row - self.context.rank * len(batches) for row in bad if row // len(batches) == self.context.rank]
        names = [self.data.train.sample_identity(int(i)) for row in mine for i in batches[row]["index"]]
        samples = [name for part in self.context.gather_objects(names) for name in part]
        ranks = ", ".join(map(str, sorted({row // len(batches) for row in bad})))
        self._refuse(f"step {step}: the loss is not finite on rank(s) {ranks}, in samples {_shorten(samples)}")

    def _refuse_gradient(self, step: int, norm: float) -> None:
        named = self.state.model.named_parameters()
        bad = [name for name, parameter in named if not torch.isfinite(parameter.grad).all()]
        where = f"in {_shorten(bad)}" if bad else "in its norm, though each element is finite"
        self._refuse(f"step {step}: the gradient is not finite ({norm}) on all ranks after their sum, {where}")

    def _refuse(self, message: str) -> None:
        refusal = TrainingDiverged(f"{message}; no weight was changed by this step and the last checkpoint is valid")
        refusal.shared = True
        raise refusal

    # ---- validation

    def validate(self) -> tuple[float, dict[str, float]]:
        """Mean loss over the whole validation split, and for each target; each sample counts once on any world size."""
        self.state.model.eval()
        mine = {}
        loader = build_eval_loader(
            self.data.validation,
            self.config.micro_batch_size,
            self.context.rank,
            self.context.world_size,
            self.data.workers,
        )
        with torch.inference_mode():
            for index, batch in loader:
                batch = self._to_device(batch)
                sums, counts = self._loss_sums(self.state.model, batch)
                mine[index] = torch.stack([sums.double(), counts.double()]).cpu()
        rows = {index: row for part in self.context.gather_objects(mine) for index, row in part.items()}
        sums, counts = torch.stack([rows[index] for index in sorted(rows)]).sum(dim=0)  # [T], [T]
        if counts.sum() == 0:
            refusal = DataError("data.validation: no target has a value that counts in the whole split")
            refusal.shared = True
            raise refusal
        by_target = (sums / counts).tolist()  # nan where a target has no value
        loss = (sums.sum() / counts.sum()).item()
        return loss, dict(zip(self.data.validation.target_names, by_target, strict=True))

    def validate_restored(self) -> None:
        """Validate before the first step of a resumed run, and log the loss beside the checkpoint's."""
        if self.data.validation is not None:
            loss, _ = self.validate()
            saved = self.state.progress.validation_loss
            log.info("validation on resume: loss %.6f; the checkpoint's last was %s", loss, saved)

    # ---- the run

    def fit(self) -> None:
        """Train until the run is over.

        Raises:
            StopRequested: a signal arrived on any rank; a checkpoint has been committed.
            TrainingDiverged: see `train_step`.
            RanksDisagree: the ranks no longer hold the same state.
        """
        progress = self.state.progress
        bar = Progress(progress.step, self.total_steps, self.context.is_main)
        try:
            while not self._is_over():
                before = progress.step
                for batches in self._steps_of_epoch():
                    self._step_and_after(batches, bar)
                    if self._is_over():
                        break
                assert progress.step > before, "an epoch without a step never ends"
            self._save_once(is_best=False)
            self._require_saved("the end of the run")
            early = progress.step < self.total_steps
            self.writer.end(progress.step, "early stopping" if early else "all steps done")
        finally:
            bar.close()

    def _is_over(self) -> bool:
        patience = self.config.early_stopping_patience
        waited = patience is not None and self.state.progress.validations_since_best >= patience
        return waited or self.state.progress.step >= self.total_steps

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step that is left in the epoch."""
        progress, plan = self.state.progress, self.data.plan
        first = progress.samples_in_epoch // plan.global_batch_size
        loader = build_train_loader(self.data.train, plan, progress.epoch, first, self.data.workers)
        batches: list[Batch] = []
        for batch in loader:
            batches.append(self._to_device(batch))
            if len(batches) == plan.accumulation:
                yield batches
                batches = []

    def _step_and_after(self, batches: list[Batch], bar: Progress) -> None:
        progress, plan = self.state.progress, self.data.plan
        start = time.monotonic()
        result = self.train_step(batches)
        progress.step += 1
        progress.samples_in_epoch += plan.global_batch_size
        self._log_step(result, time.monotonic() - start, bar)
        epoch_ended = progress.samples_in_epoch >= plan.steps_per_epoch * plan.global_batch_size
        if epoch_ended:
            progress.epoch, progress.samples_in_epoch = progress.epoch + 1, 0
        if self.verify_every_steps and progress.step % self.verify_every_steps == 0:
            self.verify_ranks(f"after step {progress.step}")
        is_best = self._validation_due(epoch_ended) and self._validate_and_compare()
        save_due = self.save_every_steps and progress.step % self.save_every_steps == 0
        if (is_best and self.saver.keeps_best) or save_due or result.stop:
            self._save_once(is_best)
        if result.stop:
            self._stop()

    def _log_step(self, result: StepResult, seconds: float, bar: Progress) -> None:
        progress, size = self.state.progress, self.data.plan.global_batch_size
        due = progress.step % self.config.log_every_steps == 0 or progress.step == 1
        if due:
            self.writer.train_step(
                step=progress.step,
                epoch=progress.epoch,
                samples=(progress.epoch * self.data.plan.steps_per_epoch * size) + progress.samples_in_epoch,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.learning_rates,
                seconds=seconds,
                samples_per_second=size / seconds,
            )
        bar.advance(progress.step, result.loss if due else None)

    def _validation_due(self, epoch_ended: bool) -> bool:
        if self.data.validation is None:
            return False
        every, step = self.config.validate_every_steps, self.state.progress.step
        return step >= self.total_steps or (epoch_ended if every is None else step % every == 0)

    def _validate_and_compare(self) -> bool:
        """Validate, log, and note whether the loss is the lowest so far."""
        progress = self.state.progress
        loss, by_target = self.validate()
        self.writer.validation(progress.step, loss, by_target)
        log.info("validation after step %d: loss %.5f", progress.step, loss)
        if not math.isfinite(loss):
            refusal = TrainingDiverged(f"validation after step {progress.step}: the loss is not finite ({loss})")
            refusal.shared = True
            raise refusal
        progress.validation_loss = loss
        is_best = progress.best_validation_loss is None or loss < progress.best_validation_loss
        if is_best:
            progress.best_validation_loss, progress.best_step = loss, progress.step
        progress.validations_since_best = 0 if is_best else progress.validations_since_best + 1
        return is_best

    def _save_once(self, is_best: bool) -> None:
        """Commit a checkpoint, unless this step has one."""
        step = self.state.progress.step
        if step == self._last_saved_step:
            return
        folder = self.saver.save(is_best)
        if folder is not None:
            self._last_saved_step = step
            self.writer.checkpoint(step, folder)

    def _require_saved(self, when: str) -> None:
        """No run ends as if its state were safe when the last save failed, whatever checkpoint.on_error says."""
        if self._last_saved_step != self.state.progress.step:
            refusal = RunDirectoryError(f"{when}: the checkpoint of step {self.state.progress.step} was not written")
            refusal.shared = True
            raise refusal

    def _stop(self) -> None:
        names = [name for name in self.context.gather_objects(self.stop.signal_name) if name]
        step = self.state.progress.step
        self._require_saved(f"stopped by {names[0]}")
        self.writer.end(step, f"stopped by {names[0]}")
        refusal = StopRequested(f"stopped by {names[0]} after step {step}; its checkpoint is committed")
        refusal.shared = True
        raise refusal

    def verify_ranks(self, when: str) -> None:
        """Prove that all ranks hold the same weights, buffers, moments, rates and position."""
        if self.context.world_size > 1:
            digests = state_digests(self.state.model, self.state.optimizer, self.state.scheduler)
            self.context.require_same({**digests, "progress": repr(self.state.progress)}, when)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.context.device, non_blocking=True) for name, tensor in batch.items()}


def _shorten(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
