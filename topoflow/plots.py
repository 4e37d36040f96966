"""Plots of an evaluation as PNG files, drawn without a display.

Colour-blind readers can distinguish the colours used: those of Okabe and Ito (2008), and ColorBrewer's YlOrBr and RdBu.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from topoflow.data.variables import known_or_plain
from topoflow.forecast_case import ForecastCase
from topoflow.metrics import Record

DPI = 150
MISSING_COLOUR = "#dedede"
TEXT_COLOUR = "#333333"
TERRAIN_LEVELS_M = (500, 1000, 2000, 3000, 4500)
ARROWS_ACROSS = 22
"""Wind arrows along the longer side of a map."""

LINES = (
    # label, key of the RMSE on samples with a present value, colour, line, marker
    ("TopoFlow", "rmse_where_present", "#0072B2", "-", "o"),
    ("damped persistence", "damped_persistence_rmse", "#D55E00", "--", "s"),
    ("climatology", "climatology_rmse_where_present", "#009E73", ":", "^"),
)


def plot_skill(records: Sequence[Record], path: Path) -> None:
    """Plot the skill 1 - RMSE / RMSE of persistence over lead time, one panel per target, all on the same samples."""
    targets = list(dict.fromkeys(record["target"] for record in records))
    columns = min(3, len(targets))
    rows = -(-len(targets) // columns)
    figure = Figure(figsize=(max(6.0, 1.2 + 3.1 * columns), 1.3 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, target in zip(axes.flat, targets, strict=False):
        _draw_skill(ax, [record for record in records if record["target"] == target])
        ax.set_title(_name_text(known_or_plain(target).long_name), fontsize=11, loc="left", color=TEXT_COLOUR)
    for number, ax in enumerate(axes.flat):
        below = number + columns
        if number >= len(targets):
            ax.set_axis_off()
        elif below >= len(targets):
            ax.set_xlabel("lead time (h)")
            ax.tick_params(labelbottom=True)
    figure.supylabel("1 - RMSE / RMSE of persistence", fontsize=10)
    figure.suptitle("Skill over persistence (0: no better, 1: perfect)", fontsize=12)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4 if columns > 1 else 2,
        frameon=False,
    )
    _save(figure, path)


def _draw_skill(ax: Axes, records: Sequence[Record]) -> None:
    leads = [record["lead_hours"] for record in records]
    persistence = [record["persistence_rmse"] for record in records]
    ax.axhline(0.0, color="#555555", linewidth=1.2, label="persistence")
    for label, key, colour, line, marker in LINES:
        skill = [_skill(record[key], base) for record, base in zip(records, persistence, strict=True)]
        ax.plot(
            leads, skill, line, color=colour, marker=marker, label=label,
            markersize=5, linewidth=2.2 if key == LINES[0][1] else 1.5, zorder=3 if key == LINES[0][1] else 2,
        )  # fmt: skip
    if all(base is None for base in persistence):
        ax.text(0.5, 0.6, "no observations", transform=ax.transAxes, ha="center", color=TEXT_COLOUR)
    ax.set_xticks(leads)
    ax.margins(x=0.06)
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _skill(rmse: float | None, persistence_rmse: float | None) -> float:
    if rmse is None or not persistence_rmse:
        return np.nan
    return 1.0 - rmse / persistence_rmse


def plot_case(case: ForecastCase, path: Path) -> None:
    """Plot maps of truth, forecast and error, north up, with terrain and the wind at the start if available."""
    lat, lon = case.lat2d, case.lon2d
    aspect = 1.0 / np.cos(np.deg2rad(lat.mean()))
    height = 3.6 * aspect * np.ptp(lat) / np.ptp(lon)
    figure = Figure(figsize=(12.6, 1.9 + min(max(height, 1.6), 8.0)), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    error, name, unit = case.forecast - case.truth, _name_text(case.name), _unit_text(case.unit)
    values = np.concatenate([field[np.isfinite(field)] for field in (case.truth, case.forecast)])
    # the top percent may saturate, so that a single cell does not stretch the colour scale
    low, high = np.percentile(values, [0.5, 99.5]) if len(values) else (0.0, 1.0)
    # start the scale at zero unless that would leave most colours unused
    scale = Normalize(min(low, 0.0) if low < 0.2 * high else low, high if high > low else low + 1.0)
    finite = np.abs(error[np.isfinite(error)])
    limit = float(np.percentile(finite, 99)) if len(finite) else 1.0
    both = Normalize(-(limit or 1.0), limit or 1.0)
    valid = case.start + np.timedelta64(case.lead_hours, "h")
    meshes = [
        _draw_map(axes[0], case, case.truth, f"Truth, {_format_time(valid)}", "YlOrBr", scale),
        _draw_map(axes[1], case, case.forecast, f"Forecast from {_format_time(case.start)}", "YlOrBr", scale),
        _draw_map(axes[2], case, error, f"Error, RMSE {_rmse_text(error)} {unit}", "RdBu_r", both),
    ]
    bars = {"orientation": "horizontal", "shrink": 0.6, "aspect": 32, "pad": 0.02}
    figure.colorbar(meshes[0], ax=list(axes[:2]), label=f"{name} ({unit})", extend="both", **bars)
    bars |= {"shrink": 0.9, "aspect": 24}
    figure.colorbar(meshes[2], ax=axes[2], label=f"forecast - truth ({unit})", extend="both", **bars)
    axes[0].set_ylabel("latitude (\N{DEGREE SIGN}N)")
    for ax in axes:
        ax.set_aspect(aspect)
        ax.set_xlabel("longitude (\N{DEGREE SIGN}E)")
    figure.suptitle(f"{name}, {case.lead_hours} h ahead: the case with the highest observed mean\n", fontsize=12)
    figure.text(0.5, 0.945, _legend_text(case), ha="center", va="top", fontsize=9, color=TEXT_COLOUR)
    _save(figure, path)


def _draw_map(ax: Axes, case: ForecastCase, field: np.ndarray, title: str, colormap: str, scale: Normalize) -> QuadMesh:
    lat, lon = case.lat2d, case.lon2d
    ax.set_facecolor(MISSING_COLOUR)
    # cells are placed by their coordinates: north is up in either order of rows
    mesh = ax.pcolormesh(
        lon, lat, np.ma.masked_invalid(field), cmap=colormap, norm=scale, shading="nearest", rasterized=True
    )
    levels = _terrain_levels(case)
    if levels:
        ax.contour(lon, lat, case.elevation_m, levels=levels, colors="#444444", linewidths=0.5, alpha=0.7)
    if case.wind_ms is not None:
        step = max(1, round(max(lat.shape) / ARROWS_ACROSS))
        every = (slice(step // 2, None, step), slice(step // 2, None, step))
        wind = case.wind_ms[:, *every]
        ax.quiver(lon[every], lat[every], *wind, angles="uv", color="#111111", alpha=0.75, width=0.0028, pivot="mid")
    ax.set_title(title, fontsize=10.5, loc="left", color=TEXT_COLOUR)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.yaxis.set_major_locator(MaxNLocator(6))
    return mesh


def _terrain_levels(case: ForecastCase) -> list[int]:
    """Return the heights in metres of the contours that the terrain crosses."""
    if case.elevation_m is None:
        return []
    return [level for level in TERRAIN_LEVELS_M if case.elevation_m.min() < level < case.elevation_m.max()]


def _legend_text(case: ForecastCase) -> str:
    parts = ["grey: no value"]
    if levels := _terrain_levels(case):
        parts.append(f"lines: terrain at {', '.join(map(str, levels))} m")
    if case.wind_ms is not None:
        parts.append("arrows: wind at the start")
    return "; ".join(parts)


def _name_text(name: str) -> str:
    """Return a name with the trailing number as a subscript: NO2, PM2.5."""
    return re.sub(r"(?<=[A-Z])([0-9.]+)$", r"$_{\1}$", name)


def _unit_text(unit: str) -> str:
    """Return a unit such as ug m-3 with superscripts and the micro sign."""
    return re.sub(r"-([0-9])", r"$^{-\1}$", re.sub(r"^ug\b", "\N{MICRO SIGN}g", unit))


def _rmse_text(error: np.ndarray) -> str:
    finite = error[np.isfinite(error)]
    return f"{np.sqrt(np.mean(finite**2)):.3g}" if len(finite) else "-"


def _format_time(time: np.datetime64) -> str:
    return str(time.astype("datetime64[h]")).replace("T", " ") + " h"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
