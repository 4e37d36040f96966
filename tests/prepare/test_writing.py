"""What `prepare` writes: whole or not at all, resumable at any instant, and appended without a change of the past."""

import errno
import json
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.support.interruptions import begin, interrupt, interrupt_everywhere, kill
from tests.support.prepared import write_prepared
from tests.support.small_data import HOURS, UNITS, change, contents, damage_of, data_of, flipped, read, run
from topoflow.cli import main
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.errors import ConfigError, DataError
from topoflow.tools.prepare.recipe import GridSpec
from topoflow.tools.prepare.work_folder import work_folder
from topoflow.tools.prepare.year_writer import YearWriter

# ---- interrupted


@pytest.mark.parametrize(("act", "points"), [(kill, 25), (interrupt, 60)])
@pytest.mark.parametrize("appended", [False, True])
def test_interrupted_anywhere_the_same_call_gives_the_same_bytes(fields, tmp_path, act, points, appended):
    whole = contents(write_prepared(fields, tmp_path / "whole"))
    output, before = tmp_path / "out", tmp_path / "before"
    if appended:  # an earlier year is there, with the first hours of the later one
        write_prepared(fields.isel(time=slice(0, 80)), before)
        shutil.copytree(before, output)
        write_prepared(fields, output)
        whole = contents(output)
        shutil.rmtree(output)
        shutil.copytree(before, output)
    steps = interrupt_everywhere(act, lambda: write_prepared(fields, output), output, points)
    for _ in steps:
        if appended:
            shutil.copytree(before, output)
        next(steps)
        assert contents(output) == whole
        assert not list(tmp_path.glob(".*"))
        shutil.rmtree(output)


def test_the_command_killed_while_it_reads_netcdf_gives_the_same_bytes(files, tmp_path):
    run(files, tmp_path / "whole")
    output = tmp_path / "out"
    steps = interrupt_everywhere(kill, lambda: run(files, output), output, 6)
    for _ in steps:
        next(steps)
        assert contents(output) == contents(tmp_path / "whole")
        shutil.rmtree(output)


