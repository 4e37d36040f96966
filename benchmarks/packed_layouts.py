"""Reading one hour of a packed data set as a plain array and as Zarr of several layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from topoflow.data.zarr_chunks import chunked_array

from benchmarks.loading_data import DYNAMIC, DataSets
from topoflow.data.prepared.reader import PackedSource, index_packed

HOURS_OF_SHARD = 24


def hour_readers(data: DataSets, folder: Path, hours: int) -> dict[str, Callable[[int], np.ndarray]]:
    """Return {layout: function of the hour that returns all its fields [V, H, W], copied as for a batch}.

    The Zarr arrays hold the first `hours` hours, [time, variable, row, column] like the packed array.
    """
    import zarr
    import zarr.codecs

    source = PackedSource(index_packed(data.packed, DYNAMIC))
    out = np.empty((len(DYNAMIC), *data.shape), np.float32)

    def read_array(hour: int) -> np.ndarray:
        out[:] = source.hour(DYNAMIC, hour)
        return out

    fields = np.stack([source.hour(DYNAMIC, hour) for hour in range(hours)])
    one_hour = (1, *fields.shape[1:])
    layouts = {
        "Zarr, a chunk an hour": {"chunks": one_hour, "compressors": None},
        "Zarr, a chunk an hour, Blosc": {"chunks": one_hour, "compressors": zarr.codecs.BloscCodec(cname="lz4")},
        "Zarr, a shard a day": {
            "chunks": one_hour,
            "shards": (HOURS_OF_SHARD, *fields.shape[1:]),
            "compressors": None,
        },
    }
    readers: dict[str, Callable[[int], np.ndarray]] = {"plain array, mapped": read_array}
    for name, options in layouts.items():
        path = folder / f"{name.replace(' ', '-')}-{data.shape[0]}x{data.shape[1]}"
        array = zarr.create_array(path, shape=fields.shape, dtype="float32", fill_value=np.nan, **options)
        array[:] = fields
        readers[f"{name}, zarr-python"] = array.__getitem__
    # the same chunk files without zarr-python: as one plane of V * H rows
    flat = zarr.create_array(
        folder / f"flat-{data.shape[0]}x{data.shape[1]}",
        shape=(hours, len(DYNAMIC) * data.shape[0], data.shape[1]),
        chunks=(1, len(DYNAMIC) * data.shape[0], data.shape[1]),
        dtype="float32",
        fill_value=np.nan,
        compressors=None,
    )
    flat[:] = fields.reshape(flat.shape)
    direct = chunked_array(flat, folder / f"flat-{data.shape[0]}x{data.shape[1]}")
    assert direct is not None
    plane = np.empty(flat.shape[1:], np.float32)

    def read_direct(hour: int) -> np.ndarray:
        direct.read_hour(hour, plane)
        return plane

    readers["Zarr, a chunk an hour, read directly"] = read_direct
    for name, read in readers.items():
        np.testing.assert_array_equal(np.asarray(read(3)).reshape(fields[3].shape), fields[3], err_msg=name)
    return readers
