"""Files as people have them are found, opened and read as their libraries define, or refused by name."""

import shutil
from pathlib import Path
from typing import Any, Literal

import netCDF4
import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, BytesCodec

from topoflow.errors import DataError
from topoflow.tools.prepare.files import find_files, open_file, read_values
from topoflow.tools.prepare.findings import Finding, Findings
from topoflow.tools.prepare.recipe import Rules

TIMES, ROWS, COLUMNS = 6, 4, 5
PM25 = np.arange(TIMES * ROWS * COLUMNS, dtype="f4").reshape(TIMES, ROWS, COLUMNS)


def build_dataset() -> xr.Dataset:
    return xr.Dataset(
        {"pm25": (("time", "lat", "lon"), PM25, {"units": "ug m-3"})},
        {
            "time": ("time", np.arange(TIMES), {"units": "hours since 2019-01-01"}),
            "lat": np.linspace(50.0, 47.0, ROWS),
            "lon": np.linspace(5.0, 9.0, COLUMNS),
        },
    )


def open_found(
    path: Path, incomplete: Literal["refuse", "missing"] = "refuse"
) -> tuple[xr.Dataset | None, list[Finding]]:
    findings = Findings()
    return open_file(path, Rules(incomplete=incomplete), findings), findings.sorted()


def open_usable(path: Path) -> xr.Dataset:
    dataset, found = open_found(path)
    assert dataset is not None, found
    return dataset


def read(path: Path) -> np.ndarray:
    with open_usable(path) as dataset:
        return read_values(dataset, "pm25", {})


class TestFindFiles:
    def test_folder_gives_its_data_in_order(self, tmp_path):
        for name in ("b.nc", "a.csv.gz", "c.parquet", "._b.nc", ".hidden.nc", "notes.txt"):
            (tmp_path / name).touch()
        build_dataset().to_zarr(tmp_path / "store", zarr_format=2)
        (tmp_path / "folder").mkdir()
        findings = Findings()
        assert [p.name for p in find_files(str(tmp_path), findings)] == ["a.csv.gz", "b.nc", "c.parquet", "store"]
        assert [finding.severity for finding in findings.sorted()] == ["note"]  # of notes.txt and the folder

    def test_globs_are_joined_without_repeats(self, tmp_path):
        for name in ("2019_b.nc", "2019_a.nc", "2020.nc", "._2019_a.nc"):
            (tmp_path / name).touch()
        paths = (f"{tmp_path}/2019*", f"{tmp_path}/*.nc", f"{tmp_path}/._*")
        findings = Findings()
        assert [p.name for p in find_files(paths, findings)] == ["2019_a.nc", "2019_b.nc", "2020.nc"]
        (finding,) = findings.sorted()
        assert finding.severity == "error"
        assert finding.file == paths[2]

    def test_glob_of_folders_gives_what_is_in_them(self, tmp_path):
        for year in ("2020", "2019"):
            (tmp_path / year).mkdir()
            (tmp_path / year / "data.nc").touch()
        found = find_files(f"{tmp_path}/20*", Findings())
        assert found == [tmp_path / "2019/data.nc", tmp_path / "2020/data.nc"]

    def test_path_with_brackets_is_itself(self, tmp_path):
        (tmp_path / "pm25[1].nc").touch()
        assert find_files(f"{tmp_path}/pm25[1].nc", Findings()) == [tmp_path / "pm25[1].nc"]

    @pytest.mark.parametrize("url", ["s3://bucket/a.zarr", "https://host/a.nc"])
    def test_url_is_refused(self, url):
        findings = Findings()
        assert find_files(url, findings) == []
        (finding,) = findings.sorted()
        assert finding.severity == "error"
        assert "this machine" in finding.expected
        assert "is not read" in finding.found

    @pytest.mark.parametrize("make", [False, True])
    def test_nothing_found_is_an_error(self, tmp_path, make):
        path = tmp_path / "empty"
        if make:
            path.mkdir()
        findings = Findings()
        assert find_files(str(path), findings) == []
        assert [finding.severity for finding in findings.sorted()] == ["error"]


