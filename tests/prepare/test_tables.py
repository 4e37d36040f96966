"""Tables: every layout gives the values that were written, or a finding that names the column and the text."""

import gzip
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from topoflow.tools.prepare.clock import read_times
from topoflow.tools.prepare.findings import Finding, Findings
from topoflow.tools.prepare.place import read_place
from topoflow.tools.prepare.recipe import Source, read_recipe
from topoflow.tools.prepare.tables import read_table, without_columns

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"

AQS = """"State Code","County Code","Site Num","Parameter Code","POC","Latitude","Longitude","Datum","Parameter Name",\
"Date Local","Time Local","Date GMT","Time GMT","Sample Measurement","Units of Measure"
"01","003","0010","44201",1,30.5,-87.9,"NAD83","Ozone","2023-03-01","01:00","2023-03-01","07:00",0.031,"ppm (v)"
"01","003","0010","44201",2,30.5,-87.9,"NAD83","Ozone","2023-03-01","01:00","2023-03-01","07:00",0.033,"ppm (v)"
"06","037","1103","44201",1,34.1,-118.2,"NAD83","Ozone","2023-03-01","00:00","2023-03-01","08:00",0.02,"ppm (v)"
"""
UCI = """"No","year","month","day","hour","PM2.5","TEMP","wd","WSPM","station"
1,2013,3,1,0,4,-0.7,"NNW",4.4,"Aotizhongxin"
2,2013,3,1,1,8,-1.1,"N",4.7,"Aotizhongxin"
3,2013,3,1,2,NA,-1.1,NA,5.6,"Aotizhongxin"
"""
RAMA_LONG = """Calidad del aire
Valores horarios

date,id_station,id_parameter,value,unit
31/01/2019 24:00,MER,PM2.5,12,15
31/01/2019 23:00,MER,PM2.5,,15
31/01/2019 23:00,PED,O3,7,1
"""


def read(
    path: Path, duplicates: Literal["refuse", "first", "last", "mean"] = "refuse", rows: int = 200_000, **options
) -> tuple[xr.Dataset | None, list[Finding]]:
    findings = Findings()
    return read_table(path, Source(path="x", **options), findings, duplicates, rows=rows), findings.sorted()


def table(path: Path, **options) -> xr.Dataset:
    dataset, found = read(path, **options)
    assert dataset is not None, found
    assert not [finding for finding in found if finding.severity != "note"]
    return dataset


