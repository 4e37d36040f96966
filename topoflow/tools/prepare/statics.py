"""static.npz: what prepared data hold once: coordinates, terrain, population, mask."""

import hashlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from topoflow.data.grid import same_place
from topoflow.data.prepared.manifest import FileRecord, Manifest
from topoflow.data.prepared.reader import read_static
from topoflow.data.variables import VARIABLES
from topoflow.errors import DataError
from topoflow.files import flush

STATIC = "static.npz"


def static_units(fields: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return {name: unit} of the fields."""
    return {name: VARIABLES[name].unit if name in VARIABLES else "1" for name in fields}


def require_same_statics(fields: Mapping[str, np.ndarray], present: Manifest, folder: Path) -> None:
    """DataError, naming it, if one of `fields` is not what the prepared data in `folder` hold."""
    stored = read_static(folder, present)
    for name, field in fields.items():
        if name not in stored:
            raise DataError(f"{folder}: was prepared without {name!r}: expected {', '.join(stored)}, or another folder")
        is_place = name in ("lat2d", "lon2d")
        if not (
            same_place(stored[name], field)
            if is_place
            else np.array_equal(stored[name], field, equal_nan=name != "mask")
        ):
            raise DataError(f"{folder}: {name!r} differs from the prepared one: expected the same grid")


def save_statics(folder: Path, fields: Mapping[str, np.ndarray]) -> FileRecord:
    """Write the fields as static.npz, to the disk."""
    path = folder / STATIC
    with open(path, "wb") as file:
        np.savez(file, **typing.cast(dict[str, Any], fields))
        flush(file)
    data = path.read_bytes()
    return FileRecord(STATIC, len(data), hashlib.sha256(data).hexdigest())
