"""Compare chunk files that are read directly with zarr-python."""

import json
import warnings

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
import zarr.codecs

from topoflow.data.source import open_source
from topoflow.data.zarr_chunks import chunked_array

SHAPE = (23, 12, 10)
OF_FORMAT_3 = {
    "none": None,
    "zstd": zarr.codecs.ZstdCodec(level=3),
    "gzip": zarr.codecs.GzipCodec(level=5),
    "blosc lz4": zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "blosc zstd": zarr.codecs.BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", blocksize=4 * 40),
    "blosc, not shuffled": zarr.codecs.BloscCodec(cname="blosclz", clevel=9, shuffle="noshuffle", blocksize=4 * 130),
    "blosc, stored": zarr.codecs.BloscCodec(cname="lz4", clevel=0),
}
OF_FORMAT_2 = {
    "none": None,
    "zstd": numcodecs.Zstd(level=1),
    "zlib": numcodecs.Zlib(level=1),
    "lz4": numcodecs.LZ4(),
    "blosc": numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE),
}
POSITIONS = ([0], [22], [7], [3, 4, 5, 6, 7], [0, 5, 6, 22], list(range(23)))


def values(noisy=True):
    rng = np.random.default_rng(1)
    smooth = np.cumsum(np.ones(SHAPE, np.float32), axis=2)
    fields = smooth + (rng.standard_normal(SHAPE) if noisy else 0)
    return np.where(rng.random(SHAPE) < 0.1, np.nan, fields)


def assert_reads_as_zarr(array, folder):
    """Check hours one by one and together, bit for bit."""
    direct = chunked_array(array, folder)
    for positions in POSITIONS:
        expected = np.stack([array[position] for position in positions])
        read = direct.read(np.array(positions))
        assert read.dtype == array.dtype
        assert read.tobytes() == expected.tobytes()
    for position in range(SHAPE[0]):
        out = np.empty(SHAPE[1:], np.float32)
        direct.read_hour(position, out)
        assert out.tobytes() == array[position].astype(np.float32).tobytes()
    return direct


@pytest.mark.parametrize("chunks", [(1, 12, 10), (8, 12, 10), (30, 12, 10), (8, 5, 4)])
@pytest.mark.parametrize("codec", OF_FORMAT_3)
def test_every_compressor_of_format_3(tmp_path, codec, chunks):
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=chunks, dtype="float32", compressors=OF_FORMAT_3[codec], fill_value=np.nan
    )
    array[:] = values()
    assert_reads_as_zarr(array, tmp_path / "a")


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("codec", OF_FORMAT_2)
def test_every_compressor_of_format_2(tmp_path, codec, separator):
    array = zarr.create_array(
        tmp_path / "a",
        shape=SHAPE,
        chunks=(7, 12, 10),
        dtype="float64",
        compressors=OF_FORMAT_2[codec],
        fill_value=np.nan,
        zarr_format=2,
        chunk_key_encoding={"name": "v2", "separator": separator},
    )
    array[:] = values()
    assert_reads_as_zarr(array, tmp_path / "a")


def test_a_missing_chunk_is_the_fill_value(tmp_path):
    array = zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=(4, 12, 10), dtype="float32", fill_value=7.5)
    array[8:12] = 1.0
    direct = assert_reads_as_zarr(array, tmp_path / "a")
    assert direct.read(np.array([0]))[0, 0, 0] == 7.5


def test_only_the_blocks_of_the_hour_of_a_blosc_chunk_are_decoded(tmp_path):
    shape = (6, 64, 64)
    codec = zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=4 * 64 * 64)
    array = zarr.create_array(tmp_path / "a", shape=shape, chunks=shape, dtype="float32", compressors=codec)
    array[:] = np.arange(np.prod(shape)).reshape(shape)
    chunk = tmp_path / "a" / "c" / "0" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    starts = np.frombuffer(data, "<u4", 6, 16)
    assert len(set(starts.tolist())) == 6
    data[starts[5] :] = bytes(len(data) - int(starts[5]))
    chunk.write_bytes(data)
    out = np.empty(shape[1:], np.float32)
    chunked_array(array, tmp_path / "a").read_hour(4, out)
    np.testing.assert_array_equal(out.ravel(), np.arange(4 * 64 * 64, 5 * 64 * 64))
    with pytest.raises(RuntimeError):
        chunked_array(array, tmp_path / "a").read_hour(5, out)


