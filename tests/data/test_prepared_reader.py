"""Prepared data are mapped and not loaded, cheap to open, and refused if files are damaged."""

import json
import multiprocessing
import shutil
import tracemalloc

import numpy as np
import pytest

from tests.support.prepared import write_prepared
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import DataError, MissingPath


@pytest.fixture
def fields(make_fields):
    return make_fields(hours=100, start="2018-12-30")


@pytest.fixture
def prepared(fields, tmp_path):
    return write_prepared(fields, tmp_path / "out")


def open_prepared(folder):
    return PreparedData(index_prepared(str(folder)))


def test_it_holds_the_values_units_and_place_that_were_written(prepared, fields):
    data = open_prepared(prepared)
    assert data.dynamic == ("u", "v", "pm25", "co")
    assert (data.units["u"], data.units["elevation"]) == ("m s-1", "m")
    np.testing.assert_array_equal(data.times, fields.time.values)
    np.testing.assert_array_equal(data.grid.lat2d[:, 0], fields.lat)
    np.testing.assert_array_equal(data.grid.lon2d[0], fields.lon)
    for name in data.dynamic:
        np.testing.assert_array_equal(data.read(name, [3, 99, 3]), fields[name].values[[3, 99, 3]])
    np.testing.assert_array_equal(data.static("population"), fields.population)
    np.testing.assert_array_equal(data.heights_m(), fields.elevation)
    assert data.mask.all()


def test_an_hour_of_neighbours_is_a_view_that_cannot_be_changed(prepared, fields):
    hour = open_prepared(prepared).at(("pm25", "co"), 30)
    assert not hour.flags.owndata
    assert not hour.flags.writeable
    np.testing.assert_array_equal(hour, [fields.pm25[30], fields.co[30]])
    np.testing.assert_array_equal(open_prepared(prepared).at(("co", "u"), 30), [fields.co[30], fields.u[30]])


def test_float16_is_read_back_as_float32_near_the_values(fields, tmp_path):
    data = open_prepared(write_prepared(fields, tmp_path / "half", dtype="float16"))
    for name in data.dynamic:
        values = data.read(name, slice(None))
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, fields[name].values, atol=2e-3 * float(fields[name].std()))
        for position in (0, 50, 99):
            np.testing.assert_array_equal(data.at((name,), position)[0], values[position])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_some_places_of_consecutive_hours_are_those_of_the_whole_fields(fields, tmp_path, dtype):
    data = open_prepared(write_prepared(fields, tmp_path / "out", dtype=dtype))
    names, hours, places = ("co", "u", "v"), range(44, 52), np.array([71, 0, 23, 24, 30])  # over New Year
    whole = np.stack([data.at(names, hour) for hour in hours])
    found = data.at_places(names, hours, places)
    np.testing.assert_array_equal(found, whole.reshape(8, -1)[:, places])
    assert found.dtype == np.float32
    assert data.at_places(names, range(5, 5), places).shape == (0, 5)


def test_reading_costs_no_memory_that_grows_with_the_data(prepared):
    data = open_prepared(prepared)
    data.at(("u", "v"), 0), data.at(("u", "v"), 99)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(100):
        data.at(("u", "v"), index)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2000


def read_all(index):
    """Return every field of an index, as seen by this process."""
    data = PreparedData(index)
    return {name: data.read(name, slice(None)) for name in data.dynamic}


def test_another_process_reads_the_same_with_an_index_that_it_is_sent(prepared, fields):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        read = pool.apply(read_all, (index_prepared(str(prepared)),))
    for name, values in read.items():
        np.testing.assert_array_equal(values, fields[name].values)


def test_what_is_not_prepared_is_refused_with_the_command_that_prepares_it(fields, tmp_path):
    fields.to_netcdf(tmp_path / "data.nc")
    for path in (tmp_path, tmp_path / "data.nc"):
        with pytest.raises(
            DataError, match=f"data.path: {path} is not prepared .*python -m topoflow prepare {path} -o"
        ):
            index_prepared(str(path))
    with pytest.raises(MissingPath, match="nowhere does not exist"):
        index_prepared(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["fields_2018.npy", "fields_2019.npy", "static.npz", "days_2018.json"])
def test_a_missing_or_cut_file_is_named_at_opening(prepared, name):
    data = (prepared / name).read_bytes()
    (prepared / name).write_bytes(data[:-1])
    with pytest.raises(
        DataError, match=rf"{name}: has {len(data) - 1} bytes: expected {len(data)} \(see prepare --verify"
    ):
        open_prepared(prepared)
    (prepared / name).unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be found"):
        open_prepared(prepared)


def test_a_file_that_is_cut_after_the_look_is_refused_before_it_is_mapped(prepared):
    index = index_prepared(str(prepared))
    (prepared / "fields_2019.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"fields_2019.npy: has 0 bytes"):
        PreparedData(index)


def test_what_is_replaced_later_can_still_be_read(prepared, fields):
    data = open_prepared(prepared)
    (prepared / "fields_2019.npy").unlink()
    np.testing.assert_array_equal(data.at(("u",), 99)[0], fields.u[99])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-2], "it is not JSON"),
        (lambda text: text.replace('"co"', '"o3"'), "does not match its own hash"),
        (lambda text: text.replace("\n", "\n ", 1), "does not match its own hash"),
        (lambda text: text.replace("data 1", "data 9"), "has the format 'topoflow prepared data 9'"),
        (lambda text: "[]", "has the format None"),
        (lambda text: json.dumps({"format": "topoflow prepared data 1"}), "lacks a key of the format"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(prepared, change, message):
    path = prepared / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=f"manifest.json: .*{message}"):
        open_prepared(prepared)


@pytest.mark.parametrize("name", ["static.npz", "days_2019.json"])
def test_a_file_with_a_changed_byte_is_refused_at_opening(prepared, name):
    data = bytearray((prepared / name).read_bytes())
    data[len(data) // 2] ^= 4
    (prepared / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: is damaged: it does not match its hash in the manifest"):
        open_prepared(prepared)


def test_it_may_be_moved(prepared, fields):
    shutil.move(prepared, prepared.with_name("elsewhere"))
    np.testing.assert_array_equal(open_prepared(prepared.with_name("elsewhere")).read("u", [7])[0], fields.u[7])
