"""Settings of the data."""

from dataclasses import dataclass

from masked_diffusion.data.source import SourceOptions
from masked_diffusion.settings import setting


@dataclass(frozen=True)
class DataConfig(SourceOptions):
    """Which images, and what is done to them, see :func:`masked_diffusion.image_datasets.open_dataset`."""

    data_dir: str = setting(
        "", "images (folder, archive, array), latents (encode_latents.py), builtin:digits, builtin:shapes", "data"
    )
    class_cond: bool = setting(True, "use class labels", "data")
    class_from: str = setting("auto", "where class names come from: auto, folder or filename", "data")
    labels_file: str = setting("", "CSV or JSON lines with the columns file and label, in place of the names'", "data")
    random_flip: bool = setting(True, "mirror half of the images", "data")
    random_crop: bool = setting(False, "crop at random, as ADM does, instead of at the centre", "data")
    fast_decode: bool = setting(
        False, "decode and resize images by faster code; pixels differ slightly from the published crops'", "data"
    )
    grey: bool = setting(False, "read images as grey, one channel; with --vae_path none", "data")


# The fields that say where images and their classes are, for scripts that do with them something else than training.
READING = (
    "data_dir", "class_cond", "class_from", "labels_file", "image_column", "label_column", "max_image_bytes"
)  # fmt: skip
