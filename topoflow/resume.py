"""Ways to start a run: from initial weights, from the weights of another run, or by resuming from a checkpoint."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from topoflow.build import resolve, restore_normalization
from topoflow.certificate import Certifier, Proof
from topoflow.checkpoint.directory import CheckpointDirectory, find_checkpoint, find_directory
from topoflow.checkpoint.file import read_checkpoint, verify_checkpoint
from topoflow.checkpoint.state import RestoreReport, deliver, load_weights, plan_state, share_outline
from topoflow.config import CHANNELS, DATA_ALTERS, NAMES, RATES, CheckpointConfig, Config
from topoflow.config_io import Change, changed_keys, combined_effect, config_to_dict
from topoflow.data.assembly import SPLITS, ForecastData
from topoflow.data.contents import Contents
from topoflow.data.grid import Grid
from topoflow.data.normalization import Normalization
from topoflow.data.sampling import BatchPlan
from topoflow.errors import CheckpointUnreadable, ConfigError, ResumeRefused, RunDirectoryError
from topoflow.logs import MetricsWriter
from topoflow.ranks import Context
from topoflow.run_dir import RunDirectory
from topoflow.text import matches
from topoflow.train_state import TrainProgress, TrainState
from topoflow.trainer import Trainer

log = logging.getLogger(__name__)

REPORT = "resume.json"


class NewRun:
    """Starts from initial weights at step 0. train.py calls these methods on any kind of start, in this order."""

    def complete_config(self, config: Config, data: ForecastData, plan: BatchPlan) -> Config:
        """Return the config with the keys filled in that the user left open, after checking that the run can use it.

        Raises:
            ConfigError, ResumeRefused: the config or the data do not match what the run starts from.
        """
        return resolve(config, data, plan)

    def saved_normalization(self, config: Config, context: Context) -> Normalization | None:
        """Return the constants and the base that the weights were trained with; None if they must be computed."""
        return None

    def restore(self, state: TrainState, context: Context) -> None:
        """Load what the run starts from into `state`, by name, on every rank.

        Raises:
            ResumeRefused: something could not be restored; the message names it.
        """

    def prove(self, certifier: Certifier, context: Context) -> None:
        """Compare the restored state of every rank with the checkpoint's certificate.

        Raises:
            ResumeRefused: on every rank, naming what differs.
        """

    def open_metrics(self, run_dir: RunDirectory, checkpoints: CheckpointDirectory, context: Context) -> MetricsWriter:
        """Prepare the run directory for the next steps, after the proof; return the writer of its metrics."""
        return MetricsWriter(run_dir.path if context.is_main else None, None, run_dir.writing)

    def begin(self, trainer: Trainer, checkpoints: CheckpointDirectory, context: Context) -> None:
        """Do what is due before the first step."""


class FineTune(NewRun):
    """Starts from the weights of a checkpoint, at step 0.

    Args:
        saved: `model`, `config` and `data` of the checkpoint; only on rank 0 do tensors have contents.
    """

    def __init__(self, path: Path, saved: dict[str, Any], config: CheckpointConfig):
        self.path, self.saved, self.config = path, saved, config

    def complete_config(self, config: Config, data: ForecastData, plan: BatchPlan) -> Config:
        """Complete it as for a new run, after checking that the channels are those of the checkpoint."""
        for change in changed_keys(self.saved["config"], config):
            is_channel = change.alters & CHANNELS and change.key != "data.normalization"
            if is_channel and not matches(change.key, self.config.allow_changed):
                raise ConfigError(
                    f"{change}: expected the same channels in the same order as in {self.path}, whose weights depend "
                    "on them, or checkpoint.allow_changed to list what may differ"
                )
        saved_grid = self.saved["data"].get("grid")
        if saved_grid is not None and not Grid.from_dict(saved_grid).is_at(data.grid):
            log.warning(
                "another place: %s was trained on %s; this run's data are %s",
                self.path, Grid.from_dict(saved_grid).describe(), data.grid.describe(),
            )  # fmt: skip
        return resolve(config, data, plan)

    def saved_normalization(self, config: Config, context: Context) -> None:
        """Say which constants the run uses: those of its own config and data."""
        if config.data.normalization == "train":
            log.info(
                "normalization: computed over this run's training split; to keep that of %s, set data.normalization to "
                "its constants, which `topoflow inspect` prints",
                self.path,
            )
        else:
            log.info("normalization: the constants of data.normalization")

    def restore(self, state: TrainState, context: Context) -> None:
        """Load the weights into the model on every rank."""
        context.watch.enter("fine-tune")
        report = load_weights(context, state.model, self.saved.pop("model"), self.config.allow_new)
        log.info("fine-tune from %s (weights only, step 0)", self.path)
        for line in report.lines():
            log.info("  %s", line)


class Resume(NewRun):
    """Resumes a run: everything is restored by name and proved before the first step.

    Args:
        saved: the content of the checkpoint; only on rank 0 do tensors have contents.
    """

    def __init__(self, path: Path, saved: dict[str, Any], config: CheckpointConfig):
        self.path, self.saved, self.config = path, saved, config
        self.progress = TrainProgress(**saved["progress"])
        self.changed: list[Change] = []
        """Config keys that differ from the checkpoint's because checkpoint.allow_changed lists them."""
        self.report = RestoreReport()
        self.proof: Proof | None = None

    def complete_config(self, config: Config, data: ForecastData, plan: BatchPlan) -> Config:
        """Fill open keys as at the start of the run, after checking that no key differs that would alter the run."""
        config = resolve(self._fill_from_checkpoint(config), data, plan)
        self.changed = self._check_changes(
            [*changed_keys(self.saved["config"], config), *self._data_changes(config, data)]
        )
        samples = self.progress.samples_in_epoch
        plan.require_position(samples, f"{samples} samples of the epoch")
        return config

    def _fill_from_checkpoint(self, config: Config) -> Config:
        saved = self.saved["config"]
        model, optim = config.model, config.optim
        if optim.schedule_length is None:
            optim = dataclasses.replace(optim, schedule_length=saved["optim"]["schedule_length"])
        if model.img_size is None and saved["model"]["img_size"] is not None:
            model = dataclasses.replace(model, img_size=tuple(saved["model"]["img_size"]))
        return dataclasses.replace(config, model=model, optim=optim)

    def _data_changes(self, config: Config, data: ForecastData) -> list[Change]:
        saved, now = self.saved["data"], data.contents
        if saved["fingerprint"] == now.fingerprint:
            return []
        where = "written by a version that compared data by other hashes"
        if "contents" in saved:
            was, is_now = self.saved["config"]["data"], config_to_dict(config)["data"]
            same_splits = all(was[split] == is_now[split] for split in SPLITS)
            difference = Contents.from_dict(saved["contents"]).difference(now, all_days=same_splits)
            if difference is None:  # what differs is in splits or variables, whose keys are compared by themselves
                return []
            where = f"first difference: {difference}"
        return [Change("data.fingerprint", saved["fingerprint"][:12], f"{now.fingerprint[:12]} ({where})", DATA_ALTERS)]

    def _check_changes(self, changes: list[Change]) -> list[Change]:
        """Return the changes that checkpoint.allow_changed lists."""
        listed = [change for change in changes if matches(change.key, self.config.allow_changed)]
        by_new_names = [change for change in changes if self.config.allow_new and change.alters & NAMES]
        refused = [change for change in changes if change not in listed and change not in by_new_names]
        if refused:
            adds_names = any(change.alters & NAMES for change in refused)
            hint = ", or checkpoint.allow_new to list the new weights that may start fresh" if adds_names else ""
            raise ResumeRefused(
                f"checkpoint {self.path}: its config or data differ from this run's: {'; '.join(map(str, refused))}: "
                f"expected the same, or checkpoint.allow_changed to list what may differ{hint}"
            )
        for change in changes:
            log.warning("changed since the checkpoint, as checkpoint.allow_changed or allow_new permits: %s", change)
        return listed

    def saved_normalization(self, config: Config, context: Context) -> Normalization | None:
        """Return the checkpoint's constants, even for other data; None if channels or data.normalization changed."""
        if combined_effect(changed_keys(self.saved["config"], config)) & CHANNELS:
            return None
        return restore_normalization(self.saved["data"], context)

    def restore(self, state: TrainState, context: Context) -> None:
        """Restore weights, moments, rates, scheduler and progress on every rank."""
        context.watch.enter("resume")
        with context.together("restoring the checkpoint"):
            restore = plan_state(
                self.saved,
                state.model,
                state.optimizer,
                state.scheduler,
                self.config.allow_new,
                rates_from_config=bool(combined_effect(self.changed) & RATES),
            )
        deliver(context, restore.pairs)
        restore.finish()
        state.progress = self.progress
        del self.saved["model"], self.saved["optimizer"]  # the model and the optimizer hold them now
        self.report = restore.report
        log.info("resume from %s (everything)", self.path)
        for line in self.report.lines():
            log.info("  %s", line)

    def prove(self, certifier: Certifier, context: Context) -> None:
        """Compare every tensor and rate, the next samples and the probe loss of every rank with the certificate."""
        with context.together("proof of the resume"):
            if "certificate" not in self.saved:
                raise ResumeRefused(
                    f"checkpoint {self.path}: format {self.saved['format']} has no certificate, so a resume cannot be "
                    "proved: expected a newer checkpoint, or checkpoint.init_from to take its weights only"
                )
            certificate = self.saved["certificate"]
            self.proof = certifier.check(certificate, self.report, self.changed, self.config.probe_tolerance)
        for line in self.proof.lines(context.world_size):
            log.info("  %s", line)

    def open_metrics(self, run_dir: RunDirectory, checkpoints: CheckpointDirectory, context: Context) -> MetricsWriter:
        """Archive later checkpoints, move later metrics aside, write resume.json and log the resume."""
        step, validation_owed = self.progress.step, self.progress.validation_owed
        if context.is_main:
            # first, so that no later checkpoint can be taken by mistake
            for folder in checkpoints.archive_after(step):
                log.warning("archived checkpoint as %s, because this run resumes from step %d", folder.name, step)
        path, logged_every = run_dir.path if context.is_main else None, self.saved["config"]["train"]["log_every_steps"]
        writer = MetricsWriter(path, step, run_dir.writing, validation_owed, logged_every)
        if context.is_main:
            self._write_report(run_dir, writer.missing_steps)
            writer.resume(step, self.path)
        return writer

    def _write_report(self, run_dir: RunDirectory, missing_steps: list[int]) -> None:
        assert self.proof is not None, "written after the proof"
        run_dir.write_json(
            REPORT,
            {
                "from": str(self.path),
                "asked": self.config.resume,
                **dataclasses.asdict(self.progress),
                **self.report.to_dict(),
                "missing_metrics_steps": missing_steps,
                "proof": self.proof.to_dict(),
            },
        )

    def begin(self, trainer: Trainer, checkpoints: CheckpointDirectory, context: Context) -> None:
        """Check `best`, save if another run's checkpoint was resumed, and validate if the config asks for it."""
        keep_or_forget_best(self.progress, checkpoints, self.config, context)
        if not checkpoints.is_parent_of(self.path):
            # then the other run's folder is no longer needed
            trainer.output.saver.save(self.progress.step, is_best=False)
        if self.config.validate_on_resume:
            trainer.validate_restored()


