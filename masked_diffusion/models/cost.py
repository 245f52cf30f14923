"""What a training step costs under a policy, in multiply-adds, by arithmetic.

Matrix products, attention and the patch embedding count; what works on single numbers (norms, gates, softmax) does not.
"""

from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.layers import linear_weights

PASSES = 3  # backward takes twice the forward's products


def forward_cost(model: LatentTransformer, num_keep: int | None = None) -> int:
    """Multiply-adds of one sample's pass through a model.

    num_keep: how many tokens stay, in a view that drops some; None for a view that drops none.
    """
    num_tokens = model.num_tokens
    # A side-interpolater runs also where all stay, see Policy.draw.
    away = num_keep is not None and (num_keep < num_tokens or model.rejoin.runs_whole)
    levels = 2 if model.policy.two_levels and away else 1
    here = num_tokens
    total = num_tokens * model.x_embedder.proj.weight.numel() + levels * linear_weights(model.t_embedder)
    for number, block in enumerate(model.stack):
        if number == model.route.leave and num_keep is not None:
            here = num_keep
        if number == model.route.back:
            here = num_tokens
            total += model.rejoin.cost(model, num_tokens, away)
        total += block.cost(here, levels)
    return total + model.rejoin.output_cost(model, num_tokens, here, levels)


def cost(model: LatentTransformer, num_keep: int | None = None) -> int:
    """Multiply-adds of one sample in a training step, forward and backward, all views of the model's policy.

    num_keep: how many tokens stay in the views that drop some; None for the policy's own number, of the mean ratio
    where the ratio is drawn. All tokens, as in a finale, is ``model.num_tokens``.
    """
    if num_keep is None and any(view.drops for view in model.views):
        num_keep = model.num_keep(0.5)
    return PASSES * sum(forward_cost(model, num_keep if view.drops else None) for view in model.views)


def plain_cost(model: LatentTransformer) -> int:
    """Multiply-adds of one sample in a training step of the same blocks where every block sees every token once."""
    width, outputs = model.pos_embed.shape[-1], model.final_layer.linear.out_features
    final = model.num_tokens * width * outputs + 2 * width**2  # a decoder's is of another width
    rejoined = model.rejoin.cost(model, model.num_tokens, away=False)
    rejoined += model.rejoin.output_cost(model, model.num_tokens, model.num_tokens, levels=1)
    return PASSES * (forward_cost(model) - rejoined + final)