def write(folder: Path, text: str, name: str = "table.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def value(dataset: xr.Dataset, name: str, time: str, station: str) -> float:
    return float(dataset[name].sel(time=time, station=station))


@pytest.mark.parametrize(("rule", "expected"), [("first", 0.031), ("last", 0.033), ("mean", 0.032)])
@pytest.mark.parametrize("rows", [1, 100])
def test_aqs_is_read_in_utc_with_several_instruments_by_rule(tmp_path, rule, expected, rows):
    dataset = table(write(tmp_path, AQS), duplicates=rule, rows=rows)
    assert list(dataset["station"].values) == ["01-003-0010", "06-037-1103"]
    assert dataset["time"].attrs["time_zone"] == "UTC"
    assert value(dataset, "44201", "2023-03-01T07", "01-003-0010") == pytest.approx(expected, abs=1e-12)
    assert value(dataset, "44201", "2023-03-01T08", "06-037-1103") == 0.02
    assert dataset["44201"].attrs["units"] == "ppm (v)"
    np.testing.assert_allclose(dataset["lon"], [-87.9, -118.2])


def test_several_values_of_an_hour_need_a_decision(tmp_path):
    _, found = read(write(tmp_path, AQS))
    (decision,) = [finding for finding in found if finding.severity == "decision"]
    assert "1 hours of a station" in decision.found
    assert "2023-03-01T07:00 at 01-003-0010" in decision.found
    assert "duplicates: first" in decision.settle


def test_uci_has_a_column_for_each_variable_and_wind_as_words(tmp_path):
    dataset = table(write(tmp_path, UCI))
    np.testing.assert_array_equal(dataset["wd"].values[:, 0], [337.5, 0, np.nan])
    np.testing.assert_array_equal(dataset["PM2.5"].values[:, 0], [4, 8, np.nan])
    assert dataset["wd"].attrs["units"] == "degree"
    assert set(dataset.data_vars) == {"PM2.5", "TEMP", "wd", "WSPM"}
    assert "time_zone" not in dataset["time"].attrs
    assert np.isnan(dataset["lat"].values).all()


def test_rama_long_has_lines_before_the_header_and_hour_24(tmp_path):
    dataset = table(write(tmp_path, RAMA_LONG))
    assert value(dataset, "PM2.5", "2019-02-01T00", "MER") == 12
    assert value(dataset, "O3", "2019-01-31T23", "PED") == 7
    assert np.isnan(value(dataset, "PM2.5", "2019-01-31T23", "MER"))


def test_rama_wide_takes_the_variable_from_the_file_name(tmp_path):
    listed = write(tmp_path, "cve_estac,latitud,longitud\nMER,19.42,-99.12\nPED,19.32,-99.2\n", "list.csv")
    path = write(tmp_path, "FECHA,HORA,MER,PED\n01/02/2019,1,5,\n01/02/2019,24,6,7\n", "2019PM25.csv")
    dataset = table(path, stations=str(listed))
    assert value(dataset, "PM25", "2019-02-01T01", "MER") == 5
    assert value(dataset, "PM25", "2019-02-02T00", "PED") == 7
    np.testing.assert_array_equal(dataset["lat"], [19.42, 19.32])


@pytest.mark.parametrize(("stamp", "hour"), [("start", "00"), ("end", "01")])
def test_eea_parquet_keeps_valid_values(tmp_path, stamp, hour):
    begin = pd.date_range("2023-01-01", periods=3, freq="h")
    rows = {"Samplingpoint": "DE/1", "Pollutant": 6001, "Start": begin, "End": begin + pd.Timedelta(hours=1)}
    rows |= {"Value": [10.0, 11.0, -999.0], "Unit": "ug.m-3", "Validity": [1, 3, -1]}
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    dataset = table(tmp_path / "a.parquet", stamp=stamp)
    np.testing.assert_array_equal(dataset["6001"].values[:, 0], [10, 11, np.nan])
    assert str(dataset["time"].values[0])[:13] == f"2023-01-01T{hour}"


def test_parquet_with_zones_is_converted_to_utc(tmp_path):
    stamps = pd.to_datetime(["2023-01-01 08:00"]).tz_localize("Asia/Shanghai")
    pd.DataFrame({"time": stamps, "station": 7, "pm25": [3.5]}).to_parquet(tmp_path / "a.parquet")
    dataset = table(tmp_path / "a.parquet")
    assert value(dataset, "pm25", "2023-01-01T00", "7") == 3.5
    assert dataset["time"].attrs["time_zone"] == "UTC"


def test_units_of_one_parameter_are_kept_apart(tmp_path):
    text = "station,parameter,value,unit,time\na,o3,0.03,ppm,2019-01-01 00:00\na,o3,60,ug/m3,2019-01-01 01:00\n"
    dataset = table(write(tmp_path, text))
    assert {name: dataset[name].attrs["units"] for name in dataset} == {"o3 [ppm]": "ppm", "o3 [ug/m3]": "ug/m3"}


def test_offsets_are_applied_and_must_be_everywhere(tmp_path):
    text = "station,time,o3\na,2019-01-01T01:00:00-04:00,1\na,2019-01-01 06:00+01:00,2\n"
    dataset = table(write(tmp_path, text), duplicates="mean")
    assert dict(dataset.sizes) == {"time": 1, "station": 1}
    assert value(dataset, "o3", "2019-01-01T05", "a") == 1.5
    _, found = read(write(tmp_path, text + "a,2019-01-01 09:00,3\n"))
    assert found[0].severity == "error"


@pytest.mark.parametrize("mark", ["", "NA", "NaN", "--", "-", "null"])
def test_marks_of_missing_values_are_no_text(tmp_path, mark):
    dataset = table(write(tmp_path, f"station,time,o3\na,2019-01-01 00:00,{mark}\na,2019-01-01 01:00,2\n"))
    np.testing.assert_array_equal(dataset["o3"].values[:, 0], [np.nan, 2])


def test_text_among_numbers_needs_a_decision(tmp_path):
    rows = "".join(f"a,2019-01-01 {hour:02}:00,{hour}\n" for hour in range(5))
    _, (finding, _) = read(write(tmp_path, f"station,time,o3\n{rows}a,2019-01-01 05:00,<2\n"))
    assert (finding.severity, finding.variable) == ("decision", "o3")
    assert "1 of 6 values are text (first: '<2')" in finding.found


def test_one_station_at_two_places_needs_a_decision(tmp_path):
    text = "station,time,lat,lon,o3\na,2019-01-01 00:00,30,110,1\na,2019-01-01 01:00,30.001,110,2\n"
    _, (finding, _) = read(write(tmp_path, text))
    assert finding.severity == "decision"
    assert "station 'a' is at two places" in finding.found


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_list_of_stations_in_chinese_encodings(tmp_path, encoding, end):
    lines = ["监测点编码,监测点名称,城市,经度,纬度", "1001A,万寿西宫,北京,116.366,39.8673", "1002A,定陵,北京,,", ""]
    listed = write(tmp_path, end.join(lines), "list.csv", encoding)
    path = write(tmp_path, "date,hour,type,1001A,1002A\n20190101,0,PM2.5,53,\n20190101,0,PM2.5_24h,44,36\n")
    dataset = table(path, stations=str(listed))
    np.testing.assert_array_equal(dataset["lat"], [39.8673, np.nan])
    np.testing.assert_array_equal(dataset["PM2.5"].values, [[53, np.nan]])
    np.testing.assert_array_equal(dataset["PM2.5_24h"].values, [[44, 36]])


def test_columns_are_those_that_the_recipe_names(tmp_path):
    path = write(tmp_path, "wann;wo;nord;ost;was\n2019-01-01 00:00;a;50;8;3\n")
    dataset = table(path, names={"time": "wann", "station": "wo", "lat": "nord", "lon": "ost"})
    assert value(dataset, "was", "2019-01-01T00", "a") == 3
    assert float(dataset["lon"][0]) == 8
    source = Source(path="x", names={"time": "wann", "station": "wo", "lat": "nord", "lon": "ost"})
    clock = read_times(dataset, without_columns(source), Findings(), path)
    place = read_place(dataset, without_columns(source), Findings(), path)
    assert clock is not None
    assert place is not None
    assert (place.ids, place.lat.tolist(), clock.times.tolist()[0].hour) == (("a",), [50], 0)
    _, (finding,) = read(path, names={"time": "when"})
    assert "'when'" in finding.found


def test_compressed_tables_are_read_as_plain_ones(tmp_path):
    plain = table(write(tmp_path, UCI))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(UCI.encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", UCI)
        archive.writestr("__MACOSX/._a.csv", "x")
    xr.testing.assert_identical(table(tmp_path / "a.csv.gz"), plain)
    xr.testing.assert_identical(table(tmp_path / "a.zip"), plain)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.zip", "a.parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"PAR1 PAR1", b"time,o3\n", b"\xff\xfe\x00"]
)
def test_no_damaged_file_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    dataset, (finding,) = read(tmp_path / name)
    assert dataset is None
    assert finding.severity == "error"


