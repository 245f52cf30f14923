"""Lists of many images as a run opens them, without the images: folder, archives, tables, and files of labels."""

import contextlib
import functools
import importlib.util
import io
import os
import shutil
import struct
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from benchmarking.cases import Child
from benchmarking.settings import INDEX_FORMS, Settings
from benchmarking.setup import Timing, common, memory_held, peak_memory

from masked_diffusion.data.image_files import LABELS_NAME
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.data.tar_images import Shard, keep_shard, kept_at
from masked_diffusion.data.zip_images import LOCAL_HEAD, LOCAL_MARK
from masked_diffusion.dist_util import Ranks
from masked_diffusion.image_datasets import open_dataset

CLASSES, SHARDS, TABLES, ROWS_OF_GROUP = 1000, 100, 10, 1000
NAMES_AT_ONCE = 100_000
MEMBER_HEAD, END = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s4H2LH")  # of a zip archive's directory
MEMBER_MARK, END_MARK = b"PK\x01\x02", b"PK\x05\x06"
MEASURED = ("building_bytes", "kept_bytes", "median_seconds", "cpu_seconds")


class _Image:
    """An entry of a folder: a file that is not there."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path

    def is_symlink(self) -> bool:
        return False

    def is_dir(self) -> bool:
        return False

    def is_file(self) -> bool:
        return True


def names_of(count: int, start: int, end: int) -> tuple[list[str], list[int]]:
    """Names of 33 letters of some of ``count`` images, and their labels: images of a class follow each other."""
    labels = [index * min(CLASSES, count) // count for index in range(start, end)]
    return [f"{label:08d}/{label:08d}_{start + index:010d}.JPEG" for index, label in enumerate(labels)], labels


def in_blocks(count: int, parts: int = 0) -> Iterator[tuple[list[str], list[int]]]:
    """The names and labels of all images, so many parts, or some at a time."""
    number = parts or -(-count // NAMES_AT_ONCE)
    edges = np.linspace(0, count, number + 1).astype(int).tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        yield names_of(count, start, end)


def write_labels(root: Path, count: int) -> None:
    """edm2's dataset.json in a folder, a CSV and JSON lines."""
    (root / "labelled").mkdir()
    with (
        (root / "labelled" / LABELS_NAME).open("w") as pairs,
        (root / "labels.csv").open("w") as table,
        (root / "labels.jsonl").open("w") as lines,
    ):
        pairs.write('{"labels": [')
        table.write("file,label\n")
        for number, (names, labels) in enumerate(in_blocks(count)):
            rows = [*zip(names, labels, strict=True)]
            pairs.write(", " * (number > 0) + ", ".join(f'["{name}", {label}]' for name, label in rows))
            table.writelines(f"{name},class {label:04d}\n" for name, label in rows)
            lines.writelines(f'{{"file": "{name}", "label": "class {label:04d}"}}\n' for name, label in rows)
        pairs.write("]}")


