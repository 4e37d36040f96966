"""Reading a .ckpt file without running anything that is in it."""

import argparse
import os
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topoflow.errors import MissingPath, ResumeRefused

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step")

_numpy_scalar = np.float64(0).__reduce__()[0]

PLAIN_OBJECTS: list[tuple[Callable, str]] = [
    *((OrderedDict, f"{package}.AttributeDict") for package in (
        "lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing"
    )),
    (argparse.Namespace, "argparse.Namespace"),
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *((kind, f"numpy.dtypes.{kind.__name__}") for kind in map(type, map(np.dtype, ("f4", "f8", "i4", "i8", "?")))),
]  # fmt: skip
"""What hyperparameters and callbacks may hold beside plain values and tensors, and what it is read as. None of it can
do more than hold values."""

_UNREADABLE = (RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)
"""What torch and its unpickler raise for a pickle that makes no sense."""

_DAMAGED_ARCHIVE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError)
"""What zipfile raises for an archive whose bytes are not as they were written."""

_DOS_FOLDER = 0x10
"""The attribute of a record that calls it a folder: torch.load then leaves its memory as it happens to be."""


def read_lightning(path: Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint on the host: tensors, plain values and PLAIN_OBJECTS.

    Raises:
        MissingPath: no such file.
        ResumeRefused: it is no checkpoint of Lightning, is damaged, holds other objects (no code of it runs), or lacks
            what a resume needs; the message says what was found.
    """
    if not os.path.exists(path):  # False as well where we may not look
        raise MissingPath(f"{path}: not found: expected a Lightning checkpoint (.ckpt)")
    _require_whole(path)
    try:
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = named[1] if named else "an object that is neither a tensor nor a plain value"
        raise ResumeRefused(
            f"{path}: holds {found}: not loaded, none of its code ran: expected tensors and plain values"
        ) from None
    except _UNREADABLE as error:
        raise ResumeRefused(f"{path}: cannot be read: {_first_line(error)}: it is damaged") from None
    found = list(map(str, content)) if isinstance(content, dict) else [type(content).__name__]
    missing = [part for part in PARTS if part not in found]
    if missing:
        raise ResumeRefused(
            f"{path}: no {', '.join(missing)} in it, only {', '.join(found[:12]) or 'nothing'}: "
            "expected a whole checkpoint of Lightning 2 (not one saved with weights only)"
        )
    return content


def _require_whole(path: Path) -> None:
    """Compare every record with the CRC that torch.save wrote beside it; torch.load does not."""
    try:
        is_archive = os.path.isfile(path) and zipfile.is_zipfile(path)
        damage = _find_damage(path) if is_archive else None
    except _DAMAGED_ARCHIVE as error:
        raise ResumeRefused(f"{path}: cannot be read: {_first_line(error)}: it is damaged") from None
    if not is_archive:
        raise ResumeRefused(f"{path}: not a file that torch.save wrote: expected a Lightning checkpoint (.ckpt)")
    if damage is not None:
        raise ResumeRefused(f"{path}: {damage}: it is damaged")


def _find_damage(path: Path) -> str | None:
    """The first record that is not stored as torch.save does it (as it is, none a folder), or not as its CRC says."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.external_attr & _DOS_FOLDER:
                return f"{record.filename!r} in it is not stored as torch.save stores"
        damaged = archive.testzip()
    return None if damaged is None else f"{damaged!r} in it does not match its checksum"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
