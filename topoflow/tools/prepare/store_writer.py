"""Writer of the gridded data format: yearly Zarr stores `data_YYYY.zarr` in one folder, there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
import zarr.codecs

from topoflow.errors import ConfigError
from topoflow.files import require_writable

CHUNK_BYTES = 256 << 10
CHUNK_HOURS = (8, 720)
"""A chunk holds the hours of one variable that fit in CHUNK_BYTES (uncompressed), at least 8 and at most 720. So a
random hour costs one small read (about a day of 36 x 62 cells, 8 hours of 128 x 256), and reading everything once opens
hundreds of files a variable and year, not thousands."""


COMPRESSOR = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}
"""Of Blosc. Against the default of Zarr 3, Zstandard, a chunk of float32 fields is a tenth smaller and is decoded five
times as fast, and of its blocks those that an hour does not lie in need not be decoded at all."""


@dataclass(frozen=True)
class Field:
    """What a variable of the store is called, and how it is held."""

    unit: str
    long_name: str
    dtype: str = "float32"


def require_new_folder(output: Path) -> None:
    """Check, before the work, that the folder `output` can be created.

    Raises:
        ConfigError: something other than an empty folder exists there, or the folder above cannot be written.
    """
    try:
        is_empty = output.is_dir() and not any(output.iterdir())
    except OSError as error:
        raise ConfigError(f"{output}: cannot be read: {error.strerror}") from None
    if not is_empty and (output.exists() or output.is_symlink()):
        raise ConfigError(f"{output}: already exists: expected a new or empty folder")
    require_writable(output.absolute().parent)


class StoreWriter:
    """Writes fields over time, block by block, and renames the folder into place on success.

    A context manager. Until it is left without an exception everything is in a hidden folder next to `output`, which is
    then renamed; after an exception that folder is removed and `output` is untouched.

    Args:
        output: the folder to make; ConfigError if it exists and is not empty.
        times: datetime64[h] [T], strictly increasing; each year gets its own store.
        lat, lon: cell centres in degrees, [H] and [W]; rows may run north or south.
        static: {name: (Field, array [H, W])}, repeated in each store.
        dynamic: {name: Field}, to be written over (time, lat, lon).
        attributes: global attributes of each store.
    """

    def __init__(
        self,
        output: Path,
        times: np.ndarray,
        lat: np.ndarray,
        lon: np.ndarray,
        static: Mapping[str, tuple[Field, np.ndarray]],
        dynamic: Mapping[str, Field],
        attributes: Mapping[str, str],
    ):
        require_new_folder(output)
        assert np.all(np.diff(times) > np.timedelta64(0, "h")), "times must increase"
        self.output = output
        self.times = times.astype("datetime64[h]")
        self.lat, self.lon = lat, lon
        self.static, self.dynamic, self.attributes = static, dynamic, attributes
        hour_bytes = 4 * len(lat) * len(lon)
        self.chunk_hours = min(max(CHUNK_BYTES // hour_bytes, CHUNK_HOURS[0]), CHUNK_HOURS[1])
        self._years = self.times.astype("datetime64[Y]").astype(int) + 1970
        self._groups: dict[int, zarr.Group] = {}

    def __enter__(self) -> "StoreWriter":
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.partial-", dir=self.output.parent))
        except OSError as error:
            raise ConfigError(f"{self.output}: cannot be written: {error.strerror or error}") from None
        try:
            for year in np.unique(self._years):
                self._groups[int(year)] = self._create_year(int(year))
        except BaseException:
            shutil.rmtree(self._partial)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is not None:
            shutil.rmtree(self._partial)
            return
        # mkdtemp makes the folder private; the result gets the permissions that any new folder gets.
        umask = os.umask(0)
        os.umask(umask)
        self._partial.chmod(0o777 & ~umask)
        self._partial.rename(self.output)

    def blocks(self, hours: int) -> Iterator[slice]:
        """Slices of `times` that cover it in order, each within one year, cut where chunks end, of about `hours`."""
        hours = max(self.chunk_hours, hours // self.chunk_hours * self.chunk_hours)
        for year in np.unique(self._years):
            first, last = np.searchsorted(self._years, [year, year + 1])
            for start in range(first, last, hours):
                yield slice(start, min(start + hours, last))

    def write(self, block: slice, name: str, values: np.ndarray) -> None:
        """Write `values` [n, H, W] of one variable at the times of `block`, one of those that `blocks` yields."""
        year = int(self._years[block.start])
        first = int(np.searchsorted(self._years, year))
        array = self._groups[year][name]
        assert isinstance(array, zarr.Array)
        array[block.start - first : block.stop - first] = values

    def _create_year(self, year: int) -> zarr.Group:
        times = self.times[self._years == year]
        path = self._partial / f"data_{year}.zarr"
        group = zarr.open_group(path, mode="w", zarr_format=3, attributes=dict(self.attributes))
        origin = np.datetime64(f"{year}-01-01T00", "h")
        time_attributes = {"units": f"hours since {year}-01-01 00:00:00", "calendar": "proleptic_gregorian"}
        _create_whole(group, "time", ("time",), (times - origin).astype("int64"), time_attributes)
        for name, values, unit, standard_name in (
            ("lat", self.lat, "degrees_north", "latitude"),
            ("lon", self.lon, "degrees_east", "longitude"),
        ):
            attributes = {"units": unit, "standard_name": standard_name}
            _create_whole(group, name, (name,), np.asarray(values, dtype="float64"), attributes)
        for name, (field, values) in self.static.items():
            attributes = {"units": field.unit, "long_name": field.long_name}
            _create_whole(group, name, ("lat", "lon"), np.asarray(values, dtype=field.dtype), attributes)
        for name, field in self.dynamic.items():
            group.create_array(
                name,
                shape=(len(times), len(self.lat), len(self.lon)),
                chunks=(self.chunk_hours, len(self.lat), len(self.lon)),
                dtype=field.dtype,
                compressors=zarr.codecs.BloscCodec(**COMPRESSOR),
                fill_value=np.nan if np.dtype(field.dtype).kind == "f" else 0,
                dimension_names=("time", "lat", "lon"),
                attributes={"units": field.unit, "long_name": field.long_name},
            )
        return group


def _create_whole(
    group: zarr.Group, name: str, dimensions: tuple[str, ...], values: np.ndarray, attributes: dict[str, Any]
) -> None:
    fill_value = np.nan if values.dtype.kind == "f" else 0
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype=values.dtype,
        fill_value=fill_value,
        dimension_names=dimensions,
        attributes=attributes,
    )
    array[...] = values
