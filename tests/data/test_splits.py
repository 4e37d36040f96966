"""Compare the hours of a split, and the starts of forecasts, with plain loops over dates."""

import datetime

import numpy as np
import pytest

from topoflow.data.splits import check_disjoint, split_starts, split_times
from topoflow.errors import ConfigError, DataError


def hours(start, end):
    """Return datetime64[h] from start to end, both included."""
    return np.arange(np.datetime64(start, "h"), np.datetime64(end, "h") + 1)


def expected_starts(times, first, last, window):
    """Return the hours of [first, last] whose next `window` hours are all in the data and in the range."""
    present = {time.item() for time in times}
    first, last, hour = np.datetime64(first, "h").item(), np.datetime64(last, "h").item(), datetime.timedelta(hours=1)
    return [
        position
        for position, time in enumerate(times.tolist())
        if first <= time
        and time + window * hour <= last
        and all(time + step * hour in present for step in range(window + 1))
    ]


@pytest.mark.parametrize(
    ("given", "first", "last"),
    [
        (2019, "2019-01-01T00", "2019-12-31T23"),
        (("2019-03-01", "2019-03-02"), "2019-03-01T00", "2019-03-02T23"),
        (("2019-03-01T05", "2019-03-01T05"), "2019-03-01T05", "2019-03-01T05"),
        (("2019-03-01 05:00", "2019-03-02T07:00:00"), "2019-03-01T05", "2019-03-02T07"),
    ],
)
def test_both_ends_are_included(given, first, last):
    times = hours("2018-12-30", "2020-01-05")
    chosen = split_times(times, [given])
    assert chosen.dtype == np.int64
    np.testing.assert_array_equal(times[chosen], hours(first, last))


def test_starts_leave_room_for_the_longest_lead():
    times = hours("2019-01-01T00", "2019-01-10T23")
    index = split_starts(times, [("2019-01-02", "2019-01-04")], (0, 24))
    np.testing.assert_array_equal(times[index.starts], hours("2019-01-02T00", "2019-01-03T23"))
    assert index.dropped_for_gaps == 0


def test_a_window_of_exactly_the_range_is_used_once():
    times = hours("2019-01-01T00", "2019-01-10T23")
    assert split_starts(times, [("2019-01-02T00", "2019-01-03T00")], (0, 24)).starts.tolist() == [24]
    with pytest.raises(
        DataError, match=r"data.test: no window from \+0 h to \+24 h fits into \[2019-01-02T00, 2019-01-02T23\]"
    ):
        split_starts(times, [("2019-01-02T00", "2019-01-02T23")], (0, 24), key="data.test")


def test_no_window_crosses_an_end_or_a_gap():
    times = np.delete(hours("2018-11-01T00", "2019-02-20T23"), [100, 101, 700, 1200])
    ranges = [("2018-11-02", "2018-11-20"), ("2018-11-21", "2018-12-10T05"), 2019]
    index = split_starts(times, ranges, (0, 30))
    ends = [("2018-11-02", "2018-11-20T23"), ranges[1], ("2019-01-01", "2019-12-31T23")]
    expected = [start for first, last in ends for start in expected_starts(times, first, last, 30)]
    assert index.starts.tolist() == expected
    fitting = [
        *hours("2018-11-02T00", "2018-11-19T17"),
        *hours("2018-11-21T00", "2018-12-08T23"),
        *hours("2019-01-01T00", "2019-12-30T17"),
    ]
    assert index.dropped_for_gaps == len(set(fitting) & set(times)) - len(index.starts) > 0


def test_a_window_may_begin_before_the_start():
    times = np.delete(hours("2019-01-01T00", "2019-01-10T23"), [100])
    index = split_starts(times, [("2019-01-02", "2019-01-08")], (-6, 12))
    first, last = hours("2019-01-02T06", "2019-01-02T06"), hours("2019-01-08T11", "2019-01-08T11")
    missing = np.datetime64("2019-01-05T04")
    whole = hours(first[0], last[0])
    kept = (whole + np.timedelta64(12, "h") < missing) | (whole - np.timedelta64(6, "h") > missing)
    np.testing.assert_array_equal(times[index.starts], whole[kept])
    assert index.dropped_for_gaps == np.sum(~kept) - 1  # the missing hour itself is no candidate


def test_three_hourly_data_have_windows_of_as_many_hours():
    times = np.delete(hours("2019-01-01T00", "2019-01-10T23")[::3], [30])
    index = split_starts(times, [("2019-01-02", "2019-01-08")], (-6, 24), step_hours=3)
    missing, three = np.datetime64("2019-01-04T18"), np.timedelta64(3, "h")
    whole = np.arange(np.datetime64("2019-01-02T06"), np.datetime64("2019-01-08T00"), three)
    kept = (whole + 8 * three < missing) | (whole - 2 * three > missing)
    np.testing.assert_array_equal(times[index.starts], whole[kept])


