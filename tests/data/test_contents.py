"""What the hours of the splits hold: the same for the same data in any place, and a difference is named."""

import re

import numpy as np
import pytest

from tests.support.prepared import write_prepared
from topoflow.data.contents import Contents, contents_of
from topoflow.data.prepared.reader import PreparedData, index_prepared

NAMES = ("u", "co", "elevation", "lat2d", "hour_sin")
WHOLE = np.arange(24, 96)
PARTS = np.r_[5:20, 30:96]


@pytest.fixture
def contents(make_fields, tmp_path):
    number = iter(range(100))

    def build(change=lambda fields: fields, hours=120, indices=WHOLE, names=NAMES, **options):
        fields = make_fields(hours=240).isel(time=slice(hours)).copy(deep=True)
        folder = write_prepared(change(fields), tmp_path / str(next(number)), **options)
        return contents_of(PreparedData(index_prepared(str(folder))), names, indices)

    return build


@pytest.mark.parametrize("indices", [WHOLE, PARTS])
def test_data_that_grew_have_the_same(contents, indices):
    first = contents(indices=indices)
    for more in (contents(hours=97, indices=indices), contents(hours=200, indices=indices), contents(indices=indices)):
        assert more.fingerprint == first.fingerprint
        assert first.difference(more) is None


def test_they_come_back_from_plain_values(contents):
    first = contents()
    assert Contents.from_dict(first.to_dict()) == first


def at(name, index, value=7.0):
    def change(fields):
        fields[name][index] = value
        return fields

    return change


@pytest.mark.parametrize("indices", [WHOLE, PARTS])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (at("co", (30, 0, 0)), "co on 2019-01-02"),
        (at("u", (95, 3, 5)), "u on 2019-01-04"),
        (at("u", (40, 1), np.nan), "u on 2019-01-02"),
        (at("elevation", (2, 2)), "elevation"),
        (lambda fields: fields.assign_coords(lat=fields.lat + 0.01), "place of the cells"),
        (lambda fields: fields.assign_coords(time=fields.time + np.timedelta64(1, "D")), "hours of 2019-01-0[12]"),
        (lambda fields: fields.isel(time=np.r_[:50, 51:120]), "hours of 2019-01-0[35]"),
        (lambda fields: fields.isel(lon=slice(None, None, -1)).assign_coords(lon=fields.lon), "elevation"),
        (lambda fields: fields.assign(co=fields.co.assign_attrs(units="mg m-3")), "encoding of co"),
    ],
)
def test_what_differs_is_named(contents, indices, change, words):
    first, other = contents(indices=indices), contents(change, indices=indices)
    assert first.fingerprint != other.fingerprint
    assert re.fullmatch(words, first.difference(other))


def test_what_lies_outside_the_hours_or_is_not_read_does_not_count(contents):
    first = contents()
    for change in (at("co", (3, 0, 0)), at("v", (30, 0, 0)), at("population", (0, 0)), at("u", (96, 0, 0))):
        assert contents(change).fingerprint == first.fingerprint


def test_mask_and_precision_count(contents):
    first = contents()
    mask = np.ones((4, 6), bool)
    mask[0] = False
    assert first.difference(contents(mask=mask)) == "mask"
    assert first.difference(contents(dtype="float16")).startswith("encoding of ")


def test_other_splits_and_variables_are_compared_where_both_have_them(contents):
    first, fewer = contents(), contents(indices=np.arange(48, 72), names=("co", "v"))
    assert first.fingerprint != fewer.fingerprint
    assert first.difference(fewer, all_days=False) is None
    assert first.difference(fewer) == "hours of 2019-01-02"
    changed = contents(at("co", (50, 0, 0)), indices=np.arange(48, 72), names=("co", "v"))
    assert first.difference(changed, all_days=False) == "co on 2019-01-03"
