"""The same images in each form that a data set may have, loaded in turn."""

import contextlib
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking.settings import Settings
from benchmarking.setup import common, make_jpegs, timed_in_turn

from masked_diffusion.data.conversion import Conversion, Plan
from masked_diffusion.data.image_writers import target_of
from masked_diffusion.data.parquet_images import Parquet
from masked_diffusion.data.source import ImageSource
from masked_diffusion.data.sources import open_images
from masked_diffusion.dist_util import Ranks
from masked_diffusion.image_datasets import SourceDataset, load_data

UNKEPT = "parquet_group_per_image"


class _Forgetful(Parquet):
    """Parquet files of which no row group is kept: each image decodes a whole one, as in sets larger than memory."""

    def read(self, index: int) -> bytes:
        self._kept.clear()
        return super().read(index)


def sources(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Batches of JPEG files in a folder, and in turn with them of the same files in a zip and a tar archive and parquet
    files, and of their pixels in an array; without the random numbers of a training. Files are in the disk's cache."""
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        forms = make_forms(Path(root))

        def rounds(source: ImageSource) -> Callable[[], Any]:
            dataset = SourceDataset(source, image_size=settings.image_size, class_cond=False)
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
    fields = {**common(folder, torch.device("cpu")), "images_per_second": settings.batch_size / folder.median}
    for form, timing in zip(list(forms)[1:], others, strict=True):
        ratios = [a / b for a, b in zip(folder.cpu_seconds, timing.cpu_seconds, strict=True)]
        fields |= timing.fields(f"{form}_")
        fields |= {f"{form}_speed": folder.over(timing), f"{form}_speed_cpu": statistics.median(ratios)}
    return {**fields, "num_workers": 0, "dtype": "float32"}


def make_forms(root: Path) -> dict[str, ImageSource]:
    """Sources of the same images, by form; parquet where pyarrow is installed."""
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
        pyarrow.parquet.write_table(pyarrow.table({"image": rows}), path, row_group_size=100)  # as the hub has
        forms |= {"parquet": Parquet(str(path)), UNKEPT: _Forgetful(str(path))}
    pixels = [np.asarray(forms["folder"].picture(index)) for index in range(len(dataset))]
    np.savez(root / "images.npz", arr_0=np.stack(pixels))
    forms["npz"] = open_images(str(root / "images.npz"))
    return forms
