"""Length that the header of a classic NetCDF file announces: its libraries read zeros where a file was cut."""

import math
import os
import struct
from typing import BinaryIO

from topoflow.errors import DataError

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}
_STREAMING = -1
"""Number of records in a file that was not closed."""


def announced_bytes(file: BinaryIO) -> int | None:
    """Return the length that a classic file must have, None for a file of another kind.

    Source: NetCDF Classic Format Specification (CDF-1, CDF-2) and its extension CDF-5. Sizes are computed from the
    shapes: the sizes that the header states overflow in large variables.

    Raises:
        DataError: the header is cut or damaged.
    """
    if file.read(3) != b"CDF":
        return None
    try:
        return _Header(file).announced_bytes()
    except (struct.error, ValueError, OverflowError, IndexError, KeyError, MemoryError, OSError) as error:
        raise DataError("its header is cut or damaged") from error


class _Header:
    """Reads a header from just behind the letters CDF."""

    def __init__(self, file: BinaryIO):
        self._file = file
        version = file.read(1)
        self._count = {b"\1": ">i", b"\2": ">i", b"\5": ">q"}[version]
        self._offset = ">i" if version == b"\1" else ">q"

    def announced_bytes(self) -> int:
        records = self._number(self._count)
        if records == _STREAMING:
            raise ValueError("the number of records was never written")
        lengths = []
        for _ in range(self._list_length()):
            self._skip_name()
            lengths.append(self._size())
        self._skip_attributes()
        end = 0
        of_records = []  # (begin, bytes in a record)
        for _ in range(self._list_length()):
            self._skip_name()
            shape = [lengths[self._size()] for _ in range(self._size())]
            self._skip_attributes()
            type_bytes = _TYPE_BYTES[self._number(">i")]
            self._number(self._count)  # vsize
            begin = self._number(self._offset)
            if shape and shape[0] == 0:
                of_records.append((begin, math.prod(shape[1:]) * type_bytes))
            else:
                end = max(end, begin + math.prod(shape) * type_bytes)
        # a record is as long as its variables, each padded to 4 bytes, except that a single one is not padded
        record_bytes = of_records[0][1] if len(of_records) == 1 else sum(_padded(size) for _, size in of_records)
        for begin, size in of_records if records else []:
            end = max(end, begin + (records - 1) * record_bytes + size)
        return max(end, self._file.tell())

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._file.read(struct.calcsize(form)))[0]

    def _size(self) -> int:
        size = self._number(self._count)
        if size < 0:
            raise ValueError(f"size {size}")
        return size

    def _list_length(self) -> int:
        self._number(">i")  # tag
        return self._size()

    def _skip_name(self) -> None:
        self._file.seek(_padded(self._size()), os.SEEK_CUR)

    def _skip_attributes(self) -> None:
        for _ in range(self._list_length()):
            self._skip_name()
            type_bytes = _TYPE_BYTES[self._number(">i")]
            self._file.seek(_padded(self._size() * type_bytes), os.SEEK_CUR)


def _padded(size: int) -> int:
    return -(-size // 4) * 4
