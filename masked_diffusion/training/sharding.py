"""Share a model between the processes of a run: each has all of it, or keeps a shard of it (FSDP, 2304.11277).

A shard is a DTensor: it has the full tensor's shape and holds this rank's rows. Optimizers and averages work on shards
directly. Only norms and full tensors need the other ranks.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from masked_diffusion.dist_util import Ranks
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.block_modes import blocks_of

# zero: each rank keeps the optimizer's moments of its share of the parameters (ZeRO stage 1, 1910.02054). fsdp: each
# keeps its shard of every parameter, gradient, moment and average (stage 3).


class Shared(NamedTuple):
    """A model as the ranks share it. trained: to be called in training, so that gradients are averaged over the ranks.
    skeleton: to be called with weights that are given, see
    :meth:`masked_diffusion.training.optimizers.EMA.averaged_model`."""

    trained: nn.Module
    skeleton: LatentTransformer


def share(model: LatentTransformer, shard: str, ranks: Ranks, half: torch.dtype | None = None) -> Shared:
    """Share a model between the ranks, on their devices. With ``fsdp`` its parameters become shards.

    shard: one of SHARDINGS; a single process ignores it. half: what autocast computes in; None without autocast.
    """
    if ranks.world_size == 1:
        return Shared(model.to(ranks.device), model)
    if shard == "fsdp":  # which moves a block at a time to the device, so that no GPU has to hold all of them
        skeleton = _without_weights(model)
        _shard(model, ranks, half)
        return Shared(model, skeleton)
    model.to(ranks.device)
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # Buffers are constant tables, so no forward has to send them around. Newer torch renamed the switch.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    switch: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return Shared(DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **switch), model)


def _shard(model: LatentTransformer, ranks: Ranks, half: torch.dtype | None) -> None:
    """Shard each block, so that it is gathered only for its own passes, and then the remaining parameters."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # Autocast would round the blocks' weights in every pass: rounded before they are sent, they are half as many bytes.
    # It goes on to say what is computed in which precision, so that no inputs are cast.
    rounded = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=rounded)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no means; with sums all backends do the same


def _without_weights(model: LatentTransformer) -> LatentTransformer:
    """Copy a model with its buffers, and with parameters that have a shape but no values."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared | {id(buffer): buffer for buffer in model.buffers()})


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inside this context, passes add to the gradients of replicas without reducing them over the ranks.

    Gradients of shards are reduced in every pass; waiting would need the memory that sharding saves.
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """Gather a shard into the full tensor; return other tensors unchanged. Collective: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Cut this rank's shard from a full tensor, as ``pattern`` is cut; return it whole when ``pattern`` is no shard."""
    if not isinstance(pattern, DTensor):
        return tensor
    cut = distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)
    return cut.clone()  # else it would keep the whole tensor's memory


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together, (), equal on all ranks. Collective for shards."""
    return whole(nn.utils.get_total_norm(tensors))
