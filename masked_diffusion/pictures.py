"""Latents and images -> uint8 pixels -> picture files."""

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from masked_diffusion.files import atomic_write

LEGIBLE_SIDE = 64  # smaller images are enlarged in grids
GAP = 4


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 1 or 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8; grey becomes RGB.

    By truncation of (x + 1) * 127.5 after clamping: the published FIDs were measured so, and rounding is half a level
    brighter.
    """
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """One picture of many images, row by row, on white; small images are enlarged until they can be read.

    images: (N, H, W, 3) uint8, N at least 1. columns: images per row; None makes a square.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    height, width = images.shape[1:3]
    enlarge = max(1, math.ceil(LEGIBLE_SIDE / min(height, width)))
    height, width = height * enlarge, width * enlarge
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    picture = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        row, column = divmod(i, columns)
        picture.paste(tile, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return picture


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def check_picture_path(path: Path) -> None:
    """Raise ValueError or FileNotFoundError, before a long computation, when no picture can be written there."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: pictures are written as .png or .jpg; change the name")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.absolute().parent} does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path}: no permission to write in {path.absolute().parent}")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG, by the name's suffix, atomically."""
    with atomic_write(path) as file:
        picture.save(file, FORMATS[path.suffix.lower()], quality=95)