Classic = Literal["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"]
CLASSIC: list[Classic] = ["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"]


def write_netcdf3(path: Path, kind: Classic, records: int, variables: int, type_: str, is_unlimited=True) -> None:
    """A classic file of variables in records, after a fixed one of an odd number of bytes."""
    with netCDF4.Dataset(path, "w", format=kind) as file:
        file.createDimension("time", None if is_unlimited else records)
        file.createDimension("x", 3)
        file.setncattr("title", "odd")
        file.createVariable("mask", "i1", ("x",))[:] = [1, 2, 3]
        for i in range(variables):
            variable = file.createVariable(f"v{i}", type_, ("time", "x"))
            variable.setncattr("units", "ug m-3")
            if records:
                variable[:] = np.arange(records * 3).reshape(records, 3)


class TestNetcdf3:
    @pytest.mark.parametrize("kind", CLASSIC)
    @pytest.mark.parametrize("type_", ["i1", "i2", "f4", "f8"])
    @pytest.mark.parametrize("variables", [0, 1, 2])
    def test_whole_file_opens_and_shorter_one_does_not(self, tmp_path, kind, type_, variables):
        path = tmp_path / "data.nc"
        for records, is_unlimited in ((0, True), (4, True), (4, False)):
            write_netcdf3(path, kind, records, variables, type_, is_unlimited)
            dataset, found = open_found(path)
            assert dataset is not None
            assert not found
            dataset.close()
            data = path.read_bytes()
            # up to 3 bytes at the end are padding
            for length in (*range(4, len(data) - 4, 7), len(data) - 4):
                path.write_bytes(data[:length])
                dataset, found = open_found(path)
                assert dataset is None, (length, len(data))
                assert [(f.severity, f.file) for f in found] == [("error", str(path))]

    @pytest.mark.parametrize("kind", CLASSIC)
    def test_last_byte_of_data_counts(self, tmp_path, kind):
        path = tmp_path / "data.nc"
        write_netcdf3(path, kind, 4, 1, "i1")  # a single record variable is not padded
        path.write_bytes(path.read_bytes()[:-1])
        dataset, (finding,) = open_found(path)
        assert dataset is None
        assert "cut" in finding.found

    def test_file_that_was_not_closed(self, tmp_path):
        path = tmp_path / "data.nc"
        write_netcdf3(path, "NETCDF3_CLASSIC", 4, 1, "f4")
        data = bytearray(path.read_bytes())
        data[4:8] = b"\xff" * 4  # STREAMING for the number of records
        path.write_bytes(data)
        dataset, (finding,) = open_found(path)
        assert dataset is None
        assert finding.severity == "error"


