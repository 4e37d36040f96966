"""Tables with dates, numbers and rows as programs and countries write them."""

import numpy as np
import pytest

from tests.support.prepare_worlds import prepare_recipe

PLACES = "station,latitude,longitude\nA,30.5,110.5\nB,31.5,111.5\nC,32.5,112.5\n"
VALUES = {"A": 10.5, "B": 20.5, "C": 30.5}


def table(header="time,station,pm25", stamp="2019-01-13 {h:02}:00", number=str, hours=range(1, 6)):
    lines = [f"{stamp.format(h=h)},{name},{number(value + h)}" for h in hours for name, value in VALUES.items()]
    return "\n".join([header, *lines]) + "\n"


def prepare_table(folder, text, name="data.csv", **source):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(data)
    (folder / "places.csv").write_text(PLACES)
    source = {"path": name, "stations": "places.csv", "units": {"pm25": "ug m-3"}, **source}
    return prepare_recipe(folder, {"sources": [source]})


def require_values(data, first="2019-01-13T01"):
    assert str(data.times[0]) == first
    expected = [[VALUES["C"] + h, VALUES["B"] + h, VALUES["A"] + h] for h in range(1, 6)]
    found = data.read("pm25", slice(None))
    assert found[np.isfinite(found)].reshape(-1, 3).tolist() == expected


@pytest.mark.parametrize(
    "stamp", ["1/13/2019 {h}:00:00 AM", "13.01.2019 {h}:00 a.m.", "20190113{h:02}", "20190113{h:02}00"]
)
def test_dates_of_spreadsheets_and_models_are_understood(tmp_path, stamp):
    _, data = prepare_table(tmp_path, table(stamp=stamp))
    require_values(data)


def test_afternoons_and_midnight(tmp_path):
    text = table(stamp="1/13/2019 {h}:00 PM") + table(stamp="1/13/2019 12:00 AM", hours=[0]).split("\n", 1)[1]
    text += table(stamp="1/13/2019 12:00 PM", hours=[0]).split("\n", 1)[1]
    _, data = prepare_table(tmp_path, text)
    hours = data.times[np.isfinite(data.read("pm25", slice(None))).any(axis=(1, 2))]
    assert [str(hour)[-2:] for hour in hours] == ["00", "12", "13", "14", "15", "16", "17"]


@pytest.mark.parametrize(("order", "first"), [("day first", "2019-01-05T01"), ("month first", "2019-05-01T01")])
def test_the_recipe_tells_day_from_month(tmp_path, order, first):
    text = table(stamp="05/01/2019 {h:02}:00")
    done, _ = prepare_table(tmp_path, text)
    assert any("05/01/2019" in line and "dates: day first" in line for line in done.lines)
    _, data = prepare_table(tmp_path, text, dates=order)
    require_values(data, first)


def test_an_unquoted_comma_does_not_cut_a_number(tmp_path):
    done, data = prepare_table(tmp_path, table().replace("B,23.5", "B,1,023.5"))
    assert data is None
    assert any("line 9 has more fields" in line for line in done.lines)


def test_rows_that_end_in_a_comma_are_read(tmp_path):
    header, rows = table().split("\n", 1)
    _, data = prepare_table(tmp_path, f"{header}\n" + rows.replace("\n", ",\n"))
    require_values(data)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_decimal_commas_are_read_where_another_sign_separates(tmp_path, mark):
    text = table().replace(",", mark).replace(".5", ",5")
    _, data = prepare_table(tmp_path, text)
    require_values(data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_byte_order_marks_are_understood(tmp_path, encoding):
    _, data = prepare_table(tmp_path, table().encode(encoding))
    require_values(data)


def test_a_pollutant_that_is_mostly_text_is_not_left_out(tmp_path):
    done, data = prepare_table(tmp_path, table(number=lambda value: f'"{value:.0f},000"'))
    assert data is None
    assert any(line.startswith("decision") and "pm25" in line and "text" in line for line in done.lines)


def test_stations_without_a_name_are_known_by_their_place(tmp_path):
    places = {"A": "30.5,110.5", "B": "31.5,111.5", "C": "32.5,112.5"}
    text = table("time,latitude,longitude,pm25")
    for name, place in places.items():
        text = text.replace(f",{name},", f",{place},")
    (tmp_path / "data.csv").write_text(text)
    source = {"path": "data.csv", "units": {"pm25": "ug m-3"}}
    _, data = prepare_recipe(tmp_path, {"sources": [source]})
    require_values(data)


def test_stamps_without_a_zone_are_noted(tmp_path):
    done, _ = prepare_table(tmp_path, table())
    assert any("no time zone" in line and "time_zone: UTC+8" in line for line in done.lines)
    for k, (text, source) in enumerate(((table(), {"time_zone": "UTC+8"}), (table(stamp="2019-01-13T{h:02}:00Z"), {}))):
        folder = tmp_path / str(k)
        folder.mkdir()
        done, _ = prepare_table(folder, text, **source)
        assert not any("no time zone" in line for line in done.lines)


@pytest.mark.parametrize("header", ["datetimebegin,station,pm25", "Start,station,pm25"])
def test_stamps_that_are_called_the_start_need_a_decision(tmp_path, header):
    done, _ = prepare_table(tmp_path, table(header))
    assert any("recipe: stamp: start" in line for line in done.lines)
    _, data = prepare_table(tmp_path, table(header), stamp="start")
    require_values(data, "2019-01-13T02")
    folder = tmp_path / "other"
    folder.mkdir()
    _, data = prepare_table(folder, table(header), stamp="end")
    require_values(data)


def test_means_over_days_are_left_out_of_hourly_ones(tmp_path):
    header = "Samplingpoint,Pollutant,Start,End,Value,Unit,AggType,Validity"
    rows = [
        f"{name},6001,2019-01-13 {h - 1:02}:00:00,2019-01-13 {h:02}:00:00,{value + h},ug.m-3,hour,1"
        for h in range(1, 6)
        for name, value in VALUES.items()
    ]
    daily = [f"{name},6001,2019-01-13 00:00:00,2019-01-14 00:00:00,77,ug.m-3,day,1" for name in VALUES]
    done, data = prepare_table(tmp_path, "\n".join([header, *rows, *daily]) + "\n")
    require_values(data)
    assert any("3 rows are means over more than an hour" in line for line in done.lines)
    folder = tmp_path / "daily"
    folder.mkdir()
    done, _ = prepare_table(folder, "\n".join([header, *daily]) + "\n")
    assert any("no hourly means" in line for line in done.lines)
