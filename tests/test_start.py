"""What a start imports, and what it therefore costs: promises that one import too many would break."""

import pytest

from benchmarks.start import QUICK, measure_imports, measure_starts, print_imports, print_starts

NOT_AT_THE_START = {
    "PIL", "google", "matplotlib", "netCDF4", "numcodecs", "pandas", "sympy", "tensorboard", "xarray", "zarr",
}  # fmt: skip
NOT_BEFORE_THE_FIRST_STEP = {"PIL", "matplotlib", "netCDF4"}
NOT_BY_IMPORTING = {"torch._dynamo", "torch._inductor", "torch.utils.tensorboard"}


@pytest.fixture(scope="module")
def imports():
    """What processes say that import torch or the program, in turn."""
    return measure_imports(rounds=5)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """What a run says of its first step, on data that no run has read before, and again."""
    return measure_starts(tmp_path_factory.mktemp("start"), QUICK, rounds=1)


def packages(modules):
    return {module.split(".")[0] for module in modules}


def test_the_program_imports_little_beyond_torch(imports):
    torch, train = (set(imports[module][0]["modules"]) for module in ("torch", "train"))
    beyond = train - torch
    assert "topoflow.trainer" in beyond
    assert packages(beyond) & NOT_AT_THE_START == set()
    assert beyond & NOT_BY_IMPORTING == set()
    assert len(beyond) <= 150


def test_importing_the_program_takes_at_most_a_quarter_more_than_importing_torch(imports):
    # what else the machine does only adds, and less to CPU seconds than to those of the clock
    torch, train = (min(process["cpu"] for process in imports[module]) for module in ("torch", "train"))
    assert train <= 1.25 * torch


@pytest.mark.parametrize("kind", ["cold", "warm"])
def test_one_process_makes_its_first_step_without_plots(starts, kind):
    (run,) = starts[kind]
    assert "topoflow.logs" in run["modules"]
    assert packages(run["modules"]) & NOT_BEFORE_THE_FIRST_STEP == set()


def test_a_run_tells_its_phases_and_the_benchmark_prints_them(imports, starts, capsys):
    (run,) = starts["cold"]
    assert {"imports", "data", "model", "loading data", "forward and backward"} <= set(run["phases"])
    assert 0 < run["phases"]["imports"] < sum(run["phases"].values())
    print_imports(imports)
    print_starts(starts)
    said = capsys.readouterr().out
    for row in ("`import torch`", "`import train`", "ratio within pairs", "imports", "**start to first step**"):
        assert f"| {row} " in said
