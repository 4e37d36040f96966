"""manifest.json: the files of a prepared data set, and the meaning of their numbers."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from topoflow.errors import DataError
from topoflow.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = "topoflow prepared data 1"
_HOUR = np.timedelta64(1, "h")


@dataclass(frozen=True)
class FileRecord:
    """A file of the data set: its name, size in bytes and SHA-256 (a year's array has one for each day)."""

    name: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class PreparedVariable:
    """A variable that changes in time. A value is what the array holds times `scale` plus `offset`, in `unit`.

    error_max, error_rms: largest and root mean square difference from the values that were read, over all years.
    std: standard deviation of the variable over all years, or None where it has no value.
    """

    name: str
    unit: str
    scale: float
    offset: float
    error_max: float = 0.0
    error_rms: float = 0.0
    std: float | None = None


@dataclass(frozen=True)
class PreparedYear:
    """One year. runs: times without a gap, [first as YYYY-MM-DDTHH, how many]. header: bytes before the numbers.

    array: [time, variable, row, column]. days: the record of its days. source_files: hash of the sizes and times of
    change of the files that it was read from, by which a later `prepare` knows them.
    """

    year: int
    runs: tuple[tuple[str, int], ...]
    header: int
    array: FileRecord
    days: FileRecord
    source_files: str
    step_hours: int = 1

    @property
    def times(self) -> np.ndarray:
        """datetime64[h] [T]."""
        starts = [(np.datetime64(first, "h"), count) for first, count in self.runs]
        return np.concatenate([first + np.arange(count) * self.step_hours * _HOUR for first, count in starts])


@dataclass(frozen=True)
class Manifest:
    """All of a prepared data set but its numbers. Years are in order; shape is that of the grid.

    settings: what it was asked to be, by the names of the recipe's keys: data appended later must have the same.
    static: the file of the fields that do not change; static_units: {name: unit} of those. step_hours: hours from each
    time to the next. provenance: the recipe and the files that were read.
    """

    settings: dict[str, Any]
    dtype: str
    shape: tuple[int, int]
    variables: tuple[PreparedVariable, ...]
    static: FileRecord
    static_units: dict[str, str]
    years: tuple[PreparedYear, ...]
    step_hours: int = 1
    provenance: dict[str, Any] = field(default_factory=dict)

    def files(self) -> list[FileRecord]:
        """All files but the manifest."""
        return [self.static, *(file for year in self.years for file in (year.array, year.days))]

    def text(self) -> str:
        """As JSON, with the hash of all else as its last key."""
        content = {"format": FORMAT, **asdict(self)}
        body = json.dumps(content, sort_keys=True)
        return json.dumps({**content, "manifest_sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)

    def with_years(self, years: list[PreparedYear], variables: tuple[PreparedVariable, ...]) -> "Manifest":
        """With these years in place of those that it has."""
        ordered = tuple(sorted(years, key=lambda year: year.year))
        return replace(self, years=ordered, variables=variables)

    def write(self, folder: Path) -> None:
        """Replace the manifest in `folder`: after a crash at any instant it is the old one or the new one."""
        write_atomically(folder / MANIFEST, self.text())


def is_prepared(path: Path) -> bool:
    """Whether `path` is the folder of a prepared data set."""
    return (path / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`. DataError if it cannot be read, is damaged or of another format."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="ascii")
        content = json.loads(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError:
        raise DataError(f"{path}: is damaged: it is not JSON") from None
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: has the format {found!r}: expected {FORMAT!r} (another version wrote it: prepare the "
            "data again from their files, or use that version)"
        )
    content.pop("manifest_sha256", None)
    try:
        manifest = Manifest(
            **{
                **content,
                "shape": tuple(content["shape"]),
                "variables": tuple(PreparedVariable(**variable) for variable in content["variables"]),
                "static": FileRecord(**content["static"]),
                "years": tuple(_year(**year) for year in content["years"]),
            }
        )
    except (KeyError, TypeError):
        raise DataError(f"{path}: is damaged: it lacks a key of the format") from None
    # the text itself is compared: this also detects changes that JSON parsing ignores
    if manifest.text() != text:
        raise DataError(f"{path}: is damaged: it does not match its own hash")
    return manifest


def check_sizes(manifest: Manifest, folder: Path) -> None:
    """DataError, naming it, for the first file that is missing or has another size: a look at each, at no contents."""
    for file in manifest.files():
        try:
            size = (folder / file.name).stat().st_size
        except OSError as error:
            raise DataError(f"{folder / file.name}: cannot be found: {error.strerror}") from error
        if size != file.size:
            raise DataError(f"{folder / file.name}: has {size} bytes: expected {file.size} (see prepare --verify)")


def _year(runs: list, array: dict, days: dict, **more: Any) -> PreparedYear:
    unbroken = tuple((first, count) for first, count in runs)
    return PreparedYear(runs=unbroken, array=FileRecord(**array), days=FileRecord(**days), **more)


def runs_of(times: np.ndarray, step_hours: int = 1) -> tuple[tuple[str, int], ...]:
    """Increasing times (datetime64[h] [T]), a step apart but for gaps, as runs without a gap."""
    pieces = np.split(times, np.flatnonzero(np.diff(times) != step_hours * _HOUR) + 1)
    return tuple((str(piece[0]), len(piece)) for piece in pieces)
