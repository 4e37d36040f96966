import json
import logging
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from topoflow.errors import RunDirectoryError
from topoflow.logs import MetricsWriter, Progress, close_logging, cut_metrics, setup_logging


@pytest.fixture(autouse=True)
def _package_logger_as_before():
    package = logging.getLogger("topoflow")
    level, handlers = package.level, list(package.handlers)
    yield
    for handler in set(package.handlers) - set(handlers):
        package.removeHandler(handler)
        handler.close()
    package.setLevel(level)


def read_events(run_dir: Path) -> list[dict]:
    def refuse(token):
        raise ValueError(f"{token} is no JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_curve(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    if tag not in accumulator.Tags()["scalars"]:
        return []
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def write_step(writer: MetricsWriter, step: int, loss: float) -> None:
    lr = {"head": 5e-5 / step, "others": 1e-4 / step}
    writer.train_step(
        step=step, epoch=0, samples=8 * step, loss=loss, grad_norm=2.5, lr=lr, seconds=0.25, samples_per_second=32.0
    )


def write_run(run_dir: Path, first: int, last: int, resume_step: int | None, loss_shift: float) -> None:
    """Steps first to last; validation, then checkpoint, every second step; an end."""
    writer = MetricsWriter(run_dir, resume_step)
    if resume_step is not None:
        writer.resume(resume_step, run_dir / f"checkpoints/step-{resume_step}")
    for step in range(first, last + 1):
        write_step(writer, step, step + loss_shift)
        if step % 2 == 0:
            writer.validation(step, 10 + step + loss_shift, {"pm25": 1.0 + step, "o3": 2.0 + step})
            writer.checkpoint(step, run_dir / f"checkpoints/step-{step}")
    writer.end(last, "done")
    writer.close()


def test_lines_of_metrics_hold_what_the_design_names(tmp_path):
    write_run(tmp_path, 1, 2, None, 0.1)
    first, second, validation, checkpoint, end = read_events(tmp_path)
    assert first == {
        "event": "train", "step": 1, "epoch": 0, "samples": 8, "loss": 1.1, "loss_hex": "0x1.199999999999ap+0",
        "grad_norm": 2.5, "lr": {"head": 5e-5, "others": 1e-4}, "seconds": 0.25,
    }  # fmt: skip
    assert second["step"] == 2
    assert validation == {
        "event": "validation", "step": 2, "loss": 12.1, "loss_hex": (12.1).hex(), "by_target": {"pm25": 3.0, "o3": 4.0},
    }  # fmt: skip
    assert checkpoint == {"event": "checkpoint", "step": 2, "path": str(tmp_path / "checkpoints/step-2")}
    assert end == {"event": "end", "step": 2, "reason": "done"}


KILLED_AFTER_A_STEP = """
import os, sys
from pathlib import Path
from topoflow.logs import MetricsWriter

writer = MetricsWriter(Path(sys.argv[1]), None)
lr = {f"group {i}": 1e-4 for i in range(20)}
for step in (1, 2):
    writer.train_step(step=step, epoch=0, samples=8, loss=0.5, grad_norm=1, lr=lr, seconds=1, samples_per_second=8)
    if step == 1:
        writer.checkpoint(1, "step-1")
os._exit(0)
"""


def test_a_killed_process_loses_no_line_and_no_point_before_its_checkpoint(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED_AFTER_A_STEP, str(tmp_path)], check=True)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 1, 2]
    assert read_curve(tmp_path, "loss/train")[0] == (1, 0.5)
    assert read_curve(tmp_path, "learning_rate/group 19")[0] == (1, pytest.approx(1e-4))


