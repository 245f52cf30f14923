"""``--policy dual_timestep``: all tokens go through all blocks, a part of them at a noise level of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masked_diffusion.diffusion.objectives import OBJECTIVES, ObjectiveConfig
from masked_diffusion.models import FAMILIES, create_model
from masked_diffusion.models.layers import modulation
from masked_diffusion.models.tokens import Draw, level_of_pixels, pixels_by_token

few = settings(max_examples=10, deadline=None, derandomize=True)


@st.composite
def two_levels(draw):
    """A small model under dual_timestep, its inputs with two levels, and a draw."""
    depth, grid = draw(st.integers(2, 4)), draw(st.integers(2, 5))
    torch.manual_seed(draw(st.integers(0, 99)))
    family, count = FAMILIES[draw(st.sampled_from(["DiT", "MDT", "SiT"]))], draw(st.integers(1, 5))
    model = family(
        2 * grid, 2, 1, 16, depth, 2, num_classes=3, learn_sigma=False, decode_layer=1, policy="dual_timestep",
        mask_ratio=draw(st.sampled_from([0.25, 0.3, 0.5])),
    ).train()  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(count, 1, 2 * grid, 2 * grid), 1000 * torch.rand(count, 2), torch.randint(0, 3, (count,))
    return model, inputs, torch.rand(count, grid**2)


@few
@given(two_levels())
def test_two_equal_levels_are_one_to_the_bit(case):
    model, (x, t, y), noise = case
    draw, label_noise = model.draw(noise), torch.rand(len(x))
    one = model(x, t[:, 0], y, label_noise=label_noise)
    assert torch.equal(model(x, t[:, :1].expand(-1, 2), y, label_noise=label_noise, draw=draw), one)
    assert not torch.allclose(model(x, t, y, label_noise=label_noise, draw=draw), one)


@few
@given(two_levels())
def test_the_group_is_the_asked_share_and_nobody_leaves(case):
    model, _, noise = case
    draw = model.draw(noise)
    size = model.num_tokens - int(model.num_tokens * (1 - model.mask_ratio))
    assert draw.kept is None and (draw.group.sum(dim=1) == size).all()
    assert model.draw(noise, share=0.0) == Draw()


@few
@given(two_levels())
def test_modulation_by_two_levels_is_that_of_each_token_by_its_own(case):
    model, (_, t, y), noise = case
    group, layer = model.draw(noise).group, model.stack[0].adaLN_modulation
    c = torch.randn(2, len(t), 16)
    by_token = torch.where(group[..., None], c[1][:, None], c[0][:, None])  # (N, L, D)
    torch.testing.assert_close(modulation(layer, c, group), layer(by_token))


@few
@given(two_levels())
def test_the_state_and_the_target_of_a_token_are_those_of_its_level(case):
    model, (x, t, y), noise = case
    flow = OBJECTIVES["flow"](ObjectiveConfig(objective="flow"), lambda: None, None)
    levels, group, eps = t / 1000, model.draw(noise).group, torch.randn_like(x)
    pixel_level = level_of_pixels(levels, group, x.shape[-1])
    seen = []

    def network(state, time, **kwargs):
        seen.append((state, time))
        return torch.zeros_like(state)

    terms = flow.training_losses(network, x, levels, {}, eps, pixel_level=pixel_level)
    [(state, time)] = seen
    torch.testing.assert_close(time, t)
    for number in range(2):
        alone = pixels_by_token(flow.q_sample(x, levels[:, number], eps), model.num_tokens)
        mine = group == bool(number)
        torch.testing.assert_close(pixels_by_token(state, model.num_tokens)[mine], alone[mine])
    torch.testing.assert_close(terms["loss"], (eps - x).square().flatten(1).mean(1))


def test_objectives_of_one_level_per_image_and_a_group_of_more_than_half_are_refused():
    model = create_model("DiT_Ti_2", input_size=8, in_channels=1, policy="dual_timestep")
    for objective in ("ddpm", "x0", "v", "edm"):
        with pytest.raises(ValueError, match=f"--objective {objective}: not with this policy, which is for flow"):
            model.policy.check_objective(objective, 4)
    with pytest.raises(ValueError, match="mask_ratio 0.6: under dual_timestep .* at most 0.5"):
        create_model("DiT_Ti_2", input_size=8, policy="dual_timestep", mask_ratio=0.6)
