"""Rows of parquet files that are read at their places, without their group of rows."""

import io
import pickle
import tracemalloc

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from masked_diffusion.data import parquet_images, row_places
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.data.row_places import find_rows
from masked_diffusion.data.sources import Parquet, open_source

ROWS, GROUP = 24, 6
SHUFFLED = np.random.default_rng(0).permutation(4 * ROWS) % ROWS


def picture(seed, side=40, kind="JPEG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures():
    """From less than a block of snappy to several, and one that is there twice."""
    found = [picture(seed, side=(20, 180, 700)[seed % 3]) for seed in range(ROWS)]
    found[9] = found[7]
    assert min(map(len, found)) < 2000 and max(map(len, found)) > 3 * 2**16
    return found


def write(path, contents, **how):
    rows = [{"bytes": content, "path": f"{row:03d}.jpg"} for row, content in enumerate(contents)]
    parquet.write_table(pyarrow.table({"image": rows}), path, row_group_size=GROUP, **how)
    return str(path)


@pytest.fixture
def decoded(monkeypatch):
    """Row groups that were decoded, of data that do not stay in memory."""
    groups = []
    original = parquet.ParquetFile.read_row_group

    def read_row_group(self, group, *args, **kwargs):
        groups.append(group)
        return original(self, group, *args, **kwargs)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", read_row_group)
    monkeypatch.setattr(Parquet, "kept_bytes", 0)
    return groups


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compression": "none"},
        {"use_dictionary": False},
        {"use_dictionary": False, "compression": "none"},
        {"use_dictionary": False, "use_content_defined_chunking": True},
        {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}, "compression": "none"},
        {"data_page_version": "2.0"},
        {"data_page_version": "2.0", "use_dictionary": False, "compression": "none"},
        {"write_page_checksum": True, "write_page_index": True},
        {"compression": "zstd"},
        {"compression": "gzip", "use_dictionary": False, "write_batch_size": 2, "data_page_size": 1},
        {"compression": "brotli", "use_dictionary": False},
        {"compression": "zstd", "data_page_version": "2.0"},
    ],
    ids=str,
)
def test_each_group_is_decoded_once_and_then_read_row_by_row(pictures, tmp_path, decoded, how):
    source = open_source(write(tmp_path / "a.parquet", pictures, **how))
    for index in SHUFFLED:
        assert source.read(index) == pictures[index]
    assert sorted(decoded) == [0, 1, 2, 3]
    assert sum(places.nbytes for places in source._places.values()) == source._places_bytes > 0
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._places and copy.read(5) == pictures[5]


@pytest.mark.parametrize(
    "how", [{"compression": "lz4"}, {"data_page_version": "2.0", "use_dictionary": False}], ids=str
)
def test_what_cannot_be_read_row_by_row_is_decoded(pictures, tmp_path, decoded, how):
    source = open_source(write(tmp_path / "a.parquet", pictures, **how))
    for index in SHUFFLED:
        assert source.read(index) == pictures[index]
    assert len(decoded) > 40 and set(source._places.values()) == {None}


def test_pictures_that_are_smaller_for_being_compressed_are_decoded_with_their_group(tmp_path, decoded):
    flat = [picture(0, 200, "BMP")[:54] + bytes([row]) * 30_000 for row in range(ROWS)]
    source = open_source(write(tmp_path / "a.parquet", flat))
    for index in SHUFFLED:
        assert source.read(index) == flat[index]
    assert len(decoded) > 40
    small = open_source(write(tmp_path / "b.parquet", flat, compression="zstd"))
    del decoded[:]
    for index in SHUFFLED:
        assert small.read(index) == flat[index]
    assert len(decoded) == 4 and (tmp_path / "b.parquet").stat().st_size < 20_000


