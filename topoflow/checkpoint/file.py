"""One checkpoint: a folder with state.pt and manifest.json, written completely or not at all, verified when read."""

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch

from topoflow.errors import CheckpointUnreadable, MissingPath, ResumeRefused
from topoflow.files import Guard, discard, flush, flush_folder, hidden_name

MANIFEST, STATE = "manifest.json", "state.pt"
FORMAT = (1, 1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest: format, step, files {name: size, sha256}, tensors {name: dtype, shape, sha256}.

    Raises:
        ResumeRefused: it is missing, or does not match its own hash.
        OSError: it cannot be read.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ResumeRefused(f"checkpoint {folder}: {MANIFEST} is missing") from None
    try:
        content = json.loads(text)
        del content["manifest_sha256"]
        # compare the text, not the values: this finds a changed byte that JSON ignores
        intact = _manifest_text(content).encode() == text
    except (ValueError, KeyError, TypeError, RecursionError):
        content, intact = {}, False
    if not intact:
        raise ResumeRefused(f"checkpoint {folder}: {MANIFEST} does not match its own hash: it is damaged")
    return content


def named_tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in nested dicts with its path: `optimizer/state/head.0.weight/exp_avg`."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from named_tensors(value, f"{path}/{key}" if path else str(key))


def map_tensors(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return nested dicts of tensors and plain values with `function` applied to each tensor."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    return {key: map_tensors(value, function) for key, value in tree.items()} if isinstance(tree, dict) else tree


def write_checkpoint(
    folder: Path, state: dict[str, Any], guard: Guard = nullcontext, on_progress: Callable[[], None] = lambda: None
) -> None:
    """Write `state` as the checkpoint `folder`, whose parent exists; it appears there only when complete and on disk.

    Files are written to a temporary folder in the same place and flushed with it, then the folder is renamed. A
    checkpoint of the same name is replaced.

    Args:
        on_progress: called after each write, and after each tensor is hashed.

    Raises:
        OSError: the file system refused; the temporary folder is removed and earlier content is intact.
        RunDirectoryError: `guard` refused, see `topoflow.run_dir`; the same holds.
    """
    temporary = hidden_name(folder, "writing")
    try:
        temporary.mkdir()
        manifest = {"format": list(FORMAT), "step": state["progress"]["step"]}
        manifest["files"] = {STATE: _write_state(temporary / STATE, state, on_progress)}
        manifest["tensors"] = {}
        for name, tensor in named_tensors(state):
            manifest["tensors"][name] = _tensor_record(tensor)
            on_progress()
        with open(temporary / MANIFEST, "w", encoding="ascii") as file:
            file.write(_manifest_text(manifest))
            flush(file)
        flush_folder(temporary)
        _move_into_place(temporary, folder, guard)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # without the guard: no other process uses this name
        raise


def read_checkpoint(folder: Path, parts: Sequence[str] = ("model", "progress")) -> dict[str, Any]:
    """Return the state in a checkpoint after verifying its manifest, size, content hash and step. Runs no code in it.

    Args:
        parts: keys that the state must have, each a dict.

    Raises:
        MissingPath: no such folder.
        ResumeRefused: a file is missing, truncated or altered, lacks one of `parts`, belongs to another step than the
            folder's name, or holds more than tensors and plain values. CheckpointUnreadable, a subclass: the file
            system refused, or the format is unknown.
    """
    folder = Path(folder)
    with _open_verified(folder) as (file, manifest):
        state = _load(file, folder)
    _require_known_format(state, parts, folder)
    _require_one_step(state.get("progress", {}).get("step"), manifest, folder)
    return state


def verify_checkpoint(folder: Path) -> None:
    """Verify manifest, size, content hash and step of a checkpoint without loading it. Raises as `read_checkpoint`."""
    with _open_verified(Path(folder)) as (_, manifest):
        _require_one_step(manifest.get("step"), manifest, Path(folder))


class _ProgressFile:
    """The file that torch.save writes to; calls `on_progress` after each write."""

    def __init__(self, file: BufferedWriter, on_progress: Callable[[], None]):
        self._file, self._on_progress = file, on_progress

    def write(self, data: bytes | memoryview) -> int:
        count = self._file.write(data)
        self._on_progress()
        return count

    def flush(self) -> None:
        self._file.flush()


def _write_state(path: Path, state: dict[str, Any], on_progress: Callable[[], None]) -> dict[str, Any]:
    """Write state.pt, flush it, then hash it; return its entry in the manifest."""
    with open(path, "wb") as file:
        try:
            # torch.save calls no other method of a file
            torch.save(state, _ProgressFile(file, on_progress))  # pyright: ignore[reportArgumentType]
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch raises its own error on top of a failed write
                raise error.__context__ from None
            raise
        flush(file)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _tensor_record(tensor: torch.Tensor) -> dict[str, Any]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(data.data).hexdigest()
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": digest}


def _manifest_text(content: dict[str, Any]) -> str:
    """Return a manifest as JSON text; its last key is the hash of everything else."""
    body = json.dumps(content, sort_keys=True)
    return json.dumps({**content, "manifest_sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def _move_into_place(temporary: Path, folder: Path, guard: Guard) -> None:
    """Rename the temporary folder. Between two renames an older one has a temporary name; `clean_up` restores it."""
    replaced = hidden_name(folder, "replaced") if folder.exists() else None
    if replaced is not None:
        with guard():
            os.rename(folder, replaced)
    try:
        with guard():
            os.rename(temporary, folder)
    except OSError:
        if replaced is not None:
            with guard():
                os.rename(replaced, folder)
        raise
    flush_folder(folder.parent)
    if replaced is not None:
        discard(replaced, guard)


@contextmanager
def _open_verified(folder: Path) -> Iterator[tuple[BufferedReader, dict[str, Any]]]:
    """Yield state.pt, open and verified, and the manifest. Opened once, so that what is verified is what is loaded."""
    if not os.path.exists(folder):  # also False if permission is denied
        raise MissingPath(f"checkpoint {folder}: not found")
    try:
        manifest = read_manifest(folder)
        with open(folder / STATE, "rb") as file:
            _require_intact(file, manifest, folder)
            file.seek(0)
            yield file, manifest
    except FileNotFoundError:
        raise ResumeRefused(f"checkpoint {folder}: {STATE} is missing") from None
    except NotADirectoryError:
        raise ResumeRefused(f"checkpoint {folder}: is a file: expected a folder") from None
    except OSError as error:
        raise CheckpointUnreadable(f"checkpoint {folder}: cannot be read: {error.strerror or error}") from None


def _require_intact(file: BufferedReader, manifest: dict[str, Any], folder: Path) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        entry = manifest["files"][STATE]
        if size != entry["size"]:
            raise ResumeRefused(
                f"checkpoint {folder}: {STATE} has {size} bytes: expected {entry['size']}: it is damaged"
            )
        if "pieces" in entry:  # format 1.1 was first written with a hash per piece: [[size, hash], ...]
            intact = all(hashlib.sha256(file.read(length)).hexdigest() == sha256 for length, sha256 in entry["pieces"])
            intact = intact and file.tell() == size
        else:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    except (KeyError, TypeError, ValueError):
        raise ResumeRefused(f"checkpoint {folder}: {MANIFEST} does not describe {STATE}") from None
    if not intact:
        raise ResumeRefused(f"checkpoint {folder}: {STATE} does not match its hash in {MANIFEST}: it is damaged")


def _load(file: BufferedReader, folder: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's comments on a foreign file are in the refusal
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ResumeRefused(
            f"checkpoint {folder}: {STATE} holds more than tensors and plain values: not loaded, none of its code ran"
        ) from None
    except MemoryError:
        raise CheckpointUnreadable(f"checkpoint {folder}: {STATE} does not fit into memory") from None
    except Exception as error:  # noqa: BLE001 (bytes made to mislead the loader raise errors of any type)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResumeRefused(f"checkpoint {folder}: {STATE} cannot be loaded: {reason}") from None


def _require_known_format(state: Any, parts: Sequence[str], folder: Path) -> None:
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if not isinstance(found, tuple | list) or tuple(found[:1]) != FORMAT[:1]:
        raise CheckpointUnreadable(f"checkpoint {folder}: format {found}: expected {FORMAT[0]}.x")
    missing = [part for part in parts if not isinstance(state.get(part), dict)]
    if missing:
        raise ResumeRefused(f"checkpoint {folder}: {STATE} has no {', '.join(missing)}: expected a TopoFlow checkpoint")


def _require_one_step(step: Any, manifest: dict[str, Any], folder: Path) -> None:
    """Refuse a folder renamed to another step. A copy whose name contains no step may have any name."""
    name, recorded = re.search(r"step-(\d+)", folder.name), manifest.get("step")
    if recorded is None or recorded != step or (name and int(name[1]) != recorded):
        raise ResumeRefused(
            f"checkpoint {folder}: folder {folder.name}, {MANIFEST} of step {recorded} and {STATE} of step {step}: "
            "expected the same step (was the folder renamed?)"
        )
