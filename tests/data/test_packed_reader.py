"""Packed data are mapped and not loaded, cheap to open, and refused if files are damaged."""

import json
import tracemalloc

import numpy as np
import pytest

from topoflow.data.source import open_source
from topoflow.errors import DataError
from topoflow.tools.prepare.packing import PackOptions, pack
from topoflow.tools.prepare.verification import verify

NAMES = ("u", "v", "pm25", "co", "elevation", "population")


@pytest.fixture
def packed(make_fields, write_store, tmp_path):
    path = write_store(make_fields(hours=100, start="2018-12-30"), tmp_path / "in" / "data.zarr")
    pack(str(path), tmp_path / "out", PackOptions(), progress=False)
    return tmp_path / "out"


def test_packed_data_are_mapped_unless_memory_is_asked_for(packed):
    assert not open_source(str(packed), NAMES).in_memory
    assert not open_source(str(packed), NAMES, in_memory=False).in_memory
    assert open_source(str(packed), NAMES, in_memory=True).in_memory


def test_an_hour_of_neighbours_is_a_view_that_cannot_be_changed(packed):
    source = open_source(str(packed), NAMES)
    hour = source.hour(("pm25", "co"), 30)
    assert not hour.flags.owndata
    assert not hour.flags.writeable
    before = hour.copy()
    source.snapshot(("pm25", "co"), 30)[:] = 0
    np.testing.assert_array_equal(source.hour(("pm25", "co"), 30), before)


def test_what_was_read_stays_valid_after_closing(packed):
    source = open_source(str(packed), NAMES)
    hour = source.hour(("u", "v"), 3)
    before = hour.copy()
    source.close()
    np.testing.assert_array_equal(hour, before)
    np.testing.assert_array_equal(source.hour(("u", "v"), 3), before)


def test_reading_costs_no_memory_that_grows_with_the_data(packed):
    source = open_source(str(packed), NAMES)
    source.hour(("u", "v"), 0), source.hour(("u", "v"), 99)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(100):
        source.hour(("u", "v"), index)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 1000


@pytest.mark.parametrize(
    "name", ["fields_2018.npy", "fields_2019.npy", "lat2d.npy", "population.npy", "year_2018.json"]
)
def test_a_missing_or_cut_file_is_named_at_opening(packed, name):
    data = (packed / name).read_bytes()
    (packed / name).write_bytes(data[:-1])
    with pytest.raises(
        DataError, match=rf"{name}: has {len(data) - 1} bytes: expected {len(data)} \(see pack --verify"
    ):
        open_source(str(packed), NAMES)
    (packed / name).unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be found"):
        open_source(str(packed), NAMES)


def test_a_file_that_is_cut_later_is_refused_before_it_is_mapped(packed):
    source = open_source(str(packed), NAMES)
    (packed / "fields_2019.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"fields_2019.npy: has 0 bytes"):
        source.hour(("u", "v"), 99)
    source.hour(("u", "v"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-2], "it is not JSON"),
        (lambda text: text.replace('"co"', '"o3"'), "does not match its own hash"),
        (lambda text: text.replace("\n", "\n ", 1), "does not match its own hash"),
        (lambda text: text.replace("data 2", "data 9"), "has the format 'topoflow packed data 9'"),
        (lambda text: "[]", "has the format None"),
        (lambda text: json.dumps({"format": "topoflow packed data 2"}), "lacks a key of the format"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(packed, change, message):
    path = packed / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=f"manifest.json: .*{message}"):
        open_source(str(packed), NAMES)


def test_verify_names_what_is_damaged(packed):
    assert verify(packed, progress=False)[1] == []
    array = packed / "fields_2018.npy"
    data = bytearray(array.read_bytes())
    data[128 + 30 * 4 * 4 * 24] ^= 4  # in the second day, which only its hash detects
    array.write_bytes(data)
    (packed / "elevation.npy").write_bytes((packed / "population.npy").read_bytes())
    assert open_source(str(packed), ("u", "v")).times.size == 100
    (packed / "year_2019.json").write_text("x")
    damage = verify(packed, progress=False)[1]
    assert [line.rpartition("/")[2].split(": ")[0] for line in damage] == [
        "elevation.npy",
        "fields_2018.npy",
        "year_2019.json",
    ]
    assert "2018-12-31 does not match its hash" in damage[1]


def test_verify_names_what_is_missing(packed):
    (packed / "lat2d.npy").unlink()
    (packed / "fields_2019.npy").unlink()
    damage = verify(packed, progress=False)[1]
    assert len(damage) == 2
    assert "lat2d.npy: cannot be read" in damage[0]
    assert "fields_2019.npy: cannot be read" in damage[1]
