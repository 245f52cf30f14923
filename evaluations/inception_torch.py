"""Features of the Inception graph of 2015 through PyTorch: torch-fidelity's module with the weights of the same file.

Padding, pooling and resizing follow TensorFlow's conventions there; TensorFlow itself is not needed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from graph_weights import inception_weights
from inception_graph import SPATIAL_CHANNELS
from torch_runtime import full_precision_inference, import_torch, to_device, torch_device

SPATIAL_MODULE = "Mixed_6d.branch1x1"  # mixed_6/conv of the graph
SPATIAL_SIDE = 17  # every image is resized to 299×299 first


class TorchInception:
    """A feature backend (see feature_extraction.py) on a torch device."""

    def __init__(self, path: Path, sha256: str, folders: list[Path], device: str = "auto") -> None:
        """Load the weights of a graph. sha256: of the file; folders: where its conversion is kept.

        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        Raises ImportError when torch or torch-fidelity is missing; ValueError for a device that is not there and for
        another graph than that of 2015.
        """
        torch = import_torch()
        self.path, self.sha256, self.device = path, sha256, torch_device(device)
        self.versions = {"torch": str(torch.__version__)}
        self.identity = f"{sha256} torch"
        weights = inception_weights(path, sha256, folders)
        self.softmax_weight = np.ascontiguousarray(weights["fc.weight"].T)
        self._network = _build(weights, path).to(self.device)
        self._spatial: Any = None
        self._network.get_submodule(SPATIAL_MODULE).register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: Any, inputs: Any, output: Any) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    def widths(self, height: int, width: int) -> tuple[int, int]:
        """Widths (D, D_s) of the features of images of any size."""
        return len(self.softmax_weight), SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_CHANNELS

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, H, W, 3) -> pool features (n, D) and spatial features (n, D_s) in H, W, C order, float32."""
        with full_precision_inference(self.device):
            (pool,) = self._network(to_device(images, self.device))
        spatial = self._spatial.permute(0, 2, 3, 1).reshape(len(images), -1)
        return pool.cpu().numpy(), spatial.cpu().numpy()


def _build(weights: dict[str, np.ndarray], path: Path) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"torch-fidelity holds the network for --backend torch and cannot be imported ({error}); "
            "install it with: pip install -r evaluations/requirements-torch.txt"
        ) from error
    torch = import_torch()
    # The module loads its weights from a file and would fetch other ones if given none.
    file = io.BytesIO()
    batches = {name.replace("running_mean", "num_batches_tracked") for name in weights if name.endswith("running_mean")}
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    torch.save(state | {name: torch.tensor(0) for name in batches}, file)
    file.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception_2015", ["2048"], feature_extractor_weights_path=file)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: weights of other shapes than the Inception graph's of 2015 ({reason})") from error
