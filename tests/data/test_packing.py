"""Packed data: contents, packing, and refusals."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from topoflow.data.source import index_source, open_indexed, open_source
from topoflow.errors import ConfigError, DataError, MissingPath
from topoflow.tools.prepare import packing
from topoflow.tools.prepare.packing import PackOptions, pack
from topoflow.tools.prepare.verification import verify

NAMES = ("u", "v", "psfc", "pm25", "co")
ALL = (*NAMES, "elevation", "population")
START = "2018-12-29T05"


@pytest.fixture
def fields(make_fields):
    """Fields from the end of 2018 to the beginning of 2019, with a gap."""
    dataset = make_fields(names=NAMES, start=START, hours=150, shape=(6, 8))
    dataset["psfc"] = (dataset.psfc * 50 + 90000).assign_attrs(dataset.psfc.attrs)
    return dataset.isel(time=np.r_[:20, 23:150])


@pytest.fixture
def store(fields, write_store, tmp_path):
    for year, part in fields.groupby("time.year"):
        write_store(part, tmp_path / "in" / f"data_{year}.zarr")
    return tmp_path / "in"


def pack_quietly(data, output, **options):
    return pack(str(data), output, PackOptions(**options), progress=False)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_anyone_can_read_the_arrays(store, fields, tmp_path):
    report = pack_quietly(store, tmp_path / "out")
    assert report.written == (2018, 2019)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    order = [variable["name"] for variable in manifest["variables"]]
    assert order == ["u", "v", "psfc", "pm25", "co"]  # the pollutants last, so that targets are contiguous too
    for year, part in fields.groupby("time.year"):
        array = np.load(tmp_path / "out" / f"fields_{year}.npy", mmap_mode="r")
        assert array.flags.c_contiguous
        expected = np.stack([part[name].values for name in order], axis=1)
        assert array.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "lat2d.npy")[:, 0], fields.lat.values)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "elevation.npy"), fields.elevation.values)
    assert not list(tmp_path.glob(".*"))


def test_packed_float32_is_the_same_data(store, fields, tmp_path):
    pack_quietly(store, tmp_path / "out")
    plain, packed = (open_source(str(path), ALL, in_memory=False) for path in (store, tmp_path / "out"))
    assert packed.fingerprint == plain.fingerprint
    assert packed.compute_fingerprint() == plain.fingerprint
    np.testing.assert_array_equal(packed.times, plain.times)
    for name in NAMES:
        for indices in (slice(None), [60], [3, 90, 3, 70], slice(60, 80)):
            assert packed.read(name, indices).tobytes() == plain.read(name, indices).tobytes()
    for names in (NAMES, ("pm25", "co"), ("co", "u"), ()):
        for index in (0, 66, 67, 146):
            assert packed.snapshot(names, index).tobytes() == plain.snapshot(names, index).tobytes()
    held = open_source(str(tmp_path / "out"), ALL, in_memory=True)
    assert held.in_memory
    assert held.read("co", slice(None)).tobytes() == plain.read("co", slice(None)).tobytes()


def test_some_of_the_variables_and_packing_again(store, tmp_path):
    pack_quietly(store, tmp_path / "some", variables=("co", "elevation", "u"))
    pack_quietly(tmp_path / "some", tmp_path / "again")
    assert contents(tmp_path / "some").keys() == contents(tmp_path / "again").keys()
    with pytest.raises(DataError, match=r"some has no variable 'pm25': it has co, elevation, u"):
        open_source(str(tmp_path / "some"), ("u", "pm25"))
    for path in ("some", "again"):
        assert (
            open_source(str(tmp_path / path), ("co", "u")).fingerprint
            == open_source(str(store), ("co", "u")).fingerprint
        )


def test_an_index_is_sent_to_another_process(store, tmp_path):
    import pickle

    pack_quietly(store, tmp_path / "out")
    index = pickle.loads(pickle.dumps(index_source(str(tmp_path / "out"), ALL)))
    assert open_indexed(index).compute_fingerprint() == open_source(str(store), ALL).fingerprint


def test_netcdf_is_packed_in_the_same_way(store, fields, write_store, tmp_path):
    write_store(fields, tmp_path / "one.nc", "netcdf")
    pack_quietly(tmp_path / "one.nc", tmp_path / "from_netcdf")
    pack_quietly(store, tmp_path / "from_zarr")
    one, other = contents(tmp_path / "from_netcdf"), contents(tmp_path / "from_zarr")
    manifests = [json.loads(held.pop("manifest.json")) for held in (one, other)]
    assert one == other
    differing = {key for key in manifests[0] if manifests[0][key] != manifests[1][key]}
    assert differing == {"years", "manifest_sha256"}  # except the source files


# ---- precision


def test_float16_reports_its_error(store, fields, tmp_path):
    report = pack_quietly(store, tmp_path / "half", dtype="float16")
    source = open_source(str(tmp_path / "half"), ALL, in_memory=False)
    for variable in report.manifest.variables:
        values = fields[variable.name].values.astype(np.float64)
        difference = (source.read(variable.name, slice(None)) - values)[~np.isnan(values)]
        assert variable.error_max == np.abs(difference).max() > 0
        assert variable.error_rms == pytest.approx(np.sqrt(np.square(difference).mean()), rel=1e-9)
        assert variable.std == pytest.approx(np.nanstd(values), rel=1e-3)
        assert variable.error_rms < 5e-4 * variable.std
        np.testing.assert_array_equal(np.isnan(source.read(variable.name, slice(None))), np.isnan(values))
    lines = report.lines()
    assert [line.split()[0] for line in lines[2:]] == ["u", "v", "psfc", "pm25", "co"]
    assert "Pa" in lines[4]


def test_float16_refuses_what_it_cannot_hold(store, fields, write_store, tmp_path):
    fields = fields.copy(deep=True)
    fields.co[100, 1, 1] = 1e9
    write_store(fields, tmp_path / "far.zarr")
    with pytest.raises(ConfigError, match=r"--dtype float16: variable 'co' has values up to 1e\+09 ug m-3"):
        pack_quietly(tmp_path / "far.zarr", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    pack_quietly(tmp_path / "far.zarr", tmp_path / "half", dtype="float32")  # leftovers do not matter


# ---- grid and mask


def test_a_coarser_grid_is_the_mean_by_area(store, fields, tmp_path):
    pack_quietly(store, tmp_path / "coarse", grid=(3, 4))
    source = open_source(str(tmp_path / "coarse"), ALL, in_memory=False)
    for row in range(3):
        for column in range(4):
            block = fields.isel(lat=slice(2 * row, 2 * row + 2), lon=slice(2 * column, 2 * column + 2))
            mean = block.weighted(np.cos(np.deg2rad(block.lat))).mean(("lat", "lon"))
            for name in NAMES:
                np.testing.assert_allclose(
                    source.read(name, slice(None))[:, row, column], mean[name].values, rtol=1e-6, atol=1e-5
                )
            np.testing.assert_allclose(source.grid.elevation_m[row, column], mean.elevation.values, rtol=1e-6)
            np.testing.assert_allclose(source.grid.population[row, column], block.population.values.sum(), rtol=1e-6)
            np.testing.assert_allclose(source.grid.lat2d[row, column], block.lat.values.mean())
    assert source.grid.north_first


def test_the_mask_that_was_packed_is_used(store, make_config, tmp_path):
    from topoflow.data.assembly import open_forecast_data

    counts = np.zeros((6, 8), bool)
    counts[2:4, 2:4] = counts[0, 0] = True
    np.save(tmp_path / "mask.npy", counts)
    pack_quietly(store, tmp_path / "masked", mask=tmp_path / "mask.npy")
    pack_quietly(store, tmp_path / "coarse", mask=tmp_path / "mask.npy", grid=(3, 4))
    pack_quietly(tmp_path / "masked", tmp_path / "again")
    names = {"variables": ("u", "co"), "targets": ("co",), "train": (("2018-12-31", "2018-12-31"),)}
    for path, mask, expected in (
        ("masked", None, counts),
        ("again", None, counts),
        ("coarse", None, counts[1::2, 1::2]),  # a quarter of the first cell does not make it count
        ("masked", tmp_path / "mine.npy", ~counts),
    ):
        np.save(tmp_path / "mine.npy", ~counts)
        config = make_config(tmp_path / path, **names, mask=mask and str(mask))
        np.testing.assert_array_equal(open_forecast_data(config, False, False).mask, expected)


# ---- interrupted


class Interrupted(BaseException):
    """Raised by a test in place of a kill."""


def interrupt_at(event, act):
    """Call `act` after so many lines of the packing modules have run; return the number that ran in total."""
    count = 0
    folder, files = str(Path(packing.__file__).parent), str(Path(packing.__file__).parents[1] / "files.py")

    def trace(frame, kind, _):
        nonlocal count
        name = frame.f_code.co_filename
        if not (name.startswith(folder) or name == files):
            return None
        if kind == "line":
            count += 1
            if count == event:
                act()
        return trace

    sys.settrace(trace)
    return lambda: (sys.settrace(None), count)[1]


@pytest.fixture
def lines_run(store, tmp_path):
    """The number of our lines that a whole packing runs, and its result."""
    counted = interrupt_at(-1, None)
    pack_quietly(store, tmp_path / "whole")
    return counted()


@pytest.mark.parametrize("way", ["killed", "interrupted"])
def test_interrupted_anywhere_the_same_command_resumes(store, tmp_path, lines_run, way):
    whole = contents(tmp_path / "whole")
    output = tmp_path / "out"
    for event in np.linspace(lines_run // 4, lines_run - 3, 16 if way == "killed" else 40).astype(int):
        if way == "killed":
            child = os.fork()
            if child == 0:
                interrupt_at(event, lambda: os.kill(os.getpid(), signal.SIGKILL))
                pack_quietly(store, output)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
        else:

            def stop():
                raise Interrupted

            stopped = interrupt_at(event, stop)
            with pytest.raises(Interrupted):
                pack_quietly(store, output)
            stopped()
        if output.exists():  # as soon as it exists it is complete
            assert verify(output, progress=False)[1] == []
        pack_quietly(store, output)
        assert contents(output) == whole
        assert not list(tmp_path.glob(".out*"))
        shutil.rmtree(output)


def begin(store, output, days=3):
    """Start a packing that ends after so many days have been written; return its folder."""
    written = packing.YearWriter.write

    def write(self, *arguments):
        written(self, *arguments)
        if len(self.days) == days:
            raise Interrupted

    packing.YearWriter.write = write
    try:
        with pytest.raises(Interrupted):
            pack_quietly(store, output)
    finally:
        packing.YearWriter.write = written
    return output.with_name(f".{output.name}.packing")


def test_days_that_are_there_are_not_read_again(store, tmp_path, monkeypatch):
    begin(store, tmp_path / "out", days=2)
    written = []
    write = packing.YearWriter.write
    monkeypatch.setattr(packing.YearWriter, "write", lambda self, v, r: written.append(r.day) or write(self, v, r))
    pack_quietly(store, tmp_path / "out")
    assert written[0] == "2018-12-31"
    assert len(written) == 5


@pytest.mark.parametrize("harm", ["flip a byte", "cut the array", "cut the journal", "other journal", "no journal"])
def test_leftovers_are_verified_and_not_trusted(store, tmp_path, harm):
    pack_quietly(store, tmp_path / "whole")
    work = begin(store, tmp_path / "out")
    array, journal = work / "fields_2018.npy", work / "fields_2018.journal"
    data = bytearray(array.read_bytes())
    if harm == "flip a byte":
        data[5000] ^= 1
        array.write_bytes(data)
    elif harm == "cut the array":
        array.write_bytes(data[:-100])
    elif harm == "cut the journal":
        journal.write_text(journal.read_text()[:-100])
    elif harm == "other journal":
        journal.write_text(journal.read_text().replace('"', '"0', 1))
    else:
        journal.unlink()
    pack_quietly(store, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_data_that_changed_meanwhile_are_not_mixed(store, fields, write_store, tmp_path):
    begin(store, tmp_path / "out")
    shutil.rmtree(store / "data_2018.zarr")
    changed = fields.isel(time=fields["time.year"] == 2018) + 1
    changed = changed.assign({name: changed[name].assign_attrs(fields[name].attrs) for name in changed})
    changed["elevation"], changed["population"] = fields.elevation, fields.population
    write_store(changed, store / "data_2018.zarr")
    pack_quietly(store, tmp_path / "out")
    source = open_source(str(tmp_path / "out"), ALL, in_memory=False)
    np.testing.assert_array_equal(source.read("u", [0])[0], changed.u.values[0])


def test_other_options_than_those_of_the_interrupted_run_are_refused(store, tmp_path):
    begin(store, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--dtype float16: .*\.out\.packing was started .* with --dtype float32"):
        pack_quietly(store, tmp_path / "out", dtype="float16")
    pack_quietly(store, tmp_path / "out")


def test_two_at_once_are_refused(store, tmp_path):
    with packing._work_folder(tmp_path / "out"), pytest.raises(ConfigError, match="another process is packing"):
        pack_quietly(store, tmp_path / "out")


# ---- years appended


def test_years_are_appended_and_the_others_stay(store, fields, write_store, tmp_path):
    pack_quietly(store, tmp_path / "whole")
    (store / "data_2019.zarr").rename(tmp_path / "later")
    pack_quietly(store, tmp_path / "out")
    before = (tmp_path / "out" / "fields_2018.npy").stat()
    (tmp_path / "later").rename(store / "data_2019.zarr")
    assert pack_quietly(store, tmp_path / "out").written == (2019,)
    after = (tmp_path / "out" / "fields_2018.npy").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert pack_quietly(store, tmp_path / "out").written == ()
    shutil.rmtree(store / "data_2018.zarr")  # the source does not need to have the packed years
    assert pack_quietly(store, tmp_path / "out").written == ()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_appending_is_interrupted_anywhere_too(store, tmp_path):
    pack_quietly(store, tmp_path / "whole")
    (store / "data_2019.zarr").rename(tmp_path / "later")
    pack_quietly(store, tmp_path / "first")
    (tmp_path / "later").rename(store / "data_2019.zarr")
    shutil.copytree(tmp_path / "first", tmp_path / "counted")
    counted = interrupt_at(-1, None)
    pack_quietly(store, tmp_path / "counted")
    lines = counted()
    for event in np.linspace(lines // 3, lines - 3, 25).astype(int):
        shutil.copytree(tmp_path / "first", tmp_path / "out")

        def stop():
            raise Interrupted

        stopped = interrupt_at(event, stop)
        with pytest.raises(Interrupted):
            pack_quietly(store, tmp_path / "out")
        stopped()
        assert verify(tmp_path / "out", progress=False)[1] == []
        pack_quietly(store, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_year_that_changed_is_refused(store, fields, write_store, tmp_path):
    pack_quietly(store, tmp_path / "out")
    before = contents(tmp_path / "out")
    group = xr.open_zarr(store / "data_2018.zarr", chunks=None).load()
    copied = tmp_path / "copy"
    shutil.copytree(store, copied)  # other modification times, the same values
    assert pack_quietly(copied, tmp_path / "out").written == ()
    group.co[41, 2, 3] = 1.0
    shutil.rmtree(copied / "data_2018.zarr")
    write_store(group, copied / "data_2018.zarr")
    with pytest.raises(DataError, match="2018-12-31 was packed with values that differ"):
        pack_quietly(copied, tmp_path / "out")
    shutil.rmtree(copied / "data_2018.zarr")
    write_store(group.isel(time=slice(0, 40)), copied / "data_2018.zarr")
    with pytest.raises(DataError, match="2018 is packed with 64 hours, the data have 40"):
        pack_quietly(copied, tmp_path / "out")
    now = contents(tmp_path / "out")
    assert {name: now[name] for name in now if name != "manifest.json"} == {
        name: before[name] for name in before if name != "manifest.json"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "--dtype float16: .* with --dtype float32"),
        ({"grid": (3, 4)}, "--grid 3x4: .* with --grid 6x8"),
        ({"variables": ("co",)}, "--variables co: .* with --variables u,v,psfc,pm25,co,elevation,population"),
    ],
)
def test_years_are_appended_only_with_the_same_options(store, tmp_path, options, message):
    pack_quietly(store, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        pack_quietly(store, tmp_path / "out", **options)


def test_another_region_is_not_appended(store, fields, write_store, tmp_path):
    pack_quietly(store, tmp_path / "out")
    moved = fields.assign_coords(lat=fields.lat - 1, time=fields.time + np.timedelta64(365, "D"))
    write_store(moved, tmp_path / "moved.zarr")
    with pytest.raises(DataError, match="'lat2d' of the data differs from the packed one"):
        pack_quietly(tmp_path / "moved.zarr", tmp_path / "out")


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variables": ("u", "ozon")}, "--variables: 'ozon' cannot be packed"),
        ({"variables": ("u", "hour_sin")}, "--variables: 'hour_sin' cannot be packed"),
        ({"variables": ("elevation",)}, "--variables elevation: expected one that changes"),
        ({"grid": (12, 8)}, "--grid 12x8: finer than the data, 6x8"),
        ({"grid": (1, 4)}, "--grid 1x4: expected at least 2x2"),
        ({"dtype": "int8"}, "--dtype int8"),
    ],
)
def test_options_that_are_refused(store, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        pack_quietly(store, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_what_is_there_already_is_not_touched(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match=f"{name}: is not packed data"):
            pack_quietly(store, tmp_path / name)
    with pytest.raises(ConfigError, match="in: is not packed data"):
        pack_quietly(store, store)
    (tmp_path / "empty").mkdir()
    pack_quietly(store, tmp_path / "empty")
    with pytest.raises(MissingPath):
        pack_quietly(tmp_path / "nowhere", tmp_path / "out")


def test_a_full_disk_is_reported_in_one_line_and_the_same_command_resumes(store, tmp_path, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(packing.YearWriter, "write", full)
        with pytest.raises(ConfigError, match=r"out: cannot be written: No space left on device$"):
            pack_quietly(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pack_quietly(store, tmp_path / "out")
