"""Event files, held against TensorBoard's own reader and writer."""

import io
import resource

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

from topoflow.logs import CurveFile


def events(folder):
    """What TensorBoard reads of the files in the order of their names, a list for each."""
    return [list(LegacyEventFileLoader(str(path)).Load()) for path in sorted(folder.iterdir())]


def test_tensorboard_reads_a_version_a_start_and_the_points(tmp_path):
    curves = CurveFile(tmp_path / "deep" / "curves", first_step=7)
    curves.draw(7, {"loss/train": 0.5, "learning_rate/head": 1e-3})
    curves.draw(2**40, {"loss/train": -1e30})
    curves.close()
    ((version, start, first, second),) = events(tmp_path / "deep" / "curves")
    assert (version.file_version, version.step) == ("brain.Event:2", 7)
    assert (start.session_log.status, start.step) == (SessionLog.START, 7)
    assert {value.tag: value.simple_value for value in first.summary.value} == {
        "loss/train": 0.5, "learning_rate/head": pytest.approx(1e-3),
    }  # fmt: skip
    assert (first.step, second.step) == (7, 2**40)
    assert version.wall_time <= start.wall_time <= first.wall_time <= second.wall_time


def test_the_bytes_are_those_of_tensorboards_writer(tmp_path):
    curves = CurveFile(tmp_path, first_step=0)
    for step in range(40):
        curves.draw(step, {f"curve {name}": name + step / 7 for name in range(step)})
    curves.close()
    (path,), written = tmp_path.iterdir(), io.BytesIO()
    writer = RecordWriter(written)
    for event in events(tmp_path)[0]:
        writer.write(event.SerializeToString())
    assert path.read_bytes() == written.getvalue()


def test_files_are_named_in_the_order_of_their_making(tmp_path):
    for step in range(20):
        CurveFile(tmp_path, first_step=step).close()
    assert [file[0].step for file in events(tmp_path)] == list(range(20))


def test_points_before_a_torn_record_are_read(tmp_path):
    curves = CurveFile(tmp_path, first_step=0)
    curves.draw(1, {"loss/train": 0.5})
    (path,) = tmp_path.iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        with pytest.raises(OSError, match="File too large"):
            curves.draw(2, {"loss/train": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [event.step for event in events(tmp_path)[0] if event.HasField("summary")] == [1]
