"""Image <-> latent: an autoencoder of diffusers, or the identity for diffusion in pixel space."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from masked_diffusion.choices import PIXEL_SPACE, class_of, downsample_of


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel of an autoencoder's latents, before any scale or shift: C each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def recorded(cls, description: Mapping[str, Any]) -> "ChannelStatistics | None":
        """What ``config.json`` or a cache's record says; None where latents are scaled and shifted by one number."""
        if description.get("channel_mean") is None:
            return None
        return cls(tuple(description["channel_mean"]), tuple(description["channel_std"]))

    def record(self) -> dict[str, list[float]]:
        return {"channel_mean": list(self.mean), "channel_std": list(self.std)}

    def columns(self, channels: int, device: torch.device | str, vae_path: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation as (C, 1, 1) float32. Raises ValueError where latents have another number of channels."""
        if len(self.mean) != channels:
            raise ValueError(
                f"--vae_path {vae_path}: it has {channels} channels, the recorded channel_mean has {len(self.mean)}; "
                "give the autoencoder that they were measured with"
            )
        mean, std = (torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, 1, 1) for numbers in self)
        return mean, std


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
    """No first stage: latents are the images themselves, of ``channels`` channels, as they are or normalised."""

    downsample = 1
    stochastic = False

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.latent_channels = channels
        self._device = device
        self.description: dict[str, Any] = {"vae_path": PIXEL_SPACE, "scaling_factor": 1.0, "shift_factor": 0.0}
        self._normal: tuple[Tensor, Tensor] | None = None

    def normalise(self, statistics: ChannelStatistics) -> None:
        """From now on give each channel mean 0 and deviation 1. Raises ValueError for another number of channels."""
        self._normal = statistics.columns(self.latent_channels, self._device, PIXEL_SPACE)
        self.description |= statistics.record()

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        if self._normal is None:
            return images
        mean, std = self._normal
        return (images - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        if self._normal is None:
            return latents
        mean, std = self._normal
        return latents * std + mean

    def identity(self) -> dict[str, Any]:
        """All that determines what it decodes."""
        return self.description


class Kind(NamedTuple):
    """A class of diffusers' autoencoders.

    codes: the number of latent channels by its config. posterior: whether it encodes a distribution, not latents.
    """

    codes: Callable[[Any], int]
    posterior: bool = False


KINDS = {
    "AutoencoderKL": Kind(lambda config: config.latent_channels, posterior=True),
    "AutoencoderDC": Kind(lambda config: config.latent_channels),
    "AutoencoderTiny": Kind(lambda config: config.latent_channels),
    "VQModel": Kind(lambda config: config.vq_embed_dim or config.latent_channels),
}


class Autoencoder:
    """An autoencoder of diffusers, frozen, in float32: a class of :data:`KINDS`.

    Latents are (code - shift) * scale. Both numbers come from the autoencoder's own config, or :meth:`normalise` sets
    them for each channel. A code is a sample of the posterior (``AutoencoderKL``; latent diffusion, 2112.10752), or
    what a deterministic encoder returns.
    """

    def __init__(self, vae: Any, vae_path: str) -> None:
        # Convolutions are a tenth faster with the channels last; the numbers are the same but for rounding.
        self.vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config, kind = vae.config, KINDS[type(vae).__name__]
        self.stochastic = kind.posterior
        self.downsample = downsample_of({**config, "_class_name": type(vae).__name__})
        self.latent_channels = kind.codes(config)
        self._scale: float | Tensor = float(config.scaling_factor)
        self._shift: float | Tensor = float(getattr(config, "shift_factor", None) or 0.0)
        self.description: dict[str, Any] = {
            "vae_path": vae_path,
            "scaling_factor": self._scale,
            "shift_factor": self._shift,
        }

    def normalise(self, statistics: ChannelStatistics) -> None:
        """From now on give each channel of the latents mean 0 and deviation 1, in place of the config's two numbers.

        Raises ValueError for statistics of another number of channels.
        """
        device = next(self.vae.parameters()).device
        mean, std = statistics.columns(self.latent_channels, device, self.description["vae_path"])
        self._shift, self._scale = mean, 1 / std
        self.description |= statistics.record()

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images (N, 3, H, W) in [-1, 1]; returns (N, C, H / downsample, W / downsample).

        noise: normal, of the latents' shape, to sample the posterior with; None draws it from torch's global generator.
        A deterministic encoder has no use for it.
        """
        return self.sample(self.moments(images), noise)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """The posterior of images (N, 3, H, W): its mean, then its log-variance, (N, 2C, h, w); of a deterministic
        encoder the codes, (N, C, h, w).
        """
        encoded = self.vae.encode(images)
        if not self.stochastic:
            return encoded[0]
        posterior = encoded.latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (N, C, h, w) from what :meth:`moments` returns; noise as in :meth:`encode`."""
        if not self.stochastic:
            return (moments - self._shift) * self._scale
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
    """An autoencoder for cached posteriors or codes: it encodes what its :meth:`Autoencoder.moments` gave before.

    weights_sha256: of the autoencoder that made them. scales: its scaling_factor and shift_factor then. statistics: of
    its latents' channels, to normalise them by. Raises ValueError when this is another one.
    """

    def __init__(
        self,
        autoencoder: FirstStage,
        weights_sha256: str,
        name: str,
        scales: Mapping[str, float],
        statistics: ChannelStatistics | None = None,
    ) -> None:
        if not isinstance(autoencoder, Autoencoder) or autoencoder.weights_sha256() != weights_sha256:
            raise ValueError(
                f"--vae_path {autoencoder.description['vae_path']}: the latents in --data_dir are of another "
                f"autoencoder; give the one that made them ({name}, weights {weights_sha256[:12]}…), or encode the "
                "images again with this one"
            )
        for setting, value in scales.items():
            if autoencoder.description[setting] != value:
                raise ValueError(
                    f"--vae_path {autoencoder.description['vae_path']}: its {setting} is "
                    f"{autoencoder.description[setting]}, the latents in --data_dir were encoded with {value}; give "
                    "the autoencoder that made them"
                )
        if statistics is not None:
            autoencoder.normalise(statistics)
        self._autoencoder = autoencoder
        self.stochastic = autoencoder.stochastic
        self.downsample, self.latent_channels = autoencoder.downsample, autoencoder.latent_channels
        self.description = autoencoder.description

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._autoencoder.sample(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return self._autoencoder.decode(latents)

    def identity(self) -> dict[str, Any]:
        return self._autoencoder.identity()


def load_first_stage(vae_path: str, device: torch.device | str, image_channels: int = 3) -> PixelSpace | Autoencoder:
    """Load the first stage.

    vae_path: a hub name or a local folder of an autoencoder of :data:`KINDS`, or ``none`` for pixel space.
    image_channels: of the data. Raises FileNotFoundError, naming the flag, when no autoencoder of that name can be
    loaded.
    """
    if vae_path.lower() == PIXEL_SPACE:
        return PixelSpace(image_channels, device)
    looks_local = Path(vae_path).exists() or vae_path.startswith((".", "/", "~")) or vae_path.count("/") != 1
    source = str(Path(vae_path).expanduser()) if looks_local else vae_path
    if looks_local and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"--vae_path {vae_path}: not a folder with a diffusers AutoencoderKL (no config.json in it); give such a "
            "folder, a hub name such as stabilityai/sd-vae-ft-mse, or none for pixel space"
        )
    import diffusers

    try:
        name = _class_name(source)
        # Else diffusers hints at accelerate, which would save no more than a moment's memory here.
        vae = getattr(diffusers, name).from_pretrained(source, low_cpu_mem_usage=False)
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


def _class_name(source: str) -> str:
    """The class of the autoencoder in a folder or on the hub. Raises ValueError for one that is not in KINDS."""
    from diffusers import AutoencoderKL

    name = class_of(AutoencoderKL.load_config(source))
    if name not in KINDS:
        raise ValueError(f"it is a {name}, not one of {', '.join(KINDS)}")
    return name


def _root_cause(error: BaseException) -> BaseException:
    """The hub client's outermost error complains of a missing file where there is no network."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