def test_cut_gzip_is_refused(tmp_path):
    whole = gzip.compress((UCI + "".join(f"{i},2014,1,1,{i},{i},1,N,2,b\n" for i in range(24))).encode())
    (tmp_path / "a.csv.gz").write_bytes(whole[:-20])
    dataset, (finding,) = read(tmp_path / "a.csv.gz")
    assert dataset is None
    assert "not readable" in finding.found


@pytest.mark.parametrize("text", [AQS, UCI, RAMA_LONG])
def test_damaged_text_is_read_or_refused_without_a_traceback(tmp_path, text):
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(text.encode())
        place = int(rng.integers(len(damaged)))
        damaged[place : place + int(rng.integers(30))] = rng.choice([b"", b",", b'"', b"\n", b"\x00", b"\xff99"])
        (tmp_path / "a.csv").write_bytes(damaged[: None if rng.random() < 0.7 else place])
        dataset, found = read(tmp_path / "a.csv", rows=2)
        assert dataset is not None or found[0].severity == "error"


def test_dates_that_can_be_read_two_ways_are_refused(tmp_path):
    _, (finding,) = read(write(tmp_path, "station,time,o3\na,01/02/2019 00:00,1\n"))
    assert "cannot be told apart" in finding.found


@pytest.mark.parametrize("day", ["20190101", "20190102", "20190103"])
def test_cnemc_days_equal_plain_pandas(shared_dir, day):
    path = shared_dir / "data/raw" / f"china_sites_{day}.csv.gz"
    dataset = table(path, stations=str(shared_dir / "data/raw/china_stations.csv"))
    frame = pd.read_csv(path)
    for name in ("PM2.5", "O3", "CO_24h"):
        rows = frame[frame["type"] == name].set_index("hour").drop(columns=["date", "type"])
        mine = dataset[name].to_pandas()
        mine.index = mine.index.hour
        expected = rows.reindex(index=mine.index, columns=mine.columns).astype(float)
        assert set(rows.columns) == set(mine.columns)
        assert expected.notna().to_numpy().any()
        np.testing.assert_array_equal(mine.to_numpy(), expected.to_numpy())


@pytest.mark.parametrize("location", ["1274950", "1612333", "3442588"])
def test_openaq_locations_equal_plain_pandas(shared_dir, location):
    path = shared_dir / "data/raw" / f"openaq_location_{location}.csv.gz"
    dataset = table(path)
    frame = pd.read_csv(path)
    for name, rows in frame.groupby("parameter"):
        times = pd.to_datetime(rows["datetimeUtc"]).dt.tz_localize(None)
        values = dataset[str(name)].sel(station=location).to_series().dropna()
        np.testing.assert_array_equal(values.loc[times].to_numpy(), rows["value"].to_numpy())
        assert len(values) == len(rows)
        assert dataset[str(name)].attrs["units"] == rows["unit"].iloc[0]


@pytest.mark.parametrize("name", ["cnemc", "openaq", "aqs", "uci_beijing"])
def test_recipes_are_read_and_say_where_the_data_are(name):
    path = RECIPES / f"{name}.yaml"
    recipe = read_recipe(path)
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("https://" in line for line in head)
    assert recipe.sources[0].kind == "stations"
