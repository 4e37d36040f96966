"""What a run logs: lines, metrics.jsonl, TensorBoard curves and a progress bar. Only rank 0 writes them."""

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from topoflow.errors import RunDirectoryError
from topoflow.files import Guard, flush, flush_folder, write_atomically
from topoflow.terminal import write_stderr
from topoflow.text import number_ranges

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
_progress_logger = logging.getLogger(f"{__name__}.progress")


class _Terminal(logging.Handler):
    """Prints on the present sys.stderr, above a progress bar if one is shown: the message, after a warning's level."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == _progress_logger.name and sys.stderr.isatty():
            return  # the bar shows it
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with tqdm.external_write_mode(file=sys.stderr):
            write_stderr(f"{level}{self.format(record)}\n")


class _LogFile(logging.Handler):
    """Appends each line to a file at once; drops it if the run directory was taken over or its disk fails.

    The terminal still shows the line, and the next write of metrics.jsonl reports the failure.
    """

    def __init__(self, path: Path, guard: Guard):
        super().__init__()
        self._file, self._guard = open(path, "ab", buffering=0), guard  # noqa: SIM115 (closed by close)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        with suppress(RunDirectoryError, OSError), self._guard():
            self._file.write(line)

    def close(self) -> None:
        self._file.close()
        super().close()


def setup_logging(run_dir: Path | None, is_main: bool, guard: Guard = nullcontext) -> None:
    """Send messages of the `topoflow` loggers to stderr, and append them with their time to run_dir/train.log.

    Ranks that are not main show errors only and write no file. run_dir None: no file. A second call replaces the
    handlers of the first; `close_logging` removes them.

    Raises:
        RunDirectoryError: train.log cannot be written.
    """
    close_logging()
    package = logging.getLogger("topoflow")
    package.setLevel(logging.INFO if is_main else logging.ERROR)
    handlers: list[logging.Handler] = [_Terminal()]
    if is_main and run_dir is not None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(run_dir / "train.log", guard))
        except OSError as error:
            raise RunDirectoryError(f"{run_dir / 'train.log'}: cannot be written: {error.strerror}") from None
    for handler in handlers:
        package.addHandler(handler)


def close_logging() -> None:
    """Remove the handlers of `setup_logging`."""
    package = logging.getLogger("topoflow")
    for handler in [handler for handler in package.handlers if isinstance(handler, _Terminal | _LogFile)]:
        package.removeHandler(handler)
        handler.close()


class MetricsWriter:
    """The metrics of a run: run_dir/metrics.jsonl, and the same numbers as TensorBoard curves.

    Each call appends one line and passes it to the operating system at once, so a killed process loses no line. A
    checkpoint flushes the lines to the disk. Lines that the file system refuses (a full disk) are logged as an error
    and retried with the next call; only checkpoints decide whether the run continues. A number that is not finite
    becomes null (JSON has no NaN) and no point of a curve.

    Args:
        run_dir: None to write nothing (ranks that are not main).
        resume_step: the step that was restored; None for a new run. Lines of later steps, and an earlier `end`, are
            moved to metrics-abandoned.jsonl; points of later steps are hidden.
        guard: entered around each append and around the cut.
        validation_owed: the validation after resume_step is repeated, so its line is moved as well.
        log_every_steps: interval at which the interrupted run logged; None: do not look for missing lines.

    Attributes:
        missing_steps: steps up to resume_step whose lines are missing in metrics.jsonl (a disk that was full, a power
            failure), in order.

    Raises: RunDirectoryError if a file cannot be opened, or a line of metrics.jsonl other than a torn last one is
    unreadable; when writing, if another process has taken over the run directory.
    """

    def __init__(
        self,
        run_dir: Path | None,
        resume_step: int | None,
        guard: Guard = nullcontext,
        validation_owed: bool = False,
        log_every_steps: int | None = None,
    ):
        self._lines: io.FileIO | None = None
        self._curves: SummaryWriter | None = None
        self._unwritten, self._is_failing = b"", False
        self.missing_steps: list[int] = []
        if run_dir is None:
            return
        from torch.utils import tensorboard  # takes 0.15 s, and only rank 0 needs it

        self._guard, self._path, self._curves_path = guard, run_dir / "metrics.jsonl", run_dir / "tensorboard"
        resumed = -1 if resume_step is None else resume_step
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            cut, last = cut_metrics(self._path, resumed, guard, validation_owed)
            self._lines = self._path.open("ab", buffering=0)
            self._curves = tensorboard.SummaryWriter(str(self._curves_path), purge_step=resumed + 1)
        except OSError as error:
            path = Path(error.filename or self._path)
            link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
            raise RunDirectoryError(f"{path}{link}: cannot be written: {error.strerror or error}") from None
        if cut:
            logger.info(
                "%s: %d lines after step %d moved to %s", self._path, cut, max(resumed, 0), _abandoned(self._path).name
            )
        if last is not None and log_every_steps is not None:
            due = range(last + 1, resumed + 1)
            self.missing_steps = [step for step in due if step % log_every_steps == 0 or step == 1]
        if self.missing_steps:
            logger.warning("%s: lines of these steps are missing: %s", self._path, number_ranges(self.missing_steps))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """Log an optimizer step (counted from 1): mean loss of its global batch, and learning rate by group."""
        measured = {"grad_norm": grad_norm, "lr": dict(lr), "seconds": seconds}
        self._write("train", step, epoch=epoch, samples=samples, **_loss(loss), **measured)
        points = {"loss/train": loss, "gradient_norm": grad_norm, "samples_per_second": samples_per_second}
        self._draw(step, points | {f"learning_rate/{group}": rate for group, rate in lr.items()})

    def validation(self, step: int, loss: float, by_target: Mapping[str, float]) -> None:
        """Log the mean loss over the validation split after `step` steps, over all targets and for each."""
        self._write("validation", step, **_loss(loss), by_target=dict(by_target))
        self._draw(step, {"loss/validation": loss} | {f"loss_by_target/{name}": v for name, v in by_target.items()})

    def checkpoint(self, step: int, path: Path | str) -> None:
        """Log a committed checkpoint of the state after `step` steps, and flush all lines to the disk."""
        self._write("checkpoint", step, path=str(path))
        lines = self._lines
        if lines is not None:
            self._try_lines(lambda: os.fsync(lines.fileno()))
        self._try_curves(lambda curves: curves.flush())

    def resume(self, step: int, path: Path | str) -> None:
        """Log that the run resumes from a checkpoint of the state after `step` steps."""
        self._write("resume", step, path=str(path), missing_steps=number_ranges(self.missing_steps))

    def end(self, step: int, reason: str) -> None:
        """Log the end of the run after `step` steps."""
        self._write("end", step, reason=reason)

    def close(self) -> None:
        """Close both files."""
        if self._lines is not None:
            if self._unwritten:
                logger.error("%s: its last %d lines were not written", self._path, self._unwritten.count(b"\n"))
            self._lines.close()
        self._try_curves(lambda curves: curves.close())

    def _write(self, event: str, step: int, **values: Any) -> None:
        lines = self._lines
        if lines is None:
            return
        record = {"event": event, "step": step} | {key: _finite_or_null(value) for key, value in values.items()}
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        self._try_lines(lambda: self._write_lines(lines))

    def _write_lines(self, lines: io.FileIO) -> None:
        with self._guard():
            while self._unwritten:  # a disk that fills up may accept a part of the line
                self._unwritten = self._unwritten[lines.write(self._unwritten) :]

    def _try_lines(self, action: Callable[[], None]) -> None:
        """Call `action`; log the first of several failures of the file system."""
        try:
            action()
        except OSError as error:
            if not self._is_failing:
                logger.error("%s: cannot be written: %s; retried with each line", self._path, error.strerror or error)
            self._is_failing = True
        else:
            self._is_failing = False

    def _draw(self, step: int, points: Mapping[str, float]) -> None:
        for name, value in points.items():
            if math.isfinite(value):
                self._try_curves(lambda curves, name=name, value=value: curves.add_scalar(name, value, step))

    def _try_curves(self, action: Callable[["SummaryWriter"], None]) -> None:
        """Call `action`; a failure of the file system ends the curves, not the run."""
        if self._curves is None:
            return
        try:
            action(self._curves)
        except OSError as error:
            logger.error("%s: cannot be written: %s; the curves end here", self._curves_path, error.strerror or error)
            self._curves = None  # TensorBoard stops reading at a torn record


def _loss(loss: float) -> dict[str, Any]:
    return {"loss": loss, "loss_hex": float(loss).hex()}


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _abandoned(path: Path) -> Path:
    return path.with_name(f"{path.stem}-abandoned{path.suffix}")


def cut_metrics(
    path: Path, last_step: int, guard: Guard = nullcontext, validation_owed: bool = False
) -> tuple[int, int | None]:
    """Move events after last_step, each `end` and a torn last line of metrics.jsonl to metrics-abandoned.jsonl.

    The moved lines are on the disk before the file is replaced by a copy without them, so a kill loses none. The file
    is replaced even if nothing is cut: a former holder of the run that has it open then appends to the old one.

    Args: validation_owed, whether to move the validation of last_step as well.

    Returns the number of lines moved and the last step in the file; (0, None) if there is no file.

    Raises: RunDirectoryError for any other line that is not an event; OSError.
    """
    if not path.exists():
        return 0, None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept, moved, last = [], [], 0
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\n") + "\n"
        try:
            event = json.loads(line)
            is_owed = validation_owed and (event["event"], event["step"]) == ("validation", last_step)
            is_kept = event["step"] <= last_step and event["event"] != "end" and not is_owed
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise RunDirectoryError(f"{path}: line {number} is not an event: expected a JSON object") from error
            is_kept = False
        else:
            last = max(last, event["step"]) if is_kept else last
        (kept if is_kept else moved).append(line)
    if moved:
        with guard(), _abandoned(path).open("a", encoding="utf-8") as file:
            file.writelines(moved)
            flush(file)
        flush_folder(path.parent)
    write_atomically(path, "".join(kept), guard)
    return len(moved), last


class Progress:
    """Shows progress: a bar on a terminal, plain lines elsewhere, and lines in the log file in any case.

    Args: first_step, the step that was resumed from, else 0; total_steps, the length of the run; is_main: other ranks
    show nothing.
    """

    def __init__(self, first_step: int, total_steps: int, is_main: bool):
        self._first_step, self._total_steps = first_step, total_steps
        self._start = time.monotonic()
        shown = is_main and sys.stderr.isatty()
        self._bar = tqdm(initial=first_step, total=total_steps, unit="step", disable=not shown, dynamic_ncols=True)

    def advance(self, step: int, loss: float | None) -> None:
        """Show that `step` steps are done; `loss`, given every log_every_steps, also makes a line."""
        self._bar.update(step - self._bar.n)
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}")
            rate = (step - self._first_step) / max(time.monotonic() - self._start, 1e-9)
            left = timedelta(seconds=round((self._total_steps - step) / rate)) if rate else "unknown"
            _progress_logger.info(
                "step %d/%d  loss %.4f  %.3g steps/s  left %s", step, self._total_steps, loss, rate, left
            )

    def close(self) -> None:
        """Close the bar, leaving it visible."""
        self._bar.close()
