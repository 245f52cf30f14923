"""The settings of a small autoencoder's training."""

import math
from dataclasses import dataclass
from typing import Any

from masked_diffusion.settings import setting

GROUP = 8  # channels that are normalised together; widths are multiples of it


@dataclass(frozen=True)
class AutoencoderConfig:
    """How an autoencoder is built and trained; named as the flags. Raises ValueError for what cannot be.

    downsample: image side / latent side. latent_channels: C of a latent. channels: of the widest maps; each halving of
    the side doubles them. crop: side of the random squares that a step is trained on. kl_weight: of the posterior's
    divergence, per number of the image.
    """

    downsample: int = setting(2, "image side / latent side: 2, 4 or 8", "model")
    latent_channels: int = setting(4, "channels of the latents", "model")
    channels: int = setting(16, "channels of the first maps, a multiple of 8; each halving doubles them", "model")
    crop: int = setting(
        32, "side of the random squares of the images that a step sees; larger ones take longer", "data"
    )
    steps: int = setting(4000, "training steps", "training")
    batch_size: int = setting(16, "squares per step", "training")
    lr: float = setting(5e-3, "learning rate at its highest; it falls to 0 along a cosine", "training")
    kl_weight: float = setting(1e-3, "weight of the posterior's divergence from a standard normal", "training")
    seed: int = setting(0, "determines the first weights, the order of the images and all noise", "training")

    def __post_init__(self) -> None:
        if self.downsample not in (2, 4, 8):
            raise ValueError(f"--downsample {self.downsample}: choose 2, 4 or 8")
        if self.channels < 1 or self.channels % GROUP:
            raise ValueError(f"--channels {self.channels}: must be a multiple of {GROUP}, such as 16")
        for name in ("latent_channels", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.crop < self.downsample or self.crop % self.downsample:
            raise ValueError(f"--crop {self.crop}: must be a multiple of --downsample {self.downsample}")
        if not self.lr > 0:
            raise ValueError(f"--lr {self.lr}: must be positive, such as 5e-3")
        if not self.kl_weight >= 0:
            raise ValueError(f"--kl_weight {self.kl_weight}: must be 0 or more, such as 1e-3")

    def build(self, image_size: int) -> Any:
        """A fresh ``AutoencoderKL`` for RGB images of this side, its weights drawn from the seed."""
        from diffusers import AutoencoderKL

        from masked_diffusion.randomness import global_generator

        levels = int(math.log2(self.downsample)) + 1
        with global_generator(self.seed, "autoencoder init"):
            return AutoencoderKL(
                block_out_channels=tuple(self.channels * 2**level for level in range(levels)),
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=1,
                norm_num_groups=GROUP,
                latent_channels=self.latent_channels,
                mid_block_add_attention=False,
                sample_size=image_size,
            )