class TestNetcdf4:
    def test_cut_or_foreign_file_is_refused(self, tmp_path):
        path = tmp_path / "data.nc"
        build_dataset().to_netcdf(path)
        data = path.read_bytes()
        for content in (data[: len(data) // 2], b"", b"<html>not found</html>", b"CDF", b"CDF\7" + bytes(90)):
            path.write_bytes(content)
            dataset, (finding,) = open_found(path)
            assert dataset is None
            assert finding.severity == "error"
            assert finding.file == str(path)

    def test_damage_met_on_reading_names_file_and_variable(self, tmp_path):
        path = tmp_path / "damaged.nc"
        noise = np.random.default_rng(0).random((60, 50, 40), "f4")
        dataset = xr.Dataset({"pm25": (("time", "lat", "lon"), noise)})
        dataset.to_netcdf(path, encoding={"pm25": {"zlib": True, "chunksizes": (10, 50, 40)}})
        data = bytearray(path.read_bytes())
        for i in range(len(data) // 2, len(data) // 2 + 4000):
            data[i] ^= 0xA5
        path.write_bytes(data)
        opened, found = open_found(path)
        assert opened is not None
        assert not found
        with pytest.raises(DataError, match=r"damaged\.nc: variable 'pm25' cannot be read"):
            read_values(opened, "pm25", {})

    def test_variable_that_cannot_be_unpacked_is_left_out(self, tmp_path):
        path = tmp_path / "data.nc"
        dataset = build_dataset().assign(o3=("time", np.arange(TIMES, dtype="i2")))
        dataset.pm25.attrs["scale_factor"] = [1.0, 2.0]
        dataset.to_netcdf(path)
        opened, found = open_found(path)
        assert opened is not None
        assert "pm25" not in opened.variables
        assert [(f.severity, f.variable) for f in found] == [("error", "pm25")]
        np.testing.assert_array_equal(read_values(opened, "o3", {}), np.arange(TIMES))

    def test_text_for_a_scale_factor_is_refused(self, tmp_path):
        path = tmp_path / "data.nc"
        dataset = build_dataset()
        dataset.pm25.attrs["scale_factor"] = "a tenth"
        dataset.to_netcdf(path)
        opened = open_usable(path)
        with pytest.raises(DataError, match=r"data\.nc: variable 'pm25' cannot be read"):
            read_values(opened, "pm25", {})

    def test_file_of_groups_alone_is_refused(self, tmp_path):
        path = tmp_path / "data.nc"
        build_dataset().to_netcdf(path, group="PRODUCT")
        dataset, (finding,) = open_found(path)
        assert dataset is None
        assert "group" in finding.expected

    def test_limits_of_valid_values_stay_attributes(self, tmp_path):
        path = tmp_path / "data.nc"
        dataset = build_dataset()
        dataset.pm25.attrs["valid_max"] = np.float32(10)
        dataset.to_netcdf(path)
        opened = open_usable(path)
        assert opened.pm25.attrs["valid_max"] == 10
        np.testing.assert_array_equal(read_values(opened, "pm25", {}), PM25)


def test_selection_keeps_the_order_of_the_file(tmp_path):
    build_dataset().transpose("lon", "time", "lat").to_netcdf(tmp_path / "data.nc")
    values = read_values(open_usable(tmp_path / "data.nc"), "pm25", {"time": slice(1, 3), "lat": 2})
    np.testing.assert_array_equal(values, PM25[1:3, 2].T)


def write_zarr(path: Path, zarr_format: Literal[2, 3], fill_value: Any, values=PM25, **options: Any) -> Path:
    """A store whose pm25 is written by zarr itself, with its `options`."""
    dataset = build_dataset()
    dataset.drop_vars("pm25").to_zarr(path, zarr_format=zarr_format, consolidated=False)
    dims, attributes = ("time", "lat", "lon"), {"units": "ug m-3"}
    layout: dict[str, Any] = {"chunks": (2, ROWS, COLUMNS), "attributes": attributes, "dimension_names": dims}
    if zarr_format == 2:
        layout = {**layout, "attributes": {**attributes, "_ARRAY_DIMENSIONS": dims}, "dimension_names": None}
    group = zarr.open_group(path, mode="a", zarr_format=zarr_format)
    layout = {**layout, "fill_value": fill_value, **options}
    group.create_array("pm25", shape=values.shape, dtype=values.dtype, **layout)[...] = values
    return path


def chunk_file(path: Path, zarr_format: int) -> Path:
    """The file with the third and fourth hour."""
    return path / ("pm25/1.0.0" if zarr_format == 2 else "pm25/c/1/0/0")


class TestZarr:
    def test_stale_consolidated_metadata_do_not_count(self, tmp_path):
        path = tmp_path / "data.zarr"
        dataset = build_dataset()
        dataset.isel(time=slice(0, 4)).to_zarr(path, zarr_format=2, consolidated=True)
        dataset.isel(time=slice(4, None)).to_zarr(path, append_dim="time", consolidated=False, zarr_format=2)
        opened, found = open_found(path)
        assert opened is not None
        assert opened.sizes["time"] == TIMES
        assert {(f.severity, f.variable) for f in found} == {("note", "pm25"), ("note", "time")}
        assert all("(4," in f.found and f"({TIMES}," in f.found for f in found)

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_zeros_stay_zeros_where_the_fill_value_is_zero(self, tmp_path, zarr_format):
        path = write_zarr(tmp_path / "data.zarr", zarr_format, 0.0)
        np.testing.assert_array_equal(read(path), PM25)
        _, found = open_found(path)
        assert [(f.severity, f.variable) for f in found] == [("note", "pm25")] * (zarr_format == 2)

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_other_fill_value_marks_missing_values(self, tmp_path, zarr_format):
        path = tmp_path / "data.zarr"
        dataset = build_dataset()
        dataset["pm25"] = dataset.pm25.where(dataset.pm25 > 7)
        encoding = {"pm25": {"dtype": "i2", "scale_factor": 0.5, "add_offset": 3.0, "_FillValue": -32767}}
        dataset.to_zarr(path, zarr_format=zarr_format, encoding=encoding, consolidated=False)
        np.testing.assert_array_equal(read(path), np.where(PM25 > 7, PM25, np.nan))

    def test_zarr2_attribute_names_the_mark_of_missing_values(self, tmp_path):
        path = write_zarr(tmp_path / "data.zarr", 2, 0.0)
        zarr.open_array(path / "pm25").attrs["_FillValue"] = 7.0
        np.testing.assert_array_equal(read(path), np.where(PM25 == 7, np.nan, PM25))

    def test_byte_order_of_zarr3(self, tmp_path):
        path = write_zarr(tmp_path / "data.zarr", 3, 0.0, serializer=BytesCodec(endian="big"))
        np.testing.assert_array_equal(read(path), PM25)

    @pytest.mark.parametrize("type_", ["f4", "i4"])
    @pytest.mark.parametrize(
        ("zarr_format", "options"), [(2, {}), (3, {}), (3, {"shards": (2, ROWS, COLUMNS), "chunks": (1, 2, COLUMNS)})]
    )
    def test_chunk_that_is_not_there(self, tmp_path, zarr_format, options, type_):
        path = write_zarr(tmp_path / "data.zarr", zarr_format, 0, PM25.astype(type_) + 1, **options)
        chunk_file(path, zarr_format).unlink()
        _, found = open_found(path)
        (decision,) = [f for f in found if f.severity != "note"]
        assert (decision.severity, decision.variable) == ("decision", "pm25")
        assert decision.settle == "rules: {incomplete: missing} (or fill)"
        assert "1 of 3" in decision.found
        opened, found = open_found(path, "missing")
        assert opened is not None
        assert {f.severity for f in found} == {"note"}
        expected = PM25 + 1
        expected[2:4] = np.nan
        np.testing.assert_array_equal(read_values(opened, "pm25", {}), expected)
        for selection in (
            {"time": 3},
            {"time": slice(1, 5), "lon": 0},
            {"time": [0, 2, 5]},
            {"lat": slice(None, None, -1)},
        ):
            chosen = xr.DataArray(expected, dims=("time", "lat", "lon")).isel(selection)
            np.testing.assert_array_equal(read_values(opened, "pm25", selection), chosen)
        np.testing.assert_array_equal(opened.pm25.transpose("lon", "lat", "time").values, expected.T)

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_chunk_that_is_not_there_is_missing_by_a_fill_value_of_nan(self, tmp_path, zarr_format):
        path = write_zarr(tmp_path / "data.zarr", zarr_format, np.nan)
        chunk_file(path, zarr_format).unlink()
        opened, found = open_found(path)
        assert opened is not None
        assert [f.severity for f in found] == ["note"]
        assert np.isnan(read_values(opened, "pm25", {"time": [2, 3]})).all()

    @pytest.mark.parametrize("zarr_format", [2, 3])
    @pytest.mark.parametrize("hours", [1, TIMES])
    def test_hour_zero_is_a_time_though_zarr_does_not_write_it(self, tmp_path, zarr_format, hours):
        path = tmp_path / "data.zarr"
        dataset, encoding = build_dataset().isel(time=slice(0, hours)), {"time": {"chunks": (1,)}}
        dataset.to_zarr(path, zarr_format=zarr_format, encoding=encoding, consolidated=False)
        if zarr_format == 3:
            assert not (path / "time/c/0").exists()
        opened, found = open_found(path)
        assert opened is not None
        assert not [f for f in found if f.severity != "note"]
        np.testing.assert_array_equal(read_values(opened, "time", {}), np.arange(hours))

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_coordinate_with_a_missing_part_is_an_error(self, tmp_path, zarr_format):
        path = tmp_path / "data.zarr"
        encoding = {"time": {"chunks": (3,)}}
        build_dataset().to_zarr(path, zarr_format=zarr_format, encoding=encoding, consolidated=False)
        (path / ("time/1" if zarr_format == 2 else "time/c/1")).unlink()
        _, found = open_found(path, "missing")
        assert [f.variable for f in found if f.severity == "error"] == ["time"]

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_unknown_codec_names_the_array(self, tmp_path, zarr_format):
        path = write_zarr(tmp_path / "data.zarr", zarr_format, np.nan)
        metadata = path / "pm25" / (".zarray" if zarr_format == 2 else "zarr.json")
        codec = '"blosc"' if zarr_format == 2 else '"zstd"'  # the defaults
        text = metadata.read_text()
        assert codec in text
        metadata.write_text(text.replace(codec, '"nonesuch"'))
        opened, (finding,) = open_found(path)
        assert opened is None
        assert (finding.severity, finding.variable) == ("error", "pm25")
        assert "nonesuch" in finding.found

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_damaged_chunk_names_file_and_variable(self, tmp_path, zarr_format):
        path = write_zarr(tmp_path / "data.zarr", zarr_format, np.nan)
        chunk = chunk_file(path, zarr_format)
        chunk.write_bytes(bytes(chunk.stat().st_size))
        opened = open_usable(path)
        with pytest.raises(DataError, match=r"data\.zarr: variable 'pm25' cannot be read"):
            read_values(opened, "pm25", {})

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_cut_blosc_chunk_is_an_error(self, tmp_path, zarr_format):
        # the compressor of Zarr 2 by default: zarr returns what is in memory behind the chunk
        options: dict[str, Any] = {"compressors": BloscCodec()} if zarr_format == 3 else {}
        path = write_zarr(tmp_path / "data.zarr", zarr_format, np.nan, **options)
        np.testing.assert_array_equal(read(path), PM25)
        chunk = chunk_file(path, zarr_format)
        data = chunk.read_bytes()
        for length in (0, 10, 16, len(data) // 2, len(data) - 1):
            chunk.write_bytes(data[:length])
            dataset, found = open_found(path)
            assert dataset is not None
            assert "pm25" not in dataset.variables
            assert [(f.severity, f.variable) for f in found] == [("error", "pm25")]
            assert str(chunk.relative_to(path)) in found[0].found

    def test_folder_that_is_no_store(self, tmp_path):
        (tmp_path / "data.zarr").mkdir()
        opened, (finding,) = open_found(tmp_path / "data.zarr")
        assert opened is None
        assert finding.severity == "error"

    def test_array_that_is_gone_leaves_the_others(self, tmp_path):
        path = write_zarr(tmp_path / "data.zarr", 3, np.nan)
        shutil.rmtree(path / "lat")
        assert "lat" not in open_usable(path).variables
        np.testing.assert_array_equal(read(path), PM25)
