"""What is asked of a checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from masked_diffusion.choices import DEFAULT_VAE
from masked_diffusion.settings import setting


@dataclass(frozen=True)
class Request:
    """What is asked of a checkpoint; named as the flags. None: whatever is recorded or shown by its weights.

    class_cond: False, to have no use for its classes. vae_decoder: ``ema`` or ``mse``, where the first stage is the
    hub's default. interpolate_pos: take another ``image_size``. drop_extra: leave out weights that the model does not
    have. usual_decoder, usual_decode_layer: taken where nothing says otherwise; they contradict nothing.
    """

    model: str | None = None
    image_size: int | None = None
    num_classes: int | None = None
    decode_layer: int | None = None
    learn_sigma: bool | None = None
    predict_xstart: bool | None = None
    diffusion_steps: int | None = None
    noise_schedule: str | None = None
    objective: str | None = None
    sigma_small: bool | None = None
    class_cond: bool | None = None
    vae_path: str | None = setting(
        None,
        "hub name or folder of a diffusers AutoencoderKL; default: the one the model was trained with",
        "model",
        str,
    )
    vae_decoder: str | None = setting(None, "ema or mse, where the first stage is the hub's default", "model", str)
    interpolate_pos: bool = setting(
        False, "take weights of another resolution: resize their position and relative tables", "model"
    )
    drop_extra: bool = setting(
        False, "leave out weights that the model does not have, instead of refusing the file", "model"
    )
    usual_decoder: str = "ema"
    usual_decode_layer: int | None = None

    def asked(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the settings that are asked for."""
        values = {name: getattr(self, name, None) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def hub_vae(self) -> str:
        return DEFAULT_VAE.format(self.vae_decoder or self.usual_decoder)