def write_zip(path: Path, count: int, labels: Path | None) -> None:
    """A zip archive with a directory of images that are not in it, and with a list of labels. zipfile would keep an
    object for each member."""

    def entry(name: str, crc: int, size: int) -> bytes:
        lengths = (len(name), 0, 0, 0, 0)
        return MEMBER_HEAD.pack(MEMBER_MARK, 20, 20, 0, 0, 0, 0, crc, size, size, *lengths, 0, 0) + name.encode()

    with path.open("wb") as archive:
        crc, size = 0, 0
        if labels is not None:
            with labels.open("rb") as file:
                while block := file.read(1 << 20):
                    crc, size = zlib.crc32(block, crc), size + len(block)
        name = LABELS_NAME if labels is not None else "empty.txt"
        archive.write(LOCAL_HEAD.pack(LOCAL_MARK, 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name.encode())
        if labels is not None:
            with labels.open("rb") as file:
                shutil.copyfileobj(file, archive)
        start = archive.tell()
        archive.write(entry(name, crc, size))
        for names, _ in in_blocks(count):
            archive.write(b"".join(entry(name, 0, 0) for name in names))
        # The number of members, which may be too large for its field, is not read.
        archive.write(END.pack(END_MARK, 0, 0, 0, 0, archive.tell() - start, start, 0))


def write_tars(folder: Path, count: int) -> None:
    """Archives without members, and lists of their images as a first start keeps them."""
    folder.mkdir()
    empty = io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty.txt"))
    for number, (names, labels) in enumerate(in_blocks(count, parts=min(SHARDS, count))):
        path = folder / f"{number:03d}.tar"
        path.write_bytes(empty.getvalue())
        status = path.stat()
        nothing = np.zeros(len(names), np.int64)
        shard = Shard(PathTable(names), nothing, nothing, PathTable(map(str, labels)))
        place = kept_at(str(path.resolve()))
        assert place is not None
        keep_shard(place, shard, [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])


def write_tables(folder: Path, count: int) -> None:
    import pyarrow.parquet

    folder.mkdir()
    for number, (names, labels) in enumerate(in_blocks(count, parts=min(TABLES, count))):
        images = pyarrow.StructArray.from_arrays(
            [pyarrow.array([b""] * len(names)), pyarrow.array(names)], ["bytes", "path"]
        )
        table = pyarrow.table({"image": images, "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{number:03d}.parquet", row_group_size=ROWS_OF_GROUP)


@contextlib.contextmanager
def standing_in(root: Path, count: int) -> Iterator[None]:
    """Meanwhile the folders of classes below ``root`` have their images, and lists are kept below it."""
    scandir, classes = os.scandir, min(CLASSES, count)

    def with_images(path: Any = ".") -> Any:
        folder = Path(path)
        if folder.parent.parent != root or not folder.name.isdigit():
            return scandir(path)
        label = int(folder.name)
        start, end = (-(-number * count // classes) for number in (label, label + 1))
        names = names_of(count, start, end)[0]
        return contextlib.nullcontext(_Image(name.rpartition("/")[2], f"{root}/{name}") for name in names)

    with (
        mock.patch.object(os, "scandir", with_images),
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(root / "cache")}),
    ):
        yield


def make_indexes(root: Path, count: int) -> list[str]:
    """Write all forms; parquet where pyarrow is installed. Returns their names."""
    write_labels(root, count)
    for folder in ("folder", "labelled"):
        for label in range(min(CLASSES, count)):
            (root / folder / f"{label:08d}").mkdir(parents=True)
    write_zip(root / "images.zip", count, None)
    write_zip(root / "labelled.zip", count, root / "labelled" / LABELS_NAME)
    with standing_in(root, count):
        write_tars(root / "tar", count)
    forms = list(INDEX_FORMS)
    if importlib.util.find_spec("pyarrow"):
        write_tables(root / "parquet", count)
    else:
        forms.remove("parquet")
    return forms


def index_of(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Open one of the forms that the index case wrote, as ``--data_dir`` and ``--labels_file`` do, once."""
    cpu, root = torch.device("cpu"), Path(settings.index_dir)
    if settings.index_form == "parquet":
        importlib.import_module("pyarrow.parquet")  # no part of what is measured
    data_dir, labels_file = INDEX_FORMS[settings.index_form]
    open_it = functools.partial(open_dataset, str(root / data_dir), image_size=settings.image_size)
    held = memory_held(cpu)
    with standing_in(root, settings.index_images):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        dataset = open_it(labels_file=str(root / labels_file) if labels_file else "")
        timing = Timing([time.perf_counter() - begin], peak_memory(cpu), [time.process_time() - begin_cpu])
    return {
        **common(timing, cpu, len(dataset)),
        "num_images": len(dataset),
        "num_classes": dataset.num_classes,
        "building_bytes": max(0, timing.peak_memory_bytes - held),
        "kept_bytes": memory_held(cpu) - held,
    }


def index(child: Child, settings: Settings) -> dict[str, Any]:
    """All forms of the same list of ``--index_images`` images, each opened in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        forms = make_indexes(root, settings.index_images)
        measured = {form: child("index_of", "--index_form", form, "--index_dir", str(root)) for form in forms}
    fields = {f"{form}_{name}": record[name] for form, record in measured.items() for name in MEASURED}
    return {**measured["folder"], **fields}
