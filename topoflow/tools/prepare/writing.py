"""Write a prepared data set: year by year and day by day, so that it can be resumed, and appended to."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from topoflow.data.moments import day_pieces, moments_of
from topoflow.data.prepared.days import DayRecord, days_text, hash_variables, read_days
from topoflow.data.prepared.manifest import (
    FileRecord,
    Manifest,
    PreparedVariable,
    PreparedYear,
    check_sizes,
    is_prepared,
    read_manifest,
    runs_of,
)
from topoflow.errors import ConfigError, DataError, Refusal
from topoflow.files import flush_folder, remove_unfinished, require_writable, write_atomically
from topoflow.tools.prepare.past import Past
from topoflow.tools.prepare.precision import DTYPES, choose_variables, cost, decode, encode, sum_up
from topoflow.tools.prepare.statics import require_same_statics, save_statics, static_units
from topoflow.tools.prepare.work_folder import LOCK, delete_work_folder, work_folder
from topoflow.tools.prepare.year_writer import YearWriter

_FILE_OF_YEAR = re.compile(r"(fields_\d{4}(_\d+h_[0-9a-f]{8})?\.(npy|journal)|days_\d{4}(_\d+h_[0-9a-f]{8})?\.json)")

_Made = tuple[PreparedYear, list[DayRecord]]
"""A year that was written now, and its days."""


class Fields(Protocol):
    """What is written. times: datetime64[h] [T], step_hours apart. units: {name: unit} in order. shape: (H, W)."""

    times: np.ndarray
    step_hours: int
    units: Mapping[str, str]
    shape: tuple[int, int]

    def fields(self, positions: np.ndarray) -> np.ndarray:
        """Return float32 [n, V, H, W] at positions [n] of `times`, unchecked."""
        ...

    def days(self, pieces: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, int]]]:
        """Yield (positions, checked fields, values dropped by reason) of each day in `pieces`."""
        ...

    def file_states(self, first: int, stop: int) -> list[str]:
        """Return strings that change with the files that hold the times [first, stop), and with how they are read."""
        ...

    @property
    def is_decided(self) -> bool:
        """Whether everything read so far may be written."""
        ...

    def seen(self) -> list[Any]:
        """Return, as plain values, what `finish` is to know of the values that were read since the last call."""
        ...

    def recall(self, seen: list[Any]) -> None:
        """Take up what `seen` returned in an interrupted process, whose values are not read again."""
        ...

    def finish(self) -> None:
        """Decide what needs all values: called when all have been read or recalled, before anything is committed."""
        ...


def write(
    source: Fields,
    statics: Mapping[str, np.ndarray],
    settings: dict[str, Any],
    provenance: Callable[[dict[str, Any]], dict[str, Any]],
    output: Path,
    progress: bool = True,
    report: Callable[[Path, Manifest], object] = lambda folder, manifest: None,
) -> Manifest | None:
    """Write `source` and the `statics` {name: [H, W]} into the folder `output`.

    Returns None where a decision is open: then nothing is committed.

    Everything is written to a hidden folder next to `output`, `.NAME.preparing`, which is renamed when complete. After
    an interruption the same call resumes: it first compares what was written with its hashes. Where `output` is a
    prepared data set, times that it lacks are added; those that both have must be the same.

    Args:
        settings: what must be the same in data that are appended; settings["dtype"] is float32 or float16.
        provenance: takes the provenance of the data that are there ({} for none), returns that of the whole.
        report: called with the folder and the manifest before they count, to add files to the folder.

    Raises:
        DataError: a time or static field differs from the prepared one; a file changed while it was read.
        ConfigError: other settings than those of what is there; `output` is something else or cannot be written.
    """
    output = output.resolve()  # of a link, the folder itself: the hidden one must lie next to it
    _require_replaceable(output)
    require_writable(output.parent)  # before the work: it is written next to `output`, then renamed
    try:
        with work_folder(output) as work:
            return _Writing(source, statics, settings, provenance, output, work, progress, report).run()
    except Refusal:
        raise
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}{file}") from error


def _require_replaceable(output: Path) -> None:
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not is_prepared(output):
        raise ConfigError(f"{output}: is not prepared data: expected a new or empty folder, or prepared data")
    if output.is_mount():
        raise ConfigError(
            f"{output}: is where a file system is mounted, so it cannot be replaced: expected a folder in it"
        )


class _Writing:
    """One run of `write`."""

    def __init__(
        self,
        source: Fields,
        statics: Mapping[str, np.ndarray],
        settings: dict[str, Any],
        provenance: Callable[[dict[str, Any]], dict[str, Any]],
        output: Path,
        work: Path,
        progress: bool,
        report: Callable[[Path, Manifest], object],
    ):
        self.source, self.statics, self.settings, self.provenance = source, statics, settings, provenance
        self.output, self.work, self.progress, self.report = output, work, progress, report
        self.dtype = DTYPES[settings["dtype"]]
        self.present = read_manifest(output) if is_prepared(output) else None
        self.states: dict[int, str] = {}
        """Of each year that is read, a hash of the states that its files had before."""
        self.days: dict[int, list[DayRecord]] = {}
        remove_unfinished(work)
        if self.present is not None:
            check_sizes(self.present, output)
            for year in self.present.years:
                self.days[year.year] = read_days(output / year.days.name, year.days.sha256)
            _tidy(output, self.present)

    def run(self) -> Manifest | None:
        """All of it."""
        if self.present is not None:
            _require_same_settings(self.settings, self.present.settings, f"{self.output} was prepared")
            require_same_statics(self.statics, self.present, self.output)
        variables, times = self._variables(), self.source.times
        year_of = times.astype("datetime64[Y]").astype(int) + 1970
        positions = {int(year): np.flatnonzero(year_of == year) for year in np.unique(year_of)}
        kept = {year.year: year for year in (self.present.years if self.present else ())}
        made: dict[int, _Made] = {}
        with tqdm(total=len(times), desc="prepare", unit="hour", disable=not self.progress) as bar:
            for year, hours in positions.items():
                before = kept.get(year)
                if before is not None and self._is_unchanged(before, hours):
                    bar.update(len(hours))
                    continue
                made[year] = self._write_year(year, hours, variables, before, bar)
                if before is not None and np.array_equal(before.times, times[hours]):  # and all values are the same
                    kept[year] = replace(before, source_files=made.pop(year)[0].source_files)
        self.source.finish()
        if not self.source.is_decided:
            return None
        return self._commit({year: record for year, record in kept.items() if year not in made}, made, variables)

    def _variables(self) -> tuple[PreparedVariable, ...]:
        """With their constants: of data that are there, or chosen from the source."""
        if self.present is not None:
            return self.present.variables
        return choose_variables(self.source.units, self.dtype, self.source.times, self.source.fields)

    def _is_unchanged(self, before: PreparedYear, hours: np.ndarray) -> bool:
        """Return whether a year is as it was prepared, as far as its files show."""
        same_times = np.array_equal(before.times, self.source.times[hours])
        return same_times and self._hash_source_files(hours) == before.source_files

    def _write_year(
        self,
        year: int,
        hours: np.ndarray,
        variables: tuple[PreparedVariable, ...],
        before: PreparedYear | None,
        bar: tqdm,
    ) -> _Made:
        """Write a year into the work folder, continuing where an earlier run stopped.

        before: the year as it was prepared; DataError, naming the day, unless the same times have the same values.
        """
        states, times = self._hash_source_files(hours), self.source.times[hours]
        self.states[year] = states
        parts = [self.settings, [[v.scale, v.offset] for v in variables], states, [str(t) for t in times]]
        parts += [before.days.sha256] if before is not None else []
        identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        tag = f"{year}" if before is None else f"{year}_{len(hours)}h_{identity[:8]}"
        past = Past(self.output, before, times, variables, self.source.shape, self.dtype)
        pieces = day_pieces(self.source.times, hours)
        shape = (len(hours), len(variables), *self.source.shape)
        array = self.work / f"fields_{tag}.npy"
        with YearWriter(array, identity, shape, self.dtype, [len(piece) for piece in pieces]) as writer:
            done = len(writer.days)
            for seen in writer.seen:
                self.source.recall(seen)
            bar.update(sum(map(len, pieces[:done])))
            for piece, values, dropped in self.source.days(pieces[done:]):
                if self.source.is_decided:
                    stored = self._encode(variables, values)
                    past.require_same(self.source.times[piece], stored)
                    day = str(self.source.times[piece[0]])[:10]
                    writer.write(stored, self._record(day, variables, values, stored, dropped), self.source.seen())
                bar.update(len(piece))
            if self.source.is_decided:
                writer.finish()
        text = days_text(writer.days)
        write_atomically(self.work / f"days_{tag}.json", text)
        days = FileRecord(f"days_{tag}.json", len(text), hashlib.sha256(text.encode()).hexdigest())
        step, file = self.source.step_hours, FileRecord(array.name, writer.size)
        return PreparedYear(year, runs_of(times, step), writer.header, file, days, states, step), writer.days

    def _encode(self, variables: tuple[PreparedVariable, ...], values: np.ndarray) -> np.ndarray:
        if self.dtype == "<f4":  # as they are, without a copy
            return values
        stored = np.empty(values.shape, self.dtype)
        for column, variable in enumerate(variables):
            stored[:, column] = encode(variable, values[:, column], self.dtype)
        return stored

    def _record(
        self,
        day: str,
        variables: tuple[PreparedVariable, ...],
        values: np.ndarray,
        stored: np.ndarray,
        dropped: dict[str, int],
    ) -> DayRecord:
        moments, errors = {}, {}
        for column, variable in enumerate(variables):
            read_back = decode(variable, stored[:, column])
            moments[variable.name] = moments_of(read_back)
            if self.dtype != "<f4":
                errors[variable.name] = cost(values[:, column], read_back)
        hashes = hash_variables([variable.name for variable in variables], stored)
        return DayRecord(day, len(values), hashes, moments, errors, dropped)

    def _hash_source_files(self, hours: np.ndarray) -> str:
        states = self.source.file_states(int(hours[0]), int(hours[-1]) + 1)
        return hashlib.sha256("\n".join(states).encode()).hexdigest()

    def _require_unchanged_files(self) -> None:
        """DataError if files were replaced while they were read: what was written may then be of both."""
        year_of = self.source.times.astype("datetime64[Y]").astype(int) + 1970
        for year, states in self.states.items():
            if self._hash_source_files(np.flatnonzero(year_of == year)) != states:
                raise DataError(f"{self.output}: files of {year} changed while they were read: run the command again")

    def _commit(
        self, kept: Mapping[int, PreparedYear], made: Mapping[int, _Made], variables: tuple[PreparedVariable, ...]
    ) -> Manifest:
        """Put what was written in its place; nothing counts before the manifest does."""
        years = sorted([*kept.values(), *(year for year, _ in made.values())], key=lambda year: year.year)
        of_years = {**self.days, **{number: of_year for number, (_, of_year) in made.items()}}
        days = [day for year in years for day in of_years[year.year]]
        variables = tuple(sum_up(variable, days) for variable in variables)
        if self.present is not None and tuple(years) == self.present.years:
            delete_work_folder(self.work)
            return self.present
        provenance = self.provenance(self.present.provenance if self.present is not None else {})
        self._require_unchanged_files()
        if self.present is not None:
            manifest = replace(self.present.with_years(years, variables), provenance=provenance)
            for year, _ in made.values():
                for file in (year.array, year.days):
                    (self.work / file.name).rename(self.output / file.name)
            self.report(self.output, manifest)
            flush_folder(self.output)
            manifest.write(self.output)
            delete_work_folder(self.work)
            _tidy(self.output, manifest)
            return manifest
        manifest = Manifest(
            self.settings,
            self.dtype,
            self.source.shape,
            variables,
            save_statics(self.work, self.statics),
            static_units(self.statics),
            (),
            self.source.step_hours,
            provenance,
        ).with_years(years, variables)
        self.report(self.work, manifest)
        manifest.write(self.work)
        self.work.rename(self.output)
        flush_folder(self.output.parent)
        _tidy(self.output, manifest)
        return manifest


def _tidy(output: Path, manifest: Manifest) -> None:
    """Delete what is of no use any more once the manifest is in its place."""
    remove_unfinished(output)
    used = {file.name for file in manifest.files()}
    for path in output.iterdir():
        if path.name == LOCK or (_FILE_OF_YEAR.fullmatch(path.name) and path.name not in used):
            path.unlink(missing_ok=True)


def _require_same_settings(now: dict[str, Any], was: dict[str, Any], subject: str) -> None:
    for key, value in now.items():
        if was.get(key) != value:
            raise ConfigError(f"{key}: {value}: {subject} with {was.get(key)}: expected the same, or another folder")
