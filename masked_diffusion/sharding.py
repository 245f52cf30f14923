"""How the processes of a run share its model."""

import contextlib
import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from masked_diffusion.dist_util import Ranks


def share(model: nn.Module, ranks: Ranks) -> nn.Module:
    """What to call in training, so that the model's gradients are averaged over the ranks."""
    if ranks.world_size == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # Buffers are constant tables, so no forward has to send them around. Newer torch renamed the switch.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    switch: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **switch)


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Forward and backward in here leave the gradients of a shared model unreduced, to be added to."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
