"""Write a prepared data set: year by year and day by day, so that it can be resumed, and appended to."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    is_prepared,
    read_manifest,
    runs_of,
)
from topoflow.errors import ConfigError, DataError, Refusal
from topoflow.files import flush_folder, remove_unfinished, require_writable, write_atomically
from topoflow.tools.prepare.precision import DTYPES, choose_variables, cost, decode, encode, sum_up
from topoflow.tools.prepare.statics import require_same_statics, save_statics, static_units
from topoflow.tools.prepare.year_writer import YearWriter

PLAN, LOCK = "plan.json", "lock"

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

    def finish(self) -> None:
        """Decide what needs all values: called when all have been read, before anything is committed."""
        ...


def write(
    source: Fields,
    statics: Mapping[str, np.ndarray],
    settings: dict[str, Any],
    provenance: dict[str, Any],
    output: Path,
    progress: bool = True,
) -> Manifest | None:
    """Write `source` and the `statics` {name: [H, W]} into the folder `output`.

    Returns None where a decision is open: then nothing is committed.

    Everything is written to a hidden folder next to `output`, `.NAME.preparing`, which is renamed when complete. After
    an interruption the same call resumes: it first compares what was written with its hashes. Where `output` is a
    prepared data set, times that it lacks are added; those that both have must be the same.

    Args:
        settings: what must be the same in data that are appended; settings["dtype"] is float32 or float16.
        provenance: the recipe and the files.

    Raises:
        DataError: a time or static field differs from the prepared one.
        ConfigError: other settings than those of what is there; `output` is something else or cannot be written.
    """
    is_free = not (output.exists() or output.is_symlink()) or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not is_prepared(output):
        raise ConfigError(f"{output}: is not prepared data: expected a new or empty folder, or prepared data")
    require_writable(output.absolute().parent)  # before the work: it is written next to `output`, then renamed
    try:
        with _work_folder(output) as work:
            return _Writing(source, statics, settings, provenance, output, work, progress).run()
    except Refusal:
        raise
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """The hidden folder next to `output`, held only by this process."""
    import fcntl

    work = output.absolute().with_name(f".{output.absolute().name}.preparing")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{output}: another process is preparing it ({work} is locked)") from None
        try:
            yield work
        finally:
            if work.exists() and not any(path.name not in (LOCK, PLAN) for path in work.iterdir()):
                shutil.rmtree(work)  # refused before anything was written


class _Writing:
    """One run of `write`."""

    def __init__(
        self,
        source: Fields,
        statics: Mapping[str, np.ndarray],
        settings: dict[str, Any],
        provenance: dict[str, Any],
        output: Path,
        work: Path,
        progress: bool,
    ):
        self.source, self.statics, self.settings, self.provenance = source, statics, settings, provenance
        self.output, self.work, self.progress = output, work, progress
        self.dtype = DTYPES[settings["dtype"]]
        self.present = read_manifest(output) if is_prepared(output) else None
        remove_unfinished(work)
        if self.present is not None:
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
        made = []
        with tqdm(total=len(times), desc="prepare", unit="hour", disable=not self.progress) as bar:
            for year, hours in positions.items():
                before = kept.get(year)
                if before is not None and self._is_unchanged(before, hours):
                    bar.update(len(hours))
                    continue
                made.append(self._write_year(year, hours, variables, before, bar))
        self.source.finish()
        if not self.source.is_decided:
            return None
        for year, _ in made:
            kept.pop(year.year, None)
        return self._commit(list(kept.values()), made, variables)

    def _variables(self) -> tuple[PreparedVariable, ...]:
        """With the constants that were chosen when it was begun."""
        if self.present is not None:
            return self.present.variables
        plan = self.work / PLAN
        begun = {"settings": self.settings, "source": self._hash_source_files(np.arange(len(self.source.times)))}
        if plan.exists():
            try:
                content = json.loads(plan.read_text())
                variables = tuple(PreparedVariable(**variable) for variable in content.pop("variables"))
                if content == begun:
                    return variables
            except (ValueError, KeyError, TypeError):  # damaged
                pass
            for path in self.work.iterdir():  # begun with another recipe or other files
                if path.name != LOCK:
                    path.unlink()
        chosen = choose_variables(self.source.units, self.dtype, self.source.times, self.source.fields)
        write_atomically(plan, json.dumps({**begun, "variables": [vars(variable) for variable in chosen]}, indent=1))
        return chosen

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
        parts = [self.settings, [[v.scale, v.offset] for v in variables], states, [str(t) for t in times]]
        identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        tag = f"{year}" if before is None else f"{year}_{len(hours)}h_{identity[:8]}"
        past = _Past(self.output, before, times, (len(variables), *self.source.shape), self.dtype)
        pieces = day_pieces(self.source.times, hours)
        shape = (len(hours), len(variables), *self.source.shape)
        array = self.work / f"fields_{tag}.npy"
        with YearWriter(array, identity, shape, self.dtype, [len(piece) for piece in pieces]) as writer:
            done = len(writer.days)
            bar.update(sum(map(len, pieces[:done])))
            for piece, values, dropped in self.source.days(pieces[done:]):
                if self.source.is_decided:
                    stored = self._encode(variables, values)
                    past.require_same(self.source.times[piece], stored)
                    day = str(self.source.times[piece[0]])[:10]
                    writer.write(stored, self._record(day, variables, values, stored, dropped))
                bar.update(len(piece))
            if self.source.is_decided:
                writer.finish()
        text = days_text(writer.days)
        write_atomically(self.work / f"days_{tag}.json", text)
        days = FileRecord(f"days_{tag}.json", len(text), hashlib.sha256(text.encode()).hexdigest())
        step, file = self.source.step_hours, FileRecord(array.name, writer.size)
        return PreparedYear(year, runs_of(times, step), writer.header, file, days, states, step), writer.days

    def _encode(self, variables: tuple[PreparedVariable, ...], values: np.ndarray) -> np.ndarray:
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

    def _commit(self, kept: list[PreparedYear], made: list[_Made], variables: tuple[PreparedVariable, ...]) -> Manifest:
        """Put what was written in its place; nothing counts before the manifest does."""
        days = [day for year in kept for day in read_days(self.output / year.days.name, year.days.sha256)]
        days += [day for _, of_year in made for day in of_year]
        variables = tuple(sum_up(variable, days) for variable in variables)
        years = [*kept, *(year for year, _ in made)]
        if self.present is not None:
            manifest = self.present
            if made:
                manifest = replace(self.present.with_years(years, variables), provenance=self.provenance)
                for year, _ in made:
                    for file in (year.array, year.days):
                        (self.work / file.name).rename(self.output / file.name)
                flush_folder(self.output)
                manifest.write(self.output)
            shutil.rmtree(self.work)
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
            self.provenance,
        ).with_years(years, variables)
        manifest.write(self.work)
        self.work.rename(self.output)
        flush_folder(self.output.absolute().parent)
        _tidy(self.output, manifest)
        return manifest


class _Past:
    """The fields of a year as they were prepared, which must not change."""

    def __init__(
        self, folder: Path, before: PreparedYear | None, times: np.ndarray, shape: tuple[int, ...], dtype: str
    ):
        self._folder, self._array = folder, None
        if before is None:
            return
        gone = ~np.isin(before.times, times)
        if gone.any():
            raise DataError(
                f"{folder}: {before.times[gone][0]} was prepared, but the files no longer have it: expected all of the "
                f"{len(before.times)} prepared times of {before.year}"
            )
        self._times = before.times
        path = folder / before.array.name
        self._array = np.memmap(path, dtype, "r", offset=before.header, shape=(len(before.times), *shape))

    def require_same(self, times: np.ndarray, stored: np.ndarray) -> None:
        """DataError if a time that was prepared now has other values."""
        if self._array is None:
            return
        for time, new in zip(times, stored, strict=True):
            at = int(np.searchsorted(self._times, time))
            if at < len(self._times) and self._times[at] == time and self._array[at].tobytes() != new.tobytes():
                raise DataError(f"{self._folder}: {time} was prepared with values that differ from the files'")


def _tidy(output: Path, manifest: Manifest) -> None:
    """Delete what is of no use any more once the manifest is in its place."""
    remove_unfinished(output)
    used = {file.name for file in manifest.files()}
    for path in (output / PLAN, output / LOCK, *output.glob("fields_*"), *output.glob("days_*")):
        if path.name not in used:
            path.unlink(missing_ok=True)


def _require_same_settings(now: dict[str, Any], was: dict[str, Any], subject: str) -> None:
    for key, value in now.items():
        if was.get(key) != value:
            raise ConfigError(f"{key}: {value}: {subject} with {was.get(key)}: expected the same, or another folder")
