"""The curves of a run for TensorBoard: a file of records, each of which holds the points of one step.

The messages are TensorBoard's own, the records those of TensorFlow (tensorflow/core/lib/io/record_writer.h). torch's
SummaryWriter writes the same through a queue and a thread, a record for each point, and takes 0.14 s and 180 modules to
import; this takes a tenth of the time and a quarter of the modules, and hands a point to the operating system at once.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary


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
        values = [Summary.Value(tag=name, simple_value=value) for name, value in points.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
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
