"""Find and open the files of a source: NetCDF 3 and 4, Zarr 2 and 3, each read by xarray and the library under it."""

import glob
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from topoflow.errors import DataError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Rules, is_url

_DATA_NAMES = (".nc", ".nc3", ".nc4", ".cdf", ".zarr", ".csv", ".csv.gz", ".csv.zip", ".parquet")
_ZARR_METADATA = ("zarr.json", ".zgroup", ".zmetadata")
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError, AttributeError, OverflowError)
"""What xarray and the libraries under it raise for a file that is broken or of another kind."""


def find_files(path: str | tuple[str, ...], findings: Findings) -> list[Path]:
    """Return the files of a path, glob or folder (or several), in order; a finding where there is none."""
    if not isinstance(path, str):
        return [file for one in path for file in find_files(one, findings)]
    if is_url(path):
        findings.add(
            "error", path, "", "a path on another machine", "a path on this machine: copy the files here first"
        )
        return []
    root = Path(path).expanduser()
    if not root.exists():
        found = sorted(
            Path(name) for name in glob.glob(str(root), recursive=True) if not Path(name).name.startswith(".")
        )
        if not found:
            findings.add("error", path, "", "does not exist", "files, a glob or a folder")
        return found
    if root.is_dir() and not is_zarr(root):
        found = sorted(child for child in root.iterdir() if _is_data(child))
        if not found:
            findings.add("error", path, "", "a folder without data", f"files that end in {', '.join(_DATA_NAMES)}")
        return found
    return [root]


