"""Verify a prepared data set: read it and compare it with its manifest."""

import hashlib
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from topoflow.data.prepared.days import read_days
from topoflow.data.prepared.manifest import FileRecord, Manifest, PreparedYear, read_manifest
from topoflow.errors import DataError
from topoflow.tools.prepare.year_writer import day_blocks, npy_header


def verify(folder: Path, progress: bool = True) -> tuple[Manifest, list[str]]:
    """Read everything in `folder` and compare it with its hashes.

    Returns the manifest and a line for each file or day that is damaged. DataError if the manifest itself is, or if
    there is none.
    """
    manifest = read_manifest(folder)
    damage = [text for text in [_damage_of_file(folder, manifest.static)] if text]
    with tqdm(
        total=sum(len(year.times) for year in manifest.years), desc="verify", unit="hour", disable=not progress
    ) as bar:
        for year in manifest.years:
            damage += _damage_of_year(folder, manifest, year, bar)
    return manifest, damage


def _damage_of_file(folder: Path, file: FileRecord) -> str | None:
    path = folder / file.name
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if hashlib.sha256(data).hexdigest() != file.sha256:
        return f"{path}: does not match its hash"
    return None


def _damage_of_year(folder: Path, manifest: Manifest, year: PreparedYear, bar: tqdm) -> list[str]:
    path, damage, days = folder / year.array.name, [], []
    try:
        days = read_days(folder / year.days.name, year.days.sha256)
    except DataError as error:
        damage.append(str(error))
    shape = (len(year.times), len(manifest.variables), *manifest.shape)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != year.array.size:
                damage.append(f"{path}: has {size} bytes: expected {year.array.size}")
            if file.read(year.header) != npy_header(shape, np.dtype(manifest.dtype)):
                damage.append(f"{path}: its header is not that of {manifest.dtype} in the shape {shape}")
            for day, damaged in day_blocks(file, shape[1:], manifest.dtype, days):
                if damaged:
                    damage.append(f"{path}: {', '.join(damaged)} of {day.day} do not match their hash")
                bar.update(day.hours)
    except OSError as error:
        damage.append(f"{path}: cannot be read: {error.strerror}")
    return damage