def test_numbers_that_are_not_finite_become_null_and_no_point(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.validation(3, 1.5, {"pm25": 2.0, "o3": float("nan")})
    writer.validation(4, float("inf"), {"pm25": 2.0})
    writer.close()
    events = read_events(tmp_path)
    assert events[0]["by_target"] == {"pm25": 2.0, "o3": None}
    assert events[1]["loss"] is None
    assert events[1]["loss_hex"] == "inf"
    assert read_curve(tmp_path, "loss_by_target/o3") == []
    assert read_curve(tmp_path, "loss/validation") == [(3, 1.5)]


def test_tensorboard_has_every_curve(tmp_path):
    write_run(tmp_path, 1, 3, None, 0.5)
    assert read_curve(tmp_path, "loss/train") == [(1, 1.5), (2, 2.5), (3, 3.5)]
    assert read_curve(tmp_path, "loss/validation") == [(2, 12.5)]
    assert read_curve(tmp_path, "loss_by_target/o3") == [(2, 4.0)]
    assert read_curve(tmp_path, "gradient_norm") == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert read_curve(tmp_path, "samples_per_second") == [(1, 32.0), (2, 32.0), (3, 32.0)]
    rates = read_curve(tmp_path, "learning_rate/head")
    assert rates == [(step, pytest.approx(5e-5 / step)) for step in (1, 2, 3)]


# at step 4, what is cut is two steps, the validation and the checkpoint of step 6, and the end; at step 6 only the end
@pytest.mark.parametrize(("resumptions", "cut"), [([(4, 7)], 5), ([(6, 8)], 1), ([(4, 5), (4, 9), (2, 8)], 5)])
def test_curves_and_lines_of_a_resumed_run_are_whole_and_do_not_overlap(tmp_path, caplog, resumptions, cut):
    write_run(tmp_path, 1, 6, None, 0.0)
    expected = {step: float(step) for step in range(1, 7)}
    for number, (resume_step, last) in enumerate(resumptions, start=1):
        time.sleep(1.1)  # TensorBoard orders the files of a run by the second in their names
        with caplog.at_level(logging.INFO, logger="topoflow"):
            write_run(tmp_path, resume_step + 1, last, resume_step, 0.25 * number)
        expected = {step: loss for step, loss in expected.items() if step <= resume_step}
        expected |= {step: step + 0.25 * number for step in range(resume_step + 1, last + 1)}
    assert read_curve(tmp_path, "loss/train") == list(expected.items())
    assert [step for step, _ in read_curve(tmp_path, "loss/validation")] == [s for s in expected if s % 2 == 0]
    events = read_events(tmp_path)
    assert {e["step"]: e["loss"] for e in events if e["event"] == "train"} == expected
    assert [e["step"] for e in events if e["event"] == "train"] == list(expected)
    assert [e["step"] for e in events if e["event"] == "validation"] == [s for s in expected if s % 2 == 0]
    assert [e["event"] for e in events].count("end") == 1
    moved = f"{cut} lines after step {resumptions[0][0]} moved to metrics-abandoned.jsonl"
    assert caplog.messages[0].endswith(moved)


@pytest.mark.parametrize("resume_step", [None, 2])
def test_every_line_that_is_cut_is_kept_in_another_file(tmp_path, resume_step):
    write_run(tmp_path, 1, 4, None, 0.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"torn": ')
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_run(tmp_path, (resume_step or 0) + 1, 6, resume_step, 0.25)
    abandoned = (tmp_path / "metrics-abandoned.jsonl").read_text().splitlines()
    kept = before[:4] if resume_step else []
    assert abandoned == before[len(kept) :]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[: len(kept)] == kept
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_run(tmp_path, 1, 1, None, 0.5)
    assert (tmp_path / "metrics-abandoned.jsonl").read_text().splitlines() == abandoned + again


def test_lines_that_are_missing_before_the_resumed_step_are_named(tmp_path, caplog):
    write_run(tmp_path, 1, 5, None, 0.0)
    whole = MetricsWriter(tmp_path, 5, log_every_steps=1)
    whole.close()
    assert (whole.missing_steps, [m for m in caplog.messages if "are missing:" in m]) == ([], [])
    writer = MetricsWriter(tmp_path, 14, log_every_steps=3)  # lines 6, 9 and 12 were lost with the power
    assert writer.missing_steps == [6, 9, 12]
    assert caplog.messages[-1] == f"{tmp_path}/metrics.jsonl: lines of these steps are missing: 6, 9, 12"
    writer.resume(14, "step-14")
    writer.close()
    assert read_events(tmp_path)[-1] == {"event": "resume", "step": 14, "path": "step-14", "missing_steps": "6, 9, 12"}
    nothing_to_compare = MetricsWriter(tmp_path / "imported", 14, log_every_steps=1)
    nothing_to_compare.close()
    assert nothing_to_compare.missing_steps == []


FLUSHED = """
import os, sys
from pathlib import Path
from topoflow.logs import MetricsWriter

writer = MetricsWriter(Path(sys.argv[1]), None)
writer.end(3, "x")
os.write(2, b"------\\n")
writer.checkpoint(3, "step-3")
os._exit(0)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_a_checkpoint_flushes_the_lines_to_the_disk(tmp_path):
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-e", "trace=write,fsync", "-o", str(trace), sys.executable, "-c", FLUSHED]
    subprocess.run([*command, str(tmp_path / "run")], check=True, capture_output=True)
    calls = trace.read_text().partition("------")[2].splitlines()
    of_lines = [line.split("(")[0].split()[-1] for line in calls if "metrics.jsonl" in line]
    assert of_lines == ["write", "fsync"]


def test_a_new_run_removes_what_an_earlier_one_left(tmp_path):
    write_run(tmp_path, 1, 4, None, 0.0)
    time.sleep(1.1)
    write_run(tmp_path, 1, 2, None, 0.25)
    assert read_curve(tmp_path, "loss/train") == [(1, 1.25), (2, 2.25)]
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2, 2, 2, 2]


def test_a_torn_last_line_is_removed_and_the_next_one_stands_alone(tmp_path):
    write_run(tmp_path, 1, 4, None, 0.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    write_run(tmp_path, 5, 5, 4, 0.0)
    assert [e["step"] for e in read_events(tmp_path) if e["event"] == "train"] == [1, 2, 3, 4, 5]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n{"event": "train", "step": 2}')
    assert cut_metrics(path, 2) == (0, 2)
    assert path.read_text().splitlines() == ['{"event": "train", "step": 1}', '{"event": "train", "step": 2}']
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("broken", ["not json", "17", '{"event": "train"}'])
def test_a_broken_line_before_the_last_is_refused_by_number(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"event": "train", "step": 1}}\n{broken}\n{{"event": "end", "step": 1}}\n'
    )
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: line 2"):
        MetricsWriter(tmp_path, 1)


def test_every_change_of_the_lines_is_made_inside_the_guard(tmp_path):
    path, grown_inside = tmp_path / "metrics.jsonl", []

    def read():
        return path.read_bytes() if path.exists() else b""

    @contextmanager
    def guard():
        before = read()
        yield
        grown_inside.append((before, read()))

    for resume_step in (None, 1):
        writer = MetricsWriter(tmp_path, resume_step, guard)
        write_step(writer, 2, 0.5)
        writer.end(2, "done")
        writer.close()
    assert len(grown_inside) == 7  # two lines; what is cut is kept, the rest copied and renamed; two lines
    assert [before for before, _ in grown_inside] == [b""] + [after for _, after in grown_inside[:-1]]


def refuse_all():
    raise RunDirectoryError("run.dir: taken over")


def test_what_the_guard_refuses_is_not_written(tmp_path, capfd):
    write_run(tmp_path, 1, 2, None, 0.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunDirectoryError, match="taken over"):
        MetricsWriter(tmp_path, 1, refuse_all)
    writer = MetricsWriter(tmp_path, 2)
    writer._guard = refuse_all
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    assert before.startswith(lines)
    with pytest.raises(RunDirectoryError, match="taken over"):
        write_step(writer, 3, 0.5)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    setup_logging(tmp_path, True, refuse_all)
    logging.getLogger("topoflow.trainer").info("not for the file")
    assert (tmp_path / "train.log").read_bytes() == b""
    assert capfd.readouterr().err.endswith("not for the file\n")
    assert not list(tmp_path.glob(".*"))


def test_an_append_to_the_old_file_after_a_cut_is_not_in_the_new_one(tmp_path):
    path, line = tmp_path / "metrics.jsonl", '{"event": "train", "step": 1}\n'
    path.write_text(line)
    with path.open("a") as of_who_held_it:
        assert cut_metrics(path, 1) == (0, 1)
        of_who_held_it.write("late")
    assert path.read_text() == line


@pytest.fixture
def full_disk():
    """Lets files grow to a size and no further, as far as this process is concerned."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_wait_while_the_disk_is_full(tmp_path, full_disk, capsys):
    writer = MetricsWriter(tmp_path, None)
    setup_logging(tmp_path, True)
    write_step(writer, 1, 0.5)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    full_disk(size + 10)
    for step in (2, 3):
        write_step(writer, step, 0.5)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 10
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl: cannot be written: File too large; retried with each line") == 1
    full_disk(resource.RLIM_INFINITY)
    write_step(writer, 4, 0.5)
    writer.close()
    close_logging()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_lines_that_never_could_be_written_are_counted_and_the_torn_one_goes_on_resume(tmp_path, full_disk, capsys):
    writer = MetricsWriter(tmp_path, None)
    setup_logging(tmp_path, True)
    write_step(writer, 1, 0.5)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    full_disk(size + 10)
    write_step(writer, 2, 0.5)
    writer.close()
    close_logging()
    assert "metrics.jsonl: its last 1 lines were not written" in capsys.readouterr().err
    full_disk(resource.RLIM_INFINITY)
    MetricsWriter(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == size


def test_a_folder_of_curves_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(RunDirectoryError, match=r"tensorboard: cannot be written: File exists"):
        MetricsWriter(tmp_path, None)


def test_metrics_that_are_a_link_to_nothing_are_refused_with_its_target(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/not/mounted/metrics.jsonl")
    expected = r"metrics\.jsonl \(a link to /not/mounted/metrics\.jsonl\): cannot be written: No such file or directory"
    with pytest.raises(RunDirectoryError, match=expected):
        MetricsWriter(tmp_path, None)


def test_curves_end_where_their_disk_is_full(tmp_path, full_disk, capsys):
    writer = MetricsWriter(tmp_path, None)
    setup_logging(tmp_path, True)
    write_step(writer, 1, 0.5)
    writer.checkpoint(1, "step-1")
    (curves,) = (tmp_path / "tensorboard").iterdir()
    full_disk(curves.stat().st_size + 10)
    write_step(writer, 2, 0.5)
    writer.checkpoint(2, "step-2")
    full_disk(resource.RLIM_INFINITY)
    write_step(writer, 3, 0.5)
    writer.close()
    close_logging()
    said = capsys.readouterr().err
    assert said.count("tensorboard: cannot be written: File too large; the curves end here") == 1
    assert [event["step"] for event in read_events(tmp_path)] == [1, 1, 2, 2, 3]
    assert read_curve(tmp_path, "loss/train") == [(1, 0.5)]


def test_a_log_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "train.log").mkdir()
    with pytest.raises(RunDirectoryError, match=r"train\.log: cannot be written: Is a directory"):
        setup_logging(tmp_path, True)


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    setup_logging(tmp_path / "run", is_main=False)
    writer = MetricsWriter(None, None)
    progress = Progress(0, 10, is_main=False)
    write_step(writer, 1, 0.5)
    writer.validation(1, 0.5, {"pm25": 0.5})
    writer.end(1, "done")
    progress.advance(1, 0.5)
    progress.close()
    writer.close()
    logging.getLogger("topoflow.somewhere").warning("a warning of another rank")
    assert capfd.readouterr() == ("", "")
    logging.getLogger("topoflow.somewhere").error("why this rank stops")
    assert capfd.readouterr() == ("", "error: why this rank stops\n")
    assert list(tmp_path.iterdir()) == []


def test_log_goes_to_stderr_and_is_appended_to_the_file(tmp_path, capfd):
    for text in ("first", "second"):
        setup_logging(tmp_path, is_main=True)
        logging.getLogger("topoflow.data").info(text)
    logging.getLogger("topoflow.data").warning("look")
    assert capfd.readouterr() == ("", "first\nsecond\nwarning: look\n")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines] == [
        "INFO first", "INFO second", "WARNING look",
    ]  # fmt: skip


def test_progress_away_from_a_terminal_is_plain_lines(tmp_path, capfd, monkeypatch):
    clock = SimpleNamespace(monotonic=iter([100.0, 110.0, 120.0]).__next__)
    monkeypatch.setattr("topoflow.logs.time", clock)
    setup_logging(tmp_path, is_main=True)
    progress = Progress(first_step=80, total_steps=1000, is_main=True)
    progress.advance(99, None)
    progress.advance(100, 0.51234)  # 20 steps in 10 s: 900 more take 450 s
    progress.advance(200, 0.4)  # 120 steps in 20 s: 800 more take 133 s
    progress.close()
    expected = [
        "step 100/1000  loss 0.5123  2 steps/s  left 0:07:30",
        "step 200/1000  loss 0.4000  6 steps/s  left 0:02:13",
    ]
    assert capfd.readouterr().err.splitlines() == expected
    assert [line.split(" INFO ")[1] for line in (tmp_path / "train.log").read_text().splitlines()] == expected


ON_A_TERMINAL = """
import logging, sys, time
from pathlib import Path
from topoflow.logs import Progress, setup_logging

setup_logging(Path(sys.argv[1]), is_main=True)
progress = Progress(first_step=4, total_steps=20, is_main=True)
for step in range(5, 13):
    time.sleep(0.03)
    progress.advance(step, 0.75 if step % 4 == 0 else None)
logging.getLogger("topoflow.trainer").info("a word between")
progress.close()
"""


def test_progress_on_a_terminal_is_a_bar_and_the_log_file_still_has_lines(tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)], stderr=theirs)
    os.close(theirs)
    shown = b""
    while chunk := read_terminal(ours):
        shown += chunk
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"12/20 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss 0\.7500\]", text)
    assert re.search(r"\ra word between\r?\n", re.sub(r"\r +\r", "\r", text))
    assert "left" not in text
    logged = [line.split(" INFO ")[1] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert [line.split("  ")[0] for line in logged] == ["step 8/20", "step 12/20", "a word between"]


def read_terminal(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except OSError:  # Linux says EIO when the other side of a pseudo-terminal is closed
        return b""
