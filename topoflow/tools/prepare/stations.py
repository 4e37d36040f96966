"""Station observations (CF timeSeries files) averaged onto a regular grid, in the gridded data format."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from topoflow.data.variables import VARIABLES
from topoflow.errors import DataError
from topoflow.tools.prepare.cells import Cells, build_cells, cell_means_of_points, check_covers
from topoflow.tools.prepare.station_file import StationFile, conversion, open_netcdf, open_station_file
from topoflow.tools.prepare.store_writer import Field, StoreWriter, require_new_folder

log = logging.getLogger(__name__)

BLOCK_BYTES = 64 << 20
"""Largest array held at once while reading or writing, about."""


@dataclass(frozen=True)
class GridSummary:
    """What `grid_stations` did."""

    output: Path
    shape: tuple[int, int]
    """Rows (south first) and columns."""
    hours: int
    stations: int
    """Stations inside the box, over all files."""
    stations_outside: int
    cells_with_stations: int
    variables: tuple[str, ...]
    skipped: tuple[str, ...]
    """Variables of the files over time that the format does not know."""

    def __str__(self) -> str:
        skipped = f" (skipped: {', '.join(self.skipped)})" if self.skipped else ""
        return (
            f"{self.output}: {self.shape[0]} x {self.shape[1]} cells, {self.cells_with_stations} with stations "
            f"({self.stations} inside, {self.stations_outside} outside the box), {self.hours} hours of "
            f"{', '.join(self.variables)}{skipped}"
        )


def grid_stations(
    inputs: Sequence[Path],
    output: Path,
    degrees: float = 1.0,
    box: tuple[float, float, float, float] | None = None,
    terrain: Path | None = None,
    progress: bool = True,
) -> GridSummary:
    """Average the stations of CF timeSeries files over the cells of a regular grid and write yearly stores.

    A file has dims (time, station), `lat` and `lon` over station, hourly `time`, and any of the variables of the format
    with a `units` attribute; other variables are skipped and named in the log. Several files are pooled: at each hour a
    cell holds the mean over all stations inside it that report, whatever file they come from, and NaN where none does.

    The stores hold each variable (time, lat, lon) float32 in the format's unit (CO in ug m-3), `<variable>_count`, the
    number of stations in each mean, `station_count` (lat, lon), and `elevation`: the mean of the terrain points within
    the cell, the nearest point where there is none. The points are those of the file `terrain` (with `elevation` over
    1-D `lat`, `lon`); without it the stations' own `elevation`; if they have none, `elevation` is not written.
    Rows run from south to north.

    Args:
        inputs: the files.
        output: folder to create, with one data_YYYY.zarr per year; it appears only when it is complete.
        degrees: side of a cell.
        box: south, north, west, east edge in degrees; stations on the north or east edge are outside. By default the
            extent of the stations, rounded outward to whole multiples of `degrees`.
        terrain: NetCDF file with terrain heights that cover the box.
        progress: show a progress bar.

    Raises:
        MissingPath: an input that is not there.
        ConfigError: `output` exists; `degrees` does not divide the box.
        DataError: a file that is not as above (wrong dims, unknown unit, times not whole hours ...), no station inside.
    """
    require_new_folder(output)
    files = [open_station_file(Path(path)) for path in inputs]
    if not files:
        raise DataError("inputs: none given: expected at least one station file")
    try:
        return _grid_files(files, output, degrees, box, terrain, progress)
    finally:
        for file in files:
            file.dataset.close()


def _grid_files(
    files: Sequence[StationFile],
    output: Path,
    degrees: float,
    box: tuple[float, float, float, float] | None,
    terrain: Path | None,
    progress: bool,
) -> GridSummary:
    lat = np.concatenate([file.lat for file in files])
    lon = np.concatenate([file.lon for file in files])
    cells = build_cells(lat, lon, degrees, box)
    inside = cells.index(lat, lon) >= 0
    if not inside.any():
        raise DataError(f"no station lies inside the box {cells.describe()}: expected at least one of {len(lat)}")
    if not inside.all():
        log.info("%d of %d stations lie outside the box %s", (~inside).sum(), len(lat), cells.describe())
    names = [name for name in VARIABLES if any(name in file.conversions for file in files)]
    skipped = tuple(dict.fromkeys(name for file in files for name in file.skipped))
    if skipped:
        log.info("skipped variables that are not part of the format: %s", ", ".join(skipped))
    writer = StoreWriter(
        output,
        times=np.unique(np.concatenate([file.times for file in files])),
        lat=cells.lat,
        lon=cells.lon,
        static=_static_fields(files, cells, terrain),
        dynamic=_dynamic_fields(names),
        attributes=_attributes(files),
    )
    with writer:
        _write_means(writer, files, cells, names, progress)
    occupied = len(np.unique(cells.index(lat, lon)[inside]))
    summary = GridSummary(
        output, cells.shape, len(writer.times), int(inside.sum()), int((~inside).sum()), occupied, tuple(names), skipped
    )
    return summary


def _write_means(
    writer: StoreWriter, files: Sequence[StationFile], cells: Cells, names: Sequence[str], progress: bool
) -> None:
    members = [_members(file, cells) for file in files]
    row_bytes = 8 * max(cells.shape[0] * cells.shape[1], *(len(file.lat) for file in files))
    blocks = list(writer.blocks(BLOCK_BYTES // row_bytes))
    hours = sum(block.stop - block.start for block in blocks)
    with tqdm(total=hours * len(names), desc="grid-stations", unit="field", disable=not progress) as bar:
        for block in blocks:
            times = writer.times[block]
            for name in names:
                total = np.zeros((len(times), cells.shape[0] * cells.shape[1]))
                count = np.zeros(total.shape, dtype="uint16")
                for file, (stations, starts, occupied) in zip(files, members, strict=True):
                    # this file's hours within the block, and their places in it
                    rows = slice(*np.searchsorted(file.times, [times[0], times[-1] + np.timedelta64(1, "h")]))
                    if name not in file.conversions or rows.start == rows.stop or not len(stations):
                        continue
                    places = np.searchsorted(times, file.times[rows])
                    values = file.read(name, rows, stations)
                    present = np.isfinite(values)
                    values[~present] = 0.0
                    at = np.ix_(places, occupied)
                    total[at] += np.add.reduceat(values, starts, axis=1)
                    count[at] += np.add.reduceat(present, starts, axis=1, dtype="uint16")
                mean = np.full(total.shape, np.nan, dtype="float32")
                np.divide(total, count, out=mean, where=count > 0, casting="same_kind")
                writer.write(block, name, mean.reshape(-1, *cells.shape))
                writer.write(block, f"{name}_count", count.reshape(-1, *cells.shape))
                bar.update(len(times))


def _members(file: StationFile, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The file's stations inside the grid in order of their cells, where each cell's run starts, and those cells."""
    cell = cells.index(file.lat, file.lon)
    stations = np.argsort(cell, kind="stable")
    stations = stations[cell[stations] >= 0]
    occupied, starts = np.unique(cell[stations], return_index=True)
    return stations, starts, occupied


