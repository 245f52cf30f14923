"""What a step costs by arithmetic is what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from masked_diffusion import choices
from masked_diffusion.models import FAMILIES
from masked_diffusion.models.cost import cost, forward_cost, plain_cost
from masked_diffusion.models.policies import POLICIES

FITTING = [(policy, family) for policy, one in choices.POLICIES.items() for family in one.families]
SHAPE = (3, 16, 16)


def net(policy, family, patch_size=2, **settings):
    sizes = {"input_size": 16, "patch_size": patch_size, "in_channels": 3, "hidden_size": 64, "num_heads": 4}
    model = FAMILIES[family](**sizes, depth=12, num_classes=10, learn_sigma=False, policy=policy, **settings)
    return model.train()


def times(draw):
    return torch.tensor([3]) if draw is None or draw.group is None else torch.tensor([[3, 5]])


def counted(model, whole=False):
    """Multiply-adds of a sample's step, forward and backward, as torch counts them; attention, too."""
    total = 0
    for view in model.views:
        draw = None
        if view.drops:
            draw = model.draw(torch.rand(1, model.num_tokens), 0.5, torch.rand(1), float(not whole))
        t, y = times(draw), torch.tensor([1])
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.randn(1, *SHAPE), t, y, draw=draw).sum().backward()
        total += counter.get_total_flops() / 2
    return total


@pytest.mark.parametrize(("policy", "family"), FITTING)
@pytest.mark.parametrize("whole", [False, True], ids=["sparse", "finale"])
def test_the_cost_of_a_step_is_what_torch_counts(policy, family, whole):
    model = net(policy, family, mask_ratio=POLICIES[policy].mask_ratio)
    reckoned = cost(model, model.num_tokens if whole else None)
    assert reckoned == pytest.approx(counted(model, whole), rel=0.05)


@pytest.mark.parametrize(("policy", "family"), FITTING)
def test_the_cost_of_a_pass_leaves_nothing_out(policy, family):
    model = net(policy, family, mask_ratio=POLICIES[policy].mask_ratio).eval()
    draw = model.draw(torch.rand(1, model.num_tokens), 0.5) if model.policy.drops else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.randn(1, *SHAPE), times(draw), torch.tensor([1]), draw=draw)
    assert 2 * forward_cost(model, model.num_keep(0.5) if draw else None) == counter.get_total_flops()


# Of the published settings at S/2 and 256 tokens, blocks alone; embedders and output are under one part in a hundred.
PUBLISHED = {"mdt": 1.82, "tread": 0.69, "sprint": 0.50, "deferred": 0.36}


@pytest.mark.parametrize("policy", PUBLISHED)
def test_the_costs_of_the_small_size_are_those_of_the_arithmetic(policy):
    with torch.device("meta"):
        model = FAMILIES["DiT"](32, depth=12, hidden_size=384, num_heads=6, policy=policy)
    assert cost(model) / plain_cost(model) == pytest.approx(PUBLISHED[policy], abs=0.02)


def test_a_step_of_all_tokens_without_a_policy_is_the_plain_one():
    model = net("none", "DiT")
    assert cost(model) == plain_cost(model) == 3 * forward_cost(model)
    assert plain_cost(net("sprint", "DiT")) == plain_cost(net("tread", "DiT")) == plain_cost(model)
