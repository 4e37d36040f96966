"""Find and open the files of a source: NetCDF 3 and 4, Zarr 2 and 3, each read by xarray and the library under it."""

import glob
import lzma
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr
import zarr
from xarray.conventions import decode_cf_variable

from topoflow.errors import DataError
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.netcdf3 import announced_bytes
from topoflow.tools.prepare.recipe import Rules, is_url
from topoflow.tools.prepare.zarr_chunks import cut_chunks, stored_chunks, without_unwritten, written_chunks

_DATA_NAMES = (".nc", ".nc3", ".nc4", ".cdf", ".zarr", ".csv", ".csv.gz", ".csv.zip", ".parquet")
_ZARR_METADATA = ("zarr.json", ".zgroup", ".zmetadata")
_OTHER_KINDS = {
    b"PK": ("is a ZIP archive", "unpack it and give what is in it (a workbook of Excel: save it as CSV)"),
    b"\x1f\x8b": ("is compressed by gzip", "gunzip it"),
    b"BZh": ("is compressed by bzip2", "bunzip2 it"),
    b"GRIB": ("is GRIB", "convert it by grib_to_netcdf, or by cfgrib and xarray"),
    b"\xd0\xcf\x11\xe0": ("is a workbook of Excel", "save it as CSV"),
    b"\x0e\x03\x13\x01": ("is HDF 4", "convert it by h4toh5 or ncl_convert2nc"),
}
"""What people hand over in place of NetCDF, by its first bytes."""
UNREADABLE = (
    *(OSError, ValueError, KeyError, RuntimeError, TypeError, IndexError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, EOFError, SystemError, zlib.error, lzma.LZMAError),
)
"""What xarray and the libraries under it raise for a file that is broken or of another kind."""


def find_files(path: str | tuple[str, ...], findings: Findings) -> list[Path]:
    """Return the files of a path, glob or folder (or several), each once and in order; a finding where there is none.

    Of a folder, its files with the names of data (_DATA_NAMES) and its Zarr stores, by name.
    """
    if not isinstance(path, str):
        return list(dict.fromkeys(file for one in path for file in find_files(one, findings)))
    if is_url(path):
        found = f"{path.split('://')[0]}:// is not read"
        findings.add("error", path, "", found, "a path on this machine: copy the files here first")
        return []
    root = Path(os.path.expanduser(path))
    try:
        matches = [root] if root.exists() else [Path(name) for name in sorted(glob.glob(str(root), recursive=True))]
        visible = [match for match in matches if match == root or not _is_hidden(match)]
        files = [
            file for match in visible for file in (_data_of_folder(match, findings) if _is_folder(match) else [match])
        ]
    except (OSError, ValueError) as error:
        findings.add("error", path, "", f"cannot be searched: {_reason(error)}", "files, a glob or a folder")
        return []
    if not visible:
        findings.add("error", path, "", "does not exist", "files, a glob or a folder")
    elif not files:
        findings.add("error", path, "", "a folder without data", f"files that end in {', '.join(_DATA_NAMES)}")
    return list(dict.fromkeys(files))


def _is_hidden(path: Path) -> bool:
    # a Mac leaves a file ._NAME beside each NAME on disks of other kinds
    return path.name.startswith(".")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not is_zarr(path) and path.suffix != ".zarr"


