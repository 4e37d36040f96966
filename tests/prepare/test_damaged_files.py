"""Damaged files are refused by name, or read as xarray reads them; nothing else happens."""

import collections
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from topoflow.errors import DataError
from topoflow.tools.prepare.files import open_file, read_values
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Rules

KINDS = ("NETCDF3_CLASSIC", "NETCDF4", "zarr2", "zarr3")
DAMAGES = 125
"""Damages of each kind of file: 500 in all."""


def write_sample(path: Path, kind: str) -> None:
    """A small file with packed, plain and missing values."""
    values = np.random.default_rng(1).integers(0, 400, (8, 6, 5)) / 4
    values[2, :3] = np.nan
    dims = ("time", "lat", "lon")
    dataset = xr.Dataset(
        {"pm25": (dims, values), "o3": (dims, values.astype("f4")), "mask": (("lat", "lon"), values[0])},
        {"time": ("time", np.arange(8), {"units": "hours since 2019-01-01"}), "lat": np.arange(6.0)},
    )
    encoding: dict[str, dict] = {"pm25": {"dtype": "i2", "scale_factor": 0.25, "_FillValue": -32767}}
    if kind.startswith("zarr"):
        encoding["o3"] = {"chunks": (3, 6, 5)}
        dataset.to_zarr(path, zarr_format=2 if kind == "zarr2" else 3, encoding=encoding)
        return
    if kind == "NETCDF4":
        encoding["o3"] = {"zlib": True, "fletcher32": True, "chunksizes": (3, 6, 5)}
    dataset.to_netcdf(path, format=kind, encoding=encoding, engine="netcdf4")  # pyright: ignore[reportCallIssue, reportArgumentType]


def damage(path: Path, random_: random.Random) -> str:
    """Cut, empty or remove a file, or change bytes in it; return what was done."""
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] or [path]
    file = random_.choice(sorted(files))
    data = bytearray(file.read_bytes())
    how = random_.choice(["cut", "empty", "flip", "flip", "overwrite", "remove"])
    if how == "remove" and path.is_dir():
        file.unlink()
    elif how in ("empty", "remove"):
        how = "empty"
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(data[: random_.randrange(len(data))])
    else:
        start = random_.randrange(len(data))
        for i in range(start, min(start + (1 if how == "flip" else 40), len(data))):
            data[i] ^= 1 << random_.randrange(8) if how == "flip" else random_.randrange(1, 256)
        file.write_bytes(data)
    return f"{how} {file.name}"


def outcome(path: Path) -> str:
    """`refused`, `noted` where parts are read as missing, or `equal` to what xarray reads; otherwise what differs."""
    findings = Findings()
    dataset = open_file(path, Rules(), findings)
    if dataset is None:
        found = findings.open()
        return "refused" if found and all(str(path) == f.file for f in found) else f"None without a finding: {found}"
    result = "refused" if findings.open() else "noted" if findings.sorted() else "equal"
    with dataset:
        for name in map(str, dataset.variables):
            try:
                values = read_values(dataset, name, {})
            except DataError as error:
                if path.name not in str(error) or repr(name) not in str(error):
                    return f"{error} does not name {name}"
                result = "refused"
                continue
            if result != "equal":
                continue
            with open_plainly(path) as other:
                if values.tobytes() != other[name].values.tobytes():
                    return f"{name} differs from what xarray reads"
    return result


def open_plainly(path: Path) -> xr.Dataset:
    if path.is_dir():
        return xr.open_zarr(path, consolidated=False, chunks=None, decode_times=False)
    return xr.open_dataset(path, engine="netcdf4", decode_times=False)


def run_damages(folder: Path, kind: str, first: int) -> None:
    """Print a line of JSON for each damage from `first` on: its number, before and after it was tried."""
    warnings.simplefilter("ignore")
    whole, path = folder / "whole", folder / ("data.zarr" if kind.startswith("zarr") else "data.nc")
    if not whole.exists():
        write_sample(whole, kind)
    for number in range(first, DAMAGES):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copytree(whole, path) if whole.is_dir() else shutil.copy(whole, path)
        how = damage(path, random.Random(f"{kind} {number}"))
        print(json.dumps([number, how, "started"]), flush=True)
        print(json.dumps([number, how, outcome(path)]), flush=True)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file_is_refused_or_read_as_xarray_reads_it(tmp_path, kind):
    # in a process of its own: HDF5 may crash on a damaged file, or loop without end
    outcomes: dict[int, tuple[str, str]] = {}
    while len(outcomes) < DAMAGES:
        command = [sys.executable, __file__, str(tmp_path), kind, str(len(outcomes))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                stdout, stderr = process.communicate(timeout=100)
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
        lines = [json.loads(line) for line in stdout.splitlines()]
        assert lines, stderr
        assert process.returncode <= 0, stderr  # a signal is the library's; an exception is ours
        outcomes.update({number: (how, "killed" if what == "started" else what) for number, how, what in lines})
    counts = collections.Counter(what for _, what in outcomes.values())
    wrong = {n: o for n, o in outcomes.items() if o[1] not in ("refused", "noted", "equal", "killed")}
    assert not wrong
    assert counts["refused"] > DAMAGES / 5
    assert counts["equal"] > DAMAGES / 20  # not everything is refused
    if kind != "NETCDF4":
        assert "killed" not in counts
    if kind == "NETCDF3_CLASSIC":
        assert all(what == "refused" for how, what in outcomes.values() if how.split()[0] in ("cut", "empty"))


if __name__ == "__main__":
    run_damages(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
