"""What every network that PyTorch runs here has in common: the library, the device, and full precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def import_torch() -> Any:
    """The torch module. Raises ImportError with the remedy."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"PyTorch cannot be imported ({error}); install it with: pip install -r evaluations/requirements-torch.txt"
        ) from error
    return torch


def torch_device(name: str) -> str:
    """The device that a name stands for: auto is a GPU if there is one, under torchrun one for each process.

    Raises ValueError when it is not there.
    """
    torch = import_torch()
    if name == "auto":
        count = torch.cuda.device_count()
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}" if count else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from error
    return name


@contextmanager
def full_precision_inference(device: str) -> Iterator[None]:
    """No gradients, and float32 as it is, whatever the calling program has set by the same switches.

    PyTorch refuses to mix them with its newer ``fp32_precision`` settings: a program that uses those sets them to
    "ieee" itself.

    Published numbers are float32 ones. By default cuDNN rounds what goes into a convolution to 10 bits (TF32); a
    program may have allowed that, or bfloat16, for matrix products, too, and may call under autocast.
    """
    torch = import_torch()
    of_products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(device).type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(of_products)


def to_device(images: np.ndarray, device: str) -> Any:
    """uint8 (n, H, W, 3) -> a tensor (n, 3, H, W)."""
    return import_torch().from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
