"""However a file stores its values, the same values are read."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xarray.backends.zarr import FillValueCoder
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ZstdCodec

from topoflow.tools.prepare.clock import read_times
from topoflow.tools.prepare.files import open_file, read_values
from topoflow.tools.prepare.findings import Findings
from topoflow.tools.prepare.recipe import Rules, Source

NETCDF3 = ["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"]
SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
SHAPE = {"time": 5, "lat": 3, "lon": 4}
START = np.datetime64("2019-02-28T21", "h")  # the next day is in another month
PACKED = {"dtype": "i2", "scale_factor": 0.25, "add_offset": 50.0}


@st.composite
def layouts(draw):
    """How a file stores its values."""
    return {
        "format": draw(st.sampled_from([*NETCDF3, "NETCDF4", 2, 3])),
        "dims": draw(st.permutations(list(SHAPE))),
        "chunks": [draw(st.integers(1, size)) for size in SHAPE.values()],
        "codec": draw(st.sampled_from(["none", "deflate", "zstd", "shuffle"])),
        "byte_order": draw(st.sampled_from(["<", ">"])),
        "type": draw(st.sampled_from(["f4", "f8", "packed"])),
        "mark": draw(st.sampled_from([-32767, -999])),
        "unit": draw(st.sampled_from(list(SECONDS))),
        "since": draw(st.sampled_from(["1900-01-01", "1970-01-01 00:00:00", "2019-02-28T00:00:00", "2020-01-01"])),
        "time_type": draw(st.sampled_from(["f8", "i4"])),
    }


@settings(deadline=None, derandomize=True, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(layouts(), st.lists(st.one_of(st.none(), st.integers(0, 4000)), min_size=60, max_size=60))
def test_layout_does_not_change_values(layout, quarters):
    values = np.array([np.nan if q is None else q / 4 for q in quarters], "f8").reshape(*SHAPE.values())
    hours = START + np.arange(SHAPE["time"])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: Zarr 3 has no consolidated metadata by its standard
        path = Path(folder, "data.zarr" if isinstance(layout["format"], int) else "data.nc")
        write = write_zarr if isinstance(layout["format"], int) else write_netcdf
        write(path, layout, values, encode_times(hours, layout))
        findings = Findings()
        dataset = open_file(path, Rules(incomplete="missing"), findings)
        assert dataset is not None, findings.sorted()
        with dataset:
            order = [list(dataset["pm25"].dims).index(dim) for dim in SHAPE]
            read = read_values(dataset, "pm25", {})
            np.testing.assert_array_equal(read.transpose(order), values)
            clock = read_times(dataset, Source(str(path)), findings, path)
            assert clock is not None, findings.sorted()
            np.testing.assert_array_equal(clock.times, hours)
    assert not findings.open()


def encode_times(hours: np.ndarray, layout: dict) -> np.ndarray:
    """Numbers of the layout's unit; as integers where that is exact."""
    seconds = (hours.astype("M8[s]") - np.datetime64(layout["since"], "s")).astype("i8")
    numbers = seconds / SECONDS[layout["unit"]]
    is_exact = (numbers == np.round(numbers)).all() and np.abs(numbers).max() < 2**31
    return numbers.astype(layout["time_type"] if is_exact else "f8")


def stored(values: np.ndarray, layout: dict) -> tuple[np.ndarray, dict[str, Any]]:
    """What is in the file, in its order of dimensions, and the attributes that say how to unpack it."""
    values = values.transpose([list(SHAPE).index(dim) for dim in layout["dims"]])
    attributes: dict[str, Any] = {}
    if layout["type"] == "packed":
        attributes = {"scale_factor": PACKED["scale_factor"], "add_offset": PACKED["add_offset"]}
        values = (values - PACKED["add_offset"]) / PACKED["scale_factor"]
    return np.where(np.isnan(values), layout["mark"], values), attributes


def stored_type(layout: dict) -> np.dtype:
    return np.dtype(layout["byte_order"] + (PACKED["dtype"] if layout["type"] == "packed" else layout["type"]))


def write_netcdf(path: Path, layout: dict, values: np.ndarray, times: np.ndarray) -> None:
    raw, attributes = stored(values, layout)
    type_ = stored_type(layout)
    options = {}
    if layout["format"] == "NETCDF4":
        codec = {"none": {}, "deflate": {"zlib": True}, "zstd": {"compression": "zstd"}}
        options = codec.get(layout["codec"], {"zlib": True, "shuffle": True})
        sizes = dict(zip(SHAPE, layout["chunks"], strict=True))
        options = {**options, "chunksizes": [sizes[dim] for dim in layout["dims"]]}
        options["endian"] = "big" if layout["byte_order"] == ">" else "little"
    with netCDF4.Dataset(path, "w", format=layout["format"]) as file:
        for dim, size in SHAPE.items():
            file.createDimension(dim, None if dim == layout["dims"][0] else size)
        time = file.createVariable("time", times.dtype, ("time",))
        time.units, time.calendar = f"{layout['unit']} since {layout['since']}", "standard"
        time[:] = times
        variable = file.createVariable("pm25", type_, layout["dims"], fill_value=layout["mark"], **options)
        variable.set_auto_maskandscale(False)
        variable.setncatts(attributes)
        variable[:] = raw.astype(type_)


def write_zarr(path: Path, layout: dict, values: np.ndarray, times: np.ndarray) -> None:
    raw, attributes = stored(values, layout)
    type_, dims = stored_type(layout), layout["dims"]
    sizes = dict(zip(SHAPE, layout["chunks"], strict=True))
    options: dict[str, Any] = {"chunks": tuple(sizes[dim] for dim in dims), "fill_value": layout["mark"]}
    of_time: dict[str, Any] = {"units": f"{layout['unit']} since {layout['since']}", "calendar": "standard"}
    group = zarr.open_group(path, mode="w", zarr_format=layout["format"])
    if layout["format"] == 3:
        options["serializer"] = BytesCodec(endian="big" if layout["byte_order"] == ">" else "little")
        by_name = {"none": None, "deflate": GzipCodec(), "zstd": ZstdCodec()}
        options["compressors"] = by_name.get(layout["codec"], BloscCodec(shuffle="shuffle", typesize=4))
        type_ = type_.newbyteorder("=")
        options["dimension_names"] = dims
        attributes["_FillValue"] = FillValueCoder.encode(type_.type(layout["mark"]), type_)
        times_options: dict[str, Any] = {"dimension_names": ["time"]}
    else:
        if layout["codec"] == "none":
            options["compressors"] = None
        attributes["_ARRAY_DIMENSIONS"], of_time["_ARRAY_DIMENSIONS"] = list(dims), ["time"]
        times_options = {"fill_value": None}
    time = group.create_array("time", shape=times.shape, dtype=times.dtype, attributes=of_time, **times_options)
    time[...] = times
    pm25 = group.create_array("pm25", shape=raw.shape, dtype=type_, attributes=attributes, **options)
    pm25[...] = raw.astype(type_)
