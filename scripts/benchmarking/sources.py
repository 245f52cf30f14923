"""The same images in each form that a data set may have, loaded in turn."""

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast
from unittest import mock

import numpy as np
import torch
from benchmarking.settings import Settings
from benchmarking.setup import common, make_jpegs, timed_in_turn

from masked_diffusion.data import image_files
from masked_diffusion.data.conversion import Conversion, Plan
from masked_diffusion.data.data_config import DataConfig
from masked_diffusion.data.image_writers import target_of
from masked_diffusion.data.parquet_images import Parquet
from masked_diffusion.data.source import ImageSource
from masked_diffusion.data.sources import open_images
from masked_diffusion.dist_util import Ranks
from masked_diffusion.image_datasets import SourceDataset, load_data

BY_PLACE = "parquet_by_place"


class _Forgetful(Parquet):
    """Parquet files of which no row group is kept, as in sets larger than memory: each image is read at its place or,
    where rows have none, with its whole group."""

    kept_bytes = 0

    def read(self, index: int) -> bytes:
        self._kept.clear()
        return super().read(index)


def sources(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Batches of JPEG files in a folder, and in turn with them of the same files in a zip and a tar archive, in parquet
    files, as datasets saves them, in a tar archive of which a block is fetched once, and of their pixels in arrays;
    without the random numbers of a training. Files are in the disk's cache."""
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        forms = make_forms(Path(root))
        stack.enter_context(in_a_bucket(Path(root)))

        def rounds(source: ImageSource) -> Callable[[], Any]:
            dataset = SourceDataset(source, DataConfig(class_cond=False), image_size=settings.image_size)
            batches = load_data(
                data_dir=source.data_dir,
                dataset=dataset,
                batch_size=settings.batch_size,
                image_size=settings.image_size,
            )
            stack.callback(batches.close)
            return lambda: next(batches)

        works = [rounds(source) for source in forms.values()]
        folder, *others = timed_in_turn(works, settings, torch.device("cpu"))
    fields = common(folder, torch.device("cpu"), settings.batch_size)
    for form, timing in zip(list(forms)[1:], others, strict=True):
        fields |= {**timing.fields(f"{form}_"), **folder.ratios(timing, f"{form}_speed")}
    return {**fields, "num_workers": 0, "dtype": "float32"}


class _LocalBucket:
    """Stands in for blobfile: a folder is the bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _local(self, path: str) -> Path:
        return self.folder / path.removeprefix("gs://bucket/")

    def BlobFile(self, path: str, mode: str, buffer_size: int = 0) -> IO[bytes]:  # noqa: N802
        return cast(IO[bytes], self._local(path).open(mode))

    def stat(self, path: str) -> SimpleNamespace:
        status = self._local(path).stat()
        return SimpleNamespace(size=status.st_size, mtime=status.st_mtime, version=None)


@contextlib.contextmanager
def in_a_bucket(folder: Path) -> Iterator[None]:
    """gs://bucket is a folder meanwhile, and blocks and lists are kept in it."""
    bucket = _LocalBucket(folder)
    with (
        mock.patch.object(image_files, "_blobfile", lambda path: bucket),
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "cache")}),
    ):
        yield


def saved_by_datasets(folder: Path, table: Any) -> ImageSource:
    """A folder as ``datasets.save_to_disk`` writes it."""
    import pyarrow

    folder.mkdir()
    with pyarrow.ipc.new_stream(folder / "data.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    state = {"_data_files": [{"filename": "data.arrow"}], "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return open_images(str(folder))


def make_forms(root: Path) -> dict[str, ImageSource]:
    """Sources of the same images, by form; parquet and what datasets saves where pyarrow is installed."""
    (root / "folder").mkdir()
    make_jpegs(root / "folder")
    forms = {"folder": open_images(str(root / "folder"))}
    dataset = SourceDataset(forms["folder"], image_size=1)
    for form in ("zip", "tar"):
        path = root / f"images.{form}"
        with contextlib.ExitStack() as stack:
            Conversion(dataset, target_of(str(path)), Plan(), stack).run(num_workers=0)
        forms[form] = open_images(str(path))
    if importlib.util.find_spec("pyarrow"):
        import pyarrow.parquet

        rows = [{"bytes": forms["folder"].read(i), "path": name} for i, name in enumerate(forms["folder"].names)]
        path = root / "images.parquet"
        table = pyarrow.table({"image": rows})
        pyarrow.parquet.write_table(table, path, row_group_size=100)  # as the hub has
        forms |= {"parquet": Parquet(str(path)), BY_PLACE: _Forgetful(str(path))}
        for codec in ("zstd", "gzip"):  # of which each image costs its page
            path = root / f"{codec}.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=100, compression=codec)
            forms[f"parquet_{codec}"] = _Forgetful(str(path))
        forms["saved"] = saved_by_datasets(root / "saved", table)
    with in_a_bucket(root):
        forms["remote_tar"] = open_images("gs://bucket/images.tar")
    pixels = [np.asarray(forms["folder"].picture(index)) for index in range(len(dataset))]
    np.savez(root / "images.npz", arr_0=np.stack(pixels))
    forms["npz"] = open_images(str(root / "images.npz"))
    return forms