def test_the_blocks_of_a_blosc_chunk_may_lie_in_any_order(tmp_path):
    """They do if several threads compressed them."""
    shape = (6, 64, 64)
    codec = zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=4 * 64 * 64)
    array = zarr.create_array(tmp_path / "a", shape=shape, chunks=shape, dtype="float32", compressors=codec)
    array[:] = np.cumsum(np.random.default_rng(0).integers(0, 9, shape), axis=2)
    chunk = tmp_path / "a" / "c" / "0" / "0" / "0"
    data = chunk.read_bytes()
    starts = np.frombuffer(data, "<u4", 6, 16)
    blocks = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    table, moved = np.zeros(6, "<u4"), b""
    for number in (3, 5, 0, 4, 2, 1):
        table[number] = 16 + 4 * 6 + len(moved)
        moved += blocks[number]
    before = array[:]
    chunk.write_bytes(data[:16] + table.tobytes() + moved)
    np.testing.assert_array_equal(array[:], before)  # numcodecs agrees
    direct, out = chunked_array(array, tmp_path / "a"), np.empty(shape[1:], np.float32)
    for hour in range(6):
        direct.read_hour(hour, out)
        np.testing.assert_array_equal(out, before[hour])
    np.testing.assert_array_equal(direct.read(np.arange(1, 5)), before[1:5])


@pytest.mark.parametrize("codec", ["none", "zstd", "blosc lz4", "blosc, stored"])
@pytest.mark.parametrize("cut", [0, 5, 17, 0.5, -1])
def test_a_chunk_that_is_cut_off_is_refused(tmp_path, codec, cut):
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=(23, 12, 10), dtype="float32", compressors=OF_FORMAT_3[codec]
    )
    array[:] = values()
    chunk = tmp_path / "a" / "c" / "0" / "0" / "0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises((RuntimeError, ValueError)):
        chunked_array(array, tmp_path / "a").read(np.arange(23))


@pytest.mark.parametrize(
    "options",
    [
        {"shards": (8, 12, 10), "chunks": (4, 12, 10)},
        {"dtype": "int16", "fill_value": 0},
        {"dtype": ">f4"},
        {"filters": [zarr.codecs.TransposeCodec(order=(1, 0, 2))]},
        {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]},
        {"zarr_format": 2, "filters": [numcodecs.Delta(dtype="f4")]},
        {"zarr_format": 2, "order": "F"},
        {"zarr_format": 2, "compressors": numcodecs.BZ2()},
    ],
)
def test_other_arrays_are_left_to_zarr(tmp_path, options):
    common = {"shape": SHAPE, "chunks": (4, 12, 10), "dtype": "float32", "fill_value": np.nan}
    array = zarr.create_array(tmp_path / "a", **{**common, **options})
    assert chunked_array(array, tmp_path / "a") is None


CODINGS = {
    "plain": ({}, True),
    "scaled": ({"scale_factor": 0.5, "dtype": "int16", "_FillValue": -99}, False),
    "offset": ({"add_offset": 10.0, "dtype": "float32"}, False),
    "marked": ({"_FillValue": -9999.0, "dtype": "float32"}, False),
    "float64": ({"dtype": "float64"}, True),
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("coding", CODINGS)
def test_encoded_values_are_decoded(make_fields, tmp_path, coding, zarr_format):
    dataset = make_fields(names=("u",))
    dataset["u"] = (dataset.u.dims, np.round(dataset.u.values), dataset.u.attrs)
    encoding, is_direct = CODINGS[coding]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.to_zarr(tmp_path / "a.zarr", encoding={"u": encoding}, zarr_format=zarr_format)
    source = open_source(str(tmp_path / "a.zarr"), ("u",), in_memory=False)
    assert ("u" in source._stores[0].arrays) is is_direct
    reference = xr.open_zarr(tmp_path / "a.zarr", chunks=None).u.values.astype(np.float32)
    np.testing.assert_array_equal(source.read("u", slice(None)), reference)
    np.testing.assert_array_equal(source.snapshot(("u",), 5)[0], reference[5])


def test_the_fill_value_of_format_2_marks_missing_values(make_fields, tmp_path):
    dataset = make_fields(names=("u",))
    dataset.to_zarr(tmp_path / "a.zarr", zarr_format=2)
    metadata = tmp_path / "a.zarr" / "u" / ".zarray"
    metadata.write_text(
        json.dumps({**json.loads(metadata.read_text()), "fill_value": float(dataset.u.values[0, 0, 1])})
    )
    (tmp_path / "a.zarr" / ".zmetadata").unlink()
    source = open_source(str(tmp_path / "a.zarr"), ("u",), in_memory=False)
    assert np.isnan(source.read("u", [0])[0, 0, 1])
    assert not np.isnan(dataset.u.values[0, 0, 1])
