"""One checkpoint: a folder with state.pt and manifest.json, written whole or not at all, verified when it is read."""

import hashlib
import itertools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from topoflow.errors import CheckpointUnreadable, MissingPath, ResumeRefused
from topoflow.run_dir import Guard, discard, flush, flush_folder, hidden_beside

MANIFEST, STATE = "manifest.json", "state.pt"


@dataclass(frozen=True)
class FileRecord:
    """A file as the manifest has it: one piece after another, of these sizes and SHA-256."""

    sizes: list[int]
    sha256: list[str]

    @property
    def size(self) -> int:
        return sum(self.sizes)


def manifest_text(content: dict[str, Any]) -> str:
    """A manifest as JSON text, with the hash of everything else in it as its last key."""
    body = json.dumps(content, sort_keys=True)
    return json.dumps({**content, "manifest_sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: format, step, files, tensors {name: dtype, shape, sha256}.

    Raises:
        ResumeRefused: it is missing, or not what its own hash says.
        OSError: it cannot be read.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ResumeRefused(f"checkpoint {folder}: {MANIFEST} is missing") from None
    try:
        content = json.loads(text)
        del content["manifest_sha256"]
        # the text itself is compared: a byte that JSON does not mind is found too
        whole = manifest_text(content).encode() == text
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ResumeRefused(f"checkpoint {folder}: {MANIFEST} does not match its own hash: it is damaged")
    return content


def state_record(manifest: dict[str, Any], folder: Path) -> FileRecord:
    """What the manifest says about state.pt. Format 1.0 had one hash for the whole file.

    Raises:
        ResumeRefused: it says nothing that could be checked.
    """
    try:
        entry = manifest["files"][STATE]
        pieces = entry["pieces"] if "pieces" in entry else [(entry["size"], entry["sha256"])]
        sizes, digests = zip(*pieces, strict=True)
        understood = min(sizes) > 0 and sum(sizes) == entry["size"]
    except (KeyError, TypeError, ValueError):
        understood = False
    if not understood:
        raise ResumeRefused(f"checkpoint {folder}: {MANIFEST} does not say what {STATE} must be")
    return FileRecord(list(sizes), list(digests))


_BLOCK_BYTES = 2**20
_WORTH_A_PIECE = 2**16

Piece = tuple[int, str]
"""So many bytes of a file, and their SHA-256."""


class HashedFile:
    """A file that is being written, and the SHA-256 of each piece of it: a piece is one large write, or all small ones
    between two large ones. A thread of `pool` hashes the bytes while the operating system takes them.

    torch.save writes each storage at once, straight from its memory, so the hash of a piece is that of a tensor too.
    """

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor, on_progress: Callable[[], None]):
        self._file, self._pool, self._on_progress = file, pool, on_progress
        self._pieces: list[Piece] = []
        self._by_address: dict[int, Piece] = {}
        self._small, self._small_size = hashlib.sha256(), 0
        self.error: OSError | None = None
        """What the operating system said; torch's writer hides it behind an error of its own."""

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash `data`."""
        view = memoryview(data).cast("B")
        is_small = len(view) < _WORTH_A_PIECE
        hashing = None if is_small else self._pool.submit(_digest, view)
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        finally:
            # before we return: then the memory is the caller's again
            digest = None if is_small else hashing.result()
        if is_small:
            self._small.update(view)
            self._small_size += len(view)
        else:
            self._end_small()
            self._pieces.append((len(view), digest))
            self._by_address[np.frombuffer(view, np.uint8).ctypes.data] = self._pieces[-1]
            self._on_progress()
        return len(view)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._file.flush()

    def pieces(self) -> list[Piece]:
        """What was written, piece by piece."""
        self._end_small()
        return self._pieces

    def tensor_digest(self, tensor: torch.Tensor) -> str:
        """SHA-256 of a tensor's bytes, taken from what was written where that is the tensor's own memory."""
        size, digest = self._by_address.get(tensor.data_ptr(), (-1, ""))
        if size == tensor.nbytes and tensor.is_contiguous():
            return digest
        return _digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def _end_small(self) -> None:
        if self._small_size:
            self._pieces.append((self._small_size, self._small.hexdigest()))
        self._small, self._small_size = hashlib.sha256(), 0


def file_digests(file: BinaryIO, sizes: Sequence[int]) -> list[str]:
    """SHA-256 of the pieces of a file that have these sizes, read and hashed by several threads."""
    descriptor = file.fileno()

    def digest(start: int, size: int) -> str:
        piece, block = hashlib.sha256(), memoryview(bytearray(min(size, _BLOCK_BYTES)))
        position, end = start, start + size
        while position < end:
            count = os.preadv(descriptor, [block[: end - position]], position)
            if count == 0:
                break  # shorter than it should be: the hash will tell
            piece.update(block[:count])
            position += count
        return piece.hexdigest()

    starts = itertools.accumulate(sizes, initial=0)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, starts, sizes))


def _digest(data: memoryview | np.ndarray) -> str:
    return hashlib.sha256(data).hexdigest()


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
        RunDirectoryError: `guard` refused, see `topoflow.run_dir`; likewise.
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
