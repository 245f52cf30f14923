"""Latents and images -> uint8 pixels -> picture files."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from masked_diffusion.files import atomic_write

LEGIBLE_SIDE = 64  # smaller images are enlarged in grids
GAP = 4
TEXT_SIZE = 14
FRAME_MS, LAST_FRAME_MS = 120, 2000  # of animations


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
    height, width = _tile_size(images)
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    picture = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        row, column = divmod(i, columns)
        picture.paste(tile, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return picture


def _tile_size(images: np.ndarray) -> tuple[int, int]:
    """Height and width of images (..., H, W, 3) as they are shown."""
    height, width = images.shape[-3:-1]
    enlarge = max(1, math.ceil(LEGIBLE_SIDE / min(height, width)))
    return height * enlarge, width * enlarge


def table(images: np.ndarray, row_names: Sequence[str], column_names: Sequence[str] = ()) -> Image.Image:
    """A grid with a name before every row and, where there are some, above every column.

    images: (R, C, H, W, 3) uint8. row_names: R. column_names: C or none.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    left = math.ceil(max(font.getlength(name) for name in row_names)) + 2 * GAP
    top = TEXT_SIZE + 2 * GAP if column_names else 0
    tiles = grid(images.reshape(-1, *images.shape[2:]), columns=images.shape[1])
    picture = Image.new("RGB", (left + tiles.width, top + tiles.height), "white")
    picture.paste(tiles, (left, top))
    draw = ImageDraw.Draw(picture)
    height, width = _tile_size(images)
    for row, name in enumerate(row_names):
        middle = top + GAP + row * (height + GAP) + height / 2
        draw.text((left - GAP, middle), name, fill="black", font=font, anchor="rm")
    for column, name in enumerate(column_names):
        middle = left + GAP + column * (width + GAP) + width / 2
        draw.text((middle, GAP), name, fill="black", font=font, anchor="mt")
    return picture


def heat_map(values: np.ndarray, limit: float) -> np.ndarray:
    """Numbers (..., H, W) -> colours (..., H, W, 3) uint8: white at 0, red at ``limit``, blue at its negative."""
    share = np.clip(values / limit, -1, 1)[..., None]
    red, blue = np.array([178, 24, 43]), np.array([33, 102, 172])
    end = np.where(share > 0, red, blue)
    return (255 + np.abs(share) * (end - 255)).round().astype(np.uint8)


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


ANIMATION = ".gif"


def check_picture_path(path: Path, animation: bool = False) -> None:
    """Raise ValueError or FileNotFoundError, before a long computation, when no picture can be written there.

    animation: whether it may be an animation as well, a .gif.
    """
    if path.suffix.lower() not in FORMATS and not (animation and path.suffix.lower() == ANIMATION):
        raise ValueError(f"{path}: pictures are written as .png or .jpg{' or .gif' * animation}; change the name")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.absolute().parent} does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path}: no permission to write in {path.absolute().parent}")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG, by the name's suffix, atomically, over a picture of this name."""
    with atomic_write(path) as file:
        file.write(encode_picture(picture, path))


def encode_picture(picture: Image.Image, path: Path) -> bytes:
    """A picture as a PNG or JPEG, by the suffix of the name that it will have."""
    file = io.BytesIO()
    picture.save(file, FORMATS[path.suffix.lower()], quality=95)
    return file.getvalue()


def encode_animation(frames: Sequence[Image.Image]) -> bytes:
    """A GIF that plays the frames again and again, resting on the last one."""
    file, durations = io.BytesIO(), [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file.getvalue()
