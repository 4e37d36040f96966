"""What a run writes for people: log lines, metrics.jsonl, TensorBoard curves and the progress bar. Only rank 0 does."""

import io
import json
import logging
import math
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from topoflow.errors import RunDirectoryError

logger = logging.getLogger(__name__)
_progress_logger = logging.getLogger(f"{__name__}.progress")
_HANDLER_NAMES = ("topoflow-terminal", "topoflow-file")

Guard = Callable[[], AbstractContextManager[None]]
"""Entered around each change of a run directory: raises RunDirectoryError where it is no longer this process's."""


class _TerminalStream:
    """stderr as it is at the time of writing, above a progress bar if one is shown."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


class _LogFile(logging.StreamHandler):
    """Lines appended to a file at once, while the run directory is this process's and takes them; else dropped.

    The terminal has them all the same, and the next line of metrics.jsonl says what is wrong.
    """

    def __init__(self, path: Path, guard: Guard):
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        super().__init__(io.TextIOWrapper(file, encoding="utf-8", write_through=True))
        self._guard = guard

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with self._guard():
                super().emit(record)
        except (RunDirectoryError, OSError):
            return

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        self.stream.close()
        super().close()


class _TerminalFormatter(logging.Formatter):
    """The message alone; warnings and errors say that they are."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return level + super().format(record)


def _is_not_on_the_bar(record: logging.LogRecord) -> bool:
    return record.name != _progress_logger.name or not sys.stderr.isatty()


def setup_logging(run_dir: Path | None, is_main: bool, guard: Guard = nullcontext) -> None:
    """Let the `topoflow` loggers speak: messages to stderr, and dated lines appended to run_dir/train.log.

    On ranks that are not main only errors are shown, and nothing goes to the file. run_dir None: no file. A second
    call replaces what the first one set up; `close_logging` undoes it.

    Raises:
        RunDirectoryError: train.log cannot be written.
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
            file = _LogFile(run_dir / "train.log", guard)
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

    Each call appends one line and hands it to the operating system at once, so a killed process loses none. Lines that
    the file system does not take (a full disk) are logged as an error and wait for the next call: whether the run goes
    on is decided by its checkpoints. A number that is not finite becomes null (JSON has no NaN) and no point in
    TensorBoard.

    Args: run_dir, or None to write nothing (ranks that are not main); resume_step, the step that was restored: what
    the files hold of later steps is removed, as is an earlier `end`. None: a new run, everything is removed.
    validation_owed: the validation after that step is to be made again, so an event of it is removed, too. guard is
    entered around each append, and the removal.

    Raises: RunDirectoryError if a file cannot be opened, or a line of metrics.jsonl other than a torn last one cannot
    be read; when writing, if the run directory is no longer this process's.
    """

    def __init__(
        self,
        run_dir: Path | None,
        resume_step: int | None,
        guard: Guard = nullcontext,
        validation_owed: bool = False,
    ):
        self._lines = self._curves = None
        self._unwritten, self._is_failing = b"", False
        if run_dir is None:
            return
        # here and not above: only rank 0 pays for the import of TensorBoard's messages (many small files)

        self._guard, self._path, self._curves_path = guard, run_dir / "metrics.jsonl", run_dir / "tensorboard"
        last_step = -1 if resume_step is None else resume_step
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            cut = cut_metrics(self._path, last_step, guard, validation_owed)
            self._lines = self._path.open("ab", buffering=0)
        except OSError as error:
            self._refuse(self._path, error)
        if cut:
            logger.info("%s: lines cut because this run goes on from step %d: %d", self._path, max(last_step, 0), cut)
        try:
            self._curves = CurveFile(self._curves_path, first_step=last_step + 1)
        except OSError as error:
            self._refuse(self._curves_path, error)

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
            if self._unwritten:
                logger.error("%s: not written: its last %d lines", self._path, self._unwritten.count(b"\n"))
            self._lines.close()
        if self._curves is not None:
            try:
                self._curves.close()
            except OSError as error:
                logger.error("%s: cannot be written: %s", self._curves_path, _reason(error))

    def _write(self, event: str, step: int, **values: Any) -> None:
        if self._lines is None:
            return
        record = {"event": event, "step": step} | {key: _finite_or_null(value) for key, value in values.items()}
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            with self._guard():
                while self._unwritten:  # a disk that fills up takes a part first
                    self._unwritten = self._unwritten[self._lines.write(self._unwritten) :]
        except OSError as error:
            if not self._is_failing:
                logger.error("%s: cannot be written: %s; lines wait until it can", self._path, _reason(error))
            self._is_failing = True
        else:
            self._is_failing = False

    def _draw(self, step: int, points: Mapping[str, float]) -> None:
        if self._curves is None:
            return
        try:
            self._curves.draw(step, {name: value for name, value in points.items() if math.isfinite(value)})
        except OSError as error:
            logger.error("%s: cannot be written: %s; its curves end here", self._curves_path, _reason(error))
            self._curves = None  # nobody reads on behind a torn record

    def _refuse(self, path: Path, error: OSError) -> NoReturn:
        raise RunDirectoryError(f"{path}: cannot be written: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _loss(loss: float) -> dict[str, Any]:
    return {"loss": loss, "loss_hex": float(loss).hex()}


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, last_step: int, guard: Guard = nullcontext, validation_owed: bool = False) -> int:
    """Remove from a metrics.jsonl the events after last_step, every `end`, and a last line that was torn.

    validation_owed: and the validation of last_step.

    The file is replaced by a copy in one move, so a kill leaves the old one or the new one, and an append by a process
    that held the run before and has it open still goes to the old one. Returns the number of lines removed.

    Raises: RunDirectoryError for any other line that is not an event; OSError.
    """
    if not path.exists():
        return 0
    text = path.read_text(encoding="utf-8", errors="replace")
    lines, kept = text.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            is_owed = validation_owed and (event["event"], event["step"]) == ("validation", last_step)
            if event["step"] <= last_step and event["event"] != "end" and not is_owed:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise RunDirectoryError(f"{path}: line {number} is not an event: expected a JSON object") from error
    temporary = path.with_name(f".writing-{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        with guard():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
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


def _build_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _build_table()
"""What each byte does to a CRC-32C (Castagnoli, reflected; RFC 3720, appendix B.4)."""


class CurveFile:
    """A new event file in `folder`, which TensorBoard reads after those that are there.

    Args: first_step, from which on points of the earlier files are not to be shown.

    Raises: OSError, also when writing; the file may then end in a torn record, behind which nothing is read.
    """

    def __init__(self, folder: Path, first_step: int):
        # here and not above: only rank 0 pays for the import of TensorBoard's messages (many small files)
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard takes the files of a folder in the order of their names
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._write(Event(wall_time=time.time(), step=first_step, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step, session_log=start))

    def draw(self, step: int, points: Mapping[str, float]) -> None:
        """One point of each curve, by name, at `step`."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in points.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        record = length + _checksum(length) + content + _checksum(content)
        while record:
            record = record[self._file.write(record) :]


def _checksum(content: bytes) -> bytes:
    """CRC-32C, masked as TensorFlow does: rotated, and a constant added."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
