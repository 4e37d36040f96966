"""Chunks of Zarr arrays that were never written, where zarr reads the fill value, or were cut.

numcodecs reads past the end of a cut Blosc chunk (0.16.6: it trusts the length in the chunk's header), and returns what
is in memory there.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.codecs import BloscCodec

_BLOSC_HEADER = struct.Struct("<12xI")
"""16 bytes, the last four of which are the length of the whole (c-blosc, README_CHUNK_FORMAT.rst)."""


def written_chunks(folder: Path, array: Any) -> np.ndarray:
    """Return which chunks of a zarr array exist, bool [number of chunks along each dimension].

    folder: of the array. The chunks of a sharded array are its shards: one file holds each.
    """
    files = {file.relative_to(folder).as_posix() for file in _files(folder)}
    counts = tuple(-(-size // step) for size, step in zip(array.shape, stored_chunks(array), strict=True))
    written = np.zeros(counts, bool)
    for place in np.ndindex(counts):
        written[place] = array.metadata.encode_chunk_key(place) in files
    return written


def cut_chunks(folder: Path, array: Any) -> list[Path]:
    """Return the files of Blosc chunks in an array's folder that are shorter than their headers say."""
    compressors = array.compressors
    if array.shards or not compressors or not isinstance(compressors[-1], BloscCodec | numcodecs.blosc.Blosc):
        return []
    metadata = ("zarr.json", ".zarray", ".zattrs")
    return [file for file in _files(folder) if file.name not in metadata and _is_cut(file)]


def _is_cut(file: Path) -> bool:
    with open(file, "rb") as opened:
        header = opened.read(_BLOSC_HEADER.size)
        size = os.fstat(opened.fileno()).st_size
    return len(header) < _BLOSC_HEADER.size or size < _BLOSC_HEADER.unpack(header)[0]


def _files(folder: Path) -> list[Path]:
    """Return the files under an array's folder, without those that a program left hidden."""
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(file for file in files if not file.name.startswith("._"))


def stored_chunks(array: Any) -> tuple[int, ...]:
    """Return the shape of what one file of a zarr array holds."""
    return array.shards or array.chunks


def without_unwritten(variable: xr.Variable, chunks: tuple[int, ...], written: np.ndarray) -> xr.Variable:
    """Return a variable, still unread, that is NaN in chunks that were not written; its type is a floating one."""
    lazy = indexing.LazilyIndexedArray(_WrittenParts(variable, chunks, written))
    return xr.Variable(variable.dims, lazy, variable.attrs, variable.encoding)


class _WrittenParts(BackendArray):
    """Values of a variable, NaN in chunks that were not written. What xarray asks of an array that reads lazily."""

    def __init__(self, variable: xr.Variable, chunks: tuple[int, ...], written: np.ndarray):
        self._variable, self._chunks, self._written = variable, chunks, written
        self.shape = variable.shape
        self.dtype = np.result_type(variable.dtype, np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        values = self._variable[key].values.astype(self.dtype)
        places = [np.arange(size)[part] // step for size, part, step in zip(self.shape, key, self._chunks, strict=True)]
        # an integer in `key` drops its dimension: of size 1 in the mask, gone in the values
        written = self._written[np.ix_(*map(np.atleast_1d, places))].reshape(values.shape)
        return np.where(written, values, np.nan)
