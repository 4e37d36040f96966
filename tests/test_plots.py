"""Plots show the right numbers and labels, read from the pixels and the axes."""

import dataclasses

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from topoflow import plots
from topoflow.forecast_case import ForecastCase
from topoflow.plots import plot_case, plot_skill

TARGETS = ("pm25", "pm10", "so2", "no2", "co", "o3")


def record(target, lead, **scores):
    numbers = {
        "rmse_where_present": 15.0,
        "persistence_rmse": 20.0,
        "climatology_rmse_where_present": 30.0,
        "damped_persistence_rmse": 18.0,
    }
    return {"target": target, "lead_hours": lead, "unit": "ug m-3", **numbers, **scores}


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of saved figures, in order."""
    figures, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def make_case(**changes):
    lat2d, lon2d = np.meshgrid(np.linspace(40, 30, 8), np.linspace(100, 115, 10), indexing="ij")
    truth = np.full((8, 10), 20.0)
    truth[0] = 200.0  # the northernmost row
    truth[4, 4] = np.nan
    fields = {
        "lat2d": lat2d,
        "lon2d": lon2d,
        "elevation_m": (300 * (lon2d - 100)).astype(np.float32),
        "truth": truth,
        "forecast": np.full((8, 10), 50.0),
        "wind_ms": np.stack([np.full((8, 10), 3.0), np.full((8, 10), -2.0)]),
        "name": "PM2.5",
        "unit": "ug m-3",
        "start": np.datetime64("2019-02-03T05", "h"),
        "lead_hours": 24,
    }
    return ForecastCase(**{**fields, **changes})


def test_skill_has_a_panel_for_each_target_with_the_right_numbers(tmp_path, drawn):
    plot_skill([record(target, lead) for target in TARGETS for lead in (12, 24, 48, 96)], tmp_path / "skill.png")
    panels = drawn[0].axes
    assert [ax.get_title(loc="left") for ax in panels][:2] == ["PM$_{2.5}$", "PM$_{10}$"]
    assert len(panels) == 6
    for ax in panels:
        lines = {line.get_label(): line for line in ax.lines}
        assert set(lines) == {"persistence", "TopoFlow", "damped persistence", "climatology"}
        assert lines["TopoFlow"].get_xdata().tolist() == [12, 24, 48, 96]
        assert lines["TopoFlow"].get_ydata() == pytest.approx([0.25] * 4)
        assert lines["climatology"].get_ydata() == pytest.approx([-0.5] * 4)
        assert lines["damped persistence"].get_ydata() == pytest.approx([0.1] * 4)
    assert matplotlib.image.imread(tmp_path / "skill.png").shape[:2] > (600, 1000)


@pytest.mark.parametrize("targets", [("co",), ("co", "o3"), ("pm25", "co", "o3", "no2")])
def test_skill_of_few_targets_and_one_lead(tmp_path, drawn, targets):
    plot_skill([record(target, 24) for target in targets], tmp_path / "skill.png")
    assert [ax.get_visible() and ax.axison for ax in drawn[0].axes].count(True) == len(targets)


def test_skill_marks_targets_without_observations(tmp_path, drawn):
    empty = dict.fromkeys(("rmse_where_present", "persistence_rmse", "climatology_rmse_where_present"))
    records = [record("pm25", 12, **empty, damped_persistence_rmse=None), record("o3", 12)]
    plot_skill(records, tmp_path / "skill.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["no observations"]
    assert not drawn[0].axes[1].texts


@pytest.mark.parametrize("flip", [False, True])
def test_maps_have_north_up_in_either_order_of_rows(tmp_path, drawn, flip):
    case = make_case(wind_ms=None, elevation_m=None)
    if flip:
        rows = {name: getattr(case, name)[::-1] for name in ("lat2d", "lon2d", "truth", "forecast")}
        case = dataclasses.replace(case, **rows)
    plot_case(case, tmp_path / "case.png")
    ax = drawn[0].axes[0]
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    # colours 5 % below the top and 5 % above the bottom of the first map: the 200 in the north is darker
    picture = matplotlib.image.imread(tmp_path / "case.png")[..., :3]
    box = ax.get_window_extent().transformed(drawn[0].dpi_scale_trans.inverted())
    column = int(plots.DPI * (box.x0 + box.width / 2))
    height = drawn[0].get_figheight()
    top, bottom = (picture[int(plots.DPI * (height - box.y0 - part * box.height)), column] for part in (0.95, 0.05))
    assert top.mean() < bottom.mean() - 0.3


def test_case_labels_units_times_error_and_overlays(tmp_path, drawn):
    plot_case(make_case(), tmp_path / "case.png")
    truth, forecast, error = drawn[0].axes[:3]
    assert truth.get_title(loc="left") == "Truth, 2019-02-04 05 h"
    assert forecast.get_title(loc="left") == "Forecast from 2019-02-03 05 h"
    # 10 cells miss by 150, 69 by 30, one has no truth
    assert f"RMSE {np.sqrt((10 * 150**2 + 69 * 30**2) / 79):.3g} " in error.get_title(loc="left")
    words = " ".join(text.get_text() for text in drawn[0].texts)
    assert "terrain at 500, 1000, 2000, 3000 m" in words  # the terrain ends at 4500 m
    assert "arrows: wind" in words
    labels = [ax.get_xlabel() for ax in drawn[0].axes]
    assert "PM$_{2.5}$ (\N{MICRO SIGN}g m$^{-3}$)" in labels
    assert labels[:3] == ["longitude (\N{DEGREE SIGN}E)"] * 3
    assert truth.get_ylabel() == "latitude (\N{DEGREE SIGN}N)"


def test_case_without_wind_terrain_or_truth(tmp_path, drawn):
    nothing = np.full((8, 10), np.nan)
    plot_case(make_case(wind_ms=None, elevation_m=None, truth=nothing), tmp_path / "deep" / "case.png")
    assert "RMSE -" in drawn[0].axes[2].get_title(loc="left")
    assert not any("terrain" in text.get_text() or "wind" in text.get_text() for text in drawn[0].texts)
    plot_case(make_case(elevation_m=np.zeros((8, 10), np.float32), forecast=nothing, truth=nothing), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
