"""One checkpoint: a folder with state.pt and manifest.json, written whole or not at all, verified when it is read."""

import itertools
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch

from topoflow.checkpoint.hashing import HashedFile, file_digests
from topoflow.checkpoint.manifest import MANIFEST, STATE, manifest_text, read_manifest, state_record
from topoflow.disk import Guard, discard, flush, flush_folder, hidden_beside
from topoflow.errors import CheckpointUnreadable, MissingPath, ResumeRefused

FORMAT = (1, 1)


def named_tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts, with its path: `optimizer/state/head.0.weight/exp_avg`."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from named_tensors(value, f"{path}/{key}" if path else str(key))


def write_checkpoint(
    folder: Path, state: dict[str, Any], guard: Guard = nullcontext, on_progress: Callable[[], None] = lambda: None
) -> None:
    """Write `state` as the checkpoint `folder`, whose parent exists; it is there once it is whole and on the disk.

    The write goes to a temporary folder beside it, every file and folder is flushed, then renamed. A checkpoint of the
    same name is replaced.

    Args:
        on_progress: called after each tensor.

    Raises:
        OSError: the file system refused; the temporary folder is removed and what was there before is whole.
        RunDirectoryError: `guard` refused, see `topoflow.disk`; likewise.
    """
    temporary = hidden_beside(folder, "writing")
    try:
        temporary.mkdir()
        written = _write_state(temporary / STATE, state, on_progress)
        manifest = {"format": list(FORMAT), "step": state["progress"]["step"], **written}
        with open(temporary / MANIFEST, "w", encoding="ascii") as file:
            file.write(manifest_text(manifest))
            flush(file)
        flush_folder(temporary)
        _move_into_place(temporary, folder, guard)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # without the guard: its name is ours alone
        raise


def read_checkpoint(folder: Path, parts: Sequence[str] = ("model", "progress")) -> dict[str, Any]:
    """The state in a checkpoint, after its manifest, sizes and content hashes have been verified. No code of it runs.

    Args:
        parts: what must be in it, as dicts.

    Raises:
        MissingPath: no such folder.
        ResumeRefused: a file is missing, truncated or altered, lacks one of `parts`, or holds more than tensors and
            plain values; CheckpointUnreadable, which is one: the file system refused, or the format is unknown.
    """
    folder = Path(folder)
    if not os.path.exists(folder):  # False as well where we may not look
        raise MissingPath(f"checkpoint {folder}: not found")
    try:
        manifest = read_manifest(folder)
        # opened once: what is loaded is what was verified, whatever is renamed meanwhile
        with open(folder / STATE, "rb") as file:
            _require_whole(file, manifest, folder)
            state = _load(file, folder)
    except FileNotFoundError:
        raise ResumeRefused(f"checkpoint {folder}: {STATE} is missing") from None
    except NotADirectoryError:
        raise ResumeRefused(f"checkpoint {folder}: is a file: expected a folder") from None
    except OSError as error:
        raise CheckpointUnreadable(f"checkpoint {folder}: cannot be read: {error.strerror or error}") from None
    _require_known_format(state, parts, folder)
    return state


def _write_state(path: Path, state: dict[str, Any], on_progress: Callable[[], None]) -> dict[str, Any]:
    """Write state.pt and flush it; returns the manifest's entries `files` and `tensors`."""
    with ThreadPoolExecutor(1) as pool, open(path, "wb") as raw:
        file = HashedFile(raw, pool, on_progress)
        try:
            torch.save(state, file)
        except RuntimeError:
            if file.error is None:
                raise
            raise file.error from None
        flush(raw)
    pieces = file.pieces()
    tensors = {
        name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": file.tensor_digest(tensor)}
        for name, tensor in named_tensors(state)
    }
    return {"files": {STATE: {"size": sum(size for size, _ in pieces), "pieces": pieces}}, "tensors": tensors}


def _move_into_place(temporary: Path, folder: Path, guard: Guard) -> None:
    """Give the temporary folder its name. Between two renames an older one is hidden: `clean_up` brings it back."""
    replaced = hidden_beside(folder, "replaced") if folder.exists() else None
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


def _require_whole(file: BinaryIO, manifest: dict[str, Any], folder: Path) -> None:
    expected = state_record(manifest, folder)
    size = os.fstat(file.fileno()).st_size
    if size != expected.size:
        raise ResumeRefused(f"checkpoint {folder}: {STATE} has {size} bytes: expected {expected.size}: it is damaged")
    starts = itertools.accumulate(expected.sizes, initial=0)
    for start, found, digest in zip(starts, file_digests(file, expected.sizes), expected.sha256, strict=False):
        if found != digest:
            raise ResumeRefused(
                f"checkpoint {folder}: {STATE} has not the content hash of the manifest from byte {start} on: "
                "it is damaged"
            )


def _load(file: BinaryIO, folder: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch makes of a file that is not ours is in the refusal
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ResumeRefused(
            f"checkpoint {folder}: {STATE} holds more than tensors and plain values: not loaded, none of its code ran"
        ) from None
    except MemoryError:
        raise CheckpointUnreadable(f"checkpoint {folder}: {STATE} does not fit into memory") from None
    except Exception as error:  # noqa: BLE001 (bytes made to mislead the loader make it raise anything)
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ResumeRefused(f"checkpoint {folder}: {STATE} cannot be loaded: {said}") from None


def _require_known_format(state: Any, parts: Sequence[str], folder: Path) -> None:
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if not isinstance(found, tuple | list) or tuple(found[:1]) != FORMAT[:1]:
        raise CheckpointUnreadable(f"checkpoint {folder}: format {found}: expected {FORMAT[0]}.x")
    missing = [part for part in parts if not isinstance(state.get(part), dict)]
    if missing:
        raise ResumeRefused(f"checkpoint {folder}: {STATE} has no {', '.join(missing)}: expected a checkpoint of ours")
