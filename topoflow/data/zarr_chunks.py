"""Zarr arrays whose chunk files are read and decoded directly, without the cost of zarr-python at every read.

zarr-python spends half a millisecond on each read, whatever its size: ten times what it takes to read and decode a
field of 32 x 64 cells. Most stores (one file per chunk, little-endian numbers, at most one compressor) are simple
enough to read here; everything else is read by xarray.
"""

import functools
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import zarr

_BLOSC_HEADER = struct.Struct("<4B3I")
"""Version, version of the format of blocks, flags, item size; bytes decoded, in a block, encoded (c-blosc, README_CHUNK
FORMAT)."""
_BLOSC_STORED = 0x2
_COMPRESSORS = ("zstd", "gzip", "zlib", "lz4", "blosc")


@dataclass(frozen=True)
class ChunkedArray:
    """A numeric array over (time, rows, columns) in chunk files: a value that another process can be sent.

    folder: of the array. shape, chunks: cells over the three dimensions. dtype: of the files, such as "<f4".
    fill_value: of chunks that are not there. key: name of a chunk's file, with {} for its three numbers. codec: what
    numcodecs calls the compressor; None where chunks are not compressed.
    """

    folder: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill_value: float
    key: str
    codec: str | None

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Values [n, H, W] at the increasing positions `indices` [n] along time, in the type of the files.

        Raises OSError, and ValueError or RuntimeError for a chunk that cannot be decoded.
        """
        values = np.empty((len(indices), *self.shape[1:]), self.dtype)
        chunk_of = indices // self.chunks[0]
        for number in np.unique(chunk_of):
            wanted = np.flatnonzero(chunk_of == number)
            within = indices[wanted] - number * self.chunks[0]
            first, last = int(within[0]), int(within[-1]) + 1
            for rows, columns, place in self._spatial_chunks():
                part = self._read_hours((int(number), *place), first, last)
                part = part[within - first, : rows.stop - rows.start, : columns.stop - columns.start]
                values[wanted[0] : wanted[-1] + 1, rows, columns] = part
        return values

    def read_hour(self, position: int, out: np.ndarray) -> None:
        """Put the values at `position` along time into `out` [H, W]; raises as `read` does."""
        number, hour = divmod(position, self.chunks[0])
        if self.chunks[1:] == self.shape[1:]:
            out[:] = self._read_hours((number, 0, 0), hour, hour + 1)[0]
        else:
            out[:] = self.read(np.array([position]))[0]

    def _spatial_chunks(self) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
        (_, height, width), (_, rows, columns) = self.shape, self.chunks
        for i in range(-(-height // rows)):
            for j in range(-(-width // columns)):
                yield (
                    slice(i * rows, min((i + 1) * rows, height)),
                    slice(j * columns, min((j + 1) * columns, width)),
                    (i, j),
                )

    def _read_hours(self, place: tuple[int, int, int], first: int, last: int) -> np.ndarray:
        """Hours [first, last) of the chunk at `place`: [last - first, rows, columns] of a whole chunk."""
        hours, rows, columns = self.chunks
        size = np.dtype(self.dtype).itemsize * rows * columns
        try:
            descriptor = os.open(f"{self.folder}/{self.key.format(*place)}", os.O_RDONLY)
        except FileNotFoundError:
            return np.full((last - first, rows, columns), self.fill_value, self.dtype)
        try:
            data = self._decode(descriptor, first * size, last * size, hours * size)
        finally:
            os.close(descriptor)
        if len(data) != (last - first) * size:
            raise ValueError(f"a chunk ends early: expected {hours * size} bytes")
        return np.frombuffer(data, self.dtype).reshape(last - first, rows, columns)

    def _decode(self, descriptor: int, begin: int, end: int, size: int) -> Any:
        """Bytes [begin, end) of the `size` bytes that the open chunk file holds when decoded."""
        if self.codec is None:
            return os.pread(descriptor, end - begin, begin)
        if self.codec == "blosc":
            return _read_blosc(descriptor, begin, end, size)
        decoded = _decompressor(self.codec)(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        if len(decoded) != size:
            raise ValueError(f"a chunk has {len(decoded)} bytes: expected {size}")
        return memoryview(decoded)[begin:end]


@functools.cache
def _decompressor(codec: str) -> Callable[[bytes], Any]:
    import numcodecs

    return numcodecs.get_codec({"id": codec}).decode


def chunked_array(array: "zarr.Array", folder: Path) -> ChunkedArray | None:
    """Return the opened `array`, whose files are in `folder`; None if it cannot be read directly.

    The result describes the stored values. Whether these need decoding is for the caller to check.
    """
    dtype, compressors, serializer = array.dtype.str, array.compressors, array.serializer
    is_plain = array.shards is None and not array.filters and array.order == "C" and len(compressors) <= 1
    if serializer is not None:  # of format 3
        transformers = array.metadata.storage_transformers  # pyright: ignore[reportAttributeAccessIssue]  (format 3 has it)
        is_plain &= serializer.to_dict()["name"] == "bytes" and not transformers
    names = [_codec_name(compressor) for compressor in compressors]
    if not is_plain or dtype not in ("<f4", "<f8") or array.ndim != 3 or array.fill_value is None:
        return None
    if any(name not in _COMPRESSORS for name in names):
        return None
    key = re.sub(r"\d+", "{}", array.metadata.encode_chunk_key((1, 2, 3)))
    fill_value = float(array.fill_value)
    return ChunkedArray(str(folder), array.shape, array.chunks, dtype, fill_value, key, names[0] if names else None)


def _codec_name(compressor: Any) -> str:
    """Return the name of a compressor: in format 2 that of numcodecs, in format 3 that of the format."""
    return getattr(compressor, "codec_id", None) or compressor.to_dict()["name"]


def _read_blosc(descriptor: int, begin: int, end: int, size: int) -> Any:
    """Bytes [begin, end) of what a Blosc file of `size` decoded bytes holds: only the blocks that have them are read.

    Blosc compresses blocks for themselves and has a table of where they begin. A header, a table and some of the blocks
    are a Blosc buffer again, which numcodecs decodes.
    """
    import numcodecs.blosc

    head = os.pread(descriptor, _BLOSC_HEADER.size, 0)
    if len(head) < _BLOSC_HEADER.size:
        raise ValueError("a chunk ends early: expected a Blosc header")
    version, block_version, flags, itemsize, decoded, block, encoded = _BLOSC_HEADER.unpack(head)
    if decoded != size or encoded != os.fstat(descriptor).st_size or not block:
        raise ValueError(f"a chunk of {decoded} bytes in {encoded}: expected {size}, and the size of its file")
    if flags & _BLOSC_STORED:
        return os.pread(descriptor, end - begin, len(head) + begin)
    count = -(-decoded // block)
    starts = np.frombuffer(os.pread(descriptor, 4 * count, len(head)), "<u4")
    first, last = begin // block, -(-end // block)
    if first == 0 and last == count:
        return memoryview(numcodecs.blosc.decompress(os.pread(descriptor, encoded, 0)))[begin:end]
    ends = np.append(np.sort(starts), encoded)  # blocks may lie in any order
    table, pieces, position = [], [], len(head) + 4 * (last - first)
    for start in map(int, starts[first:last]):
        piece = os.pread(descriptor, int(ends[np.searchsorted(ends, start, side="right")]) - start, start)
        table.append(position)
        pieces.append(piece)
        position += len(piece)
    length = min(last * block, decoded) - first * block
    header = _BLOSC_HEADER.pack(version, block_version, flags, itemsize, length, block, position)
    buffer = b"".join([header, np.array(table, "<u4").tobytes(), *pieces])
    return memoryview(numcodecs.blosc.decompress(buffer))[begin - first * block : end - first * block]
