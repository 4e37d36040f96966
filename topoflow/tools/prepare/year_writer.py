"""One year of a prepared data set while it is written: day by day, so that it can be resumed."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from topoflow.data.prepared.days import DayRecord, hash_variables
from topoflow.files import flush, write_atomically


class YearWriter:
    """Write the array of a year and, next to it, a journal of its finished days.

    Days that an interrupted writer left are kept if their bytes match the journal; the rest is written again. Each line
    of the journal begins with a hash of the rest of it. A context manager.

    Args:
        array: the file, .npy; the journal lies next to it with the suffix .journal.
        identity: what the year is made of and how; a journal with another identity is discarded.
        shape: [time, variable, row, column] of the whole year.
        dtype: of the numbers, such as "<f4".
        hours: of each day, in order.
    """

    def __init__(self, array: Path, identity: str, shape: tuple[int, ...], dtype: str, hours: list[int]):
        assert sum(hours) == shape[0]
        self.path, self.shape, self.dtype, self.hours = array, shape, np.dtype(dtype), hours
        self.days: list[DayRecord] = []
        self.seen: list[list[Any]] = []
        """Of each day in `days`, what was given to `write`."""
        self._identity = identity
        self._journal_path = array.with_suffix(".journal")
        self._header = npy_header(shape, self.dtype)
        self._hour_bytes = self.dtype.itemsize * int(np.prod(shape[1:]))

    @property
    def header(self) -> int:
        """Bytes before the numbers."""
        return len(self._header)

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self.header + self.shape[0] * self._hour_bytes

    def __enter__(self) -> "YearWriter":
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b")
        try:
            self._take_up()
            written = self.header + sum(day.hours for day in self.days) * self._hour_bytes
            self._file.truncate(written)
            self._file.seek(written)
            days = [_entry(day, seen) for day, seen in zip(self.days, self.seen, strict=True)]
            write_atomically(self._journal_path, "".join(map(_line, [self._identity, *days])))
            self._journal = open(self._journal_path, "a", encoding="ascii")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        self._file.close()

    def write(self, values: np.ndarray, record: DayRecord, seen: list[Any]) -> None:
        """Write the next day: values [hours, variable, row, column] in the type of the array, and its record.

        seen: plain values that a later writer of the same year is to have too.
        """
        assert values.shape == (self.hours[len(self.days)], *self.shape[1:])
        assert values.dtype == self.dtype
        data = np.ascontiguousarray(values).data.cast("B")
        self._file.write(data)
        self._file.flush()  # before the journal records it
        self._journal.write(_line(_entry(record, seen)))
        self._journal.flush()
        self.days.append(record)
        self.seen.append(seen)

    def finish(self) -> None:
        """Wait until all is on the disk."""
        assert len(self.days) == len(self.hours)
        flush(self._file)

    def _take_up(self) -> None:
        """Find the days at the beginning of the file that match the journal; make the file begin with its header."""
        self._file.seek(0)
        if self._file.read(self.header) == self._header:
            for day, seen in self._whole_days():
                self.days.append(day)
                self.seen.append(seen)
        else:
            self._file.seek(0)
            self._file.write(self._header)

    def _whole_days(self) -> Iterator[tuple[DayRecord, list[Any]]]:
        try:
            lines = self._journal_path.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            return
        if not lines or _content(lines[0]) != self._identity:
            return
        for line, hours in zip(lines[1:], self.hours, strict=False):
            entry = _content(line)
            if entry is None:  # cut off where the process was killed
                return
            day = DayRecord.from_dict(entry["day"])
            data = self._file.read(hours * self._hour_bytes)
            if day.hours != hours or damaged_variables(data, day, self.shape[1:], self.dtype):
                return
            yield day, entry["seen"]


def _entry(day: DayRecord, seen: list[Any]) -> dict[str, Any]:
    return {"day": day.to_dict(), "seen": seen}


def _line(content: Any) -> str:
    """Return a line of the journal."""
    text = json.dumps(content)
    return f"{_hash(text)} {text}\n"


def _content(line: str) -> Any:
    """Return what `_line` was given; None if the line is not whole."""
    found, _, text = line.partition(" ")
    return json.loads(text) if found == _hash(text) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def damaged_variables(data: bytes | memoryview, day: DayRecord, shape: tuple[int, ...], dtype: np.dtype) -> list[str]:
    """Return the variables of a day whose bytes are not as its record says; all, if there are not as many bytes.

    shape: [variable, row, column]; the variables are in the order of the record.
    """
    names = list(day.sha256)
    if len(names) != shape[0] or len(data) != day.hours * dtype.itemsize * int(np.prod(shape)):
        return names or ["all variables"]
    found = hash_variables(names, np.frombuffer(data, dtype).reshape(day.hours, *shape))
    return [name for name in names if found[name] != day.sha256[name]]


def day_blocks(
    file: BinaryIO, shape: tuple[int, ...], dtype: str, days: list[DayRecord]
) -> Iterator[tuple[DayRecord, list[str]]]:
    """Read the array of a year, from where its numbers begin: yield each day, and its damaged variables.

    shape: [variable, row, column].

    Raises:
        OSError: it cannot be read.
    """
    hour_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    for day in days:
        yield day, damaged_variables(file.read(day.hours * hour_bytes), day, shape, np.dtype(dtype))


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return what a .npy file of format 1.0 begins with."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()
