"""Read a .ckpt file without running any code in it, and take values out of it by key and type."""

import argparse
import math
import os
import pathlib
import pickle
import re
import shlex
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from topoflow.errors import MissingPath, ResumeRefused
from topoflow.text import shorten

T = TypeVar("T")

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step")

_numpy_scalar: Any = np.float64(0).__reduce__()[0]

PLAIN_OBJECTS: list[Callable | tuple[Callable, str]] = [
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (argparse.Namespace, "argparse.Namespace"),
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8", "?")),
]
"""Classes that hyperparameters and callbacks may hold, and what they are read as. They only hold values."""

_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What zipfile, torch and its unpickler raise for invalid bytes."""

_DOS_FOLDER = 0x10
"""Attribute that marks a record as a folder; torch.load leaves the memory of such a record uninitialized."""

_KINDS = {Mapping: "a dict", list: "a list", tuple: "a list of numbers or names", bool: "true or false",
          int: "a whole number, at least 0", float: "a finite number", torch.float32: "finite float32 values",
          torch.int64: "int64 values"}  # fmt: skip
"""What a value may have to be, by type; of a tensor, by dtype."""


def read_lightning(path: Path) -> dict[str, Any]:
    """Return the content of a Lightning checkpoint, on the host: tensors, plain values and PLAIN_OBJECTS.

    Raises:
        MissingPath: no such file.
        ResumeRefused: not a complete checkpoint of Lightning, or one that is sharded, damaged, or holds other objects.
    """
    if not os.path.exists(path):  # also False where we have no permission to look
        raise MissingPath(f"{path}: not found: expected a Lightning checkpoint (.ckpt)")
    _refuse_sharded(path)
    try:
        _require_whole(path)
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = named[1] if named else "an object that is neither a tensor nor a plain value"
        raise ResumeRefused(
            f"{path}: holds {found}: not loaded, none of its code ran: expected tensors and plain values"
        ) from None
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResumeRefused(f"{path}: cannot be read: {reason}: it is damaged") from None
    found = list(map(show, content)) if isinstance(content, dict) else [type(content).__name__]
    missing = [part for part in PARTS if part not in found]
    require(
        not missing,
        f"{path}: no {', '.join(missing)} in it, only {shorten(found, 12) or 'nothing'}: "
        "expected a complete checkpoint of Lightning 2 (not one saved with weights only)",
    )
    return content


def _refuse_sharded(path: Path) -> None:
    """Refuse a folder of shards, naming what makes one file of it."""
    command = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {shlex.quote(str(path))}"
    require(
        not os.path.isfile(path / ".metadata"),
        f"{path}: sharded by FSDP: run `{command}`, then import {path}.consolidated",
    )
    require(
        not any(next(path.glob(f"{folder}*mp_rank_*_model_states.pt"), None) for folder in ("", "*/")),
        f"{path}: sharded by DeepSpeed: Lightning's convert_zero_checkpoint_to_fp32_state_dict makes one file of its "
        "weights, without the optimizer's moments; a resume needs these: expected a checkpoint of another strategy, "
        "such as ddp",
    )


def _require_whole(path: Path) -> None:
    """Compare every record with the CRC that torch.save wrote; torch.load does not."""
    is_archive = os.path.isfile(path) and zipfile.is_zipfile(path)
    require(is_archive, f"{path}: not a file that torch.save wrote: expected a Lightning checkpoint (.ckpt)")
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            is_stored = record.compress_type == zipfile.ZIP_STORED and not record.external_attr & _DOS_FOLDER
            require(is_stored, f"{path}: {record.filename!r} in it is not stored as torch.save does: it is damaged")
        damaged = archive.testzip()
    require(damaged is None, f"{path}: {damaged!r} in it does not match its checksum: it is damaged")


def require(fits: bool, message: str) -> None:
    """Raise ResumeRefused with this message unless the file fits."""
    if not fits:
        raise ResumeRefused(message)


def take(content: Any, kind: type | torch.dtype, *keys: Any) -> Any:
    """Return the value at a path of keys, which must be of this kind, see _KINDS; else raise ResumeRefused."""
    value, path = content, " / ".join(map(show, keys))
    for key in keys:
        require(key in as_mapping(value), f"{path}: not in the file: expected {_KINDS[kind]}")
        value = value[key]
    require(is_kind(value, kind), f"{path}: {show(value)}: expected {_KINDS[kind]}")
    return value


def is_kind(value: Any, kind: type[T] | torch.dtype) -> TypeGuard[T]:
    """Return whether a value is what _KINDS describes, whatever a file holds. An int is a float too, a bool no int."""
    if isinstance(kind, torch.dtype):
        is_plain = type(value) in (Tensor, nn.Parameter) and not value.is_nested and value.layout is torch.strided
        return is_plain and not value.is_meta and value.dtype is kind and bool(value.isfinite().all())
    if kind is tuple:
        return isinstance(value, list | tuple) and all(isinstance(v, str) or is_kind(v, float) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return isinstance(value, kind)


def as_mapping(value: Any) -> Mapping[Any, Any]:
    """Return a dict as it is, and an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, numbers to nine digits: products of rates are rounded in any order."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_kind(one, float) and is_kind(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return type(one) is type(other) and isinstance(one, str | bool | None) and one == other


def show(value: Any) -> str:
    """Return a value as a short text in one line, whatever a file holds."""
    if isinstance(value, list | tuple):
        return f"[{shorten((f'a {type(v).__name__}' if isinstance(v, list | tuple) else show(v) for v in value), 20)}]"
    if isinstance(value, str):
        return value[:80] if value.isprintable() else ascii(value[:80])
    is_short = value is None or isinstance(value, bool | float) or is_kind(value, float)
    return str(value) if is_short else f"a value of type {type(value).__name__}"