def read_start(config: CheckpointConfig, checkpoints: CheckpointDirectory, context: Context) -> NewRun:
    """Find and read what checkpoint.resume and checkpoint.init_from ask for; only rank 0 opens files.

    Raises:
        RunDirectoryError: resume is `never` or names another run, but the run directory holds checkpoints.
        ResumeRefused: a checkpoint is damaged.
        MissingPath: a path does not exist.
    """
    found = None
    with context.together("reading the checkpoint"):
        if context.is_main:
            checkpoints.clean_up()
            found = _find_start(config, checkpoints)
    kind_and_path = context.broadcast_object(found and found[:2])
    if kind_and_path is None:
        return NewRun()
    kind, path = kind_and_path
    return kind(path, share_outline(context, found and found[2]), config)


def _find_start(
    config: CheckpointConfig, checkpoints: CheckpointDirectory
) -> tuple[type[FineTune | Resume], Path, dict[str, Any]] | None:
    if config.resume == "never" and checkpoints.traces():
        raise RunDirectoryError(
            f"checkpoint.resume: never, but {checkpoints.path} holds {', '.join(checkpoints.traces())}: "
            "expected another run.dir, or resume=auto"
        )
    checkpoints.require_not_lost()
    requested_before = _was_requested_before(config.resume, checkpoints)
    if config.resume == "auto" or requested_before:
        last = checkpoints.folder(checkpoints.steps()[-1]) if requested_before and checkpoints.steps() else None
        newest = checkpoints.newest_whole(strict=last is not None and _is_same(last, config.resume))
        if newest is not None:
            if requested_before and not _is_same(newest[0], config.resume):
                log.warning(
                    "checkpoint.resume: this run has already started from %s, so it resumes from %s, its own "
                    "(remove %s to start from the former again)",
                    config.resume,
                    newest[0].name,
                    checkpoints.path.parent / REPORT,
                )
            return Resume, *newest
    if config.resume not in ("auto", "never"):
        return Resume, *_read_named(Path(config.resume), checkpoints)
    if config.init_from is not None:
        path = find_checkpoint(Path(config.init_from), run_dir=checkpoints.path.parent)
        parts = ("model", "config", "data")
        whole = read_checkpoint(path, parts)
        return FineTune, path, {part: whole[part] for part in parts}
    return None