def test_days_that_are_there_are_not_read_again(fields, tmp_path):
    write_prepared(fields, tmp_path / "whole")
    begin(lambda: write_prepared(fields, tmp_path / "out"), days=2)
    other = fields.copy(deep=True)
    other["u"][fields.time < np.datetime64("2018-12-31")] = -1  # which nothing but a read can find
    write_prepared(other, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


HARMS = {
    "a flipped bit": lambda array, journal: array.write_bytes(flipped(array.read_bytes(), 3000)),
    "a flipped bit in the header": lambda array, journal: array.write_bytes(flipped(array.read_bytes(), 20)),
    "a cut array": lambda array, journal: array.write_bytes(array.read_bytes()[:-100]),
    "an empty array": lambda array, journal: array.write_bytes(b""),
    "no array": lambda array, journal: array.unlink(),
    "a changed mean in the journal": lambda array, journal: journal.write_text(
        re.sub(r"(\"u\": \[\d+, -?\d+\.\d*)\d", r"\g<1>3", journal.read_text())
    ),
    "a cut journal": lambda array, journal: journal.write_text(journal.read_text()[:-100]),
    "a journal of other files": lambda array, journal: journal.write_text(
        "\n".join(['"other"', *journal.read_text().splitlines()[1:]])
    ),
    "a journal that is no text": lambda array, journal: journal.write_bytes(b"\xff\n" + journal.read_bytes()),
    "no journal": lambda array, journal: journal.unlink(),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_an_interrupted_run_left_is_not_trusted(fields, tmp_path, harm):
    write_prepared(fields, tmp_path / "whole")
    begin(lambda: write_prepared(fields, tmp_path / "out"))
    work = tmp_path / ".out.preparing"
    before = contents(work)
    HARMS[harm](work / "fields_2018.npy", work / "fields_2018.journal")
    assert contents(work) != before
    write_prepared(fields, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_that_changed_meanwhile_are_not_mixed(files, fields, tmp_path):
    begin(lambda: run(files, tmp_path / "out"))
    change(files, fields)
    run(files, tmp_path / "out")
    run(files, tmp_path / "whole")
    assert data_of(tmp_path / "out") == data_of(tmp_path / "whole")


def test_a_file_that_changes_while_it_is_read_is_refused(files, fields, tmp_path, monkeypatch):
    whole = YearWriter.write

    def write(self, *arguments):
        whole(self, *arguments)
        if len(self.days) == 2:
            change(files, fields)
            monkeypatch.undo()

    monkeypatch.setattr(YearWriter, "write", write)
    with pytest.raises(DataError, match="files of 2018 changed while they were read: run the command again"):
        run(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(files, tmp_path / "out")
    run(files, tmp_path / "whole")
    assert data_of(tmp_path / "out") == data_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes", [{"dtype": "float16"}, {"variables": ("co", "u")}, {"grid": GridSpec(shape=(2, 3))}]
)
def test_another_recipe_than_that_of_the_interrupted_run_starts_anew(files, tmp_path, changes):
    begin(lambda: run(files, tmp_path / "out"))
    run(files, tmp_path / "out", **changes)
    run(files, tmp_path / "whole", **changes)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_new_file_for_another_year_does_not_discard_what_was_written(files, fields, tmp_path):
    (files / "2019.nc").rename(tmp_path / "2019.nc")
    begin(lambda: run(files, tmp_path / "out"), days=2)
    (tmp_path / "2019.nc").rename(files / "2019.nc")
    state = (files / "2018.nc").stat()
    change(files, fields)
    os.utime(files / "2018.nc", ns=(state.st_atime_ns, state.st_mtime_ns))  # so only a read can find the change
    run(files, tmp_path / "out")
    found = read(tmp_path / "out", "u")
    np.testing.assert_array_equal(found[:19], fields.u.values[:19])  # the first day, which is not read again
    np.testing.assert_array_equal(found[50:60], fields.u.values[47:57] + 1)


def test_float16_constants_are_those_of_all_files_that_are_there_in_the_end(fields, tmp_path):
    wide = fields.copy(deep=True)
    wide["co"][fields["time.year"] == 2019] *= 8
    wide.isel(time=slice(0, 64)).to_netcdf(tmp_path / "2018.nc")
    begin(lambda: run(tmp_path / "*.nc", tmp_path / "out", dtype="float16"), days=2)
    wide.isel(time=slice(64, None)).to_netcdf(tmp_path / "2019.nc")
    for output in ("out", "whole"):
        run(tmp_path / "*.nc", tmp_path / output, dtype="float16")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def too_small(fields, folder):
    """Values that are 1e9 times too small for their unit, which needs a decision once all have been read."""
    fields = fields[["pm25"]].copy(deep=True)
    fields["pm25"] = (abs(fields.pm25) * 1e-9).assign_attrs(units="ug m-3")
    fields.to_netcdf(folder / "small.nc")
    return folder / "small.nc"


def test_data_that_were_refused_are_refused_again(fields, tmp_path):
    path = too_small(fields, tmp_path)
    for _ in range(2):
        assert main(["prepare", str(path), "-o", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()


def test_data_that_would_have_been_refused_are_refused_after_an_interruption(fields, tmp_path, monkeypatch, capsys):
    path = too_small(fields, tmp_path)
    monkeypatch.setattr("topoflow.tools.prepare.joined._BLOCK_BYTES", 1)  # a day at a time
    begin(lambda: run(path, tmp_path / "out"), days=4)  # all, but for the end
    assert main(["prepare", str(path), "-o", str(tmp_path / "out")]) == 2
    least = float(abs(fields.pm25).min()) * 1e-9
    assert f"{least:.4g} to " in capsys.readouterr().out  # also that of the days that were not read again


def test_two_at_once_are_refused(fields, tmp_path):
    with work_folder(tmp_path / "out"), pytest.raises(ConfigError, match="another process is preparing it"):
        write_prepared(fields, tmp_path / "out")
    (tmp_path / ".out.preparing").mkdir()
    (tmp_path / ".out.preparing/lock").touch()  # of a process that is dead
    write_prepared(fields, tmp_path / "out")


def test_the_lock_of_a_folder_that_has_been_finished_does_not_count(tmp_path, monkeypatch):
    import fcntl

    whole, work = fcntl.flock, tmp_path / ".out.preparing"

    def flock(*arguments):
        monkeypatch.undo()
        work.rename(tmp_path / "out")  # another process ends between this one's open and lock
        whole(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with work_folder(tmp_path / "out"):
        assert (work / "lock").exists()
        with pytest.raises(ConfigError, match="is locked"), work_folder(tmp_path / "out"):
            pass


def test_the_folder_of_the_next_process_is_left_to_it(tmp_path):
    work = tmp_path / ".out.preparing"
    with ExitStack() as after:
        with work_folder(tmp_path / "out"):
            work.rename(tmp_path / "out")  # it is complete
            after.enter_context(work_folder(tmp_path / "out"))
        assert (work / "lock").exists()
    assert not work.exists()


# ---- where it is written


def test_what_is_there_already_is_not_touched(fields, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match=f"{name}: is not prepared data"):
            write_prepared(fields, tmp_path / name)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    write_prepared(fields.isel(time=slice(0, 50)), tmp_path / "out")
    for name in ("fields_of_mine.txt", "days_off.json", "fields_2018_copy.npy"):
        (tmp_path / "out" / name).write_text("mine")
    write_prepared(fields, tmp_path / "out")
    assert sum(content == b"mine" for content in contents(tmp_path / "out").values()) == 3


def test_a_link_to_a_folder_stands_for_the_folder(fields, tmp_path):
    (tmp_path / "large/disk").mkdir(parents=True)
    (tmp_path / "out").symlink_to("large/disk")
    for hours in (50, 100):
        write_prepared(fields.isel(time=slice(0, hours)), tmp_path / "out")
        assert damage_of(tmp_path / "large/disk") == []
    assert (tmp_path / "out").is_symlink()


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(fields, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"/proc: cannot be written"):  # even by root
        write_prepared(fields, Path("/proc/out"))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(ConfigError, match="out: is where a file system is mounted"):
        write_prepared(fields, tmp_path / "out")


@pytest.mark.parametrize("step", ["year_writer.YearWriter.write", "statics.flush", "report.write_atomically"])
def test_a_full_disk_is_reported_in_one_line_and_the_same_command_resumes(files, tmp_path, monkeypatch, capsys, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["prepare", str(files), "-o", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(f"topoflow.tools.prepare.{step}", full)
        assert main(command) == 2
    assert capsys.readouterr().err == f"topoflow: {tmp_path}/out: cannot be written: No space left on device\n"
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    assert damage_of(tmp_path / "out") == []


# ---- precision


def test_float16_reports_its_error(files, fields, tmp_path):
    run(files, tmp_path / "half", dtype="float16")
    data = PreparedData(index_prepared(str(tmp_path / "half")))
    assert len(data.times) == HOURS  # those of the gap are there, without values
    there = np.isin(data.times, fields.time.values)
    report = json.loads((tmp_path / "half/report.json").read_text())["variables"]
    for name in UNITS:
        values = fields[name].values.astype(np.float64)
        found = data.read(name, np.flatnonzero(there))
        np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
        assert np.isnan(data.read(name, np.flatnonzero(~there))).all()
        difference = (found - values)[~np.isnan(values)]
        assert report[name]["error_max"] == np.abs(difference).max() > 0
        assert report[name]["error_rms"] == pytest.approx(np.sqrt(np.square(difference).mean()), rel=1e-9)
        assert report[name]["error_rms"] < 5e-4 * report[name]["std"]
    assert "error of float16" in (tmp_path / "half/report.txt").read_text()


def test_float16_refuses_what_it_cannot_hold(fields, tmp_path):
    far = fields.copy(deep=True)
    far["co"][99, 1, 1] = 1e9
    with pytest.raises(ConfigError, match=r"float16: variable 'co' has values up to 1e\+09 ug m-3.*dtype: float32"):
        write_prepared(far, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    write_prepared(far, tmp_path / "out", dtype="float32")
    assert read(tmp_path / "out", "co")[99, 1, 1] == np.float32(1e9)


# ---- verified


@pytest.mark.parametrize("name", ["fields_2018.npy", "fields_2019.npy", "days_2018.json", "static.npz"])
def test_verify_names_a_damaged_or_missing_file(fields, tmp_path, name):
    path = write_prepared(fields, tmp_path / "out") / name
    data = path.read_bytes()
    for at in np.linspace(0, len(data) - 1, 40).astype(int).tolist() + list(range(60)):
        path.write_bytes(flipped(data, at))
        assert [name in line for line in damage_of(tmp_path / "out")] == [True], at
    for cut in (data[:-1], b"", data + b"\n"):
        path.write_bytes(cut)
        assert all(name in line for line in damage_of(tmp_path / "out"))
        assert damage_of(tmp_path / "out")
    path.unlink()
    assert [f"{name}: cannot be read: No such file" in line for line in damage_of(tmp_path / "out")] == [True]


def test_verify_names_the_variable_and_the_day(fields, tmp_path, capsys):
    array = write_prepared(fields, tmp_path / "out") / "fields_2018.npy"
    values = np.load(array)
    values[30, 3, 1, 1] += 1  # hour 30 of the files is in 2018-12-30
    np.save(array, values)
    assert main(["prepare", "--verify", str(tmp_path / "out")]) == 2
    assert "fields_2018.npy: co of 2018-12-30 do not match their hash" in capsys.readouterr().out