def test_rows_without_content_and_columns_of_plain_bytes_have_places(pictures, tmp_path, decoded):
    contents = [*pictures[:7], None, *pictures[8:]]
    source = open_source(write(tmp_path / "a.parquet", contents))
    parquet.write_table(pyarrow.table({"jpg": pictures}), tmp_path / "b.parquet", row_group_size=GROUP)
    plain = open_source(str(tmp_path / "b.parquet"))
    for index in SHUFFLED:
        assert plain.read(index) == pictures[index]
        if index == 7:
            with pytest.raises(UnreadableImageError, match=r"007.jpg: .*the row has no bytes"):
                source.read(index)
        else:
            assert source.read(index) == contents[index]
    assert sorted(decoded) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_few_places_are_kept_where_there_is_room_for_few(pictures, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(parquet_images, "_PLACES_BYTES", 600)
    source = open_source(write(tmp_path / "a.parquet", pictures))
    for index in SHUFFLED:
        assert source.read(index) == pictures[index]
        assert source._places_bytes == sum(places.nbytes for places in source._places.values()) <= 600
    assert 4 < len(decoded) < 90


def test_sets_that_stay_in_memory_need_no_places(pictures, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(Parquet, "kept_bytes", 2**29)
    source = open_source(write(tmp_path / "a.parquet", pictures))
    for index in SHUFFLED:
        assert source.read(index) == pictures[index]
    assert sorted(decoded) == [0, 1, 2, 3] and not source._places


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_a_file_that_was_damaged_since_is_decoded_to_say_so(pictures, tmp_path, decoded, compression):
    path = tmp_path / "a.parquet"
    source = open_source(write(path, pictures, compression=compression))
    for index in SHUFFLED:
        source.read(index)
    source._kept.clear()
    content = bytearray(path.read_bytes())
    content[10:-2000] = bytes(len(content) - 2010)
    with path.open("r+b") as file:  # as a disk damages it: the file that is open
        file.write(content)
    with pytest.raises(UnreadableImageError, match="its row group is damaged"):
        source.read(20)


def chunk_in(folder, contents, **how):
    """The column of images of one group of rows: what reads its file, its metadata, its values."""
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.table({"image": contents}), path, **how)
    content = path.read_bytes()
    values = [pyarrow.py_buffer(value) for value in contents]
    return lambda at, size: content[at : at + size], parquet.ParquetFile(path).metadata.row_group(0).column(0), values


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
def test_finding_the_rows_of_a_large_group_takes_its_own_size_in_memory_once(tmp_path, compression):
    contents = [np.random.default_rng(seed).bytes(2**20) for seed in range(16)]
    read, chunk, values = chunk_in(tmp_path, contents, compression=compression, write_batch_size=1)  # rows in a page
    row_places.find_rows(*chunk_in(tmp_path, contents[:1]))  # imports
    tracemalloc.start()
    try:
        assert find_rows(read, chunk, values) is not None
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 2**24
    finally:
        tracemalloc.stop()


def test_a_page_that_was_damaged_since_pyarrow_read_it_has_no_places(pictures, tmp_path):
    read, chunk, values = chunk_in(tmp_path, pictures[:GROUP])
    header = row_places._PageHeader(read(chunk.dictionary_page_offset, 1000))
    preamble = chunk.dictionary_page_offset + header.length  # the size that snappy says of the page

    def damaged(at, size):
        content = bytearray(read(at, size))
        if at <= preamble < at + size:
            content[preamble - at] ^= 1
        return bytes(content)

    assert find_rows(read, chunk, values) is not None and find_rows(damaged, chunk, values) is None


def test_places_that_do_not_give_what_pyarrow_read_are_not_used(pictures, tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", pictures[:GROUP])
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    content = (tmp_path / "a.parquet").read_bytes()

    def read(offset, length):
        return content[offset : offset + length]

    values = [pyarrow.py_buffer(value) for value in pictures[:GROUP]]
    assert find_rows(read, chunk, values) is not None
    assert find_rows(read, chunk, [pyarrow.py_buffer(bytes(3000)), *values[1:]]) is None
    zstd = chunk_in(tmp_path, pictures[:GROUP], compression="zstd")
    assert find_rows(*zstd) is not None
    long = pictures[1][:100] + bytes(len(pictures[1]) - 200) + pictures[1][-100:]  # alike at both ends
    assert find_rows(*zstd[:2], [pictures[0], pyarrow.py_buffer(long), *pictures[2:GROUP]]) is None
    original = row_places._block_bounds
    monkeypatch.setattr(row_places, "_block_bounds", lambda *args: [original(*args)[0] + 1, *original(*args)[1:]])
    assert find_rows(read, chunk, values) is None