def _read_named(path: Path, checkpoints: CheckpointDirectory) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint that checkpoint.resume names: a folder, or the newest of a run directory."""
    if os.path.isfile(path):  # also False if permission is denied
        path = find_checkpoint(path, run_dir=checkpoints.path.parent)
    folder = find_directory(path)
    found = folder.folder(folder.steps()[-1]) if folder.steps() else find_checkpoint(path)
    if checkpoints.steps() and found.parent.resolve() != checkpoints.path.resolve():
        raise RunDirectoryError(
            f"checkpoint.resume: {path} belongs to another run, but {checkpoints.path} holds checkpoints: "
            "expected resume=auto to resume from these, or an empty run.dir"
        )
    newest = folder.newest_whole(strict=True) if folder.steps() else None
    return newest or (found, read_checkpoint(found))


def _was_requested_before(path: str, checkpoints: CheckpointDirectory) -> bool:
    """Return whether this run has resumed from `path` before: a requeued job then resumes where it stopped."""
    report = checkpoints.path.parent / REPORT
    if path in ("auto", "never") or not report.is_file():
        return False
    try:
        return json.loads(report.read_bytes())["asked"] == path
    except (ValueError, KeyError, TypeError):
        log.warning("%s: unreadable; resuming from checkpoint.resume=%s as if for the first time", report, path)
        return False


def _is_same(folder: Path, named: str) -> bool:
    return folder.resolve() in (Path(named).resolve(), Path(named).resolve().parent)


def keep_or_forget_best(
    progress: TrainProgress, checkpoints: CheckpointDirectory, config: CheckpointConfig, context: Context
) -> None:
    """Point `best` at the best checkpoint of the restored progress; if it is unusable, forget its loss."""
    here, problem = None, "not found in this run"
    with context.together("the best checkpoint"):
        if context.is_main:
            if config.keep_best and progress.best_step in checkpoints.steps():
                here = checkpoints.folder(progress.best_step)
                try:
                    if progress.best_step != progress.step:  # else it was verified when it was read
                        verify_checkpoint(here)
                except CheckpointUnreadable:
                    raise
                except ResumeRefused as damage:
                    here, problem = None, f"is damaged: {damage}"
            if here is not None and not (checkpoints.path / "best").exists():
                log.warning("checkpoint pointer %s: missing; written again", checkpoints.path / "best")
            checkpoints.point("best", here)
    if context.broadcast_object(here) is None and config.keep_best and progress.best_step is not None:
        log.warning("best checkpoint (step %d) %s; the next validation sets a new best", progress.best_step, problem)
        progress.best_validation_loss, progress.best_step, progress.validations_since_best = None, None, 0
