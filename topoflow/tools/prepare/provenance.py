"""Which files prepared data were made of, and by which recipe."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from topoflow.tools.prepare.files import file_states
from topoflow.tools.prepare.recipe import Recipe, recipe_text


def describe(recipe: Recipe, paths: Iterable[Path], before: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe and, of each file, its path, size and SHA-256; reads those that are new or have changed.

    paths: of the files with data; those with terrain, stations and so on are in the recipe.
    before: what this returned for data that are appended to, {} for none: its other files and recipes are kept.
    """
    named = [recipe.elevation, recipe.population, recipe.mask, *(source.stations for source in recipe.sources)]
    others = [Path(path) for path in named if path is not None and Path(path).is_file()]
    files = {file["path"]: file for file in before.get("files", [])}
    for path in {path.absolute() for path in (*paths, *others)}:
        files[str(path)] = _record(path, files.get(str(path)))
    text, earlier = recipe_text(recipe), list(before.get("earlier_recipes", []))
    if before.get("recipe", text) != text:
        earlier.append(before["recipe"])
    return {"recipe": text, "earlier_recipes": earlier, "files": [files[path] for path in sorted(files)]}


def _record(path: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """state: a hash of sizes and times of change. sha256: of a file; of a Zarr store, of the names and hashes in it."""
    state = hashlib.sha256("\n".join(file_states(path)).encode()).hexdigest()[:16]
    if before is not None and before["state"] == state:
        return before
    parts = [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())
    hashes = [_hash(part) for part in parts]
    if path.is_file():
        sha256 = hashes[0]
    else:
        names = [part.relative_to(path).as_posix() for part in parts]
        lines = "".join(f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True))
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
    size = sum(part.stat().st_size for part in parts)
    return {"path": str(path), "size": size, "sha256": sha256, "state": state}


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