def _data_of_folder(folder: Path, findings: Findings) -> list[Path]:
    visible = sorted(child for child in folder.iterdir() if not _is_hidden(child))
    data = [
        child
        for child in visible
        if is_zarr(child) or (child.name.lower().endswith(_DATA_NAMES) and not _is_folder(child))
    ]
    others = [child.name for child in visible if child not in data]
    if data and others:
        found = f"{len(others)} of {len(visible)} files and folders are not read, such as {', '.join(others[:3])}"
        findings.add("note", folder, "", found, f"names that end in {', '.join(_DATA_NAMES)}", "path: FILE OR GLOB")
    return data


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a Zarr store."""
    return any((path / name).exists() for name in _ZARR_METADATA)


def open_file(path: Path, rules: Rules, findings: Findings) -> xr.Dataset | None:
    """Open a NetCDF file or Zarr store without reading its fields, or add a finding and return None.

    Values are unpacked and missing ones NaN; times stay numbers. A variable that cannot be unpacked, or has chunks
    that were cut, is left out, with a finding. Parts of a Zarr array that were never written are NaN: a decision,
    unless `rules.incomplete` is missing or the array's fill value marks missing values.
    """
    try:
        dataset = _open_zarr(path, rules, findings) if path.is_dir() else _open_netcdf(path, findings)
    except UNREADABLE as error:
        if not (path.is_dir() and _report_unreadable_arrays(path, findings)):
            kind = "Zarr" if path.is_dir() else "NetCDF"
            other = None if path.is_dir() else _other_kind(path)
            if other is not None:
                findings.add("error", path, "", other[0], f"a NetCDF file: {other[1]}")
            else:
                findings.add("error", path, "", f"cannot be opened as {kind}: {_reason(error)}", f"a whole {kind} file")
        return None
    if dataset is None:
        return None
    if not dataset.variables:
        findings.add("error", path, "", "has no variables", "variables outside groups, which are not read")
        dataset.close()
        return None
    dataset.encoding["source"] = str(path)
    return dataset


def _other_kind(path: Path) -> tuple[str, str] | None:
    """Return what a file is by its first bytes, and what to do with it; None where these say nothing."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if not head:
        return "is empty", "download it again"
    text = head.lstrip().lower()
    if text.startswith((b"<", b"{")):
        return f"is text: {head[:60].decode('utf-8', 'replace').strip()!r}", "a server's answer? download it again"
    return next((advice for start, advice in _OTHER_KINDS.items() if head.startswith(start)), None)


def read_values(dataset: xr.Dataset, name: str, selection: Mapping[str, Any]) -> np.ndarray:
    """Return values of a variable at `selection` {dimension: positions}, unpacked, in the file's order of dimensions.

    Raises:
        DataError: a library cannot read them; names the file and the variable.
    """
    try:
        return dataset[name].isel(dict(selection)).values
    except UNREADABLE as error:
        file = Path(dataset.encoding.get("source", "")).name
        raise DataError(f"{file}: variable {name!r} cannot be read: {_reason(error)}") from error


