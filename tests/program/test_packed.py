"""Runs on packed data equal runs on the original data."""

import subprocess
import sys
from pathlib import Path

import pytest

from topoflow.tools.prepare.packing import PackOptions, pack

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "data"
    pack(str(world), path, PackOptions(), progress=False)
    return path


@pytest.mark.parametrize("order", ["packed first", "packed last"])
def test_a_run_resumes_bit_identically_on_either(program, world, packed, assert_same_run, order):
    first, last = (packed, world) if order == "packed first" else (world, packed)
    done = program.train(f"data.path={first}", "data.in_memory=false", "train.max_steps=9")
    assert done.returncode == 0, done.stderr
    resumed = program.train(f"data.path={last}", "data.in_memory=false", f"data.cache={program.folder / 'other'}")
    assert resumed.returncode == 0, resumed.stderr
    assert "next 32 samples match the certificate" in resumed.stderr
    # the shorter run also validated at its end, which `progress` counts
    assert_same_run(1, parts=("model", "optimizer", "scheduler"))


def test_a_run_on_packed_data_imports_no_reader_of_files(program, packed):
    arguments = program.command(f"data.path={packed}", "data.threads=1", "train.max_steps=2")[2:]
    code = (
        f"import sys, train; status = train.main({arguments!r});"
        "print(status, sorted({'xarray', 'pandas', 'zarr', 'netCDF4'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=program.environment()
    )
    assert done.stdout == "0 []\n", done.stderr
