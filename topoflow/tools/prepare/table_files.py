"""Files of tables: CSV (plain, gzip, zip) and Parquet, read a part at a time."""

import codecs
import collections
import csv
import gzip
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import pandas as pd

from topoflow.errors import DataError

ROWS = 200_000
"""Rows that are read at a time: 20 columns of text take about 200 MB."""

_BEYOND = "beyond the header"
"""Column of what a row has behind the last column: pandas would cut it off."""
_DECIMAL_COMMA = r"^(\s*[-+]?\d+),(\d+\s*)$"
_T = TypeVar("_T")
_HEAD_BYTES = 1 << 20
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, csv.Error, NotImplementedError)


def read_columns(path: Path) -> list[str]:
    """Return the names of the columns of a table.

    Raises:
        DataError: the file is unreadable, is no table, or has two columns of one name.
    """
    if path.suffix.lower() == ".parquet":
        columns = [str(name) for name in _read_parquet(path).columns]
    else:
        columns = _guarded(lambda: _read_head(path).columns)
    repeated = [name for name, count in collections.Counter(columns).items() if count > 1 and name.strip()]
    if repeated:
        raise DataError(f"several columns have one name: {', '.join(map(repr, repeated[:5]))}")
    return columns


def read_parts(path: Path, columns: list[str], rows: int = ROWS) -> Iterator[Any]:
    """Yield DataFrames of at most `rows` rows: columns of text for CSV (missing: empty), typed ones for Parquet.

    Raises:
        DataError: the file is unreadable, cut or damaged.
    """
    if path.suffix.lower() == ".parquet":
        table = _read_parquet(path, columns)
        yield from (table.iloc[start : start + rows] for start in range(0, len(table), rows))
        return
    head = _guarded(lambda: _read_head(path))
    with _guarded(lambda: _open(path)) as file:
        parts = _guarded(
            lambda: pd.read_csv(
                file,
                sep=head.delimiter,
                skiprows=head.lines_before + 1,
                names=[*head.columns, _BEYOND],
                header=None,
                index_col=False,
                dtype=str,
                na_filter=False,
                encoding=head.encoding,
                encoding_errors="replace",
                chunksize=rows,
            )
        )
        while (part := _guarded(lambda: next(parts, None))) is not None:
            beyond = part[_BEYOND].str.strip()
            part = part[columns]
            if (is_longer := beyond != "").any():
                row = int(part.index[is_longer][0]) + head.lines_before + 2
                raise DataError(f"line {row} has more fields than the {len(head.columns)} columns: an unquoted comma?")
            if head.has_decimal_comma:
                part = part.apply(lambda column: column.str.replace(_DECIMAL_COMMA, r"\1.\2", regex=True))
            yield part


class _Head:
    """How a CSV file is written: encoding, delimiter, lines before the header, column names."""

    def __init__(self, head: bytes, is_whole: bool):
        self.encoding = _find_encoding(head)
        lines = head.decode(self.encoding, errors="replace").splitlines()
        lines = lines[: len(lines) - (not is_whole)][:50]
        rows = {mark: [*csv.reader(lines, delimiter=mark)] for mark in ",;\t"}
        widths = {
            mark: collections.Counter(len(row) for row in table[len(table) // 2 :] if row).most_common(1)
            for mark, table in rows.items()
        }
        self.delimiter = max(rows, key=lambda mark: widths[mark][0][0] if widths[mark] else 0)
        self.has_decimal_comma = self.delimiter != ","
        width = widths[self.delimiter][0][0] if widths[self.delimiter] else 0
        if width < 2:
            raise DataError("is no table: expected lines of fields separated by a comma, semicolon or tab")
        table = [row for row in rows[self.delimiter] if row]
        if all(row[-1].strip() == "" for row in table if len(row) == width):
            width -= any(len(row) == width - 1 for row in table)  # rows that end in a delimiter, unlike the header
        header = next(i for i, row in enumerate(rows[self.delimiter]) if len(row) == width)
        self.lines_before = header
        names = [name.strip() for name in rows[self.delimiter][header]]
        self.columns = [name or f"column {i + 1}" for i, name in enumerate(names)]


def _read_head(path: Path) -> _Head:
    with _open(path) as file:
        head = file.read(_HEAD_BYTES)
        return _Head(head, is_whole=len(head) < _HEAD_BYTES)


def _find_encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            head[: head.rfind(b"\n") + 1 or None].decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    return "latin-1"


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() != ".zip":
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX")]
    if len(names) != 1:
        raise DataError(f"holds {len(names)} files: expected one table")
    return archive.open(names[0])


def _read_parquet(path: Path, columns: list[str] | None = None) -> Any:
    try:
        table = _guarded(lambda: pd.read_parquet(path, columns=columns))
    except ImportError:
        raise DataError("Parquet needs pyarrow: expected `pip install 'topoflow[parquet]'`") from None
    return table.reset_index() if table.index.names != [None] else table


def _guarded(read: Callable[[], _T]) -> _T:
    """Return read(), with every error of a library as a DataError of one line."""
    try:
        return read()
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(f"is not readable as a table: {' '.join(str(error).split()) or type(error).__name__}") from None
