"""Features of images from a network of one's own: ``encode_latents.py --features`` keeps them beside the latents."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from masked_diffusion.files import sha256_of

# What the network is given. A cache's record says it, so that features of another input are never mixed with these.
INPUT = "RGB in [-1, 1], centre crop"


class ExportedFeatures:
    """A program that ``torch.export.save`` wrote: (n, 3, S, S) float32 RGB in [-1, 1] -> (n, ...) of any float type.

    The images are the autoencoder's: centre crops of ``image_size`` pixels. A network for another size or scale of
    numbers has to be exported with what converts them.

    Loading a program can run any code: torch.export falls back to unpickling, evaluates shapes as Python expressions,
    and looks functions up by name. The script asks for the user's word first. shape: of the features of an image.
    """

    def __init__(self, path: Path, device: torch.device, image_size: int, batch_sizes: Collection[int]) -> None:
        """Load the program and try it. batch_sizes: of all batches to come, each tried once.

        Raises ValueError, naming --features, for another file, and for a network that takes no such images.
        """
        self.path, self.device = path, device
        try:
            program = torch.export.load(path)
            # Parameters are not all that has a device: the program may make tensors where it was exported.
            self._module = move_to_device_pass(program, device).module()
        except Exception as error:  # a damaged archive raises almost anything
            raise ValueError(
                f"--features {path}: not a program that torch.export.save wrote ({_short(error)})"
            ) from error
        shapes = {self._try(size, image_size) for size in sorted(batch_sizes)}
        if len(shapes) > 1:
            raise ValueError(f"--features {path}: returns features of several shapes, {sorted(shapes)}, for one size")
        (self.shape,) = shapes

    def _try(self, batch_size: int, image_size: int) -> tuple[int, ...]:
        """The shape of the features of one image."""
        images = torch.zeros(batch_size, 3, image_size, image_size, device=self.device)
        try:
            with torch.no_grad():
                features = self._module(images)
        except Exception as error:  # whatever it raises
            raise ValueError(
                f"--features {self.path}: cannot take float32 images {tuple(images.shape)} ({_short(error)}); export "
                "it for this size, with a dynamic batch, and with any resizing in it"
            ) from error
        if not isinstance(features, Tensor) or not features.is_floating_point() or features.shape[:1] != (batch_size,):
            found = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features)
            raise ValueError(
                f"--features {self.path}: returns {found} for {batch_size} images; expected one tensor of floats whose "
                "first axis is the images"
            )
        return tuple(features.shape[1:])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) float32 on the device -> (n, ...) float16 on the CPU.

        Raises ValueError for numbers that float16 does not hold: as infinities they would be of no use to a training.
        """
        features: Tensor = self._module(images)
        kept = features.to(torch.float16)
        if bool((kept.isinf() & features.isfinite()).any()):  # of unreadable images all are NaN
            most = features[features.isfinite()].abs().max().item()
            raise ValueError(
                f"--features {self.path}: returns numbers up to {most:.3g}, and float16 holds "
                f"{torch.finfo(torch.float16).max:.0f} at most; divide them in what is exported"
            )
        return kept.cpu()

    def description(self) -> dict[str, Any]:
        """What a cache records of it. The hash is that of the file."""
        return {
            "features_path": str(self.path.absolute()),
            "features_sha256": sha256_of(self.path),
            "features_shape": list(self.shape),
            "features_input": INPUT,
        }


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
