"""What a run says: log lines, metrics.jsonl, TensorBoard curves and the progress bar. Only rank 0 speaks."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from topoflow.errors import RunDirectoryError

logger = logging.getLogger(__name__)
_progress_logger = logging.getLogger(f"{__name__}.progress")
_HANDLER_NAMES = ("topoflow-terminal", "topoflow-file")


class _TerminalStream:
    """stderr as it is at the time of writing, above a progress bar if one is shown."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


class _TerminalFormatter(logging.Formatter):
    """The message alone; warnings and errors say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return level + super().format(record)


def _is_not_on_the_bar(record: logging.LogRecord) -> bool:
    return record.name != _progress_logger.name or not sys.stderr.isatty()


def setup_logging(run_dir: Path | None, is_main: bool) -> None:
    """Let the `topoflow` loggers speak: messages to stderr, and dated lines appended to run_dir/train.log.

    On ranks that are not main only errors are shown, and nothing goes to the file. run_dir None: no file. A second
    call replaces what the first one set up; `close_logging` undoes it.
    """
    close_logging()
    package = logging.getLogger("topoflow")
    package.setLevel(logging.INFO if is_main else logging.ERROR)
    terminal = logging.StreamHandler(_TerminalStream())
    terminal.setFormatter(_TerminalFormatter())
    terminal.addFilter(_is_not_on_the_bar)
    handlers: list[logging.Handler] = [terminal]
    if is_main and run_dir is not None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
        except OSError as error:
            raise RunDirectoryError(f"{run_dir / 'train.log'}: cannot be written: {error.strerror}") from None
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    for handler, name in zip(handlers, _HANDLER_NAMES, strict=False):
        handler.name = name
        package.addHandler(handler)


def close_logging() -> None:
    """Undo `setup_logging`."""
    package = logging.getLogger("topoflow")
    for handler in [handler for handler in package.handlers if handler.name in _HANDLER_NAMES]:
        package.removeHandler(handler)
        handler.close()


class MetricsWriter:
    """The curves of a run: run_dir/metrics.jsonl, and the same numbers for TensorBoard.

    Each call appends one line and hands it to the operating system at once, so a killed process loses none. A number
    that is not finite becomes null (JSON has no NaN) and no point in TensorBoard.

    Args: run_dir, or None to write nothing (ranks that are not main); resume_step, the step that was restored: what
    the files hold of later steps is removed, as is an earlier `end`. None: a new run, everything is removed.

    Raises: RunDirectoryError if a line of metrics.jsonl other than a torn last one cannot be read.
    """

    def __init__(self, run_dir: Path | None, resume_step: int | None):
        self._lines = self._curves = None
        if run_dir is None:
            return
        # here and not above: only rank 0 pays for the import (0.2 s, many small files)
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        last_step = -1 if resume_step is None else resume_step
        path = run_dir / "metrics.jsonl"
        cut = cut_metrics(path, last_step)
        if cut:
            logger.info("%s: lines cut because this run goes on from step %d: %d", path, max(last_step, 0), cut)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._curves = SummaryWriter(run_dir / "tensorboard", purge_step=last_step + 1)

    def train_step(
        self,
        *,
        step: int,
        epoch: int,
        samples: int,
        loss: float,
        grad_norm: float,
        lr: Mapping[str, float],
        seconds: float,
        samples_per_second: float,
    ) -> None:
        """An optimizer step (counted from 1): mean loss of its global batch, and the rates that it used by group."""
        measured = {"grad_norm": grad_norm, "lr": dict(lr), "seconds": seconds}
        self._write("train", step, epoch=epoch, samples=samples, **_loss(loss), **measured)
        points = {"loss/train": loss, "gradient_norm": grad_norm, "samples_per_second": samples_per_second}
        self._draw(step, points | {f"learning_rate/{group}": rate for group, rate in lr.items()})

    def validation(self, step: int, loss: float, by_target: Mapping[str, float]) -> None:
        """Mean loss over the validation split after `step` steps, over all targets and for each."""
        self._write("validation", step, **_loss(loss), by_target=dict(by_target))
        self._draw(step, {"loss/validation": loss} | {f"loss_by_target/{name}": v for name, v in by_target.items()})

    def checkpoint(self, step: int, path: Path | str) -> None:
        """A checkpoint of the state after `step` steps was committed."""
        self._write("checkpoint", step, path=str(path))

    def resume(self, step: int, path: Path | str) -> None:
        """The run goes on from a checkpoint of the state after `step` steps."""
        self._write("resume", step, path=str(path))

    def end(self, step: int, reason: str) -> None:
        """The run ended after `step` steps."""
        self._write("end", step, reason=reason)

    def close(self) -> None:
        """Finish both files."""
        if self._lines is not None:
            self._lines.close()
            self._curves.close()

    def _write(self, event: str, step: int, **values: Any) -> None:
        if self._lines is not None:
            record = {"event": event, "step": step} | {key: _finite_or_null(value) for key, value in values.items()}
            self._lines.write(json.dumps(record, allow_nan=False) + "\n")

    def _draw(self, step: int, points: Mapping[str, float]) -> None:
        if self._curves is not None:
            for tag, value in points.items():
                if math.isfinite(value):
                    self._curves.add_scalar(tag, value, step)
            self._curves.flush()


def _loss(loss: float) -> dict[str, Any]:
    return {"loss": loss, "loss_hex": float(loss).hex()}


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, last_step: int) -> int:
    """Remove from a metrics.jsonl the events after last_step, every `end`, and a last line that was torn.

    The file is replaced in one move, so a kill leaves the old one or the new one. Returns the number of lines removed.

    Raises: RunDirectoryError for any other line that is not an event.
    """
    if not path.exists():
        return 0
    text = path.read_text(encoding="utf-8", errors="replace")
    lines, kept = text.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            if event["step"] <= last_step and event["event"] != "end":
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise RunDirectoryError(f"{path}: line {number} is not an event: expected a JSON object") from error
    if "".join(kept) != text:
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return len(lines) - len(kept)


class Progress:
    """How far the training is: a bar on a terminal, plain lines everywhere else, and in the log file always.

    Args: first_step, the steps that were done before this process (resumed); total_steps, the length of the run;
    is_main: other ranks show nothing.
    """

    def __init__(self, first_step: int, total_steps: int, is_main: bool):
        self._first_step, self._total_steps = first_step, total_steps
        self._start = time.monotonic()
        shown = is_main and sys.stderr.isatty()
        self._bar = tqdm(initial=first_step, total=total_steps, unit="step", disable=not shown, dynamic_ncols=True)

    def advance(self, step: int, loss: float | None) -> None:
        """`step` steps are done. loss: given every log_every_steps, it is shown and makes a line."""
        self._bar.update(step - self._bar.n)
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}")
            rate = (step - self._first_step) / max(time.monotonic() - self._start, 1e-9)
            left = timedelta(seconds=round((self._total_steps - step) / rate)) if rate else "unknown"
            _progress_logger.info(
                "step %d/%d  loss %.4f  %.3g steps/s  left %s", step, self._total_steps, loss, rate, left
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def format_summary(
    *,
    device: str,
    param_groups: Sequence[Mapping[str, Any]],
    splits: Mapping[str, str],
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    accumulation: int,
    steps_per_epoch: int,
    total_steps: int,
    first_step: int,
) -> str:
    """What is about to be trained, as lines of text.

    Args: device, with what else is worth saying about it (precision, threads); param_groups as the optimizer has them
    (`name`, `params`, `lr`); splits {name: what it holds, such as "1008 samples from 252 start times"}; first_step, the
    steps that are done already.
    """
    rows = [
        (group["name"], len(group["params"]), sum(p.numel() for p in group["params"]), f"{group['lr']:.3g}")
        for group in param_groups
    ]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), ""))
    lines = [f"{'group':<16}{'tensors':>9}{'parameters':>14}{'rate':>10}"]
    lines += [f"{name:<16}{tensors:>9,}{numbers:>14,}{rate:>10}".rstrip() for name, tensors, numbers, rate in rows]
    facts = {
        "device": device,
        **splits,
        "batch": f"{global_batch_size} = {micro_batch_size} x {world_size} processes x {accumulation} accumulated",
        "length": f"{total_steps:,} steps, {steps_per_epoch:,} an epoch, {first_step:,} done",
    }
    return "\n".join(lines + [f"{name:<16}{fact}" for name, fact in facts.items()])
