"""Features of any other network, given as a program that torch.export wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from inception_torch import import_torch, torch_device
from sample_sets import ImageSource


class ExportedFeatures:
    """A `.pt2` file: uint8 images (n, 3, H, W) in, features (n, D) out, for any n."""

    def __init__(self, path: Path, device: str = "auto") -> None:
        """Load the program. Raises ImportError without torch, ValueError for another file or device."""
        torch = import_torch()
        if not path.is_file():
            raise ValueError(f"--features {path}: no such file")
        self.path, self.device = path, torch_device(device)
        try:
            self._module = torch.export.load(path).module().to(self.device)
        except Exception as error:  # a damaged archive raises almost anything
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"--features {path}: not a program that torch.export.save wrote ({reason})") from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) -> (n, D) float32. Raises ValueError when the program takes no such images."""
        torch = import_torch()
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)
        try:
            with torch.inference_mode():
                features = self._module(pixels)
        except Exception as error:  # whatever the program raises
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--features {self.path}: cannot take uint8 images {tuple(pixels.shape)} ({reason})"
            ) from error
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"--features {self.path}: returns {tuple(features.shape)}, expected (n, D) features")
        return features.float().cpu().numpy()

    def of_set(self, images: ImageSource, batch_size: int) -> np.ndarray:
        """Features (N, D) of all images of a set."""
        return np.concatenate([self(batch) for batch in images.batches(batch_size)])
