"""Draw pictures that compare: samples of several settings, states of the denoising, filled masks, biases."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from masked_diffusion.data.dataset import ImageDataset
from masked_diffusion.files import write_beside_former
from masked_diffusion.models.tokens import num_kept_tokens
from masked_diffusion.randomness import numpy_generator
from masked_diffusion.runs.trained import Trained
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.inpainting import Inpainting, Photo, SideInterpolation, encode_mean, no_interpolater
from masked_diffusion.sampling.pictures import (
    ANIMATION,
    LEGIBLE_SIDE,
    encode_animation,
    encode_picture,
    grid,
    heat_map,
    table,
    to_uint8,
)

BATCH_SIZE = 20
GIF_FRAMES = 25


@dataclass(frozen=True)
class Row:
    """Samples number 0, 1, ... of one setting, so that the i-th of every row has the same noise.

    name: of the setting. labels: of the samples. photo: what is filled with them, by ``inpainting``.
    """

    name: str
    make: ImageSampler
    labels: list[int]
    inpainting: Inpainting | None = None
    photo: Photo | None = None

    def trajectory(self, frames: int) -> np.ndarray:
        """(frames, N, H, W, 3) uint8: states of the denoising, the last one finished."""
        parts = []
        for start in range(0, len(self.labels), BATCH_SIZE):
            labels = self.labels[start : start + BATCH_SIZE]
            indices = range(start, start + len(labels))
            images = self.make.trajectory(indices, labels, frames, self.inpainting)
            parts.append(images if self.photo is None else self.photo.paste_around(images))
        return np.concatenate(parts, axis=1)

    def watch(self, frames: int) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """Sample at most ``BATCH_SIZE`` labels step by step: number of the step, number of steps, and images.

        images: (N, H, W, 3) uint8 of ``frames`` evenly spaced states, the last one finished; None for the others.
        """
        [steps] = self.make.shown_steps(1)
        shown, indices = self.make.shown_steps(min(frames, steps)), range(len(self.labels))
        for step, state in enumerate(self.make.states(indices, self.labels, self.inpainting), start=1):
            images = None
            if step in shown:
                images = self.make.pixels(state.sample, indices)
                images = images if self.photo is None else self.photo.paste_around(images)
            yield step, steps, images


def parse_sweep(text: str, settings: Sequence[str]) -> tuple[str, list[str]]:
    """``cfg_scale=1,2,4`` -> (``cfg_scale``, [``1``, ``2``, ``4``]).

    settings: those that can be swept over. Raises ValueError for others and for an empty list.
    """
    name, _, values = text.partition("=")
    if name not in settings:
        raise ValueError(f"--sweep {text}: {name!r} cannot be swept over; choose one of {', '.join(settings)}")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not found:
        raise ValueError(f"--sweep {text}: give the values, such as --sweep cfg_scale=1,2,4")
    return name, found


def num_frames(frames: int, out: Path, swept: bool) -> int:
    """States to show of every sample. frames: those asked for; 0 means the finished one, or many in a GIF.

    Raises ValueError for a number that the picture has no room for.
    """
    if frames < 0:
        raise ValueError(f"--frames {frames}: must not be negative")
    animated = out.suffix.lower() == ANIMATION
    if swept and frames and not animated:
        raise ValueError(f"--frames {frames} and --sweep: only an animation has room for both; name --out .gif")
    return frames or (GIF_FRAMES if animated else 1)


def draw(rows: Sequence[Row], frames: int, columns: int | None, class_names: Sequence[str], out: Path) -> list[Path]:
    """Sample and save a grid of one row's samples, a strip of their states, a table of several rows, or a GIF.

    columns: of a grid; None makes a square. class_names: of the labels; those that are missing are shown as numbers.
    Returns where another picture of the name ``out`` was moved to, if there was one.
    """
    images = np.stack([row.trajectory(frames) for row in rows])  # (R, F, N, H, W, 3)

    def still(frame: int) -> Image.Image:
        if len(rows) > 1:
            return table(images[:, frame], [row.name for row in rows])
        return grid(images[0, frame], columns)

    if out.suffix.lower() == ANIMATION:
        return write_beside_former(out, encode_animation([still(frame) for frame in range(frames)]))
    if frames > 1:
        names = [class_names[label] if label < len(class_names) else str(label) for label in rows[0].labels]
        steps = [f"step {number}" for number in rows[0].make.shown_steps(frames)]
        return write_beside_former(out, encode_picture(table(images[0].swapaxes(0, 1), names, steps), out))
    return write_beside_former(out, encode_picture(still(0), out))


MASKED_GREY = 128


@dataclass(frozen=True)
class MaskedInputs:
    """Images of the data with random tokens masked, as in training.

    pixels: (N, H, W, 3) uint8. masked: (N, H, W, 1) bool. labels: N. known: (N, C, h, w) latents. hole: (N, 1, h, w).
    """

    pixels: np.ndarray
    masked: np.ndarray
    labels: list[int]
    known: Tensor
    hole: Tensor
    side: SideInterpolation


def masked_inputs(
    trained: Trained, dataset: ImageDataset, num_images: int, mask_ratio: float, seed: int, device: torch.device | str
) -> MaskedInputs:
    """``num_images`` images (or all), evenly spaced in the data. seed: with an image's index, determines its mask.

    Raises ValueError where the model cannot interpolate or the ratio keeps no token.
    """
    model, config = trained.model, trained.config
    if reason := no_interpolater(model, config):
        raise ValueError(f"--model_path {trained.path}: {reason}; give an MDT or MDTv2 that was trained with masking")
    num_keep, grid_size = num_kept_tokens(model.num_tokens, mask_ratio), math.isqrt(model.num_tokens)
    indices = np.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).round().astype(int).tolist()
    noise = np.stack([numpy_generator(seed, "mask", index).random(model.num_tokens) for index in indices])
    squares = torch.from_numpy(noise.argsort(axis=1).argsort(axis=1) >= num_keep).view(-1, 1, grid_size, grid_size)
    images = torch.from_numpy(np.stack([dataset.load(index) for index in indices])).to(device)
    return MaskedInputs(
        to_uint8(images),
        enlarged(squares, config.model.image_size // grid_size).permute(0, 2, 3, 1).numpy(),
        dataset.labels[indices].tolist(),
        encode_mean(trained.first_stage, images),
        enlarged(squares, model.patch_size).to(device),
        SideInterpolation.of(model),
    )


def reconstruction(inputs: MaskedInputs, make: ImageSampler) -> Image.Image:
    """Draw a column for each image: itself, masked, and filled in both modes."""
    rows = [inputs.pixels, np.where(inputs.masked, np.uint8(MASKED_GREY), inputs.pixels)]
    for side in (inputs.side, None):
        inpainting = Inpainting(inputs.known, inputs.hole, side)
        filled = make(range(len(inputs.labels)), inputs.labels, inpainting)
        rows.append(np.where(inputs.masked, filled, inputs.pixels))
    return table(np.stack(rows), ["image", "masked", "side", "plain"])


def enlarged(squares: Tensor, factor: int) -> Tensor:
    """(N, 1, h, w) -> (N, 1, h factor, w factor), each value repeated."""
    return squares.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


BIAS_TABLE = ".attn.rel_pos_bias.relative_position_bias_table"
UNUSED_ROWS = 3  # of the table, see models.RelativePositionBias


def relative_bias(state: Mapping[str, Tensor], path: Path) -> tuple[Image.Image, float]:
    """Draw heat maps of the learned position biases, one row per block, one column per head.

    In each map the middle is a token's bias towards itself, and above it are those towards tokens above it.
    state: of a model; path: its file, for the message. Returns the picture, and the bias that is shown as full colour.
    Raises ValueError for a model without biases, such as DiT.
    """
    tables = {name.removesuffix(BIAS_TABLE): values for name, values in state.items() if name.endswith(BIAS_TABLE)}
    if not tables:
        raise ValueError(f"{path}: this model has no relative-position biases; give an MDT's or MDTv2's file")
    maps = []
    for values in tables.values():
        offsets = values[:-UNUSED_ROWS].float().T  # (heads, (2 grid_size - 1)^2)
        side = math.isqrt(offsets.shape[1])
        # The table counts from the token that is looked at to the one that looks, a picture the other way.
        maps.append(offsets.reshape(-1, side, side).flip(1, 2).numpy())
    biases = np.stack(maps)  # (blocks, heads, side, side)
    limit = max(float(np.abs(biases).max()), 1e-12)
    factor = math.ceil(LEGIBLE_SIDE / biases.shape[-1])
    colours = heat_map(biases, limit).repeat(factor, axis=2).repeat(factor, axis=3)
    heads = [f"head {i + 1}" for i in range(biases.shape[1])]
    return table(colours, list(tables), heads), limit
