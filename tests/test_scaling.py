"""The benchmark of what grows with the number of ranks: it runs, and its fit finds what grows."""

import math

import pytest

from benchmarks.phases import PHASES, STEP, WHOLE
from benchmarks.scaling import fit_growth, measure, print_tables
from benchmarks.scaling_model import FLOPS_PER_SAMPLE, MACHINES, SIZES, predict, print_model

SIZES_MEASURED = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    "factors", [(3.0, 0.0, 0.0), (2.0, 0.5, 0.0), (1.0, 0.0, 4.0), (1.0, 0.25, 4.0), (0.0, 7.0, 0.0)]
)
def test_the_fit_finds_the_terms_that_made_the_values(factors):
    a, b, c = factors
    values = [a + b * n + c * math.log2(n) for n in SIZES_MEASURED]
    assert fit_growth(SIZES_MEASURED, values) == pytest.approx(factors, abs=1e-9)


def test_the_fit_takes_nothing_that_falls_for_growth():
    assert fit_growth(SIZES_MEASURED, [9.0, 5.0, 3.0, 2.0, 1.5, 1.2])[1:] == (0, 0)


def test_the_benchmark_measures_each_phase_on_one_and_two_ranks(tmp_path, capsys):
    measured = measure(tmp_path, [1, 2], steps=4, repeats=1)
    for size, (phases,) in measured.items():
        assert {*PHASES.values(), STEP, WHOLE} <= set(phases)
        assert all(len(costs) == size for costs in phases.values())
        assert all(cost["cpu_seconds"] > 0 for cost in phases[STEP])
    (alone,), (first, second) = (runs[0]["restore"] for runs in measured.values())
    assert alone["bytes_sent"] == 0
    # rank 0 sends at least weights and moments: three times 4 bytes of 9,574 parameters
    assert first["bytes_sent"] > 3 * 4 * 9_000 > second["bytes_sent"]
    print_tables(measured)
    assert "| restore |" in capsys.readouterr().out


def test_the_model_follows_from_bytes_and_links(capsys):
    machine = MACHINES[0]
    few, many = (predict(machine, size) for size in (SIZES[0], SIZES[-1]))
    assert few.compute == many.compute == FLOPS_PER_SAMPLE / (191.5e12 * 0.3)
    # in one node no hop between nodes is waited for: 52 M gradients of 4 bytes cross 60 % of 4 x 200 Gbit/s twice
    assert few.gradient == pytest.approx(2 * 7 / 8 * 4 * 52e6 / (0.6 * 4 * 200e9 / 8))
    assert many.step > few.step
    assert many.metadata_opens == few.metadata_opens
    print_model()
    assert capsys.readouterr().out.count("| step without overlap, ms |") == len(MACHINES)
