"""Run a model's blocks compiled, or recompute them in backward. Weights, names and results stay as they are."""

import torch
from torch import nn

from masked_diffusion.models.layers import Block


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks in the order in which the model names them."""
    return [module for module in model.modules() if isinstance(module, Block)]


def recompute_blocks(model: nn.Module) -> None:
    """Keep only each block's input for backward, and run the block again there (1604.06174)."""
    for block in blocks_of(model):
        block.recomputes = True


def compile_blocks(model: nn.Module, device: torch.device) -> str | None:
    """Compile the blocks at the first pass of each shape; blocks of the same kind share their code.

    Training, guidance and previews all run the blocks, whichever method of the model they call.
    Returns None, or why this machine cannot compile; then nothing changes.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # each backend raises kinds of its own
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    for block in blocks_of(model):
        block.compile()
    return None