def _static_fields(
    files: Sequence[StationFile], cells: Cells, terrain: Path | None
) -> dict[str, tuple[Field, np.ndarray]]:
    station_cell = np.concatenate([cells.index(file.lat, file.lon) for file in files])
    count = np.bincount(station_cell[station_cell >= 0], minlength=cells.shape[0] * cells.shape[1])
    fields = {"station_count": (Field("1", "stations in the cell", "int32"), count.reshape(cells.shape))}
    points = _terrain_points(files, cells, terrain)
    if points is None:
        log.warning("elevation is not written: no terrain file is given, and some inputs have no station elevations")
    else:
        field = Field("m", VARIABLES["elevation"].long_name)
        fields["elevation"] = (field, cell_means_of_points(cells, *points))
    return fields


def _terrain_points(
    files: Sequence[StationFile], cells: Cells, terrain: Path | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Latitude, longitude and height of the points that cell heights are made of, each [P]."""
    if terrain is None:
        heights_m = [file.elevation_m for file in files if file.elevation_m is not None]
        if len(heights_m) < len(files):
            return None
        return (
            np.concatenate([file.lat for file in files]),
            np.concatenate([file.lon for file in files]),
            np.concatenate(heights_m),
        )
    with open_netcdf(Path(terrain)) as dataset:
        for name, dims in (("lat", 1), ("lon", 1), ("elevation", 2)):
            if name not in dataset.variables or dataset[name].ndim != dims:
                raise DataError(
                    f"{terrain}: no variable `{name}` with {dims} dimension(s): expected elevation(lat, lon)"
                )
        factor, offset = conversion(Path(terrain), "elevation", dataset["elevation"].attrs.get("units"))
        lat, lon = dataset["lat"].values.astype("float64"), dataset["lon"].values.astype("float64")
        rows, columns = check_covers(cells, lat, lon, str(terrain))
        heights = dataset["elevation"].transpose(*dataset["lat"].dims, *dataset["lon"].dims)
        heights_m = heights.isel({heights.dims[0]: rows, heights.dims[1]: columns}).values * factor + offset
    lat2d, lon2d = np.meshgrid(lat[rows], lon[columns], indexing="ij")
    return lat2d.ravel(), lon2d.ravel(), heights_m.ravel()


def _dynamic_fields(names: Sequence[str]) -> dict[str, Field]:
    means = {name: Field(VARIABLES[name].unit, VARIABLES[name].long_name) for name in names}
    counts = {f"{name}_count": Field("1", f"stations in the mean of {name}", "uint16") for name in names}
    return means | counts


def _attributes(files: Sequence[StationFile]) -> dict[str, str]:
    attributes = {"title": "Station observations averaged over the cells of a grid", "Conventions": "CF-1.8"}
    for key in ("source", "time_zone"):
        values = dict.fromkeys(str(file.dataset.attrs[key]) for file in files if key in file.dataset.attrs)
        if len(values) > 1 and key == "time_zone":
            log.warning("the inputs declare different time zones; times are used unchanged: %s", "; ".join(values))
        if values:
            attributes[key] = "; ".join(values)
    return attributes
