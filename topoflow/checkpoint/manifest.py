"""manifest.json: what state.pt must be, by size and content hash, and its own hash."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topoflow.errors import ResumeRefused

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
