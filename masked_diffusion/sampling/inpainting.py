"""Fill a region of an image with a trained model, with or without MDT's side-interpolater (2303.14389).

Inpainting wraps the model that a sampler is given, guided or not, so every sampler and guidance works with it. Before
each prediction it sets the known region of x_t to the known latents at that noise level; after it, it sets their
estimate of x_0 to the known latents. So the known latents come out as they went in.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masked_diffusion.data.image_files import read_image
from masked_diffusion.diffusion.guidance import Denoiser
from masked_diffusion.diffusion.objectives import Objective
from masked_diffusion.diffusion.samplers import Predict, RandnLike, Step, StepFunction
from masked_diffusion.first_stage import FirstStage, PixelSpace
from masked_diffusion.image_datasets import center_crop_arr, to_model_range
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.tokens import Draw, KeptTokens
from masked_diffusion.randomness import SampleNoise
from masked_diffusion.runs.config import RunConfig

MODES = ("side", "plain")
WHITE_FROM = 128  # grey level of a mask from which a pixel is to be filled


@dataclass(frozen=True)
class SideInterpolation:
    """How a model's side-interpolater fills a hole.

    patch_size: side of a token's square of latents. halves: mask one random half of the hole at a time, in two passes,
    each token taking the prediction of the pass that saw it; else the whole hole in one pass.
    """

    patch_size: int
    halves: bool

    @classmethod
    def of(cls, model: LatentTransformer) -> "SideInterpolation":
        """What fits a model: the whole hole at once where its decoder sees the masked tokens' latents, too.

        Elsewhere the noise of a masked token cannot be predicted, and the prediction of it is near zero.
        """
        return cls(model.patch_size, halves=not model.decoder_sees_all)


@dataclass(frozen=True)
class Inpainting:
    """Known latents and the hole in them.

    known: (N or 1, C, h, w). hole: (N or 1, 1, h, w) bool, True where to fill. side: mask the tokens that touch the
    hole, and interpolate them; None gives all tokens to the encoder. With it, each row needs the same number of such
    tokens.
    """

    known: Tensor
    hole: Tensor
    side: SideInterpolation | None = None

    def denoiser(self, model: Denoiser, draws: SampleNoise) -> Denoiser:
        """The model with the side-interpolater, or as it is. draws: of the samples, for their halves of the hole."""
        if self.side is None:
            return model
        hole_tokens = F.max_pool2d(self.hole.float(), self.side.patch_size).flatten(1).bool()
        if not self.side.halves:
            return interpolated_at_once(model, hole_tokens)
        return interpolated_by_halves(model, hole_tokens, self.side.patch_size, draws)

    def hold(self, objective: Objective, x_t: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Set the known region of x_t to the known latents at a level. noise: (N, C, h, w), the same at all levels.

        One noise for all steps is the path of the ODE through the known latents, which solvers stay on.
        """
        return torch.where(self.hole, x_t, objective.q_sample(self.known.expand_as(noise), level, noise))

    def predictor(
        self,
        objective: Objective,
        denoiser: Denoiser,
        noise: Tensor,
        clip_denoised: bool,
        model_kwargs: dict[str, Any],
    ) -> Predict:
        """``objective.predictor`` with the known region held. noise: as of :meth:`hold`."""

        def fill(pred_xstart: Tensor) -> Tensor:
            return torch.where(self.hole, pred_xstart, self.known)

        predict = objective.predictor(denoiser, clip_denoised, denoised_fn=fill, model_kwargs=model_kwargs)
        return lambda x_t, level: predict(self.hold(objective, x_t, level, noise), level)

    def keeping(self, step: StepFunction, last_level: float) -> StepFunction:
        """A sampler's step that leads from ``last_level`` to the known latents themselves, whatever noise it drew."""

        def kept(predict: Predict, x_t: Tensor, level: Tensor, randn_like: RandnLike) -> Step:
            state = step(predict, x_t, level, randn_like)
            if level[0].item() != last_level:
                return state
            return state._replace(sample=torch.where(self.hole, state.sample, self.known))

        return kept


def interpolated_at_once(model: Denoiser, hole_tokens: Tensor) -> Denoiser:
    """The model with all tokens of the hole masked, as in training. Arguments as of :func:`interpolated_by_halves`."""
    some_known = not bool(hole_tokens[0].all())

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not some_known:  # nothing to interpolate from
            return model(x, t, y)
        return model(x, t, y, draw=Draw(KeptTokens.all_but(hole_tokens.expand(len(x), -1))))

    return denoise


