"""One checkpoint: a folder with state.pt and manifest.json, written whole or not at all, verified when it is read."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from topoflow.errors import MissingPath, ResumeRefused

FORMAT = (1, 0)
STATE, MANIFEST = "state.pt", "manifest.json"


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, with its dtype and shape."""
    host = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{host.dtype}{tuple(host.shape)}".encode())
    digest.update(host.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def named_tensors(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts, with its path: `optimizer/state/head.0.weight/exp_avg`."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from named_tensors(value, f"{path}/{key}" if path else str(key))


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the checkpoint `folder`; it exists only once it is whole and on the disk.

    The write goes to a temporary folder beside it, every file and folder is flushed, then renamed. A checkpoint of the
    same name is replaced.

    Raises:
        OSError: the file system refused; the temporary folder is removed and nothing else was touched.
    """
    temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        with open(temporary / STATE, "wb") as file:
            _save(state, file)
            _flush(file)
        with open(temporary / MANIFEST, "w", encoding="ascii") as file:
            file.write(
                _sign({"format": list(FORMAT), "step": state["progress"]["step"], **_contents(temporary, state)})
            )
            _flush(file)
        _flush_folder(temporary)
        replaced = folder.with_name(f".replaced-{folder.name}-{os.getpid()}")
        if folder.exists():
            os.rename(folder, replaced)
        try:
            os.rename(temporary, folder)
        except OSError:
            if replaced.exists():
                os.rename(replaced, folder)
            raise
        _flush_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint, after its manifest, sizes and content hashes have been verified. No code of it runs.

    Raises:
        MissingPath: no such folder.
        ResumeRefused: a missing, truncated or altered file, an unknown format, or a pickle with more than plain values.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingPath(f"checkpoint {folder}: not found")
    manifest = _read_manifest(folder / MANIFEST)
    path, expected = folder / STATE, manifest["files"][STATE]
    if not path.is_file():
        raise ResumeRefused(f"checkpoint {folder}: {STATE} is missing")
    if path.stat().st_size != expected["size"]:
        raise ResumeRefused(
            f"checkpoint {folder}: {STATE} has {path.stat().st_size} bytes: expected {expected['size']}: it is damaged"
        )
    digest = _file_digest(path)
    if digest != expected["sha256"]:
        raise ResumeRefused(
            f"checkpoint {folder}: the content hash of {STATE} is {digest[:12]}: expected {expected['sha256'][:12]}: "
            "it is damaged"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ResumeRefused(
            f"checkpoint {folder}: {STATE} holds more than tensors and plain values: not loaded, none of its code ran"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ResumeRefused(f"checkpoint {folder}: {STATE} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or tuple(state.get("format", ()))[:1] != FORMAT[:1]:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ResumeRefused(f"checkpoint {folder}: format {found}: expected {FORMAT[0]}.x")
    return state


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch's writer says so when the file takes no more bytes, and hides the cause
        raise OSError(errno.EIO, f"{str(error).splitlines()[0]} (is the disk full?)") from error


def _contents(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    path = folder / STATE
    tensors = {
        name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": tensor_digest(tensor)}
        for name, tensor in named_tensors(state)
    }
    return {"files": {STATE: {"size": path.stat().st_size, "sha256": _file_digest(path)}}, "tensors": tensors}


def _sign(manifest: dict[str, Any]) -> str:
    """The manifest as JSON text, with the hash of everything else in it as its last key."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps(
        {**manifest, "manifest_sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=False, indent=1
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ResumeRefused(f"checkpoint {path.parent}: {MANIFEST} is missing")
    text = path.read_bytes()
    try:
        manifest = json.loads(text)
        signature = manifest.pop("manifest_sha256")
        whole = _sign(manifest).encode() == text and json.loads(_sign(manifest))["manifest_sha256"] == signature
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ResumeRefused(f"checkpoint {path.parent}: {MANIFEST} does not match its own hash: it is damaged")
    return manifest


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
