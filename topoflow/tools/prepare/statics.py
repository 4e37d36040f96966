"""What packed data hold once: coordinates, terrain, population, mask."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from topoflow.data.grid import Grid, same_place
from topoflow.data.packed.manifest import FileRecord, Manifest
from topoflow.errors import ConfigError, DataError
from topoflow.files import flush
from topoflow.tools.prepare.resampling import Resampling


def static_fields(grid: Grid, resampling: Resampling | None, mask: np.ndarray | None) -> dict[str, np.ndarray]:
    """By name, [H, W] each, on the grid of the packed data, of what `grid` has and of the `mask` on it, bool [h, w].

    A cell of another grid counts if at least half of what it covers does. ConfigError if none does.
    """
    out = grid if resampling is None else resampling.grid
    fields = {"lat2d": out.lat2d, "lon2d": out.lon2d}
    if grid.elevation_m is not None:
        fields["elevation"] = grid.elevation_m if resampling is None else resampling.mean(grid.elevation_m)
    if grid.population is not None:
        fields["population"] = grid.population if resampling is None else resampling.share_out(grid.population)
    if mask is not None:
        fields["mask"] = mask if resampling is None else resampling.mean(mask.astype(np.float32)) >= 0.5
        if not fields["mask"].any():
            raise ConfigError(
                "--mask: no cell of the new grid is covered: expected one with at least half of its area in the mask"
            )
    return fields


def require_same_statics(fields: Mapping[str, np.ndarray], present: Manifest, folder: Path) -> None:
    """DataError, naming it, if one of `fields` is not what the packed data in `folder` hold."""
    for name, field in fields.items():
        stored = np.load(folder / present.statics[name].name)
        is_place = name in ("lat2d", "lon2d")
        if not (same_place(stored, field) if is_place else np.array_equal(stored, field, equal_nan=name != "mask")):
            raise DataError(f"{folder}: {name!r} of the data differs from the packed one: expected the same grid")


def save_static(path: Path, field: np.ndarray) -> FileRecord:
    """Write a field as .npy, to the disk."""
    with open(path, "wb") as file:
        np.save(file, field)
        flush(file)
    data = path.read_bytes()
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())