def _is_data(path: Path) -> bool:
    # a Mac leaves a file ._NAME beside each NAME on disks of other kinds
    return path.name.lower().endswith(_DATA_NAMES) and not path.name.startswith(".")


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a Zarr store."""
    return any((path / name).exists() for name in _ZARR_METADATA)


def open_file(path: Path, rules: Rules, findings: Findings) -> xr.Dataset | None:
    """Open a NetCDF file or Zarr store lazily; None, with a finding, where that is impossible or parts are missing."""
    try:
        if path.is_dir():
            return _open_zarr(path, rules, findings)
        if not _is_whole_netcdf3(path, findings):
            return None
        return xr.open_dataset(path, engine="netcdf4", chunks=None, decode_times=False, mask_and_scale=True)
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "Zarr" if path.is_dir() else "NetCDF"
        findings.add("error", path, "", f"cannot be opened as {kind}: {reason}", "a whole file of this kind")
        return None


def read_values(dataset: xr.Dataset, name: str, selection: Mapping[str, Any]) -> np.ndarray:
    """Return values of a variable at `selection` {dimension: positions}, decoded.

    Raises:
        DataError: a library cannot read them.
    """
    try:
        return dataset[name].isel(dict(selection)).values
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be read: {reason}") from error


def file_states(path: Path) -> list[str]:
    """Return name, size and time of change of a file, or of every file of a Zarr store."""
    if path.is_file():
        return [_state(path)]
    return sorted(_state(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _state(path: Path) -> str:
    state = os.stat(path)
    return f"{path.parent.name}/{path.name} {state.st_size} {state.st_mtime_ns}"


def _open_zarr(path: Path, rules: Rules, findings: Findings) -> xr.Dataset | None:
    import zarr

    group = zarr.open_group(path, mode="r", use_consolidated=False)
    arrays = {name: array for name, array in group.arrays()}
    # without consolidated metadata: it may be older than the arrays
    dataset = xr.open_zarr(path, consolidated=False, chunks=None, decode_times=False, mask_and_scale=True)
    _report_stale_metadata(path, {name: array.shape for name, array in arrays.items()}, findings)
    for name, array in arrays.items():
        if array.metadata.zarr_format == 2 and "_FillValue" not in array.attrs and name in dataset.variables:
            # the default fill_value of Zarr 2 is 0, which xarray takes for the mark of missing values
            plain = xr.open_zarr(path, consolidated=False, chunks=None, mask_and_scale=False, decode_times=False)
            dataset = _without_mark(dataset, plain, name, array.fill_value, path, findings)
    missing = {name: _missing_chunks(array) for name, array in arrays.items()}
    for name, count in missing.items():
        if not count or name not in dataset.variables:
            continue
        found = f"{count} of {arrays[name].nchunks} chunks were never written"
        if rules.incomplete == "refuse" and not _is_nan(arrays[name].fill_value):
            findings.add("decision", path, name, found, "all chunks", "rules: {incomplete: missing}")
        else:
            findings.add("note", path, name, f"{found}: their values are missing")
    return dataset


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def _missing_chunks(array) -> int:
    shards = getattr(array, "shards", None)
    if shards is not None:
        return array.nshards - array.nshards_initialized if hasattr(array, "nshards_initialized") else 0
    return array.nchunks - array.nchunks_initialized


def _without_mark(
    dataset: xr.Dataset, plain: xr.Dataset, name: str, mark: Any, path: Path, findings: Findings
) -> xr.Dataset:
    """With a variable whose values equal to `mark` are values."""
    if mark is None or _is_nan(mark) or not np.isfinite(mark) or abs(mark) > 1e9:
        return dataset
    variable = plain.variables[name].copy()
    variable.attrs = {key: value for key, value in variable.attrs.items() if key != "_FillValue"}
    findings.add("note", path, name, f"fill_value {mark:g} without _FillValue: values of {mark:g} stay values")
    decoded = xr.decode_cf(xr.Dataset({name: variable}), decode_times=False)[name].variable
    return dataset.assign_coords({name: decoded}) if name in dataset.coords else dataset.assign({name: decoded})


def _report_stale_metadata(path: Path, shapes: Mapping[str, tuple[int, ...]], findings: Findings) -> None:
    try:
        import zarr

        consolidated = zarr.open_consolidated(store=str(path), mode="r")
        before = {name: array.shape for name, array in consolidated.arrays()}
    except UNREADABLE:
        return
    for name, shape in shapes.items():
        if name in before and before[name] != shape:
            found = f"the consolidated metadata say {before[name]}, the array {shape}: they are older than the array"
            findings.add("note", path, name, f"{found}, which counts")


def _is_whole_netcdf3(path: Path, findings: Findings) -> bool:
    """Whether a classic NetCDF file is as long as its header says; True for other files."""
    with open(path, "rb") as file:
        if file.read(3) != b"CDF":
            return True
        file.seek(0)
        try:
            expected = _netcdf3_bytes(file)
        except (struct.error, ValueError, MemoryError, OverflowError):
            findings.add("error", path, "", "its header is damaged", "a whole NetCDF 3 file: download it again")
            return False
    size = path.stat().st_size
    if size < expected:
        found = f"{size} bytes of {expected} that its header announces: the file was cut"
        findings.add("error", path, "", found, "a whole NetCDF 3 file: download it again")
        return False
    return True


_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}


def _netcdf3_bytes(file) -> int:
    """Length that the header of a classic file announces (NetCDF Classic Format Specification, CDF-1, 2 and 5)."""
    version = file.read(4)[3]
    if version not in (1, 2, 5):
        raise ValueError(f"version {version}")
    count_form, offset_form = (">q" if version == 5 else ">i"), (">i" if version == 1 else ">q")

    def number(form: str) -> int:
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def skip_name() -> None:
        length = number(count_form)
        if not 0 <= length < 1 << 16:
            raise ValueError(f"a name of {length} bytes")
        file.read(-(-length // 4) * 4)

    def skip_attributes() -> None:
        number(">i")
        for _ in range(number(count_form)):
            skip_name()
            kind, count = number(">i"), number(count_form)
            file.seek(-(-count * _TYPE_BYTES.get(kind, 1) // 4) * 4, os.SEEK_CUR)

    records = number(count_form)
    lengths = []
    number(">i")
    for _ in range(number(count_form)):
        skip_name()
        lengths.append(number(count_form))
    skip_attributes()
    end, record_bytes, record_begin, record_sizes = 0, 0, 0, []
    number(">i")
    for _ in range(number(count_form)):
        skip_name()
        dims = [number(count_form) for _ in range(number(count_form))]
        skip_attributes()
        kind, _, begin = number(">i"), number(count_form), number(offset_form)
        shape = [lengths[dim] for dim in dims]
        is_record = bool(dims) and shape[0] == 0
        size = int(np.prod(shape[1:] if is_record else shape, dtype=np.int64)) * _TYPE_BYTES.get(kind, 1)
        if is_record:
            record_begin = min(record_begin or begin, begin)
            record_sizes.append(size)
            record_bytes += -(-size // 4) * 4
        else:
            end = max(end, begin + size)
    if record_sizes and records > 0:
        if len(record_sizes) == 1:  # a single record variable is not padded
            record_bytes = record_sizes[0]
        last = (
            record_bytes - (-(-record_sizes[-1] // 4) * 4 - record_sizes[-1]) if len(record_sizes) > 1 else record_bytes
        )
        end = max(end, record_begin + (records - 1) * record_bytes + last)
    return end