def test_a_day_of_three_hourly_data_ends_at_21_h():
    times = hours("2019-01-01T00", "2019-01-10T21")[::3]
    ranges = [("2019-01-09", "2019-01-10")]
    assert len(split_times(times, ranges, 3)) == 16
    assert len(split_starts(times, ranges, (0, 6), 3).starts) == 14
    with pytest.raises(DataError, match="not in the data"):
        split_times(times, ranges, 1)
    with pytest.raises(DataError, match="not in the data"):
        split_times(times[:-1], ranges, 3)


def test_test_split_of_the_real_run_has_888_starts():
    times = hours("2019-01-01T00", "2019-12-31T23")
    times = times[times.astype("datetime64[D]") != np.datetime64("2019-04-08")]
    even = [("2019-02-21", "2019-02-28"), ("2019-04-21", "2019-04-30"), ("2019-06-21", "2019-06-30")]
    even += [("2019-08-21", "2019-08-31"), ("2019-10-21", "2019-10-31"), ("2019-12-21", "2019-12-31")]
    index = split_starts(times, even, (0, 96))
    assert (len(index.starts), index.dropped_for_gaps) == (888, 0)
    april = split_starts(times, [("2019-04-01", "2019-04-20")], (0, 96))
    # 7 and 12 complete days on the two sides of the gap; hours up to 04-16T23 would fit without the gap
    assert (len(april.starts), april.dropped_for_gaps) == (7 * 24 - 96 + 12 * 24 - 96, 96)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (2017, "2017"),
        (("2019-01-01", "2019-03-01"), r"\[2019-01-01, 2019-03-01\]"),
        (("2018-12-01", "2019-01-05"), r"\[2018-12-01, 2019-01-05\]"),
        (("2020-01-01", "2020-01-05"), r"\[2020-01-01, 2020-01-05\]"),
        (("2019-01-20", "2019-01-21"), r"\[2019-01-20, 2019-01-21\]"),
    ],
)
@pytest.mark.parametrize("find", [split_times, lambda times, ranges, key: split_starts(times, ranges, (0, 1), key=key)])
def test_ranges_that_the_data_do_not_reach(given, message, find):
    times = np.concatenate([hours("2019-01-01T00", "2019-01-19T23"), hours("2019-01-22T00", "2019-02-10T23")])
    with pytest.raises(DataError, match=f"data.train: {message} .*cover 2019-01-01T00 to 2019-02-10T23"):
        find(times, [given], key="data.train")


def test_a_year_may_be_covered_in_part():
    times = hours("2019-03-01T00", "2019-03-02T23")
    assert len(split_times(times, [2019])) == 48
    index = split_starts(times, [2019], (0, 24))
    assert (len(index.starts), index.dropped_for_gaps) == (24, 24)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("2019-01-01", "soon"), "'soon' is not a time"),
        (("2019-13-01", "2019-12-01"), "'2019-13-01' is not a time"),
        (("2019-01-01T25", "2019-12-01"), "'2019-01-01T25' is not a time"),
        (("2019-01-01T05:30", "2019-12-01"), "'2019-01-01T05:30' is not a time"),
        (("2019", "2020"), "'2019' is not a time"),
        (("2019-02-01", "2019-01-01"), r"\[2019-02-01, 2019-01-01\] ends before it starts"),
        (0, "0 is not a year"),
        (("2019-01-01",), "expected a year or a"),
        ("2019-01-01", "expected a year or a"),
    ],
)
def test_ranges_that_cannot_be_read(given, message):
    with pytest.raises(ConfigError, match=f"data.validation: .*{message}"):
        split_times(hours("2019-01-01", "2019-12-31"), [given], key="data.validation")


def test_splits_that_share_an_hour_are_both_named():
    with pytest.raises(ConfigError, match=r"data.train: 2019 overlaps data.test: \[2019-12-31T23, 2020-01-05\]"):
        check_disjoint(train=[2018, 2019], validation=[2016], test=[("2019-12-31T23", "2020-01-05")])
    with pytest.raises(ConfigError, match=r"data.train: .* overlaps data.train: "):
        split_starts(hours("2019-01-01", "2019-12-31"), [2019, ("2019-05-01", "2019-05-02")], (0, 1), key="data.train")
    check_disjoint(train=[2018, 2019], validation=[2016], test=[("2020-01-01", "2020-01-05")])
