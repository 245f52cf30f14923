"""Image <-> latent: a diffusers autoencoder, or the identity for diffusion in pixel space."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

PIXEL_SPACE = "none"


class FirstStage(Protocol):
    """Map between images in [-1, 1] and the latents that are diffused.

    downsample: image side / latent side. latent_channels: C of a latent. stochastic: whether encoding samples a
    posterior. description: what a checkpoint has to record of it.
    """

    downsample: int
    latent_channels: int
    stochastic: bool
    description: dict[str, Any]

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def identity(self) -> dict[str, Any]: ...


class PixelSpace:
    """No first stage: latents are the images themselves, of ``channels`` channels."""

    downsample = 1
    stochastic = False

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels
        self.description: dict[str, Any] = {"vae_path": PIXEL_SPACE, "scaling_factor": 1.0, "shift_factor": 0.0}

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def identity(self) -> dict[str, Any]:
        """All that determines what it decodes."""
        return self.description


class Autoencoder:
    """A diffusers ``AutoencoderKL`` (latent diffusion, 2112.10752), frozen, in float32.

    Latents are (posterior sample - shift) * scale, both numbers from the autoencoder's own config.
    """

    stochastic = True

    def __init__(self, vae: Any, vae_path: str) -> None:
        # Convolutions are a tenth faster with the channels last; the numbers are the same but for rounding.
        self.vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config = vae.config
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = config.latent_channels
        self._scale = float(config.scaling_factor)
        self._shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.description: dict[str, Any] = {
            "vae_path": vae_path,
            "scaling_factor": self._scale,
            "shift_factor": self._shift,
        }

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample the posterior of images (N, 3, H, W) in [-1, 1]; returns (N, C, H / downsample, W / downsample).

        noise: normal, of the latents' shape; None draws it from torch's global generator.
        """
        return self.sample(self.moments(images), noise)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """The posterior of images (N, 3, H, W): its mean, then its log-variance, (N, 2C, h, w)."""
        posterior = self.vae.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (N, C, h, w) from moments (N, 2C, h, w); noise as in :meth:`encode`."""
        mean, logvar = moments.chunk(2, dim=1)
        noise = torch.randn_like(mean) if noise is None else noise
        return (mean + torch.exp(0.5 * logvar) * noise - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> images (N, 3, H, W), about in [-1, 1]."""
        return self.vae.decode(latents / self._scale + self._shift).sample

    def weights_sha256(self) -> str:
        """Hexadecimal hash of names and values of all weights, whatever file they came in."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """All that determines what it decodes: the weights, since another autoencoder may come to lie at this path."""
        return {**self.description, "weights_sha256": self.weights_sha256()}


class CachedPosterior:
    """An autoencoder for cached posteriors: it encodes their moments, (N, 2C, h, w), in place of images.

    weights_sha256: of the autoencoder that made them. Raises ValueError when this is another one.
    """

    stochastic = True

    def __init__(self, autoencoder: FirstStage, weights_sha256: str, name: str) -> None:
        if not isinstance(autoencoder, Autoencoder) or autoencoder.weights_sha256() != weights_sha256:
            raise ValueError(
                f"--vae_path {autoencoder.description['vae_path']}: the latents in --data_dir are of another "
                f"autoencoder; give the one that made them ({name}, weights {weights_sha256[:12]}…), or encode the "
                "images again with this one"
            )
        self._autoencoder = autoencoder
        self.downsample, self.latent_channels = autoencoder.downsample, autoencoder.latent_channels
        self.description = autoencoder.description

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._autoencoder.sample(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return self._autoencoder.decode(latents)

    def identity(self) -> dict[str, Any]:
        return self._autoencoder.identity()


def load_first_stage(vae_path: str, device: torch.device | str, image_channels: int = 3) -> FirstStage:
    """Load the first stage.

    vae_path: a hub name or a local folder of an ``AutoencoderKL``, or ``none`` for pixel space. image_channels: of the
    data. Raises FileNotFoundError, naming the flag, when no autoencoder of that name can be loaded.
    """
    if vae_path.lower() == PIXEL_SPACE:
        return PixelSpace(image_channels)
    looks_local = Path(vae_path).exists() or vae_path.startswith((".", "/", "~")) or vae_path.count("/") != 1
    source = str(Path(vae_path).expanduser()) if looks_local else vae_path
    if looks_local and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"--vae_path {vae_path}: not a folder with a diffusers AutoencoderKL (no config.json in it); give such a "
            "folder, a hub name such as stabilityai/sd-vae-ft-mse, or none for pixel space"
        )
    from diffusers import AutoencoderKL

    try:
        # Else diffusers hints at accelerate, which would save no more than a moment's memory here.
        vae = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers and the hub client raise many kinds; all mean that there is no autoencoder
        if looks_local:
            raise FileNotFoundError(
                f"--vae_path {vae_path}: cannot load this autoencoder ({_first_line(error)}); give a folder that is "
                "complete, or --vae_path none for pixel space"
            ) from error
        raise FileNotFoundError(
            f"--vae_path {vae_path}: no such folder here, and the hub did not give it "
            f"({_first_line(_root_cause(error))}); give --vae_path a folder with a copy of it, or --vae_path none for "
            "pixel space"
        ) from error
    return Autoencoder(vae.to(device), vae_path if not looks_local else str(Path(source).absolute()))


def _root_cause(error: BaseException) -> BaseException:
    """The hub client's outermost error complains of a missing file where there is no network."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
