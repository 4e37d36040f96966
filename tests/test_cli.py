import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.support.prepared import prepare_world
from topoflow import cli
from topoflow.data.prepared.reader import PreparedData, index_prepared
from topoflow.tools.demo.world import make_demo_data

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stations(tmp_path):
    """A file with two stations in one cell and one in another, PM2.5 for two hours."""
    path = tmp_path / "stations.nc"
    xr.Dataset(
        {"pm25": (("time", "station"), np.array([[10.0, 20.0, 7.0], [30.0, np.nan, 8.0]]), {"units": "ug m-3"})},
        coords={
            "time": np.datetime64("2019-01-01", "ns") + np.arange(2) * np.timedelta64(1, "h"),
            "station": ["a", "b", "c"],
            "lat": ("station", [20.2, 20.7, 21.5], {"units": "degrees_north"}),
            "lon": ("station", [100.1, 100.9, 101.5], {"units": "degrees_east"}),
        },
    ).to_netcdf(path)
    return path


def test_prepare_writes_cell_means_of_stations(tmp_path, stations, capsys):
    (tmp_path / "recipe.yaml").write_text(
        "sources: [{path: stations.nc}]\ngrid: {degrees: 1, box: [20, 22, 100, 102]}\n"
    )
    assert cli.main(["prepare", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]) == 0
    data = PreparedData(index_prepared(str(tmp_path / "out")))
    assert data.grid.lat2d[:, 0].tolist() == [21.5, 20.5]
    np.testing.assert_allclose(
        data.read("pm25", slice(None)), [[[np.nan, 7], [15, np.nan]], [[np.nan, 8], [30, np.nan]]]
    )
    assert "2 x 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["demo-data", "STATIONS"], "stations.nc"),
        (["demo-data", "/proc/demo/world"], "/proc/demo: cannot be written: "),
        (["demo-data", "OUT", "--days", "0"], "--days 0"),
        (["evaluate", "nowhere"], "nowhere"),
        (["prepare", "nowhere.yaml", "-o", "OUT"], "nowhere.yaml"),
        (["prepare", "STATIONS", "-o", "/proc/world"], "/proc: cannot be written: "),
        (["prepare", "STATIONS", "-o", "STATIONS"], "stations.nc: is not prepared data"),
        (["prepare", "--verify", "OUT"], "manifest.json: cannot be read: No such file"),
    ],
)
def test_unusable_arguments_give_one_line_and_status_2(tmp_path, stations, capsys, arguments, word):
    named = {"STATIONS": str(stations), "OUT": str(tmp_path / "out")}
    assert cli.main([named.get(argument, argument) for argument in arguments]) == 2
    printed = capsys.readouterr().err
    assert word in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_verify_names_damage(tmp_path, capsys):
    out = prepare_world(tmp_path / "world", days=2)
    assert cli.main(["prepare", "--verify", str(out)]) == 0
    assert "3 files match the manifest" in capsys.readouterr().out
    with open(out / "fields_2018.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"x")
    assert cli.main(["prepare", "--verify", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == f"{out / 'fields_2018.npy'}: temp of 2018-10-01 do not match their hash\n"
    assert printed.err.startswith(f"topoflow: {out}: damaged in 1 place(s)")
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("command", [["demo-data"], ["prepare", "STATIONS", "-o"]])
def test_an_output_that_cannot_be_created_is_one_line_and_status_2(tmp_path, stations, capsys, command):
    output = stations / "out"
    assert cli.main([*(str(stations) if word == "STATIONS" else word for word in command), str(output)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"topoflow: {output.parent}: cannot be written: File exists: expected a writable folder"
    )


INTERRUPT_AT_IMPORT = """
import os, signal, sys

interrupted = sys.argv[1]
sys.argv[1:] = ["inspect", "nowhere"]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from topoflow.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["numpy", "torch.nn"])
def test_ctrl_c_while_importing_is_one_line(module):
    done = subprocess.run([sys.executable, "-c", INTERRUPT_AT_IMPORT, module], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "topoflow: interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prepare"],
        ["prepare", "in"],
        ["prepare", "-o", "out"],
        ["prepare", "in", "--verify", "out"],
        ["demo-data", "x", "--grid", "24"],
    ],
)
def test_bad_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_default_demo_world_is_that_of_the_demo_config(monkeypatch, capsys):
    made = []
    monkeypatch.setattr("topoflow.tools.demo.world.make_demo_data", lambda *args, **more: made.append(args))
    assert cli.main(["demo-data", "world"]) == 0
    defaults = {name: p.default for name, p in inspect.signature(make_demo_data).parameters.items()}
    assert made == [(Path("world"), defaults["days"], defaults["grid"], defaults["seed"])]
    capsys.readouterr()
