"""Packing: from a gridded data set to one that is laid out for reading samples."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from topoflow.data.fields import BLOCK_BYTES, FieldSource
from topoflow.data.grid import load_mask
from topoflow.data.moments import day_pieces, moments_of
from topoflow.data.packed.days import DayRecord, days_text, read_days
from topoflow.data.packed.manifest import FileRecord, Manifest, PackedVariable, PackedYear, read_manifest, runs_of
from topoflow.data.packed.reader import PackedIndex, is_packed
from topoflow.data.source import held_variables, index_source, open_indexed
from topoflow.data.variables import VARIABLES
from topoflow.errors import ConfigError, DataError, Refusal
from topoflow.files import flush_folder, remove_unfinished, require_writable, write_atomically
from topoflow.tools.prepare.precision import DTYPES, choose_variables, cost, decode, encode, sum_up
from topoflow.tools.prepare.report import PackReport
from topoflow.tools.prepare.resampling import Method, Resampling, build_resampling
from topoflow.tools.prepare.statics import require_same_statics, save_static, static_fields
from topoflow.tools.prepare.year_writer import YearWriter

PLAN, LOCK = "plan.json", "lock"

_Made = tuple[PackedYear, list[DayRecord]]
"""A year that was written now, and its days."""


@dataclass(frozen=True)
class PackOptions:
    """What to make. variables: names, default all that the data have; grid: rows and columns, default those of the
    data; method: of the resampling to `grid`; dtype: float32 or float16; mask: file with the cells that count, on the
    grid of the data, default that of packed data."""

    variables: Sequence[str] | None = None
    grid: tuple[int, int] | None = None
    method: Method = "area"
    dtype: str = "float32"
    mask: Path | None = None


def pack(data: str, output: Path, options: PackOptions, progress: bool = True) -> PackReport:
    """Pack the data set at `data` (as data.path takes it) into the folder `output`.

    Everything is written to a hidden folder next to `output`, `.NAME.packing`, which is renamed when complete. After an
    interruption the same call resumes: it first compares what was written with its hashes. If `output` is
    packed data already, the years that it lacks are appended; those that both have must be the same and stay untouched.

    Raises:
        MissingPath, DataError: see `index_source`; a year or a static field differs from what is packed.
        ConfigError: options that cannot be used, or other ones than those of what is there; `output` cannot be written.
    """
    is_free = not (output.exists() or output.is_symlink()) or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not is_packed(output):
        raise ConfigError(f"{output}: is not packed data: expected a new or empty folder, or packed data")
    require_writable(output.absolute().parent)  # before the work: it is written next to `output`, then renamed
    index = index_source(data, _choose_names(data, options))
    mask = index.mask if isinstance(index, PackedIndex) else None
    if options.mask is not None:
        mask = load_mask(str(options.mask), index.grid, key="--mask")
    source = open_indexed(index, in_memory=False)
    try:
        with _work_folder(output) as work:
            return _Packing(source, mask, output, work, options, progress).run()
    except Refusal:
        raise
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        source.close()


def _choose_names(data: str, options: PackOptions) -> tuple[str, ...]:
    names = tuple(options.variables or held_variables(data))
    for name in names:
        if name not in VARIABLES or VARIABLES[name].kind == "computed":
            known = ", ".join(name for name, variable in VARIABLES.items() if variable.kind != "computed")
            raise ConfigError(f"--variables: {name!r} cannot be packed: expected one of {known}")
    if all(VARIABLES[name].kind == "static" for name in names):
        raise ConfigError(f"--variables {','.join(names)}: expected one that changes in time")
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype}: expected {' or '.join(DTYPES)}")
    return names


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """The hidden folder next to `output`, held only by this process."""
    import fcntl

    work = output.absolute().with_name(f".{output.absolute().name}.packing")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{output}: another process is packing into it ({work} is locked)") from None
        try:
            yield work
        finally:
            if work.exists() and not any(path.name != LOCK for path in work.iterdir()):
                shutil.rmtree(work)  # refused before anything was written


class _Packing:
    """One run of `pack`. Fields go in on the grid of the source and out on that of the packed data."""

    def __init__(
        self,
        source: FieldSource,
        mask: np.ndarray | None,
        output: Path,
        work: Path,
        options: PackOptions,
        progress: bool,
    ):
        self.source, self.output, self.work, self.progress = source, output, work, progress
        grid = source.grid
        self.resampling: Resampling | None = None
        if options.grid is not None and options.grid != grid.shape:
            self.resampling = build_resampling(grid, options.grid, options.method)
        self.dtype = DTYPES[options.dtype]
        self.statics = static_fields(grid, self.resampling, mask)
        self.shape: tuple[int, int] = self.statics["lat2d"].shape
        statics = [name for name in ("elevation", "population") if name in self.statics]
        self.settings: dict[str, Any] = {
            "--variables": ",".join(name for name in VARIABLES if name in (*source.dynamic, *statics)),
            "--grid": f"{self.shape[0]}x{self.shape[1]}",
            "--method": "none" if self.resampling is None else options.method,
            "--dtype": options.dtype,
            "--mask": "none" if mask is None else hashlib.sha256(self.statics["mask"].tobytes()).hexdigest()[:16],
        }
        self.present = read_manifest(output) if is_packed(output) else None
        remove_unfinished(work)
        if self.present is not None:
            _tidy(output)

    def run(self) -> PackReport:
        """All of it."""
        if self.present is not None:
            _require_same_settings(self.settings, self.present.settings, f"{self.output} was packed")
            require_same_statics(self.statics, self.present, self.output)
        variables = self._variables()
        times = self.source.times
        year_of = times.astype("datetime64[Y]").astype(int) + 1970
        years = {int(year): np.flatnonzero(year_of == year) for year in np.unique(year_of)}
        kept = {year.year: year for year in (self.present.years if self.present else ())}
        with tqdm(total=len(times), desc="pack", unit="hour", disable=not self.progress) as bar:
            for year in sorted(kept.keys() & years.keys()):
                kept[year] = self._compare_year(kept[year], years[year], variables, bar)
            written = sorted(years.keys() - kept.keys())
            try:
                made = [self._write_year(year, years[year], variables, bar) for year in written]
            except ConfigError:  # what the options ask for cannot be: they must be other ones
                shutil.rmtree(self.work)
                raise
        manifest = self._commit(list(kept.values()), made, variables)
        return PackReport(self.output, manifest, tuple(written))

    def _variables(self) -> tuple[PackedVariable, ...]:
        """With the constants that were chosen when it was begun."""
        if self.present is not None:
            return self.present.variables
        plan = self.work / PLAN
        if plan.exists():
            try:
                content = json.loads(plan.read_text())
                begun = [PackedVariable(**variable) for variable in content["variables"]]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{plan}: is damaged: delete {self.work} to start over") from None
            where = f"the interrupted packing in {self.work} was started (delete it to start over)"
            _require_same_settings(self.settings, content["settings"], where)
            return tuple(begun)
        source, names = self.source, [name for name in VARIABLES if name in self.source.dynamic]
        units = {name: VARIABLES[name].unit for name in names}
        chosen = choose_variables(
            units,
            self.dtype,
            source.times,
            lambda hours: np.stack([source.read(name, hours) for name in names], axis=1),
        )
        plain = [vars(variable) for variable in chosen]
        write_atomically(plan, json.dumps({"settings": self.settings, "variables": plain}, indent=1))
        return chosen

    def _blocks(self, hours: np.ndarray, bar: tqdm, skip: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, float32 [n, V, H, W]) of each day among `hours` but the first `skip`, several read at once."""
        names, grid = [name for name in VARIABLES if name in self.source.dynamic], self.source.grid
        pieces = day_pieces(self.source.times, hours)
        bar.update(sum(map(len, pieces[:skip])))
        pieces = pieces[skip:]
        at_once = max(1, BLOCK_BYTES // (4 * 24 * len(names) * grid.lat2d.size))
        for first in range(0, len(pieces), at_once):
            group = pieces[first : first + at_once]
            together = np.concatenate(group)
            fields = np.stack([self.source.read(name, together) for name in names], axis=1)
            if self.resampling is not None:
                fields = self.resampling.mean(fields)
            for piece, values in zip(group, np.split(fields, np.cumsum([len(p) for p in group])[:-1]), strict=True):
                yield piece, values
                bar.update(len(piece))

    def _encode(self, variables: tuple[PackedVariable, ...], values: np.ndarray) -> np.ndarray:
        stored = np.empty(values.shape, self.dtype)
        for column, variable in enumerate(variables):
            stored[:, column] = encode(variable, values[:, column], self.dtype)
        return stored

    def _write_year(self, year: int, hours: np.ndarray, variables: tuple[PackedVariable, ...], bar: tqdm) -> _Made:
        """Into the work folder, going on where an earlier run stopped."""
        states = self._hash_source_files(hours)
        times = self.source.times[hours]
        parts = [self.settings, [[v.scale, v.offset] for v in variables], states, [str(t) for t in times]]
        identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        array, record = f"fields_{year}.npy", f"year_{year}.json"
        if not (self.work / array).exists() and (self.output / array).exists():
            (self.output / array).rename(self.work / array)  # moved, but not yet in the manifest
        shape = (len(hours), len(variables), *self.shape)
        lengths = [len(piece) for piece in day_pieces(self.source.times, hours)]
        with YearWriter(self.work / array, identity, shape, self.dtype, lengths) as writer:
            for piece, values in self._blocks(hours, bar, skip=len(writer.days)):
                stored = self._encode(variables, values)
                writer.write(stored, self._record(str(self.source.times[piece[0]])[:10], variables, values, stored))
            writer.finish()
        text = days_text(writer.days)
        write_atomically(self.work / record, text)
        days = FileRecord(record, len(text), hashlib.sha256(text.encode()).hexdigest())
        return PackedYear(
            year, runs_of(times), writer.header, FileRecord(array, writer.size), days, states
        ), writer.days

    def _record(
        self, day: str, variables: tuple[PackedVariable, ...], values: np.ndarray, stored: np.ndarray
    ) -> DayRecord:
        moments, errors = {}, {}
        for column, variable in enumerate(variables):
            read_back = decode(variable, stored[:, column])
            moments[variable.name] = moments_of(read_back)
            if self.dtype != "<f4":
                errors[variable.name] = cost(values[:, column], read_back)
        return DayRecord(day, len(values), "", moments, errors)

    def _compare_year(
        self, packed: PackedYear, hours: np.ndarray, variables: tuple[PackedVariable, ...], bar: tqdm
    ) -> PackedYear:
        """DataError unless the source still has what was packed; all is read again only where files have changed."""
        if not np.array_equal(packed.times, self.source.times[hours]):
            raise DataError(
                f"{self.output}: {packed.year} is packed with {len(packed.times)} hours, the data have {len(hours)} "
                "or different ones: expected the same hours in packed years"
            )
        states = self._hash_source_files(hours)
        if states == packed.source_files:
            bar.update(len(hours))
            return packed
        days = read_days(self.output / packed.days.name, packed.days.sha256)
        for day, (_, values) in zip(days, self._blocks(hours, bar), strict=True):
            if hashlib.sha256(self._encode(variables, values).data).hexdigest() != day.sha256:
                raise DataError(f"{self.output}: {day.day} was packed with values that differ from the data")
        return replace(packed, source_files=states)

    def _hash_source_files(self, hours: np.ndarray) -> str:
        states = self.source.file_states(int(hours[0]), int(hours[-1]) + 1)
        return hashlib.sha256("\n".join(states).encode()).hexdigest()

    def _commit(self, kept: list[PackedYear], made: list[_Made], variables: tuple[PackedVariable, ...]) -> Manifest:
        """Put what was written in its place; nothing counts before the manifest does."""
        days = [day for year in kept for day in read_days(self.output / year.days.name, year.days.sha256)]
        days += [day for _, of_year in made for day in of_year]
        variables = tuple(sum_up(variable, days) for variable in variables)
        years = [*kept, *(year for year, _ in made)]
        if self.present is not None:
            manifest = self.present.with_years(years, variables)
            for year, _ in made:
                for file in (year.array, year.days):
                    (self.work / file.name).rename(self.output / file.name)
            flush_folder(self.output)
            if manifest != self.present:
                manifest.write(self.output)
            shutil.rmtree(self.work)
            return manifest
        statics = {name: save_static(self.work / f"{name}.npy", field) for name, field in self.statics.items()}
        manifest = Manifest(self.settings, self.dtype, self.shape, variables, statics, ()).with_years(years, variables)
        manifest.write(self.work)
        self.work.rename(self.output)
        flush_folder(self.output.absolute().parent)
        _tidy(self.output)
        return manifest


def _tidy(output: Path) -> None:
    """Delete what is of no use any more once the manifest is in its place."""
    remove_unfinished(output)
    for path in (output / PLAN, output / LOCK, *output.glob("fields_*.journal")):
        path.unlink(missing_ok=True)


def _require_same_settings(now: dict[str, Any], was: dict[str, Any], subject: str) -> None:
    for option, value in now.items():
        if was.get(option) != value:
            raise ConfigError(f"{option} {value}: {subject} with {option} {was.get(option)}: expected the same")