def file_states(path: Path) -> list[str]:
    """Return name, size and time of change of a file, or of every file of a Zarr store."""
    if path.is_file():
        return [_state(path)]
    return sorted(_state(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _state(path: Path) -> str:
    state = os.stat(path)
    return f"{path.parent.name}/{path.name} {state.st_size} {state.st_mtime_ns}"


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open_netcdf(path: Path, findings: Findings) -> xr.Dataset | None:
    with open(path, "rb") as file:
        try:
            announced = announced_bytes(file)
        except DataError as error:
            findings.add("error", path, "", str(error), "a whole NetCDF 3 file: copy or download it again")
            return None
        size = os.fstat(file.fileno()).st_size
    if announced is not None and size < announced:
        found = f"{size} bytes of {announced} that its header announces: the file was cut"
        findings.add("error", path, "", found, "a whole NetCDF 3 file: copy or download it again")
        return None
    raw = xr.open_dataset(path, engine="netcdf4", chunks=None, decode_cf=False)
    for name, variable in raw.variables.items():
        _set_default_mark(str(name), variable, path, findings)
    return _decode(raw, path, findings)


def _set_default_mark(name: str, variable: xr.Variable, path: Path, findings: Findings) -> None:
    """Set _FillValue of packed numbers that have none: what was not written unpacks to a value that can be."""
    is_packed = not {"scale_factor", "add_offset"}.isdisjoint(variable.attrs)
    has_mark = not {"_FillValue", "missing_value"}.isdisjoint(variable.attrs)
    kind = variable.dtype.str[1:]
    if is_packed and not has_mark and kind in ("i2", "i4", "u2", "u4"):
        default = netCDF4.default_fillvals[kind]
        variable.attrs["_FillValue"] = variable.dtype.type(default)
        findings.add("note", path, name, f"packed without _FillValue: {default}, NetCDF's default, is read as missing")


def _decode(raw: xr.Dataset, path: Path, findings: Findings) -> xr.Dataset:
    """Return the dataset unpacked, without the variables whose attributes do not allow it."""
    bad = []
    for name in raw.variables:
        try:
            decode_cf_variable(name, raw.variables[name], decode_times=False)
        except UNREADABLE as error:
            findings.add("error", path, str(name), f"cannot be unpacked: {_reason(error)}", "CF attributes")
            bad.append(name)
    decoded = xr.decode_cf(raw.drop_vars(bad), decode_times=False)
    decoded.set_close(raw.close)
    return decoded


def _open_zarr(path: Path, rules: Rules, findings: Findings) -> xr.Dataset:
    # the arrays' own metadata: consolidated ones may be older
    arrays = dict(zarr.open_group(path, mode="r", use_consolidated=False).arrays())
    cut = {name: cut_chunks(path / name, array) for name, array in arrays.items()}
    for name, files in cut.items():
        if files:
            found = f"{len(files)} chunks are shorter than they announce, the first {files[0].relative_to(path)}"
            findings.add("error", path, name, found, "whole chunks: copy the store again")
    bad = [name for name, files in cut.items() if files]
    raw = xr.open_zarr(path, consolidated=False, chunks=None, decode_cf=False, drop_variables=bad)
    _report_stale_metadata(path, arrays, findings)
    for name, array in arrays.items():
        if array.metadata.zarr_format == 2 and name in raw.variables:
            _set_missing_mark(raw[name].attrs, array, name, path, findings)
    dataset = _decode(raw, path, findings)
    for name, array in arrays.items():
        if name in dataset.variables:
            dataset = _mask_unwritten(dataset, name, array, _marks(raw[name].attrs), path, rules, findings)
    return dataset


def _set_missing_mark(attributes: dict[str, Any], array: Any, name: str, path: Path, findings: Findings) -> None:
    """Set _FillValue, for which xarray took the fill value of a Zarr 2 array: 0 is also what is written by default."""
    if "_FillValue" in array.attrs:
        attributes["_FillValue"] = array.attrs["_FillValue"]
    elif isinstance(array.fill_value, int | float | np.number) and array.fill_value == 0:
        attributes.pop("_FillValue", None)
        findings.add("note", path, name, "fill_value is 0 and there is no _FillValue: values of 0 are not missing")


def _marks(attributes: Mapping[str, Any]) -> list[Any]:
    """Return the values that mark missing ones."""
    return [mark for key in ("_FillValue", "missing_value") if key in attributes for mark in np.ravel(attributes[key])]


def _mask_unwritten(
    dataset: xr.Dataset, name: str, array: Any, marks: list[Any], path: Path, rules: Rules, findings: Findings
) -> xr.Dataset:
    """Return the dataset with NaN in parts of a variable that were never written, and a finding that counts them."""
    written, chunks = written_chunks(path / name, array), stored_chunks(array)
    unwritten = written.size - int(written.sum())
    # zarr does not write a chunk that equals the fill value: time 0, or the height 0 of a scalar
    if not unwritten or array.size == 1 or (name in dataset.indexes and unwritten == 1 and max(chunks) == 1):
        return dataset
    found = f"{unwritten} of {written.size} {'shards' if array.shards else 'chunks'} were never written"
    if name in dataset.indexes:
        findings.add("error", path, name, found, "all values of a coordinate")
        return dataset
    fill = array.fill_value
    if rules.incomplete == "fill":
        findings.add("note", path, name, f"{found}: they are read as the fill value {fill}")
        return dataset
    if rules.incomplete == "missing" or (fill is not None and (fill in marks or fill != fill)):
        findings.add("note", path, name, f"{found}: their values are missing")
    else:
        findings.add("decision", path, name, found, "all of them", "rules: {incomplete: missing} (or fill)")
    variable = dataset.variables[name]
    if variable.dtype.kind not in "iuf":
        return dataset
    masked = without_unwritten(variable, chunks, written)
    return dataset.assign_coords({name: masked}) if name in dataset.coords else dataset.assign({name: masked})


def _report_stale_metadata(path: Path, arrays: Mapping[str, Any], findings: Findings) -> None:
    """Add a note where consolidated metadata differ from the arrays."""
    try:
        before = dict(zarr.open_consolidated(store=str(path), mode="r").arrays())
    except UNREADABLE:
        return
    for name, array in arrays.items():
        if name not in before:
            findings.add("note", path, name, "the consolidated metadata lack it: the array itself counts")
        elif before[name].shape != array.shape:
            found = f"the consolidated metadata give it the shape {before[name].shape}, the array {array.shape}"
            findings.add("note", path, name, f"{found}, which counts")


def _report_unreadable_arrays(path: Path, findings: Findings) -> bool:
    """Add an error for each array of a store that zarr cannot open, of an unknown codec say; return whether any is."""
    is_any = False
    for child in sorted(path.iterdir()):
        if not any((child / name).exists() for name in ("zarr.json", ".zarray")):
            continue
        try:
            zarr.open(store=str(child), mode="r")
        except UNREADABLE as error:
            findings.add("error", path, child.name, f"cannot be opened: {_reason(error)}", "an array that zarr reads")
            is_any = True
    return is_any