def interpolated_by_halves(model: Denoiser, hole_tokens: Tensor, patch_size: int, noise: SampleNoise) -> Denoiser:
    """The model with the hole masked by halves: each token of it is predicted by a pass that sees it.

    In each of two passes, one half of the hole is masked and interpolated from the known region and the other half;
    the halves are drawn anew each time. model: ``model(x, t, y, draw=...)``. hole_tokens: (N or 1, L) bool, the same
    number in each row. noise: draws (N, L) values per call.
    """
    num_hole = int(hole_tokens[0].sum())

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if num_hole < 2:  # nothing to halve
            return model(x, t, y)
        hole = hole_tokens.expand(len(x), -1)
        draw = noise.randn(hole.shape[1:], x.device).masked_fill(~hole, torch.inf)
        rank = draw.argsort(dim=1).argsort(dim=1)
        first = rank < num_hole // 2  # (N, L)
        sees_first = model(x, t, y, draw=Draw(KeptTokens.all_but(hole & ~first)))
        sees_rest = model(x, t, y, draw=Draw(KeptTokens.all_but(first)))
        grid_size = x.shape[-1] // patch_size
        squares = first.view(-1, 1, grid_size, grid_size).float()
        return torch.where(F.interpolate(squares, scale_factor=patch_size) > 0, sees_first, sees_rest)

    return denoise


@dataclass(frozen=True)
class Photo:
    """An image to fill. pixels: (S, S, 3) uint8; mask: (S, S) bool, True where to fill."""

    pixels: np.ndarray
    mask: np.ndarray

    def paste_around(self, images: np.ndarray) -> np.ndarray:
        """Put the photo's own pixels outside of the mask into images (N, S, S, 3)."""
        return np.where(self.mask[..., None], images, self.pixels)

    def inpainting(
        self, first_stage: FirstStage, side: SideInterpolation | None, device: torch.device | str
    ) -> Inpainting:
        """Encode the photo, by the posterior's mean. side: see :func:`side_interpolation`.

        A latent belongs to the hole when any of its pixels is to be filled, and so does a token with ``side``.
        """
        image = torch.from_numpy(to_model_range(self.pixels[..., : image_channels(first_stage)])).to(device)[None]
        mask = torch.from_numpy(self.mask).to(device)[None, None]
        hole = F.max_pool2d(mask.float(), first_stage.downsample).bool()
        return Inpainting(encode_mean(first_stage, image), hole, side)


def encode_mean(first_stage: FirstStage, images: Tensor) -> Tensor:
    """The latents of images (N, 1 or 3, H, W) in [-1, 1], without the noise of the posterior."""
    side = images.shape[-1] // first_stage.downsample
    no_noise = torch.zeros(len(images), first_stage.latent_channels, side, side, device=images.device)
    return first_stage.encode(images, no_noise)


def image_channels(first_stage: FirstStage) -> int:
    """1 where the latents are grey images, else 3."""
    return first_stage.latent_channels if isinstance(first_stage, PixelSpace) else 3


def side_interpolation(model: LatentTransformer, config: RunConfig, mode: str) -> SideInterpolation | None:
    """Translate ``--inpaint_mode`` for a model. Raises ValueError for an unknown mode, or one the model cannot do."""
    if mode not in MODES:
        raise ValueError(f"--inpaint_mode {mode}: unknown; choose one of {', '.join(MODES)}")
    if mode == "plain":
        return None
    if reason := no_interpolater(model, config):
        raise ValueError(f"--inpaint_mode side: {reason}; use --inpaint_mode plain")
    return SideInterpolation.of(model)


def no_interpolater(model: LatentTransformer, config: RunConfig) -> str | None:
    """Say why a model cannot interpolate masked tokens; None when it can."""
    if not model.rejoin.interpolates:
        return f"{config.model.model} has no side-interpolater under --policy {config.model.policy_name}"
    # Without masking the mask token stays zero, unless the training began with weights that had learned one.
    if not model.mask_token.any() or (config.training and config.model.mask_ratio is None):
        return "this model was trained without masking, so its side-interpolater has learned nothing"
    return None


def open_photo(image: Path, mask: Path, image_size: int, grey: bool) -> Photo:
    """Read a photo and its mask and cut them to the model's size, as training images are.

    mask: white where to fill, of the photo's size or already of the model's. grey: for models of grey images. Raises
    ValueError for files that cannot be read, sizes that differ, or a mask without white.
    """
    photo, white = read_image(str(image)), read_image(str(mask))
    if white.size not in (photo.size, (image_size, image_size)):
        raise ValueError(
            f"--mask {mask}: it is {white.size[0]} x {white.size[1]} pixels, the image is {photo.size[0]} x "
            f"{photo.size[1]}; make them equal (or the mask {image_size} x {image_size}, for the middle of the image)"
        )
    pixels = center_crop_arr(photo, image_size)
    if grey:
        pixels = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
    filled = np.asarray(Image.fromarray(center_crop_arr(white, image_size)).convert("L")) >= WHITE_FROM
    if not filled.any():
        raise ValueError(
            f"--mask {mask}: nothing to fill, it is black where the model's {image_size} x {image_size} pixels are; "
            "paint white what should be filled"
        )
    if filled.all():
        raise ValueError(
            f"--mask {mask}: it is white everywhere (transparent parts count as white), so nothing of the image would "
            "be kept; paint black what should stay, or leave out --image and --mask"
        )
    return Photo(pixels, filled)
