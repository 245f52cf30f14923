"""How a model's blocks are run: compiled, or once more in backward. Weights, names and results stay as they are."""

import torch
from torch import nn

from masked_diffusion.models.layers import Block


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks in the order in which the model names them."""
    return [module for module in model.modules() if isinstance(module, Block)]


def recompute_blocks(model: nn.Module) -> None:
    """Keep of each block only its input for backward, which runs the block again (1604.06174)."""
    for block in blocks_of(model):
        block.recomputes = True


def compile_blocks(model: nn.Module, device: torch.device) -> str | None:
    """Compile the blocks, one code for all of the same kind, at the first pass of each shape.

    The blocks are what training, guidance and previews have in common, whichever method of the model they call.
    Returns None, or why this machine cannot compile; then nothing changes.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # each backend raises kinds of its own
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    for block in blocks_of(model):
        block.compile()
    return None
